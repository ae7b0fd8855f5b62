"""Principal angles, the distances made of them, and the mean."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import numpy as np

from subspan._lib.arrays import Array, as_array, detached, library_of
from subspan._lib.call import call_of
from subspan._lib.device import dtype_name, memory_of, numpy, on_device
from subspan._lib.numbers import real_number, whole_number

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
    if not hasattr(U, "shape"):
        U = as_array(U, "U")
    if len(U.shape) < 3:
        raise ValueError(f"U must have at least 3 dimensions, the first one of points, got shape {tuple(U.shape)}")
    count, *batch, n, k = (int(s) for s in U.shape)
    if count == 0:
        raise ValueError(f"U holds no points: its shape is {tuple(U.shape)}")
    if k > n:
        raise ValueError(f"U has {k} columns of {n} entries: so many cannot be orthonormal")
    limit = whole_number(max_iterations, "max_iterations", 0)
    w = None if weights is None else _weights(weights, count)
    if tol is None:
        tolerance = (
            50 * float(np.finfo(np.float32 if dtype_name(U) == "float32" else np.float64).eps) * max(k, 1) ** 0.5
        )
    else:
        tolerance = real_number(tol, "tol", 0.0)
    if progress is not None and not callable(progress):
        raise TypeError(f"progress must be callable, got {type(progress).__name__}")
    args = (U, w, initial, tolerance, limit, progress, out, check)
    found, reports = call.kernels.mean(call.context, *args)
    return _mean_result(call.give(found, out), reports, batch, tolerance, full_output)


def _weights(weights: Array, count: int) -> np.ndarray[Any, Any]:
    """In NumPy and float64, from wherever they are: so few numbers may cross."""
    if on_device(weights):
        if library_of(weights) not in ("cupy", "torch"):
            raise TypeError("weights on a CUDA device must be of CuPy or PyTorch; they may be on the CPU, too")
        host = memory_of(weights=weights).host(detached(weights))
    else:
        host = numpy(as_array(weights, "weights"))
    if host.dtype.kind not in "fiu":
        raise TypeError(f"weights must be real numbers, got {host.dtype}")
    w = np.ascontiguousarray(host, dtype=np.float64)
    if w.shape != (count,):
        raise ValueError(f"weights must have shape ({count},), one for each point, got {w.shape}")
    return w


def _mean_result(
    found: Array, reports: list[tuple[float, float, int, bool]], batch: list[int], tol: float, full_output: bool
) -> Array | MeanResult:
    if full_output:
        columns = [np.array([r[i] for r in reports]).reshape(batch) for i in range(4)]
        return MeanResult(found, *(c if c.ndim else c[()] for c in columns))
    late = [r for r in reports if not r[3]]
    if late:
        warnings.warn(
            f"{len(late)} of {len(reports)} means did not reach tol={tol:.1e} in {max(r[2] for r in late)} iterations: "
            f"the gradient norm is {max(r[0] for r in late):.1e}. Points may be too far apart for a unique "
            "mean, or tol below what rounding allows; full_output=True returns these figures instead of this warning",
            RuntimeWarning,
            stacklevel=3,
        )
    return found
