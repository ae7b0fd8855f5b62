#include "convert.hpp"
#include "register.hpp"
#include "subspan/grassmann.hpp"
#include "subspan/grassmann_logits.hpp"
#include "subspan/grassmann_mean.hpp"
#include "subspan/grassmann_pairwise.hpp"
#include "subspan/grassmann_steps.hpp"
#include "subspan/principal_angles.hpp"

#include "lapack_capsules.hpp"

#include <optional>
#include <vector>

namespace subspan::bind {
namespace {

// f(out) of a map whose output may be `input`; about `factor` n k² flops a matrix.
template <class T, class F> void in_place_map(const StackView<T> &out, const StackView<const T> &input, double factor, F &&f) {
    const double k = double(out.cols()), flops = factor * double(out.size()) * double(out.rows()) * k * k;
    whole<T>(out, out.first.data == input.first.data, flops, f);
}


using Shape = std::vector<std::int64_t>;

void same_dtype(const Array &first, std::initializer_list<const Array *> others) {
    for (const Array *x : others) x->require_dtype(first.dtype());
}

void same_matrices(const Array &first, std::initializer_list<const Array *> others) {
    first.require_matrices();
    for (const Array *x : others) {
        x->require_matrices();
        for (int i = 1; i <= 2; ++i)
            if (x->shape(x->ndim() - i) != first.shape(first.ndim() - i))
                throw py::value_error(std::string(x->name()) + " must hold matrices of the shape that " + first.name() + " holds, " +
                                      first.shape_text() + ", got " + x->shape_text());
    }
}

StepOptions step_options(double lr, int retraction, bool parallel, bool check) {
    StepOptions o;
    o.lr = lr;
    o.retraction = static_cast<Retraction>(retraction);
    o.transport = parallel ? MomentumTransport::parallel : MomentumTransport::project;
    o.check = check;
    return o;
}

void register_maps(py::module_ &m) {
    m.def(
        "grassmann_tangent",
        [](const py::object &u, const py::object &g, const py::object &out, int checks) {
            load_lapack();
            const Array xu(u, "U"), xg(g, "G"), xo(out, "out", true);
            same_dtype(xu, {&xg, &xo});
            same_matrices(xu, {&xg, &xo});
            require_apart(xo, xu);
            require_apart(xo, xg, true);
            const Shape batch = xo.leading();
            dispatch(xu.dtype(), [&](auto s) {
                using T = decltype(s);
                const auto vu = xu.stack<const T>(batch), vg = xg.stack<const T>(batch);
                const auto vo = xo.stack<T>(batch);
                const py::gil_scoped_release release;
                in_place_map<T>(vo, vg, 6.0, [&](const StackView<T> &to) { subspan::tangent<T>(vu, vg, to, static_cast<Checks>(checks)); });
                require_no_overflow<T>(vo, "the tangent part", {vu, vg});
            });
        },
        py::arg("u"), py::arg("g"), py::arg("out"), py::arg("checks"));
    m.def(
        "grassmann_retract",
        [](const py::object &u, const py::object &h, const py::object &out, double t, int method, int checks) {
            load_lapack();
            const Array xu(u, "U"), xh(h, "H"), xo(out, "out", true);
            same_dtype(xu, {&xh, &xo});
            same_matrices(xu, {&xh, &xo});
            require_apart(xo, xu, true);
            require_apart(xo, xh, true);
            const Shape batch = xo.leading();
            dispatch(xu.dtype(), [&](auto s) {
                using T = decltype(s);
                const auto vu = xu.stack<const T>(batch), vh = xh.stack<const T>(batch);
                const auto vo = xo.stack<T>(batch);
                const py::gil_scoped_release release;
                in_place_map<T>(vo, vo.first.data == vu.first.data ? vu : vh, 10.0, [&](const StackView<T> &to) {
                    subspan::retract<T>(vu, vh, t, static_cast<Retraction>(method), to, static_cast<Checks>(checks));
                });
                require_no_overflow<T>(vo, "the point", {vu, vh});
            });
        },
        py::arg("u"), py::arg("h"), py::arg("out"), py::arg("t"), py::arg("method"), py::arg("checks"));
    m.def(
        "grassmann_transport",
        [](const py::object &u, const py::object &h, const py::object &v, const py::object &out, double t, int checks) {
            load_lapack();
            const Array xu(u, "U"), xh(h, "H"), xv(v, "V"), xo(out, "out", true);
            same_dtype(xu, {&xh, &xv, &xo});
            same_matrices(xu, {&xh, &xv, &xo});
            require_apart(xo, xu);
            require_apart(xo, xh);
            require_apart(xo, xv, true);
            const Shape batch = xo.leading();
            dispatch(xu.dtype(), [&](auto s) {
                using T = decltype(s);
                const auto vu = xu.stack<const T>(batch), vh = xh.stack<const T>(batch), vv = xv.stack<const T>(batch);
                const auto vo = xo.stack<T>(batch);
                const py::gil_scoped_release release;
                in_place_map<T>(vo, vv, 15.0, [&](const StackView<T> &to) {
                    subspan::parallel_transport<T>(vu, vh, vv, t, to, static_cast<Checks>(checks));
                });
                require_no_overflow<T>(vo, "the transported tangent", {vu, vh, vv});
            });
        },
        py::arg("u"), py::arg("h"), py::arg("v"), py::arg("out"), py::arg("t"), py::arg("checks"));
    m.def(
        "grassmann_log",
        [](const py::object &u, const py::object &w, const py::object &out, int checks) {
            const Array xu(u, "U"), xw(w, "W"), xo(out, "out", true);
            same_dtype(xu, {&xw, &xo});
            same_matrices(xu, {&xw, &xo});
            require_apart(xo, xu);
            require_apart(xo, xw, true);
            const Shape batch = xo.leading();
            dispatch(xu.dtype(), [&](auto s) {
                using T = decltype(s);
                const auto vu = xu.stack<const T>(batch), vw = xw.stack<const T>(batch);
                const auto vo = xo.stack<T>(batch);
                const py::gil_scoped_release release;
                in_place_map<T>(vo, vw, 12.0, [&](const StackView<T> &to) {
                    subspan::grassmann_log<T>(vu, vw, to, static_cast<Checks>(checks));
                });
                require_no_overflow<T>(vo, "the logarithm", {vu, vw});
            });
        },
        py::arg("u"), py::arg("w"), py::arg("out"), py::arg("checks"));
    m.def(
        "grassmann_hessian",
        [](const py::object &u, const py::object &egrad, const py::object &ehess, const py::object &h, const py::object &out,
           int checks) {
            const Array xu(u, "U"), xg(egrad, "egrad"), xe(ehess, "ehess"), xh(h, "H"), xo(out, "out", true);
            same_dtype(xu, {&xg, &xe, &xh, &xo});
            same_matrices(xu, {&xg, &xe, &xh, &xo});
            for (const Array *x : {&xu, &xg, &xe, &xh}) require_apart(xo, *x);
            const Shape batch = xo.leading();
            dispatch(xu.dtype(), [&](auto s) {
                using T = decltype(s);
                const auto vu = xu.stack<const T>(batch), vg = xg.stack<const T>(batch), ve = xe.stack<const T>(batch);
                const auto vh = xh.stack<const T>(batch);
                const auto vo = xo.stack<T>(batch);
                const py::gil_scoped_release release;
                subspan::riemannian_hessian<T>(vu, vg, ve, vh, vo, static_cast<Checks>(checks));
            });
        },
        py::arg("u"), py::arg("egrad"), py::arg("ehess"), py::arg("h"), py::arg("out"), py::arg("checks"));
}

void register_metric(py::module_ &m) {
    m.def(
        "tangent_inner",
        [](const py::object &h, const py::object &v, const py::object &out) {
            const Array xh(h, "H"), xo(out, "out", true);
            std::optional<Array> xv; // none: the norm of H
            if (!v.is_none()) xv.emplace(v, "V");
            xo.require_dtype(xh.dtype());
            if (xv) same_matrices(xh, {&*xv});
            const Shape batch = xo.leading();
            dispatch(xh.dtype(), [&](auto s) {
                using T = decltype(s);
                const auto vh = xh.stack<const T>(batch), vv = xv ? xv->stack<const T>(batch) : vh;
                const auto vo = xo.stack<T>(batch);
                const py::gil_scoped_release release;
                if (xv)
                    subspan::tangent_inner<T>(vh, vv, vo);
                else
                    subspan::tangent_norm<T>(vh, vo);
                require_no_overflow<T>(vo, xv ? "the inner product" : "the norm", {vh, vv});
            });
        },
        py::arg("h"), py::arg("v"), py::arg("out"));
}

void register_angles(py::module_ &m) {
    m.def(
        "principal_angles",
        [](const py::object &u, const py::object &w, const py::object &angles, const py::object &p, const py::object &q,
           int checks) {
            load_lapack();
            const Array xu(u, "U"), xw(w, "W"), xa(angles, "angles", true);
            same_dtype(xu, {&xw, &xa});
            same_matrices(xu, {&xw});
            std::optional<Array> xp, xq;
            if (!p.is_none()) {
                xp.emplace(p, "P", true);
                xq.emplace(q, "Q", true);
                same_dtype(xu, {&*xp, &*xq});
            }
            const Shape batch = xa.leading(1);
            dispatch(xu.dtype(), [&](auto s) {
                using T = decltype(s);
                const auto vu = xu.stack<const T>(batch), vw = xw.stack<const T>(batch);
                const auto va = xa.row_stack<T>(batch);
                StackView<T> vp, vq;
                if (xp) {
                    vp = xp->stack<T>(batch);
                    vq = xq->stack<T>(batch);
                }
                const py::gil_scoped_release release;
                subspan::principal_angles<T>(vu, vw, va, xp ? &vp : nullptr, xp ? &vq : nullptr, static_cast<Checks>(checks));
            });
        },
        py::arg("u"), py::arg("w"), py::arg("angles"), py::arg("p"), py::arg("q"), py::arg("checks"));
    m.def(
        "subspace_distance",
        [](const py::object &u, const py::object &w, const py::object &out, int kind, int checks) {
            load_lapack();
            const Array xu(u, "U"), xw(w, "W"), xo(out, "out", true);
            same_dtype(xu, {&xw, &xo});
            same_matrices(xu, {&xw});
            const Shape batch = xo.leading();
            dispatch(xu.dtype(), [&](auto s) {
                using T = decltype(s);
                const auto vu = xu.stack<const T>(batch), vw = xw.stack<const T>(batch);
                const auto vo = xo.stack<T>(batch);
                const py::gil_scoped_release release;
                subspan::subspace_distance<T>(vu, vw, static_cast<Distance>(kind), vo, static_cast<Checks>(checks));
            });
        },
        py::arg("u"), py::arg("w"), py::arg("out"), py::arg("kind"), py::arg("checks"));
    m.def(
        "pairwise_distance",
        [](const py::object &u, const py::object &w, const py::object &out, int kind) {
            load_lapack();
            const Array xu(u, "U"), xo(out, "out", true);
            std::optional<Array> xw;
            if (!w.is_none()) xw.emplace(w, "W");
            xo.require_dtype(xu.dtype());
            if (xw) xw->require_dtype(xu.dtype());
            return dispatch(xu.dtype(), [&](auto s) {
                using T = decltype(s);
                const auto vu = xu.stack<const T>(xu.leading());
                const auto vw = xw ? xw->stack<const T>(xw->leading()) : vu;
                const auto vo = xo.matrix<T>();
                std::vector<std::pair<std::int64_t, std::int64_t>> close;
                {
                    const py::gil_scoped_release release;
                    close = subspan::pairwise_distance<T>(vu, vw, static_cast<Distance>(kind), !xw, vo);
                }
                std::vector<std::int64_t> pairs;
                for (const auto &[i, j] : close) {
                    pairs.push_back(i);
                    pairs.push_back(j);
                }
                const auto count = py::ssize_t(close.size());
                return hand_over(std::move(pairs), {count, py::ssize_t(2)});
            });
        },
        py::arg("u"), py::arg("w"), py::arg("out"), py::arg("kind"));
    m.def(
        "grassmann_mean",
        [](const py::object &u, const py::object &weights, const py::object &initial, const py::object &out, double tolerance,
           std::int64_t max_iterations, int checks, const py::object &progress) {
            load_lapack();
            const Array xu(u, "U"), xo(out, "out", true);
            same_dtype(xu, {&xo});
            same_matrices(xu, {&xo});
            std::optional<Array> xw, xi;
            if (!weights.is_none()) {
                xw.emplace(weights, "weights");
                xw->require_dtype(DType::f64);
            }
            if (!initial.is_none()) {
                xi.emplace(initial, "initial");
                same_dtype(xu, {&*xi});
                same_matrices(xu, {&*xi});
                require_apart(xo, *xi, true);
            }
            require_apart(xo, xu);
            const Shape points = xu.leading(), batch = xo.leading();
            std::int64_t means = 1;
            for (const auto n : batch) means *= n;
            std::vector<MeanReport> reports(static_cast<std::size_t>(means));
            const auto hear = [&](std::int64_t which, const MeanReport &r) {
                const py::gil_scoped_acquire acquire;
                if (PyErr_CheckSignals() != 0) throw py::error_already_set();
                if (!progress.is_none()) progress(which, r.iterations, r.gradient_norm, r.variance);
                return true;
            };
            dispatch(xu.dtype(), [&](auto s) {
                using T = decltype(s);
                const auto vu = xu.stack<const T>(points);
                const auto vo = xo.stack<T>(batch);
                const double *w = xw ? xw->vector<const double>(points.empty() ? 0 : points[0]) : nullptr;
                StackView<const T> vi;
                if (xi) vi = xi->stack<const T>(batch);
                const py::gil_scoped_release release;
                subspan::grassmann_mean<T>(vu, w, xi ? &vi : nullptr, tolerance, max_iterations, vo, reports.data(),
                                           static_cast<Checks>(checks), hear);
            });
            py::list result;
            for (const auto &r : reports) result.append(py::make_tuple(r.gradient_norm, r.variance, r.iterations, r.converged));
            return result;
        },
        py::arg("u"), py::arg("weights"), py::arg("initial"), py::arg("out"), py::arg("tolerance"), py::arg("max_iterations"),
        py::arg("checks"), py::arg("progress"));
}

void register_steps(py::module_ &m) {
    m.def(
        "grassmann_sgd_step",
        [](const py::object &u, const py::object &grad, const py::object &buffer, double lr, double momentum, double dampening,
           int retraction, bool parallel, bool check) {
            load_lapack();
            const Array xu(u, "U", true), xg(grad, "grad");
            same_dtype(xu, {&xg});
            same_matrices(xu, {&xg});
            require_apart(xu, xg);
            std::optional<Array> xb;
            if (!buffer.is_none()) {
                xb.emplace(buffer, "buffer", true);
                same_dtype(xu, {&*xb});
                same_matrices(xu, {&*xb});
                require_apart(xu, *xb);
                require_apart(*xb, xg);
            }
            const Shape batch = xu.leading();
            dispatch(xu.dtype(), [&](auto s) {
                using T = decltype(s);
                const auto vu = xu.stack<T>(batch);
                const auto vg = xg.stack<const T>(batch);
                StackView<T> vb;
                if (xb) vb = xb->stack<T>(batch);
                const py::gil_scoped_release release;
                std::vector<StackView<T>> changed{vu};
                if (xb) changed.push_back(vb);
                whole_step<T>(changed, 8.0 * double(vu.size()) * double(vu.rows()) * double(vu.cols()) * double(vu.cols()),
                              [&](const std::vector<StackView<T>> &x) {
                                  subspan::sgd_step<T>(x[0], vg, xb ? &x[1] : nullptr, momentum, dampening,
                                                       step_options(lr, retraction, parallel, check));
                              });
            });
        },
        py::arg("u"), py::arg("grad"), py::arg("buffer"), py::arg("lr"), py::arg("momentum"), py::arg("dampening"),
        py::arg("retraction"), py::arg("parallel"), py::arg("check"));
    m.def(
        "grassmann_adam_step",
        [](const py::object &u, const py::object &grad, const py::object &first, const py::object &second, std::int64_t step,
           double lr, double beta1, double beta2, double eps, int retraction, bool parallel, bool check) {
            load_lapack();
            const Array xu(u, "U", true), xg(grad, "grad"), xm(first, "first_moment", true), xv(second, "second_moment", true);
            same_dtype(xu, {&xg, &xm, &xv});
            same_matrices(xu, {&xg, &xm});
            require_apart(xu, xg);
            require_apart(xu, xm);
            require_apart(xm, xg);
            require_apart(xv, xu);
            require_apart(xv, xg);
            require_apart(xv, xm);
            const Shape batch = xu.leading();
            dispatch(xu.dtype(), [&](auto s) {
                using T = decltype(s);
                const auto vu = xu.stack<T>(batch), vm = xm.stack<T>(batch), vv = xv.stack<T>(batch);
                const auto vg = xg.stack<const T>(batch);
                const py::gil_scoped_release release;
                whole_step<T>({vu, vm, vv}, 17.0 * double(vu.size()) * double(vu.rows()) * double(vu.cols()) * double(vu.cols()),
                              [&](const std::vector<StackView<T>> &x) {
                                  subspan::adam_step<T>(x[0], vg, x[1], x[2], step, beta1, beta2, eps,
                                                        step_options(lr, retraction, parallel, check));
                              });
            });
        },
        py::arg("u"), py::arg("grad"), py::arg("first"), py::arg("second"), py::arg("step"), py::arg("lr"), py::arg("beta1"),
        py::arg("beta2"), py::arg("eps"), py::arg("retraction"), py::arg("parallel"), py::arg("check"));
}

void register_head(py::module_ &m) {
    m.def(
        "grassmann_logits",
        [](const py::object &x, const py::object &u, const py::object &out, double scale) {
            const Array xx(x, "x"), xu(u, "U"), xo(out, "out", true);
            same_dtype(xx, {&xu, &xo});
            require_apart(xo, xx);
            require_apart(xo, xu);
            const Shape batch = xu.leading();
            dispatch(xx.dtype(), [&](auto s) {
                using T = decltype(s);
                const auto vx = xx.matrix<const T>();
                const auto vu = xu.stack<const T>(batch);
                const auto vo = xo.matrix<T>();
                const py::gil_scoped_release release;
                subspan::grassmann_logits<T>(vx, vu, scale, vo);
            });
        },
        py::arg("x"), py::arg("u"), py::arg("out"), py::arg("scale"));
    m.def(
        "grassmann_logits_backward",
        [](const py::object &grad, const py::object &x, const py::object &u, const py::object &dx, const py::object &du,
           double scale) {
            const Array xg(grad, "grad"), xx(x, "x"), xu(u, "U"), xdx(dx, "dx", true), xdu(du, "dU", true);
            same_dtype(xx, {&xg, &xu, &xdx, &xdu});
            const Shape batch = xu.leading();
            dispatch(xx.dtype(), [&](auto s) {
                using T = decltype(s);
                const auto vg = xg.matrix<const T>(), vx = xx.matrix<const T>();
                const auto vu = xu.stack<const T>(batch);
                const auto vdx = xdx.matrix<T>();
                const auto vdu = xdu.stack<T>(batch);
                const py::gil_scoped_release release;
                subspan::grassmann_logits_backward<T>(vg, vx, vu, scale, vdx, vdu);
            });
        },
        py::arg("grad"), py::arg("x"), py::arg("u"), py::arg("dx"), py::arg("du"), py::arg("scale"));
}

} // namespace

void register_grassmann(py::module_ &m) {
    register_maps(m);
    register_metric(m);
    register_angles(m);
    register_steps(m);
    register_head(m);
}

} // namespace subspan::bind
