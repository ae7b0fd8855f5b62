// A program that links subspan::cuda and no Python: it needs neither CUDA's headers nor a GPU to build and start.
#include <subspan/cuda/apply_core.hpp>
#include <subspan/cuda/runtime.hpp>

#include <cstdio>
#include <string>

using namespace subspan::cuda;

namespace {

Stack matrix(void *data, std::int64_t rows, std::int64_t cols) {
    Stack s;
    s.data = data;
    s.rows = rows;
    s.cols = cols;
    s.row_stride = cols;
    return s;
}

// What apply_core says to matrices of these sizes, if it says anything.
std::string refusal(std::int64_t rows_of_v) {
    float memory[64] = {}; // never read: the host's
    const CoreCall call{matrix(memory, 8, 4), matrix(memory, rows_of_v, 2), matrix(memory, 8, 4)};
    try {
        apply_core(Context{}, call, CoreOptions{});
    } catch (const subspan::ValueError &e) {
        return std::string("value: ") + e.what();
    } catch (const CudaError &e) {
        return std::string("cuda: ") + e.what();
    }
    return "";
}

} // namespace

int main() {
    int failures = 0;
    const auto expect = [&](bool good, const char *what) {
        if (!good) std::printf("FAILED: %s\n", what);
        failures += good ? 0 : 1;
    };
    expect(std::string(architectures()).find("90") != std::string::npos, "kernels for sm_90");
    expect(versions().runtime >= 13000, "a runtime of 13.0 or newer");
    expect(refusal(7).rfind("value: V must have 8 rows", 0) == 0, "shapes are checked before anything of CUDA is asked for");
    if (device_count() == 0) expect(refusal(8).rfind("cuda: ", 0) == 0, "no device is a CudaError");
    std::printf("%d devices, %d failures\n", device_count(), failures);
    return failures;
}
