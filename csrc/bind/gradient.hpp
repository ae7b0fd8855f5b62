// Gradients that a low-rank projector takes down and up, read alike by both modules.
#pragma once

#include "array.hpp"
#include "scalars.hpp"

#include <algorithm>
#include <cstdint>
#include <string>

namespace subspan::bind {

/// What a projector knows of its gradients: the shape and the dtype of those before, or None, its rank and its side.
class GradientPlan {
  public:
    GradientPlan(const py::object &known, std::int64_t rank, py::handle side) : rank(rank), side_(choice(side, "side", {"auto", "left", "right"})) {
        if (known.is_none()) return;
        const auto pair = py::tuple(known);
        dtype_ = pair[1].cast<std::string>();
        for (const auto n : py::tuple(pair[0])) shape.push_back(n.cast<std::int64_t>());
    }
    /// Whether the basis is that of the right singular vectors.
    bool right(std::int64_t m, std::int64_t n) const { return side_ == 0 ? m >= n : side_ == 2; }
    void require_dtype(const Array &x) const {
        if (!dtype_.empty() && x.dtype_name() != dtype_)
            throw py::type_error(std::string(x.name()) + " must be " + dtype_ + " as before, got " + x.dtype_name());
    }
    /// Errors unless g is such a gradient.
    void require_fits(const Array &g) const {
        require_dtype(g);
        g.require_ndim(2);
        if (!shape.empty() && g.shape() != shape)
            throw py::value_error(std::string(g.name()) + " must have shape " + shape_text(shape) + " as before, got " + g.shape_text());
        const std::int64_t most = std::min(g.rows(), g.cols());
        if (rank > most)
            throw py::value_error("rank must be at most " + std::to_string(most) + " for a gradient of shape " + g.shape_text() + ", got " +
                                  std::to_string(rank));
    }
    /// The shape of what x becomes: of a gradient that goes down the small one, of a small one the gradient's.
    Shape result(const Array &x, bool up) const {
        if (!up) {
            require_fits(x);
            return right(x.rows(), x.cols()) ? Shape{x.rows(), rank} : Shape{rank, x.cols()};
        }
        require_dtype(x);
        const std::int64_t m = shape[0], n = shape[1];
        const Shape wanted = right(m, n) ? Shape{m, rank} : Shape{rank, n};
        if (x.shape() != wanted)
            throw py::value_error(std::string(x.name()) + " must have shape " + shape_text(wanted) + ", got " + x.shape_text() +
                                  convolution_hint(x.shape(), x.name()));
        return shape;
    }
    Shape shape;
    std::int64_t rank;

  private:
    std::string dtype_;
    std::size_t side_;
};

/// One gradient of a call that finds new bases: (G, its name, what is known of it, rank, side, last basis or None, last first
/// vector or None, key, directions more, power iterations).
struct RefreshArguments {
    RefreshArguments(const Call &call, const py::tuple &t)
        : name(t[1].cast<std::string>()), g(call, t[0], name.c_str()), rank(t[3].cast<std::int64_t>()), last_basis(t[5]), last_first(t[6]),
          key(t[7].cast<std::uint64_t>()), more(t[8].cast<std::int64_t>()), power(t[9].cast<std::int64_t>()) {
        const GradientPlan plan(t[2], rank, t[4]);
        plan.require_fits(g);
        right = plan.right(g.rows(), g.cols());
    }
    std::string name;
    Array g;
    std::int64_t rank;
    py::object last_basis, last_first;
    std::uint64_t key;
    std::int64_t more, power;
    bool right = true;
};

} // namespace subspan::bind
