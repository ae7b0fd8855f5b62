#include "subspan/cuda/truncated_svd.hpp"

#include "base/copy.cuh"
#include "linalg/jacobi_svd.cuh"
#include "subspan/rng.hpp"

#include <algorithm>
#include <limits>

namespace subspan::cuda {
namespace {

// Rows of a random start; zeros where `last` says that none is missing.
template <class T> __global__ void __launch_bounds__(256) random_kernel(const Philox rng, int64_t first, T *to, int64_t pitch, int64_t n, const double *last) {
    const int64_t j = int64_t(blockIdx.x) * 256 + threadIdx.x, i = blockIdx.y;
    if (j >= n) return;
    const int64_t at = first + i * n + j;
    const double x = rng.uniform(std::uint64_t(at) / 4, int(at % 4));
    to[i * pitch + j] = last != nullptr && *last != 0.0 ? T(0) : T(x);
}

// Rows turn so that their largest entry is positive, and `rotations` (or null) with them. A warp a row.
__global__ void __launch_bounds__(32) orient_kernel(double *rows, int64_t n, double *rotations, int64_t l) {
    double *x = rows + int64_t(blockIdx.x) * n, best = 0;
    int64_t where = n;
    double sign = 1;
    for (int64_t j = threadIdx.x; j < n; j += 32) {
        const double size = x[j] < 0 ? -x[j] : x[j];
        if (size > best) {
            best = size;
            where = j;
            sign = x[j] < 0 ? -1.0 : 1.0;
        }
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        const double other = __shfl_xor_sync(kWarp, best, step), theirs = __shfl_xor_sync(kWarp, sign, step);
        const int64_t there = __shfl_xor_sync(kWarp, where, step);
        if (other > best || (other == best && there < where)) {
            best = other;
            where = there;
            sign = theirs;
        }
    }
    if (sign > 0) return;
    for (int64_t j = threadIdx.x; j < n; j += 32) x[j] = -x[j];
    if (rotations != nullptr)
        for (int64_t j = threadIdx.x; j < l; j += 32) rotations[int64_t(blockIdx.x) * l + j] *= -1.0;
}

// Rows that are missing, the last ones, come from the first of `more`.
__global__ void __launch_bounds__(256) fill_kernel(double *rows, const double *more, const double *sigma, int64_t n, int k) {
    const int64_t j = int64_t(blockIdx.x) * 256 + threadIdx.x;
    const int i = int(blockIdx.y);
    int there = 0;
    while (there < k && sigma[there] != 0.0) ++there;
    if (j < n && i >= there) rows[int64_t(i) * n + j] = more[int64_t(i - there) * n + j];
}

template <class X> void random(const Session &s, X *to, int64_t pitch, int64_t count, int64_t n, int64_t first, const double *last, std::uint64_t key) {
    if (count > 0)
        launch<random_kernel<X>>(s, "random rows", Shape{dim3(unsigned(divide_up<int64_t>(n, 256)), unsigned(count)), dim3(256)}, Philox{key}, first, to, pitch,
                                 n, last);
}

// Rows without a value become orthonormal to the others, and to each other: random rows, of which the first are taken. Where all vectors of a
// square matrix are asked for what these have outside of the others may be badly conditioned, which the second round mends. With nothing
// missing all of it works on zeros.
int64_t completion_room(int64_t k, int64_t n) { return RowFactor::workspace(k, n, true) + room<double>(k * n) + room<double>(k * k); }
void complete(const Session &s, const Blas &blas, Workspace work, double *v, int64_t k, int64_t n, const double *sigma, std::uint64_t key) {
    const RowFactor factor(work, k, n, true);
    double *more = work.take<double>(k * n), *parts = work.take<double>(k * k);
    random(s, more, n, k, n, 0, sigma + k - 1, key); // values descend
    const Operand r = own(factor.rows(), k, n), basis = own(v, k, n), c = own(parts, k, k);
    for (int round = 0; round < 2; ++round) {
        copy(s, static_cast<const double *>(more), n, int64_t(1), factor.rows(), factor.pitch(), int64_t(1), k, n);
        for (int pass = 0; pass < 2; ++pass) {
            blas.multiply(1.0, r, basis.transposed(), 0.0, c);
            blas.multiply(-1.0, c, basis, 1.0, r);
        }
        factor.gram(s, blas, n);
        factor.run(s, round == 0 ? RowFactor::Shift::any : RowFactor::Shift::orthonormal);
        factor.orthonormal(blas, n, more);
    }
    launch<fill_kernel>(s, "completed vectors", Shape{dim3(unsigned(divide_up<int64_t>(n, 256)), unsigned(k)), dim3(256)}, v, static_cast<const double *>(more),
                        sigma, n, int(k));
}

template <class T> __global__ void __launch_bounds__(256) squares_kernel(SUBSPAN_PARAMETER const Matrices<const T> a, double *parts) {
    SUBSPAN_SHARED(memory);
    double *sums = reinterpret_cast<double *>(memory), s = 0;
    const int64_t count = a.rows * a.cols;
    const bool by_columns = a.row_stride == 1;
    for (int64_t e = int64_t(blockIdx.x) * 256 + threadIdx.x; e < count; e += int64_t(gridDim.x) * 256) {
        const int64_t i = by_columns ? e % a.rows : e / a.cols, j = by_columns ? e / a.rows : e % a.cols;
        const double x = double(widen(a.data[i * a.row_stride + j * a.col_stride]));
        s = fma(x, x, s);
    }
    s = warp_sum(s);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = s;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < 8; ++w) s += sums[w];
        parts[blockIdx.x] = s;
    }
}
__global__ void __launch_bounds__(32) total_kernel(const double *parts, int n, double *out) {
    double s = 0;
    for (int i = int(threadIdx.x); i < n; i += 32) s += parts[i];
    s = warp_sum(s);
    if (threadIdx.x == 0) *out = s;
}
constexpr int kParts = 1024;

