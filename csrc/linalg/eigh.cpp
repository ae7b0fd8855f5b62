// Reduction to tridiagonal form, the tridiagonal problem (tridiagonal.cpp), and the way back for the vectors wanted.
// The reduction is LAPACK's blocked one (Dongarra, Sorensen and Hammarling, J. Comput. Appl. Math. 27, 1989) on a full
// symmetric matrix: at these sizes it stays in L2, where reading a row is cheaper than the bookkeeping of a triangle,
// and no BLAS library wakes threads 256 times for products of a few microseconds.
#include "subspan/eigh.hpp"

#include "base/scratch.hpp"
#include "base/simd.hpp"
#include "subspan/errors.hpp"
#include "subspan/gemm.hpp"
#include "subspan/parallel.hpp"

#include <algorithm>
#include <cmath>
#include <type_traits>

namespace subspan {
namespace {

constexpr std::int64_t kPanel = 32; // columns reduced between two updates of the rest
constexpr std::int64_t kBack = 48;  // reflectors applied at a time: the width of a register tile

using simd::dot;

// y[0, n) += sum_q f_q · row q of a, for `rows` rows of stride ld: y stays in registers.
template <class T, int Bytes> SUBSPAN_INLINE void add_rows(const T *f, const T *a, std::int64_t ld, std::int64_t rows, T *y, std::int64_t n) {
    using V = simd::Vec<T, Bytes>;
    constexpr int W = V::lanes;
    std::int64_t j = 0;
    for (; j + 4 * W <= n; j += 4 * W) {
        auto y0 = V::load(y + j), y1 = V::load(y + j + W), y2 = V::load(y + j + 2 * W), y3 = V::load(y + j + 3 * W);
        for (std::int64_t q = 0; q < rows; ++q) {
            const T *x = a + q * ld + j;
            y0 += f[q] * V::load(x);
            y1 += f[q] * V::load(x + W);
            y2 += f[q] * V::load(x + 2 * W);
            y3 += f[q] * V::load(x + 3 * W);
        }
        V::store(y + j, y0);
        V::store(y + j + W, y1);
        V::store(y + j + 2 * W, y2);
        V::store(y + j + 3 * W, y3);
    }
    for (; j + W <= n; j += W) {
        auto y0 = V::load(y + j);
        for (std::int64_t q = 0; q < rows; ++q) y0 += f[q] * V::load(a + q * ld + j);
        V::store(y + j, y0);
    }
    for (; j < n; ++j) {
        T sum = y[j];
        for (std::int64_t q = 0; q < rows; ++q) sum += f[q] * a[q * ld + j];
        y[j] = sum;
    }
}

// y_q = row q of a · x for `rows` rows of stride ld, eight at a time. With rows = n this is A x for a symmetric A.
template <class T, int Bytes> SUBSPAN_INLINE void rows_times(const T *a, std::int64_t ld, std::int64_t rows, const T *x, std::int64_t n, T *y) {
    using V = simd::Vec<T, Bytes>;
    constexpr int W = V::lanes, R = Bytes == 16 ? 4 : 8;
    std::int64_t i = 0;
    for (; i + R <= rows; i += R) {
        typename V::type s[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) s[r] = typename V::type{};
        const T *row = a + i * ld;
        std::int64_t j = 0;
        for (; j + W <= n; j += W) {
            const auto v = V::load(x + j);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) s[r] += V::load(row + r * ld + j) * v;
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            T sum = V::sum(s[r]);
            for (std::int64_t q = j; q < n; ++q) sum += row[r * ld + q] * x[q];
            y[i + r] = sum;
        }
    }
    for (; i < rows; ++i) y[i] = dot<T, Bytes>(a + i * ld, x, n);
}

// Rows are padded with zeros to whole cache lines, and every loop over a row starts at a line: an unaligned load of 64
// bytes always touches two lines and costs twice as much.
template <class T> constexpr std::int64_t kLine = 64 / std::int64_t(sizeof(T));

template <class T> struct PanelArgs {
    std::int64_t n, ld, first, count; // the matrix, its row stride, the first column of the panel, its width
    const T *a;                       // n x ld, trailing part up to date
    T *v, *w;                         // count x ld by rows: A22 -= VᵀW + WᵀV
    T *d, *e, *tau;
    T *x, *s, *t;                     // work: ld, kPanel, kPanel
};

template <class T> struct PanelKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(const PanelArgs<T> *p) {
        const std::int64_t n = p->n, ld = p->ld;
        T *x = p->x, *s = p->s, *t = p->t;
        for (std::int64_t i = 0; i < p->count; ++i) {
            poll();
            const std::int64_t c = p->first + i, j0 = c / kLine<T> * kLine<T>;
            std::copy(p->a + c * ld + j0, p->a + (c + 1) * ld, x + j0);
            for (std::int64_t q = 0; q < i; ++q) {
                s[q] = -p->w[q * ld + c];
                t[q] = -p->v[q * ld + c];
            }
            add_rows<T, Bytes>(s, p->v + j0, ld, i, x + j0, ld - j0);
            add_rows<T, Bytes>(t, p->w + j0, ld, i, x + j0, ld - j0);
            p->d[c] = x[c];
            T *v = p->v + i * ld, *w = p->w + i * ld;
            std::fill_n(v, ld, T(0));
            std::fill_n(w, ld, T(0));
            if (c + 1 == n) break;
            // Reflector that maps x[c + 1:] to a multiple of its first entry.
            const T alpha = x[c + 1], rest = dot<T, Bytes>(x + c + 2, x + c + 2, n - c - 2);
            T tau = 0;
            p->e[c] = alpha;
            if (rest > T(0)) {
                const T beta = -std::copysign(std::sqrt(alpha * alpha + rest), alpha), scale = T(1) / (alpha - beta);
                tau = (beta - alpha) / beta;
                for (std::int64_t j = c + 2; j < n; ++j) v[j] = x[j] * scale;
                p->e[c] = beta;
            }
            v[c + 1] = T(1);
            p->tau[c] = tau;
            const std::int64_t k0 = (c + 1) / kLine<T> * kLine<T>, len = ld - k0;
            const T *vk = v + k0;
            rows_times<T, Bytes>(p->a + (c + 1) * ld + k0, ld, n - c - 1, vk, len, w + c + 1);
            rows_times<T, Bytes>(p->w + k0, ld, i, vk, len, s);
            rows_times<T, Bytes>(p->v + k0, ld, i, vk, len, t);
            for (std::int64_t q = 0; q < i; ++q) {
                s[q] = -s[q];
                t[q] = -t[q];
            }
            add_rows<T, Bytes>(s, p->v + k0, ld, i, w + k0, len);
            add_rows<T, Bytes>(t, p->w + k0, ld, i, w + k0, len);
            std::fill(w + k0, w + c + 1, T(0));
            const T f = -tau * tau * dot<T, Bytes>(w + k0, vk, len) / 2;
            for (std::int64_t j = k0; j < ld; ++j) w[j] = tau * w[j] + f * v[j];
        }
    }
};

