// The triangular factor T of H_1 ... H_k = I - V T Vᵀ.
#pragma once

#include "base/scratch.hpp"
#include "linalg/narrow.hpp"
#include "subspan/gemm.hpp"
#include "subspan/views.hpp"

#include <algorithm>
#include <cstdint>

namespace subspan {

/// T from tau and the strict upper triangle of S = VᵀV, in place: `s` is k x k with rows of stride ld and becomes T,
/// with zeros below the diagonal. Recursive: T12 = -T1 S12 T2, so that all but the smallest blocks are products.
template <class T> void wy_triangle(std::int64_t k, const T *tau, T *s, std::int64_t ld) {
    constexpr std::int64_t kBase = 24;
    if (k <= kBase) {
        for (std::int64_t j = 0; j < k; ++j) {
            double column[kBase];
            for (std::int64_t i = 0; i < j; ++i) column[i] = double(s[i * ld + j]);
            for (std::int64_t i = 0; i < j; ++i) {
                double x = 0;
                for (std::int64_t c = i; c < j; ++c) x += double(s[i * ld + c]) * column[c];
                s[i * ld + j] = T(-double(tau[j]) * x);
            }
            s[j * ld + j] = tau[j];
            for (std::int64_t i = j + 1; i < k; ++i) s[i * ld + j] = T(0);
        }
        return;
    }
    const std::int64_t h = (k / 2 + 7) / 8 * 8, rest = k - h;
    T *s12 = s + h, *s22 = s + h * ld + h;
    wy_triangle(h, tau, s, ld);
    wy_triangle(rest, tau + h, s22, ld);
    Frame frame;
    T *x = frame.take<T>(h * rest);
    gemm<T>(MatrixView<const T>(s, h, h, ld, 1), MatrixView<const T>(s12, h, rest, ld, 1), MatrixView<T>(x, h, rest));
    for (std::int64_t i = 0; i < h * rest; ++i) x[i] = -x[i];
    gemm<T>(MatrixView<const T>(x, h, rest), MatrixView<const T>(s22, rest, rest, ld, 1), MatrixView<T>(s12, h, rest, ld, 1));
    for (std::int64_t i = 0; i < rest; ++i) std::fill_n(s + (h + i) * ld, h, T(0));
}

/// Strict upper triangle of VᵀV (m x k, any strides) into the rows of s, k x k with stride ld.
template <class T> void wy_products(MatrixView<const T> v, T *s, std::int64_t ld) {
    const std::int64_t k = v.cols;
    Frame frame;
    constexpr std::int64_t kStep = 256;
    if (k == 0) return;
    if (k <= 8 && v.col_stride == 1) {
        double g[64];
        simd::dispatch<simd::NarrowGram, const MatrixView<const T> *, double *>(&v, g);
        for (std::int64_t i = 0; i < k; ++i)
            for (std::int64_t j = i + 1; j < k; ++j) s[i * ld + j] = T(g[i * k + j]);
        return;
    }
    if (k <= kStep) {
        double *g = frame.take<double>(k * k);
        RowBlocks<T> p(v.rows);
        p.add(v.transposed());
        gram(p, 0, g);
        for (std::int64_t i = 0; i < k; ++i)
            for (std::int64_t j = i + 1; j < k; ++j) s[i * ld + j] = T(g[j * k + i]);
        return;
    }
    for (std::int64_t i = 0; i < k; i += kStep) { // block rows: half of the products of a full square
        const std::int64_t rows = std::min(kStep, k - i);
        T *block = s + i * ld + i;
        gemm<T>(v.block_cols(i, rows).transposed(), v.block_cols(i, k - i), MatrixView<T>(block, rows, k - i, ld, 1));
        for (std::int64_t r = 0; r < rows; ++r) std::fill_n(block + r * ld, r + 1, T(0));
    }
}

} // namespace subspan
