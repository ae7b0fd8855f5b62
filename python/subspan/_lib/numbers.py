"""Numbers, choices and flags of a user's, with errors that name the argument."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from subspan._core import choice, real_number, share, truth, whole_number

__all__ = [
    "choice", "float_dtype", "generator_of", "real_number", "rng_key", "share", "stack_shape", "truth", "whole_number",
]  # fmt: skip


def rng_key(rng: int | np.random.Generator | np.integer[Any] | None) -> int:
    """A 64-bit key for the counter-based generator (SPEC 7)."""
    return int(generator_of(rng).integers(0, 2**63, dtype=np.int64))


def generator_of(rng: int | np.random.Generator | np.integer[Any] | None) -> np.random.Generator:
    """``numpy.random.default_rng`` with texts that name the argument."""
    if isinstance(rng, (bool, np.bool_)):
        raise TypeError(f"rng must be None, an int or a numpy.random.Generator, got {rng!r}")
    try:
        return np.random.default_rng(rng)
    except (TypeError, ValueError) as e:
        raise type(e)(
            f"rng must be None, an int that is not negative or a numpy.random.Generator, got {rng!r}"
        ) from None


def float_dtype(dtype: Any) -> np.dtype[Any]:
    """float32 or float64 from what NumPy, PyTorch or JAX calls so."""
    name = str(dtype).rpartition(".")[2] if not isinstance(dtype, (type, np.dtype)) else dtype
    try:
        d = np.dtype(name)
    except TypeError:
        d = np.dtype(object)
    if dtype is None or d not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise TypeError(f"dtype must be float32 or float64, got {dtype!r}")
    return d


def stack_shape(n: int, k: int, batch: Any) -> tuple[int, ...]:
    """``(*batch, n, k)`` of orthonormal columns, checked."""
    n, k = whole_number(n, "n", 0), whole_number(k, "k", 0)
    if k > n:
        raise ValueError(f"k must be at most n = {n}, got {k}")
    sizes = batch if isinstance(batch, (tuple, list)) else (batch,)
    shape = (*(whole_number(size, "batch", 0) for size in sizes), n, k)
    if math.prod(shape) > 2**58:
        raise ValueError(f"{shape} are more numbers than memory can hold")
    return shape
