"""What must not get through: malformed matrices, absurd sizes, overlapping outputs, foreign arrays, wrong types,
overflows.

Each kind over the families and the routes where it can happen; crashes are looked for in tests/test_fuzz.py.
"""

import contextlib
import copy
import ctypes
import functools
import inspect
import itertools
import os
import pickle
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pytest
import torch
from scipy import sparse

import subspan
from subspan import _core, grassmann, orth, plucker
from subspan._lib.files import sealed_state, write_archive
from subspan.sklearn import IncrementalPCA
from subspan.svd import FrequentDirections, StreamingSVD, choose_rank, merge_svd, product_svd, truncated_svd

# -- sparse matrices whose arrays lead nowhere -------------------------------------------------------------------------


def broken(how, form):
    x = sparse.random(40, 30, 0.2, format=form, dtype=np.float64, random_state=0)
    if how == "past the end":
        x.indptr[20] = x.nnz + 500_000
    elif how == "last past the end":
        x.indptr[-1] = x.nnz + 500_000
    elif how == "negative":
        x.indptr[3] = -5
    elif how == "first":
        x.indptr[0] = 2
    elif how == "column":
        x.indices[0] = 2**30
    elif how == "negative column":
        x.indices[5] = -1
    elif how == "one too far":
        x.indices[7] = x.shape[1] if form == "csr" else x.shape[0]
    return x


BREAKS = ["past the end", "last past the end", "negative", "first", "column", "negative column", "one too far"]
good = np.random.default_rng(0).standard_normal((40, 30))


def seen():
    return StreamingSVD(3).update(good)


SPARSE_CALLS = {
    "update": lambda s: StreamingSVD(3).update(s),
    "update centred": lambda s: StreamingSVD(3, center=True).update(s),
    "downdate": lambda s: seen().downdate(s),
    "project": lambda s: seen().project(s),
    "residual": lambda s: seen().residual(s),
    "truncated_svd": lambda s: truncated_svd(s, 2),
    "sketch": lambda s: FrequentDirections(3, 30).update(s),
    "fit": lambda s: IncrementalPCA(3).fit(s),
    "partial_fit": lambda s: IncrementalPCA(3).partial_fit(s, check_input=False),
    "transform": lambda s: IncrementalPCA(3).fit(good).transform(s),
}


@pytest.mark.parametrize("how", BREAKS)
@pytest.mark.parametrize("form", ["csr", "csc"])
@pytest.mark.parametrize("call", SPARSE_CALLS)
def test_malformed_sparse_matrices(how, form, call):
    with pytest.raises(ValueError, match=r"indptr|indices"):
        SPARSE_CALLS[call](broken(how, form))


@pytest.mark.parametrize("call", SPARSE_CALLS)
def test_malformed_coordinates(call):
    x = sparse.random(40, 30, 0.2, format="coo", random_state=0)
    x.coords[0][3] = 1000
    with pytest.raises(ValueError, match="coordinates"):
        SPARSE_CALLS[call](x)


def test_duplicates_and_order_are_taken():
    data, indices, indptr = np.array([1.0, 2, 3, 4, 5]), np.array([2, 0, 2, 1, 1]), np.array([0, 3, 5])
    x = sparse.csr_array((data, indices, indptr), shape=(2, 4))
    x.has_canonical_format = True  # which is not so
    dense = np.array([[2.0, 0, 4, 0], [0, 9, 0, 0]])
    np.testing.assert_allclose(truncated_svd(x, 2, rng=0).S, np.linalg.svd(dense, compute_uv=False))
    np.testing.assert_allclose(StreamingSVD(2).update(x).singular_values, np.linalg.svd(dense, compute_uv=False))
    assert list(x.indices) == [2, 0, 2, 1, 1]  # the caller's is as it was


# -- sizes -------------------------------------------------------------------------------------------------------------

wide = np.broadcast_to(np.float32(1), (1, 2**30))
HUGE = {
    "sketch wraps": lambda: FrequentDirections(2**61 + 1, 4).update(np.ones((2000, 4))),
    "sketch": lambda: FrequentDirections(2**62, 3),
    "sketch columns": lambda: FrequentDirections(4, 2**61).update(np.ones((1, 4))),
    "sketch state": lambda: FrequentDirections.__new__(FrequentDirections).__setstate__(
        {
            "size": 2**61 + 1,
            "n_features": 4,
            "library": "numpy",
            "buffer": np.ones((9, 4)),
            "bound": 0.0,
            "norm": 36.0,
            "seen": 9,
        }
    ),
    "stream": lambda: StreamingSVD(1, oversample=2**40).update(wide),
    "operator": lambda: truncated_svd(
        sparse.linalg.LinearOperator((2**61, 2**61), matvec=lambda x: x, rmatvec=lambda x: x, dtype=float), 1
    ),
    "iterations": lambda: truncated_svd(np.eye(3), 1, power_iterations=2**61),
    "hodge": lambda: plucker.hodge(np.ones(4), 2**62, 10**6),
    "hodge of few": lambda: plucker.hodge(np.ones(4), 10**8, 5 * 10**7),
    "basis": lambda: plucker.basis(np.ones(4), 10**6, 5 * 10**5),
    "relations": lambda: plucker.relations(np.ones(4), 10**6, 5 * 10**5),
    "wedge": lambda: plucker.wedge(np.ones(1), np.ones(1), n=2**32 - 1, grades=(2**32 - 1, 0)),
    "wedge of few": lambda: plucker.wedge(np.ones(4), np.ones(20000), n=20000, grades=(10000, 1)),
    "coordinates": lambda: plucker.coordinates(np.broadcast_to(0.0, (10**6, 5 * 10**5))),
    "signs": lambda: plucker.complement_signs(10**8, 5 * 10**7),
    "mix": lambda: plucker.mix(np.empty((0, 2**30)), [1], rope="half"),
    "offsets": lambda: plucker.mix(np.ones((5, 4)), itertools.count(1)),
    "int4": lambda: orth.Int4Basis(np.zeros(1, np.uint8), np.empty(0), np.empty(0), (2**60, 16), 256).to_array(),
    "random": lambda: orth.random_orthogonal(2**40, 2**30),
    "batch": lambda: grassmann.random(4, 2, batch=2**60),
    "threads": lambda: subspan.set_num_threads(2**31 - 1),
}


@pytest.mark.parametrize("what", HUGE)
def test_absurd_sizes_are_refused_at_once(what):
    with pytest.raises((ValueError, MemoryError)) as e:
        HUGE[what]()
    assert len(str(e.value)) < 400


@pytest.mark.parametrize(
    "call",
    [
        lambda: orth.householder_qr(np.empty((2**58, 0, 1))),
        lambda: orth.householder_product(np.empty((2**58, 1, 0))),
        lambda: orth.householder_apply(np.empty((3, 1)), np.empty((2**58, 3, 0))),
        lambda: _core.all_finite(np.broadcast_to(1.0, (2**50, 3, 1))),
        lambda: plucker.mix(np.empty((2**50, 0, 4)), [1]),
        lambda: _core.all_finite(np.broadcast_to(1.0, (2**50, 2, 2))),
    ],
)
def test_stacks_of_nothing_end_at_once(call):
    """They end at all, with a result or for want of memory: a loop over 2⁵⁰ matrices would not."""
    with contextlib.suppress(MemoryError):  # their axes are results' too
        found = call()
        parts = found if isinstance(found, tuple) else (found,)
        assert all(np.size(x) == 0 or np.ndim(x) == 0 for x in parts if isinstance(x, (np.ndarray, bool, float)))


def test_counts_do_not_wrap(rng):
    svd = StreamingSVD(3).update(rng.standard_normal((8, 20)))
    fd = FrequentDirections(3, 20).update(rng.standard_normal((8, 20)))
    for thing in (svd, fd):
        for _ in range(57):
            thing.merge(thing)
        with pytest.raises(ValueError, match="2\\^62"):
            functools.reduce(lambda total, _: total.merge(total), range(10), thing)
        assert 0 < thing.rows_seen <= 2**62


# -- outputs that overlap ----------------------------------------------------------------------------------------------


def test_outputs_of_svd_may_not_overlap(rng):
    x = rng.standard_normal((300, 40))
    svd = StreamingSVD(5, center=True).update(x)
    z = svd.project(x)
    flat = x.reshape(-1)
    for call in (
        lambda: svd.project(x, out=x[:, -5:]),
        lambda: svd.project(x[:, ::-1], out=x[:, :5]),
        lambda: svd.residual(x, out=flat[100:400]),
        lambda: svd.reconstruct(z, out=np.lib.stride_tricks.as_strided(z, (300, 40), (8, 8))),
        lambda: svd.project(x, out=np.broadcast_to(np.zeros(5), (300, 5))),
    ):
        before = x.copy()
        with pytest.raises(ValueError, match=r"overlap|read-only|broadcast"):
            call()
        np.testing.assert_array_equal(x, before)
    s = sparse.csr_array(x)
    with pytest.raises(ValueError, match="overlap"):
        svd.project(s, out=s.data[:1500].reshape(300, 5))
    out = np.empty((300, 10))[:, ::2]
    assert svd.project(x, out=out) is out
    np.testing.assert_array_equal(out, z)
    strided = np.empty(600)[::2]
    np.testing.assert_array_equal(svd.residual(x, out=strided), svd.residual(x))


