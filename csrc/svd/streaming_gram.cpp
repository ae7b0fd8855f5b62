// One update: with A = [S V; B] (rows of the state, then the block), find the k leading right singular vectors of A.
//
// The Gram matrix of [V; B] is measured in full at each update, V Vᵀ included. So the state is represented exactly by
// (S, V) even where V has drifted from orthonormal, drift cannot build up, and the two products with V are one pass.
//
//   gram         H = D [V; B][V; B]ᵀ D, D = diag(S, 1); H = W L Wᵀ; V' = L^-1/2 Wᵀ D [V; B]. Squares the condition
//                number: taken where the measured L_k / L_1 is far enough above eps.
//   robust       C = B Vᵀ, R = B - C V, second pass C2 = R Vᵀ folded into the final rotation, Cholesky of the Gram
//                matrix of R, and the SVD of the inner K = [[S, 0], [C, L]] in double. Nothing is squared that matters.
//   tall         More rows than columns: QR of A by pieces, and the SVD of its n x n factor. Nothing is squared either.
//   householder  LAPACK's QR of all of Aᵀ. For first blocks and for blocks so much larger than the k-th singular
//                value that the Gram matrix of R no longer resolves it.
#include "base/amax.hpp"
#include "linalg/sparse.hpp"
#include "svd/streaming_impl.hpp"
#include "subspan/eigh.hpp"
#include "subspan/factor.hpp"
#include "subspan/gemm.hpp"

#include <algorithm>

