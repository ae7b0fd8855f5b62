// Householder reflections H = I - tau v vᵀ that are given: their products, their action and their gradients. All of
// them work on the compact WY form H_1 ... H_k = I - V T Vᵀ with T = (I + D S)⁻¹ D, D = diag(tau), S the strict upper
// triangle of VᵀV (Schreiber and Van Loan, SIAM J. Sci. Stat. Comput. 10, 1989); no reflection is applied by itself and
// nothing is divided by tau.
#pragma once

#include "subspan/apply_core.hpp"
#include "subspan/views.hpp"

#include <cstdint>

namespace subspan {

/// Reflections that the caller gives: V is m x k and used as it is; `tau` (1 x k), or null for unit reflections
/// I - 2 v vᵀ / vᵀv, where a zero column is the identity. Gradients go to the shape of their argument: axes along which
/// it was broadcast are summed.
template <class T> struct Reflections {
    StackView<const T> v;
    const StackView<const T> *tau = nullptr;
};

/// out = H C (side left) or C H with H = H_1 ... H_k, or its transpose. `out` may be C. Cost (4 n + 128) m k flops.
template <class T>
void householder_apply(const Reflections<T> &h, const StackView<const T> &c, Side side, bool transpose, const StackView<T> &out, bool check = true);

/// Gradients of householder_apply: dv (contiguous rows), dtau (may be null) and dc, whose leading axes are those of C.
/// Cost about 12 m n k flops.
template <class T>
void householder_apply_backward(const Reflections<T> &h, const StackView<const T> &c, const StackView<const T> &grad, Side side, bool transpose,
                                const StackView<T> &dv, const StackView<T> *dtau, const StackView<T> &dc, bool check = true);

/// q = the first min(m, k) columns of H_1 ... H_k. Cost 3 m k² flops.
template <class T> void householder_product(const Reflections<T> &h, const StackView<T> &q, bool check = true);

/// Its gradients. Cost 9 m k² flops and a few k³.
template <class T>
void householder_product_backward(const Reflections<T> &h, const StackView<const T> &grad, const StackView<T> &dv, const StackView<T> *dtau, bool check = true);

} // namespace subspan
