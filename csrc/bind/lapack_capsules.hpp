#pragma once

#include <pybind11/pybind11.h>

namespace subspan::bind {
namespace py = pybind11;

/// Installs SciPy's LAPACK, on first use. Needs the GIL.
void load_lapack();

} // namespace subspan::bind
