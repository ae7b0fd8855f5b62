"""Stream a corpus through StreamingSVD and report what came of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.sparse.linalg import svds

import subspan
from subspan._arrays import is_sparse
from subspan._demo.corpus import Corpus, load, standard_library
from subspan.svd import StreamingSVD

if TYPE_CHECKING:
    from rich.console import Console

KNOWN = (
    "json",
    "asyncio.tasks",
    "sqlite3.dbapi2",
    "email.message",
    "tarfile",
    "unittest.case",
    "decimal",
    "_pydecimal",
)
PEER_BLOCKS = 3


def run(options: Any, console: Console) -> StreamingSVD:
    """The whole job; options are those of the command line."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    for path in (options.save, options.picture):
        if path and not Path(path).absolute().parent.is_dir():
            raise ValueError(f"{path}: there is no such folder to write to")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=not console.is_terminal) as bar:
        reading = bar.add_task("reading", total=100)
        note = lambda share: bar.update(reading, completed=int(100 * share))  # noqa: E731
        corpus = load(Path(options.input), note) if options.input else standard_library(note)
        bar.update(reading, completed=100)
        rows, n = corpus.X.shape
        if rows == 0:
            raise ValueError(f"{corpus.title}: no rows")
        rank = min(options.rank, n, rows)
        # Text has a slowly falling spectrum: twice the directions inside keep what truncation would lose.
        svd = StreamingSVD(rank, oversample=min(rank, n - rank))
        streaming = bar.add_task("streaming", total=rows)
        seconds = 0.0
        for i in range(0, rows, options.block):
            block = corpus.X[i : i + options.block]
            start = time.perf_counter()
            try:
                svd.update(block)
            except ValueError as e:
                raise ValueError(f"{corpus.title}, block of rows from {i} on: {e}") from e
            seconds += time.perf_counter() - start
            bar.update(streaming, completed=min(rows, i + options.block))
        start = time.perf_counter()
        values = svd.singular_values
        seconds += time.perf_counter() - start
    report(corpus, svd, values, seconds, options, console)
    if options.save:
        svd.save(options.save)
        console.print(f"state saved to {options.save}: StreamingSVD.load({str(options.save)!r}) reads it")
    return svd


def report(corpus: Corpus, svd: StreamingSVD, values: Any, seconds: float, options: Any, console: Console) -> None:
    """Figures, neighbours and the picture."""
    from rich.table import Table

    X = corpus.X
    rows, n = X.shape
    density = X.nnz / (rows * n) if is_sparse(X) else 1.0
    nonzero = f"{100 * density:.2g}% nonzero" if is_sparse(X) else "dense"
    table = Table(title=corpus.title, show_header=False, title_justify="left")
    table.add_row("rows × columns", f"{rows:,} × {n:,} ({X.dtype}, {nonzero})")
    table.add_row("rank", str(values.shape[0]))
    total = svd.captured_energy + svd.residual_energy
    if total > 0:
        table.add_row("energy captured", f"{100 * svd.captured_energy / total:.2f}% of the rows' squared norm")
    exact = exact_values(X, values.shape[0])
    if exact is not None and exact.size:
        best = float(np.sum(exact**2))
        kept = projected_energy(X, svd)
        table.add_row(
            "against the exact truncated SVD",
            f"subspace holds {100 * kept / best:.2f}% of its energy, "
            f"singular values {100 * svd.captured_energy / best:.2f}%",
        )
    elif values.shape[0]:
        table.add_row("against the exact truncated SVD", "not computed: the matrix is large")
    rate = rows / seconds
    table.add_row("subspan", f"{rate:,.0f} rows/s ({svd})")
    peer = peer_rate(X, values.shape[0], options.block)
    if isinstance(peer, float):
        table.add_row(
            "scikit-learn IncrementalPCA", f"{peer:,.0f} rows/s on the same blocks, dense: {rate / peer:,.1f} times"
        )
    else:
        table.add_row("scikit-learn IncrementalPCA", peer)
    console.print(table)
    if values.shape[0] == 0:
        console.print("all rows are zero (of texts: all have the same words), so there is no subspace to show")
        return
    Z = np.asarray(svd.project(np.ascontiguousarray(X) if not is_sparse(X) else X), dtype=np.float64)
    labels, places = by_label(corpus.names, Z)
    neighbours(labels, places, console)
    picture(labels, places, np.asarray(values, dtype=np.float64), exact, options.picture, console)


