"""QR and reflections."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from subspan import _core
from subspan._lib.arguments import (
    broadcast,
    column,
    convolution_hint,
    detached,
    finish,
    is_left,
    is_vector,
    matrices,
    numpy,
    of_vector,
    same_dtype,
)
from subspan._lib.arrays import Array, as_array, check_float, library_of, output, to_library, truth
from subspan._lib.device import Place, check_dtype, dtype_name, on_device
from subspan._lib.files import checked_state, sealed_state
from subspan.orth import device

_FORMAT = "subspan.HouseholderQ/1"
_BLOCK = 128  # reflections of a block in a factored Q, as in the C++ header


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
        if tuple(tau.shape) != (*tuple(V.shape)[:-2], V.shape[-1]):
            raise ValueError(
                f"tau must have one entry for each column of V {tuple(V.shape)}, got shape {tuple(tau.shape)}"
            )
        self.V, self.tau, self._T = V, tau, T
        self.transposed = False

    @property
    def T(self) -> HouseholderQ:  # noqa: N802
        """``Qᵀ``, of the same reflections: ``Q.T @ C`` is ``Q.apply(C, transpose=True)``. No copy."""
        other = HouseholderQ(self.V, self.tau, self._T)
        other.transposed = not self.transposed
        return other

    @property
    def mT(self) -> HouseholderQ:  # noqa: N802
        """As :attr:`T`: of a stack, too, each matrix is transposed."""
        return self.T

    __array_ufunc__ = None  # C @ Q is this class's

    def __matmul__(self, C: Array) -> Array:
        return self.apply(C)

    def __rmatmul__(self, C: Array) -> Array:
        return self.apply(C, side="right")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        if copy is False:
            raise ValueError("Q is kept as reflections: an array of it is always a copy")
        return np.asarray(numpy(self.to_array(full=True)), dtype=dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(..., m, m)``."""
        s = tuple(self.V.shape)
        return (*s[:-1], s[-2])

    @property
    def dtype(self) -> np.dtype[Any]:
        """float32 or float64."""
        return np.dtype(check_dtype(self.V, "V")) if on_device(self.V) else check_float(self.V, "V")

    def apply(
        self, C: Array, *, side: str = "left", transpose: bool = False, out: Array | None = None, check: bool = True
    ) -> Array:
        """``Q C``, ``QᵀC`` (``transpose``), ``C Q`` or ``C Qᵀ`` (``side="right"``), without forming ``Q``.

        ``C`` is ``(..., m, n)`` or ``(..., n, m)``, or a vector ``(m,)``; ``out`` may be ``C``. ``4 m n k - 2 n k²``
        flops.
        """
        transpose = truth(transpose, "transpose") != self.transposed
        if is_vector(C):
            return of_vector(lambda c, to: self._apply(c, side, transpose, to, check), C, side, out)
        return self._apply(C, side, transpose, out, check)

    def _apply(self, C: Array, side: str, transpose: bool, out: Array | None, check: bool) -> Array:
        if on_device(C, self.V):
            return device.factored_apply(self.V, self._T, C, side, bool(transpose), out)
        C, dtype = matrices(C, "C")
        left = is_left(side)
        library = library_of(C)
        c, shape = broadcast(detached(C), (self.V, 2))
        if check_float(self.V, "Q") != dtype:
            raise TypeError(f"C must be {check_float(self.V, 'Q')} as Q is, got {dtype}")
        m = int(self.V.shape[-2])
        if int(c.shape[-2 if left else -1]) != m:
            where = "rows" if left else "columns"
            hint = convolution_hint(tuple(C.shape), "C")
            raise ValueError(f"C must have {m} {where} as Q has, got shape {tuple(C.shape)}{hint}")
        result, fresh = output(out, shape, dtype, library)
        _core.factored_apply(
            detached(self.V), detached(self._T), c, left, transpose, detached(result), truth(check, "check")
        )
        return finish(result, fresh, library, C)

    def to_array(self, *, full: bool = False) -> Array:
        """The first k columns of ``Q`` as an array ``(..., m, k)``, or all m of them with ``full``.

        Of ``Q.T`` the first k rows, ``(..., k, m)``.
        """
        if self.transposed:
            whole = self.T.to_array(full=full)
            return whole.mT if library_of(whole) == "torch" else whole.swapaxes(-1, -2)
        if on_device(self.V):
            return device.factored_array(self.V, self._T, full)
        *batch, m, k = self.V.shape
        q = np.empty((*batch, m, m if full else k), self.dtype)
        _core.factored_array(detached(self.V), detached(self._T), q)
        return to_library(q, library_of(self.V))

    def __getstate__(self) -> dict[str, Any]:
        state = {"format": _FORMAT, "V": self.V, "tau": self.tau, "_T": self._T, "transposed": self.transposed}
        return sealed_state(state)

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = checked_state(state, "HouseholderQ", _FORMAT, {"V", "tau", "_T", "transposed"})
        self.__init__(state["V"], state["tau"], state["_T"])  # type: ignore[misc]
        self.transposed = truth(state["transposed"], "transposed")

    def __repr__(self) -> str:
        kind = ", transposed" if self.transposed else ""
        return f"HouseholderQ(shape={self.shape}, reflections={self.V.shape[-1]}, dtype={self.dtype}{kind})"


