"""StreamingSVD: the accuracy contracts over shapes, dtypes and block mixtures, and what bad input does."""

from __future__ import annotations

import contextlib
import copy
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from references import EPS, orthogonality, orthonormal, subspace_distance
from subspan._lib.files import sealed_state, write_archive
from subspan.svd import FrequentDirections, StreamingSVD

DTYPES = [np.float32, np.float64]
METHODS = ["auto", "robust"]


def fingerprint(svd: StreamingSVD) -> bytes:
    return pickle.dumps({k: v for k, v in svd.__getstate__().items()})


def feed(svd: StreamingSVD, rows, cuts) -> StreamingSVD:
    for block in np.split(rows, cuts):
        if block.shape[0]:
            svd.update(block)
    return svd


def low_rank(rng, rows, n, k, kappa, dtype):
    scale = np.logspace(0, -np.log10(kappa), k) if k > 1 else np.ones(1)
    return ((rng.standard_normal((rows, k)) * scale) @ orthonormal(rng, n, k).T).astype(dtype)


# -- contracts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("dtype", "kappa"), [(np.float32, 1e2), (np.float32, 1e5), (np.float64, 1e5), (np.float64, 1e12)]
)
def test_streams_on_which_single_pass_gram_schmidt_and_plain_gram_fail(rng, dtype, kappa, method):
    """Exactly rank 32 in 1024 columns, 200 updates of 32 rows."""
    n, k, b = 1024, 32, 32
    basis, scale = orthonormal(rng, n, k), np.logspace(0, -np.log10(kappa), k)
    svd, r = StreamingSVD(k, method=method, oversample=0), np.zeros((0, k))
    for _ in range(200):
        c = rng.standard_normal((b, k)) * scale
        svd.update((c @ basis.T).astype(dtype))
        r = np.linalg.qr(np.vstack([r, c]), mode="r")
    want, got = np.linalg.svd(r, compute_uv=False), svd.singular_values.astype(np.float64)
    assert got.shape == (k,)
    assert np.abs(got - want).max() <= 100 * EPS[np.dtype(dtype)] * want[0]
    assert orthogonality(svd.components) <= 1


@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 150),
    rank=st.integers(1, 20),
    rows=st.integers(1, 120),
    decades=st.floats(0, 5),
    dtype=st.sampled_from(DTYPES),
    method=st.sampled_from(METHODS),
    data=st.data(),
)
def test_exactly_rank_k_stream(seed, n, rank, rows, decades, dtype, method, data):
    """Singular values to 100 eps s_1 for any mixture of block sizes, whatever the shape."""
    rng = np.random.default_rng(seed)
    rank = min(rank, n)
    a = low_rank(rng, rows, n, rank, 10.0**decades, dtype)
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), max_size=12)))
    svd = feed(StreamingSVD(rank, method=method), a, cuts)
    want = np.linalg.svd(a.astype(np.float64), compute_uv=False)[:rank]
    got = np.zeros(want.size)
    got[: svd.singular_values.size] = svd.singular_values
    assert np.abs(got - want).max() <= 100 * EPS[np.dtype(dtype)] * max(want[0], 1e-300)
    assert orthogonality(svd.components) <= 1
    assert svd.rows_seen == rows


@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.sampled_from([1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 127, 129, 191, 193, 255, 257]),
    k=st.sampled_from([1, 2, 7, 8, 9, 15, 16, 17, 24, 31, 33, 47, 49]),
    b=st.sampled_from([1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 48, 49, 65, 130]),
    dtype=st.sampled_from(DTYPES),
    center=st.booleans(),
    method=st.sampled_from(["auto", "robust", "gram"]),
)
def test_shapes_around_simd_lanes(seed, n, k, b, dtype, center, method):
    """Well-conditioned rows that fit into the rank: nothing is lost, so the result is the SVD."""
    rng = np.random.default_rng(seed)
    k = min(k, n)
    a = rng.standard_normal((2 * b + 3, k)) @ orthonormal(rng, n, k).T
    a = (a + (rng.standard_normal(n) if center and k == n else 0)).astype(dtype)
    svd = feed(StreamingSVD(k, center=center, method=method), a, [b, 2 * b])
    wide = a.astype(np.float64)
    if center:
        np.testing.assert_allclose(svd.mean, wide.mean(axis=0), atol=20 * EPS[np.dtype(dtype)] * np.abs(wide).max())
        wide = wide - wide.mean(axis=0)
    want = np.linalg.svd(wide, compute_uv=False)[:k]
    got = np.zeros(want.size)
    got[: svd.singular_values.size] = svd.singular_values
    # The squares of the Gram route lose what is below sqrt(eps) of the first.
    slack = 100 * EPS[np.dtype(dtype)] if method != "gram" else 4 * np.sqrt(EPS[np.dtype(dtype)])
    assert np.abs(got - want).max() <= slack * want[0] + 1e-300
    assert orthogonality(svd.components) <= 1


