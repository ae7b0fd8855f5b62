#include "scalars.hpp"

#include <pybind11/numpy.h>

namespace subspan::bind {
namespace {

bool is_a(py::handle x, const char *numpy_type) { return py::isinstance(x, py::module_::import("numpy").attr(numpy_type)); }

bool is_bool(py::handle x) { return PyBool_Check(x.ptr()) || is_a(x, "bool_"); }

template <class Error> [[noreturn]] void refuse(const char *name, const std::string &wanted, const std::string &got) {
    throw Error(std::string(name) + " must be " + wanted + ", got " + got);
}

std::string text_of(py::handle x) { return py::repr(x); }

// Integers of any length: what a digit more or less says is said by their size.
std::string shortly(py::handle number) {
    const auto bits = number.attr("bit_length")().cast<std::int64_t>();
    return bits < 128 ? text_of(number) : "a number of " + std::to_string(bits) + " bits";
}

} // namespace

bool truth(py::handle x, const char *name) {
    if (x.ptr() == Py_True) return true;
    if (x.ptr() == Py_False) return false;
    if (!is_a(x, "bool_")) refuse<py::type_error>(name, "True or False", text_of(x));
    return PyObject_IsTrue(x.ptr()) == 1;
}

double real(py::handle x, const char *name, double least) {
    double value = 0.0;
    if (PyFloat_CheckExact(x.ptr())) {
        value = PyFloat_AS_DOUBLE(x.ptr());
    } else {
        if (PyUnicode_Check(x.ptr()) || PyBytes_Check(x.ptr()) || PyComplex_Check(x.ptr()) || is_bool(x) || is_a(x, "complexfloating"))
            refuse<py::type_error>(name, "a number", text_of(x));
        if (py::bool_(py::getattr(x, "requires_grad", py::bool_(false))))
            throw py::type_error(std::string(name) + " is a tensor that requires grad, and autograd does not see this function; pass a float");
        const py::object number = py::reinterpret_steal<py::object>(PyNumber_Float(x.ptr()));
        if (!number) {
            const bool beyond = PyErr_ExceptionMatches(PyExc_OverflowError) != 0;
            const bool kind = PyErr_ExceptionMatches(PyExc_TypeError) || PyErr_ExceptionMatches(PyExc_ValueError) || PyErr_ExceptionMatches(PyExc_RuntimeError);
            if (!beyond && !kind) throw py::error_already_set();
            PyErr_Clear();
            if (beyond) refuse<py::value_error>(name, "finite", "a number beyond float64");
            refuse<py::type_error>(name, "a number", text_of(x));
        }
        value = PyFloat_AS_DOUBLE(number.ptr());
    }
    if (!(std::isfinite(value) && value >= least)) refuse<py::value_error>(name, least < 0 ? "finite" : "finite and not negative", text_of(py::float_(value)));
    return value;
}

double share(py::handle x, const char *name) {
    const double value = real(x, name);
    if (!(value > 0.0 && value < 1.0)) refuse<py::value_error>(name, "in (0, 1)", text_of(py::float_(value)));
    return value;
}

std::int64_t whole_number(py::handle x, const char *name, std::int64_t least, std::int64_t most) {
    if (PyLong_CheckExact(x.ptr())) { // the common case, without a look at NumPy
        int overflow = 0;
        const long long value = PyLong_AsLongLongAndOverflow(x.ptr(), &overflow);
        if (overflow == 0 && value >= least && value <= most) return value;
    }
    py::object number;
    if (!is_bool(x)) number = py::reinterpret_steal<py::object>(PyNumber_Index(x.ptr()));
    if (!number) {
        PyErr_Clear();
        refuse<py::type_error>(name, "an integer", text_of(x));
    }
    int overflow = 0;
    const long long value = PyLong_AsLongLongAndOverflow(number.ptr(), &overflow);
    if (overflow < 0 || (overflow == 0 && value < least)) refuse<py::value_error>(name, "at least " + std::to_string(least), shortly(number));
    if (overflow > 0 || value > most) refuse<py::value_error>(name, "at most " + std::to_string(most), shortly(number));
    return value;
}

int choice(py::handle x, const char *name, const std::vector<std::string> &names, bool none) {
    if (none && x.is_none()) return 0;
    if (PyUnicode_Check(x.ptr()))
        for (std::size_t i = 0; i < names.size(); ++i)
            if (PyUnicode_CompareWithASCIIString(x.ptr(), names[i].c_str()) == 0) return int(i) + (none ? 1 : 0);
    std::string all = none ? "None" : "";
    for (std::size_t i = 0; i < names.size(); ++i) all += (all.empty() ? "'" : (i + 1 == names.size() ? " or '" : ", '")) + names[i] + "'";
    refuse<py::value_error>(name, all, text_of(x));
}

int choice(py::handle x, const char *name, std::initializer_list<const char *> names, bool none) {
    int i = none ? 1 : 0;
    if (PyUnicode_Check(x.ptr()))
        for (const char *allowed : names) {
            if (PyUnicode_CompareWithASCIIString(x.ptr(), allowed) == 0) return i;
            ++i;
        }
    return choice(x, name, std::vector<std::string>(names.begin(), names.end()), none);
}

bool is_number(py::handle x) {
    if (PyFloat_Check(x.ptr()) || PyLong_Check(x.ptr())) return true;
    if (PyObject_TypeCheck(x.ptr(), py::detail::npy_api::get().PyArray_Type_)) return false;
    return is_a(x, "number") && !is_a(x, "complexfloating");
}

} // namespace subspan::bind
