// Arrays of either module by their layout: what they look like, and whether an output shares memory with an input. Only addresses are compared: device memory is never read.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace subspan::bind {

/// Where the items of an array lie.
struct Layout {
    const char *name;
    const void *data;
    std::int64_t item; // bytes
    const std::int64_t *shape, *strides; // strides in items
    int ndim;
};

/// As Python writes a shape.
std::string shape_text(const std::vector<std::int64_t> &shape);

/// ValueError when writing `out` would change `other` before it is read: they share memory and are not the same view.
/// With `same` they may be the same view. Also when two elements of `out` are one.
void check_no_overlap(const Layout &out, const Layout &other, bool same = false);

/// The same for lists: no output may share memory with anything of another entry.
void check_entries_overlap(const std::vector<Layout> &outs, const std::vector<std::vector<Layout>> &inputs);

} // namespace subspan::bind
