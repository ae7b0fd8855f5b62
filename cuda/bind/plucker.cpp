#include "device.hpp"
#include "mixing.hpp"
#include "register.hpp"
#include "subspan/cuda/plucker_mix.hpp"

namespace subspan::bind {
namespace {

void require_one_start(const MixOptions &o) {
    if (!o.rope_starts.empty()) throw py::type_error("rope_start with a position for each sequence is not implemented on CUDA devices");
}

// The tokens and what goes with them. For decoding z is a ring and `first` the position of the newest token.
class Input {
  public:
    explicit Input(const MixArguments &x, std::int64_t ring = 0, std::int64_t first = 0) {
        require_one_start(x.options);
        in.z = stack(x.z, x.batch);
        in.ring = ring;
        in.first = first;
        if (x.mask) {
            Shape wanted = x.batch;
            wanted.push_back(in.z.rows); // of a ring as well: which of its tokens take part
            mask_ = broadcast(*x.mask, wanted, 1);
            in.mask = &mask_;
        }
        if (x.weights) {
            Shape whole = x.batch;
            whole.insert(whole.end(), {ring > 0 ? 1 : in.z.rows, std::int64_t(x.options.offsets.size())});
            weights_ = broadcast(*x.weights, whole, 2);
            in.weights = &weights_;
        }
    }
    Input(const Input &) = delete;
    Input &operator=(const Input &) = delete;
    cuda::MixInput in;

