// Unpacking of 4-bit codes into a small dense tile.
#pragma once

#include "base/simd.hpp"
#include "subspan/views.hpp"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

namespace subspan {

#if defined(SUBSPAN_VECTOR_EXT) && defined(__has_builtin)
#if __has_builtin(__builtin_convertvector)
#define SUBSPAN_CONVERT 1
#endif
#endif

/// out[i] = scale (code i - zero) for `count` codes from the start of a byte on: a vector of codes is shifted out of one
/// or two words, masked, converted and scaled in registers.
template <class T, int Bytes> SUBSPAN_INLINE void unpack_codes(const std::uint8_t *p, std::int64_t count, T scale, T zero, T *out) {
    std::int64_t i = 0;
#ifdef SUBSPAN_CONVERT
    if constexpr (std::endian::native == std::endian::little) {
        using V = simd::Vec<T, Bytes>;
        constexpr int W = V::lanes;
        using Words = typename simd::Vec<std::uint32_t, W * 4>::type;
        using Codes = typename simd::Vec<std::int32_t, W * 4>::type;
        Words shift{};
        Codes high{};
        for (int l = 0; l < W; ++l) {
            shift[l] = std::uint32_t(4 * (l % 8));
            high[l] = l < 8 ? 0 : -1;
        }
        for (; i + W <= count; i += W) {
            std::uint32_t word[2] = {0, 0};
            std::memcpy(word, p + i / 2, W / 2);
            Words w = Words{} + word[0];
            if constexpr (W > 8) w = high ? Words{} + word[1] : w;
            const Codes q = (Codes)((w >> shift) & 15u);
            V::store(out + i, scale * (__builtin_convertvector(q, typename V::type) - zero));
        }
    }
#endif
    for (; i < count; ++i) {
        const int byte = p[i / 2];
        out[i] = scale * (T(i & 1 ? byte >> 4 : byte & 15) - zero);
    }
}

/// tile[i·ld + j] = value of entry (row + i, col + j), for `cols` columns of `rows` rows.
template <class T, int Bytes>
SUBSPAN_INLINE void unpack_int4(const Int4View<T> &v, std::int64_t row, std::int64_t rows, std::int64_t col, std::int64_t cols, T *tile, std::int64_t ld) {
    for (std::int64_t i = 0; i < rows; ++i) {
        std::int64_t at = (row + i) * v.cols + col;
        T *out = tile + i * ld;
        const std::int64_t end = at + cols;
        for (std::int64_t g = at / v.group; at < end; ++g) {
            const std::int64_t stop = std::min(end, (g + 1) * v.group);
            const T scale = v.scale[g], zero = v.zero[g];
            if (at & 1) {
                *out++ = scale * (T(v.codes[at / 2] >> 4) - zero);
                ++at;
            }
            if (at < stop) {
                unpack_codes<T, Bytes>(v.codes + at / 2, stop - at, scale, zero, out);
                out += stop - at;
                at = stop;
            }
        }
    }
}

} // namespace subspan
