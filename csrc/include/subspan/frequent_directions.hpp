// Frequent Directions: a deterministic sketch B of a tall matrix A with a bound on ‖AᵀA - BᵀB‖₂.
#pragma once

#include "subspan/views.hpp"

#include <cstdint>
#include <vector>

namespace subspan {

/// Ghashami, Liberty, Phillips and Woodruff, SIAM J. Comput. 45 (2016). The buffer holds 2·size rows and shrinks when
/// it is full, so a row costs 8·size·n flops on average. Rows that came after the last shrink are part of the sketch.
/// An exception leaves the sketch as it was. Not thread-safe.
template <class T> class FrequentDirections {
  public:
    FrequentDirections(std::int64_t size, std::int64_t features);

    void update(MatrixView<const T> rows);
    void update(const CsrView<T> &rows);
    /// Adds another sketch over the same columns; the bounds add.
    void merge(const FrequentDirections &other);
    /// At most size() rows; fills size() x features() with zeros below them.
    void sketch(MatrixView<T> out);
    /// Shrinks to size() rows, as sketch() does.
    void settle();
    /// Bound of ‖AᵀA - BᵀB‖₂ that the shrinks so far guarantee; BᵀB never exceeds AᵀA.
    double error_bound() const { return bound_; }

    std::int64_t size() const { return size_; }
    std::int64_t features() const { return n_; }
    std::int64_t rows_seen() const { return seen_; }
    double squared_norm() const { return norm_; } // of everything seen
    std::int64_t used() const { return used_; }
    const double *buffer() const { return rows_.data(); } // used() x features()
    const double *low() const { return low_.data(); }     // the same; what rounding the buffer has left over
    /// `low` may be null: zeros.
    void restore(std::int64_t used, const double *rows, const double *low, double bound, double norm, std::int64_t seen);

  private:
    template <class S> void append(MatrixView<const S> rows, const double *low = nullptr);
    void shrink();
    template <class F> void attempt(std::int64_t count, F &&f);

    std::int64_t size_, n_, used_ = 0, seen_ = 0;
    double bound_ = 0, norm_ = 0;
    // In double for float, too, with what rounding has left over: a shrink rounds all rows, and there are as many shrinks
    // as rows / size.
    std::vector<double> rows_, low_;
};

} // namespace subspan
