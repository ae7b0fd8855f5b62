// Distances of all pairs of many subspaces, by products of matrices.
#pragma once

#include "subspan/principal_angles.hpp"
#include "subspan/views.hpp"

#include <cstdint>
#include <utility>
#include <vector>

namespace subspan {

/// out (N x M) = distances between the spans of N matrices u (n x k) and M matrices w (n x l), orthonormal columns, of the
/// kinds chordal and projection, with the min(k, l) principal angles: from the products UᵀW, 2 N M n k l flops. What is
/// close loses digits that way: such pairs are returned, and their entries are for the caller to fill in. With `half` only
/// pairs i < j are looked at, and out is symmetric with a zero diagonal.
template <class T>
std::vector<std::pair<std::int64_t, std::int64_t>> pairwise_distance(const StackView<const T> &u, const StackView<const T> &w, Distance kind, bool half,
                                                                     MatrixView<T> out);

} // namespace subspan
