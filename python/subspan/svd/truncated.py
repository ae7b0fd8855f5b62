"""One-shot truncated decompositions."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy as np

from subspan import _core
from subspan._lib.arrays import (
    Array,
    as_array,
    as_float,
    check_float,
    check_library,
    detached,
    float_array,
    float_beside,
    library_of,
    to_library,
)
from subspan._lib.call import call_of
from subspan._lib.device import on_device
from subspan._lib.numbers import rng_key
from subspan._lib.sparse import csr_parts, is_sparse
from subspan.svd.inner_product import InnerProduct, no_overflow, signs_of_rows

__all__ = ["TruncatedSVD", "merge_svd", "product_svd", "truncated_svd"]


class TruncatedSVD(NamedTuple):
    """``U (m, k)``, ``S (k,)`` descending and ``Vh (k, n)`` of a rank-k approximation ``U @ diag(S) @ Vh``."""

    U: Array
    S: Array
    Vh: Array


def truncated_svd(
    A: Array,
    rank: int | None = None,
    *,
    energy: float | None = None,
    tol: float | None = None,
    oversample: int = 10,
    power_iterations: int | str = 2,
    initial: Array | None = None,
    rng: int | np.random.Generator | None = None,
    signs: str = "v",
    weight: Array | None = None,
) -> TruncatedSVD:
    """Leading singular triplets of a matrix by randomized subspace iteration.

    Parameters
    ----------
    A : array, sparse matrix or operator ``(m, n)``
        Dense of any library; ``scipy.sparse`` (CSR is taken as it is); or any object with ``shape``, ``matmat`` and
        ``rmatmat``, a ``scipy.sparse.linalg.LinearOperator`` say.
    rank : int, optional
        Number of triplets. Without it ``energy`` or ``tol`` decides: subspaces of growing size are tried, each started
        from the one before.
    energy : float, optional
        Smallest rank that holds this share of the squared Frobenius norm (not for operators); ``rank`` is then the
        upper limit.
    tol : float, optional
        Leave out singular values below ``tol`` times the first.
    oversample, power_iterations : int
        ``l = rank + oversample`` vectors; ``2 (power_iterations + 1)`` products with them. ``power_iterations="auto"``
        is scikit-learn's choice: 7 where ``rank`` is below a tenth of the smaller dimension, else 4. scikit-learn's
        ``n_iter`` counts the same iterations: ``power_iterations=5`` corresponds to ``TruncatedSVD(n_iter=5)``.
    initial : array ``(j, n)``, optional
        A warm start, ``Vh`` of a nearby matrix: with one, ``power_iterations=0`` or 1 is often enough.
    rng : None, int or numpy.random.Generator
        Draws the key of a counter-based generator: the same for any number of threads.
    signs : {"v", "u"}
        Which entry of largest magnitude is positive: that of each row of ``Vh``, or that of each column of ``U`` (as
        scikit-learn's ``svd_flip`` by default).
    weight : array ``(n,)``, array or sparse matrix ``(n, n)``, or operator, optional
        The inner product ``x·W·y`` of rows, as in :class:`StreamingSVD`: ``Vh @ W @ Vh.T`` is the identity, and ``A``
        is near ``U @ diag(S) @ Vh``.

    Returns
    -------
    TruncatedSVD
        ``U (m, k)``, ``S (k,)``, ``Vh (k, n)``. Integers of up to 32 bits are converted to float64, and then so are the
        results.

    Raises
    ------
    ValueError
        NaN or infinity in ``A``, sizes that do not fit, or singular values that overflow the dtype.

    Notes
    -----
    ``4 m n l (power_iterations + 1)`` flops. Work memory ``4 l (m + n)`` items. Halko, Martinsson and Tropp, SIAM
    Review 53 (2011), algorithms 4.4 and 5.1, with Cholesky QR between the products. On a CUDA device ``energy`` and
    ``tol`` synchronise with the host; ``rank`` alone does not, and NaN in ``A`` then makes all results NaN. In float32,
    singular values below 2e-6 of the first are set to zero there, with an arbitrary orthonormal completion as vectors.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.svd import truncated_svd
    >>> A = np.diag(np.arange(50.0, 0.0, -1.0))
    >>> truncated_svd(A, 3, power_iterations=12, rng=0).S.round(1)
    array([50., 49., 48.])
    """
    options: Any = (rank, energy, tol, oversample, power_iterations)
    if weight is not None:
        return _weighted(A, options, initial, rng, signs, weight)
    sparse = is_sparse(A)
    operator = not sparse and hasattr(A, "matmat") and hasattr(A, "rmatmat")
    call = call_of(A=None if sparse or operator else A, initial=initial)
    if initial is not None and call.context is None:
        initial = detached(float_array(initial, "initial", float_beside(A)), "initial")
    more: Any = (initial, rng_key(rng), signs)
    if sparse:
        return TruncatedSVD(*_core.truncated_svd_csr(*csr_parts(A, "A"), *options, *more))
    if operator:
        return TruncatedSVD(*_core.truncated_svd_operator(A, *options, *more))
    A = as_float(as_array(A, "A"), "A")
    return TruncatedSVD(*call.give(call.kernels.truncated_svd(call.context, A, *options, *more)))


def _weighted(A: Array, options: Any, initial: Any, rng: Any, signs: str, weight: Any) -> TruncatedSVD:
    """The decomposition in the inner product ``x·W·y`` of rows: that of ``A F`` with ``W = F Fᵀ``."""
    inner = InnerProduct(weight)
    dtype: Any = None
    if on_device(A, initial):
        raise TypeError("weight is not implemented on CUDA devices")
    x: Any
    library, like = "numpy", None
    if is_sparse(A):
        data, indices, indptr, *shape = csr_parts(A, "A")
        dtype = check_float(data, "A")
        space = sys.modules["scipy.sparse"]
        if options[1] is None and isinstance(inner.factor, np.ndarray) and inner.factor.ndim == 2:
            x = inner.behind(space.csr_array((data.astype(np.float64), indices, indptr), shape=shape))
        else:
            x = inner.forward_csr((data, indices, indptr, *shape), "A")
            x = space.csr_array(x[:3], shape=x[3:]) if isinstance(x, tuple) else x
    elif hasattr(A, "matmat") and hasattr(A, "rmatmat") and not hasattr(A, "__dlpack__"):
        dtype = np.float32 if _core.is_single_operator(A) else np.float64
        x = inner.behind(A)
    else:
        A = as_array(A, "A")
        check_library(A, "A")
        library, like = library_of(A), A
        x = detached(as_float(A, "A"), "A")
        dtype = check_float(x, "A")
        x = inner.forward(x, "A")
    start = None if initial is None else inner.forward(detached(as_array(initial, "initial"), "initial"), "initial")
    names = ("rank", "energy", "tol", "oversample", "power_iterations")
    found = truncated_svd(x, **dict(zip(names, options, strict=True)), initial=start, rng=rng, signs=signs)
    vh = inner.backward(found.Vh)
    flip = signs_of_rows(vh if signs == "v" or found.U.shape[0] == 0 else found.U.T)
    with np.errstate(over="ignore"):
        shown = [
            no_overflow(x.astype(dtype, copy=False), x, "a result")
            for x in (found.U * flip, found.S, vh * flip[:, None])
        ]
    return TruncatedSVD(*(to_library(x, library, like) for x in shown))


def product_svd(A: Array, B: Array, rank: int | None = None, *, signs: str = "v") -> TruncatedSVD:
    """SVD of ``A @ B`` from factors ``A (m, p)`` and ``B (p, n)``.

    With ``p <= min(m, n)`` the product is never formed: ``2 p² (m + n)`` flops and a ``p × p`` core, against
    ``2 m n p`` and an ``m × n`` SVD. At most ``min(m, p, n)`` triplets exist; ``rank`` keeps fewer. ``signs`` as in
    :func:`truncated_svd`. Integers are converted as there.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.svd import product_svd
    >>> A, B = np.ones((100, 1)), np.ones((1, 400))
    >>> round(float(product_svd(A, B).S[0]), 6)
    200.0
    """
    wanted = float_beside(A, B)
    A, B = float_array(A, "A", wanted), float_array(B, "B", wanted)
    call = call_of(A=A, B=B)
    return TruncatedSVD(*call.give(call.kernels.product_svd(call.context, A, B, rank, signs)))


_PARTS = ("a.U", "a.S", "a.V", "b.U", "b.S", "b.V")


def merge_svd(a: Any, b: Any, rank: int, *, forget: float = 1.0, signs: str = "v") -> TruncatedSVD:
    """Truncated SVD of the stacked matrix ``[A; B]`` from truncated SVDs of ``A`` and ``B``.

    Parameters
    ----------
    a, b : TruncatedSVD or tuple ``(U, S, Vh)``
        ``U`` may be None in both: then it is None in the result.
    rank : int
        At most ``min(ka + kb, n)``.
    forget : float, default 1.0
        ``a``, the past, is multiplied by this factor in (0, 1], as :class:`StreamingSVD` does at an update.
    signs : {"v", "u"}
        As in :func:`truncated_svd`.

    Notes
    -----
    ``2 n (ka + kb)²`` flops and a small problem of size ``ka + kb``. Exact up to rounding and the truncation to
    ``rank``; in a tree of merges, in any order, the error is at most the sum of the truncation errors of the merges.
    """
    given = []
    for x, name in ((a, "a"), (b, "b")):
        try:
            u, s, vh = x
        except (TypeError, ValueError):
            raise TypeError(f"{name} must be a triple (U, S, Vh), got {type(x).__name__}") from None
        if s is None or vh is None:
            raise TypeError(f"{name}: only U may be None")
        wanted = float_beside(u, s, vh)
        u = None if u is None else float_array(u, f"{name}.U", wanted)
        given.append((u, float_array(s, f"{name}.S", wanted), float_array(vh, f"{name}.Vh", wanted)))
    call = call_of(a=a[2], **dict(zip(_PARTS, given[0] + given[1], strict=True)))
    return TruncatedSVD(*call.give(call.kernels.merge_svd(call.context, *given, rank, forget, signs)))
