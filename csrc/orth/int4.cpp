#include "subspan/int4.hpp"

#include "linalg/int4.hpp"
#include "linalg/microkernel.hpp"
#include "linalg/packing.hpp"
#include "base/blocking.hpp"
#include "base/amax.hpp"
#include "base/scratch.hpp"
#include "subspan/errors.hpp"
#include "subspan/gemm.hpp"
#include "subspan/parallel.hpp"

#include <algorithm>
#include <cmath>
#include <string>

namespace subspan {
namespace {

using simd::PackSource;
using simd::round_up;
using simd::Shape;
using simd::Vec;
using std::int64_t;

// Blocks: A (rows x depth) is a quarter of the second cache, B (depth x width) flows through it. Short pieces of rows, 128
// entries, come from memory at half of the speed of long ones.
struct Blocks {
    int64_t rows, depth, width;
};
template <class T> Blocks blocks_of() {
    const int64_t depth = 4 * blocking().depth, nr = simd::tile<T>().nr;
    return {std::max<int64_t>(64, blocking().whole / 4 / depth / 4 / 8 * 8), depth, (1024 + nr - 1) / nr * nr};
}

// An operand of a product: dense, packed, or packed and transposed.
template <class T> struct Operand {
    MatrixView<const T> dense;
    const Int4View<T> *packed = nullptr;
    bool transposed = false;

    // Entries [r, r + rows) x [c, c + cols); `tile` (rows x cols) is used where they must be unpacked.
    template <int Bytes> SUBSPAN_INLINE MatrixView<const T> block(int64_t r, int64_t rows, int64_t c, int64_t cols, T *tile) const {
        if (packed == nullptr) return dense.block_rows(r, rows).block_cols(c, cols);
        if (!transposed) {
            unpack_int4<T, Bytes>(*packed, r, rows, c, cols, tile, cols);
            return {tile, rows, cols};
        }
        unpack_int4<T, Bytes>(*packed, c, cols, r, rows, tile, rows);
        return MatrixView<const T>(tile, cols, rows).transposed();
    }
};

template <class T> struct ProductArgs {
    Operand<T> a, b;
    MatrixView<T> c;
    int64_t depth, begin, end; // columns of C
    int64_t top, bottom;       // and its rows
};

template <class T> struct ProductKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(const ProductArgs<T> *g) {
        using V = Vec<T, Bytes>;
        constexpr int MR = Shape<Bytes>::mr, W = V::lanes, NR = Shape<Bytes>::nv * W;
        const int64_t n = g->end - g->begin, np = round_up(n, NR);
        const Blocks most = blocks_of<T>();
        Frame frame;
        T *row = frame.take<T>(np);
        T *pa = frame.take<T>(round_up(most.rows, MR) * most.depth), *pb = frame.take<T>(np * most.depth);
        const bool unpacks = g->a.packed != nullptr || g->b.packed != nullptr;
        T *tile = unpacks ? frame.take<T>(most.depth * std::max<int64_t>(most.rows, NR)) : nullptr;
        for (int64_t d = 0; d < g->depth; d += most.depth) {
            const int64_t depth = std::min(most.depth, g->depth - d);
            // Rows of a packed B are contiguous codes, which go a whole row of the block at a time.
            const bool by_rows = g->b.packed != nullptr && !g->b.transposed;
            if (by_rows)
                for (int64_t p = 0; p < depth; ++p) {
                    unpack_int4<T, Bytes>(*g->b.packed, d + p, 1, g->begin, n, row, n);
                    std::fill(row + n, row + np, T(0));
                    for (int64_t j = 0; j < np; j += NR)
#pragma GCC unroll 4
                        for (int q = 0; q < NR; q += W) V::store(pb + j * depth + p * NR + q, V::load(row + j + q));
                }
            for (int64_t j = 0; j < n && !by_rows; j += NR) {
                const int64_t lanes = std::min<int64_t>(NR, n - j);
                const auto b = g->b.template block<Bytes>(d, depth, g->begin + j, lanes, tile);
                const PackSource<T> src{b.data, b.col_stride, b.row_stride, nullptr, false};
                simd::pack<T, Bytes>(src, 0, lanes, depth, NR, pb + j * depth);
                simd::pad(lanes, depth, NR, pb + j * depth);
            }
            for (int64_t i = g->top; i < g->bottom; i += most.rows) {
                const int64_t rows = std::min(most.rows, g->bottom - i);
                const auto a = g->a.template block<Bytes>(i, rows, d, depth, tile);
                const PackSource<T> src{a.data, a.row_stride, a.col_stride, nullptr, false};
                simd::pack<T, Bytes>(src, 0, rows, depth, MR, pa);
                simd::pad(rows, depth, MR, pa);
                simd::block<T, Bytes>(depth, pa, pb, g->c.data + i * g->c.row_stride + g->begin, g->c.row_stride, rows, n, d > 0);
            }
        }
    }
};

} // namespace

