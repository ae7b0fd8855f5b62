// Copies of strided matrices that change the dtype.
#pragma once

#include "subspan/cuda/launch.cuh"

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
    const int64_t z = rows > 65535 ? 256 : 1; // a grid has at most 65535 rows, and 64 of the third kind
    if (rows == 0 || cols == 0) return;
    if (rows % z != 0) { // the rest on its own
        const int64_t whole = rows / z * z;
        copy<T, To>(s, from + whole * fi, fi, fj, to + whole * ti, ti, tj, rows - whole, cols);
        rows = whole;
    }
    launch<copy_kernel<T, To>>(s, "a copy", Shape{dim3(unsigned(divide_up<int64_t>(cols, 256)), unsigned(rows / z), unsigned(z)), dim3(256)}, from, fi, fj, to, ti, tj,
                               cols);
}

} // namespace subspan::cuda
