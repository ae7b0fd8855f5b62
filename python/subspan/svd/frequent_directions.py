"""A deterministic sketch with a guaranteed error."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import numpy as np

from subspan import _core
from subspan._lib.arrays import (
    Array,
    check_float,
    check_library,
    csr_parts,
    detached,
    float_array,
    float_dtype,
    is_sparse,
    library_of,
    to_library,
    whole_number,
)
from subspan._lib.files import checked_state, known_library, sealed_state

__all__ = ["FrequentDirections"]

_SKETCH_FORMAT = "subspan.FrequentDirections/2"


class FrequentDirections:
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

    def __init__(self, size: int, n_features: int) -> None:
        self.size = whole_number(size, "size", 1, 2**28)
        self.n_features = whole_number(n_features, "n_features", 1)
        if self.size * self.n_features > 2**57:
            raise ValueError(
                f"a sketch of size {self.size} by n_features {self.n_features} is more than memory can hold"
            )
        self._core: Any = None
        self._library = "numpy"
        self._turn = threading.Lock()  # of the first rows

    def _make(self, dtype: np.dtype[Any]) -> Any:
        kind = _core.SketchF32 if dtype == np.float32 else _core.SketchF64
        if self._core is None:
            return kind(self.size, self.n_features)
        if not isinstance(self._core, kind):
            raise TypeError(f"rows must have the dtype of the sketch, got {dtype}")
        return self._core

    def _wanted(self) -> Any:
        return None if self._core is None else np.float32 if isinstance(self._core, _core.SketchF32) else np.float64

    def update(self, rows: Array) -> FrequentDirections:
        """Add rows ``(b, n)``, dense or sparse; a vector ``(n,)`` is one row.

        Integers that the dtype holds exactly are converted, as in :meth:`StreamingSVD.update`.
        """
        library = "numpy"
        parts: Any = None
        if is_sparse(rows):
            parts = csr_parts(rows, "rows", self._wanted())
            dtype = check_float(parts[0], "rows")
        else:
            rows = float_array(rows, "rows", self._wanted())
            check_library(rows, "rows")
            library = library_of(rows)
            rows = detached(rows)
            dtype = check_float(rows, "rows")
        if self._core is not None and library != self._library:
            raise TypeError(f"rows must be {self._library} arrays as the first ones were, got {library}")
        with self._turn if self._core is None else contextlib.nullcontext():
            core = self._make(dtype)
            if parts is None:
                core.update(rows)
            else:
                core.update_csr(*parts)
            if self._core is None:
                self._core, self._library = core, library
        return self

    def merge(self, other: FrequentDirections) -> FrequentDirections:
        """Add another sketch over the same columns; the error bounds add."""
        if not isinstance(other, FrequentDirections):
            raise TypeError(f"other must be a FrequentDirections, got {type(other).__name__}")
        if other.n_features != self.n_features:
            raise ValueError(f"merge: other has {other.n_features} columns, this sketch has {self.n_features}")
        if other._core is None:
            return self
        with self._turn if self._core is None else contextlib.nullcontext():
            core = self._make(np.dtype(np.float32 if isinstance(other._core, _core.SketchF32) else np.float64))
            core.merge(other._core)
            if self._core is None:
                self._core, self._library = core, other._library
        return self

    @property
    def sketch(self) -> Array:
        """``(size, n)``; rows that are not needed are zero. A fresh array."""
        if self._core is None:
            return np.zeros((self.size, self.n_features))
        single = isinstance(self._core, _core.SketchF32)
        out = np.empty((self.size, self.n_features), dtype=np.float32 if single else np.float64)
        self._core.sketch_into(out)
        return to_library(out, self._library)

    @property
    def error_bound(self) -> float:
        """Upper bound of ``‖AᵀA - BᵀB‖₂`` for the sketch as it is now."""
        if self._core is None:
            return 0.0
        return float(self._core.error_bound())  # with the shrink that reading the sketch may need

    @property
    def rows_seen(self) -> int:
        """Number of rows added."""
        return 0 if self._core is None else int(self._core.numbers()[2])

    @property
    def squared_norm(self) -> float:
        """``‖A‖_F²`` of everything added."""
        return 0.0 if self._core is None else float(self._core.numbers()[4])

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "format": _SKETCH_FORMAT,
            "size": self.size,
            "n_features": self.n_features,
            "library": self._library,
        }
        if self._core is not None:
            buffer, low, seen, bound, norm = self._core.saved()
            state.update(buffer=buffer, low=low, bound=bound, norm=norm, seen=seen, dtype=np.dtype(self._wanted()).name)
        return sealed_state(state)

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(state, dict) and not state.keys() & {
            "format",
            "checksum",
        }:  # of the first version, which had none
            state = {**state, "format": "subspan.FrequentDirections/1"}
        state = checked_state(state, "FrequentDirections", _SKETCH_FORMAT, {"size", "n_features", "library"})
        self.__init__(state["size"], state["n_features"])  # type: ignore[misc]
        self._library = known_library(state["library"])
        if "buffer" in state:
            buffer = state["buffer"]
            kept = check_float(buffer, "buffer")
            core = self._make(float_dtype(state["dtype"]) if "dtype" in state else kept)  # earlier ones were of it
            seen = whole_number(state["seen"], "seen", 0)
            buffer = buffer.astype(np.float64)
            low = state.get("low", np.zeros_like(buffer))  # earlier ones had none
            core.restore(buffer, low, float(state["bound"]), float(state["norm"]), seen)
            self._core = core

    def __repr__(self) -> str:
        return f"FrequentDirections(size={self.size}, n_features={self.n_features}) <{self.rows_seen} rows>"
