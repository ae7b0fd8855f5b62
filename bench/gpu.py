"""Benchmarks on a CUDA device: each case against what a user would call otherwise, and against its floor.

Cold L2 (a buffer larger than it is written before every run), CUDA events, the median of the runs; the device's own
copy and matrix-product rates are measured in the same run, and floors are counted from them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from subspan import grassmann, orth, plucker
from subspan.svd import StreamingSVD

DEVICE = torch.device("cuda")
CASES: list[Any] = []


@dataclass
class Result:
    """One row of the table."""

    name: str
    peer: str
    ratio: float
    reach: float | None
    microseconds: float
    floor: float | None  # microseconds
    floor_reach: float | None


class Bench:
    """Times callables on the device."""

    def __init__(self) -> None:
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)
        self.results: list[Result] = []
        self.missing: list[str] = []  # peers that are not installed
        self.copy = self._copy_rate()
        self.gemm = self._gemm_rate()

    def time(self, f: Any, runs: int = 30) -> float:
        """Median microseconds of one call, L2 cold. One run alone is not warmed up: it takes seconds."""
        for _ in range(3 if runs > 1 else 0):
            f()
        torch.cuda.synchronize()
        begins = [torch.cuda.Event(enable_timing=True) for _ in range(runs)]
        ends = [torch.cuda.Event(enable_timing=True) for _ in range(runs)]
        for begin, end in zip(begins, ends, strict=True):
            # Written, then read, so that no dirty lines are left to be written back; then the device waits a
            # millisecond or so, in which the host queues all of f.
            self.flush.zero_()
            self.flush.max()
            torch.cuda._sleep(2_000_000)
            begin.record()
            f()
            end.record()
        torch.cuda.synchronize()
        return 1e3 * statistics.median(b.elapsed_time(e) for b, e in zip(begins, ends, strict=True))

    def _copy_rate(self) -> float:
        x = torch.randn(1 << 28, device=DEVICE)
        y = torch.empty_like(x)
        return 2 * x.nbytes / self.time(lambda: y.copy_(x), 10)  # bytes a microsecond

    def _gemm_rate(self) -> float:
        a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
        return 2 * 8192**3 / self.time(lambda: a @ b, 10)  # flops a microsecond

    def case(
        self, name: str, ours: Any, peers: dict[str, tuple[Any, float | None]], *, bytes_: float = 0, flops: float = 0,
        floor_reach: float | None = None, runs: int = 30, peer_runs: int = 10,
    ) -> None:  # fmt: skip
        """Our time against each peer's, with the reach that is wanted."""
        mine = self.time(ours, runs)
        floor = max(bytes_ / self.copy, flops / self.gemm) or None
        for peer, (f, reach) in peers.items():
            theirs = f if isinstance(f, float) else self.time(f, peer_runs)
            self.results.append(Result(name, peer, theirs / mine, reach, mine, floor, floor_reach))


def case(f: Any) -> Any:
    CASES.append(f)
    return f


@case
def project_out(bench: Bench) -> None:
    G = torch.randn(4096, 4096, device=DEVICE).bfloat16()
    U = torch.linalg.qr(torch.randn(4096, 32, device=DEVICE))[0].bfloat16()

    def addmm() -> None:
        torch.addmm(G, U, U.T @ G, alpha=-1, out=G)

    bench.case(
        "project_out 4096² bf16, k=32, in place",
        lambda: orth.project_out(G, U, out=G),
        {"torch.addmm": (addmm, 1.8)},
        bytes_=2 * G.nbytes,
        floor_reach=1.35,
    )
    many = [torch.randn(m, n, device=DEVICE).bfloat16() for m, n in [(1024, 1024), (1024, 2816), (2816, 1024)] * 16]
    bases = [torch.linalg.qr(torch.randn(x.shape[0], 16, device=DEVICE))[0].bfloat16() for x in many]

    def loop() -> None:
        for x, u in zip(many, bases, strict=True):
            torch.addmm(x, u, u.T @ x, alpha=-1, out=x)

    bench.case(
        "project_out of 48 matrices of three shapes, bf16, k=16",
        lambda: orth.project_out(many, bases, out=many),
        {"torch.addmm in a loop": (loop, None)},
        bytes_=2 * sum(x.nbytes for x in many),
    )


