// Arguments of Plücker mixing that both modules read alike.
#pragma once

#include "array.hpp"
#include "scalars.hpp"
#include "subspan/options.hpp"

#include <initializer_list>
#include <memory>
#include <optional>
#include <pybind11/stl.h>
#include <string>
#include <utility>
#include <vector>

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

/// NumPy's broadcast of an array, as a flat one.
inline py::array broadcast_to(const py::object &x, const Shape &shape, const std::string &name, const std::string &where = "to ") {
    const py::module_ numpy = py::module_::import("numpy");
    try {
        return numpy.attr("broadcast_to")(x, py::tuple(py::cast(shape))).attr("ravel")();
    } catch (py::error_already_set &e) {
        if (!e.matches(PyExc_ValueError)) throw;
        throw py::value_error(name + ", shape " + std::string(py::str(x.attr("shape"))) + ", does not broadcast " + where + bind::shape_text(shape));
    }
}

/// The position of the first token of all sequences, an int, or of each, an array of int64.
inline py::object first_positions(py::handle given) {
    constexpr std::int64_t most = (std::int64_t(1) << 40) - 1;
    const bool array = py::hasattr(given, "shape") && py::len(given.attr("shape")) > 0;
    if (!array && !PyList_Check(given.ptr()) && !PyTuple_Check(given.ptr())) {
        const bool tensor = py::hasattr(given, "__dlpack__");
        return py::int_(whole_number(tensor ? py::object(in_numpy(given)[py::tuple()]) : py::reinterpret_borrow<py::object>(given), "rope_start", -most, most));
    }
    const py::array x = in_numpy(given);
    if (x.dtype().kind() != 'i' && x.dtype().kind() != 'u')
        throw py::type_error("rope_start must be an integer, or an array of them, one for each sequence, got " + std::string(py::str(x.dtype())));
    const py::array_t<std::int64_t, py::array::c_style | py::array::forcecast> y = x;
    for (py::ssize_t i = 0; i < y.size(); ++i)
        if (y.data()[i] > most || y.data()[i] < -most) throw py::value_error("rope_start must be below 2**40 in magnitude");
    return y;
}

/// Weights as kernels take them: numbers that are written down have no dtype of their own and take that of the tokens.
inline py::object weights_beside(const Call &call, py::handle weights, DType dtype) {
    if (!PyList_Check(weights.ptr()) && !PyTuple_Check(weights.ptr()) && !PyFloat_Check(weights.ptr()) && !PyLong_Check(weights.ptr()))
        return py::reinterpret_borrow<py::object>(weights);
    if (call.on_device()) throw py::type_error("weights is a list, and z is on a CUDA device; pass an array on that device, nothing is copied to it");
    const py::array made = in_numpy(weights);
    if (std::string("fiu").find(made.dtype().kind()) == std::string::npos)
        throw py::type_error("weights must be numbers, got " + std::string(py::str(made.dtype())));
    return made.attr("astype")(name_of(dtype));
}

