#include "subspan/gram_core.hpp"

#include "linalg/int4.hpp"
#include "base/amax.hpp"
#include "base/scratch.hpp"
#include "subspan/errors.hpp"
#include "subspan/factor.hpp"
#include "subspan/gemm.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

namespace subspan {

template <class T> double gram_core(const Basis<T> &v, std::int64_t item, MatrixView<T> m) {
    const std::int64_t n = v.rows(), k = v.cols();
    if (k == 0) return 1;
    Frame frame;
    if (v.packed == nullptr) {
        const double largest = double(max_abs<T>(v.dense[item]));
        if (!std::isfinite(largest)) throw ValueError(std::string(v.name) + " holds NaN or infinity");
        if (largest > 1e100) return std::numeric_limits<double>::infinity();
    }
    double *g = frame.zeros<double>(k * k), *part = frame.take<double>(k * k), *scale = frame.take<double>(k);
    constexpr std::int64_t kBlock = 512;
    double *rows = frame.take<double>(kBlock * k);
    T *unpacked = v.packed != nullptr ? frame.take<T>(kBlock * k) : nullptr;
    for (std::int64_t r = 0; r < n; r += kBlock) {
        const std::int64_t count = std::min(kBlock, n - r);
        MatrixView<const T> x;
        if (v.packed != nullptr) {
            unpack_int4<T, 16>(*v.packed, r, count, 0, k, unpacked, k);
            x = {unpacked, count, k};
        } else {
            x = v.dense[item].block_rows(r, count);
        }
        for (std::int64_t i = 0; i < count; ++i)
            for (std::int64_t j = 0; j < k; ++j) rows[i * k + j] = double(x(i, j));
        RowBlocks<double> blocks(count);
        blocks.add(MatrixView<const double>(rows, count, k).transposed());
        gram(blocks, 0, part);
        for (std::int64_t i = 0; i < k; ++i)
            for (std::int64_t j = 0; j <= i; ++j) g[i * k + j] += part[i * k + j];
    }
    double top = 0;
    for (std::int64_t i = 0; i < k; ++i) top = std::max(top, g[i * k + i]);
    if (!std::isfinite(top)) throw ValueError(std::string(v.name) + " holds NaN or infinity, or squares of its entries overflow");
    // Lengths far from one would leave T in M, or their squares double: an orthonormal basis is the way then.
    for (std::int64_t i = 0; i < k; ++i)
        if (!(g[i * k + i] > 1e-12 && g[i * k + i] < 1e12)) return std::numeric_limits<double>::infinity();
    // Columns of unit length: their span, and so the projector, is the same.
    for (std::int64_t i = 0; i < k; ++i) scale[i] = 1.0 / std::sqrt(g[i * k + i]);
    for (std::int64_t i = 0; i < k; ++i)
        for (std::int64_t j = 0; j <= i; ++j) g[i * k + j] = g[j * k + i] = i == j ? 1.0 : g[i * k + j] * scale[i] * scale[j];
    const double floor = 16.0 * double(k) * std::numeric_limits<double>::epsilon();
    double *l = frame.take<double>(k * k), *inverse = frame.take<double>(k * k), *out = frame.take<double>(k * k);
    std::copy_n(g, k * k, l);
    // Dependent columns, or nearly so, are no work for a Gram matrix: it cannot tell directions below the root of eps.
    if (cholesky(k, l, floor) > 0) return std::numeric_limits<double>::infinity();
    invert_lower(k, l, inverse);
    const MatrixView<const double> li(inverse, k, k);
    gemm<double>(li.transposed(), li, MatrixView<double>(out, k, k));
    double worst = 0, largest_sum = 0;
    for (std::int64_t i = 0; i < k; ++i) {
        double of_inverse = 0, of_gram = 0;
        for (std::int64_t j = 0; j < k; ++j) {
            of_inverse += std::abs(out[i * k + j]);
            of_gram += std::abs(g[i * k + j]);
        }
        worst = std::max(worst, of_inverse);
        largest_sum = std::max(largest_sum, of_gram);
    }
    const double condition = worst * largest_sum;
    for (std::int64_t i = 0; i < k; ++i)
        for (std::int64_t j = 0; j < k; ++j) m(i, j) = T(out[i * k + j] * scale[i] * scale[j]);
    return condition;
}

template double gram_core<float>(const Basis<float> &, std::int64_t, MatrixView<float>);
template double gram_core<double>(const Basis<double> &, std::int64_t, MatrixView<double>);

} // namespace subspan