def exact_values(X: Any, k: int) -> Any:
    """Singular values by ARPACK or LAPACK, or None where that would take too long."""
    rows, n = X.shape
    if k == 0:
        return None
    if not is_sparse(X) and min(rows, n) <= 1500:
        return np.linalg.svd(np.asarray(X, dtype=np.float64), compute_uv=False)[:k]
    if k >= min(rows, n) - 1 or (X.nnz if is_sparse(X) else rows * n) > 50_000_000:
        return None
    return np.sort(svds(X.astype(np.float64), k, return_singular_vectors=False, rng=np.random.default_rng(0)))[::-1]


def projected_energy(X: Any, svd: StreamingSVD) -> float:
    """Squared norm of all rows inside the subspace, by blocks."""
    return sum(
        float(np.sum(np.asarray(svd.project(X[i : i + 4096]), np.float64) ** 2)) for i in range(0, X.shape[0], 4096)
    )


def peer_rate(X: Any, k: int, block: int) -> float | str:
    """Rows per second of scikit-learn on the first blocks, or why there is none."""
    try:
        from sklearn.decomposition import IncrementalPCA
    except ImportError:
        return "not installed"
    rows = X.shape[0]
    blocks = [X[i : i + block] for i in range(0, X.shape[0], block)][: PEER_BLOCKS + 1]
    blocks = [b.toarray() if is_sparse(b) else np.array(b) for b in blocks if b.shape[0] == blocks[0].shape[0]]
    if blocks[0].shape[0] < k or len(blocks) < 2:
        return f"not run: it needs two blocks of {max(k, 1)} rows or more, there are {rows} rows in blocks of {block}"
    peer = IncrementalPCA(n_components=k).partial_fit(blocks[0])
    start = time.perf_counter()
    for b in blocks[1:]:
        peer.partial_fit(b)
    return float(sum(b.shape[0] for b in blocks[1:]) / (time.perf_counter() - start))


def by_label(names: list[str], Z: Any) -> tuple[list[str], Any]:
    """Sums of the coordinates of rows that share a label."""
    labels, inverse = np.unique(np.asarray(names), return_inverse=True)
    places = np.zeros((labels.size, Z.shape[1]))
    np.add.at(places, inverse, Z)
    return [str(x) for x in labels], places


def neighbours(labels: list[str], places: Any, console: Console) -> None:
    """The nearest rows to a few known ones, by cosine in the learned subspace."""
    from rich.table import Table

    norms = np.linalg.norm(places, axis=1, keepdims=True)
    unit = places / np.where(norms == 0.0, 1.0, norms)
    chosen = [x for x in KNOWN if x in labels] or labels[: min(4, len(labels))]
    table = Table(title="Nearest in the subspace", title_justify="left")
    table.add_column("to")
    table.add_column("are")
    for name in chosen:
        i = labels.index(name)
        cosine = unit @ unit[i]
        cosine[i] = -np.inf
        best = np.argsort(-cosine)[: min(5, len(labels) - 1)]
        table.add_row(name, ", ".join(f"{labels[j]} ({cosine[j]:.2f})" for j in best))
    console.print(table)


def picture(labels: list[str], places: Any, values: Any, exact: Any, path: str, console: Console) -> None:
    """The spectrum, and the corpus in the first two directions."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    index = np.arange(1, values.size + 1)
    if exact is not None:
        left.semilogy(np.arange(1, exact.size + 1), exact, "-", color="0.6", lw=3, label="exact")
    left.semilogy(index, values, ".-", label="streamed")
    left.set(xlabel="component", ylabel="singular value", title="Spectrum")
    left.legend()
    norms = np.linalg.norm(places, axis=1)
    unit = places / np.where(norms == 0, 1.0, norms)[:, None]
    x, y = unit[:, 0], unit[:, 1] if places.shape[1] > 1 else np.zeros(len(labels))
    groups = [label.partition(".")[0].partition("/")[0] for label in labels]
    common = [g for g, _ in sorted(((g, groups.count(g)) for g in set(groups)), key=lambda p: (-p[1], p[0]))[:8]]
    shown = common if len(set(groups)) < len(groups) else []
    rest = [i for i, g in enumerate(groups) if g not in shown]
    right.scatter(x[rest], y[rest], s=9, color="0.75", label="other" if shown else None)
    for g in shown:
        at = [i for i, h in enumerate(groups) if h == g]
        right.scatter(x[at], y[at], s=16, label=g)
    right.set(xlabel="direction 1", ylabel="direction 2", title="First two directions (rows of unit length)")
    if shown:
        right.legend(fontsize="small")
    for name in KNOWN:
        if name in labels:
            i = labels.index(name)
            right.annotate(name, (x[i], y[i]), fontsize=8)
    fig.savefig(path, dpi=110)
    plt.close(fig)
    console.print(f"picture written to {path} (subspan {subspan.__version__})")
