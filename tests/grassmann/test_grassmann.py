"""Maps, angles, distances and means of the Grassmann manifold against float64 and mpmath references."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

import subspan
from subspan import _core, grassmann

mpmath = pytest.importorskip("mpmath")

SHAPES = [(1, 1), (7, 1), (7, 3), (9, 9), (40, 6), (65, 17), (300, 40), (600, 8), (1500, 32), (17, 12)]
RETRACTIONS = ["cholesky", "polar", "qr", "cayley", "exp"]
KINDS = ["geodesic", "chordal", "projection", "procrustes", "fubini-study", "binet-cauchy"]


def eps(dtype):
    return float(np.finfo(dtype).eps)


def contract(dtype, k):
    return 10 * eps(dtype) * math.sqrt(k)


def orthonormality(U):
    U = np.asarray(U, np.float64)
    return np.abs(U.swapaxes(-1, -2) @ U - np.eye(U.shape[-1])).max(initial=0)


def project(U, G):
    return G - U @ (U.swapaxes(-1, -2) @ G)


def laid_out(x, layout):
    """The same numbers with other strides."""
    if layout == "C":
        return np.ascontiguousarray(x)
    if layout == "F":
        return np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2)
    if layout == "strided":
        out = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)[..., ::2]
    elif layout == "reversed":
        out = np.zeros_like(x)[..., ::-1, :]
    else:
        out = np.zeros((*x.shape[:-2], x.shape[-2] + 3, x.shape[-1] + 5), x.dtype)[..., 2:-1, 1:-4]
    out[...] = x
    return out


LAYOUTS = ["C", "F", "strided", "reversed", "window"]


def points(rng, n, k, batch=(), dtype=np.float64):
    return np.linalg.qr(rng.standard_normal((*batch, n, k)))[0].astype(dtype)


def tangents(rng, U, norm=1.0):
    H = project(U.astype(np.float64), rng.standard_normal(U.shape))
    H = project(U.astype(np.float64), H)
    length = np.linalg.norm(H, axis=(-2, -1), keepdims=True)
    return (norm * H / np.where(length > 1e-8, length, 1)).astype(U.dtype)


def exp_reference(U, H, t=1.0):
    U, H = U.astype(np.float64), H.astype(np.float64)
    q, s, vt = np.linalg.svd(H, full_matrices=False)
    v = vt.swapaxes(-1, -2)
    return (U @ v * np.cos(t * s)[..., None, :] + q * np.sin(t * s)[..., None, :]) @ vt


def retract_reference(U, H, method):
    U, H = U.astype(np.float64), H.astype(np.float64)
    if method == "exp":
        return exp_reference(U, H)
    if method == "cayley":
        n = U.shape[-2]
        A = H @ U.swapaxes(-1, -2) - U @ H.swapaxes(-1, -2)
        return np.linalg.solve(np.eye(n) - A / 2, U + A @ U / 2)
    if method == "polar":
        u, _, vt = np.linalg.svd(U + H, full_matrices=False)
        return u @ vt
    Q, R = np.linalg.qr(U + H)
    return Q * np.where(np.diagonal(R, axis1=-2, axis2=-1) < 0, -1, 1)[..., None, :]


def with_angles(rng, n, theta, dtype=np.float64):
    """A pair of bases whose principal angles are theta, each in a random basis of its span."""
    k = len(theta)
    Q = np.linalg.qr(rng.standard_normal((n, 2 * k)))[0]
    U, V = Q[:, :k], Q[:, k:]
    W = U * np.cos(theta) + V * np.sin(theta)
    a, b = (np.linalg.qr(rng.standard_normal((k, k)))[0] for _ in range(2))
    return (U @ a).astype(dtype), (W @ b).astype(dtype)


def exact_angles(U, W, digits=40):
    """Principal angles of the spans of the given numbers, which are orthonormal to rounding only."""
    with mpmath.workdps(digits):
        qu = mpmath.qr(mpmath.matrix(U.astype(np.float64).tolist()), mode="skinny")[0]
        qw = mpmath.qr(mpmath.matrix(W.astype(np.float64).tolist()), mode="skinny")[0]
        m = qu.T * qw
        cosines = sorted((mpmath.mpf(x) for x in mpmath.svd_r(m, compute_uv=False)), reverse=True)
        sines = sorted(mpmath.mpf(x) for x in mpmath.svd_r(qw - qu * m, compute_uv=False))
        return np.array([float(mpmath.atan2(s, c)) for s, c in zip(sines, cosines, strict=True)])


ANGLES = [
    [1e-12, math.pi / 2 - 1e-12],
    [1e-12, 1e-10, 1e-8],
    [1e-8, 1e-8, 1e-8],
    [1e-7, 0.3, math.pi / 2],
    [math.pi / 4, math.pi / 4 - 1e-9, math.pi / 4 + 1e-9],
    [math.pi / 2, math.pi / 2],
    [0.0, 0.0, 1.0],
    [1e-3, 1e-6, 1e-9, 1e-12],
    [math.pi / 2 - 1e-8, math.pi / 2 - 1e-4, 0.7],
    [0.2],
    [1e-12],
    [math.pi / 2 - 1e-12],
    [math.pi / 4, math.pi / 2, math.pi / 2],
    [math.pi / 4],
    [math.pi / 4] * 4,
]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# -- tangents and retractions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_tangent(rng, dtype, shape):
    U, G = points(rng, *shape, (3,), dtype), rng.standard_normal((3, *shape)).astype(dtype)
    got = grassmann.tangent(U, G)
    assert got.dtype == dtype
    want = project(U.astype(np.float64), G.astype(np.float64))
    scale = np.linalg.norm(G.astype(np.float64), axis=(-2, -1)).max()
    np.testing.assert_allclose(got, want, atol=10 * eps(dtype) * scale)
    left = np.linalg.norm(U.swapaxes(-1, -2).astype(np.float64) @ got)
    assert left <= 10 * eps(dtype) * np.linalg.norm(U.swapaxes(-1, -2).astype(np.float64) @ G)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(40, 6), (64, 8), (37, 16), (65, 17), (33, 1)])
def test_layouts(rng, dtype, layout, shape):
    """Strides change nothing, of inputs and of outputs."""
    U = points(rng, *shape, (2, 3), dtype)
    H = tangents(rng, U, 0.7)
    V = tangents(rng, U)
    W = grassmann.exp(U, tangents(rng, U, 0.9))
    u, h, v, w = (laid_out(x, layout) for x in (U, H, V, W))

    def out():
        return laid_out(np.zeros_like(U), layout)

    tol = 4 * eps(dtype)
    for f, plain, other in [
        (grassmann.tangent, (U, W), (u, w)),
        (grassmann.exp, (U, H), (u, h)),
        (grassmann.log, (U, W), (u, w)),
        (grassmann.transport, (U, H, V), (u, h, v)),
        (grassmann.euclidean_to_riemannian_hessian, (U, W, V, H), (u, w, v, h)),
    ]:
        want = f(*plain)
        np.testing.assert_allclose(f(*other), want, atol=tol * 10)
        o = out()
        assert f(*other, out=o) is o
        np.testing.assert_allclose(o, want, atol=tol * 10)
    np.testing.assert_allclose(grassmann.principal_angles(u, w), grassmann.principal_angles(U, W), atol=tol * 10)
    for method in RETRACTIONS:
        np.testing.assert_allclose(
            grassmann.retract(u, h, method=method), grassmann.retract(U, H, method=method), atol=tol * 10
        )


@pytest.mark.parametrize("method", RETRACTIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", [0.0, 1e-12, 1e-3, 0.5, 3.0, 40.0])
def test_retract(rng, dtype, method, shape, norm):
    U = points(rng, *shape, (2,), dtype)
    H = tangents(rng, U, norm)
    got = grassmann.retract(U, H, method=method)
    assert got.dtype == dtype
    assert orthonormality(got) <= contract(dtype, shape[1])
    want = retract_reference(U, H, method)
    # Long steps turn by many radians: the angle is known to eps of itself.
    np.testing.assert_allclose(got, want, atol=40 * eps(dtype) * math.sqrt(shape[1]) * max(1.0, norm))


@pytest.mark.parametrize("method", RETRACTIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_retract_of_a_raw_gradient(rng, dtype, method):
    """project=True is the tangent part, without a pass of its own."""
    U = points(rng, 50, 7, (4,), dtype)
    G = (0.1 * rng.standard_normal(U.shape)).astype(dtype)
    got = grassmann.retract(U, G, method=method, project=True)
    want = retract_reference(U, project(U.astype(np.float64), G), method)
    np.testing.assert_allclose(got, want, atol=50 * eps(dtype))
    # mostly along U, so much that the tangent part is small beside it
    G = (U @ (50 * rng.standard_normal((4, 7, 7))) + 0.1 * tangents(rng, U)).astype(dtype)
    got = grassmann.retract(U, G, method=method, project=True)
    assert orthonormality(got) <= contract(dtype, 7)
    want = retract_reference(U, project(U.astype(np.float64), project(U.astype(np.float64), G)), method)
    np.testing.assert_allclose(got, want, atol=5000 * eps(dtype))


@pytest.mark.parametrize("method", RETRACTIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("t", [1e3, 1e8, 1e30, 1e300, -1e5])
def test_steps_of_any_length_stay_on_the_manifold(rng, dtype, method, t):
    U = points(rng, 30, 5, (3,), dtype)
    H = tangents(rng, U)
    H[1] *= np.logspace(0, -12, 5).astype(dtype)  # graded columns
    H[2, :, 1:] = 0  # rank one
    got = grassmann.retract(U, H, t=t, method=method, check=False)
    assert np.isfinite(got).all()
    assert orthonormality(got) <= contract(dtype, 5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("method", RETRACTIONS)
def test_entries_whose_squares_overflow(rng, dtype, method):
    U = points(rng, 30, 5, (), dtype)
    big = tangents(rng, U) * dtype(1e30 if dtype == np.float32 else 1e250)
    for H in (big, big / np.abs(big).max() * np.finfo(dtype).max * dtype(0.9)):
        got = grassmann.retract(U, H, method=method, project=True)
        assert orthonormality(got) <= contract(dtype, 5)
    small = tangents(rng, U) * dtype(1e-30 if dtype == np.float32 else 1e-200)
    np.testing.assert_allclose(grassmann.retract(U, small, method=method), U, atol=4 * eps(dtype))


@pytest.mark.parametrize("method", RETRACTIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("exponent", [-36, -30, -22, -20, -15, -10, 10, 18, 25, 35])
def test_the_size_of_the_tangent_is_free(rng, method, dtype, exponent):
    """A tiny H for a long time is a step like any other, and so is a huge one for a short time."""
    U = points(rng, 12, 3)
    H = tangents(rng, U, 0.8)
    scale = 10.0 ** (exponent if dtype == np.float32 else 8 * exponent)
    u, h = U.astype(dtype), (H * scale).astype(dtype)
    got = grassmann.retract(u, h, t=1 / scale, method=method)
    assert orthonormality(got) <= contract(dtype, 3)
    np.testing.assert_allclose(got, retract_reference(U, H, method), atol=40 * eps(dtype))
    if method == "exp":
        V = tangents(rng, U)
        moved = grassmann.transport(u, h, V.astype(dtype), 1 / scale)
        np.testing.assert_allclose(moved, grassmann.transport(U, H, V), atol=40 * eps(dtype))


def test_in_place_all_or_nothing(rng):
    U = points(rng, 20, 3, (50,))
    H, V = tangents(rng, U, 0.4), tangents(rng, U)
    W = grassmann.exp(U, H)
    for bad in (lambda x: x[37].__setitem__((4, 1), np.nan), lambda x: x[37].__imul__(1.001)):
        for f in (
            lambda u, h, v, w: grassmann.exp(u, h, out=u),
            lambda u, h, v, w: grassmann.retract(u, h, out=h),
            lambda u, h, v, w: grassmann.tangent(u, h, out=h),
            lambda u, h, v, w: grassmann.transport(u, h, v, out=v),
            lambda u, h, v, w: grassmann.log(u, w, out=w),
        ):
            arrays = [x.copy() for x in (U, H, V, W)]
            bad(arrays[0])
            kept = [x.copy() for x in arrays]
            with pytest.raises(ValueError, match="matrix 37"):
                f(*arrays)
            for x, y in zip(arrays, kept, strict=True):
                np.testing.assert_array_equal(x, y)


def test_retract_in_place(rng):
    U = points(rng, 20, 4, (3,))
    H = tangents(rng, U, 0.4)
    want = grassmann.retract(U, H)
    u, h = U.copy(), H.copy()
    assert grassmann.retract(u, H, out=u) is u
    assert grassmann.retract(U, h, out=h) is h
    np.testing.assert_array_equal(u, want)
    np.testing.assert_array_equal(h, want)


def test_a_class_that_does_not_fit_the_cache(rng):
    """Blocks of rows, and outputs over inputs."""
    U = np.linalg.qr(rng.standard_normal((60_000, 5)))[0]
    H = tangents(rng, U, 0.8)
    want = exp_reference(U, H)
    np.testing.assert_allclose(grassmann.exp(U, H), want, atol=1e-14)
    u = U.copy()
    grassmann.exp(u, H, out=u)
    np.testing.assert_allclose(u, want, atol=1e-14)
    np.testing.assert_allclose(grassmann.log(U, want), H, atol=1e-14)
    G = rng.standard_normal(U.shape)
    np.testing.assert_allclose(grassmann.tangent(U, G), project(U, G), atol=1e-12)


def test_no_matrix_is_n_by_n(rng):
    n, k = 100_000, 2
    U, W = points(rng, n, k), points(rng, n, k)
    H = tangents(rng, U, 0.5)
    for f in (
        lambda: grassmann.exp(U, H),
        lambda: grassmann.exp(U, H, 100.0),
        lambda: grassmann.log(U, W),
        lambda: grassmann.transport(U, H, H),
        lambda: grassmann.retract(U, H, method="cayley"),
        lambda: grassmann.retract(U, H, method="cayley", t=50.0),
        lambda: grassmann.principal_angles(U, W, vectors=True),
        lambda: grassmann.principal_angles(U, U),
        lambda: grassmann.mean(np.stack([U, grassmann.exp(U, H)])),
    ):
        _core.reset_work_memory_peak()
        f()
        assert _core.work_memory_peak() < 20 * n * k * 8


# -- exp, log, transport -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theta", ANGLES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exp_of_log(rng, dtype, theta):
    """At every angle, π/2 among them."""
    U, W = with_angles(rng, 3 * len(theta) + 2, np.array(theta), dtype)
    H = grassmann.log(U, W)
    k = len(theta)
    assert np.isfinite(H).all()
    assert np.abs(U.T.astype(np.float64) @ H).max() <= 20 * eps(dtype) * math.sqrt(k)
    there = grassmann.exp(U, H)
    gap = np.linalg.norm(there.astype(float) @ there.T - W.astype(float) @ W.T)
    assert gap <= (1e-13 if dtype == np.float64 else 40 * eps(dtype) * math.sqrt(k))
    want = exact_angles(U, W)
    got = np.sort(np.linalg.svd(H.astype(np.float64), compute_uv=False))
    np.testing.assert_allclose(got, want, atol=20 * eps(dtype) * math.sqrt(k))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(2, 1), (5, 1), (4, 4), (1, 1), (5, 4), (6, 3)])
def test_exp_of_log_at_the_edges(rng, dtype, shape):
    n, k = shape
    for _ in range(5):
        U, W = points(rng, n, k, (), dtype), points(rng, n, k, (), dtype)
        for w in (W, -W, W[:, ::-1]):
            H = grassmann.log(U, w)
            there = grassmann.exp(U, H)
            gap = np.linalg.norm(there.astype(float) @ there.T - w.astype(float) @ w.T)
            assert gap <= (1e-13 if dtype == np.float64 else 40 * eps(dtype) * math.sqrt(k))
            assert np.linalg.svd(H, compute_uv=False).max() <= math.pi / 2 * (1 + 4 * eps(dtype))
    if n == k:
        assert np.abs(H).max() <= 20 * eps(dtype) * math.sqrt(k)


def test_log_at_the_cut_locus():
    """Exactly orthogonal subspaces: a shortest tangent, orthonormal directions, no NaN."""
    U, W = np.eye(6)[:, :3], np.eye(6)[:, 3:]
    H = grassmann.log(U, W)
    np.testing.assert_allclose(np.linalg.svd(H, compute_uv=False), np.pi / 2)
    np.testing.assert_allclose(grassmann.distance(grassmann.exp(U, H), W), 0, atol=1e-14)
    mixed = np.eye(6)[:, [0, 3, 4]]
    H = grassmann.log(U, mixed)
    np.testing.assert_allclose(np.linalg.svd(H, compute_uv=False), [np.pi / 2, np.pi / 2, 0], atol=1e-14)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("norm", [1e-9, 0.3, 1.5, 8.0])
def test_log_of_exp(rng, dtype, norm):
    U = points(rng, 30, 4, (5,), dtype)
    H = tangents(rng, U, norm)
    s = np.linalg.svd(H, compute_uv=False).max()
    back = grassmann.log(U, grassmann.exp(U, H))
    if s < 1.4:
        np.testing.assert_allclose(back, H, atol=20 * eps(dtype) * 2)
    assert np.linalg.svd(back, compute_uv=False).max() <= math.pi / 2 * (1 + 4 * eps(dtype))


@pytest.mark.parametrize("t", [0.0, 1e-7, 0.4, 1.0, -2.0, 30.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(7, 3), (9, 9), (5, 1), (40, 6), (600, 8)])
def test_transport(rng, dtype, shape, t):
    U = points(rng, *shape, (2,), dtype)
    H, V, V2 = (tangents(rng, U) for _ in range(3))
    u, h, v = (x.astype(np.float64) for x in (U, H, V))
    q, s, rt = np.linalg.svd(h, full_matrices=False)
    r, qt = rt.swapaxes(-1, -2), q.swapaxes(-1, -2)
    want = v + (-u @ r * np.sin(t * s)[..., None, :] + q * (np.cos(t * s) - 1)[..., None, :]) @ qt @ v
    tol = 20 * eps(dtype) * math.sqrt(shape[1]) * max(1.0, abs(t))
    got = grassmann.transport(U, H, V, t)
    if shape[0] > shape[1]:
        np.testing.assert_allclose(got, want, atol=tol)
    there = grassmann.exp(U, H, t)
    assert np.abs(there.swapaxes(-1, -2).astype(float) @ got).max() <= tol
    # isometry
    other = grassmann.transport(U, H, V2, t)
    np.testing.assert_allclose((got * other).sum((-2, -1)), (V * V2).sum((-2, -1)), atol=tol)
    # the velocity of the geodesic, and back along it reversed
    speed = grassmann.transport(U, H, H, t)
    np.testing.assert_allclose(grassmann.exp(there, speed, -t, check=False), exp_reference(U, H, 0.0), atol=4 * tol)
    np.testing.assert_allclose(grassmann.transport(there, speed, got, -t, check=False), V, atol=8 * tol)
    out = V.copy()
    assert grassmann.transport(U, H, out, t, out=out) is out
    np.testing.assert_array_equal(out, got)


@pytest.mark.parametrize("t", [0.7, 20.0])
def test_transport_takes_off_what_its_check_lets_through(rng, t):
    U = points(rng, 30, 4)
    H, V = tangents(rng, U), tangents(rng, U)
    for h, v in ((H + 3e-9 * U, V), (H, V + 3e-9 * U)):
        got = grassmann.transport(U, h, v, t)
        there = grassmann.exp(U, h, t)
        assert np.abs(there.T @ got).max() < 20 * 2.3e-16 * 2 * max(1, t)
        assert np.linalg.norm(got) == pytest.approx(1, abs=1e-13)


def test_projection_transport(rng):
    U = points(rng, 20, 4)
    V = tangents(rng, U)
    W = grassmann.exp(U, tangents(rng, U, 0.3))
    np.testing.assert_allclose(grassmann.projection_transport(W, V), project(W, V), atol=1e-15)


def test_hessian_is_the_second_derivative_along_geodesics(rng):
    """f(U) = <A, UUᵀ>^3 / 3 along exp(U, tH), by central differences in t."""
    A = rng.standard_normal((9, 9))
    A = A + A.T
    U = points(rng, 9, 3)
    H = tangents(rng, U)

    def f(u):
        return np.trace(u.T @ A @ u) ** 3 / 3

    value = np.trace(U.T @ A @ U)
    egrad = 2 * value**2 * A @ U
    ehess = 2 * value**2 * A @ H + 8 * value * np.trace(U.T @ A @ H) * A @ U
    hess = grassmann.euclidean_to_riemannian_hessian(U, egrad, ehess, H)
    assert np.abs(U.T @ hess).max() < 1e-10
    d = 1e-4
    second = (f(exp_reference(U, H, d)) - 2 * f(U) + f(exp_reference(U, H, -d))) / d**2
    assert (H * hess).sum() == pytest.approx(second, rel=1e-5)
    grad = grassmann.euclidean_to_riemannian_gradient(U, egrad)
    first = (f(exp_reference(U, H, d)) - f(exp_reference(U, H, -d))) / (2 * d)
    assert (H * grad).sum() == pytest.approx(first, rel=1e-6)
    K = tangents(rng, U)
    ehess_k = 2 * value**2 * A @ K + 8 * value * np.trace(U.T @ A @ K) * A @ U
    other = grassmann.euclidean_to_riemannian_hessian(U, egrad, ehess_k, K)
    assert (K * hess).sum() == pytest.approx((H * other).sum())  # self-adjoint


# -- angles and distances ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theta", ANGLES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_principal_angles(rng, dtype, theta):
    k = len(theta)
    U, W = with_angles(rng, 3 * k + 2, np.array(theta), dtype)
    want = exact_angles(U, W)
    bound = 20 * eps(dtype) * math.sqrt(k)
    got = grassmann.principal_angles(U, W)
    assert got.dtype == dtype
    assert (np.diff(got) >= 0).all()
    np.testing.assert_allclose(got, want, atol=bound)
    np.testing.assert_allclose(grassmann.principal_angles(W, U), want, atol=bound)
    angles, P, Q = grassmann.principal_angles(U, W, vectors=True)
    np.testing.assert_allclose(angles, want, atol=bound)
    assert orthonormality(P) <= contract(dtype, k)
    assert orthonormality(Q) <= contract(dtype, k)
    np.testing.assert_allclose(P.T @ Q, np.diag(np.cos(want)), atol=bound)
    # pairs of vectors differ by their angle, small ones too
    apart = np.linalg.norm(P.astype(np.float64) - Q, axis=0)
    np.testing.assert_allclose(2 * np.arcsin(apart / 2), want, atol=bound)
    for X, basis in ((P, U), (Q, W)):
        assert np.linalg.norm(project(basis.astype(np.float64), X.astype(np.float64))) <= bound


def test_angles_where_cosines_and_sines_meet(rng):
    """π/4 with π/2, in many bases: cosines round to either side of √½, and so does the norm of UᵀW."""
    theta = np.array([math.pi / 4, math.pi / 2, math.pi / 2])
    U, W = (np.stack(x) for x in zip(*(with_angles(rng, 11, theta) for _ in range(3000)), strict=True))
    for _ in range(3):
        got = grassmann.principal_angles(U, W)
        np.testing.assert_allclose(got, np.broadcast_to(theta, got.shape), atol=20 * 2.3e-16 * math.sqrt(3))
        assert (np.diff(got, axis=-1) >= 0).all()
    pairs = [with_angles(rng, 16, np.full(5, math.pi / 4)) for _ in range(300)]
    U, W = (np.stack(x) for x in zip(*pairs, strict=True))
    for dtype in (np.float32, np.float64):
        found = grassmann.principal_angles(U.astype(dtype), W.astype(dtype), vectors=True)
        assert (np.diff(found.angles, axis=-1) >= 0).all()
        cosines = np.einsum("bnk,bnk->bk", found.U_vectors.astype(float), found.W_vectors.astype(float))
        np.testing.assert_allclose(cosines, np.cos(found.angles.astype(float)), atol=20 * eps(dtype) * math.sqrt(5))


@pytest.mark.parametrize("k", [32, 64, 128])
@pytest.mark.parametrize("near", [False, True])
def test_large_ranks(rng, k, near):
    """Orthonormal vectors, and exp of log to 1e-13, also after thousands of rotations."""
    U = grassmann.random(3 * k, k, rng=0)
    W = grassmann.exp(U, 3.0 * grassmann.random_tangent(U, rng=1)) if near else grassmann.random(3 * k, k, rng=2)
    _, P, Q = grassmann.principal_angles(U, W, vectors=True)
    assert orthonormality(P) <= contract(np.float64, k)
    assert orthonormality(Q) <= contract(np.float64, k)
    H = grassmann.log(U, W)
    there = grassmann.exp(U, H)
    assert np.linalg.norm(there @ there.T - W @ W.T) < 1e-13
    want = np.sort(np.linalg.svd(H, compute_uv=False))
    np.testing.assert_allclose(grassmann.principal_angles(U, W), want, atol=20 * 2.3e-16 * math.sqrt(k))


def distance_reference(theta, kind):
    with mpmath.workdps(40):
        x = [mpmath.mpf(float(t)) for t in theta]
        if kind == "geodesic":
            value = mpmath.sqrt(sum(t**2 for t in x))
        elif kind == "chordal":
            value = mpmath.sqrt(sum(mpmath.sin(t) ** 2 for t in x))
        elif kind == "projection":
            value = mpmath.sin(max(x))
        elif kind == "procrustes":
            value = 2 * mpmath.sqrt(sum(mpmath.sin(t / 2) ** 2 for t in x))
        else:
            product = mpmath.mpf(1)
            for t in x:
                product *= mpmath.cos(t)
            value = mpmath.acos(product) if kind == "fubini-study" else mpmath.sqrt(1 - product**2)
        return float(value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("theta", ANGLES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_distance(rng, dtype, theta, kind):
    k = len(theta)
    U, W = with_angles(rng, 3 * k + 2, np.array(theta), dtype)
    got = grassmann.distance(U, W, kind=kind)
    assert np.ndim(got) == 0
    assert got.dtype == dtype
    assert got == pytest.approx(distance_reference(exact_angles(U, W), kind), abs=20 * eps(dtype) * math.sqrt(k))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(0, 12), st.integers(0, 2**31), st.sampled_from(KINDS), st.booleans())
def test_distances_do_not_depend_on_the_basis(k, more, seed, kind, near):
    rng = np.random.default_rng(seed)
    n = k + more
    U = points(rng, n, k)
    W = grassmann.exp(U, tangents(rng, U, 10.0 ** rng.uniform(-12, 0))) if near else points(rng, n, k)
    a, b = points(rng, k, k), points(rng, k, k)
    first, second = grassmann.distance(U, W, kind=kind), grassmann.distance(U @ a, W @ b, kind=kind)
    assert first == pytest.approx(second, abs=40 * 2.2e-16 * math.sqrt(k))
    assert first == pytest.approx(grassmann.distance(W, U, kind=kind), abs=40 * 2.2e-16 * math.sqrt(k))


def test_angles_of_all_pairs(rng):
    scipy_linalg = pytest.importorskip("scipy.linalg")
    U, W = points(rng, 20, 3, (4,)), points(rng, 20, 3, (5,))
    got = grassmann.principal_angles(U[:, None], W[None])
    assert got.shape == (4, 5, 3)
    for i in range(4):
        for j in range(5):
            np.testing.assert_allclose(got[i, j, ::-1], scipy_linalg.subspace_angles(U[i], W[j]), atol=1e-14)
    assert grassmann.distance(U[:, None], W[None]).shape == (4, 5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_angles_of_large_ranks(rng, dtype):
    """More columns than a register tile, spectra from 1e-6 to π/2."""
    theta = np.sort(np.concatenate([np.logspace(-6, 0, 40), np.linspace(1, np.pi / 2, 27)]))
    U, W = with_angles(rng, 200, theta, dtype)
    np.testing.assert_allclose(grassmann.principal_angles(U, W), theta, atol=20 * eps(dtype) * math.sqrt(67))


# -- mean --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_mean_is_where_the_gradient_vanishes(rng, dtype):
    center = points(rng, 40, 5, (), dtype)
    U = grassmann.exp(center, tangents(rng, np.broadcast_to(center, (30, 40, 5)), 0.9))
    w = rng.uniform(0.1, 1, 30)
    found = grassmann.mean(U, w, full_output=True)
    assert found.converged
    assert orthonormality(found.mean) <= contract(dtype, 5)
    logs = np.stack([grassmann.log(found.mean.astype(np.float64), x.astype(np.float64), check=False) for x in U])
    assert np.linalg.norm((w[:, None, None] * logs).sum(0) / w.sum()) <= 100 * eps(dtype) * math.sqrt(5)
    want = (w * grassmann.distance(found.mean, U) ** 2).sum() / w.sum()
    assert found.variance == pytest.approx(want, rel=1e-5)


def test_mean_of_a_symmetric_cloud_is_its_centre(rng):
    center = points(rng, 30, 4)
    H = tangents(rng, np.broadcast_to(center, (20, 30, 4)), 0.6)
    U = np.concatenate([grassmann.exp(center, H), grassmann.exp(center, -H)])
    assert grassmann.distance(grassmann.mean(U), center) < 1e-14
    assert grassmann.distance(grassmann.mean(U, initial=center), center) < 1e-14


def test_weights_pull_the_mean_along_the_geodesic(rng):
    U = points(rng, 30, 4)
    H = tangents(rng, U, 1.2)
    W = grassmann.exp(U, H)
    got = grassmann.mean(np.stack([U, W]), [3.0, 1.0])
    assert grassmann.distance(got, grassmann.exp(U, H, 0.25)) < 1e-13
    assert grassmann.distance(grassmann.mean(np.stack([U, W]), [0.0, 2.0]), W) < 1e-14
    assert grassmann.distance(grassmann.mean(U[None]), U) < 1e-14


def test_means_of_a_stack(rng):
    center = points(rng, 15, 2, (3, 2))
    cloud = grassmann.exp(center, tangents(rng, np.broadcast_to(center, (9, 3, 2, 15, 2)), 0.3))
    got = grassmann.mean(cloud, full_output=True)
    assert got.mean.shape == (3, 2, 15, 2)
    assert got.converged.shape == (3, 2)
    assert got.converged.all()
    for i in range(3):
        for j in range(2):
            np.testing.assert_allclose(
                grassmann.distance(got.mean[i, j], grassmann.mean(cloud[:, i, j])), 0, atol=1e-14
            )


def test_mean_says_that_it_did_not_converge(rng):
    U = points(rng, 20, 4, (10,))
    with pytest.warns(RuntimeWarning, match="1 of 1 means did not reach tol"):
        grassmann.mean(U, max_iterations=1)
    found = grassmann.mean(U, max_iterations=1, full_output=True)
    assert not found.converged
    assert found.iterations == 1
    assert found.gradient_norm > 0


def test_mean_of_points_that_are_far_apart(rng):
    """No unique mean; still a stationary point, or a warning, and never NaN."""
    U = points(rng, 12, 3, (25,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = grassmann.mean(U, max_iterations=500, full_output=True)
    assert np.isfinite(found.mean).all()
    assert found.converged == (found.gradient_norm <= 50 * 2.2e-16 * math.sqrt(3))
    # two orthogonal planes: the cut locus itself
    pair = np.stack([np.eye(4)[:, :2], np.eye(4)[:, 2:]])
    found = grassmann.mean(pair, full_output=True)
    assert np.isfinite(found.mean).all()


def test_mean_reports_progress_and_can_be_stopped(rng):
    center = points(rng, 20, 4)
    U = grassmann.exp(center, tangents(rng, np.broadcast_to(center, (10, 20, 4)), 1.0))
    seen = []
    grassmann.mean(U, progress=lambda which, iteration, norm, variance: seen.append((which, iteration, norm)))
    assert [s[1] for s in seen] == list(range(len(seen)))
    assert seen[-1][2] < seen[0][2]

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grassmann.mean(U, progress=stop)


def test_mean_is_the_same_for_any_number_of_threads(rng):
    center = points(rng, 60, 4)
    U = grassmann.exp(center, tangents(rng, np.broadcast_to(center, (33, 60, 4)), 0.7))
    before = subspan.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            subspan.set_num_threads(threads)
            results.append(grassmann.mean(U))
    finally:
        subspan.set_num_threads(before)
    for r in results[1:]:
        np.testing.assert_array_equal(r, results[0])


# -- stacks, libraries, threads ----------------------------------------------------------------------------------------


def test_leading_axes_broadcast(rng):
    U, W = points(rng, 12, 3, (4, 1)), points(rng, 12, 3, (5,))
    H = grassmann.log(U, W)
    assert H.shape == (4, 5, 12, 3)
    np.testing.assert_allclose(H[2, 3], grassmann.log(U[2, 0], W[3]), atol=1e-15)
    assert grassmann.exp(U, H).shape == (4, 5, 12, 3)
    assert grassmann.transport(U, H, H).shape == (4, 5, 12, 3)


def test_empty_stacks_and_ranks(rng):
    U = np.zeros((0, 6, 2))
    assert grassmann.exp(U, U).shape == (0, 6, 2)
    assert grassmann.distance(U, U).shape == (0,)
    assert grassmann.principal_angles(U, U).shape == (0, 2)
    U = np.zeros((3, 6, 0))
    assert grassmann.log(U, U).shape == (3, 6, 0)
    np.testing.assert_array_equal(grassmann.distance(U, U), np.zeros(3))
    assert grassmann.mean(U).shape == (6, 0)


def test_torch_and_jax(rng):
    torch = pytest.importorskip("torch")
    U, W = points(rng, 12, 3, (2,), np.float32), points(rng, 12, 3, (2,), np.float32)
    want = grassmann.log(U, W)
    got = grassmann.log(torch.from_numpy(U), torch.from_numpy(W))
    assert isinstance(got, torch.Tensor)
    np.testing.assert_array_equal(got.numpy(), want)
    d = grassmann.distance(torch.from_numpy(U[0]), torch.from_numpy(W[0]))
    assert isinstance(d, torch.Tensor)
    assert d.shape == ()
    with pytest.raises(TypeError, match="requires grad"):
        grassmann.log(torch.from_numpy(U).requires_grad_(), torch.from_numpy(W))
    jnp = pytest.importorskip("jax.numpy")
    got = grassmann.exp(jnp.asarray(U), jnp.asarray(want))
    assert type(got).__module__.startswith("jax")
    np.testing.assert_allclose(np.asarray(got), grassmann.exp(U, want))


def test_results_do_not_depend_on_threads(rng):
    U, W = points(rng, 64, 8, (50,), np.float32), points(rng, 64, 8, (50,), np.float32)
    before = subspan.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            subspan.set_num_threads(threads)
            H = grassmann.log(U, W)
            results.append((H, grassmann.exp(U, H), grassmann.principal_angles(U, W), grassmann.transport(U, H, H)))
    finally:
        subspan.set_num_threads(before)
    for r in results[1:]:
        for a, b in zip(r, results[0], strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set(rng, isa):
    import os
    import subprocess
    import sys

    code = """
