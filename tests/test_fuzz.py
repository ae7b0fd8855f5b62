"""Every public function on nasty input, in worker processes, so that a crash is caught and named.

5,000 calls in CI; ``python tests/test_fuzz.py 1000000`` makes as many as it is told, on all cores, and prints what it
finds. A call may raise ValueError, TypeError, LinAlgError or MemoryError with a text. It may not crash, hang, raise
anything else, or, where a reference in NumPy is known and the input is finite, give other numbers.
"""

from __future__ import annotations

import inspect
import multiprocessing
import os
import pickle
import re
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

import subspan
from subspan import grassmann, orth, plucker
from subspan.sklearn import IncrementalPCA
from subspan.svd import FrequentDirections, StreamingSVD, choose_rank, merge_svd, product_svd, truncated_svd

SIZES = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 49, 65)
ALLOWED = (ValueError, TypeError, np.linalg.LinAlgError, MemoryError)
TOLERANCE = {np.dtype(np.float32): 2e-3, np.dtype(np.float64): 1e-8}


class Draw:
    """Arguments from a seed."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.nasty = self.rng.random() < 0.35
        self.dtype = np.dtype(self.rng.choice([np.float32, np.float64]))

    def size(self, least=0):
        return int(self.rng.choice([s for s in SIZES if s >= least]))

    def few(self, most):
        return int(self.rng.integers(0, most + 1))

    def batch(self):
        return tuple(int(x) for x in self.rng.integers(0, 4, self.rng.choice([0, 0, 0, 1, 1, 2])))

    def array(self, *shape, dtype=None):
        dtype = self.dtype if dtype is None else dtype
        x = self.rng.standard_normal(shape).astype(dtype)
        if self.nasty:
            if self.rng.random() < 0.2:
                x = x * dtype.type(self.rng.choice([0, 1e-30, 1e-38, 1e30, 3e38]))
            if self.rng.random() < 0.15 and x.size:
                x.flat[int(self.rng.integers(x.size))] = self.rng.choice([np.nan, np.inf, -np.inf, 0, -0.0])
            if self.rng.random() < 0.05:
                x = x.astype(self.rng.choice([np.int32, np.float16, np.complex64, np.bool_, ">f8"]))
        return self.layout(x)

    def layout(self, x):
        """The same numbers in another order of memory, or one row of them again and again."""
        kind = self.rng.integers(0, 10)
        if x.ndim == 0 or kind < 3:
            return x
        if kind == 3:
            return np.asfortranarray(x)
        if kind == 4:
            axis = int(self.rng.integers(x.ndim))
            return np.flip(np.flip(x, axis).copy(), axis)
        if kind == 5:
            wide = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
            wide[..., ::2] = x
            return wide[..., ::2]
        if kind == 6 and x.ndim >= 2:
            return np.swapaxes(np.ascontiguousarray(np.swapaxes(x, -1, -2)), -1, -2)
        if kind == 7:
            x = x.copy()
            x.flags.writeable = False
            return x
        if kind == 9 and x.ndim >= 2 and x.shape[0]:  # one row, again and again
            return np.broadcast_to(x[:1], x.shape)
        if kind == 8 and self.nasty:
            raw = np.zeros(x.nbytes + 1, np.uint8)
            y = raw[1 : 1 + x.nbytes].view(x.dtype).reshape(x.shape) if x.nbytes else x
            y[...] = x
            return y
        return x

    def basis(self, n, k, *batch):
        if k > n or n == 0:
            return self.array(*batch, n, k)
        q = np.linalg.qr(self.rng.standard_normal((*batch, n, k)))[0] if k else np.zeros((*batch, n, 0))
        q = q.astype(self.dtype)
        if self.nasty and self.rng.random() < 0.2:
            q = q * self.dtype.type(1.5)
        return self.layout(q)

    def csr(self, m, n):
        dense = np.where(self.rng.random((m, n)) < 0.3, self.rng.standard_normal((m, n)), 0).astype(self.dtype)
        x = sparse.csr_array(dense)
        if self.nasty and x.nnz:
            how = self.rng.integers(0, 7)
            if how == 0:
                x.indptr[int(self.rng.integers(m + 1))] = self.rng.choice([-7, 2**30, x.nnz + 5])
            elif how == 1:
                x.indices[int(self.rng.integers(x.nnz))] = self.rng.choice([-1, n, 2**30])
            elif how == 2:
                x.data[int(self.rng.integers(x.nnz))] = np.nan
            elif how == 3:
                x.indices[:] = x.indices[::-1].copy()
            return x
        if self.rng.random() < 0.3:
            return x.asformat(str(self.rng.choice(["csc", "coo", "bsr", "dia", "lil", "dok"])))
        if self.rng.random() < 0.2:
            return (x != 0).astype(np.uint8)
        return x

    def out(self, shape):
        """An output that fits, or does not."""
        if self.rng.random() < 0.6:
            return None
        if self.nasty and self.rng.random() < 0.3:
            return self.array(*[s + int(self.rng.integers(0, 2)) for s in shape])
        return self.layout(np.zeros(shape, self.dtype))


def close(found, want, dtype, scale=1.0):
    found, want = np.asarray(found, np.float64), np.asarray(want, np.float64)
    assert found.shape == want.shape, (found.shape, want.shape)
    dtype = np.dtype(dtype) if np.dtype(dtype) in TOLERANCE else np.dtype(np.float64)
    if np.isfinite(want).all() and want.size and np.abs(want).max() < 1e18:
        assert np.abs(found - want).max() <= TOLERANCE[np.dtype(dtype)] * max(scale, np.abs(want).max()), (
            "other numbers"
        )


def t(x):
    return np.swapaxes(x, -1, -2)


def finite(*arrays):
    return all(
        np.isfinite(np.asarray(a, np.float64)).all() and (np.abs(np.asarray(a, np.float64)).max(initial=0) < 1e9)
        for a in arrays
    )


def fuzz_project_out(d):
    b, m, n, k = d.batch(), d.size(), d.size(), d.few(9)
    c, side = d.array(*b, m, n), str(d.rng.choice(["left", "right"]))
    u = d.basis(m if side == "left" else n, k, *(b if d.rng.random() < 0.5 else ()))
    out = d.out(c.shape)
    found = orth.project_out(c, u, side=side, out=out)
    if finite(c, u):
        close(found, c - u @ (t(u) @ c) if side == "left" else c - (c @ u) @ t(u), c.dtype)


def fuzz_apply_core(d):
    b, m, n, k = d.batch(), d.size(), d.size(), d.few(9)
    c, v = d.array(*b, m, n), d.array(m, k)
    core = [2.0, d.array(k), d.array(k, k)][d.few(2)]
    found = orth.apply_core(c, v, core, alpha=0.5, out=d.out(c.shape))
    if finite(c, v, core):
        dense = core * np.eye(k) if np.ndim(core) < 2 else core
        close(found, 0.5 * c + v @ dense @ (v.T @ c), c.dtype, 100)


def fuzz_qr(d):
    b, m, n = d.batch(), d.size(), d.size()
    a = d.array(*b, m, n)
    if d.rng.random() < 0.4:
        q, r, order = orth.householder_qr(a, pivoting=True)
        if finite(a):
            close(q.to_array() @ r, np.take_along_axis(a, order[..., None, :], -1), a.dtype)
        return
    q, r = orth.householder_qr(a)
    if finite(a):
        close(q.to_array() @ r, a, a.dtype)
        close(q.T @ a, q.apply(a, transpose=True), a.dtype)


def fuzz_reflections(d):
    b, m, n, k = d.batch(), d.size(), d.size(), d.few(20)
    v, c = d.array(m, k), d.array(*b, m, n)
    found = orth.householder_apply(v, c, out=d.out(c.shape))
    orth.householder_product(v, packed=bool(d.few(1)))
    if finite(v, c) and m:
        want = c.astype(np.float64)
        for j in range(k - 1, -1, -1):
            x = v[:, j : j + 1].astype(np.float64)
            length = float((x * x).sum())
            want = want - (2 / length if length else 0) * x @ (x.T @ want)
        close(found, want, c.dtype, np.abs(c).max(initial=1))


def fuzz_orthonormalize(d):
    b, m, k = d.batch(), d.size(), d.few(12)
    a = d.array(*b, m, k)
    method = str(d.rng.choice(["auto", "cholesky", "householder", "polar"]))
    q, rank = orth.orthonormalize(a, method=method, out=d.out(a.shape), return_rank=True)
    assert np.all(np.asarray(rank) <= k)
    q = q if m >= k else t(q)  # the polar factor of a wide matrix has orthonormal rows
    close(t(q).astype(np.float64) @ q, np.broadcast_to(np.eye(min(m, k)), (*b, min(m, k), min(m, k))), a.dtype)


def fuzz_spaces(d):
    b, n, k = d.batch(), d.size(1), d.few(6)
    u, w = d.basis(n, k, *b), d.basis(n, d.few(6), *b)
    f = [orth.span_sum, orth.span_intersection, orth.contains, grassmann.principal_angles, grassmann.distance][d.few(4)]
    f(u, w)
    a = d.array(*b, n, k)
    basis = orth.range_basis(a)
    null = orth.null_space(a)
    if finite(a):
        close(a @ null, np.zeros((*b, n, null.shape[-1])), a.dtype, np.abs(a).max(initial=1))
        close(basis @ (t(basis) @ a), a, a.dtype, np.abs(a).max(initial=1))


def fuzz_small(d):
    n = d.size()
    x = d.array(*d.batch(), n)
    pick = d.few(4)
    if pick == 0:
        found = orth.hadamard(x, d.out(x.shape), scale=1.0)
        if finite(x) and n and n & (n - 1) == 0 and found.shape[-1] > 1:
            close(found[..., 0], x.sum(-1), x.dtype, 100)
    elif pick == 1:
        orth.complement(d.basis(n, d.few(6)))
    elif pick == 2:
        orth.quantize_int4(d.array(n, d.few(9)), d.few(40)).apply(d.array(d.few(9), d.few(5)))
    elif pick == 3:
        orth.random_orthogonal(n, d.few(n + 1), batch=d.batch(), rng=0, dtype=d.dtype)
    else:
        g = d.array(d.size(1), d.size(1))
        p = orth.GradientProjector(1 + d.few(3), rng=0, bits=[None, 4][d.few(1)])
        p.up(p.down(g))


def fuzz_grassmann(d):
    b, n, k = d.batch(), d.size(1), d.few(5)
    u, w, g = d.basis(n, k, *b), d.basis(n, k, *b), d.array(*b, n, k)
    pick = d.few(7)
    if pick == 0:
        found = grassmann.tangent(u, g, out=d.out(g.shape))
        if finite(u, g):
            close(found, g - u @ (t(u) @ g), g.dtype)
    elif pick == 1:
        grassmann.exp(u, grassmann.log(u, w))
    elif pick == 2:
        grassmann.retract(u, g, project=True, method=str(d.rng.choice(["cholesky", "polar", "qr", "cayley", "exp"])))
    elif pick == 3:
        point, buffer = np.array(u), np.zeros(u.shape, u.dtype)
        grassmann.sgd_step(point, g, buffer, lr=0.1, momentum=0.9)
    elif pick == 4:
        grassmann.transport_to(u, w, grassmann.tangent(u, g))
    elif pick == 5:
        many = d.basis(n, k, d.few(5))
        kind = str(d.rng.choice(["geodesic", "chordal", "projection"]))
        other = d.basis(n, d.few(5), d.few(4)) if d.few(1) else None
        found = grassmann.pairwise(many, other, kind=kind)
        assert np.isfinite(found).all()
    elif pick == 6:
        x, classes = d.array(d.few(5), n), d.basis(n, k, d.few(4))
        found = grassmann.logits(x, classes)
        if finite(x, classes) and found.size and n and np.abs(x).max() > 1e-9:
            length = np.linalg.norm(x.astype(np.float64), axis=1)
            want = (
                25
                * np.linalg.norm(np.einsum("bn,cnk->bck", x, classes), axis=-1)
                / np.where(length, length, 1)[:, None]
            )
            close(found, want, x.dtype)
    else:
        grassmann.mean(np.stack([u, u]))


def fuzz_plucker(d):
    b, n, k = d.batch(), 1 + d.few(7), d.few(5)
    pick = d.few(5)
    if pick == 0:
        a = d.array(*b, n, k)
        found = plucker.coordinates(a)
        if k == 1 and finite(a):
            close(found, a[..., 0], a.dtype)
    elif pick == 1:
        z, w = d.array(*b, n), d.array(n)
        found = plucker.wedge(z, w, out=d.out((*b, n * (n - 1) // 2)))
        if finite(z, w):
            i, j = np.triu_indices(n, 1)
            close(found, z[..., i] * w[j] - z[..., j] * w[i], z.dtype)
    elif pick == 2:
        plucker.hodge(d.array(*b, d.size()), n, k)
        plucker.complement_signs(n, k)
    elif pick == 3:
        p = plucker.coordinates(d.array(*b, n, max(1, min(k, n))))
        plucker.relations(p, n, max(1, min(k, n)))
        plucker.basis(p, n, max(1, min(k, n)))
    elif pick == 4:
        length, r = d.size(), d.size(2) // 2 * 2 or 2
        z = d.array(*b, length, r)
        settings = {
            "norm": [None, "clamp", "soft"][d.few(2)],
            "rope": [None, "half", "interleaved"][d.few(2)],
            "rope_start": d.rng.integers(-5, 5, b) if b and d.few(1) else d.few(9),
            "mask": d.rng.random((*b, length)) < 0.7 if d.few(1) else None,
        }
        offsets = [1 + d.few(4) for _ in range(1 + d.few(3))]
        found = plucker.mix(z, offsets, **settings)
        assert found.shape == (*b, length, r * (r - 1) // 2)
        plucker.mix_backward(np.ones_like(found), z, offsets, **settings)
        w = d.array(3, r * (r - 1) // 2)
        close(plucker.mix_project(z, w, None, offsets, **settings), found @ w.T, z.dtype, 100)
    else:
        state = plucker.MixState([1, 2], 4)
        state.prefill(d.array(*b, d.few(5), 4))
        state.step(d.array(*b, 4), out=d.out((*b, 6)))


def fuzz_svd(d):
    m, n = d.size(1), d.size(1)
    a, k = d.array(m, n), 1 + d.few(4)
    pick = d.few(4)
    if pick == 0:
        found = truncated_svd(a, k, rng=0, power_iterations=8)
        if finite(a) and k <= min(m, n):
            want = np.linalg.svd(a.astype(np.float64), compute_uv=False)[:k]
            assert np.abs(found.S - want).max() <= 0.05 * want[0] + 1e-6
    elif pick == 1:
        b = d.array(n, d.size(1))
        found = product_svd(a, b)
        if finite(a, b):
            want = np.linalg.svd(a.astype(np.float64) @ b.astype(np.float64), compute_uv=False)[: len(found.S)]
            close(found.S, want, a.dtype, np.abs(want).max(initial=1))
    elif pick == 2:
        v = d.array(d.few(4), n)
        merge_svd((None, np.abs(d.array(v.shape[0])), v), (None, np.abs(d.array(v.shape[0])), v), k)
    elif pick == 3:
        truncated_svd(d.csr(m, n), k, rng=0)
    else:
        choose_rank(np.sort(np.abs(d.array(d.size())))[::-1], energy=0.9)


def fuzz_streams(d):
    n, k = d.size(1), 1 + d.few(6)
    center = bool(d.few(1))
    svd = StreamingSVD(
        k,
        center=center,
        method=str(d.rng.choice(["auto", "robust", "gram"])),
        oversample=[None, 0, 3][d.few(2)],
        exact_blocks=bool(d.few(1)),
        weight=np.abs(d.rng.standard_normal(n)) + 0.1 if d.few(5) == 0 else None,
    )
    seen = []
    for _ in range(1 + d.few(4)):
        b = d.size()
        rows = d.csr(b, n) if d.few(2) == 0 else d.array(b, n) if d.few(5) else d.array(n)
        try:
            svd.update(rows)
        except ALLOWED:
            continue
        seen.append(np.atleast_2d(rows.toarray() if sparse.issparse(rows) else rows))
    x = d.array(d.few(5), n)
    if not seen:
        return
    pickle.loads(pickle.dumps(svd))
    assert svd.rows_seen == sum(len(s) for s in seen)
    svd.project(x, out=d.out((len(x), len(svd.singular_values))))
    svd.residual(x)
    svd.reconstruct(svd.project(x))
    v = svd.components
    if svd._inner is None:
        assert (
            np.abs(v.astype(np.float64) @ v.T - np.eye(len(v))).max(initial=0)
            <= 10 * np.finfo(v.dtype).eps * max(1, len(v)) ** 0.5
        )
    rows = np.vstack(seen).astype(np.float64)
    if finite(rows) and np.abs(rows).max(initial=0) > 1e-6 and svd._inner is None:
        given = (rows**2).sum()
        rows = rows - rows.mean(0) if center else rows
        total = (rows**2).sum()
        room = 1e-5 if v.dtype == np.float32 else 1e-20 * given  # of equal rows the mean's rounding is left
        assert abs(svd.captured_energy + svd.residual_energy - total) <= TOLERANCE[v.dtype] * total * 10 + room
    svd.merge(svd.copy())
    other = StreamingSVD(1 + d.few(3), center=bool(d.few(1)), oversample=[None, 0][d.few(1)], weight=svd._inner)
    other.update(d.array(1 + d.few(20), [n, n, d.size(1)][d.few(2)]))
    before = svd.components
    try:
        svd.merge(other)
    except ALLOWED:
        np.testing.assert_array_equal(svd.components, before)  # as it was
        raise
    svd.downdate(x)


def fuzz_weights(d):
    """Inner products of all kinds, against their Cholesky factor."""
    n, k = d.size(1), 1 + d.few(3)
    a = d.rng.standard_normal((n, n)) * (d.rng.random((n, n)) < 0.2)
    w = a @ a.T + np.diag(d.rng.uniform(0.5, 2, n))
    if d.nasty and d.few(2) == 0:
        w[d.few(n - 1), d.few(n - 1)] = d.rng.choice([-1, 0, 1e300, np.nan])
    forms = [np.asarray, sparse.csr_array, sparse.coo_matrix, lambda x: sparse.linalg.aslinearoperator(x)]
    given = forms[d.few(3)](w)
    center = bool(d.few(1))
    svd = StreamingSVD(k, center=center, weight=given, signs=["stable", "v"][d.few(1)])
    pieces = [d.csr(d.size(1), n) if d.few(2) == 0 else d.array(d.size(1), n) for _ in range(1 + d.few(2))]
    for rows in pieces:
        svd.update(rows)
    rows = np.vstack([p.toarray() if sparse.issparse(p) else p for p in pieces]).astype(np.float64)
    factor = np.linalg.cholesky(w)
    z = svd.project(pieces[-1], out=d.out((pieces[-1].shape[0], len(svd.singular_values))))
    pickle.loads(pickle.dumps(svd)).reconstruct(z)
    if finite(rows) and len(rows) <= k:
        y = (rows - rows.mean(0) if center else rows) @ factor
        want = np.linalg.svd(y, compute_uv=False)[: len(svd.singular_values)]
        close(svd.singular_values, want, svd.dtype, np.abs(want).max(initial=1))
    truncated_svd(pieces[0], k, weight=given, rng=0)


def fuzz_estimator(d):
    m, n = d.size(2), d.size(1)
    x = d.csr(m, n) if d.few(2) == 0 else d.array(m, n)
    if x.dtype.kind == "c":
        return  # scikit-learn's text prints the array
    pca = IncrementalPCA(1 + d.few(3), whiten=bool(d.few(1)), batch_size=[None, 1 + d.few(9)][d.few(1)])
    if d.few(1):
        pca.fit(x)
    else:
        pca.partial_fit(x)
        more = d.array(d.size(1), n)
        pca.partial_fit(more if more.dtype.kind != "c" else x)
    z = pickle.loads(pickle.dumps(pca)).transform(x)
    back = pca.inverse_transform(z)
    assert back.shape == (m, n)
    assert np.isfinite(pca.explained_variance_ratio_).all()


def fuzz_saved(d):
    """What is pickled or saved comes back with the same numbers, and another object's state raises."""
    n, k = d.size(2), 1 + d.few(3)
    a = d.array(d.size(1), n)
    pick = d.few(5)
    if pick == 0:
        svd = StreamingSVD(k, center=bool(d.few(1)), dtype=[None, d.dtype][d.few(1)]).update(a)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "s.npz")
            svd.save(path)
            if d.nasty:
                raw = bytearray(Path(path).read_bytes())
                raw[int(d.rng.integers(len(raw)))] ^= 1 << int(d.rng.integers(8))
                Path(path).write_bytes(bytes(raw))
            again = StreamingSVD.load(path)
        np.testing.assert_array_equal(again.components, svd.components)
    elif pick == 1:
        q, r = pickle.loads(pickle.dumps(orth.householder_qr(a)))
        close(q.to_array() @ r, a, a.dtype) if finite(a) else None
    elif pick == 2:
        state = plucker.MixState([1, 1 + d.few(3)], 4)
        state.prefill(d.array(*d.batch(), d.size(), 4))
        again, token = pickle.loads(pickle.dumps(state)), d.array(*d.batch(), 4)
        one = state.step(token)
        np.testing.assert_array_equal(again.step(token), one)
    elif pick == 3:
        p = orth.GradientProjector(1, rng=0, bits=[None, 4][d.few(1)])
        r = p.down(a)
        again = pickle.loads(pickle.dumps(p))
        np.testing.assert_array_equal(again.up(r), p.up(r))
    elif pick == 4:
        fd = FrequentDirections(k, n).update(a)
        again = pickle.loads(pickle.dumps(fd))
        np.testing.assert_array_equal(again.sketch, fd.sketch)
        other = FrequentDirections(1 + d.few(3), [n, d.size(1)][d.few(1)])
        other.update(d.array(d.size(1), other.n_features))
        fd.merge(other)
    else:
        state = [StreamingSVD(k).update(a), FrequentDirections(k, n).update(a)][d.few(1)].__getstate__()
        wrong = [StreamingSVD, FrequentDirections, orth.GradientProjector, orth.Int4Basis, orth.HouseholderQ][d.few(4)]
        name = sorted(state)[d.few(len(state) - 1)]
        state[name] = [None, -1, "x", np.zeros((2, 3)), 2**70][d.few(4)]
        wrong.__new__(wrong).__setstate__(state)


