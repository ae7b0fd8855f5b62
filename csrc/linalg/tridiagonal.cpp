// Divide and conquer for the symmetric tridiagonal eigenproblem. The reason to have our own: only the k leading
// vectors of the last merge are formed, and the secular equation is evaluated a vector of poles at a time. At n = 256,
// k = 128 that is a quarter of LAPACK's dstedc (docs/notes/kernels.md).
#include "base/scratch.hpp"
#include "base/simd.hpp"
#include "subspan/eigh.hpp"
#include "subspan/errors.hpp"
#include "subspan/gemm.hpp"
#include "subspan/parallel.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

namespace subspan {
namespace {

constexpr double kEps = std::numeric_limits<double>::epsilon() / 2; // unit roundoff
constexpr std::int64_t kLeaf = 20;

// Implicit QL with Wilkinson shifts on a leaf; the eigenvectors are the rows of q (stride ld), so that a rotation
// combines two contiguous rows.
SUBSPAN_INLINE void leaf(std::int64_t n, double *d, double *e, double *q, std::int64_t ld) {
    for (std::int64_t i = 0; i < n; ++i) {
        std::fill_n(q + i * ld, n, 0.0);
        q[i * ld + i] = 1.0;
    }
    double norm = 0;
    for (std::int64_t i = 0; i < n; ++i) norm = std::max(norm, std::abs(d[i]) + (i + 1 < n ? std::abs(e[i]) : 0.0));
    // A part of the matrix that is next to nothing beside the rest: its squares would underflow, and rotations with them.
    double up = 1.0;
    if (norm > 0 && norm < 0x1p-400) {
        up = std::ldexp(1.0, std::min(1000, -std::ilogb(norm)));
        norm *= up;
        for (std::int64_t i = 0; i < n; ++i) {
            d[i] *= up;
            if (i + 1 < n) e[i] *= up;
        }
    }
    for (std::int64_t l = 0; l < n; ++l) {
        for (int iteration = 0;; ++iteration) {
            // Relative to its neighbours, so that graded matrices keep small values. Where these are what rounding has left, sweeps bring new
            // rounding of the large ones for ever: what is near that of the whole matrix, a little more with each sweep, counts as zero then.
            const double nothing = iteration < 20 ? std::numeric_limits<double>::min() : (iteration - 19) * kEps * norm;
            std::int64_t m = l;
            for (; m + 1 < n; ++m)
                if (std::abs(e[m]) <= kEps * std::sqrt(std::abs(d[m])) * std::sqrt(std::abs(d[m + 1])) || std::abs(e[m]) < nothing) break;
            if (m == l) break;
            if (iteration == 60) throw LinAlgError("tridiagonal eigenproblem: QL did not converge");
            double g = (d[l + 1] - d[l]) / (2.0 * e[l]);
            double r = std::sqrt(g * g + 1.0);
            g = d[m] - d[l] + e[l] / (g + std::copysign(r, g));
            double s = 1.0, c = 1.0, p = 0.0;
            std::int64_t i = m - 1;
            for (; i >= l; --i) {
                const double f = s * e[i], b = c * e[i];
                r = f * f + g * g; // entries are at most a few units: no overflow
                // Squares that underflow would leave no rotation, nor would quotients of numbers that have lost their digits. No
                // std::hypot: its symbol is newer than the glibc that a wheel promises.
                constexpr double up = 0x1p500;
                r = r > 1e-280 ? std::sqrt(r) : std::sqrt(f * up * (f * up) + g * up * (g * up)) / up;
                if (r < 1e-290) r = 0.0;
                e[i + 1] = r;
                if (r == 0.0) { // a split: recover and start again; row i + 1 may have been flipped
                    d[i + 1] -= p;
                    e[i] = b;
                    e[m] = 0.0;
                    break;
                }
                s = f / r;
                c = g / r;
                g = d[i + 1] - p;
                const double t = (d[i] - g) * s + 2.0 * c * b;
                p = s * t;
                d[i + 1] = g + p;
                g = c * t - b;
                double *x = q + i * ld, *y = q + (i + 1) * ld;
                for (std::int64_t j = 0; j < n; ++j) {
                    const double v = y[j];
                    y[j] = s * x[j] + c * v;
                    x[j] = c * x[j] - s * v;
                }
            }
            if (r == 0.0 && i >= l) continue;
            d[l] -= p;
            e[l] = g;
            e[m] = 0.0;
        }
    }
    for (std::int64_t i = 0; i < n && up != 1.0; ++i) d[i] /= up;
}

struct LeafKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(std::int64_t n, double *d, double *e, double *q, std::int64_t ld) { leaf(n, d, e, q, ld); }
};

struct Sums {
    double f, df; // sum w_i / (delta_i - mu) and sum w_i / (delta_i - mu)²
};

// Sums over the poles on one side of a root.
template <int Bytes> SUBSPAN_INLINE Sums side(const double *delta, const double *w, std::int64_t n, double mu) {
    using V = simd::Vec<double, Bytes>;
    constexpr int W = V::lanes;
    typename V::type f0{}, f1{}, g0{}, g1{}; // two chains hide the latency of the division
    std::int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
        const auto r0 = 1.0 / (V::load(delta + i) - mu), r1 = 1.0 / (V::load(delta + i + W) - mu);
        const auto t0 = V::load(w + i) * r0, t1 = V::load(w + i + W) * r1;
        f0 += t0;
        f1 += t1;
        g0 += t0 * r0;
        g1 += t1 * r1;
    }
    for (; i + W <= n; i += W) {
        const auto r = 1.0 / (V::load(delta + i) - mu);
        const auto t = V::load(w + i) * r;
        f0 += t;
        g0 += t * r;
    }
    f0 += f1;
    g0 += g1;
    Sums s{V::sum(f0), V::sum(g0)};
    for (; i < n; ++i) {
        const double r = 1.0 / (delta[i] - mu), t = w[i] * r;
        s.f += t;
        s.df += t * r;
    }
    return s;
}

