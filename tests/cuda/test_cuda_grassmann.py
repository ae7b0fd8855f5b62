"""Steps and maps on a device against the CPU's in float64."""

from __future__ import annotations

import numpy as np
import pytest

from references import eps, points, wide
from subspan import grassmann

DTYPES = [np.dtype(np.float32), np.dtype(np.float64)]
IDS = ["f32", "f64"]
SIZES = [
    (20, 3, (4,)),
    (64, 8, (3,)),
    (1111, 8, (2,)),
    (5, 5, (2,)),
    (150, 16, (1,)),
    (40, 32, ()),
    (33, 20, (2, 2)),
    (7, 1, ()),
]


def error(got, want, scale):
    """How far a basis is from orthonormal and from another, as a share of what is allowed."""
    got, want = np.asarray(got), np.asarray(want)
    k, e = got.shape[-1], eps(got.dtype)
    g, w = wide(got), wide(want)
    gram = np.swapaxes(g, -1, -2) @ g
    apart = np.abs(g - w).max(initial=0.0) / scale
    return max(np.abs(gram - np.eye(k)).max(initial=0.0) / 10, apart) / (e * np.sqrt(k))


METHODS = ["exp", "cholesky", "polar", "qr", "cayley"]
# What sizes matter to is the same for all methods.
RETRACTIONS = [(m, *s) for m in METHODS for s in SIZES if m == "exp" or (s[1] <= 20 and s[0] <= 100)]


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize(("method", "n", "k", "batch"), RETRACTIONS)
def test_retractions(gpu, rng, dtype, method, n, k, batch):
    U = points(rng, n, k, batch, dtype)
    H = (0.5 * rng.standard_normal(U.shape) / np.sqrt(n)).astype(dtype)
    out = gpu.twice(lambda: grassmann.retract(gpu.put(U), gpu.put(H), method=method, project=True))
    want = grassmann.retract(wide(U), wide(H), method=method, project=True, check=False)
    assert error(gpu.get(out), want, 20) <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("angle", [1e-8, 1e-3, 0.5, 1.5, np.pi / 2, 3.0, 20.0])
def test_arcs_of_any_length(gpu, rng, dtype, angle):
    U = points(rng, 60, 4, (), np.float64)
    H = grassmann.log(U, points(rng, 60, 4, (), np.float64))
    H *= angle / np.linalg.norm(H, 2)
    u, h = U.astype(dtype), H.astype(dtype)
    got = gpu.get(grassmann.exp(gpu.put(u), gpu.put(h)))
    want = grassmann.exp(wide(u), wide(h), check=False)
    assert error(got, want, 20 * max(1.0, angle * angle)) <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_tangent(gpu, rng, dtype):
    for n, k, batch in SIZES:
        U, G = points(rng, n, k, batch, dtype), rng.standard_normal((*batch, n, k)).astype(dtype)
        H = gpu.get(gpu.twice(lambda: grassmann.tangent(gpu.put(U), gpu.put(G))))  # noqa: B023
        want = grassmann.tangent(wide(U), wide(G), check=False)
        assert np.abs(wide(H) - want).max(initial=0.0) <= 20 * eps(dtype) * np.abs(G).max(initial=1.0) * np.sqrt(k)
    g = gpu.put(G)
    assert grassmann.tangent(gpu.put(U), g, out=g) is g


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize(("n", "k", "batch"), SIZES)
@pytest.mark.parametrize("transport", ["project", "parallel"])
def test_steps_with_momentum(gpu, rng, dtype, n, k, batch, transport):
    U = points(rng, n, k, batch, dtype)
    u, b = gpu.put(U), gpu.put(np.zeros_like(U))
    want, buffer = wide(U), np.zeros(U.shape)
    for _ in range(3):
        G = rng.standard_normal(U.shape).astype(dtype)
        options = {"lr": 0.05, "momentum": 0.9, "dampening": 0.1, "transport": transport}
        assert grassmann.sgd_step(u, gpu.put(G), b, **options) is u
        grassmann.sgd_step(want, wide(G), buffer, **options, check=False)
    assert error(gpu.get(u), want, 60) <= 1
    assert np.abs(wide(gpu.get(b)) - buffer).max(initial=0.0) <= 60 * eps(dtype) * max(
        1.0, np.abs(buffer).max(initial=0.0)
    ) * np.sqrt(k)


