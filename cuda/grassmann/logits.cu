#include "subspan/cuda/grassmann_logits.hpp"

#include "linalg/blas.cuh"

#include <algorithm>
#include <limits>

namespace subspan::cuda {
namespace {

constexpr int64_t kTile = int64_t(1) << 28; // bytes of projections, and of classes that are transposed, at a time

// 1 / ‖x‖ for each feature, zero for zero. A warp a row.
template <class T> __global__ void __launch_bounds__(256) norms_kernel(SUBSPAN_PARAMETER const Matrices<const T> x, T *inverse) {
    const int64_t row = int64_t(blockIdx.x) * 8 + threadIdx.x / 32;
    const int lane = int(threadIdx.x) % 32;
    if (row >= x.rows) return;
    const T *p = x.data + row * x.row_stride;
    double s = 0;
    for (int64_t j = lane; j < x.cols; j += 32) s = fma(double(p[j * x.col_stride]), double(p[j * x.col_stride]), s);
    s = warp_sum(s);
    if (lane == 0) inverse[row] = s == 0 ? T(0) : T(1.0 / sqrt(s));
}

// Logits from the lengths of projections p (batch x classes k), which `kept` (rows of `row` items) takes of unit features.
template <class T>
__global__ void __launch_bounds__(256) lengths_kernel(const T *p, const T *inverse, T *out, int64_t oi, int64_t oj, double scale, int64_t batch,
                                                      int64_t classes, int k, bool empty, T *kept, int64_t row) {
    const int64_t e = int64_t(blockIdx.x) * 256 + threadIdx.x;
    if (e >= batch * classes) return;
    const int64_t b = e / classes, c = e % classes;
    const T *v = p + e * k;
    double s = 0;
    for (int l = 0; l < k && !empty; ++l) s = fma(double(v[l]), double(v[l]), s);
    for (int l = 0; l < k && kept != nullptr; ++l) kept[b * row + c * k + l] = empty ? T(0) : T(double(v[l]) * double(inverse[b]));
    out[b * oi + c * oj] = T(scale * sqrt(s) * double(inverse[b]));
}

// dP = grad scale p / (‖p‖ ‖x‖) in place of p, and along[b, c] = grad scale ‖p‖ / ‖x‖³. Where projections of unit features were kept (in rows of
// `row` items) these are read.
template <class T>
__global__ void __launch_bounds__(256) slopes_kernel(T *p, const T *inverse, const T *grad, int64_t gi, int64_t gj, double scale, double *along, int64_t batch,
                                                     int64_t classes, int k, const T *kept, int64_t row) {
    const int64_t e = int64_t(blockIdx.x) * 256 + threadIdx.x;
    if (e >= batch * classes) return;
    const int64_t b = e / classes, c = e % classes;
    T *to = p + e * k;
    const T *v = kept != nullptr ? kept + b * row + c * k : to;
    double s = 0;
    for (int l = 0; l < k; ++l) s = fma(double(v[l]), double(v[l]), s);
    const double length = sqrt(s), r = double(inverse[b]), g = double(grad[b * gi + c * gj]) * scale;
    const double slope = length > 0 ? g * r / length : (s == s ? 0.0 : s);
    for (int l = 0; l < k; ++l) to[l] = T(slope * double(v[l]));
    along[e] = g * length * r * r * (kept != nullptr ? 1.0 : r);
}

// dx -= x Σ_c along[., c]. A block a row, sums in a fixed order.
template <class T>
__global__ void __launch_bounds__(256)
    along_kernel(SUBSPAN_PARAMETER const Matrices<const T> x, const double *along, int64_t classes, SUBSPAN_PARAMETER const Matrices<T> dx) {
    SUBSPAN_SHARED(memory);
    double *sums = reinterpret_cast<double *>(memory), s = 0;
    const int64_t b = blockIdx.x;
    for (int64_t c = threadIdx.x; c < classes; c += 256) s += along[b * classes + c];
    s = warp_sum(s);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = s;
    __syncthreads();
    s = 0;
    for (int w = 0; w < 8; ++w) s += sums[w];
    for (int64_t j = threadIdx.x; j < x.cols; j += 256) {
        T *to = dx.data + b * dx.row_stride + j * dx.col_stride;
        *to = T(double(*to) - s * double(x.data[b * x.row_stride + j * x.col_stride]));
    }
}

// Items from a column of all classes side by side (n x classes k) to the next, where they are one matrix: by columns, evenly spaced; else zero.
int64_t one_matrix(const Stack &u) {
    if (u.row_stride != 1 && u.rows > 1) return 0;
    const int64_t column = u.cols > 1 || u.axes == 0 ? u.col_stride : u.stride[0];
    const bool even = u.axes == 0 || (u.axes == 1 && (u.cols <= 1 || u.stride[0] == u.cols * u.col_stride));
    if (u.cols <= 1 && u.axes == 0) return most<int64_t>(u.rows, 1);
    return even && column >= u.rows ? column : 0;
}

int64_t classes_at_once(const Stack &x, const Stack &u, bool backward) {
    const int64_t each = (x.rows * u.cols + (one_matrix(u) > 0 ? 0 : u.rows * u.cols) + (backward ? u.rows * u.cols + 2 * x.rows : 0)) * size_of(x.dtype);
    return std::clamp<int64_t>(kTile / std::max<int64_t>(each, 1), 1, std::max<int64_t>(u.size(), 1));
}

void check(const Stack &x, const Stack &u) {
    if (x.dtype != DType::f32 && x.dtype != DType::f64) throw ValueError(std::string("x must be float32 or float64, got ") + name_of(x.dtype));
    if (u.dtype != x.dtype) throw ValueError(std::string("U must be ") + name_of(x.dtype) + " as x is, got " + name_of(u.dtype));
    if (x.size() != 1 || x.cols != u.rows) throw ValueError("x and U do not fit each other");
    const int64_t top = std::numeric_limits<int>::max() / 256;
    if (x.rows > top || x.cols > top || u.size() * u.cols > top) throw ValueError("x or U is too large for one call");
    require_blas_layout(operand(x), "x");
}
bool nothing(const Stack &x, const Stack &u) { return x.rows == 0 || u.size() == 0; }

unsigned blocks_for(int64_t threads) { return unsigned(divide_up<int64_t>(threads, 256)); }

// Matrices n x k to matrices k x n, each transposed, or back: by way of shared memory, so that both sides are read and written in runs. A block
// has 32 x 32 entries.
template <class T>
__global__ void __launch_bounds__(256) transpose_kernel(SUBSPAN_PARAMETER const Matrices<const T> from, SUBSPAN_PARAMETER const Matrices<T> to,
                                                        const unsigned first_from, const unsigned first_to) {
    SUBSPAN_SHARED(memory);
    T *tile = reinterpret_cast<T *>(memory);
    const T *x = from.at(first_from + blockIdx.y);
    T *y = to.at(first_to + blockIdx.y);
    const int64_t across = divide_up<int64_t>(from.cols, 32), i0 = int64_t(blockIdx.x) / across * 32, j0 = int64_t(blockIdx.x) % across * 32;
    const bool by_rows = from.col_stride == 1, to_rows = to.col_stride == 1;
    for (int e = int(threadIdx.x); e < 1024; e += 256) {
        const int i = by_rows ? e / 32 : e % 32, j = by_rows ? e % 32 : e / 32;
        if (i0 + i < from.rows && j0 + j < from.cols) tile[i * 33 + j] = x[(i0 + i) * from.row_stride + (j0 + j) * from.col_stride];
    }
    __syncthreads();
    for (int e = int(threadIdx.x); e < 1024; e += 256) {
        const int j = to_rows ? e / 32 : e % 32, i = to_rows ? e % 32 : e / 32;
        if (i0 + i < from.rows && j0 + j < from.cols) y[(j0 + j) * to.row_stride + (i0 + i) * to.col_stride] = tile[i * 33 + j];
    }
}
template <class T> void transpose(const Session &s, const Stack &from, int64_t first_from, const Stack &to, int64_t first_to, int64_t count) {
    const int64_t blocks = divide_up<int64_t>(from.rows, 32) * divide_up<int64_t>(from.cols, 32);
    for (int64_t done = 0; done < count; done += 65535)
        launch<transpose_kernel<T>>(s, "transposed classes",
                                    Shape{dim3(unsigned(blocks), unsigned(std::min<int64_t>(65535, count - done))), dim3(256), 32 * 33 * int64_t(sizeof(T))},
                                    Matrices<const T>(from), Matrices<T>(to), unsigned(first_from + done), unsigned(first_to + done));
}

// Classes as one matrix: as they are, or transposed into `transposed`, one after the other.
template <class T> struct Classes {
    const Session &s;
    const Stack &u;
    T *transposed;
    Stack stack(int64_t count) const {
        Stack t{};
        t.data = transposed;
        t.dtype = u.dtype;
        t.rows = u.cols;
        t.cols = t.row_stride = u.rows;
        t.col_stride = 1;
        t.axes = 1;
        t.shape[0] = count;
        t.stride[0] = u.rows * u.cols;
        return t;
    }
    // count k x n, classes [first, first + count).
    Operand rows(int64_t first, int64_t count) const {
        const int64_t all = count * u.cols;
        if (const int64_t column = one_matrix(u); column > 0) return {operand(u, first).data, u.dtype, all, u.rows, column, 1};
        transpose<T>(s, u, first, stack(count), 0, count);
        return own(static_cast<const T *>(transposed), all, u.rows);
    }
};

} // namespace

std::int64_t grassmann_logits_workspace(const Stack &x, const Stack &u, bool backward, int device) {
    if (nothing(x, u)) return 0;
    const int64_t count = classes_at_once(x, u, backward), item = size_of(x.dtype), classes = count * u.rows * u.cols;
    const auto bytes = [&](int64_t items) { return divide_up<int64_t>(items * item, 256) * 256; };
    return blas_workspace(device) + bytes(x.rows) + bytes(x.rows * count * u.cols) + (one_matrix(u) > 0 ? 0 : bytes(classes)) +
           (backward ? room<double>(x.rows * count) + bytes(classes) : 0);
}

void grassmann_logits(const Context &context, const Stack &x, const Stack &u, double scale, const Stack &out, void *projections) {
    check(x, u);
    if (out.rows != x.rows || out.cols != u.size() || out.dtype != x.dtype) throw ValueError("out does not fit x and U");
    const Session s(context);
    if (nothing(x, u)) return;
    Workspace work(context);
    const Blas blas(s, work);
    const int64_t k = u.cols, at_once = classes_at_once(x, u, false);
    dispatch_wide(x.dtype, [&](auto tag) {
        using T = decltype(tag);
        T *inverse = work.take<T>(x.rows), *p = work.take<T>(x.rows * at_once * k);
        const Classes<T> classes{s, u, one_matrix(u) > 0 ? nullptr : work.take<T>(at_once * u.rows * k)};
        launch<norms_kernel<T>>(s, "lengths of features", Shape{dim3(blocks_for(32 * x.rows)), dim3(256)}, Matrices<const T>(x), inverse);
        for (int64_t first = 0; first < u.size(); first += at_once) {
            const int64_t count = std::min(at_once, u.size() - first);
            if (x.cols > 0 && k > 0) blas.multiply(1.0, operand(x), classes.rows(first, count).transposed(), 0.0, own(p, x.rows, count * k));
            launch<lengths_kernel<T>>(s, "logits", Shape{dim3(blocks_for(x.rows * count)), dim3(256)}, static_cast<const T *>(p),
                                      static_cast<const T *>(inverse), static_cast<T *>(out.data) + first * out.col_stride, out.row_stride, out.col_stride,
                                      scale, x.rows, count, int(k), x.cols == 0, projections == nullptr ? nullptr : static_cast<T *>(projections) + first * k,
                                      u.size() * k);
        }
    });
}

void grassmann_logits_backward(const Context &context, const Stack &grad, const Stack &x, const Stack &u, double scale, const Stack &dx, const Stack &du,
                               const void *projections) {
    check(x, u);
    if (grad.rows != x.rows || grad.cols != u.size() || grad.dtype != x.dtype) throw ValueError("grad does not fit x and U");
    if (dx.rows != x.rows || dx.cols != x.cols || dx.dtype != x.dtype) throw ValueError("dx does not fit x");
    if (du.rows != u.rows || du.cols != u.cols || du.size() != u.size() || du.dtype != u.dtype || du.axes > 1) throw ValueError("dU does not fit U");
    if (x.cols == 0 || u.cols == 0) throw ValueError("x has no features, or U no columns");
    const Session s(context);
    if (nothing(x, u)) return;
    Workspace work(context);
    const Blas blas(s, work);
    const int64_t k = u.cols, n = u.rows, at_once = classes_at_once(x, u, true);
    dispatch_wide(x.dtype, [&](auto tag) {
        using T = decltype(tag);
        T *inverse = work.take<T>(x.rows), *p = work.take<T>(x.rows * at_once * k);
        const Classes<T> all_classes{s, u, one_matrix(u) > 0 ? nullptr : work.take<T>(at_once * n * k)};
        T *gradient = one_matrix(du) > 0 ? nullptr : work.take<T>(at_once * n * k);
        double *along = work.take<double>(x.rows * at_once);
        launch<norms_kernel<T>>(s, "lengths of features", Shape{dim3(blocks_for(32 * x.rows)), dim3(256)}, Matrices<const T>(x), inverse);
        for (int64_t first = 0; first < u.size(); first += at_once) {
            const int64_t count = std::min(at_once, u.size() - first), all = count * k;
            const Operand classes = all_classes.rows(first, count);
            if (projections == nullptr) blas.multiply(1.0, operand(x), classes.transposed(), 0.0, own(p, x.rows, all));
            launch<slopes_kernel<T>>(s, "slopes of logits", Shape{dim3(blocks_for(x.rows * count)), dim3(256)}, p, static_cast<const T *>(inverse),
                                     static_cast<const T *>(grad.data) + first * grad.col_stride, grad.row_stride, grad.col_stride, scale, along, x.rows, count,
                                     int(k), projections == nullptr ? nullptr : static_cast<const T *>(projections) + first * k, u.size() * k);
            blas.multiply(1.0, own(p, x.rows, all), classes, first > 0 ? 1.0 : 0.0, operand(dx));
            const Operand slopes = own(p, x.rows, all).transposed();
            if (const int64_t column = one_matrix(du); column > 0) {
                blas.multiply(1.0, slopes, operand(x), 0.0, Operand{operand(du, first).data, du.dtype, all, n, column, 1});
            } else {
                const Classes<T> there{s, du, gradient};
                blas.multiply(1.0, slopes, operand(x), 0.0, own(static_cast<const T *>(gradient), all, n));
                transpose<T>(s, there.stack(count), 0, du, first, count);
            }
            launch<along_kernel<T>>(s, "gradients of lengths", Shape{dim3(unsigned(x.rows)), dim3(256), 64}, Matrices<const T>(x),
                                    static_cast<const double *>(along), count, Matrices<T>(dx));
        }
    });
}

} // namespace subspan::cuda
