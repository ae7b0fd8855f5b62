// One update of a truncated SVD whose rows arrive in blocks, on a device and without waiting for it.
#pragma once

#include "subspan/cuda/types.hpp"

namespace subspan::cuda {

/// Rows of the past, of a block and of the mean together: their eigenvalue problem has to fit the shared memory of a cluster.
std::int64_t stream_core_limit(int device);

struct StreamUpdate {
    Stack rows;                 // b x n, float32
    Stack components;           // r x n, float32: the first `rank` rows are in use; changed
    double *values = nullptr;   // r singular values; changed
    double *mean = nullptr;     // n, or null: not centred; changed
    double *totals = nullptr;   // energy left out, and the number of rows that were refused; changed
    std::int64_t rank = 0;      // components in use
    std::int64_t kept = 0;      // components in use afterwards: at most rank + b (+ 1), and r
    double forget = 1.0, weight = 0.0; // weight: of the rows so far, forgetting counted in
};

std::int64_t stream_update_workspace(const StreamUpdate &u, int device);

/// The Gram matrix of [forget · s V; rows] in float64, by cuBLAS; its eigenvectors by one-sided Jacobi rotations in the shared memory of
/// a cluster of blocks; new components in float64, made orthonormal to second order once more, then rounded. Singular values below
/// 2e-6 of the first are zero, and so are their components. Rows that hold NaN or infinity change nothing but the count of refused
/// ones. 2 n ((r + b)² + r (r + b) + 2 r²) flops in float64.
void stream_update(const Context &context, const StreamUpdate &u);

} // namespace subspan::cuda
