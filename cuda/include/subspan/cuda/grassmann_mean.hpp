// Karcher means of stacks of points on a device, an iteration of all means at a time.
#pragma once

#include "subspan/cuda/types.hpp"

namespace subspan::cuda {

enum class MeanStatus { running, converged, stopped, not_finite };

/// What goes from one iteration to the next, all of it in the caller's memory. `numbers` are rows of one double for each mean: the step's
/// length, variance, norm of the gradient, iterations, and a MeanStatus; the other rows are work.
struct MeanIteration {
    Stack u;                // points x means: n x k, float32 or float64
    Stack mean_of_each;     // the means, over the same leading axes
    Stack mean, direction;  // contiguous; the means, and Σ w log(mean, U) there
    Stack next, trial;      // contiguous work
    Stack logs;             // contiguous, of the shape of u
    const double *weights;  // of the points, with a sum of one, on the device
    double *numbers;
    double tolerance = 0;
    std::int64_t limit = 0;
};
std::int64_t mean_rows(const Stack &mean);

/// Variance and gradient where the means begin.
void mean_begin(const Context &context, const MeanIteration &m);
/// A step of each mean that still runs: along the geodesic, halved where the variance grew (Afsari, Tron and Vidal, SIAM J. Control Optim. 51,
/// 2013). Those that have ended stay. Never waits. 12 n k² flops a point.
void mean_iterate(const Context &context, const MeanIteration &m);

} // namespace subspan::cuda
