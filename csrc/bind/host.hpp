// Pieces of the host's bindings.
#pragma once

#include "array.hpp"
#include "basis.hpp"
#include "convert.hpp"
#include "lapack_capsules.hpp"
#include "scalars.hpp"

#include "subspan/apply_core.hpp"

#include <cstdio>

namespace subspan::bind {

/// ValueError unless the columns of u are orthonormal to 64 eps √k, by two products with vectors.
template <class T> void check_basis(const StackView<const T> &u, const char *name, const char *advice = "") {
    const std::int64_t n = u.rows(), k = u.cols();
    if (k > n)
        throw ValueError(std::string(name) + " has " + std::to_string(k) + " columns of " + std::to_string(n) + " entries: so many cannot be orthonormal");
    const double defect = subspan::orthonormality_defect<T>(u);
    if (!std::isfinite(defect)) {
        if (!subspan::all_finite<T>(u)) throw ValueError(std::string(name) + " holds NaN or infinity");
        throw ValueError("the columns of " + std::string(name) + " are not orthonormal: their squares overflow; orthonormalize " + name);
    }
    const double bound = 64 * double(std::numeric_limits<T>::epsilon()) * std::sqrt(double(std::max<std::int64_t>(k, 1)));
    if (defect <= bound) return;
    char found[32], most[32];
    std::snprintf(found, sizeof found, "%.1e", defect);
    std::snprintf(most, sizeof most, "%.1e", bound);
    const std::string u_(name);
    throw ValueError("the columns of " + u_ + " are not orthonormal: ||(" + u_ + "ᵀ" + u_ + " - I) z|| / ||z|| is " + found + ", more than " + most + "; " +
                     advice + "orthonormalize " + u_ +
                     " (subspan.orth.range_basis where columns may depend on each other: orthonormalize completes those, and the span grows), "
                     "or pass check=False");
}

/// Memory of the call itself as a contiguous stack.
template <class T> struct Temporary {
    std::unique_ptr<T[]> items;
    StackView<T> stack;
    Temporary(const Shape &batch, std::int64_t rows, std::int64_t cols) {
        std::int64_t count = 1;
        for (const auto n : batch) count *= n;
        items = uninitialised<T>(checked_product({count, rows, cols}, "work memory"));
        Shape strides(batch.size());
        std::int64_t step = rows * cols;
        for (std::size_t a = batch.size(); a-- > 0;) {
            strides[a] = step;
            step *= batch[a];
        }
        stack = StackView<T>(MatrixView<T>(items.get(), rows, cols), batch, strides);
    }
    /// The same over more leading axes, to which these broadcast.
    StackView<const T> over(const Shape &batch) const {
        StackView<const T> out(MatrixView<const T>(stack.first), batch, Shape(batch.size(), 0));
        const std::size_t more = batch.size() - stack.shape.size();
        for (std::size_t a = 0; a < stack.shape.size(); ++a) out.strides[more + a] = stack.shape[a] == 1 ? 0 : stack.strides[a];
        return out;
    }
};

inline Side side_of(bool left) { return left ? Side::left : Side::right; }

} // namespace subspan::bind
