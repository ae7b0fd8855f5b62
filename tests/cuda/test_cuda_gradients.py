"""Bases of any kind on a device: low-rank gradients, 4-bit codes, bases that are not orthonormal."""

from __future__ import annotations

import numpy as np
import pytest

from references import BF16, eps, wide
from subspan import orth

DTYPES = [np.dtype(np.float32), np.dtype(np.float64), BF16, np.dtype(np.float16)]
IDS = ["f32", "f64", "bf16", "f16"]
WIDE = DTYPES[:2]


def gradient(rng, m, n, dtype, rank=6, noise=1e-3):
    left, right = (np.linalg.qr(rng.standard_normal((k, rank)))[0] for k in (m, n))
    return ((left * 2.0 ** -np.arange(rank)) @ right.T + noise * rng.standard_normal((m, n))).astype(dtype)


# -- GradientProjector -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize(("m", "n"), [(50, 32), (32, 48), (24, 24)])
@pytest.mark.parametrize("side", ["auto", "left", "right"])
@pytest.mark.parametrize("bits", [None, 4])
def test_down_and_up(gpu, rng, dtype, m, n, side, bits):
    G = gradient(rng, m, n, dtype)
    p = orth.GradientProjector(6, side=side, bits=bits, scale=0.25, rng=0)
    R = p.down(gpu.put(G))
    right = (m >= n) if side == "auto" else side == "right"
    assert R.shape == ((m, 6) if right else (6, n))
    assert R.dtype == dtype
    P = wide((p.basis.to_array() if bits else p.basis).get())
    tol = 60 * eps(dtype)
    np.testing.assert_allclose(wide(R.get()), wide(G) @ P if right else P.T @ wide(G), atol=tol)
    up = wide(p.up(R).get())
    np.testing.assert_allclose(up, 0.25 * (wide(R.get()) @ P.T if right else P @ wide(R.get())), atol=tol)
    if bits is None:
        u, _, vt = np.linalg.svd(wide(G))
        want = vt[:6].T if right else u[:, :6]
        np.testing.assert_allclose(np.abs(P.T @ want), np.eye(6), atol=max(2e-3, 40 * eps(dtype)))
        assert np.abs(P.T @ P - np.eye(6)).max() <= 10 * eps(dtype) * np.sqrt(6)


def test_a_warm_refresh_follows_a_drifting_gradient(gpu, rng):
    p = orth.GradientProjector(8, side="right", rng=0)
    G = gradient(rng, 120, 90, np.float32, 12)
    for _ in range(4):
        p.refresh(gpu.put(G))
        best = (np.linalg.svd(wide(G), compute_uv=False)[:8] ** 2).sum()
        assert np.linalg.norm(wide(G) @ wide(p.basis.get())) ** 2 > 0.99 * best
        G = G + 0.02 * rng.standard_normal(G.shape).astype(np.float32) / 10
    assert p.refreshes == 4
    assert len(p.similarity) == 3
    assert min(p.similarity) > 0.9


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("shape", [(50, 40), (40, 50)])
def test_gradients_of_a_lower_rank_are_completed(gpu, rng, dtype, shape):
    full = gradient(rng, *shape, dtype)
    low = rng.standard_normal((shape[0], 3)) @ rng.standard_normal((3, shape[1]))
    gradients = [full, np.zeros(shape), low, full]
    projectors = [orth.GradientProjector(8, rng=i) for i in range(4)]
    for _ in range(2):  # cold and warm
        orth.GradientProjector.refresh_all(projectors, [gpu.put(G.astype(dtype)) for G in gradients])
        for p in projectors:
            basis = wide(gpu.get(p.basis))
            assert np.abs(basis.T @ basis - np.eye(8)).max() <= 8 * eps(dtype)
            assert abs(np.linalg.norm(wide(gpu.get(p._first))) - 1) <= 8 * eps(dtype)
        kept = wide(gpu.get(projectors[2].basis))
        rest = low - (kept @ (kept.T @ low) if kept.shape[0] == shape[0] else (low @ kept) @ kept.T)
        assert np.linalg.norm(rest) <= 40 * eps(dtype) * np.linalg.norm(low)


