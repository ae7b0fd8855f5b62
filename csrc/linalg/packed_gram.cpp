#include "linalg/packed_gram.hpp"
#include "subspan/parallel.hpp"

#include "linalg/columns.hpp"
#include "linalg/microkernel.hpp"
#include "linalg/narrow.hpp"
#include "linalg/packing.hpp"
#include "base/simd.hpp"

#include <algorithm>
#include <array>
#include <atomic>

namespace subspan {
namespace {

using simd::round_up;
using simd::Transpose;
using simd::Vec;
using std::int64_t;

// to(i, j) = from(i, j) where `from` has contiguous columns and `to` contiguous rows.
template <class T, int Bytes> SUBSPAN_INLINE void transposed(const T *from, int64_t fs, T *to, int64_t ts, int64_t rows, int64_t cols) {
    constexpr int W = Vec<T, Bytes>::lanes, H = W / 2;
    int64_t j = 0;
    for (; j + W <= cols; j += W) {
        int64_t i = 0;
        for (; i + W <= rows; i += W) Transpose<T, Bytes>::block(from + j * fs + i, fs, nullptr, nullptr, to + i * ts + j, ts);
        for (; i < rows; ++i)
            for (int l = 0; l < W; ++l) to[i * ts + j + l] = from[(j + l) * fs + i];
    }
    if constexpr (Bytes > 16)
        for (; j + H <= cols; j += H) {
            int64_t i = 0;
            for (; i + H <= rows; i += H) Transpose<T, Bytes / 2>::block(from + j * fs + i, fs, nullptr, nullptr, to + i * ts + j, ts);
            for (; i < rows; ++i)
                for (int l = 0; l < H; ++l) to[i * ts + j + l] = from[(j + l) * fs + i];
        }
    for (; j < cols; ++j)
        for (int64_t i = 0; i < rows; ++i) to[i * ts + j] = from[j * fs + i];
}

template <class T, int Bytes> SUBSPAN_INLINE void copy_kernel(MatrixView<const T> from, MatrixView<T> to) {
    using V = Vec<T, Bytes>;
    constexpr int W = V::lanes;
    if (from.col_stride == 1 && to.col_stride == 1) {
        if (from.row_stride == from.cols && to.row_stride == to.cols) { // one run
            from = {from.data, 1, from.rows * from.cols};
            to = {to.data, 1, from.cols};
        }
        if constexpr (Bytes > 16) { // rows of one half vector, or of one: the usual class
            using U = Vec<T, Bytes / 2>;
            if (from.cols == W / 2) {
                for (int64_t i = 0; i < from.rows; ++i) U::store(to.data + i * to.row_stride, U::load(from.data + i * from.row_stride));
                return;
            }
        }
        if (from.cols < 8 && from.rows > 1) return simd::copy_rows(from.data, from.row_stride, to.data, to.row_stride, from.rows, from.cols);
        if (from.cols == W) {
            for (int64_t i = 0; i < from.rows; ++i) V::store(to.data + i * to.row_stride, V::load(from.data + i * from.row_stride));
            return;
        }
        for (int64_t i = 0; i < from.rows; ++i) {
            const T *x = from.data + i * from.row_stride;
            T *y = to.data + i * to.row_stride;
            int64_t j = 0;
            for (; j + W <= from.cols; j += W) V::store(y + j, V::load(x + j));
            if constexpr (Bytes > 16) {
                using U = Vec<T, Bytes / 2>;
                if (j + W / 2 <= from.cols) {
                    U::store(y + j, U::load(x + j));
                    j += W / 2;
                }
            }
            for (; j < from.cols; ++j) y[j] = x[j];
        }
    } else if (from.row_stride == 1 && to.col_stride == 1) {
        transposed<T, Bytes>(from.data, from.col_stride, to.data, to.row_stride, from.rows, from.cols);
    } else if (from.col_stride == 1 && to.row_stride == 1) {
        transposed<T, Bytes>(from.data, from.row_stride, to.data, to.col_stride, from.cols, from.rows);
    } else {
        for (int64_t i = 0; i < from.rows; ++i)
            for (int64_t j = 0; j < from.cols; ++j) to(i, j) = from(i, j);
    }
}

template <class T> struct CopyKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(const MatrixView<const T> *from, const MatrixView<T> *to) {
        if (from->row_stride == 1 && to->row_stride == 1 && from->col_stride != 1)
            copy_kernel<T, Bytes>(from->transposed(), to->transposed());
        else
            copy_kernel<T, Bytes>(*from, *to);
    }
};

template <class T> struct DecayAddKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(const MatrixView<T> *bp, T momentum, const MatrixView<const T> *gp, T weight) {
        using V = Vec<T, Bytes>;
        auto b = *bp;
        auto g = *gp;
        if (b.col_stride != 1 && b.row_stride == 1) {
            b = b.transposed();
            g = g.transposed();
        }
        if (b.col_stride == 1 && g.col_stride == 1) {
            if (b.row_stride == b.cols && g.row_stride == g.cols) {
                b = {b.data, 1, b.rows * b.cols};
                g = {g.data, 1, b.cols};
            }
            for (int64_t i = 0; i < b.rows; ++i) {
                T *y = b.data + i * b.row_stride;
                const T *x = g.data + i * g.row_stride;
                int64_t j = 0;
                for (; j + V::lanes <= b.cols; j += V::lanes) V::store(y + j, momentum * V::load(y + j) + weight * V::load(x + j));
                for (; j < b.cols; ++j) y[j] = momentum * y[j] + weight * x[j];
            }
            return;
        }
        for (int64_t i = 0; i < b.rows; ++i)
            for (int64_t j = 0; j < b.cols; ++j) b(i, j) = momentum * b(i, j) + weight * g(i, j);
    }
};

