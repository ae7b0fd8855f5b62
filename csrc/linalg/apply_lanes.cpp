#include "linalg/apply_lanes.hpp"

#include "base/blocking.hpp"
#include "base/scratch.hpp"
#include "base/simd.hpp"
#include "linalg/packed_gram.hpp"
#include "linalg/packing.hpp"
#include "subspan/parallel.hpp"

#include <algorithm>
#include <cmath>

namespace subspan::simd {
namespace {

using std::int64_t;

template <class T> struct LanesArgs {
    const TinyStack<T> *s;
    int64_t first, count;
    T *c, *v, *w; // entries of the group: entry e of lane l at e · lanes + l
    bool read, write;
};

template <class T> struct LanesKernel {
    static constexpr int kSide = 4; // sums side by side
    // to[a · step_to + b] (+)= Σ_d x[d · xs + a · xa] y[d · ys + b]: entry by entry, for rows a and columns b.
    template <int Bytes, int N>
    static SUBSPAN_INLINE void sums(int64_t depth, const T *x, int64_t xs, const T *y, int64_t ys, typename Vec<T, Bytes>::type (&acc)[kSide]) {
        using V = Vec<T, Bytes>;
        for (int64_t d = 0; d < depth; ++d, x += xs, y += ys) {
            const auto a = V::load(x);
#pragma GCC unroll 4
            for (int q = 0; q < N; ++q) acc[q] += a * V::load(y + q * V::lanes);
        }
    }
    // Row of `cols` entries: Σ_d x_d y_dj, with Update beside alpha times what is there.
    template <int Bytes, bool Update>
    static SUBSPAN_INLINE void row(int64_t depth, const T *x, int64_t xs, const T *y, int64_t ys, int64_t cols, T *to, T alpha) {
        using V = Vec<T, Bytes>;
        constexpr int W = V::lanes;
        for (int64_t j = 0; j < cols; j += kSide) {
            typename V::type acc[kSide];
#pragma GCC unroll 4
            for (int q = 0; q < kSide; ++q) acc[q] = typename V::type{};
            const int some = int(std::min<int64_t>(kSide, cols - j));
            switch (some) {
            case 4: sums<Bytes, 4>(depth, x, xs, y + j * W, ys, acc); break;
            case 3: sums<Bytes, 3>(depth, x, xs, y + j * W, ys, acc); break;
            case 2: sums<Bytes, 2>(depth, x, xs, y + j * W, ys, acc); break;
            default: sums<Bytes, 1>(depth, x, xs, y + j * W, ys, acc); break;
            }
            for (int q = 0; q < some; ++q) {
                T *p = to + (j + q) * W;
                if constexpr (Update)
                    V::store(p, alpha == T(0) ? acc[q] : alpha * V::load(p) + acc[q]);
                else
                    V::store(p, acc[q]);
            }
        }
    }
    template <int Bytes> static SUBSPAN_INLINE void run(const LanesArgs<T> *g) {
        constexpr int W = Vec<T, Bytes>::lanes;
        const TinyStack<T> &s = *g->s;
        const int64_t m = s.m, n = s.n, k = s.k, vr = s.v_row * W, vc = s.v_col * W;
        pack<T, Bytes>({s.c + g->first * s.c_item, s.c_item, 1, nullptr, false}, 0, g->count, m * n, W, g->c);
        pad(g->count, m * n, W, g->c);
        const int64_t size = (s.left ? m : n) * k;
        pack<T, Bytes>({s.v + g->first * s.v_item, s.v_item, 1, nullptr, false}, 0, g->count, size, W, g->v);
        pad(g->count, size, W, g->v);
        if (g->write && !g->read) // once, and before it is multiplied: what is finite in the end is finite on the way
            for (int64_t i = 0; i < s.coefficients() * W; ++i) g->w[i] *= s.scalar;
        if (s.left) {
            // w (k x n) = Vᵀ C, and row i of out takes row i of V times w.
            for (int64_t l = 0; l < k && g->read; ++l) row<Bytes, false>(m, g->v + l * vc, vr, g->c, n * W, n, g->w + l * n * W, T(0));
            for (int64_t i = 0; i < m && g->write; ++i) row<Bytes, true>(k, g->v + i * vr, vc, g->w, n * W, n, g->c + i * n * W, s.alpha);
            return;
        }
        // w (m x k) = C V, and entry (i, j) takes row i of w times row j of V.
        for (int64_t i = 0; i < m && g->read; ++i)
            for (int64_t l = 0; l < k; ++l) row<Bytes, false>(n, g->c + i * n * W, W, g->v + l * vc, vr, 1, g->w + (i * k + l) * W, T(0));
        for (int64_t i = 0; i < m && g->write; ++i)
            for (int64_t j = 0; j < n; ++j) row<Bytes, true>(k, g->w + i * k * W, W, g->v + j * vr, vc, 1, g->c + (i * n + j) * W, s.alpha);
    }
};

template <class T> struct DefectArgs {
    const T *v;
    int64_t v_item, count, n, k, row, col;
    const double *z;
    T *packed, *y, *squares; // y: n vectors; squares: a vector for each z
};

template <class T> struct DefectLanesKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(const DefectArgs<T> *g) {
        using V = Vec<T, Bytes>;
        constexpr int W = V::lanes;
        pack<T, Bytes>({g->v, g->v_item, 1, nullptr, false}, 0, g->count, g->n * g->k, W, g->packed);
        pad(g->count, g->n * g->k, W, g->packed);
        for (int h = 0; h < 2; ++h) {
            const double *z = g->z + h * g->k;
            for (int64_t p = 0; p < g->n; ++p) {
                typename V::type sum{};
                for (int64_t j = 0; j < g->k; ++j) sum += T(z[j]) * V::load(g->packed + (p * g->row + j * g->col) * W);
                V::store(g->y + p * W, sum);
            }
            typename V::type squares{};
            for (int64_t j = 0; j < g->k; ++j) {
                typename V::type off{};
                for (int64_t p = 0; p < g->n; ++p) off += V::load(g->y + p * W) * V::load(g->packed + (p * g->row + j * g->col) * W);
                off = off - T(z[j]);
                squares += off * off;
            }
            V::store(g->squares + h * W, squares);
        }
    }
};

} // namespace

