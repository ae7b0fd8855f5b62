#include "linalg/blas.cuh"

#include "base/library.cuh"

#include <algorithm>
#include <limits>
#include <mutex>
#include <string>

namespace subspan::cuda {
namespace {

BlasTable table;
std::mutex guard;
void (*loader)() = nullptr;

// cuBLAS's numbers (cublas_api.h, library_types.h).
int type_of(DType d) { return d == DType::f64 ? 1 : (d == DType::f32 ? 0 : (d == DType::f16 ? 2 : 14)); }
constexpr int kCompute32 = 68, kCompute64 = 70, kDefaultAlgorithm = -1;

void require(int status, const char *what) {
    if (status != 0) throw CudaError(std::string(what) + ": cuBLAS status " + std::to_string(status));
}

// The leading dimension of a matrix as cuBLAS sees it, column by column, and whether it is to be transposed.
struct Seen {
    int op;
    int64_t ld;
};
bool lines(int64_t count, int64_t length, int64_t stride, int64_t step) { // contiguous lines that do not overlap, one after the other
    return (step == 1 || length <= 1) && (count <= 1 || stride >= std::max<int64_t>(length, 1));
}
Seen seen(const Operand &x) { // rows of x are columns there: x as it is means xᵀ
    if (lines(x.rows, x.cols, x.row_stride, x.col_stride)) return {0, x.rows <= 1 ? std::max<int64_t>(x.cols, 1) : x.row_stride};
    return {1, x.cols <= 1 ? std::max<int64_t>(x.rows, 1) : x.col_stride};
}

} // namespace

void set_blas(const BlasTable &t) {
    const std::lock_guard<std::mutex> lock(guard);
    table = t;
}

void set_library_loader(void (*load)()) { loader = load; }

void load_libraries() {
    if (loader != nullptr) loader();
}

bool has_blas() {
    const std::lock_guard<std::mutex> lock(guard);
    return table.gemm != nullptr;
}

bool load_blas(const char *path, bool loaded_only) {
    void *library = open_library(path, loaded_only);
    if (library == nullptr) return false;
    BlasTable t;
    if (!find(library, "cublasCreate_v2", t.create) || !find(library, "cublasSetStream_v2", t.set_stream) ||
        !find(library, "cublasSetWorkspace_v2", t.set_workspace) || !find(library, "cublasGemmStridedBatchedEx", t.gemm))
        return false;
    find(library, "cublasGemmEx", t.gemm_one);
    set_blas(t);
    return true;
}

bool blas_layout(const Stack &x) {
    for (int a = 0; a < x.axes; ++a)
        if (x.stride[a] < 0) return false;
    return blas_layout(operand(x));
}
bool blas_layout(const Operand &x) { return lines(x.rows, x.cols, x.row_stride, x.col_stride) || lines(x.cols, x.rows, x.col_stride, x.row_stride); }

void require_blas_layout(const Operand &x, const char *name) {
    if (!blas_layout(x))
        throw ValueError(std::string(name) +
                         " has neither rows nor columns that are contiguous and lie one after the other, which cuBLAS needs; copy it first");
}

std::int64_t blas_workspace(int device) {
    Context context;
    context.device = device;
    const Session s(context);
    return room<char>(s.device().major >= 9 ? 32 << 20 : 4 << 20); // what cuBLAS's guide recommends
}

void matrix_product(const Context &context, const Stack &a, const Stack &b, double alpha, const Stack &out) {
    const int64_t items = out.size();
    for (const Stack *x : {&a, &b, &out}) {
        if (x->size() != items) throw ValueError("factors and out must be of one size");
        require_blas_layout(operand(*x), x == &out ? "out" : "a factor");
    }
    if (a.dtype != b.dtype || a.dtype != out.dtype) throw ValueError("factors and out must have one dtype");
    if (a.cols != b.rows || out.rows != a.rows || out.cols != b.cols) throw ValueError("factors and out do not fit each other");
    const Session s(context);
    if (items == 0) return;
    Workspace work(context);
    if (out.rows == 0 || out.cols == 0 || a.cols == 0) throw ValueError("a factor is empty");
    const Blas blas(s, work);
    if (std::max({a.axes, b.axes, out.axes}) <= 1) return blas.multiply(alpha, operand(a), operand(b), 0.0, operand(out), items);
    for (int64_t i = 0; i < items; ++i) blas.multiply(alpha, operand(a, i), operand(b, i), 0.0, operand(out, i));
}

Blas::Blas(const Session &s, Workspace &work) : handle_(nullptr) {
    if (!has_blas()) load_libraries();
    BlasTable t;
    {
        const std::lock_guard<std::mutex> lock(guard);
        t = table;
    }
    if (t.gemm == nullptr) throw BackendError("cuBLAS was not found, and this call needs it; install nvidia-cublas, cupy-cuda13x[ctk] or PyTorch with CUDA");
    // One handle for each thread and device: cuBLAS's handles are not for two threads at once.
    thread_local void *handles[kMaxDevices] = {};
    void *&handle = handles[s.index()];
    if (handle == nullptr) require(t.create(&handle), "creating a cuBLAS handle");
    require(t.set_stream(handle, s.stream()), "cublasSetStream");
    const int64_t bytes = s.device().major >= 9 ? 32 << 20 : 4 << 20;
    require(t.set_workspace(handle, work.take<char>(bytes), std::size_t(bytes)), "cublasSetWorkspace");
    handle_ = handle;
}

void Blas::multiply(double alpha, const Operand &a, const Operand &b, double beta, const Operand &c, int64_t batch) const {
    // cᵀ = bᵀ aᵀ in columns; where c has contiguous columns instead, everything is transposed first.
    if (!lines(c.rows, c.cols, c.row_stride, c.col_stride)) {
        require_blas_layout(c, "a result");
        return multiply(alpha, b.transposed(), a.transposed(), beta, c.transposed(), batch);
    }
    require_blas_layout(a, "an operand");
    require_blas_layout(b, "an operand");
    const Seen sa = seen(a), sb = seen(b);
    const int64_t ldc = c.rows <= 1 ? std::max<int64_t>(c.cols, 1) : c.row_stride, top = std::numeric_limits<int>::max();
    if (c.rows > top || c.cols > top || a.cols > top || sa.ld > top || sb.ld > top || ldc > top || batch > top)
        throw ValueError("a matrix is too large for cuBLAS");
    const bool wide = c.dtype == DType::f64;
    const float alpha32 = float(alpha), beta32 = float(beta);
    const void *pa = wide ? static_cast<const void *>(&alpha) : &alpha32, *pb = wide ? static_cast<const void *>(&beta) : &beta32;
    BlasTable t;
    {
        const std::lock_guard<std::mutex> lock(guard);
        t = table;
    }
    if (batch == 1 && t.gemm_one != nullptr)
        return require(t.gemm_one(handle_, sb.op, sa.op, int(c.cols), int(c.rows), int(a.cols), pa, b.data, type_of(b.dtype), int(sb.ld), a.data,
                                  type_of(a.dtype), int(sa.ld), pb, const_cast<void *>(c.data), type_of(c.dtype), int(ldc), wide ? kCompute64 : kCompute32,
                                  kDefaultAlgorithm),
                       "cublasGemmEx");
    require(t.gemm(handle_, sb.op, sa.op, int(c.cols), int(c.rows), int(a.cols), pa, b.data, type_of(b.dtype), int(sb.ld), b.next, a.data, type_of(a.dtype),
                   int(sa.ld), a.next, pb, const_cast<void *>(c.data), type_of(c.dtype), int(ldc), c.next, int(batch), wide ? kCompute64 : kCompute32,
                   kDefaultAlgorithm),
            "cublasGemmStridedBatchedEx");
}

} // namespace subspan::cuda
