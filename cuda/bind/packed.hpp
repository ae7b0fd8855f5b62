// A matrix of 4-bit codes as Int4Basis holds it: (codes, scale, zero, rows, columns, group).
#pragma once

#include "device_array.hpp"
#include "subspan/cuda/int4.hpp"

namespace subspan::bind {

class PackedArray {
  public:
    PackedArray(const py::tuple &parts, const Call &call)
        : bytes_(py::object(parts[0]), "codes", call), scale_(py::object(parts[1]), "scale", call), zero_(py::object(parts[2]), "zero", call) {
        packed_.rows = parts[3].cast<std::int64_t>();
        packed_.cols = parts[4].cast<std::int64_t>();
        packed_.group = parts[5].cast<std::int64_t>();
        const std::int64_t all = packed_.rows * packed_.cols;
        if (packed_.rows < 0 || packed_.cols < 0 || packed_.group < 1) throw py::value_error("codes have sizes that are none");
        bytes_.require_dtype(DType::u8);
        bytes_.require_shape({(all + 1) / 2});
        scale_.require_shape({(all + packed_.group - 1) / packed_.group});
        zero_.require_shape({scale_.shape(0)});
        zero_.require_dtype(scale_.dtype());
        packed_.codes = static_cast<const std::uint8_t *>(bytes_.contiguous());
        packed_.scale = scale_.contiguous();
        packed_.zero = zero_.contiguous();
    }
    const cuda::Int4Codes &codes() const { return packed_; }
    /// Scales are in the type that sums over items of this dtype are kept in.
    void require_wide(DType d) const { scale_.require_dtype(d == DType::f64 ? DType::f64 : DType::f32); }
    /// The sizes of the matrix, of items of some dtype; there are none.
    Stack as_stack(DType d) const {
        Stack s;
        s.dtype = d;
        s.rows = packed_.rows;
        s.cols = packed_.cols;
        s.row_stride = packed_.cols;
        return s;
    }

  private:
    DeviceArray bytes_, scale_, zero_;
    cuda::Int4Codes packed_;
};

} // namespace subspan::bind
