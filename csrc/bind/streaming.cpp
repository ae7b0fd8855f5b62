#include "convert.hpp"
#include "lapack_capsules.hpp"
#include "register.hpp"
#include "subspan/errors.hpp"
#include "subspan/orthonormalize.hpp"
#include "subspan/streaming_svd.hpp"

#include <cmath>
#include <type_traits>
#include <variant>

namespace subspan::bind {
namespace {

SvdMethod method_of(const std::string &name) {
    if (name == "auto") return SvdMethod::automatic;
    if (name == "robust") return SvdMethod::robust;
    if (name == "gram") return SvdMethod::gram;
    throw py::value_error("method must be 'auto', 'robust' or 'gram', got '" + name + "'");
}

// The stream of one dtype, made by the first rows, behind a lock: objects may be shared between threads.
class SvdState {
  public:
    // `place` says where rows are on a device; `dtype` is what all rows must be of, or None: the first ones decide.
    SvdState(const py::object & /* place */, std::int64_t rank, double forget, bool center, double energy, const std::string &method, std::int64_t oversample,
             bool exact_blocks, bool canonical_signs, const py::object &dtype) {
        load_lapack();
        if (!dtype.is_none()) wanted_ = dtype.cast<std::string>() == "float32" ? DType::f32 : DType::f64;
        options_ = {rank, forget, center, energy, oversample, method_of(method), canonical_signs, exact_blocks};
        StreamingSvd<float>{options_}; // checks the options
    }

    void update(const py::object &rows) {
        const Array a(rows, "rows");
        with(a.dtype(), "rows", [&](auto &s, auto t) { s.update(a.as_rows<const decltype(t)>()); });
    }
    void update_csr(const py::object &data, const py::object &indices, const py::object &indptr, std::int64_t rows, std::int64_t cols) {
        const Csr x(data, indices, indptr, rows, cols, "rows");
        with(x.dtype(), "rows", [&](auto &s, auto t) {
            const auto view = x.view<decltype(t)>();
            s.update(view);
        });
    }
    // (past, fresh, shift) of the left singular vectors.
    py::tuple update_with_rotation(const py::object &rows) {
        const Array a(rows, "rows");
        LeftRotation r{};
        with(a.dtype(), "rows", [&](auto &s, auto t) { r = subspan::update_with_rotation(s, a.as_rows<const decltype(t)>()); });
        const py::ssize_t before = r.before, after = r.after, fresh = r.rows;
        return py::make_tuple(hand_over(std::move(r.past), {before, after}), hand_over(std::move(r.fresh), {fresh, after}),
                              hand_over(std::move(r.shift), {after}));
    }
    void downdate(const py::object &rows) {
        const Array a(rows, "rows");
        with(a.dtype(), "rows", [&](auto &s, auto t) { s.downdate(a.as_rows<const decltype(t)>()); });
    }
    void merge(SvdState &other) {
        const py::gil_scoped_release release;
        if (&other == this) {
            const std::lock_guard<Turn> lock(turn_);
            visit_self([&](auto &s) { s.merge(s); });
            return;
        }
        const std::scoped_lock lock(turn_, other.turn_);
        const auto dtype = other.dtype_locked();
        if (!dtype) return;
        require_locked(*dtype, "other");
        dispatch(*dtype, [&](auto t) {
            using S = StreamingSvd<decltype(t)>;
            const bool fresh = std::holds_alternative<std::monostate>(stream_);
            make<decltype(t)>();
            try {
                std::get<S>(stream_).merge(std::get<S>(other.stream_));
            } catch (...) {
                if (fresh) stream_ = std::monostate{};
                throw;
            }
        });
    }

