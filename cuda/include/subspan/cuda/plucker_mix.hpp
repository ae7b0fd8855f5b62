// Plücker mixing on a device: what each token has with its past, as one wedge and one projection.
#pragma once

#include "subspan/cuda/types.hpp"

#include <cstdint>
#include <vector>

namespace subspan::cuda {

inline constexpr int kOffsets = 64;        // at most so many in one call
inline constexpr std::int64_t kDepth = 64; // dimensions of a token: their chunks stay in registers

using subspan::MixOptions;

/// z (T x r for each sequence), weights (T x m) and a mask (1 x T, uint8), the last two or null. For decoding z is a ring: token
/// t lies in row t mod `ring`, and only the token `first` of each sequence is mixed.
struct MixInput {
    Stack z;
    const Stack *weights = nullptr, *mask = nullptr;
    std::int64_t ring = 0, first = 0;
};

/// Bytes of workspace for any of the calls below; `d` is zero without a projection.
std::int64_t plucker_workspace(const MixInput &in, const MixOptions &o, std::int64_t d, bool backward, int device);

/// out (T x C(r, 2)).
void plucker_mix(const Context &context, const MixInput &in, const MixOptions &o, const Stack &out);

/// dz (T x r), and dalpha (T x m, float32, or float64 for float64) of the weights of every token, or null.
void plucker_mix_backward(const Context &context, const Stack &grad, const MixInput &in, const MixOptions &o, const Stack &dz, const Stack *dweights);

/// out (T x d) = mix(...) Wᵀ + b. Coordinates exist in shared memory only. 16-bit items go through the tensor cores: coordinates are
/// rounded to 16 bits, sums are float32. Rejections in float32, where two tokens are nearly parallel in double; always in double for
/// float32 and float64. 2 d C(r, 2) flops a token.
void plucker_mix_project(const Context &context, const MixInput &in, const Stack &w, const Stack *b, const MixOptions &o, const Stack &out);

/// Gradients; db may be null. Sums over tokens go through one partial sum for each of a fixed number of runs of tokens: bit-identical
/// from call to call. 4 d C(r, 2) flops a token.
void plucker_mix_project_backward(const Context &context, const Stack &grad, const MixInput &in, const Stack &w, const Stack *b, const MixOptions &o,
                                  const Stack &dz, const Stack &dw, const Stack *db, const Stack *dweights);

} // namespace subspan::cuda
