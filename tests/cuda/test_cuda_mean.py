"""Karcher means on a device against the CPU's in float64."""

from __future__ import annotations

import numpy as np
import pytest

from references import eps, points, wide
from subspan import grassmann

DTYPES = [np.dtype(np.float32), np.dtype(np.float64)]
IDS = ["f32", "f64"]


def cloud(rng, count, n, k, batch, dtype, spread):
    U = points(rng, n, k, batch, np.float64)
    H = spread * rng.standard_normal((count, *batch, n, k)) / np.sqrt(n)
    return grassmann.retract(np.broadcast_to(U, H.shape), H, project=True).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize(
    ("count", "n", "k", "batch"),
    [(5, 20, 3, ()), (3, 16, 5, (2, 2)), (3, 20, 10, ()), (4, 6, 1, (3,)), (2, 300, 2, ())],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_means(gpu, rng, dtype, count, n, k, batch, weighted):
    U = cloud(rng, count, n, k, batch, dtype, 0.4)
    weights = None
    if weighted:
        weights = rng.random(count)
        weights[0] = 0
        U[0] = np.nan  # of no weight
    got = gpu.twice(lambda: grassmann.mean(gpu.put(U), weights, full_output=True).mean)
    found = grassmann.mean(gpu.put(U), weights, full_output=True)
    want = grassmann.mean(wide(U)[1:], weights[1:], full_output=True, check=False) if weighted else None
    want = want or grassmann.mean(wide(U), full_output=True, check=False)
    assert np.shape(found.variance) == batch
    assert np.all(found.converged)
    apart = grassmann.distance(wide(gpu.get(got)), wide(want.mean), check=False)
    assert np.max(apart) <= 200 * eps(dtype) * np.sqrt(k)
    np.testing.assert_allclose(found.variance, want.variance, rtol=100 * eps(dtype), atol=100 * eps(dtype))
    g = wide(gpu.get(got))
    assert np.abs(np.swapaxes(g, -1, -2) @ g - np.eye(k)).max() <= 10 * eps(dtype) * np.sqrt(k)


def test_where_it_begins_and_ends(gpu, rng):
    U = cloud(rng, 4, 20, 3, (2,), np.float64, 0.3)
    start = U[1]
    out = gpu.put(np.zeros((2, 20, 3)))
    assert grassmann.mean(gpu.put(U), initial=gpu.put(start), out=out) is out
    assert np.max(grassmann.distance(gpu.get(out), grassmann.mean(U, initial=start))) <= 1e-12
    heard = []
    found = grassmann.mean(
        gpu.put(U), gpu.put(np.ones(4)), full_output=True, progress=lambda *report: heard.append(report)
    )
    assert {j for j, *_ in heard} == {0, 1}
    for j in (0, 1):
        mine = [report for report in heard if report[0] == j]
        assert [i for _, i, _, _ in mine] == list(range(int(found.iterations[j])))
        assert mine[-1][2] > found.gradient_norm[j]
    with pytest.warns(RuntimeWarning, match="2 of 2 means did not reach"):
        grassmann.mean(gpu.put(U), max_iterations=1)
    none = grassmann.mean(gpu.put(U), max_iterations=0, full_output=True)
    np.testing.assert_array_equal(gpu.get(none.mean), U[0])
    assert list(none.iterations) == [0, 0]
    alone = grassmann.mean(gpu.put(U[:1]), full_output=True)
    assert alone.converged.all()


def test_points_too_far_apart_end(gpu, rng):
    """No unique mean: whatever is found is stationary, or the search says that it is not."""
    U = points(rng, 10, 5, (6,), np.float64)
    found = grassmann.mean(gpu.put(U), full_output=True, max_iterations=300)
    want = grassmann.mean(U, full_output=True, max_iterations=300)
    assert bool(found.converged) == bool(want.converged)
    assert found.variance == pytest.approx(want.variance, rel=1e-6)


def test_what_is_refused(gpu, rng):
    U = cloud(rng, 3, 20, 3, (), np.float32, 0.3)
    with pytest.raises(ValueError, match="weights must have shape"):
        grassmann.mean(gpu.put(U), np.ones(2))
    with pytest.raises(ValueError, match="finite and not negative"):
        grassmann.mean(gpu.put(U), [1, -1, 2])
    with pytest.raises(ValueError, match="positive, finite sum"):
        grassmann.mean(gpu.put(U), [0, 0, 0])
    with pytest.raises(TypeError, match="initial is on the CPU and U on CUDA device 0"):
        grassmann.mean(gpu.put(U), initial=U[0])
    with pytest.raises(ValueError, match="initial must have the shape of the means"):
        grassmann.mean(gpu.put(U), initial=gpu.put(U))
    with pytest.raises(ValueError, match="U must have at least 3 dimensions"):
        grassmann.mean(gpu.put(U[0]))
    stacked = gpu.put(np.stack([U] * 2, 1))
    with pytest.raises(ValueError, match="broadcast view or overlaps itself"):
        grassmann.mean(stacked, out=gpu.xp.broadcast_to(gpu.put(U[0]), (2, 20, 3)))
    with pytest.raises(ValueError, match="U or initial holds NaN"):
        grassmann.mean(gpu.put(U), initial=gpu.put(np.nan * U[0]))
    U[1, 2, 0] = np.nan
    with pytest.raises(ValueError, match="U or initial holds NaN"):
        grassmann.mean(gpu.put(U))
    assert grassmann.mean(gpu.put(U[:, :0, :0])).shape == (0, 0)
    assert grassmann.mean(gpu.put(np.zeros((3, 0, 5, 2)))).shape == (0, 5, 2)
