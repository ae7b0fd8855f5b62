"""Arguments that several functions share."""

from __future__ import annotations

from typing import Any

import numpy as np

from subspan._lib.arrays import Array, as_array, check_float, detached, library_of
from subspan._lib.call import Call
from subspan._lib.device import dtype_name, numpy, on_the_cpu
from subspan._lib.sparse import is_sparse

LISTED = (list, tuple, float, int)
"""Numbers that are written down: they have no dtype of their own and take that of the tokens."""


def first_positions(rope_start: Any, batch: tuple[int, ...]) -> tuple[int, ...] | None:
    """The position of each sequence's first token, in C order of ``batch``; None where one number is meant for all."""
    if isinstance(rope_start, (int, np.integer)) and not isinstance(rope_start, (bool, np.bool_)):
        return None
    x = as_array(rope_start, "rope_start") if not isinstance(rope_start, (list, tuple)) else np.asarray(rope_start)
    on_the_cpu(x, "rope_start")
    values = np.asarray(numpy(x))
    if values.dtype.kind not in "iu":
        raise TypeError(
            f"rope_start must be an integer, or an array of them, one for each sequence, got {values.dtype}"
        )
    if values.size and not -(2**40) < int(values.min()) <= int(values.max()) < 2**40:
        raise ValueError("rope_start must be below 2**40 in magnitude")
    try:
        values = np.broadcast_to(values, batch)
    except ValueError:
        raise ValueError(f"rope_start, shape {values.shape}, does not broadcast to the sequences, {batch}") from None
    return tuple(values.ravel().tolist())


def beside(call: Call, z: Array, weights: Any, mask: Any) -> tuple[Any, Any]:
    """Weights and mask as the kernels take them: lists in the dtype of ``z``, a mask in its dtype or as bytes."""
    if call.context is not None:
        if isinstance(weights, LISTED):
            raise TypeError(
                "weights is a list, and z is on a CUDA device; pass an array on that device, nothing is copied to it"
            )
        return weights, None if mask is None else call.context[3].bytes_of(mask, "mask")
    if isinstance(weights, LISTED):
        weights = numbers_for(weights, "weights", check_float(as_array(z, "z"), "z"))
    if mask is None:
        return weights, None
    z = as_array(z, "z")
    return weights, mask_array(mask, tuple(z.shape[:-1]), check_float(z, "z"))


def numbers_for(x: Array, name: str, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """A view in NumPy; lists have no dtype of their own and take this one."""
    if isinstance(x, (list, tuple, float)):
        made = np.asarray(x)
        if made.dtype.kind not in "fiu":
            raise TypeError(f"{name} must be numbers, got {made.dtype}")
        return made.astype(dtype)
    return numpy(detached(as_array(x, name)))


def mask_array(mask: Array, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """A boolean mask as ones and zeros of the dtype, broadcast."""
    if isinstance(mask, np.ma.MaskedArray):
        raise TypeError("mask is a masked array, and its own mask would be ignored")
    if is_sparse(mask) or isinstance(mask, (dict, str)):
        raise TypeError(f"mask must be a boolean or integer array, got {type(mask).__name__}")
    valid = np.asarray(numpy(mask) if library_of(mask) in ("torch", "jax") else mask)
    if valid.dtype.kind not in "biu":
        raise TypeError(f"mask must be boolean or integer (nonzero: the token takes part), got {valid.dtype}")
    try:
        valid = np.broadcast_to(valid, shape)
    except ValueError:
        raise ValueError(f"mask, shape {valid.shape}, does not broadcast to {shape}") from None
    return np.asarray((valid != 0).astype(dtype))


def summed_to(full: np.ndarray[Any, Any], shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """The gradient of an array that was broadcast, summed in double."""
    if full.shape == shape and full.dtype == dtype:
        return full
    extra = full.ndim - len(shape)
    axes = tuple(range(extra)) + tuple(extra + i for i, n in enumerate(shape) if n == 1 and full.shape[extra + i] != 1)
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(full.sum(axis=axes, dtype=np.float64).reshape(shape).astype(dtype))


def summed_gradient(call: Call, full: Any, weights: Any, *inputs: Any) -> Array:
    """That of the weights from those of every token; an error where finite input gave what the dtype cannot hold."""
    if call.context is not None:
        return call.context[3].summed_to(full, tuple(weights.shape), dtype_name(weights))
    shape = tuple(weights.shape) if hasattr(weights, "shape") else np.shape(weights)  # a list has none
    result = summed_to(full, shape, check_float(as_array(inputs[0], "z"), "z"))
    if not np.isfinite(result).all() and all(
        x is None or np.isfinite(numpy(as_array(x, "an argument"))).all() for x in inputs
    ):
        raise ValueError("the gradient of weights overflows the dtype although the input is finite; scale what goes in")
    given: Array = call.give(result)
    return given
