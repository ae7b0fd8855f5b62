// What kernels of reflections share.
#pragma once

#include "subspan/cuda/launch.cuh"

namespace subspan::cuda {

// The factor of a reflection: the given one, or that of a unit reflection from vᵀv; a zero vector is the identity. A square that has left
// the range is no zero: NaN, where 2 / ∞ would be the identity without a word.
template <class T> SUBSPAN_DEVICE T factor_of(T square, const T *given) {
    if (given != nullptr) return *given;
    return square - square != T(0) ? square - square : (square > T(0) ? T(2) / square : T(0));
}

// T of a block of reflections, column by column: T_jj = tau_j and T_ij = -tau_j Σ_l T_il S_lj, S = VᵀV. On entry t holds S above the
// diagonal; `column` is k items of work. All threads of the block.
template <class T> SUBSPAN_DEVICE void core_in_place(int k, T *t, int ld, const T *tau, T *column, int threads) {
    for (int j = 0; j < k; ++j) {
        for (int i = int(threadIdx.x); i < j; i += threads) column[i] = t[i * ld + j];
        __syncthreads();
        for (int i = int(threadIdx.x); i < j; i += threads) {
            T sum = T(0);
            for (int l = i; l < j; ++l) sum = fma(t[i * ld + l], column[l], sum);
            t[i * ld + j] = -tau[j] * sum;
        }
        if (threadIdx.x == 0) t[j * ld + j] = tau[j];
        __syncthreads();
    }
}
} // namespace subspan::cuda
