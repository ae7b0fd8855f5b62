#include "subspan/cuda/apply_core.hpp"

#include "apply_core_wide.cuh"
#include "int4.cuh"
#include "subspan/cuda/launch.cuh"

#include <algorithm>
#include <limits>

namespace subspan::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kBlock = 32; // kBlock: columns of V at a time
constexpr int kGroup = 160;                                        // matrices of a grouped launch

template <class T> constexpr bool kTensor = sizeof(T) == 2;
template <class T> constexpr bool kShort = false; // a range that sums leave
template <> constexpr bool kShort<F16> = true;
template <class T> constexpr int kPanel = kTensor<T> ? 32 : 16;
template <class T> constexpr int kItems = 16 / int(sizeof(T)); // of a vector

// One matrix, seen so that sums run along i (m of them) and panels along j (n): C itself for the left form, its transpose for
// the right one.
template <class T> struct Job {
    const T *x, *source, *v;
    T *out;
    const Accumulate<T> *core;
    int m, n, k;
    int64_t xi, xj, si, sj, oi, oj, vi, va, ma, mb;
    Int4View<Accumulate<T>> packed; // instead of v
};

// Items [a, a + N) of row i of a packed V, zero past k. `whole`: N items have one scale, and their bytes one address that is a multiple of
// N / 2: k, the group and the first byte allow it.
template <int N, class T> SUBSPAN_DEVICE void unpacked(const Job<T> &job, int i, int a, bool whole, Accumulate<T> (&v)[N]) {
    using A = Accumulate<T>;
    const int64_t e = int64_t(i) * job.k + a;
    if (whole && i < job.m && a + N <= job.k) {
        uint32_t codes;
        if constexpr (N == 8)
            codes = *reinterpret_cast<const uint32_t *>(job.packed.codes + e / 2);
        else
            codes = *reinterpret_cast<const uint16_t *>(job.packed.codes + e / 2);
        const int64_t g = e / job.packed.group;
        const A scale = job.packed.scale[g], zero = job.packed.zero[g];
#pragma unroll
        for (int x = 0; x < N; ++x) v[x] = scale * (A(int((codes >> (4 * x)) & 15u)) - zero);
        return;
    }
#pragma unroll
    for (int x = 0; x < N; ++x) v[x] = i < job.m && a + x < job.k ? job.packed.at(e + x) : A(0);
}

template <class T> struct Plan {
    int rows;   // of a block
    int blocks; // that share a panel
    int kind;
    bool vector_x, vector_v, vector_out, vector_source;
    Accumulate<T> value, alpha;
    enum Mode { resident, partial, finish } mode;
    Accumulate<T> *sums; // of partial and finish: for each panel and block k x panel
};

// Where the matrix of a panel comes from: a stack of one shape, or a group of several.
template <class T, bool Packed = false> struct OfStack {
    static constexpr bool packed = Packed;
    Matrices<const T> x, source, v;
    Matrices<T> out;
    Matrices<const Accumulate<T>> core;
    Job<T> shape; // strides and sizes
    int panels;   // of one matrix
    SUBSPAN_DEVICE Job<T> find(unsigned panel, int &column) const {
        const unsigned item = panel / unsigned(panels);
        column = int(panel - item * unsigned(panels)) * kPanel<T>;
        Job<T> j = shape;
        j.x = x.at(item);
        j.v = v.at(item);
        j.out = out.at(item);
        if (j.core != nullptr) j.core = core.at(item);
        if (j.source != nullptr) j.source = source.at(item);
        return j;
    }
};
template <class T> struct OfGroup {
    static constexpr bool packed = false;
    int count;
    int first[kGroup + 1]; // panels before each matrix
    Job<T> jobs[kGroup];
    SUBSPAN_DEVICE Job<T> find(unsigned panel, int &column) const {
        int low = 0, high = count;
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            (int(panel) < first[middle] ? high : low) = middle;
        }
        column = (int(panel) - first[low]) * kPanel<T>;
        return jobs[low];
    }
};

static_assert(sizeof(OfGroup<double>) + sizeof(Plan<double>) < 32764, "more than the parameters of a kernel may take");

