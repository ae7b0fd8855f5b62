#include "device_array.hpp"
#include "register.hpp"
#include "subspan/cuda/grassmann_steps.hpp"
#include "subspan/cuda/principal_angles.hpp"
#include "subspan/cuda/grassmann_logits.hpp"
#include "subspan/cuda/grassmann_mean.hpp"

#include <optional>

namespace subspan::bind {
namespace {

// f(context, U, x, out) for stacks over the leading axes of out, which may be x.
template <class F> void map_of_points(const py::tuple &where, const py::object &u, const py::object &x, const char *name, const py::object &out, bool may_be_u, const F &f) {
    const Call call(where);
    const DeviceArray xu(u, "U", call), xx(x, name, call), xo(out, "out", call, true);
    require_apart(xo, xu, may_be_u);
    require_apart(xo, xx, true);
    const auto batch = xo.leading();
    const auto su = xu.stack(batch), sx = xx.stack(batch), so = xo.stack(batch);
    const Memory memory(call, 0);
    const py::gil_scoped_release release;
    f(memory.context(), su, sx, so);
}

} // namespace

void register_device_grassmann(py::module_ &m) {
    m.def(
        "grassmann_sgd_step",
        [](const py::tuple &where, const py::object &u, const py::object &grad, const py::object &buffer, double lr, double momentum, double dampening,
           int retraction, bool parallel) {
            const Call call(where);
            const DeviceArray xu(u, "U", call, true), xg(grad, "grad", call);
            std::optional<DeviceArray> xb;
            require_apart(xu, xg);
            if (!buffer.is_none()) {
                xb.emplace(buffer, "buffer", call, true);
                require_apart(xu, *xb);
                require_apart(*xb, xg);
            }
            const auto batch = xu.leading();
            const auto su = xu.stack(batch), sg = xg.stack(batch);
            Stack sb;
            if (xb) sb = xb->stack(batch);
            cuda::SgdOptions o;
            o.lr = lr;
            o.momentum = momentum;
            o.weight = xb ? 1.0 - dampening : 1.0;
            o.retraction = static_cast<cuda::Retraction>(retraction);
            o.parallel = parallel;
            const Memory memory(call, 0);
            const py::gil_scoped_release release;
            cuda::sgd_step(memory.context(), su, sg, xb ? &sb : nullptr, o);
        },
        py::arg("call"), py::arg("u"), py::arg("grad"), py::arg("buffer"), py::arg("lr"), py::arg("momentum"), py::arg("dampening"),
        py::arg("retraction"), py::arg("parallel"));
    m.def(
        "grassmann_adam_step",
        [](const py::tuple &where, const py::object &u, const py::object &grad, const py::object &first, const py::object &second, std::int64_t step, double lr,
           double beta1, double beta2, double eps, int retraction, bool parallel) {
            const Call call(where);
            const DeviceArray xu(u, "U", call, true), xg(grad, "grad", call), xm(first, "first_moment", call, true), xv(second, "second_moment", call, true);
            for (const DeviceArray *x : {&xg, &xm, &xv}) require_apart(xu, *x);
            require_apart(xm, xg);
            require_apart(xv, xg);
            require_apart(xv, xm);
            const auto batch = xu.leading();
            const auto su = xu.stack(batch), sg = xg.stack(batch), sm = xm.stack(batch), sv = xv.stack(batch);
            cuda::AdamOptions o;
            o.lr = lr;
            o.beta1 = beta1;
            o.beta2 = beta2;
            o.eps = eps;
            o.step = step;
            o.retraction = static_cast<cuda::Retraction>(retraction);
            o.parallel = parallel;
            const Memory memory(call, cuda::adam_step_workspace(su));
            const py::gil_scoped_release release;
            cuda::adam_step(memory.context(), su, sg, sm, sv, o);
        },
        py::arg("call"), py::arg("u"), py::arg("grad"), py::arg("first_moment"), py::arg("second_moment"), py::arg("step"), py::arg("lr"), py::arg("beta1"),
        py::arg("beta2"), py::arg("eps"), py::arg("retraction"), py::arg("parallel"));
    m.def(
        "grassmann_transport",
        [](const py::tuple &where, const py::object &u, const py::object &h, const py::object &v, const py::object &out, double t) {
            const Call call(where);
            const DeviceArray xu(u, "U", call), xh(h, "H", call), xv(v, "V", call), xo(out, "out", call, true);
            require_apart(xo, xu);
            require_apart(xo, xh);
            require_apart(xo, xv, true);
            const auto batch = xo.leading();
            const auto su = xu.stack(batch), sh = xh.stack(batch), sv = xv.stack(batch), so = xo.stack(batch);
            const Memory memory(call, 0);
            const py::gil_scoped_release release;
            cuda::transport(memory.context(), su, sh, sv, t, so);
        },
        py::arg("call"), py::arg("u"), py::arg("h"), py::arg("v"), py::arg("out"), py::arg("t"));
    m.def(
        "grassmann_retract",
        [](const py::tuple &where, const py::object &u, const py::object &h, const py::object &out, double t, int method) {
            map_of_points(where, u, h, "H", out, true, [&](const cuda::Context &context, const Stack &su, const Stack &sx, const Stack &so) {
                cuda::retract(context, su, sx, t, static_cast<cuda::Retraction>(method), so);
            });
        },
        py::arg("call"), py::arg("u"), py::arg("h"), py::arg("out"), py::arg("t"), py::arg("method"));
    m.def(
        "grassmann_tangent",
        [](const py::tuple &where, const py::object &u, const py::object &g, const py::object &out) {
            map_of_points(where, u, g, "G", out, false, [&](const cuda::Context &context, const Stack &su, const Stack &sx, const Stack &so) {
                cuda::tangent(context, su, sx, so);
            });
        },
        py::arg("call"), py::arg("u"), py::arg("g"), py::arg("out"));
    m.def(
        "grassmann_angles",
        [](const py::tuple &where, const py::object &u, const py::object &w, const py::object &angles, const py::object &p, const py::object &q) {
            const Call call(where);
            const DeviceArray xu(u, "U", call), xw(w, "W", call), xa(angles, "angles", call);
            std::optional<DeviceArray> xp, xq;
            const auto batch = xa.leading(1);
            Stack sp, sq;
            if (!p.is_none()) {
                xp.emplace(p, "principal vectors", call);
                xq.emplace(q, "principal vectors", call);
                sp = xp->stack(batch);
                sq = xq->stack(batch);
            }
            const auto su = xu.stack(batch), sw = xw.stack(batch), sa = xa.stack(batch, 1);
            const Memory memory(call, 0);
            const py::gil_scoped_release release;
            cuda::principal_angles(memory.context(), su, sw, sa, xp ? &sp : nullptr, xq ? &sq : nullptr);
        },
        py::arg("call"), py::arg("u"), py::arg("w"), py::arg("angles"), py::arg("p"), py::arg("q"));
    m.def(
        "grassmann_distance",
        [](const py::tuple &where, const py::object &u, const py::object &w, const py::object &out, int kind) {
            map_of_points(where, u, w, "W", out, false, [&](const cuda::Context &context, const Stack &su, const Stack &sx, const Stack &so) {
                cuda::subspace_distance(context, su, sx, static_cast<cuda::Distance>(kind), so);
            });
        },
        py::arg("call"), py::arg("u"), py::arg("w"), py::arg("out"), py::arg("kind"));
    m.def(
        "grassmann_log",
        [](const py::tuple &where, const py::object &u, const py::object &w, const py::object &out) {
            map_of_points(where, u, w, "W", out, false, [&](const cuda::Context &context, const Stack &su, const Stack &sx, const Stack &so) {
                cuda::grassmann_log(context, su, sx, so);
            });
        },
        py::arg("call"), py::arg("u"), py::arg("w"), py::arg("out"));
    m.def(
        "grassmann_mean_rows",
        [](const py::tuple &where, const py::object &mean) {
            const Call call(where);
            const DeviceArray xm(mean, "mean", call);
            return cuda::mean_rows(xm.stack(xm.leading()));
        },
        py::arg("call"), py::arg("mean"));
    m.def(
        "grassmann_mean",
        [](const py::tuple &where, const py::object &u, const py::object &weights, const py::object &mean, const py::object &direction, const py::object &next,
           const py::object &trial, const py::object &logs, const py::object &numbers, double tolerance, std::int64_t limit, int rounds) {
            const Call call(where);
            const DeviceArray xu(u, "U", call), xw(weights, "weights", call), xm(mean, "mean", call, true), xd(direction, "direction", call, true),
                xn(next, "next", call, true), xt(trial, "trial", call, true), xl(logs, "logs", call, true), xr(numbers, "numbers", call, true);
            for (const DeviceArray *x : {&xm, &xd, &xn, &xt, &xl, &xr}) x->contiguous();
            xr.require_dtype(DType::f64);
            xw.require_dtype(DType::f64);
            const auto batch = xm.leading(), points = xu.leading();
            cuda::MeanIteration it;
            it.u = xu.stack(points);
            it.mean_of_each = xm.stack(points);
            it.mean = xm.stack(batch);
            it.direction = xd.stack(batch);
            it.next = xn.stack(batch);
            it.trial = xt.stack(batch);
            it.logs = xl.stack(points);
            it.weights = static_cast<const double *>(xw.contiguous());
            it.numbers = static_cast<double *>(xr.data());
            it.tolerance = tolerance;
            it.limit = limit;
            if (xw.ndim() != 1 || points.empty() || xw.shape(0) != points[0]) throw ValueError("weights must have one entry for each point");
            xr.require_shape({cuda::mean_rows(it.mean), it.mean.size()});
            const Memory memory(call, 0);
            const py::gil_scoped_release release;
            if (rounds == 0) cuda::mean_begin(memory.context(), it);
            for (int i = 0; i < rounds; ++i) cuda::mean_iterate(memory.context(), it);
        },
        py::arg("call"), py::arg("u"), py::arg("weights"), py::arg("mean"), py::arg("direction"), py::arg("next"), py::arg("trial"), py::arg("logs"),
        py::arg("numbers"), py::arg("tolerance"), py::arg("limit"), py::arg("rounds"));
    m.def(
        "grassmann_logits",
        [](const py::tuple &where, const py::object &x, const py::object &u, const py::object &out, double scale) {
            const Call call(where);
            const DeviceArray xx(x, "x", call), xu(u, "U", call), xo(out, "out", call);
            const auto sx = xx.stack({}), su = xu.stack(xu.leading()), so = xo.stack({});
            const Memory memory(call, cuda::grassmann_logits_workspace(sx, su, false, call.device));
            const py::gil_scoped_release release;
            cuda::grassmann_logits(memory.context(), sx, su, scale, so);
        },
        py::arg("call"), py::arg("x"), py::arg("u"), py::arg("out"), py::arg("scale"));
    m.def(
        "grassmann_logits_backward",
        [](const py::tuple &where, const py::object &grad, const py::object &x, const py::object &u, const py::object &dx, const py::object &du, double scale) {
            const Call call(where);
            const DeviceArray xg(grad, "grad", call), xx(x, "x", call), xu(u, "U", call), xdx(dx, "dx", call), xdu(du, "dU", call);
            const auto sg = xg.stack({}), sx = xx.stack({}), su = xu.stack(xu.leading()), sdx = xdx.stack({}), sdu = xdu.stack(xdu.leading());
            const Memory memory(call, cuda::grassmann_logits_workspace(sx, su, true, call.device));
            const py::gil_scoped_release release;
            cuda::grassmann_logits_backward(memory.context(), sg, sx, su, scale, sdx, sdu);
        },
        py::arg("call"), py::arg("grad"), py::arg("x"), py::arg("u"), py::arg("dx"), py::arg("du"), py::arg("scale"));
}

} // namespace subspan::bind
