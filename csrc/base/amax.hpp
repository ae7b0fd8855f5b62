// Largest magnitude of a matrix, which also tells whether all of it is finite.
#pragma once

#include "base/simd.hpp"
#include "subspan/views.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

namespace subspan {

/// max |a_ij|; NaN or infinity when an entry is one.
template <class T> T max_abs(MatrixView<const T> a);

/// The same for contiguous items, inside of a kernel that is compiled for its instruction set already. Magnitudes of
/// floating-point numbers are ordered as their bits are, with infinity and NaN above all: a maximum of integers, which
/// compilers vectorise without being allowed to reorder floating-point arithmetic.
template <class T> SUBSPAN_INLINE T max_abs_inline(const T *p, std::int64_t n) {
    using I = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;
    constexpr I mask = ~(I(1) << (sizeof(T) * 8 - 1));
    I top = 0;
    for (std::int64_t i = 0; i < n; ++i) {
        const I bits = std::bit_cast<I>(p[i]) & mask;
        top = bits > top ? bits : top;
    }
    return std::bit_cast<T>(top);
}

/// e where |x| is about 2^e, and 2^e and 2^-e are both numbers; 0 for zero, NaN and infinity.
inline int near_exponent(double x) {
    int e = 0;
    if (std::isfinite(x)) std::frexp(x, &e);
    return std::clamp(e, -1023, 1023);
}

template <class T> bool all_finite(MatrixView<const T> a) { return std::isfinite(max_abs(a)); }

} // namespace subspan
