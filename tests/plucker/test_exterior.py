"""Exterior algebra: minors, wedges, relations, bases and complements, against determinants and finite differences."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import subspan
from subspan import grassmann, plucker

DTYPES = [np.float32, np.float64]
SHAPES = [
    (2, 1),
    (2, 2),
    (4, 2),
    (5, 3),
    (8, 3),
    (6, 5),
    (7, 7),
    (10, 4),
    (32, 2),
    (40, 1),
    (12, 10),
    (13, 11),
    (30, 28),
    (20, 20),
]


def eps(dtype):
    return float(np.finfo(dtype).eps)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def minors(A):
    n, k = A.shape[-2:]
    rows = np.array(list(itertools.combinations(range(n), k)))
    return np.linalg.det(A.astype(np.float64)[..., rows, :])


def sizes(A):
    """Products of the lengths of the columns: what an error of a minor is measured by."""
    return np.prod(np.linalg.norm(A.astype(np.float64), axis=-2), axis=-1)[..., None]


# -- coordinates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_coordinates_are_minors(rng, shape, dtype):
    A = rng.standard_normal((3, 7, *shape)).astype(dtype)
    got = plucker.coordinates(A)
    assert got.dtype == dtype
    assert got.shape == (3, 7, math.comb(*shape))
    assert (np.abs(got - minors(A)) <= 4 * shape[1] * eps(dtype) * sizes(A)).all()
    F = np.asfortranarray(A)
    np.testing.assert_array_equal(plucker.coordinates(F), got)
    np.testing.assert_array_equal(plucker.coordinates(A[::-1, :, ::-1].copy()[::-1, :, ::-1]), got)
    out = np.empty((3, 7, 2 * got.shape[-1]), dtype)[..., ::2]
    assert plucker.coordinates(A, out=out) is out
    np.testing.assert_array_equal(out, got)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_of_coordinates(rng, shape):
    A = rng.standard_normal((5, *shape))
    grad = rng.standard_normal((5, math.comb(*shape)))
    got = plucker.coordinates_backward(grad, A)
    d, h = rng.standard_normal(A.shape), 1e-6
    want = (grad * (plucker.coordinates(A + h * d) - plucker.coordinates(A - h * d))).sum((1,)) / (2 * h)
    scale = np.abs(got * d).sum((1, 2)) + 1
    np.testing.assert_allclose((got * d).sum((1, 2)) / scale, want / scale, atol=1e-8)


@pytest.mark.parametrize("k", [3, 13])
def test_columns_of_any_scale(rng, k):
    """Products on the way leave the range where the minor does not."""
    scales = np.resize([1e200, 1e200, 1e-300], k)
    if k == 13:
        scales[-1] = 1e-100
    A = rng.standard_normal((4, k, k))
    want = np.linalg.det(A)[:, None] * (1e100 if k == 3 else 1e300)
    np.testing.assert_allclose(plucker.coordinates(A * scales), want, rtol=1e-11)
    small = np.resize([1e-200, 1e-200, 1e300], k)
    if k == 13:
        small[-1] = 1e100
    np.testing.assert_allclose(
        plucker.coordinates(A * small), np.linalg.det(A)[:, None] * (1e-100 if k == 3 else 1e-300), rtol=1e-11
    )
    other = np.ones(k)
    other[:3] = [1e200, 1e100, 1e-300]
    got = plucker.coordinates_backward(np.ones((4, 1)), A * other)
    plain = plucker.coordinates_backward(np.ones((4, 1)), A)
    np.testing.assert_allclose(got * other, plain, rtol=1e-8)


def test_cofactors(rng):
    """The gradient of a determinant is det(A) inverse(A)ᵀ, and it is finite where there is no inverse."""
    A = rng.standard_normal((20, 5, 5))
    want = np.linalg.det(A)[:, None, None] * np.linalg.inv(A).swapaxes(1, 2)
    np.testing.assert_allclose(plucker.coordinates_backward(np.ones((20, 1)), A), want, atol=1e-11)
    for rank in (4, 3, 0):
        B = rng.standard_normal((5, rank)) @ rng.standard_normal((rank, 5))
        got = plucker.coordinates_backward(np.ones(1), B)
        assert np.isfinite(got).all()
        assert np.linalg.norm(got) > 1e-3 if rank == 4 else np.linalg.norm(got) < 1e-12


@pytest.mark.parametrize(("n", "k"), [(13, 13), (14, 12), (20, 18)])
def test_gradient_through_the_complement_for_any_rank(rng, n, k):
    """Tall matrices with many columns go by QR and SVD: sums of cofactors still, also where all minors are zero."""
    size = 0.0
    for rank in (k, k - 1, k - 2):
        A = rng.standard_normal((3, n, rank)) @ rng.standard_normal((3, rank, k)) / math.sqrt(k)
        grad = rng.standard_normal((3, math.comb(n, k)))
        got = plucker.coordinates_backward(grad, A)
        assert np.isfinite(got).all()
        rows = np.array(list(itertools.combinations(range(n), k)))
        want = np.zeros_like(A)
        for item in range(3):
            for subset, weight in zip(rows, grad[item], strict=True):
                U, s, Vh = np.linalg.svd(A[item, subset])
                others = np.array([np.prod(np.delete(s, i)) for i in range(k)])
                cofactors = np.linalg.det(U) * np.linalg.det(Vh) * (U * others) @ Vh
                want[item, subset] += weight * cofactors
        size = max(size, float(np.abs(want).max()))
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-11 * size)


def test_change_of_basis(rng):
    """p(A M) = det(M) p(A), and exchanging two columns changes the sign."""
    A, M = rng.standard_normal((50, 9, 3)), rng.standard_normal((50, 3, 3))
    np.testing.assert_allclose(
        plucker.coordinates(A @ M), np.linalg.det(M)[:, None] * plucker.coordinates(A), atol=1e-11
    )
    np.testing.assert_allclose(plucker.coordinates(A[..., [1, 0, 2]]), -plucker.coordinates(A), atol=1e-13)


@pytest.mark.parametrize("items", [0, 1, 15, 16, 17, 100])
def test_stacks(rng, items):
    A = rng.standard_normal((items, 6, 3))
    got = plucker.coordinates(A)
    assert got.shape == (items, 20)
    for a, p in zip(A, got, strict=True):
        np.testing.assert_array_equal(plucker.coordinates(a), p)


def test_large_tables_are_refused():
    with pytest.raises(ValueError, match=r"A, shape \(0, 60, 30\): C\(60, 30\)"):
        plucker.coordinates(np.zeros((0, 60, 30)))
    with pytest.raises(ValueError, match="more coordinates than 4 GiB"):
        plucker.coordinates(np.zeros((0, 30, 12)))


# -- wedges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_wedge_of_vectors(rng, dtype):
    z, w = rng.standard_normal((2, 20, 9)).astype(dtype)
    i, j = np.triu_indices(9, 1)
    want = z.astype(float)[:, i] * w.astype(float)[:, j] - z.astype(float)[:, j] * w.astype(float)[:, i]
    got = plucker.wedge(z, w)
    np.testing.assert_allclose(got, want, atol=20 * eps(dtype))
    np.testing.assert_array_equal(plucker.wedge(w, z), -got)
    np.testing.assert_array_equal(plucker.wedge(z, z), 0)
    np.testing.assert_array_equal(got, plucker.coordinates(np.stack([z, w], -1)))
    np.testing.assert_array_equal(plucker.wedge(z[:, None], w[None])[3, 5], plucker.wedge(z[3], w[5]))


@pytest.mark.parametrize("grades", [(1, 1), (2, 1), (1, 2), (2, 2), (3, 2), (0, 2), (1, 0), (0, 0), (4, 4)])
def test_wedge_of_grades(rng, grades):
    """a ∧ b of wedges of vectors is the wedge of all vectors; (-1)^(kl) for the other order; linear; its gradient."""
    n, (k, m) = 7, grades
    A = rng.standard_normal((6, n, k + m))

    def wedged(columns):
        if columns.shape[-1] == 0:
            return np.ones((6, 1))
        return plucker.coordinates(columns) if columns.shape[-1] <= n else np.zeros((6, 0))

    a, b = wedged(A[..., :k]), wedged(A[..., k:])
    got = plucker.wedge(a, b, n=n, grades=grades)
    np.testing.assert_allclose(got, wedged(A), atol=1e-12)
    np.testing.assert_allclose(plucker.wedge(b, a, n=n, grades=(m, k)), (-1) ** (k * m) * got, atol=1e-14)
    grad = rng.standard_normal(got.shape)
    da, db = plucker.wedge_backward(grad, a, b, n=n, grades=grades)
    np.testing.assert_allclose((da * a).sum(-1), (grad * got).sum(-1), atol=1e-11)  # bilinear
    np.testing.assert_allclose((db * b).sum(-1), (grad * got).sum(-1), atol=1e-11)
    other = rng.standard_normal(a.shape)
    np.testing.assert_allclose(
        (da * other).sum(-1), (grad * plucker.wedge(other, b, n=n, grades=grades)).sum(-1), atol=1e-11
    )


def test_wedge_gradients_sum_over_broadcast_axes(rng):
    z, w = rng.standard_normal((4, 1, 5)), rng.standard_normal((3, 5))
    grad = rng.standard_normal((4, 3, 10))
    dz, dw = plucker.wedge_backward(grad, z, w)
    full = plucker.wedge_backward(grad, *(np.ascontiguousarray(np.broadcast_to(x, (4, 3, 5))) for x in (z, w)))
    np.testing.assert_allclose(dz, full[0].sum(1, keepdims=True), atol=1e-14)
    np.testing.assert_allclose(dw, full[1].sum(0), atol=1e-14)


# -- relations ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), [(4, 2), (5, 3), (6, 3), (8, 2), (7, 4), (3, 1), (3, 3), (3, 2)])
def test_relations(rng, n, k):
    A = rng.standard_normal((20, n, k))
    p = plucker.coordinates(A)
    R = plucker.relations(p, n, k)
    assert R.shape == (20, math.comb(n, k - 1), math.comb(n, k + 1))
    assert np.abs(R).max(initial=0) <= 1e-13 * (p**2).sum(-1).max()
    single = plucker.relations(plucker.coordinates(A.astype(np.float32)), n, k)
    assert np.abs(single).max(initial=0) <= 1e-6 * (p**2).sum(-1).max()
    q = rng.standard_normal(p.shape)
    bad = plucker.relations(q, n, k)
    if 2 <= k <= n - 2:
        assert (np.abs(bad).max((1, 2)) > 1e-3).all()
    grad = rng.standard_normal(bad.shape)
    got = plucker.relations_backward(grad, q, n, k)
    np.testing.assert_allclose((got * q).sum(-1), 2 * (grad * bad).sum((1, 2)), atol=1e-10)  # quadratic
    d = rng.standard_normal(q.shape)
    want = (grad * (plucker.relations(q + d, n, k) - plucker.relations(q - d, n, k))).sum((1, 2)) / 2
    np.testing.assert_allclose((got * d).sum(-1), want, atol=1e-10)


def test_three_terms(rng):
    p = rng.standard_normal(6)
    want = p[0] * p[5] - p[1] * p[4] + p[2] * p[3]
    values = plucker.relations(p, 4, 2)
    np.testing.assert_allclose(np.abs(values[np.abs(values) > 0]), abs(want))
    assert (np.abs(values) > 0).any()


def test_mixed_coordinates_are_planes(rng):
    """One wedge a token: what mixing gives is decomposable."""
    p = plucker.mix(rng.standard_normal((30, 7)).astype(np.float32), [1, 2, 4])
    assert np.abs(plucker.relations(p, 7, 2)).max() <= 1e-6


# -- bases -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_basis_inverts_coordinates(rng, shape, dtype):
    A = rng.standard_normal((4, 5, *shape)).astype(dtype)
    p = plucker.coordinates(A)
    U = plucker.basis(p, *shape)
    k = shape[1]
    tolerance = 1e-12 if dtype == np.float64 else 1e-4
    assert np.abs(U.swapaxes(-1, -2) @ U - np.eye(k)).max() <= 10 * eps(dtype) * math.sqrt(k)
    unit = p / np.linalg.norm(p, axis=-1, keepdims=True)
    np.testing.assert_allclose(plucker.coordinates(U), unit, atol=tolerance)
    Q = np.linalg.qr(A.astype(np.float64))[0]
    np.testing.assert_allclose(grassmann.distance(Q, U.astype(np.float64), check=False), 0, atol=100 * tolerance)


@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 2**31), st.booleans())
def test_basis_of_sparse_and_scaled_coordinates(n, k, seed, sparse):
    k = min(n, k)
    rng = np.random.default_rng(seed)
    A = rng.integers(-1, 2, (n, k)).astype(float) if sparse else rng.standard_normal((n, k))
    if np.linalg.matrix_rank(A) < k:
        return
    p = plucker.coordinates(A)
    for scale in (1.0, -1.0, 1e200, 1e-200):
        U = plucker.basis(scale * p, n, k)
        want = np.sign(scale) * p / np.linalg.norm(p)
        np.testing.assert_allclose(plucker.coordinates(U), want, atol=1e-12)


def test_gradient_of_a_basis(rng):
    """Through the projector U Uᵀ, which does not depend on the choice of basis."""
    n, k = 6, 3
    p = plucker.coordinates(rng.standard_normal((8, n, k))) * np.linspace(0.1, 3, 8)[:, None]
    M = rng.standard_normal((8, n, n))
    M += M.swapaxes(1, 2)

    def value(p):
        U = plucker.basis(p, n, k)
        return (U * (M @ U)).sum((1, 2))

    U = plucker.basis(p, n, k)
    got = plucker.basis_backward(2 * M @ U, p, n, k)
    A = plucker.basis(p, n, k)  # a direction that stays among wedges: move the subspace
    d, h = rng.standard_normal(A.shape), 1e-6
    length = np.linalg.norm(p, axis=1)[:, None]
    plus, minus = (length * plucker.coordinates(A + s * h * d) for s in (1, -1))
    want = (value(plus) - value(minus)) / (2 * h)
    np.testing.assert_allclose((got * (plus - minus)).sum(1) / (2 * h), want, atol=1e-6)
    np.testing.assert_allclose((got * p).sum(1), 0, atol=1e-12)


def test_what_spans_nothing(rng):
    p = plucker.coordinates(rng.standard_normal((2, 3, 5, 2)))
    p[1, 2] = 0
    with pytest.raises(ValueError, match=r"p\[1, 2\] is zero or holds NaN"):
        plucker.basis(p, 5, 2)
    with pytest.raises(ValueError, match=r"p\[1, 2\] is zero or holds NaN"):
        plucker.basis_backward(np.ones((2, 3, 5, 2)), p, 5, 2)
    p[1, 2] = np.nan
    with pytest.raises(ValueError, match=r"p\[1, 2\] is zero or holds NaN"):
        plucker.basis(p, 5, 2)
    with pytest.raises(ValueError, match="is no wedge of 2 vectors"):
        plucker.basis(np.array([1.0, 0, 0, 0, 0, 1.0]), 4, 2)
    assert plucker.basis(np.array([1.0, 0, 0, 0, 0, 1e-3]), 4, 2, check=False).shape == (4, 2)


# -- complements -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), [(1, 0), (1, 1), (4, 2), (5, 2), (6, 3), (7, 0), (7, 7), (9, 4)])
def test_complement(rng, n, k):
    signs = plucker.complement_signs(n, k)
    subsets = list(itertools.combinations(range(n), k))
    assert signs.shape == (len(subsets),)
    for subset, sign in zip(subsets, signs, strict=True):
        order = [*subset, *(i for i in range(n) if i not in subset)]
        assert sign == np.linalg.det(np.eye(n)[:, order]).round()
    p = rng.standard_normal((3, len(subsets)))
    dual = plucker.hodge(p, n, k)
    np.testing.assert_allclose(plucker.wedge(p, dual, n=n, grades=(k, n - k))[:, 0], (p**2).sum(1))
    np.testing.assert_array_equal(plucker.hodge(dual, n, n - k), (-1) ** (k * (n - k)) * p)


def test_dual_is_the_orthogonal_complement(rng):
    U = grassmann.random(6, 2, batch=4, rng=0)
    dual = plucker.basis(plucker.hodge(plucker.coordinates(U), 6, 2), 6, 4)
    np.testing.assert_allclose(U.swapaxes(1, 2) @ dual, 0, atol=1e-14)


# -- arguments ---------------------------------------------------------------------------------------------------------


def test_overflow_and_nan(rng):
    A = rng.standard_normal((3, 5, 2))
    A[1, 2, 0] = np.nan
    got = plucker.coordinates(A)
    assert np.isfinite(got[[0, 2]]).all()
    assert np.isnan(got[1]).any()
    with pytest.raises(ValueError, match="a minor overflows"):
        plucker.coordinates(np.full((4, 2), 1e30, np.float32) * rng.standard_normal((4, 2)).astype(np.float32))
    with pytest.raises(ValueError, match="the wedge overflows"):
        plucker.wedge(np.array([1e200, 1.0]), np.array([1.0, 1e200]))


def test_libraries(rng):
    torch = pytest.importorskip("torch")
    A = torch.from_numpy(rng.standard_normal((3, 5, 2)))
    p = plucker.coordinates(A)
    assert isinstance(p, torch.Tensor)
    assert isinstance(plucker.basis(p, 5, 2), torch.Tensor)
    assert isinstance(plucker.hodge(p, 5, 2), torch.Tensor)
    assert isinstance(plucker.relations(p, 5, 2), torch.Tensor)
    with pytest.raises(TypeError, match="requires grad"):
        plucker.coordinates(A.requires_grad_())


def test_threads_do_not_matter(rng):
    A, grad = rng.standard_normal((200, 8, 3)), rng.standard_normal((200, 56))
    before = subspan.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            subspan.set_num_threads(threads)
            p = plucker.coordinates(A)
            R = plucker.relations(p, 8, 3)
            results.append(
                (
                    p,
                    plucker.coordinates_backward(grad, A),
                    plucker.basis(p, 8, 3),
                    plucker.basis_backward(A, p, 8, 3),
                    R,
                    plucker.relations_backward(R, p, 8, 3),
                    *plucker.wedge_backward(np.ones((200, 70)), p, A[:, :, 0], grades=(3, 1)),
                )
            )
    finally:
        subspan.set_num_threads(before)
    for r in results[1:]:
        for a, b in zip(r, results[0], strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("call", ["coordinates", "wedge", "relations", "basis"])
def test_out_must_be_apart(rng, call):
    memory = rng.standard_normal(100)
    if call == "coordinates":
        arguments, out = (memory[:40].reshape(4, 5, 2),), memory[10:50].reshape(4, 10)
    elif call == "wedge":
        arguments, out = (memory[:20].reshape(4, 5), memory[30:50].reshape(4, 5)), memory[40:80].reshape(4, 10)
    elif call == "relations":
        arguments, out = (memory[:10], 5, 2), memory[5:55].reshape(5, 10)
    else:
        arguments, out = (memory[:10], 5, 2), memory[:10].reshape(5, 2)
    with pytest.raises(ValueError, match="out"):
        getattr(plucker, call)(*arguments, out=out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_in_either_precision(rng, dtype):
    """float32 gradients are those of float64, rounded: arithmetic is in double."""
    A, p = rng.standard_normal((20, 6, 3)).astype(dtype), rng.standard_normal((20, 20)).astype(dtype)
    q = plucker.coordinates(A)
    w = rng.standard_normal((20, 6)).astype(dtype)
    R, g = rng.standard_normal((20, 15, 15)).astype(dtype), rng.standard_normal((20, 15)).astype(dtype)
    for call, arguments, rest in (
        (plucker.coordinates_backward, (p, A), {}),
        (plucker.relations_backward, (R, p, 6, 3), {}),
        (plucker.basis_backward, (A, q, 6, 3), {}),
        (plucker.wedge_backward, (g, p, w), {"grades": (3, 1)}),
    ):
        got = call(*arguments, **rest)
        want = call(*(x.astype(np.float64) if isinstance(x, np.ndarray) else x for x in arguments), **rest)
        for x, y in zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]:
            assert x.dtype == dtype
            np.testing.assert_allclose(x, y, rtol=2 * eps(dtype), atol=1e-30)


def test_long_vectors(rng):
    """Tables of pairs are not needed, and a basis of a line is a normalisation."""
    z, w = rng.standard_normal((2, 1500))
    i, j = np.triu_indices(1500, 1)
    np.testing.assert_allclose(plucker.wedge(z, w), z[i] * w[j] - z[j] * w[i], atol=1e-14)
    line = rng.standard_normal(100_000)
    np.testing.assert_allclose(plucker.basis(line, 100_000, 1)[:, 0], line / np.linalg.norm(line), atol=1e-15)


def test_gradients_of_a_basis_that_overflow(rng):
    p = plucker.coordinates(rng.standard_normal((5, 2))) * 1e-309
    with pytest.raises(ValueError, match="gradient of p overflows"):
        plucker.basis_backward(rng.standard_normal((5, 2)), p, 5, 2)


def test_what_is_refused(rng):
    A, p = rng.standard_normal((3, 5, 2)), rng.standard_normal((3, 10))
    for call, error, text in (
        (lambda: plucker.coordinates(A[0, 0]), ValueError, "A must have at least 2 dimensions"),
        (lambda: plucker.coordinates(A.swapaxes(1, 2)), ValueError, "from 1 to 2 columns"),
        (lambda: plucker.coordinates(A[..., :0]), ValueError, "from 1 to 5 columns"),
        (lambda: plucker.coordinates(A.astype(int)), TypeError, "A must be float32 or float64"),
        (lambda: plucker.coordinates(A, out=np.empty((3, 9))), ValueError, "out must have shape"),
        (lambda: plucker.coordinates_backward(p[:2], A), ValueError, r"grad must have shape \(3, 10\)"),
        (lambda: plucker.coordinates_backward(p.astype(np.float32), A), TypeError, "grad must be float64"),
        (lambda: plucker.wedge(p, p[:, :9]), ValueError, r"w must have C\(10, 1\) = 10 entries"),
        (lambda: plucker.wedge(p, p, grades=(2, 2)), ValueError, "n is needed"),
        (lambda: plucker.wedge(p, p, grades=(1, -1)), ValueError, r"grades\[1\] must be at least 0"),
        (lambda: plucker.wedge(p, p, grades=3), TypeError, "grades must be a pair"),
        (lambda: plucker.wedge(p[:2], p), ValueError, "leading axes do not broadcast"),
        (lambda: plucker.wedge(p, p.astype(np.float32)), TypeError, "w must be float64 as z is"),
        (lambda: plucker.wedge_backward(p, p, p), ValueError, "grad must have shape"),
        (lambda: plucker.relations(p, 5, 4), ValueError, "p must have 5 entries"),
        (lambda: plucker.relations(p, 5, 6), ValueError, "k must be at most n"),
        (lambda: plucker.relations(p, 5.0, 2), TypeError, "n must be an integer"),
        (lambda: plucker.relations_backward(p, p, 5, 2), ValueError, r"grad must have shape \(3, 5, 10\)"),
        (lambda: plucker.basis(p[:, :9], 5, 2), ValueError, "p must have 10 entries"),
        (lambda: plucker.basis_backward(p, p, 5, 2), ValueError, r"grad must have shape \(3, 5, 2\)"),
        (lambda: plucker.complement_signs(3, 4), ValueError, "k must be at most n"),
        (lambda: plucker.hodge(p, 5, 1), ValueError, "p must have 5 entries"),
    ):
        with pytest.raises(error, match=text):
            call()


@pytest.mark.parametrize("n", [2, 3, 5, 6, 7])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_wedges_of_short_vectors_in_any_stack(rng, n, dtype):
    i, j = np.triu_indices(n, 1)
    a, b = rng.standard_normal((2, 5, 7, n)).astype(dtype)
    wide = np.empty((5, 7, 2 * n), dtype)
    wide[..., ::2] = a
    for x, y in (
        (a, b),
        (a.swapaxes(0, 1), b.swapaxes(0, 1)),
        (a[:, ::2], b[:, ::2]),
        (wide[..., ::2], b),
        (a[:1, :1], b),
        (a[0, 0], b[0, 0]),
    ):
        want = x[..., i].astype(float) * y[..., j] - x[..., j].astype(float) * y[..., i]
        np.testing.assert_allclose(plucker.wedge(x, y), want, atol=4 * np.finfo(dtype).eps)
        bad = np.broadcast_to(x, np.broadcast_shapes(x.shape, y.shape)).copy()
        bad.reshape(-1)[0] = np.nan
        assert np.isnan(plucker.wedge(bad, y)).any()
