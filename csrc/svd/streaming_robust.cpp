// The routes that square nothing that matters; streaming_gram.cpp says when each is taken.
#include "svd/streaming_impl.hpp"
#include "base/amax.hpp"
#include "subspan/eigh.hpp"
#include "subspan/factor.hpp"
#include "subspan/gemm.hpp"
#include "subspan/householder_qr.hpp"
#include "subspan/parallel.hpp"

#include <algorithm>
#include <numeric>

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
    combine(neg, RowBlocks<T>(n).add(vv), MatrixView<T>(residual.data(), b, n), true);

    // Second pass: what of R is still along V, and R Rᵀ.
    RowBlocks<T> p(n);
    p.add(vv).add(MatrixView<const T>(residual.data(), b, n));
    double *g2 = frame.take<double>(m * m);
    gram(p, rr, g2);
    double *c2 = frame.take<double>(b * rr);
    for (std::int64_t i = 0; i < b; ++i) std::copy_n(g2 + (rr + i) * m, rr, c + i * rr);
    gemm<double>(MatrixView<const double>(c, b, rr), lmi_v.transposed(), MatrixView<double>(c2, b, rr));
    // R Rᵀ without what the second pass takes off, and a bound of its norm: the largest row sum.
    double *gr = frame.take<double>(b * b), *cc = frame.take<double>(b * b);
    gram(RowBlocks<double>(rr).add(MatrixView<const double>(c2, b, rr)), 0, cc);
    double norm_r = 0, largest_r = 0;
    for (std::int64_t i = 0; i < b; ++i)
        for (std::int64_t j = 0; j <= i; ++j) gr[i * b + j] = gr[j * b + i] = g2[(rr + i) * m + rr + j] - cc[i * b + j];
    for (std::int64_t i = 0; i < b; ++i) {
        double sum = 0;
        for (std::int64_t j = 0; j < b; ++j) sum += std::abs(gr[i * b + j]);
        norm_r = std::max(norm_r, sum);
        largest_r = std::max(largest_r, g2[(rr + i) * m + rr + i]);
    }
    if (!std::isfinite(norm_r)) return false;
    // R = L Q for the rows that have a direction of their own; pivoting leaves out what rounding alone made. The directions
    // of a basis of everything are all taken: what R has left then is rounding.
    double *l = frame.take<double>(b * b), left = 0;
    auto *order = frame.take<std::int64_t>(b);
    const double tolerance = 4.0 * eps * largest_r;
    const std::int64_t q = rr == n ? 0 : pivoted_cholesky(b, gr, tolerance, l, order, &left), mq = rr + q;
    if (q == 0) std::iota(order, order + b, std::int64_t(0));
    double *lead = frame.take<double>(q * q), *lri = frame.take<double>(q * q);
    for (std::int64_t i = 0; i < q; ++i) std::copy_n(l + i * b, q, lead + i * q);
    invert_lower(q, lead, lri);

    // How much of all this is below working precision. What was left out of R turns the components as well, in proportion
    // to its length and not to its square; Q is orthonormal to eps ‖R‖² / pivot², which A feels as eps ‖R‖² / pivot.
    double top = w.scale[0];
    for (std::int64_t i = 0; i < b; ++i) top = std::max(top, w.scale[std::size_t(rr + i)] * std::sqrt(w.g[(rr + i) * m + rr + i]));
    const double pivot = q > 0 ? l[(q - 1) * b + q - 1] : 0.0;
    if (q > 0 && std::sqrt(left * double(b)) > kDrop * eps * top) return false;
    bool twice = false;
    if (q > 0 && largest_r > 4.0 * pivot * top) {
        if (largest_r * 1e3 * eps > pivot * pivot) return false; // a second factorisation would not mend it either
        twice = true;
    }

    // Coordinates of the block in V̂ and Q, in the order of the pivots, and c2q, what the rows that Q is made of still have
    // along V̂.
    double *along = frame.take<double>(b * rr), *c2q = frame.take<double>(q * rr);
    for (std::int64_t i = 0; i < b; ++i)
        for (std::int64_t j = 0; j < rr; ++j) along[i * rr + j] = c1[order[i] * rr + j] + c2[order[i] * rr + j];
    for (std::int64_t i = 0; i < q; ++i) std::copy_n(c2 + order[i] * rr, rr, c2q + i * rr);
    Buffer<T> directions;
    if (twice) { // Q explicitly, and the same once more: Cholesky QR 2, for Q and for what it has along V̂
        T *form = frame.zeros<T>(q * m);
        double *t = frame.take<double>(q * rr), *t2 = frame.take<double>(q * rr);
        gemm<double>(MatrixView<const double>(lri, q, q), MatrixView<const double>(c2q, q, rr), MatrixView<double>(t, q, rr));
        gemm<double>(MatrixView<const double>(t, q, rr), lmi_v, MatrixView<double>(t2, q, rr));
        for (std::int64_t i = 0; i < q; ++i) {
            for (std::int64_t j = 0; j < rr; ++j) form[i * m + j] = T(-t2[i * rr + j]);
            for (std::int64_t j = 0; j < q; ++j) form[i * m + rr + order[j]] = T(lri[i * q + j]);
        }
        directions.reserve(q * n);
        combine(form, p, MatrixView<T>(directions.data(), q, n));
        p = RowBlocks<T>(n);
        p.add(vv).add(MatrixView<const T>(directions.data(), q, n));
        double *g3 = frame.take<double>(mq * mq), *l2 = frame.take<double>(q * q), *both = frame.take<double>(b * q);
        gram(p, rr, g3);
        for (std::int64_t i = 0; i < q; ++i) std::copy_n(g3 + (rr + i) * mq, rr, t + i * rr);
        gemm<double>(MatrixView<const double>(t, q, rr), lmi_v.transposed(), MatrixView<double>(c2q, q, rr));
        gram(RowBlocks<double>(rr).add(MatrixView<const double>(c2q, q, rr)), 0, l2);
        for (std::int64_t i = 0; i < q; ++i)
            for (std::int64_t j = 0; j <= i; ++j) l2[i * q + j] = g3[(rr + i) * mq + rr + j] - l2[i * q + j];
        if (cholesky(q, l2, 0.0) > 0) return false;
        const MatrixView<const double> first(l, b, q, b, 1);
        gemm<double>(first, MatrixView<const double>(c2q, q, rr), MatrixView<double>(along, b, rr), true);
        gemm<double>(first, MatrixView<const double>(l2, q, q), MatrixView<double>(both, b, q));
        for (std::int64_t i = 0; i < b; ++i) std::copy_n(both + i * q, q, l + i * b);
        invert_lower(q, l2, lri);
        std::iota(order, order + q, std::int64_t(0)); // rows of Q, no longer of the block
    }

    const std::int64_t kq = std::min(k, mq);
    double *inner = frame.zeros<double>(m * mq), *sigma = frame.take<double>(kq), *y = frame.take<double>(kq * mq);
    for (std::int64_t i = 0; i < rr; ++i)
        for (std::int64_t j = 0; j <= i; ++j) inner[i * mq + j] = w.scale[std::size_t(i)] * lm[i * rr + j];
    for (std::int64_t i = 0; i < b; ++i) {
        std::copy_n(along + i * rr, rr, inner + (rr + i) * mq);
        std::copy_n(l + i * b, q, inner + (rr + i) * mq + rr);
    }
    double total = 0;
    for (std::int64_t i = 0; i < m * mq; ++i) total += inner[i] * inner[i];
    inner_svd(m, mq, inner, kq, sigma, y);
    for (std::int64_t i = 0; i < kq; ++i) sigma[i] *= sigma[i];
    const Selected sel = select(sigma, kq, total, w.dropped);
    if (sel.rank == 0) {
        commit_nothing(w);
        return true;
    }
    if (norm_r > kResidualMargin * sigma[sel.rank - 1] && q > 0) return false;

    require_representable(w, sigma, sel.rank);
    // V' = Y1 V̂ + Y2 L_R^-1 (R - C2' V̂), with V̂ = L_M^-1 V.
    const std::int64_t kept = sel.rank, columns = p.rows;
    double *z2 = frame.take<double>(kept * q), *z1 = frame.take<double>(kept * rr), *t1 = frame.take<double>(kept * rr);
    const MatrixView<const double> y2(y + rr, kept, q, mq, 1);
    gemm<double>(y2, MatrixView<const double>(lri, q, q), MatrixView<double>(z2, kept, q));
    gemm<double>(MatrixView<const double>(z2, kept, q), MatrixView<const double>(c2q, q, rr), MatrixView<double>(t1, kept, rr));
    // Where a component goes on as one of before, all is taken relative to that: y = e_p + η, s' = s_p + δ, and what rounding s'
    // leaves goes into the length of v'. So an update adds eps times what it changes, not eps times everything.
    double *ky = frame.take<double>(kept * m);
    gemm<double>(MatrixView<const double>(y, kept, mq), MatrixView<const double>(inner, m, mq).transposed(), MatrixView<double>(ky, kept, m));
    auto *partner = frame.take<std::int64_t>(kept);
    auto *old = frame.take<Closest>(kept);
    double *longer = frame.zeros<double>(kept); // v' by this
    std::vector<double> out(static_cast<std::size_t>(kept));
    for (std::int64_t i = 0; i < kept; ++i) {
        double *yi = y + i * mq, *ti = t1 + i * rr;
        old[i] = closest(rr, [&](std::int64_t j) { return yi[j]; });
        const std::int64_t pi = partner[i] = old[i].index >= 0 && std::abs(yi[old[i].index]) > 0.5 ? old[i].index : -1;
        for (std::int64_t j = 0; j < rr; ++j) ti[j] = old[i].sign * (yi[j] - ti[j]);
        out[std::size_t(i)] = std::sqrt(sigma[i]);
        if (pi < 0) continue;
        double rest = 0, more = 0, here = 0;
        for (std::int64_t j = 0; j < mq; ++j)
            if (j != pi) rest += yi[j] * yi[j];
        const double eta = -rest / (1.0 + std::sqrt(std::max(0.0, 1.0 - rest)));
        ti[pi] = eta + (ti[pi] - old[i].sign * yi[pi]);
        // K y at row p of the state is s_p (1 + here).
        for (std::int64_t j = 0; j < pi; ++j) here += lm[pi * rr + j] * old[i].sign * yi[j];
        here += (lm[pi * rr + pi] - 1.0) + lm[pi * rr + pi] * eta;
        for (std::int64_t j = 0; j < m; ++j)
            if (j != pi) more += ky[i * m + j] * ky[i * m + j];
        const double sp = w.scale[std::size_t(pi)];
        more += sp * sp * here * (2.0 + here);
        const double delta = more / (sp + std::sqrt(std::max(0.0, sp * sp + more)));
        double si = sp + delta;
        if (i > 0) si = std::min(si, out[std::size_t(i) - 1]); // neighbours that rounding swapped
        out[std::size_t(i)] = si;
        longer[i] = ((sp - si) + delta) / si;
    }
    gemm<double>(MatrixView<const double>(t1, kept, rr), lmi_v, MatrixView<double>(z1, kept, rr));
    T *rot = frame.zeros<T>(kept * columns);
    for (std::int64_t i = 0; i < kept; ++i) {
        if (const std::int64_t pi = partner[i]; pi >= 0) { // e_p L_M^-1 - e_p
            for (std::int64_t j = 0; j < pi; ++j) z1[i * rr + j] += lmi[pi * rr + j];
            z1[i * rr + pi] += (1.0 - lm[pi * rr + pi]) / lm[pi * rr + pi] + longer[i];
        }
        for (std::int64_t j = 0; j < rr; ++j) rot[i * columns + j] = T(z1[i * rr + j]);
        for (std::int64_t j = 0; j < q; ++j) rot[i * columns + rr + order[j]] = T(old[i].sign * z2[i * q + j]);
    }
    rotate(kept, partner, rot, p);
    route = "robust";
    commit(w, std::move(out), false, sel.dropped);
    return true;
}

