#include "device.hpp"
#include "register.hpp"
#include "turn.hpp"
#include "subspan/cuda/affine.hpp"
#include "subspan/cuda/blas.hpp"
#include "subspan/cuda/streaming_svd.hpp"

#include <cmath>
#include <memory>
#include <optional>

namespace subspan::bind {
namespace {

// A stream whose components, singular values and mean are in memory of the rows' library. Updates do not wait for the device; results
// do, and tell of rows that were refused. Of the same names and signatures as the host's.
class SvdState {
  public:
    SvdState(py::object place, std::int64_t rank, double forget, bool center, double energy, const std::string &method, std::int64_t oversample,
             bool exact_blocks, bool canonical_signs, const py::object &dtype)
        : place_(std::move(place)), rank_(rank), oversample_(oversample), forget_(forget), energy_(energy), center_(center), method_(method) {
        if (!dtype.is_none()) wanted_ = dtype.cast<std::string>() == "float32" ? DType::f32 : DType::f64;
        if (exact_blocks) refuse("exact_blocks=True of a stream");
        if (canonical_signs) refuse("signs='v' of a stream");
    }
    explicit SvdState(SvdState &other) { // a copy of one moment
        const Turn::Held lock(other.turn_);
        place_ = other.place_, rank_ = other.rank_, oversample_ = other.oversample_, forget_ = other.forget_, energy_ = other.energy_;
        center_ = other.center_, method_ = other.method_, dtype_ = other.dtype_, wanted_ = other.wanted_, n_ = other.n_, inner_ = other.inner_,
        used_ = other.used_, rows_ = other.rows_;
        for (const auto &[to, from] :
             {std::pair{&components_, &other.components_}, {&values_, &other.values_}, {&mean_, &other.mean_}, {&totals_, &other.totals_}})
            *to = *from && !from->is_none() ? copied(here(), Array(here(), *from, "the stream")).object() : *from;
    }

    void update(const py::object &given) {
        const Turn::Held lock(turn_);
        const Call call = here();
        const Array rows = read(call, given, "rows");
        if (rows.shape(0) == 0) throw py::value_error("rows holds no rows");
        const bool fresh = !dtype_;
        if (fresh) begin(rows.shape(1), rows.dtype());
        try {
            const Views own(call, *this);
            const cuda::SvdBlock block{stack(rows, {}), forget_, std::max<std::int64_t>(128, inner_)};
            const Memory memory(call, cuda::svd_update_workspace(own.state, block, call.device));
            const py::gil_scoped_release release;
            used_ = cuda::svd_update(memory.context(), own.state, block);
        } catch (...) {
            if (fresh) dtype_.reset();
            throw;
        }
        rows_ += rows.shape(0);
    }
    void merge(SvdState &other) {
        SvdState theirs(other); // which nobody else changes meanwhile
        if (!theirs.dtype_) return;
        const Turn::Held lock(turn_);
        const Call call = here();
        const bool fresh = !dtype_;
        if (!fresh && theirs.n_ != n_) throw py::value_error("other must have " + std::to_string(n_) + " columns, got " + std::to_string(theirs.n_));
        if (theirs.center_ != center_) throw py::value_error("center must be the same in both streams");
        require(*theirs.dtype_, "other");
        if (device_of(theirs) != device_of(*this))
            throw py::value_error("other is on CUDA device " + std::to_string(device_of(theirs)) + ", the stream on " + std::to_string(device_of(*this)));
        if (fresh) begin(theirs.n_, *theirs.dtype_);
        try {
            const Views own(call, *this), others(call, theirs);
            const Memory memory(call, cuda::svd_merge_workspace(own.state, others.state, call.device));
            const py::gil_scoped_release release;
            used_ = cuda::svd_merge(memory.context(), own.state, others.state);
        } catch (...) {
            if (fresh) dtype_.reset();
            throw;
        }
        rows_ += theirs.rows_;
    }

