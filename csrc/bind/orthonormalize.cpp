#include "convert.hpp"
#include "lapack_capsules.hpp"
#include "register.hpp"
#include "subspan/hadamard.hpp"
#include "subspan/orthonormalize.hpp"

namespace subspan::bind {

void register_orthonormalize(py::module_ &m) {
    m.def(
        "orthonormalize",
        [](const py::object &a, const py::object &out, int method, bool complete, const py::object &ranks) {
            load_lapack();
            const Array xa(a, "A"), xo(out, "out", true);
            xo.require_dtype(xa.dtype());
            const auto batch = xa.leading();
            require_apart(xo, xa, true);
            dispatch(xa.dtype(), [&](auto t) {
                using T = decltype(t);
                const auto va = xa.stack<const T>(batch);
                const auto vo = xo.stack<T>(batch);
                if (vo.first.col_stride != 1 && vo.cols() > 1 && vo.rows() > 0 && vo.size() > 0)
                    throw py::value_error("out must have contiguous rows");
                std::int64_t *seen = nullptr;
                if (!ranks.is_none()) {
                    auto counts = py::cast<py::array_t<std::int64_t, py::array::c_style>>(ranks);
                    if (std::int64_t(counts.size()) != va.size()) throw py::value_error("ranks do not fit A");
                    seen = counts.mutable_data();
                }
                const py::gil_scoped_release release;
                const double n = double(va.cols()), flops = double(va.size()) * n * n * (12.0 * double(va.rows()) + 40.0 * n);
                whole<T>(vo, vo.first.data == va.first.data, flops, [&](const StackView<T> &to) {
                    subspan::orthonormalize<T>(va, to, static_cast<Orthonormalization>(method), complete, seen);
                });
            });
        },
        py::arg("a"), py::arg("out"), py::arg("method"), py::arg("complete"), py::arg("ranks") = py::none());
    m.def(
        "random_orthogonal",
        [](std::uint64_t key, const py::object &out) {
            const Array xo(out, "out", true);
            const auto batch = xo.leading();
            dispatch(xo.dtype(), [&](auto t) {
                using T = decltype(t);
                const auto vo = xo.stack<T>(batch);
                const py::gil_scoped_release release;
                subspan::random_orthogonal<T>(key, vo);
            });
        },
        py::arg("key"), py::arg("out"));
    m.def(
        "orthonormality_defect",
        [](const py::object &u) {
            const Array xu(u, "U");
            const auto batch = xu.leading();
            return dispatch(xu.dtype(), [&](auto t) {
                using T = decltype(t);
                const auto vu = xu.stack<const T>(batch);
                const py::gil_scoped_release release;
                return subspan::orthonormality_defect<T>(vu);
            });
        },
        py::arg("u"));
    m.def(
        "hadamard",
        [](const py::object &x, const py::object &out, double scale, bool transpose, bool check) {
            const Array xx(x, "x"), xo(out, "out", true);
            xo.require_dtype(xx.dtype());
            require_apart(xo, xx, true);
            const auto batch = xx.leading();
            dispatch(xx.dtype(), [&](auto t) {
                using T = decltype(t);
                const auto vx = xx.stack<const T>(batch);
                const auto vo = xo.stack<T>(batch);
                const py::gil_scoped_release release;
                whole<T>(vo, vo.first.data == vx.first.data, 0.0,
                         [&](const StackView<T> &to) { subspan::hadamard<T>(vx, to, static_cast<T>(scale), transpose, check); });
            });
        },
        py::arg("x"), py::arg("out"), py::arg("scale"), py::arg("transpose"), py::arg("check"));
    m.def(
        "all_finite",
        [](const py::object &x) {
            const Array xx(x, "x");
            const auto batch = xx.leading();
            return dispatch(xx.dtype(), [&](auto t) {
                using T = decltype(t);
                const auto vx = xx.stack<const T>(batch);
                const py::gil_scoped_release release;
                return subspan::all_finite<T>(vx);
            });
        },
        py::arg("x"));
    m.def("hadamard_base", &hadamard_base, py::arg("n"));
}

} // namespace subspan::bind