import numpy as np
from subspan import grassmann
rng = np.random.default_rng(0)
for n, k in ((40, 6), (64, 8), (33, 1), (70, 17), (128, 32)):
    for dtype in (np.float32, np.float64):
        eps = np.finfo(dtype).eps
        U, W = (np.linalg.qr(rng.standard_normal((3, n, k)))[0].astype(dtype) for _ in range(2))
        H = grassmann.log(U, W)
        there = grassmann.exp(U, H)
        assert np.abs(grassmann.distance(there, W)).max() < 40 * eps * k**0.5
        there = np.ascontiguousarray(there.swapaxes(1, 2)).swapaxes(1, 2)
        assert np.abs(grassmann.distance(there, W)).max() < 40 * eps * k**0.5
        x = rng.standard_normal((9, n)).astype(dtype)
        want = 25 * np.linalg.norm(np.einsum("bn,cnk->bck", x / np.linalg.norm(x, axis=1, keepdims=True), U), axis=2)
        assert np.abs(grassmann.logits(x, U) - want).max() < 100 * eps
        dx, dU = grassmann.logits_backward(np.ones((9, 3), dtype), x, U)
        assert abs((dU * U).sum() - want.sum()) < 2e3 * eps * want.sum()
        b, m, v = np.zeros_like(U), np.zeros_like(U), np.zeros(3, dtype)
        for step in range(1, 4):
            grassmann.sgd_step(U, dU, b, lr=0.01, momentum=0.9, transport="parallel")
            grassmann.adam_step(W, dU, m, v, step=step, lr=0.01, retraction="cayley")
        for u in (U, W, grassmann.mean(np.stack([U, grassmann.exp(U, 0.3 * grassmann.random_tangent(U, rng=1))]))):
            assert np.abs(u.swapaxes(1, 2) @ u - np.eye(k)).max() < 10 * eps * k**0.5
        V = grassmann.random_tangent(U, rng=2)
        moved = grassmann.transport(U, V, V, 0.5)
        assert np.abs(np.linalg.norm(moved, axis=(1, 2)) - 1).max() < 40 * eps
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "SUBSPAN_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    if "asks for more than this machine and build have" in result.stderr:
        pytest.skip(f"this machine or build has no {isa}")
    assert result.returncode == 0, result.stderr


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_points_that_are_not_orthonormal(rng):
    U, W = points(rng, 10, 3, (4,)), points(rng, 10, 3, (4,))
    bad = U.copy()
    bad[2] *= 1.001
    H = tangents(rng, U)
    for f in (
        lambda: grassmann.exp(bad, H),
        lambda: grassmann.log(bad, W),
        lambda: grassmann.distance(bad, W),
        lambda: grassmann.principal_angles(bad, W),
        lambda: grassmann.tangent(bad, H),
        lambda: grassmann.transport(bad, H, H),
        lambda: grassmann.retract(bad, H),
        lambda: grassmann.euclidean_to_riemannian_hessian(bad, H, H, H),
    ):
        with pytest.raises(ValueError, match="matrix 2 of U are not orthonormal"):
            f()
    with pytest.raises(ValueError, match="matrix 2 of W are not orthonormal"):
        grassmann.log(W, bad)
    with pytest.raises(ValueError, match="matrix 2 of U are not orthonormal"):
        grassmann.mean(bad)
    for scale in (1e100, 1e200):
        with pytest.raises(ValueError, match="matrix 0 of U"):
            grassmann.exp(U * scale, H)
    grassmann.log(bad, W, check=False)
    got = grassmann.exp(bad, H, check=False)  # comes back to the manifold
    assert orthonormality(got) < contract(np.float64, 3)
    got = grassmann.exp(rng.standard_normal((10, 3)), H[0], check=False)
    assert orthonormality(got) < contract(np.float64, 3)


