"""What the compiler said of the kernels, and the module where there is no driver."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import subspan

FOLDER = Path(subspan.__file__).parent / "cuda_resources"
HAS_KERNELS = importlib.util.find_spec("subspan._cuda") is not None


def kernels():
    """(source, architecture, kernel, stack bytes, spilled bytes, registers) of every kernel of the installed build."""
    out = []
    for path in sorted(FOLDER.glob("*.txt")):
        architecture = name = None
        for line in path.read_text().splitlines():
            if found := re.search(r"Compiling entry function '(\S+)' for 'sm_(\d+)'", line):
                name, architecture = found.groups()
            elif found := re.search(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
            ):
                stack, stores, loads = map(int, found.groups())
            elif found := re.search(r"Used (\d+) registers", line):
                if name is None:  # of a function that is not a kernel
                    continue
                out.append((path.name, architecture, name, stack, stores + loads, int(found.group(1))))
                name = None
    return out


@pytest.mark.skipif(not HAS_KERNELS, reason="a build without CUDA kernels")
def test_no_kernel_spills():
    found = kernels()
    sources = {source for source, *_ in found}
    files = list((Path(__file__).parents[2] / "cuda").glob("*/*.cu"))
    assert len({x.name for x in files}) == len(files) > 20
    assert {f"{x.name}.txt" for x in files if "__global__" in x.read_text()} <= sources
    architectures = {architecture for _, architecture, *_ in found}
    assert architectures if os.environ.get("SUBSPAN_TEST_GPU") else {"80", "90", "120"} <= architectures
    bad = [(source, arch, name, stack, spills) for source, arch, name, stack, spills, _ in found if stack or spills]
    assert not bad, bad


@pytest.mark.skipif(not HAS_KERNELS, reason="a build without CUDA kernels")
def test_the_module_loads_without_a_driver():
    from subspan import _cuda

    assert _cuda.device_count() >= 0
    assert _cuda.versions()[0] >= 13000
    assert os.environ.get("SUBSPAN_TEST_GPU") or "90" in _cuda.architectures()


needs_cmake = pytest.mark.skipif(
    sys.platform != "linux" or not all(map(shutil.which, ("cmake", "c++"))), reason="CMake and a compiler"
)


@needs_cmake
@pytest.mark.parametrize(
    ("chips", "said"),
    [(None, "no GPU of sm_80"), (["7.5"], "no GPU of sm_80"), (["9.0", "9.0", "12.0"], "for 90-real;120-real")],
)
def test_a_build_left_to_itself_is_for_the_gpus_that_are_there(tmp_path, chips, said):
    """With tools that only answer questions."""
    tools = {"nvcc": "Cuda compilation tools, release 13.0, V13.0.88"}
    if chips is not None:
        tools["nvidia-smi"] = "\\n".join(chips)
    for name, answer in tools.items():
        (tmp_path / name).write_text(f'#!/bin/sh\nprintf "{answer}\\n"\n')
        (tmp_path / name).chmod(0o755)
    script = (Path(__file__).parents[2] / "cmake" / "cuda.cmake").read_text()
    # Up to where the compiler itself is asked for.
    script = script[: script.index("if(NOT SUBSPAN_WHY_NOT)\n  enable_language")]
    lines = "cmake_minimum_required(VERSION 3.18)\nproject(x LANGUAGES CXX)\n"
    end = 'message(STATUS "${SUBSPAN_WHY_NOT} for ${CMAKE_CUDA_ARCHITECTURES}")\n'
    (tmp_path / "CMakeLists.txt").write_text(f"{lines}set(CMAKE_CUDA_COMPILER {tmp_path / 'nvcc'})\n{script}{end}")
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}" if chips else os.environ["PATH"]
    done = subprocess.run(
        ["cmake", "-S", tmp_path, "-B", tmp_path / "build", "-DSUBSPAN_CUDA=AUTO"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PATH": path},
    )
    if chips is None and shutil.which("nvidia-smi"):
        pytest.skip("there is a GPU here")
    assert said in done.stdout


@needs_cmake
def test_an_old_nvcc_is_passed_over(tmp_path):
    """Not one that CMake tries with architectures that it does not know."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text('#!/bin/sh\necho "Cuda compilation tools, release 12.4, V12.4.131"\n')
    nvcc.chmod(0o755)
    lines = "cmake_minimum_required(VERSION 3.18)\nproject(x LANGUAGES CXX)\n"
    script = Path(__file__).parents[2] / "cmake" / "cuda.cmake"
    (tmp_path / "CMakeLists.txt").write_text(f"{lines}set(CMAKE_CUDA_COMPILER {nvcc})\ninclude({script.as_posix()})\n")
    for mode, status in (("AUTO", 0), ("ON", 1)):
        done = subprocess.run(
            ["cmake", "-S", tmp_path, "-B", tmp_path / mode, f"-DSUBSPAN_CUDA={mode}"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == status, done.stdout + done.stderr
        assert "nvcc 13.0 or newer is needed, found 12.4" in done.stdout + done.stderr