    std::optional<DType> dtype() const {
        const py::gil_scoped_release release;
        const std::lock_guard<Turn> lock(turn_);
        return dtype_locked();
    }
    std::optional<DType> dtype_locked() const {
        if (std::holds_alternative<StreamingSvd<float>>(stream_)) return DType::f32;
        if (std::holds_alternative<StreamingSvd<double>>(stream_)) return DType::f64;
        return std::nullopt;
    }
    py::object dtype_name() const {
        const auto d = dtype();
        if (!d) return py::none();
        return py::str(*d == DType::f32 ? "float32" : "float64");
    }

    template <class R, class F> R read(R empty, F &&f) {
        const py::gil_scoped_release release;
        const std::lock_guard<Turn> lock(turn_);
        R out = empty;
        visit_self([&](auto &s) { out = f(s); });
        return out;
    }
    std::int64_t features() {
        return read<std::int64_t>(0, [](auto &s) { return s.features(); });
    }
    std::int64_t rows_seen() {
        return read<std::int64_t>(0, [](auto &s) { return s.rows_seen(); });
    }
    std::int64_t buffered() {
        return read<std::int64_t>(0, [](auto &s) { return s.buffered(); });
    }
    static double representable(double energy) {
        if (!std::isfinite(energy)) throw ValueError("the energy overflows float64; scale the data");
        return energy;
    }
    double captured() {
        return representable(read<double>(0.0, [](auto &s) { return s.captured_energy(); }));
    }
    double residual_energy() {
        return representable(read<double>(0.0, [](auto &s) { return s.residual_energy(); }));
    }
    std::string route() {
        return read<std::string>("none", [](auto &s) { return std::string(s.last_route()); });
    }

