#include "subspan/cuda/apply_core.hpp"

#include "linalg/apply_core_wide.cuh"
#include "linalg/apply_core_tile.cuh"

#include <algorithm>
#include <limits>

namespace subspan::cuda {
namespace {
using namespace core_panel;

constexpr int kGroup = 160; // matrices of a grouped launch

template <class T> struct Plan {
    int rows;   // of a block
    int blocks; // that share a panel
    int kind;
    bool keep;  // V's rows in shared memory
    bool vector_x, vector_v, vector_out, vector_source;
    Accumulate<T> value, alpha;
    enum Mode { resident, partial, finish } mode;
    Accumulate<T> *sums; // of partial and finish: for each panel and block k x panel
};

// Where the matrix of a panel comes from: a stack of one shape, or a group of several.
template <class T, bool Packed = false> struct OfStack {
    static constexpr bool packed = Packed;
    Matrices<const T> x, source, v;
    Matrices<T> out;
    Matrices<const Accumulate<T>> core;
    Job<T> shape; // strides and sizes
    int panels;   // of one matrix
    SUBSPAN_DEVICE Job<T> find(unsigned panel, int &column) const {
        const unsigned item = panel / unsigned(panels);
        column = int(panel - item * unsigned(panels)) * kPanel<T>;
        Job<T> j = shape;
        j.x = x.at(item);
        j.v = v.at(item);
        j.out = out.at(item);
        if (j.core != nullptr) j.core = core.at(item);
        if (j.source != nullptr) j.source = source.at(item);
        return j;
    }
};
template <class T> struct OfGroup {
    static constexpr bool packed = false;
    int count;
    int first[kGroup + 1]; // panels before each matrix
    Job<T> jobs[kGroup];
    SUBSPAN_DEVICE Job<T> find(unsigned panel, int &column) const {
        int low = 0, high = count;
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            (int(panel) < first[middle] ? high : low) = middle;
        }
        column = (int(panel) - first[low]) * kPanel<T>;
        return jobs[low];
    }
};

static_assert(sizeof(OfGroup<double>) + sizeof(Plan<double>) < 32764, "more than the parameters of a kernel may take");

template <class T, bool Across, class From> __global__ void __launch_bounds__(kThreads, 2) apply_core_kernel(const From from, const Plan<T> plan) {
    using A = Accumulate<T>;
    using Work = Products<T, Across, From::packed>;
    constexpr int P = kPanel<T>;
    SUBSPAN_SHARED(memory);
    int j0 = 0;
    const unsigned block = blockIdx.x % unsigned(plan.blocks);
    const unsigned panel = blockIdx.x / unsigned(plan.blocks);
    const Job<T> job = from.find(panel, j0);
    const int tid = int(threadIdx.x), k = job.k, k32 = divide_up(k, kBlock) * kBlock, i0 = int(block) * plan.rows;
    Tile<T, Across> tile{reinterpret_cast<T *>(memory), plan.rows, Tile<T, Across>::pitch_of(plan.rows)};
    unsigned char *next = memory + Tile<T, Across>::bytes(plan.rows);
    const Basis<T> basis{kTensor<T> && plan.keep ? reinterpret_cast<T *>(next) : nullptr, Basis<T>::pitch_of(k32)};
    unsigned char *stage = next;
    next += plan.keep ? Basis<T>::bytes(plan.rows, k32) : Work::stage_bytes;
    A *scratch = reinterpret_cast<A *>(next);
    next += kScratchBytes<T>;
    A *mine = reinterpret_cast<A *>(next), *sums = mine + k32 * P; // this block's part of VᵀX, and all of it
    next += 2 * int64_t(k32) * P * int64_t(sizeof(A));
    unsigned char *small = next;

    if (basis.rows != nullptr) Work::load(job, basis, i0, plan.rows, k32, plan.vector_v);
    if (plan.mode != Plan<T>::finish) {
        if (job.source != nullptr) {
            tile.load(job.source, job.si, job.sj, i0, j0, job.m, job.n, plan.vector_source);
            for (int a0 = 0; a0 < k32; a0 += kBlock) Work::inner(job, tile, basis, stage, scratch, i0, a0, A(1), false, plan.vector_v, mine);
        }
        tile.load(job.x, job.xi, job.xj, i0, j0, job.m, job.n, plan.vector_x);
        const bool change = job.source != nullptr;
        for (int a0 = 0; a0 < k32; a0 += kBlock) Work::inner(job, tile, basis, stage, scratch, i0, a0, change ? A(-1) : A(1), change, plan.vector_v, mine);
    } else {
        tile.load(job.x, job.xi, job.xj, i0, j0, job.m, job.n, plan.vector_x);
    }
    if (plan.mode == Plan<T>::partial) {
        A *to = plan.sums + (int64_t(panel) * plan.blocks + block) * k * P;
        for (int e = tid; e < k * P; e += kThreads) to[e] = mine[e];
        return;
    }
    const bool cluster = plan.mode == Plan<T>::resident && plan.blocks > 1;
    if (plan.mode == Plan<T>::finish) {
        const A *parts = plan.sums + int64_t(panel) * plan.blocks * k * P;
        for (int e = tid; e < k * P; e += kThreads) {
            A sum = parts[e];
            for (int b = 1; b < plan.blocks; ++b) sum += parts[int64_t(b) * k * P + e];
            sums[e] = sum;
        }
    } else if (cluster) {
        // Each block adds the parts of all in the same order; the reads of all parts are on their way before the first is needed.
        constexpr int kFew = 16 / int(sizeof(A)), kMost = 8;
        struct alignas(16) Few {
            A x[kFew];
        };
        cluster_barrier();
        for (int e = tid; e < k32 * P / kFew; e += kThreads) {
            Few part[kMost];
#pragma unroll
            for (int b = 0; b < kMost; ++b)
                if (b < plan.blocks) part[b] = reinterpret_cast<const Few *>(of_block(mine, unsigned(b)))[e];
#pragma unroll
            for (int b = 1; b < kMost; ++b)
                if (b < plan.blocks)
#pragma unroll
                    for (int x = 0; x < kFew; ++x) part[0].x[x] += part[b].x[x];
            reinterpret_cast<Few *>(sums)[e] = part[0];
        }
        cluster_arrive(); // others may still read this block's part
    } else {
        sums = mine;
    }
    __syncthreads();
    A *scaled = mine; // float16: the small product before it is scaled
    if constexpr (kShort<T>) {
        if (cluster) cluster_wait();
        if (sums == mine) scaled = mine + k32 * P;
    }
    for (int e = tid; e < k32 * P; e += kThreads) {
        const int a = e / P, j = e - a * P;
        A y = A(0);
        if (a < k) {
            if (plan.kind == CoreOptions::scalar) {
                y = plan.value * sums[e];
            } else if (plan.kind == CoreOptions::diagonal) {
                y = job.core[a * job.ma] * sums[e];
            } else {
                for (int b = 0; b < k; ++b) y = fma(job.core[a * job.ma + b * job.mb], sums[b * P + j], y);
            }
        }
        if constexpr (kShort<T>)
            scaled[e] = y;
        else
            Work::keep(small, k32, a, j, y);
    }
    A lift = A(1);
    if constexpr (kShort<T>) {
        // float16 ends at 65504: a panel whose small product comes near that is scaled by a power of two.
        float top = 0;
        for (int e = tid; e < k32 * P; e += kThreads) top = most(top, scaled[e] < 0 ? -scaled[e] : scaled[e]);
        top = warp_most(top);
        if (tid % 32 == 0) scratch[tid / 32] = top;
        __syncthreads();
        for (int w = 0; w < kWarps; ++w) top = most(top, scratch[w]);
        const int e2 = int((float_to_bits(top) >> 23) & 255u) - 127 - 13;
        const bool large = e2 > 0 && e2 < 100;
        const float down = large ? bits_to_float(uint32_t(127 - e2) << 23) : 1.0f;
        lift = large ? bits_to_float(uint32_t(127 + e2) << 23) : 1.0f;
        for (int e = tid; e < k32 * P; e += kThreads) Work::keep(small, k32, e / P, e % P, scaled[e] * down);
    }
    __syncthreads();
    Work::outer(job, tile, basis, stage, small, k32, i0, plan.alpha, lift, plan.vector_v);
    __syncthreads();
    tile.store(job.out, job.oi, job.oj, i0, j0, job.m, job.n, plan.vector_out);
    if (cluster && !kShort<T>) cluster_wait(); // before this block's memory is given away
}

// -- host ------------------------------------------------------------------------------------------------------------------

// Left, or the right form transposed.
CoreCall transposed_left(const CoreCall &call, const CoreOptions &o, Stack &core, Stack &source) {
    CoreCall t = call;
    if (call.core != nullptr) {
        core = *call.core;
        t.core = &core;
    }
    if (call.source != nullptr) {
        source = *call.source;
        t.source = &source;
    }
    if (o.left) return t;
    t.c = call.c.transposed();
    t.out = call.out.transposed();
    if (call.core != nullptr && o.kind == CoreOptions::full) core = call.core->transposed();
    if (call.source != nullptr) source = call.source->transposed();
    return t;
}

std::string text(const Stack &s) { return std::to_string(s.rows) + " x " + std::to_string(s.cols); }

void check_call(const CoreCall &call, const CoreOptions &o) {
    const Stack &c = call.c, &v = call.v;
    const std::int64_t along = o.left ? c.rows : c.cols;
    if (v.rows != along)
        throw ValueError("V must have " + std::to_string(along) + " rows to act on C " + text(c) + " from the " + (o.left ? "left" : "right") + ", got " +
                         std::to_string(v.rows));
    if (call.out.rows != c.rows || call.out.cols != c.cols) throw ValueError("out must have the shape of C, " + text(c) + ", got " + text(call.out));
    if (call.source != nullptr && (call.source->rows != c.rows || call.source->cols != c.cols))
        throw ValueError("source must have the shape of C, " + text(c) + ", got " + text(*call.source));
    const DType wide = c.dtype == DType::f64 ? DType::f64 : DType::f32;
    if (o.kind != CoreOptions::scalar) {
        if (call.core == nullptr) throw ValueError("M is missing");
        const Stack &m = *call.core;
        const std::int64_t k = v.cols;
        if (o.kind == CoreOptions::full ? (m.rows != k || m.cols != k) : (m.cols != k))
            throw ValueError("M must have " + std::to_string(k) + (o.kind == CoreOptions::full ? " rows and columns" : " entries") + ", got " + text(m));
        if (m.dtype != wide) throw ValueError(std::string("M must be ") + name_of(wide) + " on the device, got " + name_of(m.dtype));
    }
    for (const Stack *s : {&v, &call.out, call.source != nullptr ? call.source : &v})
        if (s->dtype != c.dtype) throw ValueError(std::string("all arrays must be ") + name_of(c.dtype) + " as C is, got " + name_of(s->dtype));
    const std::int64_t top = std::numeric_limits<int>::max() / 64;
    if (c.rows > top || c.cols > top || v.cols > top) throw ValueError("C " + text(c) + " is too large for one call");
}

bool across(const Stack &c) { return c.col_stride == 1 || c.row_stride != 1; }

// The fewest blocks for m rows with `limit` bytes of shared memory each, if any: with V where it fits.
template <class T, bool Across> bool fit(Plan<T> &p, int64_t m, int k32, int64_t limit, int widest) {
    constexpr int64_t unit = kTensor<T> ? 16 : 32;
    for (const bool keep : {kTensor<T>, false})
        for (p.blocks = 1; p.blocks <= widest; p.blocks *= 2) {
            p.rows = int(divide_up(divide_up<int64_t>(m, p.blocks), unit) * unit);
            p.keep = keep;
            if (shared_bytes<T, Across>(p.rows, k32, keep) <= limit) return true;
        }
    return false;
}

template <class T, bool Across> Plan<T> plan_of(const CoreCall &call, const CoreOptions &o, const Device &device) {
    Plan<T> p{};
    const int64_t m = call.c.rows, k32 = divide_up<int64_t>(call.v.cols, kBlock) * kBlock;
    const int widest = device.cluster;
    // Two blocks on a multiprocessor, so that one loads while the other computes; one where that is not to be had.
    const int64_t half = device.shared_limit / 2 - 2048;
    p.mode = Plan<T>::resident;
    if (!fit<T, Across>(p, m, int(k32), half, widest) && !fit<T, Across>(p, m, int(k32), device.shared_limit, widest)) {
        p.mode = Plan<T>::partial;
        p.rows = 512;
        while (p.rows > 32 && shared_bytes<T, Across>(p.rows, int(k32), false) > half) p.rows /= 2;
        p.keep = shared_bytes<T, Across>(p.rows, int(k32), true) <= half;
        p.blocks = int(divide_up<int64_t>(m, p.rows));
    }
    p.kind = o.kind;
    p.value = Accumulate<T>(o.value);
    p.alpha = Accumulate<T>(o.alpha);
    const auto lines = [](const Stack &s) { return Across ? in_vectors(s) : in_vectors(s.transposed()); };
    p.vector_x = lines(call.c);
    p.vector_out = lines(call.out);
    const int64_t items = kTensor<T> ? 8 : 4; // that a thread unpacks at a time
    p.vector_v = call.packed == nullptr ? in_vectors(call.v)
                                        : call.v.cols % items == 0 && call.packed->group % items == 0 &&
                                              reinterpret_cast<std::uintptr_t>(call.packed->codes) % std::uintptr_t(items / 2) == 0;
    p.vector_source = call.source != nullptr && lines(*call.source);
    return p;
}

template <class T> Job<T> job_of(const CoreCall &call, const CoreOptions &o) {
    Job<T> j{};
    j.x = static_cast<const T *>(call.c.data);
    j.v = static_cast<const T *>(call.v.data);
    j.out = static_cast<T *>(call.out.data);
    j.m = int(call.c.rows);
    j.n = int(call.c.cols);
    j.k = int(call.v.cols);
    j.xi = call.c.row_stride;
    j.xj = call.c.col_stride;
    j.oi = call.out.row_stride;
    j.oj = call.out.col_stride;
    j.vi = call.v.row_stride;
    j.va = call.v.col_stride;
    if (call.core != nullptr) {
        j.core = static_cast<const Accumulate<T> *>(call.core->data);
        j.ma = o.kind == CoreOptions::diagonal ? call.core->col_stride : call.core->row_stride;
        j.mb = call.core->col_stride;
    }
    if (call.packed != nullptr) j.packed = Int4View<Accumulate<T>>(*call.packed);
    if (call.source != nullptr) {
        j.source = static_cast<const T *>(call.source->data);
        j.si = call.source->row_stride;
        j.sj = call.source->col_stride;
    }
    return j;
}

template <class T, bool Across, bool Packed> void run(const Session &s, const Context &context, const CoreCall &call, const CoreOptions &o) {
    Plan<T> plan = plan_of<T, Across>(call, o, s.device());
    using From = OfStack<T, Packed>;
    From from{};
    from.shape = job_of<T>(call, o);
    from.x = Matrices<const T>(call.c);
    from.v = Matrices<const T>(call.v);
    from.out = Matrices<T>(call.out);
    if (call.core != nullptr) from.core = Matrices<const Accumulate<T>>(*call.core);
    if (call.source != nullptr) from.source = Matrices<const T>(*call.source);
    from.panels = int(divide_up<int64_t>(call.c.cols, kPanel<T>));
    const int64_t panels = from.panels * call.c.size(), grid = panels * plan.blocks;
    if (grid > std::numeric_limits<int>::max()) throw ValueError("C is too large for one call");
    const int k32 = int(divide_up<int64_t>(call.v.cols, kBlock) * kBlock);
    Shape shape{dim3(unsigned(grid)), dim3(kThreads), shared_bytes<T, Across>(plan.rows, k32, plan.keep), 1};
    constexpr auto name = "apply_core";
    if (plan.mode == Plan<T>::resident) {
        shape.cluster = plan.blocks;
        return launch<apply_core_kernel<T, Across, From>>(s, name, shape, from, plan);
    }
    plan.sums = Workspace(context).take<Accumulate<T>>(grid * call.v.cols * kPanel<T>);
    launch<apply_core_kernel<T, Across, From>>(s, name, shape, from, plan);
    plan.mode = Plan<T>::finish;
    launch<apply_core_kernel<T, Across, From>>(s, name, shape, from, plan);
}

// The plan of the tallest matrix serves all; vectors only where every one of them allows it.
template <class T> struct GroupPlan {
    Plan<T> plan{};
    int64_t k32 = 0;
    bool together = true; // else the widest V and the tallest C do not fit one launch
};
template <class T, bool Across> GroupPlan<T> plan_group(const Session &s, const std::vector<CoreCall> &calls, const CoreOptions &o) {
    GroupPlan<T> group;
    if (calls.empty()) return group;
    Plan<T> &plan = group.plan;
    int64_t &k32 = group.k32, panels = 0;
    bool x = true, v = true, out = true;
    for (const auto &c : calls) {
        const Plan<T> p = plan_of<T, Across>(c, o, s.device());
        plan = p;
        x = x && p.vector_x;
        v = v && p.vector_v;
        out = out && p.vector_out;
        k32 = std::max(k32, divide_up<int64_t>(c.v.cols, kBlock) * kBlock);
    }
    plan.vector_x = x;
    plan.vector_v = v;
    plan.vector_out = out;
    int64_t tall = 0;
    for (const auto &c : calls) tall = std::max(tall, c.c.rows);
    // Two blocks on a multiprocessor where the tallest and the widest allow it, as in plan_of.
    const int widest = s.device().cluster;
    group.together = fit<T, Across>(plan, tall, int(k32), s.device().shared_limit / 2 - 2048, widest) ||
                     fit<T, Across>(plan, tall, int(k32), s.device().shared_limit, widest);
    for (const auto &c : calls) panels += divide_up<int64_t>(c.c.cols, kPanel<T>);
    if (panels * plan.blocks > std::numeric_limits<int>::max()) throw ValueError("the group is too large for one launch");
    return group;
}

template <class T, bool Across> void run_group(const Session &s, const std::vector<CoreCall> &calls, const CoreOptions &o, const GroupPlan<T> &group) {
    if (!group.together) {
        for (const auto &c : calls) run_group<T, Across>(s, {c}, o, plan_group<T, Across>(s, {c}, o));
        return;
    }
    const Plan<T> &plan = group.plan;
    const int k32 = int(group.k32);
    for (std::size_t first = 0; first < calls.size(); first += kGroup) {
        OfGroup<T> from{};
        from.count = int(std::min<std::size_t>(kGroup, calls.size() - first));
        int64_t panels = 0;
        for (int i = 0; i < from.count; ++i) {
            const auto &c = calls[first + std::size_t(i)];
            from.jobs[i] = job_of<T>(c, o);
            from.first[i] = int(panels);
            panels += divide_up<int64_t>(c.c.cols, kPanel<T>);
        }
        from.first[from.count] = int(panels);
        if (panels == 0) continue;
        const Shape shape{dim3(unsigned(panels * plan.blocks)), dim3(kThreads), shared_bytes<T, Across>(plan.rows, k32, plan.keep), plan.blocks};
        launch<apply_core_kernel<T, Across, OfGroup<T>>>(s, "apply_core (group)", shape, from, plan);
    }
}

// Whether not even the lowest panel fits a block: cuBLAS's turn.
bool too_wide(const CoreCall &t, const Device &device) {
    if (t.v.cols > kCoreWidth) return true;
    const int k32 = int(divide_up<int64_t>(t.v.cols, kBlock) * kBlock);
    return dispatch(t.c.dtype, [&](auto tag) {
        using T = decltype(tag);
        return (across(t.c) ? shared_bytes<T, true>(32, k32, false) : shared_bytes<T, false>(32, k32, false)) > device.shared_limit;
    });
}

// The same call with V unpacked into `dense`.
template <class T> CoreCall unpacked_call(const Session &s, const CoreCall &t, T *dense) {
    CoreCall call = t;
    call.v.data = dense;
    call.v.row_stride = t.v.cols;
    call.v.col_stride = 1;
    call.packed = nullptr;
    unpack_rows(s, *t.packed, dense, t.v.cols, int64_t(1));
    return call;
}

bool empty(const CoreCall &c) { return c.c.rows == 0 || c.c.cols == 0 || c.c.size() == 0; }

} // namespace

