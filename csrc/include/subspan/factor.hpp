// Orthonormal bases and small dense factorisations: what the streaming and one-shot decompositions share.
#pragma once

#include "subspan/views.hpp"

#include <cstdint>

namespace subspan {

/// X = L Q by rows, in place: `x` (l x n, contiguous rows) becomes Q with orthonormal rows, `lower` (l x l, row-major,
/// may be null) the factor L. Shifted Cholesky QR (Fukaya et al., SIAM J. Sci. Comput. 42, 2020) repeated until the
/// measured loss of orthogonality is at working precision; rows that Cholesky cannot separate go to Householder QR, so
/// rank-deficient input gets an orthonormal completion. Needs l <= n.
template <class T> void lq_rows(MatrixView<T> x, double *lower);

/// Cholesky factor of the symmetric n x n `a` (row-major, lower triangle used) in place; the strict upper triangle is
/// zeroed. A pivot not above `floor` times the diagonal entry it started from marks a row that depends on the rows
/// before it: its pivot and column are set to zero. Returns the number of such rows.
std::int64_t cholesky(std::int64_t n, double *a, double floor);

/// Cholesky factor with diagonal pivoting of the symmetric positive semidefinite n x n `a` (row-major, both triangles,
/// destroyed): a[order[i], order[j]] = (L Lᵀ)[i, j] up to `left`, the largest diagonal entry not factored. Stops when
/// that is at most `tolerance`. L is n x n with the strict upper triangle and the columns past the rank zero. Returns
/// the rank. (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 10.3.)
std::int64_t pivoted_cholesky(std::int64_t n, double *a, double tolerance, double *l, std::int64_t *order, double *left);

/// Inverse of a lower triangular matrix (row-major n x n) into `inverse`; rows and columns of zero pivots become zero.
void invert_lower(std::int64_t n, const double *l, double *inverse);

/// SVD of a small m x n matrix (row-major doubles): singular values (min(m, n), descending), the left vectors as
/// columns of `u` (m x p) and the right ones as rows of `vt` (p x n); either may be null.
void small_svd(std::int64_t m, std::int64_t n, const double *a, double *s, double *u, double *vt);

} // namespace subspan