def fuzz_planes(d):
    b, m, n, k = d.batch(), d.size(), d.size(1), d.few(5)
    pick = d.few(3)
    if pick == 0:
        base, source, u = d.array(*b, m, n), d.array(*b, m, n), d.basis(n, k)
        found = orth.swap(base, source, u, out=d.out(base.shape))
        if finite(base, source, u):
            close(found, base + (source - base) @ u @ u.T, base.dtype)
    elif pick == 1:
        c, s, e = d.array(*b, n, m), d.array(n), d.array(n)
        found = orth.rotate(c, s, e, out=d.out(c.shape))
        if finite(c, s, e) and m:
            close(np.linalg.norm(found, axis=-2), np.linalg.norm(c, axis=-2), c.dtype)
            rotated = orth.rotate(s[:, None], s, e)[:, 0].astype(np.float64)
            if min(np.abs(s).max(), np.abs(e).max()) > 1e-9:
                length = np.linalg.norm(s.astype(np.float64)) / np.linalg.norm(e.astype(np.float64))
                close(rotated, e * length, c.dtype, np.abs(s).max())
    elif pick == 2:
        shared = d.few(min(n, 4))
        orth.compose(d.basis(n, k), d.basis(shared + d.few(6), d.few(4)), shared)
    else:
        size = d.size()
        h = orth.hadamard_matrix(size, d.dtype)
        close(h @ h.T, size * np.eye(size), d.dtype)


