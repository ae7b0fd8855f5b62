"""Each CUDA kernel once against the CPU, a line for each as it ends: the first minute on a device.

``python bench/gpu_smoke.py`` takes CuPy's device; ``--emulated BUILD`` the module of tests/cuda that was built there,
which shows that this script works where there is no GPU. What fails is said, and the rest goes on; the exit status
tells whether anything did.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from subspan import grassmann, orth, plucker
from subspan.svd import StreamingSVD, truncated_svd

if TYPE_CHECKING:
    from collections.abc import Callable

CASES: list[tuple[str, Callable[[Inputs], Any], float, bool]] = []
HALF: dict[str, Any] = {"float16": np.float16}
try:
    import ml_dtypes
except ImportError:  # bfloat16 is then left out
    finfo: Any = np.finfo
else:
    HALF["bfloat16"], finfo = ml_dtypes.bfloat16, ml_dtypes.finfo


class Inputs:
    """Random arrays, the same on both sides: of NumPy, or where ``put`` takes them."""

    def __init__(self, put: Callable[[Any], Any], dtype: Any) -> None:
        self.put, self.dtype, self.rng = put, np.dtype(dtype), np.random.default_rng(0)

    def __call__(self, *shape: int) -> Any:
        return self.put(self.rng.standard_normal(shape).astype(self.dtype))

    def small(self, *shape: int) -> Any:
        return self.put((0.05 * self.rng.standard_normal(shape)).astype(self.dtype))

    def basis(self, *shape: int) -> Any:
        return self.put(np.linalg.qr(self.rng.standard_normal(shape))[0].astype(self.dtype))

    def decaying(self, m: int, n: int) -> Any:
        u, v = (np.linalg.qr(self.rng.standard_normal((size, min(m, n))))[0] for size in (m, n))
        return self.put(((u * 0.6 ** np.arange(min(m, n))) @ v.T).astype(self.dtype))


def case(name: str, tolerance: float = 200.0, half: bool = False) -> Any:
    """A case gives arrays that do not depend on signs or on the basis of a space; the tolerance is in eps. ``half``: it
    runs in 16 bits, too, against the CPU in float32 on the same numbers, to a few of their eps.
    """
    return lambda f: CASES.append((name, f, tolerance, half)) or f


def spans(q: Any) -> Any:
    """The projector onto the columns of q, which do not depend on the basis."""
    q = q.get() if hasattr(q, "get") else np.asarray(q)
    q = q.astype(np.float64)
    return q @ np.swapaxes(q, -1, -2)


@case("apply_core, a matrix", half=True)
def _(x: Inputs) -> Any:
    return orth.apply_core(x(3, 40, 24), x(40, 8), x(8, 8), alpha=0.5)


@case("apply_core, a diagonal, from the right, more than 256 columns")
def _(x: Inputs) -> Any:
    return orth.apply_core(x(24, 300), x(300, 280), x(280), side="right")


@case("project_out, in place", half=True)
def _(x: Inputs) -> Any:
    G = x(2, 128, 96)
    return orth.project_out(G, x.basis(128, 16), out=G, check=False)  # which the CPU makes of a basis of 16 bits


@case("project onto any basis", 2e4)
def _(x: Inputs) -> Any:
    return orth.project(x(60, 20), x(60, 7), orthonormal=False)


@case("project_out of a list")
def _(x: Inputs) -> Any:
    return orth.project_out([x(64, 20), x(48, 30)], [x.basis(64, 4), x.basis(48, 6)])


@case("swap")
def _(x: Inputs) -> Any:
    return orth.swap(x(9, 40), x(9, 40), x.basis(40, 5))


@case("quantize_int4, Int4Basis", 2e4)
def _(x: Inputs) -> Any:
    B = orth.quantize_int4(x.basis(64, 16))
    return [B.to_array(), B.apply(x(16, 9)), orth.project_out(x(64, 9), B)]


@case("householder_qr, a stack in blocks")
def _(x: Inputs) -> Any:
    Q, R = orth.householder_qr(x(5, 64, 12))
    return [R, Q.apply(x(5, 64, 3)), Q.to_array()]


@case("householder_qr by cuSOLVER", 2e3)
def _(x: Inputs) -> Any:
    Q, R = orth.householder_qr(x(700, 180))
    return [R, Q.to_array()]


@case("householder_apply, householder_product and gradients", 2e3)
def _(x: Inputs) -> Any:
    V, C, G = x(40, 6), x(40, 10), x(40, 10)
    H = orth.householder_product(V)
    return [
        orth.householder_apply(V, C),
        H,
        *orth.householder_apply_backward(G, V, C),
        orth.householder_product_backward(x(40, 6), V),
    ]


@case("orthonormalize", 1e3)
def _(x: Inputs) -> Any:
    A = x(3, 50, 9)
    methods = ("auto", "cholesky", "householder")
    return [*(spans(orth.orthonormalize(A, method=m)) for m in methods), orth.orthonormalize(A, method="polar")]


@case("complement, span_sum, span_intersection", 1e3)
def _(x: Inputs) -> Any:
    U, W = x.basis(30, 6), x.basis(30, 4)
    return [spans(f) for f in (orth.complement(U), orth.span_sum(U, W), orth.span_intersection(U, U))]


@case("range_basis, null_space, compose", 1e3)
def _(x: Inputs) -> Any:
    found = orth.range_basis(x(2, 20, 5)), orth.null_space(x(2, 5, 20)), orth.compose(x(12, 4), x(11, 3), 5)
    return [spans(f) for f in found]


@case("rotate")
def _(x: Inputs) -> Any:
    return orth.rotate(x(20, 6), x(20), x(20))


@case("GradientProjector", 2e4)
def _(x: Inputs) -> Any:
    G = x.decaying(60, 40)
    p = orth.GradientProjector(4, rng=0)
    return p.up(p.down(G))


@case("StreamingSVD", 1e4)
def _(x: Inputs) -> Any:
    svd = StreamingSVD(4, center=True)
    for _ in range(3):
        svd.update(x.decaying(30, 48))
    return [svd.singular_values, svd.mean, spans(svd.components.T), svd.residual(x(5, 48))]


@case("StreamingSVD, merge, project and reconstruct", 1e4)
def _(x: Inputs) -> Any:
    one, other = StreamingSVD(4), StreamingSVD(4)
    one.merge(other.update(x.decaying(30, 48))).update(x.decaying(20, 48))
    return [one.singular_values, one.reconstruct(one.project(x(5, 48)))]


@case("GradientProjector.refresh_all", 2e4)
def _(x: Inputs) -> Any:
    gradients = [x.decaying(60, 40), x.decaying(50, 70)]
    projectors = [orth.GradientProjector(4, rng=0) for _ in gradients]
    orth.GradientProjector.refresh_all(projectors, gradients)
    return [p.up(p.down(g)) for p, g in zip(projectors, gradients, strict=True)]


@case("truncated_svd", 1e4)
def _(x: Inputs) -> Any:
    U, S, Vh = truncated_svd(x.decaying(80, 60), 5, power_iterations=4, rng=0)
    return [S, spans(U), spans(Vh.T)]


@case("sgd_step", 1e3)
def _(x: Inputs) -> Any:
    U, buffer = x.basis(20, 64, 8), x(20, 64, 8)
    return [grassmann.sgd_step(U, x(20, 64, 8), buffer, lr=0.1, momentum=0.9), buffer]


@case("adam_step", 1e3)
def _(x: Inputs) -> Any:
    U, m, v = x.basis(4, 64, 8), x.put(np.zeros((4, 64, 8), x.dtype)), x.put(np.zeros(4, x.dtype))
    return grassmann.adam_step(U, x(4, 64, 8), m, v, step=1, lr=0.01)


@case("retract, exp, tangent, log, transport", 2e4)
def _(x: Inputs) -> Any:
    U = x.basis(4, 50, 6)
    H = grassmann.tangent(U, x.small(4, 50, 6))
    W = grassmann.exp(U, H)
    return [*(spans(grassmann.retract(U, H, method=m)) for m in ("cholesky", "polar", "qr", "cayley")), spans(W),
            grassmann.log(U, W), grassmann.transport(U, H, H)]  # fmt: skip


@case("principal_angles, distance", 2e3)
def _(x: Inputs) -> Any:
    U, W = x.basis(9, 40, 5), x.basis(9, 40, 5)
    return [grassmann.principal_angles(U, W), grassmann.distance(U, W, kind="chordal")]


@case("mean", 2e4)
def _(x: Inputs) -> Any:
    U = x.basis(30, 3)
    return spans(grassmann.mean(grassmann.exp(U, grassmann.tangent(U, x.small(6, 30, 3)))))


@case("logits and gradients", 1e3)
def _(x: Inputs) -> Any:
    X, U = x(7, 48), x.basis(11, 48, 4)
    return [grassmann.logits(X, U), *grassmann.logits_backward(x(7, 11), X, U)]


@case("mix, mix_project and gradients", 2e3, half=True)
def _(x: Inputs) -> Any:
    z, W, b, offsets = x(2, 50, 16), x(24, 120), x(24), [1, 2, 4]
    forward = [plucker.mix(z, offsets), plucker.mix_project(z, W, b, offsets)]
    grads = x(2, 50, 120), x(2, 50, 24)
    return [
        *forward,
        plucker.mix_backward(grads[0], z, offsets),
        *plucker.mix_project_backward(grads[1], z, W, b, offsets),
    ]


@case("mix, soft, with a mask, weights and rotary positions", 2e3)
def _(x: Inputs) -> Any:
    z, weights = x(2, 50, 16), x(3)
    mask = x.put(np.arange(50) % 7 != 3)
    how = {"norm": "soft", "eps": 1e-4, "rope": "half", "weighting": "softmax", "weights": weights, "mask": mask}
    return [plucker.mix(z, [1, 2, 4], **how), *plucker.mix_backward(x(2, 50, 120), z, [1, 2, 4], **how)]


@case("MixState", 2e3, half=True)
def _(x: Inputs) -> Any:
    state = plucker.MixState([1, 2], 16, W=x(24, 120), b=x(24)).prefill(x(2, 9, 16))
    return state.step(x(2, 16))


def arrays_of(found: Any) -> list[np.ndarray[Any, Any]]:
    """What a case gave, on the host and in double."""
    if isinstance(found, (tuple, list)):
        return [y for x in found for y in arrays_of(x)]
    return [] if found is None else [np.asarray(found.get() if hasattr(found, "get") else found, np.float64)]


def compared(f: Callable[[Inputs], Any], put: Callable[[Any], Any], dtype: Any) -> float:
    """The largest difference between the device and the CPU, in eps of the dtype and of the largest entry.

    The CPU works on the same numbers, on those of 16 bits in float32.
    """
    wide = np.float32 if np.dtype(dtype).itemsize == 2 else dtype
    got = arrays_of(f(Inputs(put, dtype)))
    want = arrays_of(f(Inputs(lambda y: y.astype(wide) if y.dtype == np.dtype(dtype) else y, dtype)))
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        if a.shape != b.shape:
            raise AssertionError(f"shape {a.shape}, wanted {b.shape}")
        scale = max(1.0, float(np.abs(b).max(initial=0.0)))
        error = float(np.abs(a - b).max(initial=0.0)) / scale
        worst = max(worst, error if np.isfinite(error) else np.inf)
    return worst / float(finfo(dtype).eps)


def device(build: Path | None) -> Callable[[Any], Any]:
    """What puts arrays on the device."""
    if build is None:
        import cupy

        return cupy.asarray  # type: ignore[no-any-return]
    here = Path(__file__).parents[1] / "tests" / "cuda"
    sys.path.insert(0, str(here))
    import fake_cupy

    import subspan._lib.device as placing

    (path,) = build.glob("_cuda_emulated*.so")
    spec = importlib.util.spec_from_file_location("_cuda_emulated", path)
    assert spec is not None
    assert spec.loader is not None
    placing._module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(placing._module)
    placing._module.emulated.reset()
    fake_cupy.install()
    return lambda y: fake_cupy.asarray(np.asarray(y))


def main() -> int:
    """Runs all cases; returns the exit status."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--emulated", type=Path, metavar="BUILD", help="folder of the emulated device's module")
    p.add_argument("--save", type=Path, metavar="FILE", help="the lines go here, too, each as it is there")
    p.add_argument("--cases", type=int, help="so many of them only")
    p.add_argument("--dtypes", nargs="+", default=["float32", "float64", *HALF], help="those to run")
    args = p.parse_args()
    begun = time.perf_counter()
    put = device(args.emulated)
    failed = ran = 0

    def say(line: str) -> None:
        print(line, flush=True)
        if args.save is not None:
            with open(args.save, "a", encoding="utf-8") as f:
                f.write(line + "\n")

    for name, f, tolerance, half in CASES[: args.cases]:
        for dtype in (HALF.get(x, x) for x in args.dtypes):
            small = np.dtype(dtype).itemsize == 2
            if small and not half:
                continue
            tolerance = 16.0 if small else tolerance
            ran += 1
            start = time.perf_counter()
            try:
                error = compared(f, put, dtype)
                good = error <= tolerance
                what = f"{error:.3g} eps" + ("" if good else f", more than {tolerance:g}")
            except Exception as e:  # whatever a device makes of it, the next kernel may work
                good, what = False, f"{type(e).__name__}: {e}".partition("\n")[0][:300]
            failed += not good
            took = time.perf_counter() - start
            say(f"{'ok  ' if good else 'FAIL'} {np.dtype(dtype).name}  {took:6.2f} s  {name}: {what}")
    say(f"{ran - failed} of {ran} are right, in {time.perf_counter() - begun:.1f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
