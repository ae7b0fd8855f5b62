"""Mixing token by token."""

from __future__ import annotations

import math
import operator
import os
from typing import Any

import numpy as np

from subspan import _core
from subspan._lib.arguments import finish, numpy
from subspan._lib.arrays import Array, as_array, check_float, detached, library_of, output, whole_number
from subspan._lib.device import DeviceMemory, check_dtype, device_of, dtype_name, memory_of, on_device
from subspan._lib.files import checked_state, read_archive, sealed_state, write_archive
from subspan.plucker.common import first_positions, mask_array, numbers_for, offset_list
from subspan.plucker.device import Ring

__all__ = ["MixState"]

_FORMAT = "subspan.plucker.MixState/2"
_OPTIONS = ("norm", "eps", "weighting", "order", "bias", "rope", "rope_base", "rope_start")
_NEEDED = {
    "format",
    "offsets",
    "r",
    "W",
    "b",
    "weights",
    "listed",
    "batch",
    "started",
    "tokens",
    "counts",
    "position",
    *_OPTIONS,
}


class MixState:
    """Plücker mixing for decoding: one token in, its mixed coordinates (or their projection) out.

    What :meth:`step` returns is bit for bit what :func:`mix` or :func:`mix_project` gives for the newest token of the
    whole sequence. The state is a ring of ``max(offsets)`` tokens for each sequence of the batch.

    Parameters
    ----------
    offsets : int or sequence of int
        How far back, each positive.
    r : int
        Dimensions of a token, at least 2.
    W : array (d, C(r, 2)), optional
        With it :meth:`step` gives the projection, as :func:`mix_project`. Copied and packed once.
    b : array (d,), optional
    weights, weighting, norm, eps, order, bias, rope, rope_base, rope_start
        As for :func:`mix_project`, ``rope_start`` being the position of the first token of the state; ``weights`` has
        shape ``(m,)`` here, :meth:`step` takes others for a token.

    Notes
    -----
    ``10 m r + 2 r²`` flops a token and sequence, and ``2 d C(r, 2)`` for the projection. The dtype and the batch are
    those of the first token. May be used from several threads, one call at a time. Pickles and copies.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan import plucker
    >>> z = np.random.default_rng(0).standard_normal((20, 8))
    >>> state = plucker.MixState([1, 2, 4], 8)
    >>> last = [state.step(token) for token in z][-1]
    >>> bool((last == plucker.mix(z, [1, 2, 4])[-1]).all())
    True
    >>> state
    MixState(offsets=[1, 2, 4], r=8) <20 tokens of float64, batch ()>
    """

    def __init__(
        self,
        offsets: Any,
        r: int,
        *,
        W: Array | None = None,
        b: Array | None = None,
        weights: Array | None = None,
        weighting: str | None = None,
        norm: str | None = "clamp",
        eps: float = 1e-8,
        order: str = "current-first",
        bias: str = "weighted",
        rope: str | None = None,
        rope_base: float = 10000.0,
        rope_start: Any = 0,
    ) -> None:
        self.offsets = offset_list(offsets, True, "decoding has no tokens ahead")
        self.r = whole_number(r, "r", 2)
        if self.r > 65536:
            raise ValueError(f"r must be at most 65536, got {self.r}: its pairs are more than 2³¹")
        self._W, self._b = _own(W, "W"), _own(b, "b")
        if weighting is None:
            weighting = "mean" if weights is None else "given"
        given: dict[str, Any] = {
            "norm": norm,
            "eps": eps,
            "weighting": weighting,
            "order": order,
            "bias": bias,
            "rope": rope,
            "rope_base": rope_base,
            "rope_start": rope_start,
        }
        starts = first_positions(rope_start, np.shape(rope_start))
        self._per_sequence = starts is not None
        self._choices = tuple(
            given[name] for name in ("weighting", "norm", "eps", "order", "bias", "rope", "rope_base")
        )
        start = 0 if self._per_sequence else rope_start
        _core.check_mixing(
            self.offsets, weighting != "mean", weighting, norm, eps, order, bias, rope, rope_base, start, self.r
        )
        # Plain values, as they come back from an archive, whatever the caller's were.
        self._options: dict[str, Any] = {name: None if x is None else str(x) for name, x in given.items()}
        self._options.update(eps=float(eps), rope_base=float(rope_base))
        self._options["rope_start"] = (
            operator.index(rope_start) if starts is None else np.array(starts, np.int64).reshape(np.shape(rope_start))
        )
        if weights is not None and weighting == "mean":
            raise ValueError("weighting='mean' takes no weights; 'given' and 'softmax' do")
        self._weights = _own(weights, "weights")
        self._listed = isinstance(weights, (list, tuple))  # numbers without a dtype: they take that of the tokens
        if self._weights is not None:
            if self._listed:
                self._weights = self._weights.astype(np.float64)
            _dtype(self._weights, "weights")
            if tuple(self._weights.shape) != (len(self.offsets),):
                raise ValueError(f"weights must have shape ({len(self.offsets)},), got {self._weights.shape}")
        pairs = math.comb(self.r, 2)
        self._dtype: Any = None  # a NumPy dtype, or the name of one on a CUDA device
        if self._W is None:
            if self._b is not None:
                raise ValueError("b is given and W is not")
            self._width = pairs
        else:
            self._dtype = _dtype(self._W, "W")
            if len(self._W.shape) != 2 or self._W.shape[1] != pairs or self._W.shape[0] == 0:
                raise ValueError(
                    f"W must have shape (d, {pairs}), a column for each pair of {self.r} dimensions, "
                    f"got {tuple(self._W.shape)}"
                )
            self._width = int(self._W.shape[0])
            if self._b is not None and _dtype(self._b, "b") != self._dtype:
                raise TypeError(f"b must be {self._dtype} as W is, got {self._b.dtype}")
            if self._b is not None and tuple(self._b.shape) != (self._width,):
                raise ValueError(f"b must have shape ({self._width},), got {tuple(self._b.shape)}")
        self._core: Any = None
        self._batch: tuple[int, ...] = ()

    # -- use -----------------------------------------------------------------------------------------------------------

    @property
    def position(self) -> int:
        """Tokens seen so far."""
        return 0 if self._core is None else int(self._core.position())

    def _begin(self, dtype: np.dtype[Any], batch: tuple[int, ...], name: str) -> None:
        """Makes the kernel's state at the first token, and checks all later ones against it."""
        if self._core is not None:
            if dtype != self._dtype:
                raise TypeError(f"{name} must be {self._dtype} as the tokens before were, got {dtype}")
            if batch != self._batch:
                raise ValueError(f"{name} is a batch of shape {batch}, and the tokens before were of {self._batch}")
            return
        if self._dtype is not None and dtype != self._dtype:
            raise TypeError(f"{name} must be {self._dtype} as W is, got {dtype}")
        make = _core.MixStateF32 if dtype == np.float32 else _core.MixStateF64
        chosen = (self._choices[0] != "mean", *self._choices, self._options["rope_start"], batch)
        self._core = make(self.r, math.prod(batch), self._W, self._b, self.offsets, *chosen)
        self._dtype, self._batch = dtype, batch
        if self._weights is not None and self._listed:
            self._weights = self._weights.astype(dtype)

    def _row_weights(self, weights: Array | None, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Any:
        if self._options["weighting"] == "mean":
            if weights is not None:
                raise ValueError("weighting='mean' takes no weights; 'given' and 'softmax' do")
            return None
        w = self._weights if weights is None else numbers_for(weights, "weights", dtype)
        if w is None:
            raise ValueError(f"weighting={self._options['weighting']!r} needs weights, one for each offset")
        if check_float(w, "weights") != dtype:
            raise TypeError(f"weights must be {dtype} as z is, got {w.dtype}")
        m = len(self.offsets)
        try:
            w = np.broadcast_to(w, (*shape, m))
        except ValueError:
            raise ValueError(f"weights, shape {w.shape}, do not broadcast to {(*shape, m)}") from None
        return w if w.ndim == 2 else w.reshape(-1, m)

    def step(
        self, z_t: Array, *, weights: Array | None = None, mask: Array | None = None, out: Array | None = None
    ) -> Array:
        """The mixed coordinates ``(..., C(r, 2))`` of the next token ``z_t (..., r)``, or their projection.

        Parameters
        ----------
        z_t : array (..., r)
            NaN or infinity where the mask is not False is a ValueError, and the state stays as it was; on a CUDA device
            they go through.
        weights : array, broadcast to (..., m), optional
            Instead of those of the constructor.
        mask : boolean array, broadcast to (...), optional
            False: this token takes no part, now or later.
        out : array, optional
            Must share no memory with ``z_t`` or ``weights``.
        """
        if self._on_device(z_t):
            return self._device_step(z_t, weights, mask, out)
        z_t = as_array(z_t, "z_t")
        dtype = check_float(z_t, "z_t")
        shape = tuple(z_t.shape)
        if not shape or shape[-1] != self.r:
            raise ValueError(f"z_t must have shape (..., {self.r}), got {shape}")
        batch = shape[:-1]
        valid = None if mask is None else mask_array(mask, batch, dtype).reshape(1, -1)
        library = library_of(z_t)
        result, fresh = output(out, (*batch, self._width), dtype, library)
        plain = z_t if type(z_t) is np.ndarray else detached(z_t)
        if not fresh:
            _core.check_no_overlap(detached(result), plain, "out", "z_t", False)
        new = self._core is None
        self._begin(dtype, batch, "z_t")
        try:
            rows = self._row_weights(weights, dtype, batch)
            if rows is not None and not fresh:
                _core.check_no_overlap(detached(result), rows, "out", "weights", False)
            self._step(plain, rows, valid, result if fresh else detached(result), batch, dtype)
        except BaseException:  # an interrupt, too
            if new:
                self._forget()
            raise
        return finish(result, fresh, library)

    def _step(self, z: Array, rows: Any, valid: Any, result: Any, batch: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        if len(batch) == 1:
            self._core.step(z, rows, valid, result)
        elif isinstance(result, np.ndarray) and result.flags.c_contiguous:
            self._core.step(numpy(z).reshape(-1, self.r), rows, valid, result.reshape(-1, self._width))
        else:
            flat = np.empty((math.prod(batch), self._width), dtype)
            self._core.step(numpy(z).reshape(-1, self.r), rows, valid, flat)
            numpy(result)[...] = flat.reshape((*batch, self._width))

    def prefill(self, z: Array, *, mask: Array | None = None) -> MixState:
        """Take in a prompt ``z (..., T, r)``, ``mask (..., T)``; :func:`mix_project` gives its results."""
        if self._on_device(z):
            return self._device_prefill(z, mask)
        z = as_array(z, "z")
        dtype = check_float(z, "z")
        shape = tuple(z.shape)
        if len(shape) < 2 or shape[-1] != self.r:
            raise ValueError(f"z must have shape (..., T, {self.r}), got {shape}")
        valid = None if mask is None else mask_array(mask, shape[:-1], dtype)
        new = self._core is None
        if new and shape[-2] == 0:
            return self
        self._begin(dtype, shape[:-2], "z")
        try:
            self._core.prefill(detached(z), valid)
        except BaseException:  # an interrupt, too
            if new:
                self._forget()
            raise
        return self

    # -- on a CUDA device ----------------------------------------------------------------------------------------------

    def _on_device(self, z: Array) -> bool:
        there = device_of(z) is not None
        for x, name in ((self._W, "W"), (self._b, "b"), (self._weights, "weights")):
            if x is not None and not (self._listed and name == "weights") and (type(x) is np.ndarray) == there:
                where = "on the CPU" if there else "on a CUDA device"  # copies of what is on the CPU are NumPy's
                raise TypeError(f"{name} is {where} and the token is not; move one of them")
        if self._core is not None and isinstance(self._core, Ring) != there:
            raise TypeError("the tokens before were on another device than this one; reset() begins anew")
        return there

    def _device_begin(self, z: Array, batch: tuple[int, ...], name: str, **others: Any) -> DeviceMemory:
        if self._per_sequence:
            raise TypeError("rope_start with a position for each sequence is not implemented on CUDA devices")
        place = memory_of(**{name: z}, W=self._W, **others)
        dtype = check_dtype(z, name)
        known = None if self._W is None and self._core is None else str(self._dtype)
        if known is not None and dtype != known:
            raise TypeError(
                f"{name} must be {known} as {'W is' if self._core is None else 'the tokens before were'}, got {dtype}"
            )
        if self._core is None:
            self._core = Ring(place, self.r, batch, dtype, self.offsets)
            self._dtype, self._batch = dtype, batch
        elif batch != self._batch:
            raise ValueError(f"{name} is a batch of shape {batch}, and the tokens before were of {self._batch}")
        elif self._core.place.device != place.device:
            raise ValueError(f"{name} is on CUDA device {place.device}, the tokens before on {self._core.place.device}")
        return place

    def _device_step(self, z: Array, weights: Array | None, mask: Array | None, out: Array | None) -> Array:
        shape = tuple(z.shape)
        if not shape or shape[-1] != self.r:
            raise ValueError(f"z_t must have shape (..., {self.r}), got {shape}")
        if self._options["weighting"] == "mean" and weights is not None:
            raise ValueError("weighting='mean' takes no weights; 'given' and 'softmax' do")
        w = self._weights if weights is None else weights
        if w is None and self._options["weighting"] != "mean":
            raise ValueError(f"weighting={self._options['weighting']!r} needs weights, one for each offset")
        if isinstance(w, np.ndarray):
            raise TypeError("weights is on the CPU and z_t on a CUDA device; pass weights that are there")
        new = self._core is None
        place = self._device_begin(z, shape[:-1], "z_t", weights=w, mask=mask, out=out)
        try:
            if w is not None and (check_dtype(w, "weights") != str(self._dtype) or w.shape[-1] != len(self.offsets)):
                raise ValueError(
                    f"weights must be {self._dtype} of shape (..., {len(self.offsets)}), "
                    f"got {dtype_name(w)} of shape {tuple(w.shape)}"
                )
            result = place.output(out, (*shape[:-1], self._width), str(self._dtype))
            rows = None if w is None else detached(w)
            chosen = (*self._choices, self._options["rope_start"])
            self._core.step(detached(z), rows, mask, self._W, self._b, chosen, detached(result))
        except BaseException:  # an interrupt, too
            if new:
                self._forget()
            raise
        return finish(result, False, place.library)

    def _device_prefill(self, z: Array, mask: Array | None) -> MixState:
        shape = tuple(z.shape)
        if len(shape) < 2 or shape[-1] != self.r:
            raise ValueError(f"z must have shape (..., T, {self.r}), got {shape}")
        new = self._core is None
        if new and shape[-2] == 0:
            return self
        self._device_begin(z, shape[:-2], "z", mask=mask)
        try:
            self._core.put(detached(z), mask)
        except BaseException:  # an interrupt, too
            if new:
                self._forget()
            raise
        self._core.count += int(shape[-2])
        return self

    def _forget(self) -> None:
        self._core, self._batch = None, ()
        self._dtype = None if self._W is None else _dtype(self._W, "W")

    def reset(self) -> MixState:
        """Forget all tokens; the next one may be of another batch."""
        self._forget()
        return self

    # -- saving --------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return sealed_state(self._state())

    def _state(self) -> dict[str, Any]:
        if isinstance(self._core, Ring) or any(on_device(x) for x in (self._W, self._b, self._weights)):
            raise TypeError("a state on a CUDA device is not saved; copy() keeps one, and its tokens can be fed again")
        tokens, counts, position = (None, None, 0) if self._core is None else self._core.past()
        return {
            "format": _FORMAT,
            "offsets": np.array(self.offsets, dtype=np.int64),
            "r": self.r,
            **self._options,
            "W": self._W,
            "b": self._b,
            "weights": self._weights,
            "listed": self._listed,
            "batch": np.array(self._batch, dtype=np.int64),
            "started": self._core is not None,
            "tokens": tokens,
            "counts": counts,
            "position": position,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._restore(checked_state(state, "MixState", _FORMAT, _NEEDED))

    def _restore(self, state: dict[str, Any]) -> None:
        self.__init__(  # type: ignore[misc]
            np.asarray(state["offsets"]).tolist(),
            int(state["r"]),
            W=state["W"],
            b=state["b"],
            weights=state["weights"].tolist() if state["listed"] else state["weights"],
            **{name: state[name] for name in _OPTIONS},
        )
        if not state["started"]:
            return
        tokens, counts, position = np.asarray(state["tokens"]), np.asarray(state["counts"]), int(state["position"])
        batch = tuple(np.asarray(state["batch"]).tolist())
        kept = min(position, max(self.offsets))
        if not 0 <= position < 2**40 or min(batch, default=0) < 0:
            raise ValueError(f"position is {position}, batch is {batch}")
        wanted = (kept, math.prod(batch), self.r)
        if tokens.shape != wanted or counts.shape != wanted[:2]:
            raise ValueError(
                f"tokens have shape {tokens.shape} and counts {counts.shape}, wanted {wanted} and {wanted[:2]}"
            )
        self._begin(check_float(tokens, "tokens"), batch, "tokens")
        self._core.restore(tokens, counts, position)

    def copy(self) -> MixState:
        """An independent copy: to try several continuations of one past."""
        new = MixState.__new__(MixState)
        if isinstance(self._core, Ring) or any(on_device(x) for x in (self._W, self._b, self._weights)):
            new.__dict__.update(self.__dict__)
            new._core = None if self._core is None else self._core.copy()
        else:
            new._restore(self._state())
        return new

    __copy__ = copy

    def __deepcopy__(self, memo: dict[int, Any]) -> MixState:
        return self.copy()

    def save(self, path: str | os.PathLike[str] | bytes) -> None:
        """Write the state to ``path``, a NumPy ``.npz`` archive without pickles. Written aside, then renamed."""
        write_archive(path, self.__getstate__())

    @classmethod
    def load(cls, path: str | os.PathLike[str] | bytes) -> MixState:
        """Read what :meth:`save` wrote. ValueError names what is wrong with a file that is damaged or another kind."""
        state = read_archive(path, "MixState", _NEEDED, _NEEDED | {"checksum"})
        self = cls.__new__(cls)
        try:
            self.__setstate__(state)
        except Exception as e:  # whatever a wrong member makes the pieces below raise
            raise ValueError(f"{os.fsdecode(path)}: damaged MixState file ({e})") from e
        return self

    def __repr__(self) -> str:
        parts = [f"offsets={self.offsets}", f"r={self.r}"]
        if self._W is not None:
            parts.append(f"W=<{self._W.shape[0]} x {self._W.shape[1]}>")
        defaults = _defaults()
        implied = "mean" if self._weights is None else "given"
        defaults = {**defaults, "weighting": implied}
        for k, v in self._options.items():
            if isinstance(v, np.ndarray):
                parts.append(f"{k}={v.tolist()}" if v.size <= 4 else f"{k}=<{v.size} positions>")
            elif v != defaults[k]:
                parts.append(f"{k}={v!r}")
        if self._core is None:
            return f"MixState({', '.join(parts)}) <no tokens yet>"
        return f"MixState({', '.join(parts)}) <{self.position} tokens of {self._dtype}, batch {self._batch}>"


def _own(x: Array | None, name: str) -> Any:
    """A copy, where the array is."""
    if x is None:
        return None
    if on_device(x):
        return memory_of(**{name: x}).copied(detached(x))
    return np.array(numpy(detached(as_array(x, name))))


def _dtype(x: Any, name: str) -> Any:
    return check_dtype(x, name) if on_device(x) else check_float(x, name)


def _defaults() -> dict[str, Any]:
    defaults = MixState.__init__.__kwdefaults__
    assert defaults is not None
    return defaults
