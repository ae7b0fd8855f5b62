#include "basis.hpp"
#include "device.hpp"
#include "gradient.hpp"
#include "register.hpp"
#include "subspan/cuda/apply_core.hpp"
#include "subspan/cuda/blas.hpp"
#include "subspan/cuda/gram_core.hpp"
#include "subspan/cuda/spaces.hpp"
#include "subspan/cuda/householder_qr.hpp"
#include "subspan/cuda/int4.hpp"

#include <deque>
#include <pybind11/stl.h>

namespace subspan::bind {

Array for_blas(const Call &call, py::handle given, const char *name) {
    Array x(call, given, name);
    return x.ndim() < 2 || cuda::blas_layout(whole(x)) ? std::move(x) : copied(call, x);
}

cuda::Int4Codes codes_of(const Packed &p) {
    cuda::Int4Codes c;
    c.codes = static_cast<const std::uint8_t *>(p.codes().data());
    c.scale = p.scale().data();
    c.zero = p.zero().data();
    c.rows = p.rows();
    c.cols = p.cols();
    c.group = p.group();
    return c;
}

void apply_core(const Call &call, const Array &c, const Array *v, const Packed *packed, const CoreStack &core, double alpha, bool left, const Array &out,
                const Shape &batch, const Array *source) {
    cuda::CoreCall k;
    k.c = stack(c, batch);
    k.out = stack(out, batch);
    cuda::Int4Codes codes;
    if (packed != nullptr) {
        codes = codes_of(*packed);
        k.packed = &codes;
        k.v.dtype = c.dtype();
        k.v.rows = codes.rows;
        k.v.cols = k.v.row_stride = codes.cols;
    } else {
        k.v = stack(*v, batch);
    }
    Stack ss;
    if (core.matrix != nullptr) k.core = core.matrix;
    if (source != nullptr) {
        ss = stack(*source, batch);
        k.source = &ss;
    }
    cuda::CoreOptions o;
    o.kind = core.matrix == nullptr ? cuda::CoreOptions::scalar : (core.diagonal ? cuda::CoreOptions::diagonal : cuda::CoreOptions::full);
    o.value = core.value;
    o.alpha = alpha;
    o.left = left;
    const Memory memory(call, cuda::apply_core_workspace(k, o, call.device));
    const py::gil_scoped_release release;
    cuda::apply_core(memory.context(), k, o);
}

namespace {

py::object run(const Call &call, const Operand &x, const BasisArgument &v, const CoreStack &core, double alpha, const Array &result, const Shape &batch) {
    check_no_overlap(result, x.c, true);
    v.check_no_overlap_with(result);
    apply_core(call, x.c, v.dense(), v.packed(), core, alpha, x.left, result, batch);
    result.written();
    return result.object();
}

Shape batch_of(const Array &c, const BasisArgument &v, const Array *core = nullptr) {
    const bool wide_v = v.dense() != nullptr && v.dense()->ndim() > 2, wide_core = core != nullptr && core->ndim() > 2;
    if (!wide_v && !wide_core) return c.leading();
    if (wide_v && wide_core) return broadcast_leading({{&c, 2}, {v.dense(), 2}, {core, 2}});
    return broadcast_leading({{&c, 2}, {wide_v ? v.dense() : core, 2}});
}

py::object apply_core_of(py::handle context, py::handle c, py::handle v, py::handle m, py::handle alpha, py::handle side, const py::object &out,
                         py::handle check) {
    const Call call(context);
    const Operand x(call, c, "C", side);
    truth(check, "check");
    const double a = real(alpha, "alpha");
    const CoreArgument core(call, m, x.c.dtype());
    const BasisArgument basis(call, v, "V");
    basis.require_fits(x.c, x.left);
    core.require_fits(basis.cols(), "V");
    const Shape batch = batch_of(x.c, basis, core.array());
    const Array result = x.output(call, out, batch);
    if (core.array() == nullptr) return run(call, x, basis, {nullptr, false, core.value()}, a, result, batch);
    check_no_overlap(result, *core.array());
    const Stack s = stack(*core.array(), batch, core.diagonal() ? 1 : 2);
    return run(call, x, basis, {&s, core.diagonal(), 1.0}, a, result, batch);
}

// A basis and the core of the projector onto the span of any matrix: an orthonormal basis and 1; of 16 bits, where that basis would
// be rounded, the matrix and (UᵀU)⁺ in float32. Values are not looked at: that would make the host wait.
class Projector {
  public:
    Projector(const Call &call, const BasisArgument &u, int orthonormal, double factor) : factor_(factor) {
        if (orthonormal == 1 && u.packed() != nullptr)
            throw py::value_error(std::string(u.name()) + " is an Int4Basis, and rounding to 4 bits leaves no basis orthonormal");
        if (u.packed() != nullptr) {
            scale(call, Array(call, py::tuple(u.object().attr("_gram_core")())[0], "M"));
            return;
        }
        if (orthonormal != 0) return;
        const Array &x = *u.dense();
        if (x.cols() > x.rows()) throw py::value_error(std::string(u.name()) + " must have at most as many columns as rows, got shape " + x.shape_text());
        const Shape batch = x.leading();
        if (x.dtype() == wide(x.dtype())) {
            span_.emplace(call.empty(x.shape(), x.dtype()));
            const Stack su = stack(x, batch), so = stack(*span_, batch);
            const Memory memory(call, cuda::range_basis_workspace(su, call.device));
            const py::gil_scoped_release release;
            cuda::range_basis(memory.context(), su, so);
            return;
        }
        Shape shape = batch;
        shape.insert(shape.end(), {x.cols(), x.cols()});
        Array core = call.empty(shape, DType::f32);
        {
            const Stack su = stack(x, batch), so = stack(core, batch);
            const Memory memory(call, cuda::gram_core_workspace(su, call.device));
            const py::gil_scoped_release release;
            cuda::gram_core(memory.context(), su, so);
        }
        scale(call, std::move(core));
    }
    const Array *span() const { return span_ ? &*span_ : nullptr; }
    CoreStack core(const Shape &batch) {
        if (!core_) return {nullptr, false, factor_};
        stack_ = stack(*core_, batch);
        return {&stack_, false, 1.0};
    }

