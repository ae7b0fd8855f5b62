#include "subspan/cuda/grassmann.hpp"

#include "points.cuh"
#include "small.cuh"

#include <cmath>
#include <limits>
#include <type_traits>

namespace subspan::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kChain = 64; // rows that a lane adds up in T before the sums go on in double

enum Job { step_in_place, retraction, tangent_part };

template <class T> struct Arguments {
    Matrices<T> u;
    Matrices<const T> grad;  // or h
    Matrices<T> buffer;      // of a step, where there is one
    Matrices<T> out;         // of the pure functions
    bool has_buffer, parallel, vectors;
    T momentum, weight;
    double t;
    Job job;
    Retraction method;
};

template <class T> struct Four {
    T x[4];
};

// Columns [j, j + 4) of a row, zero past k.
template <class T> SUBSPAN_DEVICE Four<T> four(const T *row, int64_t col_stride, int j, int k, bool vectors) {
    Four<T> v;
    if constexpr (sizeof(T) == 4) {
        if (vectors && j + 4 <= k) {
            const float4 f = *reinterpret_cast<const float4 *>(row + j);
            v.x[0] = f.x;
            v.x[1] = f.y;
            v.x[2] = f.z;
            v.x[3] = f.w;
            return v;
        }
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) v.x[e] = j + e < k ? row[int64_t(j + e) * col_stride] : T(0);
    return v;
}

// One point: its rows, and those of what moves it. Width: a step in place of points of so many columns, with a buffer that is not carried in
// parallel, all of them without gaps and aligned to vectors, so that the compiler knows all branches and asks for everything early; zero: any job.
template <class T, int Width> struct Point {
    const Arguments<T> &a;
    T *u, *buffer, *out;
    const T *grad;
    int64_t row_stride, col_stride; // of u
    int n, k;
    SUBSPAN_DEVICE Point(const Arguments<T> &a, unsigned item)
        : a(a), u(a.u.at(item)), buffer(Width > 0 || a.has_buffer ? a.buffer.at(item) : nullptr),
          out(Width > 0 || a.job == step_in_place ? u : a.out.at(item)), grad(a.grad.at(item)), row_stride(a.u.row_stride), col_stride(a.u.col_stride),
          n(int(a.u.rows)), k(Width > 0 ? Width : int(a.u.cols)) {}
    /// What was written as the point, and no buffer.
    SUBSPAN_DEVICE Point<T, 0> moved(unsigned item) const {
        Point<T, 0> p(a, item);
        p.u = out;
        p.row_stride = target().row_stride;
        p.col_stride = target().col_stride;
        p.buffer = nullptr;
        return p;
    }
    static SUBSPAN_DEVICE int64_t at(int row, int64_t stride) { return Width > 0 ? int64_t(unsigned(row) * unsigned(Width)) : row * stride; }
    SUBSPAN_DEVICE bool vectors() const { return Width > 0 || a.vectors; }
    SUBSPAN_DEVICE bool parallel() const { return Width == 0 && a.parallel; }
    SUBSPAN_DEVICE bool has_buffer() const { return Width > 0 || buffer != nullptr; }
    SUBSPAN_DEVICE const Matrices<T> &target() const { return Width > 0 || a.job == step_in_place ? a.u : a.out; }
    SUBSPAN_DEVICE Four<T> of_u(int row, int j) const { return four<T>(u + at(row, row_stride), col_stride, j, k, vectors()); }
    /// momentum · buffer + weight · grad.
    SUBSPAN_DEVICE Four<T> of_h(int row, int j) const {
        Four<T> g = four<T>(grad + at(row, a.grad.row_stride), a.grad.col_stride, j, k, vectors());
        if (!has_buffer()) return g;
        const Four<T> b = four<T>(buffer + at(row, a.buffer.row_stride), a.buffer.col_stride, j, k, vectors());
#pragma unroll
        for (int e = 0; e < 4; ++e) g.x[e] = fma(a.momentum, b.x[e], a.weight * g.x[e]);
        return g;
    }
    SUBSPAN_DEVICE void put(T *base, const Matrices<T> &m, int row, int j, const Four<T> &v) const {
        T *to = base + at(row, m.row_stride);
        if constexpr (sizeof(T) == 4) {
            if (vectors() && j + 4 <= k) {
                *reinterpret_cast<float4 *>(to + j) = float4{v.x[0], v.x[1], v.x[2], v.x[3]};
                return;
            }
        }
#pragma unroll
        for (int e = 0; e < 4; ++e)
            if (j + e < k) to[int64_t(j + e) * m.col_stride] = v.x[e];
    }
};

