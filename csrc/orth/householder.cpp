// Products of Householder reflections that the caller gives, and their gradients, through the WY form: a few products
// of matrices instead of a loop over reflections.
#include "subspan/householder.hpp"
#include "subspan/householder_qr.hpp"

#include "base/amax.hpp"
#include "base/scratch.hpp"
#include "base/stacks.hpp"
#include "subspan/errors.hpp"
#include "subspan/gemm.hpp"
#include "subspan/orthonormalize.hpp"
#include "subspan/parallel.hpp"
#include "linalg/column_qr.hpp"
#include "linalg/reflect_columns.hpp"
#include "linalg/wy.hpp"

#include <atomic>
#include <cmath>
#include <limits>
#include <string>

namespace subspan {
namespace {

using std::int64_t;

template <class T> void require_finite(bool check, const StackView<const T> &stack, const char *name) {
    if (check && !all_finite<T>(stack)) throw ValueError(std::string(name) + " holds NaN or infinity");
}

// Sums over the rows of up to eight columns that lie one after the other, and products with a factor of each column: eight rows
// are as many vectors as columns, whatever their number.
constexpr int64_t kSideBySide = 8;

template <class T> struct FewColumnsKernel {
    template <int K> static SUBSPAN_INLINE void squares(int64_t rows, const T *x, double *norm) {
        constexpr int N = 8 * K;
        double sums[N] = {};
        int64_t i = 0;
        for (; i + 8 <= rows; i += 8, x += N)
            for (int e = 0; e < N; ++e) sums[e] += double(x[e]) * double(x[e]);
        for (int e = 0; e < N; ++e) norm[e % K] += sums[e];
        for (; i < rows; ++i, x += K)
            for (int j = 0; j < K; ++j) norm[j] += double(x[j]) * double(x[j]);
    }
    template <int K> static SUBSPAN_INLINE void scaled(int64_t rows, const T *__restrict x, const double *scale, T *__restrict to) {
        constexpr int N = 8 * K;
        double factors[N];
        for (int e = 0; e < N; ++e) factors[e] = scale[e % K];
        int64_t i = 0;
        for (; i + 8 <= rows; i += 8, x += N, to += N)
            for (int e = 0; e < N; ++e) to[e] = T(double(x[e]) * factors[e]);
        for (int64_t e = 0; e < (rows - i) * K; ++e) to[e] = T(double(x[e]) * factors[e]);
    }
    template <int K> static SUBSPAN_INLINE void both(int64_t rows, const T *x, const double *scale, double *norm, T *to) {
        if (to == nullptr)
            squares<K>(rows, x, norm);
        else
            scaled<K>(rows, x, scale, to);
    }
    // To norm, or, with `to`, products there.
    template <int Bytes> static SUBSPAN_INLINE void run(int64_t rows, int64_t k, const T *x, const double *scale, double *norm, T *to) {
        switch (k) {
        case 1: return both<1>(rows, x, scale, norm, to);
        case 2: return both<2>(rows, x, scale, norm, to);
        case 3: return both<3>(rows, x, scale, norm, to);
        case 4: return both<4>(rows, x, scale, norm, to);
        case 5: return both<5>(rows, x, scale, norm, to);
        case 6: return both<6>(rows, x, scale, norm, to);
        case 7: return both<7>(rows, x, scale, norm, to);
        default: return both<8>(rows, x, scale, norm, to);
        }
    }
    static bool takes(const MatrixView<const T> &v) { return v.col_stride == 1 && v.row_stride == v.cols && v.cols >= 1 && v.cols <= kSideBySide; }
    static void dispatch(const MatrixView<const T> &v, const double *scale, double *norm, T *to) {
        simd::dispatch<FewColumnsKernel<T>, int64_t, int64_t, const T *, const double *, double *, T *>(v.rows, v.cols, v.data, scale, norm, to);
    }
};

// Lengths of the columns, safe from overflow and underflow.
template <class T> void column_norms(MatrixView<const T> v, double *norm) {
    std::fill_n(norm, v.cols, 0.0);
    if (FewColumnsKernel<T>::takes(v))
        FewColumnsKernel<T>::dispatch(v, nullptr, norm, nullptr);
    else
        for (int64_t i = 0; i < v.rows; ++i) {
            const T *row = v.data + i * v.row_stride;
            if (v.col_stride == 1)
                for (int64_t j = 0; j < v.cols; ++j) norm[j] += double(row[j]) * double(row[j]);
            else
                for (int64_t j = 0; j < v.cols; ++j) norm[j] += double(v(i, j)) * double(v(i, j));
        }
    for (int64_t j = 0; j < v.cols; ++j) {
        if (norm[j] > 1e-280 && norm[j] < 1e280) {
            norm[j] = std::sqrt(norm[j]);
            continue;
        }
        double top = 0, sum = 0;
        for (int64_t i = 0; i < v.rows; ++i) top = std::max(top, std::abs(double(v(i, j))));
        if (top > 0)
            for (int64_t i = 0; i < v.rows; ++i) sum += (double(v(i, j)) / top) * (double(v(i, j)) / top);
        norm[j] = top * std::sqrt(sum);
    }
}

// One set of reflections, ready for products: V as given, or with columns of length one.
template <class T> struct Prepared {
    MatrixView<const T> v;
    const T *tau = nullptr;
    double *norm = nullptr; // of the given columns, for unit reflections

    Prepared(Frame &frame, const Reflections<T> &h, int64_t item) {
        const MatrixView<const T> given = h.v[item];
        const int64_t m = given.rows, k = given.cols;
        T *t = frame.take<T>(k);
        tau = t;
        if (h.tau != nullptr) {
            const auto row = (*h.tau)[item];
            for (int64_t j = 0; j < k; ++j) t[j] = row(0, j);
            v = given;
            return;
        }
        norm = frame.take<double>(k);
        column_norms(given, norm);
        double *scale = frame.take<double>(k);
        for (int64_t j = 0; j < k; ++j) {
            t[j] = norm[j] > 0 ? T(2) : T(0);
            scale[j] = norm[j] > 0 ? 1.0 / norm[j] : 0.0;
        }
        T *unit = frame.take<T>(m * k);
        // Lengths beyond the largest number, and those near the least, which have few digits.
        const auto odd = [](double x) { return x != 0.0 && !(x > 1e-290 && x <= std::numeric_limits<double>::max()); };
        const bool plain = std::none_of(norm, norm + k, odd);
        if (plain && FewColumnsKernel<T>::takes(given))
            FewColumnsKernel<T>::dispatch(given, scale, nullptr, unit);
        else if (plain && given.col_stride == 1)
            for (int64_t i = 0; i < m; ++i) {
                const T *row = given.data + i * given.row_stride;
                T *to = unit + i * k;
                for (int64_t j = 0; j < k; ++j) to[j] = T(double(row[j]) * scale[j]);
            }
        else
            for (int64_t i = 0; i < m; ++i)
                for (int64_t j = 0; j < k; ++j) unit[i * k + j] = T(double(given(i, j)) * scale[j]);
        for (int64_t j = 0; j < k && !plain; ++j) {
            if (!odd(norm[j])) continue;
            // By a power of two first, which loses nothing.
            const double most = double(max_abs(given.block_cols(j, 1)));
            int e = 0;
            std::frexp(most, &e);
            double squares = 0;
            for (int64_t i = 0; i < m; ++i) {
                const double x = std::ldexp(double(given(i, j)), -e);
                squares += x * x;
            }
            for (int64_t i = 0; i < m; ++i) unit[i * k + j] = T(std::ldexp(double(given(i, j)), -e) / std::sqrt(squares));
        }
        v = {unit, m, k};
    }
};

template <class T> void negate(T *x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) x[i] = -x[i];
}

// T for all reflections of a set.
template <class T> T *whole_triangle(Frame &frame, const Prepared<T> &p) {
    const int64_t k = p.v.cols;
    T *t = frame.take<T>(k * k);
    wy_products(p.v, t, k);
    wy_triangle(k, p.tau, t, k);
    return t;
}

template <class T> void product(MatrixView<const T> a, MatrixView<const T> b, T *c, bool accumulate = false) {
    gemm<T>(a, b, MatrixView<T>(c, a.rows, b.cols), accumulate);
}

// out = T X, or TᵀX, for an upper triangular T: half of the products of a full one.
template <class T> void triangle_product(MatrixView<const T> t, bool transpose, MatrixView<const T> x, T *out) {
    constexpr int64_t kStep = 128;
    const int64_t k = t.rows;
    for (int64_t i = 0; i < k; i += kStep) {
        const int64_t rows = std::min(kStep, k - i);
        const MatrixView<T> to(out + i * x.cols, rows, x.cols);
        if (transpose)
            gemm<T>(t.block_rows(0, i + rows).block_cols(i, rows).transposed(), x.block_rows(0, i + rows), to);
        else
            gemm<T>(t.block_rows(i, rows).block_cols(i, k - i), x.block_rows(i, k - i), to);
    }
}

// From dT (k x k): the symmetric part that V multiplies, and dtau. T = (I + D S)⁻¹ D gives
// dS = -Tᵀ dT Tᵀ (strict upper part) and dtau_i = [(I - T S)ᵀ dT (I - S T)ᵀ]_ii: nothing is divided by tau.
template <class T> void triangle_backward(int64_t k, const T *t, const T *s, const T *dt, T *symmetric, T *dtau) {
    const MatrixView<const T> tm(t, k, k), dm(dt, k, k);
    Frame frame;
    T *x = frame.take<T>(k * k);
    triangle_product<T>(tm, true, dm, x);
    constexpr int64_t kStep = 128;
    for (int64_t i = 0; i < k; i += kStep) { // the upper triangle of (Tᵀ dT) Tᵀ, by block columns
        const int64_t cols = std::min(kStep, k - i);
        gemm<T>(MatrixView<const T>(x, k, k).block_rows(0, i + cols).block_cols(i, k - i), tm.block_rows(i, cols).block_cols(i, k - i).transposed(),
                MatrixView<T>(symmetric + i, i + cols, cols, k, 1));
    }
    for (int64_t i = 0; i < k; ++i) {
        symmetric[i * k + i] = T(0);
        for (int64_t j = i + 1; j < k; ++j) symmetric[i * k + j] = symmetric[j * k + i] = -symmetric[i * k + j];
    }
    if (dtau == nullptr) return;
    const MatrixView<const T> sm(s, k, k);
    T *left = frame.take<T>(k * k), *right = frame.take<T>(k * k);
    product<T>(tm, sm, left);
    product<T>(sm, tm, right);
    negate(left, k * k);
    negate(right, k * k);
    for (int64_t i = 0; i < k; ++i) {
        left[i * k + i] += T(1);
        right[i * k + i] += T(1);
    }
    product<T>(MatrixView<const T>(left, k, k).transposed(), dm, x);
    for (int64_t i = 0; i < k; ++i) {
        double sum = 0;
        for (int64_t b = 0; b < k; ++b) sum += double(x[i * k + b]) * double(right[i * k + b]);
        dtau[i] += T(sum);
    }
}

// From the gradient of a unit column to that of the given one: g <- (g - v (v · g)) / length, zero for a zero column.
template <class T> void unit_backward(const Prepared<T> &p, MatrixView<T> g) {
    const int64_t m = g.rows, k = g.cols;
    Frame frame;
    double *dot = frame.zeros<double>(k), *divisor = frame.take<double>(k);
    const auto row = [](auto &m_, int64_t i) { return m_.data + i * m_.row_stride; }; // both have contiguous rows
    for (int64_t i = 0; i < m; ++i) {
        const T *v = row(p.v, i), *x = row(g, i);
        for (int64_t j = 0; j < k; ++j) dot[j] += double(v[j]) * double(x[j]);
    }
    for (int64_t j = 0; j < k; ++j) divisor[j] = p.norm[j] > 0 ? p.norm[j] : std::numeric_limits<double>::infinity();
    for (int64_t i = 0; i < m; ++i) {
        const T *v = row(p.v, i);
        T *x = row(g, i);
        for (int64_t j = 0; j < k; ++j) x[j] = T((double(x[j]) - double(v[j]) * dot[j]) / divisor[j]);
    }
}

template <class T>
bool reflected_few(const Reflections<T> &h, int64_t item, const StackView<const T> &c, Side side, bool transpose, const StackView<T> &out, bool check) {
    Frame frame;
    FewReflections<T> r;
    r.v = h.v[item];
    r.ascending = (side == Side::left) == transpose;
    if (h.tau != nullptr) {
        T *tau = frame.take<T>(r.v.cols);
        const auto row = (*h.tau)[item];
        for (int64_t j = 0; j < r.v.cols; ++j) tau[j] = row(0, j);
        r.tau = tau;
    }
    return reflect_few(r, c, side == Side::left, out, check);
}

// Calls body(item) for every item, on the library's threads when there are enough of them.
void for_items(int64_t items, const std::function<void(int64_t)> &body) {
    if (items > 1) return parallel_for(items, body);
    for (int64_t i = 0; i < items; ++i) body(i);
}

} // namespace

