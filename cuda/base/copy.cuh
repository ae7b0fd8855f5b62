// Copies of strided matrices that change the dtype.
#pragma once

#include "subspan/cuda/launch.cuh"

#include <limits>

namespace subspan::cuda {

template <class T, class To> SUBSPAN_DEVICE To converted(T x) { return narrow<To>(Accumulate<To>(widen(x))); }

// to = from, entry by entry.
template <class T, class To>
__global__ void __launch_bounds__(256) copy_kernel(const T *from, int64_t fi, int64_t fj, To *to, int64_t ti, int64_t tj, int64_t n) {
    const int64_t j = int64_t(blockIdx.x) * 256 + threadIdx.x, i = int64_t(blockIdx.y) * gridDim.z + blockIdx.z;
    if (j < n) to[i * ti + j * tj] = converted<T, To>(from[i * fi + j * fj]);
}

template <class T, class To> void copy(const Session &s, const T *from, int64_t fi, int64_t fj, To *to, int64_t ti, int64_t tj, int64_t rows, int64_t cols) {
    if (tj != 1 && ti == 1) return copy<T, To>(s, from, fj, fi, to, tj, ti, cols, rows); // the contiguous axis last
    if (rows == 0 || cols == 0) return;
    int64_t z = 1; // a grid has at most 65535 blocks along its second and third axis
    while (rows / z > 65535) z *= 2;
    if (rows % z != 0) { // the rest on its own
        const int64_t whole = rows / z * z;
        copy<T, To>(s, from + whole * fi, fi, fj, to + whole * ti, ti, tj, rows - whole, cols);
        rows = whole;
    }
    launch<copy_kernel<T, To>>(s, "a copy", Shape{dim3(unsigned(divide_up<int64_t>(cols, 256)), unsigned(rows / z), unsigned(z)), dim3(256)}, from, fi, fj, to,
                               ti, tj, cols);
}

// One item for each thread of a grid: its matrix, row and column.
struct Place {
    unsigned item;
    int64_t row, col;
};
SUBSPAN_DEVICE Place place_of(int64_t rows, int64_t cols) {
    const int64_t e = int64_t(blockIdx.x) * 256 + threadIdx.x, each = rows * cols, item = e / each, rest = e - item * each;
    return {unsigned(item), rest / cols, rest % cols};
}
inline Shape one_each(int64_t count) {
    const int64_t blocks = divide_up<int64_t>(count, 256);
    if (blocks > std::numeric_limits<int>::max()) throw ValueError("a stack is too large for one call");
    return Shape{dim3(unsigned(blocks)), dim3(256)};
}

template <class T>
__global__ void __launch_bounds__(256)
    assign_kernel(SUBSPAN_PARAMETER const Matrices<const T> from, SUBSPAN_PARAMETER const Matrices<T> to, const int64_t items) {
    const Place p = place_of(to.rows, to.cols);
    if (p.item < items) to.at(p.item)[p.row * to.row_stride + p.col * to.col_stride] = from.at(p.item)[p.row * from.row_stride + p.col * from.col_stride];
}
/// to = from for stacks of one shape.
template <class T> void assign(const Session &s, const Stack &from, const Stack &to) {
    const int64_t all = to.size() * to.rows * to.cols;
    if (all > 0) launch<assign_kernel<T>>(s, "a copy of a stack", one_each(all), Matrices<const T>(from), Matrices<T>(to), to.size());
}

} // namespace subspan::cuda