def real_sets():
    from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine

    return {f.__name__[5:]: f().data for f in (load_digits, load_breast_cancer, load_diabetes, load_wine)}


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["digits", "breast_cancer", "diabetes", "wine"])
def test_real_data_captures_the_best_rank_k(name, dtype, center):
    a = real_sets()[name].astype(dtype)
    wide = a.astype(np.float64)
    wide = wide - wide.mean(axis=0) if center else wide
    squares = np.linalg.svd(wide, compute_uv=False) ** 2
    for k in (1, 2, 5, 10):
        for b in (1, 13, 100):
            svd = feed(StreamingSVD(k, center=center), a, range(b, a.shape[0], b))
            best = squares[:k].sum()
            assert abs(svd.captured_energy - best) <= 1e-3 * best
            inside = np.sum((wide @ svd.components.astype(np.float64).T) ** 2)
            assert inside >= (1 - 1e-3) * best
            total = svd.captured_energy + svd.residual_energy
            assert total == pytest.approx(squares.sum(), rel=1e-4)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("k", [5, 16, 32, 64, 100])
def test_real_data_of_many_columns(k, center):
    """Eight digits a row, 512 columns: here truncation happens."""
    from sklearn.datasets import load_digits

    a = load_digits().data[:1792].reshape(-1, 512)
    wide = a - a.mean(axis=0) if center else a
    best = np.sum(np.linalg.svd(wide, compute_uv=False)[:k] ** 2)
    svd = feed(StreamingSVD(k, center=center), a, range(50, a.shape[0], 50))
    assert abs(svd.captured_energy - best) <= 1e-3 * best
    assert np.sum((wide @ svd.components.T) ** 2) >= (1 - 1e-3) * best


@pytest.mark.data
@pytest.mark.parametrize("center", [False, True])
def test_network_records(data, center):
    """NSL-KDD, its numeric columns standardised and its categories one-hot: 122 columns."""
    import lzma

    with lzma.open(data / "nsl_kdd" / "test.csv.xz", "rt") as f:
        header = f.readline().strip().split(",")
        records = [line.strip().split(",") for line in f]
    columns = [i for i, name in enumerate(header) if name != "label"]
    parts = []
    for i in columns:
        values = [r[i] for r in records]
        try:
            x = np.array([float(v) for v in values])
            parts.append(((x - x.mean()) / (x.std() or 1.0))[:, None])
        except ValueError:
            kinds = sorted(set(values))
            parts.append(np.array([[v == kind for kind in kinds] for v in values], dtype=float))
    a = np.hstack(parts).astype(np.float32)
    wide = a.astype(np.float64) - (a.mean(axis=0, dtype=np.float64) if center else 0)
    squares = np.linalg.svd(wide, compute_uv=False) ** 2
    for k in (5, 20):
        svd = feed(StreamingSVD(k, center=center), a, range(500, a.shape[0], 500))
        best = squares[:k].sum()
        assert abs(svd.captured_energy - best) <= 1e-3 * best
        assert np.sum((wide @ svd.components.astype(np.float64).T) ** 2) >= (1 - 1e-3) * best


@given(
    seed=st.integers(0, 2**32 - 1),
    pieces=st.integers(2, 6),
    dtype=st.sampled_from(DTYPES),
    center=st.booleans(),
    n=st.sampled_from([40, 200]),
)
def test_merge_tree_equals_sequence(seed, pieces, dtype, center, n):
    """Any order of merges gives the subspace of the sequential stream to 1e3 eps s_1 / gap."""
    rng = np.random.default_rng(seed)
    k = 6
    a = low_rank(rng, 40 * pieces, n, k - center, 30.0, dtype)
    if center:
        a = a + (0.5 * orthonormal(rng, n, 1).T).astype(dtype)
    blocks = np.split(a, pieces)
    streams = [StreamingSVD(k, center=center).update(x) for x in blocks]
    before = [fingerprint(s) for s in streams]
    order = list(rng.permutation(pieces))
    pool = [streams[i].copy() for i in order]
    while len(pool) > 1:
        i = int(rng.integers(len(pool) - 1))
        pool[i].merge(pool.pop(i + 1))
    tree, line = pool[0], feed(StreamingSVD(k, center=center), a, range(40, a.shape[0], 40))
    assert [fingerprint(s) for s in streams] == before
    s = line.singular_values.astype(np.float64)
    eps = EPS[np.dtype(dtype)]
    kept = k - center
    assert np.abs(tree.singular_values[:kept] - s[:kept]).max() <= 100 * eps * s[0]
    bound = 1e3 * eps * s[0] / s[kept - 1]
    assert subspace_distance(line.components[:kept], tree.components[:kept]) <= bound
    assert tree.rows_seen == line.rows_seen
    if center:
        np.testing.assert_allclose(tree.mean, line.mean, atol=50 * eps)


@given(seed=st.integers(0, 2**32 - 1), b=st.integers(1, 40), dtype=st.sampled_from(DTYPES), center=st.booleans())
def test_downdate_undoes_update(seed, b, dtype, center):
    rng = np.random.default_rng(seed)
    n, k = 60, 5
    basis = orthonormal(rng, n, k).T
    a = (rng.standard_normal((80 + b, k)) * [3, 2, 1.5, 1, 0.7]) @ basis
    a = a.astype(dtype)
    keep = StreamingSVD(k, center=center, oversample=0).update(a[:80])
    svd = keep.copy().update(a[80:])
    svd.downdate(a[80:])
    s, eps = keep.singular_values.astype(np.float64), EPS[np.dtype(dtype)]
    assert svd.rows_seen == 80
    assert np.abs(svd.singular_values - s).max() <= 1e3 * eps * s[0] ** 2 / s[-1]
    assert subspace_distance(keep.components, svd.components) <= 1e3 * eps * s[0] / s[-1]
    if center:
        np.testing.assert_allclose(svd.mean, keep.mean, atol=1e3 * eps)


