// Blocks with more rows than columns, and streams of few columns: everything is reduced to n columns first.
//
// For float the Gram matrix in double squares nothing that matters: it holds singular values down to 1e-8 of the first, and
// costs half of a QR. For double the block goes through QR, by pieces whose factors are merged in a tree, so that a factor is
// rounded log times and not once a piece; then the state takes in the factor.
#include "svd/streaming_impl.hpp"
#include "subspan/eigh.hpp"
#include "subspan/factor.hpp"
#include "subspan/gemm.hpp"
#include "subspan/householder_qr.hpp"
#include "subspan/parallel.hpp"

#include <algorithm>

namespace subspan {
namespace {

constexpr std::int64_t kRows = 512;  // rows that are squared together
constexpr std::int64_t kBlock = 256; // columns of a tile of the Gram matrix
constexpr std::int64_t kParts = 16;  // at most, of rows; depends on the shape alone, never on threads

// Upper triangular R (n x n, row-major, zeros below) of the QR factors of rows (m x n, row-major), and more rows below them. Ours
// and not LAPACK's: a BLAS library would wake its threads for each of thousands of short products.
std::vector<double> triangle(std::int64_t n, const double *rows, std::int64_t m, const double *more = nullptr, std::int64_t m2 = 0) {
    const std::int64_t all = m + m2, k = std::min(all, n);
    Frame frame;
    if (m2 > 0) {
        double *both = frame.take<double>(all * n);
        std::copy_n(rows, m * n, both);
        std::copy_n(more, m2 * n, both + m * n);
        rows = both;
    }
    std::vector<double> out(std::size_t(n * n), 0.0);
    const MatrixView<double> v(frame.take<double>(all * k), all, k), r(out.data(), k, n), tau(frame.take<double>(k), 1, k);
    const std::int64_t width = std::min(k, kReflectionBlock);
    const MatrixView<double> t(frame.take<double>(k * width), k, width);
    householder_qr<double>(StackView<const double>(MatrixView<const double>(rows, all, n)), v, r, tau, t);
    return out;
}
std::vector<double> merged(std::int64_t n, const std::vector<double> &a, const std::vector<double> &b) { return triangle(n, a.data(), n, b.data(), n); }

} // namespace

template <class T> void StreamingSvd<T>::Impl::tall(Work &w) {
    if (std::is_same_v<T, float>)
        tall_gram(w);
    else
        tall_qr(w);
}

template <class T> void StreamingSvd<T>::Impl::tall_rows(const Work &w, std::int64_t first, std::int64_t count, double *dst) const {
    const std::int64_t old = std::clamp<std::int64_t>(w.r - first, 0, count), fresh = count - old;
    for (std::int64_t i = 0; i < old; ++i)
        for (std::int64_t j = 0; j < n; ++j) {
            const std::int64_t at = (first + i) * n + j;
            dst[i * n + j] = w.scale[std::size_t(first + i)] * (double(v.data()[at]) + double(low.data()[at]));
        }
    if (fresh == 0) return;
    if constexpr (std::is_same_v<T, double>) {
        part(w.rows, first + old - w.r, fresh, dst + old * n, w.unit);
    } else {
        Frame frame;
        T *rows = frame.take<T>(fresh * n);
        part(w.rows, first + old - w.r, fresh, rows, w.unit);
        std::copy_n(rows, fresh * n, dst + old * n);
    }
}

template <class T> bool StreamingSvd<T>::Impl::tall_again(Work &w, double total) {
    if (w.unit != 1.0 || (total > 1e-250 && total < 1e250)) return false;
    // Out of range, not finite, or all zero: again in units of the largest entry.
    require_finite(w.rows, "rows");
    Frame frame;
    T *rows = frame.take<T>(kRows * n);
    double largest = 0;
    for (std::int64_t i = 0; i < w.r; ++i) largest = std::max(largest, w.scale[std::size_t(i)]);
    for (std::int64_t i0 = 0; i0 < w.b; i0 += kRows) {
        const std::int64_t take = std::min(kRows, w.b - i0);
        part(w.rows, i0, take, rows, 1.0);
        for (std::int64_t i = 0; i < take * n; ++i) largest = std::max(largest, double(std::abs(rows[i])));
    }
    if (!(largest > 0.0)) return false;
    if (!std::isfinite(largest)) throw ValueError("rows: centring or weights overflow; scale the data");
    in_units(w, largest);
    tall(w);
    return true;
}

template <class T> void StreamingSvd<T>::Impl::tall_gram(Work &w) {
    Frame frame;
    const std::int64_t k = std::min(keep, n), m = w.m;
    double *h = frame.take<double>(n * n), *sigma = frame.take<double>(k), *y = frame.take<double>(k * n);
    std::fill_n(h, n * n, 0.0);
    if (n <= kBlock) {
        // Parts of the rows, each with a sum of its own.
        const std::int64_t length = std::max(kRows, (m + kParts - 1) / kParts), parts = (m + length - 1) / length;
        double *sums = frame.zeros<double>(parts * n * n);
        parallel_for(parts, [&](std::int64_t t) {
            Frame own;
            double *rows = own.take<double>(kRows * n), *g = own.take<double>(n * n), *sum = sums + t * n * n;
            const std::int64_t end = std::min(m, (t + 1) * length);
            for (std::int64_t i = t * length; i < end; i += kRows) {
                const std::int64_t count = std::min(kRows, end - i);
                tall_rows(w, i, count, rows);
                gram(RowBlocks<double>(count).add(MatrixView<const double>(rows, count, n).transposed()), 0, g);
                for (std::int64_t a = 0; a < n; ++a)
                    for (std::int64_t b = 0; b <= a; ++b) sum[a * n + b] += g[a * n + b];
            }
        });
        for (std::int64_t t = 0; t < parts; ++t)
            for (std::int64_t i = 0; i < n * n; ++i) h[i] += sums[t * n * n + i];
    } else {
        // Tiles of the lower triangle.
        double *rows = frame.take<double>(kRows * n);
        const std::int64_t blocks = (n + kBlock - 1) / kBlock;
        for (std::int64_t i = 0; i < m; i += kRows) {
            const std::int64_t count = std::min(kRows, m - i);
            tall_rows(w, i, count, rows);
            const MatrixView<const double> x(rows, count, n);
            parallel_for(blocks * (blocks + 1) / 2, [&](std::int64_t t) {
                std::int64_t a = 0;
                while ((a + 1) * (a + 2) / 2 <= t) ++a;
                const std::int64_t b = t - a * (a + 1) / 2, na = std::min(kBlock, n - a * kBlock), nb = std::min(kBlock, n - b * kBlock);
                gemm<double>(x.block_cols(a * kBlock, na).transposed(), x.block_cols(b * kBlock, nb),
                             MatrixView<double>(h + a * kBlock * n + b * kBlock, na, nb, n, 1), true);
            });
        }
    }
    double total = 0;
    for (std::int64_t i = 0; i < n; ++i) total += h[i * n + i];
    if (tall_again(w, total)) return;
    if (!(total > 0.0)) {
        commit_nothing(w);
        return;
    }
    eigh_top<double>(n, k, h, sigma, y);
    const Selected sel = select(sigma, k, total, w.dropped);
    require_representable(w, sigma, sel.rank);
    std::vector<double> out(static_cast<std::size_t>(sel.rank));
    for (std::int64_t i = 0; i < sel.rank; ++i) out[std::size_t(i)] = std::sqrt(sigma[i]);
    tall_commit(w, std::move(out), y, sel.dropped);
}

template <class T> void StreamingSvd<T>::Impl::tall_commit(const Work &w, std::vector<double> &&sigma, double *y, double left_out) {
    Frame frame;
    const auto kept = std::int64_t(sigma.size());
    T *rounded = frame.take<T>(kept * n), *overlap = frame.take<T>(kept * w.r);
    std::transform(y, y + kept * n, rounded, [](double x) { return T(x); });
    gemm<T>(MatrixView<const T>(rounded, kept, n), MatrixView<const T>(v.data(), w.r, n).transposed(), MatrixView<T>(overlap, kept, w.r));
    for (std::int64_t i = 0; i < kept; ++i) {
        const Closest old = closest(w.r, [&](std::int64_t j) { return double(overlap[i * w.r + j]); });
        for (std::int64_t q = 0; q < n; ++q) y[i * n + q] *= old.sign;
    }
    set_basis(kept, y);
    route = "tall";
    commit(w, std::move(sigma), w.r == 0, left_out);
}

template <class T> void StreamingSvd<T>::Impl::tall_qr(Work &w) {
    Frame frame;
    const std::int64_t k = std::min(keep, n), piece = std::max(2 * n, std::min<std::int64_t>(8 * n, 2048));
    double *rows = frame.take<double>(std::max(std::min(piece, w.b), w.r) * n);
    std::vector<std::vector<double>> levels; // factors of 2^l pieces; empty: none
    double total = 0;
    for (std::int64_t i = 0; i < w.b; i += piece) {
        const std::int64_t count = std::min(piece, w.b - i);
        tall_rows(w, w.r + i, count, rows);
        for (std::int64_t j = 0; j < count * n; ++j) total += rows[j] * rows[j];
        if (!std::isfinite(total)) break; // again in other units
        std::vector<double> r = triangle(n, rows, count);
        std::size_t level = 0;
        for (; level < levels.size() && !levels[level].empty(); ++level) {
            r = merged(n, levels[level], r);
            levels[level].clear();
        }
        if (level == levels.size()) levels.emplace_back();
        levels[level] = std::move(r);
    }
    tall_rows(w, 0, w.r, rows);
    for (std::int64_t j = 0; j < w.r * n; ++j) total += rows[j] * rows[j];
    if (tall_again(w, total)) return;
    std::vector<double> block;
    for (auto &r : levels)
        if (!r.empty()) block = block.empty() ? std::move(r) : merged(n, r, block);
    double *sigma = frame.take<double>(k), *y = frame.take<double>(k * n);
    if (w.r > 0 && opt.method != SvdMethod::robust) {
        // While the spectrum allows squares: what the state was turned by, so that it is not rounded (streaming_basis.cpp).
        const std::int64_t m = w.r + n;
        double *h = frame.take<double>(n * n), *u = frame.take<double>(k * m);
        RowBlocks<double> columns(m);
        double *all = frame.take<double>(m * n);
        std::copy_n(rows, w.r * n, all);
        std::copy_n(block.data(), n * n, all + w.r * n);
        const MatrixView<const double> a(all, m, n);
        gram(columns.add(a.transposed()), 0, h);
        eigh_top<double>(n, k, h, sigma, y);
        const Selected sel = select(sigma, k, total, w.dropped);
        if (sel.rank == k && sigma[k - 1] * kSpread * kSpread >= sigma[0]) {
            // U = A Yᵀ / s, and V' = Uᵀ A / s: rows of A are s_j v_j and those of the factor.
            gemm<double>(MatrixView<const double>(y, k, n), a.transposed(), MatrixView<double>(u, k, m));
            require_representable(w, sigma, k);
            T *rot = frame.take<T>(k * m);
            auto *partner = frame.take<std::int64_t>(k);
            std::vector<double> out(static_cast<std::size_t>(k)), scale(w.scale.begin(), w.scale.begin() + w.r);
            scale.resize(std::size_t(m), 1.0);
            for (std::int64_t i = 0; i < k; ++i) {
                out[std::size_t(i)] = std::sqrt(sigma[i]);
                double length = 0;
                for (std::int64_t j = 0; j < m; ++j) length += u[i * m + j] * u[i * m + j];
                length = std::sqrt(length);
                for (std::int64_t j = 0; j < m; ++j) u[i * m + j] /= length;
                relative(m, u + i * m, scale.data(), out[std::size_t(i)], closest(w.r, [&](std::int64_t j) { return u[i * m + j] / scale[std::size_t(j)]; }),
                         partner + i, rot + i * m);
            }
            if constexpr (std::is_same_v<T, double>) {
                RowBlocks<double> p(n);
                p.add(MatrixView<const double>(v.data(), w.r, n)).add(MatrixView<const double>(block.data(), n, n));
                rotate(k, partner, rot, p);
            }
            route = "tall";
            commit(w, std::move(out), false, sel.dropped);
            return;
        }
    }
    if constexpr (std::is_same_v<T, double>) {
        if (w.r > 0) { // as any block of n rows
            Rows<T> factor;
            factor.dense = MatrixView<const T>(block.data(), n, n);
            Work few = w;
            few.rows = factor;
            few.b = n;
            few.m = w.r + n;
            few.scale.resize(std::size_t(w.r));
            few.scale.resize(std::size_t(few.m), 1.0);
            double *g = frame.take<double>(few.m * few.m);
            few.g = g;
            gram(blocks(w.r, factor), 0, g);
            if (robust(few, factor)) {
                route = "tall";
                return;
            }
        }
    }
    const std::vector<double> factor = w.r > 0 ? triangle(n, rows, w.r, block.data(), n) : std::move(block);
    inner_svd(n, n, factor.data(), k, sigma, y);
    for (std::int64_t i = 0; i < k; ++i) sigma[i] *= sigma[i];
    const Selected sel = select(sigma, k, total, w.dropped);
    require_representable(w, sigma, sel.rank);
    std::vector<double> out(static_cast<std::size_t>(sel.rank));
    for (std::int64_t i = 0; i < sel.rank; ++i) out[std::size_t(i)] = std::sqrt(sigma[i]);
    tall_commit(w, std::move(out), y, sel.dropped);
}

template <class T> void StreamingSvd<T>::Impl::part(const Rows<T> &x, std::int64_t first, std::int64_t count, T *dst, double unit) {
    Rows<T> p = x;
    CsrView<T> csr;
    const std::int64_t b = x.count(), from_block = std::min(count, b - first);
    if (x.csr != nullptr) {
        csr = slice_rows(*x.csr, first, from_block);
        p.csr = &csr;
    } else {
        p.dense = x.dense.block_rows(first, from_block);
    }
    if (x.weight != nullptr) p.weight = x.weight + first;
    p.extra = nullptr;
    materialise(p, dst);
    if (from_block < count) std::copy_n(x.extra, x.cols(), dst + from_block * x.cols());
    if (unit != 1.0) {
        int e = 0;
        std::frexp(unit, &e);
        for (std::int64_t i = 0; i < count * x.cols(); ++i) dst[i] = std::ldexp(dst[i], 1 - e);
    }
}

template struct StreamingSvd<float>::Impl;
template struct StreamingSvd<double>::Impl;

} // namespace subspan
