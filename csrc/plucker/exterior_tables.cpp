#include "plucker/exterior_tables.hpp"

#include "base/simd.hpp"
#include "linalg/packing.hpp"

#include <array>
#include <cstring>

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

// Where an item's entries are: those of a matrix may be in memory row by row, column by column, or scattered.
struct Layout {
    int64_t rows, cols; // in the order in which they are wanted
    bool by_columns;    // memory is in the other one
};
// Places in lanes of entries that follow one another in memory.
class Place {
  public:
    Place(const Layout &at, int64_t entry) : step_(at.by_columns ? at.cols : 1), rows_(at.by_columns ? at.rows : at.rows * at.cols) {
        first_ = entry / rows_;
        done_ = entry % rows_;
    }
    int64_t next() {
        const int64_t now = first_ + done_ * step_;
        if (++done_ == rows_) {
            done_ = 0;
            ++first_;
        }
        return now * kItems;
    }

  private:
    int64_t step_, rows_, first_, done_;
};
// Where tiles of W entries begin: the last ones once more rather than fewer than W.
inline int64_t tile_start(int64_t e, int64_t w, int64_t entries) { return e + w > entries && entries >= w ? entries - w : e; }
template <class T> bool is_compact(const MatrixView<T> &m) { return (m.col_stride == 1 || m.cols == 1) && (m.row_stride == m.cols || m.rows == 1); }
template <class T> using Items = std::array<T *, std::size_t(kItems)>;

// A row of kItems numbers from a type to another. `poison` gathers x - x, which is zero or NaN.
template <class From, class To, int Bytes> struct Row {
#ifdef SUBSPAN_SHUFFLE
    // Vectors of one length for what is loaded and what is stored: what was stored in halves is not loaded whole at once.
    static constexpr int W = Bytes / int(std::min(sizeof(From), sizeof(To))), G = int(kItems) / W;
    typedef From In __attribute__((vector_size(W * sizeof(From))));
    typedef To Out __attribute__((vector_size(W * sizeof(To))));
    Out poison = {};
    SUBSPAN_INLINE void convert(const From *from, To *to) {
#pragma GCC unroll 16
        for (int g = 0; g < G; ++g) {
            In x;
            std::memcpy(&x, from + g * W, sizeof x);
            const Out y = __builtin_convertvector(x, Out);
            poison += y - y;
            std::memcpy(to + g * W, &y, sizeof y);
        }
    }
    SUBSPAN_INLINE bool good() const {
        bool all = true;
        for (int l = 0; l < W; ++l) all = all && poison[l] == To(0);
        return all;
    }
#else
    To poison[kItems] = {};
    void convert(const From *from, To *to) {
        for (int l = 0; l < int(kItems); ++l) {
            to[l] = To(from[l]);
            poison[l] += to[l] - to[l];
        }
    }
    bool good() const {
        return std::all_of(poison, poison + kItems, [](To x) { return x == To(0); });
    }
#endif
};

// Compact items, by transposes of vectors; entry after entry would be one strided access each.
// The block after this one, where blocks follow one another: each is a burst of few lines, which prefetchers do not foresee.
template <class T> SUBSPAN_INLINE void prefetch_next(const Items<T> &items, int64_t count, int64_t entries) {
    if (count < kItems) return;
    const auto step = reinterpret_cast<const char *>(items[1]) - reinterpret_cast<const char *>(items[0]);
    const int64_t bytes = entries * int64_t(sizeof(T));
    if (bytes > 1024) return;
    for (int64_t l = 0; l < kItems; ++l)
        for (int64_t at = 0; at < bytes; at += 64) simd::prefetch(reinterpret_cast<const char *>(items[std::size_t(l)]) + kItems * step + at);
}

// Items of a few entries are less than a vector, and go one by one.
constexpr int64_t kShort = 4;
template <class F> SUBSPAN_INLINE void few(int64_t entries, const F &f) {
    switch (entries) {
    case 0: return;
    case 1: return f(std::integral_constant<int, 1>());
    case 2: return f(std::integral_constant<int, 2>());
    case 3: return f(std::integral_constant<int, 3>());
    default: return f(std::integral_constant<int, 4>());
    }
}

