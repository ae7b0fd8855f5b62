"""How many singular values to keep."""

from __future__ import annotations

import numpy as np

from subspan import _core
from subspan._lib.arrays import Array, as_array, detached, dtype_of, library_of
from subspan._lib.device import on_the_cpu

__all__ = ["choose_rank"]


def choose_rank(
    singular_values: Array,
    *,
    energy: float | None = None,
    threshold: float | None = None,
    rule: str | None = None,
    shape: tuple[int, int] | None = None,
    noise: float | None = None,
) -> int:
    """How many singular values to keep.

    Exactly one of ``energy``, ``threshold`` and ``rule`` is given.

    Parameters
    ----------
    singular_values : array ``(p,)``
        Descending. The rules with unknown noise need all ``min(shape)`` of them.
    energy : float
        Smallest rank whose squared singular values sum to at least this share, in (0, 1], of the whole.
    threshold : float
        Keep singular values above ``threshold`` times the first.
    rule : {"gavish-donoho", "marchenko-pastur"}
        The optimal hard threshold of Gavish and Donoho (IEEE Trans. Inf. Theory 60, 2014), or the edge
        ``noise (√m + √n)`` of what noise alone produces (Marchenko and Pastur 1967). Both need ``shape`` and estimate
        the noise from the median singular value when ``noise``, the standard deviation of an entry, is not given.
    shape : tuple ``(m, n)``
        Shape of the matrix.
    noise : float
        Standard deviation of the noise per entry.

    Examples
    --------
    >>> from subspan.svd import choose_rank
    >>> choose_rank([10.0, 5.0, 1.0, 0.1], energy=0.99)
    2
    """
    on_the_cpu(singular_values, "singular_values")
    values = as_array(singular_values, "singular_values")
    if dtype_of(values).kind not in "fiu":
        raise TypeError(f"singular_values must be real numbers, got {values.dtype}")
    values = detached(values, "singular_values")
    if library_of(values) == "torch":
        values = values.double()  # NumPy does not know all of its dtypes
    return _core.choose_rank(np.asarray(values, dtype=np.float64), energy, threshold, rule, shape, noise)