    py::object dtype() const { return dtype_ ? py::object(py::str(name_of(*dtype_))) : py::none(); }
    std::int64_t features() const { return n_; }
    std::int64_t rows_seen() const { return rows_; }
    std::string route() const { return std::string(robust() ? "robust" : "gram") + " on CUDA device " + std::to_string(device_of(*this)); }
    double captured_energy() {
        const Shown s = shown();
        return s.squares(0, s.k);
    }
    double residual_energy() {
        const Shown s = shown();
        return s.squares(s.k, inner_) + s.left;
    }
    py::object values() {
        const Shown s = shown();
        return first(values_, s.k);
    }
    py::object components() {
        const Shown s = shown();
        return first(components_, s.k);
    }
    // In the dtype of the rows, of which those that were refused are told of.
    py::object mean() {
        if (!dtype_ || mean_.is_none()) return py::none();
        shown();
        return first(mean_, n_);
    }
    // Singular values in double, the energy that is not theirs, rows, and their weight where it is known.
    py::tuple energies() {
        if (!dtype_) return py::make_tuple(py::array_t<double>(0), 0.0, 0, 0.0);
        const Shown s = shown();
        return py::make_tuple(py::array_t<double>(py::ssize_t(s.k), s.values.data()), s.squares(s.k, inner_) + s.left, rows_,
                              forget_ == 1.0 ? py::object(py::float_(double(rows_))) : py::none());
    }

    py::object project(const py::object &given, const py::object &out) {
        const Call call = here();
        const Array x = seen(call, given, "X");
        const Array v = basis(call), c = centred(call, x);
        const Array z = result(call, out, given, {x.shape(0), v.shape(0)}, x);
        product(call, stack(c, {}), stack(v, {}).transposed(), z);
        return done(z, given, out);
    }
    py::object reconstruct(const py::object &given, const py::object &out) {
        const Call call = here();
        const Array v = basis(call), rows = seen(call, given, "Z", v.shape(0));
        const Array x = result(call, out, given, {rows.shape(0), n_}, rows);
        Array z = for_blas(call, rows.object(), rows.name());
        z.as_matrix(false);
        product(call, stack(z, {}), stack(v, {}), x);
        if (!mean_.is_none()) {
            const Array mean(call, mean_, "mean");
            const Stack to = stack(x, {});
            const Memory memory(call, 0);
            const py::gil_scoped_release release;
            cuda::add_mean(memory.context(), to, static_cast<const double *>(mean.data()), 1.0, to);
        }
        return done(x, given, out);
    }
    py::object residual(const py::object &given, const py::object &out) {
        const Call call = here();
        const Array x = seen(call, given, "X");
        const Array v = basis(call), c = centred(call, x);
        const Array z = call.empty({x.shape(0), v.shape(0)}, x.dtype()), along = call.empty(x.shape(), x.dtype());
        product(call, stack(c, {}), stack(v, {}).transposed(), z);
        product(call, stack(z, {}), stack(v, {}), along);
        const Array squares = result(call, out, given, {x.shape(0)}, x);
        {
            const Stack sc = stack(c, {}), sa = stack(along, {}), so = stack(squares, {}, 1);
            const Memory memory(call, 0);
            const py::gil_scoped_release release;
            cuda::row_distances(memory.context(), sc, sa, so);
        }
        return done(squares, given, out);
    }

