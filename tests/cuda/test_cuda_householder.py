"""Many reflections and their gradients on a device against the CPU's in float64."""

from __future__ import annotations

import numpy as np
import pytest

from references import wide
from subspan import orth

DTYPES = [np.dtype(np.float32), np.dtype(np.float64)]
IDS = ["f32", "f64"]


def apart(got, want, dtype, scale=1.0):
    """The largest difference in units of eps and of the largest entry."""
    want = np.asarray(want)
    top = max(1.0, float(np.abs(want).max(initial=0.0)))
    return float(np.abs(wide(got.get()) - want).max(initial=0.0)) / (float(np.finfo(dtype).eps) * top * scale)


def reflections(rng, shape, dtype, given):
    V = rng.standard_normal(shape).astype(dtype)
    if not given:
        V[..., -1] = 0.0  # the identity
        return V, None
    return V, (1.7 * rng.random((*shape[:-2], shape[-1])) / (V**2).sum(-2)).astype(dtype)


SHAPES = [(20, 5, ()), (30, 30, (2,)), (16, 24, ()), (70, 66, (3,)), (150, 140, ()), (9, 1, (2, 2)), (40, 8, (1,))]


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(("m", "k", "batch"), SHAPES)
def test_products_and_their_gradients(gpu, rng, dtype, given, m, k, batch):
    V, tau = reflections(rng, (*batch, m, k), dtype, given)
    t = None if tau is None else gpu.put(tau)
    q = gpu.twice(lambda: orth.householder_product(gpu.put(V), t))
    assert apart(q, orth.householder_product(wide(V), wide(tau)), dtype) <= 100
    grad = rng.standard_normal(q.shape).astype(dtype)
    got = orth.householder_product_backward(gpu.put(grad), gpu.put(V), t)
    want = orth.householder_product_backward(wide(grad), wide(V), wide(tau))
    got, want = (x if given else (x,) for x in (got, want))
    assert [x.shape for x in got] == [x.shape for x in want]
    assert max(apart(x, y, dtype, k) for x, y in zip(got, want, strict=True)) <= 200


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(
    ("m", "k", "batch", "stack"), [(20, 5, (), ()), (12, 12, (2,), (2,)), (30, 7, (), (3,)), (25, 6, (1,), (2, 2))]
)
def test_gradients_of_their_action(gpu, rng, dtype, given, side, transpose, m, k, batch, stack):
    V, tau = reflections(rng, (*batch, m, k), dtype, given)
    C = rng.standard_normal((*stack, m, 9) if side == "left" else (*stack, 9, m)).astype(dtype)
    grad = rng.standard_normal(C.shape).astype(dtype)
    t = None if tau is None else gpu.put(tau)
    options = {"side": side, "transpose": transpose}
    got = gpu.twice(lambda: orth.householder_apply_backward(gpu.put(grad), gpu.put(V), gpu.put(C), t, **options))
    want = orth.householder_apply_backward(wide(grad), wide(V), wide(C), wide(tau), **options)
    assert [x.shape for x in got] == [x.shape for x in want]
    assert max(apart(x, y, dtype, k) for x, y in zip(got, want, strict=True)) <= 200


@pytest.mark.parametrize("side", ["left", "right"])
def test_many_reflections_act(gpu, rng, side):
    V, _ = reflections(rng, (200, 190), np.float64, False)
    C = rng.standard_normal((200, 7) if side == "left" else (7, 200))
    got = orth.householder_apply(gpu.put(V), gpu.put(C), side=side, transpose=True)
    assert apart(got, orth.householder_apply(V, C, side=side, transpose=True), np.float64) <= 300


def test_few_large_ones_go_through_products(emulation, rng):
    V, _ = reflections(rng, (1200, 120), np.float32, False)
    q = orth.householder_product(emulation.put(V))
    assert apart(q, orth.householder_product(wide(V)), np.float32) <= 100
    emulation.control.without_blas()
    with pytest.raises((ImportError, RuntimeError), match="cuBLAS was not found"):
        orth.householder_product(emulation.put(V))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("m", [20, 300])
def test_lengths_whose_squares_leave_the_range_are_no_identity(gpu, rng, dtype, m):
    v = np.full((m, 2), 1e20 if dtype == np.float32 else 1e160, dtype)
    assert np.isnan(gpu.get(orth.householder_product(gpu.put(v)))).any()
    C = rng.standard_normal((m, 5)).astype(dtype)
    assert np.isnan(gpu.get(orth.householder_apply(gpu.put(v), gpu.put(C)))).any()
    zero = gpu.get(orth.householder_apply(gpu.put(v * 0), gpu.put(C)))
    np.testing.assert_array_equal(zero, C)


