"""How many singular values to keep."""

from __future__ import annotations

import math

import numpy as np

from subspan._lib.arrays import Array, as_array, detached, dtype_of, library_of
from subspan._lib.device import on_the_cpu
from subspan._lib.numbers import real_number, whole_number

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
    values = detached(values)
    if library_of(values) == "torch":
        values = values.double()  # NumPy does not know all of its dtypes
    s = np.asarray(values, dtype=np.float64)
    if s.ndim != 1:
        raise ValueError(f"singular_values must have 1 dimension, got shape {s.shape}")
    if not np.all(np.isfinite(s)) or np.any(s < 0):
        raise ValueError("singular_values must be finite and not negative")
    if np.any(np.diff(s) > 0):
        raise ValueError("singular_values must be in descending order")
    given = [x is not None for x in (energy, threshold, rule)]
    if sum(given) != 1:
        raise ValueError("exactly one of energy, threshold and rule must be given")
    if rule is None and not (shape is None and noise is None):
        raise ValueError("shape and noise belong to a rule")
    empty = s.size == 0 or s[0] == 0.0
    if energy is not None:
        energy = real_number(energy, "energy")
        if not 0.0 < energy <= 1.0:
            raise ValueError(f"energy must be in (0, 1], got {energy}")
        if empty:
            return 0
        total = np.cumsum((s / s[0]) ** 2)
        # The last sum is the whole by definition: rounding must not ask for one value more.
        return int(min(np.searchsorted(total, energy * total[-1]) + 1, s.size))
    if threshold is not None:
        threshold = real_number(threshold, "threshold")
        if not 0.0 <= threshold < 1.0:
            raise ValueError(f"threshold must be in [0, 1), got {threshold}")
        return 0 if empty else int(np.count_nonzero(s > threshold * s[0]))
    if not isinstance(rule, str) or rule not in ("gavish-donoho", "marchenko-pastur"):
        raise ValueError(f"rule must be 'gavish-donoho' or 'marchenko-pastur', got {rule!r}")
    if shape is None:
        raise ValueError(f"rule {rule!r} needs shape")
    if not isinstance(shape, (tuple, list)) or len(shape) != 2:
        raise ValueError(f"shape must be a pair (m, n), got {shape!r}")
    m, n = (whole_number(x, f"shape[{i}]", 1) for i, x in enumerate(shape))
    if s.size > min(m, n):
        raise ValueError(f"shape {(m, n)} does not fit {s.size} singular values")
    if noise is not None:
        noise = real_number(noise, "noise", 0.0)
    if empty:
        return 0
    beta = min(m, n) / max(m, n)
    root = math.sqrt(max(m, n))
    if noise is None:
        if s.size != min(m, n):
            raise ValueError(
                f"rule {rule!r} estimates the noise from the median of all {min(m, n)} singular values, got {s.size}; "
                "give noise"
            )
        noise = float(np.median(s)) / (root * math.sqrt(_marchenko_pastur_median(beta)))
    if rule == "gavish-donoho":
        cut = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta * beta + 14 * beta + 1)))
    else:
        cut = 1 + math.sqrt(beta)
    return int(np.count_nonzero(s > cut * root * noise))


def _marchenko_pastur_median(beta: float) -> float:
    """Median of the Marchenko-Pastur law with ratio beta in (0, 1] and unit variance."""
    lo, hi = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    # x = lo + (hi - lo) sin²(t/2) turns the square-root edges into a smooth integrand.
    t = np.linspace(0.0, np.pi, 4001)
    x = lo + (hi - lo) * np.sin(t / 2) ** 2
    root = (hi - lo) / 2 * np.sin(t)  # sqrt((hi - x)(x - lo)) and, once more, dx/dt
    with np.errstate(divide="ignore", invalid="ignore"):
        density = root * root / (2 * np.pi * beta * x)
    density[~np.isfinite(density)] = (hi - lo) / (2 * np.pi * beta)  # beta = 1: the limit at x = 0
    cdf = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(t))])
    return float(np.interp(0.5 * cdf[-1], cdf, x))
