#include "subspan/factor.hpp"

#include "base/amax.hpp"
#include "base/scratch.hpp"
#include "base/simd.hpp"
#include "linalg/column_qr.hpp"
#include "linalg/small_dense.hpp"
#include "subspan/blas.hpp"
#include "subspan/errors.hpp"
#include "subspan/gemm.hpp"
#include "subspan/parallel.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <vector>

namespace subspan {
namespace {

constexpr std::int64_t kJacobi = 100, kValues = 32; // up to there small::svd() is faster than LAPACK, and without vectors
constexpr std::int64_t kBlock = 48, kBlocked = 160; // columns between two updates by products, and orders from which that pays

struct CholeskyKernel {
    // Columns [first, end) of all rows from `first` on; what is left of them has come off already.
    template <int Bytes>
    static SUBSPAN_INLINE void run(std::int64_t n, std::int64_t first, std::int64_t end, double *a, double floor, const double *start, std::int64_t *dropped) {
        // Right-looking by rows of Lᵀ would stride; left-looking with row dots is contiguous.
        for (std::int64_t i = first; i < n; ++i) {
            poll();
            double *ri = a + i * n;
            for (std::int64_t j = first; j <= std::min(i, end - 1); ++j) {
                const double *rj = a + j * n;
                double s = simd::dot<double, Bytes>(ri + first, rj + first, j - first);
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
            if (i < end) std::fill(ri + i + 1, ri + n, 0.0);
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
            poll();
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
    template <int Bytes> static SUBSPAN_INLINE void run(std::int64_t n, std::int64_t ld, const double *l, double *inv) {
        using V = simd::Vec<double, Bytes>;
        constexpr int W = V::lanes;
        for (std::int64_t i = 0; i < n; ++i) {
            poll();
            const double pivot = l[i * ld + i];
            double *row = inv + i * ld;
            std::fill_n(row, n, 0.0);
            if (pivot == 0.0) continue;
            for (std::int64_t p = 0; p < i; ++p) {
                const double c = -l[i * ld + p];
                if (c == 0.0) continue;
                const double *other = inv + p * ld;
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

// Householder QR of the transposed rows through LAPACK: xᵀ = Q R, so x = Rᵀ Qᵀ. On a copy, which an interrupt leaves behind.
template <class T> void householder_rows(MatrixView<T> x, double *lower) {
    const std::int64_t l = x.rows, n = x.cols;
    if (n > std::numeric_limits<int>::max() || 64 * l > std::numeric_limits<int>::max())
        throw ValueError("Householder QR: more than 2^31 - 1 columns, which LP64 LAPACK cannot address");
    struct Job {
        std::vector<T> x, tau, work;
        int info = 0;
    };
    const auto job = std::make_shared<Job>();
    job->x.resize(std::size_t(l * n));
    job->tau.resize(std::size_t(l));
    job->work.resize(std::size_t(64 * l));
    for (std::int64_t i = 0; i < l; ++i) std::copy_n(x.data + i * x.row_stride, n, job->x.data() + i * n);
    const double flops = 2.0 * double(l) * double(l) * double(n);
    run_stoppable(flops, [job, l, n] {
        int ni = int(n), li = int(l), lwork = int(64 * l);
        lapack<T>().geqrf(&ni, &li, job->x.data(), &ni, job->tau.data(), job->work.data(), &lwork, &job->info);
    });
    if (job->info != 0) throw LinAlgError("Householder QR: geqrf failed");
    if (lower != nullptr)
        for (std::int64_t i = 0; i < l; ++i) {
            std::fill_n(lower + i * l, l, 0.0);
            for (std::int64_t j = 0; j <= i; ++j) lower[i * l + j] = double(job->x[std::size_t(i * n + j)]);
        }
    run_stoppable(flops, [job, l, n] {
        int ni = int(n), li = int(l), lwork = int(64 * l);
        lapack<T>().orgqr(&ni, &li, &li, job->x.data(), &ni, job->tau.data(), job->work.data(), &lwork, &job->info);
    });
    if (job->info != 0) throw LinAlgError("Householder QR: orgqr failed");
    for (std::int64_t i = 0; i < l; ++i) std::copy_n(job->x.data() + i * n, n, x.data + i * x.row_stride);
}

} // namespace

std::int64_t cholesky(std::int64_t n, double *a, double floor) {
    Frame frame;
    std::int64_t dropped = 0;
    double *start = frame.take<double>(n);
    for (std::int64_t i = 0; i < n; ++i) start[i] = a[i * n + i];
    const std::int64_t block = n < kBlocked ? n : kBlock;
    double *minus = n < kBlocked ? nullptr : frame.take<double>(n * block);
    for (std::int64_t i = 0; i < n && minus != nullptr; ++i) std::fill(a + i * n + i + 1, a + (i + 1) * n, 0.0); // strips reach into it
    for (std::int64_t first = 0; first < n; first += block) {
        const std::int64_t end = std::min(n, first + block), rest = n - end, w = end - first;
        simd::dispatch<CholeskyKernel>(n, first, end, a, floor, static_cast<const double *>(start), &dropped);
        // What comes off the rest, its lower triangle in strips of rows.
        for (std::int64_t i = 0; i < rest; ++i)
            for (std::int64_t j = 0; j < w; ++j) minus[i * w + j] = -a[(end + i) * n + first + j];
        constexpr std::int64_t kStrip = 96;
        for (std::int64_t i = 0; i < rest; i += kStrip) {
            const std::int64_t count = std::min(kStrip, rest - i);
            gemm<double>(MatrixView<const double>(minus + i * w, count, w), MatrixView<const double>(a + end * n + first, i + count, w, n, 1).transposed(),
                         MatrixView<double>(a + (end + i) * n + end, count, i + count, n, 1), true);
        }
    }
    return dropped;
}

std::int64_t pivoted_cholesky(std::int64_t n, double *a, double tolerance, double *l, std::int64_t *order, double *left) {
    Frame frame;
    *left = 0.0;
    PivotedArgs args{n, a, tolerance, l, order, left, frame.take<double>(n), 0};
    simd::dispatch<PivotedKernel>(&args);
    return args.rank;
}

namespace {

// [A 0; B C]⁻¹ = [A⁻¹ 0; -C⁻¹ B A⁻¹ C⁻¹].
void invert_block(std::int64_t n, std::int64_t ld, const double *l, double *inverse, double *work) {
    if (n < kBlocked) return simd::dispatch<InvertKernel>(n, ld, l, inverse);
    const std::int64_t h = n / 2, rest = n - h;
    double *corner = inverse + h * ld;
    invert_block(h, ld, l, inverse, work);
    invert_block(rest, ld, l + h * ld + h, corner + h, work);
    for (std::int64_t i = 0; i < h; ++i) std::fill_n(inverse + i * ld + h, rest, 0.0);
    gemm<double>(MatrixView<const double>(l + h * ld, rest, h, ld, 1), MatrixView<const double>(inverse, h, h, ld, 1), MatrixView<double>(work, rest, h));
    for (std::int64_t i = 0; i < rest * h; ++i) work[i] = -work[i];
    gemm<double>(MatrixView<const double>(corner + h, rest, rest, ld, 1), MatrixView<const double>(work, rest, h), MatrixView<double>(corner, rest, h, ld, 1));
}

} // namespace

void invert_lower(std::int64_t n, const double *l, double *inverse) {
    Frame frame;
    invert_block(n, n, l, inverse, n < kBlocked ? nullptr : frame.take<double>((n / 2 + 1) * (n / 2 + 1)));
}

template <class T> void lq_rows(MatrixView<T> x, double *lower) {
    const std::int64_t l = x.rows;
    constexpr double eps = std::numeric_limits<T>::epsilon();
    if (l > x.cols) throw ValueError("lq_rows: more rows than columns");
    if (l == 0) return;
    Frame frame;
    if (l <= kFewColumns) {
        ColumnQr<T> qr;
        qr.a = MatrixView<const T>(x).transposed();
        qr.q = x.transposed();
        qr.positive = true;
        qr.columns = frame.take<T>(column_qr_room<T>(x.cols, l));
        column_qr(qr);
        if (!qr.good) throw LinAlgError("orthonormalisation: the rows hold NaN or infinity");
        for (std::int64_t i = 0; i < l && lower != nullptr; ++i)
            for (std::int64_t j = 0; j < l; ++j) lower[i * l + j] = j <= i ? double(qr.r[j * l + i]) : 0.0;
        return;
    }
    double *g = frame.take<double>(l * l), *inverse = frame.take<double>(l * l);
    double *product = frame.take<double>(l * l), *next = frame.take<double>(l * l);
    T *w = frame.take<T>(l * l);
    RowBlocks<T> blocks(x.cols);
    blocks.add(x);
    std::fill_n(product, l * l, 0.0);
    for (std::int64_t i = 0; i < l; ++i) product[i * l + i] = 1.0;
    const double good = 5.0 * eps * std::sqrt(double(l));
    for (int pass = 0; pass < 5; ++pass) {
        gram(blocks, 0, g);
        double off = 0, trace = 0;
        for (std::int64_t i = 0; i < l; ++i) {
            for (std::int64_t j = 0; j < i; ++j) off = std::max(off, std::abs(g[i * l + j]));
            off = std::max(off, std::abs(g[i * l + i] - 1.0));
            trace += g[i * l + i];
        }
        if (pass == 0 && !(std::isfinite(trace) && trace > (std::is_same_v<T, float> ? 1e-28 : 1e-280))) {
            // Squares out of range: near one, by a power of two. Rows of zeros go on.
            const double largest = double(max_abs(MatrixView<const T>(x)));
            if (!std::isfinite(largest)) throw LinAlgError("orthonormalisation: the rows hold NaN or infinity");
            if (largest > 0) {
                int e = 0;
                std::frexp(largest, &e);
                for (std::int64_t i = 0; i < l; ++i)
                    for (std::int64_t j = 0; j < x.cols; ++j) x(i, j) = std::ldexp(x(i, j), -e);
                lq_rows(x, lower);
                for (std::int64_t i = 0; i < l * l && lower != nullptr; ++i) lower[i] = std::ldexp(lower[i], e);
                return;
            }
        }
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
                if (lower != nullptr) gemm<double>(MatrixView<const double>(product, l, l), MatrixView<const double>(r, l, l), MatrixView<double>(lower, l, l));
                return;
            }
        }
        invert_lower(l, next, inverse);
        for (std::int64_t i = 0; i < l * l; ++i) w[i] = T(inverse[i]);
        combine(w, blocks, x);
        if (lower != nullptr) {
            gemm<double>(MatrixView<const double>(product, l, l), MatrixView<const double>(next, l, l), MatrixView<double>(inverse, l, l));
            std::copy_n(inverse, l * l, product);
        }
    }
    if (lower != nullptr) std::copy_n(product, l * l, lower);
}

void small_svd(std::int64_t m, std::int64_t n, const double *a, double *s, double *u, double *vt) {
    // Row-major a is column-major aᵀ = V S Uᵀ: LAPACK's left vectors are our right ones.
    const std::int64_t p = std::min(m, n);
    if (p == 0) return;
    const bool vectors = u != nullptr || vt != nullptr;
    if (m == n && p <= (vectors ? kJacobi : kValues)) {
        Frame frame;
        const std::int64_t ld = small::order(p), all = small::area(p);
        double *square = frame.zeros<double>(all), *left = frame.take<double>(all), *right = frame.take<double>(all), *values = frame.take<double>(ld);
        const double top = max_abs_inline(a, p * p);
        if (!std::isfinite(top)) throw LinAlgError("SVD of the small factor: the matrix holds NaN or infinity");
        for (std::int64_t i = 0; i < p; ++i) std::copy_n(a + i * p, p, square + i * ld);
        small::svd(p, square, values, u != nullptr ? left : nullptr, vt != nullptr ? right : nullptr);
        std::copy_n(values, p, s);
        for (std::int64_t i = 0; i < p; ++i)
            for (std::int64_t j = 0; j < p; ++j) {
                if (u != nullptr) u[j * p + i] = left[i * ld + j];
                if (vt != nullptr) vt[i * p + j] = right[i * ld + j];
            }
        return;
    }
    if (p > 20000 || std::max(m, n) > (std::int64_t(1) << 24))
        throw ValueError("SVD of the small factor: " + std::to_string(m) + " x " + std::to_string(n) + " is beyond LP64 LAPACK's work space");
    if (m != n && p <= (vectors ? 80 : kValues)) { // from the square factor of the longer side
        const bool tall = m > n;
        const std::int64_t length = std::max(m, n);
        Frame frame;
        double *q = frame.take<double>(p * length), *l = frame.take<double>(p * p), *left = frame.take<double>(p * p), *right = frame.take<double>(p * p);
        for (std::int64_t i = 0; i < p; ++i)
            for (std::int64_t j = 0; j < length; ++j) q[i * length + j] = tall ? a[j * n + i] : a[i * n + j];
        lq_rows(MatrixView<double>(q, p, length), l);
        small_svd(p, p, l, s, left, right); // tall: Aᵀ = L Q, so A = Qᵀ right s leftᵀ
        const MatrixView<const double> longer(q, p, length);
        if (tall) {
            if (u != nullptr) gemm<double>(longer.transposed(), MatrixView<const double>(right, p, p).transposed(), MatrixView<double>(u, m, p));
            for (std::int64_t i = 0; i < p && vt != nullptr; ++i)
                for (std::int64_t j = 0; j < p; ++j) vt[i * p + j] = left[j * p + i];
        } else {
            if (u != nullptr) std::copy_n(left, p * p, u);
            if (vt != nullptr) gemm<double>(MatrixView<const double>(right, p, p), longer, MatrixView<double>(vt, p, n));
        }
        return;
    }
    struct Job {
        std::vector<double> a, s, left, right, work;
        std::vector<int> iwork;
        int info = 0;
    };
    const std::int64_t need = 4 * p * p + 7 * p + std::max(m, n) + 64 * (m + n);
    const auto job = std::make_shared<Job>();
    job->a.assign(a, a + m * n);
    for (const double x : job->a)
        if (!std::isfinite(x)) throw LinAlgError("SVD of the small factor: the matrix holds NaN or infinity");
    job->s.resize(std::size_t(p));
    job->left.resize(std::size_t(n * p));
    job->right.resize(std::size_t(p * m));
    job->work.resize(std::size_t(need));
    job->iwork.resize(std::size_t(8 * p));
    run_stoppable(22.0 * double(p) * double(p) * double(p), [job, vectors, m, n, p, need] {
        char kind = vectors ? 'S' : 'N';
        int rows = int(n), cols = int(m), pi = int(p), lwork = int(need);
        lapack<double>().gesdd(&kind, &rows, &cols, job->a.data(), &rows, job->s.data(), job->left.data(), &rows, job->right.data(), &pi, job->work.data(),
                               &lwork, job->iwork.data(), &job->info);
    });
    if (job->info != 0) throw LinAlgError("SVD of the small factor: gesdd did not converge");
    std::copy(job->s.begin(), job->s.end(), s);
    if (vt != nullptr)
        for (std::int64_t i = 0; i < p; ++i) std::copy_n(job->left.data() + i * n, n, vt + i * n);
    if (u != nullptr) // right is p x m column-major, column i holds row i of u
        std::copy(job->right.begin(), job->right.end(), u);
}

template void lq_rows<float>(MatrixView<float>, double *);
template void lq_rows<double>(MatrixView<double>, double *);

} // namespace subspan
