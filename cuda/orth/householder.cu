#include "subspan/cuda/householder.hpp"

#include "linalg/blas.cuh"
#include "base/copy.cuh"
#include "linalg/wide_reflections.cuh"

#include <algorithm>
#include <limits>

namespace subspan::cuda {
namespace {

constexpr int kThreads = 256;

// q = the first columns of the identity.
template <class T> __global__ void __launch_bounds__(kThreads) identity_kernel(SUBSPAN_PARAMETER const Matrices<T> q, const int64_t items) {
    const Place p = place_of(q.rows, q.cols);
    if (p.item < items) q.at(p.item)[p.row * q.row_stride + p.col * q.col_stride] = p.row == p.col ? T(1) : T(0);
}
// out = the strict upper triangle of s.
template <class T> __global__ void __launch_bounds__(kThreads) upper_kernel(const T *s, T *out, const int64_t k, const int64_t items) {
    const Place p = place_of(k, k);
    const int64_t at = (p.item * k + p.row) * k + p.col;
    if (p.item < items) out[at] = p.row < p.col ? s[at] : T(0);
}

// From F and M = F Nᵀ: gradients of the factors, and the symmetric matrix K whose product with V is the rest of dV. With T = (I + D S)⁻¹ D:
// dA = -M, dD_j = -F_jj - Σ_l M_jl S_jl, dS_ij = -tau_i M_ij; unit reflections have dtau_j = -tau_j² v_j on top. A warp a row.
template <class T>
__global__ void __launch_bounds__(kThreads)
    factors_kernel(const T *f, const T *m, const T *s, SUBSPAN_PARAMETER const Matrices<const T> tau, SUBSPAN_PARAMETER const Matrices<T> dtau,
                   const bool has_tau, const unsigned item0, T *kk, const int k, const int items) {
    const int64_t row = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
    const int item = int(row / k), j = int(row % k), lane = int(threadIdx.x) % 32;
    if (item >= items) return;
    const int64_t base = int64_t(item) * k * k;
    const unsigned there = item0 + unsigned(item);
    const T factor = factor_of(s[base + int64_t(j) * k + j], has_tau ? tau.at(there) + j * tau.col_stride : nullptr);
    double sum = 0;
    for (int l = j + 1 + lane; l < k; l += 32) {
        const T x = m[base + int64_t(j) * k + l];
        sum = fma(double(x), double(s[base + int64_t(j) * k + l]), sum);
        kk[base + int64_t(j) * k + l] = kk[base + int64_t(l) * k + j] = -factor * x;
    }
    sum = -double(f[base + int64_t(j) * k + j]) - warp_sum(sum);
    if (lane != 0) return;
    kk[base + int64_t(j) * k + j] = has_tau ? T(0) : T(-double(factor) * double(factor) * sum);
    if (has_tau) dtau.at(there)[j * dtau.col_stride] += T(sum);
}

// -- stacks as batches of products ------------------------------------------------------------------------------------------------
int64_t item_bytes(const ReflectionGradients &r, int64_t n, bool apply) {
    const int64_t k = r.v.cols, item = size_of(r.v.dtype);
    return (5 * k * k + (apply ? 3 : 2) * k * n) * item;
}
int64_t gradient_batch(const ReflectionGradients &r, std::initializer_list<const Stack *> others, int64_t n, bool apply) {
    std::initializer_list<const Stack *> fixed = {&r.v, &r.core};
    for (const Stack *s : others)
        if (s->axes > 1 || (s->axes == 1 && s->stride[0] < 0)) return 1;
    return r.dtau != nullptr ? std::min(together(fixed, {&r.dv}, item_bytes(r, n, apply)), together(fixed, {r.dtau}, item_bytes(r, n, apply)))
                             : together(fixed, {&r.dv}, item_bytes(r, n, apply));
}
int64_t gradient_room(const ReflectionGradients &r, int64_t batch, int64_t n, bool apply, int device) {
    if (nothing(r.v)) return 0;
    return blas_workspace(device) + divide_up<int64_t>(batch * item_bytes(r, n, apply), 256) * 256 + 16 * 256;
}

// What both gradients share: from dN (k x k for each of the batch), dV += V K and dtau.
template <class T> class CoreGradient {
  public:
    T *s, *upper, *dn, *b, *kk;
    CoreGradient(Workspace &work, int64_t k, int64_t batch)
        : s(work.take<T>(batch * k * k)), upper(work.take<T>(batch * k * k)), dn(work.take<T>(batch * k * k)), b(work.take<T>(batch * k * k)),
          kk(work.take<T>(batch * k * k)) {}
    void finish(const Session &session, const Blas &blas, const ReflectionGradients &r, int64_t first, int64_t count) const {
        const int64_t k = r.v.cols;
        const Operand v = operand(r.v, first), n = operand(r.core, first), dv = operand(r.dv, first);
        const Operand os = own(s, k, k), ou = own(upper, k, k), od = own(dn, k, k), ob = own(b, k, k), ok = own(kk, k, k);
        blas.multiply(1.0, v.transposed(), v, 0.0, os, count);
        launch<upper_kernel<T>>(session, "a triangle", one_each(count * k * k), static_cast<const T *>(s), upper, k, count);
        blas.multiply(1.0, n.transposed(), od, 0.0, ob, count);
        blas.multiply(1.0, ou.transposed(), ob, 1.0, od, count); // F = dN + Sᵀ Nᵀ dN
        blas.multiply(1.0, od, n.transposed(), 0.0, ob, count);  // F Nᵀ
        const Matrices<const T> tau = r.tau != nullptr ? Matrices<const T>(*r.tau) : Matrices<const T>{};
        const Matrices<T> dtau = r.dtau != nullptr ? Matrices<T>(*r.dtau) : Matrices<T>{};
        launch<factors_kernel<T>>(session, "gradients of reflections", one_each(32 * count * k), static_cast<const T *>(dn), static_cast<const T *>(b),
                                  static_cast<const T *>(s), tau, dtau, r.tau != nullptr, unsigned(first), kk, int(k), int(count));
        blas.multiply(1.0, v, ok, 1.0, dv, count);
    }
};

void check_gradients(const ReflectionGradients &r) {
    check_v(r.v);
    check_same(r.v, r.core, "the core", r.v.cols, r.v.cols);
    check_same(r.v, r.dv, "dV", r.v.rows, r.v.cols);
    check_tau(r.v, r.tau);
    if ((r.tau == nullptr) != (r.dtau == nullptr)) throw ValueError("tau and its gradient go together");
    if (r.dtau != nullptr) check_same(r.v, *r.dtau, "dtau", 1, r.v.cols);
}

} // namespace

std::int64_t reflection_product_workspace(const Stack &v, const Stack &q, int device) {
    if (nothing(v)) return 0;
    const int64_t each = v.cols * q.cols * size_of(v.dtype);
    return blas_workspace(device) + divide_up<int64_t>(together({&v}, {&q}, each) * each, 256) * 256;
}

void reflection_product(const Context &context, const Stack &v, const Stack &core, const Stack &q) {
    check_v(v);
    check_same(v, core, "the core", v.cols, v.cols);
    check_same(v, q, "Q", v.rows, q.cols);
    if (q.cols > v.rows) throw ValueError("Q has more columns than rows");
    const Session session(context);
    if (q.size() == 0 || q.rows == 0 || q.cols == 0) return;
    dispatch_wide(v.dtype, [&](auto tag) {
        using T = decltype(tag);
        launch<identity_kernel<T>>(session, "an identity", one_each(q.size() * q.rows * q.cols), Matrices<T>(q), q.size());
        if (nothing(v)) return;
        Workspace work(context);
        const Blas blas(session, work);
        const int64_t k = v.cols, batch = core.axes > 1 ? 1 : together({&v}, {&q}, k * q.cols * size_of(v.dtype));
        T *x = work.take<T>(batch * k * q.cols);
        for (int64_t i = 0; i < q.size(); i += batch) {
            const int64_t count = std::min(batch, q.size() - i);
            const Operand ov = operand(v, i), ox = own(x, k, q.cols);
            blas.multiply(1.0, operand(core, i), ov.part(0, q.cols, 0, k).transposed(), 0.0, ox, count);
            blas.multiply(1.0, ov, ox, 1.0, operand(q, i), count);
        }
    });
}

std::int64_t reflection_product_backward_workspace(const ReflectionGradients &r, const Stack &grad, int device) {
    return gradient_room(r, gradient_batch(r, {&grad}, grad.cols, false), grad.cols, false, device);
}

void reflection_product_backward(const Context &context, const ReflectionGradients &r, const Stack &grad) {
    check_gradients(r);
    check_same(r.v, grad, "grad", r.v.rows, grad.cols);
    require_blas_layout(operand(grad, 0), "grad");
    const Session session(context);
    if (nothing(r.v) || grad.cols == 0) return;
    Workspace work(context);
    const Blas blas(session, work);
    const int64_t k = r.v.cols, q = grad.cols, batch = gradient_batch(r, {&grad}, q, false);
    dispatch_wide(r.v.dtype, [&](auto tag) {
        using T = decltype(tag);
        const CoreGradient<T> core(work, k, batch);
        T *p = work.take<T>(batch * k * q), *x = work.take<T>(batch * k * q);
        for (int64_t i = 0; i < r.v.size(); i += batch) {
            const int64_t count = std::min(batch, r.v.size() - i);
            const Operand v = operand(r.v, i), n = operand(r.core, i), g = operand(grad, i), dv = operand(r.dv, i), top = v.part(0, q, 0, k);
            const Operand op = own(p, k, q), ox = own(x, k, q);
            blas.multiply(1.0, v.transposed(), g, 0.0, op, count);
            blas.multiply(1.0, n, top.transposed(), 0.0, ox, count);
            blas.multiply(1.0, g, ox.transposed(), 1.0, dv, count);
            blas.multiply(1.0, op.transposed(), n, 1.0, dv.part(0, q, 0, k), count);
            blas.multiply(1.0, op, top, 0.0, own(core.dn, k, k), count);
            core.finish(session, blas, r, i, count);
        }
    });
}

std::int64_t reflection_apply_backward_workspace(const ReflectionGradients &r, const Stack &c, int device) {
    return gradient_room(r, gradient_batch(r, {&c}, c.cols, true), c.cols, true, device);
}

void reflection_apply_backward(const Context &context, const ReflectionGradients &r, const Stack &c, const Stack &grad, bool transpose, const Stack &dc) {
    check_gradients(r);
    check_same(r.v, c, "C", r.v.rows, c.cols);
    check_same(r.v, grad, "grad", r.v.rows, c.cols);
    check_same(r.v, dc, "dC", r.v.rows, c.cols);
    require_blas_layout(operand(c, 0), "C");
    require_blas_layout(operand(grad, 0), "grad");
    require_blas_layout(operand(dc, 0), "dC");
    const Session session(context);
    const int64_t k = r.v.cols, width = c.cols;
    if (dc.size() == 0 || dc.rows == 0 || dc.cols == 0) return;
    dispatch_wide(r.v.dtype, [&](auto tag) {
        using T = decltype(tag);
        copies<T, T>(session, grad, 0, dc, 0, dc.size());
        if (nothing(r.v)) return;
        Workspace work(context);
        const Blas blas(session, work);
        const int64_t batch = grad.axes > 1 || dc.axes > 1 ? 1 : gradient_batch(r, {&c}, width, true);
        const CoreGradient<T> core(work, k, batch);
        T *w = work.take<T>(batch * k * width), *p = work.take<T>(batch * k * width), *x = work.take<T>(batch * k * width);
        for (int64_t i = 0; i < dc.size(); i += batch) {
            const int64_t count = std::min(batch, dc.size() - i);
            const Operand v = operand(r.v, i), oc = operand(c, i), g = operand(grad, i), dv = operand(r.dv, i);
            const Operand n = transpose ? operand(r.core, i).transposed() : operand(r.core, i);
            const Operand ow = own(w, k, width), op = own(p, k, width), ox = own(x, k, width), dn = own(core.dn, k, k);
            blas.multiply(1.0, v.transposed(), oc, 0.0, ow, count);
            blas.multiply(1.0, v.transposed(), g, 0.0, op, count);
            blas.multiply(1.0, n, ow, 0.0, ox, count);
            blas.multiply(1.0, g, ox.transposed(), 1.0, dv, count);
            if (transpose)
                blas.multiply(1.0, ow, op.transposed(), 0.0, dn, count);
            else
                blas.multiply(1.0, op, ow.transposed(), 0.0, dn, count);
            blas.multiply(1.0, n.transposed(), op, 0.0, ox, count); // gradient of VᵀC
            blas.multiply(1.0, oc, ox.transposed(), 1.0, dv, count);
            blas.multiply(1.0, v, ox, 1.0, operand(dc, i), count);
            core.finish(session, blas, r, i, count);
        }
    });
}

} // namespace subspan::cuda
