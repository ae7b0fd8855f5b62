#include "subspan/cuda/assign.hpp"

#include "base/copy.cuh"

namespace subspan::cuda {
namespace {

__global__ void __launch_bounds__(256)
    bytes_kernel(SUBSPAN_PARAMETER const Matrices<const uint8_t> from, SUBSPAN_PARAMETER const Matrices<uint8_t> to, const int64_t items) {
    const Place p = place_of(to.rows, to.cols);
    if (p.item < items) to.at(p.item)[p.row * to.row_stride + p.col * to.col_stride] = from.at(p.item)[p.row * from.row_stride + p.col * from.col_stride];
}

template <class To> __global__ void __launch_bounds__(256) fill_kernel(SUBSPAN_PARAMETER const Matrices<To> to, const To value, const int64_t items) {
    const Place p = place_of(to.rows, to.cols);
    if (p.item < items) to.at(p.item)[p.row * to.row_stride + p.col * to.col_stride] = value;
}

template <class T>
__global__ void __launch_bounds__(256)
    unit_lower_kernel(SUBSPAN_PARAMETER const Matrices<const T> from, SUBSPAN_PARAMETER const Matrices<T> to, const int64_t first, const int64_t items) {
    const Place p = place_of(to.rows, to.cols);
    if (p.item >= items) return;
    T x = narrow<T>(Accumulate<T>(p.row == p.col + first ? 1 : 0));
    if (from.data != nullptr && p.row > p.col) x = from.at(p.item)[p.row * from.row_stride + p.col * from.col_stride];
    to.at(p.item)[p.row * to.row_stride + p.col * to.col_stride] = x;
}

void require_shape(const Stack &from, const Stack &to) {
    if (from.size() != to.size() || from.rows != to.rows || from.cols != to.cols) throw ValueError("a copy must have the shape of what it is copied from");
}

} // namespace

void assign(const Context &context, const Stack &from, const Stack &to, double factor) {
    require_shape(from, to);
    const Session s(context);
    const int64_t items = to.size(), all = items * to.rows * to.cols;
    if (all == 0) return;
    if (from.dtype != DType::u8 && to.dtype != DType::u8)
        return dispatch(from.dtype, [&](auto a) { dispatch(to.dtype, [&](auto b) { copies<decltype(a), decltype(b)>(s, from, 0, to, 0, items, factor); }); });
    if (from.dtype != to.dtype || factor != 1.0) throw ValueError("bytes are copied to bytes");
    launch<bytes_kernel>(s, "a copy of bytes", one_each(all), Matrices<const uint8_t>(from), Matrices<uint8_t>(to), items);
}

void fill(const Context &context, const Stack &to, double value) {
    const Session s(context);
    const int64_t items = to.size(), all = items * to.rows * to.cols;
    if (all == 0) return;
    if (to.dtype == DType::u8) return launch<fill_kernel<uint8_t>>(s, "a fill", one_each(all), Matrices<uint8_t>(to), uint8_t(value), items);
    dispatch(to.dtype, [&](auto tag) {
        using T = decltype(tag);
        launch<fill_kernel<T>>(s, "a fill", one_each(all), Matrices<T>(to), narrow<T>(Accumulate<T>(value)), items);
    });
}

void unit_lower(const Context &context, const Stack *from, const Stack &to, std::int64_t first) {
    if (from != nullptr) require_shape(*from, to);
    if (from != nullptr && from->dtype != to.dtype) throw ValueError("a copy must be of the dtype of what it is copied from");
    const Session s(context);
    const int64_t items = to.size(), all = items * to.rows * to.cols;
    if (all == 0) return;
    dispatch(to.dtype, [&](auto tag) {
        using T = decltype(tag);
        Stack none = to;
        none.data = nullptr;
        launch<unit_lower_kernel<T>>(s, "unit lower trapezoidal vectors", one_each(all), Matrices<const T>(from == nullptr ? none : *from), Matrices<T>(to),
                                     first, items);
    });
}

} // namespace subspan::cuda
