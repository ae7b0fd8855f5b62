"""Truncated SVDs of matrices in CUDA device memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from subspan._lib.arrays import Array, detached
from subspan._lib.device import DeviceMemory, check_dtype, memory_of, same_dtype, wide_dtype

_AT_ONCE = 2**31  # bytes of work memory that matrices of one launch may take together


class Problem:
    """One matrix of a call: where it is, how it starts, and where its triplets go."""

    def __init__(self, A: Array, rank: int, initial: Array | None, key: int, factors: bool) -> None:
        self.place = memory_of(A=A, initial=initial)
        self.dtype = check_dtype(A, "A")
        if len(A.shape) != 2:
            raise ValueError(f"A must have 2 dimensions, got shape {tuple(A.shape)}")
        m, n = (int(x) for x in A.shape)
        if not 1 <= rank <= min(m, n):
            raise ValueError(f"rank must be in [1, {min(m, n)}], got {rank}")
        self.shape, self.rank, self.key = (m, n), rank, key
        wide = wide_dtype(self.dtype)
        start = None
        if initial is not None:
            if check_dtype(initial, "initial") not in (self.dtype, wide):
                raise TypeError(f"initial must be {self.dtype} as A is, got {check_dtype(initial, 'initial')}")
            if len(initial.shape) != 2 or int(initial.shape[1]) != n:
                raise ValueError(f"initial must have {n} columns, got shape {tuple(initial.shape)}")
            start = self.place.converted(detached(initial), wide)
        self.U = self.place.empty((m, rank), self.dtype) if factors else None
        self.S = self.place.empty((rank,), wide)
        self.Vh = self.place.empty((rank, n), self.dtype)
        self._parts = (detached(A), start, self.U, self.S, self.Vh, key)

    def complete(self) -> None:
        """Give vectors to values that are zero, after a solution that has not."""
        self.place.module.complete_vectors(self.place.call(), self.Vh, self.S, self.key)

    def bytes_of_its_own(self, vectors: int) -> int:
        m, n = self.shape
        copied = 0 if self.dtype in ("float32", "float64") else 4 * m * n
        return 8 * vectors * (m + n) + copied


def _bytes_of_work(problems: list[Problem], vectors: int) -> int:
    """Decompositions of a launch have room for the longest matrix of it, each."""
    longest = max(max(p.shape) for p in problems)
    own = sum(p.bytes_of_its_own(vectors) for p in problems)
    return own + 8 * vectors * (longest + 4 * vectors) * len(problems) + 32 * vectors * (longest + vectors)


def solve(problems: list[Problem], vectors: int, power_iterations: int, complete: bool = True) -> None:
    """All of one device, dtype and rank; as many in a launch as fit the work memory."""
    problems = sorted(problems, key=lambda p: max(p.shape))
    begin = 0
    while begin < len(problems):
        end = begin + 1
        while end < len(problems) and _bytes_of_work(problems[begin : end + 1], vectors) <= _AT_ONCE:
            end += 1
        place = problems[begin].place
        place.module.truncated_svd(
            place.call(), [p._parts for p in problems[begin:end]], vectors, power_iterations, complete
        )
        begin = end


def _squared_norm(place: DeviceMemory, A: Array) -> float:
    out = place.empty((1,), "float64")
    place.module.squared_norm(place.call(), detached(A), out)
    return float(place.host(out)[0])


def truncated_svd(
    A: Array,
    rank: int,
    energy: float,
    tol: float,
    oversample: int,
    power_iterations: int,
    initial: Array | None,
    key: int,
) -> tuple[Any, Any, Any]:
    """As on the CPU. With a rank alone nothing waits for the device."""
    place = memory_of(A=A, initial=initial)
    same_dtype({"A": A})
    if len(A.shape) != 2 or min(A.shape) < 1:
        raise ValueError(f"A must be a matrix with at least one row and one column, got shape {tuple(A.shape)}")
    for name, value in (("oversample", oversample), ("power_iterations", power_iterations)):
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    full = min(int(x) for x in A.shape)
    norm = _squared_norm(place, A) if energy else 0.0

    def run(k: int, vectors: int, start: Array | None) -> Problem:
        problem = Problem(A, k, start, key, True)
        solve([problem], vectors, power_iterations)
        return problem

    def wanted(problem: Problem, most: int) -> int:
        s = place.host(problem.S).astype(np.float64)
        if np.isnan(s).any():
            raise ValueError("A holds NaN or infinity, or its decomposition did not settle")
        k, kept = 0, 0.0
        while k < most:
            if (energy and kept >= energy * norm) or (tol and (s[k] < tol * s[0] or s[0] == 0.0)):
                break
            kept += s[k] ** 2
            k += 1
        return k

    if rank:
        found = run(rank, min(full, rank + oversample), initial)
        k = wanted(found, rank) if energy or tol else rank
    else:
        # Doubling; each try starts from the one before. The last `oversample` values are not trusted.
        vectors = min(full, max(16, 0 if initial is None else int(initial.shape[0])) + oversample)
        start = initial
        while True:
            trusted = vectors if vectors == full else max(1, vectors - oversample)
            found = run(trusted, vectors, start)
            k = wanted(found, trusted)
            if k < trusted or vectors == full:
                break
            start, vectors = found.Vh, min(full, 2 * vectors)
    assert found.U is not None
    return found.U[:, :k], found.S[:k], found.Vh[:k]