    std::unique_ptr<SvdState> copy() { return std::make_unique<SvdState>(*this); }
    // Arrays of NumPy and numbers; waits for the device.
    py::dict state() {
        py::dict d;
        d["dtype"] = dtype();
        if (!dtype_) return d;
        shown();
        const Turn::Held lock(turn_);
        d["device_rank"] = used_, d["device_rows"] = rows_, d["device_inner"] = inner_;
        for (const auto &[name, x] :
             {std::pair{"device_components", &components_}, {"device_values", &values_}, {"device_mean", &mean_}, {"device_totals", &totals_}})
            d[name] = x->is_none() ? *x : py::object(place_.attr("host")(*x));
        return d;
    }
    // ValueError for a state whose parts do not fit each other.
    void restore(const py::dict &d) {
        if (d["dtype"].is_none()) return;
        const auto said = d["dtype"].cast<std::string>();
        if (said != "float32" && said != "float64") throw py::value_error("dtype is '" + said + "', wanted float32 or float64");
        const py::object parts = d["device_components"];
        const auto shape = py::module_::import("numpy").attr("shape")(parts).cast<py::tuple>();
        if (shape.size() != 2) throw py::value_error("components have shape " + std::string(py::str(shape)));
        const auto inner = shape[0].cast<std::int64_t>(), n = shape[1].cast<std::int64_t>();
        const auto used = d["device_rank"].cast<std::int64_t>(), rows = d["device_rows"].cast<std::int64_t>();
        if (used < 0 || used > inner || d["device_inner"].cast<std::int64_t>() != inner || rows < 0)
            throw py::value_error("rank is " + std::to_string(used) + ", rows are " + std::to_string(rows) + ", " + std::to_string(inner) + " components");
        const auto there = [&](const char *member, const std::vector<py::ssize_t> &wanted) {
            const std::string name(member);
            const py::object x = d[("device_" + name).c_str()];
            if (x.is_none()) throw py::value_error(name + " is missing");
            const Numbers host = Numbers::ensure(x);
            if (!host) throw py::error_already_set();
            bool fits = std::equal(wanted.begin(), wanted.end(), host.shape(), host.shape() + host.ndim());
            for (py::ssize_t i = 0; fits && i < host.size(); ++i) fits = std::isfinite(host.data()[i]);
            if (!fits) throw py::value_error(name + " has shape " + std::string(py::str(host.attr("shape"))) + ", or is not finite");
            return py::object(place_.attr("from_host")(host));
        };
        components_ = there("components", {inner, n});
        values_ = there("values", {inner});
        totals_ = there("totals", {cuda::kSvdTotals});
        mean_ = center_ ? there("mean", {n}) : py::none();
        dtype_ = said == "float32" ? DType::f32 : DType::f64;
        n_ = n, inner_ = inner, used_ = used, rows_ = rows;
    }

  private:
    // The state as the kernels take it.
    struct Views {
        Views(const Call &call, const SvdState &s)
            : components(call, s.components_, "components"), values(call, s.values_, "values"), totals(call, s.totals_, "totals") {
            state.components = stack(components, {});
            state.values = static_cast<double *>(values.contiguous());
            state.totals = static_cast<double *>(totals.contiguous());
            if (!s.mean_.is_none()) {
                mean.emplace(call, s.mean_, "mean");
                state.mean = static_cast<double *>(mean->contiguous());
            }
            state.rank = s.used_;
            state.robust = s.robust();
        }
        Array components, values, totals;
        std::optional<Array> mean;
        cuda::SvdState state;
    };
    struct Shown {
        std::int64_t k = 0; // components that are shown
        std::vector<double> values;
        double left = 0;
        double squares(std::int64_t begin, std::int64_t end) const {
            double s = 0;
            for (std::int64_t i = begin; i < end && i < std::int64_t(values.size()); ++i) s += values[std::size_t(i)] * values[std::size_t(i)];
            return s;
        }
    };

