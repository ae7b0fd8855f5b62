// Packing into panels of `nr` lanes: dst[(l / nr)·depth·nr + d·nr + l % nr] = src[l·ls + d·ds].
#pragma once

#include "base/simd.hpp"

#include <algorithm>
#include <cstdint>

namespace subspan::simd {

/// Transposes a lanes x lanes block held in vectors, by log2(lanes) rounds of two-input shuffles.
template <class T, int Bytes> struct Transpose {
    using V = Vec<T, Bytes>;
    static constexpr int W = V::lanes;
#ifdef SUBSPAN_SHUFFLE
    // Round with distance D exchanges the off-diagonal D x D blocks of every 2D x 2D block.
    template <int D, int... I> static SUBSPAN_INLINE void pair(typename V::type &x, typename V::type &y, std::integer_sequence<int, I...>) {
        const auto lo = __builtin_shufflevector(x, y, ((I & D) ? W + (I ^ D) : I)...);
        const auto hi = __builtin_shufflevector(x, y, ((I & D) ? W + I : (I ^ D))...);
        x = lo;
        y = hi;
    }
    template <int D> static SUBSPAN_INLINE void rounds(typename V::type *r) {
        if constexpr (D > 0) {
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i)
                if (!(i & D)) pair<D>(r[i], r[i + D], std::make_integer_sequence<int, W>{});
            rounds<D / 2>(r);
        }
    }
#endif
    /// dst[d·stride + l] = src[l·ls + d] (minus shift[d]) for a full block.
    static SUBSPAN_INLINE void block(const T *src, std::int64_t ls, const T *shift, const T *shift_low, T *dst, std::int64_t stride) {
#ifdef SUBSPAN_SHUFFLE
        typename V::type r[W];
#pragma GCC unroll 16
        for (int l = 0; l < W; ++l) r[l] = V::load(src + l * ls);
        if (shift != nullptr) {
            const auto s = V::load(shift);
#pragma GCC unroll 16
            for (int l = 0; l < W; ++l) r[l] -= s;
            if (shift_low != nullptr) {
                const auto low = V::load(shift_low);
#pragma GCC unroll 16
                for (int l = 0; l < W; ++l) r[l] -= low;
            }
        }
        rounds<W / 2>(r);
#pragma GCC unroll 16
        for (int d = 0; d < W; ++d) V::store(dst + d * stride, r[d]);
#else
        for (int d = 0; d < W; ++d)
            for (int l = 0; l < W; ++l) dst[d * stride + l] = src[l * ls + d] - (shift ? shift[d] : T(0)) - (shift_low ? shift_low[d] : T(0));
#endif
    }
};

template <class T> struct PackSource {
    const T *data;
    std::int64_t lane_stride, depth_stride;
    const T *shift;        // subtracted, or null
    bool shift_by_lane;    // indexed by the lane (else by the depth)
    const T *shift_low = nullptr; // subtracted after it: what rounding left out of a mean
};

/// Packs lanes [first, first + lanes) of a panel buffer; lanes counts the source's. See the formula on top.
template <class T, int Bytes> SUBSPAN_INLINE void pack(const PackSource<T> &s, std::int64_t first, std::int64_t lanes, std::int64_t depth, int nr, T *dst) {
    constexpr int W = Vec<T, Bytes>::lanes;
    using V = Vec<T, Bytes>;
    std::int64_t l = 0;
    while (l < lanes) {
        const std::int64_t at = first + l;
        const int offset = int(at % nr);
        T *out = dst + (at / nr) * depth * nr + offset;
        if (s.lane_stride == 1) {
            const int g = int(std::min<std::int64_t>(lanes - l, nr - offset));
            const T *src = s.data + l;
            const T *sh = s.shift;
            for (std::int64_t d = 0; d < depth; ++d) {
                const T *p = src + d * s.depth_stride;
                T *o = out + d * nr;
                int i = 0;
                if (sh == nullptr) {
                    for (; i + W <= g; i += W) V::store(o + i, V::load(p + i));
                    for (; i < g; ++i) o[i] = p[i];
                } else if (s.shift_by_lane) {
                    const T *low = s.shift_low;
                    if (low == nullptr) {
                        for (; i + W <= g; i += W) V::store(o + i, V::load(p + i) - V::load(sh + l + i));
                        for (; i < g; ++i) o[i] = p[i] - sh[l + i];
                    } else {
                        for (; i + W <= g; i += W) V::store(o + i, V::load(p + i) - V::load(sh + l + i) - V::load(low + l + i));
                        for (; i < g; ++i) o[i] = p[i] - sh[l + i] - low[l + i];
                    }
                } else {
                    for (; i < g; ++i) o[i] = p[i] - sh[d] - (s.shift_low ? s.shift_low[d] : T(0));
                }
            }
            l += g;
            continue;
        }
        const int g = int(std::min<std::int64_t>({lanes - l, nr - offset, W}));
        const T *src = s.data + l * s.lane_stride;
        std::int64_t d = 0;
        if (s.depth_stride == 1 && !(s.shift != nullptr && s.shift_by_lane) && g == W) {
            for (; d + W <= depth; d += W)
                Transpose<T, Bytes>::block(src + d, s.lane_stride, s.shift ? s.shift + d : nullptr, s.shift_low ? s.shift_low + d : nullptr, out + d * nr, nr);
            if constexpr (Bytes > 16) // half as many, as of rows of eight
                if (constexpr int H = W / 2; d + H <= depth) {
                    for (int l0 = 0; l0 < W; l0 += H)
                        Transpose<T, Bytes / 2>::block(src + l0 * s.lane_stride + d, s.lane_stride, s.shift ? s.shift + d : nullptr,
                                                       s.shift_low ? s.shift_low + d : nullptr, out + d * nr + l0, nr);
                    d += H;
                }
        }
        for (; d < depth; ++d)
            for (int i = 0; i < g; ++i) {
                const std::int64_t at_shift = s.shift_by_lane ? l + i : d;
                const T sh = s.shift == nullptr ? T(0) : s.shift[at_shift];
                const T low = s.shift_low == nullptr ? T(0) : s.shift_low[at_shift];
                out[d * nr + i] = src[i * s.lane_stride + d * s.depth_stride] - sh - low;
            }
        l += g;
    }
}

/// Zeroes the lanes from `lanes` up to the next multiple of nr.
template <class T> inline void pad(std::int64_t lanes, std::int64_t depth, int nr, T *dst) {
    const int offset = int(lanes % nr);
    if (offset == 0) return;
    T *out = dst + (lanes / nr) * depth * nr;
    for (std::int64_t d = 0; d < depth; ++d)
        for (int i = offset; i < nr; ++i) out[d * nr + i] = T(0);
}

} // namespace subspan::simd
