#include "register.hpp"

PYBIND11_MODULE(_core, m, pybind11::mod_gil_not_used()) {
    m.doc() = "Compiled kernels of subspan. Use the functions of the package instead.";
    subspan::bind::register_runtime(m);
    subspan::bind::register_streaming(m);
    subspan::bind::register_decompositions(m);
    subspan::bind::register_frequent_directions(m);
    subspan::bind::register_orth(m);
    subspan::bind::register_spaces(m);
    subspan::bind::register_householder(m);
    subspan::bind::register_grassmann(m);
    subspan::bind::register_plucker(m);
    subspan::bind::register_exterior(m);
}
