"""Principal angles, the distances made of them, and the mean."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import numpy as np

from subspan import _core
from subspan._arrays import Array, as_array, library_of, output, to_library
from subspan._device import Place, on_device, on_one_side, same_dtype
from subspan._grassmann import device
from subspan._arrays import whole_number
from subspan._grassmann.common import one_of, same_matrices
from subspan._orth.common import detached, finish, matrices, numpy

if TYPE_CHECKING:
    from collections.abc import Callable

_KINDS = {"geodesic": 0, "chordal": 1, "projection": 2, "procrustes": 3, "fubini-study": 4, "binet-cauchy": 5}


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
    U, W : array (..., n, k)
        Orthonormal columns. Leading axes broadcast: ``U[:, None]`` and ``W[None]`` give all pairs.
    vectors : bool, default False
        Return the principal vectors too.
    check : bool, default True
        ValueError for bases that are not orthonormal to 64 eps √k. Values on a CUDA device are not looked at.

    Returns
    -------
    array (..., k), or PrincipalAngles(angles, U_vectors, W_vectors) with vectors ``(..., n, k)``
        The absolute error is below 20 eps √k at every angle: an angle of 1e-8 keeps seven digits in float64, where the
        arccosine of a product keeps none.

    Notes
    -----
    Björck and Golub, Math. Comput. 27 (1973): cosines are singular values of ``UᵀW``; below π/4 sines are those of
    ``W - U UᵀW`` on the directions concerned, by QR, as squares would lose half of the digits. ``4 n k²`` flops
    with the check, and an SVD of ``k x k``; ``5 n k²`` and up to ``4 n k²`` more where an angle is below π/4.
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
    if on_device(U, W):
        there = device.principal_angles(U, W, vectors)
        return PrincipalAngles(*there) if vectors else there[0]
    (U, W), dtype, shape = same_matrices(U=U, W=W)
    library = library_of(U)
    angles = np.empty((*shape[:-2], shape[-1]), dtype)
    p = np.empty(shape, dtype) if vectors else None
    q = np.empty(shape, dtype) if vectors else None
    _core.principal_angles(detached(U), detached(W), angles, p, q, int(bool(check)))
    if p is None or q is None:
        return to_library(angles, library)
    return PrincipalAngles(to_library(angles, library), to_library(p, library), to_library(q, library))


def distance(U: Array, W: Array, *, kind: str = "geodesic", check: bool = True) -> Array:
    """Distance between the spans of ``U`` and ``W``.

    Parameters
    ----------
    U, W : array (..., n, k)
        Orthonormal columns. Leading axes broadcast.
    kind : str
        Of the principal angles θ: ``"geodesic"`` ``√Σθ²``, ``"chordal"`` ``√Σ sin²θ``, ``"projection"`` ``max sin θ``,
        ``"procrustes"`` ``2 √Σ sin²(θ/2)``, ``"fubini-study"`` ``arccos ∏ cos θ``, ``"binet-cauchy"``
        ``√(1 - ∏ cos²θ)``.
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
    which = one_of(kind, _KINDS, "kind")
    if on_device(U, W):
        return device.distance(U, W, which)
    (U, W), dtype, shape = same_matrices(U=U, W=W)
    out = np.empty((*shape[:-2], 1, 1), dtype)
    _core.subspace_distance(detached(U), detached(W), out, which, int(bool(check)))
    result = out[..., 0, 0]
    library = library_of(U)
    if library == "numpy":
        return result if result.ndim else result[()]
    return to_library(np.ascontiguousarray(result).reshape(shape[:-2]), library)


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
    found. An iteration costs ``4 n k²`` flops for each point, and some products of ``k x k``, or an SVD where it is
    far. Points are summed in a fixed order: results are the same for any number of threads. The keyboard interrupts
    between iterations.

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
    there = on_device(U, initial)
    if there:
        on_one_side(U=U, initial=initial)
        dtype: Any = np.dtype(same_dtype({"U": U}))
    else:
        U, dtype = matrices(U, "U")
    if len(U.shape) < 3:
        raise ValueError(f"U must have at least 3 dimensions, the first one of points, got shape {tuple(U.shape)}")
    count, *batch, n, k = (int(s) for s in U.shape)
    if count == 0:
        raise ValueError(f"U holds no points: its shape is {tuple(U.shape)}")
    if k > n:
        raise ValueError(f"U has {k} columns of {n} entries: so many cannot be orthonormal")
    limit = whole_number(max_iterations, "max_iterations", 0)
    w = None
    if weights is not None:
        if on_device(weights):
            if library_of(weights) not in ("cupy", "torch"):
                raise TypeError("weights on a CUDA device must be of CuPy or PyTorch; they may be on the CPU, too")
            host = Place(weights=weights).host(detached(weights))
        else:
            host = numpy(as_array(weights, "weights"))
        if np.iscomplexobj(host):
            raise TypeError("weights must be real")
        w = np.ascontiguousarray(host, dtype=np.float64)
        if w.shape != (count,):
            raise ValueError(f"weights must have shape ({count},), one for each point, got {w.shape}")
    eps = float(np.finfo(dtype).eps)
    tol = 50 * eps * math.sqrt(max(k, 1)) if tol is None else float(tol)
    if not tol >= 0:
        raise ValueError(f"tol must not be negative, got {tol!r}")
    if there:
        found, reports = device.mean(U, w, initial, tol, limit, progress, out)
        return _mean_result(found, reports, batch, tol, full_output)
    start = None
    if initial is not None:
        start, other = matrices(initial, "initial")
        if other != dtype:
            raise TypeError(f"initial must be {dtype} as U is, got {other}")
        start = detached(start)
    library = library_of(U)
    result, fresh = output(out, (*batch, n, k), dtype, library)
    reports = _core.grassmann_mean(detached(U), w, start, detached(result), tol, limit, int(bool(check)), progress)
    return _mean_result(finish(result, fresh, library), reports, batch, tol, full_output)


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
