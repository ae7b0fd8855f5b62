// apply_core where k is too wide for shared memory: three products by cuBLAS, one matrix of the stack after the other.
#include "linalg/apply_core_wide.cuh"

#include "linalg/blas.cuh"
#include "base/copy.cuh"

namespace subspan::cuda {
namespace {

// y = the core times s, where it is diagonal or a number, or s itself; rounded to T.
template <class T>
__global__ void __launch_bounds__(256)
    scale_kernel(const Accumulate<T> *s, const Accumulate<T> *diagonal, int64_t stride, Accumulate<T> value, T *y, int64_t cols, int64_t all) {
    const int64_t e = int64_t(blockIdx.x) * 256 + threadIdx.x;
    if (e < all) y[e] = narrow<T>((diagonal != nullptr ? diagonal[(e / cols) * stride] : value) * s[e]);
}

// All of them before the first product.
void check_layouts(const CoreCall &call, const CoreOptions &o) {
    require_blas_layout(operand(call.c), "C");
    require_blas_layout(operand(call.v), "V");
    require_blas_layout(operand(call.out), "out");
    if (call.source != nullptr) require_blas_layout(operand(*call.source), "source");
    if (o.kind == CoreOptions::full) require_blas_layout(operand(*call.core), "M");
}

} // namespace

int64_t apply_core_wide_room(const CoreCall &call, const CoreOptions &o, int device) {
    const int64_t all = call.v.cols * call.c.cols;
    if (call.packed == nullptr) check_layouts(call, o); // of all matrices of a group before the first one changes
    return blas_workspace(device) + dispatch(call.c.dtype, [&](auto tag) -> int64_t {
               using T = decltype(tag);
               return (o.kind == CoreOptions::full ? 2 : 1) * room<Accumulate<T>>(all) + room<T>(all);
           });
}

template <class T> void apply_core_wide(const Session &s, const Context &context, const CoreCall &call, const CoreOptions &o) {
    using A = Accumulate<T>;
    check_layouts(call, o);
    Workspace work(context);
    const Blas blas(s, work);
    const int64_t m = call.c.rows, n = call.c.cols, k = call.v.cols, all = k * n;
    const DType wide = sizeof(A) == 8 ? DType::f64 : DType::f32;
    A *sums = work.take<A>(all), *moved = o.kind == CoreOptions::full ? work.take<A>(all) : nullptr;
    T *y = work.take<T>(all);
    const Operand small{sums, wide, k, n, n, 1}, after{moved, wide, k, n, n, 1}, rounded{y, call.c.dtype, k, n, n, 1};
    const Matrices<const T> c(call.c);
    const Matrices<T> out(call.out);
    Matrices<const A> core{};
    if (call.core != nullptr) core = Matrices<const A>(*call.core);
    for (int64_t item = 0; item < call.c.size(); ++item) {
        const unsigned i = unsigned(item);
        const Operand x = operand(call.c, item), basis = operand(call.v, item), result = operand(call.out, item);
        if (call.source != nullptr) blas.multiply(1.0, basis.transposed(), operand(*call.source, item), 0.0, small);
        blas.multiply(call.source != nullptr ? -1.0 : 1.0, basis.transposed(), x, call.source != nullptr ? 1.0 : 0.0, small);
        const A *values = sums;
        if (o.kind == CoreOptions::full) {
            Operand mid = operand(*call.core, item);
            mid.rows = mid.cols = k;
            blas.multiply(1.0, mid, small, 0.0, after);
            values = moved;
        }
        const bool diagonal = o.kind == CoreOptions::diagonal && call.core != nullptr;
        launch<scale_kernel<T>>(s, "the core of a wide basis", Shape{dim3(unsigned(divide_up<int64_t>(all, 256))), dim3(256)}, values,
                                diagonal ? core.at(i) : nullptr, diagonal ? call.core->col_stride : int64_t(0),
                                o.kind == CoreOptions::scalar ? A(o.value) : A(1), y, n, all);
        if (o.alpha != 0.0 && result.data != x.data)
            copy(s, c.at(i), call.c.row_stride, call.c.col_stride, out.at(i), call.out.row_stride, call.out.col_stride, m, n);
        blas.multiply(1.0, basis, rounded, o.alpha, result);
    }
}
template void apply_core_wide<F16>(const Session &, const Context &, const CoreCall &, const CoreOptions &);
template void apply_core_wide<Bf16>(const Session &, const Context &, const CoreCall &, const CoreOptions &);
template void apply_core_wide<float>(const Session &, const Context &, const CoreCall &, const CoreOptions &);
template void apply_core_wide<double>(const Session &, const Context &, const CoreCall &, const CoreOptions &);

} // namespace subspan::cuda
