"""Peak memory of each operation beside the least that it could be: ``python bench/memory.py [--save]``. Linux only.

Each runs once in a process of its own after a small call; what the resident set grew by is its peak. The least is what
the operation returns, and nothing where it works in place.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

import machine
import subspan
from subspan import grassmann, orth, plucker
from subspan.svd import StreamingSVD, truncated_svd

F = 4  # bytes of a float32


def rows(*shape: int) -> Any:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def project_out(s: int) -> Any:
    G, U = rows(4096 // s, 4096 // s), orth.random_orthogonal(4096 // s, 32, dtype="float32")
    return lambda: orth.project_out(G, U, check=False), G.nbytes


def project_out_in_place(s: int) -> Any:
    G, U = rows(4096 // s, 4096 // s), orth.random_orthogonal(4096 // s, 32, dtype="float32")
    return lambda: orth.project_out(G, U, out=G, check=False), 0


def orthonormalize(s: int) -> Any:
    A = rows(100_000 // s, 128)
    return lambda: orth.orthonormalize(A), A.nbytes


def householder_qr(s: int) -> Any:
    A = rows(100_000 // s, 128)
    return lambda: orth.householder_qr(A), A.nbytes


def householder_apply(s: int) -> Any:
    V, C = rows(4096 // s, 64), rows(4096 // s, 4096 // s)
    return lambda: orth.householder_apply(V, C), C.nbytes


def hadamard(s: int) -> Any:
    x = rows(4096 // s, 4096 // s)
    return lambda: orth.hadamard(x), x.nbytes


def truncated(s: int) -> Any:
    A = rows(8000 // s, 4000 // s)
    return lambda: truncated_svd(A, 64, rng=0), 64 * sum(A.shape) * F


def truncated_csr(s: int) -> Any:
    A = sparse.random_array((100_000 // s, 20_000 // s), density=0.002, format="csr", rng=np.random.default_rng(0))
    A = A.astype(np.float32)
    return lambda: truncated_svd(A, 32, rng=0), 32 * sum(A.shape) * F


def stream_moments(s: int) -> Any:
    X = rows(50_000 // s, 500)
    svd = StreamingSVD(32).update(X[:1000])
    return lambda: svd.update(X), 0


def stream_wide(s: int) -> Any:
    n = 100_000 // s
    X = rows(192, n)
    svd = StreamingSVD(64).update(X[:64]).update(X[64:128])
    return lambda: svd.update(X[128:]), 0


def retract(s: int) -> Any:
    U = orth.random_orthogonal(512, 8, batch=(2000 // s,), dtype="float32")
    H = 0.1 * grassmann.tangent(U, rows(*U.shape))
    return lambda: grassmann.retract(U, H, check=False), U.nbytes


def sgd_step(s: int) -> Any:
    U = orth.random_orthogonal(512, 8, batch=(2000 // s,), dtype="float32")
    G = rows(*U.shape)
    return lambda: grassmann.sgd_step(U, G, lr=0.01, check=False), 0


def logits(s: int) -> Any:
    U, x = orth.random_orthogonal(512, 8, batch=(1000 // s,), dtype="float32"), rows(8192 // s, 512)
    return lambda: grassmann.logits(x, U), (8192 // s) * (1000 // s) * F


def mix_project(s: int) -> Any:
    z, W = rows(64 // s, 512, 32), rows(512, 496)
    return lambda: plucker.mix_project(z, W, None, [1, 2, 4, 8]), (64 // s) * 512 * 512 * F


def mix(s: int) -> Any:
    z = rows(64 // s, 512, 32)
    return lambda: plucker.mix(z, [1, 2, 4, 8]), (64 // s) * 512 * 496 * F


def coordinates(s: int) -> Any:
    A = rows(200_000 // s, 8, 3)
    return lambda: plucker.coordinates(A), (200_000 // s) * 56 * F


CASES = [
    project_out,
    project_out_in_place,
    orthonormalize,
    householder_qr,
    householder_apply,
    hadamard,
    truncated,
    truncated_csr,
    stream_moments,
    stream_wide,
    retract,
    sgd_step,
    logits,
    mix_project,
    mix,
    coordinates,
]


def status(key: str) -> int:
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key))


def one(name: str) -> None:
    make = globals()[name]
    subspan.set_num_threads(1)
    make(16)[0]()  # what is loaded and allocated once is not the operation's
    call, least = make(1)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    kept = call()
    print(status("VmHWM") - before, least)
    del kept


def main() -> int:
    machine.at_its_best()
    p = argparse.ArgumentParser(prog="bench/memory.py", description=__doc__.splitlines()[0])
    p.add_argument("--one", metavar="NAME", help="one, in this process: bytes, and the least")
    p.add_argument("--save", action="store_true")
    options = p.parse_args()
    if options.one:
        one(options.one)
        return 0
    lines = ["| operation | peak, MiB | least, MiB | beyond it, MiB |", "|---|---|---|---|"]
    env = {**machine.environment(), "OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "0"}
    for case in CASES:
        command = [sys.executable, __file__, "--one", case.__name__]
        out = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
        peak, least = (int(x) / 2**20 for x in out.split())
        lines.append(f"| {case.__name__} | {peak:.1f} | {least:.1f} | {peak - least:.1f} |")
        print(lines[-1], flush=True)
    note = __doc__.split("\n\n", 1)[1].strip()
    where = f"{machine.processor()}; one thread."
    text = "\n".join(["# Peak memory", "", note + " Shapes are those of bench/memory.py.", "", where, "", *lines, ""])
    return machine.save(Path(__file__).parent / "results" / "memory.md", text) if options.save else 0


if __name__ == "__main__":
    sys.exit(main())
