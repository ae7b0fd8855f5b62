// A chunk of rows is packed once, columns side by side in panels, and every tile of the triangle takes both its operands from
// it: x is read once, and c once for every chunk.
#include "linalg/syrk.hpp"

#include "base/blocking.hpp"
#include "base/scratch.hpp"
#include "base/simd.hpp"
#include "linalg/microkernel.hpp"
#include "linalg/packed_gram.hpp"
#include "subspan/parallel.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

namespace subspan {
namespace {

using std::int64_t;

template <class P> int64_t rows_of_chunk() { return blocking().gram_depth / (sizeof(P) == 4 ? 1 : 2); } // a panel stays in L1

template <class T, class P> struct PanelArgs {
    MatrixView<const T> x; // the rows of the chunk
    const double *factors, *shift;
    double *sum, *squares; // of each column
    P *packed;
    int64_t begin, end; // columns, from a multiple of the panel's width on
};

// packed[panel][row][lane] = √f (x - shift), zero beyond the last column.
template <class T, class P> struct PanelKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(const PanelArgs<T, P> *g) {
        constexpr int64_t NR = simd::Shape<Bytes>::nv_gram * simd::Vec<P, Bytes>::lanes;
        const int64_t rows = g->x.rows, rs = g->x.row_stride, cs = g->x.col_stride;
        for (int64_t j = g->begin; j < g->end; j += NR) {
            const int64_t count = std::min(NR, g->end - j);
            P *to = g->packed + j * rows;
            alignas(64) double sums[NR] = {}, squares[NR] = {}, shift[NR] = {}, d[NR] = {};
            for (int64_t l = 0; l < count && g->shift != nullptr; ++l) shift[l] = g->shift[j + l];
            for (int64_t i = 0; i < rows; ++i, to += NR) {
                const T *from = g->x.data + i * rs + j * cs;
                if (count == NR && cs == 1)
                    for (int64_t l = 0; l < NR; ++l) d[l] = double(from[l]) - shift[l];
                else
                    for (int64_t l = 0; l < count; ++l) d[l] = double(from[l * cs]) - shift[l];
                if (g->factors == nullptr) {
                    for (int64_t l = 0; l < NR; ++l) {
                        sums[l] += d[l];
                        squares[l] += d[l] * d[l];
                        to[l] = P(d[l]);
                    }
                } else {
                    const double f = g->factors[i], root = std::sqrt(f);
                    for (int64_t l = 0; l < NR; ++l) {
                        sums[l] += f * d[l];
                        squares[l] += f * d[l] * d[l];
                        to[l] = P(root * d[l]);
                    }
                }
            }
            for (int64_t l = 0; l < count; ++l) {
                g->sum[j + l] = sums[l];
                g->squares[j + l] = squares[l];
            }
        }
    }
};

template <class P> struct TileArgs {
    const P *packed;
    int64_t rows, n, ld; // of the chunk; columns
    double *c;
    int64_t panel;
};

// The tiles of one panel of columns, from the diagonal down.
template <class P> struct TileKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(const TileArgs<P> *g) {
        constexpr int MR = simd::Shape<Bytes>::mr, NV = simd::Shape<Bytes>::nv_gram, W = simd::Vec<P, Bytes>::lanes;
        constexpr int64_t NR = NV * W;
        const int64_t j = g->panel * NR, rows = g->rows;
        const P *b = g->packed + j * rows;
        for (int64_t i = j; i < g->n; i += MR) {
            poll();
            alignas(64) P tile[MR * NR];
            simd::microkernel<P, Bytes, NV>(rows, g->packed + i / NR * NR * rows + i % NR, NR, b, tile, NR, false);
            double *to = g->c + i * g->ld + j;
            for (int r = 0; r < MR; ++r)
                for (int l = 0; l < NR; ++l) to[r * g->ld + l] += double(tile[r * NR + l]);
        }
    }
};

template <class P> struct PanelWidth {
    template <int Bytes> static SUBSPAN_INLINE void run(int64_t *out) { *out = simd::Shape<Bytes>::nv_gram * simd::Vec<P, Bytes>::lanes; }
};

