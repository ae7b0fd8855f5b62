// What the exterior algebra shares: subsets and their ranks, tables of signed products, blocks of items in lanes.
#pragma once

#include "base/scratch.hpp"
#include "subspan/errors.hpp"
#include "subspan/exterior.hpp"
#include "subspan/parallel.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

namespace subspan::exterior {

using std::int64_t;

inline constexpr int64_t kItems = 16;                   // of a stack go through the tables at a time, one a lane
inline constexpr int64_t kTerms = int64_t(1) << 28;     // of a table: 4 GiB
inline constexpr int64_t kNumbers = int64_t(1) << 29;   // of the work memory of one block: 4 GiB

/// Next subset of {0, ..., n - 1} in lexicographic order; false after the last.
bool advance(std::vector<int> &s, int64_t n);
std::vector<int> first_subset(int64_t k);

// Ranks of subsets: lexicographic order counts down the colexicographic order of the complements n - 1 - s.
class Ranks {
  public:
    /// Subsets of at most `most` elements of {0, ..., n - 1}.
    Ranks(int64_t n, int64_t most) : n_(n), width_(most + 1) {
        if (n < 0 || n > std::int64_t(1) << 31 || most < 0 || (n + 1) > kTerms / (most + 1))
            throw ValueError("C(i, j) up to n=" + std::to_string(n) + ", k=" + std::to_string(most) + " take more than 2 GiB");
        c_.assign(std::size_t((n + 1) * (most + 1)), 0);
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

struct Term {
    std::int32_t a, b;
    double sign;
};

// e_I ∧ e_J = sign e_{I ∪ J}: for each subset of k + l, the `per` ways to split it.
struct Table {
    Table(int64_t n, int64_t k, int64_t l);
    int64_t rows, per;
    int64_t vectors; // their length where both factors are vectors, whose pairs need no table
    std::vector<Term> terms;
};

/// out (+)= a ∧ b; numbers of kItems items for every coordinate.
void product(const Table &t, const double *a, const double *b, double *out, bool add = false);
/// Wedges of pairs of vectors of two to six numbers, each contiguous and so far apart: too few for lanes and tables. False
/// where a result is not finite and its factors are.
template <class T> struct Vectors {
    const T *a, *b;
    T *out;
    int64_t a_step, b_step, out_step;
};
inline constexpr int64_t kShortest = 6;
template <class T> bool wedge_vectors(int64_t n, int64_t items, const Vectors<T> &x);
/// da += contraction of g with b, db likewise.
void product_backward(const Table &t, const double *g, const double *a, const double *b, double *da, double *db);

/// C(n, k), zero outside of 0 <= k <= n; ValueError beyond 2^31.
int64_t length_of(int64_t n, int64_t k);
/// Work memory for so many coordinates of a block of items; ValueError beyond 4 GiB.
double *work(Frame &frame, int64_t coordinates);

// Items [first, first + count) of a stack in lanes, entry by entry; lanes past the last are zero. False where one is not finite.
template <class T> bool load(const StackView<const T> &x, int64_t first, int64_t count, double *to);
// And back; false where a number is not finite in T.
template <class T> bool store(const double *from, int64_t first, int64_t count, const StackView<T> &x);

// body(first, count) for blocks of items; false where it said so for one.
template <class F> bool blocks(int64_t items, const F &body) {
    // Some blocks to a task: one of a few coordinates is over before a task is handed out.
    std::atomic<bool> good{true};
    const int64_t all = (items + kItems - 1) / kItems, together = std::clamp<int64_t>(all / (4 * num_threads()), 1, 16);
    parallel_for((all + together - 1) / together, [&](int64_t t) {
        for (int64_t b = t * together; b < std::min(all, (t + 1) * together); ++b)
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
            throw ValueError("the minors of a " + std::to_string(n) + " x " + std::to_string(k) + " matrix pass through more coordinates than 4 GiB hold");
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
    Scales(double *columns, int64_t n, int64_t k);
    void give_back(double *x, int64_t length) const;
    // Each column gets the powers of the others: the gradient of a product.
    void give_back_to_columns(double *x) const;

  private:
    static double lift(double x, int64_t e) { return std::ldexp(x, int(std::clamp<int64_t>(e, -100000, 100000))); }
    int64_t n_, k_;
    std::vector<int64_t> exponent_, total_; // empty: nothing was taken out
};

template <class T> void check_row(const StackView<T> &x, int64_t length, int64_t items) {
    if (x.rows() != 1 || x.cols() != length || x.size() != items) throw ValueError("shapes of k-vectors do not fit");
}

inline void check_grades(int64_t n, int64_t k) {
    if (k < 1 || k > n) throw ValueError("k must be from 1 to n");
}

} // namespace subspan::exterior