template <class T>
void householder_apply(const Reflections<T> &h, const StackView<const T> &c, Side side, bool transpose, const StackView<T> &out, bool check) {
    const int64_t m = h.v.rows(), k = h.v.cols(), items = c.size();
    if ((side == Side::left ? c.rows() : c.cols()) != m)
        throw ValueError("V must have as many rows as C has " + std::string(side == Side::left ? "rows" : "columns"));
    // Sets of reflections that the whole stack shares are prepared once; C is then taken in one call.
    const bool one_set = shared(h.v) && (h.tau == nullptr || shared(*h.tau));
    if (one_set && items > 0 && reflected_few(h, 0, c, side, transpose, out, check)) return;
    if (check) {
        require_finite(check, h.v, "V");
        if (h.tau != nullptr) require_finite(check, *h.tau, "tau");
        if (c.first.data == out.first.data && k > 8) require_finite(check, c, "C");
    }
    const auto run = [&](int64_t item, const StackView<const T> &cs, const StackView<T> &os) {
        if (!one_set && reflected_few(h, item, cs, side, transpose, os, check)) return;
        Frame frame;
        const Prepared<T> p(frame, h, item);
        // T costs m times the block's width for each reflection, and C as many columns: of a few, small blocks.
        const int64_t across = cs.size() * (side == Side::left ? cs.cols() : cs.rows());
        const int64_t width = std::clamp<int64_t>((across / 2 + 7) / 8 * 8, 32, kReflectionBlock);
        const int64_t blocks = (k + width - 1) / width;
        const bool ascending = (side == Side::left) == transpose;
        if (blocks == 0) return apply_core<T>(cs, p.v, Core<T>(), T(1), side, os, check);
        for (int64_t b = 0; b < blocks; ++b) {
            const int64_t at = (ascending ? b : blocks - 1 - b) * width, w = std::min(width, k - at);
            Frame inner;
            Prepared<T> part = p;
            part.v = p.v.block_cols(at, w);
            part.tau = p.tau + at;
            T *t = whole_triangle(inner, part);
            negate(t, w * w);
            const MatrixView<const T> tm(t, w, w);
            // The core is the same for every matrix: it is broadcast.
            StackView<const T> core(transpose ? tm.transposed() : tm, cs.shape, std::vector<int64_t>(cs.shape.size(), 0));
            StackView<const T> basis(part.v, cs.shape, std::vector<int64_t>(cs.shape.size(), 0));
            const StackView<const T> from = b == 0 ? cs : StackView<const T>(os);
            apply_core<T>(from, basis, Core<T>::full(core), T(1), side, os, check && b == 0);
        }
    };
    if (one_set) return items == 0 ? void() : run(0, c, out);
    if (check && c.first.data == out.first.data) require_finite(check, c, "C"); // before any matrix is written
    for_items(items, [&](int64_t i) { run(i, StackView<const T>(c[i]), StackView<T>(out[i])); });
}

