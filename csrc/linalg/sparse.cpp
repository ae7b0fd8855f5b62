#include "linalg/sparse.hpp"

#include "linalg/packing.hpp"

namespace subspan {
namespace {

template <class T> struct TransposeArgs {
    const T *v;
    std::int64_t k, n, begin, end;
    T *vt;
};

template <class T> struct TransposeKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(const TransposeArgs<T> *a) {
        constexpr int W = simd::Vec<T, Bytes>::lanes;
        std::int64_t i = 0;
        for (; i + W <= a->k; i += W) {
            std::int64_t j = a->begin;
            for (; j + W <= a->end; j += W) simd::Transpose<T, Bytes>::block(a->v + i * a->n + j, a->n, nullptr, nullptr, a->vt + j * a->k + i, a->k);
            for (; j < a->end; ++j)
                for (int l = 0; l < W; ++l) a->vt[j * a->k + i + l] = a->v[(i + l) * a->n + j];
        }
        for (; i < a->k; ++i)
            for (std::int64_t j = a->begin; j < a->end; ++j) a->vt[j * a->k + i] = a->v[i * a->n + j];
    }
};

// y += s·x over k items: the inner loop of both sparse products.
template <class T> struct AxpyArgs {
    std::int64_t k, count;
    const T *values;
    const std::int64_t *index; // rows of `from`, or of `to` when scattering
    const T *from;
    T *to;
};

template <class T> struct GatherKernel { // to += sum_p values[p] · from[index[p]]
    template <int Bytes> static SUBSPAN_INLINE void run(const AxpyArgs<T> *a) {
        using V = simd::Vec<T, Bytes>;
        constexpr int W = V::lanes;
        std::int64_t j = 0;
        for (; j + 4 * W <= a->k; j += 4 * W) {
            typename V::type y0{}, y1{}, y2{}, y3{};
            for (std::int64_t p = 0; p < a->count; ++p) {
                const T *x = a->from + a->index[p] * a->k + j;
                const T s = a->values[p];
                y0 += s * V::load(x);
                y1 += s * V::load(x + W);
                y2 += s * V::load(x + 2 * W);
                y3 += s * V::load(x + 3 * W);
            }
            V::store(a->to + j, V::load(a->to + j) + y0);
            V::store(a->to + j + W, V::load(a->to + j + W) + y1);
            V::store(a->to + j + 2 * W, V::load(a->to + j + 2 * W) + y2);
            V::store(a->to + j + 3 * W, V::load(a->to + j + 3 * W) + y3);
        }
        for (; j + W <= a->k; j += W) {
            typename V::type y{};
            for (std::int64_t p = 0; p < a->count; ++p) y += a->values[p] * V::load(a->from + a->index[p] * a->k + j);
            V::store(a->to + j, V::load(a->to + j) + y);
        }
        for (; j < a->k; ++j) {
            T y = 0;
            for (std::int64_t p = 0; p < a->count; ++p) y += a->values[p] * a->from[a->index[p] * a->k + j];
            a->to[j] += y;
        }
    }
};

template <class T> struct WideArgs {
    std::int64_t k, count;
    const T *values;
    const std::int64_t *index;
    const T *from;
    double *to;
};

template <class T> struct WideKernel { // the same, summed in double
    template <int Bytes> static SUBSPAN_INLINE void run(const WideArgs<T> *a) {
        constexpr std::int64_t strip = 32; // columns that stay in registers
        std::int64_t j = 0;
        for (; j + strip <= a->k; j += strip) {
            double y[strip] = {};
            for (std::int64_t p = 0; p < a->count; ++p) {
                const T *x = a->from + a->index[p] * a->k + j;
                const double s = double(a->values[p]);
                for (std::int64_t l = 0; l < strip; ++l) y[l] += s * double(x[l]);
            }
            for (std::int64_t l = 0; l < strip; ++l) a->to[j + l] += y[l];
        }
        for (; j < a->k; ++j) {
            double y = 0;
            for (std::int64_t p = 0; p < a->count; ++p) y += double(a->values[p]) * double(a->from[a->index[p] * a->k + j]);
            a->to[j] += y;
        }
    }
};

template <class T> struct RowsTimesArgs {
    const T *v;
    std::int64_t n;
    const double *x;
    double *out;
};

template <class T> struct RowsTimesKernel { // one row times a vector of doubles
    template <int Bytes> static SUBSPAN_INLINE void run(const RowsTimesArgs<T> *a) {
        constexpr int lanes = 16;
        double s[lanes] = {}, sum = 0;
        std::int64_t j = 0;
        for (; j + lanes <= a->n; j += lanes)
            for (int l = 0; l < lanes; ++l) s[l] += double(a->v[j + l]) * a->x[j + l];
        for (; j < a->n; ++j) sum += double(a->v[j]) * a->x[j];
        for (int l = 0; l < lanes; ++l) sum += s[l];
        *a->out = sum;
    }
};

template <class T> struct UntransposeArgs {
    const T *d; // n x k
    std::int64_t k, n, begin, end;
    T *v; // k x n, added to
};

template <class T> struct AddTransposedKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(const UntransposeArgs<T> *a) {
        using V = simd::Vec<T, Bytes>;
        constexpr int W = V::lanes;
        T tile[W * W];
        std::int64_t i = 0;
        for (; i + W <= a->k; i += W) {
            std::int64_t j = a->begin;
            for (; j + W <= a->end; j += W) {
                simd::Transpose<T, Bytes>::block(a->d + j * a->k + i, a->k, nullptr, nullptr, tile, W);
                for (int l = 0; l < W; ++l) {
                    T *out = a->v + (i + l) * a->n + j;
                    V::store(out, V::load(out) + V::load(tile + l * W));
                }
            }
            for (; j < a->end; ++j)
                for (int l = 0; l < W; ++l) a->v[(i + l) * a->n + j] += a->d[j * a->k + i + l];
        }
        for (; i < a->k; ++i)
            for (std::int64_t j = a->begin; j < a->end; ++j) a->v[i * a->n + j] += a->d[j * a->k + i];
    }
};

