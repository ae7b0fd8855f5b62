#include "subspan/grassmann.hpp"

#include "linalg/apply_lanes.hpp"
#include "linalg/packed_gram.hpp"
#include "grassmann/point_step.hpp"
#include "base/amax.hpp"
#include "base/scratch.hpp"
#include "linalg/small_dense.hpp"
#include "subspan/apply_core.hpp"
#include "subspan/eigh.hpp"
#include "subspan/errors.hpp"
#include "subspan/orthonormalize.hpp"
#include "subspan/parallel.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <limits>
#include <string>

namespace subspan {
namespace {

using std::int64_t;

template <class T> void require_finite(int64_t k, const double *a, const char *name, int64_t item) {
    if (!std::isfinite(small::largest(k, a)))
        throw ValueError("matrix " + std::to_string(item) + " of " + name + " holds NaN or infinity, or squares of its entries overflow");
}

template <class T>
void tangent_one(MatrixView<const T> u, MatrixView<const T> g, MatrixView<T> out, Checks checks, int64_t item, const MatrixView<const T> *next, int next_count,
                 bool dry) {
    const int64_t k = u.cols, all = small::area(k);
    Frame frame;
    PackedBlock<T> packed(frame, u.rows, k, 2);
    const MatrixView<const T> operands[2] = {u, g};
    const bool check = checks != Checks::none;
    const unsigned wanted[2] = {check ? 3u : 2u, 0u};
    packed.ahead(next, next_count);
    packed.gram(operands, wanted);
    double *m = frame.take<double>(2 * all), *one = m + all;
    if (check) {
        packed.block(0, 0, m);
        grassmann::require_orthonormal<T>(k, m, "U", item);
    }
    packed.block(0, 1, m);
    if (check) require_finite<T>(k, m, "G", item);
    if (dry) return;
    for (int64_t i = 0; i < all; ++i) m[i] = -m[i];
    small::identity(k, one);
    const double *coefficients[2] = {m, one};
    packed.apply(operands, coefficients, out);
}

// Whether writing `out` changes one of the inputs.
template <class T> bool overwrites(const StackView<T> &out, std::initializer_list<const StackView<const T> *> inputs) {
    return std::any_of(inputs.begin(), inputs.end(), [&](const auto *x) { return x->first.data == out.first.data; });
}

// body(i, next, dry) for the whole stack; in place everything is checked before anything is written.
template <class F> void whole_or_not(int64_t items, Checks checks, bool in_place, const F &body) {
    if (in_place && checks != Checks::none && items > 1) grassmann::for_each(items, [&](int64_t i, int64_t next) { body(i, next, true); });
    grassmann::for_each(items, [&](int64_t i, int64_t next) { body(i, next, false); });
}

// v + U p + H q of the tangent v, for a geodesic of any length.
template <class T>
void transport_one(MatrixView<const T> u, MatrixView<const T> h, MatrixView<const T> v, double t, MatrixView<T> out, Checks checks, int64_t item,
                   const MatrixView<const T> *next, int next_count, bool dry) {
    const int64_t n = u.rows, k = u.cols, all = small::area(k);
    Frame frame;
    PackedBlock<T> packed(frame, n, k, 3);
    MatrixView<const T> operands[3] = {u, h, v};
    const unsigned wanted[3] = {7u, 6u, 4u};
    packed.ahead(next, next_count);
    packed.gram(operands, wanted);
    double *e = frame.take<double>(9 * all), *mh = e + all, *mv = e + 2 * all, *b = e + 3 * all, *hv = e + 4 * all;
    double *vv = e + 5 * all, *p = e + 6 * all, *q = e + 7 * all, *one = e + 8 * all;
    packed.block(0, 0, e);
    packed.block(0, 1, mh);
    packed.block(0, 2, mv);
    packed.block(1, 1, b);
    packed.block(1, 2, hv);
    packed.block(2, 2, vv);
    constexpr double eps = std::numeric_limits<T>::epsilon(), tiny = 1e3 * double(std::numeric_limits<T>::min()) / eps;
    const double size = small::row_norm(k, b);
    if ((size < tiny && t * t * tiny > 0.01 * eps) || !std::isfinite(size)) {
        // Squares of H underflow, and t makes something of them, or they overflow: H of unit size, and a longer way.
        const double top = double(max_abs<T>(h));
        if (!std::isfinite(top)) require_finite<T>(k, b, "H", item);
        if (top > 0) {
            int e2 = 0;
            std::frexp(top, &e2);
            const T one = T(std::ldexp(1.0, -(e2 / 2))), two = T(std::ldexp(1.0, -(e2 - e2 / 2)));
            const MatrixView<T> scaled(frame.take<T>(n * k), n, k);
            for (int64_t i = 0; i < n; ++i)
                for (int64_t j = 0; j < k; ++j) scaled(i, j) = h(i, j) * one * two;
            return transport_one<T>(u, scaled, v, std::clamp(std::ldexp(t, e2), -1e300, 1e300), out, checks, item, next, 0, dry);
        }
        t = 0.0;
    }
    require_finite<T>(k, b, "H", item);
    require_finite<T>(k, vv, "V", item);
    require_finite<T>(k, hv, "H or V", item);
    if (checks != Checks::none) grassmann::require_orthonormal<T>(k, e, "U", item);
    if (checks == Checks::points_and_tangents) {
        grassmann::require_tangent<T>(k, mh, b, t, "H", item);
        grassmann::require_tangent<T>(k, mv, vv, 1.0, "V", item);
    }
    if (dry) return;
    // Both without what they have along U: out = V⊥ + U p + H⊥ q with V⊥ = V - U mv, H⊥ = H - U mh.
    small::identity(k, one);
    Frame inner;
    double *x = inner.take<double>(all), *s = inner.take<double>(all), *versine = inner.take<double>(all), *w = inner.take<double>(all);
    const auto finish = [&](const double *along) {
        small::multiply(k, along, q, w);
        for (int64_t i = 0; i < all; ++i) p[i] -= mv[i] + w[i];
        const double *coefficients[3] = {p, q, one};
        packed.apply(operands, coefficients, out);
    };
    if (t == 0.0 || t * t * small::bound_of_norm(k, b) <= small::kEntire) {
        // QᵀV = s⁻¹ Rᵀ HᵀV for H = Q s Rᵀ, and both functions of s that multiply it are entire: no singular vectors.
        small::multiply_tn(k, mh, mh, w);
        for (int64_t i = 0; i < all; ++i) x[i] = t * t * (b[i] - w[i]);
        small::multiply_tn(k, mh, mv, w);
        for (int64_t i = 0; i < all; ++i) hv[i] -= w[i];
        small::trigonometric(k, x, sizeof(T) == 4 ? 1e-10 : 1e-19, nullptr, s, versine);
        small::multiply_tn(k, s, hv, p);
        small::multiply_tn(k, versine, hv, q);
        for (int64_t i = 0; i < all; ++i) {
            p[i] *= -t;
            q[i] *= -t * t;
        }
        return finish(mh);
    }
    const MatrixView<T> basis(inner.take<T>(n * k), n, k);
    double *values = inner.take<double>(k), *xt = inner.take<double>(all), *yt = inner.take<double>(all), *g = inner.take<double>(k);
    grassmann::tangent_svd<T>(h, basis, values, xt, yt);
    operands[1] = basis;
    packed.gram(operands, wanted);
    packed.block(0, 1, mh);
    packed.block(1, 2, hv);
    small::multiply_tn(k, mh, mv, w);
    for (int64_t i = 0; i < all; ++i) hv[i] -= w[i];
    const auto angle = [&](int64_t i) { return std::clamp(t * values[i], -1e100, 1e100); };
    // H = (basis x) s yᵀ: out = V + (U y (-sin) + basis x (cos - 1)) xᵀ basisᵀV.
    for (int64_t i = 0; i < k; ++i) g[i] = -std::sin(angle(i));
    grassmann::compose(k, yt, g, xt, s);
    for (int64_t i = 0; i < k; ++i) g[i] = -2.0 * std::sin(0.5 * angle(i)) * std::sin(0.5 * angle(i));
    grassmann::compose(k, xt, g, xt, x);
    small::multiply(k, s, hv, p);
    small::multiply(k, x, hv, q);
    finish(mh);
}

// Δ = (W - U M) y (θ / sin θ) xᵀ of M = UᵀW = x cos(θ) yᵀ. θ / sin θ is a smooth function of the cosine, down to zero,
// so nothing cancels beside the projection itself.
template <class T>
void log_one(MatrixView<const T> u, MatrixView<const T> w, MatrixView<T> out, Checks checks, int64_t item, const MatrixView<const T> *next, int next_count,
             bool dry) {
    const int64_t n = u.rows, k = u.cols, all = small::area(k);
    Frame frame;
    PackedBlock<T> packed(frame, n, k, 2);
    const MatrixView<const T> operands[2] = {u, w};
    const unsigned wanted[2] = {3u, 2u};
    packed.ahead(next, next_count);
    packed.gram(operands, wanted);
    double *e = frame.take<double>(5 * all), *m = e + all, *b = e + 2 * all, *f = e + 3 * all, *p = e + 4 * all;
    packed.block(0, 0, e);
    packed.block(0, 1, m);
    packed.block(1, 1, b);
    require_finite<T>(k, e, "U", item);
    require_finite<T>(k, b, "W", item);
    require_finite<T>(k, m, "U or W", item);
    if (checks != Checks::none) {
        grassmann::require_orthonormal<T>(k, e, "U", item);
        grassmann::require_orthonormal<T>(k, b, "W", item);
    }
    if (dry) return;
    grassmann::log_factor<T>(k, m, f);
    small::multiply(k, m, f, p);
    for (int64_t i = 0; i < all; ++i) p[i] = -p[i];
    const double *coefficients[2] = {p, f};
    packed.apply(operands, coefficients, out);
}

template <class T>
void hessian_one(MatrixView<const T> u, MatrixView<const T> g, MatrixView<const T> eh, MatrixView<const T> h, MatrixView<T> out, Checks checks, int64_t item) {
    const int64_t n = u.rows, k = u.cols, all = small::area(k);
    Frame frame;
    PackedBlock<T> packed(frame, n, k, 4);
    const MatrixView<const T> operands[4] = {u, g, eh, h};
    const unsigned wanted[4] = {15u, 2u, 4u, 8u};
    packed.gram(operands, wanted);
    double *e = frame.take<double>(7 * all), *ug = e + all, *ue = e + 2 * all, *uh = e + 3 * all, *hh = e + 4 * all, *p = e + 5 * all;
    double *one = e + 6 * all;
    packed.block(1, 1, one);
    require_finite<T>(k, one, "egrad", item);
    packed.block(2, 2, one);
    require_finite<T>(k, one, "ehess", item);
    packed.block(3, 3, hh);
    require_finite<T>(k, hh, "H", item);
    packed.block(0, 0, e);
    packed.block(0, 1, ug);
    packed.block(0, 2, ue);
    packed.block(0, 3, uh);
    if (checks != Checks::none) grassmann::require_orthonormal<T>(k, e, "U", item);
    if (checks == Checks::points_and_tangents) grassmann::require_tangent<T>(k, uh, hh, 1.0, "H", item);
    // (I - UUᵀ)(E - H N) with N = Uᵀ egrad.
    small::multiply(k, uh, ug, p);
    for (int64_t i = 0; i < all; ++i) {
        p[i] -= ue[i];
        ug[i] = -ug[i];
    }
    small::identity(k, one);
    const double *coefficients[4] = {p, nullptr, one, ug};
    packed.apply(operands, coefficients, out);
}

} // namespace

template <class T> void tangent(const StackView<const T> &u, const StackView<const T> &g, const StackView<T> &out, Checks checks) {
    grassmann::check_shape(u.rows(), u.cols());
    grassmann::check_same<T>(u, g, "g");
    grassmann::check_same<T>(u, out, "out");
    if (u.cols() == 0 || u.rows() == 0) return;
    // A projection, unless U is looked at, which takes its Gram matrix: then a packed class is read once for both. Four columns that
    // are no tiny stack are faster packed, too.
    const bool tiny = simd::lanes_pay<T>(u.size(), u.rows(), u.cols(), u.cols(), true);
    if (checks == Checks::none && (u.cols() > 4 || tiny)) return apply_core<T>(g, Basis<T>(u), Core<T>(T(-1)), T(1), Side::left, out, false);
    whole_or_not(u.size(), checks, overwrites(out, {&g}), [&](int64_t i, int64_t next, bool dry) {
        const MatrixView<const T> ahead[3] = {u[next], g[next], MatrixView<const T>(out[next])};
        tangent_one<T>(u[i], g[i], out[i], checks, i, ahead, next > i ? 3 : 0, dry);
    });
}

template <class T> void retract(const StackView<const T> &u, const StackView<const T> &h, double t, Retraction method, const StackView<T> &out, Checks checks) {
    grassmann::check_shape(u.rows(), u.cols());
    grassmann::check_same<T>(u, h, "h");
    grassmann::check_same<T>(u, out, "out");
    if (!std::isfinite(t)) throw ValueError("t must be finite");
    if (u.cols() == 0 || u.rows() == 0) return;
    whole_or_not(u.size(), checks, overwrites(out, {&u, &h}), [&](int64_t i, int64_t next, bool dry) {
        const MatrixView<const T> ahead[3] = {u[next], h[next], MatrixView<const T>(out[next])}; // what is written too
        grassmann::Step<T> s{u[i], h[i], t, method, out[i]};
        s.checks = checks;
        s.item = i;
        s.next = ahead;
        s.next_count = next > i ? 3 : 0;
        s.dry = dry;
        grassmann::step<T>(s);
    });
}

template <class T>
void parallel_transport(const StackView<const T> &u, const StackView<const T> &h, const StackView<const T> &v, double t, const StackView<T> &out,
                        Checks checks) {
    grassmann::check_shape(u.rows(), u.cols());
    grassmann::check_same<T>(u, h, "h");
    grassmann::check_same<T>(u, v, "v");
    grassmann::check_same<T>(u, out, "out");
    if (!std::isfinite(t)) throw ValueError("t must be finite");
    if (u.cols() == 0 || u.rows() == 0) return;
    whole_or_not(u.size(), checks, overwrites(out, {&v}), [&](int64_t i, int64_t next, bool dry) {
        const MatrixView<const T> ahead[3] = {u[next], h[next], v[next]};
        transport_one<T>(u[i], h[i], v[i], t, out[i], checks, i, ahead, next > i ? 3 : 0, dry);
    });
}

template <class T> void grassmann_log(const StackView<const T> &u, const StackView<const T> &w, const StackView<T> &out, Checks checks) {
    grassmann::check_shape(u.rows(), u.cols());
    grassmann::check_same<T>(u, w, "w");
    grassmann::check_same<T>(u, out, "out");
    if (u.cols() == 0 || u.rows() == 0) return;
    whole_or_not(u.size(), checks, overwrites(out, {&w}), [&](int64_t i, int64_t next, bool dry) {
        const MatrixView<const T> ahead[3] = {u[next], w[next], MatrixView<const T>(out[next])};
        log_one<T>(u[i], w[i], out[i], checks, i, ahead, next > i ? 3 : 0, dry);
    });
}

template <class T>
void riemannian_hessian(const StackView<const T> &u, const StackView<const T> &egrad, const StackView<const T> &ehess, const StackView<const T> &h,
                        const StackView<T> &out, Checks checks) {
    grassmann::check_shape(u.rows(), u.cols());
    grassmann::check_same<T>(u, egrad, "egrad");
    grassmann::check_same<T>(u, ehess, "ehess");
    grassmann::check_same<T>(u, h, "h");
    grassmann::check_same<T>(u, out, "out");
    if (u.cols() == 0 || u.rows() == 0) return;
    grassmann::for_each(u.size(), [&](int64_t i, int64_t) { hessian_one<T>(u[i], egrad[i], ehess[i], h[i], out[i], checks, i); });
}

template <class T> void projector_range(const StackView<const T> &p, const StackView<T> &out, bool check) {
    const int64_t n = out.rows(), k = out.cols();
    if (p.rows() != n || p.cols() != n || p.size() != out.size() || k > n)
        throw ValueError("p must hold as many " + std::to_string(n) + " x " + std::to_string(n) + " matrices as out holds bases");
    if (n == 0) return;
    parallel_for(p.size(), [&](int64_t item) {
        const auto from = p[item];
        const auto to = out[item];
        Frame frame;
        double *g = frame.take<double>(n * n), *values = frame.take<double>(n), *all = frame.take<double>(n), *vectors = frame.take<double>(k * n);
        double poison = 0; // x - x is zero or NaN
        for (int64_t i = 0; i < n; ++i)
            for (int64_t j = 0; j <= i; ++j) {
                const double x = 0.5 * double(from(i, j)) + 0.5 * double(from(j, i)); // whose sum may overflow
                g[i * n + j] = x;
                poison += x - x;
            }
        if (poison != 0.0) throw ValueError("P holds NaN or infinity");
        eigh_top<double>(n, k, g, values, vectors, all);
        if (check) {
            double off = 0;
            for (int64_t i = 0; i < n; ++i) off = std::max(off, std::abs(all[i] - (i < n - k ? 0.0 : 1.0)));
            if (off > std::sqrt(double(std::numeric_limits<T>::epsilon()))) {
                char text[32];
                std::snprintf(text, sizeof text, "%.1e", off);
                throw ValueError("P is no orthogonal projector of rank " + std::to_string(k) + ": an eigenvalue is off by " + text + "; or pass check=False");
            }
        }
        for (int64_t i = 0; i < n; ++i)
            for (int64_t j = 0; j < k; ++j) to(i, j) = T(vectors[(k - 1 - j) * n + i]);
    });
    orthonormalize<T>(out, out, Orthonormalization::automatic, true);
}

#define SUBSPAN_INSTANTIATE(T)                                                                                                                                 \
    template void tangent<T>(const StackView<const T> &, const StackView<const T> &, const StackView<T> &, Checks);                                            \
    template void retract<T>(const StackView<const T> &, const StackView<const T> &, double, Retraction, const StackView<T> &, Checks);                        \
    template void parallel_transport<T>(const StackView<const T> &, const StackView<const T> &, const StackView<const T> &, double, const StackView<T> &,      \
                                        Checks);                                                                                                               \
    template void grassmann_log<T>(const StackView<const T> &, const StackView<const T> &, const StackView<T> &, Checks);                                      \
    template void riemannian_hessian<T>(const StackView<const T> &, const StackView<const T> &, const StackView<const T> &, const StackView<const T> &,        \
                                        const StackView<T> &, Checks);                                                                                         \
    template void projector_range<T>(const StackView<const T> &, const StackView<T> &, bool);
SUBSPAN_INSTANTIATE(float)
SUBSPAN_INSTANTIATE(double)
#undef SUBSPAN_INSTANTIATE

} // namespace subspan
