#include "subspan/exterior.hpp"

#include "scratch.hpp"
#include "simd.hpp"
#include "small.hpp"
#include "subspan/errors.hpp"
#include "subspan/parallel.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

namespace subspan {
namespace {

using simd::Vec;
using std::int64_t;

constexpr int64_t kItems = 16;                   // of a stack go through the tables at a time, one a lane
constexpr int64_t kTerms = int64_t(1) << 28;     // of a table: 4 GiB
constexpr int64_t kNumbers = int64_t(1) << 29;   // of the work memory of one block: 4 GiB

struct Term {
    std::int32_t a, b;
    double sign;
};

// Next subset of {0, ..., n - 1} in lexicographic order.
bool advance(std::vector<int> &s, int64_t n) {
    const int64_t k = int64_t(s.size());
    for (int64_t i = k - 1; i >= 0; --i) {
        if (s[std::size_t(i)] >= n - k + i) continue;
        ++s[std::size_t(i)];
        for (int64_t j = i + 1; j < k; ++j) s[std::size_t(j)] = s[std::size_t(j - 1)] + 1;
        return true;
    }
    return false;
}

std::vector<int> first_subset(int64_t k) {
    std::vector<int> s(static_cast<std::size_t>(k));
    for (int64_t i = 0; i < k; ++i) s[std::size_t(i)] = int(i);
    return s;
}

// Ranks of subsets: lexicographic order counts down the colexicographic order of the complements n - 1 - s.
class Ranks {
  public:
    /// Subsets of at most `most` elements of {0, ..., n - 1}.
    Ranks(int64_t n, int64_t most) : n_(n), width_(most + 1), c_(std::size_t((n + 1) * (most + 1)), 0) {
        for (int64_t i = 0; i <= n; ++i)
            for (int64_t j = 0; j <= std::min(i, most); ++j) c_[std::size_t(i * width_ + j)] = binomial(i, j);
    }
    int64_t operator()(const int *s, int64_t k) const {
        int64_t rank = at(n_, k) - 1;
        for (int64_t i = 0; i < k; ++i) rank -= at(n_ - 1 - s[i], k - i);
        return rank;
    }
    int64_t at(int64_t i, int64_t j) const { return j > i ? 0 : c_[std::size_t(i * width_ + j)]; }

