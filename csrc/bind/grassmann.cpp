#include "subspan/grassmann.hpp"
#include "host.hpp"
#include "points.hpp"
#include "register.hpp"
#include "subspan/grassmann_logits.hpp"
#include "subspan/grassmann_mean.hpp"
#include "subspan/grassmann_pairwise.hpp"
#include "subspan/grassmann_steps.hpp"
#include "subspan/product.hpp"
#include "subspan/orthonormalize.hpp"
#include "subspan/principal_angles.hpp"

#include <pybind11/functional.h>

namespace subspan::bind {
namespace {

// f(out) of a map whose output may be `input`; about `factor` n k² flops a matrix.
template <class T, class F> void in_place_map(const StackView<T> &out, const StackView<const T> &input, double factor, F &&f) {
    const double k = double(out.cols()), flops = factor * double(out.size()) * double(out.rows()) * k * k;
    whole<T>(out, out.first.data == input.first.data, flops, f);
}

Checks checks_of(py::handle check, Checks what) { return truth(check, "check") ? what : Checks::none; }

py::object tangent(py::handle context, py::handle u, py::handle g, const py::object &out, py::handle check) {
    const Call call(context);
    load_lapack();
    const Points x(call, {{"U", u}, {"G", g}});
    const Checks checks = checks_of(check, Checks::points);
    const Array xo = x.output(call, out);
    check_no_overlap(xo, x[0]);
    check_no_overlap(xo, x[1], true);
    dispatch(x.dtype(), [&](auto s) {
        using T = decltype(s);
        const auto vu = x[0].stack<const T>(x.batch), vg = x[1].stack<const T>(x.batch);
        const auto vo = xo.stack<T>(x.batch);
        const py::gil_scoped_release release;
        in_place_map<T>(vo, vg, 6.0, [&](const StackView<T> &to) { subspan::tangent<T>(vu, vg, to, checks); });
        require_no_overflow<T>(vo, "the tangent part", {vu, vg});
    });
    xo.written();
    return xo.object();
}

// What normal numbers (float64) have outside of U, at unit length.
py::object random_tangent(py::handle context, py::handle u, py::handle noise) {
    const Call call(context);
    load_lapack();
    const Points x(call, {{"U", u}});
    const Array given(noise, "noise"), xo = call.empty(x[0].shape(), x.dtype());
    dispatch(x.dtype(), [&](auto s) {
        using T = decltype(s);
        const auto from = given.stack<const double>(x.batch);
        const auto vu = x[0].stack<const T>(x.batch);
        const auto vo = xo.stack<T>(x.batch);
        const py::gil_scoped_release release;
        if (vo.empty()) return;
        const bool point = x.rows() == x.cols(); // whose only tangent is zero
        parallel_for(vo.size(), [&](std::int64_t i) {
            const auto source = from[i];
            const auto to = vo[i];
            for (std::int64_t r = 0; r < to.rows; ++r)
                for (std::int64_t c = 0; c < to.cols; ++c) to(r, c) = point ? T(0) : T(source(r, c));
        });
        if (point) return;
        // Where n - k is small little may be left, and what that still has along U comes off at unit length.
        for (int round = 0; round < 2; ++round) {
            subspan::tangent<T>(vu, vo, vo, round == 0 ? Checks::points : Checks::none);
            parallel_for(vo.size(), [&](std::int64_t i) {
                const auto h = vo[i];
                double sum = 0;
                for (std::int64_t r = 0; r < h.rows; ++r)
                    for (std::int64_t c = 0; c < h.cols; ++c) sum += double(h(r, c)) * double(h(r, c));
                const double shorter = 1.0 / std::sqrt(sum);
                for (std::int64_t r = 0; r < h.rows; ++r)
                    for (std::int64_t c = 0; c < h.cols; ++c) h(r, c) = T(double(h(r, c)) * shorter);
            });
        }
    });
    return xo.object();
}

py::object hessian(py::handle context, py::handle u, py::handle egrad, py::handle ehess, py::handle h, const py::object &out, py::handle check) {
    const Call call(context);
    const Points x(call, {{"U", u}, {"egrad", egrad}, {"ehess", ehess}, {"H", h}});
    const Checks checks = checks_of(check, Checks::points_and_tangents);
    const Array xo = x.output(call, out);
    for (std::size_t i = 0; i < 4; ++i) check_no_overlap(xo, x[i]);
    dispatch(x.dtype(), [&](auto s) {
        using T = decltype(s);
        const auto vu = x[0].stack<const T>(x.batch), vg = x[1].stack<const T>(x.batch), ve = x[2].stack<const T>(x.batch);
        const auto vh = x[3].stack<const T>(x.batch);
        const auto vo = xo.stack<T>(x.batch);
        const py::gil_scoped_release release;
        subspan::riemannian_hessian<T>(vu, vg, ve, vh, vo, checks);
    });
    xo.written();
    return xo.object();
}

py::object retract(py::handle context, py::handle u, py::handle h, py::handle t, py::handle method, py::handle project, const py::object &out,
                   py::handle check) {
    const Call call(context);
    load_lapack();
    const Retraction how = retraction_of(method, "method");
    const Checks checks = checks_of(check, truth(project, "project") ? Checks::points : Checks::points_and_tangents);
    const Points x(call, {{"U", u}, {"H", h}});
    const double time = real(t, "t");
    const Array xo = x.output(call, out);
    check_no_overlap(xo, x[0], true);
    check_no_overlap(xo, x[1], true);
    dispatch(x.dtype(), [&](auto s) {
        using T = decltype(s);
        const auto vu = x[0].stack<const T>(x.batch), vh = x[1].stack<const T>(x.batch);
        const auto vo = xo.stack<T>(x.batch);
        const py::gil_scoped_release release;
        in_place_map<T>(vo, vo.first.data == vu.first.data ? vu : vh, 10.0,
                        [&](const StackView<T> &to) { subspan::retract<T>(vu, vh, time, how, to, checks); });
        require_no_overflow<T>(vo, "the point", {vu, vh});
    });
    xo.written();
    return xo.object();
}

py::object log(py::handle context, py::handle u, py::handle w, const py::object &out, py::handle check) {
    const Call call(context);
    load_lapack();
    const Points x(call, {{"U", u}, {"W", w}});
    const Checks checks = checks_of(check, Checks::points);
    const Array xo = x.output(call, out);
    check_no_overlap(xo, x[0]);
    check_no_overlap(xo, x[1], true);
    dispatch(x.dtype(), [&](auto s) {
        using T = decltype(s);
        const auto vu = x[0].stack<const T>(x.batch), vw = x[1].stack<const T>(x.batch);
        const auto vo = xo.stack<T>(x.batch);
        const py::gil_scoped_release release;
        in_place_map<T>(vo, vw, 12.0, [&](const StackView<T> &to) { subspan::grassmann_log<T>(vu, vw, to, checks); });
        require_no_overflow<T>(vo, "the logarithm", {vu, vw});
    });
    xo.written();
    return xo.object();
}

py::object transport(py::handle context, py::handle u, py::handle h, py::handle v, py::handle t, const py::object &out, py::handle check) {
    const Call call(context);
    load_lapack();
    const Points x(call, {{"U", u}, {"H", h}, {"V", v}});
    const Checks checks = checks_of(check, Checks::points_and_tangents);
    const double time = real(t, "t");
    const Array xo = x.output(call, out);
    check_no_overlap(xo, x[0]);
    check_no_overlap(xo, x[1]);
    check_no_overlap(xo, x[2], true);
    dispatch(x.dtype(), [&](auto s) {
        using T = decltype(s);
        const auto vu = x[0].stack<const T>(x.batch), vh = x[1].stack<const T>(x.batch), vv = x[2].stack<const T>(x.batch);
        const auto vo = xo.stack<T>(x.batch);
        const py::gil_scoped_release release;
        in_place_map<T>(vo, vv, 15.0, [&](const StackView<T> &to) { subspan::parallel_transport<T>(vu, vh, vv, time, to, checks); });
        require_no_overflow<T>(vo, "the transported tangent", {vu, vh, vv});
    });
    xo.written();
    return xo.object();
}

// Along the shortest geodesic to the given point, and rotated to its basis.
py::object transport_to(py::handle context, py::handle u, py::handle w, py::handle v, const py::object &out, py::handle check) {
    const Call call(context);
    load_lapack();
    const Points x(call, {{"U", u}, {"W", w}, {"V", v}});
    const bool looks = truth(check, "check");
    const Array xo = x.output(call, out);
    check_no_overlap(xo, x[0]);
    check_no_overlap(xo, x[1]);
    check_no_overlap(xo, x[2], true);
    dispatch(x.dtype(), [&](auto s) {
        using T = decltype(s);
        const auto vu = x[0].stack<const T>(x.batch), vw = x[1].stack<const T>(x.batch), vv = x[2].stack<const T>(x.batch);
        const auto vo = xo.stack<T>(x.batch);
        const py::gil_scoped_release release;
        const std::int64_t n = x.rows(), k = x.cols();
        const Temporary<T> h(x.batch, n, k), there(x.batch, n, k), moved(x.batch, n, k), between(x.batch, k, k);
        subspan::grassmann_log<T>(vu, vw, h.stack, looks ? Checks::points : Checks::none);
        subspan::retract<T>(vu, h.stack, 1.0, Retraction::exp, there.stack, Checks::none);
        subspan::parallel_transport<T>(vu, h.stack, vv, 1.0, moved.stack, looks ? Checks::points_and_tangents : Checks::none);
        subspan::product<T>(StackView<const T>(there.stack).transposed(), vw, between.stack); // orthogonal as it is: two bases of one span
        const Shielded shielded;
        if (vo.first.col_stride == 1 || k <= 1) {
            subspan::product<T>(moved.stack, between.stack, vo);
        } else {
            subspan::product<T>(moved.stack, between.stack, there.stack);
            copy_stack<T>(there.stack, vo);
        }
        require_no_overflow<T>(vo, "the transported tangent", {vu, vw, vv});
    });
    xo.written();
    return xo.object();
}

py::object from_projector(py::handle context, py::handle p, py::handle k, py::handle check) {
    const Call call(context);
    load_lapack();
    const Array x(call, p, "P");
    x.require_matrices();
    require_float32_or_64(x, ": points do not stay orthonormal in 16 bits");
    if (x.rows() != x.cols()) throw py::value_error("P must hold square matrices, got shape " + x.shape_text() + convolution_hint(x.shape(), "P"));
    const std::int64_t rank = whole_number(k, "k", 0, x.rows());
    const bool looks = truth(check, "check");
    Shape shape = x.leading();
    shape.insert(shape.end(), {x.rows(), rank});
    const Array xo = call.empty(shape, x.dtype());
    dispatch(x.dtype(), [&](auto s) {
        using T = decltype(s);
        const auto vp = x.stack<const T>(x.leading());
        const auto vo = xo.stack<T>(x.leading());
        const py::gil_scoped_release release;
        subspan::projector_range<T>(vp, vo, looks);
    });
    return xo.object();
}

py::object metric(py::handle context, py::handle u, py::handle h, py::handle v, const char *what) {
    const Call call(context);
    const Points x = v.is_none() ? Points(call, {{"U", u}, {"H", h}}) : Points(call, {{"U", u}, {"H", h}, {"V", v}});
    Array xo = call.empty(x.batch, x.dtype());
    const py::object made = xo.object();
    xo.add_axis(true);
    xo.add_axis(true);
    dispatch(x.dtype(), [&](auto s) {
        using T = decltype(s);
        const auto vh = x[1].stack<const T>(x.batch), vv = v.is_none() ? vh : x[2].stack<const T>(x.batch);
        const auto vo = xo.stack<T>(x.batch);
        const py::gil_scoped_release release;
        if (v.is_none())
            subspan::tangent_norm<T>(vh, vo);
        else
            subspan::tangent_inner<T>(vh, vv, vo);
        require_no_overflow<T>(vo, what, {vh, vv});
    });
    return made;
}

// Two spaces of different dimension as two of the smaller one: that one, and the part of the larger that is nearest to it. With
// WᵀU = X cos(Θ) Yᵀ that is the span of W X: its angles to U are those of W. Where an angle is π/2 X is completed, and any
// direction does.
template <class T> struct Pair {
    StackView<const T> u, w;
    std::optional<Temporary<T>> near;
    Pair(const StackView<const T> &a, const StackView<const T> &b) : u(a), w(b) {
        if (a.cols() == b.cols()) return;
        const bool first = a.cols() < b.cols();
        const auto &small = first ? a : b, &large = first ? b : a;
        Temporary<T> x(a.shape, large.cols(), small.cols());
        subspan::product<T>(large.transposed(), small, x.stack);
        subspan::orthonormalize<T>(x.stack, x.stack, Orthonormalization::automatic, true, nullptr);
        near.emplace(a.shape, large.rows(), small.cols());
        subspan::product<T>(large, x.stack, near->stack);
        (first ? w : u) = near->stack;
    }
};

struct TwoSpaces {
    Array u, w;
    Shape batch;
    bool equal;
    TwoSpaces(const Call &call, py::handle a, py::handle b) : u(call, a, "U"), w(call, b, "W") {
        for (const Array *x : {&u, &w}) x->require_matrices();
        require_float32_or_64(u);
        w.require_dtype_of(u);
        if (w.rows() != u.rows())
            throw py::value_error("W must hold matrices of the shape that U holds, " + shape_text({u.rows(), u.cols()}) + ", got shape " + w.shape_text() +
                                  convolution_hint(w.shape(), "W"));
        for (const Array *x : {&u, &w}) require_tall(*x);
        equal = u.cols() == w.cols();
        batch = broadcast_leading({{&u, 2}, {&w, 2}});
    }
    // Of one dimension kernels look themselves.
    template <class T> void check(bool looks) const {
        if (equal || !looks) return;
        check_basis<T>(u.stack<const T>(u.leading()), "U");
        check_basis<T>(w.stack<const T>(w.leading()), "W");
    }
};

py::object principal_angles(py::handle context, py::handle u, py::handle w, py::handle vectors, py::handle check) {
    const Call call(context);
    load_lapack();
    const TwoSpaces x(call, u, w);
    const bool looks = truth(check, "check"), wanted = truth(vectors, "vectors");
    const std::int64_t n = x.u.rows(), k = std::min(x.u.cols(), x.w.cols());
    const auto make = [&](std::initializer_list<std::int64_t> more) {
        Shape shape = x.batch;
        shape.insert(shape.end(), more);
        return call.empty(shape, x.u.dtype());
    };
    const Array angles = make({k});
    std::optional<Array> p, q;
    if (wanted) {
        p.emplace(make({n, k}));
        q.emplace(make({n, k}));
    }
    dispatch(x.u.dtype(), [&](auto s) {
        using T = decltype(s);
        const auto va = angles.row_stack<T>(x.batch);
        StackView<T> vp, vq;
        if (p) {
            vp = p->stack<T>(x.batch);
            vq = q->stack<T>(x.batch);
        }
        const auto vu = x.u.stack<const T>(x.batch), vw = x.w.stack<const T>(x.batch);
        const py::gil_scoped_release release;
        x.check<T>(looks);
        const Pair<T> pair(vu, vw);
        subspan::principal_angles<T>(pair.u, pair.w, va, p ? &vp : nullptr, q ? &vq : nullptr, looks ? Checks::points : Checks::none);
    });
    if (!wanted) return angles.object();
    return py::make_tuple(angles.object(), p->object(), q->object());
}

// A distance with so many more angles of π/2.
double with_right_angles(double d, std::int64_t count, Distance kind) {
    constexpr double pi = 3.14159265358979323846;
    switch (kind) {
    case Distance::projection:
    case Distance::binet_cauchy: return 1.0;
    case Distance::fubini_study: return pi / 2;
    case Distance::geodesic: return std::sqrt(d * d + double(count) * pi * pi / 4);
    case Distance::chordal: return std::sqrt(d * d + double(count));
    default: return std::sqrt(d * d + 2 * double(count));
    }
}

template <class T> void add_right_angles(const StackView<T> &d, std::int64_t count, Distance kind) {
    parallel_for(d.size(), [&](std::int64_t i) {
        const auto x = d[i];
        for (std::int64_t r = 0; r < x.rows; ++r)
            for (std::int64_t c = 0; c < x.cols; ++c) x(r, c) = T(with_right_angles(double(x(r, c)), count, kind));
    });
}

bool is_metric(py::handle unequal) { return choice(unequal, "unequal", {"containment", "metric"}) == 1; }

py::object distance(py::handle context, py::handle u, py::handle w, py::handle kind, py::handle unequal, py::handle check) {
    const Call call(context);
    load_lapack();
    const Distance which = distance_of(kind);
    const bool metric = is_metric(unequal), looks = truth(check, "check");
    const TwoSpaces x(call, u, w);
    Array xo = call.empty(x.batch, x.u.dtype());
    xo.add_axis(true);
    xo.add_axis(true);
    dispatch(x.u.dtype(), [&](auto s) {
        using T = decltype(s);
        const auto vu = x.u.stack<const T>(x.batch), vw = x.w.stack<const T>(x.batch);
        const auto vo = xo.stack<T>(x.batch);
        const py::gil_scoped_release release;
        x.check<T>(looks);
        const Pair<T> pair(vu, vw);
        subspan::subspace_distance<T>(pair.u, pair.w, which, vo, looks ? Checks::points : Checks::none);
        if (metric && !x.equal) add_right_angles<T>(vo, std::abs(x.u.cols() - x.w.cols()), which);
    });
    return xo.object();
}

// Those of all pairs; w none: of u with itself.
py::object pairwise(py::handle context, py::handle u, py::handle w, py::handle kind, py::handle unequal, py::handle check) {
    const Call call(context);
    load_lapack();
    const Distance which = distance_of(kind);
    const bool metric = is_metric(unequal), looks = truth(check, "check"), symmetric = w.is_none();
    const Array xu(call, u, "U");
    std::optional<Array> other;
    if (!symmetric) {
        other.emplace(call, w, "W");
        other->require_dtype_of(xu);
    }
    const Array &xw = symmetric ? xu : *other;
    for (const Array *x : {&xu, &xw}) {
        if (x->ndim() != 3) throw py::value_error(std::string(x->name()) + " must have shape (number, n, k), got " + x->shape_text());
        require_tall(*x);
        if (x->rows() != xu.rows())
            throw py::value_error("U and W must live in one space, got " + std::to_string(xu.rows()) + " and " + std::to_string(x->rows()) + " rows");
    }
    const std::int64_t count = xu.shape(0), others = xw.shape(0), more = metric ? std::abs(xu.cols() - xw.cols()) : 0;
    const Array out = call.empty({count, others}, xu.dtype());
    dispatch(xu.dtype(), [&](auto s) {
        using T = decltype(s);
        const auto vu = xu.stack<const T>({count}), vw = xw.stack<const T>({others});
        const auto d = out.matrix<T>();
        const py::gil_scoped_release release;
        if (looks) {
            check_basis<T>(vu, "U");
            if (!symmetric) check_basis<T>(vw, "W");
        }
        // Distances of u[i] to the w[j] from `first` on.
        const auto row = [&](std::int64_t i, std::int64_t first, MatrixView<T> to) {
            const std::int64_t n = others - first;
            if (n == 0) return;
            const StackView<const T> a(vu[i], {n}, {0}), b(vw[first], {n}, {vw.strides[0]});
            const Pair<T> pair(a, b);
            subspan::subspace_distance<T>(pair.u, pair.w, which, StackView<T>(MatrixView<T>(to.data, 1, 1), {n}, {to.col_stride}), Checks::none);
        };
        if (which == Distance::chordal || which == Distance::projection) {
            const auto close = subspan::pairwise_distance<T>(vu, vw, which, symmetric, d);
            // A strip of pairs at a time, side by side.
            const std::int64_t n = vu.rows(), k = vu.cols(), l = vw.cols(), pairs = std::int64_t(close.size());
            const std::int64_t strip = std::max<std::int64_t>(1, (std::int64_t(1) << 18) / std::max<std::int64_t>(1, n * (k + l)));
            for (std::int64_t begin = 0; begin < pairs; begin += strip) {
                const std::int64_t some = std::min(strip, pairs - begin);
                const Temporary<T> a({some}, n, k), b({some}, n, l), found({some}, 1, 1);
                parallel_for(some, [&](std::int64_t p) {
                    const auto &[i, j] = close[std::size_t(begin + p)];
                    const auto copy = [](MatrixView<const T> from, MatrixView<T> to) {
                        for (std::int64_t r = 0; r < to.rows; ++r)
                            for (std::int64_t c = 0; c < to.cols; ++c) to(r, c) = from(r, c);
                    };
                    copy(vu[i], a.stack[p]);
                    copy(vw[j], b.stack[p]);
                });
                const Pair<T> pair(a.stack, b.stack);
                subspan::subspace_distance<T>(pair.u, pair.w, which, found.stack, Checks::none);
                for (std::int64_t p = 0; p < some; ++p) {
                    const auto &[i, j] = close[std::size_t(begin + p)];
                    d(i, j) = found.items[std::size_t(p)];
                    if (symmetric) d(j, i) = d(i, j);
                }
            }
        } else {
            for (std::int64_t i = 0; i < count; ++i) {
                if (!symmetric) {
                    row(i, 0, d.block_rows(i, 1));
                    continue;
                }
                d(i, i) = T(0);
                row(i, i + 1, d.block_rows(i, 1).block_cols(i + 1, others - i - 1));
                for (std::int64_t j = i + 1; j < others; ++j) d(j, i) = d(i, j);
            }
        }
        if (more > 0) add_right_angles<T>(StackView<T>(d), more, which);
    });
    return out.object();
}

py::tuple mean(py::handle context, py::handle u, const py::object &weights, const py::object &initial, py::handle tol, py::handle max_iterations,
               const py::object &progress, const py::object &out, py::handle check) {
    const Call call(context);
    load_lapack();
    const Checks checks = checks_of(check, Checks::points);
    const MeanArguments x(call, u, weights, initial, tol, max_iterations, progress, out);
    std::vector<MeanReport> reports(static_cast<std::size_t>(x.means));
    const auto hear = [&](std::int64_t which, const MeanReport &r) {
        const py::gil_scoped_acquire acquire;
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
        if (!progress.is_none()) progress(which, r.iterations, r.gradient_norm, r.variance);
        return true;
    };
    dispatch(x.u.dtype(), [&](auto s) {
        using T = decltype(s);
        const auto vu = x.u.stack<const T>(x.u.leading());
        const auto vo = x.out.stack<T>(x.batch);
        StackView<const T> vi;
        if (x.initial) vi = x.initial->stack<const T>(x.batch);
        const py::gil_scoped_release release;
        subspan::grassmann_mean<T>(vu, x.weights.empty() ? nullptr : x.weights.data(), x.initial ? &vi : nullptr, x.tolerance, x.limit, vo, reports.data(),
                                   checks, hear);
    });
    std::vector<MeanFigures> figures;
    for (const auto &r : reports) figures.push_back({r.gradient_norm, r.variance, r.iterations, r.converged});
    return x.result(figures);
}

void sgd_step(py::handle context, py::handle u, py::handle grad, py::handle buffer, py::handle lr, py::handle momentum, py::handle dampening,
              py::handle retraction, py::handle transport, py::handle maximize, py::handle check) {
    const Call call(context);
    load_lapack();
    const SgdSettings o(lr, momentum, dampening, retraction, transport, maximize, check, !buffer.is_none());
    const StepArguments x(call, u, grad, "buffer", buffer);
    const Shape batch = x.u.leading();
    dispatch(x.u.dtype(), [&](auto s) {
        using T = decltype(s);
        const auto vu = x.u.stack<T>(batch);
        const auto vg = x.grad.stack<const T>(batch);
        std::vector<StackView<T>> changed{vu};
        if (x.moment) changed.push_back(x.moment->stack<T>(batch));
        const py::gil_scoped_release release;
        whole_step<T>(changed, 8.0 * double(vu.size()) * double(vu.rows()) * double(vu.cols()) * double(vu.cols()), [&](const std::vector<StackView<T>> &to) {
            subspan::sgd_step<T>(to[0], vg, x.moment ? &to[1] : nullptr, o.momentum, o.dampening, o.options);
        });
    });
    if (x.moment) x.moment->written();
    x.u.written();
}

void adam_step(py::handle context, py::handle u, py::handle grad, py::handle first, py::handle second, py::handle step, py::handle lr, py::handle betas,
               py::handle eps, py::handle retraction, py::handle transport, py::handle maximize, py::handle check) {
    const Call call(context);
    load_lapack();
    const AdamSettings o(step, lr, betas, eps, retraction, transport, maximize, check);
    const StepArguments x(call, u, grad, "first_moment", first);
    Array xv(call, second, "second_moment", Access::in_place);
    x.check_second(xv);
    xv.add_axis(true);
    xv.add_axis(true);
    const Shape batch = x.u.leading();
    dispatch(x.u.dtype(), [&](auto s) {
        using T = decltype(s);
        const auto vu = x.u.stack<T>(batch), vm = x.moment->stack<T>(batch), vv = xv.stack<T>(batch);
        const auto vg = x.grad.stack<const T>(batch);
        const py::gil_scoped_release release;
        whole_step<T>({vu, vm, vv}, 17.0 * double(vu.size()) * double(vu.rows()) * double(vu.cols()) * double(vu.cols()),
                      [&](const std::vector<StackView<T>> &to) { subspan::adam_step<T>(to[0], vg, to[1], to[2], o.step, o.beta1, o.beta2, o.eps, o.options); });
    });
    x.moment->written();
    xv.written();
    x.u.written();
}

py::object logits(py::handle context, py::handle x, py::handle u, py::handle scale, py::handle projections) {
    const Call call(context);
    const double factor = real(scale, "scale");
    const Features f(call, x, u, py::none());
    const std::optional<Array> kept = f.projections(call, projections, Access::out);
    const Array xo = call.empty({f.x.shape(0), f.u.shape(0)}, f.x.dtype());
    dispatch(f.x.dtype(), [&](auto s) {
        using T = decltype(s);
        const auto vx = f.x.matrix<const T>();
        const auto vu = f.u.stack<const T>({f.u.shape(0)});
        const auto vo = xo.matrix<T>();
        const py::gil_scoped_release release;
        subspan::grassmann_logits<T>(vx, vu, factor, vo, kept ? static_cast<T *>(kept->contiguous()) : nullptr);
        require_no_overflow<T>(StackView<T>(vo), "a logit", {StackView<const T>(vx), vu});
    });
    if (kept) kept->written();
    return xo.object();
}

py::tuple logits_backward(py::handle context, py::handle grad, py::handle x, py::handle u, py::handle scale, py::handle projections) {
    const Call call(context);
    const double factor = real(scale, "scale");
    const Features f(call, x, u, grad);
    const std::optional<Array> kept = f.projections(call, projections, Access::read);
    const Array dx = call.empty(f.x.shape(), f.x.dtype(), "dx"), du = f.empty_like_u(call);
    dispatch(f.x.dtype(), [&](auto s) {
        using T = decltype(s);
        const auto vg = f.grad->matrix<const T>(), vx = f.x.matrix<const T>();
        const auto vu = f.u.stack<const T>({f.u.shape(0)});
        const auto vdx = dx.matrix<T>();
        const auto vdu = du.stack<T>({f.u.shape(0)});
        const py::gil_scoped_release release;
        subspan::grassmann_logits_backward<T>(vg, vx, vu, factor, vdx, vdu, kept ? static_cast<const T *>(kept->contiguous()) : nullptr);
        require_no_overflow<T>(StackView<T>(vdx), "the gradient of x", {StackView<const T>(vg), StackView<const T>(vx), vu});
        require_no_overflow<T>(vdu, "the gradient of U", {StackView<const T>(vg), StackView<const T>(vx), vu});
    });
    return py::make_tuple(dx.object(), du.object());
}

} // namespace

void register_grassmann(py::module_ &m) {
    using py::arg;
    m.def("tangent", &tangent, arg("call"), arg("U"), arg("G"), arg("out"), arg("check"));
    m.def("random_tangent", &random_tangent, arg("call"), arg("U"), arg("noise"));
    m.def("euclidean_to_riemannian_hessian", &hessian, arg("call"), arg("U"), arg("egrad"), arg("ehess"), arg("H"), arg("out"), arg("check"));
    m.def("retract", &retract, arg("call"), arg("U"), arg("H"), arg("t"), arg("method"), arg("project"), arg("out"), arg("check"));
    m.def("from_projector", &from_projector, arg("call"), arg("P"), arg("k"), arg("check"));
    m.def("log", &log, arg("call"), arg("U"), arg("W"), arg("out"), arg("check"));
    m.def("transport", &transport, arg("call"), arg("U"), arg("H"), arg("V"), arg("t"), arg("out"), arg("check"));
    m.def("transport_to", &transport_to, arg("call"), arg("U"), arg("W"), arg("V"), arg("out"), arg("check"));
    m.def(
        "inner", [](py::handle call, py::handle u, py::handle h, py::handle v) { return metric(call, u, h, v, "the inner product"); }, arg("call"), arg("U"),
        arg("H"), arg("V"));
    m.def("norm", [](py::handle call, py::handle u, py::handle h) { return metric(call, u, h, py::none(), "the norm"); }, arg("call"), arg("U"), arg("H"));
    m.def("principal_angles", &principal_angles, arg("call"), arg("U"), arg("W"), arg("vectors"), arg("check"));
    m.def("distance", &distance, arg("call"), arg("U"), arg("W"), arg("kind"), arg("unequal"), arg("check"));
    m.def("pairwise", &pairwise, arg("call"), arg("U"), arg("W"), arg("kind"), arg("unequal"), arg("check"));
    m.def("mean", &mean, arg("call"), arg("U"), arg("weights"), arg("initial"), arg("tol"), arg("max_iterations"), arg("progress"), arg("out"), arg("check"));
    m.def("sgd_step", &sgd_step, arg("call"), arg("U"), arg("grad"), arg("buffer"), arg("lr"), arg("momentum"), arg("dampening"), arg("retraction"),
          arg("transport"), arg("maximize"), arg("check"));
    m.def("adam_step", &adam_step, arg("call"), arg("U"), arg("grad"), arg("first_moment"), arg("second_moment"), arg("step"), arg("lr"), arg("betas"),
          arg("eps"), arg("retraction"), arg("transport"), arg("maximize"), arg("check"));
    m.def("logits", &logits, arg("call"), arg("x"), arg("U"), arg("scale"), arg("projections"));
    m.def("logits_backward", &logits_backward, arg("call"), arg("grad"), arg("x"), arg("U"), arg("scale"), arg("projections"));
}

} // namespace subspan::bind