constexpr std::int64_t kStrip = 1024; // columns that one task transposes

// Columns of a CSR matrix: for each column its rows, ascending, and values.
template <class T> struct Columns {
    std::vector<std::int64_t> start, row;
    std::vector<T> value;
    explicit Columns(const CsrView<T> &x) : start(std::size_t(x.cols) + 1, 0) {
        const std::int64_t first = x.begin(0), nnz = x.begin(x.rows) - first;
        row.resize(std::size_t(nnz));
        value.resize(std::size_t(nnz));
        for (std::int64_t p = first; p < first + nnz; ++p) ++start[std::size_t(x.column(p)) + 1];
        for (std::int64_t j = 0; j < x.cols; ++j) start[std::size_t(j) + 1] += start[std::size_t(j)];
        std::vector<std::int64_t> next(start.begin(), start.end() - 1);
        for (std::int64_t i = 0; i < x.rows; ++i)
            for (std::int64_t p = x.begin(i); p < x.begin(i + 1); ++p) {
                const auto at = std::size_t(next[std::size_t(x.column(p))]++);
                row[at] = i;
                value[at] = x.values[p];
            }
    }
};

template <class T> std::vector<std::int64_t> wide_columns(const CsrView<T> &x) {
    const std::int64_t first = x.begin(0), nnz = x.begin(x.rows) - first;
    std::vector<std::int64_t> out(static_cast<std::size_t>(nnz));
    for (std::int64_t p = 0; p < nnz; ++p) out[std::size_t(p)] = x.column(first + p);
    return out;
}

} // namespace

template <class T> void check_csr(const CsrView<T> &x, const char *what) {
    for (std::int64_t i = 0; i < x.rows; ++i)
        if (x.begin(i) < 0 || x.begin(i + 1) < x.begin(i)) throw ValueError(std::string(what) + ": indptr must not decrease");
    for (std::int64_t p = x.begin(0); p < x.begin(x.rows); ++p)
        if (x.column(p) < 0 || x.column(p) >= x.cols)
            throw ValueError(std::string(what) + ": column index " + std::to_string(x.column(p)) + " is outside of [0, " + std::to_string(x.cols) + ")");
}