template <class T>
void householder_apply_backward(const Reflections<T> &h, const StackView<const T> &c, const StackView<const T> &grad, Side side, bool transpose,
                                const StackView<T> &dv, const StackView<T> *dtau, const StackView<T> &dc, bool check) {
    const int64_t m = h.v.rows(), k = h.v.cols(), items = c.size();
    if ((side == Side::left ? c.rows() : c.cols()) != m)
        throw ValueError("V must have as many rows as C has " + std::string(side == Side::left ? "rows" : "columns"));
    // One set of reflections on rows: the rows of all matrices are those of one.
    if (side == Side::right && items > 0 && !c.shape.empty() && shared(h.v) && (h.tau == nullptr || shared(*h.tau))) {
        auto cs = c, gs = grad;
        auto ds = dc;
        if (merge_axes(cs) && merge_axes(gs) && merge_axes(ds)) {
            Reflections<T> one{StackView<const T>(h.v.first)};
            const StackView<const T> tau = h.tau != nullptr ? StackView<const T>(h.tau->first) : StackView<const T>();
            if (h.tau != nullptr) one.tau = &tau;
            const StackView<T> dtau_one = dtau != nullptr ? StackView<T>(dtau->first) : StackView<T>();
            return householder_apply_backward<T>(one, cs, gs, side, transpose, StackView<T>(dv.first), dtau != nullptr ? &dtau_one : nullptr, ds, check);
        }
    }
    require_finite(check, h.v, "V");
    if (h.tau != nullptr) require_finite(check, *h.tau, "tau");
    require_finite(check, c, "C");
    require_finite(check, grad, "grad");
    // Y = C - V T VᵀC for the left form; the right form is the left one of the transposes with T transposed.
    const bool plain = (side == Side::left) != transpose;
    // Everything that shares one V is summed before it goes back to V, so groups are what runs in parallel.
    if (dv.empty()) {
        for (int64_t i = 0; i < (dc.empty() ? 0 : items); ++i)
            for (int64_t p = 0; p < dc.rows(); ++p)
                for (int64_t q = 0; q < dc.cols(); ++q) dc[i](p, q) = grad[i](p, q);
        return;
    }
    std::vector<int64_t> leaders;
    for (int64_t i = 0; i < items; ++i)
        if (first_of_its_kind(dv, i)) leaders.push_back(i);
    const bool alone = int64_t(leaders.size()) == items;
    const auto group = [&](int64_t leader) {
        Frame frame;
        const Prepared<T> p(frame, h, leader);
        T *s = frame.zeros<T>(k * k), *t = frame.take<T>(k * k), *dt = frame.zeros<T>(k * k);
        wy_products(p.v, s, k);
        std::copy_n(s, k * k, t);
        wy_triangle(k, p.tau, t, k);
        const MatrixView<const T> tm(t, k, k);
        const MatrixView<const T> forward = plain ? tm : tm.transposed();
        MatrixView<T> g = dv[leader];
        for (int64_t i = 0; i < m; ++i) std::fill_n(&g(i, 0), k, T(0));
        const auto target = dv[leader].data;
        T *core = frame.take<T>(k * k);
        std::copy_n(t, k * k, core);
        negate(core, k * k);
        const MatrixView<const T> cm(core, k, k);
        for (int64_t i = leader; i < items; ++i) {
            if (dv[i].data != target) {
                if (alone) break;
                continue;
            }
            Frame inner;
            const auto ci = side == Side::left ? c[i] : c[i].transposed();
            const auto gi = side == Side::left ? grad[i] : grad[i].transposed();
            const int64_t n = ci.cols;
            T *w = inner.take<T>(k * n), *q = inner.take<T>(k * n), *x = inner.take<T>(k * n);
            product<T>(p.v.transposed(), ci, w);
            product<T>(p.v.transposed(), gi, q);
            product<T>(forward, MatrixView<const T>(w, k, n), x);
            negate(x, k * n);
            gemm<T>(gi, MatrixView<const T>(x, k, n).transposed(), g, true);
            product<T>(forward.transposed(), MatrixView<const T>(q, k, n), x);
            negate(x, k * n);
            gemm<T>(ci, MatrixView<const T>(x, k, n).transposed(), g, true);
            negate(q, k * n);
            if (plain) // dT = -P Wᵀ, of Tᵀ its transpose
                product<T>(MatrixView<const T>(q, k, n), MatrixView<const T>(w, k, n).transposed(), dt, true);
            else
                product<T>(MatrixView<const T>(w, k, n), MatrixView<const T>(q, k, n).transposed(), dt, true);
            apply_core<T>(StackView<const T>(grad[i]), p.v, Core<T>::full(transpose ? cm : cm.transposed()), T(1), side, StackView<T>(dc[i]), false);
        }
        T *symmetric = frame.take<T>(k * k), *dtau_here = dtau != nullptr ? frame.zeros<T>(k) : nullptr;
        triangle_backward(k, t, s, dt, symmetric, dtau_here);
        gemm<T>(p.v, MatrixView<const T>(symmetric, k, k), g, true);
        if (h.tau == nullptr) unit_backward(p, g);
        if (dtau != nullptr) {
            const auto row = (*dtau)[leader];
            for (int64_t j = 0; j < k; ++j) row(0, j) = dtau_here[j];
        }
    };
    for_items(int64_t(leaders.size()), [&](int64_t l) { group(leaders[std::size_t(l)]); });
}