// A = Q T Qᵀ with Q = H_0 H_1 ...; row c of `reflectors` (n x ld) is the vector of H_c, zero up to c, one at c + 1.
template <class T> void tridiagonalise(std::int64_t n, std::int64_t ld, T *a, T *d, T *e, T *tau, T *reflectors) {
    Frame frame;
    T *w = frame.take<T>(kPanel * ld), *x = frame.take<T>(ld), *s = frame.take<T>(kPanel), *t = frame.take<T>(kPanel);
    T *left = frame.take<T>(n * 2 * kPanel), *right = frame.take<T>(2 * kPanel * n);
    for (std::int64_t first = 0; first < n; first += kPanel) {
        const std::int64_t b = std::min(kPanel, n - first), rest = n - first - b, at = first + b;
        T *v = reflectors + first * ld;
        const PanelArgs<T> args{n, ld, first, b, a, v, w, d, e, tau, x, s, t};
        simd::dispatch<PanelKernel<T>>(&args);
        if (rest == 0) break;
        // A22 -= [V; W]ᵀ [W; V], both triangles.
        for (std::int64_t q = 0; q < b; ++q) {
            std::copy_n(w + q * ld + at, rest, right + q * rest);
            std::copy_n(v + q * ld + at, rest, right + (b + q) * rest);
            for (std::int64_t i = 0; i < rest; ++i) {
                left[q * rest + i] = -v[q * ld + at + i];
                left[(b + q) * rest + i] = -w[q * ld + at + i];
            }
        }
        gemm<T>(MatrixView<const T>(left, 2 * b, rest).transposed(), MatrixView<const T>(right, 2 * b, rest),
                MatrixView<T>(a + at * ld + at, rest, rest, ld, 1), true);
    }
}

