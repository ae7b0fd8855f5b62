// What stacks share along their leading axes.
#pragma once

#include "subspan/views.hpp"

#include <cstddef>
#include <cstdint>

namespace subspan {

/// Whether one matrix serves the whole stack.
template <class T> bool shared(const StackView<T> &s) {
    for (std::size_t a = 0; a < s.shape.size(); ++a)
        if (s.shape[a] != 1 && s.strides[a] != 0) return false;
    return true;
}

/// Leading axes and rows as the rows of one matrix, where strides allow it: what acts on rows from the right, with one
/// matrix for all, then does so in one call. False, with s half changed, where they do not.
template <class T> bool merge_axes(StackView<T> &s) {
    for (std::size_t a = s.shape.size(); a-- > 0;) {
        if (s.shape[a] != 1 && s.first.rows != 1 && s.strides[a] != s.first.rows * s.first.row_stride) return false;
        if (s.shape[a] != 1 && s.first.rows == 1) s.first.row_stride = s.strides[a];
        s.first.rows *= s.shape[a];
    }
    s.shape.clear();
    s.strides.clear();
    return true;
}

/// The stride of a stack whose axes are one: item i is at i · step. False where they are not.
template <class T> bool even_steps(const StackView<T> &s, std::int64_t &step) {
    std::int64_t items = 1;
    step = 0;
    for (std::size_t a = s.shape.size(); a-- > 0;) {
        if (s.shape[a] == 1) continue;
        if (items > 1 && s.strides[a] != items * step) return false;
        if (items == 1) step = s.strides[a];
        items *= s.shape[a];
    }
    return true;
}

/// The different matrices of a stack: without the axes along which it is broadcast, one of none where it is empty.
template <class T> StackView<T> distinct(const StackView<T> &s) {
    StackView<T> out(s.first);
    if (s.empty()) {
        out.shape = {0};
        out.strides = {0};
        return out;
    }
    for (std::size_t a = 0; a < s.shape.size(); ++a) {
        if (s.strides[a] == 0) continue;
        out.shape.push_back(s.shape[a]);
        out.strides.push_back(s.strides[a]);
    }
    return out;
}

/// Matrices of a stack with zero strides are distinct where their index along such axes is zero.
template <class T> bool first_of_its_kind(const StackView<T> &s, std::int64_t item) {
    for (std::size_t a = s.shape.size(); a-- > 0;) {
        if (s.strides[a] == 0 && item % s.shape[a] != 0) return false;
        item /= s.shape[a];
    }
    return true;
}

} // namespace subspan
