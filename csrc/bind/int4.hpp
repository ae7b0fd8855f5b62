// The parts of an Int4Basis, as the tuple (codes, scale, zero, rows, cols, group) that Python keeps.
#pragma once

#include "convert.hpp"
#include "subspan/apply_core.hpp"
#include "subspan/sizes.hpp"

#include <optional>

namespace subspan::bind {

class Int4 {
  public:
    Int4(const py::object &parts, const char *name)
        : tuple_(py::cast<py::tuple>(parts)), codes_(py::cast<py::array>(py::object(tuple_[0]))),
          scale_(py::object(tuple_[1]), name), zero_(py::object(tuple_[2]), name), rows_(py::cast<std::int64_t>(tuple_[3])),
          cols_(py::cast<std::int64_t>(tuple_[4])), group_(py::cast<std::int64_t>(tuple_[5])) {
        const std::int64_t n = checked_product({rows_, cols_}, name);
        if (group_ < 1 || codes_.dtype().kind() != 'u' || codes_.itemsize() != 1 ||
            codes_.ndim() != 1 || (codes_.size() > 1 && codes_.strides(0) != 1) || codes_.size() != (n + 1) / 2)
            throw py::value_error(std::string(name) + ": 4-bit codes do not fit the shape");
        zero_.require_dtype(scale_.dtype());
        groups_ = n == 0 ? 0 : (n - 1) / group_ + 1;
        for (const Array *a : {&scale_, &zero_})
            if (a->ndim() != 1 || a->shape(0) != groups_)
                throw py::value_error(std::string(name) + ": " + std::to_string(groups_) + " scales and zeros are needed, got shape " +
                                      a->shape_text());
        group_ = std::min(group_, std::max<std::int64_t>(n, 1));
    }
    void require_apart_from(const Array &out) const {
        require_apart(out, scale_);
        require_apart(out, zero_);
        const std::int64_t size = codes_.size(), stride = 1;
        require_apart(out.layout(), Layout{"the codes", codes_.data(), 1, &size, &stride, 1});
    }
    DType dtype() const { return scale_.dtype(); }
    template <class T> Int4View<T> view() const {
        return {static_cast<const std::uint8_t *>(codes_.data()), scale_.vector<const T>(groups_),
                zero_.vector<const T>(groups_), rows_, cols_, group_};
    }

  private:
    py::tuple tuple_;
    py::array codes_;
    Array scale_, zero_;
    std::int64_t rows_, cols_, group_, groups_ = 0;
};

// V as a dense stack, or as the parts of an Int4Basis.
class BasisArgument {
  public:
    explicit BasisArgument(const py::object &v) {
        if (py::isinstance<py::tuple>(v))
            packed_.emplace(v, "V");
        else
            dense_.emplace(v, "V");
    }
    DType dtype() const { return dense_ ? dense_->dtype() : packed_->dtype(); }
    void require_apart_from(const Array &out) const {
        if (dense_)
            require_apart(out, *dense_);
        else
            packed_->require_apart_from(out);
    }
    const Array *dense() const { return dense_ ? &*dense_ : nullptr; }
    template <class T> Basis<T> get(const std::vector<std::int64_t> &batch, Int4View<T> &view) const {
        if (dense_) return Basis<T>(dense_->stack<const T>(batch));
        view = packed_->view<T>();
        return Basis<T>(view);
    }

  private:
    std::optional<Array> dense_;
    std::optional<Int4> packed_;
};

} // namespace subspan::bind
