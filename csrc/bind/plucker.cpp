#include "host.hpp"
#include "mixing.hpp"
#include "register.hpp"
#include "subspan/errors.hpp"
#include "subspan/plucker_mix.hpp"
#include "subspan/plucker_state.hpp"
#include "turn.hpp"

#include <functional>
#include <memory>
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
    const std::size_t inner = rows ? 1 : 2, lead = whole.size() - inner;
    const MatrixView<const T> first(static_cast<const T *>(x.data()), rows ? 1 : whole[lead], whole.back(), rows ? 0 : steps[lead], steps.back());
    return {first, Shape(whole.begin(), whole.end() - std::ptrdiff_t(inner)), Shape(steps.begin(), steps.end() - std::ptrdiff_t(inner))};
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

// Rows (..., n) as a matrix: the array's own memory where its leading axes are one axis, else a copy that goes back to where it came
// from with `back`.
template <class T> class Rows {
  public:
    explicit Rows(const Array &x) : count_(1), n_(x.shape().back()) {
        Shape batch = x.leading(1);
        for (const auto s : batch) count_ *= s;
        stack_ = x.row_stack<T>(batch);
        std::int64_t step = batch.empty() ? n_ : x.stride(x.ndim() - 2), next = step;
        bool one = true;
        for (int a = x.ndim() - 2; a >= 0 && one; --a) {
            one = x.shape(a) == 1 || x.stride(a) == next;
            next *= x.shape(a);
        }
        if (one) {
            view = {static_cast<T *>(x.data()), count_, n_, step, x.stride(x.ndim() - 1)};
            return;
        }
        items_ = uninitialised<std::remove_const_t<T>>(count_ * n_);
        view = {items_.get(), count_, n_, n_, 1};
        each([&](T &there, std::remove_const_t<T> &here) { here = there; });
    }
    void back() {
        if constexpr (!std::is_const_v<T>)
            if (items_) each([&](T &there, T &here) { there = here; });
    }
    MatrixView<T> view;

  private:
    template <class F> void each(const F &f) {
        for (std::int64_t i = 0; i < count_; ++i)
            for (std::int64_t j = 0; j < n_; ++j) f(stack_[i].data[j * stack_[i].col_stride], items_[std::size_t(i * n_ + j)]);
    }
    std::int64_t count_, n_;
    StackView<T> stack_;
    std::unique_ptr<std::remove_const_t<T>[]> items_;
};

// The past of a batch of sequences of one dtype, behind a lock: objects may be shared between threads.
class MixState {
    template <class F> auto with(const F &f) { return choices_.dtype == DType::f32 ? f(f32_, float{}) : f(f64_, double{}); }

  public:
    MixState(const Call & /* the host */, MixChoices choices) : choices_(std::move(choices)) { make(); }
    MixState(const MixState &other) : choices_(other.choices_) { make(); }
    const MixChoices &choices() const { return choices_; }

    // `weights` and `mask` broadcast to (..., m) and (...).
    py::object step(const py::object &context, const py::object &z, const py::object &given, const py::object &masked, const py::object &out) {
        const Array xz = choices_.tokens(Call(context), z, 1, Call().device);
        const py::object weights = choices_.weights_of(Call(), given), mask = choices_.mask_of(Call(), masked, {});
        return with([&](auto &state, auto t) {
            using T = decltype(t);
            const Array xo = Call().output(out, choices_.shape({state->width()}), choices_.dtype);
            check_no_overlap(xo, xz);
            const std::int64_t m = std::int64_t(choices_.options.offsets.size()), rows = state->batch();
            std::vector<T> kept;
            MatrixView<const T> vw, vm;
            if (!weights.is_none()) {
                const Array xw(weights, "weights");
                xw.require_dtype_of(xz);
                check_no_overlap(xo, xw);
                const auto view = spread<T>(xw, choices_.shape({m}), true);
                kept.resize(std::size_t(rows * m));
                for (std::int64_t i = 0; i < rows; ++i)
                    for (std::int64_t j = 0; j < m; ++j) kept[std::size_t(i * m + j)] = view[i].data[j * view[i].col_stride];
                vw = {kept.data(), rows, m};
            }
            const auto xm = optional(mask, "mask", choices_.dtype);
            if (xm) vm = {static_cast<const T *>(xm->data()), 1, rows, rows, 1};
            const Rows<const T> tokens(xz);
            Rows<T> to(xo);
            run([&] { state->step(tokens.view, weights.is_none() ? nullptr : &vw, xm ? &vm : nullptr, to.view); });
            to.back();
            xo.written();
            return xo.object();
        });
    }
    void prefill(const py::object &context, const py::object &z, const py::object &masked) {
        const Array xz = choices_.tokens(Call(context), z, 2, Call().device);
        const py::object mask = choices_.mask_of(Call(), masked, {xz.rows()});
        with([&](auto &state, auto t) {
            using T = decltype(t);
            const auto xm = optional(mask, "mask", choices_.dtype);
            const auto vz = xz.stack<const T>(choices_.batch);
            StackView<const T> vm;
            if (xm) vm = xm->row_stack<const T>(choices_.batch);
            run([&] { state->prefill(vz, xm ? &vm : nullptr); });
            return 0;
        });
    }
    std::int64_t position() {
        return with([&](auto &state, auto) {
            std::int64_t n = 0;
            run([&] { n = state->position(); });
            return n;
        });
    }
    std::unique_ptr<MixState> copy() {
        auto twin = std::make_unique<MixState>(*this);
        const auto same = [&](auto &from, auto &to) {
            auto p = decltype(from->past())();
            run([&] { p = from->past(); });
            to->restore(p);
        };
        choices_.dtype == DType::f32 ? same(f32_, twin->f32_) : same(f64_, twin->f64_);
        return twin;
    }
    py::tuple past() {
        return with([&](auto &state, auto t) -> py::tuple {
            typename PluckerMixState<decltype(t)>::Past p;
            run([&] { p = state->past(); });
            const auto kept = py::ssize_t(p.kept), batch = py::ssize_t(state->batch()), r = py::ssize_t(choices_.r);
            return py::make_tuple(hand_over(std::move(p.tokens), {kept, batch, r}), hand_over(std::move(p.counts), {kept, batch}), p.position);
        });
    }
    void restore(const py::object &tokens, const py::array_t<unsigned char, py::array::c_style | py::array::forcecast> &counts, std::int64_t position) {
        with([&](auto &state, auto t) {
            using T = decltype(t);
            const auto items = py::array_t<T, py::array::c_style | py::array::forcecast>::ensure(tokens);
            const std::int64_t most = *std::max_element(choices_.options.offsets.begin(), choices_.options.offsets.end()), kept = std::min(position, most);
            const bool fits = items && position >= 0 && position < std::int64_t(1) << 40 && items.ndim() == 3 && counts.ndim() == 2 && items.shape(0) == kept &&
                              items.shape(1) == state->batch() && items.shape(2) == choices_.r && counts.shape(0) == kept && counts.shape(1) == state->batch();
            if (!fits)
                throw ValueError("a saved state of " + std::to_string(position) + " tokens must have tokens of shape (" + std::to_string(kept) + ", " +
                                 std::to_string(state->batch()) + ", " + std::to_string(choices_.r) +
                                 ") and counts whose shape is the first two of these axes");
            typename PluckerMixState<T>::Past p;
            p.tokens.assign(items.data(), items.data() + items.size());
            p.counts.assign(counts.data(), counts.data() + counts.size());
            p.kept = kept;
            p.position = position;
            run([&] { state->restore(p); });
            return 0;
        });
    }

