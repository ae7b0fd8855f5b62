// Rows and an affine subspace, mean + span: what is not a product of matrices. Never waits for the device.
#pragma once

#include "subspan/cuda/types.hpp"

namespace subspan::cuda {

/// to = from + factor mean, row by row; the mean (n) and the sum are in double, so that what a large mean rounded to the dtype would
/// leave out is there. `to` may be `from`. Reads and writes each row once.
void add_mean(const Context &context, const Stack &from, const double *mean, double factor, const Stack &to);

/// out (1 x m) = squared distances of the rows of a and b, by explicit subtraction; sums in double.
void row_distances(const Context &context, const Stack &a, const Stack &b, const Stack &out);

} // namespace subspan::cuda
