"""The module of the device's kernels beside that of the CPU's: one name and one signature for one thing."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from stubs import stub
from subspan import _core

PACKAGE = Path(__file__).parents[2] / "python" / "subspan"


def parameters(doc: str) -> list[str]:
    return re.findall(r"(\w+): ", doc.splitlines()[0])


def test_both_modules_have_the_same_names_and_signatures(emulated):
    """What both sides have is called alike; what is not called alike is a part of something else and told here."""
    alone = {
        # of the device's module itself
        "architectures", "device_count", "versions",
        # and of the emulated one
        "emulated",
    }  # fmt: skip
    found = {name for name in vars(emulated) if not name.startswith("__") and name not in alone}
    assert len(found) > 30
    for name in sorted(found):
        assert hasattr(_core, name), f"{name} has another name on the CPU"
        there, here = getattr(emulated, name), getattr(_core, name)
        if not isinstance(there, type):
            assert parameters(there.__doc__) == parameters(here.__doc__), name
            continue
        for method, f in vars(there).items():
            if method == "__init__" or not method.startswith("_"):
                assert parameters(f.__doc__) == parameters(getattr(here, method).__doc__), f"{name}.{method}"


def test_the_device_stub_is_what_its_bindings_say(emulated):
    wanted = stub(emulated)
    assert (PACKAGE / "_cuda.pyi").read_text() == wanted, "run tests/stubs.py with the emulated module's path"


def test_the_code_of_the_page(gpu, monkeypatch):
    """docs/cuda.md, on the emulated device at a fraction of its size."""
    page = Path(__file__).parents[2] / "docs" / "cuda.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S)
    scope = {}
    if gpu.control is not None:
        cupy, rng = sys.modules["cupy"], np.random.default_rng(0)
        random = SimpleNamespace(standard_normal=lambda shape, dtype: gpu.put(rng.standard_normal(shape).astype(dtype)))
        linalg = SimpleNamespace(qr=lambda x: [gpu.put(y) for y in np.linalg.qr(x.get())])
        monkeypatch.setattr(cupy, "random", random, raising=False)
        monkeypatch.setattr(cupy, "linalg", linalg, raising=False)
        monkeypatch.setattr(cupy, "float32", np.float32, raising=False)
        code = code.replace("4096", "96")
    exec(compile(code, str(page), "exec"), scope)
    left = gpu.get(scope["U"]).T @ gpu.get(scope["G"])
    assert np.abs(left).max() < 1e-4