def test_strides_of_gradients(gpu, rng):
    V, tau = reflections(rng, (2, 24, 6), np.float64, True)
    C, grad = rng.standard_normal((2, 2, 24, 10))
    want = orth.householder_apply_backward(grad, V, C, tau)
    transposed = [gpu.put(np.ascontiguousarray(x.swapaxes(-1, -2))).swapaxes(-1, -2) for x in (grad, V, C)]
    got = orth.householder_apply_backward(*transposed, gpu.put(tau))
    assert max(apart(x, y, np.float64, 6) for x, y in zip(got, want, strict=True)) <= 200


def test_what_is_refused(gpu, rng):
    V, tau = reflections(rng, (20, 4), np.float32, True)
    C = rng.standard_normal((20, 3)).astype(np.float32)
    with pytest.raises(ValueError, match=r"grad must have shape \(20, 4\)"):
        orth.householder_product_backward(gpu.put(C), gpu.put(V))
    with pytest.raises(ValueError, match="grad must have the shape of C"):
        orth.householder_apply_backward(gpu.put(V), gpu.put(V), gpu.put(C))
    with pytest.raises(ValueError, match="V must have 3 rows to act on C"):
        orth.householder_apply_backward(gpu.put(C), gpu.put(V), gpu.put(C), side="right")
    with pytest.raises(ValueError, match="all leading axes of V"):
        orth.householder_apply_backward(gpu.put(C), gpu.put(V[None].repeat(2, 0)), gpu.put(C))
    with pytest.raises(TypeError, match="grad is on the CPU"):
        orth.householder_product_backward(V, gpu.put(V), gpu.put(tau))


@pytest.mark.parametrize(("m", "k"), [(8, 3), (200, 150)])
def test_empty_stacks(gpu, m, k):
    V = gpu.put(np.zeros((0, m, k)))
    assert orth.householder_product(V).shape == (0, m, k)
    assert orth.householder_product_backward(V, V).shape == (0, m, k)
    assert [x.shape for x in orth.householder_apply_backward(V, V, V)] == [(0, m, k)] * 2


def test_gradients_of_any_strides(gpu, rng):
    """What autograd hands over after a sum has strides of zero; what a slice has, strides of two."""
    V, _ = reflections(rng, (2, 12, 5), np.float64, False)
    ones = np.ones((2, 12, 5))
    want = orth.householder_product_backward(ones, V)
    expanded = gpu.xp.broadcast_to(gpu.put(np.ones(1)), (2, 12, 5))
    assert apart(orth.householder_product_backward(expanded, gpu.put(V)), want, np.float64, 5) <= 200
    room = gpu.put(np.zeros((2, 24, 10)))
    room[:, ::2, ::2] = gpu.put(V)
    assert apart(orth.householder_product_backward(gpu.put(ones), room[:, ::2, ::2]), want, np.float64, 5) <= 200
    backwards = gpu.put(np.ascontiguousarray(V[::-1]))[::-1]
    assert apart(orth.householder_product_backward(gpu.put(ones), backwards), want, np.float64, 5) <= 200
    C, grad = rng.standard_normal((2, 2, 12, 7))
    want = orth.householder_apply_backward(grad, V, C)
    room = gpu.put(np.zeros((2, 24, 14)))
    room[:, ::2, ::2] = gpu.put(C)
    got = orth.householder_apply_backward(gpu.put(grad), backwards, room[:, ::2, ::2])
    assert max(apart(x, y, np.float64, 5) for x, y in zip(got, want, strict=True)) <= 200


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(12, 5), (3, 9, 9), (2, 2, 40, 7), (6, 0), (8,)])
def test_complement(gpu, rng, shape, dtype):
    """All that is orthogonal to a basis, for stacks, whole spaces, nothing and a vector."""
    U = np.linalg.qr(rng.standard_normal(shape if len(shape) > 1 else (*shape, 1)))[0].astype(dtype)
    given = U if len(shape) > 1 else U[:, 0]
    W = gpu.get(orth.complement(gpu.put(given)))
    *batch, n, k = U.shape
    assert W.shape == (*batch, n, n - k)
    whole = np.concatenate([U, W], axis=-1).astype(np.float64)
    error = np.abs(np.swapaxes(whole, -1, -2) @ whole - np.eye(n)).max(initial=0)
    assert error < 30 * np.finfo(dtype).eps * np.sqrt(n)
