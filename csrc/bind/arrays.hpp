// Array glue: any array library in, views out. NumPy arrays are read through NumPy's C API, everything else through
// versioned DLPack, without a copy.
#pragma once

#include "subspan/views.hpp"

#include <cstdint>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <string>
#include <vector>

namespace subspan::bind {

namespace py = pybind11;

enum class DType { f32, f64 };

/// What a binding knows of an array argument while it holds it. Owns the DLPack tensor of the exporter, if any.
class Array {
  public:
    /// Borrows `obj`; `name` is the argument's name in errors. Raises TypeError for what is not an array of float32 or
    /// float64 on the CPU. With `writable` a read-only array is a ValueError.
    Array(py::handle obj, const char *name, bool writable = false);
    Array(Array &&) noexcept;
    Array(const Array &) = delete;
    Array &operator=(const Array &) = delete;
    ~Array();

    DType dtype() const { return dtype_; }
    const char *dtype_name() const { return dtype_ == DType::f32 ? "float32" : "float64"; }
    int ndim() const { return int(shape_.size()); }
    std::int64_t shape(int i) const { return shape_[std::size_t(i)]; }
    std::string shape_text() const;
    const char *name() const { return name_; }

    /// The array as a matrix; ValueError unless it has two dimensions.
    template <class T> MatrixView<T> matrix() const {
        require_ndim(2);
        return {static_cast<T *>(data_), shape_[0], shape_[1], strides_[0], strides_[1]};
    }
    /// The array as a contiguous vector; ValueError otherwise.
    template <class T> T *vector(std::int64_t size) const {
        require_ndim(1);
        require_vector(size);
        return static_cast<T *>(data_);
    }
    void require_ndim(int n) const;
    void require_dtype(DType d) const;

  private:
    void require_vector(std::int64_t size) const;
    void from_numpy(const py::array &a, bool writable);
    void from_dlpack(py::handle obj, bool writable);
    void set_dtype(char kind, int bits);

    const char *name_;
    DType dtype_ = DType::f32;
    void *data_ = nullptr;
    std::vector<std::int64_t> shape_, strides_; // strides in elements
    py::object owner_;                          // keeps a NumPy array alive
    void *managed_ = nullptr;                   // a DLPack tensor to release
    bool versioned_ = false;
};

/// Calls f with a value of the dtype's C++ type: one switch inside each binding.
template <class F> decltype(auto) dispatch(DType d, F &&f) {
    return d == DType::f32 ? f(float{}) : f(double{});
}

} // namespace subspan::bind
