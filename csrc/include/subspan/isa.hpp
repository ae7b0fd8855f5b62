// Instruction sets that the own loops are compiled for, chosen once at run time.
#pragma once

#include <cstdint>

namespace subspan {

enum class Isa { generic = 0, avx2 = 1, avx512 = 2 };

/// The set in use: the best one of this machine and this build, or what SUBSPAN_ISA (generic, avx2, avx512) asks for.
/// Asking for more than the machine has throws ValueError.
Isa isa();
const char *isa_name(Isa isa);
/// The best set that this machine and this build have.
Isa isa_available();

/// What blocks are cut by: the width of the vectors in use, and the data caches of one core, in bytes. The caches are those of the
/// machine, held to between 16 and 128 KiB and between 256 KiB and 2 MiB, or what SUBSPAN_CACHE=FIRST,SECOND says (48K,1M); another
/// text there throws ValueError.
struct Processor {
    std::int64_t vector, first, second;
};
const Processor &processor();

} // namespace subspan
