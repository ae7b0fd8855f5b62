"""Checksums of some 350 results, to show that a change that only moves or wraps code changes no bit of any of them.

``python tests/checksums.py record FILE`` before the change, ``python tests/checksums.py compare FILE`` after it, on one
machine: bits may differ between instruction sets, BLAS libraries and their thread counts, never between two runs.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import pickle
import sys
from pathlib import Path

import numpy as np
from scipy import sparse

import subspan
from subspan import grassmann, orth, plucker
from subspan.sklearn import IncrementalPCA
from subspan.svd import FrequentDirections, StreamingSVD, choose_rank, merge_svd, product_svd, truncated_svd


def digest(x, into):
    """Of arrays and of whatever holds them."""
    if isinstance(x, dict):
        for key in sorted(x):
            into.update(str(key).encode())
            digest(x[key], into)
    elif isinstance(x, (tuple, list)):
        for item in x:
            digest(item, into)
    elif x is None or isinstance(x, (str, bool, int, float)):
        into.update(repr(x).encode())
    else:
        a = np.asarray(x)
        into.update(f"{a.dtype.str}{a.shape}".encode() + np.ascontiguousarray(a).tobytes())


class Inputs:
    """Random input in an order of memory."""

    def __init__(self, dtype, order, seed):
        self.rng, self.dtype, self.order = np.random.default_rng(seed), dtype, order

    def __call__(self, *shape):
        x = self.rng.standard_normal(shape).astype(self.dtype)
        return np.swapaxes(np.swapaxes(x, -1, -2).copy(), -1, -2) if self.order == "F" and x.ndim > 1 else x

    def basis(self, *shape):
        q = np.linalg.qr(self.rng.standard_normal(shape))[0].astype(self.dtype)
        return np.swapaxes(np.swapaxes(q, -1, -2).copy(), -1, -2) if self.order == "F" else q

    def csr(self, m, n):
        return sparse.random_array((m, n), density=0.2, rng=self.rng, format="csr", dtype=self.dtype)


def stepped(step, x, **options):
    u = np.ascontiguousarray(x.basis(7, 40, 4))
    buffers = [np.zeros_like(u)] if step is grassmann.sgd_step else [np.zeros_like(u), np.zeros(7, u.dtype)]
    for i in range(3):
        extra = {"momentum": 0.9} if step is grassmann.sgd_step else {"step": i + 1}
        step(u, np.ascontiguousarray(x(7, 40, 4)), *buffers, lr=0.1, **extra, **options)
    return u, buffers


def streamed(x, n, sizes, csr=False, **options):
    svd = StreamingSVD(5, **options)
    for b in sizes:
        svd.update(x.csr(b, n) if csr else x(b, n))
    return (
        svd.singular_values,
        svd.components,
        svd.mean,
        svd.explained_variance_ratio,
        svd.column_variances if options.get("weight") is None else None,
        svd.project(x(3, n)),
        svd.residual(x(3, n)),
        svd.residual_energy,
        pickle.loads(pickle.dumps(svd)).components,
    )


OFFSETS = [1, 2, 4]
SETTINGS = {"norm": "soft", "rope": "half", "rope_start": 3}
CALLS = {
    "project_out": lambda x: orth.project_out(x(3, 60, 50), x.basis(60, 7)),
    "project_out right": lambda x: orth.project_out(x(60, 50), x.basis(50, 7), side="right", strength=0.5),
    "project_out raw": lambda x: orth.project_out(x(60, 50), x(60, 7), orthonormal=False),
    "project": lambda x: orth.project(x(60, 50), x.basis(60, 3)),
    "apply_core": lambda x: orth.apply_core(x(2, 33, 20), x(33, 5), x(5, 5), alpha=0.5),
    "apply_core wide": lambda x: orth.apply_core(x(300, 200), x(300, 140), x(140)),
    "swap": lambda x: orth.swap(x(20, 30), x(20, 30), x.basis(30, 4)),
    "rotate": lambda x: orth.rotate(x(9, 6), x(9), x(9)),
    "householder_qr": lambda x: (lambda q, r: (q.V, q.tau, r, q.apply(x(50, 4)), q.to_array()))(
        *orth.householder_qr(x(50, 20))
    ),
    "householder_qr stack": lambda x: (lambda q, r: (q.to_array(full=True), r))(*orth.householder_qr(x(9, 16, 8))),
    "householder_qr pivoted": lambda x: (lambda q, r, p: (q.to_array(), r, p))(
        *orth.householder_qr(x(30, 12), pivoting=True)
    ),
    "householder_qr large": lambda x: orth.householder_qr(x(300, 200))[1],
    "householder_product": lambda x: orth.householder_product(x(40, 9)),
    "householder_product_backward": lambda x: orth.householder_product_backward(x(40, 9), x(40, 9), x(9)),
    "householder_apply": lambda x: orth.householder_apply(x(40, 9), x(4, 40, 6), transpose=True),
    "householder_apply_backward": lambda x: orth.householder_apply_backward(
        x(3, 6, 40), x(40, 9), x(3, 6, 40), side="right"
    ),
    "orthonormalize": lambda x: orth.orthonormalize(x(5, 40, 9)),
    "orthonormalize householder": lambda x: orth.orthonormalize(x(40, 9), method="householder"),
    "orthonormalize polar": lambda x: orth.orthonormalize(x(40, 9), method="polar"),
    "range_basis": lambda x: orth.range_basis(x(40, 3) @ x(3, 20)),
    "null_space": lambda x: orth.null_space(x(5, 20)),
    "complement": lambda x: orth.complement(x.basis(20, 6)),
    "span_sum": lambda x: orth.span_sum(x.basis(20, 3), x.basis(20, 4)),
    "span_intersection": lambda x: orth.span_intersection(x.basis(6, 4), x.basis(6, 4)),
    "contains": lambda x: orth.contains(x.basis(20, 6), x(20, 2)),
    "compose": lambda x: orth.compose(x.basis(7, 3), x.basis(8, 4), 3),
    "random_orthogonal": lambda x: orth.random_orthogonal(20, 5, batch=(2,), rng=1, dtype=x.dtype),
    "hadamard": lambda x: (orth.hadamard(x(5, 96)), orth.hadamard(x(3, 1024), transpose=True)),
    "int4": lambda x: (lambda b: (b.codes, b.to_array(), b.apply(x(12, 7))))(orth.quantize_int4(x(64, 12), 32)),
    "int4 project_out": lambda x: orth.project_out(x(64, 12), orth.quantize_int4(x.basis(64, 5), 32)),
    "gradient projector": lambda x: (lambda p: (p.down(x(40, 30)), p.down(x(40, 30)), p.up(x(40, 4))))(
        orth.GradientProjector(4, rng=0)
    ),
    "gradient projector int4": lambda x: (lambda p: (p.down(x(30, 40)), p.up(x(4, 40))))(
        orth.GradientProjector(4, rng=0, bits=4)
    ),
    "random": lambda x: grassmann.random(20, 3, batch=4, rng=0, dtype=x.dtype),
    "tangent": lambda x: grassmann.tangent(x.basis(4, 30, 5), x(4, 30, 5)),
    "exp log": lambda x: (lambda u: grassmann.exp(u, grassmann.log(u, x.basis(4, 30, 5)), 0.7))(x.basis(4, 30, 5)),
    **{
        f"retract {how}": lambda x, how=how: grassmann.retract(x.basis(4, 30, 5), x(4, 30, 5), project=True, method=how)
        for how in ("cholesky", "polar", "qr", "cayley", "exp")
    },
    "transport": lambda x: (
        lambda u: grassmann.transport(u, grassmann.tangent(u, x(30, 5)), grassmann.tangent(u, x(30, 5)))
    )(x.basis(30, 5)),
    "transport_to": lambda x: (lambda u: grassmann.transport_to(u, x.basis(30, 5), grassmann.tangent(u, x(30, 5))))(
        x.basis(30, 5)
    ),
    "projection_transport": lambda x: grassmann.projection_transport(x.basis(30, 5), x(30, 5)),
    "principal_angles": lambda x: list(grassmann.principal_angles(x.basis(6, 30, 5), x.basis(6, 30, 5), vectors=True)),
    **{
        f"distance {kind}": lambda x, kind=kind: grassmann.distance(x.basis(6, 30, 5), x.basis(6, 30, 5), kind=kind)
        for kind in ("geodesic", "chordal", "projection", "procrustes", "fubini-study", "binet-cauchy")
    },
    "distance unequal": lambda x: grassmann.distance(x.basis(30, 5), x.basis(30, 3)),
    "pairwise": lambda x: (
        grassmann.pairwise(x.basis(6, 30, 5)),
        grassmann.pairwise(x.basis(6, 30, 5), kind="chordal"),
    ),
    "mean": lambda x: grassmann.mean(x.basis(6, 30, 3)),
    "inner norm": lambda x: (
        grassmann.inner(x.basis(3, 30, 5), x(3, 30, 5), x(3, 30, 5)),
        grassmann.norm(x.basis(30, 5), x(30, 5)),
    ),
    "projector": lambda x: (lambda p: (p, grassmann.from_projector(p, 5)))(grassmann.projector(x.basis(30, 5))),
    "random_tangent": lambda x: grassmann.random_tangent(x.basis(30, 5), rng=0),
    "hessian": lambda x: (
        lambda u: grassmann.euclidean_to_riemannian_hessian(u, x(30, 5), x(30, 5), grassmann.tangent(u, x(30, 5)))
    )(x.basis(30, 5)),
    "sgd_step": lambda x: stepped(grassmann.sgd_step, x),
    "sgd_step qr": lambda x: stepped(grassmann.sgd_step, x, retraction="qr"),
    "adam_step": lambda x: stepped(grassmann.adam_step, x),
    "logits": lambda x: grassmann.logits(x(9, 30), x.basis(7, 30, 4)),
    "logits_backward": lambda x: grassmann.logits_backward(x(9, 7), x(9, 30), x.basis(7, 30, 4)),
    "coordinates": lambda x: (lambda a: (plucker.coordinates(a), plucker.coordinates_backward(x(5, 56), a)))(
        x(5, 8, 3)
    ),
    "wedge": lambda x: (plucker.wedge(x(5, 9), x(5, 9)), plucker.wedge_backward(x(5, 36), x(5, 9), x(5, 9))),
    "relations": lambda x: (lambda p: (plucker.relations(p, 6, 2), plucker.basis(p, 6, 2), plucker.hodge(p, 6, 2)))(
        plucker.coordinates(x(4, 6, 2))
    ),
    "mix": lambda x: plucker.mix(x(3, 40, 8), OFFSETS),
    "mix settings": lambda x: plucker.mix(x(3, 40, 8), OFFSETS, weights=x(3), **SETTINGS),
    "mix_backward": lambda x: plucker.mix_backward(x(3, 40, 28), x(3, 40, 8), OFFSETS, weights=x(3), **SETTINGS),
    "mix_project": lambda x: plucker.mix_project(x(3, 40, 8), x(20, 28), x(20), OFFSETS, **SETTINGS),
    "mix_project_backward": lambda x: plucker.mix_project_backward(
        x(3, 40, 20), x(3, 40, 8), x(20, 28), x(20), OFFSETS, **SETTINGS
    ),
    "MixState": lambda x: (lambda s: [s.step(x(3, 8)) for _ in range(4)])(
        plucker.MixState(OFFSETS, 8, W=x(20, 28), b=x(20)).prefill(x(3, 9, 8))
    ),
    "stream": lambda x: streamed(x, 40, (10, 3, 1, 50)),
    "stream centred": lambda x: streamed(x, 300, (10, 3, 1, 50), center=True, forget=0.9),
    "stream robust": lambda x: streamed(x, 300, (10, 30, 20), method="robust", oversample=2),
    "stream gram": lambda x: streamed(x, 300, (10, 30, 20), method="gram"),
    "stream exact": lambda x: streamed(x, 60, (10, 30, 20), exact_blocks=True),
    "stream tall": lambda x: streamed(x, 20, (1000, 300), center=True),
    "stream csr": lambda x: streamed(x, 300, (40, 80), csr=True, center=True),
    "stream weight": lambda x: streamed(x, 30, (10, 30), weight=np.arange(1.0, 31)),
    "stream merge": lambda x: (
        StreamingSVD(4).update(x(30, 20)).merge(StreamingSVD(4).update(x(30, 20))).downdate(x(1, 20) * 0).components
    ),
    "sketch": lambda x: (lambda f: (f.sketch, f.error_bound))(
        FrequentDirections(5, 20).update(x(90, 20)).update(x.csr(30, 20))
    ),
    "truncated_svd": lambda x: list(truncated_svd(x(90, 60), 5, rng=0)),
    "truncated_svd csr": lambda x: list(truncated_svd(x.csr(90, 60), 5, rng=0, signs="u")),
    "truncated_svd energy": lambda x: list(truncated_svd(x(60, 8) @ x(8, 90), energy=0.9, rng=0)),
    "product_svd": lambda x: list(product_svd(x(60, 8), x(8, 90))),
    "merge_svd": lambda x: list(merge_svd(*(tuple(truncated_svd(x(30, 20), 4, rng=0)) for _ in range(2)), 5)),
    "choose_rank": lambda x: choose_rank(np.sort(np.abs(x(20)))[::-1], energy=0.9),
    "IncrementalPCA": lambda x: (lambda p, a: (p.components_, p.explained_variance_, p.var_, p.transform(a)))(
        *(lambda a: (IncrementalPCA(4).fit(a), a))(x(200, 30))
    ),
}


def results():
    """Names and checksums; an error is a result, too."""
    subspan.set_num_threads(1)
    found = {}
    for (name, call), dtype, order in itertools.product(CALLS.items(), (np.float32, np.float64), "CF"):
        into = hashlib.blake2b(digest_size=12)
        try:
            digest(call(Inputs(dtype, order, len(name))), into)
            found[f"{name} {np.dtype(dtype).name} {order}"] = into.hexdigest()
        except (TypeError, ValueError, np.linalg.LinAlgError) as e:
            found[f"{name} {np.dtype(dtype).name} {order}"] = f"{type(e).__name__}: {e}"
    return found


def main(how, path):
    """Records, or compares and exits with the number of differences."""
    found = results()
    if how == "record":
        Path(path).write_text(json.dumps(found, indent=1))
        print(f"{len(found)} results, {sum(':' in v for v in found.values())} of them errors")
        return 0
    before = json.loads(Path(path).read_text())
    changed = [k for k in before.keys() | found.keys() if before.get(k) != found.get(k)]
    print("\n".join(f"{k}: {before.get(k)} -> {found.get(k)}" for k in sorted(changed)))
    print(f"{len(found)} results, {len(changed)} differ")
    return min(len(changed), 100)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
