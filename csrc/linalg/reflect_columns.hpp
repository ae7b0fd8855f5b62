// Reflections that the caller gives, on a few vectors: one read of V, where the WY form would spend m k² on its triangle.
#pragma once

#include "subspan/views.hpp"

#include <cstdint>

namespace subspan {

template <class T> struct FewReflections {
    MatrixView<const T> v;    // m x k
    const T *tau = nullptr;   // k; null: 2 / ‖v_j‖², a reflection in the column however long it is
    bool ascending = false;   // H_1 is applied first, else H_k
    bool trapezoid = false;   // the first j rows of column j are zero
};

/// All columns (`left`), or rows, of a stack, if they are few, in a copy. False, and nothing has been written, where they are
/// many, where something is not finite, or a length so small or large that its square has lost digits: then it is the other
/// way's. `check` false: results that are not finite are written. Cost 4 m k (count + 1) flops.
template <class T> bool reflect_few(const FewReflections<T> &r, const StackView<const T> &c, bool left, const StackView<T> &out, bool check);

} // namespace subspan
