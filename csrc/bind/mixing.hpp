// Arguments of Plücker mixing that both modules read alike.
#pragma once

#include "array.hpp"
#include "scalars.hpp"
#include "subspan/options.hpp"

#include <optional>
#include <pybind11/stl.h>

namespace subspan::bind {

/// How far back: whole numbers, none of them zero, and none ahead where that was not asked for. `advice`: what to say then.
inline std::vector<std::int64_t> read_offsets(py::handle given, bool causal, const std::string &advice = "pass causal=False if that is meant") {
    const auto text = [](py::handle x) { return std::string(py::str(x)); };
    const auto refuse = [](py::handle x) { throw py::type_error("offsets must be whole numbers, got " + std::string(py::repr(x))); };
    if (PyUnicode_Check(given.ptr()) || PyBytes_Check(given.ptr()) || PyDict_Check(given.ptr()) || PyAnySet_Check(given.ptr())) refuse(given);
    py::object items = py::reinterpret_borrow<py::object>(given);
    if (!PyList_CheckExact(given.ptr()) && !PyTuple_CheckExact(given.ptr())) {
        const bool one = !py::hasattr(given, "__iter__") || (py::hasattr(given, "shape") && py::len(given.attr("shape")) == 0);
        items = one ? py::object(py::make_tuple(given)) : py::object(py::iter(items)); // which may have no end
    }
    std::vector<std::int64_t> out;
    for (const auto item : items) {
        if (out.size() == 65536) throw py::value_error("offsets holds more than 65536 numbers");
        py::object index = py::reinterpret_borrow<py::object>(item);
        if (!PyLong_CheckExact(item.ptr())) {
            if (PyBool_Check(item.ptr()) || text(py::type::handle_of(item).attr("__name__")).rfind("bool", 0) == 0) refuse(item);
            index = py::reinterpret_steal<py::object>(PyNumber_Index(item.ptr()));
            if (!index) {
                PyErr_Clear();
                refuse(item);
            }
        }
        int overflow = 0;
        const long long value = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
        if (overflow == 0 && value == 0) throw py::value_error("offsets holds 0: a token with itself spans no plane, its wedge is zero");
        if ((value < 0 || overflow < 0) && causal)
            throw py::value_error("offsets holds " + text(index) + ": token t would see token t + " + text(index.attr("__neg__")()) + ", which lies ahead; " +
                                  advice);
        if (overflow != 0 || value >= (1LL << 40) || value <= -(1LL << 40))
            throw py::value_error("offsets holds " + text(index) + ", which is more than any sequence has");
        out.push_back(value);
    }
    if (out.empty()) throw py::value_error("offsets is empty: give at least one");
    return out;
}

/// What a mixing call chooses; `r` dimensions of a token, `batch` leading axes of the sequences.
inline MixOptions mix_options(std::vector<std::int64_t> offsets, bool weighted, py::handle weighting, py::handle norm, py::handle eps, py::handle order,
                              py::handle bias, py::handle rope, py::handle rope_base, py::handle rope_start, std::int64_t r, const Shape &batch) {
    MixOptions o;
    o.offsets = std::move(offsets);
    o.eps = real(eps, "eps", 0.0);
    if (o.eps >= 1e100) throw py::value_error("eps must be below 1e100, got " + std::string(py::repr(eps)));
    o.rope = static_cast<Rope>(choice(rope, "rope", {"interleaved", "half"}, true));
    o.rope_base = real(rope_base, "rope_base");
    if (o.rope_base <= 0) throw py::value_error("rope_base must be positive, got " + std::string(py::repr(rope_base)));
    if (o.rope != Rope::none && r % 2 != 0) throw py::value_error("rope turns pairs of dimensions, and z has an odd number of them, " + std::to_string(r));
    if (PyLong_CheckExact(rope_start.ptr())) {
        o.rope_start = whole_number(rope_start, "rope_start", -(std::int64_t(1) << 40) + 1, (std::int64_t(1) << 40) - 1);
    } else {
        const py::object starts = py::module_::import("subspan.plucker.common").attr("first_positions")(rope_start, py::tuple(py::cast(batch)));
        if (starts.is_none())
            o.rope_start = whole_number(rope_start, "rope_start", -(std::int64_t(1) << 40) + 1, (std::int64_t(1) << 40) - 1);
        else
            o.rope_starts = py::cast<std::vector<std::int64_t>>(starts);
        if (o.rope_starts.size() == 1) {
            o.rope_start = o.rope_starts[0];
            o.rope_starts.clear();
        }
    }
    o.norm = static_cast<MixNorm>(choice(norm, "norm", {"clamp", "soft"}, true));
    o.weighting = weighting.is_none() ? (weighted ? MixWeights::given : MixWeights::mean)
                                      : static_cast<MixWeights>(choice(weighting, "weighting", {"mean", "given", "softmax"}));
    o.past_first = choice(order, "order", {"current-first", "past-first"}) == 1;
    o.bias_always = choice(bias, "bias", {"weighted", "always"}) == 1;
    if (o.weighting == MixWeights::mean && weighted) throw py::value_error("weighting='mean' takes no weights; 'given' and 'softmax' do");
    if (o.weighting != MixWeights::mean && !weighted)
        throw py::value_error("weighting=" + std::string(py::repr(weighting)) + " needs weights, one for each offset");
    return o;
}

/// The sequences of a call, what weighs and masks them, and what it chooses.
class MixArguments {
  public:
    MixArguments(const Call &call, py::handle tokens, py::handle offsets, py::handle given_weights, py::handle weighting, py::handle given_mask,
                 py::handle norm, py::handle eps, py::handle order, py::handle causal, py::handle bias, py::handle rope, py::handle rope_base,
                 py::handle rope_start)
        : z(call, tokens, "z") {
        if (z.ndim() < 2) throw py::value_error("z must have shape (..., T, r), got " + z.shape_text());
        r = z.cols();
        if (r < 2) throw py::value_error("z has tokens of " + std::to_string(r) + " dimensions, and a plane needs at least 2");
        if (r > 65536)
            throw py::value_error("z has tokens of " + std::to_string(r) + " dimensions, and at most 65536 are taken: their pairs are more than 2³¹");
        batch = z.leading();
        options = mix_options(read_offsets(offsets, truth(causal, "causal")), !given_weights.is_none(), weighting, norm, eps, order, bias, rope, rope_base,
                              rope_start, r, batch);
        const std::int64_t m = std::int64_t(options.offsets.size());
        if (!given_weights.is_none()) {
            weights.emplace(call, given_weights, "weights");
            weights->require_dtype_of(z);
            if (weights->ndim() < 1 || weights->shape().back() != m)
                throw py::value_error("weights must have one entry for each of the " + std::to_string(m) + " offsets along its last axis, got shape " +
                                      weights->shape_text());
        }
        if (!given_mask.is_none()) mask.emplace(call, given_mask, "mask", Access::read, call.on_device());
    }
    Array z;
    std::optional<Array> weights, mask;
    MixOptions options;
    Shape batch;
    std::int64_t r = 0;

