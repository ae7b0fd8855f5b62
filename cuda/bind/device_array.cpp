#include "device.hpp"

#include "register.hpp"
#include "subspan/cuda/assign.hpp"
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

class Reader : public DeviceReader {
  public:
    static void read(Array &x, py::handle obj, const Call &call, Access access, bool bytes) {
        int device = -1;
        const auto as_torch = [&] {
            if (!attribute(obj, "data_ptr")) return false;
            device = from_torch(x, obj, access, bytes);
            return true;
        };
        const auto as_cupy = [&] {
            const auto data = attribute(obj, "data");
            const auto memory = data ? attribute(data, "ptr") : py::object();
            if (!memory) return false;
            device = from_cupy(x, obj, memory, bytes);
            return true;
        };
        const bool done = call.like_cupy ? as_cupy() || as_torch() : as_torch() || as_cupy();
        if (!done) device = from_dlpack(x, obj, call, access, bytes);
        if (device != call.device)
            throw py::value_error(std::string(name(x)) + " is on CUDA device " + std::to_string(device) + " and the call on device " +
                                  std::to_string(call.device) + "; move it there first");
    }

  private:
    static void set_dtype(Array &x, const std::string &text, bool bytes) {
        const std::string last = text.substr(text.rfind('.') + 1); // torch.float32
        for (const DType d : {DType::f16, DType::bf16, DType::f32, DType::f64, DType::u8})
            if (last == name_of(d) && bytes == (d == DType::u8)) {
                dtype(x) = d;
                return;
            }
        if (bytes) throw py::type_error(std::string(name(x)) + " must be uint8, got " + last);
        throw py::type_error(std::string(name(x)) + " must be float16, bfloat16, float32 or float64, got " + last +
                             "; convert it first, e.g. x.astype('float32') or x.to(torch.float32)");
    }
    // Each gives the number of the device.
    static int from_torch(Array &x, py::handle given, Access access, bool bytes) {
        py::object obj = py::reinterpret_borrow<py::object>(given);
        if (!py::cast<bool>(obj.attr("is_cuda")))
            throw py::type_error(std::string(name(x)) + " is on the CPU and other arguments are on a CUDA device; move it first, e.g. " + name(x) +
                                 ".to(device)");
        // What autograd follows, or a lazy minus sign: Python says no, or resolves it.
        if (py::cast<bool>(obj.attr("requires_grad")) || py::cast<bool>(obj.attr("is_neg")())) {
            obj = py::module_::import("subspan._lib.arrays").attr("prepared")(obj, name(x), int(access));
            owner(x) = obj;
        }
        tells(x) = access != Access::read;
        set_dtype(x, py::str(obj.attr("dtype")), bytes);
        data(x) = reinterpret_cast<void *>(obj.attr("data_ptr")().cast<std::uintptr_t>());
        for (const auto n : obj.attr("shape")) shape(x).push_back(n.cast<std::int64_t>());
        for (const auto n : obj.attr("stride")()) strides(x).push_back(n.cast<std::int64_t>());
        return obj.attr("get_device")().cast<int>();
    }
    static int from_cupy(Array &x, py::handle obj, py::handle pointer, bool bytes) {
        const py::object dt = obj.attr("dtype");
        const int number = py::isinstance<py::dtype>(dt) && !bytes ? py::reinterpret_borrow<py::dtype>(dt).num() : -1;
        switch (number) { // NumPy's numbers: text takes microseconds
        case 23: dtype(x) = DType::f16; break;
        case 11: dtype(x) = DType::f32; break;
        case 12: dtype(x) = DType::f64; break;
        default: set_dtype(x, py::str(dt), bytes);
        }
        data(x) = reinterpret_cast<void *>(pointer.cast<std::uintptr_t>());
        const std::int64_t item = size_of(dtype(x));
        for (const auto n : obj.attr("shape")) shape(x).push_back(n.cast<std::int64_t>());
        for (const auto n : obj.attr("strides")) {
            const auto step = n.cast<std::int64_t>();
            if (step % item != 0) throw py::value_error(std::string(name(x)) + " has strides that are no multiples of its items");
            strides(x).push_back(step / item);
        }
        return obj.attr("device").attr("id").cast<int>();
    }
    static int from_dlpack(Array &x, py::handle obj, const Call &call, Access access, bool bytes) {
        const auto where = attribute(obj, "__dlpack_device__");
        if (!where)
            throw py::type_error(std::string(name(x)) + " must be an array on a CUDA device (CuPy, PyTorch, JAX or anything with __dlpack__), got " +
                                 std::string(py::str(py::type::handle_of(obj).attr("__name__"))));
        const auto told = where().cast<py::tuple>();
        if (told[0].cast<int>() != dlpack::kCUDA)
            throw py::type_error(std::string(name(x)) + " is not in CUDA device memory and other arguments are; move it first");
        const int device = told[1].cast<int>();
        if (access != Access::read) // JAX's arrays may not be written to, whatever their capsules say
            py::module_::import("subspan._lib.arrays").attr("prepared")(obj, name(x), int(access));
        stream(x) = call.stream;
        // The standard's stream numbers: 1 is the legacy default stream, which the runtime calls 0.
        const py::int_ number(call.stream == 0 ? std::uintptr_t(1) : call.stream);
        loan(x) = dlpack::Loan(obj.attr("__dlpack__")(py::arg("stream") = number, py::arg("max_version") = py::make_tuple(1, 0)), name(x));
        const auto &inside = loan(x).tensor().device;
        if (int(inside.type) != dlpack::kCUDA || inside.id != device)
            throw py::value_error(std::string(name(x)) + " says that it is on CUDA device " + std::to_string(device) +
                                  ", and its DLPack capsule names device type " + std::to_string(int(inside.type)) + ", number " + std::to_string(inside.id));
        const auto &dt = loan(x).tensor().dtype;
        const char *codes[] = {"int", "uint", "float", "opaque", "bfloat", "complex", "bool"};
        set_dtype(x, (dt.code < 7 ? codes[dt.code] : "unknown") + std::to_string(dt.bits), bytes);
        if (access != Access::read && loan(x).read_only()) throw py::value_error(std::string(name(x)) + " is read-only");
        data(x) = loan(x).data();
        shape(x) = loan(x).shape();
        strides(x) = loan(x).strides();
        return device;
    }
};

} // namespace

