"""Orthonormal bases, sums and intersections of spaces and rotations on a device, against NumPy's in float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from references import wide
from subspan import orth

DTYPES = [np.dtype(np.float32), np.dtype(np.float64)]
IDS = ["f32", "f64"]
POLAR = [*DTYPES, np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
POLAR_IDS = [*IDS, "f16", "bf16"]
SHAPES = [(1, 1, ()), (12, 5, (3,)), (30, 30, ()), (90, 17, (2, 2)), (700, 9, ()), (40, 33, (2,))]


def eps(dtype):
    return float(ml_dtypes.finfo(dtype).eps)


def off(q):
    """How far from orthonormal columns are, as a share of what the contract allows."""
    q, k = wide(q), q.shape[-1]
    return np.abs(np.swapaxes(q, -1, -2) @ q - np.eye(k)).max(initial=0.0) / np.sqrt(max(k, 1))


def spans(q, a):
    """How much of the columns of a, at unit length, is outside of the span of q."""
    a = wide(a)
    a = a / np.maximum(np.linalg.norm(a, axis=-2, keepdims=True), 1e-300)
    return np.linalg.norm(a - wide(q) @ (np.swapaxes(wide(q), -1, -2) @ a), axis=-2).max(initial=0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("method", ["auto", "cholesky", "householder"])
@pytest.mark.parametrize(("m", "k", "batch"), SHAPES)
def test_bases(gpu, rng, dtype, method, m, k, batch):
    if gpu.control is not None and m * k > 500:
        gpu.control.hardware(9, 36000)  # a matrix does not fit a block
    A = (rng.standard_normal((*batch, m, k)) * np.logspace(0, -6, k)).astype(dtype)
    (q,) = gpu.twice(lambda: (orth.orthonormalize(gpu.put(A), method=method),))
    assert (q.shape, q.dtype) == (A.shape, A.dtype)
    assert off(q.get()) <= 10 * eps(dtype)
    assert spans(q.get(), A) <= 30 * eps(dtype) * np.sqrt(m)
    x = gpu.put(np.ascontiguousarray(np.swapaxes(A, -1, -2))).swapaxes(-1, -2)
    other, rank = orth.orthonormalize(x, method=method, return_rank=True)
    assert spans(other.get(), A) <= 30 * eps(dtype) * np.sqrt(m)
    np.testing.assert_array_equal(rank, np.full(batch, k) if batch else k)
    place = gpu.put(A)
    assert orth.orthonormalize(place, method=method, out=place) is place
    np.testing.assert_array_equal(place.get(), q.get())


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("small", [True, False])
def test_columns_that_depend_on_others(gpu, rng, dtype, small):
    if gpu.control is not None and not small:
        gpu.control.hardware(9, 36000)
    A = rng.standard_normal((2, 60 if small else 1600, 6)).astype(dtype)
    A[1, :, 4] = A[1, :, 0] * 2
    x = gpu.put(A)
    q, rank = orth.orthonormalize(x, return_rank=True)
    assert off(q.get()) <= 10 * eps(dtype)
    assert spans(q.get(), A) <= 100 * eps(dtype)
    assert list(rank) == [6, 5]
    with pytest.raises(np.linalg.LinAlgError, match="column 4 of A depends"):
        orth.orthonormalize(x, rank_deficient="raise", out=x)
    with pytest.raises(np.linalg.LinAlgError, match="cannot separate"):
        orth.orthonormalize(x, method="cholesky", out=x)
    np.testing.assert_array_equal(x.get(), A)


@pytest.mark.parametrize("dtype", POLAR, ids=POLAR_IDS)
@pytest.mark.parametrize(("m", "k", "batch"), [*SHAPES, (5, 12, (3,)), (9, 300, ())])
def test_the_nearest_orthonormal_matrix(gpu, rng, dtype, m, k, batch):
    A = rng.standard_normal((*batch, m, k)).astype(dtype)
    (q,) = gpu.twice(lambda: (orth.orthonormalize(gpu.put(A), method="polar"),))
    u, s, vt = np.linalg.svd(wide(A), full_matrices=False)
    got = wide(q.get())
    assert (q.shape, q.dtype) == (A.shape, A.dtype)
    assert off(got if m >= k else np.swapaxes(got, -1, -2)) <= 10 * eps(dtype)
    condition = (s[..., :1] / s[..., -1:]).max()
    assert np.abs(got - u @ vt).max() <= 8 * eps(dtype) * condition
    place = gpu.put(A)
    assert orth.orthonormalize(place, method="polar", out=place) is place
    np.testing.assert_array_equal(place.get(), q.get())


@pytest.mark.parametrize("dtype", POLAR, ids=POLAR_IDS)
@pytest.mark.parametrize("scale", [1e-30, 1e30, 1.0])
def test_polar_factors_of_any_size_and_rank(gpu, rng, dtype, scale):
    if dtype.itemsize == 2 and scale != 1:
        scale = {1e30: 100.0, 1e-30: 0.01}[scale]
    A = (scale * rng.standard_normal((2, 40, 3)) @ rng.standard_normal((2, 3, 12))).astype(dtype)
    A[1] = 0
    q = orth.orthonormalize(gpu.put(A), method="polar").get()
    assert off(q) <= 10 * eps(dtype)
    u, s, vt = (x[0] for x in np.linalg.svd(wide(A), full_matrices=False))
    # Where there are singular values it takes their right vectors to their left ones.
    assert np.abs(wide(q[0]) @ vt[:3].T - u[:, :3]).max() <= 20 * eps(dtype) * s[0] / s[2]
    A[0, 3, 4] = np.nan
    q = orth.orthonormalize(gpu.put(A), method="polar").get()
    assert np.isnan(wide(q[0])).all()
    assert off(q[1]) <= 10 * eps(dtype)


@pytest.mark.parametrize("dtype", POLAR, ids=POLAR_IDS)
@pytest.mark.parametrize("k", [1, 2, 8])
def test_orthonormal_matrices_stay_what_they_are(gpu, rng, dtype, k):
    """All singular values are at the end of the interval, where rounding could drive them away."""
    A = np.linalg.qr(rng.standard_normal((3, 30, k)))[0].astype(dtype)
    A[1] = np.eye(30, k)
    q = orth.orthonormalize(gpu.put(A), method="polar").get()
    assert np.abs(wide(q) - wide(A)).max() <= 4 * eps(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_ill_conditioned_polar_factors(gpu, rng, dtype):
    kappa = 0.01 / eps(dtype)
    u, v = (np.linalg.qr(rng.standard_normal((n, 20)))[0] for n in (70, 20))
    A = ((u * np.geomspace(1, 1 / kappa, 20)) @ v.T).astype(dtype)
    q = wide(orth.orthonormalize(gpu.put(A), method="polar").get())
    assert off(q) <= 10 * eps(dtype)
    h = q.T @ wide(A)  # symmetric and not negative: the backward error
    assert np.abs(h - h.T).max() <= 20 * eps(dtype)
    assert np.linalg.eigvalsh((h + h.T) / 2).min() >= -20 * eps(dtype)
    assert np.abs(q @ h - wide(A)).max() <= 20 * eps(dtype)


def test_vectors_and_what_is_refused(gpu, rng):
    v = rng.standard_normal(9)
    for method in ("auto", "cholesky", "householder", "polar"):
        q = orth.orthonormalize(gpu.put(v), method=method).get()
        np.testing.assert_allclose(np.abs(q), np.abs(v) / np.linalg.norm(v), rtol=1e-14)
    assert orth.orthonormalize(gpu.put(np.zeros((5, 0)))).shape == (5, 0)
    assert orth.orthonormalize(gpu.put(np.zeros((0, 5, 2))), method="polar").shape == (0, 5, 2)
    A = rng.standard_normal((5, 3))
    with pytest.raises(ValueError, match="so many cannot be orthonormal"):
        orth.orthonormalize(gpu.put(A.T))
    with pytest.raises(TypeError, match="A must be float32 or float64, got float16"):
        orth.orthonormalize(gpu.put(A.astype(np.float16)))
    with pytest.raises(TypeError, match="method='polar' are not implemented on CUDA devices"):
        orth.orthonormalize(gpu.put(A), method="polar", return_rank=True)
    with pytest.raises(ValueError, match="method must be 'auto', 'cholesky'"):
        orth.orthonormalize(gpu.put(A), method="qr")
    A[2, 1] = np.nan
    with pytest.raises(ValueError, match="A holds NaN"):
        orth.orthonormalize(gpu.put(A), method="cholesky")
    assert np.isnan(orth.orthonormalize(gpu.put(A)).get()).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize(("m", "n"), [(30, 8), (8, 30), (12, 12), (1, 5), (5, 1), (0, 4), (4, 0)])
@pytest.mark.parametrize("rank", [0, 1, 3, None])
def test_range_and_null_space(gpu, rng, dtype, m, n, rank):
    r = min(m, n) if rank is None else min(rank, m, n)
    a = (rng.standard_normal((2, m, r)) @ rng.standard_normal((2, r, n))).astype(dtype)
    u, w = orth.range_basis(gpu.put(a)).get(), orth.null_space(gpu.put(a)).get()
    assert u.shape == (2, m, r)
    assert w.shape == (2, n, n - r)
    assert u.dtype == w.dtype == dtype
    assert max(off(u), off(w)) <= 10 * eps(dtype)
    size = np.abs(a).max(initial=0) or 1
    assert np.abs(a @ w).max(initial=0) <= 100 * eps(dtype) * size * max(m, n) ** 0.5
    assert np.abs(a - u @ (np.swapaxes(u, 1, 2) @ a)).max(initial=0) <= 100 * eps(dtype) * size
    flipped = gpu.put(np.ascontiguousarray(np.swapaxes(a, 1, 2))).swapaxes(1, 2)
    np.testing.assert_array_equal(orth.range_basis(flipped).get(), u)


def test_ranges_that_are_refused(gpu):
    with pytest.raises(ValueError, match="dimensions"):
        orth.range_basis(gpu.put(np.stack([np.eye(4), np.diag([1.0, 1, 0, 0])])))
    assert orth.range_basis(gpu.put(np.diag([1.0, 1e-3, 1e-6])), rcond=1e-4).shape == (3, 2)
    assert orth.range_basis(gpu.put(np.ones(5))).shape == (5, 1)
    with pytest.raises(ValueError, match="A holds NaN"):
        orth.null_space(gpu.put(np.full((2, 2), np.nan)))
    with pytest.raises(ValueError, match="rcond must be in"):
        orth.null_space(gpu.put(np.eye(2)), rcond=1.0)
    with pytest.raises(TypeError, match="A must be float32 or float64, got float16"):
        orth.range_basis(gpu.put(np.eye(2, dtype=np.float16)))


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_composition(gpu, rng, dtype):
    """As on the CPU, of planted factors, of a link of two dimensions, and where a part is empty."""
    s, p, q = 5, 4, 6
    A, B = rng.standard_normal((3, p, s)), rng.standard_normal((3, q, p))
    eyes = np.broadcast_to(np.eye(s), (3, s, s)), np.broadcast_to(np.eye(p), (3, p, p))
    U, W = np.concatenate([eyes[0], A], 1).astype(dtype), np.concatenate([eyes[1], B], 1).astype(dtype)
    U = U * dtype.type(10.0) ** rng.integers(-6, 7, (s,)).astype(dtype)  # spans do not depend on the lengths of columns
    link = 2
    V = rng.standard_normal((11, 4)).astype(dtype)
    V[:6, 2:] = 0
    first = np.block([[V[:6, :2]], [np.eye(link, dtype=dtype)]]).astype(dtype)
    second = np.block([[np.eye(link), np.zeros((link, 2))], [V[6:, :2], V[6:, 2:]]]).astype(dtype)
    for one, two, shared in (
        (U, W, p),
        (U, W[0], p),
        (first, second, link),
        (np.eye(3, dtype=dtype)[:, :0], np.eye(3, dtype=dtype), 2),
        (U[0], W[0], 0),
        (np.eye(3, dtype=dtype), np.eye(3, dtype=dtype), 3),
    ):
        got, want = orth.compose(gpu.put(one), gpu.put(two), shared).get(), orth.compose(one, two, shared)
        assert got.shape == want.shape
        assert got.dtype == dtype
        assert off(got) <= 10 * eps(dtype)
        assert spans(got, want) <= 1e3 * eps(dtype)
    with pytest.raises(ValueError, match="shared must be from 0 to 9"):
        orth.compose(gpu.put(U), gpu.put(W), 99)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize(("k", "l", "both"), [(4, 5, 2), (1, 1, 0), (3, 3, 3), (6, 2, 2)])
def test_sums_and_intersections(gpu, rng, dtype, batch, k, l, both):  # noqa: E741
    n = 20
    u = np.linalg.qr(rng.standard_normal((*batch, n, k)))[0]
    w = np.concatenate([u[..., :both], rng.standard_normal((*batch, n, l - both))], -1)
    w = np.linalg.qr(w @ rng.standard_normal((*batch, l, l)))[0]
    U, W = u.astype(dtype), w.astype(dtype)
    whole = orth.span_sum(gpu.put(U), gpu.put(W)).get()
    assert whole.shape == (*batch, n, k + l - both)
    np.testing.assert_array_equal(whole[..., :k], U)
    common = orth.span_intersection(gpu.put(U), gpu.put(W)).get()
    assert common.shape == (*batch, n, both)
    for basis, inside in ((whole, U), (whole, W)):
        assert off(basis) <= 10 * eps(dtype)
        assert spans(basis, inside) <= 100 * eps(dtype)
    for basis in (U, W):
        assert spans(basis, common) <= 300 * eps(dtype)
    assert off(common) <= 10 * eps(dtype)


def test_a_tolerance_of_the_callers(gpu):
    U = np.eye(6)[:, :2]
    W = np.eye(6)[:, 1:3].copy()
    W[:, 0] = [0, np.cos(1e-4), 0, np.sin(1e-4), 0, 0]
    sizes = [orth.span_sum(gpu.put(U), gpu.put(W), tol=tol).shape[1] for tol in (1e-6, 1e-3)]
    assert sizes == [4, 3]
    assert orth.span_intersection(gpu.put(U), gpu.put(W), tol=1e-3).shape == (6, 1)
    assert orth.span_intersection(gpu.put(U), gpu.put(W)).shape == (6, 0)
    assert orth.span_sum(gpu.put(U[:, 0]), gpu.put(W[:, 1])).shape == (6, 2)
    with pytest.raises(ValueError, match="spaces of different dimensions"):
        orth.span_sum(gpu.put(np.stack([U, U])), gpu.put(np.stack([U, np.eye(6)[:, 3:5]])))
    with pytest.raises(ValueError, match="U or W holds NaN"):
        orth.span_sum(gpu.put(U), gpu.put(np.full((6, 1), np.nan)))
    with pytest.raises(ValueError, match="must live in one space"):
        orth.span_intersection(gpu.put(U), gpu.put(W[:4]))


@pytest.mark.parametrize("dtype", POLAR, ids=POLAR_IDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_rotations(gpu, rng, dtype, side):
    C, s, t = (rng.standard_normal(shape).astype(dtype) for shape in ((3, 40, 40), (40,), (40,)))
    got = wide(orth.rotate(gpu.put(C), gpu.put(s), gpu.put(t), side=side).get())
    want = orth.rotate(wide(C), wide(s), wide(t), side=side)
    assert np.abs(got - want).max() <= 40 * eps(dtype)
    near = (wide(s) * (1 + 1e-3)).astype(dtype)
    close = wide(orth.rotate(gpu.put(C), gpu.put(s), gpu.put(near), side=side).get())
    assert np.abs(close - wide(C)).max() <= 40 * eps(dtype)
    assert np.isnan(wide(orth.rotate(gpu.put(C), gpu.put(s), gpu.put((-s).astype(dtype)), side=side).get())).all()
    assert np.isnan(wide(orth.rotate(gpu.put(C), gpu.put(0 * s), gpu.put(t), side=side).get())).all()
    out = gpu.put(C)
    assert orth.rotate(out, gpu.put(s), gpu.put(t), side=side, out=out) is out
    np.testing.assert_array_equal(wide(out.get()), got)
    with pytest.raises(ValueError, match="source must have 40 entries"):
        orth.rotate(gpu.put(C), gpu.put(s[:7]), gpu.put(t), side=side)
