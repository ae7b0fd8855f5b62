"""Low-rank projection of gradients."""

from __future__ import annotations

from collections import deque
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np

from subspan import _core
from subspan._lib.arrays import Array, as_array, detached, library_of
from subspan._lib.call import Call, call_of
from subspan._lib.device import dtype_name
from subspan._lib.files import Fixed, checked_state, sealed_state
from subspan._lib.numbers import choice, real_number, rng_key, truth, whole_number
from subspan.orth.int4 import Int4Basis, quantize_int4

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["GradientProjector"]


_FORMAT = "subspan.GradientProjector/2"


class GradientProjector(Fixed):
    """Low-rank projection of a gradient, as GaLore and Q-GaLore use it.

    ``down`` gives the small gradient that the optimiser works on, ``up`` takes its update back. The basis is that of
    the leading singular vectors of a recent gradient; :meth:`refresh` finds the next one from the last by subspace
    iteration, which costs two products with the gradient instead of a full SVD.

    Parameters
    ----------
    rank : int
    side : {"auto", "left", "right"}
        Which singular vectors make the basis ``P``. Right: ``down(G) = G P``, ``(m, r)``; left: ``PᵀG``, ``(r, n)``.
        ``"auto"`` is right where ``m >= n``, as in GaLore.
    refresh : int, default 200
        ``down`` refreshes the basis at its first call and every so many calls after it. 0: only when told.
    bits : {None, 4}
        4 keeps the basis as :class:`Int4Basis`.
    adapt : bool, default False
        Q-GaLore's lazy rule: when the mean of the last ``history`` values of ``|cos|`` between the first singular
        vectors of consecutive bases is at least ``threshold``, the interval doubles; when it is below half of that,
        it halves, down to ``refresh``. Signs of singular vectors are arbitrary, so magnitudes are compared; the
        history starts anew after each change, so that one calm stretch doubles the interval once.
    scale : float, default 1.0
        ``up`` multiplies by it (GaLore's alpha, 0.25 there).
    iterations : int, default 1
        Subspace iterations of a warm refresh.
    group : int, default 256
        Entries that share a scale and a zero point, as in :func:`quantize_int4`.
    rng : None, int or numpy.random.Generator
        Seeds the start of the first refresh and the random directions that later ones add.

    Attributes
    ----------
    basis : array (n, r) or (m, r), Int4Basis, or None before the first refresh
    interval : int
        Calls of ``down`` between two refreshes, as it is now.
    similarity : list of float
        The last values of ``|cos|``.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.orth import GradientProjector
    >>> rng = np.random.default_rng(0)
    >>> G = rng.standard_normal((64, 4)) @ rng.standard_normal((4, 48))
    >>> p = GradientProjector(4, rng=0)
    >>> R = p.down(G)
    >>> R.shape, np.allclose(p.up(R), G)
    ((64, 4), True)
    """

    _OPTIONS = ("rank", "side", "bits", "history", "group")  # what a basis is made with
    _FREE = ("adapt", "threshold", "scale", "iterations")
    _dtype_there: str | None = None  # of gradients; None in earlier pickles of the CPU

    def __init__(
        self,
        rank: int,
        *,
        side: str = "auto",
        refresh: int = 200,
        bits: int | None = None,
        adapt: bool = False,
        threshold: float = 0.4,
        history: int = 5,
        scale: float = 1.0,
        iterations: int = 1,
        group: int = 256,
        rng: int | np.random.Generator | None = None,
    ) -> None:
        self.rank = whole_number(rank, "rank", 1)
        self.side = choice(side, "side", "auto", "left", "right")
        self.base_interval = self.interval = whole_number(refresh, "refresh", 0)
        if bits is not None and whole_number(bits, "bits", 1) != 4:
            raise ValueError(f"bits must be None or 4, got {bits!r}")
        self.bits, self.adapt = bits, truth(adapt, "adapt")
        self.threshold, self.scale = real_number(threshold, "threshold"), real_number(scale, "scale")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be in (0, 1], got {threshold}")
        self.history = whole_number(history, "history", 1, 2**20)
        self.iterations = whole_number(iterations, "iterations", 1, 2**20)
        self.group = whole_number(group, "group", 1)
        self.basis: Any = None
        self.similarity: deque[float] = deque(maxlen=self.history)
        self.refreshes = 0
        self._key = rng_key(rng)
        self._since = 0
        self._first: Any = None
        self._shape: tuple[int, ...] | None = None
        self._turn = _core.Turn()

    def __getstate__(self) -> dict[str, Any]:
        with self._turn:
            state = {k: v for k, v in self.__dict__.items() if k != "_turn"}
            basis = self.basis.__getstate__() if isinstance(self.basis, Int4Basis) else self.basis
            state.update(basis=basis, similarity=list(self.similarity))
        return sealed_state({"format": _FORMAT, **state})

    def __setstate__(self, state: dict[str, Any]) -> None:
        needed = {"rank", "history", "basis", "similarity"}
        state = dict(checked_state(state, "GradientProjector", _FORMAT, needed, sealed=False))
        basis = state.pop("basis")
        if isinstance(basis, dict):
            packed = Int4Basis.__new__(Int4Basis)
            packed.__setstate__(basis)
            basis = packed
        similarity = deque(state.pop("similarity"), maxlen=state["history"])
        self.__dict__.clear()
        self.__dict__.update({k: v for k, v in state.items() if k not in ("format", "checksum")})
        self.__dict__.update(basis=basis, similarity=similarity, _turn=_core.Turn())

    def _call(self, x: Array, name: str, out: Array | None = None) -> tuple[Call, Array]:
        """The call of a gradient or an update, which must be where the basis is, and that array."""
        x = detached(as_array(x, name), name)
        return call_of(**{name: x}, basis=self.basis, out=out), x

    def _known(self) -> tuple[Any, str] | None:
        """Shape and dtype of the gradients before."""
        return None if self.basis is None else (self._shape, self._dtype_there or dtype_name(self._first))

    def refresh(self, G: Array) -> GradientProjector:
        """Find the basis of the gradient ``G (m, n)``, from the last basis where there is one.

        Two products of ``2 m n r`` flops for each iteration, and ``O((m + n) r²)``. With ``adapt`` it also updates
        the interval.
        """
        with self._turn:
            self._refresh([self], [self._call(G, "G")], ["G"])
        return self

    @staticmethod
    def _refresh(
        projectors: Sequence[GradientProjector], calls: Sequence[tuple[Call, Array]], names: list[str]
    ) -> None:
        """New bases for all, in one call for each library and device; nothing changes where one of them fails."""
        places: dict[Any, list[int]] = {}
        jobs: list[Any] = []
        for i, (p, (call, g), name) in enumerate(zip(projectors, calls, names, strict=True)):
            start, more, power, key = None, 10, 2, p._key
            if p.basis is not None:
                # A few random directions beside the last basis find what has turned up since.
                start = p.basis.to_array() if isinstance(p.basis, Int4Basis) else p.basis
                more, power, key = max(8, p.rank // 8), p.iterations - 1, p._key + p.refreshes
            key = rng_key(np.random.default_rng(key))
            jobs.append((g, name, p._known(), p.rank, p.side, start, p._first, key, more, power))
            places.setdefault((call.library, call.context and call.context[1]), []).append(i)
        found: dict[int, Any] = {}
        for some in places.values():
            call = calls[some[0]][0]
            for i, (basis, first, cosine) in zip(
                some, call.kernels.refresh_bases(call.context, [jobs[i] for i in some]), strict=True
            ):
                p = projectors[i]
                basis = call.give(basis)
                found[i] = (quantize_int4(basis, p.group) if p.bits == 4 else basis, first, cosine)
        for i, new in found.items():
            projectors[i]._take(jobs[i][0], *new)

    def _take(self, G: Array, basis: Any, first: Any, cosine: float | None) -> None:
        """What a refresh has found."""
        similarity, interval = deque(self.similarity, maxlen=self.history), self.interval
        if cosine is not None:
            similarity.append(cosine)
            interval = self._adapted(similarity)
        # In one step: an interrupt leaves the projector as it was, or as it is to be.
        self.__dict__.update(
            similarity=similarity,
            interval=interval,
            basis=basis,
            _first=first,
            _shape=tuple(int(x) for x in G.shape),
            _dtype_there=dtype_name(G),
            _since=0,
            refreshes=self.refreshes + 1,
        )

    @staticmethod
    def refresh_all(projectors: Sequence[GradientProjector], gradients: Sequence[Array]) -> None:
        """:meth:`refresh` of many, each with its gradient.

        On a CUDA device the small problems of all matrices of one rank and dtype are solved in the same launches, and
        the host waits once; on the CPU one follows the other. Nothing changes where a gradient holds NaN or infinity.
        """
        projectors, gradients = list(projectors), list(gradients)
        for i, p in enumerate(projectors):
            if not isinstance(p, GradientProjector):
                raise TypeError(f"projectors[{i}] must be a GradientProjector, got {type(p).__name__}")
        if len(projectors) != len(gradients):
            raise ValueError(f"there are {len(projectors)} projectors and {len(gradients)} gradients")
        if len({id(p) for p in projectors}) != len(projectors):
            raise ValueError("projectors holds one twice")
        with ExitStack() as turns:
            for p in sorted(projectors, key=id):  # in one order, as two threads may have lists of the same ones
                turns.enter_context(p._turn)
            names = [f"gradients[{i}]" for i in range(len(gradients))]
            calls = [p._call(G, name) for p, G, name in zip(projectors, gradients, names, strict=True)]
            GradientProjector._refresh(projectors, calls, names)

    def _adapted(self, similarity: deque[float]) -> int:
        """The interval after these values, which are forgotten where it changes."""
        if not self.adapt or len(similarity) < self.history:
            return self.interval
        mean = sum(similarity) / len(similarity)
        if mean >= self.threshold:
            similarity.clear()
            return self.interval * 2
        if mean < self.threshold / 2 and self.interval > self.base_interval:
            similarity.clear()
            return max(self.base_interval, self.interval // 2)
        return self.interval

    def down(self, G: Array, *, out: Array | None = None) -> Array:
        """The small gradient: ``G P (m, r)`` or ``PᵀG (r, n)``. Refreshes the basis when its time has come.

        On a CUDA device only a refresh waits, and finds NaN; other calls pass it on.
        """
        with self._turn:
            call, g = self._call(G, "G", out)
            # No memory for the result is no reason to have a new basis.
            right, target = self._output(call, g, "G", False, out)
            if self.basis is None or (self.interval > 0 and self._since >= self.interval):
                self._refresh([self], [(call, g)], ["G"])
            self._multiply(call, g, "G", right, not right, 1.0, target)
            self._since += 1
        return call.give(target, out)

    def up(self, R: Array, *, out: Array | None = None) -> Array:
        """The update at full size: ``scale · R Pᵀ`` or ``scale · P R``, ``(m, n)``."""
        with self._turn:
            if self.basis is None or self._shape is None:
                raise ValueError("there is no basis yet: call down or refresh first")
            call, x = self._call(R, "R", out)
            right, target = self._output(call, x, "R", True, out)
            self._multiply(call, x, "R", right, right, self.scale, target)
        return call.give(target, out)

    def _output(self, call: Call, x: Array, name: str, up: bool, out: Array | None) -> tuple[bool, Any]:
        """Whether the basis is of right singular vectors, and where the product goes; ``x`` is looked at."""
        known = self._known()
        right, target = call.kernels.gradient_output(call.context, x, name, known, self.rank, self.side, up, out)
        return right, target

    def _multiply(self, call: Call, x: Any, name: str, right: bool, transpose: bool, scale: float, out: Any) -> None:
        if isinstance(self.basis, Int4Basis):
            side = "right" if right else "left"
            call.kernels.int4_product(call.context, self.basis._parts(), x, side, transpose, scale, out, True, name)
        else:
            p = self.basis
            if transpose:
                p = p.mT if library_of(p) == "torch" else p.swapaxes(-1, -2)
            call.kernels.product(call.context, x, p, right, scale, out, name)

    def __repr__(self) -> str:
        kind = "no basis yet" if self.basis is None else f"gradients {self._shape}, refreshed {self.refreshes} times"
        options = f"rank={self.rank}, side={self.side!r}, interval={self.interval}, bits={self.bits}"
        return f"GradientProjector({options}: {kind})"
