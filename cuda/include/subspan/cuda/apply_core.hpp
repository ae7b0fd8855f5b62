// out = alpha C + V M (Vᵀ X) or alpha C + (X V) M Vᵀ on a device: the product under all projections.
#pragma once

#include "subspan/cuda/int4.hpp"
#include "subspan/cuda/types.hpp"

#include <vector>

namespace subspan::cuda {

/// The largest k that stays in shared memory (where a block has 99 KB, some 160 of 16-bit items); wider bases go through cuBLAS.
inline constexpr std::int64_t kCoreWidth = 256;

struct CoreOptions {
    enum Kind { scalar, diagonal, full } kind = scalar;
    double value = 1.0; // the multiple of the identity, for `scalar`
    double alpha = 1.0;
    bool left = true;
};

/// X is C, or source - C. `core` is (k) or (k x k) in the accumulation type (float32 for 16-bit storage), null for a scalar.
/// Leading axes of all arrays are those of C; `out` may be C. With `packed`, V is one matrix of 4-bit codes for all of the stack, which the
/// kernel unpacks in registers (beyond kCoreWidth columns, into the workspace); of `v` only the sizes count then.
struct CoreCall {
    Stack c, v, out;
    const Stack *core = nullptr, *source = nullptr;
    const Int4Codes *packed = nullptr;
};

/// Bytes of workspace that a call needs: none where a panel of C fits the shared memory of a cluster.
std::int64_t apply_core_workspace(const CoreCall &call, const CoreOptions &o, int device);

/// One read of C, one write of out where a panel (32 columns of 16-bit items, 16 of wider ones, of the full height) fits the
/// shared memory of a cluster of blocks; otherwise two reads. 4 m n k flops: tensor cores for 16-bit items, with the small
/// product in two 16-bit parts, so that the result is rounded once. Bit-identical from run to run.
void apply_core(const Context &context, const CoreCall &call, const CoreOptions &o);

/// The same for matrices of different shapes in one launch (no leading axes). Those that do not fit a cluster, or are too wide for the kernel, go
/// alone; only they need workspace.
std::int64_t apply_core_group_workspace(const std::vector<CoreCall> &calls, const CoreOptions &o, int device);
void apply_core_group(const Context &context, const std::vector<CoreCall> &calls, const CoreOptions &o);

} // namespace subspan::cuda
