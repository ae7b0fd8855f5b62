#include "host.hpp"
#include "register.hpp"
#include "subspan/orthonormalize.hpp"
#include "subspan/spaces.hpp"

#include <pybind11/stl.h>

namespace subspan::bind {
namespace {

py::object orthonormalize(py::handle context, py::handle a, py::handle method, const py::object &out, py::handle deficient, py::handle return_rank) {
    const Call call(context);
    load_lapack();
    Array xa(call, a, "A");
    const bool vector = xa.ndim() == 1;
    xa.as_matrix(true);
    xa.require_matrices();
    const int how = choice(method, "method", {"auto", "cholesky", "householder", "polar"});
    const bool complete = choice(deficient, "rank_deficient", {"complete", "raise"}) == 0, with_rank = truth(return_rank, "return_rank");
    Shape shape = xa.shape();
    if (vector) shape.pop_back();
    Array xo = call.output(out, shape, xa.dtype());
    if (vector) xo.add_axis(true);
    const Shape batch = xa.leading();
    check_no_overlap(xo, xa, true);
    py::object ranks = py::none();
    std::int64_t *seen = nullptr;
    if (with_rank) {
        py::array_t<std::int64_t> counts(std::vector<py::ssize_t>(batch.begin(), batch.end()));
        seen = counts.mutable_data();
        std::fill_n(seen, counts.size(), 0);
        ranks = batch.empty() ? py::object(py::none()) : py::object(counts);
    }
    std::int64_t one = 0;
    if (with_rank && batch.empty()) seen = &one;
    dispatch(xa.dtype(), [&](auto t) {
        using T = decltype(t);
        const auto va = xa.stack<const T>(batch);
        const auto vo = xo.stack<T>(batch);
        if (vo.first.col_stride != 1 && vo.cols() > 1 && vo.rows() > 0 && vo.size() > 0) throw py::value_error("out must have contiguous rows");
        const py::gil_scoped_release release;
        if (how == 3 && va.rows() < va.cols()) { // rows become orthonormal
            const Temporary<T> found(batch, va.cols(), va.rows());
            subspan::orthonormalize<T>(va.transposed(), found.stack, Orthonormalization::polar, complete, seen);
            copy_stack<T>(found.stack.transposed(), vo);
            return;
        }
        const double n = double(va.cols()), flops = double(va.size()) * n * n * (12.0 * double(va.rows()) + 40.0 * n);
        whole<T>(vo, vo.first.data == va.first.data, flops,
                 [&](const StackView<T> &to) { subspan::orthonormalize<T>(va, to, static_cast<Orthonormalization>(how), complete, seen); });
    });
    xo.written();
    if (!with_rank) return xo.object();
    return py::make_tuple(xo.object(), batch.empty() ? py::object(py::int_(one)) : ranks);
}

// The first `count` columns of a stack as a fresh array, behind those of `before` where there are some.
template <class T> py::object columns(const Call &call, const StackView<T> &x, std::int64_t count, const StackView<const T> *before = nullptr) {
    Shape shape = x.shape;
    const std::int64_t k = before != nullptr ? before->cols() : 0;
    shape.insert(shape.end(), {x.rows(), k + count});
    const Array out = call.empty(shape, std::is_same_v<T, float> ? DType::f32 : DType::f64);
    const auto to = out.stack<T>(x.shape);
    if (to.empty()) return out.object();
    for (std::int64_t i = 0; i < to.size(); ++i) {
        const auto target = to[i], from = x[i];
        const MatrixView<const T> first = before != nullptr ? (*before)[i] : MatrixView<const T>();
        for (std::int64_t r = 0; r < x.rows(); ++r) {
            for (std::int64_t c = 0; c < k; ++c) target(r, c) = first(r, c);
            for (std::int64_t c = 0; c < count; ++c) target(r, k + c) = from(r, c);
        }
    }
    return out.object();
}

// f(q, rank), of the column space of A, or of Aᵀ where `transposed`: the first `rank` columns of q are its basis.
template <class F> py::object of_columns(const Call &call, py::handle a, py::handle rcond, bool transposed, const F &f) {
    load_lapack();
    const Array x = matrices(call, a, "A");
    const double tol = cutoff(rcond, x);
    return dispatch(x.dtype(), [&](auto t) {
        using T = decltype(t);
        const auto given = x.stack<const T>(x.leading());
        const auto va = transposed ? given.transposed() : given;
        const Temporary<T> q(x.leading(), va.rows(), std::min(va.rows(), va.cols()));
        std::vector<std::int64_t> ranks(std::size_t(va.size()));
        {
            const py::gil_scoped_release release;
            subspan::column_space<T>(va, tol, false, q.stack, ranks.data(), "A");
        }
        return f(q.stack, one_rank(ranks));
    });
}

py::object range_basis(py::handle context, py::handle a, py::handle rcond) {
    const Call call(context);
    return of_columns(call, a, rcond, false, [&](const auto &q, std::int64_t rank) { return columns(call, q, rank); });
}

py::object null_space(py::handle context, py::handle a, py::handle rcond) {
    const Call call(context);
    return of_columns(call, a, rcond, true, [&]<class T>(const StackView<T> &q, std::int64_t rank) {
        Shape shape = q.shape;
        shape.insert(shape.end(), {q.rows(), q.rows() - rank});
        const Array out = call.empty(shape, std::is_same_v<T, float> ? DType::f32 : DType::f64);
        const auto vo = out.stack<T>(q.shape);
        StackView<const T> rows = q;
        rows.first.cols = rank;
        const py::gil_scoped_release release;
        subspan::complement<T>(rows, vo);
        return out.object();
    });
}

py::object complement(py::handle context, py::handle u, py::handle check) {
    const Call call(context);
    const Array x = matrices(call, u, "U");
    const bool checks = truth(check, "check");
    require_tall(x);
    Shape shape = x.leading();
    shape.insert(shape.end(), {x.rows(), x.rows() - x.cols()});
    const Array out = call.empty(shape, x.dtype());
    dispatch(x.dtype(), [&](auto t) {
        using T = decltype(t);
        const auto vu = x.stack<const T>(x.leading());
        const auto vo = out.stack<T>(x.leading());
        const py::gil_scoped_release release;
        if (checks) check_basis<T>(vu, "U");
        subspan::complement<T>(vu, vo);
    });
    return out.object();
}

// Two bases, looked at where `check`: U, and W too where `both`.
struct TwoBases : TwoSpaces {
    TwoBases(const Call &call, py::handle a, py::handle b, py::handle check, bool both) : TwoSpaces(call, a, b) {
        if (!truth(check, "check")) return;
        dispatch(u.dtype(), [&](auto t) {
            using T = decltype(t);
            check_basis<T>(u.stack<const T>(u.leading()), "U");
            if (both) check_basis<T>(w.stack<const T>(w.leading()), "W");
        });
    }
};

// What f makes of both spaces, the columns that count of them; behind those of U where `before`.
template <class F> py::object of_both(py::handle context, py::handle u, py::handle w, py::handle tol, py::handle check, bool before, const F &f) {
    const Call call(context);
    load_lapack();
    const TwoBases x(call, u, w, check, true);
    const double cut = tolerance(tol, x.u.dtype());
    return dispatch(x.u.dtype(), [&](auto t) {
        using T = decltype(t);
        const auto vu = x.u.stack<const T>(x.batch), vw = x.w.stack<const T>(x.batch);
        const Temporary<T> found(x.batch, x.u.rows(), x.w.cols());
        std::vector<std::int64_t> counts(std::size_t(vu.size()));
        {
            const py::gil_scoped_release release;
            f(vu, vw, cut, found.stack, counts.data());
        }
        return columns<T>(call, found.stack, one_rank(counts), before ? &vu : nullptr);
    });
}

py::object span_sum(py::handle context, py::handle u, py::handle w, py::handle tol, py::handle check) {
    return of_both(context, u, w, tol, check, true,
                   [](const auto &a, const auto &b, double cut, const auto &to, std::int64_t *counts) { subspan::span_sum(a, b, cut, to, counts); });
}

py::object span_intersection(py::handle context, py::handle u, py::handle w, py::handle tol, py::handle check) {
    return of_both(context, u, w, tol, check, false,
                   [](const auto &a, const auto &b, double cut, const auto &to, std::int64_t *counts) { subspan::span_intersection(a, b, cut, to, counts); });
}

py::object contains(py::handle context, py::handle u, py::handle w, py::handle tol, py::handle check) {
    const Call call(context);
    load_lapack();
    const TwoBases x(call, u, w, check, false);
    const double cut = tolerance(tol, x.u.dtype());
    py::array_t<bool> found(std::vector<py::ssize_t>(x.batch.begin(), x.batch.end()));
    dispatch(x.u.dtype(), [&](auto t) {
        using T = decltype(t);
        const auto own = x.w.stack<const T>(x.w.leading());
        const auto vu = x.u.stack<const T>(x.batch);
        std::vector<double> sines(std::size_t(vu.size()));
        {
            const py::gil_scoped_release release;
            const Temporary<T> q(x.w.leading(), x.w.rows(), std::min(x.w.rows(), x.w.cols()));
            std::vector<std::int64_t> ranks(std::size_t(own.size()));
            const double eps = double(std::max(x.w.rows(), x.w.cols())) * double(std::numeric_limits<T>::epsilon());
            subspan::column_space<T>(own, eps, true, q.stack, ranks.data(), "W");
            subspan::largest_sines<T>(vu, q.over(x.batch), sines.data());
        }
        for (std::size_t i = 0; i < sines.size(); ++i) found.mutable_data()[i] = sines[i] <= cut;
    });
    return found;
}

py::object compose(py::handle context, py::handle u, py::handle w, py::handle shared, py::handle tol) {
    const Call call(context);
    load_lapack();
    const Array xu = matrices(call, u, "U"), xw = matrices(call, w, "W");
    xw.require_dtype_of(xu);
    const double cut = tolerance(tol, xu.dtype());
    const std::int64_t p = shared_coordinates(shared, xu, xw);
    const Shape batch = broadcast_leading({{&xu, 2}, {&xw, 2}});
    return dispatch(xu.dtype(), [&](auto t) {
        using T = decltype(t);
        // Orthonormal bases first: the tolerance then means an angle.
        const auto spanned = [&](const Array &x, const char *name) {
            const auto v = x.stack<const T>(x.leading());
            Temporary<T> q(x.leading(), x.rows(), std::min(x.rows(), x.cols()));
            std::vector<std::int64_t> ranks(std::size_t(v.size()));
            const double eps = double(std::max(x.rows(), x.cols())) * double(std::numeric_limits<T>::epsilon());
            subspan::column_space<T>(v, eps, true, q.stack, ranks.data(), name);
            q.stack.first.cols = one_rank(ranks);
            return q;
        };
        const Temporary<T> a = spanned(xu, "U"), b = spanned(xw, "W");
        const auto va = a.over(batch), vb = b.over(batch);
        const Temporary<T> basis(batch, xu.rows() - p + xw.rows() - p, std::min(xu.rows() - p + xw.rows() - p, va.cols() + vb.cols()));
        std::vector<std::int64_t> counts(std::size_t(va.size()));
        {
            const py::gil_scoped_release release;
            subspan::compose<T>(va, vb, p, cut, basis.stack, counts.data());
        }
        return columns<T>(call, basis.stack, one_rank(counts));
    });
}

} // namespace

void register_spaces(py::module_ &m) {
    m.def("orthonormalize", &orthonormalize, py::arg("call"), py::arg("A"), py::arg("method"), py::arg("out"), py::arg("rank_deficient"),
          py::arg("return_rank"));
    m.def("range_basis", &range_basis, py::arg("call"), py::arg("A"), py::arg("rcond"));
    m.def("null_space", &null_space, py::arg("call"), py::arg("A"), py::arg("rcond"));
    m.def("complement", &complement, py::arg("call"), py::arg("U"), py::arg("check"));
    m.def("span_sum", &span_sum, py::arg("call"), py::arg("U"), py::arg("W"), py::arg("tol"), py::arg("check"));
    m.def("span_intersection", &span_intersection, py::arg("call"), py::arg("U"), py::arg("W"), py::arg("tol"), py::arg("check"));
    m.def("contains", &contains, py::arg("call"), py::arg("U"), py::arg("W"), py::arg("tol"), py::arg("check"));
    m.def("compose", &compose, py::arg("call"), py::arg("U"), py::arg("W"), py::arg("shared"), py::arg("tol"));
}

} // namespace subspan::bind
