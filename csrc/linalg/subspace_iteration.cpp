#include "linalg/subspace_iteration.hpp"

#include "base/scratch.hpp"
#include "base/simd.hpp"
#include "linalg/rows.hpp"
#include "subspan/eigh.hpp"
#include "subspan/factor.hpp"
#include "subspan/gemm.hpp"
#include "subspan/parallel.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace subspan {
namespace {

constexpr int kRounds = 16, kDegree = 24;
constexpr double kParallel = 1e5; // what Cholesky QR can tell apart of a filtered block

// z = a·x - b·y - z, in z: one step of the recurrence.
struct RecurArgs {
    std::int64_t size;
    double a, b, c;
    const double *x, *y;
    double *z;
};

struct RecurKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(const RecurArgs *g) {
        using V = simd::Vec<double, Bytes>;
        std::int64_t i = 0;
        for (; i + V::lanes <= g->size; i += V::lanes) V::store(g->z + i, g->a * V::load(g->x + i) - g->b * V::load(g->y + i) - g->c * V::load(g->z + i));
        for (; i < g->size; ++i) g->z[i] = g->a * g->x[i] - g->b * g->y[i] - g->c * g->z[i];
    }
};

void recur(std::int64_t size, double a, const double *x, double b, const double *y, double c, double *z) {
    const RecurArgs args{size, a, b, c, x, y, z};
    simd::dispatch<RecurKernel>(&args);
}

} // namespace

bool orthonormal_rows(std::int64_t count, std::int64_t n, double *y) {
    Frame frame;
    double *inner = frame.take<double>(count * count), *inverse = frame.take<double>(count * count), *work = frame.take<double>(count * n);
    for (int pass = 0; pass < 2; ++pass) {
        gram(RowBlocks<double>(n).add(MatrixView<const double>(y, count, n)), 0, inner);
        for (std::int64_t i = 0; i < count; ++i)
            if (!(inner[i * count + i] > 0) || !std::isfinite(inner[i * count + i])) return false;
        if (cholesky(count, inner, 0.0) > 0) return false;
        invert_lower(count, inner, inverse);
        gemm<double>(MatrixView<const double>(inverse, count, count), MatrixView<const double>(y, count, n), MatrixView<double>(work, count, n));
        std::copy_n(work, count * n, y);
    }
    return true;
}

bool leading_near(const NearTop &problem, const std::function<void(const double *, double *)> &times, double *y, double *values) {
    const std::int64_t n = problem.n, p = problem.count, wanted = problem.wanted;
    Frame frame;
    double *w = frame.take<double>(p * n), *other = frame.take<double>(p * n), *inner = frame.take<double>(p * p), *z = frame.take<double>(p * p);
    // Products take rows by eights.
    const double apply = 2.0 * double((p + 7) / 8 * 8) * double(n) * double(n),
                 ritz = 10.0 * double(p) * double(p) * double(n) + 30.0 * double(p) * double(p) * double(p);
    double spent = 0, before_last = 0;
    int last = 0;
    for (int round = 0; round < kRounds; ++round) {
        poll();
        if (!orthonormal_rows(p, n, y)) return false;
        times(y, w);
        gemm<double>(MatrixView<const double>(y, p, n), MatrixView<const double>(w, p, n).transposed(), MatrixView<double>(inner, p, p));
        eigh_top<double>(p, p, inner, values, z);
        for (double *x : {y, w}) {
            gemm<double>(MatrixView<const double>(z, p, p), MatrixView<const double>(x, p, n), MatrixView<double>(other, p, n));
            std::copy_n(other, p * n, x);
        }
        spent += apply + ritz;
        double residual = 0;
        for (std::int64_t i = 0; i < wanted; ++i) {
            double square = 0;
            for (std::int64_t j = 0; j < n; ++j) {
                const double d = w[i * n + j] - values[i] * y[i * n + j];
                square += d * d;
            }
            residual = std::max(residual, square);
        }
        residual = std::sqrt(residual);
        const double top = values[0], goal = problem.tolerance * top;
        if (!(top > 0.0) || !std::isfinite(residual)) return false;
        if (residual <= goal) return true;
        // T_d grows as g^d outside of [0, edge].
        const double edge = std::max(values[p - 1], 1e-8 * top), x = 2.0 * values[wanted - 1] / edge - 1.0;
        if (!(x > 1.0)) return false;
        double rate = std::log(x + std::sqrt(x * x - 1.0));
        // The last value carried has not converged, and what is beyond it may be larger: what was seen counts.
        if (last > 0) rate = std::min(rate, std::log(2.0 * before_last / (residual / top)) / last); // T_d is half of g^d
        if (!(rate > 0.0)) return false;
        const double needed = std::log(2.0 * residual / goal) / rate;
        // The first values are not those of the end, and what is beyond them is not seen yet: they promise too much.
        if (spent + apply * needed + ritz * (1.0 + needed / kDegree) > (round == 0 ? 0.8 : 1.0) * problem.flops) return false;
        // The leading rows, of which every row has some error's worth, must not drown the others.
        const double share = residual / top, most = std::min(kParallel / share, 0.1 * problem.tolerance / (std::numeric_limits<double>::epsilon() * share));
        const double x1 = 2.0 * top / edge - 1.0, apart = std::log(x1 + std::sqrt(x1 * x1 - 1.0)) - std::log(x + std::sqrt(x * x - 1.0));
        const double limit = apart > 0.0 ? std::log(std::max(most, 1.0)) / apart : double(kDegree);
        const int degree = int(std::clamp(std::min(std::ceil(needed), limit), 1.0, round == 0 ? 3.0 : double(kDegree)));
        last = degree;
        before_last = residual / top;
        // T_0 = y and T_1 = 2 w / edge - y are known.
        double *before = y, *now = w, *next = other;
        recur(p * n, 0.0, y, 1.0, y, -2.0 / edge, w);
        for (int d = 2; d <= degree; ++d) {
            times(now, next);
            recur(p * n, 4.0 / edge, next, 2.0, now, 1.0, before);
            std::swap(before, now);
        }
        spent += apply * (degree - 1);
        for (std::int64_t i = 0; i < p; ++i) {
            double square = 0;
            for (std::int64_t j = 0; j < n; ++j) square += now[i * n + j] * now[i * n + j];
            const double unit = 1.0 / std::sqrt(square);
            for (std::int64_t j = 0; j < n; ++j) now[i * n + j] *= unit;
        }
        if (now != y) std::copy_n(now, p * n, y);
    }
    return false;
}

} // namespace subspan
