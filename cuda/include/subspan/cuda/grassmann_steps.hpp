// Steps on stacks of points of the Grassmann manifold on a device: one block a point, k up to 32.
#pragma once

#include "subspan/cuda/grassmann.hpp"

namespace subspan::cuda {

using subspan::StepOptions;

/// buffer = momentum · buffer + (1 - dampening) · grad (no buffer: grad takes its place); u moves by -lr times its part tangent at u, and with
/// `parallel` the buffer moves along. In place; float32 or float64. A point that is not orthonormal, or whose step is not finite, stays
/// as it was, and its buffer too. Bytes: u and grad and buffer read, u and buffer written, once from memory (twice from the cache); 8 n k²
/// flops. Bit-identical from run to run.
void sgd_step(const Context &context, const Stack &u, const Stack &grad, const Stack *buffer, double momentum, double dampening, const StepOptions &options);

/// g = the part of grad tangent at u; first = beta1 first + (1 - beta1) g; second (1 x 1 for each point) = beta2 second + (1 - beta2) ‖g‖²; u moves
/// by -lr times the tangent part of first / (1 - beta1^step), over √(second / (1 - beta2^step)) + eps. In place, float32 or float64; what is
/// not finite changes nothing, as in sgd_step. Bytes: u twice, grad and first twice read, u and first written. Workspace: a double a point.
void adam_step(const Context &context, const Stack &u, const Stack &grad, const Stack &first, const Stack &second, std::int64_t step, double beta1,
               double beta2, double eps, const StepOptions &options);
std::int64_t adam_step_workspace(const Stack &u);

} // namespace subspan::cuda
