#include "subspan/plucker_state.hpp"

#include "plucker/product.hpp"
#include "plucker/tile.hpp"
#include "subspan/errors.hpp"
#include "subspan/sizes.hpp"
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
        checked_product({batch, r}, "a token of every sequence");
        if (!options.rope_starts.empty() && int64_t(options.rope_starts.size()) != batch)
            throw ValueError("rope_start must have one position, or one for each sequence");
        for (const auto d : options.offsets) {
            if (d < 0) throw ValueError("decoding has no tokens ahead: offsets must look back");
            slots = std::max(slots, d + 1);
        }
    }
    int64_t slot(int64_t at) const { return at % slots; }
    int64_t per_slot() const { return plan.r * batch; }

    // Puts a token of every sequence into its slot: zeros where it does not count. Nothing is seen of it before `position`
    // moves on. Memory grows with the tokens until the ring is full: an offset may be longer than the sequence.
    void put(MatrixView<const T> z, const MatrixView<const T> *mask) {
        const int64_t s = slot(position), r = plan.r, size = per_slot();
        if (int64_t(tokens.size()) < (s + 1) * size || int64_t(counts.size()) < (s + 1) * batch) {
            window.resize(std::size_t((s + 1) * size));
            power.resize(std::size_t((s + 1) * batch));
            counts.resize(std::size_t((s + 1) * batch));
            tokens.resize(std::size_t((s + 1) * size));
        }
        double *to = window.data() + s * size;
        for (int64_t b = 0; b < batch; ++b) {
            const bool in = mask == nullptr || (*mask)(0, b) != T(0);
            counts[std::size_t(s * batch + b)] = in;
            for (int64_t i = 0; i < r; ++i) {
                const T x = in ? z(b, i) : T(0);
                tokens[std::size_t((s * batch + b) * r + i)] = x;
                to[i * batch + b] = double(x);
            }
        }
        if (options.rope_starts.empty()) {
            plan.rotation.apply(to, batch, batch, options.rope_start + position, 0, false);
        } else {
            for (int64_t b = 0; b < batch; ++b) plan.rotation.apply(to + b, batch, 1, options.rope_starts[std::size_t(b)] + position, 0, false);
        }
        plucker::scale_columns(to, r, batch, batch, power.data() + s * batch);
    }

    // Columns [first, first + count) of a slot, kTokens apart, and their powers.
    void get(int64_t s, int64_t first, int64_t count, double *columns, double *powers) const {
        const double *from = window.data() + s * per_slot() + first;
        for (int64_t i = 0; i < plan.r; ++i) std::copy_n(from + i * batch, count, columns + i * kTokens);
        std::copy_n(power.data() + s * batch + first, count, powers);
    }

    MixOptions options; // the plan refers to it
    Plan plan;
    int64_t batch, slots = 1, position = 0;
    std::vector<double> window, power; // of each slot: r x batch, batch
    std::vector<unsigned char> counts;
    std::vector<T> tokens; // of each slot: batch x r, as they came in
    Buffer<T> packed;
    std::optional<Projection<T>> projection;
    std::vector<T> bias;
    int64_t width = 0;
};

// Slots of the ring as they were before they were written to.
template <class T> struct PluckerMixState<T>::Kept {
    std::vector<int64_t> slots;
    std::vector<double> window, power;
    std::vector<unsigned char> counts;
    std::vector<T> tokens;
    int64_t position;
    explicit Kept(const Parts &p) : position(p.position) {}
    void add(const Parts &p, int64_t slot) {
        const int64_t size = p.per_slot();
        if (int64_t(p.counts.size()) < (slot + 1) * p.batch) return; // not there yet
        slots.push_back(slot);
        window.insert(window.end(), p.window.begin() + slot * size, p.window.begin() + (slot + 1) * size);
        tokens.insert(tokens.end(), p.tokens.begin() + slot * size, p.tokens.begin() + (slot + 1) * size);
        power.insert(power.end(), p.power.begin() + slot * p.batch, p.power.begin() + (slot + 1) * p.batch);
        counts.insert(counts.end(), p.counts.begin() + slot * p.batch, p.counts.begin() + (slot + 1) * p.batch);
    }
    void back(Parts &p) const {
        const int64_t size = p.per_slot();
        for (std::size_t i = 0; i < slots.size(); ++i) {
            std::copy_n(window.begin() + int64_t(i) * size, size, p.window.begin() + slots[i] * size);
            std::copy_n(tokens.begin() + int64_t(i) * size, size, p.tokens.begin() + slots[i] * size);
            std::copy_n(power.begin() + int64_t(i) * p.batch, p.batch, p.power.begin() + slots[i] * p.batch);
            std::copy_n(counts.begin() + int64_t(i) * p.batch, p.batch, p.counts.begin() + slots[i] * p.batch);
        }
        p.position = position;
    }
};

