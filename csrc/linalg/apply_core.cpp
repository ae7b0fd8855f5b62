// out = alpha C + V M (VᵀX) by two sweeps over C: W = VᵀX in register tiles, then C += V (M W). V is packed a block of
// rows at a time beside the sweep, so that a 4-bit V is never unpacked whole. Rows are read in blocks of 16 with
// software prefetch along each row: hardware prefetchers do not follow 16 rows whose stride is a power of two (3.6
// against 2.1 ms for the first sweep over 64 MiB at k = 8; docs/notes/kernels.md).
#include "subspan/apply_core.hpp"

#include "linalg/int4.hpp"
#include "linalg/apply_few.hpp"
#include "linalg/apply_lanes.hpp"
#include "linalg/microkernel.hpp"
#include "linalg/narrow.hpp"
#include "linalg/packing.hpp"
#include "base/blocking.hpp"
#include "base/amax.hpp"
#include "subspan/sizes.hpp"
#include "base/scratch.hpp"
#include "base/stacks.hpp"
#include "subspan/errors.hpp"
#include "subspan/gemm.hpp"
#include "subspan/orthonormalize.hpp"
#include "subspan/parallel.hpp"

#include <atomic>
#include <cmath>
#include <optional>
#include <functional>
#include <string>

namespace subspan {
namespace {

using simd::microkernel;
using simd::PackSource;
using simd::round_up;
using simd::Shape;
using simd::Vec;
using std::int64_t;

constexpr int64_t kDirect = 64;       // up to this k tiles of C are read in place, beyond through a packed copy
constexpr int64_t kDirectRows = 16;   // rows of a block where tiles are read in place, and more of a narrow C, as many as stay in L1
constexpr int64_t kDirectMost = 64;
constexpr int64_t kFewTiles = 32;     // up to so many V is multiplied as it lies
constexpr int64_t kPackedRows = 64;   // rows of a block where they are packed
constexpr int64_t kDot = 32;          // up to this k the right form works on dot products along the rows
constexpr int64_t kFlushRows = 1024;  // terms added up before a partial sum goes to the total
constexpr double kShielded = 0.6; // seconds that are not interrupted

template <class T> struct Item {
    MatrixView<const T> c, x; // x without data: X is C
    MatrixView<T> out;
    MatrixView<const T> v;
    const Int4View<T> *packed = nullptr;
    typename Core<T>::Kind kind = Core<T>::Kind::scalar;
    T scalar = T(1), alpha = T(1);
    MatrixView<const T> m; // transposed already where the right form needs it
    int64_t k = 0, direct_rows = 0;
    int64_t rows = 0, cols = 0; // of the whole of C, which decides how pieces, and copies of them, are summed: alike in any
};

template <class T> struct Piece {
    const Item<T> *item;
    int64_t begin, end; // columns (left), rows (right)
    T *w;               // tiles of NR columns (rows): kp x NR each
    bool read, write, check;
    bool finite = true; // W; only looked at with check
    T top = 0;          // its largest magnitude, likewise
};

// ---- pieces of both forms ------------------------------------------------------------------------------------------

// Columns of a piece by register tiles. Where the last tile would be less than a vector the one before leaves it one.
struct Tiles {
    int64_t n, nr, lanes;
    int64_t count() const { return (n + nr - 1) / nr; }
    int64_t first(int64_t t) const { return t > 0 && t == count() - 1 && n - t * nr < lanes ? t * nr - lanes : t * nr; }
    int64_t cols(int64_t t) const { return (t + 1 < count() ? first(t + 1) : n) - first(t); }
};

// Rows [row, row + count) of V, as panels of nr lanes: lanes are the columns of V (by_rows false) or its rows.
template <class T, int Bytes> SUBSPAN_INLINE void pack_v(const Item<T> &it, int64_t row, int64_t count, bool by_rows, int nr, T *dst, T *unpacked) {
    MatrixView<const T> v;
    if (it.packed != nullptr) {
        unpack_int4<T, Bytes>(*it.packed, row, count, 0, it.k, unpacked, it.k);
        v = {unpacked, count, it.k};
    } else {
        v = it.v.block_rows(row, count);
    }
    const int64_t lanes = by_rows ? count : it.k, depth = by_rows ? it.k : count;
    const PackSource<T> src{v.data, by_rows ? v.row_stride : v.col_stride, by_rows ? v.col_stride : v.row_stride, nullptr, false};
    simd::pack<T, Bytes>(src, 0, lanes, depth, nr, dst);
    simd::pad(lanes, depth, nr, dst);
}

// w[g] += (panel g of A)ᵀ tile for a tile of `cols` columns that is padded to NR: full vectors only as far as needed.
template <class T, int Bytes>
SUBSPAN_INLINE void tile_products(int64_t depth, int64_t groups, const T *a, int64_t panel, int64_t step, const T *tile, T *w, int64_t cols) {
    constexpr int MR = Shape<Bytes>::mr, W = Vec<T, Bytes>::lanes, NR = Shape<Bytes>::nv * W;
    if (cols > 2 * W) {
        for (int64_t g = 0; g < groups; ++g) microkernel<T, Bytes, 3>(depth, a + g * panel, step, tile, w + g * MR * NR, NR, true, NR);
    } else if (cols > W) {
        for (int64_t g = 0; g < groups; ++g) microkernel<T, Bytes, 2>(depth, a + g * panel, step, tile, w + g * MR * NR, NR, true, NR);
    } else {
        for (int64_t g = 0; g < groups; ++g) microkernel<T, Bytes, 1>(depth, a + g * panel, step, tile, w + g * MR * NR, NR, true, NR);
    }
}

// out = alpha C + A B for one register tile; A is MR x depth: entry (r, d) at a[r·sr + d·sd]. B is depth x NR.
template <class T, int Bytes, int NV, bool Ahead, bool Packed, bool Shifted>
SUBSPAN_INLINE void update(int64_t depth, const T *a, int64_t sr, int64_t sd, const T *b, const T *c, int64_t ldc, T *out, int64_t ldo, T alpha,
                           int64_t last = 0) {
    using V = Vec<T, Bytes>;
    constexpr int MR = Shape<Bytes>::mr, W = V::lanes, NR = Shape<Bytes>::nv * W;
    typename V::type acc[MR][NV];
    if (alpha == T(0)) {
#pragma GCC unroll 8
        for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
            for (int q = 0; q < NV; ++q) acc[r][q] = typename V::type{};
    } else {
#pragma GCC unroll 8
        for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
            for (int q = 0; q < NV; ++q) {
                const T *p = c + r * ldc + simd::place<NV, W, Shifted>(q, last);
                acc[r][q] = V::load(p);
                if constexpr (Ahead) simd::prefetch(reinterpret_cast<const char *>(p) + kAheadOfProduct);
            }
        if (alpha != T(1)) {
#pragma GCC unroll 8
            for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
                for (int q = 0; q < NV; ++q) acc[r][q] = alpha * acc[r][q];
        }
    }
    if constexpr (Packed)
        simd::accumulate<T, Bytes, NV, 0, Shifted>(depth, a, sd, b, NR, acc, last);
    else
        simd::accumulate_strided<T, Bytes, NV, Shifted>(depth, a, sr, sd, b, NR, acc, last);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
        for (int q = 0; q < NV; ++q) V::store(out + r * ldo + simd::place<NV, W, Shifted>(q, last), acc[r][q]);
}

// By as many vectors as `cols` columns, one vector or more, need; those of no whole number overlap.
template <class T, int Bytes, bool Ahead, bool Packed>
SUBSPAN_INLINE void update_columns(int64_t depth, const T *a, int64_t sr, int64_t sd, const T *b, const T *c, int64_t ldc, T *out, int64_t ldo, T alpha,
                                   int64_t cols) {
    constexpr int W = Vec<T, Bytes>::lanes;
    static_assert(Shape<Bytes>::nv == 3);
    if (cols == 3 * W)
        update<T, Bytes, 3, Ahead, Packed, false>(depth, a, sr, sd, b, c, ldc, out, ldo, alpha);
    else if (cols == 2 * W)
        update<T, Bytes, 2, Ahead, Packed, false>(depth, a, sr, sd, b, c, ldc, out, ldo, alpha);
    else if (cols == W)
        update<T, Bytes, 1, Ahead, Packed, false>(depth, a, sr, sd, b, c, ldc, out, ldo, alpha);
    else if (cols > 2 * W)
        update<T, Bytes, 3, Ahead, Packed, true>(depth, a, sr, sd, b, c, ldc, out, ldo, alpha, cols - W);
    else
        update<T, Bytes, 2, Ahead, Packed, true>(depth, a, sr, sd, b, c, ldc, out, ldo, alpha, cols - W);
}

// The same for a tile that sticks out of C, through a copy on the stack.
template <class T, int Bytes, int NV>
SUBSPAN_INLINE void update_edge(int64_t depth, const T *a, int64_t sa, const T *b, const T *c, int64_t ldc, T *out, int64_t ldo, T alpha, int64_t rows,
                                int64_t cols) {
    constexpr int MR = Shape<Bytes>::mr, LD = NV * Vec<T, Bytes>::lanes;
    alignas(64) T tile[MR * LD];
    std::fill_n(tile, MR * LD, T(0));
    if (alpha != T(0))
        for (int64_t r = 0; r < rows; ++r) std::copy_n(c + r * ldc, cols, tile + r * LD);
    update<T, Bytes, NV, false, true, false>(depth, a, 1, sa, b, tile, LD, tile, LD, alpha);
    for (int64_t r = 0; r < rows; ++r) std::copy_n(tile + r * LD, cols, out + r * ldo);
}

// As many vectors as the columns need.
template <class T, int Bytes, bool Ahead>
SUBSPAN_INLINE void update_any(int64_t depth, const T *a, int64_t sa, const T *b, const T *c, int64_t ldc, T *out, int64_t ldo, T alpha, int64_t rows,
                               int64_t cols) {
    constexpr int MR = Shape<Bytes>::mr, W = Vec<T, Bytes>::lanes, NR = Shape<Bytes>::nv * W;
    static_assert(Shape<Bytes>::nv == 3);
    const int64_t r = std::min<int64_t>(rows, MR), n = std::min<int64_t>(cols, NR);
    if (r == MR && n >= W)
        update_columns<T, Bytes, Ahead, true>(depth, a, 1, sa, b, c, ldc, out, ldo, alpha, n);
    else if (n > 2 * W)
        update_edge<T, Bytes, 3>(depth, a, sa, b, c, ldc, out, ldo, alpha, r, n);
    else if (n > W)
        update_edge<T, Bytes, 2>(depth, a, sa, b, c, ldc, out, ldo, alpha, r, n);
    else
        update_edge<T, Bytes, 1>(depth, a, sa, b, c, ldc, out, ldo, alpha, r, n);
}

// Notes the largest magnitude of W, and whether it is finite.
template <class T> bool finite_items(Piece<T> *p, const T *w, int64_t n) {
    const T top = max_abs<T>(MatrixView<const T>(w, 1, n));
    if (!std::isfinite(top)) return false;
    p->top = std::max(p->top, top);
    return true;
}

// W <- M W, tile by tile.
template <class T, int Bytes> SUBSPAN_INLINE void core_step(const Item<T> &it, T *w, int64_t tiles) {
    using V = Vec<T, Bytes>;
    constexpr int MR = Shape<Bytes>::mr, W = V::lanes, NR = Shape<Bytes>::nv * W;
    const int64_t k = it.k, kp = round_up(k, MR);
    if (it.kind != Core<T>::Kind::full) {
        if (it.kind == Core<T>::Kind::scalar && it.scalar == T(1)) return;
        for (int64_t t = 0; t < tiles; ++t)
            for (int64_t l = 0; l < k; ++l) {
                const T s = it.kind == Core<T>::Kind::scalar ? it.scalar : it.m(0, l);
                T *p = w + t * kp * NR + l * NR;
                for (int j = 0; j < NR; j += W) V::store(p + j, s * V::load(p + j));
            }
        return;
    }
    Frame frame;
    T *mp = frame.take<T>(kp * k), *next = frame.take<T>(kp * NR);
    const PackSource<T> src{it.m.data, it.m.row_stride, it.m.col_stride, nullptr, false};
    simd::pack<T, Bytes>(src, 0, k, k, MR, mp);
    simd::pad(k, k, MR, mp);
    for (int64_t t = 0; t < tiles; ++t) {
        T *wt = w + t * kp * NR;
        for (int64_t g = 0; g < kp / MR; ++g) microkernel<T, Bytes, 3>(k, mp + g * k * MR, MR, wt, next + g * MR * NR, NR, false, NR);
        std::copy_n(next, k * NR, wt);
    }
}

// Adds partial sums up in two levels, so that rounding grows with the root of the number of blocks.
template <class T> class Totals {
  public:
    Totals(Frame &frame, T *w, int64_t items, bool needed) : w_(w), total_(needed ? frame.zeros<T>(items) : nullptr), items_(items) {}
    void flush() {
        if (total_ == nullptr) return;
        for (int64_t i = 0; i < items_; ++i) {
            total_[i] += w_[i];
            w_[i] = T(0);
        }
    }
    void finish() {
        if (total_ == nullptr) return;
        for (int64_t i = 0; i < items_; ++i) w_[i] += total_[i];
    }

  private:
    T *w_, *total_;
    int64_t items_;
};

// ---- narrow --------------------------------------------------------------------------------------------------------

// Rows of up to two vectors: nothing is packed, a row is one or two loads, and what is beyond its end is not looked at.
constexpr int64_t kNarrowDepth = 8; // columns of V that the left form takes so
constexpr int64_t kFewVectors = 12, kFewLeast = 32; // that many vectors, of so many entries and a quarter of the directions, go one by one

template <class T, int Bytes> SUBSPAN_INLINE bool is_narrow(const Item<T> &it, bool left) {
    constexpr int64_t W = Vec<T, Bytes>::lanes;
    return it.cols <= 2 * W && it.packed == nullptr && (left ? it.k <= kNarrowDepth : it.rows >= 4 * it.cols);
}

// w[l] += Σ_i v_il x_i for K columns of V from l on; x is the source less C where there is one.
template <class T, int Bytes, int NV, int K> SUBSPAN_INLINE void narrow_sums(const Item<T> &it, int64_t l, T *w, int64_t ldw) {
    using V = Vec<T, Bytes>;
    constexpr int W = V::lanes, U = K == 1 ? 8 / NV : K == 2 ? 4 / NV : K == 3 || NV == 2 ? 1 : 2; // rows whose sums are apart
    const bool differs = it.x.data != nullptr;
    const simd::NarrowRows<T, Bytes, NV> c(it.c), x(differs ? it.x : it.c);
    const int64_t m = it.c.rows, vr = it.v.row_stride, vc = it.v.col_stride;
    typename V::type total[K][NV], acc[U][K][NV], row[NV], less[NV];
    for (int a = 0; a < K; ++a)
        for (int q = 0; q < NV; ++q) total[a][q] = typename V::type{};
    for (int64_t first = 0; first < m; first += kFlushRows) {
        const int64_t end = std::min(m, first + kFlushRows);
        poll();
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u)
#pragma GCC unroll 4
            for (int a = 0; a < K; ++a)
#pragma GCC unroll 2
                for (int q = 0; q < NV; ++q) acc[u][a][q] = typename V::type{};
        const auto add = [&](int64_t i, typename V::type(&to)[K][NV]) SUBSPAN_LAMBDA_INLINE {
            x.load(i, row);
            if (differs) {
                c.load(i, less);
#pragma GCC unroll 2
                for (int q = 0; q < NV; ++q) row[q] -= less[q];
            }
            const T *v = it.v.data + i * vr + l * vc;
#pragma GCC unroll 4
            for (int a = 0; a < K; ++a)
#pragma GCC unroll 2
                for (int q = 0; q < NV; ++q) to[a][q] += v[a * vc] * row[q];
        };
        int64_t i = first;
        for (; i + U <= end; i += U)
#pragma GCC unroll 8
            for (int u = 0; u < U; ++u) add(i + u, acc[u]);
        for (; i < end; ++i) add(i, acc[0]);
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u)
            for (int a = 0; a < K; ++a)
                for (int q = 0; q < NV; ++q) total[a][q] += acc[u][a][q];
    }
    for (int a = 0; a < K; ++a) {
        alignas(64) T tile[NV * W];
        for (int q = 0; q < NV; ++q) V::store(tile + q * W, total[a][q]);
        std::copy_n(tile, it.c.cols, w + (l + a) * ldw); // lanes past the end are of other rows
    }
}

