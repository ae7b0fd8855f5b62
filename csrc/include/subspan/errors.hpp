// Exceptions of the C++ API. The Python module maps them onto ValueError, LinAlgError and MemoryError.
#pragma once

#include <stdexcept>
#include <string>

// Of one type wherever they are thrown and caught: in a library, and in modules that hide what they do not export.
#if defined(__GNUC__) || defined(__clang__)
#define SUBSPAN_VISIBLE __attribute__((visibility("default")))
#else
#define SUBSPAN_VISIBLE
#endif

namespace subspan {

/// A bad shape, value or argument; the text names the argument, what it got and what it wanted.
class SUBSPAN_VISIBLE ValueError : public std::invalid_argument {
  public:
    using std::invalid_argument::invalid_argument;
};

/// A factorisation failed or a factor would become indefinite.
class SUBSPAN_VISIBLE LinAlgError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

/// A BLAS or LAPACK routine was needed before a table was installed.
class SUBSPAN_VISIBLE BackendError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

/// A call was ended from outside, by the interrupt hook.
class SUBSPAN_VISIBLE Interrupted : public std::runtime_error {
  public:
    Interrupted() : std::runtime_error("interrupted") {}
};

} // namespace subspan