template <class T> struct PackKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(const MatrixView<const T> *operands, int count, int64_t first, int64_t rows, T *z, int64_t ld) {
        const int64_t k = operands[0].cols;
        for (int a = 0; a < count; ++a) copy_kernel<T, Bytes>(operands[a].block_rows(first, rows), MatrixView<T>(z + a * k, rows, k, ld, 1));
        // What lies in z past the operands only enters products that nobody reads.
    }
};

// Columns of nearly equal entries, of which Hadamard and cosine bases are made, round in one direction, and lose half an eps a
// row: no chain of additions is longer than this, those of blocks of so many rows go on in double.
constexpr int64_t kChain = 32, kGramRows = 256;
constexpr int64_t kLeastRows = 256; // of a packed block
constexpr int64_t kParts = 16;      // of rows, at most, that threads share: a Gram matrix of each is kept

template <class T> struct GramArgs {
    int64_t rows, k, width, ld;
    const T *z;
    const unsigned *wanted;
    double *g, *low; // width x ld; what rounding left out of g where T is double
    const Ahead *ahead;
    int64_t first, n; // of all rows of the class
};

template <class T> struct GramKernel {
    template <int Bytes, int NV>
    static SUBSPAN_INLINE void ahead_of(const GramArgs<T> *a, int64_t which, int64_t row, int64_t depth, const T *x, const T *y, T *c, bool add) {
        using V = Vec<T, Bytes>;
        constexpr int MR = simd::Shape<Bytes>::mr, W = V::lanes;
        typename V::type acc[MR][NV];
#pragma GCC unroll 8
        for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
            for (int q = 0; q < NV; ++q) acc[r][q] = typename V::type{};
        const int64_t each = a->ahead->bytes[which] / a->n;
        const char *next = a->ahead->data[which] + row * each;
        for (int64_t d = 0; d < depth; ++d) {
            typename V::type b[NV];
#pragma GCC unroll 4
            for (int q = 0; q < NV; ++q) b[q] = V::load(y + q * W);
            simd::prefetch(next);
#pragma GCC unroll 8
            for (int r = 0; r < MR; ++r) {
                const T e = x[r];
#pragma GCC unroll 4
                for (int q = 0; q < NV; ++q) acc[r][q] += e * b[q];
            }
            x += a->ld;
            y += a->ld;
            next += each;
        }
#pragma GCC unroll 8
        for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
            for (int q = 0; q < NV; ++q) {
                T *p = c + (r * NV + q) * W;
                V::store(p, add ? V::load(p) + acc[r][q] : acc[r][q]);
            }
    }
    template <int Bytes, int NV> static SUBSPAN_INLINE void tile(const GramArgs<T> *a, int64_t d, int64_t depth, int64_t i, int64_t j) {
        constexpr int MR = simd::Shape<Bytes>::mr, NR = NV * Vec<T, Bytes>::lanes;
        // Rows of the tile belong to operands first..last, columns likewise: some pair must be wanted.
        const int64_t last_row = std::min(i + MR, a->width) - 1, last_col = std::min(j + NR, a->width) - 1;
        if (last_col < i) return; // below the diagonal
        bool any = false;
        for (int64_t p = i / a->k; p <= last_row / a->k; ++p)
            for (int64_t q = std::max(p, j / a->k); q <= last_col / a->k; ++q) any = any || ((a->wanted[p] >> q) & 1u);
        if (!any) return;
        alignas(64) T c[MR * NR];
        // Tile by tile an operand of the next class comes closer while this one is multiplied.
        const int64_t which = i / MR;
        const bool ahead = j == 0 && which < 2 && a->ahead->bytes[which] > 0;
        for (int64_t o = 0; o < depth; o += kChain) {
            const int64_t some = std::min(kChain, depth - o);
            const T *z = a->z + (d + o) * a->ld;
            if (ahead)
                ahead_of<Bytes, NV>(a, which, a->first + d + o, some, z + i, z, c, o > 0);
            else
                simd::microkernel<T, Bytes, NV>(some, z + i, a->ld, z + j, c, NR, o > 0, a->ld);
        }
        for (int r = 0; r < MR; ++r) {
            double *g = a->g + (i + r) * a->ld + j;
            if constexpr (sizeof(T) == 4) {
                for (int l = 0; l < NR; ++l) g[l] += double(c[r * NR + l]);
            } else {
                // Sum and error of the sum (Knuth): thousands of blocks of a long class add up without bias.
                double *low = a->low + (i + r) * a->ld + j;
                for (int l = 0; l < NR; ++l) {
                    const double x = g[l], y = c[r * NR + l], s = x + y, z = s - x;
                    low[l] += (x - (s - z)) + (y - z);
                    g[l] = s;
                }
            }
        }
    }
    template <int Bytes> static SUBSPAN_INLINE void run(const GramArgs<T> *a) {
        constexpr int MR = simd::Shape<Bytes>::mr, W = Vec<T, Bytes>::lanes;
        for (int64_t d = 0; d < a->rows; d += kGramRows) {
            const int64_t depth = std::min(kGramRows, a->rows - d);
            int64_t j = 0;
            for (; j + 2 * W <= a->ld; j += 2 * W)
                for (int64_t i = 0; i < a->width; i += MR) tile<Bytes, 2>(a, d, depth, i, j);
            for (; j < a->ld; j += W)
                for (int64_t i = 0; i < a->width; i += MR) tile<Bytes, 1>(a, d, depth, i, j);
        }
    }
};

