// Plücker mixing token by token: the past that offsets reach, for a batch of sequences.
#pragma once

#include "subspan/plucker_mix.hpp"

#include <cstdint>
#include <memory>
#include <vector>

namespace subspan {

/// A ring of max(offsets) + 1 tokens for each of `batch` sequences (twelve bytes a number in float, sixteen in double),
/// which grows with the tokens until it is full. What step() gives is, bit for bit, what plucker_mix or
/// plucker_mix_project gives for the newest token of the whole sequence. Offsets look back only. Not for use by several
/// threads at once.
template <class T> class PluckerMixState {
  public:
    /// W (d x C(r, 2)) and b (d) are copied; with W empty (zero rows) step() gives the mixed coordinates.
    PluckerMixState(const MixOptions &o, std::int64_t r, std::int64_t batch, MatrixView<const T> w = {}, const T *b = nullptr);
    ~PluckerMixState();
    PluckerMixState(const PluckerMixState &) = delete;
    PluckerMixState &operator=(const PluckerMixState &) = delete;

    std::int64_t width() const; // of what step() gives: C(r, 2) or d
    std::int64_t r() const;
    std::int64_t batch() const;
    std::int64_t position() const; // tokens seen

    /// The next token of every sequence: z (batch x r), weights (batch x m, or null), mask (1 x batch, or null) -> out
    /// (batch x width). Tokens that count and are not finite, or whose wedge T cannot hold, throw ValueError and change nothing.
    void step(MatrixView<const T> z, const MatrixView<const T> *weights, const MatrixView<const T> *mask, MatrixView<T> out);
    /// Tokens whose result is not wanted, such as a prompt: z (T x r for each sequence), mask (1 x T).
    void prefill(const StackView<const T> &z, const StackView<const T> *mask);
    /// The ring, oldest token first: tokens (batch x r each, as they came in) and which of them count.
    struct Past {
        std::vector<T> tokens;             // kept x batch x r
        std::vector<unsigned char> counts; // kept x batch
        std::int64_t kept = 0, position = 0;
    };
    Past past() const;
    void restore(const Past &past);

  private:
    struct Parts;
    struct Kept;
    std::unique_ptr<Parts> p_;
};

} // namespace subspan