template <int K> struct Shared {
    static constexpr int area = small::Small<K, kThreads>::area;
    double e[area], m[area], b[area];       // UᵀU, UᵀH, HᵀH
    double f[area], x[area], c[area], s[area], w[area], y[area];
    double along[area]; // U along: the part of H that was set aside
    SUBSPAN_DEVICE double *z() { return e; } // work, once UᵀU has been used
    double scratch[40];
};
template <class T, int K> struct Coefficients { // of the result and of the velocity, in T
    alignas(16) T p[K * K], q[K * K], p2[K * K], q2[K * K];
};

// Items of shared memory in which warps put their sums; none where the device may not have so much.
template <class T, int K> constexpr int kParts = K == 32 ? 0 : (sizeof(T) == 4 && K == 8 ? 3 : 1) * kWarps * K * K;

template <class T> SUBSPAN_SHARED_CODE int64_t coefficient_bytes(int k, bool parallel) { return (parallel ? 4 : 2) * int64_t(k) * k * int64_t(sizeof(T)); }

// Gram matrices of U and H - U off (off null: of U and H): UᵀU, UᵀH and HᵀH, all three in one sweep, or one after the other where
// their sums would not fit the registers. A lane holds 4 x B blocks, for every so many rows. `count` 1: UᵀU is enough.
template <class T, int K, int Width> SUBSPAN_DEVICE void products(const Point<T, Width> &point, Shared<K> &shared, T *parts, const T *off, int count = 3) {
    constexpr int B = K == 32 ? 8 : 4, kAcross = K / B, kLanes = (K / 4) * kAcross, kRows = 32 / kLanes, ld = K + 1;
    constexpr int kTogether = sizeof(T) == 4 && K == 8 ? 3 : 1;
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, block = lane % kLanes, i0 = 4 * (block / kAcross), j0 = B * (block % kAcross);
    for (int e = int(threadIdx.x); e < K * ld; e += kThreads) shared.e[e] = shared.m[e] = shared.b[e] = 0.0;
    __syncthreads();
    const auto row_of_h = [&](int row, int j) {
        Four<T> h = point.of_h(row, j);
        if (off != nullptr)
            for (int l = 0; l < point.k; ++l) {
                const T u = point.u[row * point.row_stride + l * point.col_stride];
#pragma unroll
                for (int e = 0; e < 4; ++e) h.x[e] = fma(-u, off[l * K + j + e], h.x[e]);
            }
        return h;
    };
    const int per = kWarps * kRows * kChain; // rows of a chunk, all warps together
    for (int first = 0; first < point.n; first += per) {
        const int end = least(point.n, first + per);
#pragma unroll 1
        for (int begin = 0; begin < count; begin += kTogether) {
            T d[kTogether][4][B];
#pragma unroll
            for (int g = 0; g < kTogether; ++g)
#pragma unroll
                for (int i = 0; i < 4; ++i)
#pragma unroll
                    for (int j = 0; j < B; ++j) d[g][i][j] = T(0);
#pragma unroll(Width > 0 ? 2 : 1)
            for (int row = first + warp * kRows + lane / kLanes; row < end; row += kWarps * kRows) { // few rows at a time: registers
                // Which two rows go into product g: u and u, u and h, h and h.
                const Four<T> ui = kTogether == 3 || begin < 2 ? point.of_u(row, i0) : Four<T>{};
                const Four<T> hi = kTogether == 3 || begin == 2 ? row_of_h(row, i0) : Four<T>{};
#pragma unroll
                for (int g = 0; g < B / 4; ++g) {
                    const Four<T> uj = kTogether == 3 || begin == 0 ? point.of_u(row, j0 + 4 * g) : Four<T>{};
                    const Four<T> hj = kTogether == 3 || begin > 0 ? row_of_h(row, j0 + 4 * g) : Four<T>{};
#pragma unroll
                    for (int i = 0; i < 4; ++i)
#pragma unroll
                        for (int j = 0; j < 4; ++j) {
                            if constexpr (kTogether == 3) {
                                d[0][i][4 * g + j] = fma(ui.x[i], uj.x[j], d[0][i][4 * g + j]);
                                d[1][i][4 * g + j] = fma(ui.x[i], hj.x[j], d[1][i][4 * g + j]);
                                d[2][i][4 * g + j] = fma(hi.x[i], hj.x[j], d[2][i][4 * g + j]);
                            } else {
                                d[0][i][4 * g + j] = fma(begin == 2 ? hi.x[i] : ui.x[i], begin == 0 ? uj.x[j] : hj.x[j], d[0][i][4 * g + j]);
                            }
                        }
                }
            }
            // Lanes of a warp, then warps one after the other: always in the same order.
#pragma unroll
            for (int g = 0; g < kTogether; ++g) {
                if constexpr (kLanes < 32)
#pragma unroll
                    for (int i = 0; i < 4; ++i)
#pragma unroll
                        for (int j = 0; j < B; ++j)
#pragma unroll
                            for (int step = kLanes; step < 32; step *= 2) d[g][i][j] += __shfl_xor_sync(kWarp, d[g][i][j], step);
                if constexpr (kParts<T, K> > 0) { // all warps at once
                    T *mine = parts + (g * kWarps + warp) * K * K;
                    if (lane < kLanes)
#pragma unroll
                        for (int i = 0; i < 4; ++i)
#pragma unroll
                            for (int j = 0; j < B; ++j) mine[(i0 + i) * K + j0 + j] = d[g][i][j];
                } else {
                    double *to = begin + g == 0 ? shared.e : (begin + g == 1 ? shared.m : shared.b);
                    for (int w = 0; w < kWarps; ++w) {
                        if (w == warp && lane < kLanes)
#pragma unroll
                            for (int i = 0; i < 4; ++i)
#pragma unroll
                                for (int j = 0; j < B; ++j) to[(i0 + i) * ld + j0 + j] += double(d[g][i][j]);
                        __syncthreads();
                    }
                }
            }
            if constexpr (kParts<T, K> > 0) {
                __syncthreads();
                for (int e = int(threadIdx.x); e < kTogether * K * K; e += kThreads) {
                    const int g = e / (K * K), at = e % (K * K);
                    double *to = (begin + g == 0 ? shared.e : (begin + g == 1 ? shared.m : shared.b)) + at / K * ld + at % K;
                    double s = *to;
#pragma unroll
                    for (int w = 0; w < kWarps; ++w) s += double(parts[(g * kWarps + w) * K * K + at]);
                    *to = s;
                }
                __syncthreads();
            }
        }
    }
}

