#include "array.hpp"

#include <algorithm>
#include <utility>

namespace subspan::bind {
namespace {

std::string type_name(py::handle h) { return py::str(py::type::handle_of(h).attr("__name__")); }

// What Python has for arrays that are not NumPy's own; looked up where one turns up.
py::object python(const char *name) { return py::module_::import("subspan._lib.arrays").attr(name); }

bool is_numpy(py::handle obj) { return Py_TYPE(obj.ptr()) == py::detail::npy_api::get().PyArray_Type_; }

} // namespace

void (*DeviceReader::read)(Array &, py::handle, const Call &, Access, bool) = nullptr;
void (*DeviceReader::wait)(std::uintptr_t) = nullptr;

Call::Call(py::handle context) {
    if (context.is_none()) return;
    const auto t = py::reinterpret_borrow<py::tuple>(context);
    stream = t[0].cast<std::uintptr_t>();
    device = t[1].cast<int>();
    like_cupy = t[2].cast<bool>();
    place = t[3];
}

Array Call::empty(const Shape &shape, DType dtype, const char *name) const {
    if (on_device()) {
        py::tuple t(shape.size());
        for (std::size_t i = 0; i < shape.size(); ++i) t[i] = shape[i];
        return Array(*this, place.attr("empty")(t, name_of(dtype)), name, Access::out, dtype == DType::u8);
    }
    const py::dtype d(dtype == DType::f32 ? py::detail::npy_api::NPY_FLOAT_
                                          : (dtype == DType::f64 ? py::detail::npy_api::NPY_DOUBLE_ : py::detail::npy_api::NPY_UBYTE_));
    return Array(*this, py::array(d, std::vector<py::ssize_t>(shape.begin(), shape.end())), name, Access::out, dtype == DType::u8);
}

Array Call::output(const py::object &out, const Shape &shape, DType dtype, const char *name) const {
    if (out.is_none()) return empty(shape, dtype, name);
    Array x(*this, out, name, Access::out);
    if (x.dtype() != dtype) throw py::type_error(std::string(name) + " must be " + name_of(dtype) + ", got " + x.dtype_name());
    x.require_shape(shape);
    return x;
}

Array::Array(const Call &call, py::handle obj, const char *name, Access access, bool bytes) : name_(name) {
    if (call.on_device()) {
        object_ = py::reinterpret_borrow<py::object>(obj);
        DeviceReader::read(*this, obj, call, access, bytes);
        if (reinterpret_cast<std::uintptr_t>(data_) % std::uintptr_t(size_of(dtype_)) != 0)
            throw py::value_error(std::string(name_) + " is not aligned to its dtype; copy it first");
        return;
    }
    object_ = py::reinterpret_borrow<py::object>(obj);
    if (is_numpy(obj)) {
        from_numpy(obj, access, bytes);
        return;
    }
    tells_ = access != Access::read;
    const py::object plain = python("prepared")(obj, name, int(access));
    if (py::isinstance<py::array>(plain)) {
        owner_ = plain;
        from_numpy(plain, access, bytes);
    } else {
        from_dlpack(plain, access, bytes);
    }
}

Array::~Array() {
    // Whoever lent the tensor may use its memory anew as soon as it is given back.
    if (loan_ && DeviceReader::wait != nullptr) DeviceReader::wait(stream_);
}

void Array::written() const {
    if (tells_) python("written")(object_);
}

void Array::set_dtype(char kind, int bits, bool bytes) {
    if (kind == 'f' && bits == 32) {
        dtype_ = DType::f32;
    } else if (kind == 'f' && bits == 64) {
        dtype_ = DType::f64;
    } else if (bytes && kind == 'u' && bits == 8) {
        dtype_ = DType::u8;
    } else {
        python("check_float")(object_, name_); // which says what to do
        const char *names[] = {"integers", "unsigned integers", "booleans", "complex numbers", "bfloat16"};
        const char kinds[] = "iubcB";
        std::string got = kind == 'f' ? "float" + std::to_string(bits) : "an unsupported dtype";
        for (int i = 0; i < 5; ++i)
            if (kinds[i] == kind) got = names[i];
        throw py::type_error(std::string(name_) + " must be float32 or float64, got " + got);
    }
}

void Array::from_numpy(py::handle obj, Access access, bool bytes) {
    const auto *a = py::detail::array_proxy(obj.ptr());
    const auto *d = py::detail::array_descriptor_proxy(a->descr);
    const bool swapped = d->byteorder != '=' && d->byteorder != '|';
    switch (swapped ? -1 : d->type_num) {
    case py::detail::npy_api::NPY_FLOAT_: dtype_ = DType::f32; break;
    case py::detail::npy_api::NPY_DOUBLE_: dtype_ = DType::f64; break;
    default: set_dtype(d->kind, d->type_num == py::detail::npy_api::NPY_UBYTE_ ? 8 : 0, bytes);
    }
    if (access != Access::read && (a->flags & py::detail::npy_api::NPY_ARRAY_WRITEABLE_) == 0) throw py::value_error(std::string(name_) + " is read-only");
    const std::int64_t item = size_of(dtype_);
    shape_.assign(a->dimensions, a->dimensions + a->nd);
    strides_.assign(a->strides, a->strides + a->nd);
    bool empty = false, misaligned = false;
    for (int i = 0; i < a->nd; ++i) {
        empty = empty || shape_[std::size_t(i)] == 0;
        misaligned = misaligned || (shape_[std::size_t(i)] > 1 && strides_[std::size_t(i)] % item != 0);
        strides_[std::size_t(i)] /= item;
    }
    if (misaligned && !empty) throw py::value_error(std::string(name_) + " is not aligned to its dtype (a field of a packed record?); copy it first");
    data_ = a->data;
    settle(item);
}

// What both ways in have in common: what a shape and a pointer must be, and strides that mean nothing made those of C order
// (NumPy gives an array without items strides of zero, a slice of one row keeps those of what it was cut from).
void Array::settle(std::int64_t item) {
    std::int64_t size = 1;
    for (const std::int64_t n : shape_) {
        if (n < 0) throw py::value_error(std::string(name_) + " has a negative shape, " + shape_text());
        if (n > 0 && size > (std::int64_t(1) << 62) / n)
            throw py::value_error(std::string(name_) + " has shape " + shape_text() + ", more items than there are numbers for");
        size *= std::max<std::int64_t>(n, 1);
    }
    const bool empty = std::find(shape_.begin(), shape_.end(), 0) != shape_.end();
    std::int64_t step = 1;
    for (std::size_t i = shape_.size(); i-- > 0;) {
        if (empty || shape_[i] <= 1) strides_[i] = step;
        step *= std::max<std::int64_t>(shape_[i], 1);
    }
    if (empty) return;
    if (data_ == nullptr) throw py::value_error(std::string(name_) + " has no memory (a fake or a functional tensor?)");
    if (reinterpret_cast<std::uintptr_t>(data_) % std::uintptr_t(item) != 0)
        throw py::value_error(std::string(name_) + " is not aligned to its dtype (a field of a packed record?); copy it first");
}

void Array::from_dlpack(py::handle obj, Access access, bool bytes) {
    if (!py::hasattr(obj, "__dlpack__"))
        throw py::type_error(std::string(name_) +
                             " must be an array (NumPy, PyTorch, JAX, CuPy or anything with "
                             "__dlpack__), got " +
                             type_name(obj));
    const auto on_the_cpu = [&](int type) {
        if (type != dlpack::kCPU && type != dlpack::kCUDAHost)
            throw py::type_error(std::string(name_) + " is on a device of DLPack type " + std::to_string(type) + (type == dlpack::kCUDA ? " (CUDA)" : "") +
                                 "; this operation runs on the CPU and moves no data by itself");
    };
    int said = dlpack::kCPU;
    const bool told = py::hasattr(obj, "__dlpack_device__");
    if (told) {
        const auto device = obj.attr("__dlpack_device__")().cast<py::tuple>();
        on_the_cpu(said = int(py::int_(device[0])));
    }
    py::object capsule;
    try {
        capsule = obj.attr("__dlpack__")(py::arg("max_version") = py::make_tuple(1, 0));
    } catch (py::error_already_set &e) {
        if (!e.matches(PyExc_TypeError)) throw; // an exporter from before DLPack 1.0 does not know the keyword
        capsule = obj.attr("__dlpack__")();
    }
    loan_ = dlpack::Loan(capsule, name_);
    on_the_cpu(loan_.tensor().device.type);
    if (told && loan_.tensor().device.type != said)
        throw py::type_error(std::string(name_) + ": __dlpack_device__ says device type " + std::to_string(said) +
                             ", and what __dlpack__ gave is on one of type " + std::to_string(loan_.tensor().device.type));
    const auto &dtype = loan_.tensor().dtype;
    const char kinds[] = "iuf?Bcb";
    set_dtype(dtype.code < 7 ? kinds[dtype.code] : '?', dtype.bits, bytes);
    if (access != Access::read && loan_.read_only()) throw py::value_error(std::string(name_) + " is read-only");
    if (access != Access::read && loan_.is_copy())
        throw py::value_error(std::string(name_) + ": __dlpack__ gave a copy, and what is written to it would be lost");
    data_ = loan_.data();
    shape_ = loan_.shape();
    strides_ = loan_.strides();
    settle(dtype.bits / 8);
}

std::string convolution_hint(const Shape &shape, const std::string &name) {
    if (shape.size() < 3) return "";
    std::int64_t columns = 1;
    for (std::size_t i = 1; i < shape.size(); ++i) columns *= shape[i];
    return "; the weight of a convolution is a matrix as " + name + ".flatten(1), here of shape (" + std::to_string(shape[0]) + ", " + std::to_string(columns) +
           ")";
}

void Array::require_ndim(int n) const {
    if (ndim() != n)
        throw py::value_error(std::string(name_) + " must have " + std::to_string(n) + " dimension" + (n == 1 ? "" : "s") + ", got shape " + shape_text() +
                              (n == 2 ? convolution_hint(shape_, name_) : ""));
}

void Array::require_vector(std::int64_t size) const {
    if (shape_[0] != size || (size > 1 && strides_[0] != 1))
        throw py::value_error(std::string(name_) + " must be contiguous of shape (" + std::to_string(size) + ",), got shape " + shape_text());
}

void Array::require_shape(const Shape &wanted) const {
    if (shape_ != wanted) throw py::value_error(std::string(name_) + " must have shape " + bind::shape_text(wanted) + ", got " + shape_text());
}

void Array::require_dtype(DType d) const {
    if (dtype_ != d) throw py::type_error(std::string(name_) + " must be " + name_of(d) + ", got " + dtype_name());
}

void Array::require_dtype_of(const Array &first) const {
    if (dtype_ != first.dtype_) throw py::type_error(std::string(name_) + " must be " + first.dtype_name() + " as " + first.name_ + " is, got " + dtype_name());
}

void Array::add_axis(bool column) {
    const std::int64_t step = ndim() > 0 ? shape_.back() * strides_.back() : 1;
    shape_.insert(shape_.end() - (column ? 0 : 1), 1);
    strides_.insert(strides_.end() - (column ? 0 : 1), column ? 1 : step);
}

void *Array::contiguous() const {
    std::int64_t step = 1;
    if (std::find(shape_.begin(), shape_.end(), 0) != shape_.end()) return data_; // no items
    for (int i = ndim() - 1; i >= 0; --i) {
        if (shape(i) > 1 && stride(i) != step) throw py::value_error(std::string(name_) + " must be C-contiguous");
        step *= shape(i);
    }
    return data_;
}

void Array::require_matrices() const {
    if (ndim() < 2)
        throw py::value_error(std::string(name_) + " must have at least 2 dimensions, got shape " + shape_text() +
                              (ndim() == 1 ? std::string("; one column is ") + name_ + "[:, None]" : ""));
}

void Array::require_rows() const {
    if (ndim() < 1) throw py::value_error(std::string(name_) + " must have at least 1 dimension, got shape " + shape_text());
}

Shape Array::leading_strides(const Shape &batch, std::size_t inner) const {
    const std::size_t mine = shape_.size() - inner;
    Shape strides(batch.size(), 0);
    bool fits = mine <= batch.size();
    for (std::size_t a = 0; fits && a < mine; ++a) {
        const std::size_t b = batch.size() - mine + a;
        if (shape_[a] == batch[b])
            strides[b] = shape_[a] == 1 ? 0 : strides_[a];
        else
            fits = shape_[a] == 1;
    }
    if (!fits) throw py::value_error("leading axes of " + std::string(name_) + ", shape " + shape_text() + ", do not broadcast to " + bind::shape_text(batch));
    return strides;
}

py::array in_numpy(py::handle x) {
    if (PyList_Check(x.ptr()) || PyTuple_Check(x.ptr()) || !py::hasattr(x, "__dlpack__")) return py::module_::import("numpy").attr("asarray")(x);
    return py::module_::import("subspan._lib.device").attr("numpy")(x);
}

py::object summed_to(const Call &call, const Array &full, py::handle given, DType dtype) {
    const py::tuple shape = py::hasattr(given, "shape") ? given.attr("shape") : py::module_::import("numpy").attr("shape")(given);
    if (call.on_device()) return call.place.attr("summed_to")(full.object(), shape, name_of(dtype));
    const std::size_t extra = full.shape().size() - shape.size();
    py::list axes;
    std::vector<py::ssize_t> sizes;
    for (std::size_t i = 0; i < full.shape().size(); ++i) {
        const bool one = i >= extra && shape[i - extra].cast<std::int64_t>() == 1 && full.shape()[i] != 1;
        if (i < extra || one) axes.append(i);
        if (i >= extra) sizes.push_back(one ? 1 : py::ssize_t(full.shape()[i]));
    }
    if (axes.empty() && full.dtype() == dtype) return full.object();
    const py::array_t<double, py::array::c_style | py::array::forcecast> sums =
        full.object().attr("sum")(py::arg("axis") = py::tuple(axes), py::arg("dtype") = "float64");
    if (dtype == DType::f64) return sums.attr("reshape")(shape);
    py::array_t<float> out(sizes);
    std::transform(sums.data(), sums.data() + sums.size(), out.mutable_data(), [](double x) { return float(x); });
    return out;
}

Shape broadcast_leading(std::initializer_list<std::pair<const Array *, int>> arrays) {
    Shape batch;
    bool fits = true;
    for (const auto &[a, inner] : arrays) {
        const std::size_t lead = std::size_t(std::max(a->ndim() - inner, 0));
        if (lead > batch.size()) batch.insert(batch.begin(), lead - batch.size(), 1);
        for (std::size_t i = 0; i < lead; ++i) {
            auto &b = batch[batch.size() - lead + i];
            const std::int64_t n = a->shape(int(i));
            if (b == 1)
                b = n;
            else if (n != 1 && n != b)
                fits = false;
        }
    }
    if (fits) return batch;
    std::string shapes;
    for (const auto &[a, inner] : arrays) shapes += (shapes.empty() ? "" : ", ") + std::string(a->name()) + " " + a->shape_text();
    throw py::value_error("leading axes do not broadcast: " + shapes);
}

} // namespace subspan::bind
