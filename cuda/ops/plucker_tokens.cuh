// The tokens of a block in shared memory, and their coordinates.
#pragma once

#include "plucker_lags.cuh"

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

/// Row `index` of a stack of sequences, counted over all of them.
template <class T, class M> SUBSPAN_DEVICE T *row_of(const M &stack, unsigned index, unsigned count) {
    if (stack.line) return stack.data + int64_t(index) * stack.row_stride;
    const unsigned sequence = index / count;
    return stack.at(sequence) + int64_t(index - sequence * count) * stack.row_stride;
}

// Tokens and, as far as `bytes` of shared memory go, what their offsets reach: read once from memory instead of once for each offset.
template <class T, int Tokens> SUBSPAN_DEVICE Halo<T> load_halo(const Arguments<T> &a, unsigned first, unsigned char *room, int64_t bytes) {
    constexpr int V = 16 / int(sizeof(T)), kThreads = Tokens * 4;
    using Measure = typename Halo<T>::Measure;
    Halo<T> h;
    h.pitch = divide_up(a.r, V) * V;
    const int64_t rows = bytes / (h.pitch * int64_t(sizeof(T)) + int64_t(sizeof(Measure))) - Tokens;
    if (a.ring > 0 || rows < 0) return h;
    const int64_t back = least(a.back, rows), ahead = least(a.ahead, rows - back), begin = int64_t(first) - back;
    h.begin = int(most<int64_t>(begin, 0));
    h.count = int(least(int64_t(first) + Tokens + ahead, int64_t(a.tokens)) - h.begin);
    T *to = reinterpret_cast<T *>(room);
    const int chunks = h.pitch / V;
    for (int c = int(threadIdx.x); c < h.count * chunks; c += kThreads) {
        const int local = c / chunks, j = (c - local * chunks) * V;
        const T *row = row_of<const T>(a.z, unsigned(h.begin + local), a.count);
        if (a.vectors && j + V <= a.r) {
            *reinterpret_cast<uint4 *>(to + local * h.pitch + j) = *reinterpret_cast<const uint4 *>(row + j);
        } else {
#pragma unroll
            for (int e = 0; e < V; ++e) {
                T value{};
                if (j + e < a.r) value = row[int64_t(j + e) * a.z.col_stride];
                to[local * h.pitch + j + e] = value;
            }
        }
    }
    h.rows = to;
    if constexpr (sizeof(T) == 2) {
        if (a.rope == 0) {
            __syncthreads();
            auto *measures = reinterpret_cast<Measure *>(to + h.count * h.pitch);
            for (int local = int(threadIdx.x); local < h.count; local += kThreads) {
                const uint4 *row = reinterpret_cast<const uint4 *>(to + local * h.pitch);
                float top = 0.0f;
                const auto each = [&](const auto &f) {
#pragma unroll 1
                    for (int c = 0; c < chunks; ++c) {
                        const uint4 v = row[c];
                        const uint32_t word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                        for (int x = 0; x < 4; ++x) {
                            f(low_of<T>(word[x]));
                            f(high_of<T>(word[x]));
                        }
                    }
                };
                each([&](float x) { top = most(top, x < 0.0f ? -x : x); });
                Measure m{power_of_two<float>(-exponent_of(top)), 0.0f};
                each([&](float x) { m.ww = fma(x * m.down, x * m.down, m.ww); });
                measures[local] = m;
            }
            h.measures = measures;
        }
    }
    return h;
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
        typename LagOf<T>::type u[kChunk];
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
