// One update: with A = [S V; B] (rows of the state, then the block), find the k leading right singular vectors of A.
//
// The Gram matrix of [V; B] is measured in full at each update, V Vᵀ included. So the state is represented exactly by
// (S, V) even where V has drifted from orthonormal, drift cannot build up, and the two products with V are one pass.
//
//   gram         H = D [V; B][V; B]ᵀ D, D = diag(S, 1); H = W L Wᵀ; V' = L^-1/2 Wᵀ D [V; B]. Squares the condition
//                number: taken where the measured L_k / L_1 is far enough above eps.
//   robust       C = B Vᵀ, R = B - C V, second pass C2 = R Vᵀ folded into the final rotation, Cholesky of the Gram
//                matrix of R, and the SVD of the core K = [[S, 0], [C, L]] in double. Nothing is squared that matters.
//   tall         More rows than columns: QR of A by pieces, and the SVD of its n x n factor. Nothing is squared either.
//   householder  LAPACK's QR of all of Aᵀ. For first blocks and for blocks so much larger than the k-th singular
//                value that the Gram matrix of R no longer resolves it.
#include "subspan/streaming_svd.hpp"

#include "rows.hpp"
#include "sparse.hpp"
#include "subspan/blas.hpp"
#include "subspan/eigh.hpp"
#include "subspan/errors.hpp"
#include "subspan/factor.hpp"
#include "subspan/panel.hpp"

#include <cmath>
#include <cstring>
#include <limits>
#include <string>

namespace subspan {
namespace {

// Squaring costs eps s_1²/(2 s_k) in s_k: up to this spread s_1/s_k that stays below the 100 eps s_1 that is promised.
constexpr double kSpread = 64.0;
constexpr double kResidualMargin = 1000.0; // the robust route needs ‖R‖² <= 1000 s_k²
constexpr double kDrop = 4.0; // singular values below 4 eps s_1 are rounding

std::string str(std::int64_t x) { return std::to_string(x); }

} // namespace

template <class T> struct StreamingSvd<T>::Impl {
    static constexpr double eps = std::numeric_limits<T>::epsilon();

    StreamingOptions opt;
    std::int64_t n = 0, r = 0, seen = 0;
    std::int64_t keep = 0; // directions kept inside
    Buffer<T> v;           // keep x n, the first r rows in use
    std::vector<double> s, mean;
    double weight = 0, dropped = 0;
    bool clean = true;          // v is orthonormal to working precision
    const char *route = "none";
    int skip_gram = 0;          // updates for which the Gram route is not tried
    // Rows waiting for company: dense or CSR, never both.
    Buffer<T> waiting;
    std::vector<T> csr_values;
    std::vector<std::int64_t> csr_indices, csr_indptr;
    std::vector<double> waiting_weight;

    explicit Impl(const StreamingOptions &o) : opt(o) {
        if (o.rank < 1) throw ValueError("rank must be at least 1, got " + str(o.rank));
        if (!(o.forget > 0.0 && o.forget <= 1.0))
            throw ValueError("forget must be in (0, 1], got " + std::to_string(o.forget));
        if (!(o.energy >= 0.0 && o.energy < 1.0))
            throw ValueError("energy must be in (0, 1), got " + std::to_string(o.energy));
    }

    std::int64_t kept_for(std::int64_t columns) const {
        if (opt.exact_blocks) return opt.rank;
        if (opt.oversample >= 0) return std::min(columns, opt.rank + opt.oversample);
        if (columns <= 128) return columns;
        if (columns < 1024) return std::min(columns, 2 * opt.rank + 64);
        return std::min(columns, std::max(opt.rank, std::min<std::int64_t>(64, 2 * opt.rank + 32)));
    }
    std::int64_t capacity() const { return opt.exact_blocks ? 0 : std::max<std::int64_t>(keep, 16); }
    std::int64_t pending() const { return std::int64_t(waiting_weight.size()); }
    bool pending_csr() const { return csr_indptr.size() > 1; }

    // Finite, and, when a mean will be taken off, small enough that a difference of two entries is finite.
    void require_range(const Rows<T> &x) const {
        require_finite(x, "rows");
        if (!opt.center) return;
        const T limit = std::numeric_limits<T>::max() / 8;
        if (x.csr == nullptr && sum_of_squares(x.dense) <= double(limit) * double(limit)) return;
        const auto too_large = [&](T value) {
            if (std::abs(value) > limit) throw ValueError("rows: entries are too large to be centred; scale the data");
        };
        for (std::int64_t i = 0; i < x.count(); ++i) {
            if (x.csr != nullptr)
                for (std::int64_t p = x.csr->begin(i); p < x.csr->begin(i + 1); ++p) too_large(x.csr->values[p]);
            else
                for (std::int64_t j = 0; j < x.cols(); ++j) too_large(x.dense(i, j));
        }
    }

    void check(const Rows<T> &x) const {
        if (x.count() < 1) throw ValueError("rows must hold at least one row, got an empty block");
        if (n != 0 && x.cols() != n)
            throw ValueError("rows must have " + str(n) + " columns as the stream has, got " + str(x.cols()));
        if (n == 0 && x.cols() < 1) throw ValueError("rows must have at least one column, got 0");
        if (n == 0 && opt.rank > x.cols())
            throw ValueError("rank must be at most the number of columns (" + str(x.cols()) + "), got " + str(opt.rank));
    }

    // Blocks with more rows than columns go through a QR with an n x n factor while n is small; exact blocks (those of
    // scikit-learn's class, whose batches have 5 n rows by default) as long as that factor is reasonable.
    bool is_tall(std::int64_t rows) const {
        return rows > n && n <= (opt.exact_blocks ? 4096 : std::max<std::int64_t>(256, keep));
    }

    void start(std::int64_t columns) {
        n = columns;
        keep = kept_for(n);
        v.reserve(keep * n);
        if (opt.center) mean.assign(std::size_t(n), 0.0);
    }

    // ---- updates --------------------------------------------------------------------------------------------------

    void update(Rows<T> x) {
        check(x);
        if (x.csr != nullptr) check_csr(*x.csr, "rows");
        const std::int64_t b = x.count();
        if (n == 0) keep = kept_for(x.cols());
        const std::int64_t cap = capacity();
        if (2 * b <= cap && cap > 0) { // thin: wait
            require_range(x);
            if (pending() + b > cap || (pending() > 0 && pending_csr() != (x.csr != nullptr))) flush();
            const bool fresh = n == 0;
            if (fresh) start(x.cols());
            const Small before = small();
            const std::int64_t had = pending();
            try {
                append(x);
                forget_all(opt.forget);
                for (std::int64_t i = had; i < pending(); ++i) waiting_weight[std::size_t(i)] = 1.0;
                seen += b;
                if (pending() == cap) flush();
            } catch (...) { // take the rows out again
                restore(before);
                shorten(had);
                if (fresh) clear();
                throw;
            }
            return;
        }
        if (pending() > 0) { // what waits may only be folded in once this block is known to be good
            require_range(x);
            flush();
        }
        const bool fresh = n == 0, first = seen == 0;
        if (fresh) start(x.cols());
        try {
            // A tall block costs n·b per row in its own Gram matrix: past twice the rank pieces are cheaper.
            const std::int64_t most = std::max<std::int64_t>(2 * keep, 64);
            // Few columns need neither a Gram matrix of the rows nor a split; see tall().
            if (b <= most || is_tall(r + b) || (opt.exact_blocks && b <= n)) {
                absorb(x, opt.forget);
            } else {
                require_finite(x, "rows");
                const std::int64_t pieces = (b + most / 2 - 1) / (most / 2);
                const Snapshot whole(*this); // a later piece may still fail
                try {
                for (std::int64_t p = 0; p < pieces; ++p) {
                    const std::int64_t i0 = b * p / pieces, i1 = b * (p + 1) / pieces;
                    Rows<T> part;
                    CsrView<T> csr;
                    if (x.csr != nullptr) {
                        csr = slice_rows(*x.csr, i0, i1 - i0);
                        part.csr = &csr;
                    } else {
                        part.dense = x.dense.block_rows(i0, i1 - i0);
                    }
                    absorb(part, p == 0 ? opt.forget : 1.0);
                }
                } catch (...) {
                    whole.back(*this);
                    throw;
                }
            }
        } catch (...) {
            if (fresh) clear();
            throw;
        }
        if (first) canonical_signs();
        seen += b;
    }

    // What an update changes besides V and the waiting rows.
    struct Small {
        std::int64_t r, seen;
        std::vector<double> s, mean, waiting_weight;
        double weight, dropped;
        bool clean;
        int skip_gram;
        const char *route;
    };
    Small small() const { return {r, seen, s, mean, waiting_weight, weight, dropped, clean, skip_gram, route}; }
    void restore(const Small &o) {
        r = o.r;
        seen = o.seen;
        s = o.s;
        mean = o.mean;
        waiting_weight = o.waiting_weight;
        weight = o.weight;
        dropped = o.dropped;
        clean = o.clean;
        skip_gram = o.skip_gram;
        route = o.route;
    }
    // The waiting rows from `count` on go.
    void shorten(std::int64_t count) {
        waiting_weight.resize(std::size_t(count));
        if (csr_indptr.empty()) return;
        csr_indptr.resize(std::size_t(std::min<std::int64_t>(count, std::int64_t(csr_indptr.size()) - 1)) + 1);
        csr_values.resize(std::size_t(csr_indptr.back()));
        csr_indices.resize(std::size_t(csr_indptr.back()));
    }
    void clear() {
        n = r = seen = 0;
        s.clear();
        mean.clear();
        weight = dropped = 0;
        shorten(0);
        v.release();
    }
    struct Snapshot {
        Small small;
        std::vector<T> v;
        explicit Snapshot(const Impl &o) : small(o.small()), v(o.v.data(), o.v.data() + o.r * o.n) {}
        void back(Impl &o) const {
            o.restore(small);
            std::copy(v.begin(), v.end(), o.v.data());
        }
    };

    void append(const Rows<T> &x) {
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
            waiting.reserve(capacity() * n);
            materialise(x, waiting.data() + at * n);
        }
        waiting_weight.resize(std::size_t(at + b), 1.0);
    }