  private:
    int64_t n_, width_;
    std::vector<int64_t> c_;
};

// e_I ∧ e_J = sign e_{I ∪ J}: for each subset of k + l, the `per` ways to split it.
struct Table {
    Table(int64_t n, int64_t k, int64_t l) : rows(k + l > n ? 0 : binomial(n, k + l)), per(binomial(k + l, k)), vectors(k == 1 && l == 1 ? n : 0) {
        if (rows < 0 || per < 0 || (rows > 0 && per > kTerms / rows))
            throw ValueError("the wedge of a " + std::to_string(k) + "-vector and a " + std::to_string(l) + "-vector of R^" +
                             std::to_string(n) + " has too many terms");
        if (rows == 0 || vectors > 0) return;
        terms.reserve(std::size_t(rows * per));
        const Ranks rank(n, std::max(k, l));
        std::vector<int> whole = first_subset(k + l), left(static_cast<std::size_t>(k)), right(static_cast<std::size_t>(l));
        do {
            std::vector<int> where = first_subset(k);
            do {
                int inversions = 0;
                for (int64_t i = 0, a = 0, b = 0; i < k + l; ++i) {
                    if (a < k && where[std::size_t(a)] == i) {
                        left[std::size_t(a++)] = whole[std::size_t(i)];
                        inversions += int(b);
                    } else {
                        right[std::size_t(b++)] = whole[std::size_t(i)];
                    }
                }
                terms.push_back({std::int32_t(rank(left.data(), k)), std::int32_t(rank(right.data(), l)), inversions % 2 ? -1.0 : 1.0});
            } while (advance(where, k + l));
        } while (advance(whole, n));
    }
    int64_t rows, per;
    int64_t vectors; // their length where both factors are vectors, whose pairs need no table
    std::vector<Term> terms;
};

// Buffers hold kItems numbers for every coordinate.
struct ProductKernel {
    template <int Bytes>
    static SUBSPAN_INLINE void run(const Table *t, const double *a, const double *b, double *out, bool add) {
        using V = Vec<double, Bytes>;
        constexpr int W = V::lanes, G = int(kItems) / W;
        const Term *term = t->terms.data();
        for (int64_t i = 0; i < t->rows; ++i) {
            typename V::type s[G];
            for (int q = 0; q < G; ++q) s[q] = add ? V::load(out + i * kItems + q * W) : typename V::type{};
            for (int64_t p = 0; p < t->per; ++p, ++term)
                for (int q = 0; q < G; ++q)
                    s[q] += term->sign * SUBSPAN_ROUNDED(V::load(a + term->a * kItems + q * W) * V::load(b + term->b * kItems + q * W));
            for (int q = 0; q < G; ++q) V::store(out + i * kItems + q * W, s[q]);
        }
    }
};

// The same for two vectors of n numbers.
struct PairKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(int64_t n, const double *a, const double *b, double *out, bool add) {
        using V = Vec<double, Bytes>;
        constexpr int W = V::lanes, G = int(kItems) / W;
        for (int64_t i = 0; i < n; ++i)
            for (int64_t j = i + 1; j < n; ++j, out += kItems)
                for (int q = 0; q < G; ++q) {
                    const int64_t x = i * kItems + q * W, y = j * kItems + q * W;
                    const auto p = SUBSPAN_ROUNDED(V::load(a + x) * V::load(b + y)) - SUBSPAN_ROUNDED(V::load(a + y) * V::load(b + x));
                    V::store(out + q * W, add ? V::load(out + q * W) + p : p);
                }
    }
};

struct PairBackwardKernel {
    template <int Bytes>
    static SUBSPAN_INLINE void run(int64_t n, const double *g, const double *a, const double *b, double *da, double *db) {
        using V = Vec<double, Bytes>;
        constexpr int W = V::lanes, G = int(kItems) / W;
        for (int64_t i = 0; i < n; ++i)
            for (int64_t j = i + 1; j < n; ++j, g += kItems)
                for (int q = 0; q < G; ++q) {
                    const int64_t x = i * kItems + q * W, y = j * kItems + q * W;
                    const auto d = V::load(g + q * W);
                    V::store(da + x, V::load(da + x) + d * V::load(b + y));
                    V::store(da + y, V::load(da + y) - d * V::load(b + x));
                    V::store(db + y, V::load(db + y) + d * V::load(a + x));
                    V::store(db + x, V::load(db + x) - d * V::load(a + y));
                }
    }
};

// da += contraction of g with b, db likewise.
struct ProductBackwardKernel {
    template <int Bytes>
    static SUBSPAN_INLINE void run(const Table *t, const double *g, const double *a, const double *b, double *da, double *db) {
        using V = Vec<double, Bytes>;
        constexpr int W = V::lanes, G = int(kItems) / W;
        const Term *term = t->terms.data();
        for (int64_t i = 0; i < t->rows; ++i)
            for (int64_t p = 0; p < t->per; ++p, ++term)
                for (int q = 0; q < G; ++q) {
                    const auto d = term->sign * V::load(g + i * kItems + q * W);
                    double *xa = da + term->a * kItems + q * W, *xb = db + term->b * kItems + q * W;
                    V::store(xa, V::load(xa) + d * V::load(b + term->b * kItems + q * W));
                    V::store(xb, V::load(xb) + d * V::load(a + term->a * kItems + q * W));
                }
    }
};

void product(const Table &t, const double *a, const double *b, double *out, bool add = false) {
    if (t.vectors > 0)
        return simd::dispatch<PairKernel, int64_t, const double *, const double *, double *, bool>(t.vectors, a, b, out, add);
    simd::dispatch<ProductKernel, const Table *, const double *, const double *, double *, bool>(&t, a, b, out, add);
}

void product_backward(const Table &t, const double *g, const double *a, const double *b, double *da, double *db) {
    if (t.vectors > 0)
        return simd::dispatch<PairBackwardKernel, int64_t, const double *, const double *, const double *, double *, double *>(t.vectors, g, a,
                                                                                                                             b, da, db);
    simd::dispatch<ProductBackwardKernel, const Table *, const double *, const double *, const double *, double *, double *>(&t, g, a, b, da,
                                                                                                                           db);
}

int64_t length_of(int64_t n, int64_t k) {
    const int64_t c = k < 0 || k > n ? 0 : binomial(n, k);
    if (c < 0) throw ValueError("C(" + std::to_string(n) + ", " + std::to_string(k) + ") is more than 2^31");
    return c;
}

double *work(Frame &frame, int64_t coordinates) {
    if (coordinates > kNumbers / kItems) throw ValueError("the coordinates on the way take more than 4 GiB of work memory");
    return frame.take<double>(coordinates * kItems);
}

// Items [first, first + count) of a stack in lanes, entry by entry; lanes past the last are zero.
template <class T> bool load(const StackView<const T> &x, int64_t first, int64_t count, double *to) {
    bool finite = true;
    const int64_t cols = x.cols(), entries = x.rows() * cols;
    for (int64_t l = 0; l < kItems; ++l) {
        if (l >= count) {
            for (int64_t e = 0; e < entries; ++e) to[e * kItems + l] = 0;
            continue;
        }
        const auto m = x[first + l];
        for (int64_t i = 0, e = 0; i < m.rows; ++i)
            for (int64_t j = 0; j < cols; ++j, ++e) {
                const T v = m(i, j);
                finite = finite && std::isfinite(v);
                to[e * kItems + l] = double(v);
            }
    }
    return finite;
}

template <class T> bool store(const double *from, int64_t first, int64_t count, const StackView<T> &x) {
    bool finite = true;
    for (int64_t l = 0; l < count; ++l) {
        const auto m = x[first + l];
        for (int64_t i = 0, e = 0; i < m.rows; ++i)
            for (int64_t j = 0; j < m.cols; ++j, ++e) {
                m(i, j) = T(from[e * kItems + l]);
                finite = finite && std::isfinite(m(i, j));
            }
    }
    return finite;
}

// body(first, count) for blocks of items; false where it said so for one.
template <class F> bool blocks(int64_t items, const F &body) {
    std::atomic<bool> good{true};
    parallel_for((items + kItems - 1) / kItems, [&](int64_t b) {
        if (!body(b * kItems, std::min(kItems, items - b * kItems))) good = false;
    });
    return good;
}

// p_1, p_1 ∧ a_2, ... of the columns of n x k matrices.
class Levels {
  public:
    Levels(int64_t n, int64_t k) : n(n), k(k) {
        int64_t total = 0;
        for (int64_t q = 0; q <= k; ++q) {
            starts.push_back(total);
            total += length_of(n, q);
        }
        starts.push_back(total);
        if (total > kNumbers / kItems)
            throw ValueError("the minors of a " + std::to_string(n) + " x " + std::to_string(k) +
                             " matrix pass through more coordinates than 4 GiB hold");
        for (int64_t q = 1; q < k; ++q) tables.emplace_back(n, q, 1);
    }
    int64_t total() const { return starts.back(); }
    int64_t length() const { return total() - starts[std::size_t(k)]; }
    double *level(double *all, int64_t q) const { return all + starts[std::size_t(q)] * kItems; }
    const double *level(const double *all, int64_t q) const { return all + starts[std::size_t(q)] * kItems; }
    // columns: k x n x kItems
    void forward(const double *columns, double *all) const {
        std::fill_n(all, kItems, 1.0);
        if (k > 0) std::copy_n(columns, n * kItems, level(all, 1));
        for (int64_t q = 1; q < k; ++q) product(tables[std::size_t(q - 1)], level(all, q), columns + q * n * kItems, level(all, q + 1));
    }
    // The derivative along `direction` (k x n x kItems).
    void forward_derivative(const double *columns, const double *all, const double *direction, double *derivative) const {
        std::fill_n(derivative, kItems, 0.0);
        if (k > 0) std::copy_n(direction, n * kItems, level(derivative, 1));
        for (int64_t q = 1; q < k; ++q) {
            const Table &t = tables[std::size_t(q - 1)];
            product(t, level(derivative, q), columns + q * n * kItems, level(derivative, q + 1));
            product(t, level(all, q), direction + q * n * kItems, level(derivative, q + 1), true);
        }
    }
    // gradient: that of the last level is given, the others are overwritten; dcolumns is overwritten.
    void backward(const double *columns, const double *all, double *gradient, double *dcolumns) const {
        std::fill_n(gradient, starts[std::size_t(k)] * kItems, 0.0);
        std::fill_n(dcolumns, k * n * kItems, 0.0);
        for (int64_t q = k - 1; q >= 1; --q)
            product_backward(tables[std::size_t(q - 1)], level(gradient, q + 1), level(all, q), columns + q * n * kItems, level(gradient, q),
                             dcolumns + q * n * kItems);
        if (k > 0) std::copy_n(level(gradient, 1), n * kItems, dcolumns);
    }
    int64_t n, k;

