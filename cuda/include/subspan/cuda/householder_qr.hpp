// Householder QR of stacks of matrices on a device, and the core T of given reflections: H_1 ... H_k = I - V T Vᵀ, which
// apply_core applies from either side.
#pragma once

#include "subspan/cuda/types.hpp"

namespace subspan::cuda {

inline constexpr std::int64_t kReflections = 128;

/// A = Q R with LAPACK's signs: v (m x k) unit lower trapezoidal, r (k x n), tau (1 x k) and t (k x k), k = min(m, n) <= 128; float32
/// or float64. One block a matrix, which must fit its shared memory. Cost 2 n² (m - n/3) flops, one read and one write.
void householder_qr(const Context &context, const Stack &a, const Stack &v, const Stack &r, const Stack &tau, const Stack &t);
bool fits_a_block(const Stack &a, int device);
/// ValueError unless all of them fit A.
void check_qr(const Stack &a, const Stack &v, const Stack &r, const Stack &tau, const Stack &t);

/// The same for matrices of any size, one after the other through cuSOLVER (solver.hpp), and T by products (cuBLAS): v with contiguous rows or
/// columns, t with contiguous rows. m n² - n³ / 3 flops more, for T.
void large_householder_qr(const Context &context, const Stack &a, const Stack &v, const Stack &r, const Stack &tau, const Stack &t);
std::int64_t large_householder_qr_workspace(const Stack &a, const Stack &v, const Stack &t, int device);

/// core = -T = -(I + D S)⁻¹ D of reflections that the caller gives, D = diag(tau), S the strict upper triangle of VᵀV; without tau unit
/// reflections, tau = 2 / vᵀv, and a zero column is the identity. v is m x k, k <= 128. Cost m k² + k³ / 3 flops.
void reflection_core(const Context &context, const Stack &v, const Stack *tau, const Stack &core);

/// The same for any k: VᵀV by one product, cores of 64 reflections in shared memory, and pairs of cores made one
/// (N₁₂ = N₁ (VᵀV)₁₂ N₂) by products. `core` has contiguous rows. 2 m k² flops and k³ / 3.
void wide_reflection_core(const Context &context, const Stack &v, const Stack *tau, const Stack &core);
std::int64_t wide_reflection_core_workspace(const Stack &v, const Stack &core, int device);

} // namespace subspan::cuda
