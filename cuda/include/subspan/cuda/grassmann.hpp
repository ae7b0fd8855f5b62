// Steps on stacks of points of the Grassmann manifold on a device: one block a point, k up to 32.
#pragma once

#include "subspan/cuda/types.hpp"

namespace subspan::cuda {

inline constexpr std::int64_t kGrassmannWidth = 32;

/// As subspan::Retraction.
enum class Retraction { exp, cholesky, polar, qr, cayley };

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

/// out = the retraction of t·h at u (a part of h along u is taken off); NaN where u is not orthonormal or h is not finite. out may be u
/// or h. An arc of θ radians loses θ² eps.
void retract(const Context &context, const Stack &u, const Stack &h, double t, Retraction method, const Stack &out);

/// out = (I - u uᵀ) g; out may be g.
void tangent(const Context &context, const Stack &u, const Stack &g, const Stack &out);

} // namespace subspan::cuda
