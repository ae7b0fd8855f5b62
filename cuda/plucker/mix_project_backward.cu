// The gradients of mix_project.
#include "plucker/offsets_gather.cuh"
#include "plucker/tokens.cuh"
#include "linalg/tiles.cuh"

#include <algorithm>

namespace subspan::cuda {
namespace plucker {
namespace {

// -- the gradient of z and u: what comes back through W, a slice of coordinates at a time -----------------------------------------------
constexpr int kDeep = 32, kAll = 256; // rows of W at a time; columns of grad that stay

// Resident: a token's row of grad stays in shared memory while all slices pass, and two blocks share a multiprocessor, one of which contracts
// coordinates while the other multiplies. Else rows come in pieces as those of W do, for each slice anew.
template <class T, int Lanes, int Tokens, bool Resident> struct BackLayout {
    static constexpr int stages = 3, pairs = Resident ? 128 : 64, columns = Resident ? kAll : kDeep; // coordinates of a slice; columns of grad
    static constexpr int pad = kTensor<T> ? 8 : 4, pitch_g = columns + pad, pitch_w = pairs + pad;
    static constexpr int pitch_p = pairs + Lanes; // reads by tokens and lanes without conflicts, as those of z and u
    int pitch;
    int zu, sums, g, w, p, end;
    SUBSPAN_SHARED_CODE explicit BackLayout(int r) : pitch(Resident ? divide_up(r, 16) * 16 + Lanes : r | 1) { // odd: smaller, for small devices
        const auto up = [](unsigned bytes) { return int((bytes + 15u) / 16u * 16u); };
        zu = 0;
        sums = zu + up(unsigned(Tokens) * pitch * unsigned(sizeof(Two<Kept<T>>)));
        p = sums + up(Tokens * unsigned(sizeof(Kept<T>)));
        g = p + up(unsigned(Tokens) * pitch_p * unsigned(sizeof(Kept<T>)));
        w = g + up(unsigned(Resident ? 1 : stages) * Tokens * pitch_g * unsigned(sizeof(T)));
        end = w + up(unsigned(stages) * kDeep * pitch_w * unsigned(sizeof(T)));
    }
};

/// `kept`: rows of z and u and, in place r of z, of the sum of weights for the gradient of W; kept_pitch of them apart.
template <class T, int Lanes, int Tokens, bool Resident>
__global__ void __launch_bounds__(Tokens * 4, (Resident ? 2 : 1))
    back_kernel(SUBSPAN_PARAMETER const Arguments<T> a, const Projection<T> w, const Matrices<const T> grad, const bool grad_vectors, Kept<T> *dz_own,
                Kept<T> *du_own, Two<Kept<T>> *kept, int kept_pitch) {
    using A = Kept<T>;
    using Layout = BackLayout<T, Lanes, Tokens, Resident>;
    constexpr int kThreads = Tokens * 4, kRounds = Lanes / 4, kPairs = Layout::pairs, kColumns = Layout::columns;
    SUBSPAN_SHARED(memory);
    const Layout at(a.r);
    auto *zu = reinterpret_cast<Two<A> *>(memory + at.zu);
    A *sums = reinterpret_cast<A *>(memory + at.sums), *ps = reinterpret_cast<A *>(memory + at.p);
    T *gs = reinterpret_cast<T *>(memory + at.g), *ws = reinterpret_cast<T *>(memory + at.w);
    const int tid = int(threadIdx.x), q = tid % Lanes;
    const unsigned first = blockIdx.x * Tokens;
    fill_tokens<T, Lanes, Tokens>(a, first, zu, sums, at.pitch, memory + at.p, at.g - at.p);
    __syncthreads();
    for (int e = tid; e < Tokens * kept_pitch; e += kThreads) {
        const int local = e / kept_pitch, i = e - local * kept_pitch;
        if (first + unsigned(local) >= a.tokens) break;
        Two<A> v{A(0), A(0)};
        if (i < a.r)
            v = zu[local * at.pitch + i];
        else if (i == a.r)
            v.z = w.bias_always ? A(1) : sums[local];
        kept[int64_t(first) * kept_pitch + e] = v;
    }
    const int deep = divide_up(w.d, kDeep), slices = divide_up(w.pairs, kPairs);
    Copies<T, kDeep, kPairs, kThreads, Layout::pitch_w, true> copies_w;
    copies_w.start([&](int i) { return w.w + int64_t(i) * w.row_stride; });
    Copies<T, Tokens, kColumns, kThreads, Layout::pitch_g, false> copies_g;
    const T *none = grad.data;
    // Rows of grad, token by token: they may belong to several sequences.
    copies_g.start([&](int i) -> const T * { return first + unsigned(i) < a.tokens ? row_of<const T>(grad, first + unsigned(i), a.count) : nullptr; });
    const auto fetch_grad = [&](T *to, int k0) {
        if (grad_vectors) return copies_g.copy(to, k0, w.d - k0, Tokens, none);
#pragma unroll 1
        for (int e = tid; e < Tokens * kColumns; e += kThreads) {
            const int local = e / kColumns, k = k0 + e % kColumns;
            T value{};
            if (first + unsigned(local) < a.tokens && k < w.d) value = row_of<const T>(grad, first + unsigned(local), a.count)[int64_t(k) * grad.col_stride];
            to[local * Layout::pitch_g + e % kColumns] = value;
        }
    };
    if (Resident) fetch_grad(gs, 0); // arrives with the first slice
    int next_k = 0, next_slice = 0; // what is fetched next
    const auto fetch = [&](int stage) {
        if (next_slice < slices) {
            const int k0 = next_k * kDeep, p0 = next_slice * kPairs;
            T *to_w = ws + stage * kDeep * Layout::pitch_w;
            if (w.vectors)
                copies_w.copy(to_w, int64_t(k0) * w.row_stride + p0, w.pairs - p0, w.d - k0, w.w, w.row_stride);
            else
                load_block(to_w, Layout::pitch_w, w.w, w.row_stride, w.col_stride, k0, p0, kDeep, kPairs, w.d, w.pairs, false, kThreads);
            if (!Resident) fetch_grad(gs + stage * Tokens * Layout::pitch_g, k0);
            if (++next_k == deep) {
                next_k = 0;
                ++next_slice;
            }
        }
        commit_copies();
    };
    for (int stage = 0; stage + 1 < Layout::stages; ++stage) fetch(stage);
    A dz[kRounds][kChunk], du[kRounds][kChunk];
#pragma unroll
    for (int round = 0; round < kRounds; ++round)
#pragma unroll
        for (int e = 0; e < kChunk; ++e) dz[round][e] = du[round][e] = A(0);
    BlockProduct<T, Tokens, kPairs, false, false> product;
    Row<A> rows[kRounds];
    for (int slice = 0, stage = 0, free = Layout::stages - 1; slice < slices; ++slice) {
        product.clear();
        for (int k = 0; k < deep; ++k) {
            wait_copies<Layout::stages - 2>();
            __syncthreads();
            fetch(free);
            free = stage;
            product.add(Resident ? gs + k * kDeep : gs + stage * Tokens * Layout::pitch_g, Layout::pitch_g, ws + stage * kDeep * Layout::pitch_w,
                        Layout::pitch_w, kDeep); // rows of W behind d are zero
            stage = stage == Layout::stages - 1 ? 0 : stage + 1;
        }
        product.each([&](int m, int n, A v) { ps[m * Layout::pitch_p + n] = v; });
        __syncthreads();
        const int p0 = slice * kPairs, p1 = least(p0 + kPairs, w.pairs);
#pragma unroll
        for (int round = 0; round < kRounds; ++round) {
            const int local = tid / Lanes + round * (kThreads / Lanes);
            const A *row = ps + local * Layout::pitch_p;
            contract<Lanes>(a.r, q, rows[round], p0, p1, zu + local * at.pitch, dz[round], du[round], [&](int p) { return row[p - p0]; });
        }
        // The barrier before the next product also comes before these coordinates are overwritten.
    }
    wait_copies<0>();
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
        const int local = tid / Lanes + round * (kThreads / Lanes);
        const unsigned index = first + unsigned(local);
        contracted<Lanes>(a.r, q, zu + local * at.pitch, dz[round], du[round], [&](int j, A x, A y) {
            if (index >= a.tokens) return;
            dz_own[int64_t(index) * a.r + j] = x;
            du_own[int64_t(index) * a.r + j] = y;
        });
    }
}

// -- the gradient of W and b: runs of tokens, a partial sum for each -------------------------------------------------------------------
// The bias is one coordinate more: the sum of a token's weights, or one.
constexpr int kRowsLarge = 256, kRowsSmall = 128;
template <class T, int Rows> constexpr int kRun = kTensor<T> ? (Rows == kRowsLarge ? 64 : 32) : 16; // tokens at a time
template <int Rows> constexpr int kTall = Rows == kRowsLarge ? 64 : 32; // rows of a warp's tile
template <int Rows> constexpr int kWeightThreads = Rows / kTall<Rows> * 128;
template <class T> constexpr int kWide = kTensor<T> ? 128 : 64; // coordinates of a block

template <class T, int Rows> struct WeightLayout {
    static constexpr int pitch_g = Rows + 8, pitch_p = kWide<T> + 8;
    int zu, table, g, p, end;
    SUBSPAN_SHARED_CODE explicit WeightLayout(int kept_pitch) {
        const auto up = [](unsigned bytes) { return int((bytes + 15u) / 16u * 16u); };
        zu = 0;
        table = 2 * up(unsigned(kRun<T, Rows>) * kept_pitch * unsigned(sizeof(Two<Kept<T>>)));
        g = table + up(kWide<T> / 8 * unsigned(sizeof(Begin)));
        p = g + up(2 * int64_t(kRun<T, Rows>) * pitch_g * unsigned(sizeof(T)));
        end = p + up(2 * unsigned(kRun<T, Rows>) * pitch_p * unsigned(sizeof(T)));
    }
};

template <class T, int Rows>
__global__ void __launch_bounds__(kWeightThreads<Rows>, 1)
    weights_kernel(SUBSPAN_PARAMETER const Arguments<T> a, const Projection<T> w, const Matrices<const T> grad, const bool grad_vectors,
                   const Two<Kept<T>> *kept, int kept_pitch, Kept<T> *partial, int run) {
    using A = Kept<T>;
    using Layout = WeightLayout<T, Rows>;
    constexpr int kThreads = kWeightThreads<Rows>, kTokens = kRun<T, Rows>, kCols = kWide<T>;
    SUBSPAN_SHARED(memory);
    const Layout at(kept_pitch);
    auto *zu = reinterpret_cast<Two<A> *>(memory + at.zu);
    auto *table = reinterpret_cast<Begin *>(memory + at.table);
    T *gs = reinterpret_cast<T *>(memory + at.g), *ps = reinterpret_cast<T *>(memory + at.p);
    const int tid = int(threadIdx.x), c0 = int(blockIdx.x) * kCols, d0 = int(blockIdx.y) * Rows;
    const unsigned begin = blockIdx.z * unsigned(run), end = least(begin + unsigned(run), a.tokens);
    const int steps = begin < end ? int(divide_up(end - begin, unsigned(kTokens))) : 0;
    const auto fetch_grad = [&](int step) {
        if (step >= steps) return;
        constexpr int V = 16 / int(sizeof(T)), chunks = Rows / V;
        const unsigned from = begin + unsigned(step * kTokens);
        T *to = gs + (step % 2) * kTokens * Layout::pitch_g;
#pragma unroll 1
        for (int c = tid; c < kTokens * chunks; c += kThreads) {
            const int local = c / chunks, j = (c - local * chunks) * V;
            const unsigned wanted = from + unsigned(local);
            const T *row = row_of<const T>(grad, least(wanted, a.tokens - 1), a.count);
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
    };
    const auto fetch_tokens = [&](int step) {
        if (step >= steps) return;
        // Tokens lie one after the other, and a run of them begins at a multiple of 16 bytes.
        const unsigned from = begin + unsigned(step * kTokens);
        const auto *bytes = reinterpret_cast<const unsigned char *>(kept + int64_t(from) * kept_pitch);
        const int have = int(least(end - from, unsigned(kTokens))) * kept_pitch * int(sizeof(Two<A>));
        auto *there = reinterpret_cast<unsigned char *>(zu) + (step % 2) * (at.table / 2);
#pragma unroll 1
        for (int e = 16 * tid; e < kTokens * kept_pitch * int(sizeof(Two<A>)); e += 16 * kThreads) {
            const int filled = most(0, least(16, have - e));
            copy_async(there + e, filled > 0 ? bytes + e : bytes, filled);
        }
    };
    const auto coordinates_of = [&](int step) {
        if (step >= steps) return;
        const auto *rows = reinterpret_cast<const Two<A> *>(memory + at.zu + (step % 2) * (at.table / 2));
        T *to = ps + (step % 2) * kTokens * Layout::pitch_p;
        for (int c = tid; c < kTokens * (kCols / 8); c += kThreads) {
            const int local = c % kTokens, p = (c / kTokens) * 8, left = w.pairs - c0 - p;
            const Two<A> *row = rows + local * kept_pitch;
            coordinates(to + local * Layout::pitch_p + p, row, table[p / 8], left, a.r);
            if (left >= 0 && left < 8) to[local * Layout::pitch_p + p + left] = narrow<T>(row[a.r].z);
        }
    };
    fetch_tokens(0);
    commit_copies();
    fetch_tokens(1);
    fetch_grad(0);
    commit_copies();
    fill_table(table, kCols / 8, c0, w.pairs, a.r);
    BlockProduct<T, Rows, kCols, true, false, kTall<Rows>> product;
    product.clear();
    wait_copies<1>();
    __syncthreads();
    coordinates_of(0);
    const bool first_half = tid / 128 % 2 == 0; // a warp of each scheduler
    for (int step = 0; step < steps; ++step) {
        wait_copies<0>();
        __syncthreads(); // also: all are done with what is overwritten now
        fetch_tokens(step + 2);
        fetch_grad(step + 1);
        commit_copies();
        // One half of the block multiplies while the other makes the next coordinates, and the other way round.
#pragma unroll 1
        for (int half = 0; half < 2; ++half) {
            if ((half == 0) == first_half)
                product.add(gs + (step % 2) * kTokens * Layout::pitch_g, Layout::pitch_g, ps + (step % 2) * kTokens * Layout::pitch_p, Layout::pitch_p,
                            kTokens);
            else
                coordinates_of(step + 1);
        }
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
#pragma unroll 8
    for (int s = 1; s < runs; ++s) sum += partial[int64_t(s) * all + e];
    const int i = int(unsigned(e) / unsigned(pairs + 1)), j = int(e) - i * (pairs + 1);
    if (j < pairs)
        dw.data[i * dw.row_stride + j * dw.col_stride] = narrow<T>(sum);
    else if (db != nullptr)
        db[i * db_stride] = narrow<T>(sum);
}

int runs_of(int64_t tokens, int64_t run) { return int(std::max<int64_t>(1, divide_up(tokens, run))); }
// Tokens of a partial sum: a number that depends on sizes alone.
int64_t run_of(int64_t tokens, int64_t blocks) {
    const int64_t wanted = std::clamp<int64_t>(128 / std::max<int64_t>(blocks, 1), 1, 64);
    return divide_up<int64_t>(std::max<int64_t>(divide_up(tokens, wanted), 256), 64) * 64;
}
template <class T> int64_t weight_blocks(int64_t d, int64_t pairs, int rows) { return divide_up<int64_t>(pairs + 1, kWide<T>) * divide_up<int64_t>(d, rows); }
int kept_pitch_of(int64_t r) { return int((r + 1) | 1); }

template <class T> int rows_of(const Device &device, int64_t r) {
    return kTensor<T> && WeightLayout<T, kRowsLarge>(kept_pitch_of(r)).end <= device.shared_limit ? kRowsLarge : kRowsSmall;
}

template <class T, int Lanes, int Tokens, bool Resident>
void back_by(const Session &s, const Arguments<T> &a, const Projection<T> &p, const Stack &grad, Kept<T> *dz, Kept<T> *du, Two<Kept<T>> *kept, int kept_pitch) {
    const Shape shape{dim3(divide_up(a.tokens, unsigned(Tokens))), dim3(Tokens * 4), BackLayout<T, Lanes, Tokens, Resident>(a.r).end};
    launch<back_kernel<T, Lanes, Tokens, Resident>>(s, "plucker_mix_project_backward", shape, a, p, Matrices<const T>(grad), in_vectors(grad), dz, du, kept,
                                                    kept_pitch);
}

template <class T>
void back(const Session &s, const Arguments<T> &a, const Projection<T> &p, const Stack &grad, Kept<T> *dz, Kept<T> *du, Two<Kept<T>> *kept, int kept_pitch) {
    if constexpr (kTensor<T>) {
        if (a.r <= 4 * kChunk) {
            // Each block has a kilobyte of its own beside what it asks for.
            const int64_t limit = s.device().shared_limit;
            if (p.d > kAll / 2 && p.d <= kAll && 2 * (BackLayout<T, 4, 64, true>(a.r).end + 1024) <= limit + 1024)
                return back_by<T, 4, 64, true>(s, a, p, grad, dz, du, kept, kept_pitch);
            // Tokens of eight lanes keep twice as much in registers: half as many of them in a block.
            if (BackLayout<T, 4, 128, false>(a.r).end <= limit) return back_by<T, 4, 128, false>(s, a, p, grad, dz, du, kept, kept_pitch);
        }
    }
    with_lanes(a.r, [&](auto lanes) { back_by<T, decltype(lanes)::value, 64, false>(s, a, p, grad, dz, du, kept, kept_pitch); });
}

template <class T, int Rows>
void weights(const Session &s, const Arguments<T> &a, const Projection<T> &p, const Stack &grad, const Two<Kept<T>> *kept, int kept_pitch, Kept<T> *partial,
             int64_t run, int runs) {
    const Shape shape{dim3(unsigned(divide_up(p.pairs + 1, kWide<T>)), unsigned(divide_up(p.d, Rows)), unsigned(runs)), dim3(kWeightThreads<Rows>),
                      WeightLayout<T, Rows>(kept_pitch).end};
    launch<weights_kernel<T, Rows>>(s, "the gradient of W", shape, a, p, Matrices<const T>(grad), in_vectors(grad), kept, kept_pitch, partial, int(run));
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
               if (sizeof(T) == 2 && o.rope == Rope::none) more += room<Sent>(tokens * int64_t(o.offsets.size()));
               if (d == 0) return more;
               Context context;
               context.device = device;
               const Session s(context);
               const int64_t run = run_of(tokens, weight_blocks<T>(d, pairs_of(r), rows_of<T>(s.device(), r)));
               more += room<Two<Kept<T>>>(tokens * kept_pitch_of(r));
               return more + room<Kept<T>>(int64_t(runs_of(tokens, run)) * d * (pairs_of(r) + 1));
           });
}

void plucker_mix_project_backward(const Context &context, const Stack &grad, const MixInput &in, const Stack &w, const Stack *b, const MixOptions &o,
                                  const Stack &dz, const Stack &dw, const Stack *db, const Stack *dweights) {
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
        const int kept_pitch = kept_pitch_of(a.r), rows = rows_of<T>(s.device(), a.r);
        const int64_t run = run_of(tokens, weight_blocks<T>(p.d, p.pairs, rows));
        const int runs = runs_of(tokens, run);
        auto *dz_own = work.take<Kept<T>>(tokens * a.r), *du = work.take<Kept<T>>(tokens * a.r);
        auto *kept = work.take<Two<Kept<T>>>(tokens * kept_pitch);
        auto *partial = work.take<Kept<T>>(int64_t(runs) * p.d * (p.pairs + 1));
        back<T>(s, a, p, grad, dz_own, du, kept, kept_pitch);
        BiasGradient<T> bias{};
        if (b != nullptr && dweights != nullptr && o.weighting == MixWeights::given && !o.bias_always) bias = {p.b, p.b_stride, p.d, Matrices<const T>(grad)};
        auto *sent = sends(a) ? work.take<Sent>(int64_t(a.tokens) * a.m) : nullptr;
        gather_gradients<T>(s, a, dz_own, du, dz, dweights, sent, bias);
        if constexpr (kTensor<T>) {
            if (rows == kRowsLarge)
                weights<T, kRowsLarge>(s, a, p, grad, kept, kept_pitch, partial, run, runs);
            else
                weights<T, kRowsSmall>(s, a, p, grad, kept, kept_pitch, partial, run, runs);
        } else {
            weights<T, kRowsSmall>(s, a, p, grad, kept, kept_pitch, partial, run, runs);
        }
        const int64_t all = int64_t(p.d) * (p.pairs + 1);
        launch<add_kernel<T>>(s, "sums of the gradient of W", Shape{dim3(unsigned(divide_up<int64_t>(all, 256))), dim3(256)}, partial, runs, p.d, p.pairs,
                              Matrices<T>(dw), db != nullptr ? static_cast<T *>(db->data) : nullptr, db != nullptr ? db->col_stride : int64_t(1));
    });
}

} // namespace subspan::cuda
