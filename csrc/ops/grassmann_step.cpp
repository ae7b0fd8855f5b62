#include "subspan/grassmann_step.hpp"

#include "class_panel.hpp"
#include "grassmann_core.hpp"
#include "scan.hpp"
#include "scratch.hpp"
#include "small.hpp"
#include "subspan/errors.hpp"
#include "subspan/parallel.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <string>

namespace subspan {
namespace {

using std::int64_t;

[[noreturn]] void bad(const char *name, int64_t item) {
    throw ValueError(std::string(name) + " of class " + std::to_string(item) + " holds NaN or infinity; nothing was changed");
}

// Every class is looked at before the first one is changed; the error names the first bad class whatever the threads.
template <class T, class F> void check_classes(const StackView<T> &u, const F &finite) {
    const int64_t items = u.size(), n = u.rows(), k = u.cols();
    std::atomic<int64_t> first{items};
    grassmann::for_each(items, [&](int64_t i, int64_t next) {
        bool good = finite(i);
        if (good) {
            Frame frame;
            ClassPanel<T> panel(frame, n, k, 1);
            const MatrixView<const T> operands[1] = {u[i]};
            const unsigned wanted[1] = {1u};
            const MatrixView<const T> ahead[1] = {u[next]};
            panel.ahead(ahead, next > i ? 1 : 0);
            panel.gram(operands, wanted);
            double *e = frame.take<double>(small::area(k));
            panel.block(0, 0, e);
            good = grassmann::defect(k, e) <= grassmann::orthonormal_bound<T>(k);
        }
        if (good) return;
        int64_t seen = first.load();
        while (i < seen && !first.compare_exchange_weak(seen, i)) {}
    });
    const int64_t item = first.load();
    if (item == items) return;
    if (!finite(item)) bad("the gradient or state", item);
    Frame frame;
    ClassPanel<T> panel(frame, n, k, 1);
    const MatrixView<const T> operands[1] = {u[item]};
    const unsigned wanted[1] = {1u};
    panel.gram(operands, wanted);
    double *e = frame.take<double>(small::area(k));
    panel.block(0, 0, e);
    grassmann::require_orthonormal<T>(k, e, "U", item);
}

void check_options(int64_t n, int64_t k, const StepOptions &o) {
    grassmann::check_shape(n, k);
    if (!std::isfinite(o.lr)) throw ValueError("lr must be finite");
    if (o.transport == MomentumTransport::parallel && o.retraction != Retraction::exp)
        throw ValueError("transport 'parallel' goes along geodesics: it needs retraction 'exp'");
}

// Squared norm of the part of g that is tangent at u.
template <class T> double tangent_norm(MatrixView<const T> u, MatrixView<const T> g) {
    const int64_t n = u.rows, k = u.cols, all = small::area(k), ld = small::order(k);
    Frame frame;
    ClassPanel<T> panel(frame, n, k, 2);
    MatrixView<const T> operands[2] = {u, g};
    const unsigned wanted[2] = {2u, 2u};
    panel.gram(operands, wanted);
    double *m = frame.take<double>(all), *b = frame.take<double>(all);
    panel.block(0, 1, m);
    panel.block(1, 1, b);
    double along = 0, whole = 0;
    for (int64_t i = 0; i < all; ++i) along += m[i] * m[i];
    for (int64_t i = 0; i < k; ++i) whole += b[i * ld + i];
    if (!std::isfinite(whole)) return std::numeric_limits<double>::infinity();
    if (whole - along > 0.01 * whole) return whole - along;
    // The difference has lost digits: the part itself.
    const MatrixView<T> rest(frame.take<T>(n * k), n, k);
    for (int64_t i = 0; i < all; ++i) m[i] = -m[i];
    small::identity(k, b);
    const double *coefficients[2] = {m, b};
    panel.apply(operands, coefficients, rest);
    double sum = 0;
    for (int64_t i = 0; i < n * k; ++i) sum += double(rest.data[i]) * double(rest.data[i]);
    return sum;
}

} // namespace

template <class T>
void sgd_step(const StackView<T> &u, const StackView<const T> &grad, const StackView<T> *buffer, double momentum,
              double dampening, const StepOptions &options) {
    check_options(u.rows(), u.cols(), options);
    if (!std::isfinite(momentum)) throw ValueError("momentum must be finite");
    if (!std::isfinite(dampening)) throw ValueError("dampening must be finite");
    if (u.rows() == 0 || u.cols() == 0) return;
    if (options.check)
        check_classes<T>(u, [&](int64_t i) {
            const double g = double(max_abs<T>(grad[i])), b = buffer == nullptr ? 0.0 : double(max_abs<T>(MatrixView<const T>((*buffer)[i])));
            // What the buffer becomes must be finite too.
            return std::abs(momentum) * b + std::abs(1.0 - dampening) * g <= double(std::numeric_limits<T>::max()) && std::isfinite(g);
        });
    grassmann::for_each(u.size(), [&](int64_t i, int64_t next) {
        MatrixView<const T> h = grad[i];
        MatrixView<T> b;
        MatrixView<T> *velocity = nullptr;
        if (buffer != nullptr) {
            b = (*buffer)[i];
            decay_add<T>(b, T(momentum), h, T(1.0 - dampening));
            h = b;
            if (options.transport == MomentumTransport::parallel) velocity = &b;
        }
        const MatrixView<const T> ahead[3] = {u[next], grad[next], buffer != nullptr ? MatrixView<const T>((*buffer)[next]) : h};
        grassmann::step<T>(u[i], h, -options.lr, options.retraction, u[i], velocity, Checks::none, i, ahead,
                           next == i ? 0 : (buffer != nullptr ? 3 : 2));
    });
}

template <class T>
void adam_step(const StackView<T> &u, const StackView<const T> &grad, const StackView<T> &first, const StackView<T> &second,
               int64_t step, double beta1, double beta2, double eps, const StepOptions &options) {
    check_options(u.rows(), u.cols(), options);
    if (step < 1) throw ValueError("step must be at least 1: it counts the steps, this one included");
    if (!(beta1 >= 0 && beta1 < 1)) throw ValueError("betas[0] must be in [0, 1)");
    if (!(beta2 >= 0 && beta2 < 1)) throw ValueError("betas[1] must be in [0, 1)");
    if (!(eps >= 0) || !std::isfinite(eps)) throw ValueError("eps must be finite and not negative");
    if (u.rows() == 0 || u.cols() == 0) return;
    if (options.check)
        check_classes<T>(u, [&](int64_t i) {
            return all_finite<T>(grad[i]) && all_finite<T>(first[i]) && std::isfinite(double(second[i](0, 0))) &&
                   second[i](0, 0) >= T(0);
        });
    const double bias1 = 1.0 - std::pow(beta1, double(step)), bias2 = 1.0 - std::pow(beta2, double(step));
    grassmann::for_each(u.size(), [&](int64_t i, int64_t next) {
        const auto b = first[i];
        const auto si = second[i];
        T &v = si(0, 0);
        const double norm = tangent_norm<T>(u[i], grad[i]);
        v = T(std::min(beta2 * double(v) + (1.0 - beta2) * norm, double(std::numeric_limits<T>::max())));
        decay_add<T>(b, T(beta1), grad[i], T(1.0 - beta1));
        const double scale = bias1 * (std::sqrt(double(v) / bias2) + eps);
        const double t = scale > 0 ? -options.lr / scale : 0.0; // no gradient so far: no step
        MatrixView<T> velocity = b;
        const MatrixView<const T> ahead[3] = {u[next], grad[next], first[next]};
        grassmann::step<T>(u[i], b, t, options.retraction, u[i],
                           options.transport == MomentumTransport::parallel ? &velocity : nullptr, Checks::none, i, ahead, next > i ? 3 : 0);
    });
}

#define SUBSPAN_INSTANTIATE(T)                                                                                         \
    template void sgd_step<T>(const StackView<T> &, const StackView<const T> &, const StackView<T> *, double, double,  \
                              const StepOptions &);                                                                    \
    template void adam_step<T>(const StackView<T> &, const StackView<const T> &, const StackView<T> &,                 \
                               const StackView<T> &, int64_t, double, double, double, const StepOptions &);
SUBSPAN_INSTANTIATE(float)
SUBSPAN_INSTANTIATE(double)
#undef SUBSPAN_INSTANTIATE

} // namespace subspan
