// A product of two blocks in shared memory, by all warps of a block: tensor cores for 16-bit items, plain arithmetic for wider ones.
#pragma once

#include "subspan/cuda/launch.cuh"

namespace subspan::cuda {

/// Sums (M x N) += A (M x depth) B (depth x N), kept in registers. Warps stand M / Tall by 4, Tall rows of the result each. ATransposed: A is stored depth x M;
/// BTransposed: B is stored N x depth. Depth is a multiple of 16 for 16-bit items; leading dimensions of those are 8 mod 64 or so, whole
/// vectors of 16 bytes without bank conflicts.
template <class T, int M, int N, bool ATransposed, bool BTransposed, int Tall = 32> struct BlockProduct {
    using A = Accumulate<T>;
    static constexpr bool tensor = sizeof(T) == 2;
    static constexpr int WM = Tall, WN = N / 4, kThreads = M / Tall * 128;
    static constexpr int R = tensor ? WM / 16 : WM / 8, C = tensor ? WN / 8 : WN / 4, E = tensor ? 4 : 1;
    static_assert(!tensor || WN % 16 == 0);
    A d[R][C][E];

    SUBSPAN_DEVICE void clear() {
#pragma unroll
        for (int x = 0; x < R; ++x)
#pragma unroll
            for (int y = 0; y < C; ++y)
#pragma unroll
                for (int e = 0; e < E; ++e) d[x][y][e] = A(0);
    }
    static SUBSPAN_DEVICE int row_of_warp() { return WM * (int(threadIdx.x) / 128); }
    static SUBSPAN_DEVICE int column_of_warp() { return WN * (int(threadIdx.x) / 32 % 4); }

    SUBSPAN_DEVICE void add(const T *a, int lda, const T *b, int ldb, int depth) {
        const int lane = int(threadIdx.x) % 32, m0 = row_of_warp(), n0 = column_of_warp();
        if constexpr (tensor) {
            const int r = lane % 8, q = lane / 8;
#pragma unroll(R *C >= 8 ? 2 : 1)
            for (int k = 0; k < depth; k += 16) {
                uint32_t left[R][4];
#pragma unroll
                for (int x = 0; x < R; ++x) {
                    if (ATransposed)
                        load_matrices<true>(left[x], a + (k + r + 8 * (q / 2)) * lda + m0 + 16 * x + 8 * (q % 2));
                    else
                        load_matrices<false>(left[x], a + (m0 + 16 * x + r + 8 * (q % 2)) * lda + k + 8 * (q / 2));
                }
#pragma unroll
                for (int y = 0; y < C; y += 2) {
                    uint32_t right[4];
                    if (BTransposed)
                        load_matrices<false>(right, b + (n0 + 8 * y + r + 8 * (q / 2)) * ldb + k + 8 * (q % 2));
                    else
                        load_matrices<true>(right, b + (k + r + 8 * (q % 2)) * ldb + n0 + 8 * y + 8 * (q / 2));
#pragma unroll
                    for (int x = 0; x < R; ++x) {
                        multiply_add<T>(d[x][y], left[x], right[0], right[1]);
                        multiply_add<T>(d[x][y + 1], left[x], right[2], right[3]);
                    }
                }
            }
        } else {
            const int m = m0 + lane / 4, n = n0 + lane % 4;
            for (int k = 0; k < depth; ++k) {
                T left[R], right[C];
#pragma unroll
                for (int x = 0; x < R; ++x) left[x] = ATransposed ? a[k * lda + m + 8 * x] : a[(m + 8 * x) * lda + k];
#pragma unroll
                for (int y = 0; y < C; ++y) right[y] = BTransposed ? b[(n + 4 * y) * ldb + k] : b[k * ldb + n + 4 * y];
#pragma unroll
                for (int x = 0; x < R; ++x)
#pragma unroll
                    for (int y = 0; y < C; ++y) d[x][y][0] = fma(left[x], right[y], d[x][y][0]);
            }
        }
    }

    /// value + bias[column] scale(row) of every sum, rounded, at to[row * pitch + column].
    template <class F> SUBSPAN_DEVICE void store(T *to, int pitch, const A *bias, const F &scale) const {
        if constexpr (tensor) {
            const int lane = int(threadIdx.x) % 32, m0 = row_of_warp() + lane / 4, n0 = column_of_warp() + 2 * (lane % 4);
            A by[R][2];
#pragma unroll
            for (int x = 0; x < R; ++x)
#pragma unroll
                for (int half = 0; half < 2; ++half) by[x][half] = scale(m0 + 16 * x + 8 * half);
#pragma unroll
            for (int y = 0; y < C; ++y) {
                const A b0 = bias[n0 + 8 * y], b1 = bias[n0 + 8 * y + 1];
#pragma unroll
                for (int x = 0; x < R; ++x)
#pragma unroll
                    for (int half = 0; half < 2; ++half)
                        *reinterpret_cast<uint32_t *>(to + (m0 + 16 * x + 8 * half) * pitch + n0 + 8 * y) =
                            pack<T>(fma(b0, by[x][half], d[x][y][2 * half]), fma(b1, by[x][half], d[x][y][2 * half + 1]));
            }
        } else {
            each([&](int m, int n, A v) { to[m * pitch + n] = T(fma(bias[n], scale(m), v)); });
        }
    }

    /// f(row, column, value) for every sum of this thread.
    template <class F> SUBSPAN_DEVICE void each(const F &f) const {
        const int lane = int(threadIdx.x) % 32, m0 = row_of_warp(), n0 = column_of_warp();
#pragma unroll
        for (int x = 0; x < R; ++x)
#pragma unroll
            for (int y = 0; y < C; ++y)
#pragma unroll
                for (int e = 0; e < E; ++e) {
                    if constexpr (tensor)
                        f(m0 + 16 * x + lane / 4 + 8 * (e / 2), n0 + 8 * y + 2 * (lane % 4) + e % 2, d[x][y][e]);
                    else
                        f(m0 + lane / 4 + 8 * x, n0 + lane % 4 + 4 * y, d[x][y][e]);
                }
    }
};

/// Rows [r0, r0 + rows) and columns [c0, c0 + cols) of a matrix into shared memory, zero outside of it. With `vectors` by asynchronous
/// copies, which the caller commits and waits for; cols is a multiple of 16 bytes then.
template <class T>
SUBSPAN_DEVICE void load_block(T *to, int pitch, const T *from, int64_t row_stride, int64_t col_stride, int r0, int c0, int rows, int cols, int all_rows,
                               int all_cols, bool vectors, int threads) {
    constexpr int V = 16 / int(sizeof(T));
    if (vectors) {
        const int chunks = cols / V;
        for (int c = int(threadIdx.x); c < rows * chunks; c += threads) {
            const int i = c / chunks, j = (c - i * chunks) * V;
            const int filled = r0 + i < all_rows ? most(0, least(V, all_cols - c0 - j)) : 0;
            copy_async(to + i * pitch + j, filled > 0 ? from + int64_t(r0 + i) * row_stride + c0 + j : from, filled * int(sizeof(T)));
        }
        return;
    }
#pragma unroll 1
    for (int e = int(threadIdx.x); e < rows * cols; e += threads) {
        const int i = e / cols, j = e - i * cols;
        T value{};
        if (r0 + i < all_rows && c0 + j < all_cols) value = from[int64_t(r0 + i) * row_stride + int64_t(c0 + j) * col_stride];
        to[i * pitch + j] = value;
    }
}

/// Asynchronous copies of a Rows x Cols block into shared memory, where addresses are found once and blocks follow each other. Regular: all
/// rows are `step` items apart, so that one address does. Whole: blocks that lie inside have code of their own, which takes registers.
template <class T, int Rows, int Cols, int Threads, int Pitch, bool Regular, bool Whole = Regular> struct Copies {
    static constexpr int V = 16 / int(sizeof(T)), chunks = Cols / V, all = Rows * chunks, count = (all + Threads - 1) / Threads;
    static_assert(Threads % chunks == 0);
    const T *from[Regular ? 1 : count];
    int thread;

    /// row(i): the first item of row i, or null where there is none.
    template <class F> SUBSPAN_DEVICE void start(const F &row) {
        thread = forgotten(int(threadIdx.x));
#pragma unroll
        for (int x = 0; x < (Regular ? 1 : count); ++x) {
            const int c = thread + x * Threads;
            const T *begin = c < all ? row(c / chunks) : nullptr;
            from[x] = begin != nullptr ? begin + c % chunks * V : nullptr;
        }
    }
    /// Items from `offset` on, of `cols` columns and `rows` rows at most, zero behind those. `any`: an address that may be read.
    SUBSPAN_DEVICE void copy(T *to, int64_t offset, int cols, int rows, const T *any, int64_t step = 0) const {
        const int i0 = thread / chunks, j = thread % chunks * V;
        if constexpr (Whole && all % Threads == 0)
            if (cols >= Cols && rows >= Rows) { // all of it is there
                const T *begin = from[0] + offset;
#pragma unroll
                for (int x = 0; x < count; ++x) {
                    copy_async(to + (i0 + x * (Threads / chunks)) * Pitch + j, begin, 16);
                    begin += int64_t(Threads / chunks) * step;
                }
                return;
            }
#pragma unroll
        for (int x = 0; x < count; ++x) {
            const int i = i0 + x * (Threads / chunks);
            if (all % Threads != 0 && i >= Rows) break;
            const T *begin = from[Regular ? 0 : x];
            const int filled = i < rows && (Regular || begin != nullptr) ? most(0, least(V, cols - j)) : 0;
            if (Regular) begin += int64_t(x * (Threads / chunks)) * step;
            copy_async(to + i * Pitch + j, filled > 0 ? begin + offset : any, filled * int(sizeof(T)));
        }
    }
};

} // namespace subspan::cuda