// One root of 1/rho + sum w_i / (d_i - x) in (d_j, d_{j+1}), the last one in (d_{K-1}, d_{K-1} + rho·sum w).
// Returned as an offset mu from the pole `origin`, which keeps the relative accuracy of the distances to the poles.
struct Secular {
    std::int64_t K;
    const double *d, *w;   // poles ascending, weights z²
    double rho_inv, total; // total = rho·sum w
    double *delta;         // work, K
    double *diff;          // K x K: row j receives d_i - lambda_j
    double *prod;          // K: prod_i collects (lambda_j - d_i) / (d_j - d_i), without the divisor at i = j
    double *lambda;        // K
    bool failed;
};

template <int Bytes> SUBSPAN_INLINE bool secular_root(const Secular &q, std::int64_t j, std::int64_t &origin, double &mu) {
    const std::int64_t K = q.K;
    const double *d = q.d, *w = q.w;
    double *delta = q.delta;
    const bool last = j + 1 == K;
    const double gap = last ? q.total : d[j + 1] - d[j];
    for (std::int64_t i = 0; i < K; ++i) delta[i] = d[i] - d[j];
    Sums left = side<Bytes>(delta, w, j + 1, gap / 2), right = side<Bytes>(delta + j + 1, w + j + 1, K - j - 1, gap / 2);
    const double mid = q.rho_inv + left.f + right.f;
    const double wl = w[j], wr = last ? 0.0 : w[j + 1];
    // The two nearest poles exactly, the others frozen at the midpoint.
    const double c = mid + 2.0 * wl / gap - 2.0 * wr / gap;
    double lo, hi;
    if (mid >= 0.0 || last) {
        origin = j;
        lo = mid >= 0.0 ? 0.0 : gap / 2;
        hi = mid >= 0.0 ? gap / 2 : gap;
        const double a = c * gap + wl + wr, b = wl * gap, s = std::sqrt(std::abs(a * a - 4.0 * b * c));
        mu = a > 0.0 ? 2.0 * b / (a + s) : (a - s) / (2.0 * c);
    } else {
        origin = j + 1;
        lo = -gap / 2;
        hi = 0.0;
        for (std::int64_t i = 0; i < K; ++i) delta[i] = d[i] - d[j + 1];
        const double a = -c * gap + wl + wr, b = wr * gap, s = std::sqrt(std::abs(a * a + 4.0 * b * c));
        mu = a > 0.0 ? -2.0 * b / (a + s) : (a - s) / (2.0 * c);
    }
    const double left_pole = origin == j ? 0.0 : -gap, right_pole = origin == j ? gap : 0.0;
    for (int iteration = 0; iteration < 100; ++iteration) {
        if (!(mu > lo && mu < hi)) {
            // Bisect in the logarithm near a pole: the offset may be many orders of magnitude below the gap.
            const double big = std::abs(hi) > std::abs(lo) ? hi : lo, small = big == hi ? lo : hi;
            mu = small == 0.0 ? big / 1024 : std::copysign(std::sqrt(std::abs(big) * std::abs(small)), big);
            if (!(mu > lo && mu < hi)) mu = lo + (hi - lo) / 2;
            if (!(mu > lo && mu < hi)) return true; // adjacent numbers
        }
        left = side<Bytes>(delta, w, j + 1, mu);
        right = side<Bytes>(delta + j + 1, w + j + 1, K - j - 1, mu);
        const double f = q.rho_inv + left.f + right.f;
        const double bound = q.rho_inv + 8.0 * (std::abs(left.f) + std::abs(right.f)) + std::abs(mu) * (left.df + right.df);
        if (std::abs(f) <= kEps * bound) return true;
        (f < 0.0 ? lo : hi) = mu;
        const double dl = left_pole - mu, dr = right_pole - mu;
        const double cc = f - left.df * dl - right.df * dr;
        const double a = (dl + dr) * f - dl * dr * (left.df + right.df), b = dl * dr * f;
        const double s = std::sqrt(std::max(0.0, a * a - 4.0 * b * cc));
        double eta = cc == 0.0 ? b / a : a <= 0.0 ? (a - s) / (2.0 * cc) : 2.0 * b / (a + s);
        if (f * eta >= 0.0) eta = -f / (left.df + right.df); // rounding: a Newton step points the right way
        const double next = mu + eta;
        if (next == mu) return true;
        mu = next;
    }
    return false;
}

