#include "linalg/wide_reflections.cuh"

#include "subspan/cuda/householder_qr.hpp"

#include <algorithm>
#include <limits>

namespace subspan::cuda {
namespace {

constexpr int kBlock = 64, kThreads = 256;
constexpr int64_t kTogether = int64_t(1) << 28; // bytes of work memory for the matrices that go through one product

// Cores of the blocks on the diagonal; all below the diagonal becomes zero.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    blocks_kernel(SUBSPAN_PARAMETER const Matrices<T> core, SUBSPAN_PARAMETER const Matrices<const T> tau, const bool has_tau, const int blocks) {
    SUBSPAN_SHARED(memory);
    constexpr int ld = kBlock + 1;
    T *t = reinterpret_cast<T *>(memory), *factors = t + kBlock * ld, *column = factors + kBlock;
    const unsigned item = blockIdx.x / unsigned(blocks);
    const int k = int(core.rows), first = int(blockIdx.x % unsigned(blocks)) * kBlock, b = least(kBlock, k - first), tid = int(threadIdx.x);
    T *s = core.at(item) + int64_t(first) * core.row_stride + first;
    for (int e = tid; e < b * b; e += kThreads) t[(e / b) * ld + e % b] = s[int64_t(e / b) * core.row_stride + e % b];
    __syncthreads();
    for (int j = tid; j < b; j += kThreads) factors[j] = factor_of(t[j * ld + j], has_tau ? tau.at(item) + (first + j) * tau.col_stride : nullptr);
    __syncthreads();
    core_in_place(b, t, ld, factors, column, kThreads);
    for (int e = tid; e < b * (first + b); e += kThreads) {
        const int i = e / (first + b), j = e - i * (first + b) - first; // a row of the block, from the first column on
        s[int64_t(i) * core.row_stride + j] = j >= i ? -t[i * ld + j] : T(0);
    }
}

} // namespace

int64_t together(std::initializer_list<const Stack *> read, std::initializer_list<const Stack *> written, int64_t bytes_each) {
    int64_t size = (*written.begin())->size();
    for (const Stack *s : read)
        if (s->axes > 1 || (s->axes == 1 && s->stride[0] < 0)) return 1;
    for (const Stack *s : written)
        if (s->axes > 1 || (s->axes == 1 && s->stride[0] <= 0) || (s->axes == 0 && size > 1)) return 1;
    return std::clamp<int64_t>(kTogether / std::max<int64_t>(bytes_each, 1), 1, std::max<int64_t>(size, 1));
}

void check_same(const Stack &v, const Stack &x, const char *name, int64_t rows, int64_t cols) {
    if (x.dtype != v.dtype) throw ValueError(std::string(name) + " must be " + name_of(v.dtype) + " as V is, got " + name_of(x.dtype));
    if (x.size() != v.size()) throw ValueError(std::string(name) + " must have the leading axes of the result");
    if (x.rows != rows || x.cols != cols)
        throw ValueError(std::string(name) + " must be " + std::to_string(rows) + " x " + std::to_string(cols) + ", got " + std::to_string(x.rows) + " x " +
                         std::to_string(x.cols));
}
void check_v(const Stack &v) {
    if (v.dtype != DType::f32 && v.dtype != DType::f64) throw ValueError(std::string("V must be float32 or float64, got ") + name_of(v.dtype));
    const int64_t top = std::numeric_limits<int>::max() / 256;
    if (v.rows > top || v.cols > top || v.size() > std::numeric_limits<int>::max()) throw ValueError("V is too large for one call");
    require_blas_layout(operand(v, 0), "V");
}
void check_tau(const Stack &v, const Stack *tau) {
    if (tau != nullptr) check_same(v, *tau, "tau", 1, v.cols);
}

std::int64_t wide_reflection_core_workspace(const Stack &v, const Stack &core, int device) {
    if (nothing(v)) return 0;
    const int64_t each = v.cols * v.cols / 4 * size_of(v.dtype);
    return blas_workspace(device) + divide_up<int64_t>(together({&v}, {&core}, each) * each, 256) * 256 + 256;
}

void wide_reflection_core(const Context &context, const Stack &v, const Stack *tau, const Stack &core) {
    check_v(v);
    check_same(v, core, "core", v.cols, v.cols);
    check_tau(v, tau);
    if (core.col_stride != 1) throw ValueError("core must have contiguous rows");
    const Session session(context);
    if (nothing(v)) return;
    Workspace work(context);
    const Blas blas(session, work);
    const int64_t k = v.cols, batch = together({&v}, {&core}, k * k / 4 * size_of(v.dtype)), blocks = divide_up<int64_t>(k, kBlock);
    if (blocks * v.size() > std::numeric_limits<int>::max()) throw ValueError("V is too large for one call");
    dispatch_wide(v.dtype, [&](auto tag) {
        using T = decltype(tag);
        for (int64_t i = 0; i < v.size(); i += batch)
            blas.multiply(1.0, operand(v, i).transposed(), operand(v, i), 0.0, operand(core, i), std::min(batch, v.size() - i));
        const Matrices<const T> factors = tau != nullptr ? Matrices<const T>(*tau) : Matrices<const T>{};
        launch<blocks_kernel<T>>(session, "cores of reflections",
                                 Shape{dim3(unsigned(blocks * v.size())), dim3(kThreads), int64_t(kBlock * (kBlock + 3) * sizeof(T))}, Matrices<T>(core),
                                 factors, tau != nullptr, int(blocks));
        T *product = work.take<T>(std::max<int64_t>(1, batch * (k * k / 4)));
        for (int64_t w = kBlock; w < k; w *= 2)
            for (int64_t at = 0; at + w < k; at += 2 * w) {
                const int64_t other = std::min(w, k - at - w);
                for (int64_t i = 0; i < v.size(); i += batch) {
                    const int64_t count = std::min(batch, v.size() - i);
                    const Operand n = operand(core, i), between = n.part(at, w, at + w, other), p = own(product, w, other);
                    blas.multiply(1.0, between, n.part(at + w, other, at + w, other), 0.0, p, count);
                    blas.multiply(1.0, n.part(at, w, at, w), p, 0.0, between, count);
                }
            }
    });
}

} // namespace subspan::cuda