def test_lists_of_projections_are_whole(rng):
    u = [orth.random_orthogonal(6, 2, rng=i) for i in range(2)]
    c = [rng.standard_normal((6, 4)) for _ in range(2)]
    want = [orth.project_out(a, b) for a, b in zip(c, u, strict=True)]
    for out in ([c[1], np.empty((6, 4))], [c[0], c[0]], [np.empty((6, 4)), u[0][:, :0]]):
        before = [x.copy() for x in c]
        with pytest.raises(ValueError, match=r"overlap|shape"):
            orth.project_out(c, u, out=out)
        for x, y in zip(c, before, strict=True):
            np.testing.assert_array_equal(x, y)
    bad = [c[0], np.where(np.arange(24).reshape(6, 4) == 5, np.nan, c[1])]
    with pytest.raises(ValueError, match="NaN"):
        orth.project_out(bad, u, out=bad)
    for x, y in zip(orth.project_out(c, u, out=c), want, strict=True):
        np.testing.assert_array_equal(x, y)


def test_decoding_into_out(rng):
    for batch in ((), (3,), (2, 3)):
        state = plucker.MixState([1, 2], 4)
        z = rng.standard_normal((*batch, 5, 4))
        state.prefill(z[..., :4, :])
        twin = state.copy()
        token = z[..., 4, :]
        for out in (
            np.empty((*batch, 6), np.float32),
            np.empty((*batch, 6), int),
            torch.empty((*batch, 6), dtype=torch.float32),
            np.broadcast_to(0.0, (*batch, 6)),
        ):
            with pytest.raises((TypeError, ValueError)):
                state.step(token, out=out)
            assert state.position == 4
        target = np.empty((*batch, 12))[..., ::2]
        np.testing.assert_array_equal(state.step(token, out=target), twin.step(token))


# -- arrays of other makes ---------------------------------------------------------------------------------------------


class Sub(torch.Tensor):
    """A subclass in a module of the user's."""


def sub(x):
    return torch.from_numpy(np.array(x)).as_subclass(Sub)


TENSOR_CALLS = {
    "project_out": lambda x: orth.project_out(x, sub(np.eye(6)[:, :2])),
    "householder_qr": lambda x: orth.householder_qr(x)[1],
    "orthonormalize": lambda x: orth.orthonormalize(x[:, :3]),
    "hadamard": lambda x: orth.hadamard(x[:4].T[:4]),
    "range_basis": orth.range_basis,
    "null_space": orth.null_space,
    "tangent": lambda x: grassmann.tangent(sub(np.eye(6)[:, :4]), x[:, :4]),
    "mix": lambda x: plucker.mix(x, [1, 2]),
    "coordinates": lambda x: plucker.coordinates(x[:, :2]),
    "truncated_svd": lambda x: truncated_svd(x, 2, rng=0).S,
    "product_svd": lambda x: product_svd(x, x.T).S,
    "stream": lambda x: StreamingSVD(2).update(x).components,
    "project": lambda x: StreamingSVD(2).update(x).project(x),
    "sketch": lambda x: FrequentDirections(2, x.shape[1]).update(x).sketch,
}


@pytest.mark.parametrize("call", TENSOR_CALLS)
def test_subclasses_are_tensors(rng, call):
    x = rng.standard_normal((6, 4))
    want = TENSOR_CALLS[call](torch.from_numpy(x))
    found = TENSOR_CALLS[call](sub(x))
    assert isinstance(found, torch.Tensor)
    torch.testing.assert_close(torch.Tensor(found), want, rtol=0, atol=0)
    negated = sub(x)._neg_view()
    torch.testing.assert_close(
        torch.Tensor(TENSOR_CALLS[call](negated)), TENSOR_CALLS[call](torch.from_numpy(-x)), rtol=0, atol=0
    )
    with pytest.raises(TypeError, match="autograd"):
        TENSOR_CALLS[call](sub(x).requires_grad_())


def test_autograd_is_told_of_writes(rng):
    u, c = torch.from_numpy(orth.random_orthogonal(6, 2, rng=0)), torch.from_numpy(rng.standard_normal((6, 4)))
    svd = StreamingSVD(2).update(c.T)
    for kind in (torch.Tensor, Sub):
        out = c.clone().as_subclass(kind)
        before = out._version
        orth.project_out(out, u, out=out)
        assert out._version > before
        for call, shape in ((svd.project, (4, 2)), (svd.residual, (4,))):
            out = torch.empty(shape, dtype=torch.float64).as_subclass(kind)
            before = out._version
            call(c.T, out=out)
            assert out._version > before
        held = torch.ones(6, 4, dtype=torch.float64, requires_grad=True)
        y = held * 2
        z = (y * y).sum()
        with torch.no_grad():
            orth.project_out(y.as_subclass(kind), u, out=y.as_subclass(kind))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            z.backward()


def test_parameters_under_no_grad(rng):
    p = torch.nn.Parameter(torch.from_numpy(rng.standard_normal((6, 4))))
    with torch.no_grad():
        out = torch.nn.Parameter(torch.empty(6, 6, dtype=torch.float64))
        x = p.numpy()
        assert plucker.mix(p, [1], out=out) is out
        np.testing.assert_array_equal(out.numpy(), plucker.mix(x, [1]))
        minors = torch.nn.Parameter(torch.empty(15, dtype=torch.float64))
        plucker.coordinates(p[:, :2], out=minors)
        np.testing.assert_array_equal(minors.numpy(), plucker.coordinates(x[:, :2]))
        svd = StreamingSVD(2).update(p)
        z = torch.nn.Parameter(torch.empty(6, 2, dtype=torch.float64))
        before = z._version
        svd.project(p, out=z)
        assert z._version > before
        np.testing.assert_array_equal(z.numpy(), StreamingSVD(2).update(x).project(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tangents_and_fakes_are_refused(rng):
    x = torch.from_numpy(rng.standard_normal((4, 4)))
    import torch.autograd.forward_ad as fw

    with fw.dual_level(), pytest.raises(TypeError, match="tangent"):
        orth.hadamard(fw.make_dual(x, x))
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
    for call in (orth.hadamard, lambda y: truncated_svd(y, 1), lambda y: plucker.mix(y, [1])):
        with pytest.raises(Exception, match=r"."):
            call(fake)


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_matrices_of_numpy_are_arrays(rng):
    x = rng.standard_normal((6, 6))
    m = x.view(np.matrix)
    p = rng.standard_normal(6)
    for f in (
        lambda a: orth.range_basis(a),
        lambda a: orth.project(a, a[:, :2], orthonormal=False),
        lambda a: plucker.hodge(a, 4, 2),
        lambda a: plucker.mix(a, [1]),
        lambda a: StreamingSVD(2).update(a).project(a),
    ):
        found, want = f(m), f(x)
        assert type(found) is np.ndarray
        np.testing.assert_array_equal(found, want)
    assert p.shape == (6,)


def test_masked_arrays_are_refused(rng):
    masked = np.ma.masked_array(np.ones((3, 3)), mask=np.eye(3, dtype=bool))
    for call in (
        lambda: truncated_svd(np.eye(3), 1, initial=masked),
        lambda: merge_svd((None, np.ones(3), masked), (None, np.ones(3), masked), 2),
        lambda: plucker.mix(np.ones((3, 4)), [1], mask=np.ma.masked_array([True] * 3)),
        lambda: choose_rank(np.ma.masked_array([2.0, 1.0], mask=[0, 1]), energy=0.5),
        lambda: orth.hadamard([masked, masked]),
    ):
        with pytest.raises(TypeError, match="mask"):
            call()


# -- DLPack ------------------------------------------------------------------------------------------------------------


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


class Forged:
    """An exporter whose tensor says what it likes."""

    def __init__(self, shape=(2, 2), said=1, **fields):
        self.memory = np.zeros(16)
        self.sizes = (ctypes.c_int64 * len(shape))(*shape)
        self.said = said
        given = {"data": self.memory.ctypes.data, "device": 1, "ndim": len(shape), "code": 2, "bits": 64, "lanes": 1}
        given.update(fields)
        self.tensor = _Tensor(**given)
        self.tensor.shape = ctypes.cast(self.sizes, ctypes.POINTER(ctypes.c_int64)) if len(shape) else None
        self.dtype, self.shape = np.dtype(np.float64), shape

    def __dlpack_device__(self):
        return (self.said, 0)

    def __dlpack__(self, **_):
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return new(ctypes.addressof(self.tensor), b"dltensor", None)


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"offset": 4}, ValueError, "aligned"),
        ({"device": 2}, TypeError, "device"),
        ({"device": 3}, TypeError, "device"),
        ({"data": None}, ValueError, "no memory"),
        ({"shape": (-1, 2)}, ValueError, "negative"),
        ({"shape": (2**40, 2**40)}, ValueError, "more items"),
        ({"ndim": -1}, TypeError, "shape"),
        ({"lanes": 2}, TypeError, "vector"),
        ({"bits": 16}, TypeError, "float16"),
    ],
)
def test_what_a_tensor_says_is_checked(fields, error, text):
    with pytest.raises(error, match=text):
        _core.inspect_array(Forged(**fields))
    assert _core.inspect_array(Forged())[1] == (2, 2)