template <class T> struct ApplyArgs {
    int64_t rows, width, ld, kp;
    const T *z, *w; // w: width x kp
    MatrixView<T> out;
    bool accumulate;
    const char *ahead; // what the next class needs: `each` bytes for every row here
    int64_t each;
};

template <class T> struct ApplyKernel {
    // MR rows of z against NV vectors of w.
    template <int Bytes, int MR, int NV> static SUBSPAN_INLINE void tile(const ApplyArgs<T> *a, int64_t i, int64_t j, T *c, int64_t ldc, bool accumulate) {
        // A row length that the compiler knows spares eight address registers.
        if (a->ld == 16) return tile_of<Bytes, MR, NV, 16>(a, i, j, c, ldc, accumulate);
        tile_of<Bytes, MR, NV, 0>(a, i, j, c, ldc, accumulate);
    }
    template <int Bytes, int MR, int NV, int LD>
    static SUBSPAN_INLINE void tile_of(const ApplyArgs<T> *a, int64_t i, int64_t j, T *c, int64_t ldc, bool accumulate) {
        const int64_t ld = LD > 0 ? LD : a->ld;
        using V = Vec<T, Bytes>;
        typename V::type acc[MR][NV];
#pragma GCC unroll 8
        for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
            for (int q = 0; q < NV; ++q) acc[r][q] = typename V::type{};
        const T *z = a->z + i * ld, *w = a->w + j;
        for (int64_t d = 0; d < a->width; ++d) {
            typename V::type y[NV];
#pragma GCC unroll 2
            for (int q = 0; q < NV; ++q) y[q] = V::load(w + q * V::lanes);
#pragma GCC unroll 8
            for (int r = 0; r < MR; ++r) {
                const T x = z[r * ld + d];
#pragma GCC unroll 2
                for (int q = 0; q < NV; ++q) acc[r][q] += x * y[q];
            }
            w += a->kp;
        }
#pragma GCC unroll 8
        for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
            for (int q = 0; q < NV; ++q) {
                T *p = c + r * ldc + q * V::lanes;
                V::store(p, accumulate ? V::load(p) + acc[r][q] : acc[r][q]);
            }
    }
    template <int Bytes, int NV> static SUBSPAN_INLINE void column(const ApplyArgs<T> *a, int64_t j) {
        constexpr int MR = Bytes == 16 ? 4 : 8, W = Vec<T, Bytes>::lanes, NR = NV * W;
        const int64_t cols = std::min<int64_t>(NR, a->out.cols - j);
        if (cols <= 0) return;
        const bool direct = a->out.col_stride == 1 && cols == NR;
        const bool across = a->out.row_stride == 1 && a->out.col_stride != 1 && !a->accumulate;
        alignas(64) T c[16 * NR];
        int64_t i = 0;
        const int64_t each = j == 0 ? a->each : 0;
        if (direct)
            for (; i + MR <= a->rows; i += MR) {
                for (int64_t p = 0; p < MR * each; p += 64) simd::prefetch(a->ahead + i * each + p);
                tile<Bytes, MR, NV>(a, i, j, a->out.data + i * a->out.row_stride + j, a->out.row_stride, a->accumulate);
            }
        if (across) // columns of `out` are contiguous: sixteen rows at a time, transposed
            for (; i + 16 <= a->rows; i += 16) {
                for (int64_t p = 0; p < 16 * each; p += 64) simd::prefetch(a->ahead + i * each + p);
                for (int r = 0; r < 16; r += MR) tile<Bytes, MR, NV>(a, i + r, j, c + r * NR, NR, false);
                transposed_out<Bytes>(c, NR, a->out.data + i + j * a->out.col_stride, a->out.col_stride, cols);
            }
        for (; i < a->rows; i += MR) {
            const int64_t count = std::min<int64_t>(MR, a->rows - i);
            if (count == MR)
                tile<Bytes, MR, NV>(a, i, j, c, NR, false);
            else
                for (int64_t r = 0; r < count; ++r) tile<Bytes, 1, NV>(a, i + r, j, c + r * NR, NR, false);
            if (a->out.col_stride == 1 && !a->accumulate) {
                simd::copy_rows(c, NR, a->out.data + i * a->out.row_stride + j, a->out.row_stride, count, cols);
                continue;
            }
            for (int64_t r = 0; r < count; ++r)
                for (int64_t l = 0; l < cols; ++l) {
                    T &o = a->out(i + r, j + l);
                    o = a->accumulate ? o + c[r * NR + l] : c[r * NR + l];
                }
        }
    }
    // out[l·stride + r] = c[r·ldc + l], r < 16.
    template <int Bytes> static SUBSPAN_INLINE void transposed_out(const T *c, int64_t ldc, T *out, int64_t stride, int64_t cols) {
        constexpr int W = Vec<T, Bytes>::lanes;
        int64_t l = 0;
        if constexpr (W <= 16)
            for (; l + W <= cols; l += W)
                for (int r = 0; r < 16; r += W) Transpose<T, Bytes>::block(c + r * ldc + l, ldc, nullptr, nullptr, out + l * stride + r, stride);
        for (; l < cols; ++l)
            for (int r = 0; r < 16; ++r) out[l * stride + r] = c[r * ldc + l];
    }
    template <int Bytes> static SUBSPAN_INLINE void run(const ApplyArgs<T> *a) {
        constexpr int W = Vec<T, Bytes>::lanes;
        int64_t j = 0;
        for (; j + 2 * W <= a->kp; j += 2 * W) column<Bytes, 2>(a, j);
        if constexpr (Bytes > 16) {
            for (; j + W <= a->kp; j += W) column<Bytes, 1>(a, j);
            if (j < a->kp) column<Bytes / 2, 1>(a, j);
        } else {
            for (; j < a->kp; j += W) column<Bytes, 1>(a, j);
        }
    }
};

