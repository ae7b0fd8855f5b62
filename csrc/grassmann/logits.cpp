#include "subspan/grassmann_logits.hpp"

#include "linalg/packed_gram.hpp"
#include "linalg/microkernel.hpp"
#include "base/blocking.hpp"
#include "base/amax.hpp"
#include "base/scratch.hpp"
#include "base/simd.hpp"
#include "subspan/errors.hpp"
#include "subspan/parallel.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace subspan {
namespace {

using simd::round_up;
using simd::Vec;
using std::int64_t;

constexpr int64_t kGroup = 8;   // tiles of classes whose weights are kept until they are multiplied into dx

template <class T> struct BlockKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(int64_t depth, const T *a, const T *b, T *c, int64_t ldc, int64_t rows, int64_t cols, bool add) {
        simd::block<T, Bytes>(depth, a, b, c, ldc, rows, cols, add);
    }
};

// C (+)= A B from packed panels.
template <class T> void multiply(int64_t depth, const T *a, const T *b, T *c, int64_t ldc, int64_t rows, int64_t cols, bool add) {
    simd::dispatch<BlockKernel<T>, int64_t, const T *, const T *, T *, int64_t, int64_t, int64_t, bool>(depth, a, b, c, ldc, rows, cols, add);
}

// C (+)= A B with A row by row, unpacked: its rows are read along, which caches like, and a packed copy would be as large as
// they are. Rows and columns of C are whole tiles.
template <class T> struct RowsKernel {
    template <int Bytes>
    static SUBSPAN_INLINE void run(int64_t depth, const T *a, int64_t lda, const T *b, T *c, int64_t ldc, int64_t rows, int64_t cols, bool add) {
        constexpr int NV = simd::Shape<Bytes>::nv, W = Vec<T, Bytes>::lanes, NR = NV * W;
        static_assert(NV == 3);
        for (int64_t j = 0; j < cols; j += NR) { // the last panel only as far as it has columns
            const int64_t left = cols - j;
            if (left > 2 * W)
                panel<Bytes, 3>(depth, a, lda, b + j * depth, c + j, ldc, rows, add);
            else if (left > W)
                panel<Bytes, 2>(depth, a, lda, b + j * depth, c + j, ldc, rows, add);
            else
                panel<Bytes, 1>(depth, a, lda, b + j * depth, c + j, ldc, rows, add);
        }
    }
    template <int Bytes, int NV>
    static SUBSPAN_INLINE void panel(int64_t depth, const T *a, int64_t lda, const T *b, T *c, int64_t ldc, int64_t rows, bool add) {
        using V = Vec<T, Bytes>;
        constexpr int MR = simd::Shape<Bytes>::mr, W = V::lanes;
        for (int64_t i = 0; i < rows; i += MR) {
            typename V::type acc[MR][NV];
            simd::microkernel_rows<T, Bytes, NV, MR>(depth, a + i * lda, lda, b, acc, simd::Shape<Bytes>::nv * W);
#pragma GCC unroll 8
            for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
                for (int q = 0; q < NV; ++q) {
                    T *p = c + (i + r) * ldc + q * W;
                    V::store(p, add ? V::load(p) + acc[r][q] : acc[r][q]);
                }
        }
    }
};

// Panels of `lanes` columns of a (depth x m): panel p holds a[:, p·lanes ...] row by row, zeros past m.
template <class T> void pack(MatrixView<const T> a, int64_t lanes, T *to) {
    for (int64_t j = 0; j < a.cols; j += lanes) {
        const int64_t count = std::min(lanes, a.cols - j);
        T *panel = to + j * a.rows;
        copy_matrix<T>(a.block_cols(j, count), MatrixView<T>(panel, a.rows, count, lanes, 1));
        for (int64_t d = 0; d < a.rows && count < lanes; ++d) std::fill_n(panel + d * lanes + count, lanes - count, T(0));
    }
}

// Of so few features that each is a vector, the products with a class read it once, as it lies.
constexpr int64_t kFewFeatures = 4, kFewDirections = 8;
constexpr int64_t kRun = 2048; // rows whose products are summed in T