// -- the tile: `rows` times a panel of X in shared memory ----------------------------------------------------------------------
// Tensor cores read it by rows or by columns, whichever are contiguous in memory; wider types keep it by rows.
template <class T, bool Across> struct Tile {
    static constexpr bool by_rows = Across || !kTensor<T>;
    static constexpr int P = kPanel<T>;
    static constexpr int kPitch = kTensor<T> ? P + 8 : (Across ? P + 4 : P + 1); // of a row, if by rows
    T *data;
    int rows, pitch;
    SUBSPAN_SHARED_CODE static int pitch_of(int rows) { return by_rows ? kPitch : rows + 8; }
    SUBSPAN_SHARED_CODE static int64_t bytes(int rows) { return int64_t(by_rows ? rows : P) * pitch_of(rows) * int64_t(sizeof(T)); }
    SUBSPAN_DEVICE T *at(int i, int j) const { return data + (by_rows ? i * pitch + j : j * pitch + i); }

    // From memory, zero past m and n. Ends with a barrier.
    SUBSPAN_DEVICE void load(const T *x, int64_t xi, int64_t xj, int i0, int j0, int m, int n, bool vectors) {
        const int tid = int(threadIdx.x), have_i = most(0, least(rows, m - i0)), have_j = most(0, least(P, n - j0));
        if constexpr (by_rows == Across) {
            if (vectors) {
                const int lines = Across ? rows : P, chunks = Across ? P / kItems<T> : rows / kItems<T>;
                for (int c = tid; c < lines * chunks; c += kThreads) {
                    const int line = c / chunks, at0 = (c - line * chunks) * kItems<T>;
                    const int i = Across ? line : at0, j = Across ? at0 : line;
                    int filled = Across ? (i < have_i ? least(kItems<T>, have_j - j) : 0) : (j < have_j ? least(kItems<T>, have_i - i) : 0);
                    filled = most(filled, 0);
                    const T *from = filled > 0 ? x + (i0 + i) * xi + (j0 + j) * xj : x;
                    copy_async(at(i, j), from, filled * int(sizeof(T)));
                }
                commit_copies();
                wait_copies<0>();
                __syncthreads();
                return;
            }
        }
        for (int e = tid; e < rows * P; e += kThreads) {
            const int i = Across ? e / P : e % rows, j = Across ? e % P : e / rows;
            T value{};
            if (i < have_i && j < have_j) value = x[(i0 + i) * xi + (j0 + j) * xj];
            *at(i, j) = value;
        }
        __syncthreads();
    }
    // The way back, after a barrier.
    SUBSPAN_DEVICE void store(T *x, int64_t xi, int64_t xj, int i0, int j0, int m, int n, bool vectors) const {
        const int tid = int(threadIdx.x), have_i = most(0, least(rows, m - i0)), have_j = most(0, least(P, n - j0));
        if constexpr (by_rows == Across) {
            if (vectors && (Across ? have_j : have_i) % kItems<T> == 0) {
                const int lines = Across ? have_i : have_j, chunks = (Across ? have_j : have_i) / kItems<T>;
                for (int c = tid; c < lines * chunks; c += kThreads) {
                    const int line = c / chunks, at0 = (c - line * chunks) * kItems<T>;
                    const int i = Across ? line : at0, j = Across ? at0 : line;
                    *reinterpret_cast<uint4 *>(x + (i0 + i) * xi + (j0 + j) * xj) = *reinterpret_cast<const uint4 *>(at(i, j));
                }
                return;
            }
        }
        for (int e = tid; e < rows * P; e += kThreads) {
            const int i = Across ? e / P : e % rows, j = Across ? e % P : e / rows;
            if (i < have_i && j < have_j) x[(i0 + i) * xi + (j0 + j) * xj] = *at(i, j);
        }
    }
};

// -- products of a block ---------------------------------------------------------------------------------------------------
template <class T, bool Across, bool Packed = false> struct Products;

// Tensor cores: 16 rows of V at a time, a copy of each warp's own.
template <class T, bool Across, bool Packed>
    requires(kTensor<T>)
struct Products<T, Across, Packed> {
    using A = float;
    static constexpr int P = kPanel<T>, kStage = kBlock + 8, kSmall = P + 8;
    static constexpr int64_t stage_bytes = int64_t(kWarps) * 16 * kStage * 2;
    static constexpr int64_t core_bytes(int k32) { return int64_t(k32) * kSmall * 2 * 2; } // the small product in two parts

    // V[i0 + 0..15][a0 + 0..31], zero outside.
    static SUBSPAN_DEVICE T *stage(const Job<T> &job, unsigned char *memory, int i0, int a0, bool vectors) {
        const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
        T *s = reinterpret_cast<T *>(memory) + warp * 16 * kStage;
        __syncwarp();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int c = lane + 32 * half, i = c / 4, a = (c % 4) * 8;
            if constexpr (Packed) {
                float v[8];
                unpacked<8>(job, i0 + i, a0 + a, vectors, v);
                uint4 four;
                four.x = pack<T>(v[0], v[1]);
                four.y = pack<T>(v[2], v[3]);
                four.z = pack<T>(v[4], v[5]);
                four.w = pack<T>(v[6], v[7]);
                *reinterpret_cast<uint4 *>(s + i * kStage + a) = four;
                continue;
            }
            const T *from = job.v + int64_t(i0 + i) * job.vi + int64_t(a0 + a) * job.va;
            if (vectors && i0 + i < job.m && a0 + a + 8 <= job.k) {
                *reinterpret_cast<uint4 *>(s + i * kStage + a) = *reinterpret_cast<const uint4 *>(from);
            } else {
                for (int e = 0; e < 8; ++e) {
                    T value{};
                    if (i0 + i < job.m && a0 + a + e < job.k) value = from[e * job.va];
                    s[i * kStage + a + e] = value;
                }
            }
        }
        __syncwarp();
        return s;
    }

    // sums[a0 + a][j] (+)= sign Σ_i V[i][a] X[i][j] over the block's rows, all warps together. `scratch`: kWarps/2 x 32 x P.
    static SUBSPAN_DEVICE void inner(const Job<T> &job, const Tile<T, Across> &tile, unsigned char *memory, float *scratch, int i0,
                                     int a0, float sign, bool add, bool vectors, float *sums) {
        const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, r = lane % 8, q = lane / 8;
        float d[2][4][4];
#pragma unroll
        for (int x = 0; x < 2; ++x)
#pragma unroll
            for (int y = 0; y < 4; ++y)
#pragma unroll
                for (int e = 0; e < 4; ++e) d[x][y][e] = 0.0f;
        for (int i = 16 * warp; i < tile.rows && i0 + i < job.m; i += 16 * kWarps) {
            const T *v = stage(job, memory, i0 + i, a0, vectors);
            uint32_t left[2][4], right[2][4];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                if (Across) { // (a, i) times (i, j)
                    load_matrices<true>(left[h], v + (r + 8 * (q / 2)) * kStage + 8 * (q % 2) + 16 * h);
                    load_matrices<true>(right[h], tile.at(i + r + 8 * (q % 2), 8 * (q / 2) + 16 * h));
                } else { // (j, i) times (i, a)
                    load_matrices<false>(left[h], tile.at(i + 8 * (q / 2), r + 8 * (q % 2) + 16 * h));
                    load_matrices<true>(right[h], v + (r + 8 * (q % 2)) * kStage + 8 * (q / 2) + 16 * h);
                }
            }
#pragma unroll
            for (int x = 0; x < 2; ++x)
#pragma unroll
                for (int y = 0; y < 4; ++y) multiply_add<T>(d[x][y], left[x], right[y / 2][2 * (y % 2)], right[y / 2][2 * (y % 2) + 1]);
        }
        const auto place = [&](int x, int y, int e) { // of d[x][y][e] in (a, j)
            const int row = 16 * x + lane / 4 + 8 * (e / 2), col = 8 * y + 2 * (lane % 4) + e % 2;
            return Across ? row * P + col : col * P + row;
        };
        for (int step = kWarps / 2; step > 0; step /= 2) {
            if (warp >= step && warp < 2 * step)
#pragma unroll
                for (int x = 0; x < 2; ++x)
#pragma unroll
                    for (int y = 0; y < 4; ++y)
#pragma unroll
                        for (int e = 0; e < 4; ++e) scratch[(warp - step) * kBlock * P + place(x, y, e)] = d[x][y][e];
            __syncthreads();
            if (warp < step)
#pragma unroll
                for (int x = 0; x < 2; ++x)
#pragma unroll
                    for (int y = 0; y < 4; ++y)
#pragma unroll
                        for (int e = 0; e < 4; ++e) d[x][y][e] += scratch[warp * kBlock * P + place(x, y, e)];
            __syncthreads();
        }
        if (warp == 0)
