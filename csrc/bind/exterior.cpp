#include "subspan/exterior.hpp"

#include "convert.hpp"
#include "register.hpp"

#include <vector>

namespace subspan::bind {
namespace {

using Shape = std::vector<std::int64_t>;

void same_dtype(const Array &first, std::initializer_list<const Array *> others) {
    for (const Array *x : others) x->require_dtype(first.dtype());
}

} // namespace

void register_exterior(py::module_ &m) {
    m.def(
        "plucker_coordinates",
        [](const py::object &a, const py::object &out) {
            const Array xa(a, "A"), xo(out, "out", true);
            same_dtype(xa, {&xo});
            require_apart(xo, xa);
            const Shape batch = xa.leading();
            return dispatch(xa.dtype(), [&](auto s) {
                using T = decltype(s);
                const auto va = xa.stack<const T>(batch);
                const auto vo = xo.row_stack<T>(batch);
                const py::gil_scoped_release release;
                return subspan::plucker_coordinates<T>(va, vo);
            });
        },
        py::arg("a"), py::arg("out"));
    m.def(
        "plucker_coordinates_backward",
        [](const py::object &grad, const py::object &a, const py::object &da) {
            const Array xg(grad, "grad"), xa(a, "A"), xda(da, "dA", true);
            same_dtype(xa, {&xg, &xda});
            const Shape batch = xa.leading();
            return dispatch(xa.dtype(), [&](auto s) {
                using T = decltype(s);
                const auto vg = xg.row_stack<const T>(batch);
                const auto va = xa.stack<const T>(batch);
                const auto vda = xda.stack<T>(batch);
                const py::gil_scoped_release release;
                return subspan::plucker_coordinates_backward<T>(vg, va, vda);
            });
        },
        py::arg("grad"), py::arg("a"), py::arg("da"));
    m.def(
        "wedge",
        [](const py::object &a, const py::object &b, const py::object &out, std::int64_t n, std::int64_t k, std::int64_t l) {
            const Array xa(a, "z"), xb(b, "w"), xo(out, "out", true);
            same_dtype(xa, {&xb, &xo});
            require_apart(xo, xa);
            require_apart(xo, xb);
            const Shape batch = xo.leading(1);
            return dispatch(xa.dtype(), [&](auto s) {
                using T = decltype(s);
                const auto va = xa.row_stack<const T>(batch), vb = xb.row_stack<const T>(batch);
                const auto vo = xo.row_stack<T>(batch);
                const py::gil_scoped_release release;
                return subspan::wedge<T>(va, vb, n, k, l, vo);
            });
        },
        py::arg("a"), py::arg("b"), py::arg("out"), py::arg("n"), py::arg("k"), py::arg("l"));
    m.def(
        "wedge_backward",
        [](const py::object &grad, const py::object &a, const py::object &b, const py::object &da, const py::object &db, std::int64_t n,
           std::int64_t k, std::int64_t l) {
            const Array xg(grad, "grad"), xa(a, "z"), xb(b, "w"), xda(da, "dz", true), xdb(db, "dw", true);
            same_dtype(xa, {&xg, &xb, &xda, &xdb});
            const Shape batch = xg.leading(1);
            return dispatch(xa.dtype(), [&](auto s) {
                using T = decltype(s);
                const auto vg = xg.row_stack<const T>(batch), va = xa.row_stack<const T>(batch), vb = xb.row_stack<const T>(batch);
                const auto vda = xda.row_stack<T>(batch), vdb = xdb.row_stack<T>(batch);
                const py::gil_scoped_release release;
                return subspan::wedge_backward<T>(vg, va, vb, n, k, l, vda, vdb);
            });
        },
        py::arg("grad"), py::arg("a"), py::arg("b"), py::arg("da"), py::arg("db"), py::arg("n"), py::arg("k"), py::arg("l"));
    m.def(
        "plucker_relations",
        [](const py::object &p, const py::object &out, std::int64_t n, std::int64_t k) {
            const Array xp(p, "p"), xo(out, "out", true);
            same_dtype(xp, {&xo});
            require_apart(xo, xp);
            const Shape batch = xo.leading();
            return dispatch(xp.dtype(), [&](auto s) {
                using T = decltype(s);
                const auto vp = xp.row_stack<const T>(batch);
                const auto vo = xo.stack<T>(batch);
                const py::gil_scoped_release release;
                return subspan::plucker_relations<T>(vp, n, k, vo);
            });
        },
        py::arg("p"), py::arg("out"), py::arg("n"), py::arg("k"));
    m.def(
        "plucker_relations_backward",
        [](const py::object &grad, const py::object &p, const py::object &dp, std::int64_t n, std::int64_t k) {
            const Array xg(grad, "grad"), xp(p, "p"), xdp(dp, "dp", true);
            same_dtype(xp, {&xg, &xdp});
            const Shape batch = xg.leading();
            return dispatch(xp.dtype(), [&](auto s) {
                using T = decltype(s);
                const auto vg = xg.stack<const T>(batch);
                const auto vp = xp.row_stack<const T>(batch);
                const auto vdp = xdp.row_stack<T>(batch);
                const py::gil_scoped_release release;
                return subspan::plucker_relations_backward<T>(vg, vp, n, k, vdp);
            });
        },
        py::arg("grad"), py::arg("p"), py::arg("dp"), py::arg("n"), py::arg("k"));
    m.def(
        "plucker_basis",
        [](const py::object &p, const py::object &out, std::int64_t n, std::int64_t k) {
            const Array xp(p, "p"), xo(out, "out", true);
            same_dtype(xp, {&xo});
            require_apart(xo, xp);
            const Shape batch = xo.leading();
            return dispatch(xp.dtype(), [&](auto s) {
                using T = decltype(s);
                const auto vp = xp.row_stack<const T>(batch);
                const auto vo = xo.stack<T>(batch);
                const py::gil_scoped_release release;
                return subspan::plucker_basis<T>(vp, n, k, vo);
            });
        },
        py::arg("p"), py::arg("out"), py::arg("n"), py::arg("k"));
    m.def(
        "plucker_basis_backward",
        [](const py::object &grad, const py::object &p, const py::object &dp, std::int64_t n, std::int64_t k) {
            const Array xg(grad, "grad"), xp(p, "p"), xdp(dp, "dp", true);
            same_dtype(xp, {&xg, &xdp});
            const Shape batch = xg.leading();
            return dispatch(xp.dtype(), [&](auto s) {
                using T = decltype(s);
                const auto vg = xg.stack<const T>(batch);
                const auto vp = xp.row_stack<const T>(batch);
                const auto vdp = xdp.row_stack<T>(batch);
                const py::gil_scoped_release release;
                return subspan::plucker_basis_backward<T>(vg, vp, n, k, vdp);
            });
        },
        py::arg("grad"), py::arg("p"), py::arg("dp"), py::arg("n"), py::arg("k"));
    m.def(
        "complement_signs",
        [](std::int64_t n, std::int64_t k, const py::object &out) {
            const Array xo(out, "out", true);
            xo.require_dtype(DType::f64);
            const std::int64_t length = subspan::binomial(n, k);
            double *to = xo.vector<double>(length);
            const py::gil_scoped_release release;
            subspan::complement_signs(n, k, to);
        },
        py::arg("n"), py::arg("k"), py::arg("out"));
}

} // namespace subspan::bind
