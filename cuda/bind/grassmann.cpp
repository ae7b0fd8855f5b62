#include "device.hpp"
#include "points.hpp"
#include "register.hpp"
#include "subspan/cuda/grassmann.hpp"
#include "subspan/cuda/grassmann_logits.hpp"
#include "subspan/cuda/grassmann_mean.hpp"
#include "subspan/cuda/grassmann_steps.hpp"
#include "subspan/cuda/principal_angles.hpp"
#include "subspan/grassmann_mean.hpp"

#include <optional>

namespace subspan::bind {
namespace {

// f(context, U, x, out): what a map of a point and one more makes; out may be x, and with `may_be_u` the point.
template <class F> py::object map_of_points(const Call &call, const Points &x, const py::object &out, bool may_be_u, const F &f) {
    const Array xo = x.output(call, out);
    check_no_overlap(xo, x[0], may_be_u);
    check_no_overlap(xo, x[1], true);
    const Stack su = stack(x[0], x.batch), sx = stack(x[1], x.batch), so = stack(xo, x.batch);
    const Memory memory(call, 0);
    {
        const py::gil_scoped_release release;
        f(memory.context(), su, sx, so);
    }
    xo.written();
    return xo.object();
}

py::object tangent(py::handle context, py::handle u, py::handle g, const py::object &out, py::handle check) {
    const Call call(context);
    truth(check, "check");
    return map_of_points(call, Points(call, {{"U", u}, {"G", g}}), out, false, &cuda::tangent);
}

py::object retract(py::handle context, py::handle u, py::handle h, py::handle t, py::handle method, py::handle project, const py::object &out,
                   py::handle check) {
    const Call call(context);
    const Retraction how = retraction_of(method, "method");
    truth(project, "project");
    truth(check, "check");
    const double time = real(t, "t");
    return map_of_points(call, Points(call, {{"U", u}, {"H", h}}), out, true,
                         [&](const cuda::Context &c, const Stack &su, const Stack &sx, const Stack &so) { cuda::retract(c, su, sx, time, how, so); });
}

py::object log(py::handle context, py::handle u, py::handle w, const py::object &out, py::handle check) {
    const Call call(context);
    truth(check, "check");
    return map_of_points(call, Points(call, {{"U", u}, {"W", w}}), out, false, &cuda::grassmann_log);
}

py::object transport(py::handle context, py::handle u, py::handle h, py::handle v, py::handle t, const py::object &out, py::handle check) {
    const Call call(context);
    truth(check, "check");
    const double time = real(t, "t");
    const Points x(call, {{"U", u}, {"H", h}, {"V", v}});
    const Array xo = x.output(call, out);
    check_no_overlap(xo, x[0]);
    check_no_overlap(xo, x[1]);
    check_no_overlap(xo, x[2], true);
    const Stack su = stack(x[0], x.batch), sh = stack(x[1], x.batch), sv = stack(x[2], x.batch), so = stack(xo, x.batch);
    const Memory memory(call, 0);
    {
        const py::gil_scoped_release release;
        cuda::parallel_transport(memory.context(), su, sh, sv, time, so);
    }
    xo.written();
    return xo.object();
}

py::object principal_angles(py::handle context, py::handle u, py::handle w, py::handle vectors, py::handle check) {
    const Call call(context);
    truth(check, "check");
    const bool wanted = truth(vectors, "vectors");
    const Points x(call, {{"U", u}, {"W", w}});
    const Array angles = call.empty(x.with({x.cols()}), x.dtype());
    std::optional<Array> p, q;
    Stack sp, sq;
    if (wanted) {
        p.emplace(call.empty(x.with({x.rows(), x.cols()}), x.dtype()));
        q.emplace(call.empty(x.with({x.rows(), x.cols()}), x.dtype()));
        sp = stack(*p, x.batch);
        sq = stack(*q, x.batch);
    }
    const Stack su = stack(x[0], x.batch), sw = stack(x[1], x.batch), sa = stack(angles, x.batch, 1);
    const Memory memory(call, 0);
    {
        const py::gil_scoped_release release;
        cuda::principal_angles(memory.context(), su, sw, sa, p ? &sp : nullptr, q ? &sq : nullptr);
    }
    if (!wanted) return angles.object();
    return py::make_tuple(angles.object(), p->object(), q->object());
}

py::object distance(py::handle context, py::handle u, py::handle w, py::handle kind, py::handle unequal, py::handle check) {
    const Call call(context);
    const Distance which = distance_of(kind);
    choice(unequal, "unequal", {"containment", "metric"});
    truth(check, "check");
    const Points x(call, {{"U", u}, {"W", w}});
    Array xo = call.empty(x.batch, x.dtype());
    xo.add_axis(true);
    xo.add_axis(true);
    const Stack su = stack(x[0], x.batch), sw = stack(x[1], x.batch), so = stack(xo, x.batch);
    const Memory memory(call, 0);
    {
        const py::gil_scoped_release release;
        cuda::subspace_distance(memory.context(), su, sw, which, so);
    }
    return xo.object();
}

py::tuple mean(py::handle context, py::handle u, const py::object &weights, const py::object &initial, py::handle tol, py::handle max_iterations,
               const py::object &progress, const py::object &out, py::handle check) {
    const Call call(context);
    truth(check, "check");
    const MeanArguments x(call, u, weights, initial, tol, max_iterations, progress, out);
    const Array &xu = x.u;
    const Shape points = xu.leading(), &batch = x.batch, shape = x.out.shape();
    const std::int64_t count = points[0], means = x.means;
    py::array_t<double> w(count);
    const std::vector<double> shares = mean_weights(x.weights.empty() ? nullptr : x.weights.data(), count);
    std::copy_n(shares.data(), count, w.mutable_data());
    std::vector<MeanFigures> figures(static_cast<std::size_t>(means));
    if (means * xu.rows() * xu.cols() == 0) return x.result(figures);
    const auto best = std::max_element(w.data(), w.data() + count) - w.data();
    const Array at = copied(call, Array(call, x.initial ? x.initial->object() : py::object(xu.object()[py::int_(best)]), "the means"));
    check_no_overlap(x.out, at); // an out that overlaps itself
    const Array direction = call.empty(shape, xu.dtype()), next = call.empty(shape, xu.dtype()), trial = call.empty(shape, xu.dtype());
    const Array logs = call.empty(xu.shape(), xu.dtype());
    cuda::MeanIteration it;
    it.mean = stack(at, batch);
    const std::int64_t rows = cuda::mean_rows(it.mean);
    const Array numbers = call.empty({rows, means}, DType::f64);
    const Array device_weights(call, call.place.attr("from_host")(w), "weights");
    at.contiguous();
    it.u = stack(xu, points);
    it.mean_of_each = stack(at, points);
    it.direction = stack(direction, batch);
    it.next = stack(next, batch);
    it.trial = stack(trial, batch);
    it.logs = stack(logs, points);
    it.weights = static_cast<const double *>(device_weights.contiguous());
    it.numbers = static_cast<double *>(numbers.data());
    it.tolerance = x.tolerance;
    it.limit = x.limit;
    const Memory memory(call, 0);
    {
        const py::gil_scoped_release release;
        cuda::mean_begin(memory.context(), it);
    }
    constexpr int together = 4; // iterations between two copies of the norms to the host, which wait; with `progress` one
    std::vector<double> seen(std::size_t(5 * means));
    const auto value = [&](std::int64_t row, std::int64_t i) { return seen[std::size_t(row * means + i)]; }; // length, variance, norm, iterations, status
    while (true) {
        std::copy_n(host(call, numbers.object()[py::slice(0, 5, 1)]).data(), 5 * means, seen.begin());
        bool running = false;
        for (std::int64_t i = 0; i < means; ++i) {
            const auto status = static_cast<cuda::MeanStatus>(int(value(4, i)));
            if (status == cuda::MeanStatus::not_finite) throw py::value_error("U or initial holds NaN or infinity, or bases that are far from orthonormal");
            running = running || status == cuda::MeanStatus::running;
        }
        if (!running) break;
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
        if (!progress.is_none())
            for (std::int64_t i = 0; i < means; ++i)
                if (int(value(4, i)) == 0) progress(i, std::int64_t(value(3, i)), value(2, i), value(1, i));
        const py::gil_scoped_release release;
        for (int i = 0; i < (progress.is_none() ? together : 1); ++i) cuda::mean_iterate(memory.context(), it);
    }
    assign(call, at, x.out);
    for (std::int64_t i = 0; i < means; ++i)
        figures[std::size_t(i)] = {value(2, i), value(1, i), std::int64_t(value(3, i)),
                                   static_cast<cuda::MeanStatus>(int(value(4, i))) == cuda::MeanStatus::converged};
    return x.result(figures);
}

void sgd_step(py::handle context, py::handle u, py::handle grad, py::handle buffer, py::handle lr, py::handle momentum, py::handle dampening,
              py::handle retraction, py::handle transport, py::handle maximize, py::handle check) {
    const Call call(context);
    const SgdSettings o(lr, momentum, dampening, retraction, transport, maximize, check, !buffer.is_none());
    const StepArguments x(call, u, grad, "buffer", buffer);
    const Shape batch = x.u.leading();
    const Stack su = stack(x.u, batch), sg = stack(x.grad, batch);
    Stack sb;
    if (x.moment) sb = stack(*x.moment, batch);
    const Memory memory(call, 0);
    {
        const py::gil_scoped_release release;
        cuda::sgd_step(memory.context(), su, sg, x.moment ? &sb : nullptr, o.momentum, o.dampening, o.options);
    }
    if (x.moment) x.moment->written();
    x.u.written();
}

void adam_step(py::handle context, py::handle u, py::handle grad, py::handle first, py::handle second, py::handle step, py::handle lr, py::handle betas,
               py::handle eps, py::handle retraction, py::handle transport, py::handle maximize, py::handle check) {
    const Call call(context);
    const AdamSettings o(step, lr, betas, eps, retraction, transport, maximize, check);
    const StepArguments x(call, u, grad, "first_moment", first);
    Array xv(call, second, "second_moment", Access::in_place);
    x.check_second(xv);
    xv.add_axis(true);
    xv.add_axis(true);
    const Shape batch = x.u.leading();
    const Stack su = stack(x.u, batch), sg = stack(x.grad, batch), sm = stack(*x.moment, batch), sv = stack(xv, batch);
    const Memory memory(call, cuda::adam_step_workspace(su));
    {
        const py::gil_scoped_release release;
        cuda::adam_step(memory.context(), su, sg, sm, sv, o.step, o.beta1, o.beta2, o.eps, o.options);
    }
    x.moment->written();
    xv.written();
    x.u.written();
}

py::object logits(py::handle context, py::handle x, py::handle u, py::handle scale, py::handle projections) {
    const Call call(context);
    const double factor = real(scale, "scale");
    const Features f(call, x, u, py::none());
    const std::optional<Array> kept = f.projections(call, projections, Access::out);
    const Array xx = for_blas(call, x, "x"), xo = call.empty({f.x.shape(0), f.u.shape(0)}, f.x.dtype());
    const Stack sx = stack(xx, {}), su = stack(f.u, f.u.leading()), so = stack(xo, {});
    const Memory memory(call, cuda::grassmann_logits_workspace(sx, su, false, call.device));
    {
        const py::gil_scoped_release release;
        cuda::grassmann_logits(memory.context(), sx, su, factor, so, kept ? kept->contiguous() : nullptr);
    }
    if (kept) kept->written();
    return xo.object();
}

py::tuple logits_backward(py::handle context, py::handle grad, py::handle x, py::handle u, py::handle scale, py::handle projections) {
    const Call call(context);
    const double factor = real(scale, "scale");
    const Features f(call, x, u, grad);
    const std::optional<Array> kept = f.projections(call, projections, Access::read);
    const Array xx = for_blas(call, x, "x"), dx = call.empty(f.x.shape(), f.x.dtype(), "dx"), du = f.empty_like_u(call);
    if (f.x.shape(0) == 0 || f.u.shape(0) == 0) { // nothing to add up
        for (const Array *g : {&dx, &du}) fill(call, *g, 0);
        return py::make_tuple(dx.object(), du.object());
    }
    const Stack sg = stack(*f.grad, {}), sx = stack(xx, {}), su = stack(f.u, f.u.leading()), sdx = stack(dx, {}), sdu = stack(du, du.leading());
    const Memory memory(call, cuda::grassmann_logits_workspace(sx, su, true, call.device));
    {
        const py::gil_scoped_release release;
        cuda::grassmann_logits_backward(memory.context(), sg, sx, su, factor, sdx, sdu, kept ? kept->contiguous() : nullptr);
    }
    return py::make_tuple(dx.object(), du.object());
}

} // namespace

void register_device_grassmann(py::module_ &m) {
    using py::arg;
    m.def("tangent", &tangent, arg("call"), arg("U"), arg("G"), arg("out"), arg("check"));
    m.def("retract", &retract, arg("call"), arg("U"), arg("H"), arg("t"), arg("method"), arg("project"), arg("out"), arg("check"));
    m.def("log", &log, arg("call"), arg("U"), arg("W"), arg("out"), arg("check"));
    m.def("transport", &transport, arg("call"), arg("U"), arg("H"), arg("V"), arg("t"), arg("out"), arg("check"));
    m.def("principal_angles", &principal_angles, arg("call"), arg("U"), arg("W"), arg("vectors"), arg("check"));
    m.def("distance", &distance, arg("call"), arg("U"), arg("W"), arg("kind"), arg("unequal"), arg("check"));
    m.def("mean", &mean, arg("call"), arg("U"), arg("weights"), arg("initial"), arg("tol"), arg("max_iterations"), arg("progress"), arg("out"), arg("check"));
    m.def("sgd_step", &sgd_step, arg("call"), arg("U"), arg("grad"), arg("buffer"), arg("lr"), arg("momentum"), arg("dampening"), arg("retraction"),
          arg("transport"), arg("maximize"), arg("check"));
    m.def("adam_step", &adam_step, arg("call"), arg("U"), arg("grad"), arg("first_moment"), arg("second_moment"), arg("step"), arg("lr"), arg("betas"),
          arg("eps"), arg("retraction"), arg("transport"), arg("maximize"), arg("check"));
    m.def("logits", &logits, arg("call"), arg("x"), arg("U"), arg("scale"), arg("projections"));
    m.def("logits_backward", &logits_backward, arg("call"), arg("grad"), arg("x"), arg("U"), arg("scale"), arg("projections"));
}

} // namespace subspan::bind
