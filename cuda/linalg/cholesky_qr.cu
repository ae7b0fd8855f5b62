#include "linalg/cholesky_qr.cuh"

#include "base/block.cuh"

#include <algorithm>
#include <cmath>
#include <limits>

namespace subspan::cuda {
namespace {

// The largest entry of each of so many parts of the rows; NaN is left to be found later.
__global__ void __launch_bounds__(256) peak_kernel(const double *x, int64_t pitch, int64_t count, int64_t cols, double *peaks) {
    SUBSPAN_SHARED(memory);
    double *tops = reinterpret_cast<double *>(memory), top = 0;
    for (int64_t i = blockIdx.x; i < count; i += gridDim.x)
        for (int64_t j = threadIdx.x; j < cols; j += 256) {
            const double y = x[i * pitch + j], size = y < 0 ? -y : y;
            top = size > top ? size : top;
        }
    top = warp_most(top);
    if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top;
    __syncthreads();
    for (int w = 0; w < 8; ++w) top = most(top, tops[w]);
    if (threadIdx.x == 0) peaks[blockIdx.x] = top;
}

__global__ void __launch_bounds__(256) scale_kernel(double *x, int64_t pitch, int64_t count, int64_t cols, const double *peaks, double *unit, double *largest) {
    const unsigned lane = threadIdx.x % 32;
    const double top = warp_most(most(lane < gridDim.x ? peaks[lane] : 0.0, lane + 32 < gridDim.x ? peaks[lane + 32] : 0.0));
    int exponent = 0;
    if (top > 0 && top - top == 0) exponent = ilogb(top);
    if (exponent > -100 && exponent < 100) exponent = 0;
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        *unit = ldexp(1.0, exponent);
        if (largest != nullptr) *largest = ldexp(top, -exponent);
    }
    if (exponent == 0) return;
    for (int64_t i = blockIdx.x; i < count; i += gridDim.x)
        for (int64_t j = threadIdx.x; j < cols; j += 256) x[i * pitch + j] = ldexp(x[i * pitch + j], -exponent);
}

constexpr int kStripe = 32, kThreads = 256, kPitch = kStripe + 1;

struct Factoring {
    const double *g; // count x count for each item
    double *a;       // [R | R⁻ᵀ], count x width for each item
    double *marks;
    int count, width;
    double shift; // as a share of the largest diagonal entry
};

// Rows 32 k to 32 k + 31 of [R | R⁻ᵀ] = L⁻¹ [G + shift I | I], L = Rᵀ, from those above: a block has 32 columns. Each block eliminates the
// same square on the diagonal beside its own columns, so that one launch does for a stripe.
__global__ void __launch_bounds__(kThreads, 1) stripe_kernel(const Factoring p, const int k) {
    SUBSPAN_SHARED(memory);
    double *above = reinterpret_cast<double *>(memory), *there = above + kStripe * kPitch, *s = there + kStripe * kPitch, *t = s + kStripe * kPitch,
           *tops = t + kStripe * kPitch;
    const int tid = int(threadIdx.x), r0 = k * kStripe, c0 = int(blockIdx.x) * kStripe, n = p.count;
    const double *g = p.g + int64_t(blockIdx.y) * n * n;
    double *a = p.a + int64_t(blockIdx.y) * n * p.width;
    if (c0 + kStripe <= r0) { // below the diagonal
        for (int e = tid; e < kStripe * kStripe; e += kThreads)
            if (r0 + e / kStripe < n) a[int64_t(r0 + e / kStripe) * p.width + c0 + e % kStripe] = 0.0;
        return;
    }
    double top = 0;
    for (int i = tid; i < n; i += kThreads) top = most(top, g[int64_t(i) * (n + 1)]);
    top = warp_most(top);
    if (tid % 32 == 0) tops[tid / 32] = top;
    __syncthreads();
    for (int w = 0; w < kThreads / 32; ++w) top = most(top, tops[w]);
    const double shift = p.shift * top;
    if (k == 0 && blockIdx.x == 0 && tid == 0) {
        p.marks[2 * blockIdx.y] = shift;
        p.marks[2 * blockIdx.y + 1] = top;
    }
    // A thread has four entries of a row, eight columns apart, of both squares.
    const int i = tid / 8, j = tid % 8;
    double ds[4], dt[4];
#pragma unroll
    for (int x = 0; x < 4; ++x) {
        const int row = r0 + i, col = r0 + j + 8 * x, mine = c0 + j + 8 * x;
        ds[x] = row < n && col < n ? g[int64_t(row) * n + col] + (row == col ? shift : 0.0) : 0.0;
        dt[x] = row >= n || mine >= p.width ? 0.0 : (mine < n ? g[int64_t(row) * n + mine] + (row == mine ? shift : 0.0) : (mine - n == row ? 1.0 : 0.0));
    }
    for (int from = 0; from < r0; from += kStripe) {
        __syncthreads();
#pragma unroll
        for (int e = tid; e < kStripe * kStripe; e += kThreads) {
            const int l = e / kStripe, c = e % kStripe;
            const double *row = a + int64_t(from + l) * p.width;
            above[l * kPitch + c] = r0 + c < n ? row[r0 + c] : 0.0;
            there[l * kPitch + c] = c0 + c < p.width ? row[c0 + c] : 0.0;
        }
        __syncthreads();
#pragma unroll 4
        for (int l = 0; l < kStripe; ++l) {
            const double y = above[l * kPitch + i];
#pragma unroll
            for (int x = 0; x < 4; ++x) {
                ds[x] = fma(-y, above[l * kPitch + j + 8 * x], ds[x]);
                dt[x] = fma(-y, there[l * kPitch + j + 8 * x], dt[x]);
            }
        }
    }
#pragma unroll
    for (int x = 0; x < 4; ++x) {
        s[i * kPitch + j + 8 * x] = ds[x];
        t[i * kPitch + j + 8 * x] = dt[x];
    }
    // Elimination; rows stay as they are until all are done, and are divided by the roots of their pivots then.
    double mine = 0;
    for (int l = 0; l < kStripe; ++l) {
        __syncthreads();
        const double pivot = s[l * kPitch + l];
        // What rounding has left of a row that depends on others would only be noise made large; NaN goes on.
        const double inverse = pivot > 0.25 * shift ? inverse_root(pivot) : (pivot == pivot ? 0.0 : pivot);
        if (i == l) mine = inverse;
        if (i <= l) continue;
        // Of the row above, not of the entry below the diagonal: that differs by rounding, which a small pivot would make large.
        const double y = s[l * kPitch + i] * inverse * inverse;
#pragma unroll
        for (int x = 0; x < 4; ++x) {
            const int c = j + 8 * x;
            if (c > l) s[i * kPitch + c] = fma(-y, s[l * kPitch + c], s[i * kPitch + c]);
            t[i * kPitch + c] = fma(-y, t[l * kPitch + c], t[i * kPitch + c]);
        }
    }
#pragma unroll
    for (int x = 0; x < 4; ++x) {
        const int row = r0 + i, col = c0 + j + 8 * x;
        if (row < n && col < p.width) a[int64_t(row) * p.width + col] = col < n && col < row ? 0.0 : mine * t[i * kPitch + j + 8 * x];
    }
}

// A block a row.
__global__ void __launch_bounds__(256) unit_rows_kernel(double *rows, int64_t pitch, int64_t cols) {
    SUBSPAN_SHARED(memory);
    double *parts = reinterpret_cast<double *>(memory), *x = rows + int64_t(blockIdx.x) * pitch;
    const double top = block_most<256>(parts, cols, [&](int64_t j) { return x[j]; });
    const int e = top > 0 && top - top == 0 ? ilogb(top) : 0;
    const double sum = block_sum<256>(parts, cols, [&](int64_t j) {
        const double y = ldexp(x[j], -e);
        return y * y;
    });
    if (sum == 0) return;
    const double inverse = inverse_root(sum);
    for (int64_t j = threadIdx.x; j < cols; j += 256) x[j] = ldexp(x[j], -e) * inverse;
}

} // namespace

