// A CUDA device on the CPU, slow and strict, for tests: kernels of cuda/ compile as plain C++ against this header. Threads
// of a cluster are fibers that run in a shuffled order and switch at barriers; shared memory starts as NaN; a barrier that
// not all threads reach is an error; asynchronous copies land when they are waited for, not before.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};

// -- the part of the runtime that the launchers call -------------------------------------------------------------------
enum cudaError_t : int {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInsufficientDriver = 35,
    cudaErrorNoDevice = 100,
    cudaErrorInvalidDevice = 101,
    cudaErrorIllegalAddress = 700
};
using cudaStream_t = void *;
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0, cudaStreamCaptureStatusActive = 1 };
const char *cudaGetErrorString(cudaError_t);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
cudaError_t cudaGetDeviceCount(int *);
cudaError_t cudaGetDevice(int *);
cudaError_t cudaSetDevice(int);
cudaError_t cudaDeviceGetAttribute(int *, cudaDeviceAttr, int);
cudaError_t cudaStreamSynchronize(cudaStream_t);
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus *);
cudaError_t cudaStreamGetDevice(cudaStream_t, int *);
cudaError_t cudaMemsetAsync(void *, int, std::size_t, cudaStream_t);
cudaError_t cudaDriverGetVersion(int *);
cudaError_t cudaRuntimeGetVersion(int *);
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };
cudaError_t cudaMemcpyAsync(void *, const void *, std::size_t, cudaMemcpyKind, cudaStream_t);

namespace subspan::emulate {

struct Block;
struct Fiber {
    void *stack_pointer = nullptr;
    dim3 thread;
    Block *block = nullptr;
    int lane = 0, warp = 0;
    enum State { ready, at_warp, at_block, at_cluster, done } state = ready;
    struct Copy {
        void *to;
        const void *from;
        std::size_t bytes, filled;
        int group;
    };
    std::vector<Copy> copies; // asynchronous ones that have not landed
    int group = 0;
};
struct Block {
    dim3 index;
    unsigned rank = 0; // in its cluster
    std::vector<unsigned char> storage;
    unsigned char *shared = nullptr;
    std::vector<std::vector<unsigned char>> exchange; // for each warp, 32 slots of 64 bytes
};
extern Fiber *now;
extern dim3 grid_size, block_size;
extern std::vector<Block> blocks; // of the cluster that runs

void wait(Fiber::State at);
void run(dim3 grid, dim3 block, std::size_t shared, int cluster, const std::function<void()> &kernel);

// What tests set: the order of fibers, the device that queries describe, errors to come.
struct Settings {
    std::uint64_t seed = 1;
    int devices = 1, major = 9, processors = 4, shared_limit = 232448, cluster = 8;
    cudaError_t last = cudaSuccess, next_launch = cudaSuccess;
    bool driver = true, capturing = false;
    int device = 0, stream_device = -1;
    std::int64_t launches = 0;
    int sweeps = 0; // of rotations; zero: as on a device
};
extern Settings settings;

// f(slot) sees what every lane of the warp has put into its slot.
template <class V, class F> void share(const V &mine, F &&f) {
    static_assert(sizeof(V) <= 64);
    unsigned char *slots = now->block->exchange[std::size_t(now->warp)].data();
    std::memcpy(slots + 64 * now->lane, &mine, sizeof(V));
    wait(Fiber::at_warp);
    f([slots](int lane) {
        V v;
        std::memcpy(&v, slots + 64 * (lane & 31), sizeof(V));
        return v;
    });
    wait(Fiber::at_warp);
}
template <class V> V exchange(V mine, int from) {
    V out;
    share(mine, [&](auto slot) { out = slot(from); });
    return out;
}

} // namespace subspan::emulate

#define threadIdx (subspan::emulate::now->thread)
#define blockIdx (subspan::emulate::now->block->index)
#define blockDim (subspan::emulate::block_size)
#define gridDim (subspan::emulate::grid_size)
#define SUBSPAN_SHARED(name) unsigned char *name = subspan::emulate::now->block->shared

inline void __syncthreads() { subspan::emulate::wait(subspan::emulate::Fiber::at_block); }
inline void __syncwarp(unsigned = 0xffffffffu) { subspan::emulate::wait(subspan::emulate::Fiber::at_warp); }
template <class V> V __shfl_xor_sync(unsigned, V v, int mask) { return subspan::emulate::exchange(v, subspan::emulate::now->lane ^ mask); }
template <class V> V __shfl_sync(unsigned, V v, int lane) { return subspan::emulate::exchange(v, lane); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline void sincospi(double x, double *s, double *c) {
    const double r = std::remainder(x, 2.0) * 3.14159265358979323846;
    *s = std::sin(r);
    *c = std::cos(r);
}
template <class V> V __ldg(const V *p) { return *p; }
using std::fma;
using std::isfinite;
using std::isnan;
using std::max;
using std::min;
using std::rint;
