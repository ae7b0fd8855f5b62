// Projections of a few vectors on more directions than vectors: V is read twice as it lies, in vectors of its own contiguous side.
// Register tiles would be one vector of sixteen, and V packed for them.
#pragma once

#include "subspan/isa.hpp"
#include "subspan/views.hpp"

#include <cstdint>

namespace subspan::simd {

/// Vectors of one pass over V.
inline constexpr std::int64_t kFewAtOnce = 4;

/// Whether V (m x k) can be read so: by rows, of a vector or more, or by columns.
template <class T> bool few_takes(const MatrixView<const T> &v) {
    return v.col_stride == 1 ? v.cols * std::int64_t(sizeof(T)) >= processor().vector : v.row_stride == 1;
}

/// w_f = Vᵀ x_f for `count` vectors x (one after the other, m numbers each), k numbers each. Sums of 64 rows in T, then in double.
template <class T> void few_coefficients(const MatrixView<const T> &v, std::int64_t count, const T *x, T *w);

/// y_f = alpha x_f + V w_f; y may be x.
template <class T> void few_update(const MatrixView<const T> &v, std::int64_t count, const T *w, T alpha, const T *x, T *y);

} // namespace subspan::simd
