#include "linalg/microkernel.hpp"
#include "linalg/packing.hpp"
#include "plucker/tile.hpp"
#include "base/simd.hpp"
#include "subspan/errors.hpp"
#include "subspan/parallel.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <stdexcept>
#include <type_traits>

namespace subspan::plucker {
namespace {

using simd::round_up;
using simd::Vec;

// Tokens [token, token + count) of z become columns of `to`.
template <class T, class To> struct LoadKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(const MatrixView<const T> *z, int64_t token, int64_t count, To *to, int64_t ld) {
        constexpr int W = Vec<T, Bytes>::lanes;
        alignas(64) T block[W * W];
        int64_t l = 0;
        for (; z->col_stride == 1 && l + W <= count; l += W) {
            const T *src = z->data + (token + l) * z->row_stride;
            int64_t i = 0;
            for (; i + W <= z->cols; i += W) {
                if constexpr (std::is_same_v<T, To>) {
                    simd::Transpose<T, Bytes>::block(src + i, z->row_stride, nullptr, nullptr, to + i * ld + l, ld);
                    continue;
                }
                simd::Transpose<T, Bytes>::block(src + i, z->row_stride, nullptr, nullptr, block, W);
                for (int d = 0; d < W; ++d)
                    for (int x = 0; x < W; ++x) to[(i + d) * ld + l + x] = To(block[d * W + x]);
            }
            for (; i < z->cols; ++i)
                for (int x = 0; x < W; ++x) to[i * ld + l + x] = To(src[x * z->row_stride + i]);
        }
        for (; l < count; ++l)
            for (int64_t i = 0; i < z->cols; ++i) to[i * ld + l] = To((*z)(token + l, i));
    }
};

struct TopKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(const double *x, int64_t rows, int64_t ld, int64_t count, double *top) {
        std::fill_n(top, count, 0.0);
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t c = 0; c < count; ++c) {
                const double a = std::abs(x[i * ld + c]);
                top[c] = top[c] < a ? a : top[c];
            }
    }
};

struct ScaleKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(double *x, int64_t rows, int64_t ld, int64_t count, const double *by) {
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t c = 0; c < count; ++c) x[i * ld + c] *= by[c];
    }
};

// The power of two under a positive number, kept where its inverse is a number too; 1 for zero, infinity and NaN.
double power_under(double top) {
    if (!(top > 0) || !(top < std::numeric_limits<double>::infinity())) return 1.0;
    const std::uint64_t exponent = std::bit_cast<std::uint64_t>(top) >> 52;
    return std::bit_cast<double>(std::clamp<std::uint64_t>(exponent, 2, 2044) << 52);
}

template <class T> struct FiniteKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(const T *x, int64_t n, bool *finite) {
        using V = Vec<T, Bytes>;
        constexpr int W = V::lanes;
        typename V::type a{}, b{};
        int64_t i = 0;
        for (; i + 2 * W <= n; i += 2 * W) { // 0 · x is NaN where x is not finite
            a += T(0) * V::load(x + i);
            b += T(0) * V::load(x + i + W);
        }
        T s = V::sum(a + b);
        for (; i < n; ++i) s += T(0) * x[i];
        *finite = s == T(0);
    }
};

} // namespace

int64_t pairs(int64_t r) { return r * (r - 1) / 2; }

template <class T, class To> void tokens_to_lanes(MatrixView<const T> from, int64_t first, int64_t count, To *to, int64_t ld) {
    simd::dispatch<LoadKernel<T, To>, const MatrixView<const T> *, int64_t, int64_t, To *, int64_t>(&from, first, count, to, ld);
}

void scale_columns(double *x, int64_t rows, int64_t ld, int64_t count, double *power) {
    Frame frame;
    double *inverse = frame.take<double>(count);
    simd::dispatch<TopKernel, const double *, int64_t, int64_t, int64_t, double *>(x, rows, ld, count, inverse);
    for (int64_t c = 0; c < count; ++c) {
        power[c] = power_under(inverse[c]);
        inverse[c] = 1 / power[c];
    }
    simd::dispatch<ScaleKernel, double *, int64_t, int64_t, int64_t, const double *>(x, rows, ld, count, inverse);
}

template <class T> void add_windows(const Plan &plan, const StackView<T> &dz, const Piece *pieces, int64_t count, const double *windows) {
    constexpr int64_t block = 16; // dimensions of a task: every entry of dz is summed by one thread, in the order of tiles
    parallel_for((plan.r + block - 1) / block, [&](int64_t task) {
        const int64_t i0 = task * block, i1 = std::min(plan.r, i0 + block);
        for (int64_t p = 0; p < count; ++p) {
            const MatrixView<T> to = dz[pieces[p].sequence];
            const double *window = windows + p * plan.r * plan.columns;
            for (const auto &s : plan.segments) {
                const int64_t start = pieces[p].first - s.reach;
                const int64_t a = std::clamp<int64_t>(-start, 0, s.width), b = std::clamp<int64_t>(to.rows - start, a, s.width);
                for (int64_t c = a; c < b; ++c)
                    for (int64_t i = i0; i < i1; ++i) to(start + c, i) += T(window[i * plan.columns + s.at + c]);
            }
        }
    });
}

