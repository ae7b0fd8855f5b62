#include "arrays.hpp"

#include <utility>

namespace subspan::bind {
namespace {

std::string type_name(py::handle h) { return py::str(py::type::handle_of(h).attr("__name__")); }

} // namespace

Array::Array(py::handle obj, const char *name, bool writable) : name_(name) {
    if (py::isinstance<py::array>(obj))
        from_numpy(py::reinterpret_borrow<py::array>(obj), writable);
    else
        from_dlpack(obj, writable);
}

void Array::set_dtype(char kind, int bits) {
    if (kind == 'f' && bits == 32) {
        dtype_ = DType::f32;
    } else if (kind == 'f' && bits == 64) {
        dtype_ = DType::f64;
    } else {
        const char *names[] = {"integers", "unsigned integers", "booleans", "complex numbers", "bfloat16"};
        const char kinds[] = "iubcB";
        std::string got = "an unsupported dtype";
        for (int i = 0; i < 5; ++i)
            if (kinds[i] == kind) got = names[i];
        if (kind == 'f') got = "float" + std::to_string(bits);
        throw py::type_error(std::string(name_) + " must be float32 or float64, got " + got +
                             "; convert it first, e.g. x.astype('float32') or x.to(torch.float32)");
    }
}

void Array::from_numpy(const py::array &a, bool writable) {
    const py::dtype d = a.dtype();
    if (d.byteorder() == '>')
        throw py::type_error(std::string(name_) + " has big-endian data; convert it with x.astype(x.dtype.newbyteorder('='))");
    set_dtype(d.kind(), int(d.itemsize() * 8));
    if (writable && !a.writeable()) throw py::value_error(std::string(name_) + " is read-only");
    const std::int64_t item = d.itemsize();
    shape_.reserve(std::size_t(a.ndim()));
    strides_.reserve(std::size_t(a.ndim()));
    bool misaligned = false;
    for (py::ssize_t i = 0; i < a.ndim(); ++i) {
        shape_.push_back(a.shape(i));
        misaligned = misaligned || (a.shape(i) > 1 && a.size() > 0 && a.strides(i) % item != 0);
        strides_.push_back(a.strides(i) / item);
    }
    if (misaligned)
        throw py::value_error(std::string(name_) + " is not aligned to its dtype (a field of a packed record?); copy it first");
    data_ = const_cast<void *>(a.data());
    owner_ = a;
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
    if (data_ == nullptr)
        throw py::value_error(std::string(name_) + " has no memory (a fake or a functional tensor?)");
    if (reinterpret_cast<std::uintptr_t>(data_) % std::uintptr_t(item) != 0)
        throw py::value_error(std::string(name_) + " is not aligned to its dtype (a field of a packed record?); copy it first");
}

void Array::from_dlpack(py::handle obj, bool writable) {
    if (!py::hasattr(obj, "__dlpack__"))
        throw py::type_error(std::string(name_) + " must be an array (NumPy, PyTorch, JAX, CuPy or anything with "
                                                  "__dlpack__), got " + type_name(obj));
    const auto on_the_cpu = [&](int type) {
        if (type != dlpack::kCPU && type != dlpack::kCUDAHost)
            throw py::type_error(std::string(name_) + " is on a device of DLPack type " + std::to_string(type) +
                                 (type == dlpack::kCUDA ? " (CUDA)" : "") +
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
    set_dtype(dtype.code < 7 ? kinds[dtype.code] : '?', dtype.bits);
    if (writable && loan_.read_only()) throw py::value_error(std::string(name_) + " is read-only");
    if (writable && loan_.is_copy())
        throw py::value_error(std::string(name_) + ": __dlpack__ gave a copy, and what is written to it would be lost");
    data_ = loan_.data();
    shape_ = loan_.shape();
    strides_ = loan_.strides();
    settle(dtype.bits / 8);
}

std::string convolution_hint(const std::vector<std::int64_t> &shape, const std::string &name) {
    if (shape.size() < 3) return "";
    std::int64_t columns = 1;
    for (std::size_t i = 1; i < shape.size(); ++i) columns *= shape[i];
    return "; the weight of a convolution is a matrix as " + name + ".flatten(1), here of shape (" + std::to_string(shape[0]) + ", " +
           std::to_string(columns) + ")";
}

void Array::require_ndim(int n) const {
    if (ndim() != n)
        throw py::value_error(std::string(name_) + " must have " + std::to_string(n) + " dimension" + (n == 1 ? "" : "s") +
                              ", got shape " + shape_text() + (n == 2 ? convolution_hint(shape_, name_) : ""));
}

void Array::require_vector(std::int64_t size) const {
    if (shape_[0] != size || (size > 1 && strides_[0] != 1))
        throw py::value_error(std::string(name_) + " must be contiguous of shape (" + std::to_string(size) + ",), got shape " +
                              shape_text());
}

void Array::require_dtype(DType d) const {
    if (dtype_ != d)
        throw py::type_error(std::string(name_) + " must be " + (d == DType::f32 ? "float32" : "float64") + ", got " +
                             dtype_name());
}

void Array::require_matrices() const {
    if (ndim() < 2)
        throw py::value_error(std::string(name_) + " must have at least 2 dimensions, got shape " + shape_text());
}

void Array::require_rows() const {
    if (ndim() < 1)
        throw py::value_error(std::string(name_) + " must have at least 1 dimension, got shape " + shape_text());
}

std::vector<std::int64_t> Array::leading_strides(const std::vector<std::int64_t> &batch, std::size_t core) const {
    const std::size_t mine = shape_.size() - core;
    std::vector<std::int64_t> strides(batch.size(), 0);
    bool fits = mine <= batch.size();
    for (std::size_t a = 0; fits && a < mine; ++a) {
        const std::size_t b = batch.size() - mine + a;
        if (shape_[a] == batch[b])
            strides[b] = shape_[a] == 1 ? 0 : strides_[a];
        else
            fits = shape_[a] == 1;
    }
    if (!fits)
        throw py::value_error("leading axes of " + std::string(name_) + ", shape " + shape_text() + ", do not broadcast to " +
                              bind::shape_text(batch));
    return strides;
}

std::vector<std::int64_t> broadcast_leading(std::initializer_list<std::pair<const Array *, int>> arrays) {
    std::vector<std::int64_t> batch;
    for (const auto &[a, core] : arrays) {
        const auto lead = a->leading(core);
        if (lead.size() > batch.size()) batch.insert(batch.begin(), lead.size() - batch.size(), 1);
        for (std::size_t i = 0; i < lead.size(); ++i) {
            auto &b = batch[batch.size() - lead.size() + i];
            if (b == 1)
                b = lead[i];
            else if (lead[i] != 1 && lead[i] != b)
                throw py::value_error("leading axes of " + std::string(a->name()) + ", shape " + a->shape_text() +
                                      ", do not broadcast with those of the other arguments");
        }
    }
    return batch;
}

void require_apart(const Array &out, const Array &other, bool same) { require_apart(out.layout(), other.layout(), same); }

} // namespace subspan::bind
