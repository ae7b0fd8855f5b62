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
    Operand transposed() const { return {data, dtype, cols, rows, col_stride, row_stride, next}; }
    /// Rows [i, i + m) and columns [j, j + n).
    Operand part(int64_t i, int64_t m, int64_t j, int64_t n) const {
        return {static_cast<const char *>(data) + (i * row_stride + j * col_stride) * size_of(dtype), dtype, m, n, row_stride, col_stride, next};
    }
};

/// The matrices of a stack from one on: a batch where its leading axes are one, else a single matrix.
inline Operand operand(const Stack &s, int64_t first = 0) {
    return {static_cast<const char *>(s.data) + offset_of(s, first) * size_of(s.dtype),
            s.dtype,
            s.rows,
            s.cols,
            s.row_stride,
            s.col_stride,
            s.axes == 1 ? s.stride[0] : 0};
}
/// Matrices of work memory: rows without gaps, one matrix after the other, or as told.
template <class T> Operand own(const T *data, int64_t rows, int64_t cols, int64_t pitch, int64_t next) {
    return {data, sizeof(T) == 8 ? DType::f64 : DType::f32, rows, cols, pitch, 1, next};
}
template <class T> Operand own(const T *data, int64_t rows, int64_t cols) { return own(data, rows, cols, cols, rows * cols); }

/// Asks the loader of libraries, if there is one, to fill the tables.
void load_libraries();

/// Whether cuBLAS can read and write a matrix.
bool blas_layout(const Operand &x);
/// ValueError for a matrix that it cannot.
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