// out = U p + H q, and the buffer: what H was, or U p2 + H q2. Lanes of a row read all of it before one of them writes.
template <class T, int K, int Width> SUBSPAN_DEVICE void combine(const Point<T, Width> &point, const Coefficients<T, K> &w) {
    constexpr int kColumns = K / 4, kAtOnce = Width > 0 ? 2 : 1, kRows = kThreads / kColumns;
    const Arguments<T> &a = point.a;
    const int j0 = 4 * (int(threadIdx.x) % kColumns);
    // From the last row on: those have been read last, and may still be in the cache.
#pragma unroll 1
    for (int first = (point.n - 1) / (kAtOnce * kRows) * kAtOnce * kRows; first >= 0; first -= kAtOnce * kRows) {
        Four<T> v[kAtOnce]{}, moved[kAtOnce]{}, own[kAtOnce]{};
#pragma unroll
        for (int x = 0; x < kAtOnce; ++x) {
            const int row = first + x * kRows + int(threadIdx.x) / kColumns;
            if (row >= point.n) continue;
#pragma unroll(Width > 0 ? K / 4 : 1)
            for (int l = 0; l < point.k; l += 4) {
                const Four<T> u = point.of_u(row, l);
                const Four<T> h = point.of_h(row, l);
#pragma unroll
                for (int e = 0; e < 4; ++e) own[x].x[e] = l == j0 ? h.x[e] : own[x].x[e];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        v[x].x[e] = fma(u.x[i], w.p[(l + i) * K + j0 + e], fma(h.x[i], w.q[(l + i) * K + j0 + e], v[x].x[e]));
                    if (point.parallel())
#pragma unroll
                        for (int e = 0; e < 4; ++e)
                            moved[x].x[e] = fma(u.x[i], w.p2[(l + i) * K + j0 + e], fma(h.x[i], w.q2[(l + i) * K + j0 + e], moved[x].x[e]));
                }
            }
        }
        __syncwarp();
#pragma unroll
        for (int x = 0; x < kAtOnce; ++x) {
            const int row = first + x * kRows + int(threadIdx.x) / kColumns;
            if (row >= point.n) continue;
            point.put(point.out, point.target(), row, j0, v[x]);
#pragma unroll
            for (int e = 0; e < 4; ++e) own[x].x[e] = point.parallel() ? moved[x].x[e] : own[x].x[e];
            if (point.has_buffer()) point.put(point.buffer, a.buffer, row, j0, own[x]);
        }
        __syncwarp();
    }
    __syncthreads();
}

