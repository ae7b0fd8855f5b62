#include "convert.hpp"
#include "lapack_capsules.hpp"
#include "register.hpp"
#include "subspan/errors.hpp"
#include "subspan/streaming_svd.hpp"

#include <mutex>
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
class Stream {
  public:
    Stream(std::int64_t rank, double forget, bool center, double energy, const std::string &method, std::int64_t oversample,
           bool exact_blocks) {
        load_lapack();
        options_ = {rank, forget, center, energy, oversample, method_of(method), exact_blocks};
        StreamingSvd<float>{options_}; // checks the options
    }

    void update(const py::object &rows) {
        const Array a(rows, "rows");
        a.require_ndim(2);
        with(a.dtype(), "rows", [&](auto &s, auto t) { s.update(a.matrix<const decltype(t)>()); });
    }
    void update_csr(const py::object &data, const py::object &indices, const py::object &indptr, std::int64_t rows,
                    std::int64_t cols) {
        const Csr x(data, indices, indptr, rows, cols, "rows");
        with(x.dtype(), "rows", [&](auto &s, auto t) {
            const auto view = x.view<decltype(t)>();
            s.update(view);
        });
    }
    void downdate(const py::object &rows) {
        const Array a(rows, "rows");
        a.require_ndim(2);
        with(a.dtype(), "rows", [&](auto &s, auto t) { s.downdate(a.matrix<const decltype(t)>()); });
    }
    void merge(Stream &other) {
        const py::gil_scoped_release release;
        if (&other == this) {
            const std::lock_guard<std::mutex> lock(mutex_);
            visit_self([&](auto &s) { s.merge(s); });
            return;
        }
        const std::scoped_lock lock(mutex_, other.mutex_);
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
        const std::lock_guard<std::mutex> lock(mutex_);
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
        const std::lock_guard<std::mutex> lock(mutex_);
        R out = empty;
        visit_self([&](auto &s) { out = f(s); });
        return out;
    }
    std::int64_t features() { return read<std::int64_t>(0, [](auto &s) { return s.features(); }); }
    std::int64_t rows_seen() { return read<std::int64_t>(0, [](auto &s) { return s.rows_seen(); }); }
    std::int64_t buffered() { return read<std::int64_t>(0, [](auto &s) { return s.buffered(); }); }
    std::int64_t current_rank() { return read<std::int64_t>(0, [](auto &s) { return s.rank(); }); }
    double weight() { return read<double>(0.0, [](auto &s) { return s.weight(); }); }
    double captured() { return read<double>(0.0, [](auto &s) { return s.captured_energy(); }); }
    double residual_energy() { return read<double>(0.0, [](auto &s) { return s.residual_energy(); }); }
    std::string route() { return read<std::string>("none", [](auto &s) { return std::string(s.last_route()); }); }

    // Copies into arrays that the caller has made.
    void values_into(const py::object &out) {
        const Array a(out, "out", true);
        with_existing(a.dtype(), "out", [&](auto &s, auto t) {
            const double *from = s.singular_values();
            auto *to = a.vector<decltype(t)>(s.rank());
            for (std::int64_t i = 0; i < s.rank(); ++i) to[i] = decltype(t)(from[i]);
        });
    }
    void components_into(const py::object &out) {
        const Array a(out, "out", true);
        with_existing(a.dtype(), "out", [&](auto &s, auto t) {
            const auto to = a.matrix<decltype(t)>();
            const auto *from = s.components();
            if (to.rows != s.rank() || to.cols != s.features()) throw ValueError("out has the wrong shape");
            for (std::int64_t i = 0; i < to.rows; ++i)
                for (std::int64_t j = 0; j < to.cols; ++j) to(i, j) = from[i * to.cols + j];
        });
    }
    bool mean_into(const py::object &out) {
        const Array a(out, "out", true);
        bool any = false;
        with_existing(a.dtype(), "out", [&](auto &s, auto t) {
            const double *from = s.mean();
            if (from == nullptr) return;
            any = true;
            auto *to = a.vector<decltype(t)>(s.features());
            for (std::int64_t i = 0; i < s.features(); ++i) to[i] = decltype(t)(from[i]);
        });
        return any;
    }
    void project(const py::object &x, const py::object &out) {
        const Array a(x, "X"), z(out, "out", true);
        z.require_dtype(a.dtype());
        with_existing(a.dtype(), "X", [&](auto &s, auto t) {
            s.project(a.matrix<const decltype(t)>(), z.matrix<decltype(t)>());
        });
    }
    void project_csr(const py::object &data, const py::object &indices, const py::object &indptr, std::int64_t rows,
                     std::int64_t cols, const py::object &out) {
        const Csr x(data, indices, indptr, rows, cols, "X");
        const Array z(out, "out", true);
        z.require_dtype(x.dtype());
        with_existing(x.dtype(), "X", [&](auto &s, auto t) {
            const auto view = x.view<decltype(t)>();
            s.project(view, z.matrix<decltype(t)>());
        });
    }
    void reconstruct(const py::object &z, const py::object &out) {
        const Array a(z, "Z"), x(out, "out", true);
        x.require_dtype(a.dtype());
        with_existing(a.dtype(), "Z", [&](auto &s, auto t) {
            s.reconstruct(a.matrix<const decltype(t)>(), x.matrix<decltype(t)>());
        });
    }
    void residual(const py::object &x, const py::object &out) {
        const Array a(x, "X"), r(out, "out", true);
        r.require_dtype(a.dtype());
        a.require_ndim(2);
        with_existing(a.dtype(), "X", [&](auto &s, auto t) {
            s.residual(a.matrix<const decltype(t)>(), r.vector<decltype(t)>(a.shape(0)));
        });
    }

