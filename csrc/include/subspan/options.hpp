// Enumerations and option structs that the CPU and the CUDA side share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace subspan {

/// What arrays hold. 16 bits are taken on a device only; u8 are 4-bit codes and masks.
enum class DType : std::int32_t { f16, bf16, f32, f64, u8 };
constexpr int size_of(DType d) { return d == DType::f64 ? 8 : (d == DType::f32 ? 4 : (d == DType::u8 ? 1 : 2)); }
constexpr const char *name_of(DType d) {
    return d == DType::f16 ? "float16" : (d == DType::bf16 ? "bfloat16" : (d == DType::f32 ? "float32" : (d == DType::f64 ? "float64" : "uint8")));
}
/// What sums over items of a dtype are kept in.
constexpr DType wide(DType d) { return d == DType::f64 ? DType::f64 : DType::f32; }

enum class Side { left, right };
/// exp: the geodesic. cholesky and qr: the Q factor, with positive diagonal of R, of U + tH (by a Cholesky factorisation of
/// I + X, and by Householder QR where X is large). polar: its nearest orthonormal matrix. cayley: the Cayley transform of
/// the skew H Uᵀ - U Hᵀ (Wen and Yin, Math. Program. 142, 2013), whose 2k x 2k Woodbury system is two k x k ones here.
enum class Retraction { exp, cholesky, polar, qr, cayley };
/// Of principal angles θ (Ye and Lim, SIAM J. Matrix Anal. Appl. 37, 2016): geodesic ‖θ‖, chordal ‖sin θ‖, projection
/// max sin θ, procrustes ‖2 sin(θ/2)‖, fubini_study arccos ∏ cos θ, binet_cauchy √(1 - ∏ cos² θ).
enum class Distance { geodesic, chordal, projection, procrustes, fubini_study, binet_cauchy };
/// What becomes of the momentum when the point moves: it stays as it is and is projected where it is used (Grassmann Class
/// Representation, Xiong et al., ICCV 2023), or its tangent part moves in parallel along the step (exp only).
enum class MomentumTransport { project, parallel };
enum class Orthonormalization { automatic, cholesky, householder, polar };
enum class MixNorm { none, clamp, soft };          // divide a wedge by 1, max(n, eps), sqrt(n² + eps), n its length
enum class MixWeights { mean, given, softmax };    // of the offsets that apply; softmax: `weights` are logits
enum class Rope { none, interleaved, half };       // rotate the pairs (2i, 2i + 1) or (i, i + r/2) by the position
struct MixOptions {
    std::vector<std::int64_t> offsets; // how far back; negative: ahead; never zero
    MixNorm norm = MixNorm::clamp;
    double eps = 1e-8;
    MixWeights weighting = MixWeights::mean;
    bool past_first = false;  // z_{t-δ} ∧ z_t instead of z_t ∧ z_{t-δ}: the other sign
    bool bias_always = false; // the bias once for every token, instead of times its sum of weights
    Rope rope = Rope::none;
    double rope_base = 1e4;
    std::int64_t rope_start = 0; // position of the first token
    std::vector<std::int64_t> rope_starts; // of each sequence, in C order of the leading axes, instead; empty: one for all
    std::int64_t start_of(std::int64_t sequence) const {
        return rope_starts.empty() ? rope_start : rope_starts[std::size_t(sequence)];
    }
};

} // namespace subspan
