"""Fixtures of a device: the CUDA kernels on an emulated one, or on a real GPU (SUBSPAN_TEST_GPU=1)."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import subspan._lib.device as placing

HERE = Path(__file__).parent / "cuda"
GPU = os.environ.get("SUBSPAN_TEST_GPU", "") == "1"


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """The extension module of the emulated device."""
    if GPU:
        pytest.skip("this run is of a real GPU")
    if sys.platform != "linux":
        pytest.skip("the emulated device is written for Linux")
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            pytest.skip(f"the emulated device is compiled with {tool}, which is not there")
    import pybind11

    ready = os.environ.get("SUBSPAN_EMULATED_BUILD", "")
    # Workers of pytest-xdist have one folder above theirs in common; the first to come builds for all.
    shared = "PYTEST_XDIST_WORKER" in os.environ
    base = tmp_path_factory.getbasetemp()
    build = Path(ready) if ready else (base.parent if shared else base) / "emulated"
    build.mkdir(exist_ok=True)
    options = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    if shutil.which("ninja"):
        options.append("-GNinja")
    import fcntl

    with open(build / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (["cmake", "-S", HERE, "-B", build, *options], ["cmake", "--build", build, "--parallel", "2"]):
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    (path,) = build.glob("_cuda_emulated*.so")
    spec = importlib.util.spec_from_file_location("_cuda_emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Gpu:
    """What tests use of a device: arrays on it, and several runs that must give the same bits."""

    def __init__(self, xp, control):
        self.xp, self.control = xp, control

    def put(self, x, device=0):
        if self.control is not None:
            return self.xp.asarray(x, device)
        try:
            return self.xp.asarray(np.asarray(x))
        except (TypeError, ValueError) as e:
            pytest.skip(f"CuPy does not take {np.asarray(x).dtype}: {e}")

    def get(self, x) -> np.ndarray:
        return x.get()

    def twice(self, f):
        """The result of f, which must not depend on the order in which threads run."""
        results = []
        for seed in (1, 77):
            if self.control is not None:
                self.control.seed(seed)
            results.append(f())
        first, second = ([r] if not isinstance(r, (tuple, list)) else list(r) for r in results)
        for a, b in zip(first, second, strict=True):
            np.testing.assert_array_equal(bits(self.get(a)), bits(self.get(b)))
        return results[0]


def bits(x: np.ndarray) -> np.ndarray:
    return x.view({2: np.uint16, 4: np.uint32, 8: np.uint64}[x.dtype.itemsize])


@pytest.fixture
def gpu(request, monkeypatch):
    if GPU:
        cupy = pytest.importorskip("cupy")
        yield Gpu(cupy, None)
        return
    module = request.getfixturevalue("emulated")
    sys.path.insert(0, str(HERE))
    try:
        import fake_cupy
    finally:
        sys.path.remove(str(HERE))
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy)
    monkeypatch.setattr(placing, "_module", module)
    module.emulated.reset()
    fake_cupy.cuda.current, fake_cupy.cuda.stream = 0, 0
    yield Gpu(fake_cupy, module.emulated)
    module.emulated.reset()


@pytest.fixture
def emulation(gpu):
    """Only on the emulated device: what a real one cannot be made to do."""
    if gpu.control is None:
        pytest.skip("needs the emulated device")
    return gpu
