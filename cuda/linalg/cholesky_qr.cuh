// Cholesky factors of the Gram matrices of a few long rows, in double: orthonormal rows, and where rotations begin.
#pragma once

#include "linalg/blas.cuh"

namespace subspan::cuda {

/// Rows are divided by a power of two where their largest entry is beyond 2^±100, the eighth power of which would leave the range; `unit`
/// is what they were divided by. `peaks`: kPeaks of work memory. `top`, where it is not null, gets the largest entry of what is there then.
inline constexpr int kPeaks = 64;
void scale_rows(const Session &s, double *rows, int64_t pitch, int64_t count, int64_t cols, double *peaks, double *unit, double *top = nullptr);

/// Rows, `pitch` apart, at unit length; those of zeros stay so.
void unit_rows(const Session &s, double *rows, int64_t pitch, int64_t count, int64_t cols);

/// G + shift I = RᵀR for the Gram matrices G of `items` stacks of `count` rows in the same launches, one for each 32 rows. The shift, see below, keeps pivots of nearly dependent rows positive (Fukaya, Kannan, Nakatsukasa, Yamamoto and Yanagisawa,
/// SIAM J. Sci. Comput. 42, 2020); where rounding leaves none, the row of R is zero. NaN and infinity end as NaN.
class RowFactor {
  public:
    /// As a share of the largest diagonal entry. For any rows 4 (count + √(count cols)) eps: pivots of dependent rows are the shift and what
    /// rounding has left of the Gram matrix, and the second must stay well below the first, or rows are subtracted at several times their size,
    /// again and again, until they drown the rest. For rows that are nearly orthonormal already count eps / 4: half of it is what they lose.
    enum class Shift { any, orthonormal };

    /// `inverse`: also R⁻ᵀ.
    RowFactor(Workspace &work, int64_t count, int64_t cols, bool inverse, int64_t items = 1);
    static int64_t workspace(int64_t count, int64_t cols, bool inverse, int64_t items = 1);

    /// Where the rows of an item are to be written, count x cols at most.
    double *rows(int64_t item = 0) const { return x_ + item * count_ * cols_; }
    int64_t pitch() const { return cols_; }
    const double *unit(int64_t item = 0) const { return units_ + item; }
    /// The Gram matrix of an item whose rows are there.
    void gram(const Session &s, const Blas &blas, int64_t cols, int64_t item = 0) const;
    /// The factors of all items.
    void run(const Session &s, Shift shift = Shift::any) const;
    /// R (upper, zeros below) of an item, `width` apart, and for each item the shift and the largest diagonal entry.
    double *factor(int64_t item = 0) const { return a_ + item * count_ * width_; }
    int64_t width() const { return width_; }
    const double *marks() const { return marks_; }
    /// out (count x cols, contiguous) = R⁻ᵀ rows: orthonormal as far as the squares of the rows' singular values are above the shift.
    void orthonormal(const Blas &blas, int64_t cols, double *out, int64_t item = 0) const;

  private:
    int64_t count_, cols_, items_, width_;
    double *x_, *g_, *a_, *marks_, *peaks_, *units_;
};

} // namespace subspan::cuda
