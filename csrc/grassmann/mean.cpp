#include "subspan/grassmann_mean.hpp"

#include "linalg/packed_gram.hpp"
#include "grassmann/point_step.hpp"
#include "base/scratch.hpp"
#include "linalg/small_dense.hpp"
#include "subspan/errors.hpp"
#include "subspan/parallel.hpp"

#include <algorithm>
#include <cmath>
#include <string>

namespace subspan {
namespace {

using std::int64_t;

// Points are summed in this many groups, and groups in their order: the same for any number of threads.
constexpr int64_t kGroups = 8;

template <class T> struct Points {
    const StackView<const T> &u;
    const double *weights;
    int64_t count, step, offset; // point i of this mean is u[i · step + offset]
    MatrixView<const T> operator[](int64_t i) const { return u[i * step + offset]; }
};

// direction = Σ w_i log(mean, U_i); returns Σ w_i distance².
template <class T> double average_log(const Points<T> &points, MatrixView<const T> mean, MatrixView<T> direction) {
    const int64_t n = mean.rows, k = mean.cols, all = small::area(k);
    const int64_t groups = std::min(kGroups, points.count), each = (points.count + groups - 1) / groups;
    Frame frame;
    T *sums = frame.zeros<T>(groups * n * k);
    double *squares = frame.zeros<double>(groups);
    parallel_for(groups, [&](int64_t g) {
        Frame mine;
        PackedBlock<T> packed(mine, n, k, 2);
        double *m = mine.take<double>(2 * all), *f = m + all;
        const unsigned wanted[2] = {2u, 0u};
        for (int64_t i = g * each; i < std::min((g + 1) * each, points.count); ++i) {
            const double weight = points.weights[i];
            if (weight == 0.0) continue;
            const MatrixView<const T> operands[2] = {mean, points[i]};
            packed.gram(operands, wanted);
            packed.block(0, 1, m);
            squares[g] += weight * grassmann::log_factor<T>(k, m, f);
            for (int64_t j = 0; j < all; ++j) f[j] *= weight; // log = (I - mean meanᵀ) U_i f: projected once, after the sum
            const double *coefficients[2] = {nullptr, f};
            packed.apply(operands, coefficients, MatrixView<T>(sums + g * n * k, n, k), true);
        }
    });
    double variance = 0;
    for (int64_t g = 0; g < groups; ++g) {
        variance += squares[g];
        if (g > 0)
            for (int64_t i = 0; i < n * k; ++i) sums[i] += sums[g * n * k + i];
    }
    PackedBlock<T> packed(frame, n, k, 2);
    const MatrixView<const T> operands[2] = {mean, MatrixView<const T>(sums, n, k)};
    const unsigned wanted[2] = {2u, 0u};
    packed.gram(operands, wanted);
    double *p = frame.take<double>(2 * all), *one = p + all;
    packed.block(0, 1, p);
    for (int64_t i = 0; i < all; ++i) p[i] = -p[i];
    small::identity(k, one);
    const double *coefficients[2] = {p, one};
    packed.apply(operands, coefficients, direction);
    return variance;
}

template <class T> double norm(MatrixView<const T> a) {
    double sum = 0;
    for (int64_t i = 0; i < a.rows; ++i)
        for (int64_t j = 0; j < a.cols; ++j) sum += double(a(i, j)) * double(a(i, j));
    return std::sqrt(sum);
}

template <class T>
MeanReport mean_one(const Points<T> &points, MatrixView<const T> start, double tolerance, int64_t limit, MatrixView<T> out,
                    const std::function<bool(const MeanReport &)> &progress) {
    const int64_t n = out.rows, k = out.cols;
    Frame frame;
    const MatrixView<T> mean(frame.take<T>(n * k), n, k), next(frame.take<T>(n * k), n, k);
    const MatrixView<T> direction(frame.take<T>(n * k), n, k), trial(frame.take<T>(n * k), n, k);
    copy_matrix<T>(start, mean);
    MeanReport report;
    report.variance = average_log<T>(points, mean, direction);
    report.gradient_norm = norm<T>(direction);
    double t = 1.0;
    while (true) {
        report.converged = report.gradient_norm <= tolerance;
        if (report.converged || report.iterations == limit || (progress && !progress(report))) break;
        ++report.iterations;
        grassmann::step<T>(grassmann::Step<T>{mean, direction, t, Retraction::exp, next});
        const double variance = average_log<T>(points, next, trial), length = norm<T>(trial);
        // Close to the mean the variance changes by rounding only, and the gradient decides.
        if (variance > report.variance && !(length < report.gradient_norm)) {
            t *= 0.5;
            if (t < 1e-6) break;
            continue;
        }
        t = std::min(1.0, 1.5 * t);
        copy_matrix<T>(MatrixView<const T>(next), mean);
        copy_matrix<T>(MatrixView<const T>(trial), direction);
        report.variance = variance;
        report.gradient_norm = length;
    }
    copy_matrix<T>(MatrixView<const T>(mean), out);
    return report;
}

} // namespace

template <class T>
void grassmann_mean(const StackView<const T> &u, const double *weights, const StackView<const T> *initial, double tolerance, int64_t max_iterations,
                    const StackView<T> &out, MeanReport *reports, Checks checks, const std::function<bool(int64_t, const MeanReport &)> &progress) {
    const int64_t n = u.rows(), k = u.cols();
    grassmann::check_shape(n, k);
    if (u.shape.empty() || u.shape[0] == 0) throw ValueError("U holds no points: a mean is over its first axis");
    const int64_t count = u.shape[0], means = u.size() / count;
    if (initial != nullptr && (initial->rows() != n || initial->cols() != k || initial->size() != means))
        throw ValueError("initial must have the shape of the means");
    if (out.rows() != n || out.cols() != k || out.size() != means) throw ValueError("out must have the shape of the means");
    Frame frame;
    const std::vector<double> shares = mean_weights(weights, count);
    const double *w = shares.data();
    const int64_t heaviest = std::max_element(w, w + count) - w;
    if (k == 0 || n == 0) {
        for (int64_t j = 0; j < means; ++j) reports[j] = {0, 0, 0, true};
        return;
    }
    const auto check = [&](const StackView<const T> &stack, const char *name) {
        parallel_for(stack.size(), [&](int64_t i) {
            Frame mine;
            PackedBlock<T> packed(mine, n, k, 1);
            const MatrixView<const T> operands[1] = {stack[i]};
            const unsigned wanted[1] = {1u};
            packed.gram(operands, wanted);
            double *e = mine.take<double>(small::area(k));
            packed.block(0, 0, e);
            if (!std::isfinite(grassmann::defect(k, e)) || checks != Checks::none) grassmann::require_orthonormal<T>(k, e, name, i);
        });
    };
    check(u, "U");
    if (initial != nullptr) check(*initial, "initial");
    for (int64_t j = 0; j < means; ++j) {
        const Points<T> points{u, w, count, means, j};
        std::function<bool(const MeanReport &)> hear;
        if (progress) hear = [&](const MeanReport &r) { return progress(j, r); };
        reports[j] = mean_one<T>(points, initial != nullptr ? (*initial)[j] : points[heaviest], tolerance, max_iterations, out[j], hear);
    }
}

#define SUBSPAN_INSTANTIATE(T)                                                                                                                                 \
    template void grassmann_mean<T>(const StackView<const T> &, const double *, const StackView<const T> *, double, std::int64_t, const StackView<T> &,        \
                                    MeanReport *, Checks, const std::function<bool(std::int64_t, const MeanReport &)> &);
SUBSPAN_INSTANTIATE(float)
SUBSPAN_INSTANTIATE(double)
#undef SUBSPAN_INSTANTIATE

} // namespace subspan
