"""Angles, distances, logarithms and class scores on a device against the CPU's in float64."""

from __future__ import annotations

import numpy as np
import pytest

from references import eps, points, wide
from subspan import grassmann

DTYPES = [np.dtype(np.float32), np.dtype(np.float64)]
IDS = ["f32", "f64"]
SIZES = [(20, 3, (4,)), (64, 8, (3,)), (5, 5, (2,)), (70, 16, ()), (45, 32, ()), (33, 20, (2, 2)), (7, 1, ())]
KINDS = ["geodesic", "chordal", "projection", "procrustes", "fubini-study", "binet-cauchy"]


def pair_at(rng, angles, n, dtype):
    """Two bases with these principal angles, in coordinates of their own."""
    k = len(angles)
    q = np.linalg.qr(rng.standard_normal((n, 2 * k)))[0]
    u, away = q[:, :k], q[:, k:]
    turn = [np.linalg.qr(rng.standard_normal((k, k)))[0] for _ in range(2)]
    return (u @ turn[0]).astype(dtype), ((u * np.cos(angles) + away * np.sin(angles)) @ turn[1]).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize(("n", "k", "batch"), SIZES)
def test_angles_and_vectors(gpu, rng, dtype, n, k, batch):
    U, W = points(rng, n, k, batch, dtype), points(rng, n, k, batch, dtype)
    got = gpu.twice(lambda: tuple(grassmann.principal_angles(gpu.put(U), gpu.put(W), vectors=True)))
    angles, p, q = (wide(x.get()) for x in got)
    want = grassmann.principal_angles(wide(U), wide(W), check=False)
    tol = 20 * eps(dtype) * np.sqrt(k)
    assert np.abs(angles - want).max() <= tol
    np.testing.assert_array_equal(grassmann.principal_angles(gpu.put(U), gpu.put(W)).get(), got[0].get())
    eye = np.eye(k)
    for x, basis in ((p, wide(U)), (q, wide(W))):
        assert np.abs(np.swapaxes(x, -1, -2) @ x - eye).max() <= 10 * eps(dtype) * np.sqrt(k)
        assert np.abs(x - basis @ (np.swapaxes(basis, -1, -2) @ x)).max() <= tol
    assert np.abs(np.swapaxes(p, -1, -2) @ q - eye * np.cos(angles)[..., None, :]).max() <= tol


SPREADS = [
    [1e-8, 1e-3, 0.5, 1.0],
    [1e-10, 1e-10, 1e-9, 0.3],
    [0.0, 0.0, np.pi / 2, np.pi / 2],
    [np.pi / 2 - 1e-9, np.pi / 2 - 1e-3, np.pi / 2],
    [0.7, 0.7, 0.7 + 1e-7, 0.8],
    [1e-14, 1e-5, 1e-3, 1.5],
    [0.0],
    [np.pi / 2],
]