template <class T> struct FewKernel {
    // sums[j] += Σ_p x[p K + j] u[p K + j]: of a class by rows, with every entry of the feature K times.
    template <int Bytes, int K> static SUBSPAN_INLINE void by_rows(const T *x, const T *u, int64_t items, T *sums) {
        using V = Vec<T, Bytes>;
        constexpr int W = V::lanes, N = K <= 4 ? 2 * K : K; // vectors after which the columns are the same ones
        typename V::type acc[N];
#pragma GCC unroll 8
        for (int q = 0; q < N; ++q) acc[q] = typename V::type{};
        int64_t i = 0;
        for (; i + N * W <= items; i += N * W)
#pragma GCC unroll 8
            for (int q = 0; q < N; ++q) acc[q] += V::load(x + i + q * W) * V::load(u + i + q * W);
        // What is left: whole vectors, and one that is filled up with zeros.
#pragma GCC unroll 8
        for (int q = 0; q < N; ++q, i += W) {
            if (i + W <= items) {
                acc[q] += V::load(x + i) * V::load(u + i);
            } else if (i < items) {
                alignas(64) T end_x[W] = {}, end_u[W] = {};
                std::copy_n(x + i, items - i, end_x);
                std::copy_n(u + i, items - i, end_u);
                acc[q] += V::load(end_x) * V::load(end_u);
            }
        }
        // Vectors K apart have their columns in the same places; where K divides the lanes all of them do.
        constexpr int parts = W % K == 0 ? 1 : K;
        alignas(64) T lanes[K * W];
#pragma GCC unroll 8
        for (int q = parts; q < N; ++q) acc[q % parts] += acc[q];
#pragma GCC unroll 8
        for (int q = 0; q < parts; ++q) V::store(lanes + q * W, acc[q]);
        for (int l = 0; l < parts * W; l += K)
            for (int j = 0; j < K; ++j) sums[j] += lanes[l + j];
    }
    // Row b of y, `to` of each: the projections of feature b. A class by columns, or by rows with the features spread.
    template <int Bytes>
    static SUBSPAN_INLINE void run(const StackView<const T> *u, int64_t first, int64_t count, const T *features, int64_t batch, bool columns, T *y,
                                   int64_t ldy) {
        const int64_t n = u->rows(), k = u->cols(), spread = columns ? 1 : k;
        for (int64_t c = 0; c < count; ++c) {
            const auto item = (*u)[first + c];
            for (int64_t b = 0; b < batch; ++b) {
                T *to = y + b * ldy + c * k;
                std::fill_n(to, k, T(0));
                for (int64_t p = 0; p < n; p += kRun) {
                    const int64_t some = std::min(kRun, n - p);
                    const T *x = features + (b * n + p) * spread;
                    if (columns) {
                        for (int64_t j = 0; j < k; ++j) to[j] += simd::dot<T, Bytes>(x, item.data + j * item.col_stride + p, some);
                        continue;
                    }
                    const T *from = item.data + p * k;
                    switch (k) {
                    case 2: by_rows<Bytes, 2>(x, from, some * 2, to); break;
                    case 3: by_rows<Bytes, 3>(x, from, some * 3, to); break;
                    case 4: by_rows<Bytes, 4>(x, from, some * 4, to); break;
                    case 5: by_rows<Bytes, 5>(x, from, some * 5, to); break;
                    case 6: by_rows<Bytes, 6>(x, from, some * 6, to); break;
                    case 7: by_rows<Bytes, 7>(x, from, some * 7, to); break;
                    default: by_rows<Bytes, 8>(x, from, some * 8, to); break;
                    }
                }
            }
        }
    }
};