    void forget_all(double f) {
        if (f == 1.0) return;
        for (double &x : s) x *= f;
        for (double &x : waiting_weight) x *= f;
        weight *= f * f;
        dropped *= f * f;
    }

    void flush() {
        if (pending() == 0) return;
        Rows<T> x;
        CsrView<T> csr;
        if (pending_csr()) {
            csr = {csr_values.data(), csr_indptr.data(), csr_indices.data(), pending(), n, true};
            x.csr = &csr;
        } else {
            x.dense = MatrixView<const T>(waiting.data(), pending(), n);
        }
        if (opt.forget != 1.0) x.weight = waiting_weight.data();
        absorb(x, 1.0);
        waiting_weight.clear();
        csr_values.clear();
        csr_indices.clear();
        csr_indptr.clear();
    }

    // ---- one block ------------------------------------------------------------------------------------------------

    struct Work {
        Rows<T> rows;
        std::int64_t r = 0, b = 0, m = 0; // state rows, block rows (with the mean correction), all
        std::vector<double> scale;  // S·forget, then the weights
        const double *g = nullptr;  // raw Gram matrix, lower triangle
        double dropped = 0;         // what earlier truncations left out, forgetting applied
        double unit = 1;            // scale and dropped are in this unit (its square)
    };

    struct Selected {
        std::int64_t rank = 0;
        double dropped = 0;
    };

    // How many of the values l (descending squares) are more than rounding, given the whole energy of this core.
    Selected select(const double *l, std::int64_t count, double total, double before) const {
        Selected out;
        const double first = count > 0 ? std::max(l[0], 0.0) : 0.0;
        const double floor = kDrop * kDrop * eps * eps * first;
        double kept = 0;
        for (std::int64_t i = 0; i < std::min(count, keep); ++i) {
            if (!(l[i] > floor) || l[i] <= 0.0) break;
            kept += l[i];
            ++out.rank;
        }
        out.dropped = before + std::max(0.0, total - kept);
        return out;
    }

