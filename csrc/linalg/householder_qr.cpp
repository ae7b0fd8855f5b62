// Householder QR. A panel of a few vectors' width is factored in a copy with contiguous rows: for column j one sweep
// over the rows gives, with xᵀA, the length of the column, the products with all later columns and, from the columns
// that are reflections already, the column of S that T needs. The sweep that applies reflection j collects those sums
// for j + 1. Wider matrices halve recursively (Elmroth and Gustavson, IBM J. Res. Dev. 44, 2000) down to such panels,
// with blocks of 128 reflections applied to what is right of them.
#include "subspan/householder_qr.hpp"

#include "linalg/column_qr.hpp"
#include "linalg/reflect_columns.hpp"
#include "linalg/narrow.hpp"
#include "linalg/packed_gram.hpp"
#include "linalg/packing.hpp"
#include "base/amax.hpp"
#include "base/scratch.hpp"
#include "base/stacks.hpp"
#include "base/simd.hpp"
#include "subspan/errors.hpp"
#include "subspan/parallel.hpp"
#include "linalg/wy.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <limits>
#include <utility>

namespace subspan {
namespace {

using simd::Vec;
using std::int64_t;

// A panel in place: rows of ld = NVC vectors, w columns. R ends on and above the diagonal, V below it.
template <class T> struct PanelArgs {
    T *p;
    int64_t m, w;
    T *tau;
    T *t; // w x w, row stride ldt, upper triangular
    int64_t ldt;
};

template <class T, int Bytes, int NVC> struct PanelFactor {
    using V = Vec<T, Bytes>;
    using VT = typename V::type;
    static constexpr int W = V::lanes, LD = NVC * W;
    static constexpr int64_t kChunk = 256; // rows whose squares are summed in T

    struct Sums {
        alignas(64) T row[LD]; // xᵀA over the rows below the diagonal
        double square;         // xᵀx
    };

    static SUBSPAN_INLINE void zero(VT (&a)[NVC]) {
#pragma GCC unroll 4
        for (int q = 0; q < NVC; ++q) a[q] = VT{};
    }
    // sums += a, the partial sums of one chunk.
    static SUBSPAN_INLINE void collect(const VT (&a)[NVC], Sums &s, int64_t j) {
        alignas(64) T part[LD];
#pragma GCC unroll 4
        for (int q = 0; q < NVC; ++q) {
            V::store(part + q * W, a[q]);
            V::store(s.row + q * W, V::load(s.row + q * W) + a[q]);
        }
        s.square += double(part[j]);
    }
    static SUBSPAN_INLINE void reset(Sums &s) {
#pragma GCC unroll 4
        for (int q = 0; q < NVC; ++q) V::store(s.row + q * W, VT{});
        s.square = 0;
    }
    // Sums of column j over rows [first, m).
    static SUBSPAN_INLINE void sweep(const T *p, int64_t first, int64_t m, int64_t j, Sums &s) {
        reset(s);
        for (int64_t c = first; c < m; c += kChunk) {
            VT a[NVC], b[NVC];
            zero(a);
            zero(b);
            const int64_t end = std::min(m, c + kChunk);
            int64_t i = c;
            for (; i + 2 <= end; i += 2) {
                const T *r0 = p + i * LD, *r1 = r0 + LD;
                const T x0 = r0[j], x1 = r1[j];
#pragma GCC unroll 4
                for (int q = 0; q < NVC; ++q) {
                    a[q] += x0 * V::load(r0 + q * W);
                    b[q] += x1 * V::load(r1 + q * W);
                }
            }
            for (; i < end; ++i) {
                const T *r = p + i * LD;
                const T x = r[j];
#pragma GCC unroll 4
                for (int q = 0; q < NVC; ++q) a[q] += x * V::load(r + q * W);
            }
#pragma GCC unroll 4
            for (int q = 0; q < NVC; ++q) a[q] += b[q];
            collect(a, s, j);
        }
    }
    // Rows [first, m): A <- A keep - (x scale) f, and the sums of column j + 1 on the way (rows after the first).
    static SUBSPAN_INLINE void apply(T *p, int64_t first, int64_t m, int64_t j, T scale, const T *keep, const T *f, Sums &s) {
        VT k[NVC], g[NVC];
#pragma GCC unroll 4
        for (int q = 0; q < NVC; ++q) {
            k[q] = V::load(keep + q * W);
            g[q] = scale * V::load(f + q * W);
        }
        const auto row = [&](T *r, VT(&y)[NVC]) SUBSPAN_LAMBDA_INLINE {
            const T x = r[j];
#pragma GCC unroll 4
            for (int q = 0; q < NVC; ++q) {
                y[q] = V::load(r + q * W) * k[q];
                y[q] -= x * g[q];
                V::store(r + q * W, y[q]);
            }
        };
        reset(s);
        if (first >= m) return;
        VT y[NVC], z[NVC];
        row(p + first * LD, y);
        const int64_t next = j + 1 < LD ? j + 1 : j;
        for (int64_t c = first + 1; c < m; c += kChunk) {
            VT a[NVC], b[NVC];
            zero(a);
            zero(b);
            const int64_t end = std::min(m, c + kChunk);
            int64_t i = c;
            for (; i + 2 <= end; i += 2) {
                T *r0 = p + i * LD, *r1 = r0 + LD;
                row(r0, y);
                row(r1, z);
                const T x0 = r0[next], x1 = r1[next];
#pragma GCC unroll 4
                for (int q = 0; q < NVC; ++q) {
                    a[q] += x0 * y[q];
                    b[q] += x1 * z[q];
                }
            }
            for (; i < end; ++i) {
                T *r = p + i * LD;
                row(r, y);
                const T x = r[next];
#pragma GCC unroll 4
                for (int q = 0; q < NVC; ++q) a[q] += x * y[q];
            }
#pragma GCC unroll 4
            for (int q = 0; q < NVC; ++q) a[q] += b[q];
            collect(a, s, next);
        }
    }

    // One panel on its way: between two steps nothing of it is in registers, so that two panels can take turns.
    struct Work {
        T *p, *tau;
        alignas(64) T tt[LD * LD]; // Tᵀ by rows, padded
        Sums s;
    };
    // Windows into these give "lane above j" and "lane j".
    static constexpr auto kAbove = [] {
        std::array<T, 2 * LD> x{};
        for (int i = LD; i < 2 * LD; ++i) x[std::size_t(i)] = T(1);
        return x;
    }();
    static constexpr auto kOnly = [] {
        std::array<T, 2 * LD> x{};
        x[LD - 1] = T(1);
        return x;
    }();

    static SUBSPAN_INLINE void start(Work &k, int64_t m) { sweep(k.p, 1, m, 0, k.s); }
    static SUBSPAN_INLINE void step(Work &k, int64_t m, int64_t j) {
        T *p = k.p;
        Sums &s = k.s;
        alignas(64) T wv[LD], keep[LD], f[LD];
        T *pj = p + j * LD;
        const T alpha = pj[j];
        T scale = T(0), tau = T(0);
        // Far below or above one, squares have lost digits: the column is then measured in double and scaled.
        constexpr double low = double(std::numeric_limits<T>::min()) / (double(std::numeric_limits<T>::epsilon()) * double(std::numeric_limits<T>::epsilon()));
        constexpr double high = double(std::numeric_limits<T>::max()) * 1e-6;
        constexpr T tall = T(sizeof(T) == 4 ? 1e15 : 1e145);
        if (s.square > low && s.square < high && std::abs(alpha) < tall) {
            // In T: this chain of a root and two quotients is what a small panel waits for.
            const T norm = std::sqrt(alpha * alpha + T(s.square)), beta = alpha > T(0) ? -norm : norm;
            tau = (beta - alpha) / beta;
            scale = T(1) / (alpha - beta);
            pj[j] = beta;
        } else {
            double below = 0, sum = 0;
            for (int64_t i = j + 1; i < m; ++i) below = std::max(below, std::abs(double(p[i * LD + j])));
            if (below > 0) {
                const double top = std::max(below, std::abs(double(alpha)));
                const double a = double(alpha) / top;
                for (int64_t i = j + 1; i < m; ++i) sum += (double(p[i * LD + j]) / top) * (double(p[i * LD + j]) / top);
                const double norm = std::sqrt(a * a + sum), beta = a > 0 ? -norm : norm;
                tau = T((beta - a) / beta);
                for (int64_t i = j + 1; i < m; ++i) p[i * LD + j] = T(double(p[i * LD + j]) / top / (a - beta));
                sweep(p, j + 1, m, j, s);
                pj[j] = T(beta * top);
                scale = T(1); // the column is v already
            }
        }
        k.tau[j] = tau;
        const T beta = pj[j];
#pragma GCC unroll 4
        for (int q = 0; q < NVC; ++q) {
            const VT w = V::load(pj + q * W) + scale * V::load(s.row + q * W);
            const VT only = V::load(kOnly.data() + LD - 1 - j + q * W);
            V::store(wv + q * W, w);
            V::store(f + q * W, (tau * V::load(kAbove.data() + LD - 1 - j + q * W)) * w);
            V::store(keep + q * W, (T(-1) * only - T(-1)) + scale * only);
        }
        // Row j of Tᵀ: -tau Σ S_cj (row c of Tᵀ); S_cj = v_cᵀ v_j is what the sweep left in lanes below j.
        VT t[NVC];
        zero(t);
        for (int64_t c = 0; c < j; ++c) {
            const T x = -tau * wv[c];
#pragma GCC unroll 4
            for (int q = 0; q < NVC; ++q) t[q] += x * V::load(k.tt + c * LD + q * W);
        }
#pragma GCC unroll 4
        for (int q = 0; q < NVC; ++q) V::store(k.tt + j * LD + q * W, t[q]);
        k.tt[j * LD + j] = tau; // what is right of it stays zero: all rows before are zero there
#pragma GCC unroll 4
        for (int q = 0; q < NVC; ++q) V::store(pj + q * W, V::load(pj + q * W) + T(-1) * V::load(f + q * W));
        pj[j] = beta;
        apply(p, j + 1, m, j, scale, keep, f, s);
    }
    static SUBSPAN_INLINE void finish(const Work &k, int64_t steps, T *t, int64_t ldt) {
        if constexpr (NVC == 1) {
            if (steps == W) return simd::Transpose<T, Bytes>::block(k.tt, LD, nullptr, nullptr, t, ldt);
        }
        for (int64_t i = 0; i < steps; ++i)
            for (int64_t j = 0; j < steps; ++j) t[i * ldt + j] = j >= i ? k.tt[j * LD + i] : T(0);
    }
    static SUBSPAN_INLINE void run(PanelArgs<T> *args) {
        const int64_t steps = std::min(args->m, args->w);
        Work k;
        k.p = args->p;
        k.tau = args->tau;
        start(k, args->m);
        for (int64_t j = 0; j < steps; ++j) step(k, args->m, j);
        finish(k, steps, args->t, args->ldt);
    }
};

template <class T> struct PanelKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(PanelArgs<T> *args) {
        constexpr int W = Vec<T, Bytes>::lanes;
        if (args->w <= W)
            PanelFactor<T, Bytes, 1>::run(args);
        else if (args->w <= 2 * W)
            PanelFactor<T, Bytes, 2>::run(args);
        else
            PanelFactor<T, Bytes, 4>::run(args);
    }
};

template <class T> int64_t vector_lanes() { return simd::tile<T>().nr / 3; }
template <class T> int64_t panel_width() { return std::min<int64_t>(4 * vector_lanes<T>(), 32); }
template <class T> int64_t panel_stride(int64_t w) {
    const int64_t lanes = vector_lanes<T>();
    return w <= lanes ? lanes : w <= 2 * lanes ? 2 * lanes : 4 * lanes;
}

template <class T> class Factorisation {
  public:
    Factorisation(MatrixView<T> v, MatrixView<T> r, T *tau, MatrixView<T> t) : v_(v), r_(r), tau_(tau), t_(t) {}

    void run() {
        const int64_t k = v_.cols, n = r_.cols;
        for (int64_t i = 0; i < t_.rows; ++i) std::fill_n(&t_(i, 0), t_.cols, T(0));
        for (int64_t b = 0; b < k; b += kReflectionBlock) {
            const int64_t w = std::min(kReflectionBlock, k - b), at = b + w;
            block(b, b, w);
            if (at < k) reflect(b, b, w, v_.block_rows(b, v_.rows - b).block_cols(at, k - at));
            if (n > k) reflect(b, b, w, r_.block_rows(b, k - b).block_cols(k, n - k));
        }
    }

  private:
    // T of columns [j, j + w) of the block that starts at b.
    MatrixView<T> triangle(int64_t b, int64_t j, int64_t w) const { return t_.block_rows(j, w).block_cols(j - b, w); }
    MatrixView<T> reflections(int64_t j, int64_t w) const { return v_.block_rows(j, v_.rows - j).block_cols(j, w); }
    void reflect(int64_t b, int64_t j, int64_t w, MatrixView<T> c) {
        Frame frame;
        T *m = frame.take<T>(w * w);
        const auto t = triangle(b, j, w);
        for (int64_t i = 0; i < w; ++i)
            for (int64_t l = 0; l < w; ++l) m[i * w + l] = -t(l, i);
        apply_core<T>(StackView<const T>(c), MatrixView<const T>(reflections(j, w)), Core<T>::full(MatrixView<const T>(m, w, w)), T(1), Side::left,
                      StackView<T>(c), false);
    }
    void block(int64_t b, int64_t j, int64_t w) {
        const int64_t width = panel_width<T>();
        if (w <= width) return panel(b, j, w);
        const int64_t h = (w / 2 + width - 1) / width * width, rest = w - h;
        block(b, j, h);
        reflect(b, j, h, v_.block_rows(j, v_.rows - j).block_cols(j + h, rest));
        block(b, j + h, rest);
        // T12 = -T1 (V1ᵀV2) T2; V2 is zero above its own first row.
        Frame frame;
        T *x = frame.take<T>(h * rest), *y = frame.take<T>(h * rest);
        const auto v1 = v_.block_rows(j + h, v_.rows - j - h).block_cols(j, h), v2 = reflections(j + h, rest);
        gemm<T>(MatrixView<const T>(v1).transposed(), v2, MatrixView<T>(x, h, rest));
        gemm<T>(triangle(b, j, h), MatrixView<const T>(x, h, rest), MatrixView<T>(y, h, rest));
        for (int64_t i = 0; i < h * rest; ++i) y[i] = -y[i];
        gemm<T>(MatrixView<const T>(y, h, rest), triangle(b, j + h, rest), t_.block_rows(j, h).block_cols(j + h - b, rest));
    }
    void panel(int64_t b, int64_t j, int64_t w) {
        const int64_t m = v_.rows, rows = m - j, ld = panel_stride<T>(w);
        Frame frame;
        T *p = frame.take<T>(rows * ld);
        for (int64_t i = 0; i < rows; ++i) {
            std::copy_n(&v_(j + i, j), w, p + i * ld);
            std::fill(p + i * ld + w, p + (i + 1) * ld, T(0));
        }
        const auto t = triangle(b, j, w);
        PanelArgs<T> args{p, rows, w, tau_ + j, t.data, t.row_stride};
        simd::dispatch<PanelKernel<T>>(&args);
        // R leaves the panel's columns, ones and zeros take its place.
        for (int64_t i = 0; i < j; ++i)
            for (int64_t c = j; c < j + w; ++c) {
                r_(i, c) = v_(i, c);
                v_(i, c) = T(0);
            }
        for (int64_t i = 0; i < w; ++i)
            for (int64_t c = 0; c < w; ++c) {
                r_(j + i, j + c) = c >= i ? p[i * ld + c] : T(0);
                v_(j + i, j + c) = c > i ? T(0) : c == i ? T(1) : p[i * ld + c];
            }
        for (int64_t i = w; i < rows; ++i) std::copy_n(p + i * ld, w, &v_(j + i, j));
        for (int64_t i = j + w; i < r_.rows; ++i) std::fill_n(&r_(i, j), w, T(0));
    }

    MatrixView<T> v_, r_;
    T *tau_;
    MatrixView<T> t_;
};

// Whole matrices of one panel: in, factored, out, in one kernel. Stacks of small matrices spend their time here. Two of
// them take turns: the root and the quotients of one are found while the rows of the other are updated.
template <class T> struct SmallArgs {
    struct One {
        MatrixView<const T> a;
        MatrixView<T> v, r, t;
        T *tau, *p;      // p: m rows of panel_stride
        const T *next = nullptr; // the matrix after this one, or null
        T scale = T(1);  // out: what A was multiplied by
        bool good = true; // out: false for NaN and infinity
    } one[2];
    int count;
};

template <class T> struct SmallKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(SmallArgs<T> *g) {
        constexpr int W = Vec<T, Bytes>::lanes;
        const int64_t w = g->one[0].a.cols;
        if (w <= W)
            all<Bytes, 1>(g);
        else if (w <= 2 * W)
            all<Bytes, 2>(g);
        else
            all<Bytes, 4>(g);
    }
    template <int Bytes, int NVC> static SUBSPAN_INLINE void all(SmallArgs<T> *g) {
        using Factor = PanelFactor<T, Bytes, NVC>;
        const int64_t m = g->one[0].a.rows, w = g->one[0].a.cols;
        typename Factor::Work k[2];
        for (int i = 0; i < g->count; ++i) {
            if (!in<Bytes, NVC>(g->one[i])) return;
            // What is written at the end and read next comes while the factorisation runs.
            for (int64_t r = 0; r < m; ++r) {
                simd::prefetch(g->one[i].v.data + r * g->one[i].v.row_stride);
                if (g->one[i].next != nullptr) simd::prefetch(g->one[i].next + r * g->one[i].a.row_stride);
            }
            for (int64_t r = 0; r < w; ++r) {
                simd::prefetch(g->one[i].r.data + r * g->one[i].r.row_stride);
                simd::prefetch(g->one[i].t.data + r * g->one[i].t.row_stride);
            }
            k[i].p = g->one[i].p;
            k[i].tau = g->one[i].tau;
            Factor::start(k[i], m);
        }
        for (int64_t j = 0; j < w; ++j)
            for (int i = 0; i < g->count; ++i) Factor::step(k[i], m, j);
        for (int i = 0; i < g->count; ++i) {
            Factor::finish(k[i], w, g->one[i].t.data, g->one[i].t.row_stride);
            out<Bytes, NVC>(g->one[i]);
        }
    }
    template <int Bytes, int NVC> static SUBSPAN_INLINE bool in(typename SmallArgs<T>::One &g) {
        using V = Vec<T, Bytes>;
        constexpr int W = V::lanes, LD = NVC * W;
        const int64_t m = g.a.rows, w = g.a.cols;
        if (g.a.col_stride == 1 && w == LD) {
            for (int64_t i = 0; i < m; ++i)
#pragma GCC unroll 4
                for (int q = 0; q < NVC; ++q) V::store(g.p + i * LD + q * W, V::load(g.a.data + i * g.a.row_stride + q * W));
        } else if (g.a.col_stride == 1) {
            const simd::NarrowRows<T, Bytes, NVC> rows(g.a);
            for (int64_t i = 0; i < m; ++i) {
                typename V::type x[NVC];
                rows.load(i, x);
#pragma GCC unroll 4
                for (int q = 0; q < NVC; ++q) V::store(g.p + i * LD + q * W, x[q]);
                for (int64_t j = w; j < LD; ++j) g.p[i * LD + j] = T(0); // whatever was read past the end
            }
        } else {
            for (int64_t i = 0; i < m; ++i)
                for (int64_t j = w; j < LD; ++j) g.p[i * LD + j] = T(0);
            copy_matrix<T>(g.a, MatrixView<T>(g.p, m, w, LD, 1));
        }
        const T top = max_abs_inline(g.p, m * LD);
        g.good = std::isfinite(top);
        g.scale = safe_scale(top);
        if (g.scale != T(1))
            for (int64_t i = 0; i < m * LD; ++i) g.p[i] *= g.scale;
        return g.good;
    }
    // Lanes from i on: a window into this.
    template <int LD>
    static constexpr auto kFrom = [] {
        std::array<T, 2 * LD> x{};
        for (int i = LD; i < 2 * LD; ++i) x[std::size_t(i)] = T(1);
        return x;
    }();
    template <int Bytes, int NVC> static SUBSPAN_INLINE void out(const typename SmallArgs<T>::One &g) {
        using V = Vec<T, Bytes>;
        constexpr int W = V::lanes, LD = NVC * W;
        const int64_t m = g.a.rows, w = g.a.cols;
        if (w == LD) {
            for (int64_t i = 0; i < m; ++i) {
                const T *from = g.p + i * LD;
                T *v = g.v.data + i * g.v.row_stride, *r = g.r.data + i * g.r.row_stride;
#pragma GCC unroll 4
                for (int q = 0; q < NVC; ++q) {
                    const auto x = V::load(from + q * W);
                    if (i >= w) {
                        V::store(v + q * W, x);
                        continue;
                    }
                    const auto upper = x * V::load(kFrom<LD>.data() + LD - i + q * W);
                    V::store(r + q * W, upper);
                    V::store(v + q * W, T(-1) * upper + x);
                }
                if (i < w) v[i] = T(1);
            }
            return;
        }
        for (int64_t i = 0; i < w; ++i)
            for (int64_t c = 0; c < w; ++c) {
                const T x = g.p[i * LD + c];
                g.r.data[i * g.r.row_stride + c] = c >= i ? x : T(0);
                g.v.data[i * g.v.row_stride + c] = c > i ? T(0) : c == i ? T(1) : x;
            }
        simd::copy_rows(g.p + w * LD, LD, g.v.data + w * g.v.row_stride, g.v.row_stride, m - w, w);
    }
};

