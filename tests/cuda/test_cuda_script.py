"""The script for a machine with a GPU, its stages run on the emulated device."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    shutil.which("bash") is None or shutil.which("timeout") is None, reason="a script of bash"
)


def run(folder, emulated, **settings):
    """Lines of stages.txt, by the name of the stage, and the exit status."""
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "SUBSPAN_EMULATED_BUILD": str(Path(emulated.__file__).parent),
        **settings,
    }
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = ["bash", ROOT / "bench" / "gpu.sh", "--emulated", folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = (folder / "stages.txt").read_text().splitlines()
    return {line.split()[0]: line for line in lines}, done


def test_stages_that_fail_or_hang_leave_the_others_their_time(tmp_path, emulated):
    stages, done = run(
        tmp_path,
        emulated,
        STAGES="smoke tests memcheck racecheck bench",
        BREAK_memcheck="fail",
        BREAK_tests="hang",
        STAGE_SECONDS_tests="2",
        BREAK_bench="hang",
        STAGE_SECONDS_bench="1",
    )
    assert list(stages) == ["smoke", "tests", "memcheck", "racecheck", "bench"], done.stdout + done.stderr
    assert "passed" in stages["smoke"]
    assert "ran out of its 2 s" in stages["tests"]
    assert "failed with status 1" in stages["memcheck"]
    assert "passed" in stages["racecheck"]
    assert "ran out of its 1 s" in stages["bench"]
    assert done.returncode == 1
    assert (tmp_path / "racecheck.txt").read_text().startswith("ok")
    lines = (tmp_path / "smoke.txt").read_text().splitlines()
    assert len(lines) > 60
    assert any("bfloat16" in line for line in lines)
    assert all(line.startswith("ok") for line in lines[:-1]), [line for line in lines if line.startswith("FAIL")]


def test_a_smoke_that_hangs_keeps_what_it_has(tmp_path, emulated):
    stages, done = run(tmp_path, emulated, STAGES="smoke tests", STAGE_SECONDS_smoke="3")
    assert "ran out of its 3 s" in stages["smoke"], done.stdout
    assert (tmp_path / "smoke.txt").read_text().startswith("ok")
    assert "passed" in stages["tests"], done.stdout + done.stderr
    assert (tmp_path / "tests.xml").exists()


def test_no_stage_takes_more_than_is_left(tmp_path, emulated):
    stages, _ = run(tmp_path, emulated, STAGES="smoke tests", SECONDS_TOTAL="2")
    assert "ran out of its 2 s" in stages["smoke"]
    assert "had no time left" in stages["tests"]


def test_a_stage_that_hangs_leaves_the_later_ones_what_they_need(tmp_path, emulated):
    need = {"LEAST_memcheck": "1", "LEAST_bench": "20", "SECONDS_TOTAL": "23"}
    stages, done = run(tmp_path, emulated, STAGES="memcheck bench", BREAK_memcheck="hang", **need)
    assert "ran out of its 3 s" in stages["memcheck"], done.stdout
    assert "passed" in stages["bench"], done.stdout


def test_without_a_build_nothing_is_run_and_all_is_told(tmp_path, emulated):
    stages, done = run(tmp_path, emulated, BREAK_build="fail")
    assert "failed with status 1" in stages["build"]
    assert all("nothing was built" in stages[name] for name in ("smoke", "tests", "memcheck", "racecheck", "bench"))
    assert "== done" in done.stdout
    assert done.returncode == 1


def test_tests_that_are_stopped_leave_their_report(tmp_path, emulated):
    stages, done = run(tmp_path, emulated, STAGES="tests", STAGE_SECONDS_tests="8")
    assert "ran out" in stages["tests"] or "passed" in stages["tests"], done.stdout
    assert (tmp_path / "tests.xml").exists(), done.stdout