#pragma unroll
            for (int x = 0; x < 2; ++x)
#pragma unroll
                for (int y = 0; y < 4; ++y)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        float *s = sums + a0 * P + place(x, y, e);
                        *s = (add ? *s : 0.0f) + sign * d[x][y][e];
                    }
    }

    // The small product y as high + low.
    static SUBSPAN_DEVICE void keep(unsigned char *memory, int k32, int a, int j, float y) {
        T *high = reinterpret_cast<T *>(memory), *low = high + k32 * kSmall;
        const T top = narrow<T>(y);
        high[a * kSmall + j] = top;
        low[a * kSmall + j] = narrow<T>(y - widen(top));
    }

    // X = alpha X + V y in place.
    static SUBSPAN_DEVICE void outer(const Job<T> &job, const Tile<T, Across> &tile, unsigned char *memory, const unsigned char *small,
                                     int k32, int i0, float alpha, float lift, bool vectors) {
        const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, r = lane % 8, q = lane / 8;
        const T *parts[2] = {reinterpret_cast<const T *>(small), reinterpret_cast<const T *>(small) + k32 * kSmall};
        for (int i = 16 * warp; i < tile.rows && i0 + i < job.m; i += 16 * kWarps) {
            float d[4][4]; // across: 16 i x 32 j; else 32 j x 16 i
#pragma unroll
            for (int y = 0; y < 4; ++y)
#pragma unroll
                for (int e = 0; e < 4; ++e) d[y][e] = 0.0f;
            for (int a0 = 0; a0 < k32; a0 += kBlock) {
                const T *v = stage(job, memory, i0 + i, a0, vectors);
#pragma unroll
                for (int h = 0; h < 2; ++h) { // 16 columns of V at a time
                    uint32_t f[4];
                    if (Across)
                        load_matrices<false>(f, v + (r + 8 * (q % 2)) * kStage + 8 * (q / 2) + 16 * h);
                    else
                        load_matrices<false>(f, v + (r + 8 * (q / 2)) * kStage + 8 * (q % 2) + 16 * h);
#pragma unroll
                    for (int part = 0; part < 2; ++part) {
                        const T *y = parts[part] + (a0 + 16 * h) * kSmall;
#pragma unroll
                        for (int g = 0; g < 2; ++g) { // 16 columns of the panel at a time
                            uint32_t u[4];
                            if (Across) {
                                load_matrices<true>(u, y + (r + 8 * (q % 2)) * kSmall + 8 * (q / 2) + 16 * g);
                                multiply_add<T>(d[2 * g], f, u[0], u[1]);
                                multiply_add<T>(d[2 * g + 1], f, u[2], u[3]);
                            } else {
                                load_matrices<true>(u, y + (r + 8 * (q / 2)) * kSmall + 8 * (q % 2) + 16 * g);
                                multiply_add<T>(d[2 * g], u, f[0], f[1]);
                                multiply_add<T>(d[2 * g + 1], u, f[2], f[3]);
                            }
                        }
                    }
                }
            }
#pragma unroll
            for (int y = 0; y < 4; ++y)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int row = lane / 4 + 8 * half, pair = 2 * (lane % 4);
                    T *x = Across ? tile.at(i + row, 8 * y + pair) : tile.at(i + 8 * (y % 2) + pair, 16 * (y / 2) + row);
                    auto *word = reinterpret_cast<uint32_t *>(x);
                    float low = lift * d[y][2 * half], high = lift * d[y][2 * half + 1];
                    if (alpha != 0.0f) {
                        low += alpha * low_of<T>(*word);
                        high += alpha * high_of<T>(*word);
                    }
                    *word = pack<T>(low, high);
                }
        }
    }
};

