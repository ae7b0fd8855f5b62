#include "subspan/cuda/grassmann_mean.hpp"

#include "grassmann/point_step.cuh"
#include "subspan/cuda/grassmann.hpp"
#include "subspan/cuda/launch.cuh"

#include <limits>

namespace subspan::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
enum Row { step_length, variance, gradient_norm, iterations, status, next_time, work };

// trial = Σ w_i log_i, an entry a thread, points in their order; and for each block the sums of its squares and of w_i log_i².
template <class T>
__global__ void __launch_bounds__(kThreads)
    average_kernel(const T *logs, const double *weights, T *trial, double *numbers, const int64_t points, const int64_t means, const int64_t each) {
    SUBSPAN_SHARED(memory);
    double *sums = reinterpret_cast<double *>(memory);
    const int64_t e = int64_t(blockIdx.y) * kThreads + threadIdx.x, mean = blockIdx.x;
    double sum = 0, squares = 0;
    if (e < each) {
        const T *from = logs + mean * each + e;
#pragma unroll 4
        for (int64_t i = 0; i < points; ++i) {
            const double x = double(from[i * means * each]), w = weights[i];
            if (w == 0.0) continue; // also where the logarithm is NaN
            sum = fma(w, x, sum);
            squares = fma(w * x, x, squares);
        }
        trial[mean * each + e] = T(sum);
    }
    sum = warp_sum(sum * sum);
    squares = warp_sum(squares);
    if (threadIdx.x % 32 == 0) {
        sums[threadIdx.x / 32] = sum;
        sums[kWarps + threadIdx.x / 32] = squares;
    }
    __syncthreads();
    if (threadIdx.x < 2) {
        double all = 0;
        for (int w = 0; w < kWarps; ++w) all += sums[threadIdx.x * kWarps + w];
        numbers[(work + 2 * int64_t(blockIdx.y) + threadIdx.x) * means + mean] = all;
    }
}

// Whether the trial is taken, a warp a mean: the length of the next step says so to those that copy, negative where it is not.
__global__ void __launch_bounds__(32)
    decide_kernel(double *numbers, const int64_t means, const int blocks, const bool first, const double tolerance, const double limit) {
    double *mine = numbers + blockIdx.x, gradient = 0, spread = 0;
    for (int b = int(threadIdx.x); b < blocks; b += 32) {
        gradient += mine[(work + 2 * b) * means];
        spread += mine[(work + 2 * b + 1) * means];
    }
    gradient = sqrt(warp_sum(gradient));
    spread = warp_sum(spread);
    if (threadIdx.x != 0) return;
    double t = first ? 1.0 : mine[step_length * means];
    t = t < 0 ? -t : t;
    MeanStatus now = first ? MeanStatus::running : MeanStatus(int(mine[status * means]));
    double done = first ? 0.0 : mine[iterations * means];
    bool taken = first;
    if (!first && now == MeanStatus::running) {
        done += 1.0;
        // Close to the mean the variance changes by rounding only, and the gradient decides.
        taken = !(spread > mine[variance * means] && !(gradient < mine[gradient_norm * means]));
        t = taken ? least(1.0, 1.5 * t) : 0.5 * t;
    }
    if (now == MeanStatus::running) {
        if (taken) {
            mine[variance * means] = spread;
            mine[gradient_norm * means] = gradient;
        }
        if (!(spread + gradient < 1e300))
            now = MeanStatus::not_finite;
        else if (mine[gradient_norm * means] <= tolerance)
            now = MeanStatus::converged;
        else if (done >= limit || t < 1e-6)
            now = MeanStatus::stopped;
    }
    mine[step_length * means] = taken ? t : -t;
    mine[iterations * means] = done;
    mine[status * means] = double(int(now));
    mine[next_time * means] = now == MeanStatus::running ? t : 0.0; // of the geodesic
}

// What is taken becomes the mean and its direction.
template <class T>
__global__ void __launch_bounds__(kThreads)
    take_kernel(T *mean, const T *next, T *direction, const T *trial, const double *numbers, const int64_t each, const bool first) {
    const int64_t e = int64_t(blockIdx.y) * kThreads + threadIdx.x, at = int64_t(blockIdx.x) * each + e;
    if (e >= each || !(numbers[blockIdx.x] > 0)) return;
    direction[at] = trial[at];
    if (!first) mean[at] = next[at];
}

int64_t blocks_of(const Stack &mean) { return divide_up<int64_t>(mean.rows * mean.cols, kThreads); }

void check(const MeanIteration &m) {
    check_points(m.mean);
    check_pair(m.mean, m.direction, "the direction");
    check_pair(m.mean, m.next, "work");
    check_pair(m.mean, m.trial, "work");
    check_pair(m.u, m.mean_of_each, "the means");
    check_pair(m.u, m.logs, "logs");
    if (m.u.rows != m.mean.rows || m.u.cols != m.mean.cols || m.u.dtype != m.mean.dtype) throw ValueError("the means do not fit U");
    if (m.u.size() == 0 || m.mean.size() == 0 || m.u.size() % m.mean.size() != 0) throw ValueError("U holds no points");
    if (blocks_of(m.mean) > 65535 || m.mean.size() > std::numeric_limits<int>::max()) throw ValueError("U is too large for one call");
}

// Logarithms at `at` (the means or the trial points, over the axes of U), their mean, and what follows from it.
void evaluate(const Context &context, const MeanIteration &m, const Stack &at, bool first) {
    grassmann_log(context, at, m.u, m.logs);
    const Session s(context);
    const int64_t means = m.mean.size(), each = m.mean.rows * m.mean.cols, blocks = blocks_of(m.mean);
    dispatch_wide(m.mean.dtype, [&](auto tag) {
        using T = decltype(tag);
        const auto data = [](const Stack &x) { return static_cast<T *>(x.data); };
        const dim3 grid{unsigned(means), unsigned(blocks)};
        launch<average_kernel<T>>(s, "a mean of tangents", Shape{grid, dim3(kThreads), 2 * kWarps * int64_t(sizeof(double))},
                                  static_cast<const T *>(data(m.logs)), m.weights, data(m.trial), m.numbers, m.u.size() / means, means, each);
        launch<decide_kernel>(s, "a mean's step", Shape{dim3(unsigned(means)), dim3(32)}, m.numbers, means, int(blocks), first, m.tolerance, double(m.limit));
        launch<take_kernel<T>>(s, "a mean's step", Shape{grid, dim3(kThreads)}, data(m.mean), static_cast<const T *>(data(m.next)), data(m.direction),
                               static_cast<const T *>(data(m.trial)), static_cast<const double *>(m.numbers), each, first);
    });
}

} // namespace

std::int64_t mean_rows(const Stack &mean) { return work + 2 * blocks_of(mean); }

void mean_begin(const Context &context, const MeanIteration &m) {
    check(m);
    evaluate(context, m, m.mean_of_each, true);
}

void mean_iterate(const Context &context, const MeanIteration &m) {
    check(m);
    {
        const Session s(context);
        timed_exp(s, m.mean, m.direction, m.numbers + next_time * m.mean.size(), m.next);
    }
    Stack there = m.mean_of_each;
    there.data = m.next.data; // of the same layout
    evaluate(context, m, there, false);
}

} // namespace subspan::cuda
