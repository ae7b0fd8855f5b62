"""QR and reflections."""

from __future__ import annotations

from typing import Any

import numpy as np

from subspan._lib.arrays import Array, library_of
from subspan._lib.call import call_of
from subspan._lib.device import dtype_name, numpy
from subspan._lib.files import Fixed, checked_state, sealed_state
from subspan._lib.numbers import truth

__all__ = [
    "HouseholderQ",
    "householder_apply",
    "householder_apply_backward",
    "householder_product",
    "householder_product_backward",
    "householder_qr",
]

_FORMAT = "subspan.HouseholderQ/1"


class HouseholderQ(Fixed):
    """The orthogonal factor of :func:`householder_qr`, kept as reflections: ``Q = I - V T Vᵀ``, m × m, never formed.

    Attributes
    ----------
    V : array (..., m, k)
        Unit lower trapezoidal.
    tau : array (..., k)
        LAPACK's factors: reflection j is ``I - tau_j v_j v_jᵀ``.
    shape : (..., m, m)
    """

    _OPTIONS = ("V", "tau")

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
        return np.dtype(dtype_name(self.V))

    def apply(
        self, C: Array, *, side: str = "left", transpose: bool = False, out: Array | None = None, check: bool = True
    ) -> Array:
        """``Q C``, ``QᵀC`` (``transpose``), ``C Q`` or ``C Qᵀ`` (``side="right"``), without forming ``Q``.

        ``C`` is ``(..., m, n)`` or ``(..., n, m)``, or a vector ``(m,)``; ``out`` may be ``C``. ``4 m n k - 2 n k²``
        flops.
        """
        call = call_of(C=C, V=self.V, out=out)
        transposed = truth(transpose, "transpose") != self.transposed
        return call.give(
            call.kernels.factored_apply(call.context, self.V, self._T, C, side, transposed, out, check), out
        )

    def to_array(self, *, full: bool = False) -> Array:
        """The first k columns of ``Q`` as an array ``(..., m, k)``, or all m of them with ``full``.

        Of ``Q.T`` the first k rows, ``(..., k, m)``.
        """
        if self.transposed:
            whole = self.T.to_array(full=full)
            return whole.mT if library_of(whole) == "torch" else whole.swapaxes(-1, -2)
        call = call_of(V=self.V)
        return call.give(call.kernels.factored_array(call.context, self.V, self._T, full))

    def __getstate__(self) -> dict[str, Any]:
        state = {"format": _FORMAT, "V": self.V, "tau": self.tau, "_T": self._T, "transposed": self.transposed}
        return sealed_state(state)

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = checked_state(state, "HouseholderQ", _FORMAT, {"V", "tau", "_T", "transposed"})
        self.__dict__.clear()
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
        Any strides, any rank; the error is small column by column, also for graded matrices. NaN and infinity raise
        ValueError. On a CUDA device NaN propagates; matrices beyond a block's shared memory are factored by cuSOLVER.
    pivoting : bool, default False
        Column pivoting by LAPACK's ``geqp3`` (on the CPU), the column of largest remaining norm first: the result is
        ``(Q, R, order)`` with ``A[:, order] = Q R``, as of ``scipy.linalg.qr(A, pivoting=True)``, and the diagonal of
        ``R``, decreasing in magnitude, reveals the rank.

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
    call = call_of(A=A)
    *factors, R = call.give(found := call.kernels.householder_qr(call.context, A, pivoting))[:4]
    Q = HouseholderQ(*factors)
    return (Q, R) if len(found) == 4 else (Q, R, found[4])


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
    call = call_of(V=V, tau=tau)
    return call.give(call.kernels.householder_product(call.context, V, tau, packed, check))


def householder_product_backward(
    grad: Array, V: Array, tau: Array | None = None, *, check: bool = True
) -> Array | tuple[Array, Array]:
    """Gradients of :func:`householder_product`: ``dV``, or ``(dV, dtau)`` when ``tau`` was given.

    Finite for every finite input whose gradient the dtype can hold, also where ``tau = 1 / ‖v‖²`` and for zero vectors
    (whose gradient is zero). ``9 m k²`` flops and a few ``k³``; work memory is a copy of ``V`` and some four k × k
    matrices. ``check=False`` lets NaN and infinity in ``grad`` through, as gradient scalers expect; on a CUDA device
    they always propagate. For a vector ``V (m,)``, ``dV`` is a vector, too.
    """
    call = call_of(V=V, grad=grad, tau=tau)
    return call.give(call.kernels.householder_product_backward(call.context, grad, V, tau, check))


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
    call = call_of(C=C, V=V, tau=tau, out=out)
    args = (V, C, tau, side, transpose, packed, out, check)
    return call.give(call.kernels.householder_apply(call.context, *args), out)


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

    ``grad`` has the shape of ``C``. ``C`` is not broadcast: it must have all leading axes of ``V``. Gradients of ``V``
    and ``tau`` are summed over axes along which they were broadcast. About ``12 m n k`` flops. ``check=False`` lets NaN
    and infinity through; on a CUDA device they always propagate. Gradients of vectors ``V`` and ``C`` are vectors.
    """
    call = call_of(C=C, grad=grad, V=V, tau=tau)
    args = (grad, V, C, tau, side, transpose, check)
    found: tuple[Array, ...] = call.give(call.kernels.householder_apply_backward(call.context, *args))
    return found
