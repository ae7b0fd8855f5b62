// What kernels are written in: CUDA, or, for tests, an emulated device that runs the same source on the CPU.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#include <cooperative_groups.h>
#endif
#define SUBSPAN_SHARED(name)                                                                                                                                   \
    extern __shared__ __align__(128) unsigned char subspan_shared_memory[];                                                                                    \
    unsigned char *name = subspan_shared_memory
#else
#include "emulate.hpp"
#endif
// A kernel's parameter that functions may refer to without a copy in local memory.
#if defined(__CUDACC__)
#define SUBSPAN_PARAMETER __grid_constant__
#else
#define SUBSPAN_PARAMETER
#endif
#define SUBSPAN_DEVICE __device__ __forceinline__
#define SUBSPAN_SHARED_CODE __host__ __device__ __forceinline__

namespace subspan::cuda {

using std::int64_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;

inline constexpr unsigned kWarp = 0xffffffffu;

/// Storage types of 16 bits; arithmetic is in float.
struct Bf16 {
    uint16_t bits;
};
struct F16 {
    uint16_t bits;
};

template <class T> struct AccumulateOf {
    using type = float;
};
template <> struct AccumulateOf<double> {
    using type = double;
};
template <class T> using Accumulate = typename AccumulateOf<T>::type;

SUBSPAN_SHARED_CODE float bits_to_float(uint32_t u) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(u);
#else
    float f;
    __builtin_memcpy(&f, &u, 4);
    return f;
#endif
}
SUBSPAN_SHARED_CODE uint32_t float_to_bits(float f) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(f);
#else
    uint32_t u;
    __builtin_memcpy(&u, &f, 4);
    return u;
#endif
}

SUBSPAN_SHARED_CODE float widen(Bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
SUBSPAN_SHARED_CODE float widen(F16 x) {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(x.bits));
#else
    const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, exponent = (x.bits >> 10) & 31u, fraction = x.bits & 1023u;
    if (exponent == 31) return bits_to_float(sign | 0x7f800000u | (fraction << 13));
    if (exponent == 0) return (sign != 0 ? -1.0f : 1.0f) * float(fraction) * 5.9604644775390625e-8f; // 2^-24
    return bits_to_float(sign | ((exponent + 112) << 23) | (fraction << 13));
#endif
}
SUBSPAN_SHARED_CODE float widen(float x) { return x; }
SUBSPAN_SHARED_CODE double widen(double x) { return x; }

