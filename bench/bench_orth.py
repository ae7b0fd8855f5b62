"""Householder reflections and projections against NumPy, LAPACK and PyTorch on the same inputs."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import lapack

from subspan import orth

torch = pytest.importorskip("torch")
N = 4096


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def gradient(rng, m=N, n=N):
    return rng.standard_normal((m, n), dtype=np.float32)


def basis(n, k):
    return orth.random_orthogonal(n, k, rng=1, dtype=np.float32)


# -- projections -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [8, 32])
def test_project_out(versus, rng, k):
    G, U = gradient(rng), basis(N, k)
    versus(
        f"project-out-f32-4096-k{k}",
        lambda: orth.project_out(G, U, out=G),
        lambda: G - U @ (U.T @ G),
        flops=4 * N * N * k,
        bytes=3 * G.nbytes,
    )


def test_project_out_against_a_copy(versus, rng):
    G, U = gradient(rng), basis(N, 8)
    versus("project-out-f32-4096-k8-copy", lambda: orth.project_out(G, U, out=G), G.copy, bytes=3 * G.nbytes)


def test_project_out_against_two_products(versus, rng):
    G, U = gradient(rng), basis(N, 128)
    W, out = np.empty((128, N), np.float32), np.empty_like(G)

    def peer():
        np.matmul(U.T, G, out=W)
        np.matmul(U, W, out=out)

    versus("project-out-f32-4096-k128", lambda: orth.project_out(G, U, out=G), peer, flops=4 * N * N * 128)


# -- Householder -------------------------------------------------------------------------------------------------------


def test_householder_apply(versus, rng):
    a, tau = torch.geqrf(torch.from_numpy(gradient(rng, N, 64)))
    V = torch.tril(a, -1) + torch.eye(N, 64)
    C = torch.from_numpy(gradient(rng, N, 256))
    v, c, t = V.numpy(), C.numpy(), tau.numpy()
    want = torch.ormqr(a, tau, C).numpy()
    np.testing.assert_allclose(orth.householder_apply(v, c, t), want, atol=1e-4)
    flops = 4 * N * 64 * 256 + N * 64 * 64
    versus(
        "householder-apply-f32-4096x64",
        lambda: orth.householder_apply(v, c, t),
        lambda: torch.ormqr(a, tau, C),
        flops=flops,
    )


def test_householder_apply_against_lapack(versus, rng):
    a, tau, _, _ = lapack.sgeqrf(gradient(rng, N, 64))
    v = np.ascontiguousarray(np.tril(a, -1) + np.eye(N, 64, dtype=np.float32))
    c = gradient(rng, N, 256)
    f = np.asfortranarray(c)
    flops = 4 * N * 64 * 256 + N * 64 * 64
    versus(
        "householder-apply-f32-4096x64-lapack",
        lambda: orth.householder_apply(v, c, tau),
        lambda: lapack.sormqr("L", "N", a, tau, f, 64 * 256),
        flops=flops,
    )


def product_pair(rng, m, k, package):
    V = gradient(rng, m, k)
    grad = gradient(rng, m, k)
    v = torch.from_numpy(np.tril(V, -1) + np.eye(m, k, dtype=np.float32))
    g = torch.from_numpy(grad)
    dense = v.numpy()
    v.requires_grad_()

    def ours():
        return orth.householder_product(dense), orth.householder_product_backward(grad, dense)

    def peer():
        v.grad = None
        if package is None:
            q = torch.linalg.householder_product(v, 2 / (v * v).sum(0))
        else:
            q = package.torch_householder_orgqr(v)
        q.backward(g)
        return q.detach(), v.grad

    return ours, peer, 12 * m * k * k


@pytest.mark.parametrize("package", ["torch", "package"])
def test_householder_product(versus, rng, package):
    module = pytest.importorskip("torch_householder") if package == "package" else None
    ours, peer, flops = product_pair(rng, 512, 512, module)
    (mine, mine_dv), (theirs, theirs_dv) = ours(), peer()
    np.testing.assert_allclose(mine, theirs.numpy(), atol=1e-4)
    if module is None:
        np.testing.assert_allclose(np.tril(mine_dv, -1), np.tril(theirs_dv.numpy(), -1), atol=2e-3)
    versus(f"householder-product-f32-512-{package}", ours, peer, flops=flops)


def test_householder_product_tall(versus, rng):
    module = pytest.importorskip("torch_householder")
    ours, peer, flops = product_pair(rng, N, 512, module)
    np.testing.assert_allclose(ours()[0], peer()[0].numpy(), atol=1e-4)
    versus("householder-product-f32-4096x512-package", ours, peer, flops=flops, repeats=2)


@pytest.mark.slow
def test_householder_product_tall_torch(versus, rng):
    ours, peer, flops = product_pair(rng, N, 512, None)
    versus("householder-product-f32-4096x512-torch", ours, peer, flops=flops, once=True)


def test_hra_layer(versus, rng):
    x, W, V = gradient(rng, 2048), gradient(rng), gradient(rng, N, 8)
    out = np.empty_like(x)
    versus(
        "hra-f32-2048x4096-r8",
        lambda: np.matmul(orth.householder_apply(V, x, side="right"), W, out=out),
        lambda: np.matmul(x, W, out=out),
        flops=2 * 2048 * N * N,
    )


def test_batched_qr(versus, rng):
    A = rng.standard_normal((1024, 64, 16), dtype=np.float32)
    a = torch.from_numpy(A)

    def ours():
        Q, R = orth.householder_qr(A)
        return Q.to_array(), R

    flops = 1024 * (4 * 64 * 16 * 16 - 4 * 16**3 / 3)
    versus("batched-qr-f32-1024x64x16", ours, lambda: torch.linalg.qr(a), flops=flops, bytes=5 * A.nbytes)


def test_orthonormalize(versus, rng):
    A = gradient(rng, N, 128)
    versus(
        "orthonormalize-f32-4096x128", lambda: orth.orthonormalize(A), lambda: np.linalg.qr(A), flops=3 * N * 128 * 128
    )


# -- low-rank gradients ------------------------------------------------------------------------------------------------


def drifting(rng, steps=3):
    """Gradients whose leading subspace turns slowly, over a floor of noise."""
    r = 256
    left, right = basis(N, r), orth.random_orthogonal(N, r, rng=2, dtype=np.float32)
    scale = (np.arange(1, r + 1) ** -0.7).astype(np.float32)
    out = []
    for _ in range(steps):
        left = orth.orthonormalize(left + 0.03 / np.sqrt(N) * gradient(rng, N, r))
        right = orth.orthonormalize(right + 0.03 / np.sqrt(N) * gradient(rng, N, r))
        out.append((left * scale) @ right.T + 1e-4 * gradient(rng))
    return out


def energy(G, P):
    return float(np.linalg.norm(G @ np.asarray(P)) ** 2)


def refreshed(rng):
    *before, G = drifting(rng)
    p = orth.GradientProjector(128, side="right", rng=0)
    for g in before:
        p.refresh(g)
    return G, p


def test_refresh(versus, rng):
    G, p = refreshed(rng)
    g = torch.from_numpy(G)
    last = p.basis
    p.refresh(G)
    best = float((np.linalg.svd(G.T @ G, compute_uv=False)[:128]).sum())
    peer = energy(G, torch.svd_lowrank(g, 128)[2].numpy())
    assert energy(G, p.basis) > 0.99 * max(best, peer)

    def ours():
        p.basis = last  # each measurement starts from the basis of the gradient before
        p.refresh(G)

    versus("refresh-f32-4096-r128-lowrank", ours, lambda: torch.svd_lowrank(g, 128), flops=4 * N * N * 128)


@pytest.mark.slow
def test_refresh_against_a_full_svd(versus, rng):
    G, p = refreshed(rng)
    g = torch.from_numpy(G)
    last = p.basis

    def ours():
        p.basis = last
        p.refresh(G)

    versus("refresh-f32-4096-r128-svd", ours, lambda: torch.linalg.svd(g), flops=4 * N * N * 128, once=True)


def test_int4_apply(versus, rng):
    G = gradient(rng)
    B = orth.quantize_int4(basis(N, 1024))
    codes = np.stack([B.codes & 15, B.codes >> 4], axis=1).reshape(
        -1, 256
    )  # one a byte, as the published code keeps them
    scale, zero = B.scale[:, None], B.zero[:, None]

    def peer():
        dense = (scale * (codes.astype(np.float32) - zero)).reshape(B.shape)
        return G @ dense

    np.testing.assert_allclose(B.apply(G, side="right"), peer(), atol=1e-3)
    assert B.nbytes * 7 < N * 1024 * 4
    versus("int4-apply-f32-4096x1024", lambda: B.apply(G, side="right"), peer, flops=2 * N * N * 1024)


def test_hadamard(versus, rng):
    x = gradient(rng)
    out = np.empty_like(x)
    versus("hadamard-f32-4096", lambda: orth.hadamard(x, out), lambda: np.copyto(out, x), bytes=2 * x.nbytes)
