// Streams of common widths: the n x n second moments, which take in a block at the rate of a symmetric product, and are solved
// when somebody looks. Nothing is truncated, so every rank is exact, and merges, forgetting, downdates and the mean are sums.
//
// Squares are summed in double about the mean of the first block. They cost eps s_1² / (2 s_k) in s_k: nothing for rows of
// float summed in double; for rows of double, and for products of float, as long as s_1 / s_k <= kSpread. That is known
// without solving: the trace bounds λ_1 from above, and the values of the moments within any k directions bound λ_k from
// below (Poincaré); adding rows only raises it. Where the bounds do not meet, the directions are measured anew, then all
// values. Streams of double whose spectrum is too wide go back to (S, V) before anything was lost.
#include "base/blocking.hpp"
#include "base/amax.hpp"
#include "linalg/sparse.hpp"
#include "linalg/subspace_iteration.hpp"
#include "linalg/syrk.hpp"
#include "svd/streaming_impl.hpp"
#include "subspan/eigh.hpp"
#include "subspan/gemm.hpp"
#include "subspan/rng.hpp"

#include <algorithm>
#include <optional>

namespace subspan {
namespace {

constexpr double kSquares = kSpread * kSpread;
constexpr double kNoise = 0.01; // what a start holds of everything
constexpr double kLongFlops = 1e9; // some 10 ms: what takes longer may be stopped, and needs a way back

} // namespace

// Whether a block of b rows begins them, or goes on: as long as nothing has been truncated, of `held` rows, and where the
// block is not so small that its own products are less.
template <class T> bool StreamingSvd<T>::Impl::takes_moments(std::int64_t held, std::int64_t b) {
    if (moments.on) return true;
    if (!moments_allowed(n)) return false;
    if ((keep < n && held >= keep) || r + b <= std::min(keep, n / 2)) return false;
    if (skip_moments == 0) return true;
    --skip_moments;
    return false;
}

// The moments about the mean, the lower triangle of h (n x n).
template <class T> void StreamingSvd<T>::Impl::moments_about_mean(double *h) const {
    const std::int64_t ld = moments_stride(n);
    const double *c = moments.c.data(), *t = moments.sum.data(), f = moments.figures.factor;
    for (std::int64_t i = 0; i < n; ++i) {
        const double less = opt.center && weight > 0 ? t[i] * f / weight : 0.0;
        for (std::int64_t j = 0; j <= i; ++j) h[i * n + j] = f * (c[i * ld + j] - less * t[j]);
    }
}

// Fills the upper triangle; returns the square of Frobenius' norm about the mean.
template <class T> double StreamingSvd<T>::Impl::mirror_moments() {
    const double f = moments.figures.factor;
    const std::int64_t ld = moments_stride(n);
    double squares = 0, *c = moments.c.data();
    constexpr std::int64_t B = 16; // blocks, so that the mirrored writes stay in L1
    for (std::int64_t i0 = 0; i0 < n; i0 += B)
        for (std::int64_t j0 = 0; j0 <= i0; j0 += B)
            for (std::int64_t i = i0; i < std::min(n, i0 + B); ++i) {
                const double less = opt.center ? moments.sum[std::size_t(i)] * f / weight : 0.0;
                double sum = 0;
                for (std::int64_t j = j0; j < std::min(j0 + B, i); ++j) {
                    const double x = c[i * ld + j] - less * moments.sum[std::size_t(j)];
                    sum += 2.0 * x * x;
                    c[j * ld + i] = c[i * ld + j];
                }
                if (i < j0 + B) sum += (c[i * ld + i] - less * moments.sum[std::size_t(i)]) * (c[i * ld + i] - less * moments.sum[std::size_t(i)]);
                squares += sum;
            }
    return squares * f * f;
}

// out = q H of the moments about the mean, whose upper triangle has been filled.
template <class T> void StreamingSvd<T>::Impl::times_moments(std::int64_t count, const double *q, double *out) const {
    gemm<double>(MatrixView<const double>(q, count, n), MatrixView<const double>(moments.c.data(), n, n, moments_stride(n), 1),
                 MatrixView<double>(out, count, n));
    const double *t = moments.sum.data(), f = moments.figures.factor;
    for (std::int64_t i = 0; i < count; ++i) {
        double along = 0;
        for (std::int64_t j = 0; j < n && opt.center; ++j) along += q[i * n + j] * t[j];
        along *= f / weight;
        for (std::int64_t j = 0; j < n; ++j) out[i * n + j] = f * (out[i * n + j] - along * t[j]);
    }
}

// The reference: directions near the components, by subspace iteration from those before. Their least Rayleigh value bounds
// λ_rank from below, and the signs that are shown are theirs, so that no sign depends on who has looked when.
template <class T> void StreamingSvd<T>::Impl::measure_moments() {
    Frame frame;
    auto &m = moments.figures;
    const std::int64_t k = carried(), rank = std::min(opt.rank, n);
    if (!(weight > 0)) return;
    const double squares = mirror_moments();
    m.measured = std::max(trace_moments(), 0.0);
    m.rounding = std::max(m.rounding, m.measured);
    m.most = std::min(std::sqrt(squares), m.measured); // Frobenius' norm bounds λ_1, and the trace does
    m.least = 0;
    m.since = 0;
    if (!(squares > 0.0)) return;
    std::vector<double> &q = moments.reference;
    const bool fresh = q.empty();
    std::vector<double> next(std::size_t(k * n));
    double *y = next.data(), *values = frame.take<double>(n), *inner = frame.take<double>(k * k), *z = frame.take<double>(k * k);
    if (4 * k >= n) { // no dearer than a step of the iteration
        double *h = frame.take<double>(n * n);
        moments_about_mean(h);
        eigh_top<double>(n, k, h, values, y);
        m.least = std::max(0.0, values[rank - 1]);
        m.most = std::max(0.0, values[0]);
    } else {
        double *from = frame.take<double>(k * n), *work = frame.take<double>(k * n);
        start_moments(k, 0.0, from);
        if (std::int64_t(q.size()) < k * n) { // what is there is not orthonormal
            for (int step = 0; step < (fresh ? 2 : 1); ++step) {
                times_moments(k, from, y);
                if (!orthonormal_rows(k, n, y)) return; // of lower rank: no bound, and the reference stays
                std::copy_n(y, k * n, from);
            }
        }
        // One product serves twice: for the values within the directions, and for the directions that follow.
        times_moments(k, from, work);
        gemm<double>(MatrixView<const double>(from, k, n), MatrixView<const double>(work, k, n).transposed(), MatrixView<double>(inner, k, k));
        eigh_top<double>(k, k, inner, values, z);
        m.least = std::max(0.0, values[rank - 1]);
        gemm<double>(MatrixView<const double>(z, k, k), MatrixView<const double>(work, k, n), MatrixView<double>(y, k, n));
        if (!orthonormal_rows(k, n, y)) return;
    }
    std::vector<double> shown_before; // the first reference takes the signs of the components so far
    if (fresh)
        for (std::int64_t i = 0; i < r * n; ++i) shown_before.push_back(double(v.data()[i]));
    keep_signs(y, k, fresh ? shown_before.data() : q.data(), fresh ? r : std::int64_t(q.size()) / n);
    q.swap(next);
    if (room() > 0.0 || m.least * kSquares * 64.0 < m.most || 4 * k >= n) return;
    double *h = frame.take<double>(n * n), *all = frame.take<double>(n), *none = frame.take<double>(1); // near the limit: all values decide
    moments_about_mean(h);
    eigh_top<double>(n, 0, h, none, none, all);
    m.least = std::max(0.0, all[n - rank]);
    m.most = std::max(0.0, all[n - 1]);
}

// `count` rows to begin an iteration from: the reference, and where it ends random ones. Each holds some noise besides.
template <class T> void StreamingSvd<T>::Impl::start_moments(std::int64_t count, double noise, double *y) const {
    const Philox rng{0x5eed};
    const std::int64_t known = std::min(count * n, std::int64_t(moments.reference.size()));
    const double f = noise * std::sqrt(3.0 / double(n));
    for (std::int64_t i = noise > 0 ? 0 : known / 4 * 4; i < count * n; i += 4) {
        double four[4];
        rng.uniform4(std::uint64_t(i / 4), four);
        for (std::int64_t j = i; j < std::min(i + 4, count * n); ++j) y[j] = j < known ? moments.reference[std::size_t(j)] + f * four[j - i] : four[j - i];
    }
    if (!(noise > 0)) std::copy_n(moments.reference.begin(), known, y);
}

// The leading vectors and values from the reference, which has followed the stream at a distance; false: a direct solution is
// cheaper. What is found does not depend on who has looked when, since the reference does not.
template <class T> bool StreamingSvd<T>::Impl::solve_from_reference(std::int64_t count, double *values, double *y) {
    const std::int64_t p = carried();
    constexpr bool single = std::is_same_v<T, float>;
    if (moments.reference.empty() || 4 * p >= n || count > p - 4) return false;
    Frame frame;
    double *all = frame.take<double>(p), *rows = frame.take<double>(p * n);
    start_moments(p, kNoise, rows);
    mirror_moments();
    const bool rough = single && room() > 0.0; // as a direct solution would be made
    // What that costs, in flops at the rate of a product: it reads the matrix once a column, from L2 at best. Measured.
    const double direct = (rough ? 1.2 : 2.0) * (n * n * std::int64_t(rough ? 4 : 8) <= blocking().whole ? 1.0 : 1.7) * double(n) * double(n) * double(n) +
                          300.0 * double(n) * double(n);
    // Beyond what is shown they serve scores; but those that a stream goes on with are to be right.
    const std::int64_t converged = count > wanted() ? count : std::min(opt.rank, count);
    const NearTop problem{n, p, converged, rough ? 2.0 * eps : 16.0 * std::numeric_limits<double>::epsilon(), direct};
    if (!leading_near(problem, [&](const double *q, double *out) { times_moments(p, q, out); }, rows, all)) return false;
    std::copy_n(all, count, values);
    std::copy_n(rows, count * n, y);
    return true;
}

// Rows of y with the signs of those of `before` that they are closest to; without any the entry of largest magnitude is positive.
template <class T> void StreamingSvd<T>::Impl::keep_signs(double *y, std::int64_t count, const double *before, std::int64_t known) const {
    Frame frame;
    double *overlap = frame.take<double>(count * known);
    if (known > 0)
        gemm<double>(MatrixView<const double>(y, count, n), MatrixView<const double>(before, known, n).transposed(), MatrixView<double>(overlap, count, known));
    for (std::int64_t i = 0; i < count; ++i) {
        double *row = y + i * n, sign = closest(known, [&](std::int64_t j) { return overlap[i * known + j]; }).sign;
        if (known == 0 || opt.canonical_signs)
            sign = *std::max_element(row, row + n, [](double a, double b) { return std::abs(a) < std::abs(b); }) < 0 ? -1.0 : 1.0;
        for (std::int64_t j = 0; j < n && sign < 0; ++j) row[j] = -row[j];
    }
}

// By how much the trace may grow while squares of double, or products of float, hold what is promised; not positive: not at all.
template <class T> double StreamingSvd<T>::Impl::room() const {
    const auto &m = moments.figures;
    // What comes in raises λ_1 by no more than the trace.
    return m.least * kSquares - std::max(m.most + trace_moments() - m.measured, m.rounding);
}

template <class T> void StreamingSvd<T>::Impl::begin_moments(const double *shift) {
    const std::int64_t ld = moments_stride(n);
    std::fill_n(moments.c.reserve(ld * ld), ld * ld, 0.0);
    moments.sum.assign(std::size_t(n), 0.0);
    moments.shift.assign(std::size_t(n), 0.0);
    // Numbers of T, so that differences of nearby entries are exact.
    for (std::int64_t j = 0; j < n && opt.center; ++j) moments.shift[std::size_t(j)] = double(T(shift[j]));
    moments.figures = {};
    moments.figures.lost = dropped;
    moments.on = true;
    add_directions(r, v.data(), low.data(), s.data(), mean.data(), weight);
}

// Σ s² (v + low)(v + low)ᵀ of directions, those of rows of this weight about their mean.
template <class T>
void StreamingSvd<T>::Impl::add_directions(std::int64_t count, const T *high, const T *lower, const double *values, const double *about, double rows_weight) {
    Frame frame;
    double *wide = frame.take<double>(count * n), *f = frame.take<double>(count);
    for (std::int64_t i = 0; i < count * n; ++i) wide[i] = double(high[i]) + double(lower[i]);
    for (std::int64_t i = 0; i < count; ++i) f[i] = values[i] * values[i] / moments.figures.factor;
    add_moments<double, double>(MatrixView<const double>(wide, count, n), f, nullptr, moments.c.data(), nullptr, nullptr);
    if (opt.center && rows_weight > 0) add_mean(about, rows_weight);
}

// What rows of this weight have by being about another mean than the shift.
template <class T> void StreamingSvd<T>::Impl::add_mean(const double *about, double rows_weight) {
    Frame frame;
    double *d = frame.take<double>(n), f = rows_weight / moments.figures.factor;
    for (std::int64_t j = 0; j < n; ++j) d[j] = about[j] - moments.shift[std::size_t(j)];
    add_moments<double, double>(MatrixView<const double>(d, 1, n), &f, nullptr, moments.c.data(), moments.sum.data(), nullptr);
}

// The rows of a block, whose past is multiplied by f first, that squares can take in: all of them, or those before the spectrum or
// the range became too wide. Then the stream is in (S, V) and f, where the past has been multiplied, is one.
template <class T> std::int64_t StreamingSvd<T>::Impl::absorb_moments(const Rows<T> &x, double &f) {
    const std::int64_t b = x.count();
    constexpr bool wide = std::is_same_v<T, double>;
    double largest = 0; // squares, and their sums, must be numbers
    if (x.csr != nullptr) {
        const std::int64_t begin = x.csr->begin(0), count = x.csr->begin(b) - begin;
        if (count > 0) largest = double(max_abs<T>(MatrixView<const T>(x.csr->values + begin, 1, count)));
    } else {
        largest = double(max_abs<T>(x.dense));
    }
    if (!std::isfinite(largest)) require_finite(x, "rows");
    if (largest > (wide ? 1e120 : 1e30) || (wide && largest > 0 && largest < 1e-120)) {
        if (moments.on) end_moments();
        return 0;
    }
    Frame frame;
    double *factors = nullptr, weight_b = double(b);
    if (x.weight != nullptr) {
        factors = frame.take<double>(b);
        weight_b = 0;
        for (std::int64_t i = 0; i < b; ++i) weight_b += factors[i] = x.w(i) * x.w(i);
    }
    const bool fresh = !moments.on;
    const double flops = double(b) * double(n) * double(n), old_weight = weight;
    // A way back where what follows may be stopped, or may find that squares do not hold.
    const bool likely = !fresh && weight > 0 && 4.0 * trace_moments() * weight_b / weight < room();
    Moments before, midway;
    if (!fresh && (flops > kLongFlops || (wide && !likely))) before = moments.copy(n);
    const bool stoppable = fresh || before.on;
    const std::vector<double> old_scatter = scatter, old_mean = mean;
    const double old_dropped = dropped;
    const auto back = [&] {
        weight = old_weight;
        dropped = old_dropped;
        scatter = old_scatter;
        mean = old_mean;
        if (fresh)
            moments.clear();
        else if (before.on)
            moments = std::move(before);
    };
    std::int64_t taken = 0;
    try {
        std::optional<Shielded> whole;
        if (!stoppable) whole.emplace();
        if (fresh) {
            double *first = frame.zeros<double>(n);
            if (opt.center && weight > 0)
                std::copy(mean.begin(), mean.end(), first);
            else if (opt.center)
                weighted_mean(x, first);
            if (x.csr != nullptr && opt.center) { // zero costs nothing, unless the mean is most of the rows
                double square = 0, all = 0;
                for (std::int64_t j = 0; j < n; ++j) square += first[j] * first[j];
                for (std::int64_t p = x.csr->begin(0); p < x.csr->begin(b); ++p) all += double(x.csr->values[p]) * double(x.csr->values[p]);
                if (2.0 * square * double(b) < all) std::fill_n(first, n, 0.0);
            }
            begin_moments(first);
        }
        moments.figures.first = fresh && weight == 0.0;
        if (f != 1.0) moments.forget(f, n);
        weight *= f * f;
        for (double &y : scatter) y *= f * f;
        if (moments.figures.factor != 1.0) {
            double *scaled = frame.take<double>(b);
            for (std::int64_t i = 0; i < b; ++i) scaled[i] = (factors != nullptr ? factors[i] : 1.0) / moments.figures.factor;
            factors = scaled;
        }
        const auto rows_weight = [&](std::int64_t first, std::int64_t end) {
            double w = 0;
            for (std::int64_t i = first; i < end; ++i) w += x.w(i) * x.w(i);
            return w;
        };
        const double *shift = opt.center ? moments.shift.data() : nullptr, scale = moments.figures.factor;
        double *c = moments.c.data();
        const bool sparse = x.csr != nullptr && double(x.csr->begin(b) - x.csr->begin(0)) < 0.08 * double(b) * double(n) && max_shift() == 0.0;
        MatrixView<const T> rows = x.dense;
        Buffer<T> copy;
        if (x.csr != nullptr && !sparse) {
            Rows<T> plain;
            plain.csr = x.csr;
            materialise(plain, copy.reserve(b * n));
            rows = MatrixView<const T>(copy.data(), b, n);
        }
        // As far as the bounds are known to allow it: products of float, and squares of double. What begins a stream of float is
        // measured in its own products, whose rounding is far below what the bounds compare, and taken in anew if they miss.
        const bool begins = !wide && fresh && weight == 0.0 && r == 0 && !sparse && b > carried();
        const double allowance = begins ? std::numeric_limits<double>::infinity() : room() / scale;
        double *sum = frame.zeros<double>(n), *squares = frame.zeros<double>(n);
        bool measured = false;
        if (!sparse && allowance > 0.0) {
            if constexpr (wide)
                taken = add_moments<T, double>(rows, factors, shift, c, sum, squares, allowance);
            else if (std::max(largest, max_shift()) < 1e15 && largest > 1e-12)
                taken = add_moments<T, float>(rows, factors, shift, c, sum, squares, allowance);
            count_rows(sum, squares, scale, rows_weight(0, taken), false);
            if (!wide && taken > 0) moments.figures.narrow = std::max(moments.figures.narrow, trace_moments());
            if (begins && taken > 0) {
                measure_moments();
                measured = room() > 0.0;
                if (!measured) {
                    taken = 0;
                    weight = 0;
                    scatter = old_scatter;
                    mean = old_mean;
                    moments.reference.clear();
                    const std::vector<double> about = moments.shift;
                    begin_moments(about.data());
                    moments.figures.first = true;
                    if (f != 1.0) moments.forget(f, n); // nothing is there yet: the factor that the rows are divided by
                }
            }
        }
        if (taken < b) {
            if (wide && !fresh) midway = moments.copy(n); // what has been taken stays
            const std::vector<double> scatter_then = scatter, mean_then = mean;
            const double weight_then = weight;
            std::fill_n(sum, n, 0.0);
            std::fill_n(squares, n, 0.0);
            if (sparse) {
                double *about = frame.take<double>(n);
                weighted_mean(x, about);
                weighted_scatter(x, opt.center ? about : nullptr, squares);
                add_moments<T>(*x.csr, factors, n, c, sum);
                for (std::int64_t j = 0; j < n; ++j) squares[j] /= scale;
            } else {
                add_moments<T, double>(rows.block_rows(taken, b - taken), factors == nullptr ? nullptr : factors + taken, shift, c, sum, squares);
            }
            count_rows(sum, squares, scale, rows_weight(taken, b), sparse);
            if (wide) {
                measure_moments();
                measured = true;
            }
            if (wide && !(room() > 0.0)) { // lost in squares: without these rows
                skip_moments = skip_again = std::min(2 * skip_again + 1, 1 << 20);
                weight = weight_then;
                scatter = scatter_then;
                mean = mean_then;
                if (fresh) {
                    back();
                    return 0;
                }
                f = 1.0;
                moments = std::move(midway);
                note_moments(0.0);
                end_moments();
                if (before.on) parked = std::move(before); // what this update began with
                return taken;
            }
        }
        note_moments(measured ? 0.0 : double(b));
    } catch (...) {
        back();
        throw;
    }
    f = 1.0;
    return b;
}

// Rows of weight w are in the moments, with these sums over the factor, and squares about the shift or their own mean: their part
// of the sums, the mean and the scatter.
template <class T> void StreamingSvd<T>::Impl::count_rows(const double *sum, const double *squares, double factor, double w, bool centred) {
    if (!(w > 0)) return;
    for (std::int64_t j = 0; j < n; ++j) {
        const double t = sum[j] * factor;
        moments.sum[std::size_t(j)] += sum[j];
        double more = squares[j] * factor;
        if (opt.center) {
            const double about = moments.shift[std::size_t(j)] + t / w, from = about - mean[std::size_t(j)];
            more = (centred ? more : std::max(0.0, more - t * t / w)) + weight * w / (weight + w) * from * from;
            mean[std::size_t(j)] += from * (w / (weight + w));
        }
        if (!scatter.empty()) scatter[std::size_t(j)] += more;
    }
    weight += w;
}

// What changes with the moments: what is shown, the shift, the reference.
template <class T> void StreamingSvd<T>::Impl::note_moments(double rows) {
    auto &m = moments.figures;
    route = "moments";
    m.solved = false;
    shown.valid = false;
    dropped = m.lost; // the rest is known when they are solved
    double square = 0;
    for (std::int64_t j = 0; j < n && opt.center; ++j) {
        const double d = mean[std::size_t(j)] - moments.shift[std::size_t(j)];
        square += d * d;
    }
    // A mean that has moved away from the shift by more than the rows are wide costs digits.
    if (opt.center && weight > 0 && square * weight > 0.5 * trace_moments()) move_shift();
    const double trace = trace_moments();
    m.rounding = std::max(m.rounding, trace);
    // The reference follows at a tenth of what the rows cost, and not before there are two and a half times as many; sooner where what is
    // known does not let rows in by products of float.
    m.since += rows;
    const double most = room() > 0.0 ? std::max(32.0 * double(carried()), 0.6 * weight) : std::max(16.0 * double(carried()), weight / 3.0);
    if (moments.reference.empty() || m.since >= most) measure_moments();
}

template <class T> double StreamingSvd<T>::Impl::trace_moments() const {
    const std::int64_t ld = moments_stride(n);
    double sum = 0;
    for (std::int64_t j = 0; j < n; ++j) sum += moments.c.data()[j * ld + j];
    return sum * moments.figures.factor;
}

template <class T> double StreamingSvd<T>::Impl::max_shift() const {
    double most = 0;
    for (const double x : moments.shift) most = std::max(most, std::abs(x));
    return most;
}

// About the mean of now: with d from the old shift to the new one, c - d tᵀ - t dᵀ + W d dᵀ.
template <class T> void StreamingSvd<T>::Impl::move_shift() {
    const std::int64_t ld = moments_stride(n);
    Frame frame;
    double *d = frame.take<double>(n), *t = frame.take<double>(n);
    const double w = weight / moments.figures.factor, before = trace_moments();
    for (std::int64_t j = 0; j < n; ++j) {
        const double to = double(T(mean[std::size_t(j)]));
        d[j] = to - moments.shift[std::size_t(j)];
        t[j] = moments.sum[std::size_t(j)];
        moments.shift[std::size_t(j)] = to;
        moments.sum[std::size_t(j)] -= w * d[j];
    }
    for (std::int64_t i = 0; i < n; ++i) {
        double *row = moments.c.data() + i * ld;
        for (std::int64_t j = 0; j <= i; ++j) row[j] += w * d[i] * d[j] - d[i] * t[j] - t[i] * d[j];
    }
    moments.figures.most += std::max(before - moments.figures.measured, 0.0);
    moments.figures.measured = std::max(trace_moments(), 0.0);
}

// Vectors of float at unit length, and their Rayleigh values, which are exact to the square of their error; in descending order.
template <class T> void StreamingSvd<T>::Impl::rayleigh_values(std::int64_t count, double *y, double *values) {
    Frame frame;
    double *hy = frame.take<double>(count * n);
    mirror_moments();
    times_moments(count, y, hy);
    for (std::int64_t i = 0; i < count; ++i) {
        double length = 0, along = 0;
        for (std::int64_t j = 0; j < n; ++j) {
            length += y[i * n + j] * y[i * n + j];
            along += y[i * n + j] * hy[i * n + j];
        }
        values[i] = along / length;
        const double unit = 1.0 / std::sqrt(length);
        for (std::int64_t j = 0; j < n; ++j) y[i * n + j] *= unit;
        for (std::int64_t j = i; j > 0 && values[j] > values[j - 1]; --j) {
            std::swap(values[j], values[j - 1]);
            std::swap_ranges(y + j * n, y + (j + 1) * n, y + (j - 1) * n);
        }
    }
}

// The leading `count` values and vectors into (S, V), what they leave out into `dropped`.
template <class T> void StreamingSvd<T>::Impl::solve_moments(std::int64_t count) {
    Frame frame;
    const std::int64_t k = std::min(count, n);
    double *l = frame.take<double>(k), *y = frame.take<double>(k * n), total = trace_moments();
    for (std::int64_t j = 0; j < n && opt.center && weight > 0; ++j)
        total -= moments.sum[std::size_t(j)] * moments.sum[std::size_t(j)] * (moments.figures.factor * moments.figures.factor / weight);
    if (!(total > 0.0)) {
        s.clear();
        r = 0;
        dropped = moments.figures.lost;
        clean = moments.figures.solved = true;
        return;
    }
    if (!solve_from_reference(k, l, y)) {
        double *h = frame.take<double>(n * n);
        moments_about_mean(h);
        if (std::is_same_v<T, float> && room() > 0.0) { // vectors of float, whose values are those of the moments: exact to the square of their error
            float *few = frame.take<float>(k * n);
            eigh_top<float>(n, k, h, l, few);
            std::copy_n(few, k * n, y);
            rayleigh_values(k, y, l);
        } else {
            eigh_top<double>(n, k, h, l, y);
        }
    }
    // Below it is rounding: of the values, and of sums that once were larger than what rows that were removed have left.
    const double noise = eps * moments.figures.narrow + std::numeric_limits<double>::epsilon() * moments.figures.rounding;
    const double floor = std::max(kDrop * kDrop * eps * eps * std::max(l[0], 0.0), kDrop * noise);
    std::int64_t kept = 0;
    double along = 0;
    std::vector<double> sigma;
    while (kept < k && l[kept] > floor && l[kept] > 0.0) {
        along += l[kept];
        sigma.push_back(std::sqrt(l[kept++]));
    }
    keep_signs(y, kept, moments.reference.data(), std::int64_t(moments.reference.size()) / n);
    if (moments.figures.first) keep_signs(y, kept, nullptr, 0);
    set_basis(kept, y);
    s = std::move(sigma);
    r = kept;
    dropped = moments.figures.lost + std::max(0.0, total - along);
    clean = shown.valid = false; // measured when somebody looks
    moments.figures.solved = true; // not before: what is above may be stopped
}

// To (S, V), with all directions that such a stream keeps.
template <class T> void StreamingSvd<T>::Impl::end_moments() {
    solve_moments(keep);
    parked = std::move(moments);
    moments.clear();
}

template <class T> void StreamingSvd<T>::Impl::Moments::forget(double f, std::int64_t columns) {
    const double square = f * f;
    for (double *x : {&figures.factor, &figures.lost, &figures.least, &figures.most, &figures.measured, &figures.rounding, &figures.narrow}) *x *= square;
    if (figures.factor >= 1e-3) return;
    const std::int64_t ld = moments_stride(columns);
    for (std::int64_t i = 0; i < columns; ++i)
        for (std::int64_t j = 0; j <= i; ++j) c.data()[i * ld + j] *= figures.factor;
    for (double &x : sum) x *= figures.factor;
    figures.factor = 1.0;
    ++renormalised;
}

template <class T> typename StreamingSvd<T>::Impl::Moments StreamingSvd<T>::Impl::Moments::copy(std::int64_t columns) const {
    Moments to;
    to.on = on;
    to.renormalised = renormalised;
    to.figures = figures;
    to.sum = sum;
    to.shift = shift;
    to.reference = reference;
    if (!on) return to;
    const std::int64_t ld = moments_stride(columns);
    to.c.reserve(ld * ld);
    for (std::int64_t i = 0; i < columns; ++i) std::copy_n(c.data() + i * ld, i + 1, to.c.data() + i * ld);
    return to;
}

// The rows are looked for among what was added: nothing of the difference of moments may be negative.
template <class T> bool StreamingSvd<T>::Impl::downdate_moments(const Rows<T> &x) {
    const std::int64_t b = x.count(), ld = moments_stride(n);
    Frame frame;
    double *sum = frame.zeros<double>(n), *squares = frame.zeros<double>(n);
    Buffer<double> block(ld * ld);
    std::fill_n(block.data(), ld * ld, 0.0);
    add_moments<T, double>(x.dense, nullptr, opt.center ? moments.shift.data() : nullptr, block.data(), sum, squares);
    Moments before = moments.copy(n);
    const Small was = small();
    const double f = moments.figures.factor, before_trace = trace_moments();
    for (std::int64_t i = 0; i < n; ++i)
        for (std::int64_t j = 0; j <= i; ++j) moments.c.data()[i * ld + j] -= block.data()[i * ld + j] / f;
    for (std::int64_t j = 0; j < n; ++j) moments.sum[std::size_t(j)] -= sum[j] / f;
    const double w = double(b), left = weight - w > 1e-9 * weight ? weight - w : 0.0;
    for (std::int64_t j = 0; j < n; ++j) {
        double less = squares[j];
        if (opt.center) { // the other way round: from the mean of all to that of those that stay
            const double about = moments.shift[std::size_t(j)] + sum[j] / w,
                         to = left > 0 ? mean[std::size_t(j)] + (mean[std::size_t(j)] - about) * (w / left) : 0.0;
            less = std::max(0.0, less - sum[j] * sum[j] / w) + (left > 0 ? w * left / weight * (to - about) * (to - about) : 0.0);
            mean[std::size_t(j)] = to;
        }
        if (!scatter.empty()) scatter[std::size_t(j)] = left > 0 ? std::max(0.0, scatter[std::size_t(j)] - less) : 0.0;
    }
    weight = left;
    try {
        double *h = frame.take<double>(n * n), *values = frame.take<double>(n), *none = frame.take<double>(1);
        moments_about_mean(h);
        eigh_top<double>(n, 0, h, none, none, values);
        const double top = std::max(values[n - 1], 0.0);
        const double tolerance = (std::is_same_v<T, float> ? 100.0 : 1000.0) * eps * std::max(before_trace / 4, top);
        if (values[0] < -tolerance) throw LinAlgError("downdate: the factor would become indefinite; the rows cannot all have been added");
        auto &m = moments.figures;
        m.least = std::max(0.0, values[n - std::min(opt.rank, n)]);
        m.most = top;
        m.measured = std::max(trace_moments(), 0.0);
        m.first = false;
        if (std::is_same_v<T, double> && !(room() > 0.0)) { // what is left is lost in squares of what was there
            moments = std::move(before);
            restore(was);
            return false;
        }
        note_moments(0.0);
        solve_moments(wanted());
    } catch (...) {
        moments = std::move(before);
        restore(was);
        throw;
    }
    seen -= b;
    return true;
}

// Adds another stream's. False: the spectrum of both is too wide for squares; nothing has changed.
template <class T> bool StreamingSvd<T>::Impl::merge_moments(Impl &o) {
    const bool fresh = !moments.on;
    const Moments theirs = o.moments.copy(n); // o may be this stream
    const std::vector<double> their_s = o.s, their_mean = o.mean, their_scatter = o.scatter;
    const double their_weight = o.weight, their_lost = theirs.on ? theirs.figures.lost : o.dropped;
    const Small was = small();
    Moments before;
    if (!fresh) before = moments.copy(n);
    const auto back = [&] {
        if (fresh)
            moments.clear();
        else
            moments = std::move(before);
        restore(was);
    };
    try {
        if (fresh) begin_moments(weight > 0 || !theirs.on ? mean.data() : theirs.shift.data());
        auto &m = moments.figures;
        if (theirs.on) {
            // About our shift: with d from ours to theirs, c + t dᵀ + d tᵀ + W d dᵀ.
            const std::int64_t ld = moments_stride(n);
            const double f = theirs.figures.factor / m.factor, w = their_weight / m.factor;
            std::vector<double> d(std::size_t(n), 0.0);
            for (std::int64_t j = 0; j < n; ++j) d[std::size_t(j)] = theirs.shift[std::size_t(j)] - moments.shift[std::size_t(j)];
            for (std::int64_t i = 0; i < n; ++i) {
                double *row = moments.c.data() + i * ld;
                const double di = d[std::size_t(i)], ti = f * theirs.sum[std::size_t(i)];
                for (std::int64_t j = 0; j <= i; ++j)
                    row[j] += f * theirs.c.data()[i * ld + j] + ti * d[std::size_t(j)] + di * f * theirs.sum[std::size_t(j)] + w * di * d[std::size_t(j)];
            }
            for (std::int64_t j = 0; j < n; ++j) moments.sum[std::size_t(j)] += f * theirs.sum[std::size_t(j)] + w * d[std::size_t(j)];
            m.narrow += theirs.figures.narrow;
            m.rounding += theirs.figures.rounding;
            m.least = std::max(m.least, theirs.figures.least);
        } else {
            add_directions(o.r, o.v.data(), o.low.data(), their_s.data(), their_mean.data(), their_weight);
        }
        m.first = false;
        m.lost += their_lost;
        for (std::int64_t j = 0; j < n; ++j) {
            double between = 0;
            if (opt.center && their_weight > 0) {
                const double from = their_mean[std::size_t(j)] - mean[std::size_t(j)];
                between = weight * their_weight / (weight + their_weight) * from * from;
                mean[std::size_t(j)] += from * (their_weight / (weight + their_weight));
            }
            if (!scatter.empty() && !their_scatter.empty()) scatter[std::size_t(j)] += their_scatter[std::size_t(j)] + between;
        }
        if (their_scatter.empty()) scatter.clear();
        weight += their_weight;
        if (std::is_same_v<T, double> && !(room() > 0.0)) {
            measure_moments();
            if (!(room() > 0.0)) {
                back();
                return false;
            }
        }
        note_moments(0.0);
    } catch (...) {
        back();
        throw;
    }
    return true;
}

template struct StreamingSvd<float>::Impl;
template struct StreamingSvd<double>::Impl;

} // namespace subspan