template <class T> struct LanesKernel {
    template <int K> static SUBSPAN_INLINE void short_items(const Items<const T> *items, int64_t count, const Layout *at, double *to, bool *finite) {
        Place place(*at, 0);
        double poison = 0;
        for (int e = 0; e < K; ++e) {
            double *out = to + place.next();
            for (int64_t l = 0; l < count; ++l) {
                const auto x = double((*items)[std::size_t(l)][e]);
                out[l] = x;
                poison += x - x;
            }
            std::fill(out + count, out + kItems, 0.0);
        }
        *finite = poison == 0.0;
    }
    template <int Bytes> static SUBSPAN_INLINE void run(const Items<const T> *items, int64_t count, const Layout *at, double *to, bool *finite) {
        constexpr int W = Vec<T, Bytes>::lanes, L = int(kItems);
        const int64_t entries = at->rows * at->cols;
        if (entries <= kShort) return few(entries, [&](auto k) SUBSPAN_LAMBDA_INLINE { short_items<decltype(k)::value>(items, count, at, to, finite); });
        alignas(64) T rows[L * W] = {}, tile[W * L];
        Row<T, double, Bytes> row;
        prefetch_next(*items, count, entries);
        for (int64_t tile_at = 0; tile_at < entries; tile_at += W) {
            const int64_t e = tile_start(tile_at, W, entries), some = std::min<int64_t>(W, entries - e);
            Place place(*at, e);
            for (int64_t l = 0; l < count; ++l) {
                const T *p = (*items)[std::size_t(l)] + e;
                if (some == W)
                    Vec<T, Bytes>::store(rows + l * W, Vec<T, Bytes>::load(p));
                else
                    std::copy_n(p, some, rows + l * W);
            }
            for (int l = 0; l < L; l += W) simd::Transpose<T, Bytes>::block(rows + l * W, W, nullptr, nullptr, tile + l, L);
            for (int64_t i = 0; i < some; ++i) {
                double *out = to + place.next();
                row.convert(tile + i * L, out);
            }
        }
        *finite = row.good();
    }
};
template <class T> struct FromLanesKernel {
    template <int K> static SUBSPAN_INLINE void short_items(const double *from, int64_t count, const Layout *at, const Items<T> *items, bool *finite) {
        Place place(*at, 0);
        T poison = 0;
        for (int e = 0; e < K; ++e) {
            const double *in = from + place.next();
            for (int64_t l = 0; l < count; ++l) {
                const T x = T(in[l]);
                (*items)[std::size_t(l)][e] = x;
                poison += x - x;
            }
        }
        *finite = poison == T(0);
    }
    template <int Bytes> static SUBSPAN_INLINE void run(const double *from, int64_t count, const Layout *at, const Items<T> *items, bool *finite) {
        constexpr int W = Vec<T, Bytes>::lanes, L = int(kItems);
        const int64_t entries = at->rows * at->cols;
        if (entries <= kShort) return few(entries, [&](auto k) SUBSPAN_LAMBDA_INLINE { short_items<decltype(k)::value>(from, count, at, items, finite); });
        alignas(64) T rows[L * W], tile[W * L] = {};
        Row<double, T, Bytes> row;
        prefetch_next(*items, count, entries);
        for (int64_t tile_at = 0; tile_at < entries; tile_at += W) {
            const int64_t e = tile_start(tile_at, W, entries), some = std::min<int64_t>(W, entries - e);
            Place place(*at, e);
            for (int64_t i = 0; i < some; ++i) {
                const double *in = from + place.next();
                row.convert(in, tile + i * L);
            }
            for (int l = 0; l < L; l += W) simd::Transpose<T, Bytes>::block(tile + l, L, nullptr, nullptr, rows + l * W, W);
            for (int64_t l = 0; l < count; ++l) {
                T *p = (*items)[std::size_t(l)] + e;
                if (some == W)
                    Vec<T, Bytes>::store(p, Vec<T, Bytes>::load(rows + l * W));
                else
                    std::copy_n(rows + l * W, some, p);
            }
        }
        *finite = row.good();
    }
};

