#include "subspan/cuda/spaces.hpp"

#include "base/block.cuh"
#include "base/copy.cuh"
#include "linalg/jacobi_svd.cuh"

namespace subspan::cuda {
namespace {

constexpr int kThreads = 1024;

// x / ‖x‖ in double, through its largest entry, whose square may be no number.
template <class T> SUBSPAN_DEVICE void unit(const T *x, int64_t step, int64_t n, double *parts, double *out) {
    const double top = block_most<kThreads>(parts, n, [&](int64_t i) { return double(x[i * step]); });
    const double sum = block_sum<kThreads>(parts, n, [&](int64_t i) {
        const double y = double(x[i * step]) / top;
        return y * y;
    });
    for (int64_t i = threadIdx.x; i < n; i += kThreads) out[i] = double(x[i * step]) / top * inverse_root(sum);
    __syncthreads();
}

// One block. As on the CPU: of half sums and differences, which lose no digits where the two directions are close.
template <class T, class W>
__global__ void __launch_bounds__(kThreads, 1) rotation_kernel(const W *source, const int64_t ds, const W *target, const int64_t dt, const int64_t n, double *s,
                                                               double *t, SUBSPAN_PARAMETER const Matrices<T> v, SUBSPAN_PARAMETER const Matrices<W> m) {
    SUBSPAN_SHARED(memory);
    double *parts = reinterpret_cast<double *>(memory);
    unit(source, ds, n, parts, s);
    unit(target, dt, n, parts, t);
    const double plus = block_sum<kThreads>(parts, n, [&](int64_t i) { return (s[i] + t[i]) * (s[i] + t[i]); });
    const double minus = block_sum<kThreads>(parts, n, [&](int64_t i) { return (s[i] - t[i]) * (s[i] - t[i]); });
    const double along = block_sum<kThreads>(parts, n, [&](int64_t i) { return s[i] * (t[i] - s[i]); });
    // What the target has across the source, projected twice.
    const double again = block_sum<kThreads>(parts, n, [&](int64_t i) { return s[i] * (t[i] - s[i] - s[i] * along); });
    const auto across = [&](int64_t i) { return t[i] - s[i] - s[i] * along - s[i] * again; };
    const double length = block_sum<kThreads>(parts, n, [&](int64_t i) { return across(i) * across(i); });
    const double scale = length > 0 ? inverse_root(length) : length; // NaN goes on
    const double none = plus < 1e-24 ? nan("") : 0.0;
    for (int64_t i = threadIdx.x; i < n; i += kThreads) {
        v.data[i * v.row_stride] = narrow<T>(Accumulate<T>(s[i]));
        v.data[i * v.row_stride + v.col_stride] = narrow<T>(Accumulate<T>(across(i) * scale));
    }
    if (threadIdx.x != 0) return;
    const double sine = sqrt(plus) * sqrt(minus) / 2 + none, less = -minus / 2 + none; // less: cosine - 1
    const auto put = [&](int64_t i, int64_t j, double x) { m.data[i * m.row_stride + j * m.col_stride] = W(x); };
    put(0, 0, less);
    put(1, 1, less);
    put(0, 1, -sine);
    put(1, 0, sine);
}

} // namespace

std::int64_t column_svd_workspace(const Stack &a, int device) {
    if (a.size() == 0 || a.rows == 0 || a.cols == 0) return 0;
    return blas_workspace(device) + RowSvd::workspace(a.cols, a.rows, a.cols, false, a.size()) + room<double>(a.rows * a.cols);
}

void column_svd(const Context &context, const Stack &a, const Stack &values, const Stack &left, const Stack &right, bool unit_columns) {
    const int64_t n = a.rows, l = a.cols;
    if (l > n) throw ValueError("A has more columns than rows");
    if (values.dtype != DType::f64 || values.cols != l || values.size() != a.size()) throw ValueError("values do not fit A");
    const Session s(context);
    if (a.size() == 0 || l == 0) return;
    Workspace work(context);
    const Blas blas(s, work);
    const RowSvd svd(work, l, n, l, false, a.size());
    double *found = work.take<double>(n * l);
    dispatch(a.dtype, [&](auto tag) {
        using T = decltype(tag);
        const int64_t items = a.size();
        copies<T, double>(s, a.transposed(), 0, own_stack(svd.rows(0), items, l, n, svd.pitch()), 0, items);
        if (unit_columns) unit_rows(s, svd.rows(0), svd.pitch(), items * l, n);
        for (int64_t i = 0; i < items; ++i) svd.gram(s, blas, n, i);
        svd.run(s);
        copies<double, double>(s, own_stack(svd.sigma(0), items, 1, l, l), 0, values, 0, items);
        if (right.data != nullptr) copies<double, T>(s, own_stack(svd.rotations(0), items, l, l, l), 0, right.transposed(), 0, items);
        for (int64_t i = 0; i < items && left.data != nullptr; ++i) {
            svd.vectors(s, blas, n, found, i);
            copy(s, static_cast<const double *>(found), n, int64_t(1), Matrices<T>(left).at(unsigned(i)), left.col_stride, left.row_stride, l, n);
        }
    });
}

std::int64_t rotation_workspace(const Stack &source) { return 2 * room<double>(source.cols); }

void rotation(const Context &context, const Stack &source, const Stack &target, const Stack &v, const Stack &m) {
    const Session s(context);
    Workspace work(context);
    double *one = work.take<double>(source.cols), *other = work.take<double>(source.cols);
    dispatch(v.dtype, [&](auto tag) {
        using T = decltype(tag);
        using W = Accumulate<T>;
        launch<rotation_kernel<T, W>>(s, "a rotation", Shape{dim3(1), dim3(kThreads), kThreads / 32 * 8}, static_cast<const W *>(source.data),
                                      source.col_stride, static_cast<const W *>(target.data), target.col_stride, source.cols, one, other, Matrices<T>(v),
                                      Matrices<W>(m));
    });
}

} // namespace subspan::cuda