bool readable(const Stack &a) { return (a.dtype == DType::f32 || a.dtype == DType::f64) && blas_layout(operand(a)); } // by cuBLAS as it is

struct Plan {
    int64_t l, k, longest = 0, widest = 0, columns = 0, items; // longest of m and n; of m; of n
    bool gram;
};
Plan plan(const std::vector<TruncatedCall> &calls, const IterationOptions &o) {
    Plan p{o.vectors, calls[0].vh.rows, 0, 0, 0, int64_t(calls.size()), calls[0].a.dtype != DType::f64};
    for (const auto &c : calls) {
        p.longest = std::max({p.longest, c.a.rows, c.a.cols});
        p.widest = std::max(p.widest, c.a.rows);
        p.columns = std::max(p.columns, c.a.cols);
    }
    return p;
}

void check(const std::vector<TruncatedCall> &calls, const IterationOptions &o) {
    if (calls.empty()) throw ValueError("there are no matrices");
    if (o.power_iterations < 0) throw ValueError("power_iterations must not be negative, got " + std::to_string(o.power_iterations));
    const DType d = calls[0].a.dtype;
    const int64_t k = calls[0].vh.rows;
    for (const auto &c : calls) {
        const int64_t m = c.a.rows, n = c.a.cols;
        if (m < 1 || n < 1) throw ValueError("A must have at least one row and one column");
        if (m > std::numeric_limits<int>::max() / 256 || n > std::numeric_limits<int>::max() / 256) throw ValueError("A is too large for one call");
        if (k < 1 || o.vectors < k || o.vectors > std::min(m, n))
            throw ValueError("rank must be in [1, " + std::to_string(std::min(m, n)) + "], and with the oversampling too, got " + std::to_string(k) + " and " +
                             std::to_string(o.vectors));
        if (c.a.dtype != d || c.vh.dtype != d) throw ValueError("A and its triplets must have one dtype");
        if (c.vh.rows != k || c.vh.cols != n) throw ValueError("Vh does not fit A");
        if (c.u.data != nullptr && (c.u.rows != m || c.u.cols != k || c.u.dtype != d)) throw ValueError("U does not fit A");
        if (c.s.data != nullptr && (c.s.cols != k || c.s.dtype != wide(d))) throw ValueError("S does not fit A");
        if (c.initial.data != nullptr && (c.initial.cols != n || c.initial.dtype != wide(d)))
            throw ValueError("initial must have " + std::to_string(n) + " columns of " + name_of(wide(d)));
    }
}

