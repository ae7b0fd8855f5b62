// Leading singular triplets of matrices on a device by randomized subspace iteration. Needs cuBLAS; never waits for the device.
#pragma once

#include "subspan/cuda/types.hpp"

#include <cstdint>
#include <vector>

namespace subspan::cuda {

/// One matrix: m x n of any floating dtype, and where its triplets go: vectors in the same dtype, values in float32 or float64. `u` and `s` may be without data. `initial`
/// (float32, float64 for float64; may be without data) gives the first rows of the start.
struct TruncatedCall {
    Stack a, initial, u, s, vh; // u m x rank, s 1 x rank, vh rank x n
    std::uint64_t key = 0;      // of the random start
};
struct IterationOptions {
    std::int64_t vectors = 0; // rank and oversampling together, at most min(m, n)
    std::int64_t power_iterations = 2;
    bool complete = true; // rows of vh and columns of u that have no value; else they are zero
};

/// Halko, Martinsson and Tropp, SIAM Review 53 (2011), algorithms 4.4 and 5.1: 2 (power_iterations + 1) products of 2 m n l flops, and
/// as many orthonormalisations in float64, by Cholesky factors (of float64 data by rotations): 4 l² (m + n) flops. At the end rotations
/// of an l x l matrix. All matrices of a call have one dtype and one
/// rank; their small problems are solved in the same launches, except in float64, where rows are rotated themselves, one matrix after the
/// other. 16-bit matrices, and those with neither contiguous rows nor columns, are copied to float32 first. NaN or infinity make all
/// results NaN. The largest entry of each row of vh is positive; where a matrix has not so many values, vectors are completed.
void truncated_svd(const Context &context, const std::vector<TruncatedCall> &calls, const IterationOptions &o);
std::int64_t truncated_svd_workspace(const std::vector<TruncatedCall> &calls, const IterationOptions &o, int device);

/// Completes the rows of vh (rank x n) that have no value in `values` (1 x rank, descending), as truncated_svd does.
void complete_vectors(const Context &context, const Stack &vh, const Stack &values, std::uint64_t key);
std::int64_t complete_vectors_workspace(const Stack &vh, int device);

/// out (one float64) = the sum of squares of a matrix.
void squared_norm(const Context &context, const Stack &a, double *out);
std::int64_t squared_norm_workspace();

} // namespace subspan::cuda
