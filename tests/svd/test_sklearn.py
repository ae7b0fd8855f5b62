"""The drop-in passes scikit-learn's own tests, and takes what scikit-learn's refuses."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import sklearn.decomposition
from scipy import sparse
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.utils.estimator_checks import check_estimator

from subspan.sklearn import IncrementalPCA

Peer = sklearn.decomposition.IncrementalPCA

PLUGIN = """
import sklearn.decomposition
import subspan.sklearn
sklearn.decomposition.IncrementalPCA = subspan.sklearn.IncrementalPCA
"""

# What these check after all else is that input is refused which the drop-in takes.
REFUSALS = {"test_incremental_pca_sparse", "test_incremental_pca_validation"}


def test_scikit_learns_own_tests(tmp_path):
    """Everything in the installed test file passes, but for two assertions that sparse or short batches are refused."""
    path = Path(sklearn.decomposition.__file__).parent / "tests" / "test_incremental_pca.py"
    (tmp_path / "swap_plugin.py").write_text(PLUGIN)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    out = subprocess.run(
        [sys.executable, "-m", "pytest", str(path), "-q", "-p", "swap_plugin", "-p", "no:cacheprovider", "--tb=line",
         "-c", str(tmp_path / "pytest.ini"), "--rootdir", str(tmp_path), "-rf"],
        capture_output=True, text=True, env=env, check=False, timeout=600, cwd=tmp_path,
    ).stdout  # fmt: skip
    lines = out.splitlines()
    failed = [line for line in lines if line.startswith("FAILED")]
    assert {line.split("::")[1].split("[")[0].split(" ")[0] for line in failed} <= REFUSALS, out
    assert all("DID NOT RAISE" in line for line in failed), out
    passed = int(lines[-1].split(" passed")[0].split()[-1])
    assert passed >= 20, out


def test_check_estimator():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(IncrementalPCA(), on_fail=None)
    failed = [(r["check_name"], r["exception"]) for r in results if r["status"] not in ("passed", "skipped")]
    assert not failed
    assert len(results) > 40


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("shape", [(200, 30, 5, 40), (120, 300, 7, 30), (90, 20, None, 25)])
def test_same_attributes_as_scikit_learn(rng, dtype, whiten, shape):
    rows, n, k, batch = shape
    X = (rng.standard_normal((rows, n)) * 0.9 ** np.arange(n) + 1).astype(dtype)
    ours, peer = (C(n_components=k, whiten=whiten, batch_size=batch).fit(X) for C in (IncrementalPCA, Peer))
    tol = 2e-4 if dtype == np.float32 else 1e-9
    names = ("mean_", "var_", "singular_values_", "explained_variance_", "explained_variance_ratio_", "noise_variance_")
    for name in names:
        np.testing.assert_allclose(getattr(ours, name), getattr(peer, name), rtol=tol, atol=tol, err_msg=name)
    assert (ours.n_components_, ours.n_samples_seen_, ours.batch_size_) == (
        peer.n_components_,
        peer.n_samples_seen_,
        batch,
    )
    # scikit-learn's float32 results turn into float64 at the second batch; ours keep the dtype of the data.
    assert ours.components_.dtype == ours.singular_values_.dtype == dtype
    np.testing.assert_allclose(np.abs(np.sum(ours.components_ * peer.components_, axis=1)), 1, atol=20 * tol)
    np.testing.assert_allclose(ours.transform(X), peer.transform(X), atol=300 * tol)
    np.testing.assert_allclose(
        ours.inverse_transform(ours.transform(X)), peer.inverse_transform(peer.transform(X)), atol=300 * tol
    )


def test_first_batch_smaller_than_n_components(rng):
    X = rng.standard_normal((60, 25))
    pca = IncrementalPCA(n_components=10)
    pca.partial_fit(X[:3])
    assert pca.components_.shape == (3, 25)
    assert pca.n_components_ == 3
    for i in range(3, 60, 3):
        pca.partial_fit(X[i : i + 3])
    assert pca.components_.shape == (10, 25)
    np.testing.assert_allclose(pca.components_ @ pca.components_.T, np.eye(10), atol=1e-12)
    np.testing.assert_allclose(pca.mean_, X.mean(axis=0))
    np.testing.assert_allclose(pca.var_, X.var(axis=0))


@pytest.mark.parametrize("make", [sparse.csr_array, sparse.csr_matrix, sparse.csc_array])
def test_partial_fit_takes_sparse(rng, make):
    X = sparse.random_array((120, 400), density=0.05, format="csr", rng=rng)
    ours, peer = IncrementalPCA(n_components=8), Peer(n_components=8)
    for i in range(0, 120, 40):
        ours.partial_fit(make(X[i : i + 40]))
        peer.partial_fit(X[i : i + 40].toarray())
    np.testing.assert_allclose(ours.singular_values_, peer.singular_values_, rtol=1e-9)
    np.testing.assert_allclose(ours.mean_, peer.mean_, atol=1e-14)
    np.testing.assert_allclose(ours.var_, peer.var_, atol=1e-14)
    np.testing.assert_allclose(ours.transform(make(X)), peer.transform(X.toarray()), atol=1e-8)


def test_the_callers_block_is_not_changed(rng):
    X = rng.standard_normal((50, 20))
    before = X.copy()
    IncrementalPCA(n_components=3).partial_fit(X, check_input=False)
    np.testing.assert_array_equal(X, before)


def test_constant_features_are_completed():
    X = np.zeros((10, 6))
    X[:, 0] = np.arange(10.0)
    ours, peer = IncrementalPCA(n_components=3).fit(X), Peer(n_components=3).fit(X)
    np.testing.assert_allclose(ours.singular_values_, peer.singular_values_, atol=1e-12)
    np.testing.assert_allclose(ours.components_ @ ours.components_.T, np.eye(3), atol=1e-12)


def test_clone_and_pickle():
    X = load_digits().data
    pca = clone(IncrementalPCA(n_components=5, whiten=True, batch_size=200)).fit(X)
    again = pickle.loads(pickle.dumps(pca))
    np.testing.assert_array_equal(pca.transform(X), again.transform(X))
    np.testing.assert_array_equal(pca.partial_fit(X[:50]).components_, again.partial_fit(X[:50]).components_)
    assert repr(pca) == "IncrementalPCA(batch_size=200, n_components=5, whiten=True)"


def test_errors(rng):
    X = rng.standard_normal((20, 5))
    with pytest.raises(ValueError, match="n_components=6 invalid for n_features=5"):
        IncrementalPCA(n_components=6).fit(X)
    pca = IncrementalPCA(n_components=3).partial_fit(X)
    with pytest.raises(ValueError, match="features"):
        pca.partial_fit(X[:, :4])
    with pytest.raises(ValueError, match="changed from 3 to 4"):
        pca.set_params(n_components=4).partial_fit(X)
