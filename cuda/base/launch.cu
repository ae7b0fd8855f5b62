#include "subspan/cuda/launch.cuh"

#include <mutex>

namespace subspan::cuda {
namespace {

#if defined(__CUDACC__)
__global__ void probe_kernel() {} // what it was compiled for, all of them were

cudaError_t widest_cluster(Device &d) {
    cudaFuncAttributes attributes{};
    if (const cudaError_t e = cudaFuncGetAttributes(&attributes, probe_kernel); e != cudaSuccess) return e;
    if (d.major < 9 || attributes.ptxVersion < 90) return cudaSuccess;
    if (const cudaError_t e = cudaFuncSetAttribute(probe_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(d.shared_limit)); e != cudaSuccess) return e;
    for (int width = 8; width > 1; width /= 2) {
        cudaLaunchAttribute attribute{};
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim.x = unsigned(width);
        attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(unsigned(width));
        config.blockDim = dim3(512);
        config.dynamicSmemBytes = std::size_t(d.shared_limit);
        config.attrs = &attribute;
        config.numAttrs = 1;
        int together = 0;
        if (const cudaError_t e = cudaOccupancyMaxActiveClusters(&together, probe_kernel, &config); e != cudaSuccess) return e;
        if (together > 0) {
            d.cluster = width;
            break;
        }
    }
    return cudaSuccess;
}
#endif

Device devices[kMaxDevices];
#if defined(__CUDACC__)
std::once_flag known[kMaxDevices];
#endif

const Device &describe(int index) {
    if (index < 0 || index >= kMaxDevices) throw ValueError("device " + std::to_string(index) + " is not one of the first 64");
    const auto read = [&] {
        Device d;
        int value = 0;
        check(cudaDeviceGetAttribute(&value, cudaDevAttrComputeCapabilityMajor, index), "the device's compute capability");
        d.major = value;
        check(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, index), "the device's multiprocessors");
        d.processors = value;
        check(cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, index), "the device's shared memory");
        d.shared_limit = value;
#if defined(__CUDACC__)
        // Code for an older architecture that the driver has translated knows nothing of clusters, and a slice of a device (MIG) may have no
        // room for eight blocks together.
        int before = 0;
        check(cudaGetDevice(&before), "asking for the current device");
        if (before != index) check(cudaSetDevice(index), "changing the device");
        const cudaError_t e = d.major < 8 ? cudaSuccess : widest_cluster(d); // older ones are refused below, and have no code to ask about
        if (before != index) cudaSetDevice(before);
        check(e, "looking for kernels that this device can run");
#else
        d.cluster = d.major >= 9 ? emulate::settings.cluster : 1;
#endif
        devices[index] = d;
    };
#if defined(__CUDACC__)
    std::call_once(known[index], read);
#else
    read(); // tests change the emulated device
#endif
    return devices[index];
}

} // namespace

void check(cudaError_t e, const char *what) {
    if (e == cudaSuccess) return;
    cudaGetLastError();
    throw CudaError(std::string(what) + ": CUDA error " + std::to_string(int(e)) + ", " + cudaGetErrorString(e));
}

void detail::check_launch(cudaError_t e, const char *name) {
    if (e == cudaSuccess) return;
    cudaGetLastError();
    throw CudaError(std::string("launching ") + name + ": CUDA error " + std::to_string(int(e)) + ", " + cudaGetErrorString(e));
}

Session::Session(const Context &context) : device_(nullptr), stream_(static_cast<cudaStream_t>(context.stream)), index_(context.device), before_(0) {
    check(cudaGetDevice(&before_), "asking for the current device");
    const cudaError_t left = cudaPeekAtLastError();
    if (left != cudaSuccess) {
        cudaGetLastError();
        throw CudaError(std::string("an error that earlier CUDA code of this process has left (nothing was launched now): CUDA error ") +
                        std::to_string(int(left)) + ", " + cudaGetErrorString(left));
    }
    device_ = &describe(index_);
    if (device_->major < 8)
        throw CudaError("device " + std::to_string(index_) + " has compute capability " + std::to_string(device_->major) + ".x; the kernels need 8.0 or newer");
    // The legacy and per-thread default streams (null, 1 and 2) belong to whatever device is current.
    if (reinterpret_cast<std::uintptr_t>(context.stream) > 2) {
        int owner = index_;
        check(cudaStreamGetDevice(stream_, &owner), "asking for the stream's device");
        if (owner != index_)
            throw ValueError("the current stream belongs to device " + std::to_string(owner) + ", and the arrays are on device " + std::to_string(index_));
    }
    if (before_ != index_) check(cudaSetDevice(index_), "changing the device");
}

Session::~Session() {
    if (before_ != index_) cudaSetDevice(before_);
}

} // namespace subspan::cuda