@pytest.mark.parametrize("retraction", ["exp", "cholesky", "polar", "cayley"])
def test_steps_without_a_buffer(gpu, rng, retraction):
    U = points(rng, 50, 6, (5,), np.float32)
    G = rng.standard_normal(U.shape).astype(np.float32)
    u = gpu.put(U)
    gpu.twice(lambda: grassmann.sgd_step(gpu.put(U), gpu.put(G), lr=0.1, retraction=retraction))
    grassmann.sgd_step(u, gpu.put(G), lr=0.1, retraction=retraction)
    want = wide(U)
    grassmann.sgd_step(want, wide(G), lr=0.1, retraction=retraction, check=False)
    assert error(gpu.get(u), want, 20) <= 1


def test_points_stay_orthonormal(gpu, rng):
    U = points(rng, 24, 4, (2,), np.float32)
    u, b = gpu.put(U), gpu.put(np.zeros_like(U))
    worst = 0.0
    for i in range(40):
        grassmann.sgd_step(u, gpu.put(rng.standard_normal(U.shape).astype(np.float32)), b, lr=0.3, momentum=0.5)
        if i % 20 == 0:
            g = wide(gpu.get(u))
            worst = max(worst, np.abs(np.swapaxes(g, -1, -2) @ g - np.eye(4)).max())
    assert worst <= 10 * eps(np.float32) * 2.0


def test_strides(gpu, rng):
    U = points(rng, 30, 5, (3,), np.float32)
    G = rng.standard_normal(U.shape).astype(np.float32)
    want = wide(U)
    grassmann.sgd_step(want, wide(G), lr=0.1, check=False)
    room = gpu.put(np.zeros((3, 60, 10), np.float32))
    view = room[:, ::2, ::2]
    view[...] = gpu.put(U)
    grassmann.sgd_step(view, gpu.put(G), lr=0.1)
    assert error(gpu.get(view), want, 20) <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize(("n", "k", "batch"), SIZES)
@pytest.mark.parametrize(("transport", "retraction"), [("project", "exp"), ("parallel", "exp"), ("project", "qr")])
def test_adam(gpu, rng, dtype, n, k, batch, transport, retraction):
    U = points(rng, n, k, batch, dtype)
    want, m, v = wide(U), np.zeros(U.shape), np.zeros(batch)
    u, first, second = gpu.put(U), gpu.put(np.zeros_like(U)), gpu.put(np.zeros(batch, dtype))
    for step in range(1, 4):
        G = rng.standard_normal(U.shape).astype(dtype)
        options = {"step": step, "lr": 0.05, "betas": (0.8, 0.9), "retraction": retraction, "transport": transport}
        if k == n:
            options["eps"] = 1e-2  # a tangent of rounding errors alone
        assert grassmann.adam_step(u, gpu.put(G), first, second, **options) is u
        grassmann.adam_step(want, wide(G), m, v, **options, check=False)
    assert error(gpu.get(u), want, 60) <= 1
    size = eps(dtype) * max(1.0, np.abs(m).max(initial=0.0)) * np.sqrt(k)
    assert np.abs(wide(gpu.get(first)) - m).max(initial=0.0) <= 100 * size
    np.testing.assert_allclose(wide(gpu.get(second)), v, rtol=100 * eps(dtype), atol=n * eps(dtype) ** 2 * k * 1e3)


