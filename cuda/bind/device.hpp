// Arrays of a CUDA device as the kernels take them, and memory for their work.
#pragma once

#include "array.hpp"
#include "scalars.hpp"
#include "subspan/cuda/types.hpp"

#include <cstdint>

namespace subspan::bind {

using cuda::Stack;

/// The last two axes as matrices (`core` 2), or the last one as 1 x n matrices (1), over `batch`.
Stack stack(const Array &x, const Shape &batch, int core = 2);
/// The array broadcast to a whole shape, whose last `core` axes are the matrices.
Stack broadcast(const Array &x, const Shape &wanted, int core);

/// Memory of the caller's library, alive until this goes away; its context may be used meanwhile.
class Memory {
  public:
    Memory(const Call &call, std::int64_t bytes);
    const cuda::Context &context() const { return context_; }

  private:
    cuda::Context context_;
    py::object owner_;
};

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

} // namespace subspan::bind