void register_device_arrays() {
    DeviceReader::read = &Reader::read;
    DeviceReader::wait = [](std::uintptr_t stream) { cuda::wait_for(reinterpret_cast<void *>(stream)); };
}

Stack stack(const Array &x, const Shape &batch, int inner) {
    inner == 2 ? x.require_matrices() : x.require_rows();
    Shape whole = batch;
    whole.insert(whole.end(), x.shape().end() - inner, x.shape().end());
    return broadcast(x, whole, inner);
}

Stack broadcast(const Array &x, const Shape &wanted, int inner) {
    const int all = int(wanted.size()), mine = x.ndim();
    Shape steps(wanted.size(), 0);
    bool fits = mine <= all;
    for (int a = 0; a < mine && fits; ++a) {
        const int b = all - mine + a;
        if (x.shape(a) == wanted[std::size_t(b)])
            steps[std::size_t(b)] = x.shape(a) == 1 ? 0 : x.stride(a);
        else
            fits = x.shape(a) == 1;
    }
    if (!fits) throw py::value_error("leading axes of " + std::string(x.name()) + ", shape " + x.shape_text() + ", do not broadcast to " + shape_text(wanted));
    Stack s;
    s.data = x.data();
    s.dtype = x.dtype();
    const auto at = [&](int from_end) { return std::size_t(all - from_end); };
    s.cols = wanted[at(1)];
    s.col_stride = s.cols <= 1 ? 1 : steps[at(1)];
    s.rows = inner == 2 ? wanted[at(2)] : 1;
    s.row_stride = inner == 2 ? (s.rows <= 1 ? s.cols : steps[at(2)]) : 0;
    // Axes from the last to the first; those that lie one after the other in memory are one axis.
    std::vector<std::int64_t> shapes, strides;
    for (int b = all - inner - 1; b >= 0; --b) {
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
        throw py::value_error(std::string(x.name()) + " has " + std::to_string(shapes.size()) + " leading axes that are not contiguous; at most " +
                              std::to_string(cuda::kAxes) + " are taken");
    s.axes = int(shapes.size());
    for (int i = 0; i < s.axes; ++i) {
        s.shape[i] = shapes[std::size_t(s.axes - 1 - i)];
        s.stride[i] = strides[std::size_t(s.axes - 1 - i)];
    }
    return s;
}

Stack whole(const Array &x) {
    if (x.ndim() == 0) {
        Stack s;
        s.data = x.data();
        s.dtype = x.dtype();
        s.rows = s.cols = s.row_stride = 1;
        return s;
    }
    return broadcast(x, x.shape(), std::min(x.ndim(), 2));
}

void assign(const Call &call, const Array &from, const Array &to, double factor) {
    Stack source;
    if (from.ndim() == 0 && to.ndim() > 0) { // one number for all
        source = whole(to);
        source.data = from.data();
        source.dtype = from.dtype();
        source.row_stride = source.col_stride = 0;
        std::fill_n(source.stride, cuda::kAxes, 0);
    } else {
        source = to.ndim() == 0 ? whole(from) : broadcast(from, to.shape(), std::min(to.ndim(), 2));
    }
    const Stack target = whole(to);
    const Memory memory(call, 0);
    const py::gil_scoped_release release;
    cuda::assign(memory.context(), source, target, factor);
}

void fill(const Call &call, const Array &to, double value) {
    const Stack target = whole(to);
    const Memory memory(call, 0);
    const py::gil_scoped_release release;
    cuda::fill(memory.context(), target, value);
}

Array copied(const Call &call, const Array &x, double factor) { return copied(call, x, x.dtype(), factor); }

Array copied(const Call &call, const Array &x, DType dtype, double factor) {
    Array to = call.empty(x.shape(), dtype, x.name());
    assign(call, x, to, factor);
    return to;
}

Array filled(const Call &call, const Shape &shape, DType dtype, double value, const char *name) {
    Array to = call.empty(shape, dtype, name);
    fill(call, to, value);
    return to;
}

Numbers host(const Call &call, const py::object &x) { return Numbers(call.place.attr("host")(x)); }

Memory::Memory(const Call &call, std::int64_t bytes) {
    context_.stream = reinterpret_cast<void *>(call.stream);
    context_.device = call.device;
    if (bytes == 0) return;
    owner_ = call.place.attr("allocate")(bytes);
    if (const auto pointer = attribute(owner_, "data_ptr"))
        context_.workspace = reinterpret_cast<void *>(pointer().cast<std::uintptr_t>());
    else
        context_.workspace = reinterpret_cast<void *>(owner_.attr("data").attr("ptr").cast<std::uintptr_t>());
    context_.workspace_bytes = bytes;
}

} // namespace subspan::bind
