#include "linalg/apply_few.hpp"

#include "base/scratch.hpp"
#include "base/simd.hpp"
#include "linalg/packing.hpp"

#include <algorithm>

namespace subspan::simd {
namespace {

using std::int64_t;

constexpr int64_t kRows = 64; // whose products are summed in T

template <class T> struct FewArgs {
    MatrixView<const T> v;
    const T *x; // F vectors
    int64_t ldx;
    T *y; // F vectors
    int64_t ldy;
    T alpha;
    const T *w; // of an update, or null
    int64_t ldw;
    double *sums; // F · k of the coefficients
};

template <class T, int F> struct FewKernel {
    // Coefficients from rows: NV vectors of columns of V from j on, for all rows; the first `known` of them have been counted.
    template <int Bytes, int NV> static SUBSPAN_INLINE void columns(const FewArgs<T> *g, int64_t j, int64_t known = 0) {
        using V = Vec<T, Bytes>;
        constexpr int W = V::lanes;
        const int64_t m = g->v.rows, k = g->v.cols, ld = g->v.row_stride;
        for (int64_t first = 0; first < m; first += kRows) {
            const int64_t end = std::min(m, first + kRows);
            typename V::type acc[F][NV];
#pragma GCC unroll 4
            for (int f = 0; f < F; ++f)
#pragma GCC unroll 4
                for (int q = 0; q < NV; ++q) acc[f][q] = typename V::type{};
            const T *row = g->v.data + first * ld + j;
            for (int64_t i = first; i < end; ++i, row += ld) {
                typename V::type y[NV];
#pragma GCC unroll 4
                for (int q = 0; q < NV; ++q) y[q] = V::load(row + q * W);
#pragma GCC unroll 4
                for (int f = 0; f < F; ++f) {
                    const T x = g->x[f * g->ldx + i];
#pragma GCC unroll 4
                    for (int q = 0; q < NV; ++q) acc[f][q] += x * y[q];
                }
            }
            alignas(64) T part[NV * W];
            for (int f = 0; f < F; ++f) {
#pragma GCC unroll 4
                for (int q = 0; q < NV; ++q) V::store(part + q * W, acc[f][q]);
                double *to = g->sums + f * k + j;
                for (int64_t l = known; l < NV * W; ++l) to[l] += double(part[l]);
            }
        }
    }
    template <int Bytes> static SUBSPAN_INLINE void coefficients_by_rows(const FewArgs<T> *g) {
        constexpr int W = Vec<T, Bytes>::lanes;
        const int64_t k = g->v.cols;
        int64_t j = 0;
        for (; j + 4 * W <= k; j += 4 * W) columns<Bytes, 4>(g, j);
        if (j + 2 * W <= k) columns<Bytes, 2>(g, j), j += 2 * W;
        if (j + W <= k) columns<Bytes, 1>(g, j), j += W;
        if (j < k) columns<Bytes, 1>(g, k - W, W - (k - j)); // over part of what was
    }
    template <int Bytes> static SUBSPAN_INLINE void coefficients_by_columns(const FewArgs<T> *g) {
        const int64_t m = g->v.rows, k = g->v.cols, run = kRows * Vec<T, Bytes>::lanes;
        for (int64_t j = 0; j < k; ++j)
            for (int64_t first = 0; first < m; first += run)
                for (int f = 0; f < F; ++f)
                    g->sums[f * k + j] += double(dot<T, Bytes>(g->v.data + j * g->v.col_stride + first, g->x + f * g->ldx + first, std::min(run, m - first)));
    }
    // Sums of as many vectors as there are lanes: one vector of them.
    template <int Bytes> static SUBSPAN_INLINE typename Vec<T, Bytes>::type sums_of(typename Vec<T, Bytes>::type (&acc)[Vec<T, Bytes>::lanes]) {
        using V = Vec<T, Bytes>;
        constexpr int W = V::lanes;
#ifdef SUBSPAN_SHUFFLE
        Transpose<T, Bytes>::template rounds<W / 2>(acc);
#pragma GCC unroll 16
        for (int half = W / 2; half > 0; half /= 2)
#pragma GCC unroll 8
            for (int q = 0; q < half; ++q) acc[q] += acc[q + half];
        return acc[0];
#else
        alignas(64) T sums[W];
        for (int q = 0; q < W; ++q) sums[q] = V::sum(acc[q]);
        return V::load(sums);
#endif
    }
    template <int Bytes> static SUBSPAN_INLINE void update_by_rows(const FewArgs<T> *g) {
        using V = Vec<T, Bytes>;
        constexpr int W = V::lanes;
        const int64_t m = g->v.rows, k = g->v.cols, ld = g->v.row_stride, whole = k / W * W;
        // What is left of k goes as a vector over part of the one before, with zeros where that was.
        alignas(64) T tail[F][W] = {};
        for (int f = 0; f < F && whole < k; ++f)
            for (int64_t j = whole; j < k; ++j) tail[f][W - (k - j)] = g->w[f * g->ldw + j];
        int64_t i = 0;
        for (; i + W <= m; i += W)
            for (int f = 0; f < F; ++f) {
                const T *w = g->w + f * g->ldw, *row = g->v.data + i * ld;
                typename V::type acc[W];
#pragma GCC unroll 16
                for (int q = 0; q < W; ++q) acc[q] = typename V::type{};
                for (int64_t j = 0; j < whole; j += W) {
                    const auto c = V::load(w + j);
#pragma GCC unroll 16
                    for (int q = 0; q < W; ++q) acc[q] += c * V::load(row + q * ld + j);
                }
                if (whole < k) {
                    const auto c = V::load(tail[f]);
#pragma GCC unroll 16
                    for (int q = 0; q < W; ++q) acc[q] += c * V::load(row + q * ld + k - W);
                }
                const auto sum = sums_of<Bytes>(acc);
                T *to = g->y + f * g->ldy + i;
                V::store(to, g->alpha == T(0) ? sum : g->alpha * V::load(g->x + f * g->ldx + i) + sum);
            }
        for (; i < m; ++i)
            for (int f = 0; f < F; ++f) {
                const T sum = dot<T, Bytes>(g->v.data + i * ld, g->w + f * g->ldw, k), x = g->x[f * g->ldx + i];
                g->y[f * g->ldy + i] = g->alpha == T(0) ? sum : g->alpha * x + sum;
            }
    }
    // Four columns of V at a time, so that y is gone over k / 4 times.
    template <int Bytes> static SUBSPAN_INLINE void update_by_columns(const FewArgs<T> *g) {
        using V = Vec<T, Bytes>;
        constexpr int W = V::lanes;
        const int64_t m = g->v.rows, k = g->v.cols, ld = g->v.col_stride;
        for (int f = 0; f < F; ++f) {
            const T *x = g->x + f * g->ldx, *w = g->w + f * g->ldw;
            T *y = g->y + f * g->ldy;
            for (int64_t i = 0; i < m; ++i) y[i] = g->alpha == T(0) ? T(0) : g->alpha * x[i];
            for (int64_t j = 0; j < k; j += 4) {
                const int64_t last = k - 1;
                const T *a = g->v.data + j * ld, *b = g->v.data + std::min(j + 1, last) * ld, *c = g->v.data + std::min(j + 2, last) * ld,
                        *d = g->v.data + std::min(j + 3, last) * ld;
                const T wa = w[j], wb = j + 1 < k ? w[j + 1] : T(0), wc = j + 2 < k ? w[j + 2] : T(0), wd = j + 3 < k ? w[j + 3] : T(0);
                int64_t i = 0;
                for (; i + W <= m; i += W)
                    V::store(y + i, V::load(y + i) + ((wa * V::load(a + i) + wb * V::load(b + i)) + (wc * V::load(c + i) + wd * V::load(d + i))));
                for (; i < m; ++i) y[i] += (wa * a[i] + wb * b[i]) + (wc * c[i] + wd * d[i]);
            }
        }
    }
    template <int Bytes> static SUBSPAN_INLINE void run(const FewArgs<T> *g) {
        const bool by_rows = g->v.col_stride == 1;
        if (g->w == nullptr) {
            if (by_rows)
                coefficients_by_rows<Bytes>(g);
            else
                coefficients_by_columns<Bytes>(g);
        } else if (by_rows) {
            update_by_rows<Bytes>(g);
        } else {
            update_by_columns<Bytes>(g);
        }
    }
};

template <class T> void pass(int64_t count, const FewArgs<T> &args) {
    switch (count) {
    case 1: return dispatch<FewKernel<T, 1>, const FewArgs<T> *>(&args);
    case 2: return dispatch<FewKernel<T, 2>, const FewArgs<T> *>(&args);
    case 3: return dispatch<FewKernel<T, 3>, const FewArgs<T> *>(&args);
    default: return dispatch<FewKernel<T, 4>, const FewArgs<T> *>(&args);
    }
}

} // namespace

template <class T> void few_coefficients(const MatrixView<const T> &v, int64_t count, const T *x, T *w) {
    const int64_t m = v.rows, k = v.cols;
    Frame frame;
    double *sums = frame.take<double>(kFewAtOnce * k);
    for (int64_t f = 0; f < count; f += kFewAtOnce) {
        const int64_t some = std::min(kFewAtOnce, count - f);
        std::fill_n(sums, some * k, 0.0);
        pass<T>(some, FewArgs<T>{v, x + f * m, m, nullptr, 0, T(0), nullptr, 0, sums});
        for (int64_t i = 0; i < some * k; ++i) w[f * k + i] = T(sums[i]);
    }
}

template <class T> void few_update(const MatrixView<const T> &v, int64_t count, const T *w, T alpha, const T *x, T *y) {
    const int64_t m = v.rows, k = v.cols;
    for (int64_t f = 0; f < count; f += kFewAtOnce)
        pass<T>(std::min(kFewAtOnce, count - f), FewArgs<T>{v, x + f * m, m, y + f * m, m, alpha, w + f * k, k, nullptr});
}

#define SUBSPAN_INSTANTIATE(T)                                                                                                                                 \
    template void few_coefficients<T>(const MatrixView<const T> &, int64_t, const T *, T *);                                                                   \
    template void few_update<T>(const MatrixView<const T> &, int64_t, const T *, T, const T *, T *);
SUBSPAN_INSTANTIATE(float)
SUBSPAN_INSTANTIATE(double)
#undef SUBSPAN_INSTANTIATE

} // namespace subspan::simd
