#include "subspan/cuda/gram_core.hpp"

#include "base/copy.cuh"
#include "linalg/jacobi_svd.cuh"

namespace subspan::cuda {
namespace {

// Rows of `rotations` over their singular values; none where there is no value.
__global__ void __launch_bounds__(256) weigh_kernel(const double *rotations, const double *sigma, double *out, int64_t k) {
    const int64_t e = int64_t(blockIdx.x) * 256 + threadIdx.x;
    if (e >= k * k) return;
    const double s = sigma[e / k];
    out[e] = s == 0.0 ? 0.0 : rotations[e] / s;
}

bool by_gram(const Stack &v) { return v.dtype != DType::f64; }

int64_t room_for(const Stack &v, int device, int64_t more) {
    if (v.size() == 0 || v.rows == 0 || v.cols == 0) return 0;
    return blas_workspace(device) + RowSvd::workspace(v.cols, v.rows, v.cols, by_gram(v), v.size()) + more;
}

// Decomposes the columns of V; f(item) makes the result.
template <class F> void decompose(const Session &s, Workspace &work, const Stack &v, const F &f) {
    const Blas blas(s, work);
    const RowSvd svd(work, v.cols, v.rows, v.cols, by_gram(v), v.size());
    dispatch(v.dtype, [&](auto tag) {
        using T = decltype(tag);
        copies<T, double>(s, v.transposed(), 0, own_stack(svd.rows(0), v.size(), v.cols, v.rows, svd.pitch()), 0, v.size());
        for (int64_t i = 0; i < v.size(); ++i) svd.gram(s, blas, v.rows, i);
        svd.run(s);
        for (int64_t i = 0; i < v.size(); ++i) f(tag, blas, svd, i);
    });
}

void check(const Stack &v, const Stack &out, int64_t rows, DType dtype) {
    if (out.rows != rows || out.cols != v.cols || out.size() != v.size()) throw ValueError("out does not fit V");
    if (out.dtype != dtype) throw ValueError(std::string("out must be ") + name_of(dtype));
    if (v.cols > v.rows) throw ValueError("V has more columns than rows");
}

} // namespace

std::int64_t gram_core_workspace(const Stack &v, int device) { return room_for(v, device, 2 * room<double>(v.cols * v.cols)); }

void gram_core(const Context &context, const Stack &v, const Stack &out) {
    check(v, out, v.cols, v.dtype == DType::f64 ? DType::f64 : DType::f32);
    const Session s(context);
    if (v.size() == 0 || v.rows == 0 || v.cols == 0) return;
    Workspace work(context);
    const int64_t k = v.cols;
    double *weighed = work.take<double>(k * k), *core = work.take<double>(k * k);
    decompose(s, work, v, [&](auto tag, const Blas &blas, const RowSvd &svd, int64_t i) {
        using A = Accumulate<decltype(tag)>;
        launch<weigh_kernel>(s, "the core of a basis", Shape{dim3(unsigned(divide_up<int64_t>(k * k, 256))), dim3(256)},
                             static_cast<const double *>(svd.rotations(i)), static_cast<const double *>(svd.sigma(i)), weighed, k);
        const Operand w = own(weighed, k, k);
        blas.multiply(1.0, w.transposed(), w, 0.0, own(core, k, k));
        copy(s, static_cast<const double *>(core), k, int64_t(1), Matrices<A>(out).at(unsigned(i)), out.row_stride, out.col_stride, k, k);
    });
}

std::int64_t range_basis_workspace(const Stack &v, int device) { return room_for(v, device, room<double>(v.rows * v.cols)); }

void range_basis(const Context &context, const Stack &v, const Stack &out) {
    check(v, out, v.rows, v.dtype);
    const Session s(context);
    if (v.size() == 0 || v.rows == 0 || v.cols == 0) return;
    Workspace work(context);
    double *found = work.take<double>(v.rows * v.cols);
    decompose(s, work, v, [&](auto tag, const Blas &blas, const RowSvd &svd, int64_t i) {
        using T = decltype(tag);
        svd.vectors(s, blas, v.rows, found, i);
        copy(s, static_cast<const double *>(found), v.rows, int64_t(1), Matrices<T>(out).at(unsigned(i)), out.col_stride, out.row_stride, v.cols, v.rows);
    });
}

} // namespace subspan::cuda