// out_i = alpha c_i + Σ_l f_il w_l, with f_i of `depth` entries at `f` (a row of V), or x_i - c_i itself where f is null.
template <class T, int Bytes, int NV>
SUBSPAN_INLINE void narrow_update(const Item<T> &it, const MatrixView<const T> *f, int64_t depth, const T *w, int64_t ldw, int64_t begin, int64_t end) {
    using V = Vec<T, Bytes>;
    constexpr int W = V::lanes, R = 4;
    // Of these rows alone: what is past their last one may be another thread's to write.
    const simd::NarrowRows<T, Bytes, NV> c(it.c.block_rows(begin, end - begin)), x((it.x.data != nullptr ? it.x : it.c).block_rows(begin, end - begin));
    const bool differs = it.x.data != nullptr;
    alignas(64) T tile[R * NV * W], factors[R * NV * W];
    for (int64_t i = begin; i < end; i += R) {
        if ((i - begin) % (1024 * R) == 0) poll();
        const int64_t rows = std::min<int64_t>(R, end - i);
        typename V::type acc[R][NV];
        const T *a[R];
        int64_t step = 1;
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const int64_t at = i + std::min<int64_t>(r, rows - 1);
            typename V::type row[NV];
            c.load(at - begin, row);
            if (f != nullptr) {
                a[r] = f->data + at * f->row_stride;
                step = f->col_stride;
            } else if (!differs) {
                a[r] = it.c.data + at * it.c.row_stride;
            } else {
                typename V::type other[NV];
                x.load(at - begin, other);
#pragma GCC unroll 2
                for (int q = 0; q < NV; ++q) V::store(factors + (r * NV + q) * W, other[q] - row[q]);
                a[r] = factors + r * NV * W;
            }
#pragma GCC unroll 2
            for (int q = 0; q < NV; ++q) acc[r][q] = it.alpha == T(0) ? typename V::type{} : it.alpha * row[q];
        }
        for (int64_t l = 0; l < depth; ++l) {
            typename V::type y[NV];
#pragma GCC unroll 2
            for (int q = 0; q < NV; ++q) y[q] = V::load(w + l * ldw + q * W);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const T s = a[r][l * step];
#pragma GCC unroll 2
                for (int q = 0; q < NV; ++q) acc[r][q] += s * y[q];
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
            for (int q = 0; q < NV; ++q) V::store(tile + (r * NV + q) * W, acc[r][q]);
        simd::copy_rows(tile, NV * W, it.out.data + i * it.out.row_stride, it.out.row_stride, rows, it.c.cols);
    }
}

