#include "subspan/plucker_mix.hpp"

#include "plucker/tile.hpp"
#include "subspan/errors.hpp"
#include "subspan/parallel.hpp"

#include <algorithm>
#include <atomic>

namespace subspan {

using plucker::all_finite;
using plucker::kTokens;
using plucker::Plan;
using plucker::Tile;
using std::int64_t;

namespace {

// Tiles whose windows are held at a time, before they are added up.
constexpr int64_t kWindows = 32;

} // namespace

template <class T> bool plucker_mix(const MixInput<T> &in, const MixOptions &o, const StackView<T> &out) {
    const Plan plan(o, in.z.cols(), in.weights != nullptr ? in.weights->cols() : 0);
    if (out.cols() != plan.coordinates || out.rows() != in.z.rows() || out.size() != in.z.size()) throw ValueError("z and out do not fit");
    plucker::check(in, plan);
    const auto pieces = plucker::pieces_of(in.z.size(), in.z.rows());
    std::atomic<bool> finite{true};
    parallel_for(int64_t(pieces.size()), [&](int64_t p) {
        const auto &piece = pieces[std::size_t(p)];
        Frame frame;
        Tile<T> tile(frame, plan, false);
        T *row = frame.take<T>(plan.length);
        plucker::Sequence<T>(in, plan.options, piece.sequence).load(tile, piece);
        tile.rows();
        const auto to = out[piece.sequence].block_rows(piece.first, piece.count);
        for (int64_t t = 0; t < piece.count; ++t) {
            tile.coordinates(t, row);
            if (!all_finite(row, plan.coordinates)) finite = false;
            if (to.col_stride == 1)
                std::copy_n(row, plan.coordinates, to.data + t * to.row_stride);
            else
                for (int64_t c = 0; c < plan.coordinates; ++c) to(t, c) = row[c];
        }
    });
    return finite || !all_finite(in);
}

template <class T>
bool plucker_mix_backward(const StackView<const T> &grad, const MixInput<T> &in, const MixOptions &o, const StackView<T> &dz,
                          const StackView<double> *dweights) {
    const Plan plan(o, in.z.cols(), in.weights != nullptr ? in.weights->cols() : 0);
    if (grad.cols() != plan.coordinates || grad.rows() != in.z.rows() || grad.size() != in.z.size() || dz.cols() != plan.r || dz.rows() != in.z.rows() ||
        dz.size() != in.z.size())
        throw ValueError("grad, z and dz do not fit");
    plucker::check(in, plan, dweights);
    const auto pieces = plucker::pieces_of(in.z.size(), in.z.rows());
    plucker::set_zero(dz);
    Frame outer;
    const int64_t window = plan.r * plan.columns, total = int64_t(pieces.size());
    double *windows = outer.take<double>(std::min(kWindows, total) * window);
    for (int64_t first = 0; first < total; first += kWindows) {
        const int64_t count = std::min(kWindows, total - first);
        parallel_for(count, [&](int64_t p) {
            const auto &piece = pieces[std::size_t(first + p)];
            Frame frame;
            Tile<T> tile(frame, plan, true);
            T *dp = frame.take<T>(plan.coordinates * kTokens);
            if (piece.count < kTokens) std::fill_n(dp, plan.coordinates * kTokens, T(0)); // lanes that no token fills
            double *da = frame.take<double>(plan.m * kTokens);
            plucker::Sequence<T>(in, plan.options, piece.sequence).load(tile, piece);
            plucker::tokens_to_lanes<T, T>(grad[piece.sequence], piece.first, piece.count, dp, kTokens);
            for (int64_t t = 0; t < piece.count; ++t) {
                if (tile.active(t)) continue;
                for (int64_t c = 0; c < plan.coordinates; ++c) dp[c * kTokens + t] = T(0);
            }
            tile.backward(dp, kTokens, windows + p * window, da);
            if (dweights != nullptr)
                plucker::weights_backward(plan, tile.valid, tile.alpha, da, piece.count, (*dweights)[piece.sequence].block_rows(piece.first, piece.count));
        });
        plucker::add_windows<T>(plan, dz, pieces.data() + first, count, windows);
    }
    return all_finite<T>(StackView<const T>(dz)) || !all_finite(in) || !all_finite(grad);
}

#define SUBSPAN_INSTANTIATE(T)                                                                                                                                 \
    template bool plucker_mix<T>(const MixInput<T> &, const MixOptions &, const StackView<T> &);                                                               \
    template bool plucker_mix_backward<T>(const StackView<const T> &, const MixInput<T> &, const MixOptions &, const StackView<T> &, const StackView<double> *);
SUBSPAN_INSTANTIATE(float)
SUBSPAN_INSTANTIATE(double)
#undef SUBSPAN_INSTANTIATE

} // namespace subspan