template <class V> void require_triangles(const V &t, int64_t k) {
    if (t.rows() != k || t.cols() != std::min(k, kReflectionBlock))
        throw ValueError("T must be " + std::to_string(k) + " x " + std::to_string(std::min(k, kReflectionBlock)) + ", got " + std::to_string(t.rows()) +
                         " x " + std::to_string(t.cols()));
}

// Copies A in, times a power of two where squares of its entries would overflow or vanish. False for NaN or infinity.
template <class T> bool load(MatrixView<const T> a, MatrixView<T> v, MatrixView<T> r, T &scale) {
    const int64_t k = v.cols;
    T top = max_abs(a);
    if (!std::isfinite(top)) return false;
    for (int64_t i = 0; i < a.rows; ++i) {
        T *row = v.data + i * v.row_stride;
        const T *from = a.data + i * a.row_stride;
        if (a.col_stride == 1)
            std::copy_n(from, k, row);
        else
            for (int64_t j = 0; j < k; ++j) row[j] = from[j * a.col_stride];
        for (int64_t j = k; j < a.cols; ++j) r(i, j) = a(i, j);
    }
    scale = safe_scale(top);
    if (scale != T(1)) {
        for (int64_t i = 0; i < a.rows; ++i) {
            for (int64_t j = 0; j < k; ++j) v(i, j) *= scale;
            for (int64_t j = k; j < a.cols; ++j) r(i, j) *= scale;
        }
    }
    return true;
}

} // namespace

