// Projections of stacks of tiny matrices: an entry of as many items as a vector has lanes is one vector, and all items are worked
// on side by side. One by one a matrix of 16 x 2 would fill an eighth of a vector, and its call would be most of the work.
#pragma once

#include <cstdint>

namespace subspan::simd {

/// out_i = alpha C_i + scalar V_i V_iᵀ C_i (left; V is m x k), or alpha C_i + scalar C_i V_i V_iᵀ (V is n x k). Each C and out (m x n)
/// lies row by row without gaps, each V without gaps in any order; `*_item` are strides between items. out may be C.
template <class T> struct TinyStack {
    const T *c, *v;
    T *out;
    std::int64_t items, c_item, v_item, out_item;
    std::int64_t m, n, k, v_row, v_col;
    bool left;
    T alpha, scalar;

    std::int64_t coefficients() const { return k * (left ? n : m); } // of an item
};

/// Items of a group: lanes of a vector.
template <class T> std::int64_t lanes_at_once();

/// Whether groups of such items stay in L1.
template <class T> bool lanes_pay(std::int64_t items, std::int64_t m, std::int64_t n, std::int64_t k, bool left);

/// The largest over `items` of ‖(VᵀV - I) z_h‖ / √k for two vectors z (2 x k) of ones and minus ones; NaN where an item holds it.
template <class T>
double defect_lanes(const T *v, std::int64_t items, std::int64_t v_item, std::int64_t n, std::int64_t k, std::int64_t v_row, std::int64_t v_col,
                    const double *z);

/// Group g: with `read` the coefficients Vᵀ C (C V) to w (coefficients() vectors), or with `write` the result from them, which it multiplies by the scalar. One of the two.
template <class T> void apply_lanes(const TinyStack<T> &s, std::int64_t g, T *w, bool read, bool write);

} // namespace subspan::simd
