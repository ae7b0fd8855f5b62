#include "subspan/cuda/grassmann_steps.hpp"

#include "grassmann/point_step.cuh"
#include "grassmann/point_sweeps.cuh"

#include <cmath>

namespace subspan::cuda {
namespace {

using namespace sweeps;

template <class T> struct Moments {
    Matrices<T> first, second;
    double beta1, beta2, eps, rate, bias2; // rate: -lr / (1 - beta1^step)
    double *scales;
};

// Moments of a point, and how far it is to go along the first one; NaN, and nothing written, where something is not finite.
template <class T, int K>
__global__ void __launch_bounds__(kThreads, 1) moments_kernel(SUBSPAN_PARAMETER const Arguments<T> a, SUBSPAN_PARAMETER const Moments<T> o) {
    using S = small::Small<K, kThreads>;
    constexpr int ld = S::ld, kColumns = K / 4;
    SUBSPAN_SHARED(memory);
    Shared<K> &sh = *reinterpret_cast<Shared<K> *>(memory);
    T *along = reinterpret_cast<T *>(memory + sizeof(Shared<K>)), *parts = along + K * K;
    const Point<T, 0> point(a, blockIdx.x);
    T *first = o.first.at(blockIdx.x), *second = o.second.at(blockIdx.x);
    const int k = point.k, tid = int(threadIdx.x), j0 = 4 * (tid % kColumns);
    products<T, K>(point, sh, parts, nullptr);
    const double defect = S::largest(k, sh.scratch, [&](int i, int j) { return sh.e[i * ld + j] - (i == j ? 1.0 : 0.0); });
    for (int e = tid; e < K * K; e += kThreads) along[e] = e / K < k && e % K < k ? T(sh.m[(e / K) * ld + e % K]) : T(0);
    __syncthreads();
    // (I - U Uᵀ) grad, four entries of a row.
    const auto tangent = [&](int row) {
        Four<T> g = point.of_h(row, j0);
#pragma unroll 1
        for (int l = 0; l < k; l += 4) {
            const Four<T> u = point.of_u(row, l);
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int e = 0; e < 4; ++e) g.x[e] = fma(-u.x[i], along[(l + i) * K + j0 + e], g.x[e]);
        }
        return g;
    };
    const auto averaged = [&](int row, const Four<T> &g) {
        Four<T> m = four<T>(first + row * o.first.row_stride, o.first.col_stride, j0, k, a.vectors);
#pragma unroll
        for (int e = 0; e < 4; ++e) m.x[e] = fma(T(o.beta1), m.x[e], T(1.0 - o.beta1) * g.x[e]);
        return m;
    };
    constexpr int kStep = kThreads / kColumns;
    double squares = 0, length = 0;
#pragma unroll 1
    for (int row = tid / kColumns; row < point.n; row += kStep) {
        const Four<T> g = tangent(row), m = averaged(row, g);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            squares = fma(double(g.x[e]), double(g.x[e]), squares);
            length = fma(double(m.x[e]), double(m.x[e]), length);
        }
    }
    squares = warp_sum(squares);
    length = warp_sum(length);
    double *sums = sh.c; // work of nobody here
    if (tid % 32 == 0) {
        sums[tid / 32] = squares;
        sums[kWarps + tid / 32] = length;
    }
    __syncthreads();
    squares = length = 0;
    for (int w = 0; w < kWarps; ++w) {
        squares += sums[w];
        length += sums[kWarps + w];
    }
    const double top = sizeof(T) == 4 ? 3.4028234663852886e38 : 1.7976931348623157e308, before = double(*second);
    const double sum = o.beta2 * before + (1.0 - o.beta2) * squares, under = sqrt(sum / o.bias2) + o.eps;
    const double ratio = under > 0.0 ? o.rate / under : 0.0, scale = ratio > 1e300 ? 1e300 : (ratio < -1e300 ? -1e300 : ratio); // no gradient, no step
    // What the step itself would refuse is refused here, before a moment has changed.
    const bool good = defect * k < 0.5 && before >= 0.0 && before <= top && squares < 1e307 && length < 0.25 * top && scale * scale * length < 1e99;
    __syncthreads(); // all have read `second`
    if (tid == 0) o.scales[blockIdx.x] = good ? scale : 0.0 / (before * 0.0);
    if (!good) return;
    if (tid == 0) *second = T(sum > top ? top : sum);
#pragma unroll 1
    for (int row = tid / kColumns; row < point.n; row += kStep) {
        point.put(first, o.first, row, j0, averaged(row, tangent(row)));
    }
}

} // namespace

void sgd_step(const Context &context, const Stack &u, const Stack &grad, const Stack *buffer, double momentum, double dampening, const StepOptions &options) {
    check_points(u);
    check_pair(u, grad, "grad");
    if (buffer != nullptr) check_pair(u, *buffer, "buffer");
    options.require_valid();
    const Session s(context);
    if (u.size() == 0 || u.rows == 0 || u.cols == 0) return;
    momentum_step(s, u, grad, buffer, momentum, dampening, options);
}

std::int64_t adam_step_workspace(const Stack &u) { return room<double>(u.size()); }

void adam_step(const Context &context, const Stack &u, const Stack &grad, const Stack &first, const Stack &second, std::int64_t step, double beta1,
               double beta2, double eps, const StepOptions &options) {
    check_points(u);
    check_pair(u, grad, "grad");
    check_pair(u, first, "first_moment");
    if (second.size() != u.size() || second.rows != 1 || second.cols != 1) throw ValueError("second_moment must have one entry for each point");
    if (second.dtype != u.dtype) throw ValueError(std::string("second_moment must be ") + name_of(u.dtype) + " as U is, got " + name_of(second.dtype));
    options.require_valid();
    check_adam(step, beta1, beta2, eps);
    const Session s(context);
    if (u.size() == 0 || u.rows == 0 || u.cols == 0) return;
    require_step_fits(s, u, options.parallel()); // before the moments change
    Workspace work(context);
    double *scales = work.take<double>(u.size());
    dispatch_wide(u.dtype, [&](auto tag) {
        using T = decltype(tag);
        Arguments<T> a{};
        a.u = Matrices<T>(u);
        a.grad = Matrices<const T>(grad);
        a.vectors = in_vectors(u) && in_vectors(grad) && in_vectors(first);
        a.job = step_in_place;
        const Moments<T> moments{Matrices<T>(first),
                                 Matrices<T>(second),
                                 beta1,
                                 beta2,
                                 eps,
                                 -options.lr / (1.0 - std::pow(beta1, double(step))),
                                 1.0 - std::pow(beta2, double(step)),
                                 scales};
        with_width(u.cols, [&](auto width) {
            constexpr int K = decltype(width)::value;
            const int64_t shared = int64_t(sizeof(Shared<K>)) + (K * K + kParts<T, K>)*int64_t(sizeof(T));
            launch<moments_kernel<T, K>>(s, "moments", Shape{dim3(unsigned(u.size())), dim3(kThreads), shared}, a, moments);
        });
    });
    scaled_step(s, u, first, scales, options.retraction, options.parallel());
}

} // namespace subspan::cuda
