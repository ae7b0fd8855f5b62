// Work memory. Small problems are called tens of thousands of times: a buffer of a few hundred KiB that is mapped,
// faulted in and unmapped by each call costs more than the arithmetic (0.7 of 2.7 ms for the small matrix of a 256-row update).
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>
#include <vector>

namespace subspan {

/// Cache-line aligned, uninitialised, move-only.
template <class T> class Buffer {
  public:
    Buffer() = default;
    explicit Buffer(std::int64_t n) { reserve(n); }
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;
    Buffer(Buffer &&o) noexcept : p_(std::exchange(o.p_, nullptr)), n_(std::exchange(o.n_, 0)) {}
    Buffer &operator=(Buffer &&o) noexcept {
        std::swap(p_, o.p_);
        std::swap(n_, o.n_);
        return *this;
    }
    ~Buffer() { release(); }

    /// At least n items; contents are lost when it grows.
    T *reserve(std::int64_t n) {
        if (n > n_) {
            if (std::uint64_t(n) > kMost / sizeof(T)) throw std::bad_alloc();
            release();
            p_ = static_cast<T *>(::operator new(std::size_t(n) * sizeof(T), std::align_val_t(64)));
            n_ = n;
        }
        return p_;
    }
    void release() {
        if (p_ != nullptr) ::operator delete(p_, std::align_val_t(64));
        p_ = nullptr;
        n_ = 0;
    }
    T *data() { return p_; }
    const T *data() const { return p_; }
    std::int64_t capacity() const { return n_; }

  private:
    static constexpr std::uint64_t kMost = std::uint64_t(1) << 62; // bytes
    T *p_ = nullptr;
    std::int64_t n_ = 0;
};

/// What frames of all threads hold now, and have held at most since it was reset: for tests and bug reports.
struct WorkMemory {
    static inline std::atomic<std::int64_t> in_use{0}, peak{0};
};

/// The calling thread's stack of work memory. Frames nest; what a frame took is given back when it ends. Up to kKeep
/// bytes stay with the thread between calls, the rest goes back to the system.
class Arena {
  public:
    static Arena &mine() {
        thread_local Arena a;
        return a;
    }
    void *take(std::size_t bytes) {
        bytes = (bytes + 63) / 64 * 64;
        while (current_ < blocks_.size() && used_ + bytes > std::size_t(blocks_[current_].capacity())) {
            ++current_;
            used_ = 0;
        }
        if (current_ == blocks_.size()) {
            blocks_.emplace_back(std::int64_t(std::max(bytes, std::size_t(1) << 20)));
            used_ = 0;
        }
        void *p = blocks_[current_].data() + used_;
        used_ += bytes;
        taken_ += std::int64_t(bytes);
        if (taken_ > reported_) report();
        return p;
    }

  private:
    friend class Frame;
    static constexpr std::size_t kKeep = std::size_t(16) << 20;
    // The counters are shared by all threads, and a stack of small matrices opens a dozen frames for each of them: what
    // the thread holds is reported in steps, and taken back when its outermost frame ends.
    static constexpr std::int64_t kStep = 4096;
    void report() {
        const std::int64_t more = (taken_ - reported_ + kStep - 1) / kStep * kStep;
        reported_ += more;
        const std::int64_t now = WorkMemory::in_use.fetch_add(more, std::memory_order_relaxed) + more;
        std::int64_t peak = WorkMemory::peak.load(std::memory_order_relaxed);
        while (now > peak && !WorkMemory::peak.compare_exchange_weak(peak, now, std::memory_order_relaxed)) {}
    }
    void give_back(std::size_t block, std::size_t used, std::int64_t taken) {
        current_ = block;
        used_ = used;
        taken_ = taken;
        if (taken_ == 0 && reported_ > 0) {
            WorkMemory::in_use.fetch_sub(reported_, std::memory_order_relaxed);
            reported_ = 0;
        }
        if (block != 0 || used != 0) return;
        std::size_t total = 0;
        for (auto &b : blocks_) total += std::size_t(b.capacity());
        if (total > kKeep) {
            blocks_.clear();
        } else if (blocks_.size() > 1) { // one block next time
            blocks_.clear();
            blocks_.emplace_back(std::int64_t(total));
        }
    }
    std::vector<Buffer<std::byte>> blocks_;
    std::size_t current_ = 0, used_ = 0;
    std::int64_t taken_ = 0;    // bytes of all open frames
    std::int64_t reported_ = 0; // what the counters know of
};

class Frame {
  public:
    Frame() : arena_(Arena::mine()), block_(arena_.current_), used_(arena_.used_), taken_(arena_.taken_) {}
    ~Frame() { arena_.give_back(block_, used_, taken_); }
    Frame(const Frame &) = delete;
    Frame &operator=(const Frame &) = delete;
    /// Uninitialised items, valid until the frame ends. Frames of one thread must end in reverse order.
    template <class T> T *take(std::int64_t n) {
        if (n > (std::int64_t(1) << 62) / std::int64_t(sizeof(T))) throw std::bad_alloc();
        return static_cast<T *>(arena_.take(std::size_t(std::max<std::int64_t>(n, 1)) * sizeof(T)));
    }
    template <class T> T *zeros(std::int64_t n) {
        T *p = take<T>(n);
        std::fill_n(p, n, T(0));
        return p;
    }

  private:
    Arena &arena_;
    std::size_t block_, used_;
    std::int64_t taken_;
};

} // namespace subspan
