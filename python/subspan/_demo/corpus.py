"""Input of the demonstration: Python's own standard library as hashed token n-grams, or a user's data."""

from __future__ import annotations

import ast
import re
import sysconfig
import zlib
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy import sparse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TOKEN = re.compile(r"[A-Za-z_][A-Za-z_0-9]+")
COLUMNS = 1 << 15


class Corpus(NamedTuple):
    """Rows to stream and what they are."""

    X: Any  # CSR or dense, (rows, columns), float32 or float64
    names: list[str]  # one label a row: the module, file or row number
    title: str


def hashed_ngrams(text: str) -> Counter[int]:
    """Counts of token unigrams and bigrams, hashed to COLUMNS buckets by CRC-32 (the same on every machine)."""
    tokens = [t.lower() for t in TOKEN.findall(text)]
    grams: Counter[str] = Counter(tokens)
    grams.update(f"{a} {b}" for a, b in pairwise(tokens))
    out: Counter[int] = Counter()
    for gram, count in grams.items():
        out[zlib.crc32(gram.encode()) % COLUMNS] += count
    return out


def tfidf(rows: list[Counter[int]]) -> Any:
    """CSR of log-scaled counts times inverse document frequency, rows of unit length, float32."""
    indptr = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(r) for r in rows], out=indptr[1:])
    indices = np.fromiter((j for r in rows for j in sorted(r)), dtype=np.int32, count=indptr[-1])
    counts = np.fromiter((r[j] for r in rows for j in sorted(r)), dtype=np.float64, count=indptr[-1])
    documents = np.bincount(indices, minlength=COLUMNS)
    values = (1.0 + np.log(counts)) * np.log((1.0 + len(rows)) / (1.0 + documents[indices]))
    X = sparse.csr_array((values, indices, indptr.astype(np.int32)), shape=(len(rows), COLUMNS))
    norms = np.sqrt(np.asarray(X.multiply(X).sum(axis=1)).ravel())
    norms[norms == 0.0] = 1.0
    X.data /= np.repeat(norms, np.diff(X.indptr))
    return X.astype(np.float32)


def module_name(path: Path, root: Path) -> str:
    """Dotted module name of a source file below root."""
    parts = list(path.relative_to(root).with_suffix("").parts)
    if parts[-1] == "__init__" and len(parts) > 1:
        parts.pop()
    return ".".join(parts)


def pieces(source: str) -> Iterator[str]:
    """Top-level functions, the methods of top-level classes, and the rest as one piece."""
    lines = source.splitlines()
    taken = np.zeros(len(lines), dtype=bool)
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            inner = [n for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = [node]
        else:
            continue
        for f in inner:
            end = f.end_lineno or f.lineno
            taken[f.lineno - 1 : end] = True
            yield "\n".join(lines[f.lineno - 1 : end])
    yield "\n".join(line for line, t in zip(lines, taken, strict=True) if not t)


def standard_library(progress: Callable[[float], None]) -> Corpus:
    """Every function of the standard library's Python sources (its tests and bundled packages left out)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__", "_vendor"}
    files = sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts[:-1]))
    names: list[str] = []
    rows: list[Counter[int]] = []
    for i, path in enumerate(files):
        progress(i / len(files))
        try:
            source = path.read_text(encoding="utf-8")
            parts = [p for p in pieces(source) if len(p) > 200]
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue  # templates and files of another encoding are no modules
        names += [module_name(path, root)] * len(parts)
        rows += [hashed_ngrams(p) for p in parts]
    order = np.random.default_rng(0).permutation(len(rows))
    return Corpus(
        tfidf([rows[i] for i in order]), [names[i] for i in order], f"Python's standard library ({len(files)} files)"
    )


def directory(path: Path, progress: Callable[[float], None]) -> Corpus:
    """The text files below a directory, one row each."""
    files = sorted(p for p in path.rglob("*") if p.is_file() and not any(q.startswith(".") for q in p.parts[1:]))
    names, rows = [], []
    for i, p in enumerate(files):
        progress(i / len(files))
        try:
            text = p.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if grams := hashed_ngrams(text):
            names.append(str(p.relative_to(path)))
            rows.append(grams)
    if not rows:
        raise ValueError(f"{path}: no readable text files")
    return Corpus(tfidf(rows), names, str(path))


def load(path: Path, progress: Callable[[float], None]) -> Corpus:
    """A user's data: .npy, .npz (scipy.sparse or one array), .csv (numbers, one header line allowed) or a directory."""
    if not path.exists():
        raise ValueError(f"{path}: no such file or directory")
    if path.is_dir():
        return directory(path, progress)
    X: Any
    if path.suffix == ".npy":
        X = np.load(path, allow_pickle=False, mmap_mode="r")
    elif path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as f:
            if "format" in f.files and "shape" in f.files:
                stored: Any = sparse.load_npz(path)
                X = stored.tocsr()
            elif len(f.files) == 1:
                X = f[f.files[0]]
            else:
                raise ValueError(
                    f"{path}: holds {len(f.files)} arrays, wanted one, or a matrix of scipy.sparse.save_npz"
                )
    elif path.suffix == ".csv":
        with open(path, encoding="utf-8") as f:
            first = f.readline()
        try:
            [float(x) for x in first.split(",")]
            header = 0
        except ValueError:
            header = 1
        X = np.loadtxt(path, delimiter=",", skiprows=header, ndmin=2)
    else:
        raise ValueError(f"{path}: expected .npy, .npz, .csv or a directory")
    if X.ndim != 2:
        raise ValueError(f"{path}: expected a matrix, got shape {X.shape}")
    if X.dtype not in (np.float32, np.float64):
        if not np.issubdtype(X.dtype, np.number) or np.issubdtype(X.dtype, np.complexfloating):
            raise ValueError(f"{path}: expected real numbers, got {X.dtype}")
        X = X.astype(np.float32)
    return Corpus(X, [f"row {i}" for i in range(X.shape[0])], str(path))
