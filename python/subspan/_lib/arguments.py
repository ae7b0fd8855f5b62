"""Arguments and small pieces that several modules share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from subspan import _core
from subspan._lib.arrays import Array, detached, to_library, whole_number, written
from subspan._lib.device import device_of


def convolution_hint(shape: tuple[int, ...], name: str) -> str:
    """What to say to who passes the gradient of a convolution where a matrix was meant."""
    return _core.convolution_hint(shape, name)


def finish(x: Any, fresh: bool, library: str, like: Array = None) -> Array:
    """The result in the caller's library; autograd is told of tensors that were written to."""
    if fresh:
        return to_library(x, library, like)
    written(x)
    return x


def on_the_cpu(x: Any, name: str) -> None:
    """Raises for an array on a CUDA device."""
    device = device_of(x)
    if device is not None:
        raise TypeError(
            f"{name} is on CUDA device {device}; this operation runs on the CPU and moves no data by itself"
        )


def numpy(x: Array) -> np.ndarray[Any, Any]:
    """A view in NumPy, without a copy. A tensor whose history would be lost is an error, as in :func:`detached`."""
    if isinstance(x, np.ndarray):
        return np.asarray(x)
    on_the_cpu(x, "an array")
    return np.from_dlpack(detached(x))


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
