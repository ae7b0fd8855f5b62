#include "plucker_lags.cuh"
#include "tiles.cuh"

#include <algorithm>
#include <limits>

namespace subspan::cuda {
namespace plucker {
namespace {

template <class T> constexpr bool kTensor = sizeof(T) == 2;
template <class T> constexpr int kSlice = kTensor<T> ? 32 : 16; // coordinates of a slice of W
constexpr int kPairs = 64;                                      // coordinates of a slice of the gradient
constexpr int kStages = 3;

template <class T> struct Projection {
    const T *w, *b;
    int d, pairs;
    int64_t row_stride, col_stride;
    int64_t b_stride;
    bool vectors, bias_always;
};

// -- the tokens of a block: rows of z and u, an odd number of items apart, and the sum of each token's weights --------------------------
// Tokens and, as far as `bytes` of shared memory go, what their offsets reach: read once from memory instead of once for each offset.
template <class T, int Tokens> SUBSPAN_DEVICE Halo<T> load_halo(const Arguments<T> &a, unsigned first, unsigned char *room, int64_t bytes) {
    constexpr int V = 16 / int(sizeof(T)), kThreads = Tokens * 4;
    Halo<T> h;
    h.pitch = divide_up(a.r, V) * V;
    const int64_t rows = bytes / (h.pitch * int64_t(sizeof(T))) - Tokens;
    if (a.ring > 0 || rows < 0) return h;
    const int64_t back = least(a.back, rows), ahead = least(a.ahead, rows - back), begin = int64_t(first) - back;
    h.begin = most<int64_t>(begin, 0);
    h.count = int(least(int64_t(first) + Tokens + ahead, int64_t(a.tokens)) - h.begin);
    T *to = reinterpret_cast<T *>(room);
    const int chunks = h.pitch / V;
    for (int c = int(threadIdx.x); c < h.count * chunks; c += kThreads) {
        const int local = c / chunks, j = (c - local * chunks) * V;
        const unsigned index = unsigned(h.begin + local), sequence = index / a.count;
        const T *row = a.z.at(sequence) + int64_t(index - sequence * a.count) * a.z.row_stride;
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
    return h;
}

// `room`: shared memory that is not needed before the next barrier.
template <class T, int Lanes, int Tokens>
SUBSPAN_DEVICE void fill_tokens(const Arguments<T> &a, unsigned first, Kept<T> *zs, Kept<T> *us, Kept<T> *sums, int pitch, unsigned char *room, int64_t bytes) {
    using A = Kept<T>;
    const int tid = int(threadIdx.x), q = tid % Lanes;
    const Halo<T> halo = load_halo<T, Tokens>(a, first, room, bytes);
    __syncthreads();
    // All threads come here: Tokens · 4 of them, so that tokens of eight lanes take two rounds.
    for (int local = tid / Lanes; local < Tokens; local += Tokens * 4 / Lanes) {
        const Token<T, Lanes> token(a, first + unsigned(local), halo);
        typename LagOf<T>::type u[kChunk];
        const auto sum = token.gather(u);
#pragma unroll
        for (int e = 0; e < kChunk; ++e)
            if (q * kChunk + e < a.r) {
                zs[local * pitch + q * kChunk + e] = A(token.z.x[e]);
                us[local * pitch + q * kChunk + e] = A(u[e]);
            }
        if (q == 0) sums[local] = A(sum);
    }
}

// Eight coordinates of one token from p on; zero past the last pair. All lanes of a warp have the same p.
template <class T, class A> SUBSPAN_DEVICE void coordinates(T *to, const A *z, const A *u, int p, int pairs, int r) {
    A x[8];
    if (p < pairs) {
        int i, j;
        pair_of(p, r, i, j);
        A zi = z[i], ui = u[i];
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            const bool there = p + e < pairs;
            x[e] = there ? fma(zi, u[j], -(z[j] * ui)) : A(0);
            if (there && ++j == r) {
                ++i;
                j = least(i + 1, r - 1);
                zi = z[i];
                ui = u[i];
            }
        }
    } else {
#pragma unroll
        for (int e = 0; e < 8; ++e) x[e] = A(0);
    }
    if constexpr (sizeof(T) == 2) {
        const uint4 v{pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]), pack<T>(x[6], x[7])};
        *reinterpret_cast<uint4 *>(to) = v;
    } else {
#pragma unroll
        for (int e = 0; e < 8; ++e) to[e] = T(x[e]);
    }
}

// -- forward -----------------------------------------------------------------------------------------------------------------------
template <class T, int Tokens, int Width> struct ForwardLayout {
    static constexpr int slice = kSlice<T>, pitch_a = slice + (kTensor<T> ? 8 : 4), pitch_w = pitch_a;
    int pitch;
    int64_t zs, us, sums, a, w, end;
    SUBSPAN_SHARED_CODE explicit ForwardLayout(int r) : pitch(r | 1) {
        const auto up = [](int64_t bytes) { return (bytes + 15) / 16 * 16; };
        const int64_t rows = up(int64_t(Tokens) * pitch * int64_t(sizeof(Kept<T>)));
        zs = 0;
        us = zs + rows;
        sums = us + rows;
        a = sums + up(Tokens * int64_t(sizeof(Kept<T>)));
        w = a + up(2 * Tokens * pitch_a * int64_t(sizeof(T)));
        end = w + up(int64_t(kStages) * Width * pitch_w * int64_t(sizeof(T)));
    }
};

template <class T, int Lanes, int Tokens, int Width>
__global__ void __launch_bounds__(Tokens * 4, 1) project_kernel(SUBSPAN_PARAMETER const Arguments<T> a, const Projection<T> w, const Matrices<T> out) {
    using A = Kept<T>;
    using Layout = ForwardLayout<T, Tokens, Width>;
    constexpr int kThreads = Tokens * 4, slice = Layout::slice;
    SUBSPAN_SHARED(memory);
    const Layout at(a.r);
    A *zs = reinterpret_cast<A *>(memory + at.zs), *us = reinterpret_cast<A *>(memory + at.us), *sums = reinterpret_cast<A *>(memory + at.sums);
    T *as = reinterpret_cast<T *>(memory + at.a), *ws = reinterpret_cast<T *>(memory + at.w);
    const int tid = int(threadIdx.x), d0 = int(blockIdx.y) * Width, slices = divide_up(w.pairs, slice);
    const unsigned first = blockIdx.x * Tokens;
    const auto fetch = [&](int s) {
        if (s < slices)
            load_block(ws + (s % kStages) * Width * Layout::pitch_w, Layout::pitch_w, w.w, w.row_stride, w.col_stride, d0, s * slice, Width, slice,
                       w.d, w.pairs, w.vectors, kThreads);
        commit_copies();
    };
    // Slices of W come in while the tokens are looked at.
    fetch(0);
    fetch(1);
    fill_tokens<T, Lanes, Tokens>(a, first, zs, us, sums, at.pitch, memory + at.a, at.w - at.a);
    __syncthreads();
    BlockProduct<T, Tokens, Width, false, true> product;
    product.clear();
    for (int s = 0; s < slices; ++s) {
        T *mine = as + (s % 2) * Tokens * Layout::pitch_a;
        const int local = tid % Tokens;
        for (int c = tid / Tokens; c < slice / 8; c += 4)
            coordinates(mine + local * Layout::pitch_a + 8 * c, zs + local * at.pitch, us + local * at.pitch, s * slice + 8 * c, w.pairs, a.r);
        wait_copies<1>();
        __syncthreads();
        fetch(s + 2); // into the stage that the slice before has left
        product.add(mine, Layout::pitch_a, ws + (s % kStages) * Width * Layout::pitch_w, Layout::pitch_w, slice);
    }
    wait_copies<0>();
    const auto result = [&](int m, int n, A v) {
        const A b = w.b != nullptr ? A(widen(w.b[int64_t(d0 + n) * w.b_stride])) : A(0);
        return w.b == nullptr ? v : (w.bias_always ? v + b : fma(b, sums[m], v));
    };
    product.each([&](int m, int n, A v) {
        const unsigned index = first + unsigned(m);
        if (index >= a.tokens || d0 + n >= w.d) return;
        const unsigned sequence = index / a.count;
        T *row = out.at(sequence) + int64_t(index - sequence * a.count) * out.row_stride;
        row[int64_t(d0 + n) * out.col_stride] = narrow<T>(result(m, n, v));
    });
}

// -- the gradient of z and u: what comes back through W, a slice of coordinates at a time -----------------------------------------------
constexpr int kDeep = 32; // rows of W at a time

template <class T, int Tokens> struct BackLayout {
    static constexpr int pitch_g = kDeep + (kTensor<T> ? 8 : 4), pitch_w = kPairs + (kTensor<T> ? 8 : 4), pitch_p = kPairs + 1;
    int pitch;
    int64_t zs, us, sums, g, w, p, end;
    SUBSPAN_SHARED_CODE explicit BackLayout(int r) : pitch(r | 1) {
        const auto up = [](int64_t bytes) { return (bytes + 15) / 16 * 16; };
        const int64_t rows = up(int64_t(Tokens) * pitch * int64_t(sizeof(Kept<T>)));
        zs = 0;
        us = zs + rows;
        sums = us + rows;
        p = sums + up(Tokens * int64_t(sizeof(Kept<T>)));
        g = p + up(int64_t(Tokens) * pitch_p * int64_t(sizeof(Kept<T>)));
        w = g + up(int64_t(kStages) * Tokens * pitch_g * int64_t(sizeof(T)));
        end = w + up(int64_t(kStages) * kDeep * pitch_w * int64_t(sizeof(T)));
    }
};

/// zu, where wanted: rows of z, u and the sum of weights for the gradient of W.
template <class T, int Lanes, int Tokens>
__global__ void __launch_bounds__(Tokens * 4, 1)
    back_kernel(SUBSPAN_PARAMETER const Arguments<T> a, const Projection<T> w, const Matrices<const T> grad, const bool grad_vectors, Kept<T> *dz_own,
                Kept<T> *du_own, Kept<T> *zu, int zu_pitch) {
    using A = Kept<T>;
    using Layout = BackLayout<T, Tokens>;
    constexpr int kThreads = Tokens * 4, kRounds = Lanes / 4;
    SUBSPAN_SHARED(memory);
    const Layout at(a.r);
    A *zs = reinterpret_cast<A *>(memory + at.zs), *us = reinterpret_cast<A *>(memory + at.us), *sums = reinterpret_cast<A *>(memory + at.sums);
    A *ps = reinterpret_cast<A *>(memory + at.p);
    T *gs = reinterpret_cast<T *>(memory + at.g), *ws = reinterpret_cast<T *>(memory + at.w);
    const int tid = int(threadIdx.x), q = tid % Lanes;
    const unsigned first = blockIdx.x * Tokens;
    fill_tokens<T, Lanes, Tokens>(a, first, zs, us, sums, at.pitch, memory + at.p, at.g - at.p);
    __syncthreads();
    for (int e = tid; e < Tokens * zu_pitch; e += kThreads) {
        const int local = e / zu_pitch, i = e - local * zu_pitch;
        if (first + unsigned(local) >= a.tokens) break;
        A v = A(0);
        if (i < a.r) v = zs[local * at.pitch + i];
        else if (i < 2 * a.r) v = us[local * at.pitch + i - a.r];
        else if (i == 2 * a.r) v = w.bias_always ? A(1) : sums[local];
        zu[int64_t(first) * zu_pitch + e] = v;
    }
    A z[kRounds][kChunk], u[kRounds][kChunk], dz[kRounds][kChunk], du[kRounds][kChunk];
#pragma unroll
    for (int round = 0; round < kRounds; ++round)
#pragma unroll
        for (int e = 0; e < kChunk; ++e) {
            const int local = tid / Lanes + round * (kThreads / Lanes), i = q * kChunk + e;
            z[round][e] = i < a.r ? zs[local * at.pitch + i] : A(0);
            u[round][e] = i < a.r ? us[local * at.pitch + i] : A(0);
            dz[round][e] = du[round][e] = A(0);
        }
    const int deep = divide_up(w.d, kDeep), slices = divide_up(w.pairs, kPairs), steps = deep * slices;
    const auto fetch = [&](int step) {
        if (step < steps) {
            const int slice = step / deep, k0 = (step - slice * deep) * kDeep, stage = step % kStages;
            load_block(ws + stage * kDeep * Layout::pitch_w, Layout::pitch_w, w.w, w.row_stride, w.col_stride, k0, slice * kPairs, kDeep, kPairs, w.d,
                       w.pairs, w.vectors, kThreads);
            // Rows of grad, token by token: they may belong to several sequences.
            T *to = gs + stage * Tokens * Layout::pitch_g;
            constexpr int V = 16 / int(sizeof(T)), chunks = kDeep / V;
            for (int c = tid; c < Tokens * chunks; c += kThreads) {
                const int local = c / chunks, j = (c - local * chunks) * V;
                const unsigned index = least(first + unsigned(local), a.tokens - 1), sequence = index / a.count;
                const T *row = grad.at(sequence) + int64_t(index - sequence * a.count) * grad.row_stride;
                const bool in = first + unsigned(local) < a.tokens;
                if (grad_vectors) {
                    const int filled = in ? most(0, least(V, w.d - k0 - j)) : 0;
                    copy_async(to + local * Layout::pitch_g + j, filled > 0 ? row + k0 + j : row, filled * int(sizeof(T)));
                } else {
                    for (int e = 0; e < V; ++e) {
                        T value{};
                        if (in && k0 + j + e < w.d) value = row[int64_t(k0 + j + e) * grad.col_stride];
                        to[local * Layout::pitch_g + j + e] = value;
                    }
                }
            }
        }
        commit_copies();
    };
    fetch(0);
    fetch(1);
    BlockProduct<T, Tokens, kPairs, false, false> product;
    for (int slice = 0, step = 0; slice < slices; ++slice) {
        product.clear();
        for (int k = 0; k < deep; ++k, ++step) {
            wait_copies<1>();
            __syncthreads();
            fetch(step + 2);
            const int stage = step % kStages;
            product.add(gs + stage * Tokens * Layout::pitch_g, Layout::pitch_g, ws + stage * kDeep * Layout::pitch_w, Layout::pitch_w, kDeep);
        }
        product.each([&](int m, int n, A v) { ps[m * Layout::pitch_p + n] = v; });
        __syncthreads();
        const int p0 = slice * kPairs, p1 = least(p0 + kPairs, w.pairs);
#pragma unroll
        for (int round = 0; round < kRounds; ++round) {
            const int local = tid / Lanes + round * (kThreads / Lanes);
            const A *row = ps + local * Layout::pitch_p;
            contract<Lanes>(a.r, q, p0, p1, zs + local * at.pitch, us + local * at.pitch, z[round], u[round], dz[round], du[round],
                            [&](int p) { return row[p - p0]; });
        }
        __syncthreads();
    }
    wait_copies<0>();
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
        const unsigned index = first + unsigned(tid / Lanes + round * (kThreads / Lanes));
        if (index >= a.tokens) continue;
#pragma unroll
        for (int e = 0; e < kChunk; ++e)
            if (q * kChunk + e < a.r) {
                dz_own[int64_t(index) * a.r + q * kChunk + e] = dz[round][e];
                du_own[int64_t(index) * a.r + q * kChunk + e] = du[round][e];
            }
    }
}

