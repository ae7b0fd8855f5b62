#pragma once

#include <cstdint>

namespace subspan {

/// The k largest eigenvalues (ascending) of the symmetric tridiagonal matrix with diagonal d (n) and off-diagonal e (n - 1),
/// and their eigenvectors as the rows of `vectors`, orthonormal to a few eps. Values by counts of Sturm sequences to
/// `within` of the norm, vectors by inverse iteration (Peters and Wilkinson 1979). False, where the matrix is zero or near the
/// ends of the range, or a vector did not come out: divide and conquer is the way then. Cost O(n k).
bool tridiagonal_few(std::int64_t n, std::int64_t k, const double *d, const double *e, double within, double *values, double *vectors);

} // namespace subspan
