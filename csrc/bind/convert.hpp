// Small pieces that several bindings share.
#pragma once

#include "arrays.hpp"

#include <optional>
#include <stdexcept>
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

/// The arrays of a scipy.sparse CSR matrix; keeps them alive.
class Csr {
  public:
    Csr(const py::object &data, const py::object &indices, const py::object &indptr, std::int64_t rows, std::int64_t cols,
        const char *name)
        : data_(data, name), indices_(py::array::ensure(indices)), indptr_(py::array::ensure(indptr)), rows_(rows), cols_(cols) {
        const auto wide = [&](const py::array &a) {
            if (!a || a.ndim() != 1 || a.dtype().kind() != 'i' || (a.itemsize() != 4 && a.itemsize() != 8) ||
                (a.size() > 1 && a.strides(0) != a.itemsize()))
                throw py::value_error(std::string(name) + ": CSR indices must be contiguous int32 or int64 vectors");
            return a.itemsize() == 8;
        };
        wide_ = wide(indices_);
        if (wide(indptr_) != wide_) throw py::value_error(std::string(name) + ": CSR indices and indptr must have one dtype");
        if (indptr_.size() != rows + 1) throw py::value_error(std::string(name) + ": CSR indptr does not fit the shape");
        data_.require_ndim(1);
        const std::int64_t last = wide_ ? static_cast<const std::int64_t *>(indptr_.data())[rows]
                                        : static_cast<const std::int32_t *>(indptr_.data())[rows];
        if (last > data_.shape(0) || last > indices_.size())
            throw py::value_error(std::string(name) + ": CSR indptr points past the end of the data");
    }
    DType dtype() const { return data_.dtype(); }
    template <class T> CsrView<T> view() const {
        return {data_.vector<T>(data_.shape(0)), indptr_.data(), indices_.data(), rows_, cols_, wide_};
    }

  private:
    Array data_;
    py::array indices_, indptr_;
    std::int64_t rows_, cols_;
    bool wide_ = false;
};

} // namespace subspan::bind
