#include "device.hpp"
#include "mixing.hpp"
#include "register.hpp"
#include "subspan/cuda/plucker_mix.hpp"
#include "turn.hpp"

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
    return py::make_tuple(dz.object(), dw ? summed_to(call, *dw, weights, x.weights->dtype()) : py::none());
}

py::object mix_project(py::handle context, py::handle w, py::handle b, SUBSPAN_MIXING, const py::object &out) {
    const Call call(context);
    SUBSPAN_MIXING_ARGUMENTS(call);
    const ProjectionArguments p(call, w, b, x.r, &x.z);
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
    const ProjectionArguments p(call, w, b, x.r, &x.z);
    const Array g = x.gradient(call, grad, p.d()), dz = call.empty(x.shape(x.r), x.z.dtype(), "dz"), dw = call.empty({p.d(), x.pairs()}, x.z.dtype(), "dW");
    std::optional<Array> db;
    if (p.b) db.emplace(call.empty({p.d()}, x.z.dtype(), "db"));
    const std::optional<Array> da = gradients_of_weights(call, x);
    std::int64_t tokens = 1;
    for (std::size_t i = 0; i + 1 < x.z.shape().size(); ++i) tokens *= x.z.shape()[i];
    require_one_start(x.options);
    if (tokens == 0) {
        fill(call, dw, 0);
        if (db) fill(call, *db, 0);
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
    return py::make_tuple(dz.object(), dw.object(), db ? db->object() : py::none(), da ? summed_to(call, *da, weights, x.weights->dtype()) : py::none());
}

// The tokens that a batch of sequences still needs: a ring of max(offsets) + 1 for each, in memory of the caller's library.
class MixState {
  public:
    MixState(const Call &call, MixChoices choices) : choices_(std::move(choices)), device_(call.device), place_(call.place) {
        const auto &offsets = choices_.options.offsets;
        require_one_start(choices_.options);
        size_ = *std::max_element(offsets.begin(), offsets.end()) + 1;
        tokens_ = filled(call, choices_.shape({size_, choices_.r}), choices_.dtype, 0).object();
    }
    MixState(MixState &other) : choices_(other.choices_), device_(other.device_), place_(other.place_) { // a copy of one moment
        const Turn::Held lock(other.turn_);
        const Call call(place_.attr("call")());
        size_ = other.size_, count_ = other.count_;
        const auto own = [&](const py::object &x, bool bytes) {
            return x.is_none() ? x : copied(call, Array(call, x, "the tokens", Access::read, bytes)).object();
        };
        tokens_ = own(other.tokens_, false), open_ = own(other.open_, true);
    }
    const MixChoices &choices() const { return choices_; }

    py::object step(const py::object &context, const py::object &z, const py::object &given, const py::object &masked, const py::object &out) {
        const Call call(context);
        const py::object mask = choices_.mask_of(call, masked, {});
        const auto row = [](const py::object &x, bool last) { // a new axis of one for the token
            return x.is_none() ? x
                   : last      ? py::object(x[py::make_tuple(py::ellipsis(), py::none())])
                               : py::object(x[py::make_tuple(py::ellipsis(), py::none(), full())]);
        };
        const Array token = choices_.tokens(call, z, 1, device_);
        const py::object weights = choices_.weights_of(call, given);
        if (!weights.is_none()) {
            const Array w(call, weights, "weights");
            w.require_dtype_of(token);
            broadcast_shape(w, choices_.batch, "weights", 1);
        }
        const Array to = call.output(out, choices_.shape({choices_.width()}), choices_.dtype);
        const Turn::Held lock(turn_);
        // The slot holds a token that no offset reaches any more: should the kernel not start, nothing is lost.
        put(call, row(z, false), row(mask, true), 1);
        const py::object newest = row(to.object(), false), rows = weights.is_none() || py::len(weights.attr("shape")) == 1 ? weights : row(weights, false);
        mix_newest(call, rows, newest);
        ++count_;
        to.written();
        return to.object();
    }
    void prefill(const py::object &context, const py::object &z, const py::object &masked) {
        const Call call(context);
        const Array whole = choices_.tokens(call, z, 2, device_);
        const py::object mask = choices_.mask_of(call, masked, {whole.rows()});
        const Turn::Held lock(turn_);
        put(call, z, mask, whole.rows());
        count_ += whole.rows();
    }
    std::int64_t position() const { return count_; }
    std::unique_ptr<MixState> copy() { return std::make_unique<MixState>(*this); }
    [[noreturn]] py::tuple past() const { throw py::type_error("a state on a CUDA device is not saved; copy() keeps one, and its tokens can be fed again"); }

  private:
    static py::slice full() { return py::slice(std::nullopt, std::nullopt, std::nullopt); }
    // ValueError unless the leading axes of x broadcast to the batch.
    static void broadcast_shape(const Array &x, const Shape &batch, const char *name, int inner) {
        const Shape mine = x.leading(inner);
        bool fits = mine.size() <= batch.size();
        for (std::size_t a = 0; fits && a < mine.size(); ++a) {
            const auto n = mine[mine.size() - 1 - a];
            fits = n == 1 || n == batch[batch.size() - 1 - a];
        }
        if (!fits) throw py::value_error(std::string(name) + ", shape " + x.shape_text() + ", does not broadcast to " + shape_text(batch));
    }
    // Tokens (..., T, r) from the current position on; the position is the caller's to move.
    void put(const Call &call, const py::object &z, const py::object &mask, std::int64_t length) {
        bool one = true; // the mask of all tokens is one
        if (!mask.is_none()) { // before anything is written
            const Array closed(call, mask, "mask", Access::read, true);
            broadcast_shape(closed, choices_.shape({length}), "mask", 0);
            one = closed.ndim() == 0 || closed.shape(closed.ndim() - 1) == 1;
            if (open_.is_none()) {
                open_ = filled(call, choices_.shape({size_}), DType::u8, 1).object();
            }
        }
        const auto from = [](std::int64_t begin, std::int64_t count) { return py::slice(py::ssize_t(begin), py::ssize_t(begin + count), 1); };
        for (std::int64_t begin = std::max<std::int64_t>(0, length - size_); begin < length;) {
            const std::int64_t slot = (count_ + begin) % size_, some = std::min(size_ - slot, length - begin);
            assign(call, Array(call, z[py::make_tuple(py::ellipsis(), from(begin, some), full())], "z"),
                   Array(call, tokens_[py::make_tuple(py::ellipsis(), from(slot, some), full())], "the tokens"));
            if (!open_.is_none()) {
                const Array there(call, open_[py::make_tuple(py::ellipsis(), from(slot, some))], "mask", Access::read, true);
                if (mask.is_none())
                    fill(call, there, 1);
                else
                    assign(call, Array(call, one ? mask : py::object(mask[py::make_tuple(py::ellipsis(), from(begin, some))]), "mask", Access::read, true),
                           there);
            }
            begin += some;
        }
    }
    // The newest token of the ring, (..., 1, width).
    void mix_newest(const Call &call, const py::object &weights, const py::object &out) const {
        const MixArguments x(call, tokens_, weights, open_, choices_);
        const Array xo(call, out, "out", Access::out);
        x.check_no_overlap_with(xo);
        const Input input(x, size_, count_);
        const Stack so = stack(xo, x.batch);
        if (choices_.w.is_none()) {
            const Memory memory(call, cuda::plucker_workspace(input.in, x.options, 0, false, call.device));
            const py::gil_scoped_release release;
            cuda::plucker_mix(memory.context(), input.in, x.options, so);
            return;
        }
        const ProjectionArguments p(call, choices_.w, choices_.b, x.r, &x.z);
        p.check_no_overlap_with(xo);
        const Projection to(p);
        const Memory memory(call, cuda::plucker_workspace(input.in, x.options, p.d(), false, call.device));
        const py::gil_scoped_release release;
        cuda::plucker_mix_project(memory.context(), input.in, to.w, p.b ? &to.b : nullptr, x.options, so);
    }

    MixChoices choices_;
    int device_;
    py::object place_; // of its memory
    std::int64_t size_ = 0, count_ = 0;
    py::object tokens_, open_ = py::none(); // open: which of the tokens take part; None: all
    Turn turn_;
};

} // namespace

void register_device_plucker(py::module_ &m) {
    using py::arg;
    m.def("mix", &mix, arg("call"), SUBSPAN_MIXING_NAMES, arg("out"));
    m.def("mix_backward", &mix_backward, arg("call"), arg("grad"), SUBSPAN_MIXING_NAMES);
    m.def("mix_project", &mix_project, arg("call"), arg("W"), arg("b"), SUBSPAN_MIXING_NAMES, arg("out"));
    m.def("mix_project_backward", &mix_project_backward, arg("call"), arg("grad"), arg("W"), arg("b"), SUBSPAN_MIXING_NAMES);
    register_mix_state<MixState>(m).def("__getattr__", [](const MixState &, const std::string &name) -> py::object { not_on_device(name); });
}

} // namespace subspan::bind
