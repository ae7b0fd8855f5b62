"""The past of a :class:`MixState` in CUDA device memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from subspan._lib.device import DeviceMemory


class Ring:
    """The tokens that a :class:`MixState` on a device still needs: a ring of ``max(offsets) + 1`` for each sequence."""

    def __init__(self, place: DeviceMemory, r: int, batch: tuple[int, ...], dtype: str, offsets: list[int]) -> None:
        self.place, self.offsets, self.batch, self.dtype = place, offsets, batch, dtype
        self.size = max(offsets) + 1
        self.tokens = place.zeros((*batch, self.size, r), dtype)
        self.open: Any = None  # which of them take part; None: all
        self.count = 0

    def position(self) -> int:
        return self.count

    def _mask(self, mask: Any, shape: tuple[int, ...]) -> Any:
        """Which tokens of this shape count, as bytes that broadcast to it."""
        try:
            fits = np.broadcast_shapes(tuple(mask.shape), shape) == shape
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(f"mask, shape {tuple(mask.shape)}, does not broadcast to {shape}")
        return self.place.bytes_of(mask, "mask")

    def put(self, z: Any, mask: Any) -> None:
        """Tokens ``(..., T, r)`` from the current position on; the position is the caller's to move."""
        length = int(z.shape[-2])
        closed = None if mask is None else self._mask(mask, tuple(map(int, z.shape[:-1])))  # before anything is written
        if closed is not None and self.open is None:
            self.open = self.place.zeros((*self.batch, self.size), "uint8")
            with self.place.inside():
                self.open[...] = 1
        one = closed is None or len(closed.shape) == 0 or int(closed.shape[-1]) == 1  # for all tokens
        begin = max(0, length - self.size)
        with self.place.inside():
            while begin < length:
                slot = (self.count + begin) % self.size
                some = min(self.size - slot, length - begin)
                self.tokens[..., slot : slot + some, :] = z[..., begin : begin + some, :]
                if self.open is not None:
                    now = 1 if closed is None else closed if one else closed[..., begin : begin + some]
                    self.open[..., slot : slot + some] = now
                begin += some

    def copy(self) -> Ring:
        new = Ring.__new__(Ring)
        new.__dict__.update(self.__dict__)
        new.tokens = self.place.copied(self.tokens)
        new.open = None if self.open is None else self.place.copied(self.open)
        return new

    def step(self, z: Any, weights: Any, mask: Any, W: Any, b: Any, chosen: Any, out: Any) -> None:
        # The slot holds a token that no offset reaches any more: should the kernel not start, nothing is lost.
        self.put(z[..., None, :], None if mask is None else mask[..., None])
        rows = None if weights is None else (weights[..., None, :] if len(weights.shape) > 1 else weights)
        weighting, norm, eps, order, bias, rope, rope_base, rope_start = chosen
        choices = (weighting, self.open, norm, eps, order, True, bias, rope, rope_base, rope_start)
        args = (self.tokens, self.offsets, rows, *choices, self.size, self.count, out[..., None, :])
        self.place.module.mix_ring(self.place.call(), W, b, *args)
        self.count += 1
