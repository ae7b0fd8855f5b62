// The C++ API without Python: kernels against double references, the eigensolver on hard matrices, a streaming update.
// Prints one line a check and returns the number of failures.
#include "subspan/link_lapack.hpp"
#include "subspan/subspan.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

using namespace subspan;

namespace {

int failures = 0;

void check(bool ok, const char *what, double value) {
    if (!ok) {
        std::printf("FAILED %s: %g\n", what, value);
        ++failures;
    }
}

std::mt19937_64 rng(7);

template <class T> std::vector<T> gaussian(std::int64_t n) {
    std::normal_distribution<double> d;
    std::vector<T> v(static_cast<std::size_t>(n));
    for (auto &x : v) x = T(d(rng));
    return v;
}

template <class T> void products(std::int64_t m, std::int64_t n, std::int64_t k) {
    const double tol = 4.0 * std::numeric_limits<T>::epsilon() * std::sqrt(double(std::max(n, k))) * 8;
    const auto a = gaussian<T>(m * k), b = gaussian<T>(k * n);
    std::vector<T> c(std::size_t(m * n), T(3));
    for (int form = 0; form < 4; ++form) { // both operands plain and transposed
        const MatrixView<const T> av = form & 1 ? MatrixView<const T>(a.data(), k, m).transposed() : MatrixView<const T>(a.data(), m, k);
        const MatrixView<const T> bv = form & 2 ? MatrixView<const T>(b.data(), n, k).transposed() : MatrixView<const T>(b.data(), k, n);
        gemm<T>(av, bv, MatrixView<T>(c.data(), m, n));
        double worst = 0;
        for (std::int64_t i = 0; i < m; ++i)
            for (std::int64_t j = 0; j < n; ++j) {
                double s = 0;
                for (std::int64_t p = 0; p < k; ++p) s += double(av(i, p)) * double(bv(p, j));
                worst = std::max(worst, std::abs(s - double(c[std::size_t(i * n + j)])));
            }
        check(worst <= tol, "gemm", worst);
    }
    // Gram matrix of stacked rows, and a combination of them in place.
    auto v = gaussian<T>(m * n), w = gaussian<T>(k * n);
    RowBlocks<T> p(n);
    p.add(MatrixView<const T>(v.data(), m, n)).add(MatrixView<const T>(w.data(), k, n));
    const std::int64_t r = m + k;
    std::vector<double> g(std::size_t(r * r));
    gram(p, 0, g.data());
    const auto row = [&](std::int64_t i) { return i < m ? v.data() + i * n : w.data() + (i - m) * n; };
    double worst = 0;
    for (std::int64_t i = 0; i < r; ++i)
        for (std::int64_t j = 0; j <= i; ++j) {
            long double s = 0; // a plain double sum of 40000 terms is further off than the kernel
            for (std::int64_t q = 0; q < n; ++q) s += static_cast<long double>(row(i)[q]) * row(j)[q];
            worst = std::max(worst, std::abs(double(s - g[std::size_t(i * r + j)])));
        }
    check(worst <= 20 * tol, "gram", worst);
    const auto rot = gaussian<T>(m * r);
    std::vector<double> want(std::size_t(m * n), 0.0);
    for (std::int64_t i = 0; i < m; ++i)
        for (std::int64_t q = 0; q < r; ++q)
            for (std::int64_t j = 0; j < n; ++j) want[std::size_t(i * n + j)] += double(rot[std::size_t(i * r + q)]) * double(row(q)[j]);
    combine(rot.data(), p, MatrixView<T>(v.data(), m, n));
    worst = 0;
    for (std::size_t i = 0; i < want.size(); ++i) worst = std::max(worst, std::abs(want[i] - double(v[i])));
    check(worst <= 20 * tol, "combine in place", worst);
}

void eigenpairs(const char *name, const std::vector<double> &d, const std::vector<double> &e, std::int64_t k, const double *largest,
                const std::vector<double> &z) {
    const auto n = std::int64_t(d.size());
    double norm = 0, residual = 0, orth = 0;
    for (std::int64_t i = 0; i < n; ++i)
        norm = std::max(norm, std::abs(d[std::size_t(i)]) + (i ? std::abs(e[std::size_t(i) - 1]) : 0) + (i + 1 < n ? std::abs(e[std::size_t(i)]) : 0));
    for (std::int64_t r = 0; r < k; ++r) {
        const double *x = z.data() + r * n, value = largest[r];
        for (std::int64_t i = 0; i < n; ++i) {
            double s = (d[std::size_t(i)] - value) * x[i];
            if (i) s += e[std::size_t(i) - 1] * x[i - 1];
            if (i + 1 < n) s += e[std::size_t(i)] * x[i + 1];
            residual = std::max(residual, std::abs(s));
        }
        for (std::int64_t q = 0; q <= r; ++q) {
            double s = 0;
            for (std::int64_t i = 0; i < n; ++i) s += x[i] * z[std::size_t(q * n + i)];
            orth = std::max(orth, std::abs(s - (q == r)));
        }
    }
    check(residual <= 1e-14 * norm, name, residual / (norm > 0 ? norm : 1));
    check(orth <= 1e-14 * std::sqrt(double(n)), name, orth);
    check(std::is_sorted(largest, largest + k), name, -1);
}

void tridiagonal(const char *name, std::vector<double> d, std::vector<double> e, std::int64_t k, bool must = false) {
    const auto n = std::int64_t(d.size());
    std::vector<double> values(static_cast<std::size_t>(n)), z(std::size_t(k * n)), dd = d, ee = e;
    tridiagonal_top(n, k, dd.data(), ee.data(), values.data(), z.data());
    check(std::is_sorted(values.begin(), values.end()), name, -1);
    eigenpairs(name, d, e, k, values.data() + n - k, z);
    // Some of them by counts and inverse iteration, where that says that it has got through.
    for (const std::int64_t few : {std::int64_t(1), std::int64_t(3), n / 3, n}) {
        if (few < 1 || few > n) continue;
        std::vector<double> some(static_cast<std::size_t>(few)), y(std::size_t(few * n));
        const bool found = tridiagonal_few(n, few, d.data(), e.data(), 0.0, some.data(), y.data());
        check(found || !must, name, -2);
        if (!found) continue;
        eigenpairs(name, d, e, few, some.data(), y);
        double off = 0, top = 0;
        for (std::int64_t i = 0; i < few; ++i) {
            off = std::max(off, std::abs(some[std::size_t(i)] - values[std::size_t(n - few + i)]));
            top = std::max(top, std::max(std::abs(values.front()), std::abs(values.back())));
        }
        check(off <= 1e-14 * top, name, off / top);
    }
}

void tridiagonals() {
    std::normal_distribution<double> normal;
    // What rounding leaves of entries that cancel: of any size down to the smallest numbers, zeros between them.
    std::uniform_real_distribution<double> uniform;
    for (int round = 0; round < 2000; ++round) {
        std::vector<double> d(std::size_t(2 + round % 24)), e(d.size());
        const double digits = 20 + 300 * uniform(rng);
        for (auto *x : {&d, &e})
            for (double &y : *x) y = uniform(rng) < 0.2 ? 0.0 : normal(rng) * std::pow(10, -digits * uniform(rng));
        tridiagonal("of many sizes", d, e, std::int64_t(d.size()));
    }
    // Parts that are next to nothing beside the rest, whose squares are nothing.
    for (int round = 0; round < 500; ++round) {
        std::vector<double> d(std::size_t(24 + round % 40)), e(d.size());
        for (auto *x : {&d, &e})
            for (std::size_t i = 0; i < x->size(); ++i) (*x)[i] = normal(rng) * (i < 8 ? 1.0 : std::pow(10, -285 - 35 * uniform(rng)));
        tridiagonal("next to nothing", d, e, std::int64_t(d.size()));
    }
    for (const std::size_t n : {1, 2, 3, 19, 20, 21, 40, 64, 101, 257}) {
        const auto k = std::int64_t(n + 1) / 2, all = std::int64_t(n);
        std::vector<double> d(n), e(n);
        const auto fill = [&](auto fd, auto fe) {
            for (std::size_t i = 0; i < n; ++i) {
                d[i] = fd(double(i));
                e[i] = fe(double(i));
            }
        };
        fill([&](double) { return normal(rng); }, [&](double) { return normal(rng); });
        tridiagonal("random", d, e, k, true);
        tridiagonal("random, all", d, e, all);
        fill([](double) { return 0.0; }, [](double) { return 1.0; });
        tridiagonal("toeplitz", d, e, all, n > 1);
        fill([](double) { return 1.0; }, [](double) { return 0.0; });
        tridiagonal("identity", d, e, all);
        fill([](double) { return 0.0; }, [](double) { return 0.0; });
        tridiagonal("zero", d, e, all);
        fill([&](double i) { return std::abs(i - double(n - 1) / 2); }, [](double) { return 1.0; });
        tridiagonal("wilkinson", d, e, all);
        fill([](double i) { return std::abs(std::fmod(i, 21) - 10); }, [](double i) { return std::fmod(i, 21) == 20 ? 1e-8 : 1.0; });
        tridiagonal("glued wilkinson", d, e, all);
        fill([&](double i) { return std::pow(10, -14 * i / double(n)); }, [&](double i) { return 0.3 * std::pow(10, -14 * i / double(n)); });
        tridiagonal("graded", d, e, all);
        fill([&](double) { return 1 + 1e-15 * normal(rng); }, [&](double) { return 1e-14 * normal(rng); });
        tridiagonal("cluster", d, e, all);
        fill([&](double) { return 1e-300 * normal(rng); }, [&](double) { return 1e-300 * normal(rng); });
        tridiagonal("tiny", d, e, all);
        fill([&](double) { return 1e300 * normal(rng); }, [&](double) { return 1e299 * normal(rng); });
        tridiagonal("huge", d, e, all);
    }
}

template <class T> void eigen(std::int64_t n, std::int64_t k, double scale) {
    const auto b = gaussian<double>(n * (n + 3));
    std::vector<double> g(std::size_t(n * n));
    gram(RowBlocks<double>(n + 3).add(MatrixView<const double>(b.data(), n, n + 3)), 0, g.data());
    for (std::int64_t i = 0; i < n; ++i)
        for (std::int64_t j = 0; j <= i; ++j) g[std::size_t(j * n + i)] = g[std::size_t(i * n + j)] *= scale;
    std::vector<double> values(static_cast<std::size_t>(k));
    std::vector<T> z(std::size_t(k * n));
    eigh_top<T>(n, k, g.data(), values.data(), z.data());
    double residual = 0, orth = 0;
    for (std::int64_t r = 0; r < k; ++r) {
        for (std::int64_t i = 0; i < n; ++i) {
            double s = -values[std::size_t(r)] * double(z[std::size_t(r * n + i)]);
            for (std::int64_t j = 0; j < n; ++j) s += g[std::size_t(i * n + j)] * double(z[std::size_t(r * n + j)]);
            residual = std::max(residual, std::abs(s));
        }
        for (std::int64_t q = 0; q <= r; ++q) {
            double s = 0;
            for (std::int64_t i = 0; i < n; ++i) s += double(z[std::size_t(r * n + i)]) * double(z[std::size_t(q * n + i)]);
            orth = std::max(orth, std::abs(s - (q == r)));
        }
    }
    const double eps = std::numeric_limits<T>::epsilon() * std::sqrt(double(n));
    check(residual <= 4 * eps * values[0], "eigh_top residual", residual / values[0] / eps);
    check(orth <= 4 * eps, "eigh_top orthogonality", orth / eps);
}

template <class T> void streaming() {
    // Rank 5 in 300 columns with singular directions that stay: the values add up as sqrt(sum of squares).
    const std::int64_t n = 300, k = 5;
    auto basis = gaussian<T>(k * n);
    lq_rows(MatrixView<T>(basis.data(), k, n), nullptr);
    StreamingOptions options;
    options.rank = k;
    StreamingSvd<T> svd(options);
    for (int block = 0; block < 40; ++block) {
        std::vector<T> rows(std::size_t(k * n));
        for (std::int64_t i = 0; i < k; ++i)
            for (std::int64_t j = 0; j < n; ++j) rows[std::size_t(i * n + j)] = T(5 - i) * basis[std::size_t(i * n + j)];
        svd.update(MatrixView<const T>(rows.data(), k, n));
    }
    const double eps = std::numeric_limits<T>::epsilon();
    check(svd.rank() == k && svd.rows_seen() == 200, "streaming counts", double(svd.rank()));
    for (std::int64_t i = 0; i < k; ++i) {
        const double want = double(5 - i) * std::sqrt(40.0), got = svd.singular_values()[i];
        check(std::abs(got - want) <= 100 * eps * 5 * std::sqrt(40.0), "streaming singular value", got - want);
        double s = 0;
        for (std::int64_t j = 0; j < n; ++j) s += double(svd.components()[i * n + j]) * double(basis[std::size_t(i * n + j)]);
        check(std::abs(std::abs(s) - 1) <= 1e3 * eps, "streaming component", s);
    }
    try {
        std::vector<T> bad(static_cast<std::size_t>(n), std::numeric_limits<T>::quiet_NaN());
        svd.update(MatrixView<const T>(bad.data(), 1, n));
        check(false, "NaN must throw", 0);
    } catch (const ValueError &) {}
    check(svd.rows_seen() == 200, "a failed update must leave the stream alone", double(svd.rows_seen()));

    // Left vectors follow two updates: [U past + shift; fresh] S V + mean is what went in.
    const std::int64_t m = 24;
    options.exact_blocks = options.center = true;
    options.rank = m;
    StreamingSvd<T> exact(options);
    const auto a = gaussian<T>(2 * m * n);
    std::vector<double> u;
    for (const std::int64_t first : {std::int64_t(0), m}) {
        const LeftRotation r = update_with_rotation<T>(exact, MatrixView<const T>(a.data() + first * n, m, n));
        std::vector<double> now(std::size_t((first + m) * r.after));
        for (std::int64_t i = 0; i < first + m; ++i)
            for (std::int64_t j = 0; j < r.after; ++j) {
                double s = i < first ? r.shift[std::size_t(j)] : r.fresh[std::size_t((i - first) * r.after + j)];
                for (std::int64_t l = 0; i < first && l < r.before; ++l) s += u[std::size_t(i * r.before + l)] * r.past[std::size_t(l * r.after + j)];
                now[std::size_t(i * r.after + j)] = s;
            }
        u = now;
    }
    const std::int64_t kept = exact.rank();
    double off = 0;
    for (std::int64_t i = 0; i < m; ++i) // of the first block less was left out than its last values: both blocks have rank m
        for (std::int64_t j = 0; j < kept; ++j) {
            double s = 0;
            for (std::int64_t c = 0; c < n; ++c) s += (double(a[std::size_t((m + i) * n + c)]) - exact.mean()[c]) * double(exact.components()[j * n + c]);
            off = std::max(off, std::abs(s - u[std::size_t((m + i) * kept + j)] * exact.singular_values()[j]));
        }
    check(off <= 100 * eps * exact.singular_values()[0], "update_with_rotation, rows of the block", off);
    off = 0;
    for (std::int64_t j = 0; j + 1 < kept; ++j)
        for (std::int64_t l = 0; l <= j; ++l) {
            double s = 0;
            for (std::int64_t i = 0; i < 2 * m; ++i) s += u[std::size_t(i * kept + j)] * u[std::size_t(i * kept + l)];
            off = std::max(off, std::abs(s - (j == l)));
        }
    check(off <= 1e3 * eps, "update_with_rotation, left vectors", off);
    options.exact_blocks = false;
    StreamingSvd<T> other(options);
    try {
        update_with_rotation<T>(other, MatrixView<const T>(a.data(), m, n));
        check(false, "a rotation needs exact_blocks", 0);
    } catch (const ValueError &) {}
}

// The projection family on small stacks, against sums in double.
template <class T> void projections() {
    const double eps = std::numeric_limits<T>::epsilon();
    const std::int64_t m = 37, n = 53, k = 6, items = 3;
    auto c = gaussian<T>(items * m * n);
    const auto v = gaussian<T>(m * k), core = gaussian<T>(k * k);
    const std::vector<T> before = c;
    const StackView<T> stack(MatrixView<T>(c.data(), m, n), {items}, {m * n});
    const StackView<const T> basis(MatrixView<const T>(v.data(), m, k), {items}, {0});
    const StackView<const T> middle(MatrixView<const T>(core.data(), k, k), {items}, {0});
    apply_core<T>(StackView<const T>(stack), basis, Core<T>::full(middle), T(0.5), Side::left, stack);
    double worst = 0;
    for (std::int64_t s = 0; s < items; ++s)
        for (std::int64_t j = 0; j < n; ++j) {
            double w[k] = {}, mw[k] = {};
            for (std::int64_t l = 0; l < k; ++l)
                for (std::int64_t i = 0; i < m; ++i) w[l] += double(v[std::size_t(i * k + l)]) * double(before[std::size_t((s * m + i) * n + j)]);
            for (std::int64_t l = 0; l < k; ++l)
                for (std::int64_t p = 0; p < k; ++p) mw[l] += double(core[std::size_t(l * k + p)]) * w[p];
            for (std::int64_t i = 0; i < m; ++i) {
                double x = 0.5 * double(before[std::size_t((s * m + i) * n + j)]);
                for (std::int64_t l = 0; l < k; ++l) x += double(v[std::size_t(i * k + l)]) * mw[l];
                worst = std::max(worst, std::abs(x - double(c[std::size_t((s * m + i) * n + j)])));
            }
        }
    check(worst <= 2e3 * eps, "apply_core", worst / eps);

    std::vector<T> q(std::size_t(items * m * k));
    const StackView<T> qs(MatrixView<T>(q.data(), m, k), {items}, {m * k});
    random_orthogonal<T>(7, qs);
    check(orthonormality_defect<T>(qs) <= 10 * eps * std::sqrt(double(k)), "random_orthogonal", orthonormality_defect<T>(qs) / eps);
    orthonormalize<T>(basis, qs, Orthonormalization::polar, true);
    check(orthonormality_defect<T>(qs) <= 10 * eps * std::sqrt(double(k)), "polar", orthonormality_defect<T>(qs) / eps);

    // H (Hᵀ C) = C for unit reflections.
    std::vector<T> d = before;
    const StackView<T> ds(MatrixView<T>(d.data(), m, n), {items}, {m * n});
    const Reflections<T> h{basis, nullptr};
    householder_apply<T>(h, StackView<const T>(ds), Side::left, true, ds);
    householder_apply<T>(h, StackView<const T>(ds), Side::left, false, ds);
    worst = 0;
    for (std::size_t i = 0; i < d.size(); ++i) worst = std::max(worst, std::abs(double(d[i]) - double(before[i])));
    check(worst <= 100 * eps, "householder_apply", worst / eps);
    try {
        d[5] = std::numeric_limits<T>::infinity();
        apply_core<T>(StackView<const T>(ds), basis, Core<T>(T(1)), T(1), Side::left, ds);
        check(false, "infinity must throw", 0);
    } catch (const ValueError &) {}
    check(d[6] == before[6] || std::abs(double(d[6]) - double(before[6])) <= 100 * eps, "C must be left alone", double(d[6]));
}

template <class T> void subspaces() {
    const std::int64_t n = 37, k = 5, items = 6, each = n * k;
    const double eps = std::numeric_limits<T>::epsilon();
    std::vector<T> a(std::size_t(items * each)), b(a.size()), h(a.size()), back(a.size());
    const auto stack = [&](std::vector<T> &v) { return StackView<T>(MatrixView<T>(v.data(), n, k), {items}, {each}); };
    const auto u = stack(a), w = stack(b), tangents = stack(h), there = stack(back);
    random_orthogonal<T>(1, u);
    random_orthogonal<T>(2, w);
    grassmann_log<T>(u, w, tangents, Checks::points);
    retract<T>(u, tangents, 1.0, Retraction::exp, there, Checks::points_and_tangents);
    std::vector<T> d(static_cast<std::size_t>(items));
    const StackView<T> distances(MatrixView<T>(d.data(), 1, 1), {items}, {1});
    subspace_distance<T>(there, w, Distance::geodesic, distances, Checks::points);
    const double worst = double(*std::max_element(d.begin(), d.end()));
    check(worst <= 40 * eps * std::sqrt(double(k)), "exp of log", worst / eps);

    StepOptions options;
    options.lr = 0.1;
    std::vector<T> momentum(a.size(), T(0));
    const auto buffer = stack(momentum);
    sgd_step<T>(u, StackView<const T>(w), &buffer, 0.9, 0.0, options);
    check(orthonormality_defect<T>(u) <= 10 * eps * std::sqrt(double(k)), "sgd_step", orthonormality_defect<T>(u) / eps);
    const auto kept = a;
    b[std::size_t(3 * each)] = std::numeric_limits<T>::quiet_NaN();
    try {
        sgd_step<T>(u, StackView<const T>(w), &buffer, 0.9, 0.0, options);
        check(false, "NaN must throw", 0);
    } catch (const ValueError &) {}
    check(a == kept, "U must be left alone", 0);
}

// Mixing against the sum over offsets, decoding against the whole sequence, coordinates of a basis.
template <class T> void mixing() {
    const std::int64_t tokens = 70, r = 9, pairs = 36, d = 20;
    const auto z = gaussian<T>(tokens * r), w = gaussian<T>(d * pairs), b = gaussian<T>(d);
    MixOptions o;
    o.offsets = {1, 4};
    std::vector<T> p(std::size_t(tokens * pairs)), g(std::size_t(tokens * d));
    const StackView<T> mixed(MatrixView<T>(p.data(), tokens, pairs)), projected(MatrixView<T>(g.data(), tokens, d));
    const MatrixView<const T> matrix(w.data(), d, pairs);
    MixInput<T> in;
    in.z = MatrixView<const T>(z.data(), tokens, r);
    check(plucker_mix<T>(in, o, mixed), "plucker_mix is finite", 0);
    check(plucker_mix_project<T>(in, matrix, b.data(), o, projected), "plucker_mix_project is finite", 0);
    double worst = 0, apart = 0;
    for (std::int64_t t = 0; t < tokens; ++t) {
        std::vector<double> want(std::size_t(pairs), 0.0);
        int applying = 0;
        for (const auto delta : o.offsets) {
            if (t < delta) continue;
            ++applying;
            const T *x = z.data() + t * r, *y = z.data() + (t - delta) * r;
            std::vector<double> wedge;
            double n = 0;
            for (std::int64_t i = 0; i < r; ++i)
                for (std::int64_t j = i + 1; j < r; ++j) {
                    wedge.push_back(double(x[i]) * double(y[j]) - double(x[j]) * double(y[i]));
                    n += wedge.back() * wedge.back();
                }
            for (std::size_t c = 0; c < wedge.size(); ++c) want[c] += wedge[c] / std::sqrt(n);
        }
        for (std::int64_t c = 0; c < pairs; ++c) worst = std::max(worst, std::abs(double(mixed.first(t, c)) - want[std::size_t(c)] / std::max(applying, 1)));
    }
    check(worst <= 20 * double(std::numeric_limits<T>::epsilon()), "plucker_mix against the sum over offsets", worst);
    PluckerMixState<T> state(o, r, 1, matrix, b.data());
    std::vector<T> out(static_cast<std::size_t>(d));
    for (std::int64_t t = 0; t < tokens; ++t) {
        state.step(MatrixView<const T>(z.data() + t * r, 1, r), nullptr, nullptr, MatrixView<T>(out.data(), 1, d));
        for (std::int64_t c = 0; c < d; ++c) apart = std::max(apart, std::abs(double(out[std::size_t(c)] - projected.first(t, c))));
    }
    check(apart == 0, "decoding against the whole sequence", apart);
    const auto grad = gaussian<T>(tokens * d);
    std::vector<T> dz(z.size()), dw(w.size()), db(b.size());
    check(plucker_mix_project_backward<T>(StackView<const T>(MatrixView<const T>(grad.data(), tokens, d)), in, matrix, b.data(), o,
                                          StackView<T>(MatrixView<T>(dz.data(), tokens, r)), MatrixView<T>(dw.data(), d, pairs), db.data(), nullptr),
          "plucker_mix_project_backward is finite", 0);
    // g is linear in W and b: <grad, g> = <dW, W> + <db, b>
    double left = 0, right = 0;
    for (std::size_t i = 0; i < grad.size(); ++i) left += double(grad[i]) * double(g[i]);
    for (std::size_t i = 0; i < w.size(); ++i) right += double(dw[i]) * double(w[i]);
    for (std::size_t i = 0; i < b.size(); ++i) right += double(db[i]) * double(b[i]);
    check(std::abs(left - right) <= 1e4 * double(std::numeric_limits<T>::epsilon()) * std::max(1.0, std::abs(left)), "gradients of the projection",
          left - right);
    const auto a = gaussian<T>(5 * 2);
    std::vector<T> coordinates(10), basis(10), again(10);
    const StackView<T> c(MatrixView<T>(coordinates.data(), 1, 10)), u(MatrixView<T>(basis.data(), 5, 2)), back(MatrixView<T>(again.data(), 1, 10));
    plucker_coordinates<T>(StackView<const T>(MatrixView<const T>(a.data(), 5, 2)), c);
    check(plucker_basis<T>(c, 5, 2, u) == -1, "plucker_basis", 0);
    plucker_coordinates<T>(u, back);
    double length = 0, off = 0;
    for (const T x : coordinates) length += double(x) * double(x);
    for (std::size_t i = 0; i < 10; ++i) off = std::max(off, std::abs(double(again[i]) * std::sqrt(length) - double(coordinates[i])));
    check(off <= 1e3 * double(std::numeric_limits<T>::epsilon()), "coordinates of a basis", off);
}

} // namespace

int main() {
    try {
        lapack<float>();
        check(false, "lapack() must throw before a table is installed", 0);
    } catch (const BackendError &) {}
    link_lapack();
    for (const std::int64_t m : {1, 3, 8, 17, 49})
        for (const std::int64_t n : {1, 15, 48, 49, 130, 1100})
            for (const std::int64_t k : {1, 7, 33, 129}) {
                products<float>(m, n, k);
                products<double>(m, n, k);
            }
    products<double>(16, 40000, 3); // several slices of the Gram kernel
    tridiagonals();
    for (const std::int64_t n : {1, 2, 5, 31, 32, 33, 97, 200}) {
        for (const double scale : {1.0, 1e-200, 1e200}) {
            eigen<float>(n, (n + 1) / 2, scale);
            eigen<double>(n, n, scale);
        }
    }
    projections<float>();
    projections<double>();
    subspaces<float>();
    subspaces<double>();
    streaming<float>();
    streaming<double>();
    mixing<float>();
    mixing<double>();
    std::printf("%s, %d threads, %d failures\n", isa_name(isa()), num_threads(), failures);
    return failures > 99 ? 99 : failures;
}
