#include "device.hpp"
#include "register.hpp"
#include "subspan/cuda/truncated_svd.hpp"

#include <deque>

namespace subspan::bind {

void register_device_truncated(py::module_ &m) {
    m.def(
        "truncated_svd",
        [](const py::tuple &where, const py::list &calls, std::int64_t vectors, std::int64_t power_iterations, bool complete) {
            const Call call(where);
            std::deque<Array> arrays; // whose elements stay where they are
            std::vector<cuda::TruncatedCall> c;
            for (const auto item : calls) { // A, initial, U, S, Vh, key
                const auto parts = py::cast<py::tuple>(item);
                cuda::TruncatedCall one;
                const auto matrix = [&](int i, const char *name, int core) {
                    const py::object x = parts[std::size_t(i)];
                    return x.is_none() ? Stack{} : stack(arrays.emplace_back(call, x, name), {}, core);
                };
                one.a = matrix(0, "A", 2);
                one.initial = matrix(1, "initial", 2);
                one.u = matrix(2, "U", 2);
                one.s = matrix(3, "S", 1);
                one.vh = matrix(4, "Vh", 2);
                one.key = parts[5].cast<std::uint64_t>();
                c.push_back(one);
            }
            const cuda::TruncatedOptions o{vectors, power_iterations, complete};
            const Memory memory(call, cuda::truncated_svd_workspace(c, o, call.device));
            const py::gil_scoped_release release;
            cuda::truncated_svd(memory.context(), c, o);
        },
        py::arg("call"), py::arg("calls"), py::arg("vectors"), py::arg("power_iterations"), py::arg("complete"));
    m.def(
        "complete_vectors",
        [](const py::tuple &where, const py::object &vh, const py::object &values, std::uint64_t key) {
            const Call call(where);
            const Array xv(call, vh, "Vh", Access::in_place), xs(call, values, "S");
            const auto sv = stack(xv, {}), ss = stack(xs, {}, 1);
            const Memory memory(call, cuda::complete_vectors_workspace(sv, call.device));
            const py::gil_scoped_release release;
            cuda::complete_vectors(memory.context(), sv, ss, key);
        },
        py::arg("call"), py::arg("vh"), py::arg("values"), py::arg("key"));
    m.def(
        "squared_norm",
        [](const py::tuple &where, const py::object &a, const py::object &out) {
            const Call call(where);
            const Array xa(call, a, "A"), xo(call, out, "out");
            xo.require_dtype(DType::f64);
            xo.require_shape({1});
            const auto sa = stack(xa, {});
            const Memory memory(call, cuda::squared_norm_workspace());
            const py::gil_scoped_release release;
            cuda::squared_norm(memory.context(), sa, static_cast<double *>(xo.data()));
        },
        py::arg("call"), py::arg("a"), py::arg("out"));
}

} // namespace subspan::bind
