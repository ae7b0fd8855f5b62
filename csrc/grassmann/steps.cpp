#include "subspan/grassmann_steps.hpp"

#include "linalg/packed_gram.hpp"
#include "grassmann/point_step.hpp"
#include "base/amax.hpp"
#include "base/scratch.hpp"
#include "linalg/small_dense.hpp"
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

template <class T> void gram_of(MatrixView<const T> u, MatrixView<const T> next, bool ahead, double *e) {
    Frame frame;
    PackedBlock<T> packed(frame, u.rows, u.cols, 1);
    const unsigned wanted[1] = {1u};
    packed.ahead(&next, ahead ? 1 : 0);
    packed.gram(&u, wanted);
    packed.block(0, 0, e);
}

// Every class is looked at before the first one is changed; the error names the first bad class whatever the threads.
// wrong(i) says what is wrong with the gradient or the state of class i, or null.
template <class T, class F> void check_classes(const StackView<T> &u, const F &wrong) {
    const int64_t items = u.size(), k = u.cols();
    std::atomic<int64_t> first{items};
    grassmann::for_each(items, [&](int64_t i, int64_t next) {
        bool good = wrong(i) == nullptr;
        if (good) {
            Frame frame;
            double *e = frame.take<double>(small::area(k));
            gram_of<T>(u[i], u[next], next > i, e);
            good = grassmann::defect(k, e) <= grassmann::orthonormal_bound<T>(k);
        }
        if (good) return;
        int64_t seen = first.load();
        while (i < seen && !first.compare_exchange_weak(seen, i)) {}
    });
    const int64_t item = first.load();
    if (item == items) return;
    if (const char *what = wrong(item)) throw ValueError(std::string(what) + ": class " + std::to_string(item) + "; nothing was changed");
    Frame frame;
    double *e = frame.take<double>(small::area(k));
    gram_of<T>(u[item], u[item], false, e);
    grassmann::require_orthonormal<T>(k, e, "U", item);
}

// Whether factor · a + weight · b is finite for all entries up to these.
template <class T> bool bounded(double factor, double a, double weight, double b) {
    return std::abs(factor) * a + std::abs(weight) * b <= 0.999 * double(std::numeric_limits<T>::max());
}

void check_options(int64_t n, int64_t k, const StepOptions &o) {
    grassmann::check_shape(n, k);
    o.require_valid();
}

// first = beta first + (1 - beta) times the part of g that is tangent at u; returns the squared norm of that part.
template <class T>
double average_tangent(MatrixView<const T> u, MatrixView<const T> g, MatrixView<T> first, double beta, const MatrixView<const T> *next, int next_count) {
    const int64_t n = u.rows, k = u.cols, all = small::area(k), ld = small::order(k);
    Frame frame;
    PackedBlock<T> packed(frame, n, k, 3);
    const MatrixView<const T> operands[3] = {u, g, first};
    const unsigned wanted[3] = {2u, 2u, 0u};
    packed.ahead(next, next_count);
    packed.gram(operands, wanted);
    double *m = frame.take<double>(4 * all), *b = m + all, *p = m + 2 * all, *q = m + 3 * all;
    packed.block(0, 1, m);
    packed.block(1, 1, b);
    double along = 0, whole = 0;
    for (int64_t i = 0; i < all; ++i) along += m[i] * m[i];
    for (int64_t i = 0; i < k; ++i) whole += b[i * ld + i];
    double norm = whole - along;
    if (!(norm > 0.01 * whole) || !(whole > 1e3 * double(std::numeric_limits<T>::min()) / std::numeric_limits<T>::epsilon()) || !std::isfinite(whole)) {
        // The difference has lost digits, or squares left the range of T: the part itself.
        const MatrixView<T> rest(frame.take<T>(n * k), n, k);
        for (int64_t i = 0; i < all; ++i) p[i] = -m[i];
        small::identity(k, q);
        const double *coefficients[3] = {p, q, nullptr};
        packed.apply(operands, coefficients, rest);
        norm = 0;
        for (int64_t i = 0; i < n * k; ++i) norm += double(rest.data[i]) * double(rest.data[i]);
    }
    for (int64_t i = 0; i < all; ++i) p[i] = -(1.0 - beta) * m[i];
    std::fill_n(q, all, 0.0);
    std::fill_n(b, all, 0.0);
    for (int64_t i = 0; i < k; ++i) {
        q[i * ld + i] = 1.0 - beta;
        b[i * ld + i] = beta;
    }
    const double *coefficients[3] = {p, q, b};
    packed.apply(operands, coefficients, first);
    return norm;
}

} // namespace

