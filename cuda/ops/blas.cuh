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
    int64_t next = 0; // items from one matrix of a batch to the next
    Operand turned() const { return {data, dtype, cols, rows, col_stride, row_stride, next}; }
    /// Rows [i, i + m) and columns [j, j + n).
    Operand part(int64_t i, int64_t m, int64_t j, int64_t n) const {
        return {static_cast<const char *>(data) + (i * row_stride + j * col_stride) * size_of(dtype), dtype, m, n, row_stride, col_stride, next};
    }
};

/// ValueError for a matrix that cuBLAS cannot read or write.
void require_blas_layout(const Operand &x, const char *name);

/// Products on the session's stream, with the handle of this thread and device; `workspace` belongs to the caller.
class Blas {
  public:
    Blas(const Session &s, Workspace &work);
    /// c = alpha a b + beta c, for each matrix of a batch. Sums in float64 for float64, else in float32, never in tf32. c has contiguous
    /// rows or columns as well, and its matrices lie apart.
    void multiply(double alpha, const Operand &a, const Operand &b, double beta, const Operand &c, int64_t batch = 1) const;

  private:
    void *handle_;
};

} // namespace subspan::cuda