// -- the gradient of W and b: runs of tokens, a partial sum for each -------------------------------------------------------------------
// The bias is one coordinate more: the sum of a token's weights, or one.
template <class T> constexpr int kRun = kTensor<T> ? 64 : 16; // tokens at a time
template <class T> constexpr int kWide = kTensor<T> ? 128 : 64; // coordinates of a block

template <class T, int Rows> struct WeightLayout {
    static constexpr int pitch_g = Rows + 8, pitch_p = kWide<T> + 8;
    int64_t zu, g, p, end;
    SUBSPAN_SHARED_CODE explicit WeightLayout(int zu_pitch) {
        const auto up = [](int64_t bytes) { return (bytes + 15) / 16 * 16; };
        zu = 0;
        g = up(int64_t(kRun<T>) * (zu_pitch | 1) * int64_t(sizeof(Kept<T>)));
        p = g + up(2 * int64_t(kRun<T>) * pitch_g * int64_t(sizeof(T)));
        end = p + up(2 * int64_t(kRun<T>) * pitch_p * int64_t(sizeof(T)));
    }
};

template <class T, int Rows>
__global__ void __launch_bounds__(Rows * 4, 1)
    weights_kernel(SUBSPAN_PARAMETER const Arguments<T> a, const Projection<T> w, const Matrices<const T> grad, const bool grad_vectors, const Kept<T> *zu,
                   int zu_pitch, Kept<T> *partial, int run) {
    using A = Kept<T>;
    using Layout = WeightLayout<T, Rows>;
    constexpr int kThreads = Rows * 4, kTokens = kRun<T>, kCols = kWide<T>;
    SUBSPAN_SHARED(memory);
    const Layout at(zu_pitch);
    A *zs = reinterpret_cast<A *>(memory + at.zu);
    T *gs = reinterpret_cast<T *>(memory + at.g), *ps = reinterpret_cast<T *>(memory + at.p);
    const int tid = int(threadIdx.x), c0 = int(blockIdx.x) * kCols, d0 = int(blockIdx.y) * Rows, pitch = zu_pitch | 1;
    const unsigned begin = blockIdx.z * unsigned(run), end = least(begin + unsigned(run), a.tokens);
    const int steps = begin < end ? int(divide_up(end - begin, unsigned(kTokens))) : 0;
    const auto fetch = [&](int step) {
        if (step < steps) {
            constexpr int V = 16 / int(sizeof(T)), chunks = Rows / V;
            T *to = gs + (step % 2) * kTokens * Layout::pitch_g;
            for (int c = tid; c < kTokens * chunks; c += kThreads) {
                const int local = c / chunks, j = (c - local * chunks) * V;
                const unsigned wanted = begin + unsigned(step * kTokens + local), index = least(wanted, a.tokens - 1), sequence = index / a.count;
                const T *row = grad.at(sequence) + int64_t(index - sequence * a.count) * grad.row_stride;
                if (grad_vectors) {
                    const int filled = wanted < end ? most(0, least(V, w.d - d0 - j)) : 0;
                    copy_async(to + local * Layout::pitch_g + j, filled > 0 ? row + d0 + j : row, filled * int(sizeof(T)));
                } else {
                    for (int e = 0; e < V; ++e) {
                        T value{};
                        if (wanted < end && d0 + j + e < w.d) value = row[int64_t(d0 + j + e) * grad.col_stride];
                        to[local * Layout::pitch_g + j + e] = value;
                    }
                }
            }
        }
        commit_copies();
    };
    fetch(0);
    BlockProduct<T, Rows, kCols, true, false> product;
    product.clear();
    for (int step = 0; step < steps; ++step) {
        for (int e = tid; e < kTokens * zu_pitch; e += kThreads) {
            const int local = e / zu_pitch, i = e - local * zu_pitch;
            const unsigned index = begin + unsigned(step * kTokens + local);
            zs[local * pitch + i] = index < end ? zu[int64_t(index) * zu_pitch + i] : A(0);
        }
        __syncthreads(); // also: the product of two steps before is done with what is overwritten now
        fetch(step + 1);
        T *mine = ps + (step % 2) * kTokens * Layout::pitch_p;
        for (int c = tid; c < kTokens * (kCols / 8); c += kThreads) {
            const int local = c % kTokens, p = (c / kTokens) * 8;
            const A *z = zs + local * pitch;
            coordinates(mine + local * Layout::pitch_p + p, z, z + a.r, c0 + p, w.pairs, a.r);
            if (c0 + p <= w.pairs && w.pairs < c0 + p + 8) mine[local * Layout::pitch_p + w.pairs - c0] = narrow<T>(z[2 * a.r]);
        }
        wait_copies<1>();
        __syncthreads();
        product.add(gs + (step % 2) * kTokens * Layout::pitch_g, Layout::pitch_g, mine, Layout::pitch_p, kTokens);
    }
    wait_copies<0>();
    A *to = partial + int64_t(blockIdx.z) * w.d * (w.pairs + 1);
    product.each([&](int m, int n, A v) {
        if (d0 + m < w.d && c0 + n <= w.pairs) to[int64_t(d0 + m) * (w.pairs + 1) + c0 + n] = v;
    });
}