template <class T>
void householder_qr(const StackView<const T> &a, const StackView<T> &v, const StackView<T> &r, const StackView<T> &tau, const StackView<T> &t) {
    const int64_t items = a.size(), kk = std::min(a.rows(), a.cols());
    if (v.rows() != a.rows() || v.cols() != kk || r.rows() != kk || r.cols() != a.cols() || tau.cols() != kk)
        throw ValueError("householder_qr: V must be m x k, R k x n and tau 1 x k");
    require_triangles(t, kk);
    std::atomic<bool> good{true};
    const bool small = a.cols() <= panel_width<T>() && a.rows() >= a.cols() && a.cols() > 0;
    const auto unscale = [](MatrixView<T> ri, T scale) {
        if (scale == T(1)) return;
        for (int64_t p = 0; p < ri.rows; ++p)
            for (int64_t q = p; q < ri.cols; ++q) ri(p, q) /= scale;
    };
    if (a.empty()) return; // V, R, T and tau have no entries
    const auto bad = [&] { good.store(false, std::memory_order_relaxed); };
    const auto some = [&](int64_t begin, int64_t end) {
        if (!small) {
            for (int64_t i = begin; i < end; ++i) {
                poll();
                const auto ri = r[i];
                T scale = T(1);
                if (!load(a[i], v[i], ri, scale)) return bad();
                Factorisation<T>(v[i], ri, tau[i].data, t[i]).run();
                unscale(ri, scale);
            }
            return;
        }
        Frame frame;
        if (few_columns<T>(a.rows(), a.cols())) {
            ColumnQr<T> qr;
            qr.columns = frame.take<T>(column_qr_room<T>(a.rows(), a.cols()));
            for (int64_t i = begin; i < end; ++i) {
                qr.a = a[i];
                qr.v = v[i];
                qr.t = t[i];
                qr.tau = tau[i].data;
                column_qr(qr);
                if (!qr.good) return bad();
                const auto ri = r[i];
                for (int64_t p = 0; p < kk; ++p)
                    for (int64_t q = 0; q < kk; ++q) ri(p, q) = q >= p ? qr.r[p * kk + q] : T(0);
            }
            return;
        }
        const int64_t size = a.rows() * panel_stride<T>(a.cols());
        T *p = frame.take<T>(2 * size);
        for (int64_t i = begin; i < end; i += 2) {
            SmallArgs<T> args;
            args.count = int(std::min<int64_t>(2, end - i));
            for (int q = 0; q < args.count; ++q) {
                args.one[q].a = a[i + q];
                args.one[q].v = v[i + q];
                args.one[q].r = r[i + q];
                args.one[q].t = t[i + q];
                args.one[q].tau = tau[i + q].data;
                args.one[q].p = p + q * size;
                if (i + q + 2 < end) args.one[q].next = a[i + q + 2].data;
            }
            simd::dispatch<SmallKernel<T>>(&args);
            for (int q = 0; q < args.count; ++q) {
                if (!args.one[q].good) return bad();
                unscale(args.one[q].r, args.one[q].scale);
            }
        }
    };
    const double work = 2.0 * double(items) * double(a.rows()) * double(v.cols()) * double(a.cols());
    if (items == 1 || work < 4e6) {
        some(0, items);
    } else {
        // Even groups, so that the pairs do not depend on the number of threads.
        const int64_t group = std::max<int64_t>(2, int64_t(2e6 * double(items) / work) / 2 * 2);
        parallel_for((items + group - 1) / group, [&](int64_t g) { some(g * group, std::min(items, (g + 1) * group)); });
    }
    if (!good) throw ValueError("A holds NaN or infinity");
}

