"""Stream a corpus through StreamingSVD and report what came of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import svds

from subspan.svd import StreamingSVD
from subspan_demo.corpus import Corpus, load, standard_library
from subspan_demo.picture import picture

if TYPE_CHECKING:
    from rich.console import Console

is_sparse: Any = sparse.issparse  # without its narrowing of types

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
PEER_ENTRIES = 50_000_000


def run(options: Any, console: Console) -> StreamingSVD:
    """The whole job; options are those of the command line."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if options.picture and Path(options.picture).suffix.lower() not in (".png", ".pdf", ".svg", ".jpg", ".jpeg"):
        raise ValueError(f"{options.picture}: a picture is .png, .pdf, .svg or .jpg")
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
    for remark in corpus.remarks:
        console.print(remark)
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
    best = float(np.sum(exact**2)) if exact is not None and exact.size else None
    if best is not None:
        kept = projected_energy(X, svd)
        table.add_row(
            "against the exact truncated SVD",
            f"subspace holds {100 * kept / best:.2f}% of its energy, "
            f"singular values {100 * svd.captured_energy / best:.2f}%",
        )
    elif values.shape[0]:
        small = min(rows, n) <= values.shape[0] + 1
        why = "the rank is that of the whole matrix" if small else "the matrix is large"
        table.add_row("against the exact truncated SVD", f"not computed: {why}")
    rate = rows / seconds
    table.add_row("subspan", f"{rate:,.0f} rows/s ({svd})")
    for name, text in peers(X, values.shape[0], options.block, rate, best):
        table.add_row(name, text)
    console.print(table)
    if values.shape[0] == 0:
        console.print("all rows are zero (of texts: all have the same words), so there is no subspace to show")
        return
    Z = np.asarray(svd.project(np.ascontiguousarray(X) if not is_sparse(X) else X), dtype=np.float64)
    labels, places = by_label(corpus.names, Z)
    neighbours(labels, places, console)
    caption = picture(labels, places, np.asarray(values, dtype=np.float64), exact, KNOWN, options.picture)
    console.print(f"picture written to {options.picture}: {caption}")


def exact_values(X: Any, k: int) -> Any:
    """Singular values by ARPACK or LAPACK, or None where that would take too long."""
    rows, n = X.shape
    if k == 0:
        return None
    if not is_sparse(X) and min(rows, n) <= 1500:
        return np.linalg.svd(np.asarray(X, dtype=np.float64), compute_uv=False)[:k]
    if k >= min(rows, n) - 1 or (X.nnz if is_sparse(X) else rows * n) > PEER_ENTRIES:
        return None
    return np.sort(svds(X.astype(np.float64), k, return_singular_vectors=False, rng=np.random.default_rng(0)))[::-1]


def projected_energy(X: Any, svd: StreamingSVD) -> float:
    """Squared norm of all rows inside the subspace, by blocks."""
    return sum(
        float(np.sum(np.asarray(svd.project(X[i : i + 4096]), np.float64) ** 2)) for i in range(0, X.shape[0], 4096)
    )


def peers(X: Any, k: int, block: int, rate: float, best: float | None) -> list[tuple[str, str]]:
    """What scikit-learn does with the same rows: the call for sparse rows, and the class that takes them in blocks."""
    try:
        from sklearn.decomposition import IncrementalPCA, TruncatedSVD
    except ImportError:
        return [("scikit-learn", "not installed")]
    out = []
    if is_sparse(X):
        name = "scikit-learn TruncatedSVD"
        if not 0 < k < X.shape[1] or X.shape[0] < 2:
            out.append((name, f"not run: there is no rank of {k} for it to find"))
        elif X.nnz > PEER_ENTRIES:
            out.append((name, "not run: the matrix is large"))
        else:
            one_shot = TruncatedSVD(k, random_state=0)
            start = time.perf_counter()
            one_shot.fit(X)
            found = X.shape[0] / (time.perf_counter() - start)
            kept = (
                "" if best is None else f", {100 * float(np.sum((X @ one_shot.components_.T) ** 2)) / best:.2f}% held"
            )
            out.append((name, f"{found:,.0f} rows/s, all rows at once in memory{kept}: {rate / found:,.1f} times"))
    name = "scikit-learn IncrementalPCA"
    rows = X.shape[0]
    blocks = [X[i : i + block] for i in range(0, X.shape[0], block)][: PEER_BLOCKS + 1]
    blocks = [b.toarray() if is_sparse(b) else np.array(b) for b in blocks if b.shape[0] == blocks[0].shape[0]]
    if blocks[0].shape[0] < k or len(blocks) < 2:
        need = f"it needs two blocks of {max(k, 1)} rows or more, there are {rows} rows in blocks of {block}"
        return [*out, (name, f"not run: {need}")]
    incremental = IncrementalPCA(n_components=k).partial_fit(blocks[0])
    start = time.perf_counter()
    for b in blocks[1:]:
        incremental.partial_fit(b)
    found = float(sum(b.shape[0] for b in blocks[1:]) / (time.perf_counter() - start))
    dense = ", which it takes dense" if is_sparse(X) else ""
    return [*out, (name, f"{found:,.0f} rows/s on the same blocks{dense}: {rate / found:,.1f} times")]


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