/// Rounds to the nearest value of T, ties to even.
template <class T> SUBSPAN_SHARED_CODE T narrow(Accumulate<T> x) { return x; }
template <> SUBSPAN_SHARED_CODE Bf16 narrow<Bf16>(float x) {
    const uint32_t u = float_to_bits(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return {uint16_t((u >> 16) | 64u)};
    return {uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}
template <> SUBSPAN_SHARED_CODE F16 narrow<F16>(float x) {
#if defined(__CUDA_ARCH__)
    return {__half_as_ushort(__float2half_rn(x))};
#else
    const uint32_t u = float_to_bits(x), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
    if (a > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
    if (a >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)}; // 65520 and more
    if (a < 0x38800000u) {                                   // subnormal: adding 0.5 puts the last bit where it is rounded
        const float shifted = bits_to_float(a) + 0.5f;
        return {uint16_t(sign | (float_to_bits(shifted) - 0x3f000000u))};
    }
    const uint32_t rounded = a - 0x38000000u + 0xfffu + ((a >> 13) & 1u);
    return {uint16_t(sign | (rounded >> 13))};
#endif
}

/// Two values of T side by side in a register, the first in the low half.
template <class T> SUBSPAN_SHARED_CODE uint32_t pack(float low, float high) { return uint32_t(narrow<T>(low).bits) | (uint32_t(narrow<T>(high).bits) << 16); }
template <class T> SUBSPAN_SHARED_CODE float low_of(uint32_t u) { return widen(T{uint16_t(u & 0xffffu)}); }
template <class T> SUBSPAN_SHARED_CODE float high_of(uint32_t u) { return widen(T{uint16_t(u >> 16)}); }
#if defined(__CUDA_ARCH__)
template <> __device__ __forceinline__ uint32_t pack<Bf16>(float low, float high) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t *>(&v);
}
template <> __device__ __forceinline__ uint32_t pack<F16>(float low, float high) {
    const __half2 v = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t *>(&v);
}
#endif

template <class T> SUBSPAN_SHARED_CODE T least(T a, T b) { return b < a ? b : a; }
template <class T> SUBSPAN_SHARED_CODE T most(T a, T b) { return a < b ? b : a; }
template <class T> SUBSPAN_SHARED_CODE T divide_up(T a, T b) { return (a + b - 1) / b; }

/// 1 / sqrt(x).
SUBSPAN_DEVICE double inverse_root(double x) {
#if defined(__CUDA_ARCH__)
    return rsqrt(x);
#else
    return 1.0 / __builtin_sqrt(x);
#endif
}

/// The place of the lowest bit that is set.
SUBSPAN_DEVICE int lowest_bit(uint64_t x) {
#if defined(__CUDA_ARCH__)
    return __ffsll(static_cast<long long>(x)) - 1;
#else
    return __builtin_ctzll(x);
#endif
}

/// x, from which the compiler cannot tell what has been computed of it before: that is computed again instead of kept in registers.
SUBSPAN_DEVICE int forgotten(int x) {
#if defined(__CUDA_ARCH__)
    asm volatile("" : "+r"(x));
#endif
    return x;
}

// Over all lanes of a warp, which get the same bits.
template <class T> SUBSPAN_DEVICE T warp_sum(T x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kWarp, x, step);
    return x;
}
/// Three sums at once, whose steps do not wait for each other.
template <class T> SUBSPAN_DEVICE void warp_sums(T &x, T &y, T &z) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        const T a = __shfl_xor_sync(kWarp, x, step), b = __shfl_xor_sync(kWarp, y, step), c = __shfl_xor_sync(kWarp, z, step);
        x += a;
        y += b;
        z += c;
    }
}
template <class T> SUBSPAN_DEVICE T warp_most(T x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = most(x, __shfl_xor_sync(kWarp, x, step));
    return x;
}

// Whether x holds in any lane of a warp.
SUBSPAN_DEVICE bool warp_any(bool x) {
#if defined(__CUDACC__)
    return __any_sync(kWarp, x);
#else
    bool any = false;
    emulate::share(x, [&](auto slot) {
        for (int lane = 0; lane < 32; ++lane) any = any || slot(lane);
    });
    return any;
#endif
}

// -- asynchronous copies of 16 bytes into shared memory; bytes past `filled` are zero --------------------------------------
SUBSPAN_DEVICE void copy_async(void *to, const void *from, int filled) {
#if defined(__CUDA_ARCH__)
    const unsigned address = unsigned(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(filled) : "memory");
#elif !defined(__CUDACC__)
    auto *now = emulate::now;
    now->copies.push_back({to, from, 16, std::size_t(filled), now->group});
#endif
}
SUBSPAN_DEVICE void commit_copies() {
#if defined(__CUDA_ARCH__)
    asm volatile("cp.async.commit_group;" ::: "memory");
#elif !defined(__CUDACC__)
    ++emulate::now->group;
#endif
}
/// Waits until at most `Pending` of this thread's groups are under way. Other threads see the bytes after a barrier.
template <int Pending> SUBSPAN_DEVICE void wait_copies() {
#if defined(__CUDA_ARCH__)
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#elif !defined(__CUDACC__)
    auto *now = emulate::now;
    std::vector<emulate::Fiber::Copy> later;
    for (const auto &c : now->copies) {
        if (c.group >= now->group - Pending) {
            later.push_back(c);
            continue;
        }
        if (reinterpret_cast<std::uintptr_t>(c.to) % 16 != 0 || reinterpret_cast<std::uintptr_t>(c.from) % 16 != 0) std::abort();
        std::memcpy(c.to, c.from, c.filled);
        std::memset(static_cast<char *>(c.to) + c.filled, 0, c.bytes - c.filled);
    }
    now->copies = later;
#endif
}

// -- tensor cores ------------------------------------------------------------------------------------------------------

/// Four 8x8 matrices of 16-bit items from shared memory; lane l gives the address of row l % 8 of matrix l / 8. Lane l gets
/// items 2 (l % 4) and the next of row l / 4 (Trans: of column l / 4) of each.
template <bool Trans> SUBSPAN_DEVICE void load_matrices(uint32_t (&r)[4], const void *row) {
#if defined(__CUDA_ARCH__)
    const unsigned address = unsigned(__cvta_generic_to_shared(row));
    if (Trans)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address)
                     : "memory");
