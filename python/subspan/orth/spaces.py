"""Orthonormal bases, and algebra of the spaces they span."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from subspan import _core
from subspan._lib.arguments import (
    check_basis,
    column,
    detached,
    finish,
    is_vector,
    matrices,
    numpy,
    one_rank,
    product,
    same_dtype,
)
from subspan._lib.arrays import (
    Array,
    as_array,
    check_float,
    float_dtype,
    library_of,
    output,
    real_number,
    rng_key,
    stoppable,
    to_library,
    truth,
    whole_number,
)
from subspan.orth.householder import householder_qr


def padded_span(
    A: Array, tol: float | None = None, name: str = "U"
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Orthonormal bases of the spans of the matrices of a stack, with columns of zeros past the rank, and the ranks.

    Columns are taken at unit length; singular values up to tol times the largest one count as zero.
    """
    a = numpy(A)
    tol = max(a.shape[-2:]) * float(np.finfo(a.dtype).eps) if tol is None else tol
    top = np.abs(a).max(axis=-2, keepdims=True, initial=0)
    if not np.isfinite(top).all():
        raise ValueError(f"{name} holds NaN or infinity")
    a = a / np.where(top > 0, top, 1)
    length = np.linalg.norm(a, axis=-2, keepdims=True)
    q, r = householder_qr(a / np.where(length > 0, length, 1))
    x, s, _ = stoppable(np.linalg.svd, r)
    kept = s > tol * s[..., :1]
    x = x[..., :, : s.shape[-1]] * kept[..., None, :]
    return product(q.to_array(), np.ascontiguousarray(x)), np.count_nonzero(kept, axis=-1)


def span(A: Array, name: str) -> np.ndarray[Any, Any]:
    """Orthonormal basis of the columns of A; the matrices of a stack must have one rank."""
    basis, ranks = padded_span(A, name=name)
    return np.ascontiguousarray(basis[..., : one_rank(ranks)])


_METHODS = {"auto": 0, "cholesky": 1, "householder": 2, "polar": 3}


def orthonormalize(
    A: Array,
    *,
    method: str = "auto",
    out: Array | None = None,
    rank_deficient: str = "complete",
    return_rank: bool = False,
) -> Any:
    """An orthonormal basis of the columns of ``A``, of the same shape.

    Parameters
    ----------
    A : array (..., m, k), k <= m, or a vector (m,), of which the result is one of length one
    method : {"auto", "cholesky", "householder", "polar"}
        ``"cholesky"``: shifted Cholesky QR on columns of unit length, repeated until the measured loss of
        orthogonality is at working precision; LinAlgError where it cannot separate the columns. ``"householder"``:
        Householder QR. ``"auto"``: the first, then the second. ``"polar"``: the nearest orthonormal matrix ``U Vᵀ``
        of ``A = U Σ Vᵀ`` (what Muon approximates), to working precision, by the dynamically weighted Halley
        iteration.
    out : array, optional
        Exact shape and dtype, contiguous rows; may be ``A``.
    rank_deficient : {"complete", "raise"}
        What becomes of a column that depends on those before it (what it adds is within ``m eps`` of its own length):
        an orthonormal completion, or LinAlgError. With a completion the span is larger than that of ``A``;
        :func:`range_basis` gives a basis of the latter.
    return_rank : bool, default False
        Return ``(Q, rank)``: how many columns are not dependent, an int, or an array of the shape of the stack.

    Returns
    -------
    array (..., m, k) with ``max|QᵀQ - I| <= 10 eps √k``, or ``(Q, rank)``

    Notes
    -----
    ``3 m k²`` flops for a well-conditioned ``A``, ``4 m k²`` by Householder, ``6 m k² + 40 k³`` for the polar factor.
    The QR factor's signs are those of a positive diagonal with ``"cholesky"`` and LAPACK's with ``"householder"``.
    Sources: Fukaya et al., SIAM J. Sci. Comput. 42 (2020); Nakatsukasa, Bai and Gygi, SIAM J. Matrix Anal. Appl. 31
    (2010).

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.orth import orthonormalize
    >>> A = np.random.default_rng(0).standard_normal((50, 5))
    >>> U, _, Vt = np.linalg.svd(A, full_matrices=False)
    >>> np.allclose(orthonormalize(A, method="polar"), U @ Vt)
    True
    """
    if is_vector(A):
        found = orthonormalize(
            column(A),
            method=method,
            out=None if out is None else column(out),
            rank_deficient=rank_deficient,
            return_rank=return_rank,
        )
        q = out if out is not None else (found[0] if return_rank else found).reshape(-1)
        return (q, found[1]) if return_rank else q
    A, dtype = matrices(A, "A")
    if not isinstance(method, str) or method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, _METHODS))}, got {method!r}")
    if not isinstance(rank_deficient, str) or rank_deficient not in ("complete", "raise"):
        raise ValueError(f"rank_deficient must be 'complete' or 'raise', got {rank_deficient!r}")
    library = library_of(A)
    result, fresh = output(out, tuple(A.shape), dtype, library)
    ranks = np.zeros(tuple(A.shape[:-2]), np.int64) if truth(return_rank, "return_rank") else None
    _core.orthonormalize(detached(A), detached(result), _METHODS[method], rank_deficient == "complete", ranks)
    Q = finish(result, fresh, library, A)
    return Q if ranks is None else (Q, int(ranks) if ranks.ndim == 0 else ranks)


