#include "base/amax.hpp"

#include "base/simd.hpp"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <type_traits>
#include <utility>

namespace subspan {
namespace {

template <class T> struct MaxBits {
    using I = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;
    template <int Bytes> static SUBSPAN_INLINE void run(const MatrixView<const T> *a, I *out) {
        constexpr I mask = ~(I(1) << (sizeof(T) * 8 - 1));
        I top = 0;
        const bool whole = a->col_stride == 1 && a->row_stride == a->cols;
        const std::int64_t rows = whole ? 1 : a->rows, cols = whole ? a->rows * a->cols : a->cols;
        for (std::int64_t i = 0; i < rows; ++i) {
            const T *row = a->data + i * a->row_stride;
            I best = 0;
            if (a->col_stride == 1)
                best = std::bit_cast<I>(max_abs_inline(row, cols));
            else
                for (std::int64_t j = 0; j < cols; ++j) best = std::max<I>(best, std::bit_cast<I>(row[j * a->col_stride]) & mask);
            top = std::max(top, best);
        }
        *out = top;
    }
};

} // namespace

template <class T> T max_abs(MatrixView<const T> a) {
    if (a.rows == 0 || a.cols == 0) return T(0);
    if (a.col_stride != 1 && a.row_stride == 1) a = a.transposed();
    typename MaxBits<T>::I bits = 0;
    simd::dispatch<MaxBits<T>>(&std::as_const(a), &bits);
    return std::bit_cast<T>(bits);
}

template float max_abs<float>(MatrixView<const float>);
template double max_abs<double>(MatrixView<const double>);

} // namespace subspan
