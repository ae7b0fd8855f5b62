"""A streaming SVD on a device against the exact one, and against the CPU's stream."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

from references import orthogonality
from subspan._lib.files import sealed_state
from subspan.orth import GradientProjector
from subspan.svd import StreamingSVD, truncated_svd

EPS = float(np.finfo(np.float32).eps)


def error(svd, A, k):
    """How far a stream is from the best rank k and from orthonormal, as a share of what the contracts allow."""
    _, s, vh = np.linalg.svd(A.astype(np.float64), full_matrices=False)
    values, v = svd.singular_values.get(), svd.components.get()
    eps = float(np.finfo(values.dtype).eps)
    values, v = values.astype(np.float64), v.astype(np.float64)
    assert values.shape == (k,)
    gap = s[k - 1] - (s[k] if k < len(s) else 0.0)
    off = v - (v @ vh[:k].T) @ vh[:k]
    return max(
        np.abs(v @ v.T - np.eye(k)).max() / (10 * eps * np.sqrt(k)),
        np.abs(values - s[:k]).max() / (100 * eps * s[0]),
        np.linalg.norm(off, 2) / (1e3 * eps * s[0] / gap),
    )


@pytest.mark.parametrize(("n", "k", "b"), [(40, 4, 10), (30, 6, 1), (150, 3, 9), (12, 12, 5)])
@pytest.mark.parametrize("center", [False, True])
def test_a_stream_of_exact_rank(gpu, rng, n, k, b, center):
    k_data = k - 1 if center else k
    A = rng.standard_normal((3 * b + 10, max(k_data, 1))) @ rng.standard_normal((max(k_data, 1), n))
    A = (A + (3.0 if center else 0.0)).astype(np.float32)
    svd = StreamingSVD(k, center=center, oversample=3)
    for i in range(0, len(A), b):
        assert svd.update(gpu.put(A[i : i + b])) is svd
    assert svd.rows_seen == len(A)
    exact = A.astype(np.float64) - (A.astype(np.float64).mean(0) if center else 0.0)
    found = svd.singular_values.get()
    m = min(len(found), max(k_data, 1))
    s = np.linalg.svd(exact, compute_uv=False)
    assert np.abs(found[:m] - s[:m]).max() <= 100 * EPS * s[0]
    v = svd.components.get().astype(np.float64)
    assert np.abs(v @ v.T - np.eye(len(v))).max() <= 10 * EPS * np.sqrt(len(v))
    if center:
        np.testing.assert_allclose(svd.mean.get(), A.mean(0, dtype=np.float64), atol=1e-5)
    total = (exact**2).sum()
    assert abs(svd.captured_energy + svd.residual_energy - total) <= 1e-5 * total


@pytest.mark.parametrize("forget", [1.0, 0.9])
@pytest.mark.parametrize("center", [False, True])
def test_as_the_stream_on_the_cpu(gpu, rng, forget, center):
    ours, theirs = (StreamingSVD(5, forget=forget, center=center, oversample=10) for _ in range(2))
    scale = 2.0 ** -np.arange(36)[None, :]
    for _ in range(5):
        X = (rng.standard_normal((12, 36)) * np.maximum(scale, 0.01) + 0.5).astype(np.float32)
        ours.update(gpu.put(X))
        theirs.update(X)
    np.testing.assert_allclose(ours.singular_values.get(), theirs.singular_values, rtol=2e-3)
    # Signs follow the update before, as there.
    np.testing.assert_allclose(np.abs((ours.components.get() * theirs.components).sum(1)), 1, atol=2e-3)
    Y = rng.standard_normal((7, 36)).astype(np.float32)
    z = ours.project(gpu.put(Y))
    assert z.shape == (7, 5)
    np.testing.assert_allclose(ours.residual(gpu.put(Y)).get(), theirs.residual(Y), rtol=2e-2)
    back = ours.reconstruct(z).get()
    mean = ours.mean.get() if center else 0.0
    np.testing.assert_allclose(back, z.get() @ ours.components.get() + mean, atol=1e-5)


@pytest.mark.parametrize("center", [False, True])
def test_any_strides(gpu, rng, center):
    A = rng.standard_normal((30, 12)).astype(np.float32)
    svd = StreamingSVD(4, center=center).update(gpu.put(A))
    for width in (2, 1):
        X = gpu.put(np.repeat(A, width, axis=1))[:, ::width]
        z = svd.project(gpu.put(A)).get()
        wide = gpu.put(np.zeros((30, 4 * width), np.float32))
        out = svd.project(X, out=wide[:, ::width])
        np.testing.assert_allclose(out.get(), z, atol=1e-5)
        back = svd.reconstruct(gpu.put(z)).get()
        np.testing.assert_allclose(svd.reconstruct(out).get(), back, atol=1e-5)
        np.testing.assert_allclose(svd.reconstruct(out[3]).get(), back[3], atol=1e-5)
        wide = gpu.put(np.zeros((30, 12 * width), np.float32))
        np.testing.assert_allclose(svd.reconstruct(out, out=wide[:, ::width]).get(), back, atol=1e-5)


def test_results_are_fresh_arrays(gpu, rng):
    svd = StreamingSVD(3, center=True, oversample=1).update(gpu.put(rng.standard_normal((10, 8))))
    first = [svd.singular_values, svd.components, svd.mean]
    kept = [x.get() for x in first]
    svd.update(gpu.put(rng.standard_normal((10, 8))))
    for x, before in zip(first, kept, strict=True):
        np.testing.assert_array_equal(x.get(), before)


def test_rows_that_another_stream_has_refused(gpu, rng):
    one, other = (StreamingSVD(3).update(gpu.put(rng.standard_normal((20, 8)).astype(np.float32))) for _ in range(2))
    other.update(gpu.put(np.full((5, 8), np.nan, np.float32)))
    one.merge(other)
    with pytest.raises(ValueError, match="5 rows held NaN"):
        one.singular_values  # noqa: B018
    assert one.rows_seen == 40


def test_bits_do_not_depend_on_the_order_of_threads(gpu, rng):
    X = rng.standard_normal((3, 20, 50)).astype(np.float32)

    def run():
        svd = StreamingSVD(6, oversample=10)  # a core of more than one block
        for x in X:
            svd.update(gpu.put(x))
        return svd.components, svd.singular_values

    components, values = (x.get() for x in gpu.twice(run))
    assert (components.shape, values.shape) == ((6, 50), (6,))
    assert orthogonality(components) <= 1


def test_signs_are_stable(gpu, rng):
    base = rng.standard_normal((3, 30))
    svd = StreamingSVD(3, oversample=2)
    last = None
    for _ in range(4):
        svd.update(gpu.put((rng.standard_normal((10, 3)) * [9, 3, 1] @ base).astype(np.float32)))
        v = svd.components.get()
        if last is not None:
            assert ((v * last).sum(1) > 0).all()
        last = v


def test_tall_blocks_are_split(emulation, rng):
    emulation.control.hardware(8, 99000)
    A = (rng.standard_normal((300, 4)) @ rng.standard_normal((4, 30))).astype(np.float32)
    svd = StreamingSVD(4, oversample=4).update(emulation.put(A))
    assert error(svd, A, 4) <= 1
    bad = A.copy()
    bad[299, 3] = np.nan
    before = svd.components.get()
    svd.update(emulation.put(bad))  # all of it is left out, not only its last rows
    with pytest.raises(ValueError, match="300 rows held NaN"):
        svd.captured_energy  # noqa: B018
    assert svd.rows_seen == 300
    np.testing.assert_array_equal(before, svd.components.get())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("method", ["auto", "robust"])
def test_cores_of_any_size(emulation, rng, dtype, method):
    emulation.control.hardware(8, 99000)  # no clusters: rows of 32 and more in turns
    A = (rng.standard_normal((150, 30)) * 0.8 ** np.arange(30) @ rng.standard_normal((30, 160))).astype(dtype)
    svd = StreamingSVD(30, oversample=0, method=method)
    for i in range(0, 150, 50):
        svd.update(emulation.put(A[i : i + 50]))
    assert error(svd, A, 30) <= 1


def test_cores_in_small_clusters(emulation, rng):
    emulation.control.cluster(2)
    A = (rng.standard_normal((150, 30)) * 0.8 ** np.arange(30) @ rng.standard_normal((30, 160))).astype(np.float32)
    svd = StreamingSVD(30, oversample=0)
    for i in range(0, 150, 50):
        svd.update(emulation.put(A[i : i + 50]))
    assert error(svd, A, 30) <= 1


@pytest.mark.parametrize("hardware", [(9, 232448), (8, 99000)])
def test_more_rows_than_columns(emulation, rng, hardware):
    """Some of them depend on the others, and must end as nothing instead of being rotated for ever."""
    emulation.control.hardware(*hardware)
    n = 36
    A = [
        (rng.standard_normal((30, 30)) * 0.5 ** np.arange(30)) @ np.linalg.qr(rng.standard_normal((n, 30)))[0].T
        for _ in range(2)
    ]
    svd = StreamingSVD(8)
    for block in A:
        svd.update(emulation.put(block))
    assert error(svd, np.vstack(A), 8) <= 1


@pytest.mark.parametrize("kappa", [1e3, 1e8, 1e12])
def test_streams_of_float64_keep_small_values(gpu, rng, kappa):
    k = 6
    u, v = (np.linalg.qr(rng.standard_normal((n, k)))[0] for n in (90, 50))
    A = (u * np.geomspace(1, 1 / kappa, k)) @ v.T
    svd = StreamingSVD(k, oversample=4)
    for i in range(0, 90, 30):
        svd.update(gpu.put(A[i : i + 30]))
    s = np.geomspace(1, 1 / kappa, k)
    assert np.abs(svd.singular_values.get() - s).max() <= 100 * np.finfo(np.float64).eps
    w = svd.components.get()
    assert np.abs(w @ w.T - np.eye(k)).max() <= 10 * np.finfo(np.float64).eps * np.sqrt(k)


@pytest.mark.parametrize("center", [False, True])
def test_merge_and_save(gpu, rng, tmp_path, center):
    A = (rng.standard_normal((80, 5)) @ rng.standard_normal((5, 40)) + 2.0).astype(np.float32)
    rank = 7
    parts = [StreamingSVD(rank, center=center, oversample=0) for _ in range(3)]
    for part, rows in zip(parts, np.split(A, [20, 50]), strict=True):
        part.update(gpu.put(rows))
    merged = StreamingSVD(rank, center=center, oversample=0)
    for part in parts:
        assert merged.merge(part) is merged
    exact = A.astype(np.float64) - (A.mean(0, dtype=np.float64) if center else 0.0)
    s = np.linalg.svd(exact, compute_uv=False)
    m = min(merged.singular_values.shape[0], 6)
    assert np.abs(merged.singular_values.get()[:m] - s[:m]).max() <= 100 * EPS * s[0]
    assert merged.rows_seen == 80
    if center:
        np.testing.assert_allclose(merged.mean.get(), A.mean(0, dtype=np.float64), atol=1e-5)
    merged.save(tmp_path / "stream.npz")
    again = StreamingSVD.load(tmp_path / "stream.npz")
    for x in (again, pickle.loads(pickle.dumps(merged))):
        np.testing.assert_array_equal(x.components.get(), merged.components.get())
        np.testing.assert_array_equal(x.singular_values.get(), merged.singular_values.get())
        assert x.rows_seen == 80
        assert repr(x) == repr(merged)
    state = merged.__getstate__()
    for name in ("device_values", "device_totals", *(["device_mean"] if center else [])):
        with pytest.raises(ValueError, match=f"{name[7:]} is missing"):
            StreamingSVD(1).__setstate__(sealed_state({**state, name: None}))
    more = gpu.put(A[:10])
    np.testing.assert_array_equal(again.update(more).components.get(), merged.update(more).components.get())
    with pytest.raises(TypeError, match="other must be float64 as the stream is, got float32"):
        StreamingSVD(rank, center=center, dtype=np.float64).merge(merged)
    twice = copy.copy(merged)
    twice.merge(twice)
    assert np.abs(twice.singular_values.get()[:m] - 2**0.5 * merged.singular_values.get()[:m]).max() <= 1e-4 * s[0]
    with pytest.raises(ValueError, match="other must have 40 columns, got 20"):
        merged.merge(StreamingSVD(2, center=center).update(gpu.put(A[:, :20])))
    with pytest.raises(TypeError, match="other is on the CPU"):
        merged.merge(StreamingSVD(2, center=center).update(A))


def test_a_wide_spread_of_values(gpu, rng):
    u, v = (np.linalg.qr(rng.standard_normal((n, 5)))[0] for n in (80, 40))
    A = ((u * [1, 1e-1, 1e-2, 1e-3, 1e-5]) @ v.T).astype(np.float32)
    svd = StreamingSVD(5, oversample=3)
    for i in range(0, 80, 16):
        svd.update(gpu.put(A[i : i + 16]))
    s = np.linalg.svd(A.astype(np.float64), compute_uv=False)
    assert np.abs(svd.singular_values.get() - s[:5]).max() <= 100 * EPS * s[0]
    w = svd.components.get().astype(np.float64)
    assert np.abs(w @ w.T - np.eye(5)).max() <= 10 * EPS * np.sqrt(5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rows_that_are_not_finite_change_nothing(gpu, rng, value):
    svd = StreamingSVD(3, center=True).update(gpu.put(rng.standard_normal((20, 8)).astype(np.float32)))
    before = svd.components.get(), svd.singular_values.get(), svd.mean.get()
    bad = rng.standard_normal((4, 8)).astype(np.float32)
    bad[2, 5] = value
    svd.update(gpu.put(bad))
    with pytest.raises(ValueError, match="4 rows held NaN or infinity"):
        svd.singular_values  # noqa: B018
    for a, b in zip(before, (svd.components.get(), svd.singular_values.get(), svd.mean.get()), strict=True):
        np.testing.assert_array_equal(a, b)


def test_copies_energy_and_what_is_refused(gpu, rng):
    X = rng.standard_normal((30, 20)).astype(np.float32)
    svd = StreamingSVD(4, energy=0.3, oversample=2).update(gpu.put(X))
    assert 1 <= svd.singular_values.shape[0] <= 4
    other = copy.copy(svd)
    svd.update(gpu.put(X))
    assert other.rows_seen == 30
    assert svd.rows_seen == 60
    assert "on CUDA device 0" in repr(svd)
    with pytest.raises(TypeError, match="rows is on the CPU and the stream on a CUDA device"):
        svd.update(X)
    with pytest.raises(ValueError, match=r"rows must have shape \(b, 20\)"):
        svd.update(gpu.put(X[:, :5]))
    with pytest.raises(TypeError, match="rows must be float32 as the stream is, got float64"):
        svd.update(gpu.put(X.astype(np.float64)))
    with pytest.raises(TypeError, match="downdate is not implemented on CUDA devices"):
        svd.downdate(gpu.put(X))
    with pytest.raises(ValueError, match="rank must be at most the number of columns"):
        StreamingSVD(40).update(gpu.put(X))
    on_host = StreamingSVD(4).update(X)
    with pytest.raises(TypeError, match="on the CPU as the stream's first rows were"):
        on_host.update(gpu.put(X))


def test_many_short_rows_make_a_value_together(gpu):
    """None of them counts beside the first row, but they point the same way."""
    n = 80
    rows = np.zeros((62, n), np.float32)
    rows[0, 0] = 1
    rows[range(1, 61), range(1, 61)] = 1e-6
    rows[61, 1:61] = 1.7e-6
    stream = StreamingSVD(3, oversample=2).update(gpu.put(rows))
    want = np.linalg.svd(rows.astype(np.float64), compute_uv=False)
    values = np.zeros(3)
    found = gpu.get(stream.singular_values)
    values[: len(found)] = found
    assert np.abs(values - want[:3]).max() <= 100 * EPS


@pytest.mark.parametrize(("hardware", "method"), [((9, 232448), "auto"), ((8, 99000), "auto"), ((8, 99000), "robust")])
def test_what_does_not_settle_is_refused(emulation, rng, hardware, method):
    """Rotations end at a number of sweeps that has not been seen; whatever is left then is no result."""
    emulation.control.hardware(*hardware)
    A = rng.standard_normal((2, 50, 80)).astype(np.float32)
    svd = StreamingSVD(40, oversample=0, method=method)
    svd.update(emulation.put(A[0]))
    before = svd.components.get()
    emulation.control.sweeps(2)
    svd.update(emulation.put(A[1]))
    with pytest.raises(ValueError, match=r"50 rows held NaN or infinity, or .* did not settle"):
        svd.captured_energy  # noqa: B018
    np.testing.assert_array_equal(before, svd.components.get())
    assert svd.rows_seen == 50
    assert np.isnan(truncated_svd(emulation.put(A[0]), 40, rng=0).S.get()).all()
    with pytest.raises(ValueError, match="did not settle"):
        GradientProjector(40).down(emulation.put(A[0]))
    emulation.control.sweeps(0)
    svd.update(emulation.put(A[1]))
    assert svd.rows_seen == 100


def test_streams_on_a_device_that_is_not_current(emulation, rng):
    emulation.control.devices(2, 0)
    A = rng.standard_normal((60, 20)).astype(np.float32)
    rows = emulation.xp.asarray(A, 1)
    svd = StreamingSVD(4, center=True)
    svd.update(rows)
    assert emulation.xp.cuda.current == 0
    want = StreamingSVD(4, center=True)
    want.update(A)
    for name in ("project", "residual"):
        got = getattr(svd, name)(rows)
        assert got.device.id == 1
        np.testing.assert_allclose(np.abs(got.get()), np.abs(getattr(want, name)(A)), rtol=1e-3, atol=1e-3)
    there = svd.reconstruct(svd.project(rows))
    np.testing.assert_allclose(there.get(), want.reconstruct(want.project(A)), atol=1e-4)


@pytest.mark.parametrize(("name", "oversample"), [("lorentz", 6), ("gauss", 0), ("rows", 0)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("method", ["gram", "robust"])
def test_vectors_of_smooth_snapshots(gpu, name, dtype, method, oversample):
    """Against the decomposition of what the stream was given: its state before, and the block."""
    t, x = np.linspace(0, 1, 60)[:, None], np.linspace(0, 1, 200)[None]
    a = {
        "lorentz": 1 / (1 + ((x - t) / 0.1) ** 2),
        "gauss": np.exp(-(((x - t) / 0.15) ** 2)),
        "rows": (1 / (1 + ((x - t) / 0.1) ** 2)).T,
    }[name].astype(dtype)
    eps = float(np.finfo(dtype).eps)
    svd = StreamingSVD(8, oversample=oversample, method=method)
    for begin, end in ((0, 25), (25, 32), (32, 60)):
        past = np.zeros((0, a.shape[1]))
        if svd.rows_seen:
            there = svd._state.state()
            past = (
                there["device_values"][: there["device_rank"], None]
                * there["device_components"][: there["device_rank"]]
            )
        svd.update(gpu.put(a[begin:end]))
        _, s, vh = np.linalg.svd(np.vstack([past, a[begin:end].astype(np.float64)]), full_matrices=False)
        found, values = svd.components.get().astype(np.float64), svd.singular_values.get()
        gram = method == "gram"  # of doubles, which loses what is below 2e-6 of the first value
        assert np.abs(values - s[: len(found)]).max() <= max(20 * eps, 2.1e-6 if gram else 0) * s[0]
        for k in range(1, len(found) + 1):
            if gram and s[k - 1] < 3e-6 * s[0]:
                break
            gap = s[k - 1] - (s[k] if k < len(s) else 0)
            off = np.linalg.norm(found[:k] - (found[:k] @ vh[:k].T) @ vh[:k], 2)
            allowed = 60 * eps + (60 * 2.2e-16 * s[0] / s[k - 1] if gram else 0)
            assert off <= allowed * s[0] / gap + 60 * eps, (k, off * gap / s[0] / eps)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("center", [False, True])
def test_errors_do_not_add_up_over_updates(gpu, rng, dtype, center):
    updates = 200 if dtype == np.float32 else 60
    a = ((rng.standard_normal((4 * updates, 6)) + 3 * center) * 2.0 ** -np.arange(6)).astype(dtype)
    svd = StreamingSVD(6, center=center)
    for begin in range(0, 4 * updates, 4):
        svd.update(gpu.put(a[begin : begin + 4]))
    exact = a.astype(np.longdouble)
    exact = exact - exact.mean(0) if center else exact
    s = np.sqrt(np.linalg.eigvalsh((exact.T @ exact).astype(np.float64))[::-1])
    eps = float(np.finfo(dtype).eps)
    assert np.abs(svd.singular_values.get() - s).max() <= (2 if dtype == np.float32 else 20) * eps * s[0]
    v = svd.components.get().astype(np.float64)
    assert np.abs(v @ v.T - np.eye(6)).max() <= 10 * eps * 6**0.5


@pytest.mark.parametrize("options", [{"signs": "v"}, {"exact_blocks": True}, {"weight": np.ones(5)}])
def test_options_of_streams_that_have_no_kernel(gpu, rng, options):
    with pytest.raises(TypeError, match="not implemented on CUDA devices"):
        StreamingSVD(2, **options).update(gpu.put(rng.standard_normal((4, 5))))
    there = StreamingSVD(2).update(gpu.put(rng.standard_normal((4, 5))))
    with pytest.raises(TypeError, match="not implemented on CUDA devices"):
        StreamingSVD(2, **options).merge(there)
