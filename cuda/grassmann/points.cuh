// What launchers ask of stacks of points.
#pragma once

#include "subspan/cuda/grassmann_steps.hpp"
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

/// Each point of u moves by scales[i] times the tangent part of its moment, which moves along if `parallel`; where that is NaN all stays.
void scaled_step(const Session &s, const Stack &u, const Stack &moment, const double *scales, Retraction method, bool parallel);
/// ValueError where a step needs more shared memory than a block may have.
void require_step_fits(const Session &s, const Stack &u, bool parallel);

/// out = the geodesic from u along h, at the time times[i] for each point.
void timed_exp(const Session &s, const Stack &u, const Stack &h, const double *times, const Stack &out);

} // namespace subspan::cuda
