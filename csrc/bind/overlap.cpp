#include "overlap.hpp"

#include <algorithm>
#include <cstdlib>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <string>
#include <utility>
#include <vector>

namespace subspan::bind {

namespace py = pybind11;

namespace {

// First and one past the last byte that an array touches.
std::pair<const char *, const char *> extent(const Layout &a) {
    std::int64_t low = 0, high = 0;
    for (int i = 0; i < a.ndim; ++i) {
        if (a.shape[i] == 0) return {nullptr, nullptr};
        (a.strides[i] < 0 ? low : high) += (a.shape[i] - 1) * a.strides[i];
    }
    const auto *p = static_cast<const char *>(a.data);
    return {p + low * a.item, p + (high + 1) * a.item};
}

py::array as_numpy(const Layout &a) {
    std::vector<py::ssize_t> shape, strides;
    for (int i = 0; i < a.ndim; ++i) {
        shape.push_back(py::ssize_t(a.shape[i]));
        strides.push_back(py::ssize_t(a.strides[i] * a.item));
    }
    return py::array(py::dtype("V" + std::to_string(a.item)), shape, strides, a.data, py::none());
}

} // namespace

std::string shape_text(const std::vector<std::int64_t> &shape) {
    std::string s = "(";
    for (std::size_t i = 0; i < shape.size(); ++i) s += (i ? ", " : "") + std::to_string(shape[i]);
    return s + (shape.size() == 1 ? ",)" : ")");
}

void check_no_overlap(const Layout &out, const Layout &other, bool same) {
    for (int i = 0; i < out.ndim; ++i)
        if (out.shape[i] == 0) return;
    // From the shortest stride on, each one must clear what those before it reach.
    std::vector<std::pair<std::int64_t, std::int64_t>> axes;
    for (int i = 0; i < out.ndim; ++i)
        if (out.shape[i] > 1) axes.emplace_back(std::abs(out.strides[i]), out.shape[i]);
    std::sort(axes.begin(), axes.end());
    std::int64_t reach = 0;
    for (const auto &[stride, count] : axes) {
        if (stride <= reach) throw py::value_error(std::string(out.name) + " is a broadcast view or overlaps itself: several of its elements are one");
        reach += stride * (count - 1);
    }
    if (same && out.data == other.data && out.ndim == other.ndim) {
        bool equal = true;
        for (int i = 0; i < out.ndim; ++i) equal = equal && out.shape[i] == other.shape[i] && (out.shape[i] <= 1 || out.strides[i] == other.strides[i]);
        if (equal) return;
    }
    const auto a = extent(out), b = extent(other);
    if (a.first == nullptr || b.first == nullptr || a.second <= b.first || b.second <= a.first) return;
    const auto numpy = py::module_::import("numpy");
    bool shared = true;
    try {
        shared = py::cast<bool>(numpy.attr("shares_memory")(as_numpy(out), as_numpy(other), py::arg("max_work") = 1000000));
    } catch (py::error_already_set &e) { // too hard to tell: taken for an overlap
        if (!e.matches(numpy.attr("exceptions").attr("TooHardError"))) throw;
    }
    if (shared)
        throw py::value_error(std::string(out.name) + " overlaps " + other.name + (same ? " without being the same view" : "") +
                              "; the result would depend on the order of writes");
}

void check_entries_overlap(const std::vector<Layout> &outs, const std::vector<std::vector<Layout>> &inputs) {
    struct Piece {
        const char *low, *high;
        std::size_t entry;
        const Layout *layout;
        bool out;
    };
    std::vector<Piece> pieces;
    const auto add = [&](std::size_t entry, const Layout &x, bool out) {
        const auto [low, high] = extent(x);
        if (low != nullptr) pieces.push_back({low, high, entry, &x, out});
    };
    for (std::size_t i = 0; i < outs.size(); ++i) {
        add(i, outs[i], true);
        for (const Layout &x : inputs[i]) add(i, x, false);
    }
    std::sort(pieces.begin(), pieces.end(), [](const Piece &a, const Piece &b) { return a.low < b.low; });
    std::vector<const Piece *> open; // those that reach past where the next one begins
    for (const Piece &p : pieces) {
        open.erase(std::remove_if(open.begin(), open.end(), [&](const Piece *o) { return o->high <= p.low; }), open.end());
        for (const Piece *o : open) {
            if (o->entry == p.entry || (!o->out && !p.out)) continue;
            if (p.out)
                check_no_overlap(*p.layout, *o->layout);
            else
                check_no_overlap(*o->layout, *p.layout);
        }
        open.push_back(&p);
    }
}

} // namespace subspan::bind
