#include "plucker_tile.hpp"

#include "micro.hpp"
#include "pack.hpp"
#include "simd.hpp"
#include "subspan/errors.hpp"
#include "subspan/parallel.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <type_traits>
#include <stdexcept>

namespace subspan::plucker {
namespace {

using simd::round_up;
using simd::Vec;

// Below this sine of the angle two tokens are parallel: what two rejections leave of exact multiples, eps² and a few.
constexpr double kParallel = 1e-30;
// Square of the tangent of an angle that one rejection is enough for.
constexpr double kSmall = 1e-2;
// Lengths from here on are far above any eps, and may be the overflow of products that are finite.
constexpr double kLong = 1e150;

// -- the window --------------------------------------------------------------------------------------------------------

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

// to = T(x · by)
template <class T> struct NarrowKernel {
    template <int Bytes>
    static SUBSPAN_INLINE void run(const double *x, int64_t rows, int64_t ld, int64_t count, const double *by, T *to, int64_t ldt) {
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t c = 0; c < count; ++c) to[i * ldt + c] = T(x[i * ld + c] * (by != nullptr ? by[c] : 1.0));
    }
};

// The power of two under a positive number, kept where its inverse is a number too; 1 for zero, infinity and NaN.
double power_under(double top) {
    if (!(top > 0) || !(top < std::numeric_limits<double>::infinity())) return 1.0;
    const std::uint64_t exponent = std::bit_cast<std::uint64_t>(top) >> 52;
    return std::bit_cast<double>(std::clamp<std::uint64_t>(exponent, 2, 2044) << 52);
}

// -- rejections --------------------------------------------------------------------------------------------------------

// x - c z rounded once. Without a fused instruction (x86-64 of the first generation) by Dekker's exact product: the
// rejection of a token from its exact multiple must vanish.
template <int Bytes>
SUBSPAN_INLINE typename Vec<double, Bytes>::type residual(typename Vec<double, Bytes>::type x, typename Vec<double, Bytes>::type c,
                                                          typename Vec<double, Bytes>::type z) {
#if (defined(__x86_64__) || defined(__i386__) || defined(_M_X64)) && !defined(__FMA__)
    if constexpr (Bytes == 16) {
        constexpr double split = 134217729.0; // 2^27 + 1
        const auto tc = split * c, tz = split * z;
        const auto ch = tc - (tc - c), zh = tz - (tz - z);
        const auto cl = c - ch, zl = z - zh, p = c * z;
        const auto e = ((ch * zh - p) + ch * zl + cl * zh) + cl * zl;
        return (x - p) - e;
    }
#endif
    return x - c * z;
}

struct LagArguments {
    const Lags *lags;
    int64_t r, m, count;
    MixNorm norm;
    double eps, sign;
    const double *alpha;
    const unsigned char *valid;
    double *zz, *c, *k, *g, *ww, *w, *u;
    int64_t keep; // distance of the rejections of two offsets: zero where they are not kept
};

// Whether a clamp leaves the length n alone; `scaled` is the same length before its powers of two came back. Without an eps
// a length that underflows still is one.
SUBSPAN_INLINE bool above(double n, double scaled, double eps) { return n > eps || (eps == 0 && scaled > 0); }

// c, k, g and ww of one offset and the tokens from l on, `lanes` of them: see Tile::backward for what they mean.
SUBSPAN_INLINE void coefficients(const LagArguments &a, int64_t j, int64_t l, int lanes, const double *c1, const double *c2,
                                 const double *ww) {
    const double *pz = a.lags->power + l, *pw = a.lags->w_power[j] + l, *alpha = a.alpha + j * kTokens + l, *zz = a.zz + l;
    const unsigned char *valid = a.valid + j * kTokens + l;
    double *c = a.c + j * kTokens + l, *k = a.k + j * kTokens + l, *g = a.g + j * kTokens + l, *ws = a.ww + j * kTokens + l;
    for (int x = 0; x < lanes; ++x) {
        c[x] = c1[x] + c2[x];
        ws[x] = ww[x];
        const double length = std::sqrt(zz[x] * ww[x]), n = length * pz[x] * pw[x];
        const double power = pz[x] * pw[x]; // infinite where a wedge is that long: then so is what comes out, which is noticed
        double s = power;
        if (a.norm == MixNorm::clamp) s = above(n, length, a.eps) || !(n < kLong) ? 1 / length : (a.eps > 0 ? power / a.eps : 0.0);
        if (a.norm == MixNorm::soft) {
            s = a.eps > 0 ? power / std::sqrt(n * n + a.eps) : (length > 0 ? 1 / length : 0.0);
            if (!(n < kLong)) s = 1 / length;
        }
        g[x] = valid[x] != 0 ? s : 0.0;
        k[x] = alpha[x] != 0 ? a.sign * alpha[x] * s : 0.0;
    }
}

struct LagKernel {
    // Tokens from l on, G vectors of them.
    template <int Bytes, int G> static SUBSPAN_INLINE void group(const LagArguments &a, int64_t l) {
        using V = Vec<double, Bytes>;
        using type = typename V::type;
        constexpr int W = V::lanes, N = G * W;
        const int64_t ld = a.lags->ld, r = a.r;
        const double *z = a.lags->z + l;
        type zz[G], inverse[G];
        for (int q = 0; q < G; ++q) zz[q] = type{};
        for (int64_t i = 0; i < r; ++i)
            for (int q = 0; q < G; ++q) {
                const type x = V::load(z + i * ld + q * W);
                zz[q] += x * x;
            }
        alignas(64) double buffer[4][N];
        for (int q = 0; q < G; ++q) V::store(a.zz + l + q * W, zz[q]);
        for (int x = 0; x < N; ++x) buffer[0][x] = a.zz[l + x] > 0 ? 1 / a.zz[l + x] : a.zz[l + x];
        for (int q = 0; q < G; ++q) inverse[q] = V::load(buffer[0] + q * W);
        for (int64_t i = 0; i < r; ++i)
            for (int q = 0; q < G; ++q) V::store(a.u + i * kTokens + l + q * W, type{});
        for (int64_t j = 0; j < a.m; ++j) {
            const double *w = a.lags->w[j] + l;
            double *kept = a.w + j * a.keep + l;
            type c1[G], c2[G], s[G];
            for (int q = 0; q < G; ++q) c1[q] = c2[q] = s[q] = type{};
            for (int64_t i = 0; i < r; ++i)
                for (int q = 0; q < G; ++q) c1[q] += V::load(z + i * ld + q * W) * V::load(w + i * ld + q * W);
            for (int q = 0; q < G; ++q) c1[q] = c1[q] * inverse[q];
            // Equal tokens must give 1 exactly, which x · (1 / x) need not be.
            for (int q = 0; q < G; ++q) V::store(buffer[1] + q * W, c1[q]);
            for (int x = 0; x < N; ++x) buffer[1][x] = std::abs(buffer[1][x] - 1) < 4e-16 ? 1.0 : buffer[1][x];
            for (int q = 0; q < G; ++q) c1[q] = V::load(buffer[1] + q * W);
            for (int64_t i = 0; i < r; ++i)
                for (int q = 0; q < G; ++q) {
                    const type x = V::load(z + i * ld + q * W);
                    const type y = residual<Bytes>(V::load(w + i * ld + q * W), c1[q], x);
                    V::store(kept + i * kTokens + q * W, y);
                    c2[q] += x * y;
                    s[q] += y * y;
                }
            for (int q = 0; q < G; ++q) {
                V::store(buffer[2] + q * W, c2[q] * inverse[q]);
                V::store(buffer[3] + q * W, s[q]);
            }
            // Where the angle is not small, what is left along z is below the last digit of w. Each lane for itself, by a
            // second factor of zero, so that its bits do not depend on its neighbours.
            bool again = false;
            for (int x = 0; x < N; ++x) {
                const bool small = !(buffer[3][x] >= kSmall * buffer[1][x] * buffer[1][x] * a.zz[l + x]);
                buffer[2][x] = small ? buffer[2][x] : 0.0;
                again = again || small;
            }
            if (again) {
                for (int q = 0; q < G; ++q) {
                    c2[q] = V::load(buffer[2] + q * W);
                    s[q] = type{};
                }
                for (int64_t i = 0; i < r; ++i)
                    for (int q = 0; q < G; ++q) {
                        const type y = residual<Bytes>(V::load(kept + i * kTokens + q * W), c2[q], V::load(z + i * ld + q * W));
                        V::store(kept + i * kTokens + q * W, y);
                        s[q] += y * y;
                    }
                for (int q = 0; q < G; ++q) V::store(buffer[3] + q * W, s[q]);
            }
            for (int x = 0; x < N; ++x) {
                const double c = buffer[1][x] + buffer[2][x], ww = buffer[3][x];
                // |w|² = c² zz + ww
                const bool parallel = ww <= kParallel * kParallel * (c * c * a.zz[l + x] + ww);
                const bool absent = !(ww < std::numeric_limits<double>::infinity()) && a.valid[j * kTokens + l + x] == 0;
                if ((parallel && ww > 0) || absent) {
                    for (int64_t i = 0; i < r; ++i) kept[i * kTokens + x] = 0;
                    buffer[3][x] = 0;
                    if (absent) buffer[1][x] = buffer[2][x] = 0;
                }
            }
            coefficients(a, j, l, N, buffer[1], buffer[2], buffer[3]);
            // Parallel tokens have no wedge even where k is infinite; their gradient has.
            for (int x = 0; x < N; ++x) buffer[0][x] = buffer[3][x] == 0 ? 0.0 : a.k[j * kTokens + l + x];
            type k[G];
            for (int q = 0; q < G; ++q) k[q] = V::load(buffer[0] + q * W);
            for (int64_t i = 0; i < r; ++i)
                for (int q = 0; q < G; ++q) {
                    double *u = a.u + i * kTokens + l + q * W;
                    V::store(u, V::load(u) + k[q] * V::load(kept + i * kTokens + q * W));
                }
        }
    }
    template <int Bytes> static SUBSPAN_INLINE void run(const LagArguments *a) {
        constexpr int W = Vec<double, Bytes>::lanes;
        const int64_t lanes = round_up(a->count, W);
        int64_t l = 0;
        for (; l + 3 * W <= lanes; l += 3 * W) group<Bytes, 3>(*a, l);
        for (; l < lanes; l += W) group<Bytes, 1>(*a, l);
    }
};

// -- wedges ------------------------------------------------------------------------------------------------------------

template <class T> struct TurnKernel {
    // `lanes` columns of `from` (rows, lanes apart as given) become rows of `to`.
    template <int Bytes> static SUBSPAN_INLINE void run(const T *from, int64_t ld, int64_t rows, int64_t columns, T *to, int64_t ldt) {
        constexpr int W = Vec<T, Bytes>::lanes;
        for (int64_t i = 0; i < rows; i += W)
            for (int64_t c = 0; c < columns; c += W)
                simd::Transpose<T, Bytes>::block(from + i * ld + c, ld, nullptr, nullptr, to + c * ldt + i, ldt);
    }
};

// out[pair(i, j)] = z_i u_j - z_j u_i. Rows of z and u are padded with zeros: what a vector writes past the end of a row
// of pairs, the next one overwrites, and behind the last one there is padding.
template <class T> struct WedgeKernel {
    template <int Bytes>
    static SUBSPAN_INLINE void run(const T *z, const T *u, int64_t row, int64_t r, int64_t tokens, T *out, int64_t ld) {
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
    template <int Bytes>
    static SUBSPAN_INLINE void run(const T *dp, int64_t ld, const T *z, const T *u, int64_t r, int64_t tokens, T *dz, T *du) {
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

struct LagBackward {
    int64_t r, m, count, columns;
    const int64_t *column;
    const double *z, *zz, *c, *k, *g, *ww, *w; // z: own columns
    MixNorm norm;
    double eps, sign;
    const double *power, *const *w_power;
    const double *du; // r x kTokens
    double *dz;       // r x kTokens: what comes through z in the wedge; changed
    double *into, *da;
};

struct LagBackwardKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(const LagBackward *p) {
        using V = Vec<double, Bytes>;
        using type = typename V::type;
        constexpr int W = V::lanes;
        const LagBackward &a = *p;
        for (int64_t l = 0; l < a.count; l += W) {
            alignas(64) double outer[W], inner[W], turned[W];
            for (int x = 0; x < W; ++x) turned[x] = 0;
            for (int64_t j = 0; j < a.m; ++j) {
                const double *w = a.w + j * a.r * kTokens + l, *du = a.du + l;
                const int64_t at = j * kTokens + l;
                type s{};
                for (int64_t i = 0; i < a.r; ++i) s += V::load(w + i * kTokens) * V::load(du + i * kTokens);
                V::store(inner, s);
                for (int x = 0; x < W; ++x) {
                    const double y = a.g[at + x] * inner[x];
                    a.da[at + x] = a.sign * y;
                    const double length = std::sqrt(a.zz[l + x] * a.ww[at + x]), n = length * a.power[l + x] * a.w_power[j][l + x];
                    const bool moves = a.norm == MixNorm::soft || (a.norm == MixNorm::clamp && above(n, length, a.eps));
                    // The length of a soft norm at which n² + eps is n² needs no other formula: g is 1/n there.
                    const double e = moves ? a.k[at + x] * y * a.g[at + x] : 0.0;
                    outer[x] = e * a.zz[l + x];
                    turned[x] += e * a.ww[at + x];
                }
                const type e = V::load(outer), k = V::load(a.k + at), c = V::load(a.c + at);
                double *into = a.into + a.column[j] + l;
                for (int64_t i = 0; i < a.r; ++i) {
                    const type t = k * V::load(du + i * kTokens) - e * V::load(w + i * kTokens);
                    V::store(into + i * a.columns, V::load(into + i * a.columns) + t);
                    double *dz = a.dz + i * kTokens + l;
                    V::store(dz, V::load(dz) - c * t);
                }
            }
            const type e = V::load(turned);
            for (int64_t i = 0; i < a.r; ++i) {
                double *dz = a.dz + i * kTokens + l;
                V::store(dz, V::load(dz) - e * V::load(a.z + i * a.columns + l));
            }
        }
    }
};

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

template <class T>
void add_windows(const Plan &plan, const StackView<T> &dz, const Piece *pieces, int64_t count, const double *windows) {
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
    if (!on()) return;
    for (int64_t i = 0; i < half_; ++i) {
        frequency_.push_back(std::pow(base, -2.0 * double(i) / double(r)));
        for (int s = 0; s < 64; ++s) {
            cos_.push_back(std::cos(s * frequency_.back()));
            sin_.push_back(std::sin(s * frequency_.back()));
        }
    }
}

void Rotation::turn_all(double *x, int64_t ld, int64_t count, int64_t position) const {
    if (!on()) return;
    for (int64_t i = 0; i < half_; ++i) {
        const double angle = double((position >> 6) * 64) * frequency_[std::size_t(i)], cb = std::cos(angle), sb = std::sin(angle);
        const double c = cos_[std::size_t(64 * i + (position & 63))], s = sin_[std::size_t(64 * i + (position & 63))];
        const double cc = cb * c - sb * s, ss = sb * c + cb * s;
        const bool pairs = kind_ == Rope::interleaved;
        double *a = x + (pairs ? 2 * i : i) * ld, *b = x + (pairs ? 2 * i + 1 : i + half_) * ld;
        for (int64_t l = 0; l < count; ++l) {
            const double u = a[l], v = b[l];
            a[l] = u * cc - v * ss;
            b[l] = u * ss + v * cc;
        }
    }
}

void Rotation::turn(double *x, int64_t ld, int64_t count, int64_t first, bool back) const {
    if (!on()) return;
    for (int64_t c = 0; c < count;) {
        const int64_t position = first + c, block = position >> 6, s0 = position & 63, some = std::min<int64_t>(count - c, 64 - s0);
        for (int64_t i = 0; i < half_; ++i) {
            const double angle = double(block * 64) * frequency_[std::size_t(i)];
            const double cb = std::cos(angle), sb = back ? -std::sin(angle) : std::sin(angle);
            const double *ct = cos_.data() + 64 * i + s0, *st = sin_.data() + 64 * i + s0;
            const bool pairs = kind_ == Rope::interleaved;
            double *a = x + (pairs ? 2 * i : i) * ld + c, *b = x + (pairs ? 2 * i + 1 : i + half_) * ld + c;
            for (int64_t l = 0; l < some; ++l) {
                const double st_l = back ? -st[l] : st[l];
                const double cc = cb * ct[l] - sb * st_l, ss = sb * ct[l] + cb * st_l;
                const double u = a[l], v = b[l];
                a[l] = u * cc - v * ss;
                b[l] = u * ss + v * cc;
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
    if (std::max(o.rope_start, -std::max<int64_t>(o.rope_start, -kFar)) >= kFar) throw ValueError("rope_start is out of range");
    if (!(o.eps >= 0 && o.eps < 1e100)) throw ValueError("eps must be from 0 to 1e100");
    if (o.weighting != MixWeights::mean && weights_columns != m) throw ValueError("weights must have one entry for each offset");
    if (rotation.on() && r % 2 != 0) throw ValueError("rope needs an even number of dimensions");
    const int64_t lines = round_up(coordinates + kPad, kLanes) / kLanes;
    length = (lines + (lines % 2 == 0)) * kLanes;
    std::vector<int64_t> lags(o.offsets);
    lags.push_back(0);
    std::sort(lags.begin(), lags.end(), std::greater<>());
    lags.erase(std::unique(lags.begin(), lags.end()), lags.end());
    columns = 0;
    for (std::size_t a = 0; a < lags.size();) {
        std::size_t b = a;
        while (b + 1 < lags.size() && lags[b] - lags[b + 1] <= kTokens) ++b;
        const int64_t width = lags[a] - lags[b] + kTokens;
        segments.push_back({lags[a], width, columns});
        columns += round_up(width, 8);
        a = b + 1;
    }
    const auto find = [&](int64_t lag) {
        for (const auto &s : segments)
            if (lag <= s.reach && s.reach - lag + kTokens <= s.width) return s.at + s.reach - lag;
        throw std::logic_error("an offset is in no segment");
    };
    own = find(0);
    for (const auto d : o.offsets) column.push_back(find(d));
}

template <class T> void check(const MixInput<T> &in, const Plan &plan, const StackView<double> *dweights) {
    const auto same = [&](const auto &x, int64_t rows, int64_t cols) { return x.rows() == rows && x.cols() == cols && x.size() == in.z.size(); };
    if (in.z.cols() != plan.r) throw ValueError("z has tokens of another number of dimensions");
    if (in.weights == nullptr && plan.options.weighting != MixWeights::mean) throw ValueError("weights are missing");
    if (in.weights != nullptr && !same(*in.weights, in.z.rows(), plan.m)) throw ValueError("z and weights do not fit");
    if (in.mask != nullptr && !same(*in.mask, 1, in.z.rows())) throw ValueError("z and mask do not fit");
    if (dweights != nullptr && !same(*dweights, in.z.rows(), plan.m)) throw ValueError("z and dweights do not fit");
}

// -- a tile ------------------------------------------------------------------------------------------------------------

template <class T> Tile<T>::Tile(Frame &frame, const Plan &p, bool keep, bool with_window) : plan(p), keep_(keep) {
    const int64_t lanes = p.m * kTokens;
    window = with_window ? frame.zeros<double>(p.r * p.columns) : nullptr;
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
    top_ = frame.take<double>(std::max(p.columns, kTokens));
}

template <class T>
void Tile<T>::load(MatrixView<const T> from, const MatrixView<const T> *weights, const MatrixView<const T> *mask, int64_t begin, int64_t n) {
    first = begin;
    count = n;
    const int64_t length = from.rows, columns = plan.columns;
    const auto open = [&](int64_t t) { return mask == nullptr || (*mask)(0, t) != T(0); };
    for (const auto &s : plan.segments) {
        const int64_t start = begin - s.reach;
        const int64_t a = std::clamp<int64_t>(-start, 0, s.width), b = std::clamp<int64_t>(length - start, a, s.width);
        double *to = window + s.at;
        for (int64_t i = 0; i < plan.r; ++i) {
            std::fill_n(to + i * columns, a, 0.0);
            std::fill_n(to + i * columns + b, round_up(s.width, 8) - b, 0.0);
        }
        tokens_to_lanes<T, double>(from, start + a, b - a, to + a, columns);
        plan.rotation.turn(to + a, columns, b - a, plan.options.rope_start + start + a, false);
        for (int64_t c = a; c < b; ++c)
            if (!open(start + c))
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

template <class T> void Tile<T>::combine(const Lags &lags, int64_t n) {
    count = n;
    LagArguments a{&lags, plan.r, plan.m, n, plan.options.norm, plan.options.eps, plan.options.past_first ? -1.0 : 1.0,
                   alpha, valid, zz_, c_, k_, g_, ww_, w_, sum_u_, keep_ ? plan.r * kTokens : 0};
    simd::dispatch<LagKernel, const LagArguments *>(&a);
    simd::dispatch<TopKernel, const double *, int64_t, int64_t, int64_t, double *>(sum_u_, plan.r, kTokens, n, top_);
    for (int64_t l = 0; l < n; ++l) {
        lift[l] = power_under(top_[l]);
        top_[l] = 1 / lift[l];
    }
    simd::dispatch<NarrowKernel<T>, const double *, int64_t, int64_t, int64_t, const double *, T *, int64_t>(sum_u_, plan.r, kTokens, n,
                                                                                                            top_, u, kTokens);
    simd::dispatch<NarrowKernel<T>, const double *, int64_t, int64_t, int64_t, const double *, T *, int64_t>(lags.z, plan.r, lags.ld, n,
                                                                                                            nullptr, z, kTokens);
}

template <class T> void Tile<T>::rows() {
    using Turn = TurnKernel<T>;
    simd::dispatch<Turn, const T *, int64_t, int64_t, int64_t, T *, int64_t>(z, kTokens, plan.depth, kTokens, z_rows, plan.row);
    simd::dispatch<Turn, const T *, int64_t, int64_t, int64_t, T *, int64_t>(u, kTokens, plan.depth, kTokens, u_rows, plan.row);
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
    simd::dispatch<WedgeKernel<T>, const T *, const T *, int64_t, int64_t, int64_t, T *, int64_t>(z_rows + t * plan.row, u_rows + t * plan.row,
                                                                                                 plan.row, plan.r, 1, out, 0);
}

template <class T> void Tile<T>::coordinates_of_all(T *out, int64_t ld) const {
    simd::dispatch<WedgeKernel<T>, const T *, const T *, int64_t, int64_t, int64_t, T *, int64_t>(z_rows, u_rows, plan.row, plan.r, count,
                                                                                                 out, ld);
}

// With k_j = α_j g_j, u = Σ k_j w_j, w_j = z_{t-j} - c_j z (all scaled, so that g_j = powers / f): for s_j = w_j · du,
// dα_j = g_j s_j and, where the length counts, dn_j² = -k_j g_j² s_j / 2. The length has the gradients
// 2 (zz) w_j for z_{t-j} and 2 (w_j·w_j z - c_j zz w_j) for z; through w_j itself z_{t-j} gets k_j du, and z gets -c_j of it.
template <class T> void Tile<T>::backward(const T *dp, int64_t ld, double *into, double *da) {
    Frame frame;
    const int64_t lanes = plan.r * kTokens;
    T *dz = frame.take<T>(lanes), *du = frame.take<T>(lanes);
    double *wide_z = frame.take<double>(lanes), *wide_u = frame.take<double>(lanes);
    simd::dispatch<ContractKernel<T>, const T *, int64_t, const T *, const T *, int64_t, int64_t, T *, T *>(dp, ld, z, u, plan.r, count, dz,
                                                                                                            du);
    for (int64_t i = 0; i < plan.r; ++i)
        for (int64_t l = 0; l < kTokens; ++l) {
            const bool in = l < count;
            wide_z[i * kTokens + l] = in ? double(dz[i * kTokens + l]) * lift[l] : 0.0;
            wide_u[i * kTokens + l] = in ? double(du[i * kTokens + l]) : 0.0;
        }
    std::vector<const double *> w_power(std::size_t(plan.m));
    for (std::size_t j = 0; j < w_power.size(); ++j) w_power[j] = power + plan.column[j];
    std::fill_n(into, plan.r * plan.columns, 0.0);
    const LagBackward a{plan.r, plan.m, count, plan.columns, plan.column.data(), window + plan.own, zz_, c_, k_, g_, ww_, w_,
                        plan.options.norm, plan.options.eps, plan.options.past_first ? -1.0 : 1.0, power + plan.own, w_power.data(), wide_u,
                        wide_z, into, da};
    simd::dispatch<LagBackwardKernel, const LagBackward *>(&a);
    for (int64_t i = 0; i < plan.r; ++i)
        for (int64_t l = 0; l < count; ++l) into[i * plan.columns + plan.own + l] += wide_z[i * kTokens + l];
    for (int64_t c = 0; c < plan.columns; ++c) top_[c] = 1 / power[c];
    simd::dispatch<ScaleKernel, double *, int64_t, int64_t, int64_t, const double *>(into, plan.r, plan.columns, plan.columns, top_);
    for (const auto &s : plan.segments)
        plan.rotation.turn(into + s.at, plan.columns, s.width, plan.options.rope_start + first - s.reach, true);
}

void weights_backward(const Plan &plan, const unsigned char *valid, const double *alpha, const double *da, int64_t count,
                      MatrixView<double> out) {
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
#define SUBSPAN_INSTANTIATE(T)                                                                                         \
    template void add_windows<T>(const Plan &, const StackView<T> &, const Piece *, int64_t, const double *);          \
    template void set_zero<T>(const StackView<T> &);                                                                   \
    template void check<T>(const MixInput<T> &, const Plan &, const StackView<double> *);                              \
    template class Tile<T>;                                                                                            \
    template bool all_finite<T>(const T *, int64_t);                                                                   \
    template bool all_finite<T>(MatrixView<const T>);                                                                  \
    template bool all_finite<T>(const StackView<const T> &);                                                           \
    template bool all_finite<T>(const MixInput<T> &);
SUBSPAN_INSTANTIATE(float)
SUBSPAN_INSTANTIATE(double)
#undef SUBSPAN_INSTANTIATE

} // namespace subspan::plucker
