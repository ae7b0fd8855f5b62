#include "subspan/exterior.hpp"

#include "host.hpp"
#include "register.hpp"

#include <pybind11/stl.h>

namespace subspan::bind {
namespace {

constexpr std::int64_t kMost = std::int64_t(1) << 31; // numbers of an array here, and dimensions of a space

// C(n, k), found out to be too much before it is computed: it passes 2³¹ after 34 factors.
std::int64_t choose(std::int64_t n, std::int64_t k, const std::string &what = "") {
    const std::int64_t few = std::min(k, n - k);
    if (few < 0) return 0;
    std::int64_t count = 1;
    for (std::int64_t i = 1; i <= few; ++i) {
        count = count * (n - few + i) / i;
        if (count > kMost)
            throw ValueError((what.empty() ? "n=" + std::to_string(n) + ", k=" + std::to_string(k) : what) + ": C(" + std::to_string(n) + ", " +
                             std::to_string(k) + ") is more than 2³¹, and no array here is as long");
    }
    return count;
}

struct Grades {
    std::int64_t n, k, length;
    Grades(py::handle dimension, py::handle grade, std::int64_t least = 1)
        : n(whole_number(dimension, "n", 1, kMost)), k(whole_number(grade, "k", least, kMost)) {
        if (k > n) throw py::value_error("k must be at most n, got k=" + std::to_string(k) + " and n=" + std::to_string(n));
        length = choose(n, k);
    }
};

// The last axis has as many entries as there are coordinates.
Array vectors(const Call &call, py::handle given, const char *name, std::int64_t length) {
    Array x(call, given, name);
    if (x.ndim() < 1) throw py::value_error(std::string(name) + " must have at least 1 dimension");
    if (length >= 0 && x.shape().back() != length)
        throw py::value_error(std::string(name) + " must have " + std::to_string(length) + " entries along its last axis, got shape " + x.shape_text());
    return x;
}

void finite(bool good, const char *what) {
    if (!good) throw py::value_error(std::string(what) + " overflows the dtype although the input is finite; scale what goes in");
}

Shape with(Shape lead, std::initializer_list<std::int64_t> more) {
    lead.insert(lead.end(), more);
    return lead;
}

std::int64_t minors_of(const Array &a) {
    const std::int64_t n = a.rows(), k = a.cols();
    if (k < 1 || k > n)
        throw py::value_error("A must have from 1 to " + std::to_string(n) + " columns of " + std::to_string(n) + " entries, got shape " + a.shape_text());
    return choose(n, k, "A, shape " + a.shape_text());
}

py::object coordinates(py::handle context, py::handle a, const py::object &out) {
    const Call call(context);
    const Array xa = matrices(call, a, "A", false);
    const Shape batch = xa.leading();
    const Array xo = call.output(out, with(batch, {minors_of(xa)}), xa.dtype());
    check_no_overlap(xo, xa);
    finite(dispatch(xa.dtype(),
                    [&](auto s) {
                        using T = decltype(s);
                        const auto va = xa.stack<const T>(batch);
                        const auto vo = xo.row_stack<T>(batch);
                        const py::gil_scoped_release release;
                        return subspan::plucker_coordinates<T>(va, vo);
                    }),
           "a minor");
    xo.written();
    return xo.object();
}

py::object coordinates_backward(py::handle context, py::handle grad, py::handle a) {
    const Call call(context);
    const Array xa = matrices(call, a, "A", false);
    const Shape batch = xa.leading();
    const std::int64_t count = minors_of(xa);
    const Array xg(call, grad, "grad");
    xg.require_dtype_of(xa);
    xg.require_shape(with(batch, {count}));
    const Array da = call.empty(xa.shape(), xa.dtype(), "dA");
    finite(dispatch(xa.dtype(),
                    [&](auto s) {
                        using T = decltype(s);
                        const auto vg = xg.row_stack<const T>(batch);
                        const auto va = xa.stack<const T>(batch);
                        const auto vda = da.stack<T>(batch);
                        const py::gil_scoped_release release;
                        return subspan::plucker_coordinates_backward<T>(vg, va, vda);
                    }),
           "the gradient of A");
    return da.object();
}

struct Factors {
    Array z, w;
    std::int64_t n = 0, k = 0, l = 0;
    Shape batch;
    Factors(const Call &call, py::handle a, py::handle b, py::handle dimension, py::handle grades)
        : z(vectors(call, a, "z", -1)), w(vectors(call, b, "w", -1)) {
        w.require_dtype_of(z);
        if (!(PyTuple_Check(grades.ptr()) || PyList_Check(grades.ptr())) || py::len(grades) != 2)
            throw py::type_error("grades must be a pair of integers, got " + std::string(py::repr(grades)));
        const auto pair = py::tuple(py::reinterpret_borrow<py::object>(grades));
        k = whole_number(pair[0], "grades[0]", 0, kMost);
        l = whole_number(pair[1], "grades[1]", 0, kMost);
        const std::string both = "(" + std::to_string(k) + ", " + std::to_string(l) + ")";
        if (dimension.is_none()) {
            if (k != 1 && l != 1) throw py::value_error("n is needed for grades " + both + ": neither of them is a vector, whose length is n");
            n = (k == 1 ? z : w).shape().back();
            if (n < 1) throw py::value_error("n must be at least 1, got " + std::to_string(n));
        } else {
            n = whole_number(dimension, "n", 1, kMost);
        }
        for (const auto &[x, grade] : {std::pair<const Array *, std::int64_t>{&z, k}, {&w, l}}) {
            const std::int64_t count = choose(n, grade, "n=" + std::to_string(n) + ", grades=" + both);
            if (x->shape().back() != count)
                throw py::value_error(std::string(x->name()) + " must have C(" + std::to_string(n) + ", " + std::to_string(grade) +
                                      ") = " + std::to_string(count) + " entries, got shape " + x->shape_text());
        }
        batch = broadcast_leading({{&z, 1}, {&w, 1}});
    }
};

py::object wedge(py::handle context, py::handle z, py::handle w, py::handle n, py::handle grades, const py::object &out) {
    const Call call(context);
    const Factors f(call, z, w, n, grades);
    const Array xo = call.output(out, with(f.batch, {choose(f.n, f.k + f.l)}), f.z.dtype());
    check_no_overlap(xo, f.z);
    check_no_overlap(xo, f.w);
    finite(dispatch(f.z.dtype(),
                    [&](auto s) {
                        using T = decltype(s);
                        const auto vz = f.z.row_stack<const T>(f.batch), vw = f.w.row_stack<const T>(f.batch);
                        const auto vo = xo.row_stack<T>(f.batch);
                        const py::gil_scoped_release release;
                        return subspan::wedge<T>(vz, vw, f.n, f.k, f.l, vo);
                    }),
           "the wedge");
    xo.written();
    return xo.object();
}

// Zeros over the shape, which a gradient of nothing keeps.
Array zeros(const Call &call, const Shape &shape, DType dtype, const char *name) {
    Array x = call.empty(shape, dtype, name);
    std::int64_t bytes = size_of(dtype);
    for (const auto n : shape) bytes *= n;
    std::fill_n(static_cast<char *>(x.data()), bytes, char(0));
    return x;
}

// Of every entry of the broadcast stack; Python sums them.
py::tuple wedge_backward(py::handle context, py::handle grad, py::handle z, py::handle w, py::handle n, py::handle grades) {
    const Call call(context);
    const Factors f(call, z, w, n, grades);
    const Array xg(call, grad, "grad");
    xg.require_dtype_of(f.z);
    xg.require_shape(with(f.batch, {choose(f.n, f.k + f.l)}));
    const Array dz = zeros(call, with(f.batch, {f.z.shape().back()}), f.z.dtype(), "dz"),
                dw = zeros(call, with(f.batch, {f.w.shape().back()}), f.z.dtype(), "dw");
    if (f.k + f.l <= f.n)
        finite(dispatch(f.z.dtype(),
                        [&](auto s) {
                            using T = decltype(s);
                            const auto vg = xg.row_stack<const T>(f.batch), vz = f.z.row_stack<const T>(f.batch), vw = f.w.row_stack<const T>(f.batch);
                            const auto vdz = dz.row_stack<T>(f.batch), vdw = dw.row_stack<T>(f.batch);
                            const py::gil_scoped_release release;
                            return subspan::wedge_backward<T>(vg, vz, vw, f.n, f.k, f.l, vdz, vdw);
                        }),
               "a gradient");
    return py::make_tuple(summed_to(call, dz, z, f.z.dtype()), summed_to(call, dw, w, f.z.dtype()));
}

py::object relations(py::handle context, py::handle p, py::handle n, py::handle k, const py::object &out) {
    const Call call(context);
    const Grades g(n, k);
    const Array xp = vectors(call, p, "p", g.length);
    const Shape batch = xp.leading(1);
    const std::int64_t rows = choose(g.n, g.k - 1), cols = choose(g.n, g.k + 1);
    const Array xo = call.output(out, with(batch, {rows, cols}), xp.dtype());
    check_no_overlap(xo, xp);
    if (rows * cols > 0)
        finite(dispatch(xp.dtype(),
                        [&](auto s) {
                            using T = decltype(s);
                            const auto vp = xp.row_stack<const T>(batch);
                            const auto vo = xo.stack<T>(batch);
                            const py::gil_scoped_release release;
                            return subspan::plucker_relations<T>(vp, g.n, g.k, vo);
                        }),
               "a relation");
    xo.written();
    return xo.object();
}

py::object relations_backward(py::handle context, py::handle grad, py::handle p, py::handle n, py::handle k) {
    const Call call(context);
    const Grades g(n, k);
    const Array xp = vectors(call, p, "p", g.length), xg(call, grad, "grad");
    xg.require_dtype_of(xp);
    const Shape batch = xp.leading(1);
    const std::int64_t rows = choose(g.n, g.k - 1), cols = choose(g.n, g.k + 1);
    xg.require_shape(with(batch, {rows, cols}));
    const Array dp = zeros(call, xp.shape(), xp.dtype(), "dp");
    if (rows * cols > 0)
        finite(dispatch(xp.dtype(),
                        [&](auto s) {
                            using T = decltype(s);
                            const auto vg = xg.stack<const T>(batch);
                            const auto vp = xp.row_stack<const T>(batch);
                            const auto vdp = dp.row_stack<T>(batch);
                            const py::gil_scoped_release release;
                            return subspan::plucker_relations_backward<T>(vg, vp, g.n, g.k, vdp);
                        }),
               "the gradient of p");
    return dp.object();
}

// p[i, j] in text.
std::string entry(const Shape &batch, std::int64_t item) {
    if (batch.empty()) return "p";
    std::string text;
    for (std::size_t a = batch.size(); a-- > 0;) {
        text = std::to_string(item % batch[a]) + (text.empty() ? "" : ", ") + text;
        item /= batch[a];
    }
    return "p[" + text + "]";
}

void named(std::int64_t item, const Shape &batch) {
    if (item >= 0) throw py::value_error(entry(batch, item) + " is zero or holds NaN or infinity, and spans nothing");
}

// ValueError unless p lies on its nearest wedge to √eps, the one whose basis is `basis`.
template <class T> void require_wedges(const StackView<const T> &p, const StackView<const T> &basis, const Grades &g, const Shape &batch) {
    const Temporary<double> wide(batch, g.n, g.k), unit(batch, 1, g.length);
    parallel_for(basis.size(), [&](std::int64_t i) {
        const auto from = basis[i];
        const auto to = wide.stack[i];
        for (std::int64_t r = 0; r < g.n; ++r)
            for (std::int64_t c = 0; c < g.k; ++c) to(r, c) = double(from(r, c));
    });
    subspan::plucker_coordinates<double>(wide.stack, unit.stack);
    double worst = 0;
    std::int64_t where = 0;
    for (std::int64_t i = 0; i < p.size(); ++i) {
        const auto x = p[i];
        const auto u = unit.stack[i];
        double size = 0, along = 0, rest = 0, length = 0;
        for (std::int64_t j = 0; j < g.length; ++j) size = std::max(size, std::abs(double(x(0, j))));
        for (std::int64_t j = 0; j < g.length; ++j) along += double(x(0, j)) / size * u(0, j);
        for (std::int64_t j = 0; j < g.length; ++j) {
            const double value = double(x(0, j)) / size, off = value - along * u(0, j);
            rest += off * off;
            length += value * value;
        }
        const double share = std::sqrt(rest / length);
        if (share > worst) {
            worst = share;
            where = i;
        }
    }
    const double tolerance = std::sqrt(double(std::numeric_limits<T>::epsilon()));
    if (worst <= tolerance) return;
    char found[32], most[32];
    std::snprintf(found, sizeof found, "%.1e", worst);
    std::snprintf(most, sizeof most, "%.1e", tolerance);
    throw ValueError(entry(batch, where) + " is no wedge of " + std::to_string(g.k) + " vectors: " + found +
                     " of its norm lies outside of the nearest wedge found, more than " + most + "; look at relations(p, n, k), or pass check=False");
}

py::object basis(py::handle context, py::handle p, py::handle n, py::handle k, py::handle check, const py::object &out) {
    const Call call(context);
    const Grades g(n, k);
    const Array xp = vectors(call, p, "p", g.length);
    const bool looks = truth(check, "check");
    const Shape batch = xp.leading(1);
    const Array xo = call.output(out, with(batch, {g.n, g.k}), xp.dtype());
    check_no_overlap(xo, xp);
    dispatch(xp.dtype(), [&](auto s) {
        using T = decltype(s);
        const auto vp = xp.row_stack<const T>(batch);
        const auto vo = xo.stack<T>(batch);
        std::int64_t item;
        {
            const py::gil_scoped_release release;
            item = subspan::plucker_basis<T>(vp, g.n, g.k, vo);
            if (item < 0 && looks) require_wedges<T>(vp, vo, g, batch);
        }
        named(item, batch);
    });
    xo.written();
    return xo.object();
}

py::object basis_backward(py::handle context, py::handle grad, py::handle p, py::handle n, py::handle k) {
    const Call call(context);
    const Grades g(n, k);
    const Array xp = vectors(call, p, "p", g.length), xg(call, grad, "grad");
    xg.require_dtype_of(xp);
    const Shape batch = xp.leading(1);
    xg.require_shape(with(batch, {g.n, g.k}));
    const Array dp = call.empty(xp.shape(), xp.dtype(), "dp");
    dispatch(xp.dtype(), [&](auto s) {
        using T = decltype(s);
        const auto vg = xg.stack<const T>(batch);
        const auto vp = xp.row_stack<const T>(batch);
        const auto vdp = dp.row_stack<T>(batch);
        std::int64_t item;
        {
            const py::gil_scoped_release release;
            item = subspan::plucker_basis_backward<T>(vg, vp, g.n, g.k, vdp);
        }
        finite(item != -2, "the gradient of p");
        named(item, batch);
    });
    return dp.object();
}

py::object complement_signs(py::handle n, py::handle k) {
    const Grades g(n, k, 0);
    const Array xo = Call().empty({g.length}, DType::f64);
    const py::gil_scoped_release release;
    subspan::complement_signs(g.n, g.k, static_cast<double *>(xo.data()));
    return xo.object();
}

py::object hodge(py::handle context, py::handle p, py::handle n, py::handle k) {
    const Call call(context);
    const Grades g(n, k, 0);
    const Array xp = vectors(call, p, "p", g.length);
    const Shape batch = xp.leading(1);
    const Array xo = call.empty(xp.shape(), xp.dtype());
    dispatch(xp.dtype(), [&](auto s) {
        using T = decltype(s);
        const auto vp = xp.row_stack<const T>(batch);
        const auto vo = xo.row_stack<T>(batch);
        const py::gil_scoped_release release;
        const std::unique_ptr<double[]> signs = uninitialised<double>(g.length);
        subspan::complement_signs(g.n, g.k, signs.get());
        for (std::int64_t i = 0; i < (vp.empty() ? 0 : vp.size()); ++i) {
            const auto from = vp[i];
            const auto to = vo[i];
            for (std::int64_t j = 0; j < g.length; ++j) // complements run backwards; no negative zeros
                to(0, g.length - 1 - j) = T(signs[std::size_t(j)]) * from(0, j) + T(0);
        }
    });
    return xo.object();
}

} // namespace

void register_exterior(py::module_ &m) {
    using py::arg;
    m.def("coordinates", &coordinates, arg("call"), arg("A"), arg("out"));
    m.def("coordinates_backward", &coordinates_backward, arg("call"), arg("grad"), arg("A"));
    m.def("wedge", &wedge, arg("call"), arg("z"), arg("w"), arg("n"), arg("grades"), arg("out"));
    m.def("wedge_backward", &wedge_backward, arg("call"), arg("grad"), arg("z"), arg("w"), arg("n"), arg("grades"));
    m.def("relations", &relations, arg("call"), arg("p"), arg("n"), arg("k"), arg("out"));
    m.def("relations_backward", &relations_backward, arg("call"), arg("grad"), arg("p"), arg("n"), arg("k"));
    m.def("basis", &basis, arg("call"), arg("p"), arg("n"), arg("k"), arg("check"), arg("out"));
    m.def("basis_backward", &basis_backward, arg("call"), arg("grad"), arg("p"), arg("n"), arg("k"));
    m.def("complement_signs", &complement_signs, arg("n"), arg("k"));
    m.def("hodge", &hodge, arg("call"), arg("p"), arg("n"), arg("k"));
}

} // namespace subspan::bind
