// Matrices of packed 4-bit codes on a device.
#pragma once

#include "subspan/cuda/types.hpp"

#include <cstdint>

namespace subspan::cuda {

/// rows x cols entries in row-major order, two a byte, the first in the low half; the value of code q is scale (q - zero), with one scale
/// and zero for every `group` entries. Both are in the type that sums are kept in: float32, or float64 with float64 matrices.
struct Int4Codes {
    const std::uint8_t *codes = nullptr;
    const void *scale = nullptr, *zero = nullptr;
    std::int64_t rows = 0, cols = 0, group = 256;
};

/// As on the CPU, bit for bit (Zhang et al., arXiv:2407.08296): scale = max(max - min, 1e-5) / 15, zero = clamp(-round(min / scale), 0, 15),
/// q = clamp(round(x / scale) + zero, 0, 15). One matrix; NaN gives NaN scales, and infinity NaN or infinite ones.
void quantize_int4(const Context &context, const Stack &a, std::int64_t group, std::uint8_t *codes, void *scale, void *zero);

/// out = the dense matrix, of any floating dtype.
void unpack_int4(const Context &context, const Int4Codes &codes, const Stack &out);

/// out = alpha times U x, Uᵀ x (transpose), x U or x Uᵀ (not left) for stacks of matrices x by cuBLAS; the work memory holds U.
std::int64_t int4_product_workspace(const Int4Codes &codes, const Stack &x, int device);
void int4_product(const Context &context, const Int4Codes &codes, const Stack &x, bool left, bool transpose, double alpha, const Stack &out);

} // namespace subspan::cuda
