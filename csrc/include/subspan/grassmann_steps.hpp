// Optimiser steps on stacks of points of the Grassmann manifold, in place: momentum, projection, k x k core and retraction
// in two sweeps over each class, which stays in cache between them.
#pragma once

#include "subspan/grassmann.hpp"
#include "subspan/options.hpp"
#include "subspan/views.hpp"

#include <cstdint>

namespace subspan {

/// buffer = momentum · buffer + (1 - dampening) · grad; u moves by -lr times its part tangent at u. Without a buffer the
/// gradient takes its place. Cost 8 n k² flops, in two sweeps over each class, which stays in cache between them; the check
/// reads all three arrays once more.
template <class T>
void sgd_step(const StackView<T> &u, const StackView<const T> &grad, const StackView<T> *buffer, double momentum, double dampening, const StepOptions &options);

/// The same with Adam's moments of the Riemannian gradient: `first` like u, `second` (1 x 1 for each class) of its squared
/// norm (Bécigneul and Ganea, ICLR 2019); `step` counts from 1. Cost 17 n k² flops.
template <class T>
void adam_step(const StackView<T> &u, const StackView<const T> &grad, const StackView<T> &first, const StackView<T> &second, std::int64_t step, double beta1,
               double beta2, double eps, const StepOptions &options);

} // namespace subspan
