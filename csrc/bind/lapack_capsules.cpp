// Fills the LAPACK table from the C function pointers that SciPy publishes in scipy.linalg.cython_lapack. A capsule's
// name is the C signature of its function; `int *` in it says LP64, which is what the table expects.
#include "lapack_capsules.hpp"

#include "subspan/blas.hpp"

#include <atomic>
#include <string>

namespace subspan::bind {
namespace {

template <class F> void fetch(F &slot, const py::dict &api, const std::string &name) {
    if (!api.contains(name.c_str())) throw py::import_error("scipy.linalg.cython_lapack has no " + name + "; SciPy 1.13 or newer is needed");
    const py::object capsule = api[name.c_str()];
    const char *signature = PyCapsule_GetName(capsule.ptr());
    if (signature == nullptr || std::string(signature).find("int *") == std::string::npos)
        throw py::import_error("scipy.linalg.cython_lapack." + name + " has the signature '" + (signature ? signature : "") +
                               "', not LP64: this build of SciPy uses 64-bit integers");
    slot = reinterpret_cast<F>(PyCapsule_GetPointer(capsule.ptr(), signature));
}

template <class T> void fill(const py::dict &api, const std::string &p) {
    LapackTable<T> t;
    fetch(t.gesdd, api, p + "gesdd");
    fetch(t.geqrf, api, p + "geqrf");
    fetch(t.orgqr, api, p + "orgqr");
    fetch(t.geqp3, api, p + "geqp3");
    set_lapack(t);
}

} // namespace

void load_lapack() {
    // Runs once per process; the GIL, or the import lock of a free-threaded build, makes repeats harmless.
    static std::atomic<bool> done{false};
    if (done) return;
    const py::dict api = py::module_::import("scipy.linalg.cython_lapack").attr("__pyx_capi__");
    fill<float>(api, "s");
    fill<double>(api, "d");
    done = true;
}

} // namespace subspan::bind