def test_adam_of_any_layout(gpu, rng):
    U = points(rng, 30, 5, (4,), np.float32)
    G, M = rng.standard_normal((2, *U.shape)).astype(np.float32)
    v = rng.random((4,)).astype(np.float32) + 1
    options = {"step": 7, "lr": 0.1, "maximize": True}
    want, m, w = wide(U), wide(M), wide(v)
    grassmann.adam_step(want, wide(G), m, w, **options, check=False)

    def run():
        transposed = [gpu.put(np.ascontiguousarray(x.swapaxes(-1, -2))).swapaxes(-1, -2) for x in (U, G, M)]
        second = gpu.put(np.zeros((4, 3), np.float32))[:, 1]
        second[...] = gpu.put(v)
        grassmann.adam_step(*transposed, second, **options)
        return transposed[0], transposed[2], second

    u, first, second = gpu.twice(run)
    assert error(gpu.get(u), want, 20) <= 1
    np.testing.assert_allclose(gpu.get(first), m, atol=1e-5)
    np.testing.assert_allclose(gpu.get(second), w, rtol=1e-5)


@pytest.mark.parametrize("what", ["grad", "first", "second", "U", "negative second", "huge"])
def test_adam_leaves_a_bad_class(gpu, rng, what):
    U = points(rng, 20, 3, (3,), np.float32)
    G, M = rng.standard_normal((2, *U.shape)).astype(np.float32)
    v = np.ones(3, np.float32)
    if what == "negative second":
        v[1] = -1
    elif what == "second":
        v[1] = np.inf
    else:
        {"grad": G, "first": M, "U": U, "huge": M}[what][1, 4, 2] = 1e30 if what == "huge" else np.nan
    u, first, second = gpu.put(U), gpu.put(M), gpu.put(v)
    grassmann.adam_step(u, gpu.put(G), first, second, step=3, lr=1e30 if what == "huge" else 0.1)
    for x, before in ((u, U), (first, M), (second, v)):
        np.testing.assert_array_equal(gpu.get(x)[1], before[1])
    if what != "huge":
        assert (gpu.get(u)[[0, 2]] != U[[0, 2]]).any(axis=(1, 2)).all()
        assert (gpu.get(second)[[0, 2]] != 1).all()


def test_adam_without_gradient_or_with_a_large_one(gpu, rng):
    U = points(rng, 20, 3, (), np.float32)
    u, first, second = gpu.put(U), gpu.put(0 * U), gpu.put(np.zeros((), np.float32))
    grassmann.adam_step(u, gpu.put(0 * U), first, second, step=1, lr=0.1, eps=0.0)
    assert error(gpu.get(u), wide(U), 20) <= 1
    # Squares whose sum leaves float32, though no column's does: the second moment stops at the largest number.
    G = rng.standard_normal(U.shape)
    G *= np.sqrt(6e38) / np.linalg.norm(grassmann.tangent(wide(U), G, check=False))
    before = gpu.get(u)
    grassmann.adam_step(u, gpu.put(G.astype(np.float32)), first, second, step=2, lr=0.1, betas=(0.9, 0.0))
    assert gpu.get(second) == np.finfo(np.float32).max
    assert (gpu.get(u) != before).any()
    # Beyond that nothing moves.
    kept = [gpu.get(x) for x in (u, first, second)]
    grassmann.adam_step(u, gpu.put((100 * G).astype(np.float32)), first, second, step=3, lr=0.1)
    for x, was in zip((u, first, second), kept, strict=True):
        np.testing.assert_array_equal(gpu.get(x), was)


