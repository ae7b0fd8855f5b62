// What callers of the CUDA kernels hold: device pointers with shapes and strides. No CUDA header is needed here.
#pragma once

#include "subspan/errors.hpp"
#include "subspan/options.hpp"

#include <cstdint>
#include <stdexcept>
#include <string>

namespace subspan::cuda {

/// A CUDA call failed; the error was cleared before this was thrown.
class SUBSPAN_VISIBLE CudaError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

using subspan::DType;
using subspan::name_of;
using subspan::size_of;

/// Leading axes that kernels walk themselves; axes that lie one after the other in memory count as one.
inline constexpr int kAxes = 4;

/// A stack of matrices on a device. Strides in elements, of any sign; zero for a broadcast axis.
struct Stack {
    void *data = nullptr;
    DType dtype = DType::f32;
    std::int64_t rows = 0, cols = 0, row_stride = 0, col_stride = 1;
    int axes = 0;
    std::int64_t shape[kAxes] = {}, stride[kAxes] = {};

    std::int64_t size() const {
        std::int64_t n = 1;
        for (int a = 0; a < axes; ++a) n *= shape[a];
        return n;
    }
    Stack transposed() const {
        Stack t = *this;
        t.rows = cols;
        t.cols = rows;
        t.row_stride = col_stride;
        t.col_stride = row_stride;
        return t;
    }
};

/// Where a call runs: a stream of the caller's (a cudaStream_t) on a device, and memory of the caller's to work in.
struct Context {
    void *stream = nullptr;
    int device = 0;
    void *workspace = nullptr;
    std::int64_t workspace_bytes = 0;
};

} // namespace subspan::cuda
