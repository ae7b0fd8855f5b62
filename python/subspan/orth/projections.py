"""The product under all projections, and the projections."""

from __future__ import annotations

from typing import Any

from subspan._lib.arrays import Array
from subspan._lib.call import call_of

__all__ = ["apply_core", "project", "project_out", "rotate", "swap"]


def apply_core(
    C: Array,
    V: Array,
    M: Array,
    *,
    alpha: float = 1.0,
    side: str = "left",
    out: Array | None = None,
    check: bool = True,
) -> Array:
    """``alpha C + V M (VᵀC)`` (``side="left"``) or ``alpha C + (C V) M Vᵀ`` (``"right"``), fused.

    Parameters
    ----------
    C : array (..., m, n)
        Any strides. Rows or columns that are contiguous are read in place; where neither are, a strip at a time is
        copied.
    V : array (..., m, k) or (..., n, k), or Int4Basis
        Leading axes broadcast against those of ``C``.
    M : float, array (k,) or array (..., k, k)
        A multiple of the identity, a diagonal, or any core. Not necessarily symmetric.
    alpha : float, default 1.0
        With 0, ``C`` is not read again when the result is written.
    out : array, optional
        Exact shape and dtype; may be ``C`` itself, and must not overlap anything else.
    check : bool, default True
        Look for NaN and infinity before ``C`` is written. In place that costs a second read of ``C``.

    Returns
    -------
    array of the shape of ``C``; ``out`` where it was given.

    Raises
    ------
    ValueError
        Shapes that do not fit, an ``out`` that overlaps, NaN or infinity (``C`` is untouched then).
    TypeError
        Dtypes other than float32 and float64, or that differ.

    Notes
    -----
    ``4 m n k`` flops; two reads and one write of ``C``. Work memory is one panel, ``k n`` (left) or ``k m`` (right)
    items. Results are bit-identical for any number of threads.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.orth import apply_core
    >>> rng = np.random.default_rng(0)
    >>> C, V, M = rng.standard_normal((6, 5)), rng.standard_normal((6, 2)), rng.standard_normal((2, 2))
    >>> np.allclose(apply_core(C, V, M, alpha=0.5), 0.5 * C + V @ M @ (V.T @ C))
    True
    """
    call = call_of(C=C, V=V, M=M, out=out)
    return call.give(call.kernels.apply_core(call.context, C, V, M, alpha, side, out, check), out)


def project(
    C: Array,
    U: Array,
    *,
    side: str = "left",
    out: Array | None = None,
    orthonormal: bool | None = None,
    check: bool = True,
) -> Array:
    """The part of ``C`` inside the span of ``U``: ``U UᵀC``, or ``C U Uᵀ`` with ``side="right"``.

    Parameters are those of :func:`project_out`.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.orth import project, random_orthogonal
    >>> U = random_orthogonal(8, 3, rng=0)
    >>> C = np.ones((8, 2))
    >>> np.allclose(project(C, U), U @ (U.T @ C))
    True
    """
    call = call_of(C=C, U=U, out=out)
    return call.give(call.kernels.project(call.context, C, U, side, out, orthonormal, check), out)


def project_out(
    C: Array,
    U: Array,
    *,
    side: str = "left",
    strength: float = 1.0,
    out: Array | None = None,
    orthonormal: bool | None = None,
    check: bool = True,
) -> Array:
    """Remove the span of ``U``: ``C - strength · U UᵀC``, or ``C - strength · C U Uᵀ`` with ``side="right"``.

    Parameters
    ----------
    C : array (..., m, n), a vector, or a list of matrices of any shapes
        ``out=C`` works in place. With a list, ``U`` (and ``out``) must be lists of the same length, and the result is
        one; on a CUDA device one kernel launch takes up to 160 matrices.
    U : array (..., m, k) or (..., n, k), Int4Basis, or a pair of them with ``side="both"``
        Leading axes broadcast against those of ``C``. With ``"both"``, ``(left, right)``: both are projected out.
    side : {"left", "right", "both"}
        Which space ``U`` lives in: that of the columns of ``C`` (left), or of its rows.
    strength : float, default 1.0
        1 removes, a part of it ablates partially, 2 reflects.
    orthonormal : bool, optional
        True (the default for arrays): the columns are orthonormal, which is tested by ``‖(UᵀU - I) z‖`` for two
        sign vectors ``z``. False: any basis, of full rank or not, by its Gram core ``(UᵀU)⁺``; always so for Int4Basis.
    check : bool, default True
        See :mod:`subspan.orth`; False also trusts ``U``.

    Returns
    -------
    array of the shape of ``C``; ``out`` where it was given. For strength 1, ``‖UᵀC'‖ <= 10 eps ‖UᵀC‖`` as long as ``C``
    is not nearly orthogonal to ``U`` already: rounding of the result itself is of the order of ``eps ‖C'‖``.

    Raises
    ------
    ValueError
        As :func:`apply_core`, and for a ``U`` whose columns are not orthonormal though promised.

    Notes
    -----
    ``4 m n k`` flops; two reads and one write of ``C``. Used by OSF, GPM, FOT and CoSO for gradients and by
    abliteration for weights; see docs/orth.md for the table.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.orth import project_out, random_orthogonal
    >>> G, U = np.random.default_rng(0).standard_normal((64, 32)), random_orthogonal(64, 4, rng=0)
    >>> project_out(G, U, out=G) is G
    True
    >>> bool(np.abs(U.T @ G).max() < 1e-14)
    True
    """
    if isinstance(C, (list, tuple)) and any(hasattr(c, "shape") for c in C):
        return _project_out_list(C, U, side, strength, out, orthonormal, check)
    call = call_of(C=C, U=U, out=out)
    return call.give(call.kernels.project_out(call.context, C, U, side, strength, out, orthonormal, check), out)