def _cutoff(rcond: float | None, shape: tuple[int, ...], dtype: np.dtype[Any]) -> float:
    if rcond is None:
        return max(shape[-2:]) * float(np.finfo(dtype).eps)
    value = real_number(rcond, "rcond", 0.0)
    if value >= 1:
        raise ValueError(f"rcond must be in [0, 1), got {value}")
    return value


def _any_matrices(A: Array, name: str) -> tuple[np.ndarray[Any, Any], np.dtype[Any], str]:
    """In NumPy, of entries near one."""
    x, dtype = matrices(column(A), name)
    library = library_of(x)
    a = numpy(x)
    top = np.abs(a).max(axis=(-2, -1), keepdims=True, initial=0)
    if not np.isfinite(top).all():
        raise ValueError(f"{name} holds NaN or infinity")
    # By a power of two, which is exact.
    return (
        a / np.where(top > 0, 2.0 ** np.floor(np.log2(np.where(top > 0, top, 1))), 1).astype(dtype),
        dtype,
        library,
    )


def range_basis(A: Array, *, rcond: float | None = None) -> Array:
    """An orthonormal basis ``(..., m, r)`` of the column space of ``A (..., m, n)``, of any shape and rank.

    ``r`` is the numerical rank: how many singular values exceed ``rcond`` times the first (``max(m, n) eps`` by
    default, as in ``scipy.linalg.orth``). The columns are the left singular vectors, leading first. Where columns of
    ``A`` depend on each other this is the span, and what :func:`orthonormalize` gives is larger. Matrices of a stack
    must have one rank, else ValueError.

    ``2 n² (m - n/3)`` flops for the QR, an SVD of ``R`` and ``2 m n r`` for the product.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.orth import range_basis
    >>> A = np.outer(np.ones(5), [1.0, 2.0, 3.0])
    >>> range_basis(A).shape
    (5, 1)
    """
    a, dtype, library = _any_matrices(A, "A")
    return to_library(_range(a, _cutoff(rcond, a.shape, dtype)), library, A)


def _range(a: np.ndarray[Any, Any], tol: float) -> np.ndarray[Any, Any]:
    if a.shape[-2] <= a.shape[-1]:  # a factor R would be no smaller
        x, s, _ = stoppable(np.linalg.svd, a, full_matrices=False)
        rank = one_rank(np.count_nonzero(s > tol * s[..., :1], axis=-1))
        return np.ascontiguousarray(x[..., :rank])
    q, r = householder_qr(a)
    x, s, _ = stoppable(np.linalg.svd, r, full_matrices=False)
    rank = one_rank(np.count_nonzero(s > tol * s[..., :1], axis=-1))
    return product(q.to_array(), np.ascontiguousarray(x[..., :, :rank]))


def null_space(A: Array, *, rcond: float | None = None) -> Array:
    """An orthonormal basis ``(..., n, n - r)`` of the vectors that ``A (..., m, n)`` of rank ``r`` takes to zero.

    ``rcond`` as in :func:`range_basis`. The complement of the row space, by Householder reflections: orthonormal to
    working precision, and ``A`` times it is of the order of ``rcond`` times the first singular value.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.orth import null_space
    >>> N = null_space(np.array([[1.0, 1.0, 0.0]]))
    >>> N.shape, bool(np.abs(N[0] + N[1]).max() < 1e-15)
    ((3, 2), True)
    """
    a, dtype, library = _any_matrices(A, "A")
    tol = _cutoff(rcond, a.shape, dtype)
    if a.shape[-2] > a.shape[-1]:
        _, a = householder_qr(a)  # the same rows, as far as their span goes
    rows = _range(np.swapaxes(a, -1, -2), tol)
    return to_library(np.asarray(complement(rows, check=False)), library, A)


