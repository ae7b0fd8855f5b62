// How many singular values to keep.
#pragma once

#include <cstdint>
#include <limits>

namespace subspan {

enum class RankRule { gavish_donoho, marchenko_pastur };

/// The smallest rank whose squared values sum to at least `share` of the whole, of `count` values in descending order.
std::int64_t rank_by_energy(const double *values, std::int64_t count, double share);

/// How many values exceed what noise of the standard deviation `noise` per entry of an m x n matrix explains: the optimal hard threshold of
/// Gavish and Donoho (IEEE Trans. Inf. Theory 60, 2014) or the edge noise (√m + √n) of Marchenko and Pastur (1967). Without `noise` (NaN) it
/// is estimated from the median of all min(m, n) values. ValueError for sizes that do not fit.
std::int64_t rank_by_rule(const double *values, std::int64_t count, RankRule rule, std::int64_t m, std::int64_t n,
                          double noise = std::numeric_limits<double>::quiet_NaN());

} // namespace subspan