// Classes of a few columns, whose rows would fill a part of a vector.
template <class T> int64_t most_columns() { return sizeof(T) == 4 ? 4 : 3; }

template <class T> struct ColumnGramArgs {
    int64_t k, width, rows, ld, ldg;
    T *z;
    const MatrixView<const T> *operands; // null: packed already
    int count;
    int64_t first;
    const unsigned *wanted; // null: only to be packed
    double *g, *low;
};

template <class T> struct ColumnGramKernel {
    template <int Bytes> static SUBSPAN_INLINE void run(const ColumnGramArgs<T> *a) {
        using C = simd::Columns<T, Bytes>;
        for (int o = 0; o < a->count && a->operands != nullptr; ++o) {
            const auto x = a->operands[o].block_rows(a->first, a->rows);
            T *to = a->z + o * a->k * a->ld;
            switch (a->k) {
            case 1: C::template load<1>(x, to, a->ld); break;
            case 2: C::template load<2>(x, to, a->ld); break;
            case 3: C::template load<3>(x, to, a->ld); break;
            default: C::template load<4>(x, to, a->ld);
            }
        }
        if (a->wanted == nullptr) return;
        const int64_t size = C::padded(a->rows);
        for (int64_t i = 0; i < a->width; ++i) {
            const unsigned pairs = a->wanted[i / a->k];
            for (int64_t j = i; j < a->width;) {
                if (!((pairs >> (j / a->k)) & 1u)) {
                    j += a->k - j % a->k;
                    continue;
                }
                int64_t end = j; // columns in one go
                while (end < a->width && end - j < 4 && ((pairs >> (end / a->k)) & 1u)) ++end;
                double *g = a->g + i * a->ldg + j, *low = a->low == nullptr ? nullptr : a->low + i * a->ldg + j;
                const auto add = [&](int c, double y) SUBSPAN_LAMBDA_INLINE {
                    if (low == nullptr) {
                        g[c] += y;
                        return;
                    }
                    const double x = g[c], s = x + y, z = s - x; // sum and error of the sum, as GramKernel
                    low[c] += (x - (s - z)) + (y - z);
                    g[c] = s;
                };
                const T *p = a->z + j * a->ld, *x = a->z + i * a->ld;
                switch (end - j) {
                case 1: C::template products<1, kChain>(p, a->ld, size, x, add); break;
                case 2: C::template products<2, kChain>(p, a->ld, size, x, add); break;
                case 3: C::template products<3, kChain>(p, a->ld, size, x, add); break;
                default: C::template products<4, kChain>(p, a->ld, size, x, add);
                }
                j = end;
            }
        }
    }
};

