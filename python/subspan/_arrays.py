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


def library_of(x: Array) -> str:
    """Top-level package of the array's type: ``"numpy"``, ``"torch"``, ``"jax"``, ..."""
    kind = type(x)
    name = _libraries.get(kind)
    if name is None:
        name = "numpy" if issubclass(kind, np.ndarray) else kind.__module__.partition(".")[0]
        name = _libraries[kind] = "jax" if name == "jaxlib" else name
    return name


def as_array(x: Array, name: str) -> Array:
    """Arrays pass through; lists and tuples of numbers become NumPy arrays."""
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, and masks would be ignored; fill it first, e.g. with x.filled(0)")
    if library_of(x) == "torch" and hasattr(x, "is_neg") and x.is_neg():
        return x.resolve_neg()  # a lazy minus sign that DLPack does not carry
    if isinstance(x, np.ndarray) or hasattr(x, "__dlpack__"):
        return x
    if isinstance(x, (list, tuple, int, float)):
        return np.asarray(x)
    if hasattr(x, "__array__"):  # a pandas frame, say
        return np.asarray(x)
    raise TypeError(f"{name} must be an array, got {type(x).__name__}")


def is_sparse(x: Array) -> bool:
    """Whether x is a scipy.sparse matrix or array, without importing scipy.sparse."""
    if type(x) is np.ndarray:
        return False
    sparse = sys.modules.get("scipy.sparse")
    return sparse is not None and bool(sparse.issparse(x))


def csr_parts(x: Array, name: str) -> tuple[Any, Any, Any, int, int]:
    """The arrays of a CSR matrix. Other sparse formats are converted, which copies."""
    if x.ndim != 2:
        raise ValueError(f"{name} must have 2 dimensions, got shape {x.shape}")
    csr = x if x.format == "csr" else x.tocsr()
    if not csr.has_canonical_format:  # duplicate entries of one cell add up
        csr = csr.copy()
        csr.sum_duplicates()
    indices, indptr = csr.indices, csr.indptr
    if indices.dtype != indptr.dtype:
        indptr = indptr.astype(np.int64)
        indices = indices.astype(np.int64)
    return csr.data, indices, indptr, int(csr.shape[0]), int(csr.shape[1])


def to_library(x: NDArray[Any], library: str) -> Array:
    """Hand a fresh NumPy array over to a library, through DLPack, without a copy where the library allows it."""
    if library == "numpy":
        return x
    if library == "torch":
        return sys.modules["torch"].from_dlpack(x)
    if library == "jax":
        import jax

        if x.dtype == np.float64 and not jax.config.jax_enable_x64:
            raise TypeError("a float64 result needs jax_enable_x64")
        if x.size == 0:
            return jax.numpy.zeros(x.shape, dtype=x.dtype)
        return jax.numpy.from_dlpack(x)
    # Any other library of the array API standard exposes from_dlpack in its namespace.
    module = sys.modules.get(library)
    if module is None or not hasattr(module, "from_dlpack"):
        raise TypeError(f"results cannot be handed to {library!r}: it has no from_dlpack")
    return module.from_dlpack(x)


def check_writable(out: Array) -> None:
    """Raises where a library does not let results be written into this array of its own."""
    library = library_of(out)
    if library == "jax":
        raise TypeError("out: JAX arrays are immutable")
    if library == "torch":
        torch = sys.modules["torch"]
        if out.is_neg():
            raise ValueError("out is a lazily negated view, which cannot be written to; pass out.resolve_neg()")
        if out.requires_grad and torch.is_grad_enabled():
            raise ValueError("out requires grad; write to it under torch.no_grad()")


def output(out: Array | None, shape: tuple[int, ...], dtype: Any, library: str) -> tuple[Array, bool]:
    """``(array to write into, whether it must be handed over)``. ``out`` must have this shape and dtype."""
    if out is None:
        return np.empty(shape, dtype=dtype), True
    if isinstance(out, np.ma.MaskedArray):
        raise TypeError("out is a masked array, and its mask would be ignored")
    if not hasattr(out, "shape"):
        raise TypeError(f"out must be an array, got {type(out).__name__}")
    check_writable(out)
    if tuple(out.shape) != shape:
        raise ValueError(f"out must have shape {shape}, got {tuple(out.shape)}")
    return out, False


def dtype_of(x: Array) -> np.dtype[Any]:
    """NumPy dtype of an array of any library."""
    name = str(x.dtype).rpartition(".")[2]
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
    if dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
        how = f"{name}.float()" if library_of(x) == "torch" else f"{name}.astype('float32')"
        raise TypeError(f"{name} must be float32 or float64, got {dtype}; convert it first, e.g. {how}")
    return dtype


def rng_key(rng: int | np.random.Generator | np.integer[Any] | None) -> int:
    """A 64-bit key for the counter-based generator (SPEC 7)."""
    return int(np.random.default_rng(rng).integers(0, 2**63, dtype=np.int64))
