#include "convert.hpp"
#include "lapack_capsules.hpp"
#include "register.hpp"
#include "scalars.hpp"
#include "subspan/errors.hpp"
#include "subspan/isa.hpp"
#include "subspan/parallel.hpp"
#include "turn.hpp"

#include <pybind11/stl.h>

namespace subspan::bind {
namespace {

unsigned long main_thread = 0;

} // namespace

void register_runtime(py::module_ &m) {
    py::register_exception_translator([](std::exception_ptr p) {
        try {
            if (p) std::rethrow_exception(p);
        } catch (const WrongDType &e) {
            PyErr_SetString(PyExc_TypeError, e.what());
        } catch (const ValueError &e) {
            PyErr_SetString(PyExc_ValueError, e.what());
        } catch (const LinAlgError &e) {
            py::set_error(py::module_::import("numpy.linalg").attr("LinAlgError"), e.what());
        } catch (const BackendError &e) {
            PyErr_SetString(PyExc_ImportError, e.what());
        } catch (const Interrupted &) {
            PyErr_SetNone(PyExc_KeyboardInterrupt);
        }
    });
    // Long calls hear signals, in the thread that Python runs their handlers in.
    main_thread = py::cast<unsigned long>(py::module_::import("threading").attr("main_thread")().attr("ident"));
    set_interrupt_hook([] {
        if (PyThread_get_thread_ident() != main_thread) return;
        const py::gil_scoped_acquire gil;
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    });
    m.def("poll", &poll); // for tests
    py::class_<Turn>(m, "Turn", "A lock for one call at a time; the same thread, out of a signal handler, gets a RuntimeError instead of a deadlock.")
        .def(py::init<>())
        .def("__enter__", &Turn::lock_with_gil)
        .def("__exit__", [](Turn &turn, const py::args &) { turn.unlock(); });
    m.def(
        "check_compressed",
        [](const py::array &indptr, const py::array &indices, std::int64_t major, std::int64_t minor, std::int64_t stored, const std::string &name) {
            const auto flat = [&](const py::array &a, const char *what) {
                if (a.ndim() != 1 || a.dtype().kind() != 'i' || (a.itemsize() != 4 && a.itemsize() != 8) || (a.size() > 1 && a.strides(0) != a.itemsize()))
                    throw ValueError(name + ": " + what + " must be a contiguous vector of int32 or int64");
            };
            flat(indptr, "indptr");
            flat(indices, "indices");
            if (indptr.itemsize() != indices.itemsize()) throw ValueError(name + ": indptr and indices must have one dtype");
            if (major < 0 || indptr.size() != major + 1)
                throw ValueError(name + ": indptr must have " + std::to_string(major + 1) + " entries, got " + std::to_string(indptr.size()));
            stored = std::min<std::int64_t>(stored, indices.size());
            const void *p = indptr.data(), *q = indices.data();
            const bool wide = indptr.itemsize() == 8;
            const py::gil_scoped_release release;
            if (wide) return check_compressed(static_cast<const std::int64_t *>(p), static_cast<const std::int64_t *>(q), major, minor, stored, name);
            return check_compressed(static_cast<const std::int32_t *>(p), static_cast<const std::int32_t *>(q), major, minor, stored, name);
        },
        py::arg("indptr"), py::arg("indices"), py::arg("major"), py::arg("minor"), py::arg("stored"), py::arg("name"));
    m.def(
        "whole_number",
        [](const py::object &value, const std::string &name, std::int64_t least, std::int64_t most) {
            return bind::whole_number(value, name.c_str(), least, most);
        },
        "An integer of a user's, of Python or NumPy; no bool, no float that happens to be whole.", py::arg("value"), py::arg("name"), py::arg("least"),
        py::arg("most") = std::int64_t(1) << 62);
    m.def(
        "real_number", [](const py::object &value, const std::string &name, double least) { return real(value, name.c_str(), least); },
        "A finite number of a user's: no text, no bool, no part of a complex one, no tensor that autograd follows.", py::arg("value"), py::arg("name"),
        py::arg("least") = std::numeric_limits<double>::lowest());
    m.def(
        "share", [](const py::object &value, const std::string &name) { return bind::share(value, name.c_str()); }, "A number between 0 and 1.",
        py::arg("value"), py::arg("name"));
    m.def(
        "truth", [](const py::object &value, const std::string &name) { return bind::truth(value, name.c_str()); },
        "A bool of a user's. Text, numbers and arrays are mistakes.", py::arg("value"), py::arg("name"));
    m.def(
        "choice",
        [](const py::object &value, const std::string &name, const py::args &allowed) {
            const auto names = allowed.cast<std::vector<std::string>>();
            return names[std::size_t(bind::choice(value, name.c_str(), names))];
        },
        "One of these texts.", py::arg("value"), py::arg("name"));
    m.def("convolution_hint", &convolution_hint, py::arg("shape"), py::arg("name"));
    m.def("isa", [] { return std::string(isa_name(isa())); });
    m.def("isa_available", [] { return std::string(isa_name(isa_available())); });
    m.def("num_threads", &num_threads);
    m.def("set_num_threads", &set_num_threads, py::arg("n"));
    m.def("work_memory_peak", &work_memory_peak);
    m.def("reset_work_memory_peak", &reset_work_memory_peak);
    m.def("load_lapack", &load_lapack);
    m.def("build_info", [] {
        py::dict d;
#if defined(__clang__)
        d["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
        d["compiler"] = "gcc " __VERSION__;
#elif defined(_MSC_VER)
        d["compiler"] = "msvc " + std::to_string(_MSC_VER);
#endif
#if defined(SUBSPAN_ONE_ISA) || !defined(__x86_64__) || !(defined(__GNUC__) || defined(__clang__))
        d["multi_isa"] = false;
#else
        d["multi_isa"] = true;
#endif
        const Processor &p = processor();
        d["vector"] = p.vector;
        d["caches"] = py::make_tuple(p.first, p.second);
        return d;
    });
    // An output for what is worked out elsewhere: that it can take a result of this shape and of the dtype of x, before the work, and the
    // result itself.
    m.def(
        "check_output",
        [](const py::object &out, const Shape &shape, const py::object &x, const std::string &name) {
            const Array to(out, "out", true), from(x, name.c_str());
            to.require_dtype(from.dtype());
            to.require_shape(shape);
            check_no_overlap(to, from);
        },
        py::arg("out"), py::arg("shape"), py::arg("x"), py::arg("name"));
    m.def(
        "write_output",
        [](const py::object &out, const py::object &result) {
            const Array to(out, "out", true), from(result, "the result");
            from.require_dtype_of(to);
            from.require_shape(to.shape());
            dispatch(to.dtype(), [&](auto t) {
                using T = decltype(t);
                const auto copy = [](const StackView<const T> &a, const StackView<T> &b) {
                    for (std::int64_t i = 0; i < b.size(); ++i)
                        for (std::int64_t r = 0; r < b.rows(); ++r)
                            for (std::int64_t c = 0; c < b.cols(); ++c) b[i](r, c) = a[i](r, c);
                };
                if (to.ndim() == 0)
                    *static_cast<T *>(to.data()) = *static_cast<const T *>(from.data());
                else
                    copy(from.row_stack<const T>(from.leading(1)), to.row_stack<T>(to.leading(1)));
            });
            to.written();
            return out;
        },
        py::arg("out"), py::arg("result"));
    // What the glue makes of an array; for tests and bug reports.
    m.def(
        "inspect_array",
        [](const py::object &x, bool writable) -> py::tuple {
            const Array a(x, "x", writable);
            py::tuple shape(a.ndim());
            for (int i = 0; i < a.ndim(); ++i) shape[std::size_t(i)] = a.shape(i);
            const std::int64_t none = 0;
            if (a.ndim() != 2) return py::make_tuple(a.dtype_name(), shape, py::none(), none);
            return dispatch(a.dtype(), [&](auto t) -> py::tuple {
                const auto v = a.matrix<decltype(t)>();
                return py::make_tuple(a.dtype_name(), shape, py::make_tuple(v.row_stride, v.col_stride), reinterpret_cast<std::uintptr_t>(v.data));
            });
        },
        py::arg("x"), py::arg("writable") = false);
}

} // namespace subspan::bind
