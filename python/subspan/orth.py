"""Householder reflections and orthogonal projections, on stacks.

Nearly every projection is ``alpha C + V M (VᵀC)`` with a tall ``V`` and a small core ``M``: :func:`apply_core` is that
product, and the others are it with an ``M`` of their own. Matrices are the last two axes, stacks lead: ``(..., m, n)``. A
basis is ``(..., n, k)``, with its vectors as columns. Results have the library and dtype of the input; float32 and float64
are taken, on the CPU.

``check=True`` (the default) looks for NaN and infinity, and at bases that must be orthonormal, before anything is written:
whatever raises, the arguments are as they were. ``check=False`` leaves both out.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import numpy as np

from subspan import _core
from subspan._arrays import Array, as_array, check_float, library_of, output, rng_key, to_library
from subspan.svd import truncated_svd

__all__ = [
    "GradientProjector",
    "HouseholderQ",
    "Int4Basis",
    "apply_core",
    "complement",
    "compose",
    "contains",
    "hadamard",
    "hadamard_matrix",
    "householder_apply",
    "householder_apply_backward",
    "householder_product",
    "householder_product_backward",
    "householder_qr",
    "orthonormalize",
    "project",
    "project_out",
    "quantize_int4",
    "random_orthogonal",
    "rotate",
    "span_intersection",
    "span_sum",
    "swap",
]

_BLOCK = 128  # reflections of a block in a factored Q, as in the C++ header


def _matrices(x: Array, name: str) -> tuple[Array, np.dtype[Any]]:
    x = as_array(x, name)
    dtype = check_float(x, name)
    if len(x.shape) < 2:
        raise ValueError(f"{name} must have at least 2 dimensions, got shape {tuple(x.shape)}")
    return x, dtype


def _left(side: str) -> bool:
    if side not in ("left", "right"):
        raise ValueError(f"side must be 'left' or 'right', got {side!r}")
    return side == "left"


def _finish(x: Any, fresh: bool, library: str) -> Array:
    return to_library(x, library) if fresh else x


def _numpy(x: Array) -> np.ndarray[Any, Any]:
    """A view in NumPy, without a copy."""
    if isinstance(x, np.ndarray):
        return x
    if hasattr(x, "detach"):
        x = x.detach()
    return np.from_dlpack(x)


def _batch(c: Array, *others: tuple[Array, int]) -> tuple[Array, tuple[int, ...]]:
    """C, as a broadcast view where other arguments have more leading axes than it."""
    shape = tuple(c.shape)
    try:
        batch = np.broadcast_shapes(shape[:-2], *(tuple(x.shape)[: len(x.shape) - core] for x, core in others))
    except ValueError:
        names = ", ".join(str(tuple(x.shape)) for x, _ in others)
        raise ValueError(f"leading axes do not broadcast: {shape} with {names}") from None
    if batch != shape[:-2]:
        c = np.broadcast_to(_numpy(c), (*batch, *shape[-2:]))
    return c, (*batch, *shape[-2:])


def _detached(x: Array) -> Array:
    """DLPack does not export tensors that require a gradient."""
    return x.detach() if library_of(x) == "torch" else x


# -- the product under all projections --------------------------------------------------------------------------------


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
        Any strides. Rows or columns that are contiguous are read in place; where neither are, a strip at a time is copied.
    V : array (..., m, k) or (..., n, k), or Int4Basis
        Leading axes broadcast to those of ``C``.
    M : float, array (k,) or array (..., k, k)
        A multiple of the identity, a diagonal, or any core. Not necessarily symmetric.
    alpha : float, default 1.0
        With 0, ``C`` is not read again when the result is written.
    out : array, optional
        Exact shape and dtype; may be ``C`` itself, and must not overlap anything else.
    check : bool, default True
        Look for NaN and infinity before anything is written. In place that costs a second read of ``C``.

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
    ``4 m n k`` flops; two reads and one write of ``C``. Work memory is one panel, ``k n`` (left) or ``k m`` (right) items.
    Results are bit-identical for any number of threads.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.orth import apply_core
    >>> rng = np.random.default_rng(0)
    >>> C, V, M = rng.standard_normal((6, 5)), rng.standard_normal((6, 2)), rng.standard_normal((2, 2))
    >>> np.allclose(apply_core(C, V, M, alpha=0.5), 0.5 * C + V @ M @ (V.T @ C))
    True
    """
    return _apply_core(C, V, M, alpha, side, out, check)


def _apply_core(
    C: Array,
    V: Array,
    M: Array,
    alpha: float,
    side: str,
    out: Array | None,
    check: bool,
    source: Array | None = None,
    name: str = "V",
) -> Array:
    C, dtype = _matrices(C, "C")
    left = _left(side)
    library = library_of(C)
    core, scalar = None, 1.0
    if isinstance(M, (int, float, np.integer, np.floating)):
        scalar = float(M)
    else:
        core = as_array(M, "M")
        if len(core.shape) == 0:
            core, scalar = None, float(core)
    others: list[tuple[Array, int]] = []
    basis: Any
    if isinstance(V, Int4Basis):
        basis = V._parts()
    else:
        basis, _ = _matrices(V, name)
        others.append((basis, 2))
        basis = _detached(basis)
    if core is not None and len(core.shape) > 2:
        others.append((core, 2))
    c, shape = _batch(_detached(C), *others)
    result, fresh = output(out, shape, dtype, library)
    _core.apply_core(
        c,
        basis,
        None if core is None else _detached(core),
        scalar,
        alpha,
        left,
        _detached(result),
        check,
        None if source is None else _detached(source),
    )
    return _finish(result, fresh, library)


def _check_basis(U: Array, name: str) -> None:
    """Orthonormal columns to 64 eps √k, by two products with vectors."""
    U, dtype = _matrices(U, name)
    n, k = U.shape[-2:]
    if k > n:
        raise ValueError(f"{name} has {k} columns of {n} entries: so many cannot be orthonormal")
    defect = _core.orthonormality_defect(_detached(U))
    if math.isnan(defect) or math.isinf(defect):
        raise ValueError(f"{name} holds NaN or infinity")
    bound = 64 * float(np.finfo(dtype).eps) * math.sqrt(max(k, 1))
    if defect > bound:
        raise ValueError(
            f"the columns of {name} are not orthonormal: ||(UᵀU - I) z|| / ||z|| is {defect:.1e}, more than {bound:.1e}; "
            f"pass orthonormal=False for any basis, orthonormalize {name}, or check=False"
        )


