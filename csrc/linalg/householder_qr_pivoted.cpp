// QR with column pivoting: LAPACK chooses and reflects, and its reflections become factors as those of householder_qr.
#include "base/amax.hpp"
#include "subspan/blas.hpp"
#include "subspan/errors.hpp"
#include "subspan/householder_qr.hpp"
#include "subspan/parallel.hpp"
#include "linalg/wy.hpp"

#include <algorithm>
#include <limits>
#include <memory>
#include <string>
#include <vector>

namespace subspan {

using std::int64_t;

template <class T>
void householder_qr_pivoted(const StackView<const T> &a, const StackView<T> &v, const StackView<T> &r, const StackView<T> &tau, const StackView<T> &t,
                            int64_t *order) {
    const int64_t m = a.rows(), n = a.cols(), k = std::min(m, n), items = a.size(), block = std::min(k, kReflectionBlock);
    if (a.empty()) {
        for (int64_t i = 0; i < (n == 0 ? 0 : items * n); ++i) order[i] = i % n;
        return;
    }
    if (std::max(m, n) > std::numeric_limits<int>::max() / 66)
        throw ValueError("A is " + std::to_string(m) + " x " + std::to_string(n) + ", more than LP64 LAPACK can address");
    struct Job { // what an interrupt leaves behind
        std::vector<T> a, tau, work;
        std::vector<int> order;
        int info = 0;
    };
    for (int64_t item = 0; item < items; ++item) {
        const MatrixView<const T> from = a[item];
        if (!all_finite<T>(from)) throw ValueError("A holds NaN or infinity");
        const auto job = std::make_shared<Job>();
        job->a.resize(std::size_t(m * n));
        job->tau.resize(std::size_t(k));
        job->work.resize(std::size_t(3 * n + 1 + 64 * (n + 1)));
        job->order.assign(std::size_t(n), 0);
        for (int64_t j = 0; j < n; ++j)
            for (int64_t i = 0; i < m; ++i) job->a[std::size_t(j * m + i)] = from(i, j);
        run_stoppable(2.0 * double(m) * double(n) * double(k), [job, m, n] {
            int mi = int(m), ni = int(n), lwork = int(job->work.size());
            lapack<T>().geqp3(&mi, &ni, job->a.data(), &mi, job->order.data(), job->tau.data(), job->work.data(), &lwork, &job->info);
        });
        if (job->info != 0) throw LinAlgError("householder_qr: geqp3 failed");
        const MatrixView<T> vi = v[item], ri = r[item], ti = t[item];
        for (int64_t i = 0; i < k; ++i)
            for (int64_t j = 0; j < n; ++j) ri(i, j) = j < i ? T(0) : job->a[std::size_t(j * m + i)];
        for (int64_t i = 0; i < m; ++i)
            for (int64_t j = 0; j < k; ++j) vi(i, j) = i < j ? T(0) : i == j ? T(1) : job->a[std::size_t(j * m + i)];
        std::copy(job->tau.begin(), job->tau.end(), tau[item].data);
        for (int64_t j = 0; j < n; ++j) order[item * n + j] = job->order[std::size_t(j)] - 1;
        for (int64_t at = 0; at < k; at += block) {
            const int64_t w = std::min(block, k - at);
            T *to = &ti(at, 0);
            for (int64_t i = 0; i < w; ++i) std::fill_n(to + i * ti.row_stride, block, T(0));
            wy_products<T>(MatrixView<const T>(vi.block_rows(at, m - at).block_cols(at, w)), to, ti.row_stride);
            wy_triangle<T>(w, job->tau.data() + at, to, ti.row_stride);
        }
    }
}

template void householder_qr_pivoted<float>(const StackView<const float> &, const StackView<float> &, const StackView<float> &, const StackView<float> &,
                                            const StackView<float> &, int64_t *);
template void householder_qr_pivoted<double>(const StackView<const double> &, const StackView<double> &, const StackView<double> &, const StackView<double> &,
                                             const StackView<double> &, int64_t *);

} // namespace subspan
