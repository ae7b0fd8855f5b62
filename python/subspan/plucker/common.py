"""Arguments that several functions share."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from subspan._lib.arguments import detached, numpy, on_the_cpu
from subspan._lib.arrays import (
    Array,
    as_array,
    check_float,
    is_sparse,
    library_of,
    real_number,
    to_library,
    truth,
    whole_number,
)
from subspan._lib.device import Place, check_dtype, on_device
from subspan.grassmann.common import one_of

NORMS: dict[str | None, int] = {None: 0, "clamp": 1, "soft": 2}
WEIGHTINGS = {"mean": 0, "given": 1, "softmax": 2}
ORDERS = {"current-first": False, "past-first": True}
BIASES = {"weighted": False, "always": True}
ROPES: dict[str | None, int] = {None: 0, "interleaved": 1, "half": 2}

Settings = tuple[int, float, int, bool, bool, int, float, tuple[int, ...]]
"""The last entry: the position of the first token, one for all sequences or one for each."""


def choice(value: Any, allowed: dict[Any, Any], name: str) -> Any:
    if not (value is None or isinstance(value, str)) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return allowed[value]


def offset_list(offsets: Any, causal: bool, advice: str = "pass causal=False if that is meant") -> list[int]:
    """Whole numbers, none of them zero, and none ahead where that was not asked for."""
    if isinstance(offsets, (str, bytes, dict, set)):
        raise TypeError(f"offsets must be whole numbers, got {offsets!r}")
    if not isinstance(offsets, Iterable) or getattr(offsets, "shape", None) == ():
        offsets = [offsets]
    out: list[int] = []
    for value in offsets:
        if len(out) == 65536:
            raise ValueError("offsets holds more than 65536 numbers")
        if isinstance(value, (bool, np.bool_)):
            raise TypeError(f"offsets must be whole numbers, got {value!r}")
        try:
            offset = operator.index(value)
        except TypeError:
            raise TypeError(f"offsets must be whole numbers, got {value!r}") from None
        if offset == 0:
            raise ValueError("offsets holds 0: a token with itself spans no plane, its wedge is zero")
        if offset < 0 and causal:
            raise ValueError(
                f"offsets holds {offset}: token t would see token t + {-offset}, which lies ahead; {advice}"
            )
        if abs(offset) >= 2**40:
            raise ValueError(f"offsets holds {offset}, which is more than any sequence has")
        out.append(offset)
    if not out:
        raise ValueError("offsets is empty: give at least one")
    return out


def settings(
    norm: str | None,
    eps: float,
    weighting: str,
    order: str,
    bias: str,
    rope: str | None,
    rope_base: float,
    rope_start: Any,
    r: int,
) -> Settings:
    """What the kernels take, checked."""
    small = real_number(eps, "eps", 0.0)
    if small >= 1e100:
        raise ValueError(f"eps must be below 1e100, got {eps!r}")
    kind = choice(rope, ROPES, "rope")
    base = real_number(rope_base, "rope_base")
    if base <= 0:
        raise ValueError(f"rope_base must be positive, got {rope_base!r}")
    if kind and r % 2:
        raise ValueError(f"rope turns pairs of dimensions, and z has an odd number of them, {r}")
    start = whole_number(rope_start, "rope_start", -(2**40) + 1, 2**40 - 1)
    return (
        choice(norm, NORMS, "norm"),
        small,
        one_of(weighting, WEIGHTINGS, "weighting"),
        choice(order, ORDERS, "order"),
        choice(bias, BIASES, "bias"),
        kind,
        base,
        (start,),
    )


def first_positions(rope_start: Any, batch: tuple[int, ...]) -> tuple[int, ...] | None:
    """The position of each sequence's first token, in C order of ``batch``; None where one number is meant for all."""
    if isinstance(rope_start, (int, np.integer)) and not isinstance(rope_start, (bool, np.bool_)):
        return None
    x = as_array(rope_start, "rope_start") if not isinstance(rope_start, (list, tuple)) else np.asarray(rope_start)
    on_the_cpu(x, "rope_start")
    values = np.asarray(numpy(x))
    if values.dtype.kind not in "iu":
        raise TypeError(
            f"rope_start must be an integer, or an array of them, one for each sequence, got {values.dtype}"
        )
    if values.size and not -(2**40) < int(values.min()) <= int(values.max()) < 2**40:
        raise ValueError("rope_start must be below 2**40 in magnitude")
    try:
        values = np.broadcast_to(values, batch)
    except ValueError:
        raise ValueError(f"rope_start, shape {values.shape}, does not broadcast to the sequences, {batch}") from None
    return tuple(values.ravel().tolist())


def with_positions(numbers: Settings, starts: tuple[int, ...] | None) -> Settings:
    """Settings with a position for each sequence."""
    return numbers if starts is None else (*numbers[:7], starts)


