#include "linalg/jacobi_svd.cuh"

#include "linalg/jacobi.cuh"

#include <algorithm>
#include <limits>

namespace subspan::cuda {
namespace {

constexpr double kLeastByGram = 2e-6, kLeast = 1e-15; // of the first singular value

constexpr double kNoise = kLeastByGram * kLeastByGram;
constexpr double kSettled = 1e-12; // of a squared cosine: what a sweep leaves behind is about the square of what it met, unless values lie close
constexpr double kSettledExactly = 1e-18;
constexpr double kNothing = 1e-17; // of the largest entry: a row that is shorter is what rounding has left of one that depends on others

struct Problem { // rows [X | rotations], or those of a factor: the first `inner` columns are made orthogonal, all `width` are rotated
    double *a;
    int64_t item;
    int count, inner, width;
    int *flags; // four for each item: whether the sweep has rotated, by the sweep modulo 3; whether the last one that was allowed still had to
    int sweeps; // that are allowed
    double tolerance, settled; // of a cosine; of a squared one: a sweep that meets none above is the last
    const double *marks;       // of a factor: the shift, and the largest square of a row of what it was made from
    const double *tops;        // of rows: the largest entry
    SUBSPAN_DEVICE double *row(unsigned i, int r) const { return a + int64_t(i) * item + int64_t(r) * width; }
    /// Two rows whose squares are below this are left as they are: beyond the shift all such rows together make no value that counts.
    SUBSPAN_DEVICE double noise(unsigned i) const { return marks != nullptr ? marks[2 * i] + kNoise * marks[2 * i + 1] / double(count) : -1.0; }
    SUBSPAN_DEVICE bool leave(double xx, double yy, double xy, double noise) const { return apart(xx, yy, xy, tolerance) || most(xx, yy) < noise; }
    /// Where there are more rows than columns some must end as nothing: the next sweep meets an even smaller rest, in any direction.
    SUBSPAN_DEVICE double nothing(unsigned i) const { return tops != nullptr ? kNothing * kNothing * tops[i] * tops[i] : 0.0; }
    SUBSPAN_DEVICE bool counts(double xx, double yy, double xy, double nothing) const { return xy * xy > settled * (xx * yy) && least(xx, yy) > nothing; }
};

__global__ void __launch_bounds__(256) identity_kernel(const Problem p) {
    const int j = int(blockIdx.x * 256 + threadIdx.x), r = int(blockIdx.y);
    if (j < p.count && p.width > p.inner) p.row(blockIdx.z, r)[p.inner + j] = j == r ? 1.0 : 0.0;
    if (j < 4 && r == 0) p.flags[4 * int(blockIdx.z) + j] = j == 2 ? 1 : 0; // the sweep before the first has rotated
}

// -- small ones: all rows in the shared memory of a cluster -----------------------------------------------------------------------
// Two groups of rows in each block. In the first of a sweep's rounds all of a block's rows meet, in the others each row of one group each of the
// other; between them groups move on to the neighbours, so that a barrier of the cluster stands between rounds of groups, not of rows.
constexpr int kMostWarps = 16, kSweeps = 40;

struct Groups {
    int size, width; // rows of a group; items of a row, an odd number
    SUBSPAN_SHARED_CODE Groups(int count, int items, int blocks) : size(divide_up(count, 2 * blocks)), width(items | 1) {}
    SUBSPAN_SHARED_CODE int64_t items() const { return 2 * int64_t(size) * width; } // of both
};

// Makes two rows orthogonal; returns whether that was worth another sweep.
SUBSPAN_DEVICE bool meet(const Problem &p, double *x, double *y, double noise, double nothing) {
    const int lane = int(threadIdx.x) % 32;
    double xx = 0, yy = 0, xy = 0;
#pragma unroll 4
    for (int l = lane; l < p.inner; l += 32) {
        const double a = x[l], b = y[l];
        xx = fma(a, a, xx);
        yy = fma(b, b, yy);
        xy = fma(a, b, xy);
    }
    warp_sums(xx, yy, xy);
    if (p.leave(xx, yy, xy, noise)) return false;
    const Rotation q = rotation(xx, yy, xy);
    for (int first = lane; first < p.width; first += 128) { // four entries are read before the first is written
        double a[4], b[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int l = first + 32 * e;
            a[e] = l < p.width ? x[l] : 0.0;
            b[e] = l < p.width ? y[l] : 0.0;
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int l = first + 32 * e;
            if (l >= p.width) continue;
            q.rotate(a[e], b[e]);
            x[l] = a[e];
            y[l] = b[e];
        }
    }
    return p.counts(xx, yy, xy, nothing);
}

__global__ void __launch_bounds__(kMostWarps * 32, 1) cluster_kernel(const Problem p, const int blocks) {
    SUBSPAN_SHARED(memory);
    const Groups groups(p.count, p.width, blocks);
    const int size = groups.size, width = groups.width, seats = 2 * blocks;
    const int tid = int(threadIdx.x), threads = int(blockDim.x), warp = tid / 32, warps = threads / 32;
    const int block = blocks > 1 ? int(cluster_rank()) : 0;
    const unsigned item = blockIdx.x / unsigned(blocks);
    double *now = reinterpret_cast<double *>(memory), *next = now + (blocks > 1 ? groups.items() : 0);
    int *rotated = reinterpret_cast<int *>(next + groups.items()); // whether this block has rotated, by parity of the sweep
    const double noise = p.noise(item), nothing = p.nothing(item);
    const auto global_row = [&](int local) { return (local < size ? block : seats - 1 - block) * size + local % size; };
    for (int e = tid; e < 2 * size * width; e += threads) { // rows that are not there are zero, and never rotated
        const int r = global_row(e / width), c = e % width;
        now[e] = r < p.count && c < p.width ? p.row(item, r)[c] : 0.0;
    }
    __syncthreads();
    for (int sweep = 0;; ++sweep) {
        if (tid == 0) rotated[sweep % 2] = 0;
        __syncthreads();
        bool any = false;
        for (int round = 0; round + 1 < seats; ++round) {
            if (round == 0) {
                for (int r = 0; r + 1 < 2 * size; ++r) {
                    for (int w = warp; w < size; w += warps)
                        any = meet(p, now + at_seat(w, r, 2 * size) * width, now + at_seat(2 * size - 1 - w, r, 2 * size) * width, noise, nothing) || any;
                    __syncthreads();
                }
            } else {
                for (int r = 0; r < size; ++r) {
                    for (int w = warp; w < size; w += warps) any = meet(p, now + w * width, now + (size + (w + r) % size) * width, noise, nothing) || any;
                    __syncthreads();
                }
            }
            if (blocks == 1) continue;
            // Seat 0 stays, the others move on by one.
            if (round + 2 == seats && any) rotated[sweep % 2] = 1;
            cluster_barrier();
            const int half = size * width;
            const double *first = block == 0 ? now : (block + 1 < blocks ? of_block(now, unsigned(block + 1)) : now + half);
            const double *second = block == 0 ? of_block(now, 1u) : of_block(now + half, unsigned(block - 1));
#pragma unroll 8
            for (int e = tid; e < half; e += threads) {
                const double a = first[e], b = second[e];
                next[e] = a;
                next[half + e] = b;
            }
            double *before = now;
            now = next;
            next = before;
            __syncthreads();
        }
        int more = 0;
        if (blocks == 1) {
            if (any) rotated[sweep % 2] = 1;
            __syncthreads();
            more = rotated[sweep % 2];
        } else {
            for (int b = 0; b < blocks; ++b) more |= of_block(rotated, unsigned(b))[sweep % 2];
        }
        if (more == 0) break;
        if (sweep + 1 >= p.sweeps) {
            if (block == 0 && tid == 0) p.flags[4 * int(item) + 3] = 1;
            break;
        }
    }
    for (int e = tid; e < 2 * size * width; e += threads) {
        const int r = global_row(e / width), c = e % width;
        if (r < p.count && c < p.width) p.row(item, r)[c] = now[e];
    }
    if (blocks > 1) cluster_barrier(); // nobody leaves while others still read
}

int64_t cluster_bytes(int64_t count, int64_t width, int64_t blocks) {
    return Groups(int(count), int(width), int(blocks)).items() * 8 * (blocks > 1 ? 2 : 1) + 8;
}

// Tests allow fewer, to see what becomes of a decomposition that does not settle.
int allowed_sweeps(int usual) {
#if defined(__CUDACC__)
    return usual;
#else
    return emulate::settings.sweeps > 0 ? emulate::settings.sweeps : usual;
#endif
}

// 0: they do not fit. A matrix on its own is spread over a cluster; where there are as many as would fill half of the device, they are not.
int64_t cluster_blocks(const Device &d, int64_t count, int64_t width, int64_t items) {
    const int64_t top = d.cluster;
    for (int64_t blocks = 1; blocks <= top; blocks *= 2)
        if (cluster_bytes(count, width, blocks) <= d.shared_limit && (count <= 32 || 2 * items >= d.processors || blocks == top)) return blocks;
    return 0;
}

// -- large ones: a block makes the 64 rows of two blocks of 32 orthogonal; launch by launch every block meets every other ----------
constexpr int kHalf = 32, kPair = 2 * kHalf, kBlockThreads = 256, kStrip = 32, kBlockSweeps = 20;
constexpr int64_t kBlockBytes = (2 * kPair * (kPair + 1) + kPair * (kStrip + 1) + 2 * kHalf + 1) * 8;

__global__ void __launch_bounds__(kBlockThreads, 1) block_kernel(const Problem p, const int round, const int seats, const int sweep, const int inner_sweeps) {
    SUBSPAN_SHARED(memory);
    constexpr int ld = kPair + 1, lt = kStrip + 1;
    const unsigned item = blockIdx.y;
    int *flags = p.flags + 4 * int(item);
    const int tid = int(threadIdx.x);
    if (round == 0 && blockIdx.x == 0 && tid == 0) flags[(sweep + 1) % 3] = 0;
    if (flags[(sweep + 2) % 3] == 0) return; // the sweep before has found nothing to do
    const int one = at_seat(int(blockIdx.x), round, seats), two = at_seat(seats - 1 - int(blockIdx.x), round, seats);
    const int low = least(one, two), high = most(one, two);
    if (high * kHalf >= p.count && seats > 2) return; // a block that is not there
    double *g = reinterpret_cast<double *>(memory), *v = g + kPair * ld, *tile = v + kPair * ld, *cosine = tile + kPair * lt, *sine = cosine + kHalf;
    int *any = reinterpret_cast<int *>(sine + kHalf); // and whether a sweep within has
    const auto row_of = [&](int r) { return r < kHalf ? low * kHalf + r : high * kHalf + r - kHalf; };
    const auto load = [&](int from, int end) {
        for (int e = tid; e < kPair * kStrip; e += kBlockThreads) {
            const int r = row_of(e / kStrip), l = from + e % kStrip;
            tile[(e / kStrip) * lt + e % kStrip] = r < p.count && l < end ? p.row(item, r)[l] : 0.0;
        }
        __syncthreads();
    };
    { // inner products: a thread has 4 x 4 of them, 16 rows apart
        const int i0 = tid / 16, j0 = tid % 16;
        double d[4][4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) d[i][j] = 0.0;
        for (int from = 0; from < p.inner; from += kStrip) {
            load(from, p.inner);
            for (int l = 0; l < kStrip; ++l) {
                double x[4], y[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    x[i] = tile[(i0 + 16 * i) * lt + l];
                    y[i] = tile[(j0 + 16 * i) * lt + l];
                }
#pragma unroll
                for (int i = 0; i < 4; ++i)
#pragma unroll
                    for (int j = 0; j < 4; ++j) d[i][j] = fma(x[i], y[j], d[i][j]);
            }
            __syncthreads();
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) g[(i0 + 16 * i) * ld + j0 + 16 * j] = d[i][j];
    }
    if (tid == 0) any[0] = 0;
    __syncthreads();
    const double noise = p.noise(item), nothing = p.nothing(item);
    bool found = false, counts = false;
    for (int e = tid; e < kPair * kPair; e += kBlockThreads) {
        const int i = e / kPair, j = e % kPair;
        v[i * ld + j] = i == j ? 1.0 : 0.0;
        if (i >= j) continue;
        const double xx = g[i * ld + i], yy = g[j * ld + j], xy = g[i * ld + j];
        if (p.leave(xx, yy, xy, noise)) continue;
        found = true;
        counts = counts || p.counts(xx, yy, xy, nothing);
    }
    if (found) any[0] = 1; // any thread's word counts
    if (counts) flags[sweep + 1 < p.sweeps ? sweep % 3 : 3] = 1;
    __syncthreads();
    if (any[0] == 0) return;
    // Rotations of the 64 x 64 matrix of products, from both sides; v gathers them.
    for (int inner = 0; inner < inner_sweeps; ++inner) {
        __syncthreads();
        if (tid == 0) any[1] = 0;
        __syncthreads();
        for (int r = 0; r + 1 < kPair; ++r) {
            if (tid < kHalf) {
                const int i = at_seat(tid, r, kPair), j = at_seat(kPair - 1 - tid, r, kPair);
                const double xx = g[i * ld + i], yy = g[j * ld + j], xy = g[i * ld + j];
                Rotation q{1.0, 0.0};
                if (!p.leave(xx, yy, xy, noise)) {
                    q = rotation(xx, yy, xy);
                    any[1] = 1;
                }
                cosine[tid] = q.cosine;
                sine[tid] = q.sine;
            }
            __syncthreads();
            rotate_products(g, ld, kPair, kPair, r, cosine, sine, tid, kBlockThreads);
            for (int e = tid; e < kPair * kHalf; e += kBlockThreads) {
                const int row = e / kHalf, b = e % kHalf, ib = at_seat(b, r, kPair), jb = at_seat(kPair - 1 - b, r, kPair);
                const double x = v[row * ld + ib], y = v[row * ld + jb], c = cosine[b], s = sine[b];
                v[row * ld + ib] = c * x - s * y;
                v[row * ld + jb] = s * x + c * y;
            }
            __syncthreads();
        }
        if (any[1] == 0) break;
    }
    // Hundreds of rotations have made v drift from orthogonal by as many roundings, which values would keep: v (3 I - vᵀv) / 2.
    for (int e = tid; e < kPair * kPair; e += kBlockThreads) {
        const int i = e / kPair, j = e % kPair;
        double x = 0;
        for (int l = 0; l < kPair; ++l) x = fma(v[l * ld + i], v[l * ld + j], x);
        g[i * ld + j] = (i == j ? 1.5 : 0.0) - 0.5 * x;
    }
    __syncthreads();
    for (int row = tid / 32; row < kPair; row += kBlockThreads / 32) {
        const int j = tid % 32;
        double x = 0, y = 0;
        for (int l = 0; l < kPair; ++l) {
            x = fma(v[row * ld + l], g[l * ld + j], x);
            y = fma(v[row * ld + l], g[l * ld + j + 32], y);
        }
        __syncwarp();
        v[row * ld + j] = x;
        v[row * ld + j + 32] = y;
    }
    // Rows = vᵀ rows, a strip of columns at a time.
    const int column = tid % kStrip, group = tid / kStrip;
    for (int from = 0; from < p.width; from += kStrip) {
        __syncthreads();
        load(from, p.width);
        double d[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) d[i] = 0.0;
        for (int l = 0; l < kPair; ++l) {
            const double x = tile[l * lt + column];
#pragma unroll
            for (int i = 0; i < 8; ++i) d[i] = fma(v[l * ld + 8 * group + i], x, d[i]);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int r = row_of(8 * group + i);
            if (r < p.count && from + column < p.width) p.row(item, r)[from + column] = d[i];
        }
    }
}

// -- from orthogonal rows to values and vectors ------------------------------------------------------------------------------------
__global__ void __launch_bounds__(256) norms_kernel(const Problem p, double *norms) {
    const int r = int(blockIdx.x) * 8 + int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
    if (r >= p.count) return;
    const double *x = p.row(blockIdx.y, r);
    double s = 0;
    for (int l = lane; l < p.inner; l += 32) s = fma(x[l], x[l], s);
    s = warp_sum(s);
    if (lane == 0) norms[int64_t(blockIdx.y) * p.count + r] = sqrt(s);
}

struct Extract {
    const double *norms, *values; // of before, for signs
    const double *units;          // of the rows of each item
    const double *marks;          // of their factors
    double *rotations, *scaled, *sigma, *left, *raw;
    int rank, kept;
    bool gram;
};

// A warp finds the place of a row among all, and puts it there.
__global__ void __launch_bounds__(256, 1) extract_kernel(const Problem p, const Extract c) {
    const int n = p.count, j = int(blockIdx.x) * 8 + int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
    if (j >= n) return;
    const unsigned item = blockIdx.y;
    const double *norms = c.norms + int64_t(item) * n, mine = norms[j];
    int place = 0, bad = 0;
    double top = 0;
    for (int i = lane; i < n; i += 32) {
        place += norms[i] > mine || (norms[i] == mine && i < j) ? 1 : 0;
        bad += norms[i] - norms[i] == 0.0 ? 0 : 1;
        top = most(top, norms[i]);
    }
    place = warp_sum(place);
    bad = warp_sum(bad) + p.flags[4 * int(item) + 3]; // what has not settled is no result
    top = warp_most(top);
    const double square = c.gram ? most(fma(mine, mine, -c.marks[2 * item]), 0.0) : mine * mine; // without the shift
    if (lane == 0) c.left[int64_t(item) * n + j] = bad != 0 ? sqrt(-1.0) : (place < c.kept ? 0.0 : square * c.units[item] * c.units[item]);
    if (bad != 0) place = j; // NaN goes on to whatever is made of this
    if (place >= c.kept) return;
    const double sigma = bad != 0 ? sqrt(-1.0) : (c.gram ? sqrt(square) : mine);
    const bool there = bad != 0 || (c.gram ? square > kNoise * top * top : mine > kLeast * top);
    // Rows of a factor, once they are orthogonal, are singular vectors times lengths.
    const double *x = p.row(item, j), *w = c.gram ? x : x + p.inner, unit = c.gram ? 1.0 / mine : 1.0;
    double best = -1, sign = 1;
    for (int i = lane; i < n; i += 32) {
        const double y = c.rank == 0 ? w[i] : (i < c.rank ? w[i] * c.values[i] : 1e-30 * w[i]), size = y < 0 ? -y : y;
        if (size > best) {
            best = size;
            sign = y < 0 ? -1.0 : 1.0;
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
    if (bad != 0) sign = sqrt(-1.0);
    double *rotations = c.rotations + (int64_t(item) * c.kept + place) * n;
    for (int i = lane; i < n; i += 32) rotations[i] = there ? sign * (w[i] * unit) : 0.0;
    if (!c.gram)
        for (int i = lane; i < p.inner; i += 32) c.raw[(int64_t(item) * c.kept + place) * p.inner + i] = there ? sign * x[i] : 0.0;
    if (lane != 0) return;
    c.scaled[int64_t(item) * c.kept + place] = there ? sigma : 0.0;
    c.sigma[int64_t(item) * c.kept + place] = there ? sigma * c.units[item] : 0.0;
}

__global__ void __launch_bounds__(32) left_kernel(const double *left, int n, double *after) {
    double s = 0;
    for (int i = int(threadIdx.x); i < n; i += 32) s += left[int64_t(blockIdx.x) * n + i];
    s = warp_sum(s);
    if (threadIdx.x != 0) return;
    const bool finite = s - s == 0.0;
    after[2 * int64_t(blockIdx.x)] = finite ? s : 0.0;
    after[2 * int64_t(blockIdx.x) + 1] = finite ? 1.0 : 0.0;
}

// Rows r that are nearly σ times orthonormal become orthonormal as (I - L) D⁻¹ r with L + Lᵀ = E - I, E = D⁻¹ r rᵀ D⁻¹. Of two vectors mostly
// the one of the smaller value turns: rounding of a Gram matrix has hit it harder, by the ratio of the values.
__global__ void __launch_bounds__(256) polish_kernel(const double *e, const double *sigma, double *out, int64_t k) {
    const int64_t at = int64_t(blockIdx.x) * 256 + threadIdx.x;
    if (at >= k * k) return;
    const int64_t i = at / k, j = at % k;
    const double si = sigma[i], sj = sigma[j];
    if (!(si > 0 && sj > 0)) {
        out[at] = 0.0;
        return;
    }
    const double product = e[at] / si / sj, ratio = si / sj;
    out[at] = (i == j ? 1.5 - 0.5 * product : -product / (1.0 + ratio * ratio)) / sj;
}

} // namespace

int64_t RowSvd::workspace(int64_t count, int64_t cols, int64_t kept, bool gram, int64_t items) {
    return (gram ? RowFactor::workspace(count, cols, false, items)
                 : room<double>(items * count * (cols + count)) + room<double>(items * kPeaks) + 2 * room<double>(items)) +
           room<double>((gram ? 1 : items) * kept * cols) + 2 * room<double>(kept * kept) + room<double>(items * kept * count) +
           2 * room<double>(items * kept) + 2 * room<double>(items * count) + room<double>(2 * items) + room<int>(4 * items);
}

RowSvd::RowSvd(Workspace &work, int64_t count, int64_t cols, int64_t kept, bool gram, int64_t items)
    : count_(count), cols_(cols), kept_(kept), items_(items), width_(gram ? count : cols + count) {
    if (count < 1 || cols < 1 || kept < 1 || kept > count || items < 1 || items > 65535 || count > 65535 || width_ > std::numeric_limits<int>::max() / 64)
        throw ValueError("a decomposition of " + std::to_string(count) + " rows of " + std::to_string(cols) + " entries is too large for one call");
    if (gram) {
        factor_.emplace(work, count, cols, false, items);
        a_ = factor_->factor();
    } else {
        a_ = work.take<double>(items * count * width_);
        peaks_ = work.take<double>(items * kPeaks);
        units_ = work.take<double>(items);
        tops_ = work.take<double>(items);
    }
    raw_ = work.take<double>((gram ? 1 : items) * kept * cols);
    inner_ = work.take<double>(kept * kept);
    polished_ = work.take<double>(kept * kept);
    rotations_ = work.take<double>(items * kept * count);
    sigma_ = work.take<double>(items * kept);
    scaled_ = work.take<double>(items * kept);
    norms_ = work.take<double>(items * count);
    left_ = work.take<double>(items * count);
    after_ = work.take<double>(2 * items);
    flags_ = work.take<int>(4 * items);
}

void RowSvd::gram(const Session &s, const Blas &blas, int64_t cols, int64_t item) const {
    if (factor_)
        factor_->gram(s, blas, cols, item);
    else
        scale_rows(s, rows(item), pitch(), count_, cols, peaks_ + item * kPeaks, units_ + item, tops_ + item);
}

void RowSvd::run(const Session &s, const double *values, int64_t rank, bool exact) const {
    const bool gram = factor_.has_value();
    if (gram) factor_->run(s);
    constexpr double by_gram = 1e-15, by_rows = 2e-15;
    const int64_t blocks = cluster_blocks(s.device(), count_, width_, items_);
    const Problem p{a_,
                    count_ * width_,
                    int(count_),
                    int(gram ? count_ : cols_),
                    int(width_),
                    flags_,
                    allowed_sweeps(blocks > 0 ? kSweeps : kBlockSweeps),
                    gram ? by_gram : by_rows,
                    gram ? (exact ? kSettledExactly : kSettled) : by_rows * by_rows,
                    gram ? factor_->marks() : nullptr,
                    tops_};
    const Shape each{dim3(unsigned(divide_up<int64_t>(count_, 256)), gram ? 1u : unsigned(count_), unsigned(items_)), dim3(256)};
    launch<identity_kernel>(s, "rotations of rows", each, p);
    if (blocks > 0) {
        const int64_t warps = std::clamp<int64_t>(Groups(int(count_), int(width_), int(blocks)).size, 1, kMostWarps); // a pair each
        launch<cluster_kernel>(s, "orthogonal rows",
                               Shape{dim3(unsigned(blocks * items_)), dim3(unsigned(32 * warps)), cluster_bytes(count_, width_, blocks), int(blocks)}, p,
                               int(blocks));
    } else {
        const int64_t halves = divide_up<int64_t>(count_, kHalf), seats = most<int64_t>(2, halves + halves % 2);
        for (int sweep = 0; sweep < p.sweeps; ++sweep)
            for (int round = 0; round + 1 < int(seats); ++round)
                launch<block_kernel>(s, "orthogonal rows by blocks", Shape{dim3(unsigned(seats / 2), unsigned(items_)), dim3(kBlockThreads), kBlockBytes}, p,
                                     round, int(seats), sweep, gram ? 1 : 3);
    }
    const dim3 warps(unsigned(divide_up<int64_t>(count_, 8)), unsigned(items_));
    launch<norms_kernel>(s, "lengths of rows", Shape{warps, dim3(256)}, p, norms_);
    const Extract c{norms_, values, gram ? factor_->unit() : units_, p.marks, rotations_, scaled_, sigma_, left_, raw_, int(rank), int(kept_), gram};
    launch<extract_kernel>(s, "singular values", Shape{warps, dim3(256)}, p, c);
    launch<left_kernel>(s, "energy left out", Shape{dim3(unsigned(items_)), dim3(32)}, static_cast<const double *>(left_), int(count_), after_);
}

void RowSvd::vectors(const Session &s, const Blas &blas, int64_t cols, double *vectors, int64_t item) const {
    double *r = factor_ ? raw_ : raw_ + item * kept_ * cols_;
    const Operand raw = own(r, kept_, cols), out = own(vectors, kept_, cols), e = own(inner_, kept_, kept_), p = own(polished_, kept_, kept_);
    if (factor_) blas.multiply(1.0, own(rotations(item), kept_, count_), own(rows(item), count_, cols, pitch(), 0), 0.0, raw);
    blas.multiply(1.0, raw, raw.transposed(), 0.0, e);
    launch<polish_kernel>(s, "orthonormal rows", Shape{dim3(unsigned(divide_up<int64_t>(kept_ * kept_, 256))), dim3(256)}, static_cast<const double *>(inner_),
                          static_cast<const double *>(scaled_ + item * kept_), polished_, kept_);
    blas.multiply(1.0, p, raw, 0.0, out);
}

} // namespace subspan::cuda
