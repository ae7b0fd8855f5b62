// A pool of std::thread workers. No OpenMP: a second OpenMP runtime in one process is a known cause of hangs.
#include "subspan/parallel.hpp"

#include "scratch.hpp"
#include "subspan/errors.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace subspan {
namespace {

int default_threads() {
    if (const char *env = std::getenv("SUBSPAN_NUM_THREADS")) {
        char *end = nullptr;
        const long v = std::strtol(env, &end, 10);
        if (end != env && *end == '\0' && v >= 1 && v <= 4096) return int(v);
        throw ValueError(std::string("SUBSPAN_NUM_THREADS must be a whole number from 1 to 4096, got '") + env + "'");
    }
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set) > 0 ? CPU_COUNT(&set) : 1;
#endif
    const unsigned n = std::thread::hardware_concurrency();
    return n == 0 ? 1 : int(n);
}

std::atomic<int> &setting() {
    static std::atomic<int> n{default_threads()};
    return n;
}

thread_local bool inside = false;

// GCC 12 moved condition_variable::wait into a newer symbol version of libstdc++ than manylinux_2_34 promises;
// wait_for is inline, so wheels built there stay compatible.
template <class P> void wait(std::condition_variable &c, std::unique_lock<std::mutex> &lock, P done) {
    while (!done()) c.wait_for(lock, std::chrono::hours(1));
}

struct Job {
    std::int64_t tasks = 0;
    const std::function<void(std::int64_t)> *body = nullptr;
    std::atomic<std::int64_t> next{0};
    std::mutex error_mutex;
    std::exception_ptr error;
    std::int64_t failed = 0; // its task

    void work() {
        inside = true;
        for (;;) {
            const std::int64_t t = next.fetch_add(1, std::memory_order_relaxed);
            if (t >= tasks) break;
            try {
                (*body)(t);
            } catch (...) {
                const std::lock_guard<std::mutex> lock(error_mutex);
                // Tasks are begun in their order: the first one that fails always runs, whatever the threads.
                if (!error || t < failed) {
                    error = std::current_exception();
                    failed = t;
                }
                next.store(tasks, std::memory_order_relaxed);
            }
        }
        inside = false;
    }
};

class Pool {
  public:
    ~Pool() { stop(); }

    // One job at a time; a caller who finds the pool busy does its job alone rather than waiting.
    bool run(Job &job, int threads) {
        const std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
        if (!busy.owns_lock()) return false;
        grow(threads - 1);
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            job_ = &job;
            wanted_ = threads - 1;
            active_ = 0;
            ++generation_;
        }
        wake_.notify_all();
        job.work();
        std::unique_lock<std::mutex> lock(mutex_);
        wanted_ = 0; // late wakers no longer join
        wait(done_, lock, [&] { return active_ == 0; });
        job_ = nullptr;
        return true;
    }

  private:
    void grow(int n) {
        while (int(workers_.size()) < n) workers_.emplace_back([this] { loop(); });
    }
    void loop() {
        std::uint64_t seen = 0;
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wait(wake_, lock, [&] { return stop_ || (generation_ != seen && wanted_ > 0); });
            if (stop_) return;
            seen = generation_;
            --wanted_;
            ++active_;
            Job *job = job_;
            lock.unlock();
            job->work();
            lock.lock();
            if (--active_ == 0) done_.notify_all();
        }
    }
    void stop() {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            stop_ = true;
        }
        wake_.notify_all();
        for (auto &w : workers_) w.join();
    }

    std::mutex busy_, mutex_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> workers_;
    Job *job_ = nullptr;
    int wanted_ = 0, active_ = 0;
    std::uint64_t generation_ = 0;
    bool stop_ = false;
};

// The pool lives as long as the process: joining threads from a static destructor deadlocks on some platforms. A
// forked child gets a fresh one, because the parent's workers do not exist there.
std::atomic<Pool *> the_pool{nullptr};

Pool &pool() {
    Pool *p = the_pool.load(std::memory_order_acquire);
    if (p != nullptr) return *p;
    auto *fresh = new Pool;
    if (the_pool.compare_exchange_strong(p, fresh)) {
#if !defined(_WIN32)
        static const int registered =
            pthread_atfork(nullptr, nullptr, [] { the_pool.store(nullptr, std::memory_order_release); });
        (void)registered;
#endif
        return *fresh;
    }
    delete fresh;
    return *p;
}

} // namespace

std::int64_t work_memory_peak() { return WorkMemory::peak.load(std::memory_order_relaxed); }

void reset_work_memory_peak() {
    WorkMemory::peak.store(WorkMemory::in_use.load(std::memory_order_relaxed), std::memory_order_relaxed);
}

int num_threads() { return setting().load(std::memory_order_relaxed); }

void set_num_threads(int n) {
    if (n < 1) throw ValueError("num_threads must be at least 1, got " + std::to_string(n));
    setting().store(n, std::memory_order_relaxed);
}

void parallel_for(std::int64_t tasks, const std::function<void(std::int64_t)> &body) {
    if (tasks <= 0) return;
    const int threads = int(std::min<std::int64_t>(num_threads(), tasks));
    if (threads == 1 || inside) {
        for (std::int64_t t = 0; t < tasks; ++t) body(t);
        return;
    }
    Job job;
    job.tasks = tasks;
    job.body = &body;
    if (!pool().run(job, threads)) job.work();
    if (job.error) std::rethrow_exception(job.error);
}

} // namespace subspan