// y holds projections, row by row: `classes` groups of k. lengths[c] = the norm of group c.
template <class T> struct LengthKernel {
    static constexpr T kTiny = T(1e3) * std::numeric_limits<T>::min() / std::numeric_limits<T>::epsilon();
    static constexpr int kSide = 16; // classes side by side

    // Whose squares have lost digits, or underflowed.
    static T scaled(const T *y, int64_t k) {
        T top = 0;
        for (int64_t j = 0; j < k; ++j) top = std::max(top, std::abs(y[j]));
        double sum = 0;
        for (int64_t j = 0; j < k && top > 0; ++j) sum += double(y[j] / top) * double(y[j] / top);
        return T(std::sqrt(sum) * double(top));
    }
    template <int K> static SUBSPAN_INLINE int64_t narrow(const T *y, int64_t classes, T *lengths) {
        int64_t c = 0;
        if constexpr (K == 1) {
            for (; c < classes; ++c) lengths[c] = std::abs(y[c]);
            return c;
        }
        for (; c + kSide <= classes; c += kSide, y += K * kSide) {
            T sums[kSide], least = std::numeric_limits<T>::max();
            for (int l = 0; l < kSide; ++l) {
                sums[l] = 0;
                for (int j = 0; j < K; ++j) sums[l] += y[l * K + j] * y[l * K + j];
            }
            for (int l = 0; l < kSide; ++l) {
                least = sums[l] < least ? sums[l] : least;
                lengths[c + l] = std::sqrt(sums[l]);
            }
            for (int l = 0; l < kSide && least < kTiny; ++l)
                if (sums[l] < kTiny) lengths[c + l] = scaled(y + l * K, K);
        }
        return c;
    }
    template <int Bytes> static SUBSPAN_INLINE void run(const T *y, int64_t classes, int64_t k, T *lengths) {
        using V = Vec<T, Bytes>;
        int64_t c = 0;
        switch (k) {
        case 1: c = narrow<1>(y, classes, lengths); break;
        case 2: c = narrow<2>(y, classes, lengths); break;
        case 3: c = narrow<3>(y, classes, lengths); break;
        case 4: c = narrow<4>(y, classes, lengths); break;
        default: break;
        }
        for (y += c * k; c < classes; ++c, y += k) {
            int64_t j = 0;
            T sum = 0;
            if (k >= V::lanes) {
                typename V::type acc{};
                for (; j + V::lanes <= k; j += V::lanes) acc += V::load(y + j) * V::load(y + j);
                sum = V::sum(acc);
            }
            if constexpr (Bytes > 16) {
                using H = Vec<T, Bytes / 2>;
                if (j + H::lanes <= k) {
                    sum += H::sum(H::load(y + j) * H::load(y + j));
                    j += H::lanes;
                }
            }
            for (; j < k; ++j) sum += y[j] * y[j];
            lengths[c] = sum < kTiny ? scaled(y, k) : std::sqrt(sum);
        }
    }
};

template <class T> void lengths_of(const T *y, int64_t classes, int64_t k, T *lengths) {
    simd::dispatch<LengthKernel<T>, const T *, int64_t, int64_t, T *>(y, classes, k, lengths);
}

// Rows at unit length in place, and 1 / ‖x‖ in two factors, of which one may be the largest power of two.
template <class T> struct UnitKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(T *rows, int64_t batch, int64_t n, double *inverse, double *power) {
        constexpr int L = 16; // independent sums, which the compiler turns into vectors
        for (int64_t b = 0; b < batch; ++b) {
            T *x = rows + b * n;
            const double scale = std::ldexp(1.0, -near_exponent(double(max_abs_inline(x, n))));
            double sums[L] = {}, sum = 0;
            int64_t p = 0;
            for (; p + L <= n; p += L)
                for (int l = 0; l < L; ++l) sums[l] += (scale * double(x[p + l])) * (scale * double(x[p + l]));
            for (int l = 0; l < L; ++l) sum += sums[l];
            for (; p < n; ++p) sum += (scale * double(x[p])) * (scale * double(x[p]));
            const double r = sum > 0 ? 1.0 / std::sqrt(sum) : (sum == 0 ? 0.0 : sum);
            for (p = 0; p < n; ++p) x[p] = T(scale * double(x[p]) * r);
            inverse[b] = r;
            power[b] = scale;
        }
    }
};

