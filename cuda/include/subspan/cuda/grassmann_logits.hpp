// The class head of Grassmann Class Representation on a device (Xiong et al., ICCV 2023). Needs cuBLAS; float32 or float64.
#pragma once

#include "subspan/cuda/types.hpp"

namespace subspan::cuda {

/// out (batch x classes) = scale · ‖U_cᵀ x‖ / ‖x‖ for x (batch x n) and a stack u of classes (n x k); zero for a zero feature. Projections of
/// as many classes as fit a quarter of a gigabyte exist at a time, and transposed copies of classes that are not one matrix stored by columns.
/// `projections`, where given, keeps U_cᵀ x / ‖x‖, batch · classes · k items of the dtype of x one after the other. 2 batch n classes k flops.
void grassmann_logits(const Context &context, const Stack &x, const Stack &u, double scale, const Stack &out, void *projections = nullptr);

/// dx (batch x n) and du, a stack like u with unit stride along rows or columns. Where a projection is zero its length has no gradient, and
/// zero is taken. 6 batch n classes k flops, 4 with the projections that the logits kept.
void grassmann_logits_backward(const Context &context, const Stack &grad, const Stack &x, const Stack &u, double scale, const Stack &dx, const Stack &du,
                               const void *projections = nullptr);

std::int64_t grassmann_logits_workspace(const Stack &x, const Stack &u, bool backward, int device);

} // namespace subspan::cuda
