#include "subspan/moments.hpp"

#include "base/scratch.hpp"
#include "base/simd.hpp"
#include "subspan/parallel.hpp"

#include <algorithm>

namespace subspan {
namespace {

template <class T> struct MomentArgs {
    MatrixView<const T> x;
    std::int64_t begin, end;
    double *mean, *scatter;
};

template <class T> struct MomentKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(const MomentArgs<T> *a) {
        const auto &x = a->x;
        double *mean = a->mean, *scatter = a->scatter;
        std::fill(mean + a->begin, mean + a->end, 0.0);
        std::fill(scatter + a->begin, scatter + a->end, 0.0);
        for (std::int64_t i = 0; i < x.rows; ++i) {
            const T *row = x.data + i * x.row_stride;
            if (x.col_stride == 1)
                for (std::int64_t j = a->begin; j < a->end; ++j) mean[j] += double(row[j]);
            else
                for (std::int64_t j = a->begin; j < a->end; ++j) mean[j] += double(row[j * x.col_stride]);
        }
        for (std::int64_t j = a->begin; j < a->end; ++j) mean[j] /= double(x.rows);
        for (std::int64_t i = 0; i < x.rows; ++i) {
            const T *row = x.data + i * x.row_stride;
            if (x.col_stride == 1)
                for (std::int64_t j = a->begin; j < a->end; ++j) {
                    const double d = double(row[j]) - mean[j];
                    scatter[j] += d * d;
                }
            else
                for (std::int64_t j = a->begin; j < a->end; ++j) {
                    const double d = double(row[j * x.col_stride]) - mean[j];
                    scatter[j] += d * d;
                }
        }
    }
};

template <class T> struct MeanArgs {
    MatrixView<const T> x;
    std::int64_t begin, end;
    const double *weights;
    double *mean;
};

template <class T> struct MeanKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(const MeanArgs<T> *a) {
        double *mean = a->mean, total = 0;
        std::fill(mean + a->begin, mean + a->end, 0.0);
        for (std::int64_t i = 0; i < a->x.rows; ++i) {
            const T *row = a->x.data + i * a->x.row_stride;
            const double w = a->weights == nullptr ? 1.0 : a->weights[i];
            total += w;
            if (a->x.col_stride == 1)
                for (std::int64_t j = a->begin; j < a->end; ++j) mean[j] += w * double(row[j]);
            else
                for (std::int64_t j = a->begin; j < a->end; ++j) mean[j] += w * double(row[j * a->x.col_stride]);
        }
        for (std::int64_t j = a->begin; j < a->end; ++j) mean[j] /= total;
    }
};

template <class T> struct ScatterArgs {
    MatrixView<const T> x;
    std::int64_t begin, end;
    const double *weights, *mean;
    double *squares;
};

template <class T> struct ScatterKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(const ScatterArgs<T> *a) {
        const std::int64_t begin = a->begin, count = a->end - a->begin, cs = a->x.col_stride;
        double *squares = a->squares + begin;
        Frame frame;
        double *mean = frame.zeros<double>(count);
        if (a->mean != nullptr) std::copy_n(a->mean + begin, count, mean);
        std::fill_n(squares, count, 0.0);
        std::int64_t first = 0;
        if (cs == 1) // four rows for each read and write of the sums
            for (; first + 4 <= a->x.rows; first += 4) {
                const T *row = a->x.data + first * a->x.row_stride + begin;
                const T *r0 = row, *r1 = r0 + a->x.row_stride, *r2 = r1 + a->x.row_stride, *r3 = r2 + a->x.row_stride;
                double w[4] = {1.0, 1.0, 1.0, 1.0};
                if (a->weights != nullptr) std::copy_n(a->weights + first, 4, w);
                const double *__restrict about = mean;
                double *__restrict sums = squares;
                for (std::int64_t j = 0; j < count; ++j) {
                    const double m = about[j], d0 = double(r0[j]) - m, d1 = double(r1[j]) - m, d2 = double(r2[j]) - m, d3 = double(r3[j]) - m;
                    sums[j] += (w[0] * d0 * d0 + w[1] * d1 * d1) + (w[2] * d2 * d2 + w[3] * d3 * d3);
                }
            }
        for (std::int64_t i = first; i < a->x.rows; ++i) {
            const T *row = a->x.data + i * a->x.row_stride + begin * cs;
            const double w = a->weights == nullptr ? 1.0 : a->weights[i];
            if (cs == 1)
                for (std::int64_t j = 0; j < count; ++j) {
                    const double d = double(row[j]) - mean[j];
                    squares[j] += w * d * d;
                }
            else
                for (std::int64_t j = 0; j < count; ++j) {
                    const double d = double(row[j * cs]) - mean[j];
                    squares[j] += w * d * d;
                }
        }
    }
};

