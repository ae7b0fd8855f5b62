#include "device.hpp"
#include "register.hpp"
#include "subspan/cuda/blas.hpp"
#include "subspan/cuda/runtime.hpp"
#include "subspan/cuda/solver.hpp"
#include "subspan/errors.hpp"

#include <exception>

namespace subspan::bind {

void not_on_device(const std::string &name) {
    if (name.rfind("__", 0) == 0) throw py::attribute_error(name);
    py::set_error(py::module_::import("subspan._lib.device").attr("NotOnDeviceError"),
                  (name + " is not implemented on CUDA devices: it runs on the CPU and moves no data by itself").c_str());
    throw py::error_already_set();
}

void register_device(py::module_ &m) {
    register_device_arrays();
    // A kernel that finds its table empty asks Python for the libraries that are there.
    cuda::set_library_loader([] {
        const py::gil_scoped_acquire gil;
        py::module_::import("subspan._lib.device").attr("load_libraries")();
    });
    py::register_local_exception_translator([](std::exception_ptr p) {
        try {
            if (p) std::rethrow_exception(p);
        } catch (const cuda::CudaError &e) {
            py::set_error(py::module_::import("subspan").attr("CudaError"), e.what());
        } catch (const ValueError &e) {
            PyErr_SetString(PyExc_ValueError, e.what());
        } catch (const LinAlgError &e) {
            py::set_error(py::module_::import("numpy.linalg").attr("LinAlgError"), e.what());
        } catch (const BackendError &e) {
            PyErr_SetString(PyExc_ImportError, e.what());
        }
    });
    m.def("__getattr__", [](const std::string &name) -> py::object { not_on_device(name); });
    m.def("device_count", &cuda::device_count);
    m.def("versions", [] {
        const auto v = cuda::versions();
        return py::make_tuple(v.runtime, v.driver);
    });
    m.def("has_blas", &cuda::has_blas);
    m.def("load_blas", [](const std::string &path, bool loaded_only) { return cuda::load_blas(path.c_str(), loaded_only); }, py::arg("path"),
          py::arg("loaded_only"));
    m.def("has_solver", &cuda::has_solver);
    m.def("load_solver", [](const std::string &path, bool loaded_only) { return cuda::load_solver(path.c_str(), loaded_only); }, py::arg("path"),
          py::arg("loaded_only"));
    m.def("architectures", [] { return std::string(cuda::architectures()); });
}

} // namespace subspan::bind
