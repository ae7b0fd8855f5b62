#include "basis.hpp"
#include "device.hpp"
#include "points.hpp"
#include "register.hpp"
#include "subspan/cuda/assign.hpp"
#include "subspan/cuda/householder.hpp"
#include "subspan/cuda/householder_qr.hpp"

#include <optional>

namespace subspan::bind {
namespace {

std::int64_t count_of(const Shape &shape) {
    std::int64_t n = 1;
    for (const auto s : shape) n *= s;
    return n;
}

// What kernels take of them; packed ones are unpacked by the library.
class Reflections : public ReflectionsArgument {
  public:
    Reflections(const Call &call, py::handle given, py::handle scales, bool packed = false)
        : ReflectionsArgument(call, given, scales, packed), batch(v.leading()) {
        require_float32_or_64(v);
        if (!packed) return;
        Stack from = stack(v, batch);
        from.cols = cols;
        Shape shape = batch;
        shape.insert(shape.end(), {v.rows(), cols});
        Array unit = call.empty(shape, v.dtype(), "V");
        {
            const Stack to = stack(unit, batch);
            const Memory memory(call, 0);
            const py::gil_scoped_release release;
            cuda::unit_lower(memory.context(), &from, to, 0);
        }
        v = std::move(unit);
    }
    Shape batch;

