// Gradients of coordinates z ∧ u become those of z and u.
#pragma once

#include "plucker/offsets.cuh"

namespace subspan::cuda::plucker {

/// Where a walk over the rows of pairs (i, i + 1), (i, i + 2), ... stands: row i begins at coordinate `start`. What dimension i gets of the row so far.
template <class A> struct Row {
    int i = 0, start = 0;
    A z = A(0), u = A(0);
};

/// Coordinates up to p1, from p0 on, where the walk stands in a row: from their gradient dp(p) those of z and u. The lane holds dimensions q, q + Lanes,
/// ... of both gradients; all dimensions of z and u are at zu, where a row that has been walked through leaves what its first dimension gets:
/// no later row looks there. All lanes of a warp come together.
template <int Lanes, class A, class D>
SUBSPAN_DEVICE void contract(int r, int q, Row<A> &at, int p0, int p1, Two<A> *zu, A (&dz)[kChunk], A (&du)[kChunk], const D &dp) {
#pragma unroll 1
    while (at.i + 1 < r && at.start < p1) {
        const int i = at.i, base = at.start - i - 1, next = at.start + r - 1 - i;
        // Dimensions that belong to the row and to the slice.
        const int low = most(i + 1, p0 - base), high = least(r, p1 - base), begin = low / Lanes, end = divide_up(high, Lanes);
        const Two<A> f = zu[i];
#pragma unroll
        for (int e = 0; e < kChunk; ++e) {
            if (e < begin) continue; // the same for all lanes, as the end is
            if (e >= end) break;
            const int j = q + Lanes * e;
            const bool in = j >= low && j < high;
            const A d = in ? dp(base + j) : A(0);
            const Two<A> g = in ? zu[j] : Two<A>{A(0), A(0)};
            dz[e] = fma(-d, f.u, dz[e]);
            du[e] = fma(d, f.z, du[e]);
            at.z = fma(d, g.u, at.z);
            at.u = fma(-d, g.z, at.u);
        }
        if (next > p1) return; // the next slice goes on in this row
        const Two<A> row{sum_of<Lanes>(at.z), sum_of<Lanes>(at.u)};
        __syncwarp(); // all have read what is overwritten
        if (q == 0) zu[i] = row;
        at = {i + 1, next};
    }
}
/// After the last coordinate: f(dimension, gradient of z, gradient of u) for those of this lane.
template <int Lanes, class A, class F>
SUBSPAN_DEVICE void contracted(int r, int q, const Two<A> *zu, const A (&dz)[kChunk], const A (&du)[kChunk], const F &f) {
    __syncwarp();
#pragma unroll
    for (int e = 0; e < kChunk; ++e) {
        const int j = q + Lanes * e;
        if (j >= r) continue;
        const Two<A> row = j + 1 < r ? zu[j] : Two<A>{A(0), A(0)};
        f(j, dz[e] + row.z, du[e] + row.u);
    }
}

/// The pair of coordinate p: lexicographic, i < j.
SUBSPAN_SHARED_CODE void pair_of(int p, int r, int &i, int &j) {
    i = 0;
    while (p >= r - 1 - i) p -= r - 1 - i++;
    j = i + 1 + p;
}

} // namespace subspan::cuda::plucker
