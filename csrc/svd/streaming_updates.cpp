// What happens around a decomposition: buffering, splitting, forgetting, means, downdates, merges, and the way back
// when something fails.
#include "base/amax.hpp"
#include "linalg/sparse.hpp"
#include "svd/streaming_impl.hpp"
#include "subspan/eigh.hpp"
#include "subspan/factor.hpp"
#include "subspan/moments.hpp"
#include "subspan/gemm.hpp"

#include <algorithm>

namespace subspan {

template <class T> void StreamingSvd<T>::Impl::require_range(const Rows<T> &x) const {
    require_finite(x, "rows");
    // The length of a row, and of as many as are collected, must be a number of T, centred or not.
    const T limit = std::numeric_limits<T>::max() / T(8) / std::sqrt(T(std::max<std::int64_t>(waiting_at_most(x), 1))) / std::sqrt(T(x.cols()));
    if (x.csr == nullptr && max_abs<T>(x.dense) <= limit) return;
    const auto too_large = [&](T value) {
        if (std::abs(value) > limit)
            throw ValueError("rows: entries are too large to be " + std::string(opt.center ? "centred" : "added up") + "; scale the data");
    };
    for (std::int64_t i = 0; i < x.count(); ++i) {
        if (x.csr != nullptr)
            for (std::int64_t p = x.csr->begin(i); p < x.csr->begin(i + 1); ++p) too_large(x.csr->values[p]);
        else
            for (std::int64_t j = 0; j < x.cols(); ++j) too_large(x.dense(i, j));
    }
}

template <class T> void StreamingSvd<T>::Impl::check(const Rows<T> &x) const {
    if (x.count() < 1) throw ValueError("rows must hold at least one row, got an empty block");
    if (n != 0 && x.cols() != n) throw ValueError("rows must have " + str(n) + " columns as the stream has, got " + str(x.cols()));
    if (n == 0 && x.cols() < 1) throw ValueError("rows must have at least one column, got 0");
    if (n == 0 && opt.rank > x.cols()) throw ValueError("rank must be at most the number of columns (" + str(x.cols()) + "), got " + str(opt.rank));
}

template <class T> void StreamingSvd<T>::Impl::update(Rows<T> x) {
    check(x);
    if (x.csr != nullptr) check_csr(*x.csr, "rows");
    const std::int64_t b = x.count();
    require_countable(b);
    if (n == 0) keep = kept_for(x.cols());
    const std::int64_t cap = waiting_at_most(x);
    thin = false;
    if (2 * b <= room_to_wait(x)) { // thin: wait
        require_range(x);
        if (pending() + b > cap || (pending() > 0 && pending_csr() != (x.csr != nullptr))) flush();
        const bool fresh = n == 0;
        const std::int64_t had = pending();
        const Small before = small();
        const auto figures = moments.figures;
        const int renormalised = moments.renormalised;
        try {
            if (fresh) start(x.cols());
            wait(x);
            thin = b <= 4;
            if (had + b < cap) return;
            flush();
        } catch (...) { // take the rows out again
            restore(before);
            shorten(had);
            follower.on = thin = false;
            if (moments.on && moments.renormalised == renormalised)
                moments.figures = figures;
            else if (moments.on)
                moments.forget(1.0 / opt.forget, n);
            if (fresh) clear();
            throw;
        }
        return;
    }
    follower.on = false;
    if (pending() > 0) { // what waits may only be folded in once this block is known to be good
        require_range(x);
        flush();
    }
    const bool fresh = n == 0, first = seen == 0;
    if (fresh) start(x.cols());
    try {
        take(x, opt.forget, seen);
    } catch (...) {
        if (fresh) clear();
        throw;
    }
    if (first) canonical_signs();
    seen += b;
}

// A block into the moments, or as much of it as they take, and the rest into (S, V); `held` rows are there.
template <class T> void StreamingSvd<T>::Impl::take(const Rows<T> &x, double f, std::int64_t held) {
    const std::int64_t b = x.count();
    std::int64_t taken = 0;
    const Small was = small();
    try {
        if (takes_moments(held, b)) taken = absorb_moments(x, f);
        if (taken == b) return;
        Rows<T> rest = x;
        CsrView<T> csr;
        if (taken > 0) {
            if (x.csr != nullptr) {
                csr = slice_rows(*x.csr, taken, b - taken);
                rest.csr = &csr;
            } else {
                rest.dense = x.dense.block_rows(taken, b - taken);
            }
            if (x.weight != nullptr) rest.weight = x.weight + taken;
        }
        // A tall block costs n·b per row in its own Gram matrix: past twice the rank pieces are cheaper.
        const std::int64_t most = std::max<std::int64_t>(2 * keep, 64), left = b - taken;
        const std::int64_t piece = std::max(most / 2, room_to_wait(rest));
        // Few columns need neither a Gram matrix of the rows nor a split; see tall().
        if (left <= most || is_tall(r + left) || (opt.exact_blocks && left <= n)) {
            absorb(rest, f);
        } else if (left > piece || !absorb(rest, f, nullptr, -1, 0, nullptr, most)) {
            require_finite(x, "rows");
            const Snapshot whole(*this); // a later piece may still fail
            try {
                absorb_pieces(rest, f, left > piece ? piece : most / 2, most);
            } catch (...) {
                whole.back(*this);
                throw;
            }
        }
        parked.clear();
    } catch (...) {
        follower.on = false;
        if (parked.on) {
            moments = std::move(parked);
            moments.figures.solved = false;
            parked.clear();
            restore(was);
        }
        throw;
    }
}

template <class T> void StreamingSvd<T>::Impl::shorten(std::int64_t count) {
    waiting_weight.resize(std::size_t(count));
    if (csr_indptr.empty()) return;
    csr_indptr.resize(std::size_t(std::min<std::int64_t>(count, std::int64_t(csr_indptr.size()) - 1)) + 1);
    csr_values.resize(std::size_t(csr_indptr.back()));
    csr_indices.resize(std::size_t(csr_indptr.back()));
}

template <class T> void StreamingSvd<T>::Impl::absorb_pieces(const Rows<T> &x, double f, std::int64_t rows, std::int64_t most) {
    const std::int64_t pieces = (x.count() + rows - 1) / rows;
    for (std::int64_t p = 0; p < pieces; ++p) {
        const std::int64_t b = x.count(), each = b / pieces, more = b % pieces;
        const std::int64_t i0 = p * each + std::min(p, more), i1 = i0 + each + (p < more);
        Rows<T> piece;
        CsrView<T> csr;
        if (x.csr != nullptr) {
            csr = slice_rows(*x.csr, i0, i1 - i0);
            piece.csr = &csr;
        } else {
            piece.dense = x.dense.block_rows(i0, i1 - i0);
        }
        if (x.weight != nullptr) piece.weight = x.weight + i0;
        const double past = p == 0 ? f : 1.0;
        if (!absorb(piece, past, nullptr, -1, 0, nullptr, most)) absorb_pieces(piece, past, most / 2, most);
    }
}

// One call of update() whose rows go to the buffer: the past is forgotten by its factor, the new rows have weight one.
template <class T> void StreamingSvd<T>::Impl::wait(const Rows<T> &x) {
    const std::int64_t had = pending();
    append(x);
    forget_all(opt.forget);
    std::fill(waiting_weight.begin() + had, waiting_weight.end(), 1.0);
    seen += x.count();
}

template <class T> void StreamingSvd<T>::Impl::append(const Rows<T> &x) {
    const std::int64_t b = x.count(), at = pending();
    if (x.csr != nullptr) {
        if (csr_indptr.empty()) csr_indptr.push_back(0);
        for (std::int64_t i = 0; i < b; ++i) {
            for (std::int64_t p = x.csr->begin(i); p < x.csr->begin(i + 1); ++p) {
                csr_values.push_back(x.csr->values[p]);
                csr_indices.push_back(x.csr->column(p));
            }
            csr_indptr.push_back(std::int64_t(csr_values.size()));
        }
    } else {
        const std::int64_t room = capacity(n);
        if (waiting.capacity() < room * n) { // which may grow while rows wait
            Buffer<T> larger(room * n);
            std::copy_n(waiting.data(), at * n, larger.data());
            waiting = std::move(larger);
        }
        materialise(x, waiting.data() + at * n);
    }
    waiting_weight.resize(std::size_t(at + b), 1.0);
}

template <class T> void StreamingSvd<T>::Impl::forget_all(double f) {
    if (f == 1.0) return;
    shown.valid = false;
    for (double &x : s) x *= f;
    for (double &x : scatter) x *= f * f;
    for (double &x : waiting_weight) x *= f;
    for (double &x : follower.s) x *= f;
    follower.weight *= f * f;
    weight *= f * f;
    dropped *= f * f;
    if (moments.on) moments.forget(f, n);
}

template <class T> void StreamingSvd<T>::Impl::flush() {
    if (pending() == 0) return;
    keep_following();
    Rows<T> x;
    CsrView<T> csr;
    if (pending_csr()) {
        csr = {csr_values.data(), csr_indptr.data(), csr_indices.data(), pending(), n, true};
        x.csr = &csr;
    } else {
        x.dense = MatrixView<const T>(waiting.data(), pending(), n);
    }
    if (opt.forget != 1.0) x.weight = waiting_weight.data();
    take(x, 1.0, seen - pending());
    waiting_weight.clear();
    csr_values.clear();
    csr_indices.clear();
    csr_indptr.clear();
}

template <class T>
bool StreamingSvd<T>::Impl::absorb(Rows<T> x, double f, const double *mean_b, double weight_b, double dropped_b, const std::vector<double> *scatter_b,
                                   std::int64_t most) {
    Frame frame;
    const std::int64_t b = x.count();
    const bool given = weight_b >= 0;
    if (!given) {
        weight_b = 0;
        for (std::int64_t i = 0; i < b; ++i) weight_b += x.w(i) * x.w(i);
    }
    const double past = weight * f * f;
    if (!(past + weight_b > 0) && b == 0) return true; // a merge with nothing
    double *block_mean = nullptr;
    if (opt.center) {
        block_mean = frame.take<double>(n);
        if (given) {
            std::copy_n(mean_b, n, block_mean);
        } else {
            weighted_mean(x, block_mean);
            for (std::int64_t j = 0; j < n; ++j)
                if (!std::isfinite(block_mean[j])) {
                    require_finite(x, "rows");
                    throw ValueError("rows: the mean overflows double precision");
                }
            T *shift = frame.take<T>(n);
            T *low = frame.take<T>(n);
            for (std::int64_t j = 0; j < n; ++j) {
                shift[j] = T(block_mean[j]);
                low[j] = T(block_mean[j] - double(shift[j]));
            }
            x.shift = shift;
            if (std::is_same_v<T, float>) x.shift_low = low;
        }
        if (past > 0) {
            T *extra = frame.take<T>(n);
            const double c = std::sqrt(past * weight_b / (past + weight_b));
            for (std::int64_t j = 0; j < n; ++j) extra[j] = T(c * (mean[std::size_t(j)] - block_mean[j]));
            x.extra = extra;
        }
    }
    Work w;
    w.rows = x;
    w.r = r;
    w.b = b + (x.extra != nullptr);
    w.m = w.r + w.b;
    w.scale.resize(std::size_t(w.m), 1.0);
    for (std::int64_t i = 0; i < r; ++i) w.scale[std::size_t(i)] = s[std::size_t(i)] * f;
    for (std::int64_t i = 0; i < b; ++i) w.scale[std::size_t(r + i)] = x.w(i);
    w.dropped = dropped * f * f + dropped_b;
    double *squares = nullptr; // of the block's columns, about its mean
    const bool squared = !scatter.empty() && (!given || scatter_b != nullptr);
    if (squared) {
        squares = frame.take<double>(n);
        if (given)
            std::copy(scatter_b->begin(), scatter_b->end(), squares);
        else
            weighted_scatter(x, block_mean, squares);
        for (std::int64_t j = 0; j < n && x.extra != nullptr; ++j) squares[j] += double(x.extra[j]) * double(x.extra[j]);
    }
    if (!decompose(w, block_mean, most)) return false;

    // Nothing below can throw.
    if (!squared) scatter.clear();
    for (std::size_t j = 0; j < scatter.size() && squares != nullptr; ++j) scatter[j] = scatter[j] * f * f + squares[j];
    if (opt.center && block_mean != nullptr && weight_b > 0)
        for (std::int64_t j = 0; j < n; ++j) mean[std::size_t(j)] += (block_mean[j] - mean[std::size_t(j)]) * (weight_b / (past + weight_b));
    weight = past + weight_b;
    return true;
}

template <class T> void StreamingSvd<T>::Impl::show() {
    flush();
    follower.on = false; // scores agree with what was shown
    if (moments.on && !moments.figures.solved) solve_moments(wanted());
    if (clean || shown.valid) return;
    Impl copy(opt);
    copy.n = n;
    copy.keep = keep;
    copy.r = r;
    copy.s = s;
    copy.dropped = dropped;
    copy.clean = false;
    std::copy_n(v.data(), r * n, copy.v.reserve(r * n));
    std::copy_n(low.data(), r * n, copy.low.reserve(r * n));
    copy.fold();
    shown.v = std::move(copy.v);
    shown.s = std::move(copy.s);
    shown.valid = true;
}

template <class T> void StreamingSvd<T>::Impl::fold() {
    flush();
    follower.on = false;
    if (moments.on && !moments.figures.solved) solve_moments(wanted());
    if (clean || r == 0) return;
    // Half of what is promised: of all that are kept, and of those that are shown, which may be one.
    const std::int64_t seen_of = std::min(r, opt.rank);
    const double good = 5.0 * eps * std::sqrt(double(r)), good_shown = 5.0 * eps * std::sqrt(double(seen_of));
    for (int pass = 0; pass < 4; ++pass) {
        Frame frame;
        double *g = frame.take<double>(r * r), *inverse = frame.take<double>(r * r);
        RowBlocks<T> p(n);
        p.add(MatrixView<const T>(v.data(), r, n));
        gram(p, 0, g);
        double off = 0, off_shown = 0;
        for (std::int64_t i = 0; i < r; ++i)
            for (std::int64_t j = 0; j <= i; ++j) {
                const double d = std::abs(g[i * r + j] - (i == j ? 1.0 : 0.0));
                off = std::max(off, d);
                if (i < seen_of) off_shown = std::max(off_shown, d);
            }
        if (off <= good && off_shown <= good_shown) {
            clean = true;
            return;
        }
        if (cholesky(r, g, 0.0) > 0) break;
        invert_lower(r, g, inverse);
        double *inner = frame.take<double>(r * r), *sigma = frame.take<double>(r), *y = frame.take<double>(r * r);
        double *t = frame.take<double>(r * r);
        for (std::int64_t i = 0; i < r; ++i)
            for (std::int64_t j = 0; j < r; ++j) inner[i * r + j] = s[std::size_t(i)] * g[i * r + j];
        inner_svd(r, r, inner, r, sigma, y);
        gemm<double>(MatrixView<const double>(y, r, r), MatrixView<const double>(inverse, r, r), MatrixView<double>(t, r, r));
        T *rot = frame.take<T>(r * r);
        auto *partner = frame.take<std::int64_t>(r);
        for (std::int64_t i = 0; i < r; ++i) relative(r, t + i * r, closest(r, [&](std::int64_t j) { return y[i * r + j]; }), partner + i, rot + i * r);
        rotate(r, partner, rot, p);
        std::copy_n(sigma, r, s.begin());
    }
    // Four rounds of Cholesky did not get there: Householder does.
    Work w;
    w.r = 0;
    w.b = w.m = r;
    const std::vector<double> weights = s;
    w.scale = weights;
    w.dropped = dropped;
    Buffer<T> copy(r * n);
    std::copy_n(v.data(), r * n, copy.data());
    Rows<T> x;
    x.dense = MatrixView<const T>(copy.data(), r, n);
    x.weight = weights.data();
    householder(w, x);
    clean = true;
}

template <class T> void StreamingSvd<T>::Impl::downdate(MatrixView<const T> rows) {
    Rows<T> x;
    x.dense = rows;
    if (n == 0) throw ValueError("downdate: the stream has seen no rows");
    check(x);
    require_finite(x, "rows");
    const std::int64_t b = rows.rows;
    follower.on = thin = false;
    if (b > seen) throw ValueError("downdate: " + str(b) + " rows, but the stream has seen " + str(seen));
    flush();
    if (!moments.on) return downdate_directions(x);
    if (!downdate_moments(x)) without_moments([&] { downdate_directions(x); });
}

template <class T> void StreamingSvd<T>::Impl::downdate_directions(const Rows<T> &x) {
    const MatrixView<const T> rows = x.dense;
    const std::int64_t b = rows.rows;
    fold();
    Frame frame;
    const double new_weight = weight - double(b);
    const bool between = opt.center && new_weight > 1e-9 * weight;
    double *block_mean = nullptr, *new_mean = nullptr;
    if (opt.center) {
        block_mean = frame.take<double>(n);
        new_mean = frame.zeros<double>(n);
        weighted_mean(x, block_mean);
        for (std::int64_t j = 0; j < n && between; ++j) new_mean[j] = mean[std::size_t(j)] + (mean[std::size_t(j)] - block_mean[j]) * (double(b) / new_weight);
    }
    // In double, and near one: the basis is known to more than T, and squares must not leave the range.
    const std::int64_t bb = b + between;
    const double largest = std::max(r > 0 ? s[0] : 0.0, double(max_abs(rows)));
    const int e = near_exponent(largest);
    const double unit = std::ldexp(1.0, e), down = std::ldexp(1.0, -e);
    double *wide = frame.take<double>(bb * n), *basis = frame.take<double>(r * n), *c = frame.take<double>(bb * r);
    double *extra = frame.zeros<double>(n); // the way of the mean, as it is
    for (std::int64_t i = 0; i < b; ++i)
        for (std::int64_t j = 0; j < n; ++j) wide[i * n + j] = (double(rows(i, j)) - (opt.center ? block_mean[j] : 0.0)) * down;
    for (std::int64_t j = 0; j < n && between; ++j) {
        extra[j] = std::sqrt(double(b) * new_weight / weight) * (new_mean[j] - block_mean[j]);
        wide[b * n + j] = extra[j] * down;
    }
    for (std::int64_t i = 0; i < r * n; ++i) basis[i] = double(v.data()[i]) + double(low.data()[i]);
    const MatrixView<const double> coordinates(c, bb, r);
    if (r > 0) gemm<double>(MatrixView<const double>(wide, bb, n), MatrixView<const double>(basis, r, n).transposed(), MatrixView<double>(c, bb, r));
    double *h = frame.take<double>(r * r), *l = frame.take<double>(r), *y = frame.take<double>(r * r), *d = frame.take<double>(r);
    const double all = sum_of_squares(MatrixView<const double>(wide, bb, n)), along = sum_of_squares(coordinates);
    const double top = r > 0 ? s[0] / unit * (s[0] / unit) : 0.0, left = dropped / unit / unit;
    double captured = 0;
    for (std::int64_t i = 0; i < r; ++i) captured += s[std::size_t(i)] / unit * (s[std::size_t(i)] / unit);
    if (!std::isfinite(all) || !std::isfinite(captured)) throw ValueError("downdate: the squared norm of the rows overflows; scale the data");
    // A float32 stream knows its squares to more than its eps; in float64 those of rows that are gone are in the rounding, too.
    const double tolerance = (std::is_same_v<T, float> ? 100.0 : 1000.0) * eps * std::max(top, captured / 4);
    if (all - along > left + tolerance + 1e-2 * left)
        throw LinAlgError("downdate: the rows hold more energy outside of the subspace than the stream has left out; "
                          "they cannot all have been added");
    std::int64_t kept = 0;
    std::vector<double> out;
    T *rot = nullptr;
    std::int64_t *partner = nullptr;
    if (r > 0) {
        const auto difference = [&](const double *by) { // D⁻¹ (S² - CᵀC) D⁻¹
            gemm<double>(coordinates.transposed(), coordinates, MatrixView<double>(h, r, r));
            for (std::int64_t i = 0; i < r; ++i) {
                const double si = s[std::size_t(i)] / unit / by[i];
                for (std::int64_t j = 0; j <= i; ++j) h[i * r + j] = (i == j ? si * si : 0.0) - h[i * r + j] / by[i] / by[j];
            }
        };
        std::fill_n(d, r, 1.0);
        difference(d);
        eigh_top<double>(r, r, h, l, y);
        if (l[r - 1] < -tolerance) throw LinAlgError("downdate: the factor would become indefinite; the rows cannot all have been added");
        // The difference of squares loses what is below √eps s_1. Scaled by the values it is I - QᵀQ, with the shares that the
        // rows have in each direction: S' = Λ^½ Yᵀ D of its eigenvectors keeps small values as they were.
        const double s1 = s[0] / unit;
        for (std::int64_t i = 0; i < r; ++i) d[i] = std::max(s[std::size_t(i)] / unit, 1e3 * eps * s1);
        difference(d);
        eigh_top<double>(r, r, h, l, y);
        double *f = frame.zeros<double>(r * r);
        for (std::int64_t i = 0; i < r; ++i) {
            double across = 0, energy = 0;
            for (std::int64_t j = 0; j < r; ++j) {
                across += y[i * r + j] / d[j] * (y[i * r + j] / d[j]);
                energy += y[i * r + j] * d[j] * (y[i * r + j] * d[j]);
            }
            // What rounding can have made of a direction that the rows have taken whole goes.
            if (!(l[i] > 0) || l[i] * energy * std::sqrt(across) <= 4.0 * eps * s1) continue;
            const double root = std::sqrt(l[i]);
            for (std::int64_t j = 0; j < r; ++j) f[i * r + j] = root * y[i * r + j] * d[j];
        }
        double *sigma = l;
        small_svd(r, r, f, sigma, nullptr, y);
        while (kept < r && sigma[kept] > eps * eps * s1) ++kept;
        rot = frame.take<T>(kept * r);
        partner = frame.take<std::int64_t>(kept);
        for (std::int64_t i = 0; i < kept; ++i) {
            out.push_back(sigma[i] * unit);
            relative(r, y + i * r, closest(r, [&](std::int64_t j) { return y[i * r + j]; }), partner + i, rot + i * r);
        }
    }
    if (kept > 0) rotate(kept, partner, rot, RowBlocks<T>(n).add(MatrixView<const T>(v.data(), r, n)));
    commit(Work{}, std::move(out), false, std::min(std::max(0.0, left - std::max(0.0, all - along)) * unit * unit, std::numeric_limits<double>::max()));
    if (!scatter.empty()) {
        double *squares = frame.take<double>(n);
        weighted_scatter(x, block_mean, squares);
        for (std::int64_t j = 0; j < n; ++j) {
            double &sum = scatter[std::size_t(j)];
            sum = new_weight > 1e-9 * weight ? std::max(0.0, sum - squares[j] - extra[j] * extra[j]) : 0.0;
        }
    }
    if (opt.center) std::copy_n(new_mean, n, mean.begin());
    weight = std::max(0.0, new_weight);
    seen -= b;
}

template <class T> void StreamingSvd<T>::Impl::merge(Impl &o) {
    if (o.n == 0) return;
    if (n != 0 && o.n != n) throw ValueError("merge: other has " + str(o.n) + " columns, this stream has " + str(n));
    if (n == 0 && opt.rank > o.n) throw ValueError("rank must be at most the number of columns (" + str(o.n) + "), got " + str(opt.rank));
    if (opt.center != o.opt.center) throw ValueError("merge: one stream is centred and the other is not");
    require_countable(o.seen);
    follower.on = thin = false;
    o.flush();
    flush();
    const bool fresh = n == 0;
    if (fresh) start(o.n);
    // Sums where both, or ours, have truncated nothing.
    if (moments.on || (o.moments.on && takes_moments(seen, n))) {
        try {
            if (merge_moments(o)) {
                seen += o.seen;
                return;
            }
            if (moments.on) return without_moments([&] { merge_directions(o); });
        } catch (...) {
            if (fresh) clear();
            throw;
        }
    }
    try {
        merge_directions(o);
    } catch (...) {
        if (fresh) clear();
        throw;
    }
}

template <class T> void StreamingSvd<T>::Impl::merge_directions(Impl &o) {
    Impl solved(o.opt); // (S, V) of theirs, which keep their value
    if (o.moments.on) {
        solved.start(o.n);
        solved.restore(o.small());
        solved.moments = o.moments.copy(n);
        solved.end_moments();
        solved.fold();
    } else {
        o.fold();
    }
    const Impl &other = o.moments.on ? solved : o;
    Buffer<T> same; // merging a stream with itself: the block must not change under the update
    const T *theirs = other.v.data();
    if (&other == this) {
        std::copy_n(v.data(), r * n, same.reserve(std::max<std::int64_t>(r * n, 1)));
        theirs = same.data();
    }
    const std::vector<double> their_s = other.s, their_mean = other.mean, their_scatter = other.scatter;
    const double their_weight = other.weight, their_dropped = other.dropped;
    const std::int64_t their_seen = other.seen;
    Rows<T> x;
    x.dense = MatrixView<const T>(theirs, other.r, n);
    x.weight = their_s.data();
    if (other.r > 0 || opt.center) {
        absorb(x, 1.0, their_mean.data(), their_weight, their_dropped, their_scatter.empty() ? nullptr : &their_scatter);
    } else {
        weight += their_weight;
        dropped += their_dropped;
    }
    seen += their_seen;
}

template struct StreamingSvd<float>::Impl;
template struct StreamingSvd<double>::Impl;

} // namespace subspan
