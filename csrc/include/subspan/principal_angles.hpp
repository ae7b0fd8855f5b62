// Angles between subspaces, exact at both ends of [0, π/2], and the distances made of them.
#pragma once

#include "subspan/grassmann.hpp"
#include "subspan/options.hpp"
#include "subspan/views.hpp"

#include <cstdint>

namespace subspan {

/// Ascending principal angles between the spans of u and w (both n x k), as 1 x k matrices. p and q (n x k), when not null,
/// become the principal vectors: orthonormal bases of both spans with pᵀq = diag(cos θ). Angles come from cosines above π/4 and from the singular values of (I - UUᵀ)W below (Björck
/// and Golub, Math. Comput. 27, 1973): the absolute error is a few eps at every angle. Cost 4 n k² flops with the
/// check of both, 5 n k² more where some angle is below π/4, and a QR factorisation where such sines differ by more than ten.
template <class T>
void principal_angles(const StackView<const T> &u, const StackView<const T> &w, const StackView<T> &angles, const StackView<T> *p, const StackView<T> *q,
                      Checks checks);

/// One distance for each pair, as 1 x 1 matrices.
template <class T> void subspace_distance(const StackView<const T> &u, const StackView<const T> &w, Distance kind, const StackView<T> &out, Checks checks);

} // namespace subspan
