#include "convert.hpp"
#include "lapack_capsules.hpp"
#include "register.hpp"
#include "subspan/householder.hpp"

#include <pybind11/stl.h>

namespace subspan::bind {
namespace {

// V and, when given, tau: two arrays with the same leading axes.
class ReflectionsArgument {
  public:
    ReflectionsArgument(const py::object &v, const py::object &tau) : v_(v, "V") {
        v_.require_matrices();
        if (tau.is_none()) return;
        tau_.emplace(tau, "tau");
        tau_->require_dtype(v_.dtype());
        auto want = v_.leading();
        want.push_back(v_.shape(v_.ndim() - 1));
        if (tau_->leading(0) != want)
            throw py::value_error("tau must have one entry for each column of V, shape " + v_.shape_text() + ", got shape " +
                                  tau_->shape_text());
    }
    const Array &v() const { return v_; }
    const Array *tau() const { return tau_ ? &*tau_ : nullptr; }

    template <class T> struct View {
        StackView<const T> tau;
        Reflections<T> h;
    };
    template <class T> void view(const std::vector<std::int64_t> &batch, View<T> &out) const {
        out.h.v = v_.stack<const T>(batch);
        if (!tau_) return;
        out.tau = tau_->row_stack<const T>(batch);
        out.h.tau = &out.tau;
    }

