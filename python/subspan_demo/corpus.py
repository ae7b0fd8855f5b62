"""Input of the demonstration: Python's own standard library as hashed token n-grams, or a user's data."""

from __future__ import annotations

import ast
import csv
import math
import re
import sysconfig
import zipfile
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
    remarks: tuple[str, ...] = ()  # what was done to them on the way


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


MISSING = {"", "na", "n/a", "nan", "null", "none", "?", "-"}


def number(text: str, comma: bool = False) -> float | None:
    """A finite number, NaN where the field says that it is missing, or None where it is neither."""
    if text.strip().lower() in MISSING:
        return math.nan
    if comma:  # of a file whose fields are separated by something else
        text = text.replace(",", ".")
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def table(path: Path, progress: Callable[[float], None]) -> Corpus:
    """Numbers, text and gaps of a .csv file: the first column of text names the rows, other text is left out, and a
    missing number becomes the mean of its column.
    """
    with open(path, encoding="utf-8-sig", newline="") as f:
        start = f.read(1 << 16)
        f.seek(0)
        try:
            dialect: Any = csv.Sniffer().sniff(start, delimiters=",;\t|")
        except csv.Error:
            dialect = csv.excel
        lines, rows = [], []
        reader = csv.reader(f, dialect)
        for row in reader:
            if any(x.strip() for x in row):
                lines.append(reader.line_num)
                rows.append(row)
                if len(rows) % 4096 == 0:
                    progress(0.5)
    if not rows:
        raise ValueError(f"{path}: no rows")
    width = len(rows[0])
    for line, row in zip(lines, rows, strict=True):
        if len(row) != width:
            raise ValueError(
                f"{path}, line {line}: {len(row)} fields, the first line has {width} (between {dialect.delimiter!r})"
            )
    comma = dialect.delimiter != ","
    first = [number(x, comma) for x in rows[0]]
    below = [{number(r[j], comma) is None for r in rows[1:65]} for j in range(width)]
    named = all(x is None or math.isnan(x) for x in first) or any(
        x is None and kinds == {False} for x, kinds in zip(first, below, strict=True)
    )
    names = [x.strip() or f"column {j + 1}" for j, x in enumerate(rows[0])]
    if named:
        lines, rows = lines[1:], rows[1:]
        if not rows:
            raise ValueError(f"{path}: no rows below its header")
    else:
        names = [f"column {j + 1}" for j in range(width)]
    remarks = []
    columns, text, filled, empty = [], [], 0, []
    for j in range(width):
        progress(0.5 + 0.5 * j / width)
        values = [number(r[j], comma) for r in rows]
        bad = [i for i, x in enumerate(values) if x is None]
        present = sum(1 for x in values if x is not None and not math.isnan(x))
        if bad and present:
            raise ValueError(
                f"{path}, line {lines[bad[0]]}, column {j + 1} ({names[j]}): {rows[bad[0]][j]!r} is no finite number, "
                f"and {present} others of the column are numbers"
            )
        if bad:
            text.append(j)
        elif present == 0:
            empty.append(names[j])
        else:
            column = np.array(values, dtype=np.float64)
            gaps = np.isnan(column)
            column[gaps] = column[~gaps].mean()
            filled += int(gaps.sum())
            columns.append(column)
    if not columns:
        raise ValueError(f"{path}: no column of numbers; of text are {', '.join(names[j] for j in text) or 'none'}")
    if text:
        others = [names[j] for j in text[1:]]
        remarks.append(
            f"rows are named by {names[text[0]]}" + (f"; text left out: {', '.join(others)}" if others else "")
        )
    if empty:
        remarks.append(f"columns without a value, left out: {', '.join(empty)}")
    if filled:
        remarks.append(f"{filled} missing values are the means of their columns")
    labels = [r[text[0]].strip() or "(no name)" for r in rows] if text else [f"row {i}" for i in range(len(rows))]
    return Corpus(np.stack(columns, axis=1), labels, str(path), tuple(remarks))


def load(path: Path, progress: Callable[[float], None]) -> Corpus:
    """A user's data: .npy, .npz (scipy.sparse or one array), .csv (see :func:`table`) or a directory."""
    if not path.exists():
        raise ValueError(f"{path}: no such file or directory")
    if path.is_dir():
        return directory(path, progress)
    if path.suffix == ".csv":
        try:
            return table(path, progress)
        except UnicodeDecodeError as e:
            raise ValueError(
                f"{path}: not text in UTF-8, from byte {e.start} on ({e.reason}); convert it first"
            ) from None
        except csv.Error as e:
            raise ValueError(f"{path}: {e}") from None
    try:
        return arrays(path)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as e:
        if isinstance(e, ValueError) and str(path) in str(e):
            raise
        raise ValueError(f"{path}: damaged, or not what its name says ({e})") from e


def arrays(path: Path) -> Corpus:
    """Of a .npy or .npz file."""
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
    else:
        raise ValueError(f"{path}: expected .npy, .npz, .csv or a directory")
    if X.ndim != 2:
        raise ValueError(f"{path}: expected a matrix, got shape {X.shape}")
    if X.dtype not in (np.float32, np.float64):
        if not np.issubdtype(X.dtype, np.number) or np.issubdtype(X.dtype, np.complexfloating):
            raise ValueError(f"{path}: expected real numbers, got {X.dtype}")
        X = X.astype(np.float32)
    return Corpus(X, [f"row {i}" for i in range(X.shape[0])], str(path))