  private:
    Stack weights_, mask_;
};

struct Projection {
    Stack w, b;
    explicit Projection(const ProjectionArguments &p) : w(stack(p.w, {})) {
        if (p.b) b = stack(*p.b, {}, 1);
    }
};

py::object mix(py::handle context, SUBSPAN_MIXING, const py::object &out) {
    const Call call(context);
    SUBSPAN_MIXING_ARGUMENTS(call);
    const Array xo = call.output(out, x.shape(x.pairs()), x.z.dtype());
    x.check_no_overlap_with(xo);
    const Input input(x);
    const Stack so = stack(xo, x.batch);
    const Memory memory(call, cuda::plucker_workspace(input.in, x.options, 0, false, call.device));
    {
        const py::gil_scoped_release release;
        cuda::plucker_mix(memory.context(), input.in, x.options, so);
    }
    xo.written();
    return xo.object();
}

// Weights of every token, in what sums are kept in, and whether they were given.
std::optional<Array> gradients_of_weights(const Call &call, const MixArguments &x) {
    std::optional<Array> out;
    if (x.weights) out.emplace(call.empty(x.shape(std::int64_t(x.options.offsets.size())), wide(x.z.dtype()), "dweights"));
    return out;
}

py::tuple mix_backward(py::handle context, py::handle grad, SUBSPAN_MIXING) {
    const Call call(context);
    SUBSPAN_MIXING_ARGUMENTS(call);
    const Array g = x.gradient(call, grad, x.pairs()), dz = call.empty(x.shape(x.r), x.z.dtype(), "dz");
    const std::optional<Array> dw = gradients_of_weights(call, x);
    const Input input(x);
    const Stack sg = stack(g, x.batch), sd = stack(dz, x.batch);
    Stack sw;
    if (dw) sw = stack(*dw, x.batch);
    const Memory memory(call, cuda::plucker_workspace(input.in, x.options, 0, true, call.device));
    {
        const py::gil_scoped_release release;
        cuda::plucker_mix_backward(memory.context(), sg, input.in, x.options, sd, dw ? &sw : nullptr);
    }
    return py::make_tuple(dz.object(), dw ? dw->object() : py::none());
}

py::object mix_project(py::handle context, py::handle w, py::handle b, SUBSPAN_MIXING, const py::object &out) {
    const Call call(context);
    SUBSPAN_MIXING_ARGUMENTS(call);
    const ProjectionArguments p(call, w, b, x.z, x.r);
    const Array xo = call.output(out, x.shape(p.d()), x.z.dtype());
    x.check_no_overlap_with(xo);
    p.check_no_overlap_with(xo);
    const Input input(x);
    const Projection to(p);
    const Stack so = stack(xo, x.batch);
    const Memory memory(call, cuda::plucker_workspace(input.in, x.options, p.d(), false, call.device));
    {
        const py::gil_scoped_release release;
        cuda::plucker_mix_project(memory.context(), input.in, to.w, p.b ? &to.b : nullptr, x.options, so);
    }
    xo.written();
    return xo.object();
}

py::tuple mix_project_backward(py::handle context, py::handle grad, py::handle w, py::handle b, SUBSPAN_MIXING) {
    const Call call(context);
    SUBSPAN_MIXING_ARGUMENTS(call);
    const ProjectionArguments p(call, w, b, x.z, x.r);
    const Array g = x.gradient(call, grad, p.d()), dz = call.empty(x.shape(x.r), x.z.dtype(), "dz"), dw = call.empty({p.d(), x.pairs()}, x.z.dtype(), "dW");
    std::optional<Array> db;
    if (p.b) db.emplace(call.empty({p.d()}, x.z.dtype(), "db"));
    const std::optional<Array> da = gradients_of_weights(call, x);
    std::int64_t tokens = 1;
    for (std::size_t i = 0; i + 1 < x.z.shape().size(); ++i) tokens *= x.z.shape()[i];
    require_one_start(x.options);
    if (tokens == 0) {
        call.place.attr("assign")(dw.object(), 0);
        if (db) call.place.attr("assign")(db->object(), 0);
    } else {
        const Input input(x);
        const Projection to(p);
        const Stack sg = stack(g, x.batch), sdz = stack(dz, x.batch), sdw = stack(dw, {});
        Stack sdb, sda;
        if (db) sdb = stack(*db, {}, 1);
        if (da) sda = stack(*da, x.batch);
        const Memory memory(call, cuda::plucker_workspace(input.in, x.options, p.d(), true, call.device));
        const py::gil_scoped_release release;
        cuda::plucker_mix_project_backward(memory.context(), sg, input.in, to.w, p.b ? &to.b : nullptr, x.options, sdz, sdw, db ? &sdb : nullptr,
                                           da ? &sda : nullptr);
    }
    return py::make_tuple(dz.object(), dw.object(), db ? db->object() : py::none(), da ? da->object() : py::none());
}

// The newest token of a ring of tokens, (..., 1, width); without W its coordinates.
void mix_ring(py::handle context, py::handle w, py::handle b, SUBSPAN_MIXING, std::int64_t ring, std::int64_t first, py::handle out) {
    const Call call(context);
    SUBSPAN_MIXING_ARGUMENTS(call);
    const Array xo(call, out, "out", Access::out);
    x.check_no_overlap_with(xo);
    const Input input(x, ring, first);
    const Stack so = stack(xo, x.batch);
    if (w.is_none()) {
        const Memory memory(call, cuda::plucker_workspace(input.in, x.options, 0, false, call.device));
        const py::gil_scoped_release release;
        cuda::plucker_mix(memory.context(), input.in, x.options, so);
        return;
    }
    const ProjectionArguments p(call, w, b, x.z, x.r);
    p.check_no_overlap_with(xo);
    const Projection to(p);
    const Memory memory(call, cuda::plucker_workspace(input.in, x.options, p.d(), false, call.device));
    const py::gil_scoped_release release;
    cuda::plucker_mix_project(memory.context(), input.in, to.w, p.b ? &to.b : nullptr, x.options, so);
}

} // namespace

void register_device_plucker(py::module_ &m) {
    using py::arg;
    m.def("mix", &mix, arg("call"), SUBSPAN_MIXING_NAMES, arg("out"));
    m.def("mix_backward", &mix_backward, arg("call"), arg("grad"), SUBSPAN_MIXING_NAMES);
    m.def("mix_project", &mix_project, arg("call"), arg("W"), arg("b"), SUBSPAN_MIXING_NAMES, arg("out"));
    m.def("mix_project_backward", &mix_project_backward, arg("call"), arg("grad"), arg("W"), arg("b"), SUBSPAN_MIXING_NAMES);
    m.def("mix_ring", &mix_ring, arg("call"), arg("W"), arg("b"), SUBSPAN_MIXING_NAMES, arg("ring"), arg("first"), arg("out"));
}

} // namespace subspan::bind