@pytest.mark.parametrize("angles", SPREADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_angles_of_any_size(gpu, rng, dtype, angles):
    k = len(angles)
    U, W = pair_at(rng, angles, 30, dtype)
    got = grassmann.principal_angles(gpu.put(U), gpu.put(W)).get()
    want = grassmann.principal_angles(wide(U), wide(W), check=False)  # of what rounding has made of the bases
    assert np.abs(wide(got) - np.sort(want)).max() <= 20 * eps(dtype) * np.sqrt(k)
    if dtype == np.float64:
        assert np.abs(got - np.sort(angles)).max() <= 20 * eps(dtype) * np.sqrt(k)
    for kind in KINDS:
        d = float(grassmann.distance(gpu.put(U), gpu.put(W), kind=kind).get())
        assert abs(d - grassmann.distance(wide(U), wide(W), kind=kind, check=False)) <= 20 * eps(dtype) * k


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_all_pairs(gpu, rng, dtype):
    U, W = points(rng, 12, 3, (4,), dtype), points(rng, 12, 3, (5,), dtype)
    u, w = gpu.put(U), gpu.put(W)
    for kind in KINDS:
        d = grassmann.distance(u.reshape(4, 1, 12, 3), w, kind=kind)
        assert d.shape == (4, 5)
        want = grassmann.distance(wide(U)[:, None], wide(W), kind=kind, check=False)
        assert np.abs(wide(d.get()) - want).max() <= 20 * eps(dtype) * np.sqrt(3)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize(("n", "k", "batch"), SIZES)
def test_logarithms(gpu, rng, dtype, n, k, batch):
    U, W = points(rng, n, k, batch, dtype), points(rng, n, k, batch, dtype)
    H = gpu.twice(lambda: grassmann.log(gpu.put(U), gpu.put(W)))
    want = grassmann.log(wide(U), wide(W), check=False)
    # Near a right angle the logarithm turns fast: directions are known to eps over the smallest cosine.
    cosine = np.cos(grassmann.principal_angles(wide(U), wide(W), check=False)).min()
    assert np.abs(wide(H.get()) - want).max() <= 20 * eps(dtype) * np.sqrt(k) * max(1.0, 1.0 / cosine)
    assert np.abs(np.swapaxes(wide(U), -1, -2) @ wide(H.get())).max() <= 20 * eps(dtype) * np.sqrt(k)
    w = gpu.put(W)
    assert grassmann.log(gpu.put(U), w, out=w) is w
    np.testing.assert_array_equal(w.get(), H.get())


@pytest.mark.parametrize("angles", SPREADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_there_and_back(gpu, rng, dtype, angles):
    k = len(angles)
    U, W = pair_at(rng, angles, 30, dtype)
    H = grassmann.log(gpu.put(U), gpu.put(W))
    s = np.sort(np.linalg.svd(wide(H.get()), compute_uv=False))
    tol = 20 * eps(dtype) * np.sqrt(k)
    assert np.abs(s - np.sort(grassmann.principal_angles(wide(U), wide(W), check=False))).max() <= tol
    there = wide(grassmann.exp(gpu.put(U), H).get())
    assert np.abs(wide(W) - there @ (there.T @ wide(W))).max() <= 2 * tol


def test_what_is_refused(gpu, rng):
    U = points(rng, 20, 3, (2,), np.float32)
    with pytest.raises(TypeError, match="W must be float32 as U is, got float64"):
        grassmann.log(gpu.put(U), gpu.put(wide(U)))
    with pytest.raises(ValueError, match="W must hold matrices of the shape"):
        grassmann.distance(gpu.put(U), gpu.put(U[:, :, :2]))
    with pytest.raises(ValueError, match="at most 32"):
        grassmann.principal_angles(*[gpu.put(points(rng, 40, 33, (), np.float32))] * 2)
    U[1, 3, 2] = np.nan
    d = grassmann.distance(gpu.put(U), gpu.put(U)).get()
    assert np.isfinite(d[0])
    assert np.isnan(d[1])
    assert np.isnan(grassmann.principal_angles(gpu.put(U), gpu.put(U)).get()[1]).any()


# -- class scores ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize(("batch", "classes", "n", "k"), [(7, 5, 20, 3), (1, 1, 4, 1), (40, 3, 9, 8), (3, 20, 33, 1)])
def test_logits_and_their_gradients(gpu, rng, dtype, by_columns, batch, classes, n, k):
    U = points(rng, n, k, (classes,), dtype)
    x = rng.standard_normal((batch, n)).astype(dtype)
    if batch > 2:
        x[1] = 0.0  # logits and gradients of zero
        x[2] = U[0, :, 0]  # in the span of a class
    u = gpu.put(np.ascontiguousarray(U.swapaxes(1, 2))).swapaxes(1, 2) if by_columns else gpu.put(U)
    got = gpu.twice(lambda: grassmann.logits(gpu.put(x), u, scale=10.0))
    want = grassmann.logits(wide(x), wide(U), scale=10.0)
    assert np.abs(wide(got.get()) - want).max() <= 200 * eps(dtype)
    grad = rng.standard_normal(want.shape).astype(dtype)
    dx, dU = gpu.twice(lambda: grassmann.logits_backward(gpu.put(grad), gpu.put(x), u, scale=10.0))
    want_x, want_u = grassmann.logits_backward(wide(grad), wide(x), wide(U), scale=10.0)
    assert k == 1 or dU.strides == u.strides
    kept, want_kept = gpu.put(np.full((batch, classes, k), np.nan, dtype)), np.empty((batch, classes, k))
    assert np.abs(grassmann.logits(gpu.put(x), u, scale=10.0, projections=kept).get() - got.get()).max() == 0
    grassmann.logits(wide(x), wide(U), projections=want_kept)
    assert np.abs(wide(kept.get()) - want_kept).max() <= 20 * eps(dtype)
    again = grassmann.logits_backward(gpu.put(grad), gpu.put(x), u, scale=10.0, projections=kept)
    for a, b in ((dx, want_x), (dU, want_u), (again[0], want_x), (again[1], want_u)):
        assert np.abs(wide(a.get()) - b).max() <= 200 * eps(dtype) * max(1.0, np.abs(b).max()) * classes


@pytest.mark.parametrize(("batch", "classes"), [(0, 3), (4, 0), (0, 0)])
def test_no_features_or_no_classes(gpu, batch, classes):
    x, U = np.ones((batch, 8)), np.zeros((classes, 8, 2))
    assert grassmann.logits(gpu.put(x), gpu.put(U)).shape == (batch, classes)
    dx, dU = grassmann.logits_backward(gpu.put(np.ones((batch, classes))), gpu.put(x), gpu.put(U))
    np.testing.assert_array_equal(dx.get(), 0 * x)
    np.testing.assert_array_equal(dU.get(), U)


def test_projections_of_features_of_no_length(gpu):
    kept = gpu.put(np.full((3, 4, 2), np.nan))
    grassmann.logits(gpu.put(np.ones((3, 0))), gpu.put(np.ones((4, 0, 2))), projections=kept)
    np.testing.assert_array_equal(kept.get(), 0)


def test_logits_of_strided_features(gpu, rng):
    U, x = points(rng, 9, 3, (4,), np.float64), rng.standard_normal((5, 9))
    room = gpu.put(np.zeros((10, 18)))
    room[::2, ::2] = gpu.put(x)
    u = gpu.put(np.ascontiguousarray(U[::-1]))[::-1]
    got = grassmann.logits(room[::2, ::2], u)
    assert np.abs(got.get() - grassmann.logits(x, U)).max() <= 1e-12
    wide_room = gpu.put(np.zeros((4, 18, 9)))
    wide_room[:, ::2, ::3] = gpu.put(U)
    strided = wide_room[:, ::2, ::3]
    assert np.abs(grassmann.logits(gpu.put(x), strided).get() - grassmann.logits(x, U)).max() <= 1e-12
    grad = rng.standard_normal((5, 4))
    for a, b in zip(
        grassmann.logits_backward(gpu.put(grad), gpu.put(x), strided),
        grassmann.logits_backward(grad, x, U),
        strict=True,
    ):
        assert np.abs(a.get() - b).max() <= 1e-11


def test_logits_that_are_refused(gpu, rng):
    U, x = points(rng, 12, 2, (3,), np.float32), np.ones((4, 12), np.float32)
    with pytest.raises(ValueError, match="x has 12 features"):
        grassmann.logits(gpu.put(x), gpu.put(U[:, :5]))
    with pytest.raises(TypeError, match="U is on the CPU and x on CUDA device 0"):
        grassmann.logits(gpu.put(x), U)
    with pytest.raises(ValueError, match=r"grad must have shape \(4, 3\)"):
        grassmann.logits_backward(gpu.put(x), gpu.put(x), gpu.put(U))
