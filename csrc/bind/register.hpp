#pragma once

#include <pybind11/pybind11.h>

namespace subspan::bind {

void register_runtime(pybind11::module_ &m);
void register_streaming(pybind11::module_ &m);
void register_decompositions(pybind11::module_ &m);
void register_frequent_directions(pybind11::module_ &m);
void register_orth(pybind11::module_ &m);
void register_spaces(pybind11::module_ &m);
void register_householder(pybind11::module_ &m);
void register_grassmann(pybind11::module_ &m);
void register_plucker(pybind11::module_ &m);
void register_exterior(pybind11::module_ &m);

} // namespace subspan::bind