#elif !defined(__CUDACC__)
    if (reinterpret_cast<std::uintptr_t>(row) % 16 != 0) std::abort();
    struct Rows {
        uint16_t x[8];
    } mine;
    std::memcpy(&mine, row, 16);
    const int lane = emulate::now->lane;
    emulate::share(mine, [&](auto slot) {
        for (int m = 0; m < 4; ++m) {
            uint16_t two[2];
            for (int e = 0; e < 2; ++e) {
                const int i = Trans ? 2 * (lane % 4) + e : lane / 4, j = Trans ? lane / 4 : 2 * (lane % 4) + e;
                two[e] = slot(8 * m + i).x[j];
            }
            r[m] = uint32_t(two[0]) | (uint32_t(two[1]) << 16);
        }
    });
#endif
}

/// d (16 x 8) += a (16 x 16) b (16 x 8). With g = lane / 4 and t = 2 (lane % 4): d holds (g, t), (g, t+1), (g+8, t), (g+8, t+1);
/// a the pairs at (g, t), (g+8, t), (g, t+8), (g+8, t+8); b those down the columns, (t, g) and (t+8, g).
template <class T> SUBSPAN_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(__CUDA_ARCH__)
    if constexpr (sizeof(T) == 2) {
        if constexpr (__is_same(T, Bf16))
            asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                         : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
        else
            asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                         : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
#elif !defined(__CUDACC__)
    struct Fragments {
        uint32_t a[4], b[2];
    } mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
    const auto half = [](uint32_t u, int e) { return e == 0 ? low_of<T>(u) : high_of<T>(u); };
    const int lane = emulate::now->lane;
    emulate::share(mine, [&](auto slot) {
        double sums[4] = {d[0], d[1], d[2], d[3]};
        for (int q = 0; q < 4; ++q) { // pairs of k: 2 q, 2 q + 1 and those plus 8
            Fragments fa[2], fb[2];
            for (int e = 0; e < 2; ++e) {
                fa[e] = slot(4 * (lane / 4) + q);
                fb[e] = slot(4 * (2 * (lane % 4) + e) + q);
            }
            for (int e = 0; e < 4; ++e)
                for (int k = 0; k < 4; ++k) sums[e] += double(half(fa[0].a[e / 2 + 2 * (k / 2)], k % 2)) * double(half(fb[e % 2].b[k / 2], k % 2));
        }
        for (int e = 0; e < 4; ++e) d[e] = float(sums[e]);
    });
#endif
}

// -- clusters of blocks; without them (before sm_90) a cluster is one block -------------------------------------------------
SUBSPAN_DEVICE unsigned cluster_rank() {
#if defined(__CUDA_ARCH__)
#if __CUDA_ARCH__ >= 900
    return cooperative_groups::this_cluster().block_rank();
#else
    return 0;
#endif
#elif !defined(__CUDACC__)
    return emulate::now->block->rank;
#else
    return 0;
#endif
}
/// The two halves of a barrier: others may go on past their wait once this thread has arrived.
SUBSPAN_DEVICE void cluster_arrive() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
SUBSPAN_DEVICE void cluster_wait() {
#if defined(__CUDA_ARCH__)
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
#elif !defined(__CUDACC__)
    emulate::wait(emulate::Fiber::at_cluster);
#endif
}
SUBSPAN_DEVICE void cluster_barrier() {
    cluster_arrive();
    cluster_wait();
}
/// The same shared-memory address in another block of the cluster.
template <class T> SUBSPAN_DEVICE const T *of_block(const T *mine, unsigned rank) {
#if defined(__CUDA_ARCH__)
#if __CUDA_ARCH__ >= 900
    return cooperative_groups::this_cluster().map_shared_rank(const_cast<T *>(mine), rank);
#else
    return mine;
#endif
#elif !defined(__CUDACC__)
    const auto offset = reinterpret_cast<const unsigned char *>(mine) - emulate::now->block->shared;
    return reinterpret_cast<const T *>(emulate::blocks[rank].shared + offset);
#else
    return mine;
#endif
}

} // namespace subspan::cuda