// Plain arithmetic: blocks of 4 x 4 in registers.
template <class T, bool Across, bool Packed>
    requires(!kTensor<T>)
struct Products<T, Across, Packed> {
    using A = T;
    static constexpr int P = kPanel<T>;
    static constexpr int64_t stage_bytes = 0;
    static constexpr int64_t core_bytes(int k32) { return int64_t(k32) * P * int64_t(sizeof(T)); }

    // Four of V's columns in row i, zero outside.
    static SUBSPAN_DEVICE void row_of_v(const Job<T> &job, int i, int a, bool vectors, T (&v)[4]) {
        if constexpr (Packed) return unpacked<4>(job, i, a, vectors, v);
        const T *p = job.v + int64_t(i) * job.vi + int64_t(a) * job.va;
        if constexpr (sizeof(T) == 4) {
            if (vectors && i < job.m && a + 4 <= job.k) {
                const float4 w = *reinterpret_cast<const float4 *>(p);
                v[0] = w.x;
                v[1] = w.y;
                v[2] = w.z;
                v[3] = w.w;
                return;
            }
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) v[e] = i < job.m && a + e < job.k ? p[e * job.va] : T(0);
    }

    static SUBSPAN_DEVICE void inner(const Job<T> &job, const Tile<T, Across> &tile, unsigned char *, T *scratch, int i0, int a0,
                                     T sign, bool add, bool vectors, T *sums) {
        const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, a = 4 * (lane / 4), j = 4 * (lane % 4);
        T d[4][4];
#pragma unroll
        for (int x = 0; x < 4; ++x)
#pragma unroll
            for (int y = 0; y < 4; ++y) d[x][y] = T(0);
#pragma unroll 2
        for (int i = warp; i < tile.rows; i += kWarps) {
            T v[4], x[4];
            row_of_v(job, i0 + i, a0 + a, vectors, v);
#pragma unroll
            for (int y = 0; y < 4; ++y) x[y] = *tile.at(i, j + y);
#pragma unroll
            for (int s = 0; s < 4; ++s)
#pragma unroll
                for (int y = 0; y < 4; ++y) d[s][y] = fma(v[s], x[y], d[s][y]);
        }
        for (int step = kWarps / 2; step > 0; step /= 2) {
            T *mine = scratch + (warp % step) * kBlock * P;
            if (warp >= step && warp < 2 * step)
#pragma unroll
                for (int s = 0; s < 4; ++s)
#pragma unroll
                    for (int y = 0; y < 4; ++y) mine[(a + s) * P + j + y] = d[s][y];
            __syncthreads();
            if (warp < step)
#pragma unroll
                for (int s = 0; s < 4; ++s)
#pragma unroll
                    for (int y = 0; y < 4; ++y) d[s][y] += mine[(a + s) * P + j + y];
            __syncthreads();
        }
        if (warp == 0)
#pragma unroll
            for (int s = 0; s < 4; ++s)
#pragma unroll
                for (int y = 0; y < 4; ++y) {
                    T *to = sums + (a0 + a + s) * P + j + y;
                    *to = (add ? *to : T(0)) + sign * d[s][y];
                }
    }

    static SUBSPAN_DEVICE void keep(unsigned char *memory, int, int a, int j, T y) { reinterpret_cast<T *>(memory)[a * P + j] = y; }

    static SUBSPAN_DEVICE void outer(const Job<T> &job, const Tile<T, Across> &tile, unsigned char *, const unsigned char *small, int k32,
                                     int i0, T alpha, T, bool vectors) {
        const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, j = 4 * (lane % 4);
        const T *y = reinterpret_cast<const T *>(small);
        for (int first = 32 * warp; first < tile.rows; first += 32 * kWarps) {
            const int i = first + 4 * (lane / 4);
            T d[4][4];
#pragma unroll
            for (int s = 0; s < 4; ++s)
#pragma unroll
                for (int e = 0; e < 4; ++e) d[s][e] = T(0);
#pragma unroll 1
            for (int a = 0; a < k32; a += 4) {
                T v[4][4];
#pragma unroll
                for (int s = 0; s < 4; ++s) row_of_v(job, i0 + i + s, a, vectors, v[s]);
#pragma unroll
                for (int b = 0; b < 4; ++b) {
                    T w[4];
#pragma unroll
                    for (int e = 0; e < 4; ++e) w[e] = y[(a + b) * P + j + e];
#pragma unroll
                    for (int s = 0; s < 4; ++s)
#pragma unroll
                        for (int e = 0; e < 4; ++e) d[s][e] = fma(v[s][b], w[e], d[s][e]);
                }
            }
#pragma unroll
            for (int s = 0; s < 4; ++s) {
                if (i + s >= tile.rows) break;
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    T *x = tile.at(i + s, j + e);
                    *x = alpha == T(0) ? d[s][e] : fma(alpha, *x, d[s][e]);
                }
            }
        }
    }
};