    [[noreturn]] static void refuse(const char *what) { throw py::type_error(std::string(what) + " is not implemented on CUDA devices"); }
    static std::int64_t device_of(const SvdState &s) { return s.place_.attr("device").cast<std::int64_t>(); }
    Call here() const { return Call(place_.attr("call")()); }
    // The Gram matrix of float64 rows would lose what is below 1e-8 of the first value.
    bool robust() const { return method_ == "robust" || (method_ == "auto" && dtype_ == DType::f64); }
    void begin(std::int64_t n, DType dtype) {
        if (rank_ > n) throw py::value_error("rank must be at most the number of columns, " + std::to_string(n) + ", got " + std::to_string(rank_));
        const std::int64_t inner = kept_directions(n, rank_, oversample_);
        const auto zeros = [&](const Shape &shape) { return filled(here(), shape, DType::f64, 0).object(); };
        components_ = zeros({inner, n}); // in double: rounding them at every update would add up
        values_ = zeros({inner});
        totals_ = zeros({cuda::kSvdTotals});
        mean_ = center_ ? zeros({n}) : py::none();
        n_ = n, inner_ = inner, used_ = 0, rows_ = 0;
        dtype_ = dtype;
    }
    void require(DType d, const std::string &name) const {
        const auto own = dtype_ ? dtype_ : wanted_;
        if (own && d != *own) throw py::type_error(name + " must be " + name_of(*own) + " as the stream is, got " + name_of(d));
        if (d != DType::f32 && d != DType::f64) throw py::type_error(name + " must be float32 or float64, got " + name_of(d));
    }
    // Rows of the stream's dtype and number of columns, or any before the first.
    Array read(const Call &call, py::handle given, const char *name, std::int64_t columns = -1) const {
        Array x(call, given, name);
        x.as_matrix(false);
        require(x.dtype(), name);
        const std::int64_t wanted = columns < 0 ? n_ : columns;
        if (x.ndim() != 2 || (dtype_ && x.shape(1) != wanted))
            throw py::value_error(std::string(name) + " must have shape (" + (columns < 0 ? "b" : "m") + ", " + (dtype_ ? std::to_string(wanted) : "n") +
                                  "), got " + x.shape_text());
        return x;
    }
    Array seen(const Call &call, py::handle given, const char *name, std::int64_t columns = -1) const {
        if (!dtype_) throw py::value_error("the stream has seen no rows");
        return read(call, given, name, columns);
    }
    // Waits for the device; ValueError where rows were refused, which is said once.
    Shown shown() {
        Shown s;
        if (!dtype_) return s;
        double refused = 0;
        {
            const Turn::Held lock(turn_);
            const Numbers totals = host(here(), totals_), values = host(here(), values_);
            s.left = totals.data()[0];
            refused = totals.data()[1];
            s.values.assign(values.data(), values.data() + values.size());
            if (refused != 0) {
                fill(here(), Array(here(), totals_[py::slice(1, 2, 1)], "the refused"), 0);
                rows_ -= std::int64_t(refused);
            }
        }
        if (refused != 0)
            throw py::value_error(
                std::to_string(std::int64_t(refused)) +
                " rows held NaN or infinity, or were in a block with such rows, or in one whose decomposition did not settle; those blocks were "
                "left out, all else was taken in");
        std::int64_t most = 0;
        for (const double v : s.values) most += v > 0;
        most = std::min(most, rank_);
        const double whole = s.squares(0, inner_) + s.left;
        double kept = 0;
        while (s.k < most && (energy_ == 0 || s.k == 0 || kept / whole < energy_)) kept += s.values[std::size_t(s.k)] * s.values[std::size_t(s.k)], ++s.k;
        return s;
    }
    // The first of them in the dtype of the rows; a fresh array. None before there are rows.
    py::object first(const py::object &x, std::int64_t count) const {
        if (!dtype_) return py::none();
        return copied(here(), Array(here(), x[py::slice(0, py::ssize_t(count), 1)], "a result"), *dtype_).object();
    }
    Array basis(const Call &call) { return Array(call, components(), "components"); }
    Array centred(const Call &call, const Array &x) {
        Array c = mean_.is_none() ? for_blas(call, x.object(), x.name()) : call.empty(x.shape(), x.dtype());
        c.as_matrix(false);
        if (mean_.is_none()) return c;
        const Array mean(call, mean_, "mean");
        const Stack from = stack(x, {}), to = stack(c, {});
        const Memory memory(call, 0);
        const py::gil_scoped_release release;
        cuda::add_mean(memory.context(), from, static_cast<const double *>(mean.data()), -1.0, to);
        return c;
    }
    // `out`, or a fresh array: of one row without that axis.
    Array result(const Call &call, const py::object &out, py::handle given, Shape shape, const Array &x) const {
        const bool one = py::len(given.attr("shape")) == 1;
        const bool rows = shape.size() == 2;
        if (one && !out.is_none()) shape.erase(shape.begin());
        Array to = call.output(out, shape, x.dtype());
        check_no_overlap(to, x);
        if (one && !out.is_none() && rows) to.as_matrix(false);
        if (one && !out.is_none() && !rows) to.add_axis(true);
        return to;
    }
    static py::object done(const Array &to, py::handle given, const py::object &out) {
        to.written();
        if (!out.is_none()) return out;
        return py::len(given.attr("shape")) == 1 ? py::object(to.object()[py::int_(0)]) : to.object();
    }
    void product(const Call &call, const Stack &a, const Stack &b, const Array &out) const {
        const Stack to = stack(out, {});
        if (a.rows == 0 || b.cols == 0) return;
        if (a.cols == 0) return fill(call, out, 0);
        const auto into = [&](const Stack &c) {
            const Memory memory(call, cuda::blas_workspace(call.device));
            const py::gil_scoped_release release;
            cuda::matrix_product(memory.context(), a, b, 1.0, c);
        };
        // BLAS writes lines of unit stride that lie apart; an `out` of other strides gets a copy of the product.
        if (cuda::blas_layout(to)) return into(to);
        const Array apart = call.empty({to.rows, to.cols}, out.dtype());
        into(stack(apart, {}));
        assign(call, apart, out);
    }

