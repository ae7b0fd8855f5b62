// QR of matrices that no block holds, by cuSOLVER through a table of function pointers, as cuBLAS's in blas.hpp: nothing of it is linked.
#pragma once

#include "subspan/cuda/types.hpp"

namespace subspan::cuda {

/// cuSOLVER's dense C interface, as far as it is used; all return zero on success. Matrices column by column.
struct SolverTable {
    int (*create)(void **handle) = nullptr;
    int (*set_stream)(void *handle, void *stream) = nullptr;
    /// cusolverDnSgeqrf_bufferSize and cusolverDnSgeqrf, and those of double.
    int (*size32)(void *handle, int m, int n, float *a, int lda, int *items) = nullptr;
    int (*geqrf32)(void *handle, int m, int n, float *a, int lda, float *tau, float *work, int items, int *info) = nullptr;
    int (*size64)(void *handle, int m, int n, double *a, int lda, int *items) = nullptr;
    int (*geqrf64)(void *handle, int m, int n, double *a, int lda, double *tau, double *work, int items, int *info) = nullptr;
};

/// For embedders that link cuSOLVER themselves.
void set_solver(const SolverTable &table);
/// As load_blas.
bool load_solver(const char *path, bool loaded_only);
bool has_solver();

} // namespace subspan::cuda
