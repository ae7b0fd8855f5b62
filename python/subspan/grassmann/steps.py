"""Optimiser steps and the classification head."""

from __future__ import annotations

from subspan._lib.arrays import Array
from subspan._lib.call import call_of

__all__ = ["adam_step", "logits", "logits_backward", "sgd_step"]


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
        What happens to the buffer when ``U`` moves. ``"project"``: it is not transported; each step uses its projection
        to the tangent space at the current ``U``, as Grassmann Class Representation does. ``"parallel"``: its tangent
        part is parallel transported along the geodesic (``retraction="exp"`` only).
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
    With ``"project"`` the buffer keeps the components that Euclidean gradients had along earlier ``U``, and these are
    in part tangent at the current one. Where they are large (``A U`` for a quadratic form), ``lr / (1 - momentum)``
    must be small against them, too, not only against the curvature on the manifold, or the iteration diverges.
    ``"parallel"``, or a ``grad`` that went through :func:`tangent`, has no such limit.

    Notes
    -----
    The update of the buffer ``B``, then two sweeps over each class, which stays in cache between them: one forms
    ``UᵀU``, ``UᵀB`` and ``BᵀB``, the other writes ``U P + B Q`` with ``k x k`` matrices ``P`` and ``Q``. ``8 n k²``
    flops. ``P`` and ``Q`` include a Newton step that removes ``UᵀU - I``: bases stay orthonormal to 10 eps √k after any
    number of steps, and no column changes its sign, as one may in a QR factorisation. A step of any length stays on the
    manifold.
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
    call = call_of(U=U, grad=grad, buffer=buffer)
    call.kernels.sgd_step(
        call.context, U, grad, buffer, lr, momentum, dampening, retraction, transport, maximize, check
    )
    return U


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
    call = call_of(U=U, grad=grad, first_moment=first_moment, second_moment=second_moment)
    arrays = (U, grad, first_moment, second_moment)
    call.kernels.adam_step(call.context, *arrays, step, lr, betas, eps, retraction, transport, maximize, check)
    return U


def logits(x: Array, U: Array, *, scale: float = 25.0, projections: Array | None = None) -> Array:
    """Class scores ``scale · ‖U_cᵀ x‖ / ‖x‖``: how much of a feature lies in the subspace of each class.

    Parameters
    ----------
    x : array (batch, n)
        Features; they are normalised here. A zero row has logits and gradients of zero.
    U : array (classes, n, k)
        Orthonormal columns, which is not checked.
    scale : float, default 25.0
    projections : array (batch, classes, k), optional
        C-contiguous, of the dtype of `x`: is overwritten with ``U_cᵀ x / ‖x‖``, which spares :func:`logits_backward` a
        third of its work.

    Returns
    -------
    array (batch, classes)

    Notes
    -----
    ``2 batch n classes k`` flops. Without `projections` these exist a tile of classes at a time. NaN goes through.
    Xiong et al., ICCV 2023.

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
    call = call_of(x=x, U=U, projections=projections)
    return call.give(call.kernels.logits(call.context, x, U, scale, projections))


def logits_backward(
    grad: Array, x: Array, U: Array, *, scale: float = 25.0, projections: Array | None = None
) -> tuple[Array, Array]:
    """Gradients of ``sum(grad * logits(x, U))`` with respect to ``x`` and ``U``.

    Parameters
    ----------
    grad : array (batch, classes)
    x, U, scale
        As for :func:`logits`.
    projections : array (batch, classes, k), optional
        What :func:`logits` left there, for the same `x` and `U`, which is not checked.

    Returns
    -------
    dx : array (batch, n)
    dU : array (classes, n, k), stored as ``U`` is: transposed for a transposed view
        The Euclidean gradient, what :func:`sgd_step` takes.

    Notes
    -----
    ``6 batch n classes k`` flops, of which 2 compute the projections again where they were not kept. Where ``U_cᵀ x``
    is zero its norm is not differentiable, and the gradient is taken to be zero.

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
    call = call_of(x=x, grad=grad, U=U, projections=projections)
    dx, dU = call.give(call.kernels.logits_backward(call.context, grad, x, U, scale, projections))
    return dx, dU
