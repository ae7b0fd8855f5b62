"""Relative errors of lengths and normalised coordinates of float32 tokens at an angle, as a table.

Against the same tokens in extended precision: the Gram identity, the wedge formed directly, and subspan.plucker.mix.

    python bench/plucker_accuracy.py
"""

from __future__ import annotations

import numpy as np

from subspan import plucker


def main(pairs: int = 2000, r: int = 32) -> None:
    """Prints the table."""
    rng = np.random.default_rng(0)
    i, j = np.triu_indices(r, 1)
    columns = [f"{what}: {how}" for what in ("length", "coordinates") for how in ("Gram", "direct", "here")]
    print("| angle | " + " | ".join(columns) + " |")
    for angle in (1, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
        a = rng.standard_normal((pairs, r))
        a /= np.linalg.norm(a, axis=1, keepdims=True)
        c = rng.standard_normal((pairs, r))
        c -= (a * c).sum(1, keepdims=True) * a
        c /= np.linalg.norm(c, axis=1, keepdims=True)
        tokens = np.stack([a, np.cos(angle) * a + np.sin(angle) * c], 1).astype(np.float32)
        wide = tokens.astype(np.longdouble)
        exact = wide[:, 1, i] * wide[:, 0, j] - wide[:, 1, j] * wide[:, 0, i]
        length = np.sqrt((exact * exact).sum(1))
        unit, length = (exact / length[:, None]).astype(np.float64), length.astype(np.float64)
        z, w = tokens[:, 1], tokens[:, 0]
        direct = z[:, i] * w[:, j] - z[:, j] * w[:, i]
        gram = np.sqrt(np.maximum((z * z).sum(1) * (w * w).sum(1) - (z * w).sum(1) ** 2, 0))
        here = np.linalg.norm(plucker.mix(tokens, 1, norm=None)[:, 1].astype(np.float64), axis=1)
        lengths = [gram, np.linalg.norm(direct, axis=1), here]
        normalised = [direct / np.maximum(n, 1e-8)[:, None] for n in lengths[:2]] + [plucker.mix(tokens, 1)[:, 1]]
        errors = [np.median(np.abs(n / length - 1)) for n in lengths]
        errors += [np.median(np.linalg.norm(p - unit, axis=1)) for p in normalised]
        print(f"| {angle:g} | " + " | ".join(f"{e:.0e}" for e in errors) + " |")


if __name__ == "__main__":
    main()
