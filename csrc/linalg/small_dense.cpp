#include "linalg/small_dense.hpp"
#include "subspan/blas.hpp"
#include "subspan/eigh.hpp"
#include "subspan/factor.hpp"
#include "subspan/parallel.hpp"

#include "linalg/microkernel.hpp"
#include "base/amax.hpp"
#include "base/scratch.hpp"
#include "base/simd.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace subspan::small {
namespace {

// One-sided Jacobi by itself, after a turn to the eigenvectors of the Gram matrix, and LAPACK's gesdd: 11, 14, 28 us at order 16,
// 33, 28, 55 at 22, 230, 113, 189 at 46, 2140, 495, 689 at 93, 8400, 1850, 1810 at 150; without vectors LAPACK's is half of that.
constexpr int64_t kTurned = 20, kRotated = 110, kValues = 32;
constexpr int64_t kLong = 64; // orders whose loops listen to interrupts: smaller ones are over before

struct MultiplyTN {
    template <int Bytes> static SUBSPAN_INLINE void run(int64_t k, const double *a, const double *b, double *c) {
        constexpr int MR = simd::Shape<Bytes>::mr, W = simd::Vec<double, Bytes>::lanes;
        const int64_t ld = order(k);
        for (int64_t i = 0; i < ld; i += MR) {
            if (k > kLong) poll();
            int64_t j = 0;
            for (; j + 2 * W <= ld; j += 2 * W) simd::microkernel<double, Bytes, 2>(k, a + i, ld, b + j, c + i * ld + j, ld, false, ld);
            for (; j < ld; j += W) simd::microkernel<double, Bytes, 1>(k, a + i, ld, b + j, c + i * ld + j, ld, false, ld);
        }
    }
};

struct InverseCholesky {
    // row += Σ_p scale(p) rows[p] for p in [begin, end), a vector of columns at a time: the sum stays in a register.
    template <int Bytes, class S> static SUBSPAN_INLINE void add(int64_t ld, int64_t begin, int64_t end, const S &scale, const double *rows, double *row) {
        using V = simd::Vec<double, Bytes>;
        for (int64_t j = 0; j < ld; j += V::lanes) {
            auto sum = V::load(row + j);
            for (int64_t p = begin; p < end; ++p) sum += scale(p) * V::load(rows + p * ld + j);
            V::store(row + j, sum);
        }
    }
    template <int Bytes> static SUBSPAN_INLINE void run(int64_t k, double *r, double *out) {
        const int64_t ld = order(k);
        for (int64_t i = 0; i < k; ++i) { // rows of R, from rows of I + x
            if (k > kLong) poll();
            double *row = r + i * ld;
            add<Bytes>(ld, 0, i, [&](int64_t p) SUBSPAN_LAMBDA_INLINE { return -r[p * ld + i]; }, r, row);
            const double inverse = 1.0 / std::sqrt(row[i]);
            for (int64_t j = 0; j < ld; ++j) row[j] = j < i ? 0.0 : row[j] * inverse;
        }
        std::fill_n(out, ld * ld, 0.0);
        for (int64_t i = k; i-- > 0;) { // R X = I from the last row on
            if (k > kLong) poll();
            double *row = out + i * ld;
            row[i] = 1.0;
            add<Bytes>(ld, i + 1, k, [&](int64_t p) SUBSPAN_LAMBDA_INLINE { return -r[i * ld + p]; }, out, row);
            const double inverse = 1.0 / r[i * ld + i];
            for (int64_t j = 0; j < ld; ++j) row[j] *= inverse;
        }
    }
};

// One-sided Jacobi on the rows of g, whose squared norms are kept in `squares`; rows of v are rotated along. Pairs go round
// robin, so that those of a round are independent and overlap in the pipeline.
struct Jacobi {
    // As corrections of x and y: c and s by themselves are no rotation to working precision where s is small (Rutishauser).
    template <int Bytes> static SUBSPAN_INLINE void rotate(int64_t ld, double *x, double *y, double tau, double s) {
        using V = simd::Vec<double, Bytes>;
        for (int64_t j = 0; j < ld; j += V::lanes) {
            const auto a = V::load(x + j), b = V::load(y + j);
            V::store(x + j, a - s * (b + tau * a));
            V::store(y + j, b + s * (a - tau * b));
        }
    }
    template <int Bytes> static SUBSPAN_INLINE void run(int64_t k, double *g, double *v, double *squares, int64_t *seat, double tolerance) {
        using V = simd::Vec<double, Bytes>;
        const int64_t ld = order(k), seats = k + k % 2;
        const double bound = tolerance * tolerance;
        for (int sweep = 0; sweep < 60; ++sweep) {
            bool rotated = false;
            // Squared norms follow from the rotations; once a sweep they are measured.
            for (int64_t i = 0; i < k; ++i) squares[i] = simd::dot<double, Bytes>(g + i * ld, g + i * ld, ld);
            std::iota(seat, seat + seats, int64_t(0));
            for (int64_t round = 0; round + 1 < seats; ++round) {
                if (k > kLong) poll();
                for (int64_t pair = 0; pair < seats / 2; ++pair) {
                    int64_t p = seat[pair], q = seat[seats - 1 - pair];
                    if (p > q) std::swap(p, q);
                    if (q >= k) continue;
                    double *x = g + p * ld, *y = g + q * ld;
                    typename V::type product{};
                    for (int64_t j = 0; j < ld; j += V::lanes) product += V::load(x + j) * V::load(y + j);
                    const double xy = V::sum(product), xx = squares[p], yy = squares[q];
                    if (!(xy * xy > bound * (xx * yy))) continue;
                    rotated = true;
                    // t = tan of the angle, the smaller root of t² + 2 t (yy - xx) / (2 xy) - 1.
                    const double half = 0.5 * (yy - xx), root = std::sqrt(half * half + xy * xy);
                    const double t = half < 0 ? xy / (half - root) : xy / (half + root);
                    const double c = 1.0 / std::sqrt(1.0 + t * t), s = c * t, tau = s / (1.0 + c);
                    squares[p] = std::max(xx - t * xy, 0.0);
                    squares[q] = yy + t * xy;
                    rotate<Bytes>(ld, x, y, tau, s);
                    if (v != nullptr) rotate<Bytes>(ld, v + p * ld, v + q * ld, tau, s);
                }
                std::rotate(seat + 1, seat + seats - 1, seat + seats);
            }
            if (!rotated) return;
        }
    }
};

// Powers of a symmetric x that polynomials share: x, x², ..., x^count.
struct Powers {
    Powers(Frame &frame, int64_t k, const double *x, int count) : k(k), count(count) {
        power[0] = x;
        for (int i = 1; i < count; ++i) {
            double *p = frame.take<double>(area(k));
            multiply_tn(k, x, power[i - 1], p);
            power[i] = p;
        }
        work = frame.take<double>(area(k));
    }
    // out = Σ_m c_m x^m of `terms` terms, count of them to a block, blocks by Horner (Paterson and Stockmeyer, SIAM J.
    // Comput. 2, 1973).
    void series(const double *c, int terms, double *out) const {
        const int64_t ld = order(k), all = area(k);
        for (int block = (terms + count - 1) / count; block-- > 0;) {
            const double *cb = c + block * count;
            const int mine = std::min(count, terms - block * count);
            if (block == (terms + count - 1) / count - 1) {
                std::fill_n(out, all, 0.0);
            } else {
                multiply_tn(k, power[count - 1], out, work);
                std::copy_n(work, all, out);
            }
            for (int m = 1; m < mine; ++m)
                for (int64_t i = 0; i < all; ++i) out[i] += cb[m] * power[m - 1][i];
            for (int64_t i = 0; i < k; ++i) out[i * ld + i] += cb[0];
        }
    }
    int64_t k;
    int count;
    const double *power[8];
    double *work;
};

// Unit rows for those whose norm is zero, orthogonal to all others.
void complete(int64_t k, double *rows, const double *norms) {
    const int64_t ld = order(k);
    for (int64_t i = 0; i < k; ++i) {
        if (norms[i] > 0) continue;
        // The unit vector that the others (zero rows among them, which do not count) cover least.
        int64_t best = 0;
        double least = std::numeric_limits<double>::infinity();
        for (int64_t j = 0; j < k; ++j) {
            double sum = 0;
            for (int64_t p = 0; p < k; ++p) sum += p == i ? 0.0 : rows[p * ld + j] * rows[p * ld + j];
            if (sum < least) {
                least = sum;
                best = j;
            }
        }
        double *row = rows + i * ld;
        std::fill_n(row, ld, 0.0);
        row[best] = 1.0;
        for (int pass = 0; pass < 3; ++pass) {
            for (int64_t p = 0; p < k; ++p) {
                if (p == i) continue;
                double dot = 0;
                for (int64_t j = 0; j < k; ++j) dot += rows[p * ld + j] * row[j];
                for (int64_t j = 0; j < k; ++j) row[j] -= dot * rows[p * ld + j];
            }
            double sum = 0;
            for (int64_t j = 0; j < k; ++j) sum += row[j] * row[j];
            const double scale = 1.0 / std::sqrt(sum);
            for (int64_t j = 0; j < k; ++j) row[j] *= scale;
        }
    }
}

// Rows that are orthonormal to rounding become so to second order: (3 I - V Vᵀ) V / 2.
void polish(int64_t k, double *rows) {
    const int64_t ld = order(k), all = area(k);
    Frame frame;
    double *columns = frame.take<double>(all), *g = frame.take<double>(all), *out = frame.take<double>(all);
    transpose(k, rows, columns);
    multiply_tn(k, columns, columns, g);
    for (int64_t i = 0; i < all; ++i) g[i] *= -0.5;
    for (int64_t i = 0; i < k; ++i) g[i * ld + i] += 1.5;
    multiply_tn(k, g, rows, out);
    std::copy_n(out, all, rows);
}

} // namespace

