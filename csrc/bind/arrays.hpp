// Array glue: any array library in, views out. NumPy arrays are read through NumPy's C API, everything else through
// versioned DLPack, without a copy.
#pragma once

#include "dlpack.hpp"
#include "overlap.hpp"
#include "subspan/views.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <string>
#include <utility>
#include <vector>

namespace subspan::bind {

namespace py = pybind11;

enum class DType { f32, f64 };

/// What to say to who passes the gradient of a convolution, of three axes or more, where a matrix was meant.
std::string convolution_hint(const std::vector<std::int64_t> &shape, const std::string &name);

/// What a binding knows of an array argument while it holds it. Owns the DLPack tensor of the exporter, if any.
class Array {
  public:
    /// Borrows `obj`; `name` is the argument's name in errors. Raises TypeError for what is not an array of float32 or
    /// float64 on the CPU. With `writable` a read-only array is a ValueError.
    Array(py::handle obj, const char *name, bool writable = false);
    Array(Array &&) noexcept = default;
    Array(const Array &) = delete;
    Array &operator=(const Array &) = delete;

    DType dtype() const { return dtype_; }
    const char *dtype_name() const { return dtype_ == DType::f32 ? "float32" : "float64"; }
    int ndim() const { return int(shape_.size()); }
    std::int64_t shape(int i) const { return shape_[std::size_t(i)]; }
    std::int64_t stride(int i) const { return strides_[std::size_t(i)]; } // in elements
    const void *data() const { return data_; }
    std::string shape_text() const { return bind::shape_text(shape_); }
    const char *name() const { return name_; }
    Layout layout() const { return {name_, data_, dtype_ == DType::f32 ? 4 : 8, shape_.data(), strides_.data(), ndim()}; }

    /// The array as a matrix; ValueError unless it has two dimensions.
    template <class T> MatrixView<T> matrix() const {
        require_ndim(2);
        return {static_cast<T *>(data_), shape_[0], shape_[1], strides_[0], strides_[1]};
    }
    /// The last two axes as matrices of a stack over `batch`, to which the leading axes are broadcast.
    template <class T> StackView<T> stack(const std::vector<std::int64_t> &batch) const {
        require_matrices();
        const std::size_t d = shape_.size();
        return {MatrixView<T>(static_cast<T *>(data_), shape_[d - 2], shape_[d - 1], strides_[d - 2], strides_[d - 1]),
                batch, leading_strides(batch, 2)};
    }
    /// The last axis as 1 x n matrices of a stack, likewise.
    template <class T> StackView<T> row_stack(const std::vector<std::int64_t> &batch) const {
        require_rows();
        const std::size_t d = shape_.size();
        return {MatrixView<T>(static_cast<T *>(data_), 1, shape_[d - 1], 0, strides_[d - 1]), batch,
                leading_strides(batch, 1)};
    }
    /// Leading axes before the last `core` ones.
    std::vector<std::int64_t> leading(int core = 2) const {
        return {shape_.begin(), shape_.end() - std::min<std::ptrdiff_t>(core, std::ptrdiff_t(shape_.size()))};
    }
    void require_matrices() const;
    void require_rows() const;
    /// Rows of samples: the array as a matrix, or a vector as one row.
    template <class T> MatrixView<T> rows() const {
        if (ndim() == 1) return {static_cast<T *>(data_), 1, shape_[0], shape_[0], strides_[0]};
        return matrix<T>();
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
    std::vector<std::int64_t> leading_strides(const std::vector<std::int64_t> &batch, std::size_t core) const;
    void require_vector(std::int64_t size) const;
    void from_numpy(const py::array &a, bool writable);
    void from_dlpack(py::handle obj, bool writable);
    void set_dtype(char kind, int bits);
    void settle(std::int64_t item);

    const char *name_;
    DType dtype_ = DType::f32;
    void *data_ = nullptr;
    std::vector<std::int64_t> shape_, strides_; // strides in elements
    py::object owner_;                          // keeps a NumPy array alive
    dlpack::Loan loan_;                         // keeps a tensor of DLPack alive
};

/// Shape to which leading axes broadcast, as in NumPy; `core` counts the trailing axes of each array that do not.
std::vector<std::int64_t> broadcast_leading(std::initializer_list<std::pair<const Array *, int>> arrays);

/// ValueError when writing `out` would change `other` before it is read: they share memory and are not the same view.
/// With `same` they may be the same view. Also when two elements of `out` are one.
void require_apart(const Array &out, const Array &other, bool same = false);

/// Calls f with a value of the dtype's C++ type: one switch inside each binding.
template <class F> decltype(auto) dispatch(DType d, F &&f) {
    return d == DType::f32 ? f(float{}) : f(double{});
}

} // namespace subspan::bind