  private:
    std::vector<int64_t> starts;
    std::vector<Table> tables;
};

// Powers of two taken out of columns (k of n numbers, kItems lanes): products on the way stay in range where the minor does.
class Scales {
  public:
    Scales(double *columns, int64_t n, int64_t k) : n_(n), k_(k), exponent_(std::size_t(k * kItems)), total_(std::size_t(kItems)) {
        // Products of k numbers within these are numbers.
        const double high = std::ldexp(1.0, int(std::max<int64_t>(900 / k, 1))), low = 1 / high;
        for (int64_t j = 0; j < k; ++j)
            for (int64_t l = 0; l < kItems; ++l) {
                double *x = columns + j * n * kItems + l, top = 0;
                for (int64_t i = 0; i < n; ++i) top = std::max(top, std::abs(x[i * kItems]));
                if (top >= low && top <= high) continue;
                const int e = top > 0 && std::isfinite(top) ? std::ilogb(top) : 0;
                exponent_[std::size_t(j * kItems + l)] = e;
                total_[std::size_t(l)] += e;
                if (e == 0) continue;
                for (int64_t i = 0; i < n; ++i) x[i * kItems] = std::ldexp(x[i * kItems], -e);
            }
    }
    void give_back(double *x, int64_t length) const {
        for (int64_t l = 0; l < kItems; ++l)
            for (int64_t i = 0; i < length && total_[std::size_t(l)] != 0; ++i) x[i * kItems + l] = lift(x[i * kItems + l], total_[std::size_t(l)]);
    }
    // Each column gets the powers of the others: the gradient of a product.
    void give_back_to_columns(double *x) const {
        for (int64_t j = 0; j < k_; ++j)
            for (int64_t l = 0; l < kItems; ++l) {
                const int64_t e = total_[std::size_t(l)] - exponent_[std::size_t(j * kItems + l)];
                for (int64_t i = 0; i < n_ && e != 0; ++i) x[(j * n_ + i) * kItems + l] = lift(x[(j * n_ + i) * kItems + l], e);
            }
    }

