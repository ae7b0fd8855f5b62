// What makes a projector of any basis, full rank or not. Needs cuBLAS; never waits for the device.
#pragma once

#include "subspan/cuda/types.hpp"

namespace subspan::cuda {

/// out (k x k; float32, or float64 for float64) = (VᵀV)⁺, so that V out Vᵀ projects onto the span of V (n x k, any floating dtype). Directions
/// below 2e-6 of the largest singular value (1e-15 in float64, where V itself is rotated) count as none. NaN in V makes out NaN.
/// 2 n k² flops in float64, and rotations of k x k matrices, all matrices of the stack in one launch.
void gram_core(const Context &context, const Stack &v, const Stack &out);
std::int64_t gram_core_workspace(const Stack &v, int device);

/// out (n x k, the dtype of V) = an orthonormal basis of the span of V, with columns of zeros where the rank is lower.
void range_basis(const Context &context, const Stack &v, const Stack &out);
std::int64_t range_basis_workspace(const Stack &v, int device);

} // namespace subspan::cuda
