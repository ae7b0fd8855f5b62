// The tokens of a block in shared memory, and their coordinates.
#pragma once

#include "plucker/halo.cuh"
#include "plucker/pairs.cuh"

namespace subspan::cuda::plucker {

template <class T> constexpr bool kTensor = sizeof(T) == 2;

/// W and b.
template <class T> struct Projection {
    const T *w, *b;
    int d, pairs;
    int64_t row_stride, col_stride;
    int64_t b_stride;
    bool vectors, bias_always;
};
/// Checks W and b against the tokens; throws ValueError.
void check_projection(const MixInput &in, const Stack &w, const Stack *b);
template <class T> Projection<T> projection_of(const MixInput &in, const Stack &w, const Stack *b, const MixOptions &o) {
    Projection<T> p{};
    p.w = static_cast<const T *>(w.data);
    p.d = int(w.rows);
    p.pairs = pairs_of(in.z.cols);
    p.row_stride = w.row_stride;
    p.col_stride = w.col_stride;
    p.vectors = in_vectors(w);
    p.bias_always = o.bias_always;
    if (b != nullptr) {
        p.b = static_cast<const T *>(b->data);
        p.b_stride = b->col_stride;
    }
    return p;
}

/// Rows of z and u, `pitch` (an odd number) of pairs apart, and the sum of each token's weights. `room`: shared memory that is not needed
/// before the next barrier.
template <class T, int Lanes, int Tokens>
SUBSPAN_DEVICE void fill_tokens(const Arguments<T> &a, unsigned first, Two<Kept<T>> *zu, Kept<T> *sums, int pitch, unsigned char *room, int64_t bytes) {
    using A = Kept<T>;
    const Halo<T> halo = load_halo<T, Tokens>(a, first, room, bytes);
    __syncthreads();
    // All threads come here: Tokens · 4 of them, so that tokens of eight lanes take two rounds.
#pragma unroll 1
    for (int round = 0; round < Lanes / 4; ++round) {
        const Token<T, Lanes> token(a, first + unsigned(forgotten(int(threadIdx.x)) / Lanes + round * (Tokens * 4 / Lanes)), halo);
        typename OffsetOf<T>::type u[kChunk];
        const auto sum = token.gather(u);
        const int thread = forgotten(int(threadIdx.x)), local = thread / Lanes + round * (Tokens * 4 / Lanes), q = thread % Lanes;
#pragma unroll
        for (int e = 0; e < kChunk; ++e)
            if (q * kChunk + e < a.r) zu[local * pitch + q * kChunk + e] = {A(token.z.x[e]), A(u[e])};
        if (q == 0) sums[local] = A(sum);
    }
}

/// The pair (i, j) at which a chunk of eight coordinates begins.
struct Begin {
    unsigned char i, j;
};
/// Of `count` chunks from coordinate p0 on.
SUBSPAN_DEVICE void fill_table(Begin *table, int count, int p0, int pairs, int r) {
    for (int c = int(threadIdx.x); c < count; c += int(blockDim.x)) {
        int i = 0, j = 0;
        if (p0 + 8 * c < pairs) pair_of(p0 + 8 * c, r, i, j);
        table[c] = {static_cast<unsigned char>(i), static_cast<unsigned char>(j)};
    }
}

/// Eight coordinates of the token whose z and u are at `row`, zero past the `left` that there are. All lanes of a warp have the same ones.
template <class T, class A> SUBSPAN_DEVICE void coordinates(T *to, const Two<A> *row, Begin at, int left, int r) {
    A x[8];
    const Two<A> a = row[at.i];
    if (left >= 8 && int(at.j) + 8 <= r) { // one row of pairs
        const Two<A> *b = row + at.j;
#pragma unroll
        for (int e = 0; e < 8; ++e) x[e] = fma(a.z, b[e].u, -(b[e].z * a.u));
    } else {
        int i = at.i, j = at.j;
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            const Two<A> f = row[i], g = row[j];
            const A v = fma(f.z, g.u, -(g.z * f.u));
            x[e] = e < left ? v : A(0);
            const bool next = ++j >= r;
            i = next ? least(i + 1, r - 1) : i;
            j = next ? least(i + 1, r - 1) : j;
        }
    }
    if constexpr (sizeof(T) == 2) {
        const uint4 v{pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]), pack<T>(x[6], x[7])};
        *reinterpret_cast<uint4 *>(to) = v;
    } else {
#pragma unroll
        for (int e = 0; e < 8; ++e) to[e] = T(x[e]);
    }
}

} // namespace subspan::cuda::plucker
