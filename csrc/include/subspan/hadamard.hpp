// Hadamard transforms of the rows of a matrix.
#pragma once

#include "subspan/views.hpp"

#include <cstdint>

namespace subspan {

/// The order m of the base matrix for length n = 2^p m: 1, 12, 20 or 28 (40 = 2 · 20 is among the lengths); 0 when n has
/// no such form. H_n = H_m ⊗ H_(2^p) with Sylvester's H_(2^p), Paley's first construction for 12 and 20 (not symmetric)
/// and his second one for 28 (R. E. A. C. Paley, J. Math. Phys. 12, 1933).
std::int64_t hadamard_base(std::int64_t n);

/// out = scale · x Hᵀ, that is H on every row, or x H (transpose: Hᵀ on every row). `out` may be x. Cost n (log2(n / m) + m) flops and one
/// read and one write of a row.
template <class T> void hadamard(const StackView<const T> &x, const StackView<T> &out, T scale, bool transpose, bool check = true);

} // namespace subspan
