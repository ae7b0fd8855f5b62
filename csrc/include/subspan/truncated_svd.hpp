// One-shot truncated SVDs: randomized subspace iteration, the SVD of a product, the merge of two decompositions.
#pragma once

#include "subspan/options.hpp"
#include "subspan/views.hpp"

#include <cstdint>
#include <vector>

namespace subspan {

/// U (m x k), s (k, descending), Vh (k x n), all row-major. The entry of largest magnitude of each row of Vh is positive.
template <class T> struct TruncatedSvd {
    std::int64_t m = 0, n = 0, k = 0;
    std::vector<T> u, s, vh;
};

/// A matrix that is only multiplied with. Blocks of vectors are contiguous rows.
template <class T> class LinearOperator {
  public:
    virtual ~LinearOperator() = default;
    virtual std::int64_t rows() const = 0;
    virtual std::int64_t cols() const = 0;
    virtual void apply(std::int64_t count, const T *x, T *y) = 0;   // y_i = A x_i: count x cols -> count x rows
    virtual void adjoint(std::int64_t count, const T *y, T *x) = 0; // x_i = Aᵀ y_i
    /// ‖A‖_F² when it is known without products, else a negative number.
    virtual double squared_norm() { return -1.0; }
    /// The matrix is this power of two times what apply() multiplies with.
    virtual double unit() const { return 1.0; }
    /// What apply() multiplies with, where it is there entry by entry, else null.
    virtual const MatrixView<const T> *dense() const { return nullptr; }
};

/// ValueError on NaN or infinity. A matrix whose squares leave the range of T is copied and scaled.
template <class T> class DenseOperator final : public LinearOperator<T> {
  public:
    explicit DenseOperator(MatrixView<const T> a);
    std::int64_t rows() const override { return a_.rows; }
    std::int64_t cols() const override { return a_.cols; }
    void apply(std::int64_t count, const T *x, T *y) override;
    void adjoint(std::int64_t count, const T *y, T *x) override;
    double squared_norm() override { return norm_; }
    double unit() const override { return unit_; }
    const MatrixView<const T> *dense() const override { return &a_; }

  private:
    MatrixView<const T> a_;
    std::vector<T> copy_;
    double norm_, unit_ = 1.0;
};

/// Keeps its own copy by columns for the adjoint; scales as DenseOperator does.
template <class T> class CsrOperator final : public LinearOperator<T> {
  public:
    explicit CsrOperator(const CsrView<T> &a);
    std::int64_t rows() const override { return a_.rows; }
    std::int64_t cols() const override { return a_.cols; }
    void apply(std::int64_t count, const T *x, T *y) override;
    void adjoint(std::int64_t count, const T *y, T *x) override;
    double squared_norm() override { return norm_; }
    double unit() const override { return unit_; }

  private:
    CsrView<T> a_;
    std::vector<T> copy_;
    std::vector<std::int64_t> by_row_, start_, row_;
    std::vector<T> value_;
    double norm_, unit_ = 1.0;
};

/// Halko, Martinsson and Tropp, SIAM Review 53 (2011), algorithms 4.4 and 5.1, with l = rank + oversample vectors:
/// 2 (power_iterations + 1) products with l vectors each, each followed by an orthonormalisation.
/// `initial`, when not empty, gives the first rows of the start (a previous Vh): a warm start.
template <class T> TruncatedSvd<T> truncated_svd(LinearOperator<T> &a, const TruncatedOptions &options, MatrixView<const T> initial = {});

/// SVD of A B (m x p times p x n) from QR of the factors; the product is not formed when p is below m and n.
template <class T> TruncatedSvd<T> product_svd(MatrixView<const T> a, MatrixView<const T> b, std::int64_t rank);

/// The SVD of [A; B], cut to `rank`, from truncated SVDs of A and B. Empty `ua`/`ub` leave U out.
template <class T>
TruncatedSvd<T> merge_svd(MatrixView<const T> ua, const T *sa, MatrixView<const T> va, MatrixView<const T> ub, const T *sb, MatrixView<const T> vb,
                          std::int64_t rank);

} // namespace subspan
