// Products of sizes that users give.
#pragma once

#include "subspan/errors.hpp"

#include <cstdint>
#include <initializer_list>
#include <string>

namespace subspan {

/// The product of sizes, none negative; ValueError, which names `what`, where it is more items than memory can have.
inline std::int64_t checked_product(std::initializer_list<std::int64_t> sizes, const char *what) {
    constexpr std::int64_t most = std::int64_t(1) << 58;
    std::int64_t product = 1;
    for (const std::int64_t n : sizes) {
        if (n == 0) return 0;
        if (n < 0) throw ValueError(std::string(what) + " must not be negative, got " + std::to_string(n));
        if (product > most / n) {
            std::string text;
            for (const std::int64_t m : sizes) text += (text.empty() ? "" : " x ") + std::to_string(m);
            throw ValueError(std::string(what) + ": " + text + " items are more than memory can hold");
        }
        product *= n;
    }
    return product;
}

} // namespace subspan