def test_downdate_of_everything_leaves_nothing(rng):
    a = rng.standard_normal((30, 20))
    for center in (False, True):
        svd = StreamingSVD(20, center=center).update(a)
        svd.downdate(a)
        assert svd.rows_seen == 0
        assert svd.captured_energy <= 1e-10
        svd.update(a)
        want = np.linalg.svd(a - a.mean(0) if center else a, compute_uv=False)
        np.testing.assert_allclose(svd.singular_values[:19], want[:19], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "center"), [(np.float32, False), (np.float64, False), (np.float32, True)])
def test_hundred_thousand_updates_stay_orthonormal(dtype, center):
    rng = np.random.default_rng(1)
    n, k, b = 96, 8, 16
    blocks = [(low_rank(rng, b, n, 24, 50.0, np.float64) + 1e-3).astype(dtype) for _ in range(64)]
    svd = StreamingSVD(k, center=center, forget=0.999, oversample=0)
    worst = 0.0
    for i in range(100_000):
        svd.update(blocks[(7 * i) % 64])
        if i % 10_000 == 9_999:
            worst = max(worst, orthogonality(svd.components))
    assert worst <= 1
    assert np.all(np.isfinite(svd.singular_values))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_hundred_thousand_single_rows(dtype):
    rng = np.random.default_rng(2)
    rows = low_rank(rng, 1000, 200, 12, 1e3, dtype)
    svd = StreamingSVD(12, method="robust")
    for i in range(100_000):
        svd.update(rows[i % 1000 : i % 1000 + 1])
    want = np.linalg.svd(rows.astype(np.float64), compute_uv=False)[:12] * 10
    assert orthogonality(svd.components) <= 1
    assert np.abs(svd.singular_values - want).max() <= 100 * np.sqrt(1000) * EPS[np.dtype(dtype)] * want[0]


# -- behaviour ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_signs_are_stable(rng, dtype, method):
    n, k = 300, 6
    basis = orthonormal(rng, n, k).T
    svd = StreamingSVD(k, method=method)
    svd.update(((rng.standard_normal((50, k)) * [6, 5, 4, 3, 2, 1]) @ basis).astype(dtype))
    before = svd.components
    for _ in range(30):
        svd.update((1e-2 * rng.standard_normal((20, k)) @ basis).astype(dtype))
        now = svd.components
        assert np.all(np.sum(now * before, axis=1) > 0.9)
        before = now


def test_first_block_has_canonical_signs(rng):
    v = StreamingSVD(4).update(rng.standard_normal((200, 300))).components
    assert np.all(v[np.arange(4), np.argmax(np.abs(v), axis=1)] > 0)


