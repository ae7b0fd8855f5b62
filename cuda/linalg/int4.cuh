// Codes of 4 bits in kernels.
#pragma once

#include "subspan/cuda/int4.hpp"
#include "subspan/cuda/launch.cuh"

namespace subspan::cuda {

template <class A> struct Int4View {
    const std::uint8_t *codes;
    const A *scale, *zero;
    int64_t group;

    Int4View() = default;
    explicit Int4View(const Int4Codes &c) : codes(c.codes), scale(static_cast<const A *>(c.scale)), zero(static_cast<const A *>(c.zero)), group(c.group) {}
    SUBSPAN_DEVICE A at(int64_t e) const {
        const int code = (codes[e / 2] >> (e % 2 == 0 ? 0 : 4)) & 15;
        const int64_t g = e / group;
        return scale[g] * (A(code) - zero[g]);
    }
};

/// out = the dense matrix, row by row without gaps.
template <class T> void unpack_rows(const Session &s, const Int4Codes &c, T *out, int64_t row_stride, int64_t col_stride);

} // namespace subspan::cuda
