// Updates of a truncated SVD by blocks of rows on a device. Needs cuBLAS; never waits for the device.
#pragma once

#include "subspan/cuda/types.hpp"

namespace subspan::cuda {

/// The state of a stream, all of it on the device: components with contiguous rows (float64 whatever the rows are, as rounding them to
/// float32 at every update would add up; at least as many as are ever kept), singular values, mean (null: not centred) and totals: energy
/// left out, rows that were refused, weight of the mean, work.
struct SvdState {
    Stack components;
    double *values = nullptr, *mean = nullptr, *totals = nullptr;
    std::int64_t rank = 0; // components in use; the host counts those that there may be
    bool robust = false;   // rotations of the rows themselves instead of their Gram matrix: for float64 data; (n + N) / 2N times the rotations
};
inline constexpr std::int64_t kSvdTotals = 4;

/// At most this many rows go into one decomposition; longer blocks are cut.
struct SvdBlock {
    Stack rows;
    double forget = 1.0;
    std::int64_t at_once = 256;
};

std::int64_t svd_update_workspace(const SvdState &state, const SvdBlock &block, int device);
/// Adds the rows, after the past was multiplied by `forget`; the mean may take one more component. Rows with NaN or infinity anywhere
/// leave everything as it was, and are counted. Returns the new number of components.
std::int64_t svd_update(const Context &context, const SvdState &state, const SvdBlock &block);

/// Adds what another stream of the same columns has seen: its components, values, mean and totals are read.
std::int64_t svd_merge_workspace(const SvdState &state, const SvdState &other, int device);
std::int64_t svd_merge(const Context &context, const SvdState &state, const SvdState &other);

} // namespace subspan::cuda