def random_orthogonal(
    n: int,
    k: int | None = None,
    *,
    batch: tuple[int, ...] | int = (),
    rng: int | np.random.Generator | None = None,
    dtype: Any = np.float64,
) -> np.ndarray[Any, Any]:
    """Haar-distributed orthonormal columns, ``(*batch, n, k)`` (``k = n`` by default).

    QR of counter-based normals with the diagonal of ``R`` made positive; without that the distribution is not Haar's
    (Mezzadri, Notices AMS 54, 2007). The same numbers for any number of threads. ``2 k² (n - k/3) + 4 n k²`` flops a
    matrix.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.orth import random_orthogonal
    >>> U = random_orthogonal(10, 4, batch=(3,), rng=0)
    >>> U.shape, np.allclose(np.swapaxes(U, 1, 2) @ U, np.eye(4))
    ((3, 10, 4), True)
    """
    k = n if k is None else k
    n, k = whole_number(n, "n", 0), whole_number(k, "k", 0)
    if k > n:
        raise ValueError(f"k must be at most n = {n}, got {k}")
    sizes = batch if isinstance(batch, (tuple, list)) else (batch,)
    shape = (*(whole_number(size, "batch", 0) for size in sizes), n, k)
    if math.prod(shape) > 2**58:
        raise ValueError(f"{shape} are more numbers than memory can hold")
    out = np.empty(shape, float_dtype(dtype))
    _core.random_orthogonal(rng_key(rng), out)
    return out


def complement(U: Array, *, check: bool = True) -> Array:
    """An orthonormal basis ``(..., n, n - k)`` of everything orthogonal to the columns of ``U (..., n, k)``.

    The last columns of the Householder ``Q`` of ``U``; ``4 n k (n - k)`` flops. ``check`` makes sure that ``U`` is
    orthonormal: with dependent columns the complement would be larger than ``n - k``.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.orth import complement, random_orthogonal
    >>> U = random_orthogonal(6, 2, rng=0)
    >>> W = complement(U)
    >>> W.shape, bool(np.abs(U.T @ W).max() < 1e-14)
    ((6, 4), True)
    """
    U, dtype = matrices(column(U), "U")
    if truth(check, "check"):
        check_basis(U, "U")
    *batch, n, k = U.shape
    if k > n:
        raise ValueError(f"U has {k} columns of {n} entries: so many cannot be orthonormal")
    q, _ = householder_qr(numpy(U))
    out = np.zeros((*batch, n, n - k), dtype)
    out[..., np.arange(k, n), np.arange(n - k)] = 1
    q.apply(out, out=out, check=False)
    return to_library(out, library_of(U))


def _tolerance(tol: float | None, dtype: np.dtype[Any]) -> float:
    if tol is None:
        return math.pow(float(np.finfo(dtype).eps), 2 / 3)
    value = real_number(tol, "tol", 0.0)
    if value >= 1:
        raise ValueError(f"tol must be in [0, 1), got {value}")
    return value


def _two_bases(
    U: Array, W: Array, check: bool
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.dtype[Any], str]:
    U, dtype = matrices(column(U), "U")
    W, other = matrices(column(W), "W")
    same_dtype(dtype, other, "W", "U")
    if U.shape[-2] != W.shape[-2]:
        raise ValueError(f"U and W must live in one space, got {U.shape[-2]} and {W.shape[-2]} rows")
    if truth(check, "check"):
        check_basis(U, "U")
        check_basis(W, "W")
    return numpy(U), numpy(W), dtype, library_of(U)


