#include "subspan/affine.hpp"

#include "rows.hpp"
#include "sparse.hpp"
#include "subspan/panel.hpp"
#include "subspan/parallel.hpp"

#include <algorithm>

namespace subspan {
namespace {

// A mean in T, and for float what rounding it left out.
template <class T> struct Mean {
    std::vector<T> high, low;
    Mean(const double *mean, std::int64_t n) {
        if (mean == nullptr) return;
        high.resize(std::size_t(n));
        for (std::int64_t j = 0; j < n; ++j) high[std::size_t(j)] = T(mean[j]);
        if (std::is_same_v<T, double>) return;
        low.resize(std::size_t(n));
        for (std::int64_t j = 0; j < n; ++j) low[std::size_t(j)] = T(mean[j] - double(high[std::size_t(j)]));
    }
    const T *shift() const { return high.empty() ? nullptr : high.data(); }
    const T *shift_low() const { return low.empty() ? nullptr : low.data(); }
};

// Products write rows: an out of other strides gets a copy of a contiguous result.
template <class T, class F> void with_rows(MatrixView<T> out, F &&f) {
    if (out.col_stride == 1 || out.rows * out.cols == 0) return f(out);
    Buffer<T> rows(out.rows * out.cols);
    f(MatrixView<T>(rows.data(), out.rows, out.cols));
    for (std::int64_t i = 0; i < out.rows; ++i)
        for (std::int64_t j = 0; j < out.cols; ++j) out(i, j) = rows.data()[i * out.cols + j];
}

template <class T> void residuals(std::int64_t rows, std::int64_t n, const T *v, std::int64_t k, T *out, const std::function<Rows<T>(std::int64_t, std::int64_t)> &of) {
    constexpr std::int64_t step = 64;
    const MatrixView<const T> basis(v, k, n);
    Buffer<T> block(step * n), z(step * std::max<std::int64_t>(k, 1));
    for (std::int64_t i0 = 0; i0 < rows; i0 += step) {
        const std::int64_t b = std::min(step, rows - i0);
        materialise(of(i0, b), block.data());
        const MatrixView<T> bv(block.data(), b, n), zv(z.data(), b, k);
        gemm<T>(bv, basis.transposed(), zv);
        for (std::int64_t i = 0; i < b * k; ++i) z.data()[i] = -z.data()[i];
        if (k > 0) gemm<T>(zv, basis, bv, true);
        parallel_for(b, [&](std::int64_t i) {
            double s = 0;
            for (std::int64_t j = 0; j < n; ++j) s += double(bv(i, j)) * double(bv(i, j));
            out[i0 + i] = T(s);
        });
    }
}

} // namespace

template <class T>
void affine_coordinates(MatrixView<const T> x, const double *mean, const T *v, std::int64_t k, MatrixView<T> z) {
    const Mean<T> shift(mean, x.cols);
    with_rows(z, [&](MatrixView<T> rows) {
        gemm<T>(x, MatrixView<const T>(v, k, x.cols).transposed(), rows, false, shift.shift(), shift.shift_low());
    });
}

template <class T>
void affine_coordinates(const CsrView<T> &x, const double *mean, const T *v, std::int64_t k, MatrixView<T> z) {
    with_rows(z, [&](MatrixView<T> rows) { csr_times_rows(x, v, k, mean, rows); });
}

template <class T>
void affine_points(MatrixView<const T> z, const double *mean, const T *v, std::int64_t n, MatrixView<T> x) {
    with_rows(x, [&](MatrixView<T> rows) {
        gemm<T>(z, MatrixView<const T>(v, z.cols, n), rows);
        if (mean == nullptr) return;
        parallel_for(rows.rows, [&](std::int64_t i) {
            T *row = rows.data + i * rows.row_stride;
            for (std::int64_t j = 0; j < n; ++j) row[j] = T(double(row[j]) + mean[j]);
        });
    });
}

template <class T> void affine_residuals(MatrixView<const T> x, const double *mean, const T *v, std::int64_t k, T *out) {
    const Mean<T> shift(mean, x.cols);
    residuals<T>(x.rows, x.cols, v, k, out, [&](std::int64_t first, std::int64_t count) {
        Rows<T> rows;
        rows.dense = x.block_rows(first, count);
        rows.shift = shift.shift();
        rows.shift_low = shift.shift_low();
        return rows;
    });
}

template <class T> void affine_residuals(const CsrView<T> &x, const double *mean, const T *v, std::int64_t k, T *out) {
    const Mean<T> shift(mean, x.cols);
    CsrView<T> part;
    residuals<T>(x.rows, x.cols, v, k, out, [&](std::int64_t first, std::int64_t count) {
        part = slice_rows(x, first, count);
        Rows<T> rows;
        rows.csr = &part;
        rows.shift = shift.shift();
        rows.shift_low = shift.shift_low();
        return rows;
    });
}

#define SUBSPAN_INSTANTIATE(T)                                                                                         \
    template void affine_coordinates<T>(MatrixView<const T>, const double *, const T *, std::int64_t, MatrixView<T>);  \
    template void affine_coordinates<T>(const CsrView<T> &, const double *, const T *, std::int64_t, MatrixView<T>);   \
    template void affine_points<T>(MatrixView<const T>, const double *, const T *, std::int64_t, MatrixView<T>);       \
    template void affine_residuals<T>(MatrixView<const T>, const double *, const T *, std::int64_t, T *);              \
    template void affine_residuals<T>(const CsrView<T> &, const double *, const T *, std::int64_t, T *);
SUBSPAN_INSTANTIATE(float)
SUBSPAN_INSTANTIATE(double)
#undef SUBSPAN_INSTANTIATE

} // namespace subspan