std::int64_t apply_core_workspace(const CoreCall &call, const CoreOptions &o, int device) {
    check_call(call, o);
    if (empty(call)) return 0;
    Context context;
    context.device = device;
    const Session s(context);
    Stack core, source;
    const CoreCall t = transposed_left(call, o, core, source);
    if (too_wide(t, s.device()))
        return apply_core_wide_room(t, o, device) + (t.packed != nullptr ? divide_up<int64_t>(t.v.rows * t.v.cols * size_of(t.c.dtype), 256) * 256 : 0);
    return dispatch(t.c.dtype, [&](auto tag) -> std::int64_t {
        using T = decltype(tag);
        const auto bytes = [&](const Plan<T> &p) -> std::int64_t {
            if (p.mode == Plan<T>::resident) return 0;
            const int64_t panels = divide_up<int64_t>(t.c.cols, kPanel<T>) * t.c.size();
            return room<Accumulate<T>>(panels * p.blocks * t.v.cols * kPanel<T>);
        };
        return across(t.c) ? bytes(plan_of<T, true>(t, o, s.device())) : bytes(plan_of<T, false>(t, o, s.device()));
    });
}

void apply_core(const Context &context, const CoreCall &call, const CoreOptions &o) {
    check_call(call, o);
    const Session s(context);
    if (empty(call)) return;
    Stack core, source;
    const CoreCall t = transposed_left(call, o, core, source);
    const bool wide = too_wide(t, s.device());
    dispatch(t.c.dtype, [&](auto tag) {
        using T = decltype(tag);
        if (wide) {
            Context rest = context;
            if (t.packed == nullptr) return apply_core_wide<T>(s, rest, t, o);
            Workspace work(context);
            T *dense = work.take<T>(t.v.rows * t.v.cols);
            const int64_t taken = room<T>(t.v.rows * t.v.cols);
            rest.workspace = static_cast<char *>(context.workspace) + taken;
            rest.workspace_bytes -= taken;
            return apply_core_wide<T>(s, rest, unpacked_call(s, t, dense), o);
        }
        if (t.packed != nullptr) return across(t.c) ? run<T, true, true>(s, context, t, o) : run<T, false, true>(s, context, t, o);
        across(t.c) ? run<T, true, false>(s, context, t, o) : run<T, false, false>(s, context, t, o);
    });
}

