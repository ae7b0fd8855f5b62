"""The state of a StreamingSVD in CUDA device memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from subspan._arrays import Array
from subspan._device import Place, check_dtype, need_blas
from subspan._orth.common import detached


class DeviceStream:
    """Components, singular values and mean on a device. Updates do not wait for it; results do."""

    def __init__(self, place: Place, n: int, rank: int, forget: float, center: bool, oversample: int | None) -> None:
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
        need_blas()
        self.limit = int(place.module.stream_core_limit(place.device))
        self.inner = min(inner, n, self.limit * 3 // 4)
        if self.inner < rank:
            raise ValueError(
                f"rank must be at most {self.limit * 3 // 4} on this device, got {rank}: the core of an update has to "
                "fit the shared memory of a cluster of blocks"
            )
        self.place, self.n, self.forget, self.center = place, n, forget, center
        self.components = place.zeros((self.inner, n), "float32")
        self.values = place.zeros((self.inner,), "float64")
        self.totals = place.zeros((2,), "float64")
        self.mean = place.zeros((n,), "float64") if center else None
        self.rank, self.rows, self.weight = 0, 0, 0.0

    def copy(self) -> DeviceStream:
        new = DeviceStream.__new__(DeviceStream)
        new.__dict__.update(self.__dict__)
        for name in ("components", "values", "totals", "mean"):
            x = getattr(self, name)
            setattr(new, name, None if x is None else self.place.copied(x))
        return new

    def check(self, rows: Array, name: str) -> Any:
        place = Place(**{name: rows})
        if check_dtype(rows, name) != "float32":
            raise TypeError(f"{name} must be float32 on a CUDA device, got {check_dtype(rows, name)}")
        if len(rows.shape) != 2 or int(rows.shape[1]) != self.n:
            raise ValueError(f"{name} must have shape (b, {self.n}), got {tuple(rows.shape)}")
        if place.device != self.place.device:
            raise ValueError(f"{name} is on CUDA device {place.device}, the stream on {self.place.device}")
        return detached(rows)

    def update(self, rows: Array) -> None:
        rows = self.check(rows, "rows")
        if int(rows.shape[0]) == 0:
            raise ValueError("rows holds no rows")
        most = self.limit - self.inner - 1
        forget = self.forget
        for begin in range(0, int(rows.shape[0]), most):
            self._update(rows[begin : begin + most], forget, int(rows.shape[0]) if begin == 0 else 0)
            forget = 1.0

    def _update(self, rows: Any, forget: float, counted: int) -> None:
        b = int(rows.shape[0])
        weight = self.weight * forget * forget
        kept = min(self.inner, self.n, self.rank + b + (1 if self.center and weight > 0 else 0))
        args = (rows, self.components, self.values, self.mean, self.totals, self.rank, kept, forget, weight)
        self.place.module.stream_update(self.place.call(), *args)
        self.rank, self.weight, self.rows = kept, weight + b, self.rows + counted

    # -- results: these wait for the device ----------------------------------------------------------------------------

    def host(self) -> tuple[np.ndarray[Any, Any], float]:
        """Singular values, and the energy that was left out; raises where rows were refused."""
        left, refused = (float(x) for x in self.place.host(self.totals))
        if refused:
            self.totals[1:] = 0
            raise ValueError(
                f"{int(refused)} rows held NaN or infinity; updates with them were left out, all else was taken in"
            )
        return self.place.host(self.values), left

    def shown(self, rank: int, energy: float | None) -> tuple[int, np.ndarray[Any, Any], float]:
        """How many components are shown, all values, and the energy left out before them."""
        values, left = self.host()
        k = min(rank, int((values > 0).sum()))
        if energy is not None and k:
            squares = values**2
            share = np.cumsum(squares) / (squares.sum() + left)
            k = min(k, int(np.searchsorted(share, energy)) + 1)
        return k, values, left
