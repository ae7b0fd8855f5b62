// The basis of a stream to twice its precision.
//
// Rounding V to T at every update would add one eps to what a stream knows, and those of N updates add up to √N eps or,
// where they have one sign, to N. So V is kept as v + low, and an update is written as v'_i = v_p + low_p + Δ_i with p the
// component that i was before: Δ is small once a stream has seen many rows, and so is its rounding.
#include "simd.hpp"
#include "streaming_impl.hpp"
#include "subspan/panel.hpp"
#include "subspan/parallel.hpp"

#include <algorithm>

namespace subspan {
namespace {

template <class T> struct SettleArgs {
    const T *high, *low, *delta; // count items of one row each
    T *new_high, *new_low;       // may be high and low
    std::int64_t count;
};

// high' + low' = high + (low + delta), without an error in the outer sum (Knuth's two-sum).
template <class T> struct SettleKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(const SettleArgs<T> *a) {
        for (std::int64_t j = 0; j < a->count; ++j) {
            const T h = a->high[j], t = a->low[j] + a->delta[j], s = h + t, back = s - h;
            a->new_low[j] = (h - (s - back)) + (t - back);
            a->new_high[j] = s;
        }
    }
};

template <class T> struct SplitArgs {
    const double *x;
    T *high, *low;
    std::int64_t count;
};

template <class T> struct SplitKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(const SplitArgs<T> *a) {
        for (std::int64_t j = 0; j < a->count; ++j) {
            const T h = T(a->x[j]);
            a->high[j] = h;
            a->low[j] = T(a->x[j] - double(h));
        }
    }
};

constexpr std::int64_t kStripWidth = 4096; // columns of a task

} // namespace

template <class T>
void StreamingSvd<T>::Impl::relative(std::int64_t count, const double *w, const double *scale, double sigma, Closest old,
                                     std::int64_t *partner, T *rot) {
    const std::int64_t p = old.sign * w[std::max<std::int64_t>(old.index, 0)] > 0.5 ? old.index : -1;
    *partner = p;
    double rest = 0;
    for (std::int64_t j = 0; j < count; ++j) {
        rot[j] = T(old.sign * w[j] * scale[j] / sigma);
        if (j != p) rest += w[j] * w[j];
    }
    if (p < 0) return;
    // Less one: w_p = √(1 - rest), so 1 - w_p = rest / (1 + w_p). Taken from the other entries, as w_p itself is known to
    // eps only, and so is the length that rounding gave w.
    const double less = -rest / (1.0 + std::sqrt(std::max(0.0, 1.0 - rest)));
    rot[p] = T(less * scale[p] / sigma + (scale[p] - sigma) / sigma);
}

template <class T>
void StreamingSvd<T>::Impl::settle(std::int64_t kept, const std::int64_t *partner, const T *delta) {
    bool in_place = true;
    for (std::int64_t i = 0; i < kept; ++i) in_place = in_place && partner[i] == i;
    // Rows that change places go into new buffers; either way nothing can fail or be interrupted half-way.
    Buffer<T> high, lower, nothing;
    if (!in_place) {
        high.reserve(keep * n);
        std::fill_n(lower.reserve(keep * n), keep * n, T(0));
        std::fill_n(nothing.reserve(std::min(n, kStripWidth)), std::min(n, kStripWidth), T(0));
    }
    T *to = in_place ? v.data() : high.data(), *to_low = in_place ? low.data() : lower.data();
    const Shielded whole;
    parallel_for((n + kStripWidth - 1) / kStripWidth, [&](std::int64_t t) {
        const std::int64_t first = t * kStripWidth, count = std::min(n - first, kStripWidth);
        for (std::int64_t i = 0; i < kept; ++i) {
            const std::int64_t p = partner[i];
            const SettleArgs<T> args{p < 0 ? nothing.data() : v.data() + p * n + first,
                                     p < 0 ? nothing.data() : low.data() + p * n + first,
                                     delta + i * n + first, to + i * n + first, to_low + i * n + first, count};
            simd::dispatch<SettleKernel<T>>(&args);
        }
    });
    if (in_place) return;
    std::swap(v, high);
    std::swap(low, lower);
}

template <class T>
void StreamingSvd<T>::Impl::rotate(std::int64_t kept, const std::int64_t *partner, const T *rot, const Panel<T> &p) {
    Frame frame;
    T *delta = frame.take<T>(kept * n);
    combine(rot, p, MatrixView<T>(delta, kept, n));
    settle(kept, partner, delta);
}

template <class T> void StreamingSvd<T>::Impl::set_basis(std::int64_t kept, const double *y) {
    const SplitArgs<T> args{y, v.data(), low.data(), kept * n};
    simd::dispatch<SplitKernel<T>>(&args);
}

template <class T> void StreamingSvd<T>::Impl::canonical_signs() {
    for (std::int64_t i = 0; i < r; ++i) {
        T *row = v.data() + i * n;
        constexpr int lanes = 16; // independent chains, so that the search is not one long dependency
        T most[lanes] = {}, least[lanes] = {};
        std::int64_t j = 0;
        for (; j + lanes <= n; j += lanes)
            for (int q = 0; q < lanes; ++q) {
                most[q] = row[j + q] > most[q] ? row[j + q] : most[q];
                least[q] = row[j + q] < least[q] ? row[j + q] : least[q];
            }
        for (; j < n; ++j) {
            most[0] = std::max(most[0], row[j]);
            least[0] = std::min(least[0], row[j]);
        }
        if (-*std::min_element(least, least + lanes) > *std::max_element(most, most + lanes)) {
            T *lower = low.data() + i * n;
            for (j = 0; j < n; ++j) {
                row[j] = -row[j];
                lower[j] = -lower[j];
            }
        }
    }
}

template struct StreamingSvd<float>::Impl;
template struct StreamingSvd<double>::Impl;

} // namespace subspan
