#include "convert.hpp"
#include "lapack_capsules.hpp"
#include "register.hpp"
#include "subspan/errors.hpp"
#include "subspan/isa.hpp"
#include "subspan/parallel.hpp"

namespace subspan::bind {

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
        }
    });
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
#if defined(SUBSPAN_NO_CLONES) || !defined(__x86_64__) || !(defined(__GNUC__) || defined(__clang__))
        d["multi_isa"] = false;
#else
        d["multi_isa"] = true;
#endif
        return d;
    });
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
                return py::make_tuple(a.dtype_name(), shape, py::make_tuple(v.row_stride, v.col_stride),
                                      reinterpret_cast<std::uintptr_t>(v.data));
            });
        },
        py::arg("x"), py::arg("writable") = false);
}

} // namespace subspan::bind
