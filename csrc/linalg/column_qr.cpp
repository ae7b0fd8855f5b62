#include "linalg/column_qr.hpp"

#include "base/amax.hpp"
#include "base/simd.hpp"
#include "linalg/columns.hpp"
#include "subspan/parallel.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

namespace subspan {
namespace {

using simd::Vec;
using std::int64_t;

constexpr int kGroup = simd::kColumnGroup;

// What works on k numbers or is seldom needed, once for all kernels.

// Column j of T, rows of ld, from products of v_j with those before it: -tau T (V_0..j-1ᵀ v_j) above tau.
void triangle(double *t, int ld, int j, double factor, const double *along) {
    for (int l = 0; l < j; ++l) {
        double sum = 0;
        for (int q = l; q < j; ++q) sum += t[l * ld + q] * along[q];
        t[l * ld + j] = -factor * sum;
    }
    t[j * ld + j] = factor;
}
// w with Q W = E W + V w: -T V1ᵀ W; all of them by rows of `stride`.
template <class T> void reflected(const ColumnQr<T> &g, int64_t ld, int stride, const double *turn, T *w) {
    const int k = int(g.a.cols);
    for (int c = 0; c < k; ++c) {
        double y[kFewColumns];
        for (int l = 0; l < k; ++l) {
            y[l] = 0;
            for (int q = 0; q < k; ++q) y[l] += double(g.columns[l * ld + q]) * turn[q * k + c];
        }
        for (int l = 0; l < k; ++l) {
            double sum = 0;
            for (int q = l; q < k; ++q) sum += g.factors[l * stride + q] * y[q];
            w[l * stride + c] = T(-sum);
        }
    }
}
// Column x in units of its largest entry, or of alpha; returns the unit, one where there is nothing.
template <class T> double to_own_unit(T *x, int64_t m, double alpha) {
    double below = 0;
    for (int64_t i = 0; i < m; ++i) below = std::max(below, std::abs(double(x[i])));
    if (!(below > 0)) return 1.0;
    const double unit = std::max(below, std::abs(alpha));
    for (int64_t i = 0; i < m; ++i) x[i] = T(double(x[i]) / unit);
    return unit;
}
template <class T> void times(T *x, int64_t n, T f) {
    for (int64_t i = 0; i < n; ++i) x[i] *= f;
}
// After the columns: R back in its own unit, V's tau and T, and the signs that Q takes.
template <class T> void finish(ColumnQr<T> &g, T unit, int stride, const T *tau, double *turn) {
    const int k = int(g.a.cols);
    for (int i = 0; i < k * k && unit != T(1); ++i) g.r[i] /= unit;
    for (int i = 0; i < k && g.v.data != nullptr; ++i) {
        g.tau[i] = tau[i];
        for (int j = 0; j < k; ++j) g.t(i, j) = T(g.factors[i * stride + j]);
    }
    for (int c = 0; c < k && g.q.data != nullptr; ++c) {
        const bool turned = g.positive && g.r[c * k + c] < T(0);
        turn[c * k + c] = turned ? -1.0 : 1.0;
        for (int j = c; j < k && turned; ++j) g.r[c * k + j] = -g.r[c * k + j];
    }
}

template <class T, int Bytes, int K> struct Factor {
    using C = simd::Columns<T, Bytes>;
    using V = Vec<T, Bytes>;
    using VT = typename V::type;
    static constexpr int W = V::lanes;
    static constexpr int64_t kRun = 128; // vectors whose products are summed in T

    // along[c] = x · column c, for all of them; x is one of them.
    static SUBSPAN_INLINE void products(const T *p, int64_t ld, int64_t size, const T *x, double *along) {
        for (int c = 0; c < K; ++c) along[c] = 0;
        const auto group = [&](double *to) { return [to](int c, double sum) SUBSPAN_LAMBDA_INLINE { to[c] += sum; }; };
        C::template products<std::min(K, kGroup), kRun>(p, ld, size, x, group(along));
        if constexpr (K > kGroup) C::template products<K - kGroup, kRun>(p + kGroup * ld, ld, size, x, group(along + kGroup));
    }
    // Columns from z on lose f_c x.
    template <int Count> static SUBSPAN_INLINE void subtract(const T *x, T *z, int64_t ld, int64_t size, const T *f) {
        for (int64_t i = 0; i < size; i += W) {
            const VT y = V::load(x + i);
#pragma GCC unroll 8
            for (int c = 0; c < Count; ++c) V::store(z + c * ld + i, V::load(z + c * ld + i) - f[c] * y);
        }
    }
    // As many as are left: fewer than K.
    template <int Most = std::min(K - 1, kGroup)> static SUBSPAN_INLINE void subtract(int count, const T *x, T *z, int64_t ld, int64_t size, const T *f) {
        if constexpr (Most > 0) {
            if (count < Most) return subtract<Most - 1>(count, x, z, ld, size, f);
            subtract<Most>(x, z, ld, size, f);
            if constexpr (Most == kGroup && K - 1 > kGroup) subtract<K - 1 - kGroup>(count - kGroup, x, z + kGroup * ld, ld, size, f + kGroup);
        }
    }
    // Of A: V, T, R and, asked for, Q; with tau, of V that is given: T; with w: Q w from an earlier call's. Each kernel is written
    // into the code once: there are nine numbers of columns, three vector widths and two types.
    static SUBSPAN_INLINE void all(ColumnQr<T> &g, const double *w, const MatrixView<T> *q, const T *tau) {
        const int64_t m = g.a.rows, ld = simd::column_stride(m), size = (m + W - 1) / W * W;
        const int k = int(g.a.cols);
        T unit = 1, factors[K] = {};
        double turn[K * K] = {};
        MatrixView<T> to[2] = {{}, q != nullptr ? *q : g.q};
        if (w != nullptr) {
            std::copy_n(w, k * k, turn);
        } else {
            for (int c = k; c < K; ++c) std::fill_n(g.columns + c * ld, size, T(0)); // of length zero: nothing is reflected for them
            C::template load<K>(g.a, g.columns, ld);
            if (tau == nullptr && !(unit = scaled(g, ld, size))) return;
            factor(g, ld, size, tau, factors);
            if (tau != nullptr) return;
            finish(g, unit, K, factors, turn);
            to[0] = g.v;
        }
        for (int pass = 0; pass < 2; ++pass) {
            if (to[pass].data == nullptr) continue;
            if (pass == 1) form(g, turn, ld, size);
            C::template store<K>(g.columns, ld, to[pass]);
        }
    }
    // Columns times the power of two that is returned, zero where they are not finite.
    static SUBSPAN_INLINE T scaled(ColumnQr<T> &g, int64_t ld, int64_t size) {
        const int k = int(g.a.cols);
        T top = 0;
        for (int c = 0; c < k; ++c) { // comparisons would lose NaN
            const T one = max_abs_inline(g.columns + c * ld, size);
            top = one <= top ? top : one;
        }
        g.good = std::isfinite(top);
        if (!g.good) return T(0);
        const T unit = safe_scale(top);
        if (unit != T(1))
            for (int c = 0; c < k; ++c) times(g.columns + c * ld, size, unit);
        std::fill_n(g.r, k * k, T(0));
        return unit;
    }
    static SUBSPAN_INLINE void factor(ColumnQr<T> &g, int64_t ld, int64_t size, const T *given, T *tau) {
        constexpr double low = double(std::numeric_limits<T>::min()) / (double(std::numeric_limits<T>::epsilon()) * double(std::numeric_limits<T>::epsilon()));
        constexpr double high = double(std::numeric_limits<T>::max()) * 1e-6;
        const int64_t m = g.a.rows;
        const int k = int(g.a.cols);
        T *p = g.columns;
        double *t = g.factors, along[kFewColumns];
        std::fill_n(t, K * K, 0.0);
        if (given != nullptr) {
            C::template gram<K, kRun>(p, ld, size, t); // below the diagonal, where T has nothing
            for (int j = 0; j < k; ++j) {
                triangle(t, K, j, double(given[j]), t + j * K);
                std::fill_n(t + j * K, j, 0.0);
            }
            return;
        }
        for (int j = 0; j < k; ++j) {
            if (size > 100000) poll();
            T *x = p + j * ld;
            double alpha = double(x[j]), back = 1.0;
            x[j] = T(0); // rows up to j are zero, here and in later columns: those of R are out, and V has none
            for (bool again = true; again;) {
                products(p, ld, size, x, along);
                again = false;
                // Far below or above one, squares have lost digits: the column is then measured in units of its largest entry.
                if (back == 1.0 && !(along[j] > low && along[j] < high)) {
                    back = to_own_unit(x, m, alpha);
                    alpha /= back;
                    again = back != 1.0;
                }
            }
            double beta = alpha, scale = 0, factor = 0;
            if (along[j] > 0) {
                const double norm = std::sqrt(alpha * alpha + along[j]);
                beta = alpha > 0 ? -norm : norm;
                factor = (beta - alpha) / beta;
                scale = 1.0 / (alpha - beta);
            }
            T f[K] = {};
            g.r[j * k + j] = T(beta * back);
            for (int c = j + 1; c < k; ++c) {
                T &above = p[c * ld + j];
                const double w = factor * (double(above) + scale * along[c]);
                f[c - j - 1] = T(w * scale);
                g.r[j * k + c] = T(double(above) - w);
                above = T(0);
            }
            subtract(k - 1 - j, x, x + ld, ld, size, f);
            for (int64_t i = 0; i < size; i += W) V::store(x + i, T(scale) * V::load(x + i));
            x[j] = T(1);
            tau[j] = T(factor);
            for (int l = 0; l < j; ++l) along[l] = double(p[l * ld + j]) + scale * along[l];
            triangle(t, K, j, factor, along);
        }
    }
    static SUBSPAN_INLINE void form(ColumnQr<T> &g, const double *turn, int64_t ld, int64_t size) {
        const int k = int(g.a.cols);
        T *p = g.columns, w[K][K] = {}; // Q W = E W + V w
        reflected(g, ld, K, turn, &w[0][0]);
        for (int64_t i = 0; i < size; i += W) {
            VT y[K];
#pragma GCC unroll 16
            for (int l = 0; l < K; ++l) y[l] = V::load(p + l * ld + i);
#pragma GCC unroll 16
            for (int c = 0; c < K; ++c) {
                VT sum = w[0][c] * y[0];
#pragma GCC unroll 16
                for (int l = 1; l < K; ++l) sum += w[l][c] * y[l];
                V::store(p + c * ld + i, sum);
            }
        }
        for (int c = 0; c < k; ++c)
            for (int i = 0; i < k; ++i) p[c * ld + i] = T(double(p[c * ld + i]) + turn[i * k + c]);
    }
};

template <class T> struct ColumnKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(ColumnQr<T> *g, const double *w, const MatrixView<T> *q, const T *tau) {
        switch (g->a.cols) {
        case 1: return Factor<T, Bytes, 1>::all(*g, w, q, tau);
        case 2: return Factor<T, Bytes, 2>::all(*g, w, q, tau);
        case 3: return Factor<T, Bytes, 3>::all(*g, w, q, tau);
        case 4: return Factor<T, Bytes, 4>::all(*g, w, q, tau);
        case 5: return Factor<T, Bytes, 5>::all(*g, w, q, tau);
        case 6: return Factor<T, Bytes, 6>::all(*g, w, q, tau);
        case 7:
        case 8: return Factor<T, Bytes, 8>::all(*g, w, q, tau);
        default: // columns of zeros make up the rest
            return Factor<T, Bytes, 12>::all(*g, w, q, tau);
        }
    }
};

} // namespace

