// Products of large matrices by cuBLAS, through a table of function pointers: nothing of it is linked. The table is filled from the
// library that CuPy or PyTorch has loaded already, or from a path that the caller knows.
#pragma once

#include "subspan/cuda/types.hpp"

#include <cstddef>

namespace subspan::cuda {

/// cuBLAS's C interface, as far as it is used; all return zero on success.
struct BlasTable {
    int (*create)(void **handle) = nullptr;
    int (*set_stream)(void *handle, void *stream) = nullptr;
    int (*set_workspace)(void *handle, void *workspace, std::size_t bytes) = nullptr;
    /// cublasGemmStridedBatchedEx.
    int (*gemm)(void *handle, int op_a, int op_b, int m, int n, int k, const void *alpha, const void *a, int type_a, int lda, long long stride_a, const void *b,
                int type_b, int ldb, long long stride_b, const void *beta, void *c, int type_c, int ldc, long long stride_c, int batch, int compute,
                int algorithm) = nullptr;
    /// cublasGemmEx, for single products: it may split long sums over the device. May be null.
    int (*gemm_one)(void *handle, int op_a, int op_b, int m, int n, int k, const void *alpha, const void *a, int type_a, int lda, const void *b, int type_b,
                    int ldb, const void *beta, void *c, int type_c, int ldc, int compute, int algorithm) = nullptr;
};

/// For embedders that link cuBLAS themselves.
void set_blas(const BlasTable &table);
/// Opens the library (a path, or a name that the loader knows; `loaded_only`: only if it is in the process already) and fills the table.
/// False where it cannot be had.
bool load_blas(const char *path, bool loaded_only);
bool has_blas();
/// Called once by what finds the table of cuBLAS or cuSOLVER empty, to fill it if it can.
void set_library_loader(void (*load)());

/// Whether cuBLAS can read or write the matrices of a stack: lines of unit stride that do not overlap, one after the other.
bool blas_layout(const Stack &x);

/// out = alpha a b of stacks of matrices of one dtype whose rows or columns are contiguous; sums in float64 for float64, else in float32.
void matrix_product(const Context &context, const Stack &a, const Stack &b, double alpha, const Stack &out);

/// Bytes that a call which uses cuBLAS adds to its workspace.
std::int64_t blas_workspace(int device);

} // namespace subspan::cuda