template <class T> SUBSPAN_DEVICE constexpr double eps_of() { return sizeof(T) == 4 ? 1.1920928955078125e-7 : 2.220446049250313e-16; }

// Two blocks a multiprocessor, one of which loads while the other computes, where registers are known to suffice.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int kBlocks = 2;
#else
constexpr int kBlocks = 1;
#endif

template <class T, int K, int Width>
__global__ void __launch_bounds__(kThreads, (Width > 0 ? kBlocks : 1)) grassmann_kernel(SUBSPAN_PARAMETER const Arguments<T> a) {
    using S = small::Small<K, kThreads>;
    constexpr int ld = S::ld;
    SUBSPAN_SHARED(memory);
    Shared<K> &sh = *reinterpret_cast<Shared<K> *>(memory);
    Coefficients<T, K> &w = *reinterpret_cast<Coefficients<T, K> *>(memory + sizeof(Shared<K>));
    T *parts = reinterpret_cast<T *>(memory + sizeof(Shared<K>) + coefficient_bytes<T>(K, Width == 0 && a.parallel));
    const Point<T, Width> point(a, blockIdx.x);
    const int k = point.k;
    const double eps = eps_of<T>(), t = a.t;
    products<T, K>(point, sh, parts, nullptr);
    double *scratch = sh.scratch;
    const double defect = S::largest(k, scratch, [&](int i, int j) { return sh.e[i * ld + j] - (i == j ? 1.0 : 0.0); });
    const double size = S::largest(k, scratch, [&](int i, int j) { return most(sh.b[i * ld + j], -sh.b[i * ld + j]) + sh.m[i * ld + j] * 0.0; });
    const double limit = sizeof(T) == 4 ? 3.4028234663852886e38 : 1.7976931348623157e308;
    const bool good = defect * k < 0.5 && size < limit && t * t * size < 1e100;
    if (!good) { // the point and its buffer stay as they were
        if (Width > 0 || a.job == step_in_place) return;
        const T nan = T(0) / T(0);
        for (int e = int(threadIdx.x); e < point.n * k; e += kThreads)
            point.out[(e / k) * a.out.row_stride + (e % k) * a.out.col_stride] = nan;
        return;
    }
    // What makes U orthonormal to second order or better; an orthonormal U stays what it is.
    const bool corrected = defect > 2.0 * eps;
    if (corrected) {
        if (defect < 0.1 * sqrt(eps)) {
            S::each(k, [&](int i, int j) { sh.f[i * ld + j] = (i == j ? 1.5 : 0.0) - 0.5 * sh.e[i * ld + j]; });
        } else {
            S::each(k, [&](int i, int j) { sh.x[i * ld + j] = sh.e[i * ld + j] - (i == j ? 1.0 : 0.0); });
            S::inverse_sqrt(k, scratch, sh.x, sh.f, sh.c, sh.s, sh.w);
        }
    } else {
        S::each(k, [&](int i, int j) { sh.f[i * ld + j] = i == j ? 1.0 : 0.0; });
    }
    // HᵀH - mᵀm is known to a few eps of what it is a difference of: a large part of H along U goes first, with what it was.
    const double along = S::largest(k, scratch, [&](int i, int j) {
        if (j != 0) return 0.0;
        double s = 0;
        for (int l = 0; l < k; ++l) s = fma(sh.m[l * ld + i], sh.m[l * ld + i], s);
        return s;
    });
    const bool aside = t * t * along > 1e-2 || along > 0.5 * size;
    if (aside) {
        S::template multiply<false>(k, sh.f, sh.m, sh.w); // F m
        S::template multiply<false>(k, sh.f, sh.w, sh.along); // U F F UᵀH
        S::each(k, [&](int i, int j) { w.p[i * K + j] = T(sh.along[i * ld + j]); });
        for (int e = int(threadIdx.x); e < K * K; e += kThreads)
            if (e / K >= k || e % K >= k) w.p[e] = T(0);
        __syncthreads();
        products<T, K>(point, sh, parts, w.p);
    }
    // m of the orthonormal basis, and the Gram matrix of H without its part along it.
    S::template multiply<true>(k, sh.f, sh.m, sh.w);
    S::each(k, [&](int i, int j) { sh.m[i * ld + j] = sh.w[i * ld + j]; });
    S::template multiply<true>(k, sh.m, sh.m, sh.w);
    S::each(k, [&](int i, int j) {
        sh.b[i * ld + j] -= sh.w[i * ld + j];
        sh.x[i * ld + j] = t * t * sh.b[i * ld + j];
    });
    const double norm = S::row_norm(k, scratch, sh.x);
    // c and s: the two functions of x that the curve is made of.
    if (Width == 0 && a.job == tangent_part) {
        S::each(k, [&](int i, int j) {
            sh.c[i * ld + j] = 0.0;
            sh.s[i * ld + j] = i == j ? 1.0 : 0.0;
        });
    } else if (a.method == Retraction::exp) {
        S::trigonometric(k, scratch, sh.x, sizeof(T) == 4 ? 1e-10 : 1e-19, sh.c, sh.s, sh.y, sh.w);
    } else if (a.method == Retraction::polar) {
        S::inverse_sqrt(k, scratch, sh.x, sh.c, sh.y, sh.z(), sh.w);
        S::each(k, [&](int i, int j) { sh.s[i * ld + j] = sh.c[i * ld + j]; });
    } else if (a.method == Retraction::cayley) {
        S::each(k, [&](int i, int j) { sh.y[i * ld + j] = 0.25 * sh.x[i * ld + j]; });
        S::inverse_cholesky(k, sh.y, sh.z(), sh.w);
        S::each(k, [&](int i, int j) { // R⁻¹ R⁻ᵀ
            double v = 0;
            for (int l = 0; l < k; ++l) v = fma(l < i ? 0.0 : sh.z()[i * ld + l], l < j ? 0.0 : sh.z()[j * ld + l], v);
            sh.s[i * ld + j] = v;
        });
        S::each(k, [&](int i, int j) { sh.c[i * ld + j] = 2.0 * sh.s[i * ld + j] - (i == j ? 1.0 : 0.0); });
    } else {
        S::inverse_cholesky(k, sh.x, sh.c, sh.w);
        S::each(k, [&](int i, int j) {
            const double v = j < i ? 0.0 : sh.c[i * ld + j];
            sh.c[i * ld + j] = sh.s[i * ld + j] = v;
        });
    }
    // out = Û c + t (H - Û m) s with Û = U F, where H has lost U y already if it was set aside.
    const double reach = Width == 0 && a.job == tangent_part ? 1.0 : t;
    S::template multiply<false>(k, sh.m, sh.s, sh.w);
    S::each(k, [&](int i, int j) { sh.z()[i * ld + j] = sh.c[i * ld + j] - reach * sh.w[i * ld + j]; });
    S::template multiply<false>(k, sh.f, sh.z(), sh.w);
    if (aside) S::template multiply<false>(k, sh.along, sh.s, sh.z());
    for (int e = int(threadIdx.x); e < K * K; e += kThreads) {
        const int i = e / K, j = e % K;
        const bool in = i < k && j < k;
        const double p = in ? sh.w[i * ld + j] - (aside ? reach * sh.z()[i * ld + j] : 0.0) : 0.0;
        w.p[e] = T(p);
        w.q[e] = in ? T(reach * sh.s[i * ld + j]) : T(0);
    }
    __syncthreads();
    if (point.parallel()) { // the velocity: -t Û A s - Û m c + H c
        S::template multiply<false>(k, sh.b, sh.s, sh.z());
        S::template multiply<false>(k, sh.m, sh.c, sh.w);
        S::each(k, [&](int i, int j) { sh.w[i * ld + j] = -t * sh.z()[i * ld + j] - sh.w[i * ld + j]; });
        S::template multiply<false>(k, sh.f, sh.w, sh.z());
        if (aside) S::template multiply<false>(k, sh.along, sh.c, sh.w);
        for (int e = int(threadIdx.x); e < K * K; e += kThreads) {
            const int i = e / K, j = e % K;
            const bool in = i < k && j < k;
            w.p2[e] = in ? T(sh.z()[i * ld + j] - (aside ? sh.w[i * ld + j] : 0.0)) : T(0);
            w.q2[e] = in ? T(sh.c[i * ld + j]) : T(0);
        }
        __syncthreads();
    }
    combine<T, K>(point, w);
    // A long step magnifies what rounding left of the Gram matrix: the result is made orthonormal once more.
    if ((Width == 0 && a.job == tangent_part) || !(norm > 1.0)) return;
    const Point<T, 0> moved = point.moved(blockIdx.x);
    for (int pass = 0; pass < 2; ++pass) {
        products<T, K>(moved, sh, parts, nullptr, 1);
        S::each(k, [&](int i, int j) { sh.x[i * ld + j] = sh.e[i * ld + j] - (i == j ? 1.0 : 0.0); });
        const double off = S::largest(k, scratch, [&](int i, int j) { return sh.x[i * ld + j]; });
        if (!(off > 2.0 * eps)) return;
        S::inverse_sqrt(k, scratch, sh.x, sh.f, sh.c, sh.s, sh.w);
        for (int e = int(threadIdx.x); e < K * K; e += kThreads) {
            w.p[e] = e / K < k && e % K < k ? T(sh.f[(e / K) * ld + e % K]) : T(0);
            w.q[e] = T(0);
        }
        __syncthreads();
        combine<T, K>(moved, w);
    }
}

