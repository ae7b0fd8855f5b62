"""Small references that several test files use."""

from __future__ import annotations

import ml_dtypes
import numpy as np

EPS = {np.dtype(np.float32): float(np.finfo(np.float32).eps), np.dtype(np.float64): float(np.finfo(np.float64).eps)}


BF16 = np.dtype(ml_dtypes.bfloat16)


def eps(dtype: np.dtype) -> float:
    """Of any floating dtype, bfloat16 too."""
    return float(ml_dtypes.finfo(dtype).eps)


def wide(x: np.ndarray | None) -> np.ndarray | None:
    return None if x is None else np.asarray(x).astype(np.float64)


def points(rng: np.random.Generator, n: int, k: int, batch: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A stack of points of Gr(k, n)."""
    return np.linalg.qr(rng.standard_normal((*batch, n, k)))[0].astype(dtype)


def orthonormal(rng: np.random.Generator, n: int, k: int) -> np.ndarray:
    q, r = np.linalg.qr(rng.standard_normal((n, k)))
    return q * np.sign(np.diag(r))


def orthogonality(basis: np.ndarray) -> float:
    """max |V Vᵀ - I| in units of the bound 10 eps sqrt(k)."""
    basis = np.asarray(basis)
    k = basis.shape[0]
    if k == 0:
        return 0.0
    wide = basis.astype(np.float64)
    return float(np.abs(wide @ wide.T - np.eye(k)).max() / (10 * EPS[basis.dtype] * np.sqrt(k)))


def subspace_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Sine of the largest principal angle between the row spaces of orthonormal a and b."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(b - (b @ a.T) @ a, 2))
