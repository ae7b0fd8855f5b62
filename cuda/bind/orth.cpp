#include "device_array.hpp"
#include "packed.hpp"
#include "register.hpp"
#include "subspan/cuda/apply_core.hpp"
#include "subspan/cuda/gram_core.hpp"

#include <deque>
#include <optional>
#include <vector>

namespace subspan::bind {
namespace {

cuda::CoreOptions options(int kind, double value, double alpha, bool left) {
    cuda::CoreOptions o;
    o.kind = static_cast<cuda::CoreOptions::Kind>(kind);
    o.value = value;
    o.alpha = alpha;
    o.left = left;
    return o;
}

} // namespace

void register_device_orth(py::module_ &m) {
    m.def(
        "apply_core",
        [](const py::tuple &where, const py::object &c, const py::object &v, const py::object &core, int kind, double value, double alpha,
           bool left, const py::object &out, const py::object &source) {
            const Call call(where);
            const DeviceArray xc(c, "C", call), xo(out, "out", call, true);
            std::optional<DeviceArray> xv, xm, xs;
            std::optional<PackedArray> packed;
            if (py::isinstance<py::tuple>(v))
                packed.emplace(py::cast<py::tuple>(v), call);
            else
                xv.emplace(v, "V", call);
            if (!core.is_none()) xm.emplace(core, "M", call);
            if (!source.is_none()) xs.emplace(source, "source", call);
            const auto batch = xo.leading();
            xo.require_dtype(xc.dtype());
            require_apart(xo, xc, true);
            if (xv) {
                xv->require_dtype(xc.dtype());
                require_apart(xo, *xv);
            }
            if (xm) require_apart(xo, *xm);
            if (xs) require_apart(xo, *xs);
            cuda::CoreCall k;
            k.c = xc.stack(batch);
            k.out = xo.stack(batch);
            if (packed) {
                packed->require_wide(xc.dtype());
                k.packed = &packed->codes();
                k.v = packed->as_stack(xc.dtype());
            } else {
                k.v = xv->stack(batch);
            }
            Stack sm, ss;
            if (xm) {
                sm = xm->stack(batch, kind == cuda::CoreOptions::full ? 2 : 1);
                k.core = &sm;
            }
            if (xs) {
                ss = xs->stack(batch);
                k.source = &ss;
            }
            const auto o = options(kind, value, alpha, left);
            const Memory memory(call, cuda::apply_core_workspace(k, o, call.device));
            const py::gil_scoped_release release;
            cuda::apply_core(memory.context(), k, o);
        },
        py::arg("call"), py::arg("c"), py::arg("v"), py::arg("core"), py::arg("kind"), py::arg("value"), py::arg("alpha"), py::arg("left"),
        py::arg("out"), py::arg("source") = py::none());
    m.def(
        "require_apart",
        [](const py::tuple &where, const py::object &out, const py::object &other, const std::string &name) {
            const Call call(where);
            require_apart(DeviceArray(out, "out", call), DeviceArray(other, name.c_str(), call));
        },
        py::arg("call"), py::arg("out"), py::arg("other"), py::arg("name"));
    const auto from_basis = [&](const char *name, auto room, auto f) {
        m.def(
            name,
            [room, f](const py::tuple &where, const py::object &v, const py::object &out) {
                const Call call(where);
                const DeviceArray xv(v, "V", call), xo(out, "out", call, true);
                const auto batch = xo.leading();
                require_apart(xo, xv);
                const auto sv = xv.stack(batch), so = xo.stack(batch);
                const Memory memory(call, room(sv, call.device));
                const py::gil_scoped_release release;
                f(memory.context(), sv, so);
            },
            py::arg("call"), py::arg("v"), py::arg("out"));
    };
    from_basis("gram_core", &cuda::gram_core_workspace, &cuda::gram_core);
    from_basis("span_basis", &cuda::span_basis_workspace, &cuda::span_basis);
    m.def(
        "apply_core_group",
        [](const py::tuple &where, const py::list &c, const py::list &v, double value, double alpha, bool left, const py::list &out) {
            const Call call(where);
            if (c.size() != v.size() || c.size() != out.size()) throw py::value_error("C, U and out must be lists of one length");
            std::deque<std::string> names; // of the arrays, whose elements stay where they are
            std::deque<DeviceArray> arrays;
            std::vector<cuda::CoreCall> calls(c.size());
            std::vector<Layout> outs;
            std::vector<std::vector<Layout>> inputs;
            for (std::size_t i = 0; i < c.size(); ++i) {
                const auto array = [&](const py::list &list, const char *name, bool writable) -> const DeviceArray & {
                    names.push_back(std::string(name) + "[" + std::to_string(i) + "]");
                    return arrays.emplace_back(list[i], names.back().c_str(), call, writable);
                };
                const DeviceArray &xc = array(c, "C", false), &xv = array(v, "U", false), &xo = array(out, "out", true);
                if (xc.ndim() != 2 || xv.ndim() != 2) throw py::value_error("matrices of a list have two dimensions, got " + std::string(xc.name()) + " " + xc.shape_text());
                require_apart(xo, xc, true);
                require_apart(xo, xv);
                outs.push_back(xo.layout());
                inputs.push_back({xc.layout(), xv.layout()});
                calls[i].c = xc.stack({});
                calls[i].v = xv.stack({});
                calls[i].out = xo.stack({});
            }
            require_entries_apart(outs, inputs);
            const auto o = options(cuda::CoreOptions::scalar, value, alpha, left);
            const Memory memory(call, cuda::apply_core_group_workspace(calls, o, call.device));
            const py::gil_scoped_release release;
            cuda::apply_core_group(memory.context(), calls, o);
        },
        py::arg("call"), py::arg("c"), py::arg("v"), py::arg("value"), py::arg("alpha"), py::arg("left"), py::arg("out"));
}

} // namespace subspan::bind