template <class T> void set_zero(const StackView<T> &x) {
    if (x.rows() == 0 || x.cols() == 0) return;
    for (int64_t s = 0; s < x.size(); ++s) {
        const auto m = x[s];
        for (int64_t i = 0; i < m.rows; ++i) {
            if (m.col_stride == 1) {
                std::fill_n(m.data + i * m.row_stride, m.cols, T(0));
                continue;
            }
            for (int64_t j = 0; j < m.cols; ++j) m(i, j) = T(0);
        }
    }
}

std::vector<Piece> pieces_of(int64_t sequences, int64_t length) {
    std::vector<Piece> out;
    if (length == 0) return out;
    for (int64_t s = 0; s < sequences; ++s)
        for (int64_t t = 0, n = 0; t < length; t += n) {
            // The last four thirds of a tile as two of two thirds: a third alone costs a register tile half its rate.
            const int64_t left = length - t;
            n = left > kTokens && left <= kTokens / 3 * 4 ? kTokens / 3 * 2 : std::min(kTokens, left);
            out.push_back({s, t, n});
        }
    return out;
}

// -- positions ---------------------------------------------------------------------------------------------------------

Rotation::Rotation(Rope kind, int64_t r, double base) : kind_(kind), half_(r / 2) {
    if (!on() || r > 65536) return; // the plan refuses it
    for (int64_t i = 0; i < half_; ++i) {
        frequency_.push_back(std::pow(base, -2.0 * double(i) / double(r)));
        for (int s = 0; s < 64; ++s) {
            cos_.push_back(std::cos(s * frequency_.back()));
            sin_.push_back(std::sin(s * frequency_.back()));
        }
    }
}

void Rotation::apply(double *x, int64_t ld, int64_t count, int64_t first, int64_t step, bool back) const {
    if (!on()) return;
    for (int64_t c = 0; c < count;) {
        const int64_t position = first + c * step, block = position >> 6, s0 = position & 63;
        const int64_t some = step == 0 ? count : std::min<int64_t>(count - c, 64 - s0);
        for (int64_t i = 0; i < half_; ++i) {
            const double angle = double(block * 64) * frequency_[std::size_t(i)];
            const double cb = std::cos(angle), sb = std::sin(angle), sign = back ? -1.0 : 1.0;
            const double *ct = cos_.data() + 64 * i + s0, *st = sin_.data() + 64 * i + s0;
            const bool pairs = kind_ == Rope::interleaved;
            double *a = x + (pairs ? 2 * i : i) * ld + c, *b = x + (pairs ? 2 * i + 1 : i + half_) * ld + c;
            // Every product is rounded, so that a column has the same bits in a sequence and alone.
            for (int64_t l = 0; l < some; ++l) {
                const double cl = ct[l * step], sl = st[l * step], u = a[l], v = b[l];
                const double cc = SUBSPAN_ROUNDED(cb * cl) - SUBSPAN_ROUNDED(sb * sl);
                const double ss = sign * (SUBSPAN_ROUNDED(sb * cl) + SUBSPAN_ROUNDED(cb * sl));
                a[l] = SUBSPAN_ROUNDED(u * cc) - SUBSPAN_ROUNDED(v * ss);
                b[l] = SUBSPAN_ROUNDED(u * ss) + SUBSPAN_ROUNDED(v * cc);
            }
        }
        c += some;
    }
}

// -- the plan ----------------------------------------------------------------------------------------------------------

