#include "subspan/cuda/streaming_svd.hpp"

#include "blas.cuh"

#include <algorithm>
#include <cmath>
#include <limits>

namespace subspan::cuda {
namespace {

constexpr int kJacobiThreads = 512, kJacobiWarps = kJacobiThreads / 32, kSweeps = 40;
constexpr double kLeast = 2e-6; // of the first singular value

// -- [forget s V; rows - mean; the way of the mean] in double -------------------------------------------------------------------
__global__ void __launch_bounds__(256) mean_kernel(const float *rows, int64_t ri, int64_t rj, int64_t b, int64_t n, double *mean) {
    const int64_t j = int64_t(blockIdx.x) * 256 + threadIdx.x;
    if (j >= n) return;
    double sum = 0;
    for (int64_t i = 0; i < b; ++i) sum += double(rows[i * ri + j * rj]);
    mean[j] = sum / double(b);
}

__global__ void __launch_bounds__(256)
    stack_kernel(const float *rows, int64_t ri, int64_t rj, const float *v, int64_t vi, const double *values, const double *block_mean,
                 const double *mean, double *a, unsigned rank, unsigned b, int64_t n, double forget, double turn) {
    const int64_t j = int64_t(blockIdx.x) * 256 + threadIdx.x;
    const unsigned i = blockIdx.y;
    if (j >= n) return;
    double x;
    if (i < rank)
        x = forget * values[i] * double(v[i * vi + j]);
    else if (i < rank + b)
        x = double(rows[int64_t(i - rank) * ri + j * rj]) - (block_mean != nullptr ? block_mean[j] : 0.0);
    else
        x = turn * (mean[j] - block_mean[j]);
    a[int64_t(i) * n + j] = x;
}

// -- eigenvectors of a symmetric positive semidefinite matrix --------------------------------------------------------------------
// Columns of G and of the rotations so far, dealt out to the blocks of a cluster. Pairs go round robin: those of a round touch
// different columns, a warp takes a pair wherever its columns are.
struct Columns {
    double *mine; // this block's: `per` columns of G, then as many of the rotations
    int per, ld;
    SUBSPAN_DEVICE double *of(int j, bool turned) const {
        const unsigned rank = unsigned(j / per);
        double *base = const_cast<double *>(of_block(mine, rank));
        return base + int64_t((turned ? per : 0) + j % per) * ld;
    }
};

struct Core {
    const double *g;      // N x N
    const double *values; // singular values of before, for signs
    double *coefficients; // kept x N: rows of the new components in terms of the stacked rows
    double *news;         // kept singular values
    double *totals;       // of before: energy left out
    double *after;        // 3: energy left out afterwards, whether all was finite, the largest eigenvalue
    int n, rank, kept, blocks;
    double forget;
};

__global__ void __launch_bounds__(kJacobiThreads, 1) eigen_kernel(const Core c) {
    SUBSPAN_SHARED(memory);
    const int n = c.n, seats = n + n % 2, per = divide_up(seats, c.blocks), ld = n | 1, tid = int(threadIdx.x), warp = tid / 32, lane = tid % 32;
    const int block = c.blocks > 1 ? int(cluster_rank()) : 0;
    double *storage = reinterpret_cast<double *>(memory);
    const Columns columns{storage, per, ld};
    double *lengths = storage + int64_t(2 * per) * ld, *all = lengths + per; // of own columns, of all
    int *turned = reinterpret_cast<int *>(all + seats);                      // whether this block has rotated, by parity of the sweep
    bool finite = true;
    for (int e = tid; e < per * n; e += kJacobiThreads) {
        const int l = e / n, i = e - l * n, j = block * per + l;
        const double x = j < n ? c.g[int64_t(j) * n + i] : 0.0;
        finite = finite && x - x == 0.0;
        storage[l * ld + i] = x;
        storage[(per + l) * ld + i] = i == j ? 1.0 : 0.0;
    }
    if (tid < 2) turned[tid] = 0;
    __syncthreads();
    if (!finite) turned[0] = -1; // any thread's word counts
    cluster_barrier();
    for (int b = 0; b < c.blocks; ++b) finite = finite && *of_block(turned, unsigned(b)) == 0;
    cluster_barrier();
    if (finite) { // the same for all threads of the cluster
        const double bound = 1e-15 * 1e-15;
        for (int sweep = 0; sweep < kSweeps; ++sweep) {
            if (tid == 0) turned[sweep % 2] = 0;
            __syncthreads();
            bool any = false;
            for (int round = 0; round + 1 < seats; ++round) {
                for (int pair = block * kJacobiWarps + warp; pair < seats / 2; pair += c.blocks * kJacobiWarps) {
                    const auto seat = [&](int s) { return s == 0 ? 0 : 1 + (s - 1 + round) % (seats - 1); };
                    const int p = seat(pair), q = seat(seats - 1 - pair);
                    if (p >= n || q >= n) continue;
                    double *x = columns.of(p, false), *y = columns.of(q, false);
                    double xx = 0, yy = 0, xy = 0;
                    for (int i = lane; i < n; i += 32) {
                        xx = fma(x[i], x[i], xx);
                        yy = fma(y[i], y[i], yy);
                        xy = fma(x[i], y[i], xy);
                    }
                    xx = warp_sum(xx);
                    yy = warp_sum(yy);
                    xy = warp_sum(xy);
                    if (!(xy * xy > bound * (xx * yy))) continue;
                    any = true;
                    const double half = 0.5 * (yy - xx), root = sqrt(fma(half, half, xy * xy));
                    const double t = half < 0 ? xy / (half - root) : xy / (half + root);
                    const double cosine = 1.0 / sqrt(fma(t, t, 1.0)), s = cosine * t, tau = s / (1.0 + cosine);
                    double *u = columns.of(p, true), *v = columns.of(q, true);
                    for (int i = lane; i < n; i += 32) {
                        double a = x[i], b = y[i];
                        x[i] = a - s * (b + tau * a);
                        y[i] = b + s * (a - tau * b);
                        a = u[i];
                        b = v[i];
                        u[i] = a - s * (b + tau * a);
                        v[i] = b + s * (a - tau * b);
                    }
                }
                cluster_barrier();
            }
            if (any) turned[sweep % 2] = 1;
            cluster_barrier();
            int more = 0;
            for (int b = 0; b < c.blocks; ++b) more |= of_block(turned, unsigned(b))[sweep % 2];
            if (more == 0) break;
        }
    }
    // Eigenvalues are the lengths of the columns of G.
    for (int l = warp; l < per; l += kJacobiWarps) {
        double s = 0;
        for (int i = lane; i < n; i += 32) s = fma(storage[l * ld + i], storage[l * ld + i], s);
        s = warp_sum(s);
        if (lane == 0) lengths[l] = block * per + l < n ? sqrt(s) : -1.0;
    }
    cluster_barrier();
    for (int j = tid; j < n; j += kJacobiThreads) all[j] = of_block(lengths, unsigned(j / per))[j % per];
    cluster_barrier(); // also: nobody leaves while others still read
    double top = 0;
    for (int j = 0; j < n; ++j) top = most(top, all[j]);
    if (block == 0 && tid == 0) {
        double left = c.totals[0] * c.forget * c.forget;
        for (int j = 0; j < n && finite; ++j) {
            int place = 0;
            for (int i = 0; i < n; ++i) place += all[i] > all[j] || (all[i] == all[j] && i < j) ? 1 : 0;
            if (place >= c.kept) left += all[j];
        }
        c.after[0] = left;
        c.after[1] = finite ? 1.0 : 0.0;
        c.after[2] = top;
    }
    for (int l = warp; l < per; l += kJacobiWarps) {
        const int j = block * per + l;
        if (j >= n || !finite) continue;
        int place = 0;
        for (int i = lane; i < n; i += 32) place += all[i] > all[j] || (all[i] == all[j] && i < j) ? 1 : 0;
        place = warp_sum(place);
        if (place >= c.kept) continue;
        const double sigma = sqrt(all[j]);
        const bool there = all[j] > kLeast * kLeast * top;
        const double *w = storage + int64_t(per + l) * ld;
        // The sign of the component of before that it is closest to; of its own largest coefficient where there is none.
        double best = -1, sign = 1;
        for (int i = lane; i < n; i += 32) {
            const double x = i < c.rank ? w[i] * c.values[i] : 1e-30 * w[i], size = x < 0 ? -x : x;
            if (size > best) {
                best = size;
                sign = x < 0 ? -1.0 : 1.0;
            }
        }
#pragma unroll
        for (int step = 16; step > 0; step /= 2) {
            const double other = __shfl_xor_sync(kWarp, best, step), theirs = __shfl_xor_sync(kWarp, sign, step);
            if (other > best || (other == best && theirs > sign)) {
                best = other;
                sign = theirs;
            }
        }
        for (int i = lane; i < n; i += 32) c.coefficients[int64_t(place) * n + i] = there ? sign * w[i] / sigma : 0.0;
        if (lane == 0) c.news[place] = there ? sigma : 0.0;
    }
}

// The polynomial (3 I - E) / 2 that makes nearly orthonormal rows orthonormal.
__global__ void __launch_bounds__(256) polish_kernel(double *e, int64_t k) {
    const int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x;
    if (i < k * k) e[i] = (i / k == i % k ? 1.5 : 0.0) - 0.5 * e[i];
}

// What the update has found takes the place of what there was, unless something was not finite.
__global__ void __launch_bounds__(256)
    finish_kernel(const double *after, const double *components, const double *news, const double *block_mean, float *v, int64_t vi, double *values,
                  double *mean, double *totals, unsigned kept, int64_t n, double weight, double b) {
    const int64_t j = int64_t(blockIdx.x) * 256 + threadIdx.x;
    const unsigned i = blockIdx.y;
    const bool good = after[1] != 0.0;
    if (i == 0 && j == 0) {
        if (good)
            totals[0] = after[0];
        else
            totals[1] += b;
    }
    if (!good || j >= n) return;
    if (i < kept) v[i * vi + j] = float(components[int64_t(i) * n + j]);
    if (i == 0 && mean != nullptr) mean[j] = (weight * mean[j] + b * block_mean[j]) / (weight + b);
    if (j < kept && i == 0) values[j] = news[j];
}

int64_t core_size(const StreamUpdate &u) { return u.rank + u.rows.rows + (u.mean != nullptr && u.weight > 0 ? 1 : 0); }

int64_t eigen_bytes(int64_t n, int64_t blocks) {
    const int64_t seats = n + n % 2, per = divide_up(seats, blocks);
    return (2 * per * (n | 1) + per + seats + 2) * 8;
}

int64_t eigen_blocks(const Device &d, int64_t n) {
    for (int64_t blocks = 1; blocks <= (d.clusters ? 8 : 1); blocks *= 2)
        if (eigen_bytes(n, blocks) <= d.shared_limit && (n <= 32 || blocks == (d.clusters ? 8 : 1) || 2 * blocks > 8)) return blocks;
    return 0;
}

} // namespace

std::int64_t stream_core_limit(int device) {
    Context context;
    context.device = device;
    const Session s(context);
    int64_t n = 1;
    while (eigen_blocks(s.device(), n + 1) > 0) ++n;
    return n;
}

std::int64_t stream_update_workspace(const StreamUpdate &u, int device) {
    const int64_t n = u.rows.cols, size = core_size(u);
    return blas_workspace(device) + room<double>(size * n) + room<double>(size * size) + room<double>(u.kept * size) + room<double>(u.kept) + room<double>(3) +
           2 * room<double>(u.kept * n) + room<double>(u.kept * u.kept) + room<double>(n);
}

void stream_update(const Context &context, const StreamUpdate &u) {
    const int64_t n = u.rows.cols, b = u.rows.rows, size = core_size(u), top = std::numeric_limits<int>::max() / 256;
    if (u.rows.dtype != DType::f32 || u.components.dtype != DType::f32) throw ValueError("a stream on a CUDA device takes float32");
    if (u.components.cols != n) throw ValueError("rows must have " + std::to_string(u.components.cols) + " columns, got " + std::to_string(n));
    if (b < 1 || n < 1 || n > top) throw ValueError("rows are empty, or too many columns for one call");
    if (u.rank > u.components.rows || u.kept > u.components.rows || u.kept > size || u.kept > n || u.kept < 1) throw ValueError("the ranks of the stream do not fit");
    if (u.components.col_stride != 1) throw ValueError("components must have contiguous rows");
    if (size > 65535) throw ValueError("too many rows for one update");
    const Session s(context);
    const int64_t blocks = eigen_blocks(s.device(), size);
    if (blocks == 0) throw ValueError("the core of " + std::to_string(size) + " rows does not fit the shared memory of a cluster of blocks");
    Workspace work(context);
    const Blas blas(s, work);
    double *a = work.take<double>(size * n), *g = work.take<double>(size * size), *coefficients = work.take<double>(u.kept * size);
    double *news = work.take<double>(u.kept), *after = work.take<double>(3), *v = work.take<double>(u.kept * n), *polished = work.take<double>(u.kept * n);
    double *e = work.take<double>(u.kept * u.kept), *block_mean = work.take<double>(n);
    const auto *rows = static_cast<const float *>(u.rows.data);
    auto *components = static_cast<float *>(u.components.data);
    const dim3 across(unsigned(divide_up<int64_t>(n, 256)));
    const bool centred = u.mean != nullptr;
    if (centred) launch<mean_kernel>(s, "the mean of rows", Shape{across, dim3(256)}, rows, u.rows.row_stride, u.rows.col_stride, b, n, block_mean);
    const double turn = centred && u.weight > 0 ? std::sqrt(u.weight * double(b) / (u.weight + double(b))) : 0.0;
    launch<stack_kernel>(s, "rows of a stream", Shape{dim3(across.x, unsigned(size)), dim3(256)}, rows, u.rows.row_stride, u.rows.col_stride,
                         static_cast<const float *>(components), u.components.row_stride, static_cast<const double *>(u.values),
                         centred ? static_cast<const double *>(block_mean) : nullptr, static_cast<const double *>(u.mean), a, unsigned(u.rank), unsigned(b), n,
                         u.forget, turn);
    const Operand stacked{a, DType::f64, size, n, n, 1}, gram{g, DType::f64, size, size, size, 1}, combine{coefficients, DType::f64, u.kept, size, size, 1};
    const Operand found{v, DType::f64, u.kept, n, n, 1}, inner{e, DType::f64, u.kept, u.kept, u.kept, 1}, better{polished, DType::f64, u.kept, n, n, 1};
    blas.multiply(1.0, stacked, stacked.turned(), 0.0, gram);
    const Core core{g, u.values, coefficients, news, u.totals, after, int(size), int(u.rank), int(u.kept), int(blocks), u.forget};
    Shape shape{dim3(unsigned(blocks)), dim3(kJacobiThreads), eigen_bytes(size, blocks), int(blocks)};
    launch<eigen_kernel>(s, "the core of a stream", shape, core);
    blas.multiply(1.0, combine, stacked, 0.0, found);
    blas.multiply(1.0, found, found.turned(), 0.0, inner);
    launch<polish_kernel>(s, "orthonormal components", Shape{dim3(unsigned(divide_up<int64_t>(u.kept * u.kept, 256))), dim3(256)}, e, u.kept);
    blas.multiply(1.0, inner, found, 0.0, better);
    launch<finish_kernel>(s, "components of a stream", Shape{dim3(unsigned(divide_up<int64_t>(std::max(n, u.kept), 256)), unsigned(u.kept)), dim3(256)},
                          static_cast<const double *>(after), static_cast<const double *>(polished), static_cast<const double *>(news),
                          static_cast<const double *>(block_mean), components, u.components.row_stride, u.values, u.mean, u.totals, unsigned(u.kept), n, u.weight,
                          double(b));
}

} // namespace subspan::cuda
