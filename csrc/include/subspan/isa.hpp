// Instruction sets that the own loops are compiled for, chosen once at run time.
#pragma once

namespace subspan {

enum class Isa { generic = 0, avx2 = 1, avx512 = 2 };

/// The set in use: the best one of this machine and this build, or what SUBSPAN_ISA (generic, avx2, avx512) asks for.
/// Asking for more than the machine has throws ValueError.
Isa isa();
const char *isa_name(Isa isa);
/// The best set that this machine and this build have.
Isa isa_available();

} // namespace subspan
