#include "grassmann/point_step.cuh"

#include "grassmann/point_sweeps.cuh"

#include <cmath>
#include <limits>
#include <type_traits>

namespace subspan::cuda {
namespace {

using namespace sweeps;

template <class T> SUBSPAN_DEVICE constexpr double eps_of() { return sizeof(T) == 4 ? 1.1920928955078125e-7 : 2.220446049250313e-16; }

// Two blocks a multiprocessor, one of which loads while the other computes, where registers are known to suffice.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int kBlocks = 2;
#else
constexpr int kBlocks = 1;
#endif

template <class T, int K, int Width>
__global__ void __launch_bounds__(kThreads, (Width > 0 ? kBlocks : 1)) grassmann_kernel(SUBSPAN_PARAMETER const Arguments<T> a) {
    using S = small::Small<K, kThreads>;
    constexpr int ld = S::ld;
    SUBSPAN_SHARED(memory);
    Shared<K> &sh = *reinterpret_cast<Shared<K> *>(memory);
    Coefficients<T, K> &w = *reinterpret_cast<Coefficients<T, K> *>(memory + sizeof(Shared<K>));
    T *parts = reinterpret_cast<T *>(memory + sizeof(Shared<K>) + coefficient_bytes<T>(K, Width == 0 && a.parallel));
    const Point<T, Width> point(a, blockIdx.x);
    const int k = point.k;
    const double eps = eps_of<T>(), t = Width > 0 || a.scales == nullptr ? a.t : a.t * a.scales[blockIdx.x];
    products<T, K>(point, sh, parts, nullptr);
    double *scratch = sh.scratch;
    const double defect = S::largest(k, scratch, [&](int i, int j) { return sh.e[i * ld + j] - (i == j ? 1.0 : 0.0); });
    const double size = S::largest(k, scratch, [&](int i, int j) { return most(sh.b[i * ld + j], -sh.b[i * ld + j]) + sh.m[i * ld + j] * 0.0; });
    const double limit = sizeof(T) == 4 ? 3.4028234663852886e38 : 1.7976931348623157e308;
    const bool good = defect * k < 0.5 && size < limit && t * t * size < 1e100;
    if (!good) { // the point and its buffer stay as they were
        if (Width > 0 || a.job == step_in_place) return;
        const T nan = T(0) / T(0);
        for (int e = int(threadIdx.x); e < point.n * k; e += kThreads) point.out[(e / k) * a.out.row_stride + (e % k) * a.out.col_stride] = nan;
        return;
    }
    // What makes U orthonormal to second order or better; an orthonormal U stays what it is.
    const bool corrected = defect > 2.0 * eps;
    if (corrected) {
        if (defect < 0.1 * sqrt(eps)) {
            S::each(k, [&](int i, int j) { sh.f[i * ld + j] = (i == j ? 1.5 : 0.0) - 0.5 * sh.e[i * ld + j]; });
        } else {
            S::each(k, [&](int i, int j) { sh.x[i * ld + j] = sh.e[i * ld + j] - (i == j ? 1.0 : 0.0); });
            S::inverse_sqrt(k, scratch, sh.x, sh.f, sh.c, sh.s, sh.w);
        }
    } else {
        S::each(k, [&](int i, int j) { sh.f[i * ld + j] = i == j ? 1.0 : 0.0; });
    }
    // HᵀH - mᵀm is known to a few eps of what it is a difference of: a large part of H along U goes first, with what it was.
    const double along = S::largest(k, scratch, [&](int i, int j) {
        if (j != 0) return 0.0;
        double s = 0;
        for (int l = 0; l < k; ++l) s = fma(sh.m[l * ld + i], sh.m[l * ld + i], s);
        return s;
    });
    const bool aside = t * t * along > 1e-2 || along > 0.5 * size;
    if (aside) {
        S::template multiply<false>(k, sh.f, sh.m, sh.w); // F m
        S::template multiply<false>(k, sh.f, sh.w, sh.along); // U F F UᵀH
        S::each(k, [&](int i, int j) { w.p[i * K + j] = T(sh.along[i * ld + j]); });
        for (int e = int(threadIdx.x); e < K * K; e += kThreads)
            if (e / K >= k || e % K >= k) w.p[e] = T(0);
        __syncthreads();
        products<T, K>(point, sh, parts, w.p);
    }
    // m of the orthonormal basis, and the Gram matrix of H without its part along it.
    S::template multiply<true>(k, sh.f, sh.m, sh.w);
    S::each(k, [&](int i, int j) { sh.m[i * ld + j] = sh.w[i * ld + j]; });
    S::template multiply<true>(k, sh.m, sh.m, sh.w);
    S::each(k, [&](int i, int j) {
        sh.b[i * ld + j] -= sh.w[i * ld + j];
        sh.x[i * ld + j] = t * t * sh.b[i * ld + j];
    });
    const double norm = S::row_norm(k, scratch, sh.x);
    // c and s: the two functions of x that the curve is made of.
    if (Width == 0 && a.job == tangent_part) {
        S::each(k, [&](int i, int j) {
            sh.c[i * ld + j] = 0.0;
            sh.s[i * ld + j] = i == j ? 1.0 : 0.0;
        });
    } else if (a.method == Retraction::exp) {
        S::trigonometric(k, scratch, sh.x, sizeof(T) == 4 ? 1e-10 : 1e-19, sh.c, sh.s, sh.y, sh.w);
    } else if (a.method == Retraction::polar) {
        S::inverse_sqrt(k, scratch, sh.x, sh.c, sh.y, sh.z(), sh.w);
        S::each(k, [&](int i, int j) { sh.s[i * ld + j] = sh.c[i * ld + j]; });
    } else if (a.method == Retraction::cayley) {
        S::each(k, [&](int i, int j) { sh.y[i * ld + j] = 0.25 * sh.x[i * ld + j]; });
        S::inverse_cholesky(k, sh.y, sh.z(), sh.w);
        S::each(k, [&](int i, int j) { // R⁻¹ R⁻ᵀ
            double v = 0;
            for (int l = 0; l < k; ++l) v = fma(l < i ? 0.0 : sh.z()[i * ld + l], l < j ? 0.0 : sh.z()[j * ld + l], v);
            sh.s[i * ld + j] = v;
        });
        S::each(k, [&](int i, int j) { sh.c[i * ld + j] = 2.0 * sh.s[i * ld + j] - (i == j ? 1.0 : 0.0); });
    } else {
        S::inverse_cholesky(k, sh.x, sh.c, sh.w);
        S::each(k, [&](int i, int j) {
            const double v = j < i ? 0.0 : sh.c[i * ld + j];
            sh.c[i * ld + j] = sh.s[i * ld + j] = v;
        });
    }
    // out = Û c + t (H - Û m) s with Û = U F, where H has lost U y already if it was set aside.
    const double reach = Width == 0 && a.job == tangent_part ? 1.0 : t;
    S::template multiply<false>(k, sh.m, sh.s, sh.w);
    S::each(k, [&](int i, int j) { sh.z()[i * ld + j] = sh.c[i * ld + j] - reach * sh.w[i * ld + j]; });
    S::template multiply<false>(k, sh.f, sh.z(), sh.w);
    if (aside) S::template multiply<false>(k, sh.along, sh.s, sh.z());
    for (int e = int(threadIdx.x); e < K * K; e += kThreads) {
        const int i = e / K, j = e % K;
        const bool in = i < k && j < k;
        const double p = in ? sh.w[i * ld + j] - (aside ? reach * sh.z()[i * ld + j] : 0.0) : 0.0;
        w.p[e] = T(p);
        w.q[e] = in ? T(reach * sh.s[i * ld + j]) : T(0);
    }
    __syncthreads();
    if (point.parallel()) { // the velocity: -t Û A s - Û m c + H c
        S::template multiply<false>(k, sh.b, sh.s, sh.z());
        S::template multiply<false>(k, sh.m, sh.c, sh.w);
        S::each(k, [&](int i, int j) { sh.w[i * ld + j] = -t * sh.z()[i * ld + j] - sh.w[i * ld + j]; });
        S::template multiply<false>(k, sh.f, sh.w, sh.z());
        if (aside) S::template multiply<false>(k, sh.along, sh.c, sh.w);
        for (int e = int(threadIdx.x); e < K * K; e += kThreads) {
            const int i = e / K, j = e % K;
            const bool in = i < k && j < k;
            w.p2[e] = in ? T(sh.z()[i * ld + j] - (aside ? sh.w[i * ld + j] : 0.0)) : T(0);
            w.q2[e] = in ? T(sh.c[i * ld + j]) : T(0);
        }
        __syncthreads();
    }
    combine<T, K>(point, w);
    // A long step magnifies what rounding left of the Gram matrix, and so does a large part along U that was taken off: the result is made
    // orthonormal once more.
    if ((Width == 0 && a.job == tangent_part) || !(norm > 1.0 || t * t * along > 1.0)) return;
    const Point<T, 0> moved = point.moved(blockIdx.x);
    for (int pass = 0; pass < 2; ++pass) {
        products<T, K>(moved, sh, parts, nullptr, 1);
        S::each(k, [&](int i, int j) { sh.x[i * ld + j] = sh.e[i * ld + j] - (i == j ? 1.0 : 0.0); });
        const double off = S::largest(k, scratch, [&](int i, int j) { return sh.x[i * ld + j]; });
        if (!(off > 2.0 * eps)) return;
        S::inverse_sqrt(k, scratch, sh.x, sh.f, sh.c, sh.s, sh.w);
        for (int e = int(threadIdx.x); e < K * K; e += kThreads) {
            w.p[e] = e / K < k && e % K < k ? T(sh.f[(e / K) * ld + e % K]) : T(0);
            w.q[e] = T(0);
        }
        __syncthreads();
        combine<T, K>(moved, w);
    }
}

// -- host ------------------------------------------------------------------------------------------------------------------------

template <class T, int K> int64_t shared_bytes(bool parallel) {
    return int64_t(sizeof(Shared<K>)) + coefficient_bytes<T>(K, parallel) + kParts<T, K> * int64_t(sizeof(T));
}

template <class T> void run(const Session &s, const Arguments<T> &a, int64_t items) {
    const auto go = [&](auto width, auto plain) {
        constexpr int K = decltype(width)::value, Width = decltype(plain)::value ? K : 0;
        launch<grassmann_kernel<T, K, Width>>(s, "grassmann", Shape{dim3(unsigned(items)), dim3(kThreads), shared_bytes<T, K>(a.parallel)}, a);
    };
    constexpr std::false_type any{};
    if constexpr (sizeof(T) == 4)
        if (a.u.cols == 8 && a.vectors && a.u.row_stride == 8 && a.grad.row_stride == 8 && a.has_buffer && a.buffer.row_stride == 8 && !a.parallel &&
            a.job == step_in_place && a.scales == nullptr && a.u.rows < (int64_t(1) << 28))
            return go(std::integral_constant<int, 8>{}, std::true_type{});
    with_width(a.u.cols, [&](auto width) { go(width, any); });
}

template <class T> Arguments<T> arguments(const Stack &u, const Stack &h, double t, Job job, Retraction method) {
    Arguments<T> a{};
    a.u = Matrices<T>(u);
    a.grad = Matrices<const T>(h);
    a.vectors = in_vectors(u) && in_vectors(h);
    a.t = t;
    a.job = job;
    a.method = method;
    return a;
}

} // namespace

void momentum_step(const Session &s, const Stack &u, const Stack &grad, const Stack *buffer, double momentum, double dampening, const StepOptions &options) {
    dispatch_wide(u.dtype, [&](auto tag) {
        using T = decltype(tag);
        Arguments<T> a = arguments<T>(u, grad, -options.lr, step_in_place, options.retraction);
        a.has_buffer = buffer != nullptr;
        if (a.has_buffer) {
            a.buffer = Matrices<T>(*buffer);
            a.vectors = a.vectors && in_vectors(*buffer);
        }
        a.parallel = options.parallel() && a.has_buffer;
        a.momentum = T(momentum);
        a.weight = a.has_buffer ? T(1.0 - dampening) : T(1);
        run(s, a, u.size());
    });
}

void require_step_fits(const Session &s, const Stack &u, bool parallel) {
    const int64_t bytes = dispatch_wide(u.dtype, [&](auto tag) {
        using T = decltype(tag);
        return with_width(u.cols, [&](auto width) { return shared_bytes<T, decltype(width)::value>(parallel); });
    });
    if (bytes > s.device().shared_limit)
        throw ValueError("a step of points of " + std::to_string(u.cols) + " columns needs " + std::to_string(bytes) +
                         " bytes of shared memory, and a block of this device has " + std::to_string(s.device().shared_limit));
}

void scaled_step(const Session &s, const Stack &u, const Stack &moment, const double *scales, Retraction method, bool parallel) {
    dispatch_wide(u.dtype, [&](auto tag) {
        using T = decltype(tag);
        Arguments<T> a = arguments<T>(u, parallel ? u : moment, 1.0, step_in_place, method);
        a.scales = scales;
        a.has_buffer = a.parallel = parallel; // moves along: 1 · moment + 0 · u
        a.momentum = T(1);
        a.weight = T(0);
        if (parallel) {
            a.buffer = Matrices<T>(moment);
            a.vectors = a.vectors && in_vectors(moment);
        }
        run(s, a, u.size());
    });
}

void timed_exp(const Session &s, const Stack &u, const Stack &h, const double *times, const Stack &out) {
    dispatch_wide(u.dtype, [&](auto tag) {
        using T = decltype(tag);
        Arguments<T> a = arguments<T>(u, h, 1.0, retraction, Retraction::exp);
        a.scales = times;
        a.out = Matrices<T>(out);
        a.vectors = a.vectors && in_vectors(out);
        run(s, a, u.size());
    });
}

namespace {

void pure(const Session &s, const Stack &u, const Stack &h, double t, Job job, Retraction method, const Stack &out) {
    dispatch_wide(u.dtype, [&](auto tag) {
        using T = decltype(tag);
        Arguments<T> a = arguments<T>(u, h, t, job, method);
        a.out = Matrices<T>(out);
        a.vectors = a.vectors && in_vectors(out);
        run(s, a, u.size());
    });
}

} // namespace

void retract_points(const Session &s, const Stack &u, const Stack &h, double t, Retraction method, const Stack &out) {
    pure(s, u, h, t, retraction, method, out);
}

void tangent_points(const Session &s, const Stack &u, const Stack &g, const Stack &out) { pure(s, u, g, 1.0, tangent_part, Retraction::exp, out); }

} // namespace subspan::cuda
