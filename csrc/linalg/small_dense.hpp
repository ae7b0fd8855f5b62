// Dense k x k kernels in double: the small factors of Grassmann maps. A matrix is stored with order(k) rows of order(k) entries,
// row-major, zero past k, so that every loop runs over whole vectors. Tens of thousands of them are solved a second, one
// for each class of a stack: a call of LAPACK on 8 x 8 costs more than the sweeps over the class.
#pragma once

#include <cstdint>

namespace subspan::small {

using std::int64_t;

/// Rows and row length of a stored matrix.
inline int64_t order(int64_t k) { return (k + 7) / 8 * 8; }
inline int64_t area(int64_t k) { return order(k) * order(k); }

/// c = aᵀ b; for a symmetric `a` its product. c must not be an argument. 2 k³ flops.
void multiply_tn(int64_t k, const double *a, const double *b, double *c);
/// c = a b, with k² of work memory.
void multiply(int64_t k, const double *a, const double *b, double *c);
void transpose(int64_t k, const double *a, double *out);
void identity(int64_t k, double *a);

/// Largest sum of magnitudes of a row: at least the spectral radius.
double row_norm(int64_t k, const double *a);
/// The lesser of that and of Frobenius' norm; NaN where an entry is.
double bound_of_norm(int64_t k, const double *a);
/// Largest magnitude; NaN where an entry is NaN or infinite.
double largest(int64_t k, const double *a);

/// Of a symmetric positive semidefinite x: cos √x, sin √x / √x, (1 - cos √x) / x, whichever are not null, all of them entire
/// functions of x. Up to a norm of kSeries by their Taylor series, which need no eigenvectors; `tolerance` is the largest term
/// left out. Beyond it by those: rounding of x is felt in full, so x should be at most kEntire.
inline constexpr double kSeries = 4.0, kEntire = 36.0;
void trigonometric(int64_t k, const double *x, double tolerance, double *cosine, double *sinc, double *versine);

/// θ / (sin θ cos θ) of a symmetric positive semidefinite x = sin² θ with row norm at most kArc, by its Taylor series.
inline constexpr double kArc = 0.5;
void arc(int64_t k, const double *x, double tolerance, double *out);

/// (I + x)^(-1/2) of a symmetric x with spectrum in [-1/2, kSeries], by the coupled Newton iteration (Higham, Functions of
/// Matrices, section 6.7).
void inverse_sqrt(int64_t k, const double *x, double *out);

/// I + x = RᵀR with an upper triangular R; `out` = R⁻¹. x must be positive semidefinite.
void inverse_cholesky(int64_t k, const double *x, double *out);

/// a = Σ_i x_i s_i y_iᵀ by one-sided Jacobi rotations: s descending, x_i and y_i as rows (null: not wanted). Vectors are
/// orthonormal also where s is zero. Values carry an absolute error of a few eps s_1, or of `accuracy` s_1, to which x_i are
/// orthogonal, where that is more: a matrix that was summed in float deserves no better. O(k³) flops, five to ten sweeps.
void svd(int64_t k, const double *a, double *s, double *xt, double *yt, double accuracy = 0);

} // namespace subspan::small