    // Results: sizes and values are read in one turn, as other threads' updates may change both.
    py::object values() {
        return fresh([](auto &s, auto t) {
            using T = decltype(t);
            const std::int64_t k = s.rank();
            auto items = uninitialised<T>(k);
            for (std::int64_t i = 0; i < k; ++i) {
                items[std::size_t(i)] = T(s.singular_values()[i]);
                if (!std::isfinite(items[std::size_t(i)])) throw ValueError("the singular values overflow the dtype; scale the data");
            }
            return std::pair(std::move(items), std::vector<py::ssize_t>{py::ssize_t(k)});
        });
    }
    py::object components() {
        return fresh([](auto &s, auto t) {
            using T = decltype(t);
            const std::int64_t k = s.rank(), n = s.features();
            auto items = uninitialised<T>(k * n);
            std::copy_n(s.components(), k * n, items.get());
            return std::pair(std::move(items), std::vector<py::ssize_t>{py::ssize_t(k), py::ssize_t(n)});
        });
    }
    // In the dtype of the rows; None without one.
    py::object mean() {
        return fresh([](auto &s, auto t) {
            using T = decltype(t);
            const double *from = s.mean();
            const std::int64_t n = from == nullptr ? 0 : s.features();
            std::unique_ptr<T[]> items;
            if (from != nullptr) {
                items = uninitialised<T>(n);
                std::copy_n(from, n, items.get());
            }
            return std::pair(std::move(items), std::vector<py::ssize_t>{py::ssize_t(n)});
        });
    }
    // Weighted sums of squares of the columns by the sum of weights.
    py::object column_variances() {
        const py::object out = fresh([](auto &s, auto) {
            const double *from = s.column_scatter();
            if (from == nullptr) throw ValueError("column_variances: the stream was saved by a version that kept none");
            const std::int64_t n = s.features();
            auto items = uninitialised<double>(n);
            for (std::int64_t j = 0; j < n; ++j) {
                items[std::size_t(j)] = from[j] / s.weight();
                if (!std::isfinite(items[std::size_t(j)]))
                    throw ValueError("column_variances: squares of column " + std::to_string(j) + " overflow; scale the data");
            }
            return std::pair(std::move(items), std::vector<py::ssize_t>{py::ssize_t(n)});
        });
        return out;
    }
    // Of one moment: singular values in double, the energy that is not theirs, rows, and their weight.
    py::tuple energies() {
        double left = 0, weight = 0;
        std::int64_t seen = 0;
        const py::object values = fresh([&](auto &s, auto) {
            const std::int64_t k = s.rank();
            auto items = uninitialised<double>(k);
            std::copy_n(s.singular_values(), k, items.get());
            left = s.residual_energy();
            seen = s.rows_seen();
            weight = s.weight();
            return std::pair(std::move(items), std::vector<py::ssize_t>{py::ssize_t(k)});
        });
        return py::make_tuple(values.is_none() ? py::object(py::array_t<double>(0)) : values, left, seen, weight);
    }
    // Into out where one is given, else into a fresh array. A vector is one row, and gives a result without that axis.
    py::object project(const py::object &x, const py::object &out) {
        const Array a(x, "X");
        return dispatch(a.dtype(), [&](auto t) {
            using T = decltype(t);
            const auto rows = a.as_rows<const T>();
            return result<T>(
                a, out, rows.rows, a.ndim() > 1, [&](auto &s) { return s.coordinates(rows.rows); }, [&](auto &s, MatrixView<T> z) { s.project(rows, z); });
        });
    }
    py::object project_csr(const py::object &data, const py::object &indices, const py::object &indptr, std::int64_t rows, std::int64_t cols,
                           const py::object &out) {
        const Csr x(data, indices, indptr, rows, cols, "X");
        return dispatch(x.dtype(), [&](auto t) {
            using T = decltype(t);
            const auto view = x.view<T>();
            return result<T>(x, out, rows, true, [](auto &s) { return s.rank(); }, [&](auto &s, MatrixView<T> z) { s.project(view, z); });
        });
    }
    py::object reconstruct(const py::object &z, const py::object &out) {
        const Array a(z, "Z");
        return dispatch(a.dtype(), [&](auto t) {
            using T = decltype(t);
            const auto rows = a.as_rows<const T>();
            return result<T>(a, out, rows.rows, a.ndim() > 1, [](auto &s) { return s.features(); }, [&](auto &s, MatrixView<T> x) { s.reconstruct(rows, x); });
        });
    }
    py::object residual(const py::object &x, const py::object &out) {
        const Array a(x, "X");
        return dispatch(a.dtype(), [&](auto t) {
            using T = decltype(t);
            const auto rows = a.as_rows<const T>();
            return result<T>(a, out, rows.rows, a.ndim() > 1, nullptr, [&](auto &s, MatrixView<T> r) { residuals(s, rows, r); });
        });
    }
    py::object residual_csr(const py::object &data, const py::object &indices, const py::object &indptr, std::int64_t rows, std::int64_t cols,
                            const py::object &out) {
        const Csr x(data, indices, indptr, rows, cols, "X");
        return dispatch(x.dtype(), [&](auto t) {
            using T = decltype(t);
            const auto view = x.view<T>();
            return result<T>(x, out, rows, true, nullptr, [&](auto &s, MatrixView<T> r) { residuals(s, view, r); });
        });
    }

    std::unique_ptr<SvdState> copy() const {
        const py::gil_scoped_release release;
        const std::lock_guard<Turn> lock(turn_);
        auto out = std::make_unique<SvdState>(options_);
        out->stream_ = stream_;
        out->wanted_ = wanted_;
        return out;
    }
    explicit SvdState(const StreamingOptions &o) : options_(o) {}

