#include "linalg/int4.cuh"

#include "linalg/blas.cuh"

#include <limits>

namespace subspan::cuda {
namespace {

template <class T> SUBSPAN_DEVICE Accumulate<T> entry(const Matrices<const T> &a, int64_t e) {
    const int64_t i = e / a.cols;
    return widen(a.data[i * a.row_stride + (e - i * a.cols) * a.col_stride]);
}

// A warp a group. Products and sums are those of the CPU: nothing is contracted, since nothing is added to a product.
template <class T>
__global__ void __launch_bounds__(256)
    scale_kernel(SUBSPAN_PARAMETER const Matrices<const T> a, int64_t group, int64_t groups, Accumulate<T> *scale, Accumulate<T> *zero) {
    using A = Accumulate<T>;
    const int64_t g = int64_t(blockIdx.x) * 8 + threadIdx.x / 32, all = a.rows * a.cols;
    const int lane = int(threadIdx.x) % 32;
    if (g >= groups) return;
    const A first = entry(a, g * group);
    A low = first, high = first;
    bool bad = false;
    for (int64_t e = g * group + lane; e < least(all, (g + 1) * group); e += 32) {
        const A x = entry(a, e);
        low = least(low, x);
        high = most(high, x);
        bad = bad || !(x - x == A(0));
    }
    low = -warp_most(-low);
    high = warp_most(high);
    const int worst = warp_most(bad ? 1 : 0);
    if (lane != 0) return;
    const A s = worst != 0 ? A(sqrt(-1.0)) : most(high - low, A(1e-5)) / A(15), z = -rint(low / s);
    scale[g] = s;
    zero[g] = worst != 0 ? s : least(most(z, A(0)), A(15));
}

template <class T>
__global__ void __launch_bounds__(256)
    code_kernel(SUBSPAN_PARAMETER const Matrices<const T> a, int64_t group, const Accumulate<T> *scale, const Accumulate<T> *zero, std::uint8_t *codes) {
    using A = Accumulate<T>;
    const int64_t byte = int64_t(blockIdx.x) * 256 + threadIdx.x, all = a.rows * a.cols;
    if (2 * byte >= all) return;
    unsigned both = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int64_t e = 2 * byte + half;
        if (e >= all) break;
        const int64_t g = e / group;
        const A q = least(most(rint(entry(a, e) / scale[g]) + zero[g], A(0)), A(15));
        both |= (q == q ? unsigned(q) : 0u) << (4 * half);
    }
    codes[byte] = std::uint8_t(both);
}

template <class T>
__global__ void __launch_bounds__(256)
    unpack_kernel(const Int4View<Accumulate<T>> view, T *out, int64_t cols, int64_t row_stride, int64_t col_stride, int64_t all) {
    const int64_t e = int64_t(blockIdx.x) * 256 + threadIdx.x;
    if (e < all) out[(e / cols) * row_stride + (e % cols) * col_stride] = narrow<T>(view.at(e));
}

unsigned blocks_for(int64_t threads) {
    const int64_t blocks = divide_up<int64_t>(threads, 256);
    if (blocks > std::numeric_limits<int>::max()) throw ValueError("a matrix is too large for one call");
    return unsigned(blocks);
}

} // namespace

template <class T> void unpack_rows(const Session &s, const Int4Codes &c, T *out, int64_t row_stride, int64_t col_stride) {
    const int64_t all = c.rows * c.cols;
    if (all > 0)
        launch<unpack_kernel<T>>(s, "unpacking 4-bit codes", Shape{dim3(blocks_for(all)), dim3(256)}, Int4View<Accumulate<T>>(c), out, c.cols, row_stride,
                                 col_stride, all);
}
template void unpack_rows<F16>(const Session &, const Int4Codes &, F16 *, int64_t, int64_t);
template void unpack_rows<Bf16>(const Session &, const Int4Codes &, Bf16 *, int64_t, int64_t);
template void unpack_rows<float>(const Session &, const Int4Codes &, float *, int64_t, int64_t);
template void unpack_rows<double>(const Session &, const Int4Codes &, double *, int64_t, int64_t);

void quantize_int4(const Context &context, const Stack &a, std::int64_t group, std::uint8_t *codes, void *scale, void *zero) {
    if (a.size() != 1) throw ValueError("U must be one matrix");
    if (group < 1) throw ValueError("group must be at least 1, got " + std::to_string(group));
    const Session s(context);
    const int64_t all = a.rows * a.cols, groups = divide_up<int64_t>(all, group);
    if (all == 0) return;
    dispatch(a.dtype, [&](auto tag) {
        using T = decltype(tag);
        auto *sc = static_cast<Accumulate<T> *>(scale), *z = static_cast<Accumulate<T> *>(zero);
        const Matrices<const T> m(a);
        launch<scale_kernel<T>>(s, "scales of 4-bit codes", Shape{dim3(blocks_for(32 * groups)), dim3(256)}, m, group, groups, sc, z);
        launch<code_kernel<T>>(s, "4-bit codes", Shape{dim3(blocks_for((all + 1) / 2)), dim3(256)}, m, group, static_cast<const Accumulate<T> *>(sc),
                               static_cast<const Accumulate<T> *>(z), codes);
    });
}

void unpack_int4(const Context &context, const Int4Codes &codes, const Stack &out) {
    if (out.size() != 1 || out.rows != codes.rows || out.cols != codes.cols) throw ValueError("out does not fit the codes");
    const Session s(context);
    dispatch(out.dtype, [&](auto tag) { unpack_rows(s, codes, static_cast<decltype(tag) *>(out.data), out.row_stride, out.col_stride); });
}

std::int64_t int4_product_workspace(const Int4Codes &codes, const Stack &x, int device) {
    return blas_workspace(device) + divide_up<int64_t>(codes.rows * codes.cols * size_of(x.dtype), 256) * 256;
}

void int4_product(const Context &context, const Int4Codes &codes, const Stack &x, bool left, bool transpose, double alpha, const Stack &out) {
    const int64_t rows = transpose ? codes.cols : codes.rows, cols = transpose ? codes.rows : codes.cols;
    if (left ? (x.rows != cols || out.rows != rows || out.cols != x.cols) : (x.cols != rows || out.cols != cols || out.rows != x.rows))
        throw ValueError("X and out do not fit the packed matrix");
    if (x.dtype != out.dtype || x.size() != out.size()) throw ValueError("X and out must have one dtype and one stack");
    require_blas_layout(operand(x), "X");
    require_blas_layout(operand(out), "out");
    const Session s(context);
    if (out.size() == 0 || out.rows == 0 || out.cols == 0) return;
    if (cols == 0 || rows == 0) throw ValueError("the packed matrix is empty");
    Workspace work(context);
    const Blas blas(s, work);
    dispatch(x.dtype, [&](auto tag) {
        using T = decltype(tag);
        T *dense = work.take<T>(codes.rows * codes.cols);
        unpack_rows(s, codes, dense, codes.cols, int64_t(1));
        Operand u{dense, x.dtype, codes.rows, codes.cols, codes.cols, 1};
        if (transpose) u = u.transposed();
        for (int64_t i = 0; i < x.size(); ++i) {
            const Operand mine = operand(x, i), result = operand(out, i);
            blas.multiply(alpha, left ? u : mine, left ? mine : u, 0.0, result);
        }
    });
}

} // namespace subspan::cuda
