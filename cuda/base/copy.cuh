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

template <class T, class To>
__global__ void __launch_bounds__(256)
    copies_kernel(SUBSPAN_PARAMETER const Matrices<const T> from, const unsigned first_from, SUBSPAN_PARAMETER const Matrices<To> to, const unsigned first_to,
                  const Accumulate<T> factor, const int64_t count) {
    const Place p = place_of(to.rows, to.cols);
    if (p.item >= count) return;
    const T x = from.at(first_from + p.item)[p.row * from.row_stride + p.col * from.col_stride];
    to.at(first_to + p.item)[p.row * to.row_stride + p.col * to.col_stride] = narrow<To>(Accumulate<To>(factor * widen(x)));
}
/// to = factor from for `count` matrices of two stacks of one shape, from one on in each, in a single launch.
template <class T, class To>
void copies(const Session &s, const Stack &from, int64_t first_from, const Stack &to, int64_t first_to, int64_t count, double factor = 1.0) {
    if (to.col_stride != 1 && to.row_stride == 1) // the contiguous axis last
        return copies<T, To>(s, from.transposed(), first_from, to.transposed(), first_to, count, factor);
    const int64_t all = count * to.rows * to.cols;
    if (all > 0)
        launch<copies_kernel<T, To>>(s, "a copy of matrices", one_each(all), Matrices<const T>(from), unsigned(first_from), Matrices<To>(to),
                                     unsigned(first_to), Accumulate<T>(factor), count);
}
/// Matrices of work memory as a stack: `pitch` apart their rows, one matrix after the other.
template <class T> Stack own_stack(const T *data, int64_t count, int64_t rows, int64_t cols, int64_t pitch) {
    Stack x;
    x.data = const_cast<T *>(data);
    x.dtype = sizeof(T) == 8 ? DType::f64 : DType::f32;
    x.rows = rows, x.cols = cols, x.row_stride = pitch;
    x.axes = 1, x.shape[0] = count, x.stride[0] = rows * pitch;
    return x;
}

} // namespace subspan::cuda