  private:
    Array v_;
    std::optional<Array> tau_;
};

Side side_of(bool left) { return left ? Side::left : Side::right; }

} // namespace

void register_householder(py::module_ &m) {
    m.def(
        "householder_qr", // with an order (int64, C order) to write to: by pivots
        [](const py::object &a, const py::object &v, const py::object &r, const py::object &tau, const py::object &t,
           std::optional<py::array_t<std::int64_t, py::array::c_style>> order) {
            const Array xa(a, "A"), xv(v, "V", true), xr(r, "R", true), xtau(tau, "tau", true), xt(t, "T", true);
            for (const Array *x : {&xv, &xr, &xtau, &xt}) x->require_dtype(xa.dtype());
            const auto batch = xa.leading();
            if (order) load_lapack();
            dispatch(xa.dtype(), [&](auto s) {
                using T = decltype(s);
                const auto va = xa.stack<const T>(batch);
                const auto vv = xv.stack<T>(batch), vr = xr.stack<T>(batch), vt = xt.stack<T>(batch);
                const auto vtau = xtau.row_stack<T>(batch);
                if (order && std::int64_t(order->size()) != va.size() * va.cols()) throw py::value_error("order does not fit A");
                std::int64_t *to = order ? order->mutable_data() : nullptr;
                const py::gil_scoped_release release;
                if (to != nullptr)
                    subspan::householder_qr_pivoted<T>(va, vv, vr, vtau, vt, to);
                else
                    subspan::householder_qr<T>(va, vv, vr, vtau, vt);
            });
        },
        py::arg("a"), py::arg("v"), py::arg("r"), py::arg("tau"), py::arg("t"), py::arg("order").noconvert() = py::none());
    m.def(
        "factored_apply",
        [](const py::object &v, const py::object &t, const py::object &c, bool left, bool transpose,
           const py::object &out, bool check) {
            const Array xv(v, "V"), xt(t, "T"), xc(c, "C"), xo(out, "out", true);
            if (xv.dtype() != xc.dtype() || xt.dtype() != xc.dtype())
                throw py::type_error(std::string("C is ") + xc.dtype_name() + " and Q is " + xv.dtype_name());
            xo.require_dtype(xc.dtype());
            xc.require_matrices();
            const auto batch = xc.leading();
            require_apart(xo, xc, true);
            require_apart(xo, xv);
            require_apart(xo, xt);
            dispatch(xc.dtype(), [&](auto s) {
                using T = decltype(s);
                const auto vv = xv.stack<const T>(batch), vt = xt.stack<const T>(batch), vc = xc.stack<const T>(batch);
                const auto vo = xo.stack<T>(batch);
                const py::gil_scoped_release release;
                const double flops = 4.0 * double(vc.size()) * double(vc.rows()) * double(vc.cols()) * double(vv.cols());
                whole<T>(vo, vo.first.data == vc.first.data, flops, [&](const StackView<T> &to) {
                    subspan::factored_apply<T>(vv, vt, vc, side_of(left), transpose, to, check);
                });
                if (check) require_no_overflow<T>(vo, "Q C", {});
            });
        },
        py::arg("v"), py::arg("t"), py::arg("c"), py::arg("left"), py::arg("transpose"), py::arg("out"), py::arg("check"));
    m.def(
        "factored_array",
        [](const py::object &v, const py::object &t, const py::object &q) {
            const Array xv(v, "V"), xt(t, "T"), xq(q, "out", true);
            xt.require_dtype(xv.dtype());
            xq.require_dtype(xv.dtype());
            const auto batch = xv.leading();
            dispatch(xv.dtype(), [&](auto s) {
                using T = decltype(s);
                const auto vv = xv.stack<const T>(batch), vt = xt.stack<const T>(batch);
                const auto vq = xq.stack<T>(batch);
                const py::gil_scoped_release release;
                subspan::factored_array<T>(vv, vt, vq);
            });
        },
        py::arg("v"), py::arg("t"), py::arg("q"));
    m.def(
        "householder_apply",
        [](const py::object &v, const py::object &tau, const py::object &c, bool left, bool transpose,
           const py::object &out, bool check) {
            const ReflectionsArgument h(v, tau);
            const Array xc(c, "C"), xo(out, "out", true);
            xc.require_dtype(h.v().dtype());
            xo.require_dtype(h.v().dtype());
            xc.require_matrices();
            const auto batch = xc.leading();
            require_apart(xo, xc, true);
            require_apart(xo, h.v());
            if (h.tau() != nullptr) require_apart(xo, *h.tau());
            dispatch(xc.dtype(), [&](auto s) {
                using T = decltype(s);
                ReflectionsArgument::View<T> r;
                h.view(batch, r);
                const auto vc = xc.stack<const T>(batch);
                const auto vo = xo.stack<T>(batch);
                const py::gil_scoped_release release;
                const double flops = 4.0 * double(vc.size()) * double(vc.rows()) * double(vc.cols()) * double(r.h.v.cols());
                whole<T>(vo, vo.first.data == vc.first.data, flops, [&](const StackView<T> &to) {
                    subspan::householder_apply<T>(r.h, vc, side_of(left), transpose, to, check);
                });
                if (check) require_no_overflow<T>(vo, "H C", {});
            });
        },
        py::arg("v"), py::arg("tau"), py::arg("c"), py::arg("left"), py::arg("transpose"), py::arg("out"), py::arg("check"));
    m.def(
        "householder_apply_backward",
        [](const py::object &v, const py::object &tau, const py::object &c, const py::object &grad, bool left,
           bool transpose, const py::object &dv, const py::object &dtau, const py::object &dc, bool check) {
            const ReflectionsArgument h(v, tau);
            const Array xc(c, "C"), xg(grad, "grad"), xdv(dv, "dV", true), xdc(dc, "dC", true);
            for (const Array *x : {&xc, &xg, &xdv, &xdc}) x->require_dtype(h.v().dtype());
            std::optional<Array> xdtau;
            if (!dtau.is_none()) xdtau.emplace(dtau, "dtau", true);
            const auto batch = xc.leading();
            if (xg.leading(0) != xc.leading(0))
                throw py::value_error("grad must have the shape of C, " + xc.shape_text() + ", got " + xg.shape_text());
            dispatch(xc.dtype(), [&](auto s) {
                using T = decltype(s);
                ReflectionsArgument::View<T> r;
                h.view(batch, r);
                const auto vc = xc.stack<const T>(batch), vg = xg.stack<const T>(batch);
                const auto vdv = xdv.stack<T>(batch), vdc = xdc.stack<T>(batch);
                StackView<T> vdtau;
                if (xdtau) vdtau = xdtau->row_stack<T>(batch);
                const py::gil_scoped_release release;
                subspan::householder_apply_backward<T>(r.h, vc, vg, side_of(left), transpose, vdv,
                                                       xdtau ? &vdtau : nullptr, vdc, check);
                if (!check) return;
                require_no_overflow<T>(vdv, "the gradient of V", {});
                require_no_overflow<T>(vdc, "the gradient of C", {});
                if (xdtau) require_no_overflow<T>(vdtau, "the gradient of tau", {});
            });
        },
        py::arg("v"), py::arg("tau"), py::arg("c"), py::arg("grad"), py::arg("left"), py::arg("transpose"),
        py::arg("dv"), py::arg("dtau"), py::arg("dc"), py::arg("check"));
    m.def(
        "householder_product",
        [](const py::object &v, const py::object &tau, const py::object &q, bool check) {
            const ReflectionsArgument h(v, tau);
            const Array xq(q, "out", true);
            const auto batch = h.v().leading();
            dispatch(h.v().dtype(), [&](auto s) {
                using T = decltype(s);
                ReflectionsArgument::View<T> r;
                h.view(batch, r);
                const auto vq = xq.stack<T>(batch);
                const py::gil_scoped_release release;
                subspan::householder_product<T>(r.h, vq, check);
                if (check) require_no_overflow<T>(vq, "the product of the reflections", {});
            });
        },
        py::arg("v"), py::arg("tau"), py::arg("q"), py::arg("check"));
    m.def(
        "householder_product_backward",
        [](const py::object &v, const py::object &tau, const py::object &grad, const py::object &dv,
           const py::object &dtau, bool check) {
            const ReflectionsArgument h(v, tau);
            const Array xg(grad, "grad"), xdv(dv, "dV", true);
            xg.require_dtype(h.v().dtype());
            std::optional<Array> xdtau;
            if (!dtau.is_none()) xdtau.emplace(dtau, "dtau", true);
            const auto batch = h.v().leading();
            dispatch(h.v().dtype(), [&](auto s) {
                using T = decltype(s);
                ReflectionsArgument::View<T> r;
                h.view(batch, r);
                const auto vg = xg.stack<const T>(batch);
                const auto vdv = xdv.stack<T>(batch);
                StackView<T> vdtau;
                if (xdtau) vdtau = xdtau->row_stack<T>(batch);
                const py::gil_scoped_release release;
                subspan::householder_product_backward<T>(r.h, vg, vdv, xdtau ? &vdtau : nullptr, check);
                if (!check) return;
                require_no_overflow<T>(vdv, "the gradient of V", {});
                if (xdtau) require_no_overflow<T>(vdtau, "the gradient of tau", {});
            });
        },
        py::arg("v"), py::arg("tau"), py::arg("grad"), py::arg("dv"), py::arg("dtau"), py::arg("check"));
}

} // namespace subspan::bind
