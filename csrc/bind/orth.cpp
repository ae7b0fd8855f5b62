#include "gradient.hpp"
#include "host.hpp"
#include "register.hpp"
#include "subspan/apply_core.hpp"
#include "subspan/gram_core.hpp"
#include "subspan/hadamard.hpp"
#include "subspan/int4.hpp"
#include "subspan/product.hpp"
#include "subspan/spaces.hpp"

#include <deque>
#include <pybind11/stl.h>

namespace subspan::bind {
namespace {

// What makes the projector onto the span of a basis: the basis and a core. Of a basis that is not orthonormal the core is its
// Gram core, or where rounding would grow with its condition, an orthonormal basis of the span takes its place.
template <class T> class Projector {
  public:
    // The GIL must be held where u is packed: its Gram core is kept by the object.
    Projector(const BasisArgument &u, int orthonormal, bool check) {
        const bool packed = u.packed() != nullptr;
        if (orthonormal == 1 && packed) throw py::value_error(std::string(u.name()) + " is an Int4Basis, and rounding to 4 bits leaves no basis orthonormal");
        if (packed) {
            int4_ = u.packed()->view<T>();
            const auto found = py::tuple(u.object().attr("_gram_core")());
            if (py::cast<double>(found[1]) > kMostCondition) {
                const py::gil_scoped_release release;
                Temporary<T> dense({}, int4_.rows, int4_.cols);
                subspan::unpack<T>(int4_, dense.stack.first);
                of_span(StackView<const T>(dense.stack), u.name());
            } else {
                const Array core(found[0], "the Gram core");
                core_.emplace(Shape{}, int4_.cols, int4_.cols);
                copy_stack<T>(core.stack<T>({}), core_->stack);
            }
            return;
        }
        dense_ = u.dense()->stack<const T>(u.dense()->leading());
        const py::gil_scoped_release release;
        if (orthonormal != 0) {
            if (check) check_basis<T>(dense_, u.name(), "pass orthonormal=False for any basis, ");
            return;
        }
        core_.emplace(dense_.shape, dense_.cols(), dense_.cols());
        double worst = 0;
        Basis<T> basis(dense_);
        basis.name = u.name();
        for (std::int64_t i = 0; i < (dense_.empty() ? 0 : dense_.size()); ++i) worst = std::max(worst, subspan::gram_core<T>(basis, i, core_->stack[i]));
        if (worst > kMostCondition) {
            core_.reset();
            of_span(dense_, u.name());
        }
    }
    Basis<T> basis(const Shape &batch, const BasisArgument &u) const {
        Basis<T> v = span_ ? Basis<T>(span_->over(batch)) : u.packed() != nullptr ? Basis<T>(int4_) : Basis<T>(u.dense()->stack<const T>(batch));
        v.name = u.name();
        return v;
    }
    // The core times a number.
    Core<T> core(const Shape &batch, double factor) {
        if (!core_) return Core<T>(static_cast<T>(factor));
        for (std::int64_t i = 0; i < core_->stack.size() * core_->stack.rows() * core_->stack.cols(); ++i)
            core_->items[std::size_t(i)] *= static_cast<T>(factor);
        return Core<T>::full(core_->over(batch));
    }

  private:
    static constexpr double kMostCondition = 100.0;
    void of_span(const StackView<const T> &u, const char *name) {
        const std::int64_t k = std::min(u.rows(), u.cols());
        span_.emplace(u.shape, u.rows(), k);
        std::vector<std::int64_t> ranks(std::size_t(u.size()));
        subspan::column_space<T>(u, double(std::max(u.rows(), u.cols())) * double(std::numeric_limits<T>::epsilon()), true, span_->stack, ranks.data(), name);
    }
    Int4View<T> int4_;
    StackView<const T> dense_;
    std::optional<Temporary<T>> core_, span_;
};

template <class T>
void run_core(const Array &c, const Basis<T> &basis, const Core<T> &core, double alpha, bool left, const Array &out, const Shape &batch, bool check,
              const Array *source = nullptr) {
    const StackView<const T> vc = c.stack<const T>(batch);
    const StackView<T> vo = out.stack<T>(batch);
    StackView<const T> vs;
    if (source != nullptr) vs = source->stack<const T>(batch);
    const py::gil_scoped_release release;
    subspan::apply_core<T>(vc, basis, core, static_cast<T>(alpha), side_of(left), vo, check, source != nullptr ? &vs : nullptr);
}

py::object apply_core(py::handle context, py::handle given, py::handle v, py::handle m, py::handle alpha, py::handle side, const py::object &out,
                      py::handle check) {
    const Call call(context);
    const Operand x(call, given, "C", side);
    const bool checks = truth(check, "check");
    const double a = real(alpha, "alpha");
    const CoreArgument core(call, m, x.c.dtype());
    const BasisArgument basis(call, v, "V");
    basis.require_fits(x.c, x.left);
    core.require_fits(basis.cols(), "V");
    Shape batch = x.c.leading(), of_v = basis.leading();
    if (!of_v.empty() || (core.array() != nullptr && !core.diagonal())) {
        if (basis.dense() != nullptr && core.array() != nullptr && !core.diagonal())
            batch = broadcast_leading({{&x.c, 2}, {basis.dense(), 2}, {core.array(), 2}});
        else
            batch = broadcast_leading({{&x.c, 2}, {basis.dense() != nullptr ? basis.dense() : core.array(), 2}});
    }
    const Array result = x.output(call, out, batch);
    check_no_overlap(result, x.c, true);
    basis.check_no_overlap_with(result);
    if (core.array() != nullptr) check_no_overlap(result, *core.array());
    dispatch(x.c.dtype(), [&](auto t) {
        using T = decltype(t);
        Int4View<T> view;
        if (basis.packed() != nullptr) view = basis.packed()->view<T>();
        const Basis<T> b = basis.packed() != nullptr ? Basis<T>(view) : Basis<T>(basis.dense()->stack<const T>(batch));
        Core<T> k(static_cast<T>(core.value()));
        if (core.array() != nullptr)
            k = core.diagonal() ? Core<T>(Core<T>::Kind::diagonal, core.array()->row_stack<const T>(batch))
                                : Core<T>::full(core.array()->stack<const T>(batch));
        run_core<T>(x.c, b, k, a, x.left, result, batch, checks);
    });
    result.written();
    return result.object();
}

// alpha C + factor U M UᵀC, with M what makes U M Uᵀ a projector; on one side.
py::object project_one(const Call &call, const Operand &x, const BasisArgument &u, double alpha, double factor, const py::object &out, int orthonormal,
                       bool check, bool looked_at = false) {
    u.require_fits(x.c, x.left);
    const int sure = promised(orthonormal, u);
    Shape batch = x.c.leading();
    if (u.dense() != nullptr && u.dense()->ndim() > 2) batch = broadcast_leading({{&x.c, 2}, {u.dense(), 2}});
    return dispatch(x.c.dtype(), [&](auto t) {
        using T = decltype(t);
        if (sure == 1 && u.dense() != nullptr && !check) { // nothing to look at
            const Array result = x.output(call, out, batch);
            check_no_overlap(result, x.c, true);
            check_no_overlap(result, *u.dense());
            run_core<T>(x.c, Basis<T>(u.dense()->stack<const T>(batch)), Core<T>(static_cast<T>(factor)), alpha, x.left, result, batch, false);
            result.written();
            return result.object();
        }
        Projector<T> p(u, sure, check && !looked_at);
        const Array result = x.output(call, out, batch);
        check_no_overlap(result, x.c, true);
        u.check_no_overlap_with(result);
        run_core<T>(x.c, p.basis(batch, u), p.core(batch, factor), alpha, x.left, result, batch, check);
        result.written();
        return result.object();
    });
}

// The left and then the right form. Whatever can be wrong with the right basis is found before C is written.
py::object project_both(const Call &call, const Operand &x, py::handle pair, double alpha, double factor, const py::object &out, int orthonormal, bool check) {
    if (!(PyTuple_Check(pair.ptr()) || PyList_Check(pair.ptr())) || py::len(pair) != 2)
        throw py::value_error("side='both' takes U as a pair, (left basis, right basis)");
    const auto us = py::tuple(py::reinterpret_borrow<py::object>(pair));
    const BasisArgument left(call, us[0], "U[0]"), right(call, us[1], "U[1]");
    left.require_fits(x.c, true);
    right.require_fits(x.c, false);
    Shape batch = x.c.leading();
    for (const BasisArgument *u : {&left, &right})
        if (u->dense() != nullptr) {
            const Shape other = u->leading();
            if (!other.empty()) {
                batch = left.dense() != nullptr && right.dense() != nullptr ? broadcast_leading({{&x.c, 2}, {left.dense(), 2}, {right.dense(), 2}})
                                                                            : broadcast_leading({{&x.c, 2}, {u->dense(), 2}});
                break;
            }
        }
    return dispatch(x.c.dtype(), [&](auto t) {
        using T = decltype(t);
        Projector<T> pl(left, promised(orthonormal, left), check), pr(right, promised(orthonormal, right), check);
        if (check)
            for (const BasisArgument *u : {&left, &right})
                if (u->dense() != nullptr && !subspan::all_finite<T>(u->dense()->stack<const T>(u->leading())))
                    throw py::value_error(std::string(u->name()) + " holds NaN or infinity");
        const Array result = x.output(call, out, batch);
        check_no_overlap(result, x.c, true);
        left.check_no_overlap_with(result);
        right.check_no_overlap_with(result);
        const StackView<const T> vc = x.c.stack<const T>(batch);
        const StackView<T> vo = result.stack<T>(batch);
        const Basis<T> bl = pl.basis(batch, left), br = pr.basis(batch, right);
        const Core<T> cl = pl.core(batch, factor), cr = pr.core(batch, factor);
        {
            const py::gil_scoped_release release;
            const Temporary<T> aside(batch, vc.rows(), vc.cols()); // an interrupt between the two leaves C as it was
            subspan::apply_core<T>(vc, bl, cl, static_cast<T>(alpha), Side::left, aside.stack, check);
            subspan::apply_core<T>(aside.stack, br, cr, static_cast<T>(alpha), Side::right, vo, check);
        }
        result.written();
        return result.object();
    });
}

py::object projected(py::handle context, py::handle c, py::handle u, py::handle side, double alpha, double factor, const py::object &out,
                     py::handle orthonormal, py::handle check) {
    const Call call(context);
    const Operand x(call, c, "C", side, true);
    const int sure = promised(orthonormal);
    const bool checks = truth(check, "check");
    if (is_both(side)) return project_both(call, x, u, alpha, factor, out, sure, checks);
    return project_one(call, x, BasisArgument(call, u, "U"), alpha, factor, out, sure, checks);
}

// One by one, once all of them have been looked at: an entry that is refused leaves the others as they were.
py::list project_out_list(py::handle context, const py::list &cs, const py::list &us, py::handle side, py::handle strength, const py::object &outs,
                          py::handle orthonormal, py::handle check) {
    const Call call(context);
    load_lapack();
    if (is_both(side)) throw py::value_error("a list of matrices takes side='left' or 'right'");
    const double factor = -real(strength, "strength");
    const int sure = promised(orthonormal);
    const bool checks = truth(check, "check");
    std::deque<std::string> names;
    std::deque<Operand> xs;
    std::deque<BasisArgument> bases;
    std::deque<Array> targets;
    for (std::size_t i = 0; i < cs.size(); ++i) {
        const std::string at = "[" + std::to_string(i) + "]";
        const Operand &x = xs.emplace_back(call, cs[i], names.emplace_back("C" + at).c_str(), side);
        const BasisArgument &u = bases.emplace_back(call, us[i], names.emplace_back("U" + at).c_str());
        u.require_fits(x.c, x.left);
        dispatch(x.c.dtype(), [&](auto t) {
            using T = decltype(t);
            if (checks && !subspan::all_finite<T>(x.c.stack<const T>(x.c.leading()))) throw py::value_error(std::string(x.c.name()) + " holds NaN or infinity");
        });
    }
    if (!outs.is_none()) {
        std::vector<Layout> a;
        std::vector<std::vector<Layout>> b;
        const auto list = py::list(outs);
        for (std::size_t i = 0; i < cs.size(); ++i) {
            const Array &to = targets.emplace_back(call, list[i], names.emplace_back("out[" + std::to_string(i) + "]").c_str(), Access::out);
            to.require_dtype(xs[i].c.dtype());
            a.push_back(to.layout());
            b.push_back({xs[i].c.layout()});
            if (bases[i].dense() != nullptr)
                b.back().push_back(bases[i].dense()->layout());
            else
                for (const Array *part : {&bases[i].packed()->scale(), &bases[i].packed()->zero()}) b.back().push_back(part->layout());
        }
        check_entries_overlap(a, b);
    }
    for (std::size_t i = 0; i < cs.size(); ++i) // bases are looked at before the first entry is written
        dispatch(xs[i].c.dtype(), [&](auto t) { Projector<decltype(t)>(bases[i], promised(sure, bases[i]), checks); });
    py::list results;
    for (std::size_t i = 0; i < cs.size(); ++i)
        results.append(project_one(call, xs[i], bases[i], 1.0, factor, outs.is_none() ? py::none() : py::object(py::list(outs)[i]), sure, checks, true));
    return results;
}

py::object swap(py::handle context, py::handle base, py::handle source, py::handle r, const py::object &out, py::handle check) {
    const Call call(context);
    const SwapArguments x(call, base, source, r);
    const bool checks = truth(check, "check");
    const Array result = x.output(call, out);
    dispatch(x.base.dtype(), [&](auto t) {
        using T = decltype(t);
        if (checks) {
            const auto vu = x.basis.stack<const T>(x.basis.leading());
            const py::gil_scoped_release release;
            check_basis<T>(vu, "R");
        }
        run_core<T>(x.base, Basis<T>(x.basis.stack<const T>(x.batch)), Core<T>(T(1)), 1.0, false, result, x.batch, checks, &x.source);
    });
    result.written();
    return result.object();
}

// Real numbers of any kind in double.
py::object numbers(py::handle given, const char *name) {
    const py::array x = in_numpy(given);
    if (std::string("fiu").find(x.dtype().kind()) == std::string::npos)
        throw py::type_error(std::string(name) + " must be real numbers, got " + std::string(py::str(x.dtype())));
    return py::array_t<double, py::array::c_style | py::array::forcecast>(x);
}

py::object rotate(py::handle context, py::handle c, py::handle source, py::handle target, py::handle side, const py::object &out, py::handle check) {
    const Call call(context);
    const Operand x(call, c, "C", side);
    const Array s(numbers(source, "source"), "source"), t(numbers(target, "target"), "target");
    for (const Array *v : {&s, &t}) require_direction(*v, x.c, x.left);
    const bool checks = truth(check, "check");
    const Shape batch = x.c.leading();
    return dispatch(x.c.dtype(), [&](auto kind) {
        using T = decltype(kind);
        const std::int64_t n = s.shape(0);
        Temporary<T> v({}, n, 2), m({}, 2, 2);
        subspan::rotation<T>(n, s.vector<const double>(n), t.vector<const double>(n), v.stack.first, m.stack.first);
        if (!x.left) std::swap(m.items[1], m.items[2]); // C ↦ C Rᵀ
        const Array result = x.output(call, out, batch);
        check_no_overlap(result, x.c, true);
        run_core<T>(x.c, Basis<T>(v.over(batch)), Core<T>::full(m.over(batch)), 1.0, x.left, result, batch, checks);
        result.written();
        return result.object();
    });
}

py::object hadamard(py::handle context, py::handle x, const py::object &out, py::handle scale, py::handle transpose, py::handle check) {
    const Call call(context);
    Array xx(call, x, "x");
    if (xx.ndim() < 1) throw py::value_error("x must have at least 1 dimension");
    const std::int64_t n = xx.shape(xx.ndim() - 1);
    if (n == 0) throw py::value_error("the last axis of x is empty");
    const double factor = scale.is_none() ? 1.0 / std::sqrt(double(n)) : real(scale, "scale");
    const bool transposed = truth(transpose, "transpose"), checks = truth(check, "check");
    Array xo = call.output(out, xx.shape(), xx.dtype());
    xx.as_matrix(false);
    xo.as_matrix(false);
    check_no_overlap(xo, xx, true);
    const auto batch = xx.leading();
    dispatch(xx.dtype(), [&](auto t) {
        using T = decltype(t);
        const auto vx = xx.stack<const T>(batch);
        const auto vo = xo.stack<T>(batch);
        const py::gil_scoped_release release;
        whole<T>(vo, vo.first.data == vx.first.data, 0.0,
                 [&](const StackView<T> &to) { subspan::hadamard<T>(vx, to, static_cast<T>(factor), transposed, checks); });
    });
    xo.written();
    return xo.object();
}

py::object random_orthogonal(py::handle context, std::uint64_t key, const Shape &shape, bool single) {
    const Array xo = Call(context).empty(shape, single ? DType::f32 : DType::f64);
    dispatch(xo.dtype(), [&](auto t) {
        using T = decltype(t);
        const auto vo = xo.stack<T>(xo.leading());
        const py::gil_scoped_release release;
        subspan::random_orthogonal<T>(key, vo);
    });
    return xo.object();
}

py::tuple gram_core(py::handle context, py::handle v) {
    const Call call(context);
    load_lapack();
    const BasisArgument xv(call, v, "V");
    Shape shape = xv.leading();
    shape.insert(shape.end(), {xv.cols(), xv.cols()});
    const Array xo = call.empty(shape, xv.dtype(), "M");
    double worst = 0;
    dispatch(xv.dtype(), [&](auto t) {
        using T = decltype(t);
        Int4View<T> view;
        if (xv.packed() != nullptr) view = xv.packed()->view<T>();
        const Basis<T> basis = xv.packed() != nullptr ? Basis<T>(view) : Basis<T>(xv.dense()->stack<const T>(xv.leading()));
        const StackView<T> vo = xo.stack<T>(xv.leading());
        const py::gil_scoped_release release;
        for (std::int64_t i = 0; i < (vo.empty() ? 0 : vo.size()); ++i) worst = std::max(worst, subspan::gram_core<T>(basis, i, vo[i]));
    });
    return py::make_tuple(xo.object(), worst);
}

py::tuple quantize_int4(py::handle context, py::handle u, py::handle group) {
    const Call call(context);
    Array xu(call, u, "U");
    xu.as_matrix(true);
    xu.require_ndim(2);
    const std::int64_t n = xu.rows() * xu.cols(), each = std::min(whole_number(group, "group", 1), std::max<std::int64_t>(n, 1)),
                       groups = (n + each - 1) / each;
    const Array codes = call.empty({(n + 1) / 2}, DType::u8, "codes"), scale = call.empty({groups}, xu.dtype()), zero = call.empty({groups}, xu.dtype());
    dispatch(xu.dtype(), [&](auto t) {
        using T = decltype(t);
        const auto view = xu.matrix<const T>();
        const py::gil_scoped_release release;
        subspan::quantize_int4<T>(view, each, static_cast<std::uint8_t *>(codes.data()), static_cast<T *>(scale.data()), static_cast<T *>(zero.data()));
    });
    return py::make_tuple(codes.object(), scale.object(), zero.object(), py::make_tuple(xu.rows(), xu.cols()), each);
}

py::object unpack_int4(py::handle context, const py::tuple &parts) {
    const Call call(context);
    const Packed p(call, parts, "U");
    const Array out = call.empty({p.rows(), p.cols()}, p.dtype());
    dispatch(p.dtype(), [&](auto t) {
        using T = decltype(t);
        const auto view = p.view<T>();
        const auto dense = out.matrix<T>();
        const py::gil_scoped_release release;
        subspan::unpack<T>(view, dense);
    });
    return out.object();
}

// A multiple of a stack.
template <class T> struct Scaled {
    Temporary<T> copy;
    Scaled(const StackView<const T> &x, T factor) : copy(x.shape, x.rows(), x.cols()) {
        parallel_for(x.size(), [&](std::int64_t i) {
            const auto from = x[i];
            const auto to = copy.stack[i];
            for (std::int64_t r = 0; r < to.rows; ++r)
                for (std::int64_t c = 0; c < to.cols; ++c) to(r, c) = from(r, c) * factor;
        });
    }
};

// alpha U X, alpha Uᵀ X, alpha X U or alpha X Uᵀ for a packed U. With check ValueError where x is not finite.
py::object int4_product(py::handle context, const py::tuple &parts, py::handle x, py::handle side, py::handle transpose, double alpha, const py::object &out,
                        py::handle check, const char *name) {
    const Call call(context);
    const PackedProduct p(call, parts, x, name, side, transpose);
    const bool checks = truth(check, "check");
    const Array xo = p.output(call, out);
    const auto batch = p.x.c.leading();
    dispatch(p.u.dtype(), [&](auto t) {
        using T = decltype(t);
        const auto view = p.u.view<T>();
        const auto given = p.x.c.stack<const T>(batch);
        auto vx = given;
        const auto vo = xo.stack<T>(batch);
        const py::gil_scoped_release release;
        std::optional<Scaled<T>> scaled;
        if (alpha != 1.0) {
            scaled.emplace(vx, static_cast<T>(alpha));
            vx = scaled->copy.stack;
        }
        subspan::int4_product<T>(view, vx, p.x.left, p.transpose, vo);
        if (checks) require_finite_product<T>(vo, given, name);
    });
    xo.written();
    return xo.object();
}

// Where a gradient goes down, or a small one up, and whether the basis is of right singular vectors: looked at before the basis
// is found that the product is with.
py::tuple gradient_output(py::handle context, py::handle x, const std::string &name, const py::object &known, std::int64_t rank, py::handle side, bool up,
                          const py::object &out) {
    const Call call(context);
    const GradientPlan plan(known, rank, side);
    const Array xx(call, x, name.c_str());
    const Array xo = call.output(out, plan.result(xx, up), xx.dtype());
    check_no_overlap(xo, xx);
    if (xo.cols() > 1 && xo.stride(1) != 1) throw py::value_error("out must have contiguous rows");
    const Shape &full = up ? plan.shape : xx.shape();
    return py::make_tuple(plan.right(full[0], full[1]), xo.object());
}

// alpha X P, or alpha P X, for stacks; ValueError where X, which `name` names, is not finite.
py::object product(py::handle context, py::handle x, py::handle p, py::handle right, double alpha, const py::object &out, const char *name) {
    const bool after = truth(right, "right");
    const py::handle a = after ? x : p, b = after ? p : x;
    const Call call(context);
    const Array xa = matrices(call, a, "A", false), xb = matrices(call, b, "B", false);
    xb.require_dtype_of(xa);
    if (xa.cols() != xb.rows()) throw py::value_error("A " + xa.shape_text() + " and B " + xb.shape_text() + " do not fit each other");
    const Shape batch = broadcast_leading({{&xa, 2}, {&xb, 2}});
    Shape shape = batch;
    shape.insert(shape.end(), {xa.rows(), xb.cols()});
    const Array xo = call.output(out, shape, xa.dtype());
    check_no_overlap(xo, xa);
    check_no_overlap(xo, xb);
    dispatch(xa.dtype(), [&](auto t) {
        using T = decltype(t);
        auto va = xa.stack<const T>(batch), vb = xb.stack<const T>(batch);
        const auto given = after ? va : vb;
        const auto vo = xo.stack<T>(batch);
        const py::gil_scoped_release release;
        std::optional<Scaled<T>> scaled;
        if (alpha != 1.0) { // of the smaller operand, not of the large result
            auto &small = va.rows() * va.cols() <= vb.rows() * vb.cols() ? va : vb;
            scaled.emplace(small, static_cast<T>(alpha));
            small = scaled->copy.stack;
        }
        subspan::product<T>(va, vb, vo);
        require_finite_product<T>(vo, given, name);
    });
    xo.written();
    return xo.object();
}

py::object projector(py::handle context, py::handle u, py::handle check) {
    const Call call(context);
    const Array xa = matrices(call, u, "U", false);
    const bool checks = truth(check, "check");
    Shape shape = xa.leading();
    shape.insert(shape.end(), {xa.rows(), xa.rows()});
    const Array xo = call.empty(shape, xa.dtype());
    dispatch(xa.dtype(), [&](auto t) {
        using T = decltype(t);
        const auto va = xa.stack<const T>(xa.leading());
        const auto vo = xo.stack<T>(xa.leading());
        const py::gil_scoped_release release;
        if (checks) check_basis<T>(va, "U");
        subspan::outer_product<T>(va, vo);
    });
    return xo.object();
}

} // namespace

void register_orth(py::module_ &m) {
    m.def("apply_core", &apply_core, py::arg("call"), py::arg("C"), py::arg("V"), py::arg("M"), py::arg("alpha"), py::arg("side"), py::arg("out"),
          py::arg("check"));
    m.def(
        "project",
        [](py::handle call, py::handle c, py::handle u, py::handle side, const py::object &out, py::handle orthonormal, py::handle check) {
            load_lapack();
            return projected(call, c, u, side, 0.0, 1.0, out, orthonormal, check);
        },
        py::arg("call"), py::arg("C"), py::arg("U"), py::arg("side"), py::arg("out"), py::arg("orthonormal"), py::arg("check"));
    m.def(
        "project_out",
        [](py::handle call, py::handle c, py::handle u, py::handle side, py::handle strength, const py::object &out, py::handle orthonormal, py::handle check) {
            load_lapack();
            return projected(call, c, u, side, 1.0, -real(strength, "strength"), out, orthonormal, check);
        },
        py::arg("call"), py::arg("C"), py::arg("U"), py::arg("side"), py::arg("strength"), py::arg("out"), py::arg("orthonormal"), py::arg("check"));
    m.def("project_out_list", &project_out_list, py::arg("call"), py::arg("C"), py::arg("U"), py::arg("side"), py::arg("strength"), py::arg("out"),
          py::arg("orthonormal"), py::arg("check"));
    m.def("swap", &swap, py::arg("call"), py::arg("base"), py::arg("source"), py::arg("R"), py::arg("out"), py::arg("check"));
    m.def("rotate", &rotate, py::arg("call"), py::arg("C"), py::arg("source"), py::arg("target"), py::arg("side"), py::arg("out"), py::arg("check"));
    m.def("hadamard", &hadamard, py::arg("call"), py::arg("x"), py::arg("out"), py::arg("scale"), py::arg("transpose"), py::arg("check"));
    m.def("random_orthogonal", &random_orthogonal, py::arg("call"), py::arg("key"), py::arg("shape"), py::arg("single"));
    m.def("gram_core", &gram_core, py::arg("call"), py::arg("V"));
    m.def("quantize_int4", &quantize_int4, py::arg("call"), py::arg("U"), py::arg("group"));
    m.def("check_int4", [](py::handle context, const py::tuple &parts) { Packed(Call(context), parts, "an Int4Basis"); }, py::arg("call"), py::arg("parts"));
    m.def("unpack_int4", &unpack_int4, py::arg("call"), py::arg("parts"));
    m.def("int4_product", &int4_product, py::arg("call"), py::arg("parts"), py::arg("X"), py::arg("side"), py::arg("transpose"), py::arg("alpha"),
          py::arg("out"), py::arg("check"), py::arg("name"));
    m.def("product", &product, py::arg("call"), py::arg("X"), py::arg("P"), py::arg("right"), py::arg("alpha"), py::arg("out"), py::arg("name"));
    m.def("gradient_output", &gradient_output, py::arg("call"), py::arg("x"), py::arg("name"), py::arg("known"), py::arg("rank"), py::arg("side"),
          py::arg("up"), py::arg("out"));
    m.def("projector", &projector, py::arg("call"), py::arg("U"), py::arg("check"));
    m.def(
        "all_finite",
        [](py::handle x) {
            Array xx(x, "x");
            while (xx.ndim() < 2) xx.add_axis(false);
            return dispatch(xx.dtype(), [&](auto t) {
                using T = decltype(t);
                const auto vx = xx.stack<const T>(xx.leading());
                const py::gil_scoped_release release;
                return subspan::all_finite<T>(vx);
            });
        },
        py::arg("x"));
}

} // namespace subspan::bind