template <class T>
__global__ void __launch_bounds__(256) add_kernel(const Kept<T> *partial, int runs, int d, int pairs, const Matrices<T> dw, T *db, int64_t db_stride) {
    const int64_t e = int64_t(blockIdx.x) * 256 + threadIdx.x, all = int64_t(d) * (pairs + 1);
    if (e >= all) return;
    Kept<T> sum = partial[e];
    for (int s = 1; s < runs; ++s) sum += partial[int64_t(s) * all + e];
    const int i = int(unsigned(e) / unsigned(pairs + 1)), j = int(e) - i * (pairs + 1);
    if (j < pairs)
        dw.data[i * dw.row_stride + j * dw.col_stride] = narrow<T>(sum);
    else if (db != nullptr)
        db[i * db_stride] = narrow<T>(sum);
}

// -- host ------------------------------------------------------------------------------------------------------------------------

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

void check_projection(const MixInput &in, const Stack &w, const Stack *b) {
    const int pairs = pairs_of(in.z.cols);
    if (w.cols != pairs || w.rows < 1)
        throw ValueError("W must have shape (d, " + std::to_string(pairs) + "), a column for each pair of " + std::to_string(in.z.cols) +
                         " dimensions, got " + std::to_string(w.rows) + " x " + std::to_string(w.cols));
    if (w.dtype != in.z.dtype) throw ValueError(std::string("W must be ") + name_of(in.z.dtype) + " as z is, got " + name_of(w.dtype));
    if (w.axes != 0) throw ValueError("W must have 2 dimensions");
    if (b != nullptr && (b->cols != w.rows || b->dtype != w.dtype)) throw ValueError("b must have " + std::to_string(w.rows) + " entries of W's dtype");
    if (w.rows > (1 << 20)) throw ValueError("W has too many rows for one call");
}

