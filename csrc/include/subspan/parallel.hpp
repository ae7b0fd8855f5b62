// Threads of the library's own loops: one setting, one pool, results that do not depend on either.
#pragma once

#include <cstdint>
#include <functional>

namespace subspan {

/// Number of threads that own loops may use. Starts as SUBSPAN_NUM_THREADS, else the number of CPUs the process may use.
int num_threads();
/// Sets that number, from 1 to 4096; others throw ValueError. Where the system refuses to create a thread, loops run on
/// those that are there.
void set_num_threads(int n);

/// Calls body(task) once for every task in [0, tasks). A task must not depend on another one, and what it computes
/// must not depend on the number of threads: that is what makes results bit-identical. Nested calls run in the caller.
/// The exception of the first task that throws, in their order, is rethrown here.
void parallel_for(std::int64_t tasks, const std::function<void(std::int64_t)> &body);

/// Called now and then, at most every 50 ms, by a thread that waits for a long call; throws to end the call. Null: none.
/// The exception comes out of the call, and what the call was changing is as it was before.
void set_interrupt_hook(void (*hook)());

/// Where loops look whether they are to go on: throws what the hook threw, or Interrupted in a thread that helps.
void poll();

/// What is between the first and the last write to something that a caller sees: polls of this thread do nothing.
class Shielded {
  public:
    Shielded();
    ~Shielded();
    Shielded(const Shielded &) = delete;
    Shielded &operator=(const Shielded &) = delete;
};

/// Runs something that cannot be stopped, a LAPACK routine, in a thread of its own while this one listens. An interrupt
/// leaves it alone to its end, so `job` must own all that it works on. `flops` decides whether that is worth a thread.
void run_stoppable(double flops, std::function<void()> job);

/// The most bytes of work memory that calls of all threads together have held since the last reset.
std::int64_t work_memory_peak();
void reset_work_memory_peak();

} // namespace subspan
