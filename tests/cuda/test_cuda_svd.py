"""A streaming SVD on a device against the exact one, and against the CPU's stream."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from subspan.svd import StreamingSVD

EPS = float(np.finfo(np.float32).eps)


def spans(svd, A, k, scale=1.0):
    """Singular values and the subspace of the best rank k, orthonormal components."""
    _, s, vh = np.linalg.svd(A.astype(np.float64), full_matrices=False)
    values, v = svd.singular_values.get().astype(np.float64), svd.components.get().astype(np.float64)
    assert values.shape == (k,)
    assert np.abs(v @ v.T - np.eye(k)).max() <= 10 * EPS * np.sqrt(k)
    assert np.abs(values - s[:k]).max() <= 100 * EPS * s[0] * scale
    gap = s[k - 1] - (s[k] if k < len(s) else 0.0)
    off = v - (v @ vh[:k].T) @ vh[:k]
    assert np.linalg.norm(off, 2) <= 1e3 * EPS * s[0] / gap * scale


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


def test_bits_do_not_depend_on_the_order_of_threads(gpu, rng):
    X = rng.standard_normal((3, 20, 50)).astype(np.float32)

    def run():
        svd = StreamingSVD(6, oversample=10)  # a core of more than one block
        for x in X:
            svd.update(gpu.put(x))
        return svd.components, svd.singular_values

    gpu.twice(run)


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
    emulation.control.hardware(8, 30000)  # a core of some 40 rows
    A = (rng.standard_normal((80, 4)) @ rng.standard_normal((4, 60))).astype(np.float32)
    svd = StreamingSVD(4, oversample=4).update(emulation.put(A))
    spans(svd, A, 4)


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
    with pytest.raises(TypeError, match="float32 on a CUDA device, got float64"):
        StreamingSVD(4).update(gpu.put(X.astype(np.float64)))
    with pytest.raises(TypeError, match="saving of a stream on a CUDA device"):
        svd.save("nowhere.npz")
    with pytest.raises(ValueError, match="rank must be at most the number of columns"):
        StreamingSVD(40).update(gpu.put(X))
    on_host = StreamingSVD(4).update(X)
    with pytest.raises(TypeError, match="on the CPU as the stream's first rows were"):
        on_host.update(gpu.put(X))