constexpr int kWidthTensor = 256, kWidthNarrow = 64;

int runs_of(int64_t tokens, int64_t run) { return int(std::max<int64_t>(1, divide_up(tokens, run))); }
// Tokens of a partial sum: a number that depends on sizes alone.
int64_t run_of(int64_t tokens, int64_t blocks) {
    const int64_t wanted = std::clamp<int64_t>(128 / std::max<int64_t>(blocks, 1), 1, 64);
    return divide_up<int64_t>(std::max<int64_t>(divide_up(tokens, wanted), 256), 64) * 64;
}
template <class T> int64_t weight_blocks(int64_t d, int64_t pairs, int rows) { return divide_up<int64_t>(pairs + 1, kWide<T>) * divide_up<int64_t>(d, rows); }
constexpr int kRowsLarge = 256, kRowsSmall = 128;
int zu_pitch_of(int64_t r) { return int(2 * r + 1); }

template <class T> int rows_of(const Device &device, int64_t r) {
    return kTensor<T> && WeightLayout<T, kRowsLarge>(zu_pitch_of(r)).end <= device.shared_limit ? kRowsLarge : kRowsSmall;
}

template <class T, int Tokens, int Width>
void forward(const Session &s, const Arguments<T> &a, const Projection<T> &p, const Stack &out) {
    const int64_t shared = ForwardLayout<T, Tokens, Width>(a.r).end;
    const Shape shape{dim3(divide_up(a.tokens, unsigned(Tokens)), unsigned(divide_up(p.d, Width))), dim3(Tokens * 4), shared};
    with_lanes(a.r, [&](auto lanes) {
        launch<project_kernel<T, decltype(lanes)::value, Tokens, Width>>(s, "plucker_mix_project", shape, a, p, Matrices<T>(out));
    });
}