    py::dict state() {
        py::dict d;
        const auto type = dtype();
        d["dtype"] = dtype_name();
        if (!type) return d;
        dispatch(*type, [&](auto t) {
            using T = decltype(t);
            StreamingState<T> st;
            {
                const py::gil_scoped_release release;
                const std::lock_guard<std::mutex> lock(mutex_);
                st = std::get<StreamingSvd<T>>(stream_).state();
            }
            const auto k = py::ssize_t(st.singular_values.size());
            d["features"] = st.features;
            d["rows_seen"] = st.rows_seen;
            d["weight"] = st.weight;
            d["skip_gram"] = st.skip_gram;
            d["dropped"] = st.dropped;
            d["components"] = hand_over(std::move(st.components), {k, py::ssize_t(st.features)});
            d["low"] = hand_over(std::move(st.low), {k, py::ssize_t(st.features)});
            d["singular_values"] = hand_over(std::move(st.singular_values), {k});
            if (options_.center) {
                const auto size = py::ssize_t(st.mean.size());
                d["mean"] = hand_over(std::move(st.mean), {size});
            }
        });
        return d;
    }
    void restore(const py::dict &d) {
        if (d["dtype"].is_none()) return;
        const Array components(d["components"], "components");
        if (d["dtype"].cast<std::string>() != components.dtype_name())
            throw py::value_error("saved state: dtype does not fit the components");
        dispatch(components.dtype(), [&](auto t) {
            using T = decltype(t);
            StreamingState<T> st;
            st.features = d["features"].template cast<std::int64_t>();
            st.rows_seen = d["rows_seen"].template cast<std::int64_t>();
            st.skip_gram = d["skip_gram"].template cast<std::int64_t>();
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
            if (d.contains("mean")) st.mean = vector(d["mean"], "mean");
            const auto copy = [&](const Array &from, std::vector<T> &to) {
                const auto c = from.matrix<const T>();
                if (c.rows != std::int64_t(st.singular_values.size()) || c.cols != st.features)
                    throw ValueError(std::string("saved state: ") + from.name() + " do not fit singular_values and features");
                to.resize(std::size_t(c.rows * c.cols));
                for (std::int64_t i = 0; i < c.rows; ++i)
                    for (std::int64_t j = 0; j < c.cols; ++j) to[std::size_t(i * c.cols + j)] = c(i, j);
            };
            copy(components, st.components);
            if (d.contains("low")) { // which earlier versions did not save
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
        const auto own = dtype_locked();
        if (own && *own != d)
            throw WrongDType(std::string(what) + " must be " + (*own == DType::f32 ? "float32" : "float64") +
                                 " as the stream is, got " + (d == DType::f32 ? "float32" : "float64"));
    }
    template <class T> void make() {
        if (std::holds_alternative<std::monostate>(stream_)) stream_ = StreamingSvd<T>(options_);
    }
    // Runs f(stream, T{}) without the GIL; a first block that fails leaves no dtype behind.
    template <class F> void with(DType d, const char *what, F &&f) {
        const py::gil_scoped_release release;
        const std::lock_guard<std::mutex> lock(mutex_);
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
    template <class F> void with_existing(DType d, const char *what, F &&f) {
        if (!dtype()) throw py::value_error("the stream has seen no rows");
        with(d, what, std::forward<F>(f));
    }
    template <class F> void visit_self(F &&f) {
        if (auto *s = std::get_if<StreamingSvd<float>>(&stream_)) f(*s);
        if (auto *s = std::get_if<StreamingSvd<double>>(&stream_)) f(*s);
    }

    StreamingOptions options_;
    std::variant<std::monostate, StreamingSvd<float>, StreamingSvd<double>> stream_;
    mutable std::mutex mutex_;
};

} // namespace

void register_streaming(py::module_ &m) {
    py::class_<Stream>(m, "Stream")
        .def(py::init<std::int64_t, double, bool, double, const std::string &, std::int64_t, bool>(), py::arg("rank"),
             py::arg("forget"), py::arg("center"), py::arg("energy"), py::arg("method"), py::arg("oversample"),
             py::arg("exact_blocks"))
        .def("update", &Stream::update, py::arg("rows"))
        .def("update_csr", &Stream::update_csr, py::arg("data"), py::arg("indices"), py::arg("indptr"), py::arg("rows"),
             py::arg("cols"))
        .def("downdate", &Stream::downdate, py::arg("rows"))
        .def("merge", &Stream::merge, py::arg("other"))
        .def("dtype", &Stream::dtype_name)
        .def("features", &Stream::features)
        .def("rows_seen", &Stream::rows_seen)
        .def("buffered", &Stream::buffered)
        .def("current_rank", &Stream::current_rank)
        .def("weight", &Stream::weight)
        .def("captured_energy", &Stream::captured)
        .def("residual_energy", &Stream::residual_energy)
        .def("route", &Stream::route)
        .def("values_into", &Stream::values_into, py::arg("out"))
        .def("components_into", &Stream::components_into, py::arg("out"))
        .def("mean_into", &Stream::mean_into, py::arg("out"))
        .def("project", &Stream::project, py::arg("x"), py::arg("out"))
        .def("project_csr", &Stream::project_csr, py::arg("data"), py::arg("indices"), py::arg("indptr"), py::arg("rows"),
             py::arg("cols"), py::arg("out"))
        .def("reconstruct", &Stream::reconstruct, py::arg("z"), py::arg("out"))
        .def("residual", &Stream::residual, py::arg("x"), py::arg("out"))
        .def("state", &Stream::state)
        .def("restore", &Stream::restore, py::arg("state"));
}

} // namespace subspan::bind
