// A pool of std::thread workers. No OpenMP: a second OpenMP runtime in one process is a known cause of hangs.
#include "subspan/parallel.hpp"

#include "base/scratch.hpp"
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
#include <system_error>
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

constexpr int kMostThreads = 4096;

int default_threads() {
    if (const char *env = std::getenv("SUBSPAN_NUM_THREADS")) {
        char *end = nullptr;
        const long v = std::strtol(env, &end, 10);
        if (end != env && *end == '\0' && v >= 1 && v <= kMostThreads) return int(v);
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

constexpr std::chrono::milliseconds kHear(50); // between two looks at the interrupt hook

struct Job;
thread_local bool inside = false;       // of a task: further loops run in this thread
thread_local const Job *helping = nullptr; // the job of somebody else that this thread works on
thread_local int shields = 0;
thread_local bool stopped = false; // the hook threw, and nobody has caught that yet
thread_local std::chrono::steady_clock::time_point heard;

std::atomic<void (*)()> interrupt_hook{nullptr};

struct Job {
    std::int64_t tasks = 0;
    const std::function<void(std::int64_t)> *body = nullptr;
    std::atomic<std::int64_t> next{0};
    std::atomic<bool> cancelled{false};
    std::mutex error_mutex;
    std::exception_ptr error, interrupt;
    std::int64_t failed = 0; // its task

    void cancel() {
        interrupt = std::current_exception();
        cancelled.store(true, std::memory_order_relaxed);
        next.store(tasks, std::memory_order_relaxed);
    }
    void work() {
        inside = true;
        stopped = false;
        for (;;) {
            if (helping == nullptr) {
                try {
                    poll();
                } catch (...) { // before any error of a task: it is not raised a second time
                    cancel();
                    break;
                }
            }
            const std::int64_t t = next.fetch_add(1, std::memory_order_relaxed);
            if (t >= tasks) break;
            try {
                (*body)(t);
            } catch (const Interrupted &) {
                if (helping == nullptr) cancel();
                break;
            } catch (...) {
                if (helping == nullptr && stopped) { // by a poll of the task: not an error of its own
                    cancel();
                    break;
                }
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
    void rethrow() const {
        if (interrupt) std::rethrow_exception(interrupt);
        if (error) std::rethrow_exception(error);
    }
};

// GCC 12 moved condition_variable::wait into a newer symbol version of libstdc++ than manylinux_2_34 promises;
// wait_for is inline, so wheels built there stay compatible.
template <class P> void wait(std::condition_variable &c, std::unique_lock<std::mutex> &lock, P done) {
    while (!done()) c.wait_for(lock, std::chrono::hours(1));
}

// How long a thread looks before it sleeps: to be woken takes as long as many a kernel. Parts that run one after the other, as
// the products of a factorisation, find their helpers awake.
constexpr auto kLook = std::chrono::microseconds(100);
template <class P> bool look(P done) {
    const auto until = std::chrono::steady_clock::now() + kLook;
    do {
        for (int i = 0; i < 64; ++i) {
            if (done()) return true;
#if defined(__x86_64__) || defined(__i386__)
            __builtin_ia32_pause();
#elif defined(__aarch64__) && defined(__GNUC__)
            asm volatile("yield");
#else
            std::this_thread::yield();
#endif
        }
    } while (std::chrono::steady_clock::now() < until);
    return false;
}

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
            wanted_ = std::min(threads - 1, int(workers_.size()));
            active_ = 0;
            ++generation_;
        }
        wake_.notify_all();
        job.work();
        std::unique_lock<std::mutex> lock(mutex_);
        wanted_ = 0; // late wakers no longer join
        if (active_ != 0) {
            lock.unlock();
            look([&] { return active_ == 0; });
            lock.lock();
        }
        while (active_ != 0) {
            done_.wait_for(lock, kHear);
            if (active_ == 0 || job.cancelled.load(std::memory_order_relaxed)) continue;
            lock.unlock();
            inside = true; // a signal handler may call this library
            try {
                poll();
            } catch (...) {
                job.cancel();
            }
            inside = false;
            lock.lock();
        }
        job_ = nullptr;
        return true;
    }

  private:
    void grow(int n) {
        try {
            while (int(workers_.size()) < n) workers_.emplace_back([this] { loop(); });
        } catch (const std::system_error &) { // no more to be had: those that are there do it
        }
    }
    void loop() {
        std::uint64_t seen = 0;
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            if (const std::uint64_t now = generation_; now == seen || wanted_ == 0) {
                lock.unlock();
                look([&] { return stop_ || generation_ != now; });
                lock.lock();
            }
            wait(wake_, lock, [&] { return stop_ || (generation_ != seen && wanted_ > 0); });
            if (stop_) return;
            seen = generation_;
            --wanted_;
            ++active_;
            Job *job = job_;
            lock.unlock();
            helping = job;
            job->work();
            helping = nullptr;
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
    int wanted_ = 0;
    std::atomic<int> active_{0};
    std::atomic<std::uint64_t> generation_{0};
    std::atomic<bool> stop_{false};
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
        static const int registered = pthread_atfork(nullptr, nullptr, [] { the_pool.store(nullptr, std::memory_order_release); });
        (void)registered;
#endif
        return *fresh;
    }
    delete fresh;
    return *p;
}

} // namespace

std::int64_t work_memory_peak() { return WorkMemory::peak.load(std::memory_order_relaxed); }

void reset_work_memory_peak() { WorkMemory::peak.store(WorkMemory::in_use.load(std::memory_order_relaxed), std::memory_order_relaxed); }

int num_threads() { return setting().load(std::memory_order_relaxed); }

void set_num_threads(int n) {
    if (n < 1 || n > kMostThreads) throw ValueError("num_threads must be from 1 to " + std::to_string(kMostThreads) + ", got " + std::to_string(n));
    setting().store(n, std::memory_order_relaxed);
}

void set_interrupt_hook(void (*hook)()) { interrupt_hook.store(hook, std::memory_order_release); }

void poll() {
    if (helping != nullptr) {
        if (helping->cancelled.load(std::memory_order_relaxed)) throw Interrupted();
        return;
    }
    if (shields > 0) return;
    const auto hook = interrupt_hook.load(std::memory_order_acquire);
    if (hook == nullptr) return;
    // Loops over small matrices come here every few dozen nanoseconds, as many as the clock takes: of those seven are let go.
    thread_local int rest = 0;
    thread_local std::chrono::steady_clock::time_point looked;
    if (rest > 0) {
        --rest;
        return;
    }
    const auto now = std::chrono::steady_clock::now();
    rest = now - looked < std::chrono::microseconds(100) ? 7 : 0;
    looked = now;
    if (now - heard < kHear) return;
    heard = now;
    try {
        hook();
    } catch (...) {
        stopped = true;
        throw;
    }
}

namespace {

// Those that were left alone; a process waits for them before it takes down what they use.
struct Away {
    std::mutex mutex;
    std::condition_variable changed;
    int count = 0;
};
Away &away() {
    static auto *all = new Away;
    static const int registered = std::atexit([] {
        std::unique_lock<std::mutex> lock(all->mutex);
        wait(all->changed, lock, [] { return all->count == 0; });
    });
    (void)registered;
    return *all;
}

} // namespace

void run_stoppable(double flops, std::function<void()> job) {
    constexpr double few = 2e9; // a fifth of a second or so
    if (flops < few || shields > 0 || helping != nullptr || interrupt_hook.load(std::memory_order_acquire) == nullptr) return job();
    struct Shared {
        std::mutex mutex;
        std::condition_variable changed;
        bool done = false;
        std::exception_ptr error;
    };
    const auto shared = std::make_shared<Shared>();
    Away &all = away();
    const auto body = [job, shared, &all] {
        try {
            job();
        } catch (...) {
            shared->error = std::current_exception();
        }
        {
            const std::lock_guard<std::mutex> lock(shared->mutex);
            shared->done = true;
        }
        shared->changed.notify_all();
        const std::lock_guard<std::mutex> lock(all.mutex);
        --all.count;
        all.changed.notify_all();
    };
    {
        const std::lock_guard<std::mutex> lock(all.mutex);
        ++all.count;
    }
    try {
        std::thread(body).detach();
    } catch (const std::system_error &) { // no thread to be had
        {
            const std::lock_guard<std::mutex> lock(all.mutex);
            --all.count;
        }
        return job();
    }
    std::unique_lock<std::mutex> lock(shared->mutex);
    while (!shared->done) {
        shared->changed.wait_for(lock, kHear);
        if (shared->done) break;
        lock.unlock();
        poll();
        lock.lock();
    }
    if (shared->error) std::rethrow_exception(shared->error);
}

Shielded::Shielded() { ++shields; }
Shielded::~Shielded() { --shields; }

void parallel_for(std::int64_t tasks, const std::function<void(std::int64_t)> &body) {
    if (tasks <= 0) return;
    const int threads = int(std::min<std::int64_t>(num_threads(), tasks));
    if (threads == 1 || inside) {
        for (std::int64_t t = 0; t < tasks; ++t) {
            poll();
            body(t);
        }
        return;
    }
    Job job;
    job.tasks = tasks;
    job.body = &body;
    if (!pool().run(job, threads)) job.work();
    job.rethrow();
}

} // namespace subspan
