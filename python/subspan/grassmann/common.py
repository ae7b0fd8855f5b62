"""Arguments that several modules share."""

from __future__ import annotations

from typing import Any

import numpy as np

from subspan._lib.arguments import convolution_hint, matrices
from subspan._lib.arrays import Array, library_of

SgdSettings = tuple[float, float, float, int, bool]
"""The rate with its sign, momentum, dampening, the retraction, and whether the buffer moves in parallel."""
RETRACTIONS = {"exp": 0, "cholesky": 1, "polar": 2, "qr": 3, "cayley": 4}


def same_matrices(**arrays: Array) -> tuple[list[Array], np.dtype[Any], tuple[int, ...]]:
    """The arrays, their one dtype, and the shape that their leading axes broadcast to."""
    out: list[Array] = []
    first = next(iter(arrays))
    dtype: np.dtype[Any] | None = None
    for name, x in arrays.items():
        x, other = matrices(x, name)
        dtype = dtype or other
        if other != dtype:
            raise TypeError(f"{name} must be {dtype} as {first} is, got {other}")
        if out and tuple(x.shape[-2:]) != tuple(out[0].shape[-2:]):
            raise ValueError(
                f"{name} must hold matrices of the shape that {first} holds, {tuple(out[0].shape[-2:])}, "
                f"got shape {tuple(x.shape)}{convolution_hint(tuple(x.shape), name)}"
            )
        out.append(x)
    assert dtype is not None
    n, k = out[0].shape[-2:]
    if k > n:
        raise ValueError(f"{first} has {k} columns of {n} entries: so many cannot be orthonormal")
    try:
        batch = np.broadcast_shapes(*(tuple(x.shape[:-2]) for x in out))
    except ValueError:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in arrays.items())
        raise ValueError(f"leading axes do not broadcast: {shapes}") from None
    return out, dtype, (*batch, n, k)


def one_of(value: str, allowed: dict[str, int], name: str) -> int:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return allowed[value]


def in_place(x: Array, name: str) -> Array:
    """An array that may be written to."""
    if library_of(x) == "jax":
        raise TypeError(f"{name}: JAX arrays are immutable, and this changes it in place")
    if not isinstance(x, np.ndarray) and not hasattr(x, "__dlpack__"):
        raise TypeError(f"{name} must be an array that can be written to, got {type(x).__name__}")
    if library_of(x) == "torch" and x.is_neg():
        raise ValueError(f"{name} is a lazily negated view, which cannot be written to; pass {name}.resolve_neg()")
    return x


def check_second_moment(second: Array, dtype: Any, U: Array, wanted: Any) -> None:
    """One entry for each class, in the dtype of ``U``."""
    if dtype != wanted:
        raise TypeError(f"second_moment must be {wanted} as U is, got {dtype}")
    if tuple(second.shape) != tuple(U.shape[:-2]):
        raise ValueError(
            f"second_moment must have one entry for each class, shape {tuple(U.shape[:-2])}, got {tuple(second.shape)}"
        )
