"""What a table was measured on: the processor, and the kernels that BLAS, PyTorch and subspan chose for it."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path

# Everything on AVX2: what laptops have, and servers of some kinds.
AVX2 = {
    "OPENBLAS_CORETYPE": "Haswell",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "SUBSPAN_ISA": "avx2",
}


def environment(avx2: bool = False) -> dict[str, str]:
    """That of a run in which peers, and subspan, are at their best; or all of them held to AVX2."""
    free = {k: v for k, v in os.environ.items() if k not in AVX2}
    return {**free, **AVX2} if avx2 else free


def at_its_best() -> None:
    """Once more without what holds peers below what the processor has: libraries look at it when they are loaded."""
    if any(k in os.environ for k in AVX2) and not avx2_for_all():
        os.execve(sys.executable, [sys.executable, *sys.argv], environment())


def cpuinfo(key: str) -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
        return next(line.partition(":")[2].strip() for line in text.splitlines() if line.partition("\t")[0] == key)
    except (OSError, StopIteration):
        return ""


def processor() -> str:
    """Its name, with family and model where Linux tells: some makers give several the same name."""
    name = cpuinfo("model name") or platform.processor() or platform.machine()
    family = cpuinfo("cpu family")
    return f"{name} (family {family}, model {cpuinfo('model')})" if family else name


def slug() -> str:
    """For the name of a file."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(r\)|\(tm\)|cpu|@.*?ghz", "", processor().lower())).strip("-")


def _blas() -> list[tuple[str, str]]:
    from threadpoolctl import threadpool_info

    return sorted(
        {(x["internal_api"], x.get("architecture", "")) for x in threadpool_info() if x["user_api"] == "blas"}
    )


def kernels() -> str:
    """Those of the libraries that are loaded."""
    import numpy as np

    from subspan import _core

    np.ones((2, 2)) @ np.ones((2, 2))
    text = f"subspan {_core.isa()}; BLAS: " + ", ".join(f"{api} {kind}".strip() for api, kind in _blas())
    torch = sys.modules.get("torch")
    return text + (f"; torch {torch.backends.cpu.get_cpu_capability()}" if torch is not None else "")


def held() -> list[str]:
    """Why this run says little about peers: what is held below what the processor has, by whom."""
    found = [f"{k} is set to {v}" for k, v in os.environ.items() if k in AVX2 and not avx2_for_all()]
    wide = "avx512f" in cpuinfo("flags").split()
    if wide and not avx2_for_all():
        narrow = {"haswell", "zen", "sandybridge", "nehalem", "prescott", "core2", "excavator"}
        found += [f"{api} runs on {kind} kernels" for api, kind in _blas() if kind.lower() in narrow]
        torch = sys.modules.get("torch")
        if torch is not None and torch.backends.cpu.get_cpu_capability() not in ("AVX512", "NO AVX"):
            found.append(f"torch runs on {torch.backends.cpu.get_cpu_capability()} kernels")
    return found


def save(path: Path, text: str) -> int:
    """Writes a table, and returns what the run ends with: 1, and no table, where a peer is held."""
    if found := held():
        print("not saved:", "; ".join(found), file=sys.stderr)
        return 1
    path.write_text(text.rstrip() + "\n")
    return 0


def avx2_for_all() -> bool:
    return all(os.environ.get(k) == v for k, v in AVX2.items())
