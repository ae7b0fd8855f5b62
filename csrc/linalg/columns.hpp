// Kernels on matrices of a few columns, in copies whose columns are contiguous: vectors run down the columns, where a row would
// fill a part of one.
#pragma once

#include "base/simd.hpp"
#include "linalg/packing.hpp"
#include "subspan/views.hpp"

#include <algorithm>
#include <cstdint>

namespace subspan::simd {

inline constexpr int kColumnGroup = 8; // columns whose sums are in registers
inline constexpr std::int64_t kWidest = 16; // lanes of the widest vector

/// How far columns of m entries are apart: padded to whole vectors, and not a power of two, where they would share cache sets.
inline std::int64_t column_stride(std::int64_t m) {
    const std::int64_t ld = (m + kWidest - 1) / kWidest * kWidest;
    return ld % 512 == 0 ? ld + kWidest : ld;
}

template <class T, int Bytes> struct Columns {
    using V = Vec<T, Bytes>;
    using VT = typename V::type;
    static constexpr int W = V::lanes;
    static std::int64_t padded(std::int64_t m) { return (m + W - 1) / W * W; }

    /// Columns of `a`, which has K of them, to p, with zeros up to whole vectors.
    template <int K> static SUBSPAN_INLINE void load(const MatrixView<const T> &a, T *p, std::int64_t ld) {
        const std::int64_t m = a.rows, size = padded(m);
        const int k = int(a.cols);
        for (int c = 0; c < k; ++c) std::fill(p + c * ld + m, p + c * ld + size, T(0));
        if (a.row_stride == 1) {
            for (int c = 0; c < k; ++c) std::copy_n(a.data + c * a.col_stride, m, p + c * ld);
        } else if (K <= 4 && k == K && a.col_stride == 1 && a.row_stride == K) {
            const T *__restrict from = a.data;
            T *__restrict to = p;
            for (std::int64_t i = 0; i < m; ++i)
#pragma GCC unroll 16
                for (int c = 0; c < K; ++c) to[c * ld + i] = from[i * K + c];
        } else {
            std::int64_t i = 0;
            if constexpr (K > 4)
                if (a.col_stride == 1 && a.row_stride >= k) i = transpose_in<K>(a, p, ld);
            for (; i < m; ++i)
                for (int c = 0; c < k; ++c) p[c * ld + i] = a.data[i * a.row_stride + c * a.col_stride];
        }
    }
    // As narrow as K columns allow. Rows are loaded past their end, but not past the last one's; returns the rows done.
    template <int K> using Narrow = Transpose<T, (Bytes == 64 && K * int(sizeof(T)) <= 32) ? 32 : Bytes>;
    template <int K>
    static SUBSPAN_INLINE std::int64_t transpose_in([[maybe_unused]] const MatrixView<const T> &a, [[maybe_unused]] T *p, [[maybe_unused]] std::int64_t ld) {
        std::int64_t i = 0;
#ifdef SUBSPAN_SHUFFLE
        using N = Narrow<K>;
        constexpr int H = N::W;
        const int k = int(a.cols);
        for (; k <= H && (i + H - 1) * a.row_stride + H <= (a.rows - 1) * a.row_stride + k; i += H) {
            typename N::V::type r[H];
#pragma GCC unroll 16
            for (int l = 0; l < H; ++l) r[l] = N::V::load(a.data + (i + l) * a.row_stride);
            N::template rounds<H / 2>(r);
#pragma GCC unroll 16
            for (int c = 0; c < (K < H ? K : H); ++c)
                if (c < k) N::V::store(p + c * ld + i, r[c]);
        }
#endif
        return i;
    }
    // Rows one after the other: each is stored past its end, where the next one comes.
    template <int K>
    static SUBSPAN_INLINE std::int64_t transpose_out([[maybe_unused]] const T *p, [[maybe_unused]] std::int64_t ld, [[maybe_unused]] const MatrixView<T> &a) {
        std::int64_t i = 0;
#ifdef SUBSPAN_SHUFFLE
        using N = Narrow<K>;
        constexpr int H = N::W;
        const int k = int(a.cols);
        for (; k <= H && (i + H - 1) * k + H <= a.rows * k; i += H) {
            typename N::V::type r[H];
#pragma GCC unroll 16
            for (int c = 0; c < H; ++c) r[c] = c < K && c < k ? N::V::load(p + c * ld + i) : typename N::V::type{};
            N::template rounds<H / 2>(r);
#pragma GCC unroll 16
            for (int l = 0; l < H; ++l) N::V::store(a.data + (i + l) * k, r[l]);
        }
#endif
        return i;
    }
    template <int K> static SUBSPAN_INLINE void store(const T *p, std::int64_t ld, const MatrixView<T> &a) {
        const std::int64_t m = a.rows;
        const int k = int(a.cols);
        if (a.row_stride == 1) {
            for (int c = 0; c < k; ++c) std::copy_n(p + c * ld, m, a.data + c * a.col_stride);
        } else if (K <= 4 && k == K && a.col_stride == 1 && a.row_stride == K) {
            T *__restrict to = a.data;
            const T *__restrict from = p;
            for (std::int64_t i = 0; i < m; ++i)
#pragma GCC unroll 16
                for (int c = 0; c < K; ++c) to[i * K + c] = from[c * ld + i];
        } else {
            std::int64_t i = 0;
            if constexpr (K > 4)
                if (a.col_stride == 1 && a.row_stride == k) i = transpose_out<K>(p, ld, a);
            for (; i < m; ++i)
                for (int c = 0; c < k; ++c) a.data[i * a.row_stride + c * a.col_stride] = p[c * ld + i];
        }
    }
    static constexpr int kBlock = 4;
    /// g[i·K + j] = column i · column j of p for j <= i, a tile of 4 x 4 at a time: each column is read K/4 times.
    template <int K, std::int64_t Run> static SUBSPAN_INLINE void gram(const T *p, std::int64_t ld, std::int64_t size, double *g) {
        for (int i = 0; i < K * K; ++i) g[i] = 0;
        for (int a = 0; a < K; a += kBlock)
            for (int b = 0; b <= a; b += kBlock) {
                if (b < a)
                    tile<K, Run, false>(p, ld, size, a, b, g);
                else
                    tile<K, Run, true>(p, ld, size, a, b, g);
            }
    }
    template <int K, std::int64_t Run, bool Diagonal> static SUBSPAN_INLINE void tile(const T *p, std::int64_t ld, std::int64_t size, int a, int b, double *g) {
        constexpr int B = K < kBlock ? K : kBlock;
        const int rows = K - a < B ? K - a : B, cols = K - b < B ? K - b : B;
        for (std::int64_t first = 0; first < size; first += Run * W) {
            const std::int64_t end = std::min(size, first + Run * W);
            VT sum[B][B];
#pragma GCC unroll 4
            for (int r = 0; r < B; ++r)
#pragma GCC unroll 4
                for (int c = 0; c < B; ++c) sum[r][c] = VT{};
            // Columns past the last are the last once more.
            const T *x[B], *y[B];
#pragma GCC unroll 4
            for (int r = 0; r < B; ++r) x[r] = p + (a + (r < rows ? r : rows - 1)) * ld, y[r] = p + (b + (r < cols ? r : cols - 1)) * ld;
            for (std::int64_t i = first; i < end; i += W) {
                VT u[B], v[B];
#pragma GCC unroll 4
                for (int r = 0; r < B; ++r) u[r] = V::load(x[r] + i);
#pragma GCC unroll 4
                for (int c = 0; c < B; ++c) v[c] = Diagonal ? u[c] : V::load(y[c] + i);
#pragma GCC unroll 4
                for (int r = 0; r < B; ++r)
#pragma GCC unroll 4
                    for (int c = 0; c < (Diagonal ? r + 1 : B); ++c) sum[r][c] += u[r] * v[c];
            }
#pragma GCC unroll 4
            for (int r = 0; r < B; ++r)
#pragma GCC unroll 4
                for (int c = 0; c < (Diagonal ? r + 1 : B); ++c)
                    if (r < rows && c < cols) g[(a + r) * K + b + c] += double(V::sum(sum[r][c]));
        }
    }
    /// take(c, x · column c of p) for C columns, once for every Run vectors: what is summed in T.
    template <int C, std::int64_t Run, class F> static SUBSPAN_INLINE void products(const T *p, std::int64_t ld, std::int64_t size, const T *x, const F &take) {
        constexpr int U = C <= 2 ? 4 : C <= 4 ? 2 : 1; // chains
        for (std::int64_t first = 0; first < size; first += Run * W) {
            const std::int64_t end = std::min(size, first + Run * W);
            VT sum[U][C];
#pragma GCC unroll 4
            for (int u = 0; u < U; ++u)
#pragma GCC unroll 8
                for (int c = 0; c < C; ++c) sum[u][c] = VT{};
            std::int64_t i = first;
            for (; i + U * W <= end; i += U * W)
#pragma GCC unroll 4
                for (int u = 0; u < U; ++u) {
                    const VT y = V::load(x + i + u * W);
#pragma GCC unroll 8
                    for (int c = 0; c < C; ++c) sum[u][c] += y * V::load(p + c * ld + i + u * W);
                }
            for (; i < end; i += W) {
                const VT y = V::load(x + i);
#pragma GCC unroll 8
                for (int c = 0; c < C; ++c) sum[0][c] += y * V::load(p + c * ld + i);
            }
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c) {
#pragma GCC unroll 4
                for (int u = 1; u < U; ++u) sum[0][c] += sum[u][c];
                take(c, double(V::sum(sum[0][c])));
            }
        }
    }
};

} // namespace subspan::simd
