// A row is read once, transformed in the nearest cache and written once. The power of two goes first, along contiguous
// memory: stages within a vector by shuffles, the others four at a time in registers; the base matrix then combines m
// pieces of 2^p entries each, which are vectors again.
#include "subspan/hadamard.hpp"

#include "base/blocking.hpp"
#include "base/amax.hpp"
#include "base/scratch.hpp"
#include "base/simd.hpp"
#include "subspan/errors.hpp"
#include "subspan/orthonormalize.hpp"
#include "subspan/parallel.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

namespace subspan {
namespace {

using simd::Vec;
using std::int64_t;

// Legendre symbols: 1 for squares mod the prime q, -1 for the others, 0 for zero.
int legendre(int x, int q) {
    x = ((x % q) + q) % q;
    if (x == 0) return 0;
    for (int i = 1; i < q; ++i)
        if (i * i % q == x) return 1;
    return -1;
}

// Signs of the base matrix, row-major.
std::vector<signed char> base_signs(int m) {
    std::vector<signed char> h(std::size_t(m) * std::size_t(m), 1);
    const auto at = [&](int i, int j) -> signed char & { return h[std::size_t(i) * std::size_t(m) + std::size_t(j)]; };
    if (m == 12 || m == 20) { // I + S, S skew: a border of ones and the symbols of i - j
        const int q = m - 1;
        for (int i = 0; i < m; ++i)
            for (int j = 0; j < m; ++j) {
                int s = i == j ? 1 : 0;
                if (i != j) s = i == 0 ? 1 : j == 0 ? -1 : legendre(i - j, q);
                at(i, j) = static_cast<signed char>(s);
            }
    } else if (m == 28) { // C ⊗ [1 1; 1 -1] + I ⊗ [1 -1; -1 -1] with the symmetric conference matrix C of order 14
        const int q = 13;
        for (int i = 0; i < m; ++i)
            for (int j = 0; j < m; ++j) {
                const int a = i / 2, b = j / 2, x = i % 2, y = j % 2;
                int s;
                if (a == b) {
                    s = x == 0 && y == 0 ? 1 : -1;
                } else {
                    const int c = a == 0 || b == 0 ? 1 : legendre(a - b, q);
                    s = c * (x == 1 && y == 1 ? -1 : 1);
                }
                at(i, j) = static_cast<signed char>(s);
            }
    }
    return h;
}

const std::vector<signed char> &base_matrix(int64_t m) {
    static const auto h12 = base_signs(12), h20 = base_signs(20), h28 = base_signs(28);
    return m == 12 ? h12 : m == 20 ? h20 : h28;
}

template <class T> struct RowArgs {
    const T *x;
    int64_t step; // between entries of x
    T *out;
    int64_t out_step;
    int64_t n, m;
    T scale;
    bool transpose;
    T *work, *other; // n items each
};

template <class T> struct RowKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(const RowArgs<T> *g) {
        using V = Vec<T, Bytes>;
        constexpr int W = V::lanes;
        const int64_t n = g->n, m = g->m, p2 = n / m;
        T *w = g->work;
        const T *x = g->x;
        if (g->step != 1) {
            for (int64_t i = 0; i < n; ++i) w[i] = x[i * g->step];
            x = w;
        }
        if (p2 >= 32 * W && p2 * int64_t(sizeof(T)) <= blocking().part && m == 1 && g->out_step == 1) {
            // The common case in as many sweeps as it has factors of 16: the first one reads x, the last one writes out.
            first_pass<Bytes>(x, w, g->out, n, g->scale);
            int64_t h = 16 * W;
            for (; 16 * h < n; h *= 16) pass<Bytes, 16>(w, w, h, n);
            last_pass<Bytes>(w, g->out, h, n);
            return;
        }
        // Scaled before anything is added: sums of the orthogonal transform do not overflow where its result does not.
        for (int64_t i = 0; i < n; ++i) w[i] = g->scale * x[i];
        if (p2 >= W) {
            for (int64_t b = 0; b < n; b += W) V::store(w + b, within<Bytes>(V::load(w + b)));
            for (int64_t piece = 0; piece < n; piece += p2) stages<Bytes>(w + piece, W, p2);
        } else {
            for (int64_t piece = 0; piece < n; piece += p2)
                for (int64_t h = 1; h < p2; h *= 2)
                    for (int64_t i = 0; i < p2; i += 2 * h)
                        for (int64_t j = piece + i; j < piece + i + h; ++j) {
                            const T a = w[j], b = w[j + h];
                            w[j] = a + b;
                            w[j + h] = a - b;
                        }
        }
        if (m > 1) {
            combine<Bytes>(*g, w, g->other, p2);
            w = g->other;
        }
        if (g->out_step == 1) {
            int64_t i = 0;
            for (; i + W <= n; i += W) V::store(g->out + i, V::load(w + i));
            for (; i < n; ++i) g->out[i] = w[i];
        } else {
            for (int64_t i = 0; i < n; ++i) g->out[i * g->out_step] = w[i];
        }
    }
#ifdef SUBSPAN_SHUFFLE
    template <int Bytes, int D, int... I>
    static SUBSPAN_INLINE typename Vec<T, Bytes>::type stage(typename Vec<T, Bytes>::type v, std::integer_sequence<int, I...>) {
        const typename Vec<T, Bytes>::type sign = {((I & D) ? T(-1) : T(1))...};
        return sign * v + __builtin_shufflevector(v, v, (I ^ D)...);
    }
#endif
    // Butterflies at distances below N within a vector.
    template <int Bytes, int N = Vec<T, Bytes>::lanes, int D = 1> static SUBSPAN_INLINE typename Vec<T, Bytes>::type within(typename Vec<T, Bytes>::type v) {
#ifdef SUBSPAN_SHUFFLE
        if constexpr (D >= N)
            return v;
        else
            return within<Bytes, N, 2 * D>(stage<Bytes, D>(v, std::make_integer_sequence<int, Vec<T, Bytes>::lanes>{}));
#else
        using V = Vec<T, Bytes>;
        T x[V::lanes];
        V::store(x, v);
        for (int h = 1; h < N; h *= 2)
            for (int i = 0; i < V::lanes; i += 2 * h)
                for (int j = i; j < i + h; ++j) {
                    const T a = x[j], b = x[j + h];
                    x[j] = a + b;
                    x[j + h] = a - b;
                }
        return V::load(x);
#endif
    }

