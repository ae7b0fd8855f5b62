#include "subspan/cuda/principal_angles.hpp"

#include "linalg/jacobi.cuh"
#include "grassmann/pair_angles.cuh"
#include "linalg/small_dense.cuh"
#include "subspan/cuda/launch.cuh"

#include <cmath>
#include <limits>

namespace subspan::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kRows = 32, kSweeps = 30;
enum Job { angles_only, with_vectors, one_distance, logarithm };

template <class T> struct Arguments {
    Matrices<const T> u, w;
    Matrices<T> out; // angles, a distance or a tangent
    Matrices<T> p, q;
    Job job;
    Distance kind;
};

template <int K> struct Shared {
    static constexpr int ld = K + 1, area = K * ld;
    double u[kRows * ld], w[kRows * ld], r[kRows * ld]; // rows of the two bases, and of what is made of them
    double m[area];  // UᵀW
    double mt[area]; // rows: (UᵀW y)ᵀ
    double y[area];  // rows: yᵀ
    double g[area], a[area];
    double cosine[K], sine[K], angle[K];
    int place[K], any;
};

template <class T, int K> class Pair {
    using S = small::Small<K, kThreads>;

  public:
    static constexpr int ld = K + 1;
    SUBSPAN_DEVICE Pair(const Arguments<T> &a, Shared<K> &sh)
        : a_(a), sh_(sh), u_(a.u.at(blockIdx.x)), w_(a.w.at(blockIdx.x)), n_(int(a.u.rows)), k_(int(a.u.cols)), tid_(int(threadIdx.x)), warp_(tid_ / 32),
          lane_(tid_ % 32) {}

    SUBSPAN_DEVICE void run() {
        S::template grams<kRows, 1>(n_, [&](int first) { load(first); }, {sh_.u}, {sh_.w}, {sh_.m});
        for (int e = tid_; e < k_ * k_; e += kThreads) {
            const int i = e / k_, j = e % k_;
            sh_.mt[j * ld + i] = sh_.m[i * ld + j];
            sh_.y[i * ld + j] = i == j ? 1.0 : 0.0;
        }
        __syncthreads();
        rotate_rows();
        lengths();
        if (a_.job == logarithm) return logarithm_of();
        S::template grams<kRows, 1>(n_, [&](int first) { load_residual(first); }, {sh_.r}, {sh_.r}, {sh_.g});
        rotate_close();
        lengths();
        if (tid_ < k_) {
            const double s = sh_.g[tid_ * ld + tid_];
            sh_.sine[tid_] = s > 0 ? sqrt(s) : s * 0.0;
            sh_.angle[tid_] = atan2(sh_.sine[tid_], sh_.cosine[tid_]);
        }
        __syncthreads();
        if (a_.job == one_distance) {
            if (tid_ == 0) *a_.out.at(blockIdx.x) = T(distance());
            return;
        }
        if (tid_ < k_) {
            int place = 0;
            for (int i = 0; i < k_; ++i) place += sh_.angle[i] < sh_.angle[tid_] || (sh_.angle[i] == sh_.angle[tid_] && i < tid_) ? 1 : 0;
            if (!(sh_.angle[tid_] == sh_.angle[tid_])) place = tid_;
            sh_.place[tid_] = place;
            a_.out.at(blockIdx.x)[place * a_.out.col_stride] = T(sh_.angle[tid_]);
        }
        __syncthreads();
        if (a_.job == with_vectors) vectors();
    }

  private:
    // Rows [first, first + kRows) of both bases in shared memory, zero past n. Ends with a barrier.
    SUBSPAN_DEVICE void load(int first) {
        __syncthreads();
        for (int e = tid_; e < kRows * K; e += kThreads) {
            const int r = e / K, j = e % K, row = first + r;
            const bool in = row < n_ && j < k_;
            sh_.u[r * ld + j] = in ? double(u_[row * a_.u.row_stride + j * a_.u.col_stride]) : 0.0;
            sh_.w[r * ld + j] = in ? double(w_[row * a_.w.row_stride + j * a_.w.col_stride]) : 0.0;
        }
        __syncthreads();
    }
    // Rows of the residual, (W - U UᵀW) Y.
    SUBSPAN_DEVICE void load_residual(int first) {
        load(first);
        for (int e = tid_; e < kRows * K; e += kThreads) {
            const int r = e / K, j = e % K;
            double s = 0;
            if (j < k_)
                for (int l = 0; l < k_; ++l) s = fma(sh_.w[r * ld + l], sh_.y[j * ld + l], fma(-sh_.u[r * ld + l], sh_.mt[j * ld + l], s));
            sh_.r[r * ld + j] = s;
        }
        __syncthreads();
    }
    // Sweeps of rounds until one has turned nothing: `round(number, seats)` says by sh_.any that it has, and leaves no barrier to others.
    template <class F> SUBSPAN_DEVICE void sweep(const F &round) {
        const int seats = k_ + k_ % 2;
        for (int pass = 0;; ++pass) {
            if (tid_ == 0) sh_.any = 0;
            __syncthreads();
            for (int r = 0; r + 1 < seats; ++r) {
                round(r, seats);
                __syncthreads();
            }
            const bool more = sh_.any != 0;
            __syncthreads();
            if (!more) break;
            if (pass + 1 >= kSweeps) { // ten have been seen; what has not settled is no result
                if (tid_ < k_) sh_.mt[tid_ * ld] = sqrt(-1.0);
                __syncthreads();
                break;
            }
        }
    }
    // The rows of mt become orthogonal, y turns along: a warp a pair, a lane an entry.
    SUBSPAN_DEVICE void rotate_rows() {
        sweep([&](int round, int seats) {
            for (int pair = warp_; pair < seats / 2; pair += kWarps) {
                const int i = at_seat(pair, round, seats), j = at_seat(seats - 1 - pair, round, seats);
                if (i >= k_ || j >= k_) continue;
                double *x = sh_.mt + i * ld, *z = sh_.mt + j * ld;
                const double a = lane_ < k_ ? x[lane_] : 0.0, b = lane_ < k_ ? z[lane_] : 0.0;
                const double xx = warp_sum(a * a), zz = warp_sum(b * b), xz = warp_sum(a * b);
                if (apart(xx, zz, xz, 1e-15)) continue;
                const Rotation q = rotation(xx, zz, xz);
                if (lane_ < k_) {
                    q.rotate(x[lane_], z[lane_]);
                    q.rotate(sh_.y[i * ld + lane_], sh_.y[j * ld + lane_]);
                }
                if (lane_ == 0) sh_.any = 1;
            }
        });
    }
    // The same for g, the Gram matrix of the residual's columns, where both cosines are large: only there is y not known well enough.
    SUBSPAN_DEVICE void rotate_close() {
        double *cosines = sh_.a, *sines = sh_.a + K; // of the rotations of a round
        sweep([&](int round, int seats) {
            if (tid_ < seats / 2) {
                const int i = at_seat(tid_, round, seats), j = at_seat(seats - 1 - tid_, round, seats);
                Rotation q{1.0, 0.0};
                if (i < k_ && j < k_ && sh_.cosine[i] > 0.5 && sh_.cosine[j] > 0.5) {
                    const double xx = sh_.g[i * ld + i], zz = sh_.g[j * ld + j], xz = sh_.g[i * ld + j];
                    if (xx > 0 && zz > 0 && !apart(xx, zz, xz, 1e-14)) {
                        q = rotation(xx, zz, xz);
                        sh_.any = 1;
                    }
                }
                cosines[tid_] = q.cosine;
                sines[tid_] = q.sine;
            }
            __syncthreads();
            rotate_products(sh_.g, ld, k_, seats, round, cosines, sines, tid_, kThreads);
            for (int e = tid_; e < seats * k_; e += kThreads) { // rows of mt and y
                const int x = e / (2 * k_), l = e % (2 * k_), i = at_seat(x, round, seats), j = at_seat(seats - 1 - x, round, seats);
                if (i >= k_ || j >= k_) continue;
                double *rows = l < k_ ? sh_.mt : sh_.y;
                Rotation{cosines[x], sines[x]}.rotate(rows[i * ld + l % k_], rows[j * ld + l % k_]);
            }
        });
    }
    SUBSPAN_DEVICE void lengths() {
        for (int i = warp_; i < k_; i += kWarps) {
            const double x = lane_ < k_ ? sh_.mt[i * ld + lane_] : 0.0, s = warp_sum(x * x);
            if (lane_ == 0) sh_.cosine[i] = sqrt(s);
        }
        __syncthreads();
    }
    SUBSPAN_DEVICE double distance() const {
        double sum = 0, logs = 0, top = 0;
        for (int i = 0; i < k_; ++i) {
            // Sines from what the angle was made of: the library's sine wants a stack for arguments that do not occur.
            const double t = sh_.angle[i], x = sh_.sine[i], y = sh_.cosine[i], r = sqrt(fma(x, x, y * y));
            const double s = x / r, half = s / sqrt(2.0 * (1.0 + y / r));
            if (a_.kind == Distance::geodesic) sum = fma(t, t, sum);
            if (a_.kind == Distance::chordal) sum = fma(s, s, sum);
            if (a_.kind == Distance::procrustes) sum = fma(4.0 * half, half, sum);
            if (a_.kind == Distance::projection) top = t == t ? most(top, s) : t;
            // 1 - ∏ cos² by logarithms, which keep small angles.
            if (a_.kind == Distance::fubini_study || a_.kind == Distance::binet_cauchy) logs += t == t && s < 1.0 ? log1p(-s * s) : (t == t ? -1e300 : t);
        }
        if (a_.kind == Distance::projection) return top;
        if (a_.kind == Distance::fubini_study || a_.kind == Distance::binet_cauchy) {
            const double rest = -expm1(logs); // sin² of the angle of the whole
            return a_.kind == Distance::binet_cauchy ? sqrt(rest) : atan2(sqrt(rest), exp(0.5 * logs));
        }
        return sqrt(sum);
    }
    // Rows of mt become orthonormal; those of length zero (angles of π/2) any that are orthogonal to the others.
    SUBSPAN_DEVICE void unit_rows() {
        for (int i = warp_; i < k_; i += kWarps) {
            const double c = sh_.cosine[i];
            if (lane_ < k_ && c > 1e-290) sh_.mt[i * ld + lane_] /= c;
        }
        __syncthreads();
        for (int i = 0; i < k_; ++i) {
            if (!(sh_.cosine[i] <= 1e-290)) continue; // the same for all threads
            if (warp_ == 0) {
                // The axis that the other rows have least of, less what they have of it, twice.
                double have = lane_ < k_ ? 0.0 : 2.0;
                for (int r = 0; r < k_; ++r)
                    if (lane_ < k_ && (r < i || sh_.cosine[r] > 1e-290)) have = fma(sh_.mt[r * ld + lane_], sh_.mt[r * ld + lane_], have);
                int axis = lane_;
#pragma unroll
                for (int step = 16; step > 0; step /= 2) {
                    const double other = __shfl_xor_sync(kWarp, have, step);
                    const int theirs = __shfl_xor_sync(kWarp, axis, step);
                    if (other < have || (other == have && theirs < axis)) {
                        have = other;
                        axis = theirs;
                    }
                }
                double x = lane_ == axis ? 1.0 : 0.0;
                for (int pass = 0; pass < 2; ++pass)
                    for (int r = 0; r < k_; ++r) {
                        if (!(r < i || sh_.cosine[r] > 1e-290)) continue;
                        const double z = lane_ < k_ ? sh_.mt[r * ld + lane_] : 0.0;
                        x = fma(-warp_sum(x * z), z, x);
                    }
                const double length = sqrt(warp_sum(x * x));
                if (lane_ < k_) sh_.mt[i * ld + lane_] = x / length;
            }
            __syncthreads();
        }
    }
    // out = (W - U UᵀW) A, A = Σ_i f_i y_i x_iᵀ.
    SUBSPAN_DEVICE void logarithm_of() {
        unit_rows();
        if (tid_ < k_) {
            const double c = sh_.cosine[tid_];
            sh_.sine[tid_] = c < 1.0 ? acos(c) / sqrt((1.0 - c) * (1.0 + c)) : (c == c ? 1.0 : c);
        }
        __syncthreads();
        for (int e = tid_; e < k_ * k_; e += kThreads) {
            const int l = e / k_, j = e % k_;
            double s = 0;
            for (int i = 0; i < k_; ++i) s = fma(sh_.sine[i] * sh_.y[i * ld + l], sh_.mt[i * ld + j], s);
            sh_.a[l * ld + j] = s;
        }
        T *out = a_.out.at(blockIdx.x);
        for (int first = 0; first < n_; first += kRows) {
            load(first);
            for (int e = tid_; e < kRows * K; e += kThreads) {
                const int r = e / K, j = e % K;
                if (j >= k_) continue;
                double s = sh_.w[r * ld + j];
                for (int l = 0; l < k_; ++l) s = fma(-sh_.u[r * ld + l], sh_.m[l * ld + j], s);
                sh_.r[r * ld + j] = s;
            }
            __syncthreads();
            for (int e = tid_; e < kRows * K; e += kThreads) {
                const int r = e / K, j = e % K;
                if (j >= k_ || first + r >= n_) continue;
                double s = 0;
                for (int l = 0; l < k_; ++l) s = fma(sh_.r[r * ld + l], sh_.a[l * ld + j], s);
                out[(first + r) * a_.out.row_stride + j * a_.out.col_stride] = T(s);
            }
        }
    }
    // U X and W Y, in the order of the angles.
    SUBSPAN_DEVICE void vectors() {
        unit_rows();
        T *p = a_.p.at(blockIdx.x), *q = a_.q.at(blockIdx.x);
        for (int first = 0; first < n_; first += kRows) {
            load(first);
            for (int e = tid_; e < kRows * K; e += kThreads) {
                const int r = e / K, i = e % K;
                if (i >= k_ || first + r >= n_) continue;
                double x = 0, y = 0;
                for (int l = 0; l < k_; ++l) {
                    x = fma(sh_.u[r * ld + l], sh_.mt[i * ld + l], x);
                    y = fma(sh_.w[r * ld + l], sh_.y[i * ld + l], y);
                }
                p[(first + r) * a_.p.row_stride + sh_.place[i] * a_.p.col_stride] = T(x);
                q[(first + r) * a_.q.row_stride + sh_.place[i] * a_.q.col_stride] = T(y);
            }
        }
    }

    const Arguments<T> &a_;
    Shared<K> &sh_;
    const T *u_, *w_;
    int n_, k_, tid_, warp_, lane_;
};

