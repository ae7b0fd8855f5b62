#include "subspan/blas.hpp"

#include "subspan/errors.hpp"

#include <atomic>
#include <memory>
#include <mutex>

namespace subspan {
namespace {
// Tables are never freed: a reader may still hold the one before.
template <class T> std::atomic<const LapackTable<T> *> &slot() {
    static std::atomic<const LapackTable<T> *> s{nullptr};
    return s;
}
} // namespace

template <class T> void set_lapack(const LapackTable<T> &t) {
    if (!t.gesdd || !t.geqrf || !t.orgqr || !t.geqp3) throw ValueError("set_lapack: every pointer of the table must be set");
    slot<T>().store(new LapackTable<T>(t), std::memory_order_release);
}

bool has_lapack() { return slot<double>().load(std::memory_order_acquire) != nullptr; }

template <class T> const LapackTable<T> &lapack() {
    const auto *t = slot<T>().load(std::memory_order_acquire);
    if (t == nullptr) throw BackendError("no LAPACK table is installed: call subspan::set_lapack (C++) or import subspan (Python)");
    return *t;
}

template void set_lapack<float>(const LapackTable<float> &);
template void set_lapack<double>(const LapackTable<double> &);
template const LapackTable<float> &lapack<float>();
template const LapackTable<double> &lapack<double>();

} // namespace subspan
