// A few of the eigenpairs of a symmetric tridiagonal matrix. Divide and conquer works out all values and most of the vectors,
// which is most of the time of a symmetric problem of order 50 to 300 of which ten vectors are wanted.
#include "subspan/eigh.hpp"

#include "base/scratch.hpp"
#include "base/simd.hpp"
#include "subspan/gemm.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

namespace subspan {
namespace {

using std::int64_t;

constexpr int kPoints = 32; // at which a sweep counts: chains of divisions that run beside one another
constexpr int kLanes = 16;  // vectors that are solved for beside one another

// Eigenvalues below each point, by the signs of the pivots of T - x: a pivot of zero is followed by one of -infinity, which
// counts once, as squares of off-diagonals are not zero.
struct CountKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(int64_t n, const double *d, const double *squares, const double *x, double *below) {
#ifdef SUBSPAN_VECTOR_EXT
        using V = simd::Vec<double, Bytes>;
        using VT = typename V::type;
        typedef long long Counts __attribute__((vector_size(Bytes)));
        constexpr int W = V::lanes, G = kPoints / W;
        VT q[G], at[G];
        Counts count[G];
        const VT zero{};
#pragma GCC unroll 16
        for (int g = 0; g < G; ++g) {
            at[g] = V::load(x + g * W);
            q[g] = d[0] - at[g];
            count[g] = q[g] < zero; // -1 for true
        }
        for (int64_t i = 1; i < n; ++i) {
            const double diagonal = d[i], square = squares[i - 1];
#pragma GCC unroll 16
            for (int g = 0; g < G; ++g) {
                q[g] = (diagonal - at[g]) - square / q[g];
                count[g] += q[g] < zero;
            }
        }
        for (int p = 0; p < kPoints; ++p) below[p] = -double(count[p / W][p % W]);
#else
        double q[kPoints];
        for (int p = 0; p < kPoints; ++p) {
            q[p] = d[0] - x[p];
            below[p] = q[p] < 0 ? 1.0 : 0.0;
        }
        for (int64_t i = 1; i < n; ++i)
            for (int p = 0; p < kPoints; ++p) {
                q[p] = (d[i] - x[p]) - squares[i - 1] / q[p];
                below[p] += q[p] < 0 ? 1.0 : 0.0;
            }
#endif
    }
};

// The k largest eigenvalues, ascending, to `within`: intervals are cut at all points of a sweep at once (multisection).
void largest_values(int64_t n, int64_t k, const double *d, const double *squares, double low, double high, double within, double *values) {
    Frame frame;
    double *lo = frame.take<double>(k), *hi = frame.take<double>(k);
    auto *begin = frame.take<int64_t>(k + 1); // of eigenvalues that are in one interval still
    std::fill_n(lo, k, low);
    std::fill_n(hi, k, high);
    for (;;) {
        int64_t open = 0;
        for (int64_t i = 0; i < k; ++i) {
            const bool done = hi[i] - lo[i] <= within + std::numeric_limits<double>::epsilon() * std::max(std::abs(lo[i]), std::abs(hi[i])); // which cuts reach
            if (!done && (open == 0 || lo[begin[open - 1]] != lo[i] || hi[begin[open - 1]] != hi[i])) begin[open++] = i;
        }
        if (open == 0) break;
        const int64_t points = std::max<int64_t>(1, kPoints / open);
        for (int64_t first = 0; first < open; first += kPoints / points) {
            const int64_t some = std::min<int64_t>(kPoints / points, open - first);
            double x[kPoints], below[kPoints];
            for (int64_t u = 0, p = 0; p < kPoints; ++p) {
                u = std::min(p / points, some - 1);
                const int64_t i = begin[first + u], j = p - u * points;
                x[p] = j < points ? lo[i] + (hi[i] - lo[i]) * (double(j + 1) / double(points + 1)) : hi[i];
            }
            simd::dispatch<CountKernel, int64_t, const double *, const double *, const double *, double *>(n, d, squares, x, below);
            for (int64_t u = 0; u < some; ++u) {
                const int64_t start = begin[first + u];
                const double was_lo = lo[start], was_hi = hi[start];
                for (int64_t i = start; i < k && lo[i] == was_lo && hi[i] == was_hi; ++i) {
                    double l = was_lo, h = was_hi;
                    for (int64_t j = 0; j < points; ++j) {
                        const double at = x[u * points + j];
                        if (below[u * points + j] <= double(n - k + i))
                            l = std::max(l, at);
                        else
                            h = std::min(h, at);
                    }
                    lo[i] = l;
                    hi[i] = std::max(l, h);
                }
            }
        }
    }
    for (int64_t i = 0; i < k; ++i) values[i] = lo[i] + 0.5 * (hi[i] - lo[i]);
}

// Two steps of inverse iteration for kLanes shifts at once: T - λ by elimination with exchanges of rows, as LAPACK's dgttrf.
// x: n x kLanes, start vectors, then solutions of length one.
struct InverseKernel {
    template <int Bytes>
    static SUBSPAN_INLINE void run(int64_t n, const double *d, const double *e, const double *shift, double least, double *work, double *x) {
        constexpr int L = kLanes;
        double *inverse = work, *factor = inverse + n * L, *upper = factor + n * L, *second = upper + n * L, *swapped = second + n * L;
        double a[L], b[L]; // the row on top: diagonal and what is right of it
        for (int l = 0; l < L; ++l) {
            a[l] = d[0] - shift[l];
            b[l] = n > 1 ? e[0] : 0.0;
        }
        for (int64_t i = 0; i + 1 < n; ++i) {
            const double below = e[i], next = d[i + 1], right = i + 2 < n ? e[i + 1] : 0.0;
            for (int l = 0; l < L; ++l) {
                const double diagonal = next - shift[l];
                const bool swap = std::abs(a[l]) < std::abs(below);
                double pivot = swap ? below : a[l];
                const double other = swap ? a[l] : below;
                pivot = std::abs(pivot) < least ? least : pivot;
                const double r = 1.0 / pivot, f = other * r;
                inverse[i * L + l] = r;
                factor[i * L + l] = f;
                swapped[i * L + l] = swap ? 1.0 : 0.0;
                upper[i * L + l] = swap ? diagonal : b[l];
                second[i * L + l] = swap ? right : 0.0;
                a[l] = swap ? b[l] - f * diagonal : diagonal - f * b[l];
                b[l] = swap ? -f * right : right;
            }
        }
        for (int l = 0; l < L; ++l) {
            const double pivot = std::abs(a[l]) < least ? least : a[l];
            inverse[(n - 1) * L + l] = 1.0 / pivot;
            upper[(n - 1) * L + l] = second[(n - 1) * L + l] = 0.0;
        }
        for (int step = 0; step < 2; ++step) {
            double now[L];
            for (int l = 0; l < L; ++l) now[l] = x[l];
            for (int64_t i = 0; i + 1 < n; ++i)
                for (int l = 0; l < L; ++l) {
                    const double after = x[(i + 1) * L + l], f = factor[i * L + l];
                    const bool swap = swapped[i * L + l] != 0.0;
                    x[i * L + l] = swap ? after : now[l];
                    now[l] = swap ? now[l] - f * after : after - f * now[l];
                }
            double after[L], beyond[L], sum[L];
            for (int l = 0; l < L; ++l) {
                x[(n - 1) * L + l] = now[l];
                after[l] = beyond[l] = sum[l] = 0.0;
            }
            for (int64_t i = n - 1; i >= 0; --i)
                for (int l = 0; l < L; ++l) {
                    const double y = (x[i * L + l] - upper[i * L + l] * after[l] - second[i * L + l] * beyond[l]) * inverse[i * L + l];
                    x[i * L + l] = y;
                    beyond[l] = after[l];
                    after[l] = y;
                    sum[l] += y * y;
                }
            for (int l = 0; l < L; ++l) sum[l] = 1.0 / std::sqrt(sum[l]);
            for (int64_t i = 0; i < n; ++i)
                for (int l = 0; l < L; ++l) x[i * L + l] *= sum[l];
        }
    }
};

// z_i loses its part along z_j, and is of length one again; false where nothing is left of it.
struct CleanKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(int64_t n, const double *others, int64_t count, double *z, bool *good) {
        for (int64_t c = 0; c < count; ++c) {
            const double *y = others + c * n, along = simd::dot<double, Bytes>(y, z, n);
            for (int64_t j = 0; j < n; ++j) z[j] -= along * y[j];
        }
        const double square = simd::dot<double, Bytes>(z, z, n);
        *good = square > 1e-6;
        const double f = 1.0 / std::sqrt(square);
        for (int64_t j = 0; j < n; ++j) z[j] *= f;
    }
};

} // namespace

