// Sweeps over a point and what moves it, a block a point: three Gram matrices, and linear combinations of their columns.
#pragma once

#include "grassmann/points.cuh"
#include "linalg/small_dense.cuh"

namespace subspan::cuda::sweeps {

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
    const double *scales = nullptr; // of a step: what t is times, for each point
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
        : a(a), u(a.u.at(item)), buffer(Width > 0 || a.has_buffer ? a.buffer.at(item) : nullptr), out(Width > 0 || a.job == step_in_place ? u : a.out.at(item)),
          grad(a.grad.at(item)), row_stride(a.u.row_stride), col_stride(a.u.col_stride), n(int(a.u.rows)), k(Width > 0 ? Width : int(a.u.cols)) {}
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
                    for (int e = 0; e < 4; ++e) v[x].x[e] = fma(u.x[i], w.p[(l + i) * K + j0 + e], fma(h.x[i], w.q[(l + i) * K + j0 + e], v[x].x[e]));
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

} // namespace subspan::cuda::sweeps
