// Arrays of a CUDA device as the kernels take them, and memory for their work.
#pragma once

#include "array.hpp"
#include "scalars.hpp"
#include "subspan/cuda/types.hpp"

#include <cstdint>
#include <pybind11/numpy.h>

namespace subspan::bind {

using cuda::Stack;

/// The last two axes as matrices (`inner` 2), or the last one as 1 x n matrices (1), over `batch`.
Stack stack(const Array &x, const Shape &batch, int inner = 2);
/// The array broadcast to a whole shape, whose last `inner` axes are the matrices.
Stack broadcast(const Array &x, const Shape &wanted, int inner);

/// The array as it is: matrices of its last two axes, or one row, or one number.
Stack whole(const Array &x);
/// to = factor from, of any two dtypes of floats; `from` is broadcast.
void assign(const Call &call, const Array &from, const Array &to, double factor = 1.0);
void fill(const Call &call, const Array &to, double value);
/// A fresh array in C order, of this dtype; of the array's own by default.
Array copied(const Call &call, const Array &x, double factor = 1.0);
Array copied(const Call &call, const Array &x, DType dtype, double factor = 1.0);
Array filled(const Call &call, const Shape &shape, DType dtype, double value, const char *name = "out");
/// What is there, in NumPy and double; waits for the device.
using Numbers = py::array_t<double, py::array::c_style | py::array::forcecast>;
Numbers host(const Call &call, const py::object &x);

/// Memory of the caller's library, alive until this goes away; its context may be used meanwhile.
class Memory {
  public:
    Memory(const Call &call, std::int64_t bytes);
    const cuda::Context &context() const { return context_; }

  private:
    cuda::Context context_;
    py::object owner_;
};

/// What has no kernel on a device says so here, for all functions and methods alike: raises.
[[noreturn]] void not_on_device(const std::string &name);

/// The array, or a contiguous copy where cuBLAS could read neither the rows nor the columns of its matrices.
Array for_blas(const Call &call, py::handle x, const char *name);

class Packed;
/// A core over the leading axes of a call: a stack of diagonals or matrices, or where there is none a multiple of the identity.
struct CoreStack {
    const Stack *matrix = nullptr;
    bool diagonal = false;
    double value = 1.0;
};
/// out = alpha C + V M (VᵀC), or from the right, with V dense or packed.
void apply_core(const Call &call, const Array &c, const Array *v, const Packed *packed, const CoreStack &core, double alpha, bool left, const Array &out,
                const Shape &batch, const Array *source = nullptr);

/// Bindings that others are made of: (V, tau, T, R); Q, or its first columns; `count` columns of Q from `first`.
py::tuple householder_qr(py::handle call, py::handle a, py::handle pivoting);
py::object factored_array(py::handle call, py::handle v, py::handle t, py::handle full);
py::object factored_columns(const Call &call, const Array &v, const Array &t, std::int64_t first, std::int64_t count);

} // namespace subspan::bind
