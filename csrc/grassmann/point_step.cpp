#include "grassmann/point_step.hpp"

#include "base/amax.hpp"
#include "base/scratch.hpp"
#include "base/simd.hpp"
#include "linalg/small_dense.hpp"
#include "subspan/errors.hpp"
#include "subspan/householder_qr.hpp"
#include "subspan/orthonormalize.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <utility>

namespace subspan::grassmann {
namespace {

template <class T> constexpr double kEps = std::numeric_limits<T>::epsilon();

std::string number(double x) {
    char text[32];
    std::snprintf(text, sizeof text, "%.1e", x);
    return text;
}

bool finite(int64_t k, const double *a) { return std::isfinite(small::largest(k, a)); }

// The two functions of x that a retraction is made of: U C + t H S.
void pair(int64_t k, Retraction method, const double *x, double tolerance, double *c, double *s) {
    const int64_t ld = small::order(k), all = small::area(k);
    switch (method) {
    case Retraction::exp: return small::trigonometric(k, x, tolerance, c, s, nullptr);
    case Retraction::cholesky:
    case Retraction::qr: small::inverse_cholesky(k, x, c); break;
    case Retraction::polar: small::inverse_sqrt(k, x, c); break;
    case Retraction::cayley: {
        Frame frame;
        double *quarter = frame.take<double>(all), *r = frame.take<double>(all);
        for (int64_t i = 0; i < all; ++i) quarter[i] = 0.25 * x[i];
        small::inverse_cholesky(k, quarter, r);
        small::transpose(k, r, quarter);
        small::multiply_tn(k, quarter, quarter, s); // (I + X/4)⁻¹ = R⁻¹ R⁻ᵀ
        for (int64_t i = 0; i < all; ++i) c[i] = 2.0 * s[i];
        for (int64_t i = 0; i < k; ++i) c[i * ld + i] -= 1.0;
        return;
    }
    }
    std::copy_n(c, all, s);
}

// What makes U orthonormal to second order or better: U F. Returns false where F is the identity.
template <class T> bool correction(int64_t k, const double *e, double *f) {
    const int64_t ld = small::order(k), all = small::area(k);
    const double off = defect(k, e);
    // An orthonormal U stays what it is, bit by bit.
    if (off <= 2.0 * kEps<T>) return false;
    if (off < 0.1 * std::sqrt(kEps<T>)) {
        for (int64_t i = 0; i < all; ++i) f[i] = -0.5 * e[i];
        for (int64_t i = 0; i < k; ++i) f[i * ld + i] += 1.5;
    } else {
        Frame frame;
        double *x = frame.take<double>(all);
        std::copy_n(e, all, x);
        for (int64_t i = 0; i < k; ++i) x[i * ld + i] -= 1.0;
        small::inverse_sqrt(k, x, f);
    }
    return true;
}

// The k x k part of a step while the Gram matrix of tH is fine enough for it. e = UᵀU, m = UᵀH, b = HᵀH.
struct Factors {
    double *p, *q;   // out = U p + H q
    double *p2, *q2; // velocity = U p2 + H q2, or null
};

template <class T> void small_factors(int64_t k, const double *e, double *m, const double *b, double t, Retraction method, const Factors &to) {
    const int64_t all = small::area(k);
    Frame frame;
    double *f = frame.take<double>(all), *a = frame.take<double>(all), *x = frame.take<double>(all), *c = frame.take<double>(all);
    double *w = frame.take<double>(all);
    const bool corrected = correction<T>(k, e, f);
    if (corrected) {
        small::multiply_tn(k, f, m, w);
        std::copy_n(w, all, m);
    }
    // H without its part along U has the Gram matrix b - mᵀm.
    small::multiply_tn(k, m, m, w);
    for (int64_t i = 0; i < all; ++i) a[i] = b[i] - w[i];
    for (int64_t i = 0; i < all; ++i) x[i] = t * t * a[i];
    double *s = to.q;
    pair(k, method, x, sizeof(T) == 4 ? 1e-10 : 1e-19, c, s);
    small::multiply(k, m, s, w);
    for (int64_t i = 0; i < all; ++i) w[i] = c[i] - t * w[i];
    if (corrected)
        small::multiply_tn(k, f, w, to.p);
    else
        std::copy_n(w, all, to.p);
    if (to.p2 != nullptr) {
        double *as = x;
        small::multiply_tn(k, a, s, as);
        small::multiply(k, m, c, w);
        for (int64_t i = 0; i < all; ++i) w[i] = -t * as[i] - w[i];
        if (corrected)
            small::multiply_tn(k, f, w, to.p2);
        else
            std::copy_n(w, all, to.p2);
        std::copy_n(c, all, to.q2);
    }
    for (int64_t i = 0; i < all; ++i) s[i] *= t;
}

// The orthogonal factor of a symmetric positive definite matrix, diagonal of R positive.
void orthogonal_factor(int64_t k, const double *a, double *out) {
    const int64_t ld = small::order(k);
    Frame frame;
    const MatrixView<double> dense(frame.take<double>(k * k), k, k), v(frame.take<double>(k * k), k, k);
    const MatrixView<double> r(frame.take<double>(k * k), k, k), tau(frame.take<double>(k), 1, k);
    const int64_t nb = std::min(k, kReflectionBlock);
    const MatrixView<double> t(frame.take<double>(k * nb), k, nb);
    for (int64_t i = 0; i < k; ++i)
        for (int64_t j = 0; j < k; ++j) dense(i, j) = a[i * ld + j];
    householder_qr<double>(StackView<const double>(MatrixView<const double>(dense)), v, r, tau, t);
    factored_array<double>(StackView<const double>(MatrixView<const double>(v)), StackView<const double>(MatrixView<const double>(t)),
                           StackView<double>(dense));
    std::fill_n(out, small::area(k), 0.0);
    for (int64_t i = 0; i < k; ++i)
        for (int64_t j = 0; j < k; ++j) out[i * ld + j] = r(j, j) < 0 ? -dense(i, j) : dense(i, j);
}

// Steps of any length, from the thin SVD of the tangent.
template <class T> void long_step(MatrixView<const T> u, MatrixView<const T> h, double t, Retraction method, MatrixView<T> out, MatrixView<T> *velocity) {
    const int64_t n = u.rows, k = u.cols, all = small::area(k);
    Frame frame;
    const MatrixView<T> q(frame.take<T>(n * k), n, k);
    double *s = frame.take<double>(k), *xt = frame.take<double>(all), *yt = frame.take<double>(all);
    tangent_svd<T>(h, q, s, xt, yt);
    double *g = frame.take<double>(k), *cosine = frame.take<double>(all), *sine = frame.take<double>(all);
    double *along = frame.take<double>(k), *moved = frame.take<double>(all), *kept = frame.take<double>(all);
    double *stretch = frame.take<double>(k);
    for (int64_t i = 0; i < k; ++i) {
        // Beyond that an angle has no digits left, whatever it is.
        const double ts = std::clamp(t * s[i], -1e100, 1e100), root = std::sqrt(1.0 + ts * ts);
        switch (method) {
        case Retraction::exp:
            g[i] = std::cos(ts);
            along[i] = std::sin(ts);
            break;
        case Retraction::cayley:
            g[i] = (1.0 - 0.25 * ts * ts) / (1.0 + 0.25 * ts * ts);
            along[i] = ts / (1.0 + 0.25 * ts * ts);
            break;
        default: g[i] = 1.0 / root; along[i] = ts / root;
        }
        stretch[i] = root;
    }
    compose(k, yt, g, yt, cosine);
    compose(k, xt, along, yt, sine);
    if (velocity != nullptr) {
        for (int64_t i = 0; i < k; ++i) {
            const double ts = std::clamp(t * s[i], -1e100, 1e100);
            g[i] = -s[i] * std::sin(ts);
            along[i] = s[i] * std::cos(ts);
        }
        compose(k, yt, g, yt, moved);
        compose(k, xt, along, yt, kept);
    }
    if (method == Retraction::cholesky || method == Retraction::qr) {
        // U + tH = (polar factor) N with N = y √(1 + t²s²) yᵀ: its Q factor is the polar factor times that of N.
        double *nn = frame.take<double>(all), *qn = frame.take<double>(all), *w = frame.take<double>(all);
        const double top = *std::max_element(stretch, stretch + k);
        for (int64_t i = 0; i < k; ++i) stretch[i] /= top;
        compose(k, yt, stretch, yt, nn);
        orthogonal_factor(k, nn, qn);
        small::multiply(k, cosine, qn, w);
        std::copy_n(w, all, cosine);
        small::multiply(k, sine, qn, w);
        std::copy_n(w, all, sine);
    }
    // Directions that rounding left in H have parts along U: they come off.
    PackedBlock<T> packed(frame, n, k, 2);
    const MatrixView<const T> operands[2] = {u, q};
    const unsigned wanted[2] = {3u, 0u};
    packed.gram(operands, wanted);
    double *e = frame.take<double>(all), *m = frame.take<double>(all), *f = frame.take<double>(all), *w = frame.take<double>(all);
    packed.block(0, 0, e);
    packed.block(0, 1, m);
    const bool corrected = correction<T>(k, e, f);
    if (corrected) {
        small::multiply_tn(k, f, m, w);
        std::copy_n(w, all, m);
    }
    const auto part = [&](double *c, const double *sn) {
        small::multiply(k, m, sn, w);
        for (int64_t i = 0; i < all; ++i) c[i] -= w[i];
        if (!corrected) return;
        small::multiply_tn(k, f, c, w);
        std::copy_n(w, all, c);
    };
    part(cosine, sine);
    const double *first[2] = {cosine, sine};
    if (velocity != nullptr) {
        part(moved, kept);
        const double *second[2] = {moved, kept};
        packed.apply2(operands, first, out, second, *velocity);
    } else {
        packed.apply(operands, first, out);
    }
    tidy<T>(out);
}

// Points of one column: two sweeps, and scalars between them.
template <class T> struct LineArgs {
    int64_t n;
    const T *u, *h;
    double *sums; // UᵀU, UᵀH, HᵀH
    double p, q, p2, q2;
    T *out, *velocity; // out = p U + q H, velocity = p2 U + q2 H; may be u and h
};

template <class T> struct LineSums {
    template <int Bytes> static SUBSPAN_INLINE void run(const LineArgs<T> *g) {
        using V = simd::Vec<T, Bytes>;
        constexpr int64_t W = V::lanes, kRun = 64 * W; // rows whose products are summed in T, in chains of 32 as everywhere
        double *sums = g->sums;
        sums[0] = sums[1] = sums[2] = 0;
        for (int64_t first = 0; first < g->n; first += kRun) {
            if (first % (int64_t(1) << 20) == 0) poll();
            const int64_t end = std::min(g->n, first + kRun);
            typename V::type sum[2][3] = {};
            int64_t i = first;
            for (; i + 2 * W <= end; i += 2 * W)
#pragma GCC unroll 2
                for (int c = 0; c < 2; ++c) {
                    const auto u = V::load(g->u + i + c * W), h = V::load(g->h + i + c * W);
                    sum[c][0] += u * u;
                    sum[c][1] += u * h;
                    sum[c][2] += h * h;
                }
            double rest[3] = {};
            for (; i < end; ++i) {
                const double u = double(g->u[i]), h = double(g->h[i]);
                rest[0] += u * u;
                rest[1] += u * h;
                rest[2] += h * h;
            }
            for (int q = 0; q < 3; ++q) sums[q] += double(V::sum(sum[0][q] + sum[1][q])) + rest[q];
        }
    }
};

template <class T> struct LineMove {
    template <int Bytes> static SUBSPAN_INLINE void run(const LineArgs<T> *g) {
        const T p = T(g->p), q = T(g->q), p2 = T(g->p2), q2 = T(g->q2);
        if (g->velocity == nullptr)
            for (int64_t i = 0; i < g->n; ++i) g->out[i] = p * g->u[i] + q * g->h[i];
        else
            for (int64_t i = 0; i < g->n; ++i) {
                const T u = g->u[i], h = g->h[i];
                g->out[i] = p * u + q * h;
                g->velocity[i] = p2 * u + q2 * h;
            }
    }
};

// A step of one column; false, and nothing is done, where the way of all others is needed: for numbers at the ends of the range, a
// U that is far from its length, an H with a large part along U, and what is refused.
template <class T> bool line_step(const Step<T> &s) {
    const auto lies = [](const auto &x) { return x.row_stride == 1 || x.rows == 1; };
    if (!lies(s.u) || !lies(s.h) || !lies(s.out) || (s.velocity != nullptr && !lies(*s.velocity))) return false;
    double sums[3];
    LineArgs<T> args{s.u.rows, s.u.data, s.h.data, sums, 0, 0, 0, 0, s.out.data, s.velocity != nullptr ? s.velocity->data : nullptr};
    simd::dispatch<LineSums<T>>(static_cast<const LineArgs<T> *>(&args));
    const double e = sums[0], b = sums[2], t = s.t, off = std::abs(e - 1.0);
    constexpr double least = 1e6 * double(std::numeric_limits<T>::min()) / kEps<T>, most = 1e-6 * double(std::numeric_limits<T>::max());
    if (!(off < 0.1 * std::sqrt(kEps<T>)) || !(off <= orthonormal_bound<T>(1)) || !(b > least && b < most) || !(std::abs(t) < 1e100)) return false;
    if (s.checks == Checks::points_and_tangents && !(sums[1] * sums[1] <= kEps<T> * b)) return false;
    if (!(sums[1] * sums[1] < 0.1 * b)) return false;
    const double f = off <= 2.0 * kEps<T> ? 1.0 : 1.5 - 0.5 * e, m = f * sums[1], a = b - m * m, x = t * t * a;
    if (!(x < 1e200) || !(std::abs(t) < most)) return false;
    if (s.dry) return true;
    double c = 0, sine = 0;
    switch (s.method) {
    case Retraction::exp: {
        const double angle = std::sqrt(x);
        c = std::cos(angle);
        sine = angle < 1e-4 ? 1.0 - x / 6.0 : std::sin(angle) / angle;
        break;
    }
    case Retraction::cayley:
        sine = 1.0 / (1.0 + 0.25 * x);
        c = 2.0 * sine - 1.0;
        break;
    default: c = sine = 1.0 / std::sqrt(1.0 + x);
    }
    args.p = f * (c - t * m * sine);
    args.q = t * sine;
    args.p2 = f * (-t * a * sine - m * c);
    args.q2 = c;
    simd::dispatch<LineMove<T>>(static_cast<const LineArgs<T> *>(&args));
    return true;
}

} // namespace

void check_shape(int64_t n, int64_t k) {
    if (k > n) throw ValueError("U has " + std::to_string(k) + " columns of " + std::to_string(n) + " entries: so many cannot be orthonormal");
}

template <class T> double orthonormal_bound(int64_t k) { return 64.0 * kEps<T> * std::sqrt(double(std::max<int64_t>(k, 1))); }

double defect(int64_t k, const double *e) {
    const int64_t ld = small::order(k);
    double off = 0;
    for (int64_t i = 0; i < k; ++i)
        for (int64_t j = 0; j < k; ++j) {
            const double x = std::abs(e[i * ld + j] - (i == j ? 1.0 : 0.0));
            if (std::isnan(x)) return x;
            off = std::max(off, x);
        }
    return off;
}

template <class T> void require_orthonormal(int64_t k, const double *e, const char *name, int64_t item) {
    const double off = defect(k, e), bound = orthonormal_bound<T>(k);
    if (off <= bound) return;
    const std::string which = "matrix " + std::to_string(item) + " of " + name;
    if (!std::isfinite(off)) throw ValueError(which + " holds NaN or infinity, or numbers whose squares overflow");
    throw ValueError("the columns of " + which + " are not orthonormal: max|" + name + "ᵀ" + name + " - I| is " + number(off) + ", more than " + number(bound) +
                     "; use subspan.orth.orthonormalize (subspan.orth.range_basis where columns may depend on each other: orthonormalize "
                     "completes those, and the span grows), or pass check=False");
}

template <class T> void require_tangent(int64_t k, const double *m, const double *h, double t, const char *name, int64_t item) {
    const int64_t ld = small::order(k);
    double along = 0, whole = 0;
    for (int64_t i = 0; i < small::area(k); ++i) along += m[i] * m[i];
    for (int64_t i = 0; i < k; ++i) whole += h[i * ld + i];
    const double bound = std::sqrt(kEps<T>);
    // What moves a unit vector by its rounding error at most is noise, and is all there is of a tangent where k = n.
    if (along <= bound * bound * whole || std::abs(t) * std::sqrt(along) <= orthonormal_bound<T>(k)) return;
    throw ValueError("matrix " + std::to_string(item) + " of " + name + " is not tangent at U: ||Uᵀ" + name + "|| is " + number(std::sqrt(along / whole)) +
                     " of its norm, more than " + number(bound) + "; use subspan.grassmann.tangent, or pass check=False to have that part taken off");
}

void compose(int64_t k, const double *yt, const double *g, const double *xt, double *f) {
    const int64_t ld = small::order(k);
    Frame frame;
    double *w = frame.take<double>(small::area(k));
    std::copy_n(yt, small::area(k), w);
    for (int64_t i = 0; i < k; ++i)
        for (int64_t j = 0; j < k; ++j) w[i * ld + j] *= g[i];
    small::multiply_tn(k, w, xt, f);
}

template <class T> double log_factor(int64_t k, const double *m, double *f) {
    const int64_t ld = small::order(k), all = small::area(k);
    Frame frame;
    double *x = frame.take<double>(all), *a = frame.take<double>(all), *b = frame.take<double>(all);
    small::multiply_tn(k, m, m, x);
    for (int64_t i = 0; i < all; ++i) x[i] = -x[i];
    for (int64_t i = 0; i < k; ++i) x[i * ld + i] += 1.0;
    double sum = 0;
    if (small::row_norm(k, x) <= small::kArc) {
        small::arc(k, x, sizeof(T) == 4 ? 1e-10 : 1e-17, a);
        small::transpose(k, m, b);
        small::multiply_tn(k, a, b, f);
        // log has the Gram matrix fᵀ x f, and its squared norm is Σ θ².
        small::multiply_tn(k, x, f, a);
        for (int64_t i = 0; i < all; ++i) sum += a[i] * f[i];
        return std::max(sum, 0.0);
    }
    double *c = frame.take<double>(k);
    small::svd(k, m, c, a, b, kSvd<T>);
    for (int64_t i = 0; i < k; ++i) {
        const double cosine = std::min(c[i], 1.0), sine = std::sqrt((1.0 - cosine) * (1.0 + cosine));
        const double theta = sine < 1e-7 ? sine : std::acos(cosine);
        sum += theta * theta;
        c[i] = sine < 1e-7 ? 1.0 + sine * sine / 6.0 : theta / sine;
    }
    compose(k, b, c, a, f);
    return sum;
}

template <class T> void tangent_svd(MatrixView<const T> h, MatrixView<T> q, double *s, double *xt, double *yt) {
    const int64_t n = h.rows, k = h.cols, ld = small::order(k);
    Frame frame;
    const double top = double(max_abs<T>(h));
    int e = 0;
    if (top > 0) std::frexp(top, &e);
    e = std::clamp(e, -900, 900);
    // A copy of unit size, so that no square is lost. Two factors: one of them may not fit T.
    const MatrixView<T> a(frame.take<T>(n * k), n, k);
    const T one = T(std::ldexp(1.0, -(e / 2))), two = T(std::ldexp(1.0, -(e - e / 2)));
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < k; ++j) a(i, j) = h(i, j) * one * two;
    const int64_t nb = std::min(k, kReflectionBlock);
    const MatrixView<T> v(frame.take<T>(n * k), n, k), r(frame.take<T>(k * k), k, k), tau(frame.take<T>(k), 1, k);
    const MatrixView<T> t(frame.take<T>(k * nb), k, nb);
    householder_qr<T>(StackView<const T>(MatrixView<const T>(a)), v, r, tau, t);
    factored_array<T>(StackView<const T>(MatrixView<const T>(v)), StackView<const T>(MatrixView<const T>(t)), StackView<T>(q));
    double *dense = frame.zeros<double>(small::area(k));
    for (int64_t i = 0; i < k; ++i)
        for (int64_t j = i; j < k; ++j) dense[i * ld + j] = double(r(i, j));
    small::svd(k, dense, s, xt, yt, kSvd<T>);
    for (int64_t i = 0; i < k; ++i) s[i] = std::ldexp(s[i], e);
}