OFFSETS = [1, 2, 4, 8, 12, 16]
R, D = 32, 256
PAIRS = list(itertools.combinations(range(R), 2))


def published(z: torch.Tensor, W: torch.Tensor, b: torch.Tensor, first: Any, second: Any) -> torch.Tensor:
    """A wedge, a length and a projection for every offset; their mean over those that apply."""
    length = z.shape[1]
    total = torch.zeros(*z.shape[:2], W.shape[0], dtype=z.dtype, device=z.device)
    count = torch.zeros(length, dtype=z.dtype, device=z.device)
    for d in OFFSETS:
        a, w = z[:, d:], z[:, :-d]
        p = a[..., first] * w[..., second] - a[..., second] * w[..., first]
        p = p / p.norm(dim=-1, keepdim=True).clamp(min=1e-8)
        total = total + torch.nn.functional.pad(torch.nn.functional.linear(p, W, b), (0, 0, d, 0))
        count[d:] += 1
    return total / count.clamp(min=1)[None, :, None]


@case
def mixing(bench: Bench) -> None:
    z = torch.randn(64, 512, R, device=DEVICE).bfloat16()
    W = (torch.randn(D, len(PAIRS), device=DEVICE) / 22).bfloat16()
    b = torch.randn(D, device=DEVICE).bfloat16()
    first, second = (torch.tensor([p[i] for p in PAIRS], device=DEVICE) for i in (0, 1))
    compiled = torch.compile(published)
    out = torch.empty(64, 512, D, dtype=torch.bfloat16, device=DEVICE)
    tokens, flops = 64 * 512, 2 * 64 * 512 * D * len(PAIRS)
    bytes_ = z.nbytes + out.nbytes + W.nbytes
    with torch.no_grad():
        bench.case(
            "mix_project forward, 64 × 512 tokens, bf16",
            lambda: plucker.mix_project(z, W, b, OFFSETS, out=out),
            {
                "published form, eager": (lambda: published(z, W, b, first, second), 60),
                "published form, compiled": (lambda: compiled(z, W, b, first, second), 12),
            },
            bytes_=bytes_,
            flops=flops,
            floor_reach=2.5,
        )
    grad = torch.randn_like(out)

    def ours() -> None:
        plucker.mix_project(z, W, b, OFFSETS, out=out)
        plucker.mix_project_backward(grad, z, W, b, OFFSETS)

    def theirs(f: Any) -> Any:
        leaves = [x.detach().clone().requires_grad_() for x in (z, W, b)]

        def run() -> None:
            f(*leaves, first, second).backward(grad)
            for x in leaves:
                x.grad = None

        return run

    bench.case(
        "mix_project forward and backward, 64 × 512 tokens, bf16",
        ours,
        {"published form, eager": (theirs(published), 60), "published form, compiled": (theirs(compiled), 12)},
        bytes_=2 * bytes_ + tokens * R * 2,
        flops=3 * flops,
        floor_reach=3.0,
    )


@case
def riemannian_steps(bench: Bench) -> None:
    classes, n, k = 1000, 2048, 8
    U = torch.linalg.qr(torch.randn(classes, n, k, device=DEVICE))[0].contiguous()
    G, B = 0.01 * torch.randn_like(U), torch.zeros_like(U)
    V, C = U.clone(), torch.zeros_like(U)
    # One gradient over and over would make momentum and steps grow; its sign changes.
    rates, other_rates = itertools.cycle((0.01, -0.01)), itertools.cycle((0.01, -0.01))

    def published() -> None:
        """Grassmann Class Representation: momentum, projection, geodesic by an SVD, QR."""
        C.mul_(0.9).add_(G)
        D = C - V @ (V.mT @ C)
        P, S, Vh = torch.linalg.svd(D, full_matrices=False, driver="gesvda")
        S = -next(other_rates) * S
        W = (V @ Vh.mT) * S.cos()[:, None, :] @ Vh + P * S.sin()[:, None, :] @ Vh
        V.copy_(torch.linalg.qr(W)[0])

    bench.case(
        "grassmann.sgd_step, 1000 × (2048 × 8), f32",
        lambda: grassmann.sgd_step(U, G, B, lr=next(rates), momentum=0.9),
        {"SVD by gesvda and looped QR": (published, 100)},
        bytes_=5 * U.nbytes,
        floor_reach=1.7,
    )


