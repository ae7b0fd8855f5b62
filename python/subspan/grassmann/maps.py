"""Tangents, retractions, the exponential map and its inverse, transports."""

from __future__ import annotations

from typing import Any

import numpy as np

from subspan import _core
from subspan._lib.arrays import Array
from subspan._lib.call import call_of
from subspan._lib.numbers import float_dtype, generator_of, rng_key, stack_shape

__all__ = [
    "euclidean_to_riemannian_gradient",
    "euclidean_to_riemannian_hessian",
    "exp",
    "from_projector",
    "inner",
    "log",
    "norm",
    "projection_transport",
    "projector",
    "random",
    "random_tangent",
    "retract",
    "tangent",
    "transport",
    "transport_to",
]


def random(
    n: int,
    k: int,
    *,
    batch: tuple[int, ...] | int = (),
    rng: int | np.random.Generator | None = None,
    dtype: Any = np.float64,
) -> np.ndarray[Any, Any]:
    """Points drawn uniformly: orthonormal bases ``(*batch, n, k)`` of Haar-distributed subspaces.

    Parameters
    ----------
    n, k : int, k <= n
    batch : int or tuple of int
    rng : None, int or numpy.random.Generator
        The numbers drawn depend neither on the number of threads nor on the processor.
    dtype : float32 or float64

    Notes
    -----
    QR of Gaussian matrices with the diagonal of R made positive: Mezzadri, Notices AMS 54 (2007). ``4 n k²`` flops.

    Examples
    --------
    >>> from subspan import grassmann
    >>> grassmann.random(20, 3, batch=5, rng=0).shape
    (5, 20, 3)
    """
    shape, single = stack_shape(n, k, batch), float_dtype(dtype) == np.float32
    drawn: np.ndarray[Any, Any] = _core.random_orthogonal(None, rng_key(rng), shape, single)
    return drawn


def random_tangent(U: Array, *, rng: int | np.random.Generator | None = None) -> Array:
    """Tangents at ``U`` of unit Frobenius norm, uniform on the unit sphere of each tangent space.

    Where ``k = n`` the manifold is a point, and its only tangent, zero, is returned.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan import grassmann
    >>> U = grassmann.random(20, 3, rng=0)
    >>> H = grassmann.random_tangent(U, rng=1)
    >>> bool(np.abs(U.T @ H).max() < 1e-15), round(float(np.linalg.norm(H)), 12)
    (True, 1.0)
    """
    call = call_of(U=U)
    make = call.kernels.random_tangent
    shape = tuple(U.shape) if hasattr(U, "shape") else np.shape(U)
    return call.give(make(call.context, U, generator_of(rng).standard_normal(shape)))


def tangent(U: Array, G: Array, *, out: Array | None = None, check: bool = True) -> Array:
    """``(I - U Uᵀ) G``: the tangent part of any matrix, and so the Riemannian gradient of a Euclidean one.

    Parameters
    ----------
    U : array (..., n, k)
        Orthonormal columns.
    G : array (..., n, k)
        Leading axes broadcast against those of ``U``.
    out : array, optional
        Exact shape and dtype; may be ``G``.
    check : bool, default True
        ValueError for a ``U`` that is not orthonormal to 64 eps √k, and for NaN and infinity.

    Returns
    -------
    array (..., n, k)

    Notes
    -----
    ``6 n k²`` flops, and ``n k²`` for the check. Absil, Mahony and Sepulchre, Optimization Algorithms on Matrix
    Manifolds (2008), section 3.6.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan import grassmann
    >>> U, G = grassmann.random(6, 2, rng=0), np.ones((6, 2))
    >>> np.allclose(grassmann.tangent(U, G), G - U @ (U.T @ G))
    True
    """
    call = call_of(G=G, U=U, out=out)
    return call.give(call.kernels.tangent(call.context, U, G, out, check), out)


euclidean_to_riemannian_gradient = tangent


