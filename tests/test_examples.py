"""The examples and the code on the Grassmann page, run as they stand."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer

from subspan import grassmann, orth

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "fedpg.py"
pytestmark = pytest.mark.skipif(not EXAMPLE.exists(), reason="not in a source checkout")


@pytest.fixture(scope="module")
def fedpg():
    spec = importlib.util.spec_from_file_location("fedpg", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fedpg"] = module
    spec.loader.exec_module(module)
    return module


def run(*arguments):
    return subprocess.run([sys.executable, EXAMPLE, *arguments], capture_output=True, text=True, check=False)


def test_fedpg_on_bundled_data():
    result = run("--rounds", "40")
    assert result.returncode == 0, result.stderr
    assert "10 clients, 569 test rows, 40 rounds" in result.stdout
    assert float(re.search(r"AUROC ([\d.]+)", result.stdout)[1]) > 0.88


def test_fedpg_has_the_published_accuracy(data, fedpg):
    """NSL-KDD, the published settings and start: 0.8365 in the last round, 0.8385 in the best one."""
    pytest.importorskip("torch")
    rows = fedpg.nsl_kdd(data / "nsl_kdd", 20)
    assert sum(len(x) for x in rows.clients) == 67_343
    assert rows.test.shape == (22_544, 34)
    history = fedpg.train(rows, fedpg.published_start(34, 30, 0))
    accuracy = [a for a, _ in history]
    assert len(accuracy) == 100
    assert accuracy[-1] == pytest.approx(0.8365, abs=0.005)
    assert max(accuracy) == pytest.approx(0.8385, abs=0.005)


def test_fedpg_names_what_is_missing(tmp_path):
    result = run(tmp_path)
    assert result.returncode != 0
    assert "train.csv.xz" in result.stderr


def cancer():
    x, y = load_breast_cancer(return_X_y=True)
    benign = x[y == 1]
    mean, spread = benign.mean(0), benign.std(0)
    return (x - mean) / spread, (benign - mean) / spread, benign[:, 0], y == 0


def test_federated_gradients_find_the_central_subspace(fedpg):
    """Ten clients, sorted by a feature, send Euclidean gradients; geodesic steps reach what all rows together give."""
    x, normal, key, anomaly = cancer()
    clients = np.array_split(normal[np.argsort(key, kind="stable")], 10)
    central = np.linalg.svd(normal, full_matrices=False)[2][:5].T
    U = grassmann.random(30, 5, rng=0)
    buffer = np.zeros_like(U)
    for _ in range(150):
        grad = -2 * sum(c.T @ (c @ U) for c in clients) / len(normal)
        grassmann.sgd_step(U, grad, buffer, lr=0.03, momentum=0.8, transport="parallel")
    assert grassmann.distance(U, central, kind="chordal") <= 1e-3
    mine, best = (fedpg.auroc((orth.project_out(x, B, side="right") ** 2).sum(1), anomaly) for B in (U, central))
    assert mine >= 0.90
    assert mine == pytest.approx(best, abs=1e-3)


def test_federated_multipliers_come_near(fedpg):
    """FedPG itself, on the same clients."""
    _, normal, key, _ = cancer()
    clients = np.array_split(normal[np.argsort(key, kind="stable")], 10)
    data = fedpg.Data([c.astype(np.float64) for c in clients], normal[:5], np.zeros(5, bool))
    central = np.linalg.svd(normal, full_matrices=False)[2][:5].T
    Z = fedpg.train(data, fedpg.uniform_start(30, 5, 0), fraction=1.0, lr=0.02, rho=20.0, rounds=100, threshold=1.0)[
        -1
    ][1]
    assert grassmann.distance(orth.orthonormalize(Z.astype(np.float64)), central, kind="chordal") <= 0.5


@pytest.mark.parametrize("block", range(2))
def test_code_of_the_page(block):
    pytest.importorskip("torch")
    text = (ROOT / "docs" / "grassmann.md").read_text()
    code = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert len(code) == 2
    exec(compile(code[block], f"docs/grassmann.md, block {block}", "exec"), {})