@case
def riemannian_adam(bench: Bench) -> None:
    U = torch.linalg.qr(torch.randn(1000, 2048, 8, device=DEVICE))[0].contiguous()
    G, M, V = 0.01 * torch.randn_like(U), torch.zeros_like(U), torch.zeros(1000, device=DEVICE)
    W, m, v = U.clone(), torch.zeros_like(U), torch.zeros(1000, 1, 1, device=DEVICE)
    steps = itertools.count(1)

    def torch_form() -> None:
        """Adam of the Riemannian gradient, back to the manifold by a QR."""
        g = G - W @ (W.mT @ G)
        m.mul_(0.9).add_(g, alpha=0.1)
        v.mul_(0.999).add_((g * g).sum((-2, -1), keepdim=True), alpha=0.001)
        step = m - W @ (W.mT @ m)
        W.copy_(torch.linalg.qr(W - 0.001 * step / (v.sqrt() + 1e-8))[0])

    bench.case(
        "grassmann.adam_step, 1000 × (2048 × 8), f32",
        lambda: grassmann.adam_step(U, G, M, V, step=next(steps), lr=0.001),
        {"batched products and looped QR": (torch_form, None)},
        bytes_=7 * U.nbytes,
    )


@case
def streaming(bench: Bench) -> None:
    import cupy

    n, k, b = 4096, 128, 128
    # Rows that come again have nothing new, and their cores are easy.
    blocks = [torch.randn(b, n, device=DEVICE) for _ in range(16)]
    fresh = itertools.cycle(blocks)
    svd = StreamingSVD(k, oversample=0)
    svd.update(next(fresh))
    past = cupy.asarray(torch.randn(k + b, n, device=DEVICE))
    bench.case(
        "StreamingSVD.update, n = 4096, k = b = 128, f32",
        lambda: svd.update(next(fresh)),
        {"cupy.linalg.svd of the stack": (lambda: cupy.linalg.svd(past, full_matrices=False), 20)},
    )


@case
def batched_qr(bench: Bench) -> None:
    A = torch.randn(1024, 64, 16, device=DEVICE)
    bench.case(
        "QR of 1024 matrices 64 × 16 with Q, f32",
        lambda: orth.householder_qr(A)[0].to_array(),
        {"torch.linalg.qr": (lambda: torch.linalg.qr(A), 50)},
        bytes_=3 * A.nbytes,
    )


@case
def large_qr(bench: Bench) -> None:
    A = torch.randn(4096, 512, device=DEVICE)
    bench.case(
        "QR of 4096 × 512, kept as reflections, f32",
        lambda: orth.householder_qr(A),
        {"torch.linalg.qr": (lambda: torch.linalg.qr(A), None)},
        bytes_=3 * A.nbytes,
    )


@case
def reflections(bench: Bench) -> None:
    m, k = 4096, 512
    V = torch.randn(m, k, device=DEVICE).tril(-1) + torch.eye(m, k, device=DEVICE)
    tau = 2 / (V * V).sum(0)
    grad = torch.randn(m, k, device=DEVICE)

    def ours() -> None:
        orth.householder_product(V, tau)
        orth.householder_product_backward(grad, V, tau)

    v, t = V.clone().requires_grad_(), tau.clone().requires_grad_()

    def theirs() -> None:
        torch.linalg.householder_product(v, t).backward(grad)

    peers: dict[str, Any] = {"torch.linalg.householder_product": (theirs, 100)}
    try:
        from torch_householder import torch_householder_orgqr
    except ImportError:
        bench.missing.append("torch_householder is not installed: its row is missing")
    else:
        peers["torch_householder"] = (lambda: torch_householder_orgqr(v).backward(grad), 20)
    bench.case(
        "Householder product of 512 reflections of 4096 and its gradient, f32", ours, peers, peer_runs=3,
        flops=0, bytes_=6 * V.nbytes,
    )  # fmt: skip