def fuzz_reflection_gradients(d):
    b, m, n, k = d.batch(), d.size(1), d.size(), d.few(9)
    v, tau = d.array(m, k), d.array(k) if d.few(1) else None
    q = orth.householder_product(v, tau)
    orth.householder_product_backward(d.array(*q.shape), v, tau)
    left, transposed = bool(d.few(1)), bool(d.few(1))
    c = d.array(*b, m, n) if left else d.array(*b, n, m)
    g = d.array(*c.shape)
    options = {"side": "left" if left else "right", "transpose": transposed}
    dv, dc, *rest = orth.householder_apply_backward(g, v, c, tau, **options)
    assert dv.shape == v.shape
    assert len(rest) == (tau is not None)
    options["transpose"] = not transposed
    if finite(g, v, c, *rest):
        close(dc, orth.householder_apply(v, g, tau, **options), c.dtype, np.abs(dc).max(initial=1))


def fuzz_tangents(d):
    b, n, k = d.batch(), d.size(1), d.few(5)
    u, g = d.basis(n, k, *b), d.array(*b, n, k)
    pick = d.few(6)
    if pick == 0:
        h = grassmann.random_tangent(u, rng=0)
        v = grassmann.euclidean_to_riemannian_gradient(u, g)
        moved = grassmann.transport(u, h, v, 0.5, out=d.out(g.shape))
        if finite(u, g):
            close(grassmann.norm(u, moved), grassmann.norm(u, v), g.dtype)
            close(grassmann.inner(u, h, v), (h.astype(np.float64) * v).sum((-1, -2)), g.dtype, 100)
    elif pick == 1:
        found = grassmann.euclidean_to_riemannian_hessian(u, g, d.array(*b, n, k), grassmann.tangent(u, g))
        if finite(u, g) and np.isfinite(found).all():
            close(t(u) @ found, np.zeros((*b, k, k)), g.dtype, np.abs(found).max(initial=1))
    elif pick == 2:
        p = grassmann.projector(u)
        again = grassmann.from_projector(p, k)
        if finite(u):
            close(grassmann.projector(again), p, u.dtype)
    elif pick == 3:
        found = grassmann.projection_transport(u, g, out=d.out(g.shape))
        if finite(u, g):
            close(found, g - u @ (t(u) @ g), g.dtype)
    elif pick == 4:
        point, first, second = np.array(u), np.zeros(u.shape, u.dtype), np.zeros(b, u.dtype)
        how = {"retraction": str(d.rng.choice(["exp", "qr", "polar"])), "transport": "project"}
        before = point.copy()
        try:
            grassmann.adam_step(point, g, first, second, step=1 + d.few(5), lr=0.1, **how)
        except ALLOWED:
            np.testing.assert_array_equal(point, before)
            raise
        close(t(point).astype(np.float64) @ point, np.broadcast_to(np.eye(k), (*b, k, k)), u.dtype)
    elif pick == 5:
        x, classes = d.array(d.few(5), n), d.basis(n, k, d.few(4))
        grassmann.logits_backward(d.array(len(x), len(classes)), x, classes)
    else:
        grassmann.distance(grassmann.random(n, min(k, n), rng=0, dtype=u.dtype), u)


