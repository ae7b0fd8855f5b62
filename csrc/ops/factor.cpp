#include "subspan/factor.hpp"

#include "scratch.hpp"
#include "simd.hpp"
#include "subspan/blas.hpp"
#include "subspan/errors.hpp"
#include "subspan/panel.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

namespace subspan {
namespace {

struct CholeskyKernel {
    template <int Bytes>
    static SUBSPAN_INLINE void run(std::int64_t n, double *a, double floor, double *start, std::int64_t *dropped) {
        // Right-looking by rows of Lᵀ would stride; left-looking with row dots is contiguous.
        *dropped = 0;
        for (std::int64_t i = 0; i < n; ++i) start[i] = a[i * n + i];
        for (std::int64_t i = 0; i < n; ++i) {
            double *ri = a + i * n;
            for (std::int64_t j = 0; j <= i; ++j) {
                const double *rj = a + j * n;
                double s = simd::dot<double, Bytes>(ri, rj, j);
                s = ri[j] - s;
                if (j < i) {
                    ri[j] = rj[j] > 0.0 ? s / rj[j] : 0.0;
                } else if (s > floor * start[i] && s > std::numeric_limits<double>::min()) {
                    ri[i] = std::sqrt(s);
                } else {
                    ri[i] = 0.0;
                    ++*dropped;
                }
            }
            std::fill(ri + i + 1, ri + n, 0.0);
        }
    }
};

struct PivotedArgs {
    std::int64_t n;
    double *a, tolerance, *l;
    std::int64_t *order;
    double *left, *rest; // rest: work, n
    std::int64_t rank;
};

struct PivotedKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(PivotedArgs *p) {
        const std::int64_t n = p->n;
        double *a = p->a, *l = p->l, *rest = p->rest;
        std::fill_n(l, n * n, 0.0);
        for (std::int64_t i = 0; i < n; ++i) {
            p->order[i] = i;
            rest[i] = a[i * n + i];
        }
        for (std::int64_t j = 0; j < n; ++j) {
            const std::int64_t q = std::max_element(rest + j, rest + n) - rest;
            *p->left = std::max(rest[q], 0.0);
            if (!(rest[q] > p->tolerance)) {
                p->rank = j;
                return;
            }
            if (q != j) {
                std::swap_ranges(a + j * n, a + (j + 1) * n, a + q * n);
                for (std::int64_t i = 0; i < n; ++i) std::swap(a[i * n + j], a[i * n + q]);
                std::swap_ranges(l + j * n, l + j * n + j, l + q * n);
                std::swap(rest[j], rest[q]);
                std::swap(p->order[j], p->order[q]);
            }
            const double pivot = std::sqrt(rest[j]);
            const double *lj = l + j * n;
            l[j * n + j] = pivot;
            for (std::int64_t i = j + 1; i < n; ++i) {
                double *li = l + i * n;
                const double s = simd::dot<double, Bytes>(li, lj, j);
                const double x = (a[i * n + j] - s) / pivot;
                li[j] = x;
                rest[i] -= x * x;
            }
        }
        p->rank = n;
        *p->left = 0.0;
    }
};

struct InvertKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(std::int64_t n, const double *l, double *inv) {
        using V = simd::Vec<double, Bytes>;
        constexpr int W = V::lanes;
        std::fill_n(inv, n * n, 0.0);
        for (std::int64_t i = 0; i < n; ++i) {
            const double pivot = l[i * n + i];
            if (pivot == 0.0) continue;
            double *row = inv + i * n;
            for (std::int64_t p = 0; p < i; ++p) {
                const double c = -l[i * n + p];
                if (c == 0.0) continue;
                const double *other = inv + p * n;
                std::int64_t j = 0;
                for (; j + W <= p + 1; j += W) V::store(row + j, V::load(row + j) + c * V::load(other + j));
                for (; j <= p; ++j) row[j] += c * other[j];
            }
            const double r = 1.0 / pivot;
            for (std::int64_t j = 0; j < i; ++j) row[j] *= r;
            row[i] = r;
        }
    }
};

// Householder QR of the transposed rows through LAPACK: xᵀ = Q R, so x = Rᵀ Qᵀ.
template <class T> void householder_rows(MatrixView<T> x, double *lower) {
    const std::int64_t l = x.rows, n = x.cols;
    int ni = int(n), li = int(l), lda = int(x.row_stride), info = 0, lwork = int(64 * l);
    if (n > std::numeric_limits<int>::max() || x.row_stride > std::numeric_limits<int>::max())
        throw ValueError("Householder QR: more than 2^31 - 1 columns, which LP64 LAPACK cannot address");
    Frame frame;
    T *tau = frame.take<T>(l), *work = frame.take<T>(lwork);
    lapack<T>().geqrf(&ni, &li, x.data, &lda, tau, work, &lwork, &info);
    if (info != 0) throw LinAlgError("Householder QR: geqrf failed");
    if (lower != nullptr)
        for (std::int64_t i = 0; i < l; ++i) {
            std::fill_n(lower + i * l, l, 0.0);
            for (std::int64_t j = 0; j <= i; ++j) lower[i * l + j] = double(x(i, j));
        }
    lapack<T>().orgqr(&ni, &li, &li, x.data, &lda, tau, work, &lwork, &info);
    if (info != 0) throw LinAlgError("Householder QR: orgqr failed");
}

} // namespace

