"""What has no CUDA kernel says so, and leaves everything as it was."""

from __future__ import annotations

import numpy as np
import pytest

from subspan import grassmann, orth, plucker, svd


def refused(U, G, S):
    return {
        "orthonormalize": lambda: orth.orthonormalize(G),
        "complement": lambda: orth.complement(U),
        "span_sum": lambda: orth.span_sum(U, U),
        "span_intersection": lambda: orth.span_intersection(U, U),
        "contains": lambda: orth.contains(U, U),
        "hadamard": lambda: orth.hadamard(G),
        "rotate": lambda: orth.rotate(G, U[:, 0], U[:, 1]),
        "quantize_int4": lambda: orth.quantize_int4(G),
        "GradientProjector": lambda: orth.GradientProjector(2).down(G),
        "householder_product_backward": lambda: orth.householder_product_backward(G, G),
        "householder_apply_backward": lambda: orth.householder_apply_backward(G, G, G),
        "log": lambda: grassmann.log(U, U),
        "transport": lambda: grassmann.transport(U, G, G),
        "distance": lambda: grassmann.distance(U, U),
        "principal_angles": lambda: grassmann.principal_angles(U, U),
        "mean": lambda: grassmann.mean(S),
        "random_tangent": lambda: grassmann.random_tangent(U),
        "hessian": lambda: grassmann.euclidean_to_riemannian_hessian(U, G, G, G),
        "logits": lambda: grassmann.logits(G.T, S),
        "coordinates": lambda: plucker.coordinates(G),
        "wedge": lambda: plucker.wedge(G[:, 0], G[:, 1]),
        "relations": lambda: plucker.relations(G[:3, 0], 3, 2),
        "basis": lambda: plucker.basis(G[:3, 0], 3, 2),
        "hodge": lambda: plucker.hodge(G[:3, 0], 3, 2),
        "truncated_svd": lambda: svd.truncated_svd(G, 2),
        "product_svd": lambda: svd.product_svd(G, U.T),
        "FrequentDirections": lambda: svd.FrequentDirections(4, 3).update(G),
    }


@pytest.mark.parametrize("name", refused(None, None, None))
def test_functions_of_the_cpu(gpu, rng, name):
    U = gpu.put(np.linalg.qr(rng.standard_normal((20, 3)))[0].astype(np.float32))
    G, S = (gpu.put(rng.standard_normal(shape).astype(np.float32)) for shape in ((20, 3), (2, 20, 3)))
    before = gpu.get(G)
    with pytest.raises(TypeError, match="runs on the CPU and moves no data by itself"):
        refused(U, G, S)[name]()
    np.testing.assert_array_equal(gpu.get(G), before)