@pytest.mark.parametrize("b", [1, 3, 40])
def test_forget_is_a_weight_on_the_past(rng, b):
    a, f = rng.standard_normal((40, 30)), 0.9
    svd = StreamingSVD(30, forget=f, method="robust")
    for i in range(0, 40, b):
        svd.update(a[i : i + b])
    calls = -(-40 // b)
    weights = f ** (calls - 1 - np.arange(40) // b)
    np.testing.assert_allclose(svd.singular_values, np.linalg.svd(weights[:, None] * a, compute_uv=False), rtol=1e-9)


def test_forget_with_mean(rng):
    a, f = rng.standard_normal((40, 12)) + 3, 0.8
    svd = StreamingSVD(12, forget=f, center=True)
    for i in range(0, 40, 4):
        svd.update(a[i : i + 4])
    w = f ** (9 - np.arange(40) // 4)
    mean = (w**2 @ a) / np.sum(w**2)
    np.testing.assert_allclose(svd.mean, mean, rtol=1e-10)
    want = np.linalg.svd(w[:, None] * (a - mean), compute_uv=False)
    np.testing.assert_allclose(svd.singular_values, want, rtol=1e-9)


def test_energy_chooses_the_rank(rng):
    s = np.array([10, 5, 2, 1, 0.1, 0.1])
    a = (orthonormal(rng, 50, 6) * s) @ orthonormal(rng, 40, 6).T
    svd = StreamingSVD(6, energy=0.99).update(a)
    share = np.cumsum(s**2) / np.sum(s**2)
    assert svd.components.shape == (int(np.searchsorted(share, 0.99)) + 1, 40)
    assert svd.captured_energy + svd.residual_energy == pytest.approx(np.sum(s**2))
    assert StreamingSVD(2, energy=0.99).update(a).components.shape == (2, 40)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [30, 300])
@pytest.mark.parametrize("center", [False, True])
def test_csr_equals_dense(rng, dtype, n, center):
    a = sparse.random_array((130, n), density=0.05, format="csr", dtype=dtype, rng=rng)
    for make in (sparse.csr_array, sparse.csr_matrix):
        one, two = StreamingSVD(20, center=center), StreamingSVD(20, center=center)
        for i in range(0, 130, 65):
            one.update(make(a[i : i + 65]))
            two.update(a[i : i + 65].toarray())
        tol = 100 * EPS[np.dtype(dtype)] * two.singular_values[0]
        assert np.abs(one.singular_values - two.singular_values).max() <= tol
        assert orthogonality(one.components) <= 1
        np.testing.assert_allclose(
            one.project(a),
            two.project(a.toarray()) * np.sign(np.sum(one.components * two.components, 1)),
            atol=50 * tol,
        )
    # Thin sparse blocks, other formats, and mixtures with dense ones.
    mixed = StreamingSVD(20, center=center)
    mixed.update(a[:3]).update(a[3:5].toarray()).update(a[5:6]).update(a[6:90].tocsc()).update(a[90:])
    assert np.abs(mixed.singular_values[:5] - two.singular_values[:5]).max() <= 2e-2 * two.singular_values[0]
    assert mixed.rows_seen == 130


@pytest.mark.parametrize("center", [False, True])
def test_csr_with_duplicate_entries_on_the_sparse_route(rng, center):
    rows, cols = np.sort(rng.integers(0, 120, 3000)), rng.integers(0, 110, 3000)
    indptr = np.searchsorted(rows, np.arange(121))
    doubled = sparse.csr_array((rng.standard_normal(3000), cols, indptr), shape=(120, 2000))
    assert not doubled.has_canonical_format
    svd = StreamingSVD(20, center=center, oversample=80).update(doubled)
    dense = doubled.toarray()
    want = np.linalg.svd(dense - dense.mean(0) if center else dense, compute_uv=False)[:20]
    np.testing.assert_allclose(svd.singular_values, want, rtol=1e-9)
    assert svd._state.route() == "sparse"


def test_centred_csr_whose_mean_dominates(rng):
    """Taking the mean off the products would lose (mean / spread)² eps; such blocks are centred first."""
    a = np.zeros((40, 3000))
    a[:, :100] = 1e6 + rng.standard_normal((40, 100))
    svd = StreamingSVD(10, center=True, oversample=30).update(sparse.csr_array(a))
    want = np.linalg.svd(a - a.mean(0), compute_uv=False)[:10]
    np.testing.assert_allclose(svd.singular_values, want, rtol=1e-7)


@pytest.mark.parametrize("kind", ["dense", "csr"])
def test_out_of_any_strides(rng, kind):
    a = rng.standard_normal((30, 200))
    svd = StreamingSVD(4, center=True).update(a)
    x = sparse.csr_array(a) if kind == "csr" else a
    want = svd.project(x)
    for out in (np.zeros((30, 4), order="F"), np.zeros((30, 8))[:, ::2], np.zeros((30, 4))[:, ::-1]):
        assert svd.project(x, out=out) is out
        np.testing.assert_array_equal(out, want)
    back = np.zeros((30, 200), order="F")
    np.testing.assert_array_equal(svd.reconstruct(want, out=back), svd.reconstruct(want))


def test_a_tall_block_beyond_the_small_columns(rng):
    """More rows than columns at n = 1500: split, not squared, and no n x n factor."""
    a = rng.standard_normal((2000, 6)) @ rng.standard_normal((6, 1500))
    svd = StreamingSVD(6).update(a)
    np.testing.assert_allclose(svd.singular_values, np.linalg.svd(a, compute_uv=False)[:6], rtol=1e-9)
    assert svd._state.route() != "tall"


def test_csr_with_wide_indices_and_duplicates():
    a = sparse.csr_matrix(
        (np.array([1.0, 2.0, 3.0]), np.array([1, 1, 0], np.int64), np.array([0, 2, 3], np.int64)), shape=(2, 3)
    )
    svd = StreamingSVD(2).update(a)
    np.testing.assert_allclose(svd.singular_values, [3.0, 3.0])


def test_project_reconstruct_residual(rng):
    a = rng.standard_normal((50, 80)) + 2
    svd = StreamingSVD(7, center=True).update(a)
    v, mean = svd.components, svd.mean
    z = svd.project(a)
    np.testing.assert_allclose(z, (a - mean) @ v.T, atol=1e-12)
    back = svd.reconstruct(z)
    np.testing.assert_allclose(back, z @ v + mean, atol=1e-12)
    np.testing.assert_allclose(svd.residual(a), np.sum((a - back) ** 2, axis=1), rtol=1e-9)
    np.testing.assert_allclose(svd.residual(sparse.csr_array(a)), svd.residual(a))
    many = np.tile(a, (12, 1))  # several strips
    np.testing.assert_allclose(svd.residual(sparse.csc_array(many)), svd.residual(many))


def test_tiny_residuals_keep_their_digits(rng):
    v = orthonormal(rng, 100, 3).T
    svd = StreamingSVD(3).update(1e3 * rng.standard_normal((50, 3)) @ v)
    away = orthonormal(rng, 100, 4)[:, :1].T
    away -= away @ svd.components.T @ svd.components
    away /= np.linalg.norm(away)
    x = 1e3 * v[:1] + 1e-4 * away
    assert svd.residual(x)[0] == pytest.approx(1e-8, rel=1e-3)


@pytest.mark.parametrize("method", ["auto", "robust", "gram"])
@pytest.mark.parametrize("dtype", DTYPES)
class TestDegenerateStreams:
    def test_zeros(self, method, dtype):
        svd = StreamingSVD(3, method=method)
        for b in (1, 5, 40, 1):
            svd.update(np.zeros((b, 200), dtype))
        assert svd.singular_values.shape == (0,)
        assert svd.components.shape == (0, 200)
        assert (svd.captured_energy, svd.residual_energy, svd.rows_seen) == (0.0, 0.0, 47)
        svd.update(np.eye(3, 200, dtype=dtype))
        np.testing.assert_allclose(svd.singular_values, np.ones(3), rtol=1e-6)

    def test_repeated_rows(self, method, dtype):
        row = np.random.default_rng(0).standard_normal((1, 200)).astype(dtype)
        svd = StreamingSVD(5, method=method)
        for b in (30, 1, 64, 7):
            svd.update(np.repeat(row, b, axis=0))
        s = svd.singular_values
        assert s[0] == pytest.approx(np.sqrt(102) * np.linalg.norm(row.astype(float)), rel=1e-5)
        assert np.all(s[1:] <= 100 * EPS[np.dtype(dtype)] * s[0] if method != "gram" else s[1:] <= 1e-2 * s[0])
        assert orthogonality(svd.components) <= 1

    def test_rank_deficient_blocks(self, method, dtype):
        rng = np.random.default_rng(0)
        a = low_rank(rng, 300, 200, 3, 10.0, dtype)
        svd = feed(StreamingSVD(10, method=method), a, range(50, 300, 50))
        want = np.linalg.svd(a.astype(float), compute_uv=False)[:3]
        np.testing.assert_allclose(svd.singular_values[:3], want, rtol=1e-4)
        assert np.all(svd.singular_values[3:] <= (1e-4 if method != "gram" else 1e-2) * want[0])
        assert orthogonality(svd.components) <= 1

    def test_more_components_than_rows(self, method, dtype):
        a = np.random.default_rng(0).standard_normal((3, 200)).astype(dtype)
        svd = StreamingSVD(10, method=method).update(a[:1])
        assert svd.components.shape == (1, 200)
        svd.update(a[1:])
        assert svd.components.shape == (3, 200)
        np.testing.assert_allclose(svd.singular_values, np.linalg.svd(a, compute_uv=False), rtol=1e-5)
        assert orthogonality(svd.components) <= 1

    def test_a_single_column(self, method, dtype):
        svd = StreamingSVD(1, method=method)
        for b in (1, 100, 3):
            svd.update(np.ones((b, 1), dtype))
        assert svd.singular_values[0] == pytest.approx(np.sqrt(104), rel=1e-5)
        np.testing.assert_array_equal(svd.components, [[1.0]])

    @pytest.mark.parametrize("power", [-30, -20, 17, 18])
    def test_extreme_scales(self, method, dtype, power):
        if dtype == np.float64:
            power *= 8
        rng = np.random.default_rng(0)
        a = rng.standard_normal((90, 200)).astype(dtype)
        b = a * dtype(10.0) ** power
        one, two = StreamingSVD(60, method=method), StreamingSVD(60, method=method)
        for i in range(0, 90, 30):
            one.update(a[i : i + 30])
            two.update(b[i : i + 30])
        ratio = two.singular_values.astype(np.float64) / one.singular_values
        np.testing.assert_allclose(ratio, np.full(60, 10.0**power), rtol=2e-3)
        assert orthogonality(two.components) <= 1


def test_an_outlier_row(rng):
    """One row 1e6 times the rest: neither it nor the rest may be lost."""
    a = rng.standard_normal((200, 500)).astype(np.float32)
    a[77] *= 1e6
    svd = feed(StreamingSVD(40), a, range(50, 200, 50))
    assert svd.singular_values[0] == pytest.approx(np.linalg.norm(a[77].astype(float)), rel=1e-5)
    assert svd.singular_values[1] > 10
    assert orthogonality(svd.components) <= 1


def test_one_block_far_from_the_origin_in_single_precision(rng):
    """The mean is taken off in two parts: the digits that float32 rows have survive."""
    a = (rng.standard_normal((60, 300)) * np.linspace(2, 0.5, 300) + 1e6).astype(np.float32)
    want = np.linalg.svd(a.astype(np.float64) - a.mean(axis=0, dtype=np.float64), compute_uv=False)[:20]
    for x in (a, sparse.csr_array(a)):
        svd = StreamingSVD(20, center=True).update(x)
        np.testing.assert_allclose(svd.singular_values, want, rtol=2e-6)


def test_copies_go_on_as_the_original_would(rng):
    a = rng.standard_normal((100, 150)).astype(np.float32)
    svd = StreamingSVD(10)
    for row in a[:40]:
        svd.update(row[None])
    twin = svd.copy()
    for row in a[40:]:
        svd.update(row[None])
        twin.update(row[None])
    np.testing.assert_array_equal(svd.components, twin.components)


def test_energy_at_extreme_scales(rng):
    a = rng.standard_normal((100, 30)) * 0.8 ** np.arange(30)
    sizes = {StreamingSVD(25, energy=0.9).update(a * s).components.shape[0] for s in (1.0, 1e-170, 1e150, 1e153)}
    assert len(sizes) == 1


def test_masked_and_lazily_negated_arrays(rng):
    import torch

    with pytest.raises(TypeError, match="masked"):
        StreamingSVD(2).update(np.ma.array(np.eye(3), mask=np.eye(3) > 0))
    lazy = torch.from_numpy(rng.standard_normal((6, 4)) + 1j * rng.standard_normal((6, 4))).conj().imag
    assert lazy.is_neg()
    svd = StreamingSVD(4).update(lazy)
    np.testing.assert_allclose(svd.reconstruct(svd.project(lazy)), lazy.resolve_neg(), atol=1e-12)


def test_large_mean_in_single_precision(rng):
    a = (rng.standard_normal((300, 150)) * np.linspace(3, 0.1, 150) + 1e4).astype(np.float32)
    svd = feed(StreamingSVD(10, center=True, oversample=140), a, range(30, 300, 30))
    wide = a.astype(np.float64) - a.mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(svd.singular_values, np.linalg.svd(wide, compute_uv=False)[:10], rtol=1e-3)


# -- errors leave the stream as it was ---------------------------------------------------------------------------------


@pytest.fixture(params=[(m, c) for m in ("auto", "robust", "gram") for c in (False, True)], ids=str)
def stream(request, rng):
    method, center = request.param
    svd = StreamingSVD(4, method=method, center=center)
    return svd.update(rng.standard_normal((40, 150)).astype(np.float32))


def broken(value, b=30, at=(7, 11)):
    x = np.ones((b, 150), dtype=np.float32)
    x[at] = value
    return x


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (broken(np.nan), ValueError, "NaN in row 7, column 11"),
        (broken(np.inf), ValueError, "infinity in row 7, column 11"),
        (broken(-np.inf, b=500), ValueError, "infinity in row 7, column 11"),
        (broken(np.nan, b=1, at=(0, 3)), ValueError, "NaN in row 0, column 3"),
        (sparse.csr_array(broken(np.nan)), ValueError, "NaN in row 7, column 11"),
        (np.ones((3, 151), np.float32), ValueError, "150 columns"),
        (np.ones((0, 150), np.float32), ValueError, "empty block"),
        (np.ones((3, 150)), TypeError, "float32"),
        (np.ones(151, np.float32), ValueError, "columns"),
        (np.ones((2, 3, 150), np.float32), ValueError, "dimensions"),
        (np.ones((3, 150), np.int32), TypeError, "float32 or float64"),
        ("rows", TypeError, "array"),
    ],
)
def test_bad_rows(stream, rows, error, message):
    before = fingerprint(stream)
    with pytest.raises(error, match=message):
        stream.update(rows)
    assert fingerprint(stream) == before
    # The same while a thin row waits, which a fingerprint would fold in: against a twin that never saw the bad rows.
    twin = stream.copy()
    for svd in (stream, twin):
        svd.update(np.ones((1, 150), np.float32))
    assert stream._state.buffered() == 1
    with pytest.raises(error, match=message):
        stream.update(rows)
    assert stream._state.buffered() == 1
    assert fingerprint(stream) == fingerprint(twin)


