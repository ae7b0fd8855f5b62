#include "device.hpp"
#include "register.hpp"
#include "subspan/cuda/blas.hpp"
#include "subspan/cuda/runtime.hpp"
#include "subspan/cuda/solver.hpp"
#include "subspan/errors.hpp"

#include <exception>

namespace subspan::bind {
namespace {

// Fills a table: from the process, else from the loader's path, else from NVIDIA's wheels. Where there is none, the kernel that needs it
// raises an ImportError.
void fill(bool (*load)(const char *, bool), std::initializer_list<const char *> names, const std::string &package) {
    for (const bool loaded_only : {true, false})
        for (const char *name : names)
            if (load(name, loaded_only)) return;
    const py::object find = py::module_::import("importlib.util").attr("find_spec");
    for (const std::string &place : {std::string("nvidia.cu13.lib"), "nvidia." + package + ".lib"}) {
        py::object spec;
        try {
            spec = find(place);
        } catch (py::error_already_set &e) {
            if (!e.matches(PyExc_ModuleNotFoundError)) throw;
            continue;
        }
        if (spec.is_none() || spec.attr("submodule_search_locations").is_none()) continue;
        for (const auto folder : spec.attr("submodule_search_locations"))
            for (const char *name : names)
                if (load((folder.cast<std::string>() + "/" + name).c_str(), false)) return;
    }
}

} // namespace

void not_on_device(const std::string &name) {
    if (name.rfind("__", 0) == 0) throw py::attribute_error(name);
    py::set_error(py::module_::import("subspan._lib.device").attr("NotOnDeviceError"),
                  (name + " is not implemented on CUDA devices: it runs on the CPU and moves no data by itself").c_str());
    throw py::error_already_set();
}

void register_device(py::module_ &m) {
    register_device_arrays();
    // For a kernel that finds its table empty: CUDA 13's and 12's, as the loaders of Linux and Windows know them.
    cuda::set_library_loader([] {
        const py::gil_scoped_acquire gil;
        if (!cuda::has_blas()) fill(&cuda::load_blas, {"libcublas.so.13", "libcublas.so.12", "cublas64_13.dll", "cublas64_12.dll"}, "cublas");
        if (!cuda::has_solver()) fill(&cuda::load_solver, {"libcusolver.so.12", "libcusolver.so.11", "cusolver64_12.dll", "cusolver64_11.dll"}, "cusolver");
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
    m.def("architectures", [] { return std::string(cuda::architectures()); });
}

} // namespace subspan::bind