def _span(A: Array, tol: float) -> np.ndarray[Any, Any]:
    """Orthonormal basis of the columns of A whose singular values exceed tol times the largest one."""
    q, r = householder_qr(_numpy(A))
    x, s, _ = np.linalg.svd(r)
    ranks = np.count_nonzero(s > tol * s[..., :1], axis=-1) if s.shape[-1] else np.zeros(s.shape[:-1], int)
    rank = _one_rank(ranks)
    return _product(q.to_array(), np.ascontiguousarray(x[..., :, :rank]))


def _one_rank(ranks: Any) -> int:
    values = np.unique(ranks)
    if values.size > 1:
        raise ValueError(
            f"the matrices of the stack give spaces of different dimensions, {values.tolist()}, which no one array can hold"
        )
    return int(values[0]) if values.size else 0


def _product(A: np.ndarray[Any, Any], B: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    batch = np.broadcast_shapes(A.shape[:-2], B.shape[:-2])
    out = np.empty((*batch, A.shape[-2], B.shape[-1]), A.dtype)
    _core.product(A, B, 1.0, out)
    return out


def _projector(U: Array, orthonormal: bool | None, check: bool, name: str) -> tuple[Array, Array]:
    """A basis and the core that make the projector onto its span."""
    if orthonormal is None:
        orthonormal = not isinstance(U, Int4Basis)
    if orthonormal:
        if isinstance(U, Int4Basis):
            raise ValueError(f"{name} is an Int4Basis, and rounding to 4 bits leaves no basis orthonormal")
        if check:
            _check_basis(U, name)
        return U, 1.0
    if isinstance(U, Int4Basis):
        core = np.empty((U.shape[1], U.shape[1]), U.dtype)
        _core.gram_core(U._parts(), core)
        return U, core
    U, dtype = _matrices(U, name)
    k = U.shape[-1]
    core = np.empty((*U.shape[:-2], k, k), dtype)
    condition = _core.gram_core(_detached(U), core)
    if condition > 100.0:  # rounding of V M (VᵀC) grows with it
        return _span(_detached(U), max(U.shape[-2:]) * float(np.finfo(dtype).eps)), 1.0
    return U, core


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
    if side == "both":
        left, right = _pair(U)
        first = project(C, left, side="left", orthonormal=orthonormal, check=check)
        return project(first, right, side="right", out=first if out is None else out, orthonormal=orthonormal, check=check)
    basis, core = _projector(U, orthonormal, check, "U")
    return _apply_core(C, basis, core, 0.0, side, out, check, name="U")


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
    """Remove the span of ``U`` from ``C``: ``C - strength · U UᵀC``, or ``C - strength · C U Uᵀ`` with ``side="right"``.

    Parameters
    ----------
    C : array (..., m, n)
        ``out=C`` works in place.
    U : array (..., m, k) or (..., n, k), Int4Basis, or a pair of them with ``side="both"``
        Leading axes broadcast to those of ``C``. With ``"both"``, ``(left, right)``: rows and columns are projected.
    side : {"left", "right", "both"}
        Which space ``U`` lives in: that of the columns of ``C`` (left), or of its rows.
    strength : float, default 1.0
        1 removes, a part of it ablates partially, 2 reflects.
    orthonormal : bool, optional
        True promises orthonormal columns (the default for arrays), which is checked at the cost of two products with
        vectors. False takes any basis, full rank or not, through its Gram core ``(UᵀU)⁺``; always so for Int4Basis.
    check : bool, default True
        See :mod:`subspan.orth`; False also trusts ``U``.

    Returns
    -------
    array of the shape of ``C``, with ``‖UᵀC'‖ <= 10 eps ‖UᵀC‖`` for strength 1; ``out`` where it was given.

    Raises
    ------
    ValueError
        As :func:`apply_core`, and for a ``U`` whose columns are not orthonormal though promised.

    Notes
    -----
    ``4 m n k`` flops; two reads and one write of ``C``. Used by OSF, GPM, FOT and CoSO for gradients and by abliteration
    for weights; see docs/orth.md for the table.

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
    if not math.isfinite(strength):
        raise ValueError(f"strength must be finite, got {strength}")
    if side == "both":
        left, right = _pair(U)
        # Whatever is wrong with the right basis must be found before the left one has changed C.
        bases = [_projector(u, orthonormal, check, f"U[{i}]") for i, u in enumerate((left, right))]
        (lu, lc), (ru, rc) = bases
        shape = tuple(as_array(C, "C").shape)
        rows = right.shape[0] if isinstance(right, Int4Basis) else ru.shape[-2]
        if len(shape) >= 2 and rows != shape[-1]:
            raise ValueError(f"U[1] must have {shape[-1]} rows to act on C {shape} from the right, got {rows}")
        if check and not isinstance(ru, Int4Basis) and not np.isfinite(_numpy(ru)).all():
            raise ValueError("U[1] holds NaN or infinity")
        first = _apply_core(C, lu, -strength * lc, 1.0, "left", out, check, name="U[0]")
        return _apply_core(first, ru, -strength * rc, 1.0, "right", first, check, name="U[1]")
    basis, core = _projector(U, orthonormal, check, "U")
    return _apply_core(C, basis, -strength * core, 1.0, side, out, check, name="U")


def _pair(U: Array) -> tuple[Array, Array]:
    if not isinstance(U, (tuple, list)) or len(U) != 2:
        raise ValueError("side='both' takes U as a pair, (left basis, right basis)")
    return U[0], U[1]


def swap(base: Array, source: Array, R: Array, out: Array | None = None, *, check: bool = True) -> Array:
    """``base + ((source - base) R) Rᵀ``: the coordinates of ``source`` in the span of ``R`` put in place of those of ``base``.

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
    base, dtype = _matrices(base, "base")
    source, other = _matrices(source, "source")
    if other != dtype:
        raise TypeError(f"source must be {dtype} as base is, got {other}")
    if tuple(source.shape) != tuple(base.shape):
        raise ValueError(f"source must have the shape of base, {tuple(base.shape)}, got {tuple(source.shape)}")
    if check:
        _check_basis(R, "R")
    return _apply_core(base, R, 1.0, 1.0, "right", out, check, source=source, name="R")


def rotate(
    C: Array, source: Array, target: Array, *, side: str = "left", out: Array | None = None, check: bool = True
) -> Array:
    """Rotate the plane of two directions so that ``source`` comes to lie on ``target``; the rest stays as it is.

    The rotation of smallest angle: with ``V = [s, e]``, ``e`` the part of the target outside of ``s``, and the angle's
    cosine ``c`` and sine ``z``, it is ``I + V [[c - 1, -z], [z, c - 1]] Vᵀ``. ``side="right"`` rotates rows:
    ``C ↦ C Rᵀ``.

    Parameters
    ----------
    C : array (..., m, n)
    source, target : array (m,) or (n,) with ``side="right"``
        Not zero; lengths do not matter. Opposite directions have no such plane and raise ValueError.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.orth import rotate
    >>> np.allclose(rotate(np.eye(3), [1.0, 0, 0], [0, 2.0, 0]) @ [1, 0, 0], [0, 1, 0])
    True
    """
    C, dtype = _matrices(C, "C")
    _left(side)
    directions = []
    for x, name in ((source, "source"), (target, "target")):
        v = np.asarray(_numpy(as_array(x, name)), np.float64).reshape(-1)
        top = np.abs(v).max(initial=0.0)
        if not math.isfinite(top):
            raise ValueError(f"{name} holds NaN or infinity")
        if top == 0:
            raise ValueError(f"{name} is zero and gives no direction")
        v = v / top
        directions.append(v / np.linalg.norm(v))
    s, t = directions
    if s.shape != t.shape:
        raise ValueError(f"source and target must have one length, got {s.size} and {t.size}")
    # Of half sums and differences, which lose no digits where the two directions are close.
    plus, minus = np.linalg.norm(s + t), np.linalg.norm(s - t)
    sine, cosine = plus * minus / 2, (plus - minus) * (plus + minus) / 4
    if plus < 1e-12:
        raise ValueError("source and target are opposite: no plane is preferred to rotate in")
    e = t - s - s * (s @ (t - s))
    e -= s * (s @ e)
    length = np.linalg.norm(e)
    e = e / length if length > 0 else e
    less = -(minus**2) / 2  # cosine - 1
    del cosine
    core = np.array([[less, -sine], [sine, less]])
    if side == "right":
        core = core.T
    V = np.stack([s, e], axis=1).astype(dtype)
    return _apply_core(C, V, np.ascontiguousarray(core.astype(dtype)), 1.0, side, out, check)


# -- Householder reflections -------------------------------------------------------------------------------------------


class HouseholderQ:
    """The orthogonal factor of :func:`householder_qr`, kept as reflections: ``Q = I - V T Vᵀ``, m × m, never formed.

    Attributes
    ----------
    V : array (..., m, k)
        Unit lower trapezoidal.
    tau : array (..., k)
        LAPACK's factors: reflection j is ``I - tau_j v_j v_jᵀ``.
    shape : (..., m, m)
    """

    def __init__(self, V: Array, tau: Array, T: Array) -> None:
        self.V, self.tau, self._T = V, tau, T

    @property
    def shape(self) -> tuple[int, ...]:
        """``(..., m, m)``."""
        s = tuple(self.V.shape)
        return (*s[:-1], s[-2])

    @property
    def dtype(self) -> np.dtype[Any]:
        """float32 or float64."""
        return check_float(self.V, "V")

    def apply(
        self, C: Array, *, side: str = "left", transpose: bool = False, out: Array | None = None, check: bool = True
    ) -> Array:
        """``Q C``, ``QᵀC`` (``transpose``), ``C Q`` or ``C Qᵀ`` (``side="right"``), without forming ``Q``.

        ``C`` is ``(..., m, n)`` or ``(..., n, m)``; ``out`` may be ``C``. ``4 m n k - 2 n k²`` flops.
        """
        C, dtype = _matrices(C, "C")
        left = _left(side)
        library = library_of(C)
        c, shape = _batch(_detached(C), (self.V, 2))
        result, fresh = output(out, shape, dtype, library)
        _core.factored_apply(
            _detached(self.V), _detached(self._T), c, left, bool(transpose), _detached(result), check
        )
        return _finish(result, fresh, library)

    def to_array(self, *, full: bool = False) -> Array:
        """The first k columns of ``Q`` as an array ``(..., m, k)``, or all m of them with ``full``."""
        *batch, m, k = self.V.shape
        q = np.empty((*batch, m, m if full else k), self.dtype)
        _core.factored_array(_detached(self.V), _detached(self._T), q)
        return to_library(q, library_of(self.V))

    def __repr__(self) -> str:
        return f"HouseholderQ(shape={self.shape}, reflections={self.V.shape[-1]}, dtype={self.dtype})"


def householder_qr(A: Array) -> tuple[HouseholderQ, Array]:
    """QR by Householder reflections: ``A = Q R`` with ``Q`` kept as reflections.

    Parameters
    ----------
    A : array (..., m, n)
        Any strides, any rank; graded columns keep their own relative accuracy. NaN and infinity raise ValueError.

    Returns
    -------
    Q : HouseholderQ
        Of ``k = min(m, n)`` reflections.
    R : array (..., k, n)
        Upper trapezoidal, with LAPACK's signs: the diagonal may be negative.

    Notes
    -----
    ``2 n² (m - n/3)`` flops. Matrices of up to a few vectors' width (32 columns) are factored where they stay in the
    nearest cache; wider ones recursively, with products of matrices (Elmroth and Gustavson, IBM J. Res. Dev. 44, 2000).
    LAPACK's six residuals are under 2 (LAPACK's threshold is 30).

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.orth import householder_qr
    >>> A = np.random.default_rng(0).standard_normal((4, 50, 20))
    >>> Q, R = householder_qr(A)
    >>> np.allclose(Q.to_array() @ R, A), np.allclose(Q.apply(A, transpose=True)[:, :20], R)
    (True, True)
    """
    A, dtype = _matrices(A, "A")
    library = library_of(A)
    *batch, m, n = A.shape
    k = min(m, n)
    V, R = np.empty((*batch, m, k), dtype), np.empty((*batch, k, n), dtype)
    tau, T = np.empty((*batch, k), dtype), np.empty((*batch, k, min(k, _BLOCK)), dtype)
    _core.householder_qr(_detached(A), V, R, tau, T)
    hand = [to_library(x, library) for x in (V, tau, T, R)]
    return HouseholderQ(*hand[:3]), hand[3]


def householder_product(V: Array, tau: Array | None = None, *, check: bool = True) -> Array:
    """The first ``min(m, k)`` columns of ``H_1 ··· H_k``, ``H_j = I - tau_j v_j v_jᵀ``.

    Parameters
    ----------
    V : array (..., m, k)
        Columns are the reflections' vectors, used as they are: nothing is implied of the upper triangle. For LAPACK's
        packed form pass ``np.tril(a, -1) + np.eye(m, k)``.
    tau : array (..., k), optional
        None means unit reflections ``I - 2 v vᵀ / vᵀv``, where a zero vector is the identity.

    Notes
    -----
    ``3 m k²`` flops through ``T = (I + D S)⁻¹ D`` with ``S`` the strict upper triangle of ``VᵀV``: a handful of products of
    matrices, no loop over reflections, and no division by ``tau`` or by ``1 - tau ‖v‖²``.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.orth import householder_product
    >>> Q = householder_product(np.random.default_rng(0).standard_normal((6, 3)))
    >>> np.allclose(Q.T @ Q, np.eye(3))
    True
    """
    V, dtype = _matrices(V, "V")
    *batch, m, k = V.shape
    q = np.empty((*batch, m, min(m, k)), dtype)
    _core.householder_product(_detached(V), _tau(tau), q, check)
    return to_library(q, library_of(V))


def _tau(tau: Array | None) -> Array | None:
    return None if tau is None else _detached(as_array(tau, "tau"))


def householder_product_backward(
    grad: Array, V: Array, tau: Array | None = None, *, check: bool = True
) -> Array | tuple[Array, Array]:
    """Gradients of :func:`householder_product`: ``dV``, or ``(dV, dtau)`` when ``tau`` was given.

    Finite for every finite input, also where ``tau = 1 / ‖v‖²`` and for zero vectors (whose gradient is zero). ``9 m k²``
    flops and a few ``k³``. ``check=False`` lets NaN and infinity in ``grad`` through, as gradient scalers expect.
    """
    V, dtype = _matrices(V, "V")
    library = library_of(V)
    dv = np.empty(tuple(V.shape), dtype)
    dtau = None if tau is None else np.empty(tuple(as_array(tau, "tau").shape), dtype)
    g, _ = _matrices(grad, "grad")
    _core.householder_product_backward(_detached(V), _tau(tau), _detached(g), dv, dtau, check)
    if dtau is None:
        return to_library(dv, library)
    return to_library(dv, library), to_library(dtau, library)


def householder_apply(
    V: Array,
    C: Array,
    tau: Array | None = None,
    *,
    side: str = "left",
    transpose: bool = False,
    out: Array | None = None,
    check: bool = True,
) -> Array:
    """``H C`` with ``H = H_1 ··· H_k``, or ``HᵀC``, ``C H``, ``C Hᵀ``.

    Parameters
    ----------
    V : array (..., m, k)
        As in :func:`householder_product`. Leading axes broadcast to those of ``C``: one set of reflections may act on a
        whole stack.
    C : array (..., m, n), or (..., n, m) with ``side="right"``
        ``out`` may be ``C``.
    tau : array (..., k), optional
        None means unit reflections.

    Notes
    -----
    ``(4 n + 128) m k`` flops: blocks of 128 reflections, each one fused product. A HRA layer is
    ``householder_apply(V, x, side="right")`` before the base weight, for which PEFT forms ``H``.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.orth import householder_apply
    >>> x, V = np.random.default_rng(0).standard_normal((5, 8)), np.eye(8)[:, :1]
    >>> np.allclose(householder_apply(V, x, side="right"), x * [-1, 1, 1, 1, 1, 1, 1, 1])
    True
    """
    C, dtype = _matrices(C, "C")
    V, _ = _matrices(V, "V")
    library = library_of(C)
    c, shape = _batch(_detached(C), (V, 2))
    result, fresh = output(out, shape, dtype, library)
    _core.householder_apply(_detached(V), _tau(tau), c, _left(side), bool(transpose), _detached(result), check)
    return _finish(result, fresh, library)


def householder_apply_backward(
    grad: Array,
    V: Array,
    C: Array,
    tau: Array | None = None,
    *,
    side: str = "left",
    transpose: bool = False,
    check: bool = True,
) -> tuple[Array, ...]:
    """Gradients of :func:`householder_apply`: ``(dV, dC)``, or ``(dV, dC, dtau)`` when ``tau`` was given.

    ``grad`` has the shape of ``C``, which must have all leading axes; gradients of ``V`` and ``tau`` are summed over axes
    along which they were broadcast. About ``12 m n k`` flops. ``check=False`` lets NaN and infinity through.
    """
    C, dtype = _matrices(C, "C")
    V, _ = _matrices(V, "V")
    g, _ = _matrices(grad, "grad")
    library = library_of(C)
    _, shape = _batch(C, (V, 2))
    if shape != tuple(C.shape):
        raise ValueError(f"C must have all leading axes of V for gradients, got shapes {tuple(C.shape)} and {tuple(V.shape)}")
    dv, dc = np.empty(tuple(V.shape), dtype), np.empty(shape, dtype)
    dtau = None if tau is None else np.empty(tuple(as_array(tau, "tau").shape), dtype)
    _core.householder_apply_backward(
        _detached(V), _tau(tau), _detached(C), _detached(g), _left(side), bool(transpose), dv, dtau, dc, check
    )
    out = [dv, dc] if dtau is None else [dv, dc, dtau]
    return tuple(to_library(x, library) for x in out)


# -- bases -------------------------------------------------------------------------------------------------------------

_METHODS = {"auto": 0, "cholesky": 1, "householder": 2, "polar": 3}


def orthonormalize(
    A: Array, *, method: str = "auto", out: Array | None = None, rank_deficient: str = "complete"
) -> Array:
    """An orthonormal basis of the columns of ``A``, of the same shape.

    Parameters
    ----------
    A : array (..., m, k), k <= m
    method : {"auto", "cholesky", "householder", "polar"}
        ``"cholesky"``: shifted Cholesky QR on columns of unit length, repeated until the measured loss of orthogonality is
        at working precision; LinAlgError where it cannot separate the columns. ``"householder"``: Householder QR.
        ``"auto"``: the first, then the second. ``"polar"``: the nearest orthonormal matrix ``U Vᵀ`` of ``A = U Σ Vᵀ`` (what
        Muon approximates), to working precision, by the dynamically weighted Halley iteration.
    out : array, optional
        Exact shape and dtype, contiguous rows; may be ``A``.
    rank_deficient : {"complete", "raise"}
        What becomes of a column that depends on those before it (what it adds is within ``m eps`` of its own length): an
        orthonormal completion, or LinAlgError.

    Returns
    -------
    array (..., m, k) with ``max|QᵀQ - I| <= 10 eps √k``.

    Notes
    -----
    ``3 m k²`` flops for a well-conditioned ``A``, ``4 m k²`` by Householder, ``6 m k² + 40 k³`` for the polar factor. The QR
    factor's signs are those of a positive diagonal with ``"cholesky"`` and LAPACK's with ``"householder"``. Sources:
    Fukaya et al., SIAM J. Sci. Comput. 42 (2020); Nakatsukasa, Bai and Gygi, SIAM J. Matrix Anal. Appl. 31 (2010).

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.orth import orthonormalize
    >>> A = np.random.default_rng(0).standard_normal((50, 5))
    >>> U, _, Vt = np.linalg.svd(A, full_matrices=False)
    >>> np.allclose(orthonormalize(A, method="polar"), U @ Vt)
    True
    """
    A, dtype = _matrices(A, "A")
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, _METHODS))}, got {method!r}")
    if rank_deficient not in ("complete", "raise"):
        raise ValueError(f"rank_deficient must be 'complete' or 'raise', got {rank_deficient!r}")
    library = library_of(A)
    result, fresh = output(out, tuple(A.shape), dtype, library)
    _core.orthonormalize(_detached(A), _detached(result), _METHODS[method], rank_deficient == "complete")
    return _finish(result, fresh, library)