# -- axes that have no stride ------------------------------------------------------------------------------------------


def test_strides_of_single_and_empty_axes(rng):
    a = rng.standard_normal((2, 1))
    out = np.empty((1, 2)).T
    assert orth.orthonormalize(a, out=out) is out
    for method in ("cholesky", "householder", "polar"):
        orth.orthonormalize(a, method=method, out=np.empty((1, 2)).T)
    assert orth.contains(np.empty((0, 5, 2)), np.empty((0, 5, 2))).shape == (0,)
    assert orth.compose(np.empty((0, 5, 2)), np.empty((0, 5, 2)), 2).shape[0] == 0
    assert orth.quantize_int4(np.empty((0, 5))).apply(np.empty((5, 3))).shape == (0, 3)
    record = np.zeros(1, [("a", "f8"), ("b", "i4")])["a"]
    assert orth.hadamard(record).shape == (1,)
    u, s, v = np.linalg.svd(rng.standard_normal((8, 6)), full_matrices=False)
    strided = np.repeat(s, 2)[::2]
    found = merge_svd((u, strided, v), (u, strided, v), 6)
    np.testing.assert_allclose(found.S, np.sqrt(2) * s)
    g = rng.standard_normal((6, 4))
    projector = orth.GradientProjector(1, rng=0)
    projector.down(g, out=np.empty((1, 6)).T)


# -- types and values --------------------------------------------------------------------------------------------------