  private:
    static double lift(double x, int64_t e) { return std::ldexp(x, int(std::clamp<int64_t>(e, -100000, 100000))); }
    int64_t n_, k_;
    std::vector<int64_t> exponent_, total_;
};

template <class T> void check_row(const StackView<T> &x, int64_t length, int64_t items) {
    if (x.rows() != 1 || x.cols() != length || x.size() != items) throw ValueError("shapes of k-vectors do not fit");
}

// What relations and bases look up: p(I, j) for |I| = k - 1 and any j, as an index and a sign (0 where j is in I), and the
// subsets of J with one element left out.
struct Contraction {
    Contraction(int64_t n, int64_t k) : n(n), k(k), few(length_of(n, k - 1)), many(length_of(n, k + 1)) {
        if (few > kTerms / std::max<int64_t>(n, 1) || many > kTerms / (k + 1)) throw ValueError("there are too many relations");
        const Ranks rank(n, k);
        std::vector<int> s = first_subset(k - 1), with(static_cast<std::size_t>(k));
        if (few > 0)
            do {
                for (int j = 0; j < int(n); ++j) {
                    const auto at = std::lower_bound(s.begin(), s.end(), j);
                    if (at != s.end() && *at == j) {
                        index.push_back(0);
                        sign.push_back(0);
                        continue;
                    }
                    const auto before = at - s.begin();
                    std::copy(s.begin(), at, with.begin());
                    with[std::size_t(before)] = j;
                    std::copy(at, s.end(), with.begin() + before + 1);
                    index.push_back(std::int32_t(rank(with.data(), k)));
                    sign.push_back((int64_t(s.size()) - before) % 2 ? -1.0 : 1.0);
                }
            } while (advance(s, n));
        std::vector<int> j = first_subset(k + 1);
        if (many > 0)
            do {
                for (int64_t t = 0; t <= k; ++t) {
                    std::copy(j.begin(), j.begin() + t, with.begin());
                    std::copy(j.begin() + t + 1, j.end(), with.begin() + t);
                    element.push_back(j[std::size_t(t)]);
                    without.push_back(std::int32_t(rank(with.data(), k)));
                }
            } while (advance(j, n));
    }
    int64_t n, k, few, many;
    std::vector<std::int32_t> index, element, without;
    std::vector<double> sign;
};

struct RelationKernel {
    // One row of relations: all J for one I. With `gradient` the numbers of out are gradients, and dp is added to.
    template <int Bytes>
    static SUBSPAN_INLINE void run(const Contraction *c, int64_t i, const double *p, double *out, double *dp) {
        using V = Vec<double, Bytes>;
        constexpr int W = V::lanes, G = int(kItems) / W;
        for (int64_t j = 0; j < c->many; ++j) {
            typename V::type s[G];
            for (int q = 0; q < G; ++q) s[q] = dp == nullptr ? typename V::type{} : V::load(out + j * kItems + q * W);
            for (int64_t t = 0; t <= c->k; ++t) {
                const int64_t at = i * c->n + c->element[std::size_t(j * (c->k + 1) + t)];
                const double sign = (t % 2 ? -1.0 : 1.0) * c->sign[std::size_t(at)];
                if (sign == 0) continue;
                const int64_t a = c->index[std::size_t(at)] * kItems, b = c->without[std::size_t(j * (c->k + 1) + t)] * kItems;
                for (int q = 0; q < G; ++q) {
                    if (dp == nullptr) {
                        s[q] += sign * SUBSPAN_ROUNDED(V::load(p + a + q * W) * V::load(p + b + q * W));
                        continue;
                    }
                    const auto g = sign * s[q];
                    V::store(dp + a + q * W, V::load(dp + a + q * W) + g * V::load(p + b + q * W));
                    V::store(dp + b + q * W, V::load(dp + b + q * W) + g * V::load(p + a + q * W));
                }
            }
            if (dp == nullptr)
                for (int q = 0; q < G; ++q) V::store(out + j * kItems + q * W, s[q]);
        }
    }
};

// Orthonormal columns (k of n numbers each) with coordinates p / ‖p‖: p holds the numbers of one item. False: p is zero
// or not finite.
class Chart {
  public:
    Chart(int64_t n, int64_t k) : n_(n), k_(k), rank_(n, k), count_(length_of(n, k)) {}
    bool basis(const double *p, int64_t stride, double *columns) const {
        int64_t best = -1;
        double top = 0;
        for (int64_t i = 0; i < count_; ++i) {
            const double a = std::abs(p[i * stride]);
            if (!std::isfinite(a)) return false;
            if (a > top) {
                top = a;
                best = i;
            }
        }
        if (best < 0) return false;
        std::vector<int> pivot = subset(best), s(static_cast<std::size_t>(k_));
        const double scale = p[best * stride];
        for (int64_t a = 0; a < k_; ++a)
            for (int64_t i = 0; i < n_; ++i) {
                // p of the pivot with its element a replaced by i, sorted: an insertion, and a sign for each place it moves
                const auto in = std::find(pivot.begin(), pivot.end(), int(i));
                if (in != pivot.end()) {
                    columns[a * n_ + i] = in - pivot.begin() == a ? 1.0 : 0.0;
                    continue;
                }
                int64_t m = 0, place = 0;
                bool done = false;
                for (int64_t b = 0; b < k_; ++b) {
                    if (b == a) continue;
                    if (!done && pivot[std::size_t(b)] > i) {
                        place = m;
                        s[std::size_t(m++)] = int(i);
                        done = true;
                    }
                    s[std::size_t(m++)] = pivot[std::size_t(b)];
                }
                if (!done) {
                    place = m;
                    s[std::size_t(m++)] = int(i);
                }
                const double sign = (place - a) % 2 ? -1.0 : 1.0;
                columns[a * n_ + i] = sign * (p[rank_(s.data(), k_) * stride] / scale);
            }
        // Entries are at most 1 and the pivot rows are the identity: well conditioned, so that two sweeps are enough.
        for (int64_t a = 0; a < k_; ++a) {
            double *x = columns + a * n_;
            for (int sweep = 0; sweep < 2; ++sweep)
                for (int64_t b = 0; b < a; ++b) {
                    const double *y = columns + b * n_;
                    double d = 0;
                    for (int64_t i = 0; i < n_; ++i) d += x[i] * y[i];
                    for (int64_t i = 0; i < n_; ++i) x[i] -= d * y[i];
                }
            double d = 0;
            for (int64_t i = 0; i < n_; ++i) d += x[i] * x[i];
            d = (a == 0 && scale < 0 ? -1.0 : 1.0) / std::sqrt(d);
            for (int64_t i = 0; i < n_; ++i) x[i] *= d;
        }
        return true;
    }

