// The part of the DLPack 1.0 C ABI that the array glue reads (https://dmlc.github.io/dlpack, specification page), and tensors on loan.
#pragma once

#include <cstdint>
#include <pybind11/pybind11.h>
#include <string>
#include <utility>
#include <vector>

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
constexpr std::uint64_t kReadOnly = 1, kIsCopied = 2;
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

/// A tensor that its exporter has lent through a capsule; given back when this goes away.
class Loan {
  public:
    Loan() = default;
    /// Takes over what the capsule holds; `name` is the argument's in errors.
    Loan(pybind11::handle capsule, const char *name) {
        namespace py = pybind11;
        if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned") != 0) {
            auto *m = static_cast<ManagedVersioned *>(PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
            if (m->version.major > 1) throw py::type_error(std::string(name) + " exports DLPack " + std::to_string(m->version.major) + ", wanted 1.x");
            PyCapsule_SetName(capsule.ptr(), "used_dltensor_versioned");
            versioned_ = m;
        } else if (PyCapsule_IsValid(capsule.ptr(), "dltensor") != 0) {
            plain_ = static_cast<Managed *>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
            PyCapsule_SetName(capsule.ptr(), "used_dltensor");
        } else {
            throw py::type_error(std::string(name) + ": __dlpack__ did not return a DLPack capsule");
        }
        if (tensor().dtype.lanes != 1 || tensor().ndim < 0 || (tensor().ndim > 0 && tensor().shape == nullptr)) {
            const bool vectors = tensor().dtype.lanes != 1;
            give_back(); // the destructor does not run for an object whose constructor throws
            throw py::type_error(std::string(name) + (vectors ? " has vector elements" : ": __dlpack__ gave no shape"));
        }
    }
    Loan(Loan &&o) noexcept : plain_(std::exchange(o.plain_, nullptr)), versioned_(std::exchange(o.versioned_, nullptr)) {}
    Loan &operator=(Loan &&o) noexcept {
        std::swap(plain_, o.plain_);
        std::swap(versioned_, o.versioned_);
        return *this;
    }
    ~Loan() { give_back(); }

    explicit operator bool() const { return plain_ != nullptr || versioned_ != nullptr; }
    const Tensor &tensor() const { return versioned_ != nullptr ? versioned_->tensor : plain_->tensor; }
    bool read_only() const { return versioned_ != nullptr && (versioned_->flags & kReadOnly) != 0; }
    bool is_copy() const { return versioned_ != nullptr && (versioned_->flags & kIsCopied) != 0; }
    void *data() const { return tensor().data == nullptr ? nullptr : static_cast<char *>(tensor().data) + tensor().byte_offset; }
    std::vector<std::int64_t> shape() const { return {tensor().shape, tensor().shape + tensor().ndim}; }
    std::vector<std::int64_t> strides() const { // in elements
        const Tensor &t = tensor();
        if (t.strides != nullptr) return {t.strides, t.strides + t.ndim};
        std::vector<std::int64_t> s(std::size_t(t.ndim), 1);
        for (int i = t.ndim - 2; i >= 0; --i) s[std::size_t(i)] = s[std::size_t(i) + 1] * t.shape[i + 1];
        return s;
    }

  private:
    void give_back() {
        if (plain_ != nullptr && plain_->deleter != nullptr) plain_->deleter(plain_);
        if (versioned_ != nullptr && versioned_->deleter != nullptr) versioned_->deleter(versioned_);
        plain_ = nullptr;
        versioned_ = nullptr;
    }
    Managed *plain_ = nullptr;
    ManagedVersioned *versioned_ = nullptr;
};

} // namespace subspan::dlpack
