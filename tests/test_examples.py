"""The examples and the code on the pages of the families, run as they stand."""

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


# -- Plücker mixing ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixing():
    spec = importlib.util.spec_from_file_location("grassmann_mixing", ROOT / "examples" / "grassmann_mixing.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["grassmann_mixing"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("form", ["paper", "prenorm"])
def test_mixing_layer_against_autograd(mixing, form):
    """The same layer in PyTorch, with the per-offset form: output, and the gradients of input and parameters."""
    torch = pytest.importorskip("torch")
    from plucker_reference import projected

    rng = np.random.default_rng(0)
    layer = mixing.GrassmannLayer(12, 6, [1, 2, 4], form=form, rng=rng, dtype=np.float64)
    for name, x in layer.parameters.items():  # away from zeros and ones
        layer.parameters[name] = x + 0.1 * rng.standard_normal(x.shape)
    h, grad = rng.standard_normal((2, 20, 12)), rng.standard_normal((2, 20, 12))
    out = layer.forward(h)
    dh = layer.backward(grad)
    p = {name: torch.from_numpy(x).requires_grad_() for name, x in layer.parameters.items()}
    x = torch.from_numpy(h).requires_grad_()

    def norm(y, which):
        return torch.nn.functional.layer_norm(y, (12,), p[f"scale_{which}"], p[f"shift_{which}"])

    def blend(y):
        g = projected(y @ p["W_red"].mT + p["b_red"], p["W_plu"], p["b_plu"], [1, 2, 4], norm="soft", eps=1e-4)
        a = torch.sigmoid(torch.cat([y, g], -1) @ p["W_gate"].mT + p["b_gate"])
        return a * y + (1 - a) * g

    def feed_forward(y):
        y = torch.nn.functional.gelu(y @ p["W_in"].mT + p["b_in"], approximate="tanh")
        return y @ p["W_out"].mT + p["b_out"]

    if form == "paper":
        y = norm(blend(x), "mix")
        want = norm(y + feed_forward(y), "ffn")
    else:
        y = x + norm(blend(norm(x, "first")), "mix")
        want = y + feed_forward(norm(y, "ffn"))
    want.backward(torch.from_numpy(grad))
    np.testing.assert_allclose(out, want.detach().numpy(), atol=1e-11)
    np.testing.assert_allclose(dh, x.grad.numpy(), atol=1e-10)
    assert layer.gradients.keys() == p.keys()
    for name, parameter in p.items():
        np.testing.assert_allclose(layer.gradients[name], parameter.grad.numpy(), atol=1e-10, err_msg=name)


def test_mixing_layer_sees_no_future(mixing):
    rng = np.random.default_rng(0)
    layer = mixing.GrassmannLayer(12, 6, [1, 2, 4], rng=rng)
    h = rng.standard_normal((1, 40, 12), dtype=np.float32)
    before = layer.forward(h)
    h[:, 25:] = 3.0
    np.testing.assert_array_equal(layer.forward(h)[:, :25], before[:, :25])
    with pytest.raises(ValueError, match="form must be"):
        mixing.GrassmannLayer(12, 6, [1], form="postnorm", rng=rng)


def test_mixing_learns(mixing):
    """A character model of the standard library: perplexity at least 15% below the same network without mixing."""
    sizes = {"d": 48, "r": 12, "depth": 1, "length": 64, "steps": 300, "lr": 1e-2}
    text = mixing.standard_library(300_000)
    mixed, alone = (mixing.train(text, mixing=m, **sizes) for m in (True, False))
    assert mixed <= 0.85 * alone


def blocks():
    """All Python code of README and of the pages, each block by itself; that of a device needs one."""
    for path in [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").rglob("*.md") if p.stem != "cuda")]:
        name = str(path.relative_to(ROOT))
        code = re.findall(r"```python\n(.*?)```", path.read_text() if path.exists() else "", flags=re.S)
        yield from (pytest.param(name, block, id=f"{name}-{i}") for i, block in enumerate(code))


@pytest.mark.parametrize(("page", "code"), list(blocks()))
def test_code_of_the_pages(page, code):
    pytest.importorskip("torch")
    exec(compile(code, page, "exec"), {})


def links(path):
    """Where a page leads inside of the project, and the part of a page that it names."""
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if not re.match(r"[a-z]+:", target):
            where, _, anchor = target.partition("#")
            yield (path.parent / where if where else path), anchor


def test_links_lead_somewhere():
    pages = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
        (ROOT / "docs").rglob("*.md")
    )
    missing = []
    for page in pages:
        for target, anchor in links(page):
            heads = (
                re.findall(r"^#+ (.*)$", target.read_text(), flags=re.M)
                if target.suffix == ".md" and target.exists()
                else []
            )
            slugs = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
            if not target.exists() or (anchor and anchor not in slugs):
                missing.append(f"{page.relative_to(ROOT)}: {target.name}#{anchor}")
    assert not missing
