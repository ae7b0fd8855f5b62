// The leading eigenpairs of a symmetric positive semidefinite matrix, from vectors that are near them.
#pragma once

#include <cstdint>
#include <functional>

namespace subspan {

struct NearTop {
    std::int64_t n = 0, count = 0, wanted = 0; // the order; vectors that are carried, of which so many are to converge
    double tolerance = 0;                      // ‖H y - θ y‖ <= tolerance · θ_1 for each of those
    double flops = 0;                          // that a direct solution costs
};

/// Subspace iteration with Chebyshev filters and Rayleigh-Ritz steps (Zhou, Saad, Tiago and Chelikowsky, J. Comput. Phys. 219,
/// 2006). `times(q, out)` is out = q H for `count` rows; y (count x n) is the start, and holds the vectors afterwards, as
/// orthonormal rows in descending order of `values` (count); the first `wanted` have converged.
///
/// What the start has nothing of is never found: a start of known vectors is to hold a little of everything, such as noise.
/// Then a direction that belongs to the wanted ones is not damped, and shows in the residuals until it is among them.
///
/// False: a direct solution is cheaper, which is known after one step from the decay of the values; or the matrix is of
/// lower rank than `count`. y and values are then of no use.
bool leading_near(const NearTop &problem, const std::function<void(const double *, double *)> &times, double *y, double *values);

/// Orthonormal rows that span those of y (count x n): Cholesky QR, twice, so that order and signs stay. False: their rank is
/// lower.
bool orthonormal_rows(std::int64_t count, std::int64_t n, double *y);

} // namespace subspan