def test_a_full_buffer_that_fails_gives_the_last_rows_back():
    """Rows whose difference overflows: refused when they come, and the stream goes on."""
    svd = StreamingSVD(4, center=True).update(np.ones((2, 200), np.float32))
    with pytest.raises(ValueError, match="too large to be centred"):
        svd.update(np.full((1, 200), 3e38, np.float32))
    assert svd.rows_seen == 2
    svd.update(np.zeros((2, 200), np.float32))
    np.testing.assert_allclose(svd.singular_values, [np.sqrt(200)], rtol=1e-6)


def test_a_split_block_that_fails_late_leaves_no_piece_behind(rng):
    svd = StreamingSVD(3, center=True).update(rng.standard_normal((40, 1500)))
    before = fingerprint(svd)
    bad = rng.standard_normal((400, 1500))
    bad[399] = 1.7e308
    bad[398] = -1.7e308
    with pytest.raises(ValueError):
        svd.update(bad)
    assert fingerprint(svd) == before


def test_scales_may_mix():
    """Huge, ordinary and tiny rows in one float64 stream, and zeros after tiny ones."""
    for first, second in ((1e200, 1.0), (1e-200, 1.0), (1.0, 1e200), (1e-200, 0.0), (1e160, 1e160)):
        svd = StreamingSVD(3, oversample=0)
        svd.update(first * np.eye(3, 300)).update(second * np.eye(3, 300))
        want = np.hypot(first, second)
        np.testing.assert_allclose(svd.singular_values, want, rtol=1e-12)
        pickle.loads(pickle.dumps(svd))
    fading = StreamingSVD(2, forget=0.5).update(np.eye(2, 300))
    for _ in range(1200):
        fading.update(np.zeros((40, 300)))
    assert fading.singular_values.shape == (0,)
    fading.update(np.eye(2, 300))
    np.testing.assert_allclose(fading.singular_values, 1.0)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (np.full((3, 150), 1e3, np.float32), np.linalg.LinAlgError, "cannot all have been added"),
        (np.ones((50, 150), np.float32), ValueError, "50 rows, but the stream has seen 40"),
        (broken(np.nan), ValueError, "NaN"),
        (np.ones((3, 149), np.float32), ValueError, "150 columns"),
    ],
)
def test_bad_downdates(stream, rows, error, message):
    before = fingerprint(stream)
    with pytest.raises(error, match=message):
        stream.downdate(rows)
    assert fingerprint(stream) == before


