#include "subspan/affine.hpp"

#include "linalg/rows.hpp"
#include "base/simd.hpp"
#include "linalg/sparse.hpp"
#include "subspan/gemm.hpp"
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

// A few rows against all of V read V once: to pack it for a product of matrices first would cost several times as much.
constexpr std::int64_t kThin = 4;

template <class T> struct DotsArgs {
    const T *x, *v; // rows x n and k x n, contiguous
    std::int64_t rows, n, begin, end;
    MatrixView<T> z;
};

template <class T> struct DotsKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(const DotsArgs<T> *a) {
        constexpr std::int64_t lanes = 4 * Bytes / std::int64_t(sizeof(T)), chunk = 2048; // sums go on in double after a chunk
        for (std::int64_t j = a->begin; j < a->end; ++j)
            for (std::int64_t i = 0; i < a->rows; ++i) {
                const T *x = a->x + i * a->n, *v = a->v + j * a->n;
                double sum = 0;
                for (std::int64_t c = 0; c < a->n; c += chunk) {
                    const std::int64_t end = std::min(a->n, c + chunk);
                    T s[lanes] = {};
                    std::int64_t p = c;
                    for (; p + lanes <= end; p += lanes)
                        for (std::int64_t l = 0; l < lanes; ++l) s[l] += x[p + l] * v[p + l];
                    for (; p < end; ++p) sum += double(x[p]) * double(v[p]);
                    for (std::int64_t l = 0; l < lanes; ++l) sum += double(s[l]);
                }
                a->z(i, j) = T(sum);
            }
    }
};

template <class T> struct SumsArgs {
    MatrixView<const T> z; // rows x k
    const T *v;            // k x n, contiguous
    std::int64_t n, begin, end;
    T sign;
    MatrixView<T> x; // rows x n of contiguous rows, added to
};

template <class T> struct SumsKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(const SumsArgs<T> *a) {
        for (std::int64_t i = 0; i < a->z.rows; ++i) {
            T *x = a->x.data + i * a->x.row_stride;
            for (std::int64_t j = 0; j < a->z.cols; ++j) {
                const T f = a->sign * a->z(i, j), *v = a->v + j * a->n;
                for (std::int64_t c = a->begin; c < a->end; ++c) x[c] += f * v[c];
            }
        }
    }
};

template <class T> void thin_dots(const T *x, std::int64_t rows, const T *v, std::int64_t k, std::int64_t n, MatrixView<T> z) {
    const std::int64_t group = std::max<std::int64_t>(1, 65536 / std::max<std::int64_t>(1, n));
    parallel_for((k + group - 1) / group, [&](std::int64_t t) {
        const DotsArgs<T> args{x, v, rows, n, t * group, std::min(k, (t + 1) * group), z};
        simd::dispatch<DotsKernel<T>>(&args);
    });
}

template <class T> void thin_sums(MatrixView<const T> z, const T *v, std::int64_t n, T sign, MatrixView<T> x) {
    constexpr std::int64_t width = 1024; // of the sums, which stay in the nearest cache
    parallel_for((n + width - 1) / width, [&](std::int64_t t) {
        const SumsArgs<T> args{z, v, n, t * width, std::min(n, (t + 1) * width), sign, x};
        simd::dispatch<SumsKernel<T>>(&args);
    });
}

template <class T>
void residuals(std::int64_t rows, std::int64_t n, const T *v, std::int64_t k, T *out, const std::function<Rows<T>(std::int64_t, std::int64_t)> &of) {
    constexpr std::int64_t step = 64;
    const MatrixView<const T> basis(v, k, n);
    Buffer<T> block(step * n), z(step * std::max<std::int64_t>(k, 1));
    for (std::int64_t i0 = 0; i0 < rows; i0 += step) {
        const std::int64_t b = std::min(step, rows - i0);
        materialise(of(i0, b), block.data());
        const MatrixView<T> bv(block.data(), b, n), zv(z.data(), b, k);
        if (b <= kThin) {
            thin_dots<T>(block.data(), b, v, k, n, zv);
            thin_sums<T>(zv, v, n, T(-1), bv);
        } else {
            gemm<T>(bv, basis.transposed(), zv);
            for (std::int64_t i = 0; i < b * k; ++i) z.data()[i] = -z.data()[i];
            if (k > 0) gemm<T>(zv, basis, bv, true);
        }
        parallel_for(b, [&](std::int64_t i) {
            double s = 0;
            for (std::int64_t j = 0; j < n; ++j) s += double(bv(i, j)) * double(bv(i, j));
            out[i0 + i] = T(s);
        });
    }
}

} // namespace

template <class T> void affine_coordinates(MatrixView<const T> x, const double *mean, const T *v, std::int64_t k, MatrixView<T> z) {
    const Mean<T> shift(mean, x.cols);
    if (x.rows <= kThin) {
        Rows<T> given;
        given.dense = x;
        given.shift = shift.shift();
        given.shift_low = shift.shift_low();
        Buffer<T> centred(x.rows * x.cols);
        materialise(given, centred.data());
        return thin_dots<T>(centred.data(), x.rows, v, k, x.cols, z);
    }
    with_rows(z, [&](MatrixView<T> rows) { gemm<T>(x, MatrixView<const T>(v, k, x.cols).transposed(), rows, false, shift.shift(), shift.shift_low()); });
}

template <class T> void affine_coordinates(const CsrView<T> &x, const double *mean, const T *v, std::int64_t k, MatrixView<T> z) {
    with_rows(z, [&](MatrixView<T> rows) { csr_times_rows(x, v, k, mean, rows); });
}

template <class T> void affine_points(MatrixView<const T> z, const double *mean, const T *v, std::int64_t n, MatrixView<T> x) {
    with_rows(x, [&](MatrixView<T> rows) {
        if (z.rows <= kThin) {
            for (std::int64_t i = 0; i < rows.rows; ++i) std::fill_n(rows.data + i * rows.row_stride, n, T(0));
            thin_sums<T>(z, v, n, T(1), rows);
        } else {
            gemm<T>(z, MatrixView<const T>(v, z.cols, n), rows);
        }
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

#define SUBSPAN_INSTANTIATE(T)                                                                                                                                 \
    template void affine_coordinates<T>(MatrixView<const T>, const double *, const T *, std::int64_t, MatrixView<T>);                                          \
    template void affine_coordinates<T>(const CsrView<T> &, const double *, const T *, std::int64_t, MatrixView<T>);                                           \
    template void affine_points<T>(MatrixView<const T>, const double *, const T *, std::int64_t, MatrixView<T>);                                               \
    template void affine_residuals<T>(MatrixView<const T>, const double *, const T *, std::int64_t, T *);                                                      \
    template void affine_residuals<T>(const CsrView<T> &, const double *, const T *, std::int64_t, T *);
SUBSPAN_INSTANTIATE(float)
SUBSPAN_INSTANTIATE(double)
#undef SUBSPAN_INSTANTIATE

} // namespace subspan
