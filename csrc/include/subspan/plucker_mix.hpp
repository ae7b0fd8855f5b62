// Plücker mixing of a sequence: the coordinates of the plane through each token and its past, summed over offsets.
#pragma once

#include "subspan/views.hpp"

#include <cstdint>
#include <vector>

namespace subspan {

enum class MixNorm { none, clamp, soft };          // divide a wedge by 1, max(n, eps), sqrt(n² + eps), n its length
enum class MixWeights { mean, given, softmax };    // of the offsets that apply; softmax: `weights` are logits
enum class Rope { none, interleaved, half };       // rotate the pairs (2i, 2i + 1) or (i, i + r/2) by the position

struct MixOptions {
    std::vector<std::int64_t> offsets; // how far back; negative: ahead; never zero
    MixNorm norm = MixNorm::clamp;
    double eps = 1e-8;
    MixWeights weighting = MixWeights::mean;
    bool past_first = false;  // z_{t-δ} ∧ z_t instead of z_t ∧ z_{t-δ}: the other sign
    bool bias_always = false; // the bias once for every token, instead of times its sum of weights
    Rope rope = Rope::none;
    double rope_base = 1e4;
    std::int64_t rope_start = 0; // position of the first token
    std::vector<std::int64_t> rope_starts; // of each sequence, in C order of the leading axes, instead; empty: one for all
    std::int64_t start_of(std::int64_t sequence) const {
        return rope_starts.empty() ? rope_start : rope_starts[std::size_t(sequence)];
    }
};

/// What is mixed: z (T x r for each sequence), weights (T x m, any stride may be zero) and a mask (1 x T, zero: the token
/// takes no part, neither as t nor as t - δ), the last two or null.
template <class T> struct MixInput {
    StackView<const T> z;
    const StackView<const T> *weights = nullptr;
    const StackView<const T> *mask = nullptr;
};

/// out (T x C(r, 2)) = Σ_δ α_δ(t) (z_t ∧ z_{t-δ}) / f(‖z_t ∧ z_{t-δ}‖), pairs i < j in lexicographic order. It is one
/// wedge z_t ∧ u_t, u_t = Σ_δ (α_δ / f) w_δ with w_δ the part of z_{t-δ} orthogonal to z_t. Cost O(m r + r²) a token.
/// Results are bit-identical for any number of threads. False where finite input gave what T cannot hold.
template <class T> bool plucker_mix(const MixInput<T> &in, const MixOptions &o, const StackView<T> &out);

/// Gradients of <grad, plucker_mix>: dz, and dweights (T x m, in double, for every token; null: not wanted).
template <class T>
bool plucker_mix_backward(const StackView<const T> &grad, const MixInput<T> &in, const MixOptions &o, const StackView<T> &dz,
                          const StackView<double> *dweights);

/// out (T x d) = plucker_mix(...) Wᵀ + bias, W of d x C(r, 2), b of d entries or null. Coordinates exist for 48 tokens
/// at a time. Cost 2 d C(r, 2) flops a token.
template <class T>
bool plucker_mix_project(const MixInput<T> &in, MatrixView<const T> w, const T *b, const MixOptions &o, const StackView<T> &out);

/// Gradients of <grad, plucker_mix_project>; coordinates are computed again, of 384 tokens at a time. db may be null.
/// Cost 4 d C(r, 2) flops a token.
template <class T>
bool plucker_mix_project_backward(const StackView<const T> &grad, const MixInput<T> &in, MatrixView<const T> w, const T *b,
                                  const MixOptions &o, const StackView<T> &dz, MatrixView<T> dw, T *db,
                                  const StackView<double> *dweights);

} // namespace subspan
