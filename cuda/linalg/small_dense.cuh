// k x k matrices of doubles in shared memory, worked on by all threads of a block. Every function ends with a barrier; leading
// dimensions are odd, so that rows and columns are read without bank conflicts.
#pragma once

#include "subspan/cuda/launch.cuh"

namespace subspan::cuda::small {

template <int K, int Threads> struct Small {
    static constexpr int ld = K + 1, area = K * ld;

    /// f(i, j) for every entry.
    template <class F> static SUBSPAN_DEVICE void each(int k, const F &f) {
#pragma unroll 1
        for (int e = int(threadIdx.x); e < K * K; e += Threads) {
            const int i = e / K, j = e % K;
            if (i < k && j < k) f(i, j);
        }
        __syncthreads();
    }
    /// c = a b, or aᵀ b; c is neither.
    template <bool Transposed> static SUBSPAN_DEVICE void multiply(int k, const double *a, const double *b, double *c) {
        each(k, [&](int i, int j) {
            double s = 0;
#pragma unroll 4
            for (int l = 0; l < k; ++l) s = fma(Transposed ? a[l * ld + i] : a[i * ld + l], b[l * ld + j], s);
            c[i * ld + j] = s;
        });
    }
    /// to[c] = Σ left[c] row · right[c] row over `n` rows of k entries that load(first) puts into shared memory, Rows at a time, ld apart, zero behind
    /// the last one; it ends with a barrier, and begins with one. Rows go to groups of threads, whose sums are added in order.
    template <int Rows, int Count, class Load>
    static SUBSPAN_DEVICE void grams(int n, const Load &load, const double *const (&left)[Count], const double *const (&right)[Count],
                                     double *const (&to)[Count]) {
        constexpr int kGroups = K * K < Threads ? Threads / (K * K) : 1, kEach = K * K > Threads ? K * K / Threads : 1;
        const int tid = int(threadIdx.x), group = kGroups > 1 ? tid / (K * K) : 0, e0 = kGroups > 1 ? tid % (K * K) : tid;
        double d[Count][kEach];
#pragma unroll
        for (int c = 0; c < Count; ++c)
#pragma unroll
            for (int x = 0; x < kEach; ++x) d[c][x] = 0.0;
        for (int first = 0; first < n; first += Rows) {
            load(first);
            for (int r = group; r < Rows; r += kGroups)
#pragma unroll
                for (int x = 0; x < kEach; ++x) {
                    const int i = r * ld + (e0 + x * Threads) / K, j = r * ld + (e0 + x * Threads) % K;
#pragma unroll
                    for (int c = 0; c < Count; ++c) d[c][x] = fma(left[c][i], right[c][j], d[c][x]);
                }
        }
        for (int g = 0; g < kGroups; ++g) {
            __syncthreads();
            if (group == g)
#pragma unroll
                for (int x = 0; x < kEach; ++x) {
                    const int at = (e0 + x * Threads) / K * ld + (e0 + x * Threads) % K;
#pragma unroll
                    for (int c = 0; c < Count; ++c) to[c][at] = g == 0 ? d[c][x] : to[c][at] + d[c][x];
                }
        }
        __syncthreads();
    }
    /// The largest of what f(i, j) gives, NaN where one is; the same for all threads. `scratch` holds 33 doubles.
    template <class F> static SUBSPAN_DEVICE double largest(int k, double *scratch, const F &f) {
        double top = 0;
        bool bad = false;
#pragma unroll 1
        for (int e = int(threadIdx.x); e < K * K; e += Threads) {
            const int i = e / K, j = e % K;
            if (i >= k || j >= k) continue;
            double x = f(i, j);
            x = x < 0 ? -x : x;
            bad = bad || x != x;
            top = most(top, x);
        }
        if (bad) top = power_of_infinity();
        top = warp_most(top);
        if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = top;
        __syncthreads();
        double all = 0;
        for (int w = 0; w < Threads / 32; ++w) all = most(all, scratch[w]);
        __syncthreads();
        return all;
    }
    static SUBSPAN_DEVICE double power_of_infinity() { return 1.7976931348623157e308 * 2.0; }
    /// The largest row sum of magnitudes.
    static SUBSPAN_DEVICE double row_norm(int k, double *scratch, const double *a) {
        return largest(k, scratch, [&](int i, int j) {
            if (j != 0) return 0.0;
            double s = 0;
            for (int l = 0; l < k; ++l) s += a[i * ld + l] < 0 ? -a[i * ld + l] : a[i * ld + l];
            return s;
        });
    }

    /// out = (I + x)^(-1/2) of a symmetric x with I + x positive definite: the coupled Newton iteration (Higham, Functions of
    /// Matrices, 2008, equation 6.35). y, z and w are work.
    static SUBSPAN_DEVICE void inverse_sqrt(int k, double *scratch, const double *x, double *out, double *y, double *z, double *w) {
        const double norm = row_norm(k, scratch, x), scale = norm < 0.5 ? 1.0 : 1.0 + norm;
        each(k, [&](int i, int j) {
            y[i * ld + j] = (x[i * ld + j] + (i == j ? 1.0 : 0.0)) / scale;
            z[i * ld + j] = i == j ? 1.0 : 0.0;
        });
        for (int step = 0; step < 60; ++step) {
            multiply<false>(k, z, y, w);
            each(k, [&](int i, int j) { w[i * ld + j] = (i == j ? 1.5 : 0.0) - 0.5 * w[i * ld + j]; });
            const double off = largest(k, scratch, [&](int i, int j) { return w[i * ld + j] - (i == j ? 1.0 : 0.0); });
            multiply<false>(k, z, w, out);
            each(k, [&](int i, int j) { z[i * ld + j] = out[i * ld + j]; });
            if (!(off >= 1e-9)) break;
            multiply<false>(k, y, w, out);
            each(k, [&](int i, int j) { y[i * ld + j] = out[i * ld + j]; });
        }
        const double root = 1.0 / sqrt(scale);
        each(k, [&](int i, int j) { out[i * ld + j] = 0.5 * root * (z[i * ld + j] + z[j * ld + i]); });
    }

    /// out = R⁻¹ where I + x = RᵀR; r is work. One warp, a lane a column.
    static SUBSPAN_DEVICE void inverse_cholesky(int k, const double *x, double *out, double *r) {
        each(k, [&](int i, int j) { r[i * ld + j] = x[i * ld + j] + (i == j ? 1.0 : 0.0); });
        if (threadIdx.x < 32) {
            const int j = int(threadIdx.x);
            for (int i = 0; i < k; ++i) {
                double v = 0;
                if (j < k) {
                    v = r[i * ld + j];
                    for (int p = 0; p < i; ++p) v = fma(-r[p * ld + i], r[p * ld + j], v);
                }
                const double pivot = __shfl_sync(kWarp, v, i);
                __syncwarp();
                if (j < k) r[i * ld + j] = j < i ? 0.0 : v / sqrt(pivot);
                __syncwarp();
            }
            // R X = I from the last row on; a lane's column needs no other.
            if (j < k)
                for (int i = k - 1; i >= 0; --i) {
                    double v = i == j ? 1.0 : 0.0;
                    for (int p = i + 1; p < k; ++p) v = fma(-r[i * ld + p], out[p * ld + j], v);
                    out[i * ld + j] = v / r[i * ld + i];
                }
        }
        __syncthreads();
    }

    /// cosine = cos √x, sinc = sin √x / √x of a symmetric positive semidefinite x: Taylor series of x / 4^s, and s doublings of the
    /// angle, cos 2a = 2 cos² a - 1 and sin 2a / 2a = cos a · sin a / a. y and w are work.
    static SUBSPAN_DEVICE void trigonometric(int k, double *scratch, const double *x, double tolerance, double *cosine, double *sinc, double *y, double *w) {
        double norm = row_norm(k, scratch, x), down = 1.0;
        int doublings = 0;
        for (; norm > 1.0 && doublings < 64; ++doublings) {
            norm *= 0.25;
            down *= 0.25;
        }
        int terms = 1;
        for (double next = norm / 2; next > tolerance && terms < 12; ++terms) next *= norm / double((2 * terms + 1) * (2 * terms + 2));
        // Horner: cos = Σ c_m x^m, c_m = (-1)^m / (2m)!, and sinc with (2m + 1)!.
        double c = 1.0;
        for (int m = 1; m <= terms; ++m) c = -c / double((2 * m - 1) * (2 * m));
        each(k, [&](int i, int j) {
            y[i * ld + j] = x[i * ld + j] * down;
            cosine[i * ld + j] = i == j ? c : 0.0;
            sinc[i * ld + j] = i == j ? c / double(2 * terms + 1) : 0.0;
        });
        for (int m = terms - 1; m >= 0; --m) {
            c = -c * double((2 * m + 1) * (2 * m + 2));
            multiply<false>(k, y, cosine, w);
            each(k, [&](int i, int j) { cosine[i * ld + j] = w[i * ld + j] + (i == j ? c : 0.0); });
            multiply<false>(k, y, sinc, w);
            each(k, [&](int i, int j) { sinc[i * ld + j] = w[i * ld + j] + (i == j ? c / double(2 * m + 1) : 0.0); });
        }
        for (int d = 0; d < doublings; ++d) {
            multiply<false>(k, sinc, cosine, w);
            each(k, [&](int i, int j) { sinc[i * ld + j] = w[i * ld + j]; });
            multiply<false>(k, cosine, cosine, w);
            each(k, [&](int i, int j) { cosine[i * ld + j] = 2.0 * w[i * ld + j] - (i == j ? 1.0 : 0.0); });
        }
    }
};

} // namespace subspan::cuda::small
