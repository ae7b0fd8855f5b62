// Maps of the Grassmann manifold Gr(k, n), on stacks: a point is the span of an orthonormal U (n x k), a tangent at it an
// H with UᵀH = 0. With X = t² HᵀH every curve used here is U C(X) + t H S(X), two k x k functions of the Gram matrix:
// nothing is ever n x n, and U and H are read twice. Formulas: Edelman, Arias and Smith, SIAM J. Matrix Anal. Appl. 20
// (1998); Absil, Mahony and Sepulchre, Optimization Algorithms on Matrix Manifolds (2008); Bendokat, Zimmermann and Absil,
// A Grassmann manifold handbook, Adv. Comput. Math. 50 (2024).
#pragma once

#include "subspan/options.hpp"
#include "subspan/views.hpp"

#include <cstdint>

namespace subspan {

/// What is verified of the points and tangents of a map; ValueError names the matrix that fails.
enum class Checks { none, points, points_and_tangents };

/// out = (I - UUᵀ) g, which makes a Euclidean gradient the Riemannian one; out may be g. Cost 4 n k² flops.
template <class T> void tangent(const StackView<const T> &u, const StackView<const T> &g, const StackView<T> &out, Checks checks);

/// out = the retraction of t·h at u; out may be u. A part of h along u is projected out. Cost 8 n k² flops.
template <class T> void retract(const StackView<const T> &u, const StackView<const T> &h, double t, Retraction method, const StackView<T> &out, Checks checks);

/// out = v, a tangent at u, moved in parallel along the geodesic from u in direction h, to time t. out may be v.
template <class T>
void parallel_transport(const StackView<const T> &u, const StackView<const T> &h, const StackView<const T> &v, double t, const StackView<T> &out,
                        Checks checks);

/// out = the tangent at u whose geodesic is at the span of w at time 1, the shortest one; where a principal angle is π/2
/// (the cut locus) it is not unique, and one of them. Procrustes form (Bendokat, Zimmermann and Absil, algorithm 5.3).
template <class T> void grassmann_log(const StackView<const T> &u, const StackView<const T> &w, const StackView<T> &out, Checks checks);

/// out = (I - UUᵀ) ehess - H Uᵀ egrad: the Riemannian Hessian of a function with Euclidean gradient egrad along h, from the
/// Euclidean one's product ehess with h.
template <class T>
void riemannian_hessian(const StackView<const T> &u, const StackView<const T> &egrad, const StackView<const T> &ehess, const StackView<const T> &h,
                        const StackView<T> &out, Checks checks);

/// out (n x k) = an orthonormal basis of the range of the projector p (n x n): the leading eigenvectors of (p + pᵀ) / 2. With
/// `check` ValueError unless its eigenvalues are k ones and n - k zeros to √eps. Cost 4/3 n³ + 2 n² k flops, and the basis'
/// orthonormalisation.
template <class T> void projector_range(const StackView<const T> &p, const StackView<T> &out, bool check);

/// out (1 x 1 each) = tr(HᵀV), and √tr(HᵀH), summed in double; one sweep. The norm is safe from overflow of squares.
template <class T> void tangent_inner(const StackView<const T> &h, const StackView<const T> &v, const StackView<T> &out);
template <class T> void tangent_norm(const StackView<const T> &h, const StackView<T> &out);

} // namespace subspan
