"""Federated PCA on the Grassmannian (FedPG): anomaly detection whose training data never leaves its owners.

Clients hold rows of normal traffic. All of them look for one subspace U that reconstructs normal rows; what is left
of a
row, ``||x - U Uᵀx||²``, is its anomaly score. In a round some clients take steps of gradient descent on the
Grassmannian
on

    f_i(U) = ||(I - U Uᵀ) X_i||² / N_i + (<Y_i, U - Z> + rho/2 ||U - Z||²) / N_i

(the alternating direction method of multipliers, with a multiplier Y_i for each client), the server averages their
bases to Z, and every client moves its multiplier by rho (U_i - Z).

With few, small steps the result stays near its start, and so does its accuracy: the published 0.8365 belongs to one
start.

    python examples/fedpg.py                       breast cancer, shipped with scikit-learn
    python examples/fedpg.py PATH/TO/nsl_kdd       NSL-KDD: train.csv.xz and test.csv.xz with a header line

Nguyen et al., Federated PCA on Grassmann Manifold for Anomaly Detection in IoT Networks, INFOCOM 2023. Data:
Tavallaee et
al., A detailed analysis of the KDD CUP 99 data set, 2009.
"""

from __future__ import annotations

import argparse
import csv
import lzma
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from subspan import grassmann, orth

# Columns that are names or flags, not numbers.
DROPPED = {"Protocol.Type", "Service", "Flag", "Land", "Logged.In", "Is.Hot.Logins", "Is.Guest.Login"}


class Data(NamedTuple):
    """What clients hold and what they are judged by."""

    clients: list[np.ndarray]
    """Normal rows of each client, standardised by it: (N_i, d)."""
    test: np.ndarray
    anomaly: np.ndarray


