#include "subspan/gram_core.hpp"

#include "int4.hpp"
#include "scan.hpp"
#include "scratch.hpp"
#include "subspan/errors.hpp"
#include "subspan/factor.hpp"
#include "subspan/panel.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace subspan {

template <class T> double gram_core(const Basis<T> &v, std::int64_t item, MatrixView<T> m) {
    const std::int64_t n = v.rows(), k = v.cols();
    if (k == 0) return 1;
    Frame frame;
    if (v.packed == nullptr) {
        const double largest = double(max_abs<T>(v.dense[item]));
        if (!std::isfinite(largest)) throw ValueError("V holds NaN or infinity");
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
        Panel<double> panel(count);
        panel.add(MatrixView<const double>(rows, count, k).transposed());
        gram(panel, 0, part);
        for (std::int64_t i = 0; i < k; ++i)
            for (std::int64_t j = 0; j <= i; ++j) g[i * k + j] += part[i * k + j];
    }
    double top = 0;
    for (std::int64_t i = 0; i < k; ++i) top = std::max(top, g[i * k + i]);
    if (!std::isfinite(top)) throw ValueError("V holds NaN or infinity, or squares of its entries overflow");
    // Lengths far from one would leave T in M, or their squares double: an orthonormal basis is the way then.
    for (std::int64_t i = 0; i < k; ++i)
        if (!(g[i * k + i] == 0.0 || (g[i * k + i] > 1e-12 && g[i * k + i] < 1e12))) return std::numeric_limits<double>::infinity();
    for (std::int64_t i = 0; i < k && v.packed == nullptr; ++i)
        if (g[i * k + i] == 0.0 && max_abs<T>(v.dense[item].block_cols(i, 1)) > T(0)) return std::numeric_limits<double>::infinity();
    // Columns of unit length: their span, and so the projector, is the same. Zero columns are left out.
    for (std::int64_t i = 0; i < k; ++i)
        scale[i] = g[i * k + i] > std::numeric_limits<double>::min() ? 1.0 / std::sqrt(g[i * k + i]) : 0.0;
    for (std::int64_t i = 0; i < k; ++i)
        for (std::int64_t j = 0; j <= i; ++j) g[i * k + j] = g[j * k + i] = i == j && scale[i] > 0 ? 1.0 : g[i * k + j] * scale[i] * scale[j];
    const double floor = 16.0 * double(k) * std::numeric_limits<double>::epsilon();
    double *l = frame.take<double>(k * k), *inverse = frame.take<double>(k * k), *out = frame.take<double>(k * k);
    std::copy_n(g, k * k, l);
    double condition = 0;
    if (cholesky(k, l, floor) == 0) {
        invert_lower(k, l, inverse);
        const MatrixView<const double> li(inverse, k, k);
        gemm<double>(li.transposed(), li, MatrixView<double>(out, k, k));
        double worst = 0;
        for (std::int64_t i = 0; i < k; ++i) {
            double a = 0, b = 0;
            for (std::int64_t j = 0; j < k; ++j) {
                a += std::abs(out[i * k + j]);
                b += std::abs(g[i * k + j]);
            }
            worst = std::max(worst, a);
            condition = std::max(condition, b);
        }
        condition *= worst;
    } else {
        double *s = frame.take<double>(k), *u = frame.take<double>(k * k), *vt = frame.take<double>(k * k);
        small_svd(k, k, g, s, u, vt);
        std::fill_n(out, k * k, 0.0);
        for (std::int64_t p = 0; p < k && s[p] > floor * s[0] && s[p] > 0; ++p) {
            condition = s[0] / s[p];
            for (std::int64_t i = 0; i < k; ++i)
                for (std::int64_t j = 0; j < k; ++j) out[i * k + j] += vt[p * k + i] * vt[p * k + j] / s[p];
        }
    }
    for (std::int64_t i = 0; i < k; ++i)
        for (std::int64_t j = 0; j < k; ++j) m(i, j) = T(out[i * k + j] * scale[i] * scale[j]);
    return condition;
}

template double gram_core<float>(const Basis<float> &, std::int64_t, MatrixView<float>);
template double gram_core<double>(const Basis<double> &, std::int64_t, MatrixView<double>);

} // namespace subspan