def householder_qr(A: Array, *, pivoting: bool = False) -> tuple[Any, ...]:
    """QR by Householder reflections: ``A = Q R`` with ``Q`` kept as reflections.

    Parameters
    ----------
    A : array (..., m, n)
        Any strides, any rank; graded columns keep their own relative accuracy. NaN and infinity raise ValueError. On a
        CUDA device NaN goes through; matrices that no block's shared memory holds are factored by cuSOLVER.
    pivoting : bool, default False
        Choose the columns in the order of what is left of them, by LAPACK's ``geqp3`` (on the CPU): the result is
        ``(Q, R, order)`` with ``A[:, order] = Q R``, as of ``scipy.linalg.qr(A, pivoting=True)``, and the falling
        diagonal of ``R`` shows the rank.

    Returns
    -------
    Q : HouseholderQ
        Of ``k = min(m, n)`` reflections.
    R : array (..., k, n)
        Upper trapezoidal, with LAPACK's signs: the diagonal may be negative.
    order : array (..., n) of int64, only with ``pivoting``; of NumPy

    Notes
    -----
    ``2 n² (m - n/3)`` flops. Matrices of up to a few vectors' width (32 columns) are factored where they stay in the
    nearest cache; wider ones recursively, with products of matrices (Elmroth and Gustavson, IBM J. Res. Dev. 44,
    2000). LAPACK's six residuals are tested to stay under its threshold of 30.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.orth import householder_qr
    >>> A = np.random.default_rng(0).standard_normal((4, 50, 20))
    >>> Q, R = householder_qr(A)
    >>> np.allclose(Q.to_array() @ R, A), np.allclose(Q.apply(A, transpose=True)[:, :20], R)
    (True, True)
    """
    pivoting = truth(pivoting, "pivoting")
    if on_device(A):
        if pivoting:
            raise TypeError("pivoting is not implemented on CUDA devices")
        *factors, R = device.householder_qr(A)
        return HouseholderQ(*factors), R
    A, dtype = matrices(column(A), "A")
    library = library_of(A)
    *batch, m, n = A.shape
    k = min(m, n)
    V, R = np.empty((*batch, m, k), dtype), np.empty((*batch, k, n), dtype)
    tau, T = np.empty((*batch, k), dtype), np.empty((*batch, k, min(k, _BLOCK)), dtype)
    order = np.empty((*batch, n), np.int64) if pivoting else None
    _core.householder_qr(detached(A), V, R, tau, T, order)
    if not _core.all_finite(R):  # A was looked at
        raise ValueError("R overflows the dtype although A is finite; scale A")
    hand = [to_library(x, library, A) for x in (V, tau, T, R)]
    Q = HouseholderQ(*hand[:3])
    return (Q, hand[3]) if order is None else (Q, hand[3], order)


