#include "plucker/tokens.cuh"
#include "linalg/tiles.cuh"

namespace subspan::cuda {
namespace plucker {
namespace {

template <class T> constexpr int kSlice = kTensor<T> ? 32 : 16; // coordinates of a slice of W
constexpr int kStages = 3;

template <class T, int Tokens, int Width> struct ForwardLayout {
    static constexpr int slice = kSlice<T>, V = 16 / int(sizeof(T)), pitch_a = slice + (kTensor<T> ? 8 : 4), pitch_w = pitch_a, pitch_out = Width + V;
    int pitch;
    int zu, sums, bias, table, a, w, end;
    SUBSPAN_SHARED_CODE explicit ForwardLayout(int r) : pitch(r | 1) {
        const auto up = [](unsigned bytes) { return int((bytes + 15u) / 16u * 16u); };
        zu = 0;
        sums = zu + up(unsigned(Tokens) * pitch * unsigned(sizeof(Two<Kept<T>>)));
        bias = sums + up(Tokens * unsigned(sizeof(Kept<T>)));
        table = bias + up(Width * unsigned(sizeof(Kept<T>)));
        a = table + up(chunks(r) * unsigned(sizeof(Begin)));
        w = a + up(2 * Tokens * pitch_a * unsigned(sizeof(T)));
        end = w + up(unsigned(kStages) * Width * pitch_w * unsigned(sizeof(T)));
    }
    SUBSPAN_SHARED_CODE static int chunks(int r) { return divide_up(r * (r - 1) / 2, slice) * (slice / 8); }
    // The result takes the room of slices, and the addresses of its rows that of z and u.
    static_assert(Tokens * pitch_out <= 2 * Tokens * pitch_a + kStages * Width * pitch_w);
};

template <class T, int Lanes, int Tokens, int Width>
__global__ void __launch_bounds__(Tokens * 4, 1)
    project_kernel(SUBSPAN_PARAMETER const Arguments<T> a, const Projection<T> w, const Matrices<T> out, const bool out_vectors) {
    using A = Kept<T>;
    using Layout = ForwardLayout<T, Tokens, Width>;
    constexpr int kThreads = Tokens * 4, slice = Layout::slice, V = Layout::V;
    SUBSPAN_SHARED(memory);
    const Layout at(a.r);
    auto *zu = reinterpret_cast<Two<A> *>(memory + at.zu);
    A *sums = reinterpret_cast<A *>(memory + at.sums), *bias = reinterpret_cast<A *>(memory + at.bias);
    auto *table = reinterpret_cast<Begin *>(memory + at.table);
    T *as = reinterpret_cast<T *>(memory + at.a), *ws = reinterpret_cast<T *>(memory + at.w);
    const int tid = int(threadIdx.x), d0 = int(blockIdx.y) * Width, slices = divide_up(w.pairs, slice);
    const unsigned first = blockIdx.x * Tokens;
    Copies<T, Width, slice, kThreads, Layout::pitch_w, true, Lanes == 4> copies; // with eight lanes a token it would spill
    const auto begin = [&](int i) { return w.w + int64_t(d0 + i) * w.row_stride; };
    const auto fetch = [&](int s, T *to) {
        if (s < slices) {
            if (w.vectors)
                copies.copy(to, s * slice, w.pairs - s * slice, w.d - d0, w.w, w.row_stride);
            else
                load_block(to, Layout::pitch_w, w.w, w.row_stride, w.col_stride, d0, s * slice, Width, slice, w.d, w.pairs, false, kThreads);
        }
        commit_copies();
    };
    constexpr int kStage = Width * Layout::pitch_w;
    // Slices of W come in while the tokens are looked at.
    copies.start(begin);
    fetch(0, ws);
    fetch(1, ws + kStage);
    fill_table(table, Layout::chunks(a.r), 0, w.pairs, a.r);
    for (int n = tid; n < Width; n += kThreads) bias[n] = w.b != nullptr && d0 + n < w.d ? A(widen(w.b[int64_t(d0 + n) * w.b_stride])) : A(0);
    fill_tokens<T, Lanes, Tokens>(a, first, zu, sums, at.pitch, memory + at.a, at.w - at.a);
    __syncthreads();
    copies.start(begin); // not kept in registers while tokens are looked at
    BlockProduct<T, Tokens, Width, false, true> product;
    product.clear();
    T *stage = ws, *free = ws + 2 * kStage;
    const auto coordinates_of = [&](int s) {
        T *mine = as + (s % 2) * Tokens * Layout::pitch_a;
        const int local = tid % Tokens;
        for (int c = tid / Tokens; c < slice / 8; c += 4)
            coordinates(mine + local * Layout::pitch_a + 8 * c, zu + local * at.pitch, table[s * (slice / 8) + c], w.pairs - s * slice - 8 * c, a.r);
    };
    coordinates_of(0);
    const bool first_half = tid / 128 % 2 == 0; // a warp of each scheduler
    for (int s = 0; s < slices; ++s) {
        wait_copies<1>();
        __syncthreads();
        fetch(s + 2, free); // into the stage that the slice before has left
        // One half of the block multiplies while the other makes the next coordinates, and the other way round.
#pragma unroll 1
        for (int half = 0; half < 2; ++half) {
            if ((half == 0) == first_half)
                product.add(as + (s % 2) * Tokens * Layout::pitch_a, Layout::pitch_a, stage, Layout::pitch_w, slice);
            else if (s + 1 < slices)
                coordinates_of(s + 1);
        }
        free = stage;
        stage = stage + kStage < ws + kStages * kStage ? stage + kStage : ws;
    }
    wait_copies<0>();
    __syncthreads();
    // By way of shared memory, so that rows are written 16 bytes at a time.
    const bool whole = w.b == nullptr || w.bias_always;
    T *staged = as;
    product.store(staged, Layout::pitch_out, bias, [&](int m) { return whole ? A(1) : sums[m]; });
    T **rows = reinterpret_cast<T **>(memory + at.zu);
    for (int m = tid; m < Tokens; m += kThreads) rows[m] = first + unsigned(m) < a.tokens ? row_of<T>(out, first + unsigned(m), a.count) : nullptr;
    __syncthreads();
    for (int c = tid; c < Tokens * (Width / V); c += kThreads) {
        const int m = c / (Width / V), n = c % (Width / V) * V;
        T *row = rows[m];
        const T *from = staged + m * Layout::pitch_out + n;
        if (row == nullptr || d0 + n >= w.d) continue;
        if (out_vectors && d0 + n + V <= w.d) {
            *reinterpret_cast<uint4 *>(row + d0 + n) = *reinterpret_cast<const uint4 *>(from);
        } else {
#pragma unroll 1
            for (int e = 0; e < V && d0 + n + e < w.d; ++e) row[int64_t(d0 + n + e) * out.col_stride] = from[e];
        }
    }
}

constexpr int kWidthTensor = 256, kWidthNarrow = 64;

template <class T, int Tokens, int Width> void forward(const Session &s, const Arguments<T> &a, const Projection<T> &p, const Stack &out) {
    const int64_t shared = ForwardLayout<T, Tokens, Width>(a.r).end;
    const Shape shape{dim3(divide_up(a.tokens, unsigned(Tokens)), unsigned(divide_up(p.d, Width))), dim3(Tokens * 4), shared};
    with_lanes(a.r, [&](auto lanes) {
        launch<project_kernel<T, decltype(lanes)::value, Tokens, Width>>(s, "plucker_mix_project", shape, a, p, Matrices<T>(out), in_vectors(out));
    });
}

} // namespace

void check_projection(const MixInput &in, const Stack &w, const Stack *b) {
    const int pairs = pairs_of(in.z.cols);
    if (w.cols != pairs || w.rows < 1)
        throw ValueError("W must have shape (d, " + std::to_string(pairs) + "), a column for each pair of " + std::to_string(in.z.cols) + " dimensions, got " +
                         std::to_string(w.rows) + " x " + std::to_string(w.cols));
    if (w.dtype != in.z.dtype) throw ValueError(std::string("W must be ") + name_of(in.z.dtype) + " as z is, got " + name_of(w.dtype));
    if (w.axes != 0) throw ValueError("W must have 2 dimensions");
    if (b != nullptr && (b->cols != w.rows || b->dtype != w.dtype)) throw ValueError("b must have " + std::to_string(w.rows) + " entries of W's dtype");
    if (w.rows > (1 << 20)) throw ValueError("W has too many rows for one call");
}

} // namespace plucker

using namespace plucker;

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
            if (p.d <= kWidthNarrow || a.tokens < 64u * unsigned(s.device().processors)) return forward<T, 64, kWidthNarrow>(s, a, p, out);
            if (ForwardLayout<T, 128, kWidthTensor>(a.r).end <= limit) return forward<T, 128, kWidthTensor>(s, a, p, out);
        }
        forward<T, 64, kWidthNarrow>(s, a, p, out);
    });
}

} // namespace subspan::cuda
