// Products over tall panels, the three shapes that subspace kernels spend their time in. All are row-major in their
// output, take inputs of any strides, read each input once per call and run on the library's own threads.
#pragma once

#include "subspan/views.hpp"

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <vector>

namespace subspan {

/// Rows stacked from several places without a copy: [V; B; ...], each of the same number of columns.
template <class T> struct RowBlocks {
    struct Segment {
        MatrixView<const T> rows;
        const T *shift;     // subtracted from every row when not null (a mean, one entry per column)
        const T *shift_low; // subtracted after it when not null (what rounding the mean to T left out)
    };
    std::vector<Segment> segments;
    std::int64_t rows = 0, cols = 0;

    explicit RowBlocks(std::int64_t n) : cols(n) {}
    RowBlocks &add(MatrixView<const T> v, const T *shift = nullptr, const T *shift_low = nullptr) {
        if (v.rows > 0) {
            segments.push_back({v, shift, shift_low});
            rows += v.rows;
        }
        return *this;
    }
};

/// Lower triangle of P Pᵀ into the rows of G from `first_row` on; G is rows x rows, row-major, and is overwritten
/// there. Products run in T over at most 2048 columns and are summed in double beyond that.
/// Cost n (rows² - first_row²) flops.
template <class T> void gram(const RowBlocks<T> &p, std::int64_t first_row, double *g);

/// out = W P (accumulate: out += W P) with a small row-major W of out.rows x P.rows. `out` must have unit column stride
/// and may be a segment of P: columns are read before they are written. Cost 2 n · out.rows · P.rows flops.
template <class T> void combine(const T *w, const RowBlocks<T> &p, MatrixView<T> out, bool accumulate = false);

/// W P a strip of columns at a time: `take` gets the first column and the k rows of each strip, which live until it returns.
/// It may write to them, and to those columns of P. Strips come from several threads.
template <class T> using StripTaker = std::function<void(std::int64_t first, MatrixView<T> strip)>;
template <class T> void combine(const T *w, std::int64_t k, const RowBlocks<T> &p, const StripTaker<T> &take);

/// C = A B (accumulate: C += A B); C must have unit column stride. Keeps a packed copy of the smaller operand. C may be A
/// where it has at least as many rows as columns.
/// `a_shift`, when given, is subtracted from every row of A as it is read (a mean), then `a_shift_low` (its low part).
template <class T>
void gemm(MatrixView<const T> a, MatrixView<const T> b, MatrixView<T> c, bool accumulate = false, const T *a_shift = nullptr, const T *a_shift_low = nullptr);

} // namespace subspan
