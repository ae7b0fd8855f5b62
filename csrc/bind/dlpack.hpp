// The part of the DLPack 1.0 C ABI that the array glue reads (https://dmlc.github.io/dlpack, specification page).
#pragma once

#include <cstdint>

namespace subspan::dlpack {

enum DeviceType : std::int32_t { kCPU = 1, kCUDA = 2, kCUDAHost = 3, kCUDAManaged = 13 };
enum TypeCode : std::uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kOpaque = 3, kBfloat = 4, kComplex = 5, kBool = 6 };

struct Device {
    std::int32_t type, id;
};
struct DataType {
    std::uint8_t code, bits;
    std::uint16_t lanes;
};
struct Tensor {
    void *data;
    Device device;
    std::int32_t ndim;
    DataType dtype;
    std::int64_t *shape;
    std::int64_t *strides; // in elements; null means C order
    std::uint64_t byte_offset;
};
struct Managed { // "dltensor"
    Tensor tensor;
    void *context;
    void (*deleter)(Managed *);
};
constexpr std::uint64_t kReadOnly = 1;
struct Version {
    std::uint32_t major, minor;
};
struct ManagedVersioned { // "dltensor_versioned"
    Version version;
    void *context;
    void (*deleter)(ManagedVersioned *);
    std::uint64_t flags;
    Tensor tensor;
};

} // namespace subspan::dlpack
