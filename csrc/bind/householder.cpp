#include "host.hpp"
#include "register.hpp"
#include "subspan/householder.hpp"
#include "subspan/householder_qr.hpp"

namespace subspan::bind {
namespace {

// What kernels take of them; packed ones are copied.
class HostReflections : public ReflectionsArgument {
  public:
    HostReflections(const Call &call, py::handle given, py::handle scales, bool packed = false) : ReflectionsArgument(call, given, scales, packed) {
        if (packed)
            dispatch(v.dtype(), [&](auto t) {
                using T = decltype(t);
                auto &unit = std::get<std::optional<Temporary<T>>>(unpacked_);
                unit.emplace(v.leading(), v.rows(), cols);
                const auto from = v.stack<const T>(v.leading());
                for (std::int64_t i = 0; i < from.size(); ++i) {
                    const auto x = from[i];
                    const auto to = unit->stack[i];
                    for (std::int64_t r = 0; r < x.rows; ++r)
                        for (std::int64_t c = 0; c < cols; ++c) to(r, c) = r > c ? x(r, c) : T(r == c ? 1 : 0);
                }
            });
    }

    template <class T> struct View {
        StackView<const T> tau;
        Reflections<T> h;
    };
    template <class T> void view(const Shape &batch, View<T> &out) const {
        const auto &unit = std::get<std::optional<Temporary<T>>>(unpacked_);
        out.h.v = unit ? unit->over(batch) : v.stack<const T>(batch);
        if (!tau) return;
        out.tau = tau->row_stack<const T>(batch);
        out.h.tau = &out.tau;
    }

