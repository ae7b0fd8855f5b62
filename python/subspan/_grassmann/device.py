"""Steps and maps of points in CUDA device memory."""

from __future__ import annotations

from typing import Any

from subspan._arrays import Array
from subspan._device import Place, broadcast_batch, matrix, same_dtype
from subspan._grassmann.common import in_place
from subspan._orth.common import detached, finish


def _points(**arrays: Array) -> tuple[Place, str]:
    """All float32 or all float64, matrices of one shape."""
    place = Place(**arrays)
    dtype = same_dtype(arrays, ": points do not stay orthonormal in 16 bits")
    first = next(iter(arrays))
    for name, x in arrays.items():
        matrix(x, name)
        if tuple(x.shape[-2:]) != tuple(arrays[first].shape[-2:]):
            raise ValueError(
                f"{name} must hold matrices of the shape that {first} holds, {tuple(arrays[first].shape[-2:])}, "
                f"got shape {tuple(x.shape)}"
            )
    return place, dtype


def sgd_step(
    U: Array,
    grad: Array,
    buffer: Array | None,
    lr: float,
    momentum: float,
    dampening: float,
    method: int,
    parallel: bool,
) -> Array:
    arrays = {"U": U, "grad": grad} | ({} if buffer is None else {"buffer": buffer})
    for name, x in arrays.items():
        if name != "grad":
            in_place(x, name)
    place, _ = _points(**arrays)
    for name, x in arrays.items():
        if tuple(x.shape) != tuple(U.shape):
            raise ValueError(f"{name} must have the shape of U, {tuple(U.shape)}, got {tuple(x.shape)}")
    args = (detached(U), detached(grad), None if buffer is None else detached(buffer))
    place.module.grassmann_sgd_step(place.call(), *args, lr, momentum, dampening, method, parallel)
    if buffer is not None:
        finish(buffer, False, "")
    return finish(U, False, "")


def retract(U: Array, H: Array, method: int, t: float, out: Array | None) -> Array:
    place, dtype = _points(U=U, H=H)
    shape = (*broadcast_batch(U=(U, 2), H=(H, 2)), *tuple(U.shape[-2:]))
    result: Any = place.output(out, shape, dtype)
    place.module.grassmann_retract(place.call(), detached(U), detached(H), detached(result), t, method)
    return finish(result, False, place.library)


def tangent(U: Array, G: Array, out: Array | None) -> Array:
    place, dtype = _points(U=U, G=G)
    shape = (*broadcast_batch(U=(U, 2), G=(G, 2)), *tuple(U.shape[-2:]))
    result: Any = place.output(out, shape, dtype)
    place.module.grassmann_tangent(place.call(), detached(U), detached(G), detached(result))
    return finish(result, False, place.library)
