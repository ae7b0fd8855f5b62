#include "subspan/cuda/householder_qr.hpp"

#include "linalg/blas.cuh"
#include "base/copy.cuh"
#include "base/library.cuh"
#include "subspan/cuda/solver.hpp"

#include <algorithm>
#include <limits>
#include <mutex>

namespace subspan::cuda {
namespace {

SolverTable table;
std::mutex guard;

void require(int status, const char *what) {
    if (status != 0) throw CudaError(std::string(what) + ": cuSOLVER status " + std::to_string(status));
}

SolverTable solver() {
    if (!has_solver()) load_libraries();
    const std::lock_guard<std::mutex> lock(guard);
    if (table.geqrf32 == nullptr)
        throw BackendError("cuSOLVER was not found, and this call needs it; install nvidia-cusolver, cupy-cuda13x[ctk] or PyTorch with CUDA");
    return table;
}

// One handle for each thread and device, as of cuBLAS.
void *handle_of(const SolverTable &t, const Session &s) {
    thread_local void *handles[kMaxDevices] = {};
    void *&handle = handles[s.index()];
    if (handle == nullptr) require(t.create(&handle), "creating a cuSOLVER handle");
    require(t.set_stream(handle, s.stream()), "cusolverDnSetStream");
    return handle;
}

int items_of(const SolverTable &t, void *handle, int m, int n, float *) {
    int items = 0;
    require(t.size32(handle, m, n, nullptr, m, &items), "cusolverDnSgeqrf_bufferSize");
    return items;
}
int items_of(const SolverTable &t, void *handle, int m, int n, double *) {
    int items = 0;
    require(t.size64(handle, m, n, nullptr, m, &items), "cusolverDnDgeqrf_bufferSize");
    return items;
}
void factor(const SolverTable &t, void *handle, int m, int n, float *a, float *tau, float *work, int items, int *info) {
    require(t.geqrf32(handle, m, n, a, m, tau, work, items, info), "cusolverDnSgeqrf");
}
void factor(const SolverTable &t, void *handle, int m, int n, double *a, double *tau, double *work, int items, int *info) {
    require(t.geqrf64(handle, m, n, a, m, tau, work, items, info), "cusolverDnDgeqrf");
}

// V, R and the factors of one matrix from LAPACK's packed form, column by column.
template <class T>
__global__ void __launch_bounds__(256)
    unpack_kernel(const T *packed, const T *factors, const Matrices<T> v, const Matrices<T> r, const Matrices<T> tau, const unsigned item) {
    const int64_t m = v.rows, n = r.cols, k = v.cols, e = int64_t(blockIdx.x) * 256 + threadIdx.x;
    if (e < k) tau.at(item)[e * tau.col_stride] = factors[e];
    if (e >= m * n) return;
    const int64_t j = e / m, i = e - j * m;
    if (j < k) v.at(item)[i * v.row_stride + j * v.col_stride] = i > j ? packed[e] : (i == j ? T(1) : T(0));
    if (i < k) r.at(item)[i * r.row_stride + j * r.col_stride] = i <= j ? packed[e] : T(0);
}

template <class T> __global__ void __launch_bounds__(256) negate_kernel(SUBSPAN_PARAMETER const Matrices<T> x, const int64_t items) {
    const Place p = place_of(x.rows, x.cols);
    if (p.item >= items) return;
    T &y = x.at(p.item)[p.row * x.row_stride + p.col * x.col_stride];
    y = p.row <= p.col ? -y : T(0);
}

void check_size(const Stack &a) {
    const int64_t top = std::numeric_limits<int>::max();
    if (a.rows > top / 256 || a.cols > top / 256 || a.rows * a.cols > top) throw ValueError("A has matrices that are too large for cuSOLVER");
}

} // namespace

void set_solver(const SolverTable &t) {
    const std::lock_guard<std::mutex> lock(guard);
    table = t;
}

bool has_solver() {
    const std::lock_guard<std::mutex> lock(guard);
    return table.geqrf32 != nullptr;
}

bool load_solver(const char *path, bool loaded_only) {
    void *library = open_library(path, loaded_only);
    if (library == nullptr) return false;
    SolverTable t;
    if (!find(library, "cusolverDnCreate", t.create) || !find(library, "cusolverDnSetStream", t.set_stream) ||
        !find(library, "cusolverDnSgeqrf_bufferSize", t.size32) || !find(library, "cusolverDnSgeqrf", t.geqrf32) ||
        !find(library, "cusolverDnDgeqrf_bufferSize", t.size64) || !find(library, "cusolverDnDgeqrf", t.geqrf64))
        return false;
    set_solver(t);
    return true;
}

std::int64_t large_householder_qr_workspace(const Stack &a, const Stack &v, const Stack &t, int device) {
    if (a.size() == 0 || v.rows == 0 || v.cols == 0) return 0;
    check_size(a);
    Context context;
    context.device = device;
    const Session s(context);
    const SolverTable table_now = solver();
    return dispatch_wide(a.dtype, [&](auto tag) {
        using T = decltype(tag);
        const int64_t items = items_of(table_now, handle_of(table_now, s), int(a.rows), int(a.cols), static_cast<T *>(nullptr));
        return std::max(room<T>(a.rows * a.cols) + room<T>(v.cols) + room<T>(items) + room<int>(1), wide_reflection_core_workspace(v, t, device));
    });
}

void large_householder_qr(const Context &context, const Stack &a, const Stack &v, const Stack &r, const Stack &tau, const Stack &t) {
    check_qr(a, v, r, tau, t);
    require_blas_layout(operand(v, 0), "V");
    if (t.col_stride != 1) throw ValueError("T must have contiguous rows");
    if (a.size() == 0 || v.rows == 0 || v.cols == 0) return;
    check_size(a);
    {
        const Session s(context);
        const SolverTable table_now = solver();
        void *handle = handle_of(table_now, s);
        dispatch_wide(a.dtype, [&](auto tag) {
            using T = decltype(tag);
            const int m = int(a.rows), n = int(a.cols), items = items_of(table_now, handle, m, n, static_cast<T *>(nullptr));
            Workspace work(context);
            T *packed = work.take<T>(int64_t(m) * n), *factors = work.take<T>(v.cols), *scratch = work.take<T>(items);
            int *info = work.take<int>(1); // of arguments only, which are right
            for (int64_t i = 0; i < a.size(); ++i) {
                copy<T, T>(s, static_cast<const T *>(a.data) + offset_of(a, i), a.row_stride, a.col_stride, packed, 1, m, m, n);
                factor(table_now, handle, m, n, packed, factors, scratch, items, info);
                launch<unpack_kernel<T>>(s, "factors of a QR", one_each(int64_t(m) * n), static_cast<const T *>(packed), static_cast<const T *>(factors),
                                         Matrices<T>(v), Matrices<T>(r), Matrices<T>(tau), unsigned(i));
            }
        });
    }
    wide_reflection_core(context, v, &tau, t); // -T
    const Session s(context);
    dispatch_wide(a.dtype, [&](auto tag) {
        using T = decltype(tag);
        launch<negate_kernel<T>>(s, "the core of a QR", one_each(t.size() * t.rows * t.cols), Matrices<T>(t), t.size());
    });
}

} // namespace subspan::cuda
