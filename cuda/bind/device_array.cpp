#include "device_array.hpp"

#include "subspan/cuda/runtime.hpp"

#include <algorithm>

namespace subspan::bind {
namespace {

// Attribute, or null without an error set.
py::object attribute(py::handle obj, const char *name) {
    PyObject *p = PyObject_GetAttrString(obj.ptr(), name);
    if (p == nullptr) {
        if (PyErr_ExceptionMatches(PyExc_AttributeError) == 0) throw py::error_already_set();
        PyErr_Clear();
    }
    return py::reinterpret_steal<py::object>(p);
}

} // namespace

DeviceArray::DeviceArray(py::handle obj, const char *name, const Call &call, bool writable) : name_(name) {
    const auto as_torch = [&] {
        if (!attribute(obj, "data_ptr")) return false;
        from_torch(obj);
        return true;
    };
    const auto as_cupy = [&] {
        const auto data = attribute(obj, "data");
        const auto memory = data ? attribute(data, "ptr") : py::object();
        if (!memory) return false;
        from_cupy(obj, memory);
        return true;
    };
    const bool done = call.like_cupy ? as_cupy() || as_torch() : as_torch() || as_cupy();
    if (!done) from_dlpack(obj, call, writable);
    if (reinterpret_cast<std::uintptr_t>(data_) % std::uintptr_t(cuda::size_of(dtype_)) != 0)
        throw py::value_error(std::string(name_) + " is not aligned to its dtype; copy it first");
    if (device_ != call.device)
        throw py::value_error(std::string(name) + " is on CUDA device " + std::to_string(device_) + " and the call on device " +
                              std::to_string(call.device) + "; move it there first");
}

DeviceArray::~DeviceArray() {
    // Whoever lent the tensor may use its memory anew as soon as it is given back.
    if (loan_) cuda::wait_for(reinterpret_cast<void *>(stream_));
}

void DeviceArray::set_dtype(const std::string &name) {
    const std::string last = name.substr(name.rfind('.') + 1); // torch.float32
    for (const DType d : {DType::f16, DType::bf16, DType::f32, DType::f64, DType::u8})
        if (last == cuda::name_of(d)) {
            dtype_ = d;
            return;
        }
    throw py::type_error(std::string(name_) + " must be float16, bfloat16, float32 or float64, got " + last +
                         "; convert it first, e.g. x.astype('float32') or x.to(torch.float32)");
}

void DeviceArray::from_torch(py::handle obj) {
    if (!py::cast<bool>(obj.attr("is_cuda")))
        throw py::type_error(std::string(name_) + " is on the CPU and other arguments are on a CUDA device; move it first, e.g. " + name_ +
                             ".to(device)");
    set_dtype(py::str(obj.attr("dtype")));
    data_ = reinterpret_cast<void *>(obj.attr("data_ptr")().cast<std::uintptr_t>());
    device_ = obj.attr("get_device")().cast<int>();
    for (const auto n : obj.attr("shape")) shape_.push_back(n.cast<std::int64_t>());
    for (const auto n : obj.attr("stride")()) strides_.push_back(n.cast<std::int64_t>());
}

void DeviceArray::from_cupy(py::handle obj, py::handle pointer) {
    const py::object dtype = obj.attr("dtype");
    const int number = py::isinstance<py::dtype>(dtype) ? py::reinterpret_borrow<py::dtype>(dtype).num() : -1;
    switch (number) { // NumPy's numbers: text takes microseconds
    case 23: dtype_ = DType::f16; break;
    case 11: dtype_ = DType::f32; break;
    case 12: dtype_ = DType::f64; break;
    default: set_dtype(py::str(dtype));
    }
    data_ = reinterpret_cast<void *>(pointer.cast<std::uintptr_t>());
    device_ = obj.attr("device").attr("id").cast<int>();
    const std::int64_t item = cuda::size_of(dtype_);
    for (const auto n : obj.attr("shape")) shape_.push_back(n.cast<std::int64_t>());
    for (const auto n : obj.attr("strides")) {
        const auto bytes = n.cast<std::int64_t>();
        if (bytes % item != 0) throw py::value_error(std::string(name_) + " has strides that are no multiples of its items");
        strides_.push_back(bytes / item);
    }
}

void DeviceArray::from_dlpack(py::handle obj, const Call &call, bool writable) {
    const auto where = attribute(obj, "__dlpack_device__");
    if (!where)
        throw py::type_error(std::string(name_) + " must be an array on a CUDA device (CuPy, PyTorch, JAX or anything with __dlpack__), got " +
                             std::string(py::str(py::type::handle_of(obj).attr("__name__"))));
    const auto device = where().cast<py::tuple>();
    if (device[0].cast<int>() != dlpack::kCUDA)
        throw py::type_error(std::string(name_) + " is not in CUDA device memory and other arguments are; move it first");
    device_ = device[1].cast<int>();
    stream_ = call.stream;
    // The standard's stream numbers: 1 is the legacy default stream, which the runtime calls 0.
    const py::int_ stream(call.stream == 0 ? std::uintptr_t(1) : call.stream);
    const auto capsule = obj.attr("__dlpack__")(py::arg("stream") = stream, py::arg("max_version") = py::make_tuple(1, 0));
    loan_ = dlpack::Loan(capsule, name_);
    const auto &inside = loan_.tensor().device;
    if (int(inside.type) != dlpack::kCUDA || inside.id != device_)
        throw py::value_error(std::string(name_) + " says that it is on CUDA device " + std::to_string(device_) +
                              ", and its DLPack capsule names device type " + std::to_string(int(inside.type)) + ", number " +
                              std::to_string(inside.id));
    const auto &dtype = loan_.tensor().dtype;
    const char *codes[] = {"int", "uint", "float", "opaque", "bfloat", "complex", "bool"};
    set_dtype((dtype.code < 7 ? codes[dtype.code] : "unknown") + std::to_string(dtype.bits));
    if (writable && loan_.read_only()) throw py::value_error(std::string(name_) + " is read-only");
    data_ = loan_.data();
    shape_ = loan_.shape();
    strides_ = loan_.strides();
}

std::vector<std::int64_t> DeviceArray::leading(int core) const {
    return {shape_.begin(), shape_.end() - std::min<std::ptrdiff_t>(core, std::ptrdiff_t(shape_.size()))};
}

Stack DeviceArray::stack(const std::vector<std::int64_t> &batch, int core) const {
    const int d = ndim();
    if (d < core)
        throw py::value_error(std::string(name_) + " must have at least " + std::to_string(core) + " dimension" + (core == 1 ? "" : "s") +
                              ", got shape " + shape_text());
    std::vector<std::int64_t> whole = batch;
    whole.insert(whole.end(), shape_.end() - core, shape_.end());
    return broadcast(whole, core);
}

Stack DeviceArray::broadcast(const std::vector<std::int64_t> &wanted, int core) const {
    const int all = int(wanted.size()), mine = ndim();
    std::vector<std::int64_t> steps(wanted.size(), 0);
    bool fits = mine <= all;
    for (int a = 0; a < mine && fits; ++a) {
        const int b = all - mine + a;
        if (shape(a) == wanted[std::size_t(b)])
            steps[std::size_t(b)] = shape(a) == 1 ? 0 : stride(a);
        else
            fits = shape(a) == 1;
    }
    for (int a = 0; a < mine - all; ++a) fits = false;
    if (!fits)
        throw py::value_error("leading axes of " + std::string(name_) + ", shape " + shape_text() + ", do not broadcast to " + bind::shape_text(wanted));
    Stack s;
    s.data = data_;
    s.dtype = dtype_;
    const auto at = [&](int from_end) { return std::size_t(all - from_end); };
    s.cols = wanted[at(1)];
    s.col_stride = s.cols <= 1 ? 1 : steps[at(1)];
    s.rows = core == 2 ? wanted[at(2)] : 1;
    s.row_stride = core == 2 ? (s.rows <= 1 ? s.cols : steps[at(2)]) : 0;
    // Axes from the last to the first; those that lie one after the other in memory are one axis.
    std::vector<std::int64_t> shapes, strides;
    for (int b = all - core - 1; b >= 0; --b) {
        const std::int64_t n = wanted[std::size_t(b)], step = steps[std::size_t(b)];
        if (n == 1) continue;
        if (!shapes.empty() && step == shapes.back() * strides.back()) {
            shapes.back() *= n;
        } else {
            shapes.push_back(n);
            strides.push_back(step);
        }
    }
    if (shapes.size() > std::size_t(cuda::kAxes))
        throw py::value_error(std::string(name_) + " has " + std::to_string(shapes.size()) + " leading axes that are not contiguous; at most " +
                              std::to_string(cuda::kAxes) + " are taken");
    s.axes = int(shapes.size());
    for (int i = 0; i < s.axes; ++i) {
        s.shape[i] = shapes[std::size_t(s.axes - 1 - i)];
        s.stride[i] = strides[std::size_t(s.axes - 1 - i)];
    }
    return s;
}

void DeviceArray::require_shape(const std::vector<std::int64_t> &wanted) const {
    if (shape_ != wanted) throw py::value_error(std::string(name_) + " must have shape " + bind::shape_text(wanted) + ", got " + shape_text());
}

void DeviceArray::require_dtype(DType d) const {
    if (dtype_ != d) throw py::type_error(std::string(name_) + " must be " + cuda::name_of(d) + ", got " + cuda::name_of(dtype_));
}

void *DeviceArray::contiguous() const {
    std::int64_t step = 1;
    for (int i = ndim() - 1; i >= 0; --i) {
        if (shape(i) > 1 && stride(i) != step) throw py::value_error(std::string(name_) + " must be C-contiguous");
        step *= shape(i);
    }
    return data_;
}

Memory::Memory(const Call &call, std::int64_t bytes) {
    context_.stream = reinterpret_cast<void *>(call.stream);
    context_.device = call.device;
    if (bytes == 0) return;
    owner_ = call.allocate(bytes);
    if (const auto pointer = attribute(owner_, "data_ptr"))
        context_.workspace = reinterpret_cast<void *>(pointer().cast<std::uintptr_t>());
    else
        context_.workspace = reinterpret_cast<void *>(owner_.attr("data").attr("ptr").cast<std::uintptr_t>());
    context_.workspace_bytes = bytes;
}

} // namespace subspan::bind
