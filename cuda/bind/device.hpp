// Arrays of a CUDA device as the kernels take them, and memory for their work.
#pragma once

#include "array.hpp"
#include "scalars.hpp"
#include "subspan/cuda/types.hpp"

#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <thread>

namespace subspan::bind {

using cuda::Stack;

/// The last two axes as matrices (`inner` 2), or the last one as 1 x n matrices (1), over `batch`.
Stack stack(const Array &x, const Shape &batch, int inner = 2);
/// The array broadcast to a whole shape, whose last `inner` axes are the matrices.
Stack broadcast(const Array &x, const Shape &wanted, int inner);

/// Memory of the caller's library, alive until this goes away; its context may be used meanwhile.
class Memory {
  public:
    Memory(const Call &call, std::int64_t bytes);
    const cuda::Context &context() const { return context_; }

  private:
    cuda::Context context_;
    py::object owner_;
};

/// What has no kernel on a device says so here, for all functions and methods alike: raises.
[[noreturn]] void not_on_device(const std::string &name);

/// One call at a time of an object that threads share: waited for without the GIL, and so that Ctrl-C is heard.
class Exclusive {
  public:
    class Hold {
      public:
        explicit Hold(Exclusive &x) : x_(x) {
            if (x.owner_ == std::this_thread::get_id()) throw std::runtime_error("this object is in use by the same thread: a signal handler cannot call it");
            for (bool got = x.mutex_.try_lock(); !got;) {
                {
                    const py::gil_scoped_release release;
                    got = x.mutex_.try_lock_for(std::chrono::milliseconds(50));
                }
                if (!got && PyErr_CheckSignals() != 0) throw py::error_already_set();
            }
            x.owner_ = std::this_thread::get_id();
        }
        Hold(const Hold &) = delete;
        Hold &operator=(const Hold &) = delete;
        ~Hold() {
            x_.owner_ = std::thread::id();
            x_.mutex_.unlock();
        }

      private:
        Exclusive &x_;
    };

  private:
    std::timed_mutex mutex_;
    std::atomic<std::thread::id> owner_{};
};

/// The array, or a contiguous copy where cuBLAS could read neither the rows nor the columns of its matrices.
Array for_blas(const Call &call, py::handle x, const char *name);

class Packed;
/// A core over the leading axes of a call: a stack of diagonals or matrices, or where there is none a multiple of the identity.
struct CoreStack {
    const Stack *matrix = nullptr;
    bool diagonal = false;
    double value = 1.0;
};
/// out = alpha C + V M (VᵀC), or from the right, with V dense or packed.
void apply_core(const Call &call, const Array &c, const Array *v, const Packed *packed, const CoreStack &core, double alpha, bool left, const Array &out,
                const Shape &batch, const Array *source = nullptr);

/// Bindings that others are made of: (V, tau, T, R); Q, or its first columns; the columns of Q behind those of U.
py::tuple householder_qr(py::handle call, py::handle a, py::handle pivoting);
py::object factored_array(py::handle call, py::handle v, py::handle t, py::handle full);
py::object complement(py::handle call, py::handle u, py::handle check);

} // namespace subspan::bind