// Roots [begin, end) and their rows of differences.
struct RootsKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(Secular *q, std::int64_t begin, std::int64_t end) {
        const std::int64_t K = q->K;
        const double *d = q->d;
        for (std::int64_t j = begin; j < end; ++j) {
            poll();
            std::int64_t origin = j;
            double mu = 0;
            if (!secular_root<Bytes>(*q, j, origin, mu)) {
                q->failed = true;
                return;
            }
            const double at = d[origin];
            q->lambda[j] = at + mu;
            double *row = q->diff + j * K;
            for (std::int64_t i = 0; i < K; ++i) row[i] = (d[i] - at) - mu;
        }
    }
};

// prod_i for i in [begin, end), in the order of the roots.
struct ProductsKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(const Secular *q, std::int64_t begin, std::int64_t end) {
        const double *d = q->d;
        double *prod = q->prod;
        for (std::int64_t j = 0; j < q->K; ++j) {
            poll();
            const double dj = d[j];
            const double *row = q->diff + j * q->K;
            for (std::int64_t i = begin; i < std::min(end, j); ++i) prod[i] *= row[i] / (d[i] - dj);
            if (j >= begin && j < end) prod[j] *= -row[j];
            for (std::int64_t i = std::max(begin, j + 1); i < end; ++i) prod[i] *= row[i] / (d[i] - dj);
        }
    }
};

struct VectorArgs {
    std::int64_t K;
    const double *zhat, *diff;
    const std::int64_t *columns;
    double *v, *out;
};

// out = normalised zhat_i / (d_i - lambda), in the order of `columns`.
struct VectorKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(const VectorArgs *a) {
        using V = simd::Vec<double, Bytes>;
        constexpr int W = V::lanes;
        double *v = a->v;
        for (std::int64_t i = 0; i < a->K; ++i) v[i] = a->zhat[i] / a->diff[i];
        typename V::type sum{};
        std::int64_t i = 0;
        for (; i + W <= a->K; i += W) sum += V::load(v + i) * V::load(v + i);
        double norm = V::sum(sum);
        for (; i < a->K; ++i) norm += v[i] * v[i];
        norm = 1.0 / std::sqrt(norm);
        for (i = 0; i < a->K; ++i) a->out[i] = v[a->columns[i]] * norm;
    }
};

