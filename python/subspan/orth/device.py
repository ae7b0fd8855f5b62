"""Projections of arrays in CUDA device memory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from subspan._lib.arguments import detached, finish, is_left
from subspan._lib.arrays import Array
from subspan._lib.device import (
    Place,
    broadcast_batch,
    check_dtype,
    device_of,
    kernels,
    like,
    matrix,
    need_blas,
    need_solver,
    quick_call,
    same_dtype,
    wide_dtype,
)
from subspan.orth.int4 import Int4Basis

_SCALAR, _DIAGONAL, _FULL = 0, 1, 2
_REFLECTIONS = 128  # of the kernel with a block for each matrix
_LARGE, _FEW = 2**17, 32
_SMALL_BLOCK = 99 * 1024  # bytes that a block of every device may have
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


def require_apart(out: Array, bases: Any) -> None:
    """ValueError where writing ``out`` would change a basis."""
    place = Place(out=out)
    for i, u in enumerate(bases):
        for part in u._parts()[:3] if isinstance(u, Int4Basis) else (u,):
            if device_of(part) == place.device:
                place.module.require_apart(place.call(), detached(out), detached(part), f"U[{i}]")


def quick(C: Array, V: Array, value: float, alpha: float, side: str, out: Array | None) -> Array | None:
    """The same where nothing needs a second look; None, and nothing done, where something does."""
    call = quick_call(C, V, out)
    if call is None or not (out is None or out.shape == C.shape):
        return None
    if not (side == "left" or side == "right") or not 2 <= len(V.shape) <= len(C.shape) or V.shape[-1] > _KERNEL_WIDTH:
        return None
    result = like(C, tuple(C.shape)) if out is None else out
    try:
        kernels().apply_core(call, C, V, None, _SCALAR, value, alpha, side == "left", result)
    except (TypeError, ValueError):  # before any launch: the long way says what is wrong in the caller's words
        return None
    return result if out is None else finish(out, False, "")


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
    items = int(n) * (int(m) | 1) + 2 * k + k * (k | 1)  # of the kernel's block
    if k > _REFLECTIONS or items * np.dtype(dtype).itemsize > _SMALL_BLOCK:
        need_blas()
        need_solver()
    place.module.householder_qr(place.call(), detached(A), V, R, tau, T)
    return V, tau, T, R


def _by_products(V: Array, batch: tuple[int, ...]) -> bool:
    """Whether cuBLAS takes the reflections; else there is one block for each matrix."""
    m, k = (int(x) for x in V.shape[-2:])
    return k > _REFLECTIONS or (m * k > _LARGE and math.prod(batch) < _FEW)


def _core(place: Place, dtype: str, V: Array, tau: Array | None) -> Array:
    """``-T`` of given reflections, over the leading axes of ``V`` and ``tau`` together."""
    k = int(V.shape[-1])
    if tau is not None and (len(tau.shape) < 1 or int(tau.shape[-1]) != k):
        raise ValueError(f"tau must have {k} entries, one for each column of V, got shape {tuple(tau.shape)}")
    arrays: dict[str, tuple[Any, int]] = {"V": (V, 2)} | ({} if tau is None else {"tau": (tau, 1)})
    batch = broadcast_batch(**arrays)
    core = place.empty((*batch, k, k), dtype)
    args = (detached(V), None if tau is None else detached(tau), core)
    if _by_products(V, batch):
        need_blas()
        place.module.wide_reflection_core(place.call(), place.for_blas(args[0]), *args[1:])
    else:
        place.module.reflection_core(place.call(), *args)
    return core


def _apply(place: Place, C: Array, V: Array, core: Array, side: str, transpose: bool, out: Array | None) -> Array:
    if transpose:
        core = place.turned(core)
    return apply_core(C, V, core, 1.0, side, out, None, "V")


def householder_apply(V: Array, C: Array, tau: Array | None, side: str, transpose: bool, out: Array | None) -> Array:
    place, dtype = _reflections(C=C, V=V, tau=tau, out=out)
    matrix(C, "C")
    return _apply(place, C, V, _core(place, dtype, matrix(V, "V"), tau), side, transpose, out)


def householder_product(V: Array, tau: Array | None) -> Array:
    place, dtype = _reflections(V=V, tau=tau)
    core = _core(place, dtype, matrix(V, "V"), tau)
    m, k = (int(x) for x in V.shape[-2:])
    batch = tuple(int(x) for x in core.shape[:-2])
    if not _by_products(V, batch):
        return _leading_columns(place, V, core, m, min(m, k), batch, dtype)
    q = place.empty((*batch, m, min(m, k)), dtype)
    place.module.reflection_product(place.call(), place.for_blas(detached(V)), core, q)
    return q


def householder_product_backward(grad: Array, V: Array, tau: Array | None) -> tuple[Array, Array | None]:
    place, dtype = _reflections(V=V, tau=tau, grad=grad)
    core = _core(place, dtype, matrix(V, "V"), tau)
    m, k = (int(x) for x in V.shape[-2:])
    want = (*(int(x) for x in core.shape[:-2]), m, min(m, k))
    if tuple(grad.shape) != want:
        raise ValueError(f"grad must have shape {want}, got {tuple(grad.shape)}")
    need_blas()
    dv = place.zeros(tuple(map(int, V.shape)), dtype)
    dtau = None if tau is None else place.zeros(tuple(map(int, tau.shape)), dtype)
    v, g = (place.for_blas(detached(x)) for x in (V, grad))
    args = (v, core, None if tau is None else detached(tau), g, dv, dtau)
    place.module.reflection_product_backward(place.call(), *args)
    return dv, dtau


def _rows_together(x: Array, n: int) -> Array:
    """A stack of rows as one matrix; a view where the library can make one."""
    return x.reshape((-1, n))


def householder_apply_backward(
    grad: Array, V: Array, C: Array, tau: Array | None, side: str, transpose: bool
) -> tuple[Array, ...]:
    place, dtype = _reflections(C=C, V=V, tau=tau, grad=grad)
    left = is_left(side)
    shape = tuple(int(x) for x in matrix(C, "C").shape)
    if tuple(grad.shape) != shape:
        raise ValueError(f"grad must have the shape of C, {shape}, got {tuple(grad.shape)}")
    arrays: dict[str, tuple[Any, int]] = {"C": (C, 2), "V": (matrix(V, "V"), 2)}
    if tau is not None:
        arrays["tau"] = (tau, 1)
    if (*broadcast_batch(**arrays), *shape[-2:]) != shape:
        raise ValueError(
            f"C must have all leading axes of V and tau for gradients, got shapes {shape} and {tuple(V.shape)}"
        )
    if int(V.shape[-2]) != shape[-2 if left else -1]:
        raise ValueError(
            f"V must have {shape[-2 if left else -1]} rows to act on C {shape} from the {side}, got {int(V.shape[-2])}"
        )
    core = _core(place, dtype, V, tau)
    need_blas()
    dv = place.zeros(tuple(map(int, V.shape)), dtype)
    dtau = None if tau is None else place.zeros(tuple(map(int, tau.shape)), dtype)
    dc = place.empty(shape, dtype)
    if math.prod(shape) == 0:
        return (dv, dc) if dtau is None else (dv, dc, dtau)
    c, g, target = place.for_blas(detached(C)), place.for_blas(detached(grad)), dc
    if not left and math.prod(core.shape[:-2]) == 1:  # one set of reflections for all rows
        c, g, target = (_rows_together(x, shape[-1]) for x in (c, g, dc))
    one = math.prod(core.shape[:-2]) == 1
    v, t, grads = place.for_blas(detached(V)), None if tau is None else detached(tau), (dv, dtau)
    if one:  # leading axes of one that the rows together have no place for
        v, core, t = v.reshape(v.shape[-2:]), core.reshape(core.shape[-2:]), None if t is None else t.reshape((-1,))
        grads = (dv.reshape(dv.shape[-2:]), None if dtau is None else dtau.reshape((-1,)))
    place.module.reflection_apply_backward(place.call(), v, core, t, c, g, left, transpose, *grads, target)
    return (dv, dc) if dtau is None else (dv, dc, dtau)


def _leading_columns(
    place: Place, V: Array, core: Array, m: int, columns: int, batch: tuple[int, ...], dtype: str
) -> Array:
    q = place.identity((*batch, m, columns), dtype)
    return apply_core(q, V, core, 1.0, "left", q, None, "V")


def factored_apply(V: Array, T: Array, C: Array, side: str, transpose: bool, out: Array | None) -> Array:
    place, _ = _reflections(C=C, V=V)
    with place.inside():
        core = -T
    return _apply(place, matrix(C, "C"), V, core, side, transpose, out)


def factored_array(V: Array, T: Array, full: bool) -> Array:
    place, dtype = _reflections(V=V)
    m, k = (int(x) for x in V.shape[-2:])
    with place.inside():
        core = -T
    return _leading_columns(place, V, core, m, m if full else k, tuple(map(int, V.shape[:-2])), dtype)


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
    if any(u.shape[-1] > _KERNEL_WIDTH for u in U):
        need_blas()
    arrays = ([detached(x) for x in group] for group in (C, U, results))
    c, u, targets = arrays
    place.module.apply_core_group(place.call(), c, u, -strength, 1.0, left, targets)
    return [finish(x, False, place.library) for x in results]
