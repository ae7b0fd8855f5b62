#include "linalg/reflect_columns.hpp"

#include "base/blocking.hpp"
#include "base/amax.hpp"
#include "base/scratch.hpp"
#include "base/simd.hpp"
#include "linalg/columns.hpp"
#include "linalg/packing.hpp"
#include "subspan/parallel.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace subspan {
namespace {

using simd::Vec;
using std::int64_t;

constexpr int kGroup = 4;        // reflections whose sums are taken together
constexpr int64_t kPanel = 16;   // columns of V that are copied at a time: a line of floats
constexpr int64_t kRun = 128;    // vectors whose products are summed in T

template <class T> struct ReflectKernel {
    // y_j: what is taken off along v_j, in the order in which they are applied.
    static SUBSPAN_INLINE void chain(const double (&g)[kGroup][kGroup], const double *tau, int size, bool ascending, const double *w, double *y) {
        for (int i = 0; i < size; ++i) {
            const int j = ascending ? i : size - 1 - i;
            double sum = w[j];
            for (int l = ascending ? 0 : j + 1; l < (ascending ? j : size); ++l) sum -= g[j][l] * y[l];
            y[j] = tau[j] * sum;
        }
    }
    // A group of reflections on N vectors from x on.
    template <int Bytes, int N>
    static SUBSPAN_INLINE void apply(const T *p, int64_t ld, int64_t size, T *x, const double (&g)[kGroup][kGroup], const double *tau, int some, bool ascending,
                                     bool *good) {
        using V = Vec<T, Bytes>;
        constexpr int W = V::lanes;
        double w[N][kGroup] = {};
        for (int64_t first = 0; first < size; first += kRun * W) {
            const int64_t end = std::min(size, first + kRun * W);
            typename V::type sum[N][kGroup];
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
                for (int j = 0; j < kGroup; ++j) sum[n][j] = typename V::type{};
            for (int64_t i = first; i < end; i += W) {
                typename V::type v[kGroup];
#pragma GCC unroll 4
                for (int j = 0; j < kGroup; ++j) v[j] = V::load(p + j * ld + i);
#pragma GCC unroll 4
                for (int n = 0; n < N; ++n) {
                    const auto y = V::load(x + n * ld + i);
#pragma GCC unroll 4
                    for (int j = 0; j < kGroup; ++j) sum[n][j] += v[j] * y;
                }
            }
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
                for (int j = 0; j < kGroup; ++j) w[n][j] += double(V::sum(sum[n][j]));
        }
        T f[N][kGroup];
        for (int n = 0; n < N; ++n) {
            double y[kGroup] = {};
            chain(g, tau, some, ascending, w[n], y);
            for (int j = 0; j < kGroup; ++j) {
                f[n][j] = T(y[j]);
                *good = *good && std::isfinite(f[n][j]);
            }
        }
        for (int64_t i = 0; i < size; i += W) {
            typename V::type v[kGroup];
#pragma GCC unroll 4
            for (int j = 0; j < kGroup; ++j) v[j] = V::load(p + j * ld + i);
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) {
                auto z = V::load(x + n * ld + i);
#pragma GCC unroll 4
                for (int j = 0; j < kGroup; ++j) z -= f[n][j] * v[j];
                V::store(x + n * ld + i, z);
            }
        }
    }
    template <int Bytes> static SUBSPAN_INLINE void run(const FewReflections<T> *r, T *vectors, int64_t count, T *panel, bool *good) {
        using C = simd::Columns<T, Bytes>;
        const int64_t k = r->v.cols, ld = simd::column_stride(r->v.rows), panels = (k + kPanel - 1) / kPanel;
        for (int64_t b = 0; b < panels; ++b) {
            poll();
            const int64_t at = (r->ascending ? b : panels - 1 - b) * kPanel, cols = std::min(kPanel, k - at), above = r->trapezoid ? at / kPanel * kPanel : 0;
            const int64_t m = r->v.rows - above, size = C::padded(m);
            const T *v = r->v.data + above * r->v.row_stride + at * r->v.col_stride;
            T *x = vectors + above;
            if (r->v.row_stride == 1) {
                for (int64_t c = 0; c < cols; ++c) std::copy_n(v + c * r->v.col_stride, m, panel + c * ld);
            } else {
                const simd::PackSource<T> from{v, r->v.row_stride, r->v.col_stride, nullptr, false};
                simd::pack<T, Bytes>(from, 0, m, cols, int(ld), panel);
            }
            for (int64_t c = 0; c < cols; ++c) std::fill(panel + c * ld + m, panel + c * ld + size, T(0));
            const int64_t groups = (cols + kGroup - 1) / kGroup;
            for (int64_t c = cols; c < groups * kGroup; ++c) std::fill_n(panel + c * ld, size, T(0)); // of length zero
            for (int64_t q = 0; q < groups; ++q) {
                const int64_t first = (r->ascending ? q : groups - 1 - q) * kGroup;
                const int some = int(std::min<int64_t>(kGroup, cols - first));
                const T *p = panel + first * ld;
                double g[kGroup][kGroup], tau[kGroup] = {};
                C::template gram<kGroup, kRun>(p, ld, size, &g[0][0]);
                for (int i = 0; i < kGroup; ++i)
                    for (int j = i + 1; j < kGroup; ++j) g[i][j] = g[j][i];
                for (int j = 0; j < some; ++j) {
                    if (r->tau != nullptr) {
                        tau[j] = double(r->tau[at + first + j]);
                        *good = *good && std::isfinite(g[j][j]);
                        continue;
                    }
                    // Far from one, or of zeros, where products of T lose digits: by unit columns.
                    *good = *good && g[j][j] > 1e-6 && g[j][j] < 1e8;
                    tau[j] = 2.0 / g[j][j];
                }
                if (!*good) return;
                int64_t c = 0;
                for (; c + 4 <= count; c += 4) apply<Bytes, 4>(p, ld, size, x + c * ld, g, tau, some, r->ascending, good);
                if (count - c >= 2) {
                    apply<Bytes, 2>(p, ld, size, x + c * ld, g, tau, some, r->ascending, good);
                    c += 2;
                }
                if (c < count) apply<Bytes, 1>(p, ld, size, x + c * ld, g, tau, some, r->ascending, good);
                if (!*good) return;
            }
        }
    }
};

