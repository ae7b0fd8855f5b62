#include "device_array.hpp"
#include "register.hpp"
#include "subspan/cuda/householder_qr.hpp"
#include "subspan/cuda/householder.hpp"

#include <optional>

namespace subspan::bind {
namespace {

// Reflections with where their gradients go, over the leading axes of a result.
class Gradients {
  public:
    Gradients(const py::object &v, const py::object &core, const py::object &tau, const py::object &dv, const py::object &dtau, const Call &call,
              const std::vector<std::int64_t> &batch)
        : v_(v, "V", call), core_(core, "core", call), dv_(dv, "dV", call) {
        r_.v = v_.stack(batch);
        r_.core = core_.stack(batch);
        r_.dv = dv_.stack(batch);
        if (tau.is_none()) return;
        tau_.emplace(tau, "tau", call);
        dtau_.emplace(dtau, "dtau", call);
        stau_ = tau_->stack(batch, 1);
        sdtau_ = dtau_->stack(batch, 1);
        r_.tau = &stau_;
        r_.dtau = &sdtau_;
    }
    Gradients(const Gradients &) = delete;
    Gradients &operator=(const Gradients &) = delete;
    const cuda::ReflectionGradients &get() const { return r_; }

  private:
    DeviceArray v_, core_, dv_;
    std::optional<DeviceArray> tau_, dtau_;
    Stack stau_, sdtau_;
    cuda::ReflectionGradients r_;
};

// The core of given reflections: small ones in one kernel, any others by products.
template <class Room, class F> auto core_binding(Room room, F f) {
    return [room, f](const py::tuple &where, const py::object &v, const py::object &tau, const py::object &core) {
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
        const Memory memory(call, room(sv, sc, call.device));
        const py::gil_scoped_release release;
        f(memory.context(), sv, xtau ? &stau : nullptr, sc);
    };
}

} // namespace

void register_device_householder(py::module_ &m) {
    m.def(
        "householder_qr",
        [](const py::tuple &where, const py::object &a, const py::object &v, const py::object &r, const py::object &tau, const py::object &t) {
            const Call call(where);
            const DeviceArray xa(a, "A", call), xv(v, "V", call), xr(r, "R", call), xtau(tau, "tau", call), xt(t, "T", call);
            const auto batch = xa.leading();
            const auto sa = xa.stack(batch), sv = xv.stack(batch), sr = xr.stack(batch), stau = xtau.stack(batch, 1), st = xt.stack(batch);
            const bool small = cuda::fits_a_block(sa, call.device);
            const Memory memory(call, small ? 0 : cuda::large_householder_qr_workspace(sa, sv, st, call.device));
            const py::gil_scoped_release release;
            (small ? cuda::householder_qr : cuda::large_householder_qr)(memory.context(), sa, sv, sr, stau, st);
        },
        py::arg("call"), py::arg("a"), py::arg("v"), py::arg("r"), py::arg("tau"), py::arg("t"));
    m.def("reflection_core", core_binding([](const Stack &, const Stack &, int) { return std::int64_t(0); }, &cuda::reflection_core), py::arg("call"),
          py::arg("v"), py::arg("tau"), py::arg("core"));
    m.def("wide_reflection_core", core_binding(&cuda::wide_reflection_core_workspace, &cuda::wide_reflection_core), py::arg("call"), py::arg("v"),
          py::arg("tau"), py::arg("core"));
    m.def(
        "reflection_product",
        [](const py::tuple &where, const py::object &v, const py::object &core, const py::object &q) {
            const Call call(where);
            const DeviceArray xv(v, "V", call), xc(core, "core", call), xq(q, "Q", call);
            const auto batch = xq.leading();
            const auto sv = xv.stack(batch), sc = xc.stack(batch), sq = xq.stack(batch);
            const Memory memory(call, cuda::reflection_product_workspace(sv, sq, call.device));
            const py::gil_scoped_release release;
            cuda::reflection_product(memory.context(), sv, sc, sq);
        },
        py::arg("call"), py::arg("v"), py::arg("core"), py::arg("q"));
    m.def(
        "reflection_product_backward",
        [](const py::tuple &where, const py::object &v, const py::object &core, const py::object &tau, const py::object &grad, const py::object &dv,
           const py::object &dtau) {
            const Call call(where);
            const DeviceArray xg(grad, "grad", call);
            const auto batch = xg.leading();
            const Gradients r(v, core, tau, dv, dtau, call, batch);
            const auto sg = xg.stack(batch);
            const Memory memory(call, cuda::reflection_product_backward_workspace(r.get(), sg, call.device));
            const py::gil_scoped_release release;
            cuda::reflection_product_backward(memory.context(), r.get(), sg);
        },
        py::arg("call"), py::arg("v"), py::arg("core"), py::arg("tau"), py::arg("grad"), py::arg("dv"), py::arg("dtau"));
    m.def(
        "reflection_apply_backward",
        [](const py::tuple &where, const py::object &v, const py::object &core, const py::object &tau, const py::object &c, const py::object &grad, bool left,
           bool transpose, const py::object &dv, const py::object &dtau, const py::object &dc) {
            const Call call(where);
            const DeviceArray xc(c, "C", call), xg(grad, "grad", call), xd(dc, "dC", call);
            const auto batch = xd.leading();
            const Gradients r(v, core, tau, dv, dtau, call, batch);
            auto sc = xc.stack(batch), sg = xg.stack(batch), sd = xd.stack(batch);
            if (!left) { // C H = (Hᵀ Cᵀ)ᵀ
                sc = sc.transposed();
                sg = sg.transposed();
                sd = sd.transposed();
            }
            const Memory memory(call, cuda::reflection_apply_backward_workspace(r.get(), sc, call.device));
            const py::gil_scoped_release release;
            cuda::reflection_apply_backward(memory.context(), r.get(), sc, sg, transpose == left, sd);
        },
        py::arg("call"), py::arg("v"), py::arg("core"), py::arg("tau"), py::arg("c"), py::arg("grad"), py::arg("left"), py::arg("transpose"), py::arg("dv"),
        py::arg("dtau"), py::arg("dc"));
}

} // namespace subspan::bind
