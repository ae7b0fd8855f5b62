#include "linalg/packed_gram.hpp"
#include "linalg/microkernel.hpp"
#include "plucker/product.hpp"
#include "plucker/tile.hpp"
#include "base/blocking.hpp"
#include "base/simd.hpp"
#include "subspan/errors.hpp"
#include "subspan/parallel.hpp"
#include "subspan/plucker_mix.hpp"

#include <algorithm>
#include <atomic>

namespace subspan {

using plucker::all_finite;
using plucker::kTokens;
using plucker::lanes_of_a_vector;
using plucker::Plan;
using plucker::Projection;
using plucker::step;
using plucker::Tile;
using plucker::whole_vectors;
using simd::round_up;
using simd::Vec;
using std::int64_t;

namespace {

constexpr int64_t kGroup = 8; // tiles whose coordinates the gradient of W holds at a time

// C (`panels` of mr rows, `lanes` columns) (+)= A B: A in panels of mr that lie `apart`, B row by row.
template <class T> struct LanesKernel {
    template <int Bytes>
    static SUBSPAN_INLINE void run(int64_t depth, const T *a, int64_t panels, int64_t apart, const T *b, int64_t ldb, T *c, int64_t ldc, int64_t lanes,
                                   bool add) {
        constexpr int MR = simd::Shape<Bytes>::mr, NV = simd::Shape<Bytes>::nv, W = Vec<T, Bytes>::lanes;
        for (int64_t j = 0, n = 0; j < lanes; j += n) {
            n = step(lanes - j, W);
            for (int64_t p = 0; p < panels; ++p) {
                const T *x = a + p * apart;
                T *to = c + p * MR * ldc + j;
                if (n == NV * W)
                    simd::microkernel<T, Bytes, NV>(depth, x, MR, b + j, to, ldc, add, ldb);
                else if (n == 2 * W)
                    simd::microkernel<T, Bytes, 2>(depth, x, MR, b + j, to, ldc, add, ldb);
                else
                    simd::microkernel<T, Bytes, 1>(depth, x, MR, b + j, to, ldc, add, ldb);
            }
        }
    }
};

template <class T>
void multiply(int64_t depth, const T *a, int64_t panels, int64_t apart, const T *b, int64_t ldb, T *c, int64_t ldc, int64_t lanes, bool add) {
    simd::dispatch<LanesKernel<T>, int64_t, const T *, int64_t, int64_t, const T *, int64_t, T *, int64_t, int64_t, bool>(depth, a, panels, apart, b, ldb, c,
                                                                                                                          ldc, lanes, add);
}

constexpr int64_t kStrip = 4; // panels that are filled at a time: 128 bytes of a row are read along

// Columns of x (rows x kStrip · mr or fewer) as panels of mr that lie `apart`, zeros past the last column and for rows that
// are not active (null: all are); sum (null: not wanted) += those columns times `by`, where that is not zero.
template <class T> struct PanelKernel {
    template <int Bytes>
    static SUBSPAN_INLINE void run(const MatrixView<const T> *x, const double *by, const unsigned char *active, T *to, int64_t apart, double *sum) {
        constexpr int MR = simd::Shape<Bytes>::mr;
        const bool whole = x->cols == kStrip * MR && x->col_stride == 1;
        double total[kStrip * MR] = {};
        for (int64_t t = 0; t < x->rows; ++t) {
            const bool in = active == nullptr || active[t] != 0;
            if (whole && in) {
                using V = Vec<T, MR *int(sizeof(T))>;
                const T *row = x->data + t * x->row_stride;
                for (int64_t q = 0; q < kStrip; ++q) V::store(to + q * apart + t * MR, V::load(row + q * MR));
                if (sum == nullptr) continue;
                const double weight = by[t];
                for (int c = 0; c < kStrip * MR; ++c) total[c] += weight * double(row[c]);
                continue;
            }
            for (int64_t c = 0; c < round_up(x->cols, MR); ++c) {
                to[c / MR * apart + t * MR + c % MR] = c < x->cols && in ? (*x)(t, c) : T(0);
                if (sum != nullptr && c < x->cols && by[t] != 0) total[c] += by[t] * double((*x)(t, c));
            }
        }
        for (int64_t c = 0; c < x->cols && sum != nullptr; ++c) sum[c] += total[c];
    }
};

template <class T> void panels(MatrixView<const T> x, const double *by, const unsigned char *active, T *to, int64_t apart, double *sum) {
    simd::dispatch<PanelKernel<T>, const MatrixView<const T> *, const double *, const unsigned char *, T *, int64_t, double *>(&x, by, active, to, apart, sum);
}

} // namespace

template <class T> bool plucker_mix_project(const MixInput<T> &in, MatrixView<const T> w, const T *b, const MixOptions &o, const StackView<T> &out) {
    const Plan plan(o, in.z.cols(), in.weights != nullptr ? in.weights->cols() : 0);
    plucker::check(in, plan);
    if (w.cols != plan.coordinates) throw ValueError("W must have one column for each pair of dimensions");
    const int64_t d = w.rows;
    if (out.cols() != d || out.rows() != in.z.rows() || out.size() != in.z.size()) throw ValueError("z, W and out do not fit");
    const auto pieces = plucker::pieces_of(in.z.size(), in.z.rows());
    Frame outer;
    const Projection<T> projection(outer.take<T>(Projection<T>::size(w.rows, w.cols)), w);
    std::atomic<bool> finite{true};
    parallel_for(int64_t(pieces.size()), [&](int64_t p) {
        const auto &piece = pieces[std::size_t(p)];
        Frame frame;
        Tile<T> tile(frame, plan, false);
        plucker::Sequence<T>(in, plan.options, piece.sequence).load(tile, piece);
        if (!plucker::project_tile(tile, projection, b, out[piece.sequence].block_rows(piece.first, piece.count))) finite = false;
    });
    return finite || !all_finite(in) || !all_finite(w) || (b != nullptr && !all_finite(b, d));
}

template <class T>
bool plucker_mix_project_backward(const StackView<const T> &grad, const MixInput<T> &in, MatrixView<const T> w, const T *b, const MixOptions &o,
                                  const StackView<T> &dz, MatrixView<T> dw, T *db, const StackView<double> *dweights) {
    const Plan plan(o, in.z.cols(), in.weights != nullptr ? in.weights->cols() : 0);
    plucker::check(in, plan, dweights);
    if (w.cols != plan.coordinates) throw ValueError("W must have one column for each pair of dimensions");
    const int64_t d = w.rows, D = plan.coordinates, mr = simd::tile<T>().mr;
    if (grad.cols() != d || grad.rows() != in.z.rows() || grad.size() != in.z.size() || dz.cols() != plan.r || dz.rows() != in.z.rows() ||
        dz.size() != in.z.size() || dw.rows != d || dw.cols != D)
        throw ValueError("grad, z, W and the gradients do not fit");
    plucker::set_zero(dz);
    const auto pieces = plucker::pieces_of(in.z.size(), in.z.rows());
    const int64_t total = int64_t(pieces.size()), group = std::min(kGroup, total), window = plan.r * plan.columns, deepest = blocking().depth;
    Frame outer;
    // W by blocks of d, each in panels of mr coordinates: the left operand of dp = Wᵀ gradᵀ.
    const int64_t coordinate_panels = (D + mr - 1) / mr, d_panels = (d + mr - 1) / mr;
    T *left = outer.take<T>(d * coordinate_panels * mr);
    parallel_for((d + deepest - 1) / deepest, [&](int64_t k) {
        const int64_t first = k * deepest, some = std::min(deepest, d - first);
        for (int64_t c = 0; c < D; c += kStrip * mr)
            panels<T>(w.block_rows(first, some).block_cols(c, std::min(kStrip * mr, D - c)), nullptr, nullptr, left + first * coordinate_panels * mr + c * some,
                      some * mr, nullptr);
    });
    double *windows = outer.take<double>(group * window);
    T *coordinates = outer.take<T>(group * kTokens * plan.length); // of the tokens of a group, one after the other
    T *transposed = outer.take<T>(group * kTokens * d_panels * mr);    // grad of the group in panels of mr columns
    T *sum = outer.zeros<T>(d_panels * mr * plan.length);          // dW, padded
    double *bias = outer.zeros<double>(d), *biases = outer.take<double>(group * d);
    std::vector<int64_t> at(std::size_t(group) + 1);
    for (int64_t first = 0; first < total; first += group) {
        const int64_t count = std::min(group, total - first);
        for (int64_t p = 0; p < count; ++p) at[std::size_t(p) + 1] = at[std::size_t(p)] + pieces[std::size_t(first + p)].count;
        const int64_t tokens = at[std::size_t(count)];
        Frame shared;
        double *sums = shared.take<double>(tokens);
        unsigned char *active = shared.take<unsigned char>(tokens);
        parallel_for(count, [&](int64_t p) {
            const auto &piece = pieces[std::size_t(first + p)];
            const int64_t lanes = whole_vectors<T>(piece.count), place = at[std::size_t(p)];
            const auto g = grad[piece.sequence];
            Frame frame;
            Tile<T> tile(frame, plan, true);
            plucker::Sequence<T>(in, plan.options, piece.sequence).load(tile, piece);
            tile.rows();
            tile.coordinates_of_all(coordinates + place * plan.length, plan.length);
            for (int64_t t = 0; t < piece.count; ++t) {
                sums[place + t] = o.bias_always ? 1.0 : tile.sum[t];
                active[place + t] = tile.active(t);
            }
            T *dp = frame.take<T>(coordinate_panels * mr * kTokens), *right = frame.zeros<T>(deepest * kTokens);
            double *da = frame.take<double>(plan.m * kTokens);
            if (d == 0) std::fill_n(dp, coordinate_panels * mr * kTokens, T(0));
            for (int64_t k = 0; k < d; k += deepest) {
                const int64_t some = std::min(deepest, d - k);
                plucker::tokens_to_lanes<T, T>(g.block_cols(k, some), piece.first, piece.count, right, kTokens);
                for (int64_t t = 0; t < piece.count; ++t) {
                    if (active[place + t] != 0) continue;
                    for (int64_t c = 0; c < some; ++c) right[c * kTokens + t] = T(0);
                }
                multiply<T>(some, left + k * coordinate_panels * mr, coordinate_panels, some * mr, right, kTokens, dp, kTokens, lanes, k > 0);
            }
            // grad once more, while it is in cache: in panels of mr columns over all tokens of the group, and its part of db.
            std::fill_n(biases + p * d, d, 0.0);
            for (int64_t c = 0; c < d; c += kStrip * mr)
                panels<T>(g.block_rows(piece.first, piece.count).block_cols(c, std::min(kStrip * mr, d - c)), sums + place, active + place,
                          transposed + c * tokens + place * mr, tokens * mr, biases + p * d + c);
            tile.backward(dp, kTokens, windows + p * window, da);
            if (dweights != nullptr) {
                if (b != nullptr && !o.bias_always)
                    for (int64_t t = 0; t < piece.count; ++t) {
                        double s = 0;
                        for (int64_t c = 0; c < d; ++c) s += double(g(piece.first + t, c)) * double(b[c]);
                        for (int64_t j = 0; j < plan.m; ++j) da[j * kTokens + t] += s;
                    }
                plucker::weights_backward(plan, tile.valid, tile.alpha, da, piece.count, (*dweights)[piece.sequence].block_rows(piece.first, piece.count));
            }
        });
        plucker::add_windows<T>(plan, dz, pieces.data() + first, count, windows);
        for (int64_t p = 0; p < count; ++p)
            for (int64_t c = 0; c < d; ++c) bias[c] += biases[p * d + c];
        const int64_t width = whole_vectors<T>(D), lanes = lanes_of_a_vector<T>();
        parallel_for((width + 12 * lanes - 1) / (12 * lanes), [&](int64_t s) {
            const int64_t j = s * 12 * lanes, some = std::min(12 * lanes, width - j);
            for (int64_t k = 0; k < some;) {
                const int64_t n = step(some - k, lanes);
                for (int64_t t = 0; t < tokens; t += deepest)
                    multiply<T>(std::min(deepest, tokens - t), transposed + t * mr, d_panels, tokens * mr, coordinates + t * plan.length + j + k, plan.length,
                                sum + j + k, plan.length, n, true);
                k += n;
            }
        });
    }
    std::atomic<bool> sums_finite{true};
    parallel_for(d_panels, [&](int64_t q) {
        const int64_t first = q * mr, some = std::min(mr, d - first);
        const MatrixView<const T> from(sum + first * plan.length, some, D, plan.length, 1);
        if (!all_finite(from)) sums_finite = false;
        copy_matrix<T>(from, dw.block_rows(first, some));
    });
    for (int64_t i = 0; i < d && db != nullptr; ++i) db[i] = T(bias[i]);
    const bool finite = sums_finite && all_finite<T>(StackView<const T>(dz)) && (db == nullptr || all_finite<T>(db, d));
    return finite || !all_finite(in) || !all_finite(grad) || !all_finite(w) || (b != nullptr && !all_finite(b, d));
}

#define SUBSPAN_INSTANTIATE(T)                                                                                                                                 \
    template bool plucker_mix_project<T>(const MixInput<T> &, MatrixView<const T>, const T *, const MixOptions &, const StackView<T> &);                       \
    template bool plucker_mix_project_backward<T>(const StackView<const T> &, const MixInput<T> &, MatrixView<const T>, const T *, const MixOptions &,         \
                                                  const StackView<T> &, MatrixView<T>, T *, const StackView<double> *);
SUBSPAN_INSTANTIATE(float)
SUBSPAN_INSTANTIATE(double)
#undef SUBSPAN_INSTANTIATE

} // namespace subspan