def test_tangents_that_are_not_tangent(rng):
    U = points(rng, 10, 3, (4,))
    H = tangents(rng, U)
    bad = H.copy()
    bad[1] += 0.1 * U[1]
    for f in (
        lambda: grassmann.exp(U, bad),
        lambda: grassmann.retract(U, bad),
        lambda: grassmann.transport(U, bad, H),
        lambda: grassmann.euclidean_to_riemannian_hessian(U, H, H, bad),
    ):
        with pytest.raises(ValueError, match="matrix 1 of H is not tangent at U"):
            f()
    with pytest.raises(ValueError, match="matrix 1 of V is not tangent at U"):
        grassmann.transport(U, H, bad)
    with pytest.raises(ValueError, match="matrix 0 of H is not tangent at U"):
        grassmann.exp(U, H + 1e200 * U)
    # what projection in working precision leaves along U is no reason to complain
    loose = (H + 1e-11 * U).astype(np.float64)
    grassmann.exp(U, loose)
    grassmann.exp(U, np.zeros_like(H))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity(rng, value):
    U, W = points(rng, 10, 3, (4,)), points(rng, 10, 3, (4,))
    H = tangents(rng, U)
    bad, bad_h = U.copy(), H.copy()
    bad[3, 4, 1] = value
    bad_h[3, 4, 1] = value
    for f in (
        lambda: grassmann.exp(U, bad_h),
        lambda: grassmann.exp(U, bad_h, check=False),
        lambda: grassmann.exp(bad, H),
        lambda: grassmann.log(W, bad),
        lambda: grassmann.log(bad, W, check=False),
        lambda: grassmann.distance(W, bad),
        lambda: grassmann.distance(W, bad, check=False),
        lambda: grassmann.tangent(U, bad_h),
        lambda: grassmann.transport(U, bad_h, H),
        lambda: grassmann.transport(U, H, bad_h),
        lambda: grassmann.euclidean_to_riemannian_hessian(U, bad_h, H, H),
        lambda: grassmann.mean(bad),
        lambda: grassmann.mean(bad, check=False),
    ):
        with pytest.raises(ValueError, match="matrix 3 of"):
            f()


