"""Shared inputs and references."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker for each core: threads of BLAS and PyTorch would take each other's
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from device import emulated, emulation, gpu  # noqa: F401

# Examples are drawn from a fixed seed: a failure on one machine is a failure on all, and no run is slower by luck.
settings.register_profile(
    "subspan", derandomize=True, deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("subspan")


# What compiles, starts programs or waits; the rest is sampled for ``pytest -m quick``.
HEAVY = {"test_command_line", "test_contraction", "test_embed", "test_examples", "test_fuzz", "test_interrupts"}


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """A worker for each core where all tests are asked for; ``-n 0`` or ``-p no:xdist`` is one process."""
    if not config.pluginmanager.hasplugin("xdist") or hasattr(config, "workerinput"):
        return
    option = config.option
    whole = config.args_source == pytest.Config.ArgsSource.TESTPATHS
    if whole and option.numprocesses is None and not (option.usepdb or option.collectonly):
        option.numprocesses, option.dist = os.cpu_count() or 1, "worksteal"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every tenth test of what runs on the CPU, the same ones each time, is quick."""
    for item in items:
        if item.path.stem in HEAVY or item.path.parent.name == "cuda" or item.get_closest_marker("slow"):
            continue
        if zlib.crc32(item.nodeid.rpartition("/")[2].encode()) % 10 == 0:
            item.add_marker("quick")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20240611)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real data that SUBSPAN_DATA names; without it the bundled sets of scikit-learn have to do."""
    folder = os.environ.get("SUBSPAN_DATA", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("SUBSPAN_DATA names no data folder")
    return Path(folder)