def random_orthogonal(
    n: int,
    k: int | None = None,
    *,
    batch: tuple[int, ...] = (),
    rng: int | np.random.Generator | None = None,
    dtype: Any = np.float64,
) -> np.ndarray[Any, Any]:
    """Haar-distributed orthonormal columns, ``(*batch, n, k)`` (``k = n`` by default).

    QR of counter-based normals with the diagonal of ``R`` made positive; without that the distribution is not Haar's
    (Mezzadri, Notices AMS 54, 2007). The same numbers for any number of threads. ``2 k² (n - k/3) + 4 n k²`` flops a matrix.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.orth import random_orthogonal
    >>> U = random_orthogonal(10, 4, batch=(3,), rng=0)
    >>> U.shape, np.allclose(np.swapaxes(U, 1, 2) @ U, np.eye(4))
    ((3, 10, 4), True)
    """
    k = n if k is None else k
    for value, name in ((n, "n"), (k, "k")):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    if k > n:
        raise ValueError(f"k must be at most n = {n}, got {k}")
    dtype = np.dtype(dtype)
    if dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise TypeError(f"dtype must be float32 or float64, got {dtype}")
    out = np.empty((*batch, int(n), int(k)), dtype)
    _core.random_orthogonal(rng_key(rng), out)
    return out


