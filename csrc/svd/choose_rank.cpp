#include "subspan/choose_rank.hpp"

#include "subspan/errors.hpp"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <string>
#include <vector>

namespace subspan {
namespace {

// The median of the Marchenko-Pastur law with ratio beta in (0, 1] and unit variance, by the trapezoidal rule in t:
// x = lo + (hi - lo) sin²(t/2) turns the square-root edges into a smooth integrand.
double marchenko_pastur_median(double beta) {
    constexpr int kPoints = 4001;
    const double pi = std::numbers::pi, lo = std::pow(1 - std::sqrt(beta), 2), hi = std::pow(1 + std::sqrt(beta), 2), step = pi / (kPoints - 1);
    const auto place = [&](int i) { return lo + (hi - lo) * std::pow(std::sin(i * step / 2), 2); };
    const auto density = [&](int i) {
        const double root = (hi - lo) / 2 * std::sin(i * step), y = root * root / (2 * pi * beta * place(i)); // sqrt((hi - x)(x - lo)) and dx/dt
        return std::isfinite(y) ? y : (hi - lo) / (2 * pi * beta);                                            // beta = 1: the limit at x = 0
    };
    std::vector<double> sums(kPoints, 0.0);
    for (int i = 1; i < kPoints; ++i) sums[std::size_t(i)] = sums[std::size_t(i - 1)] + (density(i) + density(i - 1)) / 2 * step;
    const double half = sums.back() / 2;
    const auto after = std::upper_bound(sums.begin(), sums.end(), half);
    const int i = int(after - sums.begin());
    return place(i - 1) + (place(i) - place(i - 1)) * (half - sums[std::size_t(i - 1)]) / (sums[std::size_t(i)] - sums[std::size_t(i - 1)]);
}

std::int64_t above(const double *values, std::int64_t count, double cut) {
    return std::count_if(values, values + count, [&](double s) { return s > cut; });
}

} // namespace

std::int64_t rank_by_energy(const double *values, std::int64_t count, double share) {
    if (count == 0 || values[0] == 0.0) return 0;
    const auto square = [&](std::int64_t i) { return (values[i] / values[0]) * (values[i] / values[0]); };
    double whole = 0, sum = 0;
    for (std::int64_t i = 0; i < count; ++i) whole += square(i);
    for (std::int64_t i = 0; i < count; ++i) {
        sum += square(i);
        if (sum >= share * whole) return i + 1;
    }
    return count;
}

std::int64_t rank_by_rule(const double *values, std::int64_t count, RankRule rule, std::int64_t m, std::int64_t n, double noise) {
    const std::int64_t small = std::min(m, n), large = std::max(m, n);
    if (small < 1 || count > small)
        throw ValueError("shape (" + std::to_string(m) + ", " + std::to_string(n) + ") does not fit " + std::to_string(count) + " singular values");
    if (count == 0 || values[0] == 0.0) return 0;
    const double beta = double(small) / double(large), root = std::sqrt(double(large));
    if (std::isnan(noise)) {
        if (count != small)
            throw ValueError("the rule estimates the noise from the median of all " + std::to_string(small) + " singular values, got " + std::to_string(count) +
                             "; give noise");
        const double median = (values[(count - 1) / 2] + values[count / 2]) / 2;
        noise = median / (root * std::sqrt(marchenko_pastur_median(beta)));
    }
    const double cut =
        rule == RankRule::gavish_donoho ? std::sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + std::sqrt(beta * beta + 14 * beta + 1))) : 1 + std::sqrt(beta);
    return above(values, count, cut * root * noise);
}

} // namespace subspan