void unit_rows(const Session &s, double *rows, int64_t pitch, int64_t count, int64_t cols) {
    if (count > 0 && cols > 0) launch<unit_rows_kernel>(s, "rows of unit length", Shape{dim3(unsigned(count)), dim3(256), 64}, rows, pitch, cols);
}

void scale_rows(const Session &s, double *rows, int64_t pitch, int64_t count, int64_t cols, double *peaks, double *unit, double *top) {
    const unsigned blocks = unsigned(std::clamp<int64_t>(count * cols / 4096, 1, kPeaks));
    launch<peak_kernel>(s, "the largest of rows", Shape{dim3(blocks), dim3(256), 64}, static_cast<const double *>(rows), pitch, count, cols, peaks);
    launch<scale_kernel>(s, "rows near one", Shape{dim3(blocks), dim3(256)}, rows, pitch, count, cols, static_cast<const double *>(peaks), unit, top);
}

int64_t RowFactor::workspace(int64_t count, int64_t cols, bool inverse, int64_t items) {
    return room<double>(items * count * cols) + room<double>(items * count * count) + room<double>(items * count * count * (inverse ? 2 : 1)) +
           room<double>(2 * items) + room<double>(items * kPeaks) + room<double>(items);
}

RowFactor::RowFactor(Workspace &work, int64_t count, int64_t cols, bool inverse, int64_t items)
    : count_(count), cols_(cols), items_(items), width_(inverse ? 2 * count : count) {
    if (count < 1 || cols < 1 || items < 1 || items > 65535 || count > 65535 || cols > std::numeric_limits<int>::max() / 64)
        throw ValueError("a decomposition of " + std::to_string(count) + " rows of " + std::to_string(cols) + " entries is too large for one call");
    x_ = work.take<double>(items * count * cols);
    g_ = work.take<double>(items * count * count);
    a_ = work.take<double>(items * count * width_);
    marks_ = work.take<double>(2 * items);
    peaks_ = work.take<double>(items * kPeaks);
    units_ = work.take<double>(items);
}

