"""Householder QR by LAPACK's residuals, products of given reflections, and their gradients."""

from __future__ import annotations

import copy
import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_orth import KINDS, ORDERS, hard_matrix, laid_out

from references import EPS
from subspan import orth

torch = pytest.importorskip("torch")
DTYPES = [np.float32, np.float64]


def one_norm(x):
    return np.abs(x).sum(axis=-2).max(initial=0)


# -- QR ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("m", "n"),
    [(1, 1), (5, 3), (3, 5), (64, 16), (65, 33), (33, 65), (200, 129), (260, 260), (140, 300), (900, 40), (40, 1)],
)
def test_lapacks_six_residuals(rng, dtype, kind, m, n):
    """A - QR, I - QᵀQ, QC, QᵀC, CQ, CQᵀ as LAPACK's test suite scales them; its threshold is 30."""
    A = hard_matrix(rng, m, n, kind, dtype)
    eps, k = EPS[np.dtype(dtype)], min(m, n)
    Q, R = orth.householder_qr(A)
    scale = max(float(np.abs(A).max()), 1e-300)  # huge and tiny matrices, scaled for the reference
    a, r = A.astype(float) / scale, R.astype(float) / scale
    full = Q.to_array(full=True)
    q = full.astype(float)
    assert R.shape == (k, n)
    np.testing.assert_array_equal(R, np.triu(R))
    # LAPACK's exact relation of the thin factor to the full one.
    np.testing.assert_allclose(Q.to_array(), full[:, :k], atol=10 * eps)
    assert one_norm(a - q[:, :k] @ r) <= 30 * eps * max(m, n) * max(one_norm(a), 1e-300)
    assert one_norm(np.eye(m) - q.T @ q) <= 30 * eps * m
    C, D = rng.standard_normal((m, 19)).astype(dtype), rng.standard_normal((19, m)).astype(dtype)
    for x, side in ((C, "left"), (D, "right")):
        for transpose in (False, True):
            h = q.T if transpose else q
            want = h @ x if side == "left" else x @ h
            got = Q.apply(x, side=side, transpose=transpose)
            assert one_norm(want - got) <= 30 * eps * max(m, 19) * one_norm(x)
            place = np.asfortranarray(x)
            assert Q.apply(place, side=side, transpose=transpose, out=place) is place
            assert one_norm(want - place) <= 30 * eps * max(m, 19) * one_norm(x)


def test_graded_columns_keep_their_own_accuracy(rng):
    """Every column of A - QR is small against that column, down to 1e-30."""
    A = rng.standard_normal((80, 40)) * np.logspace(0, -30, 40)
    Q, R = orth.householder_qr(A)
    error = np.abs(A - Q.to_array() @ R).max(axis=0) / np.abs(A).max(axis=0)
    assert error.max() < 50 * EPS[np.dtype(float)]


@given(
    seed=st.integers(0, 2**32 - 1),
    m=st.integers(1, 70),
    n=st.integers(1, 70),
    batch=st.sampled_from([(), (5,), (2, 3)]),
    dtype=st.sampled_from(DTYPES),
    order=st.sampled_from(ORDERS),
)
def test_stacks_and_layouts(seed, m, n, batch, dtype, order):
    A = laid_out(np.random.default_rng(seed), (*batch, m, n), dtype, order)
    Q, R = orth.householder_qr(A)
    q = Q.to_array()
    eps, k = EPS[np.dtype(dtype)], min(m, n)
    assert Q.shape == (*batch, m, m)
    assert np.abs(q.astype(float) @ R - A).max() <= 30 * eps * k**0.5 * np.abs(A).max()
    gram = np.swapaxes(q, -1, -2).astype(float) @ q
    assert np.abs(gram - np.eye(k)).max() <= 10 * eps * k**0.5
    # LAPACK's signs and factors.
    lapack = np.linalg.qr(A.astype(np.float64))[1]
    sure = np.abs(np.diagonal(lapack, axis1=-2, axis2=-1)) > 1e-3
    assert (np.sign(np.diagonal(R, axis1=-2, axis2=-1)) == np.sign(np.diagonal(lapack, axis1=-2, axis2=-1)))[sure].all()


