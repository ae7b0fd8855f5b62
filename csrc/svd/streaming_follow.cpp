// Coordinates and residuals between updates of single rows. A stream that scores each row and then takes it in would solve for
// every row. Instead a copy of the leading directions follows the rows that wait, one at a time (Brand, Linear Algebra Appl.
// 415, 2006): two products with the row and one small rotation. It starts anew from the stream now and then, so that what
// updates of rank one truncate does not add up.
#include "base/amax.hpp"
#include "base/simd.hpp"
#include "svd/streaming_impl.hpp"
#include "subspan/eigh.hpp"
#include "subspan/gemm.hpp"
#include "subspan/parallel.hpp"

#include <algorithm>

namespace subspan {
namespace {

using std::int64_t;

constexpr int64_t kFew = 16; // rows that are scored so; more are worth a solution
// Values and entries whose squares, and products with weights, stay well within T.
template <class T> inline constexpr double kLeast = sizeof(T) == 4 ? 1e-12 : 1e-100;
template <class T> inline constexpr T kMost = T(sizeof(T) == 4 ? 1e12 : 1e100);

template <class T> struct SplitRowArgs {
    const T *v; // k x n, orthonormal rows
    int64_t k, n;
    const T *x;    // a row
    double *mean;  // where not null: comes off, and moves towards the row by a share
    double share;
    T *y;      // out: what the row has outside of them
    double *a; // its coordinates, then the length of what is left
    double *length; // of the row, squared
};

template <class T> struct SplitRowKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(const SplitRowArgs<T> *g) {
        using V = simd::Vec<T, Bytes>;
        constexpr int W = V::lanes;
        const int64_t n = g->n;
        T *y = g->y;
        if (g->mean == nullptr) {
            std::copy_n(g->x, n, y);
        } else {
            for (int64_t j = 0; j < n; ++j) { // compilers make vectors of it
                const double d = double(g->x[j]) - g->mean[j];
                y[j] = T(d);
                g->mean[j] += g->share * d;
            }
        }
        *g->length = double(simd::dot<T, Bytes>(y, y, n));
        for (int pass = 0; pass < 2; ++pass) // twice: what is left may be small
            for (int64_t i = 0; i < g->k; ++i) {
                const T *row = g->v + i * n;
                const T f = simd::dot<T, Bytes>(row, y, n);
                g->a[i] = pass == 0 ? double(f) : g->a[i] + double(f);
                int64_t j = 0;
                for (; j + W <= n; j += W) V::store(y + j, V::load(y + j) - f * V::load(row + j));
                for (; j < n; ++j) y[j] -= f * row[j];
            }
        g->a[g->k] = std::sqrt(double(simd::dot<T, Bytes>(y, y, n)));
    }
};

// Rows turned where they are: row i becomes Σ_j turn[i·m + j] row j.
template <class T> struct TurnArgs {
    const T *turn; // kept x m
    int64_t kept, m, n;
    T *v;
};

constexpr int64_t kTurn = 12; // rows whose values at a vector of columns stay in registers, or nearly

template <class T> struct TurnKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(const TurnArgs<T> *g) {
        using V = simd::Vec<T, Bytes>;
        constexpr int W = V::lanes;
        const int64_t n = g->n, m = g->m;
        int64_t c = 0;
        for (; c + W <= n; c += W) {
            typename V::type x[kTurn];
            for (int64_t j = 0; j < m; ++j) x[j] = V::load(g->v + j * n + c);
            for (int64_t i = 0; i < g->kept; ++i) {
                const T *f = g->turn + i * m;
                auto sum = f[0] * x[0];
                for (int64_t j = 1; j < m; ++j) sum += f[j] * x[j];
                V::store(g->v + i * n + c, sum);
            }
        }
        for (; c < n; ++c) {
            T x[kTurn];
            for (int64_t j = 0; j < m; ++j) x[j] = g->v[j * n + c];
            for (int64_t i = 0; i < g->kept; ++i) {
                T sum = 0;
                for (int64_t j = 0; j < m; ++j) sum += g->turn[i * m + j] * x[j];
                g->v[i * n + c] = sum;
            }
        }
    }
};

} // namespace

// Whether so many rows are scored by the directions that follow, which have then taken in all rows that wait.
template <class T> bool StreamingSvd<T>::Impl::follows(std::int64_t rows) {
    if (!thin || rows > kFew || opt.energy > 0.0 || pending_csr() || (pending() == 0 && !follower.on)) return false;
    if (!follower.on && (pending() > 2 * kFew || !start_following())) return false; // many are cheaper together
    follower.on = follow_waiting() && follower.k >= std::min(opt.rank, seen);
    return follower.on;
}

