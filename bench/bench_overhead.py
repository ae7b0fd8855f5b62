"""What a call costs beside its arithmetic: microseconds on small NumPy arrays, with NumPy's expression beside it."""

from __future__ import annotations

import json
import os
import timeit
from pathlib import Path

import numpy as np
import pytest

from subspan import _core, grassmann, orth, plucker
from subspan.svd import StreamingSVD

BUDGETS = json.loads((Path(__file__).parent / "budgets.json").read_text())
ROUNDS = int(os.environ.get("SUBSPAN_BENCH_ROUNDS", "5"))


def calls():
    rng = np.random.default_rng(0)
    C, G, z = rng.standard_normal((16, 8)), rng.standard_normal((16, 2)), rng.standard_normal((8, 4))
    U, W = (np.linalg.qr(rng.standard_normal((16, 2)))[0] for _ in range(2))
    H, B, out, point = 0 * G, np.zeros_like(G), np.empty_like(C), U.copy()
    P, b, mixed = rng.standard_normal((3, 6)), np.zeros(3), np.empty((8, 3))
    stream, row = StreamingSVD(4).update(C), C[:1].copy()
    return {
        "project-out": (lambda: orth.project_out(C, U, check=False, out=out), lambda: C - U @ (U.T @ C)),
        "sgd-step": (
            lambda: grassmann.sgd_step(point, G, B, lr=0.0, momentum=0.9, check=False),
            lambda: G - U @ (U.T @ G),
        ),
        "mix-project": (lambda: plucker.mix_project(z, P, b, [1, 2], out=mixed), lambda: np.add.outer(z[0], z[1])),
        "exp": (lambda: grassmann.exp(U, H, check=False), lambda: G - U @ (U.T @ G)),
        "distance": (lambda: grassmann.distance(U, W, check=False), lambda: U.T @ W),
        "householder-qr": (lambda: orth.householder_qr(C), lambda: C.T @ C),
        "update": (lambda: stream.update(row), lambda: C @ row[0]),
    }


@pytest.mark.parametrize("name", calls())
def test_overhead(benchmark, name):
    ours, numpy = calls()[name]
    budget = BUDGETS[f"overhead-{name}"]
    number = 2000 if ROUNDS > 1 else 50

    def microseconds(f):
        return min(timeit.repeat(f, number=number, repeat=ROUNDS)) / number * 1e6

    benchmark.pedantic(ours, rounds=1, iterations=1)
    found = sorted(microseconds(ours) for _ in range(3))
    beside, empty = microseconds(numpy), microseconds(_core.num_threads)
    benchmark.extra_info.update(
        name=f"overhead-{name}",
        peer=f"µs a call; NumPy's {budget['peer']} takes {beside:.1f}, an empty binding {empty:.2f}",
        ratio=found[0],
        band=[found[0], found[-1]],
        reach=budget["reach"],
        less=True,
    )
    if os.environ.get("SUBSPAN_BENCH_GATE", "1") == "1":
        assert found[0] < budget["reach"]