template <class T> struct ColumnApplyArgs {
    int64_t k, width, rows, ld, kp;
    const T *z, *w; // w: width x kp
    T *to;          // k columns of work
    const MatrixView<T> *out;
    bool accumulate;
};

template <class T> struct ColumnApplyKernel {
    template <int Bytes, int K> static SUBSPAN_INLINE void of(const ColumnApplyArgs<T> *a) {
        using C = simd::Columns<T, Bytes>;
        using V = Vec<T, Bytes>;
        constexpr int W = V::lanes;
        const int64_t size = C::padded(a->rows);
        if (a->accumulate) C::template load<K>(MatrixView<const T>(*a->out), a->to, a->ld);
        for (int64_t i = 0; i < size; i += W) {
            typename V::type sum[K];
#pragma GCC unroll 4
            for (int c = 0; c < K; ++c) sum[c] = a->accumulate ? V::load(a->to + c * a->ld + i) : typename V::type{};
            for (int64_t d = 0; d < a->width; ++d) {
                const auto x = V::load(a->z + d * a->ld + i);
                const T *w = a->w + d * a->kp;
#pragma GCC unroll 4
                for (int c = 0; c < K; ++c) sum[c] += w[c] * x;
            }
#pragma GCC unroll 4
            for (int c = 0; c < K; ++c) V::store(a->to + c * a->ld + i, sum[c]);
        }
        C::template store<K>(a->to, a->ld, *a->out);
    }
    template <int Bytes> static SUBSPAN_INLINE void run(const ColumnApplyArgs<T> *a) {
        switch (a->k) {
        case 1: return of<Bytes, 1>(a);
        case 2: return of<Bytes, 2>(a);
        case 3: return of<Bytes, 3>(a);
        default: return of<Bytes, 4>(a);
        }
    }
};