template <class T>
void factored_apply(const StackView<const T> &v, const StackView<const T> &t, const StackView<const T> &c, Side side, bool transpose, const StackView<T> &out,
                    bool check) {
    const int64_t m = v.rows(), k = v.cols(), items = c.size(), blocks = (k + kReflectionBlock - 1) / kReflectionBlock;
    require_triangles(t, k);
    if ((side == Side::left ? c.rows() : c.cols()) != m)
        throw ValueError("Q is " + std::to_string(m) + " x " + std::to_string(m) + " and C has " + std::to_string(side == Side::left ? c.rows() : c.cols()) +
                         (side == Side::left ? " rows" : " columns"));
    if (c.empty()) return;
    if (side == Side::right && !c.shape.empty() && shared(v) && shared(t)) { // one Q on the rows of all matrices
        auto cs = c;
        auto os = out;
        if (merge_axes(cs) && merge_axes(os))
            return factored_apply<T>(StackView<const T>(v.first), StackView<const T>(t.first), cs, side, transpose, os, check);
    }
    const bool ascending = (side == Side::left) == transpose;
    // A few vectors by their reflections; tau is the diagonal of T.
    const auto few = [&](const MatrixView<const T> &vi, const MatrixView<const T> &ti, const StackView<const T> &cs, const StackView<T> &os) {
        Frame frame;
        T *tau = frame.take<T>(k);
        for (int64_t j = 0; j < k; ++j) tau[j] = ti(j, j % kReflectionBlock);
        FewReflections<T> r;
        r.v = vi;
        r.tau = tau;
        r.ascending = ascending;
        r.trapezoid = true;
        return reflect_few(r, cs, side == Side::left, os, check);
    };
    if (k <= m && shared(v) && shared(t) && few(v.first, t.first, c, out)) return;
    if (blocks <= 1) {
        // -T of every matrix that T differs for; axes along which it is broadcast stay so.
        Frame frame;
        std::vector<int64_t> strides(c.shape.size(), 0);
        int64_t step = k * k;
        for (std::size_t a = c.shape.size(); a-- > 0;) {
            if (t.strides[a] == 0 || c.shape[a] == 1) continue;
            strides[a] = step;
            step *= c.shape[a];
        }
        T *minus = frame.take<T>(step);
        const StackView<T> into(MatrixView<T>(minus, k, k), c.shape, strides);
        for (int64_t i = 0; i < (step == k * k ? 1 : items); ++i) {
            const auto ti = t[i];
            T *to = into[i].data;
            for (int64_t p = 0; p < k; ++p)
                for (int64_t q = 0; q < k; ++q) to[p * k + q] = -(transpose ? ti(q, p) : ti(p, q));
        }
        const StackView<const T> core(MatrixView<const T>(minus, k, k), c.shape, strides);
        return apply_core<T>(c, v, Core<T>::full(core), T(1), side, out, check);
    }
    if (check)
        for (int64_t i = 0; i < items; ++i)
            if (!all_finite<T>(c[i])) throw ValueError("C holds NaN or infinity");
    const auto one = [&](int64_t i) {
        const auto vi = v[i], ti = t[i];
        const auto ci = c[i];
        const auto oi = out[i];
        if (items > 1 && k <= m && few(vi, ti, StackView<const T>(ci), StackView<T>(oi))) return;
        if (ci.data != oi.data)
            for (int64_t p = 0; p < ci.rows; ++p)
                for (int64_t q = 0; q < ci.cols; ++q) oi(p, q) = ci(p, q);
        Frame frame;
        T *core = frame.take<T>(kReflectionBlock * kReflectionBlock);
        for (int64_t b = 0; b < blocks; ++b) {
            const int64_t at = (ascending ? b : blocks - 1 - b) * kReflectionBlock, w = std::min(kReflectionBlock, k - at);
            for (int64_t p = 0; p < w; ++p)
                for (int64_t q = 0; q < w; ++q) core[p * w + q] = -(transpose ? ti(at + q, p) : ti(at + p, q));
            const auto part = side == Side::left ? oi.block_rows(at, m - at) : oi.block_cols(at, m - at);
            apply_core<T>(StackView<const T>(part), MatrixView<const T>(vi.block_rows(at, m - at).block_cols(at, w)),
                          Core<T>::full(MatrixView<const T>(core, w, w)), T(1), side, StackView<T>(part), false);
        }
    };
    if (items == 1) return one(0);
    parallel_for(items, one);
}

