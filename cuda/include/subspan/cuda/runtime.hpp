// What there is of CUDA on this machine.
#pragma once

namespace subspan::cuda {

/// CUDA devices; zero where there is no driver. Never throws.
int device_count();

struct Versions {
    int runtime, driver; // 13000 for 13.0; zero: none
};
Versions versions();

/// Waits for a stream of the current device; errors are left to the next call.
void wait_for(void *stream);

/// What the kernels were compiled for, as in "80 90 120".
const char *architectures();

} // namespace subspan::cuda
