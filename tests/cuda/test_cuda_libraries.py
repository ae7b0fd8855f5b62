"""PyTorch and JAX arrays on a real GPU, and what only a real one can show."""

from __future__ import annotations

import os

import numpy as np
import pytest

from subspan import grassmann, orth, plucker
from subspan.svd import StreamingSVD, truncated_svd

pytestmark = pytest.mark.skipif(
    os.environ.get("SUBSPAN_TEST_GPU", "") != "1", reason="needs a GPU (SUBSPAN_TEST_GPU=1)"
)


@pytest.fixture
def torch():
    module = pytest.importorskip("torch")
    if not module.cuda.is_available():
        pytest.skip("PyTorch sees no CUDA device")
    return module


def test_tensors_in_and_out(torch):
    C = torch.randn(128, 96, device="cuda")
    U = torch.linalg.qr(torch.randn(128, 8, device="cuda"))[0]
    out = orth.project_out(C, U)
    assert isinstance(out, torch.Tensor)
    assert out.device == C.device
    torch.testing.assert_close(out, C - U @ (U.T @ C), rtol=1e-4, atol=1e-5)
    before = C._version
    orth.project_out(C, U, out=C)
    assert C._version > before


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_sanitizer_small_set(torch, dtype):
    kind = getattr(torch, dtype)
    C = torch.randn(70, 45, device="cuda").to(kind)
    U = torch.linalg.qr(torch.randn(70, 5, device="cuda"))[0].to(kind)
    got = orth.project_out(C, U).double().cpu()
    exact = C.double() - U.double() @ (U.double().T @ C.double())
    torch.testing.assert_close(got, exact.cpu(), rtol=0.02, atol=0.02)
    z = torch.randn(2, 40, 8, device="cuda").to(kind)
    W, b = (torch.randn(24, 28, device="cuda") / 5).to(kind), torch.randn(24, device="cuda").to(kind)
    out = plucker.mix_project(z, W, b, [1, 2, 4])
    want = plucker.mix_project(z.double().cpu(), W.double().cpu(), b.double().cpu(), [1, 2, 4])
    torch.testing.assert_close(out.double().cpu(), want, rtol=0.02, atol=0.02)
    got = plucker.mix_project_backward(torch.ones_like(out), z, W, b, [1, 2, 4])
    want = plucker.mix_project_backward(
        torch.ones_like(want), z.double().cpu(), W.double().cpu(), b.double().cpu(), [1, 2, 4]
    )
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.double().cpu(), y, rtol=0.05, atol=0.05)


def test_sanitizer_clusters_and_cores(torch):
    C, U = torch.randn(4096, 33, device="cuda"), torch.eye(4096, 6, device="cuda")
    orth.project_out(C.bfloat16(), U.bfloat16())
    orth.project_out(torch.cat([C] * 5), torch.cat([U] + [0 * U] * 4))  # two passes
    A = torch.randn(3, 40, 12, device="cuda")
    Q, R = orth.householder_qr(A)
    torch.testing.assert_close(Q.to_array() @ R, A, rtol=1e-4, atol=1e-4)
    points = Q.to_array().contiguous()
    grassmann.sgd_step(points, A, torch.zeros_like(A), lr=0.01, momentum=0.9)
    svd = StreamingSVD(4, oversample=30)
    for _ in range(2):
        svd.update(torch.randn(20, 80, device="cuda"))
    assert bool(torch.isfinite(svd.components).all())


