"""Plücker mixing against the published per-offset layer in PyTorch, and minors against np.linalg.det."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from subspan import plucker

torch = pytest.importorskip("torch")

B, T, D, R, OFFSETS = 8, 256, 256, 32, [1, 2, 4, 8, 12, 16]
PAIRS = R * (R - 1) // 2
FLOPS = 2 * B * T * PAIRS * D
FIRST, SECOND = torch.triu_indices(R, R, 1)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def published(z, W, b, offsets=OFFSETS):
    """A wedge, a length and a projection for every offset; their mean over those that apply."""
    length = z.shape[1]
    total, count = torch.zeros(*z.shape[:2], W.shape[0]), torch.zeros(length)
    for d in offsets:
        if d >= length:
            continue
        a, w = z[:, d:], z[:, :-d]
        p = a[..., FIRST] * w[..., SECOND] - a[..., SECOND] * w[..., FIRST]
        p = p / p.norm(dim=-1, keepdim=True).clamp(min=1e-8)
        g = torch.nn.functional.linear(p, W, b)
        total = total + torch.nn.functional.pad(g, (0, 0, d, 0))
        count[d:] += 1
    return total / count.clamp(min=1)[None, :, None]


def collapsed(z, W, b):
    """One wedge and one projection, with rejections: the algebra of the kernel, in PyTorch."""
    u, count = torch.zeros_like(z), torch.zeros(z.shape[1])
    zz = (z * z).sum(-1, keepdim=True).clamp(min=1e-30)
    for d in OFFSETS:
        a, w = z[:, d:], z[:, :-d]
        w = w - ((a * w).sum(-1, keepdim=True) / zz[:, d:]) * a
        u[:, d:] += w / (zz[:, d:] * (w * w).sum(-1, keepdim=True)).sqrt().clamp(min=1e-8)
        count[d:] += 1
    u = u / count.clamp(min=1)[None, :, None]
    g = torch.nn.functional.linear(z[..., FIRST] * u[..., SECOND] - z[..., SECOND] * u[..., FIRST], W)
    return g + b * (count > 0)[None, :, None]


def layer(rng, batch=B, length=T):
    z = rng.standard_normal((batch, length, R), dtype=np.float32)
    W = rng.standard_normal((D, PAIRS), dtype=np.float32) / 22
    return z, W, rng.standard_normal(D, dtype=np.float32)


def forward(rng, peer):
    z, W, b = layer(rng)
    tensors = [torch.from_numpy(x) for x in (z, W, b)]

    def theirs():
        with torch.no_grad():
            return peer(*tensors)

    np.testing.assert_allclose(plucker.mix_project(z, W, b, OFFSETS), theirs().numpy(), atol=1e-5)
    return lambda: plucker.mix_project(z, W, b, OFFSETS), theirs


def test_project(versus, rng):
    ours, peer = forward(rng, published)
    versus("plucker-project-f32", ours, peer, flops=FLOPS)


def test_project_compiled(versus, rng):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        ours, peer = forward(rng, torch.compile(published))
    versus("plucker-project-f32-compiled", ours, peer, flops=FLOPS)


def test_project_collapsed(versus, rng):
    ours, peer = forward(rng, collapsed)
    versus("plucker-project-f32-collapsed", ours, peer, flops=FLOPS)


def five(f):
    """Calls in a row, as in training: both cores rest before each side is measured, and waking one takes a while."""
    return lambda: [f() for _ in range(5)]


@pytest.mark.threads(2)
def test_project_two_threads(versus, rng):
    ours, peer = forward(rng, published)
    versus("plucker-project-f32-2threads", five(ours), five(peer), flops=5 * FLOPS, repeats=2)


def gradients(rng, offsets, batch=B, length=T):
    z, W, b = layer(rng, batch, length)
    grad = rng.standard_normal((batch, length, D), dtype=np.float32)
    leaves = [torch.from_numpy(x).requires_grad_() for x in (z, W, b)]
    g = torch.from_numpy(grad)

    def ours():
        out = plucker.mix_project(z, W, b, offsets)
        return out, *plucker.mix_project_backward(grad, z, W, b, offsets)

    def peer():
        for x in leaves:
            x.grad = None
        out = published(*leaves, offsets)
        out.backward(g)
        return out.detach(), *(x.grad for x in leaves)

    return ours, peer


@pytest.mark.parametrize("offsets", [OFFSETS, [1]], ids=["six", "one"])
def test_gradients(versus, rng, offsets):
    ours, peer = gradients(rng, offsets)
    for mine, theirs in zip(ours(), peer(), strict=True):
        np.testing.assert_allclose(mine, theirs.numpy(), atol=1e-5 * float(theirs.abs().max()))
    name = "plucker-gradients-f32" + ("-one-offset" if offsets == [1] else "")
    versus(name, ours, peer, flops=3 * FLOPS, repeats=3)


@pytest.mark.threads(2)
def test_gradients_two_threads(versus, rng):
    ours, peer = gradients(rng, OFFSETS)
    versus("plucker-gradients-f32-2threads", five(ours), five(peer), flops=15 * FLOPS, repeats=2)


MEMORY = """
import sys
sys.path.insert(0, {folder!r})
import numpy as np, torch
import bench_plucker as bench
torch.set_num_threads(1)
def status(key):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key))
rng = np.random.default_rng(0)
small = bench.gradients(rng, bench.OFFSETS, 1, 32)[{side}]
small()  # what is loaded and allocated once is not the layer's
side = bench.gradients(rng, bench.OFFSETS, 16, 256)[{side}]
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")
before = status("VmRSS")
result = side()
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak-memory counter")
def test_memory(benchmark):
    """Peak of forward and backward over 4096 tokens, results and gradients included. Not a time, and judged alike."""
    used = []
    for side in (0, 1):
        code = MEMORY.format(folder=str(Path(__file__).parent), side=side)
        env = {**os.environ, "OMP_NUM_THREADS": "1", "SUBSPAN_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "0"}
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
        used.append(int(out.stdout))
    assert min(used) > 4096 * (D + R) * 4  # at least what is returned
    budget = json.loads((Path(__file__).parent / "budgets.json").read_text())["plucker-gradients-memory"]
    ratio = used[1] / used[0]
    benchmark.pedantic(lambda: None)
    benchmark.extra_info.update(
        {
            "name": "plucker-gradients-memory",
            "peer": budget["peer"],
            "ratio": ratio,
            "band": [ratio, ratio],
            "reach": budget["reach"],
        }
    )
    print(f"\nours {used[0] / 2**20:.1f} MiB, PyTorch {used[1] / 2**20:.1f} MiB")
    if os.environ.get("SUBSPAN_BENCH_GATE", "1") == "1":
        assert ratio >= budget["reach"]


def test_decode(versus, rng):
    """One token of one sequence through the layer."""
    z, W, b = layer(rng, 1, 200)
    state = plucker.MixState(OFFSETS, R, W=W, b=b).prefill(z)
    token = np.ascontiguousarray(z[:, -1])
    window = torch.from_numpy(z[:, -17:].copy())
    tensors = [torch.from_numpy(x) for x in (W, b)]

    def ours():
        for _ in range(20):
            state.step(token)

    def peer():
        with torch.no_grad():
            for _ in range(20):
                published(window, *tensors)[:, -1]

    fresh = plucker.MixState(OFFSETS, R, W=W, b=b).prefill(z[:, :-1])
    np.testing.assert_allclose(fresh.step(token), published(window, *tensors)[:, -1].numpy(), atol=1e-5)
    versus("plucker-decode-f32", ours, peer, flops=20 * 2 * PAIRS * D, bytes=20 * W.nbytes)


def test_coordinates(versus, rng):
    A = rng.standard_normal((100_000, 8, 3), dtype=np.float32)
    rows = np.array(list(itertools.combinations(range(8), 3)))
    np.testing.assert_allclose(plucker.coordinates(A[:100]), np.linalg.det(A[:100, rows]), atol=1e-4)
    versus(
        "plucker-coordinates-f32-100000x8x3",
        lambda: plucker.coordinates(A),
        lambda: np.linalg.det(A[:, rows]),
        repeats=1,
        bytes=A.nbytes + 100_000 * 56 * 4,
    )
