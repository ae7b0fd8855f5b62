// What tests turn on the emulated device.
#include "emulate.hpp"
#include "register.hpp"
#include "subspan/cuda/blas.hpp"
#include "subspan/cuda/device.cuh"
#include "subspan/cuda/solver.hpp"

#include <cmath>

#include <pybind11/pybind11.h>

namespace subspan::bind {
namespace {

// cuBLAS as its documentation has it, column by column, one entry after the other.
double item(const void *p, int type, long long i) {
    switch (type) {
    case 0: return static_cast<const float *>(p)[i];
    case 1: return static_cast<const double *>(p)[i];
    case 2: return cuda::widen(static_cast<const cuda::F16 *>(p)[i]);
    default: return cuda::widen(static_cast<const cuda::Bf16 *>(p)[i]);
    }
}
void put(void *p, int type, long long i, double x) {
    switch (type) {
    case 0: static_cast<float *>(p)[i] = float(x); break;
    case 1: static_cast<double *>(p)[i] = x; break;
    case 2: static_cast<cuda::F16 *>(p)[i] = cuda::narrow<cuda::F16>(float(x)); break;
    default: static_cast<cuda::Bf16 *>(p)[i] = cuda::narrow<cuda::Bf16>(float(x));
    }
}
int create(void **handle) {
    static int one;
    *handle = &one;
    return 0;
}
int set_stream(void *, void *) { return 0; }
int set_workspace(void *, void *p, std::size_t) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0 ? 0 : 7; }
int gemm(void *, int op_a, int op_b, int m, int n, int k, const void *alpha, const void *a, int type_a, int lda, long long stride_a, const void *b, int type_b,
         int ldb, long long stride_b, const void *beta, void *c, int type_c, int ldc, long long stride_c, int batch, int compute, int) {
    const bool wide = compute == 70;
    if (!wide && compute != 68) return 7;
    if (lda < (op_a == 0 ? m : k) || ldb < (op_b == 0 ? k : n) || ldc < m) return 7;
    const double x = wide ? *static_cast<const double *>(alpha) : *static_cast<const float *>(alpha);
    const double y = wide ? *static_cast<const double *>(beta) : *static_cast<const float *>(beta);
    for (int s = 0; s < batch; ++s)
        for (int j = 0; j < n; ++j)
            for (int i = 0; i < m; ++i) {
                double sum = 0;
                for (int l = 0; l < k; ++l)
                    sum += item(a, type_a, s * stride_a + (op_a == 0 ? i + (long long)l * lda : l + (long long)i * lda)) *
                           item(b, type_b, s * stride_b + (op_b == 0 ? l + (long long)j * ldb : j + (long long)l * ldb));
                const long long at = s * stride_c + i + (long long)j * ldc;
                put(c, type_c, at, x * sum + (y == 0 ? 0.0 : y * item(c, type_c, at)));
            }
    return 0;
}
int gemm_one(void *handle, int op_a, int op_b, int m, int n, int k, const void *alpha, const void *a, int type_a, int lda, const void *b, int type_b, int ldb,
             const void *beta, void *c, int type_c, int ldc, int compute, int algorithm) {
    return gemm(handle, op_a, op_b, m, n, k, alpha, a, type_a, lda, 0, b, type_b, ldb, 0, beta, c, type_c, ldc, 0, 1, compute, algorithm);
}

// cuSOLVER's geqrf as LAPACK describes it.
template <class T> int qr_items(void *, int, int n, T *, int, int *items) {
    *items = 3 * n;
    return 0;
}
template <class T> int qr(void *, int m, int n, T *a, int lda, T *tau, T *work, int items, int *info) {
    if (lda < m || items < 3 * n) return 3;
    work[items - 1] = T(0);
    *info = 0;
    for (int j = 0; j < (m < n ? m : n); ++j) {
        T *x = a + (long long)j * lda;
        double rest = 0, alpha = x[j];
        for (int i = j + 1; i < m; ++i) rest += double(x[i]) * double(x[i]);
        tau[j] = T(0);
        if (rest == 0) continue;
        const double beta = -std::copysign(std::sqrt(alpha * alpha + rest), alpha), factor = (beta - alpha) / beta;
        for (int i = j + 1; i < m; ++i) x[i] = T(double(x[i]) / (alpha - beta));
        x[j] = T(beta);
        tau[j] = T(factor);
        for (int c = j + 1; c < n; ++c) {
            T *y = a + (long long)c * lda;
            double sum = y[j];
            for (int i = j + 1; i < m; ++i) sum += double(x[i]) * double(y[i]);
            y[j] = T(double(y[j]) - factor * sum);
            for (int i = j + 1; i < m; ++i) y[i] = T(double(y[i]) - factor * sum * double(x[i]));
        }
    }
    return 0;
}

} // namespace

void register_emulated(pybind11::module_ &m) {
    namespace py = pybind11;
    using emulate::settings;
    auto e = m.def_submodule("emulated");
    e.def("reset", [] {
        settings = emulate::Settings{};
        cuda::set_blas({&create, &set_stream, &set_workspace, &gemm, &gemm_one});
        cuda::set_solver({&create, &set_stream, &qr_items<float>, &qr<float>, &qr_items<double>, &qr<double>});
    });
    e.def("without_blas", [] { cuda::set_blas({}); });
    e.def("without_solver", [] { cuda::set_solver({}); });
    e.def("seed", [](std::uint64_t s) { settings.seed = s; });
    e.def("devices", [](int n, int current) {
        settings.devices = n;
        settings.device = current;
    });
    e.def("hardware", [](int major, int shared) {
        settings.major = major;
        settings.shared_limit = shared;
    });
    e.def("cluster", [](int width) { settings.cluster = width; });
    e.def("sweeps", [](int n) { settings.sweeps = n; });
    e.def("fail_next_launch", [](int code) { settings.next_launch = static_cast<cudaError_t>(code); });
    e.def("leave_error", [](int code) { settings.last = static_cast<cudaError_t>(code); });
    e.def("error", [] { return int(settings.last); });
    e.def("driver", [](bool there) { settings.driver = there; });
    e.def("capture", [](bool on) { settings.capturing = on; });
    e.def("stream_device", [](int d) { settings.stream_device = d; });
    e.def("launches", [] { return settings.launches; });
}

} // namespace subspan::bind