@case
def angles(bench: Bench) -> None:
    U, W = (torch.linalg.qr(torch.randn(1000, 2048, 8, device=DEVICE))[0].contiguous() for _ in range(2))

    def products() -> torch.Tensor:
        return torch.linalg.svdvals(U.mT @ W).clamp(max=1).acos()

    bench.case(
        "grassmann.principal_angles, 1000 × (2048 × 8), f32",
        lambda: grassmann.principal_angles(U, W),
        {"arccosines of singular values": (products, None)},
        bytes_=2 * U.nbytes,
    )
    x, grad = torch.randn(256, 2048, device=DEVICE), torch.randn(256, 1000, device=DEVICE)

    def published() -> None:
        y, u = x.detach().requires_grad_(), U.detach().requires_grad_()
        p = torch.einsum("bn,cnk->bck", torch.nn.functional.normalize(y), u)
        (25 * p.norm(dim=-1)).backward(grad)

    def ours() -> None:
        grassmann.logits(x, U)
        grassmann.logits_backward(grad, x, U)

    bench.case(
        "grassmann.logits and its gradient, 256 × 1000 classes of 2048 × 8, f32",
        ours,
        {"einsum and autograd": (published, None)},
        bytes_=4 * U.nbytes,
    )


@case
def packed_bases(bench: Bench) -> None:
    G = torch.randn(4096, 4096, device=DEVICE).bfloat16()
    U = torch.linalg.qr(torch.randn(4096, 128, device=DEVICE))[0]
    packed = orth.quantize_int4(U)

    def unpacked() -> None:
        u = packed.to_array().bfloat16()
        torch.addmm(G, u, u.T @ G, alpha=-1, out=G)

    bench.case(
        "project_out by a 4-bit basis, 4096² bf16, k=128, in place",
        lambda: orth.apply_core(G, packed, -1.0, out=G),
        {"unpacking and torch.addmm": (unpacked, None)},
        bytes_=2 * G.nbytes,
    )


@case
def decoding(bench: Bench) -> None:
    """One token of each of 256 sequences."""
    z = torch.randn(256, R, device=DEVICE).bfloat16()
    W = (torch.randn(D, len(PAIRS), device=DEVICE) / 22).bfloat16()
    b = torch.randn(D, device=DEVICE).bfloat16()
    state = plucker.MixState(OFFSETS, R, W=W, b=b)
    out = torch.empty(256, D, dtype=torch.bfloat16, device=DEVICE)
    first, second = (torch.tensor([p[i] for p in PAIRS], device=DEVICE) for i in (0, 1))
    past = torch.randn(256, max(OFFSETS) + 1, R, device=DEVICE).bfloat16()
    with torch.no_grad():
        bench.case(
            "MixState.step, 256 sequences, bf16",
            lambda: state.step(z, out=out),
            {"published form over the offsets' tokens": (lambda: published(past, W, b, first, second), None)},
            bytes_=W.nbytes + out.nbytes,
        )


@case
def both_sides(bench: Bench) -> None:
    C, V = torch.randn(512, 256, 128, device=DEVICE), torch.randn(512, 128, 16, device=DEVICE)
    tau = 2 / (V * V).sum(-2)

    def looped() -> None:
        q = torch.linalg.householder_product(V.tril(-1) + torch.eye(128, 16, device=DEVICE), tau)
        C - (C @ q) @ q.mT

    bench.case(
        "16 reflections from the right on 512 × (256 × 128), f32",
        lambda: orth.householder_apply(V, C, tau, side="right", out=C),
        {"torch.linalg.householder_product and two products": (looped, None)},
        bytes_=2 * C.nbytes,
    )


@case
def low_rank_gradients(bench: Bench) -> None:
    """All 224 gradients of LLaMA-7B: 32 layers of seven. The peer is timed on one layer."""
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    G = [torch.randn(shape, device=DEVICE) for _ in range(32) for shape in shapes]
    theirs = 32 * bench.time(lambda: [torch.linalg.svd(g, full_matrices=False) for g in G[: len(shapes)]], 1)
    for rank, reach in ((128, 300), (1024, 50)):
        projectors = [orth.GradientProjector(rank, refresh=0, rng=i) for i in range(len(G))]
        orth.GradientProjector.refresh_all(projectors, G)
        bench.case(
            f"GradientProjector.refresh of 224 gradients of LLaMA-7B, rank {rank}, f32",
            lambda projectors=projectors: orth.GradientProjector.refresh_all(projectors, G),
            {"torch.linalg.svd, 32 × one layer's time": (theirs, reach)},
            flops=sum(4 * g.numel() * rank for g in G),
            runs=1,  # the call before was the first
        )