namespace {

// Q of one small block: rows of Q are rows of V times a small matrix, NVC vectors wide.
template <class T> struct SmallArray {
    MatrixView<const T> v, t;
    MatrixView<T> q;
};

template <class T> struct SmallArrayKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(const SmallArray<T> *a) {
        constexpr int W = Vec<T, Bytes>::lanes;
        if (a->v.cols <= W)
            rows<Bytes, 1>(a);
        else if (a->v.cols <= 2 * W)
            rows<Bytes, 2>(a);
        else
            rows<Bytes, 4>(a);
    }
    template <int Bytes, int NVC> static SUBSPAN_INLINE void rows(const SmallArray<T> *a) {
        using V = Vec<T, Bytes>;
        constexpr int W = V::lanes, LD = NVC * W;
        const int64_t m = a->v.rows, k = a->v.cols;
        alignas(64) T w[LD * LD]; // -T V1ᵀ: V1 is unit lower, T upper triangular
        alignas(64) T v1[LD * LD], out[4 * LD];
        const bool whole = k == LD; // rows of v1: those of V1ᵀ
        if (NVC == 1 && whole)
            simd::Transpose<T, Bytes>::block(a->v.data, a->v.row_stride, nullptr, nullptr, v1, LD);
        else
            for (int64_t i = 0; i < k; ++i)
                for (int64_t j = 0; j < LD; ++j) v1[i * LD + j] = j < k ? a->v(j, i) : T(0);
        for (int64_t i = 0; i < k; ++i) {
            typename V::type s[NVC];
            for (int q = 0; q < NVC; ++q) s[q] = typename V::type{};
            for (int64_t l = i; l < k; ++l) {
                const T x = -a->t(i, l);
#pragma GCC unroll 4
                for (int q = 0; q < NVC; ++q) s[q] += x * V::load(v1 + l * LD + q * W);
            }
            for (int q = 0; q < NVC; ++q) V::store(w + i * LD + q * W, s[q]);
        }
        for (int64_t i = 0; i < m; i += 4) {
            const int64_t count = std::min<int64_t>(4, m - i);
            const T *r[4];
            for (int64_t p = 0; p < 4; ++p) r[p] = a->v.data + std::min(i + p, m - 1) * a->v.row_stride;
            typename V::type s[4][NVC];
            for (int p = 0; p < 4; ++p)
                for (int q = 0; q < NVC; ++q) s[p][q] = typename V::type{};
            for (int64_t l = 0; l < k; ++l)
#pragma GCC unroll 4
                for (int q = 0; q < NVC; ++q) {
                    const auto y = V::load(w + l * LD + q * W);
#pragma GCC unroll 4
                    for (int p = 0; p < 4; ++p) s[p][q] += r[p][l] * y;
                }
            if (whole && count == 4 && i >= k) {
#pragma GCC unroll 4
                for (int p = 0; p < 4; ++p)
#pragma GCC unroll 4
                    for (int q = 0; q < NVC; ++q) V::store(a->q.data + (i + p) * a->q.row_stride + q * W, s[p][q]);
                continue;
            }
            for (int p = 0; p < 4; ++p)
                for (int q = 0; q < NVC; ++q) V::store(out + p * LD + q * W, s[p][q]);
            for (int64_t p = 0; p < count && i + p < k; ++p) out[p * LD + i + p] += T(1);
            simd::copy_rows(out, LD, a->q.data + i * a->q.row_stride, a->q.row_stride, count, k);
        }
    }
};

} // namespace