// What forward and backward share: unit features, and the projections of a tile of classes.
template <class T> class Head {
  public:
    Head(Frame &frame, MatrixView<const T> x, const StackView<const T> &u)
        : u(u), batch(x.rows), n(x.cols), k(u.cols()), classes(u.size()), mr(simd::tile<T>().mr), nr(simd::tile<T>().nr),
          rows(round_up(std::max<int64_t>(x.rows, 1), mr)) {
        // About 192 columns, fewer where the batch is large: the tile of projections stays in L2.
        const int64_t columns = std::max<int64_t>(nr, std::min<int64_t>(4 * nr, (int64_t(1) << 17) / std::max<int64_t>(batch, 1)));
        per_tile = std::max<int64_t>(1, columns / std::max<int64_t>(k, 1));
        tiles = (classes + per_tile - 1) / per_tile;
        width = round_up(per_tile * k, nr);
        unit = {frame.take<T>(rows * n), batch, n};
        std::fill_n(unit.data + batch * n, (rows - batch) * n, T(0));
        inverse = frame.take<double>(batch);
        power = frame.take<double>(batch);
        copy_matrix<T>(x, unit);
        simd::dispatch<UnitKernel<T>, T *, int64_t, int64_t, double *, double *>(unit.data, batch, n, inverse, power);
    }
    int64_t count(int64_t tile) const { return std::min(per_tile, classes - tile * per_tile); }

    // Items from a column of all classes side by side (n x classes k) to the next, where they are one matrix by columns; else zero.
    static int64_t one_matrix(const StackView<const T> &u) {
        if (u.shape.size() != 1 || u.rows() == 0 || (u.first.row_stride != 1 && u.rows() > 1)) return 0;
        const int64_t column = u.cols() > 1 ? u.first.col_stride : u.strides[0];
        return column >= u.rows() && u.strides[0] == u.cols() * column ? column : 0;
    }

    // Where classes are rows of one matrix these are read as they lie, and the features are what is packed: once, and not each class.
    // So are they for few features, which are spread where a class has rows of several entries.
    void pack_features(Frame &frame) {
        by_columns = u.first.row_stride == 1 || n == 1;
        const bool spread = !by_columns && k <= kFewDirections && u.first.col_stride == 1 && u.first.row_stride == k;
        if (n > 0 && ((by_columns && batch <= kFewFeatures / 2) || (spread && batch <= kFewFeatures))) {
            few = true;
            features = unit.data;
            if (by_columns) return;
            T *to = frame.take<T>(batch * n * k);
            for (int64_t p = 0; p < batch * n; ++p)
                for (int64_t j = 0; j < k; ++j) to[p * k + j] = unit.data[p];
            features = to;
            return;
        }
        if (one_matrix(u) == 0) return;
        const int64_t deepest = blocking().depth;
        T *to = frame.take<T>(round_up(batch, nr) * n);
        for (int64_t d = 0; d < n; d += deepest)
            pack<T>(MatrixView<const T>(unit).block_cols(d, std::min(deepest, n - d)).transposed(), nr, to + d * round_up(batch, nr));
        features = to;
    }
    bool project_as_they_lie(int64_t tile, T *y) const {
        const int64_t columns = count(tile) * k, column = features == nullptr ? 0 : one_matrix(u), deepest = blocking().depth;
        if (column == 0 || columns % mr != 0) return false;
        Frame frame;
        const int64_t across = round_up(batch, nr);
        T *turned = frame.take<T>(columns * across);
        const T *first = u[tile * per_tile].data;
        for (int64_t d = 0; d < n; d += deepest)
            simd::dispatch<RowsKernel<T>, int64_t, const T *, int64_t, const T *, T *, int64_t, int64_t, int64_t, bool>(
                std::min(deepest, n - d), first + d, column, features + d * across, turned, across, columns, batch, d > 0);
        copy_matrix<T>(MatrixView<const T>(turned, columns, batch, across, 1).transposed(), MatrixView<T>(y, batch, columns, width, 1));
        return true;
    }

    // y (rows x width) = the projections on the classes of a tile.
    void project(int64_t tile, T *y) const {
        if (few) {
            simd::dispatch<FewKernel<T>, const StackView<const T> *, int64_t, int64_t, const T *, int64_t, bool, T *, int64_t>(
                &u, tile * per_tile, count(tile), features, batch, by_columns, y, width);
            return;
        }
        if (project_as_they_lie(tile, y)) return;
        Frame frame;
        const int64_t columns = count(tile) * k, deepest = 2 * blocking().depth;
        T *packed = frame.take<T>(deepest * width);
        for (int64_t d = 0; d < n; d += deepest) {
            const int64_t depth = std::min(deepest, n - d);
            // Classes of one column are columns of one matrix, which are turned by blocks.
            const bool lines = k == 1 && u.shape.size() == 1;
            for (int64_t j = 0; j < count(tile) && lines; j += nr) {
                const int64_t some = std::min(nr, count(tile) - j);
                const auto first = u[tile * per_tile + j];
                copy_matrix<T>(MatrixView<const T>(&first(d, 0), depth, some, first.row_stride, u.strides[0]),
                               MatrixView<T>(packed + j * depth, depth, some, nr, 1));
            }
            for (int64_t i = 0; i < count(tile) && !lines; ++i) {
                const auto basis = u[tile * per_tile + i].block_rows(d, depth);
                for (int64_t j = 0; j < k;) { // a class may straddle panels
                    const int64_t at = i * k + j, some = std::min(k - j, nr - at % nr);
                    copy_matrix<T>(basis.block_cols(j, some), MatrixView<T>(packed + at / nr * nr * depth + at % nr, depth, some, nr, 1));
                    j += some;
                }
            }
            const int64_t past = columns % nr;
            if (past != 0)
                for (int64_t p = 0; p < depth; ++p) std::fill_n(packed + columns / nr * nr * depth + p * nr + past, nr - past, T(0));
            simd::dispatch<RowsKernel<T>, int64_t, const T *, int64_t, const T *, T *, int64_t, int64_t, int64_t, bool>(depth, unit.data + d, n, packed, y,
                                                                                                                        width, rows, columns, d > 0);
        }
    }

    // A tile of what was kept, or back.
    void keep(int64_t tile, const T *y, T *kept) const {
        const int64_t columns = count(tile) * k;
        for (int64_t b = 0; b < batch; ++b) std::copy_n(y + b * width, columns, kept + b * classes * k + tile * per_tile * k);
    }
    void fetch(int64_t tile, const T *kept, T *y) const {
        const int64_t columns = count(tile) * k;
        for (int64_t b = 0; b < batch; ++b) std::copy_n(kept + b * classes * k + tile * per_tile * k, columns, y + b * width);
    }

    const StackView<const T> &u;
    int64_t batch, n, k, classes, mr, nr, rows; // rows: batch, padded
    int64_t per_tile, tiles, width;
    MatrixView<T> unit;
    const T *features = nullptr; // packed, or spread
    bool few = false, by_columns = false;
    double *inverse, *power;
};

