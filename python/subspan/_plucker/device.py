"""Mixing of sequences in CUDA device memory."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from subspan._arrays import Array
from subspan._device import Place, check_dtype, wide_dtype
from subspan._orth.common import detached, finish

if TYPE_CHECKING:
    from subspan._plucker.common import Sequences


def _place(s: Sequences, **arrays: Any) -> Place:
    return Place(z=s.z, **arrays)


def _check(x: Any, name: str, dtype: str, shape: tuple[int, ...]) -> Any:
    if check_dtype(x, name) != dtype:
        raise TypeError(f"{name} must be {dtype} as z is, got {check_dtype(x, name)}")
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
    return detached(x)


def _projection(s: Sequences, W: Array, b: Array | None) -> tuple[Any, Any]:
    pairs = math.comb(s.r, 2)
    if check_dtype(W, "W") != s.dtype:
        raise TypeError(f"W must be {s.dtype} as z is, got {check_dtype(W, 'W')}")
    if len(W.shape) != 2 or W.shape[1] != pairs:
        raise ValueError(
            f"W must have shape (d, {pairs}), a column for each pair of {s.r} dimensions, got {tuple(W.shape)}"
        )
    return detached(W), None if b is None else _check(b, "b", s.dtype, (int(W.shape[0]),))


def mix(s: Sequences, out: Array | None) -> Array:
    place = _place(s, out=out)
    result = place.output(out, (*s.shape, math.comb(s.r, 2)), s.dtype)
    place.module.plucker_mix(place.call(), s.z, s.weights, s.mask, detached(result), s.offsets, s.settings)
    return finish(result, False, s.library)


def _weights_gradient(place: Place, s: Sequences) -> Any:
    return None if s.weights is None else place.empty((*s.shape, len(s.offsets)), wide_dtype(s.dtype))


def mix_backward(s: Sequences, grad: Array, weights: Array | None) -> Any:
    place = _place(s, grad=grad)
    g = _check(grad, "grad", s.dtype, (*s.shape, math.comb(s.r, 2)))
    dz, full = place.empty((*s.shape, s.r), s.dtype), _weights_gradient(place, s)
    place.module.plucker_mix_backward(place.call(), g, s.z, s.weights, s.mask, dz, full, s.offsets, s.settings)
    if weights is None:
        return dz
    return dz, place.summed_to(full, tuple(weights.shape), s.dtype)


def mix_project(s: Sequences, W: Array, b: Array | None, out: Array | None) -> Array:
    place = _place(s, W=W, b=b, out=out)
    matrix, vector = _projection(s, W, b)
    result = place.output(out, (*s.shape, int(W.shape[0])), s.dtype)
    args = (s.z, s.weights, s.mask, matrix, vector, detached(result), s.offsets, s.settings)
    place.module.plucker_mix_project(place.call(), *args)
    return finish(result, False, s.library)


def mix_project_backward(s: Sequences, grad: Array, W: Array, b: Array | None, weights: Array | None) -> tuple[Any, ...]:
    place = _place(s, grad=grad, W=W, b=b)
    matrix, vector = _projection(s, W, b)
    d = int(W.shape[0])
    g = _check(grad, "grad", s.dtype, (*s.shape, d))
    make = place.zeros if math.prod(s.shape) == 0 else place.empty
    dz, dW = place.empty((*s.shape, s.r), s.dtype), make(tuple(W.shape), s.dtype)
    db = None if b is None else make((d,), s.dtype)
    full = _weights_gradient(place, s)
    if math.prod(s.shape) > 0:
        args = (g, s.z, s.weights, s.mask, matrix, vector, dz, dW, db, full, s.offsets, s.settings)
        place.module.plucker_mix_project_backward(place.call(), *args)
    results: list[Any] = [dz, dW, db]
    if weights is not None:
        results.append(place.summed_to(full, tuple(weights.shape), s.dtype))
    return tuple(results)