template <class T> T safe_scale(T top) {
    constexpr double high = 1e12, low = 1e-12;
    if (!(top > T(0)) || (double(top) <= high && double(top) >= low)) return T(1);
    int e = 0;
    std::frexp(double(top), &e);
    // The reciprocal of a subnormal number overflows.
    return T(std::ldexp(1.0, std::clamp(-e, std::numeric_limits<T>::min_exponent, std::numeric_limits<T>::max_exponent - 2)));
}

template <class T> int64_t column_qr_room(int64_t m, int64_t k) { return (k <= 6 ? k : k <= 8 ? 8 : kFewColumns) * simd::column_stride(m); }

template <class T> void column_qr(ColumnQr<T> &qr) {
    const double *none = nullptr;
    const MatrixView<T> *nowhere = nullptr;
    const T *no_tau = nullptr;
    simd::dispatch<ColumnKernel<T>>(&qr, none, nowhere, no_tau);
}

template <class T> void column_q(ColumnQr<T> &qr, const double *w, MatrixView<T> q) {
    const MatrixView<T> *to = &q;
    const T *no_tau = nullptr;
    simd::dispatch<ColumnKernel<T>>(&qr, w, to, no_tau);
}

template <class T> void column_reflections(ColumnQr<T> &qr, const T *tau) {
    const double *none = nullptr;
    const MatrixView<T> *nowhere = nullptr;
    simd::dispatch<ColumnKernel<T>>(&qr, none, nowhere, tau);
}

#define SUBSPAN_INSTANTIATE(T)                                                                                                                                 \
    template T safe_scale<T>(T);                                                                                                                               \
    template int64_t column_qr_room<T>(int64_t, int64_t);                                                                                                      \
    template void column_qr<T>(ColumnQr<T> &);                                                                                                                 \
    template void column_q<T>(ColumnQr<T> &, const double *, MatrixView<T>);                                                                                   \
    template void column_reflections<T>(ColumnQr<T> &, const T *);
SUBSPAN_INSTANTIATE(float)
SUBSPAN_INSTANTIATE(double)
#undef SUBSPAN_INSTANTIATE

} // namespace subspan