template <class F> void for_each(int64_t items, const F &body) {
    if (items == 1) return body(0);
    parallel_for(items, body);
}

} // namespace

template <class T> void grassmann_logits(MatrixView<const T> x, const StackView<const T> &u, double scale, MatrixView<T> out, T *projections) {
    if (u.rows() != x.cols || out.rows != x.rows || out.cols != u.size()) throw ValueError("x, u and out do not fit");
    if (x.rows == 0 || u.size() == 0) return;
    if (x.cols == 0 || u.cols() == 0) {
        for (int64_t b = 0; b < out.rows; ++b)
            for (int64_t c = 0; c < out.cols; ++c) out(b, c) = T(0);
        if (projections != nullptr) std::fill_n(projections, x.rows * u.size() * u.cols(), T(0));
        return;
    }
    Frame frame;
    Head<T> head(frame, x, u);
    head.pack_features(frame);
    for_each(head.tiles, [&](int64_t t) {
        Frame mine;
        T *y = mine.take<T>(head.rows * head.width), *lengths = mine.take<T>(head.per_tile);
        head.project(t, y);
        if (projections != nullptr) head.keep(t, y, projections);
        for (int64_t b = 0; b < head.batch; ++b) {
            const int64_t count = head.count(t);
            lengths_of<T>(y + b * head.width, count, head.k, lengths);
            T *to = &out(b, t * head.per_tile);
            for (int64_t c = 0; c < count && out.col_stride == 1; ++c) to[c] = T(scale * double(lengths[c])); // by vectors
            for (int64_t c = 0; c < count && out.col_stride != 1; ++c) to[c * out.col_stride] = T(scale * double(lengths[c]));
        }
    });
}