class Solver {
  public:
    Solver(std::int64_t n, double *d, double *e) : n_(n), d_(d), e_(e), q_(frame_.take<double>(n * n)), next_(frame_.take<double>(n * n)) {}

    // Eigenvalues ascending into d[first, first + n); eigenvectors as rows of q, within columns [first, first + n).
    // Only the `keep` largest vectors are formed.
    void solve(std::int64_t first, std::int64_t n, std::int64_t keep) {
        if (n <= kLeaf) {
            simd::dispatch<LeafKernel>(n, d_ + first, e_ + first, at(first), n_);
            sort_leaf(first, n);
            return;
        }
        const std::int64_t n1 = n / 2, n2 = n - n1;
        const double beta = e_[first + n1 - 1], rho = std::abs(beta);
        d_[first + n1 - 1] -= rho;
        d_[first + n1] -= rho;
        e_[first + n1 - 1] = 0.0;
        // The halves share nothing; near the root they are worth waking a thread for.
        if (n >= 192) {
            parallel_for(2, [&](std::int64_t half) { half == 0 ? solve(first, n1, n1) : solve(first + n1, n2, n2); });
        } else {
            solve(first, n1, n1);
            solve(first + n1, n2, n2);
        }
        merge(first, n1, n2, beta, keep);
    }

    // The same of diag(d) + rho z zᵀ, from the start.
    void rank_one(std::vector<double> z, double rho, std::int64_t keep) {
        std::fill_n(q_, n_ * n_, 0.0);
        for (std::int64_t i = 0; i < n_; ++i) q_[i * n_ + i] = 1.0;
        secular(0, n_, 0, std::vector<double>(d_, d_ + n_), std::move(z), rho, keep);
    }

    const double *vectors() const { return q_; }

  private:
    double *at(std::int64_t i) { return q_ + i * n_ + i; }

    void sort_leaf(std::int64_t first, std::int64_t n) {
        double *d = d_ + first;
        for (std::int64_t i = 0; i < n; ++i) {
            const std::int64_t j = std::min_element(d + i, d + n) - d;
            if (j == i) continue;
            std::swap(d[i], d[j]);
            std::swap_ranges(at(first) + i * n_, at(first) + i * n_ + n, at(first) + j * n_);
        }
    }

    void merge(std::int64_t first, std::int64_t n1, std::int64_t n2, double beta, std::int64_t keep) {
        const std::int64_t n = n1 + n2;
        double *d = d_ + first;
        double *rows = at(first); // block-diagonal until a deflation rotates rows of both blocks together
        const double sign = beta < 0.0 ? -1.0 : 1.0;
        std::vector<double> z(n), dd(d, d + n);
        for (std::int64_t i = 0; i < n1; ++i) z[i] = rows[i * n_ + n1 - 1] * std::sqrt(0.5);
        for (std::int64_t i = n1; i < n; ++i) z[i] = sign * rows[i * n_ + n1] * std::sqrt(0.5);
        const double rho = 2.0 * std::abs(beta);
        for (std::int64_t i = 0; i < n1; ++i) std::fill_n(rows + i * n_ + n1, n2, 0.0);
        for (std::int64_t i = n1; i < n; ++i) std::fill_n(rows + i * n_, n1, 0.0);
        secular(first, n1, n2, std::move(dd), std::move(z), rho, keep);
    }

