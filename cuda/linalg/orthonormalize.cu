#include "subspan/cuda/orthonormalize.hpp"

#include "base/block.cuh"
#include "base/copy.cuh"
#include "linalg/cholesky_qr.cuh"
#include "subspan/rng.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace subspan::cuda {
namespace {

constexpr int64_t kAtOnce = int64_t(1) << 30; // bytes of work memory that matrices of a stack may take together
constexpr std::uint64_t kKey = 0x706f6c6172;

// How many matrices of a stack go together.
int64_t together(const Stack &a, int64_t bytes_each) {
    return std::clamp<int64_t>(kAtOnce / std::max<int64_t>(bytes_each, 1), 1, std::min<int64_t>(a.size(), 65535));
}

// max |G - I| of a k x k matrix a block.
__global__ void __launch_bounds__(256) defect_kernel(const double *g, int64_t k, double *out) {
    SUBSPAN_SHARED(memory);
    double *parts = reinterpret_cast<double *>(memory);
    const double *a = g + int64_t(blockIdx.x) * k * k;
    const auto off = [&](int64_t e) { return a[e] - (e % (k + 1) == 0 ? 1.0 : 0.0); };
    const double top = block_most<256>(parts, k * k, off), bad = block_sum<256>(parts, k * k, [&](int64_t e) { return a[e] - a[e]; });
    if (threadIdx.x == 0) out[blockIdx.x] = bad == 0 ? top : bad;
}

struct Cholesky {
    Cholesky(const Stack &a)
        : m(a.rows), k(a.cols), each(RowFactor::workspace(k, m, true) + room<double>(m * k) + room<double>(k * k)), items(together(a, each)) {}
    int64_t bytes(int device) const {
        return blas_workspace(device) + RowFactor::workspace(k, m, true, items) + room<double>(items * m * k) + room<double>(items * k * k);
    }
    int64_t m, k, each, items;
};

// -- polar -------------------------------------------------------------------------------------------------------------------------------

struct Quintic { // a x + b x³ + c x⁵
    double a, b, c;
    double operator()(double x) const { return x * (a + x * x * (b + x * x * c)); }
};

// The one that is nearest to 1 on [l, u]: the error has one size and changing signs at l, at both extrema between, and at u.
Quintic nearest_to_one(double l, double u) {
    if (l >= 0.98 * u) { // Taylor's is as good there, and the equations below no longer hold their digits
        const double c = 2 / (l + u);
        return {1.875 * c, -1.25 * c * c * c, 0.375 * c * c * c * c * c};
    }
    double points[4] = {l, (3 * l + u) / 4, (l + 3 * u) / 4, u}, before = 0;
    Quintic p{};
    for (int step = 0; step < 100; ++step) {
        double rows[4][5];
        for (int i = 0; i < 4; ++i) {
            const double x = points[i], y[5] = {x, x * x * x, x * x * x * x * x, i % 2 == 0 ? 1.0 : -1.0, 1.0};
            std::copy_n(y, 5, rows[i]);
        }
        for (int c = 0; c < 4; ++c) { // elimination with pivots
            int pivot = c;
            for (int i = c + 1; i < 4; ++i)
                if (std::abs(rows[i][c]) > std::abs(rows[pivot][c])) pivot = i;
            std::swap(rows[c], rows[pivot]);
            for (int i = 0; i < 4; ++i) {
                if (i == c) continue;
                const double y = rows[i][c] / rows[c][c];
                for (int j = c; j < 5; ++j) rows[i][j] -= y * rows[c][j];
            }
        }
        p = {rows[0][4] / rows[0][0], rows[1][4] / rows[1][1], rows[2][4] / rows[2][2]};
        const double error = rows[3][4] / rows[3][3], root = std::sqrt(9 * p.b * p.b - 20 * p.a * p.c);
        if (std::abs(error - before) <= 1e-15) break;
        before = error;
        points[1] = std::sqrt((-3 * p.b - root) / (10 * p.c));
        points[2] = std::sqrt((-3 * p.b + root) / (10 * p.c));
    }
    return p;
}

// Polynomials that take all of [least, 1] to 1. Those of intervals that begin below a fortieth of their end are made for that fortieth: a
// polynomial for all of it would bring some large values down to the smallest ones, and their digits would be lost. And they are made for a
// little more than the end, which is a fixed point that rounding would drive values away from, twelvefold a step.
std::vector<Quintic> schedule(double least) {
    constexpr double cushion = 1.0 / 40;
    std::vector<Quintic> all;
    double l = least, u = 1;
    while (l < u * (1 - 1e-5)) {
        if (l < 0.98 * u) u *= 1.01;
        const double from = std::max(l, cushion * u);
        const Quintic p = nearest_to_one(from, u);
        const double low = p(from);
        l = std::min(low, p(l));
        u = 2 - low;
        all.push_back(p);
    }
    all.push_back(nearest_to_one(u, u));
    return all;
}

template <class T> __global__ void __launch_bounds__(256) peaks_kernel(SUBSPAN_PARAMETER const Matrices<const T> a, const unsigned first, double *peaks) {
    SUBSPAN_SHARED(memory);
    const T *x = a.at(first + blockIdx.y);
    const bool by_columns = a.row_stride == 1;
    const int64_t begin = int64_t(blockIdx.x) * 256 + threadIdx.x;
    const double top = block_most<256>(reinterpret_cast<double *>(memory), begin, a.rows * a.cols, int64_t(gridDim.x) * 256, [&](int64_t e) {
        const int64_t r = by_columns ? e % a.rows : e / a.cols, c = by_columns ? e / a.rows : e % a.cols;
        return double(widen(x[r * a.row_stride + c * a.col_stride]));
    });
    if (threadIdx.x == 0) peaks[int64_t(blockIdx.y) * gridDim.x + blockIdx.x] = top;
}

// x = a / 2^e, near one, and a little of everything.
template <class T, class C>
__global__ void __launch_bounds__(256) begin_kernel(SUBSPAN_PARAMETER const Matrices<const T> a, const unsigned first, const double *peaks, const int parts,
                                                    const double little, const Philox rng, C *x) {
    const int64_t e = int64_t(blockIdx.x) * 256 + threadIdx.x;
    const unsigned item = blockIdx.y;
    if (e >= a.rows * a.cols) return;
    double top = 0;
    for (int i = 0; i < parts; ++i) top = most(top, peaks[int64_t(item) * parts + i]);
    const int power = top > 0 && top - top == 0 ? ilogb(top) + 1 : 0;
    const double y = double(widen(a.at(first + item)[e / a.cols * a.row_stride + e % a.cols * a.col_stride]));
    x[int64_t(item) * a.rows * a.cols + e] = C(ldexp(y, -power) + little * rng.uniform(std::uint64_t(e) / 4, int(e % 4)));
}

// 1 / √‖G‖_F, which is at most one over the largest singular value. A block a matrix.
template <class C> __global__ void __launch_bounds__(256) scale_kernel(const C *g, int64_t k, double *scales) {
    SUBSPAN_SHARED(memory);
    const C *a = g + int64_t(blockIdx.x) * k * k;
    const double sum = block_sum<256>(reinterpret_cast<double *>(memory), k * k, [&](int64_t e) { return double(a[e]) * double(a[e]); });
    if (threadIdx.x == 0) scales[blockIdx.x] = inverse_root(sqrt(sum));
}

// p = a s I + b s³ G + c s⁵ G², whose last factor is there.
template <class C> __global__ void __launch_bounds__(256) polynomial_kernel(const C *g, C *p, int64_t k, const Quintic q, const double *scales) {
    const int64_t e = int64_t(blockIdx.x) * 256 + threadIdx.x, at = int64_t(blockIdx.y) * k * k + e;
    if (e >= k * k) return;
    const double s = scales == nullptr ? 1.0 : scales[blockIdx.y], s3 = s * s * s;
    p[at] = C(q.b * s3 * double(g[at]) + q.c * s3 * s * s * double(p[at]) + (e % (k + 1) == 0 ? q.a * s : 0.0));
}

template <class T> struct Polar {
    using C = std::conditional_t<std::is_same_v<T, F16> || std::is_same_v<T, Bf16>, float, double>;
    static constexpr int kParts = 32;

    explicit Polar(const Stack &given) : a(given.rows < given.cols ? given.transposed() : given), q(a.rows), p(a.cols) {
        const double eps = std::is_same_v<T, double> ? 0x1p-52 : std::is_same_v<T, float> ? 0x1p-23 : std::is_same_v<T, F16> ? 0x1p-10 : 0x1p-7;
        little = eps / 8;
        items = together(a, 2 * (q + p) * p * int64_t(sizeof(C)));
    }
    int64_t bytes(int device) const {
        return blas_workspace(device) + 2 * room<C>(items * q * p) + 2 * room<C>(items * p * p) + room<double>(items * kParts) + room<double>(items);
    }
    void run(const Context &context, const Stack &target) {
        const Stack out = a.rows == target.rows && a.cols == target.cols ? target : target.transposed();
        const Session s(context);
        Workspace work(context);
        const Blas blas(s, work);
        C *x = work.take<C>(items * q * p), *y = work.take<C>(items * q * p), *g = work.take<C>(items * p * p), *poly = work.take<C>(items * p * p);
        double *peaks = work.take<double>(items * kParts), *scales = work.take<double>(items);
        const Matrices<const T> from(a);
        const std::vector<Quintic> polynomials = schedule(little / (30 * std::sqrt(double(p)) * std::sqrt(double(p) * double(q))));
        for (int64_t first = 0; first < a.size(); first += items) {
            const int64_t count = std::min(items, a.size() - first);
            const unsigned many = unsigned(count);
            launch<peaks_kernel<T>>(s, "the largest entries", Shape{dim3(kParts, many), dim3(256), 64}, from, unsigned(first), peaks);
            launch<begin_kernel<T, C>>(s, "matrices near one", Shape{dim3(unsigned(divide_up<int64_t>(q * p, 256)), many), dim3(256)}, from, unsigned(first),
                                       static_cast<const double *>(peaks), kParts, little, Philox{kKey}, x);
            bool scaled = false;
            for (const Quintic &f : polynomials) {
                const Operand xx = own(x, q, p), gg = own(g, p, p), pp = own(poly, p, p);
                blas.multiply(1.0, xx.transposed(), xx, 0.0, gg, count);
                if (!scaled) launch<scale_kernel<C>>(s, "norms", Shape{dim3(many), dim3(256), 64}, static_cast<const C *>(g), p, scales);
                blas.multiply(1.0, gg, gg, 0.0, pp, count);
                launch<polynomial_kernel<C>>(s, "a polynomial", Shape{dim3(unsigned(divide_up<int64_t>(p * p, 256)), many), dim3(256)},
                                             static_cast<const C *>(g), poly, p, f,
                                             scaled ? static_cast<const double *>(nullptr) : static_cast<const double *>(scales));
                blas.multiply(1.0, xx, pp, 0.0, own(y, q, p), count);
                std::swap(x, y);
                scaled = true;
            }
            copies<C, T>(s, own_stack(x, count, q, p, p), 0, out, first, count);
        }
    }
    Stack a;
    int64_t q, p, items;
    double little;
};

void check(const Stack &a, const Stack &out) {
    if (out.rows != a.rows || out.cols != a.cols || out.size() != a.size() || out.dtype != a.dtype) throw ValueError("out does not fit A");
}

bool empty(const Stack &a) { return a.size() == 0 || a.rows == 0 || a.cols == 0; }

} // namespace

