"""The module of the device's kernels beside that of the CPU's: one name and one signature for one thing."""

from __future__ import annotations

import re
from pathlib import Path

from stubs import stub
from subspan import _core

PACKAGE = Path(__file__).parents[2] / "python" / "subspan"


def parameters(doc: str) -> list[str]:
    return re.findall(r"(\w+): ", doc.splitlines()[0])


def test_both_modules_have_the_same_names_and_signatures(emulated):
    """What both sides have is called alike; what is not called alike is a part of something else and told here."""
    alone = {
        # of the device's module itself
        "architectures", "device_count", "versions", "has_blas", "load_blas", "has_solver", "load_solver",
        # states that live in arrays of the caller's library there, and in objects on the CPU
        "svd_update", "svd_merge", "mix_ring", "truncated_svd", "complete_vectors", "squared_norm", "emulated",
    }  # fmt: skip
    found = {name for name in vars(emulated) if not name.startswith("__") and name not in alone}
    assert len(found) > 30
    for name in sorted(found):
        assert hasattr(_core, name), f"{name} has another name on the CPU"
        there, here = parameters(getattr(emulated, name).__doc__), parameters(getattr(_core, name).__doc__)
        assert there == here, f"{name}: {there} on a device, {here} on the CPU"


def test_the_device_stub_is_what_its_bindings_say(emulated):
    wanted = stub(emulated)
    assert (PACKAGE / "_cuda.pyi").read_text() == wanted, "run tests/stubs.py with the emulated module's path"