template <class T> constexpr int64_t kScratchBytes = int64_t(kWarps / 2) * kBlock * kPanel<T> * int64_t(sizeof(Accumulate<T>));

template <class T, bool Across> int64_t shared_bytes(int rows, int k32) {
    const int64_t sums = int64_t(k32) * kPanel<T> * int64_t(sizeof(Accumulate<T>));
    return Tile<T, Across>::bytes(rows) + Products<T, Across>::stage_bytes + kScratchBytes<T> + 2 * sums + Products<T, Across>::core_bytes(k32);
}

template <class T, bool Across, class From>
__global__ void __launch_bounds__(kThreads, 2) apply_core_kernel(const From from, const Plan<T> plan) {
    using A = Accumulate<T>;
    using Work = Products<T, Across, From::packed>;
    constexpr int P = kPanel<T>;
    SUBSPAN_SHARED(memory);
    int j0 = 0;
    const unsigned block = blockIdx.x % unsigned(plan.blocks);
    const unsigned panel = blockIdx.x / unsigned(plan.blocks);
    const Job<T> job = from.find(panel, j0);
    const int tid = int(threadIdx.x), k = job.k, k32 = divide_up(k, kBlock) * kBlock, i0 = int(block) * plan.rows;
    Tile<T, Across> tile{reinterpret_cast<T *>(memory), plan.rows, Tile<T, Across>::pitch_of(plan.rows)};
    unsigned char *next = memory + Tile<T, Across>::bytes(plan.rows);
    unsigned char *stage = next;
    next += Work::stage_bytes;
    A *scratch = reinterpret_cast<A *>(next);
    next += kScratchBytes<T>;
    A *mine = reinterpret_cast<A *>(next), *sums = mine + k32 * P; // this block's part of VᵀX, and all of it
    next += 2 * int64_t(k32) * P * int64_t(sizeof(A));
    unsigned char *small = next;

    if (plan.mode != Plan<T>::finish) {
        if (job.source != nullptr) {
            tile.load(job.source, job.si, job.sj, i0, j0, job.m, job.n, plan.vector_source);
            for (int a0 = 0; a0 < k32; a0 += kBlock) Work::inner(job, tile, stage, scratch, i0, a0, A(1), false, plan.vector_v, mine);
            __syncthreads();
        }
        tile.load(job.x, job.xi, job.xj, i0, j0, job.m, job.n, plan.vector_x);
        const bool change = job.source != nullptr;
        for (int a0 = 0; a0 < k32; a0 += kBlock)
            Work::inner(job, tile, stage, scratch, i0, a0, change ? A(-1) : A(1), change, plan.vector_v, mine);
        __syncthreads();
    } else {
        tile.load(job.x, job.xi, job.xj, i0, j0, job.m, job.n, plan.vector_x);
    }
    if (plan.mode == Plan<T>::partial) {
        A *to = plan.sums + (int64_t(panel) * plan.blocks + block) * k * P;
        for (int e = tid; e < k * P; e += kThreads) to[e] = mine[e];
        return;
    }
    if (plan.mode == Plan<T>::finish) {
        const A *parts = plan.sums + int64_t(panel) * plan.blocks * k * P;
        for (int e = tid; e < k * P; e += kThreads) {
            A sum = parts[e];
            for (int b = 1; b < plan.blocks; ++b) sum += parts[int64_t(b) * k * P + e];
            sums[e] = sum;
        }
    } else {
        // Each block adds the parts of all in the same order.
        if (plan.blocks > 1) cluster_barrier();
        for (int e = tid; e < k * P; e += kThreads) {
            A sum = plan.blocks > 1 ? of_block(mine, 0)[e] : mine[e];
            for (int b = 1; b < plan.blocks; ++b) sum += of_block(mine, unsigned(b))[e];
            sums[e] = sum;
        }
        if (plan.blocks > 1) cluster_barrier();
    }
    __syncthreads();
    for (int e = tid; e < k32 * P; e += kThreads) {
        const int a = e / P, j = e - a * P;
        A y = A(0);
        if (a < k) {
            if (plan.kind == CoreOptions::scalar) {
                y = plan.value * sums[e];
            } else if (plan.kind == CoreOptions::diagonal) {
                y = job.core[a * job.ma] * sums[e];
            } else {
                for (int b = 0; b < k; ++b) y = fma(job.core[a * job.ma + b * job.mb], sums[b * P + j], y);
            }
        }
        if constexpr (kShort<T>)
            mine[e] = y;
        else
            Work::keep(small, k32, a, j, y);
    }
    A lift = A(1);
    if constexpr (kShort<T>) {
        // float16 ends at 65504: a panel whose small product comes near that is scaled by a power of two.
        float top = 0;
        for (int e = tid; e < k32 * P; e += kThreads) top = most(top, mine[e] < 0 ? -mine[e] : mine[e]);
        top = warp_most(top);
        if (tid % 32 == 0) scratch[tid / 32] = top;
        __syncthreads();
        for (int w = 0; w < kWarps; ++w) top = most(top, scratch[w]);
        const int e2 = int((float_to_bits(top) >> 23) & 255u) - 127 - 13;
        const bool large = e2 > 0 && e2 < 100;
        const float down = large ? bits_to_float(uint32_t(127 - e2) << 23) : 1.0f;
        lift = large ? bits_to_float(uint32_t(127 + e2) << 23) : 1.0f;
        for (int e = tid; e < k32 * P; e += kThreads) Work::keep(small, k32, e / P, e % P, mine[e] * down);
    }
    __syncthreads();
    Work::outer(job, tile, stage, small, k32, i0, plan.alpha, lift, plan.vector_v);
    __syncthreads();
    tile.store(job.out, job.oi, job.oj, i0, j0, job.m, job.n, plan.vector_out);
}