template <class T, int Tokens>
void back(const Session &s, const Arguments<T> &a, const Projection<T> &p, const Stack &grad, Kept<T> *dz, Kept<T> *du, Kept<T> *zu, int zu_pitch) {
    const Shape shape{dim3(divide_up(a.tokens, unsigned(Tokens))), dim3(Tokens * 4), BackLayout<T, Tokens>(a.r).end};
    const auto run = [&](auto lanes) {
        launch<back_kernel<T, decltype(lanes)::value, Tokens>>(s, "plucker_mix_project_backward", shape, a, p, Matrices<const T>(grad), in_vectors(grad), dz,
                                                               du, zu, zu_pitch);
    };
    if constexpr (Tokens == 128)
        run(std::integral_constant<int, 4>{});
    else
        with_lanes(a.r, run);
}

template <class T, int Rows>
void weights(const Session &s, const Arguments<T> &a, const Projection<T> &p, const Stack &grad, const Kept<T> *zu, int zu_pitch, Kept<T> *partial,
             int64_t run, int runs) {
    const Shape shape{dim3(unsigned(divide_up(p.pairs + 1, kWide<T>)), unsigned(divide_up(p.d, Rows)), unsigned(runs)), dim3(Rows * 4),
                      WeightLayout<T, Rows>(zu_pitch).end};
    launch<weights_kernel<T, Rows>>(s, "the gradient of W", shape, a, p, Matrices<const T>(grad), in_vectors(grad), zu, zu_pitch, partial, int(run));
}

} // namespace
} // namespace plucker

