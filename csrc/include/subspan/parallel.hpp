// Threads of the library's own loops: one setting, one pool, results that do not depend on either.
#pragma once

#include <cstdint>
#include <functional>

namespace subspan {

/// Number of threads that own loops may use. Starts as SUBSPAN_NUM_THREADS, else the number of CPUs the process may use.
int num_threads();
/// Sets that number; values below 1 throw ValueError.
void set_num_threads(int n);

/// Calls body(task) once for every task in [0, tasks). A task must not depend on another one, and what it computes
/// must not depend on the number of threads: that is what makes results bit-identical. Nested calls run in the caller.
/// The exception of the first task that throws, in their order, is rethrown here.
void parallel_for(std::int64_t tasks, const std::function<void(std::int64_t)> &body);

/// The most bytes of work memory that calls of all threads together have held since the last reset.
std::int64_t work_memory_peak();
void reset_work_memory_peak();

} // namespace subspan
