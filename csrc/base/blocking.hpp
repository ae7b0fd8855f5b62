// What the kernels are cut by: one table, from the width of the vectors in use and the caches of a core, read at run time. The
// figures were measured on Zen 5 (48 KiB and 1 MiB); docs/notes/kernels.md says what each rule is for and what it costs to miss.
// Issue ports need no row: a register tile runs 12 to 24 chains of multiply-adds, and no processor has more than 16 in flight.
#pragma once

#include "subspan/isa.hpp"

#include <cstdint>

namespace subspan {

struct Blocking {
    std::int64_t depth;      // of the packed panels of a product: a panel of B (three vectors wide) is three quarters of L1, at most 128
    std::int64_t gram_depth; // of a symmetric product: the same of its narrower panels, at most 256
    std::int64_t near;       // bytes that are gone over several times in L1: a third, a power of two
    std::int64_t part;       // bytes that are gone over several times in L2, beside what streams through: an eighth, a power of two
    std::int64_t whole;      // bytes of what is gone over once again: L2
    std::int64_t strip;      // bytes of the small factor of a long strip, which L2 and a share of L3 hold: 4 L2
    std::int64_t square;     // rows and columns of a tile of doubles that is looked at after it was multiplied: a third of L2
};
const Blocking &blocking();

// Bytes ahead of a load that are fetched: along a row that is read while it is multiplied, and into the next row of a transform.
inline constexpr std::int64_t kAheadOfProduct = 768, kAheadOfRow = 4096;

} // namespace subspan
