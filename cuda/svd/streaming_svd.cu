#include "subspan/cuda/streaming_svd.hpp"

#include "linalg/jacobi_svd.cuh"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

namespace subspan::cuda {
namespace {

enum Total { left_out, refused, weight_of_mean, not_finite };

// One where any of the rows holds NaN or infinity.
template <class T> __global__ void __launch_bounds__(256) finite_check_kernel(const T *rows, int64_t ri, int64_t rj, int64_t b, int64_t n, double *totals) {
    bool bad = false;
    for (int64_t i = blockIdx.y; i < b; i += gridDim.y)
        for (int64_t j = int64_t(blockIdx.x) * 256 + threadIdx.x; j < n; j += int64_t(gridDim.x) * 256) {
            const T x = rows[i * ri + j * rj];
            bad = bad || !(x - x == T(0));
        }
    if (bad) totals[not_finite] = 1.0; // any thread's word counts
}

template <class T> __global__ void __launch_bounds__(256) mean_kernel(const T *rows, int64_t ri, int64_t rj, int64_t b, int64_t n, double *mean) {
    const int64_t j = int64_t(blockIdx.x) * 256 + threadIdx.x;
    if (j >= n) return;
    double sum = 0;
    for (int64_t i = 0; i < b; ++i) sum += double(rows[i * ri + j * rj]);
    mean[j] = sum / double(b);
}

// What is put below the past: rows, or another state.
template <class T> struct Below {
    const T *rows;
    int64_t row_stride, col_stride, count;
    const double *values, *mean, *totals; // of the other state; of rows only their mean
    SUBSPAN_DEVICE double weight() const { return totals != nullptr ? totals[weight_of_mean] : double(count); }
};

// [forget s V; rows - mean; the way of the mean] in double; `work` keeps the weights of the two parts for what comes after.
template <class T>
__global__ void __launch_bounds__(256) stack_kernel(const Below<T> below, const double *v, int64_t vi, const double *values, const double *mean,
                                                    const double *totals, double *work, double *x, int64_t pitch, unsigned rank, int64_t n, double forget) {
    const int64_t j = int64_t(blockIdx.x) * 256 + threadIdx.x;
    const unsigned i = blockIdx.y;
    const double weight = totals[weight_of_mean] * forget * forget, theirs = below.weight();
    if (i == 0 && j == 0) {
        work[0] = weight;
        work[1] = theirs;
        work[2] = totals[not_finite];
        work[3] = below.totals != nullptr ? below.totals[left_out] : 0.0;
        work[4] = below.totals != nullptr ? below.totals[refused] : 0.0;
    }
    if (j >= n) return;
    double y;
    if (i < rank) {
        y = forget * values[i] * v[i * vi + j];
    } else if (i < rank + below.count) {
        const unsigned r = i - rank;
        y = double(below.rows[r * below.row_stride + j * below.col_stride]);
        if (below.values != nullptr)
            y *= below.values[r];
        else if (mean != nullptr)
            y -= below.mean[j];
    } else {
        y = weight > 0 && theirs > 0 ? sqrt(weight * theirs / (weight + theirs)) * (mean[j] - below.mean[j]) : 0.0;
    }
    x[int64_t(i) * pitch + j] = y;
}

// What the decomposition has found takes the place of what there was, unless something was not finite.
__global__ void __launch_bounds__(256)
    finish_kernel(const double *after, const double *work, const double *found, const double *sigma, const double *block_mean, double *v, int64_t vi,
                  double *values, double *mean, double *totals, unsigned kept, int64_t n, double forget, double refusal, bool last) {
    const int64_t j = int64_t(blockIdx.x) * 256 + threadIdx.x;
    const unsigned i = blockIdx.y;
    const bool good = after[1] != 0.0 && work[2] == 0.0;
    if (i == 0 && j == 0) {
        totals[refused] += work[4];
        if (good) {
            totals[left_out] = totals[left_out] * forget * forget + after[0] + work[3];
            totals[weight_of_mean] = work[0] + work[1];
        } else {
            totals[refused] += refusal;
        }
        if (last) totals[not_finite] = 0.0;
    }
    if (!good || j >= n) return;
    if (i < kept) v[i * vi + j] = found[int64_t(i) * n + j];
    if (i == 0 && mean != nullptr && work[0] + work[1] > 0) mean[j] = (work[0] * mean[j] + work[1] * block_mean[j]) / (work[0] + work[1]);
    if (j < kept && i == 0) values[j] = sigma[j];
}

struct Sizes {
    int64_t n, rows, size, kept;
};
Sizes sizes(const SvdState &s, int64_t rows) {
    Sizes z;
    z.n = s.components.cols;
    z.rows = rows;
    z.size = s.rank + rows + (s.mean != nullptr && s.rank > 0 ? 1 : 0);
    z.kept = std::min({s.components.rows, z.n, z.size});
    return z;
}

int64_t workspace(const SvdState &s, const Sizes &z, int device) {
    return blas_workspace(device) + RowSvd::workspace(z.size, z.n, z.kept, !s.robust) + room<double>(z.kept * z.n) + room<double>(z.n) + room<double>(5);
}

template <class T>
int64_t add(const Session &s, const Blas &blas, Workspace work, const SvdState &state, const Below<T> &below, double forget, double refusal, bool last) {
    const Sizes z = sizes(state, below.count);
    const RowSvd svd(work, z.size, z.n, z.kept, !state.robust);
    double *found = work.take<double>(z.kept * z.n), *block_mean = work.take<double>(z.n), *weights = work.take<double>(5);
    auto *v = static_cast<double *>(state.components.data);
    const unsigned across = unsigned(divide_up<int64_t>(std::max(z.n, z.kept), 256));
    Below<T> b = below;
    if (state.mean != nullptr && b.mean == nullptr) {
        launch<mean_kernel<T>>(s, "the mean of rows", Shape{dim3(across), dim3(256)}, b.rows, b.row_stride, b.col_stride, b.count, z.n, block_mean);
        b.mean = block_mean;
    }
    launch<stack_kernel<T>>(s, "rows of an update", Shape{dim3(across, unsigned(z.size)), dim3(256)}, b, static_cast<const double *>(v),
                            state.components.row_stride, static_cast<const double *>(state.values), static_cast<const double *>(state.mean),
                            static_cast<const double *>(state.totals), weights, svd.rows(), svd.pitch(), unsigned(state.rank), z.n, forget);
    svd.gram(s, blas, z.n);
    svd.run(s, state.values, state.rank, std::is_same_v<T, double>);
    svd.vectors(s, blas, z.n, found);
    launch<finish_kernel>(s, "components of an update", Shape{dim3(across, unsigned(z.kept)), dim3(256)}, svd.after(), static_cast<const double *>(weights),
                          static_cast<const double *>(found), static_cast<const double *>(svd.sigma()), b.mean, v, state.components.row_stride, state.values,
                          state.mean, state.totals, unsigned(z.kept), z.n, forget, refusal, last);
    return z.kept;
}

void check_state(const SvdState &s, const char *name) {
    const Stack &v = s.components;
    const std::string n(name);
    if (v.dtype != DType::f64) throw ValueError(n + " must hold its components in float64, got " + name_of(v.dtype));
    if (v.col_stride != 1) throw ValueError(n + " must have components with contiguous rows");
    if (v.cols < 1 || v.cols > std::numeric_limits<int>::max() / 256 || v.rows < 1) throw ValueError(n + " has no columns, or too many for one call");
    if (s.rank < 0 || s.rank > v.rows) throw ValueError(n + " has a rank that does not fit its components");
}

void check_block(const SvdState &s, const SvdBlock &b) {
    check_state(s, "the state");
    if (b.rows.dtype != DType::f32 && b.rows.dtype != DType::f64)
        throw ValueError(std::string("rows must be float32 or float64, got ") + name_of(b.rows.dtype));
    if (b.rows.cols != s.components.cols)
        throw ValueError("rows must have " + std::to_string(s.components.cols) + " columns, got " + std::to_string(b.rows.cols));
    if (b.rows.rows < 1) throw ValueError("rows holds no rows");
    if (b.at_once < 1) throw ValueError("at least one row is taken at once, got " + std::to_string(b.at_once));
    if (!std::isfinite(b.forget)) throw ValueError("forget must be finite");
}

} // namespace

std::int64_t svd_update_workspace(const SvdState &state, const SvdBlock &block, int device) {
    check_block(state, block);
    SvdState full = state; // of later cuts of the block
    if (block.rows.rows > block.at_once) full.rank = state.components.rows;
    return workspace(full, sizes(full, std::min(block.rows.rows, block.at_once)), device);
}

std::int64_t svd_update(const Context &context, const SvdState &state, const SvdBlock &block) {
    check_block(state, block);
    const Session s(context);
    Workspace work(context);
    const Blas blas(s, work);
    SvdState now = state;
    const int64_t count = block.rows.rows, n = block.rows.cols;
    dispatch_wide(block.rows.dtype, [&](auto tag) {
        using T = decltype(tag);
        const auto *rows = static_cast<const T *>(block.rows.data);
        if (count > block.at_once) // all of it is taken in or none
            launch<finite_check_kernel<T>>(s, "finite check",
                                           Shape{dim3(unsigned(divide_up<int64_t>(n, 256)), unsigned(std::min<int64_t>(count, 64))), dim3(256)}, rows,
                                           block.rows.row_stride, block.rows.col_stride, count, n, state.totals);
        for (int64_t begin = 0; begin < count; begin += block.at_once) {
            const int64_t some = std::min(block.at_once, count - begin);
            const Below<T> below{rows + begin * block.rows.row_stride, block.rows.row_stride, block.rows.col_stride, some, nullptr, nullptr, nullptr};
            now.rank = add<T>(s, blas, work, now, below, begin == 0 ? block.forget : 1.0, double(some), begin + some == count);
        }
    });
    return now.rank;
}

std::int64_t svd_merge_workspace(const SvdState &state, const SvdState &other, int device) {
    check_state(state, "the state");
    check_state(other, "the other state");
    return workspace(state, sizes(state, std::max<int64_t>(other.rank, 1)), device);
}

std::int64_t svd_merge(const Context &context, const SvdState &state, const SvdState &other) {
    check_state(state, "the state");
    check_state(other, "the other state");
    if (other.components.cols != state.components.cols)
        throw ValueError("the other state must have " + std::to_string(state.components.cols) + " columns, got " + std::to_string(other.components.cols));
    if ((other.mean == nullptr) != (state.mean == nullptr)) throw ValueError("both states must be centred, or none");
    if (other.rank == 0) return state.rank;
    const Session s(context);
    Workspace work(context);
    const Blas blas(s, work);
    const Below<double> below{
        static_cast<const double *>(other.components.data), other.components.row_stride, 1, other.rank, other.values, other.mean, other.totals};
    return add<double>(s, blas, work, state, below, 1.0, 0.0, true);
}

} // namespace subspan::cuda