def complement(U: Array, *, check: bool = True) -> Array:
    """An orthonormal basis ``(..., n, n - k)`` of everything orthogonal to the columns of ``U (..., n, k)``.

    The last columns of the Householder ``Q`` of ``U``; ``4 n k (n - k)`` flops. ``check`` makes sure that ``U`` is orthonormal:
    with dependent columns the complement would be larger than ``n - k``.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.orth import complement, random_orthogonal
    >>> U = random_orthogonal(6, 2, rng=0)
    >>> W = complement(U)
    >>> W.shape, bool(np.abs(U.T @ W).max() < 1e-14)
    ((6, 4), True)
    """
    U, dtype = _matrices(U, "U")
    if check:
        _check_basis(U, "U")
    *batch, n, k = U.shape
    if k > n:
        raise ValueError(f"U has {k} columns of {n} entries: so many cannot be orthonormal")
    q, _ = householder_qr(_numpy(U))
    out = np.zeros((*batch, n, n - k), dtype)
    out[..., np.arange(k, n), np.arange(n - k)] = 1
    q.apply(out, out=out, check=False)
    return to_library(out, library_of(U))


def _tolerance(tol: float | None, dtype: np.dtype[Any]) -> float:
    if tol is None:
        return float(np.finfo(dtype).eps) ** (2 / 3)
    if not 0 <= tol < 1:
        raise ValueError(f"tol must be in [0, 1), got {tol}")
    return float(tol)


