#include "subspan/frequent_directions.hpp"

#include "linalg/rows.hpp"
#include "linalg/sparse.hpp"
#include "subspan/eigh.hpp"
#include "subspan/sizes.hpp"

namespace subspan {
namespace {

constexpr std::int64_t kMostRows = std::int64_t(1) << 62;

// A shrink in the middle of an update must not fail: squares of the buffer stay within double, entries of the sketch within T.
template <class T> void require_range(double squared_norm) {
    const double most = double(std::numeric_limits<T>::max()) / 4;
    if (!(squared_norm < std::numeric_limits<double>::max() / 4 && std::sqrt(squared_norm) < most))
        throw ValueError("rows: their squared norm overflows the dtype; scale the data");
}

template <class T> double squares(const CsrView<T> &x) {
    double sum = 0;
    for (std::int64_t p = x.begin(0); p < x.begin(x.rows); ++p) sum += double(x.values[p]) * double(x.values[p]);
    return sum;
}

// W (k x m, orthonormal rows) becomes what it changes: row i of W is e_p + Ω_i, where p = partner[i] is the row of the buffer
// that it mostly is, if there is one. A stream of shrinks changes its rows less and less, and what rounding does to Ω is
// relative to Ω, where what it does to W would add up: as the root of their number, or faster.
void rotation_of(std::int64_t m, std::int64_t k, double *w, std::int64_t *partner) {
    for (std::int64_t i = 0; i < k; ++i) {
        double *row = w + i * m;
        std::int64_t p = 0;
        for (std::int64_t j = 1; j < m; ++j)
            if (std::abs(row[j]) > std::abs(row[p])) p = j;
        partner[i] = row[p] * row[p] > 0.6 ? p : -1; // of one row at most
        if (partner[i] < 0) continue;
        if (row[p] < 0)
            for (std::int64_t j = 0; j < m; ++j) row[j] = -row[j];
        row[p] -= 1.0;
    }
    // What the rows lack of orthonormality, from Ω, and half of it off: a Newton step.
    Frame frame;
    double *defect = frame.take<double>(k * k), *moved = frame.take<double>(k * m);
    const MatrixView<const double> change(w, k, m);
    gemm<double>(change, change.transposed(), MatrixView<double>(defect, k, k));
    for (std::int64_t i = 0; i < k; ++i)
        for (std::int64_t j = 0; j < k; ++j) {
            double &e = defect[i * k + j];
            if (partner[j] >= 0) e += w[i * m + partner[j]];
            if (partner[i] >= 0) e += w[j * m + partner[i]];
            e = -0.5 * (i == j && partner[i] < 0 ? e - 1.0 : e);
        }
    gemm<double>(MatrixView<const double>(defect, k, k), change, MatrixView<double>(moved, k, m));
    for (std::int64_t i = 0; i < k; ++i)
        for (std::int64_t j = 0; j < k; ++j)
            if (partner[j] >= 0) moved[i * m + partner[j]] += defect[i * k + j];
    for (std::int64_t i = 0; i < k * m; ++i) w[i] += moved[i];
}

} // namespace

template <class T> FrequentDirections<T>::FrequentDirections(std::int64_t size, std::int64_t features) : size_(size), n_(features) {
    if (features < 1) throw ValueError("n_features must be at least 1, got " + std::to_string(features));
    if (size < 1) throw ValueError("size must be at least 1, got " + std::to_string(size));
    // The Gram matrix of the buffer has (2 size)² doubles.
    if (size > std::int64_t(1) << 28) throw ValueError("size must be at most 2^28, got " + std::to_string(size));
    rows_.assign(std::size_t(checked_product({2 * size, features}, "a sketch of size rows twice by n_features")), 0.0);
    low_.assign(rows_.size(), 0.0);
}

template <class T> void FrequentDirections<T>::shrink() {
    // Back to at most size - 1 rows, or size when nothing has to be given up: subtract the size-th squared singular
    // value from all. The rows become D Wᵀ B, with W from the Gram matrix of the buffer.
    const std::int64_t m = used_, k = std::min(m, size_);
    if (m == 0) return;
    Frame frame;
    double *g = frame.take<double>(m * m), *l = frame.take<double>(k);
    double *w = frame.take<double>(k * m);
    gram(RowBlocks<double>(n_).add(MatrixView<const double>(rows_.data(), m, n_)), 0, g);
    double trace = 0;
    for (std::int64_t i = 0; i < m; ++i) trace += g[i * m + i];
    eigh_top<double>(m, k, g, l, w);
    std::int64_t *partner = frame.take<std::int64_t>(k);
    rotation_of(m, k, w, partner);
    double top = 0;
    for (std::int64_t i = 0; i < k; ++i) top += std::max(l[i], 0.0);
    // Nothing beyond `size` directions: keep them all.
    constexpr double eps = std::numeric_limits<double>::epsilon();
    const bool lossless = m <= size_ || trace - top <= 4.0 * double(m) * eps * l[0];
    const double delta = lossless ? 0.0 : std::max(l[k - 1], 0.0);
    double *rot = frame.zeros<double>(k * m);
    std::int64_t kept = 0;
    for (std::int64_t i = 0; i < k; ++i) {
        const double left = l[i] - delta;
        if (!(left > eps * l[0] * 1e-3)) break;
        const double f = std::sqrt(left / l[i]);
        for (std::int64_t j = 0; j < m; ++j) rot[i * m + j] = f * w[i * m + j];
        if (partner[i] >= 0) rot[i * m + partner[i]] -= (delta / l[i]) / (1.0 + f); // f - 1
        ++kept;
    }
    // Aside, and then in one step: an interrupt leaves the rows as they were.
    std::vector<double> fresh(rows_.size(), 0.0), rest(low_.size(), 0.0);
    combine(rot, RowBlocks<double>(n_).add(MatrixView<const double>(rows_.data(), m, n_)), MatrixView<double>(fresh.data(), kept, n_));
    for (std::int64_t i = 0; i < kept; ++i) {
        if (partner[i] < 0) continue;
        const double *high = rows_.data() + partner[i] * n_, *low = low_.data() + partner[i] * n_;
        double *to = fresh.data() + i * n_, *to_low = rest.data() + i * n_;
        for (std::int64_t j = 0; j < n_; ++j) { // Knuth's two-sum of a row and how it changes
            const double h = high[j], t = low[j] + to[j], sum = h + t, back = sum - h;
            to_low[j] = (h - (sum - back)) + (t - back);
            to[j] = sum;
        }
    }
    rows_.swap(fresh);
    low_.swap(rest);
    used_ = kept;
    // Directions that were cut off entirely may hold up to max(delta, what rounding hid).
    bound_ += lossless ? std::max(0.0, trace - top) : delta;
}

// Runs f, which appends so many rows; where that throws, all is as it was before. Rows are written behind those in use, so
// that a copy is needed only where the buffer will shrink.
template <class T> template <class F> void FrequentDirections<T>::attempt(std::int64_t count, F &&f) {
    const std::int64_t used = used_, seen = seen_, saved = count > 2 * size_ - used_ ? used_ * n_ : 0;
    const double bound = bound_, norm = norm_;
    const std::vector<double> before(rows_.begin(), rows_.begin() + saved), below(low_.begin(), low_.begin() + saved);
    try {
        f();
    } catch (...) {
        std::copy(before.begin(), before.end(), rows_.begin());
        std::copy(below.begin(), below.end(), low_.begin());
        used_ = used;
        seen_ = seen;
        bound_ = bound;
        norm_ = norm;
        throw;
    }
}

template <class T> void FrequentDirections<T>::settle() {
    if (used_ > size_) shrink();
}

template <class T> template <class S> void FrequentDirections<T>::append(MatrixView<const S> rows, const double *low) {
    for (std::int64_t i = 0; i < rows.rows;) {
        if (used_ == 2 * size_) shrink();
        const std::int64_t take = std::min(rows.rows - i, 2 * size_ - used_);
        double *into = rows_.data() + used_ * n_;
        for (std::int64_t p = 0; p < take; ++p)
            for (std::int64_t j = 0; j < n_; ++j) into[p * n_ + j] = double(rows(i + p, j));
        if (low != nullptr)
            std::copy_n(low + i * n_, take * n_, low_.data() + used_ * n_);
        else
            std::fill_n(low_.data() + used_ * n_, take * n_, 0.0);
        norm_ += sum_of_squares(MatrixView<const double>(into, take, n_));
        used_ += take;
        i += take;
    }
}

template <class T> void FrequentDirections<T>::update(MatrixView<const T> rows) {
    if (rows.cols != n_) throw ValueError("rows must have " + std::to_string(n_) + " columns, got " + std::to_string(rows.cols));
    if (rows.rows < 1) throw ValueError("rows must hold at least one row, got an empty block");
    if (rows.rows > kMostRows - seen_) throw ValueError("rows: a sketch counts up to 2^62 rows");
    Rows<T> x;
    x.dense = rows;
    require_finite(x, "rows");
    require_range<T>(norm_ + sum_of_squares(rows));
    attempt(rows.rows, [&] {
        append(rows);
        seen_ += rows.rows;
    });
}

template <class T> void FrequentDirections<T>::update(const CsrView<T> &rows) {
    if (rows.cols != n_) throw ValueError("rows must have " + std::to_string(n_) + " columns, got " + std::to_string(rows.cols));
    if (rows.rows < 1) throw ValueError("rows must hold at least one row, got an empty block");
    if (rows.rows > kMostRows - seen_) throw ValueError("rows: a sketch counts up to 2^62 rows");
    check_csr(rows, "rows");
    Rows<T> x;
    x.csr = &rows;
    require_finite(x, "rows");
    require_range<T>(norm_ + squares(rows));
    // A block of the buffer's size at a time: memory stays size x n however long the matrix is.
    Buffer<T> dense(checked_product({std::min(rows.rows, size_), n_}, "rows"));
    attempt(rows.rows, [&] {
        for (std::int64_t i = 0; i < rows.rows; i += size_) {
            const CsrView<T> part = slice_rows(rows, i, std::min(size_, rows.rows - i));
            Rows<T> block;
            block.csr = &part;
            materialise(block, dense.data());
            append(MatrixView<const T>(dense.data(), part.rows, n_));
        }
        seen_ += rows.rows;
    });
}

template <class T> void FrequentDirections<T>::merge(const FrequentDirections &o) {
    if (o.n_ != n_) throw ValueError("merge: other has " + std::to_string(o.n_) + " columns, this sketch has " + std::to_string(n_));
    require_range<T>(norm_ + o.norm_);
    const std::vector<double> theirs(o.rows_.begin(), o.rows_.begin() + o.used_ * n_);
    const std::vector<double> rest(o.low_.begin(), o.low_.begin() + o.used_ * n_);
    const double norm = norm_ + o.norm_, bound = o.bound_;
    const std::int64_t seen = o.seen_, used = o.used_;
    if (seen > kMostRows - seen_) throw ValueError("merge: a sketch counts up to 2^62 rows");
    attempt(used, [&] {
        append(MatrixView<const double>(theirs.data(), used, n_), rest.data());
        bound_ += bound;
        norm_ = norm;
        seen_ += seen;
    });
}

template <class T> void FrequentDirections<T>::sketch(MatrixView<T> out) {
    if (out.rows != size_ || out.cols != n_) throw ValueError("out must have shape (" + std::to_string(size_) + ", " + std::to_string(n_) + ")");
    settle();
    for (std::int64_t i = 0; i < size_; ++i)
        for (std::int64_t j = 0; j < n_; ++j) out(i, j) = i < used_ ? T(rows_[std::size_t(i * n_ + j)]) : T(0);
}

template <class T> void FrequentDirections<T>::restore(std::int64_t used, const double *rows, const double *low, double bound, double norm, std::int64_t seen) {
    if (used < 0 || used > 2 * size_ || !(bound >= 0) || !(norm >= 0) || seen < 0 || seen > kMostRows)
        throw ValueError("saved sketch: counts or bounds are out of range");
    std::fill(rows_.begin(), rows_.end(), 0.0);
    std::fill(low_.begin(), low_.end(), 0.0);
    std::copy_n(rows, used * n_, rows_.begin());
    if (low != nullptr) std::copy_n(low, used * n_, low_.begin());
    used_ = used;
    bound_ = bound;
    norm_ = norm;
    seen_ = seen;
}

template class FrequentDirections<float>;
template class FrequentDirections<double>;

} // namespace subspan
