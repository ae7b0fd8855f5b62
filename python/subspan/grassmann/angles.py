"""Principal angles, the distances made of them, and the mean."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import numpy as np

from subspan import _core
from subspan._lib.arguments import check_basis, detached, finish, matrices, numpy, product
from subspan._lib.arrays import Array, as_array, library_of, output, real_number, to_library, truth, whole_number
from subspan._lib.device import Place, on_device, on_one_side, same_dtype
from subspan.grassmann import device
from subspan.grassmann.common import one_of, same_matrices
from subspan.orth.spaces import orthonormalize

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
    U, W : array (..., n, k), (..., n, l)
        Orthonormal columns. Leading axes broadcast: ``U[:, None]`` and ``W[None]`` give all pairs. Of spaces of
        different dimension there are ``min(k, l)`` angles (Ye and Lim, SIAM J. Matrix Anal. Appl. 37, 2016).
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
    vectors = truth(vectors, "vectors")
    if on_device(U, W):
        there = device.principal_angles(U, W, vectors)
        return PrincipalAngles(*there) if vectors else there[0]
    U, W = _of_one_dimension(U, W, check)
    (U, W), dtype, shape = same_matrices(U=U, W=W)
    library = library_of(U)
    angles = np.empty((*shape[:-2], shape[-1]), dtype)
    p = np.empty(shape, dtype) if vectors else None
    q = np.empty(shape, dtype) if vectors else None
    _core.principal_angles(detached(U), detached(W), angles, p, q, int(truth(check, "check")))
    if p is None or q is None:
        return to_library(angles, library)
    return PrincipalAngles(to_library(angles, library), to_library(p, library), to_library(q, library))


def _of_one_dimension(U: Array, W: Array, check: bool) -> tuple[Array, Array]:
    """Of two spaces of different dimension the smaller, and the part of the larger that is nearest to it.

    With ``WᵀU = X cos(Θ) Yᵀ`` that is the span of ``W X``: its angles to ``U`` are those of ``W``. Where an angle is
    π/2 ``X`` is completed, and any direction does.
    """
    U, W = as_array(U, "U"), as_array(W, "W")
    shapes = [tuple(x.shape) for x in (U, W)]
    if min(len(s) for s in shapes) < 2 or shapes[0][-1] == shapes[1][-1] or shapes[0][-2] != shapes[1][-2]:
        return U, W  # what is wrong with them is said where it belongs
    U, dtype = matrices(U, "U")
    W, other = matrices(W, "W")
    if other != dtype:
        raise TypeError(f"W must be {dtype} as U is, got {other}")
    for x, name in ((U, "U"), (W, "W")):
        if truth(check, "check"):
            check_basis(x, name)
        elif x.shape[-1] > x.shape[-2]:
            raise ValueError(
                f"{name} has {x.shape[-1]} columns of {x.shape[-2]} entries: so many cannot be orthonormal"
            )
    small, large = (U, W) if U.shape[-1] < W.shape[-1] else (W, U)
    u, w = numpy(small), numpy(large)
    x = orthonormalize(product(np.swapaxes(w, -1, -2), u))
    near = to_library(product(w, x), library_of(U), U)
    return (U, near) if small is U else (near, W)


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
    which = one_of(kind, _KINDS, "kind")
    if on_device(U, W):
        return device.distance(U, W, which)
    if not isinstance(unequal, str) or unequal not in ("containment", "metric"):
        raise ValueError(f"unequal must be 'containment' or 'metric', got {unequal!r}")
    U, W = as_array(U, "U"), as_array(W, "W")
    more = abs(int(U.shape[-1]) - int(W.shape[-1])) if min(len(np.shape(x)) for x in (U, W)) >= 2 else 0
    U, W = _of_one_dimension(U, W, check)
    (U, W), dtype, shape = same_matrices(U=U, W=W)
    out = np.empty((*shape[:-2], 1, 1), dtype)
    _core.subspace_distance(detached(U), detached(W), out, which, int(truth(check, "check")))
    result = out[..., 0, 0]
    if more and unequal == "metric":
        result = _with_right_angles(result, more, kind).astype(dtype)
    library = library_of(U)
    if library == "numpy":
        return result if result.ndim else result[()]
    return to_library(np.ascontiguousarray(result).reshape(shape[:-2]), library, U)


def _with_right_angles(d: np.ndarray[Any, Any], count: int, kind: str) -> np.ndarray[Any, Any]:
    """A distance with so many more angles of π/2."""
    if kind in ("projection", "binet-cauchy"):
        return np.ones_like(d)
    if kind == "fubini-study":
        return np.full_like(d, np.pi / 2)
    added = {"geodesic": count * np.pi**2 / 4, "chordal": count, "procrustes": 2 * count}[kind]
    total: np.ndarray[Any, Any] = np.sqrt(np.square(d.astype(np.float64)) + added)
    return total


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
    which = one_of(kind, _KINDS, "kind")
    if on_device(U, W):
        raise TypeError("pairwise is not implemented on CUDA devices; distance(U[:, None], W[None]) is")
    U, dtype = matrices(U, "U")
    symmetric = W is None
    other: Any = U
    if not symmetric:
        other, second = matrices(W, "W")
        if second != dtype:
            raise TypeError(f"W must be {dtype} as U is, got {second}")
    for x, name in ((U, "U"), (other, "W")):
        if len(x.shape) != 3:
            raise ValueError(f"{name} must have shape (number, n, k), got {tuple(x.shape)}")
        if x.shape[-1] > x.shape[-2]:
            raise ValueError(
                f"{name} has {x.shape[-1]} columns of {x.shape[-2]} entries: so many cannot be orthonormal"
            )
        if x.shape[-2] != U.shape[-2]:
            raise ValueError(f"U and W must live in one space, got {U.shape[-2]} and {x.shape[-2]} rows")
        if truth(check, "check"):
            check_basis(x, name)
    u, w = numpy(U), numpy(other)
    out = np.empty((u.shape[0], w.shape[0]), dtype)
    settings: dict[str, Any] = {"kind": kind, "unequal": unequal, "check": False}
    more = abs(u.shape[-1] - w.shape[-1])
    if kind in ("chordal", "projection"):
        if not isinstance(unequal, str) or unequal not in ("containment", "metric"):
            raise ValueError(f"unequal must be 'containment' or 'metric', got {unequal!r}")
        close = _core.pairwise_distance(u, None if symmetric else w, out, which)
        if more and unequal == "metric":
            out = _with_right_angles(out, more, kind).astype(dtype)
        strip = max(1, 2**22 // max(1, u.shape[1] * (u.shape[2] + w.shape[2])))
        for start in range(0, len(close), strip):
            i, j = close[start : start + strip].T
            out[i, j] = distance(u[i], w[j], **settings)
            if symmetric:
                out[j, i] = out[i, j]
        return to_library(out, library_of(U), U)
    for i in range(u.shape[0]):
        if not symmetric:
            out[i] = distance(u[i], w, **settings)
            continue
        out[i, i] = 0
        if i + 1 < u.shape[0]:
            out[i, i + 1 :] = out[i + 1 :, i] = distance(u[i], w[i + 1 :], **settings)
    return to_library(out, library_of(U), U)


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
        if host.dtype.kind not in "fiu":
            raise TypeError(f"weights must be real numbers, got {host.dtype}")
        w = np.ascontiguousarray(host, dtype=np.float64)
        if w.shape != (count,):
            raise ValueError(f"weights must have shape ({count},), one for each point, got {w.shape}")
    eps = float(np.finfo(dtype).eps)
    tol = 50 * eps * math.sqrt(max(k, 1)) if tol is None else real_number(tol, "tol", 0.0)
    if progress is not None and not callable(progress):
        raise TypeError(f"progress must be callable, got {type(progress).__name__}")
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
    reports = _core.grassmann_mean(
        detached(U), w, start, detached(result), tol, limit, int(truth(check, "check")), progress
    )
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
