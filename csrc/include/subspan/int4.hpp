// Matrices of 4-bit codes: quantisation as Q-GaLore publishes it, and products that unpack a tile at a time.
#pragma once

#include "subspan/views.hpp"

#include <cstdint>

namespace subspan {

/// Affine 4-bit codes of `a` (any strides), in row-major order with one scale and zero for every `group` entries:
/// scale = max(max - min, 1e-5) / 15, zero = clamp(-round(min / scale), 0, 15), q = clamp(round(x / scale) + zero, 0, 15)
/// in the arithmetic of T, halves to even (Zhang et al., arXiv:2407.08296). codes: (rows cols + 1) / 2 bytes, scale and
/// zero: one for each group. NaN and infinity throw ValueError.
template <class T> void quantize_int4(MatrixView<const T> a, std::int64_t group, std::uint8_t *codes, T *scale, T *zero);

/// out = the dense matrix.
template <class T> void unpack(const Int4View<T> &v, MatrixView<T> out);

/// out = X U, X Uᵀ (transpose), U X or Uᵀ X (left) for a packed U; `out` needs unit column stride and must not overlap X.
/// Cost 2 m n k flops; work memory is a tile of U and one of X, whatever their sizes.
template <class T> void int4_product(const Int4View<T> &u, const StackView<const T> &x, bool left, bool transpose, const StackView<T> &out);

} // namespace subspan