  private:
    std::vector<int> subset(int64_t rank) const {
        std::vector<int> s;
        int64_t left = rank;
        for (int64_t i = 0; i < n_ && int64_t(s.size()) < k_; ++i) {
            const int64_t with = rank_.at(n_ - 1 - i, k_ - 1 - int64_t(s.size())); // subsets that go on with i
            if (left < with)
                s.push_back(int(i));
            else
                left -= with;
        }
        return s;
    }
    int64_t n_, k_;
    Ranks rank_;
    int64_t count_;
};

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
        for (int64_t j = k - 1; j >= 0; --j)
            for (int64_t c = 0; c < n && tau[std::size_t(j)] != 0; ++c) reflect(a + j * n, tau[std::size_t(j)], j, q + c * n);
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
            for (int64_t l = 0; l < kItems; ++l)
                result[i * kItems + l] = determinant[l] * c.signs[std::size_t(i)] * dual[(c.length - 1 - i) * kItems + l];
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
template <class T>
bool coordinates_backward_by_complement(const StackView<const T> &grad, const StackView<const T> &a, const StackView<T> &da) {
    const int64_t n = a.rows(), k = a.cols();
    const Complement c(n, k);
    check_row(grad, c.length, a.size());
    return blocks(a.size(), [&](int64_t first, int64_t count) {
        Frame frame;
        const int64_t rest = c.rest, o = small::order(k);
        double *columns = work(frame, n * k), *left = work(frame, n * rest), *all = work(frame, c.levels.total()),
               *gradient = work(frame, c.levels.total()), *cofactors = work(frame, n * rest), *given = work(frame, c.length);
        double *q = frame.take<double>(kItems * n * n), *r = frame.take<double>(kItems * k * k),
               *one = frame.take<double>(n * k);
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

void lower(std::atomic<int64_t> &least, int64_t item) {
    int64_t seen = least;
    while (item < seen && !least.compare_exchange_weak(seen, item)) {}
}

void check_grades(int64_t n, int64_t k) {
    if (k < 1 || k > n) throw ValueError("k must be from 1 to n");
}

} // namespace

int64_t binomial(int64_t n, int64_t k) {
    if (k < 0 || k > n) return 0;
    int64_t c = 1;
    for (int64_t i = 1; i <= std::min(k, n - k); ++i) {
        c = c * (n - i + 1) / i;
        if (c > (int64_t(1) << 31)) return -1;
    }
    return c;
}

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

template <class T>
bool plucker_coordinates_backward(const StackView<const T> &grad, const StackView<const T> &a, const StackView<T> &da) {
    const int64_t n = a.rows(), k = a.cols();
    check_grades(n, k);
    if (da.rows() != n || da.cols() != k || da.size() != a.size()) throw ValueError("A and dA do not fit");
    if (Complement::pays(n, k)) return coordinates_backward_by_complement<T>(grad, a, da);
    const Levels levels(n, k);
    check_row(grad, levels.length(), a.size());
    return blocks(a.size(), [&](int64_t first, int64_t count) {
        Frame frame;
        double *columns = work(frame, n * k), *all = work(frame, levels.total()), *gradient = work(frame, levels.total()),
               *dcolumns = work(frame, n * k);
        bool finite = load<T>(a.transposed(), first, count, columns);
        finite = load<T>(grad, first, count, levels.level(gradient, k)) && finite;
        const Scales scales(columns, n, k);
        levels.forward(columns, all);
        levels.backward(columns, all, gradient, dcolumns);
        scales.give_back_to_columns(dcolumns);
        return store<T>(dcolumns, first, count, da.transposed()) || !finite;
    });
}

template <class T>
bool wedge(const StackView<const T> &a, const StackView<const T> &b, int64_t n, int64_t k, int64_t l, const StackView<T> &out) {
    const Table table(n, k, l);
    check_row(a, length_of(n, k), out.size());
    check_row(b, length_of(n, l), out.size());
    check_row(out, table.rows, out.size());
    return blocks(out.size(), [&](int64_t first, int64_t count) {
        Frame frame;
        double *xa = work(frame, a.cols()), *xb = work(frame, b.cols()), *xo = work(frame, table.rows);
        bool finite = load<T>(a, first, count, xa);
        finite = load<T>(b, first, count, xb) && finite;
        product(table, xa, xb, xo);
        return store<T>(xo, first, count, out) || !finite;
    });
}

template <class T>
bool wedge_backward(const StackView<const T> &grad, const StackView<const T> &a, const StackView<const T> &b, int64_t n, int64_t k,
                    int64_t l, const StackView<T> &da, const StackView<T> &db) {
    const Table table(n, k, l);
    const int64_t items = grad.size();
    check_row(grad, table.rows, items);
    check_row(a, length_of(n, k), items);
    check_row(b, length_of(n, l), items);
    check_row(da, a.cols(), items);
    check_row(db, b.cols(), items);
    return blocks(items, [&](int64_t first, int64_t count) {
        Frame frame;
        double *xa = work(frame, a.cols()), *xb = work(frame, b.cols()), *xg = work(frame, table.rows), *ya = work(frame, a.cols()),
               *yb = work(frame, b.cols());
        bool finite = load<T>(a, first, count, xa);
        finite = load<T>(b, first, count, xb) && finite;
        finite = load<T>(grad, first, count, xg) && finite;
        std::fill_n(ya, a.cols() * kItems, 0.0);
        std::fill_n(yb, b.cols() * kItems, 0.0);
        product_backward(table, xg, xa, xb, ya, yb);
        const bool good = store<T>(ya, first, count, da);
        return (store<T>(yb, first, count, db) && good) || !finite;
    });
}

template <class T> bool plucker_relations(const StackView<const T> &p, int64_t n, int64_t k, const StackView<T> &out) {
    check_grades(n, k);
    const Contraction c(n, k);
    check_row(p, length_of(n, k), out.size());
    if (out.rows() != c.few || out.cols() != c.many) throw ValueError("p and out do not fit");
    return blocks(out.size(), [&](int64_t first, int64_t count) {
        Frame frame;
        double *x = work(frame, p.cols()), *row = work(frame, c.many);
        const bool finite = load<T>(p, first, count, x);
        bool good = true;
        for (int64_t i = 0; i < c.few; ++i) {
            simd::dispatch<RelationKernel, const Contraction *, int64_t, const double *, double *, double *>(&c, i, x, row, nullptr);
            for (int64_t l = 0; l < count; ++l) {
                const auto to = out[first + l];
                for (int64_t j = 0; j < c.many; ++j) {
                    to(i, j) = T(row[j * kItems + l]);
                    good = good && std::isfinite(to(i, j));
                }
            }
        }
        return good || !finite;
    });
}

template <class T>
bool plucker_relations_backward(const StackView<const T> &grad, const StackView<const T> &p, int64_t n, int64_t k, const StackView<T> &dp) {
    check_grades(n, k);
    const Contraction c(n, k);
    const int64_t items = dp.size();
    check_row(p, length_of(n, k), items);
    check_row(dp, p.cols(), items);
    if (grad.rows() != c.few || grad.cols() != c.many || grad.size() != items) throw ValueError("grad and p do not fit");
    return blocks(items, [&](int64_t first, int64_t count) {
        Frame frame;
        double *x = work(frame, p.cols()), *dx = work(frame, p.cols()), *row = work(frame, c.many);
        bool finite = load<T>(p, first, count, x);
        std::fill_n(dx, p.cols() * kItems, 0.0);
        for (int64_t i = 0; i < c.few; ++i) {
            for (int64_t l = 0; l < kItems; ++l)
                for (int64_t j = 0; j < c.many; ++j) {
                    row[j * kItems + l] = l < count ? double(grad[first + l](i, j)) : 0.0;
                    finite = finite && std::isfinite(row[j * kItems + l]);
                }
            simd::dispatch<RelationKernel, const Contraction *, int64_t, const double *, double *, double *>(&c, i, x, row, dx);
        }
        return store<T>(dx, first, count, dp) || !finite;
    });
}

template <class T> int64_t plucker_basis(const StackView<const T> &p, int64_t n, int64_t k, const StackView<T> &out) {
    check_grades(n, k);
    const Chart chart(n, k);
    const int64_t items = out.size(), length = length_of(n, k);
    check_row(p, length, items);
    if (out.rows() != n || out.cols() != k) throw ValueError("p and out do not fit");
    std::atomic<int64_t> bad{items};
    parallel_for(items, [&](int64_t item) {
        Frame frame;
        double *x = frame.take<double>(length), *columns = frame.take<double>(n * k);
        const auto from = p[item];
        for (int64_t i = 0; i < length; ++i) x[i] = double(from(0, i));
        if (!chart.basis(x, 1, columns)) {
            lower(bad, item);
            return;
        }
        const auto to = out[item];
        for (int64_t a = 0; a < k; ++a)
            for (int64_t i = 0; i < n; ++i) to(i, a) = T(columns[a * n + i]);
    });
    return bad == items ? -1 : bad.load();
}

template <class T>
int64_t plucker_basis_backward(const StackView<const T> &grad, const StackView<const T> &p, int64_t n, int64_t k, const StackView<T> &dp) {
    check_grades(n, k);
    const Chart chart(n, k);
    const Levels levels(n, k);
    const int64_t items = dp.size(), length = levels.length();
    check_row(p, length, items);
    check_row(dp, length, items);
    if (grad.rows() != n || grad.cols() != k || grad.size() != items) throw ValueError("grad and p do not fit");
    std::atomic<int64_t> bad{items};
    const bool good = blocks(items, [&](int64_t first, int64_t count) {
        Frame frame;
        double *x = work(frame, length), *columns = work(frame, n * k), *direction = work(frame, n * k), *all = work(frame, levels.total()),
               *derivative = work(frame, levels.total()), *one = frame.take<double>(2 * n * k);
        bool finite = load<T>(p, first, count, x);
        std::fill_n(columns, n * k * kItems, 0.0);
        std::fill_n(direction, n * k * kItems, 0.0);
        for (int64_t l = 0; l < count; ++l) {
            double *u = one, *h = one + n * k;
            if (!chart.basis(x + l, kItems, u)) {
                lower(bad, first + l);
                continue;
            }
            const auto g = grad[first + l];
            for (int64_t a = 0; a < k; ++a) {
                for (int64_t i = 0; i < n; ++i) {
                    h[a * n + i] = double(g(i, a));
                    finite = finite && std::isfinite(h[a * n + i]);
                }
                for (int64_t b = 0; b < k; ++b) {
                    double d = 0;
                    for (int64_t i = 0; i < n; ++i) d += u[b * n + i] * h[a * n + i];
                    for (int64_t i = 0; i < n; ++i) h[a * n + i] -= d * u[b * n + i];
                }
            }
            for (int64_t e = 0; e < n * k; ++e) {
                columns[e * kItems + l] = u[e];
                direction[e * kItems + l] = h[e];
            }
        }
        levels.forward(columns, all);
        levels.forward_derivative(columns, all, direction, derivative);
        const double *unit = levels.level(all, k);
        double *result = levels.level(derivative, k);
        for (int64_t l = 0; l < count; ++l) {
            double norm = 0;
            for (int64_t i = 0; i < length; ++i) norm += x[i * kItems + l] * unit[i * kItems + l];
            for (int64_t i = 0; i < length; ++i) result[i * kItems + l] /= norm;
        }
        return store<T>(result, first, count, dp) || !finite;
    });
    if (bad != items) return bad.load();
    return good ? -1 : -2;
}

void complement_signs(int64_t n, int64_t k, double *out) {
    if (k < 0 || k > n) throw ValueError("k must be from 0 to n");
    length_of(n, k);
    std::vector<int> s = first_subset(k);
    do {
        int64_t inversions = 0; // element i of s jumps over the s_i - i elements that the complement has below it
        for (int64_t i = 0; i < k; ++i) inversions += s[std::size_t(i)] - i;
        *out++ = inversions % 2 ? -1.0 : 1.0;
    } while (advance(s, n));
}

#define SUBSPAN_INSTANTIATE(T)                                                                                         \
    template bool plucker_coordinates<T>(const StackView<const T> &, const StackView<T> &);                            \
    template bool plucker_coordinates_backward<T>(const StackView<const T> &, const StackView<const T> &, const StackView<T> &); \
    template bool wedge<T>(const StackView<const T> &, const StackView<const T> &, int64_t, int64_t, int64_t, const StackView<T> &); \
    template bool wedge_backward<T>(const StackView<const T> &, const StackView<const T> &, const StackView<const T> &, int64_t, \
                                    int64_t, int64_t, const StackView<T> &, const StackView<T> &);                     \
    template bool plucker_relations<T>(const StackView<const T> &, int64_t, int64_t, const StackView<T> &);            \
    template bool plucker_relations_backward<T>(const StackView<const T> &, const StackView<const T> &, int64_t, int64_t, \
                                                const StackView<T> &);                                                 \
    template int64_t plucker_basis<T>(const StackView<const T> &, int64_t, int64_t, const StackView<T> &);             \
    template int64_t plucker_basis_backward<T>(const StackView<const T> &, const StackView<const T> &, int64_t, int64_t, \
                                               const StackView<T> &);
SUBSPAN_INSTANTIATE(float)
SUBSPAN_INSTANTIATE(double)
#undef SUBSPAN_INSTANTIATE

} // namespace subspan
