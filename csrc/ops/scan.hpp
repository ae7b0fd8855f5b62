// Largest magnitude of a matrix, which also tells whether all of it is finite.
#pragma once

#include "subspan/views.hpp"

#include <cmath>

namespace subspan {

/// max |a_ij|; NaN or infinity when an entry is one.
template <class T> T max_abs(MatrixView<const T> a);

template <class T> bool all_finite(MatrixView<const T> a) { return std::isfinite(max_abs(a)); }

} // namespace subspan
