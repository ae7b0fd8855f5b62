// What algebra of spaces needs on a device: singular values of tall factors, and rotations from one direction to another. Never waits for
// the device.
#pragma once

#include "subspan/cuda/types.hpp"

namespace subspan::cuda {

/// Singular values (1 x l, double, descending) of the columns of `a` (n x l, l <= n; float32 or float64) by rotations of the columns
/// themselves, which keep small values whole. `left` (n x l) gets the left vectors, columns of zeros where there is no value; `right`
/// (l x l) the right ones as columns, likewise. Either may be without data. `unit_columns`: columns are taken at unit length first. NaN in `a`
/// makes values NaN.
void column_svd(const Context &context, const Stack &a, const Stack &values, const Stack &left, const Stack &right, bool unit_columns = false);
std::int64_t column_svd_workspace(const Stack &a, int device);

/// The rotation of smallest angle that takes the direction of `source` to that of `target` (1 x n each) as I + V M Vᵀ: v is n x 2, m 2 x 2; all
/// but v float32, or float64 where v is.
/// NaN where one is zero or not finite, or where they are opposite and no plane is preferred.
void rotation(const Context &context, const Stack &source, const Stack &target, const Stack &v, const Stack &m);
std::int64_t rotation_workspace(const Stack &source);

} // namespace subspan::cuda