void multiply_tn(int64_t k, const double *a, const double *b, double *c) {
    simd::dispatch<MultiplyTN, int64_t, const double *, const double *, double *>(k, a, b, c);
}

void transpose(int64_t k, const double *a, double *out) {
    const int64_t ld = order(k);
    for (int64_t i = 0; i < ld; ++i)
        for (int64_t j = 0; j < ld; ++j) out[j * ld + i] = a[i * ld + j];
}

void multiply(int64_t k, const double *a, const double *b, double *c) {
    Frame frame;
    double *at = frame.take<double>(area(k));
    transpose(k, a, at);
    multiply_tn(k, at, b, c);
}

void identity(int64_t k, double *a) {
    std::fill_n(a, area(k), 0.0);
    for (int64_t i = 0; i < k; ++i) a[i * order(k) + i] = 1.0;
}

double row_norm(int64_t k, const double *a) {
    const int64_t ld = order(k);
    double most = 0;
    for (int64_t i = 0; i < k; ++i) {
        double sum = 0;
        for (int64_t j = 0; j < k; ++j) sum += std::abs(a[i * ld + j]);
        if (std::isnan(sum)) return sum;
        most = std::max(most, sum);
    }
    return most;
}

double bound_of_norm(int64_t k, const double *a) {
    const int64_t ld = order(k);
    double sum = 0;
    for (int64_t i = 0; i < k; ++i)
        for (int64_t j = 0; j < k; ++j) sum += a[i * ld + j] * a[i * ld + j];
    const double rows = row_norm(k, a);
    return std::isnan(rows) ? rows : std::min(rows, std::sqrt(sum));
}

