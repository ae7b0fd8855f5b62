#include "subspan/frequent_directions.hpp"

#include "convert.hpp"
#include "lapack_capsules.hpp"
#include "register.hpp"
#include "subspan/errors.hpp"

#include <memory>
#include <variant>

namespace subspan::bind {
namespace {

// The sketch of one dtype, made by the first rows, behind a lock: objects may be shared between threads.
class Sketch {
  public:
    Sketch(std::int64_t size, std::int64_t features) : size_((load_lapack(), size)), features_(features) {}

    void update(const py::object &rows) {
        const Array a(rows, "rows");
        with(a.dtype(), [&](auto &s, auto t) { s.update(a.as_rows<const decltype(t)>()); });
    }
    void update_csr(const py::object &data, const py::object &indices, const py::object &indptr, std::int64_t rows, std::int64_t cols) {
        const Csr x(data, indices, indptr, rows, cols, "rows");
        with(x.dtype(), [&](auto &s, auto t) { s.update(x.view<decltype(t)>()); });
    }
    std::unique_ptr<Sketch> copy() {
        auto twin = std::make_unique<Sketch>(size_, features_);
        run([&] { twin->fd_ = fd_; });
        return twin;
    }
    // A merge into a fresh sketch that fails leaves no dtype behind.
    void merge(Sketch &other) {
        const py::gil_scoped_release release;
        const auto add = [&](auto &theirs) {
            using S = std::decay_t<decltype(theirs)>;
            const bool fresh = std::holds_alternative<std::monostate>(fd_);
            if (fresh) fd_.template emplace<S>(size_, features_);
            if (!std::holds_alternative<S>(fd_)) throw WrongDType(std::string("other must be ") + own() + " as the sketch is");
            try {
                std::get<S>(fd_).merge(&other == this ? S(theirs) : theirs);
            } catch (...) {
                if (fresh) fd_ = std::monostate{};
                throw;
            }
        };
        std::unique_lock<Turn> mine(turn_, std::defer_lock), yours(other.turn_, std::defer_lock);
        if (&other == this)
            mine.lock();
        else
            std::lock(mine, yours);
        if (auto *s = std::get_if<FrequentDirections<float>>(&other.fd_)) add(*s);
        if (auto *s = std::get_if<FrequentDirections<double>>(&other.fd_)) add(*s);
    }
    // None before the first rows.
    py::object dtype() {
        std::size_t kind = 0;
        run([&] { kind = fd_.index(); });
        return kind == 0 ? py::object(py::none()) : py::object(py::str(kind == 1 ? "float32" : "float64"));
    }
    py::object sketch() {
        py::object out = py::none();
        const auto show = [&](auto &s, auto t) {
            using T = decltype(t);
            auto items = uninitialised<T>(size_ * features_);
            s.sketch(MatrixView<T>(items.get(), size_, features_));
            const py::gil_scoped_acquire gil;
            out = hand_over(std::move(items), {py::ssize_t(size_), py::ssize_t(features_)});
        };
        run([&] { visit(show); });
        return out;
    }
    std::int64_t rows_seen() {
        std::int64_t seen = 0;
        run([&] { visit([&](auto &s, auto) { seen = s.rows_seen(); }); });
        return seen;
    }
    double squared_norm() {
        double norm = 0;
        run([&] { visit([&](auto &s, auto) { norm = s.squared_norm(); }); });
        return norm;
    }
    // The bound of the sketch as reading shows it.
    double error_bound() {
        double bound = 0;
        run([&] {
            visit([&](auto &s, auto) {
                s.settle();
                bound = s.error_bound();
            });
        });
        return bound;
    }
    // All of it in one turn; empty before the first rows.
    py::dict state() {
        std::vector<double> v, low;
        std::int64_t seen = 0;
        double bound = 0, norm = 0;
        std::size_t kind = 0;
        run([&] {
            kind = fd_.index();
            visit([&](auto &s, auto) {
                v.assign(s.buffer(), s.buffer() + s.used() * features_);
                low.assign(s.low(), s.low() + s.used() * features_);
                seen = s.rows_seen();
                bound = s.error_bound();
                norm = s.squared_norm();
            });
        });
        py::dict d;
        if (kind == 0) return d;
        const auto rows = py::ssize_t(std::int64_t(v.size()) / features_), cols = py::ssize_t(features_);
        d["buffer"] = hand_over(std::move(v), {rows, cols});
        d["low"] = hand_over(std::move(low), {rows, cols});
        d["seen"] = seen, d["bound"] = bound, d["norm"] = norm, d["dtype"] = kind == 1 ? "float32" : "float64";
        return d;
    }
    void restore(const py::object &buffer, const py::object &low, double bound, double norm, std::int64_t seen, const std::string &dtype) {
        const Array a(buffer, "buffer"), rest(low, "low");
        a.require_dtype(DType::f64);
        rest.require_dtype(DType::f64);
        const auto v = a.matrix<const double>(), w = rest.matrix<const double>();
        if (v.cols != features_) throw ValueError("saved sketch: the buffer has the wrong number of columns");
        if (v.rows > 2 * size_) throw ValueError("saved sketch: the buffer has more rows than twice the size");
        if (w.rows != v.rows || w.cols != v.cols) throw ValueError("saved sketch: low does not have the shape of the buffer");
        std::vector<double> rows(std::size_t(v.rows * v.cols)), left(rows.size());
        for (std::int64_t i = 0; i < v.rows; ++i)
            for (std::int64_t j = 0; j < v.cols; ++j) {
                rows[std::size_t(i * v.cols + j)] = v(i, j);
                left[std::size_t(i * v.cols + j)] = w(i, j);
            }
        with(dtype == "float32" ? DType::f32 : DType::f64, [&](auto &s, auto) { s.restore(v.rows, rows.data(), left.data(), bound, norm, seen); });
    }

