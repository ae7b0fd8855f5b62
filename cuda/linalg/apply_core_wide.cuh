#pragma once

#include "subspan/cuda/apply_core.hpp"
#include "subspan/cuda/launch.cuh"

namespace subspan::cuda {

/// The left form for any k; the call was checked and transposed already.
template <class T> void apply_core_wide(const Session &s, const Context &context, const CoreCall &call, const CoreOptions &o);
int64_t apply_core_wide_room(const CoreCall &call, const CoreOptions &o, int device);

} // namespace subspan::cuda
