// A block of rows on its way into a stream: dense or CSR, with a weight per row and a mean that is taken off.
#pragma once

#include "base/scratch.hpp"
#include "subspan/errors.hpp"
#include "subspan/moments.hpp"
#include "subspan/gemm.hpp"
#include "subspan/parallel.hpp"
#include "subspan/views.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

namespace subspan {

template <class T> struct Rows {
    MatrixView<const T> dense;
    const CsrView<T> *csr = nullptr;
    const double *weight = nullptr; // null: ones
    const T *shift = nullptr;       // mean of the block in T, null when not centring
    const T *shift_low = nullptr;   // the rest of the mean: x - shift is exact where it matters, so float keeps its digits
    const T *extra = nullptr;       // one more row, already weighted (the mean correction), or null

    std::int64_t count() const { return csr != nullptr ? csr->rows : dense.rows; }
    std::int64_t cols() const { return csr != nullptr ? csr->cols : dense.cols; }
    double w(std::int64_t i) const { return weight == nullptr ? 1.0 : weight[i]; }
};

/// Rows [first, first + count) of a CSR matrix.
template <class T> CsrView<T> slice_rows(CsrView<T> x, std::int64_t first, std::int64_t count) {
    x.rows = count;
    x.indptr = x.wide ? static_cast<const void *>(static_cast<const std::int64_t *>(x.indptr) + first)
                      : static_cast<const void *>(static_cast<const std::int32_t *>(x.indptr) + first);
    return x;
}

/// Throws ValueError that names the first NaN or infinity.
template <class T> void require_finite(const Rows<T> &r, const char *what) {
    const auto fail = [&](std::int64_t i, std::int64_t j, T v) {
        throw ValueError(std::string(what) + " must be finite, got " + (std::isnan(v) ? "NaN" : "infinity") + " in row " + std::to_string(i) + ", column " +
                         std::to_string(j));
    };
    // A finite sum of squares says that everything is; only otherwise the entry is looked for.
    if (r.csr == nullptr && std::isfinite(sum_of_squares(r.dense))) return;
    for (std::int64_t i = 0; i < r.count(); ++i) {
        if (r.csr != nullptr) {
            for (std::int64_t p = r.csr->begin(i); p < r.csr->begin(i + 1); ++p)
                if (!std::isfinite(r.csr->values[p])) fail(i, r.csr->column(p), r.csr->values[p]);
            continue;
        }
        const T *x = r.dense.data + i * r.dense.row_stride;
        for (std::int64_t j = 0; j < r.dense.cols; ++j)
            if (!std::isfinite(x[j * r.dense.col_stride])) fail(i, j, x[j * r.dense.col_stride]);
    }
}

/// dst (count() [+ 1] rows of n, contiguous) = weight · (row - shift), then the extra row.
template <class T> void materialise(const Rows<T> &r, T *dst) {
    const std::int64_t n = r.cols(), b = r.count();
    parallel_for(b + (r.extra != nullptr), [&](std::int64_t i) {
        T *out = dst + i * n;
        if (i == b) {
            std::copy_n(r.extra, n, out);
            return;
        }
        const T w = T(r.w(i));
        if (r.csr != nullptr) {
            if (r.shift == nullptr)
                std::fill_n(out, n, T(0));
            else
                for (std::int64_t j = 0; j < n; ++j) out[j] = -r.shift[j];
            for (std::int64_t p = r.csr->begin(i); p < r.csr->begin(i + 1); ++p) out[r.csr->column(p)] += r.csr->values[p];
            if (r.shift_low != nullptr)
                for (std::int64_t j = 0; j < n; ++j) out[j] -= r.shift_low[j];
            if (w != T(1))
                for (std::int64_t j = 0; j < n; ++j) out[j] *= w;
            return;
        }
        const T *x = r.dense.data + i * r.dense.row_stride;
        const std::int64_t cs = r.dense.col_stride;
        if (r.shift != nullptr && r.shift_low != nullptr)
            for (std::int64_t j = 0; j < n; ++j) out[j] = w * (x[j * cs] - r.shift[j] - r.shift_low[j]);
        else if (r.shift != nullptr)
            for (std::int64_t j = 0; j < n; ++j) out[j] = w * (x[j * cs] - r.shift[j]);
        else if (w != T(1))
            for (std::int64_t j = 0; j < n; ++j) out[j] = w * x[j * cs];
        else if (cs == 1)
            std::copy_n(x, n, out);
        else
            for (std::int64_t j = 0; j < n; ++j) out[j] = x[j * cs];
    });
}

/// Weighted column means, sum w² x / sum w², in double. Columns are split over the threads.
template <class T> void weighted_mean(const Rows<T> &r, double *mean) {
    const std::int64_t n = r.cols(), b = r.count();
    double total = 0;
    if (r.csr != nullptr) {
        for (std::int64_t i = 0; i < b; ++i) total += r.w(i) * r.w(i);
        std::fill_n(mean, n, 0.0);
        for (std::int64_t i = 0; i < b; ++i)
            for (std::int64_t p = r.csr->begin(i); p < r.csr->begin(i + 1); ++p) mean[r.csr->column(p)] += r.w(i) * r.w(i) * double(r.csr->values[p]);
    } else {
        Frame frame;
        double *squares = nullptr;
        if (r.weight != nullptr) {
            squares = frame.take<double>(b);
            for (std::int64_t i = 0; i < b; ++i) squares[i] = r.w(i) * r.w(i);
        }
        column_means(r.dense, squares, mean);
        return;
    }
    for (std::int64_t j = 0; j < n; ++j) mean[j] /= total;
}

/// sum w² (x - mean)² of each column, in double; a null mean is zero.
template <class T> void weighted_scatter(const Rows<T> &r, const double *mean, double *squares) {
    const std::int64_t n = r.cols(), b = r.count();
    if (r.csr == nullptr) {
        Frame frame;
        double *weights = nullptr;
        if (r.weight != nullptr) {
            weights = frame.take<double>(b);
            for (std::int64_t i = 0; i < b; ++i) weights[i] = r.w(i) * r.w(i);
        }
        column_scatter(r.dense, weights, mean, squares);
        return;
    }
    double total = 0;
    std::vector<double> stored(mean == nullptr ? 0 : std::size_t(n), 0.0); // weight of what is there
    std::fill_n(squares, n, 0.0);
    for (std::int64_t i = 0; i < b; ++i) {
        const double w = r.w(i) * r.w(i);
        total += w;
        for (std::int64_t p = r.csr->begin(i); p < r.csr->begin(i + 1); ++p) {
            const std::int64_t j = r.csr->column(p);
            const double d = double(r.csr->values[p]) - (mean == nullptr ? 0.0 : mean[j]);
            squares[j] += w * d * d;
            if (mean != nullptr) stored[std::size_t(j)] += w;
        }
    }
    for (std::int64_t j = 0; j < n && mean != nullptr; ++j) squares[j] += std::max(0.0, total - stored[std::size_t(j)]) * mean[j] * mean[j];
}

/// Z = (X - mean) Vᵀ for CSR X: V is transposed once (k·n items of work memory), then a row costs nnz·k. With a mean (null:
/// none) all is summed in double.
template <class T> void csr_times_rows(const CsrView<T> &x, const T *v, std::int64_t k, const double *mean, MatrixView<T> z);

/// vt (n x k, row-major) = transpose of v (k x n).
template <class T> void transpose_rows(const T *v, std::int64_t k, std::int64_t n, T *vt);

} // namespace subspan
