#pragma once

#include <pybind11/pybind11.h>

namespace subspan::bind {

void register_device(pybind11::module_ &m);
void register_device_arrays();
void register_device_orth(pybind11::module_ &m);
void register_device_householder(pybind11::module_ &m);
void register_device_spaces(pybind11::module_ &m);
void register_device_streaming(pybind11::module_ &m);
void register_device_truncated(pybind11::module_ &m);
void register_device_plucker(pybind11::module_ &m);
void register_device_grassmann(pybind11::module_ &m);
void register_emulated(pybind11::module_ &m); // tests only

} // namespace subspan::bind