    // diag(dd) + rho z zᵀ in the basis of the rows, of which the first n1 end, and the others begin, at column n1.
    void secular(std::int64_t first, std::int64_t n1, std::int64_t n2, std::vector<double> dd, std::vector<double> z, double rho, std::int64_t keep) {
        const std::int64_t n = n1 + n2;
        double *d = d_ + first, *rows = at(first);
        std::vector<std::int64_t> order(n);
        std::iota(order.begin(), order.end(), 0);
        std::sort(order.begin(), order.end(), [&](auto a, auto b) { return dd[a] < dd[b]; });
        double dmax = 0, zmax = 0;
        for (std::int64_t i = 0; i < n; ++i) {
            dmax = std::max(dmax, std::abs(dd[i]));
            zmax = std::max(zmax, std::abs(z[i]));
        }
        const double tol = 8.0 * kEps * std::max(dmax, zmax);

        // Deflation. kind: 0 rows of the first block, 1 of both, 2 of the second.
        std::vector<char> kind(n);
        for (std::int64_t i = 0; i < n; ++i) kind[i] = i < n1 ? 0 : 2;
        std::vector<std::int64_t> live, dead;
        std::int64_t previous = -1;
        for (const std::int64_t i : order) {
            if (rho * std::abs(z[i]) <= tol) {
                dead.push_back(i);
                continue;
            }
            if (previous >= 0) {
                const double tau = std::sqrt(z[i] * z[i] + z[previous] * z[previous]), c = z[i] / tau, s = -z[previous] / tau;
                const double t = dd[i] - dd[previous];
                if (std::abs(t * c * s) <= tol) {
                    // A rotation moves the whole weight of the pair to i; `previous` is an eigenpair now.
                    z[i] = tau;
                    z[previous] = 0.0;
                    double *x = rows + previous * n_, *y = rows + i * n_;
                    for (std::int64_t j = 0; j < n; ++j) {
                        const double u = x[j];
                        x[j] = c * u + s * y[j];
                        y[j] = c * y[j] - s * u;
                    }
                    if (kind[i] != kind[previous]) kind[i] = kind[previous] = 1;
                    const double a = dd[previous], b = dd[i];
                    dd[previous] = a * c * c + b * s * s;
                    dd[i] = a * s * s + b * c * c;
                    dead.push_back(previous);
                    live.pop_back();
                }
            }
            live.push_back(i);
            previous = i;
        }

        const auto K = std::int64_t(live.size());
        std::vector<double> dk(K), wk(K), lambda(K), prod(K, 1.0);
        double sum = 0;
        for (std::int64_t i = 0; i < K; ++i) {
            dk[i] = dd[live[i]];
            wk[i] = z[live[i]] * z[live[i]];
            sum += wk[i];
        }
        Frame frame;
        double *diff_all = frame.take<double>(K * K);
        // A few parts, each with its own work array: more than threads, so that they even out.
        const std::int64_t parts = K >= 128 ? std::min<std::int64_t>(2 * num_threads(), K / 32) : 1;
        std::vector<Secular> parts_of(static_cast<std::size_t>(parts),
                                      Secular{K, dk.data(), wk.data(), 1.0 / rho, rho * sum, nullptr, diff_all, prod.data(), lambda.data(), false});
        for (std::int64_t p = 0; p < parts; ++p) parts_of[std::size_t(p)].delta = frame.take<double>(K);
        parallel_for(parts, [&](std::int64_t p) { simd::dispatch<RootsKernel>(&parts_of[std::size_t(p)], K * p / parts, K * (p + 1) / parts); });
        bool failed = false;
        for (const auto &q : parts_of) failed = failed || q.failed;
        if (!failed)
            parallel_for(parts, [&](std::int64_t p) {
                const Secular *q = &parts_of[std::size_t(p)];
                simd::dispatch<ProductsKernel>(q, K * p / parts, K * (p + 1) / parts);
            });
        if (failed) throw LinAlgError("tridiagonal eigenproblem: the secular equation did not converge");

        // Ascending order of all eigenvalues; those below n - keep get no vector.
        struct Entry {
            double value;
            std::int64_t index;
            bool is_live;
        };
        std::vector<Entry> all;
        all.reserve(n);
        for (std::int64_t j = 0; j < K; ++j) all.push_back({lambda[j], j, true});
        for (const std::int64_t i : dead) all.push_back({dd[i], i, false});
        std::stable_sort(all.begin(), all.end(), [](const Entry &a, const Entry &b) { return a.value < b.value; });

        // Columns of the coefficient matrix in the order of kind, so that each half needs one dense product.
        std::vector<std::int64_t> columns(K);
        std::iota(columns.begin(), columns.end(), 0);
        std::stable_sort(columns.begin(), columns.end(), [&](auto a, auto b) { return kind[live[a]] < kind[live[b]]; });
        std::int64_t k0 = 0, k1 = 0;
        for (const std::int64_t i : live) {
            k0 += kind[i] == 0;
            k1 += kind[i] == 1;
        }
        const std::int64_t wanted = std::count_if(all.end() - keep, all.end(), [](const Entry &a) { return a.is_live; });
        double *coef = frame.take<double>(wanted * K);
        std::vector<double> zhat(K);
        for (std::int64_t i = 0; i < K; ++i) zhat[i] = std::copysign(std::sqrt(std::abs(prod[i])), z[live[i]]);
        std::vector<double> v(K);
        std::int64_t row = 0;
        for (auto it = all.end() - keep; it != all.end(); ++it) {
            poll();
            if (!it->is_live) continue;
            const VectorArgs args{K, zhat.data(), diff_all + it->index * K, columns.data(), v.data(), coef + row * K};
            simd::dispatch<VectorKernel>(&args);
            ++row;
        }
        double *gather = frame.take<double>(K * std::max(n1, n2)), *product = frame.take<double>(wanted * n);
        const auto half = [&](std::int64_t from, std::int64_t to, std::int64_t c0, std::int64_t width) {
            if (wanted == 0 || width == 0) return;
            for (std::int64_t i = from; i < to; ++i) std::copy_n(rows + live[columns[i]] * n_ + c0, width, gather + (i - from) * width);
            gemm<double>(MatrixView<const double>(coef + from, wanted, to - from, K, 1), MatrixView<const double>(gather, to - from, width),
                         MatrixView<double>(product + c0, wanted, width, n, 1));
        };
        half(0, k0 + k1, 0, n1);
        half(k0, K, n1, n2);

        row = 0;
        std::int64_t position = n - keep;
        for (std::int64_t i = 0; i < n; ++i) d[i] = all[i].value;
        double *to = next_ + first * n_ + first;
        for (auto it = all.end() - keep; it != all.end(); ++it, ++position) {
            const double *from = it->is_live ? product + row++ * n : rows + it->index * n_;
            std::copy_n(from, n, to + position * n_);
        }
        for (std::int64_t i = n - keep; i < n; ++i) std::copy_n(to + i * n_, n, rows + i * n_);
    }

