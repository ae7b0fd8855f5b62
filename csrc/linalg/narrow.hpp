// Matrices whose rows are shorter than a vector or two: rows are loaded whole, past their end, and stored by lengths that the
// compiler knows. What a loop over seven entries costs is more than the arithmetic on them.
#pragma once

#include "base/simd.hpp"
#include "subspan/views.hpp"

#include <algorithm>
#include <cstdint>

namespace subspan::simd {

/// Rows of K entries from a stride to a stride.
template <class T, int K> SUBSPAN_INLINE void copy_rows_of(const T *from, std::int64_t fs, T *to, std::int64_t ts, std::int64_t rows) {
    for (std::int64_t i = 0; i < rows; ++i) {
        T x[K];
        for (int j = 0; j < K; ++j) x[j] = from[i * fs + j];
        for (int j = 0; j < K; ++j) to[i * ts + j] = x[j];
    }
}

/// Rows of `cols` contiguous entries; they may not overlap but row by row.
template <class T> SUBSPAN_INLINE void copy_rows(const T *from, std::int64_t fs, T *to, std::int64_t ts, std::int64_t rows, std::int64_t cols) {
    switch (cols) {
    case 1: return copy_rows_of<T, 1>(from, fs, to, ts, rows);
    case 2: return copy_rows_of<T, 2>(from, fs, to, ts, rows);
    case 3: return copy_rows_of<T, 3>(from, fs, to, ts, rows);
    case 4: return copy_rows_of<T, 4>(from, fs, to, ts, rows);
    case 5: return copy_rows_of<T, 5>(from, fs, to, ts, rows);
    case 6: return copy_rows_of<T, 6>(from, fs, to, ts, rows);
    case 7: return copy_rows_of<T, 7>(from, fs, to, ts, rows);
    case 8: return copy_rows_of<T, 8>(from, fs, to, ts, rows);
    default:
        for (std::int64_t i = 0; i < rows; ++i)
            for (std::int64_t j = 0; j < cols; ++j) to[i * ts + j] = from[i * fs + j];
    }
}

/// The last row, with zeros past its end. Not inlined: it would be most of the code of every kernel that loads rows.
template <class T> SUBSPAN_NOINLINE void copy_last_row(const T *p, std::int64_t cols, std::int64_t lanes, T *tile) {
    for (std::int64_t j = 0; j < lanes; ++j) tile[j] = j < cols ? p[j] : T(0);
}

/// Rows of a matrix with contiguous rows as NV vectors each. Loads go past the end of a row into the next one, but never past
/// the last one; what is there is not to be looked at.
template <class T, int Bytes, int NV> struct NarrowRows {
    using V = Vec<T, Bytes>;
    MatrixView<const T> x;
    std::int64_t safe; // rows that may be read past
    explicit NarrowRows(const MatrixView<const T> &m) : x(m), safe(0) {
        const std::int64_t over = std::max<std::int64_t>(NV * V::lanes - m.cols, 0);
        safe = m.row_stride > 0 ? m.rows - std::min(m.rows, 1 + (over + m.row_stride - 1) / m.row_stride) : 0;
    }
    SUBSPAN_INLINE void load(std::int64_t i, typename V::type (&to)[NV]) const {
        const T *p = x.data + i * x.row_stride;
        alignas(64) T tile[NV * V::lanes];
        if (i >= safe) {
            copy_last_row(p, x.cols, NV * V::lanes, tile);
            p = tile;
        }
#pragma GCC unroll 4
        for (int q = 0; q < NV; ++q) to[q] = V::load(p + q * V::lanes);
    }
};

/// Upper triangle and diagonal of VᵀV for V of at most 8 columns and contiguous rows, summed in T over 512 rows and in double
/// beyond: g[i·K + j] for i <= j < K.
template <class T, int Bytes, int K> SUBSPAN_INLINE void narrow_gram_of(const MatrixView<const T> &v, double *g) {
    using V = Vec<T, Bytes>;
    constexpr int W = V::lanes, NV = (K + W - 1) / W, U = K <= 2 ? 4 : K <= 4 ? 2 : 1; // rows whose sums are apart
    const NarrowRows<T, Bytes, NV> rows(v);
    for (int i = 0; i < K * K; ++i) g[i] = 0;
    for (std::int64_t first = 0; first < v.rows; first += 512) {
        const std::int64_t end = std::min(v.rows, first + 512);
        typename V::type acc[U][K][NV];
        for (int u = 0; u < U; ++u)
            for (int a = 0; a < K; ++a)
                for (int q = 0; q < NV; ++q) acc[u][a][q] = typename V::type{};
        const auto add = [&](std::int64_t i, typename V::type(&to)[K][NV]) SUBSPAN_LAMBDA_INLINE {
            typename V::type row[NV];
            rows.load(i, row);
            const T *x = v.data + i * v.row_stride;
#pragma GCC unroll 8
            for (int a = 0; a < K; ++a)
#pragma GCC unroll 4
                for (int q = 0; q < NV; ++q) to[a][q] += x[a] * row[q];
        };
        std::int64_t i = first;
        for (; i + U <= end; i += U)
#pragma GCC unroll 4
            for (int u = 0; u < U; ++u) add(i + u, acc[u]);
        for (; i < end; ++i) add(i, acc[0]);
        alignas(64) T part[NV * W];
        for (int a = 0; a < K; ++a) {
            for (int u = 1; u < U; ++u)
                for (int q = 0; q < NV; ++q) acc[0][a][q] += acc[u][a][q];
            for (int q = 0; q < NV; ++q) V::store(part + q * W, acc[0][a][q]);
            for (int b = a; b < K; ++b) g[a * K + b] += double(part[b]);
        }
    }
}

struct NarrowGram {
    template <int Bytes, class T> static SUBSPAN_INLINE void of(const MatrixView<const T> &v, double *g) {
        switch (v.cols) {
        case 1: return narrow_gram_of<T, Bytes, 1>(v, g);
        case 2: return narrow_gram_of<T, Bytes, 2>(v, g);
        case 3: return narrow_gram_of<T, Bytes, 3>(v, g);
        case 4: return narrow_gram_of<T, Bytes, 4>(v, g);
        case 5: return narrow_gram_of<T, Bytes, 5>(v, g);
        case 6: return narrow_gram_of<T, Bytes, 6>(v, g);
        case 7: return narrow_gram_of<T, Bytes, 7>(v, g);
        default: return narrow_gram_of<T, Bytes, 8>(v, g);
        }
    }
    template <int Bytes> static SUBSPAN_INLINE void run(const MatrixView<const float> *v, double *g) { of<Bytes>(*v, g); }
    template <int Bytes> static SUBSPAN_INLINE void run(const MatrixView<const double> *v, double *g) { of<Bytes>(*v, g); }
};

} // namespace subspan::simd
