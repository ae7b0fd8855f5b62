// C <- alpha C + V M (VᵀC), the one product under every projection: only the small core M differs between them.
#pragma once

#include "subspan/options.hpp"
#include "subspan/views.hpp"

#include <cstdint>

namespace subspan {

/// The k x k core M. A scalar stands for a multiple of the identity, `diagonal` is 1 x k, `full` is k x k.
template <class T> struct Core {
    enum class Kind { scalar, diagonal, full };
    Kind kind = Kind::scalar;
    T scalar = T(1);
    StackView<const T> matrix;

    Core(T s = T(1)) : scalar(s) {}
    Core(Kind k, StackView<const T> m) : kind(k), matrix(std::move(m)) {}
    static Core full(StackView<const T> m) { return {Kind::full, std::move(m)}; }
};

/// The tall matrix V: dense, or one packed matrix for the whole stack, which is unpacked a tile at a time.
template <class T> struct Basis {
    StackView<const T> dense;
    const Int4View<T> *packed = nullptr;
    const char *name = "V"; // in errors

    Basis(StackView<const T> v) : dense(std::move(v)) {}
    Basis(MatrixView<const T> v) : dense(v) {}
    Basis(const Int4View<T> &v) : packed(&v) {}
    std::int64_t rows() const { return packed != nullptr ? packed->rows : dense.rows(); }
    std::int64_t cols() const { return packed != nullptr ? packed->cols : dense.cols(); }
};

/// left:  out = alpha C + V M (Vᵀ X),   V is m x k;
/// right: out = alpha C + (X V) M Vᵀ,   V is n x k;
/// with C of shape (..., m, n) and X = C, or X = source - C when `source` is given. `out` may be C itself but must not
/// overlap any operand otherwise; leading axes of all operands are those of C. With `check` a value that is not finite
/// in X, V or M throws ValueError before C is written, which in place costs a second read of C; another `out` may be
/// partly written then.
/// Cost 4 m n k flops a matrix and two reads and one write of C; one read where a block of rows stays in the cache
/// (right, and out is not C or check is off). Work memory: one panel, k n (left) or k m (right) items.
template <class T>
void apply_core(const StackView<const T> &c, const Basis<T> &v, const Core<T> &m, T alpha, Side side, const StackView<T> &out, bool check = true,
                const StackView<const T> *source = nullptr);

} // namespace subspan
