"""Which library an array belongs to, and arrays of that library for results."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Array = Any
"""An array of any library: NumPy, PyTorch, JAX, CuPy, or anything with ``__dlpack__``."""


_libraries: dict[type, str] = {}
_KNOWN = {"numpy": "numpy", "torch": "torch", "cupy": "cupy", "jax": "jax", "jaxlib": "jax"}


def library_of(x: Array) -> str:
    """``"numpy"``, ``"torch"``, ``"jax"``, ``"cupy"``: of subclasses, too. Else the top-level package of the array's
    type."""
    kind = type(x)
    name = _libraries.get(kind)
    if name is None:
        roots = [base.__module__.partition(".")[0] for base in kind.__mro__]
        name = next((_KNOWN[root] for root in roots if root in _KNOWN), roots[0])
        _libraries[kind] = name
    return name


def as_array(x: Array, name: str) -> Array:
    """Arrays pass through; lists and tuples of numbers become NumPy arrays."""
    if type(x) is np.ndarray:
        return x
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, and masks would be ignored; fill it first, e.g. with x.filled(0)")
    if isinstance(x, type):
        raise TypeError(f"{name} must be an array, got the class {x.__name__}")
    library = library_of(x)
    if library == "torch":
        _check_memory(x, name)
        if hasattr(x, "is_neg") and x.is_neg():
            return x.resolve_neg()  # a lazy minus sign that DLPack does not carry
        return x
    if isinstance(x, np.ndarray):
        return np.asarray(x)  # a matrix multiplies, and reduces, in its own way
    if hasattr(x, "__dlpack__"):
        return x
    if isinstance(x, (list, tuple, int, float)):
        return _from_list(x, name)
    if hasattr(x, "__array__"):  # a pandas frame, say
        return np.asarray(x)
    raise _no_array(x, name)


def _no_array(x: Any, name: str) -> TypeError:
    if hasattr(x, "toarray"):
        return TypeError(f"{name} is sparse, which is not taken here; make it dense first, e.g. {name}.toarray()")
    return TypeError(f"{name} must be an array, got {type(x).__name__}")


def _check_memory(x: Any, name: str) -> None:
    """That a tensor is numbers in memory."""
    layout = getattr(x, "layout", None)
    if layout is not None and layout is not sys.modules["torch"].strided:
        raise TypeError(f"{name} is a tensor of layout {layout}; make it dense first, e.g. {name}.to_dense()")
    if getattr(x, "is_meta", False):
        raise TypeError(f"{name} is a tensor on the meta device, which holds no numbers")


def _from_list(x: Any, name: str) -> Any:
    if isinstance(x, (list, tuple)):
        for item in x:
            if isinstance(item, np.ma.MaskedArray):
                raise TypeError(f"{name} is a list of masked arrays, and masks would be ignored; fill them first")
            if getattr(item, "requires_grad", False):
                raise TypeError(f"{name} is a list of tensors that require grad; stack them to one tensor")
    try:
        made = np.asarray(x)
    except ValueError:
        raise ValueError(f"{name} is a list of parts of different shapes, which is no array") from None
    # Numbers that are written down are meant as numbers: those of a list of ints, too.
    return made.astype(np.float64) if made.dtype.kind in "iu" else made


def _namespace(library: str, like: Array) -> Any:
    """What hands a NumPy array over to a library that is not one of those known here, or None."""
    if like is not None and hasattr(like, "__array_namespace__"):
        space = like.__array_namespace__()
        if hasattr(space, "from_dlpack"):
            return space
    parents = [library]
    if like is not None:
        parts = type(like).__module__.split(".")
        parents = [".".join(parts[:i]) for i in range(len(parts), 0, -1)]
    for parent in parents:
        module = sys.modules.get(parent)
        if module is not None and hasattr(module, "from_dlpack"):
            return module
    return None


def check_library(x: Array, name: str) -> None:
    """Raises, before any work is done, where a result could not be handed to the library of ``x``."""
    library = library_of(x)
    if library in ("numpy", "torch", "jax", "cupy"):
        return
    if not hasattr(x, "__dlpack__") and not hasattr(x, "__array__"):
        raise _no_array(x, name)
    if _namespace(library, x) is None:
        raise TypeError(f"{name} is an array of {library!r}, and results cannot be handed to it: it has no from_dlpack")


def to_library(x: NDArray[Any], library: str, like: Array = None) -> Array:
    """Hand a fresh NumPy array over to a library, through DLPack, without a copy where the library allows it."""
    if library == "numpy":
        return x
    if library == "torch":
        import torch

        return torch.from_dlpack(x)
    if library == "jax":
        import jax

        if x.dtype == np.float64 and not jax.config.jax_enable_x64:
            raise TypeError("a float64 result needs jax_enable_x64")
        if x.size == 0:
            return jax.numpy.zeros(x.shape, dtype=x.dtype)
        return jax.numpy.from_dlpack(x)
    module = _namespace(library, like)
    if module is None:
        raise TypeError(f"results cannot be handed to {library!r}: it has no from_dlpack")
    return module.from_dlpack(x)


def dtype_of(x: Array) -> np.dtype[Any]:
    """NumPy dtype of an array of any library."""
    dtype = x.dtype
    if isinstance(dtype, np.dtype):
        return dtype
    name = str(dtype).rpartition(".")[2]
    try:
        return np.dtype(name)
    except TypeError:
        raise TypeError(f"dtype {x.dtype} is not supported; convert to float32 or float64") from None


def check_float(x: Array, name: str) -> np.dtype[Any]:
    """float32 or float64, or a TypeError that says what to do."""
    try:
        dtype = dtype_of(x)
    except TypeError:
        raise TypeError(
            f"{name} has dtype {x.dtype}, which is not supported; convert it to float32 or float64"
        ) from None
    if dtype in (np.dtype(np.float32), np.dtype(np.float64)) and dtype.isnative:
        return dtype
    if dtype.kind == "c":
        why = ": only real arrays are taken"
    elif dtype.names is not None or dtype.kind in "OSUMm":
        why = ", which holds no numbers of one kind"
    elif not dtype.isnative:
        why = f", which is big-endian; convert it first, e.g. {name}.astype({name}.dtype.newbyteorder('='))"
    else:
        how = f"{name}.float()" if library_of(x) == "torch" else f"{name}.astype('float32')"
        why = f"; convert it first, e.g. {how}"
    raise TypeError(f"{name} must be float32 or float64, got {dtype}{why}")


_EXACT = {"float32": ("int8", "uint8", "int16", "uint16"), "float64": ("int32", "uint32")}


def as_float(x: Array, name: str, wanted: Any = None) -> Array:
    """Integers that a float holds exactly, converted: to ``wanted`` where there is one, else to float64 as NumPy does.

    Of up to 16 bits to float32, of up to 32 to float64. Others, and all floats, pass through.
    """
    dtype = getattr(x, "dtype", None)
    if dtype is None or (isinstance(dtype, np.dtype) and dtype.char in "fd"):
        return x
    given = str(dtype).rpartition(".")[2]
    target = "float64" if wanted is None else np.dtype(wanted).name
    if wanted is not None and given in ("float16", "bfloat16"):
        how = f"to(torch.{target})" if library_of(x) == "torch" else f"astype('{target}')"
        raise TypeError(f"{name} must be {target}, got {given}; convert it first, e.g. {name}.{how}")
    if given not in (*_EXACT["float32"], *(_EXACT["float64"] if target == "float64" else ())):
        if given in ("int32", "uint32", "int64", "uint64"):
            raise TypeError(
                f"{name} must be float32 or float64, got {given}, and {target} does not hold all of its numbers; "
                f"convert it first, e.g. {name}.astype('{target}')"
            )
        return x
    if library_of(x) == "torch":
        import torch

        return x.to(getattr(torch, target))
    return x.astype(np.dtype(target))


def float_array(x: Any, name: str, wanted: Any = None) -> Array:
    """An array of floats: written numbers (lists) are of dtype ``wanted``, as are integers that it holds exactly."""
    if type(x) is np.ndarray and x.dtype.char in "fd":
        return x
    written = isinstance(x, (list, tuple, int, float))
    x = as_array(x, name)
    if written and wanted is not None and np.dtype(wanted) == np.float32 and x.dtype == np.float64:
        x = x.astype(np.float32)  # as NumPy takes written numbers beside an array
    return as_float(x, name, wanted)


def float_beside(*arrays: Any) -> Any:
    """float32 where one of the arrays is of it and none of float64: what written numbers and integers beside it are."""
    dtypes = [getattr(x, "dtype", "") for x in arrays]
    kinds = {x.char if isinstance(x, np.dtype) else str(x).rpartition(".")[2] for x in dtypes}
    return np.float32 if kinds & {"f", "float32"} and not kinds & {"d", "float64"} else None


_READ, _OUT, _IN_PLACE = 0, 1, 2


def prepared(x: Any, name: str, access: int) -> Array:
    """What the bindings read in place of an argument that is no plain NumPy array; an error says what is wrong with it.

    ``access``: 0 where it is read, 1 where results are written to it, 2 where it is changed in place.
    """
    if access == _READ:
        return detached(as_array(x, name), name)
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, and its mask would be ignored")
    if not isinstance(x, np.ndarray) and not hasattr(x, "__dlpack__"):
        if access == _IN_PLACE:
            raise TypeError(f"{name} must be an array that can be written to, got {type(x).__name__}")
        raise _no_array(x, name)
    library = library_of(x)
    if library == "torch":
        _check_memory(x, name)
    if library == "jax":
        why = ", and this changes it in place" if access == _IN_PLACE else ""
        raise TypeError(f"{name}: JAX arrays are immutable{why}")
    if library == "torch" and x.is_neg():
        raise ValueError(f"{name} is a lazily negated view, which cannot be written to; pass {name}.resolve_neg()")
    if library == "torch" and access == _OUT and x.requires_grad and sys.modules["torch"].is_grad_enabled():
        raise ValueError(f"{name} requires grad; write to it under torch.no_grad()")
    return np.asarray(x) if isinstance(x, np.ndarray) else detached(x, name)


def detached(x: Array, name: str = "a tensor") -> Array:
    """Tensors without their history. What autograd would have to record is an error instead of a wrong gradient."""
    if library_of(x) != "torch":
        return x
    torch = sys.modules["torch"]
    if x.requires_grad and torch.is_grad_enabled():
        raise TypeError(
            f"{name} requires grad, and autograd does not see this function; call it under torch.no_grad(), pass "
            "a detach() of it, or wrap it and its *_backward in a torch.autograd.Function"
        )
    if torch.autograd.forward_ad._current_level >= 0 and torch.autograd.forward_ad.unpack_dual(x).tangent is not None:
        raise TypeError(f"{name} carries a tangent, which forward-mode autograd would lose here; pass the primal")
    return x.detach().resolve_neg()  # a lazy minus sign is not in the memory that is handed over


def written(x: Array) -> None:
    """Autograd is told of a tensor that was written to."""
    if library_of(x) == "torch":
        sys.modules["torch"].autograd.graph.increment_version(x)