// -- host ------------------------------------------------------------------------------------------------------------------

// Left, or the right form turned over.
CoreCall turned(const CoreCall &call, const CoreOptions &o, Stack &core, Stack &source) {
    CoreCall t = call;
    if (call.core != nullptr) {
        core = *call.core;
        t.core = &core;
    }
    if (call.source != nullptr) {
        source = *call.source;
        t.source = &source;
    }
    if (o.left) return t;
    t.c = call.c.transposed();
    t.out = call.out.transposed();
    if (call.core != nullptr && o.kind == CoreOptions::full) core = call.core->transposed();
    if (call.source != nullptr) source = call.source->transposed();
    return t;
}

std::string text(const Stack &s) { return std::to_string(s.rows) + " x " + std::to_string(s.cols); }

void check_call(const CoreCall &call, const CoreOptions &o) {
    const Stack &c = call.c, &v = call.v;
    const std::int64_t along = o.left ? c.rows : c.cols;
    if (v.rows != along)
        throw ValueError("V must have " + std::to_string(along) + " rows to act on C " + text(c) + " from the " + (o.left ? "left" : "right") +
                         ", got " + std::to_string(v.rows));
    if (call.out.rows != c.rows || call.out.cols != c.cols) throw ValueError("out must have the shape of C, " + text(c) + ", got " + text(call.out));
    if (call.source != nullptr && (call.source->rows != c.rows || call.source->cols != c.cols))
        throw ValueError("source must have the shape of C, " + text(c) + ", got " + text(*call.source));
    const DType wide = c.dtype == DType::f64 ? DType::f64 : DType::f32;
    if (o.kind != CoreOptions::scalar) {
        if (call.core == nullptr) throw ValueError("M is missing");
        const Stack &m = *call.core;
        const std::int64_t k = v.cols;
        if (o.kind == CoreOptions::full ? (m.rows != k || m.cols != k) : (m.cols != k))
            throw ValueError("M must have " + std::to_string(k) + (o.kind == CoreOptions::full ? " rows and columns" : " entries") + ", got " + text(m));
        if (m.dtype != wide) throw ValueError(std::string("M must be ") + name_of(wide) + " on the device, got " + name_of(m.dtype));
    }
    for (const Stack *s : {&v, &call.out, call.source != nullptr ? call.source : &v})
        if (s->dtype != c.dtype) throw ValueError(std::string("all arrays must be ") + name_of(c.dtype) + " as C is, got " + name_of(s->dtype));
    const std::int64_t top = std::numeric_limits<int>::max() / 64;
    if (c.rows > top || c.cols > top || v.cols > top) throw ValueError("C " + text(c) + " is too large for one call");
}

bool across(const Stack &c) { return c.col_stride == 1 || c.row_stride != 1; }

template <class T, bool Across> Plan<T> plan_of(const CoreCall &call, const CoreOptions &o, const Device &device) {
    Plan<T> p{};
    const int64_t m = call.c.rows, k32 = divide_up<int64_t>(call.v.cols, kBlock) * kBlock, unit = kTensor<T> ? 16 : 32;
    const auto rows_of = [&](int64_t blocks) { return int(divide_up(divide_up(m, blocks), unit) * unit); };
    const int widest = device.clusters ? 8 : 1;
    // Two blocks on a multiprocessor, so that one loads while the other computes; one where that is not to be had.
    const int64_t half = device.shared_limit / 2 - 2048;
    p.mode = Plan<T>::resident;
    for (const int64_t limit : {half, device.shared_limit}) {
        for (p.blocks = 1; p.blocks <= widest; p.blocks *= 2) {
            p.rows = rows_of(p.blocks);
            if (shared_bytes<T, Across>(p.rows, int(k32)) <= limit) break;
        }
        if (p.blocks <= widest) break;
    }
    if (p.blocks > widest) {
        p.mode = Plan<T>::partial;
        p.rows = 512;
        while (p.rows > 32 && shared_bytes<T, Across>(p.rows, int(k32)) > half) p.rows /= 2;
        p.blocks = int(divide_up<int64_t>(m, p.rows));
    }
    p.kind = o.kind;
    p.value = Accumulate<T>(o.value);
    p.alpha = Accumulate<T>(o.alpha);
    const auto lines = [](const Stack &s) { return Across ? in_vectors(s) : in_vectors(s.transposed()); };
    p.vector_x = lines(call.c);
    p.vector_out = lines(call.out);
    const int64_t items = kTensor<T> ? 8 : 4; // that a thread unpacks at a time
    p.vector_v = call.packed == nullptr ? in_vectors(call.v)
                                        : call.v.cols % items == 0 && call.packed->group % items == 0 &&
                                              reinterpret_cast<std::uintptr_t>(call.packed->codes) % std::uintptr_t(items / 2) == 0;
    p.vector_source = call.source != nullptr && lines(*call.source);
    return p;
}