    // Block of rows with weights; the past is multiplied by f first. mean_b and weight_b describe the block when the
    // caller has centred it already (merge); otherwise they are measured here.
    void absorb(Rows<T> x, double f, const double *mean_b = nullptr, double weight_b = -1, double dropped_b = 0) {
        Frame frame;
        const std::int64_t b = x.count();
        const bool given = weight_b >= 0;
        if (!given) {
            weight_b = 0;
            for (std::int64_t i = 0; i < b; ++i) weight_b += x.w(i) * x.w(i);
        }
        const double past = weight * f * f;
        if (!(past + weight_b > 0) && b == 0) return; // a merge with nothing
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
                for (std::int64_t j = 0; j < n; ++j) shift[j] = T(block_mean[j]);
                x.shift = shift;
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
        decompose(w, block_mean);

        // Nothing below can throw.
        if (opt.center)
            for (std::int64_t j = 0; j < n; ++j)
                if (weight_b > 0)
                    mean[std::size_t(j)] += (block_mean[j] - mean[std::size_t(j)]) * (weight_b / (past + weight_b));
        weight = past + weight_b;
    }

    void decompose(Work &w, const double *block_mean) {
        if (is_tall(w.m)) {
            tall(w);
            return;
        }
        Frame frame;
        double *g = frame.take<double>(w.m * w.m);
        w.g = g;
        const Rows<T> &x = w.rows;
        // Products of a sparse block pay off up to a tenth of nonzeros; past that it is dense with detours.
        bool sparse = x.csr != nullptr &&
                            double(x.csr->begin(x.csr->rows) - x.csr->begin(0)) < 0.1 * double(x.csr->rows) * double(n);
        Buffer<T> copy;
        Rows<T> dense = x;
        if (sparse) {
            sparse_gram(v.data(), w.r, x, block_mean, copy.reserve(n * std::max(w.r, keep)), g);
            if (x.shift != nullptr && cancels(w, block_mean)) { // the mean dominates: take it off before multiplying
                sparse = false;
                densify(w, dense, copy);
                gram(panel(w.r, dense), 0, g);
            }
        } else {
            if (x.csr != nullptr) densify(w, dense, copy);
            gram(panel(w.r, dense), 0, g);
        }
        if (!scaled_well(w)) {
            // Squares overflowed or vanished, or the input is not finite.
            require_finite(x, "rows");
            rescale(w, dense, copy, frame);
            gram(panel(w.r, dense), 0, g);
            for (std::int64_t i = 0; i < w.m; ++i)
                if (!std::isfinite(g[i * w.m + i])) throw ValueError("rows: the squared norm of row " + str(i - w.r) +
                                                                   " overflows; scale the data");
            if (opt.method != SvdMethod::gram && robust(w, dense)) return;
            householder(w, dense);
            return;
        }
        if (opt.method == SvdMethod::gram || (opt.method == SvdMethod::automatic && gram_may_work(w))) {
            if (gram_route(w, dense, sparse, copy)) return;
            skip_gram = 8; // a core solved in vain: do not try again at once
        }
        if (sparse) densify(w, dense, copy);
        if (robust(w, dense)) return;
        householder(w, dense);
    }

    // Whether <b, b> - 2 <b, mean> + <mean, mean> has lost digits that T would have kept.
    bool cancels(const Work &w, const double *block_mean) const {
        double mm = 0, centred = 0;
        for (std::int64_t j = 0; j < n; ++j) mm += block_mean[j] * block_mean[j];
        const std::int64_t b = w.rows.count();
        for (std::int64_t i = w.r; i < w.r + b; ++i) centred += w.g[i * w.m + i];
        return mm * double(b) * 2.3e-16 > eps * 4.0 * centred;
    }

    Panel<T> panel(std::int64_t state_rows, const Rows<T> &x) const {
        Panel<T> p(n);
        p.add(MatrixView<const T>(v.data(), state_rows, n));
        p.add(x.dense, x.shift);
        if (x.extra != nullptr) p.add(MatrixView<const T>(x.extra, 1, n));
        return p;
    }

    // A CSR block as a dense one without its weights, mean already off.
    void densify(const Work &w, Rows<T> &dense, Buffer<T> &copy) const {
        Rows<T> plain = w.rows;
        plain.weight = nullptr;
        plain.extra = nullptr;
        materialise(plain, copy.reserve(plain.count() * n));
        dense = w.rows;
        dense.csr = nullptr;
        dense.shift = nullptr;
        dense.dense = MatrixView<const T>(copy.data(), plain.count(), n);
    }

    bool scaled_well(const Work &w) const {
        const double tiny = std::is_same_v<T, float> ? 1e-24 : 1e-250;
        double most = 0;
        for (std::int64_t i = w.r; i < w.m; ++i) {
            const double d = w.g[i * w.m + i];
            if (!std::isfinite(d)) return false;
            most = std::max(most, d);
        }
        if (most == 0.0 ? !block_is_zero(w) : most <= tiny) return false;
        double top = 0; // and the squares with the state's scale stay within double
        for (std::int64_t i = 0; i < w.m; ++i)
            top = std::max(top, w.scale[std::size_t(i)] * w.scale[std::size_t(i)] * w.g[i * w.m + i]);
        return (top > 1e-250 && top < 1e250) || (w.r == 0 && most == 0.0);
    }
    bool block_is_zero(const Work &w) const {
        const Rows<T> &x = w.rows;
        if (x.shift != nullptr || x.extra != nullptr) return false;
        for (std::int64_t i = 0; i < x.count(); ++i) {
            if (x.csr != nullptr) {
                for (std::int64_t p = x.csr->begin(i); p < x.csr->begin(i + 1); ++p)
                    if (x.csr->values[p] != T(0)) return false;
            } else {
                for (std::int64_t j = 0; j < n; ++j)
                    if (x.dense(i, j) != T(0)) return false;
            }
        }
        return true;
    }

