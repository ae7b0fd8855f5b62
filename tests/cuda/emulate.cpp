#include "emulate.hpp"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <utility>
#include <sys/mman.h>

#if !defined(__x86_64__) || defined(SUBSPAN_PORTABLE_FIBERS)
#include <ucontext.h>
#endif

namespace subspan::emulate {

Fiber *now = nullptr;
dim3 grid_size, block_size;
std::vector<Block> blocks;
Settings settings;

namespace {

constexpr std::size_t kStack = 256 * 1024;
const std::function<void()> *entry = nullptr;

#if defined(__x86_64__) && !defined(SUBSPAN_PORTABLE_FIBERS)
// Saves what a call keeps, changes stacks, restores.
extern "C" void subspan_switch(void **from, void *to);
asm(R"(
.text
.globl subspan_switch
.type subspan_switch, @function
subspan_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size subspan_switch, .-subspan_switch
)");
void *scheduler = nullptr;
void to_scheduler() { subspan_switch(&now->stack_pointer, scheduler); }
void resume(Fiber &f) {
    now = &f;
    subspan_switch(&scheduler, f.stack_pointer);
    now = nullptr;
}
[[noreturn]] void begin() {
    (*entry)();
    now->state = Fiber::done;
    to_scheduler();
    std::abort();
}
void prepare(Fiber &f, char *stack) {
    auto *top = reinterpret_cast<void **>(stack + kStack - 64);
    *--top = nullptr; // the return address of begin, and the alignment that a call leaves
    *--top = reinterpret_cast<void *>(&begin);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    f.stack_pointer = top;
}
#else
ucontext_t scheduler;
void to_scheduler() { swapcontext(static_cast<ucontext_t *>(now->stack_pointer), &scheduler); }
void resume(Fiber &f) {
    now = &f;
    swapcontext(&scheduler, static_cast<ucontext_t *>(f.stack_pointer));
    now = nullptr;
}
void begin() {
    (*entry)();
    now->state = Fiber::done;
    to_scheduler();
}
void prepare(Fiber &f, char *stack) {
    auto *c = reinterpret_cast<ucontext_t *>(stack);
    getcontext(c);
    c->uc_stack.ss_sp = stack + sizeof(ucontext_t);
    c->uc_stack.ss_size = kStack - sizeof(ucontext_t);
    c->uc_link = nullptr;
    makecontext(c, begin, 0);
    f.stack_pointer = c;
}
#endif

char *stacks(std::size_t count) {
    static char *memory = nullptr;
    static std::size_t have = 0;
    if (count > have) {
        if (memory != nullptr) munmap(memory, have * kStack);
        void *p = mmap(nullptr, count * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) throw std::bad_alloc();
        memory = static_cast<char *>(p);
        have = count;
    }
    return memory;
}

// Lets go those groups of fibers all of whose living members wait at the same kind of barrier.
template <class Same> bool release(std::vector<Fiber> &fibers, Fiber::State at, std::size_t width, const Same &group) {
    bool any = false;
    for (std::size_t first = 0; first < fibers.size();) {
        std::size_t last = first;
        bool all = true, some = false;
        while (last < fibers.size() && last - first < width && group(fibers[last]) == group(fibers[first])) {
            if (fibers[last].state == at)
                some = true;
            else if (fibers[last].state != Fiber::done)
                all = false;
            ++last;
        }
        if (all && some) {
            any = true;
            for (std::size_t i = first; i < last; ++i)
                if (fibers[i].state == at) fibers[i].state = Fiber::ready;
        }
        first = last;
    }
    return any;
}

void run_cluster(std::size_t shared, const std::vector<dim3> &indices, std::mt19937_64 &random) {
    const std::size_t threads = std::size_t(block_size.x) * block_size.y * block_size.z, count = indices.size();
    blocks.assign(count, Block{});
    for (std::size_t b = 0; b < count; ++b) {
        blocks[b].index = indices[b];
        blocks[b].rank = unsigned(b);
        blocks[b].storage.resize(shared + 256);
        const auto address = reinterpret_cast<std::uintptr_t>(blocks[b].storage.data());
        // Signalling garbage on both sides of what was asked for: it shows in results.
        std::fill(blocks[b].storage.begin(), blocks[b].storage.end(), static_cast<unsigned char>(0xff));
        blocks[b].shared = blocks[b].storage.data() + (128 - address % 128) % 128;
        blocks[b].exchange.assign((threads + 31) / 32, std::vector<unsigned char>(32 * 64));
    }
    std::vector<Fiber> fibers(threads * count);
    char *memory = stacks(fibers.size());
    for (std::size_t i = 0; i < fibers.size(); ++i) {
        auto &f = fibers[i];
        const unsigned t = unsigned(i % threads);
        f.thread = dim3(t % block_size.x, t / block_size.x % block_size.y, t / (block_size.x * block_size.y));
        f.block = &blocks[i / threads];
        f.lane = int(t % 32);
        f.warp = int(t / 32);
        prepare(f, memory + i * kStack);
    }
    // Whole warps in a shuffled order, and lanes of each as well.
    std::vector<std::size_t> order(fibers.size());
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random);
    for (;;) {
        bool moved = false, alive = false;
        for (const std::size_t i : order)
            if (fibers[i].state == Fiber::ready) {
                resume(fibers[i]);
                moved = true;
            }
        for (const auto &f : fibers) alive = alive || f.state != Fiber::done;
        if (!alive) break;
        const auto warp_of = [&](const Fiber &f) { return std::size_t(f.block->rank) * 64 + std::size_t(f.warp); };
        const auto block_of = [](const Fiber &f) { return std::size_t(f.block->rank); };
        bool free = release(fibers, Fiber::at_warp, 32, warp_of);
        free = release(fibers, Fiber::at_block, threads, block_of) || free;
        free = release(fibers, Fiber::at_cluster, fibers.size(), [](const Fiber &) { return std::size_t(0); }) || free;
        if (!moved && !free) throw std::logic_error("emulated device: a barrier that not all threads reach");
    }
    for (const auto &f : fibers)
        if (!f.copies.empty()) throw std::logic_error("emulated device: an asynchronous copy that nobody waited for");
}

} // namespace

