#include "plucker/exterior_tables.hpp"
#include "linalg/small_dense.hpp"

namespace subspan {

using namespace exterior;

namespace {

// Minors of tall matrices with more columns than half of their rows, through the orthogonal complement: with A = Q₁ R and
// the rest Q₂ of the orthogonal matrix, p_I(A) = det R · det Q · sgn(I, Iᶜ) · p_{Iᶜ}(Q₂). That has n - k columns.
class Complement {
  public:
    // From here on the way through the wedges of the first columns is longer than what is wanted.
    static bool pays(int64_t n, int64_t k) {
        int64_t total = 0;
        for (int64_t q = 0; q <= k && total >= 0 && total <= 4096; ++q) {
            const int64_t c = binomial(n, q);
            total = c < 0 ? 4097 : total + c;
        }
        return 2 * k > n && total > 4096;
    }
    Complement(int64_t n, int64_t k) : n(n), k(k), rest(n - k), length(length_of(n, k)), levels(n, n - k), signs(std::size_t(length)) {
        complement_signs(n, k, signs.data());
    }
    // Householder QR of the columns of a (k of n numbers): q holds n orthonormal columns, r the factor row by row. Returns
    // det q.
    double factor(double *a, double *q, double *r) const {
        double sign = 1;
        std::fill_n(q, n * n, 0.0);
        for (int64_t i = 0; i < n; ++i) q[i * n + i] = 1;
        std::vector<double> tau(std::size_t(k), 0.0);
        for (int64_t j = 0; j < k; ++j) {
            double *x = a + j * n, below = 0;
            for (int64_t i = j + 1; i < n; ++i) below += x[i] * x[i];
            if (below == 0) continue; // a reflection would only change signs
            const double length = std::sqrt(x[j] * x[j] + below), diagonal = x[j] > 0 ? -length : length;
            x[j] -= diagonal; // the reflector is left below the factor
            tau[std::size_t(j)] = 2 / (x[j] * x[j] + below);
            poll();
            for (int64_t c = j + 1; c < k; ++c) reflect(x, tau[std::size_t(j)], j, a + c * n);
            r[j * k + j] = diagonal;
            sign = -sign;
        }
        for (int64_t j = 0; j < k; ++j) {
            for (int64_t i = 0; i < k; ++i)
                if (i < j || (i == j && tau[std::size_t(j)] == 0))
                    r[i * k + j] = a[j * n + i];
                else if (i > j)
                    r[i * k + j] = 0;
        }
        for (int64_t j = k - 1; j >= 0; --j) {
            poll();
            for (int64_t c = 0; c < n && tau[std::size_t(j)] != 0; ++c) reflect(a + j * n, tau[std::size_t(j)], j, q + c * n);
        }
        return sign;
    }
    int64_t n, k, rest, length;
    Levels levels;
    std::vector<double> signs;

