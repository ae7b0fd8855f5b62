// The register tile that every product goes through: MR rows broadcast against NV vectors, MR·NV accumulators.
#pragma once

#include "base/simd.hpp"

#include <algorithm>
#include <cstdint>

namespace subspan::simd {

template <int Bytes> struct Shape {
    static constexpr int mr = Bytes == 64 ? 8 : Bytes == 32 ? 4 : 2;
    static constexpr int nv = 3;
    // Narrower tiles waste less on the diagonal of a triangle; they are as fast while both operands come from L1 and L2.
    static constexpr int nv_gram = Bytes == 64 ? 2 : 3;
};

// Where vector q of a row of NV begins. The last of a shifted row begins at `last`, over part of the one before: what both hold
// they hold alike, so that rows that are not whole vectors need no copy.
template <int NV, int W, bool Shifted> SUBSPAN_INLINE constexpr std::int64_t place(int q, std::int64_t last) { return Shifted && q == NV - 1 ? last : q * W; }

// acc[r][q] += sum_d a[d·sa + r] · b[d·sb + place(q) ...], what every tile spends its time in; `Ahead` bytes of B are fetched.
template <class T, int Bytes, int NV, std::int64_t Ahead = 0, bool Shifted = false>
SUBSPAN_INLINE void accumulate(std::int64_t depth, const T *a, std::int64_t sa, const T *b, std::int64_t sb,
                               typename Vec<T, Bytes>::type (&acc)[Shape<Bytes>::mr][NV], std::int64_t last = 0) {
    using V = Vec<T, Bytes>;
    constexpr int MR = Shape<Bytes>::mr, W = V::lanes;
    for (std::int64_t d = 0; d < depth; ++d) {
        typename V::type y[NV];
#pragma GCC unroll 4
        for (int q = 0; q < NV; ++q) {
            y[q] = V::load(b + place<NV, W, Shifted>(q, last));
            if constexpr (Ahead > 0) prefetch(reinterpret_cast<const char *>(b + q * W) + Ahead);
        }
#pragma GCC unroll 8
        for (int r = 0; r < MR; ++r) {
            const T x = a[r];
#pragma GCC unroll 4
            for (int q = 0; q < NV; ++q) acc[r][q] += x * y[q];
        }
        a += sa;
        b += sb;
    }
}

// The same with an A of any strides, as it lies: acc[r][q] += sum_d a[r·sr + d·sd] · b[d·sb + place(q) ...].
template <class T, int Bytes, int NV, bool Shifted>
SUBSPAN_INLINE void accumulate_strided(std::int64_t depth, const T *a, std::int64_t sr, std::int64_t sd, const T *b, std::int64_t sb,
                                       typename Vec<T, Bytes>::type (&acc)[Shape<Bytes>::mr][NV], std::int64_t last) {
    using V = Vec<T, Bytes>;
    constexpr int MR = Shape<Bytes>::mr, W = V::lanes;
    for (std::int64_t d = 0; d < depth; ++d, a += sd, b += sb) {
        typename V::type y[NV];
#pragma GCC unroll 4
        for (int q = 0; q < NV; ++q) y[q] = V::load(b + place<NV, W, Shifted>(q, last));
#pragma GCC unroll 8
        for (int r = 0; r < MR; ++r) {
            const T x = a[r * sr];
#pragma GCC unroll 4
            for (int q = 0; q < NV; ++q) acc[r][q] += x * y[q];
        }
    }
}

// c[r·ldc + j] (+)= sum_d a[d·sa + r] · b[d·sb + j]; rows of b are prefetched Ahead bytes further on.
template <class T, int Bytes, int NV = Shape<Bytes>::nv, std::int64_t Ahead = 0, bool Shifted = false>
SUBSPAN_INLINE void microkernel(std::int64_t depth, const T *a, std::int64_t sa, const T *b, T *c, std::int64_t ldc, bool add,
                                std::int64_t sb = NV * Vec<T, Bytes>::lanes, std::int64_t last = 0) {
    using V = Vec<T, Bytes>;
    constexpr int MR = Shape<Bytes>::mr, W = V::lanes;
    typename V::type acc[MR][NV];
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
        for (int q = 0; q < NV; ++q) acc[r][q] = typename V::type{};
    accumulate<T, Bytes, NV, Ahead, Shifted>(depth, a, sa, b, sb, acc, last);
    if (add) // all of them before any is stored: shifted ones overlap
#pragma GCC unroll 8
        for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
            for (int q = 0; q < NV; ++q) acc[r][q] = V::load(c + r * ldc + place<NV, W, Shifted>(q, last)) + acc[r][q];
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
        for (int q = 0; q < NV; ++q) V::store(c + r * ldc + place<NV, W, Shifted>(q, last), acc[r][q]);
}

// The sums of such a tile with A row by row, unpacked: acc[r][q] = sum_d a[r·lda + d] · b[d·sb + q·lanes ...].
template <class T, int Bytes, int NV, int MR>
SUBSPAN_INLINE void microkernel_rows(std::int64_t depth, const T *a, std::int64_t lda, const T *b, typename Vec<T, Bytes>::type (&acc)[MR][NV],
                                     std::int64_t sb = NV * Vec<T, Bytes>::lanes) {
    using V = Vec<T, Bytes>;
    constexpr int W = V::lanes;
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
        for (int q = 0; q < NV; ++q) acc[r][q] = typename V::type{};
    for (std::int64_t d = 0; d < depth; ++d, ++a, b += sb) {
        typename V::type y[NV];
#pragma GCC unroll 4
        for (int q = 0; q < NV; ++q) y[q] = V::load(b + q * W);
#pragma GCC unroll 8
        for (int r = 0; r < MR; ++r) {
            const T x = a[r * lda];
#pragma GCC unroll 4
            for (int q = 0; q < NV; ++q) acc[r][q] += x * y[q];
        }
    }
}

// The same for a tile that sticks out of C: through a full tile on the stack.
template <class T, int Bytes>
SUBSPAN_INLINE void microkernel_edge(std::int64_t depth, const T *a, std::int64_t sa, const T *b, T *c, std::int64_t ldc, bool add, int rows, int cols) {
    constexpr int MR = Shape<Bytes>::mr, NR = Shape<Bytes>::nv * Vec<T, Bytes>::lanes;
    alignas(64) T tile[MR * NR];
    microkernel<T, Bytes>(depth, a, sa, b, tile, NR, false);
    for (int r = 0; r < rows; ++r)
        for (int j = 0; j < cols; ++j) c[r * ldc + j] = add ? c[r * ldc + j] + tile[r * NR + j] : tile[r * NR + j];
}

// A block of C, rows x cols, from packed operands: A in panels of mr, B in panels of nr, both `depth` deep.
template <class T, int Bytes>
SUBSPAN_INLINE void block(std::int64_t depth, const T *a, const T *b, T *c, std::int64_t ldc, std::int64_t rows, std::int64_t cols, bool add) {
    constexpr int MR = Shape<Bytes>::mr, NR = Shape<Bytes>::nv * Vec<T, Bytes>::lanes;
    for (std::int64_t j = 0; j < cols; j += NR)
        for (std::int64_t i = 0; i < rows; i += MR) {
            const T *pa = a + (i / MR) * depth * MR, *pb = b + (j / NR) * depth * NR;
            const int r = int(std::min<std::int64_t>(MR, rows - i)), q = int(std::min<std::int64_t>(NR, cols - j));
            if (r == MR && q == NR)
                microkernel<T, Bytes>(depth, pa, MR, pb, c + i * ldc + j, ldc, add);
            else
                microkernel_edge<T, Bytes>(depth, pa, MR, pb, c + i * ldc + j, ldc, add, r, q);
        }
}

inline std::int64_t round_up(std::int64_t x, std::int64_t to) { return (x + to - 1) / to * to; }

} // namespace subspan::simd