@pytest.mark.parametrize("small", [1e-160, 1e-170, 1e-300])
def test_a_diagonal_far_above_what_is_below_it(rng, small):
    A = np.tril(rng.standard_normal((9, 4)))
    A[4:] *= small
    for a in (A, np.array([[1.0], [small]])):
        Q, R = orth.householder_qr(a)
        np.testing.assert_allclose(Q.to_array() @ R, a, atol=1e-14)
        assert np.isfinite(Q.tau).all()


def test_factors_of_the_wrong_shape_are_refused():
    with pytest.raises(ValueError, match="T must be"):
        orth.HouseholderQ(np.ones((40, 20)), np.ones(20), np.ones((1, 1))).apply(np.ones((40, 2)))


def test_gradients_of_an_empty_stack(rng):
    dv, dc = orth.householder_apply_backward(np.zeros((0, 8, 3)), rng.standard_normal((8, 2)), np.zeros((0, 8, 3)))
    np.testing.assert_array_equal(dv, np.zeros((8, 2)))
    assert dc.shape == (0, 8, 3)


def test_factors_are_lapacks(rng):
    from scipy.linalg import lapack

    A = rng.standard_normal((50, 20))
    Q, _ = orth.householder_qr(A)
    qr, tau, _, _ = lapack.dgeqrf(A)
    np.testing.assert_allclose(Q.tau, tau, atol=1e-13)
    np.testing.assert_allclose(np.tril(Q.V, -1), np.tril(qr, -1), atol=1e-12)
    np.testing.assert_array_equal(np.triu(Q.V[:20]), np.eye(20))
    np.testing.assert_allclose(orth.householder_apply(Q.V, A, Q.tau, transpose=True)[20:], 0, atol=1e-13)


def test_householder_q_as_an_object(rng):
    A = rng.standard_normal((3, 20, 6)).astype(np.float32)
    Q, _ = orth.householder_qr(A)
    assert repr(Q) == "HouseholderQ(shape=(3, 20, 20), reflections=6, dtype=float32)"
    C = rng.standard_normal((20, 4)).astype(np.float32)
    want = Q.apply(C)  # one C for a stack of factors
    assert want.shape == (3, 20, 4)
    for other in (pickle.loads(pickle.dumps(Q)), copy.deepcopy(Q)):
        np.testing.assert_array_equal(other.apply(C), want)
    with pytest.raises(ValueError, match="rows"):
        Q.apply(C[:5])
    with pytest.raises(TypeError, match="float64"):
        Q.apply(C.astype(float))
    bad = np.full((3, 20, 2), np.nan, np.float32)
    with pytest.raises(ValueError, match="NaN"):
        Q.apply(bad)
    A[1, 2, 3] = np.inf
    with pytest.raises(ValueError, match="NaN or infinity"):
        orth.householder_qr(A)


@pytest.mark.parametrize("k", [5, 140])
@pytest.mark.parametrize("order", ORDERS)
def test_one_set_for_the_rows_of_a_stack(rng, k, order):
    """Stacks that are one matrix of rows, and those whose strides do not allow it, agree with their matrices."""
    A = rng.standard_normal((160, k))
    Q, _ = orth.householder_qr(A)
    X, G = (laid_out(rng, (4, 3, 160), np.float64, order) for _ in range(2))
    for transpose in (False, True):
        want = np.stack([Q.apply(x, side="right", transpose=transpose) for x in X])
        np.testing.assert_allclose(Q.apply(X, side="right", transpose=transpose), want, atol=1e-12)
        place = laid_out(rng, X.shape, np.float64, order)
        place[...] = X
        Q.apply(place, side="right", transpose=transpose, out=place)
        np.testing.assert_allclose(place, want, atol=1e-12)
        for tau in (None, Q.tau):
            got = orth.householder_apply_backward(G, Q.V, X, tau, side="right", transpose=transpose)
            parts = [
                orth.householder_apply_backward(g, Q.V, x, tau, side="right", transpose=transpose)
                for g, x in zip(G, X, strict=True)
            ]
            np.testing.assert_allclose(got[0], sum(p[0] for p in parts), atol=1e-10)
            np.testing.assert_allclose(got[1], np.stack([p[1] for p in parts]), atol=1e-11)
            if tau is not None:
                np.testing.assert_allclose(got[2], sum(p[2] for p in parts), atol=1e-10)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 4, 2), (2, 0, 3)])
