"""Projections, cores, subspace algebra, Haar and Hadamard matrices of subspan.orth."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

import subspan
from references import EPS
from subspan import orth

torch = pytest.importorskip("torch")
DTYPES = [np.float32, np.float64]


def laid_out(rng, shape, dtype, order):
    """Random values in C order, F order, a strided view, or with negative strides."""
    x = rng.standard_normal(shape).astype(dtype)
    if order == "F":
        return np.swapaxes(np.swapaxes(x, -1, -2).copy(), -1, -2)
    if order == "strided":
        big = np.zeros((*shape[:-2], 2 * shape[-2], 3 * shape[-1]), dtype)
        big[..., ::2, ::3] = x
        return big[..., ::2, ::3]
    if order == "reversed":
        return x[..., ::-1, ::-1].copy()[..., ::-1, ::-1]
    if order == "padded":
        big = np.zeros((*shape[:-1], shape[-1] + 3), dtype)
        big[..., 1:-2] = x
        return big[..., 1:-2]
    return x


ORDERS = ["C", "F", "strided", "reversed", "padded"]


def dense_core(M, k):
    M = np.asarray(M, np.float64)
    return M * np.eye(k) if M.ndim == 0 else np.diag(M) if M.ndim == 1 else M


def reference(C, V, M, alpha, side, source=None):
    C, V = np.asarray(C, np.float64), np.asarray(V, np.float64)
    M = dense_core(M, V.shape[-1])
    X = C if source is None else np.asarray(source, np.float64) - C
    t = np.swapaxes(V, -1, -2)
    # The bound: what rounding of every product may add up to.
    a, b, c = np.abs(V), np.abs(M), np.abs(X)
    if side == "left":
        return alpha * C + V @ (M @ (t @ X)), np.abs(C).max(initial=0) + (a @ (b @ (np.abs(t) @ c))).max(initial=0)
    return alpha * C + X @ V @ M @ t, np.abs(C).max(initial=0) + (c @ a @ b @ np.abs(t)).max(initial=0)


# -- apply_core --------------------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**32 - 1),
    m=st.integers(1, 90),
    n=st.integers(1, 120),
    k=st.integers(0, 80),
    batch=st.sampled_from([(), (3,), (2, 2)]),
    shared=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    order=st.sampled_from(ORDERS),
    v_order=st.sampled_from(ORDERS),
    kind=st.sampled_from(["scalar", "diagonal", "full", "stack"]),
    alpha=st.sampled_from([1.0, 0.0, -0.5]),
    side=st.sampled_from(["left", "right"]),
    where=st.sampled_from(["new", "out", "place"]),
    check=st.booleans(),
)
def test_apply_core(seed, m, n, k, batch, shared, dtype, order, v_order, kind, alpha, side, where, check):
    rng = np.random.default_rng(seed)
    C = laid_out(rng, (*batch, m, n), dtype, order)
    V = laid_out(rng, (*(() if shared else batch), m if side == "left" else n, k), dtype, v_order)
    M = {
        "scalar": -0.7,
        "diagonal": rng.standard_normal(k).astype(dtype),
        "full": rng.standard_normal((k, k)).astype(dtype),
        "stack": rng.standard_normal((*batch, k, k)).astype(dtype),
    }[kind]
    want, size = reference(C, V, M, alpha, side)
    out = {"new": None, "out": np.full_like(C, np.nan, order="C"), "place": C}[where]
    got = orth.apply_core(C, V, M, alpha=alpha, side=side, out=out, check=check)
    assert got.dtype == dtype
    assert out is None or got is out
    assert np.abs(got - want).max() <= 10 * EPS[np.dtype(dtype)] * size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("k", [1, 8, 31, 33, 64, 65, 257, 600])
def test_apply_core_beyond_one_block(rng, dtype, side, k):
    """Sizes past every block of the kernels: rows, columns, depth, strips, flushes."""
    for m, n in [(2500, 130), (130, 2500), (700, 700)]:
        C = rng.standard_normal((m, n)).astype(dtype)
        V = rng.standard_normal((m if side == "left" else n, k)).astype(dtype)
        M = rng.standard_normal((k, k)).astype(dtype)
        want, size = reference(C, V, M, 1.0, side)
        for out in (None, C):
            got = orth.apply_core(C.copy() if out is None else C, V, M, side=side, out=out)
            assert np.abs(got - want).max() <= 2 * EPS[np.dtype(dtype)] * size


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (3, 0, 5), (0, 4, 5)])
def test_empty(shape):
    C = np.ones(shape, np.float32)
    for side, at in (("left", -2), ("right", -1)):
        V = np.ones((shape[at], 2), np.float32)
        assert orth.apply_core(C, V, 1.0, side=side).shape == shape
        assert orth.project_out(C, np.zeros((shape[at], 0), np.float32), side=side).shape == shape


def test_no_columns_in_the_basis(rng):
    C = rng.standard_normal((6, 4))
    np.testing.assert_array_equal(orth.project_out(C, np.zeros((6, 0))), C)
    np.testing.assert_array_equal(orth.project(C, np.zeros((6, 0))), 0 * C)
    np.testing.assert_array_equal(orth.apply_core(C, np.zeros((6, 0)), 1.0, alpha=2.0), 2 * C)


BAD = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}


@pytest.mark.parametrize("value", BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("order", ["C", "F", "strided"])
@pytest.mark.parametrize("k", [3, 40])
@pytest.mark.parametrize("where", ["C", "V", "M"])
def test_what_is_not_finite_leaves_c_as_it_was(rng, value, side, order, k, where):
    C = laid_out(rng, (2, 70, 75), np.float64, order)
    V = rng.standard_normal((70 if side == "left" else 75, k))
    M = rng.standard_normal((k, k))
    if where == "C":
        C[1, 69, 74] = value
    else:
        {"V": V, "M": M}[where][-1, 0] = value
    before = C.copy()
    with pytest.raises(ValueError, match=where):
        orth.apply_core(C, V, M, side=side, out=C)
    np.testing.assert_array_equal(C, before)
    if where == "C":  # and without the check NaN goes where it goes in NumPy
        got = orth.apply_core(C, V, M, side=side, check=False)
        assert np.isnan(got).any()
        assert np.isfinite(got[0]).all()


def test_overflowing_products_are_an_error():
    C = np.full((4, 4), 1e30, np.float32)
    with pytest.raises(ValueError, match="overflow"):
        orth.apply_core(C, np.full((4, 2), 1e30, np.float32), 1.0, out=C)
    assert set(C.ravel().tolist()) == {float(np.float32(1e30))}


def test_bad_arguments(rng):
    C, U = rng.standard_normal((6, 5)), orth.random_orthogonal(6, 2, rng=0)
    for kwargs, error, match in [
        ({"side": "up"}, ValueError, "side"),
        ({"out": np.empty((6, 4))}, ValueError, "out"),
        ({"out": np.empty((6, 5), np.float32)}, TypeError, "out"),
        ({"strength": np.nan}, ValueError, "strength"),
    ]:
        with pytest.raises(error, match=match):
            orth.project_out(C, U, **kwargs)
    frozen = C.copy()
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        orth.project_out(C, U, out=frozen)
    with pytest.raises(ValueError, match="rows"):
        orth.project_out(C, U, side="right")
    with pytest.raises(TypeError, match="float32"):
        orth.project_out(C, U.astype(np.float32))
    with pytest.raises(TypeError, match=r"integers|int64"):
        orth.project_out(np.ones((6, 5), int), U)
    np.testing.assert_array_equal(orth.project_out(C, U[:, 0]), orth.project_out(C, U[:, :1]))
    with pytest.raises(ValueError, match="both"):
        orth.project_out(C, (U, U))
    with pytest.raises(TypeError, match="orthonormal must be"):
        orth.project_out(C, U, orthonormal="no")
    with pytest.raises(TypeError, match="strength"):
        orth.project_out(C, U, strength="1")
    with pytest.raises(TypeError, match="masked"):
        orth.project_out(C, U, out=np.ma.array(C, mask=True))
    with pytest.raises(ValueError, match="U must have 6 rows"):
        orth.project_out(C, U[:5])
    with pytest.raises(ValueError, match="M must be"):
        orth.apply_core(C, U, np.ones((3, 3)))
    with pytest.raises(ValueError, match="columns"):
        orth.project_out(C, rng.standard_normal((6, 7)))
    with pytest.raises(ValueError, match="broadcast"):
        orth.project_out(np.ones((2, 6, 5)), np.ones((3, 6, 2)), check=False)
    jax = pytest.importorskip("jax")
    with pytest.raises(TypeError, match="JAX"):
        orth.project_out(C, U, out=jax.numpy.zeros((6, 5)))


def test_overlap(rng):
    A = rng.standard_normal((8, 12))
    U = np.linalg.qr(A[:, :2])[0]
    A[:, :2] = U
    want = A[:, 2:] - U @ (U.T @ A[:, 2:])
    with pytest.raises(ValueError, match="overlaps"):
        orth.project_out(A[:, 2:], A[:, :2], out=A[:, 1:11])
    with pytest.raises(ValueError, match="overlaps"):
        orth.project_out(A[:, :8], A[:, :2], out=A[:, :8])
    # Side by side in one buffer is not an overlap.
    np.testing.assert_allclose(orth.project_out(A[:, 2:], A[:, :2], out=A[:, 2:]), want, atol=1e-14)
    window = np.lib.stride_tricks.sliding_window_view(np.ones(11), 4, writeable=True)
    with pytest.raises(ValueError, match="itself"):
        orth.project_out(np.ones((8, 4)), U, out=window)
    with pytest.raises(ValueError, match=r"broadcast view|overlap|read-only"):
        orth.project_out(np.ones((8, 4)), U, out=np.broadcast_to(np.ones((8, 1)), (8, 4)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_basis_that_is_not_orthonormal_is_found(rng, dtype):
    U = orth.random_orthogonal(200, 20, rng=0, dtype=dtype)
    C = rng.standard_normal((200, 30)).astype(dtype)
    for bad in (U * dtype(1.001), U + dtype(1e-3), rounded_to_bfloat16(U), U[:, [0, 0, *range(2, 20)]]):
        before = C.copy()
        with pytest.raises(ValueError, match="not orthonormal"):
            orth.project_out(C, bad, out=C)
        np.testing.assert_array_equal(C, before)
        orth.project_out(C, bad, check=False)
    orth.project_out(C, U)  # and one that is passes, in any layout
    orth.project_out(C, np.asfortranarray(U))


# -- the table of projections ------------------------------------------------------------------------------------------


def rounded_to_bfloat16(x):
    return torch.from_numpy(np.ascontiguousarray(x)).to(torch.bfloat16).to(torch.from_numpy(x[:1]).dtype).numpy()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), [(4096, 64, 8), (1000, 300, 32), (512, 512, 128), (300, 20, 300), (50, 7, 1)])
def test_project_out_contract(rng, dtype, m, n, k):
    """‖UᵀG'‖ <= 10 eps ‖UᵀG‖, from either side, in place or not."""
    U = orth.random_orthogonal(m, k, rng=1, dtype=dtype)
    G = rng.standard_normal((m, n)).astype(dtype)
    u = U.astype(np.float64)
    bound = 10 * EPS[np.dtype(dtype)] * np.linalg.norm(u.T @ G)
    assert np.linalg.norm(u.T @ orth.project_out(G, U)) <= bound
    T = np.ascontiguousarray(G.T)
    assert orth.project_out(T, U, side="right", out=T) is T
    assert np.linalg.norm(T @ u) <= bound