    py::dict state() {
        py::dict d;
        d["dtype"] = py::none();
        std::variant<std::monostate, StreamingState<float>, StreamingState<double>> saved;
        {
            const py::gil_scoped_release release;
            const std::lock_guard<Turn> lock(turn_);
            visit_self([&](auto &s) { saved = s.state(); });
        }
        const auto fill = [&](auto &st, const char *dtype) {
            const auto k = py::ssize_t(st.singular_values.size());
            d["dtype"] = dtype;
            d["features"] = st.features;
            d["rows_seen"] = st.rows_seen;
            d["weight"] = st.weight;
            d["skip_gram"] = st.skip_gram;
            d["skip_moments"] = st.skip_moments;
            d["skip_again"] = st.skip_again;
            d["dropped"] = st.dropped;
            d["components"] = hand_over(std::move(st.components), {k, py::ssize_t(st.features)});
            d["low"] = hand_over(std::move(st.low), {k, py::ssize_t(st.features)});
            d["singular_values"] = hand_over(std::move(st.singular_values), {k});
            if (options_.center) {
                const auto size = py::ssize_t(st.mean.size());
                d["mean"] = hand_over(std::move(st.mean), {size});
            }
            const auto columns = py::ssize_t(st.scatter.size());
            if (columns > 0) d["scatter"] = hand_over(std::move(st.scatter), {columns});
            const auto give = [&](const char *name, std::vector<double> &x) {
                const auto size = py::ssize_t(x.size());
                if (size > 0) d[name] = hand_over(std::move(x), {size});
            };
            give("moments", st.moments);
            give("moment_sum", st.moment_sum);
            give("moment_shift", st.moment_shift);
            give("moment_reference", st.moment_reference);
            give("moment_figures", st.moment_figures);
        };
        if (auto *st = std::get_if<StreamingState<float>>(&saved)) fill(*st, "float32");
        if (auto *st = std::get_if<StreamingState<double>>(&saved)) fill(*st, "float64");
        return d;
    }
    void restore(const py::dict &d) {
        if (d["dtype"].is_none()) return;
        const Array components(d["components"], "components");
        if (d["dtype"].cast<std::string>() != components.dtype_name()) throw py::value_error("saved state: dtype does not fit the components");
        dispatch(components.dtype(), [&](auto t) {
            using T = decltype(t);
            StreamingState<T> st;
            st.features = d["features"].template cast<std::int64_t>();
            st.rows_seen = d["rows_seen"].template cast<std::int64_t>();
            st.skip_gram = d["skip_gram"].template cast<std::int64_t>();
            for (const auto &[name, to] : {std::pair{"skip_moments", &st.skip_moments}, {"skip_again", &st.skip_again}})
                if (d.contains(name) && !d[name].is_none()) *to = d[name].template cast<std::int64_t>();
            st.weight = d["weight"].template cast<double>();
            st.dropped = d["dropped"].template cast<double>();
            const auto vector = [](const py::object &o, const char *name) {
                const Array a(o, name);
                a.require_dtype(DType::f64);
                a.require_ndim(1);
                const double *p = a.vector<double>(a.shape(0));
                return std::vector<double>(p, p + a.shape(0));
            };
            st.singular_values = vector(d["singular_values"], "singular_values");
            if (d.contains("mean") && !d["mean"].is_none()) st.mean = vector(d["mean"], "mean");
            if (d.contains("scatter") && !d["scatter"].is_none()) st.scatter = vector(d["scatter"], "scatter");
            for (const auto &[name, to] : {std::pair{"moments", &st.moments},
                                           {"moment_sum", &st.moment_sum},
                                           {"moment_shift", &st.moment_shift},
                                           {"moment_reference", &st.moment_reference},
                                           {"moment_figures", &st.moment_figures}})
                if (d.contains(name) && !d[name].is_none()) *to = vector(d[name], name);
            const auto copy = [&](const Array &from, std::vector<T> &to) {
                const auto c = from.matrix<const T>();
                if (c.rows != std::int64_t(st.singular_values.size()) || c.cols != st.features)
                    throw ValueError(std::string("saved state: ") + from.name() + " do not fit singular_values and features");
                to.resize(std::size_t(c.rows * c.cols));
                for (std::int64_t i = 0; i < c.rows; ++i)
                    for (std::int64_t j = 0; j < c.cols; ++j) to[std::size_t(i * c.cols + j)] = c(i, j);
            };
            copy(components, st.components);
            if (d.contains("low") && !d["low"].is_none()) { // which earlier versions did not save
                const Array low(d["low"], "low parts");
                low.require_dtype(components.dtype());
                copy(low, st.low);
            }
            stream_ = StreamingSvd<T>(options_, st);
        });
    }

