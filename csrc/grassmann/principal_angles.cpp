#include "subspan/principal_angles.hpp"

#include "linalg/packed_gram.hpp"
#include "grassmann/point_step.hpp"
#include "base/scratch.hpp"
#include "linalg/small_dense.hpp"
#include "subspan/eigh.hpp"
#include "subspan/errors.hpp"
#include "subspan/parallel.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>

namespace subspan {
namespace {

using std::int64_t;

// Singular values of r (n x k) to an absolute error of a few eps of the largest: from the Gram matrix while they are of
// one size, by QR otherwise, which an eigenvalue of the Gram matrix cannot tell from zero below √eps.
template <class T> void singular_values(MatrixView<const T> r, double *s, double *yt) {
    const int64_t k = r.cols, all = small::area(k);
    Frame frame;
    PackedBlock<T> packed(frame, r.rows, k, 1);
    const unsigned wanted[1] = {1u};
    packed.gram(&r, wanted);
    double *g = frame.take<double>(all);
    packed.block(0, 0, g);
    if (k <= 32) {
        small::svd(k, g, s, nullptr, yt, grassmann::kSvd<T>);
    } else { // it is symmetric
        const int64_t ld = small::order(k);
        double *dense = frame.take<double>(k * k), *vectors = frame.take<double>(k * k);
        for (int64_t i = 0; i < k; ++i) std::copy_n(g + i * ld, k, dense + i * k);
        eigh_top<double>(k, yt != nullptr ? k : 1, dense, s, vectors, yt != nullptr ? nullptr : vectors + k);
        for (int64_t i = 0; i < k && yt == nullptr; ++i) s[i] = vectors[2 * k - 1 - i];
        for (int64_t i = 0; i < k; ++i) s[i] = std::max(s[i], 0.0);
        if (yt != nullptr) std::fill_n(yt, all, 0.0);
        for (int64_t i = 0; i < k && yt != nullptr; ++i) std::copy_n(vectors + i * k, k, yt + i * ld);
    }
    if (s[k - 1] >= 0.01 * s[0] && s[k - 1] > 1e3 * double(std::numeric_limits<T>::min())) {
        for (int64_t i = 0; i < k; ++i) s[i] = std::sqrt(s[i]);
        return;
    }
    const MatrixView<T> q(frame.take<T>(r.rows * k), r.rows, k);
    double *x = frame.take<double>(all), *y = yt != nullptr ? yt : frame.take<double>(all);
    grassmann::tangent_svd<T>(r, q, s, x, y);
}

// theta ascending; vectors only when p and q are given.
template <class T>
void angles_one(MatrixView<const T> u, MatrixView<const T> w, double *theta, const MatrixView<T> *p, const MatrixView<T> *q, Checks checks, int64_t item,
                const MatrixView<const T> *next, int next_count) {
    const int64_t n = u.rows, k = u.cols, ld = small::order(k), all = small::area(k);
    Frame frame;
    PackedBlock<T> packed(frame, n, k, 2);
    const MatrixView<const T> operands[2] = {u, w};
    const bool check = checks != Checks::none;
    const unsigned wanted[2] = {check ? 3u : 2u, check ? 2u : 0u};
    packed.ahead(next, next_count);
    packed.gram(operands, wanted);
    double *m = frame.take<double>(5 * all), *xt = m + all, *yt = m + 2 * all, *a = m + 3 * all, *b = m + 4 * all;
    double *c = frame.take<double>(k), *s = frame.take<double>(k);
    if (check) {
        packed.block(0, 0, a);
        grassmann::require_orthonormal<T>(k, a, "U", item);
        packed.block(1, 1, a);
        grassmann::require_orthonormal<T>(k, a, "W", item);
    }
    packed.block(0, 1, m);
    double sum = 0;
    for (int64_t i = 0; i < all; ++i) sum += m[i] * m[i];
    if (!std::isfinite(sum)) throw ValueError("matrix " + std::to_string(item) + " of U or W holds NaN or infinity");
    const bool vectors = p != nullptr;
    const bool some_small = sum > 0.49; // otherwise no cosine is near √½
    if (vectors || !some_small || k <= 80) {
        small::svd(k, m, c, vectors ? xt : nullptr, vectors || some_small ? yt : nullptr, grassmann::kSvd<T>);
    } else { // any basis of the directions of small angles will do, and MᵀM has one: half of the price of the SVD's own
        Frame inner;
        double *dense = inner.take<double>(k * k), *squares = inner.take<double>(k), *rows = inner.take<double>(k * k);
        small::svd(k, m, c, nullptr, nullptr, grassmann::kSvd<T>);
        small::multiply_tn(k, m, m, a);
        for (int64_t i = 0; i < k; ++i) std::copy_n(a + i * ld, k, dense + i * k);
        eigh_top<double>(k, k, dense, squares, rows);
        std::fill_n(yt, all, 0.0);
        for (int64_t i = 0; i < k; ++i) std::copy_n(rows + i * k, k, yt + i * ld);
    }
    int64_t count = 0; // cosines above √½ come first
    while (some_small && count < k && c[count] > 0.70710678118654752) ++count;
    for (int64_t i = count; i < k; ++i) theta[i] = std::acos(std::min(c[i], 1.0));
    double *zt = frame.take<double>(all);
    if (count > 0) {
        Frame inner;
        small::transpose(k, yt, b);
        small::multiply(k, m, b, a);
        for (int64_t i = 0; i < all; ++i) a[i] = -a[i];
        const MatrixView<T> r(inner.take<T>(n * count), n, count);
        const double *coefficients[2] = {a, b};
        packed.apply(operands, coefficients, r);
        singular_values<T>(r, s, vectors ? zt : nullptr);
        for (int64_t i = 0; i < count; ++i) theta[i] = std::asin(std::min(1.0, s[count - 1 - i]));
    }
    if (!vectors) {
        std::sort(theta, theta + k); // both kinds meet at π/4, where rounding may mix them
        return;
    }
    // Directions of the small angles are turned to the singular vectors of the sines, which tell angles apart that share a
    // cosine; x follows as M y / cos.
    const int64_t lz = small::order(count);
    for (int64_t i = 0; i < count; ++i) {
        double *y = a + i * ld;
        std::fill_n(y, ld, 0.0);
        for (int64_t j = 0; j < count; ++j)
            for (int64_t l = 0; l < k; ++l) y[l] += zt[(count - 1 - i) * lz + j] * yt[j * ld + l];
    }
    for (int64_t i = 0; i < count; ++i) {
        std::copy_n(a + i * ld, ld, yt + i * ld);
        double *x = xt + i * ld;
        const double cosine = std::cos(theta[i]);
        for (int64_t l = 0; l < k; ++l) {
            double dot = 0;
            for (int64_t j = 0; j < k; ++j) dot += m[l * ld + j] * yt[i * ld + j];
            x[l] = dot / cosine;
        }
    }
    int64_t *at = frame.take<int64_t>(k);
    std::iota(at, at + k, int64_t(0));
    std::sort(at, at + k, [&](int64_t i, int64_t j) { return theta[i] < theta[j] || (theta[i] == theta[j] && i < j); });
    std::fill_n(a, all, 0.0);
    std::fill_n(b, all, 0.0);
    for (int64_t i = 0; i < k; ++i)
        for (int64_t l = 0; l < k; ++l) {
            a[l * ld + i] = xt[at[i] * ld + l];
            b[l * ld + i] = yt[at[i] * ld + l];
        }
    std::sort(theta, theta + k);
    const double *first[2] = {a, nullptr}, *second[2] = {nullptr, b};
    packed.apply2(operands, first, *p, second, *q);
}

double distance_of(int64_t k, const double *theta, Distance kind) {
    double sum = 0;
    switch (kind) {
    case Distance::geodesic:
        for (int64_t i = 0; i < k; ++i) sum += theta[i] * theta[i];
        return std::sqrt(sum);
    case Distance::chordal:
        for (int64_t i = 0; i < k; ++i) sum += std::sin(theta[i]) * std::sin(theta[i]);
        return std::sqrt(sum);
    case Distance::projection: return k > 0 ? std::sin(theta[k - 1]) : 0.0;
    case Distance::procrustes:
        for (int64_t i = 0; i < k; ++i) sum += std::sin(0.5 * theta[i]) * std::sin(0.5 * theta[i]);
        return 2.0 * std::sqrt(sum);
    case Distance::fubini_study:
    case Distance::binet_cauchy: break;
    }
    // The product of cosines through logarithms of 1 - sin²: a product near one has lost the angles.
    for (int64_t i = 0; i < k; ++i) {
        const double cosine = std::cos(theta[i]);
        sum += theta[i] < 0.5 ? std::log1p(-std::sin(theta[i]) * std::sin(theta[i])) : 2.0 * std::log(cosine);
    }
    const double sine = std::sqrt(0.0 - std::expm1(sum));
    return kind == Distance::binet_cauchy ? sine : std::atan2(sine, std::exp(0.5 * sum));
}

} // namespace

template <class T>
void principal_angles(const StackView<const T> &u, const StackView<const T> &w, const StackView<T> &angles, const StackView<T> *p, const StackView<T> *q,
                      Checks checks) {
    const int64_t k = u.cols();
    grassmann::check_shape(u.rows(), k);
    grassmann::check_same<T>(u, w, "w");
    if (p != nullptr) {
        grassmann::check_same<T>(u, *p, "p");
        grassmann::check_same<T>(u, *q, "q");
    }
    if (k == 0) return;
    grassmann::for_each(u.size(), [&](int64_t i, int64_t next) {
        Frame frame;
        const MatrixView<const T> ahead[2] = {u[next], w[next]};
        double *theta = frame.take<double>(k);
        MatrixView<T> pi, qi;
        if (p != nullptr) {
            pi = (*p)[i];
            qi = (*q)[i];
        }
        angles_one<T>(u[i], w[i], theta, p != nullptr ? &pi : nullptr, p != nullptr ? &qi : nullptr, checks, i, ahead, next > i ? 2 : 0);
        const auto out = angles[i];
        for (int64_t j = 0; j < k; ++j) out(0, j) = T(theta[j]);
    });
}

template <class T> void subspace_distance(const StackView<const T> &u, const StackView<const T> &w, Distance kind, const StackView<T> &out, Checks checks) {
    const int64_t k = u.cols();
    grassmann::check_shape(u.rows(), k);
    grassmann::check_same<T>(u, w, "w");
    grassmann::for_each(u.size(), [&](int64_t i, int64_t next) {
        Frame frame;
        const MatrixView<const T> ahead[2] = {u[next], w[next]};
        double *theta = frame.take<double>(k);
        if (k > 0) angles_one<T>(u[i], w[i], theta, nullptr, nullptr, checks, i, ahead, next > i ? 2 : 0);
        out[i](0, 0) = T(distance_of(k, theta, kind));
    });
}

#define SUBSPAN_INSTANTIATE(T)                                                                                                                                 \
    template void principal_angles<T>(const StackView<const T> &, const StackView<const T> &, const StackView<T> &, const StackView<T> *,                      \
                                      const StackView<T> *, Checks);                                                                                           \
    template void subspace_distance<T>(const StackView<const T> &, const StackView<const T> &, Distance, const StackView<T> &, Checks);
SUBSPAN_INSTANTIATE(float)
SUBSPAN_INSTANTIATE(double)
#undef SUBSPAN_INSTANTIATE

} // namespace subspan
