// Small pieces that several bindings share.
#pragma once

#include "array.hpp"
#include "subspan/errors.hpp"
#include "subspan/parallel.hpp"
#include "subspan/sizes.hpp"
#include "subspan/orthonormalize.hpp"
#include "turn.hpp"

#include <initializer_list>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace subspan::bind {

/// A TypeError that may be thrown without the GIL.
class WrongDType : public std::invalid_argument {
  public:
    using std::invalid_argument::invalid_argument;
};

/// A vector handed over to NumPy without a copy.
template <class T> py::array_t<T> hand_over(std::vector<T> &&v, std::vector<py::ssize_t> shape) {
    auto *kept = new std::vector<T>(std::move(v));
    const py::capsule free(kept, [](void *p) { delete static_cast<std::vector<T> *>(p); });
    return py::array_t<T>(std::move(shape), kept->data(), free);
}

/// The same of uninitialised items.
template <class T> std::unique_ptr<T[]> uninitialised(std::int64_t n) { return std::unique_ptr<T[]>(new T[std::size_t(std::max<std::int64_t>(n, 1))]); }
template <class T> py::array_t<T> hand_over(std::unique_ptr<T[]> &&items, std::vector<py::ssize_t> shape) {
    T *kept = items.release();
    const py::capsule free(kept, [](void *p) { delete[] static_cast<T *>(p); });
    return py::array_t<T>(std::move(shape), kept, free);
}

/// A contiguous stack of the shape of another one, and its memory.
template <class T> struct Aside {
    std::unique_ptr<T[]> items;
    StackView<T> stack;
    explicit Aside(const StackView<T> &like) {
        const std::int64_t size = like.rows() * like.cols();
        items = uninitialised<T>(checked_product({like.size(), size}, "a copy of out"));
        std::vector<std::int64_t> strides(like.shape.size());
        std::int64_t step = size;
        for (std::size_t a = like.shape.size(); a-- > 0;) {
            strides[a] = step;
            step *= like.shape[a];
        }
        stack = StackView<T>(MatrixView<T>(items.get(), like.rows(), like.cols()), like.shape, strides);
    }
};

template <class T> void copy_stack(const StackView<T> &from, const StackView<T> &to) {
    if (to.rows() == 0 || to.cols() == 0) return;
    parallel_for(to.size() * to.rows(), [&](std::int64_t t) {
        const auto source = from[t / to.rows()], target = to[t / to.rows()];
        const std::int64_t r = t % to.rows();
        for (std::int64_t c = 0; c < to.cols(); ++c) target(r, c) = source(r, c);
    });
}

/// Whether a call of so many flops on so many items may go without hearing an interrupt.
inline bool is_soon(double flops, double bytes) { return flops / 1.5e10 / double(num_threads()) + bytes / 8e9 < 0.6; }

/// Runs f(out) where `out` may be one of f's inputs, so that an interrupt leaves it as it was: what is over soon is not
/// interrupted, what is not goes aside and is copied.
template <class T, class F> void whole(const StackView<T> &out, bool in_place, double flops, F &&f) {
    if (!in_place) return f(out);
    if (is_soon(flops, double(out.size()) * double(out.rows()) * double(out.cols()) * 2.0 * sizeof(T))) {
        const Shielded shielded;
        return f(out);
    }
    const Aside<T> aside(out);
    f(aside.stack);
    const Shielded shielded;
    copy_stack(aside.stack, out);
}

/// The same for arrays that f changes: f(stacks).
template <class T, class F> void whole_step(std::vector<StackView<T>> stacks, double flops, F &&f) {
    double bytes = 0;
    for (const auto &x : stacks) bytes += double(x.size()) * double(x.rows()) * double(x.cols()) * 2.0 * sizeof(T);
    if (is_soon(flops, bytes)) {
        const Shielded shielded;
        return f(stacks);
    }
    std::vector<Aside<T>> copies;
    std::vector<StackView<T>> moved;
    for (const auto &x : stacks) {
        copies.emplace_back(x);
        moved.push_back(copies.back().stack);
        copy_stack(x, moved.back());
    }
    f(moved);
    const Shielded shielded;
    for (std::size_t i = 0; i < stacks.size(); ++i) copy_stack(moved[i], stacks[i]);
}

/// The rule of all functions: NaN and infinity of the input are refused or go through, what finite input gives is finite, or
/// a ValueError. Inputs are looked at only where the result is not finite.
template <class T> void require_no_overflow(const StackView<T> &out, const char *what, std::initializer_list<StackView<const T>> inputs) {
    if (subspan::all_finite<T>(StackView<const T>(out))) return;
    for (const auto &x : inputs)
        if (x.first.data != nullptr && !subspan::all_finite<T>(x)) return;
    throw ValueError(std::string(what) + " overflows the dtype although the input is finite; scale what goes in");
}