  private:
    // Without the GIL: a C++ exception that the translator makes a TypeError of.
    void require_locked(DType d, const char *what) const {
        const auto own = dtype_locked() ? dtype_locked() : wanted_;
        if (own && *own != d)
            throw WrongDType(std::string(what) + " must be " + (*own == DType::f32 ? "float32" : "float64") + " as the stream is, got " +
                             (d == DType::f32 ? "float32" : "float64"));
    }
    template <class T> void make() {
        if (std::holds_alternative<std::monostate>(stream_)) stream_ = StreamingSvd<T>(options_);
    }
    // Runs f(stream, T{}) without the GIL; a first block that fails leaves no dtype behind.
    template <class F> void with(DType d, const char *what, F &&f) {
        const py::gil_scoped_release release;
        const std::lock_guard<Turn> lock(turn_);
        require_locked(d, what);
        dispatch(d, [&](auto t) {
            using T = decltype(t);
            const bool fresh = std::holds_alternative<std::monostate>(stream_);
            make<T>();
            try {
                f(std::get<StreamingSvd<T>>(stream_), t);
            } catch (...) {
                if (fresh) stream_ = std::monostate{};
                throw;
            }
        });
    }
    // f(stream, T{}) gives items and a shape, in one turn; None before the first rows and where there are no items.
    template <class F> py::object fresh(F &&f) {
        py::object out = py::none();
        const auto run = [&](auto &s, auto t) {
            auto [items, shape] = f(s, t);
            const py::gil_scoped_acquire gil;
            if (items) out = hand_over(std::move(items), std::move(shape));
        };
        const py::gil_scoped_release release;
        const std::lock_guard<Turn> lock(turn_);
        if (auto *s = std::get_if<StreamingSvd<float>>(&stream_)) run(*s, float{});
        if (auto *s = std::get_if<StreamingSvd<double>>(&stream_)) run(*s, double{});
        return out;
    }
    template <class S, class X, class T> static void residuals(S &s, const X &x, MatrixView<T> out) {
        if (out.row_stride == 1 || out.rows <= 1) return s.residual(x, out.data);
        auto items = uninitialised<T>(out.rows);
        s.residual(x, items.get());
        for (std::int64_t i = 0; i < out.rows; ++i) out(i, 0) = items[std::size_t(i)];
    }
    static void check_no_overlap_with(const Array &input, const Array &out) { check_no_overlap(out, input); }
    static void check_no_overlap_with(const Csr &input, const Array &out) { input.check_no_overlap_with(out); }
    // NaN and infinity go through; those that finite input gave are an error.
    template <class T, class X> static void require_no_overflow(MatrixView<const T> out, const X &input) {
        if (subspan::all_finite<T>(StackView<const T>(out))) return;
        if constexpr (std::is_same_v<X, Csr>) {
            if (!input.all_finite()) return;
        } else {
            if (!subspan::all_finite<T>(StackView<const T>(input.template as_rows<const T>()))) return;
        }
        throw ValueError("the result overflows the dtype although X is finite; scale the data");
    }
    // Rows of width(stream) items, or (width null) one item each, written by f(stream, view).
    template <class T, class X, class W, class F> py::object result(const X &input, const py::object &out, std::int64_t rows, bool stacked, W &&width, F &&f) {
        constexpr bool wide = !std::is_same_v<std::decay_t<W>, std::nullptr_t>;
        std::optional<Array> target;
        if (!out.is_none()) {
            target.emplace(out, "out", true);
            target->require_dtype(input.dtype());
            check_no_overlap_with(input, *target);
        }
        std::unique_ptr<T[]> items;
        std::vector<py::ssize_t> shape;
        {
            const py::gil_scoped_release release;
            const std::lock_guard<Turn> lock(turn_);
            if (!dtype_locked()) throw ValueError("the stream has seen no rows");
            require_locked(input.dtype(), "X");
            auto &s = std::get<StreamingSvd<T>>(stream_);
            std::int64_t columns = 1;
            if constexpr (wide) columns = width(s);
            std::vector<std::int64_t> want;
            if (stacked) want.push_back(rows);
            if (wide) want.push_back(columns);
            if (!target) {
                items = uninitialised<T>(rows * columns);
                const MatrixView<T> view(items.get(), rows, columns);
                f(s, view);
                require_no_overflow(MatrixView<const T>(view), input);
                shape.assign(want.begin(), want.end());
            } else {
                if (target->leading(0) != want) throw ValueError("out must have shape " + shape_text(want) + ", got " + target->shape_text());
                MatrixView<T> view(static_cast<T *>(const_cast<void *>(target->data())), rows, columns);
                const int last = target->ndim() - 1;
                if (wide) view.col_stride = target->stride(last);
                if (stacked) view.row_stride = target->stride(0);
                f(s, view);
                require_no_overflow(MatrixView<const T>(view), input);
            }
        }
        if (target) {
            target->written();
            return out;
        }
        return hand_over(std::move(items), std::move(shape));
    }
    template <class F> void visit_self(F &&f) {
        if (auto *s = std::get_if<StreamingSvd<float>>(&stream_)) f(*s);
        if (auto *s = std::get_if<StreamingSvd<double>>(&stream_)) f(*s);
    }

