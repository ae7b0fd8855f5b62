"""One call of a public function: of which library its arrays are and where, the kernels of that side, its results."""

from __future__ import annotations

from typing import Any

import numpy as np

from subspan import _core
from subspan._lib.arrays import Array, check_library, library_of, to_library
from subspan._lib.device import Context, context_of, device_of, kernels, memory_of

_ndarray, _HOST = np.ndarray, (np.ndarray, float, int, list, tuple, type(None))


class Call:
    """``call.kernels.f(call.context, ...)`` runs ``f`` where the arrays are; ``call.give`` hands over what it returns.

    ``kernels`` are ``_core`` or ``_cuda``, whose functions have one signature. What ``_cuda`` has not got raises a
    TypeError that says so.
    """

    __slots__ = ("context", "kernels", "library", "like")

    def __init__(self, kernels: Any, context: Context | None, library: str, like: Array) -> None:
        self.kernels, self.context, self.library, self.like = kernels, context, library, like

    def give(self, x: Any, out: Array | None = None) -> Any:
        """``out`` where it was given, else the result, or each of several, in the caller's library."""
        if out is not None:
            return out
        if type(x) is tuple:
            return tuple(self.give(y) for y in x)
        if type(x) is _ndarray:
            return to_library(x, self.library, self.like)
        return x

    def number(self, x: Any) -> Any:
        """A result that is a scalar where there is one of it: NumPy's own then, where the library is NumPy."""
        return self.give(x)


class _NumPyCall(Call):
    __slots__ = ()

    def number(self, x: Any) -> Any:
        return x if x.ndim else x[()]

    def give(self, x: Any, out: Array | None = None) -> Any:
        return x if out is None else out


_NUMPY = _NumPyCall(_core, None, "numpy", None)


def call_of(**arrays: Any) -> Call:
    """The call of a function with these arguments, which may be None, numbers or lists; results go to the library of
    the first. TypeError or ValueError, which names both, where two of them are not in one place.
    """
    for x in arrays.values():
        if type(x) is not _ndarray and x is not None and type(x) is not float:
            if type(x) is tuple and len(x) == 2 and type(x[0]) is type(x[1]) is _ndarray:
                continue  # a pair of bases
            return _call_of(arrays)
    return _NUMPY


def _arrays_in(arrays: dict[str, Any]) -> dict[str, Any]:
    """Those of pairs and of packed bases by names of their own."""
    found: dict[str, Any] = {}
    for name, x in arrays.items():
        if isinstance(x, (list, tuple)) and any(hasattr(y, "shape") for y in x):
            found.update(_arrays_in({f"{name}[{i}]": y for i, y in enumerate(x)}))
        else:
            found[name] = x.codes if hasattr(x, "_parts") else x
    return found


def _call_of(arrays: dict[str, Any]) -> Call:
    first: Any = None
    for x in arrays.values():
        if x is None or type(x) is float:
            continue
        if first is None:
            first = x
            if library_of(x) != "cupy":
                break
        elif type(x) is not type(first):
            break
    else:  # all of CuPy: the bindings look at the device of each
        return Call(kernels(), context_of("cupy", first.device.id)(), "cupy", first)
    flat = _arrays_in(arrays)
    if any(device_of(x) is not None for x in flat.values()):
        place = memory_of(**flat)
        return Call(kernels(), place.call(), place.library, first)
    if isinstance(first, (*_HOST, type)):
        return _NUMPY
    check_library(first, next(name for name, x in arrays.items() if x is first))
    library = library_of(first)
    return _NUMPY if library == "numpy" else Call(_core, None, library, first)
