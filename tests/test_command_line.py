"""python -m subspan: info, demo on several inputs, errors without a traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from subspan.svd import StreamingSVD
from subspan_demo.corpus import load
from subspan_demo.picture import picture, place_labels


def call(*args: str, cwd: Path, status: int = 0) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "subspan", *args], capture_output=True, text=True, cwd=cwd, check=False, timeout=600
    )
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout + result.stderr


def test_info(tmp_path):
    out = call("info", cwd=tmp_path)
    for word in ("subspan", "instruction set", "LAPACK", "threads", "CUDA"):
        assert word in out


def test_demo_on_the_standard_library(tmp_path):
    out = call("demo", "--rank", "16", "--block", "512", "--save", "s.npz", cwd=tmp_path)
    for word in (
        "rank",
        "rows/s",
        "exact truncated SVD",
        "scikit-learn TruncatedSVD",
        "scikit-learn IncrementalPCA",
        "asyncio.tasks",
        "Nearest",
        "picture written",
    ):
        assert word in out
    assert (tmp_path / "demo_spectrum.png").read_bytes().startswith(b"\x89PNG")
    svd = StreamingSVD.load(tmp_path / "s.npz")
    assert svd.components.shape == (16, 1 << 15)
    assert svd.rows_seen > 3000


@pytest.fixture
def matrix(rng):
    return rng.standard_normal((60, 3)) @ rng.standard_normal((3, 20))


def test_demo_on_files(tmp_path, matrix):
    np.save(tmp_path / "a.npy", matrix)
    np.save(tmp_path / "int.npy", (10 * matrix).astype(np.int64))
    np.savez(tmp_path / "b.npz", matrix)
    sparse.save_npz(tmp_path / "c.npz", sparse.csr_matrix(np.where(matrix > 1, matrix, 0)))
    np.savetxt(tmp_path / "d.csv", matrix, delimiter=",", header="x" + ",x" * 19, comments="")
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(8):
        (texts / f"{i}.txt").write_text(f"some words of file number{i} and some more words" * (i + 1))
    (texts / "binary.bin").write_bytes(bytes(range(256)))
    for name in ("a.npy", "int.npy", "b.npz", "c.npz", "d.csv", "texts"):
        out = call("demo", "--input", name, "--rank", "3", "--block", "20", cwd=tmp_path)
        assert "rows × columns" in out
        assert "picture written" in out
    (tmp_path / "zeros").mkdir()
    np.save(tmp_path / "z.npy", np.zeros((30, 10)))
    assert "all rows are zero" in call("demo", "--input", "z.npy", cwd=tmp_path)


def read(path, text, encoding="utf-8"):
    path.write_text(text, encoding=encoding)
    return load(path, lambda share: None)


def test_tables(tmp_path):
    """A header, text, quoted fields, gaps, a byte order mark, semicolons, blank lines."""
    path = tmp_path / "t.csv"
    found = read(path, 'id,name,x,"y, in m",note,void\n1,ann,2.5,,"a, b",\n2,bob,NA,4,,\n\n3,ann,3.5,6,c,\n')
    np.testing.assert_array_equal(found.X, [[1, 2.5, 5], [2, 3, 4], [3, 3.5, 6]])
    assert found.names == ["ann", "bob", "ann"]
    assert found.remarks == (
        "rows are named by name; text left out: note",
        "columns without a value, left out: void",
        "2 missing values are the means of their columns",
    )
    found = read(path, "\ufeffa;b\n1;2\n3;4\n")
    np.testing.assert_array_equal(found.X, [[1, 2], [3, 4]])
    assert (found.names, found.remarks) == (["row 0", "row 1"], ())
    np.testing.assert_array_equal(read(path, "a;b\n1,5;2\n3,25;4\n").X, [[1.5, 2], [3.25, 4]])
    np.testing.assert_array_equal(read(path, "1,2\n3,4\n").X, [[1, 2], [3, 4]])
    np.testing.assert_array_equal(read(path, "x,1,2\ny,3,4\n").X, [[1, 2], [3, 4]])
    np.testing.assert_array_equal(read(path, "a\n1\n2\n").X, [[1], [2]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n3,x\n4,5\n", r"line 3, column 2 \(b\): 'x' is no finite number"),
        ("a,b\n1,2\n3,inf\n", r"line 3, column 2 \(b\): 'inf'"),
        ('a,b\n"two\nlines",2\nc,\nd,1e999\n', r"line 5, column 2 \(b\): '1e999'"),
        ("a,b\n1,2\n3\n", "line 3: 1 fields, the first line has 2"),
        ("a,b\nx,y\n", "no column of numbers; of text are a, b"),
        ("a,b\n", "no rows below its header"),
        ("\n\n", "no rows"),
    ],
)
def test_table_errors_name_the_place(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "t.csv", text)


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"a,b\n1,\xe4\n")
    np.save(tmp_path / "b.npy", np.ones((50, 4)))
    (tmp_path / "b.npy").write_bytes((tmp_path / "b.npy").read_bytes()[:300])
    (tmp_path / "c.npz").write_bytes(b"PK no archive")
    np.save(tmp_path / "d.npy", np.array([["a", None]], dtype=object))
    for name in ("a.csv", "b.npy", "c.npz", "d.npy"):
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            load(tmp_path / name, lambda share: None)


def test_labels_of_the_picture_do_not_overlap(tmp_path, rng):
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.text import Text

    fig, axes = plt.subplots(figsize=(6, 4))
    axes.scatter(*rng.standard_normal((2, 50)))
    fig.canvas.draw()
    left_out = place_labels(axes, [(f"name.{i}", 0.01 * i, 0.0) for i in range(40)])
    boxes = [Text.get_window_extent(t) for t in axes.texts]
    assert len(boxes) + len(left_out) == 40
    assert len(boxes) > 10
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    plt.close(fig)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_pictures_of_any_corpus(tmp_path, rng, k):
    """Of one direction or many, with and without groups, with equal rows and one row."""
    for labels in (["a"], [f"row {i}" for i in range(9)], [f"{g}.{i}" for g in "abcd" for i in range(5)]):
        for places in (rng.standard_normal((len(labels), k)), np.zeros((len(labels), k))):
            path = tmp_path / f"{len(labels)}{places.any()}.png"
            story = picture(labels, places, np.arange(k, 0, -1.0), None, ("a.1", "b.2"), str(path))
            assert path.read_bytes().startswith(b"\x89PNG")
            assert ("a, b, c, d" in story) == (len(labels) == 20)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--input", "none.npy"], "no such file"),
        (["--input", "bad.txt"], "expected .npy"),
        (["--input", "one.npy"], "expected a matrix"),
        (["--input", "nan.npy"], "NaN in row 3"),
        (["--input", "empty"], "no readable text"),
    ],
)
def test_demo_errors(tmp_path, args, message):
    (tmp_path / "bad.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "one.npy", np.ones(3))
    a = np.ones((9, 4))
    a[3, 1] = np.nan
    np.save(tmp_path / "nan.npy", a)
    assert message in call("demo", *args, cwd=tmp_path, status=1)


def test_option_errors(tmp_path):
    assert "--rank must be at least 1" in call("demo", "--rank", "0", cwd=tmp_path, status=2)
    assert "source checkout" in call("bench", cwd=tmp_path, status=2)
