#include "device.hpp"
#include "gradient.hpp"
#include "register.hpp"
#include "truncated.hpp"
#include "subspan/cuda/assign.hpp"
#include "subspan/cuda/blas.hpp"
#include "subspan/cuda/truncated_svd.hpp"

#include <cmath>
#include <deque>
#include <map>
#include <optional>

namespace subspan::bind {
namespace {

constexpr std::int64_t kAtOnce = std::int64_t(1) << 31; // bytes of work memory that matrices of one launch may take together

py::object leading(const Array &x, std::int64_t count, bool columns = false) {
    const py::slice first(0, py::ssize_t(count), 1), all{std::nullopt, std::nullopt, std::nullopt};
    return columns ? x.object()[py::make_tuple(all, first)] : x.object()[first];
}

// All of one dtype and rank; as many in a launch as fit the work memory.
void solve(const Call &call, std::vector<cuda::TruncatedCall> calls, const cuda::IterationOptions &o) {
    const auto longest = [](const cuda::TruncatedCall &c) { return std::max(c.a.rows, c.a.cols); };
    std::stable_sort(calls.begin(), calls.end(), [&](const auto &a, const auto &b) { return longest(a) < longest(b); });
    for (std::size_t begin = 0; begin < calls.size();) {
        std::vector<cuda::TruncatedCall> some;
        std::int64_t bytes = 0;
        while (begin < calls.size()) {
            some.push_back(calls[begin]);
            const std::int64_t more = cuda::truncated_svd_workspace(some, o, call.device);
            if (some.size() > 1 && more > kAtOnce) {
                some.pop_back();
                break;
            }
            bytes = more;
            ++begin;
        }
        const Memory memory(call, bytes);
        const py::gil_scoped_release release;
        cuda::truncated_svd(memory.context(), some, o);
    }
}

// The triplets of one matrix, as in NumPy's results: U, S in float32 or float64, Vh.
struct Found {
    Array u, s, vh;
};
Found triplets(const Call &call, const Array &a, std::int64_t rank, std::int64_t vectors, std::int64_t power, const Stack &start, std::uint64_t key) {
    Found f{call.empty({a.rows(), rank}, a.dtype(), "U"), call.empty({rank}, wide(a.dtype()), "S"), call.empty({rank, a.cols()}, a.dtype(), "Vh")};
    solve(call, {{stack(a, {}), start, stack(f.u, {}), stack(f.s, {}, 1), stack(f.vh, {}), key}}, {vectors, power, true});
    return f;
}

double squared_norm(const Call &call, const Array &a) {
    const Array out = call.empty({1}, DType::f64);
    const Stack sa = stack(a, {});
    {
        const Memory memory(call, cuda::squared_norm_workspace());
        const py::gil_scoped_release release;
        cuda::squared_norm(memory.context(), sa, static_cast<double *>(out.data()));
    }
    return host(call, out.object()).data()[0];
}

// With a rank alone nothing waits for the device.
py::tuple truncated_svd(py::handle context, py::handle given, py::handle rank, py::handle energy, py::handle tol, py::handle oversample, py::handle power,
                        const py::object &initial, std::uint64_t key, py::handle signs) {
    const Call call(context);
    if (signs_by_u(signs)) throw py::type_error("signs='u' is not implemented on CUDA devices");
    const Array a(call, given, "A");
    if (a.dtype() != DType::f32 && a.dtype() != DType::f64) throw py::type_error(std::string("A must be float32 or float64, got ") + a.dtype_name());
    a.require_ndim(2);
    const std::int64_t full = std::min(a.rows(), a.cols());
    const subspan::TruncatedOptions o = truncated_options(rank, energy, tol, oversample, power, key, a.rows(), a.cols());
    o.check(full);
    std::optional<Array> start;
    Stack from;
    if (!initial.is_none()) {
        start.emplace(call, initial, "initial");
        start->require_dtype_of(a);
        if (start->ndim() != 2 || start->cols() != a.cols())
            throw py::value_error("initial must have " + std::to_string(a.cols()) + " columns, got shape " + start->shape_text());
        from = stack(*start, {});
    }
    const double norm = o.energy > 0 ? squared_norm(call, a) : 0.0;
    const auto wanted = [&](const Found &f, std::int64_t most) {
        const Numbers s = host(call, f.s.object());
        if (std::isnan(s.data()[0])) throw py::value_error("A holds NaN or infinity, or its decomposition did not settle");
        return o.wanted(s.data(), most, norm);
    };
    const auto cut = [](const Found &f, std::int64_t k) { return py::make_tuple(leading(f.u, k, true), leading(f.s, k), leading(f.vh, k)); };
    if (o.rank > 0) {
        const Found f = triplets(call, a, o.rank, std::min(full, o.rank + o.oversample), o.power_iterations, from, key);
        return cut(f, o.energy > 0 || o.tol > 0 ? wanted(f, o.rank) : o.rank);
    }
    std::optional<Found> f;
    for (std::int64_t vectors = o.first_try(full, from.rows);; vectors = std::min(full, 2 * vectors)) {
        const std::int64_t trusted = o.trusted(vectors, full);
        Found next = triplets(call, a, trusted, vectors, o.power_iterations, from, key);
        const std::int64_t k = wanted(next, trusted);
        if (k < trusted || vectors == full) return cut(next, k);
        f.emplace(std::move(next));
        from = stack(f->vh, {});
    }
}

// One gradient of a call, and what becomes of its basis.
struct Job : RefreshArguments {
    Job(const Call &call, const py::tuple &t) : RefreshArguments(call, t) {
        a = right ? stack(g, {}) : stack(g, {}).transposed();
        vectors = std::min(std::min(a.rows, a.cols), rank + more);
    }
    /// Once all gradients have been looked at.
    void make(const Call &call) {
        const DType wider = wide(g.dtype());
        if (!last_basis.is_none()) start = stack(last.emplace(copied(call, Array(call, last_basis, "basis"), wider)), {}).transposed();
        if (!last_first.is_none()) first.emplace(copied(call, Array(call, last_first, "first"), wider));
        vh.emplace(call.empty({rank, a.cols}, g.dtype(), "Vh"));
    }
    std::int64_t vectors = 0;
    Stack a, start;
    std::optional<Array> last, first, vh;
};

// As on the CPU; the small problems of all matrices of one rank and dtype are solved in the same launches. Waits once for each dtype, and
// once more where gradients are zero.
py::list refresh_bases(py::handle context, const py::list &given) {
    const Call call(context);
    std::deque<Job> jobs; // whose elements stay where they are
    std::map<DType, std::int64_t> ranks;
    std::map<std::tuple<DType, std::int64_t, std::int64_t, std::int64_t>, std::vector<std::size_t>> groups;
    for (const auto x : given) {
        const Job &j = jobs.emplace_back(call, py::cast<py::tuple>(x));
        groups[{j.g.dtype(), j.rank, j.vectors, j.power}].push_back(jobs.size() - 1);
        auto &most = ranks[wide(j.g.dtype())];
        most = std::max(most, j.rank);
    }
    for (Job &j : jobs) j.make(call);
    // A row for each job: its singular values, then the cosine of the new first vector and the last one.
    std::map<DType, Array> numbers;
    for (const auto &[dtype, rank] : ranks) numbers.emplace(dtype, call.empty({std::int64_t(jobs.size()), rank + 1}, dtype));
    std::vector<py::object> firsts(jobs.size());
    const auto row = [&](std::size_t i, std::int64_t from, std::int64_t count) {
        Stack s = stack(numbers.at(wide(jobs[i].g.dtype())), {});
        s.data = static_cast<char *>(s.data) + (std::int64_t(i) * s.cols + from) * size_of(s.dtype);
        s.rows = 1;
        s.cols = count;
        return s;
    };
    const auto take_first = [&](std::size_t i) {
        const Job &j = jobs[i];
        firsts[i] = copied(call, Array(call, j.vh->object()[py::int_(0)], "first"), wide(j.g.dtype())).object();
        if (!j.first) return;
        Array now(call, firsts[i], "first");
        now.as_matrix(false);
        const Stack a = stack(now, {}), b = stack(*j.first, {}, 1).transposed(), out = row(i, ranks.at(wide(j.g.dtype())), 1);
        const Memory memory(call, cuda::blas_workspace(call.device));
        const py::gil_scoped_release release;
        cuda::matrix_product(memory.context(), a, b, 1.0, out);
    };
    for (const auto &[group, members] : groups) {
        std::vector<cuda::TruncatedCall> calls;
        for (const auto i : members) calls.push_back({jobs[i].a, jobs[i].start, {}, row(i, 0, jobs[i].rank), stack(*jobs[i].vh, {}), jobs[i].key});
        solve(call, calls, {std::get<2>(group), std::get<3>(group), false});
        for (const auto i : members) take_first(i);
    }
    std::map<DType, Numbers> seen;
    const auto fetch = [&] {
        for (const auto &[dtype, x] : numbers) seen.insert_or_assign(dtype, host(call, x.object()));
    };
    const auto number = [&](std::size_t i, std::int64_t at) {
        const auto &h = seen.at(wide(jobs[i].g.dtype()));
        return h.data()[std::int64_t(i) * h.shape(1) + at];
    };
    fetch();
    for (std::size_t i = 0; i < jobs.size(); ++i)
        if (!std::isfinite(number(i, 0))) throw py::value_error(jobs[i].name + " holds NaN or infinity, or its decomposition did not settle");
    bool again = false;
    for (std::size_t i = 0; i < jobs.size(); ++i) { // gradients of a lower rank
        const Job &j = jobs[i];
        if (number(i, j.rank - 1) != 0.0) continue;
        const Stack v = stack(*j.vh, {}), s = row(i, 0, j.rank);
        {
            const Memory memory(call, cuda::complete_vectors_workspace(v, call.device));
            const py::gil_scoped_release release;
            cuda::complete_vectors(memory.context(), v, s, j.key);
        }
        if (number(i, 0) != 0.0) continue;
        take_first(i); // which was not there before
        again = true;
    }
    if (again) fetch();
    py::list found;
    for (std::size_t i = 0; i < jobs.size(); ++i) {
        const Job &j = jobs[i];
        const Array basis = call.empty({j.vh->cols(), j.vh->rows()}, j.vh->dtype(), "basis");
        {
            const Stack from = stack(*j.vh, {}).transposed(), to = stack(basis, {});
            const Memory memory(call, 0);
            const py::gil_scoped_release release;
            cuda::assign(memory.context(), from, to);
        }
        found.append(
            py::make_tuple(basis.object(), firsts[i], j.first ? py::object(py::float_(std::abs(number(i, ranks.at(wide(j.g.dtype())))))) : py::none()));
    }
    return found;
}

} // namespace

void register_device_truncated(py::module_ &m) {
    using py::arg;
    m.def("truncated_svd", &truncated_svd, arg("call"), arg("A"), arg("rank"), arg("energy"), arg("tol"), arg("oversample"), arg("power_iterations"),
          arg("initial"), arg("key"), arg("signs"));
    m.def("refresh_bases", &refresh_bases, arg("call"), arg("jobs"));
}

} // namespace subspan::bind
