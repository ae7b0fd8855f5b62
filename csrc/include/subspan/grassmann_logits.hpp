// The classification head of Grassmann Class Representation (Xiong et al., ICCV 2023): a class is a subspace, its logit the
// length of the projection of the normalised feature.
#pragma once

#include "subspan/views.hpp"

#include <cstdint>

namespace subspan {

/// out[b, c] = scale · ‖U_cᵀ x_b‖ / ‖x_b‖ for x (batch x n) and a stack u of classes (n x k); zero for a zero feature. The
/// projections, batch x classes x k, exist a tile at a time, unless `projections` keeps U_cᵀ x_b / ‖x_b‖ (batch · classes · k
/// numbers one after the other). Cost 2 batch n classes k flops.
template <class T> void grassmann_logits(MatrixView<const T> x, const StackView<const T> &u, double scale, MatrixView<T> out, T *projections = nullptr);

/// Gradients of Σ grad · logits: dx (batch x n) and du, a stack like u (the Euclidean gradient). Where a projection is zero
/// its length has no gradient, and zero is taken. Cost 6 batch n classes k flops, 4 with the projections that the logits kept.
template <class T>
void grassmann_logits_backward(MatrixView<const T> grad, MatrixView<const T> x, const StackView<const T> &u, double scale, MatrixView<T> dx,
                               const StackView<T> &du, const T *projections = nullptr);

} // namespace subspan