    // Butterflies at distances h, 2h, ... below n: 16 vectors in registers take four stages in one pass. Passes over
    // more than a few thousand entries would leave the first-level cache, so halves are finished first.
    template <int Bytes> static SUBSPAN_INLINE void stages(T *w, int64_t h, int64_t n) {
        const int64_t near = std::min(n, blocking().near / int64_t(sizeof(T)));
        for (int64_t b = 0; b < n; b += near) passes<Bytes>(w + b, h, near);
        passes<Bytes>(w, near, n);
    }
    template <int Bytes> static SUBSPAN_INLINE void passes(T *w, int64_t h, int64_t n) {
        for (; 16 * h <= n; h *= 16) pass<Bytes, 16>(w, w, h, n);
        if (8 * h <= n)
            pass<Bytes, 8>(w, w, h, n);
        else if (4 * h <= n)
            pass<Bytes, 4>(w, w, h, n);
        else if (2 * h <= n)
            pass<Bytes, 2>(w, w, h, n);
    }
    template <int Bytes> static SUBSPAN_INLINE void last_pass(const T *w, T *out, int64_t h, int64_t n) {
        if (16 * h == n)
            pass<Bytes, 16>(w, out, h, n);
        else if (8 * h == n)
            pass<Bytes, 8>(w, out, h, n);
        else if (4 * h == n)
            pass<Bytes, 4>(w, out, h, n);
        else
            pass<Bytes, 2>(w, out, h, n);
    }
    template <int Bytes, int R> static SUBSPAN_INLINE void butterflies(typename Vec<T, Bytes>::type (&v)[R]) {
#pragma GCC unroll 4
        for (int d = 1; d < R; d *= 2)
#pragma GCC unroll 16
            for (int i = 0; i < R; ++i)
                if ((i & d) == 0) {
                    const auto a = v[i], c = v[i + d];
                    v[i] = a + c;
                    v[i + d] = T(-1) * c + a;
                }
    }
    // Stages within vectors and the next four, from x to w.
    template <int Bytes> static SUBSPAN_INLINE void first_pass(const T *x, T *w, const T *out, int64_t n, T scale) {
        using V = Vec<T, Bytes>;
        constexpr int W = V::lanes;
        for (int64_t b = 0; b < n; b += 16 * W) {
            typename V::type v[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) {
                v[i] = within<Bytes>(scale * V::load(x + b + i * W));
                simd::prefetch(reinterpret_cast<const char *>(x + b + i * W) + kAheadOfRow);
                simd::prefetch_write(out + b + i * W); // the last pass writes it
            }
            butterflies<Bytes, 16>(v);
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) V::store(w + b + i * W, v[i]);
        }
    }

