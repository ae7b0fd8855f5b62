#include "convert.hpp"
#include "gradient.hpp"
#include "lapack_capsules.hpp"
#include "register.hpp"
#include "scalars.hpp"
#include "subspan/affine.hpp"
#include "subspan/choose_rank.hpp"
#include "subspan/errors.hpp"
#include "subspan/moments.hpp"
#include "subspan/truncated_svd.hpp"
#include "truncated.hpp"

#include <algorithm>
#include <cmath>
#include <deque>
#include <limits>

namespace subspan::bind {
namespace {

// Signs that make the entry of largest magnitude in each column of U positive; those of the rows of Vh are so already.
template <class T> void flip_by_u(TruncatedSvd<T> &d) {
    for (std::int64_t j = 0; j < d.k && d.m > 0 && !d.u.empty(); ++j) {
        T best = 0;
        for (std::int64_t i = 0; i < d.m; ++i)
            if (const T x = d.u[std::size_t(i * d.k + j)]; std::abs(x) > std::abs(best)) best = x;
        if (!(best < T(0))) continue;
        for (std::int64_t i = 0; i < d.m; ++i) d.u[std::size_t(i * d.k + j)] *= T(-1);
        for (std::int64_t i = 0; i < d.n; ++i) d.vh[std::size_t(j * d.n + i)] *= T(-1);
    }
}

template <class T> py::tuple pack(TruncatedSvd<T> &&d, bool by_u) {
    if (by_u) flip_by_u(d);
    const auto m = py::ssize_t(d.m), n = py::ssize_t(d.n), k = py::ssize_t(d.k);
    for (const T s : d.s)
        if (!std::isfinite(s)) throw ValueError("the singular values overflow the dtype although the input is finite; scale it");
    py::object u = py::none();
    if (!d.u.empty() || m > 0) u = hand_over(std::move(d.u), {m, k});
    auto s = hand_over(std::move(d.s), {k});
    auto vh = hand_over(std::move(d.vh), {k, n});
    return py::make_tuple(u, s, vh);
}

// A Python object with matmat and rmatmat. Called from C++ without the GIL held.
template <class T> class PythonOperator final : public LinearOperator<T> {
  public:
    PythonOperator(const py::object &matmat, const py::object &rmatmat, std::int64_t rows, std::int64_t cols)
        : matmat_(matmat), rmatmat_(rmatmat), rows_(rows), cols_(cols) {}
    std::int64_t rows() const override { return rows_; }
    std::int64_t cols() const override { return cols_; }
    void apply(std::int64_t count, const T *x, T *y) override { call(matmat_, "A.matmat", count, x, cols_, y, rows_); }
    void adjoint(std::int64_t count, const T *y, T *x) override { call(rmatmat_, "A.rmatmat", count, y, rows_, x, cols_); }

  private:
    // The operator gets an (in, count) view of the contiguous rows and answers (out, count).
    static void call(const py::object &f, const char *name, std::int64_t count, const T *from, std::int64_t in, T *to, std::int64_t out) {
        const py::gil_scoped_acquire gil;
        const py::array_t<T> arg({py::ssize_t(count), py::ssize_t(in)}, from);
        const py::object result = f(arg.attr("T"));
        const Array a(result, name);
        if (a.ndim() != 2 || a.shape(0) != out || a.shape(1) != count)
            throw py::value_error(std::string(name) + " must return shape (" + std::to_string(out) + ", " + std::to_string(count) + "), got " + a.shape_text());
        dispatch(a.dtype(), [&](auto t) {
            const auto v = a.matrix<const decltype(t)>();
            for (std::int64_t i = 0; i < count; ++i)
                for (std::int64_t j = 0; j < out; ++j) {
                    const auto x = v(j, i);
                    if (!(x - x == decltype(t)(0))) throw ValueError(std::string(name) + " returned NaN or infinity");
                    to[i * out + j] = T(x);
                }
        });
    }
    py::object matmat_, rmatmat_;
    std::int64_t rows_, cols_;
};

template <class T> py::tuple run(LinearOperator<T> &op, const TruncatedOptions &o, const py::object &initial, bool by_u) {
    MatrixView<const T> start;
    std::optional<Array> held;
    if (!initial.is_none()) {
        held.emplace(initial, "initial");
        held->require_dtype(std::is_same_v<T, float> ? DType::f32 : DType::f64);
        start = held->template matrix<const T>();
    }
    TruncatedSvd<T> d;
    {
        const py::gil_scoped_release release;
        d = truncated_svd(op, o, start);
    }
    return pack(std::move(d), by_u);
}

// An object with shape, matmat and rmatmat, of float64 unless it says float32.
struct OperatorArgument {
    explicit OperatorArgument(const py::object &a) : matmat(a.attr("matmat")), rmatmat(a.attr("rmatmat")) {
        const py::object shape = py::getattr(a, "shape", py::none());
        if (!PyTuple_Check(shape.ptr()) || py::len(shape) != 2)
            throw py::type_error("A is an operator, and its shape must be a pair, got " + std::string(py::repr(shape)));
        const auto sizes = py::reinterpret_borrow<py::tuple>(shape);
        rows = whole_number(sizes[0], "A.shape[0]", 0, std::int64_t(1) << 58);
        cols = whole_number(sizes[1], "A.shape[1]", 0, std::int64_t(1) << 58);
        for (const auto &[f, name] : {std::pair{&matmat, "matmat"}, {&rmatmat, "rmatmat"}})
            if (PyCallable_Check(f->ptr()) == 0)
                throw py::type_error("A." + std::string(name) + " must be callable, got " + std::string(py::str(py::type::handle_of(*f).attr("__name__"))));
        const py::object given = py::getattr(a, "dtype", py::none());
        if (given.is_none()) return;
        const std::string text = py::str(given);
        try {
            const py::dtype dtype = py::dtype::from_args(py::str(text.substr(text.rfind('.') + 1))); // torch.float32
            if (dtype.kind() == 'c') throw py::type_error("A must be real, got a complex operator");
            single = dtype.num() == py::detail::npy_api::NPY_FLOAT_;
        } catch (py::error_already_set &e) {
            if (!e.matches(PyExc_TypeError)) throw;
            throw py::type_error("A is an operator of dtype " + std::string(py::repr(given)) + ", wanted float32 or float64");
        }
    }
    py::object matmat, rmatmat;
    std::int64_t rows = 0, cols = 0;
    bool single = false;
};

// The numbers of choose_rank, of float64: finite, not negative, descending.
std::int64_t choose_rank(const py::array_t<double, py::array::c_style | py::array::forcecast> &values, py::handle energy, py::handle threshold, py::handle rule,
                         py::handle shape, py::handle noise) {
    if (values.ndim() != 1) throw py::value_error("singular_values must have 1 dimension, got shape " + std::string(py::str(values.attr("shape"))));
    const double *s = values.data();
    const std::int64_t count = values.size();
    for (std::int64_t i = 0; i < count; ++i) {
        if (!(std::isfinite(s[i]) && s[i] >= 0)) throw py::value_error("singular_values must be finite and not negative");
        if (i > 0 && s[i] > s[i - 1]) throw py::value_error("singular_values must be in descending order");
    }
    if (int(energy.is_none()) + int(threshold.is_none()) + int(rule.is_none()) != 2)
        throw py::value_error("exactly one of energy, threshold and rule must be given");
    if (rule.is_none() && !(shape.is_none() && noise.is_none())) throw py::value_error("shape and noise belong to a rule");
    if (!energy.is_none()) {
        const double part = real(energy, "energy");
        if (!(part > 0.0 && part <= 1.0)) throw py::value_error("energy must be in (0, 1], got " + std::string(py::repr(energy)));
        return rank_by_energy(s, count, part);
    }
    if (!threshold.is_none()) {
        const double part = real(threshold, "threshold");
        if (!(part >= 0.0 && part < 1.0)) throw py::value_error("threshold must be in [0, 1), got " + std::string(py::repr(threshold)));
        return count == 0 || s[0] == 0.0 ? 0 : std::count_if(s, s + count, [&](double x) { return x > part * s[0]; });
    }
    const auto which = static_cast<RankRule>(choice(rule, "rule", {"gavish-donoho", "marchenko-pastur"}));
    if (shape.is_none()) throw py::value_error("rule " + std::string(py::repr(rule)) + " needs shape");
    if (!(PyTuple_Check(shape.ptr()) || PyList_Check(shape.ptr())) || py::len(shape) != 2)
        throw py::value_error("shape must be a pair (m, n), got " + std::string(py::repr(shape)));
    const auto pair = py::tuple(py::reinterpret_borrow<py::object>(shape));
    return rank_by_rule(s, count, which, whole_number(pair[0], "shape[0]", 1), whole_number(pair[1], "shape[1]", 1),
                        noise.is_none() ? std::numeric_limits<double>::quiet_NaN() : real(noise, "noise", 0.0));
}

} // namespace

void register_decompositions(py::module_ &m) {
    using py::arg;
    m.def(
        "truncated_svd",
        [](const py::object & /* call */, const py::object &a, py::handle rank, py::handle energy, py::handle tol, py::handle oversample, py::handle power,
           const py::object &initial, std::uint64_t key, py::handle signs) {
            load_lapack();
            const bool flipped = signs_by_u(signs);
            const Array x(a, "A");
            x.require_ndim(2);
            const auto o = truncated_options(rank, energy, tol, oversample, power, key, x.rows(), x.cols());
            return dispatch(x.dtype(), [&](auto t) {
                const auto view = x.matrix<const decltype(t)>();
                std::optional<DenseOperator<decltype(t)>> op;
                {
                    const py::gil_scoped_release release;
                    op.emplace(view);
                }
                return run<decltype(t)>(*op, o, initial, flipped);
            });
        },
        arg("call"), arg("A"), arg("rank"), arg("energy"), arg("tol"), arg("oversample"), arg("power_iterations"), arg("initial"), arg("key"), arg("signs"));
    m.def(
        "truncated_svd_csr",
        [](const py::object &data, const py::object &indices, const py::object &indptr, std::int64_t rows, std::int64_t cols, py::handle rank,
           py::handle energy, py::handle tol, py::handle oversample, py::handle power, const py::object &initial, std::uint64_t key, py::handle signs) {
            load_lapack();
            const bool flipped = signs_by_u(signs);
            const Csr x(data, indices, indptr, rows, cols, "A");
            const auto o = truncated_options(rank, energy, tol, oversample, power, key, rows, cols);
            return dispatch(x.dtype(), [&](auto t) {
                std::optional<CsrOperator<decltype(t)>> op;
                {
                    const py::gil_scoped_release release;
                    op.emplace(x.view<decltype(t)>());
                }
                return run<decltype(t)>(*op, o, initial, flipped);
            });
        },
        arg("data"), arg("indices"), arg("indptr"), arg("rows"), arg("cols"), arg("rank"), arg("energy"), arg("tol"), arg("oversample"),
        arg("power_iterations"), arg("initial"), arg("key"), arg("signs"));
    m.def(
        "truncated_svd_operator",
        [](const py::object &a, py::handle rank, py::handle energy, py::handle tol, py::handle oversample, py::handle power, const py::object &initial,
           std::uint64_t key, py::handle signs) {
            load_lapack();
            const bool flipped = signs_by_u(signs);
            const OperatorArgument x(a);
            const auto o = truncated_options(rank, energy, tol, oversample, power, key, x.rows, x.cols);
            return dispatch(x.single ? DType::f32 : DType::f64, [&](auto t) {
                PythonOperator<decltype(t)> op(x.matmat, x.rmatmat, x.rows, x.cols);
                return run<decltype(t)>(op, o, initial, flipped);
            });
        },
        arg("A"), arg("rank"), arg("energy"), arg("tol"), arg("oversample"), arg("power_iterations"), arg("initial"), arg("key"), arg("signs"));
    m.def("is_single_operator", [](const py::object &a) { return OperatorArgument(a).single; }, arg("A"));
    m.def("choose_rank", &choose_rank, arg("singular_values"), arg("energy"), arg("threshold"), arg("rule"), arg("shape"), arg("noise"));
    m.def(
        "column_moments",
        [](const py::object &x, const py::object &mean, const py::object &scatter) {
            const Array a(x, "X"), am(mean, "mean", true), as(scatter, "scatter", true);
            a.require_ndim(2);
            am.require_dtype(DType::f64);
            as.require_dtype(DType::f64);
            double *pm = am.vector<double>(a.shape(1)), *ps = as.vector<double>(a.shape(1));
            const py::gil_scoped_release release;
            dispatch(a.dtype(), [&](auto t) { column_moments(a.matrix<const decltype(t)>(), pm, ps); });
        },
        py::arg("x"), py::arg("mean"), py::arg("scatter"));
    m.def(
        "column_moments_csr",
        [](const py::object &data, const py::object &indices, const py::object &indptr, std::int64_t rows, std::int64_t cols, const py::object &mean,
           const py::object &scatter) {
            const Csr x(data, indices, indptr, rows, cols, "X");
            const Array am(mean, "mean", true), as(scatter, "scatter", true);
            am.require_dtype(DType::f64);
            as.require_dtype(DType::f64);
            am.require_ndim(1);
            as.require_ndim(1);
            double *pm = am.vector<double>(cols), *ps = as.vector<double>(cols);
            const py::gil_scoped_release release;
            dispatch(x.dtype(), [&](auto t) { column_moments(x.view<decltype(t)>(), pm, ps); });
        },
        py::arg("data"), py::arg("indices"), py::arg("indptr"), py::arg("rows"), py::arg("cols"), py::arg("mean"), py::arg("scatter"));
    m.def(
        "affine_coordinates",
        [](const py::object &x, const py::object &mean, const py::object &components, const py::object &out) {
            const Array a(x, "X"), am(mean, "mean"), v(components, "components"), z(out, "out", true);
            am.require_dtype(DType::f64);
            am.require_ndim(1);
            v.require_dtype(a.dtype());
            z.require_dtype(a.dtype());
            v.require_ndim(2);
            check_no_overlap(z, a);
            dispatch(a.dtype(), [&](auto t) {
                using T = decltype(t);
                const auto rows = a.matrix<const T>();
                const auto basis = v.matrix<const T>();
                const auto into = z.matrix<T>();
                if (basis.cols != rows.cols || basis.row_stride != basis.cols || basis.col_stride != 1 || into.rows != rows.rows || into.cols != basis.rows)
                    throw ValueError("affine_coordinates: shapes do not fit");
                const double *shift = am.vector<double>(rows.cols);
                const py::gil_scoped_release release;
                affine_coordinates<T>(rows, shift, basis.data, basis.rows, into);
            });
        },
        py::arg("x"), py::arg("mean"), py::arg("components"), py::arg("out"));
    m.def(
        "affine_coordinates_csr",
        [](const py::object &data, const py::object &indices, const py::object &indptr, std::int64_t rows, std::int64_t cols, const py::object &mean,
           const py::object &components, const py::object &out) {
            const Csr x(data, indices, indptr, rows, cols, "X");
            const Array am(mean, "mean"), v(components, "components"), z(out, "out", true);
            am.require_dtype(DType::f64);
            am.require_ndim(1);
            v.require_dtype(x.dtype());
            z.require_dtype(x.dtype());
            v.require_ndim(2);
            x.check_no_overlap_with(z);
            dispatch(x.dtype(), [&](auto t) {
                using T = decltype(t);
                const auto basis = v.matrix<const T>();
                const auto into = z.matrix<T>();
                if (basis.cols != cols || basis.row_stride != basis.cols || basis.col_stride != 1 || into.rows != rows || into.cols != basis.rows)
                    throw ValueError("affine_coordinates: shapes do not fit");
                const double *shift = am.vector<double>(cols);
                const auto view = x.view<T>();
                const py::gil_scoped_release release;
                affine_coordinates<T>(view, shift, basis.data, basis.rows, into);
            });
        },
        py::arg("data"), py::arg("indices"), py::arg("indptr"), py::arg("rows"), py::arg("cols"), py::arg("mean"), py::arg("components"), py::arg("out"));
    m.def(
        "product_svd",
        [](const py::object & /* call */, const py::object &a, const py::object &b, py::handle rank, py::handle signs) {
            load_lapack();
            const std::int64_t most = rank.is_none() ? 0 : whole_number(rank, "rank", 1);
            const Array x(a, "A"), y(b, "B");
            y.require_dtype_of(x);
            const bool flipped = signs_by_u(signs);
            return dispatch(x.dtype(), [&](auto t) {
                const auto va = x.matrix<const decltype(t)>(), vb = y.matrix<const decltype(t)>();
                TruncatedSvd<decltype(t)> d;
                {
                    const py::gil_scoped_release release;
                    d = product_svd<decltype(t)>(va, vb, most);
                }
                return pack(std::move(d), flipped);
            });
        },
        py::arg("call"), py::arg("A"), py::arg("B"), py::arg("rank"), py::arg("signs"));
    m.def(
        "merge_svd",
        [](const py::object & /* call */, const py::tuple &a, const py::tuple &b, py::handle rank, py::handle forgotten, py::handle signs) {
            load_lapack();
            const std::int64_t most = whole_number(rank, "rank", 1);
            const double forget = real(forgotten, "forget");
            if (!(forget > 0.0 && forget <= 1.0)) throw py::value_error("forget must be in (0, 1], got " + std::string(py::repr(forgotten)));
            const Array xva(a[2], "a.Vh"), xsa(a[1], "a.S"), xvb(b[2], "b.Vh"), xsb(b[1], "b.S");
            std::optional<Array> xua, xub;
            if (!a[0].is_none()) xua.emplace(a[0], "a.U");
            if (!b[0].is_none()) xub.emplace(b[0], "b.U");
            if (xua.has_value() != xub.has_value()) throw py::value_error("U must be given in both decompositions or in neither");
            for (const Array *x : {&xsa, &xvb, &xsb}) x->require_dtype_of(xva);
            for (const auto *x : {&xua, &xub})
                if (*x) (*x)->require_dtype_of(xva);
            const bool flipped = signs_by_u(signs);
            return dispatch(xva.dtype(), [&](auto t) {
                using T = decltype(t);
                const auto ma = xva.matrix<const T>(), mb = xvb.matrix<const T>();
                MatrixView<const T> uu, ww;
                if (xua && xub) {
                    uu = xua->matrix<const T>();
                    ww = xub->matrix<const T>();
                }
                const auto values = [](const Array &s, std::int64_t k, double factor) {
                    s.require_ndim(1);
                    s.require_shape({k});
                    std::vector<T> out(std::size_t(k), T(0));
                    for (std::int64_t i = 0; i < k; ++i) out[std::size_t(i)] = static_cast<const T *>(s.data())[i * s.stride(0)] * T(factor);
                    return out;
                };
                const std::vector<T> ps = values(xsa, ma.rows, forget), pt = values(xsb, mb.rows, 1.0);
                TruncatedSvd<T> d;
                {
                    const py::gil_scoped_release release;
                    d = merge_svd<T>(uu, ps.data(), ma, ww, pt.data(), mb, most);
                }
                return pack(std::move(d), flipped);
            });
        },
        py::arg("call"), py::arg("a"), py::arg("b"), py::arg("rank"), py::arg("forget"), py::arg("signs"));
    // New bases of low-rank projections of gradients: for each what it is now: (basis (n, r), first vector, |cos| of the two first
    // ones or None).
    m.def(
        "refresh_bases",
        [](py::handle context, const py::list &given) {
            const Call call(context);
            load_lapack();
            std::deque<RefreshArguments> jobs; // all of them looked at before the first one is worked on
            for (const auto x : given) jobs.emplace_back(call, py::cast<py::tuple>(x));
            py::list found;
            for (const RefreshArguments &job : jobs) {
                found.append(dispatch(job.g.dtype(), [&](auto t) -> py::tuple {
                    using T = decltype(t);
                    auto a = job.g.matrix<const T>();
                    if (!job.right) a = a.transposed();
                    std::optional<Array> last, first;
                    MatrixView<const T> start;
                    if (!job.last_basis.is_none()) start = last.emplace(job.last_basis, "basis").template matrix<const T>().transposed();
                    if (!job.last_first.is_none()) first.emplace(job.last_first, "first");
                    const TruncatedOptions o{job.rank, 0.0, 0.0, job.more, job.power, job.key};
                    TruncatedSvd<T> d;
                    {
                        const py::gil_scoped_release release;
                        std::optional<DenseOperator<T>> op;
                        try {
                            op.emplace(a);
                        } catch (const ValueError &) { // who calls knows it by another name
                            throw ValueError(job.name + " holds NaN or infinity");
                        }
                        d = truncated_svd<T>(*op, o, start);
                    }
                    const std::int64_t n = d.n, k = d.k;
                    auto basis = uninitialised<T>(n * k), one = uninitialised<T>(n);
                    for (std::int64_t j = 0; j < n; ++j)
                        for (std::int64_t i = 0; i < k; ++i) basis[std::size_t(j * k + i)] = d.vh[std::size_t(i * n + j)];
                    std::copy_n(d.vh.data(), n, one.get());
                    py::object cosine = py::none();
                    if (first) {
                        const T *was = first->template vector<const T>(n);
                        double sum = 0;
                        for (std::int64_t j = 0; j < n; ++j) sum += double(one[std::size_t(j)]) * double(was[j]);
                        cosine = py::float_(std::abs(sum));
                    }
                    return py::make_tuple(hand_over(std::move(basis), {py::ssize_t(n), py::ssize_t(k)}), hand_over(std::move(one), {py::ssize_t(n)}), cosine);
                }));
            }
            return found;
        },
        py::arg("call"), py::arg("jobs"));
}

} // namespace subspan::bind