def test_the_first_bad_matrix_is_named(rng):
    U, W = points(rng, 30, 4, (400,)), points(rng, 30, 4, (400,))
    W[[3, 200, 390]] *= 1.01
    before = subspan.get_num_threads()
    try:
        for threads in (1, 2, 4):
            subspan.set_num_threads(threads)
            for _ in range(5):
                with pytest.raises(ValueError, match="matrix 3 of W"):
                    grassmann.log(U, W)
    finally:
        subspan.set_num_threads(before)


def test_shapes_types_and_names(rng):
    U, W = points(rng, 10, 3), points(rng, 10, 3)
    with pytest.raises(
        ValueError, match=r"W must hold matrices of the shape that U holds, \(10, 3\), got shape \(10, 2\)"
    ):
        grassmann.log(U, W[:, :2])
    with pytest.raises(ValueError, match="3 columns of 2 entries"):
        grassmann.log(np.ones((2, 3)), np.ones((2, 3)))
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        grassmann.exp(U[:, 0], W[:, 0])
    with pytest.raises(ValueError, match="leading axes do not broadcast"):
        grassmann.log(points(rng, 10, 3, (2,)), points(rng, 10, 3, (3,)))
    with pytest.raises(TypeError, match="W must be float64 as U is, got float32"):
        grassmann.log(U, W.astype(np.float32))
    with pytest.raises(TypeError, match="float32 or float64"):
        grassmann.log(np.ones((3, 2), int), np.ones((3, 2), int))
    with pytest.raises(ValueError, match="method must be 'exp', 'cholesky', 'polar', 'qr' or 'cayley'"):
        grassmann.retract(U, W, method="svd")
    with pytest.raises(ValueError, match=r"kind must be 'geodesic', 'chordal', .* or 'binet-cauchy'"):
        grassmann.distance(U, W, kind="asimov")
    with pytest.raises(ValueError, match="t must be finite"):
        grassmann.exp(U, np.zeros_like(U), np.nan)
    with pytest.raises(ValueError, match="out must have shape"):
        grassmann.log(U, W, out=np.empty((10, 2)))
    with pytest.raises(TypeError, match="out must be float64"):
        grassmann.log(U, W, out=np.empty((10, 3), np.float32))
    both = np.zeros((11, 3))
    both[:10] = U
    with pytest.raises(ValueError, match="overlaps"):
        grassmann.log(both[:10], W, out=both[1:])
    with pytest.raises(ValueError, match="weights must have shape"):
        grassmann.mean(np.stack([U, W]), [1.0])
    with pytest.raises(ValueError, match="not negative"):
        grassmann.mean(np.stack([U, W]), [1.0, -1.0])
    with pytest.raises(ValueError, match="positive, finite sum"):
        grassmann.mean(np.stack([U, W]), [0.0, 0.0])
    with pytest.raises(ValueError, match="holds no points"):
        grassmann.mean(np.zeros((0, 10, 3)))
    with pytest.raises(ValueError, match="at least 3 dimensions"):
        grassmann.mean(U)
    with pytest.raises(ValueError, match="max_iterations"):
        grassmann.mean(np.stack([U, W]), max_iterations=-1)
    with pytest.raises(TypeError, match="weights must be real"):
        grassmann.mean(np.stack([U, W]), [1j, 1.0])
    both = np.stack([U, W])
    with pytest.raises(ValueError, match="overlaps"):
        grassmann.mean(both, out=both[0])
    with pytest.raises(TypeError, match="batch must be an integer"):
        grassmann.random(5, 2, batch=2.5)


