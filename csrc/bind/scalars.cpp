#include "scalars.hpp"

#include <pybind11/numpy.h>

namespace subspan::bind {
namespace {

py::object python(const char *name) { return py::module_::import("subspan._lib.numbers").attr(name); }

} // namespace

bool truth(py::handle x, const char *name) {
    if (x.ptr() == Py_True) return true;
    if (x.ptr() == Py_False) return false;
    return py::cast<bool>(python("truth")(x, name));
}

double real(py::handle x, const char *name, double least) {
    if (PyFloat_CheckExact(x.ptr())) {
        const double value = PyFloat_AS_DOUBLE(x.ptr());
        if (std::isfinite(value) && value >= least) return value;
    }
    return py::cast<double>(python("real_number")(x, name, least));
}

std::int64_t whole_number(py::handle x, const char *name, std::int64_t least, std::int64_t most) {
    if (PyLong_CheckExact(x.ptr())) {
        int overflow = 0;
        const long long value = PyLong_AsLongLongAndOverflow(x.ptr(), &overflow);
        if (overflow == 0 && value >= least && value <= most) return value;
    }
    return py::cast<std::int64_t>(python("whole_number")(x, name, least, most));
}

int choice(py::handle x, const char *name, std::initializer_list<const char *> names, bool none) {
    int i = 0;
    if (none) {
        if (x.is_none()) return 0;
        ++i;
    }
    if (PyUnicode_Check(x.ptr()))
        for (const char *allowed : names) {
            if (PyUnicode_CompareWithASCIIString(x.ptr(), allowed) == 0) return i;
            ++i;
        }
    std::string all = none ? "None" : "";
    const bool two = names.size() == 2 && !none;
    for (const char *allowed : names) all += (all.empty() ? "" : (two ? " or " : ", ")) + ("'" + std::string(allowed) + "'");
    throw py::value_error(std::string(name) + " must be " + (two ? "" : "one of ") + all + ", got " + std::string(py::repr(x)));
}

bool is_number(py::handle x) {
    if (PyFloat_Check(x.ptr()) || PyLong_Check(x.ptr())) return true;
    if (PyObject_TypeCheck(x.ptr(), py::detail::npy_api::get().PyArray_Type_)) return false;
    return py::isinstance(x, py::module_::import("numpy").attr("number")) && !py::isinstance(x, py::module_::import("numpy").attr("complexfloating"));
}

} // namespace subspan::bind