def _check(
    offsets: Any,
    causal: bool,
    unweighted: bool,
    weighting: str | None,
    norm: str | None,
    eps: float,
    *rest: Any,  # what settings takes after the weighting
) -> tuple[list[int], Settings]:
    causal = truth(causal, "causal")
    which = offset_list(offsets, causal)
    if weighting is None:
        weighting = "mean" if unweighted else "given"
    numbers = settings(norm, eps, weighting, *rest)
    if weighting == "mean" and not unweighted:
        raise ValueError("weighting='mean' takes no weights; 'given' and 'softmax' do")
    if weighting != "mean" and unweighted:
        raise ValueError(f"weighting={weighting!r} needs weights, one for each offset")
    return which, numbers


@functools.lru_cache(maxsize=256, typed=True)  # one by one: 1.0 and True have the hash of 1
def _checked_before(count: int, *given: Any) -> tuple[list[int], Settings]:
    return _check(given[:count], *given[count:])


def checked(offsets: Any, *rest: Any) -> tuple[list[int], Settings]:
    """The offsets and settings of a mixing call, as the kernels take them; a layer's are checked once."""
    try:
        if type(offsets) in (list, tuple):
            return _checked_before(len(offsets), *offsets, *rest)
    except TypeError:  # something that has no hash; or an error, which comes again
        pass
    return _check(offsets, *rest)


_CHOICES = (
    "weights",
    "weighting",
    "mask",
    "norm",
    "eps",
    "order",
    "causal",
    "rope",
    "rope_base",
    "rope_start",
    "bias",
)


