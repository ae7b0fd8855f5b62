// The basis of a stream to twice its precision.
//
// Rounding V to T at every update would add one eps to what a stream knows, and those of N updates add up to √N eps or,
// where they have one sign, to N. So V is kept as v + low, and an update is written as v'_i = v_p + low_p + Δ_i with p the
// component that i was before: Δ is small once a stream has seen many rows, and so is its rounding.
#include "base/blocking.hpp"
#include "base/simd.hpp"
#include "svd/streaming_impl.hpp"
#include "subspan/gemm.hpp"
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

constexpr double kShortFlops = 1e10;       // a fraction of a second for one thread

} // namespace

template <class T>
void StreamingSvd<T>::Impl::relative(std::int64_t count, const double *w, const double *scale, double sigma, Closest old, std::int64_t *partner, T *rot) {
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

template <class T> void StreamingSvd<T>::Impl::settle_strip(std::int64_t kept, const std::int64_t *partner, std::int64_t first, MatrixView<T> delta) {
    const std::int64_t width = delta.cols;
    Frame frame;
    T *high = frame.take<T>(kept * width), *lower = frame.take<T>(kept * width), *nothing = frame.zeros<T>(width);
    for (std::int64_t i = 0; i < kept; ++i) { // aside, as rows may change places
        const std::int64_t p = partner[i], at = p * n + first;
        const SettleArgs<T> args{
            p < 0 ? nothing : v.data() + at, p < 0 ? nothing : low.data() + at, delta.data + i * delta.row_stride, high + i * width, lower + i * width, width};
        simd::dispatch<SettleKernel<T>>(&args);
    }
    for (std::int64_t i = 0; i < kept; ++i) {
        std::copy_n(high + i * width, width, v.data() + i * n + first);
        std::copy_n(lower + i * width, width, low.data() + i * n + first);
    }
}

template <class T> void StreamingSvd<T>::Impl::settle(std::int64_t kept, const std::int64_t *partner, T *delta) {
    const Shielded whole; // nothing may stop it half-way
    const std::int64_t width = blocking().whole / 4096; // of a task, whose rows stay in the second cache
    parallel_for((n + width - 1) / width, [&](std::int64_t t) {
        const std::int64_t first = t * width, count = std::min(n - first, width);
        settle_strip(kept, partner, first, MatrixView<T>(delta + first, kept, count, n, 1));
    });
}

template <class T>
void StreamingSvd<T>::Impl::rotate(std::int64_t kept, const std::int64_t *partner, std::int64_t rows,
                                   const std::function<void(const StripTaker<T> &)> &changes) {
    // A short turn is made and added strip by strip, and reads and writes the basis once. Half-way nothing may stop it; a long
    // one is made whole first, and can be stopped until then.
    if (2.0 * double(kept) * double(rows) * double(n) < kShortFlops) {
        const Shielded whole;
        changes([&](std::int64_t first, MatrixView<T> strip) { settle_strip(kept, partner, first, strip); });
        return;
    }
    Frame frame;
    T *delta = frame.take<T>(kept * n);
    changes([&](std::int64_t first, MatrixView<T> strip) {
        for (std::int64_t i = 0; i < kept; ++i) std::copy_n(strip.data + i * strip.row_stride, strip.cols, delta + i * n + first);
    });
    settle(kept, partner, delta);
}

template <class T> void StreamingSvd<T>::Impl::rotate(std::int64_t kept, const std::int64_t *partner, const T *rot, const RowBlocks<T> &p) {
    rotate(kept, partner, p.rows, [&](const StripTaker<T> &take) { combine<T>(rot, kept, p, take); });
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