double largest(int64_t k, const double *a) {
    const int64_t ld = order(k);
    double most = 0, poison = 0; // x - x is zero or NaN
    for (int64_t i = 0; i < k; ++i)
        for (int64_t j = 0; j < k; ++j) {
            const double x = std::abs(a[i * ld + j]);
            most = x > most ? x : most;
            poison += x - x;
        }
    return poison == 0.0 ? most : poison + most; // NaN, also where an entry is infinite
}

void trigonometric(int64_t k, const double *x, double tolerance, double *cosine, double *sinc, double *versine) {
    const double norm = bound_of_norm(k, x);
    if (norm > kSeries) {
        const int64_t ld = order(k), all = area(k);
        Frame frame;
        double *g = frame.take<double>(k * k), *values = frame.take<double>(k), *vectors = frame.take<double>(k * k);
        double *rows = frame.take<double>(all), *scaled = frame.take<double>(all);
        for (int64_t i = 0; i < k; ++i) std::copy_n(x + i * ld, k, g + i * k);
        eigh_top<double>(k, k, g, values, vectors);
        std::fill_n(rows, all, 0.0);
        for (int64_t i = 0; i < k; ++i) std::copy_n(vectors + i * k, k, rows + i * ld);
        const auto compose = [&](auto f, double *out) {
            if (out == nullptr) return;
            std::copy_n(rows, all, scaled);
            for (int64_t i = 0; i < k; ++i) {
                const double y = f(std::sqrt(std::max(values[i], 0.0)));
                for (int64_t j = 0; j < ld; ++j) scaled[i * ld + j] *= y;
            }
            multiply_tn(k, scaled, rows, out);
        };
        compose([](double a) { return std::cos(a); }, cosine);
        compose([](double a) { return a < 1e-4 ? 1.0 - a * a / 6.0 : std::sin(a) / a; }, sinc);
        compose([](double a) { return a < 1e-3 ? 0.5 - a * a / 24.0 : 2.0 * std::sin(0.5 * a) * std::sin(0.5 * a) / (a * a); }, versine);
        return;
    }
    // The first term left out of the cosine is norm^m / (2m)!, and those of the others are smaller.
    int terms = 0;
    for (double next = 1.0; terms < 3 || (next > tolerance && terms < 15);) {
        for (int i = 0; i < 3; ++i, ++terms) next *= norm / double((2 * terms + 1) * (2 * terms + 2));
    }
    double c[15], s[15], v[15];
    c[0] = 1.0;
    for (int m = 0; m < terms; ++m) {
        if (m > 0) c[m] = -c[m - 1] / double((2 * m - 1) * (2 * m));
        s[m] = c[m] / double(2 * m + 1);
        v[m] = s[m] / double(2 * m + 2);
    }
    Frame frame;
    const Powers powers(frame, k, x, terms > 3 ? 3 : 2);
    if (cosine != nullptr) powers.series(c, terms, cosine);
    if (sinc != nullptr) powers.series(s, terms, sinc);
    if (versine != nullptr) powers.series(v, terms, versine);
}

