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
        STAGES="smoke tests memcheck racecheck",
        BREAK_memcheck="fail",
        BREAK_tests="hang",
        STAGE_SECONDS_tests="2",
    )
    assert list(stages) == ["smoke", "tests", "memcheck", "racecheck"], done.stdout + done.stderr
    assert "passed" in stages["smoke"]
    assert "ran out of its 2 s" in stages["tests"]
    assert "failed with status 1" in stages["memcheck"]
    assert "passed" in stages["racecheck"]
    assert done.returncode == 1
    lines = (tmp_path / "smoke.txt").read_text().splitlines()
    assert len(lines) > 40
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
