// Streaming truncated SVD: the k leading right singular vectors of a tall matrix whose rows arrive in blocks.
#pragma once

#include "subspan/views.hpp"

#include <cstdint>
#include <memory>
#include <vector>

namespace subspan {

enum class SvdMethod { automatic, robust, gram };

struct StreamingOptions {
    std::int64_t rank = 0;  // largest number of components reported
    double forget = 1.0;    // the past is multiplied by it at each update, in (0, 1]
    bool center = false;    // track the mean and decompose the centred rows
    double energy = 0.0;    // in (0, 1): report as few components as hold this share of the energy; 0: `rank`
    std::int64_t oversample = -1; // further directions kept inside, so that less is lost on the way; -1: see below
    SvdMethod method = SvdMethod::automatic;
    bool canonical_signs = false; // after each update the entry of largest magnitude of each component is positive
    bool exact_blocks = false; // decompose each update as one block: no buffering of thin ones, no splitting of tall ones
};

/// A plain copy of a stream, for saving.
template <class T> struct StreamingState {
    std::int64_t features = 0, rows_seen = 0;
    std::int64_t skip_gram = 0; // for how many updates the Gram route is not tried again
    std::int64_t skip_moments = 0, skip_again = 0; // for how many moments are not, and were not the last time
    double weight = 0.0, dropped = 0.0; // effective number of rows; squared norm that truncation left out
    std::vector<double> singular_values;
    std::vector<T> components; // singular_values.size() x features, all directions kept inside
    std::vector<T> low;        // of the same shape, what rounding them to T left out; may be empty
    std::vector<double> mean;  // features when centring, else empty
    std::vector<double> scatter; // features; see column_scatter(). May be empty: not known
    // Second moments about a shift, and what is known of them; empty where the stream keeps none. Packed lower triangle.
    std::vector<double> moments, moment_sum, moment_shift, moment_reference, moment_figures;
};

/// Up to 1024 columns (see moments_pay) with method automatic and no oversample: the n x n second moments in double, solved when
/// a result is asked for. An update of b rows costs b n² flops and truncates nothing. Float64 rows whose spectrum is too wide for
/// squares leave them.
///
/// Else directions kept inside: rank + oversample; by default all where n <= 128, 2 rank + 64 where n < 1024, else
/// max(rank, min(64, 2 rank + 32)). What one truncation drops the next rows cannot bring back.
///
/// State, with k the number of directions kept: k x n of T, at most max(k, 16) buffered rows, a few vectors. An update of
/// b rows costs n (k + b)² + 2 n k (k + b) flops in products and O((k + b)³) in the small matrix where the spectrum allows the
/// Gram route, 1.6 times as much on the robust one. Work memory: less than 3 (k + b) n items of T, plus some ten
/// matrices of doubles of the size of that one, (k + b)². Nothing of size n x n exists there, but where n <= max(256, k).
///
/// Rows thinner than the buffer are collected, so single rows cost what blocks of k rows cost, and of sparse rows eight
/// times as many; every accessor folds them in first. Not thread-safe: one caller at a time.
///
/// An exception leaves the stream as it was.
template <class T> class StreamingSvd {
  public:
    explicit StreamingSvd(const StreamingOptions &options);
    StreamingSvd(const StreamingOptions &options, const StreamingState<T> &state);
    StreamingSvd(const StreamingSvd &);
    StreamingSvd(StreamingSvd &&) noexcept;
    StreamingSvd &operator=(const StreamingSvd &o) { return *this = StreamingSvd(o); }
    StreamingSvd &operator=(StreamingSvd &&) noexcept;
    ~StreamingSvd();

    void update(MatrixView<const T> rows);
    void update(const CsrView<T> &rows);
    /// Removes rows that were added with weight one. LinAlgError when they cannot have been.
    void downdate(MatrixView<const T> rows);
    /// Adds what another stream over the same columns has seen. `other` keeps its value.
    void merge(StreamingSvd &other);
    /// Absorbs buffered rows and brings the basis to working precision; accessors call it.
    void fold();

    const StreamingOptions &options() const;
    std::int64_t features() const; // 0 before the first rows
    std::int64_t rows_seen() const;
    std::int64_t buffered() const;
    double weight() const;
    std::int64_t rank();             // current number of components, at most options().rank
    const double *singular_values(); // rank()
    const T *components();           // rank() x features()
    const double *mean();            // features(), null without centring
    const double *column_scatter();  // features(): weighted sums of squares of each column, about the mean when centring;
                                     // null where the stream was restored from a state without
    double captured_energy();        // sum of the squared singular values
    double residual_energy();        // squared norm of what truncation left out
    const char *last_route() const;  // "gram", "sparse", "robust", "householder", "tall" or "none"

    /// Between updates of single rows few rows are compared with directions that follow by updates of rank one (Brand 2006), in
    /// O(k n) for each, and nothing is solved. This many of them for so many rows: rank(), but without solving.
    std::int64_t coordinates(std::int64_t rows);
    /// Z = (X - mean) Vᵀ, X is m x n, Z m x k.
    void project(MatrixView<const T> x, MatrixView<T> z);
    void project(const CsrView<T> &x, MatrixView<T> z);
    /// X = Z V + mean.
    void reconstruct(MatrixView<const T> z, MatrixView<T> x);
    /// Squared distances of the rows to the subspace, by explicit subtraction: accurate also when they are tiny.
    void residual(MatrixView<const T> x, T *out);
    void residual(const CsrView<T> &x, T *out);

    StreamingState<T> state();

  private:
    struct Impl;
    struct Scores { // what few rows are compared with
        const T *v;
        const double *mean;
        std::int64_t k;
    };
    Scores scored_by(std::int64_t rows);
    std::unique_ptr<Impl> impl_;
};

/// The left singular vectors U (m x before) of a stream become [U past + shift; fresh] with an update of `rows` rows.
struct LeftRotation {
    std::int64_t before, after, rows;
    std::vector<double> past, shift, fresh; // before x after, after, rows x after
};

/// Adds a block and says how U changes: one more product with the block in double. ValueError unless the stream has
/// exact_blocks, no energy, and with center forget = 1; nothing changes where it throws.
template <class T> LeftRotation update_with_rotation(StreamingSvd<T> &stream, MatrixView<const T> rows);

} // namespace subspan