def test_downdate_leaves_no_noise_components(rng):
    basis = orthonormal(rng, 300, 4).T.astype(np.float32)
    a = (rng.standard_normal((60, 4)).astype(np.float32) * np.float32([4, 3, 2, 1])) @ basis
    svd = StreamingSVD(8).update(a[:40]).update(a[40:])
    svd.downdate(a[40:])
    assert svd.components.shape == (4, 300)


def test_downdate_with_forgetting_keeps_the_mean(rng):
    a = rng.standard_normal((30, 5)) + 6
    svd = StreamingSVD(2, forget=0.5, center=True)
    for row in np.split(a, 15):
        svd.update(row)
    svd.update(a[:1])
    svd.downdate(a[:1])
    assert np.all(svd.mean > 3)


def test_merge_of_emptied_streams_and_of_other_kinds(rng):
    a = rng.standard_normal((10, 20))
    empty = StreamingSVD(3, center=True).update(a).downdate(a)
    svd = StreamingSVD(3, center=True).merge(empty)
    svd.update(a)
    np.testing.assert_allclose(svd.mean, a.mean(0), atol=1e-12)
    single = StreamingSVD(2, dtype=np.float32)
    with pytest.raises(TypeError, match="float32"):
        single.merge(StreamingSVD(2).update(a))
    single.update(a.astype(np.float32))


