// Rows in the coordinates of an affine subspace, mean + span of the rows of V, and back. The mean is in double.
#pragma once

#include "subspan/views.hpp"

namespace subspan {

/// Z (m x k) = (X - mean) Vᵀ; mean (n) may be null. Rows are centred before they are multiplied: where the mean is large
/// against what is left, X Vᵀ - mean Vᵀ would cancel. V has contiguous rows, k x n. Cost 2 m n k flops.
template <class T> void affine_coordinates(MatrixView<const T> x, const double *mean, const T *v, std::int64_t k, MatrixView<T> z);

/// The same of CSR rows, whose products are summed in double when there is a mean. Cost 2 nnz k flops and a transposed copy
/// of V.
template <class T> void affine_coordinates(const CsrView<T> &x, const double *mean, const T *v, std::int64_t k, MatrixView<T> z);

/// X (m x n) = Z V + mean.
template <class T> void affine_points(MatrixView<const T> z, const double *mean, const T *v, std::int64_t n, MatrixView<T> x);

/// Squared distances of the rows of X to the subspace, by explicit subtraction: accurate also when they are tiny. V has
/// orthonormal rows. 4 m n k flops, work memory of 64 rows.
template <class T> void affine_residuals(MatrixView<const T> x, const double *mean, const T *v, std::int64_t k, T *out);
template <class T> void affine_residuals(const CsrView<T> &x, const double *mean, const T *v, std::int64_t k, T *out);

} // namespace subspan