eye = np.eye(3)
WRONG = {
    "product_svd float": (lambda: product_svd(eye, eye, 1.5), TypeError, "rank"),
    "product_svd bool": (lambda: product_svd(eye, eye, True), TypeError, "rank"),
    "product_svd text": (lambda: product_svd(eye, eye, "2"), TypeError, "rank"),
    "product_svd huge": (lambda: product_svd(eye, eye, 10**30), ValueError, "rank"),
    "sketch float": (lambda: FrequentDirections(2.7, 3), TypeError, "size"),
    "sketch bool": (lambda: FrequentDirections(2, True), TypeError, "n_features"),
    "merge None": (lambda: merge_svd((None, np.ones(2), None), (None, np.ones(2), eye[:2]), 2), TypeError, "U"),
    "merge pair": (lambda: merge_svd((1, 2), (1, 2, 3), 2), TypeError, "triple"),
    "merge rank": (lambda: merge_svd((None, np.ones(2), eye[:2]), (None, np.ones(2), eye[:2]), 1.9), TypeError, "rank"),
    "merge nan": (lambda: merge_svd((eye * np.nan, np.ones(3), eye), (eye, np.ones(3), eye), 2), ValueError, "a.U"),
    "logits scale": (
        lambda: grassmann.logits(np.ones((2, 4)), grassmann.random(4, 2, batch=2), scale=np.nan),
        ValueError,
        "scale",
    ),
    "logits text": (
        lambda: grassmann.logits(np.ones((2, 4)), grassmann.random(4, 2, batch=2), scale="25"),
        TypeError,
        "scale",
    ),
    "choose shape": (lambda: choose_rank([3.0, 1], rule="gavish-donoho", shape=(7, np.inf)), TypeError, "shape"),
    "choose pair": (lambda: choose_rank([3.0, 1], rule="gavish-donoho", shape=7), ValueError, "shape"),
    "choose rule": (lambda: choose_rank([], rule="x"), ValueError, "rule"),
    "choose energy": (lambda: choose_rank([], energy=5), ValueError, "energy"),
    "choose nan": (lambda: choose_rank([1.0], energy=np.nan), ValueError, "energy"),
    "choose complex": (lambda: choose_rank(np.array([2 + 1j])), TypeError, "real"),
    "rank bool": (lambda: StreamingSVD(True), TypeError, "rank"),
    "oversample bool": (lambda: StreamingSVD(2, oversample=True), TypeError, "oversample"),
    "forget text": (lambda: StreamingSVD(2, forget="0.5"), TypeError, "forget"),
    "center text": (lambda: StreamingSVD(2, center="no"), TypeError, "center"),
    "method bytes": (lambda: StreamingSVD(2, method=b"auto"), ValueError, "method"),
    "method list": (lambda: StreamingSVD(2, method=["auto"]), ValueError, "method"),
    "energy text": (lambda: StreamingSVD(2, energy="0.9"), TypeError, "energy"),
    "dtype": (lambda: StreamingSVD(2, dtype=3), TypeError, "dtype"),
    "rng bool": (lambda: truncated_svd(eye, 1, rng=True), TypeError, "rng"),
    "rng text": (lambda: truncated_svd(eye, 1, rng="a"), TypeError, "rng"),
    "truncated float": (lambda: truncated_svd(eye, 2.0), TypeError, "rank"),
    "strength": (lambda: orth.project_out(eye, eye[:, :1], strength="1"), TypeError, "strength"),
    "strength huge": (lambda: orth.project_out(eye, eye[:, :1], strength=10**400), ValueError, "strength"),
    "alpha": (lambda: orth.apply_core(eye, eye[:, :1], 1.0, alpha="1"), TypeError, "alpha"),
    "check": (lambda: orth.apply_core(eye, eye[:, :1], 1.0, check="no"), TypeError, "check"),
    "method unhashable": (lambda: orth.orthonormalize(eye, method=["polar"]), ValueError, "method"),
    "batch": (lambda: orth.random_orthogonal(4, 2, batch=2.5), TypeError, "batch"),
    "batch negative": (lambda: orth.random_orthogonal(4, 2, batch=-1), ValueError, "batch"),
    "tol": (lambda: orth.contains(eye, eye, tol="a"), TypeError, "tol"),
    "rcond": (lambda: orth.range_basis(eye, rcond=2.0), ValueError, "rcond"),
    "lr": (lambda: grassmann.sgd_step(eye[:, :1].copy(), eye[:, :1].copy(), lr="0.1"), TypeError, "lr"),
    "lr grad": (
        lambda: grassmann.exp(eye[:, :1], eye[:, 1:2], t=torch.ones((), requires_grad=True)),
        TypeError,
        "t is a tensor",
    ),
    "mean tol": (lambda: grassmann.mean(np.stack([eye[:, :1]] * 2), tol="a"), TypeError, "tol"),
    "mean progress": (lambda: grassmann.mean(np.stack([eye[:, :1]] * 2), progress=5), TypeError, "progress"),
    "eps": (lambda: plucker.mix(np.ones((3, 4)), [1], eps="1e-3"), TypeError, "eps"),
    "rope": (lambda: plucker.mix(np.ones((3, 4)), [1], rope="half", rope_start=1.5), TypeError, "rope_start"),
    "weights": (lambda: plucker.mix(np.ones((3, 4)), [1], weights=["1"]), TypeError, "weights"),
    "lists": (lambda: orth.hadamard([[1, 2], [3]]), ValueError, "shapes"),
    "complex": (lambda: orth.hadamard(np.ones(4, complex)), TypeError, "real"),
    "class": (lambda: orth.hadamard(np.ndarray), TypeError, "class"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_types_and_values(what):
    call, error, text = WRONG[what]
    with pytest.raises(error, match=text):
        call()


def test_lists_of_numbers_are_floats():
    np.testing.assert_array_equal(orth.hadamard([1, 1], scale=1.0), [2.0, 0.0])
    assert orth.project_out([[1, 2], [3, 4]], [[1], [0]]).dtype == np.float64


def test_dtypes_come_before_values(rng):
    c, u = rng.standard_normal((6, 4)).astype(np.float32), orth.random_orthogonal(6, 2, rng=0, dtype=np.float32)
    wide_u = u.astype(np.float64)
    v = orth.random_orthogonal(4, 2, rng=0, dtype=np.float32)
    for call in (
        lambda: orth.project_out(c, wide_u),
        lambda: orth.project(c, wide_u),
        lambda: orth.project_out(c, (wide_u, v), side="both"),
        lambda: orth.swap(c.T, c.T, wide_u),
        lambda: orth.span_sum(u, wide_u),
        lambda: orth.apply_core(c, wide_u, 1.0),
        lambda: orth.householder_apply(wide_u, c),
        lambda: grassmann.distance(u, wide_u),
    ):
        with pytest.raises(TypeError, match=r"must be float32 as .* is, got float64"):
            call()


def test_convolutions_are_told_of_flatten(rng):
    g, u = rng.standard_normal((8, 3, 3, 3)), orth.random_orthogonal(8, 2, rng=0)
    for call in (
        lambda: orth.project_out(g, u),
        lambda: orth.apply_core(g, u, 1.0),
        lambda: orth.householder_apply(u, g),
        lambda: orth.project(g, u),
        lambda: orth.project_out(g[..., 0], u),
        lambda: orth.project_out(g, (u, u), side="both"),
        lambda: orth.swap(g, g, u),
        lambda: orth.rotate(g, np.ones(8), np.eye(8)[0]),
        lambda: orth.GradientProjector(2).down(g),
        lambda: grassmann.tangent(u, g),
        lambda: StreamingSVD(2).update(g),
        lambda: StreamingSVD(2, weight=np.ones(3)).update(g),
        lambda: FrequentDirections(2, 27).update(g),
        lambda: truncated_svd(g, 1),
        lambda: product_svd(g, g),
    ):
        with pytest.raises(ValueError, match=r"flatten\(1\)"):
            call()


def test_dependent_columns_are_told_of_range_basis(rng):
    a = rng.standard_normal((6, 3))
    a[:, 2] = a[:, 0]
    u = orth.random_orthogonal(6, 3, rng=0)
    for call in (
        lambda: grassmann.principal_angles(a, u),
        lambda: orth.project_out(u, a),
        lambda: grassmann.tangent(a, u),
    ):
        with pytest.raises(ValueError, match="range_basis"):
            call()
    assert orth.range_basis(a).shape == (6, 2)
    q, rank = orth.orthonormalize(a, return_rank=True)
    assert (q.shape, rank) == ((6, 3), 2)


# -- one rule for overflows --------------------------------------------------------------------------------------------


def big(shape, dtype, share=0.9):
    return np.full(shape, share * float(np.finfo(dtype).max), dtype)


OVERFLOWS = {
    "apply_core": lambda d: orth.apply_core(big((4, 3), d), np.eye(4, 1, dtype=d), 1.0, alpha=2.0),
    "apply_core in place": lambda d: orth.apply_core(
        (c := big((4, 3), d)), np.eye(4, 1, dtype=d), 1.0, alpha=2.0, out=c
    ),
    "project_out": lambda d: orth.project_out(big((4, 3), d), np.eye(4, 2, dtype=d), strength=-3.0),
    "householder_qr": lambda d: orth.householder_qr(big((8, 3), d)),
    "pivoted QR": lambda d: orth.householder_qr(big((8, 3), d), pivoting=True),
    "project": lambda d: StreamingSVD(1).update(np.ones((3, 8), d)).project(big((2, 8), d)),
    "reconstruct": lambda d: StreamingSVD(2).update(np.eye(2, 8, dtype=d) + 1).reconstruct(big((2, 2), d)),
    "weight": lambda d: StreamingSVD(2, weight=np.full(8, 1e300)).update(np.eye(2, 8, dtype=d)).project(big((1, 8), d)),
    "explained_variance": lambda d: StreamingSVD(2).update(np.eye(5, 8) * 1e200).explained_variance,
    "householder_product": lambda d: orth.householder_product(big((4, 2), d), np.ones(2, d)),
    "householder_apply": lambda d: orth.householder_apply(np.ones((4, 1), d), big((4, 2), d), np.full(1, 7, d)),
    "inner": lambda d: grassmann.inner(np.eye(4, 2, dtype=d), big((4, 2), d), big((4, 2), d)),
    "norm": lambda d: grassmann.norm(np.eye(4, 2, dtype=d), big((4, 2), d)),
    "logits": lambda d: grassmann.logits(
        np.ones((2, 4), d), 1e30 * grassmann.random(4, 2, batch=2, rng=0, dtype=d), scale=1e300
    ),
    "residual": lambda d: StreamingSVD(1).update(np.eye(3, 8, dtype=d)).residual(big((2, 8), d)),
    "update": lambda d: StreamingSVD(2).update(big((40, 8), d)).singular_values,
    "thin update": lambda d: StreamingSVD(2).update(big((2, 300), d)),
    "truncated_svd": lambda d: truncated_svd(big((30, 30), d), 2),
    "sketch": lambda d: FrequentDirections(2, 8).update(big((9, 8), d)),
    "coordinates": lambda d: plucker.coordinates(np.triu(big((4, 2), d))),
    "mix": lambda d: plucker.mix(np.eye(3, 4, dtype=d) * big((3, 4), d), [1], norm=None),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("what", OVERFLOWS)
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_finite_input_gives_finite_results_or_an_error(what, dtype):
    with pytest.raises((ValueError, np.linalg.LinAlgError), match=r"overflow|scale|too large"):
        OVERFLOWS[what](dtype)


@pytest.mark.parametrize("size", [1.5e308, 1e300, 1e-300, 1e-309, 1e-318])
@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (200, 80)])
def test_numbers_at_the_ends_of_the_range(size, shape, rng):
    """Powers of two that bring numbers near one, and their inverses, stay numbers: also of subnormal ones."""
    unit = rng.standard_normal(shape) * 0.5 ** np.arange(shape[1])
    unit /= np.abs(unit).max()
    A, values = unit * size, np.linalg.svd(unit, compute_uv=False)[:3]
    rough = max(1e-9, 100 * 5e-324 / size)
    Q = orth.range_basis(A, rcond=1e-3)
    np.testing.assert_allclose(Q.T @ Q, np.eye(Q.shape[1]), atol=1e-12)
    np.testing.assert_allclose(unit - Q @ (Q.T @ unit), 0, atol=1e-2)
    assert orth.null_space(A, rcond=1e-3).shape == (shape[1], shape[1] - Q.shape[1])
    q = np.linalg.qr(unit[:, :2])[0]
    x = rng.standard_normal(shape[0])
    np.testing.assert_allclose(orth.project_out(x, A[:, :2], orthonormal=False), x - q @ (q.T @ x), atol=10 * rough)
    half = shape[0] // 2
    for make in (
        lambda: truncated_svd(A, 3, rng=0).S,
        lambda: StreamingSVD(3).update(A).singular_values,
        lambda: StreamingSVD(8).update(A[:half]).update(A[half:]).singular_values[:3],
        lambda: StreamingSVD(8).update(A[:half]).merge(StreamingSVD(8).update(A[half:])).singular_values[:3],
    ):
        if size > 1 and values[0] > np.finfo(float).max / size:
            with pytest.raises((ValueError, np.linalg.LinAlgError), match=r"overflow|scale|too large"):
                make()
        else:
            np.testing.assert_allclose(make() / size if size > 1e-308 else make() / np.abs(A).max(), values, rtol=0.05)


def test_an_overflow_in_place_leaves_the_input(rng):
    c = big((4, 3), np.float32)
    with pytest.raises(ValueError, match="overflow"):
        orth.apply_core(c, np.eye(4, 1, dtype=np.float32), 1.0, alpha=2.0, out=c)
    np.testing.assert_array_equal(c, big((4, 3), np.float32))


def test_a_stream_survives_what_it_refused(rng):
    svd = StreamingSVD(2).update(rng.standard_normal((5, 300)))
    twin = svd.copy()
    with pytest.raises(ValueError, match="too large"):
        svd.update(np.full((2, 300), 1.7e308))
    np.testing.assert_array_equal(svd.components, twin.components)


# -- pickles and files -------------------------------------------------------------------------------------------------


def states(rng):
    x = rng.standard_normal((30, 8))
    yield StreamingSVD(3, center=True).update(x)
    yield FrequentDirections(3, 8).update(x)
    yield plucker.MixState([1, 2], 8).prefill(x)
    yield orth.quantize_int4(x)
    projector = orth.GradientProjector(3, rng=0)
    projector.down(x)
    yield projector
    yield orth.householder_qr(x)[0]
    yield IncrementalPCA(3).fit(x)
    yield StreamingSVD(3, weight=np.arange(1.0, 9)).update(x.astype(np.float32))


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, StreamingSVD) and isinstance(b, StreamingSVD):
        return same(a.__getstate__(), b.__getstate__())
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("index", range(8))
def test_flipped_bits_do_not_load_other_numbers(rng, index):
    thing = list(states(rng))[index]
    raw = pickle.dumps(thing)
    state = thing.__getstate__()
    assert same(pickle.loads(raw).__getstate__(), state)
    other = 0
    for bit in np.random.default_rng(0).integers(0, 8 * len(raw), 250):
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << (bit % 8)
        try:
            found = pickle.loads(bytes(damaged))
            found_state = found.__getstate__() if type(found) is type(thing) else None
        except Exception:
            continue
        if found_state is not None and not same(found_state, state):
            other += 1
    assert other == 0