    template <int Bytes, int R> static SUBSPAN_INLINE void pass(const T *w, T *out, int64_t h, int64_t n) {
        using V = Vec<T, Bytes>;
        constexpr int W = V::lanes;
        for (int64_t b = 0; b < n; b += R * h)
            for (int64_t j = b; j < b + h; j += W) {
                typename V::type v[R];
#pragma GCC unroll 16
                for (int i = 0; i < R; ++i) v[i] = V::load(w + j + i * h);
                butterflies<Bytes, R>(v);
#pragma GCC unroll 16
                for (int i = 0; i < R; ++i) V::store(out + j + i * h, v[i]);
            }
    }
    // out piece i = Σ_j ± piece j.
    template <int Bytes> static SUBSPAN_INLINE void combine(const RowArgs<T> &g, const T *w, T *out, int64_t p2) {
        using V = Vec<T, Bytes>;
        constexpr int W = V::lanes, kRows = 4; // m is a multiple of four
        const int64_t m = g.m;
        const signed char *signs = base_matrix(m).data();
        alignas(64) T s[28 * 28];
        for (int64_t i = 0; i < m; ++i)
            for (int64_t j = 0; j < m; ++j) s[i * m + j] = T(g.transpose ? signs[j * m + i] : signs[i * m + j]);
        int64_t c = 0;
        for (; c + W <= p2; c += W)
            for (int64_t i = 0; i < m; i += kRows) {
                typename V::type a[kRows];
                for (int r = 0; r < kRows; ++r) a[r] = typename V::type{};
                for (int64_t j = 0; j < m; ++j) {
                    const auto x = V::load(w + j * p2 + c);
#pragma GCC unroll 4
                    for (int r = 0; r < kRows; ++r) a[r] += s[(i + r) * m + j] * x;
                }
                for (int r = 0; r < kRows; ++r) V::store(out + (i + r) * p2 + c, a[r]);
            }
        for (; c < p2; ++c)
            for (int64_t i = 0; i < m; ++i) {
                T a = T(0);
                for (int64_t j = 0; j < m; ++j) a += s[i * m + j] * w[j * p2 + c];
                out[i * p2 + c] = a;
            }
    }
};

// Rows of a power of two of entries, up to 16 vectors, one after the other: as many as fit share a vector, and nothing leaves
// the registers between reading and writing.
template <class T> struct ShortKernel {
    using Long = RowKernel<T>;

    // Rows of N <= W entries.
    template <int Bytes, int N> static SUBSPAN_INLINE void shared(const T *x, T *out, int64_t count, T scale, T *poison) {
        using V = Vec<T, Bytes>;
        constexpr int W = V::lanes;
        typename V::type bad{};
        int64_t i = 0;
        for (; i + W <= count; i += W) {
            const auto v = Long::template within<Bytes, N>(scale * V::load(x + i));
            bad += v + T(-1) * v;
            V::store(out + i, v);
        }
        if (i < count) {
            alignas(64) T tail[W] = {};
            for (int64_t j = i; j < count; ++j) tail[j - i] = x[j];
            const auto v = Long::template within<Bytes, N>(scale * V::load(tail));
            bad += v + T(-1) * v;
            V::store(tail, v);
            for (int64_t j = i; j < count; ++j) out[j] = tail[j - i];
        }
        *poison += V::sum(bad);
    }
    // Rows of R vectors.
    template <int Bytes, int R> static SUBSPAN_INLINE void whole(const T *x, T *out, int64_t count, T scale, T *poison) {
        using V = Vec<T, Bytes>;
        constexpr int W = V::lanes;
        typename V::type bad{};
        for (int64_t b = 0; b < count; b += R * W) {
            typename V::type v[R];
#pragma GCC unroll 16
            for (int i = 0; i < R; ++i) v[i] = Long::template within<Bytes>(scale * V::load(x + b + i * W));
            Long::template butterflies<Bytes, R>(v);
            bad += v[0] + T(-1) * v[0];
#pragma GCC unroll 16
            for (int i = 0; i < R; ++i) V::store(out + b + i * W, v[i]);
        }
        *poison += V::sum(bad);
    }
    template <int Bytes> static SUBSPAN_INLINE void run(const T *x, T *out, int64_t n, int64_t count, T scale, T *poison) {
        constexpr int W = Vec<T, Bytes>::lanes;
        switch (n) {
        case 1: return shared<Bytes, 1>(x, out, count, scale, poison);
        case 2: return shared<Bytes, 2>(x, out, count, scale, poison);
        case 4:
            if constexpr (W >= 4) return shared<Bytes, 4>(x, out, count, scale, poison);
            break;
        case 8:
            if constexpr (W >= 8) return shared<Bytes, 8>(x, out, count, scale, poison);
            break;
        case 16:
            if constexpr (W >= 16) return shared<Bytes, 16>(x, out, count, scale, poison);
            break;
        default: break;
        }
        if (n == 2 * W) return whole<Bytes, 2>(x, out, count, scale, poison);
        if (n == 4 * W) return whole<Bytes, 4>(x, out, count, scale, poison);
        if (n == 8 * W) return whole<Bytes, 8>(x, out, count, scale, poison);
        whole<Bytes, 16>(x, out, count, scale, poison);
    }
};

} // namespace