def fuzz_plucker_gradients(d):
    b, n, k = d.batch(), 1 + d.few(6), 1 + d.few(3)
    pick = d.few(4)
    if pick == 0:
        a = d.array(*b, n, k)
        p = plucker.coordinates(a)
        grad = plucker.coordinates_backward(d.array(*p.shape), a)
        assert grad.shape == a.shape
    elif pick == 1:
        z, w = d.array(*b, n), d.array(n)
        p = plucker.wedge(z, w)
        g = d.array(*p.shape)
        dz, dw = plucker.wedge_backward(g, z, w)
        if finite(g, z, w):  # the wedge is linear in each
            close((dz.astype(np.float64) * z).sum(), (g.astype(np.float64) * p).sum(), z.dtype, 1e3)
            close((dw.astype(np.float64) * w).sum(), (g.astype(np.float64) * p).sum(), z.dtype, 1e3)
    elif pick == 2:
        p = plucker.coordinates(d.array(*b, n, min(k, n)))
        r = plucker.relations(p, n, min(k, n))
        g = d.array(*r.shape)
        dp = plucker.relations_backward(g, p, n, min(k, n))
        if finite(g, p):  # the relations are quadratic
            size = np.abs(g.astype(np.float64)).sum() * np.abs(p).max(initial=1).astype(np.float64) ** 2
            close((dp.astype(np.float64) * p).sum(), 2 * (g.astype(np.float64) * r).sum(), p.dtype, size)
    elif pick == 3:
        p = plucker.coordinates(d.array(*b, n, min(k, n)))
        basis = plucker.basis(p, n, min(k, n))
        plucker.basis_backward(d.array(*basis.shape), p, n, min(k, n))
    else:
        length, r = d.size(), 2 + 2 * d.few(3)
        z, w = d.array(*b, length, r), d.array(3, r * (r - 1) // 2)
        options = {"norm": [None, "clamp", "soft"][d.few(2)], "causal": bool(d.few(1))}
        offsets = [1 + d.few(4) for _ in range(1 + d.few(3))]
        h = plucker.mix_project(z, w, None, offsets, **options)
        g = d.array(*h.shape)
        _, dw, *_ = plucker.mix_project_backward(g, z, w, None, offsets, **options)
        if finite(g, z, w, h, dw):  # linear in W
            size = np.abs(g.astype(np.float64)).sum() * np.abs(h).max(initial=1)
            close((dw.astype(np.float64) * w).sum(), (g.astype(np.float64) * h).sum(), z.dtype, size)


def fuzz_sketches(d):
    n = d.size(1)
    fd = FrequentDirections(1 + d.few(5), n)
    rows = d.csr(d.size(), n) if d.few(1) else d.array(d.size(), n)
    fd.update(rows)
    sketch, bound = np.asarray(fd.sketch, np.float64), fd.error_bound
    dense = np.asarray(rows.toarray() if sparse.issparse(rows) else rows, np.float64)
    if finite(dense):
        gap = np.linalg.eigvalsh(dense.T @ dense - sketch.T @ sketch)
        room = 1e-4 * (1 + np.linalg.norm(dense) ** 2)
        assert gap.min() > -room
        assert gap.max() < bound + room


# What arguments of these names are, for functions that have no target of their own.
NAMED = {
    **dict.fromkeys("UW", lambda d: d.basis(max(d.size(), 1), d.few(6))),
    **dict.fromkeys(("A", "B", "C", "G", "H", "V", "X", "base", "source"), lambda d: d.array(d.size(), d.size())),
    **dict.fromkeys(("x", "z", "w", "p"), lambda d: d.array(d.size())),
    **dict.fromkeys(("grad", "h"), lambda d: d.array(d.size(), d.size())),
    **dict.fromkeys(("n", "k", "shared", "rank"), lambda d: d.few(9)),
    "M": lambda d: 0.5,
    "R": lambda d: d.basis(max(d.size(), 1), d.few(6)),
    "lr": lambda d: 0.1,
    "offsets": lambda d: [1, 1 + d.few(5)],
}


def by_names():
    """Public functions all of whose arguments without a default are of these names."""
    found = []
    for module in (orth, grassmann, plucker, subspan.svd):
        for name in module.__all__:
            f = getattr(module, name)
            if inspect.isfunction(f):
                needed = [p.name for p in inspect.signature(f).parameters.values() if p.default is p.empty]
                if needed and all(n in NAMED for n in needed):
                    found.append(f)
    return found


def fuzz_by_names(d):
    f = by_names()[int(d.rng.integers(len(by_names())))]
    needed = {p.name: p for p in inspect.signature(f).parameters.values() if p.default is p.empty}
    f(**{name: NAMED[name](d) for name in needed})


TARGETS = [f for name, f in sorted(globals().items()) if name.startswith("fuzz_")]


def one(seed):
    """None, or what went wrong."""
    d = Draw(seed)
    target = TARGETS[seed % len(TARGETS)]
    try:
        with np.errstate(all="ignore"):
            target(d)
    except ALLOWED as e:
        if not str(e) or len(str(e)) > 1000 or "incompatible function arguments" in str(e):
            return f"{seed} {target.__name__}: text {str(e)[:200]!r}"
        return None
    except Exception:
        return f"{seed} {target.__name__}: " + traceback.format_exc(limit=-3)
    return None


def worker(seeds, pipe):
    import warnings

    warnings.simplefilter("ignore")
    subspan.set_num_threads(1)
    for seed in seeds:
        pipe.send(("begin", seed))
        problem = one(seed)
        if problem:
            pipe.send(("problem", problem))
    pipe.send(("end", None))


def run(count, workers, first=0, patience=120.0):
    """What went wrong in so many calls: texts."""
    context = multiprocessing.get_context("spawn")
    todo, problems, running = list(range(first, first + count)), [], []
    chunk = max(1, min(2000, count // workers))
    while todo or running:
        while todo and len(running) < workers:
            seeds, todo = todo[:chunk], todo[chunk:]
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=worker, args=(seeds, there), daemon=True)
            process.start()
            there.close()
            running.append([process, here, seeds, seeds[0], time.monotonic()])
        for item in list(running):
            process, pipe, seeds, last, _ = item
            ended = False
            try:
                while pipe.poll(0.01):
                    kind, value = pipe.recv()
                    item[4] = time.monotonic()
                    if kind == "begin":
                        last = item[3] = value
                    elif kind == "problem":
                        problems.append(value)
                    else:
                        ended = True
            except EOFError:
                pass
            hangs = time.monotonic() - item[4] > patience
            if ended or hangs or not process.is_alive():
                if hangs:
                    process.kill()
                process.join()
                running.remove(item)
                if not ended:
                    target = TARGETS[last % len(TARGETS)].__name__
                    problems.append(f"{last} {target}: {'hangs' if hangs else f'crash, exit {process.exitcode}'}")
                    todo = [s for s in seeds if s > last] + todo
    return problems


def test_every_public_function_is_among_them():
    """A target of its own calls it, or the one that draws arguments by their names does."""
    text = Path(__file__).read_text()
    made_by_others = {"HouseholderQ", "Int4Basis", "MeanResult", "PrincipalAngles", "TruncatedSVD"}
    for module in (orth, grassmann, plucker, subspan.svd, subspan.sklearn):
        named = {n for n in module.__all__ if re.search(rf"\b{n}\b[(,\]]", text)}
        missing = set(module.__all__) - made_by_others - named - {f.__name__ for f in by_names()}
        assert not missing, (module.__name__, missing)
    assert len(by_names()) > 20


@pytest.mark.slow
def test_nasty_input_neither_crashes_nor_gives_other_numbers():
    problems = run(5000, os.cpu_count() or 1)
    assert not problems, "\n".join(problems[:20])


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 5000
    start = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    found = run(count, os.cpu_count() or 1, start)
    print("\n".join(found))
    print(f"{count} calls, {len(found)} problems")
    sys.exit(bool(found))
