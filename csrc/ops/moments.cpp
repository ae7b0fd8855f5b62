#include "subspan/moments.hpp"

#include "simd.hpp"
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

} // namespace

template <class T> void column_moments(MatrixView<const T> x, double *mean, double *scatter) {
    const std::int64_t width = 256;
    parallel_for((x.cols + width - 1) / width, [&](std::int64_t t) {
        const MomentArgs<T> args{x, t * width, std::min(x.cols, (t + 1) * width), mean, scatter};
        simd::dispatch<MomentKernel<T>>(&args);
    });
}

template void column_moments<float>(MatrixView<const float>, double *, double *);
template void column_moments<double>(MatrixView<const double>, double *, double *);

} // namespace subspan
