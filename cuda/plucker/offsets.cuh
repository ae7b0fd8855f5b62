// A token and its past: four or eight neighbouring lanes hold a token, eight of its dimensions each.
#pragma once

#include "subspan/cuda/launch.cuh"
#include "subspan/cuda/plucker_mix.hpp"

#include <type_traits>

namespace subspan::cuda::plucker {

inline constexpr int kChunk = 8; // dimensions of a lane

/// What rejections are computed in: 16-bit tokens in float, as long as the angle is not small.
template <class T> struct OffsetOf {
    using type = float;
};
template <> struct OffsetOf<float> {
    using type = double;
};
template <> struct OffsetOf<double> {
    using type = double;
};
/// What z and u are kept in for the coordinates.
template <class T> using Kept = Accumulate<T>;

/// One dimension of z and u side by side: one read of shared memory gives both.
template <class A> struct alignas(2 * sizeof(A)) Two {
    A z, u;
};

enum Norm { none, clamp, soft };
enum Weighting { mean, given, softmax };

template <class T> struct Arguments {
    Matrices<const T> z;
    Matrices<const unsigned char> mask;
    bool has_mask, vectors;      // vectors: chunks of z may be read 16 bytes at a time
    int64_t length, ring, first; // tokens of a sequence; see MixInput
    unsigned count, tokens;      // tokens mixed in each sequence, and in all
    int r, m, norm, weighting;
    typename OffsetOf<T>::type eps, sign;
    int rope;
    int64_t back, ahead; // the largest offset to earlier and to later tokens
    typename OffsetOf<T>::type whole; // the mean's weight where all offsets apply
    const double *rotations; // cosine and sine of each pair at each position from `rotations_from` on, or null
    int64_t rotations_from;
    // Of each token and offset, unless the weights are the mean and nothing is masked: those follow from positions.
    typename OffsetOf<T>::type *alpha;
    unsigned char *valid;
    int64_t offsets[kOffsets];
};

// -- small arithmetic that host tests share ------------------------------------------------------------------------------------

/// The exponent under a positive finite number, kept where both 2^e and 2^-e are normal; 0 for zero, infinity and NaN.
SUBSPAN_SHARED_CODE int exponent_of(float x) {
    const int e = int((float_to_bits(x) >> 23) & 255u);
    return x > 0.0f && e < 255 ? most(-125, least(125, e - 127)) : 0;
}
SUBSPAN_SHARED_CODE int exponent_of(double x) {
    if (!(x > 0.0) || !(x < 1.7976931348623157e308)) return 0;
    int64_t u;
#if defined(__CUDA_ARCH__)
    u = __double_as_longlong(x);
#else
    __builtin_memcpy(&u, &x, 8);
#endif
    return most(-1021, least(1021, int((u >> 52) & 2047) - 1023));
}
/// 2^e, infinite or zero beyond the range.
template <class L> SUBSPAN_SHARED_CODE L power_of_two(int e);
template <> SUBSPAN_SHARED_CODE float power_of_two<float>(int e) {
    if (e > 127) return bits_to_float(0x7f800000u);
    if (e < -126) return e < -149 ? 0.0f : bits_to_float(1u << (e + 149));
    return bits_to_float(uint32_t(e + 127) << 23);
}
template <> SUBSPAN_SHARED_CODE double power_of_two<double>(int e) {
    if (e > 1023) return 1.7976931348623157e308 * 2.0;
    const bool low = e < -1022;
    const int64_t u = int64_t((low ? most(e + 1000, -1022) : e) + 1023) << 52;
    double d;
#if defined(__CUDA_ARCH__)
    d = __longlong_as_double(u);
#else
    __builtin_memcpy(&d, &u, 8);
#endif
    return low ? (e < -1074 ? 0.0 : d * 9.332636185032189e-302) : d; // 2^-1000
}

template <class L> struct Limits;
template <> struct Limits<float> {
    static constexpr float parallel = 1e-30f, longest = 1e18f;
};
template <> struct Limits<double> {
    static constexpr double parallel = 1e-30, longest = 1e150;
};

/// The sum over the lanes of a token, the same in all of them.
template <int Lanes, class L> SUBSPAN_DEVICE L sum_of(L x) {
#pragma unroll
    for (int step = 1; step < Lanes; step *= 2) x += __shfl_xor_sync(kWarp, x, step);
    return x;
}
template <int Lanes, class L> SUBSPAN_DEVICE L most_of(L x) {
#pragma unroll
    for (int step = 1; step < Lanes; step *= 2) x = most(x, __shfl_xor_sync(kWarp, x, step));
    return x;
}

/// A token's chunk, scaled by 2^-power.
template <class L> struct Chunk {
    L x[kChunk];
    int power;
};

/// Rows of z that a block keeps in shared memory: those of its tokens and of their neighbours within some offsets, one after the other over
/// all sequences. Null where there are none.
template <class T> struct Halo {
    struct Measure {
        float down, ww; // 2^-power of the row, and the square of the row times that
    };
    const T *rows = nullptr;
    const Measure *measures = nullptr; // of 16-bit rows
    int begin = 0;                     // the first one, counted over all sequences
    int count = 0, pitch = 0;
};

/// The pair of a token z and one of its past: w becomes the rejection y = w - c z, scaled to lie within sight of one.
template <class L> struct Pair {
    L c, yy, g, k;
    bool moves; // the length counts in the gradient
    int power;  // of y
};

template <class L> struct Scale {
    L f;
    bool above; // the length is more than eps
};

template <class T, int Lanes> struct Token {
    static constexpr int RC = kChunk;
    using L = typename OffsetOf<T>::type;
    const Arguments<T> &a;
    const Halo<T> halo;
    int q;             // which chunk
    unsigned index, sequence;
    int64_t t;
    bool in; // a token at all
    Chunk<L> z;
    L zz;

    SUBSPAN_DEVICE Token(const Arguments<T> &a, unsigned token, const Halo<T> &halo = {}) : a(a), halo(halo), q(int(threadIdx.x) % Lanes), index(token) {
        in = token < a.tokens;
        sequence = in ? token / a.count : 0u;
        t = in ? a.first + int64_t(token - sequence * a.count) : 0;
        load(z, t, in && open(t));
        zz = square(z.x);
    }
    SUBSPAN_DEVICE bool open(int64_t t) const { return !a.has_mask || a.mask.at(sequence)[(a.ring > 0 ? t % a.ring : t) * a.mask.col_stride] != 0; }
    /// Whether offset j counts at token s of this sequence.
    SUBSPAN_DEVICE bool counts(int64_t s, int j) const {
        if (!in || s < 0 || s >= a.length) return false;
        if (a.valid != nullptr) return a.valid[place(s, j)] != 0;
        const int64_t other = s - a.offsets[j];
        return other >= 0 && other < a.length;
    }
    SUBSPAN_DEVICE int64_t place(int64_t s, int j) const { return (int64_t(sequence) * a.count + (s - a.first)) * a.m + j; }
    /// The weight of the offsets that count at token s where it is the mean; else each has its own.
    SUBSPAN_DEVICE L mean_at(int64_t s) const {
        if (a.alpha != nullptr) return L(0);
        if (in && s >= a.back && s < a.length - a.ahead) return a.whole; // nothing is masked here
        int n = 0;
        for (int j = 0; j < a.m; ++j) n += counts(s, j) ? 1 : 0;
        return n > 0 ? L(1) / L(n) : L(0);
    }
    SUBSPAN_DEVICE L weight(int64_t s, int j, L mean, bool counted) const {
        if (!counted) return L(0);
        return a.alpha != nullptr ? a.alpha[place(s, j)] : mean;
    }

    /// This lane's chunk of a row of sums, tokens x r of them; zeros unless `wanted`.
    SUBSPAN_DEVICE void chunk_of(const Kept<T> *rows, int64_t index, bool wanted, L (&x)[RC]) const {
        const Kept<T> *row = rows + index * a.r + q * RC;
        if constexpr (sizeof(Kept<T>) == 4)
            if (a.r % RC == 0) { // whole vectors
                float4 v[2] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
                if (wanted && q * RC < a.r) {
                    v[0] = *reinterpret_cast<const float4 *>(row);
                    v[1] = *reinterpret_cast<const float4 *>(row + 4);
                }
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    x[4 * h] = v[h].x;
                    x[4 * h + 1] = v[h].y;
                    x[4 * h + 2] = v[h].z;
                    x[4 * h + 3] = v[h].w;
                }
                return;
            }
#pragma unroll
        for (int e = 0; e < RC; ++e) x[e] = wanted && q * RC + e < a.r ? L(row[e]) : L(0);
    }
    SUBSPAN_DEVICE L square(const L (&x)[RC]) const {
        L s = L(0);
#pragma unroll
        for (int e = 0; e < RC; ++e) s = fma(x[e], x[e], s); // NOLINT(clang-analyzer-core.CallAndMessage): read() fills all of x
        return sum_of<Lanes>(s);
    }
    SUBSPAN_DEVICE L dot(const L (&x)[RC], const L (&y)[RC]) const {
        L s = L(0);
#pragma unroll
        for (int e = 0; e < RC; ++e) s = fma(x[e], y[e], s);
        return sum_of<Lanes>(s);
    }

