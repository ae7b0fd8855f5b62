#include "packed.hpp"
#include "register.hpp"
#include "subspan/cuda/int4.hpp"

namespace subspan::bind {

void register_device_int4(py::module_ &m) {
    m.def(
        "quantize_int4",
        [](const py::tuple &where, const py::object &u, std::int64_t group, const py::tuple &parts) {
            const Call call(where);
            const DeviceArray xu(u, "U", call);
            const PackedArray packed(parts, call);
            packed.require_wide(xu.dtype());
            const auto su = xu.stack({});
            const auto &c = packed.codes();
            if (c.rows != su.rows || c.cols != su.cols || c.group != group) throw py::value_error("codes do not fit U");
            const Memory memory(call, 0);
            const py::gil_scoped_release release;
            cuda::quantize_int4(memory.context(), su, group, const_cast<std::uint8_t *>(c.codes), const_cast<void *>(c.scale), const_cast<void *>(c.zero));
        },
        py::arg("call"), py::arg("u"), py::arg("group"), py::arg("parts"));
    m.def(
        "unpack_int4",
        [](const py::tuple &where, const py::tuple &parts, const py::object &out) {
            const Call call(where);
            const PackedArray packed(parts, call);
            const DeviceArray xo(out, "out", call, true);
            packed.require_wide(xo.dtype());
            const auto so = xo.stack({});
            const Memory memory(call, 0);
            const py::gil_scoped_release release;
            cuda::unpack_int4(memory.context(), packed.codes(), so);
        },
        py::arg("call"), py::arg("parts"), py::arg("out"));
    m.def(
        "int4_product",
        [](const py::tuple &where, const py::tuple &parts, const py::object &x, bool left, bool transpose, double alpha, const py::object &out) {
            const Call call(where);
            const PackedArray packed(parts, call);
            const DeviceArray xx(x, "X", call), xo(out, "out", call, true);
            packed.require_wide(xo.dtype());
            require_apart(xo, xx);
            const auto batch = xo.leading();
            const auto sx = xx.stack(batch), so = xo.stack(batch);
            const Memory memory(call, cuda::int4_product_workspace(packed.codes(), sx, call.device));
            const py::gil_scoped_release release;
            cuda::int4_product(memory.context(), packed.codes(), sx, left, transpose, alpha, so);
        },
        py::arg("call"), py::arg("parts"), py::arg("x"), py::arg("left"), py::arg("transpose"), py::arg("alpha"), py::arg("out"));
}

} // namespace subspan::bind
