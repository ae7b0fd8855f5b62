// Arguments of the Grassmann family that both modules read alike.
#pragma once

#include "array.hpp"
#include "scalars.hpp"
#include "subspan/options.hpp"

#include <deque>
#include <utility>

namespace subspan::bind {

/// Points, tangents and the like: stacks of matrices of one shape and one dtype, float32 or float64.
class Points {
  public:
    Points(const Call &call, std::initializer_list<std::pair<const char *, py::handle>> given) {
        for (const auto &[name, x] : given) {
            const Array &a = arrays_.emplace_back(call, x, name);
            a.require_matrices();
            const Array &first = arrays_.front();
            if (arrays_.size() == 1) require_float32_or_64(a, ": points do not stay orthonormal in 16 bits");
            a.require_dtype_of(first);
            if (a.rows() != first.rows() || a.cols() != first.cols())
                throw py::value_error(std::string(name) + " must hold matrices of the shape that " + first.name() + " holds, " +
                                      shape_text({first.rows(), first.cols()}) + ", got shape " + a.shape_text() + convolution_hint(a.shape(), name));
        }
        require_tall(arrays_.front());
        std::size_t most = 0;
        for (const Array &a : arrays_) most = std::max(most, std::size_t(a.ndim() - 2));
        bool same = true;
        for (const Array &a : arrays_) same = same && a.shape() == arrays_.front().shape();
        if (same) {
            batch = arrays_.front().leading();
        } else if (arrays_.size() == 2) {
            batch = broadcast_leading({{&arrays_[0], 2}, {&arrays_[1], 2}});
        } else if (arrays_.size() == 3) {
            batch = broadcast_leading({{&arrays_[0], 2}, {&arrays_[1], 2}, {&arrays_[2], 2}});
        } else {
            batch = broadcast_leading({{&arrays_[0], 2}, {&arrays_[1], 2}, {&arrays_[2], 2}, {&arrays_[3], 2}});
        }
    }
    const Array &operator[](std::size_t i) const { return arrays_[i]; }
    DType dtype() const { return arrays_.front().dtype(); }
    std::int64_t rows() const { return arrays_.front().rows(); }
    std::int64_t cols() const { return arrays_.front().cols(); }
    /// The leading axes with others behind them.
    Shape with(std::initializer_list<std::int64_t> more) const {
        Shape shape = batch;
        shape.insert(shape.end(), more);
        return shape;
    }
    /// A result of the shape of a point.
    Array output(const Call &call, const py::object &out) const { return call.output(out, with({rows(), cols()}), dtype()); }
    Shape batch;

  private:
    std::deque<Array> arrays_;
};

/// U, the gradient and what a step changes beside U: one shape, one dtype, nothing that overlaps.
class StepArguments {
  public:
    StepArguments(const Call &call, py::handle u, py::handle grad, const char *name, py::handle moment)
        : u(call, u, "U", Access::in_place), grad(call, grad, "grad") {
        this->u.require_matrices();
        require_float32_or_64(this->u, ": points do not stay orthonormal in 16 bits");
        require_tall(this->u);
        check(this->grad);
        check_no_overlap(this->u, this->grad);
        if (moment.is_none()) return;
        this->moment.emplace(call, moment, name, Access::in_place);
        check(*this->moment);
        check_no_overlap(this->u, *this->moment);
        check_no_overlap(*this->moment, this->grad);
    }
    Array u, grad;
    std::optional<Array> moment;
    /// A number for each point.
    void check_second(const Array &second) const {
        second.require_dtype_of(u);
        if (second.shape() != u.leading())
            throw py::value_error("second_moment must have one entry for each class, shape " + shape_text(u.leading()) + ", got " + second.shape_text());
        check_no_overlap(second, u);
        check_no_overlap(second, grad);
        check_no_overlap(second, *moment);
    }