template <class T>
void grassmann_logits_backward(MatrixView<const T> grad, MatrixView<const T> x, const StackView<const T> &u, double scale, MatrixView<T> dx,
                               const StackView<T> &du, const T *projections) {
    const int64_t classes = u.size();
    if (u.rows() != x.cols || grad.rows != x.rows || grad.cols != classes || dx.rows != x.rows || dx.cols != x.cols || du.rows() != u.rows() ||
        du.cols() != u.cols() || du.size() != classes)
        throw ValueError("grad, x, u, dx and du do not fit");
    if (x.rows == 0 || x.cols == 0 || classes == 0 || u.cols() == 0) {
        for (int64_t b = 0; b < dx.rows; ++b)
            for (int64_t p = 0; p < dx.cols; ++p) dx(b, p) = T(0);
        for (int64_t c = 0; c < (du.empty() ? 0 : classes); ++c) {
            const auto d = du[c];
            for (int64_t p = 0; p < d.rows; ++p)
                for (int64_t j = 0; j < d.cols; ++j) d(p, j) = T(0);
        }
        return;
    }
    Frame frame;
    const Head<T> head(frame, x, u); // without packed features: a training step that counts on speed keeps the projections
    const int64_t batch = head.batch, n = head.n, k = head.k, mr = head.mr, nr = head.nr;
    const int64_t deepest = 2 * blocking().depth, depth_blocks = (batch + deepest - 1) / deepest;
    // The gradient of the unit features is summed where dx will be, if that has contiguous rows.
    const MatrixView<T> sum = dx.col_stride == 1 ? dx : MatrixView<T>(frame.take<T>(batch * n), batch, n);
    for (int64_t b = 0; b < batch; ++b) std::fill_n(sum.data + b * sum.row_stride, n, T(0));
    T *weights = frame.take<T>(std::min(kGroup, head.tiles) * head.rows * head.width);
    const int64_t strip = 64; // rows of du at a time
    const int64_t du_column = Head<T>::one_matrix(StackView<const T>(du));
    T *right = du_column > 0 ? frame.take<T>(batch * round_up(n, nr)) : nullptr; // unit features
    for (int64_t d = 0; d < batch && du_column > 0; d += deepest)
        pack<T>(MatrixView<const T>(head.unit).block_rows(d, std::min(deepest, batch - d)), nr, right + d * round_up(n, nr));
    for (int64_t first = 0; first < head.tiles; first += kGroup) {
        const int64_t tiles = std::min(kGroup, head.tiles - first);
        for_each(tiles, [&](int64_t s) {
            const int64_t tile = first + s, count = head.count(tile), columns = count * k;
            Frame mine;
            T *y = mine.take<T>(head.rows * head.width), *lengths = mine.take<T>(head.per_tile);
            if (projections != nullptr)
                head.fetch(tile, projections, y);
            else
                head.project(tile, y);
            for (int64_t b = 0; b < batch; ++b) {
                T *row = y + b * head.width;
                lengths_of<T>(row, count, k, lengths);
                for (int64_t c = 0; c < count; ++c) {
                    const double g = double(grad(b, tile * head.per_tile + c));
                    const T w = T(lengths[c] == T(0) ? 0.0 * g : scale * g / double(lengths[c]));
                    for (int64_t j = 0; j < k; ++j) row[c * k + j] *= w;
                }
            }
            const MatrixView<const T> w(y, batch, columns, head.width, 1);
            pack<T>(w.transposed(), mr, weights + s * head.rows * head.width);
            if (du_column > 0) { // rows of one matrix, which are written where they belong
                T *left = mine.take<T>(std::min(deepest, batch) * head.width), *to = du[tile * head.per_tile].data;
                for (int64_t d = 0; d < batch; d += deepest) {
                    const int64_t depth = std::min(deepest, batch - d);
                    pack<T>(w.block_rows(d, depth), mr, left);
                    multiply<T>(depth, left, right + d * round_up(n, nr), to, du_column, columns, n, d > 0);
                }
                return;
            }
            T *packed = mine.take<T>(depth_blocks * deepest * head.width), *block = mine.take<T>(strip * head.width);
            T *across = mine.take<T>(std::min(deepest, batch) * round_up(strip, mr)); // unit features, transposed
            for (int64_t d = 0; d < batch; d += deepest) pack<T>(w.block_rows(d, std::min(deepest, batch - d)), nr, packed + d * head.width);
            for (int64_t r = 0; r < n; r += strip) {
                const int64_t some = std::min(strip, n - r);
                for (int64_t d = 0; d < batch; d += deepest) {
                    const int64_t depth = std::min(deepest, batch - d);
                    pack<T>(MatrixView<const T>(head.unit).block_rows(d, depth).block_cols(r, some), mr, across);
                    multiply<T>(depth, across, packed + d * head.width, block, head.width, some, columns, d > 0);
                }
                for (int64_t c = 0; c < count; ++c)
                    copy_matrix<T>(MatrixView<const T>(block + c * k, some, k, head.width, 1), du[tile * head.per_tile + c].block_rows(r, some));
            }
        });
        // sum += W Uᵀ, by blocks of columns: tiles in their order, whatever the threads.
        const int64_t span = 4 * nr;
        for_each((n + span - 1) / span, [&](int64_t s) {
            const int64_t p = s * span, some = std::min(span, n - p);
            Frame mine;
            T *packed = mine.take<T>(round_up(span, nr) * head.per_tile * k);
            for (int64_t t = 0; t < tiles; ++t) {
                const int64_t count = head.count(first + t), depth = count * k;
                for (int64_t l = 0; l < some; l += nr) {
                    const int64_t lanes = std::min(nr, some - l);
                    T *panel = packed + l * depth;
                    for (int64_t c = 0; c < count; ++c)
                        copy_matrix<T>(head.u[(first + t) * head.per_tile + c].block_rows(p + l, lanes), MatrixView<T>(panel + c * k * nr, lanes, k, 1, nr));
                    for (int64_t d = 0; d < depth && lanes < nr; ++d) std::fill_n(panel + d * nr + lanes, nr - lanes, T(0));
                }
                multiply<T>(depth, weights + t * head.rows * head.width, packed, sum.data + p, sum.row_stride, batch, some, true);
            }
        });
    }
    for (int64_t b = 0; b < batch; ++b) { // through the normalisation
        double dot = 0;
        for (int64_t p = 0; p < n; ++p) dot += double(head.unit(b, p)) * double(sum(b, p));
        for (int64_t p = 0; p < n; ++p) dx(b, p) = T((double(sum(b, p)) - dot * double(head.unit(b, p))) * head.inverse[b] * head.power[b]);
    }
}

#define SUBSPAN_INSTANTIATE(T)                                                                                                                                 \
    template void grassmann_logits<T>(MatrixView<const T>, const StackView<const T> &, double, MatrixView<T>, T *);                                            \
    template void grassmann_logits_backward<T>(MatrixView<const T>, MatrixView<const T>, const StackView<const T> &, double, MatrixView<T>,                    \
                                               const StackView<T> &, const T *);
SUBSPAN_INSTANTIATE(float)
SUBSPAN_INSTANTIATE(double)
#undef SUBSPAN_INSTANTIATE

} // namespace subspan