def test_empty_qr(shape):
    Q, R = orth.householder_qr(np.zeros(shape))
    assert R.shape == (*shape[:-2], min(shape[-2:]), shape[-1])
    assert Q.to_array().shape == (*shape[:-1], min(shape[-2:]))


# -- products of given reflections -------------------------------------------------------------------------------------


def explicit(V, tau):
    """H_1 ··· H_k as a dense matrix in torch, differentiable; tau None for unit reflections."""
    m, k = V.shape[-2:]
    H = torch.eye(m, dtype=V.dtype).expand(*V.shape[:-2], m, m)
    for j in range(k):
        v = V[..., :, j : j + 1]
        if tau is None:
            s = (v * v).sum((-2, -1), keepdim=True)
            t = torch.where(s > 0, 2 / torch.where(s > 0, s, torch.ones_like(s)), torch.zeros_like(s))
        else:
            t = tau[..., j, None, None]
        H = H - t * (H @ v) @ v.mT
    return H


@given(
    seed=st.integers(0, 2**32 - 1),
    m=st.integers(1, 40),
    k=st.integers(1, 45),
    batch=st.sampled_from([(), (3,)]),
    dtype=st.sampled_from(DTYPES),
    order=st.sampled_from(ORDERS),
    given_tau=st.booleans(),
)
def test_householder_product(seed, m, k, batch, dtype, order, given_tau):
    rng = np.random.default_rng(seed)
    V = laid_out(rng, (*batch, m, k), dtype, order)
    tau = None
    if given_tau:  # near reflections: norms stay tame
        tau = ((1 + 0.1 * rng.standard_normal((*batch, k))) * 2 / (V.astype(float) ** 2).sum(-2)).astype(dtype)
    v = torch.from_numpy(np.array(V, np.float64))
    H = explicit(v, None if tau is None else torch.from_numpy(tau.astype(float))).numpy()
    size = np.abs(H).max() * 1.2**k
    tol = 30 * EPS[np.dtype(dtype)] * size * k**0.5
    got = orth.householder_product(V, tau)
    assert got.shape == (*batch, m, min(m, k))
    assert np.abs(got - H[..., : min(m, k)]).max() <= tol
    C, D = rng.standard_normal((*batch, m, 7)).astype(dtype), rng.standard_normal((*batch, 7, m)).astype(dtype)
    Ht = np.swapaxes(H, -1, -2)
    for x, side, transpose, want in [
        (C, "left", False, H @ C),
        (C, "left", True, Ht @ C),
        (D, "right", False, D @ H),
        (D, "right", True, D @ Ht),
    ]:
        got = orth.householder_apply(V, x, tau, side=side, transpose=transpose)
        assert np.abs(got - want).max() <= 4 * tol
        place = x.copy()
        assert orth.householder_apply(V, place, tau, side=side, transpose=transpose, out=place) is place
        np.testing.assert_array_equal(place, got)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k"), [(300, 129), (150, 400), (600, 300)])
def test_many_reflections(rng, dtype, m, k):
    V = rng.standard_normal((m, k)).astype(dtype)
    Q = orth.householder_product(V).astype(float)
    assert np.abs(Q.T @ Q - np.eye(min(m, k))).max() <= 10 * EPS[np.dtype(dtype)] * k**0.5
    C = rng.standard_normal((m, 9)).astype(dtype)
    E = np.eye(m, min(m, k), dtype=dtype)
    np.testing.assert_allclose(orth.householder_apply(V, E), Q, atol=60 * EPS[np.dtype(dtype)])
    back = orth.householder_apply(V, orth.householder_apply(V, C), transpose=True)
    np.testing.assert_allclose(back, C, atol=200 * EPS[np.dtype(dtype)])


def test_lengths_of_unit_reflections_do_not_matter(rng):
    for dtype, far in ((np.float32, 1e30), (np.float64, 1e250)):
        V = rng.standard_normal((30, 5)).astype(dtype)
        want = orth.householder_product(V)
        for s in (far, 1 / far, np.finfo(dtype).tiny):
            np.testing.assert_allclose(
                orth.householder_product((V * s).astype(dtype)), want, atol=1e-3 if s < 1e-37 else 1e-5
            )
        # The gradient scales with the reciprocal.
        g = rng.standard_normal((30, 5)).astype(dtype)
        base = orth.householder_product_backward(g, V)
        small = orth.householder_product_backward(g, V * dtype(2.0**40))
        np.testing.assert_allclose(small * 2.0**40, base, rtol=1e-3, atol=1e-5)


