// A basis as an argument of both modules: dense, or the 4-bit codes of an Int4Basis; and what C <- alpha C + V M (VᵀC) takes.
#pragma once

#include "array.hpp"
#include "scalars.hpp"
#include "subspan/errors.hpp"
#include "subspan/sizes.hpp"

#include <cmath>
#include <limits>
#include <optional>

namespace subspan::bind {

/// The parts (codes, scale, zero, rows, columns, group) that an Int4Basis gives.
class Packed {
  public:
    Packed(const Call &call, const py::tuple &parts, const char *name)
        : codes_(call, parts[0], "codes", Access::read, true), scale_(call, parts[1], "scale"), zero_(call, parts[2], "zero"),
          rows_(py::cast<std::int64_t>(parts[3])), cols_(py::cast<std::int64_t>(parts[4])), group_(py::cast<std::int64_t>(parts[5])) {
        const std::int64_t n = checked_product({rows_, cols_}, name);
        if (group_ < 1) throw py::value_error(std::string(name) + ": group must be at least 1, got " + std::to_string(group_));
        group_ = std::min(group_, std::max<std::int64_t>(n, 1));
        groups_ = (n + group_ - 1) / group_;
        codes_.require_dtype(DType::u8);
        zero_.require_dtype(scale_.dtype());
        const auto fits = [&](const Array &a, std::int64_t length) {
            if (a.shape() == Shape{length}) return;
            throw py::value_error(std::string(a.name()) + " of " + name + " must have shape (" + std::to_string(length) + ",) for a matrix " +
                                  bind::shape_text({rows_, cols_}) + " in groups of " + std::to_string(group_) + ", got " + a.shape_text());
        };
        fits(codes_, (n + 1) / 2);
        for (const Array *a : {&scale_, &zero_}) fits(*a, groups_);
        for (const Array *a : {&codes_, &scale_, &zero_}) a->contiguous();
    }
    DType dtype() const { return scale_.dtype(); }
    std::int64_t rows() const { return rows_; }
    std::int64_t cols() const { return cols_; }
    std::int64_t group() const { return group_; }
    const Array &codes() const { return codes_; }
    const Array &scale() const { return scale_; }
    const Array &zero() const { return zero_; }
    void check_no_overlap_with(const Array &out) const {
        for (const Array *a : {&codes_, &scale_, &zero_}) check_no_overlap(out, *a);
    }
    template <class T> Int4View<T> view() const {
        return {static_cast<const std::uint8_t *>(codes_.data()),
                static_cast<const T *>(scale_.data()),
                static_cast<const T *>(zero_.data()),
                rows_,
                cols_,
                group_};
    }

  private:
    Array codes_, scale_, zero_;
    std::int64_t rows_, cols_, group_, groups_ = 0;
};

/// V as a dense stack, a vector as one column, or an Int4Basis.
class BasisArgument {
  public:
    BasisArgument(const Call &call, py::handle v, const char *name) : name_(name), given_(py::reinterpret_borrow<py::object>(v)) {
        if (PyTuple_Check(v.ptr())) throw py::value_error(std::string(name) + " is a tuple; a pair of bases goes with side='both'");
        if (!PyObject_TypeCheck(v.ptr(), py::detail::npy_api::get().PyArray_Type_) && py::hasattr(v, "_parts")) {
            packed_.emplace(call, py::tuple(v.attr("_parts")()), name);
            return;
        }
        dense_.emplace(call, v, name);
        dense_->as_matrix(true);
        dense_->require_matrices();
    }
    const char *name() const { return name_; }
    const py::object &object() const { return given_; }
    DType dtype() const { return dense_ ? dense_->dtype() : packed_->dtype(); }
    std::int64_t rows() const { return dense_ ? dense_->rows() : packed_->rows(); }
    std::int64_t cols() const { return dense_ ? dense_->cols() : packed_->cols(); }
    Shape leading() const { return dense_ ? dense_->leading() : Shape{}; }
    const Array *dense() const { return dense_ ? &*dense_ : nullptr; }
    const Packed *packed() const { return packed_ ? &*packed_ : nullptr; }
    void check_no_overlap_with(const Array &out) const {
        if (dense_)
            check_no_overlap(out, *dense_);
        else
            packed_->check_no_overlap_with(out);
    }
    /// TypeError and ValueError unless this acts on c from that side.
    void require_fits(const Array &c, bool left) const {
        const DType wanted = packed_ ? wide(c.dtype()) : c.dtype();
        if (dtype() != wanted)
            throw py::type_error(wanted == c.dtype()
                                     ? std::string(name_) + " must be " + name_of(wanted) + " as " + c.name() + " is, got " + name_of(dtype())
                                     : std::string(c.name()) + " is " + c.dtype_name() + " and the codes of " + name_ + " stand for " + name_of(dtype()));
        const std::int64_t want = left ? c.rows() : c.cols();
        if (rows() != want)
            throw py::value_error(std::string(name_) + " must have " + std::to_string(want) + " rows to act on " + c.name() + " " + c.shape_text() +
                                  " from the " + (left ? "left" : "right") + ", got " + std::to_string(rows()) + convolution_hint(c.shape(), c.name()));
    }

