// Column means and sums of squared deviations of a block of rows.
#pragma once

#include "subspan/views.hpp"

namespace subspan {

/// mean[j] and scatter[j] = sum_i (x_ij - mean_j)², in double: two passes over a strip of columns while it is in cache,
/// one over memory.
template <class T> void column_moments(MatrixView<const T> x, double *mean, double *scatter);

} // namespace subspan
