#include "subspan/cuda/householder_qr.hpp"

#include "linalg/reflections.cuh"

#include <limits>

namespace subspan::cuda {
namespace {

template <class T> SUBSPAN_SHARED_CODE T magnitude(T x) { return x < T(0) ? -x : x; }

// The matrix column by column in shared memory, a warp a column.
template <class T, int Threads>
__global__ void __launch_bounds__(Threads, 1)
    qr_kernel(SUBSPAN_PARAMETER const Matrices<const T> a, const Matrices<T> v, const Matrices<T> r, const Matrices<T> tau, const Matrices<T> t) {
    constexpr int kWarps = Threads / 32;
    SUBSPAN_SHARED(memory);
    const int m = int(a.rows), n = int(a.cols), k = least(m, n), ld = m | 1, lt = k | 1;
    const int tid = int(threadIdx.x), warp = tid / 32, lane = tid % 32;
    T *x = reinterpret_cast<T *>(memory), *factors = x + int64_t(n) * ld, *column = factors + k, *core = column + k;
    const T *from = a.at(blockIdx.x);
    const bool by_columns = a.row_stride == 1;
    for (int e = tid; e < m * n; e += Threads) {
        const int i = by_columns ? e % m : e / n, j = by_columns ? e / m : e % n;
        x[j * ld + i] = from[i * a.row_stride + j * a.col_stride];
    }
    __syncthreads();
    for (int j = 0; j < k; ++j) {
        T *y = x + j * ld;
        // Every warp finds the reflection for itself; warp 0 writes it down after all have read.
        T top = T(0);
        for (int i = j + 1 + lane; i < m; i += 32) top = most(top, magnitude(y[i]));
        top = warp_most(top);
        const T alpha = y[j], scale = most(top, magnitude(alpha));
        T square = T(0);
        if (top > T(0))
            for (int i = j + 1 + lane; i < m; i += 32) square = fma(y[i] / scale, y[i] / scale, square);
        square = warp_sum(square);
        T beta = alpha, factor = T(0), divisor = T(1);
        if (top > T(0)) {
            const T part = alpha / scale, length = sqrt(fma(part, part, square)) * scale;
            beta = alpha > T(0) ? -length : length;
            factor = (beta - alpha) / beta;
            divisor = alpha - beta;
        }
        __syncthreads();
        if (warp == 0) {
            for (int i = j + 1 + lane; i < m; i += 32) y[i] = y[i] / divisor;
            if (lane == 0) {
                y[j] = beta;
                factors[j] = factor;
            }
        }
        __syncthreads();
        for (int c = j + 1 + warp; c < n; c += kWarps) {
            T *z = x + c * ld;
            T sum = lane == 0 ? z[j] : T(0);
            for (int i = j + 1 + lane; i < m; i += 32) sum = fma(y[i], z[i], sum);
            sum = factor * warp_sum(sum);
            for (int i = j + 1 + lane; i < m; i += 32) z[i] = fma(-sum, y[i], z[i]);
            if (lane == 0) z[j] -= sum;
        }
        __syncthreads();
    }
    // Inner products of the reflections, then T.
    for (int p = warp; p < k * k; p += kWarps) {
        const int i = p / k, j = p % k;
        if (i >= j) continue;
        const T *vi = x + i * ld, *vj = x + j * ld;
        T sum = lane == 0 ? vi[j] : T(0);
        for (int l = j + 1 + lane; l < m; l += 32) sum = fma(vi[l], vj[l], sum);
        sum = warp_sum(sum);
        if (lane == 0) core[i * lt + j] = sum;
    }
    __syncthreads();
    core_in_place(k, core, lt, factors, column, Threads);
    T *to_v = v.at(blockIdx.x), *to_r = r.at(blockIdx.x), *to_t = t.at(blockIdx.x), *to_tau = tau.at(blockIdx.x);
    for (int e = tid; e < m * k; e += Threads) {
        const int i = e / k, j = e % k;
        to_v[i * v.row_stride + j * v.col_stride] = i > j ? x[j * ld + i] : (i == j ? T(1) : T(0));
    }
    for (int e = tid; e < k * n; e += Threads) {
        const int i = e / n, j = e % n;
        to_r[i * r.row_stride + j * r.col_stride] = i <= j ? x[j * ld + i] : T(0);
    }
    for (int e = tid; e < k * k; e += Threads) {
        const int i = e / k, j = e % k;
        to_t[i * t.row_stride + j * t.col_stride] = i <= j ? core[i * lt + j] : T(0);
    }
    for (int j = tid; j < k; j += Threads) to_tau[j * tau.col_stride] = factors[j];
}

constexpr int kCoreThreads = 256, kStrip = 32; // rows of V at a time, and the edge of a tile of VᵀV

template <class T>
__global__ void __launch_bounds__(kCoreThreads, 1)
    core_kernel(SUBSPAN_PARAMETER const Matrices<const T> v, const Matrices<const T> tau, const bool has_tau, const Matrices<T> core) {
    SUBSPAN_SHARED(memory);
    const int m = int(v.rows), k = int(v.cols), ld = k | 1, tid = int(threadIdx.x);
    T *t = reinterpret_cast<T *>(memory), *factors = t + int64_t(k) * ld, *column = factors + k, *left = column + k, *right = left + kStrip * (kStrip + 1);
    const T *from = v.at(blockIdx.x);
    // Tiles of 32 x 32 on and above the diagonal; a thread has four entries of one.
    for (int i0 = 0; i0 < k; i0 += kStrip)
        for (int j0 = i0; j0 < k; j0 += kStrip) {
            T d[4] = {T(0), T(0), T(0), T(0)};
            const int j = tid % 32, i = tid / 32; // and i + 8, 16, 24
            for (int r0 = 0; r0 < m; r0 += kStrip) {
                for (int e = tid; e < kStrip * kStrip; e += kCoreThreads) {
                    const int r = e / kStrip, c = e % kStrip;
                    const bool row = r0 + r < m;
                    left[r * (kStrip + 1) + c] = row && i0 + c < k ? from[(r0 + r) * v.row_stride + (i0 + c) * v.col_stride] : T(0);
                    right[r * (kStrip + 1) + c] = row && j0 + c < k ? from[(r0 + r) * v.row_stride + (j0 + c) * v.col_stride] : T(0);
                }
                __syncthreads();
                for (int r = 0; r < kStrip; ++r) {
                    const T y = right[r * (kStrip + 1) + j];
#pragma unroll
                    for (int e = 0; e < 4; ++e) d[e] = fma(left[r * (kStrip + 1) + i + 8 * e], y, d[e]);
                }
                __syncthreads();
            }
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (i0 + i + 8 * e < k && j0 + j < k) t[(i0 + i + 8 * e) * ld + j0 + j] = d[e];
        }
    __syncthreads();
    for (int j = tid; j < k; j += kCoreThreads) {
        factors[j] = factor_of(t[j * ld + j], has_tau ? tau.at(blockIdx.x) + j * tau.col_stride : nullptr);
    }
    __syncthreads();
    core_in_place(k, t, ld, factors, column, kCoreThreads);
    T *to = core.at(blockIdx.x);
    for (int e = tid; e < k * k; e += kCoreThreads) {
        const int i = e / k, j = e % k;
        to[i * core.row_stride + j * core.col_stride] = i <= j ? -t[i * ld + j] : T(0);
    }
}

void check_float(const Stack &s, const char *name) {
    if (s.dtype != DType::f32 && s.dtype != DType::f64) throw ValueError(std::string(name) + " must be float32 or float64, got " + name_of(s.dtype));
    if (s.size() > std::numeric_limits<int>::max()) throw ValueError(std::string(name) + " is too large for one call");
}

} // namespace

void check_qr(const Stack &a, const Stack &v, const Stack &r, const Stack &tau, const Stack &t) {
    check_float(a, "A");
    const int64_t m = a.rows, n = a.cols, k = m < n ? m : n;
    for (const Stack *x : {&v, &r, &tau, &t})
        if (x->dtype != a.dtype || x->size() != a.size()) throw ValueError("V, R, tau and T must have the dtype and the stack of A");
    if (v.rows != m || v.cols != k || r.rows != k || r.cols != n || tau.cols != k || t.rows != k || t.cols != k)
        throw ValueError("V, R, tau and T do not fit A");
}

namespace {
int64_t block_bytes(const Stack &a) {
    const int64_t m = a.rows, n = a.cols, k = m < n ? m : n;
    return (n * (m | 1) + 2 * k + k * (k | 1)) * size_of(a.dtype);
}
} // namespace

bool fits_a_block(const Stack &a, int device) {
    Context context;
    context.device = device;
    const Session s(context);
    return (a.rows < a.cols ? a.rows : a.cols) <= kReflections && block_bytes(a) <= s.device().shared_limit;
}

void householder_qr(const Context &context, const Stack &a, const Stack &v, const Stack &r, const Stack &tau, const Stack &t) {
    check_qr(a, v, r, tau, t);
    const int64_t m = a.rows, n = a.cols, k = m < n ? m : n;
    const Session s(context);
    if (a.size() == 0 || k == 0) return;
    const int64_t bytes = block_bytes(a);
    if (k > kReflections || bytes > s.device().shared_limit)
        throw ValueError("A has matrices of " + std::to_string(m) + " x " + std::to_string(n) +
                         "; the CUDA kernel factors what fits the shared memory of a block, here " + std::to_string(s.device().shared_limit) +
                         " bytes, and at most " + std::to_string(kReflections) + " reflections");
    dispatch_wide(a.dtype, [&](auto tag) {
        using T = decltype(tag);
        const auto go = [&](auto threads) {
            constexpr int kThreads = decltype(threads)::value;
            launch<qr_kernel<T, kThreads>>(s, "householder_qr", Shape{dim3(unsigned(a.size())), dim3(kThreads), bytes}, Matrices<const T>(a), Matrices<T>(v),
                                           Matrices<T>(r), Matrices<T>(tau), Matrices<T>(t));
        };
        if (m * n <= 4096)
            go(std::integral_constant<int, 128>{});
        else
            go(std::integral_constant<int, 256>{});
    });
}

void reflection_core(const Context &context, const Stack &v, const Stack *tau, const Stack &core) {
    check_float(v, "V");
    const int64_t k = v.cols;
    if (core.rows != k || core.cols != k || core.dtype != v.dtype || core.size() != v.size()) throw ValueError("core does not fit V");
    if (tau != nullptr && (tau->cols != k || tau->size() != v.size())) throw ValueError("tau must have one entry for each column of V");
    if (tau != nullptr && tau->dtype != v.dtype) throw ValueError(std::string("tau must be ") + name_of(v.dtype) + " as V is");
    if (v.rows > std::numeric_limits<int>::max() / 64) throw ValueError("V is too large for one call");
    const Session s(context);
    if (v.size() == 0 || k == 0) return;
    const int64_t bytes = (k * (k | 1) + 2 * k + 2 * kStrip * (kStrip + 1)) * size_of(v.dtype);
    if (k > kReflections || bytes > s.device().shared_limit)
        throw ValueError("V has " + std::to_string(k) + " reflections; the CUDA kernel takes at most " + std::to_string(kReflections) +
                         ", as many as fit its shared memory");
    dispatch_wide(v.dtype, [&](auto tag) {
        using T = decltype(tag);
        Matrices<const T> factors{};
        if (tau != nullptr) factors = Matrices<const T>(*tau);
        launch<core_kernel<T>>(s, "the core of reflections", Shape{dim3(unsigned(v.size())), dim3(kCoreThreads), bytes}, Matrices<const T>(v), factors,
                               tau != nullptr, Matrices<T>(core));
    });
}

} // namespace subspan::cuda