// ---- left ----------------------------------------------------------------------------------------------------------

// Few columns of V, and a C that is near: register tiles as high as V is wide, of C where it lies. Tiles of eight rows would do
// four products for one at k = 2 (658 x 114: 19 against 5 us). Columns past whole vectors go as narrow rows.
constexpr int64_t kThin = 4;
// And of up to so many where C has hardly more columns than a tile, most of which would be padding.
constexpr int64_t kThinShort = 12;

template <class T> bool is_thin(int64_t rows, int64_t cols, int64_t k, int64_t nr) {
    const int64_t bytes = rows * cols * int64_t(sizeof(T));
    return k > 0 && (k <= kThin ? bytes <= blocking().whole : k <= kThinShort && cols <= 2 * nr && bytes <= blocking().part);
}
template <class T, int Bytes> SUBSPAN_INLINE bool is_thin(const Piece<T> *p) { // never cut into pieces
    const Item<T> &it = *p->item;
    return it.packed == nullptr && it.x.data == nullptr && p->begin == 0 && p->end == it.cols &&
           is_thin<T>(it.rows, it.cols, it.k, Shape<Bytes>::nv * Vec<T, Bytes>::lanes);
}

template <class T, int Bytes> struct Thin {
    using V = Vec<T, Bytes>;
    static constexpr int W = V::lanes, NR = Shape<Bytes>::nv * W;
    const Item<T> &it;
    T *w;
    int64_t kp;

    T *at(int64_t l, int64_t j) const { return w + (j / NR) * kp * NR + l * NR + j % NR; }

    template <int K, int NV> SUBSPAN_INLINE void sums(int64_t l, int64_t j) const {
        const int64_t m = it.c.rows, vr = it.v.row_stride, vc = it.v.col_stride;
        for (int64_t first = 0; first < m; first += kFlushRows) {
            const int64_t end = std::min(m, first + kFlushRows);
            typename V::type acc[K][NV];
#pragma GCC unroll 8
            for (int a = 0; a < K; ++a)
#pragma GCC unroll 8
                for (int q = 0; q < NV; ++q) acc[a][q] = typename V::type{};
            for (int64_t i = first; i < end; ++i) {
                const T *c = it.c.data + i * it.c.row_stride + j, *v = it.v.data + i * vr + l * vc;
                typename V::type row[NV];
#pragma GCC unroll 8
                for (int q = 0; q < NV; ++q) row[q] = V::load(c + q * W);
#pragma GCC unroll 8
                for (int a = 0; a < K; ++a) {
                    const T x = v[a * vc];
#pragma GCC unroll 8
                    for (int q = 0; q < NV; ++q) acc[a][q] += x * row[q];
                }
            }
#pragma GCC unroll 8
            for (int a = 0; a < K; ++a)
#pragma GCC unroll 8
                for (int q = 0; q < NV; ++q) {
                    T *to = at(l + a, j + q * W);
                    V::store(to, first == 0 ? acc[a][q] : V::load(to) + acc[a][q]);
                }
        }
    }
    // out = f c + V w, with f alpha for the first of several passes over columns of V.
    template <int K, int NV> SUBSPAN_INLINE void update(int64_t l, int64_t j) const {
        const int64_t m = it.c.rows, vr = it.v.row_stride, vc = it.v.col_stride;
        typename V::type y[K][NV];
#pragma GCC unroll 8
        for (int a = 0; a < K; ++a)
#pragma GCC unroll 8
            for (int q = 0; q < NV; ++q) y[a][q] = V::load(at(l + a, j + q * W));
        const auto &from = l == 0 ? it.c : MatrixView<const T>(it.out);
        const T f = l == 0 ? it.alpha : T(1);
        for (int64_t i = 0; i < m; ++i) {
            const T *c = from.data + i * from.row_stride + j, *v = it.v.data + i * vr + l * vc;
            T *out = it.out.data + i * it.out.row_stride + j;
            typename V::type row[NV];
#pragma GCC unroll 8
            for (int q = 0; q < NV; ++q) row[q] = f == T(0) ? typename V::type{} : f * V::load(c + q * W);
#pragma GCC unroll 8
            for (int a = 0; a < K; ++a) {
                const T x = v[a * vc];
#pragma GCC unroll 8
                for (int q = 0; q < NV; ++q) row[q] += x * y[a][q];
            }
#pragma GCC unroll 8
            for (int q = 0; q < NV; ++q) V::store(out + q * W, row[q]);
        }
    }
    // Columns [j, ...) as far as whole vectors go, K of V's columns at once: 24 sums in registers where there are 32 of them.
    template <int K, bool Read> SUBSPAN_INLINE void sweep(int64_t l) const {
        constexpr int Most = Bytes == 64 ? 24 : 10, NV = Most / K > 8 ? 8 : Most / K < 1 ? 1 : Most / K;
        const int64_t whole = it.c.cols / W * W;
        int64_t j = 0;
        for (; j + NV * W <= whole; j += NV * W) one<K, NV, Read>(l, j);
        if constexpr (NV > 2)
            for (; j + 2 * W <= whole; j += 2 * W) one<K, 2, Read>(l, j);
        for (; j < whole; j += W) one<K, 1, Read>(l, j);
    }
    template <int K, int NV, bool Read> SUBSPAN_INLINE void one(int64_t l, int64_t j) const {
        if constexpr (Read)
            sums<K, NV>(l, j);
        else
            update<K, NV>(l, j);
    }
    template <bool Read> SUBSPAN_INLINE void all() const {
        int64_t l = 0;
        for (; l + 4 <= it.k; l += 4) sweep<4, Read>(l);
        if (it.k - l == 3) sweep<3, Read>(l);
        if (it.k - l == 2) sweep<2, Read>(l);
        if (it.k - l == 1) sweep<1, Read>(l);
    }
};

