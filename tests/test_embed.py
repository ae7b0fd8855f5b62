"""C++ programs outside of the project: find_package from the installed wheel, FetchContent from the source."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from importlib.metadata import entry_points, version
from importlib.resources import files
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LAPACK = pytest.importorskip(
    "scipy_openblas32", reason="scipy-openblas32 (Linux) is the LAPACK that the programs bring"
)

pytestmark = pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which("c++") is None, reason="no cmake or C++ compiler"
)


def build(tmp_path: Path, *options: str) -> str:
    library = Path(LAPACK.get_lib_dir()) / "libscipy_openblas.so"
    configure = ["cmake", "-S", str(HERE / "embed"), "-B", str(tmp_path), "-DCMAKE_BUILD_TYPE=Release"]
    configure += [f"-DSUBSPAN_LAPACK_LIBRARIES={library}", "-DSUBSPAN_LAPACK_PREFIX=scipy_", *options]
    for command in (configure, ["cmake", "--build", str(tmp_path), "--parallel", "2"], [str(tmp_path / "consumer")]):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def pages(folder: Path) -> list[Path]:
    """The C++ code of the documentation, a file for each block."""
    folder.mkdir()
    found = []
    for page in sorted((HERE.parent / "docs").glob("*.md")):
        for i, code in enumerate(re.findall(r"```cpp\n(.*?)```", page.read_text(), flags=re.S)):
            found.append(folder / f"page_{page.stem}_{i}.cpp")
            found[-1].write_text(code)
    return found


def test_find_package(tmp_path):
    """The cmake.prefix entry point leads to the package; an update, and what the pages show, run without Python."""
    (entry,) = [e for e in entry_points(group="cmake.prefix") if e.name == "subspan"]
    prefix = os.fspath(files(entry.value))
    options = [f"-DCMAKE_PREFIX_PATH={prefix}", f"-DSUBSPAN_VERSION={version('subspan')}"]
    code = pages(tmp_path / "pages")
    assert len(code) >= 3
    assert "0 failures" in build(tmp_path, *options, f"-DSUBSPAN_PAGES={';'.join(map(str, code))}")
    shown = subprocess.run([tmp_path / "page_cpp_0"], capture_output=True, text=True, check=True).stdout.split()
    assert len(shown) == 8
    assert sorted(map(float, shown), reverse=True) == list(map(float, shown))
    program = tmp_path / "cuda_consumer"
    if (Path(str(files("subspan"))) / "cuda_resources").is_dir() and shutil.which("nvcc"):
        assert program.exists(), "the wheel has the CUDA kernels and the toolkit is there"
    if program.exists():
        result = subprocess.run([program], capture_output=True, text=True, check=False)
        assert "0 failures" in result.stdout, result.stdout + result.stderr


@pytest.mark.slow
def test_fetch_content_with_one_instruction_set(tmp_path):
    """The source as a sub-project, with the run-time choice of instruction sets off."""
    out = build(tmp_path, f"-DSUBSPAN_SOURCE={HERE.parent}", "-DSUBSPAN_MULTI_ISA=OFF", "-DSUBSPAN_WERROR=ON")
    assert out.startswith("generic")
    assert "0 failures" in out