// Columns of the coefficients, padded to what apply() runs over: whole vectors, and half a one at the end.
template <class T> int64_t apply_width(int64_t k) {
    const int64_t lanes = isa() == Isa::generic ? 16 / int64_t(sizeof(T)) : (isa() == Isa::avx2 ? 16 : 32) / int64_t(sizeof(T));
    return round_up(k, lanes);
}

} // namespace

template <class T> void copy_matrix(MatrixView<const T> from, MatrixView<T> to) {
    simd::dispatch<CopyKernel<T>, const MatrixView<const T> *, const MatrixView<T> *>(&from, &to);
}

template <class T> void decay_add(MatrixView<T> b, T momentum, MatrixView<const T> g, T weight) {
    simd::dispatch<DecayAddKernel<T>, const MatrixView<T> *, T, const MatrixView<const T> *, T>(&b, momentum, &g, weight);
}

template <class T>
PackedBlock<T>::PackedBlock(Frame &frame, int64_t n, int64_t k, int operands)
    : n_(n), k_(k), width_(operands * k), ld_(round_up(operands * k, 64 / int64_t(sizeof(T)))), kp_(apply_width<T>(k)), operands_(operands),
      columns_(k <= most_columns<T>()) {
    const int64_t budget = (int64_t(512) << 10) / ((columns_ ? width_ + k : ld_) * int64_t(sizeof(T)));
    block_ = std::min(n, std::max<int64_t>(budget / kLeastRows * kLeastRows, kLeastRows));
    whole_ = block_ == n;
    parts_ = std::min((n + block_ - 1) / std::max<int64_t>(block_, 1), kParts);
    // One for each thread, and now: nothing is written yet that a lack of memory would leave half done.
    buffers_ = whole_ ? 1 : std::clamp<int64_t>(num_threads(), 1, parts_);
    z_ = frame.take<T>(buffers_ * room());
    w_ = frame.take<T>(2 * width_ * kp_);
    g_ = frame.take<double>((sizeof(T) == 4 ? 1 : 2) * round_up(width_, 8) * ld_);
}