template <class T> struct LeftKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(Piece<T> *p) {
        constexpr int64_t W = Vec<T, Bytes>::lanes;
        const int64_t n = p->item->c.cols;
        const bool is_short = is_narrow<T, Bytes>(*p->item, true);
        if (is_short && n > W) return narrow<Bytes>(p);
        if (is_short || is_thin<T, Bytes>(p)) return thin<Bytes>(p, n > W ? n / W * W : 0);
        if (p->read) read<Bytes>(p);
        if (p->write && p->finite) write<Bytes>(p);
    }
    // The first `whole` columns as thin ones, the others, no more than a vector, as a narrow matrix.
    template <int Bytes> static SUBSPAN_INLINE void thin(Piece<T> *p, int64_t whole) {
        constexpr int MR = Shape<Bytes>::mr, NR = Shape<Bytes>::nv * Vec<T, Bytes>::lanes;
        const Item<T> &it = *p->item;
        const int64_t k = it.k, kp = round_up(k, MR), n = it.c.cols, tiles = (n + NR - 1) / NR;
        const Thin<T, Bytes> thin{it, p->w, kp};
        Item<T> rest = it; // columns past whole vectors
        rest.c = it.c.block_cols(whole, n - whole);
        rest.out = it.out.block_cols(whole, n - whole);
        T *w = thin.at(0, whole);
        const int64_t rows = tiles > 1 ? kp : narrow_rows(it, kp);
        if (p->read) {
            std::fill_n(p->w, tiles * rows * NR, T(0));
            if (whole > 0) thin.template all<true>();
            if (whole < n) narrow_all_sums<Bytes, 1>(rest, w);
            p->finite = !p->check || finite_items(p, p->w, tiles * rows * NR);
        }
        if (!p->write || !p->finite) return;
        narrow_core<Bytes>(it, p->w, tiles, rows, kp);
        if (whole > 0) thin.template all<false>();
        if (whole < n) narrow_update<T, Bytes, 1>(rest, &it.v, k, w, NR, 0, it.c.rows);
    }
    // Rows of W that anyone looks at: those that pad it to a tile only where it is multiplied by tiles. Of small matrices they
    // would be most of the work.
    static SUBSPAN_INLINE int64_t narrow_rows(const Item<T> &it, int64_t kp) { return it.kind == Core<T>::Kind::scalar ? it.k : kp; }
    template <int Bytes> static SUBSPAN_INLINE void narrow_core(const Item<T> &it, T *w, int64_t tiles, int64_t rows, int64_t kp) {
        constexpr int NR = Shape<Bytes>::nv * Vec<T, Bytes>::lanes;
        if (rows == kp) return core_step<T, Bytes>(it, w, tiles);
        for (int64_t i = 0; i < rows * NR; ++i) w[i] *= it.scalar;
    }
    template <int Bytes, int NV> static SUBSPAN_INLINE void narrow_all_sums(const Item<T> &it, T *w) {
        constexpr int NR = Shape<Bytes>::nv * Vec<T, Bytes>::lanes;
        int64_t l = 0;
        for (; l + 4 <= it.k; l += 4) narrow_sums<T, Bytes, NV, 4>(it, l, w, NR);
        if (it.k - l == 3) narrow_sums<T, Bytes, NV, 3>(it, l, w, NR);
        if (it.k - l == 2) narrow_sums<T, Bytes, NV, 2>(it, l, w, NR);
        if (it.k - l == 1) narrow_sums<T, Bytes, NV, 1>(it, l, w, NR);
    }
    template <int Bytes> static SUBSPAN_INLINE void narrow(Piece<T> *p) {
        constexpr int MR = Shape<Bytes>::mr, NV = 2, NR = Shape<Bytes>::nv * Vec<T, Bytes>::lanes;
        const Item<T> &it = *p->item;
        const int64_t k = it.k, kp = round_up(k, MR);
        const int64_t rows = narrow_rows(it, kp);
        if (p->read) {
            std::fill_n(p->w, rows * NR, T(0));
            narrow_all_sums<Bytes, NV>(it, p->w);
            p->finite = !p->check || finite_items(p, p->w, rows * NR);
        }
        if (!p->write || !p->finite) return;
        narrow_core<Bytes>(it, p->w, 1, rows, kp);
        narrow_update<T, Bytes, NV>(it, &it.v, k, p->w, NR, 0, it.c.rows);
    }
    template <int Bytes> static SUBSPAN_INLINE void read(Piece<T> *p) {
        using V = Vec<T, Bytes>;
        constexpr int MR = Shape<Bytes>::mr, W = V::lanes, NR = Shape<Bytes>::nv * W;
        const Item<T> &it = *p->item;
        const int64_t m = it.c.rows, n = p->end - p->begin, k = it.k, kp = round_up(k, MR), groups = kp / MR;
        const int64_t tiles = (n + NR - 1) / NR;
        const bool differs = it.x.data != nullptr, direct = k <= kDirect && !differs;
        const int64_t block = direct ? it.direct_rows : kPackedRows;
        // Whole panels of a V by rows are read as they lie.
        const bool as_it_lies = direct && it.packed == nullptr && it.v.col_stride == 1 && k == kp;
        const Tiles cut{n, NR, W};
        Frame frame;
        T *va = as_it_lies ? nullptr : frame.take<T>(block * kp), *tile = frame.take<T>(block * NR);
        T *unpacked = it.packed != nullptr ? frame.take<T>(block * k) : nullptr;
        std::fill_n(p->w, tiles * kp * NR, T(0));
        Totals<T> totals(frame, p->w, tiles * kp * NR, m > kFlushRows);
        const MatrixView<const T> x = differs ? it.x : it.c;
        for (int64_t r = 0; r < m; r += block) {
            poll();
            const int64_t depth = std::min(block, m - r);
            if (!as_it_lies) pack_v<T, Bytes>(it, r, depth, false, MR, va, unpacked);
            const T *panels = as_it_lies ? it.v.data + r * it.v.row_stride : va;
            const int64_t panel = as_it_lies ? MR : depth * MR, step = as_it_lies ? it.v.row_stride : MR;
            for (int64_t t = 0; t < tiles; ++t) {
                const int64_t j = p->begin + cut.first(t), cols = cut.cols(t);
                const T *b = x.data + r * x.row_stride + j;
                T *w = p->w + t * kp * NR;
                if (direct && cols >= W) {
                    if (cols == 3 * W)
                        in_place<Bytes, 3, false>(depth, groups, panels, panel, step, b, x.row_stride, w, 0);
                    else if (cols == 2 * W)
                        in_place<Bytes, 2, false>(depth, groups, panels, panel, step, b, x.row_stride, w, 0);
                    else if (cols == W)
                        in_place<Bytes, 1, false>(depth, groups, panels, panel, step, b, x.row_stride, w, 0);
                    else if (cols > 2 * W)
                        in_place<Bytes, 3, true>(depth, groups, panels, panel, step, b, x.row_stride, w, cols - W);
                    else
                        in_place<Bytes, 2, true>(depth, groups, panels, panel, step, b, x.row_stride, w, cols - W);
                    continue;
                }
                copy_tile<Bytes>(b, x.row_stride, depth, cols, tile);
                if (differs) {
                    const T *c = it.c.data + r * it.c.row_stride + j;
                    for (int64_t d = 0; d < depth; ++d)
                        for (int64_t i = 0; i < cols; ++i) tile[d * NR + i] -= c[d * it.c.row_stride + i];
                }
                tile_products<T, Bytes>(depth, groups, panels, panel, step, tile, w, cols);
            }
            if ((r + block) % kFlushRows == 0) totals.flush();
        }
        totals.finish();
        p->finite = !p->check || finite_items(p, p->w, tiles * kp * NR);
    }
    template <int Bytes, int NV, bool Shifted>
    static SUBSPAN_INLINE void in_place(int64_t depth, int64_t groups, const T *va, int64_t panel, int64_t step, const T *b, int64_t ldb, T *w, int64_t last) {
        constexpr int MR = Shape<Bytes>::mr, NR = Shape<Bytes>::nv * Vec<T, Bytes>::lanes;
        for (int64_t g = 0; g < groups; ++g)
            microkernel<T, Bytes, NV, kAheadOfProduct, Shifted>(depth, va + g * panel, step, b, w + g * MR * NR, NR, true, ldb, last);
    }
    template <int Bytes> static SUBSPAN_INLINE void copy_tile(const T *b, int64_t ldb, int64_t depth, int64_t cols, T *tile) {
        using V = Vec<T, Bytes>;
        constexpr int NV = Shape<Bytes>::nv, W = V::lanes, NR = NV * W;
        for (int64_t d = 0; d < depth; ++d, b += ldb, tile += NR) {
            if (cols == NR) {
#pragma GCC unroll 4
                for (int q = 0; q < NV; ++q) {
                    V::store(tile + q * W, V::load(b + q * W));
                    simd::prefetch(reinterpret_cast<const char *>(b + q * W) + kAheadOfProduct);
                }
            } else if (cols >= W) {
#pragma GCC unroll 4
                for (int q = 1; q < NV; ++q) V::store(tile + q * W, typename V::type{});
                for (int64_t j = 0; j + W < cols; j += W) V::store(tile + j, V::load(b + j));
                V::store(tile + cols - W, V::load(b + cols - W));
            } else {
                std::copy_n(b, cols, tile);
                std::fill(tile + cols, tile + NR, T(0));
            }
        }
    }
    template <int Bytes> static SUBSPAN_INLINE void as_it_lies(const Item<T> &it, int64_t r, int64_t j, int64_t cols, const T *w) {
        const T *v = it.v.data + r * it.v.row_stride, *c = it.c.data + r * it.c.row_stride + j;
        T *out = it.out.data + r * it.out.row_stride + j;
        const int64_t sr = it.v.row_stride, sd = it.v.col_stride;
        update_columns<T, Bytes, true, false>(it.k, v, sr, sd, w, c, it.c.row_stride, out, it.out.row_stride, it.alpha, cols);
    }
    template <int Bytes> static SUBSPAN_INLINE void write(Piece<T> *p) {
        constexpr int MR = Shape<Bytes>::mr, W = Vec<T, Bytes>::lanes, NR = Shape<Bytes>::nv * W;
        const Item<T> &it = *p->item;
        const int64_t m = it.c.rows, n = p->end - p->begin, k = it.k, kp = round_up(k, MR);
        const int64_t tiles = (n + NR - 1) / NR, deepest = 2 * blocking().depth;
        // Beyond that k rows of V are packed in larger blocks, and depth is cut.
        const int64_t block = k <= deepest ? MR : 64, deep = k <= deepest ? std::max<int64_t>(k, 1) : 2 * deepest;
        const Tiles cut{n, NR, W};
        core_step<T, Bytes>(it, p->w, tiles);
        Frame frame;
        T *va = frame.take<T>(block * k), *unpacked = it.packed != nullptr ? frame.take<T>(block * k) : nullptr;
        for (int64_t r = 0; r < m; r += block) {
            poll();
            const int64_t rows = std::min(block, m - r);
            // A few tiles would not pay for packing: V as it lies.
            if (tiles <= (it.v.col_stride == 1 ? kFewTiles : 2) && it.packed == nullptr && rows == MR && deep >= k && cut.cols(0) >= W) {
                for (int64_t t = 0; t < tiles; ++t) as_it_lies<Bytes>(it, r, p->begin + cut.first(t), cut.cols(t), p->w + t * kp * NR);
                continue;
            }
            pack_v<T, Bytes>(it, r, rows, true, MR, va, unpacked);
            for (int64_t t = 0; t < tiles; ++t) {
                const int64_t j = p->begin + cut.first(t), cols = cut.cols(t);
                const T *c = it.c.data + r * it.c.row_stride + j;
                T *out = it.out.data + r * it.out.row_stride + j;
                const T *w = p->w + t * kp * NR;
                for (int64_t d = 0; d == 0 || d < k; d += deep) { // out = alpha C where V has no columns
                    const int64_t depth = std::min(deep, k - d);
                    for (int64_t i = 0; i < rows; i += MR) {
                        T *o = out + i * it.out.row_stride;
                        const T *from = d == 0 ? c + i * it.c.row_stride : o;
                        update_any<T, Bytes, true>(depth, va + i * k + d * MR, MR, w + d * NR, from, d == 0 ? it.c.row_stride : it.out.row_stride, o,
                                                   it.out.row_stride, d == 0 ? it.alpha : T(1), rows - i, cols);
                    }
                }
            }
        }
    }
};

