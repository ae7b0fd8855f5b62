#include "plucker/exterior_tables.hpp"
#include "base/simd.hpp"

namespace subspan {

using namespace exterior;

namespace {

using simd::Vec;

// What relations and bases look up: p(I, j) for |I| = k - 1 and any j, as an index and a sign (0 where j is in I), and the
// subsets of J with one element left out.
struct Contraction {
    Contraction(int64_t n, int64_t k) : n(n), k(k), few(length_of(n, k - 1)), many(length_of(n, k + 1)) {
        if (few > kTerms / std::max<int64_t>(n, 1) || many > kTerms / (k + 1)) throw ValueError("there are too many relations");
        const Ranks rank(n, k);
        std::vector<int> s = first_subset(k - 1), with(static_cast<std::size_t>(k));
        if (few > 0) do {
                poll();
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
        if (many > 0) do {
                if (element.size() % 65536 < std::size_t(k + 1)) poll();
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
    template <int Bytes> static SUBSPAN_INLINE void run(const Contraction *c, int64_t i, const double *p, double *out, double *dp) {
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

void lower(std::atomic<int64_t> &least, int64_t item) {
    int64_t seen = least;
    while (item < seen && !least.compare_exchange_weak(seen, item)) {}
}

} // namespace

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
            poll();
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

template <class T> bool plucker_relations_backward(const StackView<const T> &grad, const StackView<const T> &p, int64_t n, int64_t k, const StackView<T> &dp) {
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
            poll();
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

template <class T> int64_t plucker_basis_backward(const StackView<const T> &grad, const StackView<const T> &p, int64_t n, int64_t k, const StackView<T> &dp) {
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

#define SUBSPAN_INSTANTIATE(T)                                                                                                                                 \
    template bool plucker_relations<T>(const StackView<const T> &, int64_t, int64_t, const StackView<T> &);                                                    \
    template bool plucker_relations_backward<T>(const StackView<const T> &, const StackView<const T> &, int64_t, int64_t, const StackView<T> &);               \
    template int64_t plucker_basis<T>(const StackView<const T> &, int64_t, int64_t, const StackView<T> &);                                                     \
    template int64_t plucker_basis_backward<T>(const StackView<const T> &, const StackView<const T> &, int64_t, int64_t, const StackView<T> &);
SUBSPAN_INSTANTIATE(float)
SUBSPAN_INSTANTIATE(double)
#undef SUBSPAN_INSTANTIATE

} // namespace subspan
