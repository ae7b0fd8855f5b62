"""Small problems, single and in stacks of 100: ``python bench/small.py [--save]``.

The operations of sweep.py at sizes from 8 to 512: n is what an operation calls rows or columns, ranks are n / 8. Each
figure is the best alternative's time over ours; one that is lost (below 0.95, of calls under 20 µs by more than 2) is
marked.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

import machine
import subspan
import sweep

SIZES = (8, 16, 32, 64, 128, 256, 512)
NAMES = (
    "pca_stream",
    "truncated",
    "merged",
    "product",
    "project_out",
    "project_out_in_place",
    "householder_qr",
    "householder_product",
    "householder_apply",
    "orthonormalize",
    "polar",
    "retract",
    "exp",
    "sgd_step",
    "principal_angles",
    "logits",
    "mix_project",
    "mix",
    "wedge",
)


class Sized(sweep.Draw):
    """Draws of one size, in C order."""

    def __init__(self, size: int, dtype: str, stack: int) -> None:
        super().__init__(np.random.default_rng(size))
        self.n, self.stack, self.stacked = size, stack, False
        self.dtype, self.words = np.dtype(dtype), []

    def size(self, least: float, most: float) -> int:
        wanted = self.n if least > 1 else max(self.n // 8, 1)
        return int(min(max(wanted, least), max(most, least)))

    def batch(self, each: int, most: float = 1e4) -> tuple[int, ...]:
        self.stacked = self.stack > 1
        return (self.stack,) if self.stacked else ()

    def laid(self, x: Any) -> Any:
        return x


def figure(name: str, size: int, dtype: str, stack: int, seconds: float) -> tuple[str, float, bool]:
    d = Sized(size, dtype, stack)
    try:
        family, make = sweep.OPERATIONS[name]
        shape, ours, others = make(d)
    except sweep.TooLargeError:
        return "", math.nan, False
    if stack > 1 and not d.stacked:
        return "", math.nan, False
    cell = sweep.Cell(family, name, shape, ours, others)
    sweep.measure(cell, seconds)
    return f"{cell.ratio:.2f}" + (" **lost**" if cell.lost else ""), cell.ratio, cell.lost


def main() -> int:
    machine.at_its_best()
    p = argparse.ArgumentParser(prog="bench/small.py", description=__doc__.splitlines()[0])
    p.add_argument("--seconds", type=float, default=0.05, help="for each way of a cell")
    p.add_argument("--save", action="store_true")
    options = p.parse_args()
    subspan.set_num_threads(1)
    torch.set_num_threads(1)
    lines, lost, count, logs = [], 0, 0, []
    with threadpool_limits(1):
        head = f"{machine.processor()}; {machine.kernels()}; one thread"
        for dtype in ("float32", "float64"):
            for stack in (1, 100):
                lines += ["", f"## {dtype}, {'single' if stack == 1 else f'stacks of {stack}'}", ""]
                lines += ["| operation | " + " | ".join(map(str, SIZES)) + " |", "|---" * (len(SIZES) + 1) + "|"]
                for name in NAMES:
                    cells = [figure(name, size, dtype, stack, options.seconds) for size in SIZES]
                    if not any(x[0] for x in cells):
                        continue
                    lines.append(f"| {name} | " + " | ".join(x[0] for x in cells) + " |")
                    print(lines[-1], flush=True)
                    logs += [math.log(x[1]) for x in cells if x[0]]
                    lost += sum(x[2] for x in cells)
                    count += sum(bool(x[0]) for x in cells)
    tail = f"{lost} of {count} lost; geometric mean {math.exp(sum(logs) / len(logs)):.2f}."
    text = "\n".join(["# Small problems", "", __doc__.split("\n\n", 1)[1].strip(), "", head + ". " + tail, *lines, ""])
    print(tail)
    return machine.save(Path(__file__).parent / "results" / "small.md", text) if options.save else 0


if __name__ == "__main__":
    sys.exit(main())
