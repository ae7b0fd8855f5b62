"""Optimiser steps on stacks of subspaces against float64 references of the published formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

import subspan
from subspan import grassmann

DTYPES = [np.float32, np.float64]
RETRACTIONS = ["cholesky", "polar", "qr", "cayley", "exp"]


def eps(dtype):
    return float(np.finfo(dtype).eps)


def contract(dtype, k):
    return 10 * eps(dtype) * math.sqrt(k)


def orthonormality(U):
    U = np.asarray(U, np.float64)
    return np.abs(U.swapaxes(-1, -2) @ U - np.eye(U.shape[-1])).max(initial=0)


def points(rng, n, k, batch=(), dtype=np.float64):
    return np.linalg.qr(rng.standard_normal((*batch, n, k)))[0].astype(dtype)


def projectors(U):
    U = np.asarray(U, np.float64)
    return U @ U.swapaxes(-1, -2)


def geodesic(U, D):
    """exp by the thin SVD, float64."""
    q, s, vt = np.linalg.svd(D, full_matrices=False)
    v = vt.swapaxes(-1, -2)
    return (U @ v * np.cos(s)[..., None, :] + q * np.sin(s)[..., None, :]) @ vt


def published_step(U, buffer, grad, lr, momentum, dampening, count):
    """Grassmann Class Representation's step in float64: momentum, projection, SVD, geodesic, QR every five steps. The
    signs of QR are undone: they change the basis under the momentum, which no formula of the paper does."""
    buffer = momentum * buffer + (1 - dampening) * grad
    U = geodesic(U, -lr * (buffer - U @ (U.swapaxes(-1, -2) @ buffer)))
    if count % 5 == 0:
        Q, R = np.linalg.qr(U)
        U = Q * np.sign(np.diagonal(R, axis1=-2, axis2=-1))[..., None, :]
    return U, buffer


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def digits():
    x = load_digits().data
    return x - x.mean(0)


# -- sgd ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 4, 8, 17])
def test_trajectory_of_the_published_formulas(rng, dtype, layout, k):
    """200 steps on the Rayleigh quotients of 6 matrices: the same points as float64, to 1e-5."""
    n, classes = 40, 6
    A = rng.standard_normal((classes, n, n)) / n
    A = A @ A.swapaxes(1, 2)
    want = points(rng, n, k, (classes,), dtype).astype(np.float64)
    U = want.astype(dtype)
    if layout == "columns":
        U = np.ascontiguousarray(U.swapaxes(1, 2)).swapaxes(1, 2)
    buffer, mine = np.zeros_like(want), np.zeros_like(U)
    for i in range(200):
        want, buffer = published_step(want, buffer, -A @ want, 0.3, 0.9, 0.1, i)
        got = grassmann.sgd_step(
            U, (-A @ U.astype(np.float64)).astype(dtype), mine, lr=0.3, momentum=0.9, dampening=0.1
        )
        assert got is U
    assert np.abs(U - want).max() < (1e-5 if dtype == np.float32 else 1e-12)
    assert orthonormality(U) <= contract(dtype, k)


@pytest.mark.parametrize("retraction", RETRACTIONS)
def test_dominant_subspace_of_digits(digits, rng, retraction):
    """Converges to the principal components, which are known."""
    C = digits.T @ digits
    C /= np.linalg.norm(C, 2)
    want = np.linalg.eigh(C)[1][:, -5:]
    for dtype in DTYPES:
        U = points(rng, 64, 5, (3,), dtype)
        buffer = np.zeros_like(U)
        for _ in range(800):
            grassmann.sgd_step(U, (-C @ U).astype(dtype), buffer, lr=0.5, momentum=0.5, retraction=retraction)
        assert grassmann.distance(U, want.astype(dtype)).max() < (1e-9 if dtype == np.float64 else 1e-4)
        assert orthonormality(U) <= contract(dtype, 5)


@pytest.mark.parametrize(
    ("k", "retraction", "transport"),
    [
        (1, "exp", "project"),
        (8, "exp", "project"),
        (3, "exp", "parallel"),
        (3, "cholesky", "project"),
        (8, "polar", "project"),
        (3, "cayley", "project"),
        (1, "qr", "project"),
    ],
)
def test_drift_over_a_hundred_thousand_steps(rng, k, retraction, transport):
    U = points(rng, 24, k, (2,), np.float32)
    buffer = np.zeros_like(U)
    noise = (0.05 * rng.standard_normal((64, *U.shape))).astype(np.float32)
    options = {"lr": 0.1, "momentum": 0.9, "retraction": retraction, "transport": transport, "check": False}
    worst = 0.0
    for i in range(100_000):
        grassmann.sgd_step(U, noise[i % 64], buffer, **options)
        if i % 5000 == 4999:
            worst = max(worst, orthonormality(U))
    assert worst <= contract(np.float32, k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [130, 219, 251, 256, 1000])
def test_bases_of_nearly_equal_entries(dtype, n):
    """Hadamard and cosine columns: sums of equal terms round in one direction."""
    i = np.arange(n)
    for k in (1, 2):
        U = np.linalg.qr(np.stack([np.ones(n), (-1.0) ** i][:k], 1))[0].astype(dtype)[None]
        buffer = np.zeros_like(U)
        for step in range(8):
            H = (1e-3 * np.cos((step + 1.5) * i)[:, None] * np.ones(k)).astype(dtype)[None]
            grassmann.sgd_step(U, H, buffer, lr=0.5, momentum=0.9)
            assert orthonormality(U) <= contract(dtype, k)
        G = np.cos(1.5 * i)[:, None].astype(dtype) * np.ones((1, n, k), dtype)
        W = grassmann.exp(U, grassmann.tangent(U, G) * dtype(0.05))
        assert orthonormality(W) <= contract(dtype, k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 4])
def test_gradients_mostly_along_the_subspace(rng, dtype, k):
    """The Gram matrix of the tangent part is a small difference then."""
    for along in (0.3, 1.0, 1.6, 1.9, 5.0, 1000.0):
        for part in (1e-6, 1e-3, 0.1):
            U = points(rng, 250, k, (60,), dtype)
            G = (along * U + part * rng.standard_normal(U.shape) / 16).astype(dtype)
            u, g = U.astype(np.float64), G.astype(np.float64)
            want = geodesic(u, u @ (u.swapaxes(1, 2) @ g) - g)
            grassmann.sgd_step(U, G, lr=1.0)
            assert orthonormality(U) <= contract(dtype, k)
            assert np.abs(projectors(U) - projectors(want)).max() <= 50 * eps(dtype) * max(1.0, along)


def test_no_column_changes_its_sign(rng):
    """Small steps move every column a little; a QR factorisation would turn some of them round."""
    U = points(rng, 30, 8, (20,), np.float32)
    for _ in range(200):
        before = U.copy()
        grassmann.sgd_step(U, rng.standard_normal(U.shape).astype(np.float32), lr=1e-3)
        assert ((U * before).sum(-2) > 0.99).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_momentum_it_is_the_exponential_map(rng, dtype):
    U = points(rng, 30, 4, (5,), dtype)
    G = rng.standard_normal(U.shape).astype(dtype)
    for method in RETRACTIONS:
        want = grassmann.retract(U, grassmann.tangent(U, G), method=method, t=-0.05)
        got = U.copy()
        grassmann.sgd_step(got, G, lr=0.05, retraction=method)
        np.testing.assert_allclose(got, want, atol=20 * eps(dtype))
        up = U.copy()
        grassmann.sgd_step(up, -G, lr=0.05, retraction=method, maximize=True)
        np.testing.assert_array_equal(up, got)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parallel_transport_of_the_momentum(rng, dtype):
    """The buffer is tangent after every step and what moving it along the geodesic gives."""
    want = points(rng, 30, 4, (3,))
    U = want.astype(dtype)
    moved = np.zeros(U.shape)
    buffer = np.zeros_like(U)
    for _ in range(20):
        G = rng.standard_normal(U.shape)
        moved = 0.9 * moved + 0.5 * G
        moved -= want @ (want.swapaxes(1, 2) @ moved)
        there = grassmann.exp(want, moved, -0.05)
        moved = grassmann.transport(want, moved, moved, -0.05)
        want = there
        grassmann.sgd_step(U, G.astype(dtype), buffer, lr=0.05, momentum=0.9, dampening=0.5, transport="parallel")
        size = np.linalg.norm(buffer)
        assert np.abs(U.swapaxes(1, 2).astype(np.float64) @ buffer).max() <= 20 * eps(dtype) * size
    np.testing.assert_allclose(U, want, atol=400 * eps(dtype))
    np.testing.assert_allclose(buffer, moved, atol=400 * eps(dtype) * np.abs(moved).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lr", [10.0, 1e6, 1e30])
@pytest.mark.parametrize("retraction", RETRACTIONS)
def test_huge_rates_stay_on_the_manifold(rng, dtype, lr, retraction):
    U = points(rng, 30, 6, (4,), dtype)
    buffer = np.zeros_like(U)
    for _ in range(3):
        grassmann.sgd_step(
            U, rng.standard_normal(U.shape).astype(dtype), buffer, lr=lr, momentum=0.9, retraction=retraction
        )
        assert np.isfinite(U).all()
        assert orthonormality(U) <= contract(dtype, 6)
    if retraction == "exp":
        grassmann.sgd_step(U, np.zeros_like(U), buffer, lr=lr, momentum=1.0, transport="parallel")
        assert orthonormality(U) <= contract(dtype, 6)
        assert np.isfinite(buffer).all()


@pytest.mark.parametrize("retraction", RETRACTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_zero_gradient_changes_nothing(rng, dtype, retraction):
    U = grassmann.random(30, 6, batch=(40,), rng=0, dtype=dtype)
    before = U.copy()
    grassmann.sgd_step(U, np.zeros_like(U), lr=0.1, retraction=retraction)
    np.testing.assert_allclose(U, before, atol=4 * eps(dtype))
    U, before = np.tile(np.eye(30, 6, dtype=dtype), (3, 1, 1)), np.eye(30, 6, dtype=dtype)
    buffer = np.zeros_like(U)
    grassmann.sgd_step(U, np.zeros_like(U), buffer, lr=0.1, momentum=0.9, retraction=retraction)
    np.testing.assert_array_equal(U, np.broadcast_to(before, U.shape))
    # the gradient of a function of the matrix that is constant on the subspace
    grassmann.sgd_step(U, U @ np.ones((6, 6), dtype), lr=0.1, retraction=retraction)
    np.testing.assert_allclose(U, np.broadcast_to(before, U.shape), atol=4 * eps(dtype))


@given(
    st.integers(1, 20),
    st.integers(0, 40),
    st.integers(1, 5),
    st.sampled_from(RETRACTIONS),
    st.booleans(),
    st.floats(-6, 3),
    st.integers(0, 2**31),
)
def test_any_shape_stays_on_the_manifold(k, more, classes, retraction, wide, exponent, seed):
    rng = np.random.default_rng(seed)
    dtype = np.float64 if wide else np.float32
    U = points(rng, k + more, k, (classes,), dtype)
    buffer = np.zeros_like(U)
    for _ in range(3):
        G = rng.standard_normal(U.shape).astype(dtype)
        want = grassmann.retract(
            U, (0.9 * buffer + G).astype(dtype), t=-(10.0**exponent), method=retraction, project=True, check=False
        )
        grassmann.sgd_step(U, G, buffer, lr=10.0**exponent, momentum=0.9, retraction=retraction)
        assert orthonormality(U) <= contract(dtype, k)
        if exponent < 0:
            assert np.abs(projectors(U) - projectors(want)).max() <= 200 * eps(dtype)


def test_a_basis_that_is_not_orthonormal_comes_back(rng):
    """Without the check, at once."""
    for U in (points(rng, 30, 5) * 1.01, rng.standard_normal((30, 5)), points(rng, 30, 5) + 1e-5):
        span = np.linalg.qr(U)[0]
        grassmann.sgd_step(U, np.zeros_like(U), lr=0.1, check=False)
        assert orthonormality(U) <= contract(np.float64, 5)
        np.testing.assert_allclose(projectors(U), projectors(span), atol=1e-12)


# -- adam --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("retraction", RETRACTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_adam(rng, dtype, retraction):
    want = points(rng, 30, 4, (3, 2))
    U = want.astype(dtype)
    m, v = np.zeros(U.shape), np.zeros((3, 2, 1, 1))
    first, second = np.zeros_like(U), np.zeros((3, 2), dtype)
    for i in range(1, 30):
        G = rng.standard_normal(U.shape)
        tangent = G - want @ (want.swapaxes(-1, -2) @ G)
        m = 0.8 * m + 0.2 * tangent
        v = 0.95 * v + 0.05 * (tangent**2).sum((-2, -1), keepdims=True)
        step = (m - want @ (want.swapaxes(-1, -2) @ m)) / (1 - 0.8**i) / (np.sqrt(v / (1 - 0.95**i)) + 1e-6)
        want = grassmann.retract(want, -0.1 * step, method=retraction)
        got = grassmann.adam_step(
            U, G.astype(dtype), first, second, step=i, lr=0.1, betas=(0.8, 0.95), eps=1e-6, retraction=retraction
        )
        assert got is U
    np.testing.assert_allclose(U, want, atol=200 * eps(dtype))
    np.testing.assert_allclose(first, m, atol=20 * eps(dtype))
    np.testing.assert_allclose(second, v[..., 0, 0], rtol=20 * eps(dtype))


def test_adam_with_gradients_mostly_along_the_subspace(rng):
    """The second moment is that of the tangent part, which a difference of squares would lose."""
    U = points(rng, 30, 4, (), np.float32)
    tangent = grassmann.random_tangent(U, rng=1)
    G = 1000 * U + tangent
    exact = G.astype(np.float64) - U.astype(np.float64) @ (U.T.astype(np.float64) @ G)
    first, second = np.zeros_like(U), np.zeros((), np.float32)
    grassmann.adam_step(U, G, first, second, step=1, lr=0.1, betas=(0.9, 0.0))
    assert second == pytest.approx((exact**2).sum(), rel=1e-2)


@pytest.mark.parametrize("transport", ["project", "parallel"])
@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_adam_does_not_see_what_is_along_the_subspace(shift, transport):
    """A multiple of the identity added to a quadratic form changes nothing on the manifold."""
    A = np.diag([5.0, 4.0, 1.0, 0.5, 0.1]) + shift * np.eye(5)
    U = grassmann.random(5, 2, rng=0)
    first, second = np.zeros_like(U), np.zeros(())
    for i in range(1500):
        grassmann.adam_step(U, -A @ U, first, second, step=i + 1, lr=0.02, transport=transport)
    assert grassmann.distance(U, np.eye(5)[:, :2]) < 1e-8


@pytest.mark.parametrize("size", [1e-40, 1e-24, 1e-20, 1e-15, 1e15, 1e20, 1e35])
@pytest.mark.parametrize("small", [1e-30, 0.0, 1e-308])
def test_adam_of_extreme_gradients(rng, size, small):
    U = points(rng, 10, 3, (40,), np.float32)
    first, second = np.zeros_like(U), np.zeros(40, np.float32)
    for i in range(3):
        G = (size * rng.standard_normal(U.shape)).astype(np.float32)
        G[::2] = 0
        grassmann.adam_step(U, G, first, second, step=i + 1, lr=10.0, eps=small)
        assert np.isfinite(U).all()
        assert orthonormality(U) <= contract(np.float32, 3)
    assert np.isfinite(first).all()
    assert np.isfinite(second).all()


def test_adam_with_parallel_transport(rng):
    U = points(rng, 30, 4, (3,))
    first, second = np.zeros_like(U), np.zeros(3)
    for i in range(1, 20):
        grassmann.adam_step(U, rng.standard_normal(U.shape), first, second, step=i, lr=0.1, transport="parallel")
        assert np.abs(U.swapaxes(1, 2) @ first).max() < 1e-13


def test_adam_without_gradients(rng):
    U = np.tile(np.eye(8, 3), (2, 1, 1))
    first, second = np.zeros_like(U), np.zeros(2)
    grassmann.adam_step(U, np.zeros_like(U), first, second, step=1, lr=0.1, eps=0.0)
    np.testing.assert_array_equal(U, np.tile(np.eye(8, 3), (2, 1, 1)))


# -- arrays ------------------------------------------------------------------------------------------------------------


def test_threads_do_not_matter(rng):
    U = points(rng, 100, 8, (70,), np.float32)
    G = rng.standard_normal((5, *U.shape)).astype(np.float32)
    before = subspan.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            subspan.set_num_threads(threads)
            u, b, m, v = U.copy(), np.zeros_like(U), np.zeros_like(U), np.zeros(70, np.float32)
            w = U.copy()
            for i, g in enumerate(G):
                grassmann.sgd_step(u, g, b, lr=0.01, momentum=0.9)
                grassmann.adam_step(w, g, m, v, step=i + 1, lr=0.01)
            results.append((u, b, w, m, v))
    finally:
        subspan.set_num_threads(before)
    for r in results[1:]:
        for a, b in zip(r, results[0], strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(rng, dtype):
    """Any view is updated in place, and nothing beside it."""
    U, G = points(rng, 20, 5, (4,), dtype), rng.standard_normal((4, 20, 5)).astype(dtype)
    want, wanted = U.copy(), np.zeros_like(U)
    grassmann.sgd_step(want, G, wanted, lr=0.1, momentum=0.9)
    big = np.full((4, 45, 12), 7.0, dtype)
    u, b = big[:, 1:41:2, 1:6], big[:, 2:42:2, 11:6:-1]
    u[...], b[...] = U, 0
    grassmann.sgd_step(u, G[..., ::-1].copy()[..., ::-1], b, lr=0.1, momentum=0.9)
    np.testing.assert_allclose(u, want, atol=4 * eps(dtype))
    np.testing.assert_allclose(b, wanted, atol=4 * eps(dtype))
    u[...], b[...] = 7, 7
    assert (big == 7).all()


def test_a_stored_weight_of_pytorch(rng):
    """(C, k, n) rows, as a linear layer keeps them, through a transposed view and under autograd."""
    torch = pytest.importorskip("torch")
    weight = torch.nn.Parameter(torch.from_numpy(points(rng, 20, 3, (4,), np.float32).swapaxes(1, 2).copy()))
    before = weight.detach().numpy().swapaxes(1, 2).copy()
    (weight**3).sum().backward()
    buffer = torch.zeros_like(weight)
    version = weight._version
    with torch.no_grad():
        grassmann.sgd_step(weight.mT, weight.grad.mT, buffer.mT, lr=0.1, momentum=0.9)
    assert weight._version > version
    grad = 3 * before**2
    want = grassmann.exp(before, grassmann.tangent(before, grad), -0.1)
    np.testing.assert_allclose(weight.detach().numpy().swapaxes(1, 2), want, atol=1e-6)
    np.testing.assert_allclose(buffer.numpy().swapaxes(1, 2), grad, atol=1e-6)
    with pytest.raises(TypeError, match="requires grad"):
        grassmann.sgd_step(weight.mT, weight.grad.mT, lr=0.1)


def test_empty_stacks():
    U = np.zeros((0, 5, 2))
    assert grassmann.sgd_step(U, U.copy(), lr=0.1) is U
    assert grassmann.adam_step(U, U.copy(), U.copy(), np.zeros(0), step=1, lr=0.1) is U


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["grad", "buffer", "U"])
def test_nan_names_the_class_and_changes_nothing(rng, value, where):
    U = points(rng, 20, 3, (50,), np.float32)
    G, b = rng.standard_normal(U.shape).astype(np.float32), rng.standard_normal(U.shape).astype(np.float32)
    v = np.ones(50, np.float32)
    for i in (37, 41):
        {"grad": G, "buffer": b, "U": U}[where][i, 5, 1] = value
    kept = [x.copy() for x in (U, b, v)]
    names = {"grad": "grad holds NaN or infinity: class 37", "U": "matrix 37 of U holds NaN or infinity"}
    with pytest.raises(ValueError, match=names.get(where, "buffer holds NaN or infinity: class 37")):
        grassmann.sgd_step(U, G, b, lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match=names.get(where, "first_moment holds NaN or infinity: class 37")):
        grassmann.adam_step(U, G, b, v, step=1, lr=0.1)
    for x, y in zip((U, b, v), kept, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("transport", ["project", "parallel"])
def test_nothing_raises_half_way(rng, transport):
    """What passes the check goes through, at the edge of the dtype too."""
    U = points(rng, 20, 3, (30,), np.float32)
    for size in (1e30, 1e37, 2e38, 3e38):
        b, v = np.zeros_like(U), np.zeros(30, np.float32)
        G = np.clip(size * rng.standard_normal(U.shape), -3e38, 3e38).astype(np.float32)
        for f in (
            lambda G=G, b=b: grassmann.sgd_step(U, G, b, lr=0.1, momentum=0.9, transport=transport),
            lambda G=G, b=b, v=v: grassmann.adam_step(U, G, b, v, step=1, lr=0.1, transport=transport),
        ):
            kept = [x.copy() for x in (U, b, v)]
            try:
                f()
            except ValueError as error:
                assert "overflows" in str(error)  # noqa: PT017
                for x, y in zip((U, b, v), kept, strict=True):
                    np.testing.assert_array_equal(x, y)
            assert np.isfinite(U).all()
            assert np.isfinite(b).all()
            assert orthonormality(U) <= contract(np.float32, 3)


def test_momentum_that_the_dtype_does_not_hold(rng):
    U = points(rng, 20, 3, (5,), np.float32)
    b = np.zeros_like(U)
    for options in ({"momentum": 1e39}, {"momentum": 0.9, "dampening": 1e39}):
        with pytest.raises(ValueError, match="must be finite"):
            grassmann.sgd_step(U, np.ones_like(U), b, lr=0.1, **options)
    np.testing.assert_array_equal(b, 0)


def test_a_sum_that_overflows_changes_nothing(rng):
    U = points(rng, 20, 3, (5,), np.float32)
    G = np.full_like(U, 3e38)
    b = np.full_like(U, 3e38)
    kept = U.copy()
    with pytest.raises(ValueError, match="overflows: class 0"):
        grassmann.sgd_step(U, G, b, lr=0.1, momentum=0.9)
    np.testing.assert_array_equal(U, kept)
    np.testing.assert_array_equal(b, np.full_like(U, 3e38))
    grassmann.sgd_step(U, G, lr=0.1)
    assert orthonormality(U) <= contract(np.float32, 3)


def test_points_that_are_not_orthonormal(rng):
    U = points(rng, 20, 3, (50,), np.float32)
    U[11, :, 1] *= 1.01
    kept = U.copy()
    with pytest.raises(ValueError, match="matrix 11 of U are not orthonormal"):
        grassmann.sgd_step(U, np.ones_like(U), lr=0.1)
    np.testing.assert_array_equal(U, kept)


def test_shapes_and_values(rng):
    U = points(rng, 20, 3, (4,))
    G, b, v = np.ones_like(U), np.zeros_like(U), np.zeros(4)
    with pytest.raises(ValueError, match="grad must have the shape of U"):
        grassmann.sgd_step(U, G[0], lr=0.1)
    with pytest.raises(ValueError, match="buffer must have the shape of U"):
        grassmann.sgd_step(U, G, b[:2], lr=0.1)
    with pytest.raises(TypeError, match="grad must be float64 as U is"):
        grassmann.sgd_step(U, G.astype(np.float32), lr=0.1)
    with pytest.raises(ValueError, match="there is no buffer"):
        grassmann.sgd_step(U, G, lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match="there is no buffer"):
        grassmann.sgd_step(U, G, lr=0.1, dampening=0.9)
    with pytest.raises(ValueError, match="momentum must be finite and not negative"):
        grassmann.sgd_step(U, G, b, lr=0.1, momentum=-0.5)
    with pytest.raises(TypeError, match="lr must be a number"):
        grassmann.sgd_step(U, G, lr="fast")
    with pytest.raises(TypeError, match="betas must be a pair"):
        grassmann.adam_step(U, G, b, v, step=1, lr=0.1, betas=(0.9, 0.99, 0.999))
    with pytest.raises(TypeError, match="step must be an integer"):
        grassmann.adam_step(U, G, b, v, step=1.5, lr=0.1)
    with pytest.raises(ValueError, match="second_moment is negative: class 0"):
        grassmann.adam_step(U, G, b, v - 1, step=1, lr=0.1)
    for lr in (np.nan, -1.0, np.inf):
        with pytest.raises(ValueError, match="lr must be finite"):
            grassmann.sgd_step(U, G, lr=lr)
    with pytest.raises(ValueError, match="momentum must be finite"):
        grassmann.sgd_step(U, G, b, lr=0.1, momentum=np.nan)
    with pytest.raises(ValueError, match="retraction must be 'exp', 'cholesky', 'polar', 'qr' or 'cayley'"):
        grassmann.sgd_step(U, G, lr=0.1, retraction="svd")
    with pytest.raises(ValueError, match="transport must be 'project' or 'parallel'"):
        grassmann.sgd_step(U, G, lr=0.1, transport="vector")
    with pytest.raises(ValueError, match="needs retraction 'exp'"):
        grassmann.sgd_step(U, G, b, lr=0.1, transport="parallel", retraction="polar")
    with pytest.raises(ValueError, match="overlaps"):
        grassmann.sgd_step(U, U, lr=0.1)
    with pytest.raises(ValueError, match="overlaps itself"):
        grassmann.sgd_step(np.lib.stride_tricks.as_strided(U[0], (4, 20, 3), (0, *U.strides[1:])), G, lr=0.1)
    frozen = U.copy()
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        grassmann.sgd_step(frozen, G, lr=0.1)
    with pytest.raises(TypeError, match="U must be an array that can be written to"):
        grassmann.sgd_step(U.tolist(), G, lr=0.1)
    with pytest.raises(TypeError, match="JAX arrays are immutable"):
        grassmann.sgd_step(pytest.importorskip("jax.numpy").zeros((2, 5, 2)), np.zeros((2, 5, 2), np.float32), lr=0.1)
    with pytest.raises(ValueError, match="3 columns of 2 entries"):
        grassmann.sgd_step(np.ones((2, 3)), np.ones((2, 3)), lr=0.1)
    with pytest.raises(ValueError, match="second_moment must have one entry for each class"):
        grassmann.adam_step(U, G, b, np.zeros((4, 1)), step=1, lr=0.1)
    with pytest.raises(ValueError, match="step must be at least 1"):
        grassmann.adam_step(U, G, b, v, step=0, lr=0.1)
    with pytest.raises(ValueError, match=r"betas\[1\]"):
        grassmann.adam_step(U, G, b, v, step=1, lr=0.1, betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="eps must be finite"):
        grassmann.adam_step(U, G, b, v, step=1, lr=0.1, eps=-1.0)
    np.testing.assert_array_equal(b, 0)


@pytest.mark.parametrize("method", ["exp", "qr", "polar", "cholesky", "cayley"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [1, 2, 7, 300, 4609])
def test_points_of_one_column(method, dtype, n):
    """Their own way, as good as that of two: for steps of all sizes, and constant columns, whose sums round one way."""
    rng = np.random.default_rng(n)
    eps = float(np.finfo(dtype).eps)
    U = np.stack([np.full((n, 1), n**-0.5), rng.standard_normal((n, 1))]).astype(dtype)
    U = (U / np.linalg.norm(U.astype(float), axis=1, keepdims=True)).astype(dtype)
    H = grassmann.tangent(U, rng.standard_normal(U.shape).astype(dtype))
    for size in (0.0, 1e-3, 1.0, 50.0) if n > 1 else (0.0, 1.0):
        got = grassmann.retract(U, (size * H).astype(dtype), method=method).astype(float)
        assert np.abs((got * got).sum(1) - 1).max() < 8 * eps
        u, h = U.astype(float), (size * H).astype(dtype).astype(float)
        h -= u * (u * h).sum(1, keepdims=True)
        x = np.linalg.norm(h, axis=1, keepdims=True)
        if method == "exp":
            c, s = np.cos(x), np.sinc(x / np.pi)
        elif method == "cayley":
            c, s = (1 - x * x / 4) / (1 + x * x / 4), 1 / (1 + x * x / 4)
        else:
            c = s = 1 / np.sqrt(1 + x * x)
        np.testing.assert_allclose(got, u * c + h * s, atol=40 * eps * max(1, float(x.max())))


def test_a_point_of_one_column_and_a_huge_step():
    U, H = np.eye(3, 1), np.zeros((3, 1))
    H[1] = 1e150
    for method in ("polar", "qr", "cayley"):
        got = grassmann.retract(U, H, t=1e10, method=method)
        assert np.abs((got * got).sum() - 1) < 1e-12