    std::int64_t pairs() const { return r * (r - 1) / 2; }
    /// (..., T, last)
    Shape shape(std::int64_t last) const {
        Shape s = z.shape();
        s.back() = last;
        return s;
    }
    void check_no_overlap_with(const Array &out) const {
        check_no_overlap(out, z);
        if (weights) check_no_overlap(out, *weights);
        if (mask) check_no_overlap(out, *mask);
    }
    Array gradient(const Call &call, py::handle grad, std::int64_t width) const {
        Array g(call, grad, "grad");
        g.require_dtype_of(z);
        g.require_shape(shape(width));
        return g;
    }
};

/// W (d, C(r, 2)) and perhaps b (d).
class ProjectionArguments {
  public:
    ProjectionArguments(const Call &call, py::handle matrix, py::handle vector, const Array &z, std::int64_t r) : w(call, matrix, "W") {
        w.require_dtype_of(z);
        const std::int64_t pairs = r * (r - 1) / 2;
        if (w.ndim() != 2 || w.cols() != pairs)
            throw py::value_error("W must have shape (d, " + std::to_string(pairs) + "), a column for each pair of " + std::to_string(r) + " dimensions, got " +
                                  w.shape_text());
        if (vector.is_none()) return;
        b.emplace(call, vector, "b");
        b->require_dtype_of(z);
        b->require_shape({w.rows()});
    }
    Array w;
    std::optional<Array> b;
    std::int64_t d() const { return w.rows(); }
    void check_no_overlap_with(const Array &out) const {
        check_no_overlap(out, w);
        if (b) check_no_overlap(out, *b);
    }
};

} // namespace subspan::bind

// The arguments that all four calls share, in the order of MixArguments, and their names.
#define SUBSPAN_MIXING                                                                                                                                         \
    py::handle z, py::handle offsets, py::handle weights, py::handle weighting, py::handle mask, py::handle norm, py::handle eps, py::handle order,            \
        py::handle causal, py::handle bias, py::handle rope, py::handle rope_base, py::handle rope_start
#define SUBSPAN_MIXING_ARGUMENTS(call)                                                                                                                         \
    const MixArguments x(call, z, offsets, weights, weighting, mask, norm, eps, order, causal, bias, rope, rope_base, rope_start)
#define SUBSPAN_MIXING_NAMES                                                                                                                                   \
    py::arg("z"), py::arg("offsets"), py::arg("weights"), py::arg("weighting"), py::arg("mask"), py::arg("norm"), py::arg("eps"), py::arg("order"),            \
        py::arg("causal"), py::arg("bias"), py::arg("rope"), py::arg("rope_base"), py::arg("rope_start")

// What a state of mixing chooses once.
#define SUBSPAN_MIXING_CHOICES                                                                                                                                 \
    py::handle offsets, py::handle weighted, py::handle weighting, py::handle norm, py::handle eps, py::handle order, py::handle bias, py::handle rope,        \
        py::handle rope_base, py::handle rope_start
#define SUBSPAN_MIXING_CHOICE_TYPES py::handle, py::handle, py::handle, py::handle, py::handle, py::handle, py::handle, py::handle, py::handle, py::handle
#define SUBSPAN_MIXING_CHOICE_NAMES                                                                                                                            \
    py::arg("offsets"), py::arg("weighted"), py::arg("weighting"), py::arg("norm"), py::arg("eps"), py::arg("order"), py::arg("bias"), py::arg("rope"),        \
        py::arg("rope_base"), py::arg("rope_start")
