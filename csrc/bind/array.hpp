// Array glue of both modules: arrays of any library in, views out. NumPy arrays are read through NumPy's C API, CuPy arrays and
// CUDA tensors by their attributes, which takes well under a microsecond, everything else through versioned DLPack; no data
// is copied.
#pragma once

#include "dlpack.hpp"
#include "overlap.hpp"
#include "subspan/options.hpp"
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
using Shape = std::vector<std::int64_t>;

class Array;

/// Where a call runs. On a device: its stream, and the library that gives memory for results and work.
struct Call {
    std::uintptr_t stream = 0;
    int device = -1;       // -1: the host
    bool like_cupy = true; // whose attributes to try first: those that are not there cost a microsecond
    py::object place;      // the Python side's: allocate, empty, converted, ...

    Call() = default;
    /// None for the host, (stream, device, like_cupy, place) for a device.
    explicit Call(py::handle context);
    bool on_device() const { return device >= 0; }
    /// A fresh array of the caller's library (on the host: of NumPy).
    Array empty(const Shape &shape, DType dtype, const char *name = "out") const;
    /// `out`, which must have this shape and dtype, or where it is None a fresh array.
    Array output(const py::object &out, const Shape &shape, DType dtype, const char *name = "out") const;
};

/// How an argument is used: read, written to as a result, changed in place.
enum class Access { read, out, in_place };

/// What to say to who passes the gradient of a convolution, of three axes or more, where a matrix was meant.
std::string convolution_hint(const Shape &shape, const std::string &name);

/// What a binding knows of an array argument while it holds it. Owns the DLPack tensor of the exporter, if any.
class Array {
  public:
    /// Borrows `obj`; `name` is the argument's name in errors and must outlive this. TypeError for what is no array of
    /// floats where the call runs (float32 and float64 on the host), ValueError for what may not be written to.
    Array(const Call &call, py::handle obj, const char *name, Access access = Access::read, bool bytes = false);
    Array(py::handle obj, const char *name, bool writable = false) : Array(Call(), obj, name, writable ? Access::out : Access::read) {}
    Array(Array &&) noexcept = default;
    Array(const Array &) = delete;
    Array &operator=(Array &&) noexcept = default;
    Array &operator=(const Array &) = delete;
    ~Array();

    DType dtype() const { return dtype_; }
    const char *dtype_name() const { return name_of(dtype_); }
    int ndim() const { return int(shape_.size()); }
    std::int64_t shape(int i) const { return shape_[std::size_t(i)]; }
    std::int64_t stride(int i) const { return strides_[std::size_t(i)]; } // in elements
    const Shape &shape() const { return shape_; }
    void *data() const { return data_; }
    std::string shape_text() const { return bind::shape_text(shape_); }
    const char *name() const { return name_; }
    Layout layout() const { return {name_, data_, size_of(dtype_), shape_.data(), strides_.data(), ndim()}; }
    /// The object that was given, or was made for the caller.
    const py::object &object() const { return object_; }
    /// Sizes of the last two axes.
    std::int64_t rows() const { return shape_[shape_.size() - 2]; }
    std::int64_t cols() const { return shape_.back(); }

    /// A vector becomes a matrix of one column, or of one row.
    void as_matrix(bool column) {
        if (ndim() == 1) add_axis(column);
    }
    /// A new axis of one: the last one (the vectors become columns), or the one before it (rows).
    void add_axis(bool column);
    /// Tells the library that the array was written to.
    void written() const;

