#include "plucker/offsets.hpp"

#include "linalg/microkernel.hpp"
#include "base/simd.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

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

// x - c z rounded once. Without a fused instruction (x86-64 of the first generation) by Dekker's exact product: the
// rejection of a token from its exact multiple must vanish, however the compiler was told to treat products.
template <int Bytes>
SUBSPAN_INLINE typename Vec<double, Bytes>::type residual(typename Vec<double, Bytes>::type x, typename Vec<double, Bytes>::type c,
                                                          typename Vec<double, Bytes>::type z) {
#ifdef SUBSPAN_VECTOR_EXT
    if constexpr (!simd::has_fma<Bytes>) {
        constexpr double split = 134217729.0; // 2^27 + 1
        const auto tc = SUBSPAN_ROUNDED(split * c), tz = SUBSPAN_ROUNDED(split * z);
        const auto ch = tc - (tc - c), zh = tz - (tz - z);
        const auto cl = c - ch, zl = z - zh, p = SUBSPAN_ROUNDED(c * z);
        const auto e = ((SUBSPAN_ROUNDED(ch * zh) - p) + SUBSPAN_ROUNDED(ch * zl) + SUBSPAN_ROUNDED(cl * zh)) + SUBSPAN_ROUNDED(cl * zl);
        return (x - p) - e;
    }
#endif
    return simd::fused<double, Bytes>(-c, z, x);
}

// Whether a clamp leaves the length n alone; `scaled` is the same length before its powers of two came back. Without an eps
// a length that underflows still is one.
SUBSPAN_INLINE bool above(double n, double scaled, double eps) { return n > eps || (eps == 0 && scaled > 0); }

// c, k, g and ww of one offset and the tokens from l on, `lanes` of them: see Tile::backward for what they mean.
SUBSPAN_INLINE void coefficients(const OffsetArguments &a, int64_t j, int64_t l, int lanes, const double *c1, const double *c2, const double *ww) {
    const double *pz = a.offsets->power + l, *pw = a.offsets->w_power[j] + l, *alpha = a.alpha + j * kTokens + l, *zz = a.zz + l;
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
            s = a.eps > 0 ? power / std::sqrt(SUBSPAN_ROUNDED(n * n) + a.eps) : (length > 0 ? 1 / length : 0.0);
            if (!(n < kLong)) s = 1 / length;
        }
        g[x] = valid[x] != 0 ? s : 0.0;
        k[x] = alpha[x] != 0 ? a.sign * alpha[x] * s : 0.0;
    }
}

struct OffsetKernel {
    // Tokens from l on, G vectors of them.
    template <int Bytes, int G> static SUBSPAN_INLINE void group(const OffsetArguments &a, int64_t l) {
        using V = Vec<double, Bytes>;
        using type = typename V::type;
        constexpr int W = V::lanes, N = G * W;
        const int64_t ld = a.offsets->ld, r = a.r;
        const double *z = a.offsets->z + l;
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
            const double *w = a.offsets->w[j] + l;
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
#pragma GCC unroll 4
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
#pragma GCC unroll 4
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
    template <int Bytes> static SUBSPAN_INLINE void run(const OffsetArguments *a) {
        constexpr int W = Vec<double, Bytes>::lanes;
        const int64_t lanes = round_up(a->count, W);
        int64_t l = 0;
        for (; l + 3 * W <= lanes; l += 3 * W) group<Bytes, 3>(*a, l);
        for (; l < lanes; l += W) group<Bytes, 1>(*a, l);
    }
};

struct OffsetBackwardKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(const OffsetBackward *p) {
        using V = Vec<double, Bytes>;
        using type = typename V::type;
        constexpr int W = V::lanes;
        const OffsetBackward &a = *p;
        for (int64_t l = 0; l < a.count; l += W) {
            alignas(64) double outer[W], inner[W], outer_sum[W];
            for (int x = 0; x < W; ++x) outer_sum[x] = 0;
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
                    outer_sum[x] += e * a.ww[at + x];
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
            const type e = V::load(outer_sum);
            for (int64_t i = 0; i < a.r; ++i) {
                double *dz = a.dz + i * kTokens + l;
                V::store(dz, V::load(dz) - e * V::load(a.z + i * a.columns + l));
            }
        }
    }
};

} // namespace

void offset_forward(const OffsetArguments &a) { simd::dispatch<OffsetKernel, const OffsetArguments *>(&a); }
void offset_backward(const OffsetBackward &a) { simd::dispatch<OffsetBackwardKernel, const OffsetBackward *>(&a); }

} // namespace subspan::plucker