  private:
    void check(const Array &x) const {
        x.require_dtype_of(u);
        if (x.shape() != u.shape()) {
            x.require_matrices();
            throw py::value_error(std::string(x.name()) + " must have the shape of U, " + u.shape_text() + ", got " + x.shape_text() +
                                  convolution_hint(x.shape(), x.name()));
        }
    }
};

inline Retraction retraction_of(py::handle x, const char *name) {
    return static_cast<Retraction>(choice(x, name, {"exp", "cholesky", "polar", "qr", "cayley"}));
}
inline Distance distance_of(py::handle kind) {
    return static_cast<Distance>(choice(kind, "kind", {"geodesic", "chordal", "projection", "procrustes", "fubini-study", "binet-cauchy"}));
}
inline double rate(py::handle lr, py::handle maximize) {
    const double value = real(lr, "lr", 0.0);
    return truth(maximize, "maximize") ? -value : value;
}
inline bool is_parallel(py::handle transport) { return choice(transport, "transport", {"project", "parallel"}) == 1; }

struct SgdSettings {
    double rate, momentum, dampening;
    Retraction retraction;
    bool parallel;
    SgdSettings(py::handle lr, py::handle m, py::handle d, py::handle r, py::handle transport, py::handle maximize, bool buffer)
        : rate(bind::rate(lr, maximize)), momentum(real(m, "momentum", 0.0)), dampening(real(d, "dampening")), retraction(retraction_of(r, "retraction")),
          parallel(is_parallel(transport)) {
        if (buffer) return;
        if (momentum != 0) throw py::value_error("momentum is " + std::string(py::str(m)) + " and there is no buffer: pass an array of zeros like U");
        if (dampening != 0) throw py::value_error("dampening is " + std::string(py::str(d)) + " and there is no buffer: it damps what goes into one");
    }
};

struct AdamSettings {
    double rate, beta1, beta2, eps;
    std::int64_t step;
    Retraction retraction;
    bool parallel;
    AdamSettings(py::handle count, py::handle lr, py::handle betas, py::handle e, py::handle r, py::handle transport, py::handle maximize)
        : rate(bind::rate(lr, maximize)), eps(real(e, "eps", 0.0)), step(whole_number(count, "step", 1)), retraction(retraction_of(r, "retraction")),
          parallel(is_parallel(transport)) {
        if (!(PyTuple_Check(betas.ptr()) || PyList_Check(betas.ptr())) || py::len(betas) != 2)
            throw py::type_error("betas must be a pair of numbers, got " + std::string(py::repr(betas)));
        const auto pair = py::tuple(py::reinterpret_borrow<py::object>(betas));
        beta1 = real(pair[0], "betas[0]");
        beta2 = real(pair[1], "betas[1]");
    }
};

/// x (batch, n), U (classes, n, k) and perhaps grad (batch, classes).
class Features {
  public:
    Features(const Call &call, py::handle features, py::handle points, py::handle gradient) : x(call, features, "x"), u(call, points, "U") {
        require_float32_or_64(x);
        if (x.ndim() != 2) throw py::value_error("x must have shape (batch, n), got " + x.shape_text());
        u.require_dtype_of(x);
        if (u.ndim() != 3) throw py::value_error("U must have shape (classes, n, k), got " + u.shape_text());
        if (u.shape(1) != x.shape(1))
            throw py::value_error("x has " + std::to_string(x.shape(1)) + " features and the subspaces of U, shape " + u.shape_text() + ", are of " +
                                  std::to_string(u.shape(1)));
        if (gradient.is_none()) return;
        grad.emplace(call, gradient, "grad");
        grad->require_dtype_of(x);
        grad->require_shape({x.shape(0), u.shape(0)});
    }
    Array x, u;
    std::optional<Array> grad;
    /// dU, stored as U is: transposed for a transposed view.
    Array empty_like_u(const Call &call) const {
        const bool by_columns = u.shape(1) > 1 && u.shape(2) > 1 && std::abs(u.stride(1)) < std::abs(u.stride(2));
        if (!by_columns) return call.empty(u.shape(), u.dtype(), "dU");
        const Array made = call.empty({u.shape(0), u.shape(2), u.shape(1)}, u.dtype(), "dU");
        return Array(call, made.object().attr("swapaxes")(1, 2), "dU", Access::out);
    }
};

} // namespace subspan::bind