template <class T> void householder_product(const Reflections<T> &h, const StackView<T> &q, bool check) {
    const int64_t m = h.v.rows(), k = h.v.cols(), cols = std::min(m, k);
    if (q.rows() != m || q.cols() != cols) throw ValueError("householder_product: Q must be m x min(m, k)");
    require_finite(check, h.v, "V");
    if (h.tau != nullptr) require_finite(check, *h.tau, "tau");
    if (q.empty()) return;
    // Several items to a task, where one is over before a task is handed out.
    const int64_t items = q.size(), group = std::clamp<int64_t>(int64_t(2e5 / (double(m) * double(k) * double(k + 4))), 1, (items + 7) / 8);
    double identity[kFewColumns * kFewColumns] = {};
    for (int64_t i = 0; i < k && k <= kFewColumns; ++i) identity[i * k + i] = 1.0;
    const auto one = [&](int64_t item) {
        Frame frame;
        const Prepared<T> p(frame, h, item);
        if (k <= kFewColumns && k <= m) {
            ColumnQr<T> qr;
            qr.a = p.v;
            qr.columns = frame.take<T>(column_qr_room<T>(m, k));
            column_reflections(qr, p.tau);
            return column_q<T>(qr, identity, q[item]);
        }
        const MatrixView<const T> t(whole_triangle(frame, p), k, k);
        if (k <= 16 && k <= m && p.v.col_stride == 1 && q.first.col_stride == 1)
            return factored_array<T>(StackView<const T>(p.v), StackView<const T>(t), StackView<T>(q[item]));
        T *w = frame.take<T>(k * cols);
        triangle_product<T>(t, false, p.v.block_rows(0, cols).transposed(), w);
        negate(w, k * cols);
        const auto out = q[item];
        gemm<T>(p.v, MatrixView<const T>(w, k, cols), out);
        for (int64_t i = 0; i < cols; ++i) out(i, i) += T(1);
    };
    for_items((items + group - 1) / group, [&](int64_t g) {
        for (int64_t i = g * group; i < std::min(items, (g + 1) * group); ++i) one(i);
    });
}