template <class T> double defect_lanes(const T *v, int64_t items, int64_t v_item, int64_t n, int64_t k, int64_t v_row, int64_t v_col, const double *z) {
    const int64_t lanes = lanes_at_once<T>();
    Frame frame;
    DefectArgs<T> args{v, v_item, 0, n, k, v_row, v_col, z, frame.take<T>(n * k * lanes), frame.take<T>(n * lanes), frame.take<T>(2 * lanes)};
    double worst = 0;
    for (int64_t first = 0; first < items; first += lanes) {
        poll();
        args.v = v + first * v_item;
        args.count = std::min(lanes, items - first);
        dispatch<DefectLanesKernel<T>, const DefectArgs<T> *>(&args);
        for (int h = 0; h < 2; ++h)
            for (int64_t l = 0; l < args.count; ++l) {
                const double square = double(args.squares[h * lanes + l]);
                if (std::isnan(square)) return square;
                worst = std::max(worst, square);
            }
    }
    return std::sqrt(worst / double(k));
}

template <class T> int64_t lanes_at_once() { return processor().vector / int64_t(sizeof(T)); }

template <class T> bool lanes_pay(int64_t items, int64_t m, int64_t n, int64_t k, bool left) {
    const int64_t lanes = lanes_at_once<T>(), inner = left ? m : n;
    return k > 0 && items >= lanes && (m * n + inner * k + k * (left ? n : m)) * processor().vector <= processor().first / 2;
}

template <class T> void apply_lanes(const TinyStack<T> &s, int64_t g, T *w, bool read, bool write) {
    const int64_t lanes = lanes_at_once<T>(), first = g * lanes, count = std::min(lanes, s.items - first);
    Frame frame;
    LanesArgs<T> args{&s, first, count, frame.take<T>(s.m * s.n * lanes), frame.take<T>((s.left ? s.m : s.n) * s.k * lanes), w, read, write};
    dispatch<LanesKernel<T>, const LanesArgs<T> *>(&args);
    if (!write) return;
    copy_matrix<T>(MatrixView<const T>(args.c, s.m * s.n, count, lanes, 1).transposed(),
                   MatrixView<T>(s.out + first * s.out_item, count, s.m * s.n, s.out_item, 1));
}

#define SUBSPAN_INSTANTIATE(T)                                                                                                                                 \
    template int64_t lanes_at_once<T>();                                                                                                                       \
    template bool lanes_pay<T>(int64_t, int64_t, int64_t, int64_t, bool);                                                                                      \
    template void apply_lanes<T>(const TinyStack<T> &, int64_t, T *, bool, bool);                                                                              \
    template double defect_lanes<T>(const T *, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, const double *);
SUBSPAN_INSTANTIATE(float)
SUBSPAN_INSTANTIATE(double)
#undef SUBSPAN_INSTANTIATE

} // namespace subspan::simd