  private:
    std::tuple<std::optional<Temporary<float>>, std::optional<Temporary<double>>> unpacked_;
};

py::tuple householder_qr(py::handle context, py::handle a, py::handle pivoting) {
    const Call call(context);
    Array xa(call, a, "A");
    const bool by_pivots = truth(pivoting, "pivoting");
    xa.as_matrix(true);
    xa.require_matrices();
    if (by_pivots) load_lapack();
    const Shape batch = xa.leading();
    const std::int64_t m = xa.rows(), n = xa.cols(), k = std::min(m, n);
    const auto make = [&](std::initializer_list<std::int64_t> sizes, const char *name) {
        Shape shape = batch;
        shape.insert(shape.end(), sizes);
        return call.empty(shape, xa.dtype(), name);
    };
    const Array v = make({m, k}, "V"), tau = make({k}, "tau"), t = make({k, std::min(k, kReflectionBlock)}, "T"), r = make({k, n}, "R");
    py::object order = py::none();
    std::int64_t *po = nullptr;
    if (by_pivots) {
        std::vector<py::ssize_t> shape(batch.begin(), batch.end());
        shape.push_back(n);
        py::array_t<std::int64_t> columns(shape);
        po = columns.mutable_data();
        order = columns;
    }
    dispatch(xa.dtype(), [&](auto s) {
        using T = decltype(s);
        const auto va = xa.stack<const T>(batch);
        const auto vv = v.stack<T>(batch), vr = r.stack<T>(batch), vt = t.stack<T>(batch);
        const auto vtau = tau.row_stack<T>(batch);
        const py::gil_scoped_release release;
        if (by_pivots)
            subspan::householder_qr_pivoted<T>(va, vv, vr, vtau, vt, po);
        else
            subspan::householder_qr<T>(va, vv, vr, vtau, vt);
        if (!subspan::all_finite<T>(StackView<const T>(vr))) throw ValueError("R overflows the dtype although A is finite; scale A"); // A was looked at
    });
    if (by_pivots) return py::make_tuple(v.object(), tau.object(), t.object(), r.object(), order);
    return py::make_tuple(v.object(), tau.object(), t.object(), r.object());
}

py::object factored_apply(py::handle context, py::handle v, py::handle t, py::handle c, py::handle side, py::handle transpose, const py::object &out,
                          py::handle check) {
    const Call call(context);
    const Operand x(call, c, "C", side);
    const Array &xc = x.c;
    const bool left = x.left;
    const bool transposed = truth(transpose, "transpose"), checks = truth(check, "check");
    const Array xv(call, v, "Q"), xt(call, t, "T");
    require_acts(xv, xc, left);
    const Shape batch = broadcast_leading({{&xc, 2}, {&xv, 2}});
    const Array xo = x.output(call, out, batch);
    check_no_overlap(xo, xc, true);
    check_no_overlap(xo, xv);
    check_no_overlap(xo, xt);
    dispatch(xc.dtype(), [&](auto s) {
        using T = decltype(s);
        const auto vv = xv.stack<const T>(batch), vt = xt.stack<const T>(batch), vc = xc.stack<const T>(batch);
        const auto vo = xo.stack<T>(batch);
        const py::gil_scoped_release release;
        const double flops = 4.0 * double(vc.size()) * double(vc.rows()) * double(vc.cols()) * double(vv.cols());
        whole<T>(vo, vo.first.data == vc.first.data, flops,
                 [&](const StackView<T> &to) { subspan::factored_apply<T>(vv, vt, vc, side_of(left), transposed, to, checks); });
        if (checks) require_no_overflow<T>(vo, "Q C", {});
    });
    xo.written();
    return xo.object();
}

py::object factored_array(py::handle context, py::handle v, py::handle t, py::handle full) {
    const Call call(context);
    const Array xv(call, v, "V"), xt(call, t, "T");
    xt.require_dtype_of(xv);
    const Shape batch = xv.leading();
    Shape shape = batch;
    shape.insert(shape.end(), {xv.rows(), truth(full, "full") ? xv.rows() : xv.cols()});
    const Array xq = call.empty(shape, xv.dtype());
    dispatch(xv.dtype(), [&](auto s) {
        using T = decltype(s);
        const auto vv = xv.stack<const T>(batch), vt = xt.stack<const T>(batch);
        const auto vq = xq.stack<T>(batch);
        const py::gil_scoped_release release;
        subspan::factored_array<T>(vv, vt, vq);
    });
    return xq.object();
}

py::object householder_apply(py::handle context, py::handle v, py::handle c, py::handle tau, py::handle side, py::handle transpose, py::handle packed,
                             const py::object &out, py::handle check) {
    const Call call(context);
    const Operand x(call, c, "C", side);
    const Array &xc = x.c;
    const bool left = x.left;
    const bool transposed = truth(transpose, "transpose"), checks = truth(check, "check");
    const HostReflections h(call, v, tau, truth(packed, "packed"));
    h.v.require_dtype_of(xc);
    require_rows(h.v, xc, left);
    const Shape batch = broadcast_leading({{&xc, 2}, {&h.v, 2}});
    const Array xo = x.output(call, out, batch);
    check_no_overlap(xo, xc, true);
    check_no_overlap(xo, h.v);
    if (h.tau) check_no_overlap(xo, *h.tau);
    dispatch(xc.dtype(), [&](auto s) {
        using T = decltype(s);
        HostReflections::View<T> r;
        h.view(batch, r);
        const auto vc = xc.stack<const T>(batch);
        const auto vo = xo.stack<T>(batch);
        const py::gil_scoped_release release;
        const double flops = 4.0 * double(vc.size()) * double(vc.rows()) * double(vc.cols()) * double(r.h.v.cols());
        whole<T>(vo, vo.first.data == vc.first.data, flops,
                 [&](const StackView<T> &to) { subspan::householder_apply<T>(r.h, vc, side_of(left), transposed, to, checks); });
        if (checks) require_no_overflow<T>(vo, "H C", {});
    });
    xo.written();
    return xo.object();
}

// A fresh array of zeros of the shape of x: gradients of what is broadcast are summed there.
Array zeros_like(const Call &call, const Array &x, const char *name) {
    Array out = call.empty(x.shape(), x.dtype(), name);
    std::int64_t n = size_of(x.dtype());
    for (const auto s : x.shape()) n *= s;
    std::fill_n(static_cast<char *>(out.data()), n, char(0));
    return out;
}

py::object shaped(const Array &x, bool vector) { return vector ? py::object(x.object().attr("reshape")(-1)) : x.object(); }

py::tuple householder_apply_backward(py::handle context, py::handle grad, py::handle v, py::handle c, py::handle tau, py::handle side, py::handle transpose,
                                     py::handle check) {
    const Call call(context);
    Array xc(call, c, "C");
    const bool left = is_left(side), transposed = truth(transpose, "transpose"), checks = truth(check, "check"), vector = xc.ndim() == 1;
    xc.as_matrix(left);
    xc.require_matrices();
    const HostReflections h(call, v, tau);
    h.v.require_dtype_of(xc);
    Array xg(call, grad, "grad");
    xg.as_matrix(left);
    xg.require_dtype_of(xc);
    require_rows(h.v, xc, left);
    const Shape batch = xc.leading();
    if (broadcast_leading({{&xc, 2}, {&h.v, 2}}) != batch)
        throw py::value_error("C must have all leading axes of V for gradients, got shapes " + xc.shape_text() + " and " + h.v.shape_text());
    if (xg.shape() != xc.shape()) throw py::value_error("grad must have the shape of C, " + xc.shape_text() + ", got " + xg.shape_text());
    const Array dv = zeros_like(call, h.v, "dV"), dc = call.empty(xc.shape(), xc.dtype(), "dC");
    std::optional<Array> dtau;
    if (h.tau) dtau.emplace(zeros_like(call, *h.tau, "dtau"));
    dispatch(xc.dtype(), [&](auto s) {
        using T = decltype(s);
        HostReflections::View<T> r;
        h.view(batch, r);
        const auto vc = xc.stack<const T>(batch), vg = xg.stack<const T>(batch);
        const auto vdv = dv.stack<T>(batch), vdc = dc.stack<T>(batch);
        StackView<T> vdtau;
        if (dtau) vdtau = dtau->row_stack<T>(batch);
        const py::gil_scoped_release release;
        subspan::householder_apply_backward<T>(r.h, vc, vg, side_of(left), transposed, vdv, dtau ? &vdtau : nullptr, vdc, checks);
        if (!checks) return;
        require_no_overflow<T>(vdv, "the gradient of V", {});
        require_no_overflow<T>(vdc, "the gradient of C", {});
        if (dtau) require_no_overflow<T>(vdtau, "the gradient of tau", {});
    });
    const py::object to_v = shaped(dv, h.vector), to_c = shaped(dc, vector);
    if (dtau) return py::make_tuple(to_v, to_c, dtau->object());
    return py::make_tuple(to_v, to_c);
}

py::object householder_product(py::handle context, py::handle v, py::handle tau, py::handle packed, py::handle check) {
    const Call call(context);
    const HostReflections h(call, v, tau, truth(packed, "packed"));
    const bool checks = truth(check, "check");
    const Shape batch = h.v.leading();
    Shape shape = batch;
    shape.insert(shape.end(), {h.v.rows(), std::min(h.v.rows(), h.cols)});
    const Array xq = call.empty(shape, h.v.dtype());
    dispatch(h.v.dtype(), [&](auto s) {
        using T = decltype(s);
        HostReflections::View<T> r;
        h.view(batch, r);
        const auto vq = xq.stack<T>(batch);
        const py::gil_scoped_release release;
        subspan::householder_product<T>(r.h, vq, checks);
        if (checks) require_no_overflow<T>(vq, "the product of the reflections", {});
    });
    return xq.object();
}

py::object householder_product_backward(py::handle context, py::handle grad, py::handle v, py::handle tau, py::handle check) {
    const Call call(context);
    const HostReflections h(call, v, tau);
    const bool checks = truth(check, "check");
    Array xg(call, grad, "grad");
    xg.as_matrix(true);
    xg.require_dtype_of(h.v);
    const Shape batch = h.v.leading();
    Shape want = batch;
    want.insert(want.end(), {h.v.rows(), std::min(h.v.rows(), h.v.cols())});
    xg.require_shape(want);
    const Array dv = zeros_like(call, h.v, "dV");
    std::optional<Array> dtau;
    if (h.tau) dtau.emplace(zeros_like(call, *h.tau, "dtau"));
    dispatch(h.v.dtype(), [&](auto s) {
        using T = decltype(s);
        HostReflections::View<T> r;
        h.view(batch, r);
        const auto vg = xg.stack<const T>(batch);
        const auto vdv = dv.stack<T>(batch);
        StackView<T> vdtau;
        if (dtau) vdtau = dtau->row_stack<T>(batch);
        const py::gil_scoped_release release;
        subspan::householder_product_backward<T>(r.h, vg, vdv, dtau ? &vdtau : nullptr, checks);
        if (!checks) return;
        require_no_overflow<T>(vdv, "the gradient of V", {});
        if (dtau) require_no_overflow<T>(vdtau, "the gradient of tau", {});
    });
    const py::object to_v = shaped(dv, h.vector);
    return dtau ? py::object(py::make_tuple(to_v, dtau->object())) : to_v;
}

} // namespace

void register_householder(py::module_ &m) {
    m.def("householder_qr", &householder_qr, py::arg("call"), py::arg("A"), py::arg("pivoting"));
    m.def("factored_apply", &factored_apply, py::arg("call"), py::arg("V"), py::arg("T"), py::arg("C"), py::arg("side"), py::arg("transpose"), py::arg("out"),
          py::arg("check"));
    m.def("factored_array", &factored_array, py::arg("call"), py::arg("V"), py::arg("T"), py::arg("full"));
    m.def("householder_apply", &householder_apply, py::arg("call"), py::arg("V"), py::arg("C"), py::arg("tau"), py::arg("side"), py::arg("transpose"),
          py::arg("packed"), py::arg("out"), py::arg("check"));
    m.def("householder_apply_backward", &householder_apply_backward, py::arg("call"), py::arg("grad"), py::arg("V"), py::arg("C"), py::arg("tau"),
          py::arg("side"), py::arg("transpose"), py::arg("check"));
    m.def("householder_product", &householder_product, py::arg("call"), py::arg("V"), py::arg("tau"), py::arg("packed"), py::arg("check"));
    m.def("householder_product_backward", &householder_product_backward, py::arg("call"), py::arg("grad"), py::arg("V"), py::arg("tau"), py::arg("check"));
}

} // namespace subspan::bind
