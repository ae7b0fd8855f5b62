// Numbers, flags and choices of a user's, with errors that name the argument. The bindings read them here, and so do Python's
// functions, through the module.
#pragma once

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <pybind11/pybind11.h>
#include <string>
#include <vector>

namespace subspan::bind {

namespace py = pybind11;

/// True or False, of Python or NumPy; anything else is a TypeError.
bool truth(py::handle x, const char *name);
/// A finite number that is at least `least`.
double real(py::handle x, const char *name, double least = -std::numeric_limits<double>::infinity());
/// A number between 0 and 1.
double share(py::handle x, const char *name);
/// An integer from `least` to `most`; no bool, no float that happens to be whole.
std::int64_t whole_number(py::handle x, const char *name, std::int64_t least, std::int64_t most = std::int64_t(1) << 62);
/// Which of these texts x is; ValueError otherwise. `none`: None comes before them.
int choice(py::handle x, const char *name, std::initializer_list<const char *> names, bool none = false);
int choice(py::handle x, const char *name, const std::vector<std::string> &names, bool none = false);
/// Whether x is a number and no array: float, int, or one of NumPy's.
bool is_number(py::handle x);
/// Whether the side is "left"; ValueError unless it is that or "right".
inline bool is_left(py::handle side) { return choice(side, "side", {"left", "right"}) == 0; }

} // namespace subspan::bind
