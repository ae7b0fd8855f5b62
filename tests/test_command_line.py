"""python -m subspan: info, demo on several inputs, errors without a traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from subspan.svd import StreamingSVD


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
        "scikit-learn",
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