def test_random(rng):
    U = grassmann.random(20, 3, batch=5, rng=3, dtype=np.float32)
    assert U.shape == (5, 20, 3)
    assert U.dtype == np.float32
    assert orthonormality(U) < contract(np.float32, 3)
    np.testing.assert_array_equal(U, grassmann.random(20, 3, batch=(5,), rng=3, dtype=np.float32))
    H = grassmann.random_tangent(U, rng=1)
    np.testing.assert_allclose(np.linalg.norm(H, axis=(1, 2)), 1, rtol=1e-6)
    assert np.abs(U.swapaxes(1, 2) @ H).max() < 1e-6
    np.testing.assert_array_equal(grassmann.random_tangent(np.eye(3), rng=1), np.zeros((3, 3)))
    for n, k in ((2, 1), (3, 2), (9, 8)):
        for dtype in (np.float32, np.float64):
            U = grassmann.random(n, k, batch=5000, rng=3, dtype=dtype)
            H = grassmann.random_tangent(U, rng=1)
            assert np.abs(U.swapaxes(1, 2) @ H).max() < 20 * eps(dtype)
            grassmann.exp(U, H)
    # no preferred direction: the mean projector is k/n times the identity
    many = grassmann.random(4, 2, batch=20_000, rng=0)
    np.testing.assert_allclose((many @ many.swapaxes(1, 2)).mean(0), np.eye(4) / 2, atol=0.01)