def _residual(U: np.ndarray[Any, Any], W: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """W minus its part in the span of U, projected twice."""
    if U.shape[-2] != W.shape[-2]:
        raise ValueError(f"U and W must live in one space, got {U.shape[-2]} and {W.shape[-2]} rows")
    shape = np.broadcast_shapes(U.shape[:-2], W.shape[:-2])
    rest = np.empty((*shape, *W.shape[-2:]), W.dtype)
    _core.apply_core(np.broadcast_to(W, rest.shape), U, None, -1.0, 1.0, True, rest, False)
    _core.apply_core(rest, U, None, -1.0, 1.0, True, rest, False)
    return rest


def span_sum(U: Array, W: Array, *, tol: float | None = None, check: bool = True) -> Array:
    """An orthonormal basis of the sum of the spans of ``U (..., n, k)`` and ``W (..., n, l)``.

    The columns of ``U`` come first, unchanged; a vector is one column. A direction of ``W`` counts as new when the sine
    of its angle to the span of ``U`` exceeds ``tol`` (``eps^(2/3)`` by default). Matrices of a stack must give one
    dimension, else ValueError.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.orth import span_sum
    >>> I = np.eye(5)
    >>> span_sum(I[:, :2], I[:, 1:4]).shape
    (5, 4)
    """
    u, w, dtype, library = _two_bases(U, W, check)
    tol = _tolerance(tol, dtype)
    rest = _residual(u, w)
    q, r = householder_qr(rest)
    x, s, _ = stoppable(np.linalg.svd, r)
    new = one_rank(np.count_nonzero(s > tol, axis=-1))
    extra = product(q.to_array(), np.ascontiguousarray(x[..., :, :new]))
    extra = _residual(u, extra)
    orthonormalize(extra, out=extra)
    u = np.broadcast_to(u, (*extra.shape[:-2], *u.shape[-2:]))
    return to_library(np.concatenate([u, extra], axis=-1), library)


def span_intersection(U: Array, W: Array, *, tol: float | None = None, check: bool = True) -> Array:
    """An orthonormal basis of what the spans of ``U (..., n, k)`` and ``W (..., n, l)`` have in common.

    Directions of ``W`` whose angle to the span of ``U`` has a sine of at most ``tol`` (``eps^(2/3)`` by default),
    from the sines themselves: cosines cannot tell angles below ``√eps`` from zero. Matrices of a stack must give one
    dimension.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.orth import span_intersection
    >>> I = np.eye(5)
    >>> np.abs(span_intersection(I[:, :3], I[:, 2:])).T
    array([[0., 0., 1., 0., 0.]])
    """
    u, w, dtype, library = _two_bases(U, W, check)
    tol = _tolerance(tol, dtype)
    _, r = householder_qr(_residual(u, w))
    _, s, vt = stoppable(np.linalg.svd, r)
    inside = np.count_nonzero(s <= tol, axis=-1) + (w.shape[-1] - s.shape[-1])
    count = one_rank(inside)
    basis = product(np.ascontiguousarray(w), np.swapaxes(vt[..., vt.shape[-2] - count :, :], -1, -2).copy())
    return to_library(np.asarray(orthonormalize(basis, out=basis)), library)


def contains(U: Array, W: Array, *, tol: float | None = None, check: bool = True) -> np.ndarray[Any, Any]:
    """Whether the span of ``U (..., n, k)`` contains that of ``W (..., n, l)``: one bool for each matrix of the stack.

    True when the largest angle of ``W`` to the span of ``U`` has a sine of at most ``tol`` (``eps^(2/3)`` by
    default). ``W`` need not be orthonormal; its columns are taken at unit length. A vector is one column.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.orth import contains
    >>> bool(contains(np.eye(4)[:, :3], np.eye(4)[:, 1:3])), bool(contains(np.eye(4)[:, :1], np.eye(4)[:, 1:3]))
    (True, False)
    """
    U, dtype = matrices(column(U), "U")
    W, other = matrices(column(W), "W")
    same_dtype(dtype, other, "W", "U")
    if truth(check, "check"):
        check_basis(U, "U")
    tol = _tolerance(tol, dtype)
    w, _ = padded_span(W, name="W")
    rest = _residual(numpy(U), w)
    if rest.shape[-1] == 0:
        return np.ones(rest.shape[:-2], bool)
    return np.asarray(np.linalg.norm(rest, ord=2, axis=(-2, -1)) <= tol)


def compose(U: Array, W: Array, shared: int, *, tol: float | None = None) -> Array:
    """Composition of two spaces over coordinates that they share.

    ``U (..., s + p, k)`` spans a space of vectors ``(x, y)`` and ``W (..., p + q, l)`` one of vectors ``(y, z)``,
    with ``y`` the ``p = shared`` common coordinates: the last of ``U``, the first of ``W``. The composition is the
    space of all ``(x, z)`` for which some ``y`` has ``(x, y)`` in the first and ``(y, z)`` in the second: relations
    composed, and linear systems connected at their ports.

    Returns
    -------
    array (..., s + q, d)
        An orthonormal basis; ``d`` is what the two spaces give. Matrices of a stack must give one ``d``.

    Notes
    -----
    The null space of ``[U_y, -W_y]`` by an SVD of a factor of at most ``k + l`` rows, then the span of the matching
    parts; singular values up to ``tol`` (``eps^(2/3)`` by default) count as zero. ``U`` and ``W`` may be any bases.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.orth import compose
    >>> A, B = np.random.default_rng(0).standard_normal((2, 3, 3))
    >>> graph = lambda F: np.linalg.qr(np.vstack([np.eye(3), F]))[0]  # the vectors (x, F x)
    >>> basis = compose(graph(A), graph(B), shared=3)
    >>> np.allclose(basis[3:], B @ A @ basis[:3])
    True
    """
    U, dtype = matrices(column(U), "U")
    W, other = matrices(column(W), "W")
    same_dtype(dtype, other, "W", "U")
    library, tol = library_of(U), _tolerance(tol, dtype)
    if isinstance(shared, bool) or not isinstance(shared, (int, np.integer)):
        raise TypeError(f"shared must be an int, got {type(shared).__name__}")
    if not 0 <= shared <= min(U.shape[-2], W.shape[-2]):
        raise ValueError(f"shared must be from 0 to {min(U.shape[-2], W.shape[-2])}, got {shared}")
    # Orthonormal bases first: the tolerance then means an angle.
    u, w = span(U, "U"), span(W, "W")
    s, k = u.shape[-2] - shared, u.shape[-1]
    batch = np.broadcast_shapes(u.shape[:-2], w.shape[:-2])
    u, w = np.broadcast_to(u, (*batch, *u.shape[-2:])), np.broadcast_to(w, (*batch, *w.shape[-2:]))
    joint = np.concatenate([u[..., s:, :], -w[..., :shared, :]], axis=-1)
    if shared > joint.shape[-1]:
        _, joint = householder_qr(joint)
    _, values, vt = stoppable(np.linalg.svd, joint)
    free = one_rank(joint.shape[-1] - np.count_nonzero(values > tol, axis=-1)) if values.size else joint.shape[-1]
    null = np.swapaxes(vt[..., vt.shape[-2] - free :, :], -1, -2).copy()
    ends = np.concatenate(
        [product(u[..., :s, :], null[..., :k, :]), product(w[..., shared:, :], null[..., k:, :])], axis=-2
    )
    # Not relative: a pair whose ends vanish is a loop over the shared coordinates, and spans nothing.
    q, r = householder_qr(ends)
    x, values, _ = stoppable(np.linalg.svd, r)
    rank = one_rank(np.count_nonzero(values > tol, axis=-1))
    return to_library(product(q.to_array(), np.ascontiguousarray(x[..., :, :rank])), library)


def hadamard(
    x: Array, out: Array | None = None, *, scale: float | None = None, transpose: bool = False, check: bool = True
) -> Array:
    """The Hadamard transform ``H x`` of every vector along the last axis.

    Parameters
    ----------
    x : array (..., n)
        ``n = 2^p m`` with m in {1, 12, 20, 28, 40}. ``out`` may be ``x``.
    scale : float, optional
        ``1/√n`` by default, which makes the transform orthogonal; 1 gives sums and differences.
    transpose : bool, default False
        ``Hᵀ x``: the inverse of the orthogonal transform, and its gradient. Not the same as ``H`` where ``n`` has a
        factor 12 or 20: those base matrices are not symmetric.

    Notes
    -----
    ``H_n = H_m ⊗ H_(2^p)`` with Sylvester's matrix for the power of two, Paley's first construction for 12 and 20 and
    his second one for 28 (Paley, J. Math. Phys. 12, 1933); 40 is ``20 · 2``. :func:`hadamard_matrix` gives it. ``n
    (log2(n/m) + m)`` operations a vector; one read and one write.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.orth import hadamard, hadamard_matrix
    >>> x = np.arange(24.0)
    >>> np.allclose(hadamard(x), hadamard_matrix(24) @ x / np.sqrt(24))
    True
    >>> np.allclose(hadamard(hadamard(x), transpose=True), x)
    True
    """
    x = as_array(x, "x")
    dtype = check_float(x, "x")
    shape = tuple(x.shape)
    if len(shape) < 1:
        raise ValueError("x must have at least 1 dimension")
    library = library_of(x)
    n = shape[-1]
    if n == 0:
        raise ValueError("the last axis of x is empty")
    factor = 1.0 / math.sqrt(n) if scale is None else real_number(scale, "scale")
    result, fresh = output(out, shape, dtype, library)
    source, target = detached(x), detached(result)
    if len(shape) == 1:
        source, target = source[None], target[None]
    _core.hadamard(source, target, factor, truth(transpose, "transpose"), truth(check, "check"))
    return finish(result, fresh, library)


def hadamard_matrix(n: int, dtype: Any = np.float64) -> np.ndarray[Any, Any]:
    """The matrix of :func:`hadamard` with ``scale=1``: entries ±1, ``H Hᵀ = n I``. It needs ``n²`` entries."""
    n = whole_number(n, "n", 1, 2**20)
    out = np.eye(n, dtype=float_dtype(dtype))
    return np.asarray(hadamard(out, out, scale=1.0, transpose=True))