def test_downdate_of_unseen_rows_inside_the_subspace(rng):
    v = orthonormal(rng, 150, 3).T
    svd = StreamingSVD(3, oversample=0).update(rng.standard_normal((40, 3)) @ v)
    before = fingerprint(svd)
    with pytest.raises(np.linalg.LinAlgError, match="indefinite"):
        svd.downdate(50 * v[:1])
    assert fingerprint(svd) == before


def test_bad_merges(stream, rng):
    before = fingerprint(stream)
    center = stream.center
    with pytest.raises(ValueError, match="columns"):
        stream.merge(StreamingSVD(2, center=center).update(np.ones((3, 10), np.float32)))
    with pytest.raises(ValueError, match="centred"):
        stream.merge(StreamingSVD(2, center=not center).update(np.ones((3, 150), np.float32)))
    with pytest.raises(TypeError, match="float32"):
        stream.merge(StreamingSVD(2, center=center).update(np.ones((3, 150))))
    with pytest.raises(TypeError, match="StreamingSVD"):
        stream.merge("other")
    assert fingerprint(stream) == before


def test_a_first_block_that_fails_leaves_a_fresh_stream(rng):
    svd = StreamingSVD(4)
    for bad in (broken(np.nan), broken(np.nan, b=1, at=(0, 0)), np.ones((3, 2), np.float32)):
        with pytest.raises(ValueError):
            svd.update(bad)
        assert svd.dtype is None
        assert svd.n_features is None
    svd.update(rng.standard_normal((10, 7)))
    assert svd.components.shape == (4, 7)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"rank": 0}, ValueError),
        ({"rank": -3}, ValueError),
        ({"rank": 2.5}, TypeError),
        ({"rank": 2, "forget": 0.0}, ValueError),
        ({"rank": 2, "forget": 1.5}, ValueError),
        ({"rank": 2, "forget": float("nan")}, ValueError),
        ({"rank": 2, "energy": 1.0}, ValueError),
        ({"rank": 2, "energy": 0.0}, ValueError),
        ({"rank": 2, "method": "fast"}, ValueError),
        ({"rank": 2, "dtype": "int32"}, TypeError),
        ({"rank": 2, "oversample": -1}, ValueError),
    ],
)
def test_bad_options(options, error):
    with pytest.raises(error, match=next(x for x in reversed(options))):
        StreamingSVD(**options)


def test_rank_above_the_columns():
    with pytest.raises(ValueError, match=r"rank must be at most the number of columns \(5\), got 6"):
        StreamingSVD(6).update(np.ones((10, 5)))


def test_no_rows_yet():
    svd = StreamingSVD(3)
    assert svd.components.shape == (0, 0)
    assert svd.singular_values.shape == (0,)
    assert svd.mean is None
    assert (svd.rows_seen, svd.captured_energy, svd.residual_energy) == (0, 0.0, 0.0)
    for call in (svd.project, svd.residual, svd.reconstruct):
        with pytest.raises(ValueError, match="no rows"):
            call(np.ones((1, 2)))
    assert "no rows yet" in repr(svd)