# -- spaces of different dimension, all pairs, transport to a point ----------------------------------------------------

KINDS = ["geodesic", "chordal", "projection", "procrustes", "fubini-study", "binet-cauchy"]


def angles_by_svd(u, w):
    """Small angles by their sines, large ones by their cosines (SciPy's take small ones by their cosines at times)."""
    u, w = (np.linalg.qr(np.asarray(x, dtype=float))[0] for x in sorted((u, w), key=lambda x: -x.shape[1]))
    cosines = np.linalg.svd(u.T @ w, compute_uv=False)
    sines = np.linalg.svd(w - u @ (u.T @ w), compute_uv=False)[::-1]
    return np.where(cosines > 0.7, np.arcsin(np.minimum(sines, 1)), np.arccos(np.minimum(cosines, 1)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("k", "m"), [(3, 5), (5, 3), (1, 12), (12, 1), (6, 6), (0, 3)])
def test_angles_of_spaces_of_different_dimension(rng, dtype, k, m):
    u, w = (
        grassmann.random(12, k, batch=(4, 1), rng=0, dtype=dtype),
        grassmann.random(12, m, batch=3, rng=1, dtype=dtype),
    )
    angles = grassmann.principal_angles(u, w)
    assert angles.shape == (4, 3, min(k, m))
    close = 40 * np.finfo(dtype).eps * max(1, min(k, m)) ** 0.5
    for i in range(4):
        for j in range(3):
            if min(k, m):
                assert np.abs(angles[i, j] - angles_by_svd(u[i, 0], w[j])).max() <= close
    for kind in KINDS:
        d = grassmann.distance(u, w, kind=kind)
        assert d.shape == (4, 3)
        metric = grassmann.distance(u, w, kind=kind, unequal="metric")
        assert (metric >= d - close).all()
        other = grassmann.distance(w[:, None], u[:, 0], kind=kind)
        np.testing.assert_allclose(d, np.swapaxes(other, 0, 1), atol=float(close) * 50)


def test_one_space_in_another(rng):
    """Angles of zero keep their digits, and so does a small one."""
    w = grassmann.random(30, 8, rng=0)
    u = w[:, :8] @ np.linalg.qr(rng.standard_normal((8, 3)))[0]
    assert grassmann.principal_angles(u, w).max() < 1e-14
    h = grassmann.random_tangent(w, rng=1)
    tilted = grassmann.exp(w, 1e-9 * h)[:, :3]
    angle = scipy.linalg.subspace_angles(tilted, w).max()
    assert abs(grassmann.principal_angles(tilted, w).max() - angle) < 1e-15
    assert grassmann.distance(u, w, kind="chordal", unequal="metric") == pytest.approx(5**0.5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("k", "m"), [(4, 4), (2, 5), (1, 1)])
def test_distances_of_all_pairs(rng, dtype, kind, k, m):
    """The products of pairs that are close would keep no digits: those are done again."""
    u = grassmann.random(40, k, batch=30, rng=0, dtype=dtype)
    near = grassmann.exp(u[:10], dtype(1e-4) * grassmann.random_tangent(u[:10], rng=1))
    u = np.concatenate([u, near, u[:5]])
    w = grassmann.random(40, m, batch=20, rng=2, dtype=dtype)
    close = 20 * np.finfo(dtype).eps * max(k, m) ** 0.5
    square = grassmann.pairwise(u, kind=kind)
    np.testing.assert_array_equal(square, square.T)
    assert not np.diag(square).any()
    for other, found in ((u, square), (w, grassmann.pairwise(u, w, kind=kind))):
        want = grassmann.distance(u[:, None], other[None], kind=kind)
        if other is u:
            np.fill_diagonal(want, 0)
        # The arc cosine of a product near one has what it has.
        room = 1e3 * close**0.5 if kind in ("fubini-study", "binet-cauchy") else close
        assert np.abs(found - want).max() <= room


def test_transport_to_a_point(rng):
    u, w = grassmann.random(30, 4, batch=(2, 3), rng=0)
    v = grassmann.random_tangent(u, rng=1)
    there = grassmann.transport_to(u, w, v)
    assert np.abs(np.swapaxes(w, -1, -2) @ there).max() < 1e-14
    np.testing.assert_allclose(grassmann.norm(w, there), 1, rtol=1e-13)
    np.testing.assert_allclose(grassmann.transport_to(w, u, there), v, atol=1e-13)
    # The tangent of the geodesic itself becomes what takes it on: minus the way back.
    np.testing.assert_allclose(grassmann.transport_to(u, w, grassmann.log(u, w)), -grassmann.log(w, u), atol=1e-13)
    out = v.copy()
    assert grassmann.transport_to(u, w, out, out=out) is out
    np.testing.assert_array_equal(out, there)


def test_inner_norm_and_projectors(rng):
    u = grassmann.random(20, 3, batch=4, rng=0)
    h, v = grassmann.random_tangent(u, rng=1), grassmann.random_tangent(u, rng=2)
    np.testing.assert_allclose(grassmann.inner(u, h, v), np.einsum("bij,bij->b", h, v))
    assert grassmann.norm(u[0], 1e200 * h[0]) == pytest.approx(1e200)
    p = grassmann.projector(u)
    np.testing.assert_allclose(p @ p, p, atol=1e-15)
    assert grassmann.distance(grassmann.from_projector(p, 3), u).max() < 1e-14
    with pytest.raises(ValueError, match="rank 2"):
        grassmann.from_projector(p, 2)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("n", "k"), [(1, 0), (1, 1), (7, 0), (7, 7), (12, 5), (40, 1), (130, 65), (300, 290)])