def standardised(x: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Columns with the mean and spread that those of ``like`` have taken off."""
    spread = like.std(0)
    return (x - like.mean(0)) / np.where(spread > 0, spread, 1.0)


def read(path: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Numbers, whether a row is an attack, and the names of the columns."""
    with lzma.open(path, "rt", newline="") as f:
        names, *rows = csv.reader(f)
    kept = [i for i, name in enumerate(names[:-1]) if name not in DROPPED]
    return (
        np.array([[row[i] for i in kept] for row in rows], np.float64),
        np.array([row[-1] != "normal" for row in rows]),
        [names[i] for i in kept],
    )


def split(normal: np.ndarray, key: np.ndarray, clients: int) -> list[np.ndarray]:
    """Sorted by one column, so that no two clients see the same traffic; each standardises its own rows."""
    order = np.argsort(key, kind="stable")
    return [standardised(rows, rows) for rows in np.array_split(normal[order], clients)]


def nsl_kdd(folder: Path, clients: int) -> Data:
    """Intrusion records: the normal ones of the training set, all of the test set."""
    train, attack, names = read(folder / "train.csv.xz")
    test, anomaly, _ = read(folder / "test.csv.xz")
    normal = train[~attack]
    return Data(split(normal, normal[:, names.index("Dst.Bytes")], clients), standardised(test, normal), anomaly)


def breast_cancer(clients: int) -> Data:
    """Benign tumours are normal; all of them are looked at in the end."""
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    benign = x[y == 1]
    return Data(split(benign, benign[:, 0], clients), standardised(x, benign), y == 0)


def local_steps(
    covariance: np.ndarray,
    U: np.ndarray,
    Y: np.ndarray,
    Z: np.ndarray,
    rows: np.ndarray,
    *,
    steps: int,
    lr: float,
    rho: float,
) -> None:
    """Gradient descent of several clients at once: U (clients, d, k) is changed. covariance is XᵀX/N, (clients, d,
    d)."""
    n = rows[:, None, None]
    for _ in range(steps):
        grad = (Y + rho * (U - Z)) / n - 2.0 * covariance @ U
        grassmann.sgd_step(U, grad, lr=lr, retraction="qr", check=False)


def scores(x: np.ndarray, Z: np.ndarray) -> np.ndarray:
    """Squared residuals ``||x - Z Zᵀx||²``, scaled to [0, 1]."""
    left = orth.apply_core(x, Z, -1.0, side="right", check=False)
    squares = np.einsum("ij,ij->i", left, left)
    return (squares - squares.min()) / np.ptp(squares)


def uniform_start(d: int, rank: int, seed: int) -> np.ndarray:
    """Uniform numbers in [0, 1)."""
    return np.random.default_rng(seed).random((d, rank), dtype=np.float32)


def published_start(d: int, rank: int, seed: int) -> np.ndarray:
    """The numbers that the published code starts from."""
    import torch

    return torch.rand((d, rank), generator=torch.Generator().manual_seed(seed)).numpy()


def train(
    data: Data,
    start: np.ndarray,
    *,
    rounds: int = 100,
    fraction: float = 0.1,
    steps: int = 30,
    lr: float = 1e-4,
    rho: float = 0.01,
    threshold: float = 2.5e-4,
    seed: int = 0,
) -> list[tuple[float, np.ndarray]]:
    """Accuracy on the test rows and the common basis after every round, from any matrix (d, k) of full rank."""
    rng = np.random.default_rng(seed)
    covariance = np.stack([x.T @ x / len(x) for x in data.clients]).astype(start.dtype)
    rows = np.array([len(x) for x in data.clients], start.dtype)
    test = data.test.astype(start.dtype)
    Z = start
    U = np.tile(orth.orthonormalize(start), (len(rows), 1, 1))
    Y = np.tile(start, (len(rows), 1, 1))
    history = []
    for _ in range(rounds):
        chosen = rng.choice(len(rows), max(1, round(fraction * len(rows))), replace=False)
        u = U[chosen]
        local_steps(covariance[chosen], u, Y[chosen], Z, rows[chosen], steps=steps, lr=lr, rho=rho)
        weight = rows[chosen] / rows[chosen].sum()
        Z = np.einsum("i,inj->nj", weight, u)
        U[chosen] = u
        Y[chosen] += rho * (u - Z)
        history.append((float(((scores(test, Z) > threshold) == data.anomaly).mean()), Z))
    return history


def auroc(score: np.ndarray, anomaly: np.ndarray) -> float:
    """How often an anomaly scores higher than a normal row."""
    from scipy.stats import rankdata

    positive = int(anomaly.sum())
    ranks = rankdata(score)[anomaly].sum() - positive * (positive + 1) / 2
    return float(ranks / (positive * (len(anomaly) - positive)))


def main(argv: list[str] | None = None) -> int:
    """Train, and print how well the common subspace tells anomalies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", type=Path, help="folder with NSL-KDD; without it, breast cancer")
    parser.add_argument("--clients", type=int, default=None, help="20 for NSL-KDD, 10 without")
    parser.add_argument("--rank", type=int, default=None, help="30 for NSL-KDD, 5 without")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--fraction", type=float, default=0.1, help="part of the clients that a round asks")
    parser.add_argument("--steps", type=int, default=30, help="local steps of a round")
    parser.add_argument("--lr", type=float, default=None, help="1e-4 for NSL-KDD, 1e-2 without")
    parser.add_argument("--rho", type=float, default=0.01)
    parser.add_argument("--threshold", type=float, default=None, help="2.5e-4 for NSL-KDD, 0.02 without")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--start",
        choices=["published", "uniform"],
        default=None,
        help="numbers of torch.rand, as in the published code (NSL-KDD's default), or of NumPy's generator",
    )
    a = parser.parse_args(argv)
    full = a.path is not None
    clients = a.clients or (20 if full else 10)
    if full:
        for name in ("train.csv.xz", "test.csv.xz"):
            if not (a.path / name).is_file():
                parser.error(f"{a.path} has no {name}")
    data = nsl_kdd(a.path, clients) if full else breast_cancer(clients)
    draw = published_start if (a.start or ("published" if full else "uniform")) == "published" else uniform_start
    start = draw(data.test.shape[1], a.rank or (30 if full else 5), a.seed)
    began = time.process_time()
    history = train(
        data,
        start,
        rounds=a.rounds,
        fraction=a.fraction,
        steps=a.steps,
        lr=a.lr or (1e-4 if full else 1e-2),
        rho=a.rho,
        threshold=a.threshold or (2.5e-4 if full else 0.02),
        seed=a.seed,
    )
    seconds = time.process_time() - began
    accuracy = [x for x, _ in history]
    Z = history[-1][1]
    print(f"{len(data.clients)} clients, {len(data.test)} test rows, {a.rounds} rounds: {seconds:.2f} CPU seconds")
    area = auroc(scores(data.test.astype(np.float32), Z), data.anomaly)
    print(f"accuracy: last {accuracy[-1]:.4f}, best {max(accuracy):.4f}; AUROC {area:.4f}")
    print(f"the server's average of two bases: max|ZᵀZ - I| = {np.abs(Z.T @ Z - np.eye(Z.shape[1])).max():.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
