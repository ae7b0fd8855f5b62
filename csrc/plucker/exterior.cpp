#include "base/stacks.hpp"
#include "plucker/exterior_tables.hpp"

namespace subspan {

using namespace exterior;

template <class T> bool wedge(const StackView<const T> &a, const StackView<const T> &b, int64_t n, int64_t k, int64_t l, const StackView<T> &out) {
    const Table table(n, k, l);
    check_row(a, length_of(n, k), out.size());
    check_row(b, length_of(n, l), out.size());
    check_row(out, table.rows, out.size());
    if (out.empty()) return true;
    if (k == 1 && l == 1 && n >= 2 && n <= kShortest) {
        auto x = a, y = b;
        auto z = out;
        const bool rows = merge_axes(x) && merge_axes(y) && merge_axes(z);
        if (rows && x.first.col_stride == 1 && y.first.col_stride == 1 && (z.first.col_stride == 1 || n == 2))
            return wedge_vectors<T>(n, out.size(), {x.first.data, y.first.data, z.first.data, x.first.row_stride, y.first.row_stride, z.first.row_stride});
    }
    return blocks(out.size(), [&](int64_t first, int64_t count) {
        Frame frame;
        double *xa = work(frame, a.cols()), *xb = work(frame, b.cols()), *xo = work(frame, table.rows);
        bool finite = load<T>(a, first, count, xa);
        finite = load<T>(b, first, count, xb) && finite;
        product(table, xa, xb, xo);
        return store<T>(xo, first, count, out) || !finite;
    });
}

template <class T>
bool wedge_backward(const StackView<const T> &grad, const StackView<const T> &a, const StackView<const T> &b, int64_t n, int64_t k, int64_t l,
                    const StackView<T> &da, const StackView<T> &db) {
    const Table table(n, k, l);
    const int64_t items = grad.size();
    check_row(grad, table.rows, items);
    check_row(a, length_of(n, k), items);
    check_row(b, length_of(n, l), items);
    check_row(da, a.cols(), items);
    check_row(db, b.cols(), items);
    return blocks(items, [&](int64_t first, int64_t count) {
        Frame frame;
        double *xa = work(frame, a.cols()), *xb = work(frame, b.cols()), *xg = work(frame, table.rows), *ya = work(frame, a.cols()),
               *yb = work(frame, b.cols());
        bool finite = load<T>(a, first, count, xa);
        finite = load<T>(b, first, count, xb) && finite;
        finite = load<T>(grad, first, count, xg) && finite;
        std::fill_n(ya, a.cols() * kItems, 0.0);
        std::fill_n(yb, b.cols() * kItems, 0.0);
        product_backward(table, xg, xa, xb, ya, yb);
        const bool good = store<T>(ya, first, count, da);
        return (store<T>(yb, first, count, db) && good) || !finite;
    });
}

#define SUBSPAN_INSTANTIATE(T)                                                                                                                                 \
    template bool wedge<T>(const StackView<const T> &, const StackView<const T> &, int64_t, int64_t, int64_t, const StackView<T> &);                           \
    template bool wedge_backward<T>(const StackView<const T> &, const StackView<const T> &, const StackView<const T> &, int64_t, int64_t, int64_t,             \
                                    const StackView<T> &, const StackView<T> &);
SUBSPAN_INSTANTIATE(float)
SUBSPAN_INSTANTIATE(double)
#undef SUBSPAN_INSTANTIATE

} // namespace subspan