def householder_product(V: Array, tau: Array | None = None, *, packed: bool = False, check: bool = True) -> Array:
    """The first ``min(m, k)`` columns of ``H_1 ··· H_k``, ``H_j = I - tau_j v_j v_jᵀ``.

    Parameters
    ----------
    V : array (..., m, k)
        Columns are the reflections' vectors, used as they are: nothing is implied of the upper triangle. A vector
        ``(m,)`` is one reflection.
    tau : array (..., k), optional
        None means unit reflections ``I - 2 v vᵀ / vᵀv``, where a zero vector is the identity.
    packed : bool, default False
        ``V`` is LAPACK's packed form, as ``geqrf`` and ``torch.geqrf`` leave it: ones are implied on the diagonal,
        zeros above it, and what is stored there (``R``) is not looked at. Copies ``V``.

    Notes
    -----
    ``3 m k²`` flops through ``T = (I + D S)⁻¹ D`` with ``S`` the strict upper triangle of ``VᵀV``: a handful of
    products of matrices, no loop over reflections, and no division by ``tau`` or by ``1 - tau ‖v‖²``.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.orth import householder_product
    >>> Q = householder_product(np.random.default_rng(0).standard_normal((6, 3)))
    >>> np.allclose(Q.T @ Q, np.eye(3))
    True
    """
    if truth(packed, "packed"):
        V = _unpacked(V, tau)
    if on_device(V, tau):
        return device.householder_product(V, tau)
    V = column(V)
    V, dtype = matrices(V, "V")
    *batch, m, k = V.shape
    q = np.empty((*batch, m, min(m, k)), dtype)
    _core.householder_product(detached(V), _tau(tau), q, truth(check, "check"))
    return to_library(q, library_of(V))


def _unpacked(V: Array, tau: Array | None) -> Array:
    """Unit lower trapezoidal vectors from LAPACK's packed form."""
    if tau is None:
        raise ValueError("packed=True needs tau: LAPACK's reflections are not all of unit length")
    V = column(V)
    if on_device(V):
        place = Place(V=V)
        with place.inside():
            V = V[..., : min(int(s) for s in V.shape[-2:])]
            lower = V.tril(-1) if place.library == "torch" else sys.modules["cupy"].tril(V, -1)
            return lower + place.identity(tuple(int(s) for s in V.shape), dtype_name(V))
    x, dtype = matrices(V, "V")
    a = numpy(x)
    a = a[..., : min(a.shape[-2:])]  # of a wide matrix the columns beyond are R's
    return to_library(np.tril(a, -1) + np.eye(a.shape[-2], a.shape[-1], dtype=dtype), library_of(x), x)


def _tau(tau: Array | None) -> Array | None:
    return None if tau is None else detached(as_array(tau, "tau"))


