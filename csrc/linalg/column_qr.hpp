// Householder QR of matrices of a few columns, in a copy whose columns are contiguous: vectors run down the columns, where a
// row would fill a part of one. Both orders of memory cost the same.
#pragma once

#include "subspan/views.hpp"

#include <cstdint>

namespace subspan {

inline constexpr std::int64_t kFewColumns = 12;

/// A is m x k, 1 <= k <= kFewColumns, k <= m.
template <class T> struct ColumnQr {
    MatrixView<const T> a;
    MatrixView<T> v, t;      // unit lower trapezoid and upper triangle: Q = I - V T Vᵀ; null data: not wanted
    T *tau = nullptr;        // k, with v
    MatrixView<T> q;         // m x k; null data: not wanted. May be a
    bool positive = false;   // the columns of Q, and rows of R, take the signs that make the diagonal of R positive
    T *columns = nullptr;    // work space of column_qr_room(m, k): the reflections, which column_q() needs
    T r[kFewColumns * kFewColumns];  // out: R by rows of k
    double factors[kFewColumns * kFewColumns];  // out: T, as column_q() wants it
    bool good = true;        // out: false for NaN and infinity, and then nothing has been written
};

/// V and its tau are given, as qr.a and `tau`: whatever its columns are, column_q() has Q = H_1 ... H_k afterwards.
template <class T> void column_reflections(ColumnQr<T> &qr, const T *tau);

/// Whether this is the way where rows are contiguous: more columns fill a vector, and short ones wait for one another.
template <class T> bool few_columns(std::int64_t m, std::int64_t k) { return k <= 4 || (k <= 6 && m >= 64) || (sizeof(T) == 4 && k <= 8 && m >= 128); }

template <class T> std::int64_t column_qr_room(std::int64_t m, std::int64_t k);
template <class T> void column_qr(ColumnQr<T> &qr);
/// q = Q W of what column_qr() has factored, with a k x k matrix W by rows. The reflections are gone then.
template <class T> void column_q(ColumnQr<T> &qr, const double *w, MatrixView<T> q);

/// The power of two that brings the largest entry to about one where squares of entries would overflow or vanish.
template <class T> T safe_scale(T top);

} // namespace subspan
