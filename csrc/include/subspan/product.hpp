// Dense products of stacks of matrices, on the library's own kernels.
#pragma once

#include "subspan/views.hpp"

namespace subspan {

/// out = A B for stacks; `out` needs unit column stride. 2 m n k flops.
template <class T> void product(const StackView<const T> &a, const StackView<const T> &b, const StackView<T> &out);

/// out = A Aᵀ, exactly symmetric: n² k flops for n x k matrices.
template <class T> void outer_product(const StackView<const T> &a, const StackView<T> &out);

} // namespace subspan