template <class T> class Iteration {
  public:
    using C = Accumulate<T>;
    Iteration(const Session &s, Workspace work, const std::vector<TruncatedCall> &calls, const IterationOptions &o)
        : s_(s), blas_(s, work), calls_(calls), plan_(plan(calls, o)), complete_(o.complete) {
        for (const auto &c : calls) {
            const Stack &a = c.a;
            y_.push_back(work.take<C>(plan_.l * a.rows));
            z_.push_back(work.take<C>(plan_.l * a.cols));
            if (readable(a)) {
                a_.push_back(operand(a));
                continue;
            }
            C *own = work.take<C>(a.rows * a.cols);
            const bool by_columns = a.row_stride == 1;
            a_.push_back({own, wide(a.dtype), a.rows, a.cols, by_columns ? 1 : a.cols, by_columns ? a.rows : 1});
            copy(s_, static_cast<const T *>(a.data), a.row_stride, a.col_stride, own, a_.back().row_stride, a_.back().col_stride, a.rows, a.cols);
        }
        found_ = work.take<double>(plan_.l * plan_.longest);
        rest_ = work;
        start();
        times(true);
        for (int64_t i = 0; i < o.power_iterations; ++i) {
            orthonormal(true, 1);
            times(false);
            orthonormal(false, 1);
            times(true);
        }
        orthonormal(true, 2);
        times(false);
        finish();
    }

    static int64_t workspace(const std::vector<TruncatedCall> &calls, const IterationOptions &o, int device) {
        const Plan p = plan(calls, o);
        int64_t bytes = blas_workspace(device) + room<double>(p.l * p.longest);
        for (const auto &c : calls) bytes += room<C>(p.l * c.a.rows) + room<C>(p.l * c.a.cols) + (readable(c.a) ? 0 : room<C>(c.a.rows * c.a.cols));
        const int64_t between = p.gram ? RowFactor::workspace(p.l, p.longest, true, p.items) : RowSvd::workspace(p.l, p.longest, p.l, false, p.items);
        // The last decomposition, and the completion of vectors beside it.
        const int64_t last = RowSvd::workspace(p.l, p.gram ? p.longest : p.columns, p.k, p.gram, p.items) + completion(p);
        return bytes + std::max(between, last);
    }

  private:
    static int64_t completion(const Plan &p) { // also of u and its double rows
        return completion_room(p.k, p.longest) + room<double>(p.k * p.longest) + room<double>(p.l * p.longest);
    }
    void start() {
        for (std::size_t i = 0; i < calls_.size(); ++i) {
            const Stack &given = calls_[i].initial;
            const int64_t n = calls_[i].a.cols, have = given.data == nullptr ? 0 : std::min(given.rows, plan_.l);
            if (have > 0) copy(s_, static_cast<const C *>(given.data), given.row_stride, given.col_stride, z_[i], n, int64_t(1), have, n);
            random(s_, z_[i] + have * n, n, plan_.l - have, n, (have * n + 3) / 4 * 4, nullptr, calls_[i].key);
        }
    }
    // y = z Aᵀ, or z = y A.
    void times(bool transposed) {
        for (std::size_t i = 0; i < calls_.size(); ++i) {
            const Operand y = own(y_[i], plan_.l, a_[i].rows), z = own(z_[i], plan_.l, a_[i].cols);
            if (transposed)
                blas_.multiply(1.0, z, a_[i].transposed(), 0.0, y);
            else
                blas_.multiply(1.0, y, a_[i], 0.0, z);
        }
    }
    template <class Rows, class... Shift> void decompose(const Rows &svd, bool of_y, Shift... shift) {
        for (std::size_t i = 0; i < calls_.size(); ++i) {
            const int64_t cols = of_y ? a_[i].rows : a_[i].cols;
            copy(s_, static_cast<const C *>(of_y ? y_[i] : z_[i]), cols, int64_t(1), svd.rows(int64_t(i)), svd.pitch(), int64_t(1), plan_.l, cols);
            svd.gram(s_, blas_, cols, int64_t(i));
        }
        svd.run(s_, shift...);
    }
    int64_t columns(bool of_y) const { return plan_.gram ? plan_.longest : (of_y ? plan_.widest : plan_.columns); }
    // Between products only the span counts, and rows that are independent: by a factor of the Gram matrix, for which float32 products have
    // digits enough; a second pass makes them orthonormal. float64 is rotated.
    void orthonormal(bool of_y, int passes) {
        for (int pass = 0; pass < (plan_.gram ? passes : 1); ++pass) {
            Workspace work = rest_;
            const auto back = [&](std::size_t i) {
                const int64_t cols = of_y ? a_[i].rows : a_[i].cols;
                copy(s_, static_cast<const double *>(found_), cols, int64_t(1), of_y ? y_[i] : z_[i], cols, int64_t(1), plan_.l, cols);
            };
            if (plan_.gram) {
                const RowFactor factor(work, plan_.l, plan_.longest, true, plan_.items);
                decompose(factor, of_y, pass == 0 ? RowFactor::Shift::any : RowFactor::Shift::orthonormal);
                for (std::size_t i = 0; i < calls_.size(); ++i) {
                    factor.orthonormal(blas_, of_y ? a_[i].rows : a_[i].cols, found_, int64_t(i));
                    back(i);
                }
                continue;
            }
            const RowSvd svd(work, plan_.l, columns(of_y), plan_.l, false, plan_.items);
            decompose(svd, of_y);
            for (std::size_t i = 0; i < calls_.size(); ++i) {
                svd.vectors(s_, blas_, of_y ? a_[i].rows : a_[i].cols, found_, int64_t(i));
                back(i);
            }
        }
    }
    void finish() {
        Workspace work = rest_;
        const int64_t k = plan_.k, l = plan_.l;
        const RowSvd svd(work, l, columns(false), k, plan_.gram, plan_.items);
        decompose(svd, false);
        for (std::size_t at = 0; at < calls_.size(); ++at) {
            const int64_t i = int64_t(at), m = a_[at].rows, n = a_[at].cols;
            const TruncatedCall &c = calls_[at];
            const double *sigma = svd.sigma(i);
            svd.vectors(s_, blas_, n, found_, i);
            if (complete_) complete(s_, blas_, work, found_, k, n, sigma, c.key);
            launch<orient_kernel>(s_, "signs of vectors", Shape{dim3(unsigned(k)), dim3(32)}, found_, n, svd.rotations(i), l);
            copy(s_, static_cast<const double *>(found_), n, int64_t(1), static_cast<T *>(c.vh.data), c.vh.row_stride, c.vh.col_stride, k, n);
            if (c.s.data != nullptr) copy(s_, sigma, k, int64_t(1), static_cast<C *>(c.s.data), k, c.s.col_stride, int64_t(1), k);
            if (c.u.data == nullptr) continue;
            Workspace more = work;
            double *u = more.take<double>(k * m), *y = more.take<double>(l * m);
            copy(s_, static_cast<const C *>(y_[at]), m, int64_t(1), y, m, int64_t(1), l, m);
            blas_.multiply(1.0, own(svd.rotations(i), k, l), own(y, l, m), 0.0, own(u, k, m));
            if (complete_) complete(s_, blas_, more, u, k, m, sigma, c.key);
            copy(s_, static_cast<const double *>(u), m, int64_t(1), static_cast<T *>(c.u.data), c.u.col_stride, c.u.row_stride, k, m);
        }
    }

    const Session &s_;
    Blas blas_;
    const std::vector<TruncatedCall> &calls_;
    Plan plan_;
    bool complete_;
    std::vector<Operand> a_;
    std::vector<C *> y_, z_;
    double *found_ = nullptr;
    Workspace rest_{Context{}};
};