    /// This lane's chunk of token s of 16 bits, as it is.
    SUBSPAN_DEVICE void raw(float (&x)[RC], int64_t s) const {
        const T *row = a.z.at(sequence) + s * a.z.row_stride;
        const int first = q * RC;
        if (a.vectors && first + RC <= a.r) {
            const uint4 v = *reinterpret_cast<const uint4 *>(row + first);
            const uint32_t word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int p = 0; p < 4; ++p) {
                x[2 * p] = low_of<T>(word[p]);
                x[2 * p + 1] = high_of<T>(word[p]);
            }
        } else {
#pragma unroll
            for (int e = 0; e < RC; ++e) x[e] = first + e < a.r ? widen(row[int64_t(first + e) * a.z.col_stride]) : 0.0f;
        }
    }

    /// This lane's chunk of token s; zeros unless `wanted`. All lanes of a warp must come here together.
    SUBSPAN_DEVICE void load(Chunk<L> &w, int64_t s, bool wanted) const {
        const T *row = a.z.at(sequence) + (a.ring > 0 ? s % a.ring : s) * a.z.row_stride;
        int64_t step = a.z.col_stride;
        if constexpr (sizeof(T) != 2) { // 16 bits take the short way there, and need the registers
            if (const int64_t near = int64_t(index) + (s - t) - halo.begin; halo.rows != nullptr && near >= 0 && near < halo.count) {
                row = halo.rows + near * halo.pitch;
                step = 1;
            }
        }
        const int first = q * RC;
#pragma unroll
        for (int e = 0; e < RC; ++e) w.x[e] = L(0);
        if (wanted && a.rope == 0) {
            bool done = false;
            if constexpr (sizeof(T) == 2 && RC % 8 == 0) {
                if (a.vectors && first + RC <= a.r) {
#pragma unroll
                    for (int e = 0; e < RC; e += 8) {
                        const uint4 v = *reinterpret_cast<const uint4 *>(row + first + e);
                        const uint32_t word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                        for (int p = 0; p < 4; ++p) {
                            w.x[e + 2 * p] = low_of<T>(word[p]);
                            w.x[e + 2 * p + 1] = high_of<T>(word[p]);
                        }
                    }
                    done = true;
                }
            }
            if (!done)
#pragma unroll
                for (int e = 0; e < RC; ++e)
                    if (first + e < a.r) w.x[e] = L(widen(row[int64_t(first + e) * step]));
        } else if (wanted) {
            const int half = a.r / 2;
#pragma unroll
            for (int e = 0; e < RC; ++e) {
                const int i = first + e;
                if (i >= a.r) continue;
                const int pair = a.rope == 1 ? i / 2 : i % half;
                const bool second = a.rope == 1 ? i % 2 == 1 : i >= half;
                const int partner = a.rope == 1 ? i ^ 1 : (second ? i - half : i + half);
                const double *cs = a.rotations + 2 * ((s - a.rotations_from) * half + pair);
                const double x = double(widen(row[int64_t(i) * step])), y = double(widen(row[int64_t(partner) * step]));
                w.x[e] = L(second ? y * cs[1] + x * cs[0] : x * cs[0] - y * cs[1]);
            }
        }
        L top = L(0);
#pragma unroll
        for (int e = 0; e < RC; ++e) top = most(top, w.x[e] < L(0) ? -w.x[e] : w.x[e]);
        w.power = exponent_of(most_of<Lanes>(top));
        const L down = power_of_two<L>(-w.power);
#pragma unroll
        for (int e = 0; e < RC; ++e) w.x[e] *= down;
    }

    /// With this token as z (or `z`, `zz` of another one): the rejection of w, its length and its coefficients. `alpha` is the weight,
    /// `valid` whether the offset applies.
    SUBSPAN_DEVICE Pair<L> reject(const Chunk<L> &z, L zz, Chunk<L> &w, L alpha, bool valid) const {
        Pair<L> p;
        p.power = w.power;
        L s = dot(z.x, w.x);
        p.c = zz > L(0) ? s / zz : L(0);
        if (sizeof(L) == 8 && (p.c - L(1) < L(4e-16)) && (p.c - L(1) > L(-4e-16))) p.c = L(1); // equal tokens must vanish
        Chunk<L> y;
#pragma unroll
        for (int e = 0; e < RC; ++e) y.x[e] = fma(-p.c, z.x[e], w.x[e]);
        p.yy = square(y.x);
        // Where the angle is small, what is left along z, or lost to rounding, counts.
        const bool small = !(p.yy >= L(1e-2) * p.c * p.c * zz);
        if constexpr (sizeof(L) == 8) {
            const L zy = dot(z.x, y.x), c2 = zz > L(0) ? zy / zz : L(0); // all lanes take part in a sum
            if (small) {
#pragma unroll
                for (int e = 0; e < RC; ++e) y.x[e] = fma(-c2, z.x[e], y.x[e]);
                p.c += c2;
            }
            const L again = square(y.x);
            if (small) p.yy = again;
            if (p.yy <= L(1e-60) * (p.c * p.c * zz + p.yy)) p.yy = L(0);
        } else {
            if (warp_any(small)) in_double(z, w, y, p, small);
        }
        // What does not count is zero, whatever the token holds; NaN of one that does goes on.
        const bool none = p.yy <= L(0) || !valid;
#pragma unroll
        for (int e = 0; e < RC; ++e) w.x[e] = none ? L(0) : y.x[e];
        const Scale<L> f = scale(z.power + p.power, sqrt(zz * p.yy));
        p.g = valid ? f.f : L(0);
        p.k = alpha != L(0) ? a.sign * alpha * f.f : L(0);
        p.moves = a.norm == soft || (a.norm == clamp && f.above);
        return p;
    }

    /// What a wedge is multiplied with whose length is `length` 2^power.
    SUBSPAN_DEVICE Scale<L> scale(int power, L length) const {
        const L unit = power_of_two<L>(power), n = length * unit, eps = a.eps;
        L f = unit;
        const bool above = n > eps || (eps == L(0) && length > L(0));
        if (a.norm == clamp) f = above || !(n < Limits<L>::longest) ? L(1) / length : (eps > L(0) ? unit / eps : L(0));
        if (a.norm == soft) {
            f = eps > L(0) ? unit / sqrt(n * n + eps) : (length > L(0) ? L(1) / length : L(0));
            if (!(n < Limits<L>::longest)) f = L(1) / length;
        }
        return {f, above};
    }

    // The same in double for lanes whose angle is small; y is scaled up to where float sees it.
    SUBSPAN_DEVICE void in_double(const Chunk<L> &z, const Chunk<L> &w, Chunk<L> &y, Pair<L> &p, bool small) const {
        double zw = 0, zz = 0;
#pragma unroll
        for (int e = 0; e < RC; ++e) {
            zw = fma(double(z.x[e]), double(w.x[e]), zw);
            zz = fma(double(z.x[e]), double(z.x[e]), zz);
        }
        zw = sum_of<Lanes>(zw);
        zz = sum_of<Lanes>(zz);
        double c = zz > 0 ? zw / zz : 0.0;
        if (c - 1 < 4e-16 && c - 1 > -4e-16) c = 1;
        double left = 0, top = 0;
#pragma unroll
        for (int e = 0; e < RC; ++e) left = fma(double(z.x[e]), fma(-c, double(z.x[e]), double(w.x[e])), left);
        left = sum_of<Lanes>(left);
        const double c2 = zz > 0 ? left / zz : 0.0;
        double yy = 0;
#pragma unroll
        for (int e = 0; e < RC; ++e) {
            const double v = fma(-c2, double(z.x[e]), fma(-c, double(z.x[e]), double(w.x[e])));
            yy = fma(v, v, yy);
            top = most(top, v < 0 ? -v : v);
        }
        yy = sum_of<Lanes>(yy);
        top = most_of<Lanes>(top);
        const bool parallel = yy <= 1e-60 * (c * c * zz + yy);
        const int up = most(-120, exponent_of(top));
        if (!small) return;
        p.power += up;
        p.yy = L(0);
        const double by = double(power_of_two<float>(-up));
        p.c = L((c + c2) * by);
#pragma unroll
        for (int e = 0; e < RC; ++e) y.x[e] = parallel ? L(0) : L(fma(-c2, double(z.x[e]), fma(-c, double(z.x[e]), double(w.x[e]))) * by);
        if (!parallel) p.yy = L(yy * by * by);
    }

    /// u = Σ k y over the offsets, and the sum of the weights.
    SUBSPAN_DEVICE L gather(L (&u)[RC]) const {
        const L mean = mean_at(t);
        L sum = L(0);
#pragma unroll
        for (int e = 0; e < RC; ++e) u[e] = L(0);
        uint64_t rest = 0; // the offsets that the short way does not take, the same in a warp
        static_assert(kOffsets <= 64);
        {
            const L inverse = this->inverse();
            L along = L(0);
            const bool all = all_count();
#pragma unroll 1
            for (int j = 0; j < a.m; ++j) {
                const bool valid = all || counts(t, j);
                const L alpha = all ? mean : weight(t, j, mean, valid);
                sum += alpha;
                if (!near_enough(j, valid, alpha, inverse, u, along)) rest |= uint64_t(1) << j;
            }
#pragma unroll
            for (int e = 0; e < RC; ++e) u[e] = fma(-along, z.x[e], u[e]);
        }
#pragma unroll 1
        for (; rest != 0; rest &= rest - 1) {
            const int j = lowest_bit(rest);
            const bool valid = counts(t, j);
            Chunk<L> w;
            load(w, t - a.offsets[j], valid);
            const Pair<L> p = reject(z, zz, w, weight(t, j, mean, valid), valid);
            // Parallel tokens have no wedge, even where k is infinite.
            const L k = p.yy <= L(0) ? L(0) : p.k;
#pragma unroll
            for (int e = 0; e < RC; ++e) u[e] = fma(k, w.x[e], u[e]);
        }
        return sum;
    }

    /// A token of the past and what its rejection is made of, without forming it: y = w - c z, |y|² = |w|² - (z·w)² / |z|².
    struct Near {
        float w[RC], c, yy, down; // down: 2^-power of w
    };
    /// Fills `n` for offset j if all tokens of the warp have rows of 16 bits in shared memory and no angle is small (two digits of float are lost
    /// at most); else false, for all of them.
    SUBSPAN_DEVICE bool near(int j, bool valid, L inverse, Near &n) const {
        if constexpr (sizeof(T) == 2) {
            if (halo.measures == nullptr) return false;
            const int other = int(index) - int(a.offsets[j]) - halo.begin; // valid offsets are shorter than a sequence
            const bool there = valid && other >= 0 && other < halo.count;
            const typename Halo<T>::Measure m = there ? halo.measures[other] : typename Halo<T>::Measure{1.0f, 0.0f};
            uint4 v{0, 0, 0, 0};
            if (there && q * RC < halo.pitch) v = *reinterpret_cast<const uint4 *>(halo.rows + other * halo.pitch + q * RC);
            const uint32_t word[4] = {v.x, v.y, v.z, v.w};
            float s = 0.0f;
#pragma unroll
            for (int e = 0; e < RC; ++e) {
                n.w[e] = m.down * (e % 2 == 0 ? low_of<T>(word[e / 2]) : high_of<T>(word[e / 2]));
                s = fma(z.x[e], n.w[e], s);
            }
            s = sum_of<Lanes>(s);
            n.c = s * inverse;
            n.yy = fma(-s, n.c, m.ww);
            n.down = m.down;
            return !warp_any(valid && (!there || !(n.yy >= 1e-2f * m.ww)));
        } else {
            return false;
        }
    }
    SUBSPAN_DEVICE Scale<L> scale(const Near &n) const { return scale(z.power + 127 - int(float_to_bits(n.down) >> 23), sqrt(zz * n.yy)); }
    /// Whether all offsets count at all tokens of the warp, which is so nearly everywhere.
    SUBSPAN_DEVICE bool all_count() const { return !warp_any(a.alpha != nullptr || !in || t < a.back || t >= a.length - a.ahead); }
    SUBSPAN_DEVICE L inverse() const { return zz > L(0) ? L(1) / zz : L(0); }

  private:
    // One offset of gather() the short way; Σ k c is taken off z at the end.
    SUBSPAN_DEVICE bool near_enough(int j, bool valid, L alpha, L inverse, L (&u)[RC], L &along) const {
        Near n{}; // without a value it spills
        if (!near(j, valid, inverse, n)) return false;
        if constexpr (sizeof(T) == 2) {
            const float k = n.yy > 0.0f && alpha != 0.0f ? a.sign * alpha * scale(n).f : 0.0f;
            along = k == 0.0f ? along : fma(k, n.c, along);
#pragma unroll
            for (int e = 0; e < RC; ++e) u[e] = fma(k, n.w[e], u[e]);
        }
        return true;
    }
};