template <class T> void column_moments(const CsrView<T> &x, double *mean, double *scatter) {
    const auto rows = double(x.rows);
    std::vector<double> stored(std::size_t(x.cols), 0.0);
    std::fill_n(mean, x.cols, 0.0);
    std::fill_n(scatter, x.cols, 0.0);
    const std::int64_t first = x.begin(0), last = x.begin(x.rows);
    for (std::int64_t p = first; p < last; ++p) {
        mean[x.column(p)] += double(x.values[p]);
        stored[std::size_t(x.column(p))] += 1.0;
    }
    for (std::int64_t j = 0; j < x.cols; ++j) mean[j] /= rows;
    for (std::int64_t p = first; p < last; ++p) {
        const double d = double(x.values[p]) - mean[x.column(p)];
        scatter[x.column(p)] += d * d;
    }
    for (std::int64_t j = 0; j < x.cols; ++j) scatter[j] += (rows - stored[std::size_t(j)]) * mean[j] * mean[j];
}

template <class T>
void columns_of(const CsrView<T> &x, std::vector<std::int64_t> &by_row, std::vector<std::int64_t> &start, std::vector<std::int64_t> &row,
                std::vector<T> &value) {
    Columns<T> c(x);
    by_row = wide_columns(x);
    start = std::move(c.start);
    row = std::move(c.row);
    value = std::move(c.value);
}

template <class T> void gather_rows(std::int64_t k, std::int64_t count, const T *values, const std::int64_t *index, const T *from, T *to) {
    const AxpyArgs<T> args{k, count, values, index, from, to};
    simd::dispatch<GatherKernel<T>>(&args);
}

template <class T> void gather_rows_wide(std::int64_t k, std::int64_t count, const T *values, const std::int64_t *index, const T *from, double *to) {
    const WideArgs<T> args{k, count, values, index, from, to};
    simd::dispatch<WideKernel<T>>(&args);
}

template <class T> void rows_times(const T *v, std::int64_t k, std::int64_t n, const double *x, double *out) {
    parallel_for(k, [&](std::int64_t i) {
        const RowsTimesArgs<T> args{v + i * n, n, x, out + i};
        simd::dispatch<RowsTimesKernel<T>>(&args);
    });
}

template <class T> void transpose_rows(const T *v, std::int64_t k, std::int64_t n, T *vt) {
    parallel_for((n + kStrip - 1) / kStrip, [&](std::int64_t t) {
        const TransposeArgs<T> args{v, k, n, t * kStrip, std::min(n, (t + 1) * kStrip), vt};
        simd::dispatch<TransposeKernel<T>>(&args);
    });
}

template <class T> void csr_times_rows(const CsrView<T> &x, const T *v, std::int64_t k, const double *mean, MatrixView<T> z) {
    const std::int64_t n = x.cols;
    Buffer<T> vt(n * k);
    transpose_rows(v, k, n, vt.data());
    std::vector<double> offset(std::size_t(k), 0.0);
    if (mean != nullptr) rows_times(v, k, n, mean, offset.data());
    const auto index = wide_columns(x);
    const std::int64_t first = x.begin(0);
    parallel_for(x.rows, [&](std::int64_t i) {
        T *out = z.data + i * z.row_stride;
        const std::int64_t p = x.begin(i), count = x.begin(i + 1) - p;
        if (mean == nullptr) {
            std::fill_n(out, k, T(0));
            gather_rows(k, count, x.values + p, index.data() + (p - first), vt.data(), out);
            return;
        }
        Frame frame;
        double *sum = frame.take<double>(k);
        for (std::int64_t c = 0; c < k; ++c) sum[c] = -offset[std::size_t(c)];
        gather_rows_wide(k, count, x.values + p, index.data() + (p - first), vt.data(), sum);
        for (std::int64_t c = 0; c < k; ++c) out[c] = T(sum[c]);
    });
}