// In float64 rows are rotated themselves: one matrix after the other.
template <class F> void in_groups(const std::vector<TruncatedCall> &calls, const F &f) {
    if (calls[0].a.dtype != DType::f64) return f(calls);
    for (const auto &c : calls) f(std::vector<TruncatedCall>{c});
}

} // namespace

std::int64_t truncated_svd_workspace(const std::vector<TruncatedCall> &calls, const IterationOptions &o, int device) {
    check(calls, o);
    int64_t most_bytes = 0;
    in_groups(calls, [&](const std::vector<TruncatedCall> &group) {
        dispatch(group[0].a.dtype, [&](auto tag) { most_bytes = std::max(most_bytes, Iteration<decltype(tag)>::workspace(group, o, device)); });
    });
    return most_bytes;
}

void truncated_svd(const Context &context, const std::vector<TruncatedCall> &calls, const IterationOptions &o) {
    check(calls, o);
    const Session s(context);
    in_groups(calls, [&](const std::vector<TruncatedCall> &group) {
        dispatch(group[0].a.dtype, [&](auto tag) { Iteration<decltype(tag)>(s, Workspace(context), group, o); });
    });
}

std::int64_t complete_vectors_workspace(const Stack &vh, int device) {
    return blas_workspace(device) + room<double>(vh.rows * vh.cols) + room<double>(vh.rows) + completion_room(vh.rows, vh.cols);
}

