// How the left singular vectors of a stream, which it does not keep, change with an update: A = U S V + 1 meanᵀ becomes
// [U past + shift; fresh] S' V' + 1 mean'ᵀ.
#include "subspan/streaming_svd.hpp"

#include "base/scratch.hpp"
#include "subspan/errors.hpp"
#include "subspan/gemm.hpp"

#include <algorithm>
#include <utility>

namespace subspan {
namespace {

using std::int64_t;

// The components in double, by columns: n x k.
template <class T> MatrixView<const double> right_vectors(Frame &frame, StreamingSvd<T> &s) {
    const int64_t k = s.rank(), n = s.features();
    double *v = frame.take<double>(k * n);
    std::copy_n(s.components(), k * n, v);
    return MatrixView<const double>(v, k, n).transposed();
}

} // namespace

template <class T> LeftRotation update_with_rotation(StreamingSvd<T> &stream, MatrixView<const T> rows) {
    const StreamingOptions &o = stream.options();
    if (!o.exact_blocks) throw ValueError("rotation=True needs a stream with exact_blocks=True: others keep directions beyond rank, and collect thin blocks");
    if (o.energy != 0.0) throw ValueError("rotation=True takes no energy: it turns all rank vectors, and energy shows fewer");
    if (o.center && o.forget != 1.0) throw ValueError("rotation=True with center needs forget=1: past rows of different weight would need different shifts");
    StreamingSvd<T> next = stream;
    next.update(rows);
    const int64_t n = next.features(), b = rows.rows, before = stream.features() == 0 ? 0 : stream.rank(), after = next.rank();
    LeftRotation r{before,
                   after,
                   b,
                   std::vector<double>(std::size_t(before * after)),
                   std::vector<double>(std::size_t(after), 0.0),
                   std::vector<double>(std::size_t(b * after))};
    Frame frame;
    const auto v = right_vectors(frame, next);
    const double *s = next.singular_values(), *mean = next.mean();
    double *x = frame.take<double>(b * n);
    for (int64_t i = 0; i < b; ++i)
        for (int64_t j = 0; j < n; ++j) x[i * n + j] = double(rows(i, j)) - (mean != nullptr ? mean[j] : 0.0);
    gemm<double>(MatrixView<const double>(x, b, n), v, MatrixView<double>(r.fresh.data(), b, after));
    if (before > 0) {
        const double *was = stream.singular_values();
        gemm<double>(right_vectors(frame, stream).transposed(), v, MatrixView<double>(r.past.data(), before, after));
        for (int64_t i = 0; i < before; ++i)
            for (int64_t j = 0; j < after; ++j) r.past[std::size_t(i * after + j)] *= o.forget * was[i];
    }
    if (stream.features() != 0 && mean != nullptr) {
        double *moved = frame.take<double>(n);
        for (int64_t j = 0; j < n; ++j) moved[j] = o.forget * (stream.mean()[j] - mean[j]);
        gemm<double>(MatrixView<const double>(moved, 1, n), v, MatrixView<double>(r.shift.data(), 1, after));
    }
    for (auto *part : {&r.past, &r.shift, &r.fresh})
        for (std::size_t i = 0; i < part->size(); ++i) (*part)[i] /= s[int64_t(i) % after];
    stream = std::move(next);
    return r;
}

template LeftRotation update_with_rotation<float>(StreamingSvd<float> &, MatrixView<const float>);
template LeftRotation update_with_rotation<double>(StreamingSvd<double> &, MatrixView<const double>);

} // namespace subspan