template <class T> struct SquaresArgs {
    MatrixView<const T> x;
    double *rows; // one sum a row
    std::int64_t begin, end;
};

template <class T> struct SquaresKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(const SquaresArgs<T> *a) {
        constexpr int lanes = 16; // independent sums, which the compiler turns into vectors
        for (std::int64_t i = a->begin; i < a->end; ++i) {
            const T *row = a->x.data + i * a->x.row_stride;
            const std::int64_t cs = a->x.col_stride, n = a->x.cols;
            double s[lanes] = {};
            std::int64_t j = 0;
            if (cs == 1)
                for (; j + lanes <= n; j += lanes)
                    for (int l = 0; l < lanes; ++l) s[l] += double(row[j + l]) * double(row[j + l]);
            double sum = 0;
            for (int l = 0; l < lanes; ++l) sum += s[l];
            for (; j < n; ++j) sum += double(row[j * cs]) * double(row[j * cs]);
            a->rows[i] = sum;
        }
    }
};

} // namespace

template <class T> void column_means(MatrixView<const T> x, const double *weights, double *mean) {
    const std::int64_t width = 256;
    parallel_for((x.cols + width - 1) / width, [&](std::int64_t t) {
        const MeanArgs<T> args{x, t * width, std::min(x.cols, (t + 1) * width), weights, mean};
        simd::dispatch<MeanKernel<T>>(&args);
    });
}

template <class T> void column_scatter(MatrixView<const T> x, const double *weights, const double *mean, double *squares) {
    const std::int64_t width = 1024;
    parallel_for((x.cols + width - 1) / width, [&](std::int64_t t) {
        const ScatterArgs<T> args{x, t * width, std::min(x.cols, (t + 1) * width), weights, mean, squares};
        simd::dispatch<ScatterKernel<T>>(&args);
    });
}

template <class T> double sum_of_squares(MatrixView<const T> x) {
    // Along the contiguous direction, whichever it is.
    if (x.col_stride != 1 && x.row_stride == 1) x = x.transposed();
    Frame frame;
    constexpr std::int64_t strip = 1 << 20; // rows whose sums are kept at a time
    double *rows = frame.take<double>(std::min(x.rows, strip)), sum = 0;
    for (std::int64_t first = 0; first < x.rows; first += strip) {
        const auto part = x.block_rows(first, std::min(strip, x.rows - first));
        parallel_for((part.rows + 63) / 64, [&](std::int64_t t) {
            const SquaresArgs<T> args{part, rows, t * 64, std::min(part.rows, (t + 1) * 64)};
            simd::dispatch<SquaresKernel<T>>(&args);
        });
        for (std::int64_t i = 0; i < part.rows; ++i) sum += rows[i];
    }
    return sum;
}

template <class T> void column_moments(MatrixView<const T> x, double *mean, double *scatter) {
    const std::int64_t width = 256;
    parallel_for((x.cols + width - 1) / width, [&](std::int64_t t) {
        const MomentArgs<T> args{x, t * width, std::min(x.cols, (t + 1) * width), mean, scatter};
        simd::dispatch<MomentKernel<T>>(&args);
    });
}

template void column_moments<float>(MatrixView<const float>, double *, double *);
template void column_moments<double>(MatrixView<const double>, double *, double *);
template void column_means<float>(MatrixView<const float>, const double *, double *);
template void column_means<double>(MatrixView<const double>, const double *, double *);
template void column_scatter<float>(MatrixView<const float>, const double *, const double *, double *);
template void column_scatter<double>(MatrixView<const double>, const double *, const double *, double *);
template double sum_of_squares<float>(MatrixView<const float>);
template double sum_of_squares<double>(MatrixView<const double>);

} // namespace subspan
