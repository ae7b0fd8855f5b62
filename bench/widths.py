"""PCA by stream at common widths, 12 blocks of 1000 rows, k = 20: ``python bench/widths.py [--save]``.

Rows of a decaying spectrum about a mean, from the first block to the components, one thread. NumPy is
``C += X.T @ X`` in the dtype of the rows and the top of ``scipy.linalg.eigh``; `covariance_eigh` is scikit-learn's PCA
on all rows at once; scikit-learn-intelex is measured where it is installed (``pip install scikit-learn-intelex``).
Milliseconds, and in parentheses the error of the singular values in units of the dtype's eps times the largest of them.
The last column is the time of an update of a later block over that of ``X.T @ X`` alone.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.linalg
from sklearn.decomposition import PCA, IncrementalPCA
from threadpoolctl import threadpool_limits

import machine
import subspan
from subspan.svd import StreamingSVD

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCKS, ROWS, K = 12, 1000, 20
WIDTHS = (60, 150, 300, 700, 1000)


def intelex() -> Any:
    """scikit-learn-intelex's estimator, which moves between its modules; none where it is not installed."""
    try:
        import daal4py

        try:
            from sklearnex.decomposition import IncrementalPCA as Accelerated
        except ImportError:
            from sklearnex.preview.decomposition import IncrementalPCA as Accelerated
    except ImportError:
        return None
    daal4py.daalinit(1)
    return Accelerated


def best(f: Callable[[], Any], seconds: float) -> float:
    f()
    least, end = np.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        f()
        least = min(least, time.perf_counter() - start)
    return float(least)


def row(dtype: str, n: int, accelerated: Any, seconds: float) -> list[str]:
    rng = np.random.default_rng(n)
    turn = np.linalg.qr(rng.standard_normal((n, n)))[0]
    whole = rng.standard_normal((BLOCKS * ROWS, n)) * 0.98 ** np.arange(n) @ turn + rng.standard_normal(n)
    whole = np.ascontiguousarray(whole, dtype)
    blocks = [whole[i : i + ROWS] for i in range(0, len(whole), ROWS)]

    def stream() -> Any:
        svd = StreamingSVD(K, center=True)
        for x in blocks:
            svd.update(x)
        return svd.components, svd.singular_values

    def lines() -> Any:
        c: Any = 0
        m: Any = 0
        for x in blocks:
            c = c + x.T @ x
            m = m + x.sum(0)
        values, v = scipy.linalg.eigh(c - np.outer(m, m) / len(whole), subset_by_index=(n - K, n - 1))
        return v, np.sqrt(values[::-1])

    def estimator(make: Any) -> Callable[[], Any]:
        def run() -> Any:
            pca = make(n_components=K)
            for x in blocks:
                pca.partial_fit(x)
            return pca.components_, pca.singular_values_

        return run

    def covariance() -> Any:
        pca = PCA(n_components=K, svd_solver="covariance_eigh").fit(whole)
        return pca.components_, pca.singular_values_

    exact = whole.astype(np.float64)
    want = np.sqrt(np.linalg.eigvalsh((exact - exact.mean(0)).T @ (exact - exact.mean(0)))[::-1][:K])
    cells = []
    for f in (stream, lines, covariance, estimator(IncrementalPCA), accelerated and estimator(accelerated)):
        if f is None:
            cells.append("–")
            continue
        off = np.abs(f()[1] - want).max() / (np.finfo(dtype).eps * want[0])
        cells.append(f"{1e3 * best(f, seconds):.2f} ({off:.2g})")
    svd = StreamingSVD(K, center=True).update(blocks[0])
    for x in blocks:
        svd.update(x)
    update = np.median([timed(lambda x=x: svd.update(x)) for x in blocks * 4])
    return [dtype, str(n), *cells, f"{update / best(lambda: blocks[1].T @ blocks[1], seconds / 4):.2f}"]


def timed(f: Callable[[], Any]) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def main() -> int:
    machine.at_its_best()
    p = argparse.ArgumentParser(prog="bench/widths.py", description=__doc__.splitlines()[0])
    p.add_argument("--seconds", type=float, default=0.4, help="for each way")
    p.add_argument("--save", action="store_true")
    options = p.parse_args()
    warnings.simplefilter("ignore")
    accelerated = intelex()
    subspan.set_num_threads(1)
    head = [
        "dtype",
        "n",
        "subspan",
        "NumPy",
        "covariance_eigh",
        "IncrementalPCA",
        "scikit-learn-intelex",
        "update ÷ XᵀX",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    with threadpool_limits(1):
        where = f"{machine.processor()}; {machine.kernels()}; one thread."
        for dtype in ("float32", "float64"):
            for n in WIDTHS:
                lines.append("| " + " | ".join(row(dtype, n, accelerated, options.seconds)) + " |")
                print(lines[-1], flush=True)
    text = ["# PCA by stream at common widths", "", __doc__.split("\n\n", 1)[1].strip(), "", where, "", *lines, ""]
    return machine.save(Path(__file__).parent / "results" / "widths.md", "\n".join(text)) if options.save else 0


if __name__ == "__main__":
    sys.exit(main())
