#include "plucker/tile.hpp"

#include "linalg/microkernel.hpp"
#include "linalg/packing.hpp"
#include "plucker/offsets.hpp"
#include "base/simd.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace subspan::plucker {
namespace {

using simd::round_up;
using simd::Vec;

template <class T> struct NarrowKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(const double *x, int64_t rows, int64_t ld, int64_t count, T *to, int64_t ldt) {
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t c = 0; c < count; ++c) to[i * ldt + c] = T(x[i * ld + c]);
    }
};

template <class T> struct TransposeKernel {
    // `lanes` columns of `from` (rows, lanes apart as given) become rows of `to`.
    template <int Bytes> static SUBSPAN_INLINE void run(const T *from, int64_t ld, int64_t rows, int64_t columns, T *to, int64_t ldt) {
        constexpr int W = Vec<T, Bytes>::lanes;
        for (int64_t i = 0; i < rows; i += W)
            for (int64_t c = 0; c < columns; c += W) simd::Transpose<T, Bytes>::block(from + i * ld + c, ld, nullptr, nullptr, to + c * ldt + i, ldt);
    }
};

// out[pair(i, j)] = z_i u_j - z_j u_i. Rows of z and u are padded with zeros: what a vector writes past the end of a row
// of pairs, the next one overwrites, and behind the last one there is padding.
template <class T> struct WedgeKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(const T *z, const T *u, int64_t row, int64_t r, int64_t tokens, T *out, int64_t ld) {
        using V = Vec<T, Bytes>;
        constexpr int W = V::lanes;
        for (int64_t t = 0; t < tokens; ++t, z += row, u += row, out += ld) {
            T *to = out;
            for (int64_t i = 0; i + 1 < r; ++i) {
                const T zi = z[i], ui = u[i];
                const int64_t width = r - 1 - i;
                const T *zj = z + i + 1, *uj = u + i + 1;
                for (int64_t x = 0; x < width; x += W) V::store(to + x, zi * V::load(uj + x) - ui * V::load(zj + x));
                to += width;
            }
        }
    }
};

// With S the antisymmetric matrix of dp: du = -S z and dz = S u, for lanes of tokens.
template <class T> struct ContractKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(const T *dp, int64_t ld, const T *z, const T *u, int64_t r, int64_t tokens, T *dz, T *du) {
        using V = Vec<T, Bytes>;
        constexpr int W = V::lanes;
        for (int64_t l = 0; l < tokens; l += W) {
            for (int64_t i = 0; i < r; ++i) {
                V::store(dz + i * kTokens + l, typename V::type{});
                V::store(du + i * kTokens + l, typename V::type{});
            }
            const T *p = dp + l;
            for (int64_t i = 0; i + 1 < r; ++i) {
                const auto zi = V::load(z + i * kTokens + l), ui = V::load(u + i * kTokens + l);
                typename V::type sz{}, su{};
                for (int64_t j = i + 1; j < r; ++j, p += ld) {
                    const auto d = V::load(p);
                    const int64_t at = j * kTokens + l;
                    sz += d * V::load(u + at);
                    su += d * V::load(z + at);
                    V::store(dz + at, V::load(dz + at) - d * ui);
                    V::store(du + at, V::load(du + at) + d * zi);
                }
                V::store(dz + i * kTokens + l, V::load(dz + i * kTokens + l) + sz);
                V::store(du + i * kTokens + l, V::load(du + i * kTokens + l) - su);
            }
        }
    }
};

} // namespace

template <class T> Tile<T>::Tile(Frame &frame, const Plan &p, bool keep, bool with_window) : plan(p), keep_(keep) {
    const int64_t lanes = p.m * kTokens;
    window = with_window ? frame.take<double>(p.r * p.columns) : nullptr; // load() fills all of it
    power = frame.take<double>(p.columns);
    valid = frame.take<unsigned char>(lanes);
    alpha = frame.take<double>(lanes);
    sum = frame.take<double>(kTokens);
    lift = frame.take<double>(kTokens);
    z = frame.zeros<T>(p.depth * kTokens);
    u = frame.zeros<T>(p.depth * kTokens);
    z_rows = frame.zeros<T>(kTokens * p.row);
    u_rows = frame.zeros<T>(kTokens * p.row);
    zz_ = frame.take<double>(kTokens);
    c_ = frame.take<double>(lanes);
    k_ = frame.take<double>(lanes);
    g_ = frame.take<double>(lanes);
    ww_ = frame.take<double>(lanes);
    w_ = frame.take<double>((keep ? p.m : 1) * p.r * kTokens);
    sum_u_ = frame.take<double>(p.r * kTokens);
}

