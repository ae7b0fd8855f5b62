"""Mixing token by token."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from subspan import _core
from subspan._lib.arrays import Array, as_array, check_float, detached
from subspan._lib.call import Call, call_of
from subspan._lib.device import memory_of, numpy, on_device
from subspan._lib.files import Kept, checked_state, sealed_state
from subspan._lib.numbers import whole_number

__all__ = ["MixState"]

_FORMAT = "subspan.plucker.MixState/2"
_CHOICES = ("weighting", "norm", "eps", "order", "bias", "rope", "rope_base", "rope_start")


class MixState(Kept):
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

    _OPTIONS = ("offsets", "r")
    _PARTS = ("W", "b", "weights", "listed", "batch", "started", "tokens", "counts", "position")
    _NEEDED, _MORE = frozenset({"format", *_OPTIONS, *_PARTS, *_CHOICES}), frozenset({"checksum"})

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
        self.r = whole_number(r, "r", 2, 65536)  # beyond, there are more than 2³¹ pairs
        self._W, self._b, self._weights = _own(W, "W"), _own(b, "b"), _own(weights, "weights")
        self._listed = isinstance(weights, (list, tuple))  # numbers without a dtype: they take that of the tokens
        if self._weights is not None and self._listed:
            self._weights = self._weights.astype(np.float64)
        weighting = ("mean" if weights is None else "given") if weighting is None else weighting
        start = _core.first_positions(rope_start)
        first = start if isinstance(start, int) else 0
        given: Any = (weighting, norm, eps, order, bias, rope, rope_base, first)
        call = call_of(W=self._W, b=self._b, weights=self._weights)
        parts = (self._W, self._b, self._weights)
        self.offsets = call.kernels.check_mixing(call.context, self.r, *parts, offsets, *given)
        # Plain values, as they come back from an archive, whatever the caller's were.
        plain: Any = {name: None if x is None else str(x) for name, x in zip(_CHOICES, given, strict=True)}
        plain.update(eps=float(eps), rope_base=float(rope_base), rope_start=start)
        self._options: dict[str, Any] = plain
        self._turn = _core.Turn()  # of the first token, and of prompts
        self._state = None

    # -- use -----------------------------------------------------------------------------------------------------------

    @property
    def position(self) -> int:
        """Tokens seen so far."""
        return 0 if self._state is None else int(self._state.position())

    def _began(self, call: Call, z: Array, axes: int) -> Any:
        """The kernels' state, which the first tokens begin."""
        if self._state is not None:
            return self._state
        w = self._weights
        if w is not None and self._listed:
            w = w.astype(check_float(z, "z"))
        parts = (self._W, self._b, w, self.offsets)
        return call.kernels.MixState(call.context, z, axes, self.r, *parts, *self._options.values())

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
        if self._state is None:
            with self._turn:
                return self._step(z_t, weights, mask, out)
        return self._step(z_t, weights, mask, out)

    def _step(self, z_t: Array, weights: Any, mask: Array | None, out: Array | None) -> Array:
        z_t = as_array(z_t, "z_t")
        own = self._weights if weights is None else weights
        call = call_of(z_t=z_t, W=self._W, b=self._b, weights=own, mask=mask, out=out)
        state = self._began(call, z_t, 1)
        result = state.step(call.context, z_t, weights, mask, out)
        if self._state is None:
            self._state = state
        return call.give(result, out)

    def prefill(self, z: Array, *, mask: Array | None = None) -> MixState:
        """Take in a prompt ``z (..., T, r)``, ``mask (..., T)``; :func:`mix_project` gives its results."""
        z = as_array(z, "z")
        call = call_of(z=z, W=self._W, b=self._b, weights=self._weights, mask=mask)
        with self._turn:
            state = self._began(call, z, 2)
            if self._state is None and z.shape[-2] == 0:
                return self
            state.prefill(call.context, z, mask)
            self._state = state
        return self

    def reset(self) -> MixState:
        """Forget all tokens; the next one may be of another batch."""
        self._state = None
        return self

    # -- saving --------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        if any(on_device(x) for x in (self._W, self._b, self._weights)):
            raise TypeError("a state on a CUDA device is not saved; copy() keeps one, and its tokens can be fed again")
        tokens, counts, position = (None, None, 0) if self._state is None else self._state.past()
        past = {"started": self._state is not None, "tokens": tokens, "counts": counts, "position": position}
        given = {"W": self._W, "b": self._b, "weights": self._weights, "listed": self._listed}
        batch = () if self._state is None else self._state.batch()
        sizes = {"offsets": np.array(self.offsets, np.int64), "r": self.r, "batch": np.array(batch, np.int64)}
        return sealed_state({"format": _FORMAT, **sizes, **self._options, **given, **past})

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = checked_state(state, "MixState", _FORMAT, self._NEEDED)
        self.__dict__.clear()
        self.__init__(  # type: ignore[misc]
            np.asarray(state["offsets"]).tolist(),
            int(state["r"]),
            W=state["W"],
            b=state["b"],
            weights=state["weights"].tolist() if state["listed"] else state["weights"],
            **{name: state[name] for name in _CHOICES},
        )
        if not state["started"]:
            return
        tokens, batch = np.asarray(state["tokens"]), tuple(np.asarray(state["batch"]).tolist())
        if min(batch, default=0) < 0 or math.prod(batch) > 2**58:
            raise ValueError(f"batch is {batch}")
        like = np.broadcast_to(np.zeros((), tokens.dtype), (*batch, self.r))
        began = self._began(call_of(), like, 1)
        began.restore(tokens, np.asarray(state["counts"]), int(state["position"]))
        self._state = began

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
        of = f"{self._state.dtype()}, batch {self._state.batch()}"
        return f"MixState({', '.join(parts)}) <{self.position} tokens of {of}>"


def _own(x: Array | None, name: str) -> Any:
    """A copy, where the array is."""
    if x is None:
        return None
    if on_device(x):
        return memory_of(**{name: x}).copied(detached(x, name))
    return np.array(numpy(as_array(x, name), name))