void arc(int64_t k, const double *x, double tolerance, double *out) {
    const double norm = row_norm(k, x);
    double c[64];
    int terms = 1;
    c[0] = 1.0;
    for (double next = norm; next > tolerance * (1.0 - norm) && terms < 64; next *= norm, ++terms)
        c[terms] = c[terms - 1] * double(2 * terms) / double(2 * terms + 1);
    Frame frame;
    const int count = std::clamp(int(std::ceil(std::sqrt(double(terms)))), 1, 8);
    const Powers powers(frame, k, x, count);
    powers.series(c, terms, out);
}

void inverse_sqrt(int64_t k, const double *x, double *out) {
    const int64_t ld = order(k), all = area(k);
    Frame frame;
    double *y = frame.take<double>(all), *z = frame.take<double>(all), *w = frame.take<double>(all), *t = frame.take<double>(all);
    // (I + x) / scale has its spectrum in (0, 1]; scale is one while that needs none, so that I stays I.
    const double norm = row_norm(k, x), scale = norm < 0.5 ? 1.0 : 1.0 + norm;
    for (int64_t i = 0; i < all; ++i) y[i] = x[i] / scale;
    for (int64_t i = 0; i < k; ++i) y[i * ld + i] += 1.0 / scale;
    identity(k, z);
    for (int step = 0; step < 40; ++step) {
        multiply_tn(k, z, y, w); // all iterates are polynomials of x: symmetric, and they commute
        double off = 0;
        for (int64_t i = 0; i < all; ++i) w[i] = -0.5 * w[i];
        for (int64_t i = 0; i < k; ++i) w[i * ld + i] += 1.5;
        for (int64_t i = 0; i < k; ++i)
            for (int64_t j = 0; j < k; ++j) off = std::max(off, std::abs(w[i * ld + j] - (i == j ? 1.0 : 0.0)));
        multiply_tn(k, z, w, t);
        std::swap(z, t);
        if (off < 1e-9) break; // the next one would be its square
        multiply_tn(k, y, w, t);
        std::swap(y, t);
    }
    const double root = 1.0 / std::sqrt(scale);
    for (int64_t i = 0; i < ld; ++i)
        for (int64_t j = 0; j < ld; ++j) out[i * ld + j] = 0.5 * root * (z[i * ld + j] + z[j * ld + i]);
}

void inverse_cholesky(int64_t k, const double *x, double *out) {
    Frame frame;
    double *r = frame.take<double>(area(k));
    std::copy_n(x, area(k), r);
    for (int64_t i = 0; i < k; ++i) r[i * order(k) + i] += 1.0;
    simd::dispatch<InverseCholesky, int64_t, double *, double *>(k, r, out);
}

