// Products of a CSR block with a dense basis, as the sparse route of a streaming update needs them.
#pragma once

#include "linalg/rows.hpp"

namespace subspan {

/// Throws ValueError when indptr decreases or a column index is out of range: no loop may leave its arrays.
template <class T> void check_csr(const CsrView<T> &x, const char *what);

/// The entries of a CSR matrix by columns (rows ascending within one), and its column indices as int64 by rows.
template <class T>
void columns_of(const CsrView<T> &x, std::vector<std::int64_t> &by_row, std::vector<std::int64_t> &start, std::vector<std::int64_t> &row,
                std::vector<T> &value);

/// to (k) += sum_p values[p] · from[index[p]], `from` being rows of k items.
template <class T> void gather_rows(std::int64_t k, std::int64_t count, const T *values, const std::int64_t *index, const T *from, T *to);

/// The same with sums in double.
template <class T> void gather_rows_wide(std::int64_t k, std::int64_t count, const T *values, const std::int64_t *index, const T *from, double *to);

/// out (k) = V x of contiguous rows v (k x n), in double.
template <class T> void rows_times(const T *v, std::int64_t k, std::int64_t n, const double *x, double *out);

/// Lower triangle of the Gram matrix of [V; B - 1 shiftᵀ; extra] (unweighted rows; see Rows) into g, (r + b + e)². Also
/// leaves Vᵀ (n x r) in `vt`. Cost n r² + 2 nnz r + sum over columns of nnz(column)² flops.
template <class T> void sparse_gram(const T *v, std::int64_t r, const Rows<T> &rows, const double *mean, T *vt, double *g);

/// W [V; B - 1 shiftᵀ; extra] (new_rows x n) with row-major W, new_rows x (r + b + e), a strip of columns at a time, as
/// combine() hands them over.
template <class T> void sparse_combine(const T *w, std::int64_t new_rows, const T *v, std::int64_t r, const Rows<T> &rows, const StripTaker<T> &take);

} // namespace subspan