def test_adam_refuses(gpu, rng):
    U = points(rng, 20, 3, (3,), np.float32)
    u, g, m, v = (gpu.put(x) for x in (U, 0 * U, 0 * U, np.zeros(3, np.float32)))
    with pytest.raises(ValueError, match="one entry for each class"):
        grassmann.adam_step(u, g, m, v[:2], step=1, lr=0.1)
    with pytest.raises(TypeError, match="second_moment must be float32 as U is, got float64"):
        grassmann.adam_step(u, g, m, gpu.put(np.zeros(3)), step=1, lr=0.1)
    with pytest.raises(TypeError, match="second_moment is on the CPU"):
        grassmann.adam_step(u, g, m, np.zeros(3, np.float32), step=1, lr=0.1)
    with pytest.raises(TypeError, match="U is on the CPU and second_moment on CUDA device 0"):
        grassmann.adam_step(U, 0 * U, 0 * U, v, step=1, lr=0.1)
    with pytest.raises(ValueError, match=r"betas\[0\] must be in \[0, 1\)"):
        grassmann.adam_step(u, g, m, v, step=1, lr=0.1, betas=(1.0, 0.9))
    with pytest.raises(ValueError, match="U overlaps first_moment"):
        grassmann.adam_step(u, g, u, v, step=1, lr=0.1)
    with pytest.raises(ValueError, match="needs retraction 'exp'"):
        grassmann.adam_step(u, g, m, v, step=1, lr=0.1, retraction="qr", transport="parallel")
    with pytest.raises(ValueError, match="first_moment must have the shape of U"):
        grassmann.adam_step(u, g, m[:1], v, step=1, lr=0.1)


def test_adam_that_does_not_fit_changes_nothing(emulation, rng):
    emulation.control.hardware(8, 101376)
    U = points(rng, 40, 20, (2,), np.float64)
    u, m, v = emulation.put(U), emulation.put(0 * U), emulation.put(np.zeros(2))
    with pytest.raises(ValueError, match="bytes of shared memory"):
        grassmann.adam_step(u, emulation.put(U), m, v, step=1, lr=0.1, transport="parallel")
    assert not m.get().any()
    assert not v.get().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("along", [1.0, 100.0, 1e4])