template <class T> void PackedBlock<T>::ahead(const MatrixView<const T> *next, int count) {
    ahead_ = {};
    for (int a = 0; a < std::min(count, kAheads); ++a) {
        const auto &x = next[a];
        const bool rows = x.col_stride == 1 && x.row_stride == x.cols, cols = x.row_stride == 1 && x.col_stride == x.rows;
        if (!rows && !cols) continue;
        ahead_.data[a] = reinterpret_cast<const char *>(x.data);
        ahead_.bytes[a] = x.rows * x.cols * int64_t(sizeof(T));
    }
}

template <class T> int64_t PackedBlock<T>::room() const { return columns_ ? simd::column_stride(block_) * (width_ + k_) : block_ * ld_; }

template <class T> void PackedBlock<T>::blocks(const Body &body) const {
    const auto run = [&](int64_t part, int64_t first, int64_t end, T *z) {
        for (int64_t r = first; r < end; r += block_) {
            poll();
            body(part, r, std::min(block_, end - r), z);
        }
    };
    if (whole_) return run(0, 0, n_, z_);
    const int64_t all = (n_ + block_ - 1) / block_, each = (all + parts_ - 1) / parts_ * block_;
    std::array<std::atomic<bool>, std::size_t(kParts)> busy{};
    parallel_for(parts_, [&](int64_t p) {
        struct Taken { // the first that is free: a thread alone stays with one, which is in its cache
            std::atomic<bool> *flag;
            ~Taken() { flag->store(false, std::memory_order_release); }
        };
        std::size_t b = 0;
        while (busy[b].exchange(true, std::memory_order_acquire)) b = (b + 1) % std::size_t(buffers_);
        const Taken taken{&busy[b]};
        run(p, std::min(n_, p * each), std::min(n_, (p + 1) * each), z_ + int64_t(b) * room());
    });
}

template <class T> void PackedBlock<T>::pack(const MatrixView<const T> *operands, int64_t first, int64_t rows, T *z) const {
    if (columns_) {
        const ColumnGramArgs<T> args{k_, width_, rows, simd::column_stride(block_), ld_, z, operands, operands_, first, nullptr, nullptr, nullptr};
        return simd::dispatch<ColumnGramKernel<T>, const ColumnGramArgs<T> *>(&args);
    }
    simd::dispatch<PackKernel<T>, const MatrixView<const T> *, int, int64_t, int64_t, T *, int64_t>(operands, operands_, first, rows, z, ld_);
}

template <class T> void PackedBlock<T>::gram(const MatrixView<const T> *operands, const unsigned *wanted) {
    const int64_t items = round_up(width_, 8) * ld_, all = (sizeof(T) == 4 ? 1 : 2) * items;
    const auto low_of = [&](double *g) { return sizeof(T) == 4 ? nullptr : g + items; };
    std::fill_n(g_, all, 0.0);
    Frame frame;
    double *sums = parts_ > 1 ? frame.zeros<double>(parts_ * all) : g_; // of the parts
    blocks([&](int64_t p, int64_t r, int64_t rows, T *z) {
        double *g = sums + p * all;
        if (columns_) {
            const ColumnGramArgs<T> args{k_, width_, rows, simd::column_stride(block_), ld_, z, operands, operands_, r, wanted, g, low_of(g)};
            return simd::dispatch<ColumnGramKernel<T>, const ColumnGramArgs<T> *>(&args);
        }
        pack(operands, r, rows, z);
        const GramArgs<T> args{rows, k_, width_, ld_, z, wanted, g, low_of(g), &ahead_, r, n_};
        simd::dispatch<GramKernel<T>, const GramArgs<T> *>(&args);
    });
    for (int64_t i = 0; i < (parts_ > 1 ? parts_ * all : 0); ++i) g_[i % all] += sums[i];
    if (const double *low = low_of(g_); low != nullptr)
        for (int64_t i = 0; i < items; ++i) g_[i] += low[i];
}

