// Rows of z in shared memory that the tokens of a block and their offsets share.
#pragma once

#include "plucker/offsets.cuh"

namespace subspan::cuda::plucker {

/// Row `index` of a stack of sequences, counted over all of them.
template <class T, class M> SUBSPAN_DEVICE T *row_of(const M &stack, unsigned index, unsigned count) {
    if (stack.line) return stack.data + int64_t(index) * stack.row_stride;
    const unsigned sequence = index / count;
    return stack.at(sequence) + int64_t(index - sequence * count) * stack.row_stride;
}

/// Tokens and, as far as `bytes` of shared memory go, what their offsets reach: read once from memory instead of once for each offset.
template <class T, int Tokens, int Threads = Tokens * 4>
SUBSPAN_DEVICE Halo<T> load_halo(const Arguments<T> &a, unsigned first, unsigned char *room, int64_t bytes) {
    constexpr int V = 16 / int(sizeof(T));
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
    for (int c = int(threadIdx.x); c < h.count * chunks; c += Threads) {
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
            for (int local = int(threadIdx.x); local < h.count; local += Threads) {
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

} // namespace subspan::cuda::plucker
