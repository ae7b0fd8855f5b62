"""Low-rank projection of gradients in CUDA device memory."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from subspan._lib.arrays import Array, detached, library_of
from subspan._lib.device import check_dtype, device_of, memory_of, wide_dtype
from subspan._lib.device_truncated import Problem, solve
from subspan.orth.int4 import Int4Basis, quantize_int4

if TYPE_CHECKING:
    from subspan.orth.gradients import GradientProjector


def refresh(projectors: list[GradientProjector], gradients: list[Array]) -> None:
    """New bases for all; small problems of one size share their launches. Waits once for each device.

    Nothing changes where one of the gradients holds NaN or infinity.
    """
    jobs = []
    for p, G in zip(projectors, gradients, strict=True):
        check(p, G, "G")
        a = detached(G)
        place = memory_of(G=a)
        if not p._right(a):
            a = place.transposed(a)
        full = min(int(x) for x in a.shape)
        if p.basis is None:
            start, more, power, key = None, 10, 2, int(np.random.default_rng(p._key).integers(0, 2**63, dtype=np.int64))
        else:
            last = p.basis.to_array() if isinstance(p.basis, Int4Basis) else p.basis
            # A few random directions beside the last basis find what has turned up since.
            start, more, power = place.transposed(last), max(8, p.rank // 8), p.iterations - 1
            key = int(np.random.default_rng(p._key + p.refreshes).integers(0, 2**63, dtype=np.int64))
        problem = Problem(a, p.rank, start, key, False)
        vectors = min(full, p.rank + more)
        group = (place.library, place.device, problem.dtype, p.rank, vectors, power)
        jobs.append((group, problem, p, G))
    for group, some in itertools.groupby(sorted(jobs, key=lambda j: j[0]), key=lambda j: j[0]):
        vectors, power = group[-2:]
        solve([problem for _, problem, _, _ in some], vectors, power, complete=False)
    firsts = [p.place.converted(p.Vh[0], wide_dtype(p.dtype)) for _, p, _, _ in jobs]
    # The first value of each, which is NaN where anything was, the last one, and the cosine to the last basis: one wait
    # for each device.
    numbers = _numbers(jobs, firsts)
    for i, (size, _, _) in enumerate(numbers):
        if not np.isfinite(size):
            name = "G" if len(jobs) == 1 else f"gradients[{i}]"
            raise ValueError(f"{name} holds NaN or infinity, or its decomposition did not settle")
    for (_, problem, _, _), (_, last, _) in zip(jobs, numbers, strict=True):
        if last == 0.0:  # gradients of a lower rank
            problem.complete()
    zero = [i for i, (size, _, _) in enumerate(numbers) if size == 0.0]
    if zero:  # whose first vector was not there before
        for i in zero:
            firsts[i] = jobs[i][1].place.converted(jobs[i][1].Vh[0], wide_dtype(jobs[i][1].dtype))
        again = _numbers([jobs[i] for i in zero], [firsts[i] for i in zero])
        for i, found in zip(zero, again, strict=True):
            numbers[i] = found
    bases = []
    for (_, problem, p, _), first in zip(jobs, firsts, strict=True):
        basis = problem.place.copied(problem.place.transposed(problem.Vh))
        bases.append((quantize_int4(basis, p.group) if p.bits == 4 else basis, problem.place.copied(first)))
    for (_, _, p, G), (basis, first), (_, _, cosine) in zip(jobs, bases, numbers, strict=True):
        p._take(basis, first, None if p._first is None else abs(cosine), G)


def _numbers(jobs: list[Any], firsts: list[Any]) -> list[tuple[float, ...]]:
    found: list[tuple[float, ...]] = [()] * len(jobs)
    places: dict[tuple[str, int], list[int]] = {}
    for i, (_, problem, _, _) in enumerate(jobs):
        places.setdefault((problem.place.library, problem.place.device), []).append(i)
    for some in places.values():
        place = jobs[some[0]][1].place
        numbers = place.zeros((3, len(some)), "float64")
        with place.inside():
            for at, i in enumerate(some):
                _, problem, p, _ = jobs[i]
                ends = place.converted(problem.S[:: max(problem.rank - 1, 1)], "float64")
                numbers[0, at : at + 1], numbers[1, at : at + 1] = ends[:1], ends[-1:]
                if p._first is not None:
                    numbers[2, at : at + 1] = (firsts[i] * p._first).sum()
        for i, row in zip(some, place.host(numbers).T.tolist(), strict=True):
            found[i] = tuple(row)
    return found


def check(p: GradientProjector, x: Array, name: str) -> str:
    """The dtype, which must be that of before; and so must the device."""
    dtype = check_dtype(x, name)
    basis = p.basis.codes if isinstance(p.basis, Int4Basis) else p.basis
    if basis is None:
        return dtype
    if device_of(basis) is None:
        raise TypeError(f"{name} is on CUDA device {device_of(x)} and the basis on the CPU; make a new projector")
    memory_of(**{name: x}, basis=basis)
    if library_of(x) != library_of(basis):
        raise TypeError(f"{name} must be of {library_of(basis)} as before, got {library_of(x)}")
    known = p._dtype_there
    if known is not None and dtype != known:
        raise TypeError(f"{name} must be {known} as before, got {dtype}")
    return dtype
