"""Optimiser steps and the classification head."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from subspan import _core
from subspan._lib.arguments import convolution_hint, detached, finish, matrices
from subspan._lib.arrays import Array, as_array, check_float, library_of, real_number, to_library, truth, whole_number
from subspan._lib.device import on_device
from subspan.grassmann import device
from subspan.grassmann.common import (
    RETRACTIONS,
    SgdSettings,
    check_second_moment,
    in_place,
    one_of,
)

_TRANSPORTS = {"project": 0, "parallel": 1}


def _stack(U: Array, **others: Array) -> list[Array]:
    """U and arrays of its very shape and dtype."""
    in_place(U, "U")
    U, dtype = matrices(U, "U")
    n, k = U.shape[-2:]
    if k > n:
        raise ValueError(f"U has {k} columns of {n} entries: so many cannot be orthonormal")
    out = [U]
    for name, x in others.items():
        if name != "grad":
            in_place(x, name)
        x, other = matrices(x, name)
        if other != dtype:
            raise TypeError(f"{name} must be {dtype} as U is, got {other}")
        if tuple(x.shape) != tuple(U.shape):
            hint = convolution_hint(tuple(x.shape), name)
            raise ValueError(f"{name} must have the shape of U, {tuple(U.shape)}, got {tuple(x.shape)}{hint}")
        out.append(x)
    return out


def _rate(lr: float, maximize: bool) -> float:
    rate: float = real_number(lr, "lr", 0.0)
    return -rate if truth(maximize, "maximize") else rate


def _check_sgd_settings(
    lr: float, maximize: bool, momentum: float, dampening: float, retraction: str, transport: str
) -> SgdSettings:
    which = one_of(retraction, RETRACTIONS, "retraction")
    parallel = one_of(transport, _TRANSPORTS, "transport") == 1
    return (
        _rate(lr, maximize),
        real_number(momentum, "momentum", 0.0),
        real_number(dampening, "dampening"),
        which,
        parallel,
    )


_sgd_settings_before = functools.lru_cache(maxsize=256, typed=True)(_check_sgd_settings)


def _sgd_settings(*given: Any) -> SgdSettings:
    """The settings of a step, as the kernels take them; those of an optimiser are checked once."""
    try:
        return _sgd_settings_before(*given)
    except TypeError:  # something that has no hash; or an error, which comes again
        return _check_sgd_settings(*given)


def sgd_step(
    U: Array,
    grad: Array,
    buffer: Array | None = None,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    retraction: str = "exp",
    transport: str = "project",
    maximize: bool = False,
    check: bool = True,
) -> Array:
    """One step of Riemannian gradient descent with momentum on a whole stack, in place.

    ``buffer = momentum · buffer + (1 - dampening) · grad``; ``U`` moves by ``-lr`` times the part of the buffer that is
    tangent at ``U``.

    Parameters
    ----------
    U : array (..., n, k)
        Orthonormal columns; changed. Any strides: a weight that is stored as ``(C, k, n)`` goes in as its transposed
        view.
    grad : array (..., n, k)
        The Euclidean gradient; it is projected here.
    buffer : array (..., n, k), optional
        The momentum, zeros before the first step; changed. Needed where momentum is not zero.
    lr : float
    momentum, dampening : float
        As in ``torch.optim.SGD``, except that the first step is damped like all others.
    retraction : {"exp", "cholesky", "polar", "qr", "cayley"}
        The exact geodesic, or a retraction as in :func:`retract`.
    transport : {"project", "parallel"}
        What becomes of the buffer when ``U`` moves. ``"project"``: it stays, and what it has along ``U`` is left out
        where it is used, as Grassmann Class Representation does. ``"parallel"``: its tangent part moves in parallel
        along the geodesic (``retraction="exp"`` only).
    maximize : bool, default False
    check : bool, default True
        Look at every class before the first one is changed: NaN or infinity in the gradient or the buffer, or a ``U``
        that is not orthonormal to 64 eps √k, is a ValueError that names the class, and nothing has changed. Reads all
        of them once more. Without it NaN still raises where it is met, when some classes have moved.

    Returns
    -------
    U

    Warnings
    --------
    With ``"project"`` the buffer keeps what Euclidean gradients had along the old ``U``, and that becomes tangent when
    ``U`` has moved. Where gradients are large along ``U`` (``A U`` for a quadratic form, say), ``lr / (1 - momentum)``
    must be small against that part too, not only against the curvature on the manifold, or the iteration diverges.
    ``"parallel"``, or a ``grad`` that went through :func:`tangent`, has no such limit.

    Notes
    -----
    Momentum, and two sweeps over each class, which stays in cache between them: one gives ``UᵀU``, ``UᵀB`` and
    ``BᵀB``, the other writes ``U P + B Q`` of a ``k x k`` core. ``8 n k²`` flops. ``UᵀU - I`` is taken off by a
    Newton step within the same coefficients: bases stay orthonormal to 10 eps √k after any number of steps, and no
    column changes its sign, as one does after a QR factorisation. A step of any length stays on the manifold.
    Geodesic: Edelman, Arias and Smith (1998). Optimiser: Xiong et al., Get the Best of Both Worlds: Improving Accuracy
    and Transferability by Grassmann Class Representation, ICCV 2023.

    Examples
    --------
    The dominant subspace of a matrix:

    >>> import numpy as np
    >>> from subspan import grassmann
    >>> A = np.diag([5.0, 4.0, 1.0, 0.5, 0.1])
    >>> U = grassmann.random(5, 2, rng=0)
    >>> buffer = np.zeros_like(U)
    >>> for _ in range(200):
    ...     _ = grassmann.sgd_step(U, -A @ U, buffer, lr=0.1, momentum=0.5, transport="parallel")
    >>> bool(grassmann.distance(U, np.eye(5)[:, :2]) < 1e-12)
    True
    """
    settings = _sgd_settings(lr, maximize, momentum, dampening, retraction, transport)
    if buffer is None:
        if settings[1] != 0:
            raise ValueError(f"momentum is {momentum} and there is no buffer: pass an array of zeros like U")
        if settings[2] != 0:
            raise ValueError(f"dampening is {dampening} and there is no buffer: it damps what goes into one")
    if type(U) is not np.ndarray or type(grad) is not np.ndarray or on_device(buffer):
        if device.quick_sgd_step(U, grad, buffer, settings):
            return U
        if on_device(U, grad, buffer):
            return device.sgd_step(U, grad, buffer, settings)
    if buffer is None:
        U, grad = _stack(U, grad=grad)
    else:
        U, grad, buffer = _stack(U, grad=grad, buffer=buffer)
    _core.grassmann_sgd_step(
        detached(U),
        detached(grad),
        None if buffer is None else detached(buffer),
        *settings,
        truth(check, "check"),
    )
    if buffer is not None:
        finish(buffer, False, "")
    return finish(U, False, "")


def adam_step(
    U: Array,
    grad: Array,
    first_moment: Array,
    second_moment: Array,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    retraction: str = "exp",
    transport: str = "project",
    maximize: bool = False,
    check: bool = True,
) -> Array:
    """One step of Riemannian Adam on a whole stack, in place, with one second moment for each class.

    With ``g = tangent(U, grad)``: ``m = β₁ m + (1 - β₁) g``; ``v = β₂ v + (1 - β₂) ‖g‖²``; ``U`` moves by
    ``-lr m̂ / (√v̂ + eps)``, where ``m̂`` is the part of ``m / (1 - β₁^step)`` that is tangent at ``U`` and
    ``v̂ = v / (1 - β₂^step)``.

    Parameters
    ----------
    U, grad, lr, retraction, transport, maximize, check
        As for :func:`sgd_step`. ``transport`` is that of the first moment.
    first_moment : array (..., n, k)
        Zeros before the first step; changed.
    second_moment : array (...), one entry for each class
        Zeros before the first step; changed. It stops at the largest number of its dtype (gradients of 1e19 in
        float32).
    step : int
        Counts from 1.
    betas : pair of float in [0, 1)
    eps : float

    Returns
    -------
    U

    Notes
    -----
    A scalar second moment is invariant under a change of basis of the subspace, which an entrywise one is not
    (Bécigneul and Ganea, Riemannian Adaptive Optimization Methods, ICLR 2019). ``17 n k²`` flops.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan import grassmann
    >>> A = np.diag([5.0, 4.0, 1.0, 0.5, 0.1])
    >>> U = grassmann.random(5, 2, rng=0)
    >>> m, v = np.zeros_like(U), np.zeros(())
    >>> for i in range(500):
    ...     _ = grassmann.adam_step(U, -A @ U, m, v, step=i + 1, lr=0.02)
    >>> bool(grassmann.distance(U, np.eye(5)[:, :2]) < 1e-8)
    True
    """
    which = one_of(retraction, RETRACTIONS, "retraction")
    parallel = one_of(transport, _TRANSPORTS, "transport") == 1
    rate = _rate(lr, maximize)
    count = whole_number(step, "step", 1)
    try:
        beta1, beta2 = betas
    except (TypeError, ValueError):
        raise TypeError(f"betas must be a pair of numbers, got {betas!r}") from None
    beta1, beta2 = real_number(beta1, "betas[0]"), real_number(beta2, "betas[1]")
    eps = real_number(eps, "eps", 0.0)
    if on_device(U, grad, first_moment, second_moment):
        pair = (beta1, beta2)
        return device.adam_step(U, grad, first_moment, second_moment, count, rate, pair, eps, which, parallel)
    U, grad, first_moment = _stack(U, grad=grad, first_moment=first_moment)
    if isinstance(second_moment, np.ma.MaskedArray):
        raise TypeError("second_moment is a masked array, and its mask would be ignored")
    in_place(second_moment, "second_moment")
    check_second_moment(second_moment, check_float(second_moment, "second_moment"), U, check_float(U, "U"))
    _core.grassmann_adam_step(
        detached(U),
        detached(grad),
        detached(first_moment),
        detached(second_moment)[..., None, None],
        count,
        rate,
        beta1,
        beta2,
        eps,
        which,
        parallel,
        truth(check, "check"),
    )
    for x in (first_moment, second_moment):
        finish(x, False, "")
    return finish(U, False, "")


def _features(x: Array, U: Array) -> tuple[Array, Array, np.dtype[Any]]:
    x = as_array(x, "x")
    dtype = check_float(x, "x")
    if len(x.shape) != 2:
        raise ValueError(f"x must have shape (batch, n), got {tuple(x.shape)}")
    U, other = matrices(U, "U")
    if other != dtype:
        raise TypeError(f"U must be {dtype} as x is, got {other}")
    if len(U.shape) != 3:
        raise ValueError(f"U must have shape (classes, n, k), got {tuple(U.shape)}")
    if U.shape[1] != x.shape[1]:
        raise ValueError(
            f"x has {x.shape[1]} features and the subspaces of U, shape {tuple(U.shape)}, are of {U.shape[1]}"
        )
    return x, U, dtype


def _finite(found: Any, what: str, *inputs: Array) -> None:
    """ValueError where finite input gave what the dtype cannot hold."""
    if not _core.all_finite(found) and all(_core.all_finite(detached(x)) for x in inputs):
        raise ValueError(f"{what} overflows the dtype although the input is finite; scale what goes in")


def logits(x: Array, U: Array, *, scale: float = 25.0) -> Array:
    """Class scores ``scale · ‖U_cᵀ x‖ / ‖x‖``: how much of a feature lies in the subspace of each class.

    Parameters
    ----------
    x : array (batch, n)
        Features; they are normalised here. A zero row has logits and gradients of zero.
    U : array (classes, n, k)
        Orthonormal columns, which is not checked.
    scale : float, default 25.0

    Returns
    -------
    array (batch, classes)

    Notes
    -----
    ``2 batch n classes k`` flops. The projections, ``batch x classes x k``, exist a tile of classes at a time. NaN goes
    through. Xiong et al., ICCV 2023.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan import grassmann
    >>> U = grassmann.random(20, 3, batch=4, rng=0)
    >>> x = U[2] @ np.array([1.0, 2.0, 3.0])  # in the span of class 2
    >>> scores = grassmann.logits(x[None], U)
    >>> int(scores.argmax()), round(float(scores.max()), 12)
    (2, 25.0)
    """
    scale = real_number(scale, "scale")
    if on_device(x, U):
        return device.logits(x, U, scale)
    x, U, dtype = _features(x, U)
    out = np.empty((x.shape[0], U.shape[0]), dtype)
    _core.grassmann_logits(detached(x), detached(U), out, scale)
    _finite(out, "a logit", x, U)
    return to_library(out, library_of(x), x)


def logits_backward(grad: Array, x: Array, U: Array, *, scale: float = 25.0) -> tuple[Array, Array]:
    """Gradients of ``sum(grad * logits(x, U))`` with respect to ``x`` and ``U``.

    Parameters
    ----------
    grad : array (batch, classes)
    x, U, scale
        As for :func:`logits`.

    Returns
    -------
    dx : array (batch, n)
    dU : array (classes, n, k), stored as ``U`` is: transposed for a transposed view
        The Euclidean gradient, what :func:`sgd_step` takes.

    Notes
    -----
    ``6 batch n classes k`` flops: the projections are computed again rather than kept. Where a feature has no part in a
    subspace its length there has no gradient, and zero is taken.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan import grassmann
    >>> U = grassmann.random(20, 3, batch=4, rng=0)
    >>> x = np.random.default_rng(1).standard_normal((5, 20))
    >>> dx, dU = grassmann.logits_backward(np.ones((5, 4)), x, U)
    >>> dx.shape, dU.shape
    ((5, 20), (4, 20, 3))
    """
    scale = real_number(scale, "scale")
    if on_device(grad, x, U):
        return device.logits_backward(grad, x, U, scale)
    x, U, dtype = _features(x, U)
    grad = as_array(grad, "grad")
    if check_float(grad, "grad") != dtype:
        raise TypeError(f"grad must be {dtype} as x is, got {check_float(grad, 'grad')}")
    if tuple(grad.shape) != (x.shape[0], U.shape[0]):
        raise ValueError(f"grad must have shape {(x.shape[0], U.shape[0])}, got {tuple(grad.shape)}")
    dx = np.empty(tuple(x.shape), dtype)
    classes, n, k = U.shape
    strides = U.stride() if library_of(U) == "torch" else getattr(U, "strides", (0, 1, 0))
    by_columns = n > 1 and k > 1 and abs(strides[1]) < abs(strides[2])
    dU = np.empty((classes, k, n), dtype).swapaxes(1, 2) if by_columns else np.empty((classes, n, k), dtype)
    _core.grassmann_logits_backward(detached(grad), detached(x), detached(U), dx, dU, scale)
    for found, what in ((dx, "the gradient of x"), (dU, "the gradient of U")):
        _finite(found, what, grad, x, U)
    library = library_of(x)
    return to_library(dx, library, x), to_library(dU, library, U)