  private:
    void reflect(const double *v, double tau, int64_t from, double *x) const {
        double d = 0;
        for (int64_t i = from; i < n; ++i) d += v[i] * x[i];
        d *= tau;
        for (int64_t i = from; i < n; ++i) x[i] -= d * v[i];
    }
};

template <class T> bool coordinates_by_complement(const StackView<const T> &a, const StackView<T> &out) {
    const int64_t n = a.rows(), k = a.cols();
    const Complement c(n, k);
    check_row(out, c.length, a.size());
    return blocks(a.size(), [&](int64_t first, int64_t count) {
        Frame frame;
        double *columns = work(frame, n * k), *left = work(frame, n * c.rest), *all = work(frame, c.levels.total());
        double *one = frame.take<double>(n * k), *q = frame.take<double>(n * n), *r = frame.take<double>(k * k);
        double determinant[kItems] = {};
        const bool finite = load<T>(a.transposed(), first, count, columns);
        const Scales scales(columns, n, k);
        std::fill_n(left, n * c.rest * kItems, 0.0);
        for (int64_t l = 0; l < count; ++l) {
            for (int64_t e = 0; e < n * k; ++e) one[e] = columns[e * kItems + l];
            determinant[l] = c.factor(one, q, r);
            for (int64_t j = 0; j < k; ++j) determinant[l] *= r[j * k + j];
            for (int64_t e = 0; e < n * c.rest; ++e) left[e * kItems + l] = q[n * k + e];
        }
        c.levels.forward(left, all);
        const double *dual = c.levels.level(all, c.rest);
        double *result = work(frame, c.length);
        for (int64_t i = 0; i < c.length; ++i)
            for (int64_t l = 0; l < kItems; ++l) result[i * kItems + l] = determinant[l] * c.signs[std::size_t(i)] * dual[(c.length - 1 - i) * kItems + l];
        scales.give_back(result, c.length);
        return store<T>(result, first, count, out) || !finite;
    });
}

// The sign of the determinant of an orthogonal matrix (rows of `ld` numbers), by elimination with pivots.
double orthogonal_sign(int64_t k, const double *x, int64_t ld) {
    std::vector<double> m(static_cast<std::size_t>(k * k));
    for (int64_t i = 0; i < k; ++i) std::copy_n(x + i * ld, k, m.data() + i * k);
    double sign = 1;
    for (int64_t j = 0; j < k; ++j) {
        int64_t pivot = j;
        for (int64_t i = j + 1; i < k; ++i)
            if (std::abs(m[std::size_t(i * k + j)]) > std::abs(m[std::size_t(pivot * k + j)])) pivot = i;
        if (pivot != j) {
            std::swap_ranges(m.begin() + j * k, m.begin() + (j + 1) * k, m.begin() + pivot * k);
            sign = -sign;
        }
        const double d = m[std::size_t(j * k + j)];
        if (d < 0) sign = -sign;
        for (int64_t i = j + 1; i < k; ++i) {
            const double f = d == 0 ? 0.0 : m[std::size_t(i * k + j)] / d;
            for (int64_t c = j; c < k; ++c) m[std::size_t(i * k + c)] -= f * m[std::size_t(j * k + c)];
        }
    }
    return sign;
}

// With A = U Σ Vᵀ only the coordinates of U, and of U with one column exchanged for one of the complement Q, are reached by
// a step: dA = det(V) Σ_a (Π_{b≠a} σ_b) (<dp, p(U)> u_a + Σ_m <dp, p(U; u_a -> q_m)> q_m) v_aᵀ, no division. By duality both
// inner products are those of the reversed, signed dp with minors of Q: <dq, q> and -u_a·(cofactors of Q)_m.
template <class T> bool coordinates_backward_by_complement(const StackView<const T> &grad, const StackView<const T> &a, const StackView<T> &da) {
    const int64_t n = a.rows(), k = a.cols();
    const Complement c(n, k);
    check_row(grad, c.length, a.size());
    return blocks(a.size(), [&](int64_t first, int64_t count) {
        Frame frame;
        const int64_t rest = c.rest, o = small::order(k);
        double *columns = work(frame, n * k), *left = work(frame, n * rest), *all = work(frame, c.levels.total()), *gradient = work(frame, c.levels.total()),
               *cofactors = work(frame, n * rest), *given = work(frame, c.length);
        double *q = frame.take<double>(kItems * n * n), *r = frame.take<double>(kItems * k * k), *one = frame.take<double>(n * k);
        double sign[kItems] = {};
        bool finite = load<T>(a.transposed(), first, count, columns);
        finite = load<T>(grad, first, count, given) && finite;
        const Scales scales(columns, n, k);
        std::fill_n(left, n * rest * kItems, 0.0);
        for (int64_t l = 0; l < count; ++l) {
            for (int64_t e = 0; e < n * k; ++e) one[e] = columns[e * kItems + l];
            sign[l] = c.factor(one, q + l * n * n, r + l * k * k);
            for (int64_t e = 0; e < n * rest; ++e) left[e * kItems + l] = q[l * n * n + n * k + e];
        }
        double *dual = c.levels.level(gradient, rest);
        for (int64_t i = 0; i < c.length; ++i)
            for (int64_t l = 0; l < kItems; ++l) dual[(c.length - 1 - i) * kItems + l] = c.signs[std::size_t(i)] * given[i * kItems + l];
        c.levels.forward(left, all);
        double inner[kItems] = {};
        for (int64_t i = 0; i < c.length; ++i)
            for (int64_t l = 0; l < kItems; ++l) inner[l] += dual[i * kItems + l] * c.levels.level(all, rest)[i * kItems + l];
        c.levels.backward(left, all, gradient, cofactors);
        double *padded = frame.zeros<double>(small::area(k)), *s = frame.take<double>(o), *xt = frame.take<double>(small::area(k)),
               *yt = frame.take<double>(small::area(k));
        for (int64_t l = 0; l < count; ++l) {
            const double *ql = q + l * n * n;
            for (int64_t i = 0; i < k; ++i) std::copy_n(r + l * k * k + i * k, k, padded + i * o);
            small::svd(k, padded, s, xt, yt);
            const double outer = sign[l] * orthogonal_sign(k, xt, o) * orthogonal_sign(k, yt, o);
            std::fill_n(one, n * k, 0.0);
            for (int64_t b = 0; b < k; ++b) {
                double others = outer;
                for (int64_t e = 0; e < k; ++e) others *= e == b ? 1.0 : s[e];
                std::vector<double> u(std::size_t(n), 0.0), direction(std::size_t(n), 0.0);
                for (int64_t e = 0; e < k; ++e)
                    for (int64_t i = 0; i < n; ++i) u[std::size_t(i)] += xt[b * o + e] * ql[e * n + i];
                for (int64_t i = 0; i < n; ++i) direction[std::size_t(i)] = inner[l] * u[std::size_t(i)];
                for (int64_t m = 0; m < rest; ++m) {
                    double d = 0;
                    for (int64_t i = 0; i < n; ++i) d += u[std::size_t(i)] * cofactors[(m * n + i) * kItems + l];
                    for (int64_t i = 0; i < n; ++i) direction[std::size_t(i)] -= d * ql[(k + m) * n + i];
                }
                for (int64_t e = 0; e < k; ++e)
                    for (int64_t i = 0; i < n; ++i) one[e * n + i] += others * yt[b * o + e] * direction[std::size_t(i)];
            }
            for (int64_t e = 0; e < n * k; ++e) columns[e * kItems + l] = one[e];
        }
        scales.give_back_to_columns(columns);
        return store<T>(columns, first, count, da.transposed()) || !finite;
    });
}

} // namespace

template <class T> bool plucker_coordinates(const StackView<const T> &a, const StackView<T> &out) {
    const int64_t n = a.rows(), k = a.cols();
    check_grades(n, k);
    if (Complement::pays(n, k)) return coordinates_by_complement<T>(a, out);
    const Levels levels(n, k);
    check_row(out, levels.length(), a.size());
    return blocks(a.size(), [&](int64_t first, int64_t count) {
        Frame frame;
        double *columns = work(frame, n * k), *all = work(frame, levels.total());
        const bool finite = load<T>(a.transposed(), first, count, columns);
        const Scales scales(columns, n, k);
        levels.forward(columns, all);
        scales.give_back(levels.level(all, k), levels.length());
        return store<T>(levels.level(all, k), first, count, out) || !finite;
    });
}

template <class T> bool plucker_coordinates_backward(const StackView<const T> &grad, const StackView<const T> &a, const StackView<T> &da) {
    const int64_t n = a.rows(), k = a.cols();
    check_grades(n, k);
    if (da.rows() != n || da.cols() != k || da.size() != a.size()) throw ValueError("A and dA do not fit");
    if (Complement::pays(n, k)) return coordinates_backward_by_complement<T>(grad, a, da);
    const Levels levels(n, k);
    check_row(grad, levels.length(), a.size());
    return blocks(a.size(), [&](int64_t first, int64_t count) {
        Frame frame;
        double *columns = work(frame, n * k), *all = work(frame, levels.total()), *gradient = work(frame, levels.total()), *dcolumns = work(frame, n * k);
        bool finite = load<T>(a.transposed(), first, count, columns);
        finite = load<T>(grad, first, count, levels.level(gradient, k)) && finite;
        const Scales scales(columns, n, k);
        levels.forward(columns, all);
        levels.backward(columns, all, gradient, dcolumns);
        scales.give_back_to_columns(dcolumns);
        return store<T>(dcolumns, first, count, da.transposed()) || !finite;
    });
}

#define SUBSPAN_INSTANTIATE(T)                                                                                                                                 \
    template bool plucker_coordinates<T>(const StackView<const T> &, const StackView<T> &);                                                                    \
    template bool plucker_coordinates_backward<T>(const StackView<const T> &, const StackView<const T> &, const StackView<T> &);
SUBSPAN_INSTANTIATE(float)
SUBSPAN_INSTANTIATE(double)
#undef SUBSPAN_INSTANTIATE

} // namespace subspan
