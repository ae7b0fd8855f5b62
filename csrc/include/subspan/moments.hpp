// Column means and sums of squared deviations of a block of rows.
#pragma once

#include "subspan/views.hpp"

namespace subspan {

/// mean[j] and scatter[j] = sum_i (x_ij - mean_j)², in double: two passes over a strip of columns while it is in cache,
/// one over memory.
template <class T> void column_moments(MatrixView<const T> x, double *mean, double *scatter);

/// The same of a CSR matrix without duplicate entries; what is not stored counts as zeros.
template <class T> void column_moments(const CsrView<T> &x, double *mean, double *scatter);

/// mean[j] = sum_i f_i x_ij / sum_i f_i in double; null weights are ones.
template <class T> void column_means(MatrixView<const T> x, const double *weights, double *mean);

/// squares[j] = sum_i f_i (x_ij - mean_j)² in double; null weights are ones, a null mean is zero.
template <class T> void column_scatter(MatrixView<const T> x, const double *weights, const double *mean, double *squares);

/// Sum of the squares of all entries, in double and in an order that does not depend on the number of threads. Finite
/// for finite float input; NaN or infinity when an entry is, or when squares of doubles overflow.
template <class T> double sum_of_squares(MatrixView<const T> x);

} // namespace subspan
