"""Low-rank projection of gradients and 4-bit bases."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

from references import EPS
from subspan import orth

torch = pytest.importorskip("torch")


def published_quantisation(w, group):
    """Q-GaLore's formula (arXiv:2407.08296), in PyTorch's arithmetic: codes, scales, zeros, values."""
    flat = w.reshape(-1, group)
    high, low = flat.amax(dim=1, keepdim=True), flat.amin(dim=1, keepdim=True)
    scale = (high - low).clamp(min=1e-5) / 15
    zero = (-torch.round(low / scale)).clamp(0, 15)
    q = torch.clamp(torch.round(flat / scale) + zero, 0, 15)
    return q.reshape(-1), scale.reshape(-1), zero.reshape(-1), ((q - zero) * scale).reshape(w.shape)


@pytest.mark.parametrize("kind", ["haar", "normal", "constant", "positive", "halves", "tiny", "huge"])
@pytest.mark.parametrize(("n", "k", "group"), [(256, 16, 256), (512, 128, 256), (64, 6, 128), (32, 4, 64)])
def test_int4_is_the_published_formula_bit_for_bit(rng, kind, n, k, group):
    U = {
        "haar": lambda: orth.random_orthogonal(n, k, rng=0),
        "normal": lambda: rng.standard_normal((n, k)),
        "constant": lambda: np.full((n, k), 0.37),
        "positive": lambda: rng.random((n, k)) + 3,
        "halves": lambda: rng.integers(-15, 16, (n, k)) / 2,  # ties of the rounding
        "tiny": lambda: 1e-7 * rng.standard_normal((n, k)),
        "huge": lambda: 1e20 * rng.standard_normal((n, k)),
    }[kind]()
    U = U.astype(np.float32)
    B = orth.quantize_int4(U, group)
    q, scale, zero, dense = (x.numpy() for x in published_quantisation(torch.from_numpy(U), group))
    mine = np.stack([B.codes & 15, B.codes >> 4], axis=1).reshape(-1)
    np.testing.assert_array_equal(mine, q)
    np.testing.assert_array_equal(B.scale, scale)
    np.testing.assert_array_equal(B.zero, zero)
    np.testing.assert_array_equal(B.to_array(), dense)
    np.testing.assert_array_equal(orth.quantize_int4(np.asfortranarray(U), group).codes, B.codes)
    assert B.nbytes <= U.nbytes / 8 + 8 * scale.size


@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_int4_in_double(rng, scale):
    U = scale * rng.standard_normal((64, 8))
    B = orth.quantize_int4(U, 128)
    _, s, zero, dense = (x.numpy() for x in published_quantisation(torch.from_numpy(U), 128))
    np.testing.assert_array_equal(B.scale, s)
    np.testing.assert_array_equal(B.zero, zero)
    np.testing.assert_array_equal(B.to_array(), dense)
    with pytest.raises(ValueError, match="range"):
        orth.quantize_int4(np.array([[3e38, -3e38]], np.float32))


def test_an_ill_conditioned_int4_basis(rng):
    U = orth.random_orthogonal(400, 6, rng=0, dtype=np.float32)
    U[:, 1] = U[:, 0]
    U[7, 1] += 0.3
    B = orth.quantize_int4(U)
    D = B.to_array().astype(float)
    span = np.linalg.qr(D)[0]
    G = rng.standard_normal((400, 30)).astype(np.float32)
    assert np.linalg.norm(span.T @ orth.project_out(G, B)) <= 10 * EPS[np.dtype(np.float32)] * np.linalg.norm(
        span.T @ G
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("n", "k", "group"), [(7, 5, 3), (300, 130, 256), (100, 33, 7), (1, 1, 256), (700, 600, 256)])
def test_int4_products(rng, dtype, n, k, group):
    """Odd sizes, groups that end inside of rows, every orientation, stacks."""
    B = orth.quantize_int4(rng.standard_normal((n, k)).astype(dtype), group)
    D = B.to_array()
    q = np.stack([B.codes & 15, B.codes >> 4], axis=1).reshape(-1)[: n * k].astype(dtype)
    g = np.arange(n * k) // group
    np.testing.assert_array_equal(D.reshape(-1), B.scale[g] * (q - B.zero[g]))
    tol = 30 * EPS[np.dtype(dtype)] * max(n, k)
    X, Y = rng.standard_normal((2, k, 9)).astype(dtype), rng.standard_normal((2, n, 9)).astype(dtype)
    d = D.astype(float)
    np.testing.assert_allclose(B.apply(X), d @ X, atol=tol)
    np.testing.assert_allclose(B.apply(Y, transpose=True), d.T @ Y, atol=tol)
    Xt, Yt = np.swapaxes(X, 1, 2), np.swapaxes(Y, 1, 2)
    np.testing.assert_allclose(B.apply(Yt, side="right"), Yt @ d, atol=tol)
    np.testing.assert_allclose(B.apply(Xt, side="right", transpose=True), Xt @ d.T, atol=tol)
    out = np.empty((2, n, 9), dtype)
    assert B.apply(X, out=out) is out
    for side, C in (("left", Y), ("right", np.ascontiguousarray(Yt))):
        M = rng.standard_normal((k, k)).astype(dtype) / k
        want = C + (d @ M @ (d.T @ C) if side == "left" else C @ d @ M @ d.T)
        np.testing.assert_allclose(orth.apply_core(C, B, M, side=side), want, atol=tol * 20 * k)
    with pytest.raises(ValueError, match="rows"):
        B.apply(rng.standard_normal((k + 1, 2)).astype(dtype))
    with pytest.raises(ValueError, match="Int4Basis"):
        orth.project_out(Y, B, orthonormal=True)


def test_int4_objects(rng):
    B = orth.quantize_int4(rng.standard_normal((64, 8)).astype(np.float32))
    assert "shape=(64, 8), group=256, dtype=float32" in repr(B)
    for other in (pickle.loads(pickle.dumps(B)), copy.deepcopy(B)):
        np.testing.assert_array_equal(other.to_array(), B.to_array())
    t = orth.quantize_int4(torch.randn(64, 8))
    assert isinstance(t.to_array(), torch.Tensor)
    assert isinstance(t.apply(torch.randn(8, 3)), torch.Tensor)
    with pytest.raises(TypeError, match="float32"):
        B.apply(np.ones((8, 2)))
    with pytest.raises(ValueError, match="NaN"):
        orth.quantize_int4(np.array([[1.0, np.nan]]))
    with pytest.raises(ValueError, match="2 dimensions"):
        orth.quantize_int4(np.ones((2, 3, 4)))
    for group, error in ((0, ValueError), (2.5, TypeError)):
        with pytest.raises(error, match="group"):
            orth.quantize_int4(np.ones((4, 4)), group)
    assert orth.quantize_int4(np.ones((0, 4))).to_array().shape == (0, 4)


# -- GradientProjector -------------------------------------------------------------------------------------------------


def drifting(rng, m, n, steps, turn, rank=6, noise=1e-3):
    left, right = orth.random_orthogonal(m, rank, rng=1), orth.random_orthogonal(n, rank, rng=2)
    scale = 2.0 ** -np.arange(rank)
    for _ in range(steps):
        yield (left * scale) @ right.T + noise * rng.standard_normal((m, n))
        left = orth.orthonormalize(left + turn * rng.standard_normal((m, rank)) / m**0.5)
        right = orth.orthonormalize(right + turn * rng.standard_normal((n, rank)) / n**0.5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("m", "n"), [(90, 60), (60, 90), (64, 64)])
@pytest.mark.parametrize("side", ["auto", "left", "right"])
@pytest.mark.parametrize("bits", [None, 4])
def test_down_and_up(rng, dtype, m, n, side, bits):
    G = next(drifting(rng, m, n, 1, 0.0)).astype(dtype)
    p = orth.GradientProjector(6, side=side, bits=bits, scale=0.25, rng=0)
    R = p.down(G)
    right = (m >= n) if side == "auto" else side == "right"
    assert R.shape == ((m, 6) if right else (6, n))
    assert R.dtype == dtype
    P = (p.basis.to_array() if bits else p.basis).astype(float)
    tol = 60 * EPS[np.dtype(dtype)]
    np.testing.assert_allclose(R, G @ P if right else P.T @ G, atol=tol)
    np.testing.assert_allclose(p.up(R), 0.25 * (R @ P.T if right else P @ R), atol=tol)
    if bits is None:
        u, s, vt = np.linalg.svd(G.astype(float))  # GaLore's basis, up to signs
        want = vt[:6].T if right else u[:, :6]
        np.testing.assert_allclose(np.abs(P.T @ want), np.eye(6), atol=1e-3)
        assert np.linalg.norm(4 * p.up(R) - G) < 1.01 * np.linalg.norm(s[6:])


def test_a_warm_refresh_follows_a_drifting_gradient(rng):
    """One subspace iteration from the last basis holds the energy of the best one within 1%."""
    warm = orth.GradientProjector(8, side="right", rng=0)
    for G in drifting(rng, 300, 200, 12, 0.05, rank=12):
        warm.refresh(G)
        best = (np.linalg.svd(G, compute_uv=False)[:8] ** 2).sum()
        assert np.linalg.norm(G @ warm.basis) ** 2 > 0.99 * best
        assert np.abs(warm.basis.T @ warm.basis - np.eye(8)).max() < 1e-13
    assert warm.refreshes == 12


def test_a_refresh_after_a_sudden_turn(rng):
    """The few random directions beside the last basis find a space that has nothing of it."""
    p = orth.GradientProjector(4, side="right", rng=0)
    for columns in (slice(0, 16), slice(16, 32)):
        G = np.zeros((64, 32))
        G[:, columns] = (rng.standard_normal((64, 4)) * [8, 4, 2, 1]) @ rng.standard_normal((4, 16))
        p.refresh(G)
        assert np.linalg.norm(G @ p.basis) ** 2 > 0.99 * np.linalg.norm(G) ** 2


def test_refresh_interval(rng):
    p = orth.GradientProjector(2, refresh=3, rng=0)
    G = rng.standard_normal((10, 8))
    for _ in range(7):
        p.down(G)
    assert p.refreshes == 3
    manual = orth.GradientProjector(2, refresh=0, rng=0)
    for _ in range(7):
        manual.down(G)
    assert manual.refreshes == 1


def test_the_cosine_rule_lengthens_and_shortens(rng):
    p = orth.GradientProjector(2, side="right", refresh=4, adapt=True, rng=0)
    intervals = []

    def feed(gradients):
        for G in gradients:
            p.refresh(G)
            intervals.append(p.interval)

    calm = next(drifting(rng, 40, 30, 1, 0.0))
    feed(calm * s for s in (1, -1, 1, -1, 1, -1))  # signs of singular vectors carry nothing
    assert intervals == [4, 4, 4, 4, 4, 8]
    assert min(p.similarity, default=1.0) > 0.99
    feed([calm] * 5)
    assert p.interval == 16  # once for each full history, not at every refresh

    def spike(j):
        G = np.zeros((40, 30))
        G[j, j] = 1.0
        G += 1e-3 * rng.standard_normal(G.shape)
        return G

    p.iterations = 8
    feed(spike(j) for j in range(5))
    assert p.interval == 8
    feed(spike(j) for j in range(5, 25))
    assert p.interval == 4  # not below the first one
    fixed = orth.GradientProjector(2, refresh=4, rng=0)
    for _ in range(12):
        fixed.refresh(calm)
    assert fixed.interval == 4


def test_projector_objects(rng):
    p = orth.GradientProjector(3, bits=4, adapt=True, rng=0)
    assert "no basis yet" in repr(p)
    askew = np.frombuffer(bytes(20 * 12 * 4 + 1), np.float32, offset=1).reshape(20, 12)
    with pytest.raises(ValueError, match="G is not aligned"):
        p.down(askew)
    with pytest.raises(ValueError, match="no basis"):
        p.up(np.ones((3, 3)))
    G = rng.standard_normal((20, 12)).astype(np.float32)
    R = p.down(G)
    assert "refreshed 1 times" in repr(p)
    other = pickle.loads(pickle.dumps(p))
    for _ in range(3):
        np.testing.assert_array_equal(other.down(G), p.down(G))
    np.testing.assert_array_equal(copy.deepcopy(p).up(R), p.up(R))
    out = np.empty_like(R)
    assert p.down(G, out=out) is out
    since = p._since
    with pytest.raises(ValueError, match="contiguous"):
        p.down(G, out=np.empty_like(R, order="F"))
    with pytest.raises(TypeError, match="float32"):
        p.down(G.astype(float))
    assert p._since == since
    with pytest.raises(ValueError, match="shape"):
        p.down(G.T)
    with pytest.raises(ValueError, match="R must have shape"):
        p.up(R.T)
    with pytest.raises(ValueError, match="rank"):
        orth.GradientProjector(13).down(G)
    G[0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        p.refresh(G)
    for kwargs, error in [
        ({"rank": 0}, ValueError),
        ({"rank": 2.0}, TypeError),
        ({"rank": 2, "side": "top"}, ValueError),
        ({"rank": 2, "bits": 8}, ValueError),
        ({"rank": 2, "refresh": -1}, ValueError),
        ({"rank": 2, "threshold": 0}, ValueError),
    ]:
        with pytest.raises(error, match=next(k for k in reversed(kwargs))):
            orth.GradientProjector(**kwargs)


def test_projector_on_tensors():
    G = torch.randn(30, 20)
    p = orth.GradientProjector(20, rng=0)
    R = p.down(G)
    assert isinstance(R, torch.Tensor)
    assert isinstance(p.basis, torch.Tensor)
    torch.testing.assert_close(p.up(R), G.detach(), atol=1e-5, rtol=0)


def test_all_are_projectors_and_gradients_are_named(rng):
    p = orth.GradientProjector(2)
    G = rng.standard_normal((20, 12))
    with pytest.raises(TypeError, match=r"projectors\[0\] must be a GradientProjector, got int"):
        orth.GradientProjector.refresh_all([1], [G])
    with pytest.raises(ValueError, match=r"gradients\[1\] must have 2 dimensions"):
        orth.GradientProjector.refresh_all([p, orth.GradientProjector(2)], [G, G[0]])
    orth.GradientProjector.refresh_all(iter([p]), iter([G]))
    assert p.basis is not None


def test_an_array_of_a_packed_basis(rng):
    U = orth.random_orthogonal(32, 4, rng=0)
    B = orth.quantize_int4(U)
    np.testing.assert_array_equal(np.asarray(B), B.to_array())