def _two_bases(U: Array, W: Array, check: bool) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.dtype[Any], str]:
    U, dtype = _matrices(U, "U")
    W, other = _matrices(W, "W")
    if other != dtype:
        raise TypeError(f"W must be {dtype} as U is, got {other}")
    if check:
        _check_basis(U, "U")
        _check_basis(W, "W")
    return _numpy(U), _numpy(W), dtype, library_of(U)


def _residual(U: np.ndarray[Any, Any], W: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """W minus its part in the span of U, projected twice."""
    if U.shape[-2] != W.shape[-2]:
        raise ValueError(f"U and W must live in one space, got {U.shape[-2]} and {W.shape[-2]} rows")
    rest = project_out(W, U, check=False)
    return np.asarray(project_out(rest, U, out=rest, check=False))


def span_sum(U: Array, W: Array, *, tol: float | None = None, check: bool = True) -> Array:
    """An orthonormal basis of the sum of the spans of ``U (..., n, k)`` and ``W (..., n, l)``.

    The columns of ``U`` come first, unchanged. A direction of ``W`` counts as new when the sine of its angle to the span of
    ``U`` exceeds ``tol`` (``eps^(2/3)`` by default). Matrices of a stack must give one dimension, else ValueError.

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
    x, s, _ = np.linalg.svd(r)
    new = _one_rank(np.count_nonzero(s > tol, axis=-1))
    extra = _product(q.to_array(), np.ascontiguousarray(x[..., :, :new]))
    extra = _residual(u, extra)
    orthonormalize(extra, out=extra)
    u = np.broadcast_to(u, (*extra.shape[:-2], *u.shape[-2:]))
    return to_library(np.concatenate([u, extra], axis=-1), library)


def span_intersection(U: Array, W: Array, *, tol: float | None = None, check: bool = True) -> Array:
    """An orthonormal basis of what the spans of ``U (..., n, k)`` and ``W (..., n, l)`` have in common.

    Directions of ``W`` whose angle to the span of ``U`` has a sine of at most ``tol`` (``eps^(2/3)`` by default), from the
    sines themselves: cosines cannot tell angles below ``√eps`` from zero. Matrices of a stack must give one dimension.

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
    _, s, vt = np.linalg.svd(r)
    inside = np.count_nonzero(s <= tol, axis=-1) + (w.shape[-1] - s.shape[-1])
    count = _one_rank(inside)
    basis = _product(np.ascontiguousarray(w), np.swapaxes(vt[..., vt.shape[-2] - count :, :], -1, -2).copy())
    return to_library(np.asarray(orthonormalize(basis, out=basis)), library)


def contains(U: Array, W: Array, *, tol: float | None = None, check: bool = True) -> np.ndarray[Any, Any]:
    """Whether the span of ``U (..., n, k)`` contains that of ``W (..., n, l)``: one bool for each matrix of the stack.

    True when the largest angle of ``W`` to the span of ``U`` has a sine of at most ``tol`` (``eps^(2/3)`` by default). ``W``
    need not be orthonormal; its columns are taken at unit length.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.orth import contains
    >>> bool(contains(np.eye(4)[:, :3], np.eye(4)[:, 1:3])), bool(contains(np.eye(4)[:, :1], np.eye(4)[:, 1:3]))
    (True, False)
    """
    U, dtype = _matrices(U, "U")
    W, other = _matrices(W, "W")
    if other != dtype:
        raise TypeError(f"W must be {dtype} as U is, got {other}")
    if check:
        _check_basis(U, "U")
    tol = _tolerance(tol, dtype)
    w = _span(_detached(W), max(W.shape[-2:]) * float(np.finfo(dtype).eps))
    rest = _residual(_numpy(U), w)
    if rest.shape[-1] == 0:
        return np.ones(rest.shape[:-2], bool)
    return np.asarray(np.linalg.norm(rest, ord=2, axis=(-2, -1)) <= tol)


def compose(U: Array, W: Array, shared: int, *, tol: float | None = None) -> Array:
    """Composition of two spaces over coordinates that they share.

    ``U (..., s + p, k)`` spans a space of vectors ``(x, y)`` and ``W (..., p + q, l)`` one of vectors ``(y, z)``, with ``y`` the
    ``p = shared`` common coordinates: the last of ``U``, the first of ``W``. The composition is the space of all ``(x, z)``
    for which some ``y`` has ``(x, y)`` in the first and ``(y, z)`` in the second: relations composed, and linear systems
    connected at their ports.

    Returns
    -------
    array (..., s + q, d)
        An orthonormal basis; ``d`` is what the two spaces give. Matrices of a stack must give one ``d``.

    Notes
    -----
    The null space of ``[U_y, -W_y]`` by an SVD of a factor of at most ``k + l`` rows, then the span of the matching parts;
    singular values up to ``tol`` (``eps^(2/3)`` by default) count as zero. ``U`` and ``W`` may be any bases.

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
    U, dtype = _matrices(U, "U")
    W, other = _matrices(W, "W")
    if other != dtype:
        raise TypeError(f"W must be {dtype} as U is, got {other}")
    library, tol, eps = library_of(U), _tolerance(tol, dtype), float(np.finfo(dtype).eps)
    if isinstance(shared, bool) or not isinstance(shared, (int, np.integer)):
        raise TypeError(f"shared must be an int, got {type(shared).__name__}")
    if not 0 <= shared <= min(U.shape[-2], W.shape[-2]):
        raise ValueError(f"shared must be from 0 to {min(U.shape[-2], W.shape[-2])}, got {shared}")
    # Orthonormal bases first: the tolerance then means an angle.
    u = _span(_detached(U), max(U.shape[-2:]) * eps)
    w = _span(_detached(W), max(W.shape[-2:]) * eps)
    s, k = u.shape[-2] - shared, u.shape[-1]
    batch = np.broadcast_shapes(u.shape[:-2], w.shape[:-2])
    u, w = np.broadcast_to(u, (*batch, *u.shape[-2:])), np.broadcast_to(w, (*batch, *w.shape[-2:]))
    joint = np.concatenate([u[..., s:, :], -w[..., :shared, :]], axis=-1)
    if shared > joint.shape[-1]:
        _, joint = householder_qr(joint)
    _, values, vt = np.linalg.svd(joint)
    free = _one_rank(joint.shape[-1] - np.count_nonzero(values > tol, axis=-1)) if values.size else joint.shape[-1]
    null = np.swapaxes(vt[..., vt.shape[-2] - free :, :], -1, -2).copy()
    ends = np.concatenate(
        [_product(u[..., :s, :], null[..., :k, :]), _product(w[..., shared:, :], null[..., k:, :])], axis=-2
    )
    # Not relative: a pair whose ends vanish is a loop over the shared coordinates, and spans nothing.
    q, r = householder_qr(ends)
    x, values, _ = np.linalg.svd(r)
    rank = _one_rank(np.count_nonzero(values > tol, axis=-1))
    return to_library(_product(q.to_array(), np.ascontiguousarray(x[..., :, :rank])), library)


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
        ``Hᵀ x``: the inverse of the orthogonal transform, and its gradient. Not the same as ``H`` where ``n`` has a factor 12
        or 20: those base matrices are not symmetric.

    Notes
    -----
    ``H_n = H_m ⊗ H_(2^p)`` with Sylvester's matrix for the power of two, Paley's first construction for 12 and 20 and his
    second one for 28 (Paley, J. Math. Phys. 12, 1933); 40 is ``20 · 2``. :func:`hadamard_matrix` gives it.
    ``n (log2(n/m) + m)`` operations a vector; one read and one write.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.orth import hadamard, hadamard_matrix
    >>> x = np.arange(24.0)
    >>> np.allclose(hadamard(x), hadamard_matrix(24) @ x / np.sqrt(24)), np.allclose(hadamard(hadamard(x), transpose=True), x)
    (True, True)
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
    factor = 1.0 / math.sqrt(n) if scale is None else float(scale)
    result, fresh = output(out, shape, dtype, library)
    source, target = _detached(x), _detached(result)
    if len(shape) == 1:
        source, target = source[None], target[None]
    _core.hadamard(source, target, factor, bool(transpose), check)
    return _finish(result, fresh, library)


def hadamard_matrix(n: int, dtype: Any = np.float64) -> np.ndarray[Any, Any]:
    """The matrix of :func:`hadamard` with ``scale=1``: entries ±1, ``H Hᵀ = n I``. It needs ``n²`` entries."""
    out = np.eye(n, dtype=dtype)
    return np.asarray(hadamard(out, out, scale=1.0, transpose=True))


# -- 4-bit bases and projected gradients --------------------------------------------------------------------------------


class Int4Basis:
    """A matrix ``(n, k)`` in packed 4-bit codes; made by :func:`quantize_int4`.

    Products unpack a tile at a time and never hold the dense matrix. Take it wherever a basis is asked for:
    :func:`apply_core`, :func:`project` and :func:`project_out` (through the Gram core of what is stored).

    Attributes
    ----------
    codes : uint8 array
        Two entries a byte in row-major order, the first in the low half.
    scale, zero : array (groups,)
        The value of code q is ``scale * (q - zero)``.
    shape : (n, k)
    group : int
        Consecutive entries with one scale.
    """

    def __init__(
        self,
        codes: np.ndarray[Any, Any],
        scale: np.ndarray[Any, Any],
        zero: np.ndarray[Any, Any],
        shape: tuple[int, int],
        group: int,
        library: str = "numpy",
    ) -> None:
        self.codes, self.scale, self.zero, self.shape, self.group = codes, scale, zero, shape, group
        self._library = library

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the scales, and of results."""
        return self.scale.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that codes, scales and zeros take."""
        return int(self.codes.nbytes + self.scale.nbytes + self.zero.nbytes)

    def _parts(self) -> tuple[Any, ...]:
        return self.codes, self.scale, self.zero, self.shape[0], self.shape[1], self.group

    def to_array(self) -> Array:
        """The dense matrix ``(n, k)``."""
        out = np.empty(self.shape, self.dtype)
        _core.unpack_int4(self._parts(), out)
        return to_library(out, self._library)

    def apply(self, X: Array, *, side: str = "left", transpose: bool = False, out: Array | None = None) -> Array:
        """``U X``, ``UᵀX`` (``transpose``), ``X U`` or ``X Uᵀ`` (``side="right"``) for ``X`` of two or more axes."""
        X, dtype = _matrices(X, "X")
        left = _left(side)
        rows, cols = self.shape[::-1] if transpose else self.shape
        shape = tuple(X.shape)
        shape = (*shape[:-2], rows, shape[-1]) if left else (*shape[:-1], cols)
        library = library_of(X)
        result, fresh = output(out, shape, dtype, library)
        _core.int4_product(self._parts(), _detached(X), left, bool(transpose), _detached(result))
        return _finish(result, fresh, library)

    def __repr__(self) -> str:
        return f"Int4Basis(shape={self.shape}, group={self.group}, dtype={self.dtype}, {self.nbytes} bytes)"


def quantize_int4(U: Array, group: int = 256) -> Int4Basis:
    """Pack a matrix ``(n, k)`` into 4-bit codes with one scale and zero point for every ``group`` entries.

    Q-GaLore's formula, in row-major order: ``scale = max(max - min, 1e-5) / 15``, ``zero = clamp(-round(min / scale), 0, 15)``,
    ``q = clamp(round(x / scale) + zero, 0, 15)`` (Zhang et al., arXiv:2407.08296), bit for bit; that code keeps one code a
    byte, this one two. The last group may be shorter. NaN and infinity raise ValueError.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.orth import quantize_int4, random_orthogonal
    >>> U = random_orthogonal(256, 32, rng=0, dtype=np.float32)
    >>> B = quantize_int4(U)
    >>> B.nbytes < U.nbytes / 7, bool(np.linalg.norm(B.to_array() - U) < 0.15 * np.linalg.norm(U))
    (True, True)
    """
    U, dtype = _matrices(U, "U")
    if len(U.shape) != 2:
        raise ValueError(f"U must have 2 dimensions, got shape {tuple(U.shape)}")
    if isinstance(group, bool) or not isinstance(group, (int, np.integer)):
        raise TypeError(f"group must be an int, got {type(group).__name__}")
    if group < 1:
        raise ValueError(f"group must be at least 1, got {group}")
    n, k = (int(x) for x in U.shape)
    groups = -(-n * k // group)
    codes = np.empty((n * k + 1) // 2, np.uint8)
    scale, zero = np.empty(groups, dtype), np.empty(groups, dtype)
    _core.quantize_int4(_detached(U), int(group), codes, scale, zero)
    return Int4Basis(codes, scale, zero, (n, k), int(group), library_of(U))


class GradientProjector:
    """Low-rank projection of a gradient, as GaLore and Q-GaLore use it.

    ``down`` gives the small gradient that the optimiser works on, ``up`` takes its update back. The basis is that of the
    leading singular vectors of a recent gradient; :meth:`refresh` finds the next one from the last by subspace iteration,
    which costs two products with the gradient instead of a full SVD.

    Parameters
    ----------
    rank : int
    side : {"auto", "left", "right"}
        Which singular vectors make the basis ``P``. Right: ``down(G) = G P``, ``(m, r)``; left: ``PᵀG``, ``(r, n)``. ``"auto"`` is
        right where ``m >= n``, as in GaLore.
    refresh : int, default 200
        ``down`` refreshes the basis at its first call and every so many calls after it. 0: only when told.
    bits : {None, 4}
        4 keeps the basis as :class:`Int4Basis`.
    adapt : bool, default False
        Q-GaLore's lazy rule: when the mean of the last ``history`` values of ``|cos|`` between the first singular vectors
        of consecutive bases is at least ``threshold``, the interval doubles; when it is below half of that, it halves, down
        to ``refresh``. Signs of singular vectors are arbitrary, so magnitudes are compared; the history starts anew after
        each change, so that one calm stretch doubles the interval once.
    scale : float, default 1.0
        ``up`` multiplies by it (GaLore's alpha, 0.25 there).
    iterations : int, default 1
        Subspace iterations of a warm refresh.
    group : int, default 256
        Of the 4-bit codes.
    rng : optional
        For the first basis.

    Attributes
    ----------
    basis : array (n, r) or (m, r), Int4Basis, or None before the first refresh
    interval : int
        Calls of ``down`` between two refreshes, as it is now.
    similarity : list of float
        The last values of ``|cos|``.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.orth import GradientProjector
    >>> rng = np.random.default_rng(0)
    >>> G = rng.standard_normal((64, 4)) @ rng.standard_normal((4, 48))
    >>> p = GradientProjector(4, rng=0)
    >>> R = p.down(G)
    >>> R.shape, np.allclose(p.up(R), G)
    ((64, 4), True)
    """

    def __init__(
        self,
        rank: int,
        *,
        side: str = "auto",
        refresh: int = 200,
        bits: int | None = None,
        adapt: bool = False,
        threshold: float = 0.4,
        history: int = 5,
        scale: float = 1.0,
        iterations: int = 1,
        group: int = 256,
        rng: int | np.random.Generator | None = None,
    ) -> None:
        for value, name, least in (
            (rank, "rank", 1),
            (refresh, "refresh", 0),
            (history, "history", 1),
            (iterations, "iterations", 1),
            (group, "group", 1),
        ):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if side not in ("auto", "left", "right"):
            raise ValueError(f"side must be 'auto', 'left' or 'right', got {side!r}")
        if bits not in (None, 4):
            raise ValueError(f"bits must be None or 4, got {bits!r}")
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold must be in (0, 1], got {threshold}")
        self.rank, self.side, self.bits, self.adapt = int(rank), side, bits, bool(adapt)
        self.threshold, self.history, self.scale = float(threshold), int(history), float(scale)
        self.iterations, self.group = int(iterations), int(group)
        self.base_interval = self.interval = int(refresh)
        self.basis: Any = None
        self.similarity: deque[float] = deque(maxlen=self.history)
        self.refreshes = 0
        self._key = rng_key(rng)
        self._since = 0
        self._first: Any = None
        self._shape: tuple[int, ...] | None = None

    def _right(self, G: Array) -> bool:
        m, n = G.shape
        return m >= n if self.side == "auto" else self.side == "right"

    def _gradient(self, G: Array) -> Array:
        G, _ = _matrices(G, "G")
        if len(G.shape) != 2:
            raise ValueError(f"G must have 2 dimensions, got shape {tuple(G.shape)}")
        if self._shape is not None and tuple(G.shape) != self._shape:
            raise ValueError(f"G must have shape {self._shape} as before, got {tuple(G.shape)}")
        if self.rank > min(G.shape):
            raise ValueError(f"rank must be at most {min(G.shape)} for a gradient of shape {tuple(G.shape)}, got {self.rank}")
        return _detached(G)

    def refresh(self, G: Array) -> GradientProjector:
        """Find the basis of the gradient ``G (m, n)``, from the last basis where there is one.

        Two products of ``2 m n r`` flops for each iteration, and ``O((m + n) r²)``. With ``adapt`` it also updates the interval.
        """
        G = self._gradient(G)
        a = _numpy(G)
        a = a if self._right(G) else a.T
        if self.basis is None:
            found = truncated_svd(a, self.rank, rng=np.random.default_rng(self._key))
        else:
            last = self.basis.to_array() if isinstance(self.basis, Int4Basis) else self.basis
            found = truncated_svd(
                a, self.rank, oversample=0, power_iterations=self.iterations - 1, initial=_numpy(last).T, rng=0
            )
        vh = found.Vh
        first = vh[0].copy()
        if self._first is not None:
            self.similarity.append(abs(float(first @ self._first)))
            self._adapt()
        self._first = first
        basis = np.ascontiguousarray(vh.T)
        library = library_of(G)
        self.basis = quantize_int4(basis, self.group) if self.bits == 4 else to_library(basis, library)
        if self.bits == 4:
            self.basis._library = library
        self._shape = tuple(G.shape)
        self._since = 0
        self.refreshes += 1
        return self

    def _adapt(self) -> None:
        if not self.adapt or len(self.similarity) < self.history:
            return
        mean = sum(self.similarity) / len(self.similarity)
        if mean >= self.threshold:
            self.interval *= 2
            self.similarity.clear()
        elif mean < self.threshold / 2 and self.interval > self.base_interval:
            self.interval = max(self.base_interval, self.interval // 2)
            self.similarity.clear()

    def down(self, G: Array, *, out: Array | None = None) -> Array:
        """The small gradient: ``G P (m, r)`` or ``PᵀG (r, n)``. Refreshes the basis when its time has come."""
        g = self._gradient(G)
        if self.basis is None or (self.interval > 0 and self._since >= self.interval):
            self.refresh(G)
        self._since += 1
        right = self._right(g)
        m, n = g.shape
        return self._multiply(g, right, False, (m, self.rank) if right else (self.rank, n), 1.0, out)

    def up(self, R: Array, *, out: Array | None = None) -> Array:
        """The update at full size: ``scale · R Pᵀ`` or ``scale · P R``, ``(m, n)``."""
        if self.basis is None or self._shape is None:
            raise ValueError("there is no basis yet: call down or refresh first")
        R, _ = _matrices(R, "R")
        m, n = self._shape
        right = m >= n if self.side == "auto" else self.side == "right"
        want = (m, self.rank) if right else (self.rank, n)
        if tuple(R.shape) != want:
            raise ValueError(f"R must have shape {want}, got {tuple(R.shape)}")
        return self._multiply(_detached(R), right, True, (m, n), self.scale, out)

    def _multiply(
        self, x: Array, right: bool, back: bool, shape: tuple[int, ...], scale: float, out: Array | None
    ) -> Array:
        library = library_of(x)
        dtype = check_float(x, "R" if back else "G")
        result, fresh = output(out, shape, dtype, library)
        target = _detached(result)
        transpose = back if right else not back
        if isinstance(self.basis, Int4Basis):
            _core.int4_product(self.basis._parts(), x, not right, transpose, target)
            if scale != 1.0:
                target *= scale
        else:
            p = _numpy(self.basis)
            p = p.T if transpose else p
            _core.product(*((x, p) if right else (p, x)), scale, target)
        return _finish(result, fresh, library)

    def __repr__(self) -> str:
        kind = "no basis yet" if self.basis is None else f"gradients {self._shape}, refreshed {self.refreshes} times"
        return (
            f"GradientProjector(rank={self.rank}, side={self.side!r}, interval={self.interval}, bits={self.bits}: {kind})"
        )