/// The gradient at this token's role as z, or at another's: T = k du - e zz y for what was w, and -c T - (e yy) z for z.
template <class L> struct Flow {
    L y, e;
};
template <class L> SUBSPAN_DEVICE Flow<L> flow(const Pair<L> &p, L inner) {
    Flow<L> f;
    f.y = p.g * inner;
    f.e = p.moves ? p.k * f.y * p.g : L(0);
    return f;
}

/// Checks a call; throws ValueError.
void check(const MixInput &in, const MixOptions &o);

/// Positions that the table of rotations covers: [from, from + count).
struct Positions {
    int64_t from, count;
};
Positions positions_of(const MixInput &in, const MixOptions &o);
inline int64_t tokens_of(const MixInput &in) { return in.z.size() * (in.ring > 0 ? 1 : in.z.rows); }
inline int pairs_of(int64_t r) { return int(r * (r - 1) / 2); }

/// The arguments of the kernels; fills the table of rotations and the weights, in workspace, where there are any.
template <class T> Arguments<T> prepare(const Session &s, const MixInput &in, const MixOptions &o, Workspace &work);
/// Bytes of workspace that prepare() takes.
int64_t prepare_room(const MixInput &in, const MixOptions &o);

/// f(integral constant): the lanes of a token of r dimensions.
template <class F> void with_lanes(int64_t r, F &&f) {
    if (r <= 4 * kChunk)
        f(std::integral_constant<int, 4>{});
    else
        f(std::integral_constant<int, 8>{});
}

} // namespace subspan::cuda::plucker
