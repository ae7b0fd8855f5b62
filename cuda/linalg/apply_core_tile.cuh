// apply_core's panel: a block's rows of X and of V in shared memory, and the two products with V.
#pragma once

#include "linalg/int4.cuh"
#include "subspan/cuda/launch.cuh"

namespace subspan::cuda::core_panel {

constexpr int kThreads = 256, kWarps = kThreads / 32, kBlock = 32; // kBlock: columns of V at a time

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
                arrived();
                return;
            }
        }
        for (int e = tid; e < rows * P; e += kThreads) {
            const int i = Across ? e / P : e % rows, j = Across ? e % P : e / rows;
            T value{};
            if (i < have_i && j < have_j) value = x[(i0 + i) * xi + (j0 + j) * xj];
            *at(i, j) = value;
        }
        arrived();
    }
    // All copies of this block, those of V too.
    static SUBSPAN_DEVICE void arrived() {
        commit_copies();
        wait_copies<0>();
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

// The block's rows of V in shared memory, each item read from memory once; `rows` is null where there is no room for it, and 16 bits
// alone have it: V is read a second time for the second product then.
template <class T> struct Basis {
    T *rows;
    int pitch;
    SUBSPAN_SHARED_CODE static int pitch_of(int k32) { return k32 + 8; }
    SUBSPAN_SHARED_CODE static int64_t bytes(int rows, int k32) { return kTensor<T> ? int64_t(rows) * pitch_of(k32) * int64_t(sizeof(T)) : 0; }
};

// sums[place(r, lane)] (+)= sign Σ d[r / 4][r % 4] over the warps. `scratch`: kWarps / 2 x R * 4 x 32. Ends with a barrier.
template <class A, int R, class Place> SUBSPAN_DEVICE void add_warps(const A (&d)[R][4], A *scratch, A sign, bool add, A *sums, const Place &place) {
    constexpr int half = kWarps / 2, size = R * 4 * 32;
    const int tid = int(threadIdx.x), warp = tid / 32, lane = tid % 32;
    A *slot = scratch + (warp % half) * size + lane;
    if (warp >= half)
#pragma unroll
        for (int r = 0; r < 4 * R; ++r) slot[32 * r] = d[r / 4][r % 4];
    __syncthreads();
    if (warp < half)
#pragma unroll
        for (int r = 0; r < 4 * R; ++r) slot[32 * r] += d[r / 4][r % 4];
    __syncthreads();
#pragma unroll
    for (int e = tid; e < size; e += kThreads) {
        A sum = scratch[e];
#pragma unroll
        for (int w = 1; w < half; ++w) sum += scratch[w * size + e];
        A *to = sums + place(e / 32, e % 32);
        *to = (add ? *to : A(0)) + sign * sum;
    }
    __syncthreads();
}

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

    // Eight items of a row of V, zero outside.
    static SUBSPAN_DEVICE void fetch(const Job<T> &job, T *to, int i, int a, bool vectors) {
        if constexpr (Packed) {
            float v[8];
            unpacked<8>(job, i, a, vectors, v);
            uint4 four;
            four.x = pack<T>(v[0], v[1]);
            four.y = pack<T>(v[2], v[3]);
            four.z = pack<T>(v[4], v[5]);
            four.w = pack<T>(v[6], v[7]);
            *reinterpret_cast<uint4 *>(to) = four;
        } else {
            const T *from = job.v + int64_t(i) * job.vi + int64_t(a) * job.va;
            if (vectors && i < job.m && a + 8 <= job.k) {
                *reinterpret_cast<uint4 *>(to) = *reinterpret_cast<const uint4 *>(from);
                return;
            }
            for (int e = 0; e < 8; ++e) {
                T value{};
                if (i < job.m && a + e < job.k) value = from[e * job.va];
                to[e] = value;
            }
        }
    }

    // All of the block's rows; vectors arrive with the next tile.
    static SUBSPAN_DEVICE void load(const Job<T> &job, const Basis<T> &basis, int i0, int rows, int k32, bool vectors) {
        const int chunks = k32 / 8;
        for (int c = int(threadIdx.x); c < rows * chunks; c += kThreads) {
            const int i = c / chunks, a = (c - i * chunks) * 8;
            T *to = basis.rows + i * basis.pitch + a;
            if (!Packed && vectors) {
                const int filled = i0 + i < job.m ? most(0, least(8, job.k - a)) : 0;
                copy_async(to, filled > 0 ? job.v + int64_t(i0 + i) * job.vi + a : job.v, filled * 2);
            } else {
                fetch(job, to, i0 + i, a, vectors);
            }
        }
    }

    struct Piece {
        const T *v;
        int pitch;
    };
    // Rows i to i + 15 of the block, columns a0 to a0 + 31.
    static SUBSPAN_DEVICE Piece piece(const Job<T> &job, const Basis<T> &basis, unsigned char *memory, int i0, int i, int a0, bool vectors) {
        if (basis.rows != nullptr) return {basis.rows + i * basis.pitch + a0, basis.pitch};
        return {stage(job, memory, i0 + i, a0, vectors), kStage};
    }

    // V[i0 + 0..15][a0 + 0..31], zero outside.
    static SUBSPAN_DEVICE T *stage(const Job<T> &job, unsigned char *memory, int i0, int a0, bool vectors) {
        const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
        T *s = reinterpret_cast<T *>(memory) + warp * 16 * kStage;
        __syncwarp();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int c = lane + 32 * half, i = c / 4, a = (c % 4) * 8;
            fetch(job, s + i * kStage + a, i0 + i, a0 + a, vectors);
        }
        __syncwarp();
        return s;
    }

    // sums[a0 + a][j] (+)= sign Σ_i V[i][a] X[i][j] over the block's rows, all warps together. Ends with a barrier.
    static SUBSPAN_DEVICE void inner(const Job<T> &job, const Tile<T, Across> &tile, const Basis<T> &basis, unsigned char *memory, float *scratch, int i0,
                                     int a0, float sign, bool add, bool vectors, float *sums) {
        const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, r = lane % 8, q = lane / 8;
        float d[8][4];
#pragma unroll
        for (int x = 0; x < 8; ++x)
#pragma unroll
            for (int e = 0; e < 4; ++e) d[x][e] = 0.0f;
        for (int i = 16 * warp; i < tile.rows && i0 + i < job.m; i += 16 * kWarps) {
            const auto [v, pitch] = piece(job, basis, memory, i0, i, a0, vectors);
            uint32_t left[2][4], right[2][4];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                if (Across) { // (a, i) times (i, j)
                    load_matrices<true>(left[h], v + (r + 8 * (q / 2)) * pitch + 8 * (q % 2) + 16 * h);
                    load_matrices<true>(right[h], tile.at(i + r + 8 * (q % 2), 8 * (q / 2) + 16 * h));
                } else { // (j, i) times (i, a)
                    load_matrices<false>(left[h], tile.at(i + 8 * (q / 2), r + 8 * (q % 2) + 16 * h));
                    load_matrices<true>(right[h], v + (r + 8 * (q % 2)) * pitch + 8 * (q / 2) + 16 * h);
                }
            }
#pragma unroll
            for (int x = 0; x < 2; ++x)
#pragma unroll
                for (int y = 0; y < 4; ++y) multiply_add<T>(d[4 * x + y], left[x], right[y / 2][2 * (y % 2)], right[y / 2][2 * (y % 2) + 1]);
        }
        add_warps(d, scratch, sign, add, sums + a0 * P, [](int at, int of) { // of register `at` of lane `of` in (a, j)
            const int row = 16 * (at / 16) + of / 4 + 8 * (at % 4 / 2), col = 8 * (at / 4 % 4) + 2 * (of % 4) + at % 2;
            return Across ? row * P + col : col * P + row;
        });
    }

    // The small product y as high + low.
    static SUBSPAN_DEVICE void keep(unsigned char *memory, int k32, int a, int j, float y) {
        T *high = reinterpret_cast<T *>(memory), *low = high + k32 * kSmall;
        const T top = narrow<T>(y);
        high[a * kSmall + j] = top;
        low[a * kSmall + j] = narrow<T>(y - widen(top));
    }

    // X = alpha X + V y in place.
    static SUBSPAN_DEVICE void outer(const Job<T> &job, const Tile<T, Across> &tile, const Basis<T> &basis, unsigned char *memory, const unsigned char *small,
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
                const auto [v, pitch] = piece(job, basis, memory, i0, i, a0, vectors);
#pragma unroll
                for (int h = 0; h < 2; ++h) { // 16 columns of V at a time
                    uint32_t f[4];
                    if (Across)
                        load_matrices<false>(f, v + (r + 8 * (q % 2)) * pitch + 8 * (q / 2) + 16 * h);
                    else
                        load_matrices<false>(f, v + (r + 8 * (q / 2)) * pitch + 8 * (q % 2) + 16 * h);
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

    static SUBSPAN_DEVICE void inner(const Job<T> &job, const Tile<T, Across> &tile, const Basis<T> &, unsigned char *, T *scratch, int i0, int a0, T sign,
                                     bool add, bool vectors, T *sums) {
        constexpr int ahead = sizeof(T) == 4 ? 8 : 2; // rows of V that are on their way at once
        const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, a = 4 * (lane / 4), j = 4 * (lane % 4);
        T d[4][4];
#pragma unroll
        for (int x = 0; x < 4; ++x)
#pragma unroll
            for (int y = 0; y < 4; ++y) d[x][y] = T(0);
        for (int first = warp; first < tile.rows; first += ahead * kWarps) {
            T v[ahead][4];
#pragma unroll
            for (int u = 0; u < ahead; ++u) {
                const int i = first + u * kWarps;
                row_of_v(job, i < tile.rows ? i0 + i : job.m, a0 + a, vectors, v[u]);
            }
#pragma unroll
            for (int u = 0; u < ahead; ++u) {
                const int i = least(first + u * kWarps, tile.rows - 1);
                T x[4];
#pragma unroll
                for (int y = 0; y < 4; ++y) x[y] = *tile.at(i, j + y);
#pragma unroll
                for (int s = 0; s < 4; ++s)
#pragma unroll
                    for (int y = 0; y < 4; ++y) d[s][y] = fma(v[u][s], x[y], d[s][y]);
            }
        }
        add_warps(d, scratch, sign, add, sums + a0 * P, [](int at, int of) { return (4 * (of / 4) + at / 4) * P + 4 * (of % 4) + at % 4; });
    }

    static SUBSPAN_DEVICE void load(const Job<T> &, const Basis<T> &, int, int, int, bool) {}

    static SUBSPAN_DEVICE void keep(unsigned char *memory, int, int a, int j, T y) { reinterpret_cast<T *>(memory)[a * P + j] = y; }

    static SUBSPAN_DEVICE void outer(const Job<T> &job, const Tile<T, Across> &tile, const Basis<T> &, unsigned char *, const unsigned char *small, int k32,
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
#pragma unroll(sizeof(T) == 4 ? 2 : 1)
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

// `keep`: with the block's rows of V.
template <class T, bool Across> int64_t shared_bytes(int rows, int k32, bool keep) {
    const int64_t sums = int64_t(k32) * kPanel<T> * int64_t(sizeof(Accumulate<T>));
    return Tile<T, Across>::bytes(rows) + (keep ? Basis<T>::bytes(rows, k32) : Products<T, Across>::stage_bytes) + kScratchBytes<T> + 2 * sums +
           Products<T, Across>::core_bytes(k32);
}

} // namespace subspan::cuda::core_panel