/// A mask, boolean or of integers, as kernels take it: on the host ones and zeros of the dtype for every token, on a device bytes.
inline py::object mask_beside(const Call &call, py::handle mask, DType dtype, const Shape &tokens) {
    if (mask.is_none()) return py::none();
    if (call.on_device()) return call.place.attr("bytes_of")(mask, "mask");
    if (py::isinstance(mask, py::module_::import("numpy").attr("ma").attr("MaskedArray")))
        throw py::type_error("mask is a masked array, and its own mask would be ignored");
    const py::array given = in_numpy(mask);
    if (std::string("biu").find(given.dtype().kind()) == std::string::npos)
        throw py::type_error(std::string("mask must be ") +
                             (given.dtype().kind() == 'O' ? "a boolean or integer array, got " : "boolean or integer (nonzero: the token takes part), got ") +
                             std::string(py::str(given.dtype().kind() == 'O' ? py::type::handle_of(mask).attr("__name__") : py::object(given.dtype()))));
    const py::object flat = broadcast_to(given, tokens, "mask");
    return flat.attr("__ne__")(0).attr("astype")(name_of(dtype)).attr("reshape")(py::tuple(py::cast(tokens)));
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
    if (const py::object start = first_positions(rope_start); PyLong_CheckExact(start.ptr())) {
        o.rope_start = start.cast<std::int64_t>();
    } else {
        o.rope_starts = broadcast_to(start, batch, "rope_start", "to the sequences, ").cast<std::vector<std::int64_t>>();
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

/// W (d, C(r, 2)) and perhaps b (d), of the dtype of the tokens where there are some.
class ProjectionArguments {
  public:
    ProjectionArguments(const Call &call, py::handle matrix, py::handle vector, std::int64_t r, const Array *z) : w(call, matrix, "W") {
        if (z != nullptr) w.require_dtype_of(*z);
        const std::int64_t pairs = r * (r - 1) / 2;
        if (w.ndim() != 2 || w.cols() != pairs)
            throw py::value_error("W must have shape (d, " + std::to_string(pairs) + "), a column for each pair of " + std::to_string(r) + " dimensions, got " +
                                  w.shape_text());
        if (vector.is_none()) return;
        b.emplace(call, vector, "b");
        b->require_dtype_of(w);
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

/// What a state of mixing is told once, and what it asks of the tokens that follow the first ones.
class MixChoices {
  public:
    /// `first`: the first tokens, (..., r), or (..., T, r) of a prompt (`axes` 2).
    MixChoices(const Call &call, py::handle first, int axes, std::int64_t dimensions, py::object matrix, py::object vector, py::object own_weights,
               std::vector<std::int64_t> offsets, py::handle weighting, py::handle norm, py::handle eps, py::handle order, py::handle bias, py::handle rope,
               py::handle rope_base, py::handle rope_start)
        : r(dimensions), w(std::move(matrix)), b(std::move(vector)), weights(std::move(own_weights)) {
        const Array z(call, first, axes == 2 ? "z" : "z_t");
        require_shape(z, axes);
        if (!w.is_none()) ProjectionArguments(call, w, b, r, &z);
        dtype = z.dtype();
        batch = z.leading(axes);
        options = mix_options(std::move(offsets), !py::str(weighting).equal(py::str("mean")), weighting, norm, eps, order, bias, rope, rope_base, rope_start, r,
                              batch);
    }
    /// Those that follow: of the same dimensions, dtype, batch and device.
    Array tokens(const Call &call, py::handle next, int axes, int device) const {
        if (call.device != device) throw py::type_error("the tokens before were on another device than this one; reset() begins anew");
        Array z(call, next, axes == 2 ? "z" : "z_t");
        require_shape(z, axes);
        const std::string name = z.name();
        if (z.dtype() != dtype) throw py::type_error(name + " must be " + name_of(dtype) + " as the tokens before were, got " + z.dtype_name());
        if (const Shape given = z.leading(axes); given != batch)
            throw py::value_error(name + " is a batch of shape " + shape_text(given) + ", and the tokens before were of " + shape_text(batch));
        return z;
    }
    /// The weights of one step, which are its own or those of all.
    py::object weights_of(const Call &call, const py::object &given) const {
        if (options.weighting == MixWeights::mean) {
            if (!given.is_none()) throw py::value_error("weighting='mean' takes no weights; 'given' and 'softmax' do");
            return given;
        }
        if (given.is_none() && weights.is_none())
            throw py::value_error(std::string("weighting='") + (options.weighting == MixWeights::given ? "given" : "softmax") +
                                  "' needs weights, one for each offset");
        return given.is_none() ? weights : weights_beside(call, given, dtype);
    }
    py::object mask_of(const Call &call, const py::object &given, std::initializer_list<std::int64_t> more) const {
        return mask_beside(call, given, dtype, shape(more));
    }
    Shape shape(std::initializer_list<std::int64_t> more) const {
        Shape s = batch;
        s.insert(s.end(), more);
        return s;
    }
    std::int64_t width() const { return w.is_none() ? r * (r - 1) / 2 : w.attr("shape")[py::int_(0)].cast<std::int64_t>(); }

    std::int64_t r;
    py::object w, b, weights;
    DType dtype = DType::f32;
    Shape batch;
    MixOptions options;

  private:
    void require_shape(const Array &z, int axes) const {
        if (z.ndim() < axes || z.cols() != r)
            throw py::value_error(std::string(z.name()) + " must have shape (..., " + (axes == 2 ? "T, " : "") + std::to_string(r) + "), got " +
                                  z.shape_text());
    }
};

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
        read(call, given_weights, given_mask);
    }
    /// The ring of a state.
    MixArguments(const Call &call, py::handle tokens, py::handle given_weights, py::handle given_mask, const MixChoices &choices)
        : z(call, tokens, "z"), options(choices.options), batch(choices.batch), r(choices.r) {
        read(call, given_weights, given_mask);
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

  private:
    void read(const Call &call, py::handle given_weights, py::handle given_mask) {
        const std::int64_t m = std::int64_t(options.offsets.size());
        if (!given_weights.is_none()) {
            weights.emplace(call, weights_beside(call, given_weights, z.dtype()), "weights");
            weights->require_dtype_of(z);
            if (weights->ndim() < 1 || weights->shape().back() != m)
                throw py::value_error("weights must have one entry for each of the " + std::to_string(m) + " offsets along its last axis, got shape " +
                                      weights->shape_text());
        }
        if (given_mask.is_none()) return;
        const Shape tokens(z.shape().begin(), z.shape().end() - 1);
        mask.emplace(call, mask_beside(call, given_mask, z.dtype(), tokens), "mask", Access::read, call.on_device());
    }
};

/// What a state of mixing is made of: raises for what no tokens could go with, and gives the offsets as a list.
inline std::vector<std::int64_t> check_mixing(py::handle context, std::int64_t r, py::handle w, py::handle b, py::handle weights, py::handle offsets,
                                              py::handle weighting, py::handle norm, py::handle eps, py::handle order, py::handle bias, py::handle rope,
                                              py::handle rope_base, py::handle rope_start) {
    const Call call(context);
    const MixWeights chosen = static_cast<MixWeights>(choice(weighting, "weighting", {"mean", "given", "softmax"}));
    auto found = mix_options(read_offsets(offsets, true, "decoding has no tokens ahead"), chosen != MixWeights::mean, weighting, norm, eps, order, bias, rope,
                             rope_base, rope_start, r, {})
                     .offsets;
    if (!weights.is_none()) {
        if (chosen == MixWeights::mean) throw py::value_error("weighting='mean' takes no weights; 'given' and 'softmax' do");
        Array(call, weights, "weights").require_shape({std::int64_t(found.size())});
    }
    if (w.is_none() && !b.is_none()) throw py::value_error("b is given and W is not");
    if (!w.is_none() && ProjectionArguments(call, w, b, r, nullptr).d() == 0) throw py::value_error("W has no rows");
    return found;
}

/// The class of a side's states, with the same methods on both.
template <class State> py::class_<State> register_mix_state(py::module_ &m) {
    using py::arg;
    m.def("first_positions", &first_positions, arg("rope_start"));
    m.def("check_mixing", &check_mixing, arg("call"), arg("r"), arg("W"), arg("b"), arg("weights"), arg("offsets"), arg("weighting"), arg("norm"), arg("eps"),
          arg("order"), arg("bias"), arg("rope"), arg("rope_base"), arg("rope_start"));
    py::class_<State> c(m, "MixState");
    c.def(py::init([](py::handle context, py::handle z, int axes, std::int64_t r, const py::object &w, const py::object &b, const py::object &weights,
                      const std::vector<std::int64_t> &offsets, py::handle weighting, py::handle norm, py::handle eps, py::handle order, py::handle bias,
                      py::handle rope, py::handle rope_base, py::handle rope_start) {
              const Call call(context);
              return std::make_unique<State>(
                  call, MixChoices(call, z, axes, r, w, b, weights, offsets, weighting, norm, eps, order, bias, rope, rope_base, rope_start));
          }),
          arg("call"), arg("z"), arg("axes"), arg("r"), arg("W"), arg("b"), arg("weights"), arg("offsets"), arg("weighting"), arg("norm"), arg("eps"),
          arg("order"), arg("bias"), arg("rope"), arg("rope_base"), arg("rope_start"))
        .def("step", &State::step, arg("call"), arg("z"), arg("weights"), arg("mask"), arg("out"))
        .def("prefill", &State::prefill, arg("call"), arg("z"), arg("mask"))
        .def("position", &State::position)
        .def("dtype", [](const State &s) { return name_of(s.choices().dtype); })
        .def("batch", [](const State &s) { return py::tuple(py::cast(s.choices().batch)); })
        .def("copy", &State::copy)
        .def("past", &State::past);
    return c;
}

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
