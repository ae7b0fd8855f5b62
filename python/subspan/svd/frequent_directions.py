"""A deterministic sketch with a guaranteed error."""

from __future__ import annotations

from typing import Any

import numpy as np

from subspan import _core
from subspan._lib.arrays import Array, check_float, check_library, float_array, library_of, to_library
from subspan._lib.files import Kept, checked_state, known_library, sealed_state
from subspan._lib.numbers import float_dtype, whole_number
from subspan._lib.sparse import csr_parts, is_sparse

__all__ = ["FrequentDirections"]

_FORMAT = "subspan.FrequentDirections/2"


class FrequentDirections(Kept):
    """Deterministic sketch ``B (size, n)`` of a tall matrix ``A``, with a guaranteed error.

    ``0 <= x·(AᵀA - BᵀB)·x <= error_bound`` for every unit vector ``x``, and ``error_bound`` is at most
    ``‖A - A_k‖_F² / (size - k)`` for every ``k < size``, to rounding: ``eps ‖A‖²`` of the dtype that the sketch is
    returned in. Sketches of parts of a matrix can be merged.

    Parameters
    ----------
    size : int
        Rows of the sketch.
    n_features : int
        Columns.

    Notes
    -----
    A buffer of ``2 size`` rows shrinks when it is full: ``8 size n`` flops a row on average. Ghashami, Liberty,
    Phillips and Woodruff, SIAM J. Comput. 45 (2016).

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.svd import FrequentDirections
    >>> A = np.random.default_rng(0).standard_normal((500, 30))
    >>> fd = FrequentDirections(10, 30).update(A)
    >>> error = np.linalg.eigvalsh(A.T @ A - fd.sketch.T @ fd.sketch)
    >>> bool(error.min() > -1e-9 and error.max() <= fd.error_bound * (1 + 1e-9))
    True
    """

    _OPTIONS = ("size", "n_features")
    _NEEDED = frozenset(("size", "n_features", "library"))
    _MORE = frozenset({"format", "checksum", "buffer", "low", "seen", "bound", "norm", "dtype"})

    def __init__(self, size: int, n_features: int) -> None:
        self.size = whole_number(size, "size", 1, 2**28)
        self.n_features = whole_number(n_features, "n_features", 1)
        if self.size * self.n_features > 2**57:
            raise ValueError(
                f"a sketch of size {self.size} by n_features {self.n_features} is more than memory can hold"
            )
        self._state: Any = _core.Sketch(self.size, self.n_features)
        self._library = "numpy"
        self._turn = _core.Turn()  # of the library of the first rows

    def update(self, rows: Array) -> FrequentDirections:
        """Add rows ``(b, n)``, dense or sparse; a vector ``(n,)`` is one row.

        Integers that the dtype holds exactly are converted, as in :meth:`StreamingSVD.update`.
        """
        dtype, library = self._state.dtype(), "numpy"
        if is_sparse(rows):
            parts: tuple[Any, ...] = csr_parts(rows, "rows", dtype)
        else:
            rows = float_array(rows, "rows", dtype)
            check_library(rows, "rows")
            library, parts = library_of(rows), (rows,)
        with self._turn:
            if self._state.dtype() is not None and library != self._library:
                raise TypeError(f"rows must be {self._library} arrays as the first ones were, got {library}")
            (self._state.update if len(parts) == 1 else self._state.update_csr)(*parts)
            self._library = library
        return self

    def merge(self, other: FrequentDirections) -> FrequentDirections:
        """Add another sketch over the same columns; the error bounds add."""
        if not isinstance(other, FrequentDirections):
            raise TypeError(f"other must be a FrequentDirections, got {type(other).__name__}")
        if other.n_features != self.n_features:
            raise ValueError(f"merge: other has {other.n_features} columns, this sketch has {self.n_features}")
        with self._turn:
            fresh = self._state.dtype() is None
            if not fresh and other._state.dtype() is not None and self._library != other._library:
                raise TypeError(f"other must hold {self._library} arrays as the sketch does, got {other._library}")
            self._state.merge(other._state)
            if fresh:
                self._library = other._library
        return self

    @property
    def sketch(self) -> Array:
        """``(size, n)``; rows that are not needed are zero. A fresh array."""
        found = self._state.sketch()
        return np.zeros((self.size, self.n_features)) if found is None else to_library(found, self._library)

    @property
    def error_bound(self) -> float:
        """Upper bound of ``‖AᵀA - BᵀB‖₂`` for the sketch as it is now."""
        return float(self._state.error_bound())  # with the shrink that reading the sketch may need

    @property
    def rows_seen(self) -> int:
        """Number of rows added."""
        return int(self._state.rows_seen())

    @property
    def squared_norm(self) -> float:
        """``‖A‖_F²`` of everything added."""
        return float(self._state.squared_norm())

    def __getstate__(self) -> dict[str, Any]:
        own = {"format": _FORMAT, "size": self.size, "n_features": self.n_features, "library": self._library}
        return sealed_state({**own, **self._state.state()})

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = checked_state(state, "FrequentDirections", _FORMAT, self._NEEDED, sealed=False)
        self.__dict__.clear()
        self.__init__(state["size"], state["n_features"])  # type: ignore[misc]
        self._library = known_library(state["library"])
        if "buffer" in state:
            dtype = check_float(state["buffer"], "buffer")  # in versions before in that of the sketch, without low
            buffer = state["buffer"].astype(np.float64)
            low = state.get("low", np.zeros_like(buffer))
            dtype = float_dtype(state.get("dtype", dtype))
            bound, norm, seen = float(state["bound"]), float(state["norm"]), whole_number(state["seen"], "seen", 0)
            self._state.restore(buffer, low, bound, norm, seen, dtype.name)

    def __repr__(self) -> str:
        return f"FrequentDirections(size={self.size}, n_features={self.n_features}) <{self.rows_seen} rows>"