// ---- right ---------------------------------------------------------------------------------------------------------

template <class T> struct RightKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(Piece<T> *p) {
        constexpr int MR = Shape<Bytes>::mr, NR = Shape<Bytes>::nv * Vec<T, Bytes>::lanes;
        const Item<T> &it = *p->item;
        if (is_narrow<T, Bytes>(it, false)) {
            if (it.c.cols <= Vec<T, Bytes>::lanes) return narrow<Bytes, 1>(p);
            return narrow<Bytes, 2>(p);
        }
        const int64_t n = it.c.cols, k = it.k, kp = round_up(k, MR), step = 4 * NR;
        const bool dots = k <= kDot && it.packed == nullptr;
        Frame frame;
        T *vt = nullptr; // [tile of NR columns][kd][NR], the whole of Vᵀ, where k is small
        const int64_t kd = round_up(k, 4), width = (n + NR - 1) / NR;
        if (dots) {
            vt = frame.zeros<T>(width * kd * NR);
            for (int64_t t = 0; t < width; ++t) pack_v<T, Bytes>(it, t * NR, std::min<int64_t>(NR, n - t * NR), true, NR, vt + t * kd * NR, nullptr);
        }
        // A block of rows is read and written while it is in the cache, unless the caller wants all of it read first.
        const int64_t block = p->read && p->write && dots ? NR : step;
        for (int64_t r = p->begin; r < p->end; r += block) {
            poll();
            const int64_t rows = std::min(block, p->end - r), tiles = (rows + NR - 1) / NR;
            T *w = p->w + (r - p->begin) * kp;
            if (p->read) {
                if (dots)
                    read_dots<Bytes>(it, r, rows, vt, w);
                else
                    read_packed<Bytes>(it, r, rows, w);
                if (p->check && !finite_items(p, w, tiles * kp * NR)) {
                    p->finite = false;
                    return;
                }
            }
            if (!p->write) continue;
            core_step<T, Bytes>(it, w, tiles);
            if (dots)
                write_dots<Bytes>(it, r, rows, vt, w);
            else
                write_packed<Bytes>(it, r, rows, w);
        }
    }

    // C (alpha I + V M Vᵀ) with V M Vᵀ as one small matrix: out_i = alpha c_i + Σ_j d_ij (V M Vᵀ)_j.
    template <int Bytes, int NV> static SUBSPAN_INLINE void narrow(Piece<T> *p) {
        constexpr int W = Vec<T, Bytes>::lanes;
        const Item<T> &it = *p->item;
        const int64_t n = it.c.cols, k = it.k;
        alignas(64) T q[2 * W * NV * W];
        double largest = 0;
        for (int64_t i = 0; i < n; ++i) {
            double sums[2 * W] = {};
            for (int64_t l = 0; l < k; ++l) {
                // it.m is Mᵀ: (V M)_il.
                double vm = 0;
                if (it.kind == Core<T>::Kind::full)
                    for (int64_t a = 0; a < k; ++a) vm += double(it.v(i, a)) * double(it.m(l, a));
                else
                    vm = double(it.v(i, l)) * double(it.kind == Core<T>::Kind::scalar ? it.scalar : it.m(0, l));
                largest = std::max(largest, std::abs(double(it.v(i, l))));
                for (int64_t j = 0; j < n; ++j) sums[j] += vm * double(it.v(j, l));
            }
            for (int64_t j = 0; j < NV * W; ++j) q[i * NV * W + j] = j < n ? T(sums[j]) : T(0);
        }
        if (p->read && p->check) {
            T top = 0;
            for (const auto *x : {&it.c, &it.x})
                if (x->data != nullptr) top = std::max(top, max_abs<T>(x->block_rows(p->begin, p->end - p->begin)));
            p->finite = std::isfinite(top);
            for (int64_t i = 0; i < n * NV * W; ++i) p->finite = p->finite && std::isfinite(q[i]);
            if (!p->finite) return;
            // At least what W is: of sums and of a difference.
            p->top = std::max(p->top, T(std::min(2.0 * double(n) * double(top) * largest, double(std::numeric_limits<T>::max()))));
        }
        if (p->write) narrow_update<T, Bytes, NV>(it, nullptr, n, q, NV * W, p->begin, p->end);
    }

    // Y[r][l] += C[r] · Vᵀ[l] for DR rows and 4 columns of V over `tiles` tiles.
    template <int Bytes, int DR>
    static SUBSPAN_INLINE void dots(const T *c, int64_t ldc, const T *vt, int64_t step, int64_t tiles, typename Vec<T, Bytes>::type (&acc)[DR][4]) {
        using V = Vec<T, Bytes>;
        constexpr int NV = Shape<Bytes>::nv, W = V::lanes, NR = NV * W;
        for (int64_t t = 0; t < tiles; ++t, c += NR, vt += step) {
#pragma GCC unroll 4
            for (int q = 0; q < NV; ++q) {
                typename V::type x[DR];
#pragma GCC unroll 4
                for (int r = 0; r < DR; ++r) x[r] = V::load(c + r * ldc + q * W);
#pragma GCC unroll 4
                for (int l = 0; l < 4; ++l) {
                    const auto y = V::load(vt + l * NR + q * W);
#pragma GCC unroll 4
                    for (int r = 0; r < DR; ++r) acc[r][l] += x[r] * y;
                }
            }
        }
    }
    template <int Bytes, int DR> static SUBSPAN_INLINE void dot_rows(const T *c, int64_t ldc, int64_t n, int64_t k, const T *vt, T *w) {
        using V = Vec<T, Bytes>;
        constexpr int NR = Shape<Bytes>::nv * V::lanes;
        constexpr int64_t kLong = 256; // tiles summed in T
        const int64_t kd = round_up(k, 4), full = n / NR, rest = n % NR;
        alignas(64) T edge[DR * NR];
        if (rest > 0) {
            std::fill_n(edge, DR * NR, T(0));
            for (int r = 0; r < DR; ++r) std::copy_n(c + r * ldc + full * NR, rest, edge + r * NR);
        }
        for (int64_t l = 0; l < kd; l += 4) {
            double sum[DR][4] = {};
            for (int64_t t = 0; t <= full; t += kLong) {
                typename V::type acc[DR][4];
                for (int r = 0; r < DR; ++r)
                    for (int q = 0; q < 4; ++q) acc[r][q] = typename V::type{};
                const int64_t tiles = std::min(kLong, full - t);
                dots<Bytes, DR>(c + t * NR, ldc, vt + (t * kd + l) * NR, kd * NR, tiles, acc);
                if (t + tiles == full && rest > 0 && tiles < kLong) dots<Bytes, DR>(edge, NR, vt + (full * kd + l) * NR, kd * NR, 1, acc);
                for (int r = 0; r < DR; ++r)
                    for (int q = 0; q < 4; ++q) sum[r][q] += double(V::sum(acc[r][q]));
            }
            for (int q = 0; q < 4 && l + q < k; ++q)
                for (int r = 0; r < DR; ++r) w[(l + q) * NR + r] = T(sum[r][q]);
        }
    }
    template <int Bytes> static SUBSPAN_INLINE void read_dots(const Item<T> &it, int64_t first, int64_t rows, const T *vt, T *w) {
        constexpr int DR = Bytes == 64 ? 4 : 2, MR = Shape<Bytes>::mr, NR = Shape<Bytes>::nv * Vec<T, Bytes>::lanes;
        const int64_t n = it.c.cols, k = it.k, kp = round_up(k, MR);
        const bool differs = it.x.data != nullptr;
        Frame frame;
        T *difference = differs ? frame.take<T>(DR * n) : nullptr;
        std::fill_n(w, round_up(rows, NR) * kp, T(0));
        for (int64_t i = 0; i < rows;) {
            const int64_t count = rows - i >= DR ? DR : 1;
            const T *c = it.c.data + (first + i) * it.c.row_stride;
            int64_t ldc = it.c.row_stride;
            if (differs) {
                for (int64_t r = 0; r < count; ++r) {
                    const T *x = it.x.data + (first + i + r) * it.x.row_stride;
                    for (int64_t j = 0; j < n; ++j) difference[r * n + j] = x[j] - c[r * ldc + j];
                }
                c = difference;
                ldc = n;
            }
            T *to = w + (i / NR) * kp * NR + i % NR;
            if (count == DR)
                dot_rows<Bytes, DR>(c, ldc, n, k, vt, to);
            else
                dot_rows<Bytes, 1>(c, ldc, n, k, vt, to);
            i += count;
        }
    }
    template <int Bytes> static SUBSPAN_INLINE void write_dots(const Item<T> &it, int64_t first, int64_t rows, const T *vt, const T *w) {
        constexpr int MR = Shape<Bytes>::mr, NR = Shape<Bytes>::nv * Vec<T, Bytes>::lanes;
        const int64_t n = it.c.cols, k = it.k, kp = round_up(k, MR), kd = round_up(k, 4);
        for (int64_t i = 0; i < rows; i += MR) {
            const T *a = w + (i / NR) * kp * NR + i % NR;
            const T *c = it.c.data + (first + i) * it.c.row_stride;
            T *out = it.out.data + (first + i) * it.out.row_stride;
            for (int64_t j = 0; j < n; j += NR)
                update_any<T, Bytes, true>(k, a, NR, vt + (j / NR) * kd * NR, c + j, it.c.row_stride, out + j, it.out.row_stride, it.alpha, rows - i, n - j);
        }
    }
    template <int Bytes> static SUBSPAN_INLINE void read_packed(const Item<T> &it, int64_t first, int64_t rows, T *w) {
        constexpr int MR = Shape<Bytes>::mr, NR = Shape<Bytes>::nv * Vec<T, Bytes>::lanes;
        const int64_t n = it.c.cols, k = it.k, kp = round_up(k, MR), tiles = (rows + NR - 1) / NR, deepest = blocking().depth;
        const bool differs = it.x.data != nullptr;
        Frame frame;
        T *va = frame.take<T>(deepest * kp), *tile = frame.take<T>(deepest * NR);
        T *other = differs ? frame.take<T>(deepest * NR) : nullptr;
        T *unpacked = it.packed != nullptr ? frame.take<T>(deepest * k) : nullptr;
        std::fill_n(w, tiles * kp * NR, T(0));
        Totals<T> totals(frame, w, tiles * kp * NR, n > 4 * kFlushRows);
        for (int64_t d = 0; d < n; d += deepest) {
            poll();
            const int64_t depth = std::min(deepest, n - d);
            pack_v<T, Bytes>(it, d, depth, false, MR, va, unpacked);
            for (int64_t t = 0; t < tiles; ++t) {
                const int64_t r = first + t * NR, lanes = std::min<int64_t>(NR, rows - t * NR);
                const auto gather = [&](const MatrixView<const T> &x, T *to) SUBSPAN_LAMBDA_INLINE {
                    const PackSource<T> src{x.data + r * x.row_stride + d, x.row_stride, 1, nullptr, false};
                    simd::pack<T, Bytes>(src, 0, lanes, depth, NR, to);
                    simd::pad(lanes, depth, NR, to);
                };
                gather(differs ? it.x : it.c, tile);
                if (differs) {
                    gather(it.c, other);
                    for (int64_t i = 0; i < depth * NR; ++i) tile[i] -= other[i];
                }
                tile_products<T, Bytes>(depth, kp / MR, va, depth * MR, MR, tile, w + t * kp * NR, lanes);
            }
            if ((d + deepest) % (4 * kFlushRows) == 0) totals.flush();
        }
        totals.finish();
    }
    template <int Bytes> static SUBSPAN_INLINE void write_packed(const Item<T> &it, int64_t first, int64_t rows, const T *w) {
        constexpr int MR = Shape<Bytes>::mr, NR = Shape<Bytes>::nv * Vec<T, Bytes>::lanes;
        const int64_t n = it.c.cols, k = it.k, kp = round_up(k, MR), deep = 4 * blocking().depth;
        Frame frame;
        T *vt = frame.take<T>(NR * k), *unpacked = it.packed != nullptr ? frame.take<T>(NR * k) : nullptr;
        for (int64_t j = 0; j < n; j += NR) {
            poll();
            pack_v<T, Bytes>(it, j, std::min<int64_t>(NR, n - j), true, NR, vt, unpacked);
            for (int64_t d = 0; d < k; d += deep)
                for (int64_t i = 0; i < rows; i += MR) {
                    const T *a = w + (i / NR) * kp * NR + d * NR + i % NR;
                    T *out = it.out.data + (first + i) * it.out.row_stride + j;
                    const T *c = d == 0 ? it.c.data + (first + i) * it.c.row_stride + j : out;
                    update_any<T, Bytes, false>(std::min(deep, k - d), a, NR, vt + d * NR, c, d == 0 ? it.c.row_stride : it.out.row_stride, out,
                                                it.out.row_stride, d == 0 ? it.alpha : T(1), rows - i, n - j);
                }
        }
    }
};

