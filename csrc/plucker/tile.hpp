// One tile of tokens: what mixing, projecting, their gradients and decoding share.
//
// Tokens are lanes. A window holds, dimension by dimension, the tokens of the tile and those that its offsets reach, in
// double and scaled by powers of two, so that neither a square nor a quotient leaves the range. From it come, for every
// token, z and u (scaled likewise, in T): the mixed coordinates are lift · (z ∧ u).
#pragma once

#include "base/scratch.hpp"
#include "subspan/plucker_mix.hpp"

#include <cstdint>
#include <vector>

namespace subspan::plucker {

using std::int64_t;

inline constexpr int64_t kTokens = 48; // of a tile: a whole number of register tiles for every vector width
inline constexpr int64_t kPad = 16;    // rows of vectors are padded by so much: any load that starts inside stays inside
inline constexpr int64_t kFar = int64_t(1) << 40; // offsets and positions stay below
inline constexpr int64_t kLanes = 16;  // dimensions and coordinates are padded to a multiple of so many

int64_t pairs(int64_t r);

/// Rotary positions: pair i turns by position · base^(-2i/r). Position p is
/// 64 q + s, and its rotation the product of those of 64 q and s, so that it depends on p alone.
class Rotation {
  public:
    Rotation(Rope kind, int64_t r, double base);
    bool on() const { return kind_ != Rope::none; }
    /// Turns columns [0, count) of x (r rows, ld apart), or turns them back: column c by position first + c · step, where
    /// step is 1 (tokens of a sequence) or 0 (sequences at one token).
    void apply(double *x, int64_t ld, int64_t count, int64_t first, int64_t step, bool back) const;

  private:
    Rope kind_;
    int64_t half_;
    std::vector<double> frequency_, cos_, sin_; // tables of s: 64 entries a pair
};

/// How the window is laid out: offsets that lie close share columns.
struct Plan {
    Plan(const MixOptions &o, int64_t r, int64_t weights_columns);

    struct Segment {
        int64_t reach, width, at; // first column holds token (first of the tile) - reach
    };
    const MixOptions &options;
    int64_t r, m, coordinates;
    int64_t depth;  // r, padded
    int64_t row;    // length of a row of z or u
    int64_t length; // of a row of coordinates: padded, and an odd number of cache lines
    int64_t columns, own;
    std::vector<int64_t> column; // of each offset: where its tokens begin
    std::vector<Segment> segments;
    Rotation rotation;
};

/// The inputs of the offset kernel: own tokens, and those at each offset.
struct Offsets {
    const double *z, *power;           // depth rows of the window at the own tokens, and the powers taken out
    const double *const *w;            // the same for each offset
    const double *const *w_power;
    int64_t ld;
};

template <class T> class Tile {
  public:
    /// Work memory from `frame`. With `keep` what the gradient needs stays: about (m r + 2 r) doubles a token.
    Tile(Frame &frame, const Plan &plan, bool keep, bool with_window = true);

    /// Tokens [first, first + count) of one sequence, count <= kTokens: window, weights, z and u.
    /// `start` is the position of the sequence's first token.
    void load(MatrixView<const T> z, const MatrixView<const T> *weights, const MatrixView<const T> *mask, int64_t first, int64_t count, int64_t start);
    /// The same from columns that are already there (decoding); validity and weights were set by the caller.
    void combine(const Offsets &offsets, int64_t count);
    /// Weights of the tokens from `valid` (m x kTokens) and rows of numbers: see MixWeights.
    void weigh(const MatrixView<const T> *weights, int64_t first, int64_t count);
    /// z and u token by token, for coordinates(): z carries the lift.
    void rows();
    /// Coordinates of token t of the tile: `coordinates` of them, and padding behind that is written too.
    void coordinates(int64_t t, T *out) const;
    void coordinates_of_all(T *out, int64_t ld) const;

    /// Whether any offset applies at a token of the tile. Where none does, its result is zero and its gradient is not looked at.
    bool active(int64_t t) const;
    /// From dp (coordinates x kTokens, ld apart, token lanes) the gradients of z and the weights: dz in the columns of the
    /// window `into` (r x columns, overwritten, in the units of z), da (m x kTokens).
    void backward(const T *dp, int64_t ld, double *into, double *da);

    const Plan &plan;
    int64_t first = 0, count = 0, start = 0;
    double *window, *power; // r x columns; one power of two a column
    unsigned char *valid;   // m x kTokens
    double *alpha;          // m x kTokens
    double *sum;            // of alpha, for each token
    double *lift;           // for each token
    T *z, *u;               // depth x kTokens
    T *z_rows, *u_rows;     // kTokens x row

  private:
    bool keep_;
    double *zz_, *c_, *k_, *g_, *ww_; // of each token; of each offset and token
    double *w_;                       // rejections: m x r x kTokens, or r x kTokens where they are not kept
    double *sum_u_;                   // r x kTokens
};

/// Gradient of the numbers that weigh() took, from that of alpha; rows of m.
void weights_backward(const Plan &plan, const unsigned char *valid, const double *alpha, const double *da, int64_t count, MatrixView<double> out);

/// A tile's worth of one sequence.
struct Piece {
    int64_t sequence, first, count;
};
std::vector<Piece> pieces_of(int64_t sequences, int64_t length);

/// Rows [first, first + count) of a matrix as columns of `to`.
template <class T, class To> void tokens_to_lanes(MatrixView<const T> from, int64_t first, int64_t count, To *to, int64_t ld);

/// Throws ValueError unless weights, mask and dweights (null: none) fit z.
template <class T> void check(const MixInput<T> &in, const Plan &plan, const StackView<double> *dweights = nullptr);

/// One sequence of the input.
template <class T> struct Sequence {
    Sequence(const MixInput<T> &in, const MixOptions &o, int64_t s)
        : z(in.z[s]), has_weights(in.weights != nullptr), has_mask(in.mask != nullptr), start(o.start_of(s)) {
        if (has_weights) weights = (*in.weights)[s];
        if (has_mask) mask = (*in.mask)[s];
    }
    void load(Tile<T> &tile, const Piece &piece) const {
        tile.load(z, has_weights ? &weights : nullptr, has_mask ? &mask : nullptr, piece.first, piece.count, start);
    }
    MatrixView<const T> z, weights, mask;
    bool has_weights, has_mask;
    int64_t start;
};

/// Takes a power of two out of every column, so that its largest entry lies in [1, 2).
void scale_columns(double *x, int64_t rows, int64_t ld, int64_t count, double *power);

/// dz += the windows that Tile::backward filled for `count` pieces, one after the other in memory.
template <class T> void add_windows(const Plan &plan, const StackView<T> &dz, const Piece *pieces, int64_t count, const double *windows);

template <class T> void set_zero(const StackView<T> &x);

/// Whether x is finite throughout.
template <class T> bool all_finite(const T *x, int64_t n);
template <class T> bool all_finite(MatrixView<const T> x);
template <class T> bool all_finite(const StackView<const T> &x);
template <class T> bool all_finite(const MixInput<T> &in);

} // namespace subspan::plucker
