"""The classification head of Grassmann Class Representation: logits, their gradients, and a run on digits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

import subspan
from subspan import _core, grassmann

DTYPES = [np.float32, np.float64]
SHAPES = [
    (1, 1, 1, 1),
    (5, 7, 3, 2),
    (33, 40, 21, 8),
    (256, 65, 50, 7),
    (17, 300, 9, 40),
    (3, 20, 4, 20),
    (700, 30, 11, 3),
    (1, 30, 70, 5),
    (2, 9, 2100, 7),
    (4, 50, 64, 4),
    (3, 11, 50, 9),
    (39, 100, 8, 1),
]


def eps(dtype):
    return float(np.finfo(dtype).eps)


def points(rng, n, k, batch=(), dtype=np.float64):
    return np.linalg.qr(rng.standard_normal((*batch, n, k)))[0].astype(dtype)


def reference(x, U, scale):
    x, U = x.astype(np.float64), U.astype(np.float64)
    length = np.linalg.norm(x, axis=1, keepdims=True)
    unit = x / np.where(length > 0, length, 1)
    y = np.einsum("bn,cnk->bck", unit, U, optimize=True)
    return unit, length, y, scale * np.linalg.norm(y, axis=2)


def reference_backward(grad, x, U, scale):
    unit, length, y, _out = reference(x, U, scale)
    norm = np.linalg.norm(y, axis=2)
    w = grad[..., None] * scale * y / np.where(norm > 0, norm, 1)[..., None]
    dU = np.einsum("bn,bck->cnk", unit, w, optimize=True)
    d = np.einsum("bck,cnk->bn", w, U.astype(np.float64), optimize=True)
    dx = (d - unit * (unit * d).sum(1, keepdims=True)) / np.where(length > 0, length, np.inf)
    return dx, dU


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("layout", ["rows", "columns", "strided"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients(rng, dtype, shape, layout):
    batch, n, classes, k = shape
    x, U = rng.standard_normal((batch, n)).astype(dtype), points(rng, n, k, (classes,), dtype)
    grad = rng.standard_normal((batch, classes)).astype(dtype)
    if layout == "columns":
        U = np.ascontiguousarray(U.swapaxes(1, 2)).swapaxes(1, 2)
        x = np.asfortranarray(x)
    if layout == "strided":
        U = np.repeat(np.repeat(U, 2, axis=2), 3, axis=0)[::3, :, ::2]
        x, grad = np.repeat(x, 2, axis=1)[:, ::2], grad[::-1].copy()[::-1]
    got = grassmann.logits(x, U, scale=20.0)
    assert got.dtype == dtype
    np.testing.assert_allclose(got, reference(x, U, 20.0)[3], atol=20 * 20 * eps(dtype))
    dx, dU = grassmann.logits_backward(grad, x, U, scale=20.0)
    want_dx, want_dU = reference_backward(grad, x, U, 20.0)
    np.testing.assert_allclose(dx, want_dx, atol=400 * eps(dtype) * max(1, np.abs(want_dx).max()))
    np.testing.assert_allclose(dU, want_dU, atol=400 * eps(dtype) * max(1, np.abs(want_dU).max()))
    if layout == "columns" and n > 1 and k > 1:
        assert dU.strides[1] < dU.strides[2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (0, 7, 3, 2), (5, 7, 3, 0), (5, 7, 0, 2)])
def test_projections_that_are_kept(rng, dtype, shape):
    """They are what is computed without, to rounding, and stay as they are; the logits do not depend on them."""
    batch, n, classes, k = shape
    x, U = rng.standard_normal((batch, n)).astype(dtype), points(rng, n, k, (classes,), dtype)
    if batch > 1:
        x[1] = 0
    grad = rng.standard_normal((batch, classes)).astype(dtype)
    kept = np.full((batch, classes, k), np.nan, dtype)
    got = grassmann.logits(x, U, projections=kept)
    np.testing.assert_array_equal(got, grassmann.logits(x, U))
    np.testing.assert_allclose(kept, reference(x, U, 1.0)[2], atol=20 * eps(dtype))
    before = kept.copy()
    for found, want in zip(
        grassmann.logits_backward(grad, x, U, projections=kept), grassmann.logits_backward(grad, x, U), strict=True
    ):
        np.testing.assert_allclose(found, want, atol=400 * eps(dtype) * max(1, np.abs(want).max(initial=0)))
    np.testing.assert_array_equal(kept, before)


@pytest.mark.parametrize(
    ("kept", "error", "says"),
    [
        (np.empty((5, 3, 3)), ValueError, "projections"),
        (np.empty((5, 3, 2), np.float32), TypeError, "projections"),
        (np.empty((3, 5, 2)).swapaxes(0, 1), ValueError, "projections must be C-contiguous"),
        (np.broadcast_to(0.0, (5, 3, 2)), ValueError, "projections"),
        ([[[0.0] * 2] * 3] * 5, TypeError, "projections"),
    ],
)
def test_projections_that_are_refused(rng, kept, error, says):
    x, U = rng.standard_normal((5, 7)), points(rng, 7, 2, (3,))
    with pytest.raises(error, match=says):
        grassmann.logits(x, U, projections=kept)


def test_projections_may_not_be_what_is_read(rng):
    U = points(rng, 3, 2, (3,))
    x = np.ascontiguousarray(rng.standard_normal((4, 6)))
    room = np.empty(64)
    inside = room[:12].reshape(4, 3)
    inside[:] = x[:, :3]
    with pytest.raises(ValueError, match="projections"):
        grassmann.logits(inside, U, projections=room[4:28].reshape(4, 3, 2))


@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**31))
def test_gradients_are_those_of_the_logits(batch, n, classes, k, seed):
    """Central differences."""
    rng = np.random.default_rng(seed)
    k = min(k, n)
    x, U, grad = rng.standard_normal((batch, n)), points(rng, n, k, (classes,)), rng.standard_normal((batch, classes))
    y = reference(x, U, 3.0)[2]
    if np.linalg.norm(y, axis=2).min() < 1e-2:  # beside the point where the length has no derivative
        return
    dx, dU = grassmann.logits_backward(grad, x, U, scale=3.0)
    d, h = rng.standard_normal(x.shape), 1e-6
    first = (grad * (grassmann.logits(x + h * d, U, scale=3.0) - grassmann.logits(x - h * d, U, scale=3.0))).sum()
    assert first / (2 * h) == pytest.approx((dx * d).sum(), rel=1e-4, abs=1e-5)
    d = rng.standard_normal(U.shape)
    first = (grad * (grassmann.logits(x, U + h * d, scale=3.0) - grassmann.logits(x, U - h * d, scale=3.0))).sum()
    assert first / (2 * h) == pytest.approx((dU * d).sum(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_projections_have_finite_gradients(rng, dtype):
    U = np.zeros((3, 6, 2), dtype)
    U[0, :2], U[1, 2:4], U[2, 4:] = np.eye(2), np.eye(2), np.eye(2)
    x = np.zeros((3, 6), dtype)
    x[0, 0] = 2.0  # orthogonal to two of the classes
    x[2] = 1e-30 if dtype == np.float32 else 1e-300
    assert np.isfinite(grassmann.logits(x, U)).all()
    np.testing.assert_allclose(grassmann.logits(x, U)[0], [25, 0, 0])
    np.testing.assert_array_equal(grassmann.logits(x, U)[1], 0)
    np.testing.assert_allclose(grassmann.logits(x, U)[2], 25 / np.sqrt(3), rtol=1e-5)
    dx, dU = grassmann.logits_backward(np.ones((3, 3), dtype), x, U)
    assert np.isfinite(dU).all()
    assert np.isfinite(dx[:2]).all()
    np.testing.assert_array_equal(dx[1], 0)
    tiny = np.eye(1, 6, dtype=dtype) * dtype(1e-310 if dtype == np.float64 else 1e-40)
    dx, _ = grassmann.logits_backward(np.ones((1, 3), dtype), tiny, U)
    np.testing.assert_array_equal(dx, 0)
    # projections whose squares underflow
    x = np.zeros((1, 6), dtype)
    x[0, 0], x[0, 2] = 1, 1e-24 if dtype == np.float32 else 1e-200
    _, dU = grassmann.logits_backward(np.ones((1, 3), dtype), x, U)
    np.testing.assert_allclose(dU[1, 0], [25, 0], atol=1e-4)
    # the largest numbers there are
    big = np.full((1, 6), np.finfo(dtype).max, dtype)
    np.testing.assert_allclose(grassmann.logits(big, U), 25 / np.sqrt(3), rtol=1e-5)


def test_nan_goes_through(rng):
    x, U = rng.standard_normal((4, 10)), points(rng, 10, 2, (5,))
    x[2, 3] = np.nan
    got = grassmann.logits(x, U)
    assert np.isnan(got[2]).all()
    assert np.isfinite(got[[0, 1, 3]]).all()


def test_against_autograd(rng):
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(rng.standard_normal((16, 30))).requires_grad_()
    U = torch.from_numpy(points(rng, 30, 4, (7,))).requires_grad_()
    grad = torch.from_numpy(rng.standard_normal((16, 7)))
    y = 25 * torch.einsum("bn,cnk->bck", torch.nn.functional.normalize(x), U).norm(dim=-1)
    y.backward(grad)
    with torch.no_grad():
        got = grassmann.logits(x, U)
        dx, dU = grassmann.logits_backward(grad, x, U)
    torch.testing.assert_close(got, y.detach())
    torch.testing.assert_close(dx, x.grad)
    torch.testing.assert_close(dU, U.grad)
    weight = torch.from_numpy(points(rng, 30, 4, (7,)).swapaxes(1, 2).copy())
    _, dU = grassmann.logits_backward(grad, x.detach(), weight.mT)
    assert dU.mT.is_contiguous()


def test_projections_are_not_stored(rng):
    batch, n, classes, k = 256, 128, 2000, 8
    x, U = rng.standard_normal((batch, n)).astype(np.float32), points(rng, n, k, (classes,), np.float32)
    projections = batch * classes * k * 4
    before = subspan.get_num_threads()
    try:
        subspan.set_num_threads(2)
        _core.reset_work_memory_peak()
        grassmann.logits(x, U)
        assert _core.work_memory_peak() < projections / 8
        _core.reset_work_memory_peak()
        grassmann.logits_backward(np.ones((batch, classes), np.float32), x, U)
        assert _core.work_memory_peak() < projections / 3
    finally:
        subspan.set_num_threads(before)


def test_threads_do_not_matter(rng):
    x, U = rng.standard_normal((100, 90)).astype(np.float32), points(rng, 90, 8, (300,), np.float32)
    grad = rng.standard_normal((100, 300)).astype(np.float32)
    before = subspan.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            subspan.set_num_threads(threads)
            results.append((grassmann.logits(x, U), *grassmann.logits_backward(grad, x, U)))
    finally:
        subspan.set_num_threads(before)
    for r in results[1:]:
        for a, b in zip(r, results[0], strict=True):
            np.testing.assert_array_equal(a, b)


def test_empty(rng):
    U = points(rng, 5, 2, (3,))
    assert grassmann.logits(np.zeros((0, 5)), U).shape == (0, 3)
    dx, dU = grassmann.logits_backward(np.zeros((0, 3)), np.zeros((0, 5)), U)
    assert dx.shape == (0, 5)
    np.testing.assert_array_equal(dU, 0)
    assert grassmann.logits(np.ones((2, 5)), U[:0]).shape == (2, 0)


def test_what_is_refused(rng):
    x, U = rng.standard_normal((4, 5)), points(rng, 5, 2, (3,))
    with pytest.raises(ValueError, match="x must have shape"):
        grassmann.logits(x[0], U)
    with pytest.raises(ValueError, match=r"U must have shape \(classes, n, k\)"):
        grassmann.logits(x, U[0])
    with pytest.raises(ValueError, match="x has 4 features"):
        grassmann.logits(x[:, :4], U)
    with pytest.raises(TypeError, match="U must be float64 as x is"):
        grassmann.logits(x, U.astype(np.float32))
    with pytest.raises(ValueError, match=r"grad must have shape \(4, 3\)"):
        grassmann.logits_backward(np.ones((3, 4)), x, U)
    with pytest.raises(TypeError, match="grad must be float64 as x is"):
        grassmann.logits_backward(np.ones((4, 3), np.float32), x, U)


@pytest.mark.parametrize("k", [1, 8])
def test_grassmann_class_representation_on_digits(k):
    """Ten subspaces of normalised digits, cross-entropy: more dimensions a class are better."""
    x, y = load_digits(return_X_y=True)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    order = np.random.default_rng(0).permutation(len(y))
    x, y = x[order].astype(np.float32), y[order]
    train, test = slice(0, 1300), slice(1300, None)
    U = grassmann.random(64, k, batch=10, rng=0, dtype=np.float32)
    buffer = np.zeros_like(U)
    rng = np.random.default_rng(1)
    for _ in range(30):
        for batch in np.array_split(rng.permutation(1300), 20):
            p = np.exp(grassmann.logits(x[train][batch], U) - 25)
            p /= p.sum(1, keepdims=True)
            p[np.arange(len(batch)), y[train][batch]] -= 1
            _, dU = grassmann.logits_backward(p / len(batch), x[train][batch], U)
            grassmann.sgd_step(U, dU, buffer, lr=0.05, momentum=0.9)
    accuracy = (grassmann.logits(x[test], U).argmax(1) == y[test]).mean()
    assert accuracy <= 0.965 if k == 1 else accuracy >= 0.978
