"""One path for all libraries and devices: few frames of Python, and stubs that are true."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import subspan
from stubs import stub
from subspan import _core, grassmann, orth, plucker
from subspan.svd import StreamingSVD, truncated_svd

PACKAGE = Path(subspan.__file__).parent


def frames(f) -> int:
    """Frames of the package's Python that a call opens."""
    count = 0

    def profile(frame, event, arg):
        nonlocal count
        count += event == "call" and str(PACKAGE) in frame.f_code.co_filename

    sys.setprofile(profile)
    try:
        f()
    finally:
        sys.setprofile(None)
    return count


def calls():
    rng = np.random.default_rng(0)
    C, G, z = rng.standard_normal((16, 8)), rng.standard_normal((16, 2)), rng.standard_normal((8, 4))
    U, W = (np.linalg.qr(rng.standard_normal((16, 2)))[0] for _ in range(2))
    H, B, out = grassmann.tangent(U, G), np.zeros_like(G), np.empty_like(C)
    stream, state = StreamingSVD(3).update(C), plucker.MixState([1, 2], 4)
    P, b = rng.standard_normal((3, 6)), np.zeros(3)
    p = orth.GradientProjector(2, rng=0)
    p.down(C)
    return {
        "project_out": lambda: orth.project_out(C, U, check=False, out=out),
        "project_out, checked": lambda: orth.project_out(C, U),
        "project both": lambda: orth.project(C, (U, C[:8, :1] / np.linalg.norm(C[:8, :1])), side="both"),
        "apply_core": lambda: orth.apply_core(C, U, 2.0),
        "swap": lambda: orth.swap(C.T, C.T, U),
        "householder_qr": lambda: orth.householder_qr(C),
        "householder_apply": lambda: orth.householder_apply(U, C),
        "orthonormalize": lambda: orth.orthonormalize(C),
        "span_sum": lambda: orth.span_sum(U, W),
        "hadamard": lambda: orth.hadamard(C),
        "down": lambda: p.down(C),
        "exp": lambda: grassmann.exp(U, H),
        "log": lambda: grassmann.log(U, W),
        "transport": lambda: grassmann.transport(U, H, H),
        "distance": lambda: grassmann.distance(U, W),
        "principal_angles": lambda: grassmann.principal_angles(U, W, vectors=True),
        "sgd_step": lambda: grassmann.sgd_step(U.copy(), G, B, lr=0.1, momentum=0.9),
        "adam_step": lambda: grassmann.adam_step(U.copy(), G, B, np.zeros(()), step=1, lr=0.1),
        "logits": lambda: grassmann.logits(C.T, U[None]),
        "mix": lambda: plucker.mix(z, [1, 2]),
        "mix_project": lambda: plucker.mix_project(z, P, b, [1, 2]),
        "mix_backward": lambda: plucker.mix_backward(np.ones((8, 6)), z, [1, 2]),
        "step": lambda: state.step(z[0]),
        "wedge": lambda: plucker.wedge(z[0], z[1]),
        "update": lambda: stream.update(C),
        "truncated_svd": lambda: truncated_svd(C, 2, rng=0),
    }


@pytest.mark.parametrize("name", calls())
def test_few_frames(name):
    f = calls()[name]
    f()  # what is looked up once
    assert frames(f) <= 15


def test_stubs_are_what_the_bindings_say():
    wanted = stub(_core)
    assert (PACKAGE / "_core.pyi").read_text() == wanted, "run python tests/stubs.py"


def test_the_package_is_slim():
    lines = sum(len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py"))
    assert lines < 6000, lines


def test_a_number_of_a_list_and_an_array_of_any_library_go_one_way():
    """What a function makes of a list is what it makes of the array."""
    torch = pytest.importorskip("torch")
    U = np.linalg.qr(np.arange(12.0).reshape(6, 2) ** 0.5)[0]
    C = np.arange(18.0).reshape(6, 3)
    wanted = orth.project_out(C, U)
    np.testing.assert_array_equal(orth.project_out(C.tolist(), U.tolist()), wanted)
    np.testing.assert_array_equal(orth.project_out(torch.from_numpy(C), U).numpy(), wanted)
    np.testing.assert_array_equal(orth.project_out(C, torch.from_numpy(U)), wanted)
    assert type(orth.project_out(torch.from_numpy(C), U)) is torch.Tensor
    assert type(orth.project_out(C, torch.from_numpy(U))) is np.ndarray


def sided(C, U, V, tau):
    q = orth.quantize_int4(U)
    Q = orth.householder_qr(U)[0]
    return {
        "apply_core": lambda s: orth.apply_core(C, U, 1.0, side=s),
        "rotate": lambda s: orth.rotate(C, U[:, 0], U[:, 1], side=s),
        "apply of an Int4Basis": lambda s: q.apply(C, side=s),
        "apply of a Q": lambda s: Q.apply(C, side=s),
        "householder_apply": lambda s: orth.householder_apply(V, C, tau, side=s),
        "householder_apply_backward": lambda s: orth.householder_apply_backward(C, V, C, tau, side=s),
        "project_out of a list": lambda s: orth.project_out([C], [U], side=s),
    }


@pytest.mark.parametrize("side", ["both", "middle", None, 1])
@pytest.mark.parametrize("where", ["cpu", "device"])
def test_sides_that_are_none_are_refused(request, rng, where, side):
    """Only projections have both; nothing takes it for one of the two."""
    C, U = rng.standard_normal((6, 6)), np.linalg.qr(rng.standard_normal((6, 2)))[0]
    arrays = (C, U, rng.standard_normal((6, 2)), rng.standard_normal(2))
    if where == "device":
        arrays = tuple(map(request.getfixturevalue("gpu").put, arrays))
    for f in sided(*arrays).values():
        with pytest.raises(ValueError, match=r"side"):
            f(side)