def test_many_refreshes_in_the_same_launches(emulation, rng):
    shapes = [(40, 30), (30, 40), (64, 30), (40, 30)]
    gradients = [gradient(rng, *shape, np.float32) for shape in shapes]
    one = [orth.GradientProjector(5, rng=i) for i in range(4)]
    all_ = [orth.GradientProjector(5, rng=i) for i in range(4)]
    for p, G in zip(one, gradients, strict=True):
        p.refresh(emulation.put(G))
    before = emulation.control.launches()
    one[0].refresh(emulation.put(gradients[0]))
    alone = emulation.control.launches() - before
    orth.GradientProjector.refresh_all(all_, [emulation.put(G) for G in gradients])
    before = emulation.control.launches()
    orth.GradientProjector.refresh_all(all_, [emulation.put(G) for G in gradients])
    assert emulation.control.launches() - before < 4 * alone
    one[1].refresh(emulation.put(gradients[1]))
    np.testing.assert_array_equal(one[1].basis.get(), all_[1].basis.get())
    bad = [emulation.put(G) for G in gradients]
    bad[2] = emulation.put(np.where(np.arange(30) == 3, np.nan, gradients[2]).astype(np.float32))
    kept = [p.basis.get() for p in all_]
    with pytest.raises(ValueError, match=r"gradients\[2\] holds NaN"):
        orth.GradientProjector.refresh_all(all_, bad)
    for p, basis in zip(all_, kept, strict=True):
        np.testing.assert_array_equal(p.basis.get(), basis)
        assert p.refreshes == 2
    with pytest.raises(ValueError, match="one twice"):
        orth.GradientProjector.refresh_all([one[0]] * 2, bad[:2])


def test_refresh_all_on_the_cpu(rng):
    gradients = [gradient(rng, 20, 16, np.float32) for _ in range(3)]
    one, all_ = ([orth.GradientProjector(4, rng=i) for i in range(3)] for _ in range(2))
    orth.GradientProjector.refresh_all(all_, gradients)
    for p, q, G in zip(one, all_, gradients, strict=True):
        np.testing.assert_array_equal(p.refresh(G).basis, q.basis)


def test_what_a_projector_refuses(gpu, rng):
    G = gradient(rng, 30, 20, np.float32)
    p = orth.GradientProjector(3, rng=0)
    R = p.down(gpu.put(G))
    with pytest.raises(TypeError, match="G is on the CPU and basis on CUDA device"):
        p.down(G)
    with pytest.raises(TypeError, match="R is on the CPU and basis on CUDA device"):
        p.up(R.get())
    with pytest.raises(TypeError, match="G must be float32 as before, got float64"):
        p.down(gpu.put(wide(G)))
    with pytest.raises(ValueError, match="out must have shape"):
        p.down(gpu.put(G), out=gpu.put(G))
    out = gpu.put(0 * R.get())
    assert p.down(gpu.put(G), out=out) is out
    np.testing.assert_array_equal(out.get(), R.get())
    on_host = orth.GradientProjector(3, rng=0).refresh(G)
    with pytest.raises(TypeError, match="basis is on the CPU and G on CUDA device"):
        on_host.down(gpu.put(G))


def test_whatever_is_wrong_with_out_is_found_before_a_refresh(gpu, rng):
    G = gpu.put(gradient(rng, 30, 20, np.float32))
    p = orth.GradientProjector(3, side="right", rng=0)
    with pytest.raises(ValueError, match="out overlaps G"):
        p.down(G, out=G[:, :3])
    with pytest.raises(ValueError, match="out must have rows or columns"):
        p.down(G, out=gpu.put(np.zeros((60, 6), np.float32))[::2, ::2])
    assert p.refreshes == 0
    room = gpu.put(np.zeros((60, 40), np.float32))
    room[::2, ::2] = G
    strided = p.down(room[::2, ::2])
    np.testing.assert_allclose(strided.get(), p.down(G).get(), atol=1e-5)


def test_large_gradients_of_16_bits(gpu):
    G = np.full((40, 40), 2000, np.float16)  # whose first value no float16 holds
    p = orth.GradientProjector(2, rng=0)
    R = p.down(gpu.put(G))
    np.testing.assert_allclose(wide(p.up(R).get()), wide(G), rtol=0.01)