    StreamingOptions options_;
    std::optional<DType> wanted_;
    std::variant<std::monostate, StreamingSvd<float>, StreamingSvd<double>> stream_;
    mutable Turn turn_;
};

} // namespace

void register_streaming(py::module_ &m) {
    py::class_<SvdState>(m, "SvdState")
        .def(py::init<const py::object &, std::int64_t, double, bool, double, const std::string &, std::int64_t, bool, bool, const py::object &>(),
             py::arg("place"), py::arg("rank"), py::arg("forget"), py::arg("center"), py::arg("energy"), py::arg("method"), py::arg("oversample"),
             py::arg("exact_blocks"), py::arg("canonical_signs"), py::arg("dtype"))
        .def("update", &SvdState::update, py::arg("rows"))
        .def("update_csr", &SvdState::update_csr, py::arg("data"), py::arg("indices"), py::arg("indptr"), py::arg("rows"), py::arg("cols"))
        .def("update_with_rotation", &SvdState::update_with_rotation, py::arg("rows"))
        .def("downdate", &SvdState::downdate, py::arg("rows"))
        .def("merge", &SvdState::merge, py::arg("other"))
        .def("dtype", &SvdState::dtype_name)
        .def("features", &SvdState::features)
        .def("rows_seen", &SvdState::rows_seen)
        .def("buffered", &SvdState::buffered)
        .def("captured_energy", &SvdState::captured)
        .def("residual_energy", &SvdState::residual_energy)
        .def("route", &SvdState::route)
        .def("values", &SvdState::values)
        .def("components", &SvdState::components)
        .def("mean", &SvdState::mean)
        .def("energies", &SvdState::energies)
        .def("column_variances", &SvdState::column_variances)
        .def("project", &SvdState::project, py::arg("x"), py::arg("out"))
        .def("project_csr", &SvdState::project_csr, py::arg("data"), py::arg("indices"), py::arg("indptr"), py::arg("rows"), py::arg("cols"), py::arg("out"))
        .def("reconstruct", &SvdState::reconstruct, py::arg("z"), py::arg("out"))
        .def("residual", &SvdState::residual, py::arg("x"), py::arg("out"))
        .def("residual_csr", &SvdState::residual_csr, py::arg("data"), py::arg("indices"), py::arg("indptr"), py::arg("rows"), py::arg("cols"), py::arg("out"))
        .def("copy", &SvdState::copy)
        .def("state", &SvdState::state)
        .def("restore", &SvdState::restore, py::arg("state"));
}

} // namespace subspan::bind