// -- host ------------------------------------------------------------------------------------------------------------------------

template <class T> void run(const Session &s, const Arguments<T> &a, int64_t items) {
    const auto go = [&](auto width, auto plain) {
        constexpr int K = decltype(width)::value, Width = decltype(plain)::value ? K : 0;
        const int64_t shared = int64_t(sizeof(Shared<K>)) + coefficient_bytes<T>(K, a.parallel) + kParts<T, K> * int64_t(sizeof(T));
        launch<grassmann_kernel<T, K, Width>>(s, "grassmann", Shape{dim3(unsigned(items)), dim3(kThreads), shared}, a);
    };
    constexpr std::false_type any{};
    if constexpr (sizeof(T) == 4)
        if (a.u.cols == 8 && a.vectors && a.u.row_stride == 8 && a.grad.row_stride == 8 && a.has_buffer && a.buffer.row_stride == 8 && !a.parallel &&
            a.job == step_in_place && a.u.rows < (int64_t(1) << 28))
            return go(std::integral_constant<int, 8>{}, std::true_type{});
    if (a.u.cols <= 8)
        go(std::integral_constant<int, 8>{}, any);
    else if (a.u.cols <= 16)
        go(std::integral_constant<int, 16>{}, any);
    else
        go(std::integral_constant<int, 32>{}, any);
}