def test_bases_of_projectors(rng, dtype, n, k):
    """Any rank, order of memory and stack; what is near a projector by its eigenvalues, and what is not."""
    eps = float(np.finfo(dtype).eps)
    u = grassmann.random(n, k, batch=(2, 3), rng=1, dtype=dtype)
    p = u @ np.swapaxes(u, -1, -2)
    # Symmetric in the mean, to less than what is let through.
    skew = 0.5 * np.sqrt(eps) * rng.uniform(-1, 1, p.shape) / n
    wide = np.repeat(p, 2, -1)[..., ::2]
    for x in (p, np.asfortranarray(p), np.swapaxes(p, -1, -2), (p + skew).astype(dtype), wide):
        got = grassmann.from_projector(x, k)
        assert got.shape == (2, 3, n, k)
        assert got.dtype == dtype
        near = 20 * eps * n if np.abs(x - p).max(initial=0) == 0 else np.sqrt(eps)
        assert np.abs(np.swapaxes(got, -1, -2) @ got - np.eye(k)).max(initial=0.0) < 20 * eps * n
        assert np.abs(got @ np.swapaxes(got, -1, -2) - p).max(initial=0.0) < near
    with pytest.raises(ValueError, match=f"no orthogonal projector of rank {k}: an eigenvalue is off by"):
        grassmann.from_projector(2 * p if k else p + np.eye(n, dtype=dtype), k)
    assert grassmann.from_projector(2 * p, k, check=False).shape == (2, 3, n, k)
    p[1, 2, n // 2, 0] = np.nan
    with pytest.raises(ValueError, match="P holds NaN or infinity"):
        grassmann.from_projector(p, k, check=False)
    huge = np.full((n, n), np.finfo(dtype).max)
    assert np.isfinite(grassmann.from_projector(huge, k, check=False)).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(4, 40, 6), (3, 1, 33, 1), (2, 17, 16), (5, 300, 7), (0, 6, 2), (64, 3)])