@pytest.mark.parametrize("kind", ["bfloat16", "int4", "skew", "deficient", "badly scaled"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_project_out_of_any_basis(rng, kind, dtype):
    """The same bound through the Gram core, against the span of what is stored."""
    m, k = 700, 24
    U = orth.random_orthogonal(m, k, rng=1, dtype=dtype)
    basis, dense = U, None
    if kind == "bfloat16":
        basis = rounded_to_bfloat16(U)
    elif kind == "int4":
        basis = orth.quantize_int4(U)
        dense = basis.to_array()
    elif kind == "skew":
        basis = (U @ (np.eye(k) + 0.9 * np.tri(k, k, -1))).astype(dtype)
    elif kind == "deficient":
        basis = np.concatenate([U, U[:, :5] + U[:, 5:10], np.zeros((m, 2), dtype)], axis=1)
        dense = U
    else:
        basis = U * np.logspace(0, 12, k).astype(dtype)
    dense = basis if dense is None else dense
    span = np.linalg.qr(dense.astype(np.float64))[0]
    G = rng.standard_normal((m, 90)).astype(dtype)
    got = orth.project_out(G, basis, orthonormal=False)
    bound = 10 * EPS[np.dtype(dtype)] * np.linalg.norm(span.T @ G)
    if kind == "deficient":  # the span is that of U only to rounding of its sums
        bound *= 10
    assert np.linalg.norm(span.T @ got) <= bound
    right = np.ascontiguousarray(G.T)
    orth.project_out(right, basis, side="right", orthonormal=False, out=right)
    assert np.linalg.norm(right @ span) <= bound
    inside = orth.project(G, basis, orthonormal=False)
    np.testing.assert_allclose(inside + got, G, atol=30 * EPS[np.dtype(dtype)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("items", [(8,), (16,), (37,), (5, 7)])
@pytest.mark.parametrize(("m", "n", "k"), [(8, 1, 1), (1, 8, 1), (5, 3, 2), (16, 16, 2), (7, 9, 5)])
def test_stacks_of_tiny_matrices(rng, dtype, side, items, m, n, k):
    """Items side by side, with the last group not full; each as it is by itself, whatever lies around it."""
    inner = m if side == "left" else n
    k = min(k, inner)
    U = orth.random_orthogonal(inner, k, batch=items, rng=1, dtype=dtype)
    C = rng.standard_normal((*items, m, n)).astype(dtype)
    wide, basis = C.astype(np.float64), U.astype(np.float64)
    along = basis @ (basis.swapaxes(-1, -2) @ wide) if side == "left" else (wide @ basis) @ basis.swapaxes(-1, -2)
    tolerance = 20 * EPS[np.dtype(dtype)] * np.abs(C).max()
    by_columns = np.ascontiguousarray(U.swapaxes(-1, -2)).swapaxes(-1, -2)
    for u in (U, by_columns, np.repeat(U, 2, axis=-1)[..., ::2]):
        np.testing.assert_allclose(orth.project_out(C, u, side=side), wide - along, atol=tolerance)
        np.testing.assert_allclose(orth.project(C, u, side=side), along, atol=tolerance)
    gaps = np.full((*items, m + 1, n + 2), np.nan, dtype)
    gaps[..., :m, :n] = C
    np.testing.assert_allclose(orth.project_out(gaps[..., :m, :n], U, side=side), wide - along, atol=tolerance)
    room = np.full((2, *items, m, n), np.inf, dtype)[0]
    assert orth.project_out(C, U, side=side, out=room) is room
    np.testing.assert_allclose(room, wide - along, atol=tolerance)
    inside = C.copy()
    orth.project_out(inside, U, side=side, out=inside)
    np.testing.assert_array_equal(inside, room)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [False, True])
def test_tiny_stacks_that_are_written_aside(rng, dtype, shared):
    """With |alpha| > 1 the result may overflow: it is made beside C first, which is left as it was where it does."""
    C, V = (
        rng.standard_normal((100, 16, 2)).astype(dtype),
        rng.standard_normal((1 if shared else 100, 16, 2)).astype(dtype),
    )
    V = V[0] if shared else V
    want = 2 * C.astype(np.float64) + 3 * V.astype(np.float64) @ (V.swapaxes(-1, -2).astype(np.float64) @ C)
    got = C.copy()
    assert orth.apply_core(got, V, 3.0, alpha=2.0, out=got) is got
    np.testing.assert_allclose(got, want, atol=200 * EPS[np.dtype(dtype)] * np.abs(want).max())
    wide = np.zeros((100, 17, 2), dtype)[:, :16]
    wide[:] = C
    orth.apply_core(wide, V, 3.0, alpha=2.0, out=wide)
    np.testing.assert_allclose(wide, want, atol=200 * EPS[np.dtype(dtype)] * np.abs(want).max())
    large = np.full_like(C, np.finfo(dtype).max / 100)
    before = large.copy()
    with pytest.raises(ValueError, match="overflow"):
        orth.apply_core(large, V, 1.0, alpha=200.0, out=large)
    np.testing.assert_array_equal(large, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("core", ["scalar", "diagonal", "full"])
@pytest.mark.parametrize(("m", "count", "k"), [(40, 1, 9), (300, 1, 64), (301, 3, 23), (1000, 5, 79), (129, 12, 100)])
def test_few_vectors_on_many_directions(rng, dtype, order, core, m, count, k):
    V = np.asarray(orth.random_orthogonal(m, k, rng=1, dtype=dtype), order=order)
    C = rng.standard_normal((m, count)).astype(dtype)
    M = {"scalar": 0.5, "diagonal": rng.standard_normal(k), "full": rng.standard_normal((k, k))}[core]
    M = M if core == "scalar" else M.astype(dtype)
    full = np.diag(M) if core == "diagonal" else M * np.eye(k) if core == "scalar" else M
    wide, v = C.astype(np.float64), V.astype(np.float64)
    tolerance = 50 * EPS[np.dtype(dtype)] * k**0.5 * np.abs(C).max()
    for alpha in (1.0, 0.0, -2.0):
        want = alpha * wide + v @ (full @ (v.T @ wide))
        np.testing.assert_allclose(orth.apply_core(C, V, M, alpha=alpha), want, atol=tolerance)
        want = alpha * wide.T + (wide.T @ v) @ full @ v.T
        got = orth.apply_core(np.ascontiguousarray(C.T), V, M, alpha=alpha, side="right")
        np.testing.assert_allclose(got, want, atol=tolerance)
    gaps = np.zeros((m, 2 * count), dtype)
    gaps[:, ::2] = C
    got = orth.project_out(gaps[:, ::2], V, out=gaps[:, ::2])
    np.testing.assert_allclose(got, wide - v @ (v.T @ wide), atol=tolerance)
    np.testing.assert_array_equal(gaps[:, 1::2], 0)
    C[m // 2, 0] = np.inf
    with pytest.raises(ValueError, match="C holds NaN"):
        orth.project_out(C, V, out=C)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(10000, 29, 8), (10000, 29, 3), (20000, 70, 4), (3000, 200, 2), (500, 3000, 20)]
)
def test_strided_matrices_on_any_number_of_threads(rng, dtype, side, m, n, k):
    """Pieces are copied, and the way they are summed is that of the whole."""
    C = rng.standard_normal((m, 2 * n)).astype(dtype)[:, ::2]
    V = orth.random_orthogonal(m if side == "left" else n, k, rng=0, dtype=dtype)
    before, found = subspan.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            subspan.set_num_threads(threads)
            found.append(orth.project_out(C, V, side=side, check=False))
    finally:
        subspan.set_num_threads(before)
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


def test_scalars_of_tiny_stacks_come_before_products():
    C, V = np.full((64, 16, 2), 1e20, np.float32), np.full((64, 16, 2), 1e10, np.float32)
    got = orth.apply_core(C, V, 1e-25, alpha=1.0)
    np.testing.assert_allclose(got, orth.apply_core(C[0], V[0], 1e-25, alpha=1.0)[None].repeat(64, 0), rtol=1e-5)
    got = orth.apply_core(np.full_like(C, 1e-20), np.full_like(V, 1e-12), 1e30, alpha=0.0)
    assert (got > 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", [0, 15, 36])
def test_what_tiny_stacks_refuse(rng, dtype, which):
    U = orth.random_orthogonal(6, 2, batch=(37,), rng=1, dtype=dtype)
    C = rng.standard_normal((37, 6, 3)).astype(dtype)
    C[which, 4, 1] = np.nan
    before = C.copy()
    with pytest.raises(ValueError, match="C holds NaN"):
        orth.project_out(C, U, out=C)
    np.testing.assert_array_equal(C, before)
    assert np.isnan(orth.project_out(C, U, check=False)[which]).any()
    assert np.isfinite(np.delete(orth.project_out(C, U, check=False), which, axis=0)).all()
    U[which] *= dtype(1.001)
    with pytest.raises(ValueError, match="not orthonormal"):
        orth.project_out(before, U)
    U[which, 0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        orth.project_out(np.ones((37, 6, 3), dtype), U)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths_of_any_basis_do_not_matter(rng, dtype):
    far = 1e25 if dtype == np.float32 else 1e170
    U = orth.random_orthogonal(60, 4, rng=0)
    G = rng.standard_normal((60, 9)).astype(dtype)
    for s in (far, 1 / far, np.array([1, far, 1 / far, 0.1])):
        basis = (U * s).astype(dtype)
        got = orth.project_out(G, basis, orthonormal=False)
        assert np.linalg.norm(U.T @ got) <= 30 * EPS[np.dtype(dtype)] * np.linalg.norm(U.T @ G)


@pytest.mark.parametrize("small", [1e-3, 1e-5, 1e-8, 1e-11])
def test_nearly_dependent_columns_span_what_they_span(rng, small):
    """Directions far below the root of eps, which a Gram matrix cannot see."""
    W, C = orth.random_orthogonal(64, 4, rng=0), rng.standard_normal((64, 4))
    B = np.concatenate([W[:, :3], W[:, :1] + small * W[:, 3:]], axis=1)
    np.testing.assert_allclose(orth.project_out(C, B, orthonormal=False), C - W @ (W.T @ C), atol=1e-15 / small * 100)


def test_a_stack_of_any_bases_of_different_ranks(rng):
    U = rng.standard_normal((3, 30, 4))
    U[0, :, 1] = U[0, :, 0] * (1 + 1e-6 * rng.standard_normal(30))
    U[1, :, 2] = U[1, :, 3]
    U[2] = 0
    G = rng.standard_normal((3, 30, 5))
    got = orth.project_out(G, U, orthonormal=False)
    want = np.stack([g - u @ (np.linalg.pinv(u) @ g) for g, u in zip(G, U, strict=True)])
    np.testing.assert_allclose(got, want, atol=1e-9)


def test_both_sides_find_errors_first(rng):
    C = rng.standard_normal((6, 5))
    U, W = orth.random_orthogonal(6, 2, rng=0), orth.random_orthogonal(5, 2, rng=1)
    for right, error in [
        (W.astype(np.float32), TypeError),
        (np.broadcast_to(W, (3, 5, 2)), ValueError),
        (orth.random_orthogonal(6, 2, rng=1), ValueError),
        (np.full((5, 2), np.nan), ValueError),
        (2 * W, ValueError),
    ]:
        before = C.copy()
        with pytest.raises(error):
            orth.project_out(C, (U, right), side="both", out=C)
        np.testing.assert_array_equal(C, before)
    stack = np.stack([W, W[:, ::-1]])
    want = (C - U @ (U.T @ C)) @ (np.eye(5) - W @ W.T)
    np.testing.assert_allclose(orth.project_out(C, (U, stack), side="both"), np.stack([want, want]), atol=1e-14)
    with pytest.raises(ValueError, match="pair"):
        orth.project_out(C, U, side="both")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_method_of_the_table(rng, dtype):
    """Equality with the dense formulas."""
    m, n, k = 60, 50, 7
    tol = {"rtol": 0, "atol": 60 * EPS[np.dtype(dtype)]}
    C = rng.standard_normal((m, n)).astype(dtype)
    U, W = (orth.random_orthogonal(s, k, rng=i, dtype=dtype) for i, s in enumerate((m, n)))
    u, w, c = U.astype(float), W.astype(float), C.astype(float)
    left, right = np.eye(m) - u @ u.T, np.eye(n) - w @ w.T
    np.testing.assert_allclose(orth.project_out(C, U), left @ c, **tol)
    np.testing.assert_allclose(orth.project_out(C, W, side="right"), c @ right, **tol)
    np.testing.assert_allclose(orth.project_out(C, (U, W), side="both"), left @ c @ right, **tol)
    place = C.copy()
    assert orth.project_out(place, (U, W), side="both", out=place) is place
    np.testing.assert_allclose(place, left @ c @ right, **tol)
    np.testing.assert_allclose(orth.project_out(C, U, strength=0.3), c - 0.3 * u @ (u.T @ c), **tol)
    np.testing.assert_allclose(orth.project_out(C, U, strength=2), c - 2 * u @ (u.T @ c), **tol)
    np.testing.assert_allclose(orth.project(C, U), u @ (u.T @ c), **tol)
    np.testing.assert_allclose(orth.project(C, (U, W), side="both"), u @ (u.T @ c @ w) @ w.T, **tol)
    # SAFREE: any basis, by its pseudo-inverse.
    E = rng.standard_normal((m, k)).astype(dtype)
    e = E.astype(float)
    np.testing.assert_allclose(orth.project_out(C, E, orthonormal=False), c - e @ np.linalg.pinv(e) @ c, **tol)
    # SAME's curvature hook: alpha = 1/mu, M = diag(1/(S + mu)) - 1/mu; and its router hook, a diagonal on the right.
    s, mu = rng.random(k).astype(dtype), 0.9
    M = (1 / (s + mu) - 1 / mu).astype(dtype)
    want = u @ np.diag(1 / (s + mu)) @ u.T @ c + left @ c / mu
    np.testing.assert_allclose(orth.apply_core(C, U, M, alpha=1 / mu), want, **tol)
    scale = rng.random(k).astype(dtype)
    want = c @ (right + w @ np.diag(scale) @ w.T)
    np.testing.assert_allclose(orth.apply_core(C, W, scale - 1, side="right"), want, **tol)
    # Patching: the coordinates in R come from the source.
    S = rng.standard_normal((m, n)).astype(dtype)
    want = c + (S.astype(float) - c) @ w @ w.T
    np.testing.assert_allclose(orth.swap(C, S, W), want, **tol)
    place = C.copy()
    assert orth.swap(place, S, W, place) is place
    np.testing.assert_allclose(place, want, **tol)
    # HRA's and T-CWY's orthogonal layers: compact WY with -T.
    V = rng.standard_normal((m, k)).astype(dtype)
    v = V / np.linalg.norm(V.astype(float), axis=0)
    H = np.eye(m)
    for j in range(k):
        H = H @ (np.eye(m) - 2 * np.outer(v[:, j], v[:, j]))
    T = np.linalg.inv(0.5 * np.eye(k) + np.triu(v.T @ v, 1))
    np.testing.assert_allclose(np.eye(m) - v @ T @ v.T, H, atol=1e-6)
    np.testing.assert_allclose(orth.householder_apply(V, C), H @ c, **tol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["C", "F", "strided"])
@pytest.mark.parametrize("k", [1, 5, 33, 60])
def test_swap(rng, dtype, order, k):
    base, source = (laid_out(rng, (3, 41, 60), dtype, order) for _ in range(2))
    R = orth.random_orthogonal(60, k, rng=2, dtype=dtype)
    want = base + (source.astype(float) - base) @ R.astype(float) @ R.T.astype(float)
    np.testing.assert_allclose(orth.swap(base, source, R), want, atol=60 * EPS[np.dtype(dtype)])
    mixed = np.ascontiguousarray(source)
    np.testing.assert_allclose(orth.swap(base, mixed, R), want, atol=60 * EPS[np.dtype(dtype)])
    with pytest.raises(ValueError, match="source"):
        orth.swap(base, source[:1], R)
    source[2, 3, 4] = np.nan
    with pytest.raises(ValueError, match="source"):
        orth.swap(base, source, R)


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-4, 1.0, np.pi / 2, 3.1, np.pi - 1e-6])
def test_rotate(rng, angle):
    n = 30
    q = orth.random_orthogonal(n, 2, rng=3)
    s, t = q[:, 0], np.cos(angle) * q[:, 0] + np.sin(angle) * q[:, 1]
    R = orth.rotate(np.eye(n), 3.0 * s, 0.1 * t)
    np.testing.assert_allclose(R.T @ R, np.eye(n), atol=1e-14)
    np.testing.assert_allclose(R @ s, t, atol=1e-14)
    np.testing.assert_allclose(np.trace(R), n - 2 + 2 * np.cos(angle), atol=1e-12)  # the smallest angle that does it
    C = rng.standard_normal((4, n))
    np.testing.assert_allclose(orth.rotate(C, s, t, side="right"), C @ R.T, atol=1e-13)
    with pytest.raises(ValueError, match="opposite"):
        orth.rotate(C, s, -s, side="right")
    with pytest.raises(ValueError, match="zero"):
        orth.rotate(C, 0 * s, s, side="right")


def test_torch_tensors_in_and_out(rng):
    G = torch.randn(40, 30, requires_grad=True)
    U = torch.linalg.qr(torch.randn(40, 4))[0]
    with pytest.raises(TypeError, match="requires grad"):
        orth.project_out(G, U)
    with pytest.raises(ValueError, match="out requires grad"):
        orth.project_out(G.detach(), U, out=G)
    with torch.no_grad():
        got = orth.project_out(G, U)
    assert isinstance(got, torch.Tensor)
    torch.testing.assert_close(got, (G - U @ (U.T @ G)).detach(), atol=1e-5, rtol=0)
    place = G.detach().clone()
    assert orth.project_out(place, U, out=place) is place
    torch.testing.assert_close(place, got)
    # Autograd hears of what is written in place.
    x = torch.ones(4, 2, requires_grad=True) * 1
    z = (x * x).sum()
    orth.project_out(x.detach(), torch.eye(4)[:, :1], out=x.detach())
    with pytest.raises(RuntimeError, match="inplace"):
        z.backward()
    with pytest.raises(ValueError, match="negated"):
        orth.project_out(torch.ones(4, 2), torch.eye(4)[:, :1], out=torch._neg_view(torch.zeros(4, 2)))
    Q, R = orth.householder_qr(G.detach())
    torch.testing.assert_close(Q @ Q.apply(G.detach(), transpose=True), G.detach(), atol=1e-5, rtol=0)
    assert isinstance(R, torch.Tensor)
    torch.testing.assert_close(Q.to_array() @ R, G.detach(), atol=1e-5, rtol=0)
    assert isinstance(orth.complement(U), torch.Tensor)
    assert isinstance(orth.hadamard(torch.ones(4, 8)), torch.Tensor)
    with pytest.raises(TypeError, match="bfloat16"):
        orth.project_out(G.detach().to(torch.bfloat16), U)


def test_jax_arrays(rng):
    jax = pytest.importorskip("jax")
    G = jax.numpy.asarray(rng.standard_normal((8, 6)), jax.numpy.float32)
    U = jax.numpy.linalg.qr(G[:, :2])[0]
    got = orth.project_out(G, U)
    assert isinstance(got, jax.Array)
    np.testing.assert_allclose(got, G - U @ (U.T @ G), atol=1e-5)
    for bits in (None, 4):
        p = orth.GradientProjector(2, bits=bits, rng=0)
        R = p.down(G)
        assert isinstance(R, jax.Array)
        update = p.up(R)
        assert isinstance(update, jax.Array)
        P = np.asarray(p.basis.to_array() if bits else p.basis)
        np.testing.assert_allclose(R, G @ P, atol=1e-4)
        np.testing.assert_allclose(update, R @ P.T, atol=1e-4)


# -- subspace algebra --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 0), (1, 1), (9, 0), (9, 9), (40, 3), (300, 140), (200, 199)])
def test_complement(dtype, n, k):
    U = orth.random_orthogonal(n, k, batch=(2,), rng=0, dtype=dtype)
    W = orth.complement(U)
    assert W.shape == (2, n, n - k)
    both = np.concatenate([U, W], axis=-1).astype(float)
    drift = np.abs(np.swapaxes(both, 1, 2) @ both - np.eye(n)).max(initial=0)
    assert drift <= 10 * EPS[np.dtype(dtype)] * max(n, 1) ** 0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "j", "common"), [(4, 5, 0), (4, 5, 2), (5, 5, 5), (6, 2, 2), (3, 0, 0), (15, 14, 4)])
def test_sum_intersection_containment(dtype, k, j, common):
    n = 25
    eps = EPS[np.dtype(dtype)]
    pool = orth.random_orthogonal(n, k + j - common, batch=(3,), rng=5, dtype=np.float64)
    mix = [orth.random_orthogonal(s, rng=i) for i, s in enumerate((k, j))]
    U = (pool[..., :k] @ mix[0]).astype(dtype)
    W = (pool[..., k - common : k + j - common] @ mix[1]).astype(dtype)
    total = orth.span_sum(U, W)
    assert total.shape == (3, n, k + j - common)
    np.testing.assert_array_equal(total[..., :k], U)
    gram = np.swapaxes(total, -1, -2).astype(float) @ total
    assert np.abs(gram - np.eye(gram.shape[-1])).max(initial=0) <= 20 * eps * n**0.5
    shared = orth.span_intersection(U, W)
    assert shared.shape == (3, n, common)
    for other in (U, W, total):
        assert orth.contains(other, shared).all()
    assert orth.contains(total, U).all()
    assert orth.contains(total, W).all()
    assert (orth.contains(U, W) == (common == j)).all()
    assert (orth.contains(W, U) == (common == k)).all()


def test_short_columns_count_in_containment():
    e = np.eye(4)
    W = np.stack([e[:, 0], 1e-20 * e[:, 1]], axis=1)
    assert not orth.contains(e[:, :1], W)
    assert orth.contains(e[:, :2], W)
    ranks = np.stack([e[:, :2], e[:, [0, 0]]])
    assert orth.contains(e[:, :1], ranks).tolist() == [False, True]


def test_angles_below_the_root_of_eps(rng):
    """The arccos form cannot tell 1e-9 from zero in float64; the sines can."""
    q = orth.random_orthogonal(10, 3, rng=0)
    tilted = np.cos(1e-9) * q[:, :1] + np.sin(1e-9) * q[:, 2:]
    assert orth.span_intersection(q[:, :2], tilted, tol=1e-8).shape == (10, 1)
    assert orth.span_intersection(q[:, :2], tilted, tol=1e-10).shape == (10, 0)
    assert orth.span_sum(q[:, :2], tilted, tol=1e-10).shape == (10, 3)


def test_stacks_of_different_dimensions_are_an_error():
    axes = np.eye(4)
    U = np.stack([axes[:, :2], axes[:, :2]])
    W = np.stack([axes[:, 1:3], axes[:, 2:4]])
    with pytest.raises(ValueError, match="dimensions"):
        orth.span_sum(U, W)
    assert orth.contains(U, U[::-1]).tolist() == [True, True]


def test_composition(rng):
    """Planted links: the dimension is r(V restricted to S) + r(Q) - r(V) reversed, and factors compose to the whole."""
    for trial in range(20):
        r = np.random.default_rng(trial)
        s, p, q = 5, 4, 6
        A, B = r.standard_normal((p, s)), r.standard_normal((q, p))
        U = np.vstack([np.eye(s), A])
        W = np.vstack([np.eye(p), B])
        got = orth.compose(U, W, p)
        assert got.shape == (s + q, s)
        assert orth.contains(got, np.vstack([np.eye(s), B @ A]))
    # Row spaces over S ∪ Q with a link of dimension two, split and glued back together.
    s, q, link = 6, 5, 2
    V = np.vstack([rng.standard_normal((s, 4)), rng.standard_normal((q, 4))])
    V[:s, 2:] = 0  # two vectors on Q alone, two that link
    first = np.block([[V[:s, :2], np.zeros((s, 0))], [np.eye(link)]])
    second = np.block([[np.eye(link), np.zeros((link, 2))], [V[s:, :2], V[s:, 2:]]])
    whole = orth.compose(first, second, link)
    assert whole.shape[1] == 4
    assert orth.contains(whole, V)
    assert orth.compose(np.eye(3)[:, :0], np.eye(3), 2).shape == (2, 1)  # nothing in the first: only what has y = 0
    stack = orth.compose(np.stack([U, U]), W, p)
    np.testing.assert_allclose(np.abs(stack[0].T @ stack[1]), np.abs(np.eye(stack.shape[2])), atol=1e-12)
    assert orth.contains(stack[1], np.vstack([np.eye(5), B @ A]))
    with pytest.raises(ValueError, match="shared"):
        orth.compose(U, W, 99)


# -- orthonormalize ----------------------------------------------------------------------------------------------------


def hard_matrix(rng, m, k, kind, dtype):
    A = rng.standard_normal((m, k))
    tiny = -30 if dtype == np.float64 else -25
    if kind == "graded":
        A *= np.logspace(0, tiny, k)
    elif kind == "graded rows":
        A *= np.logspace(0, tiny, m)[:, None]
    elif kind == "deficient":
        A = A[:, : max(1, k // 2)] @ rng.standard_normal((max(1, k // 2), k))
    elif kind == "zero":
        A[:] = 0
    elif kind == "zero columns":
        A[:, ::2] = 0
    elif kind == "nearly dependent":
        A = A[:, :1] + 1e-6 * A
    elif kind == "ill":
        r = min(m, k)
        u, v = orth.random_orthogonal(m, r, rng=1), orth.random_orthogonal(k, r, rng=2)
        A = (u * np.logspace(0, -14 if dtype == np.float64 else -6, r)) @ v.T
    elif kind == "huge":
        A *= 1e300 if dtype == np.float64 else 1e36
    elif kind == "small":
        A *= 1e-305 if dtype == np.float64 else 1e-37
    elif kind == "hilbert":
        A = 1.0 / (np.arange(m)[:, None] + np.arange(k) + 1.0)
    return A.astype(dtype)


KINDS = [
    "random",
    "graded",
    "graded rows",
    "deficient",
    "zero",
    "zero columns",
    "nearly dependent",
    "ill",
    "huge",
    "small",
]
KINDS.append("hilbert")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["auto", "householder", "polar"])
@pytest.mark.parametrize(("m", "k"), [(1, 1), (30, 30), (200, 17), (400, 140)])
def test_orthonormalize(rng, dtype, kind, method, m, k):
    A = hard_matrix(rng, m, k, kind, dtype)
    before = A.copy()
    Q = orth.orthonormalize(A, method=method)
    np.testing.assert_array_equal(A, before)
    eps = EPS[np.dtype(dtype)]
    q = Q.astype(float)
    assert np.abs(q.T @ q - np.eye(k)).max() <= 10 * eps * k**0.5
    a = A.astype(float)
    a = a / max(np.abs(a).max(), 1e-300)
    assert np.linalg.norm(a - q @ (q.T @ a)) <= 30 * eps * np.linalg.norm(a) * k**0.5
    place = np.asfortranarray(A) if m == 1 else A
    if place.flags.c_contiguous:
        assert orth.orthonormalize(place, method=method, out=place) is place
        np.testing.assert_array_equal(place, Q)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["random", "graded", "ill", "huge", "small"])
@pytest.mark.parametrize(("m", "k"), [(1, 1), (40, 40), (300, 30), (150, 130)])
def test_polar_is_the_nearest(rng, dtype, kind, m, k):
    A = hard_matrix(rng, m, k, "random", dtype)
    if kind == "ill":
        A = (orth.random_orthogonal(m, k, rng=1) * np.logspace(0, -3, k)) @ orth.random_orthogonal(k, rng=2)
        A = A.astype(dtype)
    elif kind != "random":
        A = A * dtype({"graded": 1.0, "huge": 1e30, "small": 1e-30}[kind])
        if kind == "graded":
            A = A * np.logspace(0, -2, k).astype(dtype)
    got = orth.orthonormalize(A, method="polar").astype(float)
    a = A.astype(float) / np.abs(A).max()
    u, s, vt = np.linalg.svd(a, full_matrices=False)
    # The polar factor moves by the perturbation over the least singular values.
    assert np.abs(got - u @ vt).max() <= 40 * EPS[np.dtype(dtype)] * s[0] / s[-1] * k**0.5
    singular = np.linalg.svd(got, compute_uv=False)  # Muon's polynomial leaves these between 0.5 and 1.5
    assert np.abs(singular - 1).max() <= 20 * EPS[np.dtype(dtype)] * k**0.5


@pytest.mark.parametrize("method", ["auto", "cholesky", "householder", "polar"])
def test_rank_deficient(rng, method):
    A = rng.standard_normal((2, 40, 6))
    A[1, :, 4] = A[1, :, :2].sum(-1)
    before = A.copy()
    with pytest.raises(np.linalg.LinAlgError):
        orth.orthonormalize(A, method=method, rank_deficient="raise", out=A[:])
    np.testing.assert_array_equal(A, before)
    orth.orthonormalize(before[:1], method=method, rank_deficient="raise")
    if method == "cholesky":
        with pytest.raises(np.linalg.LinAlgError):
            orth.orthonormalize(np.zeros((5, 2)), method=method)
    # A column that is small but independent is not deficient.
    graded = rng.standard_normal((40, 4)) * [1, 1e-20, 1e10, 1e-100]
    orth.orthonormalize(graded, method="householder", rank_deficient="raise")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_polar_factors_of_wide_matrices(rng, dtype, batch):
    A = rng.standard_normal((*batch, 7, 30)).astype(dtype)
    got = orth.orthonormalize(A, method="polar")
    want = np.swapaxes(orth.orthonormalize(np.swapaxes(A, -1, -2), method="polar"), -1, -2)
    np.testing.assert_allclose(got, want, atol=10 * EPS[np.dtype(dtype)])
    out = A.copy()
    assert orth.orthonormalize(out, method="polar", out=out) is out
    np.testing.assert_array_equal(out, got)


def test_orthonormalize_bad_arguments(rng):
    A = rng.standard_normal((5, 3))
    for kwargs, match in [({"method": "qr"}, "method"), ({"rank_deficient": "maybe"}, "rank_deficient")]:
        with pytest.raises(ValueError, match=match):
            orth.orthonormalize(A, **kwargs)
    with pytest.raises(ValueError, match="orthonormal"):
        orth.orthonormalize(A.T)
    A[2, 1] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        orth.orthonormalize(A)
    assert orth.orthonormalize(np.zeros((5, 0))).shape == (5, 0)
    assert orth.orthonormalize(np.zeros((0, 5, 2))).shape == (0, 5, 2)


# -- Haar and Hadamard -------------------------------------------------------------------------------------------------

ALARM = 1e-6  # false alarms: each statistic below fails for a correct sampler with this probability


def haar_p_values(Q):
    """Entries: (q11² is beta distributed); phases of eigenvalues: tr Q^j is normal, mean 1 for even j, variance j."""
    n = Q.shape[-1]
    P = Q @ Q
    yield scipy.stats.kstest(Q[:, 0, 0] ** 2, scipy.stats.beta(0.5, (n - 1) / 2).cdf).pvalue
    yield scipy.stats.kstest(Q[:, -1, 1] ** 2, scipy.stats.beta(0.5, (n - 1) / 2).cdf).pvalue
    yield scipy.stats.binomtest(int((Q[:, 0, 0] > 0).sum()), len(Q)).pvalue
    for j, power in ((1, Q), (2, P), (3, P @ Q), (4, P @ P)):
        mean = 1.0 if j % 2 == 0 else 0.0
        yield scipy.stats.kstest(np.trace(power, axis1=1, axis2=2), scipy.stats.norm(mean, j**0.5).cdf).pvalue
    yield scipy.stats.binomtest(int((np.linalg.det(Q) > 0).sum()), len(Q)).pvalue


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_orthogonal_is_haar(dtype):
    Q = orth.random_orthogonal(24, batch=(6000,), rng=11, dtype=dtype).astype(np.float64)
    assert min(haar_p_values(Q)) > ALARM
    # The statistics see what leaving the signs as QR gives them does.
    unfixed = np.linalg.qr(np.random.default_rng(0).standard_normal((6000, 24, 24)))[0]
    assert min(haar_p_values(unfixed)) < ALARM


def test_random_orthogonal(rng):
    for n, k in [(0, 0), (1, 1), (5, 0), (7, 3), (150, 140)]:
        U = orth.random_orthogonal(n, k, batch=(2,), rng=3)
        assert U.shape == (2, n, k)
        assert np.abs(np.swapaxes(U, 1, 2) @ U - np.eye(k)).max(initial=0) < 1e-13
    np.testing.assert_array_equal(orth.random_orthogonal(9, 4, rng=1), orth.random_orthogonal(9, 4, rng=1))
    assert np.abs(orth.random_orthogonal(9, 4, rng=1) - orth.random_orthogonal(9, 4, rng=2)).max() > 0.1
    assert {float(x) for x in orth.random_orthogonal(1, batch=(50,), rng=0).ravel()} == {1.0, -1.0}
    for args, error in [((3, 4), ValueError), ((-1,), ValueError), ((2.0,), TypeError)]:
        with pytest.raises(error):
            orth.random_orthogonal(*args)
    with pytest.raises(TypeError, match="dtype"):
        orth.random_orthogonal(3, dtype=int)


LENGTHS = sorted(2**p * m for m in (1, 12, 20, 28, 40) for p in range(10) if 2**p * m <= 1024)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", LENGTHS)
def test_hadamard(rng, n, dtype):
    H = orth.hadamard_matrix(n, dtype)
    assert (np.abs(H) == 1).all()
    np.testing.assert_array_equal(H.astype(float) @ H.T.astype(float), n * np.eye(n))
    if n & (n - 1) == 0:
        np.testing.assert_array_equal(H, scipy.linalg.hadamard(n))
    else:
        m = next(m for m in (12, 20, 28) if n % m == 0 and (n // m) & (n // m - 1) == 0)
        base = orth.hadamard_matrix(m)
        np.testing.assert_array_equal(H, np.kron(base, scipy.linalg.hadamard(n // m)))
    x = rng.standard_normal((2, 3, n)).astype(dtype)
    tol = {"atol": 40 * EPS[np.dtype(dtype)], "rtol": 0}
    h = H.astype(float) / n**0.5
    np.testing.assert_allclose(orth.hadamard(x), x @ h.T, **tol)
    np.testing.assert_allclose(orth.hadamard(x, transpose=True), x @ h, **tol)
    np.testing.assert_allclose(orth.hadamard(orth.hadamard(x), transpose=True), x, **tol)
    strided = laid_out(rng, (5, n), dtype, "strided")
    want = strided @ h.T
    assert orth.hadamard(strided, strided) is strided
    np.testing.assert_allclose(strided, want, **tol)
    place = x.copy()
    assert orth.hadamard(place, place) is place
    np.testing.assert_array_equal(place, orth.hadamard(x))
    f = np.swapaxes(np.ascontiguousarray(np.swapaxes(x, 1, 2)), 1, 2)
    np.testing.assert_allclose(orth.hadamard(f), x @ h.T, **tol)


def test_the_base_matrices_that_are_not_symmetric():
    """A transform that reuses its forward pass for the gradient is wrong for these."""
    symmetric = {m: np.array_equal(orth.hadamard_matrix(m), orth.hadamard_matrix(m).T) for m in (12, 20, 28, 40)}
    assert symmetric == {12: False, 20: False, 28: True, 40: False}


@pytest.mark.parametrize("n", [1 << 14, 1 << 15, 1 << 16, 1 << 17, 1 << 18, 12 << 12, 28 << 10])
def test_long_hadamard(rng, n):
    x = rng.standard_normal((2, n)).astype(np.float32)
    y = orth.hadamard(x)
    np.testing.assert_allclose(np.linalg.norm(y, axis=1), np.linalg.norm(x, axis=1), rtol=1e-5)
    np.testing.assert_allclose(orth.hadamard(y, transpose=True), x, atol=1e-5)
    spike = np.zeros(n)
    spike[n // 3] = 1
    np.testing.assert_array_equal(np.abs(orth.hadamard(spike, scale=1.0)), 1)


def test_hadamard_bad_arguments():
    for n in (0, 3, 6, 10, 36, 44, 52):
        with pytest.raises(ValueError, match="axis"):
            orth.hadamard(np.ones((2, n)))
    x = np.ones((3, 8))
    x[1, 5] = np.inf
    before = x.copy()
    for out in (None, x):
        with pytest.raises(ValueError, match="NaN or infinity"):
            orth.hadamard(x, out)
    np.testing.assert_array_equal(x, before)


# -- runtime -----------------------------------------------------------------------------------------------------------


def test_bit_identical_for_any_number_of_threads(rng):
    before = subspan.get_num_threads()
    C = rng.standard_normal((3, 900, 700)).astype(np.float32)
    U, W = (orth.random_orthogonal(s, 20, rng=0, dtype=np.float32) for s in (900, 700))
    A = rng.standard_normal((50, 64, 16)).astype(np.float32)
    tall = rng.standard_normal((3000, 60)).astype(np.float32)
    B = orth.quantize_int4(orth.random_orthogonal(700, 64, rng=0, dtype=np.float32))
    results = []
    try:
        for n in (1, 2, 3, 5):
            subspan.set_num_threads(n)
            Q, R = orth.householder_qr(A)
            q, r = orth.householder_qr(tall)
            results.append(
                [
                    orth.project_out(C, U),
                    orth.project_out(C, W, side="right"),
                    orth.project_out(C, W, side="right", out=C.copy(), check=False),
                    Q.to_array(),
                    R,
                    q.apply(tall),
                    r,
                    orth.orthonormalize(tall),
                    orth.random_orthogonal(40, 9, batch=(7,), rng=0),
                    orth.hadamard(C[..., :640]),
                    B.apply(C, side="right"),
                    orth.householder_product(tall),
                    orth.householder_product_backward(tall, tall),
                ]
            )
    finally:
        subspan.set_num_threads(before)
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(x, y)


def test_work_memory_is_a_panel(rng):
    """What every call takes beyond its result, in panels of k columns (or rows)."""
    import tracemalloc

    from subspan import _core

    m = n = 1500
    k = 16
    C = rng.standard_normal((m, n)).astype(np.float32)
    out = np.empty_like(C)
    U = orth.random_orthogonal(m, k, rng=0, dtype=np.float32)
    B = orth.quantize_int4(orth.random_orthogonal(m, 128, rng=0, dtype=np.float32))
    panel, slack = 4 * m * k, 256 << 10  # slack: tiles, whatever the sizes are
    V = rng.standard_normal((m, k)).astype(np.float32)
    Q, _ = orth.householder_qr(V)
    strided = np.zeros((2 * m, 2 * n), np.float32)[::2, ::2]
    cases = [
        (lambda: orth.project_out(C, U, out=C), 3),
        (lambda: orth.project_out(C, U, side="right", out=out), 3),
        (lambda: orth.project_out(C, U, side="right", out=C), 4),
        (lambda: orth.project_out(strided, U, out=strided), 12),  # a strip of 2 tiles is copied
        (lambda: orth.swap(C, out, U, C), 4),
        (lambda: orth.householder_apply(V, C, out=C), 5),
        (lambda: Q.apply(C, side="right", out=C), 4),
        (lambda: orth.hadamard(C[:, :1024], out[:, :1024]), 1),
        (lambda: B.apply(C, side="right", out=np.empty((m, 128), np.float32)), 3 * 8),
        (lambda: orth.project_out(C, B, out=out), 3 * 8),
        (lambda: Q.apply(C[None, :, :1].repeat(50, 0)), 3),
        (lambda: orth.householder_qr(V), 3),
        (lambda: orth.orthonormalize(V), 2),
        (lambda: orth.householder_product(V), 3),
        (lambda: orth.householder_product_backward(V, V), 5),
        (lambda: orth.complement(U[:, :4]), 4),
    ]
    for i, (call, panels) in enumerate(cases):
        call()
        tracemalloc.start()
        _core.reset_work_memory_peak()
        call()
        inside = _core.work_memory_peak()
        python = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert inside <= panels * panel + slack, (i, inside / panel)
        assert python <= (8 * panel if i < 11 else 4 * m * m * 1.1) + slack, (i, python)  # results of the last ones
        assert inside < C.nbytes / 2


# -- rank-revealing bases, pivoting, vectors ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("m", "n"), [(30, 8), (8, 30), (12, 12), (1, 5), (5, 1), (0, 4), (4, 0)])
@pytest.mark.parametrize("rank", [0, 1, 3, None])
def test_range_and_null_space(rng, dtype, m, n, rank):
    r = min(m, n) if rank is None else min(rank, m, n)
    a = (rng.standard_normal((2, m, r)) @ rng.standard_normal((2, r, n))).astype(dtype) * dtype(1e-25)
    eps = np.finfo(dtype).eps
    u, w = orth.range_basis(a), orth.null_space(a)
    assert u.shape == (2, m, r)
    assert w.shape == (2, n, n - r)
    for q in (u, w):
        assert (
            np.abs(np.swapaxes(q, 1, 2) @ q - np.eye(q.shape[-1])).max(initial=0)
            <= 10 * eps * max(1, q.shape[-1]) ** 0.5
        )
    size = np.abs(a).max(initial=0) or 1
    assert np.abs(a @ w).max(initial=0) <= 100 * eps * size * max(m, n) ** 0.5
    assert np.abs(a - u @ (np.swapaxes(u, 1, 2) @ a)).max(initial=0) <= 100 * eps * size
    if m and n:
        for x, y in ((u[0], scipy.linalg.orth(a[0] / size)), (w[0], scipy.linalg.null_space(a[0] / size))):
            assert x.shape == y.shape
            assert np.abs(x @ x.T - y @ y.T).max(initial=0) <= 1000 * eps


def test_range_basis_of_a_stack_of_several_ranks_and_rcond(rng):
    a = np.stack([np.eye(4), np.diag([1.0, 1, 0, 0])])
    with pytest.raises(ValueError, match="dimensions"):
        orth.range_basis(a)
    assert orth.range_basis(np.diag([1.0, 1e-3, 1e-6]), rcond=1e-4).shape == (3, 2)
    with pytest.raises(ValueError, match="NaN"):
        orth.null_space(np.full((2, 2), np.nan))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("m", "n"), [(40, 30), (30, 40), (300, 200), (5, 1), (1, 5), (0, 3), (3, 0)])
def test_pivoted_qr(rng, dtype, m, n):
    a = rng.standard_normal((2, m, n)).astype(dtype)
    if n > 5:
        a[:, :, 5] = a[:, :, 1]
    eps = np.finfo(dtype).eps
    q, r, order = orth.householder_qr(a, pivoting=True)
    assert order.shape == (2, n)
    assert (np.sort(order, axis=-1) == np.arange(n)).all()
    moved = np.take_along_axis(a, order[:, None, :], -1)
    assert np.abs(q.to_array() @ r - moved).max(initial=0) <= 30 * eps * max(m, n, 1) ** 0.5 * np.abs(a).max(initial=1)
    assert np.abs(q.apply(moved, transpose=True)[:, : r.shape[1]] - r).max(initial=0) <= 100 * eps * max(m, 1) ** 0.5
    diagonal = np.abs(np.diagonal(r, axis1=1, axis2=2))
    assert (diagonal[:, 1:] <= diagonal[:, :-1] * (1 + 100 * eps)).all()
    if m and n:
        _, want_r, want_order = scipy.linalg.qr(a[0], mode="economic", pivoting=True)
        np.testing.assert_array_equal(order[0], want_order)
        np.testing.assert_allclose(r[0], want_r, atol=30 * eps * m**0.5)


def test_transposed_factors_and_packed_reflections(rng):
    a = rng.standard_normal((3, 20, 6))
    q, _ = orth.householder_qr(a)
    c = rng.standard_normal((3, 20, 4))
    np.testing.assert_array_equal(q.T @ c, q.apply(c, transpose=True))
    np.testing.assert_array_equal(q.T.T @ c, q @ c)
    np.testing.assert_array_equal(q.T.apply(c, transpose=True), q @ c)
    np.testing.assert_array_equal(q.T.to_array(), np.swapaxes(q.to_array(), 1, 2))
    assert "transposed" in repr(q.T)
    packed, tau = (torch.from_numpy(a)).geqrf()
    np.testing.assert_allclose(
        orth.householder_product(packed, tau, packed=True), torch.linalg.householder_product(packed, tau), atol=1e-14
    )


def test_vectors_are_columns_or_rows(rng):
    x, u = rng.standard_normal(20), orth.random_orthogonal(20, 3, rng=0)
    q, _ = orth.householder_qr(rng.standard_normal((20, 5)))
    v = rng.standard_normal((20, 2))
    for f in (
        lambda c, **k: orth.project_out(c, u, **k),
        lambda c, **k: orth.project(c, u, **k),
        lambda c, **k: orth.apply_core(c, u, 0.5, **k),
        lambda c, **k: q.apply(c, **k),
        lambda c, **k: orth.householder_apply(v, c, **k),
    ):
        np.testing.assert_array_equal(f(x), f(x[:, None])[:, 0])
        np.testing.assert_array_equal(f(x, side="right"), f(x[None], side="right")[0])
        out = x.copy()
        assert f(out, out=out) is out
        np.testing.assert_allclose(out, f(x), atol=1e-15)
    np.testing.assert_array_equal(q.T @ x, q.apply(x, transpose=True))


def test_vectors_wherever_a_column_is_meant(rng):
    v, c, g, tau = (rng.standard_normal(s) for s in ((9,), (9,), (9,), (1,)))
    x = np.eye(9)[:, :3]
    # Bases and spans.
    q, rank = orth.orthonormalize(v, return_rank=True)
    np.testing.assert_allclose(np.abs(q @ v), np.linalg.norm(v), rtol=1e-14)
    assert q.shape == (9,)
    assert rank == 1
    out = np.empty(9)
    assert orth.orthonormalize(v, out=out) is out
    np.testing.assert_array_equal(out, q)
    assert orth.contains(x, x[:, 1])
    assert not orth.contains(x, v)
    assert orth.contains(q, 3 * v)
    assert orth.contains(x, x[:, 1]).shape == ()
    assert orth.span_sum(x, q).shape == (9, 4)
    assert orth.span_sum(q, x).shape == (9, 4)
    assert orth.span_intersection(x, x[:, 2]).shape == (9, 1)
    # Gradients of reflections.
    for t in (None, tau):
        whole = orth.householder_product_backward(g[:, None], v[:, None], t)
        for grad in (g, g[:, None]):
            found = orth.householder_product_backward(grad, v, t)
            for a, b in zip(*((y,) if t is None else y for y in (found, whole)), strict=True):
                np.testing.assert_array_equal(a, b.reshape(a.shape))
            assert (found if t is None else found[0]).shape == (9,)
        for side in ("left", "right"):
            for transpose in (False, True):
                options = {"side": side, "transpose": transpose}
                wide = [y[:, None] if side == "left" else y[None] for y in (g, c)]
                dv, dc, *rest = orth.householder_apply_backward(g, v, c, t, **options)
                want_v, want_c, *want = orth.householder_apply_backward(wide[0], v[:, None], wide[1], t, **options)
                np.testing.assert_array_equal(dv, want_v[:, 0])
                np.testing.assert_array_equal(dc, want_c.reshape(-1))
                assert all(np.array_equal(a, b) for a, b in zip(rest, want, strict=True))
                assert dv.shape == dc.shape == (9,)
    dv, dc = orth.householder_apply_backward(torch.from_numpy(g), torch.from_numpy(v), torch.from_numpy(c))
    assert isinstance(dv, torch.Tensor)
    assert dv.shape == dc.shape == (9,)


def test_vectors_meet_stacks_of_bases(rng):
    u = np.stack([orth.random_orthogonal(20, 3, rng=i) for i in range(5)])
    q, _ = orth.householder_qr(rng.standard_normal((2, 5, 20, 4)))
    v = rng.standard_normal((5, 20, 2))
    x, y = rng.standard_normal((2, 20))
    cases = {
        "project_out": (lambda c, **k: orth.project_out(c, u, **k), (5, 20)),
        "project": (lambda c, **k: orth.project(c, u, **k), (5, 20)),
        "apply_core": (lambda c, **k: orth.apply_core(c, u, 0.5, **k), (5, 20)),
        "householder_apply": (lambda c, **k: orth.householder_apply(v, c, **k), (5, 20)),
        "Q.apply": (lambda c, **k: q.apply(c, **k), (2, 5, 20)),
    }
    for f, shape in cases.values():
        for side in ("left", "right"):
            found = f(x, side=side)
            assert found.shape == shape
            wide = f(x[:, None] if side == "left" else x[None], side=side)
            np.testing.assert_array_equal(found, wide[..., 0] if side == "left" else wide[..., 0, :])
            out = np.empty(shape)
            assert f(x, side=side, out=out) is out
            np.testing.assert_array_equal(out, found)
            np.testing.assert_array_equal(f(x.tolist(), side=side), found)
    found = orth.swap(x, y, u)
    np.testing.assert_allclose(found, [x + (y - x) @ b @ b.T for b in u], atol=1e-14)
    np.testing.assert_array_equal(orth.swap(x.tolist(), y.tolist(), u), found)


@pytest.mark.parametrize("size", [1e308, 1e200, 1.0, 1e-200, 1e-300, 1e-310, 5e-324])
def test_reflections_of_any_length(rng, size):
    v = rng.uniform(0.5, 1, (7, 3)) if size > 1e-300 else rng.integers(1, 5, (7, 3)).astype(np.float64)
    scaled = v * size
    v = scaled / size if size > 1e-300 else np.round(scaled / 5e-324)  # what is left of it
    np.testing.assert_allclose(
        orth.householder_apply(scaled, np.eye(7)), orth.householder_apply(v, np.eye(7)), atol=1e-14
    )
    np.testing.assert_allclose(orth.householder_product(scaled), orth.householder_product(v), atol=1e-14)


def test_vectors_and_convolutions_meet_packed_bases(rng):
    basis = orth.quantize_int4(rng.standard_normal((12, 5)))
    u = basis.to_array()
    for transpose, side, n in ((False, "left", 5), (True, "left", 12), (False, "right", 12), (True, "right", 5)):
        x = rng.standard_normal(n)
        matrix = u.T if transpose else u
        want = matrix @ x if side == "left" else x @ matrix
        np.testing.assert_allclose(basis.apply(x, side=side, transpose=transpose), want, atol=1e-13)
        out = np.empty(want.shape)
        assert basis.apply(x, side=side, transpose=transpose, out=out) is out
        with pytest.raises(ValueError, match=rf"X must have {n} (rows|columns)"):
            basis.apply(np.ones((3, 4)), side=side, transpose=transpose)
    v = rng.standard_normal(12)
    np.testing.assert_array_equal(orth.quantize_int4(v).to_array(), orth.quantize_int4(v[:, None]).to_array())
    tau = np.array([0.7])
    np.testing.assert_array_equal(
        orth.householder_product(v, tau, packed=True), orth.householder_product(v[:, None], tau, packed=True)
    )
    with pytest.raises(ValueError, match=r"flatten\(1\)"):
        basis.apply(np.ones((12, 4, 3, 3)), transpose=True)
    with pytest.raises(TypeError, match="transpose must be True or False"):
        basis.apply(np.ones(5), transpose=1)


def test_orthonormalize_tells_the_rank(rng):
    a = rng.standard_normal((4, 9, 5))
    a[1, :, 3] = a[1, :, 0]
    a[2] = 0
    for method in ("auto", "householder", "polar"):
        q, rank = orth.orthonormalize(a, method=method, return_rank=True)
        np.testing.assert_array_equal(rank, [5, 4, 0, 5])
        assert q.shape == a.shape
    assert orth.orthonormalize(a[0], return_rank=True)[1] == 5


@pytest.mark.parametrize("k", [40, 130])
@pytest.mark.parametrize("sigma", [14.0, 18.0, 30.0, 1e6])
def test_polar_factors_with_one_direction_far_above_the_others(k, sigma):
    """Along the difference of two columns, which a regular start of the power method has nothing of."""
    v = np.zeros(k)
    v[[0, 7]] = 0.5**0.5, -(0.5**0.5)
    A = np.vstack([np.linalg.cholesky(np.eye(k) + (sigma**2 - 1) * np.outer(v, v)).T, np.zeros((k, k))])
    u, _, vt = np.linalg.svd(A, full_matrices=False)
    np.testing.assert_allclose(orth.orthonormalize(A, method="polar"), u @ vt, atol=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("m", "k"), [(m, k) for m in (1, 3, 12, 13, 64, 130, 515) for k in range(1, min(m, 12) + 1)])
def test_factors_of_a_few_columns(rng, dtype, m, k):
    """Down the columns, whatever the order of memory: factors, Q, signs, dependent columns and extreme scales."""
    eps = float(np.finfo(dtype).eps)
    A = rng.standard_normal((5, m, k)).astype(dtype)
    A[1] *= dtype(1e-30)
    A[2] *= dtype(1e30)
    A[3, :, k // 2] = 0
    for x in (A, np.ascontiguousarray(A.swapaxes(1, 2)).swapaxes(1, 2), np.repeat(A, 2, 2)[:, :, ::2]):
        Q, R = orth.householder_qr(x)
        q = Q.to_array().astype(float)
        size = np.abs(x).max((1, 2), keepdims=True).astype(float) * np.sqrt(m)
        assert (np.abs(q @ R.astype(float) - x) <= 20 * k * eps * size).all()
        assert np.abs(q.swapaxes(1, 2) @ q - np.eye(k)).max() < 20 * eps * np.sqrt(k)
        assert (np.tril(R, -1) == 0).all()
        got = orth.orthonormalize(x[:3]).astype(float)
        assert np.abs(got.swapaxes(1, 2) @ got - np.eye(k)).max() < 20 * eps * np.sqrt(k)
        signs = np.sign(np.einsum("ijj->ij", R[:3]))[:, None]
        np.testing.assert_allclose(got, q[:3] * signs, atol=40 * eps * np.sqrt(k))
    same = orth.orthonormalize(np.asfortranarray(A[0]))
    np.testing.assert_allclose(same, orth.orthonormalize(A[0]), atol=20 * eps)


@pytest.mark.parametrize("cols", [1, 7, 16, 33, 65, 200])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_columns_leave_alpha_c(rng, cols, side, dtype):
    c = rng.standard_normal((3, 9, cols)).astype(dtype)
    v = np.empty((9 if side == "left" else cols, 0), dtype)
    for out in (None, np.full_like(c, 7)):
        np.testing.assert_array_equal(orth.project_out(c, v, side=side, out=out), c)
        np.testing.assert_array_equal(orth.apply_core(c, v, 2.0, alpha=0.5, side=side), dtype(0.5) * c)