# -- saving ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("center", [False, True])
def test_save_load_pickle_copy(tmp_path, rng, center):
    svd = StreamingSVD(4, center=center, forget=0.99, energy=0.999)
    svd.update(rng.standard_normal((30, 50)).astype(np.float32)).update(rng.standard_normal((1, 50)).astype(np.float32))
    svd.save(tmp_path / "s.npz")
    others = [
        StreamingSVD.load(tmp_path / "s.npz"),
        pickle.loads(pickle.dumps(svd)),
        copy.copy(svd),
        copy.deepcopy(svd),
    ]
    more = rng.standard_normal((20, 50)).astype(np.float32)
    svd.update(more)
    for other in others:
        assert "rank=4" in repr(other)
        assert "forget=0.99" in repr(other)
        other.update(more)
        np.testing.assert_array_equal(other.singular_values, svd.singular_values)
        np.testing.assert_array_equal(other.components, svd.components)
        assert other.rows_seen == svd.rows_seen
    assert not [p for p in tmp_path.iterdir() if p.name != "s.npz"]


def test_save_of_a_stream_without_rows(tmp_path):
    StreamingSVD(3, center=True).save(tmp_path / "s.npz")
    svd = StreamingSVD.load(tmp_path / "s.npz")
    svd.update(np.eye(4))
    assert svd.components.shape == (3, 4)


def test_a_torch_stream_stays_a_torch_stream(tmp_path):
    import torch

    svd = StreamingSVD(2).update(torch.eye(5))
    svd.save(tmp_path / "s.npz")
    assert isinstance(StreamingSVD.load(tmp_path / "s.npz").components, torch.Tensor)


def test_damaged_files(tmp_path, rng):
    path = tmp_path / "s.npz"
    StreamingSVD(3).update(rng.standard_normal((10, 20))).save(path)
    raw = path.read_bytes()
    for damage in (b"", raw[:50], raw[: len(raw) // 2], b"not a zip file", raw[:200] + bytes(40) + raw[240:]):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=r"s\.npz"):
            StreamingSVD.load(path)
    np.savez(path, something=np.ones(3))
    with pytest.raises(ValueError, match="lacks"):
        StreamingSVD.load(path)
    for key, value in [
        ("components", np.ones((3, 19))),
        ("singular_values", np.array([1.0, np.nan, 0.5])),
        ("format", "x"),
        ("rank", 0),
    ]:
        path.write_bytes(raw)
        with np.load(path) as f:
            state = {k: f[k] for k in f.files}
        state[key] = value
        np.savez(path, **state)
        with pytest.raises(ValueError, match=r"s\.npz"):
            StreamingSVD.load(path)
    flips = np.random.default_rng(0).integers(0, 8 * len(raw), 300)
    for bit in flips:
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(damaged)
        # A flip may hit a byte that nobody reads; whatever else is raised fails the test.
        with contextlib.suppress(ValueError):
            StreamingSVD.load(path)
    np.save(tmp_path / "s.npy", np.ones(3))
    with pytest.raises(ValueError, match=r"s\.npy"):
        StreamingSVD.load(tmp_path / "s.npy")
    path.write_bytes(raw)
    with np.load(path) as f:
        state = {k: f[k] for k in f.files}
    np.savez(path, **{**state, "library": "this"})
    with pytest.raises(ValueError, match="checksum"):
        StreamingSVD.load(path)
    whole = {k: (None if v.ndim == 0 and v.item() == "" else v.item() if v.ndim == 0 else v) for k, v in state.items()}
    write_archive(path, sealed_state({**whole, "library": "this"}))
    with pytest.raises(ValueError, match="library"):
        StreamingSVD.load(path)
    with pytest.raises(FileNotFoundError):
        StreamingSVD.load(tmp_path / "none.npz")


def test_repr(rng):
    svd = StreamingSVD(3, method="robust").update(rng.standard_normal((10, 20)))
    assert repr(svd).startswith("StreamingSVD(rank=3, method='robust') <10 rows of 20 float64")


def test_options_are_fixed_once_a_stream_is_made(rng):
    svd = StreamingSVD(4).update(rng.standard_normal((40, 12)))
    for name, value in (("center", True), ("rank", 2), ("forget", 0.5), ("oversample", 0)):
        with pytest.raises(AttributeError, match=f"{name} is fixed"):
            setattr(svd, name, value)
    svd.__setstate__(StreamingSVD(2, center=True).__getstate__())  # another stream in its place
    assert svd.center
    with pytest.raises(ValueError, match=r"forget must be in \(0, 1\], got 0"):
        StreamingSVD(2, forget=0)


def test_sketches_of_two_libraries_or_dtypes_do_not_merge(rng):
    torch = pytest.importorskip("torch")
    x = rng.standard_normal((40, 12))
    ours = FrequentDirections(4, 12).update(x)
    with pytest.raises(TypeError, match="other must hold numpy arrays as the sketch does, got torch"):
        ours.merge(FrequentDirections(4, 12).update(torch.from_numpy(x)))
    with pytest.raises(TypeError, match="other must be float64 as the sketch is"):
        ours.merge(FrequentDirections(4, 12).update(x.astype(np.float32)))
    with pytest.raises(TypeError, match="rows must be float64 as the sketch is, got float32"):
        ours.update(x.astype(np.float32))


def test_weights_of_streams_without_rows_are_compared_too(rng):
    x = rng.standard_normal((20, 5))
    with pytest.raises(ValueError, match="weight"):
        StreamingSVD(2, weight=np.ones(5)).update(x).merge(StreamingSVD(2, weight=2 * np.ones(5)))