template <class T> void PackedBlock<T>::block(int a, int b, double *out) const {
    const int64_t ld = small::order(k_);
    if (k_ != ld) std::fill_n(out, small::area(k_), 0.0);
    for (int64_t i = 0; i < k_; ++i) {
        // Only what is on or above the diagonal of the whole was summed.
        const double *row = g_ + (a * k_ + i) * ld_ + b * k_;
        const int64_t first = a == b ? i : 0;
        for (int64_t j = first; j < k_; ++j) out[i * ld + j] = row[j];
        for (int64_t j = 0; j < first; ++j) out[i * ld + j] = out[j * ld + i];
    }
}

template <class T> typename PackedBlock<T>::Range PackedBlock<T>::coefficients(const double *const *w, T *to) const {
    const int64_t ld = small::order(k_);
    const bool exact = k_ == ld && kp_ == ld; // no padding on either side
    if (!exact) std::fill_n(to, width_ * kp_, T(0));
    int first = operands_, last = -1;
    for (int a = 0; a < operands_; ++a) {
        if (exact) {
            T *block = to + a * ld * ld;
            for (int64_t i = 0; i < ld * ld; ++i) block[i] = w[a] != nullptr ? T(w[a][i]) : T(0);
        }
        if (w[a] == nullptr) continue;
        first = std::min(first, a);
        last = a;
        for (int64_t i = 0; i < k_ && !exact; ++i)
            for (int64_t j = 0; j < k_; ++j) to[(a * k_ + i) * kp_ + j] = T(w[a][i * ld + j]);
    }
    return {first * k_, (last + 1) * k_};
}

template <class T> void PackedBlock<T>::combine(int64_t first, int64_t rows, T *z, const T *w, Range range, MatrixView<T> out, bool accumulate) {
    if (columns_) {
        const int64_t ld = simd::column_stride(block_);
        const ColumnApplyArgs<T> args{k_,        range.end - range.begin, rows, ld, kp_, z + range.begin * ld, w + range.begin * kp_, z + width_ * ld, &out,
                                      accumulate};
        return simd::dispatch<ColumnApplyKernel<T>, const ColumnApplyArgs<T> *>(&args);
    }
    const int64_t each = ahead_.bytes[kAheads - 1] / n_;
    const ApplyArgs<T> args{
        rows, range.end - range.begin, ld_, kp_, z + range.begin, w + range.begin * kp_, out, accumulate, ahead_.data[kAheads - 1] + first * each, each};
    simd::dispatch<ApplyKernel<T>, const ApplyArgs<T> *>(&args);
}

template <class T> void PackedBlock<T>::apply(const MatrixView<const T> *operands, const double *const *w, MatrixView<T> out, bool accumulate) {
    const Range range = coefficients(w, w_);
    blocks([&](int64_t, int64_t r, int64_t rows, T *z) {
        if (!whole_) pack(operands, r, rows, z);
        combine(r, rows, z, w_, range, out.block_rows(r, rows), accumulate);
    });
}

template <class T>
void PackedBlock<T>::apply2(const MatrixView<const T> *operands, const double *const *w, MatrixView<T> out, const double *const *w2, MatrixView<T> out2) {
    T *second = w_ + width_ * kp_;
    const Range range = coefficients(w, w_), range2 = coefficients(w2, second);
    blocks([&](int64_t, int64_t r, int64_t rows, T *z) {
        if (!whole_) pack(operands, r, rows, z);
        combine(r, rows, z, w_, range, out.block_rows(r, rows), false);
        combine(r, rows, z, second, range2, out2.block_rows(r, rows), false);
    });
}

#define SUBSPAN_INSTANTIATE(T)                                                                                                                                 \
    template void copy_matrix<T>(MatrixView<const T>, MatrixView<T>);                                                                                          \
    template void decay_add<T>(MatrixView<T>, T, MatrixView<const T>, T);                                                                                      \
    template class PackedBlock<T>;
SUBSPAN_INSTANTIATE(float)
SUBSPAN_INSTANTIATE(double)
#undef SUBSPAN_INSTANTIATE

} // namespace subspan