namespace subspan {

template <class T> bool StreamingSvd<T>::Impl::decompose(Work &w, const double *block_mean, std::int64_t most) {
    if (is_tall(w.m)) {
        tall(w);
        return true;
    }
    // Products of a sparse block pay off up to a tenth of nonzeros; past that it is dense with detours.
    bool sparse = is_sparse(w.rows);
    const bool large = most > 0 && w.rows.count() > most, may = opt.method == SvdMethod::gram || opt.method == SvdMethod::automatic;
    if (large && !(sparse && may && (opt.method == SvdMethod::gram || gram_may_work(w)))) return false;
    Frame frame;
    double *g = frame.take<double>(w.m * w.m);
    w.g = g;
    const Rows<T> &x = w.rows;
    Buffer<T> copy;
    Rows<T> dense = x;
    if (sparse) {
        sparse_gram(v.data(), w.r, x, block_mean, copy.reserve(n * std::max(w.r, keep)), g);
        if (x.shift != nullptr && cancels(w, block_mean)) { // the mean dominates: take it off before multiplying
            if (large) return false;
            sparse = false;
            densify(w, dense, copy);
            gram(blocks(w.r, dense), 0, g);
        }
    } else {
        if (x.csr != nullptr) densify(w, dense, copy);
        gram(blocks(w.r, dense), 0, g);
    }
    if (large) return scaled_well(w) && gram_route(w, dense, sparse, most);
    if (!scaled_well(w)) {
        // Squares overflowed or vanished, or the input is not finite.
        require_finite(x, "rows");
        rescale(w, dense, copy, frame);
        gram(blocks(w.r, dense), 0, g);
        for (std::int64_t i = 0; i < w.m; ++i)
            if (!std::isfinite(g[i * w.m + i])) throw ValueError("rows: the squared norm of row " + str(i - w.r) + " overflows; scale the data");
        if (opt.method == SvdMethod::gram || !robust(w, dense)) householder(w, dense);
        return true;
    }
    if (opt.method == SvdMethod::gram || (may && gram_may_work(w))) {
        if (gram_route(w, dense, sparse, w.m)) return true;
        // A small problem solved in vain: not again at once, unless only rows were too few for all directions.
        if (w.m > keep + 1) skip_gram = 8;
    }
    if (sparse) densify(w, dense, copy);
    if (!robust(w, dense)) householder(w, dense);
    return true;
}

template <class T> bool StreamingSvd<T>::Impl::cancels(const Work &w, const double *block_mean) const {
    double mm = 0, centred = 0;
    for (std::int64_t j = 0; j < n; ++j) mm += block_mean[j] * block_mean[j];
    const std::int64_t b = w.rows.count();
    for (std::int64_t i = w.r; i < w.r + b; ++i) centred += w.g[i * w.m + i];
    // Rows minus their mean are added up in T where V is rotated: its rounding is that of the mean, ten times that of the rows.
    return mm * double(b) > 100.0 * centred;
}

template <class T> void StreamingSvd<T>::Impl::densify(const Work &w, Rows<T> &dense, Buffer<T> &copy) const {
    Rows<T> plain = w.rows;
    plain.weight = nullptr;
    plain.extra = nullptr;
    materialise(plain, copy.reserve(plain.count() * n));
    dense = w.rows;
    dense.csr = nullptr;
    dense.shift = dense.shift_low = nullptr;
    dense.dense = MatrixView<const T>(copy.data(), plain.count(), n);
}

template <class T> bool StreamingSvd<T>::Impl::scaled_well(const Work &w) const {
    const double tiny = std::is_same_v<T, float> ? 1e-24 : 1e-250;
    double most = 0;
    for (std::int64_t i = w.r; i < w.m; ++i) {
        const double d = w.g[i * w.m + i];
        if (!std::isfinite(d)) return false;
        most = std::max(most, d);
    }
    if (most == 0.0 ? !block_is_zero(w) : most <= tiny) return false;
    double top = 0; // and the squares with the state's scale stay within double
    for (std::int64_t i = 0; i < w.m; ++i) top = std::max(top, w.scale[std::size_t(i)] * w.scale[std::size_t(i)] * w.g[i * w.m + i]);
    return (top > 1e-250 && top < 1e250) || (w.r == 0 && most == 0.0);
}

template <class T> bool StreamingSvd<T>::Impl::block_is_zero(const Work &w) const {
    const Rows<T> &x = w.rows;
    if (x.shift != nullptr || x.extra != nullptr) return false;
    for (std::int64_t i = 0; i < x.count(); ++i) {
        if (x.csr != nullptr) {
            for (std::int64_t p = x.csr->begin(i); p < x.csr->begin(i + 1); ++p)
                if (x.csr->values[p] != T(0)) return false;
        } else {
            for (std::int64_t j = 0; j < n; ++j)
                if (x.dense(i, j) != T(0)) return false;
        }
    }
    return true;
}

template <class T> void StreamingSvd<T>::Impl::rescale(Work &w, Rows<T> &dense, Buffer<T> &copy, Frame &frame) const {
    Rows<T> plain = w.rows;
    plain.weight = nullptr;
    const std::int64_t count = w.b * n;
    Buffer<T> fresh(count);
    materialise(plain, fresh.data());
    T most = 0;
    for (std::int64_t i = 0; i < count; ++i) most = std::max(most, T(std::abs(fresh.data()[i])));
    if (!std::isfinite(most)) throw ValueError("rows: centring overflows the dtype's range; scale the data");
    const int e = near_exponent(most);
    for (std::int64_t i = 0; i < count; ++i) fresh.data()[i] = std::ldexp(fresh.data()[i], -e);
    copy = std::move(fresh);
    double *weight_all = frame.take<double>(w.b);
    for (std::int64_t i = w.r; i < w.m; ++i) w.scale[std::size_t(i)] *= std::ldexp(1.0, e);
    in_units(w, *std::max_element(w.scale.begin(), w.scale.end()));
    std::copy(w.scale.begin() + w.r, w.scale.end(), weight_all);
    dense = Rows<T>{};
    dense.dense = MatrixView<const T>(copy.data(), w.b, n);
    dense.weight = weight_all;
}

template <class T> void StreamingSvd<T>::Impl::in_units(Work &w, double largest) {
    const int e = near_exponent(largest);
    w.unit = std::ldexp(1.0, e);
    for (double &x : w.scale) x = std::ldexp(x, -e);
    w.dropped = w.dropped / w.unit / w.unit;
}

template <class T> bool StreamingSvd<T>::Impl::gram_may_work(const Work &w) {
    if (w.r == 0) return true;
    if (skip_gram > 0) {
        --skip_gram;
        return false;
    }
    if (w.r < keep) return w.m > keep;
    const double ratio = s[std::size_t(r) - 1] / s[0];
    return ratio * kSpread >= 0.5; // near the limit: the new inner decides
}

template <class T> bool StreamingSvd<T>::Impl::gram_route(Work &w, const Rows<T> &dense, bool sparse, std::int64_t most) {
    Frame frame;
    const std::int64_t m = w.m, k = std::min(keep, std::min(m, n));
    double *h = frame.take<double>(m * m), *l = frame.take<double>(k);
    T *vec = frame.take<T>(k * m);
    double total = 0;
    for (std::int64_t i = 0; i < m; ++i) {
        for (std::int64_t j = 0; j <= i; ++j) h[i * m + j] = w.g[i * m + j] * w.scale[std::size_t(i)] * w.scale[std::size_t(j)];
        total += h[i * m + i];
    }
    if (w.b > most)
        compress(m, w.r, most / 2, k, h, l, vec);
    else
        eigh_top<T>(m, k, h, l, vec);
    if (total == 0.0) { // rows of zeros on an empty state
        commit_nothing(w);
        return true;
    }
    const bool forced = opt.method == SvdMethod::gram;
    Selected sel = select(l, k, total, w.dropped);
    if (forced) { // rounding of the squares hides what is below
        while (sel.rank > 0 && l[sel.rank - 1] < double(m) * eps * l[0]) --sel.rank;
        double kept = 0;
        for (std::int64_t i = 0; i < sel.rank; ++i) kept += l[i];
        sel.dropped = w.dropped + std::max(0.0, total - kept);
    } else if (sel.rank == 0 || l[sel.rank - 1] * kSpread * kSpread < l[0] ||
               // what was not kept must have been cut by the rank, not by rounding
               sel.rank < keep) {
        return false;
    }
    require_representable(w, l, sel.rank);
    const std::int64_t kept = sel.rank;
    T *rot = frame.take<T>(kept * m);
    double *wide = frame.take<double>(m);
    auto *partner = frame.take<std::int64_t>(kept);
    std::vector<double> sigma(static_cast<std::size_t>(kept));
    for (std::int64_t i = 0; i < kept; ++i) {
        const double si = std::sqrt(l[i]);
        sigma[std::size_t(i)] = si;
        double length = 0; // vectors in float are unit to its precision
        for (std::int64_t j = 0; j < m; ++j) {
            wide[j] = double(vec[i * m + j]);
            length += wide[j] * wide[j];
        }
        length = std::sqrt(length);
        for (std::int64_t j = 0; j < m; ++j) wide[j] /= length;
        // <v'_i, v_j> = s'_i W_ij / s_j
        relative(m, wide, w.scale.data(), si, closest(w.r, [&](std::int64_t j) { return wide[j] / w.scale[std::size_t(j)]; }), partner + i, rot + i * m);
    }
    if (sparse) {
        rotate(kept, partner, w.r, [&](const StripTaker<T> &take) { sparse_combine<T>(rot, kept, v.data(), w.r, w.rows, take); });
        route = "sparse";
    } else {
        rotate(kept, partner, rot, blocks(w.r, dense));
        route = "gram";
    }
    commit(w, std::move(sigma), w.r == 0, sel.dropped);
    return true;
}

template <class T>
void StreamingSvd<T>::Impl::compress(std::int64_t m, std::int64_t held, std::int64_t piece, std::int64_t k, const double *h, double *l, T *vec) const {
    Frame frame;
    const std::int64_t wide = std::max(k, held) + piece;
    // Rows of w: the directions so far, in coordinates of the first `done` rows.
    double *w = frame.take<double>(k * m), *next = frame.take<double>(k * m), *across = frame.take<double>(k * piece);
    double *inner = frame.take<double>(wide * wide), *turn = frame.take<double>(k * wide);
    T *vectors = frame.take<T>(k * wide);
    std::int64_t kept = 0;
    for (std::int64_t done = 0; done < m;) {
        const std::int64_t count = std::min(done == 0 ? held + piece : piece, m - done), size = kept + count, top = std::min(k, size);
        const MatrixView<const double> so_far(w, kept, done, m, 1);
        if (kept > 0) gemm<double>(so_far, MatrixView<const double>(h + done * m, count, done, m, 1).transposed(), MatrixView<double>(across, kept, count));
        for (std::int64_t i = 0; i < kept; ++i)
            for (std::int64_t j = 0; j <= i; ++j) inner[i * size + j] = i == j ? l[i] : 0.0;
        for (std::int64_t i = 0; i < count; ++i) {
            double *row = inner + (kept + i) * size;
            for (std::int64_t j = 0; j < kept; ++j) row[j] = across[j * count + i];
            std::copy_n(h + (done + i) * m + done, i + 1, row + kept);
        }
        eigh_top<T>(size, top, inner, l, vectors);
        for (std::int64_t i = 0; i < top * size; ++i) turn[i] = double(vectors[i]);
        if (kept > 0) gemm<double>(MatrixView<const double>(turn, top, kept, size, 1), so_far, MatrixView<double>(next, top, done, m, 1));
        for (std::int64_t i = 0; i < top; ++i) std::copy_n(turn + i * size + kept, count, next + i * m + done);
        std::swap(w, next);
        kept = top;
        done += count;
    }
    for (std::int64_t i = 0; i < k * m; ++i) vec[i] = T(w[i]);
}

template <class T> void StreamingSvd<T>::Impl::commit(const Work &w, std::vector<double> &&sigma, bool first, double left_out) {
    s = std::move(sigma);
    for (double &x : s) x *= w.unit;
    while (!s.empty() && s.back() == 0.0) s.pop_back(); // forgotten until nothing is left
    r = std::int64_t(s.size());
    dropped = std::min(left_out * w.unit * w.unit, std::numeric_limits<double>::max());
    clean = shown.valid = false;
    if (first || opt.exact_blocks || opt.canonical_signs) canonical_signs();
}

template <class T> void StreamingSvd<T>::Impl::commit_nothing(const Work &w) {
    s.clear();
    r = 0;
    clean = true;
    dropped = w.dropped * w.unit * w.unit;
}

template <class T>
void StreamingSvd<T>::Impl::inner_svd(std::int64_t rows, std::int64_t cols, const double *inner, std::int64_t k, double *sigma, double *y) const {
    Frame frame;
    double largest = 0;
    for (std::int64_t i = 0; i < rows * cols; ++i) largest = std::max(largest, std::abs(inner[i]));
    if (!std::isfinite(largest)) throw LinAlgError("the rows' decomposition overflows; scale the data");
    if (largest > 0 && (largest < 1e-120 || largest > 1e120)) { // squares must stay in range
        const int e = near_exponent(largest);
        double *near = frame.take<double>(rows * cols);
        for (std::int64_t i = 0; i < rows * cols; ++i) near[i] = std::ldexp(inner[i], -e);
        inner_svd(rows, cols, near, k, sigma, y);
        for (std::int64_t i = 0; i < k; ++i) sigma[i] = std::ldexp(sigma[i], e);
        return;
    }
    const bool expect_wide = !s.empty() && s.back() * kSpread < 0.5 * s.front();
    if (std::is_same_v<T, float> || !expect_wide) {
        double *ct = frame.take<double>(rows * cols), *h = frame.take<double>(cols * cols);
        for (std::int64_t i = 0; i < rows; ++i)
            for (std::int64_t j = 0; j < cols; ++j) ct[j * rows + i] = inner[i * cols + j];
        gram(RowBlocks<double>(rows).add(MatrixView<const double>(ct, cols, rows)), 0, h);
        eigh_top<double>(cols, k, h, sigma, y);
        if (std::is_same_v<T, float>) {
            for (std::int64_t i = 0; i < k; ++i) sigma[i] = std::sqrt(std::max(sigma[i], 0.0));
            return;
        }
        if (sigma[0] == 0.0 || sigma[k - 1] * kSpread * kSpread >= sigma[0]) {
            rayleigh(rows, cols, inner, k, sigma, y);
            return;
        }
    }
    const std::int64_t p = std::min(rows, cols);
    double *all = frame.take<double>(p), *vt = frame.take<double>(p * cols);
    small_svd(rows, cols, inner, all, nullptr, vt);
    std::copy_n(vt, k * cols, y);
    rayleigh(rows, cols, inner, k, sigma, y);
}

template <class T> void StreamingSvd<T>::Impl::rayleigh(std::int64_t rows, std::int64_t cols, const double *inner, std::int64_t k, double *sigma, double *y) {
    Frame frame;
    double *z = frame.take<double>(k * rows);
    gemm<double>(MatrixView<const double>(y, k, cols), MatrixView<const double>(inner, rows, cols).transposed(), MatrixView<double>(z, k, rows));
    for (std::int64_t i = 0; i < k; ++i) {
        double sum = 0;
        for (std::int64_t j = 0; j < rows; ++j) sum += z[i * rows + j] * z[i * rows + j];
        sigma[i] = std::sqrt(sum);
        for (std::int64_t j = i; j > 0 && sigma[j] > sigma[j - 1]; --j) {
            std::swap(sigma[j], sigma[j - 1]);
            std::swap_ranges(y + j * cols, y + (j + 1) * cols, y + (j - 1) * cols);
        }
    }
}

template struct StreamingSvd<float>::Impl;
template struct StreamingSvd<double>::Impl;

} // namespace subspan