template <class T> Job<T> job_of(const CoreCall &call, const CoreOptions &o) {
    Job<T> j{};
    j.x = static_cast<const T *>(call.c.data);
    j.v = static_cast<const T *>(call.v.data);
    j.out = static_cast<T *>(call.out.data);
    j.m = int(call.c.rows);
    j.n = int(call.c.cols);
    j.k = int(call.v.cols);
    j.xi = call.c.row_stride;
    j.xj = call.c.col_stride;
    j.oi = call.out.row_stride;
    j.oj = call.out.col_stride;
    j.vi = call.v.row_stride;
    j.va = call.v.col_stride;
    if (call.core != nullptr) {
        j.core = static_cast<const Accumulate<T> *>(call.core->data);
        j.ma = o.kind == CoreOptions::diagonal ? call.core->col_stride : call.core->row_stride;
        j.mb = call.core->col_stride;
    }
    if (call.packed != nullptr) j.packed = Int4View<Accumulate<T>>(*call.packed);
    if (call.source != nullptr) {
        j.source = static_cast<const T *>(call.source->data);
        j.si = call.source->row_stride;
        j.sj = call.source->col_stride;
    }
    return j;
}

template <class T, bool Across, bool Packed> void run(const Session &s, const Context &context, const CoreCall &call, const CoreOptions &o) {
    Plan<T> plan = plan_of<T, Across>(call, o, s.device());
    using From = OfStack<T, Packed>;
    From from{};
    from.shape = job_of<T>(call, o);
    from.x = Matrices<const T>(call.c);
    from.v = Matrices<const T>(call.v);
    from.out = Matrices<T>(call.out);
    if (call.core != nullptr) from.core = Matrices<const Accumulate<T>>(*call.core);
    if (call.source != nullptr) from.source = Matrices<const T>(*call.source);
    from.panels = int(divide_up<int64_t>(call.c.cols, kPanel<T>));
    const int64_t panels = from.panels * call.c.size(), grid = panels * plan.blocks;
    if (grid > std::numeric_limits<int>::max()) throw ValueError("C is too large for one call");
    const int k32 = int(divide_up<int64_t>(call.v.cols, kBlock) * kBlock);
    Shape shape{dim3(unsigned(grid)), dim3(kThreads), shared_bytes<T, Across>(plan.rows, k32), 1};
    constexpr auto name = "apply_core";
    if (plan.mode == Plan<T>::resident) {
        shape.cluster = plan.blocks;
        return launch<apply_core_kernel<T, Across, From>>(s, name, shape, from, plan);
    }
    plan.sums = Workspace(context).take<Accumulate<T>>(grid * call.v.cols * kPanel<T>);
    launch<apply_core_kernel<T, Across, From>>(s, name, shape, from, plan);
    plan.mode = Plan<T>::finish;
    launch<apply_core_kernel<T, Across, From>>(s, name, shape, from, plan);
}

// The plan of the tallest matrix serves all; vectors only where every one of them allows it.
template <class T> struct GroupPlan {
    Plan<T> plan{};
    int64_t k32 = 0;
};
template <class T, bool Across> GroupPlan<T> plan_group(const Session &s, const std::vector<CoreCall> &calls, const CoreOptions &o) {
    GroupPlan<T> group;
    if (calls.empty()) return group;
    Plan<T> &plan = group.plan;
    int64_t &k32 = group.k32, panels = 0;
    bool x = true, v = true, out = true;
    for (const auto &c : calls) {
        const Plan<T> p = plan_of<T, Across>(c, o, s.device());
        if (p.mode != Plan<T>::resident) throw ValueError("C " + text(c.c) + " does not fit the shared memory of a cluster; call apply_core for it");
        if (p.blocks > plan.blocks || (p.blocks == plan.blocks && p.rows > plan.rows)) plan = p;
        x = x && p.vector_x;
        v = v && p.vector_v;
        out = out && p.vector_out;
        k32 = std::max(k32, divide_up<int64_t>(c.v.cols, kBlock) * kBlock);
    }
    plan.vector_x = x;
    plan.vector_v = v;
    plan.vector_out = out;
    int64_t tall = 0;
    for (const auto &c : calls) tall = std::max(tall, c.c.rows);
    const int64_t unit = kTensor<T> ? 16 : 32;
    const int widest = s.device().clusters ? 8 : 1;
    for (;; plan.blocks *= 2) {
        plan.rows = int(divide_up(divide_up(tall, int64_t(plan.blocks)), unit) * unit);
        if (shared_bytes<T, Across>(plan.rows, int(k32)) <= s.device().shared_limit) break;
        if (plan.blocks >= widest) throw ValueError("the widest V and the tallest C of the group do not fit one launch together");
    }
    for (const auto &c : calls) panels += divide_up<int64_t>(c.c.cols, kPanel<T>);
    if (panels * plan.blocks > std::numeric_limits<int>::max()) throw ValueError("the group is too large for one launch");
    return group;
}

template <class T, bool Across> void run_group(const Session &s, const std::vector<CoreCall> &calls, const CoreOptions &o, const GroupPlan<T> &group) {
    const Plan<T> &plan = group.plan;
    const int k32 = int(group.k32);
    for (std::size_t first = 0; first < calls.size(); first += kGroup) {
        OfGroup<T> from{};
        from.count = int(std::min<std::size_t>(kGroup, calls.size() - first));
        int64_t panels = 0;
        for (int i = 0; i < from.count; ++i) {
            const auto &c = calls[first + std::size_t(i)];
            from.jobs[i] = job_of<T>(c, o);
            from.first[i] = int(panels);
            panels += divide_up<int64_t>(c.c.cols, kPanel<T>);
        }
        from.first[from.count] = int(panels);
        if (panels == 0) continue;
        const Shape shape{dim3(unsigned(panels * plan.blocks)), dim3(kThreads), shared_bytes<T, Across>(plan.rows, k32), plan.blocks};
        launch<apply_core_kernel<T, Across, OfGroup<T>>>(s, "apply_core (group)", shape, from, plan);
    }
}