@pytest.mark.parametrize(
    ("make", "free"),
    [
        (lambda: StreamingSVD(3), ()),
        (lambda: FrequentDirections(4, 6), ()),
        (lambda: orth.GradientProjector(2), ("adapt", "threshold", "scale", "iterations")),
        (lambda: orth.quantize_int4(np.eye(4)), ()),
        (lambda: orth.householder_qr(np.eye(4))[0], ("T",)),  # a property
        (lambda: plucker.MixState([1], 4), ()),
    ],
    ids=["stream", "sketch", "projector", "int4", "householder", "mixing"],
)
def test_what_an_object_was_made_with_is_fixed(make, free):
    thing = make()
    for name in {*inspect.signature(type(thing)).parameters} - {*free}:
        with pytest.raises(AttributeError, match=f"{name} is fixed when a"):
            setattr(thing, name, getattr(thing, name, None))
        with pytest.raises(AttributeError, match=name):
            delattr(thing, name)
    twin = pickle.loads(pickle.dumps(thing))
    twin.__setstate__(thing.__getstate__())  # a state may be put into an object that is there
    assert repr(twin) == repr(thing)


def test_a_subclass_may_have_options_of_its_own():
    class Tracked(StreamingSVD):
        def __init__(self, rank, alpha):
            super().__init__(rank)
            self.alpha = alpha

    tracked = Tracked(3, 0.5)
    tracked.alpha = 0.25
    assert tracked.alpha == 0.25
    for name in ("rank", "weight", "dtype"):
        with pytest.raises(AttributeError, match=f"{name} is fixed"):
            setattr(tracked, name, 4)


def test_a_merge_that_fails_leaves_a_fresh_sketch_fresh(rng):
    one, two = _core.Sketch(4, 6), _core.Sketch(4, 5)
    two.update(rng.standard_normal((9, 5)).astype(np.float32))
    with pytest.raises(ValueError, match="columns"):
        one.merge(two)
    assert one.dtype() is None
    one.update(rng.standard_normal((9, 6)))
    assert one.dtype() == "float64"


def test_sketches_are_saved_and_copied(tmp_path, rng):
    x = rng.standard_normal((50, 6)).astype(np.float32)
    for rows in ([], [x]):
        fd = FrequentDirections(4, 6)
        for block in rows:
            fd.update(block)
        fd.save(tmp_path / "sketch.npz")
        for twin in (FrequentDirections.load(tmp_path / "sketch.npz"), fd.copy(), copy.deepcopy(fd)):
            np.testing.assert_array_equal(twin.sketch, fd.sketch)
            assert (twin.error_bound, twin.rows_seen) == (fd.error_bound, fd.rows_seen)
            twin.update(x)
            assert twin.rows_seen == fd.rows_seen + 50
    StreamingSVD(2).update(x).save(tmp_path / "stream.npz")
    with pytest.raises(ValueError, match="not a FrequentDirections file"):
        FrequentDirections.load(tmp_path / "stream.npz")


