#include "subspan/cuda/runtime.hpp"

#include "subspan/cuda/launch.cuh"

#ifndef SUBSPAN_CUDA_ARCHITECTURES
#define SUBSPAN_CUDA_ARCHITECTURES "emulated"
#endif

namespace subspan::cuda {

int device_count() {
    int n = 0;
    if (cudaGetDeviceCount(&n) == cudaSuccess) return n;
    cudaGetLastError();
    return 0;
}

Versions versions() {
    Versions v{0, 0};
    if (cudaRuntimeGetVersion(&v.runtime) != cudaSuccess) v.runtime = 0;
    if (cudaDriverGetVersion(&v.driver) != cudaSuccess) v.driver = 0;
    cudaGetLastError();
    return v;
}

void wait_for(void *stream) { cudaStreamSynchronize(static_cast<cudaStream_t>(stream)); }

const char *architectures() { return SUBSPAN_CUDA_ARCHITECTURES; }

} // namespace subspan::cuda
