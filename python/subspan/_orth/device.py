"""Projections of arrays in CUDA device memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from subspan._arrays import Array
from subspan._device import (
    Place,
    broadcast_batch,
    check_dtype,
    kernels,
    matrix,
    need_blas,
    quick_call,
    same_dtype,
    wide_dtype,
)
from subspan._orth.common import detached, finish, is_left
from subspan._orth.int4 import Int4Basis

_SCALAR, _DIAGONAL, _FULL = 0, 1, 2
_KERNEL_WIDTH = 128  # wider bases go through cuBLAS, above 256 always, below where shared memory is small


def apply_core(
    C: Array, V: Array, M: Array, alpha: float, side: str, out: Array | None, source: Array | None, name: str
) -> Array:
    left = is_left(side)
    scalar = isinstance(M, (int, float, np.integer, np.floating))
    packed = isinstance(V, Int4Basis)
    place = Place(C=C, **{name: V.codes if packed else V}, M=None if scalar else M, source=source, out=out)
    C = matrix(C, "C")
    dtype = check_dtype(C, "C")
    arrays: dict[str, tuple[Any, int]] = {"C": (C, 2)}
    if packed:
        if check_dtype(V.scale, "scale") != wide_dtype(dtype):
            raise TypeError(f"C is {dtype} and the codes of {name} stand for {check_dtype(V.scale, 'scale')}")
    else:
        arrays[name] = (matrix(V, name), 2)
        if check_dtype(V, name) != dtype:
            raise TypeError(f"{name} must be {dtype} as C is, got {check_dtype(V, name)}")
    kind, value, core = _SCALAR, 1.0, None
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
    if V.shape[-1] > _KERNEL_WIDTH:
        need_blas()
    basis = V._parts() if packed else detached(V)
    args = (detached(C), basis, core, kind, value, float(alpha), left, detached(result))
    place.module.apply_core(place.call(), *args, None if source is None else detached(source))
    return finish(result, False, place.library)


def quick(C: Array, V: Array, value: float, alpha: float, side: str, out: Array) -> bool:
    """The same where nothing needs a second look; False, and nothing done, where something does."""
    call = quick_call(C)
    if call is None or type(V) is not type(C) or type(out) is not type(C):
        return False
    if hasattr(C, "requires_grad") and (V.requires_grad or V.is_neg() or out.requires_grad or out.is_neg()):
        return False
    if not (side == "left" or side == "right") or tuple(out.shape) != tuple(C.shape) or V.shape[-1] > _KERNEL_WIDTH:
        return False
    try:
        kernels().apply_core(call, C, V, None, _SCALAR, value, alpha, side == "left", out)
    except (TypeError, ValueError):  # before any launch: the long way says what is wrong in the caller's words
        return False
    finish(out, False, "")
    return True


def projector(U: Array, name: str) -> tuple[Array, Array]:
    """A basis and the core of the projector onto the span of any matrix.

    An orthonormal basis and 1; of 16 bits, where that basis would be rounded, the matrix and ``(UᵀU)⁺`` in float32.
    """
    if isinstance(U, Int4Basis):
        return U, U._gram_core()[0]
    place = Place(**{name: U})
    dtype = check_dtype(matrix(U, name), name)
    shape = tuple(map(int, U.shape))
    if shape[-1] > shape[-2]:
        raise ValueError(f"{name} must have at most as many columns as rows, got shape {shape}")
    need_blas()
    u = detached(U)
    if dtype in ("float32", "float64"):
        basis = place.empty(shape, dtype)
        place.module.span_basis(place.call(), u, basis)
        return basis, 1.0
    core = place.empty((*shape[:-2], shape[-1], shape[-1]), "float32")
    place.module.gram_core(place.call(), u, core)
    return U, core


def _reflections(**arrays: Array | None) -> tuple[Place, str]:
    given = {name: x for name, x in arrays.items() if x is not None}
    return Place(**given), same_dtype(given)


def householder_qr(A: Array) -> tuple[Array, Array, Array, Array]:
    """V, tau, T and R."""
    place, dtype = _reflections(A=A)
    *batch, m, n = matrix(A, "A").shape
    k = min(int(m), int(n))
    shapes = ((*batch, m, k), (*batch, k), (*batch, k, k), (*batch, k, n))
    V, tau, T, R = (place.empty(tuple(map(int, shape)), dtype) for shape in shapes)
    place.module.householder_qr(place.call(), detached(A), V, R, tau, T)
    return V, tau, T, R


def _core(place: Place, dtype: str, V: Array, tau: Array | None) -> Array:
    """``-T`` of given reflections."""
    k = int(V.shape[-1])
    if tau is not None and (len(tau.shape) < 1 or int(tau.shape[-1]) != k):
        raise ValueError(f"tau must have {k} entries, one for each column of V, got shape {tuple(tau.shape)}")
    arrays: dict[str, tuple[Any, int]] = {"V": (V, 2)} | ({} if tau is None else {"tau": (tau, 1)})
    core = place.empty((*broadcast_batch(**arrays), k, k), dtype)
    place.module.reflection_core(place.call(), detached(V), None if tau is None else detached(tau), core)
    return core


def _apply(place: Place, C: Array, V: Array, core: Array, side: str, transpose: bool, out: Array | None) -> Array:
    if transpose:
        core = place.turned(core)
    return apply_core(C, V, core, 1.0, side, out, None, "V")


def householder_apply(V: Array, C: Array, tau: Array | None, side: str, transpose: bool, out: Array | None) -> Array:
    place, dtype = _reflections(C=C, V=V, tau=tau)
    matrix(C, "C")
    return _apply(place, C, V, _core(place, dtype, matrix(V, "V"), tau), side, transpose, out)


def householder_product(V: Array, tau: Array | None) -> Array:
    place, dtype = _reflections(V=V, tau=tau)
    core = _core(place, dtype, matrix(V, "V"), tau)
    m, k = (int(x) for x in V.shape[-2:])
    return _leading_columns(place, V, core, m, min(m, k), tuple(core.shape[:-2]), dtype)


def _leading_columns(
    place: Place, V: Array, core: Array, m: int, columns: int, batch: tuple[int, ...], dtype: str
) -> Array:
    q = place.identity((*batch, m, columns), dtype)
    return apply_core(q, V, core, 1.0, "left", q, None, "V")


def factored_apply(V: Array, T: Array, C: Array, side: str, transpose: bool, out: Array | None) -> Array:
    place, _ = _reflections(C=C, V=V)
    return _apply(place, matrix(C, "C"), V, -T, side, transpose, out)


def factored_array(V: Array, T: Array, full: bool) -> Array:
    place, dtype = _reflections(V=V)
    m, k = (int(x) for x in V.shape[-2:])
    return _leading_columns(place, V, -T, m, m if full else k, tuple(map(int, V.shape[:-2])), dtype)


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
