"""Run every benchmark and print one table: ``python bench/run.py [pytest arguments]``.

Exit status 1 when a whole band is slower than the peer, or the time is above its multiple of the floor. ``--save`` also
writes the table to bench/results, one file for each processor; ``--save FILE.md`` elsewhere. ``--avx2`` holds BLAS,
MKL, PyTorch and subspan to AVX2. A table is not saved where a peer is held below what the processor has.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import machine

HERE = Path(__file__).parent

NOTE = """`ratio`: the peer's time over ours, with its band over the rounds. `× floor`: our time over the larger of
flops at the best product rate of the run and bytes at its copy rate. `two threads`: our time on one over that on two,
where one takes more than a millisecond."""


def main(args: list[str]) -> int:
    save = None
    avx2 = "--avx2" in args
    if avx2:
        args.remove("--avx2")
    if "--save" in args:
        at = args.index("--save")
        named = at + 1 < len(args) and args[at + 1].endswith(".md")
        save = Path(args[at + 1]) if named else HERE / "results" / f"{machine.slug()}{'-avx2' if avx2 else ''}.md"
        del args[at : at + 1 + named]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m", "pytest", str(HERE), "-q", "-p", "no:cacheprovider", f"--benchmark-json={out}"]
        status = subprocess.call(
            [*command, "--benchmark-disable-gc", "--benchmark-columns=min", *args],
            cwd=HERE.parent,
            env=machine.environment(avx2),
        )
        if not out.exists() or not out.read_text():
            return status
        result = json.loads(out.read_text())
    lines = [
        "| case | peer | ms | ratio | band | at least | × floor (reach) | two threads |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for b in result["benchmarks"]:
        i = b["extra_info"]
        floor = f"{i['floor']:.2f}" if "floor" in i else ""
        if i.get("floor_reach"):
            floor += f" ({i['floor_reach']}{'' if i['floor'] <= i['floor_reach'] else ', missed'})"
        threads = f"{i['two_threads']:.2f}" if "two_threads" in i else ""
        less = i.get("less", False)
        met = "" if (i["ratio"] <= i["reach"] if less else i["ratio"] >= i["reach"]) else " (missed)"
        lines.append(
            f"| {i['name']} | {i['peer']} | {i.get('ms', 0):.3g} | {i['ratio']:.2f} "
            f"| {i['band'][0]:.2f}–{i['band'][1]:.2f} "
            f"| {'under ' if less else ''}{i['reach']}{met} | {floor} | {threads} |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    said = result["machine_info"]["subspan"]
    print(said["kernels"])
    if save is not None and said["held"]:
        print("not saved:", "; ".join(said["held"]))
        return 1
    if save is not None:
        from subspan import __version__

        head = f"subspan {__version__}, {machine.processor()}, one thread. {said['kernels']}."
        save.write_text(f"{head} Python {platform.python_version()}.\n\n{NOTE}\n\n{text}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
