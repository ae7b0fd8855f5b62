// The state of a StreamingSvd and the steps of an update; streaming_updates.cpp, streaming_gram.cpp and
// streaming_robust.cpp define them.
#pragma once

#include "linalg/rows.hpp"
#include "base/scratch.hpp"
#include "subspan/errors.hpp"
#include "subspan/sizes.hpp"
#include "subspan/options.hpp"
#include "subspan/streaming_svd.hpp"

#include "linalg/syrk.hpp"

#include <cmath>
#include <limits>
#include <string>
#include <utility>
#include <vector>

namespace subspan {

// Squaring costs eps s_1²/(2 s_k) in s_k: up to this spread s_1/s_k that stays below the 100 eps s_1 that is promised.
inline constexpr double kSpread = 64.0;
inline constexpr double kResidualMargin = 1000.0; // the robust route needs ‖R‖² <= 1000 s_k²
inline constexpr double kDrop = 4.0; // singular values below 4 eps s_1 are rounding

inline constexpr double kDrift = 64.0; // a saved basis is folded: orthonormal to 10 eps √k, and some room
inline constexpr std::int64_t kMostRows = std::int64_t(1) << 62; // that a stream counts

inline std::string str(std::int64_t x) { return std::to_string(x); }

template <class T> struct StreamingSvd<T>::Impl {
    static constexpr double eps = std::numeric_limits<T>::epsilon();

    StreamingOptions opt;
    std::int64_t n = 0, r = 0, seen = 0;
    std::int64_t keep = 0; // directions kept inside
    Buffer<T> v, low;      // keep x n, the first r rows in use: the basis, and what rounding it to T left out
    std::vector<double> s, mean;
    std::vector<double> scatter; // weighted sums of squares of the columns, about the mean when centring; empty: not known
    double weight = 0, dropped = 0;
    bool clean = true;          // v is orthonormal to working precision
    const char *route = "none";
    int skip_gram = 0;          // updates for which the Gram route is not tried
    // Buffered rows: dense or CSR, never both.
    Buffer<T> waiting;
    std::vector<T> csr_values;
    std::vector<std::int64_t> csr_indices, csr_indptr;
    std::vector<double> waiting_weight;

    // Second moments about a shift, over a factor: streaming_moments.cpp. While they are on, (S, V) are what was solved last.
    struct Moments {
        bool on = false;
        Buffer<double> c;                // lower triangle, of moments_stride(n) rows
        std::vector<double> sum, shift;  // of rows minus the shift; the shift
        std::vector<double> reference;   // directions near the components, as rows; empty: none yet
        struct Figures {
            double factor = 1;           // that c and sum are to be multiplied by
            double lost = 0;             // what was truncated before, or by streams that were merged
            double least = 0, most = 0;  // bounds of λ_rank and λ_1 when the trace was `measured`
            double measured = 0, rounding = 0; // the largest trace so far, whose eps is in the sums
            double since = 0;            // rows since then
            bool solved = false;
            bool first = false;  // no rows but those of one block
            double narrow = 0;   // the largest trace when products of float were added, whose eps is in the sums
        } figures;
        int renormalised = 0; // how often the factor has gone into c
        Moments copy(std::int64_t columns) const;
        void forget(double f, std::int64_t columns);
        void clear() { *this = Moments(); }
    } moments, parked; // parked: those that an update has ended, until it succeeds
    int skip_moments = 0, skip_again = 0; // updates for which they are not tried

    // The leading directions with the rows that wait, for scores between updates of single rows: streaming_follow.cpp.
    struct Follower {
        bool on = false;
        std::int64_t k = 0, most = 0, taken = 0, rows = 0; // directions, at most; rows of those that wait, and in all
        double weight = 0;
        std::vector<T> v, other;
        std::vector<double> s, mean;
    } follower;
    bool thin = false; // the last update was of a few rows, which wait
    bool follows(std::int64_t rows);
    bool start_following();
    bool follow_waiting();
    void follow(const T *x, double w);
    void keep_following();

    bool takes_moments(std::int64_t held, std::int64_t b);
    std::int64_t absorb_moments(const Rows<T> &x, double &f);
    bool downdate_moments(const Rows<T> &x);
    bool merge_moments(Impl &o);
    void begin_moments(const double *shift);
    void end_moments();
    void add_directions(std::int64_t count, const T *high, const T *lower, const double *values, const double *about, double rows_weight);
    void add_mean(const double *about, double rows_weight);
    void count_rows(const double *sum, const double *squares, double factor, double w, bool centred);
    void note_moments(double rows);
    void measure_moments();
    void move_shift();
    void moments_about_mean(double *h) const;
    double mirror_moments();
    void rayleigh_values(std::int64_t count, double *y, double *values);
    void times_moments(std::int64_t count, const double *q, double *out) const;
    void keep_signs(double *y, std::int64_t count, const double *before, std::int64_t known) const;
    double room() const;
    double trace_moments() const;
    double max_shift() const;
    void solve_moments(std::int64_t count);
    bool solve_from_reference(std::int64_t count, double *values, double *y);
    void start_moments(std::int64_t count, double noise, double *y) const;
    // Rows of the reference: more than are worked out, so that an iteration from it converges, where one may be worth it.
    std::int64_t carried() const {
        const std::int64_t more = wanted() + std::max<std::int64_t>(8, opt.rank / 2);
        return 4 * more < n ? more : std::min(n, opt.rank);
    }

    explicit Impl(const StreamingOptions &o) : opt(o) {
        if (o.rank < 1) throw ValueError("rank must be at least 1, got " + str(o.rank));
        if (!(o.forget > 0.0 && o.forget <= 1.0)) throw ValueError("forget must be in (0, 1], got " + std::to_string(o.forget));
        if (!(o.energy >= 0.0 && o.energy < 1.0)) throw ValueError("energy must be in (0, 1), got " + std::to_string(o.energy));
    }

    std::int64_t kept_for(std::int64_t columns) const {
        if (opt.exact_blocks) return opt.rank;
        return kept_directions(columns, opt.rank, opt.oversample);
    }
    // Blocks of up to half as many rows wait.
    std::int64_t room_to_wait() const { return opt.exact_blocks ? 0 : std::max<std::int64_t>(keep, 16); }
    // Sparse rows take little room, and what they cost is mostly a pass over V, so they wait for others. A block with more than a
    // tenth of nonzeros is worked on as a dense one.
    static constexpr std::int64_t kSparseRows = 8; // times as many
    static bool is_sparse(const Rows<T> &x) {
        return x.csr != nullptr && double(x.csr->begin(x.csr->rows) - x.csr->begin(0)) < 0.1 * double(x.csr->rows) * double(x.csr->cols);
    }
    std::int64_t room_to_wait(const Rows<T> &x) const {
        const bool more = opt.method != SvdMethod::robust && is_sparse(x) && !moments_allowed(x.cols());
        // Their Gram matrix, with that of V, is to be no larger than V.
        const auto fits = std::int64_t(std::sqrt(double(keep) * double(x.cols()))) - keep;
        return more ? std::clamp(fits, room_to_wait(), kSparseRows * room_to_wait()) : room_to_wait();
    }
    // As many, or where moments will take them, what is a fraction of those.
    std::int64_t capacity(std::int64_t columns) const {
        const bool more = moments.on || (moments_allowed(columns) && (keep >= columns || seen - pending() < keep));
        return more ? std::max(room_to_wait(), std::min<std::int64_t>(columns / 2, 512)) : room_to_wait();
    }
    std::int64_t waiting_at_most(const Rows<T> &x) const { return std::max(capacity(x.cols()), room_to_wait(x)); }
    // Directions that are worked out: some more than are shown, for rows that come one by one.
    std::int64_t wanted() const { return std::min(keep, opt.rank + std::clamp<std::int64_t>(opt.rank / 4, 2, 8)); }
    bool moments_allowed(std::int64_t columns) const {
        return opt.method == SvdMethod::automatic && !opt.exact_blocks && opt.oversample < 0 && moments_pay(columns, opt.rank);
    }
    std::int64_t pending() const { return std::int64_t(waiting_weight.size()); }
    bool pending_csr() const { return csr_indptr.size() > 1; }

    // Finite, and, when a mean will be taken off, small enough that a difference of two entries is finite.
    void require_range(const Rows<T> &x) const;

    void check(const Rows<T> &x) const;

    // Blocks with more rows than columns go through a QR with an n x n factor while n is small; exact blocks (those of
    // scikit-learn's class, whose batches have 5 n rows by default) as long as that factor is reasonable.
    bool is_tall(std::int64_t rows) const { return rows > n && n <= (opt.exact_blocks ? 4096 : std::max<std::int64_t>(256, keep)); }

    void start(std::int64_t columns) {
        keep = kept_for(columns);
        checked_product({keep, columns}, "rank and the columns of rows");
        n = columns;
        v.reserve(keep * n);
        low.reserve(keep * n); // rows are written before they are read: of many, most never are
        if (opt.center) mean.assign(std::size_t(n), 0.0);
        scatter.assign(std::size_t(n), 0.0);
    }

    // ---- updates --------------------------------------------------------------------------------------------------

    void update(Rows<T> x);

    // What an update changes besides V and the waiting rows.
    struct Small {
        std::int64_t r, seen;
        std::vector<double> s, mean, scatter, waiting_weight;
        double weight, dropped;
        bool clean;
        int skip_gram;
        const char *route;
        int skip_moments, skip_again;
    };
    Small small() const { return {r, seen, s, mean, scatter, waiting_weight, weight, dropped, clean, skip_gram, route, skip_moments, skip_again}; }
    void restore(const Small &o) {
        r = o.r;
        seen = o.seen;
        s = o.s;
        mean = o.mean;
        scatter = o.scatter;
        waiting_weight = o.waiting_weight;
        weight = o.weight;
        dropped = o.dropped;
        clean = o.clean;
        shown.valid = false;
        skip_gram = o.skip_gram;
        route = o.route;
        skip_moments = o.skip_moments;
        skip_again = o.skip_again;
    }
    // The waiting rows from `count` on go.
    void shorten(std::int64_t count);
    void clear() {
        n = r = seen = 0;
        s.clear();
        mean.clear();
        scatter.clear();
        weight = dropped = 0;
        shorten(0);
        v.release();
        low.release();
        moments.clear();
        follower.on = thin = false;
        skip_moments = skip_again = 0;
        clean = true;
        shown.valid = false;
    }
    struct Snapshot {
        Small small;
        std::vector<T> v, low;
        explicit Snapshot(const Impl &o) : small(o.small()), v(o.v.data(), o.v.data() + o.r * o.n), low(o.low.data(), o.low.data() + o.r * o.n) {}
        void back(Impl &o) const {
            o.restore(small);
            std::copy(v.begin(), v.end(), o.v.data());
            std::copy(low.begin(), low.end(), o.low.data());
        }
    };

    void wait(const Rows<T> &x);
    void append(const Rows<T> &x);
    // In pieces of up to `rows`, or where more than `most` at once do not go, of half as many as that.
    void absorb_pieces(const Rows<T> &x, double f, std::int64_t rows, std::int64_t most);

    void forget_all(double f);

    void flush();
    void take(const Rows<T> &x, double f, std::int64_t held);

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

    // How many of the values l (descending squares) are more than rounding, given the whole energy of this inner.
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
    // caller has centred it already (merge); otherwise they are measured here. False, and nothing has changed: `most` is not
    // zero, there are more rows than that, and the Gram route is not for them.
    bool absorb(Rows<T> x, double f, const double *mean_b = nullptr, double weight_b = -1, double dropped_b = 0, const std::vector<double> *scatter_b = nullptr,
                std::int64_t most = 0);
    // More rows than can be counted.
    void require_countable(std::int64_t more) const {
        if (more > kMostRows - seen) throw ValueError("rows: a stream counts up to 2^62 rows");
    }

    bool decompose(Work &w, const double *block_mean, std::int64_t most);

    // Whether <b, b> - 2 <b, mean> + <mean, mean> has lost digits that T would have kept.
    bool cancels(const Work &w, const double *block_mean) const;

    RowBlocks<T> blocks(std::int64_t state_rows, const Rows<T> &x) const {
        RowBlocks<T> p(n);
        p.add(MatrixView<const T>(v.data(), state_rows, n));
        p.add(x.dense, x.shift, x.shift_low);
        if (x.extra != nullptr) p.add(MatrixView<const T>(x.extra, 1, n));
        return p;
    }

    // A CSR block as a dense one without its weights, mean already off.
    void densify(const Work &w, Rows<T> &dense, Buffer<T> &copy) const;

    bool scaled_well(const Work &w) const;
    bool block_is_zero(const Work &w) const;

    // Copies the block scaled by a power of two (exact) so that its largest entry is near one; the weights undo it.
    void rescale(Work &w, Rows<T> &dense, Buffer<T> &copy, Frame &frame) const;

    // Squares of extreme values leave the range of double: express everything in a unit (a power of two).
    static void in_units(Work &w, double largest);

    bool gram_may_work(const Work &w);

    bool gram_route(Work &w, const Rows<T> &dense, bool sparse, std::int64_t most);
    // The k leading eigenpairs of h (m x m, lower triangle), after the first `held` rows `piece` rows at a time: what a
    // stream of such blocks would keep, without its passes over V. Cost m k (m + k) flops for a piece.
    void compress(std::int64_t m, std::int64_t held, std::int64_t piece, std::int64_t k, const double *h, double *l, T *vec) const;

    // The old component that a new one is closest to (-1: there is none), and the sign that their overlap gives it: signs
    // stay stable along a stream.
    struct Closest {
        std::int64_t index = -1;
        double sign = 1;
    };
    template <class F> static Closest closest(std::int64_t count, F &&overlap) {
        Closest out;
        double best = 0;
        for (std::int64_t j = 0; j < count; ++j) {
            const double o = overlap(j);
            if (std::abs(o) > best) {
                best = std::abs(o);
                out = {j, o < 0 ? -1.0 : 1.0};
            }
        }
        return out;
    }

    // ---- the basis to twice its precision: streaming_basis.cpp ------------------------------------------------------

    // Row i of V' is sign · Σ_j w_j scale_j row_j / sigma, w a unit vector: its coefficients, less one at its partner.
    static void relative(std::int64_t count, const double *w, const double *scale, double sigma, Closest old, std::int64_t *partner, T *rot);
    // The same for coefficients that are known as they are.
    static void relative(std::int64_t count, const double *coefficients, Closest old, std::int64_t *partner, T *rot) {
        *partner = old.index >= 0 && old.sign * coefficients[old.index] > 0.5 ? old.index : -1;
        for (std::int64_t j = 0; j < count; ++j) rot[j] = T(old.sign * coefficients[j] - (j == *partner ? 1.0 : 0.0));
    }
    // V' = V[partner] + rot P: P's first r rows are V.
    void rotate(std::int64_t kept, const std::int64_t *partner, const T *rot, const RowBlocks<T> &p);
    /// The basis rotated by what `changes` hands over in strips, each from `rows` rows.
    void rotate(std::int64_t kept, const std::int64_t *partner, std::int64_t rows, const std::function<void(const StripTaker<T> &)> &changes);
    void settle(std::int64_t kept, const std::int64_t *partner, T *delta);
    void settle_strip(std::int64_t kept, const std::int64_t *partner, std::int64_t first, MatrixView<T> delta);
    // V' = y (kept x n).
    void set_basis(std::int64_t kept, const double *y);

    // Squares of singular values, in the unit of w: what T cannot hold is an error before anything has changed.
    static void require_representable(const Work &w, const double *squares, std::int64_t count) {
        if (count > 0 && !(std::sqrt(squares[0]) * w.unit <= double(std::numeric_limits<T>::max())))
            throw ValueError("rows: the singular values overflow the dtype although the rows are finite; scale the data");
    }

    void commit(const Work &w, std::vector<double> &&sigma, bool first, double left_out);
    // Nothing but zeros so far.
    void commit_nothing(const Work &w);

    // The entry of largest magnitude of each row becomes positive.
    void canonical_signs();

    // The k leading right singular vectors (rows of y) and singular values of the rows x cols inner, k <= rows. Squaring
    // in double is exact enough for float (what it cannot resolve is below kDrop eps s_1); for double up to kSpread.
    void inner_svd(std::int64_t rows, std::int64_t cols, const double *inner, std::int64_t k, double *sigma, double *y) const;

    // sigma_i = ‖inner y_i‖. A solver's values carry some ten eps·s_1 each time, which a long double stream adds up; a
    // norm carries one. Order is restored where rounding swapped neighbours.
    static void rayleigh(std::int64_t rows, std::int64_t cols, const double *inner, std::int64_t k, double *sigma, double *y);

    bool robust(Work &w, const Rows<T> &dense);

    void householder(Work &w, const Rows<T> &dense);

    // More rows than columns: the block becomes n x n. Work memory some ten n².
    void tall(Work &w);
    void tall_gram(Work &w);
    void tall_qr(Work &w);
    void tall_commit(const Work &w, std::vector<double> &&sigma, double *y, double left_out);
    // In units of the largest entry, and once more from the start, where squares leave the range of double; false: no need.
    bool tall_again(Work &w, double total);
    // Rows [first, first + count) of [state; block], s_i v_i in double (from v + low) and the block as materialise makes it.
    void tall_rows(const Work &w, std::int64_t first, std::int64_t count, double *dst) const;

    // Rows [first, first + count) of a block and its extra row, as materialise() makes them, in a unit.
    static void part(const Rows<T> &x, std::int64_t first, std::int64_t count, T *dst, double unit);

    // ---- the basis at working precision -----------------------------------------------------------------------------

    void fold();

    // What readers see: the state where it is clean, else a copy that was folded. Reading changes nothing that later updates
    // start from: a fold rounds, and a stream may be read after every update.
    struct Shown {
        bool valid = false;
        Buffer<T> v;
        std::vector<double> s;
    } shown;
    void show();
    const T *basis() const { return clean ? v.data() : shown.v.data(); }
    const std::vector<double> &values() const { return clean ? s : shown.s; }

    // Components reported: the leading ones, by rank or by energy.
    std::int64_t reported() const {
        const std::vector<double> &s = values();
        const std::int64_t most = std::min(std::int64_t(s.size()), opt.rank);
        if (opt.energy <= 0.0) return most;
        if (s.empty()) return 0;
        const double top = s[0]; // in units of the first, so that squares of extreme values stay in range
        double total = dropped / top / top, sum = 0;
        for (const double x : s) total += (x / top) * (x / top);
        std::int64_t k = 0;
        while (k < most && sum < opt.energy * total) {
            sum += (s[std::size_t(k)] / top) * (s[std::size_t(k)] / top);
            ++k;
        }
        return k;
    }
    double captured() const {
        const std::vector<double> &s = values();
        double e = 0;
        for (std::int64_t i = 0, k = reported(); i < k; ++i) e += s[std::size_t(i)] * s[std::size_t(i)];
        return e;
    }
    double left_out() const {
        const std::vector<double> &s = values();
        double e = dropped;
        for (auto i = std::size_t(reported()); i < s.size(); ++i) e += s[i] * s[i];
        return e;
    }

    void downdate(MatrixView<const T> rows);
    void downdate_directions(const Rows<T> &x);

    void merge(Impl &o);
    void merge_directions(Impl &o);
    // Runs what works on (S, V) once moments have ended, and brings those back where it fails.
    template <class F> void without_moments(F &&f) {
        const Small was = small();
        end_moments();
        try {
            f();
        } catch (...) {
            moments = std::move(parked);
            moments.figures.solved = false;
            parked.clear();
            restore(was);
            throw;
        }
        parked.clear();
    }
};

} // namespace subspan