def euclidean_to_riemannian_hessian(
    U: Array, egrad: Array, ehess: Array, H: Array, *, out: Array | None = None, check: bool = True
) -> Array:
    """The Riemannian Hessian along ``H``, ``(I - U Uᵀ) ehess - H (Uᵀ egrad)``.

    Parameters
    ----------
    U : array (..., n, k)
        The point.
    egrad : array (..., n, k)
        Euclidean gradient of the function at ``U``.
    ehess : array (..., n, k)
        Its Euclidean Hessian times ``H``.
    H : array (..., n, k)
        Tangent at ``U``.
    out : array, optional
        Exact shape and dtype; must share no memory with the arguments.
    check : bool, default True
        ValueError for a ``U`` that is not orthonormal and an ``H`` that is not tangent. Without it the part of ``H``
        along ``U`` is taken off.

    Returns
    -------
    array (..., n, k), tangent at ``U``

    Notes
    -----
    ``18 n k²`` flops. Edelman, Arias and Smith, SIAM J. Matrix Anal. Appl. 20 (1998), section 2.5.4.

    Examples
    --------
    The Rayleigh quotient ``-tr(UᵀAU)/2`` has Euclidean gradient ``-A U`` and Hessian ``-A``:

    >>> import numpy as np
    >>> from subspan import grassmann
    >>> A = np.diag([5.0, 4.0, 1.0, 0.5])
    >>> U = np.eye(4)[:, :2]
    >>> H = np.zeros((4, 2)); H[2, 0] = 1.0
    >>> grassmann.euclidean_to_riemannian_hessian(U, -A @ U, -A @ H, H)[2, 0].item()  # the gap 5 - 1
    4.0
    """
    call = call_of(H=H, U=U, egrad=egrad, ehess=ehess, out=out)
    found = call.kernels.euclidean_to_riemannian_hessian(call.context, U, egrad, ehess, H, out, check)
    return call.give(found, out)


def retract(
    U: Array,
    H: Array,
    *,
    method: str = "cholesky",
    t: float = 1.0,
    project: bool = False,
    out: Array | None = None,
    check: bool = True,
) -> Array:
    """Move from ``U`` along ``t H``, approximately as the geodesic does.

    Parameters
    ----------
    U : array (..., n, k)
        Orthonormal columns.
    H : array (..., n, k)
        Tangent at ``U``. Leading axes broadcast.
    method : {"cholesky", "polar", "qr", "cayley", "exp"}
        ``"cholesky"`` and ``"qr"``: the Q factor (positive diagonal of R) of ``U + tH``. ``"polar"``: the orthonormal
        matrix nearest to it. ``"cayley"``: the Cayley transform of ``tH Uᵀ - U tHᵀ``, of second order. ``"exp"``: the
        geodesic itself.
    t : float, default 1.0
    project : bool, default False
        Take any ``H``, a Euclidean gradient for example, and move along its tangent part, at no cost.
    out : array, optional
        Exact shape and dtype; may be ``U`` or ``H``.
    check : bool, default True
        ValueError for a ``U`` that is not orthonormal to 64 eps √k and, unless ``project``, an ``H`` with more than
        √eps of its norm along ``U``.

    Returns
    -------
    array (..., n, k), orthonormal to 10 eps √k for every finite ``H`` and ``t``.

    Notes
    -----
    With ``X = t² HᵀH`` each method is ``U C(X) + tH S(X)``: ``C = S = R⁻¹`` with ``I + X = RᵀR`` (Cholesky, QR),
    ``C = S = (I + X)^(-1/2)`` (polar), ``C = (I - X/4)(I + X/4)⁻¹`` and ``S = (I + X/4)⁻¹`` (Cayley; the 2k x 2k system
    of Wen and Yin, Math. Program. 142, 2013, decouples into ``k x k`` systems because ``UᵀH = 0``), ``C = cos √X`` and
    ``S = sin √X / √X`` (the geodesic). ``8 n k²`` flops; ``U`` and ``H`` are read once while ``n k`` fits the cache.
    Where ``X`` is so large that its rounding errors matter (row sums above 4), a QR factorisation of ``H`` and a
    ``k x k`` SVD take its place.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan import grassmann
    >>> U = grassmann.random(30, 4, rng=0)
    >>> H = 0.1 * grassmann.random_tangent(U, rng=1)
    >>> Q, R = np.linalg.qr(U + H)
    >>> np.allclose(grassmann.retract(U, H), Q * np.sign(np.diag(R)))
    True
    """
    call = call_of(U=U, H=H, out=out)
    return call.give(call.kernels.retract(call.context, U, H, t, method, project, out, check), out)


def exp(U: Array, H: Array, t: float = 1.0, *, out: Array | None = None, check: bool = True) -> Array:
    """The point at time ``t`` of the geodesic that leaves ``U`` with velocity ``H``.

    Parameters
    ----------
    U : array (..., n, k)
        Orthonormal columns.
    H : array (..., n, k)
        Tangent at ``U``; its singular values are the principal angles that are covered in unit time.
    t : float, default 1.0
    out : array, optional
        Exact shape and dtype; may be ``U`` or ``H``.
    check : bool, default True
        ValueError for a ``U`` that is not orthonormal and an ``H`` that is not tangent. Without it the part of ``H``
        along ``U`` is taken off.

    Returns
    -------
    array (..., n, k), orthonormal to 10 eps √k.

    Notes
    -----
    ``U cos(√X) + tH sin(√X)/√X`` with ``X = t² HᵀH``, equal to ``U V cos(tΣ) Vᵀ + Q sin(tΣ) Vᵀ`` of the thin SVD
    ``H = Q Σ Vᵀ`` (Edelman, Arias and Smith, SIAM J. Matrix Anal. Appl. 20, 1998, theorem 2.3), without the SVD while
    row sums of ``X`` are at most 4. ``8 n k²`` flops.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan import grassmann
    >>> U, W = grassmann.random(30, 4, batch=2, rng=0)
    >>> there = grassmann.exp(U, grassmann.log(U, W))
    >>> bool(grassmann.distance(there, W) < 1e-14)
    True
    """
    call = call_of(U=U, H=H, out=out)
    return call.give(call.kernels.retract(call.context, U, H, t, "exp", False, out, check), out)