/// The same where NaN and infinity of `x`, which `name` names, are refused: both show in a product.
template <class T> void require_finite_product(const StackView<T> &out, const StackView<const T> &x, const char *name) {
    if (subspan::all_finite<T>(StackView<const T>(out))) return;
    if (!subspan::all_finite<T>(x)) throw ValueError(std::string(name) + " holds NaN or infinity");
    throw ValueError("the result overflows the dtype although the input is finite; scale it");
}

/// What is wrong with the arrays of a compressed sparse matrix of `major` rows (columns) and `minor` columns (rows), of
/// which `stored` entries are there: no loop may leave them. Whether each row is sorted without duplicates.
template <class I>
bool check_compressed(const I *indptr, const I *indices, std::int64_t major, std::int64_t minor, std::int64_t stored, const std::string &name) {
    if (indptr[0] != 0) throw ValueError(name + ": indptr must begin with 0, got " + std::to_string(indptr[0]));
    for (std::int64_t i = 0; i < major; ++i)
        if (indptr[i + 1] < indptr[i])
            throw ValueError(name + ": indptr must not decrease, but goes from " + std::to_string(indptr[i]) + " to " + std::to_string(indptr[i + 1]) + " at " +
                             std::to_string(i));
    if (std::int64_t(indptr[major]) > stored)
        throw ValueError(name + ": indptr ends at " + std::to_string(indptr[major]) + ", and " + std::to_string(stored) + " entries are stored");
    bool canonical = true;
    for (std::int64_t i = 0; i < major; ++i)
        for (std::int64_t p = indptr[i]; p < std::int64_t(indptr[i + 1]); ++p) {
            if (indices[p] < 0 || std::int64_t(indices[p]) >= minor)
                throw ValueError(name + ": indices hold " + std::to_string(indices[p]) + " at " + std::to_string(p) + ", outside of [0, " +
                                 std::to_string(minor) + ")");
            canonical = canonical && (p == std::int64_t(indptr[i]) || indices[p - 1] < indices[p]);
        }
    return canonical;
}

/// The arrays of a scipy.sparse CSR matrix; keeps them alive.
class Csr {
  public:
    Csr(const py::object &data, const py::object &indices, const py::object &indptr, std::int64_t rows, std::int64_t cols, const char *name)
        : data_(data, name), indices_(py::array::ensure(indices)), indptr_(py::array::ensure(indptr)), rows_(rows), cols_(cols) {
        const auto wide = [&](const py::array &a) {
            if (!a || a.ndim() != 1 || a.dtype().kind() != 'i' || (a.itemsize() != 4 && a.itemsize() != 8) || (a.size() > 1 && a.strides(0) != a.itemsize()))
                throw py::value_error(std::string(name) + ": CSR indices must be contiguous int32 or int64 vectors");
            return a.itemsize() == 8;
        };
        wide_ = wide(indices_);
        if (wide(indptr_) != wide_) throw py::value_error(std::string(name) + ": CSR indices and indptr must have one dtype");
        if (indptr_.size() != rows + 1) throw py::value_error(std::string(name) + ": CSR indptr does not fit the shape");
        data_.require_ndim(1);
        const std::int64_t last = wide_ ? static_cast<const std::int64_t *>(indptr_.data())[rows] : static_cast<const std::int32_t *>(indptr_.data())[rows];
        if (last < 0 || last > data_.shape(0) || last > indices_.size())
            throw py::value_error(std::string(name) + ": CSR indptr points past the end of the data");
    }
    DType dtype() const { return data_.dtype(); }
    bool all_finite() const {
        return dispatch(data_.dtype(), [&](auto t) {
            using T = decltype(t);
            const T *p = data_.vector<const T>(data_.shape(0));
            return subspan::all_finite<T>(StackView<const T>(MatrixView<const T>(p, 1, data_.shape(0))));
        });
    }
    /// ValueError where an output shares memory with the values.
    void check_no_overlap_with(const Array &out) const { check_no_overlap(out, data_); }
    template <class T> CsrView<T> view() const { return {data_.vector<T>(data_.shape(0)), indptr_.data(), indices_.data(), rows_, cols_, wide_}; }

  private:
    Array data_;
    py::array indices_, indptr_;
    std::int64_t rows_, cols_;
    bool wide_ = false;
};

} // namespace subspan::bind
