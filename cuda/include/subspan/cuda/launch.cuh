// Launching kernels: everything is checked first, and errors become exceptions that leave no error behind.
#pragma once

#include "device.cuh"
#include "types.hpp"

#include <array>
#include <atomic>
#include <string>
#include <utility>

namespace subspan::cuda {

inline constexpr int kMaxDevices = 64;

/// Throws CudaError unless e is success; the runtime forgets the error.
void check(cudaError_t e, const char *what);

/// What kernels are chosen by.
struct Device {
    int major = 0, processors = 0;
    int cluster = 1;          // blocks that can be placed together, each with all shared memory it may have: 8, 4, 2, or 1 where there are no clusters
    int64_t shared_limit = 0; // bytes of shared memory that a block may have
};

/// Makes the context's device current while it lives. Throws for a device older than sm_80, for a stream of another device,
/// and for an error that earlier CUDA code of this process has left.
class Session {
  public:
    explicit Session(const Context &context);
    Session(const Session &) = delete;
    Session &operator=(const Session &) = delete;
    ~Session();
    const Device &device() const { return *device_; }
    cudaStream_t stream() const { return stream_; }
    int index() const { return index_; }

  private:
    const Device *device_;
    cudaStream_t stream_;
    int index_, before_;
};

struct Shape {
    dim3 grid, block;
    int64_t shared = 0;
    int cluster = 1;
};

namespace detail {
void check_launch(cudaError_t e, const char *name);
}

/// Kernel<<<...>>>(args...), with as much shared memory as it needs, as clusters where asked for.
template <auto Kernel, class... Args> void launch(const Session &s, const char *name, const Shape &shape, const Args &...args) {
    if (shape.shared > s.device().shared_limit)
        throw ValueError(std::string(name) + " needs " + std::to_string(shape.shared) +
                         " bytes of shared memory for matrices of these sizes, and a block of this device has " + std::to_string(s.device().shared_limit));
#if defined(__CUDACC__)
    if (shape.shared > 48 * 1024) {
        static std::array<std::atomic<int64_t>, kMaxDevices> allowed{};
        auto &have = allowed[std::size_t(s.index())];
        if (have.load(std::memory_order_relaxed) < shape.shared) {
            check(cudaFuncSetAttribute(Kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(s.device().shared_limit)), name);
            have.store(s.device().shared_limit, std::memory_order_relaxed);
        }
    }
    cudaLaunchConfig_t config{};
    config.gridDim = shape.grid;
    config.blockDim = shape.block;
    config.dynamicSmemBytes = std::size_t(shape.shared);
    config.stream = s.stream();
    cudaLaunchAttribute attribute{};
    if (shape.cluster > 1) {
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim.x = unsigned(shape.cluster);
        attribute.val.clusterDim.y = 1;
        attribute.val.clusterDim.z = 1;
        config.attrs = &attribute;
        config.numAttrs = 1;
    }
    detail::check_launch(cudaLaunchKernelEx(&config, Kernel, args...), name);
#else
    if (emulate::settings.next_launch != cudaSuccess) return detail::check_launch(std::exchange(emulate::settings.next_launch, cudaSuccess), name);
    emulate::run(shape.grid, shape.block, std::size_t(shape.shared), shape.cluster, [&] { Kernel(args...); });
#endif
}

/// Hands out the caller's workspace in pieces of 256-byte alignment.
class Workspace {
  public:
    explicit Workspace(const Context &c) : next_(static_cast<char *>(c.workspace)), left_(c.workspace_bytes) {}
    template <class T> T *take(int64_t count) {
        const int64_t bytes = divide_up<int64_t>(count * int64_t(sizeof(T)), 256) * 256;
        if (bytes > left_)
            throw ValueError("workspace is too small: " + std::to_string(bytes) + " bytes more are needed, " + std::to_string(left_) + " are left");
        char *p = next_;
        next_ += bytes;
        left_ -= bytes;
        return reinterpret_cast<T *>(p);
    }

  private:
    char *next_;
    int64_t left_;
};
/// Bytes that take<T>(count) needs.
template <class T> constexpr int64_t room(int64_t count) { return divide_up<int64_t>(count * int64_t(sizeof(T)), 256) * 256; }

/// Items from the first matrix of a stack to another.
inline int64_t offset_of(const Stack &s, int64_t item) {
    int64_t offset = 0;
    for (int a = s.axes - 1; a >= 0; --a) {
        if (s.shape[a] == 0) return 0; // there are none
        offset += item % s.shape[a] * s.stride[a];
        item /= s.shape[a];
    }
    return offset;
}

/// A stack as kernels see it.
template <class T> struct Matrices {
    T *data;
    int64_t rows, cols, row_stride, col_stride;
    int axes;
    bool line = false; // all rows of all matrices lie row_stride apart
    unsigned shape[kAxes];
    int64_t stride[kAxes];

    Matrices() = default;
    explicit Matrices(const Stack &s)
        : data(static_cast<T *>(s.data)), rows(s.rows), cols(s.cols), row_stride(s.row_stride), col_stride(s.col_stride), axes(s.axes) {
        for (int a = 0; a < kAxes; ++a) {
            shape[a] = unsigned(s.shape[a]);
            stride[a] = s.stride[a];
        }
        line = true;
        int64_t step = s.rows * s.row_stride;
        for (int a = s.axes - 1; a >= 0; --a) {
            if (s.shape[a] == 1) continue;
            line = line && s.stride[a] == step;
            step *= s.shape[a];
        }
        if (s.size() > 0x7fffffff) throw ValueError("a stack of " + std::to_string(s.size()) + " matrices is too large for one call");
    }
    /// The first item of matrix i.
    SUBSPAN_SHARED_CODE T *at(unsigned i) const {
        int64_t offset = 0;
#pragma unroll
        for (int a = kAxes - 1; a >= 0; --a) { // unrolled: an index that is not known would move the arrays to local memory
            if (a >= axes) continue;
            const unsigned rest = a > 0 ? i / shape[a] : 0u;
            offset += int64_t(i - rest * shape[a]) * stride[a];
            i = rest;
        }
        return data + offset;
    }
};

/// Whether rows of s may be read 16 bytes at a time: contiguous, each starting at a multiple of 16 bytes.
inline bool in_vectors(const Stack &s) {
    const int64_t items = 16 / size_of(s.dtype);
    bool good = s.col_stride == 1 && reinterpret_cast<std::uintptr_t>(s.data) % 16 == 0 && (s.rows <= 1 || s.row_stride % items == 0);
    for (int a = 0; a < s.axes; ++a) good = good && (s.shape[a] <= 1 || s.stride[a] % items == 0);
    return good;
}

/// f(float{}) or f(double{}), for what is one of them.
template <class F> decltype(auto) dispatch_wide(DType d, F &&f) { return d == DType::f32 ? f(float{}) : f(double{}); }

/// f(T{}) with the type that a dtype stands for.
template <class F> decltype(auto) dispatch(DType d, F &&f) {
    switch (d) {
    case DType::f16: return f(F16{});
    case DType::bf16: return f(Bf16{});
    case DType::f32: return f(float{});
    default: return f(double{});
    }
}

} // namespace subspan::cuda
