#include "subspan/plucker_state.hpp"

#include "plucker_product.hpp"
#include "plucker_tile.hpp"
#include "subspan/errors.hpp"
#include "subspan/parallel.hpp"

#include <algorithm>
#include <atomic>
#include <optional>
#include <string>

namespace subspan {

using plucker::all_finite;
using plucker::kTokens;
using plucker::Plan;
using plucker::Projection;
using plucker::Tile;
using std::int64_t;

template <class T> struct PluckerMixState<T>::Parts {
    Parts(const MixOptions &o, int64_t r, int64_t count) : options(o), plan(options, r, int64_t(o.offsets.size())), batch(count) {
        if (batch < 0) throw ValueError("batch must not be negative");
        for (const auto d : options.offsets) {
            if (d < 0) throw ValueError("decoding has no tokens ahead: offsets must look back");
            slots = std::max(slots, d + 1);
        }
        ld = simd::round_up(std::max<int64_t>(batch, 1), 8);
        window.assign(std::size_t(slots * r * ld), 0.0);
        power.assign(std::size_t(slots * ld), 1.0);
        counts.assign(std::size_t(slots * ld), 0);
        tokens.assign(std::size_t(slots * r * batch), T(0));
    }
    int64_t slot(int64_t at) const { return at % slots; }

    // Puts a token of every sequence into its slot. Nothing is seen of it before `position` moves on.
    void put(MatrixView<const T> z, const MatrixView<const T> *mask) {
        const int64_t s = slot(position), r = plan.r;
        double *to = window.data() + s * r * ld;
        plucker::tokens_to_lanes<T, double>(z, 0, batch, to, ld);
        for (int64_t b = 0; b < batch; ++b) {
            const bool in = mask == nullptr || (*mask)(0, b) != T(0);
            counts[std::size_t(s * ld + b)] = in;
            for (int64_t i = 0; i < r; ++i) {
                tokens[std::size_t((s * batch + b) * r + i)] = z(b, i);
                if (!in) to[i * ld + b] = 0;
            }
            if (in && plan.rotation.on()) plan.rotation.turn(to + b, ld, 1, options.rope_start + position, false);
        }
        plucker::scale_columns(to, r, ld, ld, power.data() + s * ld);
    }

    MixOptions options; // the plan refers to it
    Plan plan;
    int64_t batch, slots = 1, ld = 8, position = 0;
    std::vector<double> window, power; // of each slot: r x ld, ld
    std::vector<unsigned char> counts;
    std::vector<T> tokens; // slots x batch x r
    Buffer<T> packed;
    std::optional<Projection<T>> projection;
    std::vector<T> bias;
    int64_t width = 0;
};

template <class T>
PluckerMixState<T>::PluckerMixState(const MixOptions &o, int64_t r, int64_t batch, MatrixView<const T> w, const T *b)
    : p_(std::make_unique<Parts>(o, r, batch)) {
    p_->width = p_->plan.coordinates;
    if (w.rows == 0) return;
    if (w.cols != p_->plan.coordinates) throw ValueError("W must have one column for each pair of dimensions");
    p_->width = w.rows;
    p_->projection.emplace(p_->packed.reserve(Projection<T>::size(w.rows, w.cols)), w);
    if (b != nullptr) p_->bias.assign(b, b + w.rows);
}

template <class T> PluckerMixState<T>::~PluckerMixState() = default;
template <class T> int64_t PluckerMixState<T>::width() const { return p_->width; }
template <class T> int64_t PluckerMixState<T>::r() const { return p_->plan.r; }
template <class T> int64_t PluckerMixState<T>::batch() const { return p_->batch; }
template <class T> int64_t PluckerMixState<T>::position() const { return p_->position; }

template <class T>
void PluckerMixState<T>::step(MatrixView<const T> z, const MatrixView<const T> *weights, const MatrixView<const T> *mask,
                              MatrixView<T> out) {
    Parts &p = *p_;
    const Plan &plan = p.plan;
    if (z.rows != p.batch || z.cols != plan.r || out.rows != p.batch || out.cols != p.width) throw ValueError("z and out do not fit");
    if (!all_finite(z)) throw ValueError("z holds NaN or infinity; the state is as it was");
    p.put(z, mask);
    const int64_t own = p.slot(p.position), per_slot = plan.r * p.ld;
    std::atomic<bool> finite{true};
    const auto chunk = [&](int64_t c) {
        const int64_t first = c * kTokens, count = std::min(kTokens, p.batch - first);
        Frame frame;
        Tile<T> tile(frame, plan, false, false);
        std::vector<const double *> w(std::size_t(plan.m)), w_power(std::size_t(plan.m));
        for (int64_t j = 0; j < plan.m; ++j) {
            const int64_t at = p.position - p.options.offsets[std::size_t(j)], s = at < 0 ? own : p.slot(at);
            w[std::size_t(j)] = p.window.data() + s * per_slot + first;
            w_power[std::size_t(j)] = p.power.data() + s * p.ld + first;
            for (int64_t l = 0; l < kTokens; ++l)
                tile.valid[j * kTokens + l] = at >= 0 && l < count && p.counts[std::size_t(s * p.ld + first + l)] != 0 &&
                                              p.counts[std::size_t(own * p.ld + first + l)] != 0;
        }
        tile.weigh(weights, first, count);
        tile.combine({p.window.data() + own * per_slot + first, p.power.data() + own * p.ld + first, w.data(), w_power.data(), p.ld}, count);
        tile.rows();
        T *coordinates = frame.take<T>(kTokens * plan.length);
        tile.coordinates_of_all(coordinates, plan.length);
        const auto to = out.block_rows(first, count);
        if (!p.projection) {
            for (int64_t t = 0; t < count; ++t) {
                if (!all_finite(coordinates + t * plan.length, p.width)) finite = false;
                for (int64_t i = 0; i < p.width; ++i) to(t, i) = coordinates[t * plan.length + i];
            }
            return;
        }
        const int64_t padded = simd::round_up(count, simd::tile<T>().mr);
        std::fill_n(coordinates + count * plan.length, (padded - count) * plan.length, T(0));
        T by[kTokens] = {};
        for (int64_t t = 0; t < count; ++t) by[t] = p.options.bias_always ? T(1) : T(tile.sum[t]);
        T *g = to.col_stride == 1 ? to.data : frame.take<T>(count * p.width);
        const int64_t ldg = to.col_stride == 1 ? to.row_stride : p.width;
        if (!p.projection->apply({coordinates, plan.length, g, ldg, count, p.bias.empty() ? nullptr : p.bias.data(), by})) finite = false;
        for (int64_t t = 0; t < count && g != to.data; ++t)
            for (int64_t i = 0; i < p.width; ++i) to(t, i) = g[t * p.width + i];
    };
    const int64_t chunks = (p.batch + kTokens - 1) / kTokens;
    if (chunks == 1)
        chunk(0);
    else
        parallel_for(chunks, chunk);
    if (!finite)
        throw ValueError("the result of this token overflows the dtype, or W, b or weights are not finite; the state is as it was");
    ++p.position;
}

template <class T> void PluckerMixState<T>::prefill(const StackView<const T> &z, const StackView<const T> *mask) {
    Parts &p = *p_;
    if (z.size() != p.batch || z.cols() != p.plan.r) throw ValueError("z does not fit the state");
    if (!all_finite(z)) throw ValueError("z holds NaN or infinity; the state is as it was");
    const int64_t length = z.rows(), first = std::max<int64_t>(0, length - p.slots);
    p.position += first;
    std::vector<T> token(std::size_t(p.batch * p.plan.r)), counts(std::size_t(p.batch), T(1));
    for (int64_t t = first; t < length; ++t) {
        for (int64_t b = 0; b < p.batch; ++b) {
            const auto sequence = z[b];
            for (int64_t i = 0; i < p.plan.r; ++i) token[std::size_t(b * p.plan.r + i)] = sequence(t, i);
            if (mask != nullptr) counts[std::size_t(b)] = (*mask)[b](0, t);
        }
        const MatrixView<const T> row(counts.data(), 1, p.batch);
        p.put({token.data(), p.batch, p.plan.r}, &row);
        ++p.position;
    }
}

template <class T> void PluckerMixState<T>::reset() { p_->position = 0; }

template <class T> typename PluckerMixState<T>::Past PluckerMixState<T>::past() const {
    const Parts &p = *p_;
    Past out;
    out.position = p.position;
    out.kept = std::min(p.position, p.slots - 1); // the oldest slot is the next token's
    const int64_t size = p.batch * p.plan.r;
    for (int64_t t = p.position - out.kept; t < p.position; ++t) {
        const int64_t s = p.slot(t);
        out.tokens.insert(out.tokens.end(), p.tokens.begin() + s * size, p.tokens.begin() + (s + 1) * size);
        out.counts.insert(out.counts.end(), p.counts.begin() + s * p.ld, p.counts.begin() + s * p.ld + p.batch);
    }
    return out;
}

template <class T> void PluckerMixState<T>::restore(const Past &past) {
    Parts &p = *p_;
    const int64_t size = p.batch * p.plan.r;
    if (past.position < 0 || past.kept != std::min(past.position, p.slots - 1) || int64_t(past.tokens.size()) != past.kept * size ||
        int64_t(past.counts.size()) != past.kept * p.batch)
        throw ValueError("what was saved belongs to other offsets, another r or another batch");
    if (!all_finite(past.tokens.data(), int64_t(past.tokens.size()))) throw ValueError("what was saved holds NaN or infinity");
    p.position = past.position - past.kept;
    std::vector<T> counts(std::size_t(p.batch));
    for (int64_t t = 0; t < past.kept; ++t) {
        for (int64_t b = 0; b < p.batch; ++b) counts[std::size_t(b)] = T(past.counts[std::size_t(t * p.batch + b)] != 0);
        const MatrixView<const T> row(counts.data(), 1, p.batch);
        p.put({past.tokens.data() + t * size, p.batch, p.plan.r}, &row);
        ++p.position;
    }
}

template class PluckerMixState<float>;
template class PluckerMixState<double>;

} // namespace subspan