void complete_vectors(const Context &context, const Stack &vh, const Stack &values, std::uint64_t key) {
    const int64_t k = vh.rows, n = vh.cols;
    if (k < 1 || n < k || vh.size() != 1) throw ValueError("Vh must be one matrix with at most as many rows as columns");
    if (values.cols != k || values.dtype != wide(vh.dtype)) throw ValueError("S does not fit Vh");
    const Session s(context);
    Workspace work(context);
    const Blas blas(s, work);
    double *found = work.take<double>(k * n), *sigma = work.take<double>(k);
    dispatch(vh.dtype, [&](auto tag) {
        using T = decltype(tag);
        using C = Accumulate<T>;
        T *v = static_cast<T *>(vh.data);
        copy(s, static_cast<const T *>(v), vh.row_stride, vh.col_stride, found, n, int64_t(1), k, n);
        copy(s, static_cast<const C *>(values.data), k, values.col_stride, sigma, k, int64_t(1), int64_t(1), k);
        complete(s, blas, work, found, k, n, sigma, key);
        launch<orient_kernel>(s, "signs of vectors", Shape{dim3(unsigned(k)), dim3(32)}, found, n, static_cast<double *>(nullptr), int64_t(0));
        copy(s, static_cast<const double *>(found), n, int64_t(1), v, vh.row_stride, vh.col_stride, k, n);
    });
}

std::int64_t squared_norm_workspace() { return room<double>(kParts); }

void squared_norm(const Context &context, const Stack &a, double *out) {
    if (a.size() != 1) throw ValueError("A must be one matrix");
    const Session s(context);
    Workspace work(context);
    double *parts = work.take<double>(kParts);
    const int64_t blocks = std::min<int64_t>(kParts, std::max<int64_t>(1, divide_up<int64_t>(a.rows * a.cols, 4096)));
    dispatch(a.dtype, [&](auto tag) {
        using T = decltype(tag);
        launch<squares_kernel<T>>(s, "a sum of squares", Shape{dim3(unsigned(blocks)), dim3(256), 64}, Matrices<const T>(a), parts);
    });
    launch<total_kernel>(s, "a sum of squares", Shape{dim3(1), dim3(32)}, static_cast<const double *>(parts), int(blocks), out);
}

} // namespace subspan::cuda