// Whether not even the lowest panel fits a block: cuBLAS's turn.
bool too_wide(const CoreCall &t, const Device &device) {
    if (t.v.cols > kCoreWidth) return true;
    const int k32 = int(divide_up<int64_t>(t.v.cols, kBlock) * kBlock);
    return dispatch(t.c.dtype, [&](auto tag) {
        using T = decltype(tag);
        return (across(t.c) ? shared_bytes<T, true>(32, k32) : shared_bytes<T, false>(32, k32)) > device.shared_limit;
    });
}

// The same call with V unpacked into `dense`.
template <class T> CoreCall unpacked_call(const Session &s, const CoreCall &t, T *dense) {
    CoreCall call = t;
    call.v.data = dense;
    call.v.row_stride = t.v.cols;
    call.v.col_stride = 1;
    call.packed = nullptr;
    unpack_rows(s, *t.packed, dense, t.v.cols, int64_t(1));
    return call;
}

bool empty(const CoreCall &c) { return c.c.rows == 0 || c.c.cols == 0 || c.c.size() == 0; }

} // namespace

std::int64_t apply_core_workspace(const CoreCall &call, const CoreOptions &o, int device) {
    check_call(call, o);
    if (empty(call)) return 0;
    Context context;
    context.device = device;
    const Session s(context);
    Stack core, source;
    const CoreCall t = turned(call, o, core, source);
    if (too_wide(t, s.device()))
        return apply_core_wide_room(t, o, device) + (t.packed != nullptr ? divide_up<int64_t>(t.v.rows * t.v.cols * size_of(t.c.dtype), 256) * 256 : 0);
    return dispatch(t.c.dtype, [&](auto tag) -> std::int64_t {
        using T = decltype(tag);
        const auto bytes = [&](const Plan<T> &p) -> std::int64_t {
            if (p.mode == Plan<T>::resident) return 0;
            const int64_t panels = divide_up<int64_t>(t.c.cols, kPanel<T>) * t.c.size();
            return room<Accumulate<T>>(panels * p.blocks * t.v.cols * kPanel<T>);
        };
        return across(t.c) ? bytes(plan_of<T, true>(t, o, s.device())) : bytes(plan_of<T, false>(t, o, s.device()));
    });
}

void apply_core(const Context &context, const CoreCall &call, const CoreOptions &o) {
    check_call(call, o);
    const Session s(context);
    if (empty(call)) return;
    Stack core, source;
    const CoreCall t = turned(call, o, core, source);
    const bool wide = too_wide(t, s.device());
    dispatch(t.c.dtype, [&](auto tag) {
        using T = decltype(tag);
        if (wide) {
            Context rest = context;
            if (t.packed == nullptr) return apply_core_wide<T>(s, rest, t, o);
            Workspace work(context);
            T *dense = work.take<T>(t.v.rows * t.v.cols);
            const int64_t taken = room<T>(t.v.rows * t.v.cols);
            rest.workspace = static_cast<char *>(context.workspace) + taken;
            rest.workspace_bytes -= taken;
            return apply_core_wide<T>(s, rest, unpacked_call(s, t, dense), o);
        }
        if (t.packed != nullptr) return across(t.c) ? run<T, true, true>(s, context, t, o) : run<T, false, true>(s, context, t, o);
        across(t.c) ? run<T, true, false>(s, context, t, o) : run<T, false, false>(s, context, t, o);
    });
}

void apply_core_group(const Context &context, const std::vector<CoreCall> &calls, const CoreOptions &o) {
    if (calls.empty()) return;
    for (const auto &c : calls) {
        check_call(c, o);
        if (c.c.axes != 0) throw ValueError("matrices of a group have no leading axes");
        if (c.source != nullptr) throw ValueError("a group takes no source");
        if (c.packed != nullptr) throw ValueError("a group takes no 4-bit basis");
        if (c.v.cols > kCoreWidth) throw ValueError("a basis of a group has at most " + std::to_string(kCoreWidth) + " columns, got " + std::to_string(c.v.cols));
        if (c.c.dtype != calls[0].c.dtype) throw ValueError("matrices of a group must have one dtype");
    }
    const Session s(context);
    std::vector<Stack> cores(calls.size());
    std::vector<CoreCall> rows, columns;
    for (std::size_t i = 0; i < calls.size(); ++i) {
        if (empty(calls[i])) continue;
        Stack unused;
        const CoreCall t = turned(calls[i], o, cores[i], unused);
        (across(t.c) ? rows : columns).push_back(t);
    }
    dispatch(calls[0].c.dtype, [&](auto tag) {
        using T = decltype(tag);
        const auto by_rows = plan_group<T, true>(s, rows, o); // both before the first launch
        const auto by_columns = plan_group<T, false>(s, columns, o);
        run_group<T, true>(s, rows, o, by_rows);
        run_group<T, false>(s, columns, o, by_columns);
    });
}

} // namespace subspan::cuda
