#include "subspan/spaces.hpp"

#include "base/amax.hpp"
#include "base/stacks.hpp"
#include "subspan/apply_core.hpp"
#include "subspan/errors.hpp"
#include "subspan/factor.hpp"
#include "subspan/householder_qr.hpp"
#include "subspan/product.hpp"
#include "subspan/orthonormalize.hpp"
#include "subspan/parallel.hpp"
#include "subspan/sizes.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <vector>

namespace subspan {
namespace {

using std::int64_t;

// A contiguous stack with its memory.
template <class T> struct Owned {
    std::unique_ptr<T[]> items;
    StackView<T> view;
    Owned(const std::vector<int64_t> &shape, int64_t rows, int64_t cols, bool zero = false) {
        int64_t count = 1;
        for (const auto n : shape) count *= n;
        const int64_t all = checked_product({count, rows, cols}, "work memory");
        items.reset(new T[std::size_t(std::max<int64_t>(all, 1))]);
        if (zero) std::fill_n(items.get(), all, T(0));
        std::vector<int64_t> strides(shape.size());
        int64_t step = rows * cols;
        for (std::size_t a = shape.size(); a-- > 0;) {
            strides[a] = step;
            step *= shape[a];
        }
        view = {MatrixView<T>(items.get(), rows, cols), shape, strides};
    }
    StackView<const T> read() const { return view; }
};

// A = Q R of a stack.
template <class T> class Factors {
  public:
    explicit Factors(const StackView<const T> &a)
        : m_(a.rows()), k_(std::min(a.rows(), a.cols())), v_(a.shape, m_, k_), r_(a.shape, k_, a.cols()), tau_(a.shape, 1, k_),
          t_(a.shape, k_, std::min(k_, kReflectionBlock)) {
        if (!a.empty()) householder_qr<T>(a, v_.view, r_.view, tau_.view, t_.view);
    }
    int64_t k() const { return k_; }
    const StackView<T> &r() const { return r_.view; }
    // to (m x c) = Q of what its first k rows hold; those below are overwritten.
    void times(const StackView<T> &to) const {
        if (to.empty()) return;
        parallel_for(to.size(), [&](int64_t i) {
            const auto x = to[i];
            for (int64_t r = k_; r < m_; ++r)
                for (int64_t c = 0; c < x.cols; ++c) x(r, c) = T(0);
        });
        apply(to);
    }
    // x = Q x.
    void apply(const StackView<T> &x) const {
        if (k_ > 0) factored_apply<T>(v_.read(), t_.read(), x, Side::left, false, x, false);
    }

  private:
    int64_t m_, k_;
    Owned<T> v_, r_, tau_, t_;
};

// SVD of a small matrix in double: values, left vectors as columns (m x p), right ones as rows (p x n).
struct Svd {
    int64_t m, n, p;
    std::vector<double> s, u, vt;
    template <class T> explicit Svd(MatrixView<T> a, int64_t rows = 0) : m(std::max(a.rows, rows)), n(a.cols), p(std::min(m, n)) {
        std::vector<double> x(std::size_t(m * n), 0.0);
        for (int64_t i = 0; i < a.rows; ++i)
            for (int64_t j = 0; j < n; ++j) x[std::size_t(i * n + j)] = double(a(i, j));
        s.resize(std::size_t(p));
        u.resize(std::size_t(m * p));
        vt.resize(std::size_t(p * n));
        small_svd(m, n, x.data(), s.data(), u.data(), vt.data());
    }
    int64_t above(double cut) const {
        return std::count_if(s.begin(), s.end(), [&](double x) { return x > cut; });
    }
    // Left vectors [first, first + count) into the first rows of `to`; its other columns become zero.
    template <class T> void left(MatrixView<T> to, int64_t count) const {
        for (int64_t i = 0; i < m; ++i)
            for (int64_t j = 0; j < to.cols; ++j) to(i, j) = j < count ? T(u[std::size_t(i * p + j)]) : T(0);
    }
};

// f(item, factor) for the R of each matrix, on all threads.
template <class T, class F> void each_factor(const Factors<T> &f, int64_t count, const F &body) {
    parallel_for(count, [&](int64_t i) { body(i, f.r()[i]); });
}

template <class T> void orthonormal(const StackView<T> &x, const int64_t *counts) {
    for (int64_t i = 0; i < x.size(); ++i)
        if (counts[i] > 0) {
            const StackView<T> some(x[i].block_cols(0, counts[i]));
            orthonormalize<T>(some, some, Orthonormalization::automatic, true);
        }
}

} // namespace

template <class T> void column_space(const StackView<const T> &a, double tol, bool unit_columns, const StackView<T> &q, int64_t *ranks, const char *name) {
    const int64_t m = a.rows(), n = a.cols(), count = a.size();
    std::fill_n(ranks, count, 0);
    if (a.empty()) return;
    Owned<T> scaled(a.shape, m, n);
    parallel_for(count, [&](int64_t i) {
        const auto from = a[i];
        const auto to = scaled.view[i];
        std::vector<T> peak(std::size_t(n), T(0));
        for (int64_t r = 0; r < m; ++r)
            for (int64_t c = 0; c < n; ++c) {
                const T x = std::abs(from(r, c));
                if (!(x <= std::numeric_limits<T>::max())) throw ValueError(std::string(name) + " holds NaN or infinity");
                peak[std::size_t(c)] = std::max(peak[std::size_t(c)], x);
            }
        // By a power of two, which is exact, or each column to unit length; in double, where neither overflows.
        const T top = *std::max_element(peak.begin(), peak.end());
        std::vector<double> factor(std::size_t(n), std::ldexp(1.0, -near_exponent(top)));
        if (unit_columns) {
            std::vector<double> sum(std::size_t(n), 0.0);
            for (int64_t c = 0; c < n; ++c) factor[std::size_t(c)] = std::ldexp(1.0, -near_exponent(peak[std::size_t(c)]));
            for (int64_t r = 0; r < m; ++r)
                for (int64_t c = 0; c < n; ++c) {
                    const double x = double(from(r, c)) * factor[std::size_t(c)];
                    sum[std::size_t(c)] += x * x;
                }
            for (int64_t c = 0; c < n; ++c)
                if (sum[std::size_t(c)] > 0) sum[std::size_t(c)] = 1.0 / std::sqrt(sum[std::size_t(c)]);
            for (int64_t r = 0; r < m; ++r)
                for (int64_t c = 0; c < n; ++c) to(r, c) = T(double(from(r, c)) * factor[std::size_t(c)] * sum[std::size_t(c)]);
            return;
        }
        for (int64_t r = 0; r < m; ++r)
            for (int64_t c = 0; c < n; ++c) to(r, c) = T(double(from(r, c)) * factor[std::size_t(c)]);
    });
    const StackView<const T> x = scaled.view;
    const bool across = m <= n; // X = Rᵀ Qᵀ, and left vectors are those of Rᵀ
    const Factors<T> f(across ? x.transposed() : x);
    each_factor(f, count, [&](int64_t i, MatrixView<T> r) {
        const Svd d(across ? r.transposed() : r);
        ranks[i] = d.above(tol * d.s[0]);
        d.left(q[i], ranks[i]);
    });
    if (!across) f.times(q);
}

template <class T> void complement(const StackView<const T> &u, const StackView<T> &out) {
    const int64_t k = u.cols();
    if (out.empty()) return;
    const auto unit_rows = [&](MatrixView<T> x, int64_t first, int64_t last) {
        for (int64_t r = first; r < last; ++r) {
            if (x.col_stride == 1)
                std::fill_n(&x(r, 0), x.cols, T(0));
            else
                for (int64_t c = 0; c < x.cols; ++c) x(r, c) = T(0);
            if (r >= k) x(r, r - k) = T(1);
        }
    };
    if (out.size() == 1) // rows in parallel, else matrices
        parallel_for(out.rows(), [&](int64_t r) { unit_rows(out[0], r, r + 1); });
    else
        parallel_for(out.size(), [&](int64_t i) { unit_rows(out[i], 0, out.rows()); });
    if (k > 0) Factors<T>(u).apply(out);
}

template <class T> void outside_of(const StackView<const T> &u, const StackView<const T> &w, const StackView<T> &rest) {
    const Basis<T> basis(u);
    apply_core<T>(w, basis, Core<T>(T(-1)), T(1), Side::left, rest, false);
    apply_core<T>(rest, basis, Core<T>(T(-1)), T(1), Side::left, rest, false);
}

template <class T> void span_sum(const StackView<const T> &u, const StackView<const T> &w, double tol, const StackView<T> &extra, int64_t *counts) {
    std::fill_n(counts, extra.size(), 0);
    if (extra.empty()) return;
    outside_of<T>(u, w, extra);
    {
        const Factors<T> f(extra);
        each_factor(f, extra.size(), [&](int64_t i, MatrixView<T> r) {
            const Svd d(r);
            counts[i] = d.above(tol);
            d.left(extra[i], counts[i]);
        });
        f.times(extra);
    }
    outside_of<T>(u, extra, extra);
    orthonormal(extra, counts);
}

template <class T> void span_intersection(const StackView<const T> &u, const StackView<const T> &w, double tol, const StackView<T> &common, int64_t *counts) {
    std::fill_n(counts, common.size(), 0);
    if (common.empty()) return;
    const int64_t l = w.cols();
    Owned<T> rest(common.shape, common.rows(), l);
    outside_of<T>(u, w, rest.view);
    const Factors<T> f(rest.read());
    Owned<T> rotation(common.shape, l, l); // right vectors of the smallest sines, as columns
    each_factor(f, common.size(), [&](int64_t i, MatrixView<T> r) {
        const Svd d(r, l);
        counts[i] = l - d.above(tol);
        const auto to = rotation.view[i];
        for (int64_t x = 0; x < l; ++x)
            for (int64_t c = 0; c < l; ++c) to(x, c) = c < counts[i] ? T(d.vt[std::size_t((l - counts[i] + c) * l + x)]) : T(0);
    });
    product<T>(w, rotation.read(), common);
    orthonormal(common, counts);
}

template <class T> void largest_sines(const StackView<const T> &u, const StackView<const T> &w, double *sines) {
    Owned<T> rest(w.shape, w.rows(), w.cols());
    std::fill_n(sines, w.size(), 0.0);
    if (w.empty()) return;
    outside_of<T>(u, w, rest.view);
    const Factors<T> f(rest.read());
    each_factor(f, w.size(), [&](int64_t i, MatrixView<T> r) { sines[i] = Svd(r).s[0]; });
}

template <class T>
void compose(const StackView<const T> &u, const StackView<const T> &w, int64_t shared, double tol, const StackView<T> &basis, int64_t *counts) {
    const int64_t s = u.rows() - shared, k = u.cols(), l = w.cols(), both = k + l;
    std::fill_n(counts, basis.size(), 0);
    if (basis.empty()) return;
    // The null space of [U_y, -W_y]: pairs of coordinates that give one y.
    Owned<T> joint(basis.shape, shared, both);
    for (int64_t i = 0; i < basis.size(); ++i) {
        const auto x = u[i], y = w[i];
        const auto to = joint.view[i];
        for (int64_t r = 0; r < shared; ++r)
            for (int64_t c = 0; c < both; ++c) to(r, c) = c < k ? x(s + r, c) : -y(r, c - k);
    }
    const Factors<T> first(joint.read());
    Owned<T> ends(basis.shape, basis.rows(), both, true);
    for (int64_t i = 0; i < basis.size(); ++i) {
        const Svd d(first.r()[i], both);
        const int64_t free = both - d.above(tol);
        Owned<T> null({}, both, free);
        for (int64_t c = 0; c < free; ++c)
            for (int64_t r = 0; r < both; ++r) null.view.first(r, c) = T(d.vt[std::size_t((both - free + c) * both + r)]);
        if (free == 0) continue;
        const MatrixView<const T> n = null.view.first;
        const auto to = ends.view[i].block_cols(0, free);
        const auto x = u[i], y = w[i];
        if (s > 0 && k > 0) product<T>(StackView<const T>(x.block_rows(0, s)), StackView<const T>(n.block_rows(0, k)), StackView<T>(to.block_rows(0, s)));
        if (basis.rows() > s && l > 0)
            product<T>(StackView<const T>(y.block_rows(shared, basis.rows() - s)), StackView<const T>(n.block_rows(k, l)),
                       StackView<T>(to.block_rows(s, basis.rows() - s)));
    }
    // Not relative: a pair whose ends vanish is a loop over the shared coordinates, and spans nothing.
    const Factors<T> second(ends.read());
    each_factor(second, basis.size(), [&](int64_t i, MatrixView<T> r) {
        const Svd d(r);
        counts[i] = d.above(tol);
        d.left(basis[i], counts[i]);
    });
    second.times(basis);
}

template <class T> void rotation(int64_t n, const double *source, const double *target, MatrixView<T> v, MatrixView<T> m) {
    std::vector<double> s(source, source + n), t(target, target + n), e(static_cast<std::size_t>(n));
    const auto unit = [&](std::vector<double> &x, const char *name) {
        double top = 0, sum = 0;
        for (const double y : x) {
            if (!std::isfinite(y)) throw ValueError(std::string(name) + " holds NaN or infinity");
            top = std::max(top, std::abs(y));
        }
        if (top == 0) throw ValueError(std::string(name) + " is zero and gives no direction");
        for (double &y : x) sum += (y / top) * (y / top);
        for (double &y : x) y = y / top / std::sqrt(sum);
    };
    unit(s, "source");
    unit(t, "target");
    // Of half sums and differences, which lose no digits where the two directions are close.
    double plus = 0, minus = 0, along = 0, again = 0, length = 0;
    for (std::size_t i = 0; i < s.size(); ++i) {
        plus += (s[i] + t[i]) * (s[i] + t[i]);
        minus += (s[i] - t[i]) * (s[i] - t[i]);
        along += s[i] * (t[i] - s[i]);
    }
    plus = std::sqrt(plus);
    minus = std::sqrt(minus);
    if (plus < 1e-12) throw ValueError("source and target are opposite: no plane is preferred to rotate in");
    for (std::size_t i = 0; i < s.size(); ++i) {
        e[i] = t[i] - s[i] - s[i] * along;
        again += s[i] * e[i];
    }
    for (std::size_t i = 0; i < s.size(); ++i) {
        e[i] -= s[i] * again;
        length += e[i] * e[i];
    }
    length = std::sqrt(length);
    for (int64_t i = 0; i < n; ++i) {
        v(i, 0) = T(s[std::size_t(i)]);
        v(i, 1) = T(length > 0 ? e[std::size_t(i)] / length : e[std::size_t(i)]);
    }
    const double sine = plus * minus / 2, less = -(minus * minus) / 2; // less: cosine - 1
    m(0, 0) = m(1, 1) = T(less);
    m(0, 1) = T(-sine);
    m(1, 0) = T(sine);
}

#define SUBSPAN_INSTANTIATE(T)                                                                                                                                 \
    template void column_space<T>(const StackView<const T> &, double, bool, const StackView<T> &, int64_t *, const char *);                                    \
    template void complement<T>(const StackView<const T> &, const StackView<T> &);                                                                             \
    template void outside_of<T>(const StackView<const T> &, const StackView<const T> &, const StackView<T> &);                                                 \
    template void span_sum<T>(const StackView<const T> &, const StackView<const T> &, double, const StackView<T> &, int64_t *);                                \
    template void span_intersection<T>(const StackView<const T> &, const StackView<const T> &, double, const StackView<T> &, int64_t *);                       \
    template void largest_sines<T>(const StackView<const T> &, const StackView<const T> &, double *);                                                          \
    template void compose<T>(const StackView<const T> &, const StackView<const T> &, int64_t, double, const StackView<T> &, int64_t *);                        \
    template void rotation<T>(int64_t, const double *, const double *, MatrixView<T>, MatrixView<T>);
SUBSPAN_INSTANTIATE(float)
SUBSPAN_INSTANTIATE(double)
#undef SUBSPAN_INSTANTIATE

} // namespace subspan
