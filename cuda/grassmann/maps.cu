#include "subspan/cuda/grassmann.hpp"

#include "grassmann/pair_angles.cuh"
#include "grassmann/point_step.cuh"
#include "linalg/small_dense.cuh"

#include <cmath>
#include <type_traits>

namespace subspan::cuda {
namespace {

constexpr int kThreads = 256, kRows = 32;

template <class T> struct Arguments {
    Matrices<const T> u, h, v;
    Matrices<T> out;
    double t;
};

template <int K> struct Shared {
    static constexpr int ld = K + 1, area = K * ld;
    double u[kRows * ld], h[kRows * ld], v[kRows * ld]; // rows of the point and of both tangents
    double mh[area], mv[area];                           // UᵀH and UᵀV
    double x[area], y[area];                             // t² HᵀH and HᵀV without their parts along U
    double c[area], s[area], a[area], b[area];
    double scratch[40];
};

// V - t U S(X) HᵀV - t² H Z(X) HᵀV with X = t² HᵀH, S = sin √X / √X, Z = (1 - cos √X) / X (Edelman, Arias and Smith, 1998, theorem 2.4).
// By half angles, S = cos(√X/2) s and Z = s² / 2 with s = sin(√X/2) / (√X/2), so that nothing cancels. A block a point, sums in double.
template <class T, int K> class Carried {
    using S = small::Small<K, kThreads>;
    static constexpr int ld = K + 1;

  public:
    SUBSPAN_DEVICE Carried(const Arguments<T> &a, Shared<K> &sh)
        : a_(a), sh_(sh), u_(a.u.at(blockIdx.x)), h_(a.h.at(blockIdx.x)), v_(a.v.at(blockIdx.x)), n_(int(a.u.rows)), k_(int(a.u.cols)), tid_(int(threadIdx.x)) {
    }

    SUBSPAN_DEVICE void run() {
        S::template grams<kRows, 2>(n_, [&](int first) { load(first, false); }, {sh_.u, sh_.u}, {sh_.h, sh_.v}, {sh_.mh, sh_.mv});
        S::template grams<kRows, 2>(n_, [&](int first) { load(first, true); }, {sh_.h, sh_.h}, {sh_.h, sh_.v}, {sh_.x, sh_.y});
        const double t = a_.t;
        S::each(k_, [&](int i, int j) { sh_.x[i * ld + j] *= 0.25 * t * t; });
        S::trigonometric(k_, sh_.scratch, sh_.x, sizeof(T) == 4 ? 1e-10 : 1e-19, sh_.c, sh_.s, sh_.a, sh_.b);
        S::template multiply<false>(k_, sh_.s, sh_.y, sh_.a); // s HᵀV
        S::template multiply<false>(k_, sh_.s, sh_.a, sh_.b); // s² HᵀV
        S::template multiply<false>(k_, sh_.c, sh_.a, sh_.x); // S HᵀV
        T *out = a_.out.at(blockIdx.x);
        for (int first = 0; first < n_; first += kRows) {
            load(first, true);
            for (int e = tid_; e < kRows * K; e += kThreads) {
                const int r = e / K, j = e % K;
                if (j >= k_ || first + r >= n_) continue;
                double x = 0, z = 0;
                for (int l = 0; l < k_; ++l) {
                    x = fma(sh_.u[r * ld + l], sh_.x[l * ld + j], x);
                    z = fma(sh_.h[r * ld + l], sh_.b[l * ld + j], z);
                }
                out[(first + r) * a_.out.row_stride + j * a_.out.col_stride] = T(sh_.v[r * ld + j] - t * (x + 0.5 * t * z));
            }
        }
    }

  private:
    // Rows [first, first + kRows), zero past n; `tangent`: without what the tangents have along U. Ends with a barrier.
    SUBSPAN_DEVICE void load(int first, bool tangent) {
        __syncthreads();
        for (int e = tid_; e < kRows * K; e += kThreads) {
            const int r = e / K, j = e % K, row = first + r;
            const bool in = row < n_ && j < k_;
            sh_.u[r * ld + j] = in ? double(u_[row * a_.u.row_stride + j * a_.u.col_stride]) : 0.0;
            sh_.h[r * ld + j] = in ? double(h_[row * a_.h.row_stride + j * a_.h.col_stride]) : 0.0;
            sh_.v[r * ld + j] = in ? double(v_[row * a_.v.row_stride + j * a_.v.col_stride]) : 0.0;
        }
        __syncthreads();
        if (!tangent) return;
        for (int e = tid_; e < kRows * K; e += kThreads) {
            const int r = e / K, j = e % K;
            if (j >= k_) continue;
            double h = sh_.h[r * ld + j], v = sh_.v[r * ld + j];
            for (int l = 0; l < k_; ++l) {
                h = fma(-sh_.u[r * ld + l], sh_.mh[l * ld + j], h);
                v = fma(-sh_.u[r * ld + l], sh_.mv[l * ld + j], v);
            }
            sh_.h[r * ld + j] = h;
            sh_.v[r * ld + j] = v;
        }
        __syncthreads();
    }

    const Arguments<T> &a_;
    Shared<K> &sh_;
    const T *u_, *h_, *v_;
    int n_, k_, tid_;
};

template <class T, int K> __global__ void __launch_bounds__(kThreads, 1) transport_kernel(SUBSPAN_PARAMETER const Arguments<T> a) {
    SUBSPAN_SHARED(memory);
    Carried<T, K>(a, *reinterpret_cast<Shared<K> *>(memory)).run();
}

} // namespace

void tangent(const Context &context, const Stack &u, const Stack &g, const Stack &out) {
    check_points(u);
    check_pair(u, g, "G");
    check_pair(u, out, "out");
    const Session s(context);
    if (u.size() > 0 && u.rows > 0 && u.cols > 0) tangent_points(s, u, g, out);
}

void retract(const Context &context, const Stack &u, const Stack &h, double t, Retraction method, const Stack &out) {
    check_points(u);
    check_pair(u, h, "H");
    check_pair(u, out, "out");
    if (!std::isfinite(t)) throw ValueError("t must be finite");
    const Session s(context);
    if (u.size() > 0 && u.rows > 0 && u.cols > 0) retract_points(s, u, h, t, method, out);
}

void parallel_transport(const Context &context, const Stack &u, const Stack &h, const Stack &v, double t, const Stack &out) {
    check_points(u);
    check_pair(u, h, "H");
    check_pair(u, v, "V");
    check_pair(u, out, "out");
    if (!std::isfinite(t)) throw ValueError("t must be finite");
    const Session s(context);
    if (u.size() == 0 || u.rows == 0 || u.cols == 0) return;
    dispatch_wide(u.dtype, [&](auto tag) {
        using T = decltype(tag);
        const Arguments<T> a{Matrices<const T>(u), Matrices<const T>(h), Matrices<const T>(v), Matrices<T>(out), t};
        with_width(u.cols, [&](auto width) {
            constexpr int K = decltype(width)::value;
            launch<transport_kernel<T, K>>(s, "transport", Shape{dim3(unsigned(u.size())), dim3(kThreads), int64_t(sizeof(Shared<K>))}, a);
        });
    });
}

void grassmann_log(const Context &context, const Stack &u, const Stack &w, const Stack &out) {
    check_points(u);
    check_pair(u, w, "W");
    check_pair(u, out, "out");
    const Session s(context);
    if (u.size() > 0) log_points(s, u, w, out);
}

} // namespace subspan::cuda
