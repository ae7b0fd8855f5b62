"""Steps and maps of points in CUDA device memory."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from subspan._lib.arguments import detached, finish
from subspan._lib.arrays import Array
from subspan._lib.device import (
    Place,
    broadcast_batch,
    check_dtype,
    kernels,
    like,
    matrix,
    need_blas,
    quick_call,
    same_dtype,
)
from subspan.grassmann.common import SgdSettings, check_second_moment, in_place

if TYPE_CHECKING:
    from collections.abc import Callable


def _points(out: Array | None = None, **arrays: Array) -> tuple[Place, str]:
    """All float32 or all float64, matrices of one shape."""
    place = Place(**arrays, out=out)
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


def quick_sgd_step(U: Array, grad: Array, buffer: Array | None, settings: SgdSettings) -> bool:
    """:func:`sgd_step` where nothing needs a second look; False, and nothing done, where something does."""
    call = quick_call(U, grad, buffer)
    if call is None or grad is None or grad.shape != U.shape or not (buffer is None or buffer.shape == U.shape):
        return False
    try:
        kernels().grassmann_sgd_step(call, U, grad, buffer, *settings)
    except (TypeError, ValueError):  # before any launch: the long way says what is wrong in the caller's words
        return False
    finish(U, False, "")
    if buffer is not None:
        finish(buffer, False, "")
    return True


def sgd_step(U: Array, grad: Array, buffer: Array | None, settings: SgdSettings) -> Array:
    arrays = {"U": U, "grad": grad} | ({} if buffer is None else {"buffer": buffer})
    for name, x in arrays.items():
        if name != "grad":
            in_place(x, name)
    place, _ = _points(**arrays)
    for name, x in arrays.items():
        if tuple(x.shape) != tuple(U.shape):
            raise ValueError(f"{name} must have the shape of U, {tuple(U.shape)}, got {tuple(x.shape)}")
    args = (detached(U), detached(grad), None if buffer is None else detached(buffer))
    place.module.grassmann_sgd_step(place.call(), *args, *settings)
    if buffer is not None:
        finish(buffer, False, "")
    return finish(U, False, "")


def adam_step(
    U: Array,
    grad: Array,
    first: Array,
    second: Array,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    method: int,
    parallel: bool,
) -> Array:
    for name, x in {"U": U, "first_moment": first, "second_moment": second}.items():
        in_place(x, name)
    Place(U=U, grad=grad, first_moment=first, second_moment=second)
    place, dtype = _points(U=U, grad=grad, first_moment=first)
    for name, x in {"grad": grad, "first_moment": first}.items():
        if tuple(x.shape) != tuple(U.shape):
            raise ValueError(f"{name} must have the shape of U, {tuple(U.shape)}, got {tuple(x.shape)}")
    check_second_moment(second, check_dtype(second, "second_moment"), U, dtype)
    arrays = (detached(U), detached(grad), detached(first), detached(second)[..., None, None])
    place.module.grassmann_adam_step(place.call(), *arrays, step, lr, *betas, eps, method, parallel)
    for x in (first, second):
        finish(x, False, "")
    return finish(U, False, "")


def transport(U: Array, H: Array, V: Array, t: float, out: Array | None) -> Array:
    place, dtype = _points(out, U=U, H=H, V=V)
    shape = (*broadcast_batch(U=(U, 2), H=(H, 2), V=(V, 2)), *tuple(U.shape[-2:]))
    result: Any = place.output(out, shape, dtype)
    place.module.grassmann_transport(place.call(), detached(U), detached(H), detached(V), detached(result), t)
    return finish(result, False, place.library)


def retract(U: Array, H: Array, method: int, t: float, out: Array | None) -> Array:
    call = quick_call(U, H, out)
    if call is not None and H.shape == U.shape and (out is None or (out.shape == U.shape and out.dtype == U.dtype)):
        result: Any = like(U, tuple(U.shape)) if out is None else out
        try:
            kernels().grassmann_retract(call, U, H, result, t, method)
        except (TypeError, ValueError):  # as above
            pass
        else:
            return result if out is None else finish(out, False, "")
    place, dtype = _points(out, U=U, H=H)
    shape = (*broadcast_batch(U=(U, 2), H=(H, 2)), *tuple(U.shape[-2:]))
    result = place.output(out, shape, dtype)
    place.module.grassmann_retract(place.call(), detached(U), detached(H), detached(result), t, method)
    return finish(result, False, place.library)


def tangent(U: Array, G: Array, out: Array | None) -> Array:
    place, dtype = _points(out, U=U, G=G)
    shape = (*broadcast_batch(U=(U, 2), G=(G, 2)), *tuple(U.shape[-2:]))
    result: Any = place.output(out, shape, dtype)
    place.module.grassmann_tangent(place.call(), detached(U), detached(G), detached(result))
    return finish(result, False, place.library)


def _pairs(U: Array, W: Array, out: Array | None = None) -> tuple[Place, str, tuple[int, ...]]:
    place, dtype = _points(out, U=U, W=W)
    return place, dtype, (*broadcast_batch(U=(U, 2), W=(W, 2)), *(int(x) for x in U.shape[-2:]))


def principal_angles(U: Array, W: Array, vectors: bool) -> tuple[Array, Array | None, Array | None]:
    place, dtype, shape = _pairs(U, W)
    angles = place.empty((*shape[:-2], shape[-1]), dtype)
    p, q = (place.empty(shape, dtype) if vectors else None for _ in range(2))
    place.module.grassmann_angles(place.call(), detached(U), detached(W), angles, p, q)
    return angles, p, q


def distance(U: Array, W: Array, kind: int) -> Array:
    place, dtype, shape = _pairs(U, W)
    out = place.empty((*shape[:-2], 1, 1), dtype)
    place.module.grassmann_distance(place.call(), detached(U), detached(W), out, kind)
    return out.reshape(shape[:-2])


def log(U: Array, W: Array, out: Array | None) -> Array:
    place, dtype, shape = _pairs(U, W, out)
    result = place.output(out, shape, dtype)
    place.module.grassmann_log(place.call(), detached(U), detached(W), detached(result))
    return finish(result, False, place.library)


_UNHEARD = 4  # iterations between two looks at how far they are, where nobody wants to hear of each


def mean(
    U: Array,
    weights: np.ndarray[Any, Any] | None,
    initial: Array | None,
    tol: float,
    limit: int,
    progress: Callable[[int, int, float, float], object] | None,
    out: Array | None,
) -> tuple[Array, list[tuple[float, float, int, bool]]]:
    """The means, and norm of the gradient, variance, iterations and convergence of each."""
    place = Place(U=U, initial=initial, out=out)
    dtype = same_dtype({"U": U} | ({} if initial is None else {"initial": initial}))
    count, *batch, n, k = (int(x) for x in U.shape)
    shape = (*batch, n, k)
    result = place.output(out, shape, dtype)
    w = np.full(count, 1.0 / count) if weights is None else weights
    if not (np.isfinite(w).all() and (w >= 0).all()):
        raise ValueError("weights must be finite and not negative")
    total = float(w.sum())
    if not 0 < total < math.inf:
        raise ValueError("weights must have a positive, finite sum")
    if initial is not None and tuple(initial.shape) != shape:
        raise ValueError(f"initial must have the shape of the means, {shape}, got {tuple(initial.shape)}")
    means = math.prod(batch)
    if means * n * k == 0:
        return finish(result, False, place.library), [(0.0, 0.0, 0, True)] * means
    u = detached(U)
    points = [place.empty(shape, dtype) for _ in range(4)]
    with place.inside():
        points[0][...] = detached(initial) if initial is not None else u[int(w.argmax())]
    place.module.require_apart(place.call(), detached(result), points[0], "the means")  # an out that overlaps itself
    logs = place.empty((count, *shape), dtype)
    numbers = place.empty((place.module.grassmann_mean_rows(place.call(), points[0]), means), "float64")
    args = (u, place.from_host(w / total), *points, logs, numbers, tol, limit)
    place.module.grassmann_mean(place.call(), *args, 0)
    while True:
        _, variance, norm, steps, status = place.host(numbers[:5])
        running = np.flatnonzero(status == 0)
        if (status == 3).any():
            raise ValueError("U or initial holds NaN or infinity, or bases that are far from orthonormal")
        if running.size == 0:
            break
        if progress is not None:
            for j in running:
                progress(int(j), int(steps[j]), float(norm[j]), float(variance[j]))
        place.module.grassmann_mean(place.call(), *args, _UNHEARD if progress is None else 1)
    with place.inside():
        result[...] = points[0]
    reports = [
        (float(a), float(b), int(c), bool(d == 1)) for a, b, c, d in zip(norm, variance, steps, status, strict=True)
    ]
    return finish(result, False, place.library), reports


def _features(x: Array, U: Array, grad: Array | None = None) -> tuple[Place, str]:
    arrays = {"x": x, "U": U} | ({} if grad is None else {"grad": grad})
    place = Place(**arrays)
    dtype = same_dtype(arrays)
    if len(x.shape) != 2:
        raise ValueError(f"x must have shape (batch, n), got {tuple(x.shape)}")
    if len(U.shape) != 3:
        raise ValueError(f"U must have shape (classes, n, k), got {tuple(U.shape)}")
    if int(U.shape[1]) != int(x.shape[1]):
        raise ValueError(
            f"x has {x.shape[1]} features and the subspaces of U, shape {tuple(U.shape)}, are of {U.shape[1]}"
        )
    shape = (int(x.shape[0]), int(U.shape[0]))
    if grad is not None and tuple(grad.shape) != shape:
        raise ValueError(f"grad must have shape {shape}, got {tuple(grad.shape)}")
    need_blas()
    return place, dtype


def logits(x: Array, U: Array, scale: float) -> Array:
    place, dtype = _features(x, U)
    out = place.empty((int(x.shape[0]), int(U.shape[0])), dtype)
    args = (place.for_blas(detached(x)), detached(U), out, scale)
    place.module.grassmann_logits(place.call(), *args)
    return out


def logits_backward(grad: Array, x: Array, U: Array, scale: float) -> tuple[Array, Array]:
    place, dtype = _features(x, U, grad)
    # Without features or classes there is nothing to add up.
    make = place.zeros if 0 in (int(x.shape[0]), int(U.shape[0])) else place.empty
    dx = make(tuple(int(s) for s in x.shape), dtype)
    classes, n, k = (int(s) for s in U.shape)
    strides = U.stride() if place.library == "torch" else getattr(U, "strides", (0, 1, 0))
    by_columns = n > 1 and k > 1 and abs(strides[1]) < abs(strides[2])
    dU = place.turned(make((classes, k, n), dtype)) if by_columns else make((classes, n, k), dtype)
    args = (detached(grad), place.for_blas(detached(x)), detached(U), dx, dU, scale)
    place.module.grassmann_logits_backward(place.call(), *args)
    return dx, dU