# -- gradients ---------------------------------------------------------------------------------------------------------


def torch_gradients(V, tau, grad, build):
    v = torch.from_numpy(np.ascontiguousarray(V)).requires_grad_()
    t = None if tau is None else torch.from_numpy(tau).requires_grad_()
    build(v, t).backward(torch.from_numpy(np.ascontiguousarray(grad)))
    return v.grad.numpy(), None if t is None else t.grad.numpy()


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("given_tau", [False, True])
@pytest.mark.parametrize(("m", "k"), [(1, 1), (6, 1), (12, 5), (9, 9), (7, 11), (300, 140), (40, 270)])
def test_product_gradients(rng, batch, given_tau, m, k):
    V = rng.standard_normal((*batch, m, k))
    tau = rng.random((*batch, k)) * 2 / (V**2).sum(-2) if given_tau else None
    grad = rng.standard_normal((*batch, m, min(m, k)))
    want, want_tau = torch_gradients(V, tau, grad, lambda v, t: explicit(v, t)[..., : min(m, k)])
    got = orth.householder_product_backward(grad, V, tau)
    dv, dtau = got if given_tau else (got, None)
    np.testing.assert_allclose(dv, want, atol=1e-11 * max(np.abs(want).max(), 1e-3))
    if given_tau:
        np.testing.assert_allclose(dtau, want_tau, atol=1e-11 * np.abs(want_tau).max())
        if m >= k and m < 100:  # PyTorch's own, which reads the part below the diagonal
            unit = np.tril(V, -1) + np.eye(m, k)
            mine = orth.householder_product_backward(grad, unit, tau)
            theirs = torch_gradients(unit, tau, grad, torch.linalg.householder_product)
            np.testing.assert_allclose(
                np.tril(mine[0], -1), np.tril(theirs[0], -1), atol=1e-9 * np.abs(theirs[0]).max()
            )
            np.testing.assert_allclose(mine[1], theirs[1], atol=1e-9 * np.abs(theirs[1]).max())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("given_tau", [False, True])
@pytest.mark.parametrize("shared", ["no", "yes", "partly"])
@pytest.mark.parametrize(("m", "k", "n"), [(9, 4, 5), (6, 10, 3), (40, 150, 8)])
def test_apply_gradients(rng, side, transpose, given_tau, shared, m, k, n):
    lead = {"no": (2, 3), "yes": (), "partly": (2, 1)}[shared]
    V = rng.standard_normal((*lead, m, k))
    tau = rng.random((*lead, k)) * 2 / (V**2).sum(-2) if given_tau else None
    C = rng.standard_normal((2, 3, *((m, n) if side == "left" else (n, m))))
    grad = rng.standard_normal(C.shape)
    c = torch.from_numpy(C).requires_grad_()

    def build(v, t):
        H = explicit(v, t)
        H = H.mT if transpose else H
        return H @ c if side == "left" else c @ H

    want, want_tau = torch_gradients(V, tau, grad, build)
    got = orth.householder_apply_backward(grad, V, C, tau, side=side, transpose=transpose)
    np.testing.assert_allclose(got[0], want, atol=1e-11 * np.abs(want).max())
    np.testing.assert_allclose(got[1], c.grad.numpy(), atol=1e-11)
    if given_tau:
        np.testing.assert_allclose(got[2], want_tau, atol=1e-11 * np.abs(want_tau).max())