std::int64_t cholesky(std::int64_t n, double *a, double floor) {
    Frame frame;
    std::int64_t dropped = 0;
    simd::dispatch<CholeskyKernel>(n, a, floor, frame.take<double>(n), &dropped);
    return dropped;
}

std::int64_t pivoted_cholesky(std::int64_t n, double *a, double tolerance, double *l, std::int64_t *order, double *left) {
    Frame frame;
    *left = 0.0;
    PivotedArgs args{n, a, tolerance, l, order, left, frame.take<double>(n), 0};
    simd::dispatch<PivotedKernel>(&args);
    return args.rank;
}

void invert_lower(std::int64_t n, const double *l, double *inverse) { simd::dispatch<InvertKernel>(n, l, inverse); }

template <class T> void lq_rows(MatrixView<T> x, double *lower) {
    const std::int64_t l = x.rows;
    constexpr double eps = std::numeric_limits<T>::epsilon();
    if (l > x.cols) throw ValueError("lq_rows: more rows than columns");
    if (l == 0) return;
    Frame frame;
    double *g = frame.take<double>(l * l), *inverse = frame.take<double>(l * l);
    double *product = frame.take<double>(l * l), *next = frame.take<double>(l * l);
    T *w = frame.take<T>(l * l);
    Panel<T> panel(x.cols);
    panel.add(x);
    std::fill_n(product, l * l, 0.0);
    for (std::int64_t i = 0; i < l; ++i) product[i * l + i] = 1.0;
    const double good = 5.0 * eps * std::sqrt(double(l));
    for (int pass = 0; pass < 5; ++pass) {
        gram(panel, 0, g);
        double off = 0, trace = 0;
        for (std::int64_t i = 0; i < l; ++i) {
            for (std::int64_t j = 0; j < i; ++j) off = std::max(off, std::abs(g[i * l + j]));
            off = std::max(off, std::abs(g[i * l + i] - 1.0));
            trace += g[i * l + i];
        }
        if (!std::isfinite(trace)) throw LinAlgError("orthonormalisation: squares of the rows are not finite; scale the data");
        if (off <= good) break;
        // Where Cholesky meets a pivot that rounding made, a shift keeps it positive and the next pass repairs it;
        // a row that stays dependent has no direction of its own and needs a completion.
        std::copy_n(g, l * l, next);
        if (cholesky(l, next, 8.0 * eps) > 0) {
            const double shift = 11.0 * eps * std::sqrt(double(x.cols)) * trace / double(l);
            std::copy_n(g, l * l, next);
            for (std::int64_t i = 0; i < l; ++i) next[i * l + i] += shift;
            if (pass >= 2 || shift == 0.0 || cholesky(l, next, 0.0) > 0) {
                double *r = frame.take<double>(l * l);
                householder_rows(x, lower == nullptr ? nullptr : r);
                if (lower != nullptr)
                    gemm<double>(MatrixView<const double>(product, l, l), MatrixView<const double>(r, l, l),
                                 MatrixView<double>(lower, l, l));
                return;
            }
        }
        invert_lower(l, next, inverse);
        for (std::int64_t i = 0; i < l * l; ++i) w[i] = T(inverse[i]);
        combine(w, panel, x);
        if (lower != nullptr) {
            gemm<double>(MatrixView<const double>(product, l, l), MatrixView<const double>(next, l, l),
                         MatrixView<double>(inverse, l, l));
            std::copy_n(inverse, l * l, product);
        }
    }
    if (lower != nullptr) std::copy_n(product, l * l, lower);
}

void small_svd(std::int64_t m, std::int64_t n, const double *a, double *s, double *u, double *vt) {
    // Row-major a is column-major aᵀ = V S Uᵀ: LAPACK's left vectors are our right ones.
    const std::int64_t p = std::min(m, n);
    if (p == 0) return;
    Frame frame;
    double *copy = frame.take<double>(m * n), *left = frame.take<double>(n * p), *right = frame.take<double>(p * m);
    std::copy_n(a, m * n, copy);
    for (std::int64_t i = 0; i < m * n; ++i)
        if (!std::isfinite(copy[i])) throw LinAlgError("SVD of the core: the matrix holds NaN or infinity");
    char job = u == nullptr && vt == nullptr ? 'N' : 'S';
    int rows = int(n), cols = int(m), pi = int(p), info = 0;
    if (p > 20000) throw ValueError("SVD of the core: " + std::to_string(p) + " rows are beyond LP64 LAPACK's work space");
    const std::int64_t need = 4 * p * p + 7 * p + std::max(m, n) + 64 * (m + n);
    int lwork = int(need);
    double *work = frame.take<double>(need);
    int *iwork = frame.take<int>(8 * p);
    lapack<double>().gesdd(&job, &rows, &cols, copy, &rows, s, left, &rows, right, &pi, work, &lwork, iwork, &info);
    if (info != 0) throw LinAlgError("SVD of the core: gesdd did not converge");
    if (vt != nullptr)
        for (std::int64_t i = 0; i < p; ++i) std::copy_n(left + i * n, n, vt + i * n);
    if (u != nullptr) // right is p x m column-major, column i holds row i of u
        std::copy_n(right, m * p, u);
}

template void lq_rows<float>(MatrixView<float>, double *);
template void lq_rows<double>(MatrixView<double>, double *);

} // namespace subspan
