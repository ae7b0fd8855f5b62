"""The versus fixture: our code against the peer a user would call, in one process and one run.

Absolute times mean nothing on a shared machine. So both sides run in alternating order on one thread, each round keeps
the minimum of each side, and what is reported is the ratio with its band over the rounds, and the ratio to the floor
that this machine's own product rate gives. What carries over from one machine to another is the multiple of the floor:
budgets.json gates on it, and on "not slower than the peer" with the whole band.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

import machine
import subspan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BUDGETS = json.loads((Path(__file__).parent / "budgets.json").read_text())
ROUNDS = int(os.environ.get("SUBSPAN_BENCH_ROUNDS", "5"))
REPEATS = int(os.environ.get("SUBSPAN_BENCH_REPEATS", "4"))


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[int]:
    """BLAS, PyTorch and own loops on the number of threads of the `threads` marker, one without it."""
    marker = request.node.get_closest_marker("threads")
    n = marker.args[0] if marker else 1
    before = subspan.get_num_threads()
    subspan.set_num_threads(n)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch_before = torch.get_num_threads()
        torch.set_num_threads(n)
    with threadpool_limits(n):
        yield n
    subspan.set_num_threads(before)
    if torch is not None:
        torch.set_num_threads(torch_before)


_rates: dict[tuple[str, int], float] = {}


def gemm_rate(dtype: str, threads: int) -> float:
    """flops per second of the fastest matrix product of this run, 1500³: NumPy's, PyTorch's or ours."""
    if (dtype, threads) not in _rates:
        n = 1500
        a = np.random.default_rng(0).standard_normal((n, n)).astype(dtype)
        u = subspan.orth.random_orthogonal(n, n // 2, rng=0, dtype=dtype)
        ways = {"NumPy": (lambda: a @ a, 2 * n**3), "ours": (lambda: subspan.orth.project(a, u, check=False), 2 * n**3)}
        torch = sys.modules.get("torch")
        if torch is not None:
            t = torch.from_numpy(a)
            ways["PyTorch"] = (lambda: t @ t, 2 * n**3)
        rates = {}
        for name, (f, flops) in ways.items():
            f()
            rates[name] = flops / min(timed(f) for _ in range(5))
        _rates[dtype, threads] = max(rates.values())
        print("\nproducts,", dtype, threads, ", ".join(f"{k} {v / 1e9:.0f} GF/s" for k, v in rates.items()))
    return _rates[dtype, threads]


_copy_rate: list[float] = []


def copy_rate() -> float:
    """Bytes read and written per second by a copy of 64 MiB, measured in this run."""
    if not _copy_rate:
        a = np.ones(1 << 24, np.float32)
        b = np.empty_like(a)
        _copy_rate.append(2 * a.nbytes / min(timed(lambda: np.copyto(b, a)) for _ in range(7)))
    return _copy_rate[0]


def timed(f: Callable[[], object]) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


@dataclass
class Versus:
    benchmark: object
    threads: int

    def __call__(
        self,
        name: str,
        ours: Callable[[], object],
        peer: Callable[[], object],
        *,
        flops: float | None = None,
        dtype: str = "float32",
        repeats: int = REPEATS,
        bytes: float | None = None,
        once: bool = False,
    ) -> float:
        """Measure, record, and judge against budgets.json; returns the ratio peer / ours.

        ``flops`` and ``bytes`` make the floor: the larger of their times at this machine's product and copy rates.
        ``once`` is for peers that take minutes: they run a single time.
        """
        ours()
        if once:
            seconds = timed(peer)

            def peer() -> None:  # type: ignore[misc]
                pass
        else:
            peer()
        ratios, best = [], [float("inf"), float("inf")]
        for round_ in range(ROUNDS):
            low = [float("inf"), float("inf")]
            for repeat in range(repeats):
                order = (0, 1) if (round_ + repeat) % 2 == 0 else (1, 0)
                for side in order:
                    if self.threads > 1:
                        # OpenBLAS workers spin for some milliseconds after a call, on the core that the other side's
                        # second thread wants: neither side shall pay for the other's.
                        time.sleep(0.1)
                    low[side] = min(low[side], timed((ours, peer)[side]))
            if once:
                low[1] = seconds
            ratios.append(low[1] / low[0])
            best = [min(a, b) for a, b in zip(best, low, strict=True)]
        self.benchmark.pedantic(ours, rounds=max(3, repeats), warmup_rounds=1)  # type: ignore[attr-defined]
        budget = BUDGETS.get(name, {"peer": "its peer", "least": 0.0})  # one that has none is measured, not judged
        least = budget.get("least", 1.0)
        info = {
            "name": name,
            "peer": budget["peer"],
            "ratio": best[1] / best[0],
            "band": [min(ratios), max(ratios)],
            "reach": least,
            "ms": best[0] * 1e3,
        }
        if self.threads == 1 and best[0] > 1e-3 and ROUNDS > 1:
            info["two_threads"] = best[0] / self.on_two_threads(ours)
        if flops is not None or bytes is not None:
            floor = (flops or 0.0) / gemm_rate(dtype, self.threads)
            if bytes is not None:
                floor = max(floor, bytes / copy_rate())
            info["floor"] = best[0] / floor
            info["floor_reach"] = budget.get("floor")
        self.benchmark.extra_info.update(info)  # type: ignore[attr-defined]
        print(f"\n{name}: {info['ratio']:.2f}x [{min(ratios):.2f}, {max(ratios):.2f}], at least {least}")
        if os.environ.get("SUBSPAN_BENCH_GATE", "1") == "1":
            assert max(ratios) >= least, f"{name}: whole band {min(ratios):.2f}..{max(ratios):.2f} is below {least}"
            if "floor" in budget and "floor" in info:
                assert info["floor"] <= budget["floor"], f"{name}: {info['floor']:.2f} times the floor"
        return info["ratio"]

    def on_two_threads(self, ours: Callable[[], object]) -> float:
        subspan.set_num_threads(2)
        torch = sys.modules.get("torch")
        if torch is not None:
            torch.set_num_threads(2)
        try:
            with threadpool_limits(2):
                ours()
                return min(timed(ours) for _ in range(3 * REPEATS))
        finally:
            subspan.set_num_threads(1)
            if torch is not None:
                torch.set_num_threads(1)


@pytest.fixture
def versus(benchmark: object, one_thread: int) -> Versus:
    return Versus(benchmark, one_thread)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, object]) -> None:
    machine_info["subspan"] = {"kernels": machine.kernels(), "held": machine.held()}
