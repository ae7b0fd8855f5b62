#include "subspan/eigh.hpp"

#include "scratch.hpp"
#include "simd.hpp"
#include "subspan/blas.hpp"
#include "subspan/errors.hpp"
#include "subspan/panel.hpp"

#include <algorithm>
#include <cmath>

namespace subspan {
namespace {

// rows <- rows Qᵀ for the Q = H_{n-2} ... H_1 H_0 of sytrd('U'): reflector i is a[(i + 1)·n .. + i) and a 1 at i.
template <class T> void apply_reflectors(std::int64_t n, std::int64_t k, const T *a, const T *tau, T *rows) {
    constexpr std::int64_t nb = 32;
    Frame frame;
    T *v = frame.take<T>(nb * n), *w = frame.take<T>(k * nb), *w2 = frame.take<T>(k * nb);
    T *t = frame.take<T>(nb * nb), *g = frame.take<T>(nb * nb);
    for (std::int64_t first = 0; first < n - 1; first += nb) {
        const std::int64_t b = std::min(nb, n - 1 - first), m = first + b; // acts on columns [0, m)
        for (std::int64_t i = 0; i < b; ++i) {
            T *row = v + i * m;
            std::copy_n(a + (first + i + 1) * n, first + i, row);
            row[first + i] = T(1);
            std::fill_n(row + first + i + 1, m - first - i - 1, T(0));
        }
        // T of the compact WY form H_first ... H_{first+b-1} = I - Vᵀ T V (Schreiber and Van Loan 1989), V by rows.
        gemm<T>(MatrixView<const T>(v, b, m), MatrixView<const T>(v, b, m).transposed(), MatrixView<T>(g, b, b));
        std::fill_n(t, nb * nb, T(0));
        for (std::int64_t i = 0; i < b; ++i) {
            const T ti = tau[first + i];
            for (std::int64_t r = 0; r < i; ++r) {
                T s = 0;
                for (std::int64_t c = r; c < i; ++c) s += t[r * nb + c] * g[c * b + i];
                t[r * nb + i] = -ti * s; // t holds -T
            }
            t[i * nb + i] = -ti;
        }
        // rows <- rows - ((rows Vᵀ) T) V.
        const MatrixView<T> c(rows, k, m, n, 1);
        const MatrixView<const T> vv(v, b, m);
        const MatrixView<T> wv(w, k, b), w2v(w2, k, b);
        gemm<T>(c, vv.transposed(), wv);
        gemm<T>(wv, MatrixView<const T>(t, b, b, nb, 1), w2v);
        gemm<T>(w2v, vv, c, true);
    }
}

// The largest magnitude of a lower triangle; negative when an entry is NaN or infinite.
struct LargestKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(std::int64_t n, const double *g, double *out) {
        double most = 0, poison = 0; // x - x is zero or NaN
        for (std::int64_t i = 0; i < n; ++i)
            for (std::int64_t j = 0; j <= i; ++j) {
                const double x = std::abs(g[i * n + j]);
                most = x > most ? x : most;
                poison += x - x;
            }
        *out = poison == 0.0 ? most : -1.0;
    }
};

template <class T> struct ScaleKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(std::int64_t n, const double *g, double scale, T *a) {
        for (std::int64_t i = 0; i < n; ++i)
            for (std::int64_t j = 0; j <= i; ++j) a[i * n + j] = T(g[i * n + j] / scale);
    }
};

} // namespace

template <class T> void eigh_top(std::int64_t n, std::int64_t k, const double *g, double *values, T *vectors) {
    if (n == 0 || k == 0) return;
    double scale = 0;
    simd::dispatch<LargestKernel>(n, g, &scale);
    if (scale < 0.0) throw LinAlgError("symmetric eigenproblem: the matrix holds NaN or infinity");
    if (scale == 0.0) {
        std::fill_n(values, k, 0.0);
        std::fill_n(vectors, k * n, T(0));
        for (std::int64_t i = 0; i < k; ++i) vectors[i * n + i] = T(1);
        return;
    }
    // Scaled to 1, so that float neither overflows nor loses the small entries to underflow.
    Frame frame;
    T *d = frame.take<T>(n), *e = frame.take<T>(n), *tau = frame.take<T>(n), *a = frame.take<T>(n * n);
    simd::dispatch<ScaleKernel<T>>(n, g, scale, a);
    char uplo = 'U'; // a row-major lower triangle is a column-major upper one
    int ni = int(n), lwork = int(n) * 64, info = 0;
    T *work = frame.take<T>(lwork);
    lapack<T>().sytrd(&uplo, &ni, a, &ni, d, e, tau, work, &lwork, &info);
    if (info != 0) throw LinAlgError("symmetric eigenproblem: sytrd failed");

    double *dd = frame.take<double>(n), *ee = frame.take<double>(n), *all = frame.take<double>(n);
    double *z = frame.take<double>(k * n);
    std::copy_n(d, n, dd);
    std::copy_n(e, n - 1, ee);
    tridiagonal_top(n, k, dd, ee, all, z);
    for (std::int64_t i = 0; i < k; ++i) {
        values[i] = all[n - 1 - i] * scale;
        const double *from = z + (k - 1 - i) * n;
        for (std::int64_t j = 0; j < n; ++j) vectors[i * n + j] = T(from[j]);
    }
    apply_reflectors<T>(n, k, a, tau, vectors);
}

template void eigh_top<float>(std::int64_t, std::int64_t, const double *, double *, float *);
template void eigh_top<double>(std::int64_t, std::int64_t, const double *, double *, double *);

} // namespace subspan
