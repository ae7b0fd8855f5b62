// The product at the end of mixing: rows of coordinates, in cache, times a packed projection.
#pragma once

#include "linalg/microkernel.hpp"
#include "linalg/packing.hpp"
#include "plucker/tile.hpp"
#include "base/blocking.hpp"
#include "base/simd.hpp"
#include "subspan/parallel.hpp"
#include "subspan/views.hpp"

#include <algorithm>
#include <cstdint>
#include <vector>

namespace subspan::plucker {

using simd::round_up;
using simd::Vec;
using std::int64_t;

// Columns are taken three vectors at a time, and the last four as two and two: one vector alone runs at half the rate.
inline int64_t step(int64_t left, int64_t lanes) {
    return left > 3 * lanes && left <= 4 * lanes ? 2 * lanes : std::min(3 * lanes, (left + lanes - 1) / lanes * lanes);
}

// How a block of rows of the output starts and what is looked at when it is done.
template <class T> struct Rows {
    const T *x; // rows x depth, with rows up to the next multiple of the register tile
    int64_t ldx;
    T *out;
    int64_t ldo, rows;
    const T *b;  // null: no bias
    const T *by; // of each row
};

// out (rows x cols) = x B + by bᵀ. B in panels of whole vectors, one after the other: that of column j begins at j · depth.
template <class T> struct RowsKernel {
    template <int Bytes, int NV, int MR>
    static SUBSPAN_INLINE void tile(int64_t depth, const T *a, int64_t lda, const T *b, T *c, int64_t ldc, int64_t rows, int64_t cols, bool add,
                                    typename Vec<T, Bytes>::type &bad) {
        using V = Vec<T, Bytes>;
        constexpr int W = V::lanes, N = NV * W;
        typename V::type acc[MR][NV];
        simd::microkernel_rows<T, Bytes, NV, MR>(depth, a, lda, b, acc);
        alignas(64) T edge[MR * N];
        const bool whole = rows >= MR && cols >= N;
        T *to = whole ? c : edge;
        const int64_t ldt = whole ? ldc : N;
        if (!whole) {
            std::fill_n(edge, MR * N, T(0));
            for (int64_t r = 0; r < std::min<int64_t>(rows, MR) && add; ++r)
                for (int64_t j = 0; j < std::min<int64_t>(cols, N); ++j) edge[r * N + j] = c[r * ldc + j];
        }
#pragma GCC unroll 8
        for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
            for (int q = 0; q < NV; ++q) {
                if (add) acc[r][q] += V::load(to + r * ldt + q * W);
                bad += T(0) * acc[r][q]; // NaN from here on where one is not finite
                V::store(to + r * ldt + q * W, acc[r][q]);
            }
        if (whole) return;
        for (int64_t r = 0; r < std::min<int64_t>(rows, MR); ++r)
            for (int64_t j = 0; j < std::min<int64_t>(cols, N); ++j) c[r * ldc + j] = edge[r * N + j];
    }
    template <int Bytes, int MR> static SUBSPAN_INLINE void sweep(const Rows<T> *rows, int64_t depth, const T *b, int64_t cols, bool *finite) {
        constexpr int NV = simd::Shape<Bytes>::nv, W = Vec<T, Bytes>::lanes;
        typename Vec<T, Bytes>::type bad{};
        const int64_t deepest = blocking().depth, blocks = (depth + deepest - 1) / deepest;
        // Rounded, so that no compiler fuses this product with a later sum: rows of any tile round alike.
        for (int64_t i = 0; i < rows->rows && rows->b != nullptr; ++i)
            for (int64_t j = 0; j < cols; ++j) rows->out[i * rows->ldo + j] = SUBSPAN_ROUNDED(rows->by[i] * rows->b[j]);
        for (int64_t k = 0; k < blocks; ++k) {
            const int64_t first = depth * k / blocks, some = depth * (k + 1) / blocks - first;
            const bool add = k > 0 || rows->b != nullptr;
            for (int64_t j = 0, n = 0; j < cols; j += n) {
                n = step(cols - j, W);
                const T *panel = b + j * depth + first * n;
                for (int64_t i = 0; i < rows->rows; i += MR) {
                    const T *x = rows->x + i * rows->ldx + first;
                    T *to = rows->out + i * rows->ldo + j;
                    if (n == NV * W)
                        tile<Bytes, NV, MR>(some, x, rows->ldx, panel, to, rows->ldo, rows->rows - i, cols - j, add, bad);
                    else if (n == 2 * W)
                        tile<Bytes, 2, MR>(some, x, rows->ldx, panel, to, rows->ldo, rows->rows - i, cols - j, add, bad);
                    else
                        tile<Bytes, 1, MR>(some, x, rows->ldx, panel, to, rows->ldo, rows->rows - i, cols - j, add, bad);
                }
            }
        }
        *finite = Vec<T, Bytes>::sum(bad) == T(0);
    }
    template <int Bytes> static SUBSPAN_INLINE void run(const Rows<T> *rows, int64_t depth, const T *b, int64_t cols, bool *finite) {
        if (rows->rows == 1) // decoding: each row adds up in the same order, however many there are
            sweep<Bytes, 1>(rows, depth, b, cols, finite);
        else
            sweep<Bytes, simd::Shape<Bytes>::mr>(rows, depth, b, cols, finite);
    }
};

template <class T> struct PackKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(const simd::PackSource<T> *s, int64_t lanes, int64_t depth, int nr, T *to) {
        simd::pack<T, Bytes>(*s, 0, lanes, depth, nr, to);
    }
};

