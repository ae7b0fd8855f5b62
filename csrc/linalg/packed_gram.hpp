// Sweeps over one class: a few n x k operands side by side as the rows [X_0 | X_1 | ...] of a packed block that stays in
// cache, or where k is small as contiguous columns. One sweep gives the inner products of all of them, one more any combination of them.
#pragma once

#include "base/scratch.hpp"
#include "linalg/small_dense.hpp"
#include "subspan/views.hpp"

#include <cstdint>
#include <functional>

namespace subspan {

/// Row-major copy of a matrix of any strides, or the way back; contiguous rows and contiguous columns go by vectors.
template <class T> void copy_matrix(MatrixView<const T> from, MatrixView<T> to);

/// b = momentum · b + weight · g, in place. Both of any strides; vectors where they share a contiguous axis.
template <class T> void decay_add(MatrixView<T> b, T momentum, MatrixView<const T> g, T weight);

/// Memory that a sweep may ask for before it is needed: operands of the class that comes next.
inline constexpr int kAheads = 3;
struct Ahead {
    const char *data[kAheads] = {};
    std::int64_t bytes[kAheads] = {}; // zero: none
};

template <class T> class PackedBlock {
  public:
    /// Operands of n x k each. Work memory comes from `frame`: a packed block of 512 KiB, or of 256 rows where those are more, and
    /// a few k², whatever n is; for several threads one each.
    PackedBlock(Frame &frame, std::int64_t n, std::int64_t k, int operands);

    /// Operands of the next class: the first two are prefetched by the next gram(), the third by the apply() after it; not where
    /// the copy is by columns.
    void ahead(const MatrixView<const T> *next, int count);

    /// Inner products X_aᵀ X_b for every pair marked in `wanted` (bit b of wanted[a], b >= a). Sums run in T over
    /// 32 rows, those of eight such blocks are added in T, and go on in double, with the rounding error of each addition
    /// kept where T is double. Down columns 32 vectors are summed in T.
    void gram(const MatrixView<const T> *operands, const unsigned *wanted);
    /// X_aᵀ X_b as a small matrix.
    void block(int a, int b, double *out) const;

    /// out = Σ_a X_a W_a of the operands that gram() saw, with small matrices W (null: absent); out may be one of them.
    /// accumulate: out += instead.
    void apply(const MatrixView<const T> *operands, const double *const *w, MatrixView<T> out, bool accumulate = false);
    /// Two combinations in one sweep: both outputs may be operands.
    void apply2(const MatrixView<const T> *operands, const double *const *w, MatrixView<T> out, const double *const *w2, MatrixView<T> out2);

  private:
    /// body(part, first row, rows, z) for every block of rows, with a packed block z for it, part after part on all threads: what
    /// a part is depends on the shape alone.
    using Body = std::function<void(std::int64_t, std::int64_t, std::int64_t, T *)>;
    void blocks(const Body &body) const;
    std::int64_t room() const; // entries of a packed block
    void pack(const MatrixView<const T> *operands, std::int64_t first, std::int64_t rows, T *z) const;
    struct Range {
        std::int64_t begin, end; // columns of the packed rows that have coefficients
    };
    Range coefficients(const double *const *w, T *to) const;
    void combine(std::int64_t first, std::int64_t rows, T *z, const T *w, Range range, MatrixView<T> out, bool accumulate);

    std::int64_t n_, k_, width_, ld_, block_, kp_, parts_, buffers_; // width_ = operands · k; ld_, kp_ padded to whole vectors
    int operands_;
    bool columns_; // the copy is by columns, of column_stride(block_)
    T *z_, *w_; // z_: of all rows, where they fit, else one for each thread
    double *g_;
    Ahead ahead_;
    bool whole_; // all rows fit the block: packed once
};

} // namespace subspan
