"""Matrices of packed 4-bit codes."""

from __future__ import annotations

from typing import Any

import numpy as np

from subspan import _core
from subspan._lib.arguments import column, convolution_hint, detached, finish, is_left, is_vector, matrices, of_vector
from subspan._lib.arrays import Array, check_float, library_of, output, to_library, truth, whole_number
from subspan._lib.device import device_of, dtype_name, matrix, on_device
from subspan._lib.files import checked_state, sealed_state
from subspan.orth import device_int4

_FORMAT = "subspan.Int4Basis/2"


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
        codes: Any,
        scale: Any,
        zero: Any,
        shape: tuple[int, int],
        group: int,
        library: str = "numpy",
    ) -> None:
        if not isinstance(shape, (tuple, list)) or len(shape) != 2:
            raise TypeError(f"shape must be a pair (n, k), got {shape!r}")
        n, k = (whole_number(x, f"shape[{i}]", 0) for i, x in enumerate(shape))
        group = whole_number(group, "group", 1)
        count = n * k
        groups = -(-count // group)
        for x, name, length in ((codes, "codes", (count + 1) // 2), (scale, "scale", groups), (zero, "zero", groups)):
            if isinstance(x, np.ma.MaskedArray) or not hasattr(x, "shape") or not hasattr(x, "dtype"):
                raise TypeError(f"{name} must be an array, got {type(x).__name__}")
            if tuple(x.shape) != (length,):
                raise ValueError(
                    f"{name} must have shape ({length},) for a matrix {(n, k)} in groups of {group}, "
                    f"got {tuple(x.shape)}"
                )
        if dtype_name(codes) != "uint8":
            raise TypeError(f"codes must be uint8, got {dtype_name(codes)}")
        self.codes, self.scale, self.zero, self.shape, self.group = codes, scale, zero, (n, k), group
        self._library = library
        self._core: tuple[Any, float] | None = None

    def __getstate__(self) -> dict[str, Any]:
        names = ("codes", "scale", "zero", "shape", "group")
        state = {name: getattr(self, name) for name in names}
        return sealed_state({"format": _FORMAT, **state, "library": self._library})

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(state, dict) and not state.keys() & {
            "format",
            "checksum",
        }:  # of the first version, which had none
            state = {**state, "format": "subspan.Int4Basis/1", "library": state.get("_library")}
        state = checked_state(state, "Int4Basis", _FORMAT, {"codes", "scale", "zero", "shape", "group", "library"})
        if state["library"] not in ("numpy", "torch", "jax", "cupy"):
            raise ValueError(f"library is {state['library']!r}, wanted numpy, torch, jax or cupy")
        self.__init__(  # type: ignore[misc]
            state["codes"], state["scale"], state["zero"], tuple(state["shape"]), state["group"], state["library"]
        )

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
        if self._core is None and device_of(self.codes) is not None:
            self._core = device_int4.gram_core(self), 1.0  # nobody waits for the condition
        if self._core is None:
            core = np.empty((self.shape[1], self.shape[1]), self.dtype)
            self._core = core, _core.gram_core(self._parts(), core)
        return self._core

    def _parts(self) -> tuple[Any, ...]:
        return self.codes, self.scale, self.zero, self.shape[0], self.shape[1], self.group

    def to_array(self) -> Array:
        """The dense matrix ``(n, k)``, of the dtype of the scales."""
        if device_of(self.codes) is not None:
            return device_int4.to_array(self)
        out = np.empty(self.shape, self.dtype)
        _core.unpack_int4(self._parts(), out)
        return to_library(out, self._library)

    def apply(
        self, X: Array, *, side: str = "left", transpose: bool = False, out: Array | None = None, check: bool = True
    ) -> Array:
        """``U X``, ``UᵀX`` (``transpose``), ``X U`` or ``X Uᵀ`` (``side="right"``) for ``X`` of two or more axes, or
        a vector.

        ``2 m n k`` flops; work memory is a block of each operand, whatever their sizes. ``check`` looks for NaN and
        infinity in ``X``. On a CUDA device values are not looked at, and the work memory holds the dense matrix.
        """
        transpose = truth(transpose, "transpose")
        if is_vector(X):
            return of_vector(
                lambda x, to: self.apply(x, side=side, transpose=transpose, out=to, check=check), X, side, out
            )
        there = on_device(self.codes, X)
        X = matrix(X, "X") if there else matrices(X, "X")[0]
        left = is_left(side)
        rows, cols = self.shape[::-1] if transpose else self.shape
        shape = tuple(X.shape)
        if shape[-2 if left else -1] != (cols if left else rows):
            where = f"{cols} rows" if left else f"{rows} columns"
            raise ValueError(f"X must have {where}, got shape {shape}{convolution_hint(shape, 'X')}")
        shape = (*shape[:-2], rows, shape[-1]) if left else (*shape[:-1], cols)
        if there:
            return device_int4.product(self, X, left, transpose, shape, 1.0, out)
        dtype = check_float(X, "X")
        library = library_of(X)
        result, fresh = output(out, shape, dtype, library)
        if check and not _core.all_finite(detached(X)):
            raise ValueError("X holds NaN or infinity")
        _core.int4_product(self._parts(), detached(X), left, transpose, detached(result))
        return finish(result, fresh, library)

    def __repr__(self) -> str:
        return f"Int4Basis(shape={self.shape}, group={self.group}, dtype={self.dtype}, {self.nbytes} bytes)"


def quantize_int4(U: Array, group: int = 256) -> Int4Basis:
    """Pack a matrix ``(n, k)`` into 4-bit codes with one scale and zero point for every ``group`` entries.

    Q-GaLore's formula, in row-major order: ``scale = max(max - min, 1e-5) / 15``, ``zero = clamp(-round(min / scale),
    0, 15)``, ``q = clamp(round(x / scale) + zero, 0, 15)`` (Zhang et al., arXiv:2407.08296), bit for bit; that code
    keeps one code a byte, this one two. The last group may be shorter. NaN and infinity raise ValueError; on a CUDA
    device, where nobody waits to see them, their groups become NaN.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.orth import quantize_int4, random_orthogonal
    >>> U = random_orthogonal(256, 32, rng=0, dtype=np.float32)
    >>> B = quantize_int4(U)
    >>> B.nbytes < U.nbytes / 7, bool(np.linalg.norm(B.to_array() - U) < 0.15 * np.linalg.norm(U))
    (True, True)
    """
    U = column(U)
    U = matrix(U, "U") if on_device(U) else matrices(U, "U")[0]
    if len(U.shape) != 2:
        raise ValueError(f"U must have 2 dimensions, got shape {tuple(U.shape)}")
    if isinstance(group, bool) or not isinstance(group, (int, np.integer)):
        raise TypeError(f"group must be an int, got {type(group).__name__}")
    if group < 1:
        raise ValueError(f"group must be at least 1, got {group}")
    n, k = (int(x) for x in U.shape)
    group = min(int(group), max(n * k, 1))
    if on_device(U):
        there = device_int4.quantize(U, group)
        return Int4Basis(there[0], there[1], there[2], (n, k), group, there[3])
    dtype = check_float(U, "U")
    groups = -(-n * k // group)
    codes = np.empty((n * k + 1) // 2, np.uint8)
    scale, zero = np.empty(groups, dtype), np.empty(groups, dtype)
    _core.quantize_int4(detached(U), int(group), codes, scale, zero)
    return Int4Basis(codes, scale, zero, (n, k), int(group), library_of(U))
