#include "device_array.hpp"
#include "register.hpp"
#include "subspan/cuda/householder.hpp"

#include <optional>

namespace subspan::bind {

void register_device_householder(py::module_ &m) {
    m.def(
        "householder_qr",
        [](const py::tuple &where, const py::object &a, const py::object &v, const py::object &r, const py::object &tau, const py::object &t) {
            const Call call(where);
            const DeviceArray xa(a, "A", call), xv(v, "V", call), xr(r, "R", call), xtau(tau, "tau", call), xt(t, "T", call);
            const auto batch = xa.leading();
            const auto sa = xa.stack(batch), sv = xv.stack(batch), sr = xr.stack(batch), stau = xtau.stack(batch, 1), st = xt.stack(batch);
            const Memory memory(call, 0);
            const py::gil_scoped_release release;
            cuda::householder_qr(memory.context(), sa, sv, sr, stau, st);
        },
        py::arg("call"), py::arg("a"), py::arg("v"), py::arg("r"), py::arg("tau"), py::arg("t"));
    m.def(
        "reflection_core",
        [](const py::tuple &where, const py::object &v, const py::object &tau, const py::object &core) {
            const Call call(where);
            const DeviceArray xv(v, "V", call), xc(core, "core", call);
            std::optional<DeviceArray> xtau;
            const auto batch = xc.leading();
            const auto sv = xv.stack(batch), sc = xc.stack(batch);
            Stack stau;
            if (!tau.is_none()) {
                xtau.emplace(tau, "tau", call);
                stau = xtau->stack(batch, 1);
            }
            const Memory memory(call, 0);
            const py::gil_scoped_release release;
            cuda::reflection_core(memory.context(), sv, xtau ? &stau : nullptr, sc);
        },
        py::arg("call"), py::arg("v"), py::arg("tau"), py::arg("core"));
}

} // namespace subspan::bind