template <class T> void factored_array(const StackView<const T> &v, const StackView<const T> &t, const StackView<T> &q) {
    const int64_t m = v.rows(), k = v.cols(), n = q.cols(), items = q.size();
    require_triangles(t, k);
    if (q.rows() != m || n < k || n > m) throw ValueError("factored_array: Q must be m x n with k <= n <= m");
    const int64_t blocks = (k + kReflectionBlock - 1) / kReflectionBlock;
    const auto one = [&](int64_t i) {
        const auto vi = v[i], ti = t[i];
        const auto qi = q[i];
        if (k <= panel_width<T>() && n == k && k > 0 && vi.col_stride == 1 && qi.col_stride == 1) {
            const SmallArray<T> args{vi, ti, qi};
            simd::dispatch<SmallArrayKernel<T>>(&args);
            return;
        }
        for (int64_t p = 0; p < m; ++p)
            for (int64_t c = 0; c < n; ++c) qi(p, c) = p == c ? T(1) : T(0);
        Frame frame;
        T *core = frame.take<T>(kReflectionBlock * kReflectionBlock);
        for (int64_t b = blocks; b-- > 0;) {
            const int64_t at = b * kReflectionBlock, w = std::min(kReflectionBlock, k - at);
            for (int64_t p = 0; p < w; ++p)
                for (int64_t c = 0; c < w; ++c) core[p * w + c] = -ti(at + p, c);
            const auto part = qi.block_rows(at, m - at).block_cols(at, n - at);
            apply_core<T>(StackView<const T>(part), MatrixView<const T>(vi.block_rows(at, m - at).block_cols(at, w)),
                          Core<T>::full(MatrixView<const T>(core, w, w)), T(1), Side::left, StackView<T>(part), false);
        }
    };
    if (items == 1 || double(items) * double(m) * double(k) * double(n) < 2e6) {
        for (int64_t i = 0; i < items; ++i) one(i);
        return;
    }
    const int64_t group = std::max<int64_t>(1, items / (16 * num_threads()));
    parallel_for((items + group - 1) / group, [&](int64_t g) {
        for (int64_t i = g * group; i < std::min(items, (g + 1) * group); ++i) one(i);
    });
}

#define SUBSPAN_INSTANTIATE(T)                                                                                                                                 \
    template void householder_qr<T>(const StackView<const T> &, const StackView<T> &, const StackView<T> &, const StackView<T> &, const StackView<T> &);       \
    template void factored_apply<T>(const StackView<const T> &, const StackView<const T> &, const StackView<const T> &, Side, bool, const StackView<T> &,      \
                                    bool);                                                                                                                     \
    template void factored_array<T>(const StackView<const T> &, const StackView<const T> &, const StackView<T> &);
SUBSPAN_INSTANTIATE(float)
SUBSPAN_INSTANTIATE(double)
#undef SUBSPAN_INSTANTIATE

} // namespace subspan
