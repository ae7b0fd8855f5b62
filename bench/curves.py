"""Time against one size at a time, over three decades: ``python bench/curves.py [--save]``.

The exponent is fitted to the upper half of each curve (in logarithms), where what a call costs in itself no longer
shows; the expected one is that of the flops or bytes, whichever are more there. A step is the largest jump between two
neighbours beyond what the expected exponent gives.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse
from threadpoolctl import threadpool_limits

import machine
import subspan
from subspan import grassmann, orth, plucker
from subspan.svd import StreamingSVD, truncated_svd

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).parent


@dataclass
class Curve:
    name: str
    size: str  # what varies
    least: int
    most: int
    expected: float
    make: Callable[[int], Callable[[], Any]]
    why: str = ""  # of steps
    mean: bool = False  # over calls: what is done now and then counts

    def sizes(self, count: int) -> list[int]:
        found = np.exp(np.linspace(math.log(self.least), math.log(self.most), count))
        return sorted({round(x) for x in found})


def rows(*shape: int) -> Any:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def basis(*shape: int) -> Any:
    return orth.random_orthogonal(*shape[-2:], batch=shape[:-2], dtype="float32", rng=0)


def stream(n: int, k: int, b: int) -> Callable[[], Any]:
    X = rows(b, n)
    svd = StreamingSVD(k)
    for _ in range(3 + 3 * k // b):
        svd.update(X)
    return lambda: svd.update(X)


def csr(nnz: int) -> Callable[[], Any]:
    n, b = 32768, 256
    rng = np.random.default_rng(0)
    X = sparse.random_array((b, n), density=nnz / (b * n), format="csr", rng=rng).astype(np.float32)
    svd = StreamingSVD(32)
    for _ in range(3):
        svd.update(X)
    return lambda: svd.update(X)


def step(stack: int, n: int, k: int) -> Callable[[], Any]:
    U = basis(stack, n, k)
    H = 0.1 * grassmann.tangent(U, rows(*U.shape))
    return lambda: grassmann.retract(U, H, check=False)


def angles(n: int, k: int) -> Callable[[], Any]:
    U, W = basis(n, k), orth.orthonormalize(rows(n, k))
    return lambda: grassmann.principal_angles(U, W, check=False)


def projection(m: int, n: int, k: int) -> Callable[[], Any]:
    G, U = rows(m, n), basis(m, k)
    return lambda: orth.project_out(G, U, check=False)


def orthonormal(m: int, k: int) -> Callable[[], Any]:
    A = rows(m, k)
    return lambda: orth.orthonormalize(A)


def truncated(m: int, n: int, k: int) -> Callable[[], Any]:
    A = rows(m, n)
    return lambda: truncated_svd(A, k, rng=0)


def mixing(T: int, r: int) -> Callable[[], Any]:
    z, W = rows(T, r), rows(64, r * (r - 1) // 2)
    return lambda: plucker.mix_project(z, W, None, [1, 2, 4])


def minors(count: int) -> Callable[[], Any]:
    A = rows(count, 8, 3)
    return lambda: plucker.coordinates(A)


CURVES = [
    Curve("stream, update", "n (k = 16, b = 256)", 16, 16384, 1, lambda n: stream(n, 16, 256),
          "n² while second moments are kept, up to 1024 columns; directions from there on", True),
    Curve("stream, update", "k (n = 4096, b = 256)", 1, 1000, 1, lambda k: stream(4096, k, 256),
          "64 directions at least; k² once that is more than k b", True),
    Curve("stream, update", "b (n = 4096, k = 32)", 4, 4096, 1, lambda b: stream(4096, 32, b),
          "rows wait until half as many as directions have come; larger blocks go in pieces", True),
    Curve("stream, CSR update", "nnz (32768 columns)", 1000, 1_000_000, 0, csr,
          "turning V costs k² n, whatever is stored; rows that wait share it", True),
    Curve("truncated_svd", "m (n = 200, k = 16)", 100, 100_000, 1, lambda m: truncated(m, 200, 16)),
    Curve("truncated_svd", "k (2000²)", 1, 1000, 1, lambda k: truncated(2000, 2000, k),
          "k² in orthonormalising, once that is more"),
    Curve("project_out", "m (n = 1024, k = 16)", 16, 16384, 1, lambda m: projection(m, 1024, 16),
          "out of the caches at some MiB"),
    Curve("project_out", "k (1024²)", 1, 1000, 1, lambda k: projection(1024, 1024, k)),
    Curve("orthonormalize", "m (k = 16)", 16, 65536, 1, lambda m: orthonormal(m, 16)),
    Curve("orthonormalize", "k (m = 4096)", 1, 1000, 2, lambda k: orthonormal(4096, k),
          "columns up to 4, reflections by rows to 32, Cholesky to half of m"),
    Curve("retract", "stack (64 x 4)", 1, 10_000, 1, lambda s: step(s, 64, 4)),
    Curve("retract", "n (k = 8)", 16, 65536, 1, lambda n: step(1, n, 8)),
    Curve("retract", "k (n = 2048)", 1, 512, 2, lambda k: step(1, 2048, k)),
    Curve("principal_angles", "k (n = 2048)", 1, 512, 2, lambda k: angles(2048, k),
          "the SVD of k x k: k³, by rotations up to 80"),
    Curve("mix_project", "T (r = 16)", 16, 16384, 1, lambda T: mixing(T, 16)),
    Curve("mix_project", "r (T = 512)", 2, 128, 2, lambda r: mixing(512, r)),
    Curve("coordinates", "matrices (8 x 3)", 10, 100_000, 1, minors),
]  # fmt: skip


def seconds(f: Callable[[], Any], least: float, mean: bool) -> float:
    f()
    start = time.perf_counter()
    f()
    number = max(1, int(2e-4 / max(time.perf_counter() - start, 1e-7)))
    best, spent, calls = math.inf, 0.0, 0
    while spent < least or calls < (10 if mean else 1):
        start = time.perf_counter()
        for _ in range(number):
            f()
        took = time.perf_counter() - start
        best, spent, calls = min(best, took / number), spent + took, calls + number
    return spent / calls if mean else best


def main() -> int:
    machine.at_its_best()
    p = argparse.ArgumentParser(prog="bench/curves.py", description=__doc__.splitlines()[0])
    p.add_argument("--points", type=int, default=13)
    p.add_argument("--seconds", type=float, default=0.15, help="for each point")
    p.add_argument("--save", action="store_true")
    options = p.parse_args()
    subspan.set_num_threads(1)
    lines = ["| operation | varies | from | to | exponent | expected | largest step | |", "|---" * 8 + "|"]
    drawn = []
    with threadpool_limits(1):
        head = f"{machine.processor()}; {machine.kernels()}; one thread, float32"
        for curve in CURVES:
            sizes = curve.sizes(options.points)
            times = [seconds(curve.make(n), options.seconds, curve.mean) for n in sizes]
            x, y = np.log(sizes), np.log(times)
            half = min(len(sizes) // 2, len(sizes) - 2)
            slope = float(np.polyfit(x[half:], y[half:], 1)[0])
            jumps = np.diff(y) - curve.expected * np.diff(x)
            at = int(jumps.argmax())
            step_ = f"{math.exp(max(jumps[at], 0)):.1f} at {sizes[at + 1]}"
            ends = f"{times[0] * 1e3:.3g} ms | {times[-1] * 1e3:.3g} ms"
            lines.append(
                f"| {curve.name} | {curve.size}, {sizes[0]} to {sizes[-1]} | {ends} | {slope:.2f} "
                f"| {curve.expected:g} | {step_} | {curve.why} |"
            )
            print(lines[-1], flush=True)
            drawn.append((curve, sizes, times))
    if not options.save:
        return 0
    note = __doc__.split("\n\n", 1)[1].strip()
    text = "\n".join(["# Cost curves", "", note, "", head + ".", "", *lines, "", "![curves](curves.svg)", ""])
    if status := machine.save(HERE / "results" / "curves.md", text):
        return status
    draw(drawn)
    return 0


def draw(curves: list[tuple[Curve, list[int], list[float]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "subspan", "font.size": 8})
    columns = 3
    count = math.ceil(len(curves) / columns)
    figure, axes = plt.subplots(count, columns, figsize=(11, 2.6 * count), constrained_layout=True)
    for axis, (curve, sizes, times) in zip(axes.flat, curves, strict=False):
        axis.loglog(sizes, np.array(times) * 1e3, "o-", markersize=3, linewidth=1)
        last = times[-1] * 1e3
        axis.loglog(sizes, [last * (n / sizes[-1]) ** curve.expected for n in sizes], "--", color="grey", linewidth=0.8)
        axis.set_title(f"{curve.name}: {curve.size}")
        axis.set_ylabel("ms")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(curves) :]:
        axis.axis("off")
    figure.savefig(HERE / "results" / "curves.svg", metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main())