void RowFactor::gram(const Session &s, const Blas &blas, int64_t cols, int64_t item) const {
    scale_rows(s, rows(item), pitch(), count_, cols, peaks_ + item * kPeaks, units_ + item);
    const Operand x = own(rows(item), count_, cols, pitch(), 0);
    blas.multiply(1.0, x, x.transposed(), 0.0, own(g_ + item * count_ * count_, count_, count_));
}

void RowFactor::run(const Session &s, Shift shift) const {
    constexpr double eps = std::numeric_limits<double>::epsilon();
    const double count = double(count_), terms = std::sqrt(count * double(cols_));
    const Factoring p{g_, a_, marks_, int(count_), int(width_), eps * (shift == Shift::any ? 4.0 * (count + terms) : 0.25 * count)};
    const Shape shape{dim3(unsigned(divide_up<int64_t>(width_, kStripe)), unsigned(items_)), dim3(kThreads), (4 * kStripe * kPitch + kThreads / 32) * 8};
    for (int k = 0; k * kStripe < int(count_); ++k) launch<stripe_kernel>(s, "a factor of products of rows", shape, p, k);
}

void RowFactor::orthonormal(const Blas &blas, int64_t cols, double *out, int64_t item) const {
    const Operand inverse{factor(item) + count_, DType::f64, count_, count_, width_, 1};
    blas.multiply(1.0, inverse, own(rows(item), count_, cols, pitch(), 0), 0.0, own(out, count_, cols));
}

} // namespace subspan::cuda
