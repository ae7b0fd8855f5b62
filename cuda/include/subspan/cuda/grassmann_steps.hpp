// Steps on stacks of points of the Grassmann manifold on a device: one block a point, k up to 32.
#pragma once

#include "subspan/cuda/types.hpp"

namespace subspan::cuda {

using subspan::Retraction;
inline constexpr std::int64_t kGrassmannWidth = 32;

/// buffer = momentum · buffer + weight · grad (no buffer: grad takes its place); u moves by -lr times its part tangent at u, and with
/// `parallel` the buffer moves along. In place; float32 or float64. A point that is not orthonormal, or whose step is not finite, stays
/// as it was, and its buffer too. Bytes: u and grad and buffer read, u and buffer written, once from memory (twice from the cache); 8 n k²
/// flops. Bit-identical from run to run.
struct SgdOptions {
    double lr = 0, momentum = 0, weight = 1;
    Retraction retraction = Retraction::exp;
    bool parallel = false;
};
void sgd_step(const Context &context, const Stack &u, const Stack &grad, const Stack *buffer, const SgdOptions &o);

/// g = the part of grad tangent at u; first = beta1 first + (1 - beta1) g; second (1 x 1 for each point) = beta2 second + (1 - beta2) ‖g‖²; u moves
/// by -lr times the tangent part of first / (1 - beta1^step), over √(second / (1 - beta2^step)) + eps. In place, float32 or float64; what is
/// not finite changes nothing, as in sgd_step. Bytes: u twice, grad and first twice read, u and first written. Workspace: a double a point.
struct AdamOptions {
    double lr = 0, beta1 = 0.9, beta2 = 0.999, eps = 1e-8;
    std::int64_t step = 1; // counts from 1
    Retraction retraction = Retraction::exp;
    bool parallel = false;
};
void adam_step(const Context &context, const Stack &u, const Stack &grad, const Stack &first, const Stack &second, const AdamOptions &o);
std::int64_t adam_step_workspace(const Stack &u);

/// out = v, tangent at u, moved in parallel along the geodesic that leaves u with velocity h, to time t. Parts of h and v along u are taken off.
/// out may be v.
void transport(const Context &context, const Stack &u, const Stack &h, const Stack &v, double t, const Stack &out);

/// out = the retraction of t·h at u (a part of h along u is taken off); NaN where u is not orthonormal or h is not finite. out may be u
/// or h. An arc of θ radians loses θ² eps.
void retract(const Context &context, const Stack &u, const Stack &h, double t, Retraction method, const Stack &out);

/// out = (I - u uᵀ) g; out may be g.
void tangent(const Context &context, const Stack &u, const Stack &g, const Stack &out);

} // namespace subspan::cuda
