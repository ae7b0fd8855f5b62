#include "device_array.hpp"
#include "register.hpp"
#include "subspan/cuda/plucker_mix.hpp"

#include <optional>
#include <pybind11/stl.h>
#include <vector>

namespace subspan::bind {
namespace {

using Offsets = std::vector<std::int64_t>;

cuda::MixOptions options_of(const Offsets &offsets, const py::tuple &t) {
    cuda::MixOptions o;
    o.offsets = offsets;
    o.norm = t[0].cast<int>();
    o.eps = t[1].cast<double>();
    o.weighting = t[2].cast<int>();
    o.past_first = t[3].cast<bool>();
    o.bias_always = t[4].cast<bool>();
    o.rope = t[5].cast<int>();
    o.rope_base = t[6].cast<double>();
    o.rope_start = py::cast<std::int64_t>(py::tuple(t[7])[0]);
    return o;
}

// The tokens and what goes with them. For decoding z is a ring and `first` the position of the newest token.
class Input {
  public:
    Input(const Call &call, const py::object &z, const py::object &weights, const py::object &mask, const Offsets &offsets, std::int64_t ring = 0,
          std::int64_t first = 0)
        : z_(z, "z", call) {
        batch = z_.leading();
        in.z = z_.stack(batch);
        in.ring = ring;
        in.first = first;
        const std::int64_t length = ring > 0 ? 1 : in.z.rows;
        auto whole = batch;
        whole.push_back(length);
        if (!mask.is_none()) {
            mask_.emplace(mask, "mask", call);
            auto wanted = batch;
            wanted.push_back(in.z.rows); // of a ring as well: which of its tokens take part
            mask_stack_ = mask_->broadcast(wanted, 1);
            in.mask = &mask_stack_;
        }
        if (!weights.is_none()) {
            weights_.emplace(weights, "weights", call);
            whole.push_back(std::int64_t(offsets.size()));
            weights_stack_ = weights_->broadcast(whole, 2);
            in.weights = &weights_stack_;
        }
    }
    Input(const Input &) = delete;
    Input &operator=(const Input &) = delete;

    cuda::MixInput in;
    Offsets batch; // leading axes

    void apart(const DeviceArray &out) const {
        require_apart(out, z_);
        if (weights_) require_apart(out, *weights_);
        if (mask_) require_apart(out, *mask_);
    }

