// Maps of points and tangents of the Grassmann manifold on a device: one block a point, k up to 32. float32 or float64, sums in float64;
// bit-identical from run to run.
#pragma once

#include "subspan/cuda/types.hpp"

namespace subspan::cuda {

using subspan::Retraction;
inline constexpr std::int64_t kGrassmannWidth = 32;

/// out = (I - u uᵀ) g; out may be g.
void tangent(const Context &context, const Stack &u, const Stack &g, const Stack &out);

/// out = the retraction of t·h at u (a part of h along u is taken off); NaN where u is not orthonormal or h is not finite. out may be u
/// or h. An arc of θ radians loses θ² eps.
void retract(const Context &context, const Stack &u, const Stack &h, double t, Retraction method, const Stack &out);

/// out = v, tangent at u, moved in parallel along the geodesic that leaves u with velocity h, to time t. Parts of h and v along u are taken off.
/// out may be v.
void parallel_transport(const Context &context, const Stack &u, const Stack &h, const Stack &v, double t, const Stack &out);

/// out = (W - U UᵀW) Y (Θ / sin Θ) Xᵀ, the shortest tangent at u whose geodesic reaches the span of w (Bendokat, Zimmermann and Absil, Adv.
/// Comput. Math. 50, 2024, algorithm 5.3); out may be w. Two reads, one write, 6 n k² flops.
void grassmann_log(const Context &context, const Stack &u, const Stack &w, const Stack &out);

} // namespace subspan::cuda