std::int64_t cholesky_qr_workspace(const Stack &a, int device) { return empty(a) ? 0 : Cholesky(a).bytes(device); }

void cholesky_qr(const Context &context, const Stack &a, const Stack &out, double *defects) {
    check(a, out);
    if (a.cols > a.rows) throw ValueError("A has more columns than rows");
    if (empty(a)) return;
    const Cholesky plan(a);
    const int64_t m = plan.m, k = plan.k;
    const Session s(context);
    Workspace work(context);
    const Blas blas(s, work);
    const RowFactor factor(work, k, m, true, plan.items);
    double *found = work.take<double>(plan.items * m * k), *g = work.take<double>(plan.items * k * k);
    dispatch(a.dtype, [&](auto tag) {
        using T = decltype(tag);
        for (int64_t first = 0; first < a.size(); first += plan.items) {
            const int64_t count = std::min(plan.items, a.size() - first);
            for (int pass = 0; pass < 3; ++pass) {
                const Stack rows = own_stack(factor.rows(0), count, k, m, factor.pitch());
                pass == 0 ? copies<T, double>(s, a.transposed(), first, rows, 0, count)
                          : copies<double, double>(s, own_stack(found, count, k, m, m), 0, rows, 0, count);
                if (pass == 0) unit_rows(s, factor.rows(0), factor.pitch(), count * k, m);
                for (int64_t i = 0; i < count; ++i) factor.gram(s, blas, m, i);
                factor.run(s, pass == 0 ? RowFactor::Shift::any : RowFactor::Shift::orthonormal);
                for (int64_t i = 0; i < count; ++i) factor.orthonormal(blas, m, found + i * m * k, i);
            }
            const Operand q = own(found, k, m);
            blas.multiply(1.0, q, q.transposed(), 0.0, own(g, k, k), count);
            launch<defect_kernel>(s, "the loss of orthogonality", Shape{dim3(unsigned(count)), dim3(256), 64}, static_cast<const double *>(g), k,
                                  defects + first);
            copies<double, T>(s, own_stack(found, count, k, m, m), 0, out.transposed(), first, count);
        }
    });
}

std::int64_t polar_workspace(const Stack &a, int device) {
    if (empty(a)) return 0;
    return dispatch(a.dtype, [&](auto tag) { return Polar<decltype(tag)>(a).bytes(device); });
}

void polar(const Context &context, const Stack &a, const Stack &out) {
    check(a, out);
    if (empty(a)) return;
    dispatch(a.dtype, [&](auto tag) { Polar<decltype(tag)>(a).run(context, out); });
}

} // namespace subspan::cuda