  private:
    DeviceArray z_;
    std::optional<DeviceArray> weights_, mask_;
    Stack weights_stack_, mask_stack_;
};

} // namespace

void register_device_plucker(py::module_ &m) {
    m.def(
        "plucker_mix",
        [](const py::tuple &where, const py::object &z, const py::object &weights, const py::object &mask, const py::object &out,
           const Offsets &offsets, const py::tuple &settings, std::int64_t ring, std::int64_t first) {
            const Call call(where);
            const Input input(call, z, weights, mask, offsets, ring, first);
            const DeviceArray xo(out, "out", call, true);
            input.apart(xo);
            const auto so = xo.stack(input.batch);
            const auto o = options_of(offsets, settings);
            const Memory memory(call, cuda::plucker_workspace(input.in, o, 0, false, call.device));
            const py::gil_scoped_release release;
            cuda::plucker_mix(memory.context(), input.in, o, so);
        },
        py::arg("call"), py::arg("z"), py::arg("weights"), py::arg("mask"), py::arg("out"), py::arg("offsets"), py::arg("settings"),
        py::arg("ring") = 0, py::arg("first") = 0);
    m.def(
        "plucker_mix_backward",
        [](const py::tuple &where, const py::object &grad, const py::object &z, const py::object &weights, const py::object &mask,
           const py::object &dz, const py::object &dweights, const Offsets &offsets, const py::tuple &settings) {
            const Call call(where);
            const Input input(call, z, weights, mask, offsets);
            const DeviceArray xg(grad, "grad", call), xd(dz, "dz", call);
            std::optional<DeviceArray> xw;
            Stack sw;
            if (!dweights.is_none()) {
                xw.emplace(dweights, "dweights", call);
                sw = xw->stack(input.batch);
            }
            const auto sg = xg.stack(input.batch), sd = xd.stack(input.batch);
            const auto o = options_of(offsets, settings);
            const Memory memory(call, cuda::plucker_workspace(input.in, o, 0, true, call.device));
            const py::gil_scoped_release release;
            cuda::plucker_mix_backward(memory.context(), sg, input.in, o, sd, xw ? &sw : nullptr);
        },
        py::arg("call"), py::arg("grad"), py::arg("z"), py::arg("weights"), py::arg("mask"), py::arg("dz"), py::arg("dweights"),
        py::arg("offsets"), py::arg("settings"));
    m.def(
        "plucker_mix_project",
        [](const py::tuple &where, const py::object &z, const py::object &weights, const py::object &mask, const py::object &w,
           const py::object &b, const py::object &out, const Offsets &offsets, const py::tuple &settings, std::int64_t ring, std::int64_t first) {
            const Call call(where);
            const Input input(call, z, weights, mask, offsets, ring, first);
            const DeviceArray xw(w, "W", call), xo(out, "out", call, true);
            std::optional<DeviceArray> xb;
            Stack sb;
            if (!b.is_none()) {
                xb.emplace(b, "b", call);
                sb = xb->stack({}, 1);
                require_apart(xo, *xb);
            }
            input.apart(xo);
            require_apart(xo, xw);
            const auto sw = xw.stack({});
            const auto so = xo.stack(input.batch);
            const auto o = options_of(offsets, settings);
            const Memory memory(call, cuda::plucker_workspace(input.in, o, sw.rows, false, call.device));
            const py::gil_scoped_release release;
            cuda::plucker_mix_project(memory.context(), input.in, sw, xb ? &sb : nullptr, o, so);
        },
        py::arg("call"), py::arg("z"), py::arg("weights"), py::arg("mask"), py::arg("w"), py::arg("b"), py::arg("out"), py::arg("offsets"),
        py::arg("settings"), py::arg("ring") = 0, py::arg("first") = 0);
    m.def(
        "plucker_mix_project_backward",
        [](const py::tuple &where, const py::object &grad, const py::object &z, const py::object &weights, const py::object &mask,
           const py::object &w, const py::object &b, const py::object &dz, const py::object &dw, const py::object &db, const py::object &dweights,
           const Offsets &offsets, const py::tuple &settings) {
            const Call call(where);
            const Input input(call, z, weights, mask, offsets);
            const DeviceArray xg(grad, "grad", call), xw(w, "W", call), xdz(dz, "dz", call), xdw(dw, "dW", call);
            std::optional<DeviceArray> xb, xdb, xdweights;
            Stack sb, sdb, sdweights;
            if (!b.is_none()) {
                xb.emplace(b, "b", call);
                sb = xb->stack({}, 1);
                xdb.emplace(db, "db", call);
                sdb = xdb->stack({}, 1);
            }
            if (!dweights.is_none()) {
                xdweights.emplace(dweights, "dweights", call);
                sdweights = xdweights->stack(input.batch);
            }
            const auto sg = xg.stack(input.batch), sw = xw.stack({}), sdz = xdz.stack(input.batch), sdw = xdw.stack({});
            const auto o = options_of(offsets, settings);
            const Memory memory(call, cuda::plucker_workspace(input.in, o, sw.rows, true, call.device));
            const py::gil_scoped_release release;
            cuda::plucker_mix_project_backward(memory.context(), sg, input.in, sw, xb ? &sb : nullptr, o, sdz, sdw, xdb ? &sdb : nullptr,
                                               xdweights ? &sdweights : nullptr);
        },
        py::arg("call"), py::arg("grad"), py::arg("z"), py::arg("weights"), py::arg("mask"), py::arg("w"), py::arg("b"), py::arg("dz"),
        py::arg("dw"), py::arg("db"), py::arg("dweights"), py::arg("offsets"), py::arg("settings"));
}

} // namespace subspan::bind