template <class T>
void Tile<T>::load(MatrixView<const T> from, const MatrixView<const T> *weights, const MatrixView<const T> *mask, int64_t begin, int64_t n, int64_t position) {
    first = begin;
    start = position;
    count = n;
    const int64_t length = from.rows, columns = plan.columns;
    const auto open = [&](int64_t t) { return mask == nullptr || (*mask)(0, t) != T(0); };
    for (const auto &s : plan.segments) {
        const int64_t reach = begin - s.reach;
        const int64_t a = std::clamp<int64_t>(-reach, 0, s.width), b = std::clamp<int64_t>(length - reach, a, s.width);
        double *to = window + s.at;
        for (int64_t i = 0; i < plan.r; ++i) {
            std::fill_n(to + i * columns, a, 0.0);
            std::fill_n(to + i * columns + b, round_up(s.width, 8) - b, 0.0);
        }
        tokens_to_lanes<T, double>(from, reach + a, b - a, to + a, columns);
        plan.rotation.apply(to + a, columns, b - a, position + reach + a, 1, false);
        for (int64_t c = a; c < b; ++c)
            if (!open(reach + c))
                for (int64_t i = 0; i < plan.r; ++i) to[i * columns + c] = 0;
    }
    scale_columns(window, plan.r, columns, columns, power);
    for (int64_t j = 0; j < plan.m; ++j)
        for (int64_t l = 0; l < kTokens; ++l) {
            const int64_t t = begin + l, other = t - plan.options.offsets[std::size_t(j)];
            valid[j * kTokens + l] = l < n && other >= 0 && other < length && open(t) && open(other);
        }
    weigh(weights, begin, n);
    std::vector<const double *> w(std::size_t(plan.m)), w_power(std::size_t(plan.m));
    for (std::size_t j = 0; j < w.size(); ++j) {
        w[j] = window + plan.column[j];
        w_power[j] = power + plan.column[j];
    }
    combine({window + plan.own, power + plan.own, w.data(), w_power.data(), columns}, n);
}

template <class T> void Tile<T>::weigh(const MatrixView<const T> *weights, int64_t begin, int64_t n) {
    std::fill_n(sum, kTokens, 0.0);
    std::fill_n(alpha, plan.m * kTokens, 0.0);
    for (int64_t l = 0; l < n; ++l) {
        const auto applies = [&](int64_t j) { return valid[j * kTokens + l] != 0; };
        const auto number = [&](int64_t j) { return double((*weights)(begin + l, j)); };
        double total = 0, top = -std::numeric_limits<double>::infinity();
        switch (plan.options.weighting) {
        case MixWeights::mean:
            for (int64_t j = 0; j < plan.m; ++j) total += applies(j);
            for (int64_t j = 0; j < plan.m; ++j) alpha[j * kTokens + l] = applies(j) ? 1 / total : 0.0;
            break;
        case MixWeights::given:
            for (int64_t j = 0; j < plan.m; ++j) alpha[j * kTokens + l] = applies(j) ? number(j) : 0.0;
            break;
        case MixWeights::softmax: {
            for (int64_t j = 0; j < plan.m; ++j) // a logit of minus infinity is an offset that does not apply
                if (applies(j) && number(j) == -std::numeric_limits<double>::infinity()) valid[j * kTokens + l] = 0;
            // As for the token before, where that had the same offsets and the same logits.
            bool same = l > 0 && weights->row_stride == 0;
            for (int64_t j = 0; j < plan.m && same; ++j) same = valid[j * kTokens + l] == valid[j * kTokens + l - 1];
            if (same) {
                for (int64_t j = 0; j < plan.m; ++j) alpha[j * kTokens + l] = alpha[j * kTokens + l - 1];
                break;
            }
            for (int64_t j = 0; j < plan.m; ++j)
                if (applies(j)) top = top < number(j) ? number(j) : top;
            for (int64_t j = 0; j < plan.m; ++j)
                if (applies(j)) total += alpha[j * kTokens + l] = std::exp(number(j) - top);
            for (int64_t j = 0; j < plan.m; ++j)
                if (alpha[j * kTokens + l] != 0) alpha[j * kTokens + l] /= total;
            break;
        }
        }
        for (int64_t j = 0; j < plan.m; ++j) sum[l] += alpha[j * kTokens + l];
    }
}

template <class T> bool Tile<T>::active(int64_t t) const {
    for (int64_t j = 0; j < plan.m; ++j)
        if (valid[j * kTokens + t] != 0) return true;
    return false;
}

template <class T> void Tile<T>::combine(const Offsets &offsets, int64_t n) {
    count = n;
    const OffsetArguments a{
        &offsets, plan.r, plan.m, n,      plan.options.norm,           plan.options.eps, plan.options.past_first ? -1.0 : 1.0, alpha, valid, zz_, c_, k_,
        g_,       ww_,    w_,     sum_u_, keep_ ? plan.r * kTokens : 0};
    offset_forward(a);
    scale_columns(sum_u_, plan.r, kTokens, n, lift);
    using Narrow = NarrowKernel<T>;
    simd::dispatch<Narrow, const double *, int64_t, int64_t, int64_t, T *, int64_t>(sum_u_, plan.r, kTokens, n, u, kTokens);
    simd::dispatch<Narrow, const double *, int64_t, int64_t, int64_t, T *, int64_t>(offsets.z, plan.r, offsets.ld, n, z, kTokens);
}