  private:
    void make() {
        with([&](auto &state, auto t) {
            using T = decltype(t);
            const auto xw = optional(choices_.w, "W", choices_.dtype), xb = optional(choices_.b, "b", choices_.dtype);
            MatrixView<const T> vw;
            if (xw) vw = xw->matrix<const T>();
            std::int64_t count = 1;
            for (const auto s : choices_.batch) count *= s;
            state = std::make_unique<PluckerMixState<T>>(choices_.options, choices_.r, count, vw, xb ? xb->vector<const T>(vw.rows) : nullptr);
            return 0;
        });
    }
    void run(const std::function<void()> &f) {
        const py::gil_scoped_release release;
        const std::lock_guard<Turn> lock(turn_);
        f();
    }
    MixChoices choices_;
    std::unique_ptr<PluckerMixState<float>> f32_;
    std::unique_ptr<PluckerMixState<double>> f64_;
    Turn turn_;
};

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

bool all_finite(const Array &x) {
    return dispatch(x.dtype(), [&](auto t) {
        using T = decltype(t);
        return subspan::all_finite<T>(x.ndim() < 2 ? x.row_stack<const T>(x.leading(1)) : x.stack<const T>(x.leading()));
    });
}

// Those of the weights from those of every token, or None; ValueError where finite input gave what the dtype cannot hold.
py::object summed_gradient(const Call &call, const std::optional<Array> &full, py::handle weights, const MixArguments &x,
                           std::initializer_list<const Array *> more) {
    if (!full) return py::none();
    const py::object result = summed_to(call, *full, weights, x.z.dtype());
    bool fits = all_finite(Array(result, "dweights"));
    for (const Array *input : {&x.z, &*x.weights}) fits = fits || !all_finite(*input);
    for (const Array *input : more) fits = fits || (input != nullptr && !all_finite(*input));
    if (!fits) throw ValueError("the gradient of weights overflows the dtype although the input is finite; scale what goes in");
    return result;
}

// dz and dweights, or None.
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
    return py::make_tuple(dz.object(), summed_gradient(call, dw, weights, x, {&g}));
}

py::object mix_project(py::handle context, py::handle w, py::handle b, SUBSPAN_MIXING, const py::object &out) {
    const Call call(context);
    SUBSPAN_MIXING_ARGUMENTS(call);
    const ProjectionArguments p(call, w, b, x.r, &x.z);
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

// dz, dW, db and dweights, or None.
py::tuple mix_project_backward(py::handle context, py::handle grad, py::handle w, py::handle b, SUBSPAN_MIXING) {
    const Call call(context);
    SUBSPAN_MIXING_ARGUMENTS(call);
    const ProjectionArguments p(call, w, b, x.r, &x.z);
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
    return py::make_tuple(dz.object(), dw.object(), db ? db->object() : py::none(), summed_gradient(call, da, weights, x, {&g, &p.w, p.b ? &*p.b : nullptr}));
}

} // namespace

void register_plucker(py::module_ &m) {
    using py::arg;
    register_mix_state<MixState>(m).def("restore", &MixState::restore, arg("tokens"), arg("counts"), arg("position"));
    m.def("mix", &mix, arg("call"), SUBSPAN_MIXING_NAMES, arg("out"));
    m.def("mix_backward", &mix_backward, arg("call"), arg("grad"), SUBSPAN_MIXING_NAMES);
    m.def("mix_project", &mix_project, arg("call"), arg("W"), arg("b"), SUBSPAN_MIXING_NAMES, arg("out"));
    m.def("mix_project_backward", &mix_project_backward, arg("call"), arg("grad"), arg("W"), arg("b"), SUBSPAN_MIXING_NAMES);
}

} // namespace subspan::bind