void svd(int64_t k, const double *a, double *s, double *xt, double *yt, double accuracy) {
    const int64_t ld = order(k);
    Frame frame;
    if (const double top = largest(k, a); !std::isfinite(top)) { // whatever the order is
        std::fill_n(s, k, top);
        if (xt != nullptr) std::fill_n(xt, area(k), top);
        if (yt != nullptr) std::fill_n(yt, area(k), top);
        return;
    }
    if (k > (xt == nullptr && yt == nullptr ? kValues : kRotated) && has_lapack()) {
        double *dense = frame.take<double>(k * k), *u = xt != nullptr || yt != nullptr ? frame.take<double>(k * k) : nullptr;
        double *vt = u != nullptr ? frame.take<double>(k * k) : nullptr;
        for (int64_t i = 0; i < k; ++i) std::copy_n(a + i * ld, k, dense + i * k);
        small_svd(k, k, dense, s, u, vt);
        if (xt != nullptr) std::fill_n(xt, area(k), 0.0);
        if (yt != nullptr) std::fill_n(yt, area(k), 0.0);
        for (int64_t i = 0; i < k && xt != nullptr; ++i)
            for (int64_t j = 0; j < k; ++j) xt[j * ld + i] = u[i * k + j];
        for (int64_t i = 0; i < k && yt != nullptr; ++i) std::copy_n(vt + i * k, k, yt + i * ld);
        return;
    }
    double *g = frame.take<double>(area(k)), *v = yt != nullptr ? frame.take<double>(area(k)) : nullptr;
    double *norms = frame.take<double>(k);
    int64_t *seat = frame.take<int64_t>(k + 1);
    transpose(k, a, g);
    const double top = largest(k, a);
    const double down = std::ldexp(1.0, -near_exponent(top)), up = 1.0 / down;
    for (int64_t i = 0; i < area(k); ++i) g[i] *= down;
    if (v != nullptr) identity(k, v);
    if (k >= kTurned) { // rows that are nearly orthogonal from the start, by the eigenvectors of their Gram matrix: one or two sweeps are left
        double *columns = frame.take<double>(area(k)), *w = frame.take<double>(area(k)), *dense = frame.take<double>(k * k), *values = frame.take<double>(k);
        double *rows = frame.take<double>(k * k);
        transpose(k, g, columns);
        multiply_tn(k, columns, columns, w);
        for (int64_t i = 0; i < k; ++i) std::copy_n(w + i * ld, k, dense + i * k);
        eigh_top<double>(k, k, dense, values, rows);
        std::fill_n(w, area(k), 0.0);
        for (int64_t i = 0; i < k; ++i)
            for (int64_t j = 0; j < k; ++j) w[j * ld + i] = rows[i * k + j];
        multiply_tn(k, w, g, columns);
        std::copy_n(columns, area(k), g);
        for (int64_t i = 0; i < k && v != nullptr; ++i) std::copy_n(rows + i * k, k, v + i * ld);
    }
    const double tolerance = std::max(accuracy, std::numeric_limits<double>::epsilon() * std::max(2.0, std::sqrt(double(k))));
    simd::dispatch<Jacobi, int64_t, double *, double *, double *, int64_t *, double>(k, g, v, norms, seat, tolerance);
    for (int64_t i = 0; i < k; ++i) {
        double sum = 0;
        for (int64_t j = 0; j < k; ++j) sum += g[i * ld + j] * g[i * ld + j];
        norms[i] = std::sqrt(sum);
    }
    std::iota(seat, seat + k, int64_t(0));
    std::sort(seat, seat + k, [&](int64_t p, int64_t q) { return norms[p] > norms[q] || (norms[p] == norms[q] && p < q); });
    for (int64_t i = 0; i < k; ++i) s[i] = norms[seat[i]];
    // Rows whose squares underflow have lost their direction.
    const double floor = 1e-140;
    if (xt != nullptr) {
        std::fill_n(xt, area(k), 0.0);
        for (int64_t i = 0; i < k; ++i) {
            if (!(s[i] > floor)) continue;
            for (int64_t j = 0; j < k; ++j) xt[i * ld + j] = g[seat[i] * ld + j] / s[i];
        }
    }
    if (yt != nullptr) {
        std::fill_n(yt, area(k), 0.0);
        for (int64_t i = 0; i < k; ++i) std::copy_n(v + seat[i] * ld, k, yt + i * ld);
    }
    for (int64_t i = 0; i < k; ++i) s[i] = s[i] > floor ? s[i] : 0.0;
    if (xt != nullptr && k > 0 && s[k - 1] == 0.0) complete(k, xt, s);
    // Thousands of rotations leave some eps of defect in the vectors: a Newton step takes it off.
    if (accuracy == 0.0) {
        if (xt != nullptr) polish(k, xt);
        if (yt != nullptr) polish(k, yt);
    }
    for (int64_t i = 0; i < k; ++i) s[i] *= up;
}

} // namespace subspan::small
