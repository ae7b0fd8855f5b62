// Algebra of the spaces that columns span. Ranks are decided by singular values in double; matrices of a stack may differ in
// theirs, and results have columns of zeros past them.
#pragma once

#include "subspan/views.hpp"

#include <cstdint>

namespace subspan {

/// q (m x min(m, n), contiguous rows) = the leading left singular vectors of a (m x n), those whose singular values exceed
/// tol times the first. With `unit_columns` columns are taken at unit length first, so that the span does not depend on their
/// scales. ranks: one for each matrix. NaN and infinity, of which `name` is told, throw ValueError.
/// Cost 2 n² (m - n/3) + 2 m n min(m, n) flops and an SVD of the small factor.
template <class T> void column_space(const StackView<const T> &a, double tol, bool unit_columns, const StackView<T> &q, std::int64_t *ranks, const char *name);

/// out (n x n - k) = an orthonormal basis of all that is orthogonal to the columns of u (n x k), which are independent: the
/// last columns of the Householder Q. Cost 4 n k (n - k) flops.
template <class T> void complement(const StackView<const T> &u, const StackView<T> &out);

/// rest = W - U UᵀW, projected twice, for orthonormal U.
template <class T> void outside_of(const StackView<const T> &u, const StackView<const T> &w, const StackView<T> &rest);

/// extra (n x l) = an orthonormal basis of what the columns of w (n x l) add to those of u (n x k), both orthonormal: directions
/// whose angle to u has a sine above tol. counts: how many.
template <class T> void span_sum(const StackView<const T> &u, const StackView<const T> &w, double tol, const StackView<T> &extra, std::int64_t *counts);

/// common (n x l) = an orthonormal basis of what both spaces have: directions of w whose angle to u has a sine of at most tol,
/// from the sines themselves.
template <class T>
void span_intersection(const StackView<const T> &u, const StackView<const T> &w, double tol, const StackView<T> &common, std::int64_t *counts);

/// The largest sine of the angles of w (orthonormal, or with columns of zeros) to the span of u, for each matrix.
template <class T> void largest_sines(const StackView<const T> &u, const StackView<const T> &w, double *sines);

/// basis (s + q x k + l) = all (x, z) for which some y has (x, y) in the span of u ((s + p) x k) and (y, z) in that of
/// w ((p + q) x l), both orthonormal, p = shared.
template <class T>
void compose(const StackView<const T> &u, const StackView<const T> &w, std::int64_t shared, double tol, const StackView<T> &basis, std::int64_t *counts);

/// The rotation of smallest angle that takes the direction of `source` to that of `target`, n entries each, as
/// I + V M Vᵀ: v is n x 2, m 2 x 2. ValueError, which names them, where one is zero or not finite, or where they are
/// opposite and no plane is preferred.
template <class T> void rotation(std::int64_t n, const double *source, const double *target, MatrixView<T> v, MatrixView<T> m);

} // namespace subspan
