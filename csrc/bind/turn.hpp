// One call at a time of an object that threads share.
#pragma once

#include <atomic>
#include <chrono>
#include <mutex>
#include <pybind11/pybind11.h>
#include <stdexcept>
#include <thread>

namespace subspan::bind {

namespace py = pybind11;

/// Waiting for another thread's call hears Ctrl-C; a call out of a signal handler that stopped a call of the same thread is an error
/// instead of a deadlock. Locked without the GIL, as a thread that holds it would keep the other one from ending.
class Turn {
  public:
    void lock() {
        if (owner_.load(std::memory_order_relaxed) == std::this_thread::get_id())
            throw std::runtime_error("this object is in use by the same thread: a signal handler or a callback cannot call it");
        while (!mutex_.try_lock_for(std::chrono::milliseconds(50))) {
            const py::gil_scoped_acquire gil;
            if (PyErr_CheckSignals() != 0) throw py::error_already_set();
        }
        owner_.store(std::this_thread::get_id(), std::memory_order_relaxed);
    }
    void unlock() {
        owner_.store(std::thread::id(), std::memory_order_relaxed);
        mutex_.unlock();
    }
    bool try_lock() { // also for std::scoped_lock
        if (owner_.load(std::memory_order_relaxed) == std::this_thread::get_id() || !mutex_.try_lock()) return false;
        owner_.store(std::this_thread::get_id(), std::memory_order_relaxed);
        return true;
    }
    /// Locked by who holds the GIL, which is given up while it waits.
    void lock_with_gil() {
        if (try_lock()) return;
        const py::gil_scoped_release release;
        lock();
    }

    /// The same for a scope.
    class Held {
      public:
        explicit Held(Turn &turn) : turn_(turn) { turn_.lock_with_gil(); }
        Held(const Held &) = delete;
        Held &operator=(const Held &) = delete;
        ~Held() { turn_.unlock(); }

      private:
        Turn &turn_;
    };

  private:
    std::timed_mutex mutex_;
    std::atomic<std::thread::id> owner_{};
};

} // namespace subspan::bind