  private:
    const char *name_;
    py::object given_;
    std::optional<Array> dense_;
    std::optional<Packed> packed_;
};

/// M: a number, a diagonal, or matrices. Of 16 bits beside arrays of them it is converted to float32.
class CoreArgument {
  public:
    CoreArgument(const Call &call, py::handle m, DType dtype) {
        if (is_number(m)) {
            value_ = real(m, "M");
            return;
        }
        array_.emplace(call, m, "M");
        if (array_->ndim() == 0) {
            value_ = real(array_->object().attr("item")(), "M");
            array_.reset();
            return;
        }
        if (array_->dtype() == wide(dtype)) return;
        if (array_->dtype() != dtype)
            throw py::type_error(std::string("M must be ") + name_of(dtype) +
                                 (dtype == wide(dtype) ? std::string(" as C is") : std::string(" or ") + name_of(wide(dtype))) + ", got " +
                                 array_->dtype_name());
        converted_ = call.place.attr("converted")(array_->object(), name_of(wide(dtype)));
        array_.emplace(call, converted_, "M");
    }
    explicit CoreArgument(double value) : value_(value) {}
    double value() const { return value_; }
    const Array *array() const { return array_ ? &*array_ : nullptr; }
    bool diagonal() const { return array_ && array_->ndim() == 1; }
    void require_fits(std::int64_t k, const char *name) const {
        if (!array_) return;
        const bool fits = array_->cols() == k && (diagonal() || array_->rows() == k);
        if (!fits)
            throw py::value_error("M must be a number, or have shape (" + std::to_string(k) + ",) or (..., " + std::to_string(k) + ", " + std::to_string(k) +
                                  ") for the " + std::to_string(k) + " columns of " + name + ", got shape " + array_->shape_text());
    }

