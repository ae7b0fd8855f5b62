#include "subspan/isa.hpp"

#include "base/simd.hpp"
#include "subspan/errors.hpp"

#include <cstdlib>
#include <string>

namespace subspan {

Isa isa_available() {
#ifdef SUBSPAN_MULTI_ISA
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return Isa::avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return Isa::avx2;
#endif
    return Isa::generic;
}

const char *isa_name(Isa isa) {
    switch (isa) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    case Isa::generic: break;
    }
    return "generic";
}

namespace {
Isa choose() {
    const Isa best = isa_available();
    const char *env = std::getenv("SUBSPAN_ISA");
    if (env == nullptr || *env == '\0') return best;
    const std::string want(env);
    for (Isa i : {Isa::generic, Isa::avx2, Isa::avx512})
        if (want == isa_name(i)) {
            if (int(i) > int(best)) throw ValueError("SUBSPAN_ISA=" + want + " asks for more than this machine and build have (" + isa_name(best) + ")");
            return i;
        }
    throw ValueError("SUBSPAN_ISA must be generic, avx2 or avx512, got '" + want + "'");
}
} // namespace

Isa isa() {
    static const Isa chosen = choose();
    return chosen;
}

} // namespace subspan