Plan::Plan(const MixOptions &o, int64_t rank, int64_t weights_columns)
    : options(o), r(rank), m(int64_t(o.offsets.size())), coordinates(pairs(rank)), depth(round_up(rank, kLanes)), row(depth + kPad),
      rotation(o.rope, rank, o.rope_base) {
    if (r > 65536) throw ValueError("z has more than 65536 dimensions: its pairs are more than 2^31");
    if (r < 2) throw ValueError("z must have at least 2 dimensions: a plane needs two");
    if (m == 0) throw ValueError("offsets is empty");
    for (const auto d : o.offsets) {
        if (d == 0) throw ValueError("an offset of zero pairs a token with itself: its wedge is zero");
        if (std::max(d, -std::max<int64_t>(d, -kFar)) >= kFar) throw ValueError("an offset is longer than any sequence");
    }
    const auto near = [](int64_t start) { return std::max(start, -std::max<int64_t>(start, -kFar)) < kFar; };
    if (!near(o.rope_start) || !std::all_of(o.rope_starts.begin(), o.rope_starts.end(), near)) throw ValueError("rope_start is out of range");
    if (!(o.eps >= 0 && o.eps < 1e100)) throw ValueError("eps must be from 0 to 1e100");
    if (o.weighting != MixWeights::mean && weights_columns != m) throw ValueError("weights must have one entry for each offset");
    if (rotation.on() && r % 2 != 0) throw ValueError("rope needs an even number of dimensions");
    const int64_t lines = round_up(coordinates + kPad, kLanes) / kLanes;
    length = (lines + (lines % 2 == 0)) * kLanes;
    std::vector<int64_t> offsets(o.offsets);
    offsets.push_back(0);
    std::sort(offsets.begin(), offsets.end(), std::greater<>());
    offsets.erase(std::unique(offsets.begin(), offsets.end()), offsets.end());
    columns = 0;
    for (std::size_t a = 0; a < offsets.size();) {
        std::size_t b = a;
        while (b + 1 < offsets.size() && offsets[b] - offsets[b + 1] <= kTokens) ++b;
        const int64_t width = offsets[a] - offsets[b] + kTokens;
        segments.push_back({offsets[a], width, columns});
        columns += round_up(width, 8);
        a = b + 1;
    }
    const auto find = [&](int64_t offset) {
        for (const auto &s : segments)
            if (offset <= s.reach && s.reach - offset + kTokens <= s.width) return s.at + s.reach - offset;
        throw std::logic_error("an offset is in no segment");
    };
    own = find(0);
    for (const auto d : o.offsets) column.push_back(find(d));
}

template <class T> void check(const MixInput<T> &in, const Plan &plan, const StackView<double> *dweights) {
    const auto same = [&](const auto &x, int64_t rows, int64_t cols) { return x.rows() == rows && x.cols() == cols && x.size() == in.z.size(); };
    if (!plan.options.rope_starts.empty() && int64_t(plan.options.rope_starts.size()) != in.z.size())
        throw ValueError("rope_start must have one position, or one for each sequence");
    if (in.z.cols() != plan.r) throw ValueError("z has tokens of another number of dimensions");
    if (in.weights == nullptr && plan.options.weighting != MixWeights::mean) throw ValueError("weights are missing");
    if (in.weights != nullptr && !same(*in.weights, in.z.rows(), plan.m)) throw ValueError("z and weights do not fit");
    if (in.mask != nullptr && !same(*in.mask, 1, in.z.rows())) throw ValueError("z and mask do not fit");
    if (dweights != nullptr && !same(*dweights, in.z.rows(), plan.m)) throw ValueError("z and dweights do not fit");
}

// -- finite? -----------------------------------------------------------------------------------------------------------

template <class T> bool all_finite(const T *x, int64_t n) {
    bool finite = true;
    simd::dispatch<FiniteKernel<T>, const T *, int64_t, bool *>(x, n, &finite);
    return finite;
}

template <class T> bool all_finite(MatrixView<const T> x) {
    for (int64_t i = 0; i < x.rows; ++i) {
        if (x.col_stride == 1) {
            if (!all_finite(x.data + i * x.row_stride, x.cols)) return false;
            continue;
        }
        for (int64_t j = 0; j < x.cols; ++j)
            if (!std::isfinite(x(i, j))) return false;
    }
    return true;
}

template <class T> bool all_finite(const StackView<const T> &x) {
    for (int64_t i = 0; i < x.size(); ++i)
        if (!all_finite(x[i])) return false;
    return true;
}

template <class T> bool all_finite(const MixInput<T> &in) {
    return all_finite(in.z) && (in.weights == nullptr || all_finite(*in.weights)) && (in.mask == nullptr || all_finite(*in.mask));
}

template void tokens_to_lanes<float, float>(MatrixView<const float>, int64_t, int64_t, float *, int64_t);
template void tokens_to_lanes<float, double>(MatrixView<const float>, int64_t, int64_t, double *, int64_t);
template void tokens_to_lanes<double, double>(MatrixView<const double>, int64_t, int64_t, double *, int64_t);
#define SUBSPAN_INSTANTIATE(T)                                                                                                                                 \
    template void add_windows<T>(const Plan &, const StackView<T> &, const Piece *, int64_t, const double *);                                                  \
    template void set_zero<T>(const StackView<T> &);                                                                                                           \
    template void check<T>(const MixInput<T> &, const Plan &, const StackView<double> *);                                                                      \
    template bool all_finite<T>(const T *, int64_t);                                                                                                           \
    template bool all_finite<T>(MatrixView<const T>);                                                                                                          \
    template bool all_finite<T>(const StackView<const T> &);                                                                                                   \
    template bool all_finite<T>(const MixInput<T> &);
SUBSPAN_INSTANTIATE(float)
SUBSPAN_INSTANTIATE(double)
#undef SUBSPAN_INSTANTIATE

} // namespace subspan::plucker
