// Plücker mixing of a sequence: the coordinates of the plane through each token and its past, summed over offsets.
#pragma once

#include "subspan/options.hpp"
#include "subspan/views.hpp"

#include <cstdint>
#include <vector>

namespace subspan {

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
template <class T> bool plucker_mix_project(const MixInput<T> &in, MatrixView<const T> w, const T *b, const MixOptions &o, const StackView<T> &out);

/// Gradients of <grad, plucker_mix_project>; coordinates are computed again, of 384 tokens at a time. db may be null.
/// Cost 4 d C(r, 2) flops a token.
template <class T>
bool plucker_mix_project_backward(const StackView<const T> &grad, const MixInput<T> &in, MatrixView<const T> w, const T *b, const MixOptions &o,
                                  const StackView<T> &dz, MatrixView<T> dw, T *db, const StackView<double> *dweights);

} // namespace subspan
