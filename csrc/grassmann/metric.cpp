#include "base/simd.hpp"
#include "subspan/errors.hpp"
#include "subspan/grassmann.hpp"
#include "subspan/gemm.hpp"
#include "subspan/parallel.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace subspan {
namespace {

using std::int64_t;

template <class T> struct InnerArgs {
    MatrixView<const T> a, b;
    double divide; // of the entries of both; 1 without
    double *sum;
};

template <class T> struct InnerKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(const InnerArgs<T> *p) {
        constexpr int lanes = 16; // independent sums, which the compiler turns into vectors
        const int64_t as = p->a.col_stride, bs = p->b.col_stride, n = p->a.cols;
        const double d = p->divide;
        double s[lanes] = {}, rest = 0;
        for (int64_t i = 0; i < p->a.rows; ++i) {
            const T *a = p->a.data + i * p->a.row_stride, *b = p->b.data + i * p->b.row_stride;
            int64_t j = 0;
            if (as == 1 && bs == 1 && d == 1)
                for (; j + lanes <= n; j += lanes)
                    for (int l = 0; l < lanes; ++l) s[l] += double(a[j + l]) * double(b[j + l]);
            for (; j < n; ++j) rest += (double(a[j * as]) / d) * (double(b[j * bs]) / d);
        }
        for (int l = 0; l < lanes; ++l) rest += s[l];
        *p->sum = rest;
    }
};

// As one row where both are contiguous in the same order, so that thin matrices have long rows as well.
template <class T> double sum_of_products(MatrixView<const T> a, MatrixView<const T> b, double divide) {
    if (a.row_stride == 1 && b.row_stride == 1) {
        a = a.transposed();
        b = b.transposed();
    }
    const auto whole = [](const MatrixView<const T> &x) { return x.col_stride == 1 && x.row_stride == x.cols; };
    if (whole(a) && whole(b)) {
        a = MatrixView<const T>(a.data, 1, a.rows * a.cols);
        b = MatrixView<const T>(b.data, 1, b.rows * b.cols);
    }
    double sum = 0;
    const InnerArgs<T> args{a, b, divide, &sum};
    simd::dispatch<InnerKernel<T>>(&args);
    return sum;
}

template <class T> double length(const MatrixView<const T> &x) {
    const double squared = sum_of_products(x, x, 1);
    // Squares that left the range of double, or came near its lower end: once more with entries of at most one.
    if (squared > 1e-280 && squared < 1e300) return std::sqrt(squared);
    double top = 0;
    for (int64_t i = 0; i < x.rows; ++i)
        for (int64_t j = 0; j < x.cols; ++j) {
            const double a = std::abs(double(x(i, j)));
            if (!(a <= std::numeric_limits<double>::max())) return a; // NaN and infinity go through
            top = std::max(top, a);
        }
    return top == 0 ? 0.0 : std::sqrt(sum_of_products(x, x, top)) * top;
}

template <class T, class F> void each(const StackView<T> &out, double items, F &&f) {
    const int64_t group = std::max<int64_t>(1, int64_t(65536 / std::max(1.0, items)));
    parallel_for((out.size() + group - 1) / group, [&](int64_t t) {
        for (int64_t i = t * group; i < std::min(out.size(), (t + 1) * group); ++i) out[i](0, 0) = T(f(i));
    });
}

} // namespace

template <class T> void tangent_inner(const StackView<const T> &h, const StackView<const T> &v, const StackView<T> &out) {
    each(out, double(h.rows()) * double(h.cols()), [&](int64_t i) { return sum_of_products<T>(h[i], v[i], 1); });
}

template <class T> void tangent_norm(const StackView<const T> &h, const StackView<T> &out) {
    each(out, double(h.rows()) * double(h.cols()), [&](int64_t i) { return length<T>(h[i]); });
}

template void tangent_inner<float>(const StackView<const float> &, const StackView<const float> &, const StackView<float> &);
template void tangent_inner<double>(const StackView<const double> &, const StackView<const double> &, const StackView<double> &);
template void tangent_norm<float>(const StackView<const float> &, const StackView<float> &);
template void tangent_norm<double>(const StackView<const double> &, const StackView<double> &);

} // namespace subspan
