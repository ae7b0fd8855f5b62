// The leading eigenpairs of a small dense symmetric matrix: the small problem that every streaming update solves.
#pragma once

#include <cstdint>

namespace subspan {

/// The k largest eigenvalues (descending) of the symmetric n x n matrix whose lower triangle is in the row-major `g`,
/// and their orthonormal eigenvectors as the rows of `vectors` (k x n). `g` is not changed. `all`, where it is not null,
/// gets all n eigenvalues, ascending.
///
/// T is the precision of the reduction to tridiagonal form and of the vectors; the tridiagonal problem is solved in
/// double. Eigenvalues carry an absolute error of a few eps(T)·‖g‖. Cost 4/3 n³ + 2 n² k flops and a little.
/// Throws LinAlgError when g holds NaN or infinity.
template <class T> void eigh_top(std::int64_t n, std::int64_t k, const double *g, double *values, T *vectors, double *all = nullptr);

/// The k largest eigenvalues (descending) of diag(d) + z zᵀ, of order n, and their orthonormal eigenvectors as the rows of
/// `vectors` (k x n). Roots of the secular equation with vectors after Gu and Eisenstat (1994): O(n²), and a product of k x n
/// by n x n.
void rank_one_top(std::int64_t n, std::int64_t k, const double *d, const double *z, double *values, double *vectors);

/// All eigenvalues (ascending) of the symmetric tridiagonal matrix with diagonal d and off-diagonal e, and the
/// eigenvectors of the k largest as rows of `vectors` (k x n), the largest last. d and e hold n items each (the last of
/// e is work space) and are overwritten.
/// Divide and conquer: Cuppen (1981) with the stable vectors of Gu and Eisenstat (SIAM J. Matrix Anal. 16, 1995).
void tridiagonal_top(std::int64_t n, std::int64_t k, double *d, double *e, double *values, double *vectors);

/// The k largest eigenvalues (ascending) of the symmetric tridiagonal matrix with diagonal d (n) and off-diagonal e (n - 1),
/// and their eigenvectors as the rows of `vectors`, orthonormal to a few eps. Values by counts of Sturm sequences to
/// `within` of the norm, vectors by inverse iteration (Peters and Wilkinson 1979). False, where the matrix is zero or near the
/// ends of the range, or a vector did not come out: divide and conquer is the way then. Cost O(n k).
bool tridiagonal_few(std::int64_t n, std::int64_t k, const double *d, const double *e, double within, double *values, double *vectors);

} // namespace subspan