bool tridiagonal_few(int64_t n, int64_t k, const double *d, const double *e, double within, double *values, double *vectors) {
    constexpr double eps = std::numeric_limits<double>::epsilon();
    Frame frame;
    double *squares = frame.take<double>(n);
    double low = d[0], high = d[0], norm = 0;
    for (int64_t i = 0; i < n; ++i) {
        const double radius = (i > 0 ? std::abs(e[i - 1]) : 0.0) + (i + 1 < n ? std::abs(e[i]) : 0.0);
        low = std::min(low, d[i] - radius);
        high = std::max(high, d[i] + radius);
        norm = std::max(norm, std::abs(d[i]) + radius);
        squares[i] = i + 1 < n ? std::max(e[i] * e[i], std::numeric_limits<double>::min()) : 0.0;
    }
    double sum = 0; // maxima lose NaN
    for (int64_t i = 0; i < n; ++i) sum += d[i] + (i + 1 < n ? e[i] : 0.0);
    if (!(norm > 1e-100 && norm < 1e100) || std::isnan(sum)) return false;
    const double margin = 4.0 * double(n) * eps * norm;
    within = std::max(within, eps / 2);
    largest_values(n, k, d, squares, low - margin, high + margin, within * norm, values);

    double *work = frame.take<double>(5 * n * kLanes), *x = frame.take<double>(n * kLanes);
    std::uint64_t state = 0x9e3779b97f4a7c15u; // the same start vectors whenever
    for (int64_t first = 0; first < k; first += kLanes) {
        const int64_t some = std::min<int64_t>(kLanes, k - first);
        double shift[kLanes];
        for (int64_t l = 0; l < kLanes; ++l) shift[l] = values[first + std::min(l, some - 1)];
        for (int64_t i = 0; i < n * kLanes; ++i) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            x[i] = 0.5 + double(state >> 12) * 0x1p-52;
        }
        simd::dispatch<InverseKernel, int64_t, const double *, const double *, const double *, double, double *, double *>(n, d, e, shift, eps * norm, work, x);
        for (int64_t l = 0; l < some; ++l)
            for (int64_t i = 0; i < n; ++i) vectors[(first + l) * n + i] = x[i * kLanes + l];
    }
    // Vectors of values that are near one another, one after the other; LAPACK's dstein has the same threshold.
    for (int64_t i = 1, start = 0; i < k; ++i) {
        if (values[i] - values[i - 1] > 1e-3 * norm) start = i;
        for (int pass = 0; pass < 2 && start < i; ++pass) {
            bool good = true;
            simd::dispatch<CleanKernel, int64_t, const double *, int64_t, double *, bool *>(n, vectors + start * n, i - start, vectors + i * n, &good);
            if (!good) return false;
        }
    }
    // Those of others overlap by eps over their distance: Z <- Z - (Z Zᵀ - I) Z / 2.
    if (k > 1) {
        Frame inner;
        double *g = inner.take<double>(k * k), *more = inner.take<double>(k * n);
        const MatrixView<const double> z(vectors, k, n);
        gemm<double>(z, z.transposed(), MatrixView<double>(g, k, k));
        for (int64_t i = 0; i < k; ++i)
            for (int64_t j = 0; j < k; ++j) {
                g[i * k + j] = (g[i * k + j] - (i == j ? 1.0 : 0.0)) / 2.0;
                if (!(std::abs(g[i * k + j]) < 1e-8)) return false;
            }
        gemm<double>(MatrixView<const double>(g, k, k), z, MatrixView<double>(more, k, n));
        for (int64_t i = 0; i < k * n; ++i) vectors[i] -= more[i];
    }
    const double most = (within + 32.0 * eps) * norm;
    for (int64_t i = 0; i < k; ++i) {
        const double *z = vectors + i * n;
        double square = 0;
        for (int64_t j = 0; j < n; ++j) {
            const double y = (d[j] - values[i]) * z[j] + (j > 0 ? e[j - 1] * z[j - 1] : 0.0) + (j + 1 < n ? e[j] * z[j + 1] : 0.0);
            square += y * y;
        }
        if (!(std::sqrt(square) <= most)) return false;
    }
    return true;
}

} // namespace subspan