def log(U: Array, W: Array, *, out: Array | None = None, check: bool = True) -> Array:
    """The shortest tangent ``H`` at ``U`` with ``exp(U, H)`` spanning what ``W`` spans.

    At the cut locus (a principal angle of π/2) there are several of the same length; one of them is returned, with a
    singular value of π/2 for each such angle. For ``k = 1`` the sign of ``W`` does not matter; for ``k = n`` the result
    is zero to rounding.

    Parameters
    ----------
    U, W : array (..., n, k)
        Orthonormal columns. Leading axes broadcast.
    out : array, optional
        Exact shape and dtype; may be ``W``.
    check : bool, default True
        ValueError for bases that are not orthonormal to 64 eps √k.

    Returns
    -------
    array (..., n, k), tangent at ``U``, accurate to 20 eps √k at every angle.

    Notes
    -----
    With ``UᵀW = X cos(Θ) Yᵀ`` it is ``(W - U UᵀW) Y (Θ / sin Θ) Xᵀ``: the Procrustes form of Bendokat, Zimmermann and
    Absil, Adv. Comput. Math. 50 (2024), algorithm 5.3. ``Θ / sin Θ`` is evaluated as a function of ``cos Θ``, which is
    smooth at zero angles, so that nothing is divided by a small sine. ``8 n k²`` flops and a ``k x k`` SVD, or a few
    ``k x k`` products where all angles are small.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan import grassmann
    >>> U, W = np.eye(4)[:, :2], np.eye(4)[:, 2:]  # all angles are π/2
    >>> np.allclose(np.linalg.svd(grassmann.log(U, W))[1], np.pi / 2)
    True
    """
    call = call_of(U=U, W=W, out=out)
    return call.give(call.kernels.log(call.context, U, W, out, check), out)


def transport(U: Array, H: Array, V: Array, t: float = 1.0, *, out: Array | None = None, check: bool = True) -> Array:
    """Parallel transport of ``V`` along the geodesic from ``U`` in direction ``H``, to time ``t``.

    An isometry of tangent spaces: inner products, and so norms and angles, stay. The velocity ``H`` itself becomes the
    velocity of the geodesic at ``t``.

    Parameters
    ----------
    U : array (..., n, k)
        Orthonormal columns.
    H, V : array (..., n, k)
        Tangents at ``U``. Leading axes broadcast.
    t : float, default 1.0
    out : array, optional
        Exact shape and dtype; may be ``V``.
    check : bool, default True
        ValueError for a ``U`` that is not orthonormal, an ``H`` or ``V`` that is not tangent.

    Returns
    -------
    array (..., n, k), tangent at ``exp(U, H, t)``.

    Notes
    -----
    ``V + (-U R sin(tΣ) + Q (cos(tΣ) - I)) QᵀV`` for ``H = Q Σ Rᵀ`` (Edelman, Arias and Smith, SIAM J. Matrix Anal.
    Appl. 20, 1998, theorem 2.4), as ``V - t U S(X) HᵀV - t² H Z(X) HᵀV`` with ``S = sin √X / √X`` and
    ``Z = (1 - cos √X) / X``. ``15 n k²`` flops. Parts of ``H`` and ``V`` along ``U`` are taken off.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan import grassmann
    >>> U = grassmann.random(30, 4, rng=0)
    >>> H, V = grassmann.random_tangent(U, rng=1), grassmann.random_tangent(U, rng=2)
    >>> there = grassmann.transport(U, H, V)
    >>> np.allclose(np.linalg.norm(there), 1.0)
    True
    >>> np.allclose(grassmann.exp(U, H).T @ there, 0)
    True
    """
    call = call_of(V=V, U=U, H=H, out=out)
    return call.give(call.kernels.transport(call.context, U, H, V, t, out, check), out)


