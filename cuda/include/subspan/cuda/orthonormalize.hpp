// Orthonormal bases of column spaces on a device, by products through cuBLAS. Never waits for the device.
#pragma once

#include "subspan/cuda/types.hpp"

namespace subspan::cuda {

/// Columns of `out` (m x k) become an orthonormal basis of those of `a` (m x k, k <= m; float32 or float64), by Cholesky QR of columns of
/// unit length: Gram matrices and sums in double, three passes, the first one shifted (Fukaya et al., SIAM J. Sci. Comput. 42, 2020).
/// defects (1 x matrices, double) get max |QᵀQ - I| of each: near one where columns depend on each other, NaN where `a` holds NaN.
/// `out` may be `a`. Cost 12 m k² flops.
void cholesky_qr(const Context &context, const Stack &a, const Stack &out, double *defects);
std::int64_t cholesky_qr_workspace(const Stack &a, int device);

/// out = U Vᵀ of a = U Σ Vᵀ, the nearest matrix with orthonormal columns (m >= k) or rows, of any floating dtype; `out` may be `a`. By
/// odd polynomials of degree five, each the best one for the interval that the one before left (Amsel, Persson, Musco and Gower, The
/// Polar Express, 2025): products alone, in double for float32 and float64 and in float32 for 16 bits. What is added to `a` first is below
/// an eighth of its rounding and gives directions without a singular value one, so that bases are always complete. NaN in `a` makes
/// `out` NaN. With p <= q the two sides, tens of times 4 q p² + 2 p³ flops.
void polar(const Context &context, const Stack &a, const Stack &out);
std::int64_t polar_workspace(const Stack &a, int device);

} // namespace subspan::cuda