// ---- the call ------------------------------------------------------------------------------------------------------

template <class T> void copy(const MatrixView<const T> &from, const MatrixView<T> &to) {
    for (int64_t i = 0; i < from.rows; ++i)
        for (int64_t j = 0; j < from.cols; ++j) to(i, j) = from(i, j);
}

template <class T> void launch(Side side, Piece<T> *p) {
    if (side == Side::left)
        simd::dispatch<LeftKernel<T>>(p);
    else
        simd::dispatch<RightKernel<T>>(p);
}

// A few vectors, of which a register tile would hold little else than padding. Pieces are vectors.
template <class T> bool is_few(const Item<T> &it, Side side) {
    const int64_t count = side == Side::left ? it.cols : it.rows, inner = side == Side::left ? it.rows : it.cols;
    return it.packed == nullptr && it.x.data == nullptr && it.k > kNarrowDepth && it.k >= 4 * count && inner >= kFewLeast && count <= kFewVectors &&
           simd::few_takes<T>(it.v);
}
template <class T> void run_few(Side side, Piece<T> *p) {
    const Item<T> &it = *p->item;
    const bool left = side == Side::left;
    const int64_t count = p->end - p->begin, m = it.v.rows, k = it.k;
    const auto by_vectors = [&](auto a) { return left ? a.block_cols(p->begin, count).transposed() : a.block_rows(p->begin, count); };
    Frame frame;
    T *x = frame.take<T>(count * m);
    copy<T>(by_vectors(it.c), MatrixView<T>(x, count, m));
    if (p->read) {
        simd::few_coefficients<T>(it.v, count, x, p->w);
        p->finite = !p->check || finite_items(p, p->w, count * k);
    }
    if (!p->write || !p->finite) return;
    const T *w = p->w;
    if (it.kind == Core<T>::Kind::full) {
        T *turned = frame.take<T>(count * k);
        gemm<T>(MatrixView<const T>(p->w, count, k), it.m.transposed(), MatrixView<T>(turned, count, k));
        w = turned;
    } else if (it.kind == Core<T>::Kind::diagonal || it.scalar != T(1)) {
        for (int64_t f = 0; f < count; ++f)
            for (int64_t l = 0; l < k; ++l) p->w[f * k + l] *= it.kind == Core<T>::Kind::scalar ? it.scalar : it.m(0, l);
    }
    simd::few_update<T>(it.v, count, w, it.alpha, x, x);
    copy<T>(MatrixView<const T>(x, count, m), by_vectors(it.out));
}