template <class T> Arguments<T> arguments(const Stack &u, const Stack &h, double t, Job job, Retraction method) {
    Arguments<T> a{};
    a.u = Matrices<T>(u);
    a.grad = Matrices<const T>(h);
    a.vectors = in_vectors(u) && in_vectors(h);
    a.t = t;
    a.job = job;
    a.method = method;
    return a;
}

} // namespace

void sgd_step(const Context &context, const Stack &u, const Stack &grad, const Stack *buffer, const SgdOptions &o) {
    check_points(u);
    check_pair(u, grad, "grad");
    if (buffer != nullptr) check_pair(u, *buffer, "buffer");
    if (o.parallel && o.retraction != Retraction::exp) throw ValueError("transport 'parallel' goes along geodesics: it needs retraction 'exp'");
    if (!std::isfinite(o.lr)) throw ValueError("lr must be finite");
    const Session s(context);
    if (u.size() == 0 || u.rows == 0 || u.cols == 0) return;
    dispatch_wide(u.dtype, [&](auto tag) {
        using T = decltype(tag);
        Arguments<T> a = arguments<T>(u, grad, -o.lr, step_in_place, o.retraction);
        a.has_buffer = buffer != nullptr;
        if (a.has_buffer) {
            a.buffer = Matrices<T>(*buffer);
            a.vectors = a.vectors && in_vectors(*buffer);
        }
        a.parallel = o.parallel && a.has_buffer;
        a.momentum = T(o.momentum);
        a.weight = T(o.weight);
        run(s, a, u.size());
    });
}

namespace {

void pure(const Context &context, const Stack &u, const Stack &h, double t, Job job, Retraction method, const Stack &out, const char *name) {
    check_points(u);
    check_pair(u, h, name);
    check_pair(u, out, "out");
    if (!std::isfinite(t)) throw ValueError("t must be finite");
    const Session s(context);
    if (u.size() == 0 || u.rows == 0 || u.cols == 0) return;
    dispatch_wide(u.dtype, [&](auto tag) {
        using T = decltype(tag);
        Arguments<T> a = arguments<T>(u, h, t, job, method);
        a.out = Matrices<T>(out);
        a.vectors = a.vectors && in_vectors(out);
        run(s, a, u.size());
    });
}

} // namespace

void retract(const Context &context, const Stack &u, const Stack &h, double t, Retraction method, const Stack &out) {
    pure(context, u, h, t, retraction, method, out, "H");
}

void tangent(const Context &context, const Stack &u, const Stack &g, const Stack &out) {
    pure(context, u, g, 1.0, tangent_part, Retraction::exp, out, "G");
}

} // namespace subspan::cuda