// From what the stream holds without the rows that wait.
template <class T> bool StreamingSvd<T>::Impl::start_following() {
    Follower &f = follower;
    if (moments.on && !moments.figures.solved) solve_moments(wanted());
    f = Follower();
    if (r == 0 || !(s[0] > kLeast<T> && s[0] < double(kMost<T>))) return false;
    f.most = wanted();
    f.k = std::min(r, f.most);
    f.weight = weight;
    f.mean = mean;
    f.s.assign(s.begin(), s.begin() + f.k);
    f.v.resize(std::size_t((f.most + 1) * n));
    f.other.resize(f.v.size());
    std::copy_n(v.data(), f.k * n, f.v.begin());
    f.on = true;
    return true;
}

// False where a row is too large; what is stopped half-way begins anew the next time.
template <class T> bool StreamingSvd<T>::Impl::follow_waiting() {
    try {
        for (; follower.taken < pending(); ++follower.taken) {
            const T *x = waiting.data() + follower.taken * n;
            if (!(max_abs<T>(MatrixView<const T>(x, 1, n)) < kMost<T>)) return false;
            follow(x, waiting_weight[std::size_t(follower.taken)]);
        }
    } catch (...) {
        follower.on = false;
        throw;
    }
    return true;
}

// One row x of weight w.
template <class T> void StreamingSvd<T>::Impl::follow(const T *x, double w) {
    Follower &f = follower;
    Frame frame;
    const std::int64_t k = f.k;
    T *y = frame.take<T>(n);
    double *a = frame.take<double>(k + 1), c = w, length = 0, *mean = nullptr;
    const double all = f.weight + w * w;
    if (opt.center) { // about the mean of the rows before
        c = w * std::sqrt(f.weight / all);
        mean = f.mean.data();
    }
    const SplitRowArgs<T> args{f.v.data(), k, n, x, mean, w * w / all, y, a, &length};
    f.weight = all;
    ++f.rows;
    simd::dispatch<SplitRowKernel<T>>(&args);
    if (!(c * c * length > 0.0)) return;
    const bool more = k < n && a[k] > 10.0 * eps * std::sqrt(length);
    const std::int64_t m = k + more, kept = std::min(m, f.most);
    double *squares = frame.take<double>(m), *l = frame.take<double>(kept), *z = frame.take<double>(kept * m);
    for (std::int64_t i = 0; i < m; ++i) {
        squares[i] = i < k ? f.s[std::size_t(i)] * f.s[std::size_t(i)] : 0.0;
        a[i] *= c;
    }
    rank_one_top(m, kept, squares, a, l, z);
    const double rest = c / a[k]; // a is times c by now
    if (more)
        for (std::int64_t j = 0; j < n; ++j) f.v[std::size_t(k * n + j)] = T(double(y[j]) * rest);
    T *turn = frame.take<T>(kept * m);
    for (std::int64_t i = 0; i < kept; ++i) {
        const double sign = closest(k, [&](std::int64_t j) { return z[i * m + j]; }).sign;
        for (std::int64_t j = 0; j < m; ++j) turn[i * m + j] = T(sign * z[i * m + j]);
    }
    if (m <= kTurn) {
        const TurnArgs<T> turned{turn, kept, m, n, f.v.data()};
        simd::dispatch<TurnKernel<T>>(&turned);
    } else {
        gemm<T>(MatrixView<const T>(turn, kept, m), MatrixView<const T>(f.v.data(), m, n), MatrixView<T>(f.other.data(), kept, n));
        f.v.swap(f.other);
    }
    f.k = kept;
    f.s.resize(std::size_t(kept));
    for (std::int64_t i = 0; i < kept; ++i) f.s[std::size_t(i)] = std::sqrt(std::max(l[i], 0.0));
}

// The rows that wait are about to be taken in.
template <class T> void StreamingSvd<T>::Impl::keep_following() {
    Follower &f = follower;
    if (!f.on) return;
    if (pending_csr() || pending() - f.taken > kFew || f.rows > std::max(2 * n, seen / 2)) {
        f.on = false;
        return;
    }
    try {
        const Shielded whole;
        f.on = follow_waiting();
    } catch (...) { // of no memory: who takes the rows in does not need this
        f.on = false;
    }
    f.taken = 0;
}

template struct StreamingSvd<float>::Impl;
template struct StreamingSvd<double>::Impl;

} // namespace subspan