def chosen(arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of a function's arguments that :func:`sequences` takes by name."""
    return {name: arguments[name] for name in _CHOICES if name in arguments}


class Sequences(NamedTuple):
    """The arguments of a mixing call, as the kernels take them."""

    z: Array
    weights: Any
    mask: Any
    offsets: list[int]
    settings: Settings
    dtype: Any
    library: str
    place: Place | None = None  # on a CUDA device: weights and mask as they came, dtype is a name

    @property
    def shape(self) -> tuple[int, ...]:
        """``(..., T)``."""
        return tuple(self.z.shape[:-1])

    @property
    def r(self) -> int:
        """Dimensions of a token."""
        return int(self.z.shape[-1])


def sequences(
    z: Array,
    offsets: Any,
    *,
    weights: Array | None,
    weighting: str | None,
    mask: Array | None,
    norm: str | None,
    eps: float,
    order: str,
    causal: bool,
    rope: str | None,
    rope_base: float,
    rope_start: Any,
    bias: str = "weighted",
) -> Sequences:
    there = on_device(z, weights, mask)
    if not there:
        z = as_array(z, "z")
    if not hasattr(z, "shape") or len(z.shape) < 2:
        raise ValueError(f"z must have shape (..., T, r), got {tuple(getattr(z, 'shape', ()))}")
    dtype: Any = check_dtype(z, "z") if there else check_float(z, "z")
    r = int(z.shape[-1])
    if r < 2:
        raise ValueError(f"z has tokens of {r} dimensions, and a plane needs at least 2")
    if r > 65536:
        raise ValueError(f"z has tokens of {r} dimensions, and at most 65536 are taken: their pairs are more than 2³¹")
    shape = tuple(z.shape[:-1])
    starts = first_positions(rope_start, shape[:-1])
    if starts is not None and there:
        raise TypeError("rope_start with a position for each sequence is not implemented on CUDA devices")
    start = rope_start if starts is None else 0
    which, numbers = checked(
        offsets, causal, weights is None, weighting, norm, eps, order, bias, rope, rope_base, start, r
    )
    numbers = with_positions(numbers, starts)
    if there:
        return on_a_device(z, weights, mask, which, numbers, dtype)
    w = None
    if weights is not None:
        w = numbers_for(weights, "weights", dtype)
        if check_float(w, "weights") != dtype:
            raise TypeError(f"weights must be {dtype} as z is, got {w.dtype}")
        if w.ndim < 1 or w.shape[-1] != len(which):
            raise ValueError(
                f"weights must have one entry for each of the {len(which)} offsets along its last axis, "
                f"got shape {w.shape}"
            )
        try:
            w = np.broadcast_to(w, (*shape, len(which)))
        except ValueError:
            raise ValueError(f"weights, shape {w.shape}, do not broadcast to {(*shape, len(which))}") from None
    valid = None if mask is None else mask_array(mask, shape, dtype)
    return Sequences(detached(z), w, valid, which, numbers, dtype, library_of(z))


def on_a_device(z: Array, weights: Any, mask: Any, which: list[int], numbers: Settings, dtype: str) -> Sequences:
    if isinstance(weights, (list, tuple, float, int)):
        raise TypeError(
            "weights is a list, and z is on a CUDA device; make it an array there, nothing is moved by itself"
        )
    place = Place(z=z, weights=weights, mask=mask)
    if weights is not None and check_dtype(weights, "weights") != dtype:
        raise TypeError(f"weights must be {dtype} as z is, got {check_dtype(weights, 'weights')}")
    if weights is not None and (len(weights.shape) < 1 or weights.shape[-1] != len(which)):
        raise ValueError(
            f"weights must have one entry for each of the {len(which)} offsets along its last axis, "
            f"got shape {tuple(weights.shape)}"
        )
    if mask is not None:
        name = str(mask.dtype).rpartition(".")[2]
        if not name.startswith(("bool", "int", "uint")):
            raise TypeError(f"mask must be boolean or integer, not zero where a token counts, got {name}")
        if name not in ("bool", "uint8"):
            mask = mask != 0
        mask = place.converted(mask, "uint8")
    w = None if weights is None else detached(weights)
    return Sequences(detached(z), w, mask, which, numbers, dtype, place.library, place)


def numbers_for(x: Array, name: str, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """A view in NumPy; lists have no dtype of their own and take this one."""
    if isinstance(x, (list, tuple, float)):
        made = np.asarray(x)
        if made.dtype.kind not in "fiu":
            raise TypeError(f"{name} must be numbers, got {made.dtype}")
        return made.astype(dtype)
    return numpy(detached(as_array(x, name)))


def mask_array(mask: Array, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """A boolean mask as ones and zeros of the dtype, broadcast."""
    if isinstance(mask, np.ma.MaskedArray):
        raise TypeError("mask is a masked array, and its own mask would be ignored")
    if is_sparse(mask) or isinstance(mask, (dict, str)):
        raise TypeError(f"mask must be a boolean or integer array, got {type(mask).__name__}")
    valid = np.asarray(numpy(mask) if library_of(mask) in ("torch", "jax") else mask)
    if valid.dtype.kind not in "biu":
        raise TypeError(f"mask must be boolean or integer, not zero where a token counts, got {valid.dtype}")
    try:
        valid = np.broadcast_to(valid, shape)
    except ValueError:
        raise ValueError(f"mask, shape {valid.shape}, does not broadcast to {shape}") from None
    return np.asarray((valid != 0).astype(dtype))


def overflow(what: str, norm: str | None) -> str:
    how = "scale z, or use norm='clamp'" if norm is None else "use a larger eps, norm='soft', or scale what goes in"
    return f"{what} overflows the dtype although the input is finite; {how}"


def projection(W: Array, b: Array | None, s: Sequences) -> tuple[Array, np.ndarray[Any, Any] | None]:
    W = as_array(W, "W")
    if check_float(W, "W") != s.dtype:
        raise TypeError(f"W must be {s.dtype} as z is, got {check_float(W, 'W')}")
    pairs = math.comb(s.r, 2)
    if len(W.shape) != 2 or W.shape[1] != pairs:
        raise ValueError(
            f"W must have shape (d, {pairs}), a column for each pair of {s.r} dimensions, got {tuple(W.shape)}"
        )
    if b is None:
        return detached(W), None
    b = as_array(b, "b")
    if check_float(b, "b") != s.dtype:
        raise TypeError(f"b must be {s.dtype} as z is, got {check_float(b, 'b')}")
    if tuple(b.shape) != (W.shape[0],):
        raise ValueError(f"b must have shape ({W.shape[0]},), got {tuple(b.shape)}")
    return detached(W), np.ascontiguousarray(numpy(detached(b)))


def gradient(grad: Array, s: Sequences, width: int) -> Array:
    grad = as_array(grad, "grad")
    if check_float(grad, "grad") != s.dtype:
        raise TypeError(f"grad must be {s.dtype} as z is, got {check_float(grad, 'grad')}")
    if tuple(grad.shape) != (*s.shape, width):
        raise ValueError(f"grad must have shape {(*s.shape, width)}, got {tuple(grad.shape)}")
    return detached(grad)


def summed_to(full: np.ndarray[Any, Any], shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """The gradient of an array that was broadcast, summed in double."""
    if full.shape == shape and full.dtype == dtype:
        return full
    extra = full.ndim - len(shape)
    axes = tuple(range(extra)) + tuple(extra + i for i, n in enumerate(shape) if n == 1 and full.shape[extra + i] != 1)
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(full.sum(axis=axes, dtype=np.float64).reshape(shape).astype(dtype))


def weights_gradient(full: np.ndarray[Any, Any], weights: Array, s: Sequences, *inputs: Array | None) -> Array:
    """That of the weights from those of every token; an error where finite input gave what the dtype cannot hold."""
    shape = tuple(weights.shape) if hasattr(weights, "shape") else np.shape(weights)  # a list has none
    result = summed_to(full, shape, s.dtype)
    given = (s.z, s.weights, *inputs)
    if not np.isfinite(result).all() and all(x is None or np.isfinite(numpy(x)).all() for x in given):
        raise ValueError("the gradient of weights overflows the dtype although the input is finite; scale what goes in")
    return to_library(result, s.library)
