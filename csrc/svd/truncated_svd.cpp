#include "subspan/truncated_svd.hpp"

#include "subspan/sizes.hpp"

#include "linalg/rows.hpp"
#include "linalg/syrk.hpp"
#include "subspan/eigh.hpp"
#include "subspan/factor.hpp"
#include "subspan/rng.hpp"
#include "linalg/sparse.hpp"

#include <limits>

namespace subspan {
namespace {

template <class T> double checked_norm(const Rows<T> &x) {
    double sum = 0;
    if (x.csr == nullptr) {
        sum = sum_of_squares(x.dense);
        if (std::isfinite(sum)) return sum;
    }
    require_finite(x, "A");
    if (x.csr != nullptr)
        for (std::int64_t p = x.csr->begin(0); p < x.csr->begin(x.csr->rows); ++p) sum += double(x.csr->values[p]) * double(x.csr->values[p]);
    return sum;
}

// The power of two that brings a matrix whose squares over- or underflow T near one; 1 for all others.
template <class T> double unit_for(double norm, double largest) {
    const double high = double(std::numeric_limits<T>::max()) * 1e-8, low = double(std::numeric_limits<T>::min()) * 1e8;
    if (largest == 0.0 || (norm < high && norm > low)) return 1.0;
    int e = 0;
    std::frexp(largest, &e);
    return std::ldexp(1.0, e);
}

// Enough for the next product: one pass of Cholesky QR keeps the span as long as the rows are numerically independent;
// where they are not, the careful route decides.
template <class T> void orthonormalise_roughly(MatrixView<T> x) {
    const std::int64_t l = x.rows;
    Frame frame;
    double *g = frame.take<double>(l * l), *inverse = frame.take<double>(l * l);
    T *w = frame.take<T>(l * l);
    RowBlocks<T> p(x.cols);
    p.add(x);
    gram(p, 0, g);
    if (cholesky(l, g, 64.0 * std::numeric_limits<T>::epsilon()) > 0) {
        lq_rows(x, nullptr);
        return;
    }
    invert_lower(l, g, inverse);
    for (std::int64_t i = 0; i < l * l; ++i) w[i] = T(inverse[i]);
    combine(w, p, x);
}

template <class T> void fill_random(const Philox &rng, std::int64_t first, std::int64_t count, T *out) {
    parallel_for((count + 65535) / 65536, [&](std::int64_t t) {
        const std::int64_t i0 = t * 65536, i1 = std::min(count, i0 + 65536);
        double v[4];
        for (std::int64_t i = i0; i < i1; i += 4) {
            rng.uniform4(std::uint64_t(first + i) / 4, v);
            for (std::int64_t j = i; j < std::min(i1, i + 4); ++j) out[j] = T(v[j - i]);
        }
    });
}

// out (count x width) = rows of W (count x l, double) times x (l x width).
template <class T> void rotate(const double *w, std::int64_t count, std::int64_t l, const T *x, std::int64_t width, T *out) {
    Frame frame;
    T *wt = frame.take<T>(count * l);
    for (std::int64_t i = 0; i < count * l; ++i) wt[i] = T(w[i]);
    combine(wt, RowBlocks<T>(width).add(MatrixView<const T>(x, l, width)), MatrixView<T>(out, count, width));
}

// Fills out.u, out.vh from their rows (k x m and k x n) with fixed signs.
template <class T> void finish(TruncatedSvd<T> &out, std::vector<T> &u_rows) {
    for (std::int64_t i = 0; i < out.k; ++i) {
        T *row = out.vh.data() + i * out.n;
        T best = 0;
        for (std::int64_t j = 0; j < out.n; ++j)
            if (std::abs(row[j]) > std::abs(best)) best = row[j];
        if (best < T(0)) {
            for (std::int64_t j = 0; j < out.n; ++j) row[j] = -row[j];
            if (!u_rows.empty())
                for (std::int64_t j = 0; j < out.m; ++j) u_rows[std::size_t(i * out.m + j)] *= T(-1);
        }
    }
    if (u_rows.empty()) return;
    out.u.resize(u_rows.size());
    transpose_rows(u_rows.data(), out.k, out.m, out.u.data());
}

template <class T>
TruncatedSvd<T> iterate(LinearOperator<T> &a, const TruncatedOptions &o, std::int64_t l, MatrixView<const T> initial, std::vector<double> &all) {
    const std::int64_t m = a.rows(), n = a.cols();
    TruncatedSvd<T> out;
    checked_product({l, std::max(m, n)}, "A with rank + oversample vectors");
    Buffer<T> x(l * n), y(l * m);
    const std::int64_t given = std::min(l, initial.rows);
    for (std::int64_t i = 0; i < given; ++i)
        for (std::int64_t j = 0; j < n; ++j) x.data()[i * n + j] = initial(i, j);
    fill_random(Philox{o.key}, (given * n + 3) / 4 * 4, (l - given) * n, x.data() + given * n);
    const MatrixView<T> xv(x.data(), l, n), yv(y.data(), l, m);
    a.apply(l, x.data(), y.data());
    for (std::int64_t i = 0; i < o.power_iterations; ++i) {
        orthonormalise_roughly(yv);
        a.adjoint(l, y.data(), x.data());
        orthonormalise_roughly(xv);
        a.apply(l, x.data(), y.data());
    }
    lq_rows(yv, nullptr);
    a.adjoint(l, y.data(), x.data());
    std::vector<double> lower(std::size_t(l * l)), u(std::size_t(l * l)), vt(std::size_t(l * l)), ut(std::size_t(l * l));
    all.assign(std::size_t(l), 0.0);
    lq_rows(xv, lower.data());
    small_svd(l, l, lower.data(), all.data(), u.data(), vt.data());
    for (std::int64_t i = 0; i < l; ++i)
        for (std::int64_t j = 0; j < l; ++j) ut[std::size_t(j * l + i)] = u[std::size_t(i * l + j)];
    out.m = m;
    out.n = n;
    out.k = l;
    std::vector<T> u_rows(std::size_t(l * m));
    out.vh.resize(std::size_t(l * n));
    rotate(ut.data(), l, l, y.data(), m, u_rows.data());
    rotate(vt.data(), l, l, x.data(), n, out.vh.data());
    out.u = std::move(u_rows); // still by rows: cut() transposes what stays
    return out;
}

// Seconds, about, of subspace iteration with l vectors, and of the second moments of the short side p, their leading eigenvectors
// and one step from there (Zen 5; ratios carry over).
template <class T> bool moments_are_cheaper(std::int64_t m, std::int64_t n, std::int64_t l, std::int64_t power) {
    const double p = double(std::min(m, n)), big = double(m) * double(n), half = sizeof(T) == 4 ? 5e-12 : 10e-12, steps = 2.0 * double(power) + 2.0;
    if (p > 4096.0) return false;
    const double step = half * (2.0 * big * double(l) + 3.0 * (double(m) + double(n)) * double(l) * double(l)) + 1.5e-6;
    return big * p * 10e-12 + 70e-12 * p * p * p + 1e-11 * p * p * double(l) + 4e-6 + 2.0 * step < steps * step;
}

template <class T> TruncatedSvd<T> cut(TruncatedSvd<T> &&d, const std::vector<double> &all, std::int64_t k, double unit) {
    d.k = k;
    d.s.resize(std::size_t(k));
    for (std::int64_t i = 0; i < k; ++i) d.s[std::size_t(i)] = T(all[std::size_t(i)] * unit);
    d.vh.resize(std::size_t(k * d.n));
    std::vector<T> u_rows(d.u.begin(), d.u.begin() + k * d.m);
    d.u.clear();
    finish(d, u_rows);
    return std::move(d);
}

// Rows that are orthonormal but for rounding, to working precision: Cholesky QR where that is needed.
template <class T> bool repair(MatrixView<T> x) {
    const std::int64_t k = x.rows;
    Frame frame;
    double *g = frame.take<double>(k * k), *inverse = frame.take<double>(k * k);
    T *w = frame.take<T>(k * k);
    const double good = 4.0 * std::numeric_limits<T>::epsilon() * std::sqrt(double(k));
    for (int pass = 0; pass < 4; ++pass) {
        RowBlocks<T> p(x.cols);
        p.add(x);
        gram(p, 0, g);
        double off = 0;
        for (std::int64_t i = 0; i < k; ++i)
            for (std::int64_t j = 0; j <= i; ++j) off = std::max(off, std::abs(g[i * k + j] - (i == j ? 1.0 : 0.0)));
        if (off <= good) return true;
        if (!(off < 0.5) || cholesky(k, g, 0.0) > 0) return false;
        invert_lower(k, g, inverse);
        for (std::int64_t i = 0; i < k * k; ++i) w[i] = T(inverse[i]);
        combine(w, p, x);
    }
    return false;
}

// From second moments of the short side, in double. While s_1 / s_k stays below 64 their squares hold all that is promised, and
// the vectors of the other side are products; else the leading l of the right ones are where one step of the iteration begins.
template <class T> class FromMoments {
  public:
    FromMoments(LinearOperator<T> &a, MatrixView<const T> dense, std::int64_t l)
        : a_(a), m_(dense.rows), n_(dense.cols), l_(l), wide_(dense.cols > dense.rows) {
        const auto tall = wide_ ? dense.transposed() : dense;
        const std::int64_t p = tall.cols, ld = moments_stride(p);
        Frame frame;
        double *c = frame.zeros<double>(ld * ld), *g = frame.take<double>(p * p), *values = frame.take<double>(l), *vectors = frame.take<double>(l * p);
        add_moments<T, double>(tall, nullptr, nullptr, c, nullptr, nullptr);
        for (std::int64_t i = 0; i < p; ++i) std::copy_n(c + i * ld, p, g + i * p);
        eigh_top<double>(p, l, g, values, vectors);
        short_.resize(std::size_t(l * p));
        std::transform(vectors, vectors + l * p, short_.begin(), [](double x) { return T(x); });
        for (std::int64_t i = 0; i < l; ++i) s_.push_back(std::sqrt(std::max(values[i], 0.0)));
    }
    const std::vector<double> &values() const { return s_; }
    bool direct(std::int64_t k, TruncatedSvd<T> &out) {
        if (k < 1 || !(s_[std::size_t(k - 1)] * 64.0 >= s_[0]) || s_[0] == 0.0) return false;
        const std::int64_t p = wide_ ? m_ : n_, length = wide_ ? n_ : m_;
        std::vector<T> other(std::size_t(k * length));
        if (wide_)
            a_.adjoint(k, short_.data(), other.data());
        else
            a_.apply(k, short_.data(), other.data());
        for (std::int64_t i = 0; i < k; ++i) {
            const T by = T(1.0 / s_[std::size_t(i)]);
            for (std::int64_t j = 0; j < length; ++j) other[std::size_t(i * length + j)] *= by;
        }
        if (!repair(MatrixView<T>(short_.data(), k, p)) || !repair(MatrixView<T>(other.data(), k, length))) return false;
        short_.resize(std::size_t(k * p));
        out.m = m_;
        out.n = n_;
        out.k = k;
        out.u = std::move(wide_ ? short_ : other); // by rows: cut() transposes
        out.vh = std::move(wide_ ? other : short_);
        return true;
    }
    void start(T *x) {
        if (!wide_) {
            std::copy(short_.begin(), short_.end(), x);
            return;
        }
        a_.adjoint(l_, short_.data(), x);
        orthonormalise_roughly(MatrixView<T>(x, l_, n_));
    }

  private:
    LinearOperator<T> &a_;
    std::int64_t m_, n_, l_;
    bool wide_;
    std::vector<T> short_; // singular vectors of the short side, as rows
    std::vector<double> s_;
};

} // namespace

template <class T> DenseOperator<T>::DenseOperator(MatrixView<const T> a) : a_(a) {
    Rows<T> rows;
    rows.dense = a;
    norm_ = checked_norm(rows);
    double largest = 1.0;
    if (unit_for<T>(norm_, 1.5) != 1.0) {
        largest = 0.0;
        for (std::int64_t i = 0; i < a.rows; ++i)
            for (std::int64_t j = 0; j < a.cols; ++j) largest = std::max(largest, std::abs(double(a(i, j))));
    }
    unit_ = unit_for<T>(norm_, largest);
    if (unit_ == 1.0) return;
    copy_.resize(std::size_t(a.rows * a.cols));
    for (std::int64_t i = 0; i < a.rows; ++i)
        for (std::int64_t j = 0; j < a.cols; ++j) copy_[std::size_t(i * a.cols + j)] = T(double(a(i, j)) / unit_);
    a_ = MatrixView<const T>(copy_.data(), a.rows, a.cols);
    norm_ = sum_of_squares(a_);
}
template <class T> void DenseOperator<T>::apply(std::int64_t count, const T *x, T *y) {
    gemm<T>(MatrixView<const T>(x, count, a_.cols), a_.transposed(), MatrixView<T>(y, count, a_.rows));
}
template <class T> void DenseOperator<T>::adjoint(std::int64_t count, const T *y, T *x) {
    gemm<T>(MatrixView<const T>(y, count, a_.rows), a_, MatrixView<T>(x, count, a_.cols));
}

template <class T> CsrOperator<T>::CsrOperator(const CsrView<T> &a) : a_(a) {
    check_csr(a, "A");
    Rows<T> rows;
    rows.csr = &a_;
    norm_ = checked_norm(rows);
    double largest = 0.0;
    const std::int64_t first = a_.begin(0), last = a_.begin(a_.rows);
    for (std::int64_t p = first; p < last; ++p) largest = std::max(largest, std::abs(double(a_.values[p])));
    unit_ = unit_for<T>(norm_, largest);
    if (unit_ != 1.0) {
        copy_.resize(std::size_t(last));
        for (std::int64_t p = first; p < last; ++p) copy_[std::size_t(p)] = T(double(a_.values[p]) / unit_);
        a_.values = copy_.data();
        norm_ = checked_norm(rows);
    }
    columns_of(a_, by_row_, start_, row_, value_);
}
template <class T> void CsrOperator<T>::apply(std::int64_t count, const T *x, T *y) {
    Buffer<T> xt(count * a_.cols), yt(count * a_.rows);
    transpose_rows(x, count, a_.cols, xt.data());
    const std::int64_t first = a_.begin(0);
    parallel_for((a_.rows + 255) / 256, [&](std::int64_t t) {
        for (std::int64_t i = t * 256; i < std::min(a_.rows, (t + 1) * 256); ++i) {
            const std::int64_t p = a_.begin(i);
            T *out = yt.data() + i * count;
            std::fill_n(out, count, T(0));
            gather_rows(count, a_.begin(i + 1) - p, a_.values + p, by_row_.data() + (p - first), xt.data(), out);
        }
    });
    transpose_rows(yt.data(), a_.rows, count, y);
}
template <class T> void CsrOperator<T>::adjoint(std::int64_t count, const T *y, T *x) {
    Buffer<T> xt(count * a_.cols), yt(count * a_.rows);
    transpose_rows(y, count, a_.rows, yt.data());
    parallel_for((a_.cols + 255) / 256, [&](std::int64_t t) {
        for (std::int64_t j = t * 256; j < std::min(a_.cols, (t + 1) * 256); ++j) {
            const std::int64_t p = start_[std::size_t(j)];
            T *out = xt.data() + j * count;
            std::fill_n(out, count, T(0));
            gather_rows(count, start_[std::size_t(j) + 1] - p, value_.data() + p, row_.data() + p, yt.data(), out);
        }
    });
    transpose_rows(xt.data(), a_.cols, count, x);
}

template <class T> TruncatedSvd<T> truncated_svd(LinearOperator<T> &a, const TruncatedOptions &o, MatrixView<const T> initial) {
    const std::int64_t m = a.rows(), n = a.cols(), full = std::min(m, n);
    o.check(full);
    if (initial.rows > 0 && initial.cols != n) throw ValueError("initial must have " + std::to_string(n) + " columns, got " + std::to_string(initial.cols));
    for (std::int64_t i = 0; i < initial.rows; ++i)
        for (std::int64_t j = 0; j < n; ++j)
            if (!std::isfinite(initial(i, j))) throw ValueError("initial must be finite, got NaN or infinity in row " + std::to_string(i));
    const bool adaptive = o.rank == 0;
    if (std::min(full, o.rank + std::min(o.oversample, full)) > 20000)
        throw ValueError("rank + oversample must be at most 20000 on the CPU, got " + std::to_string(o.rank + o.oversample));
    const double norm = o.energy > 0.0 ? a.squared_norm() : 0.0;
    if (o.energy > 0.0 && norm < 0.0) throw ValueError("energy needs the Frobenius norm, which an operator does not have; give rank or tol");
    const auto wanted = [&](const std::vector<double> &s, std::int64_t most) { return o.wanted(s.data(), most, norm); };
    std::vector<double> all;
    TruncatedSvd<T> out;
    if (!adaptive) {
        const std::int64_t l = std::min(full, o.rank + o.oversample);
        const auto *dense = a.dense();
        if (dense != nullptr && initial.rows == 0 && moments_are_cheaper<T>(m, n, l, o.power_iterations)) {
            FromMoments<T> moments(a, *dense, l);
            const std::int64_t k = wanted(moments.values(), std::min(o.rank, l));
            if (moments.direct(k, out)) return cut(std::move(out), moments.values(), k, a.unit());
            Buffer<T> x(l * n);
            moments.start(x.data());
            TruncatedOptions once = o;
            once.power_iterations = 0;
            out = iterate(a, once, l, MatrixView<const T>(x.data(), l, n), all);
        } else {
            out = iterate(a, o, l, initial, all);
        }
        return cut(std::move(out), all, wanted(all, std::min(o.rank, l)), a.unit());
    }
    std::int64_t l = o.first_try(full, initial.rows);
    MatrixView<const T> start = initial;
    TruncatedSvd<T> previous;
    for (;;) {
        out = iterate(a, o, l, start, all);
        const std::int64_t trusted = o.trusted(l, full), k = wanted(all, trusted);
        if (k < trusted || l == full) return cut(std::move(out), all, k, a.unit());
        previous = std::move(out);
        start = MatrixView<const T>(previous.vh.data(), l, n);
        l = std::min(full, 2 * l);
    }
}

namespace {

// Entries near one, by a power of two: its exponent.
int near_one(std::vector<double> &x) {
    double largest = 0;
    for (const double y : x) largest = std::max(largest, std::abs(y));
    int e = 0;
    if (largest > 0 && (largest < 1e-100 || largest > 1e100)) std::frexp(largest, &e);
    for (double &y : x)
        if (e != 0) y = std::ldexp(y, -e);
    return e;
}

template <class T> std::vector<T> values_of(const std::vector<double> &s, std::int64_t rank, int e) {
    std::vector<T> out(static_cast<std::size_t>(rank));
    for (std::int64_t i = 0; i < rank; ++i) {
        out[std::size_t(i)] = T(std::ldexp(s[std::size_t(i)], e));
        if (!std::isfinite(out[std::size_t(i)])) throw ValueError("a singular value overflows the dtype although the input is finite; scale it");
    }
    return out;
}

} // namespace

template <class T> TruncatedSvd<T> product_svd(MatrixView<const T> a, MatrixView<const T> b, std::int64_t rank) {
    const std::int64_t m = a.rows, p = a.cols, n = b.cols;
    if (b.rows != p) throw ValueError("B must have " + std::to_string(p) + " rows to follow A, got " + std::to_string(b.rows));
    const std::int64_t full = std::min({m, p, n});
    if (full < 1) throw ValueError("A and B must not be empty");
    if (rank < 0 || rank > full) throw ValueError("rank must be in [1, " + std::to_string(full) + "], got " + std::to_string(rank));
    if (rank == 0) rank = full;
    Rows<T> ra, rb;
    ra.dense = a;
    rb.dense = b;
    require_finite(ra, "A");
    require_finite(rb, "B");
    // A = Qaᵀ Ca and B = Cb Qb, with Q the identity where the factor is wider than long.
    const bool qa = p <= m, qb = p <= n;
    const std::int64_t ca_rows = qa ? p : m, cb_cols = qb ? p : n;
    Buffer<T> qa_rows(qa ? p * m : 0), qb_rows(qb ? p * n : 0);
    std::vector<double> ca(std::size_t(ca_rows * p)), cb(std::size_t(p * cb_cols)), inner(std::size_t(ca_rows * cb_cols));
    if (qa) {
        Rows<T> at;
        at.dense = a.transposed();
        materialise(at, qa_rows.data());
        std::vector<double> lower(std::size_t(p * p));
        lq_rows(MatrixView<T>(qa_rows.data(), p, m), lower.data());
        for (std::int64_t i = 0; i < p; ++i)
            for (std::int64_t j = 0; j < p; ++j) ca[std::size_t(i * p + j)] = lower[std::size_t(j * p + i)];
    } else {
        for (std::int64_t i = 0; i < m; ++i)
            for (std::int64_t j = 0; j < p; ++j) ca[std::size_t(i * p + j)] = double(a(i, j));
    }
    if (qb) {
        materialise(rb, qb_rows.data());
        lq_rows(MatrixView<T>(qb_rows.data(), p, n), cb.data());
    } else {
        for (std::int64_t i = 0; i < p; ++i)
            for (std::int64_t j = 0; j < n; ++j) cb[std::size_t(i * n + j)] = double(b(i, j));
    }
    const int e = near_one(ca) + near_one(cb);
    gemm<double>(MatrixView<const double>(ca.data(), ca_rows, p), MatrixView<const double>(cb.data(), p, cb_cols),
                 MatrixView<double>(inner.data(), ca_rows, cb_cols));
    const std::int64_t q = std::min(ca_rows, cb_cols);
    std::vector<double> s(static_cast<std::size_t>(q)), u(std::size_t(ca_rows * q)), vt(std::size_t(q * cb_cols));
    small_svd(ca_rows, cb_cols, inner.data(), s.data(), u.data(), vt.data());
    TruncatedSvd<T> out;
    out.m = m;
    out.n = n;
    out.k = rank;
    out.s = values_of<T>(s, rank, e);
    std::vector<double> ut(std::size_t(rank * ca_rows));
    for (std::int64_t i = 0; i < rank; ++i)
        for (std::int64_t j = 0; j < ca_rows; ++j) ut[std::size_t(i * ca_rows + j)] = u[std::size_t(j * q + i)];
    std::vector<T> u_rows(std::size_t(rank * m));
    out.vh.resize(std::size_t(rank * n));
    if (qa)
        rotate(ut.data(), rank, p, qa_rows.data(), m, u_rows.data());
    else
        std::transform(ut.begin(), ut.end(), u_rows.begin(), [](double x) { return T(x); });
    if (qb)
        rotate(vt.data(), rank, p, qb_rows.data(), n, out.vh.data());
    else
        std::transform(vt.begin(), vt.begin() + rank * n, out.vh.begin(), [](double x) { return T(x); });
    finish(out, u_rows);
    return out;
}

template <class T>
TruncatedSvd<T> merge_svd(MatrixView<const T> ua, const T *sa, MatrixView<const T> va, MatrixView<const T> ub, const T *sb, MatrixView<const T> vb,
                          std::int64_t rank) {
    const std::int64_t ka = va.rows, kb = vb.rows, q = ka + kb, n = va.cols;
    if (vb.cols != n) throw ValueError("b.Vh must have " + std::to_string(n) + " columns as a.Vh has, got " + std::to_string(vb.cols));
    const bool with_u = ua.data != nullptr && ub.data != nullptr;
    if (with_u && (ua.cols != ka || ub.cols != kb)) throw ValueError("U and Vh of a decomposition must have the same rank");
    const std::int64_t full = std::min(q, n);
    if (rank < 1 || rank > full) throw ValueError("rank must be in [1, " + std::to_string(full) + "], got " + std::to_string(rank));
    Buffer<T> x(q * n);
    for (std::int64_t i = 0; i < q; ++i) {
        const T s = i < ka ? sa[i] : sb[i - ka];
        for (std::int64_t j = 0; j < n; ++j) x.data()[i * n + j] = s * (i < ka ? va(i, j) : vb(i - ka, j));
    }
    Rows<T> check;
    check.dense = MatrixView<const T>(x.data(), q, n);
    require_finite(check, "S · Vh");
    for (const auto &[u, name] : {std::pair(ua, "a.U"), std::pair(ub, "b.U")}) {
        if (!with_u) break;
        Rows<T> left;
        left.dense = u;
        require_finite(left, name);
    }
    const bool reduced = q <= n && !(q > 80 && 4 * n < 5 * q); // a factor that is hardly smaller is not worth its price
    const std::int64_t c = reduced ? q : n;
    std::vector<double> inner(std::size_t(q * c)), s(std::size_t(std::min(q, c))), u(std::size_t(q * std::min(q, c))), vt(std::size_t(std::min(q, c) * c));
    if (reduced)
        lq_rows(MatrixView<T>(x.data(), q, n), inner.data());
    else
        std::transform(x.data(), x.data() + q * n, inner.begin(), [](T v) { return double(v); });
    const int e = near_one(inner);
    small_svd(q, c, inner.data(), s.data(), u.data(), vt.data());
    TruncatedSvd<T> out;
    out.m = with_u ? ua.rows + ub.rows : 0;
    out.n = n;
    out.k = rank;
    out.s = values_of<T>(s, rank, e);
    out.vh.resize(std::size_t(rank * n));
    if (reduced)
        rotate(vt.data(), rank, q, x.data(), n, out.vh.data());
    else
        std::transform(vt.begin(), vt.begin() + rank * n, out.vh.begin(), [](double v) { return T(v); });
    std::vector<T> u_rows;
    if (with_u) {
        // Rows of Uᵀ: (Uc[:ka, :rank])ᵀ Uaᵀ next to (Uc[ka:, :rank])ᵀ Ubᵀ.
        const std::int64_t p = std::min(q, c);
        std::vector<T> w(std::size_t(rank * q));
        for (std::int64_t i = 0; i < rank; ++i)
            for (std::int64_t j = 0; j < q; ++j) w[std::size_t(i * q + j)] = T(u[std::size_t(j * p + i)]);
        u_rows.resize(std::size_t(rank * out.m));
        gemm<T>(MatrixView<const T>(w.data(), rank, ka, q, 1), ua.transposed(), MatrixView<T>(u_rows.data(), rank, ua.rows, out.m, 1));
        gemm<T>(MatrixView<const T>(w.data() + ka, rank, kb, q, 1), ub.transposed(), MatrixView<T>(u_rows.data() + ua.rows, rank, ub.rows, out.m, 1));
    }
    finish(out, u_rows);
    return out;
}

#define SUBSPAN_INSTANTIATE(T)                                                                                                                                 \
    template class DenseOperator<T>;                                                                                                                           \
    template class CsrOperator<T>;                                                                                                                             \
    template TruncatedSvd<T> truncated_svd<T>(LinearOperator<T> &, const TruncatedOptions &, MatrixView<const T>);                                             \
    template TruncatedSvd<T> product_svd<T>(MatrixView<const T>, MatrixView<const T>, std::int64_t);                                                           \
    template TruncatedSvd<T> merge_svd<T>(MatrixView<const T>, const T *, MatrixView<const T>, MatrixView<const T>, const T *, MatrixView<const T>,            \
                                          std::int64_t);
SUBSPAN_INSTANTIATE(float)
SUBSPAN_INSTANTIATE(double)
#undef SUBSPAN_INSTANTIATE

} // namespace subspan
