// What the kernel of pairs of points finds beside their angles.
#pragma once

#include "grassmann/points.cuh"

namespace subspan::cuda {

/// out = the shortest tangent at u whose geodesic reaches the span of w. Callers have checked shapes; u is not empty.
void log_points(const Session &s, const Stack &u, const Stack &w, const Stack &out);

} // namespace subspan::cuda
