"""Shared inputs and references."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

# Examples are drawn from a fixed seed: a failure on one machine is a failure on all, and no run is slower by luck.
settings.register_profile(
    "subspan", derandomize=True, deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("subspan")


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
