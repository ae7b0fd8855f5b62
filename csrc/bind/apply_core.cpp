#include "int4.hpp"
#include "register.hpp"
#include "lapack_capsules.hpp"
#include "subspan/apply_core.hpp"
#include "subspan/gram_core.hpp"
#include "subspan/int4.hpp"

namespace subspan::bind {
void register_apply_core(py::module_ &m) {
    m.def(
        "apply_core",
        [](const py::object &c, const py::object &v, const py::object &core, double scalar, double alpha, bool left,
           const py::object &out, bool check, const py::object &source) {
            const Array xc(c, "C"), xo(out, "out", true);
            const BasisArgument xv(v);
            std::optional<Array> xm, xs;
            if (!core.is_none()) xm.emplace(core, "M");
            if (!source.is_none()) xs.emplace(source, "source");
            if (xv.dtype() != xc.dtype())
                throw py::type_error(std::string("V must be ") + xc.dtype_name() + " as C is, got " +
                                     (xv.dtype() == DType::f32 ? "float32" : "float64"));
            for (const Array *a : {&xo, xm ? &*xm : &xo, xs ? &*xs : &xo}) a->require_dtype(xc.dtype());
            xc.require_matrices();
            const auto batch = xc.leading();
            require_apart(xo, xc, true);
            xv.require_apart_from(xo);
            if (xm) require_apart(xo, *xm);
            if (xs) require_apart(xo, *xs);
            dispatch(xc.dtype(), [&](auto t) {
                using T = decltype(t);
                const StackView<const T> vc = xc.stack<const T>(batch);
                const StackView<T> vo = xo.stack<T>(batch);
                Int4View<T> view;
                const Basis<T> basis = xv.get<T>(batch, view);
                Core<T> k(static_cast<T>(scalar));
                if (xm)
                    k = xm->ndim() == 1 ? Core<T>(Core<T>::Kind::diagonal, xm->row_stack<const T>(batch))
                                        : Core<T>::full(xm->stack<const T>(batch));
                StackView<const T> vs;
                if (xs) {
                    vs = xs->stack<const T>(batch);
                    if (vs.rows() != vc.rows() || vs.cols() != vc.cols())
                        throw py::value_error("source must have the shape of C, got " + xs->shape_text());
                }
                const py::gil_scoped_release release;
                subspan::apply_core<T>(vc, basis, k, static_cast<T>(alpha), left ? Side::left : Side::right, vo, check,
                                       xs ? &vs : nullptr);
            });
        },
        py::arg("c"), py::arg("v"), py::arg("core"), py::arg("scalar"), py::arg("alpha"), py::arg("left"),
        py::arg("out"), py::arg("check"), py::arg("source") = py::none());
    m.def(
        "gram_core",
        [](const py::object &v, const py::object &out) {
            load_lapack();
            const BasisArgument xv(v);
            const Array xo(out, "M", true);
            xo.require_dtype(xv.dtype());
            const auto batch = xv.dense() != nullptr ? xv.dense()->leading() : std::vector<std::int64_t>{};
            double worst = 0;
            dispatch(xv.dtype(), [&](auto t) {
                using T = decltype(t);
                Int4View<T> view;
                const Basis<T> basis = xv.get<T>(batch, view);
                const StackView<T> vo = xo.stack<T>(batch);
                const py::gil_scoped_release release;
                for (std::int64_t i = 0; i < (vo.empty() ? 0 : vo.size()); ++i)
                    worst = std::max(worst, subspan::gram_core<T>(basis, i, vo[i]));
            });
            return worst;
        },
        py::arg("v"), py::arg("out"));
    m.def(
        "quantize_int4",
        [](const py::object &a, std::int64_t group, const py::object &codes, const py::object &scale, const py::object &zero) {
            const Array xa(a, "U"), xs(scale, "scale", true), xz(zero, "zero", true);
            auto bytes = py::cast<py::array_t<std::uint8_t>>(codes);
            dispatch(xa.dtype(), [&](auto t) {
                using T = decltype(t);
                const auto va = xa.matrix<const T>();
                const std::int64_t n = va.rows * va.cols, groups = (n + group - 1) / group;
                T *s = xs.vector<T>(groups), *z = xz.vector<T>(groups);
                if (bytes.size() != (n + 1) / 2) throw py::value_error("codes do not fit the shape");
                std::uint8_t *p = bytes.mutable_data();
                const py::gil_scoped_release release;
                subspan::quantize_int4<T>(va, group, p, s, z);
            });
        },
        py::arg("a"), py::arg("group"), py::arg("codes"), py::arg("scale"), py::arg("zero"));
    m.def(
        "unpack_int4",
        [](const py::object &u, const py::object &out) {
            const Int4 xu(u, "U");
            const Array xo(out, "out", true);
            xo.require_dtype(xu.dtype());
            dispatch(xu.dtype(), [&](auto t) {
                using T = decltype(t);
                const auto view = xu.view<T>();
                const auto dense = xo.matrix<T>();
                const py::gil_scoped_release release;
                subspan::unpack<T>(view, dense);
            });
        },
        py::arg("u"), py::arg("out"));
    m.def(
        "int4_product",
        [](const py::object &u, const py::object &x, bool left, bool transpose, const py::object &out) {
            const Int4 xu(u, "U");
            const Array xx(x, "X"), xo(out, "out", true);
            if (xx.dtype() != xu.dtype())
                throw py::type_error(std::string("X must be ") + (xu.dtype() == DType::f32 ? "float32" : "float64") +
                                     " as the scales of the basis are");
            xo.require_dtype(xu.dtype());
            const auto batch = xx.leading();
            require_apart(xo, xx);
            xu.require_apart_from(xo);
            dispatch(xu.dtype(), [&](auto t) {
                using T = decltype(t);
                const auto view = xu.view<T>();
                const auto vx = xx.stack<const T>(batch);
                const auto vo = xo.stack<T>(batch);
                const py::gil_scoped_release release;
                subspan::int4_product<T>(view, vx, left, transpose, vo);
            });
        },
        py::arg("u"), py::arg("x"), py::arg("left"), py::arg("transpose"), py::arg("out"));
    m.def(
        "product",
        [](const py::object &a, const py::object &b, const py::object &out) {
            const Array xa(a, "A"), xb(b, "B"), xo(out, "out", true);
            xb.require_dtype(xa.dtype());
            xo.require_dtype(xa.dtype());
            const auto batch = xo.leading();
            require_apart(xo, xa);
            require_apart(xo, xb);
            dispatch(xa.dtype(), [&](auto t) {
                using T = decltype(t);
                const auto va = xa.stack<const T>(batch), vb = xb.stack<const T>(batch);
                const auto vo = xo.stack<T>(batch);
                const py::gil_scoped_release release;
                subspan::product<T>(va, vb, vo);
            });
        },
        py::arg("a"), py::arg("b"), py::arg("out"));
    m.def(
        "outer_product",
        [](const py::object &a, const py::object &out) {
            const Array xa(a, "A"), xo(out, "out", true);
            xo.require_dtype(xa.dtype());
            const auto batch = xo.leading();
            require_apart(xo, xa);
            dispatch(xa.dtype(), [&](auto t) {
                using T = decltype(t);
                const auto va = xa.stack<const T>(batch);
                const auto vo = xo.stack<T>(batch);
                const py::gil_scoped_release release;
                subspan::outer_product<T>(va, vo);
            });
        },
        py::arg("a"), py::arg("out"));
}

} // namespace subspan::bind
