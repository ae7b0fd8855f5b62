// Enumerations and option structs that the CPU and the CUDA side share.
#pragma once

#include "subspan/errors.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
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

/// Directions that a stream of `columns` keeps for `rank` of them, `oversample` of its caller's (negative: by default) beyond that.
inline std::int64_t kept_directions(std::int64_t columns, std::int64_t rank, std::int64_t oversample) {
    if (oversample >= 0) return std::min(columns, rank + oversample);
    if (columns <= 128) return columns;
    if (columns < 1024) return std::min(columns, 2 * rank + 64);
    return std::min(columns, std::max(rank, std::min<std::int64_t>(64, 2 * rank + 32)));
}

/// Whether a stream of `columns` keeps second moments: where a row costs less than one of a low-rank update. Measured with a
/// solution every 4n rows: some 25 ps n² against 150 ps n K with K directions kept (Zen 5, float32; both twice that in float64).
inline bool moments_pay(std::int64_t columns, std::int64_t rank) {
    return columns <= std::min<std::int64_t>(2048, std::max<std::int64_t>(1024, 6 * kept_directions(columns, rank, -1)));
}

/// What the steps of all optimisers share.
struct StepOptions {
    double lr = 0;
    Retraction retraction = Retraction::exp;
    MomentumTransport transport = MomentumTransport::project;
    bool check = true; ///< on the host: NaN, infinity and points that are not orthonormal throw before anything is changed

    bool parallel() const { return transport == MomentumTransport::parallel; }
    /// ValueError where they do not fit each other.
    void require_valid() const {
        if (!std::isfinite(lr)) throw ValueError("lr must be finite");
        if (parallel() && retraction != Retraction::exp) throw ValueError("transport 'parallel' goes along geodesics: it needs retraction 'exp'");
    }
};

/// ValueError unless step `step` of Adam can be made with these.
inline void check_adam(std::int64_t step, double beta1, double beta2, double eps) {
    if (step < 1) throw ValueError("step must be at least 1: it counts the steps, this one included");
    if (!(beta1 >= 0 && beta1 < 1)) throw ValueError("betas[0] must be in [0, 1)");
    if (!(beta2 >= 0 && beta2 < 1)) throw ValueError("betas[1] must be in [0, 1)");
    if (!(eps >= 0) || !std::isfinite(eps)) throw ValueError("eps must be finite and not negative");
}

/// Of a truncated SVD by randomized subspace iteration.
struct TruncatedOptions {
    std::int64_t rank = 0;    // 0: as many as energy or tol ask for
    double energy = 0.0;      // in (0, 1): smallest rank that holds this share of ‖A‖_F²
    double tol = 0.0;         // > 0: drop singular values below tol · s_1
    std::int64_t oversample = 10, power_iterations = 2;
    std::uint64_t key = 0;    // of the random start

    /// ValueError unless they fit a matrix whose smaller side is `full`.
    void check(std::int64_t full) const {
        if (full < 1) throw ValueError("A must have at least one row and one column");
        if (rank < 0 || rank > full) throw ValueError("rank must be in [1, " + std::to_string(full) + "], got " + std::to_string(rank));
        if (oversample < 0) throw ValueError("oversample must not be negative, got " + std::to_string(oversample));
        if (power_iterations < 0) throw ValueError("power_iterations must not be negative, got " + std::to_string(power_iterations));
        if (rank == 0 && energy <= 0.0 && tol <= 0.0) throw ValueError("one of rank, energy and tol must be given");
    }
    /// How many of the first `most` values to keep, of a matrix of this squared norm (needed for energy).
    std::int64_t wanted(const double *s, std::int64_t most, double norm) const {
        std::int64_t k = 0;
        double kept = 0;
        while (k < most) {
            if (energy > 0.0 && kept >= energy * norm) break;
            if (tol > 0.0 && (s[k] < tol * s[0] || s[0] == 0.0)) break;
            kept += s[k] * s[k];
            ++k;
        }
        return k;
    }
    /// Vectors of the first try where the rank is not known, and how many values of a try with so many are trusted: not the last
    /// `oversample` ones. Each next try has twice as many, and starts from the one before.
    std::int64_t first_try(std::int64_t full, std::int64_t given) const { return std::min(full, std::max<std::int64_t>(16, given) + oversample); }
    std::int64_t trusted(std::int64_t vectors, std::int64_t full) const { return vectors == full ? vectors : std::max<std::int64_t>(1, vectors - oversample); }
};

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
    std::int64_t start_of(std::int64_t sequence) const { return rope_starts.empty() ? rope_start : rope_starts[std::size_t(sequence)]; }
};

} // namespace subspan