def projection_transport(U: Array, G: Array, *, out: Array | None = None, check: bool = True) -> Array:
    """``(I - U Uᵀ) G``: a tangent from elsewhere made one at ``U``, the vector transport of most optimisers.

    Cheaper than :func:`transport` and not an isometry. What it loses is of second order in the step.

    Parameters
    ----------
    U : array (..., n, k)
        The point that was reached.
    G : array (..., n, k)
        A tangent where the step began.
    out, check
        As for :func:`tangent`.

    Notes
    -----
    Absil, Mahony and Sepulchre (2008), section 8.1.3. ``6 n k²`` flops.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan import grassmann
    >>> U = grassmann.random(30, 4, rng=0)
    >>> V = grassmann.random_tangent(U, rng=1)
    >>> W = grassmann.retract(U, 0.1 * V)
    >>> bool(np.abs(W.T @ grassmann.projection_transport(W, V)).max() < 1e-15)
    True
    """
    return tangent(U, G, out=out, check=check)


def transport_to(U: Array, W: Array, V: Array, *, out: Array | None = None, check: bool = True) -> Array:
    """Parallel transport of ``V`` from ``U`` to the given point ``W``, along the shortest geodesic between them.

    What :func:`transport` gives is a tangent at ``exp(U, log(U, W))``, another basis of the span of ``W``; this one is
    turned to the basis ``W``.

    Parameters
    ----------
    U, W : array (..., n, k)
        Orthonormal columns.
    V : array (..., n, k)
        Tangent at ``U``. Leading axes broadcast.
    out : array, optional
        Exact shape and dtype; may be ``V``.
    check : bool, default True
        As for :func:`transport`.

    Returns
    -------
    array (..., n, k), tangent at ``W``

    Notes
    -----
    An isometry. Where a principal angle is π/2 there are several shortest geodesics, and one of them is taken, as by
    :func:`log`. About ``35 n k²`` flops.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan import grassmann
    >>> U, W = grassmann.random(30, 4, batch=2, rng=0)
    >>> V = grassmann.random_tangent(U, rng=1)
    >>> there = grassmann.transport_to(U, W, V)
    >>> np.allclose(W.T @ there, 0), np.allclose(np.linalg.norm(there), 1)
    (True, True)
    """
    call = call_of(V=V, U=U, W=W, out=out)
    return call.give(call.kernels.transport_to(call.context, U, W, V, out, check), out)


def inner(U: Array, H: Array, V: Array) -> Array:
    """Inner product ``tr(HᵀV)`` of two tangents at ``U``, one number for each matrix of the stack, summed in float64.

    The metric does not depend on the point: ``U`` is there for the signature that other libraries have, and for its
    shape. ``2 n k`` flops, one sweep.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan import grassmann
    >>> U = grassmann.random(10, 2, rng=0)
    >>> H = grassmann.random_tangent(U, rng=1)
    >>> bool(np.isclose(grassmann.inner(U, H, H), 1.0))
    True
    """
    call = call_of(H=H, U=U, V=V)
    return call.number(call.kernels.inner(call.context, U, H, V))


def norm(U: Array, H: Array) -> Array:
    """Length ``√tr(HᵀH)`` of a tangent at ``U``, one number for each matrix of the stack; safe from overflow of
    squares.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan import grassmann
    >>> U = grassmann.random(10, 2, rng=0)
    >>> bool(np.isclose(grassmann.norm(U, 3 * grassmann.random_tangent(U, rng=1)), 3.0))
    True
    """
    call = call_of(H=H, U=U)
    return call.number(call.kernels.norm(call.context, U, H))


def projector(U: Array, *, check: bool = True) -> Array:
    """The orthogonal projector ``U Uᵀ (..., n, n)``: the point of the manifold without a choice of basis.

    ``n² k`` flops; exactly symmetric. ``check`` as for :func:`tangent`.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan import grassmann
    >>> U = grassmann.random(6, 2, rng=0)
    >>> P = grassmann.projector(U)
    >>> np.allclose(P @ P, P), bool((P == P.T).all())
    (True, True)
    """
    call = call_of(U=U)
    return call.give(call.kernels.projector(call.context, U, check))


def from_projector(P: Array, k: int, *, check: bool = True) -> Array:
    """An orthonormal basis ``(..., n, k)`` of the range of an orthogonal projector ``P (..., n, n)`` of rank ``k``.

    The leading eigenvectors of ``(P + Pᵀ) / 2``; ``check`` makes sure that the eigenvalues are ones and zeros to √eps.
    ``4/3 n³ + 2 n² k`` flops.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan import grassmann
    >>> U = grassmann.random(6, 2, rng=0)
    >>> bool(grassmann.distance(grassmann.from_projector(grassmann.projector(U), 2), U) < 1e-14)
    True
    """
    call = call_of(P=P)
    return call.give(call.kernels.from_projector(call.context, P, k, check))