def call_overhead() -> float | None:
    """Microseconds of a Python call beyond a launch, CuPy in and out: the host's time while the device keeps up."""
    try:
        import cupy
    except ImportError:
        return None
    G = cupy.ones((32, 32), cupy.float32)
    U = cupy.eye(32, 4, dtype=cupy.float32)
    kernel = cupy.RawKernel('extern "C" __global__ void nothing(float *x) {}', "nothing")

    def host(f: Any, n: int = 2000) -> float:
        best = float("inf")
        for _ in range(5):
            cupy.cuda.runtime.deviceSynchronize()
            begin = time.perf_counter()
            for _ in range(n // 10):
                f()
            best = min(best, (time.perf_counter() - begin) / (n // 10))
        return 1e6 * best

    return host(lambda: orth.project_out(G, U, out=G)) - host(lambda: kernel((1,), (32,), (G,)))


def table(bench: Bench, header: list[str], overhead: float | None, problems: list[str]) -> str:
    """The results so far, as Markdown."""
    lines = [*header, "", "| case | peer | ratio | reach | µs | × floor |", "|---|---|---|---|---|---|"]
    for r in bench.results:
        reach = "" if r.reach is None else f"{r.reach:g}×" + (" (missed)" if r.ratio < r.reach else "")
        times = "" if r.floor is None else f"{r.microseconds / r.floor:.2f}"
        if r.floor is not None and r.floor_reach is not None:
            missed = r.microseconds > r.floor * r.floor_reach
            times += f" (reach {r.floor_reach:g}{', missed' if missed else ''})"
        lines.append(f"| {r.name} | {r.peer} | {r.ratio:.2f}× | {reach} | {r.microseconds:.1f} | {times} |")
    if overhead is not None:
        mark = ", missed" if overhead > 1.8 else ""
        lines += ["", f"A Python call with CuPy arrays takes {overhead:.1f} µs more than a launch (reach 1.8{mark})."]
    if problems:
        lines += ["", *(f"Failed: {x}" for x in problems)]
    return "\n".join(lines) + "\n"


def commit() -> str:
    """What is measured: SUBSPAN_COMMIT where the folder has no history, with a mark where files were changed."""
    if given := os.environ.get("SUBSPAN_COMMIT"):
        return given

    def git(*args: str) -> str:
        try:
            return subprocess.run(["git", *args], capture_output=True, text=True, check=False).stdout.strip()
        except OSError:
            return ""

    name = git("rev-parse", "--short", "HEAD")
    return "unknown" if not name else name + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")


def main() -> None:
    """Runs all cases; the tables are written after each, so that one that takes too long loses nothing."""
    p = argparse.ArgumentParser()
    p.add_argument("--save", type=Path)
    args = p.parse_args()
    torch.manual_seed(0)
    bench = Bench()
    name, version = torch.cuda.get_device_name(), commit()
    slug = name.lower().replace("nvidia ", "").replace(" ", "-")
    header = [
        f"{name}, commit {version}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}",
        "",
        f"Copy {bench.copy / 1e6:.2f} TB/s, bf16 product {bench.gemm / 1e6:.0f} TFLOP/s in the same run. L2 cold.",
        "",
        "",
    ]
    problems: list[str] = []
    overhead: float | None = None

    def save() -> None:
        if args.save is None:
            return
        (args.save / f"{slug}.md").write_text(table(bench, header, overhead, problems))
        rows = [asdict(r) for r in bench.results]
        rates = {"copy": bench.copy, "gemm": bench.gemm, "call_overhead": overhead}
        data = {"device": name, "commit": version, **rates, "results": rows, "failed": problems}
        (args.save / f"{slug}.json").write_text(json.dumps(data, indent=1) + "\n")

    try:
        overhead = call_overhead()
        if overhead is None:
            problems.append("call_overhead: CuPy is not installed")
    except Exception as e:
        problems.append(f"call_overhead: {type(e).__name__}: {e}")
    for i, f in enumerate(CASES):
        header[-1] = f"Cases {i} of {len(CASES)}: those from {f.__name__} on were not reached."
        save()
        try:
            f(bench)
        except Exception as e:
            problems.append(f"{f.__name__}: {type(e).__name__}: {e}")
        problems += bench.missing
        bench.missing.clear()
    header[-1] = f"All {len(CASES)} cases were run."
    save()
    print(table(bench, header, overhead, problems))
    if problems:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
