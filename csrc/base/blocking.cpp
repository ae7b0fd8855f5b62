#include "base/blocking.hpp"

#include "subspan/errors.hpp"
#include "subspan/isa.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <string>
#include <string_view>

#if defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__unix__)
#include <unistd.h>
#endif

namespace subspan {
namespace {

// Bytes of a core's data cache; 0: not known.
std::int64_t cache_of_system([[maybe_unused]] int level) {
#if defined(__APPLE__)
    std::int64_t bytes = 0;
    std::size_t length = sizeof bytes;
    for (const char *name : {level == 1 ? "hw.perflevel0.l1dcachesize" : "hw.perflevel0.l2cachesize", level == 1 ? "hw.l1dcachesize" : "hw.l2cachesize"})
        if (sysctlbyname(name, &bytes, &length, nullptr, 0) == 0 && bytes > 0) return bytes;
    return 0;
#elif defined(__linux__)
#ifdef _SC_LEVEL1_DCACHE_SIZE
    const long known = sysconf(level == 1 ? _SC_LEVEL1_DCACHE_SIZE : _SC_LEVEL2_CACHE_SIZE);
    if (known > 0) return known;
#endif
    for (int i = 0; i < 8; ++i) { // as on Arm, where the C library doesn't say
        const std::string at = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(i) + "/";
        std::ifstream level_file(at + "level"), type_file(at + "type"), size_file(at + "size");
        int found = 0;
        std::string type;
        std::int64_t size = 0;
        char unit = 0;
        if (!(level_file >> found) || !(type_file >> type) || !(size_file >> size)) break;
        size_file >> unit;
        if (found == level && type != "Instruction") return size * (unit == 'K' ? 1024 : unit == 'M' ? 1024 * 1024 : 1);
    }
    return 0;
#else
    return 0;
#endif
}

std::int64_t bytes_of(std::string_view text, const std::string &whole) {
    std::int64_t number = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
    const std::string_view unit = text.substr(std::size_t(end - text.data()));
    if (error != std::errc{} || number < 1 || number > (std::int64_t(1) << 40) || !(unit.empty() || unit == "K" || unit == "M"))
        throw ValueError("SUBSPAN_CACHE must be the sizes of a core's first and second data cache, such as 48K,1M, got '" + whole + "'");
    return number * (unit == "K" ? 1024 : unit == "M" ? 1024 * 1024 : 1);
}

Processor read() {
    Processor p{isa() == Isa::avx512 ? 64 : isa() == Isa::avx2 ? 32 : 16, cache_of_system(1), cache_of_system(2)};
    if (const char *env = std::getenv("SUBSPAN_CACHE"); env != nullptr && *env != '\0') {
        const std::string text(env);
        const std::size_t comma = std::min(text.find(','), text.size());
        p.first = bytes_of(std::string_view(text).substr(0, comma), text);
        p.second = bytes_of(std::string_view(text).substr(std::min(comma + 1, text.size())), text);
    }
    if (p.first <= 0) p.first = 32 << 10;
    if (p.second <= 0) p.second = 512 << 10;
    // A second cache that cores share belongs to each in part, and a hypervisor may say anything.
    p.first = std::clamp<std::int64_t>(p.first, 16 << 10, 128 << 10);
    p.second = std::clamp<std::int64_t>(p.second, 256 << 10, 2 << 20);
    return p;
}

std::int64_t power_of_two(std::int64_t most) {
    std::int64_t p = 1;
    while (2 * p <= most) p *= 2;
    return p;
}

Blocking cut(const Processor &p) {
    const std::int64_t panel = p.first / 4 * 3, vectors = p.vector == 64 ? 2 : 3; // of a panel of a symmetric product
    Blocking b{};
    b.depth = std::clamp<std::int64_t>(power_of_two(panel / (3 * p.vector)), 64, 128);
    b.gram_depth = std::clamp<std::int64_t>(power_of_two(panel / (vectors * p.vector)), 64, 256);
    b.near = power_of_two(p.first / 3);
    b.part = power_of_two(p.second / 8);
    b.whole = p.second;
    b.strip = 4 * p.second;
    b.square = std::int64_t(std::sqrt(double(p.second) / 3 / 8)) / 48 * 48; // whole register tiles
    return b;
}

} // namespace

const Processor &processor() {
    static const Processor found = read();
    return found;
}

const Blocking &blocking() {
    static const Blocking found = cut(processor());
    return found;
}

} // namespace subspan