using namespace plucker;

std::int64_t plucker_workspace(const MixInput &in, const MixOptions &o, std::int64_t d, bool backward, int device) {
    check(in, o);
    const int64_t tokens = tokens_of(in), r = in.z.cols;
    if (tokens == 0) return 0;
    int64_t bytes = prepare_room(in, o);
    if (!backward) return bytes;
    return bytes + dispatch(in.z.dtype, [&](auto tag) -> int64_t {
        using T = decltype(tag);
        int64_t more = 2 * room<Kept<T>>(tokens * r);
        if (d == 0) return more;
        Context context;
        context.device = device;
        const Session s(context);
        const int64_t run = run_of(tokens, weight_blocks<T>(d, pairs_of(r), rows_of<T>(s.device(), r)));
        more += room<Kept<T>>(tokens * zu_pitch_of(r));
        return more + room<Kept<T>>(int64_t(runs_of(tokens, run)) * d * (pairs_of(r) + 1));
    });
}

void plucker_mix_project(const Context &context, const MixInput &in, const Stack &w, const Stack *b, const MixOptions &o, const Stack &out) {
    check(in, o);
    check_projection(in, w, b);
    const Session s(context);
    if (tokens_of(in) == 0) return;
    Workspace work(context);
    dispatch(in.z.dtype, [&](auto tag) {
        using T = decltype(tag);
        const Arguments<T> a = prepare<T>(s, in, o, work);
        const Projection<T> p = projection_of<T>(in, w, b, o);
        const int64_t limit = s.device().shared_limit;
        if constexpr (kTensor<T>) {
            // Few tokens, as in decoding, or little shared memory: smaller tiles.
            if (p.d <= kWidthNarrow || a.tokens < 64u * unsigned(s.device().processors))
                return forward<T, 64, kWidthNarrow>(s, a, p, out);
            if (ForwardLayout<T, 128, kWidthTensor>(a.r).end <= limit) return forward<T, 128, kWidthTensor>(s, a, p, out);
        }
        forward<T, 64, kWidthNarrow>(s, a, p, out);
    });
}

