"""Streams against sums and decompositions in higher precision: after any number of rows, any offset, by any route."""

import itertools
import pickle

import numpy as np
import pytest
from scipy import sparse

from subspan.sklearn import IncrementalPCA
from subspan.svd import FrequentDirections, StreamingSVD, truncated_svd

DTYPES = (np.float32, np.float64)


def eps(dtype):
    return float(np.finfo(dtype).eps)


def exact_values(blocks, k, center=False):
    """Singular values of what blocks stack up to, from sums in long double."""
    n = blocks[0].shape[1]
    gram, total, count = np.zeros((n, n), np.longdouble), np.zeros(n, np.longdouble), 0
    for x in blocks:
        wide = x.astype(np.longdouble)
        gram += wide.T @ wide
        total += wide.sum(0)
        count += len(x)
    if center:
        gram -= np.outer(total, total) / count
    return np.sqrt(np.maximum(np.linalg.eigvalsh(gram.astype(np.float64))[::-1][:k], 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "k", "rows", "method"),
    [(20, 20, 100, "auto"), (20, 20, 3, "auto"), (150, 10, 16, "robust"), (150, 10, 16, "gram"), (300, 8, 16, "auto")],
)
@pytest.mark.parametrize("read", [False, True])
def test_values_do_not_drift_with_updates(rng, dtype, n, k, rows, method, read):
    """A thousand folds: the contract is 100 eps s₁, and rounding at each would pass it."""
    basis = np.linalg.qr(rng.standard_normal((n, k)))[0].T * np.geomspace(1, 0.02, k)[:, None]
    svd = StreamingSVD(k, method=method)
    blocks = [(rng.standard_normal((rows, k)) @ basis).astype(dtype) for _ in range(50)]
    for i in range(1000):
        svd.update(blocks[i % 50])
        if read and i % 3 == 0:
            _ = svd.components
    want = exact_values(blocks, k) * np.sqrt(20)
    assert np.abs(svd.singular_values - want).max() <= 25 * eps(dtype) * want[0]
    v = svd.components.astype(np.float64)
    assert np.abs(v @ v.T - np.eye(len(v))).max() <= 10 * eps(dtype) * np.sqrt(k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_call_with_many_rows(rng, dtype):
    x = (rng.standard_normal((200_000, 20)) * np.linspace(1, 3, 20) + 0.5).astype(dtype)
    want = exact_values(np.array_split(x, 10), 20, center=True)
    svd = StreamingSVD(20, center=True).update(x)
    assert np.abs(svd.singular_values - want).max() <= 20 * eps(dtype) * want[0]
    pca = IncrementalPCA(20).fit(x)  # two thousand batches
    variances = want**2 / (len(x) - 1)
    assert np.abs(pca.explained_variance_ - variances).max() <= 20 * eps(dtype) * variances[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["dense", "csr"])
def test_reading_changes_nothing(rng, dtype, kind):
    one, two = StreamingSVD(6, center=True), StreamingSVD(6, center=True)
    for _ in range(30):
        x = rng.standard_normal((40, 300)).astype(dtype)
        x[rng.random(x.shape) < 0.95] = 0
        rows = sparse.csr_array(x) if kind == "csr" else x
        one.update(rows)
        two.update(rows)
        assert two.project(x).shape == (40, 6)
    np.testing.assert_array_equal(one.components, two.components)
    np.testing.assert_array_equal(one.singular_values, two.singular_values)


# -- smooth snapshots: residual rows that nearly depend on each other --------------------------------------------------


def snapshots():
    t, x = np.linspace(0, 1, 100)[:, None], np.linspace(0, 1, 1024)[None]
    return {
        "lorentz": 1 / (1 + ((x - t) / 0.1) ** 2),
        "gauss": np.exp(-(((x - t) / 0.15) ** 2)),
        "waves": sum(np.exp(-j * t) * np.sin((j + 1) * np.pi * (x - t)) / (j + 1) ** 2 for j in range(12)),
        "rows": (1 / (1 + ((x - t) / 0.1) ** 2)).T.copy()[:, :100],
    }


@pytest.mark.parametrize("name", ["lorentz", "gauss", "waves", "rows"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["auto", "robust"])
@pytest.mark.parametrize("oversample", [0, None, 40])
def test_vectors_of_smooth_snapshots(name, dtype, method, oversample):
    """Against the decomposition of what the stream was given: its state before, and the block."""
    a = snapshots()[name].astype(dtype)
    cuts = [0, 50, 60, 100] if a.shape[0] == 100 else [0, 40, 90, 300, 1024]
    svd = StreamingSVD(10, oversample=oversample, method=method)
    for begin, end in itertools.pairwise(cuts):
        before = svd._state.state()
        svd.update(a[begin:end])
        past = np.zeros((0, a.shape[1]))
        if before["dtype"] is not None:
            v = before["components"].astype(np.float64) + before["low"].astype(np.float64)
            past = before["singular_values"][:, None] * v
        _, s, vh = np.linalg.svd(np.vstack([past, a[begin:end].astype(np.float64)]), full_matrices=False)
        found = svd.components.astype(np.float64)
        assert np.abs(svd.singular_values - s[: len(found)]).max() <= 20 * eps(dtype) * s[0]
        for k in range(1, len(found) + 1):
            gap = s[k - 1] - (s[k] if k < len(s) else 0)
            off = np.linalg.norm(found[:k] - (found[:k] @ vh[:k].T) @ vh[:k], 2)
            # Squares where the Gram route is taken: the spectrum that it allows is 64 wide.
            assert off <= 60 * eps(dtype) * s[0] / gap + 60 * eps(dtype), (k, svd._state.route())


# -- offsets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 300.0, 1e5])
@pytest.mark.parametrize("kind", ["dense", "fortran", "csr"])
def test_offsets_do_not_cancel(rng, dtype, offset, kind):
    x = (0.5 * rng.standard_normal((400, 60)) + offset).astype(dtype)
    put = {"dense": np.asarray, "fortran": np.asfortranarray, "csr": sparse.csr_array}[kind]
    svd = StreamingSVD(5, center=True)
    for begin in range(0, 400, 100):
        svd.update(put(x[begin : begin + 100]))
    mean = x.astype(np.longdouble).mean(0)
    v = svd.components.astype(np.longdouble)
    want = (x.astype(np.longdouble) - mean) @ v.T
    # What float64 itself can say of a number with this offset, and of its mean.
    given = 40 * np.finfo(np.float64).eps * offset
    close = 60 * eps(dtype) + given
    assert np.abs(svd.project(put(x)) - want).max() <= close * 3
    squares = ((x.astype(np.longdouble) - mean) ** 2).sum(1) - (want**2).sum(1)
    assert np.abs(svd.residual(put(x)) - squares).max() <= close * 60
    back = svd.reconstruct(want.astype(dtype))
    assert np.abs(back - (want.astype(dtype).astype(np.longdouble) @ v + mean)).max() <= 4 * eps(dtype) * max(offset, 4)
    pca = IncrementalPCA(5, batch_size=100).fit(put(x))
    exact = (x.astype(np.longdouble) - pca.mean_) @ pca.components_.T.astype(np.longdouble)
    assert np.abs(pca.transform(put(x)) - exact).max() <= close * 3
    values = exact_values([(x.astype(np.longdouble) - mean).astype(np.float64)], 5)
    lost = svd.residual_energy**0.5 if svd.rows_seen else 0
    assert np.abs(svd.singular_values - values).max() <= 100 * eps(dtype) * values[0] + 20 * given * 20 + lost


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["dense", "csr", "csc", "coo"])
def test_variances_of_columns(rng, dtype, kind):
    """A constant column among small ones: sums of squares minus n mean² have no digits left in float32."""
    x = np.where(rng.random((2000, 40)) < 0.05, 0.05 * rng.random((2000, 40)), 0)
    x[:, 0] = 2024
    x[:, 1] += 1e4
    x = x.astype(dtype)
    put = {"dense": np.asarray, "csr": sparse.csr_array, "csc": sparse.csc_array, "coo": sparse.coo_array}[kind]
    wide = x.astype(np.longdouble)
    want = ((wide - wide.mean(0)) ** 2).mean(0)
    pca = IncrementalPCA(5, batch_size=500).fit(put(x))
    svd = StreamingSVD(5, center=True)
    for begin in range(0, 2000, 250):
        svd.update(put(x[begin : begin + 250]))
    tolerance = 1e-9 * want + 1e-20 * 1e8
    assert (np.abs(pca.var_ - want) <= tolerance).all()
    assert (np.abs(svd.column_variances - want) <= tolerance).all()
    total = float(want.sum()) * 2000
    ratio = pca.singular_values_.astype(np.float64) ** 2 / total
    np.testing.assert_allclose(pca.explained_variance_ratio_, ratio, rtol=1e-5)
    np.testing.assert_allclose(svd.explained_variance_ratio.sum(), svd.captured_energy / total, rtol=1e-6)


def test_column_variances_merge_forget_and_downdate(rng):
    x, y = rng.standard_normal((300, 20)) + 3, rng.standard_normal((200, 20)) - 1
    for center in (True, False):
        one = StreamingSVD(4, center=center).update(x).merge(StreamingSVD(4, center=center).update(y))
        both = np.vstack([x, y])
        want = both.var(0) if center else (both**2).mean(0)
        np.testing.assert_allclose(one.column_variances, want, rtol=1e-12)
        again = StreamingSVD(20, center=center).update(x).update(y).downdate(y)
        np.testing.assert_allclose(again.column_variances, x.var(0) if center else (x**2).mean(0), rtol=1e-10)
        faded = StreamingSVD(4, center=center, forget=0.5).update(x).update(y)
        weights = np.r_[np.full(300, 0.25), np.ones(200)]
        mean = np.average(both, axis=0, weights=weights) if center else 0.0
        np.testing.assert_allclose(
            faded.column_variances, np.average((both - mean) ** 2, axis=0, weights=weights), rtol=1e-12
        )


# -- what users of the peers look for ----------------------------------------------------------------------------------


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("forget", [1.0, 0.9])
def test_rotations_update_left_vectors(rng, center, forget):
    a = rng.standard_normal((200, 3)) @ rng.standard_normal((3, 80)) + (1 if center else 0)
    if center and forget != 1:
        with pytest.raises(ValueError, match="forget"):
            StreamingSVD(3, exact_blocks=True, center=True, forget=forget).update(a, rotation=True)
        return
    svd, u = StreamingSVD(4 if center else 3, exact_blocks=True, center=center, forget=forget), np.zeros((0, 0))
    weights = np.zeros(0)
    for begin in range(0, 200, 50):
        rotation = svd.update(a[begin : begin + 50], rotation=True)
        u = rotation.apply(u)
        weights = np.r_[weights * forget, np.ones(50)]
    k = len(svd.singular_values)
    assert u.shape == (200, k)
    centred = a - np.average(a, axis=0, weights=weights**2) if center else a
    np.testing.assert_allclose(u * svd.singular_values @ svd.components, weights[:, None] * centred, atol=1e-12)
    assert np.abs(u[:, :3].T @ u[:, :3] - np.eye(3)).max() < 1e-12
    with pytest.raises(ValueError, match="exact_blocks"):
        StreamingSVD(3).update(a, rotation=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("full", [False, True])
def test_weighted_inner_products(rng, dtype, full):
    n = 30
    m = rng.standard_normal((n, n))
    w = m @ m.T + n * np.eye(n) if full else rng.random(n) + 0.5
    matrix = w if full else np.diag(w)
    a = (rng.standard_normal((200, 5)) @ rng.standard_normal((5, n))).astype(dtype)
    want = np.sqrt(np.linalg.eigvalsh(a.astype(float) @ matrix @ a.T.astype(float))[::-1][:5])
    svd = StreamingSVD(5, weight=w).update(a[:120]).update(a[120:])
    found = truncated_svd(a, 5, weight=w, rng=0)
    for values, v in ((svd.singular_values, svd.components), (found.S, found.Vh)):
        np.testing.assert_allclose(values, want, rtol=100 * eps(dtype))
        assert np.abs(v @ matrix @ v.T - np.eye(5)).max() < 200 * eps(dtype)
    np.testing.assert_allclose(svd.reconstruct(svd.project(a)), a, atol=500 * eps(dtype) * np.abs(a).max())
    assert svd.residual(a).max() < 1e-4 * (want[0] ** 2) * eps(dtype) ** 0.5
    np.testing.assert_allclose(found.U * found.S @ found.Vh, a, atol=500 * eps(dtype) * np.abs(a).max())
    copy = StreamingSVD.__new__(StreamingSVD)
    copy.__setstate__(svd.__getstate__())
    np.testing.assert_array_equal(copy.components, svd.components)
    if not full:
        csr = StreamingSVD(5, weight=w).update(sparse.csr_array(a))
        np.testing.assert_allclose(csr.singular_values, want, rtol=100 * eps(dtype))
    with pytest.raises(ValueError, match="weight"):
        svd.merge(StreamingSVD(5).update(a))
    for bad in (-np.ones(n), np.ones((n, n + 1)), -np.eye(n), np.triu(np.ones((n, n)))):
        with pytest.raises(ValueError, match="weight"):
            StreamingSVD(5, weight=bad)


@pytest.mark.parametrize("integer", [np.uint8, np.int16, np.int32])
def test_integers_are_converted_where_nothing_is_lost(rng, integer):
    x = rng.integers(0, 100, (60, 12)).astype(integer)
    wide = x.astype(np.float64)
    svd = StreamingSVD(3).update(x)
    assert svd.dtype == np.float64
    np.testing.assert_array_equal(svd.components, StreamingSVD(3).update(wide).components)
    np.testing.assert_array_equal(svd.project(x), svd.project(wide))
    found = truncated_svd(x, 3, rng=0)
    np.testing.assert_array_equal(found.S, truncated_svd(wide, 3, rng=0).S)
    single = StreamingSVD(3, dtype=np.float32)
    if integer is np.int32:
        with pytest.raises(TypeError, match="int32"):
            single.update(x)
    else:
        assert single.update(x).dtype == np.float32
    with pytest.raises(TypeError, match="int64"):
        StreamingSVD(3).update(x.astype(np.int64))


def test_signs_power_iterations_and_forget_of_merges(rng):
    a = rng.standard_normal((80, 30))
    u = truncated_svd(a, 5, rng=0, signs="u").U
    assert (u[np.abs(u).argmax(0), range(5)] > 0).all()
    v = StreamingSVD(5, signs="v").update(a[:40]).update(a[40:]).components
    assert (v[range(5), np.abs(v).argmax(1)] > 0).all()
    exact = np.linalg.svd(a, compute_uv=False)
    assert np.abs(truncated_svd(a, 2, power_iterations="auto", rng=0).S - exact[:2]).max() < 1e-3
    from subspan.svd import merge_svd

    parts = [truncated_svd(x, 30, rng=0) for x in (a[:40], a[40:])]
    merged = merge_svd(*parts, 30, forget=0.5)
    np.testing.assert_allclose(merged.S, np.linalg.svd(np.vstack([0.5 * a[:40], a[40:]]), compute_uv=False), rtol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sketches_of_many_rows(rng, dtype):
    """Nothing is dropped, so the sketch holds what the rows hold: 450 shrinks of a buffer that is kept in double."""
    x = rng.standard_normal((10_000, 20)).astype(dtype)
    sketch = FrequentDirections(21, 20).update(x)
    gram = x.astype(np.longdouble).T @ x.astype(np.longdouble)
    b = sketch.sketch.astype(np.longdouble)
    top = float(np.linalg.norm(gram.astype(np.float64), 2))
    change = np.linalg.eigvalsh((gram - b.T @ b).astype(np.float64)) / top
    assert np.abs(change).max() <= (4 if dtype == np.float32 else 40) * eps(dtype)
    assert change.max() <= sketch.error_bound / top + 40 * eps(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sketch_that_is_saved_after_every_update_is_the_same_sketch(rng, dtype):
    x = rng.standard_normal((400, 12)).astype(dtype)
    whole, saved = FrequentDirections(13, 12), FrequentDirections(13, 12)
    for begin in range(0, 400, 8):
        whole.update(x[begin : begin + 8])
        saved = pickle.loads(pickle.dumps(saved.update(x[begin : begin + 8])))
    np.testing.assert_array_equal(saved.sketch, whole.sketch)
    assert saved.error_bound == whole.error_bound
    # What is kept below the last digit is part of what a merge adds.
    both = FrequentDirections(13, 12).merge(whole)
    np.testing.assert_array_equal(both.sketch, whole.sketch)


def test_variances_with_forget(rng):
    """Of a stationary stream they stay what they are."""
    svd = StreamingSVD(4, center=True, forget=0.9)
    for _ in range(400):
        svd.update(rng.standard_normal((50, 4)))
    np.testing.assert_allclose(svd.explained_variance.sum(), svd.column_variances.sum(), rtol=1e-10)
    assert 0.5 < svd.explained_variance[0] < 2
    with pytest.raises(ValueError, match="overflow"):
        _ = StreamingSVD(2).update(1e200 * rng.standard_normal((5, 4))).explained_variance_ratio
    for scale in (1e-200, 1e200):
        ratio = StreamingSVD(4).update(scale * rng.standard_normal((5, 4))).explained_variance_ratio
        assert ratio.sum() == pytest.approx(1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_shown_component_of_many_that_are_kept(dtype):
    """What is promised of k vectors holds for those that are shown, not for as many as are kept."""
    for seed in range(60):
        rng = np.random.default_rng(seed)
        svd = StreamingSVD(1, center=True, method="robust")
        for b in (3, 1, 16, 5):
            svd.update(rng.standard_normal((b, 32)).astype(dtype))
            v = svd.components.astype(np.float64)
            assert abs(float((v @ v.T)[0, 0]) - 1) <= 10 * eps(dtype)


# -- sparse rows, which wait for others --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("forget", [1.0, 0.95])
@pytest.mark.parametrize("least", [0.1, 1e-3])
def test_sparse_blocks_of_any_size(rng, dtype, center, forget, least):
    """Rows of rank 8: whatever blocks are cut into or wait for, and by whichever route, nothing is truncated."""
    n, rank = 2500, 8
    basis = np.where(rng.random((rank, n)) < 0.02, rng.standard_normal((rank, n)), 0)
    basis *= np.geomspace(1, least, rank)[:, None]
    kept, rows, weights = StreamingSVD(12, center=center, forget=forget), [], []
    read = StreamingSVD(12, center=center, forget=forget)
    for b in (1, 700, 3, 60, 60, 2000, 40, 1, 250):
        x = np.zeros((b, rank))
        x[np.arange(b), rng.integers(0, rank, b)] = rng.standard_normal(b)
        x[np.arange(b), rng.integers(0, rank, b)] = rng.standard_normal(b)
        block = sparse.csr_array((x @ basis).astype(dtype))
        kept.update(block)
        read.update(block)
        _ = read.singular_values
        rows.append(x)
        weights = [w * forget for w in weights] + [1.0]
    w = np.concatenate([np.full(len(x), f) for x, f in zip(rows, weights, strict=True)])
    rows = np.concatenate(rows)
    if center:
        rows = rows - (w**2) @ rows / (w**2).sum()
    want = np.zeros(12)
    want[:rank] = np.linalg.svd(w[:, None] * rows @ np.linalg.qr(basis.T)[1].T, compute_uv=False)
    for svd in (kept, read):
        found = svd.singular_values
        assert svd.rows_seen == len(rows)
        assert np.abs(found - want[: len(found)]).max() <= 100 * eps(dtype) * want[0]
        assert np.all(want[len(found) :] <= 100 * eps(dtype) * want[0])
        v = svd.components.astype(np.float64)
        assert np.abs(v @ v.T - np.eye(len(v))).max() <= 10 * eps(dtype) * np.sqrt(12)


def test_sparse_blocks_are_refused_whole(rng):
    svd = StreamingSVD(4).update(sparse.random_array((500, 3000), density=0.01, format="csr", rng=rng))
    before = svd.singular_values.copy()
    bad = sparse.random_array((900, 3000), density=0.01, format="csr", rng=rng)
    bad.data[-1] = np.nan
    for rows in (bad, bad[-40:]):
        with pytest.raises(ValueError, match="finite"):
            svd.update(rows)
        np.testing.assert_array_equal(svd.singular_values, before)
