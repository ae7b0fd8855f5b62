#include "device.hpp"
#include "register.hpp"
#include "subspan/cuda/streaming_svd.hpp"

#include <optional>

namespace subspan::bind {
namespace {

// The arrays of a stream: components, values, mean or None, totals.
class Stream {
  public:
    Stream(const py::tuple &parts, std::int64_t rank, bool robust, const Call &call)
        : components_(call, parts[0], "components"), values_(call, parts[1], "values"), totals_(call, parts[3], "totals") {
        state_.components = stack(components_, {});
        for (const Array *x : {&values_, &totals_}) x->require_dtype(DType::f64);
        values_.require_shape({state_.components.rows});
        totals_.require_shape({cuda::kSvdTotals});
        state_.values = static_cast<double *>(values_.contiguous());
        state_.totals = static_cast<double *>(totals_.contiguous());
        if (const py::object mean = parts[2]; !mean.is_none()) {
            mean_.emplace(call, mean, "mean");
            mean_->require_dtype(DType::f64);
            mean_->require_shape({state_.components.cols});
            state_.mean = static_cast<double *>(mean_->contiguous());
        }
        state_.rank = rank;
        state_.robust = robust;
    }
    const cuda::SvdState &state() const { return state_; }

  private:
    Array components_, values_, totals_;
    std::optional<Array> mean_;
    cuda::SvdState state_;
};

} // namespace

void register_device_streaming(py::module_ &m) {
    m.def(
        "svd_update",
        [](const py::tuple &where, const py::tuple &stream, std::int64_t rank, bool robust, const py::object &rows, double forget, std::int64_t at_once) {
            const Call call(where);
            const Stream state(stream, rank, robust, call);
            const Array xr(call, rows, "rows");
            const cuda::SvdBlock block{stack(xr, {}), forget, at_once};
            const Memory memory(call, cuda::svd_update_workspace(state.state(), block, call.device));
            const py::gil_scoped_release release;
            return cuda::svd_update(memory.context(), state.state(), block);
        },
        py::arg("call"), py::arg("stream"), py::arg("rank"), py::arg("robust"), py::arg("rows"), py::arg("forget"), py::arg("at_once"));
    m.def(
        "svd_merge",
        [](const py::tuple &where, const py::tuple &stream, std::int64_t rank, bool robust, const py::tuple &other, std::int64_t other_rank) {
            const Call call(where);
            const Stream state(stream, rank, robust, call), theirs(other, other_rank, robust, call);
            const Memory memory(call, cuda::svd_merge_workspace(state.state(), theirs.state(), call.device));
            const py::gil_scoped_release release;
            return cuda::svd_merge(memory.context(), state.state(), theirs.state());
        },
        py::arg("call"), py::arg("stream"), py::arg("rank"), py::arg("robust"), py::arg("other"), py::arg("other_rank"));
}

} // namespace subspan::bind
