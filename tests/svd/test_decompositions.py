"""truncated_svd, product_svd, merge_svd, FrequentDirections, choose_rank."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse
from scipy.sparse.linalg import LinearOperator, aslinearoperator

import subspan
from references import EPS, orthogonality, orthonormal, subspace_distance
from subspan.svd import FrequentDirections, StreamingSVD, choose_rank, merge_svd, product_svd, truncated_svd

DTYPES = [np.float32, np.float64]


def matrix(rng, m, n, s, dtype=np.float64):
    k = len(s)
    return ((orthonormal(rng, m, k) * s) @ orthonormal(rng, n, k).T).astype(dtype)


def assert_triplet(d, a, k, tol):
    a = np.asarray(a, dtype=np.float64)
    assert d.U.shape == (a.shape[0], k)
    assert d.S.shape == (k,)
    assert d.Vh.shape == (k, a.shape[1])
    assert orthogonality(np.ascontiguousarray(d.U.T)) <= 1
    assert orthogonality(d.Vh) <= 1
    assert np.all(np.diff(d.S) <= 0)
    want = np.linalg.svd(a, compute_uv=False)
    assert np.abs(d.S - want[:k]).max() <= tol * want[0]
    rest = want[k] if k < want.size else 0.0
    assert np.linalg.norm(a - (d.U * d.S) @ d.Vh, 2) <= rest * 1.05 + 3 * tol * want[0]


# -- truncated_svd -----------------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**32 - 1),
    m=st.integers(1, 130),
    n=st.integers(1, 130),
    k=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    order=st.sampled_from("CF"),
)
def test_truncated_svd_of_low_rank_matrices(seed, m, n, k, dtype, order):
    rng = np.random.default_rng(seed)
    k = min(k, m, n)
    a = np.asarray(matrix(rng, m, n, np.logspace(0, -2, k), dtype), order=order)
    assert_triplet(truncated_svd(a, k, rng=seed), a, k, 30 * EPS[np.dtype(dtype)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_truncated_svd_of_a_falling_spectrum(rng, dtype):
    a = matrix(rng, 300, 200, 0.8 ** np.arange(100), dtype)
    assert_triplet(truncated_svd(a, 12, power_iterations=3, rng=0), a, 12, 1e-4)
    assert_triplet(truncated_svd(a.T, 12, power_iterations=3, rng=0), a.T, 12, 1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_spectrum_to_working_precision(rng, dtype):
    """Small singular values keep an absolute error of eps s_1: no square of the spectrum is formed."""
    a = matrix(rng, 200, 150, np.logspace(0, -6, 13), dtype)
    d = truncated_svd(a, 13, rng=0)
    assert np.abs(d.S - np.logspace(0, -6, 13)).max() <= 20 * EPS[np.dtype(dtype)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rank_deficient_and_zero(rng, dtype):
    a = matrix(rng, 60, 50, [3.0, 1.0], dtype)
    d = truncated_svd(a, 6, rng=0)
    np.testing.assert_allclose(d.S, [3, 1, 0, 0, 0, 0], atol=1e-5)
    assert orthogonality(d.Vh) <= 1
    assert orthogonality(np.ascontiguousarray(d.U.T)) <= 1
    z = truncated_svd(np.zeros((7, 5), dtype), 3, rng=0)
    np.testing.assert_array_equal(z.S, 0)
    assert orthogonality(z.Vh) <= 1


def test_energy_and_tol_choose_the_rank(rng):
    s = 0.7 ** np.arange(60)
    a = matrix(rng, 120, 90, s)
    share = np.cumsum(s**2) / np.sum(s**2)
    for energy in (0.5, 0.9, 0.999, 0.999999):
        d = truncated_svd(a, energy=energy, rng=0, power_iterations=4)
        assert d.S.size == int(np.searchsorted(share, energy)) + 1
    assert truncated_svd(a, tol=1e-3, rng=0, power_iterations=4).S.size == np.count_nonzero(s >= 1e-3)
    assert truncated_svd(a, 4, energy=0.999999, rng=0).S.size == 4
    flat = truncated_svd(np.eye(40), energy=0.999, rng=0)
    assert flat.S.size == 40


def test_sparse_and_operators_agree_with_dense(rng):
    a = sparse.random_array((200, 120), density=0.1, format="csr", rng=rng)
    want = truncated_svd(a.toarray(), 5, rng=3)
    for other in (a, a.tocsc(), sparse.csr_matrix(a), aslinearoperator(a), aslinearoperator(a.toarray())):
        got = truncated_svd(other, 5, rng=3)
        np.testing.assert_allclose(got.S, want.S, rtol=1e-9)
        np.testing.assert_allclose(got.Vh, want.Vh, atol=1e-8)
        np.testing.assert_allclose(got.U, want.U, atol=1e-8)
    single = truncated_svd(a.astype(np.float32), 5, rng=3)
    assert single.S.dtype == np.float32


@pytest.mark.parametrize(
    ("dtype", "scale"), [(np.float32, 1e25), (np.float32, 1e-25), (np.float64, 1e170), (np.float64, 1e-170)]
)
def test_truncated_svd_at_extreme_scales(rng, dtype, scale):
    a = matrix(rng, 50, 40, [3.0, 2, 1, 0.5], dtype)
    big = (a.astype(np.float64) * scale).astype(dtype)
    for x in (big, sparse.csr_array(big)):
        d = truncated_svd(x, 4, rng=0)
        np.testing.assert_allclose(d.S.astype(np.float64) / scale, [3, 2, 1, 0.5], rtol=1e-5)
        assert orthogonality(d.Vh) <= 1


def test_operator_errors():
    class Wrong:
        shape = (5, 4)

        def matmat(self, x):
            return np.zeros((3, x.shape[1]))

        rmatmat = matmat

    with pytest.raises(ValueError, match=r"A.matmat must return shape \(5, 4\)"):
        truncated_svd(Wrong(), 2)
    nan = LinearOperator((5, 4), matvec=lambda x: np.full(5, np.nan), rmatvec=lambda x: np.zeros(4), dtype=np.float64)
    with pytest.raises(ValueError, match="NaN"):
        truncated_svd(nan, 2)
    boom = LinearOperator((5, 4), matvec=lambda x: 1 / 0, rmatvec=lambda x: x, dtype=np.float64)
    with pytest.raises(ZeroDivisionError):
        truncated_svd(boom, 2)
    with pytest.raises(ValueError, match="energy"):
        truncated_svd(aslinearoperator(np.eye(4)), energy=0.9)


def test_warm_start(rng):
    s = 0.95 ** np.arange(100)
    a = matrix(rng, 200, 150, s)
    nearby = a + 1e-4 * rng.standard_normal(a.shape) / 15
    start = truncated_svd(a, 10, power_iterations=8, rng=0).Vh
    best = truncated_svd(nearby, 10, power_iterations=12, rng=0)
    cold = truncated_svd(nearby, 10, oversample=0, power_iterations=0, rng=0)
    warm = truncated_svd(nearby, 10, oversample=0, power_iterations=0, initial=start, rng=0)
    assert subspace_distance(warm.Vh, best.Vh[:8]) < 0.1 * subspace_distance(cold.Vh, best.Vh[:8])
    with pytest.raises(ValueError, match="initial must have 150 columns"):
        truncated_svd(a, 3, initial=np.ones((2, 3)))
    with pytest.raises(TypeError, match="initial must be float64"):
        truncated_svd(a, 3, initial=start.astype(np.float32))


def test_rng_is_reproducible_and_independent_of_threads(rng):
    a = rng.standard_normal((300, 257))
    before = subspan.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        subspan.set_num_threads(threads)
        results.append(truncated_svd(a, 9, rng=5))
    subspan.set_num_threads(before)
    for r in results[1:]:
        for x, y in zip(results[0], r, strict=True):
            np.testing.assert_array_equal(x, y)
    other = truncated_svd(a, 9, rng=np.random.default_rng(6))
    assert not np.array_equal(other.S, results[0].S)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: truncated_svd(np.eye(3)), "one of rank, energy and tol"),
        (lambda: truncated_svd(np.eye(3), 4), r"rank must be in \[1, 3\], got 4"),
        (lambda: truncated_svd(np.eye(3), 0), "rank must be at least 1"),
        (lambda: truncated_svd(np.eye(3), 2**70), "rank must be at most .* got 11805"),
        (lambda: StreamingSVD(2**70), "rank must be at most .* got 11805"),
        (lambda: truncated_svd(np.eye(3), 1, oversample=-1), "oversample"),
        (lambda: truncated_svd(np.eye(3), 1, power_iterations=-1), "power_iterations"),
        (lambda: truncated_svd(np.full((3, 3), np.nan), 1), "A must be finite, got NaN in row 0, column 0"),
        (lambda: truncated_svd(np.ones(3), 1), "A must have 2 dimensions"),
        (lambda: truncated_svd(np.eye(3), energy=1.5), "energy"),
        (lambda: truncated_svd(np.eye(3), tol=2.0), "tol"),
        (lambda: truncated_svd(np.ones((0, 3)), 1), "at least one row"),
        (lambda: product_svd(np.eye(3), np.eye(4)), "B must have 3 rows"),
        (lambda: product_svd(np.eye(3), np.eye(3), 4), r"rank must be in \[1, 3\]"),
        (lambda: product_svd(np.eye(3), np.full((3, 3), np.inf)), "B must be finite, got infinity"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# -- product_svd, merge_svd --------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**32 - 1),
    m=st.integers(1, 60),
    p=st.integers(1, 60),
    n=st.integers(1, 60),
    dtype=st.sampled_from(DTYPES),
)
def test_product_svd(seed, m, p, n, dtype):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((m, p)).astype(dtype), rng.standard_normal((p, n)).astype(dtype)
    k = min(m, p, n)
    product = a.astype(np.float64) @ b.astype(np.float64)
    scale = np.linalg.norm(a, 2) * np.linalg.norm(b, 2) / np.linalg.norm(product, 2)
    assert_triplet(product_svd(a, b), product, k, 30 * EPS[np.dtype(dtype)] * scale)
    assert product_svd(a, b, 1).S.shape == (1,)


def test_product_svd_of_dependent_columns(rng):
    a = np.repeat(rng.standard_normal((50, 1)), 4, axis=1)
    d = product_svd(a, rng.standard_normal((4, 30)))
    assert np.all(d.S[1:] <= 1e-12 * d.S[0])
    assert orthogonality(d.Vh) <= 1
    assert orthogonality(np.ascontiguousarray(d.U.T)) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [25, 300])
def test_merge_svd(rng, dtype, n):
    a, b = matrix(rng, 60, n, 0.5 ** np.arange(8), dtype), matrix(rng, 40, n, 0.6 ** np.arange(9), dtype)
    da, db = truncated_svd(a, 8, rng=0), truncated_svd(b, 9, rng=0)
    both = np.vstack([a, b])
    assert_triplet(merge_svd(da, db, 17), both, 17, 50 * EPS[np.dtype(dtype)])
    d = merge_svd((None, da.S, da.Vh), (None, db.S, db.Vh), 5)
    assert d.U is None
    np.testing.assert_allclose(d.S, np.linalg.svd(both, compute_uv=False)[:5], rtol=1e-4)
    with pytest.raises(ValueError, match="both decompositions or in neither"):
        merge_svd(da, (None, db.S, db.Vh), 5)
    with pytest.raises(ValueError, match="columns"):
        merge_svd(da, (db.U, db.S, db.Vh[:, :-1]), 5)
    with pytest.raises(ValueError, match="rank must be in"):
        merge_svd(da, db, 18)


# -- FrequentDirections ------------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 60),
    size=st.integers(1, 20),
    rows=st.integers(1, 120),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_frequent_directions_guarantee(seed, n, size, rows, dtype, data):
    """0 <= AᵀA - BᵀB <= error_bound <= ‖A - A_k‖² / (size - k), after every block."""
    rng = np.random.default_rng(seed)
    a = (rng.standard_normal((rows, n)) * 0.9 ** np.arange(n)).astype(dtype)
    fd = FrequentDirections(size, n)
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), max_size=5)))
    seen = 0
    for block in np.split(a, cuts):
        if not block.shape[0]:
            continue
        fd.update(block)
        seen += block.shape[0]
        part = a[:seen].astype(np.float64)
        b = fd.sketch.astype(np.float64)
        assert b.shape == (size, n)
        gap = np.linalg.eigvalsh(part.T @ part - b.T @ b)
        slack = 200 * EPS[np.dtype(dtype)] * np.sum(part**2)
        assert gap[0] >= -slack
        assert gap[-1] <= fd.error_bound + slack
        squares = np.linalg.svd(part, compute_uv=False) ** 2
        for k in range(min(size, squares.size)):
            assert fd.error_bound <= squares[k:].sum() / (size - k) + slack
    assert fd.rows_seen == rows
    assert fd.squared_norm == pytest.approx(np.sum(a.astype(np.float64) ** 2))


def test_frequent_directions_keeps_the_rows_since_the_last_shrink(rng):
    """A sketch of 10 after 19 rows of rank 9 is exact."""
    a = rng.standard_normal((19, 9)) @ rng.standard_normal((9, 50))
    fd = FrequentDirections(10, 50).update(a)
    np.testing.assert_allclose(fd.sketch.T @ fd.sketch, a.T @ a, atol=1e-9)
    assert fd.error_bound <= 1e-8


def test_frequent_directions_merge_sparse_pickle(rng):
    a = sparse.random_array((200, 40), density=0.2, format="csr", rng=rng)
    parts = [FrequentDirections(8, 40).update(x) for x in (a[:70], a[70:150], a[150:].toarray())]
    copy = pickle.loads(pickle.dumps(parts[0]))
    np.testing.assert_array_equal(copy.sketch, parts[0].sketch)
    whole = parts[0].merge(parts[1]).merge(parts[2])
    dense = a.toarray()
    gap = np.linalg.eigvalsh(dense.T @ dense - whole.sketch.T @ whole.sketch)
    assert gap[0] >= -1e-9
    assert gap[-1] <= whole.error_bound * (1 + 1e-9)
    assert whole.rows_seen == 200
    assert "200 rows" in repr(whole)


def test_frequent_directions_errors(rng):
    with pytest.raises(ValueError, match="size"):
        FrequentDirections(0, 4)
    with pytest.raises(ValueError, match="n_features"):
        FrequentDirections(4, 0)
    single = FrequentDirections(2, 4).update(np.ones((3, 4), np.float32))
    with pytest.raises(ValueError, match="overflows"):
        single.update(np.full((9, 4), 3e38, np.float32))
    assert (single.rows_seen, single.squared_norm) == (3, 12.0)
    fd = FrequentDirections(3, 4).update(rng.standard_normal((5, 4)))
    before = fd.sketch
    for bad, error, message in [
        (np.full((2, 4), np.nan), ValueError, "NaN"),
        (np.ones((2, 5)), ValueError, "4 columns"),
        (np.ones((0, 4)), ValueError, "empty"),
        (np.ones((2, 4), np.float32), TypeError, "as the sketch is"),
    ]:
        with pytest.raises(error, match=message):
            fd.update(bad)
    np.testing.assert_array_equal(fd.sketch, before)
    with pytest.raises(ValueError, match="columns"):
        fd.merge(FrequentDirections(3, 5).update(np.ones((1, 5))))


# -- choose_rank -------------------------------------------------------------------------------------------------------


def test_choose_rank_by_energy_and_threshold():
    s = [4.0, 2.0, 1.0, 0.5]
    assert choose_rank(s, energy=16 / 21.25) == 1
    assert choose_rank(s, energy=0.99) == 4
    assert choose_rank(s, energy=0.95) == 3
    assert choose_rank(s, energy=1.0) == 4
    assert choose_rank(s, threshold=0.3) == 2
    assert choose_rank([], energy=0.9) == 0
    assert choose_rank([0.0, 0.0], threshold=0.1) == 0


@pytest.mark.parametrize("rule", ["gavish-donoho", "marchenko-pastur"])
@pytest.mark.parametrize("shape", [(400, 400), (600, 200), (150, 500)])
@pytest.mark.parametrize("known", [True, False])
def test_choose_rank_finds_planted_signals(rng, rule, shape, known):
    m, n = shape
    sigma = 0.3
    signal = np.array([9.0, 7, 5, 4]) * sigma * np.sqrt(max(m, n))
    a = matrix(rng, m, n, signal) + sigma * rng.standard_normal(shape)
    s = np.linalg.svd(a, compute_uv=False)
    assert choose_rank(s, rule=rule, shape=shape, noise=sigma if known else None) == 4


def test_gavish_donoho_constants():
    """Square matrices: 4/sqrt(3) with known noise, 2.858 times the median without (their table IV)."""
    s = np.linspace(2, 0.5, 101)
    n = 101
    noise = 1.5 / (4 / np.sqrt(3) * np.sqrt(n))
    assert choose_rank(s, rule="gavish-donoho", shape=(n, n), noise=noise) == np.count_nonzero(s > 1.5)
    for beta, cut, close in ((1.0, 2.858, 1e-3), (0.5, 2.1711, 2e-3)):
        s = np.array([cut + close, cut - close, *np.ones(99)])  # the median is 1
        assert choose_rank(s, rule="gavish-donoho", shape=(n, round(n / beta))) == 1


@pytest.mark.parametrize(
    "options",
    [{}, {"energy": 0.9, "threshold": 0.1}, {"energy": 0.0}, {"energy": 1.1}, {"threshold": 1.0}, {"rule": "kaiser"},
     {"rule": "gavish-donoho"}, {"rule": "gavish-donoho", "shape": (9, 9)},
     {"rule": "marchenko-pastur", "shape": (3, 3), "noise": -1.0}, {"rule": "gavish-donoho", "shape": (2, 2)}],
)  # fmt: skip
def test_choose_rank_errors(options):
    with pytest.raises(ValueError):
        choose_rank([3.0, 2.0, 1.0], **options)


def test_choose_rank_input_errors():
    for bad in ([[1.0]], [1.0, 2.0], [1.0, -1.0], [np.nan]):
        with pytest.raises(ValueError, match="singular_values"):
            choose_rank(bad, energy=0.5)


def test_stream_and_sketch_serve_rank_selection(rng):
    """The pieces fit together: a stream's spectrum goes into choose_rank."""
    a = matrix(rng, 500, 300, [30.0, 20, 10]) + 0.1 * rng.standard_normal((500, 300))
    svd = StreamingSVD(20)
    for block in np.split(a, 10):
        svd.update(block)
    assert choose_rank(svd.singular_values, rule="gavish-donoho", shape=a.shape, noise=0.1) == 3