def _project_out_list(
    C: Any, U: Any, side: str, strength: float, out: Any, orthonormal: bool | None, check: bool
) -> list[Array]:
    """Matrices of any shapes, each with its basis: one launch on a device."""
    for x, name in ((U, "U"), (out, "out")):
        if x is None and name == "out":
            continue
        if not isinstance(x, (list, tuple)) or len(x) != len(C):
            raise ValueError(f"C is a list of {len(C)} matrices, so {name} must be one too: lists of one length")
    call = call_of(**{f"C[{i}]": x for i, x in enumerate(C)}, **{f"U[{i}]": x for i, x in enumerate(U)})
    outs = None if out is None else list(out)
    found = call.kernels.project_out_list(call.context, list(C), list(U), side, strength, outs, orthonormal, check)
    return [
        call_of(C=c).give(x, None if outs is None else outs[i]) for i, (c, x) in enumerate(zip(C, found, strict=True))
    ]


def swap(base: Array, source: Array, R: Array, out: Array | None = None, *, check: bool = True) -> Array:
    """``base + ((source - base) R) Rᵀ``: coordinates in the span of ``R`` from ``source``, all else from ``base``.

    Subspace patching (distributed alignment search, LoReFT's intervention, activation patching).

    Parameters
    ----------
    base, source : array (..., m, n)
        Samples are rows. ``out`` may be ``base``.
    R : array (..., n, k)
        Orthonormal columns.

    Notes
    -----
    ``4 m n k`` flops; ``base`` and ``source`` are each read once where a block of rows stays in the cache.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.orth import random_orthogonal, swap
    >>> a, b = np.random.default_rng(0).standard_normal((2, 5, 8))
    >>> R = random_orthogonal(8, 3, rng=0)
    >>> np.allclose(swap(a, b, R) @ R, b @ R)
    True
    """
    call = call_of(base=base, source=source, R=R, out=out)
    return call.give(call.kernels.swap(call.context, base, source, R, out, check), out)


def rotate(
    C: Array, source: Array, target: Array, *, side: str = "left", out: Array | None = None, check: bool = True
) -> Array:
    """Rotate in the plane of two directions, taking ``source`` to ``target``; the orthogonal complement is fixed.

    The rotation of smallest angle, ``R = I + V [[c - 1, -z], [z, c - 1]] Vᵀ``: ``V = [s, e]`` holds the unit vector
    ``s`` along ``source`` and the unit vector ``e`` along the component of ``target`` orthogonal to it, and ``c`` and
    ``z`` are the cosine and sine of the angle. ``C ↦ R C``; ``side="right"`` rotates rows: ``C ↦ C Rᵀ``.

    Parameters
    ----------
    C : array (..., m, n)
    source, target : array (m,) or (n,) with ``side="right"``
        Nonzero; lengths do not matter. Opposite directions do not determine the plane and raise ValueError; on a CUDA
        device, where values are not tested, they give NaN.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.orth import rotate
    >>> np.allclose(rotate(np.eye(3), [1.0, 0, 0], [0, 2.0, 0]) @ [1, 0, 0], [0, 1, 0])
    True
    """
    call = call_of(C=C, source=source, target=target, out=out)
    return call.give(call.kernels.rotate(call.context, C, source, target, side, out, check), out)