def test_gradients_by_finite_differences(rng):
    V, C = rng.standard_normal((8, 3)), rng.standard_normal((8, 4))
    tau = rng.random(3)
    g, h = rng.standard_normal((8, 3)), 1e-6

    def difference(f, x, grad):
        out = np.empty_like(x)
        for i in np.ndindex(x.shape):
            d = np.zeros_like(x)
            d[i] = h
            out[i] = ((f(x + d) - f(x - d)) * grad).sum() / (2 * h)
        return out

    dv = orth.householder_product_backward(g, V)
    np.testing.assert_allclose(dv, difference(orth.householder_product, V, g), atol=1e-8)
    gc = rng.standard_normal((8, 4))
    dv, dc, dtau = orth.householder_apply_backward(gc, V, C, tau)
    np.testing.assert_allclose(dv, difference(lambda v: orth.householder_apply(v, C, tau), V, gc), atol=1e-7)
    np.testing.assert_allclose(dc, difference(lambda c: orth.householder_apply(V, c, tau), C, gc), atol=1e-7)
    np.testing.assert_allclose(dtau, difference(lambda t: orth.householder_apply(V, C, t), tau, gc), atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_finite_where_others_are_not(rng, dtype):
    """tau = 1/‖v‖² makes I - tau v vᵀ singular, where PyTorch's gradient is undefined; zero vectors; equal vectors."""
    V = rng.standard_normal((10, 4)).astype(dtype)
    g, C = rng.standard_normal((10, 4)).astype(dtype), rng.standard_normal((10, 6)).astype(dtype)
    tau = (1 / (V.astype(float) ** 2).sum(0)).astype(dtype)
    v64 = V.astype(float)
    want, want_tau = torch_gradients(v64, tau.astype(float), g.astype(float), lambda v, t: explicit(v, t)[:, :4])
    dv, dtau = orth.householder_product_backward(g, V, tau)
    np.testing.assert_allclose(dv, want, atol=100 * EPS[np.dtype(dtype)])
    np.testing.assert_allclose(dtau, want_tau, atol=2000 * EPS[np.dtype(dtype)])
    for case in (np.zeros((10, 4), dtype), np.where(np.arange(4) == 2, 0, V).astype(dtype), np.repeat(V[:, :1], 4, 1)):
        dv = orth.householder_product_backward(g, case)
        assert np.isfinite(dv).all()
        assert (dv[:, (case == 0).all(0)] == 0).all()
        dv, dc = orth.householder_apply_backward(C, case, C)
        assert np.isfinite(dv).all()
        assert np.isfinite(dc).all()
        assert np.isfinite(orth.householder_product_backward(g, case, np.zeros(4, dtype))[1]).all()


def test_bad_reflections(rng):
    V, C = rng.standard_normal((6, 2)), rng.standard_normal((6, 3))
    with pytest.raises(ValueError, match="tau"):
        orth.householder_apply(V, C, np.ones(3))
    with pytest.raises(ValueError, match=r"rows|columns"):
        orth.householder_apply(V, C, side="right")
    with pytest.raises(TypeError, match="float64"):
        orth.householder_apply(V, C.astype(np.float32))
    with pytest.raises(ValueError, match="grad"):
        orth.householder_apply_backward(C[:, :2], V, C)
    with pytest.raises(ValueError, match="overlaps"):
        orth.householder_apply(V, V, out=V)
    with pytest.raises(ValueError, match="leading axes"):
        orth.householder_apply_backward(C, np.stack([V, V]), C)
    for name in ("V", "tau", "C"):
        v, t, c = V.copy(), np.ones(2), C.copy()
        {"V": v, "tau": t, "C": c}[name].flat[1] = np.nan
        before = c.copy()
        with pytest.raises(ValueError, match=name):
            orth.householder_apply(v, c, t, out=c)
        np.testing.assert_array_equal(c, before)
    wide = rng.standard_normal((6, 300))
    c = C.copy()
    c[5, 2] = np.inf
    before = c.copy()
    with pytest.raises(ValueError, match="C"):
        orth.householder_apply(wide, c, out=c)
    np.testing.assert_array_equal(c, before)
    # A gradient scaler wants infinite gradients to come through.
    grad = np.full((6, 2), np.inf)
    with pytest.raises(ValueError, match="grad"):
        orth.householder_product_backward(grad, V)
    assert not np.isfinite(orth.householder_product_backward(grad, V, check=False)).all()


# -- a few vectors, which go by reflections ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (33, 17), (200, 70), (1500, 20)])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 16, 29, 48, 49])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("given_tau", [False, True])
def test_reflections_on_a_few_vectors(rng, dtype, shape, count, side, given_tau):
    m, k = shape
    v = rng.standard_normal((m, k)) * 10.0 ** rng.integers(-3, 3, k)
    tau = rng.uniform(0, 2, k) / (v * v).sum(0) if given_tau else None
    c = rng.standard_normal((2, m, count) if side == "left" else (2, count, m))
    orders = [np.ascontiguousarray, np.asfortranarray, lambda x: np.repeat(x, 2, axis=-1)[..., ::2]]
    for put, transpose in itertools.product(orders, [False, True]):
        want = c.copy()
        factors = 2 / (v * v).sum(0) if tau is None else tau
        ascending = (side == "left") == transpose
        for j in range(k) if ascending else reversed(range(k)):
            if side == "left":
                want -= factors[j] * v[:, j, None] * (v[:, j] @ want)[:, None]
            else:
                want -= factors[j] * (want @ v[:, j])[..., None] * v[:, j]
        args = (put(v.astype(dtype)), put(c.astype(dtype)), None if tau is None else tau.astype(dtype))
        found = orth.householder_apply(*args, side=side, transpose=transpose)
        np.testing.assert_allclose(found, want, atol=20 * k * np.finfo(dtype).eps * np.abs(c).max())
        one = orth.householder_apply(args[0], args[1][0], args[2], side=side, transpose=transpose)
        np.testing.assert_allclose(one, want[0], atol=20 * k * np.finfo(dtype).eps * np.abs(c).max())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", ["least", "tiny", "huge", "zero"])
def test_reflections_of_any_length_on_a_vector(rng, dtype, scale):
    info = np.finfo(dtype)
    size = {"least": info.tiny, "tiny": float(info.tiny) * 1e6, "huge": float(info.max) / 100, "zero": 0.0}[scale]
    v = rng.standard_normal((40, 5))
    v[:, 2] /= np.abs(v[:, 2]).max()
    wide = v.copy()
    v[:, 2] *= size
    c = rng.standard_normal((40, 1)).astype(dtype)
    want = c.astype(np.float64)
    for j in reversed(range(5)):
        if scale != "zero" or j != 2:
            want -= 2 / (wide[:, j] @ wide[:, j]) * wide[:, [j]] * (wide[:, j] @ want)
    np.testing.assert_allclose(orth.householder_apply(v.astype(dtype), c), want, atol=100 * info.eps)


def test_a_vector_that_is_not_finite_is_refused(rng):
    v, c = rng.standard_normal((50, 6)), rng.standard_normal((50, 1))
    for name, place in (("V", v), ("C", c)):
        place[7, 0] = np.nan
        with pytest.raises(ValueError, match=f"{name} holds NaN"):
            orth.householder_apply(v, c)
        kept = c.copy()
        with pytest.raises(ValueError, match=f"{name} holds NaN"):
            orth.householder_apply(v, c, out=c)
        np.testing.assert_array_equal(c, kept)
        place[7, 0] = 0
    v[3] = np.nan
    assert not np.isfinite(orth.householder_apply(v, c, check=False)).all()


@pytest.mark.parametrize(
    ("dtype", "length", "size"), [(np.float32, 1e-10, 1e-36), (np.float32, 1e15, 1e-28), (np.float64, 1e-100, 1e-250)]
)
def test_reflections_whose_products_are_below_the_range(dtype, length, size):
    v, c = np.full((4, 1), length, dtype), np.full((4, 1), size, dtype)
    np.testing.assert_allclose(orth.householder_apply(v, c), -c, rtol=1e-5)


def test_a_q_of_more_reflections_than_rows(rng):
    v = rng.standard_normal((10, 40))
    tau = 2 / (v * v).sum(0)
    t = np.zeros((40, 40))
    for j in range(40):
        t[:j, j] = -tau[j] * t[:j, :j] @ (v[:, :j].T @ v[:, j])
        t[j, j] = tau[j]
    c = rng.standard_normal((10, 1))
    np.testing.assert_allclose(orth.HouseholderQ(v, tau, t).apply(c), c - v @ (t @ (v.T @ c)), atol=1e-12)


@pytest.mark.parametrize(("m", "k", "count"), [(20_000, 5, 1), (20_000, 40, 3), (300_000, 3, 16)])
def test_reflections_on_vectors_that_leave_the_caches(rng, m, k, count):
    v, c = rng.standard_normal((m, k)) / np.sqrt(m), rng.standard_normal((m, count))
    want = c.copy()
    for j in reversed(range(k)):
        want -= 2 / (v[:, j] @ v[:, j]) * v[:, j, None] * (v[:, j] @ want)
    for put in (np.ascontiguousarray, np.asfortranarray):
        np.testing.assert_allclose(orth.householder_apply(put(v), put(c)), want, atol=1e-13)