// Lanes along the columns of x (depth x lanes), in panels of nr; zeros past the last lane.
template <class T> void pack(MatrixView<const T> x, int nr, T *to) {
    const simd::PackSource<T> source{x.data, x.col_stride, x.row_stride, nullptr, false};
    simd::dispatch<PackKernel<T>, const simd::PackSource<T> *, int64_t, int64_t, int, T *>(&source, x.cols, x.rows, nr, to);
    simd::pad(x.cols, x.rows, nr, to);
}

template <class T> int64_t lanes_of_a_vector() { return simd::tile<T>().nr / 3; }
template <class T> int64_t whole_vectors(int64_t x) { return round_up(x, lanes_of_a_vector<T>()); }

// Wᵀ (coordinates x d), packed for RowsKernel.
template <class T> class Projection {
  public:
    static int64_t size(int64_t d, int64_t depth) { return depth * whole_vectors<T>(d); }
    /// `data` has room for size() numbers.
    Projection(T *data, MatrixView<const T> w) : d_(w.rows), depth_(w.cols), data_(data) {
        std::vector<int64_t> starts;
        const int64_t lanes = lanes_of_a_vector<T>();
        for (int64_t j = 0; j < d_; j += step(d_ - j, lanes)) starts.push_back(j);
        parallel_for(int64_t(starts.size()), [&](int64_t p) {
            const int64_t j = starts[std::size_t(p)], n = step(d_ - j, lanes);
            pack<T>(w.block_rows(j, std::min(n, d_ - j)).transposed(), int(n), data_ + j * depth_);
        });
    }
    /// out = x Wᵀ + by bᵀ; whether that is finite.
    bool apply(const Rows<T> &rows) const {
        bool finite = true;
        simd::dispatch<RowsKernel<T>, const Rows<T> *, int64_t, const T *, int64_t, bool *>(&rows, depth_, data_, d_, &finite);
        return finite;
    }

  private:
    int64_t d_, depth_;
    T *data_;
};

/// to (tokens of the tile x d) = its mixed coordinates, projected, and the bias (null: none); whether that is finite.
template <class T> bool project_tile(Tile<T> &tile, const Projection<T> &projection, const T *bias, MatrixView<T> to) {
    const Plan &plan = tile.plan;
    Frame frame;
    T *coordinates = frame.take<T>(kTokens * plan.length);
    tile.rows();
    tile.coordinates_of_all(coordinates, plan.length);
    const int64_t padded = round_up(tile.count, simd::tile<T>().mr);
    std::fill_n(coordinates + tile.count * plan.length, (padded - tile.count) * plan.length, T(0));
    T by[kTokens] = {};
    for (int64_t t = 0; t < tile.count; ++t) by[t] = plan.options.bias_always ? T(1) : T(tile.sum[t]);
    const bool direct = to.col_stride == 1;
    T *g = direct ? to.data : frame.take<T>(kTokens * to.cols);
    const int64_t ldg = direct ? to.row_stride : to.cols;
    const bool finite = projection.apply({coordinates, plan.length, g, ldg, tile.count, bias, by});
    for (int64_t t = 0; t < tile.count && !direct; ++t)
        for (int64_t c = 0; c < to.cols; ++c) to(t, c) = g[t * ldg + c];
    return finite;
}

} // namespace subspan::plucker
