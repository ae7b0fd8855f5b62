"""Arguments and small pieces that several modules share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from subspan import _core
from subspan._lib.arrays import Array, as_array, check_float, check_library, detached, to_library, whole_number, written
from subspan._lib.device import device_of


def matrices(x: Array, name: str) -> tuple[Array, np.dtype[Any]]:
    x = as_array(x, name)
    on_the_cpu(x, name)
    dtype = check_float(x, name)
    if len(x.shape) < 2:
        hint = f"; one column is {name}[:, None]" if len(x.shape) == 1 else ""
        raise ValueError(f"{name} must have at least 2 dimensions, got shape {tuple(x.shape)}{hint}")
    check_library(x, name)
    return x, dtype


def is_vector(x: Any) -> bool:
    """Whether x has one axis; a list of numbers has."""
    shape = getattr(x, "shape", None)
    if shape is not None:
        return len(shape) == 1
    return isinstance(x, (list, tuple)) and len(x) > 0 and isinstance(x[0], (int, float))


def column(x: Any) -> Any:
    """A vector as one column; anything else as it is."""
    return as_array(x, "an array")[:, None] if is_vector(x) else x


def same_dtype(dtype: Any, other: Any, name: str, first: str) -> None:
    """Dtypes that differ are named before anything is said of values."""
    if other != dtype:
        raise TypeError(f"{name} must be {dtype} as {first} is, got {other}")


def convolution_hint(shape: tuple[int, ...], name: str) -> str:
    """What to say to who passes the gradient of a convolution where a matrix was meant."""
    return _core.convolution_hint(shape, name)


def is_left(side: str) -> bool:
    if side not in ("left", "right"):
        raise ValueError(f"side must be 'left' or 'right', got {side!r}")
    return side == "left"


def of_vector(f: Any, x: Array, side: str, out: Array | None) -> Array:
    """``f(matrix, out)`` of a vector: a column where matrices act from the left, else a row."""
    if side == "both":
        raise ValueError("side='both' is for matrices; a vector has one side, 'left' or 'right'")
    left = is_left(side)

    def wide(y: Any) -> Any:
        return y[..., None] if left else y[..., None, :]

    result = f(wide(as_array(x, "C")), None if out is None else wide(out))
    if out is not None:
        return out
    return result[..., 0] if left else result[..., 0, :]  # other arguments may have leading axes


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


def broadcast(c: Array, *others: tuple[Array, int]) -> tuple[Array, tuple[int, ...]]:
    """C, as a broadcast view where other arguments have more leading axes than it."""
    shape = tuple(c.shape)
    try:
        batch = np.broadcast_shapes(shape[:-2], *(tuple(x.shape)[: len(x.shape) - core] for x, core in others))
    except ValueError:
        names = ", ".join(str(tuple(x.shape)) for x, _ in others)
        raise ValueError(f"leading axes do not broadcast: {shape} with {names}") from None
    if batch != shape[:-2]:
        c = np.broadcast_to(numpy(c), (*batch, *shape[-2:]))
    return c, (*batch, *shape[-2:])


def check_basis(U: Array, name: str) -> None:
    """Orthonormal columns to 64 eps √k, by two products with vectors."""
    _core.check_basis(None, U, name)


def product(A: np.ndarray[Any, Any], B: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = _core.product(None, A, B, 1.0, None)
    return found


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