// Tokens that count must be finite: a masked one may hold anything.
template <class T> void require_finite(MatrixView<const T> z, const MatrixView<const T> *mask, bool along_tokens) {
    bool finite = true;
    for (int64_t t = 0; t < z.rows && finite; ++t)
        if (mask == nullptr || (*mask)(0, t) != T(0)) finite = all_finite(z.block_rows(t, 1));
    if (!finite) throw ValueError(std::string(along_tokens ? "z" : "z_t") + " holds NaN or infinity; the state is as it was");
}

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
void PluckerMixState<T>::step(MatrixView<const T> z, const MatrixView<const T> *weights, const MatrixView<const T> *mask, MatrixView<T> out) {
    Parts &p = *p_;
    const Plan &plan = p.plan;
    if (p.position >= plucker::kFar) throw ValueError("z_t: a state takes in up to 2^40 tokens");
    if (z.rows != p.batch || z.cols != plan.r || out.rows != p.batch || out.cols != p.width) throw ValueError("z and out do not fit");
    if (weights == nullptr && p.options.weighting != MixWeights::mean) throw ValueError("weights are missing");
    if (weights != nullptr && (weights->rows != p.batch || weights->cols != plan.m)) throw ValueError("z and weights do not fit");
    if (mask != nullptr && (mask->rows != 1 || mask->cols != p.batch)) throw ValueError("z and mask do not fit");
    require_finite(z, mask, false);
    p.put(z, mask);
    const int64_t own = p.slot(p.position), block = plan.r * kTokens;
    std::atomic<bool> finite{true};
    const auto chunk = [&](int64_t c) {
        const int64_t first = c * kTokens, count = std::min(kTokens, p.batch - first);
        Frame frame;
        Tile<T> tile(frame, plan, false, false);
        // What the offsets reach, side by side; lanes past the last sequence are zero.
        double *columns = frame.zeros<double>((plan.m + 1) * block), *powers = frame.take<double>((plan.m + 1) * kTokens);
        std::fill_n(powers, (plan.m + 1) * kTokens, 1.0);
        std::vector<const double *> w(std::size_t(plan.m)), w_power(std::size_t(plan.m));
        p.get(own, first, count, columns + plan.m * block, powers + plan.m * kTokens);
        for (int64_t j = 0; j < plan.m; ++j) {
            const int64_t at = p.position - p.options.offsets[std::size_t(j)], s = at < 0 ? own : p.slot(at);
            w[std::size_t(j)] = columns + j * block;
            w_power[std::size_t(j)] = powers + j * kTokens;
            if (at >= 0) p.get(s, first, count, columns + j * block, powers + j * kTokens);
            for (int64_t l = 0; l < kTokens; ++l)
                tile.valid[j * kTokens + l] =
                    at >= 0 && l < count && p.counts[std::size_t(s * p.batch + first + l)] != 0 && p.counts[std::size_t(own * p.batch + first + l)] != 0;
        }
        tile.weigh(weights, first, count);
        tile.combine({columns + plan.m * block, powers + plan.m * kTokens, w.data(), w_power.data(), kTokens}, count);
        const auto to = out.block_rows(first, count);
        if (p.projection) {
            if (!plucker::project_tile(tile, *p.projection, p.bias.empty() ? nullptr : p.bias.data(), to)) finite = false;
            return;
        }
        tile.rows();
        T *row = frame.take<T>(plan.length);
        for (int64_t t = 0; t < count; ++t) {
            tile.coordinates(t, row);
            if (!all_finite(row, p.width)) finite = false;
            for (int64_t i = 0; i < p.width; ++i) to(t, i) = row[i];
        }
    };
    const int64_t chunks = (p.batch + kTokens - 1) / kTokens;
    if (chunks == 1)
        chunk(0);
    else
        parallel_for(chunks, chunk);
    if (!finite) throw ValueError("the result of this token overflows the dtype, or W, b or weights are not finite; the state is as it was");
    ++p.position;
}

template <class T> void PluckerMixState<T>::prefill(const StackView<const T> &z, const StackView<const T> *mask) {
    Parts &p = *p_;
    if (z.size() != p.batch || z.cols() != p.plan.r) throw ValueError("z does not fit the state");
    if (mask != nullptr && (mask->size() != p.batch || mask->rows() != 1 || mask->cols() != z.rows())) throw ValueError("z and mask do not fit");
    for (int64_t b = 0; b < p.batch; ++b) {
        MatrixView<const T> m;
        if (mask != nullptr) m = (*mask)[b];
        require_finite(z[b], mask != nullptr ? &m : nullptr, true);
    }
    const int64_t length = z.rows(), first = std::max<int64_t>(0, length - p.slots);
    if (length > plucker::kFar - p.position) throw ValueError("z: a state takes in up to 2^40 tokens");
    std::vector<T> token(std::size_t(p.batch * p.plan.r)), counts(std::size_t(p.batch), T(1));
    Kept before(p); // an interrupt leaves the state as it was
    try {
        p.position += first;
        for (int64_t t = first; t < length; ++t) {
            poll();
            for (int64_t b = 0; b < p.batch; ++b) {
                const auto sequence = z[b];
                for (int64_t i = 0; i < p.plan.r; ++i) token[std::size_t(b * p.plan.r + i)] = sequence(t, i);
                if (mask != nullptr) counts[std::size_t(b)] = (*mask)[b](0, t);
            }
            const MatrixView<const T> row(counts.data(), 1, p.batch);
            before.add(p, p.slot(p.position));
            p.put({token.data(), p.batch, p.plan.r}, &row);
            ++p.position;
        }
    } catch (...) {
        before.back(p);
        throw;
    }
}

template <class T> typename PluckerMixState<T>::Past PluckerMixState<T>::past() const {
    const Parts &p = *p_;
    Past out;
    out.position = p.position;
    out.kept = std::min(p.position, p.slots - 1); // the oldest slot is the next token's
    const int64_t size = p.batch * p.plan.r;
    for (int64_t t = p.position - out.kept; t < p.position; ++t) {
        const int64_t s = p.slot(t);
        out.tokens.insert(out.tokens.end(), p.tokens.begin() + s * size, p.tokens.begin() + (s + 1) * size);
        out.counts.insert(out.counts.end(), p.counts.begin() + s * p.batch, p.counts.begin() + (s + 1) * p.batch);
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
    std::vector<T> counts(std::size_t(p.batch));
    p.position = past.position - past.kept;
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