template <class T, int K> __global__ void __launch_bounds__(kThreads, 1) angles_kernel(SUBSPAN_PARAMETER const Arguments<T> a) {
    SUBSPAN_SHARED(memory);
    Pair<T, K>(a, *reinterpret_cast<Shared<K> *>(memory)).run();
}

void run(const Session &s, const Stack &u, const Stack &w, const Stack &out, Job job, Distance kind, const Stack *p, const Stack *q) {
    dispatch_wide(u.dtype, [&](auto tag) {
        using T = decltype(tag);
        Arguments<T> a{};
        a.u = Matrices<const T>(u);
        a.w = Matrices<const T>(w);
        a.out = Matrices<T>(out);
        if (p != nullptr) a.p = Matrices<T>(*p);
        if (q != nullptr) a.q = Matrices<T>(*q);
        a.job = job;
        a.kind = kind;
        with_width(u.cols, [&](auto width) {
            constexpr int K = decltype(width)::value;
            launch<angles_kernel<T, K>>(s, "angles between subspaces", Shape{dim3(unsigned(u.size())), dim3(kThreads), int64_t(sizeof(Shared<K>))}, a);
        });
    });
}

void run_checked(const Context &context, const Stack &u, const Stack &w, const Stack &out, Job job, Distance kind, const Stack *p, const Stack *q) {
    check_points(u);
    check_pair(u, w, "W");
    const Session s(context);
    if (u.size() > 0) run(s, u, w, out, job, kind, p, q);
}

void check_result(const Stack &u, const Stack &x, const char *name, int64_t rows, int64_t cols) {
    if (x.rows != rows || x.cols != cols || x.size() != u.size() || x.dtype != u.dtype) throw ValueError(std::string(name) + " does not fit U");
}

} // namespace

void principal_angles(const Context &context, const Stack &u, const Stack &w, const Stack &angles, const Stack *p, const Stack *q) {
    check_result(u, angles, "angles", 1, u.cols);
    if ((p == nullptr) != (q == nullptr)) throw ValueError("principal vectors go in pairs");
    for (const Stack *x : {p, q})
        if (x != nullptr) check_result(u, *x, "principal vectors", u.rows, u.cols);
    run_checked(context, u, w, angles, p != nullptr ? with_vectors : angles_only, Distance::geodesic, p, q);
}

void subspace_distance(const Context &context, const Stack &u, const Stack &w, Distance kind, const Stack &out) {
    check_result(u, out, "out", 1, 1);
    run_checked(context, u, w, out, one_distance, kind, nullptr, nullptr);
}

void log_points(const Session &s, const Stack &u, const Stack &w, const Stack &out) { run(s, u, w, out, logarithm, Distance::geodesic, nullptr, nullptr); }

} // namespace subspan::cuda
