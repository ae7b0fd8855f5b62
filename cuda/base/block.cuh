// Sums and maxima over a block of threads, which all get the same bits. NaN makes a sum NaN; a maximum may pass over it.
#pragma once

#include "subspan/cuda/device.cuh"

namespace subspan::cuda {

/// The largest magnitude of items begin, begin + step, ... of each thread; `tops` is shared memory for a number a warp.
template <int Threads, class F> SUBSPAN_DEVICE double block_most(double *tops, int64_t begin, int64_t end, int64_t step, const F &item) {
    double top = 0;
    for (int64_t i = begin; i < end; i += step) {
        const double x = item(i), size = x < 0 ? -x : x;
        top = size > top ? size : top;
    }
    top = warp_most(top);
    if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top;
    __syncthreads();
    for (int w = 0; w < Threads / 32; ++w) top = most(top, tops[w]);
    __syncthreads();
    return top;
}
template <int Threads, class F> SUBSPAN_DEVICE double block_most(double *tops, int64_t count, const F &item) {
    return block_most<Threads>(tops, threadIdx.x, count, Threads, item);
}

template <int Threads, class F> SUBSPAN_DEVICE double block_sum(double *sums, int64_t count, const F &item) {
    double sum = 0;
    for (int64_t i = threadIdx.x; i < count; i += Threads) sum += item(i);
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0;
    for (int w = 0; w < Threads / 32; ++w) sum += sums[w];
    __syncthreads();
    return sum;
}

} // namespace subspan::cuda
