"""Principal angles, the distances made of them, and the mean."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

from subspan._lib.arrays import Array, as_array, detached
from subspan._lib.call import call_of
from subspan._lib.device import memory_of, numpy, on_device

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["MeanResult", "PrincipalAngles", "distance", "mean", "pairwise", "principal_angles"]


class PrincipalAngles(NamedTuple):
    """Angles, ascending, and principal vectors: ``U_vectorsᵀ W_vectors = diag(cos angles)``."""

    angles: Any
    U_vectors: Any
    W_vectors: Any


@overload
def principal_angles(U: Array, W: Array, *, vectors: Literal[False] = ..., check: bool = ...) -> Array: ...
@overload
def principal_angles(U: Array, W: Array, *, vectors: Literal[True], check: bool = ...) -> PrincipalAngles: ...
def principal_angles(U: Array, W: Array, *, vectors: bool = False, check: bool = True) -> Array | PrincipalAngles:
    """Principal angles between the spans of ``U`` and ``W``, ascending, in radians.

    Parameters
    ----------
    U, W : array (..., n, k), (..., n, l)
        Orthonormal columns. Leading axes broadcast: ``U[:, None]`` and ``W[None]`` give all pairs. Of spaces of
        different dimension there are ``min(k, l)`` angles (Ye and Lim, SIAM J. Matrix Anal. Appl. 37, 2016).
    vectors : bool, default False
        Return the principal vectors too.
    check : bool, default True
        ValueError for bases that are not orthonormal to 64 eps √k. Values on a CUDA device are not looked at.

    Returns
    -------
    array (..., j) with j = min(k, l), or PrincipalAngles(angles, U_vectors, W_vectors) with vectors ``(..., n, j)``
        The absolute error is below 20 eps √k at every angle: an angle of 1e-8 keeps seven digits in float64, where the
        arccosine of a product keeps none.

    Notes
    -----
    Björck and Golub, Math. Comput. 27 (1973): angles above π/4 come from their cosines, the singular values of
    ``UᵀW``, smaller ones from their sines, the singular values of ``W - U UᵀW`` restricted to those directions. Sines
    that differ by more than a factor of ten are found by QR, as a Gram matrix would lose half of the digits.
    ``4 n k²`` flops with the check and a ``k x k`` SVD; ``5 n k²`` more with angles below π/4, and ``4 n k²`` for QR.
    ``scipy.linalg.subspace_angles`` gives the same angles, descending, of one pair.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan import grassmann
    >>> U = np.eye(4)[:, :2]
    >>> W = np.stack([np.cos(1e-9) * U[:, 0] + np.sin(1e-9) * np.eye(4)[2], np.eye(4)[3]], axis=1)
    >>> grassmann.principal_angles(U, W)
    array([1.00000000e-09, 1.57079633e+00])
    """
    call = call_of(U=U, W=W)
    found = call.give(call.kernels.principal_angles(call.context, U, W, vectors, check))
    return PrincipalAngles(*found) if vectors is True or type(found) is tuple else found


def distance(U: Array, W: Array, *, kind: str = "geodesic", unequal: str = "containment", check: bool = True) -> Array:
    """Distance between the spans of ``U`` and ``W``.

    Parameters
    ----------
    U, W : array (..., n, k), (..., n, l)
        Orthonormal columns. Leading axes broadcast.
    kind : str
        Of the principal angles θ: ``"geodesic"`` ``√Σθ²``, ``"chordal"`` ``√Σ sin²θ``, ``"projection"`` ``max sin θ``,
        ``"procrustes"`` ``2 √Σ sin²(θ/2)``, ``"fubini-study"`` ``arccos ∏ cos θ``, ``"binet-cauchy"``
        ``√(1 - ∏ cos²θ)``.
    unequal : {"containment", "metric"}
        What the distance of spaces of different dimension is (Ye and Lim): that of the ``min(k, l)`` principal angles,
        which is zero where one space contains the other; or a metric, for which ``|k - l|`` angles of π/2 are added.
    check : bool, default True
        ValueError for bases that are not orthonormal to 64 eps √k. Values on a CUDA device are not looked at.

    Returns
    -------
    array (...), without the last two axes; a scalar for one pair. Zero only to rounding for equal spans.

    Notes
    -----
    Names as in Ye and Lim, SIAM J. Matrix Anal. Appl. 37 (2016), table 2. Some authors call ``√Σ sin²θ``, which is
    ``‖UUᵀ - WWᵀ‖_F / √2``, the projection distance; here it is the chordal one. Cost as :func:`principal_angles`.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan import grassmann
    >>> U, W = grassmann.random(10, 3, batch=2, rng=0)
    >>> np.allclose(grassmann.distance(U, W, kind="chordal"), np.linalg.norm(U @ U.T - W @ W.T) / np.sqrt(2))
    True
    """
    call = call_of(U=U, W=W)
    return call.number(call.kernels.distance(call.context, U, W, kind, unequal, check))


def pairwise(
    U: Array, W: Array | None = None, *, kind: str = "geodesic", unequal: str = "containment", check: bool = True
) -> Array:
    """Distances between all pairs of many subspaces.

    Parameters
    ----------
    U : array (N, n, k)
    W : array (M, n, l), optional
        ``U`` itself by default: the result is then symmetric, with zeros on its diagonal.
    kind, unequal, check
        As for :func:`distance`.

    Returns
    -------
    array (N, M), or (N, N)

    Notes
    -----
    Kinds ``"chordal"`` and ``"projection"`` come from ``UᵢᵀWⱼ`` of many pairs in one product of matrices, ``2 N M n k
    l`` flops; pairs that are close, whose difference of squares would lose digits, are done again one by one, so that
    the accuracy is that of :func:`distance`. The other kinds take the principal angles of every pair, a strip at a
    time.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan import grassmann
    >>> U = grassmann.random(30, 3, batch=5, rng=0)
    >>> D = grassmann.pairwise(U, kind="chordal")
    >>> D.shape, bool(np.allclose(D[1, 2], grassmann.distance(U[1], U[2], kind="chordal")))
    ((5, 5), True)
    """
    call = call_of(U=U, W=W)
    return call.give(call.kernels.pairwise(call.context, U, W, kind, unequal, check))


class MeanResult(NamedTuple):
    """What :func:`mean` found, one entry of each field for every mean of a stack.

    ``mean`` is of the library of the input, the figures are NumPy's.
    """

    mean: Any
    gradient_norm: Any
    """``‖Σ w log(mean, U)‖``: how far from stationary the result is."""
    variance: Any
    """``Σ w distance²``."""
    iterations: Any
    converged: Any


@overload
def mean(
    U: Array,
    weights: Array | None = ...,
    *,
    initial: Array | None = ...,
    tol: float | None = ...,
    max_iterations: int = ...,
    full_output: Literal[False] = ...,
    progress: Callable[[int, int, float, float], object] | None = ...,
    out: Array | None = ...,
    check: bool = ...,
) -> Array: ...
@overload
def mean(
    U: Array,
    weights: Array | None = ...,
    *,
    initial: Array | None = ...,
    tol: float | None = ...,
    max_iterations: int = ...,
    full_output: Literal[True],
    progress: Callable[[int, int, float, float], object] | None = ...,
    out: Array | None = ...,
    check: bool = ...,
) -> MeanResult: ...
def mean(
    U: Array,
    weights: Array | None = None,
    *,
    initial: Array | None = None,
    tol: float | None = None,
    max_iterations: int = 200,
    full_output: bool = False,
    progress: Callable[[int, int, float, float], object] | None = None,
    out: Array | None = None,
    check: bool = True,
) -> Array | MeanResult:
    """The Karcher (Fréchet) mean over the first axis: the point of least ``Σ w distance²``.

    Parameters
    ----------
    U : array (N, ..., n, k)
        Orthonormal columns.
    weights : array (N,), optional
        Not negative, not all zero; they are divided by their sum. Equal ones by default.
    initial : array (..., n, k), optional
        Where to begin; the point of the largest weight by default.
    tol : float, optional
        Norm of the Riemannian gradient ``Σ w log(mean, U)`` to stop at; ``50 eps √k`` by default.
    max_iterations : int, default 200
    full_output : bool, default False
        Return a MeanResult. Without it, a RuntimeWarning says so when the tolerance was not reached.
    progress : callable, optional
        Called before every iteration as ``progress(index of the mean, iteration, gradient norm, variance)``.
    out : array (..., n, k), optional
        Exact shape and dtype.
    check : bool, default True
        ValueError for bases that are not orthonormal to 64 eps √k.

    Returns
    -------
    array (..., n, k), or MeanResult(mean, gradient_norm, variance, iterations, converged)

    Notes
    -----
    Gradient descent with unit steps, which are halved when the variance grows (Afsari, Tron and Vidal, SIAM J. Control
    Optim. 51, 2013). The mean is unique when all points are in one ball of radius π/4; elsewhere a stationary point is
    found. An iteration costs ``4 n k²`` flops for each point and a few ``k x k`` products, or a ``k x k`` SVD for a
    point that is far away. Points are summed in a fixed order: results are the same for any number of threads. Ctrl-C
    takes effect between iterations.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan import grassmann
    >>> U = grassmann.random(20, 3, rng=0)
    >>> H = 0.3 * grassmann.random_tangent(U, rng=1)
    >>> middle = grassmann.mean(np.stack([grassmann.exp(U, H), grassmann.exp(U, -H)]))
    >>> bool(grassmann.distance(middle, U) < 1e-14)
    True
    """
    call = call_of(U=U, initial=initial, out=out)
    w = weights
    if w is not None:  # so few numbers may cross
        w = detached(as_array(w, "weights"), "weights")
        w = memory_of(weights=w).host(w) if on_device(w) else numpy(w)
    args = (U, w, initial, tol, max_iterations, progress, out, check)
    found, *figures, warning = call.kernels.mean(call.context, *args)
    if full_output:
        return MeanResult(call.give(found, out), *figures)
    if warning is not None:
        warnings.warn(warning, RuntimeWarning, stacklevel=2)
    return call.give(found, out)
