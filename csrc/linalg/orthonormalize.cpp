#include "subspan/orthonormalize.hpp"

#include "base/amax.hpp"
#include "linalg/column_qr.hpp"
#include "linalg/small_dense.hpp"
#include "base/scratch.hpp"
#include "base/stacks.hpp"
#include "linalg/apply_lanes.hpp"
#include "subspan/errors.hpp"
#include "subspan/factor.hpp"
#include "subspan/householder_qr.hpp"
#include "subspan/gemm.hpp"
#include "subspan/parallel.hpp"
#include "subspan/rng.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

namespace subspan {
namespace {

using std::int64_t;

template <class T> void copy(MatrixView<const T> from, MatrixView<T> to) {
    for (int64_t i = 0; i < from.rows; ++i)
        for (int64_t j = 0; j < from.cols; ++j) to(i, j) = from(i, j);
}

// Whether reflections cost less than Cholesky QR: of a panel of columns, and of matrices that are so near to square that a Gram
// matrix is hardly smaller, and rarely good enough at once (500²: 2.9 against 11.7 ms; 500 x 250: even; 500 x 125: 0.44 against
// 0.32).
bool reflections_pay(int64_t m, int64_t k) { return k <= 32 || 2 * k >= m; }

template <class T> void factor_columns(MatrixView<const T> a, Frame &frame, ColumnQr<T> &qr) {
    qr.a = a;
    qr.columns = frame.take<T>(column_qr_room<T>(a.rows, a.cols));
    column_qr(qr);
    if (!qr.good) throw ValueError("A holds NaN or infinity");
}

// How many columns do not depend on those before them, by R.
template <class T> int64_t rank_of(int64_t m, MatrixView<const T> r, bool complete) {
    int64_t rank = 0;
    for (int64_t j = 0; j < r.cols; ++j) {
        double length = 0;
        for (int64_t i = 0; i <= j; ++i) length = std::max(length, std::abs(double(r(i, j))));
        if (std::abs(double(r(j, j))) > double(m) * std::numeric_limits<T>::epsilon() * length)
            ++rank;
        else if (!complete)
            dependent_column(j);
    }
    return rank;
}

// Householder QR; q may be a; with `positive` the diagonal of R is. Returns how many columns do not depend on those before them.
template <class T> int64_t by_householder(MatrixView<const T> a, MatrixView<T> q, bool complete, bool positive = false) {
    const int64_t m = a.rows, k = a.cols;
    Frame frame;
    if (few_columns<T>(m, k)) {
        ColumnQr<T> qr;
        factor_columns<T>(a, frame, qr);
        const int64_t rank = rank_of<T>(m, MatrixView<const T>(qr.r, k, k), complete);
        double signs[kFewColumns * kFewColumns] = {};
        for (int64_t j = 0; j < k; ++j) signs[j * k + j] = positive && qr.r[j * k + j] < T(0) ? -1.0 : 1.0;
        column_q<T>(qr, signs, q);
        return rank;
    }
    const MatrixView<T> v(frame.take<T>(m * k), m, k), r(frame.take<T>(k * k), k, k);
    const MatrixView<T> t(frame.take<T>(k * std::min(k, kReflectionBlock)), k, std::min(k, kReflectionBlock));
    const MatrixView<T> tau(frame.take<T>(k), 1, k);
    householder_qr<T>(StackView<const T>(a), v, r, tau, t);
    const int64_t rank = rank_of<T>(m, MatrixView<const T>(r), complete);
    factored_array<T>(StackView<const T>(v), MatrixView<const T>(t), q);
    if (positive) { // with the signs that Cholesky's factors have: the diagonal of R is positive
        T *signs = frame.take<T>(k);
        bool turned = false;
        for (int64_t j = 0; j < k; ++j) {
            signs[j] = r(j, j) < T(0) ? T(-1) : T(1);
            turned = turned || signs[j] < T(0);
        }
        for (int64_t i = 0; i < m && turned; ++i)
            for (int64_t j = 0; j < k; ++j) q(i, j) *= signs[j];
    }
    return rank;
}

// Shifted Cholesky QR; false where it does not get through: columns that it cannot tell from dependent ones are
// Householder's, whose backward error does not grow with the condition. q must not be a.
template <class T> bool by_cholesky(MatrixView<const T> a, MatrixView<T> q) {
    constexpr double eps = std::numeric_limits<T>::epsilon();
    const int64_t m = a.rows, k = a.cols;
    Frame frame;
    double *g = frame.take<double>(k * k), *l = frame.take<double>(k * k), *inverse = frame.take<double>(k * k);
    double *scale = frame.take<double>(k), *diagonal = frame.take<double>(k);
    T *w = frame.take<T>(k * k);
    std::fill_n(diagonal, k, 1.0);
    const double good = 5.0 * eps * std::sqrt(double(k));
    MatrixView<const T> x = a;
    for (int pass = 0; pass < 6; ++pass) {
        RowBlocks<T> blocks(m);
        blocks.add(x.transposed());
        gram(blocks, 0, g);
        double off = 0;
        for (int64_t i = 0; i < k; ++i) {
            if (!(g[i * k + i] > 1e3 * double(std::numeric_limits<T>::min()) / eps) || !std::isfinite(g[i * k + i])) return false;
            off = std::max(off, std::abs(g[i * k + i] - 1.0));
            for (int64_t j = 0; j < i; ++j) off = std::max(off, std::abs(g[i * k + j]));
        }
        if (!std::isfinite(off)) return false;
        if (off <= good && pass > 0) {
            for (int64_t j = 0; j < k; ++j)
                if (!(diagonal[j] > double(m) * eps)) return false;
            return true;
        }
        // Columns of unit length: grading costs nothing, and the shift is in proportion for each of them.
        for (int64_t i = 0; i < k; ++i) scale[i] = 1.0 / std::sqrt(g[i * k + i]);
        for (int64_t i = 0; i < k; ++i)
            for (int64_t j = 0; j <= i; ++j) g[i * k + j] = i == j ? 1.0 : g[i * k + j] * scale[i] * scale[j];
        std::copy_n(g, k * k, l);
        if (cholesky(k, l, 8.0 * eps) > 0) {
            const double shift = 11.0 * eps * (std::sqrt(double(m)) + std::sqrt(double(k))) * std::sqrt(double(k));
            std::copy_n(g, k * k, l);
            for (int64_t i = 0; i < k; ++i) l[i * k + i] += shift;
            if (pass >= 2 || cholesky(k, l, 0.0) > 0) return false;
        }
        // What is left of each column outside of those before it, as a part of its own length at first.
        for (int64_t j = 0; j < k; ++j) diagonal[j] *= l[j * k + j] / (pass == 0 ? 1.0 : scale[j]);
        invert_lower(k, l, inverse);
        for (int64_t i = 0; i < k; ++i)
            for (int64_t j = 0; j < k; ++j) w[j * k + i] = T(inverse[i * k + j] * scale[j]);
        gemm<T>(x, MatrixView<const T>(w, k, k), q);
        x = q;
    }
    return false;
}

// Of the upper triangular r, from below: a few steps of the power method.
double norm_estimate(int64_t k, const double *r) {
    Frame frame;
    double *x = frame.take<double>(k), *y = frame.take<double>(k), last = 0;
    const Philox rng{0x9015}; // a direction that the start has nothing of would be missed
    for (int64_t i = 0; i < k; ++i) {
        double four[4];
        rng.normal4(std::uint64_t(i), four);
        x[i] = four[0];
    }
    for (int step = 0; step < 6; ++step) {
        double length = 0;
        for (int64_t i = 0; i < k; ++i) length += x[i] * x[i];
        length = std::sqrt(length);
        if (!(length > 0)) break;
        std::fill_n(y, k, 0.0);
        last = 0;
        for (int64_t i = 0; i < k; ++i) {
            double sum = 0;
            for (int64_t j = i; j < k; ++j) sum += r[i * k + j] * x[j];
            sum /= length;
            last += sum * sum;
            for (int64_t j = i; j < k; ++j) y[j] += sum * r[i * k + j];
        }
        std::swap(x, y);
    }
    return std::sqrt(last);
}

// The orthogonal polar factor of the square r, in place; false when r is singular to working precision.
bool halley(int64_t k, double *r) {
    Frame frame;
    const int64_t kk = k * k;
    double top = 0, one = 0, inf = 0;
    for (int64_t i = 0; i < kk; ++i) top = std::max(top, std::abs(r[i]));
    if (!(top > 0)) return false;
    for (int64_t i = 0; i < kk; ++i) r[i] /= top;
    double *sums = frame.zeros<double>(k);
    for (int64_t i = 0; i < k; ++i) {
        double row = 0;
        for (int64_t j = 0; j < k; ++j) {
            row += std::abs(r[i * k + j]);
            sums[j] += std::abs(r[i * k + j]);
        }
        inf = std::max(inf, row);
    }
    for (int64_t j = 0; j < k; ++j) one = std::max(one, sums[j]);
    double norm = std::sqrt(one * inf); // at least the spectral norm, several times that of a large matrix
    if (k > 32) norm = std::min(norm, 1.2 * norm_estimate(k, r));
    for (int64_t i = 0; i < kk; ++i) r[i] /= norm;
    // 1 / ||R⁻¹||_F is a lower bound of the least singular value.
    double *l = frame.take<double>(kk), *inverse = frame.take<double>(kk), *z = frame.take<double>(kk);
    for (int64_t i = 0; i < k; ++i)
        for (int64_t j = 0; j < k; ++j) l[i * k + j] = j <= i ? r[j * k + i] : 0.0;
    for (int64_t i = 0; i < k; ++i)
        if (l[i * k + i] == 0.0) return false;
    invert_lower(k, l, inverse);
    double sum = 0;
    for (int64_t i = 0; i < kk; ++i) sum += inverse[i] * inverse[i];
    double low = 1.0 / std::sqrt(sum);
    if (!(low > 1e-15)) return false;
    low = std::min(low, 1.0);
    // A step of Newton's iteration, since R⁻¹ is there: singular values s become (s / √low + √low / s) / 2, none less than one.
    // (Explicit inverses of blocks have no small residual where that is far from one.)
    const double balance = std::sqrt(low);
    for (int64_t i = 0; i < k && low > 1e-8; ++i)
        for (int64_t j = 0; j < k; ++j) r[i * k + j] = (r[i * k + j] / balance + balance * inverse[i * k + j]) * (balance / (1.0 + low));
    if (low > 1e-8) low = std::min(1.0, 2.0 * balance / (1.0 + low));
    double *next = frame.take<double>(kk);
    for (int step = 0; step < 12; ++step) {
        const double l2 = low * low, d = std::cbrt(4.0 * (1.0 - l2) / (l2 * l2));
        const double a = std::sqrt(1.0 + d) + 0.5 * std::sqrt(8.0 - 4.0 * d + 8.0 * (2.0 - l2) / (l2 * std::sqrt(1.0 + d)));
        const double b = (a - 1.0) * (a - 1.0) / 4.0, c = a + b - 1.0;
        const MatrixView<const double> x(r, k, k);
        const double first = b / c;
        double off = 1.0;
        if (1.0 - low < 1e-3) {
            gram(RowBlocks<double>(k).add(x.transposed()), 0, z);
            off = 0;
            for (int64_t i = 0; i < k; ++i) {
                double row = 0;
                for (int64_t j = 0; j < k; ++j) row += std::abs((j <= i ? z[i * k + j] : z[j * k + i]) - (i == j ? 1.0 : 0.0));
                if (!(row <= off)) off = row; // NaN stays
            }
        }
        // X (3 I - XᵀX) / 2 leaves the square of that, and is two products; where singular values were above one, as those may be
        // whose norm was underestimated, the other step brings them down first.
        if (off < 0.5) {
            for (int64_t i = 0; i < k; ++i)
                for (int64_t j = 0; j <= i; ++j) z[i * k + j] = z[j * k + i] = (i == j ? 1.5 : 0.0) - 0.5 * z[i * k + j];
            gemm<double>(x, MatrixView<const double>(z, k, k), MatrixView<double>(next, k, k));
            std::copy_n(next, kk, r);
            if (off < 1e-8) return true;
            continue;
        }
        if (c > 1000.0) {
            // [√c X; I] = [Q1; Q2] R, and X (I + c XᵀX)⁻¹ = Q1 Q2ᵀ / √c: stable for any condition.
            Frame inner;
            const MatrixView<double> stacked(inner.zeros<double>(2 * kk), 2 * k, k), v(inner.take<double>(2 * kk), 2 * k, k);
            const MatrixView<double> tri(inner.take<double>(kk), k, k), tau(inner.take<double>(k), 1, k);
            const int64_t nb = std::min(k, kReflectionBlock);
            const MatrixView<double> t(inner.take<double>(k * nb), k, nb);
            const double root = std::sqrt(c);
            for (int64_t i = 0; i < kk; ++i) stacked.data[i] = root * r[i];
            for (int64_t i = 0; i < k; ++i) stacked(k + i, i) = 1.0;
            householder_qr<double>(StackView<const double>(stacked), v, tri, tau, t);
            factored_array<double>(StackView<const double>(v), MatrixView<const double>(t), stacked);
            gemm<double>(stacked.block_rows(0, k), MatrixView<const double>(stacked.block_rows(k, k)).transposed(), MatrixView<double>(next, k, k));
            const double second = (a - first) / root;
            for (int64_t i = 0; i < kk; ++i) next[i] = first * r[i] + second * next[i];
        } else {
            gram(RowBlocks<double>(k).add(x.transposed()), 0, z);
            for (int64_t i = 0; i < kk; ++i) z[i] *= c;
            for (int64_t i = 0; i < k; ++i) z[i * k + i] += 1.0;
            if (cholesky(k, z, 0.0) > 0) return false;
            invert_lower(k, z, inverse);
            gram(RowBlocks<double>(k).add(MatrixView<const double>(inverse, k, k).transposed()), 0, z); // (I + c XᵀX)⁻¹
            for (int64_t i = 0; i < k; ++i)
                for (int64_t j = 0; j < i; ++j) z[j * k + i] = z[i * k + j];
            gemm<double>(x, MatrixView<const double>(z, k, k), MatrixView<double>(next, k, k));
            const double second = a - first;
            for (int64_t i = 0; i < kk; ++i) next[i] = first * r[i] + second * next[i];
        }
        double change = 0;
        for (int64_t i = 0; i < kk; ++i) {
            change += (next[i] - r[i]) * (next[i] - r[i]);
            r[i] = next[i];
        }
        low = std::min(1.0, low * (a + b * l2) / (1.0 + c * l2));
        // Cubic convergence: the next change would be of the order of this one cubed.
        if (1.0 - low < 1e-14 && std::sqrt(change) < 1e-5 * std::sqrt(double(k)) && off < 1.0) return true;
    }
    return false;
}

template <class T> int64_t by_polar(MatrixView<const T> a, MatrixView<T> q, bool complete) {
    const int64_t m = a.rows, k = a.cols;
    Frame frame;
    if (k <= 8) { // the polar factor of R goes into Q where that is formed
        ColumnQr<T> qr;
        factor_columns<T>(a, frame, qr);
        const int64_t rank = rank_of<T>(m, MatrixView<const T>(qr.r, k, k), complete), ld = small::order(k);
        double w[kFewColumns * kFewColumns];
        double *r = frame.zeros<double>(small::area(k)), *x = frame.take<double>(small::area(k)), *y = frame.take<double>(small::area(k)),
               *s = frame.take<double>(ld);
        for (int64_t i = 0; i < k; ++i)
            for (int64_t j = i; j < k; ++j) r[i * ld + j] = double(qr.r[i * k + j]);
        small::svd(k, r, s, x, y);
        small::multiply_tn(k, x, y, r);
        for (int64_t i = 0; i < k; ++i)
            for (int64_t j = 0; j < k; ++j) w[i * k + j] = r[i * ld + j];
        column_q<T>(qr, w, q);
        return rank;
    }
    const MatrixView<T> basis(frame.take<T>(m * k), m, k), rt(frame.take<T>(k * k), k, k);
    int64_t rank = k;
    if (reflections_pay(m, k) || !by_cholesky<T>(a, basis)) rank = by_householder<T>(a, basis, complete);
    gemm<T>(MatrixView<const T>(basis).transposed(), a, rt);
    double *r = frame.zeros<double>(k * k);
    for (int64_t i = 0; i < k; ++i)
        for (int64_t j = i; j < k; ++j) r[i * k + j] = double(rt(i, j));
    double *kept = frame.take<double>(k * k);
    std::copy_n(r, k * k, kept);
    if (!halley(k, r)) {
        // Singular: any orthogonal factor between the singular vectors is nearest.
        double *s = frame.take<double>(k), *u = frame.take<double>(k * k), *vt = frame.take<double>(k * k);
        small_svd(k, k, kept, s, u, vt);
        gemm<double>(MatrixView<const double>(u, k, k), MatrixView<const double>(vt, k, k), MatrixView<double>(r, k, k));
    }
    for (int64_t i = 0; i < k * k; ++i) rt.data[i] = T(r[i]);
    gemm<T>(MatrixView<const T>(basis), MatrixView<const T>(rt), basis);
    // What rounding left of UᵀU - I is measured, and taken off by U (3 I - UᵀU) / 2, which keeps the polar factor.
    double *g = frame.take<double>(k * k);
    for (int pass = 0; pass < 3; ++pass) {
        RowBlocks<T> blocks(m);
        blocks.add(MatrixView<const T>(basis).transposed());
        gram(blocks, 0, g);
        double off = 0;
        for (int64_t i = 0; i < k; ++i)
            for (int64_t j = 0; j <= i; ++j) {
                const double d = std::abs(g[i * k + j] - (i == j ? 1.0 : 0.0));
                if (!(d <= off)) off = d; // NaN stays
            }
        if (!std::isfinite(off)) throw LinAlgError("orthonormalize: the polar factor was not found");
        if (off <= 4.0 * std::numeric_limits<T>::epsilon() * std::sqrt(double(k))) break;
        for (int64_t i = 0; i < k; ++i)
            for (int64_t j = 0; j <= i; ++j) rt(i, j) = rt(j, i) = T((i == j ? 1.5 : 0.0) - 0.5 * g[i * k + j]);
        gemm<T>(MatrixView<const T>(basis), MatrixView<const T>(rt), basis);
    }
    copy<T>(basis, q);
    return rank;
}

// Returns the rank that was seen.
template <class T> int64_t one(MatrixView<const T> a, MatrixView<T> q, Orthonormalization method, bool complete) {
    if (method == Orthonormalization::householder) return by_householder<T>(a, q, complete);
    if (method == Orthonormalization::automatic && reflections_pay(a.rows, a.cols)) return by_householder<T>(a, q, complete, true);
    // Entries far from one would lose their squares.
    const T top = max_abs(a);
    int e = 0;
    if (top > T(0)) std::frexp(double(top), &e);
    Frame frame;
    if (std::abs(e) > 40) {
        T *scaled = frame.take<T>(a.rows * a.cols);
        for (int64_t i = 0; i < a.rows; ++i)
            for (int64_t j = 0; j < a.cols; ++j) scaled[i * a.cols + j] = T(std::ldexp(double(a(i, j)), -e));
        a = {scaled, a.rows, a.cols};
    }
    if (method == Orthonormalization::polar) return by_polar<T>(a, q, complete);
    if (by_cholesky<T>(a, q)) return a.cols;
    if (method == Orthonormalization::cholesky)
        throw LinAlgError("orthonormalize: Cholesky QR cannot separate the columns of A; use method 'auto' or 'householder'");
    return by_householder<T>(a, q, complete);
}

} // namespace

template <class T> void orthonormalize(const StackView<const T> &a, const StackView<T> &q, Orthonormalization method, bool complete, int64_t *ranks) {
    const int64_t m = a.rows(), k = a.cols(), items = a.size();
    if (k > m) throw ValueError("A has " + std::to_string(k) + " columns of " + std::to_string(m) + " entries: so many cannot be orthonormal");
    if (ranks != nullptr) std::fill_n(ranks, items, int64_t(0));
    if (k == 0) return;
    if (!all_finite<T>(a)) throw ValueError("A holds NaN or infinity");
    const auto run = [&](int64_t i) {
        const auto ai = a[i];
        const auto qi = q[i];
        if (ai.data == qi.data && method != Orthonormalization::householder) {
            // A is needed until it is known which way gets through, and must be whole when nothing does.
            Frame frame;
            const MatrixView<T> out(frame.take<T>(m * k), m, k);
            const int64_t rank = one<T>(ai, out, method, complete);
            if (ranks != nullptr) ranks[i] = rank;
            copy<T>(out, qi);
        } else {
            const int64_t rank = one<T>(ai, qi, method, complete);
            if (ranks != nullptr) ranks[i] = rank;
        }
    };
    if (items == 1) return run(0);
    if (a.first.data == q.first.data && (!complete || method == Orthonormalization::cholesky)) {
        // One matrix may raise after another one is done: all of them are found before any is written.
        Frame frame;
        T *all = frame.take<T>(items * m * k);
        parallel_for(items, [&](int64_t i) {
            const int64_t rank = one<T>(a[i], MatrixView<T>(all + i * m * k, m, k), method, complete);
            if (ranks != nullptr) ranks[i] = rank;
        });
        for (int64_t i = 0; i < items; ++i) copy<T>(MatrixView<const T>(all + i * m * k, m, k), q[i]);
        return;
    }
    parallel_for(items, run);
}

template <class T> void random_orthogonal(std::uint64_t key, const StackView<T> &q) {
    const int64_t n = q.rows(), k = q.cols(), items = q.size();
    if (k > n) throw ValueError("k must be at most n");
    const Philox rng{key};
    const std::uint64_t blocks = (std::uint64_t(n) * std::uint64_t(k) + 3) / 4;
    const auto run = [&](int64_t i) {
        Frame frame;
        const int64_t nb = std::min(k, kReflectionBlock);
        T *x = frame.take<T>(int64_t(blocks) * 4);
        for (std::uint64_t b = 0; b < blocks; ++b) {
            if (b % 65536 == 0) poll();
            double z[4];
            rng.normal4(std::uint64_t(i) * blocks + b, z);
            for (int j = 0; j < 4; ++j) x[b * 4 + std::uint64_t(j)] = T(z[j]);
        }
        const MatrixView<T> v(frame.take<T>(n * k), n, k), r(frame.take<T>(k * k), k, k), tau(frame.take<T>(k), 1, k);
        const MatrixView<T> t(frame.take<T>(k * nb), k, nb);
        householder_qr<T>(StackView<const T>(MatrixView<const T>(x, n, k)), v, r, tau, t);
        const auto qi = q[i];
        factored_array<T>(StackView<const T>(v), MatrixView<const T>(t), qi);
        for (int64_t p = 0; p < n; ++p) {
            poll();
            for (int64_t j = 0; j < k; ++j)
                if (r(j, j) < T(0)) qi(p, j) = -qi(p, j);
        }
    };
    if (n == 0 || k == 0) return;
    if (items == 1) return run(0);
    parallel_for(items, run);
}

namespace {

// r = UᵀU z for two z, by one pass over U. Sums in eights, which the compiler turns into vectors.
template <class T> struct ProbeKernel {
    static constexpr int kSums = 8;
    static SUBSPAN_INLINE void dots(int64_t count, const T *x, int64_t step, const double *u, const double *v, double &a, double &b) {
        double sum_u[kSums] = {}, sum_v[kSums] = {};
        int64_t j = 0;
        for (; step == 1 && j + kSums <= count; j += kSums)
            for (int l = 0; l < kSums; ++l) {
                sum_u[l] += u[j + l] * double(x[j + l]);
                sum_v[l] += v[j + l] * double(x[j + l]);
            }
        for (; j < count; ++j) {
            a += u[j] * double(x[j * step]);
            b += v[j] * double(x[j * step]);
        }
        for (int l = 0; l < kSums; ++l) a += sum_u[l], b += sum_v[l];
    }
    // Rows of K entries, with everything of a column in registers.
    template <int K> static SUBSPAN_INLINE void few(const MatrixView<const T> *u, const double *z, double *r) {
        double p[K], q[K], to_a[K] = {}, to_b[K] = {};
        for (int j = 0; j < K; ++j) p[j] = z[j], q[j] = z[K + j];
        const auto rows = [&](const T *row, int64_t count, int64_t step) SUBSPAN_LAMBDA_INLINE {
            for (int64_t i = 0; i < count; ++i, row += step) {
                double x[K], a[4] = {}, b[4] = {};
#pragma GCC unroll 16
                for (int j = 0; j < K; ++j) {
                    x[j] = double(row[j]);
                    a[j % 4] += p[j] * x[j];
                    b[j % 4] += q[j] * x[j];
                }
                const double sum_a = (a[0] + a[1]) + (a[2] + a[3]), sum_b = (b[0] + b[1]) + (b[2] + b[3]);
#pragma GCC unroll 16
                for (int j = 0; j < K; ++j) {
                    to_a[j] += sum_a * x[j];
                    to_b[j] += sum_b * x[j];
                }
            }
        };
        // GCC 12 fills a vector with the row after the one that is worked on: the last one is read from a copy.
        rows(u->data, u->rows - 1, u->row_stride);
        T last[4 * K] = {};
        std::copy_n(u->data + (u->rows - 1) * u->row_stride, K, last);
        rows(last, 1, K);
        for (int j = 0; j < K; ++j) r[j] = to_a[j], r[K + j] = to_b[j];
    }
    template <int K> static SUBSPAN_INLINE bool few_of(const MatrixView<const T> *u, const double *z, double *r) {
        if constexpr (K > 0) {
            if (u->cols != K) return few_of<K - 1>(u, z, r);
            few<K>(u, z, r);
            return true;
        }
        return false;
    }
    template <int Bytes> static SUBSPAN_INLINE void run(const MatrixView<const T> *u, const double *z, double *y, double *r) {
        const int64_t n = u->rows, k = u->cols;
        std::fill_n(r, 2 * k, 0.0);
        if (u->col_stride == 1 && u->row_stride >= k && n > 0 && few_of<12>(u, z, r)) return;
        if (u->row_stride == 1 && u->col_stride != 1) { // columns are contiguous
            std::fill_n(y, 2 * n, 0.0);
            for (int64_t j = 0; j < k; ++j) {
                const T *__restrict x = u->data + j * u->col_stride;
                double *__restrict a = y, *__restrict b = y + n;
                const double p = z[j], q = z[k + j];
                for (int64_t i = 0; i < n; ++i) {
                    a[i] += p * double(x[i]);
                    b[i] += q * double(x[i]);
                }
            }
            for (int64_t j = 0; j < k; ++j) dots(n, u->data + j * u->col_stride, 1, y, y + n, r[j], r[k + j]);
            return;
        }
        for (int64_t i = 0; i < n; ++i) {
            const T *__restrict row = u->data + i * u->row_stride;
            const int64_t step = u->col_stride;
            double a = 0, b = 0;
            dots(k, row, step, z, z + k, a, b);
            double *__restrict to_a = r, *__restrict to_b = r + k;
            for (int64_t j = 0; step == 1 && j < k; ++j) {
                to_a[j] += a * double(row[j]);
                to_b[j] += b * double(row[j]);
            }
            for (int64_t j = 0; step != 1 && j < k; ++j) {
                to_a[j] += a * double(row[j * step]);
                to_b[j] += b * double(row[j * step]);
            }
        }
    }
};

} // namespace

template <class T> double orthonormality_defect(const StackView<const T> &stack) {
    const StackView<const T> u = distinct(stack);
    const int64_t n = u.rows(), k = u.cols(), items = u.size();
    double worst = 0;
    if (k == 0) return 0;
    Frame frame;
    double *z = frame.take<double>(2 * k), *r = frame.take<double>(2 * k);
    const Philox rng{0x5ab5};
    for (int64_t j = 0; j < 2 * k; ++j) {
        double x[4];
        rng.uniform4(std::uint64_t(j), x);
        z[j] = x[0] < 0 ? -1.0 : 1.0;
    }
    const auto &first = u.first;
    const bool whole = (first.col_stride == 1 && first.row_stride == k) || (first.row_stride == 1 && first.col_stride == n);
    if (int64_t step = 0; whole && n <= 256 && simd::lanes_pay<T>(items, n, 1, k, true) && even_steps(u, step))
        return simd::defect_lanes<T>(first.data, items, step, n, k, first.row_stride, first.col_stride, z);
    double *y = frame.take<double>(2 * n);
    for (int64_t i = 0; i < items; ++i) {
        poll();
        const auto ui = u[i];
        simd::dispatch<ProbeKernel<T>, const MatrixView<const T> *, const double *, double *, double *>(&ui, z, y, r);
        for (int half = 0; half < 2; ++half) {
            double sum = 0;
            for (int64_t j = half * k; j < (half + 1) * k; ++j) sum += (r[j] - z[j]) * (r[j] - z[j]);
            const double defect = std::sqrt(sum / double(k));
            if (std::isnan(defect)) return defect;
            worst = std::max(worst, defect);
        }
    }
    return worst;
}

template <class T> bool all_finite(const StackView<const T> &stack) {
    const StackView<const T> x = distinct(stack);
    // Matrices that lie one after the other are one: a call for each of a few numbers would cost more than they.
    StackView<const T> rows = x, cols = x.transposed();
    if (merge_axes(rows)) return all_finite<T>(rows.first);
    if (merge_axes(cols)) return all_finite<T>(cols.first);
    for (int64_t i = 0; i < x.size(); ++i) {
        poll();
        if (!all_finite<T>(x[i])) return false;
    }
    return true;
}

#define SUBSPAN_INSTANTIATE(T)                                                                                                                                 \
    template void orthonormalize<T>(const StackView<const T> &, const StackView<T> &, Orthonormalization, bool, int64_t *);                                    \
    template void random_orthogonal<T>(std::uint64_t, const StackView<T> &);                                                                                   \
    template double orthonormality_defect<T>(const StackView<const T> &);                                                                                      \
    template bool all_finite<T>(const StackView<const T> &);
SUBSPAN_INSTANTIATE(float)
SUBSPAN_INSTANTIATE(double)
#undef SUBSPAN_INSTANTIATE

} // namespace subspan
