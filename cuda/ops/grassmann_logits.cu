#include "subspan/cuda/grassmann_logits.hpp"

#include "blas.cuh"
#include "copy.cuh"

#include <algorithm>
#include <limits>

namespace subspan::cuda {
namespace {

constexpr int64_t kTile = int64_t(1) << 28; // bytes of projections, and of classes that are turned over, at a time

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

// Logits from the lengths of projections p (batch x classes k).
template <class T>
__global__ void __launch_bounds__(256) lengths_kernel(const T *p, const T *inverse, T *out, int64_t oi, int64_t oj, double scale, int64_t batch, int64_t classes, int k) {
    const int64_t e = int64_t(blockIdx.x) * 256 + threadIdx.x;
    if (e >= batch * classes) return;
    const int64_t b = e / classes, c = e % classes;
    const T *v = p + e * k;
    double s = 0;
    for (int l = 0; l < k; ++l) s = fma(double(v[l]), double(v[l]), s);
    out[b * oi + c * oj] = T(scale * sqrt(s) * double(inverse[b]));
}

// dP = grad scale p / (‖p‖ ‖x‖) in place of p, and along[b, c] = grad scale ‖p‖ / ‖x‖³.
template <class T>
__global__ void __launch_bounds__(256)
    slopes_kernel(T *p, const T *inverse, const T *grad, int64_t gi, int64_t gj, double scale, double *along, int64_t batch, int64_t classes, int k) {
    const int64_t e = int64_t(blockIdx.x) * 256 + threadIdx.x;
    if (e >= batch * classes) return;
    const int64_t b = e / classes, c = e % classes;
    T *v = p + e * k;
    double s = 0;
    for (int l = 0; l < k; ++l) s = fma(double(v[l]), double(v[l]), s);
    const double length = sqrt(s), r = double(inverse[b]), g = double(grad[b * gi + c * gj]) * scale;
    const double slope = length > 0 ? g * r / length : (s == s ? 0.0 : s);
    for (int l = 0; l < k; ++l) v[l] = T(slope * double(v[l]));
    along[e] = g * length * r * r * r;
}

// dx -= x Σ_c along[., c]. A block a row, sums in a fixed order.
template <class T>
__global__ void __launch_bounds__(256) along_kernel(SUBSPAN_PARAMETER const Matrices<const T> x, const double *along, int64_t classes, SUBSPAN_PARAMETER const Matrices<T> dx) {
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

// Whether all classes are one matrix (classes k x n): by columns, one after the other.
bool one_matrix(const Stack &u) { return u.row_stride == 1 && (u.cols <= 1 || u.col_stride >= u.rows) && (u.axes == 0 || (u.axes == 1 && u.stride[0] == u.cols * u.col_stride)); }

int64_t classes_at_once(const Stack &x, const Stack &u, bool backward) {
    const int64_t each = (x.rows * u.cols + (backward ? u.rows * u.cols + 2 * x.rows : 0)) * size_of(x.dtype);
    return u.axes > 1 || (u.axes == 1 && u.stride[0] < 0) ? 1 : std::clamp<int64_t>(kTile / std::max<int64_t>(each, 1), 1, std::max<int64_t>(u.size(), 1));
}

void check(const Stack &x, const Stack &u) {
    if (x.dtype != DType::f32 && x.dtype != DType::f64) throw ValueError(std::string("x must be float32 or float64, got ") + name_of(x.dtype));
    if (u.dtype != x.dtype) throw ValueError(std::string("U must be ") + name_of(x.dtype) + " as x is, got " + name_of(u.dtype));
    if (x.size() != 1 || x.cols != u.rows) throw ValueError("x and U do not fit each other");
    const int64_t top = std::numeric_limits<int>::max() / 256;
    if (x.rows > top || x.cols > top || u.size() * u.cols > top) throw ValueError("x or U is too large for one call");
    require_blas_layout(operand(x), "x");
    require_blas_layout(operand(u), "U");
}
bool nothing(const Stack &x, const Stack &u) { return x.rows == 0 || u.size() == 0; }

unsigned blocks_for(int64_t threads) { return unsigned(divide_up<int64_t>(threads, 256)); }

// p (batch x count k) = x U_c for classes [first, first + count).
template <class T> void project(const Blas &blas, const Stack &x, const Stack &u, int64_t first, int64_t count, T *p) {
    const int64_t k = u.cols, all = count * k;
    Operand c = operand(u, first);
    if (one_matrix(u)) {
        const Operand whole{c.data, c.dtype, u.rows, all, 1, u.col_stride};
        return blas.multiply(1.0, operand(x), whole, 0.0, own(p, x.rows, all));
    }
    blas.multiply(1.0, operand(x), c, 0.0, own(p, x.rows, k, all, k), count);
}

} // namespace

std::int64_t grassmann_logits_workspace(const Stack &x, const Stack &u, bool backward, int device) {
    if (nothing(x, u)) return 0;
    const int64_t count = classes_at_once(x, u, backward), item = size_of(x.dtype);
    const auto bytes = [&](int64_t items) { return divide_up<int64_t>(items * item, 256) * 256; };
    return blas_workspace(device) + bytes(x.rows) + bytes(x.rows * count * u.cols) +
           (backward ? room<double>(x.rows * count) + (one_matrix(u) ? 0 : bytes(count * u.rows * u.cols)) : 0);
}

void grassmann_logits(const Context &context, const Stack &x, const Stack &u, double scale, const Stack &out) {
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
        launch<norms_kernel<T>>(s, "lengths of features", Shape{dim3(blocks_for(32 * x.rows)), dim3(256)}, Matrices<const T>(x), inverse);
        for (int64_t first = 0; first < u.size(); first += at_once) {
            const int64_t count = std::min(at_once, u.size() - first);
            if (x.cols > 0 && k > 0) project(blas, x, u, first, count, p);
            launch<lengths_kernel<T>>(s, "logits", Shape{dim3(blocks_for(x.rows * count)), dim3(256)}, static_cast<const T *>(p), static_cast<const T *>(inverse),
                                      static_cast<T *>(out.data) + first * out.col_stride, out.row_stride, out.col_stride, scale, x.rows, count,
                                      int(x.cols > 0 ? k : 0));
        }
    });
}

