// Any number of given reflections on a device, and gradients: all of it products of matrices around the core N = -T of
// H_1 ... H_k = I + V N Vᵀ. Needs cuBLAS; never waits for the device. float32 or float64; leading axes are those of the result.
#pragma once

#include "subspan/cuda/types.hpp"

namespace subspan::cuda {

/// q (m x q columns) = the first columns of I + V N Vᵀ. 2 m k q flops.
void reflection_product(const Context &context, const Stack &v, const Stack &core, const Stack &q);
std::int64_t reflection_product_workspace(const Stack &v, const Stack &q, int device);

/// Adds to dv (m x k, contiguous rows) and to dtau (1 x k; null without tau), which are zero before; axes along which they are broadcast are
/// summed. `core` belongs to v and tau.
struct ReflectionGradients {
    Stack v, core, dv;
    const Stack *tau = nullptr, *dtau = nullptr;
};
/// Of reflection_product. 6 m k q flops and a few k³.
void reflection_product_backward(const Context &context, const ReflectionGradients &r, const Stack &grad);
std::int64_t reflection_product_backward_workspace(const ReflectionGradients &r, const Stack &grad, int device);

/// Of out = C + V N Vᵀ C (transpose: with Nᵀ), dc too. 10 m n k flops, 4 m k² and a few k³. Axes that v and dv lack are one item after the other.
void reflection_apply_backward(const Context &context, const ReflectionGradients &r, const Stack &c, const Stack &grad, bool transpose, const Stack &dc);
std::int64_t reflection_apply_backward_workspace(const ReflectionGradients &r, const Stack &c, int device);

} // namespace subspan::cuda
