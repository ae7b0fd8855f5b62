#include "register.hpp"

#ifndef SUBSPAN_CUDA_MODULE
#define SUBSPAN_CUDA_MODULE _cuda
#endif

PYBIND11_MODULE(SUBSPAN_CUDA_MODULE, m, pybind11::mod_gil_not_used()) {
    m.doc() = "CUDA kernels of subspan. Use the functions of the package instead.";
    subspan::bind::register_device(m);
    subspan::bind::register_device_orth(m);
    subspan::bind::register_device_householder(m);
    subspan::bind::register_device_spaces(m);
    subspan::bind::register_device_plucker(m);
    subspan::bind::register_device_streaming(m);
    subspan::bind::register_device_truncated(m);
    subspan::bind::register_device_grassmann(m);
#ifdef SUBSPAN_EMULATED
    subspan::bind::register_emulated(m);
#endif
}
