"""Streaming and one-shot truncated SVD against scikit-learn, on the same blocks."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse
from sklearn.decomposition import IncrementalPCA
from sklearn.utils.extmath import randomized_svd

from subspan.svd import StreamingSVD, truncated_svd

WARM = 3
BUDGETS = json.loads((Path(__file__).parent / "budgets.json").read_text())


def stream(n: int, k: int, b: int, dtype: str, *, power: float = 0.5, blocks: int = 8) -> list[np.ndarray]:
    """Blocks of 4k directions with singular values falling as i^-power, and noise a hundredth of the last of them."""
    rng = np.random.default_rng(0)
    width = min(4 * k, n)
    scale = np.arange(1, width + 1) ** -power
    basis = rng.standard_normal((width, n)) / np.sqrt(n)
    rows = (rng.standard_normal((b * blocks, width)) * scale) @ basis
    rows += 0.01 * scale[-1] * rng.standard_normal(rows.shape) / np.sqrt(n)
    return [np.ascontiguousarray(x) for x in np.split(rows.astype(dtype), blocks)]


def streaming_pair(blocks, k, **options):
    """Two closures that each feed the next block to their own stream."""
    ours, peer = StreamingSVD(k, **options), IncrementalPCA(n_components=k)
    for block in blocks[:WARM]:
        ours.update(block)
        peer.partial_fit(block)
    left, right = itertools.cycle(blocks), itertools.cycle(blocks)
    return (lambda: ours.update(next(left))), (lambda: peer.partial_fit(next(right))), ours


def flops(n: int, k: int, b: int) -> float:
    return n * (2 * k * k + 4 * k * b + b * b)


@pytest.mark.parametrize(
    ("name", "n", "k", "b", "dtype"),
    [
        ("svd-f32-n4096-k128-b128", 4096, 128, 128, "float32"),
        ("svd-f32-n4096-k64-b64", 4096, 64, 64, "float32"),
        ("svd-f64-n1024-k64-b128", 1024, 64, 128, "float64"),
        ("svd-f32-n16384-k128-b128", 16384, 128, 128, "float32"),
    ],
)
def test_update(versus, name, n, k, b, dtype):
    ours, peer, _ = streaming_pair(stream(n, k, b, dtype), k)
    versus(name, ours, peer, flops=flops(n, k, b), dtype=dtype)


@pytest.mark.threads(2)
def test_update_two_threads(versus):
    n, k, b = 4096, 128, 128
    ours, peer, _ = streaming_pair(stream(n, k, b, "float32"), k)
    versus("svd-f32-n4096-k128-b128-2threads", ours, peer, flops=flops(n, k, b))


def test_robust(versus):
    """A spectrum too wide for the Gram route."""
    n, k, b = 4096, 128, 128
    ours, peer, svd = streaming_pair(stream(n, k, b, "float32", power=1.5), k)
    versus("svd-f32-robust-n4096-k128-b128", ours, peer, flops=flops(n, k, b))
    assert svd._state.route() == "robust"


def test_wide_spectrum_float64(versus):
    n, k, b = 1024, 64, 128
    ours, peer, svd = streaming_pair(stream(n, k, b, "float64", power=3.0), k)
    versus("svd-f64-wide-spectrum-n1024-k64-b128", ours, peer, flops=flops(n, k, b), dtype="float64")
    assert svd._state.route() == "robust"


def test_single_rows(versus):
    """2000 rows one by one against the same rows in blocks of 64."""
    n, k = 4096, 64
    rows = np.concatenate(stream(n, k, 250, "float32"))
    blocks = [rows[i : i + 64] for i in range(0, 2000, 64)]

    def one_by_one():
        svd = StreamingSVD(k)
        for i in range(2000):
            svd.update(rows[i : i + 1])
        return svd.singular_values

    def in_blocks():
        svd = StreamingSVD(k)
        for block in blocks:
            svd.update(block)
        return svd.singular_values

    versus("svd-f32-single-rows", one_by_one, in_blocks, flops=2000 / 64 * flops(n, k, 64), repeats=2)


def test_csr(versus):
    n, k, b = 32768, 64, 256
    rng = np.random.default_rng(0)
    blocks = [
        sparse.random_array((b, n), density=0.01, format="csr", dtype=np.float32, rng=rng) for _ in range(WARM + 2)
    ]
    dense = [x.toarray() for x in blocks]
    ours, peer = StreamingSVD(k), IncrementalPCA(n_components=k)
    for x, d in zip(blocks[:WARM], dense, strict=False):
        ours.update(x)
        peer.partial_fit(d)
    left, right, together = itertools.cycle(blocks), itertools.cycle(dense), 2  # ours collects so many

    def each(update, rows):
        for _ in range(together):
            update(next(rows))

    versus(
        "svd-f32-csr-n32768-k64-b256",
        lambda: each(ours.update, left),
        lambda: each(peer.partial_fit, right),
        flops=3 * n * k * k
        + together * 4 * 0.01 * b * n * k,  # one basis measured and turned for all, each nonzero twice
        repeats=2,
    )


def test_truncated(versus):
    n, k = 4096, 128
    rng = np.random.default_rng(0)
    a = np.concatenate(stream(n, k, 512, "float32"))
    assert a.shape == (n, n)
    versus(
        "truncated-f32-4096-k128-q2",
        lambda: truncated_svd(a, k, oversample=10, power_iterations=2, rng=rng),
        lambda: randomized_svd(a, k, n_oversamples=10, n_iter=2, random_state=0),
        flops=6 * 2 * n * n * (k + 10),
        repeats=2,
    )


def test_drop_in(versus):
    from subspan.sklearn import IncrementalPCA as DropIn

    n, k, b = 4096, 128, 128
    blocks = stream(n, k, b, "float32")
    ours, peer = DropIn(n_components=k), IncrementalPCA(n_components=k)
    for block in blocks[:WARM]:
        ours.partial_fit(block)
        peer.partial_fit(block)
    left, right = itertools.cycle(blocks), itertools.cycle(blocks)
    versus(
        "sklearn-drop-in-f32-n4096-k128-b128",
        lambda: ours.partial_fit(next(left)),
        lambda: peer.partial_fit(next(right)),
        flops=flops(n, k, b),
    )


def test_drop_in_fit(versus):
    """fit() with scikit-learn's default batch size, 5 n."""
    from subspan.sklearn import IncrementalPCA as DropIn

    rows = np.concatenate(stream(200, 10, 500, "float64"))
    versus(
        "sklearn-fit-f64-n200",
        lambda: DropIn(n_components=10).fit(rows),
        lambda: IncrementalPCA(n_components=10).fit(rows),
        flops=rows.shape[0] * rows.shape[1] ** 2,  # the Gram matrix of the columns
        dtype="float64",
        repeats=2,
    )


def test_peak_memory(benchmark):
    """Peak of one update beyond the state, in units of (k + b) n items; Linux only."""
    n, k, b = 100_000, 64, 64
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's peak-memory counter")

    def status(key):
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key))

    rows = np.random.default_rng(0).standard_normal((3 * b, n), dtype=np.float32)
    svd = StreamingSVD(k).update(rows[:b]).update(rows[b : 2 * b])
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    svd.update(rows[2 * b :])
    units = (status("VmHWM") - before) / ((k + b) * n * 4)
    benchmark.pedantic(lambda: svd.update(rows[2 * b :]), rounds=2)
    budget = BUDGETS["svd-f32-memory-n100000-k64-b64"]
    benchmark.extra_info.update(
        name="svd-f32-memory-n100000-k64-b64",
        peer=budget["peer"],
        ratio=units,
        band=[units, units],
        reach=budget["reach"],
        less=True,
    )
    assert units < budget["reach"]
