"""Command line: ``python -m subspan info | demo | bench``."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def info() -> dict[str, str]:
    """What this installation is and what it found on this machine."""
    import platform

    import numpy as np
    import scipy

    import subspan
    from subspan import _core

    build = _core.build_info()
    lapack = f"SciPy {scipy.__version__}"
    try:
        _core.load_lapack()
        config: Any = scipy.show_config(mode="dicts")
        found = config["Build Dependencies"]["lapack"]
        lapack += f" ({found.get('name')} {found.get('version')}), LP64"
    except (ImportError, KeyError, TypeError) as e:
        lapack += f": {e}"
    return {
        "subspan": f"{subspan.__version__}, {build['compiler']}",
        "python": f"{platform.python_version()}, NumPy {np.__version__}",
        "machine": f"{platform.machine()}, {platform.system()}",
        "instruction set": f"{_core.isa()} (best here: {_core.isa_available()})"
        + ("" if build["multi_isa"] else ", single-path build"),
        "caches of a core": " and ".join(f"{x >> 10} KiB" for x in build["caches"]),
        "LAPACK": lapack,
        "products": "own kernels",
        "threads": str(subspan.get_num_threads()),
        "CUDA": _cuda(),
    }


def _cuda() -> str:
    from subspan._lib.device import CudaError, kernels

    try:
        module = kernels()
    except CudaError as e:
        return (
            "not built (no nvcc 13 or no GPU was found, or SUBSPAN_CUDA=OFF), see docs/cuda.md"
            if "no CUDA kernels" in str(e)
            else str(e)
        )
    runtime, driver = module.versions()
    chips = ", ".join(f"sm_{x}" for x in module.architectures().replace("-real", "").split())
    has = f"kernels for {chips}, runtime {runtime // 1000}.{runtime % 1000 // 10}"
    if driver == 0:
        return f"{has}; no driver on this machine"
    count = module.device_count()
    return f"{has}; driver for {driver // 1000}.{driver % 1000 // 10}, {count} device{'' if count == 1 else 's'}"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m subspan", description="A compiled numerical core for subspaces.")
    sub = p.add_subparsers(dest="command", required=True)
    sub.add_parser("info", help="version, instruction set, LAPACK, threads, CUDA")
    demo = sub.add_parser("demo", help="stream a corpus through StreamingSVD and show what it learned")
    demo.add_argument(
        "--input",
        metavar="FILE|DIR",
        help=".npy, .npz, .csv or a directory of text files; default: the source of Python's standard library",
    )
    demo.add_argument("--rank", type=int, default=64)
    demo.add_argument("--block", type=int, default=256, help="rows per update")
    demo.add_argument("--save", metavar="FILE.npz", help="keep the stream")
    demo.add_argument("--picture", metavar="FILE.png", default="demo_spectrum.png")
    bench = sub.add_parser("bench", help="the benchmarks of a source checkout, as one table")
    bench.add_argument("rest", nargs=argparse.REMAINDER, help="passed to bench/run.py")
    return p


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = parser().parse_args(argv)
    if options.command == "info":
        try:
            facts = info()
        except ValueError as e:  # an environment variable
            print(f"python -m subspan info: {e}", file=sys.stderr)
            return 1
        width = max(map(len, facts))
        for key, value in facts.items():
            print(f"{key:<{width}}  {value}")
        return 0
    if options.command == "bench":
        import subprocess
        from pathlib import Path

        script = Path("bench/run.py")
        if not script.exists():
            print("python -m subspan bench: run it in a source checkout, where bench/run.py is", file=sys.stderr)
            return 2
        return subprocess.call([sys.executable, str(script), *options.rest])
    for name in ("rank", "block"):
        if getattr(options, name) < 1:
            print(f"python -m subspan demo: --{name} must be at least 1", file=sys.stderr)
            return 2
    try:
        from rich.console import Console
    except ImportError:
        print("python -m subspan demo needs the demo extra: pip install 'subspan[demo]'", file=sys.stderr)
        return 2
    from subspan_demo.job import run

    try:
        run(options, Console())
    except (ValueError, OSError) as e:
        print(f"python -m subspan demo: {e}", file=sys.stderr)
        return 1
    except ImportError as e:
        print(f"python -m subspan demo needs the demo extra: pip install 'subspan[demo]' ({e})", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
