"""Orthonormal bases, and algebra of the spaces they span."""

from __future__ import annotations

from typing import Any

import numpy as np

from subspan import _core
from subspan._lib.arrays import Array
from subspan._lib.call import call_of
from subspan._lib.numbers import float_dtype, rng_key, stack_shape, whole_number

__all__ = [
    "complement",
    "compose",
    "contains",
    "hadamard",
    "hadamard_matrix",
    "null_space",
    "orthonormalize",
    "random_orthogonal",
    "range_basis",
    "span_intersection",
    "span_sum",
]


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
    A : array (..., m, k), k <= m, or a vector (m,), which is normalised; ``"polar"`` also takes ``k > m``, and then
        gives orthonormal rows
    method : {"auto", "cholesky", "householder", "polar"}
        ``"cholesky"``: shifted Cholesky QR on columns of unit length, repeated until the measured loss of
        orthogonality is at working precision; LinAlgError where it cannot separate the columns. ``"householder"``:
        Householder QR. ``"auto"``: the first, then the second. ``"polar"``: the nearest orthonormal matrix ``U Vᵀ``
        of ``A = U Σ Vᵀ`` (what Muon approximates), to working precision, by the dynamically weighted Halley
        iteration; on a CUDA device by polynomials of degree five, also of float16 and bfloat16.
    out : array, optional
        Exact shape and dtype, contiguous rows; may be ``A``.
    rank_deficient : {"complete", "raise"}
        What to do with a column that depends on those before it (its component orthogonal to them is at most ``m eps``
        of its norm): replace it by some orthonormal direction, or raise LinAlgError. A completed basis spans more than
        ``A`` does; :func:`range_basis` gives a basis of the range of ``A``.
    return_rank : bool, default False
        Return ``(Q, rank)`` with the number of independent columns: an int, or an array of the shape of the stack.

    Returns
    -------
    array (..., m, k) with ``max|QᵀQ - I| <= 10 eps √k``, or ``(Q, rank)``

    Notes
    -----
    ``3 m k²`` flops for a well-conditioned ``A``, ``4 m k²`` by Householder, ``6 m k² + 40 k³`` for the polar factor.
    On a CUDA device the polar factor is so many polynomials of ``6 m k²``: 35 to 41 in float64, 21 to 27 in float32, 13
    to 21 in 16 bits, from 8 x 8 to 4096 x 4096.
    Signs of the columns are those of a QR with a positive diagonal of ``R`` (``"cholesky"``) or of LAPACK's
    (``"householder"``).
    Sources: Fukaya et al., SIAM J. Sci. Comput. 42 (2020); Nakatsukasa, Bai and Gygi, SIAM J. Matrix Anal. Appl. 31
    (2010); Amsel, Persson, Musco and Gower, The Polar Express (2025).

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.orth import orthonormalize
    >>> A = np.random.default_rng(0).standard_normal((50, 5))
    >>> U, _, Vt = np.linalg.svd(A, full_matrices=False)
    >>> np.allclose(orthonormalize(A, method="polar"), U @ Vt)
    True
    """
    call = call_of(A=A, out=out)
    found = call.kernels.orthonormalize(call.context, A, method, out, rank_deficient, return_rank)
    if return_rank is True:
        return call.give(found[0], out), found[1]
    return call.give(found, out)


def range_basis(A: Array, *, rcond: float | None = None) -> Array:
    """An orthonormal basis ``(..., m, r)`` of the column space of ``A (..., m, n)``, of any shape and rank.

    ``r`` is the numerical rank: how many singular values exceed ``rcond`` times the first (``max(m, n) eps`` by
    default, as in ``scipy.linalg.orth``). The columns are the left singular vectors, leading first. Unlike
    :func:`orthonormalize`, this does not complete the basis where columns of ``A`` are dependent. All matrices of a
    stack must have the same rank, else ValueError.

    ``2 n² (m - n/3)`` flops for the QR, an SVD of ``R`` and ``2 m n r`` for the product.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.orth import range_basis
    >>> A = np.outer(np.ones(5), [1.0, 2.0, 3.0])
    >>> range_basis(A).shape
    (5, 1)
    """
    call = call_of(A=A)
    return call.give(call.kernels.range_basis(call.context, A, rcond))


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
    call = call_of(A=A)
    return call.give(call.kernels.null_space(call.context, A, rcond))


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
    shape = stack_shape(n, n if k is None else k, batch)
    drawn: np.ndarray[Any, Any] = _core.random_orthogonal(None, rng_key(rng), shape, float_dtype(dtype) == np.float32)
    return drawn


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
    call = call_of(U=U)
    return call.give(call.kernels.complement(call.context, U, check))


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
    call = call_of(U=U, W=W)
    return call.give(call.kernels.span_sum(call.context, U, W, tol, check))


def span_intersection(U: Array, W: Array, *, tol: float | None = None, check: bool = True) -> Array:
    """An orthonormal basis of what the spans of ``U (..., n, k)`` and ``W (..., n, l)`` have in common.

    A direction of ``W`` counts as common when the sine of its angle to the span of ``U`` is at most ``tol``
    (``eps^(2/3)`` by default). Sines are computed directly, as cosines cannot tell angles below ``√eps`` from zero. All
    matrices of a stack must give the same dimension.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.orth import span_intersection
    >>> I = np.eye(5)
    >>> np.abs(span_intersection(I[:, :3], I[:, 2:])).T
    array([[0., 0., 1., 0., 0.]])
    """
    call = call_of(U=U, W=W)
    return call.give(call.kernels.span_intersection(call.context, U, W, tol, check))


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
    call = call_of(U=U, W=W)
    found: np.ndarray[Any, Any] = call.kernels.contains(call.context, U, W, tol, check)
    return found


def compose(U: Array, W: Array, shared: int, *, tol: float | None = None) -> Array:
    """Composition of two spaces over coordinates that they share.

    ``U (..., s + p, k)`` spans a space of vectors ``(x, y)`` and ``W (..., p + q, l)`` one of vectors ``(y, z)``,
    with ``y`` the ``p = shared`` common coordinates: the last of ``U``, the first of ``W``. The composition is the
    space of all ``(x, z)`` for which some ``y`` has ``(x, y)`` in the first and ``(y, z)`` in the second: relations
    composed, and linear systems connected at their ports.

    Returns
    -------
    array (..., s + q, d)
        An orthonormal basis; ``d``, the dimension of the composition, must be the same for all matrices of a stack.

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
    call = call_of(U=U, W=W)
    return call.give(call.kernels.compose(call.context, U, W, shared, tol))


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
    call = call_of(x=x, out=out)
    return call.give(call.kernels.hadamard(call.context, x, out, scale, transpose, check), out)


def hadamard_matrix(n: int, dtype: Any = np.float64) -> np.ndarray[Any, Any]:
    """The matrix of :func:`hadamard` with ``scale=1``: entries ±1, ``H Hᵀ = n I``. It needs ``n²`` entries."""
    n = whole_number(n, "n", 1, 2**20)
    out = np.eye(n, dtype=float_dtype(dtype))
    return np.asarray(hadamard(out, out, scale=1.0, transpose=True))
