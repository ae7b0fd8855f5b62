// The routes that square nothing that matters; streaming_gram.cpp says when each is taken.
#include "streaming_impl.hpp"
#include "subspan/blas.hpp"
#include "subspan/eigh.hpp"
#include "subspan/factor.hpp"
#include "subspan/panel.hpp"

#include <algorithm>

namespace subspan {

template <class T> bool StreamingSvd<T>::Impl::robust(Work &w, const Rows<T> &dense) {
    if (w.r == 0) return false;
    Frame frame;
    const std::int64_t rr = w.r, b = w.b, m = w.m, k = std::min(keep, std::min(m, n));
    // V = L_M V̂ with V̂ orthonormal; C' = C L_M^-T are the coordinates of the block in V̂.
    double *lm = frame.take<double>(rr * rr), *lmi = frame.take<double>(rr * rr);
    for (std::int64_t i = 0; i < rr; ++i) std::copy_n(w.g + i * m, i + 1, lm + i * rr);
    if (cholesky(rr, lm, 0.0) > 0) return false;
    invert_lower(rr, lm, lmi);
    const MatrixView<const double> lmi_v(lmi, rr, rr);
    double *c = frame.take<double>(b * rr), *c1 = frame.take<double>(b * rr), *back = frame.take<double>(b * rr);
    for (std::int64_t i = 0; i < b; ++i)
        for (std::int64_t j = 0; j < rr; ++j) c[i * rr + j] = w.g[(rr + i) * m + j] * w.scale[std::size_t(rr + i)];
    gemm<double>(MatrixView<const double>(c, b, rr), lmi_v.transposed(), MatrixView<double>(c1, b, rr));
    gemm<double>(MatrixView<const double>(c1, b, rr), lmi_v, MatrixView<double>(back, b, rr));

    // R = B - (C M^-1) V
    Buffer<T> residual(b * n);
    materialise(dense, residual.data());
    T *neg = frame.take<T>(b * rr);
    for (std::int64_t i = 0; i < b * rr; ++i) neg[i] = T(-back[i]);
    const MatrixView<const T> vv(v.data(), rr, n);
    combine(neg, Panel<T>(n).add(vv), MatrixView<T>(residual.data(), b, n), true);

    // Second pass: what of R is still along V, and R Rᵀ.
    Panel<T> p(n);
    p.add(vv).add(MatrixView<const T>(residual.data(), b, n));
    double *g2 = frame.take<double>(m * m);
    gram(p, rr, g2);
    double *c2 = frame.take<double>(b * rr);
    for (std::int64_t i = 0; i < b; ++i) std::copy_n(g2 + (rr + i) * m, rr, c + i * rr);
    gemm<double>(MatrixView<const double>(c, b, rr), lmi_v.transposed(), MatrixView<double>(c2, b, rr));
    // R Rᵀ without what the second pass takes off, and a bound of its norm: the largest row sum.
    double *gr = frame.take<double>(b * b), *cc = frame.take<double>(b * b);
    gram(Panel<double>(rr).add(MatrixView<const double>(c2, b, rr)), 0, cc);
    double norm_r = 0, largest_r = 0;
    for (std::int64_t i = 0; i < b; ++i)
        for (std::int64_t j = 0; j <= i; ++j)
            gr[i * b + j] = gr[j * b + i] = g2[(rr + i) * m + rr + j] - cc[i * b + j];
    for (std::int64_t i = 0; i < b; ++i) {
        double sum = 0;
        for (std::int64_t j = 0; j < b; ++j) sum += std::abs(gr[i * b + j]);
        norm_r = std::max(norm_r, sum);
        largest_r = std::max(largest_r, g2[(rr + i) * m + rr + i]);
    }
    if (!std::isfinite(norm_r)) return false;
    // R = L Q for the rows that have a direction of their own; pivoting leaves out what rounding alone made.
    double *l = frame.take<double>(b * b), left = 0;
    auto *order = frame.take<std::int64_t>(b);
    const std::int64_t q = pivoted_cholesky(b, gr, 4.0 * eps * largest_r, l, order, &left), mq = rr + q;
    double *lead = frame.take<double>(q * q), *lri = frame.take<double>(q * q);
    for (std::int64_t i = 0; i < q; ++i) std::copy_n(l + i * b, q, lead + i * q);
    invert_lower(q, lead, lri);

    const std::int64_t kq = std::min(k, mq);
    double *core = frame.zeros<double>(m * mq), *sigma = frame.take<double>(kq), *y = frame.take<double>(kq * mq);
    for (std::int64_t i = 0; i < rr; ++i)
        for (std::int64_t j = 0; j <= i; ++j) core[i * mq + j] = w.scale[std::size_t(i)] * lm[i * rr + j];
    for (std::int64_t i = 0; i < b; ++i) {
        // Rows in the order of the pivots.
        for (std::int64_t j = 0; j < rr; ++j) core[(rr + i) * mq + j] = c1[order[i] * rr + j] + c2[order[i] * rr + j];
        std::copy_n(l + i * b, q, core + (rr + i) * mq + rr);
    }
    double total = 0;
    for (std::int64_t i = 0; i < m * mq; ++i) total += core[i] * core[i];
    core_svd(m, mq, core, kq, sigma, y);
    for (std::int64_t i = 0; i < kq; ++i) sigma[i] *= sigma[i];
    const Selected sel = select(sigma, kq, total, w.dropped);
    if (sel.rank == 0) {
        commit_nothing(w);
        return true;
    }
    if (norm_r > kResidualMargin * sigma[sel.rank - 1]) return false;
    // With room for more components, what was left out of R must be rounding, not a small component.
    if (sel.rank < k && left * double(b) > kDrop * kDrop * eps * eps * sigma[0]) return false;

    // V' = Y1 V̂ + Y2 L_R^-1 (R - C2' V̂), with V̂ = L_M^-1 V.
    const std::int64_t kept = sel.rank;
    double *z2 = frame.take<double>(kept * q), *z1 = frame.take<double>(kept * rr), *t1 = frame.take<double>(kept * rr);
    double *c2q = frame.take<double>(q * rr);
    for (std::int64_t i = 0; i < q; ++i) std::copy_n(c2 + order[i] * rr, rr, c2q + i * rr);
    const MatrixView<const double> y2(y + rr, kept, q, mq, 1);
    gemm<double>(y2, MatrixView<const double>(lri, q, q), MatrixView<double>(z2, kept, q));
    gemm<double>(MatrixView<const double>(z2, kept, q), MatrixView<const double>(c2q, q, rr),
                 MatrixView<double>(t1, kept, rr));
    for (std::int64_t i = 0; i < kept; ++i)
        for (std::int64_t j = 0; j < rr; ++j) t1[i * rr + j] = y[i * mq + j] - t1[i * rr + j];
    gemm<double>(MatrixView<const double>(t1, kept, rr), lmi_v, MatrixView<double>(z1, kept, rr));
    T *rot = frame.zeros<T>(kept * m);
    std::vector<double> out(static_cast<std::size_t>(kept));
    for (std::int64_t i = 0; i < kept; ++i) {
        out[std::size_t(i)] = std::sqrt(sigma[i]);
        const double sign = closest_sign(rr, [&](std::int64_t j) { return y[i * mq + j]; });
        for (std::int64_t j = 0; j < rr; ++j) rot[i * m + j] = T(sign * z1[i * rr + j]);
        for (std::int64_t j = 0; j < q; ++j) rot[i * m + rr + order[j]] = T(sign * z2[i * q + j]);
    }
    combine(rot, p, MatrixView<T>(v.data(), kept, n));
    route = "robust";
    commit(w, std::move(out), false, sel.dropped);
    return true;
}

template <class T> void StreamingSvd<T>::Impl::householder(Work &w, const Rows<T> &dense) {
    Frame frame;
    const std::int64_t rr = w.r, m = w.m, p = std::min(m, n), k = std::min(keep, p);
    if (n > std::numeric_limits<int>::max()) throw ValueError("rows: more than 2^31 - 1 columns");
    Buffer<T> a(m * n);
    for (std::int64_t i = 0; i < rr; ++i)
        for (std::int64_t j = 0; j < n; ++j) a.data()[i * n + j] = T(w.scale[std::size_t(i)]) * v.data()[i * n + j];
    materialise(dense, a.data() + rr * n);
    int ni = int(n), mi = int(m), pi = int(p), info = 0, lwork = int(64 * m);
    T *tau = frame.take<T>(p), *work = frame.take<T>(lwork);
    lapack<T>().geqrf(&ni, &mi, a.data(), &ni, tau, work, &lwork, &info);
    if (info != 0) throw LinAlgError("StreamingSVD: geqrf failed");
    // Aᵀ = Q R: the right singular vectors of A are Q times the left ones of R, hence the rows of (Rᵀ's right
    // vectors) Qᵀ. Rᵀ is m x p.
    double *rt = frame.zeros<double>(m * p), *sigma = frame.take<double>(k), *y = frame.take<double>(k * p);
    double total = 0;
    for (std::int64_t i = 0; i < m; ++i)
        for (std::int64_t j = 0; j <= std::min(i, p - 1); ++j) {
            rt[i * p + j] = double(a.data()[i * n + j]);
            total += rt[i * p + j] * rt[i * p + j];
        }
    core_svd(m, p, rt, k, sigma, y);
    for (std::int64_t i = 0; i < k; ++i) sigma[i] *= sigma[i];
    const Selected sel = select(sigma, k, total, w.dropped);
    lapack<T>().orgqr(&ni, &pi, &pi, a.data(), &ni, tau, work, &lwork, &info);
    if (info != 0) throw LinAlgError("StreamingSVD: orgqr failed");
    const std::int64_t kept = sel.rank;
    T *rot = frame.take<T>(kept * p);
    std::vector<double> out(static_cast<std::size_t>(kept));
    for (std::int64_t i = 0; i < kept; ++i) {
        out[std::size_t(i)] = std::sqrt(sigma[i]);
        // <v'_i, v_j> = Y_i · (row j of Rᵀ) / s_j
        const double sign = closest_sign(rr, [&](std::int64_t j) {
            double o = 0;
            for (std::int64_t q = 0; q <= std::min(j, p - 1); ++q) o += y[i * p + q] * rt[j * p + q];
            return o / w.scale[std::size_t(j)];
        });
        for (std::int64_t j = 0; j < p; ++j) rot[i * p + j] = T(sign * y[i * p + j]);
    }
    combine(rot, Panel<T>(n).add(MatrixView<const T>(a.data(), p, n)), MatrixView<T>(v.data(), kept, n));
    route = "householder";
    commit(w, std::move(out), rr == 0, sel.dropped);
}

template <class T> void StreamingSvd<T>::Impl::tall(Work &w) {
    Frame frame;
    const std::int64_t rr = w.r, b = w.b, piece = std::max<std::int64_t>(2 * n, 64), k = std::min(keep, n);
    const std::int64_t most = n + std::min(piece, rr + b);
    T *a = frame.take<T>(most * n), *rows = frame.take<T>(piece * n), *tau = frame.take<T>(n);
    T *work = frame.take<T>(64 * n);
    int lwork = int(64 * n), info = 0;
    std::int64_t have = 0; // rows of R so far
    std::vector<double> factor(std::size_t(n * n), 0.0);
    double total = 0;
    for (std::int64_t i0 = 0; i0 < rr + b;) {
        const std::int64_t take = std::min(piece, i0 < rr ? rr - i0 : rr + b - i0);
        if (i0 < rr) {
            for (std::int64_t i = 0; i < take; ++i)
                for (std::int64_t j = 0; j < n; ++j)
                    rows[i * n + j] = T(w.scale[std::size_t(i0 + i)]) * v.data()[(i0 + i) * n + j];
        } else {
            part(w.rows, i0 - rr, take, rows, w.unit);
        }
        const std::int64_t m = have + take;
        for (std::int64_t j = 0; j < n; ++j) { // column-major, R on top
            for (std::int64_t i = 0; i < have; ++i) a[j * m + i] = i <= j ? T(factor[std::size_t(i * n + j)]) : T(0);
            for (std::int64_t i = 0; i < take; ++i) a[j * m + have + i] = rows[i * n + j];
        }
        for (std::int64_t i = 0; i < take * n; ++i) total += double(rows[i]) * double(rows[i]);
        if (!std::isfinite(total)) break;
        int mi = int(m), ni = int(n);
        lapack<T>().geqrf(&mi, &ni, a, &mi, tau, work, &lwork, &info);
        if (info != 0) throw LinAlgError("StreamingSVD: geqrf failed");
        have = std::min(m, n);
        for (std::int64_t i = 0; i < have; ++i)
            for (std::int64_t j = i; j < n; ++j) factor[std::size_t(i * n + j)] = double(a[j * m + i]);
        i0 += take;
    }
    if (w.unit == 1.0 && !(total > 1e-250 && total < 1e250)) {
        // Out of range, not finite, or all zero: again in units of the largest entry.
        require_finite(w.rows, "rows");
        double largest = 0;
        for (std::int64_t i = 0; i < rr; ++i) largest = std::max(largest, w.scale[std::size_t(i)]);
        for (std::int64_t i0 = 0; i0 < b; i0 += piece) {
            const std::int64_t take = std::min(piece, b - i0);
            part(w.rows, i0, take, rows, 1.0);
            for (std::int64_t i = 0; i < take * n; ++i) largest = std::max(largest, double(std::abs(rows[i])));
        }
        if (largest > 0.0) {
            if (!std::isfinite(largest)) throw ValueError("rows: centring or weights overflow; scale the data");
            in_units(w, largest);
            tall(w);
            return;
        }
    }
    double *sigma = frame.take<double>(k), *y = frame.take<double>(k * n);
    core_svd(n, n, factor.data(), k, sigma, y);
    for (std::int64_t i = 0; i < k; ++i) sigma[i] *= sigma[i];
    const Selected sel = select(sigma, k, total, w.dropped);
    std::vector<double> out(static_cast<std::size_t>(sel.rank));
    std::vector<T> fresh(std::size_t(sel.rank * n));
    for (std::int64_t i = 0; i < sel.rank; ++i) {
        out[std::size_t(i)] = std::sqrt(sigma[i]);
        const double sign = closest_sign(rr, [&](std::int64_t j) {
            double o = 0;
            for (std::int64_t q = 0; q < n; ++q) o += y[i * n + q] * double(v.data()[j * n + q]);
            return o;
        });
        for (std::int64_t q = 0; q < n; ++q) fresh[std::size_t(i * n + q)] = T(sign * y[i * n + q]);
    }
    std::copy(fresh.begin(), fresh.end(), v.data());
    route = "tall";
    commit(w, std::move(out), rr == 0, sel.dropped);
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