// Where rows are not contiguous a piece works on a copy of its columns (left) or rows (right).
template <class T> void run_piece(Side side, Piece<T> *p) {
    const Item<T> &it = *p->item;
    if (is_few(it, side)) return run_few(side, p);
    const auto plain = [](const auto &m) { return m.data == nullptr || m.col_stride == 1 || m.cols == 1; };
    if (plain(it.c) && plain(it.out) && plain(it.x)) return launch(side, p);
    const int64_t count = p->end - p->begin, rows = side == Side::left ? it.c.rows : count;
    const int64_t cols = side == Side::left ? count : it.c.cols;
    const auto cut = [&](auto m) { return side == Side::left ? m.block_cols(p->begin, count) : m.block_rows(p->begin, count); };
    Frame frame;
    Item<T> local = it;
    const MatrixView<T> c(frame.take<T>(rows * cols), rows, cols);
    copy<T>(cut(it.c), c);
    local.c = local.out = c;
    if (it.x.data != nullptr) {
        const MatrixView<T> x(frame.take<T>(rows * cols), rows, cols);
        copy<T>(cut(it.x), x);
        local.x = x;
    }
    Piece<T> q{&local, 0, count, p->w, p->read, p->write, p->check};
    launch(side, &q);
    p->finite = q.finite;
    p->top = q.top;
    if (p->write && p->finite) copy<T>(c, cut(it.out));
}

// A stack of tiny matrices, each without gaps.
template <class T>
std::optional<simd::TinyStack<T>> tiny_stack(const StackView<const T> &c, const StackView<const T> &x, const StackView<T> &out, const Basis<T> &v,
                                             const Core<T> &core, T alpha, Side side) {
    const bool left = side == Side::left;
    const int64_t m = c.rows(), n = c.cols(), k = v.cols(), inner = left ? m : n;
    if (c.shape.empty() || v.packed != nullptr || x.first.data != nullptr || core.kind != Core<T>::Kind::scalar) return std::nullopt;
    if (!simd::lanes_pay<T>(c.size(), m, n, k, left)) return std::nullopt;
    simd::TinyStack<T> s{c.first.data, v.dense.first.data, out.first.data, c.size(), 0, 0, 0, m, n, k, v.dense.first.row_stride, v.dense.first.col_stride, left,
                         alpha,        core.scalar};
    const auto by_rows = [&](const auto &a) { return (a.col_stride == 1 || n == 1) && (a.row_stride == n || m == 1); };
    const auto &b = v.dense.first;
    const bool rows = (b.col_stride == 1 || k == 1) && (b.row_stride == k || inner == 1),
               columns = (b.row_stride == 1 || inner == 1) && (b.col_stride == inner || k == 1);
    if (!by_rows(c.first) || !by_rows(out.first) || !(rows || columns)) return std::nullopt;
    if (!even_steps(c, s.c_item) || !even_steps(out, s.out_item) || !even_steps(v.dense, s.v_item)) return std::nullopt;
    if (v.dense.size() == 1) s.v_item = 0;
    return s;
}

std::string shape_of(int64_t rows, int64_t cols) { return "(" + std::to_string(rows) + ", " + std::to_string(cols) + ")"; }

} // namespace

