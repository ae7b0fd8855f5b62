// Non-owning views of matrices: a pointer, a shape and element strides. No ownership, no allocation.
#pragma once

#include <cstdint>
#include <type_traits>

namespace subspan {

/// A strided matrix. Strides count elements, not bytes, and may be negative or zero.
template <class T> struct MatrixView {
    T *data = nullptr;
    std::int64_t rows = 0, cols = 0;
    std::int64_t row_stride = 0, col_stride = 1;

    MatrixView() = default;
    MatrixView(T *d, std::int64_t r, std::int64_t c) : data(d), rows(r), cols(c), row_stride(c) {}
    MatrixView(T *d, std::int64_t r, std::int64_t c, std::int64_t rs, std::int64_t cs)
        : data(d), rows(r), cols(c), row_stride(rs), col_stride(cs) {}
    template <class U>
        requires std::is_same_v<T, const U>
    MatrixView(const MatrixView<U> &o)
        : data(o.data), rows(o.rows), cols(o.cols), row_stride(o.row_stride), col_stride(o.col_stride) {}

    T &operator()(std::int64_t i, std::int64_t j) const { return data[i * row_stride + j * col_stride]; }
    MatrixView transposed() const { return {data, cols, rows, col_stride, row_stride}; }
    MatrixView block_rows(std::int64_t first, std::int64_t count) const {
        return {data + first * row_stride, count, cols, row_stride, col_stride};
    }
};

/// Compressed sparse rows with 32- or 64-bit indices, as scipy.sparse stores them.
template <class T> struct CsrView {
    const T *values = nullptr;
    const void *indptr = nullptr;  // rows + 1 entries
    const void *indices = nullptr; // one column number per value
    std::int64_t rows = 0, cols = 0;
    bool wide = false; // true: int64 indices, false: int32

    std::int64_t begin(std::int64_t i) const { return at(indptr, i); }
    std::int64_t column(std::int64_t p) const { return at(indices, p); }

  private:
    std::int64_t at(const void *p, std::int64_t i) const {
        return wide ? static_cast<const std::int64_t *>(p)[i] : static_cast<const std::int32_t *>(p)[i];
    }
};

} // namespace subspan
