#include "convert.hpp"
#include "register.hpp"
#include "subspan/errors.hpp"
#include "subspan/plucker_mix.hpp"
#include "subspan/plucker_state.hpp"

#include <mutex>
#include <optional>
#include <pybind11/stl.h>
#include <tuple>
#include <memory>
#include <vector>

namespace subspan::bind {
namespace {

using Shape = std::vector<std::int64_t>;

// norm, eps, weighting, past_first, bias_always, rope, rope_base, rope_start (one, or one for each sequence): as the Python side normalised them.
using Settings = std::tuple<int, double, int, bool, bool, int, double, std::vector<std::int64_t>>;

MixOptions options(const std::vector<std::int64_t> &offsets, const Settings &s) {
    MixOptions o;
    o.offsets = offsets;
    o.norm = static_cast<MixNorm>(std::get<0>(s));
    o.eps = std::get<1>(s);
    o.weighting = static_cast<MixWeights>(std::get<2>(s));
    o.past_first = std::get<3>(s);
    o.bias_always = std::get<4>(s);
    o.rope = static_cast<Rope>(std::get<5>(s));
    o.rope_base = std::get<6>(s);
    const auto &starts = std::get<7>(s);
    if (starts.size() == 1)
        o.rope_start = starts[0];
    else
        o.rope_starts = starts;
    return o;
}

std::optional<Array> optional(const py::object &x, const char *name, DType dtype, bool writable = false) {
    std::optional<Array> out;
    if (!x.is_none()) {
        out.emplace(x, name, writable);
        out->require_dtype(dtype);
    }
    return out;
}

// The arguments that every call has, borrowed for as long as it runs.
struct Input {
    Array z;
    std::optional<Array> weights, mask;
    Shape batch;