template <class T> void tidy(MatrixView<T> u) {
    const int64_t n = u.rows, k = u.cols, ld = small::order(k);
    Frame frame;
    PackedBlock<T> packed(frame, n, k, 1);
    double *e = frame.take<double>(small::area(k)), *f = frame.take<double>(small::area(k));
    for (int pass = 0; pass < 4; ++pass) {
        const MatrixView<const T> operands[1] = {u};
        const unsigned wanted[1] = {1u};
        packed.gram(operands, wanted);
        packed.block(0, 0, e);
        const double off = defect(k, e);
        if (off <= 4.0 * kEps<T> * std::sqrt(double(k))) return;
        for (int64_t i = 0; i < k; ++i) e[i * ld + i] -= 1.0;
        if (!(small::row_norm(k, e) < 0.5)) {
            const MatrixView<T> copy(frame.take<T>(n * k), n, k);
            copy_matrix<T>(u, copy);
            orthonormalize<T>(StackView<const T>(MatrixView<const T>(copy)), StackView<T>(copy), Orthonormalization::polar, true);
            copy_matrix<T>(copy, u);
            continue;
        }
        small::inverse_sqrt(k, e, f);
        const double *w[1] = {f};
        packed.apply(operands, w, u);
    }
}

template <class T> void step(const Step<T> &s) {
    if (s.u.cols == 1 && line_step<T>(s)) return;
    const auto u = s.u;
    const auto h = s.h;
    const int64_t n = u.rows, k = u.cols, all = small::area(k);
    Frame frame;
    PackedBlock<T> packed(frame, n, k, 2);
    packed.ahead(s.next, s.next_count);
    MatrixView<const T> operands[2] = {u, h};
    const unsigned wanted[2] = {3u, 2u};
    double *e = frame.take<double>(8 * all), *m = e + all, *b = e + 2 * all;
    const bool moves = s.velocity != nullptr;
    const Factors to{e + 3 * all, e + 4 * all, moves ? e + 5 * all : nullptr, moves ? e + 6 * all : nullptr};
    const auto products = [&] {
        packed.gram(operands, wanted);
        packed.block(0, 0, e);
        packed.block(0, 1, m);
        packed.block(1, 1, b);
    };
    double t = s.t;
    const auto finish = [&] {
        small_factors<T>(k, e, m, b, t, s.method, to);
        const double *first[2] = {to.p, to.q};
        if (!moves) return packed.apply(operands, first, s.out);
        const double *second[2] = {to.p2, to.q2};
        packed.apply2(operands, first, s.out, second, *s.velocity);
    };
    products();
    const bool bounded = finite(k, e) && finite(k, m) && finite(k, b);
    if (!bounded) {
        const std::string which = "matrix " + std::to_string(s.item) + " of ";
        if (!all_finite<T>(u)) throw ValueError(which + "U holds NaN or infinity");
        if (!all_finite<T>(h)) throw ValueError(which + s.name + " holds NaN or infinity");
    }
    if (s.checks != Checks::none) require_orthonormal<T>(k, e, "U", s.item);
    double *excess = e + 7 * all;
    std::copy_n(e, all, excess);
    for (int64_t i = 0; i < k; ++i) excess[i * small::order(k) + i] -= 1.0;
    const bool orthonormal = small::row_norm(k, excess) < 0.5;
    // Squares of a tiny H underflow, and a large t would have made something of them.
    constexpr double tiny = 1e3 * double(std::numeric_limits<T>::min()) / kEps<T>;
    const bool lost = bounded && small::row_norm(k, b) < tiny && t * t * tiny > 0.01 * kEps<T>;
    const double top = bounded && !lost ? 0.0 : double(max_abs<T>(h));
    if (lost && top == 0.0) t = 0.0;
    if (!orthonormal || (top > 0.0 && (!bounded || lost))) {
        // A tidied copy of the basis, one of H of unit size, and a step as much longer.
        MatrixView<const T> basis = u;
        if (!orthonormal) {
            const MatrixView<T> copy(frame.take<T>(n * k), n, k);
            copy_matrix<T>(u, copy);
            orthonormalize<T>(StackView<const T>(MatrixView<const T>(copy)), StackView<T>(copy), Orthonormalization::polar, true);
            basis = copy;
        }
        int exponent = 0;
        if (top > 0.0) std::frexp(top, &exponent);
        const MatrixView<T> scaled(frame.take<T>(n * k), n, k);
        const T one = T(std::ldexp(1.0, -(exponent / 2))), two = T(std::ldexp(1.0, -(exponent - exponent / 2)));
        for (int64_t i = 0; i < n; ++i)
            for (int64_t j = 0; j < k; ++j) scaled(i, j) = h(i, j) * one * two;
        Step<T> longer = s;
        longer.u = basis;
        longer.h = scaled;
        longer.t = std::clamp(std::ldexp(t, exponent), -1e300, 1e300);
        longer.next_count = 0;
        step<T>(longer);
        if (moves && !s.dry) {
            const T back = T(std::ldexp(1.0, exponent / 2)), rest = T(std::ldexp(1.0, exponent - exponent / 2));
            for (int64_t i = 0; i < n; ++i)
                for (int64_t j = 0; j < k; ++j) (*s.velocity)(i, j) = (*s.velocity)(i, j) * back * rest;
        }
        return;
    }
    if (s.checks == Checks::points_and_tangents) require_tangent<T>(k, m, b, t, s.name, s.item);
    if (s.dry) return;
    // Functions of t² HᵀH, which is known to eps of its norm: up to there what that costs of orthonormality is taken off.
    const double most = s.method == Retraction::exp ? small::kEntire : 1e3;
    const auto length = [&] { return t == 0.0 ? 0.0 : t * t * small::bound_of_norm(k, b); };
    const auto short_enough = [&] { return length() <= most; };
    const auto step_and_tidy = [&] {
        finish();
        if (length() > small::kSeries) tidy<T>(s.out);
    };
    // HᵀH - mᵀm is known to a few eps of what it is a difference of: a large part of H along U has to go first.
    double along = 0; // the longest column of m, squared
    for (int64_t j = 0; j < k; ++j) {
        double sum = 0;
        for (int64_t i = 0; i < k; ++i) sum += m[i * small::order(k) + j] * m[i * small::order(k) + j];
        along = std::max(along, sum);
    }
    if (short_enough() && !(t * t * along > 0.3 * std::sqrt(double(k)))) return step_and_tidy();
    // A long step, or one that only looks long because of that part: without it, and if that is not enough by the SVD.
    const MatrixView<T> rest(frame.take<T>(n * k), n, k);
    double *f = frame.take<double>(all), *w = frame.take<double>(all);
    if (correction<T>(k, e, f)) {
        small::multiply_tn(k, f, m, w);
        small::multiply_tn(k, f, w, m); // Û Ûᵀ H = U F Fᵀ UᵀH
    }
    for (int64_t i = 0; i < all; ++i) m[i] = -m[i];
    small::identity(k, w);
    const double *off[2] = {m, w};
    packed.apply(operands, off, rest);
    operands[1] = rest;
    products();
    if (short_enough()) return step_and_tidy();
    long_step<T>(u, rest, t, s.method, s.out, s.velocity);
}

#define SUBSPAN_INSTANTIATE(T)                                                                                                                                 \
    template double orthonormal_bound<T>(int64_t);                                                                                                             \
    template void require_orthonormal<T>(int64_t, const double *, const char *, int64_t);                                                                      \
    template void require_tangent<T>(int64_t, const double *, const double *, double, const char *, int64_t);                                                  \
    template void tangent_svd<T>(MatrixView<const T>, MatrixView<T>, double *, double *, double *);                                                            \
    template double log_factor<T>(int64_t, const double *, double *);                                                                                          \
    template void tidy<T>(MatrixView<T>);                                                                                                                      \
    template void step<T>(const Step<T> &);
SUBSPAN_INSTANTIATE(float)
SUBSPAN_INSTANTIATE(double)
#undef SUBSPAN_INSTANTIATE

} // namespace subspan::grassmann