    py::object place_; // the rows' library and device
    std::int64_t rank_, oversample_;
    double forget_, energy_;
    bool center_;
    std::string method_;
    std::optional<DType> dtype_, wanted_; // none before the first rows; what they must be of
    std::int64_t n_ = 0, inner_ = 0, used_ = 0, rows_ = 0;
    py::object components_, values_, mean_ = py::none(), totals_;
    Turn turn_;
};

} // namespace

void register_device_streaming(py::module_ &m) {
    using py::arg;
    py::class_<SvdState>(m, "SvdState")
        .def(py::init<py::object, std::int64_t, double, bool, double, const std::string &, std::int64_t, bool, bool, const py::object &>(), arg("place"),
             arg("rank"), arg("forget"), arg("center"), arg("energy"), arg("method"), arg("oversample"), arg("exact_blocks"), arg("canonical_signs"),
             arg("dtype"))
        .def("update", &SvdState::update, arg("rows"))
        .def("merge", &SvdState::merge, arg("other"))
        .def("dtype", &SvdState::dtype)
        .def("features", &SvdState::features)
        .def("rows_seen", &SvdState::rows_seen)
        .def("captured_energy", &SvdState::captured_energy)
        .def("residual_energy", &SvdState::residual_energy)
        .def("route", &SvdState::route)
        .def("values", &SvdState::values)
        .def("components", &SvdState::components)
        .def("mean", &SvdState::mean)
        .def("energies", &SvdState::energies)
        .def("project", &SvdState::project, arg("x"), arg("out"))
        .def("reconstruct", &SvdState::reconstruct, arg("z"), arg("out"))
        .def("residual", &SvdState::residual, arg("x"), arg("out"))
        .def("copy", &SvdState::copy)
        .def("state", &SvdState::state)
        .def("restore", &SvdState::restore, arg("state"))
        .def("__getattr__", [](const SvdState &, const std::string &name) -> py::object { not_on_device(name); });
}

} // namespace subspan::bind
