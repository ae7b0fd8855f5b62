"""Matrices of packed 4-bit codes."""

from __future__ import annotations

from typing import Any

import numpy as np

from subspan._lib.arrays import Array, to_library
from subspan._lib.call import call_of
from subspan._lib.device import dtype_name, numpy
from subspan._lib.files import Fixed, checked_state, known_library, sealed_state
from subspan._lib.numbers import whole_number

__all__ = ["Int4Basis", "quantize_int4"]

_FORMAT = "subspan.Int4Basis/2"


class Int4Basis(Fixed):
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

    _OPTIONS = ("codes", "scale", "zero", "shape", "group")

    def __init__(
        self, codes: Any, scale: Any, zero: Any, shape: tuple[int, int], group: int, library: str = "numpy"
    ) -> None:
        if not isinstance(shape, (tuple, list)) or len(shape) != 2:
            raise TypeError(f"shape must be a pair (n, k), got {shape!r}")
        n, k = (whole_number(x, f"shape[{i}]", 0) for i, x in enumerate(shape))
        group = whole_number(group, "group", 1)
        for x, name in ((codes, "codes"), (scale, "scale"), (zero, "zero")):
            if not hasattr(x, "shape") or not hasattr(x, "dtype"):
                raise TypeError(f"{name} must be an array, got {type(x).__name__}")
        call = call_of(codes=codes, scale=scale, zero=zero)
        call.kernels.check_int4(call.context, (codes, scale, zero, n, k, group))
        self.codes, self.scale, self.zero, self.shape, self.group = codes, scale, zero, (n, k), group
        self._library = library
        self._core: tuple[Any, float] | None = None

    def __getstate__(self) -> dict[str, Any]:
        state = {name: getattr(self, name) for name in self._OPTIONS}
        return sealed_state({"format": _FORMAT, **state, "library": self._library})

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(state, dict):  # the first version kept it under another name
            state = {"library": state.get("_library"), **state}
        state = checked_state(state, "Int4Basis", _FORMAT, {*self._OPTIONS, "library"}, sealed=False)
        parts = (state["codes"], state["scale"], state["zero"], tuple(state["shape"]), state["group"])
        self.__dict__.clear()
        self.__init__(*parts, known_library(state["library"]))  # type: ignore[misc]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the scales, and of results."""
        dtype: np.dtype[Any] = np.dtype(dtype_name(self.scale))
        return dtype

    @property
    def nbytes(self) -> int:
        """Bytes that codes, scales and zeros take."""
        return int(self.codes.nbytes + self.scale.nbytes + self.zero.nbytes)

    def _gram_core(self) -> tuple[Any, float]:
        """``(UᵀU)⁺`` of what is stored and its condition, kept after the first call: ``k²`` entries."""
        if self._core is None:
            call = call_of(codes=self.codes)
            self._core = call.kernels.gram_core(call.context, self)
        return self._core

    def _parts(self) -> tuple[Any, ...]:
        return self.codes, self.scale, self.zero, self.shape[0], self.shape[1], self.group

    def to_array(self) -> Array:
        """The dense matrix ``(n, k)``, of the dtype of the scales."""
        call = call_of(codes=self.codes)
        dense = call.kernels.unpack_int4(call.context, self._parts())
        return to_library(dense, self._library) if call.context is None else dense

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        if copy is False:
            raise ValueError("codes are kept: an array of them is always a copy")
        return np.asarray(numpy(self.to_array()), dtype=dtype)

    def apply(
        self, X: Array, *, side: str = "left", transpose: bool = False, out: Array | None = None, check: bool = True
    ) -> Array:
        """``U X``, ``UᵀX`` (``transpose``), ``X U`` or ``X Uᵀ`` (``side="right"``) for ``X`` of two or more axes, or
        a vector.

        ``2 m n k`` flops; work memory is a block of each operand, whatever their sizes. ``check`` looks for NaN and
        infinity in ``X``. On a CUDA device values are not looked at, and the work memory holds the dense matrix.
        """
        call = call_of(X=X, codes=self.codes, out=out)
        args = (self._parts(), X, side, transpose, 1.0, out, check, "X")
        return call.give(call.kernels.int4_product(call.context, *args), out)

    def __repr__(self) -> str:
        return f"Int4Basis(shape={self.shape}, group={self.group}, dtype={self.dtype}, {self.nbytes} bytes)"


def quantize_int4(U: Array, group: int = 256) -> Int4Basis:
    """Pack a matrix ``(n, k)`` into 4-bit codes with one scale and zero point for every ``group`` entries.

    Q-GaLore's formula, in row-major order: ``scale = max(max - min, 1e-5) / 15``, ``zero = clamp(-round(min / scale),
    0, 15)``, ``q = clamp(round(x / scale) + zero, 0, 15)`` (Zhang et al., arXiv:2407.08296), bit for bit; Q-GaLore
    stores one code a byte, this one two. The last group may be shorter. NaN and infinity raise ValueError; on a CUDA
    device values are not checked, and their groups become NaN.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.orth import quantize_int4, random_orthogonal
    >>> U = random_orthogonal(256, 32, rng=0, dtype=np.float32)
    >>> B = quantize_int4(U)
    >>> B.nbytes < U.nbytes / 7, bool(np.linalg.norm(B.to_array() - U) < 0.15 * np.linalg.norm(U))
    (True, True)
    """
    call = call_of(U=U)
    codes, scale, zero, shape, each = call.kernels.quantize_int4(call.context, U, group)
    return Int4Basis(codes, scale, zero, shape, each, call.library)