    /// The array as a matrix; ValueError unless it has two dimensions.
    template <class T> MatrixView<T> matrix() const {
        require_ndim(2);
        return {static_cast<T *>(data_), shape_[0], shape_[1], strides_[0], strides_[1]};
    }
    /// The last two axes as matrices of a stack over `batch`, to which the leading axes are broadcast.
    template <class T> StackView<T> stack(const Shape &batch) const {
        require_matrices();
        const std::size_t d = shape_.size();
        return {MatrixView<T>(static_cast<T *>(data_), shape_[d - 2], shape_[d - 1], strides_[d - 2], strides_[d - 1]), batch, leading_strides(batch, 2)};
    }
    /// The last axis as 1 x n matrices of a stack, likewise.
    template <class T> StackView<T> row_stack(const Shape &batch) const {
        require_rows();
        const std::size_t d = shape_.size();
        return {MatrixView<T>(static_cast<T *>(data_), 1, shape_[d - 1], 0, strides_[d - 1]), batch, leading_strides(batch, 1)};
    }
    /// Leading axes before the last `inner` ones.
    Shape leading(int inner = 2) const { return {shape_.begin(), shape_.end() - std::min<std::ptrdiff_t>(inner, std::ptrdiff_t(shape_.size()))}; }
    void require_matrices() const;
    void require_rows() const;
    /// Rows of samples: the array as a matrix, or a vector as one row.
    template <class T> MatrixView<T> as_rows() const {
        if (ndim() == 1) return {static_cast<T *>(data_), 1, shape_[0], shape_[0], strides_[0]};
        return matrix<T>();
    }
    /// The array as a contiguous vector; ValueError otherwise.
    template <class T> T *vector(std::int64_t size) const {
        require_ndim(1);
        require_vector(size);
        return static_cast<T *>(data_);
    }
    /// The first item; ValueError unless items lie one after the other.
    void *contiguous() const;
    void require_ndim(int n) const;
    void require_shape(const Shape &wanted) const;
    void require_dtype(DType d) const;
    /// TypeError, which names both, unless the dtypes are the same.
    void require_dtype_of(const Array &first) const;

    /// Strides in elements of the leading axes over `batch`, to which they broadcast.
    Shape leading_strides(const Shape &batch, std::size_t inner) const;

  private:
    friend struct Call;
    friend class DeviceReader;
    Array(const char *name) : name_(name) {}
    void require_vector(std::int64_t size) const;
    void from_numpy(py::handle a, Access access, bool bytes);
    void from_dlpack(py::handle obj, Access access, bool bytes);
    void set_dtype(char kind, int bits, bool bytes);
    void settle(std::int64_t item);

    const char *name_;
    DType dtype_ = DType::f32;
    bool tells_ = false; // whether its library wants to hear of writes
    void *data_ = nullptr;
    Shape shape_, strides_; // strides in elements
    py::object object_, owner_;
    dlpack::Loan loan_; // a tensor of DLPack; on a device it goes back after the stream has read it
    std::uintptr_t stream_ = 0;
};

/// Fills arrays of a device; the module of the CUDA kernels sets these.
class DeviceReader {
  public:
    static void (*read)(Array &, py::handle, const Call &, Access, bool bytes);
    static void (*wait)(std::uintptr_t stream);

  protected:
    static const char *name(const Array &a) { return a.name_; }
    static DType &dtype(Array &a) { return a.dtype_; }
    static void *&data(Array &a) { return a.data_; }
    static Shape &shape(Array &a) { return a.shape_; }
    static Shape &strides(Array &a) { return a.strides_; }
    static dlpack::Loan &loan(Array &a) { return a.loan_; }
    static std::uintptr_t &stream(Array &a) { return a.stream_; }
    static py::object &owner(Array &a) { return a.owner_; }
    static bool &tells(Array &a) { return a.tells_; }
};

/// Shape to which leading axes broadcast, as in NumPy; `inner` counts the trailing axes of each array that do not.
Shape broadcast_leading(std::initializer_list<std::pair<const Array *, int>> arrays);

/// What NumPy makes of lists and of arrays on the CPU of any library, without a copy of those.
py::array in_numpy(py::handle x);

/// The gradient of an array that was broadcast from what is shaped like `given`, in this dtype; summed in double on the host.
py::object summed_to(const Call &call, const Array &full, py::handle given, DType dtype);

/// ValueError when writing `out` would change `other` before it is read: they share memory and are not the same view.
/// With `same` they may be the same view. Also when two elements of `out` are one.
inline void check_no_overlap(const Array &out, const Array &other, bool same = false) { check_no_overlap(out.layout(), other.layout(), same); }

/// ValueError for more columns than can be orthonormal.
inline void require_tall(const Array &x) {
    if (x.cols() > x.rows())
        throw py::value_error(std::string(x.name()) + " has " + std::to_string(x.cols()) + " columns of " + std::to_string(x.rows()) +
                              " entries: so many cannot be orthonormal");
}

inline void require_float32_or_64(const Array &x, const char *why = "") {
    if (x.dtype() != DType::f32 && x.dtype() != DType::f64)
        throw py::type_error(std::string(x.name()) + " must be float32 or float64, got " + x.dtype_name() + why);
}

/// Calls f with a value of the dtype's C++ type: one switch inside each binding.
template <class F> decltype(auto) dispatch(DType d, F &&f) { return d == DType::f32 ? f(float{}) : f(double{}); }

} // namespace subspan::bind
