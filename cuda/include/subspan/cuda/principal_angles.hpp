// Angles between subspaces on a device, and distances made of them: one block a pair, k up to 32. Bases are taken to be orthonormal; NaN
// passes. float32 or float64 on both sides, sums in float64. Bit-identical from run to run.
#pragma once

#include "subspan/cuda/grassmann.hpp"

namespace subspan::cuda {

using subspan::Distance;

/// angles (1 x k) ascending, absolute error a few eps at every angle; p and q (n x k), where not null, the principal vectors. With
/// UᵀW Y = X C by one-sided rotations, columns of (W - U UᵀW) Y have the sines as lengths; where cosines are too close to tell Y apart, these
/// columns are rotated until they are orthogonal (Björck and Golub, Math. Comput. 27, 1973, with Jacobi's method for both decompositions).
/// Two reads of u and w, 5 n k² flops.
void principal_angles(const Context &context, const Stack &u, const Stack &w, const Stack &angles, const Stack *p, const Stack *q);

/// out (1 x 1) = one distance for each pair.
void subspace_distance(const Context &context, const Stack &u, const Stack &w, Distance kind, const Stack &out);

} // namespace subspan::cuda
