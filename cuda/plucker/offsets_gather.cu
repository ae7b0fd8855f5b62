#include "plucker/offsets_gather.cuh"

#include "plucker/halo.cuh"

#include <algorithm>

namespace subspan::cuda::plucker {
namespace {

constexpr int kFewer = 128; // threads of a block with many registers: three on a multiprocessor, two of 256 would spill

// What a token has of its own, with its part in every rejection; and what it sends.
template <class T, int Lanes>
__global__ void __launch_bounds__(kFewer, (sizeof(T) == 2 && Lanes == 4 ? 3 : 1))
    own_kernel(SUBSPAN_PARAMETER const Arguments<T> a, Kept<T> *dz_own, const Kept<T> *du_own, const Matrices<Kept<T>> dweights, bool with_weights,
               SUBSPAN_PARAMETER const BiasGradient<T> bias, Sent *sent, int room) {
    using L = typename OffsetOf<T>::type;
    constexpr int RC = kChunk, kTile = kFewer / Lanes;
    SUBSPAN_SHARED(memory);
    const int tid = int(threadIdx.x), q = tid % Lanes;
    const unsigned index = blockIdx.x * kTile + unsigned(tid / Lanes);
    Halo<T> halo;
    if (sent != nullptr) {
        halo = load_halo<T, kTile, kFewer>(a, blockIdx.x * kTile, memory, room);
        __syncthreads();
    }
    const Token<T, Lanes> token(a, index, halo);
    L own[RC], du[RC];
    bool any = false;
    for (int j = 0; j < a.m; ++j) any = any || token.counts(token.t, j);
    any = any && token.in;
    token.chunk_of(dz_own, index, any, own);
    token.chunk_of(du_own, index, any, du);
    // A bias goes with the sum of the weights.
    L along = L(0);
    if (bias.b != nullptr) {
        if (any) {
            const T *row = bias.grad.at(token.sequence) + int64_t(index - token.sequence * a.count) * bias.grad.row_stride;
            for (int i = q; i < bias.d; i += Lanes)
                along = fma(L(widen(row[int64_t(i) * bias.grad.col_stride])), L(widen(bias.b[int64_t(i) * bias.stride])), along);
        }
        along = sum_of<Lanes>(along);
    }
    const L mine = token.mean_at(token.t), inverse = token.inverse(), zdu = token.dot(token.z.x, du);
    const bool all = token.all_count();
    L outer_sum = L(0), less = L(0), mean = L(0); // times z and times du, what is taken off at the end
    Kept<T> *weights_row = nullptr;
    if (with_weights && token.in) weights_row = dweights.at(token.sequence) + int64_t(index - token.sequence * a.count) * dweights.row_stride;
#pragma unroll 1
    for (int j = 0; j < a.m; ++j) {
        const bool valid = all || token.counts(token.t, j);
        const L alpha = all ? mine : token.weight(token.t, j, mine, valid);
        L y = L(0);
        Sent note{0.0f, 0.0f, 0.0f, valid ? 0.0f : -1.0f};
        typename Token<T, Lanes>::Near n{};
        if (token.near(j, valid, inverse, n) && !warp_any(valid && !(n.yy > L(0)))) {
            if constexpr (sizeof(T) == 2) {
                L inner = L(0);
#pragma unroll
                for (int e = 0; e < RC; ++e) inner = fma(n.w[e], du[e], inner);
                inner = fma(-n.c, zdu, sum_of<Lanes>(inner));
                if (valid) {
                    const Scale<L> f = token.scale(n);
                    const L k = alpha != L(0) ? a.sign * alpha * f.f : L(0);
                    y = f.f * inner;
                    const L e0 = a.norm == soft || (a.norm == clamp && f.above) ? k * y * f.f : L(0), outer = e0 * token.zz;
                    outer_sum = fma(n.c * n.c, outer, fma(e0, n.yy, outer_sum));
                    less = fma(n.c, k, less);
#pragma unroll
                    for (int e = 0; e < RC; ++e) own[e] = fma(n.c * outer, n.w[e], own[e]);
                    note = {k * n.down, outer * n.c * n.down, -outer * n.down, power_of_two<float>(-token.z.power)};
                    const float size = (note.a < 0 ? -note.a : note.a) + (note.b < 0 ? -note.b : note.b) + (note.c < 0 ? -note.c : note.c);
                    if (!(size < 1e37f)) note.scale = 0.0f; // the product may still fit
                }
            }
        } else {
            Chunk<L> w;
            token.load(w, token.t - a.offsets[j], valid);
            const Pair<L> p = token.reject(token.z, token.zz, w, alpha, valid);
            const Flow<L> f = flow(p, token.dot(w.x, du));
            outer_sum += valid ? f.e * p.yy : L(0);
            const L outer = f.e * token.zz;
#pragma unroll
            for (int e = 0; e < RC; ++e) own[e] -= valid ? p.c * (p.k * du[e] - outer * w.x[e]) : L(0);
            y = f.y;
        }
        if (sent != nullptr && q == 0 && token.in) sent[int64_t(index) * a.m + j] = note;
        const L da = valid ? L(Kept<T>(L(a.sign) * y)) : L(0); // as it is stored: what is taken off it later must be the same
        if (a.weighting == softmax) mean += alpha != L(0) ? alpha * da : L(0);
        if (weights_row != nullptr && q == 0)
            weights_row[j * dweights.col_stride] = Kept<T>(a.weighting == Weighting::mean ? L(0) : (valid ? da + along : L(0)));
    }
    if (weights_row != nullptr && q == 0 && a.weighting == softmax)
        for (int j = 0; j < a.m; ++j) {
            Kept<T> &d = weights_row[j * dweights.col_stride];
            const L alpha = token.weight(token.t, j, mine, token.counts(token.t, j));
            d = alpha != L(0) ? Kept<T>(alpha * (L(d) - mean)) : Kept<T>(0);
        }
    if (!token.in) return;
    Kept<T> *row = dz_own + int64_t(index) * a.r + q * RC;
#pragma unroll
    for (int e = 0; e < RC; ++e)
        if (q * RC + e < a.r) row[e] = Kept<T>(any ? own[e] - less * du[e] - outer_sum * token.z.x[e] : L(0));
}

// Each token gathers what those that look at it send, in the order of the offsets.
template <class T, int Lanes>
__global__ void __launch_bounds__(kFewer, (sizeof(T) == 2 && Lanes == 4 ? 3 : 1))
    gather_kernel(SUBSPAN_PARAMETER const Arguments<T> a, const Kept<T> *dz_own, const Kept<T> *du_own, const Sent *sent, const Matrices<T> dz) {
    using L = typename OffsetOf<T>::type;
    constexpr int RC = kChunk, kTile = kFewer / Lanes;
    const int tid = int(threadIdx.x), q = tid % Lanes;
    const unsigned index = blockIdx.x * kTile + unsigned(tid / Lanes);
    const Token<T, Lanes> token(a, index);
    L sum[RC];
    token.chunk_of(dz_own, index, token.in, sum);
    const L back = power_of_two<L>(-token.z.power);
#pragma unroll
    for (int e = 0; e < RC; ++e) sum[e] *= back;
    static_assert(kOffsets <= 64);
    uint64_t rest = ~uint64_t(0) >> (64 - a.m); // offsets that do not go the short way, the same in a warp
    const auto note_of = [&](int j) {
        const int64_t t = token.t + a.offsets[j];
        if (!token.in || t < 0 || t >= a.length) return Sent{0.0f, 0.0f, 0.0f, -1.0f};
        return sent[(int64_t(index) + a.offsets[j]) * a.m + j];
    };
    if (sent != nullptr) {
        if constexpr (sizeof(T) == 2) {
            float along = 0.0f;
#pragma unroll 2
            for (int j = 0; j < a.m; ++j) {
                const Sent note = note_of(j);
                if (!warp_any(note.scale == 0.0f)) rest &= ~(uint64_t(1) << j);
                if (!(note.scale > 0.0f)) continue;
                const int64_t other = int64_t(index) + a.offsets[j];
                float du[RC], z[RC];
                token.chunk_of(du_own, other, true, du);
                token.raw(z, token.t + a.offsets[j]);
#pragma unroll
                for (int e = 0; e < RC; ++e) sum[e] += fma(note.a, du[e], note.b * (note.scale * z[e]));
                along += note.c;
            }
#pragma unroll
            for (int e = 0; e < RC; ++e) sum[e] = fma(along, token.z.x[e], sum[e]);
        }
    }
#pragma unroll 1
    for (; rest != 0; rest &= rest - 1) {
        const int j = lowest_bit(rest);
        const int64_t t = token.t + a.offsets[j];
        const bool valid = token.counts(t, j) && (sent == nullptr || note_of(j).scale == 0.0f);
        const L alpha = token.weight(t, j, token.mean_at(t), valid);
        Chunk<L> z, w;
        token.load(z, valid ? t : token.t, valid);
        const L zz = token.square(z.x);
        L du_t[RC];
        token.chunk_of(du_own, int64_t(index) + a.offsets[j], valid, du_t);
#pragma unroll
        for (int e = 0; e < RC; ++e) w.x[e] = valid ? token.z.x[e] : L(0);
        w.power = token.z.power;
        const Pair<L> p = token.reject(z, zz, w, alpha, valid);
        const Flow<L> f = flow(p, token.dot(w.x, du_t));
        const L outer = f.e * zz, by = power_of_two<L>(-p.power);
#pragma unroll
        for (int e = 0; e < RC; ++e) sum[e] += valid ? (p.k * du_t[e] - outer * w.x[e]) * by : L(0);
    }
    // Rotations are undone; a lane needs what its partner has.
    if (a.rope != 0) {
        SUBSPAN_SHARED(memory);
        L *rows = reinterpret_cast<L *>(memory) + (tid / Lanes) * (a.r | 1);
#pragma unroll
        for (int e = 0; e < RC; ++e)
            if (q * RC + e < a.r) rows[q * RC + e] = sum[e];
        __syncwarp();
        const int half = a.r / 2;
#pragma unroll
        for (int e = 0; e < RC; ++e) {
            const int i = q * RC + e;
            if (i >= a.r || !token.in) continue;
            const int pair = a.rope == 1 ? i / 2 : i % half;
            const bool second = a.rope == 1 ? i % 2 == 1 : i >= half;
            const int partner = a.rope == 1 ? i ^ 1 : (second ? i - half : i + half);
            const double *cs = a.rotations + 2 * ((token.t - a.rotations_from) * half + pair);
            const double x = double(rows[i]), y = double(rows[partner]);
            sum[e] = L(second ? x * cs[0] - y * cs[1] : x * cs[0] + y * cs[1]);
        }
    }
    if (!token.in) return;
    T *row = dz.at(token.sequence) + int64_t(index - token.sequence * a.count) * dz.row_stride;
    const bool open = token.open(token.t);
#pragma unroll
    for (int e = 0; e < RC; ++e)
        if (q * RC + e < a.r) row[(q * RC + e) * dz.col_stride] = narrow<T>(open ? Kept<T>(sum[e]) : Kept<T>(0));
}

} // namespace

template <class T>
void gather_gradients(const Session &s, const Arguments<T> &a, Kept<T> *dz_own, const Kept<T> *du, const Stack &dz, const Stack *dweights, Sent *sent,
                      const BiasGradient<T> &bias) {
    Matrices<Kept<T>> dw{};
    if (dweights != nullptr) dw = Matrices<Kept<T>>(*dweights);
    with_lanes(a.r, [&](auto lanes) {
        constexpr int tile = kFewer / decltype(lanes)::value;
        const dim3 grid{divide_up(a.tokens, unsigned(tile))};
        // Rows of z that offsets reach; far ones take the long way.
        const int room = sent == nullptr ? 0 : int(std::min<int64_t>(48 << 10, (tile + a.back + a.ahead) * (divide_up(a.r, 8) * 16 + 8)));
        launch<own_kernel<T, decltype(lanes)::value>>(s, "the gradient of tokens", Shape{grid, dim3(kFewer), room}, a, dz_own, du, dw, dweights != nullptr,
                                                      bias, sent, room);
        const int64_t shared = a.rope != 0 ? int64_t(tile) * (a.r | 1) * int64_t(sizeof(typename OffsetOf<T>::type)) : 0;
        launch<gather_kernel<T, decltype(lanes)::value>>(s, "the gradient of tokens", Shape{grid, dim3(kFewer), shared}, a,
                                                         static_cast<const Kept<T> *>(dz_own), du, static_cast<const Sent *>(sent), Matrices<T>(dz));
    });
}
template void gather_gradients<F16>(const Session &, const Arguments<F16> &, float *, const float *, const Stack &, const Stack *, Sent *,
                                    const BiasGradient<F16> &);
template void gather_gradients<Bf16>(const Session &, const Arguments<Bf16> &, float *, const float *, const Stack &, const Stack *, Sent *,
                                     const BiasGradient<Bf16> &);
template void gather_gradients<float>(const Session &, const Arguments<float> &, float *, const float *, const Stack &, const Stack *, Sent *,
                                      const BiasGradient<float> &);
template void gather_gradients<double>(const Session &, const Arguments<double> &, double *, const double *, const Stack &, const Stack *, Sent *,
                                       const BiasGradient<double> &);

} // namespace subspan::cuda::plucker
