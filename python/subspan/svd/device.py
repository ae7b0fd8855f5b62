"""The state of a StreamingSVD in CUDA device memory."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from subspan._lib.arrays import Array, detached
from subspan._lib.device import DeviceMemory, check_dtype, memory_of

_ARRAYS = ("components", "values", "mean", "totals")
_NUMBERS = ("rank", "rows", "inner")
_TOTALS = 4  # energy left out, rows refused, weight of the mean, work


class DeviceState:
    """Components, singular values and mean on a device. Updates do not wait for it; results do."""

    def __init__(
        self,
        place: DeviceMemory,
        n: int,
        rank: int,
        forget: float,
        center: bool,
        oversample: int | None,
        method: str,
        dtype: str,
    ) -> None:
        if rank > n:
            raise ValueError(f"rank must be at most the number of columns, {n}, got {rank}")
        if oversample is not None:
            inner = rank + oversample
        elif n <= 128:
            inner = n
        elif n < 1024:
            inner = 2 * rank + 64
        else:
            inner = max(rank, min(64, 2 * rank + 32))
        self.inner = min(inner, n)
        self._configure(place, n, forget, method, dtype)
        self.components = place.zeros((self.inner, n), "float64")  # rounding them at every update would add up
        self.values = place.zeros((self.inner,), "float64")
        self.totals = place.zeros((_TOTALS,), "float64")
        self.mean = place.zeros((n,), "float64") if center else None
        self.rank, self.rows = 0, 0

    def _configure(self, place: DeviceMemory, n: int, forget: float, method: str, dtype: str) -> None:
        self.place, self.n, self.forget, self.dtype = place, n, forget, dtype
        self._turn = threading.Lock()  # launches of two updates must not mix
        # The Gram matrix of float64 rows would lose what is below 1e-8 of the first value.
        self.robust = method == "robust" or (method == "auto" and dtype == "float64")

    def copy(self) -> DeviceState:
        new = DeviceState.__new__(DeviceState)
        with self._turn:
            new.__dict__.update(self.__dict__)
            new._turn = threading.Lock()
            for name in _ARRAYS:
                x = getattr(self, name)
                setattr(new, name, None if x is None else self.place.copied(x))
        return new

    def check(self, rows: Array, name: str) -> Any:
        place = memory_of(**{name: rows})
        self.check_dtype(rows, name)
        if len(rows.shape) != 2 or int(rows.shape[1]) != self.n:
            raise ValueError(f"{name} must have shape (b, {self.n}), got {tuple(rows.shape)}")
        if place.device != self.place.device:
            raise ValueError(f"{name} is on CUDA device {place.device}, the stream on {self.place.device}")
        return detached(rows)

    def check_dtype(self, x: Array, name: str) -> None:
        if check_dtype(x, name) != self.dtype:
            raise TypeError(f"{name} must be {self.dtype} as the stream is, got {check_dtype(x, name)}")

    def _state(self) -> tuple[Any, ...]:
        return self.components, self.values, self.mean, self.totals

    def update(self, rows: Array) -> None:
        rows = self.check(rows, "rows")
        if int(rows.shape[0]) == 0:
            raise ValueError("rows holds no rows")
        at_once = max(128, self.inner)
        with self._turn:
            args = (self._state(), self.rank, self.robust, rows, self.forget, at_once)
            self.rank = int(self.place.module.svd_update(self.place.call(), *args))
            self.rows += int(rows.shape[0])

    def merge(self, other: DeviceState) -> None:
        if other.n != self.n:
            raise ValueError(f"other must have {self.n} columns, got {other.n}")
        if (other.mean is None) != (self.mean is None):
            raise ValueError("center must be the same in both streams")
        if other.dtype != self.dtype:
            raise TypeError(f"other must be {self.dtype} as the stream is, got {other.dtype}")
        if other.place.device != self.place.device:
            raise ValueError(f"other is on CUDA device {other.place.device}, the stream on {self.place.device}")
        theirs = other.copy()  # which nobody else changes meanwhile
        with self._turn:
            args = (self._state(), self.rank, self.robust, theirs._state(), theirs.rank)
            self.rank = int(self.place.module.svd_merge(self.place.call(), *args))
            self.rows += theirs.rows

    # -- saving --------------------------------------------------------------------------------------------------------

    def saved(self) -> dict[str, Any]:
        """Arrays of NumPy and numbers; waits for the device."""
        self.host()
        state: dict[str, Any] = {"device_" + name: int(getattr(self, name)) for name in _NUMBERS}
        for name in _ARRAYS:
            x = getattr(self, name)
            state["device_" + name] = None if x is None else self.place.host(x)
        return state

    @classmethod
    def restored(cls, library: str, state: dict[str, Any], forget: float, method: str, center: bool) -> DeviceState:
        """On the library's current device. ValueError for a state whose parts do not fit each other."""
        state_dtype = state["dtype"]
        state = {name: state["device_" + name] for name in (*_NUMBERS, *_ARRAYS)}
        self = cls.__new__(cls)
        components = np.asarray(state["components"])
        if components.ndim != 2 or components.dtype.name not in ("float32", "float64"):
            raise ValueError(f"components have shape {components.shape} of {components.dtype}")
        inner, n = components.shape
        dtype = str(state_dtype)
        if dtype not in ("float32", "float64"):
            raise ValueError(f"dtype is {dtype!r}, wanted float32 or float64")
        shapes = {"components": (inner, n), "values": (inner,), "mean": (n,), "totals": (_TOTALS,)}
        for name in _NUMBERS:
            setattr(self, name, int(state[name]))
        if not 0 <= self.rank <= self.inner == inner or self.rows < 0:
            raise ValueError(f"rank is {self.rank}, rows are {self.rows}, {inner} components")
        self._configure(DeviceMemory.current(library), n, forget, method, dtype)
        for name in _ARRAYS:
            x = state[name]
            if name == "mean" and not center:
                setattr(self, name, None)
                continue
            if x is None:
                raise ValueError(f"{name} is missing")
            host = np.asarray(x)
            if host.shape != shapes[name] or not np.isfinite(host).all():
                raise ValueError(f"{name} has shape {host.shape}, wanted {shapes[name]}, all finite")
            setattr(self, name, self.place.from_host(host.astype(np.float64)))
        return self

    def product(self, a: Any, b: Any) -> Any:
        """``a b`` as everywhere here, never in tf32, whatever the library's own products are set to."""
        shape = (int(a.shape[0]), int(b.shape[1]))
        if 0 in (*shape, int(a.shape[1])):
            return self.place.zeros(shape, self.dtype)
        return self.place.module.product(self.place.call(), a, b, 1.0, None)

    def shown_components(self, count: int) -> Any:
        """The first of them, in the dtype of the rows; a fresh array."""
        return self.place.copied(self.place.converted(self.components[:count], self.dtype))

    # -- results: these wait for the device ----------------------------------------------------------------------------

    def host(self) -> tuple[np.ndarray[Any, Any], float]:
        """Singular values, and the energy that was left out; raises where rows were refused."""
        with self._turn:
            left, refused = (float(x) for x in self.place.host(self.totals)[:2])
            values = self.place.host(self.values)
            if refused:
                with self.place.inside():
                    self.totals[1:2] = 0
                self.rows -= int(refused)
        if refused:
            raise ValueError(
                f"{int(refused)} rows held NaN or infinity, or were in a block with such rows, or in one whose "
                "decomposition did not settle; those blocks were left out, all else was taken in"
            )
        return values, left

    def shown(self, rank: int, energy: float | None) -> tuple[int, np.ndarray[Any, Any], float]:
        """How many components are shown, all values, and the energy left out before them."""
        values, left = self.host()
        k = min(rank, int((values > 0).sum()))
        if energy is not None and k:
            squares = values**2
            share = np.cumsum(squares) / (squares.sum() + left)
            k = min(k, int(np.searchsorted(share, energy)) + 1)
        return k, values, left
