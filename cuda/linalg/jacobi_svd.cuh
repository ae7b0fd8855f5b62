// Singular values and right singular vectors of a few long rows, in double: what streams, truncated SVDs and the orthonormalisations
// between their products are made of.
#pragma once

#include "linalg/cholesky_qr.cuh"

#include <optional>

namespace subspan::cuda {

/// Decomposes stacks of `count` rows. By the Gram matrix (`gram`: values below 2e-6 of the largest are lost, which float32 data does
/// not have) or on the rows themselves, by rotations that leave relative accuracy whole (Demmel and Veselić, SIAM J. Matrix Anal. 13,
/// 1992). Of a Gram matrix the rows of its Cholesky factor are rotated: they are singular vectors times singular values then, and take fewer
/// sweeps (Veselić and Hari, Numer. Math. 56, 1989). Small matrices are rotated in the shared memory of a cluster, all others by blocks of 32
/// rows in turns; `items` of them in the same launches. One that has not settled after 40 sweeps (20 by blocks; 10 have been seen) ends as NaN.
/// Never waits for the device.
class RowSvd {
  public:
    RowSvd(Workspace &work, int64_t count, int64_t cols, int64_t kept, bool gram, int64_t items = 1);
    static int64_t workspace(int64_t count, int64_t cols, int64_t kept, bool gram, int64_t items = 1);

    /// Where the rows of an item are to be written: count x columns, `pitch` apart. With Gram matrices items may have fewer columns than
    /// the constructor was told.
    double *rows(int64_t item = 0) const { return factor_ ? factor_->rows(item) : a_ + item * count_ * width_; }
    int64_t pitch() const { return factor_ ? factor_->pitch() : width_; }

    /// The Gram matrix of an item whose rows are there. Values and energies are those of the rows as they were before they were scaled.
    void gram(const Session &s, const Blas &blas, int64_t cols, int64_t item = 0) const;
    /// Values and rotations of all items. Signs are such that a vector points the way of the one of the first `rank` rows that it is
    /// closest to, weighed by `values`; with rank 0 its largest coefficient is positive. Of a Gram matrix vectors are good to 1e-12 (values to
    /// more), which is enough for float32; `exact`: to working precision, for a sweep more now and then.
    void run(const Session &s, const double *values = nullptr, int64_t rank = 0, bool exact = false) const;
    /// vectors (kept x cols, contiguous) = orthonormal rows; zero where there is no value.
    void vectors(const Session &s, const Blas &blas, int64_t cols, double *vectors, int64_t item = 0) const;

    double *sigma(int64_t item = 0) const { return sigma_ + item * kept_; }                  // kept, descending
    double *rotations(int64_t item = 0) const { return rotations_ + item * kept_ * count_; }         // kept x count: vectors σ = rotations rows
    const double *after(int64_t item = 0) const { return after_ + item * 2; }                // energy of what was not kept; whether all was finite

  private:
    int64_t count_, cols_, kept_, items_, width_;
    std::optional<RowFactor> factor_; // by the Gram matrix
    double *a_, *raw_, *inner_, *polished_, *rotations_, *sigma_, *scaled_, *norms_, *left_, *after_, *peaks_ = nullptr, *units_ = nullptr, *tops_ = nullptr;
    int *flags_;
};

} // namespace subspan::cuda