  private:
    void scale(const Call &call, Array core) { core_.emplace(factor_ == 1.0 ? std::move(core) : copied(call, core, factor_)); }
    double factor_;
    std::optional<Array> span_, core_;
    Stack stack_;
};

py::object project_one(const Call &call, const Operand &x, const BasisArgument &u, double alpha, double factor, const py::object &out, int orthonormal) {
    u.require_fits(x.c, x.left);
    const Shape batch = batch_of(x.c, u);
    Projector p(call, u, promised(orthonormal, u), factor);
    const Array result = x.output(call, out, batch);
    if (p.span() == nullptr) return run(call, x, u, p.core(batch), alpha, result, batch);
    check_no_overlap(result, x.c, true);
    u.check_no_overlap_with(result);
    apply_core(call, x.c, p.span(), nullptr, p.core(batch), alpha, x.left, result, batch);
    result.written();
    return result.object();
}

// The left and then the right form, aside and then into out: whatever the second basis is refused for, C and out are as they were.
py::object project_both(const Call &call, const Operand &x, py::handle pair, double alpha, double factor, const py::object &out, int orthonormal) {
    if (!(PyTuple_Check(pair.ptr()) || PyList_Check(pair.ptr())) || py::len(pair) != 2)
        throw py::value_error("side='both' takes U as a pair, (left basis, right basis)");
    const auto us = py::tuple(py::reinterpret_borrow<py::object>(pair));
    const BasisArgument left(call, us[0], "U[0]"), right(call, us[1], "U[1]");
    left.require_fits(x.c, true);
    right.require_fits(x.c, false);
    Shape batch = batch_of(x.c, left);
    if (right.dense() != nullptr && right.dense()->ndim() > 2)
        batch =
            left.dense() != nullptr && left.dense()->ndim() > 2 ? broadcast_leading({{&x.c, 2}, {left.dense(), 2}, {right.dense(), 2}}) : batch_of(x.c, right);
    Projector pl(call, left, promised(orthonormal, left), factor), pr(call, right, promised(orthonormal, right), factor);
    const Array result = x.output(call, out, batch);
    check_no_overlap(result, x.c, true);
    left.check_no_overlap_with(result);
    right.check_no_overlap_with(result);
    const Array aside = x.output(call, py::none(), batch);
    const auto over = [&](const Array &from, const BasisArgument &u, Projector &p, bool on_left, const Array &to) {
        const Array *v = p.span() != nullptr ? p.span() : u.dense();
        apply_core(call, from, v, p.span() != nullptr ? nullptr : u.packed(), p.core(batch), alpha, on_left, to, batch);
    };
    over(x.c, left, pl, true, aside);
    over(aside, right, pr, false, result);
    result.written();
    return result.object();
}

py::object projected(py::handle context, py::handle c, py::handle u, py::handle side, double alpha, double factor, const py::object &out,
                     py::handle orthonormal, py::handle check) {
    const Call call(context);
    const Operand x(call, c, "C", side, true);
    const int sure = promised(orthonormal);
    truth(check, "check");
    if (is_both(side)) return project_both(call, x, u, alpha, factor, out, sure);
    return project_one(call, x, BasisArgument(call, u, "U"), alpha, factor, out, sure);
}

// One launch for each 160 of them, where their bases are dense and orthonormal.
py::list project_out_list(py::handle context, const py::list &cs, const py::list &us, py::handle side, py::handle strength, const py::object &outs,
                          py::handle orthonormal, py::handle check) {
    const Call call(context);
    const double factor = -real(strength, "strength");
    const int sure = promised(orthonormal);
    truth(check, "check");
    if (is_both(side)) throw py::value_error("a list of matrices takes side='left' or 'right'");
    const bool left = is_left(side);
    const std::size_t count = cs.size();
    std::deque<std::string> names;
    std::deque<Operand> xs;
    std::deque<BasisArgument> bases;
    std::deque<Array> targets;
    bool plain = sure != 0;
    for (std::size_t i = 0; i < count; ++i) {
        const std::string at = "[" + std::to_string(i) + "]";
        const Operand &x = xs.emplace_back(call, cs[i], names.emplace_back("C" + at).c_str(), side);
        const BasisArgument &u = bases.emplace_back(call, us[i], names.emplace_back("U" + at).c_str());
        if (i > 0) x.c.require_dtype_of(xs[0].c);
        u.require_fits(x.c, left);
        plain = plain && u.packed() == nullptr;
    }
    const auto out_of = [&](std::size_t i) { return outs.is_none() ? py::object(py::none()) : py::object(py::list(outs)[i]); };
    py::list results;
    if (!plain) {
        for (std::size_t i = 0; i < count; ++i) results.append(project_one(call, xs[i], bases[i], 1.0, factor, out_of(i), sure));
        return results;
    }
    std::vector<cuda::CoreCall> calls(count);
    std::vector<Layout> written;
    std::vector<std::vector<Layout>> inputs;
    for (std::size_t i = 0; i < count; ++i) {
        const Array &xc = xs[i].c, &xv = *bases[i].dense();
        if (xc.ndim() != 2 || xv.ndim() != 2)
            throw py::value_error("matrices of a list have two dimensions, got " + std::string(xc.name()) + " " + xc.shape_text());
        const Array &xo = targets.emplace_back(xs[i].output(call, out_of(i), {}, names.emplace_back("out[" + std::to_string(i) + "]").c_str()));
        check_no_overlap(xo, xc, true);
        check_no_overlap(xo, xv);
        written.push_back(xo.layout());
        inputs.push_back({xc.layout(), xv.layout()});
        calls[i].c = stack(xc, {});
        calls[i].v = stack(xv, {});
        calls[i].out = stack(xo, {});
        results.append(xo.object());
    }
    check_entries_overlap(written, inputs);
    cuda::CoreOptions o;
    o.value = factor;
    o.left = left;
    const Memory memory(call, cuda::apply_core_group_workspace(calls, o, call.device));
    {
        const py::gil_scoped_release release;
        cuda::apply_core_group(memory.context(), calls, o);
    }
    for (const Array &x : targets) x.written();
    return results;
}

py::object swap(py::handle context, py::handle base, py::handle source, py::handle r, const py::object &out, py::handle check) {
    const Call call(context);
    const SwapArguments x(call, base, source, r);
    truth(check, "check");
    const Array result = x.output(call, out);
    apply_core(call, x.base, &x.basis, nullptr, {nullptr, false, 1.0}, 1.0, false, result, x.batch, &x.source);
    result.written();
    return result.object();
}

// (VᵀV)⁺, and 1 for its condition: the true one would make the host wait.
py::tuple gram_core(py::handle context, py::handle v) {
    const Call call(context);
    const BasisArgument xv(call, v, "V");
    std::optional<Array> unpacked;
    if (xv.packed() != nullptr) {
        unpacked.emplace(call.empty({xv.rows(), xv.cols()}, xv.dtype()));
        const Stack so = stack(*unpacked, {});
        const Memory memory(call, 0);
        const py::gil_scoped_release release;
        cuda::unpack_int4(memory.context(), codes_of(*xv.packed()), so);
    }
    const Array &dense = unpacked ? *unpacked : *xv.dense();
    Shape shape = dense.leading();
    shape.insert(shape.end(), {dense.cols(), dense.cols()});
    const Array xo = call.empty(shape, wide(dense.dtype()), "M");
    const Stack sv = stack(dense, dense.leading()), so = stack(xo, dense.leading());
    const Memory memory(call, cuda::gram_core_workspace(sv, call.device));
    {
        const py::gil_scoped_release release;
        cuda::gram_core(memory.context(), sv, so);
    }
    return py::make_tuple(xo.object(), 1.0);
}

py::tuple quantize_int4(py::handle context, py::handle u, py::handle group) {
    const Call call(context);
    Array xu(call, u, "U");
    xu.as_matrix(true);
    xu.require_ndim(2);
    const std::int64_t n = xu.rows() * xu.cols(), each = std::min(whole_number(group, "group", 1), std::max<std::int64_t>(n, 1)),
                       groups = (n + each - 1) / each;
    const Array codes = call.empty({(n + 1) / 2}, DType::u8, "codes"), scale = call.empty({groups}, wide(xu.dtype())),
                zero = call.empty({groups}, wide(xu.dtype()));
    const Stack su = stack(xu, {});
    const Memory memory(call, 0);
    {
        const py::gil_scoped_release release;
        cuda::quantize_int4(memory.context(), su, each, static_cast<std::uint8_t *>(codes.data()), scale.data(), zero.data());
    }
    return py::make_tuple(codes.object(), scale.object(), zero.object(), py::make_tuple(xu.rows(), xu.cols()), each);
}

py::object unpack_int4(py::handle context, const py::tuple &parts) {
    const Call call(context);
    const Packed p(call, parts, "U");
    const Array out = call.empty({p.rows(), p.cols()}, p.dtype());
    const Stack so = stack(out, {});
    const Memory memory(call, 0);
    const py::gil_scoped_release release;
    cuda::unpack_int4(memory.context(), codes_of(p), so);
    return out.object();
}

py::object int4_product(py::handle context, const py::tuple &parts, py::handle x, py::handle side, py::handle transpose, double alpha, const py::object &out,
                        py::handle check, const char *name) {
    const Call call(context);
    const Array plain = for_blas(call, x, name);
    const PackedProduct p(call, parts, plain.object(), name, side, transpose);
    truth(check, "check");
    const Array xo = p.output(call, out);
    const Shape batch = p.x.c.leading();
    const auto codes = codes_of(p.u);
    const Stack sx = stack(p.x.c, batch), so = stack(xo, batch);
    const Memory memory(call, cuda::int4_product_workspace(codes, sx, call.device));
    {
        const py::gil_scoped_release release;
        cuda::int4_product(memory.context(), codes, sx, p.x.left, p.transpose, alpha, so);
    }
    xo.written();
    return xo.object();
}

py::tuple gradient_output(py::handle context, py::handle x, const std::string &name, const py::object &known, std::int64_t rank, py::handle side, bool up,
                          const py::object &out) {
    const Call call(context);
    const GradientPlan plan(known, rank, side);
    const Array xx(call, x, name.c_str());
    const Array xo = call.output(out, plan.result(xx, up), xx.dtype());
    check_no_overlap(xo, xx);
    if (for_blas(call, xo.object(), "out").data() != xo.data())
        throw py::value_error("out must have rows or columns that are contiguous and lie one after the other");
    const Shape &full = up ? plan.shape : xx.shape();
    return py::make_tuple(plan.right(full[0], full[1]), xo.object());
}

// alpha X P, or alpha P X, of matrices.
py::object product(py::handle context, py::handle x, py::handle p, py::handle right, double alpha, const py::object &out, const char *) {
    const Call call(context);
    const bool after = truth(right, "right");
    const Array xa = for_blas(call, after ? x : p, "A"), xb = for_blas(call, after ? p : x, "B");
    for (const Array *x : {&xa, &xb}) x->require_ndim(2);
    xb.require_dtype_of(xa);
    if (xa.cols() != xb.rows()) throw py::value_error("A " + xa.shape_text() + " and B " + xb.shape_text() + " do not fit each other");
    const Array xo = call.output(out, {xa.rows(), xb.cols()}, xa.dtype());
    check_no_overlap(xo, xa);
    check_no_overlap(xo, xb);
    const Stack sa = stack(xa, {}), sb = stack(xb, {}), so = stack(xo, {});
    const Memory memory(call, cuda::blas_workspace(call.device));
    {
        const py::gil_scoped_release release;
        cuda::matrix_product(memory.context(), sa, sb, alpha, so);
    }
    xo.written();
    return xo.object();
}

py::object rotate(py::handle context, py::handle c, py::handle source, py::handle target, py::handle side, const py::object &out, py::handle check) {
    const Call call(context);
    const Operand x(call, c, "C", side);
    truth(check, "check");
    const DType wider = wide(x.c.dtype());
    const std::int64_t n = x.left ? x.c.rows() : x.c.cols();
    const auto direction = [&](py::handle given, const char *name) {
        Array v = copied(call, Array(call, given, name), wider);
        require_direction(v, x.c, x.left);
        return v;
    };
    const Array s = direction(source, "source"), t = direction(target, "target");
    const Array v = call.empty({n, 2}, x.c.dtype()), m = call.empty({2, 2}, wider);
    {
        const Stack ss = stack(s, {}, 1), st = stack(t, {}, 1), sv = stack(v, {}), sm = stack(m, {});
        const Memory memory(call, cuda::rotation_workspace(ss));
        const py::gil_scoped_release release;
        cuda::rotation(memory.context(), ss, st, sv, sm);
    }
    const Shape batch = x.c.leading();
    const Array result = x.output(call, out, batch);
    check_no_overlap(result, x.c, true);
    Stack core = stack(m, batch);
    if (!x.left) core = core.transposed(); // C ↦ C Rᵀ
    apply_core(call, x.c, &v, nullptr, {&core, false, 1.0}, 1.0, x.left, result, batch);
    result.written();
    return result.object();
}

} // namespace

void register_device_orth(py::module_ &m) {
    using py::arg;
    m.def("apply_core", &apply_core_of, arg("call"), arg("C"), arg("V"), arg("M"), arg("alpha"), arg("side"), arg("out"), arg("check"));
    m.def(
        "project",
        [](py::handle call, py::handle c, py::handle u, py::handle side, const py::object &out, py::handle orthonormal, py::handle check) {
            return projected(call, c, u, side, 0.0, 1.0, out, orthonormal, check);
        },
        arg("call"), arg("C"), arg("U"), arg("side"), arg("out"), arg("orthonormal"), arg("check"));
    m.def(
        "project_out",
        [](py::handle call, py::handle c, py::handle u, py::handle side, py::handle strength, const py::object &out, py::handle orthonormal, py::handle check) {
            return projected(call, c, u, side, 1.0, -real(strength, "strength"), out, orthonormal, check);
        },
        arg("call"), arg("C"), arg("U"), arg("side"), arg("strength"), arg("out"), arg("orthonormal"), arg("check"));
    m.def("project_out_list", &project_out_list, arg("call"), arg("C"), arg("U"), arg("side"), arg("strength"), arg("out"), arg("orthonormal"), arg("check"));
    m.def("swap", &swap, arg("call"), arg("base"), arg("source"), arg("R"), arg("out"), arg("check"));
    m.def("gram_core", &gram_core, arg("call"), arg("V"));
    m.def("quantize_int4", &quantize_int4, arg("call"), arg("U"), arg("group"));
    m.def("check_int4", [](py::handle context, const py::tuple &parts) { Packed(Call(context), parts, "an Int4Basis"); }, arg("call"), arg("parts"));
    m.def("unpack_int4", &unpack_int4, arg("call"), arg("parts"));
    m.def("rotate", &rotate, arg("call"), arg("C"), arg("source"), arg("target"), arg("side"), arg("out"), arg("check"));
    m.def("int4_product", &int4_product, arg("call"), arg("parts"), arg("X"), arg("side"), arg("transpose"), arg("alpha"), arg("out"), arg("check"),
          arg("name"));
    m.def("gradient_output", &gradient_output, arg("call"), arg("x"), arg("name"), arg("known"), arg("rank"), arg("side"), arg("up"), arg("out"));
    m.def("product", &product, arg("call"), arg("X"), arg("P"), arg("right"), arg("alpha"), arg("out"), arg("name"));
}

} // namespace subspan::bind