    Frame frame_;
    std::int64_t n_;
    double *d_, *e_, *q_, *next_;
};

} // namespace

void rank_one_top(std::int64_t n, std::int64_t k, const double *d, const double *z, double *values, double *vectors) {
    double square = 0, scale = 0;
    for (std::int64_t i = 0; i < n; ++i) {
        square += z[i] * z[i];
        scale = std::max(scale, std::abs(d[i]));
    }
    scale = std::max(scale, square);
    if (scale == 0.0) scale = 1.0;
    Frame frame;
    double *own = frame.take<double>(n), *none = frame.take<double>(1);
    std::vector<double> unit(static_cast<std::size_t>(n));
    const double root = square > 0.0 ? 1.0 / std::sqrt(square) : 0.0;
    for (std::int64_t i = 0; i < n; ++i) {
        own[i] = d[i] / scale;
        unit[std::size_t(i)] = z[i] * root;
    }
    Solver solver(n, own, none);
    solver.rank_one(std::move(unit), square / scale, k);
    for (std::int64_t i = 0; i < k; ++i) {
        values[i] = own[n - 1 - i] * scale;
        std::copy_n(solver.vectors() + (n - 1 - i) * n, n, vectors + i * n);
    }
}

void tridiagonal_top(std::int64_t n, std::int64_t k, double *d, double *e, double *values, double *vectors) {
    if (n == 0) return;
    // Tolerances below are relative to entries of size one.
    double scale = 0;
    for (std::int64_t i = 0; i < n; ++i) scale = std::max(scale, std::abs(d[i]));
    for (std::int64_t i = 0; i + 1 < n; ++i) scale = std::max(scale, std::abs(e[i]));
    if (scale == 0.0) scale = 1.0;
    for (std::int64_t i = 0; i < n; ++i) d[i] /= scale;
    for (std::int64_t i = 0; i + 1 < n; ++i) e[i] /= scale;
    Solver solver(n, d, e);
    solver.solve(0, n, k);
    for (std::int64_t i = 0; i < n; ++i) values[i] = d[i] * scale;
    std::copy_n(solver.vectors() + (n - k) * n, k * n, vectors);
}

} // namespace subspan