  private:
    double value_ = 1.0;
    py::object converted_;
    std::optional<Array> array_;
};

/// The one rank of all matrices of a stack.
inline std::int64_t one_rank(const std::vector<std::int64_t> &ranks) {
    for (const auto r : ranks)
        if (r != ranks[0]) {
            std::vector<std::int64_t> all(ranks);
            std::sort(all.begin(), all.end());
            all.erase(std::unique(all.begin(), all.end()), all.end());
            std::string text;
            for (const auto x : all) text += (text.empty() ? "" : ", ") + std::to_string(x);
            throw ValueError("the matrices of the stack give spaces of different dimensions, [" + text + "], which no one array can hold");
        }
    return ranks.empty() ? 0 : ranks[0];
}

/// The sine above which a direction is outside of a space: eps^(2/3) where None was given.
inline double tolerance(py::handle tol, DType dtype) {
    if (tol.is_none()) return std::pow(dtype == DType::f32 ? double(std::numeric_limits<float>::epsilon()) : std::numeric_limits<double>::epsilon(), 2.0 / 3.0);
    const double value = real(tol, "tol", 0.0);
    if (value >= 1) throw py::value_error("tol must be in [0, 1), got " + std::string(py::repr(tol)));
    return value;
}

/// The share of the first singular value that a value counts from: max(m, n) eps where None was given.
inline double cutoff(py::handle rcond, const Array &a) {
    if (rcond.is_none())
        return double(std::max(a.rows(), a.cols())) *
               (a.dtype() == DType::f32 ? double(std::numeric_limits<float>::epsilon()) : std::numeric_limits<double>::epsilon());
    const double value = real(rcond, "rcond", 0.0);
    if (value >= 1) throw py::value_error("rcond must be in [0, 1), got " + std::string(py::repr(rcond)));
    return value;
}

inline bool is_both(py::handle side) { return PyUnicode_Check(side.ptr()) && PyUnicode_CompareWithASCIIString(side.ptr(), "both") == 0; }

/// What is promised of a basis: 1 orthonormal, 0 anything, -1 (None) orthonormal unless it is packed.
inline int promised(py::handle orthonormal) {
    if (orthonormal.is_none()) return -1;
    if (orthonormal.ptr() == Py_True) return 1;
    if (orthonormal.ptr() == Py_False) return 0;
    throw py::type_error("orthonormal must be True, False or None, got " + std::string(py::repr(orthonormal)));
}
inline int promised(int orthonormal, const BasisArgument &u) { return orthonormal < 0 ? (u.packed() != nullptr ? 0 : 1) : orthonormal; }

/// Reflections: V, and tau where it is given, of the same leading axes. `packed`: V is LAPACK's form, with ones implied on the diagonal and
/// zeros above it; of a wide matrix the columns beyond are R's.
struct ReflectionsArgument {
    ReflectionsArgument(const Call &call, py::handle given, py::handle scales, bool packed = false) : v(call, given, "V"), vector(v.ndim() == 1) {
        v.as_matrix(true);
        v.require_matrices();
        if (packed && scales.is_none()) throw py::value_error("packed=True needs tau: LAPACK's reflections are not all of unit length");
        cols = packed ? std::min(v.rows(), v.cols()) : v.cols();
        if (scales.is_none()) return;
        tau.emplace(call, scales, "tau");
        tau->require_dtype_of(v);
        Shape want = v.leading();
        want.push_back(cols);
        if (tau->shape() != want)
            throw py::value_error("tau must have one entry for each column of V, shape " + v.shape_text() + ", got shape " + tau->shape_text());
    }
    Array v;
    bool vector;
    std::optional<Array> tau;
    std::int64_t cols = 0;
};

/// C as matrices, and what becomes of the result's axes: a vector is a column where matrices act from the left, else a row.
struct Operand {
    Array c;
    bool vector, left;
    /// `both_too`: "both" is a side as well, of matrices.
    Operand(const Call &call, py::handle given, const char *name, py::handle side, bool both_too = false)
        : c(call, given, name), vector(c.ndim() == 1), left(true) {
        const int which = both_too ? choice(side, "side", {"left", "right", "both"}) : int(!is_left(side));
        if (which == 2 && vector) throw py::value_error("side='both' is for matrices; a vector has one side, 'left' or 'right'");
        left = which != 1;
        c.as_matrix(left);
        c.require_matrices();
    }
    Array output(const Call &call, const py::object &out, const Shape &batch, const char *name = "out") const {
        Shape shape = batch;
        if (!vector || left) shape.push_back(c.rows());
        if (!vector || !left) shape.push_back(c.cols());
        Array result = call.output(out, shape, c.dtype(), name);
        if (vector) result.add_axis(left);
        return result;
    }
};

/// U X, UᵀX (transpose), X U or X Uᵀ for a packed U.
struct PackedProduct {
    Packed u;
    Operand x;
    bool transpose;
    std::int64_t rows, cols; // of U, or of Uᵀ
    PackedProduct(const Call &call, const py::tuple &parts, py::handle given, const char *name, py::handle side, py::handle transposed)
        : u(call, parts, "U"), x(call, given, name, side), transpose(truth(transposed, "transpose")), rows(transpose ? u.cols() : u.rows()),
          cols(transpose ? u.rows() : u.cols()) {
        if (wide(x.c.dtype()) != u.dtype())
            throw py::type_error(std::string(name) + " must be " + name_of(u.dtype()) + " as the scales of the basis are, got " + x.c.dtype_name());
        if ((x.left ? x.c.rows() : x.c.cols()) != (x.left ? cols : rows))
            throw py::value_error(std::string(name) + " must have " + (x.left ? std::to_string(cols) + " rows" : std::to_string(rows) + " columns") +
                                  ", got shape " + x.c.shape_text() + convolution_hint(x.c.shape(), name));
    }
    Array output(const Call &call, const py::object &out) const {
        Shape shape = x.c.leading();
        if (!x.vector || x.left) shape.push_back(x.left ? rows : x.c.rows());
        if (!x.vector || !x.left) shape.push_back(x.left ? x.c.cols() : cols);
        Array result = call.output(out, shape, x.c.dtype());
        if (x.vector) result.add_axis(x.left);
        check_no_overlap(result, x.c);
        u.check_no_overlap_with(result);
        return result;
    }
};

/// base + ((source - base) R) Rᵀ.
class SwapArguments {
  public:
    SwapArguments(const Call &call, py::handle b, py::handle s, py::handle r)
        : base(call, b, "base"), source(call, s, "source"), vector_(base.ndim() == 1 && source.ndim() == 1), basis(call, orthonormal(r), "R") {
        for (Array *x : {&base, &source}) {
            if (vector_) x->as_matrix(false);
            x->require_matrices();
        }
        source.require_dtype_of(base);
        if (source.shape() != base.shape()) throw py::value_error("source must have the shape of base, " + base.shape_text() + ", got " + source.shape_text());
        basis.as_matrix(true);
        basis.require_matrices();
        basis.require_dtype_of(base);
        if (basis.rows() != base.cols())
            throw py::value_error("R must have " + std::to_string(base.cols()) + " rows, one for each column of base, got shape " + basis.shape_text() +
                                  convolution_hint(base.shape(), "base"));
        batch = broadcast_leading({{&base, 2}, {&basis, 2}});
    }
    Array output(const Call &call, const py::object &out) const {
        Shape shape = batch;
        if (!vector_) shape.push_back(base.rows());
        shape.push_back(base.cols());
        Array result = call.output(out, shape, base.dtype());
        if (vector_) result.add_axis(false);
        check_no_overlap(result, base, true);
        check_no_overlap(result, basis);
        check_no_overlap(result, source);
        return result;
    }
    Array base, source;