def test_files(tmp_path, rng):
    svd = StreamingSVD(3).update(rng.standard_normal((30, 8)))
    svd.save(os.fsencode(tmp_path / "b.npz"))
    assert StreamingSVD.load(os.fsencode(tmp_path / "b.npz")).rows_seen == 30
    path = tmp_path / "s.npz"
    svd.save(path)
    # Members that nobody needs are not read, and sizes that were made up ask for no memory.
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("more.npy", b"0" * 10_000_000)
    assert StreamingSVD.load(path).rows_seen == 30
    state = svd.__getstate__()
    write_archive(path, {**state, "components": np.zeros((3, 8))})
    with pytest.raises(ValueError, match="checksum"):
        StreamingSVD.load(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("format", "rank", "components"):
            archive.writestr(f"{name}.npy", b"\x93NUMPY\x01\x00" + b"0" * 5_000_000)
    with pytest.raises(ValueError, match=r"s\.npz"):
        StreamingSVD.load(path)


def test_components_that_are_not_orthonormal_do_not_load(rng):
    from subspan._lib.files import sealed_state

    svd = StreamingSVD(3).update(rng.standard_normal((30, 8)))
    state = {k: v for k, v in svd.__getstate__().items() if k != "checksum"}
    state["components"] = 2 * state["components"]
    state["low"] = 0 * state["components"]
    with pytest.raises(ValueError, match="orthonormal"):
        StreamingSVD.__new__(StreamingSVD).__setstate__(sealed_state(state))


@pytest.mark.skipif(sys.platform == "win32", reason="processes are killed otherwise there")
def test_what_a_killed_process_left_is_swept(tmp_path, rng):
    code = (
        "import os, numpy as np, signal\nfrom subspan.svd import StreamingSVD\n"
        "s = StreamingSVD(2).update(np.eye(4))\n"
        "os.fsync = lambda f: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"s.save({str(tmp_path / 's.npz')!r})"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode != 0
    assert list(tmp_path.glob("*.part"))
    StreamingSVD(2).update(np.eye(4)).save(tmp_path / "s.npz")
    assert [p.name for p in tmp_path.iterdir()] == ["s.npz"]


def test_batches_of_memory_maps_are_converted_one_at_a_time(tmp_path):
    import tracemalloc

    for dtype in (np.uint8, np.float16):
        x = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", dtype, (40_000, 60))
        x[:] = np.random.default_rng(0).integers(0, 9, x.shape)
        tracemalloc.start()
        pca = IncrementalPCA(4, batch_size=500).fit(x)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 3_000_000
        np.testing.assert_allclose(pca.mean_, np.asarray(x, np.float64).mean(0))
        assert pca.transform(x[:10]).shape == (10, 4)


# -- states whose options are of other types ---------------------------------------------------------------------------


@pytest.mark.parametrize("start", [3, np.int64(3), np.array(3), [0, 1, 2], (0, 1, 2), np.array([0, 1, 2], np.int32)])
def test_saved_states_load_whatever_their_options_were(tmp_path, rng, start):
    """Archives give lists back as arrays, and numbers of NumPy as numbers."""
    options = {"eps": np.float32(1e-4), "norm": np.str_("soft"), "rope_base": np.float64(1e4), "rope": "half"}
    state = plucker.MixState([1, 2], 8, rope_start=start, **options)
    state.step(rng.standard_normal((3, 8)))
    state.save(tmp_path / "s.npz")
    z = rng.standard_normal((3, 8))
    loaded, again = plucker.MixState.load(tmp_path / "s.npz"), pickle.loads(pickle.dumps(state))
    want = state.step(z)
    np.testing.assert_array_equal(loaded.step(z), want)
    np.testing.assert_array_equal(again.step(z), want)
    assert repr(loaded) == repr(state)
    svd = StreamingSVD(np.int64(2), method=np.str_("gram"), signs=np.str_("v"), forget=np.float64(0.9))
    svd.update(rng.standard_normal((5, 4))).save(tmp_path / "t.npz")
    np.testing.assert_array_equal(StreamingSVD.load(tmp_path / "t.npz").components, svd.components)


# -- every format of SciPy, integers, duplicates -----------------------------------------------------------------------


@pytest.mark.parametrize("form", ["csr", "csc", "coo", "bsr", "dia", "lil", "dok"])
@pytest.mark.parametrize("kind", [np.float32, np.float64, np.uint8, np.int16])
@pytest.mark.parametrize("weight", [None, np.arange(1.0, 7)])
def test_sparse_rows_of_any_format(rng, form, kind, weight):
    a = np.where(rng.random((30, 6)) < 0.4, rng.integers(1, 9, (30, 6)), 0).astype(kind)
    x, dense = sparse.csr_array(a).asformat(form), a.astype(np.float64)
    want = StreamingSVD(6, weight=weight).update(dense)
    close = 1e-4 if kind == np.float32 else 1e-9
    svd = StreamingSVD(6, weight=weight).update(x)
    np.testing.assert_allclose(svd.singular_values, want.singular_values, rtol=close)
    np.testing.assert_allclose(np.abs(svd.project(x)), np.abs(want.project(dense)), atol=40 * close)
    np.testing.assert_allclose(svd.residual(x), 0, atol=40 * close)
    one = truncated_svd(x, 3, weight=weight, rng=0, power_iterations=8)
    np.testing.assert_allclose(one.S, want.singular_values[:3], rtol=close)
    sketch = FrequentDirections(8, 6).update(x)
    assert sketch.rows_seen == 30


def test_entries_of_one_cell_add_up_beyond_their_integers():
    x = sparse.csr_array((np.array([200, 100], np.uint8), [0, 0], [0, 2, 2]), shape=(2, 3))
    for y in (x, sparse.coo_array(x), sparse.csc_array(x)):
        values = (
            StreamingSVD(1).update(y).singular_values,
            truncated_svd(y, 1).S,
            FrequentDirections(2, 3).update(y).sketch[0],
        )
        assert [float(v[0]) for v in values] == [300, 300, 300], y.format


def test_malformed_lists_and_diagonals():
    x = sparse.lil_array(np.eye(4))
    x.rows[0] = [0, 9]
    y = sparse.dia_array(np.eye(4))
    y.offsets = np.array([0, 1])
    for bad in (x, y):
        for call in (StreamingSVD(2).update, lambda z: truncated_svd(z, 1), FrequentDirections(2, 4).update):
            with pytest.raises(ValueError, match=r"do not fit|as many"):
                call(bad)


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("matrix", [False, True])
@pytest.mark.parametrize("mean", [0.0, 300.0, 1e5])
def test_weighted_streams_of_float32_rows_with_a_mean(rng, matrix, mean):
    x = (mean + 0.5 * rng.standard_normal((400, 30))).astype(np.float32)
    w = rng.uniform(0.5, 1.5, 30)
    weight = np.diag(w) + 0.1 if matrix else w
    factor = np.linalg.cholesky(weight if matrix else np.diag(w))
    exact = x.astype(np.float64) - x.astype(np.float64).mean(0)
    u, s, _ = np.linalg.svd(exact @ factor, full_matrices=False)
    svd = StreamingSVD(5, center=True, weight=weight).update(x[:200]).update(x[200:])
    assert svd.dtype == svd.components.dtype == svd.mean.dtype == np.float32
    np.testing.assert_allclose(svd.singular_values, s[:5], rtol=1e-6)
    np.testing.assert_allclose(np.abs(svd.project(x)), np.abs(u[:, :5] * s[:5]), atol=1e-5)
    for shape, error in (((3, 400, 5), ValueError), ((400, 5), None)):
        out = np.empty(shape, np.float32)
        if error:
            with pytest.raises(error, match="shape"):
                svd.project(x, out=out)
        else:
            assert svd.project(x, out=out) is out
    wide = np.zeros((400, 30), np.float32)
    with pytest.raises(ValueError, match="out overlaps"):
        svd.reconstruct(wide[:, :5], out=wide)
    there = torch.zeros(400, 30)
    assert svd.reconstruct(svd.project(x), out=there) is there
    np.testing.assert_array_equal(there.numpy(), svd.reconstruct(svd.project(x)))


def _mass_and_stiffness(n):
    mass = sparse.diags_array([np.ones(n - 1), np.full(n, 4.0), np.ones(n - 1)], offsets=[-1, 0, 1]) / (6 * n)
    stiff = sparse.diags_array([-np.ones(n - 1), np.full(n, 2.01), -np.ones(n - 1)], offsets=[-1, 0, 1]) * n
    return {"mass": mass, "stiffness": stiff, "both": mass + stiff}


class _MatmatOnly:
    """The least that is an operator."""

    def __init__(self, w):
        self.shape, self._w = w.shape, w

    def matmat(self, x):
        return self._w @ x


_WEIGHT_FORMS = {
    "csr": sparse.csr_array,
    "csc matrix": sparse.csc_matrix,
    "coo": sparse.coo_array,
    "linear operator": lambda w: sparse.linalg.aslinearoperator(sparse.csr_array(w)),
    "matmat": lambda w: _MatmatOnly(sparse.csr_array(w)),
    "dense operator": lambda w: _MatmatOnly(np.asarray(w.toarray())),
}


@pytest.mark.parametrize("form", _WEIGHT_FORMS)
@pytest.mark.parametrize("which", ["mass", "stiffness", "both"])
@pytest.mark.parametrize("center", [False, True])
def test_weights_that_are_sparse_or_operators(rng, form, which, center):
    n, k = 300, 4
    w = _mass_and_stiffness(n)[which]
    dense = w.toarray()
    x = rng.standard_normal((50, 7)) @ rng.standard_normal((7, n)) + 3
    factor = np.linalg.cholesky(dense)
    y = (x - x.mean(0) if center else x) @ factor
    u, s, vh = np.linalg.svd(y, full_matrices=False)
    svd = StreamingSVD(k, center=center, weight=_WEIGHT_FORMS[form](w)).update(x[:20]).update(x[20:])
    np.testing.assert_allclose(svd.singular_values, s[:k], rtol=1e-11)
    v = svd.components
    np.testing.assert_allclose(v @ dense @ v.T, np.eye(k), atol=1e-11)
    np.testing.assert_allclose(np.abs(svd.project(x)), np.abs(u[:, :k] * s[:k]), atol=1e-9 * s[0])
    np.testing.assert_allclose(svd.residual(x), (y**2).sum(1) - ((u[:, :k] * s[:k]) ** 2).sum(1), atol=1e-9 * s[0] ** 2)
    back = svd.reconstruct(svd.project(x))
    want = (u[:, :k] * s[:k]) @ np.linalg.solve(factor.T, vh[:k].T).T + (x.mean(0) if center else 0)
    np.testing.assert_allclose(back, want, atol=1e-8 * np.abs(x).max())
    again = pickle.loads(pickle.dumps(svd))
    np.testing.assert_array_equal(again.components, v)
    again.merge(svd)
    np.testing.assert_allclose(again.singular_values[:2], 2**0.5 * s[:2], rtol=1e-10)


def test_a_saved_stream_keeps_its_sparse_weight(rng, tmp_path):
    w = _mass_and_stiffness(40)["mass"]
    svd = StreamingSVD(3, weight=w).update(rng.standard_normal((9, 40)))
    svd.save(tmp_path / "s.npz")
    again = StreamingSVD.load(tmp_path / "s.npz")
    np.testing.assert_array_equal(again.components, svd.components)
    again.merge(svd)
    with pytest.raises(ValueError, match="weight that the stream has"):
        again.merge(StreamingSVD(3, weight=2 * w).update(rng.standard_normal((9, 40))))


@pytest.mark.parametrize("weight", ["diagonal", "dense", "csr", "linear operator"])
@pytest.mark.parametrize("kind", ["csr", "operator", "float32"])
def test_sparse_rows_and_operators_with_any_weight(rng, weight, kind):
    n = 60
    w = _mass_and_stiffness(n)["mass"]
    if weight == "diagonal":
        w = sparse.diags_array(rng.uniform(0.5, 2, n))
    dense = w.toarray()
    given = {"diagonal": w.diagonal(), "dense": dense}.get(weight)
    given = _WEIGHT_FORMS[weight](w) if given is None else given
    x = sparse.random_array((200, n), density=0.1, rng=rng, format="csr", dtype=np.float64)
    x = (x @ sparse.diags_array(2.0 ** -np.arange(n))).tocsr()
    s = np.linalg.svd(x.toarray() @ np.linalg.cholesky(dense), compute_uv=False)
    rtol = 1e-8
    if kind == "float32":
        x, rtol = x.astype(np.float32), 1e-5
    if kind != "operator":
        svd = StreamingSVD(4, weight=given).update(x[:80]).update(x[80:])
        np.testing.assert_allclose(svd.singular_values, s[:4], rtol=rtol)
        other = StreamingSVD(4, weight=given).update(x.toarray())
        np.testing.assert_allclose(np.abs(svd.project(x)), np.abs(other.project(x.toarray())), atol=10 * rtol * s[0])
    one = truncated_svd(x if kind != "operator" else sparse.linalg.aslinearoperator(x), 4, weight=given, rng=0)
    assert one.S.dtype == x.dtype
    np.testing.assert_allclose(one.S, s[:4], rtol=rtol)
    np.testing.assert_allclose(one.Vh @ dense @ one.Vh.T, np.eye(4), atol=10 * rtol)
    if kind != "operator":
        shares = truncated_svd(x, energy=0.9, weight=given, rng=0, power_iterations=6)
        assert (shares.S**2).sum() >= 0.9 * (s**2).sum() * (1 - 1e-5)


@pytest.mark.parametrize("form", ["dense", *_WEIGHT_FORMS])
def test_weights_that_are_no_inner_product(form):
    make = (lambda w: w.toarray()) if form == "dense" else _WEIGHT_FORMS[form]
    good = _mass_and_stiffness(12)["both"].tocsr()
    zero, skew, nan, negative = (good.copy().tolil() for _ in range(4))
    zero[5, :] = zero[:, 5] = 0
    skew[3, 4] += 1
    nan[2, 2] = np.nan
    negative[1, 1] = -1
    for bad, text in ((zero, "definite"), (skew, "symmetric"), (nan, "NaN"), (negative, "definite")):
        with pytest.raises(ValueError, match=text):
            StreamingSVD(2, weight=make(sparse.csr_array(bad)))
    with pytest.raises(ValueError, match="weight"):
        StreamingSVD(2, weight=make(good[:, :7]))
    with pytest.raises(ValueError, match="12 columns as weight"):
        StreamingSVD(2, weight=make(good)).update(np.ones((3, 5)))


def test_a_large_sparse_weight_and_an_interrupt():
    """The factorisation goes on in a thread that the process waits for: SuperLU asks the interpreter for memory."""
    program = """
import signal
import numpy as np
from scipy import sparse
from subspan.svd import StreamingSVD
g = sparse.diags_array([-np.ones(299), np.full(300, 4.0), -np.ones(299)], offsets=[-1, 0, 1])
w = sparse.kron(g, sparse.eye_array(300)) + sparse.kron(sparse.eye_array(300), g)
signal.signal(signal.SIGALRM, signal.default_int_handler)
signal.setitimer(signal.ITIMER_REAL, 0.3)
try:
    StreamingSVD(3, weight=w)
except KeyboardInterrupt:
    print("heard")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_operator_that_asks_for_too_much(monkeypatch):
    with pytest.raises(ValueError, match="pass the matrix itself"):
        StreamingSVD(2, weight=sparse.linalg.LinearOperator((2**20, 2**20), matvec=lambda x: x))
    StreamingSVD(2, weight=sparse.linalg.aslinearoperator(sparse.eye_array(2**20)))  # which holds its matrix
    monkeypatch.setattr("subspan.svd.inner_product._MOST_ENTRIES", 1000)
    with pytest.raises(ValueError, match="too many to factor"):
        StreamingSVD(2, weight=_MatmatOnly(np.eye(40) + 0.01))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("form", ["diagonal", "dense", "csr"])
def test_signs_of_a_weighted_stream_are_those_of_what_is_shown(rng, exact, form):
    w = sparse.diags_array(10.0 ** rng.uniform(-2, 2, 20)) + (0 if form == "diagonal" else 1e-3 * np.ones((20, 20)))
    given = {"diagonal": lambda: w.diagonal(), "dense": lambda: w, "csr": lambda: sparse.csr_array(w)}[form]()
    given = np.asarray(given) if form == "dense" else given
    svd = StreamingSVD(5, weight=given, signs="v", exact_blocks=exact)
    x = rng.standard_normal((60, 20))
    left, pieces = None, (x[:10], x[10:35], x[35:])
    for piece in pieces:
        if exact:
            turn = svd.update(piece, rotation=True)
            left = turn.new if left is None else turn.apply(left)
        else:
            svd.update(piece)
        v = svd.components
        assert (v[np.arange(5), np.abs(v).argmax(1)] > 0).all()
        # Coordinates, rows and rotations have the signs of the components.
        weighted = v @ (w.toarray() if sparse.issparse(w) else np.asarray(w))
        np.testing.assert_allclose(svd.project(x), x @ weighted.T, atol=1e-9 * np.abs(x @ weighted.T).max())
        np.testing.assert_allclose(svd.reconstruct(np.eye(5)), v, atol=1e-12 * np.abs(v).max())
    if exact:
        first = np.vstack(pieces) @ weighted.T / svd.singular_values
        assert (np.sign((left * first).sum(0)) == 1).all()


def test_column_variances_of_a_weighted_stream(rng):
    x = rng.standard_normal((50, 6)) + 2
    svd = StreamingSVD(2, center=True, weight=rng.uniform(0.5, 2, 6)).update(x[:20]).update(x[20:])
    np.testing.assert_allclose(svd.column_variances, x.var(0), rtol=1e-12)
    with pytest.raises(TypeError, match="diagonal"):
        _ = StreamingSVD(2, weight=np.eye(6)).update(x).column_variances


# -- downdates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize(("spread", "pieces"), [(0, 1), (3, 1), (6, 10), (8, 2)])
def test_a_downdate_keeps_small_values(rng, dtype, center, spread, pieces):
    x = (rng.standard_normal((300, 20)) * np.logspace(0, -spread, 20)).astype(dtype)
    svd = StreamingSVD(20, center=center).update(x[:200]).update(x[200:])
    for part in np.array_split(x[200:], pieces):
        svd.downdate(part)
    want = x[:200].astype(np.float64)
    want = np.linalg.svd(want - want.mean(0) if center else want, compute_uv=False)
    found = np.zeros(20)
    found[: len(svd.singular_values)] = svd.singular_values
    assert np.abs(found - want).max() <= 100 * np.finfo(dtype).eps * want[0]
    v = svd.components.astype(np.float64)
    assert np.abs(v @ v.T - np.eye(len(v))).max() <= 10 * np.finfo(dtype).eps * len(v) ** 0.5
    np.testing.assert_allclose(
        svd.column_variances,
        x[:200].astype(np.float64).var(0) if center else (x[:200].astype(np.float64) ** 2).mean(0),
        rtol=1e-3,
    )


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(np.float32, s) for s in (1e-30, 1e19, 1e30)] + [(np.float64, s) for s in (1e-300, 1e-170, 1e154, 1e200, 1e300)],
)
@pytest.mark.parametrize("options", [{}, {"center": True}, {"weight": np.linspace(0.5, 2, 8)}])
def test_downdates_at_all_scales(rng, dtype, scale, options):
    z = rng.standard_normal((40, 8))
    x = (z * scale).astype(dtype)
    want = z - z.mean(0) if options.get("center") else z * np.sqrt(options.get("weight", np.ones(8)))
    svd = StreamingSVD(8, **options).update(x).update(x).downdate(x)
    np.testing.assert_allclose(
        svd.singular_values / scale, np.linalg.svd(want, compute_uv=False), rtol=100 * np.finfo(dtype).eps
    )
    assert svd.rows_seen == 40


@pytest.mark.parametrize(
    ("dtype", "scale"), [(np.float32, 1e-36), (np.float32, 1e36)] + [(np.float64, s) for s in (1e-290, 1e-170, 1e250)]
)
@pytest.mark.parametrize("method", ["auto", "robust", "gram"])
def test_streams_at_all_scales(dtype, scale, method):
    """What a fold mends is mended at each scale; it is needed now and then, so there are many of them."""
    for seed in range(40):
        z = np.random.default_rng(seed).standard_normal((40, 8)).astype(dtype)
        x = z * dtype(scale)
        svd = StreamingSVD(8, method=method).update(x).update(x)
        want = np.linalg.svd(z.astype(np.float64), compute_uv=False) * 2**0.5
        found = svd.singular_values.astype(np.float64) / scale
        assert np.abs(found - want).max() <= 100 * np.finfo(dtype).eps * want[0]


def test_rows_that_were_never_added_are_not_removed(rng):
    svd = StreamingSVD(5).update(rng.standard_normal((30, 5)))
    before = svd.components
    for rows in (100 * np.eye(5), 3 * rng.standard_normal((20, 5))):
        with pytest.raises(np.linalg.LinAlgError, match="downdate"):
            svd.downdate(rows)
    np.testing.assert_array_equal(svd.components, before)


# -- scales of products and merges -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "big"), [(np.float32, 1e25), (np.float64, 1e200)])
def test_products_and_merges_of_what_the_dtype_holds(dtype, big):
    one = np.eye(1, 3, dtype=dtype)
    other = np.eye(1, 3, 1, dtype=dtype)
    found = merge_svd((None, np.array([big], dtype), one), (None, np.array([2 * big], dtype), other), 2)
    np.testing.assert_allclose(found.S / big, [2, 1], rtol=1e-6)
    found = product_svd(np.full((3, 1), big, dtype), np.full((1, 3), 1e-10, dtype))
    np.testing.assert_allclose(found.S / big, [3e-10], rtol=1e-6)
    for small in (1 / big, big):
        a = np.full((3, 1), small, dtype)
        if small < 1:
            np.testing.assert_allclose(product_svd(a, np.full((1, 3), big, dtype)).S, [3.0], rtol=1e-5)
        else:
            with pytest.raises(ValueError, match="overflows"):
                product_svd(a, np.full((1, 3), big, dtype))
    with pytest.raises(ValueError, match="underflows"):
        _ = StreamingSVD(2).update(np.arange(1.0, 13).reshape(4, 3) ** 2 * 1e-170).explained_variance_ratio


def test_sketches_of_float32_take_what_their_buffer_holds(rng):
    z = rng.standard_normal((40, 8))
    fd = FrequentDirections(4, 8).update((z * 1e25).astype(np.float32))
    assert np.isfinite(fd.sketch).all()
    np.testing.assert_allclose(fd.error_bound / 1e50, FrequentDirections(4, 8).update(z).error_bound, rtol=1e-5)


# -- flags, written numbers, integers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["no", 1, None, [True]])
def test_flags_are_true_or_false(rng, flag):
    u = orth.random_orthogonal(8, 2, batch=(1,), rng=0)
    g, v, c = rng.standard_normal((1, 8, 2)), rng.standard_normal((8, 2)), rng.standard_normal((8, 4))
    z = rng.standard_normal((6, 4))
    q, _ = orth.householder_qr(v)
    calls = {
        "maximize": [
            lambda f: grassmann.sgd_step(u.copy(), g, lr=0.1, maximize=f),
            lambda f: grassmann.adam_step(u.copy(), g, g * 0, np.zeros(1), step=1, lr=0.1, maximize=f),
        ],
        "transpose": [
            lambda f: orth.householder_apply(v, c, transpose=f),
            lambda f: orth.householder_apply_backward(c, v, c, transpose=f),
            lambda f: orth.hadamard(c, transpose=f),
            lambda f: q.apply(c, transpose=f),
        ],
        "project": [lambda f: grassmann.retract(u, g, project=f)],
        "causal": [lambda f: plucker.mix(z, [1], causal=f)],
        "check": [
            lambda f: grassmann.sgd_step(u.copy(), g, lr=0.1, check=f),
            lambda f: grassmann.tangent(u, g, check=f),
            lambda f: grassmann.retract(u, g, project=True, check=f),
            lambda f: grassmann.log(u, u, check=f),
            lambda f: orth.complement(u, check=f),
            lambda f: orth.householder_apply(v, c, check=f),
            lambda f: orth.householder_product(v, check=f),
            lambda f: orth.hadamard(c, check=f),
            lambda f: q.apply(c, check=f),
            lambda f: orth.project_out(c, u[0], check=f),
        ],
    }
    for name, functions in calls.items():
        for f in functions:
            with pytest.raises(TypeError, match=f"{name} must be True or False"):
                f(flag)


@pytest.mark.parametrize("form", ["csr", "csc", "coo", "bsr", "dia", "lil", "dok"])
def test_sparse_integers_wherever_rows_are_taken(rng, form):
    d = rng.integers(-4, 5, (30, 8)).astype(np.float32)
    s = sparse.csr_array(d.astype(np.int16)).asformat(form)
    removed = StreamingSVD(8).update(d).update(d + 1).downdate(s)
    np.testing.assert_allclose(removed.singular_values, StreamingSVD(8).update(d + 1).singular_values, rtol=1e-4)
    exact = StreamingSVD(8, exact_blocks=True).update(d)
    exact.update(s, rotation=True)
    assert exact.dtype == np.float32


def test_written_numbers_and_integers_beside_float32(rng):
    a = rng.standard_normal((5, 5)).astype(np.float32)
    assert product_svd(np.eye(5, dtype=np.int16), a).S.dtype == np.float32
    assert product_svd(a, np.eye(5).tolist()).S.dtype == np.float32
    found = merge_svd((None, [1.0, 0.5], a[:2]), (None, a[0, :1] ** 2, a[:1]), 2)
    assert found.S.dtype == np.float32
    assert FrequentDirections(3, 5).update(a).update([1, 2, 3, 4, 5]).rows_seen == 6
    assert truncated_svd(a, 1, initial=[[1, 0, 0, 0, 0]], rng=0).S.dtype == np.float32
    assert truncated_svd(a.astype(float), 1, initial=np.eye(1, 5, dtype=np.int32), rng=0).S.dtype == np.float64
    with pytest.raises(ValueError, match="2 dimensions"):
        truncated_svd(np.ones(()), 1, power_iterations="auto")
    assert grassmann.distance([[1.0], [0.0]], [[1.0], [0.0]]) == 0
    assert grassmann.principal_angles([[1.0], [0.0]], np.eye(2)).shape == (1,)
    for bad in (True, -1, "x"):
        with pytest.raises((TypeError, ValueError), match="rng"):
            grassmann.random_tangent(np.eye(4)[:, :2], rng=bad)
    for bad in ("2", True, np.nan):
        with pytest.raises((TypeError, ValueError), match="scale must be"):
            orth.hadamard(np.ones(4), scale=bad)
    for n in (2.5, 2**40, -4, 0):
        with pytest.raises((TypeError, ValueError), match="n must be"):
            orth.hadamard_matrix(n)


def test_out_over_sparse_rows_of_a_weighted_stream(rng):
    x = rng.standard_normal((20, 8))
    s = sparse.csr_array(x)
    svd = StreamingSVD(3, weight=np.ones(8)).update(x)
    with pytest.raises(ValueError, match="out overlaps"):
        svd.project(s, out=s.data[:60].reshape(20, 3))
    np.testing.assert_array_equal(s.toarray(), x)


@pytest.mark.parametrize("what", ["coo", "dia", "lil"])
def test_coordinates_are_whole_numbers(what):
    s = sparse.csr_array(np.eye(4) * 3).asformat(what)
    if what == "coo":
        s.coords = (s.coords[0] + 0.5, s.coords[1])
    elif what == "dia":
        s.offsets = s.offsets + 0.5
    else:
        s.rows[0][0] = 1.5
    for call in (StreamingSVD(2).update, lambda x: truncated_svd(x, 1), lambda x: StreamingSVD(2, weight=x)):
        with pytest.raises(ValueError, match="must be integers"):
            call(s)


def test_rotations_in_the_library_of_what_they_turn(rng):
    svd = StreamingSVD(3, exact_blocks=True)
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    first = svd.update(x[:8], rotation=True)
    left = first.apply(torch.zeros(0, 0))
    turn = svd.update(x[8:], rotation=True)
    left = turn.apply(left)
    assert isinstance(left, torch.Tensor)
    assert left.dtype == torch.float32
    assert left.shape == (20, 3)
    with pytest.raises(ValueError, match="U must have shape"):
        turn.apply(np.ones((5, 2)))
    with pytest.raises(TypeError, match="requires grad"):
        turn.apply(torch.nn.Parameter(left))
    with pytest.raises(ValueError, match="energy"):
        StreamingSVD(3, exact_blocks=True, energy=0.9).update(np.eye(4), rotation=True)
    assert "exact_blocks=True" in repr(svd)
    assert "weight=<5>" in repr(StreamingSVD(2, weight=np.ones(5), signs="v"))


def test_states_of_the_wrong_kind_are_named(rng):
    state = StreamingSVD(2, weight=np.ones(4)).update(rng.standard_normal((5, 4))).__getstate__()
    for name, value in (("inner_product", np.ones(3)), ("skip_gram", "x"), ("singular_values", "x")):
        with pytest.raises(ValueError, match=r"StreamingSVD|saved|weight|stream"):
            StreamingSVD.__new__(StreamingSVD).__setstate__(sealed_state({**state, name: value}))


@pytest.mark.parametrize("name", ["householder_apply_backward", "Q", "up", "sgd_step"])
def test_convolutions_are_told_of_flatten_everywhere(rng, name):
    w = torch.randn(8, 3, 5, 5)
    u = torch.from_numpy(orth.random_orthogonal(8, 2, rng=0).astype(np.float32))
    projector = orth.GradientProjector(2, rng=0)
    projector.down(torch.randn(8, 75))
    calls = {
        "householder_apply_backward": lambda: orth.householder_apply_backward(w, u, w),
        "Q": lambda: orth.householder_qr(u)[0] @ w,
        "up": lambda: projector.up(w),
        "sgd_step": lambda: grassmann.sgd_step(u.clone(), w, lr=1.0),
    }
    with pytest.raises(ValueError, match=r"flatten\(1\)"):
        calls[name]()


# -- first merges from many threads ------------------------------------------------------------------------------------


def test_first_merges_from_many_threads(rng):
    parts = [FrequentDirections(3, 8).update(rng.standard_normal((5, 8))) for _ in range(8)]
    for _ in range(30):
        total = FrequentDirections(3, 8)
        threads = [threading.Thread(target=total.merge, args=(part,)) for part in parts]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert total.rows_seen == 40


def test_a_projector_that_threads_share(rng):
    """Refreshes and products of threads do not mix: the counts of all are there, and each update is of one basis."""
    G = np.array(rng.standard_normal((60, 3)) @ rng.standard_normal((3, 40)), np.float32)
    p = orth.GradientProjector(3, refresh=2, rng=0)
    wrong = []

    def work():
        for _ in range(50):
            p.down(G)
            if not np.isfinite(p.up(np.ones((60, 3), np.float32))).all():
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert (p.refreshes, wrong) == (100, [])


def test_rotations_of_a_shared_stream(rng):
    """Each belongs to its own update, whatever else was added meanwhile."""
    x = rng.standard_normal((240, 12))
    svd = StreamingSVD(12, exact_blocks=True)
    done = []

    def add(i):
        done.append((x[4 * i : 4 * i + 4], svd.update(x[4 * i : 4 * i + 4], rotation=True)))

    threads = [threading.Thread(target=lambda j=j: [add(i) for i in range(15 * j, 15 * j + 15)]) for j in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    done.sort(key=lambda item: item[1].past.shape)
    assert svd.rows_seen == 240
    np.testing.assert_allclose(svd.singular_values, np.linalg.svd(x, compute_uv=False), rtol=1e-12)
