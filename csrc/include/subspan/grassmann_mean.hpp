// The Karcher (Fréchet) mean of points of the Grassmann manifold.
#pragma once

#include "subspan/errors.hpp"
#include "subspan/grassmann.hpp"
#include "subspan/views.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace subspan {

struct MeanReport {
    double gradient_norm = 0; ///< ‖Σ w_i log(mean, U_i)‖ at the result
    double variance = 0;      ///< Σ w_i distance²
    std::int64_t iterations = 0;
    bool converged = false; ///< gradient_norm <= tolerance
};

/// The weights of `count` points divided by their sum, equal ones where none are given. ValueError unless they are finite and not negative,
/// and their sum is positive.
inline std::vector<double> mean_weights(const double *given, std::int64_t count) {
    std::vector<double> w(static_cast<std::size_t>(count), 1.0);
    if (given != nullptr) std::copy_n(given, count, w.begin());
    double sum = 0;
    for (const double x : w) {
        if (!(x >= 0) || !std::isfinite(x)) throw ValueError("weights must be finite and not negative");
        sum += x;
    }
    if (!(sum > 0) || !std::isfinite(sum)) throw ValueError("weights must have a positive, finite sum");
    for (double &x : w) x /= sum;
    return w;
}

/// The minimiser of Σ w_i distance(mean, U_i)² over the first leading axis of u (N, ..., n, k), by Riemannian gradient
/// descent with unit steps that are halved where the variance grows (Afsari, Tron and Vidal, SIAM J. Control Optim. 51,
/// 2013). out is (..., n, k), `weights` N non-negative numbers (null: equal ones), `initial` (null: the point of the
/// largest weight) and `reports` one for each mean. `progress`, when given, hears every iteration and stops it by
/// returning false. Cost per iteration 4 n k² flops and for each point some products of k x k, or an SVD
/// where it is far.
template <class T>
void grassmann_mean(const StackView<const T> &u, const double *weights, const StackView<const T> *initial, double tolerance, std::int64_t max_iterations,
                    const StackView<T> &out, MeanReport *reports, Checks checks, const std::function<bool(std::int64_t, const MeanReport &)> &progress = {});

} // namespace subspan