    // Copies the block scaled by a power of two (exact) so that its largest entry is near one; the weights undo it.
    void rescale(Work &w, Rows<T> &dense, Buffer<T> &copy, Frame &frame) const {
        Rows<T> plain = w.rows;
        plain.weight = nullptr;
        const std::int64_t count = w.b * n;
        Buffer<T> fresh(count);
        materialise(plain, fresh.data());
        T most = 0;
        for (std::int64_t i = 0; i < count; ++i) most = std::max(most, T(std::abs(fresh.data()[i])));
        if (!std::isfinite(most)) throw ValueError("rows: centring overflows the dtype's range; scale the data");
        int e = 0;
        std::frexp(most == T(0) ? T(1) : most, &e);
        for (std::int64_t i = 0; i < count; ++i) fresh.data()[i] = std::ldexp(fresh.data()[i], -e);
        copy = std::move(fresh);
        double *weight_all = frame.take<double>(w.b);
        for (std::int64_t i = w.r; i < w.m; ++i) w.scale[std::size_t(i)] *= std::ldexp(1.0, e);
        in_units(w, *std::max_element(w.scale.begin(), w.scale.end()));
        std::copy(w.scale.begin() + w.r, w.scale.end(), weight_all);
        dense = Rows<T>{};
        dense.dense = MatrixView<const T>(copy.data(), w.b, n);
        dense.weight = weight_all;
    }

    // Squares of extreme values leave the range of double: express everything in a unit (a power of two).
    static void in_units(Work &w, double largest) {
        int e = 0;
        std::frexp(largest > 0 ? largest : 1.0, &e);
        w.unit = std::ldexp(1.0, e);
        for (double &x : w.scale) x = std::ldexp(x, -e);
        w.dropped = w.dropped / w.unit / w.unit;
    }

    bool gram_may_work(const Work &w) {
        if (w.r == 0) return true;
        if (skip_gram > 0) {
            --skip_gram;
            return false;
        }
        if (w.r < keep) return w.m > keep;
        const double ratio = s[std::size_t(r) - 1] / s[0];
        return ratio * kSpread >= 0.5; // near the limit: the new core decides
    }

    bool gram_route(Work &w, const Rows<T> &dense, bool sparse, Buffer<T> &copy) {
        Frame frame;
        const std::int64_t m = w.m, k = std::min(keep, std::min(m, n));
        double *h = frame.take<double>(m * m), *l = frame.take<double>(k);
        T *vec = frame.take<T>(k * m);
        double total = 0;
        for (std::int64_t i = 0; i < m; ++i) {
            for (std::int64_t j = 0; j <= i; ++j)
                h[i * m + j] = w.g[i * m + j] * w.scale[std::size_t(i)] * w.scale[std::size_t(j)];
            total += h[i * m + i];
        }
        eigh_top<T>(m, k, h, l, vec);
        if (total == 0.0) { // rows of zeros on an empty state
            commit_nothing(w);
            return true;
        }
        const bool forced = opt.method == SvdMethod::gram;
        Selected sel = select(l, k, total, w.dropped);
        if (forced) { // rounding of the squares hides what is below
            while (sel.rank > 0 && l[sel.rank - 1] < double(m) * eps * l[0]) --sel.rank;
            double kept = 0;
            for (std::int64_t i = 0; i < sel.rank; ++i) kept += l[i];
            sel.dropped = w.dropped + std::max(0.0, total - kept);
        } else if (sel.rank == 0 || l[sel.rank - 1] * kSpread * kSpread < l[0] ||
                   // what was not kept must have been cut by the rank, not by rounding
                   sel.rank < keep) {
            return false;
        }
        const std::int64_t kept = sel.rank;
        T *rot = frame.take<T>(kept * m);
        std::vector<double> sigma(static_cast<std::size_t>(kept));
        for (std::int64_t i = 0; i < kept; ++i) {
            const double si = std::sqrt(l[i]);
            sigma[std::size_t(i)] = si;
            // <v'_i, v_j> = s'_i W_ij / s_j: the sign follows the old component that the new one is closest to.
            double best = 0, sign = 1;
            for (std::int64_t j = 0; j < w.r; ++j) {
                const double o = double(vec[i * m + j]) / w.scale[std::size_t(j)];
                if (std::abs(o) > best) {
                    best = std::abs(o);
                    sign = o < 0 ? -1 : 1;
                }
            }
            for (std::int64_t j = 0; j < m; ++j)
                rot[i * m + j] = T(sign * double(vec[i * m + j]) * w.scale[std::size_t(j)] / si);
        }
        if (sparse) {
            sparse_combine(rot, kept, v.data(), w.r, w.rows, copy.reserve(n * kept));
            route = "sparse";
        } else {
            combine(rot, panel(w.r, dense), MatrixView<T>(v.data(), kept, n));
            route = "gram";
        }
        commit(w, std::move(sigma), w.r == 0, sel.dropped);
        return true;
    }

    void commit(const Work &w, std::vector<double> &&sigma, bool first, double left_out) {
        s = std::move(sigma);
        for (double &x : s) x *= w.unit;
        while (!s.empty() && s.back() == 0.0) s.pop_back(); // forgotten until nothing is left
        r = std::int64_t(s.size());
        dropped = std::min(left_out * w.unit * w.unit, std::numeric_limits<double>::max());
        clean = false;
        if (first || opt.exact_blocks) canonical_signs();
    }
    // Nothing but zeros so far.
    void commit_nothing(const Work &w) {
        s.clear();
        r = 0;
        dropped = w.dropped * w.unit * w.unit;
    }

    // The entry of largest magnitude of each row becomes positive.
    void canonical_signs() {
        for (std::int64_t i = 0; i < r; ++i) {
            T *row = v.data() + i * n;
            constexpr int lanes = 16; // independent chains, so that the search is not one long dependency
            T most[lanes] = {}, least[lanes] = {};
            std::int64_t j = 0;
            for (; j + lanes <= n; j += lanes)
                for (int q = 0; q < lanes; ++q) {
                    most[q] = row[j + q] > most[q] ? row[j + q] : most[q];
                    least[q] = row[j + q] < least[q] ? row[j + q] : least[q];
                }
            for (; j < n; ++j) {
                most[0] = std::max(most[0], row[j]);
                least[0] = std::min(least[0], row[j]);
            }
            if (-*std::min_element(least, least + lanes) > *std::max_element(most, most + lanes))
                for (j = 0; j < n; ++j) row[j] = -row[j];
        }
    }