// f with the number of columns as a constant, for those of which it makes a difference.
template <int Bytes, class M, class F> SUBSPAN_INLINE void few(const M &a, const F &f) {
    switch (a.cols) {
    case 2: return f(std::integral_constant<int, 2>());
    case 3: return f(std::integral_constant<int, 3>());
    case 4: return f(std::integral_constant<int, 4>());
    case 5: return f(std::integral_constant<int, 5>());
    case 6: return f(std::integral_constant<int, 6>());
    case 7: return f(std::integral_constant<int, 7>());
    default: return f(std::integral_constant<int, 1>());
    }
}

template <class T> struct GatherKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(const MatrixView<const T> *a, T *p) {
        const int64_t m = a->rows, ld = simd::column_stride(m);
        if (a->cols < 8 || a->row_stride == 1) {
            few<Bytes>(*a, [&](auto k) SUBSPAN_LAMBDA_INLINE { simd::Columns<T, Bytes>::template load<decltype(k)::value>(*a, p, ld); });
        } else {
            const simd::PackSource<T> from{a->data, a->row_stride, a->col_stride, nullptr, false};
            simd::pack<T, Bytes>(from, 0, m, a->cols, int(ld), p);
        }
        for (int64_t c = 0; c < a->cols; ++c) std::fill(p + c * ld + m, p + (c + 1) * ld, T(0));
    }
};
template <class T> struct ScatterKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(const T *p, const MatrixView<T> *a) {
        constexpr int W = Vec<T, Bytes>::lanes;
        const int64_t m = a->rows, ld = simd::column_stride(m);
        if (a->cols < 8 || a->row_stride == 1)
            return few<Bytes>(*a, [&](auto k) SUBSPAN_LAMBDA_INLINE { simd::Columns<T, Bytes>::template store<decltype(k)::value>(p, ld, *a); });
        int64_t c = 0;
        for (; c + W <= a->cols && a->col_stride == 1; c += W) {
            int64_t i = 0;
            for (; i + W <= m; i += W) simd::Transpose<T, Bytes>::block(p + c * ld + i, ld, nullptr, nullptr, a->data + i * a->row_stride + c, a->row_stride);
            for (; i < m; ++i)
                for (int64_t j = c; j < c + W; ++j) (*a)(i, j) = p[j * ld + i];
        }
        for (int64_t i = 0; i < m && c < a->cols; ++i)
            for (int64_t j = c; j < a->cols; ++j) (*a)(i, j) = p[j * ld + i];
    }
};

} // namespace

template <class T> bool reflect_few(const FewReflections<T> &r, const StackView<const T> &c, bool left, const StackView<T> &out, bool check) {
    const auto turned = [&](auto m) { return left ? m : m.transposed(); };
    const int64_t m = r.v.rows, k = r.v.cols, each = turned(c.first).cols, count = each * c.size(), ld = simd::column_stride(m);
    // Measured: more vectors share the triangle of the WY form, and those of few reflections sooner, where they leave the caches too.
    const int64_t bytes = count * ld * int64_t(sizeof(T)), wide = std::min(kPanel, (k + kGroup - 1) / kGroup * kGroup);
    if (count > (k <= 8 ? 16 : sizeof(T) == 4 ? 48 : 32) || (k < 32 && bytes > blocking().strip)) return false;
    if (bytes + wide * ld * int64_t(sizeof(T)) > int64_t(64) << 20) return false; // of work memory
    if (count == 0 || m == 0 || k == 0) return false;
    Frame frame;
    T *vectors = frame.take<T>(count * ld), *panel = frame.take<T>(wide * ld);
    for (int64_t i = 0; i < c.size(); ++i) {
        const MatrixView<const T> from = turned(c[i]);
        simd::dispatch<GatherKernel<T>, const MatrixView<const T> *, T *>(&from, vectors + i * each * ld);
    }
    for (int64_t q = 0; q < count; ++q) { // and where products with V would be subnormal
        const T top = max_abs<T>(MatrixView<const T>(vectors + q * ld, 1, m));
        if (!(top == T(0) || double(top) > double(std::numeric_limits<T>::min()) * 1e10)) return false;
    }
    bool good = true;
    simd::dispatch<ReflectKernel<T>, const FewReflections<T> *, T *, int64_t, T *, bool *>(&r, vectors, count, panel, &good);
    if (!good) return false;
    for (int64_t q = 0; q < count && check; ++q)
        if (!all_finite<T>(MatrixView<const T>(vectors + q * ld, 1, m))) return false;
    for (int64_t i = 0; i < c.size(); ++i) {
        const MatrixView<T> to = turned(out[i]);
        simd::dispatch<ScatterKernel<T>, const T *, const MatrixView<T> *>(vectors + i * each * ld, &to);
    }
    return true;
}

template bool reflect_few<float>(const FewReflections<float> &, const StackView<const float> &, bool, const StackView<float> &, bool);
template bool reflect_few<double>(const FewReflections<double> &, const StackView<const double> &, bool, const StackView<double> &, bool);

} // namespace subspan
