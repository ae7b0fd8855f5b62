// Row-major products of strided matrices by cuBLAS.
#pragma once

#include "subspan/cuda/blas.hpp"
#include "subspan/cuda/launch.cuh"

namespace subspan::cuda {

/// A matrix of which rows or columns are contiguous.
struct Operand {
    const void *data;
    DType dtype;
    int64_t rows, cols, row_stride, col_stride;
    Operand turned() const { return {data, dtype, cols, rows, col_stride, row_stride}; }
};

/// ValueError for a matrix that cuBLAS cannot read or write.
void require_blas_layout(const Operand &x, const char *name);

/// Products on the session's stream, with the handle of this thread and device; `workspace` belongs to the caller.
class Blas {
  public:
    Blas(const Session &s, Workspace &work);
    /// c = alpha a b + beta c. Sums in float64 for float64, else in float32, never in tf32. c has contiguous rows or columns as well.
    void multiply(double alpha, const Operand &a, const Operand &b, double beta, const Operand &c) const;

  private:
    void *handle_;
};

} // namespace subspan::cuda
