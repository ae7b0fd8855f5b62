#include "subspan/frequent_directions.hpp"

#include "convert.hpp"
#include "lapack_capsules.hpp"
#include "register.hpp"
#include "subspan/errors.hpp"

namespace subspan::bind {
namespace {

// One class per dtype; Python makes the right one at the first rows.
template <class T> class Sketch {
  public:
    Sketch(std::int64_t size, std::int64_t features) : fd_((load_lapack(), size), features) {}

    void update(const py::object &rows) {
        const Array a(rows, "rows");
        a.require_dtype(own());
        const auto view = a.as_rows<const T>();
        run([&] { fd_.update(view); });
    }
    void update_csr(const py::object &data, const py::object &indices, const py::object &indptr, std::int64_t rows,
                    std::int64_t cols) {
        const Csr x(data, indices, indptr, rows, cols, "rows");
        if (x.dtype() != own()) throw py::type_error("rows must have the dtype of the sketch");
        const auto view = x.view<T>();
        run([&] { fd_.update(view); });
    }
    void merge(Sketch &other) {
        if (&other == this) {
            run([&] { fd_.merge(FrequentDirections<T>(fd_)); });
            return;
        }
        const py::gil_scoped_release release;
        const std::scoped_lock lock(turn_, other.turn_);
        fd_.merge(other.fd_);
    }
    void sketch_into(const py::object &out) {
        const Array a(out, "out", true);
        a.require_dtype(own());
        const auto view = a.matrix<T>();
        run([&] { fd_.sketch(view); });
    }
    py::tuple numbers() {
        std::int64_t seen = 0;
        double bound = 0, norm = 0;
        run([&] {
            seen = fd_.rows_seen();
            bound = fd_.error_bound();
            norm = fd_.squared_norm();
        });
        return py::make_tuple(fd_.size(), fd_.features(), seen, bound, norm);
    }
    // The bound of the sketch as reading shows it.
    double error_bound() {
        double bound = 0;
        run([&] {
            fd_.settle();
            bound = fd_.error_bound();
        });
        return bound;
    }
    // All of it in one turn: (buffer, low, rows seen, bound, squared norm).
    py::tuple saved() {
        std::vector<double> v, low;
        std::int64_t seen = 0;
        double bound = 0, norm = 0;
        run([&] {
            v.assign(fd_.buffer(), fd_.buffer() + fd_.used() * fd_.features());
            low.assign(fd_.low(), fd_.low() + fd_.used() * fd_.features());
            seen = fd_.rows_seen();
            bound = fd_.error_bound();
            norm = fd_.squared_norm();
        });
        const auto rows = py::ssize_t(std::int64_t(v.size()) / fd_.features()), cols = py::ssize_t(fd_.features());
        return py::make_tuple(hand_over(std::move(v), {rows, cols}), hand_over(std::move(low), {rows, cols}), seen, bound, norm);
    }
    void restore(const py::object &buffer, const py::object &low, double bound, double norm, std::int64_t seen) {
        const Array a(buffer, "buffer"), rest(low, "low");
        a.require_dtype(DType::f64);
        rest.require_dtype(DType::f64);
        const auto v = a.matrix<const double>(), w = rest.matrix<const double>();
        if (v.cols != fd_.features()) throw ValueError("saved sketch: the buffer has the wrong number of columns");
        if (v.rows > 2 * fd_.size()) throw ValueError("saved sketch: the buffer has more rows than twice the size");
        if (w.rows != v.rows || w.cols != v.cols) throw ValueError("saved sketch: low does not have the shape of the buffer");
        std::vector<double> rows(std::size_t(v.rows * v.cols)), left(rows.size());
        for (std::int64_t i = 0; i < v.rows; ++i)
            for (std::int64_t j = 0; j < v.cols; ++j) {
                rows[std::size_t(i * v.cols + j)] = v(i, j);
                left[std::size_t(i * v.cols + j)] = w(i, j);
            }
        run([&] { fd_.restore(v.rows, rows.data(), left.data(), bound, norm, seen); });
    }

  private:
    static DType own() { return std::is_same_v<T, float> ? DType::f32 : DType::f64; }
    template <class F> void run(F &&f) {
        const py::gil_scoped_release release;
        const std::lock_guard<Turn> lock(turn_);
        f();
    }
    FrequentDirections<T> fd_;
    Turn turn_;
};

template <class T> void bind_sketch(py::module_ &m, const char *name) {
    py::class_<Sketch<T>>(m, name)
        .def(py::init<std::int64_t, std::int64_t>(), py::arg("size"), py::arg("features"))
        .def("update", &Sketch<T>::update, py::arg("rows"))
        .def("update_csr", &Sketch<T>::update_csr, py::arg("data"), py::arg("indices"), py::arg("indptr"), py::arg("rows"),
             py::arg("cols"))
        .def("merge", &Sketch<T>::merge, py::arg("other"))
        .def("sketch_into", &Sketch<T>::sketch_into, py::arg("out"))
        .def("numbers", &Sketch<T>::numbers)
        .def("error_bound", &Sketch<T>::error_bound)
        .def("saved", &Sketch<T>::saved)
        .def("restore", &Sketch<T>::restore, py::arg("buffer"), py::arg("low"), py::arg("bound"), py::arg("norm"), py::arg("seen"));
}

} // namespace

void register_frequent_directions(py::module_ &m) {
    bind_sketch<float>(m, "SketchF32");
    bind_sketch<double>(m, "SketchF64");
}

} // namespace subspan::bind
