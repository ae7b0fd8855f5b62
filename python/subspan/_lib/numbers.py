"""Numbers, choices and flags of a user's, with errors that name the argument."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np


def whole_number(value: Any, name: str, least: int, most: int = 2**62) -> int:
    """An integer of a user's, of Python or NumPy; no bool, no float that happens to be whole."""
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {_shortly(number)}")
    if number > most:
        raise ValueError(f"{name} must be at most {_shortly(most)}, got {_shortly(number)}")
    return number


def _shortly(number: int) -> str:
    return str(number) if number.bit_length() < 128 else f"a number of {number.bit_length()} bits"


def real_number(value: Any, name: str, least: float = -math.inf) -> float:
    """A finite number of a user's: no text, no bool, no part of a complex one, no tensor that autograd follows."""
    if isinstance(value, (str, bytes, bool, np.bool_, complex, np.complexfloating)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if getattr(value, "requires_grad", False):
        raise TypeError(f"{name} is a tensor that requires grad, and autograd does not see this function; pass a float")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite, got a number beyond float64") from None
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    if not (math.isfinite(number) and number >= least):
        raise ValueError(f"{name} must be finite{'' if least < 0 else ' and not negative'}, got {number!r}")
    return number


def share(value: Any, name: str) -> float:
    """A number between 0 and 1."""
    number = real_number(value, name)
    if not 0.0 < number < 1.0:
        raise ValueError(f"{name} must be in (0, 1), got {number}")
    return number


def choice(value: Any, name: str, *allowed: str) -> str:
    """One of these texts."""
    if not isinstance(value, str) or value not in allowed:
        *first, last = (repr(x) for x in allowed)
        raise ValueError(f"{name} must be {', '.join(first)} or {last}, got {value!r}")
    return str(value)


def truth(value: Any, name: str) -> bool:
    """A bool of a user's. Text, numbers and arrays are mistakes."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise TypeError(f"{name} must be True or False, got {value!r}")


def rng_key(rng: int | np.random.Generator | np.integer[Any] | None) -> int:
    """A 64-bit key for the counter-based generator (SPEC 7)."""
    return int(generator_of(rng).integers(0, 2**63, dtype=np.int64))


def generator_of(rng: int | np.random.Generator | np.integer[Any] | None) -> np.random.Generator:
    """``numpy.random.default_rng`` with texts that name the argument."""
    if isinstance(rng, (bool, np.bool_)):
        raise TypeError(f"rng must be None, an int or a numpy.random.Generator, got {rng!r}")
    try:
        return np.random.default_rng(rng)
    except (TypeError, ValueError) as e:
        raise type(e)(
            f"rng must be None, an int that is not negative or a numpy.random.Generator, got {rng!r}"
        ) from None


def float_dtype(dtype: Any) -> np.dtype[Any]:
    """float32 or float64 from what NumPy, PyTorch or JAX calls so."""
    name = str(dtype).rpartition(".")[2] if not isinstance(dtype, (type, np.dtype)) else dtype
    try:
        d = np.dtype(name)
    except TypeError:
        raise TypeError(f"dtype must be float32 or float64, got {dtype!r}") from None
    if dtype is None or d not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise TypeError(f"dtype must be float32 or float64, got {dtype!r}")
    return d


def stack_shape(n: int, k: int, batch: Any) -> tuple[int, ...]:
    """``(*batch, n, k)`` of orthonormal columns, checked."""
    n, k = whole_number(n, "n", 0), whole_number(k, "k", 0)
    if k > n:
        raise ValueError(f"k must be at most n = {n}, got {k}")
    sizes = batch if isinstance(batch, (tuple, list)) else (batch,)
    shape = (*(whole_number(size, "batch", 0) for size in sizes), n, k)
    if math.prod(shape) > 2**58:
        raise ValueError(f"{shape} are more numbers than memory can hold")
    return shape