template <class T> void quantize_int4(MatrixView<const T> a, int64_t group, std::uint8_t *codes, T *scale, T *zero) {
    if (group < 1) throw ValueError("group must be at least 1");
    if (!all_finite<T>(a)) throw ValueError("U holds NaN or infinity");
    const int64_t n = a.rows * a.cols;
    std::fill_n(codes, (n + 1) / 2, std::uint8_t(0));
    const auto at = [&](int64_t i) { return a(i / a.cols, i % a.cols); };
    for (int64_t g = 0; g * group < n; ++g) {
        poll();
        const int64_t end = std::min(n, (g + 1) * group);
        T low = at(g * group), high = low;
        for (int64_t i = g * group; i < end; ++i) {
            const T x = at(i);
            low = std::min(low, x);
            high = std::max(high, x);
        }
        const T s = std::max(high - low, T(1e-5)) / T(15), z = std::clamp(-std::nearbyint(low / s), T(0), T(15));
        if (!std::isfinite(s)) throw ValueError("the range of a group of U overflows");
        scale[g] = s;
        zero[g] = z;
        for (int64_t i = g * group; i < end; ++i) {
            const T q = std::clamp(std::nearbyint(at(i) / s) + z, T(0), T(15));
            codes[i / 2] = static_cast<std::uint8_t>(codes[i / 2] | (int(q) << (4 * (i & 1))));
        }
    }
}

template <class T> void unpack(const Int4View<T> &v, MatrixView<T> out) {
    if (out.rows != v.rows || out.cols != v.cols) throw ValueError("out must have the shape of the basis");
    Frame frame;
    T *row = frame.take<T>(v.cols);
    for (int64_t i = 0; i < v.rows; ++i) {
        unpack_int4<T, 16>(v, i, 1, 0, v.cols, row, v.cols);
        for (int64_t j = 0; j < v.cols; ++j) out(i, j) = row[j];
    }
}

template <class T> void int4_product(const Int4View<T> &u, const StackView<const T> &x, bool left, bool transpose, const StackView<T> &out) {
    const int64_t rows = transpose ? u.cols : u.rows, cols = transpose ? u.rows : u.cols; // of op(U)
    const int64_t inner = left ? x.rows() : x.cols();
    if (inner != (left ? cols : rows))
        throw ValueError("X must have " + std::to_string(left ? cols : rows) + (left ? " rows" : " columns") + ", got " + std::to_string(inner));
    if (out.rows() != (left ? rows : x.rows()) || out.cols() != (left ? x.cols() : cols)) throw ValueError("out has the wrong shape");
    if (out.first.col_stride != 1 && out.cols() > 1) throw ValueError("out must have contiguous rows");
    const int64_t items = x.size(), n = out.cols();
    const Blocks most = blocks_of<T>();
    const int64_t width = most.width;
    const int64_t pieces = (n + width - 1) / width, m = out.rows();
    // Too few pieces for the threads: rows are shared out too, each part of which unpacks U for itself.
    const int64_t wanted = items * pieces < num_threads() && items > 0 ? num_threads() : 1;
    const int64_t height = std::max(4 * most.rows, round_up((m + wanted - 1) / wanted, most.rows)), parts = (m + height - 1) / height;
    const auto run = [&](int64_t task) {
        const int64_t t = task / parts;
        ProductArgs<T> g;
        Operand<T> packed, dense;
        packed.packed = &u;
        packed.transposed = transpose;
        dense.dense = x[t / pieces];
        g.a = left ? packed : dense;
        g.b = left ? dense : packed;
        g.c = out[t / pieces];
        g.depth = inner;
        g.begin = t % pieces * width;
        g.end = std::min(n, g.begin + width);
        g.top = task % parts * height;
        g.bottom = std::min(m, g.top + height);
        if (inner == 0)
            for (int64_t i = g.top; i < g.bottom; ++i) std::fill_n(&g.c(i, g.begin), g.end - g.begin, T(0));
        else
            simd::dispatch<ProductKernel<T>>(&std::as_const(g));
    };
    if (items * pieces * parts == 1) return run(0);
    parallel_for(items * pieces * parts, run);
}

#define SUBSPAN_INSTANTIATE(T)                                                                                                                                 \
    template void quantize_int4<T>(MatrixView<const T>, int64_t, std::uint8_t *, T *, T *);                                                                    \
    template void unpack<T>(const Int4View<T> &, MatrixView<T>);                                                                                               \
    template void int4_product<T>(const Int4View<T> &, const StackView<const T> &, bool, bool, const StackView<T> &);
SUBSPAN_INSTANTIATE(float)
SUBSPAN_INSTANTIATE(double)
#undef SUBSPAN_INSTANTIATE

} // namespace subspan