template <class T>
void sgd_step(const StackView<T> &u, const StackView<const T> &grad, const StackView<T> *buffer, double momentum, double dampening,
              const StepOptions &options) {
    check_options(u.rows(), u.cols(), options);
    if (!std::isfinite(T(momentum))) throw ValueError("momentum must be finite");
    if (!std::isfinite(T(1.0 - dampening))) throw ValueError("dampening must be finite");
    grassmann::check_same<T>(StackView<const T>(u), grad, "grad");
    if (buffer != nullptr) grassmann::check_same<T>(StackView<const T>(u), *buffer, "buffer");
    if (u.rows() == 0 || u.cols() == 0) return;
    if (options.check)
        check_classes<T>(u, [&](int64_t i) -> const char * {
            const double g = double(max_abs<T>(grad[i])), b = buffer == nullptr ? 0.0 : double(max_abs<T>(MatrixView<const T>((*buffer)[i])));
            if (!std::isfinite(g)) return "grad holds NaN or infinity";
            if (!std::isfinite(b)) return "buffer holds NaN or infinity";
            if (buffer == nullptr) return nullptr;
            if (!bounded<T>(momentum, b, 1.0 - dampening, g)) return "momentum · buffer + (1 - dampening) · grad overflows";
            const double reach = options.transport == MomentumTransport::parallel ? 4.0 * std::sqrt(double(u.rows() * u.cols())) : 0.0;
            return bounded<T>(momentum * reach, b, (1.0 - dampening) * reach, g) ? nullptr : "the buffer overflows when it is transported";
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
        grassmann::Step<T> s{u[i], h, -options.lr, options.retraction, u[i]};
        s.velocity = velocity;
        s.item = i;
        s.name = buffer != nullptr ? "buffer" : "grad";
        s.next = ahead;
        s.next_count = next == i ? 0 : (buffer != nullptr ? 3 : 2);
        grassmann::step<T>(s);
    });
}

template <class T>
void adam_step(const StackView<T> &u, const StackView<const T> &grad, const StackView<T> &first, const StackView<T> &second, int64_t step, double beta1,
               double beta2, double eps, const StepOptions &options) {
    check_options(u.rows(), u.cols(), options);
    grassmann::check_same<T>(StackView<const T>(u), grad, "grad");
    grassmann::check_same<T>(StackView<const T>(u), first, "first");
    if (second.size() != u.size()) throw ValueError("second must have one entry for each class");
    check_adam(step, beta1, beta2, eps);
    if (u.rows() == 0 || u.cols() == 0) return;
    if (options.check)
        check_classes<T>(u, [&](int64_t i) -> const char * {
            const double g = double(max_abs<T>(grad[i])), b = double(max_abs<T>(MatrixView<const T>(first[i])));
            const double v = double(second[i](0, 0));
            if (!std::isfinite(g)) return "grad holds NaN or infinity";
            if (4.0 * std::sqrt(double(u.rows())) * g > double(std::numeric_limits<T>::max())) return "grad overflows when it is projected";
            if (!std::isfinite(b)) return "first_moment holds NaN or infinity";
            if (!std::isfinite(v)) return "second_moment holds NaN or infinity";
            if (options.transport == MomentumTransport::parallel && !bounded<T>(4.0 * std::sqrt(double(u.rows() * u.cols())), b, 4.0 * double(u.rows()), g))
                return "first_moment overflows when it is transported";
            return v >= 0 ? nullptr : "second_moment is negative";
        });
    const double bias1 = 1.0 - std::pow(beta1, double(step)), bias2 = 1.0 - std::pow(beta2, double(step));
    grassmann::for_each(u.size(), [&](int64_t i, int64_t next) {
        const auto b = first[i];
        const auto si = second[i];
        T &v = si(0, 0);
        const MatrixView<const T> ahead[3] = {u[next], grad[next], first[next]};
        const double norm = average_tangent<T>(u[i], grad[i], b, beta1, ahead, next > i ? 3 : 0);
        const double sum = beta2 * double(v) + (1.0 - beta2) * norm;
        v = T(sum > double(std::numeric_limits<T>::max()) ? double(std::numeric_limits<T>::max()) : sum);
        const double scale = bias1 * (std::sqrt(sum / bias2) + eps);
        MatrixView<T> velocity = b;
        // No gradient so far, no step.
        grassmann::Step<T> s{u[i], b, scale > 0 ? std::clamp(-options.lr / scale, -1e300, 1e300) : 0.0, options.retraction, u[i]};
        s.velocity = options.transport == MomentumTransport::parallel ? &velocity : nullptr;
        s.item = i;
        s.name = "first_moment";
        grassmann::step<T>(s);
    });
}

#define SUBSPAN_INSTANTIATE(T)                                                                                                                                 \
    template void sgd_step<T>(const StackView<T> &, const StackView<const T> &, const StackView<T> *, double, double, const StepOptions &);                    \
    template void adam_step<T>(const StackView<T> &, const StackView<const T> &, const StackView<T> &, const StackView<T> &, int64_t, double, double, double,  \
                               const StepOptions &);
SUBSPAN_INSTANTIATE(float)
SUBSPAN_INSTANTIATE(double)
#undef SUBSPAN_INSTANTIATE

} // namespace subspan