void grassmann_logits_backward(const Context &context, const Stack &grad, const Stack &x, const Stack &u, double scale, const Stack &dx, const Stack &du) {
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
        T *inverse = work.take<T>(x.rows), *p = work.take<T>(x.rows * at_once * k), *turned = one_matrix(u) ? nullptr : work.take<T>(at_once * n * k);
        double *along = work.take<double>(x.rows * at_once);
        launch<norms_kernel<T>>(s, "lengths of features", Shape{dim3(blocks_for(32 * x.rows)), dim3(256)}, Matrices<const T>(x), inverse);
        for (int64_t first = 0; first < u.size(); first += at_once) {
            const int64_t count = std::min(at_once, u.size() - first), all = count * k;
            project(blas, x, u, first, count, p);
            launch<slopes_kernel<T>>(s, "slopes of logits", Shape{dim3(blocks_for(x.rows * count)), dim3(256)}, p, static_cast<const T *>(inverse),
                                     static_cast<const T *>(grad.data) + first * grad.col_stride, grad.row_stride, grad.col_stride, scale,
                                     along, x.rows, count, int(k));
            // dx: one product with all classes of the tile as a matrix (count k x n).
            Operand classes{operand(u, first).data, u.dtype, all, n, u.col_stride, 1};
            if (turned != nullptr) {
                Stack by_rows = u.transposed(), to;
                by_rows.data = const_cast<void *>(operand(u, first).data);
                by_rows.axes = to.axes = count > 1 ? 1 : 0;
                by_rows.shape[0] = to.shape[0] = count;
                to.data = turned;
                to.rows = k;
                to.cols = to.row_stride = n;
                to.stride[0] = n * k;
                assign<T>(s, by_rows, to);
                classes = own(turned, all, n);
            }
            blas.multiply(1.0, own(p, x.rows, all), classes, first > 0 ? 1.0 : 0.0, operand(dx));
            if (one_matrix(du))
                blas.multiply(1.0, own(p, x.rows, all).turned(), operand(x), 0.0, Operand{operand(du, first).data, du.dtype, all, n, du.col_stride, 1});
            else
                blas.multiply(1.0, operand(x).turned(), own(p, x.rows, k, all, k), 0.0, operand(du, first), count);
            launch<along_kernel<T>>(s, "gradients of lengths", Shape{dim3(unsigned(x.rows)), dim3(256), 64}, Matrices<const T>(x),
                                    static_cast<const double *>(along), count, Matrices<T>(dx));
        }
    });
}

} // namespace subspan::cuda
