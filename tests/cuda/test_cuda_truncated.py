"""Truncated SVDs and low-rank gradients on a device against NumPy's in float64."""

from __future__ import annotations

import numpy as np
import pytest

from references import eps, wide
from subspan.svd import StreamingSVD, truncated_svd

WIDE = [np.dtype(np.float32), np.dtype(np.float64)]
IDS = ["f32", "f64"]


def decaying(rng, m, n, dtype, ratio=0.5):
    k = min(m, n)
    u, v = (np.linalg.qr(rng.standard_normal((size, k)))[0] for size in (m, n))
    return ((u * ratio ** np.arange(k)) @ v.T).astype(dtype)


def error(found, A, k):
    """How far triplets are from the best ones and from orthonormal, as a share of what is allowed."""
    u, s, vh = (wide(x.get()) for x in found)
    e = eps(found.S.dtype)
    want = np.linalg.svd(wide(A), compute_uv=False)[:k]
    assert (u.shape, s.shape, vh.shape) == ((A.shape[0], k), (k,), (k, A.shape[1]))
    bases = max(np.abs(u.T @ u - np.eye(k)).max(), np.abs(vh @ vh.T - np.eye(k)).max())
    signs = np.abs(vh).max(1) - vh.max(1)
    products = np.abs(wide(A) @ vh.T - u * s).max()
    return max(
        bases / (10 * e * np.sqrt(k)),
        np.abs(s - want).max() / (100 * e * want[0]),
        np.abs(signs).max() / e,
        products / (200 * e * want[0]),
    )


@pytest.mark.parametrize("dtype", WIDE, ids=IDS)
@pytest.mark.parametrize(("m", "n", "k"), [(60, 40, 5), (30, 90, 8), (12, 12, 12), (50, 3, 2), (7, 1, 1), (1, 9, 1)])
@pytest.mark.parametrize("order", ["C", "F", "strided"])
def test_leading_triplets(gpu, rng, dtype, m, n, k, order):
    A = decaying(rng, m, n, dtype)
    x = gpu.put(np.repeat(np.repeat(A, 2, 0), 3, 1))[::2, ::3] if order == "strided" else gpu.put(A)
    if order == "F":
        x = gpu.put(np.ascontiguousarray(A.T)).T
    found = truncated_svd(x, k, power_iterations=3, rng=1)
    assert error(found, A, k) <= 1


@pytest.mark.parametrize("dtype", WIDE, ids=IDS)
def test_wide_cores_and_the_order_of_threads(emulation, rng, dtype):
    emulation.control.hardware(8, 99000)
    A = decaying(rng, 72, 80, dtype, 0.86)
    found = emulation.twice(lambda: truncated_svd(emulation.put(A), 66, power_iterations=0, rng=0))
    assert error(found, A, 66) <= 1


@pytest.mark.parametrize("dtype", WIDE, ids=IDS)
def test_the_start_is_that_of_the_cpu(gpu, rng, dtype):
    A = (rng.standard_normal((40, 30))).astype(dtype)  # no decay: what is found depends on the start
    ours = truncated_svd(gpu.put(A), 4, oversample=2, power_iterations=0, rng=7)
    theirs = truncated_svd(A, 4, oversample=2, power_iterations=0, rng=7)
    np.testing.assert_allclose(ours.S.get(), theirs.S, rtol=1e3 * eps(dtype))
    start = np.linalg.svd(wide(A))[2][:4].astype(dtype)
    warm = truncated_svd(gpu.put(A), 4, oversample=0, power_iterations=0, initial=gpu.put(start))
    assert error(warm, A, 4) <= 1


@pytest.mark.parametrize("dtype", WIDE, ids=IDS)
def test_matrices_of_lower_rank_have_complete_vectors(gpu, rng, dtype):
    A = (rng.standard_normal((30, 2)) @ rng.standard_normal((2, 25))).astype(dtype)
    found = truncated_svd(gpu.put(A), 6, rng=0)
    u, s, vh = (wide(x.get()) for x in found)
    for basis in (u.T, vh):
        assert np.abs(basis @ basis.T - np.eye(6)).max() <= 10 * eps(dtype) * np.sqrt(6)
    assert (s[2:] <= 1e-5 * s[0]).all()
    zero = truncated_svd(gpu.put(0 * A), 3, rng=0)
    assert (zero.S.get() == 0).all()
    vh = wide(zero.Vh.get())
    assert np.abs(vh @ vh.T - np.eye(3)).max() <= 10 * eps(dtype) * np.sqrt(3)