def test_parts_along_the_point_may_be_large(gpu, rng, dtype, along):
    U = points(rng, 40, 4, (2,), dtype)
    H = (along * U + 0.1 * rng.standard_normal(U.shape)).astype(dtype)
    for method in METHODS:
        g = wide(gpu.get(grassmann.retract(gpu.put(U), gpu.put(H), method=method, project=True)))
        defect = np.abs(np.swapaxes(g, -1, -2) @ g - np.eye(4)).max()
        assert defect <= 20 * eps(dtype)
    u = gpu.put(U)
    grassmann.sgd_step(u, gpu.put(H), lr=1.0)
    g = wide(gpu.get(u))
    assert np.abs(np.swapaxes(g, -1, -2) @ g - np.eye(4)).max() <= 20 * eps(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize(("n", "k", "batch"), SIZES)
def test_transport(gpu, rng, dtype, n, k, batch):
    U = points(rng, n, k, batch, dtype)
    H, V = (rng.standard_normal(U.shape) / np.sqrt(n)).astype(dtype), rng.standard_normal(U.shape).astype(dtype)
    got = gpu.twice(lambda: grassmann.transport(gpu.put(U), gpu.put(H), gpu.put(V), 0.7))
    want = grassmann.transport(wide(U), wide(H), wide(V), 0.7, check=False)
    assert np.abs(wide(gpu.get(got)) - want).max(initial=0.0) <= 40 * eps(dtype) * np.abs(V).max(initial=1.0) * np.sqrt(
        k
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("angle", [0.0, 1e-8, 0.5, np.pi, 20.0])
def test_transport_is_an_isometry(gpu, rng, dtype, angle):
    U = points(rng, 60, 4, (), np.float64)
    H, V = grassmann.tangent(U, rng.standard_normal(U.shape)), grassmann.tangent(U, rng.standard_normal(U.shape))
    H *= angle / np.linalg.norm(H, 2)
    u, h, v = (x.astype(dtype) for x in (U, H, V))
    place = gpu.put(v)
    assert grassmann.transport(gpu.put(u), gpu.put(h), place, out=place) is place
    got, scale = wide(gpu.get(place)), max(1.0, angle * angle) * eps(dtype) * np.linalg.norm(V)
    assert abs(np.linalg.norm(got) - np.linalg.norm(v)) <= 40 * scale
    assert np.abs(grassmann.exp(U, H).T @ got).max() <= 60 * scale
    # The velocity stays the velocity; and an entry that is not finite shows.
    moved = wide(gpu.get(grassmann.transport(gpu.put(u), gpu.put(h), gpu.put(h))))
    np.testing.assert_allclose(moved, grassmann.transport(wide(u), wide(h), wide(h), check=False), atol=60 * scale)
    h[3, 1] = np.nan
    assert np.isnan(gpu.get(grassmann.transport(gpu.put(u), gpu.put(h), gpu.put(v)))).any()


def test_transport_of_points_elsewhere(gpu, rng):
    G = gpu.put(rng.standard_normal((20, 3)))
    with pytest.raises(TypeError, match="U is on the CPU and V on CUDA device 0"):
        grassmann.transport(np.eye(20, 3), G, G)


def test_transport_broadcasts(gpu, rng):
    U, H = points(rng, 12, 2, (), np.float64), 0.1 * rng.standard_normal((3, 1, 12, 2))
    V = rng.standard_normal((4, 12, 2))
    got = gpu.get(grassmann.transport(gpu.put(U), gpu.put(H), gpu.put(V)))
    np.testing.assert_allclose(got, grassmann.transport(U, H, V, check=False), atol=1e-13)


@pytest.mark.parametrize("what", ["nan in grad", "inf in buffer", "nan in U", "U not orthonormal"])
def test_a_bad_class_stays_as_it_was(gpu, rng, what):
    U = points(rng, 20, 3, (3,), np.float32)
    G, B = rng.standard_normal((2, *U.shape)).astype(np.float32)
    {"nan in grad": G, "inf in buffer": B, "nan in U": U, "U not orthonormal": U}[what][1, 4, 2] = {
        "nan in grad": np.nan,
        "inf in buffer": np.inf,
        "nan in U": np.nan,
        "U not orthonormal": 7.0,
    }[what]
    u, b = gpu.put(U), gpu.put(B)
    grassmann.sgd_step(u, gpu.put(G), b, lr=0.1, momentum=0.9)
    got, buffer = gpu.get(u), gpu.get(b)
    np.testing.assert_array_equal(got[1], U[1])
    np.testing.assert_array_equal(buffer[1], B[1])
    assert (got[[0, 2]] != U[[0, 2]]).any()
    # The pure functions show it.
    if what.endswith(("U", "orthonormal")):
        assert np.isnan(gpu.get(grassmann.exp(gpu.put(U), gpu.put(0 * B)))[1]).all()


def test_what_is_refused(gpu, rng):
    U = points(rng, 20, 3, (3,), np.float32)
    G = rng.standard_normal(U.shape).astype(np.float32)
    with pytest.raises(TypeError, match="grad is on the CPU and U on CUDA device 0"):
        grassmann.sgd_step(gpu.put(U), G, lr=0.1)
    with pytest.raises(TypeError, match="grad must be float32 as U is, got float64"):
        grassmann.sgd_step(gpu.put(U), gpu.put(wide(G)), lr=0.1)
    with pytest.raises(TypeError, match="U must be float32 or float64, got float16"):
        grassmann.sgd_step(gpu.put(U.astype(np.float16)), gpu.put(G.astype(np.float16)), lr=0.1)
    big = points(rng, 40, 33, (), np.float32)
    with pytest.raises(ValueError, match="at most 32"):
        grassmann.exp(gpu.put(big), gpu.put(0 * big))
    with pytest.raises(ValueError, match="grad must have the shape of U"):
        grassmann.sgd_step(gpu.put(U), gpu.put(G[:1]), lr=0.1)
    u = gpu.put(U)
    with pytest.raises(ValueError, match="U overlaps buffer"):
        grassmann.sgd_step(u, gpu.put(G), u, lr=0.1, momentum=0.5)
