// The last step of both gradients: what offsets send from token to token.
#pragma once

#include "plucker/offsets.cuh"

namespace subspan::cuda::plucker {

/// What a token t sends to the one its offset looks at: T = a du_t + b (scale z_t) + c w, where rejections took the short way; scale is zero where
/// they did not, and negative where the offset does not count.
struct alignas(16) Sent {
    float a, b, c, scale;
};
/// Whether tokens of a call may have any.
template <class T> bool sends(const Arguments<T> &a) { return sizeof(T) == 2 && a.rope == 0; }

/// From what every token has for itself (du, and dz through the wedge; tokens x r, in the units of the scaled tokens) the gradients
/// of z and the weights: each token gathers what those that look at it send, in the order of the offsets.
template <class T> struct BiasGradient { // of given weights, through the bias; b null: none
    const T *b;
    int64_t stride;
    int d;
    Matrices<const T> grad;
};
/// dz_own is changed; sent: tokens x m, or null.
template <class T>
void gather_gradients(const Session &s, const Arguments<T> &a, Kept<T> *dz_own, const Kept<T> *du, const Stack &dz, const Stack *dweights, Sent *sent,
                      const BiasGradient<T> &bias = {});

} // namespace subspan::cuda::plucker