void plucker_mix_project_backward(const Context &context, const Stack &grad, const MixInput &in, const Stack &w, const Stack *b,
                                  const MixOptions &o, const Stack &dz, const Stack &dw, const Stack *db, const Stack *dweights) {
    check(in, o);
    check_projection(in, w, b);
    if (in.ring > 0) throw ValueError("decoding has no gradient");
    const Session s(context);
    dispatch(in.z.dtype, [&](auto tag) {
        using T = decltype(tag);
        const int64_t tokens = tokens_of(in);
        if (tokens == 0) {
            throw ValueError("z holds no tokens");
        }
        Workspace work(context);
        const Arguments<T> a = prepare<T>(s, in, o, work);
        const Projection<T> p = projection_of<T>(in, w, b, o);
        const int zu_pitch = zu_pitch_of(a.r), rows = rows_of<T>(s.device(), a.r);
        const int64_t run = run_of(tokens, weight_blocks<T>(p.d, p.pairs, rows));
        const int runs = runs_of(tokens, run);
        auto *dz_own = work.take<Kept<T>>(tokens * a.r), *du = work.take<Kept<T>>(tokens * a.r), *zu = work.take<Kept<T>>(tokens * zu_pitch);
        auto *partial = work.take<Kept<T>>(int64_t(runs) * p.d * (p.pairs + 1));
        // Tokens of eight lanes keep twice as much in registers: half as many of them in a block.
        if (kTensor<T> && a.r <= 4 * kChunk && BackLayout<T, 128>(a.r).end <= s.device().shared_limit)
            back<T, kTensor<T> ? 128 : 64>(s, a, p, grad, dz_own, du, zu, zu_pitch);
        else
            back<T, 64>(s, a, p, grad, dz_own, du, zu, zu_pitch);
        BiasGradient<T> bias{};
        if (b != nullptr && dweights != nullptr && o.weighting == given && !o.bias_always) bias = {p.b, p.b_stride, p.d, Matrices<const T>(grad)};
        gather_gradients<T>(s, a, dz_own, du, dz, dweights, bias);
        if constexpr (kTensor<T>) {
            if (rows == kRowsLarge)
                weights<T, kRowsLarge>(s, a, p, grad, zu, zu_pitch, partial, run, runs);
            else
                weights<T, kRowsSmall>(s, a, p, grad, zu, zu_pitch, partial, run, runs);
        } else {
            weights<T, kRowsSmall>(s, a, p, grad, zu, zu_pitch, partial, run, runs);
        }
        const int64_t all = int64_t(p.d) * (p.pairs + 1);
        launch<add_kernel<T>>(s, "sums of the gradient of W", Shape{dim3(unsigned(divide_up<int64_t>(all, 256))), dim3(256)}, partial, runs, p.d, p.pairs,
                              Matrices<T>(dw), db != nullptr ? static_cast<T *>(db->data) : nullptr, db != nullptr ? db->col_stride : int64_t(1));
    });
}

} // namespace subspan::cuda
