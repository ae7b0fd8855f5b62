"""Projections on a device against float64 on the CPU."""

from __future__ import annotations

from ctypes.util import find_library

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from references import BF16, eps, wide
from subspan import grassmann, orth, plucker, svd

DTYPES = [np.dtype(np.float16), BF16, np.dtype(np.float32), np.dtype(np.float64)]
IDS = ["f16", "bf16", "f32", "f64"]


def reference(C, V, M, alpha, side, source=None):
    C, V = wide(C), wide(V)
    X = C if source is None else wide(source) - C
    Vt = np.swapaxes(V, -1, -2)
    core = M * np.eye(V.shape[-1]) if np.ndim(M) == 0 else (np.diag(wide(M)) if np.ndim(M) == 1 else wide(M))
    return alpha * C + (V @ core @ (Vt @ X) if side == "left" else (X @ V) @ core @ Vt)


def close(got, want, dtype, scale=8.0):
    got = wide(got)
    error = np.abs(got - want).max() if want.size else 0.0
    return bool(error <= scale * eps(dtype) * max(1.0, np.abs(want).max(initial=0.0)))


def basis(rng, n, k, dtype):
    return np.linalg.qr(rng.standard_normal((n, k)))[0].astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("order", ["C", "F", "strided"])
def test_apply_core(gpu, rng, dtype, side, order):
    for m, n, k in [(64, 40, 8), (33, 70, 3), (130, 17, 32), (200, 64, 45), (1, 5, 1), (16, 1, 2), (300, 33, 100)]:
        rows = m if side == "left" else n
        k = min(k, rows)
        C = rng.standard_normal((m, n)).astype(dtype)
        V = basis(rng, rows, k, dtype)
        M = (rng.standard_normal((k, k)) / max(k, 1) ** 0.5).astype(np.float64 if dtype == np.float64 else np.float32)
        if order == "F":
            c, v = gpu.put(np.ascontiguousarray(C.T)).T, gpu.put(np.ascontiguousarray(V.T)).T
        elif order == "strided":
            c, v = gpu.put(np.repeat(np.repeat(C, 2, 0), 3, 1))[::2, ::3], gpu.put(np.repeat(V, 2, 1))[:, ::2]
        else:
            c, v = gpu.put(C), gpu.put(V)
        for core in (M, M[0].copy(), 0.75):
            for alpha in (1.0, 0.0, -0.5):
                core_there = core if np.ndim(core) == 0 else gpu.put(core)
                out = gpu.twice(lambda: orth.apply_core(c, v, core_there, alpha=alpha, side=side))  # noqa: B023
                assert close(gpu.get(out), reference(C, V, core, alpha, side), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_project_out_in_place_is_orthogonal(gpu, rng, dtype, side):
    m, n, k = 256, 96, 16
    C = rng.standard_normal((m, n)).astype(dtype)
    U = basis(rng, m if side == "left" else n, k, dtype)
    c = gpu.put(C)
    assert orth.project_out(c, gpu.put(U), side=side, out=c) is c
    got = gpu.get(c)
    # Against the exact projector of the basis as it was rounded.
    assert close(got, reference(C, U, -1.0, 1.0, side), dtype, 2.0)
    inside = wide(U).T @ wide(got) if side == "left" else wide(got) @ wide(U)
    before = wide(U).T @ wide(C) if side == "left" else wide(C) @ wide(U)
    assert np.linalg.norm(inside) <= 10 * eps(dtype) * np.linalg.norm(before) * (2 if dtype.itemsize == 2 else 1)


def test_bases_that_are_no_matrices(gpu, rng):
    C, u = rng.standard_normal((4, 4)).astype(np.float32), np.full(4, 0.5, np.float32)
    with pytest.raises(ValueError, match="U must have at least 2 dimensions"):
        orth.project_out(gpu.put(C), gpu.put(np.ones((), np.float32)))
    one, column = (gpu.get(orth.project_out(gpu.put(C), gpu.put(x))) for x in (u, u[:, None]))
    np.testing.assert_array_equal(one, column)  # a vector is one column


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float32)], ids=["bf16", "f32"])
@pytest.mark.parametrize("rows", [4096, 9000, 40000])
def test_tall_panels_over_clusters_and_two_passes(gpu, rng, dtype, rows):
    C = rng.standard_normal((rows, 20)).astype(dtype)
    U = basis(rng, rows, 5, dtype)
    out = gpu.twice(lambda: orth.project_out(gpu.put(C), gpu.put(U)))
    assert close(gpu.get(out), reference(C, U, -1.0, 1.0, "left"), dtype, 2.0)
    wide_c = np.ascontiguousarray(C.T)
    out = orth.project_out(gpu.put(wide_c), gpu.put(U), side="right")
    assert close(gpu.get(out), reference(wide_c, U, -1.0, 1.0, "right"), dtype, 2.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_wide_bases(gpu, rng, dtype, side, order):
    """More than 256 columns: through cuBLAS."""
    m, n, k = (300, 20, 270) if side == "left" else (20, 300, 270)
    scale = 80 if dtype == np.float64 else 24  # the reference is in float64 itself
    C = rng.standard_normal((2, m, n)).astype(dtype)
    V = basis(rng, 300, k, dtype)
    M = (rng.standard_normal((k, k)) / k**0.5).astype(np.float64 if dtype == np.float64 else np.float32)
    turn = (
        (lambda x: gpu.put(np.ascontiguousarray(np.swapaxes(x, -1, -2))).swapaxes(-1, -2)) if order == "F" else gpu.put
    )
    for core in (M, M[0].copy(), -1.0):
        there = core if np.ndim(core) == 0 else gpu.put(core)
        assert close(
            gpu.get(orth.apply_core(turn(C), turn(V), there, side=side)), reference(C, V, core, 1.0, side), dtype, scale
        )
    c = turn(C)
    assert orth.project_out(c, turn(V), side=side, out=c) is c
    assert close(gpu.get(c), reference(C, V, -1.0, 1.0, side), dtype, scale)
    assert close(gpu.get(orth.project(turn(C), turn(V), side=side)), reference(C, V, 1.0, 0.0, side), dtype, scale)
    source = rng.standard_normal((2, 20, 300)).astype(dtype)
    if side == "right":
        assert close(
            gpu.get(orth.swap(turn(C), turn(source), turn(V))), reference(C, V, 1.0, 1.0, "right", source), dtype, scale
        )


@pytest.mark.skipif(find_library("cublas") is not None, reason="cuBLAS is here")
def test_wide_bases_without_cublas(emulation, rng):
    emulation.control.without_blas()
    C, V = rng.standard_normal((300, 4)).astype(np.float32), basis(rng, 300, 260, np.float32)
    c = emulation.put(C)
    with pytest.raises(ImportError, match="cuBLAS was not found"):
        orth.project_out(c, emulation.put(V), out=c)
    np.testing.assert_array_equal(c.get(), C)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("hardware", [(8, 101376), (8, 166912), (12, 101376)])
@pytest.mark.parametrize("k", [20, 130, 250])
def test_other_devices(emulation, rng, dtype, hardware, k):
    emulation.control.hardware(*hardware)
    C, U = rng.standard_normal((600, 20)).astype(dtype), basis(rng, 600, k, dtype)
    out = orth.project_out(emulation.put(C), emulation.put(U))
    assert close(emulation.get(out), reference(C, U, -1.0, 1.0, "left"), dtype, 40)


def test_sums_beyond_float16(gpu, rng):
    """A constant basis of 4096 rows: VᵀC is 64 times as large as C, which float16 cannot hold."""
    for size in (200.0, 2000.0, 60000.0):
        C = (size * (1 + 0.01 * rng.standard_normal((4096, 5)))).clip(-65000, 65000).astype(np.float16)
        U = np.full((4096, 1), 1 / 64, np.float16)
        out = gpu.get(orth.project(gpu.put(C), gpu.put(U)))
        assert close(out, reference(C, U, 1.0, 0.0, "left"), np.dtype(np.float16), 2)


@pytest.mark.parametrize("dtype", [np.dtype(np.float32)], ids=["f32"])
def test_wide_bases_of_layouts_that_cublas_does_not_take(gpu, rng, dtype):
    C, V = gpu.put(rng.standard_normal((300, 8)).astype(dtype)), gpu.put(basis(rng, 300, 260, dtype))
    room = gpu.put(np.zeros((600, 16), dtype))
    for name, args in (("C", (C[::-1], V, None)), ("out", (C, V, room[::2, ::2])), ("V", (C, V[:, ::-1], None))):
        with pytest.raises(ValueError, match=f"{name} has neither rows nor columns that are contiguous"):
            orth.project_out(args[0], args[1], out=args[2])
    assert (gpu.get(room) == 0).all()


def test_without_clusters(emulation, rng):
    emulation.control.hardware(8, 166912)
    C, U = rng.standard_normal((5000, 24)).astype(np.float32), basis(rng, 5000, 6, np.float32)
    out = emulation.twice(lambda: orth.project_out(emulation.put(C), emulation.put(U)))
    assert close(emulation.get(out), reference(C, U, -1.0, 1.0, "left"), np.dtype(np.float32), 2.0)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_small_clusters(emulation, rng, width):
    """As on a slice of a device, where no eight blocks can be placed together."""
    emulation.control.cluster(width)
    C, U = rng.standard_normal((5000, 24)).astype(np.float32), basis(rng, 5000, 6, np.float32)
    out = emulation.twice(lambda: orth.project_out(emulation.put(C), emulation.put(U)))
    assert close(emulation.get(out), reference(C, U, -1.0, 1.0, "left"), np.dtype(np.float32), 2.0)


def test_a_list_of_what_does_not_go_together(emulation, rng):
    """Too tall for a cluster, too wide for the kernel, and the tallest of some with the widest of others."""
    emulation.control.cluster(2)
    shapes = [(64, 32, 4), (9000, 10, 3), (300, 20, 290), (400, 20, 250), (4000, 7, 8)]
    C = [rng.standard_normal((m, n)).astype(np.float32) for m, n, _ in shapes]
    U = [basis(rng, m, k, np.float32) for m, _, k in shapes]
    c, u = [emulation.put(x) for x in C], [emulation.put(x) for x in U]
    for order in (range(5), range(4, -1, -1)):
        got = orth.project_out([c[i] for i in order], [u[i] for i in order])
        for i, x in zip(order, got, strict=True):
            assert close(emulation.get(x), reference(C[i], U[i], -1.0, 1.0, "left"), np.dtype(np.float32), 24)
    bad = [*c[:2], emulation.put(np.repeat(np.repeat(C[2], 2, 0), 2, 1))[::2, ::2]]
    with pytest.raises(ValueError, match="neither rows nor columns"):
        orth.project_out(bad, u[:3], out=bad)
    np.testing.assert_array_equal(emulation.get(c[0]), C[0])


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float64)], ids=["bf16", "f64"])
def test_stacks_and_broadcasting(gpu, rng, dtype):
    C = rng.standard_normal((3, 2, 24, 40)).astype(dtype)
    U = np.stack([basis(rng, 24, 4, dtype) for _ in range(2)])
    out = gpu.twice(lambda: orth.project_out(gpu.put(C), gpu.put(U)))
    assert close(gpu.get(out), reference(C, U, -1.0, 1.0, "left"), dtype)
    # One matrix, several bases; a view with its axes exchanged.
    out = orth.project(gpu.put(C[0, 0]), gpu.put(U))
    assert close(gpu.get(out), reference(C[0, 0], U, 1.0, 0.0, "left"), dtype)
    swapped = (
        gpu.xp.ndarray(np.swapaxes(gpu.put(C)._host, 0, 1)) if gpu.control is not None else gpu.put(C).swapaxes(0, 1)
    )
    out = orth.project_out(swapped, gpu.put(U[:, None]))
    assert close(gpu.get(out), reference(np.swapaxes(C, 0, 1), U[:, None], -1.0, 1.0, "left"), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_swap(gpu, rng, dtype):
    base, source = rng.standard_normal((2, 50, 48)).astype(dtype)
    R = basis(rng, 48, 6, dtype)
    out = gpu.twice(lambda: orth.swap(gpu.put(base), gpu.put(source), gpu.put(R)))
    assert close(gpu.get(out), reference(base, R, 1.0, 1.0, "right", source), dtype)


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float32)], ids=["bf16", "f32"])
def test_both_sides(gpu, rng, dtype):
    C = rng.standard_normal((40, 56)).astype(dtype)
    left, right = basis(rng, 40, 4, dtype), basis(rng, 56, 7, dtype)
    out = orth.project_out(gpu.put(C), (gpu.put(left), gpu.put(right)), side="both")
    want = reference(reference(C, left, -1.0, 1.0, "left"), right, -1.0, 1.0, "right")
    assert close(gpu.get(out), want, dtype)


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float32)], ids=["bf16", "f32"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_list_is_one_launch(gpu, rng, dtype, side):
    shapes = [(64, 32, 4), (300, 20, 8), (17, 90, 3), (33, 33, 16), (0, 5, 1)]
    C = [rng.standard_normal((m, n)).astype(dtype) for m, n, _ in shapes]
    U = [basis(rng, m if side == "left" else n, min(k, m if side == "left" else n), dtype) for (m, n, k) in shapes]
    c, u = [gpu.put(x) for x in C], [gpu.put(x) for x in U]
    if gpu.control is not None:
        before = gpu.control.launches()
    out = orth.project_out(c, u, side=side, strength=0.5)
    if gpu.control is not None:
        assert gpu.control.launches() == before + 1
    for a, b, got in zip(C, U, out, strict=True):
        assert close(gpu.get(got), reference(a, b, -0.5, 1.0, side), dtype)


@given(
    m=st.integers(0, 70),
    n=st.integers(0, 70),
    k=st.integers(0, 40),
    dtype=st.sampled_from(DTYPES),
    side=st.sampled_from(["left", "right"]),
    alpha=st.sampled_from([0.0, 1.0, 0.3]),
)
def test_any_shape(emulated, m, n, k, dtype, side, alpha):
    import sys

    import subspan._lib.device as placing

    sys.path.insert(0, __file__.rpartition("/")[0])
    import fake_cupy

    before = sys.modules.get("cupy"), placing._module
    sys.modules["cupy"], placing._module = fake_cupy, emulated
    try:
        rng = np.random.default_rng(m * 10007 + n * 101 + k)
        C, V = rng.standard_normal((m, n)).astype(dtype), rng.standard_normal((m if side == "left" else n, k))
        V = (V / max(1.0, np.sqrt(V.shape[0]))).astype(dtype)
        out = orth.apply_core(fake_cupy.asarray(C), fake_cupy.asarray(V), -0.5, alpha=alpha, side=side)
        assert out.shape == C.shape
        assert close(out.get(), reference(C, V, -0.5, alpha, side), dtype, 16.0)
    finally:
        placing._module = before[1]
        if before[0] is None:
            del sys.modules["cupy"]
        else:
            sys.modules["cupy"] = before[0]


# -- Householder -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=IDS[2:])
@pytest.mark.parametrize(
    ("m", "n", "batch"),
    [
        *[(64, 16, (6,)), (16, 16, (2, 2)), (5, 9, (3,)), (200, 30, (1,)), (1, 1, ()), (9, 1, (2,)), (130, 70, ())],
        *[(300, 140, (2,)), (131, 300, ()), (900, 70, (1, 1)), (270, 265, ())],  # no block holds these
    ],
)
def test_qr(gpu, rng, dtype, m, n, batch):
    """LAPACK's residuals, and its signs."""
    A = rng.standard_normal((*batch, m, n)).astype(dtype)
    if m != 64 and m > 4 and n > 1:
        A[..., 1] = A[..., 0]  # dependent columns
    k, e = min(m, n), eps(dtype)
    V, T, R = gpu.twice(lambda: (lambda q, r: (q.V, q._T, r))(*orth.householder_qr(gpu.put(A))))
    Q = orth.HouseholderQ(V, gpu.xp.ascontiguousarray(gpu.xp.einsum("...ii->...i", T)), T)
    r = wide(gpu.get(R))
    full = wide(gpu.get(Q.to_array(full=True)))
    assert np.abs(np.tril(r[..., :, :k], -1)).max(initial=0.0) == 0
    a = wide(A)
    norm = lambda x: np.linalg.norm(x, 1, axis=(-2, -1))  # noqa: E731
    assert (norm(a - full[..., :k] @ r) <= 30 * m * e * norm(a)).all()
    assert (norm(np.eye(m) - np.swapaxes(full, -1, -2) @ full) <= 30 * m * e).all()
    np.testing.assert_allclose(wide(gpu.get(Q.to_array())), full[..., :k], atol=10 * m * e)
    if m == 64:
        np.testing.assert_allclose(r, np.linalg.qr(a)[1], atol=200 * e * np.abs(a).max())
    C = rng.standard_normal((*batch, m, 7)).astype(dtype)
    for transpose in (False, True):
        q = np.swapaxes(full, -1, -2) if transpose else full
        assert close(gpu.get(Q.apply(gpu.put(C), transpose=transpose)), q @ wide(C), dtype, 30)
        D = np.ascontiguousarray(np.swapaxes(C, -1, -2))
        assert close(gpu.get(Q.apply(gpu.put(D), side="right", transpose=transpose)), wide(D) @ q, dtype, 30)


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=IDS[2:])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(("m", "k"), [(40, 5), (70, 64), (33, 33), (8, 1), (6, 12)])
def test_given_reflections(gpu, rng, dtype, given, m, k):
    V = rng.standard_normal((3, m, k)).astype(dtype)
    V[0, :, k // 2] = 0  # the identity
    tau = (rng.random((3, k)) * 2 / (wide(V) ** 2).sum(-2).clip(1)).astype(dtype) if given else None
    t = None if tau is None else gpu.put(tau)
    want_tau = None if tau is None else wide(tau)
    C = rng.standard_normal((3, m, 9)).astype(dtype)
    for side in ("left", "right"):
        for transpose in (False, True):
            X = C if side == "left" else np.ascontiguousarray(np.swapaxes(C, -1, -2))
            got = gpu.twice(lambda: orth.householder_apply(gpu.put(V), gpu.put(X), t, side=side, transpose=transpose))  # noqa: B023
            want = orth.householder_apply(wide(V), wide(X), want_tau, side=side, transpose=transpose)
            assert close(gpu.get(got), want, dtype, 100)
    q = orth.householder_product(gpu.put(V), t)
    assert close(gpu.get(q), orth.householder_product(wide(V), want_tau), dtype, 100)


def test_large_qr_needs_its_libraries(emulation, rng):
    A = emulation.put(rng.standard_normal((400, 200)).astype(np.float32))
    emulation.control.without_solver()
    with pytest.raises(ImportError, match="cuSOLVER was not found"):
        orth.householder_qr(A)
    orth.householder_qr(A[:, :20])
    emulation.control.hardware(8, 101376)
    with pytest.raises(ImportError, match="cuSOLVER was not found"):
        orth.householder_qr(emulation.put(np.ones((112, 112), np.float32)))  # with T it does not fit
    emulation.control.hardware(9, 232448)
    with pytest.raises(ImportError, match="cuSOLVER was not found"):
        orth.householder_qr(emulation.put(np.ones((3000, 30))))  # few reflections, many rows


def test_large_qr_of_any_strides(gpu, rng):
    A = rng.standard_normal((2, 150, 400))
    x = gpu.put(A).swapaxes(-1, -2)[:, ::2]
    Q, R = orth.householder_qr(x)
    want = A.swapaxes(-1, -2)[:, ::2]
    np.testing.assert_allclose(wide(gpu.get(R)), np.linalg.qr(want)[1], atol=1e-12)
    C = rng.standard_normal((2, 200, 3))
    there = Q.apply(Q.apply(gpu.put(C)), transpose=True)
    np.testing.assert_allclose(wide(gpu.get(there)), C, atol=1e-12)
    assert orth.householder_qr(gpu.put(np.zeros((0, 200, 190))))[1].shape == (0, 190, 190)
    Q, R = orth.householder_qr(gpu.put(np.full((200, 150), np.nan)))
    assert np.isnan(wide(gpu.get(R))[np.triu_indices(150)]).all()


def test_reflections_that_are_refused(gpu, rng):
    A = rng.standard_normal((400, 200)).astype(np.float32)
    with pytest.raises(TypeError, match="A must be float32 or float64, got float16"):
        orth.householder_qr(gpu.put(A.astype(np.float16)))
    with pytest.raises(ValueError, match="tau must have one entry for each column of V"):
        orth.householder_apply(gpu.put(A[:, :3]), gpu.put(A), gpu.put(np.ones(2, np.float32)))


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_arguments_that_do_not_fit(gpu, rng):
    C, U = gpu.put(rng.standard_normal((8, 6)).astype(np.float32)), gpu.put(basis(rng, 8, 2, np.float32))
    with pytest.raises(ValueError, match="U must have 6 rows"):
        orth.project_out(C, U, side="right")
    with pytest.raises(TypeError, match=r"U must be float32 as C is, got float64"):
        orth.project_out(C, gpu.put(basis(rng, 8, 2, np.float64)))
    with pytest.raises(TypeError, match="C must be float16"):
        orth.apply_core(gpu.put(np.ones((8, 6), np.int32)), U, 1.0)
    with pytest.raises(ValueError, match="M must be a number, or have shape"):
        orth.apply_core(C, U, gpu.put(np.eye(3, dtype=np.float32)))
    both = gpu.put(rng.standard_normal((8, 8)).astype(np.float32))
    with pytest.raises(ValueError, match="out overlaps V"):
        orth.apply_core(both, both[:, :2], 1.0, out=both)
    with pytest.raises(ValueError, match=r"out must have shape \(8, 6\), got \(6, 8\)"):
        orth.project_out(C, U, out=gpu.put(np.zeros((6, 8), np.float32)))
    with pytest.raises(TypeError, match="out must be float32, got float64"):
        orth.project_out(C, U, out=gpu.put(np.zeros((8, 6))))
    with pytest.raises(ValueError, match="lists of one length"):
        orth.project_out([C], [U, U])


def test_a_host_array_among_device_arrays(gpu, rng):
    C, U = rng.standard_normal((8, 6)).astype(np.float32), basis(rng, 8, 2, np.float32)
    with pytest.raises(TypeError, match="U is on the CPU and C on CUDA device 0; move it first"):
        orth.project_out(gpu.put(C), U)
    with pytest.raises(TypeError, match="C is on the CPU and U on CUDA device 0"):
        orth.project_out(C, gpu.put(U))
    with pytest.raises(TypeError, match="out is on the CPU"):
        orth.project_out(gpu.put(C), gpu.put(U), out=C)


def test_arrays_on_two_devices(emulation, rng):
    emulation.control.devices(2, 0)
    C, U = rng.standard_normal((8, 6)).astype(np.float32), basis(rng, 8, 2, np.float32)
    with pytest.raises(ValueError, match="U is on CUDA device 1 and the call on device 0"):
        orth.project_out(emulation.put(C), emulation.put(U, 1))
    # All on the second one, while the first is current: the call changes to it and back.
    out = orth.project_out(emulation.put(C, 1), emulation.put(U, 1))
    assert out.device.id == 1
    assert close(out.get(), reference(C, U, -1.0, 1.0, "left"), np.dtype(np.float32))


def test_a_device_that_is_not_current(emulation, rng):
    """Results and work are on the arrays' device, and the current one stays what it is."""
    emulation.control.devices(2, 0)
    f32 = np.float32
    put = lambda x: emulation.xp.asarray(np.asarray(x, f32), 1)  # noqa: E731
    A, C, z = put(rng.standard_normal((20, 4))), put(rng.standard_normal((20, 5))), put(rng.standard_normal((2, 9, 6)))
    Q, R = orth.householder_qr(A)
    points, tau = Q.to_array(), put(np.ones(4))
    stack = put(np.stack([points.get()] * 3))
    state = plucker.MixState([1, 3], 6)
    projector = orth.GradientProjector(2)
    results = [
        *(R, points, Q.apply(C), Q.apply(C, transpose=True)),
        *(orth.householder_product(A, tau), *orth.householder_product_backward(points, A, tau)),
        orth.project(C, A, orthonormal=False),
        orth.project_out(C, orth.quantize_int4(points)),
        *orth.project_out([C, A], [points, points]),
        projector.down(C),
        projector.up(projector.down(C)),
        *svd.truncated_svd(C, 2),
        *(grassmann.log(points, points), grassmann.exp(points, A), grassmann.transport(points, A, A)),
        *(
            grassmann.mean(stack),
            grassmann.distance(points, points),
            *grassmann.principal_angles(points, points, vectors=True),
        ),
        grassmann.adam_step(stack, put(stack.get()), put(0 * stack.get()), put(np.zeros(3)), step=1, lr=0.1),
        *(plucker.mix(z, [1, 2]), plucker.mix_backward(put(np.ones((2, 9, 15))), z, [1, 2])),
        *plucker.mix_project_backward(put(np.ones((2, 9, 7))), z, put(np.ones((7, 15))), put(np.ones(7)), [1, 2]),
        *(state.prefill(z), state.step(put(rng.standard_normal((2, 6)))))[1:],
    ]
    assert all(x.device.id == 1 for x in results)
    assert emulation.xp.cuda.current == 0


def test_errors_of_the_device(emulation, rng):
    import subspan

    C, U = emulation.put(rng.standard_normal((8, 6)).astype(np.float32)), emulation.put(basis(rng, 8, 2, np.float32))
    before = C.get()
    emulation.control.leave_error(700)
    with pytest.raises(subspan.CudaError, match=r"earlier CUDA code of this process has left.*illegal memory access"):
        orth.project_out(C, U, out=C)
    np.testing.assert_array_equal(C.get(), before)
    assert emulation.control.error() == 0  # cleared: the next call runs
    orth.project_out(C, U)
    emulation.control.fail_next_launch(2)
    with pytest.raises(subspan.CudaError, match=r"launching apply_core: CUDA error 2, out of memory"):
        orth.project_out(C, U, out=C)
    np.testing.assert_array_equal(C.get(), before)
    emulation.control.hardware(7, 99000)
    with pytest.raises(subspan.CudaError, match=r"compute capability 7.x; the kernels need 8.0"):
        orth.project_out(C, U, out=C)
    emulation.control.reset()
    emulation.control.devices(2, 0)
    emulation.control.stream_device(1)
    emulation.xp.cuda.stream = 4711
    with pytest.raises(ValueError, match="current stream belongs to device 1, and the arrays are on device 0"):
        orth.project_out(C, U, out=C)
    np.testing.assert_array_equal(C.get(), before)


def test_workspace_that_cannot_be_had(emulation, rng, monkeypatch):
    rows = 40000
    C, U = rng.standard_normal((rows, 8)).astype(np.float32), basis(rng, rows, 3, np.float32)
    c, u = emulation.put(C), emulation.put(U)
    empty = emulation.xp.empty

    def none_left(shape, dtype=np.float64):
        if np.dtype(dtype) == np.uint8:
            raise MemoryError("out of device memory")
        return empty(shape, dtype)

    monkeypatch.setattr(emulation.xp, "empty", none_left)
    with pytest.raises(MemoryError, match="out of device memory"):
        orth.project_out(c, u, out=c)
    np.testing.assert_array_equal(c.get(), C)


def test_the_short_way_says_what_the_long_one_says(gpu, rng):
    """In place nothing is looked at twice; what is wrong is still said in the words of the caller."""
    C, U = rng.standard_normal((8, 6)).astype(np.float32), basis(rng, 8, 2, np.float32)
    c, u = gpu.put(C), gpu.put(U)
    for side in ("left", "right"):
        v = u if side == "left" else gpu.put(basis(rng, 6, 2, np.float32))
        out = orth.project_out(c, v, side=side, strength=0.5, out=c)
        assert out is c
    with pytest.raises(ValueError, match="U must have 6 rows"):
        orth.project_out(c, u, side="right", out=c)
    with pytest.raises(ValueError, match="side must be 'left', 'right' or 'both'"):
        orth.project_out(c, u, side="up", out=c)
    with pytest.raises(TypeError, match="U must be float32 as C is, got float64"):
        orth.project_out(c, gpu.put(wide(U)), out=c)
    with pytest.raises(TypeError, match="U is on the CPU and C on CUDA device 0"):
        orth.project_out(c, U, out=c)
    with pytest.raises(ValueError, match="strength must be finite"):
        orth.project_out(c, u, strength=float("nan"), out=c)


def test_a_build_without_kernels_says_how_to_get_them(monkeypatch, rng):
    import sys

    import subspan
    import subspan._lib.device as placing

    sys.path.insert(0, __file__.rpartition("/")[0])
    import fake_cupy

    monkeypatch.setitem(sys.modules, "cupy", fake_cupy)
    monkeypatch.setattr(placing, "_module", None)
    monkeypatch.setitem(sys.modules, "subspan._cuda", None)
    C, U = fake_cupy.asarray(np.ones((8, 6))), fake_cupy.asarray(np.eye(8)[:, :2])
    with pytest.raises(subspan.CudaError, match=r"could not be loaded|no CUDA kernels.*cuda13.*SUBSPAN_CUDA=ON"):
        orth.project_out(C, U)
