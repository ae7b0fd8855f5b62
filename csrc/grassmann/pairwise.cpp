#include "subspan/grassmann_pairwise.hpp"

#include "base/blocking.hpp"
#include "base/scratch.hpp"
#include "subspan/eigh.hpp"
#include "subspan/errors.hpp"
#include "subspan/gemm.hpp"
#include "subspan/parallel.hpp"
#include "subspan/sizes.hpp"

#include <algorithm>
#include <cmath>
#include <mutex>
#include <type_traits>

namespace subspan {
namespace {

using std::int64_t;

// Bases by rows, one under the other: (N k) x n, contiguous.
template <class T> void by_rows(const StackView<const T> &u, T *to) {
    const int64_t n = u.rows(), k = u.cols();
    parallel_for(u.size(), [&](int64_t i) {
        const auto from = u[i];
        for (int64_t j = 0; j < k; ++j)
            for (int64_t r = 0; r < n; ++r) to[(i * k + j) * n + r] = from(r, j);
    });
}

} // namespace

template <class T>
std::vector<std::pair<int64_t, int64_t>> pairwise_distance(const StackView<const T> &u, const StackView<const T> &w, Distance kind, bool half,
                                                           MatrixView<T> out) {
    const int64_t n = u.rows(), k = u.cols(), l = w.cols(), rows = u.size(), cols = w.size(), angles = std::min(k, l);
    if (w.rows() != n) throw ValueError("U and W must live in one space");
    if (out.rows != rows || out.cols != cols) throw ValueError("out must have one entry for each pair");
    if (kind != Distance::chordal && kind != Distance::projection) throw ValueError("pairwise: chordal or projection");
    std::vector<std::pair<int64_t, int64_t>> close;
    if (rows == 0 || cols == 0) return close;
    if (angles == 0 || n == 0) {
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < cols; ++j) out(i, j) = T(0);
        return close;
    }
    Buffer<T> left(checked_product({rows, k, n}, "U")), right(half ? 0 : checked_product({cols, l, n}, "W"));
    by_rows(u, left.data());
    if (!half) by_rows(w, right.data());
    const T *other = half ? left.data() : right.data();
    const int64_t bi = std::max<int64_t>(1, blocking().square / k), bj = std::max<int64_t>(1, blocking().square / l);
    const int64_t ti = (rows + bi - 1) / bi, tj = (cols + bj - 1) / bj;
    // Of a difference of numbers near `angles`: below this square its root keeps fewer digits than 20 eps √angles.
    const double near = double(angles) / 400.0;
    std::mutex mutex;
    parallel_for(ti * tj, [&](int64_t t) {
        const int64_t i0 = t / tj * bi, i1 = std::min(rows, i0 + bi), j0 = t % tj * bj, j1 = std::min(cols, j0 + bj);
        if (half && j1 <= i0 + 1) return; // nothing above the diagonal
        Frame frame;
        const int64_t width = (j1 - j0) * l;
        T *p = frame.take<T>((i1 - i0) * k * width);
        gemm<T>(MatrixView<const T>(left.data() + i0 * k * n, (i1 - i0) * k, n), MatrixView<const T>(other + j0 * l * n, width, n).transposed(),
                MatrixView<T>(p, (i1 - i0) * k, width));
        double *g = frame.take<double>(angles * angles), *values = frame.take<double>(angles), *vectors = frame.take<double>(angles * angles);
        std::vector<std::pair<int64_t, int64_t>> mine;
        for (int64_t i = i0; i < i1; ++i)
            for (int64_t j = half ? std::max(j0, i + 1) : j0; j < j1; ++j) {
                const T *block = p + (i - i0) * k * width + (j - j0) * l;
                double square = 0;
                if (kind == Distance::chordal) {
                    double sum = 0;
                    for (int64_t a = 0; a < k; ++a)
                        for (int64_t b = 0; b < l; ++b) sum += double(block[a * width + b]) * double(block[a * width + b]);
                    square = double(angles) - sum;
                    if (!(square > near)) mine.emplace_back(i, j);
                } else {
                    // The smallest cosine: of the products of the shorter side.
                    const bool by_k = k <= l;
                    for (int64_t a = 0; a < angles; ++a)
                        for (int64_t b = 0; b <= a; ++b) {
                            double sum = 0;
                            for (int64_t c = 0; c < std::max(k, l); ++c)
                                sum += by_k ? double(block[a * width + c]) * double(block[b * width + c])
                                            : double(block[c * width + a]) * double(block[c * width + b]);
                            g[a * angles + b] = -sum; // the largest of the negative is the smallest
                        }
                    eigh_top<double>(angles, 1, g, values, vectors);
                    square = 1.0 + values[0];
                    if (!(square > 1.0 / 400.0)) mine.emplace_back(i, j);
                }
                const T d = T(std::sqrt(std::max(0.0, square)));
                out(i, j) = d;
                if (half) out(j, i) = d;
            }
        if (mine.empty()) return;
        const std::lock_guard<std::mutex> lock(mutex);
        close.insert(close.end(), mine.begin(), mine.end());
    });
    if (half)
        for (int64_t i = 0; i < rows; ++i) out(i, i) = T(0);
    std::sort(close.begin(), close.end());
    return close;
}

template std::vector<std::pair<int64_t, int64_t>> pairwise_distance<float>(const StackView<const float> &, const StackView<const float> &, Distance, bool,
                                                                           MatrixView<float>);
template std::vector<std::pair<int64_t, int64_t>> pairwise_distance<double>(const StackView<const double> &, const StackView<const double> &, Distance, bool,
                                                                            MatrixView<double>);

} // namespace subspan
