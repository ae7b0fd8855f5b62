"""What has no CUDA kernel says so, and leaves everything as it was."""

from __future__ import annotations

import numpy as np
import pytest

import subspan.sklearn
from subspan import grassmann, orth, plucker, svd


def refused(U, G):
    return {
        "contains": lambda: orth.contains(U, U),
        "hadamard": lambda: orth.hadamard(G),
        "random_tangent": lambda: grassmann.random_tangent(U),
        "hessian": lambda: grassmann.euclidean_to_riemannian_hessian(U, G, G, G),
        "coordinates": lambda: plucker.coordinates(G),
        "wedge": lambda: plucker.wedge(G[:, 0], G[:, 1]),
        "relations": lambda: plucker.relations(G[:3, 0], 3, 2),
        "basis": lambda: plucker.basis(G[:3, 0], 3, 2),
        "hodge": lambda: plucker.hodge(G[:3, 0], 3, 2),
        "product_svd": lambda: svd.product_svd(G, U.T),
        "merge_svd": lambda: svd.merge_svd(svd.truncated_svd(G, 2), svd.truncated_svd(G, 2), 2),
        "choose_rank": lambda: svd.choose_rank(G[:, 0], energy=0.9),
        "IncrementalPCA": lambda: subspan.sklearn.IncrementalPCA(2).partial_fit(G, check_input=False),
        "IncrementalPCA, checked": lambda: subspan.sklearn.IncrementalPCA(2).partial_fit(G),
        "FrequentDirections": lambda: svd.FrequentDirections(4, 3).update(G),
    }


@pytest.mark.parametrize("name", refused(None, None))
def test_functions_of_the_cpu(gpu, rng, name):
    U = gpu.put(np.linalg.qr(rng.standard_normal((20, 3)))[0].astype(np.float32))
    G = gpu.put(rng.standard_normal((20, 3)).astype(np.float32))
    before = gpu.get(G)
    with pytest.raises(TypeError, match="runs on the CPU and moves no data by itself"):
        refused(U, G)[name]()
    np.testing.assert_array_equal(gpu.get(G), before)


def test_directions_in_the_memory_of_the_host(gpu, rng):
    G = gpu.put(rng.standard_normal((20, 3)).astype(np.float32))
    with pytest.raises(TypeError, match="source is on the CPU and C on CUDA device 0"):
        orth.rotate(G, np.eye(20)[0], np.eye(20)[1])
