#include "host.hpp"
#include "mixing.hpp"
#include "register.hpp"
#include "subspan/errors.hpp"
#include "subspan/plucker_mix.hpp"
#include "subspan/plucker_state.hpp"

#include <memory>
#include <mutex>
#include <pybind11/stl.h>

namespace subspan::bind {
namespace {

std::optional<Array> optional(const py::object &x, const char *name, DType dtype, bool writable = false) {
    std::optional<Array> out;
    if (!x.is_none()) {
        out.emplace(x, name, writable);
        out->require_dtype(dtype);
    }
    return out;
}

// An array broadcast to a whole shape, as matrices of its last two axes (or of one row each of its last one).
template <class T> StackView<const T> spread(const Array &x, const Shape &whole, bool rows) {
    const Shape steps = x.leading_strides(whole, 0);
    const std::size_t core = rows ? 1 : 2, lead = whole.size() - core;
    const MatrixView<const T> first(static_cast<const T *>(x.data()), rows ? 1 : whole[lead], whole.back(), rows ? 0 : steps[lead], steps.back());
    return {first, Shape(whole.begin(), whole.end() - std::ptrdiff_t(core)), Shape(steps.begin(), steps.end() - std::ptrdiff_t(core))};
}

template <class T> struct Views {
    StackView<const T> z, weights, mask;
    MixInput<T> input;
    explicit Views(const MixArguments &x) : z(x.z.stack<const T>(x.batch)) {
        input.z = z;
        if (x.weights) {
            weights = spread<T>(*x.weights, x.shape(std::int64_t(x.options.offsets.size())), false);
            input.weights = &weights;
        }
        if (x.mask) {
            Shape tokens = x.z.shape();
            tokens.pop_back();
            mask = spread<T>(*x.mask, tokens, true);
            input.mask = &mask;
        }
    }
    Views(const Views &) = delete;
    Views &operator=(const Views &) = delete;
};

// Items of b one after the other.
template <class T> class Bias {
  public:
    explicit Bias(const ProjectionArguments &p) {
        if (!p.b) return;
        data_ = static_cast<const T *>(p.b->data());
        if (p.d() <= 1 || p.b->stride(0) == 1) return;
        for (std::int64_t i = 0; i < p.d(); ++i) copy_.push_back(data_[i * p.b->stride(0)]);
        data_ = copy_.data();
    }
    const T *data() const { return data_; }

  private:
    std::vector<T> copy_;
    const T *data_ = nullptr;
};

[[noreturn]] void overflow(const char *what, MixNorm norm) {
    throw py::value_error(std::string(what) + " overflows the dtype although the input is finite; " +
                          (norm == MixNorm::none ? "scale z, or use norm='clamp'" : "use a larger eps, norm='soft', or scale what goes in"));
}

// One class per dtype; Python makes the right one.
template <class T> class MixState {
  public:
    MixState(std::int64_t r, std::int64_t batch, const py::object &w, const py::object &b, const std::vector<std::int64_t> &offsets,
             bool weighted, py::handle weighting, py::handle norm, py::handle eps, py::handle order, py::handle bias, py::handle rope, py::handle rope_base,
             py::handle rope_start, const Shape &shape) {
        const auto xw = optional(w, "W", own()), xb = optional(b, "b", own());
        MatrixView<const T> vw;
        if (xw) vw = xw->template matrix<const T>();
        state_ = std::make_unique<PluckerMixState<T>>(mix_options(offsets, weighted, weighting, norm, eps, order, bias, rope, rope_base, rope_start, r, shape), r, batch, vw,
                                                      xb ? xb->template vector<const T>(vw.rows) : nullptr);
    }
    void step(const py::object &z, const py::object &weights, const py::object &mask, const py::object &out) {
        const Array xz(z, "z"), xo(out, "out", true);
        xz.require_dtype(own());
        xo.require_dtype(own());
        check_no_overlap(xo, xz);
        const auto xw = optional(weights, "weights", own()), xm = optional(mask, "mask", own());
        if (xw) check_no_overlap(xo, *xw);
        const auto vz = xz.template matrix<const T>();
        const auto vo = xo.template matrix<T>();
        MatrixView<const T> vw, vm;
        if (xw) vw = xw->template matrix<const T>();
        if (xm) vm = xm->template matrix<const T>();
        run([&] { state_->step(vz, xw ? &vw : nullptr, xm ? &vm : nullptr, vo); });
    }
    void prefill(const py::object &z, const py::object &mask) {
        const Array xz(z, "z");
        xz.require_dtype(own());
        const auto xm = optional(mask, "mask", own());
        const auto batch = xz.leading();
        const auto vz = xz.template stack<const T>(batch);
        StackView<const T> vm;
        if (xm) vm = xm->template row_stack<const T>(batch);
        run([&] { state_->prefill(vz, xm ? &vm : nullptr); });
    }
    std::int64_t position() {
        std::int64_t n = 0;
        run([&] { n = state_->position(); });
        return n;
    }
    py::tuple past() {
        typename PluckerMixState<T>::Past p;
        run([&] { p = state_->past(); });
        const auto kept = py::ssize_t(p.kept), batch = py::ssize_t(state_->batch()), r = py::ssize_t(state_->r());
        return py::make_tuple(hand_over(std::move(p.tokens), {kept, batch, r}), hand_over(std::move(p.counts), {kept, batch}), p.position);
    }
    void restore(const py::array_t<T, py::array::c_style | py::array::forcecast> &tokens,
                 const py::array_t<unsigned char, py::array::c_style | py::array::forcecast> &counts, std::int64_t position) {
        if (tokens.ndim() != 3 || counts.ndim() != 2) throw ValueError("a saved state has tokens (kept, batch, r) and counts (kept, batch)");
        typename PluckerMixState<T>::Past p;
        p.tokens.assign(tokens.data(), tokens.data() + tokens.size());
        p.counts.assign(counts.data(), counts.data() + counts.size());
        p.kept = tokens.shape(0);
        p.position = position;
        run([&] { state_->restore(p); });
    }

  private:
    static DType own() { return std::is_same_v<T, float> ? DType::f32 : DType::f64; }
    template <class F> void run(F &&f) {
        const py::gil_scoped_release release;
        const std::lock_guard<std::mutex> lock(mutex_);
        f();
    }
    std::unique_ptr<PluckerMixState<T>> state_;
    std::mutex mutex_;
};

template <class T> void bind_state(py::module_ &m, const char *name) {
    py::class_<MixState<T>>(m, name)
        .def(py::init<std::int64_t, std::int64_t, const py::object &, const py::object &, const std::vector<std::int64_t> &, bool,
                      py::handle, py::handle, py::handle, py::handle, py::handle, py::handle, py::handle, py::handle, const Shape &>(),
             py::arg("r"), py::arg("batch"), py::arg("w"), py::arg("b"), py::arg("offsets"), py::arg("weighted"),
             py::arg("weighting"), py::arg("norm"), py::arg("eps"), py::arg("order"), py::arg("bias"), py::arg("rope"), py::arg("rope_base"),
             py::arg("rope_start"), py::arg("shape"))
        .def("step", &MixState<T>::step, py::arg("z"), py::arg("weights"), py::arg("mask"), py::arg("out"))
        .def("prefill", &MixState<T>::prefill, py::arg("z"), py::arg("mask"))
        .def("position", &MixState<T>::position)
        .def("past", &MixState<T>::past)
        .def("restore", &MixState<T>::restore, py::arg("tokens"), py::arg("counts"), py::arg("position"));
}

py::object mix(py::handle context, SUBSPAN_MIXING, const py::object &out) {
    const Call call(context);
    SUBSPAN_MIXING_ARGUMENTS(call);
    const Array xo = call.output(out, x.shape(x.pairs()), x.z.dtype());
    x.check_no_overlap_with(xo);
    dispatch(x.z.dtype(), [&](auto s) {
        using T = decltype(s);
        const Views<T> v(x);
        const auto vo = xo.stack<T>(x.batch);
        bool good;
        {
            const py::gil_scoped_release release;
            good = subspan::plucker_mix<T>(v.input, x.options, vo);
        }
        if (!good) overflow("the wedge of two tokens", x.options.norm);
    });
    xo.written();
    return xo.object();
}

// Weights of every token, in double, and whether they were given.
std::optional<Array> gradients_of_weights(const Call &call, const MixArguments &x) {
    std::optional<Array> out;
    if (x.weights) out.emplace(call.empty(x.shape(std::int64_t(x.options.offsets.size())), DType::f64, "dweights"));
    return out;
}

// dz, and the gradients of the weights of every token, or None.
py::tuple mix_backward(py::handle context, py::handle grad, SUBSPAN_MIXING) {
    const Call call(context);
    SUBSPAN_MIXING_ARGUMENTS(call);
    const Array g = x.gradient(call, grad, x.pairs()), dz = call.empty(x.shape(x.r), x.z.dtype(), "dz");
    const std::optional<Array> dw = gradients_of_weights(call, x);
    dispatch(x.z.dtype(), [&](auto s) {
        using T = decltype(s);
        const Views<T> v(x);
        const auto vg = g.stack<const T>(x.batch);
        const auto vdz = dz.stack<T>(x.batch);
        StackView<double> vdw;
        if (dw) vdw = dw->stack<double>(x.batch);
        bool good;
        {
            const py::gil_scoped_release release;
            good = subspan::plucker_mix_backward<T>(vg, v.input, x.options, vdz, dw ? &vdw : nullptr);
        }
        if (!good) overflow("the gradient of z", x.options.norm);
    });
    return py::make_tuple(dz.object(), dw ? dw->object() : py::none());
}

py::object mix_project(py::handle context, py::handle w, py::handle b, SUBSPAN_MIXING, const py::object &out) {
    const Call call(context);
    SUBSPAN_MIXING_ARGUMENTS(call);
    const ProjectionArguments p(call, w, b, x.z, x.r);
    const Array xo = call.output(out, x.shape(p.d()), x.z.dtype());
    x.check_no_overlap_with(xo);
    p.check_no_overlap_with(xo);
    dispatch(x.z.dtype(), [&](auto s) {
        using T = decltype(s);
        const Views<T> v(x);
        const auto vw = p.w.matrix<const T>();
        const Bias<T> vb(p);
        const auto vo = xo.stack<T>(x.batch);
        bool good;
        {
            const py::gil_scoped_release release;
            good = subspan::plucker_mix_project<T>(v.input, vw, vb.data(), x.options, vo);
        }
        if (!good) overflow("the projection of the mixed coordinates", x.options.norm);
    });
    xo.written();
    return xo.object();
}

// dz, dW, db or None, and the gradients of the weights of every token, or None.
py::tuple mix_project_backward(py::handle context, py::handle grad, py::handle w, py::handle b, SUBSPAN_MIXING) {
    const Call call(context);
    SUBSPAN_MIXING_ARGUMENTS(call);
    const ProjectionArguments p(call, w, b, x.z, x.r);
    const DType dtype = x.z.dtype();
    const Array g = x.gradient(call, grad, p.d()), dz = call.empty(x.shape(x.r), dtype, "dz"), dw = call.empty({p.d(), x.pairs()}, dtype, "dW");
    std::optional<Array> db;
    if (p.b) db.emplace(call.empty({p.d()}, dtype, "db"));
    const std::optional<Array> da = gradients_of_weights(call, x);
    dispatch(dtype, [&](auto s) {
        using T = decltype(s);
        const Views<T> v(x);
        const auto vg = g.stack<const T>(x.batch);
        const auto vw = p.w.matrix<const T>();
        const Bias<T> vb(p);
        const auto vdz = dz.stack<T>(x.batch);
        const auto vdw = dw.matrix<T>();
        StackView<double> vda;
        if (da) vda = da->stack<double>(x.batch);
        bool good;
        {
            const py::gil_scoped_release release;
            good = subspan::plucker_mix_project_backward<T>(vg, v.input, vw, vb.data(), x.options, vdz, vdw, db ? static_cast<T *>(db->data()) : nullptr,
                                                            da ? &vda : nullptr);
        }
        if (!good) overflow("a gradient", x.options.norm);
    });
    return py::make_tuple(dz.object(), dw.object(), db ? db->object() : py::none(), da ? da->object() : py::none());
}

} // namespace

void register_plucker(py::module_ &m) {
    bind_state<float>(m, "MixStateF32");
    bind_state<double>(m, "MixStateF64");
    using py::arg;
    m.def("mix", &mix, arg("call"), SUBSPAN_MIXING_NAMES, arg("out"));
    m.def("mix_backward", &mix_backward, arg("call"), arg("grad"), SUBSPAN_MIXING_NAMES);
    m.def("mix_project", &mix_project, arg("call"), arg("W"), arg("b"), SUBSPAN_MIXING_NAMES, arg("out"));
    m.def("mix_project_backward", &mix_project_backward, arg("call"), arg("grad"), arg("W"), arg("b"), SUBSPAN_MIXING_NAMES);
    // Raises what a call with these choices would, and gives the offsets as a list.
    m.def(
        "check_mixing",
        [](py::handle offsets, bool weighted, py::handle weighting, py::handle norm, py::handle eps, py::handle order, py::handle bias, py::handle rope,
           py::handle rope_base, py::handle rope_start, std::int64_t r) {
            return mix_options(read_offsets(offsets, true), weighted, weighting, norm, eps, order, bias, rope, rope_base, rope_start, r, {}).offsets;
        },
        arg("offsets"), arg("weighted"), arg("weighting"), arg("norm"), arg("eps"), arg("order"), arg("bias"), arg("rope"), arg("rope_base"),
        arg("rope_start"), arg("r"));
}

} // namespace subspan::bind