template <class T> void StreamingSvd<T>::Impl::householder(Work &w, const Rows<T> &dense) {
    // In double, also for rows of float: what each update rounds would add up, and this is the route of few rows and of hard
    // ones.
    Frame frame;
    const std::int64_t rr = w.r, m = w.m, p = std::min(m, n), k = std::min(keep, p);
    Buffer<double> a(m * n);
    for (std::int64_t i = 0; i < rr; ++i)
        for (std::int64_t j = 0; j < n; ++j) a.data()[i * n + j] = w.scale[std::size_t(i)] * (double(v.data()[i * n + j]) + double(low.data()[i * n + j]));
    if constexpr (std::is_same_v<T, double>) {
        materialise(dense, a.data() + rr * n);
    } else {
        Buffer<T> rows(w.b * n);
        materialise(dense, rows.data());
        std::copy_n(rows.data(), w.b * n, a.data() + rr * n);
    }
    const MatrixView<const double> rows(a.data(), m, n);
    if (!all_finite<double>(rows)) throw LinAlgError("the rows' decomposition overflows; scale the data");
    // Aᵀ = Q R: the right singular vectors of A are Q times the left ones of R, hence the rows of (Rᵀ's right
    // vectors) Qᵀ. Rᵀ is m x p.
    const std::int64_t width = std::min(p, kReflectionBlock);
    Buffer<double> reflections(n * p), triangle(p * m), factors(p * width), tau(p);
    const MatrixView<double> vr(reflections.data(), n, p), r_factor(triangle.data(), p, m), t(factors.data(), p, width);
    householder_qr<double>(StackView<const double>(rows.transposed()), vr, r_factor, MatrixView<double>(tau.data(), 1, p), t);
    double *rt = frame.zeros<double>(m * p), *sigma = frame.take<double>(k), *y = frame.take<double>(k * p);
    double total = 0;
    for (std::int64_t i = 0; i < m; ++i)
        for (std::int64_t j = 0; j <= std::min(i, p - 1); ++j) {
            rt[i * p + j] = r_factor(j, i);
            total += rt[i * p + j] * rt[i * p + j];
        }
    inner_svd(m, p, rt, k, sigma, y);
    for (std::int64_t i = 0; i < k; ++i) sigma[i] *= sigma[i];
    const Selected sel = select(sigma, k, total, w.dropped);
    const std::int64_t kept = sel.rank;
    require_representable(w, sigma, kept);
    std::vector<double> out(static_cast<std::size_t>(kept));
    double *overlap = frame.take<double>(kept * rr); // <v'_i, v_j> = Y_i · (row j of Rᵀ) / s_j
    gemm<double>(MatrixView<const double>(y, kept, p), MatrixView<const double>(rt, rr, p).transposed(), MatrixView<double>(overlap, kept, rr));
    for (std::int64_t i = 0; i < kept; ++i) {
        out[std::size_t(i)] = std::sqrt(sigma[i]);
        const Closest old = closest(rr, [&](std::int64_t j) { return overlap[i * rr + j] / w.scale[std::size_t(j)]; });
        for (std::int64_t j = 0; j < p; ++j) y[i * p + j] *= old.sign;
    }
    // Rows Y Qᵀ, as those of Y with zeros behind to which Qᵀ is applied.
    Buffer<double> fresh(kept * n);
    for (std::int64_t i = 0; i < kept; ++i) {
        std::copy_n(y + i * p, p, fresh.data() + i * n);
        std::fill_n(fresh.data() + i * n + p, n - p, 0.0);
    }
    const MatrixView<double> turned(fresh.data(), kept, n);
    factored_apply<double>(MatrixView<const double>(vr), MatrixView<const double>(t), MatrixView<const double>(turned), Side::right, true, turned, false);
    set_basis(kept, fresh.data());
    route = "householder";
    commit(w, std::move(out), rr == 0, sel.dropped);
}

template struct StreamingSvd<float>::Impl;
template struct StreamingSvd<double>::Impl;

} // namespace subspan
