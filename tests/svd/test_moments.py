"""Streams of common widths, which keep second moments: exact for every rank, and nothing depends on who looks when."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

import subspan
from subspan.svd import StreamingSVD

DTYPES = [np.float32, np.float64]


def eps(dtype):
    return float(np.finfo(dtype).eps)


def reference(blocks, center, forget=1.0):
    """Squared singular values, descending, vectors as rows and the mean of all rows with their weights, in double."""
    x = np.vstack([np.asarray(b, np.float64) for b in blocks])
    w = np.concatenate([np.full(len(b), forget ** (len(blocks) - 1 - i)) for i, b in enumerate(blocks)])
    mean = np.average(x, axis=0, weights=w**2) if center else np.zeros(x.shape[1])
    _, s, vh = np.linalg.svd(w[:, None] * (x - mean), full_matrices=False)
    return s, vh, mean


def data(rng, m, n, dtype, decay=0.97, offset=1.0):
    turn = np.linalg.qr(rng.standard_normal((n, n)))[0]
    return (rng.standard_normal((m, n)) * decay ** np.arange(n) @ turn + offset * rng.standard_normal(n)).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("forget", [1.0, 0.9])
@pytest.mark.parametrize(("n", "rank"), [(17, 3), (60, 10), (150, 30), (260, 5)])
def test_exact_for_every_rank(rng, dtype, center, forget, n, rank):
    """Blocks of all sizes, orders and strides: energies of the full decomposition, which a truncated one loses."""
    x = data(rng, 900, n, dtype)
    cuts = np.split(np.arange(900), [300, 301, 340, 345, 600])
    blocks = [x[c] for c in cuts]
    svd = StreamingSVD(rank, center=center, forget=forget)
    for i, block in enumerate(blocks):
        laid = (block, np.asfortranarray(block), np.repeat(block, 2, 1)[:, ::2], block[::-1][::-1])[i % 4]
        svd.update(laid)
    s, vh, mean = reference(blocks, center, forget)
    assert svd._state.route() == "moments"
    assert svd.rows_seen == 900
    np.testing.assert_allclose(svd.singular_values, s[:rank], atol=20 * eps(dtype) * s[0])
    assert svd.captured_energy == pytest.approx((s[:rank] ** 2).sum(), rel=1e-6)
    left = (s[rank:] ** 2).sum()
    assert svd.residual_energy == pytest.approx(left, rel=1e-4, abs=10 * eps(dtype) * (s**2).sum())
    v = svd.components.astype(np.float64)
    assert np.abs(v @ v.T - np.eye(rank)).max() < 10 * eps(dtype) * np.sqrt(rank)
    shares = np.linalg.norm(v @ vh[:rank].T, axis=1)  # of what is spanned by the true ones
    gap = 1 - (s[rank] / s[rank - 1]) ** 2
    assert (shares > 1 - (200 * eps(dtype) * s[0] ** 2 / s[rank - 1] ** 2 / gap) ** 2 - 10 * eps(dtype)).all()
    if center:
        np.testing.assert_allclose(svd.mean, mean, rtol=10 * eps(dtype), atol=10 * eps(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sparse_rows(rng, dtype):
    x = rng.standard_normal((1200, 300)).astype(dtype)
    x[rng.random(x.shape) < 0.97] = 0
    for offset in (0, 50):  # whose mean is most of it
        x[:, 7] += dtype(offset)
        dense, csr = StreamingSVD(6, center=True), StreamingSVD(6, center=True)
        for i in range(0, 1200, 200):
            dense.update(x[i : i + 200])
            csr.update(sparse.csr_array(x[i : i + 200]))
        s, _, mean = reference([x], True)
        for svd in (dense, csr):
            np.testing.assert_allclose(svd.singular_values, s[:6], atol=20 * eps(dtype) * s[0])
            np.testing.assert_allclose(svd.mean, mean, atol=10 * eps(dtype) * max(1, offset))
            np.testing.assert_allclose(svd.column_variances, x.astype(np.float64).var(0), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("center", [False, True])
def test_merges_and_downdates_are_sums(rng, dtype, center):
    x = data(rng, 1500, 90, dtype)
    parts = [x[:400], x[400:1000], x[1000:]]
    streams = [StreamingSVD(8, center=center).update(p) for p in parts]
    whole = StreamingSVD(8, center=center)
    for i in (2, 0, 1):
        whole.merge(streams[i])
    s, _, mean = reference([x], center)
    np.testing.assert_allclose(whole.singular_values, s[:8], atol=20 * eps(dtype) * s[0])
    assert whole.captured_energy == pytest.approx((s[:8] ** 2).sum(), rel=1e-6)
    assert whole.rows_seen == 1500
    whole.downdate(parts[1])
    s, _, mean = reference([parts[0], parts[2]], center)
    np.testing.assert_allclose(whole.singular_values, s[:8], atol=60 * eps(dtype) * s[0])
    if center:
        np.testing.assert_allclose(whole.mean, mean, atol=20 * eps(dtype))
    before = whole.singular_values
    with pytest.raises(np.linalg.LinAlgError, match="cannot all have been added"):
        whole.downdate(100 * parts[0])
    np.testing.assert_array_equal(whole.singular_values, before)
    twice = StreamingSVD(8, center=center).update(parts[0])
    twice.merge(twice)
    s, _, _ = reference([parts[0], parts[0]], center)
    np.testing.assert_allclose(twice.singular_values, s[:8], atol=20 * eps(dtype) * s[0])


def test_merges_of_both_kinds(rng):
    """A stream of moments and one that has truncated, either way round."""
    x = data(rng, 2000, 200, np.float64, decay=0.8)
    s, _, _ = reference([x], True)
    for first, second in (({}, {"oversample": 20}), ({"oversample": 20}, {})):
        one = StreamingSVD(5, center=True, **first).update(x[:1200])
        two = StreamingSVD(5, center=True, **second).update(x[1200:])
        kept = pickle.dumps(two)
        one.merge(two)
        np.testing.assert_allclose(one.singular_values, s[:5], rtol=1e-5)
        assert pickle.loads(kept).rows_seen == two.rows_seen == 800


@pytest.mark.parametrize("dtype", DTYPES)
def test_states_go_on_bit_by_bit(rng, dtype, tmp_path):
    x = data(rng, 1000, 120, dtype)
    svd = StreamingSVD(7, center=True, forget=0.95)
    for i in range(0, 600, 60):
        svd.update(x[i : i + 60])
    svd.save(tmp_path / "s.npz")
    others = [StreamingSVD.load(tmp_path / "s.npz"), pickle.loads(pickle.dumps(svd)), copy.deepcopy(svd)]
    svd.update(x[600:])
    for other in others:
        other.update(x[600:])
        assert other._state.route() == svd._state.route()
        np.testing.assert_array_equal(other.singular_values, svd.singular_values)
        np.testing.assert_array_equal(other.components, svd.components)
        np.testing.assert_array_equal(other.mean, svd.mean)
        assert other.residual_energy == svd.residual_energy


def test_damaged_moments_are_refused(rng):
    state = StreamingSVD(3).update(rng.standard_normal((300, 40)))._state.state()
    assert state["moments"].shape == (820,)
    for name, bad in (("moments", np.zeros(3)), ("moment_sum", np.full(40, np.nan)), ("moment_figures", -np.ones(8))):
        with pytest.raises(ValueError, match="saved state"):
            StreamingSVD(3)._state.restore({**state, name: bad})


@pytest.mark.parametrize("kappa", [1e3, 1e8, 1e12])
def test_spectra_too_wide_for_squares(rng, kappa):
    """In float64 from the first block on, and from a later one."""
    n, k = 100, 6
    v = np.linalg.qr(rng.standard_normal((n, n)))[0]
    s = np.geomspace(1, 1 / kappa, k)
    u = np.linalg.qr(rng.standard_normal((600, k)))[0]
    x = u * s @ v[:k]
    svd = StreamingSVD(k)
    for i in range(0, 600, 150):
        svd.update(x[i : i + 150])
    assert np.abs(svd.singular_values - s).max() <= 100 * eps(float)
    first = rng.standard_normal((500, n))
    late = StreamingSVD(k).update(first)
    assert late._state.route() == "moments"
    late.update(np.vstack([kappa * v[0], v[1]]))
    late.update(first)
    want = np.linalg.svd(np.vstack([first, kappa * v[:1], v[1:2], first]), compute_uv=False)[:k]
    lost = 0 if late._state.route() == "moments" else late.residual_energy**0.5
    assert np.abs(late.singular_values - want).max() <= 100 * eps(float) * want[0] + 0.2 * lost * (kappa == 1e3)
    assert late.singular_values[0] == pytest.approx(want[0], rel=1e-13)


@pytest.mark.parametrize("n", [60, 200])
@pytest.mark.parametrize("spread", [1e1, 1e3, 1e5])
def test_the_first_block_of_float32_is_measured_in_its_own_products(rng, n, spread):
    """Products of float hold the first spread; the others are found out, and the block is taken in again in double."""
    v = np.linalg.qr(rng.standard_normal((n, 10)))[0].T
    x = (
        rng.standard_normal((1000, 10)) * np.geomspace(1, 1 / spread, 10) @ v
        + 1e-7 * rng.standard_normal((1000, n))
        + 3
    )
    x = x.astype(np.float32)
    svd = StreamingSVD(10, center=True).update(x)
    assert svd._state.route() == "moments"
    s, _, mean = reference([x], True)
    np.testing.assert_allclose(svd.singular_values, s[:10], rtol=5e-7)
    np.testing.assert_allclose(svd.mean, mean, atol=1e-6)
    assert svd.residual_energy == pytest.approx(np.sum(s[10:] ** 2), abs=1e-7 * np.sum(s**2))
    np.testing.assert_allclose(svd.update(x).singular_values, np.sqrt(2) * s[:10], rtol=5e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("large", [1.0, 1e3])
def test_a_first_block_that_is_forgotten_later(rng, dtype, center, large):
    """Also where its spectrum is found out to be too wide for products of float."""
    x = rng.standard_normal((600, 256)) + 0.5
    x[:, 0] *= large
    x = x.astype(dtype)
    svd = StreamingSVD(5, forget=0.5, center=center).update(x)
    s, _, _ = reference([x], center)
    np.testing.assert_allclose(svd.singular_values, s[:5], rtol=1e-5)
    svd.update(x)
    np.testing.assert_allclose(svd.singular_values, np.sqrt(1.25) * s[:5], rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mean_that_moves_far_away(rng, dtype):
    x = rng.standard_normal((2000, 50)).astype(dtype)
    x[300:] += dtype(1000)
    svd = StreamingSVD(4, center=True)
    for i in range(0, 2000, 100):
        svd.update(x[i : i + 100])
    s, _, mean = reference([x], True)
    np.testing.assert_allclose(svd.singular_values, s[:4], atol=20 * eps(dtype) * s[0])
    np.testing.assert_allclose(svd.mean, mean, rtol=20 * eps(dtype))
    late = StreamingSVD(4, center=True, forget=0.5)
    for i in range(0, 2000, 100):
        late.update(x[i : i + 100])
    s, _, _ = reference([x[i : i + 100] for i in range(0, 2000, 100)], True, 0.5)
    np.testing.assert_allclose(late.singular_values, s[:4], atol=100 * eps(dtype) * s[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_who_looks_when_changes_nothing(rng, dtype):
    x = data(rng, 3000, 80, dtype)
    one, two = StreamingSVD(5, center=True), StreamingSVD(5, center=True)
    for i in range(0, 3000, 100):
        one.update(x[i : i + 100])
        two.update(x[i : i + 100])
        two.project(x[:30]), two.components, two.column_variances
    np.testing.assert_array_equal(one.components, two.components)
    np.testing.assert_array_equal(one.singular_values, two.singular_values)
    assert one.residual_energy == two.residual_energy


def test_signs_stay_along_a_stream(rng):
    x = data(rng, 4000, 70, np.float64, decay=0.7)
    svd, last = StreamingSVD(4, center=True), None
    for i in range(0, 4000, 80):
        now = svd.update(x[i : i + 80]).components
        if last is None:
            assert (now[np.arange(4), np.abs(now).argmax(1)] > 0).all()
        else:
            assert ((now * last).sum(1) > 0).all()
        last = now


def test_a_block_that_fails_leaves_all_as_it_was(rng):
    svd = StreamingSVD(4, center=True).update(rng.standard_normal((300, 50)))
    before = pickle.dumps(svd)
    for bad in (np.full((400, 50), np.nan), np.full((400, 50), 1.7e308) * np.where(np.arange(400) % 2, 1, -1)[:, None]):
        with pytest.raises(ValueError, match="rows"):
            svd.update(bad)
        assert pickle.dumps(svd) == before


def test_results_do_not_depend_on_threads(rng):
    x = rng.standard_normal((3000, 500))
    found, before = [], subspan.get_num_threads()
    try:
        for threads in (1, 2):
            subspan.set_num_threads(threads)
            svd = StreamingSVD(9, center=True)
            for i in range(0, 3000, 1000):
                svd.update(x[i : i + 1000])
            found.append((svd.components, svd.singular_values))
    finally:
        subspan.set_num_threads(before)
    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_array_equal(found[0][1], found[1][1])


@pytest.mark.parametrize(
    "options", [{"method": "robust"}, {"method": "gram"}, {"oversample": 9}, {"exact_blocks": True}]
)
def test_who_asks_for_another_way_gets_it(rng, options):
    svd = StreamingSVD(3, **options).update(rng.standard_normal((300, 40))).update(rng.standard_normal((300, 40)))
    assert svd._state.route() != "moments"


# -- scores between updates of single rows -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [40, 300, 1500])
@pytest.mark.parametrize("center", [False, True])
def test_scores_between_single_rows(rng, dtype, n, center):
    """Near those of the exact components, in a stream that neither solves nor folds for them."""
    k = 4
    x = (rng.standard_normal((500, k)) * [9, 7, 5, 3] @ rng.standard_normal((k, n)) / np.sqrt(n)).astype(dtype)
    x += dtype(0.02) * rng.standard_normal(x.shape).astype(dtype) + dtype(3)
    svd = StreamingSVD(k, center=center).update(x[:20])
    for i in range(20, 260):
        score, z = svd.residual(x[i]), svd.project(x[i])
        svd.update(x[i])
        assert z.shape == (k,)
        assert score.dtype == z.dtype == dtype
        if i % 40 == 0:
            exact = StreamingSVD(k, center=center, oversample=min(n, 300) - k).update(x[:i])
            assert score == pytest.approx(float(exact.residual(x[i])), rel=0.05)
            want = exact.project(x[i])
            np.testing.assert_allclose(np.abs(z), np.abs(want), atol=0.05 * np.abs(want).max())
    few = svd.project(x[:3])
    back = svd.reconstruct(few)
    np.testing.assert_allclose(((x[:3] - back) ** 2).sum(1), svd.residual(x[:3]), rtol=1e-3)
    svd.components  # noqa: B018 - solves
    v, mean = svd.components.astype(float), svd.mean.astype(float) if center else 0
    np.testing.assert_allclose(
        svd.project(x[:3]), (x[:3] - mean) @ v.T, atol=100 * eps(dtype) * np.abs(x[:3]).max() * n
    )


def test_scores_of_forgetting_streams_follow(rng):
    n, k = 60, 2
    a, b = (np.linalg.qr(rng.standard_normal((n, k)))[0] for _ in range(2))
    svd = StreamingSVD(k, forget=0.9).update(rng.standard_normal((40, k)) @ a.T)
    for _ in range(200):
        row = rng.standard_normal(k) @ b.T + 1e-3 * rng.standard_normal(n)
        score = svd.residual(row)
        svd.update(row)
    assert score < 1e-3


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_sequence_of_calls(d):
    """Updates of any size, scores, merges, downdates and forgetting, against all rows at once."""
    rng = np.random.default_rng(d.draw(st.integers(0, 2**31)))
    n, k = d.draw(st.integers(2, 70)), d.draw(st.integers(1, 6))
    k = min(k, n)
    dtype = d.draw(st.sampled_from(DTYPES))
    center = d.draw(st.booleans())
    svd, rows = StreamingSVD(k, center=center), np.zeros((0, n), dtype)
    for _ in range(d.draw(st.integers(1, 12))):
        kind = d.draw(st.sampled_from(["block", "block", "row", "score", "merge", "downdate", "copy"]))
        b = d.draw(st.sampled_from([1, 2, 7, 40, 150]))
        x = rng.standard_normal((b, n)).astype(dtype)
        if kind == "block" or not len(rows):
            svd.update(x)
            rows = np.vstack([rows, x])
        elif kind == "row":
            for y in x[:20]:
                svd.residual(y)
                svd.update(y)
            rows = np.vstack([rows, x[:20]])
        elif kind == "score":
            assert np.isfinite(svd.residual(x)).all()
        elif kind == "merge":
            svd.merge(StreamingSVD(k, center=center).update(x))
            rows = np.vstack([rows, x])
        elif kind == "copy":
            svd = pickle.loads(pickle.dumps(svd))
        elif len(rows) > 2 * b + n:
            svd.downdate(rows[:b])
            rows = rows[b:]
    s, _, _ = reference([rows], center)
    got, count = svd.singular_values, min(len(svd.singular_values), len(s))
    assert count == min(k, len(rows) - center, n) or s[count] < 1e-3 * s[0]
    np.testing.assert_allclose(got[:count], s[:count], atol=200 * eps(dtype) * s[0])
    assert svd.rows_seen == len(rows)


# -- ends of ranges, and what goes before ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("center", [False, True])
def test_all_rows_may_go(rng, dtype, center):
    """And all but a few: what is left of squares is rounding, and no direction of it is shown."""
    x = rng.standard_normal((300, 40)).astype(dtype)
    svd = StreamingSVD(3, center=center).update(x[:150]).update(x[150:])
    few = copy.deepcopy(svd)
    svd.downdate(x)
    assert svd.rows_seen == 0
    assert svd.captured_energy < 1e-3
    svd.update(x[:100])
    np.testing.assert_allclose(svd.singular_values, reference([x[:100]], center)[0][:3], rtol=1e-3)
    few.downdate(x[:298])
    s = reference([x[298:]], center)[0][: 1 if center else 2]
    got = few.singular_values
    before = np.linalg.norm(x.astype(float), 2)
    np.testing.assert_allclose(got[: len(s)], s, atol=200 * eps(dtype) * before)
    assert (got[len(s) :] <= 4 * np.sqrt(eps(dtype)) * before * (dtype is np.float64)).all()
    pickle.loads(pickle.dumps(few)).update(x)


def test_scores_forget_what_followed_before_a_block(rng):
    a, b = (rng.standard_normal((m, 3)) @ rng.standard_normal((3, 40)) for m in (200, 400))
    svd = StreamingSVD(3).update(a)
    svd.update(a[0])
    svd.residual(a[0])
    svd.update(1e3 * b)
    svd.update(b[0])
    assert svd.residual(b[1]) < 1e-3 * (b[1] ** 2).sum()


@pytest.mark.parametrize(
    ("dtype", "scale"), [(np.float64, 1e160), (np.float64, 1e-170), (np.float32, 1e21), (np.float32, 1e-25)]
)
def test_scores_at_the_ends_of_the_range(rng, dtype, scale):
    x = (rng.standard_normal((200, 3)) @ rng.standard_normal((3, 40)) * scale).astype(dtype)
    svd = StreamingSVD(3).update(x)
    for row in x[:30]:
        z = svd.project(row)
        svd.update(row)
        near = float(scale)
        assert np.linalg.norm(z / near) == pytest.approx(np.linalg.norm(row / near), rel=1e-3)
    assert svd.rows_seen == 230
    assert np.isfinite(svd.singular_values).all()


def test_rows_far_from_the_first_mean(rng):
    """Entries are small and their distance to the shift is not: no product of float overflows."""
    large = ((rng.standard_normal((1000, 32)) + 1) * 1e20).astype(np.float32)
    svd = StreamingSVD(8, center=True).update(large).update(rng.standard_normal((300, 32)).astype(np.float32))
    assert np.isfinite(svd.singular_values).all()


def test_constant_columns_do_not_spoil_a_saved_state(rng):
    for seed in range(10):
        r = np.random.default_rng(seed)
        x = r.standard_normal((300, 40)).astype(np.float32)
        x[r.random(x.shape) < 0.95] = 0
        x[:, 5] = 10
        y = (10 + r.standard_normal((300, 40))).astype(np.float32)
        y[:, 5] = 10
        svd = StreamingSVD(3, center=True).update(sparse.csr_array(x)).update(y)
        other = pickle.loads(pickle.dumps(svd))
        np.testing.assert_array_equal(other.singular_values, svd.singular_values)


def test_a_thin_block_that_fails_takes_no_forgetting_with_it(rng):
    x = rng.standard_normal((400, 60))
    svd = StreamingSVD(3, forget=0.5, center=True).update(x)
    svd.update(x[:29])
    before = copy.deepcopy(svd)
    with pytest.raises(ValueError, match="too large"):
        svd.update(np.full((29, 60), 1e308))
    svd.update(x[:100])
    before.update(x[:100])
    np.testing.assert_array_equal(svd.singular_values, before.singular_values)


def test_signs_go_on_where_moments_begin(rng):
    for seed in range(30):
        r = np.random.default_rng(seed)
        direction = np.linalg.qr(r.standard_normal((40, 1)))[0].T
        x = r.standard_normal((110, 1)) @ direction * 3 + 0.3 * r.standard_normal((110, 40))
        svd = StreamingSVD(1).update(x[:10])
        first = svd.components
        assert (first * svd.update(x[10:]).components).sum() > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["decay", "gap", "fewer than the rank", "none"])
def test_read_after_every_block(rng, dtype, kind):
    """Solutions begin from directions that follow the stream: as if nobody had looked before, and those of all rows."""
    n, rank, b = 256, 6, 40
    scale = {
        "decay": 0.9 ** np.arange(n),
        "gap": np.where(np.arange(n) < rank, 1, 0.05),
        "fewer than the rank": np.arange(n) < 4,
        "none": np.ones(n),
    }[kind]
    turn = np.linalg.qr(rng.standard_normal((n, n)))[0]
    x = (rng.standard_normal((16 * b, n)) * scale @ turn).astype(dtype)
    svd, unread = StreamingSVD(rank), StreamingSVD(rank)
    for i in range(0, len(x), b):
        svd.update(x[i : i + b])
        unread.update(x[i : i + b])
        s = np.linalg.svd(x[: i + b].astype(np.float64), compute_uv=False)
        k = len(svd.singular_values)
        np.testing.assert_allclose(svd.singular_values, s[:k], atol=20 * eps(dtype) * s[0])
        assert svd.captured_energy == pytest.approx((s[:rank] ** 2).sum(), rel=1e-6)
        v = svd.components.astype(np.float64)
        assert np.abs(v @ v.T - np.eye(k)).max() < 10 * eps(dtype) * np.sqrt(rank)
        square = v @ x[: i + b].T.astype(np.float64) @ x[: i + b]
        assert np.abs(square - s[:k, None] ** 2 * v).max() < 40 * eps(dtype) * s[0] ** 2
    np.testing.assert_array_equal(svd.components, unread.components)
    np.testing.assert_array_equal(svd.singular_values, unread.singular_values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("louder", [1.0, 1.5, 30.0])
def test_rows_that_share_nothing_with_those_before(rng, dtype, louder):
    """Directions orthogonal to all so far are found, although no product leads to them, and however many they are."""
    n, rank, m = 320, 5, 60
    svd = StreamingSVD(rank)
    x = np.zeros((0, n), dtype)
    for i in range(4):
        block = np.zeros((m, n), dtype)
        block[:, 80 * i : 80 * i + 80] = louder**i * rng.standard_normal((m, 80)) * 0.9 ** np.arange(80)
        for rows in (block[:20], block[20:]):
            svd.update(rows)
            x = np.vstack([x, rows])
            s = np.linalg.svd(x.astype(np.float64), compute_uv=False)
            np.testing.assert_allclose(svd.singular_values, s[:rank], atol=20 * eps(dtype) * s[0])
            assert svd.captured_energy == pytest.approx((s[:rank] ** 2).sum(), rel=1e-6)


def test_scores_after_a_fold_are_those_of_what_is_shown(rng):
    svd = StreamingSVD(3, center=True).update(data(rng, 30, 50, np.float64))
    x = data(rng, 40, 50, np.float64)
    for row in x:
        svd.residual(row)
        svd.update(row)
    pickle.dumps(svd)
    z = svd.project(x[:2])
    np.testing.assert_allclose(z, (x[:2] - svd.mean) @ svd.components.T, atol=1e-9)
