// QR by Householder reflections, whose Q is kept as I - V T Vᵀ, and its action. See householder.hpp for reflections that are given.
#pragma once

#include "subspan/apply_core.hpp"
#include "subspan/views.hpp"

#include <cstdint>

namespace subspan {

/// Columns of a block of reflections in a factored Q.
inline constexpr std::int64_t kReflectionBlock = 128;

/// A = Q R for a stack of m x n matrices, k = min(m, n). `v` (m x k, contiguous rows) becomes unit lower trapezoidal,
/// `r` (k x n, contiguous rows) upper trapezoidal, `tau` (1 x k) LAPACK's factors, and `t` (k x min(k, 128)) the
/// upper triangular T of each block of 128 reflections, one under the other. Signs are LAPACK's. `a` may have any
/// strides and must not overlap the outputs. NaN and infinity throw ValueError. Cost 2 n² (m - n/3) flops.
template <class T>
void householder_qr(const StackView<const T> &a, const StackView<T> &v, const StackView<T> &r, const StackView<T> &tau, const StackView<T> &t);

/// The same with columns in the order of what is left of them: column i of Q R is column order[i] of A, and the diagonal of
/// R does not grow, so that it shows the rank. `order` has n entries for each matrix. By LAPACK's geqp3.
template <class T>
void householder_qr_pivoted(const StackView<const T> &a, const StackView<T> &v, const StackView<T> &r, const StackView<T> &tau, const StackView<T> &t,
                            std::int64_t *order);

/// out = Q C, QᵀC (transpose), C Q or C Qᵀ (side right) from the factors of householder_qr; `out` may be C.
template <class T>
void factored_apply(const StackView<const T> &v, const StackView<const T> &t, const StackView<const T> &c, Side side, bool transpose, const StackView<T> &out,
                    bool check = true);

/// The first q.cols() columns of Q (m x m), which must be at least k.
template <class T> void factored_array(const StackView<const T> &v, const StackView<const T> &t, const StackView<T> &q);

} // namespace subspan
