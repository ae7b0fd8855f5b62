// Stacks of reflections as batches of products.
#pragma once

#include "linalg/blas.cuh"
#include "linalg/reflections.cuh"

#include <initializer_list>

namespace subspan::cuda {

/// How many matrices go through one product: one where some stack is not evenly spaced, or where results share memory.
int64_t together(std::initializer_list<const Stack *> read, std::initializer_list<const Stack *> written, int64_t bytes_each);
/// ValueError unless x is of the dtype and the leading axes of V, and of these sizes.
void check_same(const Stack &v, const Stack &x, const char *name, int64_t rows, int64_t cols);
/// ValueError unless V is of float32 or float64, of a size for one call, and can be read by cuBLAS.
void check_v(const Stack &v);
void check_tau(const Stack &v, const Stack *tau);
inline bool nothing(const Stack &v) { return v.size() == 0 || v.rows == 0 || v.cols == 0; }

} // namespace subspan::cuda