  private:
    const char *own() const { return std::holds_alternative<FrequentDirections<float>>(fd_) ? "float32" : "float64"; }
    template <class F> void run(F &&f) {
        const py::gil_scoped_release release;
        const std::lock_guard<Turn> lock(turn_);
        f();
    }
    template <class F> void visit(const F &f) {
        if (auto *s = std::get_if<FrequentDirections<float>>(&fd_)) f(*s, float{});
        if (auto *s = std::get_if<FrequentDirections<double>>(&fd_)) f(*s, double{});
    }
    // f(sketch, T{}); first rows that fail leave no dtype behind.
    template <class F> void with(DType d, const F &f) {
        run([&] {
            dispatch(d, [&](auto t) {
                using S = FrequentDirections<decltype(t)>;
                const bool fresh = std::holds_alternative<std::monostate>(fd_);
                if (fresh) fd_.template emplace<S>(size_, features_);
                if (!std::holds_alternative<S>(fd_)) throw WrongDType(std::string("rows must be ") + own() + " as the sketch is, got " + name_of(d));
                try {
                    f(std::get<S>(fd_), t);
                } catch (...) {
                    if (fresh) fd_ = std::monostate{};
                    throw;
                }
            });
        });
    }
    std::int64_t size_, features_;
    std::variant<std::monostate, FrequentDirections<float>, FrequentDirections<double>> fd_;
    Turn turn_;
};

} // namespace

void register_frequent_directions(py::module_ &m) {
    py::class_<Sketch>(m, "Sketch")
        .def(py::init<std::int64_t, std::int64_t>(), py::arg("size"), py::arg("features"))
        .def("update", &Sketch::update, py::arg("rows"))
        .def("update_csr", &Sketch::update_csr, py::arg("data"), py::arg("indices"), py::arg("indptr"), py::arg("rows"), py::arg("cols"))
        .def("merge", &Sketch::merge, py::arg("other"))
        .def("copy", &Sketch::copy)
        .def("dtype", &Sketch::dtype)
        .def("sketch", &Sketch::sketch)
        .def("rows_seen", &Sketch::rows_seen)
        .def("squared_norm", &Sketch::squared_norm)
        .def("error_bound", &Sketch::error_bound)
        .def("state", &Sketch::state)
        .def("restore", &Sketch::restore, py::arg("buffer"), py::arg("low"), py::arg("bound"), py::arg("norm"), py::arg("seen"), py::arg("dtype"));
}

} // namespace subspan::bind