def test_sanitizer_adam_transport_means_and_lists(torch):
    U = torch.linalg.qr(torch.randn(5, 40, 6, device="cuda"))[0].contiguous()
    G, M, V = torch.randn_like(U), torch.zeros_like(U), torch.zeros(5, device="cuda")
    grassmann.adam_step(U, G, M, V, step=1, lr=0.01, transport="parallel")
    moved = grassmann.transport(U, grassmann.tangent(U, G), grassmann.tangent(U, M))
    assert bool(torch.isfinite(moved).all())
    near = grassmann.exp(U[:1].expand(5, 40, 6), 0.1 * grassmann.tangent(U[:1].expand(5, 40, 6).contiguous(), G))
    assert grassmann.mean(near, full_output=True).converged
    C = [torch.randn(60, 30, device="cuda"), torch.randn(40, 20, device="cuda")]
    orth.project_out(C, [torch.eye(60, 4, device="cuda"), torch.eye(40, 7, device="cuda")], out=C)
    z = torch.randn(2, 70, 8, device="cuda").bfloat16()
    plucker.mix_backward(torch.randn(2, 70, 28, device="cuda").bfloat16(), z, [1, 3])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_large_qr_by_cusolver(torch, dtype):
    A = torch.randn(2, 700, 300, device="cuda", dtype=getattr(torch, dtype))
    Q, R = orth.householder_qr(A)
    close = {"rtol": 0, "atol": 1e-3 if dtype == "float32" else 1e-11}
    torch.testing.assert_close(Q.to_array() @ R, A, **close)
    torch.testing.assert_close(R, torch.linalg.qr(A)[1], **close)
    torch.testing.assert_close(Q.apply(Q.apply(A), transpose=True), A, **close)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sanitizer_small_problems(torch, dtype):
    """Decompositions in a cluster and by blocks, reflections by products, angles and class scores."""
    kind = getattr(torch, dtype)
    A = torch.randn(90, 70, device="cuda", dtype=kind)
    for rank in (5, 60):
        U, S, Vh = truncated_svd(A, rank, power_iterations=6, rng=0)
        want = torch.linalg.svdvals(A)[:rank]
        torch.testing.assert_close(S, want, rtol=1e-3, atol=1e-3)
        eye = torch.eye(rank, device="cuda", dtype=kind)
        torch.testing.assert_close(U.mT @ U, eye, rtol=0, atol=1e-4)
        torch.testing.assert_close(Vh @ Vh.mT, eye, rtol=0, atol=1e-4)
    wide = torch.randn(400, 380, device="cuda", dtype=kind)
    values = truncated_svd(wide, 370, oversample=0, power_iterations=0, rng=0).S  # more than a cluster holds
    assert bool((values[:-1] >= values[1:]).all())
    V = torch.randn(3, 80, 70, device="cuda", dtype=kind)
    Q = orth.householder_product(V)
    torch.testing.assert_close(Q.mT @ Q, torch.eye(70, device="cuda", dtype=kind).expand(3, 70, 70), rtol=0, atol=1e-4)
    assert bool(torch.isfinite(orth.householder_product_backward(torch.ones_like(Q), V)).all())
    dV, dC = orth.householder_apply_backward(V, V, V)
    assert bool(torch.isfinite(dV).all() and torch.isfinite(dC).all())
    points = torch.linalg.qr(torch.randn(4, 50, 6, device="cuda", dtype=kind))[0].contiguous()
    there = points.roll(1, 0)
    H = grassmann.log(points, there)
    assert float(grassmann.distance(grassmann.exp(points, H), there).max()) < 1e-4
    x = torch.randn(9, 50, device="cuda", dtype=kind)
    scores = grassmann.logits(x, points)
    want = 25 * torch.einsum("bn,cnk->bck", torch.nn.functional.normalize(x), points).norm(dim=-1)
    torch.testing.assert_close(scores, want, rtol=1e-4, atol=1e-3)
    for g in grassmann.logits_backward(torch.ones_like(scores), x, points):
        assert bool(torch.isfinite(g).all())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_sanitizer_bases_of_any_kind(torch, dtype):
    kind = getattr(torch, dtype)
    G = (torch.randn(96, 6, device="cuda") @ torch.randn(6, 64, device="cuda") / 8).to(kind)
    for bits in (None, 4):
        p = orth.GradientProjector(6, bits=bits, rng=0)
        R = p.down(G)
        assert R.dtype == kind
        assert bool(torch.isfinite(p.up(R)).all())
        p.refresh(G)
        assert p.similarity[0] > 0.9
    U = torch.linalg.qr(torch.randn(96, 16, device="cuda"))[0].to(kind)
    packed = orth.quantize_int4(U)
    dense = packed.to_array().double()
    got = orth.project_out(G, packed).double()
    exact = G.double() - dense @ (torch.linalg.pinv(dense) @ G.double())
    torch.testing.assert_close(got, exact, rtol=0.03, atol=0.03)
    got = orth.project_out(G, 3 * U, orthonormal=False).double()
    u = U.double()
    torch.testing.assert_close(got, G.double() - u @ (torch.linalg.pinv(u) @ G.double()), rtol=0.03, atol=0.03)
    C, V = torch.randn(300, 12, device="cuda").to(kind), torch.eye(300, 270, device="cuda").to(kind)
    torch.testing.assert_close(orth.project(C, V)[:270], C[:270], rtol=0.02, atol=0.02)  # through cuBLAS


def test_the_current_stream_is_used(torch):
    stream = torch.cuda.Stream()
    C, U = torch.randn(64, 64, device="cuda"), torch.eye(64, 4, device="cuda")
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        C.mul_(2.0)  # still waiting when the call below is made
        out = orth.project_out(C, U)
    stream.synchronize()
    torch.testing.assert_close(out, C - U @ (U.T @ C))


def test_graph_capture(torch):
    z = torch.randn(4, 64, 16, device="cuda").bfloat16()
    W = torch.randn(64, 120, device="cuda").bfloat16()
    out = torch.empty(4, 64, 64, device="cuda", dtype=torch.bfloat16)
    plucker.mix_project(z, W, None, [1, 2, 4], out=out)  # loads the kernels, which a capture may not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plucker.mix_project(z, W, None, [1, 2, 4], out=out)
    z.copy_(torch.randn_like(z))
    graph.replay()
    torch.cuda.synchronize()
    want = plucker.mix_project(z, W, None, [1, 2, 4])
    assert bool((out == want).all())


def test_projections_and_steps_can_be_captured(torch):
    C, U = torch.randn(256, 64, device="cuda"), torch.eye(256, 4, device="cuda")
    points = torch.linalg.qr(torch.randn(5, 40, 3, device="cuda"))[0].contiguous()
    grad = torch.randn_like(points)

    def calls() -> None:
        orth.project_out(C, U, out=C)
        grassmann.sgd_step(points, grad, lr=0.1)

    calls()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    C.copy_(torch.randn_like(C))
    want = C - U @ (U.T @ C)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(C, want, rtol=1e-4, atol=1e-5)


def test_autograd_is_told(torch):
    C = torch.randn(8, 8, device="cuda", requires_grad=True)
    with pytest.raises(TypeError, match="requires grad"):
        orth.project_out(C, torch.eye(8, 2, device="cuda"))


def test_arrays_of_jax_and_cupy(torch):
    cupy = pytest.importorskip("cupy")
    jax = pytest.importorskip("jax")
    C = jax.device_put(np.random.default_rng(0).standard_normal((32, 16)).astype(np.float32), jax.devices("gpu")[0])
    U = cupy.asarray(np.eye(32, 4, dtype=np.float32))
    out = cupy.empty((32, 16), cupy.float32)
    orth.project_out(C, U, out=out)
    want = np.asarray(C).copy()
    want[:4] = 0
    np.testing.assert_allclose(out.get(), want, atol=1e-6)
    with pytest.raises(TypeError, match="results cannot be allocated by 'jax'"):
        orth.project_out(C, U)
