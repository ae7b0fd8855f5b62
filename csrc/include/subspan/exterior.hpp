// Exterior algebra on stacks: Plücker coordinates, wedges, relations, bases, Hodge complements, and their gradients.
// A k-vector of Rⁿ is a row of C(n, k) numbers, subsets in lexicographic order. Arithmetic is in double.
#pragma once

#include "subspan/views.hpp"

#include <cstdint>

namespace subspan {

/// C(n, k), or -1 where it is more than 2^31: no array here is as long.
std::int64_t binomial(std::int64_t n, std::int64_t k);

// Items of a stack are 1 x C(n, k) for k-vectors and n x k for matrices. Functions return false where finite input gave
// what T cannot hold, and throw ValueError where the tables of a product would take more than some gigabytes.

/// out = all k x k minors of A (n x k). Column by column, p_q = p_{q-1} ∧ a_q: Σ_q q C(n, q) products. Where that passes
/// through more than 4096 numbers and k > n / 2, through the orthogonal complement instead, with n - k for k.
template <class T> bool plucker_coordinates(const StackView<const T> &a, const StackView<T> &out);
template <class T> bool plucker_coordinates_backward(const StackView<const T> &grad, const StackView<const T> &a, const StackView<T> &da);

/// out = a ∧ b of a k-vector and an l-vector. C(n, k + l) C(k + l, k) products.
template <class T>
bool wedge(const StackView<const T> &a, const StackView<const T> &b, std::int64_t n, std::int64_t k, std::int64_t l, const StackView<T> &out);
template <class T>
bool wedge_backward(const StackView<const T> &grad, const StackView<const T> &a, const StackView<const T> &b, std::int64_t n, std::int64_t k, std::int64_t l,
                    const StackView<T> &da, const StackView<T> &db);

/// out (C(n, k - 1) x C(n, k + 1)), entry (I, J) = Σ_t (-1)^t p(I, j_t) p(J without j_t): zero if and only if p is a wedge
/// of k vectors.
template <class T> bool plucker_relations(const StackView<const T> &p, std::int64_t n, std::int64_t k, const StackView<T> &out);
template <class T>
bool plucker_relations_backward(const StackView<const T> &grad, const StackView<const T> &p, std::int64_t n, std::int64_t k, const StackView<T> &dp);

/// out (n x k): the orthonormal basis with coordinates p / ‖p‖, from the chart around the largest |p_I|. Returns the first
/// item that is zero or not finite, or -1.
template <class T> std::int64_t plucker_basis(const StackView<const T> &p, std::int64_t n, std::int64_t k, const StackView<T> &out);
/// The gradient for functions of the subspace: what `grad` (n x k) has along the basis itself is left out. p must be a wedge
/// of k vectors. Returns as plucker_basis, or -2 where finite input gave what T cannot hold.
template <class T>
std::int64_t plucker_basis_backward(const StackView<const T> &grad, const StackView<const T> &p, std::int64_t n, std::int64_t k, const StackView<T> &dp);

/// The sign of the permutation (I, complement of I), for every I.
void complement_signs(std::int64_t n, std::int64_t k, double *out);

} // namespace subspan