int64_t hadamard_base(int64_t n) {
    if (n < 1) return 0;
    for (const int64_t m : {1, 12, 20, 28}) {
        if (n % m != 0) continue;
        const int64_t p = n / m;
        if ((p & (p - 1)) == 0) return m;
    }
    return 0;
}

template <class T> void hadamard(const StackView<const T> &x, const StackView<T> &out, T scale, bool transpose, bool check) {
    const int64_t rows = x.rows(), n = x.cols(), items = x.size();
    if (rows == 0 || items == 0) return;
    const int64_t m = hadamard_base(n);
    if (m == 0)
        throw ValueError("the last axis of x has " + std::to_string(n) + " entries; Hadamard matrices are known here for 2^p m with m = 1, 12, 20, 28 or 40");
    // The first entry of a transform is the sum of all: it shows whatever is not finite, for free. In place that would
    // be too late.
    const bool in_place = x.first.data == out.first.data;
    if (check && in_place && !all_finite<T>(x)) throw ValueError("x holds NaN or infinity");
    std::atomic<bool> good{true};
    const auto joined = [&](const auto &s) { return (s.first.col_stride == 1 || n == 1) && (s.first.row_stride == n || rows == 1); };
    const bool together = m == 1 && n <= 16 * (simd::tile<T>().nr / 3) && joined(x) && joined(out);
    const int64_t group = std::max<int64_t>(1, 65536 / n), groups = (rows + group - 1) / group;
    const auto run = [&](int64_t t) {
        const auto xi = x[t / groups];
        const auto oi = out[t / groups];
        const int64_t first = t % groups * group;
        if (together) {
            T poison = 0; // x - x is zero or NaN
            const int64_t some = (std::min(rows, first + group) - first) * n;
            simd::dispatch<ShortKernel<T>, const T *, T *, int64_t, int64_t, T, T *>(xi.data + first * n, oi.data + first * n, n, some, scale, &poison);
            if (check && poison != T(0)) good.store(false, std::memory_order_relaxed);
            return;
        }
        Frame frame;
        T *work = frame.take<T>(n), *other = m > 1 ? frame.take<T>(n) : nullptr;
        for (int64_t r = first; r < std::min(rows, first + group); ++r) {
            const RowArgs<T> args{xi.data + r * xi.row_stride, xi.col_stride, oi.data + r * oi.row_stride, oi.col_stride, n, m, scale, transpose, work, other};
            simd::dispatch<RowKernel<T>>(&args);
            if (check && !std::isfinite(oi(r, 0))) good.store(false, std::memory_order_relaxed);
        }
    };
    const int64_t tasks = items * groups;
    if (tasks == 1)
        run(0);
    else
        parallel_for(tasks, run);
    if (!good) throw ValueError("x holds NaN or infinity, or sums of its entries overflow");
}

template void hadamard<float>(const StackView<const float> &, const StackView<float> &, float, bool, bool);
template void hadamard<double>(const StackView<const double> &, const StackView<double> &, double, bool, bool);

} // namespace subspan