namespace {

// Whether a launch of several can take it: else it goes alone, in two passes or through cuBLAS.
bool joins(const CoreCall &call, const CoreOptions &o, const Device &device) {
    Stack core, source;
    const CoreCall t = transposed_left(call, o, core, source);
    if (too_wide(t, device)) return false;
    return dispatch(t.c.dtype, [&](auto tag) {
        using T = decltype(tag);
        return across(t.c) ? plan_of<T, true>(t, o, device).mode == Plan<T>::resident : plan_of<T, false>(t, o, device).mode == Plan<T>::resident;
    });
}

void check_group(const std::vector<CoreCall> &calls, const CoreOptions &o) {
    for (const auto &c : calls) {
        check_call(c, o);
        if (c.c.axes != 0) throw ValueError("matrices of a group have no leading axes");
        if (c.source != nullptr) throw ValueError("a group takes no source");
        if (c.packed != nullptr) throw ValueError("a group takes no 4-bit basis");
        if (c.c.dtype != calls[0].c.dtype) throw ValueError("matrices of a group must have one dtype");
    }
}

} // namespace

std::int64_t apply_core_group_workspace(const std::vector<CoreCall> &calls, const CoreOptions &o, int device) {
    check_group(calls, o);
    Context context;
    context.device = device;
    const Session s(context);
    int64_t bytes = 0;
    for (const auto &c : calls)
        if (!empty(c) && !joins(c, o, s.device())) bytes = std::max(bytes, apply_core_workspace(c, o, device));
    return bytes;
}

void apply_core_group(const Context &context, const std::vector<CoreCall> &calls, const CoreOptions &o) {
    if (calls.empty()) return;
    check_group(calls, o);
    const Session s(context);
    std::vector<Stack> cores(calls.size());
    std::vector<CoreCall> rows, columns, alone;
    for (std::size_t i = 0; i < calls.size(); ++i) {
        if (empty(calls[i])) continue;
        if (!joins(calls[i], o, s.device())) {
            alone.push_back(calls[i]);
            continue;
        }
        Stack unused;
        const CoreCall t = transposed_left(calls[i], o, cores[i], unused);
        (across(t.c) ? rows : columns).push_back(t);
    }
    dispatch(calls[0].c.dtype, [&](auto tag) {
        using T = decltype(tag);
        const auto by_rows = plan_group<T, true>(s, rows, o); // both before the first launch
        const auto by_columns = plan_group<T, false>(s, columns, o);
        for (const auto &c : alone) apply_core(context, c, o);
        run_group<T, true>(s, rows, o, by_rows);
        run_group<T, false>(s, columns, o, by_columns);
    });
}

} // namespace subspan::cuda