template <class T> void sparse_gram(const T *v, std::int64_t r, const Rows<T> &rows, const double *mean, T *vt, double *g) {
    const CsrView<T> &x = *rows.csr;
    const std::int64_t n = x.cols, b = x.rows, e = rows.extra != nullptr, m = r + b + e;
    std::fill_n(g, m * m, 0.0);
    if (r > 0) { // the dense corner
        Frame frame;
        double *corner = frame.take<double>(r * r);
        gram(RowBlocks<T>(n).add(MatrixView<const T>(v, r, n)), 0, corner);
        for (std::int64_t i = 0; i < r; ++i) std::copy_n(corner + i * r, i + 1, g + i * m);
        transpose_rows(v, r, n, vt);
    }
    const auto index = wide_columns(x);
    const std::int64_t first = x.begin(0);
    parallel_for(b, [&](std::int64_t i) {
        double *out = g + (r + i) * m;
        const std::int64_t p = x.begin(i), count = x.begin(i + 1) - p;
        if (rows.shift != nullptr) { // the mean comes off these sums
            gather_rows_wide(r, count, x.values + p, index.data() + (p - first), vt, out);
            return;
        }
        Frame frame;
        T *sum = frame.zeros<T>(r);
        gather_rows(r, count, x.values + p, index.data() + (p - first), vt, sum);
        for (std::int64_t j = 0; j < r; ++j) out[j] = double(sum[j]);
    });
    const Columns<T> columns(x);
    for (std::int64_t j = 0; j < n; ++j) {
        const auto p0 = std::size_t(columns.start[std::size_t(j)]), p1 = std::size_t(columns.start[std::size_t(j) + 1]);
        for (auto p = p0; p < p1; ++p) {
            double *row = g + (r + columns.row[p]) * m + r;
            const auto a = double(columns.value[p]);
            for (auto q = p0; q <= p; ++q) {
                const double product = a * double(columns.value[q]);
                // Duplicate entries of one cell: the square of their sum has their product twice.
                row[columns.row[q]] += q < p && columns.row[q] == columns.row[p] ? 2.0 * product : product;
            }
        }
    }
    if (e != 0) {
        double *row = g + (m - 1) * m;
        double own = 0;
        for (std::int64_t j = 0; j < n; ++j) own += double(rows.extra[j]) * double(rows.extra[j]);
        row[m - 1] = own;
        for (std::int64_t i = 0; i < r; ++i) {
            double s = 0;
            for (std::int64_t j = 0; j < n; ++j) s += double(rows.extra[j]) * double(v[i * n + j]);
            row[i] = s;
        }
        for (std::int64_t i = 0; i < b; ++i)
            for (std::int64_t p = x.begin(i); p < x.begin(i + 1); ++p) row[r + i] += double(x.values[p]) * double(rows.extra[x.column(p)]);
    }
    if (rows.shift == nullptr) return;
    // Centring as a correction of the sums, in double: <b_i - μ, y> = <b_i, y> - <μ, y>.
    std::vector<double> mv(std::size_t(r), 0.0), mb(std::size_t(b), 0.0);
    double mm = 0, me = 0;
    for (std::int64_t j = 0; j < n; ++j) {
        mm += mean[j] * mean[j];
        if (e != 0) me += mean[j] * double(rows.extra[j]);
    }
    rows_times(v, r, n, mean, mv.data());
    for (std::int64_t i = 0; i < b; ++i)
        for (std::int64_t p = x.begin(i); p < x.begin(i + 1); ++p) mb[std::size_t(i)] += double(x.values[p]) * mean[x.column(p)];
    for (std::int64_t i = 0; i < b; ++i) {
        double *row = g + (r + i) * m;
        for (std::int64_t j = 0; j < r; ++j) row[j] -= mv[std::size_t(j)];
        for (std::int64_t j = 0; j <= i; ++j) row[r + j] += mm - mb[std::size_t(i)] - mb[std::size_t(j)];
        if (e != 0) g[(m - 1) * m + r + i] -= me;
    }
}

