#include "device_array.hpp"
#include "register.hpp"
#include "subspan/cuda/streaming_svd.hpp"

#include <optional>

namespace subspan::bind {

void register_device_streaming(py::module_ &m) {
    m.def("stream_core_limit", &cuda::stream_core_limit, py::arg("device"));
    m.def(
        "stream_update",
        [](const py::tuple &where, const py::object &rows, const py::object &components, const py::object &values, const py::object &mean,
           const py::object &totals, std::int64_t rank, std::int64_t kept, double forget, double weight) {
            const Call call(where);
            const DeviceArray xr(rows, "rows", call), xc(components, "components", call), xv(values, "values", call), xt(totals, "totals", call);
            std::optional<DeviceArray> xm;
            cuda::StreamUpdate u;
            u.rows = xr.stack({});
            u.components = xc.stack({});
            for (const DeviceArray *x : {&xv, &xt}) x->require_dtype(DType::f64);
            xv.require_shape({u.components.rows});
            xt.require_shape({2});
            u.values = static_cast<double *>(xv.contiguous());
            u.totals = static_cast<double *>(xt.contiguous());
            if (!mean.is_none()) {
                xm.emplace(mean, "mean", call);
                xm->require_dtype(DType::f64);
                xm->require_shape({u.components.cols});
                u.mean = static_cast<double *>(xm->contiguous());
            }
            u.rank = rank;
            u.kept = kept;
            u.forget = forget;
            u.weight = weight;
            const Memory memory(call, cuda::stream_update_workspace(u, call.device));
            const py::gil_scoped_release release;
            cuda::stream_update(memory.context(), u);
        },
        py::arg("call"), py::arg("rows"), py::arg("components"), py::arg("values"), py::arg("mean"), py::arg("totals"), py::arg("rank"),
        py::arg("kept"), py::arg("forget"), py::arg("weight"));
}

} // namespace subspan::bind