    /// Whether cuBLAS takes the reflections; else there is one block for each matrix.
    bool by_products() const {
        constexpr std::int64_t large = std::int64_t(1) << 17, few = 32;
        return v.cols() > cuda::kReflections || (v.rows() * v.cols() > large && count_of(batch) < few);
    }
    /// -T over the leading axes of both.
    Array core(const Call &call) const {
        Shape shape = batch;
        shape.insert(shape.end(), {v.cols(), v.cols()});
        Array out = call.empty(shape, v.dtype(), "core");
        const bool products = by_products();
        const Array x = products ? for_blas(call, v.object(), "V") : Array(call, v.object(), "V");
        Array shaped(call, x.object(), "V");
        shaped.as_matrix(true);
        const Stack sv = stack(shaped, batch), sc = stack(out, batch);
        Stack st;
        if (tau) st = stack(*tau, batch, 1);
        const Memory memory(call, products ? cuda::wide_reflection_core_workspace(sv, sc, call.device) : 0);
        const py::gil_scoped_release release;
        (products ? cuda::wide_reflection_core : cuda::reflection_core)(memory.context(), sv, tau ? &st : nullptr, sc);
        return out;
    }
};

// The first columns of the identity, or those from `first` on.
Array identity(const Call &call, const Shape &shape, DType dtype, std::int64_t first = 0) {
    Array q = call.empty(shape, dtype, "Q");
    const Stack to = whole(q);
    const Memory memory(call, 0);
    const py::gil_scoped_release release;
    cuda::unit_lower(memory.context(), nullptr, to, first);
    return q;
}

Array zeros(const Call &call, const Shape &shape, DType dtype, const char *name) { return filled(call, shape, dtype, 0.0, name); }

// C + V N VᵀC, or with Nᵀ, or from the right.
void act(const Call &call, const Array &c, const Array &v, const Array &core, bool left, bool transpose, const Array &out, const Shape &batch) {
    Stack n = stack(core, batch);
    if (transpose) n = n.transposed();
    apply_core(call, c, &v, nullptr, {&n, false, 1.0}, 1.0, left, out, batch);
}

py::object factored_apply(py::handle context, py::handle v, py::handle t, py::handle c, py::handle side, py::handle transpose, const py::object &out,
                          py::handle check) {
    const Call call(context);
    const Operand x(call, c, "C", side);
    const Array &xc = x.c;
    const bool left = x.left;
    const bool transposed = truth(transpose, "transpose");
    truth(check, "check");
    const Array xv(call, v, "Q");
    require_acts(xv, xc, left);
    const Array core = copied(call, Array(call, t, "T"), -1.0);
    const Shape batch = broadcast_leading({{&xc, 2}, {&xv, 2}});
    const Array xo = x.output(call, out, batch);
    check_no_overlap(xo, xc, true);
    check_no_overlap(xo, xv);
    act(call, xc, xv, core, left, transposed, xo, batch);
    xo.written();
    return xo.object();
}

py::object householder_apply(py::handle context, py::handle v, py::handle c, py::handle tau, py::handle side, py::handle transpose, py::handle packed,
                             const py::object &out, py::handle check) {
    const Call call(context);
    const Operand x(call, c, "C", side);
    const Array &xc = x.c;
    const bool left = x.left;
    const bool transposed = truth(transpose, "transpose");
    truth(check, "check");
    const Reflections h(call, v, tau, truth(packed, "packed"));
    h.v.require_dtype_of(xc);
    require_rows(h.v, xc, left);
    const Array core = h.core(call);
    const Shape batch = broadcast_leading({{&xc, 2}, {&core, 2}});
    const Array xo = x.output(call, out, batch);
    check_no_overlap(xo, xc, true);
    check_no_overlap(xo, h.v);
    act(call, xc, h.v, core, left, transposed, xo, batch);
    xo.written();
    return xo.object();
}

py::object householder_product(py::handle context, py::handle v, py::handle tau, py::handle packed, py::handle check) {
    const Call call(context);
    const Reflections h(call, v, tau, truth(packed, "packed"));
    truth(check, "check");
    const Array core = h.core(call);
    Shape shape = h.batch;
    shape.insert(shape.end(), {h.v.rows(), std::min(h.v.rows(), h.v.cols())});
    if (!h.by_products()) {
        const Array q = identity(call, shape, h.v.dtype());
        act(call, q, h.v, core, true, false, q, h.batch);
        return q.object();
    }
    const Array q = call.empty(shape, h.v.dtype()), x = for_blas(call, h.v.object(), "V");
    const Stack sv = stack(x, h.batch), sc = stack(core, h.batch), sq = stack(q, h.batch);
    const Memory memory(call, cuda::reflection_product_workspace(sv, sq, call.device));
    const py::gil_scoped_release release;
    cuda::reflection_product(memory.context(), sv, sc, sq);
    return q.object();
}

py::object reshaped(const Array &x, bool vector) { return vector ? py::object(x.object().attr("reshape")(-1)) : x.object(); }

// Where gradients of V and tau go, with views of all of them over `batch`.
struct Gradients {
    Gradients(const Call &call, const Reflections &h) : dv(zeros(call, h.v.shape(), h.v.dtype(), "dV")) {
        if (h.tau) dtau.emplace(zeros(call, h.tau->shape(), h.v.dtype(), "dtau"));
    }
    Array dv;
    std::optional<Array> dtau;
    Stack tau, to_tau;
    cuda::ReflectionGradients views(const Array &v, const Array &core, const Reflections &h, const Shape &batch) {
        cuda::ReflectionGradients r;
        r.v = stack(v, batch);
        r.core = stack(core, batch);
        r.dv = stack(dv, batch);
        if (h.tau) {
            tau = stack(*h.tau, batch, 1);
            to_tau = stack(*dtau, batch, 1);
            r.tau = &tau;
            r.dtau = &to_tau;
        }
        return r;
    }
};

Array as_given(const Call &call, py::handle x, const char *name, bool column) {
    Array a = for_blas(call, x, name);
    a.as_matrix(column);
    return a;
}

py::object householder_product_backward(py::handle context, py::handle grad, py::handle v, py::handle tau, py::handle check) {
    const Call call(context);
    const Reflections h(call, v, tau);
    truth(check, "check");
    const Array core = h.core(call);
    Shape want = h.batch;
    want.insert(want.end(), {h.v.rows(), std::min(h.v.rows(), h.v.cols())});
    const Array xg = as_given(call, grad, "grad", true), xv = as_given(call, v, "V", true);
    xg.require_dtype_of(h.v);
    xg.require_shape(want);
    Gradients to(call, h);
    const auto r = to.views(xv, core, h, h.batch);
    const Stack sg = stack(xg, h.batch);
    const Memory memory(call, cuda::reflection_product_backward_workspace(r, sg, call.device));
    {
        const py::gil_scoped_release release;
        cuda::reflection_product_backward(memory.context(), r, sg);
    }
    const py::object dv = reshaped(to.dv, h.vector);
    return to.dtau ? py::object(py::make_tuple(dv, to.dtau->object())) : dv;
}

py::tuple householder_apply_backward(py::handle context, py::handle grad, py::handle v, py::handle c, py::handle tau, py::handle side, py::handle transpose,
                                     py::handle check) {
    const Call call(context);
    Array given(call, c, "C");
    const bool left = is_left(side), transposed = truth(transpose, "transpose"), vector = given.ndim() == 1;
    truth(check, "check");
    given.as_matrix(left);
    given.require_matrices();
    const Reflections h(call, v, tau);
    h.v.require_dtype_of(given);
    const Shape shape = given.shape();
    {
        Array g(call, grad, "grad");
        g.as_matrix(left);
        g.require_dtype_of(given);
        if (g.shape() != shape) throw py::value_error("grad must have the shape of C, " + shape_text(shape) + ", got " + g.shape_text());
    }
    const Shape whole = broadcast_leading({{&given, 2}, {&h.v, 2}});
    if (whole != given.leading())
        throw py::value_error("C must have all leading axes of V for gradients, got shapes " + shape_text(shape) + " and " + h.v.shape_text());
    if (h.v.rows() != shape[shape.size() - (left ? 2 : 1)])
        throw py::value_error("V must have " + std::to_string(shape[shape.size() - (left ? 2 : 1)]) + " rows to act on C " + shape_text(shape) + " from the " +
                              (left ? "left" : "right") + ", got " + std::to_string(h.v.rows()));
    const Array core = h.core(call);
    const Array dc = call.empty(vector ? Shape{count_of(shape)} : shape, given.dtype(), "dC");
    Gradients to(call, h);
    if (count_of(shape) > 0) {
        const Array xv = as_given(call, v, "V", true);
        Array xc = as_given(call, c, "C", left), xg = as_given(call, grad, "grad", left), xd(call, dc.object(), "dC", Access::out);
        xd.as_matrix(left);
        Shape batch = whole;
        const bool one = count_of(h.batch) == 1;
        std::vector<py::object> kept;
        if (!left && one) { // one set of reflections for all rows
            batch.clear();
            for (Array *x : {&xc, &xg, &xd}) {
                kept.push_back(x->object().attr("reshape")(-1, shape.back()));
                *x = Array(call, kept.back(), x->name());
            }
        }
        // Leading axes of one, for which the rows together have no place.
        const auto flat = [&](const Array &x, int inner_axes) {
            py::tuple t(static_cast<std::size_t>(inner_axes));
            for (int i = 0; i < inner_axes; ++i) t[std::size_t(i)] = x.shape(x.ndim() - inner_axes + i);
            kept.push_back(x.object().attr("reshape")(t));
            return Array(call, kept.back(), x.name());
        };
        cuda::ReflectionGradients r;
        std::optional<Array> fv, fc, fd, ft, fdt;
        if (one) {
            fv.emplace(flat(xv.ndim() == 2 && h.vector ? h.v : xv, 2));
            fc.emplace(flat(core, 2));
            fd.emplace(flat(to.dv, 2));
            r.v = stack(*fv, batch);
            r.core = stack(*fc, batch);
            r.dv = stack(*fd, batch);
            if (h.tau) {
                ft.emplace(flat(*h.tau, 1));
                fdt.emplace(flat(*to.dtau, 1));
                to.tau = stack(*ft, batch, 1);
                to.to_tau = stack(*fdt, batch, 1);
                r.tau = &to.tau;
                r.dtau = &to.to_tau;
            }
        } else {
            r = to.views(xv, core, h, batch);
        }
        Stack sc = stack(xc, batch), sg = stack(xg, batch), sd = stack(xd, batch);
        if (!left) { // C H = (Hᵀ Cᵀ)ᵀ
            sc = sc.transposed();
            sg = sg.transposed();
            sd = sd.transposed();
        }
        const Memory memory(call, cuda::reflection_apply_backward_workspace(r, sc, call.device));
        const py::gil_scoped_release release;
        cuda::reflection_apply_backward(memory.context(), r, sc, sg, transposed == left, sd);
    }
    const py::object dv = reshaped(to.dv, h.vector);
    if (to.dtau) return py::make_tuple(dv, dc.object(), to.dtau->object());
    return py::make_tuple(dv, dc.object());
}

} // namespace

py::tuple householder_qr(py::handle context, py::handle a, py::handle pivoting) {
    const Call call(context);
    if (truth(pivoting, "pivoting")) throw py::type_error("pivoting is not implemented on CUDA devices: it runs on the CPU and moves no data by itself");
    Array xa(call, a, "A");
    require_float32_or_64(xa);
    xa.as_matrix(true);
    xa.require_matrices();
    const Shape batch = xa.leading();
    const std::int64_t m = xa.rows(), n = xa.cols(), k = std::min(m, n);
    const auto make = [&](std::initializer_list<std::int64_t> sizes, const char *name) {
        Shape shape = batch;
        shape.insert(shape.end(), sizes);
        return call.empty(shape, xa.dtype(), name);
    };
    const Array v = make({m, k}, "V"), tau = make({k}, "tau"), t = make({k, k}, "T"), r = make({k, n}, "R");
    const Stack sa = stack(xa, batch), sv = stack(v, batch), sr = stack(r, batch), stau = stack(tau, batch, 1), st = stack(t, batch);
    const bool small = cuda::fits_a_block(sa, call.device);
    const Memory memory(call, small ? 0 : cuda::large_householder_qr_workspace(sa, sv, st, call.device));
    {
        const py::gil_scoped_release release;
        (small ? cuda::householder_qr : cuda::large_householder_qr)(memory.context(), sa, sv, sr, stau, st);
    }
    return py::make_tuple(v.object(), tau.object(), t.object(), r.object());
}

py::object factored_columns(const Call &call, const Array &v, const Array &t, std::int64_t first, std::int64_t count) {
    const Array core = copied(call, t, -1.0);
    const Shape batch = v.leading();
    Shape shape = batch;
    shape.insert(shape.end(), {v.rows(), count});
    const Array q = identity(call, shape, v.dtype(), first);
    if (count_of(shape) > 0) act(call, q, v, core, true, false, q, batch);
    return q.object();
}

py::object factored_array(py::handle context, py::handle v, py::handle t, py::handle full) {
    const Call call(context);
    const Array xv(call, v, "V");
    return factored_columns(call, xv, Array(call, t, "T"), 0, truth(full, "full") ? xv.rows() : xv.cols());
}

void register_device_householder(py::module_ &m) {
    using py::arg;
    m.def("householder_qr", &householder_qr, arg("call"), arg("A"), arg("pivoting"));
    m.def("factored_apply", &factored_apply, arg("call"), arg("V"), arg("T"), arg("C"), arg("side"), arg("transpose"), arg("out"), arg("check"));
    m.def("factored_array", &factored_array, arg("call"), arg("V"), arg("T"), arg("full"));
    m.def("householder_apply", &householder_apply, arg("call"), arg("V"), arg("C"), arg("tau"), arg("side"), arg("transpose"), arg("packed"), arg("out"),
          arg("check"));
    m.def("householder_apply_backward", &householder_apply_backward, arg("call"), arg("grad"), arg("V"), arg("C"), arg("tau"), arg("side"), arg("transpose"),
          arg("check"));
    m.def("householder_product", &householder_product, arg("call"), arg("V"), arg("tau"), arg("packed"), arg("check"));
    m.def("householder_product_backward", &householder_product_backward, arg("call"), arg("grad"), arg("V"), arg("tau"), arg("check"));
}

} // namespace subspan::bind
