// Exceptions of the C++ API. The Python module maps them onto ValueError, LinAlgError and MemoryError.
#pragma once

#include <stdexcept>
#include <string>

namespace subspan {

/// A bad shape, value or argument; the text names the argument, what it got and what it wanted.
class ValueError : public std::invalid_argument {
  public:
    using std::invalid_argument::invalid_argument;
};

/// A factorisation failed or a factor would become indefinite.
class LinAlgError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

/// A BLAS or LAPACK routine was needed before a table was installed.
class BackendError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

/// A call was ended from outside, by the interrupt hook.
class Interrupted : public std::runtime_error {
  public:
    Interrupted() : std::runtime_error("interrupted") {}
};

} // namespace subspan
