// The kernel of a step, a block a point, and what maps and optimisers make of it. Callers have checked shapes; u is not empty.
#pragma once

#include "grassmann/points.cuh"
#include "subspan/cuda/grassmann_steps.hpp"

namespace subspan::cuda {

/// A step with momentum, in place.
void momentum_step(const Session &s, const Stack &u, const Stack &grad, const Stack *buffer, double momentum, double dampening, const StepOptions &options);

/// out = the retraction of t·h at u.
void retract_points(const Session &s, const Stack &u, const Stack &h, double t, Retraction method, const Stack &out);

/// out = (I - u uᵀ) g.
void tangent_points(const Session &s, const Stack &u, const Stack &g, const Stack &out);

/// Each point of u moves by scales[i] times the tangent part of its moment, which moves along if `parallel`; where that is NaN all stays.
void scaled_step(const Session &s, const Stack &u, const Stack &moment, const double *scales, Retraction method, bool parallel);
/// ValueError where a step needs more shared memory than a block may have.
void require_step_fits(const Session &s, const Stack &u, bool parallel);

/// out = the geodesic from u along h, at the time times[i] for each point.
void timed_exp(const Session &s, const Stack &u, const Stack &h, const double *times, const Stack &out);

} // namespace subspan::cuda
