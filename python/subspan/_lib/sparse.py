"""Sparse matrices, looked at before anything else sees them: SciPy's own loops do not look."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from subspan import _core
from subspan._lib.arrays import Array, as_float

if TYPE_CHECKING:
    from numpy.typing import NDArray


def is_sparse(x: Array) -> bool:
    """Whether x is a scipy.sparse matrix or array, without importing scipy.sparse."""
    if type(x) is np.ndarray:
        return False
    sparse = sys.modules.get("scipy.sparse")
    return sparse is not None and bool(sparse.issparse(x))


def check_sparse(x: Array, name: str) -> None:
    """ValueError where the arrays of a sparse matrix lead outside of it: SciPy's own loops do not look."""
    if x.ndim != 2:
        hint = f"; of one row, pass {name}.reshape(1, -1)" if x.ndim == 1 else ""
        raise ValueError(f"{name} must have 2 dimensions, got shape {x.shape}{hint}")
    m, n = (int(s) for s in x.shape)
    if x.format in ("csr", "csc"):
        sizes = (m, n) if x.format == "csr" else (n, m)
        _checked_compressed(x, *sizes, int(np.asarray(x.data).size), name)
    elif x.format == "bsr":
        r, c = (int(s) for s in x.blocksize)
        _checked_compressed(x, m // r, n // c, int(np.asarray(x.data).shape[0]), name)
    elif x.format == "coo":
        for axis, (where, size) in enumerate(zip(x.coords, (m, n), strict=True)):
            where = _integers(where, name, f"coordinates along axis {axis}")
            if where.size != np.asarray(x.data).size or (where.size and not 0 <= where.min() <= where.max() < size):
                raise ValueError(f"{name}: coordinates along axis {axis} do not fit the data, or leave [0, {size})")
    elif x.format == "dia":
        data, offsets = np.asarray(x.data), _integers(x.offsets, name, "offsets")
        if data.ndim != 2 or offsets.shape != data.shape[:1]:
            raise ValueError(
                f"{name}: there must be as many offsets as diagonals, got {offsets.shape} and {data.shape}"
            )
    elif x.format == "lil":
        for i, (where, what) in enumerate(zip(x.rows, x.data, strict=True)):
            _integers(where, name, f"columns of row {i}")
            if len(where) != len(what) or (where and not 0 <= min(where) <= max(where) < n):
                raise ValueError(f"{name}: columns of row {i} do not fit the data, or leave [0, {n})")


def _checked_compressed(x: Array, major: int, minor: int, stored: int, name: str) -> tuple[Any, Any, bool]:
    """``indptr`` and ``indices`` of one dtype, which lead nowhere outside; whether they are sorted without
    duplicates."""
    indptr, indices = np.asarray(x.indptr), np.asarray(x.indices)
    if indptr.dtype != indices.dtype or indptr.dtype not in (np.dtype(np.int32), np.dtype(np.int64)):
        if indptr.dtype.kind not in "iu" or indices.dtype.kind not in "iu":
            raise ValueError(f"{name}: indptr and indices must be integers, got {indptr.dtype} and {indices.dtype}")
        indptr, indices = indptr.astype(np.int64), indices.astype(np.int64)
    indptr, indices = np.ascontiguousarray(indptr), np.ascontiguousarray(indices)
    return indptr, indices, _core.check_compressed(indptr, indices, major, minor, stored, name)


def _integers(where: Any, name: str, what: str) -> NDArray[Any]:
    found = np.asarray(where)
    if found.size and found.dtype.kind not in "iu":
        raise ValueError(f"{name}: {what} must be integers, got {found.dtype}")
    return found


def csr_parts(x: Array, name: str, wanted: Any = None) -> tuple[Any, Any, Any, int, int]:
    """The arrays of a CSR matrix, looked at before anything else sees them. Other sparse formats are converted, which
    copies, and integers as :func:`as_float` does, before entries of one cell are added up.

    ValueError where ``indptr`` or ``indices`` lead outside: SciPy's own loops do not look.
    """
    check_sparse(x, name)
    m, n = (int(s) for s in x.shape)
    dtype = as_float(np.empty(0, x.dtype), name, wanted).dtype
    if x.dtype != dtype:
        x = x.astype(dtype)
    csr = x if x.format == "csr" else x.tocsr()
    data = np.asarray(csr.data)
    indptr, indices, canonical = _checked_compressed(csr, m, n, int(data.size), name)
    if not canonical:  # entries of one cell add up
        csr = type(csr)((data, indices, indptr), shape=(m, n), copy=True)
        csr.sum_duplicates()
        return csr_parts(csr, name)
    return np.ascontiguousarray(data), indices, indptr, m, n


def dense_rows(x: Array, name: str, wanted: Any = None) -> Any:
    """A sparse matrix as a dense array, once its parts have been looked at."""
    data, indices, indptr, m, n = csr_parts(x, name, wanted)
    sparse = sys.modules["scipy.sparse"]
    return sparse.csr_array((data, indices, indptr), shape=(m, n)).toarray()
