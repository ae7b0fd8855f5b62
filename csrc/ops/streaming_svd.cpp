// The public face of StreamingSvd: checks of shapes, accessors and projections.
#include "subspan/streaming_svd.hpp"

#include "sparse.hpp"
#include "streaming_impl.hpp"
#include "subspan/panel.hpp"
#include "subspan/parallel.hpp"

#include <algorithm>

namespace subspan {

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
    impl_->seen = st.rows_seen;
    impl_->weight = st.weight;
    impl_->dropped = st.dropped;
    impl_->skip_gram = int(std::clamp<std::int64_t>(st.skip_gram, 0, 8));
    impl_->clean = false; // measured when somebody looks
    std::copy(st.components.begin(), st.components.end(), impl_->v.data());
    std::copy(st.low.begin(), st.low.end(), impl_->low.data());
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
    impl_->show();
    const std::int64_t n = impl_->n, k = impl_->reported();
    want(x.cols == n, "X", x.rows, n, x.rows, x.cols);
    want(z.rows == x.rows && z.cols == k, "out", x.rows, k, z.rows, z.cols);
    const auto shift = as_shift<T>(impl_->mean);
    with_rows(z, [&](MatrixView<T> rows) {
        gemm<T>(x, MatrixView<const T>(impl_->basis(), k, n).transposed(), rows, false,
                shift.empty() ? nullptr : shift.data());
    });
}

template <class T> void StreamingSvd<T>::project(const CsrView<T> &x, MatrixView<T> z) {
    impl_->show();
    check_csr(x, "X");
    const std::int64_t n = impl_->n, k = impl_->reported();
    want(x.cols == n, "X", x.rows, n, x.rows, x.cols);
    want(z.rows == x.rows && z.cols == k, "out", x.rows, k, z.rows, z.cols);
    const auto shift = as_shift<T>(impl_->mean);
    with_rows(z, [&](MatrixView<T> rows) {
        csr_times_rows(x, impl_->basis(), k, shift.empty() ? nullptr : shift.data(), rows);
    });
}

template <class T> void StreamingSvd<T>::reconstruct(MatrixView<const T> z, MatrixView<T> x) {
    impl_->show();
    const std::int64_t n = impl_->n, k = impl_->reported();
    want(z.cols == k, "Z", z.rows, k, z.rows, z.cols);
    want(x.rows == z.rows && x.cols == n, "out", z.rows, n, x.rows, x.cols);
    const auto shift = as_shift<T>(impl_->mean);
    with_rows(x, [&](MatrixView<T> rows) {
        gemm<T>(z, MatrixView<const T>(impl_->basis(), k, n), rows);
        if (!shift.empty())
            parallel_for(rows.rows, [&](std::int64_t i) {
                T *row = rows.data + i * rows.row_stride;
                for (std::int64_t j = 0; j < n; ++j) row[j] += shift[std::size_t(j)];
            });
    });
}

template <class T> void StreamingSvd<T>::residual(MatrixView<const T> x, T *out) {
    impl_->show();
    const std::int64_t n = impl_->n, k = impl_->reported(), step = 64;
    want(x.cols == n, "X", x.rows, n, x.rows, x.cols);
    const auto shift = as_shift<T>(impl_->mean);
    const MatrixView<const T> v(impl_->basis(), k, n);
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
    st.skip_gram = impl_->skip_gram;
    st.singular_values = impl_->s;
    st.mean = impl_->mean;
    if (impl_->n > 0) {
        st.components.assign(impl_->v.data(), impl_->v.data() + impl_->r * impl_->n);
        st.low.assign(impl_->low.data(), impl_->low.data() + impl_->r * impl_->n);
    }
    return st;
}

template class StreamingSvd<float>;
template class StreamingSvd<double>;

} // namespace subspan
