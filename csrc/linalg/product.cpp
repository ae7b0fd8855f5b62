#include "subspan/product.hpp"

#include "subspan/errors.hpp"
#include "subspan/gemm.hpp"
#include "subspan/parallel.hpp"

#include <algorithm>

namespace subspan {

using std::int64_t;

template <class T> void product(const StackView<const T> &a, const StackView<const T> &b, const StackView<T> &out) {
    if (a.cols() != b.rows() || out.rows() != a.rows() || out.cols() != b.cols()) throw ValueError("product: shapes do not fit");
    if (out.first.col_stride != 1 && out.cols() > 1) throw ValueError("out must have contiguous rows");
    const auto run = [&](int64_t i) { gemm<T>(a[i], b[i], out[i]); };
    const int64_t items = out.size();
    if (items == 1) return run(0);
    parallel_for(items, run);
}

template <class T> void outer_product(const StackView<const T> &a, const StackView<T> &out) {
    const int64_t n = a.rows(), k = a.cols();
    if (out.rows() != n || out.cols() != n) throw ValueError("out must be n x n");
    // Columns [0, first + rows) of each strip of rows, and what is above the diagonal from below it.
    const auto one = [&](int64_t i) {
        constexpr int64_t strip = 128, tile = 32;
        const auto x = a[i];
        const auto y = out[i];
        for (int64_t first = 0; first < n; first += strip) {
            const int64_t rows = std::min(strip, n - first);
            const auto to = y.block_rows(first, rows).block_cols(0, first + rows);
            gemm<T>(x.block_rows(first, rows), x.block_rows(0, first + rows).transposed(), to);
        }
        parallel_for((n + tile - 1) / tile, [&](int64_t t) {
            const int64_t p0 = t * tile, p1 = std::min(n, p0 + tile);
            for (int64_t q0 = 0; q0 < p1; q0 += tile)
                for (int64_t q = q0; q < std::min(p1, q0 + tile); ++q)
                    for (int64_t p = std::max(p0, q + 1); p < p1; ++p) y(q, p) = y(p, q);
        });
    };
    if (out.size() >= 2 * num_threads() && double(n) * double(n) * double(k) < 3e7)
        parallel_for(out.size(), one);
    else
        for (int64_t i = 0; i < out.size(); ++i) one(i);
}

#define SUBSPAN_INSTANTIATE(T)                                                                                                                                 \
    template void product<T>(const StackView<const T> &, const StackView<const T> &, const StackView<T> &);                                                    \
    template void outer_product<T>(const StackView<const T> &, const StackView<T> &);
SUBSPAN_INSTANTIATE(float)
SUBSPAN_INSTANTIATE(double)
#undef SUBSPAN_INSTANTIATE

} // namespace subspan
