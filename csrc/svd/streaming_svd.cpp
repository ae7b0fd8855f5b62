// The public face of StreamingSvd: checks of shapes, accessors and projections.
#include "subspan/streaming_svd.hpp"

#include "linalg/sparse.hpp"
#include "linalg/syrk.hpp"
#include "subspan/sizes.hpp"
#include "svd/streaming_impl.hpp"
#include "subspan/affine.hpp"

#include <algorithm>

namespace subspan {

template <class T> StreamingSvd<T>::StreamingSvd(const StreamingOptions &o) : impl_(new Impl(o)) {}
template <class T> StreamingSvd<T>::StreamingSvd(const StreamingSvd &o) : impl_(new Impl(o.impl_->opt)) {
    const Impl &from = *o.impl_;
    Impl &to = *impl_;
    if (from.n == 0) return;
    to.start(from.n);
    to.restore(from.small());
    std::copy_n(from.v.data(), from.r * from.n, to.v.data());
    std::copy_n(from.low.data(), from.r * from.n, to.low.data());
    if (from.waiting.data() != nullptr) std::copy_n(from.waiting.data(), from.waiting.capacity(), to.waiting.reserve(from.waiting.capacity()));
    to.csr_values = from.csr_values;
    to.csr_indices = from.csr_indices;
    to.csr_indptr = from.csr_indptr;
    to.moments = from.moments.copy(from.n);
    to.skip_moments = from.skip_moments;
    to.skip_again = from.skip_again;
    to.follower = from.follower;
    to.thin = from.thin;
}
template <class T> StreamingSvd<T>::StreamingSvd(StreamingSvd &&) noexcept = default;
template <class T> StreamingSvd<T> &StreamingSvd<T>::operator=(StreamingSvd &&) noexcept = default;
template <class T> StreamingSvd<T>::~StreamingSvd() = default;

template <class T> StreamingSvd<T>::StreamingSvd(const StreamingOptions &o, const StreamingState<T> &st) : impl_(new Impl(o)) {
    const auto bad = [](const std::string &what) { throw ValueError("saved state: " + what); };
    const auto r = std::int64_t(st.singular_values.size());
    if (st.features < 0 || st.rows_seen < 0 || st.rows_seen > kMostRows) bad("counts are out of range");
    if (st.features > 0) checked_product({impl_->kept_for(st.features), st.features}, "saved state: components of features");
    if (st.features > 0 && r > impl_->kept_for(st.features)) bad("more components than rank allows");
    if (std::int64_t(st.components.size()) != r * st.features) bad("components do not fit singular_values and features");
    if (std::int64_t(st.mean.size()) != (o.center ? st.features : 0)) bad("mean does not fit features");
    if (!(st.weight >= 0) || !(st.dropped >= 0) || !std::isfinite(st.weight) || !std::isfinite(st.dropped))
        bad("weight and dropped energy must be finite and not negative");
    for (std::size_t i = 0; i < st.singular_values.size(); ++i)
        if (!(st.singular_values[i] > 0) || !std::isfinite(st.singular_values[i]) || (i > 0 && st.singular_values[i] > st.singular_values[i - 1]))
            bad("singular values must be positive and descending");
    for (const T x : st.components)
        if (!std::isfinite(x)) bad("components must be finite");
    if (!st.scatter.empty() && std::int64_t(st.scatter.size()) != st.features) bad("scatter does not fit features");
    for (const double x : st.scatter)
        if (!(x >= 0)) bad("the scatter must not be negative");
    if (r > 0) { // what no stream has kept: see kDrift
        Frame frame;
        double *g = frame.take<double>(r * r);
        gram(RowBlocks<T>(st.features).add(MatrixView<const T>(st.components.data(), r, st.features)), 0, g);
        for (std::int64_t i = 0; i < r; ++i)
            for (std::int64_t j = 0; j <= i; ++j)
                if (!(std::abs(g[i * r + j] - (i == j ? 1.0 : 0.0)) <= kDrift * Impl::eps * std::sqrt(double(r)))) bad("components must be orthonormal");
    }
    if (!st.low.empty() && st.low.size() != st.components.size()) bad("low parts do not fit the components");
    for (std::size_t i = 0; i < st.low.size(); ++i)
        if (!(std::abs(st.low[i]) <= std::numeric_limits<T>::epsilon() * std::abs(st.components[i]) + std::numeric_limits<T>::min()))
            bad("low parts must be rounding of the components");
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
    impl_->scatter = st.scatter;
    impl_->seen = st.rows_seen;
    impl_->weight = st.weight;
    impl_->dropped = st.dropped;
    impl_->skip_gram = int(std::clamp<std::int64_t>(st.skip_gram, 0, 8));
    impl_->clean = false; // measured when somebody looks
    impl_->skip_moments = int(std::clamp<std::int64_t>(st.skip_moments, 0, 1 << 20));
    impl_->skip_again = int(std::clamp<std::int64_t>(st.skip_again, 0, 1 << 20));
    std::copy(st.components.begin(), st.components.end(), impl_->v.data());
    if (st.low.empty()) std::fill_n(impl_->low.data(), st.components.size(), T(0)); // of 0.1
    std::copy(st.low.begin(), st.low.end(), impl_->low.data());
    if (st.moments.empty()) return;
    const std::int64_t n = st.features, ld = moments_stride(n);
    const auto fits = [&](const std::vector<double> &x, std::int64_t count) {
        if (std::int64_t(x.size()) != count) bad("moments do not fit features");
        for (const double y : x)
            if (!std::isfinite(y)) bad("moments must be finite");
    };
    fits(st.moments, n * (n + 1) / 2);
    fits(st.moment_sum, n);
    fits(st.moment_shift, n);
    fits(st.moment_figures, 9);
    const std::int64_t rows = std::min(n, std::int64_t(st.moment_reference.size()) / n);
    fits(st.moment_reference, rows * n);
    auto &m = impl_->moments;
    const double *packed = st.moments.data();
    m.c.reserve(ld * ld);
    double largest = 0; // below zero by rounding at most
    for (std::int64_t i = 0, at = 0; i < n; at += ++i) largest = std::max(largest, packed[at + i]);
    for (std::int64_t i = 0; i < n; packed += ++i) {
        if (packed[i] < -1e-6 * largest) bad("moments must not be negative");
        std::copy_n(packed, i + 1, m.c.data() + i * ld);
    }
    for (const double x : st.moment_figures)
        if (x < 0.0) bad("bounds of moments must not be negative");
    m.sum = st.moment_sum;
    m.shift = st.moment_shift;
    m.figures.lost = st.moment_figures[0];
    m.figures.least = st.moment_figures[1];
    m.figures.most = st.moment_figures[2];
    m.figures.measured = st.moment_figures[3];
    m.figures.rounding = st.moment_figures[4];
    m.figures.since = st.moment_figures[5];
    m.figures.first = st.moment_figures[6] != 0.0;
    m.figures.factor = st.moment_figures[7];
    m.figures.narrow = st.moment_figures[8];
    if (!(m.figures.factor > 0.0)) bad("the factor of moments must be positive");
    m.reference = st.moment_reference;
    m.figures.solved = true;
    m.on = true;
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
    impl_->show();
    return impl_->reported();
}
template <class T> const double *StreamingSvd<T>::singular_values() {
    impl_->show();
    return impl_->values().data();
}
template <class T> const T *StreamingSvd<T>::components() {
    impl_->show();
    return impl_->basis();
}
template <class T> const double *StreamingSvd<T>::mean() {
    impl_->show();
    return impl_->opt.center && impl_->n > 0 ? impl_->mean.data() : nullptr;
}
template <class T> const double *StreamingSvd<T>::column_scatter() {
    impl_->show();
    return impl_->scatter.empty() ? nullptr : impl_->scatter.data();
}
template <class T> double StreamingSvd<T>::captured_energy() {
    impl_->show();
    return impl_->captured();
}
template <class T> double StreamingSvd<T>::residual_energy() {
    impl_->show();
    return impl_->left_out();
}
template <class T> const char *StreamingSvd<T>::last_route() const { return impl_->route; }

namespace {
void want(bool ok, const char *name, std::int64_t rows, std::int64_t cols, std::int64_t got_rows, std::int64_t got_cols) {
    if (!ok)
        throw ValueError(std::string(name) + " must have shape (" + str(rows) + ", " + str(cols) + "), got (" + str(got_rows) + ", " + str(got_cols) + ")");
}
} // namespace

template <class T> typename StreamingSvd<T>::Scores StreamingSvd<T>::scored_by(std::int64_t rows) {
    if (impl_->follows(rows)) {
        const auto &f = impl_->follower;
        return {f.v.data(), impl_->opt.center ? f.mean.data() : nullptr, std::min(f.k, impl_->opt.rank)};
    }
    const std::int64_t k = rank();
    return {impl_->basis(), mean(), k};
}

template <class T> std::int64_t StreamingSvd<T>::coordinates(std::int64_t rows) { return scored_by(rows).k; }

template <class T> void StreamingSvd<T>::project(MatrixView<const T> x, MatrixView<T> z) {
    const auto [v, about, k] = scored_by(x.rows);
    const std::int64_t n = impl_->n;
    want(x.cols == n, "X", x.rows, n, x.rows, x.cols);
    want(z.rows == x.rows && z.cols == k, "out", x.rows, k, z.rows, z.cols);
    affine_coordinates(x, about, v, k, z);
}

template <class T> void StreamingSvd<T>::project(const CsrView<T> &x, MatrixView<T> z) {
    check_csr(x, "X");
    const std::int64_t k = rank(), n = impl_->n;
    want(x.cols == n, "X", x.rows, n, x.rows, x.cols);
    want(z.rows == x.rows && z.cols == k, "out", x.rows, k, z.rows, z.cols);
    affine_coordinates(x, mean(), impl_->basis(), k, z);
}

template <class T> void StreamingSvd<T>::reconstruct(MatrixView<const T> z, MatrixView<T> x) {
    const auto [v, about, k] = scored_by(z.rows);
    const std::int64_t n = impl_->n;
    want(z.cols == k, "Z", z.rows, k, z.rows, z.cols);
    want(x.rows == z.rows && x.cols == n, "out", z.rows, n, x.rows, x.cols);
    affine_points(z, about, v, n, x);
}

template <class T> void StreamingSvd<T>::residual(MatrixView<const T> x, T *out) {
    const auto [v, about, k] = scored_by(x.rows);
    const std::int64_t n = impl_->n;
    want(x.cols == n, "X", x.rows, n, x.rows, x.cols);
    affine_residuals(x, about, v, k, out);
}

template <class T> void StreamingSvd<T>::residual(const CsrView<T> &x, T *out) {
    check_csr(x, "X");
    const std::int64_t k = rank(), n = impl_->n;
    want(x.cols == n, "X", x.rows, n, x.rows, x.cols);
    affine_residuals(x, mean(), impl_->basis(), k, out);
}

template <class T> StreamingState<T> StreamingSvd<T>::state() {
    impl_->fold();
    StreamingState<T> st;
    st.features = impl_->n;
    st.rows_seen = impl_->seen;
    st.weight = impl_->weight;
    st.dropped = impl_->dropped;
    st.skip_gram = impl_->skip_gram;
    st.skip_moments = impl_->skip_moments;
    st.skip_again = impl_->skip_again;
    st.singular_values = impl_->s;
    st.mean = impl_->mean;
    st.scatter = impl_->scatter;
    if (impl_->n > 0) {
        st.components.assign(impl_->v.data(), impl_->v.data() + impl_->r * impl_->n);
        st.low.assign(impl_->low.data(), impl_->low.data() + impl_->r * impl_->n);
    }
    const auto &m = impl_->moments;
    if (!m.on) return st;
    const std::int64_t n = impl_->n, ld = moments_stride(n);
    for (std::int64_t i = 0; i < n; ++i) st.moments.insert(st.moments.end(), m.c.data() + i * ld, m.c.data() + i * ld + i + 1);
    st.moment_sum = m.sum;
    st.moment_shift = m.shift;
    st.moment_figures = {m.figures.lost,  m.figures.least,         m.figures.most,   m.figures.measured, m.figures.rounding,
                         m.figures.since, double(m.figures.first), m.figures.factor, m.figures.narrow};
    st.moment_reference = m.reference;
    return st;
}

template class StreamingSvd<float>;
template class StreamingSvd<double>;

} // namespace subspan
