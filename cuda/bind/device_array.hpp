// CUDA arrays of any library as stacks of matrices. CuPy and PyTorch are asked for pointer and strides directly, which takes
// well under a microsecond; every other library is read through DLPack on the caller's stream.
#pragma once

#include "dlpack.hpp"
#include "overlap.hpp"
#include "subspan/cuda/types.hpp"

#include <cstdint>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <string>
#include <vector>

namespace subspan::bind {

namespace py = pybind11;
using cuda::DType;
using cuda::Stack;

/// The stream that a call runs on, the device that all its arrays must be on, and how to get memory to work in.
struct Call {
    std::uintptr_t stream = 0;
    int device = 0;
    py::object allocate;  // bytes -> an array of uint8 on the device
    bool like_cupy = true; // whose attributes to try first: those that are not there cost a microsecond
    explicit Call(const py::tuple &t)
        : stream(t[0].cast<std::uintptr_t>()), device(t[1].cast<int>()), allocate(t[2].cast<py::object>()), like_cupy(t[3].cast<bool>()) {}
};

class DeviceArray {
  public:
    /// Borrows `obj`. TypeError for what is not a floating-point array on a CUDA device, ValueError for another device, and
    /// with `writable` for what is read-only.
    DeviceArray(py::handle obj, const char *name, const Call &call, bool writable = false);
    DeviceArray(DeviceArray &&) noexcept = default;
    DeviceArray(const DeviceArray &) = delete;
    DeviceArray &operator=(const DeviceArray &) = delete;
    ~DeviceArray();

    DType dtype() const { return dtype_; }
    const char *name() const { return name_; }
    int ndim() const { return int(shape_.size()); }
    std::int64_t shape(int i) const { return shape_[std::size_t(i)]; }
    std::int64_t stride(int i) const { return strides_[std::size_t(i)]; }
    void *data() const { return data_; }
    std::string shape_text() const { return bind::shape_text(shape_); }
    Layout layout() const { return {name_, data_, cuda::size_of(dtype_), shape_.data(), strides_.data(), ndim()}; }
    std::vector<std::int64_t> leading(int core = 2) const;

    /// The last two axes as matrices (`core` 2), or the last one as 1 x n matrices (1), over `batch`.
    Stack stack(const std::vector<std::int64_t> &batch, int core = 2) const;
    /// The array broadcast to a whole shape, whose last `core` axes are the matrices.
    Stack broadcast(const std::vector<std::int64_t> &wanted, int core) const;
    /// Raises ValueError unless the shape is this one.
    void require_shape(const std::vector<std::int64_t> &wanted) const;
    void require_dtype(DType d) const;
    /// The first item; ValueError unless items lie one after the other.
    void *contiguous() const;

  private:
    void set_dtype(const std::string &name);
    void from_torch(py::handle obj);
    void from_cupy(py::handle obj, py::handle memory);
    void from_dlpack(py::handle obj, const Call &call, bool writable);

    const char *name_;
    DType dtype_ = DType::f32;
    void *data_ = nullptr;
    int device_ = 0;
    std::vector<std::int64_t> shape_, strides_;
    dlpack::Loan loan_; // a tensor of DLPack, given back after the stream has read it
    std::uintptr_t stream_ = 0;
};

inline void require_apart(const DeviceArray &out, const DeviceArray &other, bool same = false) {
    require_apart(out.layout(), other.layout(), same);
}

/// Memory of the caller's library, alive until this goes away; its context may be used meanwhile.
class Memory {
  public:
    Memory(const Call &call, std::int64_t bytes);
    const cuda::Context &context() const { return context_; }

  private:
    cuda::Context context_;
    py::object owner_;
};

} // namespace subspan::bind