template <class T> void Tile<T>::rows() {
    using Transposed = TransposeKernel<T>;
    simd::dispatch<Transposed, const T *, int64_t, int64_t, int64_t, T *, int64_t>(z, kTokens, plan.depth, kTokens, z_rows, plan.row);
    simd::dispatch<Transposed, const T *, int64_t, int64_t, int64_t, T *, int64_t>(u, kTokens, plan.depth, kTokens, u_rows, plan.row);
    for (int64_t l = 0; l < count; ++l) {
        if (lift[l] == 1) continue;
        const T by = T(lift[l]);
        for (int64_t i = 0; i < plan.r; ++i) { // a zero token next to a huge one has the wedge zero, whatever the lift
            T &x = z_rows[l * plan.row + i];
            x = x == T(0) ? x : x * by;
        }
    }
}

template <class T> void Tile<T>::coordinates(int64_t t, T *out) const {
    simd::dispatch<WedgeKernel<T>, const T *, const T *, int64_t, int64_t, int64_t, T *, int64_t>(z_rows + t * plan.row, u_rows + t * plan.row, plan.row,
                                                                                                  plan.r, 1, out, 0);
}

template <class T> void Tile<T>::coordinates_of_all(T *out, int64_t ld) const {
    simd::dispatch<WedgeKernel<T>, const T *, const T *, int64_t, int64_t, int64_t, T *, int64_t>(z_rows, u_rows, plan.row, plan.r, count, out, ld);
}

// With k_j = α_j g_j, u = Σ k_j w_j, w_j = z_{t-j} - c_j z (all scaled, so that g_j = powers / f): for s_j = w_j · du,
// dα_j = g_j s_j and, where the length counts, dn_j² = -k_j g_j² s_j / 2. The length has the gradients
// 2 (zz) w_j for z_{t-j} and 2 (w_j·w_j z - c_j zz w_j) for z; through w_j itself z_{t-j} gets k_j du, and z gets -c_j of it.
template <class T> void Tile<T>::backward(const T *dp, int64_t ld, double *into, double *da) {
    Frame frame;
    const int64_t lanes = plan.r * kTokens;
    T *dz = frame.take<T>(lanes), *du = frame.take<T>(lanes);
    double *wide_z = frame.take<double>(lanes), *wide_u = frame.take<double>(lanes);
    simd::dispatch<ContractKernel<T>, const T *, int64_t, const T *, const T *, int64_t, int64_t, T *, T *>(dp, ld, z, u, plan.r, count, dz, du);
    for (int64_t i = 0; i < plan.r; ++i)
        for (int64_t l = 0; l < kTokens; ++l) {
            const bool in = l < count;
            wide_z[i * kTokens + l] = in ? double(dz[i * kTokens + l]) * lift[l] : 0.0;
            wide_u[i * kTokens + l] = in ? double(du[i * kTokens + l]) : 0.0;
        }
    std::vector<const double *> w_power(std::size_t(plan.m));
    for (std::size_t j = 0; j < w_power.size(); ++j) w_power[j] = power + plan.column[j];
    std::fill_n(into, plan.r * plan.columns, 0.0);
    const OffsetBackward a{plan.r,
                           plan.m,
                           count,
                           plan.columns,
                           plan.column.data(),
                           window + plan.own,
                           zz_,
                           c_,
                           k_,
                           g_,
                           ww_,
                           w_,
                           plan.options.norm,
                           plan.options.eps,
                           plan.options.past_first ? -1.0 : 1.0,
                           power + plan.own,
                           w_power.data(),
                           wide_u,
                           wide_z,
                           into,
                           da};
    offset_backward(a);
    for (int64_t i = 0; i < plan.r; ++i)
        for (int64_t l = 0; l < count; ++l) into[i * plan.columns + plan.own + l] += wide_z[i * kTokens + l];
    double *inverse = frame.take<double>(plan.columns);
    for (int64_t c = 0; c < plan.columns; ++c) inverse[c] = 1 / power[c];
    for (int64_t i = 0; i < plan.r; ++i)
        for (int64_t c = 0; c < plan.columns; ++c) into[i * plan.columns + c] *= inverse[c];
    for (const auto &s : plan.segments) plan.rotation.apply(into + s.at, plan.columns, s.width, start + first - s.reach, 1, true);
}

void weights_backward(const Plan &plan, const unsigned char *valid, const double *alpha, const double *da, int64_t count, MatrixView<double> out) {
    for (int64_t l = 0; l < count; ++l) {
        double mean = 0;
        if (plan.options.weighting == MixWeights::softmax)
            for (int64_t j = 0; j < plan.m; ++j)
                if (alpha[j * kTokens + l] != 0) mean += alpha[j * kTokens + l] * da[j * kTokens + l];
        for (int64_t j = 0; j < plan.m; ++j) {
            const int64_t at = j * kTokens + l;
            if (plan.options.weighting == MixWeights::softmax)
                out(l, j) = alpha[at] != 0 ? alpha[at] * (da[at] - mean) : 0.0;
            else
                out(l, j) = valid[at] != 0 && plan.options.weighting == MixWeights::given ? da[at] : 0.0;
        }
    }
}

template class Tile<float>;
template class Tile<double>;

} // namespace subspan::plucker