    // The k leading right singular vectors (rows of y) and singular values of the rows x cols core, k <= rows. Squaring
    // in double is exact enough for float (what it cannot resolve is below kDrop eps s_1); for double up to kSpread.
    void core_svd(std::int64_t rows, std::int64_t cols, const double *core, std::int64_t k, double *sigma, double *y) const {
        Frame frame;
        const bool expect_wide = !s.empty() && s.back() * kSpread < 0.5 * s.front();
        if (std::is_same_v<T, float> || !expect_wide) {
            double *ct = frame.take<double>(rows * cols), *h = frame.take<double>(cols * cols);
            for (std::int64_t i = 0; i < rows; ++i)
                for (std::int64_t j = 0; j < cols; ++j) ct[j * rows + i] = core[i * cols + j];
            gram(Panel<double>(rows).add(MatrixView<const double>(ct, cols, rows)), 0, h);
            eigh_top<double>(cols, k, h, sigma, y);
            if (std::is_same_v<T, float>) {
                for (std::int64_t i = 0; i < k; ++i) sigma[i] = std::sqrt(std::max(sigma[i], 0.0));
                return;
            }
            if (sigma[0] == 0.0 || sigma[k - 1] * kSpread * kSpread >= sigma[0]) {
                rayleigh(rows, cols, core, k, sigma, y);
                return;
            }
        }
        const std::int64_t p = std::min(rows, cols);
        double *all = frame.take<double>(p), *vt = frame.take<double>(p * cols);
        small_svd(rows, cols, core, all, nullptr, vt);
        std::copy_n(vt, k * cols, y);
        rayleigh(rows, cols, core, k, sigma, y);
    }

    // sigma_i = ‖core y_i‖. A solver's values carry some ten eps·s_1 each time, which a long double stream adds up; a
    // norm carries one. Order is restored where rounding swapped neighbours.
    static void rayleigh(std::int64_t rows, std::int64_t cols, const double *core, std::int64_t k, double *sigma, double *y) {
        Frame frame;
        double *z = frame.take<double>(k * rows);
        gemm<double>(MatrixView<const double>(y, k, cols), MatrixView<const double>(core, rows, cols).transposed(),
                     MatrixView<double>(z, k, rows));
        for (std::int64_t i = 0; i < k; ++i) {
            double sum = 0;
            for (std::int64_t j = 0; j < rows; ++j) sum += z[i * rows + j] * z[i * rows + j];
            sigma[i] = std::sqrt(sum);
            for (std::int64_t j = i; j > 0 && sigma[j] > sigma[j - 1]; --j) {
                std::swap(sigma[j], sigma[j - 1]);
                std::swap_ranges(y + j * cols, y + (j + 1) * cols, y + (j - 1) * cols);
            }
        }
    }

