// Non-owning views of matrices: a pointer, a shape and element strides. No ownership, no allocation.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

namespace subspan {

/// A strided matrix. Strides count elements, not bytes, and may be negative or zero.
template <class T> struct MatrixView {
    T *data = nullptr;
    std::int64_t rows = 0, cols = 0;
    std::int64_t row_stride = 0, col_stride = 1;

    MatrixView() = default;
    MatrixView(T *d, std::int64_t r, std::int64_t c) : data(d), rows(r), cols(c), row_stride(c) {}
    MatrixView(T *d, std::int64_t r, std::int64_t c, std::int64_t rs, std::int64_t cs) : data(d), rows(r), cols(c), row_stride(rs), col_stride(cs) {}
    template <class U>
        requires std::is_same_v<T, const U>
    MatrixView(const MatrixView<U> &o) : data(o.data), rows(o.rows), cols(o.cols), row_stride(o.row_stride), col_stride(o.col_stride) {}

    T &operator()(std::int64_t i, std::int64_t j) const { return data[i * row_stride + j * col_stride]; }
    MatrixView transposed() const { return {data, cols, rows, col_stride, row_stride}; }
    MatrixView block_rows(std::int64_t first, std::int64_t count) const { return {data + first * row_stride, count, cols, row_stride, col_stride}; }
    MatrixView block_cols(std::int64_t first, std::int64_t count) const { return {data + first * col_stride, rows, count, row_stride, col_stride}; }
};

/// Matrices along leading axes, as NumPy's (..., m, n). A leading stride may be zero: one matrix for the whole axis.
template <class T> struct StackView {
    MatrixView<T> first;
    std::vector<std::int64_t> shape, strides; // leading axes; strides in elements

    StackView() = default;
    StackView(MatrixView<T> m) : first(m) {}
    StackView(MatrixView<T> m, std::vector<std::int64_t> s, std::vector<std::int64_t> st) : first(m), shape(std::move(s)), strides(std::move(st)) {}
    template <class U>
        requires std::is_same_v<T, const U>
    StackView(const StackView<U> &o) : first(o.first), shape(o.shape), strides(o.strides) {}

    std::int64_t rows() const { return first.rows; }
    std::int64_t cols() const { return first.cols; }
    bool empty() const {
        if (first.rows == 0 || first.cols == 0) return true;
        for (const auto s : shape)
            if (s == 0) return true;
        return false;
    }
    std::int64_t size() const {
        std::int64_t n = 1;
        for (const auto s : shape) n *= s;
        return n;
    }
    /// Matrix i in C order of the leading axes.
    MatrixView<T> operator[](std::int64_t i) const {
        MatrixView<T> m = first;
        if (shape.empty()) return m;
        for (std::size_t a = shape.size() - 1; a > 0; --a) {
            m.data += (i % shape[a]) * strides[a];
            i /= shape[a];
        }
        m.data += i * strides[0];
        return m;
    }
    StackView transposed() const { return {first.transposed(), shape, strides}; }
};

/// A matrix of 4-bit codes, two to a byte (the even one in the low half), in row-major order without padding. The value
/// of code q is scale * (q - zero), with one scale and one zero for every `group` consecutive codes.
template <class T> struct Int4View {
    const std::uint8_t *codes = nullptr;
    const T *scale = nullptr, *zero = nullptr;
    std::int64_t rows = 0, cols = 0, group = 256;
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
    std::int64_t at(const void *p, std::int64_t i) const { return wide ? static_cast<const std::int64_t *>(p)[i] : static_cast<const std::int32_t *>(p)[i]; }
};

} // namespace subspan