def test_energy_and_tolerance(gpu, rng):
    A = decaying(rng, 40, 36, np.float64, 0.6)
    s = np.linalg.svd(A, compute_uv=False)
    share = np.cumsum(s**2) / (s**2).sum()
    found = truncated_svd(gpu.put(A), energy=0.99, rng=0)
    assert found.S.shape == (int(np.searchsorted(share, 0.99)) + 1,)
    assert truncated_svd(gpu.put(A), 2, energy=0.99, rng=0).S.shape == (2,)
    assert truncated_svd(gpu.put(A), tol=s[9] / s[0] * 0.99, power_iterations=4, rng=0).S.shape == (10,)
    many = truncated_svd(gpu.put(A), tol=1e-7, power_iterations=4, rng=0)  # more than the first try has
    assert many.S.shape == (int((s >= 1e-7 * s[0]).sum()),)


@pytest.mark.parametrize("dtype", WIDE, ids=IDS)
def test_nan_shows_in_all_results(gpu, rng, dtype):
    A = rng.standard_normal((20, 16)).astype(dtype)
    A[3, 4] = np.nan
    for x in truncated_svd(gpu.put(A), 3, rng=0):
        assert np.isnan(x.get()).all()
    with pytest.raises(ValueError, match="A holds NaN"):
        truncated_svd(gpu.put(A), tol=0.1, rng=0)


def test_what_is_refused(gpu, rng):
    A = rng.standard_normal((20, 16)).astype(np.float32)
    with pytest.raises(ValueError, match=r"rank must be in \[1, 16\], got 17"):
        truncated_svd(gpu.put(A), 17)
    with pytest.raises(ValueError, match="initial must have 16 columns"):
        truncated_svd(gpu.put(A), 2, initial=gpu.put(A.T.copy()))
    with pytest.raises(TypeError, match="initial is on the CPU and A on CUDA device 0"):
        truncated_svd(gpu.put(A), 2, initial=A)
    with pytest.raises(TypeError, match="A must be float32 or float64, got float16"):
        truncated_svd(gpu.put(A.astype(np.float16)), 2)


@pytest.mark.parametrize(("n", "rank"), [(20, 10), (20, 19), (40, 20), (40, 1)])
def test_vectors_are_completed_to_whole_bases(emulation, n, rank):
    emulation.control.hardware(8, 99000)
    rng = np.random.default_rng(3)
    for seed in range(3 if n < 30 else 1):
        A = rng.standard_normal((n, rank)) @ rng.standard_normal((rank, n))
        u, _, vh = (x.get() for x in truncated_svd(emulation.put(A), n, power_iterations=0, rng=seed))
        for basis in (u.T, vh):
            assert np.abs(basis @ basis.T - np.eye(n)).max() <= 10 * eps(np.float64) * np.sqrt(n)


@pytest.mark.parametrize("dtype", WIDE, ids=IDS)
@pytest.mark.parametrize("exponent", [-300, -250, -120, 120, 250, 300])
def test_data_of_any_size(gpu, rng, dtype, exponent):
    """The eighth power of an entry must not leave the range."""
    if dtype == np.float32:
        exponent = exponent // 3
    A = np.ldexp(decaying(rng, 30, 12, dtype, 0.7), exponent)
    assert error(truncated_svd(gpu.put(A), 12, rng=0), A, 12) <= 1
    svd = StreamingSVD(12).update(gpu.put(A[:10])).update(gpu.put(A[10:]))
    s = np.linalg.svd(wide(A), compute_uv=False)
    assert np.abs(wide(svd.singular_values.get()) - s).max() <= 100 * eps(dtype) * s[0]
    v = wide(svd.components.get())
    assert np.abs(v @ v.T - np.eye(12)).max() <= 10 * eps(dtype) * np.sqrt(12)
    total = (wide(A) ** 2).sum()
    assert abs(svd.captured_energy + svd.residual_energy - total) <= 1e-4 * total


def test_a_start_on_the_device_alone(gpu):
    with pytest.raises(TypeError, match="A is on the CPU and initial on CUDA device 0"):
        truncated_svd(np.ones((6, 5)), 2, initial=gpu.put(np.ones((2, 5))))
