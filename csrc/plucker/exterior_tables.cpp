#include "plucker/exterior_tables.hpp"

#include "base/simd.hpp"

namespace subspan {
namespace exterior {
namespace {

using simd::Vec;

// Buffers hold kItems numbers for every coordinate.
struct ProductKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(const Table *t, const double *a, const double *b, double *out, bool add) {
        using V = Vec<double, Bytes>;
        constexpr int W = V::lanes, G = int(kItems) / W;
        const Term *term = t->terms.data();
        for (int64_t i = 0; i < t->rows; ++i) {
            if (i % 4096 == 0) poll();
            typename V::type s[G];
            for (int q = 0; q < G; ++q) s[q] = add ? V::load(out + i * kItems + q * W) : typename V::type{};
            for (int64_t p = 0; p < t->per; ++p, ++term)
                for (int q = 0; q < G; ++q) s[q] += term->sign * SUBSPAN_ROUNDED(V::load(a + term->a * kItems + q * W) * V::load(b + term->b * kItems + q * W));
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
    template <int Bytes> static SUBSPAN_INLINE void run(int64_t n, const double *g, const double *a, const double *b, double *da, double *db) {
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
    template <int Bytes> static SUBSPAN_INLINE void run(const Table *t, const double *g, const double *a, const double *b, double *da, double *db) {
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

} // namespace

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

Table::Table(int64_t n, int64_t k, int64_t l) : rows(k + l > n ? 0 : binomial(n, k + l)), per(binomial(k + l, k)), vectors(k == 1 && l == 1 ? n : 0) {
    if (rows < 0 || per < 0 || (rows > 0 && per > kTerms / rows))
        throw ValueError("the wedge of a " + std::to_string(k) + "-vector and a " + std::to_string(l) + "-vector of R^" + std::to_string(n) +
                         " has too many terms");
    if (rows == 0 || vectors > 0) return;
    terms.reserve(std::size_t(rows * per));
    const Ranks rank(n, std::max(k, l));
    std::vector<int> whole = first_subset(k + l), left(static_cast<std::size_t>(k)), right(static_cast<std::size_t>(l));
    do {
        poll();
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

void product(const Table &t, const double *a, const double *b, double *out, bool add) {
    if (t.vectors > 0) return simd::dispatch<PairKernel, int64_t, const double *, const double *, double *, bool>(t.vectors, a, b, out, add);
    simd::dispatch<ProductKernel, const Table *, const double *, const double *, double *, bool>(&t, a, b, out, add);
}

void product_backward(const Table &t, const double *g, const double *a, const double *b, double *da, double *db) {
    if (t.vectors > 0)
        return simd::dispatch<PairBackwardKernel, int64_t, const double *, const double *, const double *, double *, double *>(t.vectors, g, a, b, da, db);
    simd::dispatch<ProductBackwardKernel, const Table *, const double *, const double *, const double *, double *, double *>(&t, g, a, b, da, db);
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

} // namespace exterior

int64_t binomial(int64_t n, int64_t k) {
    if (k < 0 || k > n) return 0;
    int64_t c = 1;
    for (int64_t i = 1; i <= std::min(k, n - k); ++i) {
        c = c * (n - i + 1) / i;
        if (c > (int64_t(1) << 31)) return -1;
    }
    return c;
}

void complement_signs(int64_t n, int64_t k, double *out) {
    if (k < 0 || k > n) throw ValueError("k must be from 0 to n");
    exterior::length_of(n, k);
    std::vector<int> s = exterior::first_subset(k);
    for (int64_t count = 0;; ++count) {
        if (count % 65536 == 0) poll();
        int64_t inversions = 0; // element i of s jumps over the s_i - i elements that the complement has below it
        for (int64_t i = 0; i < k; ++i) inversions += s[std::size_t(i)] - i;
        *out++ = inversions % 2 ? -1.0 : 1.0;
        if (!exterior::advance(s, n)) return;
    }
}

} // namespace subspan