# -- 4-bit codes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", WIDE, ids=IDS[:2])
@pytest.mark.parametrize(("n", "k", "group"), [(64, 16, 256), (33, 7, 16), (10, 3, 5), (1, 1, 256)])
def test_codes_are_those_of_the_cpu(gpu, rng, dtype, n, k, group):
    U = (rng.standard_normal((n, k)) / 8).astype(dtype)
    ours, theirs = orth.quantize_int4(gpu.put(U), group), orth.quantize_int4(U, group)
    for name in ("codes", "scale", "zero"):
        np.testing.assert_array_equal(getattr(ours, name).get(), getattr(theirs, name))
    np.testing.assert_array_equal(ours.to_array().get(), theirs.to_array())
    assert repr(ours) == repr(theirs)
    X = rng.standard_normal((2, n, 5)).astype(dtype)
    got = ours.apply(gpu.put(X), transpose=True).get()
    np.testing.assert_allclose(got, theirs.apply(X, transpose=True), atol=100 * eps(dtype))
    got = ours.apply(gpu.put(X.swapaxes(1, 2)[0]), side="right").get()
    np.testing.assert_allclose(got, theirs.apply(X.swapaxes(1, 2)[0], side="right"), atol=100 * eps(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize(("n", "k", "group"), [(80, 16, 64), (70, 9, 10), (96, 40, 256)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_projections_of_packed_bases(gpu, rng, dtype, n, k, group, side):
    U = np.linalg.qr(rng.standard_normal((n, k)))[0].astype(np.float64 if dtype == np.float64 else np.float32)
    C = rng.standard_normal((2, n, 37) if side == "left" else (2, 37, n)).astype(dtype)
    packed = orth.quantize_int4(gpu.put(U), group)
    dense = wide(packed.to_array().get())
    P = dense @ np.linalg.pinv(dense)
    kept = P @ wide(C) if side == "left" else wide(C) @ P
    tol = 40 * eps(dtype) * np.sqrt(k)
    np.testing.assert_allclose(wide(orth.project(gpu.put(C), packed, side=side).get()), kept, atol=tol)
    c = gpu.put(C)
    assert orth.project_out(c, packed, side=side, out=c) is c
    np.testing.assert_allclose(wide(c.get()), wide(C) - kept, atol=tol)
    out = orth.apply_core(gpu.put(C), packed, 0.5, side=side)
    V = dense @ dense.T
    np.testing.assert_allclose(
        wide(out.get()), wide(C) + 0.5 * (V @ wide(C) if side == "left" else wide(C) @ V), atol=tol
    )


def test_packed_bases_too_wide_for_shared_memory(gpu, rng):
    U = np.linalg.qr(rng.standard_normal((300, 270)))[0].astype(np.float32)
    C = rng.standard_normal((300, 6)).astype(np.float32)
    packed = orth.quantize_int4(gpu.put(U))
    V = wide(packed.to_array().get())
    out = orth.apply_core(gpu.put(C), packed, -1.0)
    np.testing.assert_allclose(wide(out.get()), wide(C) - V @ (V.T @ wide(C)), atol=1e-3)
    with pytest.raises(ValueError, match="leaves no basis orthonormal"):
        orth.project_out(gpu.put(C), packed, orthonormal=True)
    with pytest.raises(TypeError, match=r"U is on the CPU and C on CUDA device 0"):
        orth.project_out(gpu.put(C), orth.quantize_int4(U))
    with pytest.raises(TypeError, match="V must be float64 as C is, got float32"):
        orth.apply_core(gpu.put(wide(C)), packed, 1.0)


# -- bases that are not orthonormal ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_any_basis(gpu, rng, dtype, side):
    n, k = 60, 7
    V = (rng.standard_normal((2, n, k)) * 2.0 ** np.arange(k)).astype(dtype)
    C = rng.standard_normal((2, n, n)).astype(dtype)
    P = wide(V) @ np.linalg.pinv(wide(V))
    want = wide(C)
    want = want if side == "right" else want - P @ want
    want = want if side == "left" else want - want @ P
    basis = (gpu.put(V), gpu.put(V)) if side == "both" else gpu.put(V)
    got = orth.project_out(gpu.put(C), basis, side=side, orthonormal=False)
    tol = 60 * eps(dtype) if dtype in WIDE else 12 * eps(dtype)
    assert np.abs(wide(got.get()) - want).max() <= tol


@pytest.mark.parametrize("dtype", WIDE, ids=IDS[:2])
def test_bases_of_lower_rank(gpu, rng, dtype):
    V = (rng.standard_normal((40, 3)) @ rng.standard_normal((3, 6))).astype(dtype)
    C = rng.standard_normal((40, 9)).astype(dtype)
    q = np.linalg.qr(wide(V)[:, :3])[0]
    got = wide(orth.project(gpu.put(C), gpu.put(V), orthonormal=False).get())
    assert np.abs(got - q @ (q.T @ wide(C))).max() <= 1e3 * eps(dtype)
    zero = orth.project_out(gpu.put(C), gpu.put(0 * V), orthonormal=False)
    np.testing.assert_array_equal(zero.get(), C)
    parts = orth.project_out([gpu.put(C)] * 2, [gpu.put(V)] * 2, orthonormal=False)
    assert all(np.abs(wide(x.get()) - (wide(C) - got)).max() <= 1e3 * eps(dtype) for x in parts)


# -- what is refused leaves everything as it was -----------------------------------------------------------------------


def test_both_sides_or_none(gpu, rng):
    C = rng.standard_normal((12, 9)).astype(np.float32)
    U, W = (np.linalg.qr(rng.standard_normal((n, 2)))[0].astype(np.float32) for n in C.shape)
    wrong = {
        "rows": (ValueError, gpu.put(U)),
        "dtype": (TypeError, gpu.put(wide(W))),
        "place": (TypeError, W),
        "stack": (ValueError, gpu.put(np.stack([W, W]))),
    }
    for error, bad in wrong.values():
        c = gpu.put(C)
        with pytest.raises(error):
            orth.project_out(c, (gpu.put(U), bad), side="both", out=c)
        np.testing.assert_array_equal(c.get(), C)
    both = gpu.put(np.concatenate([C, C], axis=1)[:, :12])
    with pytest.raises(ValueError, match=r"out overlaps U\[1\]"):
        orth.project_out(both, (gpu.put(np.eye(12, 2, dtype=np.float32)), both[:, 3:5]), side="both", out=both)
    c = gpu.put(C)
    assert orth.project_out(c, (gpu.put(U), gpu.put(W)), side="both", out=c) is c
    left = wide(C) - wide(U) @ (wide(U).T @ wide(C))
    assert np.abs(wide(c.get()) - (left - left @ wide(W) @ wide(W).T)).max() < 1e-5


def test_lists_whose_entries_share_memory(gpu, rng):
    C = gpu.put(rng.standard_normal((12, 30)).astype(np.float32))
    U = gpu.put(np.linalg.qr(rng.standard_normal((12, 2)))[0].astype(np.float32))
    D = gpu.put(np.zeros((12, 30), np.float32))
    before = C.get()
    parts = [C[:, :10], C[:, 10:20], C[:, 20:]]
    with pytest.raises(ValueError, match=r"out\[1\] overlaps C\[0\]|out\[0\] overlaps C\[1\]"):
        orth.project_out(parts[:2], [U, U], out=[parts[1], parts[0]])
    with pytest.raises(ValueError, match=r"out\[\d\] overlaps out\[\d\]"):
        orth.project_out(parts[:2], [U, U], out=[D[:, :10], D[:, 9:19]])
    np.testing.assert_array_equal(C.get(), before)
    orth.project_out(parts, [U] * 3, out=parts)  # strips of one matrix
    u = wide(U.get())
    assert np.abs(wide(C.get()) - (wide(before) - u @ (u.T @ wide(before)))).max() < 1e-5


def test_lists_of_what_a_launch_cannot_hold(emulation, rng):
    emulation.control.hardware(8, 60000)
    low, tall = rng.standard_normal((16, 8)).astype(np.float32), rng.standard_normal((9000, 4)).astype(np.float32)
    C = [emulation.put(low), emulation.put(np.ascontiguousarray(tall.T)).T]
    U = [emulation.put(np.eye(len(x), 2, dtype=np.float32)) for x in (low, tall)]
    orth.project_out(C, U, out=C)
    for got, x in zip(C, (low, tall), strict=True):
        np.testing.assert_array_equal(got.get()[2:], x[2:])
        assert not got.get()[:2].any()