def householder_product_backward(
    grad: Array, V: Array, tau: Array | None = None, *, check: bool = True
) -> Array | tuple[Array, Array]:
    """Gradients of :func:`householder_product`: ``dV``, or ``(dV, dtau)`` when ``tau`` was given.

    Finite for every finite input whose gradient the dtype can hold, also where ``tau = 1 / ‖v‖²`` and for zero vectors
    (whose gradient is zero). ``9 m k²`` flops and a few ``k³``; work memory is a copy of ``V`` and some four k × k
    matrices. ``check=False`` lets NaN and infinity in ``grad`` through, as gradient scalers expect; on a CUDA device
    they always pass. Of a vector ``V (m,)`` ``dV`` is one, too.
    """
    if is_vector(V):
        found = householder_product_backward(column(grad), column(V), tau, check=check)
        dv, *rest = found if isinstance(found, tuple) else (found,)
        return (dv.reshape(-1), *rest) if rest else dv.reshape(-1)
    if on_device(grad, V, tau):
        there, dtau_there = device.householder_product_backward(grad, V, tau)
        return there if dtau_there is None else (there, dtau_there)
    V, dtype = matrices(V, "V")
    library = library_of(V)
    dv = np.zeros(tuple(V.shape), dtype)
    dtau = None if tau is None else np.zeros(tuple(as_array(tau, "tau").shape), dtype)
    g, other = matrices(grad, "grad")
    same_dtype(dtype, other, "grad", "V")
    _core.householder_product_backward(detached(V), _tau(tau), detached(g), dv, dtau, truth(check, "check"))
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
    packed: bool = False,
    out: Array | None = None,
    check: bool = True,
) -> Array:
    """``H C`` with ``H = H_1 ··· H_k``, or ``HᵀC``, ``C H``, ``C Hᵀ``.

    Parameters
    ----------
    V : array (..., m, k)
        As in :func:`householder_product`. Leading axes broadcast to those of ``C``: one set of reflections may act on
        a whole stack.
    C : array (..., m, n), or (..., n, m) with ``side="right"``, or a vector
        ``out`` may be ``C``.
    tau : array (..., k), optional
        None means unit reflections.
    packed : bool, default False
        ``V`` is LAPACK's packed form, as in :func:`householder_product`; with ``tau`` this is LAPACK's ``ormqr``.

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
    transpose = truth(transpose, "transpose")
    if truth(packed, "packed"):
        V = _unpacked(V, tau)
    if is_vector(C):
        return of_vector(
            lambda c, to: householder_apply(V, c, tau, side=side, transpose=transpose, out=to, check=check),
            C,
            side,
            out,
        )
    V = column(V)
    if on_device(V, C, tau):
        return device.householder_apply(V, C, tau, side, transpose, out)
    C, dtype = matrices(C, "C")
    V, other = matrices(V, "V")
    same_dtype(dtype, other, "V", "C")
    rows = C.shape[-2] if is_left(side) else C.shape[-1]
    if V.shape[-2] != rows:
        hint = convolution_hint(tuple(C.shape), "C")
        raise ValueError(
            f"V must have {rows} rows to act on C {tuple(C.shape)} from the {side}, got {V.shape[-2]}{hint}"
        )
    library = library_of(C)
    c, shape = broadcast(detached(C), (V, 2))
    result, fresh = output(out, shape, dtype, library)
    _core.householder_apply(
        detached(V), _tau(tau), c, is_left(side), transpose, detached(result), truth(check, "check")
    )
    return finish(result, fresh, library, C)


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

    ``grad`` has the shape of ``C``, which must have all leading axes; gradients of ``V`` and ``tau`` are summed over
    axes along which they were broadcast. About ``12 m n k`` flops. ``check=False`` lets NaN and infinity through; on a
    CUDA device they always pass. Of vectors ``V`` and ``C`` the gradients are vectors.
    """
    transpose = truth(transpose, "transpose")
    if is_vector(V):
        dv, *rest = householder_apply_backward(grad, column(V), C, tau, side=side, transpose=transpose, check=check)
        return (dv.reshape(-1), *rest)
    if is_vector(C):
        left = is_left(side)
        c, g = (x[:, None] if left else x[None] for x in (as_array(C, "C"), as_array(grad, "grad")))
        dv, dc, *rest = householder_apply_backward(g, V, c, tau, side=side, transpose=transpose, check=check)
        return (dv, dc.reshape(-1), *rest)
    if on_device(grad, V, C, tau):
        return device.householder_apply_backward(grad, V, C, tau, side, transpose)
    C, dtype = matrices(C, "C")
    V, other = matrices(V, "V")
    same_dtype(dtype, other, "V", "C")
    g, other = matrices(grad, "grad")
    same_dtype(dtype, other, "grad", "C")
    library = library_of(C)
    rows = C.shape[-2] if is_left(side) else C.shape[-1]
    if V.shape[-2] != rows:
        hint = convolution_hint(tuple(C.shape), "C")
        raise ValueError(
            f"V must have {rows} rows to act on C {tuple(C.shape)} from the {side}, got {V.shape[-2]}{hint}"
        )
    _, shape = broadcast(C, (V, 2))
    if shape != tuple(C.shape):
        raise ValueError(
            f"C must have all leading axes of V for gradients, got shapes {tuple(C.shape)} and {tuple(V.shape)}"
        )
    dv, dc = np.zeros(tuple(V.shape), dtype), np.empty(shape, dtype)
    dtau = None if tau is None else np.zeros(tuple(as_array(tau, "tau").shape), dtype)
    _core.householder_apply_backward(
        detached(V), _tau(tau), detached(C), detached(g), is_left(side), transpose, dv, dtau, dc, truth(check, "check")
    )
    out = [dv, dc] if dtau is None else [dv, dc, dtau]
    return tuple(to_library(x, library) for x in out)