// rows <- rows Qᵀ, blocks of reflectors from the last to the first.
template <class T> void apply_reflectors(std::int64_t n, std::int64_t ld, std::int64_t k, const T *reflectors, const T *tau, T *rows) {
    Frame frame;
    T *w = frame.take<T>(k * kBack), *w2 = frame.take<T>(k * kBack);
    T *t = frame.take<T>(kBack * kBack), *g = frame.take<T>(kBack * kBack);
    const std::int64_t count = n - 1;
    for (std::int64_t first = (count - 1) / kBack * kBack; first >= 0; first -= kBack) {
        const std::int64_t b = std::min(kBack, count - first), at = first + 1, m = n - at;
        const MatrixView<const T> v(reflectors + first * ld + at, b, m, ld, 1);
        // T of the compact WY form H_first ... H_{first+b-1} = I - Vᵀ T V (Schreiber and Van Loan 1989), V by rows.
        gemm<T>(v, v.transposed(), MatrixView<T>(g, b, b));
        std::fill_n(t, kBack * kBack, T(0));
        for (std::int64_t i = 0; i < b; ++i) {
            for (std::int64_t r = 0; r < i; ++r) {
                T s = 0;
                for (std::int64_t c = r; c < i; ++c) s += t[r * kBack + c] * g[c * b + i];
                t[r * kBack + i] = -tau[first + i] * s; // t holds -T
            }
            t[i * kBack + i] = -tau[first + i];
        }
        // rows <- rows - ((rows Vᵀ) Tᵀ) V.
        const MatrixView<T> c(rows + at, k, m, n, 1), wv(w, k, b), w2v(w2, k, b);
        gemm<T>(c, v.transposed(), wv);
        gemm<T>(wv, MatrixView<const T>(t, b, b, kBack, 1).transposed(), w2v);
        gemm<T>(w2v, v, c, true);
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

// a (row stride ld, padding zero) = both triangles of g / scale, in T.
template <class T> struct ScaleKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(std::int64_t n, std::int64_t ld, const double *g, double scale, T *a) {
        for (std::int64_t i = 0; i < n; ++i) std::fill(a + i * ld + n, a + (i + 1) * ld, T(0));
        constexpr std::int64_t B = 16; // blocks, so that the mirrored writes stay in L1
        for (std::int64_t i0 = 0; i0 < n; i0 += B)
            for (std::int64_t j0 = 0; j0 <= i0; j0 += B)
                for (std::int64_t i = i0; i < std::min(n, i0 + B); ++i) {
                    const std::int64_t end = std::min(j0 + B, i + 1);
                    for (std::int64_t j = j0; j < end; ++j) a[i * ld + j] = T(g[i * n + j] / scale);
                    for (std::int64_t j = j0; j < end; ++j) a[j * ld + i] = a[i * ld + j];
                }
    }
};

} // namespace

template <class T> void eigh_top(std::int64_t n, std::int64_t k, const double *g, double *values, T *vectors, double *all) {
    if (n == 0 || (k == 0 && all == nullptr)) return;
    double scale = 0;
    simd::dispatch<LargestKernel>(n, g, &scale);
    if (scale < 0.0) throw LinAlgError("symmetric eigenproblem: the matrix holds NaN or infinity");
    if (scale == 0.0) {
        std::fill_n(values, k, 0.0);
        std::fill_n(vectors, k * n, T(0));
        for (std::int64_t i = 0; i < k; ++i) vectors[i * n + i] = T(1);
        if (all != nullptr) std::fill_n(all, n, 0.0);
        return;
    }
    // Scaled to 1, so that float neither overflows nor loses the small entries to underflow.
    Frame frame;
    T *d = frame.take<T>(n), *e = frame.take<T>(n), *tau = frame.take<T>(n);
    // One line more than the rows need: a power of two would map every row to the same few cache sets.
    const std::int64_t ld = (n + 2 * kLine<T> - 1) / kLine<T> * kLine<T>;
    T *a = frame.take<T>(n * ld), *reflectors = frame.take<T>(n * ld);
    simd::dispatch<ScaleKernel<T>>(n, ld, g, scale, a);
    tridiagonalise(n, ld, a, d, e, tau, reflectors);

    double *dd = frame.take<double>(n), *ee = frame.take<double>(n), *found = frame.take<double>(n);
    double *z = frame.take<double>(k * n);
    std::copy_n(d, n, dd);
    std::copy_n(e, n - 1, ee);
    // Measured: of more vectors, divide and conquer.
    const bool few = all == nullptr && k <= n / 3 && tridiagonal_few(n, k, dd, ee, std::is_same_v<T, float> ? 1e-10 : 0.0, found + n - k, z);
    if (!few) tridiagonal_top(n, k, dd, ee, found, z);
    if (all != nullptr)
        for (std::int64_t i = 0; i < n; ++i) all[i] = found[i] * scale;
    for (std::int64_t i = 0; i < k; ++i) {
        values[i] = found[n - 1 - i] * scale;
        const double *from = z + (k - 1 - i) * n;
        for (std::int64_t j = 0; j < n; ++j) vectors[i * n + j] = T(from[j]);
    }
    // Rows are independent of one another: one part a thread, and the same bits whatever the parts.
    const std::int64_t parts = double(n) * double(n) * double(k) > 2e6 ? std::min<std::int64_t>(num_threads(), k) : 1;
    parallel_for(parts, [&](std::int64_t p) {
        const std::int64_t first = k * p / parts, last = k * (p + 1) / parts;
        apply_reflectors<T>(n, ld, last - first, reflectors, tau, vectors + first * n);
    });
}

template void eigh_top<float>(std::int64_t, std::int64_t, const double *, double *, float *, double *);
template void eigh_top<double>(std::int64_t, std::int64_t, const double *, double *, double *, double *);

} // namespace subspan
