"""Arguments and small pieces that several modules share."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

from subspan import _core
from subspan._lib.arrays import Array, as_array, check_float, check_library, library_of, to_library
from subspan._lib.device import device_of


def matrices(x: Array, name: str) -> tuple[Array, np.dtype[Any]]:
    x = as_array(x, name)
    on_the_cpu(x, name)
    dtype = check_float(x, name)
    if len(x.shape) < 2:
        hint = f"; one column is {name}[:, None]" if len(x.shape) == 1 else ""
        raise ValueError(f"{name} must have at least 2 dimensions, got shape {tuple(x.shape)}{hint}")
    check_library(x, name)
    return x, dtype


def is_vector(x: Any) -> bool:
    """Whether x has one axis; a list of numbers has."""
    shape = getattr(x, "shape", None)
    if shape is not None:
        return len(shape) == 1
    return isinstance(x, (list, tuple)) and len(x) > 0 and isinstance(x[0], (int, float))


def column(x: Any) -> Any:
    """A vector as one column; anything else as it is."""
    return as_array(x, "an array")[:, None] if is_vector(x) else x


def same_dtype(dtype: Any, other: Any, name: str, first: str) -> None:
    """Dtypes that differ are named before anything is said of values."""
    if other != dtype:
        raise TypeError(f"{name} must be {dtype} as {first} is, got {other}")


def convolution_hint(shape: tuple[int, ...], name: str) -> str:
    """What to say to who passes the gradient of a convolution where a matrix was meant."""
    return _core.convolution_hint(shape, name)


def is_left(side: str) -> bool:
    if side not in ("left", "right"):
        raise ValueError(f"side must be 'left' or 'right', got {side!r}")
    return side == "left"


def of_vector(f: Any, x: Array, side: str, out: Array | None) -> Array:
    """``f(matrix, out)`` of a vector: a column where matrices act from the left, else a row."""
    if side == "both":
        raise ValueError("side='both' is for matrices; a vector has one side, 'left' or 'right'")
    left = is_left(side)

    def wide(y: Any) -> Any:
        return y[..., None] if left else y[..., None, :]

    result = f(wide(as_array(x, "C")), None if out is None else wide(out))
    if out is not None:
        return out
    return result[..., 0] if left else result[..., 0, :]  # other arguments may have leading axes


def finish(x: Any, fresh: bool, library: str, like: Array = None) -> Array:
    """The result in the caller's library; autograd is told of tensors that were written to."""
    if fresh:
        return to_library(x, library, like)
    if library_of(x) == "torch":
        sys.modules["torch"].autograd.graph.increment_version(x)
    return x


def on_the_cpu(x: Any, name: str) -> None:
    """Raises for an array on a CUDA device."""
    device = device_of(x)
    if device is not None:
        raise TypeError(
            f"{name} is on CUDA device {device}; this operation runs on the CPU and moves no data by itself"
        )


def numpy(x: Array) -> np.ndarray[Any, Any]:
    """A view in NumPy, without a copy. A tensor whose history would be lost is an error, as in :func:`detached`."""
    if isinstance(x, np.ndarray):
        return np.asarray(x)
    on_the_cpu(x, "an array")
    return np.from_dlpack(detached(x))


def broadcast(c: Array, *others: tuple[Array, int]) -> tuple[Array, tuple[int, ...]]:
    """C, as a broadcast view where other arguments have more leading axes than it."""
    shape = tuple(c.shape)
    try:
        batch = np.broadcast_shapes(shape[:-2], *(tuple(x.shape)[: len(x.shape) - core] for x, core in others))
    except ValueError:
        names = ", ".join(str(tuple(x.shape)) for x, _ in others)
        raise ValueError(f"leading axes do not broadcast: {shape} with {names}") from None
    if batch != shape[:-2]:
        c = np.broadcast_to(numpy(c), (*batch, *shape[-2:]))
    return c, (*batch, *shape[-2:])


def detached(x: Array) -> Array:
    """Tensors without their history. What autograd would have to record is an error instead of a wrong gradient."""
    if library_of(x) != "torch":
        return x
    torch = sys.modules["torch"]
    if x.requires_grad and torch.is_grad_enabled():
        raise TypeError(
            "a tensor requires grad, and autograd does not see this function; call it under torch.no_grad(), pass "
            "x.detach(), or wrap it and its *_backward in a torch.autograd.Function"
        )
    if torch.autograd.forward_ad._current_level >= 0 and torch.autograd.forward_ad.unpack_dual(x).tangent is not None:
        raise TypeError(
            "a tensor carries a tangent, and forward-mode autograd does not see this function; pass the primal"
        )
    return x.detach().resolve_neg()  # a lazy minus sign is not in the memory that is handed over


def check_basis(U: Array, name: str, *, advice: str = "") -> None:
    """Orthonormal columns to 64 eps √k, by two products with vectors."""
    U, dtype = matrices(U, name)
    n, k = U.shape[-2:]
    if k > n:
        raise ValueError(f"{name} has {k} columns of {n} entries: so many cannot be orthonormal")
    defect = _core.orthonormality_defect(detached(U))
    if math.isnan(defect) or math.isinf(defect):
        if _core.all_finite(detached(U)):
            raise ValueError(
                f"the columns of {name} are not orthonormal: their squares overflow; orthonormalize {name}"
            )
        raise ValueError(f"{name} holds NaN or infinity")
    bound = 64 * float(np.finfo(dtype).eps) * math.sqrt(max(k, 1))
    if defect > bound:
        raise ValueError(
            f"the columns of {name} are not orthonormal: ||({name}ᵀ{name} - I) z|| / ||z|| is {defect:.1e}, more than "
            f"{bound:.1e}; {advice}orthonormalize {name} "
            f"(subspan.orth.range_basis where columns may depend on each other: "
            "orthonormalize completes those, and the span grows), or pass check=False"
        )


def one_rank(ranks: Any) -> int:
    values = np.unique(ranks)
    if values.size > 1:
        raise ValueError(
            f"the matrices of the stack give spaces of different dimensions, {values.tolist()}, "
            "which no one array can hold"
        )
    return int(values[0]) if values.size else 0


def product(A: np.ndarray[Any, Any], B: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    batch = np.broadcast_shapes(A.shape[:-2], B.shape[:-2])
    out = np.empty((*batch, A.shape[-2], B.shape[-1]), A.dtype)
    _core.product(A, B, out)
    return out
