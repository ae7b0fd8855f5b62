// Copies of stacks, with a change of layout, dtype or scale, and stacks of given numbers. Never waits for the device.
#pragma once

#include "subspan/cuda/types.hpp"

namespace subspan::cuda {

/// to = factor from, entry by entry; each read and written once. Floats of any two dtypes, or bytes as they are.
void assign(const Context &context, const Stack &from, const Stack &to, double factor = 1.0);

/// to = value: of floats, or of bytes.
void fill(const Context &context, const Stack &to, double value);

/// to = columns of the identity from `first` on, and where `from` is given (then first is 0) what it holds below the diagonal: unit lower
/// trapezoidal vectors from LAPACK's packed form.
void unit_lower(const Context &context, const Stack *from, const Stack &to, std::int64_t first);

} // namespace subspan::cuda