def test_the_metric_of_any_layout(rng, dtype, shape):
    """Rows, columns, reversed, strided and broadcast stacks; sums in double; lengths whose squares leave the range."""
    U, H, V = (rng.standard_normal(shape).astype(dtype) for _ in range(3))
    want = np.einsum("...ij,...ij->...", H.astype(np.longdouble), V.astype(np.longdouble))
    length = np.sqrt(np.einsum("...ij,...ij->...", H.astype(np.longdouble), H.astype(np.longdouble)))
    # Of a sum in double over sixteen chains, and of the result's rounding to the dtype.
    close = np.finfo(dtype).eps + (shape[-2] * shape[-1] / 16 + 16) * np.finfo(np.float64).eps
    transposed = np.swapaxes(np.ascontiguousarray(np.swapaxes(H, -1, -2)), -1, -2)
    wide = np.zeros((*shape[:-1], 2 * shape[-1]), dtype)
    wide[..., ::2] = H
    for h in (H, transposed, np.flip(np.flip(H, -2).copy(), -2), wide[..., ::2]):
        for v in (V, np.swapaxes(np.ascontiguousarray(np.swapaxes(V, -1, -2)), -1, -2)):
            found = grassmann.inner(U, h, v)
            assert found.shape == shape[:-2]
            assert np.all(np.abs(found - want) <= close * length * np.linalg.norm(V, axis=(-2, -1)))
        np.testing.assert_allclose(grassmann.norm(U, h), length.astype(dtype), rtol=close)
    np.testing.assert_array_equal(grassmann.inner(U, H[None], V), grassmann.inner(U, H, V)[None])
    for scale in (2.0**-100, 2.0**60) if dtype == np.float32 else (2.0**-1000, 2.0**900):
        np.testing.assert_allclose(
            grassmann.norm(U, H * dtype(scale)) / dtype(scale), grassmann.norm(U, H), rtol=2 * close
        )
    if H.size:
        H.flat[0] = np.nan
        assert np.isnan(np.ravel(grassmann.norm(U, H))[0])
        assert not np.isnan(np.ravel(grassmann.norm(U, H))[1:]).any()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_one_class_of_nan_beside_tiny_ones(rng, dtype, k):
    """Lengths of several classes are taken together."""
    u = grassmann.random(30, k, batch=18, rng=0, dtype=dtype)
    x = rng.standard_normal((3, 30)).astype(dtype)
    want = grassmann.logits(x, u)
    u[3] = np.nan
    u[5] = 0
    got = grassmann.logits(x, u)
    assert np.isnan(got[:, 3]).all()
    assert (got[:, 5] == 0).all()
    keep = np.delete(np.arange(18), [3, 5])
    np.testing.assert_array_equal(got[:, keep], want[:, keep])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("n", "k"), [(40_000, 3), (9000, 24), (300_000, 1)])
def test_one_tall_point_on_any_number_of_threads(rng, dtype, n, k):
    """Its rows are shared out, and what is added up in which order does not depend on among how many."""
    u = np.linalg.qr(rng.standard_normal((n, k)))[0].astype(dtype)
    h = grassmann.tangent(u, rng.standard_normal((n, k)).astype(dtype) / np.sqrt(n).astype(dtype))
    w = grassmann.exp(u, h)

    def everything():
        stepped = u.copy()
        grassmann.sgd_step(stepped, h, lr=0.5)
        return [stepped, grassmann.retract(u, h), grassmann.exp(u, h), grassmann.log(u, w), grassmann.tangent(u, w)]

    threads = subspan.get_num_threads()
    try:
        subspan.set_num_threads(1)
        want = everything()
        for other in (2, 3):
            subspan.set_num_threads(other)
            for a, b in zip(everything(), want, strict=True):
                np.testing.assert_array_equal(a, b)
    finally:
        subspan.set_num_threads(threads)
    wide, along = u.astype(np.float64), h.astype(np.float64)
    x, s, y = np.linalg.svd(along, full_matrices=False)
    exact = (wide @ y.T * np.cos(s) + x * np.sin(s)) @ y
    assert np.abs(want[2] - exact).max() <= 20 * np.finfo(dtype).eps
    np.testing.assert_allclose(want[3], along, atol=20 * np.finfo(dtype).eps)