template <class T> void sparse_combine(const T *w, std::int64_t new_rows, const T *v, std::int64_t r, const Rows<T> &rows, const StripTaker<T> &take) {
    const CsrView<T> &x = *rows.csr;
    const std::int64_t n = x.cols, b = x.rows, e = rows.extra != nullptr, m = r + b + e;
    // Dense part: V, the mean (weight minus the sum of the block's weights; in two parts where one is rounded) and the extra row.
    const std::int64_t s = (rows.shift != nullptr) + (rows.shift_low != nullptr), dense = r + s + e;
    Frame frame;
    T *wd = frame.take<T>(new_rows * dense), *wb = frame.take<T>(b * new_rows);
    for (std::int64_t i = 0; i < new_rows; ++i) {
        const T *row = w + i * m;
        std::copy_n(row, r, wd + i * dense);
        double sum = 0;
        for (std::int64_t j = 0; j < b; ++j) {
            sum += double(row[r + j]);
            wb[j * new_rows + i] = row[r + j];
        }
        for (std::int64_t q = 0; q < s; ++q) wd[i * dense + r + q] = T(-sum);
        if (e != 0) wd[i * dense + r + s] = row[m - 1];
    }
    RowBlocks<T> blocks(n);
    blocks.add(MatrixView<const T>(v, r, n));
    if (rows.shift != nullptr) blocks.add(MatrixView<const T>(rows.shift, 1, n));
    if (rows.shift_low != nullptr) blocks.add(MatrixView<const T>(rows.shift_low, 1, n));
    if (e != 0) blocks.add(MatrixView<const T>(rows.extra, 1, n));
    // Sparse part: column j of the result gains sum_p value · wb[row], k contiguous items at a time.
    const Columns<T> columns(x);
    combine<T>(wd, new_rows, blocks, [&](std::int64_t first, MatrixView<T> strip) {
        Frame inner;
        T *d = inner.zeros<T>(strip.cols * new_rows);
        for (std::int64_t j = 0; j < strip.cols; ++j) {
            const std::int64_t p = columns.start[std::size_t(first + j)], q = columns.start[std::size_t(first + j) + 1];
            if (p == q) continue;
            const AxpyArgs<T> args{new_rows, q - p, columns.value.data() + p, columns.row.data() + p, wb, d + j * new_rows};
            simd::dispatch<GatherKernel<T>>(&args);
        }
        const UntransposeArgs<T> args{d, new_rows, strip.row_stride, 0, strip.cols, strip.data};
        simd::dispatch<AddTransposedKernel<T>>(&args);
        take(first, strip);
    });
}

#define SUBSPAN_INSTANTIATE(T)                                                                                                                                 \
    template void check_csr<T>(const CsrView<T> &, const char *);                                                                                              \
    template void column_moments<T>(const CsrView<T> &, double *, double *);                                                                                   \
    template void gather_rows_wide<T>(std::int64_t, std::int64_t, const T *, const std::int64_t *, const T *, double *);                                       \
    template void columns_of<T>(const CsrView<T> &, std::vector<std::int64_t> &, std::vector<std::int64_t> &, std::vector<std::int64_t> &, std::vector<T> &);  \
    template void gather_rows<T>(std::int64_t, std::int64_t, const T *, const std::int64_t *, const T *, T *);                                                 \
    template void transpose_rows<T>(const T *, std::int64_t, std::int64_t, T *);                                                                               \
    template void csr_times_rows<T>(const CsrView<T> &, const T *, std::int64_t, const double *, MatrixView<T>);                                               \
    template void sparse_gram<T>(const T *, std::int64_t, const Rows<T> &, const double *, T *, double *);                                                     \
    template void sparse_combine<T>(const T *, std::int64_t, const T *, std::int64_t, const Rows<T> &, const StripTaker<T> &);
SUBSPAN_INSTANTIATE(float)
SUBSPAN_INSTANTIATE(double)
#undef SUBSPAN_INSTANTIATE

} // namespace subspan