    Input(const py::object &z_, const py::object &weights_, const py::object &mask_)
        : z(z_, "z"), weights(optional(weights_, "weights", z.dtype())), mask(optional(mask_, "mask", z.dtype())), batch(z.leading()) {
        z.require_matrices();
    }
    template <class T> struct Views {
        StackView<const T> z, weights, mask;
        MixInput<T> input;
    };
    template <class T> void views(Views<T> &v) const {
        v.z = z.stack<const T>(batch);
        v.input.z = v.z;
        if (weights) {
            v.weights = weights->stack<const T>(batch);
            v.input.weights = &v.weights;
        }
        if (mask) {
            v.mask = mask->row_stack<const T>(batch);
            v.input.mask = &v.mask;
        }
    }
};

// One class per dtype; Python makes the right one.
template <class T> class MixState {
  public:
    MixState(std::int64_t r, std::int64_t batch, const py::object &w, const py::object &b, const std::vector<std::int64_t> &offsets,
             const Settings &settings) {
        const auto xw = optional(w, "W", own()), xb = optional(b, "b", own());
        MatrixView<const T> vw;
        if (xw) vw = xw->template matrix<const T>();
        state_ = std::make_unique<PluckerMixState<T>>(options(offsets, settings), r, batch, vw,
                                                      xb ? xb->template vector<const T>(vw.rows) : nullptr);
    }
    void step(const py::object &z, const py::object &weights, const py::object &mask, const py::object &out) {
        const Array xz(z, "z"), xo(out, "out", true);
        xz.require_dtype(own());
        xo.require_dtype(own());
        require_apart(xo, xz);
        const auto xw = optional(weights, "weights", own()), xm = optional(mask, "mask", own());
        if (xw) require_apart(xo, *xw);
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
        .def(py::init<std::int64_t, std::int64_t, const py::object &, const py::object &, const std::vector<std::int64_t> &, const Settings &>(),
             py::arg("r"), py::arg("batch"), py::arg("w"), py::arg("b"), py::arg("offsets"), py::arg("settings"))
        .def("step", &MixState<T>::step, py::arg("z"), py::arg("weights"), py::arg("mask"), py::arg("out"))
        .def("prefill", &MixState<T>::prefill, py::arg("z"), py::arg("mask"))
        .def("position", &MixState<T>::position)
        .def("past", &MixState<T>::past)
        .def("restore", &MixState<T>::restore, py::arg("tokens"), py::arg("counts"), py::arg("position"));
}

} // namespace

void register_plucker(py::module_ &m) {
    bind_state<float>(m, "MixStateF32");
    bind_state<double>(m, "MixStateF64");
    m.def(
        "plucker_mix",
        [](const py::object &z, const py::object &weights, const py::object &mask, const py::object &out,
           const std::vector<std::int64_t> &offsets, const Settings &settings) {
            const Input in(z, weights, mask);
            const Array xo(out, "out", true);
            xo.require_dtype(in.z.dtype());
            require_apart(xo, in.z);
            if (in.weights) require_apart(xo, *in.weights);
            const auto o = options(offsets, settings);
            return dispatch(in.z.dtype(), [&](auto s) {
                using T = decltype(s);
                Input::Views<T> v;
                in.views(v);
                const auto vo = xo.stack<T>(in.batch);
                const py::gil_scoped_release release;
                return subspan::plucker_mix<T>(v.input, o, vo);
            });
        },
        py::arg("z"), py::arg("weights"), py::arg("mask"), py::arg("out"), py::arg("offsets"), py::arg("settings"));
    m.def(
        "plucker_mix_backward",
        [](const py::object &grad, const py::object &z, const py::object &weights, const py::object &mask, const py::object &dz,
           const py::object &dweights, const std::vector<std::int64_t> &offsets, const Settings &settings) {
            const Input in(z, weights, mask);
            const Array xg(grad, "grad"), xdz(dz, "dz", true);
            xg.require_dtype(in.z.dtype());
            xdz.require_dtype(in.z.dtype());
            const auto xdw = optional(dweights, "dweights", DType::f64, true);
            const auto o = options(offsets, settings);
            return dispatch(in.z.dtype(), [&](auto s) {
                using T = decltype(s);
                Input::Views<T> v;
                in.views(v);
                const auto vg = xg.stack<const T>(in.batch);
                const auto vdz = xdz.stack<T>(in.batch);
                StackView<double> vdw;
                if (xdw) vdw = xdw->stack<double>(in.batch);
                const py::gil_scoped_release release;
                return subspan::plucker_mix_backward<T>(vg, v.input, o, vdz, xdw ? &vdw : nullptr);
            });
        },
        py::arg("grad"), py::arg("z"), py::arg("weights"), py::arg("mask"), py::arg("dz"), py::arg("dweights"), py::arg("offsets"),
        py::arg("settings"));
    m.def(
        "plucker_mix_project",
        [](const py::object &z, const py::object &weights, const py::object &mask, const py::object &w, const py::object &b,
           const py::object &out, const std::vector<std::int64_t> &offsets, const Settings &settings) {
            const Input in(z, weights, mask);
            const Array xw(w, "W"), xo(out, "out", true);
            xw.require_dtype(in.z.dtype());
            xo.require_dtype(in.z.dtype());
            const auto xb = optional(b, "b", in.z.dtype());
            require_apart(xo, in.z);
            require_apart(xo, xw);
            if (xb) require_apart(xo, *xb);
            if (in.weights) require_apart(xo, *in.weights);
            const auto o = options(offsets, settings);
            return dispatch(in.z.dtype(), [&](auto s) {
                using T = decltype(s);
                Input::Views<T> v;
                in.views(v);
                const auto vw = xw.matrix<const T>();
                const T *vb = xb ? xb->vector<const T>(vw.rows) : nullptr;
                const auto vo = xo.stack<T>(in.batch);
                const py::gil_scoped_release release;
                return subspan::plucker_mix_project<T>(v.input, vw, vb, o, vo);
            });
        },
        py::arg("z"), py::arg("weights"), py::arg("mask"), py::arg("w"), py::arg("b"), py::arg("out"), py::arg("offsets"),
        py::arg("settings"));
    m.def(
        "plucker_mix_project_backward",
        [](const py::object &grad, const py::object &z, const py::object &weights, const py::object &mask, const py::object &w,
           const py::object &b, const py::object &dz, const py::object &dw, const py::object &db, const py::object &dweights,
           const std::vector<std::int64_t> &offsets, const Settings &settings) {
            const Input in(z, weights, mask);
            const DType dtype = in.z.dtype();
            const Array xg(grad, "grad"), xw(w, "W"), xdz(dz, "dz", true), xdw(dw, "dW", true);
            for (const Array *x : {&xg, &xw, &xdz, &xdw}) x->require_dtype(dtype);
            const auto xb = optional(b, "b", dtype), xdb = optional(db, "db", dtype, true);
            const auto xda = optional(dweights, "dweights", DType::f64, true);
            const auto o = options(offsets, settings);
            return dispatch(dtype, [&](auto s) {
                using T = decltype(s);
                Input::Views<T> v;
                in.views(v);
                const auto vg = xg.stack<const T>(in.batch);
                const auto vw = xw.matrix<const T>();
                const T *vb = xb ? xb->vector<const T>(vw.rows) : nullptr;
                const auto vdz = xdz.stack<T>(in.batch);
                const auto vdw = xdw.matrix<T>();
                T *vdb = xdb ? xdb->vector<T>(vw.rows) : nullptr;
                StackView<double> vda;
                if (xda) vda = xda->stack<double>(in.batch);
                const py::gil_scoped_release release;
                return subspan::plucker_mix_project_backward<T>(vg, v.input, vw, vb, o, vdz, vdw, vdb, xda ? &vda : nullptr);
            });
        },
        py::arg("grad"), py::arg("z"), py::arg("weights"), py::arg("mask"), py::arg("w"), py::arg("b"), py::arg("dz"), py::arg("dw"),
        py::arg("db"), py::arg("dweights"), py::arg("offsets"), py::arg("settings"));
}

} // namespace subspan::bind
