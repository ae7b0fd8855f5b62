// What tests turn on the emulated device.
#include "emulate.hpp"
#include "register.hpp"

#include <pybind11/pybind11.h>

namespace subspan::bind {

void register_emulated(pybind11::module_ &m) {
    namespace py = pybind11;
    using emulate::settings;
    auto e = m.def_submodule("emulated");
    e.def("reset", [] { settings = emulate::Settings{}; });
    e.def("seed", [](std::uint64_t s) { settings.seed = s; });
    e.def("devices", [](int n, int current) {
        settings.devices = n;
        settings.device = current;
    });
    e.def("hardware", [](int major, int shared) {
        settings.major = major;
        settings.shared_limit = shared;
    });
    e.def("fail_next_launch", [](int code) { settings.next_launch = static_cast<cudaError_t>(code); });
    e.def("leave_error", [](int code) { settings.last = static_cast<cudaError_t>(code); });
    e.def("error", [] { return int(settings.last); });
    e.def("driver", [](bool there) { settings.driver = there; });
    e.def("capture", [](bool on) { settings.capturing = on; });
    e.def("stream_device", [](int d) { settings.stream_device = d; });
    e.def("launches", [] { return settings.launches; });
}

} // namespace subspan::bind
