// Symmetric rank-b update of second moments, in double.
#pragma once

#include "subspan/views.hpp"

#include <cstdint>
#include <limits>

namespace subspan {

/// Rows and columns that the moments of n columns are stored with: whole tiles of every vector width.
inline std::int64_t moments_stride(std::int64_t n) { return (n + 95) / 96 * 96; }

/// c += Σ f_i (x_i - shift)(x_i - shift)ᵀ, sum += Σ f_i (x_i - shift) and squares += Σ f_i (x_i - shift)² of each column (either
/// null: not wanted), for the rows of x (b x n) with factors f (null: ones) and a shift of n entries (null: zero). The lower triangle of `c` is meant, of moments_stride(n) rows and columns; what is
/// above it is work space.
///
/// With Product = float the products of 256 rows are added in float, and those sums in double; else all is in double. The
/// order of the sums depends on the shape alone. Cost b n² flops, one pass over x.
///
/// Returns how many rows it has taken: all of them, or those before the trace would have grown by more than `allowance`.
template <class T, class Product>
std::int64_t add_moments(MatrixView<const T> x, const double *factors, const double *shift, double *c, double *sum, double *squares,
                         double allowance = std::numeric_limits<double>::infinity());

/// The same for CSR rows without a shift: what is not stored costs nothing.
template <class T> void add_moments(const CsrView<T> &x, const double *factors, std::int64_t n, double *c, double *sum);

} // namespace subspan
