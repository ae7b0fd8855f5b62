#include "plucker/offsets_gather.cuh"
#include "plucker/pairs.cuh"

#include <algorithm>
#include <cmath>
#include <limits>

namespace subspan::cuda {
namespace plucker {
namespace {

constexpr int kThreads = 256;

struct Frequencies {
    double x[kDepth / 2]; // in half turns
};
__global__ void __launch_bounds__(256) rotations_kernel(double *rotations, int64_t first, unsigned count, unsigned half, const Frequencies frequency) {
    const unsigned e = blockIdx.x * 256 + threadIdx.x;
    if (e >= count * half) return;
    const double angle = double(first + int64_t(e / half)) * frequency.x[e % half];
    double sine, cosine;
    sincospi(angle, &sine, &cosine);
    rotations[2 * e] = cosine;
    rotations[2 * e + 1] = sine;
}

// Which offsets count at each token, and their weights: one thread a token.
template <class T> __global__ void __launch_bounds__(256) weigh_kernel(SUBSPAN_PARAMETER const Arguments<T> a, const Matrices<const T> weights) {
    using L = typename OffsetOf<T>::type;
    const unsigned index = blockIdx.x * 256 + threadIdx.x;
    if (index >= a.tokens) return;
    const unsigned sequence = index / a.count;
    const int64_t t = a.first + int64_t(index - sequence * a.count);
    const auto open = [&](int64_t s) { return !a.has_mask || a.mask.at(sequence)[(a.ring > 0 ? s % a.ring : s) * a.mask.col_stride] != 0; };
    const T *numbers = a.weighting == mean ? nullptr : weights.at(sequence) + (t - a.first) * weights.row_stride;
    const auto number = [&](int j) { return L(widen(numbers[j * weights.col_stride])); };
    L *alpha = a.alpha + int64_t(index) * a.m;
    unsigned char *valid = a.valid + int64_t(index) * a.m;
    const bool mine = open(t);
    L top = -power_of_two<L>(2000), total = L(0);
    for (int j = 0; j < a.m; ++j) {
        const int64_t other = t - a.offsets[j];
        bool counts = mine && other >= 0 && other < a.length && open(other);
        if (a.weighting == softmax && counts) {
            const L x = number(j);
            counts = !(x == -power_of_two<L>(2000)); // a logit of minus infinity leaves an offset out
            if (counts) top = most(top, x);
        }
        valid[j] = counts;
    }
    for (int j = 0; j < a.m; ++j) {
        L w = L(0);
        if (valid[j] != 0) w = a.weighting == given ? number(j) : (a.weighting == mean ? L(1) : exp(number(j) - top));
        alpha[j] = w;
        total += w;
    }
    if (a.weighting != given)
        for (int j = 0; j < a.m; ++j)
            if (valid[j] != 0) alpha[j] /= total;
}

template <class T, int Lanes> __global__ void __launch_bounds__(kThreads, 1) mix_kernel(SUBSPAN_PARAMETER const Arguments<T> a, const Matrices<T> out) {
    using A = Kept<T>;
    constexpr int RC = kChunk, kTile = kThreads / Lanes;
    SUBSPAN_SHARED(memory);
    const int pitch = a.r | 1, tid = int(threadIdx.x), local = tid / Lanes, q = tid % Lanes, pairs = a.r * (a.r - 1) / 2;
    auto *zu = reinterpret_cast<Two<A> *>(memory);
    auto *table = reinterpret_cast<unsigned char *>(zu + kTile * pitch); // i and j of every pair
    for (int i = tid; i + 1 < a.r; i += kThreads)
        for (int j = i + 1, p = i * a.r - i * (i + 1) / 2; j < a.r; ++j, ++p) {
            table[2 * p] = static_cast<unsigned char>(i);
            table[2 * p + 1] = static_cast<unsigned char>(j);
        }
    const unsigned first = blockIdx.x * kTile;
    {
        const Token<T, Lanes> token(a, first + unsigned(local));
        typename OffsetOf<T>::type u[RC];
        token.gather(u);
#pragma unroll
        for (int e = 0; e < RC; ++e)
            if (q * RC + e < a.r) zu[local * pitch + q * RC + e] = {A(token.z.x[e]), A(u[e])};
    }
    __syncthreads();
    for (int l = tid / 32; l < kTile && first + unsigned(l) < a.tokens; l += kThreads / 32) {
        const unsigned index = first + unsigned(l), sequence = index / a.count;
        T *row = out.at(sequence) + int64_t(index - sequence * a.count) * out.row_stride;
        const Two<A> *token = zu + l * pitch;
        for (int p = tid % 32; p < pairs; p += 32) {
            const Two<A> f = token[table[2 * p]], g = token[table[2 * p + 1]];
            row[p * out.col_stride] = narrow<T>(fma(f.z, g.u, -(g.z * f.u)));
        }
    }
}

template <class T, int Lanes>
__global__ void __launch_bounds__(kThreads, 1)
    mix_gradient_kernel(SUBSPAN_PARAMETER const Arguments<T> a, const Matrices<const T> grad, Kept<T> *dz_own, Kept<T> *du_own) {
    using A = Kept<T>;
    constexpr int RC = kChunk, kTile = kThreads / Lanes;
    SUBSPAN_SHARED(memory);
    const int pitch = a.r | 1, tid = int(threadIdx.x), local = tid / Lanes, q = tid % Lanes, pairs = a.r * (a.r - 1) / 2;
    auto *zu = reinterpret_cast<Two<A> *>(memory);
    const unsigned index = blockIdx.x * kTile + unsigned(local);
    A dz[RC], du[RC];
    {
        const Token<T, Lanes> token(a, index);
        typename OffsetOf<T>::type sum[RC];
        token.gather(sum);
#pragma unroll
        for (int e = 0; e < RC; ++e) {
            dz[e] = du[e] = A(0);
            if (q * RC + e < a.r) zu[local * pitch + q * RC + e] = {A(token.z.x[e]), A(sum[e])};
        }
    }
    __syncwarp();
    const bool in = index < a.tokens;
    const unsigned sequence = in ? index / a.count : 0u;
    const T *row = grad.at(sequence) + int64_t(in ? index - sequence * a.count : 0u) * grad.row_stride;
    // All lanes of a warp take part in its sums, also those behind the last token.
    Row<A> at;
    contract<Lanes>(a.r, q, at, 0, pairs, zu + local * pitch, dz, du, [&](int p) { return in ? A(widen(row[p * grad.col_stride])) : A(0); });
    contracted<Lanes>(a.r, q, zu + local * pitch, dz, du, [&](int j, A x, A y) {
        if (!in) return;
        dz_own[int64_t(index) * a.r + j] = x;
        du_own[int64_t(index) * a.r + j] = y;
    });
}

} // namespace

void check(const MixInput &in, const MixOptions &o) {
    const int64_t r = in.z.cols, m = int64_t(o.offsets.size());
    if (r < 2) throw ValueError("z has tokens of " + std::to_string(r) + " dimensions, and a plane needs at least 2");
    if (r > kDepth) throw ValueError("z has tokens of " + std::to_string(r) + " dimensions; the CUDA kernels take at most " + std::to_string(kDepth));
    if (m < 1 || m > kOffsets)
        throw ValueError("offsets must hold between 1 and " + std::to_string(kOffsets) + " numbers on a CUDA device, got " + std::to_string(m));
    for (const int64_t d : o.offsets)
        if (d == 0) throw ValueError("offsets holds 0");
    if (in.z.dtype == DType::u8) throw ValueError("z must be a floating-point array");
    if (o.weighting != MixWeights::mean && in.weights == nullptr) throw ValueError("weights are missing");
    if (in.weights != nullptr) {
        if (in.weights->dtype != in.z.dtype) throw ValueError(std::string("weights must be ") + name_of(in.z.dtype) + " as z is");
        if (in.weights->cols != m) throw ValueError("weights must have " + std::to_string(m) + " columns");
    }
    if (in.mask != nullptr && in.mask->dtype != DType::u8) throw ValueError("mask must be uint8");
    if (tokens_of(in) > int64_t(std::numeric_limits<int>::max()) / 64) throw ValueError("z has too many tokens for one call");
}

Positions positions_of(const MixInput &in, const MixOptions &o) {
    if (o.rope == Rope::none) return {0, 0};
    if (in.ring > 0) return {std::max<int64_t>(0, in.first + 1 - in.ring), std::min(in.ring, in.first + 1)};
    return {0, in.z.rows};
}

namespace {

bool plain(const MixInput &in, const MixOptions &o) { return o.weighting == MixWeights::mean && in.mask == nullptr; }
int64_t rotations_count(const MixInput &in, const MixOptions &o) { return positions_of(in, o).count * (in.z.cols / 2) * 2; }

} // namespace

int64_t prepare_room(const MixInput &in, const MixOptions &o) {
    const int64_t weights = plain(in, o) ? 0 : tokens_of(in) * int64_t(o.offsets.size());
    return room<double>(rotations_count(in, o)) + (weights > 0 ? room<double>(weights) + room<unsigned char>(weights) : 0);
}

template <class T> Arguments<T> prepare(const Session &s, const MixInput &in, const MixOptions &o, Workspace &work) {
    Arguments<T> a{};
    a.z = Matrices<const T>(in.z);
    a.has_mask = in.mask != nullptr;
    if (a.has_mask) a.mask = Matrices<const unsigned char>(*in.mask);
    a.vectors = in_vectors(in.z);
    a.ring = in.ring;
    a.first = in.ring > 0 ? in.first : 0;
    a.length = in.ring > 0 ? in.first + 1 : in.z.rows;
    a.count = in.ring > 0 ? 1u : unsigned(in.z.rows);
    a.tokens = unsigned(tokens_of(in));
    a.r = int(in.z.cols);
    a.m = int(o.offsets.size());
    a.norm = int(o.norm);
    a.weighting = int(o.weighting);
    using L = typename OffsetOf<T>::type;
    a.eps = L(o.eps);
    a.sign = o.past_first ? L(-1) : L(1);
    a.rope = int(o.rope);
    const Positions p = positions_of(in, o);
    a.rotations_from = p.from;
    for (int j = 0; j < a.m; ++j) {
        a.offsets[j] = o.offsets[std::size_t(j)];
        a.back = std::max(a.back, a.offsets[j]);
        a.ahead = std::max(a.ahead, -a.offsets[j]);
    }
    a.whole = L(1) / L(a.m);
    if (o.rope != Rope::none) {
        double *rotations = work.take<double>(rotations_count(in, o));
        a.rotations = rotations;
        Frequencies f{};
        const int half = a.r / 2;
        for (int i = 0; i < half; ++i) f.x[i] = std::pow(o.rope_base, -2.0 * i / a.r) / 3.14159265358979323846;
        launch<rotations_kernel>(s, "the table of rotations", Shape{dim3(unsigned(divide_up<int64_t>(p.count * half, 256))), dim3(256)}, rotations,
                                 o.rope_start + p.from, unsigned(p.count), unsigned(half), f);
    }
    if (!plain(in, o)) {
        a.alpha = work.take<L>(int64_t(a.tokens) * a.m);
        a.valid = work.take<unsigned char>(int64_t(a.tokens) * a.m);
        Matrices<const T> weights{};
        if (in.weights != nullptr) weights = Matrices<const T>(*in.weights);
        launch<weigh_kernel<T>>(s, "the weights of offsets", Shape{dim3(divide_up(a.tokens, 256u)), dim3(256)}, a, weights);
    }
    return a;
}
template Arguments<F16> prepare<F16>(const Session &, const MixInput &, const MixOptions &, Workspace &);
template Arguments<Bf16> prepare<Bf16>(const Session &, const MixInput &, const MixOptions &, Workspace &);
template Arguments<float> prepare<float>(const Session &, const MixInput &, const MixOptions &, Workspace &);
template Arguments<double> prepare<double>(const Session &, const MixInput &, const MixOptions &, Workspace &);

} // namespace plucker

using namespace plucker;

void plucker_mix(const Context &context, const MixInput &in, const MixOptions &o, const Stack &out) {
    check(in, o);
    const Session s(context);
    if (tokens_of(in) == 0) return;
    Workspace work(context);
    dispatch(in.z.dtype, [&](auto tag) {
        using T = decltype(tag);
        const Arguments<T> a = prepare<T>(s, in, o, work);
        with_lanes(a.r, [&](auto lanes) {
            constexpr int tile = kThreads / decltype(lanes)::value;
            const int64_t shared = 2 * int64_t(tile) * (a.r | 1) * int64_t(sizeof(Kept<T>)) + 2 * pairs_of(a.r);
            launch<mix_kernel<T, decltype(lanes)::value>>(s, "plucker_mix", Shape{dim3(divide_up(a.tokens, unsigned(tile))), dim3(kThreads), shared}, a,
                                                          Matrices<T>(out));
        });
    });
}

void plucker_mix_backward(const Context &context, const Stack &grad, const MixInput &in, const MixOptions &o, const Stack &dz, const Stack *dweights) {
    check(in, o);
    if (in.ring > 0) throw ValueError("decoding has no gradient");
    const Session s(context);
    if (tokens_of(in) == 0) return;
    Workspace work(context);
    dispatch(in.z.dtype, [&](auto tag) {
        using T = decltype(tag);
        const Arguments<T> a = prepare<T>(s, in, o, work);
        auto *dz_own = work.take<Kept<T>>(int64_t(a.tokens) * a.r), *du = work.take<Kept<T>>(int64_t(a.tokens) * a.r);
        with_lanes(a.r, [&](auto lanes) {
            constexpr int tile = kThreads / decltype(lanes)::value;
            const int64_t shared = 2 * int64_t(tile) * (a.r | 1) * int64_t(sizeof(Kept<T>));
            launch<mix_gradient_kernel<T, decltype(lanes)::value>>(
                s, "plucker_mix_backward", Shape{dim3(divide_up(a.tokens, unsigned(tile))), dim3(kThreads), shared}, a, Matrices<const T>(grad), dz_own, du);
        });
        auto *sent = sends(a) ? work.take<Sent>(int64_t(a.tokens) * a.m) : nullptr;
        gather_gradients<T>(s, a, dz_own, du, dz, dweights, sent);
    });
}

} // namespace subspan::cuda
