"""Mixing of sequences in CUDA device memory."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from subspan._lib.arguments import detached, finish
from subspan._lib.arrays import Array
from subspan._lib.device import Place, check_dtype, kernels, like, quick_call, wide_dtype
from subspan.plucker.common import checked

if TYPE_CHECKING:
    from subspan.plucker.common import Sequences


def _place(s: Sequences, **arrays: Any) -> Place:
    return Place(z=s.z, **arrays)


def _check(x: Any, name: str, dtype: str, shape: tuple[int, ...]) -> Any:
    if check_dtype(x, name) != dtype:
        raise TypeError(f"{name} must be {dtype} as z is, got {check_dtype(x, name)}")
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
    return detached(x)


def _projection(s: Sequences, W: Array, b: Array | None) -> tuple[Any, Any]:
    pairs = math.comb(s.r, 2)
    if check_dtype(W, "W") != s.dtype:
        raise TypeError(f"W must be {s.dtype} as z is, got {check_dtype(W, 'W')}")
    if len(W.shape) != 2 or W.shape[1] != pairs:
        raise ValueError(
            f"W must have shape (d, {pairs}), a column for each pair of {s.r} dimensions, got {tuple(W.shape)}"
        )
    return detached(W), None if b is None else _check(b, "b", s.dtype, (int(W.shape[0]),))


def mix(s: Sequences, out: Array | None) -> Array:
    place = _place(s, out=out)
    result = place.output(out, (*s.shape, math.comb(s.r, 2)), s.dtype)
    place.module.plucker_mix(place.call(), s.z, s.weights, s.mask, detached(result), s.offsets, s.settings)
    return finish(result, False, s.library)


def quick(z: Array, W: Array, b: Array | None, weights: Array | None, out: Array | None, *chosen: Any) -> Array | None:
    """:func:`mix_project` where nothing needs a second look; None, and nothing done, where something does.

    ``chosen``: offsets, causal, weighting, and the rest as :func:`checked` takes it.
    """
    call = quick_call(z, W, b, weights, out)
    if call is None or W is None or len(z.shape) < 2 or len(W.shape) != 2:
        return None
    offsets, causal, *rest = chosen
    shape = (*z.shape[:-1], W.shape[0])
    if out is not None and not (out.shape == shape and out.dtype == z.dtype):
        return None
    try:
        which, numbers = checked(offsets, causal, weights is None, *rest, z.shape[-1])
        if weights is not None and tuple(weights.shape[-1:]) != (len(which),):
            return None
        result = like(z, shape) if out is None else out
        kernels().plucker_mix_project(call, z, weights, None, W, b, result, which, numbers)
    except (TypeError, ValueError):  # before any launch: the long way says what is wrong in the caller's words
        return None
    return result if out is None else finish(out, False, "")


def _weights_gradient(place: Place, s: Sequences) -> Any:
    return None if s.weights is None else place.empty((*s.shape, len(s.offsets)), wide_dtype(s.dtype))


def mix_backward(s: Sequences, grad: Array, weights: Array | None) -> Any:
    place = _place(s, grad=grad)
    g = _check(grad, "grad", s.dtype, (*s.shape, math.comb(s.r, 2)))
    dz, full = place.empty((*s.shape, s.r), s.dtype), _weights_gradient(place, s)
    place.module.plucker_mix_backward(place.call(), g, s.z, s.weights, s.mask, dz, full, s.offsets, s.settings)
    if weights is None:
        return dz
    return dz, place.summed_to(full, tuple(weights.shape), s.dtype)


def mix_project(s: Sequences, W: Array, b: Array | None, out: Array | None) -> Array:
    place = _place(s, W=W, b=b, out=out)
    matrix, vector = _projection(s, W, b)
    result = place.output(out, (*s.shape, int(W.shape[0])), s.dtype)
    args = (s.z, s.weights, s.mask, matrix, vector, detached(result), s.offsets, s.settings)
    place.module.plucker_mix_project(place.call(), *args)
    return finish(result, False, s.library)


def mix_project_backward(
    s: Sequences, grad: Array, W: Array, b: Array | None, weights: Array | None
) -> tuple[Any, ...]:
    place = _place(s, grad=grad, W=W, b=b)
    matrix, vector = _projection(s, W, b)
    d = int(W.shape[0])
    g = _check(grad, "grad", s.dtype, (*s.shape, d))
    make = place.zeros if math.prod(s.shape) == 0 else place.empty
    dz, dW = place.empty((*s.shape, s.r), s.dtype), make(tuple(W.shape), s.dtype)
    db = None if b is None else make((d,), s.dtype)
    full = _weights_gradient(place, s)
    if math.prod(s.shape) > 0:
        args = (g, s.z, s.weights, s.mask, matrix, vector, dz, dW, db, full, s.offsets, s.settings)
        place.module.plucker_mix_project_backward(place.call(), *args)
    results: list[Any] = [dz, dW, db]
    if weights is not None:
        results.append(place.summed_to(full, tuple(weights.shape), s.dtype))
    return tuple(results)


class Ring:
    """The tokens that a :class:`MixState` on a device still needs: a ring of ``max(offsets) + 1`` for each sequence."""

    def __init__(self, place: Place, r: int, batch: tuple[int, ...], dtype: str, offsets: list[int]) -> None:
        self.place, self.offsets, self.batch, self.dtype = place, offsets, batch, dtype
        self.size = max(offsets) + 1
        self.tokens = place.zeros((*batch, self.size, r), dtype)
        self.open: Any = None  # which of them take part; None: all
        self.count = 0

    def position(self) -> int:
        return self.count

    def _mask(self, mask: Any, shape: tuple[int, ...]) -> Any:
        """Which tokens of this shape count, as bytes that broadcast to it."""
        name = str(mask.dtype).rpartition(".")[2]
        if not name.startswith(("bool", "int", "uint")):
            raise TypeError(f"mask must be boolean or integer, not zero where a token counts, got {name}")
        try:
            fits = np.broadcast_shapes(tuple(mask.shape), shape) == shape
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(f"mask, shape {tuple(mask.shape)}, does not broadcast to {shape}")
        return self.place.converted(mask if name in ("bool", "uint8") else mask != 0, "uint8")

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

    def step(self, z: Any, weights: Any, mask: Any, W: Any, b: Any, settings: Any, out: Any) -> None:
        # The slot holds a token that no offset reaches any more: should the kernel not start, nothing is lost.
        self.put(z[..., None, :], None if mask is None else mask[..., None])
        target, where = out[..., None, :], {"ring": self.size, "first": self.count}
        rows = None if weights is None else (weights[..., None, :] if len(weights.shape) > 1 else weights)
        call, module = self.place.call(), self.place.module
        if W is None:
            module.plucker_mix(call, self.tokens, rows, self.open, target, self.offsets, settings, **where)
        else:
            module.plucker_mix_project(
                call, self.tokens, rows, self.open, W, b, target, self.offsets, settings, **where
            )
        self.count += 1
