#include "basis.hpp"
#include "device.hpp"
#include "register.hpp"
#include "subspan/cuda/blas.hpp"
#include "subspan/cuda/householder_qr.hpp"
#include "subspan/cuda/orthonormalize.hpp"
#include "subspan/cuda/spaces.hpp"
#include "subspan/orthonormalize.hpp"

#include <cmath>
#include <limits>
#include <pybind11/numpy.h>

namespace subspan::bind {
namespace {

double epsilon(DType d) { return d == DType::f64 ? std::numeric_limits<double>::epsilon() : double(std::numeric_limits<float>::epsilon()); }

Shape with(Shape batch, std::initializer_list<std::int64_t> more) {
    batch.insert(batch.end(), more);
    return batch;
}

// x[..., from:to].
py::object columns(const py::object &x, std::int64_t from, std::int64_t to) {
    return x[py::make_tuple(py::ellipsis(), py::slice(py::ssize_t(from), py::ssize_t(to), 1))];
}

// The Q factor of Householder QR as a fresh array, and the factors.
py::object q_of(py::handle context, const py::tuple &factors) { return factored_array(context, factors[0], factors[2], py::bool_(false)); }
py::object orthonormal(py::handle context, const py::object &x) { return q_of(context, householder_qr(context, x, py::bool_(false))); }

// How many columns of each matrix do not depend on those before them, from R.
std::vector<std::int64_t> ranks_of(const Call &call, const Array &a, const py::object &r, bool complete) {
    const Numbers x = host(call, r);
    const std::int64_t k = a.cols(), items = k == 0 ? 0 : x.size() / (k * k);
    std::vector<std::int64_t> ranks(std::size_t(items), 0);
    for (std::int64_t i = 0; i < items; ++i)
        for (std::int64_t j = 0; j < k; ++j) {
            const double *m = x.data() + i * k * k;
            double length = 0;
            for (std::int64_t p = 0; p <= j; ++p) length = std::max(length, std::abs(m[p * k + j]));
            if (std::isnan(m[j * k + j])) throw py::value_error("A holds NaN or infinity");
            if (std::abs(m[j * k + j]) > double(a.rows()) * epsilon(a.dtype()) * length)
                ++ranks[std::size_t(i)];
            else if (!complete)
                dependent_column(j);
        }
    return ranks;
}

// Whether Cholesky QR has got through for all matrices; ValueError for NaN. Waits.
bool by_cholesky(const Call &call, const Array &a, const Array &q, const Shape &batch) {
    const Stack sa = stack(a, batch), sq = stack(q, batch);
    const Array defects = call.empty({std::max<std::int64_t>(sa.size(), 1)}, DType::f64);
    {
        const Memory memory(call, cuda::cholesky_qr_workspace(sa, call.device));
        const py::gil_scoped_release release;
        cuda::cholesky_qr(memory.context(), sa, sq, static_cast<double *>(defects.data()));
    }
    if (sa.size() == 0 || a.cols() == 0) return true;
    const Numbers found = host(call, defects.object());
    bool good = true;
    for (std::int64_t i = 0; i < sa.size(); ++i) {
        if (std::isnan(found.data()[i])) throw py::value_error("A holds NaN or infinity");
        good = good && found.data()[i] <= 5 * epsilon(DType::f64) * std::sqrt(double(a.cols()));
    }
    return good;
}

py::object orthonormalize(py::handle context, py::handle given, py::handle method, const py::object &out, py::handle deficient, py::handle return_rank) {
    const Call call(context);
    Array a(call, given, "A");
    const bool vector = a.ndim() == 1;
    a.as_matrix(true);
    a.require_matrices();
    const auto how = static_cast<Orthonormalization>(choice(method, "method", {"auto", "cholesky", "householder", "polar"}));
    const bool complete = choice(deficient, "rank_deficient", {"complete", "raise"}) == 0, with_rank = truth(return_rank, "return_rank");
    const bool polar = how == Orthonormalization::polar;
    if (polar && (with_rank || !complete))
        throw py::type_error("return_rank and rank_deficient='raise' with method='polar' are not implemented on CUDA devices");
    if (!polar) {
        require_float32_or_64(a);
        require_tall(a);
    }
    Shape shape = a.shape();
    if (vector) shape.pop_back();
    const Shape batch = a.leading();
    // Into `out`, or where it is A, which a second way may need, or where none was given, into a fresh array.
    std::optional<Array> to;
    if (!out.is_none()) {
        to.emplace(call.output(out, shape, a.dtype()));
        if (vector) to->add_axis(true);
        check_no_overlap(*to, a, true);
    }
    const bool fresh = !to || (to->data() == a.data() && !polar);
    std::optional<Array> made;
    const auto target = [&]() -> const Array & {
        if (!fresh) return *to;
        if (!made) {
            made.emplace(call.empty(shape, a.dtype()));
            if (vector) made->add_axis(true);
        }
        return *made;
    };
    const auto finish = [&](const py::object &q) { // an array of the shape of the result, or what `target` is
        if (!to) return q;
        if (q.ptr() != to->object().ptr()) {
            Array from(call, q, "Q");
            if (vector) from.as_matrix(true);
            assign(call, from, *to);
        }
        to->written();
        return to->object();
    };
    const auto ranked = [&](const py::object &q, const std::vector<std::int64_t> &ranks) {
        if (!with_rank) return q;
        if (batch.empty()) return py::object(py::make_tuple(q, ranks.empty() ? 0 : ranks[0]));
        py::array_t<std::int64_t> counts(std::vector<py::ssize_t>(batch.begin(), batch.end()));
        std::copy_n(ranks.begin(), ranks.size(), counts.mutable_data());
        return py::object(py::make_tuple(q, counts));
    };
    if (polar) {
        const Array &q = target();
        const Stack sa = stack(a, batch), sq = stack(q, batch);
        {
            const Memory memory(call, cuda::polar_workspace(sa, call.device));
            const py::gil_scoped_release release;
            cuda::polar(memory.context(), sa, sq);
        }
        return finish(q.object());
    }
    const Stack sa = stack(a, batch);
    const bool products = how == Orthonormalization::cholesky || (how == Orthonormalization::automatic && !cuda::fits_a_block(sa, call.device));
    if (products && by_cholesky(call, a, target(), batch))
        return ranked(finish(target().object()), std::vector<std::int64_t>(std::size_t(sa.size()), a.cols()));
    if (how == Orthonormalization::cholesky)
        throw LinAlgError("orthonormalize: Cholesky QR cannot separate the columns of A; use method 'auto' or 'householder'");
    const py::tuple factors = householder_qr(context, py::reinterpret_borrow<py::object>(given), py::bool_(false));
    std::vector<std::int64_t> ranks;
    if (with_rank || !complete) ranks = ranks_of(call, a, factors[3], complete);
    const py::object q = q_of(context, factors);
    return ranked(finish(vector ? py::object(q.attr("reshape")(-1)) : q), ranks);
}

// Two bases of spaces in one space, what their leading axes broadcast to, and what W has outside of U, projected twice.
struct TwoBases : TwoSpaces {
    TwoBases(const Call &c, py::handle a, py::handle b, py::handle tol, py::handle check) : TwoSpaces(c, a, b), call(c), cut(tolerance(tol, u.dtype())) {
        truth(check, "check"); // values are not looked at: that would make the host wait
        require_tall(u);
        require_tall(w);
        n = u.rows(), k = u.cols(), l = w.cols();
    }
    Array outside(const Array &x) const {
        Array rest = call.empty(with(batch, {n, x.cols()}), u.dtype(), "rest");
        if (x.cols() == 0) return rest;
        apply_core(call, x, &u, nullptr, {nullptr, false, -1.0}, 1.0, true, rest, batch);
        apply_core(call, rest, &u, nullptr, {nullptr, false, -1.0}, 1.0, true, rest, batch);
        return rest;
    }
    // Sines of the angles of W to U, largest first: how many exceed the tolerance, and vectors on one of the two sides.
    std::int64_t sines(const Array *left, const Array *right) const {
        const Array rest = outside(w), values = call.empty(with(batch, {l}), DType::f64);
        const Stack sr = stack(rest, batch), sv = stack(values, batch, 1);
        {
            const Stack sl = left != nullptr ? stack(*left, batch) : Stack{}, st = right != nullptr ? stack(*right, batch) : Stack{};
            const Memory memory(call, cuda::column_svd_workspace(sr, call.device));
            const py::gil_scoped_release release;
            cuda::column_svd(memory.context(), sr, sv, sl, st);
        }
        const Numbers found = host(call, values.object());
        std::vector<std::int64_t> counts(std::size_t(sr.size()), 0);
        for (std::int64_t i = 0; i < sr.size() * l; ++i) {
            if (std::isnan(found.data()[i])) throw py::value_error("U or W holds NaN or infinity");
            counts[std::size_t(i / l)] += found.data()[i] > cut;
        }
        return one_rank(counts);
    }
    const Call &call;
    double cut;
    std::int64_t n = 0, k = 0, l = 0;
};

// out = a b, where none of them is empty, else zeros.
void multiply(const Call &call, const Array &a, const Array &b, const Array &out, const Shape &batch) {
    if (out.rows() == 0 || out.cols() == 0) return;
    if (a.cols() == 0) return fill(call, out, 0);
    const Array x = for_blas(call, a.object(), a.name()), y = for_blas(call, b.object(), b.name());
    const Stack sx = stack(x, batch), sy = stack(y, batch), so = stack(out, batch);
    const Memory memory(call, cuda::blas_workspace(call.device));
    const py::gil_scoped_release release;
    cuda::matrix_product(memory.context(), sx, sy, 1.0, so);
}

// The last columns of the Householder Q of U.
py::object complement(py::handle context, py::handle u, py::handle check) {
    const Call call(context);
    truth(check, "check");
    Array xu(call, u, "U");
    xu.as_matrix(true);
    xu.require_matrices();
    require_tall(xu);
    const auto factors = householder_qr(
        context, xu.ndim() == py::cast<int>(py::int_(py::len(xu.object().attr("shape")))) ? xu.object() : py::object(xu.object().attr("reshape")(-1, 1)),
        py::bool_(false));
    return factored_columns(call, Array(call, factors[0], "V"), Array(call, factors[2], "T"), xu.cols(), xu.rows() - xu.cols());
}

py::object span_sum(py::handle context, py::handle u, py::handle w, py::handle tol, py::handle check) {
    const Call call(context);
    const TwoBases x(call, u, w, tol, check);
    const Array left = call.empty(with(x.batch, {x.n, x.l}), x.u.dtype());
    const std::int64_t count = x.l == 0 ? 0 : x.sines(&left, nullptr);
    const Array out = call.empty(with(x.batch, {x.n, x.k + count}), x.u.dtype());
    const auto put = [&](const Array &from, std::int64_t begin, std::int64_t end) {
        if (begin < end) assign(call, from, Array(call, columns(out.object(), begin, end), "the sum"));
    };
    put(x.u, 0, x.k);
    if (count > 0) {
        const Array extra(call, columns(left.object(), 0, count), "extra");
        put(Array(call, orthonormal(context, x.outside(extra).object()), "extra"), x.k, x.k + count);
    }
    return out.object();
}

py::object span_intersection(py::handle context, py::handle u, py::handle w, py::handle tol, py::handle check) {
    const Call call(context);
    const TwoBases x(call, u, w, tol, check);
    const Array right = call.empty(with(x.batch, {x.l, x.l}), x.u.dtype());
    const std::int64_t apart = x.l == 0 ? 0 : x.sines(nullptr, &right), count = x.l - apart;
    const Array common = call.empty(with(x.batch, {x.n, count}), x.u.dtype());
    if (count == 0) return common.object();
    if (apart == 0) {
        assign(call, x.w, common);
        return common.object();
    }
    // Of coordinates in W those that are orthogonal to all with a larger sine.
    multiply(call, x.w, Array(call, complement(context, columns(right.object(), 0, apart), py::bool_(false)), "shared"), common, x.batch);
    return orthonormal(context, common.object());
}

// Rows [r, r + m) and columns [c, c + n) of each matrix, as a view.
Array part(const Call &call, const py::object &x, std::int64_t r, std::int64_t m, std::int64_t c, std::int64_t n, const char *name) {
    const auto range = [](std::int64_t begin, std::int64_t count) { return py::slice(py::ssize_t(begin), py::ssize_t(begin + count), 1); };
    return Array(call, x[py::make_tuple(py::ellipsis(), range(r, m), range(c, n))], name);
}

// An orthonormal basis (..., m, r) of the columns of a, or (..., n, r) of its rows, from singular vectors, leading first. r: how many values
// exceed `tol`, or with `relative` so many times the first; the same for all matrices.
enum class Of { columns, rows };
py::object basis_of(const Call &call, const Array &a, Of of, double tol, bool relative, bool unit_columns = false) {
    const Shape batch = a.leading();
    const bool tall = a.rows() >= a.cols();
    const std::int64_t l = std::min(a.rows(), a.cols()), length = of == Of::columns ? a.rows() : a.cols();
    const bool left = (of == Of::columns) == tall;
    const Array vectors = call.empty(with(batch, {length, l}), a.dtype()), values = call.empty(with(batch, {l}), DType::f64);
    if (unit_columns && !tall) throw ValueError("columns of wide matrices are not scaled");
    const Stack sa = tall ? stack(a, batch) : stack(a, batch).transposed(), sv = stack(vectors, batch), ss = stack(values, batch, 1);
    if (sa.size() == 0 || l == 0) return columns(vectors.object(), 0, 0);
    {
        const Memory memory(call, cuda::column_svd_workspace(sa, call.device));
        const py::gil_scoped_release release;
        cuda::column_svd(memory.context(), sa, ss, left ? sv : Stack{}, left ? Stack{} : sv, unit_columns);
    }
    const Numbers found = host(call, values.object());
    std::vector<std::int64_t> counts(std::size_t(sa.size()), 0);
    for (std::int64_t i = 0; i < sa.size() * l; ++i) {
        const double value = found.data()[i], first = found.data()[i / l * l];
        if (std::isnan(value)) throw py::value_error(std::string(a.name()) + " holds NaN or infinity");
        counts[std::size_t(i / l)] += value > (relative ? tol * first : tol);
    }
    return columns(vectors.object(), 0, one_rank(counts));
}

py::object range_basis(py::handle context, py::handle a, py::handle rcond) {
    const Call call(context);
    const Array x = matrices(call, a, "A");
    return copied(call, Array(call, basis_of(call, x, Of::columns, cutoff(rcond, x), true), "the basis")).object();
}

py::object null_space(py::handle context, py::handle a, py::handle rcond) {
    const Call call(context);
    const Array x = matrices(call, a, "A");
    return complement(context, basis_of(call, x, Of::rows, cutoff(rcond, x), true), py::bool_(false));
}

// As on the CPU: pairs of coordinates that give one y, then the span of their ends. Stacks whose pairs are of different dimensions are refused,
// also where what the ends span is not.
py::object compose(py::handle context, py::handle given_u, py::handle given_w, py::handle shared, py::handle tol) {
    const Call call(context);
    const Array xu = matrices(call, given_u, "U"), xw = matrices(call, given_w, "W");
    xw.require_dtype_of(xu);
    const double cut = tolerance(tol, xu.dtype());
    const std::int64_t p = shared_coordinates(shared, xu, xw);
    const Shape batch = broadcast_leading({{&xu, 2}, {&xw, 2}});
    // Orthonormal bases first: the tolerance then means an angle.
    const auto spanned = [&](const Array &x) {
        const bool tall = x.rows() >= x.cols();
        return basis_of(call, x, Of::columns, double(std::max(x.rows(), x.cols())) * epsilon(x.dtype()), true, tall);
    };
    const py::object u = spanned(xu), w = spanned(xw);
    const Array au(call, u, "U"), aw(call, w, "W");
    const std::int64_t s = xu.rows() - p, q = xw.rows() - p, k = au.cols(), l = aw.cols();
    const Array joint = call.empty(with(batch, {p, k + l}), xu.dtype(), "joint");
    if (p > 0 && k > 0) assign(call, part(call, u, s, p, 0, k, "U"), part(call, joint.object(), 0, p, 0, k, "joint"));
    if (p > 0 && l > 0) assign(call, part(call, w, 0, p, 0, l, "W"), part(call, joint.object(), 0, p, k, l, "joint"), -1.0);
    const py::object pairs = complement(context, basis_of(call, joint, Of::rows, cut, false), py::bool_(false));
    const std::int64_t free = Array(call, pairs, "pairs").cols();
    const Array ends = call.empty(with(batch, {s + q, free}), xu.dtype(), "ends");
    multiply(call, part(call, u, 0, s, 0, k, "U"), part(call, pairs, 0, k, 0, free, "pairs"), part(call, ends.object(), 0, s, 0, free, "ends"), batch);
    multiply(call, part(call, w, p, q, 0, l, "W"), part(call, pairs, k, l, 0, free, "pairs"), part(call, ends.object(), s, q, 0, free, "ends"), batch);
    return copied(call, Array(call, basis_of(call, ends, Of::columns, cut, false), "the composition")).object();
}

} // namespace

void register_device_spaces(py::module_ &m) {
    using py::arg;
    m.def("orthonormalize", &orthonormalize, arg("call"), arg("A"), arg("method"), arg("out"), arg("rank_deficient"), arg("return_rank"));
    m.def("complement", &complement, arg("call"), arg("U"), arg("check"));
    m.def("span_sum", &span_sum, arg("call"), arg("U"), arg("W"), arg("tol"), arg("check"));
    m.def("span_intersection", &span_intersection, arg("call"), arg("U"), arg("W"), arg("tol"), arg("check"));
    m.def("range_basis", &range_basis, arg("call"), arg("A"), arg("rcond"));
    m.def("null_space", &null_space, arg("call"), arg("A"), arg("rcond"));
    m.def("compose", &compose, arg("call"), arg("U"), arg("W"), arg("shared"), arg("tol"));
}

} // namespace subspan::bind
