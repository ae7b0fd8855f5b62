// One class: the step from U along H that retractions, the exponential map and the optimisers share.
#pragma once

#include "linalg/packed_gram.hpp"
#include "subspan/errors.hpp"
#include "subspan/grassmann.hpp"
#include "subspan/parallel.hpp"
#include "subspan/views.hpp"

#include <algorithm>
#include <cstdint>
#include <string>

namespace subspan::grassmann {

using std::int64_t;

/// body(i, next) for every matrix of a stack, on all threads; next is the one that the same thread takes after it, or i. A
/// thread takes a few in a row, so that it can ask for the memory of the next one in time.
template <class F> void for_each(int64_t items, const F &body) {
    if (items == 1) return body(0, 0);
    const int64_t run = std::clamp<int64_t>(items / (4 * num_threads()), 1, 16);
    parallel_for((items + run - 1) / run, [&](int64_t r) {
        const int64_t end = std::min((r + 1) * run, items);
        for (int64_t i = r * run; i < end; ++i) body(i, std::min(i + 1, end - 1));
    });
}

/// Accuracy of singular values of k x k products of T.
template <class T> inline constexpr double kSvd = sizeof(T) == 4 ? 1e-10 : 0.0;

/// ValueError unless n x k matrices can be orthonormal.
void check_shape(int64_t n, int64_t k);

/// ValueError unless x is a stack of the shape of u.
template <class T, class X> void check_same(const StackView<const T> &u, const X &x, const char *name) {
    if (x.rows() == u.rows() && x.cols() == u.cols() && x.size() == u.size()) return;
    throw ValueError(std::string(name) + " must have the shape of u: " + std::to_string(u.size()) + " matrices of " + std::to_string(u.rows()) + " x " +
                     std::to_string(u.cols()) + ", got " + std::to_string(x.size()) + " of " + std::to_string(x.rows()) + " x " + std::to_string(x.cols()));
}

/// The largest |UᵀU - I| that counts as orthonormal.
template <class T> double orthonormal_bound(int64_t k);
/// Largest entry of |e - I|.
double defect(int64_t k, const double *e);

/// ValueError that names matrix `item` of `name` unless its Gram matrix is the identity.
template <class T> void require_orthonormal(int64_t k, const double *e, const char *name, int64_t item);
/// Likewise unless |UᵀH| is small against |H|, or against one once multiplied by t; m is UᵀH and h is HᵀH.
template <class T> void require_tangent(int64_t k, const double *m, const double *h, double t, const char *name, int64_t item);

/// One step of one class. H need not be tangent: its part along U is taken off. The result is orthonormal to a few eps for
/// every finite input, also where U is not, and for every t.
template <class T> struct Step {
    MatrixView<const T> u, h;
    double t;
    Retraction method;
    MatrixView<T> out;                    // may be u or h
    MatrixView<T> *velocity = nullptr;    // wanted: the parallel transport of H to there (exp only); may be h
    Checks checks = Checks::none;
    int64_t item = 0;
    const char *name = "H";               // of h, in errors
    const MatrixView<const T> *next = nullptr; // operands of the next class, to be prefetched
    int next_count = 0;
    bool dry = false; // checks only
};
template <class T> void step(const Step<T> &s);

/// u (contiguous rows or not) becomes the nearest orthonormal matrix where it is not orthonormal to 4 eps √k already.
template <class T> void tidy(MatrixView<T> u);

/// Thin SVD of a tangent for arcs that the Gram matrix is too coarse for: H = Q x s yᵀ with Q (n x k, contiguous rows)
/// orthonormal, x and y as rows.
template <class T> void tangent_svd(MatrixView<const T> h, MatrixView<T> q, double *s, double *xt, double *yt);

/// f = y (θ / sin θ) xᵀ for m = UᵀW = x cos(θ) yᵀ: log(U, W) = (W - U m) f. Returns Σ θ². Without an SVD where all angles are
/// small (row sums of sin² θ at most small::kArc): f = arc(I - mᵀm) mᵀ.
template <class T> double log_factor(int64_t k, const double *m, double *f);

/// f = Σ_i y_i g_i x_iᵀ of vectors stored as rows.
void compose(int64_t k, const double *yt, const double *g, const double *xt, double *f);

} // namespace subspan::grassmann