    bool robust(Work &w, const Rows<T> &dense) {
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
            double best = 0, sign = 1;
            for (std::int64_t j = 0; j < rr; ++j)
                if (std::abs(y[i * mq + j]) > best) {
                    best = std::abs(y[i * mq + j]);
                    sign = y[i * mq + j] < 0 ? -1 : 1;
                }
            for (std::int64_t j = 0; j < rr; ++j) rot[i * m + j] = T(sign * z1[i * rr + j]);
            for (std::int64_t j = 0; j < q; ++j) rot[i * m + rr + order[j]] = T(sign * z2[i * q + j]);
        }
        combine(rot, p, MatrixView<T>(v.data(), kept, n));
        route = "robust";
        commit(w, std::move(out), false, sel.dropped);
        return true;
    }

    void householder(Work &w, const Rows<T> &dense) {
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
            double best = 0, sign = 1; // <v'_i, v_j> = Y_i · (row j of Rᵀ) / s_j
            for (std::int64_t j = 0; j < rr; ++j) {
                double o = 0;
                for (std::int64_t q = 0; q <= std::min(j, p - 1); ++q) o += y[i * p + q] * rt[j * p + q];
                o /= w.scale[std::size_t(j)];
                if (std::abs(o) > best) {
                    best = std::abs(o);
                    sign = o < 0 ? -1 : 1;
                }
            }
            for (std::int64_t j = 0; j < p; ++j) rot[i * p + j] = T(sign * y[i * p + j]);
        }
        combine(rot, Panel<T>(n).add(MatrixView<const T>(a.data(), p, n)), MatrixView<T>(v.data(), kept, n));
        route = "householder";
        commit(w, std::move(out), rr == 0, sel.dropped);
    }

    // A = Q R by pieces of rows, R stays n x n: the right singular vectors of R are those of A. Work memory a few n².
    void tall(Work &w) {
        Frame frame;
        const std::int64_t rr = w.r, b = w.b, piece = std::max<std::int64_t>(n, 64), k = std::min(keep, n);
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
            double best = 0, sign = 1;
            for (std::int64_t j = 0; j < rr; ++j) {
                double o = 0;
                for (std::int64_t q = 0; q < n; ++q) o += y[i * n + q] * double(v.data()[j * n + q]);
                if (std::abs(o) > best) {
                    best = std::abs(o);
                    sign = o < 0 ? -1 : 1;
                }
            }
            for (std::int64_t q = 0; q < n; ++q) fresh[std::size_t(i * n + q)] = T(sign * y[i * n + q]);
        }
        std::copy(fresh.begin(), fresh.end(), v.data());
        route = "tall";
        commit(w, std::move(out), rr == 0, sel.dropped);
    }

    // Rows [first, first + count) of a block and its extra row, as materialise() makes them, in a unit.
    static void part(const Rows<T> &x, std::int64_t first, std::int64_t count, T *dst, double unit) {
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

    // ---- the basis at working precision -----------------------------------------------------------------------------

    void fold() {
        flush();
        if (clean || r == 0) return;
        const double good = 5.0 * eps * std::sqrt(double(r)); // half of what is promised
        for (int pass = 0; pass < 4; ++pass) {
            Frame frame;
            double *g = frame.take<double>(r * r), *inverse = frame.take<double>(r * r);
            Panel<T> p(n);
            p.add(MatrixView<const T>(v.data(), r, n));
            gram(p, 0, g);
            double off = 0;
            for (std::int64_t i = 0; i < r; ++i)
                for (std::int64_t j = 0; j <= i; ++j) off = std::max(off, std::abs(g[i * r + j] - (i == j ? 1.0 : 0.0)));
            if (off <= good) {
                clean = true;
                return;
            }
            if (cholesky(r, g, 0.0) > 0) break;
            invert_lower(r, g, inverse);
            double *core = frame.take<double>(r * r), *sigma = frame.take<double>(r), *y = frame.take<double>(r * r);
            double *t = frame.take<double>(r * r);
            for (std::int64_t i = 0; i < r; ++i)
                for (std::int64_t j = 0; j < r; ++j) core[i * r + j] = s[std::size_t(i)] * g[i * r + j];
            core_svd(r, r, core, r, sigma, y);
            gemm<double>(MatrixView<const double>(y, r, r), MatrixView<const double>(inverse, r, r),
                         MatrixView<double>(t, r, r));
            T *rot = frame.take<T>(r * r);
            for (std::int64_t i = 0; i < r; ++i) {
                double best = 0, sign = 1;
                for (std::int64_t j = 0; j < r; ++j)
                    if (std::abs(y[i * r + j]) > best) {
                        best = std::abs(y[i * r + j]);
                        sign = y[i * r + j] < 0 ? -1 : 1;
                    }
                for (std::int64_t j = 0; j < r; ++j) rot[i * r + j] = T(sign * t[i * r + j]);
            }
            combine(rot, p, MatrixView<T>(v.data(), r, n));
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

    // Components reported: the leading ones, by rank or by energy.
    std::int64_t reported() const {
        const std::int64_t most = std::min(r, opt.rank);
        if (opt.energy <= 0.0) return most;
        double total = dropped, sum = 0;
        for (const double x : s) total += x * x;
        std::int64_t k = 0;
        while (k < most && sum < opt.energy * total) {
            sum += s[std::size_t(k)] * s[std::size_t(k)];
            ++k;
        }
        return k;
    }
    double captured() const {
        double e = 0;
        for (std::int64_t i = 0; i < reported(); ++i) e += s[std::size_t(i)] * s[std::size_t(i)];
        return e;
    }
    double left_out() const {
        double e = dropped;
        for (std::int64_t i = reported(); i < r; ++i) e += s[std::size_t(i)] * s[std::size_t(i)];
        return e;
    }

    void downdate(MatrixView<const T> rows) {
        Rows<T> x;
        x.dense = rows;
        if (n == 0) throw ValueError("downdate: the stream has seen no rows");
        check(x);
        require_finite(x, "rows");
        const std::int64_t b = rows.rows;
        if (b > seen) throw ValueError("downdate: " + str(b) + " rows, but the stream has seen " + str(seen));
        fold();
        Frame frame;
        const double new_weight = weight - double(b);
        double *block_mean = nullptr, *new_mean = nullptr;
        if (opt.center) {
            block_mean = frame.take<double>(n);
            new_mean = frame.take<double>(n);
            weighted_mean(x, block_mean);
            T *shift = frame.take<T>(n);
            for (std::int64_t j = 0; j < n; ++j) shift[j] = T(block_mean[j]);
            x.shift = shift;
            if (new_weight > 1e-9 * weight) {
                T *extra = frame.take<T>(n);
                const double c = std::sqrt(double(b) * new_weight / weight);
                for (std::int64_t j = 0; j < n; ++j) {
                    new_mean[j] = mean[std::size_t(j)] + (mean[std::size_t(j)] - block_mean[j]) * (double(b) / new_weight);
                    extra[j] = T(c * (new_mean[j] - block_mean[j]));
                }
                x.extra = extra;
            } else {
                std::fill_n(new_mean, n, 0.0);
            }
        }
        const std::int64_t bb = b + (x.extra != nullptr), m = r + bb;
        double *g = frame.take<double>(m * m), *h = frame.take<double>(r * r), *l = frame.take<double>(r);
        double *c = frame.take<double>(r * bb), *y = frame.take<double>(r * r);
        gram(panel(r, x), 0, g);
        double along = 0, all = 0, captured = 0;
        for (std::int64_t i = 0; i < bb; ++i) {
            all += g[(r + i) * m + r + i];
            for (std::int64_t j = 0; j < r; ++j) {
                c[j * bb + i] = g[(r + i) * m + j];
                along += c[j * bb + i] * c[j * bb + i];
            }
        }
        gram(Panel<double>(bb).add(MatrixView<const double>(c, r, bb)), 0, h);
        for (std::int64_t i = 0; i < r; ++i) {
            for (std::int64_t j = 0; j <= i; ++j) h[i * r + j] = (i == j ? s[std::size_t(i)] * s[std::size_t(i)] : 0.0) - h[i * r + j];
            captured += s[std::size_t(i)] * s[std::size_t(i)];
        }
        const double top = r > 0 ? s[0] * s[0] : 0.0, tolerance = 100.0 * eps * std::max(top, captured / 4);
        if (all - along > dropped + tolerance + 1e-2 * dropped)
            throw LinAlgError("downdate: the rows hold more energy outside of the subspace than the stream has left out; "
                              "they cannot all have been added");
        std::int64_t kept = 0;
        if (r > 0) {
            eigh_top<double>(r, r, h, l, y);
            if (l[r - 1] < -tolerance)
                throw LinAlgError("downdate: the factor would become indefinite; the rows cannot all have been added");
            // What the difference of the squares cannot tell from zero goes.
            while (kept < r && l[kept] > 16.0 * eps * top) ++kept;
        }
        T *rot = frame.take<T>(kept * r);
        std::vector<double> out(static_cast<std::size_t>(kept));
        for (std::int64_t i = 0; i < kept; ++i) {
            out[std::size_t(i)] = std::sqrt(l[i]);
            double best = 0, sign = 1;
            for (std::int64_t j = 0; j < r; ++j)
                if (std::abs(y[i * r + j]) > best) {
                    best = std::abs(y[i * r + j]);
                    sign = y[i * r + j] < 0 ? -1 : 1;
                }
            for (std::int64_t j = 0; j < r; ++j) rot[i * r + j] = T(sign * y[i * r + j]);
        }
        if (kept > 0)
            combine(rot, Panel<T>(n).add(MatrixView<const T>(v.data(), r, n)), MatrixView<T>(v.data(), kept, n));
        commit(Work{}, std::move(out), false, std::max(0.0, dropped - std::max(0.0, all - along)));
        if (opt.center) std::copy_n(new_mean, n, mean.begin());
        weight = std::max(0.0, new_weight);
        seen -= b;
    }

    void merge(Impl &o) {
        if (o.n == 0) return;
        if (n != 0 && o.n != n)
            throw ValueError("merge: other has " + str(o.n) + " columns, this stream has " + str(n));
        if (n == 0 && opt.rank > o.n)
            throw ValueError("rank must be at most the number of columns (" + str(o.n) + "), got " + str(opt.rank));
        if (opt.center != o.opt.center)
            throw ValueError("merge: one stream is centred and the other is not");
        o.fold();
        flush();
        const bool fresh = n == 0;
        if (fresh) start(o.n);
        Buffer<T> same; // merging a stream with itself: the block must not change under the update
        const T *theirs = o.v.data();
        if (&o == this) {
            std::copy_n(v.data(), r * n, same.reserve(std::max<std::int64_t>(r * n, 1)));
            theirs = same.data();
        }
        const std::vector<double> their_s = o.s, their_mean = o.mean;
        const double their_weight = o.weight, their_dropped = o.dropped;
        const std::int64_t their_seen = o.seen;
        Rows<T> x;
        x.dense = MatrixView<const T>(theirs, o.r, n);
        x.weight = their_s.data();
        if (o.r > 0 || opt.center) {
            try {
                absorb(x, 1.0, their_mean.data(), their_weight, their_dropped);
            } catch (...) {
                if (fresh) clear();
                throw;
            }
        } else {
            weight += their_weight;
            dropped += their_dropped;
        }
        seen += their_seen;
    }
};

// ---- the public face ------------------------------------------------------------------------------------------------

template <class T> StreamingSvd<T>::StreamingSvd(const StreamingOptions &o) : impl_(new Impl(o)) {}
template <class T> StreamingSvd<T>::StreamingSvd(StreamingSvd &&) noexcept = default;
template <class T> StreamingSvd<T> &StreamingSvd<T>::operator=(StreamingSvd &&) noexcept = default;
template <class T> StreamingSvd<T>::~StreamingSvd() = default;

template <class T> StreamingSvd<T>::StreamingSvd(const StreamingOptions &o, const StreamingState<T> &st) : impl_(new Impl(o)) {
    const auto bad = [](const std::string &what) { throw ValueError("saved state: " + what); };
    const auto r = std::int64_t(st.singular_values.size());
    if (st.features < 0 || st.rows_seen < 0) bad("negative counts");
    if (st.features > 0 && r > impl_->kept_for(st.features)) bad("more components than rank allows");
    if (std::int64_t(st.components.size()) != r * st.features) bad("components do not fit singular_values and features");
    if (std::int64_t(st.mean.size()) != (o.center ? st.features : 0)) bad("mean does not fit features");
    if (!(st.weight >= 0) || !(st.dropped >= 0) || !std::isfinite(st.weight) || !std::isfinite(st.dropped))
        bad("weight and dropped energy must be finite and not negative");
    for (std::size_t i = 0; i < st.singular_values.size(); ++i)
        if (!(st.singular_values[i] > 0) || !std::isfinite(st.singular_values[i]) ||
            (i > 0 && st.singular_values[i] > st.singular_values[i - 1]))
            bad("singular values must be positive and descending");
    for (const T x : st.components)
        if (!std::isfinite(x)) bad("components must be finite");
    for (const double x : st.mean)
        if (!std::isfinite(x)) bad("the mean must be finite");
    if (st.features == 0) {
        if (r > 0 || st.rows_seen > 0) bad("components without features");
        return;
    }
    if (o.rank > st.features) bad("rank above features");
    impl_->start(st.features);
    impl_->r = r;
    impl_->s = st.singular_values;
    impl_->mean = st.mean;
    impl_->seen = st.rows_seen;
    impl_->weight = st.weight;
    impl_->dropped = st.dropped;
    impl_->clean = false; // measured when somebody looks
    std::copy(st.components.begin(), st.components.end(), impl_->v.data());
}

template <class T> void StreamingSvd<T>::update(MatrixView<const T> rows) {
    Rows<T> x;
    x.dense = rows;
    impl_->update(x);
}
template <class T> void StreamingSvd<T>::update(const CsrView<T> &rows) {
    Rows<T> x;
    x.csr = &rows;
    impl_->update(x);
}
template <class T> void StreamingSvd<T>::downdate(MatrixView<const T> rows) { impl_->downdate(rows); }
template <class T> void StreamingSvd<T>::merge(StreamingSvd &other) { impl_->merge(*other.impl_); }
template <class T> void StreamingSvd<T>::fold() { impl_->fold(); }
template <class T> const StreamingOptions &StreamingSvd<T>::options() const { return impl_->opt; }
template <class T> std::int64_t StreamingSvd<T>::features() const { return impl_->n; }
template <class T> std::int64_t StreamingSvd<T>::rows_seen() const { return impl_->seen; }
template <class T> std::int64_t StreamingSvd<T>::buffered() const { return impl_->pending(); }
template <class T> double StreamingSvd<T>::weight() const {
    double w = impl_->weight;
    for (const double x : impl_->waiting_weight) w += x * x;
    return w;
}
template <class T> std::int64_t StreamingSvd<T>::rank() {
    impl_->fold();
    return impl_->reported();
}
template <class T> const double *StreamingSvd<T>::singular_values() {
    impl_->fold();
    return impl_->s.data();
}
template <class T> const T *StreamingSvd<T>::components() {
    impl_->fold();
    return impl_->v.data();
}
template <class T> const double *StreamingSvd<T>::mean() {
    impl_->fold();
    return impl_->opt.center && impl_->n > 0 ? impl_->mean.data() : nullptr;
}
template <class T> double StreamingSvd<T>::captured_energy() {
    impl_->fold();
    return impl_->captured();
}
template <class T> double StreamingSvd<T>::residual_energy() {
    impl_->fold();
    return impl_->left_out();
}
template <class T> const char *StreamingSvd<T>::last_route() const { return impl_->route; }

namespace {
void want(bool ok, const char *name, std::int64_t rows, std::int64_t cols, std::int64_t got_rows, std::int64_t got_cols) {
    if (!ok)
        throw ValueError(std::string(name) + " must have shape (" + str(rows) + ", " + str(cols) + "), got (" +
                         str(got_rows) + ", " + str(got_cols) + ")");
}
template <class T> std::vector<T> as_shift(const std::vector<double> &mean) { return {mean.begin(), mean.end()}; }
} // namespace

namespace {
// Products write rows: an out of other strides gets a copy of a contiguous result.
template <class T, class F> void with_rows(MatrixView<T> out, F &&f) {
    if (out.col_stride == 1) return f(out);
    Buffer<T> rows(std::max<std::int64_t>(out.rows * out.cols, 1));
    f(MatrixView<T>(rows.data(), out.rows, out.cols));
    for (std::int64_t i = 0; i < out.rows; ++i)
        for (std::int64_t j = 0; j < out.cols; ++j) out(i, j) = rows.data()[i * out.cols + j];
}
} // namespace

template <class T> void StreamingSvd<T>::project(MatrixView<const T> x, MatrixView<T> z) {
    impl_->fold();
    const std::int64_t n = impl_->n, k = impl_->reported();
    want(x.cols == n, "X", x.rows, n, x.rows, x.cols);
    want(z.rows == x.rows && z.cols == k, "out", x.rows, k, z.rows, z.cols);
    const auto shift = as_shift<T>(impl_->mean);
    with_rows(z, [&](MatrixView<T> rows) {
        gemm<T>(x, MatrixView<const T>(impl_->v.data(), k, n).transposed(), rows, false,
                shift.empty() ? nullptr : shift.data());
    });
}

template <class T> void StreamingSvd<T>::project(const CsrView<T> &x, MatrixView<T> z) {
    impl_->fold();
    check_csr(x, "X");
    const std::int64_t n = impl_->n, k = impl_->reported();
    want(x.cols == n, "X", x.rows, n, x.rows, x.cols);
    want(z.rows == x.rows && z.cols == k, "out", x.rows, k, z.rows, z.cols);
    const auto shift = as_shift<T>(impl_->mean);
    with_rows(z, [&](MatrixView<T> rows) {
        csr_times_rows(x, impl_->v.data(), k, shift.empty() ? nullptr : shift.data(), rows);
    });
}

template <class T> void StreamingSvd<T>::reconstruct(MatrixView<const T> z, MatrixView<T> x) {
    impl_->fold();
    const std::int64_t n = impl_->n, k = impl_->reported();
    want(z.cols == k, "Z", z.rows, k, z.rows, z.cols);
    want(x.rows == z.rows && x.cols == n, "out", z.rows, n, x.rows, x.cols);
    const auto shift = as_shift<T>(impl_->mean);
    with_rows(x, [&](MatrixView<T> rows) {
        gemm<T>(z, MatrixView<const T>(impl_->v.data(), k, n), rows);
        if (!shift.empty())
            parallel_for(rows.rows, [&](std::int64_t i) {
                T *row = rows.data + i * rows.row_stride;
                for (std::int64_t j = 0; j < n; ++j) row[j] += shift[std::size_t(j)];
            });
    });
}

template <class T> void StreamingSvd<T>::residual(MatrixView<const T> x, T *out) {
    impl_->fold();
    const std::int64_t n = impl_->n, k = impl_->reported(), step = 64;
    want(x.cols == n, "X", x.rows, n, x.rows, x.cols);
    const auto shift = as_shift<T>(impl_->mean);
    const MatrixView<const T> v(impl_->v.data(), k, n);
    // Blocks of rows, so that work memory is 64 rows however many there are.
    Buffer<T> block(step * n), z(step * std::max<std::int64_t>(k, 1));
    for (std::int64_t i0 = 0; i0 < x.rows; i0 += step) {
        const std::int64_t b = std::min(step, x.rows - i0);
        Rows<T> rows;
        rows.dense = x.block_rows(i0, b);
        rows.shift = shift.empty() ? nullptr : shift.data();
        materialise(rows, block.data());
        const MatrixView<T> bv(block.data(), b, n), zv(z.data(), b, k);
        gemm<T>(bv, v.transposed(), zv);
        for (std::int64_t i = 0; i < b * k; ++i) z.data()[i] = -z.data()[i];
        if (k > 0) gemm<T>(zv, v, bv, true);
        parallel_for(b, [&](std::int64_t i) {
            double s = 0;
            for (std::int64_t j = 0; j < n; ++j) s += double(bv(i, j)) * double(bv(i, j));
            out[i0 + i] = T(s);
        });
    }
}

template <class T> StreamingState<T> StreamingSvd<T>::state() {
    impl_->fold();
    StreamingState<T> st;
    st.features = impl_->n;
    st.rows_seen = impl_->seen;
    st.weight = impl_->weight;
    st.dropped = impl_->dropped;
    st.singular_values = impl_->s;
    st.mean = impl_->mean;
    if (impl_->n > 0) st.components.assign(impl_->v.data(), impl_->v.data() + impl_->r * impl_->n);
    return st;
}

template class StreamingSvd<float>;
template class StreamingSvd<double>;

} // namespace subspan
