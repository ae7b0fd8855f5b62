"""Mixing token by token."""

from __future__ import annotations

import math
import operator
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from subspan import _core
from subspan._lib.arrays import Array, as_array, check_float, detached
from subspan._lib.call import Call, call_of
from subspan._lib.device import check_dtype, memory_of, numpy, on_device
from subspan._lib.files import checked_state, loaded, sealed_state, write_archive
from subspan._lib.numbers import whole_number
from subspan.plucker.common import beside, first_positions

if TYPE_CHECKING:
    import os

__all__ = ["MixState"]

_FORMAT = "subspan.plucker.MixState/2"
_OPTIONS = ("weighting", "norm", "eps", "order", "bias", "rope", "rope_base", "rope_start")
_MEMBERS = ("format", "offsets", "r", "W", "b", "weights", "listed", "batch", "started", "tokens", "counts", "position")
_NEEDED = {*_MEMBERS, *_OPTIONS}


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
        As for :func:`mix_project`; ``rope_start`` is the position of the first token of the state, and ``weights`` has
        shape ``(m,)`` (:meth:`step` can replace it for a single token).

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

    _state: Any
    _batch: tuple[int, ...]
    _dtype: Any  # a NumPy dtype, or the name of one on a CUDA device

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
        self.r = whole_number(r, "r", 2)
        if self.r > 65536:
            raise ValueError(f"r must be at most 65536, got {self.r}: its pairs are more than 2³¹")
        self._W, self._b = _own(W, "W"), _own(b, "b")
        weighting = ("mean" if weights is None else "given") if weighting is None else weighting
        starts = first_positions(rope_start, np.shape(rope_start))
        first = 0 if starts is not None else rope_start
        given: Any = (weighting, norm, eps, order, bias, rope, rope_base)
        self.offsets = _core.check_mixing(
            offsets, weighting != "mean", weighting, norm, eps, order, bias, rope, rope_base, first, self.r
        )
        # Plain values, as they come back from an archive, whatever the caller's were.
        plain: Any = {name: None if x is None else str(x) for name, x in zip(_OPTIONS, (*given, first), strict=True)}
        plain.update(eps=float(eps), rope_base=float(rope_base), rope_start=operator.index(first))
        if starts is not None:
            plain["rope_start"] = np.array(starts, np.int64).reshape(np.shape(rope_start))
        self._options: dict[str, Any] = plain
        if weights is not None and weighting == "mean":
            raise ValueError("weighting='mean' takes no weights; 'given' and 'softmax' do")
        self._listed = isinstance(weights, (list, tuple))  # numbers without a dtype: they take that of the tokens
        self._weights = _own(weights, "weights")
        if self._weights is not None:
            if self._listed:
                self._weights = self._weights.astype(np.float64)
            _dtype(self._weights, "weights")
            if tuple(self._weights.shape) != (len(self.offsets),):
                raise ValueError(f"weights must have shape ({len(self.offsets)},), got {self._weights.shape}")
        pairs = math.comb(self.r, 2)
        if self._W is None and self._b is not None:
            raise ValueError("b is given and W is not")
        if self._W is not None:
            dtype, shape = _dtype(self._W, "W"), tuple(self._W.shape)
            if len(shape) != 2 or shape[1] != pairs or shape[0] == 0:
                raise ValueError(
                    f"W must have shape (d, {pairs}), a column for each pair of {self.r} dimensions, got {shape}"
                )
            if self._b is not None and _dtype(self._b, "b") != dtype:
                raise TypeError(f"b must be {dtype} as W is, got {self._b.dtype}")
            if self._b is not None and tuple(self._b.shape) != shape[:1]:
                raise ValueError(f"b must have shape ({shape[0]},), got {tuple(self._b.shape)}")
        self._turn = threading.Lock()  # of the first token, and of prompts
        self.reset()

    # -- use -----------------------------------------------------------------------------------------------------------

    @property
    def position(self) -> int:
        """Tokens seen so far."""
        return 0 if self._state is None else int(self._state.position())

    def _began(self, call: Call, z: Array, name: str, axes: int) -> Any:
        """The kernels' state, which the first token begins, for tokens that go with those before them."""
        shape, dtype = tuple(z.shape), _dtype(z, name)
        if len(shape) < axes or shape[-1] != self.r:
            raise ValueError(f"{name} must have shape (..., {'T, ' if axes == 2 else ''}{self.r}), got {shape}")
        batch = shape[:-axes]
        if self._state is not None:
            if dtype != self._dtype:
                raise TypeError(f"{name} must be {self._dtype} as the tokens before were, got {dtype}")
            if batch != self._batch:
                raise ValueError(f"{name} is a batch of shape {batch}, and the tokens before were of {self._batch}")
            if not isinstance(self._state, call.kernels.MixState):
                raise TypeError("the tokens before were on another device than this one; reset() begins anew")
            return self._state
        if self._W is not None and dtype != _dtype(self._W, "W"):
            raise TypeError(f"{name} must be {_dtype(self._W, 'W')} as W is, got {dtype}")
        made = (batch, str(dtype), self.r, self._W, self._b, self.offsets, self._options["weighting"] != "mean")
        return call.kernels.MixState(call.context, *made, *self._options.values())

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
        if self._options["weighting"] == "mean" and weights is not None:
            raise ValueError("weighting='mean' takes no weights; 'given' and 'softmax' do")
        w = self._weights if weights is None else weights
        if w is None and self._options["weighting"] != "mean":
            raise ValueError(f"weighting={self._options['weighting']!r} needs weights, one for each offset")
        if self._state is None:
            with self._turn:
                return self._step(z_t, w, mask, out)
        return self._step(z_t, w, mask, out)

    def _step(self, z_t: Array, w: Any, mask: Array | None, out: Array | None) -> Array:
        z_t = as_array(z_t, "z_t")
        call = call_of(z_t=z_t, W=self._W, b=self._b, weights=w, mask=mask, out=out)
        state = self._began(call, z_t, "z_t", 1)
        if w is self._weights and self._listed and call.context is None:
            w = w.astype(check_float(z_t, "z_t"))
        w, mask = beside(call, z_t, w, mask)
        result = state.step(call.context, z_t, w, mask, out)
        self._take(state, z_t, 1)
        return call.give(result, out)

    def prefill(self, z: Array, *, mask: Array | None = None) -> MixState:
        """Take in a prompt ``z (..., T, r)``, ``mask (..., T)``; :func:`mix_project` gives its results."""
        z = as_array(z, "z")
        call = call_of(z=z, W=self._W, b=self._b, weights=None if self._listed else self._weights, mask=mask)
        with self._turn:
            state = self._began(call, z, "z", 2)
            if self._state is None and z.shape[-2] == 0:
                return self
            _, mask = beside(call, z, None, mask)
            state.prefill(call.context, z, mask)
            self._take(state, z, 2)
        return self

    def _take(self, state: Any, z: Array, axes: int) -> None:
        if self._state is None:
            self._state, self._batch, self._dtype = state, tuple(z.shape)[:-axes], _dtype(z, "z")

    def reset(self) -> MixState:
        """Forget all tokens; the next one may be of another batch."""
        self._state, self._batch, self._dtype = None, (), None
        return self

    # -- saving --------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        if any(on_device(x) for x in (self._W, self._b, self._weights)):
            raise TypeError("a state on a CUDA device is not saved; copy() keeps one, and its tokens can be fed again")
        tokens, counts, position = (None, None, 0) if self._state is None else self._state.past()
        return sealed_state(
            {
                "format": _FORMAT,
                "offsets": np.array(self.offsets, dtype=np.int64),
                "r": self.r,
                **self._options,
                "W": self._W,
                "b": self._b,
                "weights": self._weights,
                "listed": self._listed,
                "batch": np.array(self._batch, dtype=np.int64),
                "started": self._state is not None,
                "tokens": tokens,
                "counts": counts,
                "position": position,
            }
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = checked_state(state, "MixState", _FORMAT, _NEEDED)
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
        tokens, batch = np.asarray(state["tokens"]), tuple(np.asarray(state["batch"]).tolist())
        if min(batch, default=0) < 0 or math.prod(batch) > 2**58:
            raise ValueError(f"batch is {batch}")
        like = np.broadcast_to(np.zeros((), tokens.dtype), (*batch, self.r))
        began = self._began(call_of(), like, "tokens", 1)
        began.restore(tokens, np.asarray(state["counts"]), int(state["position"]))
        self._take(began, like, 1)

    def copy(self) -> MixState:
        """An independent copy: to try several continuations of one past."""
        new = MixState.__new__(MixState)
        new.__dict__.update(self.__dict__, _turn=threading.Lock())
        new._state = None if self._state is None else self._state.copy()
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
        return loaded(cls, path, _NEEDED, _NEEDED | {"checksum"})  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        parts = [f"offsets={self.offsets}", f"r={self.r}"]
        if self._W is not None:
            parts.append(f"W=<{self._W.shape[0]} x {self._W.shape[1]}>")
        defaults = {
            **(MixState.__init__.__kwdefaults__ or {}),
            "weighting": "mean" if self._weights is None else "given",
        }
        for k, v in self._options.items():
            if isinstance(v, np.ndarray):
                parts.append(f"{k}={v.tolist()}" if v.size <= 4 else f"{k}=<{v.size} positions>")
            elif v != defaults[k]:
                parts.append(f"{k}={v!r}")
        if self._state is None:
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