  private:
    static py::handle orthonormal(py::handle r) {
        if (!PyObject_TypeCheck(r.ptr(), py::detail::npy_api::get().PyArray_Type_) && py::hasattr(r, "_parts"))
            throw py::type_error("R is an Int4Basis, which is not orthonormal; pass orthonormalize(R.to_array())");
        return r;
    }
    bool vector_;

  public:
    Array basis;
    Shape batch;
};

/// Matrices; with `vectors` a vector is one column.
inline Array matrices(const Call &call, py::handle given, const char *name, bool vectors = true) {
    Array x(call, given, name);
    if (call.on_device()) require_float32_or_64(x);
    if (vectors) x.as_matrix(true);
    x.require_matrices();
    return x;
}

/// Two bases U and W of spaces in one space, and what their leading axes broadcast to.
struct TwoSpaces {
    TwoSpaces(const Call &call, py::handle a, py::handle b) : u(matrices(call, a, "U")), w(matrices(call, b, "W")) {
        w.require_dtype_of(u);
        if (u.rows() != w.rows())
            throw py::value_error("U and W must live in one space, got " + std::to_string(u.rows()) + " and " + std::to_string(w.rows()) + " rows");
        batch = broadcast_leading({{&u, 2}, {&w, 2}});
    }
    Array u, w;
    Shape batch;
};

/// How many coordinates U and W share: the last ones of U, the first ones of W.
inline std::int64_t shared_coordinates(py::handle shared, const Array &u, const Array &w) {
    const std::int64_t p = whole_number(shared, "shared", 0), most = std::min(u.rows(), w.rows());
    if (p > most) throw py::value_error("shared must be from 0 to " + std::to_string(most) + ", got " + std::to_string(p));
    return p;
}

/// ValueError unless v is a vector along the axis of C that is acted on.
inline void require_direction(const Array &v, const Array &c, bool left) {
    v.require_ndim(1);
    const std::int64_t length = left ? c.rows() : c.cols();
    if (v.shape(0) != length)
        throw py::value_error(std::string(v.name()) + " must have " + std::to_string(length) + " entries to act on C " + c.shape_text() + " from the " +
                              (left ? "left" : "right") + ", got " + std::to_string(v.shape(0)) + convolution_hint(c.shape(), "C"));
}

/// ValueError unless the reflections' vectors V act on C from that side.
inline void require_rows(const Array &v, const Array &c, bool left) {
    const std::int64_t rows = left ? c.rows() : c.cols();
    if (v.rows() != rows)
        throw py::value_error("V must have " + std::to_string(rows) + " rows to act on C " + c.shape_text() + " from the " + (left ? "left" : "right") +
                              ", got " + std::to_string(v.rows()) + convolution_hint(c.shape(), "C"));
}

/// The same of a Q that is there, in its own words: it is C that must fit.
inline void require_acts(const Array &q, const Array &c, bool left) {
    if (q.dtype() != c.dtype()) throw py::type_error(std::string("C must be ") + q.dtype_name() + " as Q is, got " + c.dtype_name());
    if ((left ? c.rows() : c.cols()) != q.rows())
        throw py::value_error("C must have " + std::to_string(q.rows()) + (left ? " rows" : " columns") + " as Q has, got shape " + c.shape_text() +
                              convolution_hint(c.shape(), "C"));
}

} // namespace subspan::bind
