"""Run every benchmark and print one table: ``python bench/run.py [pytest arguments]``.

Exit status 1 when a whole band is below its budget. ``--save FILE.md`` also writes the table.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent


def main(args: list[str]) -> int:
    save = None
    if "--save" in args:
        at = args.index("--save")
        save = Path(args[at + 1])
        del args[at : at + 2]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m", "pytest", str(HERE), "-q", "-p", "no:cacheprovider", f"--benchmark-json={out}"]
        status = subprocess.call(
            [*command, "--benchmark-disable-gc", "--benchmark-columns=min", *args], cwd=HERE.parent
        )
        if not out.exists() or not out.read_text():
            return status
        result = json.loads(out.read_text())
    lines = ["| case | peer | ratio | band | reach | × floor |", "|---|---|---|---|---|---|"]
    for b in result["benchmarks"]:
        i = b["extra_info"]
        floor = f"{i['floor']:.2f}" if "floor" in i else ""
        if i.get("floor_reach"):
            floor += f" (reach {i['floor_reach']})"
        less = i.get("less", False)
        met = "" if (i["ratio"] <= i["reach"] if less else i["ratio"] >= i["reach"]) else " (missed)"
        lines.append(
            f"| {i['name']} | {i['peer']} | {i['ratio']:.2f}× | {i['band'][0]:.2f}–{i['band'][1]:.2f} "
            f"| {'under ' if less else ''}{i['reach']}×{met} | {floor} |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    if save is not None:
        from subspan import __version__, _core

        cpu = result["machine_info"]["cpu"].get("brand_raw", platform.processor())
        head = f"subspan {__version__}, {cpu}, {_core.isa()}, Python {platform.python_version()}\n\n"
        save.write_text(head + text)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
