"""Projections of arrays in CUDA device memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from subspan._arrays import Array
from subspan._device import Place, broadcast_batch, check_dtype, matrix, wide_dtype
from subspan._orth.common import detached, finish, is_left

_SCALAR, _DIAGONAL, _FULL = 0, 1, 2


def apply_core(
    C: Array, V: Array, M: Array, alpha: float, side: str, out: Array | None, source: Array | None, name: str
) -> Array:
    left = is_left(side)
    scalar = isinstance(M, (int, float, np.integer, np.floating))
    place = Place(C=C, **{name: V}, M=None if scalar else M, source=source, out=out)
    C, V = matrix(C, "C"), matrix(V, name)
    dtype = check_dtype(C, "C")
    if check_dtype(V, name) != dtype:
        raise TypeError(f"{name} must be {dtype} as C is, got {check_dtype(V, name)}")
    kind, value, core = _SCALAR, 1.0, None
    arrays: dict[str, tuple[Any, int]] = {"C": (C, 2), name: (V, 2)}
    if scalar:
        value = float(M)
    else:
        if check_dtype(M, "M") not in (dtype, wide_dtype(dtype)):
            raise TypeError(f"M must be {dtype} or {wide_dtype(dtype)}, got {check_dtype(M, 'M')}")
        kind = _DIAGONAL if len(M.shape) == 1 else _FULL
        core = place.converted(detached(M), wide_dtype(dtype))
        if kind == _FULL:
            arrays["M"] = (core, 2)
    batch = broadcast_batch(**arrays)
    result = place.output(out, (*batch, *C.shape[-2:]), dtype)
    args = (detached(C), detached(V), core, kind, value, float(alpha), left, detached(result))
    place.module.apply_core(place.call(), *args, None if source is None else detached(source))
    return finish(result, False, place.library)


def matrices(x: Array, name: str) -> tuple[Array, str]:
    return matrix(x, name), check_dtype(x, name)


def project_out_list(
    C: list[Array], U: list[Array], strength: float, side: str, out: list[Array] | None
) -> list[Array]:
    left = is_left(side)
    names = {f"C[{i}]": x for i, x in enumerate(C)} | {f"U[{i}]": x for i, x in enumerate(U)}
    place = Place(**names)
    dtype = check_dtype(C[0], "C[0]")
    for name, x in names.items():
        if check_dtype(matrix(x, name), name) != dtype:
            raise TypeError(f"{name} must be {dtype} as C[0] is, got {check_dtype(x, name)}")
    results = [place.output(None if out is None else out[i], tuple(c.shape), dtype) for i, c in enumerate(C)]
    arrays = ([detached(x) for x in group] for group in (C, U, results))
    c, u, targets = arrays
    place.module.apply_core_group(place.call(), c, u, -strength, 1.0, left, targets)
    return [finish(x, False, place.library) for x in results]
