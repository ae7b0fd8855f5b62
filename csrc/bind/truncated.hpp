// What truncated SVDs are told, read alike by both modules.
#pragma once

#include "array.hpp"
#include "scalars.hpp"
#include "subspan/options.hpp"

#include <algorithm>
#include <cstdint>
#include <string>

namespace subspan::bind {

/// rank, energy and tol, of which one must be there; "auto" power iterations are scikit-learn's choice for an m x n matrix.
inline TruncatedOptions truncated_options(py::handle rank, py::handle energy, py::handle tol, py::handle oversample, py::handle power_iterations,
                                          std::uint64_t key, std::int64_t m, std::int64_t n) {
    if (rank.is_none() && energy.is_none() && tol.is_none()) throw py::value_error("one of rank, energy and tol must be given");
    TruncatedOptions o{};
    if (!rank.is_none()) o.rank = whole_number(rank, "rank", 1);
    if (!energy.is_none()) o.energy = share(energy, "energy");
    if (!tol.is_none()) o.tol = share(tol, "tol");
    o.oversample = whole_number(oversample, "oversample", 0);
    if (PyUnicode_Check(power_iterations.ptr()) || power_iterations.is_none()) {
        if (power_iterations.is_none() || PyUnicode_CompareWithASCIIString(power_iterations.ptr(), "auto") != 0)
            throw py::value_error("power_iterations must be an int or 'auto', got " + std::string(py::repr(power_iterations)));
        o.power_iterations = o.rank > 0 && double(o.rank) < 0.1 * double(std::min(m, n)) ? 7 : 4;
    } else {
        o.power_iterations = whole_number(power_iterations, "power_iterations", 0, 1 << 20);
    }
    o.key = key;
    return o;
}

inline bool signs_by_u(py::handle signs) { return choice(signs, "signs", {"v", "u"}) == 1; }

} // namespace subspan::bind
