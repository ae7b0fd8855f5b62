// What launchers ask of stacks of points.
#pragma once

#include "subspan/cuda/grassmann.hpp"
#include "subspan/cuda/launch.cuh"

#include <limits>
#include <string>
#include <type_traits>

namespace subspan::cuda {

inline void check_pair(const Stack &u, const Stack &x, const char *name) {
    if (x.rows != u.rows || x.cols != u.cols || x.size() != u.size())
        throw ValueError(std::string(name) + " must have the shape of U: " + std::to_string(u.size()) + " matrices of " + std::to_string(u.rows) + " x " +
                         std::to_string(u.cols));
    if (x.dtype != u.dtype) throw ValueError(std::string(name) + " must be " + name_of(u.dtype) + " as U is, got " + name_of(x.dtype));
}

inline void check_points(const Stack &u) {
    if (u.dtype != DType::f32 && u.dtype != DType::f64) throw ValueError(std::string("U must be float32 or float64, got ") + name_of(u.dtype));
    if (u.cols > u.rows)
        throw ValueError("U has " + std::to_string(u.cols) + " columns of " + std::to_string(u.rows) + " entries: so many cannot be orthonormal");
    if (u.cols > kGrassmannWidth)
        throw ValueError("U has " + std::to_string(u.cols) + " columns; the CUDA kernels take at most " + std::to_string(kGrassmannWidth));
    if (u.rows > std::numeric_limits<int>::max() / 64 || u.size() > std::numeric_limits<int>::max()) throw ValueError("U is too large for one call");
}

/// f(integral constant): the width that kernels of points of so many columns are compiled for.
template <class F> decltype(auto) with_width(int64_t cols, F &&f) {
    if (cols <= 8) return f(std::integral_constant<int, 8>{});
    if (cols <= 16) return f(std::integral_constant<int, 16>{});
    return f(std::integral_constant<int, 32>{});
}

} // namespace subspan::cuda