template <class T>
void apply_core(const StackView<const T> &c_in, const Basis<T> &v, const Core<T> &m_in, T alpha, Side side, const StackView<T> &out_in, bool check,
                const StackView<const T> *source) {
    using Kind = typename Core<T>::Kind;
    StackView<const T> c = c_in, x = source != nullptr ? *source : StackView<const T>();
    StackView<T> out = out_in;
    Core<T> m = m_in;
    const int64_t k = v.cols(), inner = side == Side::left ? c.rows() : c.cols();
    if (v.rows() != inner)
        throw ValueError("V must have " + std::to_string(inner) + " rows to act on C " + shape_of(c.rows(), c.cols()) + " from the " +
                         (side == Side::left ? "left" : "right") + ", got " + shape_of(v.rows(), k));
    if (out.rows() != c.rows() || out.cols() != c.cols()) throw ValueError("out must have the shape of C");
    if (m.kind == Kind::full && (m.matrix.rows() != k || m.matrix.cols() != k))
        throw ValueError("M must be " + shape_of(k, k) + ", got " + shape_of(m.matrix.rows(), m.matrix.cols()));
    if (m.kind == Kind::diagonal && (m.matrix.rows() != 1 || m.matrix.cols() != k))
        throw ValueError("a diagonal M must have " + std::to_string(k) + " entries, got " + std::to_string(m.matrix.cols()));
    if (check && !(std::isfinite(alpha) && std::isfinite(m.scalar))) throw ValueError("alpha and M must be finite");
    if (c.rows() == 0 || c.cols() == 0 || c.size() == 0) return;
    if (check && k == 0) // nothing is summed that would show it
        if (!all_finite<T>(c)) throw ValueError("C holds NaN or infinity");
    if (check && m.kind != Kind::scalar && !all_finite<T>(m.matrix)) throw ValueError("M holds NaN or infinity");

    // A matrix that is contiguous along its columns is the other form of its transpose.
    const auto along_columns = [](const auto &s) { return s.first.row_stride == 1 && s.first.col_stride != 1; };
    if (c.cols() > 1 && along_columns(c) && along_columns(out) && (source == nullptr || along_columns(x))) {
        c = c.transposed();
        out = out.transposed();
        if (source != nullptr) x = x.transposed();
        if (m.kind == Kind::full) m.matrix = m.matrix.transposed();
        side = side == Side::left ? Side::right : Side::left;
    }
    if (c.cols() == 1) c.first.col_stride = out.first.col_stride = x.first.col_stride = 1;
    const bool one_basis = v.packed != nullptr || shared(v.dense);
    const bool in_place = c.first.data == out.first.data;
    if (side == Side::right && one_basis && (m.kind == Kind::scalar || shared(m.matrix)) && !c.shape.empty()) {
        auto cc = c, xx = x;
        auto oo = out;
        if (merge_axes(cc) && merge_axes(oo) && (source == nullptr || merge_axes(xx))) {
            c = cc;
            out = oo;
            x = xx;
            if (m.kind != Kind::scalar) m.matrix = StackView<const T>(m.matrix.first);
        }
    }

    const int64_t items = c.size(), along = side == Side::left ? c.cols() : c.rows();
    int64_t direct_rows = kDirectRows; // of the whole of C: a column is summed alike in any piece
    while (2 * direct_rows <= kDirectMost && 2 * direct_rows * c.cols() * int64_t(sizeof(T)) <= blocking().near) direct_rows *= 2;
    const auto item = [&](int64_t i) {
        Item<T> it;
        it.c = c[i];
        it.out = out[i];
        if (source != nullptr) it.x = x[i];
        if (v.packed != nullptr)
            it.packed = v.packed;
        else
            it.v = one_basis ? v.dense.first : v.dense[i];
        it.kind = m.kind;
        it.scalar = m.scalar;
        it.alpha = alpha;
        it.k = k;
        it.direct_rows = direct_rows;
        it.rows = c.rows();
        it.cols = c.cols();
        if (m.kind != Kind::scalar) it.m = shared(m.matrix) ? m.matrix.first : m.matrix[i];
        if (m.kind == Kind::full && side == Side::right) it.m = it.m.transposed();
        return it;
    };
    const auto plain = [](const auto &s) { return s.first.data == nullptr || s.first.col_stride == 1; };
    const bool strided = !(plain(c) && plain(out) && plain(x));

    // Pieces: strips of columns or blocks of rows. A column (row) is computed alike whatever piece it is in.
    const auto tile = simd::tile<T>();
    const int64_t nr = tile.nr, kp = round_up(std::max<int64_t>(k, 1), tile.mr);
    const double work = 2.0 * double(items) * double(c.rows()) * double(c.cols()) * double(k);
    const int threads = work > 4e6 ? num_threads() : 1;
    int64_t width = round_up(along, nr);
    if (threads > 1 && items < 4 * threads) { // as many tiles for each thread, in up to four pieces
        const int64_t tiles = (along + nr - 1) / nr, cut = threads * std::clamp<int64_t>(tiles / (4 * threads), 1, 4);
        width = std::min(width, (tiles + cut - 1) / cut * nr);
    }
    if (side == Side::left) width = std::min(width, std::max(nr, blocking().strip / 4 / kp / nr * nr));
    if (side == Side::left && is_thin<T>(c.rows(), along, k, nr)) width = round_up(along, nr); // one kernel for all of it
    // A narrow matrix from the right is worked on with a small one that each piece makes for itself.
    if (strided) width = std::min(width, side == Side::left ? 2 * nr : c.cols() <= nr ? 32 * nr : nr);
    const std::optional<simd::TinyStack<T>> tiny = tiny_stack(c, x, out, v, m, alpha, side);
    const int64_t pieces = tiny ? 1 : (along + width - 1) / width, lanes = tiny ? simd::lanes_at_once<T>() : 1;
    const int64_t tasks = (items * pieces + lanes - 1) / lanes, w_items = tiny ? tiny->coefficients() * lanes : width * kp;

    // Whether the result may leave the range of T though C, V and W are finite: never where what is added is below the last
    // digit of the largest number, and C is not enlarged.
    double bound = 0, factor = std::abs(double(m.scalar));
    if (check) {
        double largest_v = 0;
        if (v.packed != nullptr) {
            const int64_t groups = (v.rows() * k + v.packed->group - 1) / v.packed->group;
            for (int64_t g = 0; g < groups; ++g)
                largest_v = std::max(largest_v, std::abs(double(v.packed->scale[g])) * (15.0 + std::abs(double(v.packed->zero[g]))));
        } else {
            const auto &first = v.dense.first;
            const bool rows = first.col_stride == 1 && first.row_stride == first.cols, columns = first.row_stride == 1 && first.col_stride == first.rows;
            int64_t step = 0;
            if (!one_basis && (rows || columns) && even_steps(v.dense, step)) // in one go: of small ones the calls are most of the work
                largest_v = double(max_abs<T>(MatrixView<const T>(first.data, items, first.rows * first.cols, step, 1)));
            else
                for (int64_t i = 0; i < (one_basis ? 1 : items); ++i) largest_v = std::max(largest_v, double(max_abs<T>(one_basis ? first : v.dense[i])));
        }
        if (m.kind != Kind::scalar) {
            factor = 0;
            for (int64_t i = 0; i < (shared(m.matrix) ? 1 : items); ++i)
                factor = std::max(factor, double(max_abs<T>(shared(m.matrix) ? m.matrix.first : m.matrix[i])));
            if (m.kind == Kind::full) factor *= double(k);
        }
        bound = double(k) * largest_v * factor;
    }
    constexpr double most = double(std::numeric_limits<T>::max()), eps = std::numeric_limits<T>::epsilon();
    std::atomic<T> top{T(0)};
    const auto risky = [&] {
        const double added = bound * double(top.load());
        return !(std::abs(double(alpha)) <= 1.0 ? added <= most * eps / 4 : false) && !(alpha == T(0) && added <= most / 2);
    };
    std::atomic<bool> good{true};
    const auto for_tasks = [&](const std::function<void(int64_t)> &body) {
        if (threads > 1) return parallel_for(tasks, body);
        for (int64_t t = 0; t < tasks; ++t) {
            poll();
            body(t);
        }
    };
    const auto note_top = [&](T found) {
        for (T now = top.load(std::memory_order_relaxed); now < found && !top.compare_exchange_weak(now, found);) {}
    };
    const auto run = [&](int64_t t, T *w, bool read, bool write) {
        if (tiny) {
            if (read) {
                simd::apply_lanes<T>(*tiny, t, w, true, false);
                const T largest = check ? max_abs<T>(MatrixView<const T>(w, 1, w_items)) : T(0);
                if (!std::isfinite(largest)) return good.store(false, std::memory_order_relaxed);
                note_top(largest);
            }
            if (write) {
                simd::TinyStack<T> there = *tiny;
                there.out = out.first.data; // C, or what is aside: items one after the other
                if (out.first.data != tiny->out) there.out_item = c.rows() * c.cols();
                simd::apply_lanes<T>(there, t, w, false, true);
            }
            return;
        }
        const Item<T> it = item(t / pieces);
        const int64_t begin = t % pieces * width;
        Piece<T> p{&it, begin, std::min(along, begin + width), w, read, write, check};
        run_piece(side, &p);
        if (!p.finite) good.store(false, std::memory_order_relaxed);
        note_top(p.top);
    };
    const auto fused = [&](int64_t t) {
        if (!good.load(std::memory_order_relaxed)) return;
        Frame frame;
        run(t, frame.take<T>(w_items), true, true);
    };
    const auto overflows = [&] { // what was written, of what is finite
        if (!check || !risky()) return false;
        for (int64_t i = 0; i < items; ++i)
            if (!all_finite<T>(out[i])) return true;
        return false;
    };
    if (!in_place) {
        for_tasks(fused);
        if (good && !overflows()) return;
    } else {
        // All of C is read before any of it is written, so that what is refused, and what is interrupted, leaves it whole.
        // What takes long to write, or may overflow, is written aside and copied.
        Frame frame;
        T *w = frame.take<T>(tasks * w_items);
        for_tasks([&](int64_t t) { run(t, w + t * w_items, true, false); });
        const double seconds = work / 2 / 1.5e10 / threads + double(items) * double(c.rows()) * double(c.cols()) * 2 * sizeof(T) / 8e9;
        if (good && !(check && risky()) && seconds < kShielded) {
            const Shielded whole;
            for_tasks([&](int64_t t) { run(t, w + t * w_items, false, true); });
            return;
        }
        if (good) {
            const int64_t size = c.rows() * c.cols();
            Buffer<T> aside(checked_product({items, size}, "C"));
            const StackView<T> target = out;
            // Contiguous, in the order of the items and the layout that kernels take.
            std::vector<int64_t> strides(out.shape.size());
            int64_t step = size;
            for (std::size_t a = out.shape.size(); a-- > 0;) {
                strides[a] = step;
                step *= out.shape[a];
            }
            out = StackView<T>(MatrixView<T>(aside.data(), c.rows(), c.cols()), out.shape, strides);
            for_tasks([&](int64_t t) { run(t, w + t * w_items, false, true); });
            if (!overflows()) {
                const Shielded whole;
                parallel_for(items * c.rows(), [&](int64_t t) {
                    const auto from = out[t / c.rows()], to = target[t / c.rows()];
                    copy<T>(MatrixView<const T>(from.block_rows(t % c.rows(), 1)), to.block_rows(t % c.rows(), 1));
                });
                return;
            }
        }
    }
    // The slow way round, to name the culprit.
    for (int64_t i = 0; i < items; ++i) {
        if (!all_finite<T>(c[i])) throw ValueError("C holds NaN or infinity");
        if (source != nullptr && !all_finite<T>(x[i])) throw ValueError("source holds NaN or infinity");
        if (v.packed == nullptr && !all_finite<T>(one_basis ? v.dense.first : v.dense[i])) throw ValueError(std::string(v.name) + " holds NaN or infinity");
    }
    throw ValueError("the result overflows the dtype although the input is finite (products of " + std::string(v.name) + " and C overflow); scale them");
}

template void apply_core<float>(const StackView<const float> &, const Basis<float> &, const Core<float> &, float, Side, const StackView<float> &, bool,
                                const StackView<const float> *);
template void apply_core<double>(const StackView<const double> &, const Basis<double> &, const Core<double> &, double, Side, const StackView<double> &, bool,
                                 const StackView<const double> *);

} // namespace subspan
