#include "subspan/cuda/affine.hpp"

#include "base/copy.cuh"

#include <algorithm>

namespace subspan::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(256)
    mean_kernel(SUBSPAN_PARAMETER const Matrices<const T> from, const double *mean, const double factor, SUBSPAN_PARAMETER const Matrices<T> to) {
    const Place p = place_of(to.rows, to.cols);
    if (p.item > 0) return;
    const double x = double(widen(from.data[p.row * from.row_stride + p.col * from.col_stride]));
    to.data[p.row * to.row_stride + p.col * to.col_stride] = narrow<T>(Accumulate<T>(fma(factor, mean[p.col], x)));
}

// A warp a row.
template <class T>
__global__ void __launch_bounds__(256)
    distances_kernel(SUBSPAN_PARAMETER const Matrices<const T> a, SUBSPAN_PARAMETER const Matrices<const T> b, SUBSPAN_PARAMETER const Matrices<T> out) {
    const int64_t i = int64_t(blockIdx.x) * 8 + threadIdx.x / 32;
    double sum = 0;
    if (i < a.rows)
        for (int64_t j = threadIdx.x % 32; j < a.cols; j += 32) {
            const double d = double(widen(a.data[i * a.row_stride + j * a.col_stride])) - double(widen(b.data[i * b.row_stride + j * b.col_stride]));
            sum = fma(d, d, sum);
        }
    sum = warp_sum(sum);
    if (i < a.rows && threadIdx.x % 32 == 0) out.data[i * out.col_stride] = narrow<T>(Accumulate<T>(sum));
}

} // namespace

void add_mean(const Context &context, const Stack &from, const double *mean, double factor, const Stack &to) {
    const Session s(context);
    if (to.rows == 0 || to.cols == 0) return;
    dispatch(to.dtype, [&](auto tag) {
        using T = decltype(tag);
        launch<mean_kernel<T>>(s, "a sum with the mean", one_each(to.rows * to.cols), Matrices<const T>(from), mean, factor, Matrices<T>(to));
    });
}

void row_distances(const Context &context, const Stack &a, const Stack &b, const Stack &out) {
    const Session s(context);
    if (a.rows == 0) return;
    dispatch(a.dtype, [&](auto tag) {
        using T = decltype(tag);
        launch<distances_kernel<T>>(s, "distances of rows", Shape{dim3(unsigned(divide_up<int64_t>(a.rows, 8))), dim3(256)}, Matrices<const T>(a),
                                    Matrices<const T>(b), Matrices<T>(out));
    });
}

} // namespace subspan::cuda