void wait(Fiber::State at) {
    now->state = at;
    to_scheduler();
}

void run(dim3 grid, dim3 block, std::size_t shared, int cluster, const std::function<void()> &kernel) {
    if (block.x * block.y * block.z > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535)
        throw std::logic_error("emulated device: a launch of an impossible size");
    if (shared > std::size_t(settings.shared_limit)) throw std::logic_error("emulated device: more shared memory than there is");
    if (cluster > 1 && (settings.major < 9 || cluster > 8 || grid.x % unsigned(cluster) != 0)) throw std::logic_error("emulated device: an impossible cluster");
    grid_size = grid;
    block_size = block;
    entry = &kernel;
    ++settings.launches;
    std::mt19937_64 random(settings.seed + std::uint64_t(settings.launches));
    const std::size_t all = std::size_t(grid.x) * grid.y * grid.z, step = std::size_t(cluster);
    std::vector<std::size_t> order(all / step);
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random);
    std::vector<dim3> indices(step);
    for (const std::size_t c : order) {
        for (std::size_t j = 0; j < step; ++j) {
            const std::size_t i = c * step + j;
            indices[j] = dim3(unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / (std::size_t(grid.x) * grid.y)));
        }
        run_cluster(shared, indices, random);
    }
}

} // namespace subspan::emulate

using subspan::emulate::settings;

const char *cudaGetErrorString(cudaError_t e) {
    switch (e) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInsufficientDriver: return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorIllegalAddress: return "an illegal memory access was encountered";
    default: return "invalid argument";
    }
}
cudaError_t cudaPeekAtLastError() { return settings.last; }
cudaError_t cudaGetLastError() { return std::exchange(settings.last, cudaSuccess); }
cudaError_t cudaGetDeviceCount(int *n) {
    *n = settings.driver ? settings.devices : 0;
    return settings.driver ? cudaSuccess : cudaErrorInsufficientDriver;
}
cudaError_t cudaGetDevice(int *d) {
    *d = settings.device;
    return settings.driver ? cudaSuccess : cudaErrorInsufficientDriver;
}
cudaError_t cudaSetDevice(int d) {
    if (d < 0 || d >= settings.devices) return cudaErrorInvalidDevice;
    settings.device = d;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr what, int) {
    *value = what == cudaDevAttrComputeCapabilityMajor ? settings.major : what == cudaDevAttrMultiProcessorCount ? settings.processors : settings.shared_limit;
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus *s) {
    *s = settings.capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaStreamGetDevice(cudaStream_t, int *d) {
    *d = settings.stream_device >= 0 ? settings.stream_device : settings.device;
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *p, int v, std::size_t n, cudaStream_t) {
    std::memset(p, v, n);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, std::size_t n, cudaMemcpyKind, cudaStream_t) {
    std::memcpy(to, from, n);
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *v) {
    *v = settings.driver ? 13000 : 0;
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int *v) {
    *v = 13000;
    return cudaSuccess;
}