template <class T>
void householder_product_backward(const Reflections<T> &h, const StackView<const T> &grad, const StackView<T> &dv, const StackView<T> *dtau, bool check) {
    const int64_t m = h.v.rows(), k = h.v.cols(), cols = std::min(m, k);
    if (grad.rows() != m || grad.cols() != cols) throw ValueError("grad must have the shape of the product");
    require_finite(check, h.v, "V");
    if (h.tau != nullptr) require_finite(check, *h.tau, "tau");
    require_finite(check, grad, "grad");
    if (dv.empty()) return;
    for_items(grad.size(), [&](int64_t item) {
        Frame frame;
        const Prepared<T> p(frame, h, item);
        T *s = frame.zeros<T>(k * k), *t = frame.take<T>(k * k);
        wy_products(p.v, s, k);
        std::copy_n(s, k * k, t);
        wy_triangle(k, p.tau, t, k);
        const MatrixView<const T> tm(t, k, k), top = p.v.block_rows(0, cols), gq = grad[item];
        // The product is H applied to the first columns of the identity, so W = VᵀC is the top of V, transposed.
        T *q = frame.take<T>(k * cols), *x = frame.take<T>(k * cols), *dt = frame.take<T>(k * k);
        const MatrixView<T> g = dv[item];
        product<T>(p.v.transposed(), gq, q);
        triangle_product<T>(tm, false, top.transposed(), x);
        negate(x, k * cols);
        gemm<T>(gq, MatrixView<const T>(x, k, cols).transposed(), g);
        negate(q, k * cols);
        const MatrixView<const T> qm(q, k, cols);
        triangle_product<T>(tm, true, qm, x);
        for (int64_t i = 0; i < cols; ++i)
            for (int64_t j = 0; j < k; ++j) g(i, j) += x[j * cols + i];
        product<T>(qm, top, dt);
        T *symmetric = frame.take<T>(k * k), *dtau_here = dtau != nullptr ? frame.zeros<T>(k) : nullptr;
        triangle_backward(k, t, s, dt, symmetric, dtau_here);
        gemm<T>(p.v, MatrixView<const T>(symmetric, k, k), g, true);
        if (h.tau == nullptr) unit_backward(p, g);
        if (dtau != nullptr) {
            const auto row = (*dtau)[item];
            for (int64_t j = 0; j < k; ++j) row(0, j) = dtau_here[j];
        }
    });
}

#define SUBSPAN_INSTANTIATE(T)                                                                                                                                 \
    template void householder_apply<T>(const Reflections<T> &, const StackView<const T> &, Side, bool, const StackView<T> &, bool);                            \
    template void householder_apply_backward<T>(const Reflections<T> &, const StackView<const T> &, const StackView<const T> &, Side, bool,                    \
                                                const StackView<T> &, const StackView<T> *, const StackView<T> &, bool);                                       \
    template void householder_product<T>(const Reflections<T> &, const StackView<T> &, bool);                                                                  \
    template void householder_product_backward<T>(const Reflections<T> &, const StackView<const T> &, const StackView<T> &, const StackView<T> *, bool);
SUBSPAN_INSTANTIATE(float)
SUBSPAN_INSTANTIATE(double)
#undef SUBSPAN_INSTANTIATE

} // namespace subspan