// The largest magnitude of each lane.
struct TopsKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(const double *x, int64_t n, double *top) {
        double most[kItems] = {};
        for (int64_t i = 0; i < n; ++i)
            for (int l = 0; l < int(kItems); ++l) {
                const double size = std::abs(x[i * kItems + l]);
                most[l] = most[l] < size ? size : most[l];
            }
        std::copy_n(most, kItems, top);
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

template <class T> struct VectorsKernel {
    // Steps that are constants let the compiler work on several pairs at once.
    template <int N, bool Packed> static SUBSPAN_INLINE void pairs(const Vectors<T> &x, int64_t begin, int64_t end, bool *good) {
        constexpr int P = N * (N - 1) / 2;
        T poison = 0;
        for (int64_t i = begin; i < end; ++i) {
            const T *a = x.a + i * (Packed ? N : x.a_step), *b = x.b + i * (Packed ? N : x.b_step);
            T *out = x.out + i * (Packed ? P : x.out_step), w[P];
            for (int r = 0, p = 0; r < N; ++r)
                for (int c = r + 1; c < N; ++c, ++p) w[p] = T(SUBSPAN_ROUNDED(double(a[r]) * double(b[c])) - SUBSPAN_ROUNDED(double(a[c]) * double(b[r])));
            for (int p = 0; p < P; ++p) {
                out[p] = w[p];
                poison += w[p] - w[p];
            }
        }
        if (poison == T(0)) return;
        for (int64_t i = begin; i < end; ++i) {
            const T *a = x.a + i * x.a_step, *b = x.b + i * x.b_step, *out = x.out + i * x.out_step;
            T in = 0, result = 0;
            for (int r = 0; r < N; ++r) in += (a[r] - a[r]) + (b[r] - b[r]);
            for (int p = 0; p < P; ++p) result += out[p] - out[p];
            if (in == T(0) && result != T(0)) *good = false;
        }
    }
    template <int Bytes> static SUBSPAN_INLINE void run(int64_t n, int64_t begin, int64_t end, const Vectors<T> *x, bool *good) {
        const bool packed = x->a_step == n && x->b_step == n && x->out_step == n * (n - 1) / 2;
        switch (n) {
        case 2: return packed ? pairs<2, true>(*x, begin, end, good) : pairs<2, false>(*x, begin, end, good);
        case 3: return packed ? pairs<3, true>(*x, begin, end, good) : pairs<3, false>(*x, begin, end, good);
        case 4: return packed ? pairs<4, true>(*x, begin, end, good) : pairs<4, false>(*x, begin, end, good);
        case 5: return pairs<5, false>(*x, begin, end, good);
        default: return pairs<6, false>(*x, begin, end, good);
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

template <class T> bool wedge_vectors(int64_t n, int64_t items, const Vectors<T> &x) {
    constexpr int64_t kTask = 16384;
    std::atomic<bool> good{true};
    parallel_for((items + kTask - 1) / kTask, [&](int64_t t) {
        bool mine = true;
        simd::dispatch<VectorsKernel<T>, int64_t, int64_t, int64_t, const Vectors<T> *, bool *>(n, t * kTask, std::min(items, (t + 1) * kTask), &x, &mine);
        if (!mine) good = false;
    });
    return good;
}
template bool wedge_vectors<float>(int64_t, int64_t, const Vectors<float> &);
template bool wedge_vectors<double>(int64_t, int64_t, const Vectors<double> &);

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

template <class T> bool load(const StackView<const T> &x, int64_t first, int64_t count, double *to) {
    const int64_t rows = x.rows(), cols = x.cols();
    const auto turned = x.first.transposed();
    if (is_compact(x.first) || is_compact(turned)) {
        Items<const T> items;
        for (int64_t l = 0; l < count; ++l) items[std::size_t(l)] = x[first + l].data;
        const Layout at{rows, cols, !is_compact(x.first)};
        bool finite = true;
        simd::dispatch<LanesKernel<T>, const Items<const T> *, int64_t, const Layout *, double *, bool *>(&items, count, &at, to, &finite);
        return finite;
    }
    double poison = 0;
    for (int64_t l = 0; l < kItems; ++l) {
        if (l >= count) {
            for (int64_t e = 0; e < rows * cols; ++e) to[e * kItems + l] = 0;
            continue;
        }
        const auto m = x[first + l];
        for (int64_t i = 0, e = 0; i < m.rows; ++i)
            for (int64_t j = 0; j < cols; ++j, ++e) {
                const auto v = double(m(i, j));
                poison += v - v;
                to[e * kItems + l] = v;
            }
    }
    return poison == 0.0;
}

template <class T> bool store(const double *from, int64_t first, int64_t count, const StackView<T> &x) {
    const auto turned = x.first.transposed();
    if (is_compact(x.first) || is_compact(turned)) {
        Items<T> items;
        for (int64_t l = 0; l < count; ++l) items[std::size_t(l)] = x[first + l].data;
        const Layout at{x.rows(), x.cols(), !is_compact(x.first)};
        bool finite = true;
        simd::dispatch<FromLanesKernel<T>, const double *, int64_t, const Layout *, const Items<T> *, bool *>(from, count, &at, &items, &finite);
        return finite;
    }
    T poison = 0;
    for (int64_t l = 0; l < count; ++l) {
        const auto m = x[first + l];
        for (int64_t i = 0, e = 0; i < m.rows; ++i)
            for (int64_t j = 0; j < m.cols; ++j, ++e) {
                const T v = T(from[e * kItems + l]);
                m(i, j) = v;
                poison += v - v;
            }
    }
    return poison == T(0);
}

#define SUBSPAN_INSTANTIATE(T)                                                                                                                                 \
    template bool load<T>(const StackView<const T> &, int64_t, int64_t, double *);                                                                             \
    template bool store<T>(const double *, int64_t, int64_t, const StackView<T> &);
SUBSPAN_INSTANTIATE(float)
SUBSPAN_INSTANTIATE(double)
#undef SUBSPAN_INSTANTIATE

Scales::Scales(double *columns, int64_t n, int64_t k) : n_(n), k_(k) {
    // Products of k numbers within these are numbers.
    const double high = std::ldexp(1.0, int(std::max<int64_t>(900 / k, 1))), low = 1 / high;
    for (int64_t j = 0; j < k; ++j) {
        double top[kItems];
        simd::dispatch<TopsKernel, const double *, int64_t, double *>(columns + j * n * kItems, n, top);
        for (int64_t l = 0; l < kItems; ++l) {
            if ((top[l] >= low && top[l] <= high) || !(top[l] > 0) || !std::isfinite(top[l])) continue;
            const int e = std::ilogb(top[l]);
            if (total_.empty()) {
                exponent_.resize(std::size_t(k * kItems));
                total_.resize(std::size_t(kItems));
            }
            exponent_[std::size_t(j * kItems + l)] = e;
            total_[std::size_t(l)] += e;
            for (int64_t i = 0; i < n; ++i) columns[(j * n + i) * kItems + l] = std::ldexp(columns[(j * n + i) * kItems + l], -e);
        }
    }
}

void Scales::give_back(double *x, int64_t length) const {
    if (total_.empty()) return;
    for (int64_t l = 0; l < kItems; ++l)
        for (int64_t i = 0; i < length && total_[std::size_t(l)] != 0; ++i) x[i * kItems + l] = lift(x[i * kItems + l], total_[std::size_t(l)]);
}

void Scales::give_back_to_columns(double *x) const {
    if (total_.empty()) return;
    for (int64_t j = 0; j < k_; ++j)
        for (int64_t l = 0; l < kItems; ++l) {
            const int64_t e = total_[std::size_t(l)] - exponent_[std::size_t(j * kItems + l)];
            for (int64_t i = 0; i < n_ && e != 0; ++i) x[(j * n_ + i) * kItems + l] = lift(x[(j * n_ + i) * kItems + l], e);
        }
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