constexpr double kAlone = 4e6; // products below which waking a thread costs more than it saves

} // namespace

template <class T, class P>
int64_t add_moments(MatrixView<const T> x, const double *factors, const double *shift, double *c, double *sum, double *squares, double allowance) {
    const int64_t b = x.rows, n = x.cols, ld = moments_stride(n);
    if (b == 0 || n == 0) return b;
    int64_t width = 0;
    simd::dispatch<PanelWidth<P>>(&width);
    const int64_t panels = (n + width - 1) / width, chunk = std::min(rows_of_chunk<P>(), b);
    Frame frame;
    P *packed = frame.take<P>(panels * width * chunk);
    double *sums = frame.take<double>(n), *more = frame.take<double>(n), grown = 0;
    // Columns that lie one after the other are turned by rows of a buffer first.
    T *rows = x.col_stride != 1 && n > 1 ? frame.take<T>(chunk * n) : nullptr;
    const bool alone = double(chunk) * double(n) * double(n) < kAlone || num_threads() == 1;
    const auto each = [&](int64_t tasks, const auto &body) {
        if (alone)
            for (int64_t t = 0; t < tasks; ++t) body(t);
        else
            parallel_for(tasks, body);
    };
    for (int64_t first = 0; first < b; first += chunk) {
        MatrixView<const T> part = x.block_rows(first, std::min(chunk, b - first));
        if (rows != nullptr) {
            copy_matrix<T>(part, MatrixView<T>(rows, part.rows, n));
            part = MatrixView<const T>(rows, part.rows, n);
        }
        const int64_t strip = width * 8;
        each((n + strip - 1) / strip, [&](int64_t t) {
            const PanelArgs<T, P> args{
                part, factors == nullptr ? nullptr : factors + first, shift, sums, more, packed, t * strip, std::min(n, (t + 1) * strip)};
            simd::dispatch<PanelKernel<T, P>>(&args);
        });
        for (int64_t j = 0; j < n; ++j) grown += more[j];
        if (!(grown <= allowance)) return first;
        for (int64_t j = 0; j < n && sum != nullptr; ++j) sum[j] += sums[j];
        for (int64_t j = 0; j < n && squares != nullptr; ++j) squares[j] += more[j];
        each((panels + 1) / 2, [&](int64_t t) { // a long column of tiles with a short one
            const TileArgs<P> args{packed, part.rows, n, ld, c, t};
            simd::dispatch<TileKernel<P>>(&args);
            if (panels - 1 - t == t) return;
            const TileArgs<P> other{packed, part.rows, n, ld, c, panels - 1 - t};
            simd::dispatch<TileKernel<P>>(&other);
        });
    }
    return b;
}

template <class T> void add_moments(const CsrView<T> &x, const double *factors, int64_t n, double *c, double *sum) {
    const int64_t ld = moments_stride(n);
    std::vector<std::pair<int64_t, double>> row;
    for (int64_t i = 0; i < x.rows; ++i) {
        row.clear();
        for (int64_t p = x.begin(i); p < x.begin(i + 1); ++p) row.emplace_back(x.column(p), double(x.values[p]));
        const double f = factors == nullptr ? 1.0 : factors[i];
        for (const auto &[j, v] : row) {
            sum[j] += f * v;
            double *to = c + j * ld;
            for (const auto &[l, u] : row)
                if (l <= j) to[l] += f * v * u; // twice the same column: each with each
        }
    }
}

#define SUBSPAN_INSTANTIATE(T, P) template int64_t add_moments<T, P>(MatrixView<const T>, const double *, const double *, double *, double *, double *, double);
SUBSPAN_INSTANTIATE(float, float)
SUBSPAN_INSTANTIATE(float, double)
SUBSPAN_INSTANTIATE(double, double)
#undef SUBSPAN_INSTANTIATE
template void add_moments<float>(const CsrView<float> &, const double *, int64_t, double *, double *);
template void add_moments<double>(const CsrView<double> &, const double *, int64_t, double *, double *);

} // namespace subspan
