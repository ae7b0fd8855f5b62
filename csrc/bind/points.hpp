// Arguments of the Grassmann family that both modules read alike.
#pragma once

#include "array.hpp"
#include "scalars.hpp"
#include "subspan/options.hpp"

#include <cmath>
#include <deque>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

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

inline StepOptions step_options(py::handle lr, py::handle maximize, py::handle retraction, py::handle transport, py::handle check) {
    StepOptions o;
    o.lr = rate(lr, maximize);
    o.retraction = retraction_of(retraction, "retraction");
    o.transport = is_parallel(transport) ? MomentumTransport::parallel : MomentumTransport::project;
    o.check = truth(check, "check");
    return o;
}

struct SgdSettings {
    StepOptions options;
    double momentum, dampening;
    SgdSettings(py::handle lr, py::handle m, py::handle d, py::handle r, py::handle transport, py::handle maximize, py::handle check, bool buffer)
        : options(step_options(lr, maximize, r, transport, check)), momentum(real(m, "momentum", 0.0)), dampening(real(d, "dampening")) {
        if (buffer) return;
        if (momentum != 0) throw py::value_error("momentum is " + std::string(py::str(m)) + " and there is no buffer: pass an array of zeros like U");
        if (dampening != 0) throw py::value_error("dampening is " + std::string(py::str(d)) + " and there is no buffer: it damps what goes into one");
    }
};

struct AdamSettings {
    StepOptions options;
    double beta1, beta2, eps;
    std::int64_t step;
    AdamSettings(py::handle count, py::handle lr, py::handle betas, py::handle e, py::handle r, py::handle transport, py::handle maximize, py::handle check)
        : options(step_options(lr, maximize, r, transport, check)), eps(real(e, "eps", 0.0)), step(whole_number(count, "step", 1)) {
        if (!(PyTuple_Check(betas.ptr()) || PyList_Check(betas.ptr())) || py::len(betas) != 2)
            throw py::type_error("betas must be a pair of numbers, got " + std::string(py::repr(betas)));
        const auto pair = py::tuple(py::reinterpret_borrow<py::object>(betas));
        beta1 = real(pair[0], "betas[0]");
        beta2 = real(pair[1], "betas[1]");
    }
};

struct MeanFigures {
    double gradient_norm = 0, variance = 0;
    std::int64_t iterations = 0;
    bool converged = true;
};

/// The points U (N, ..., n, k) of a mean, their weights, and when to stop.
class MeanArguments {
  public:
    MeanArguments(const Call &call, py::handle points, const py::object &weighed, const py::object &first, py::handle tol, py::handle max_iterations,
                  const py::object &hears, const py::object &given)
        : u(call, points, "U"), progress(hears), limit(whole_number(max_iterations, "max_iterations", 0)), out(output(call, first, given)) {
        tolerance = tol.is_none() ? 50 * (u.dtype() == DType::f32 ? double(std::numeric_limits<float>::epsilon()) : std::numeric_limits<double>::epsilon()) *
                                        std::sqrt(double(std::max<std::int64_t>(u.cols(), 1)))
                                  : real(tol, "tol", 0.0);
        if (!progress.is_none() && PyCallable_Check(progress.ptr()) == 0)
            throw py::type_error("progress must be callable, got " + std::string(py::str(py::type::handle_of(progress).attr("__name__"))));
        if (weighed.is_none()) return;
        const auto plain = py::array::ensure(weighed);
        if (!plain || std::string("fiu").find(plain.dtype().kind()) == std::string::npos) {
            PyErr_Clear();
            throw py::type_error("weights must be real numbers, got " + std::string(py::str(weighed.attr("dtype"))));
        }
        const auto numbers = py::cast<py::array_t<double, py::array::c_style | py::array::forcecast>>(plain);
        if (numbers.ndim() != 1 || numbers.shape(0) != u.shape(0))
            throw py::value_error("weights must have shape (" + std::to_string(u.shape(0)) + ",), one for each point, got " +
                                  std::string(py::str(plain.attr("shape"))));
        weights.assign(numbers.data(), numbers.data() + numbers.size());
    }
    Array u;
    std::optional<Array> initial;
    Shape batch;
    std::int64_t means = 1;
    std::vector<double> weights; // none: equal ones
    py::object progress;
    std::int64_t limit;
    double tolerance = 0;
    Array out;

    /// The means, what is known of each as arrays (numbers where there is one), and a warning where some did not converge.
    py::tuple result(const std::vector<MeanFigures> &all) const {
        const std::vector<py::ssize_t> shape(batch.begin(), batch.end());
        py::array_t<double> norms(shape), variances(shape);
        py::array_t<std::int64_t> iterations(shape);
        py::array_t<bool> converged(shape);
        std::int64_t late = 0, longest = 0;
        double worst = 0;
        for (std::size_t i = 0; i < all.size(); ++i) {
            const MeanFigures &f = all[i];
            norms.mutable_data()[i] = f.gradient_norm, variances.mutable_data()[i] = f.variance;
            iterations.mutable_data()[i] = f.iterations, converged.mutable_data()[i] = f.converged;
            if (f.converged) continue;
            ++late;
            longest = std::max(longest, f.iterations);
            worst = std::max(worst, f.gradient_norm);
        }
        py::object warning = py::none();
        if (late > 0)
            warning = py::str("{} of {} means did not reach tol={:.1e} in {} iterations: the gradient norm is {:.1e}. Points may be too far apart for a unique "
                              "mean, or tol below what rounding allows; full_output=True returns these figures instead of this warning")
                          .attr("format")(late, all.size(), tolerance, longest, worst);
        const auto one = [&](const py::object &x) { return batch.empty() ? py::object(x[py::tuple()]) : x; };
        out.written();
        return py::make_tuple(out.object(), one(norms), one(variances), one(iterations), one(converged), warning);
    }

  private:
    Array output(const Call &call, const py::object &first, const py::object &given) {
        if (u.ndim() < 3) throw py::value_error("U must have at least 3 dimensions, the first one of points, got shape " + u.shape_text());
        require_float32_or_64(u);
        if (u.shape(0) == 0) throw py::value_error("U holds no points: its shape is " + u.shape_text());
        require_tall(u);
        Shape shape(u.shape().begin() + 1, u.shape().end());
        batch.assign(shape.begin(), shape.end() - 2);
        for (const auto n : batch) means *= n;
        if (!first.is_none()) {
            initial.emplace(call, first, "initial");
            initial->require_dtype_of(u);
            if (initial->shape() != shape)
                throw py::value_error("initial must have the shape of the means, " + shape_text(shape) + ", got " + initial->shape_text());
        }
        Array to = call.output(given, shape, u.dtype());
        check_no_overlap(to, u);
        if (initial) check_no_overlap(to, *initial, true);
        return to;
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
    /// U_cᵀ x / ‖x‖ of each feature and class, which the logits keep and the gradients take; none.
    std::optional<Array> projections(const Call &call, py::handle given, Access access) const {
        if (given.is_none()) return std::nullopt;
        Array kept(call, given, "projections", access);
        kept.require_dtype_of(x);
        kept.require_shape({x.shape(0), u.shape(0), u.shape(2)});
        kept.contiguous();
        for (const Array *other : {&x, &u})
            if (access == Access::out) check_no_overlap(kept, *other);
        return kept;
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
