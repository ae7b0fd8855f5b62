#include "device_array.hpp"
#include "register.hpp"
#include "subspan/cuda/grassmann.hpp"

#include <optional>

namespace subspan::bind {

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
        "grassmann_retract",
        [](const py::tuple &where, const py::object &u, const py::object &h, const py::object &out, double t, int method) {
            const Call call(where);
            const DeviceArray xu(u, "U", call), xh(h, "H", call), xo(out, "out", call, true);
            require_apart(xo, xu, true);
            require_apart(xo, xh, true);
            const auto batch = xo.leading();
            const auto su = xu.stack(batch), sh = xh.stack(batch), so = xo.stack(batch);
            const Memory memory(call, 0);
            const py::gil_scoped_release release;
            cuda::retract(memory.context(), su, sh, t, static_cast<cuda::Retraction>(method), so);
        },
        py::arg("call"), py::arg("u"), py::arg("h"), py::arg("out"), py::arg("t"), py::arg("method"));
    m.def(
        "grassmann_tangent",
        [](const py::tuple &where, const py::object &u, const py::object &g, const py::object &out) {
            const Call call(where);
            const DeviceArray xu(u, "U", call), xg(g, "G", call), xo(out, "out", call, true);
            require_apart(xo, xu);
            require_apart(xo, xg, true);
            const auto batch = xo.leading();
            const auto su = xu.stack(batch), sg = xg.stack(batch), so = xo.stack(batch);
            const Memory memory(call, 0);
            const py::gil_scoped_release release;
            cuda::tangent(memory.context(), su, sg, so);
        },
        py::arg("call"), py::arg("u"), py::arg("g"), py::arg("out"));
}

} // namespace subspan::bind
