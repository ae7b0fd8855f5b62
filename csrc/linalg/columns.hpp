// Kernels on matrices of a few columns, in copies whose columns are contiguous: vectors run down the columns, where a row would
// fill a part of one.
#pragma once

#include "base/simd.hpp"
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
        } else if (k == K && a.col_stride == 1 && a.row_stride == K) {
            const T *__restrict from = a.data;
            T *__restrict to = p;
            for (std::int64_t i = 0; i < m; ++i)
#pragma GCC unroll 16
                for (int c = 0; c < K; ++c) to[c * ld + i] = from[i * K + c];
        } else {
            for (std::int64_t i = 0; i < m; ++i)
                for (int c = 0; c < k; ++c) p[c * ld + i] = a.data[i * a.row_stride + c * a.col_stride];
        }
    }
    template <int K> static SUBSPAN_INLINE void store(const T *p, std::int64_t ld, const MatrixView<T> &a) {
        const std::int64_t m = a.rows;
        const int k = int(a.cols);
        if (a.row_stride == 1) {
            for (int c = 0; c < k; ++c) std::copy_n(p + c * ld, m, a.data + c * a.col_stride);
        } else if (k == K && a.col_stride == 1 && a.row_stride == K) {
            T *__restrict to = a.data;
            const T *__restrict from = p;
            for (std::int64_t i = 0; i < m; ++i)
#pragma GCC unroll 16
                for (int c = 0; c < K; ++c) to[i * K + c] = from[c * ld + i];
        } else {
            for (std::int64_t i = 0; i < m; ++i)
                for (int c = 0; c < k; ++c) a.data[i * a.row_stride + c * a.col_stride] = p[c * ld + i];
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
