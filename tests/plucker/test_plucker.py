"""Plücker mixing against the per-offset form under autograd, decoding against whole sequences, hard input."""

from __future__ import annotations

import itertools
import pickle
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import subspan
from subspan import _core, plucker

torch = pytest.importorskip("torch")
from plucker_reference import mixed, projected  # noqa: E402

DTYPES = [np.float32, np.float64]
OFFSETS = [1, 2, 4, 8, 12, 16]


def eps(dtype):
    return float(np.finfo(dtype).eps)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def tensor(x):
    return torch.from_numpy(np.asarray(x, dtype=np.float64)).requires_grad_()


def reference(z, offsets, grad, W=None, b=None, **variant):
    """Output and gradients of the per-offset form, in float64."""
    leaves = {"z": tensor(z)}
    options = dict(variant)
    if W is not None:
        leaves["W"] = tensor(W)
    if b is not None:
        leaves["b"] = tensor(b)
    if variant.get("weights") is not None:
        leaves["weights"] = options["weights"] = tensor(variant["weights"])
    if variant.get("mask") is not None:
        options["mask"] = torch.from_numpy(np.asarray(variant["mask"]))
    if W is None:
        out, _ = mixed(leaves["z"], offsets, **options)
    else:
        out = projected(leaves["z"], leaves["W"], leaves.get("b"), offsets, **options)
    out.backward(torch.from_numpy(np.asarray(grad, dtype=np.float64)))
    return out.detach().numpy(), {k: x.grad.numpy() for k, x in leaves.items()}


def assert_close(got, want, dtype, factor=20.0):
    """To `factor` eps of the largest entry; 1e-13 in float64 is 450 of them."""
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, want, rtol=0, atol=factor * eps(dtype) * max(1.0, np.abs(want).max(initial=0)))


VARIANTS = {
    "plain": {},
    "one offset": {"offsets": [3]},
    "repeated": {"offsets": [1, 1, 5]},
    "longer than the sequence": {"offsets": [2, 1000, 60]},
    "only longer": {"offsets": [1000]},
    "far": {"offsets": [1, 49, 97, 98]},
    "soft": {"norm": "soft"},
    "soft, large eps": {"norm": "soft", "eps": 3.0},
    "clamp at work": {"norm": "clamp", "eps": 12.0},
    "no norm": {"norm": None},
    "past first": {"order": "past-first"},
    "ahead": {"offsets": [-1, 2, -50], "causal": False},
    "interleaved rope": {"rope": "interleaved"},
    "half rope": {"rope": "half", "rope_start": 70, "rope_base": 500.0},
    "masked": {"mask": True},
    "bias kept": {"bias": "always", "offsets": [30, 40]},
    "bias kept, masked": {"bias": "always", "mask": True},
    "given": {"weights": "shared"},
    "given by token": {"weights": "token", "norm": "soft"},
    "given, bias kept": {"weights": "shared", "bias": "always"},
    "softmax": {"weights": "shared", "weighting": "softmax"},
    "softmax by token and mask": {"weights": "token", "weighting": "softmax", "mask": True, "order": "past-first"},
    "softmax by sequence, all of it": {
        "weights": "sequence",
        "weighting": "softmax",
        "mask": True,
        "rope": "half",
        "norm": "soft",
        "eps": 1e-8,
        "offsets": [-3, 1, 7, 60],
        "causal": False,
    },
}


def build(rng, name, dtype, batch=(2,), T=101, r=10):
    variant = dict(VARIANTS[name])
    offsets = variant.pop("offsets", OFFSETS)
    z = rng.standard_normal((*batch, T, r)).astype(dtype)
    shapes = {"shared": (), "token": (*batch, T), "sequence": (*batch, 1)}
    if "weights" in variant:
        variant["weights"] = rng.standard_normal((*shapes[variant["weights"]], len(offsets))).astype(dtype)
    if "mask" in variant:
        variant["mask"] = rng.random((*batch, T)) < 0.7
        variant["mask"][..., 20:30] = False
    return z, offsets, variant


# -- equality with the per-offset form ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", VARIANTS)
def test_mix_is_the_per_offset_form(rng, name, dtype):
    z, offsets, variant = build(rng, name, dtype)
    variant.pop("bias", None)
    grad = rng.standard_normal((*z.shape[:-1], 45)).astype(dtype)
    want, gradients = reference(z, offsets, grad, **variant)
    got = plucker.mix(z, offsets, **variant)
    assert got.dtype == dtype
    assert_close(got, want, dtype)
    result = plucker.mix_backward(grad, z, offsets, **variant)
    if "weights" in variant:
        assert_close(result[0], gradients["z"], dtype, 60)
        assert_close(result[1], gradients["weights"], dtype, 60)
    else:
        assert_close(result, gradients["z"], dtype, 60)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("name", VARIANTS)
def test_mix_project_is_the_per_offset_form(rng, name, with_bias, dtype):
    z, offsets, variant = build(rng, name, dtype)
    W = (rng.standard_normal((37, 45)) / 7).astype(dtype)
    b = rng.standard_normal(37).astype(dtype) if with_bias else None
    grad = rng.standard_normal((*z.shape[:-1], 37)).astype(dtype)
    want, gradients = reference(z, offsets, grad, W, b, **variant)
    assert_close(plucker.mix_project(z, W, b, offsets, **variant), want, dtype)
    dz, dW, db, *rest = plucker.mix_project_backward(grad, z, W, b, offsets, **variant)
    assert_close(dz, gradients["z"], dtype, 60)
    assert_close(dW, gradients["W"], dtype, 60)
    assert (db is None) == (b is None)
    if with_bias:
        assert_close(db, gradients["b"], dtype, 60)
    if "weights" in variant:
        assert_close(rest[0], gradients["weights"], dtype, 60)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [2, 3, 4, 7, 15, 16, 17, 31, 32, 33, 48, 64, 100, 128])
def test_dimensions(rng, r, dtype):
    T, d = 70, 20
    z = rng.standard_normal((T, r)).astype(dtype)
    pairs = r * (r - 1) // 2
    W = (rng.standard_normal((d, pairs)) / np.sqrt(pairs)).astype(dtype)
    b = rng.standard_normal(d).astype(dtype)
    grad = rng.standard_normal((T, d)).astype(dtype)
    want, gradients = reference(z, [1, 3], grad, W, b)
    assert_close(plucker.mix_project(z, W, b, [1, 3]), want, dtype)
    dz, dW, db = plucker.mix_project_backward(grad, z, W, b, [1, 3])
    for got, key in ((dz, "z"), (dW, "W"), (db, "b")):
        # in the plane the gradient of z is zero, by the difference of terms that are not
        assert_close(got, gradients[key], dtype, 2000 if r == 2 and key == "z" else 60)
    # in the plane there is one direction: the normalised coordinate is 1 or -1
    if r == 2:
        np.testing.assert_allclose(np.abs(plucker.mix(z, 1)[1:]), 1, rtol=4 * eps(dtype))


@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 47, 48, 49, 63, 64, 65, 96, 112, 113, 600])
def test_lengths(rng, T):
    z, W = rng.standard_normal((3, T, 6)), rng.standard_normal((50, 15))
    grad = rng.standard_normal((3, T, 50))
    want, gradients = reference(z, OFFSETS, grad, W)
    assert_close(plucker.mix_project(z, W, None, OFFSETS), want, np.float64)
    dz, dW, _ = plucker.mix_project_backward(grad, z, W, None, OFFSETS)
    assert_close(dz, gradients["z"], np.float64, 60)
    assert_close(dW, gradients["W"], np.float64, 60)


@pytest.mark.parametrize("d", [1, 2, 7, 8, 16, 31, 47, 48, 49, 63, 64, 65, 130, 300])
def test_widths(rng, d):
    z, W = rng.standard_normal((70, 9)).astype(np.float32), rng.standard_normal((d, 36)).astype(np.float32)
    grad = rng.standard_normal((70, d)).astype(np.float32)
    want, gradients = reference(z, [1, 2], grad, W)
    assert_close(plucker.mix_project(z, W, None, [1, 2]), want, np.float32)
    dz, dW, _ = plucker.mix_project_backward(grad, z, W, None, [1, 2])
    assert_close(dz, gradients["z"], np.float32, 60)
    assert_close(dW, gradients["W"], np.float32, 60)


@given(
    st.integers(1, 70),
    st.integers(2, 9),
    st.lists(st.integers(-80, 80).filter(bool), min_size=1, max_size=5),
    st.sampled_from(["clamp", "soft", None]),
    st.sampled_from(["mean", "given", "softmax"]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_random_masks_and_offsets(T, r, offsets, norm, weighting, past, seed):
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((T, r))
    variant = {
        "norm": norm,
        "weighting": weighting,
        "mask": rng.random(T) < rng.random(),
        "order": "past-first" if past else "current-first",
        "causal": False,
        "weights": None if weighting == "mean" else rng.standard_normal(len(offsets)),
    }
    W, b = rng.standard_normal((4, r * (r - 1) // 2)), rng.standard_normal(4)
    grad = rng.standard_normal((T, 4))
    want, gradients = reference(z, offsets, grad, W, b, **variant)
    np.testing.assert_allclose(plucker.mix_project(z, W, b, offsets, **variant), want, rtol=0, atol=1e-11)
    got = plucker.mix_project_backward(grad, z, W, b, offsets, **variant)
    for x, key in zip(got, ("z", "W", "b", "weights"), strict=False):
        size = np.abs(gradients[key]).max(initial=1)
        np.testing.assert_allclose(x, gradients[key], rtol=0, atol=1e-11 * size)


def test_float64_to_thirteen_digits(rng):
    """The published shape."""
    z, W = rng.standard_normal((2, 100, 32)), rng.standard_normal((64, 496)) / 22
    b, grad = rng.standard_normal(64), rng.standard_normal((2, 100, 64))
    for norm in ("clamp", "soft"):
        want, gradients = reference(z, OFFSETS, grad, W, b, norm=norm)
        np.testing.assert_allclose(plucker.mix_project(z, W, b, OFFSETS, norm=norm), want, rtol=0, atol=1e-13)
        got = plucker.mix_project_backward(grad, z, W, b, OFFSETS, norm=norm)
        for x, key in zip(got, ("z", "W", "b"), strict=True):
            np.testing.assert_allclose(x, gradients[key], rtol=0, atol=1e-13 * np.abs(gradients[key]).max())


# -- layouts, libraries ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["fortran", "strided", "reversed", "broadcast", "by dimension"])
def test_any_strides(rng, layout, dtype):
    z = rng.standard_normal((3, 60, 11)).astype(dtype)
    W = rng.standard_normal((21, 55)).astype(dtype)
    b = rng.standard_normal(42).astype(dtype)[::2]
    grad = rng.standard_normal((3, 60, 21)).astype(dtype)
    plain = (z.copy(), W.copy(), grad.copy())
    if layout == "fortran":
        z, W, grad = (np.asfortranarray(x) for x in (z, W, grad))
    elif layout == "strided":
        z, W, grad = (np.repeat(x, 2, axis=-1)[..., ::2] for x in (z, W, grad))
    elif layout == "reversed":
        z, W, grad = (x[..., ::-1].copy()[..., ::-1] for x in (z, W, grad))
    elif layout == "broadcast":
        z = np.broadcast_to(z[0], z.shape)
        plain = (z.copy(), W, grad)
    else:
        z, grad = (np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2) for x in (z, grad))
    np.testing.assert_array_equal(plucker.mix(z, [1, 5]), plucker.mix(plain[0], [1, 5]))
    np.testing.assert_array_equal(
        plucker.mix_project(z, W, b, [1, 5]), plucker.mix_project(plain[0], plain[1], b.copy(), [1, 5])
    )
    got = plucker.mix_project_backward(grad, z, W, b, [1, 5])
    want = plucker.mix_project_backward(plain[2], plain[0], plain[1], b.copy(), [1, 5])
    for x, y in zip(got, want, strict=True):
        np.testing.assert_array_equal(x, y)
    p = rng.standard_normal((3, 60, 55)).astype(dtype)
    np.testing.assert_array_equal(
        plucker.mix_backward(np.asfortranarray(p), z, [1, 5]), plucker.mix_backward(p, plain[0], [1, 5])
    )
    for shape, call in (((3, 60, 55), plucker.mix), ((3, 60, 21), None)):
        out = np.zeros((*shape[:-1], 2 * shape[-1]), dtype)[..., ::2]
        if call is not None:
            assert call(z, [1, 5], out=out) is out
            np.testing.assert_array_equal(out, call(plain[0], [1, 5]))
        else:
            assert plucker.mix_project(z, W, b, [1, 5], out=out) is out
            np.testing.assert_array_equal(out, plucker.mix_project(plain[0], plain[1], b.copy(), [1, 5]))


def test_batches_and_empty(rng):
    z = rng.standard_normal((2, 3, 1, 20, 5))
    got = plucker.mix(z, [1, 2])
    assert got.shape == (2, 3, 1, 20, 10)
    np.testing.assert_array_equal(got[1, 2, 0], plucker.mix(z[1, 2, 0], [1, 2]))
    for shape in ((0, 20, 5), (2, 0, 5)):
        x, W, b = np.zeros(shape), np.ones((4, 10)), np.ones(4)
        assert plucker.mix(x, 1).shape == (*shape[:-1], 10)
        assert plucker.mix_project(x, W, b, 1).shape == (*shape[:-1], 4)
        dz, dW, db = plucker.mix_project_backward(np.zeros((*shape[:-1], 4)), x, W, b, 1)
        assert dz.shape == shape
        np.testing.assert_array_equal(dW, 0)
        np.testing.assert_array_equal(db, 0)
    assert plucker.mix_project(z, np.ones((0, 10)), None, 1).shape == (2, 3, 1, 20, 0)
    dz, dW, _ = plucker.mix_project_backward(np.zeros((2, 3, 1, 20, 0)), z, np.ones((0, 10)), None, 1)
    np.testing.assert_array_equal(dz, 0)
    assert dW.shape == (0, 10)


def test_libraries(rng):
    z, W, b = (torch.from_numpy(rng.standard_normal(s)) for s in ((2, 30, 6), (8, 15), (8,)))
    got = plucker.mix_project(z, W, b, [1, 2])
    assert isinstance(got, torch.Tensor)
    torch.testing.assert_close(got, projected(z, W, b, [1, 2]))
    mask = torch.rand(2, 30) < 0.8
    torch.testing.assert_close(plucker.mix(z, [1, 2], mask=mask), mixed(z, [1, 2], mask=mask)[0])
    dz, dw = plucker.mix_backward(torch.ones(2, 30, 15, dtype=z.dtype), z, [1, 2], weights=torch.ones(2, dtype=z.dtype))
    assert isinstance(dz, torch.Tensor)
    assert isinstance(dw, torch.Tensor)
    with pytest.raises(TypeError, match="requires grad"):
        plucker.mix(z.requires_grad_(), 1)
    jax = pytest.importorskip("jax")
    z = jax.numpy.asarray(rng.standard_normal((2, 30, 6)), dtype="float32")
    assert type(plucker.mix(z, 1)) is type(z)
    step = plucker.MixState([1], 6).step(z[:, 0])
    assert type(step) is type(z)


# -- small angles ------------------------------------------------------------------------------------------------------

# Angle, and the median relative error of the length of a wedge that is formed directly from float32 products.
DIRECT = [(1.0, 3e-8), (1e-1, 3e-8), (1e-2, 1e-7), (1e-3, 1e-6), (3e-4, 4e-6), (1e-4, 1e-5), (1e-5, 1e-4), (1e-6, 1e-3)]


@pytest.mark.parametrize(("angle", "direct"), DIRECT)
def test_small_angles(rng, angle, direct):
    """Lengths and coordinates of float32 tokens at an angle, against the same tokens in float64."""
    n, r = 200, 32
    a = rng.standard_normal((n, r))
    a /= np.linalg.norm(a, axis=1, keepdims=True)
    c = rng.standard_normal((n, r))
    c -= (a * c).sum(1, keepdims=True) * a
    c /= np.linalg.norm(c, axis=1, keepdims=True)
    pair = np.stack([a, np.cos(angle) * a + np.sin(angle) * c], 1).astype(np.float32)  # n sequences of two tokens
    wide = pair.astype(np.longdouble)
    i, j = np.triu_indices(r, 1)
    exact = wide[:, 1, i] * wide[:, 0, j] - wide[:, 1, j] * wide[:, 0, i]
    length = np.linalg.norm(exact.astype(np.float64), axis=1)
    # the length of what comes out undivided, and what comes out divided
    raw = plucker.mix(pair, 1, norm=None)[:, 1].astype(np.float64)
    unit = plucker.mix(pair, 1)[:, 1].astype(np.float64)
    error = np.abs(np.linalg.norm(raw, axis=1) / length - 1)
    assert np.median(error) <= direct
    assert error.max() <= 1e-6
    want = exact.astype(np.float64) / length[:, None]
    assert np.abs(unit - want).max() <= 20 * eps(np.float32)
    W = np.eye(r * (r - 1) // 2, dtype=np.float32)
    np.testing.assert_allclose(plucker.mix_project(pair, W, None, 1)[:, 1], want, atol=20 * eps(np.float32))
    grad = rng.standard_normal((n, 2, 496)).astype(np.float32)
    gradients = reference(pair, [1], grad)[1]["z"]
    np.testing.assert_allclose(plucker.mix_backward(grad, pair, 1), gradients, atol=1e-5 * np.abs(gradients).max())


# -- what must not fail ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["clamp", "soft", None])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", ["equal", "zero", "zeros between", "multiples", "opposite", "padded"])
def test_degenerate_tokens(rng, tokens, dtype, norm):
    """Output and gradients are finite, and parallel tokens have no wedge."""
    T, r = 60, 8
    z = rng.standard_normal((T, r)).astype(dtype)
    if tokens == "equal":
        z[:] = z[0]
    elif tokens == "zero":
        z[:] = 0
    elif tokens == "zeros between":
        z[::3] = 0
    elif tokens == "multiples":
        z = np.outer(np.arange(1, T + 1), rng.integers(-9, 9, r)).astype(dtype) * dtype(1e6)
    elif tokens == "opposite":
        z[:] = z[0] * (1 - 2 * (np.arange(T) % 2))[:, None].astype(dtype)
    else:
        z[40:] = 0
    W, b = rng.standard_normal((5, 28)).astype(dtype), rng.standard_normal(5).astype(dtype)
    p = plucker.mix(z, OFFSETS, norm=norm)
    assert np.isfinite(p).all()
    if tokens in ("equal", "zero", "multiples", "opposite"):
        np.testing.assert_array_equal(p, 0)
    g = plucker.mix_project(z, W, b, OFFSETS, norm=norm)
    assert np.isfinite(g).all()
    grad = rng.standard_normal(g.shape).astype(dtype)
    for x in plucker.mix_project_backward(grad, z, W, b, OFFSETS, norm=norm):
        assert np.isfinite(x).all()
    logits = rng.standard_normal(6).astype(dtype)
    for x in plucker.mix_backward(p + 1, z, OFFSETS, norm=norm, weights=logits, weighting="softmax"):
        assert np.isfinite(x).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_equal_tokens(rng, dtype):
    """A clamp at work: the wedge is divided by eps, and the gradient is exactly that of a linear map."""
    z = np.tile(rng.standard_normal(6), (5, 1)).astype(dtype)
    grad = rng.standard_normal((5, 15)).astype(dtype)
    _, want = reference(z, [1, 2], grad)
    got = plucker.mix_backward(grad, z, [1, 2])
    assert np.abs(want["z"]).max() > 1e7
    assert_close(got, want["z"], dtype, 60)
    soft = plucker.mix_backward(grad, z, [1, 2], norm="soft")
    assert_close(soft, reference(z, [1, 2], grad, norm="soft")[1]["z"], dtype, 60)
    assert np.abs(soft).max() < 1e6
    np.testing.assert_array_equal(plucker.mix_backward(grad, z, [1, 2], eps=0.0), 0)


@pytest.mark.parametrize("angle", [1e-8, 1e-12, 1e-20])
def test_nearly_parallel_tokens(angle):
    """Tokens (1, a, 0) and (1, -a, 0), and multiples of them: their wedge has one coordinate, 2a, to full precision."""
    z = np.array([[1.0, angle, 0.0], [3.0, -3.0 * angle, 0.0]])
    want = np.array([3.0 * angle - -3.0 * angle, 0.0, 0.0])
    np.testing.assert_allclose(plucker.mix(z, 1, norm=None)[1], want, rtol=1e-14)
    np.testing.assert_allclose(plucker.mix(z, 1, eps=0.0)[1], [1, 0, 0], rtol=1e-14)
    np.testing.assert_allclose(plucker.mix(z, 1, eps=1e-8)[1], want / max(6 * angle, 1e-8), rtol=1e-13)
    single = z.astype(np.float32)
    np.testing.assert_allclose(plucker.mix(single, 1, eps=0.0)[1], [1, 0, 0], rtol=1e-6)


@pytest.mark.parametrize("scale", [1e30, 1e19, 1e-20, 1e-38])
@pytest.mark.parametrize("norm", ["clamp", "soft"])
def test_squares_that_leave_float32(rng, scale, norm):
    z = (scale * rng.standard_normal((40, 12))).astype(np.float32)
    W = rng.standard_normal((7, 66)).astype(np.float32)
    grad = rng.standard_normal((40, 7)).astype(np.float32)
    variant = {"norm": norm, "eps": 1e-8 * min(scale, 1.0) ** 2}
    want, gradients = reference(z, [1, 2], grad, W, **variant)
    np.testing.assert_allclose(plucker.mix_project(z, W, None, [1, 2], **variant), want, atol=1e-5)
    dz, dW, _ = plucker.mix_project_backward(grad, z, W, None, [1, 2], **variant)
    size = np.abs(gradients["z"]).max()
    if size < 1e38:
        np.testing.assert_allclose(dz / size, gradients["z"] / size, atol=1e-5)
    np.testing.assert_allclose(dW, gradients["W"], atol=1e-4)


@pytest.mark.parametrize("scale", [1e250, 1e160, 1e-160, 1e-300])
def test_squares_that_leave_float64(rng, scale):
    """Without a clamp at work the result does not depend on the scale, and the gradient divides by it."""
    z = rng.standard_normal((40, 6))
    grad = rng.standard_normal((40, 15))
    want, first = plucker.mix(z, [1, 2], eps=0.0), plucker.mix_backward(grad, z, [1, 2], eps=0.0)
    np.testing.assert_allclose(plucker.mix(scale * z, [1, 2], eps=0.0), want, atol=1e-13)
    np.testing.assert_allclose(plucker.mix_backward(grad, scale * z, [1, 2], eps=0.0) * scale, first, atol=1e-12)


@pytest.mark.parametrize("norm", ["clamp", "soft", None])
@pytest.mark.parametrize("scale", [1e140, 1e149, 1e151, 1e155, 1e160, 1e250])
def test_float64_at_the_edge_is_right_or_an_error(rng, scale, norm):
    """Against the same computation with exponents out of reach, in extended precision."""
    z = rng.standard_normal((6, 5))
    wide = np.longdouble(scale) * z.astype(np.longdouble)
    i, j = np.triu_indices(5, 1)
    p = wide[1:, i] * wide[:-1, j] - wide[1:, j] * wide[:-1, i]
    if norm is not None:
        p = p / np.sqrt((p * p).sum(1, keepdims=True))
    if np.abs(p).max() < 1e308:
        got = plucker.mix(scale * z, 1, norm=norm)[1:]
        np.testing.assert_allclose((got / p).astype(np.float64), 1, rtol=1e-10)
    else:
        with pytest.raises(ValueError, match="overflows"):
            plucker.mix(scale * z, 1, norm=norm)
    same = np.tile(scale * z[:1], (6, 1))
    np.testing.assert_array_equal(plucker.mix(same, 1, norm=norm, eps=1e-10), 0)
    grad = rng.standard_normal((6, 10))
    try:
        got = plucker.mix_backward(grad, same, 1, norm=norm)
    except ValueError as e:
        assert "overflows" in str(e)  # noqa: PT017
        return
    f = {"clamp": 1e-8, "soft": 1e-4, None: 1.0}[norm]
    want = plucker.mix_backward(grad, np.tile(z[:1], (6, 1)), 1, norm=None)
    np.testing.assert_allclose(got / scale * f, want, rtol=1e-9, atol=1e-9)


def test_gradients_of_weights_that_overflow(rng):
    z = (1e18 * rng.standard_normal((40, 12))).astype(np.float32)
    big, weights = np.full((40, 66), 1e10, np.float32), np.ones(2, np.float32)
    with pytest.raises(ValueError, match="the gradient of weights overflows"):
        plucker.mix_backward(big, z, [1, 2], norm=None, weights=weights * 1e-30)
    W, b = np.zeros((3, 66), np.float32), np.full(3, 1e30, np.float32)
    with pytest.raises(ValueError, match="the gradient of weights overflows"):
        plucker.mix_project_backward(np.full((40, 3), 1e10, np.float32), z, W, b, [1, 2], weights=weights)


def test_what_a_masked_token_is_given_is_not_looked_at(rng):
    """NaN in the gradient of a masked token, and of one at which no offset applies."""
    z, W, b = rng.standard_normal((2, 70, 6)), rng.standard_normal((9, 15)), rng.standard_normal(9)
    mask = rng.random((2, 70)) < 0.8
    grad, p = rng.standard_normal((2, 70, 9)), rng.standard_normal((2, 70, 15))
    bad, worse = grad.copy(), p.copy()
    for x in (bad, worse):
        x[~mask] = np.nan
        x[:, 0] = np.nan
    weights = rng.standard_normal(2)
    for variant in ({}, {"weights": weights}, {"weights": weights, "weighting": "softmax"}):
        clean = plucker.mix_project_backward(grad, z, W, b, [1, 3], mask=mask, **variant)
        for x, y in zip(plucker.mix_project_backward(bad, z, W, b, [1, 3], mask=mask, **variant), clean, strict=True):
            np.testing.assert_array_equal(x, y)
        clean = plucker.mix_backward(p, z, [1, 3], mask=mask, **variant)
        got = plucker.mix_backward(worse, z, [1, 3], mask=mask, **variant)
        for x, y in zip(got, clean, strict=True) if variant else [(got, clean)]:
            np.testing.assert_array_equal(x, y)


def test_gradients_that_are_broadcast(rng):
    """What autograd hands over for a sum: one number for all entries."""
    z, W = rng.standard_normal((2, 60, 6)), rng.standard_normal((9, 15))
    one = np.broadcast_to(np.float64(1), (2, 60, 9))
    for x, y in zip(
        plucker.mix_project_backward(one, z, W, None, [1, 3])[:2],
        plucker.mix_project_backward(one.copy(), z, W, None, [1, 3])[:2],
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)
    one = np.broadcast_to(np.float64(1), (2, 60, 15))
    np.testing.assert_array_equal(plucker.mix_backward(one, z, 1), plucker.mix_backward(one.copy(), z, 1))


def test_zero_tokens_next_to_huge_ones():
    z = np.zeros((4, 6), np.float32)
    z[::2] = 3e38
    np.testing.assert_array_equal(plucker.mix(z, [1, 2]), 0)
    np.testing.assert_array_equal(plucker.mix_project(z, np.ones((3, 15), np.float32), None, [1, 2]), 0)


def test_overflow_is_an_error(rng):
    z = (1e30 * rng.standard_normal((40, 12))).astype(np.float32)
    with pytest.raises(ValueError, match="overflows the dtype although the input is finite; scale z"):
        plucker.mix(z, 1, norm=None)
    with pytest.raises(ValueError, match="overflows"):
        plucker.mix_project(z, np.ones((3, 66), np.float32), None, 1, norm=None)
    same = np.full((4, 12), 1e30, np.float32)  # dz is 1e30 / eps
    with pytest.raises(ValueError, match="gradient of z overflows"):
        plucker.mix_backward(np.ones((4, 66), np.float32), same + z[:4] * 0, 1, eps=1e-20)
    with pytest.raises(ValueError, match="a gradient overflows"):
        plucker.mix_project_backward(
            np.full((40, 3), 3e38, np.float32), z, np.ones((3, 66), np.float32), np.ones(3, np.float32), 1
        )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_where_it_reaches(rng, bad):
    z = rng.standard_normal((2, 100, 6))
    z[0, 50, 2] = bad
    W, grad = rng.standard_normal((4, 15)), rng.standard_normal((2, 100, 4))
    got = plucker.mix_project(z, W, None, [1, 3])
    reached = np.zeros((2, 100), bool)
    reached[0, [50, 51, 53]] = True
    assert np.isnan(got[reached]).all()
    assert np.isfinite(got[~reached]).all()
    np.testing.assert_array_equal(np.isnan(plucker.mix(z, [1, 3])).any(-1), reached)
    dz = plucker.mix_project_backward(grad, z, W, None, [1, 3])[0]
    assert np.isfinite(dz[1]).all()
    # behind a mask it reaches nothing
    mask = np.ones((2, 100), bool)
    mask[0, 50] = False
    clean = z.copy()
    clean[0, 50] = 7.0
    np.testing.assert_array_equal(
        plucker.mix_project(z, W, None, [1, 3], mask=mask), plucker.mix_project(clean, W, None, [1, 3], mask=mask)
    )
    for x, y in zip(
        plucker.mix_project_backward(grad, z, W, None, [1, 3], mask=mask)[:2],
        plucker.mix_project_backward(grad, clean, W, None, [1, 3], mask=mask)[:2],
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)


def test_masks_with_nothing_valid(rng):
    z, W, b = rng.standard_normal((2, 30, 6)), rng.standard_normal((4, 15)), rng.standard_normal(4)
    grad = rng.standard_normal((2, 30, 4))
    for mask in (np.zeros((2, 30), bool), np.arange(30) % 2 == 0):  # nothing, and nothing next to each other
        for weighting in ("mean", "softmax", "given"):
            weights = None if weighting == "mean" else np.array([0.5, 0.1])
            variant = {"mask": mask, "weighting": weighting, "weights": weights}
            np.testing.assert_array_equal(plucker.mix_project(z, W, b, [1, 3], **variant), 0)
            np.testing.assert_array_equal(
                plucker.mix_project(z, W, b, [1, 3], bias="always", **variant), np.broadcast_to(b, (2, 30, 4))
            )
            dz, dW, db, *rest = plucker.mix_project_backward(grad, z, W, b, [1, 3], **variant)
            for x in (dz, dW, db, *rest):
                np.testing.assert_array_equal(x, 0)
    # a logit of minus infinity leaves its offset out
    got = plucker.mix(z, [1, 3], weights=np.array([-np.inf, 2.0]), weighting="softmax")
    np.testing.assert_array_equal(got, plucker.mix(z, 3))
    got = plucker.mix(z, [1], weights=np.array([-np.inf]), weighting="softmax")
    np.testing.assert_array_equal(got, 0)
    z[:, 7] = np.nan  # also what it would have reached
    got = plucker.mix(z, [1, 3], weights=[-np.inf, 2.0], weighting="softmax")
    assert np.isfinite(got[:, 8]).all()
    assert np.isnan(got[:, 10]).all()


def test_lists_take_the_dtype_of_the_tokens(rng):
    z = rng.standard_normal((20, 6)).astype(np.float32)
    want = plucker.mix(z, [1, 2], weights=np.array([0.5, 2.0], np.float32))
    np.testing.assert_array_equal(plucker.mix(z, [1, 2], weights=[0.5, 2.0]), want)
    state = plucker.MixState([1, 2], 6, weighting="given")
    own = plucker.MixState([1, 2], 6, weights=[0.5, 2])
    for t in range(20):
        np.testing.assert_array_equal(state.step(z[t], weights=[0.5, 2.0]), want[t])
        own = pickle.loads(pickle.dumps(own))
        np.testing.assert_array_equal(own.step(z[t]), want[t])
    grad = rng.standard_normal((20, 15)).astype(np.float32)
    for x, y in zip(
        plucker.mix_backward(grad, z, [1, 2], weights=[0.5, 2.0]),
        plucker.mix_backward(grad, z, [1, 2], weights=np.array([0.5, 2.0], np.float32)),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)


def test_given_weights_are_sums(rng):
    z = rng.standard_normal((30, 6))
    parts = [plucker.mix(z, d) for d in (1, 2, 5)]
    got = plucker.mix(z, [1, 2, 5], weights=np.array([0.5, -2.0, 3.0]))
    np.testing.assert_allclose(got, 0.5 * parts[0] - 2 * parts[1] + 3 * parts[2], atol=1e-14)
    np.testing.assert_allclose(plucker.mix(z, [2, 2, 1])[5:], (2 * parts[1] + parts[0])[5:] / 3, atol=1e-14)


def test_future_tokens_change_nothing(rng):
    z, W = rng.standard_normal((100, 8)), rng.standard_normal((5, 28))
    before = plucker.mix_project(z, W, None, OFFSETS, rope="half")
    z[60:] = rng.standard_normal((40, 8))
    np.testing.assert_array_equal(plucker.mix_project(z, W, None, OFFSETS, rope="half")[:60], before[:60])


# -- threads, memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_bit_identical_for_any_number_of_threads(rng, dtype):
    z, offsets, variant = build(rng, "softmax by token and mask", dtype, batch=(3,), T=700, r=17)
    W, b = rng.standard_normal((33, 136)).astype(dtype), rng.standard_normal(33).astype(dtype)
    grad = rng.standard_normal((3, 700, 33)).astype(dtype)
    p = rng.standard_normal((3, 700, 136)).astype(dtype)
    before = subspan.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5, 2):
            subspan.set_num_threads(threads)
            results.append(
                (
                    plucker.mix(z, offsets, **variant),
                    plucker.mix_project(z, W, b, offsets, **variant),
                    *plucker.mix_backward(p, z, offsets, **variant),
                    *plucker.mix_project_backward(grad, z, W, b, offsets, **variant),
                )
            )
    finally:
        subspan.set_num_threads(before)
    for r in results[1:]:
        for a, c in zip(r, results[0], strict=True):
            np.testing.assert_array_equal(a, c)


def test_coordinates_are_not_stored(rng):
    """Work memory does not grow with the sequence."""
    W = rng.standard_normal((64, 496)).astype(np.float32)
    peaks = []
    before = subspan.get_num_threads()
    subspan.set_num_threads(1)  # the peak of two depends on whether their tiles meet
    try:
        for T in (4096, 16384):
            z = rng.standard_normal((T, 32)).astype(np.float32)
            _core.reset_work_memory_peak()
            plucker.mix_project(z, W, None, OFFSETS)
            plucker.mix_project_backward(np.ones((T, 64), np.float32), z, W, None, OFFSETS)
            peaks.append(_core.work_memory_peak())
    finally:
        subspan.set_num_threads(before)
    assert peaks[1] <= 1.1 * peaks[0]
    assert peaks[0] < 4096 * 496 * 4 / 2


# -- decoding ----------------------------------------------------------------------------------------------------------

DECODED = [name for name, v in VARIANTS.items() if v.get("causal", True)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DECODED)
def test_decoding_is_the_whole_sequence_to_the_bit(rng, name, dtype):
    z, offsets, variant = build(rng, name, dtype, batch=(3,), T=70, r=6)
    W, b = rng.standard_normal((9, 15)).astype(dtype), rng.standard_normal(9).astype(dtype)
    weights, mask = variant.pop("weights", None), variant.pop("mask", None)
    shared = weights if weights is not None and weights.ndim == 1 else None
    if weights is not None:
        variant.setdefault("weighting", "given")
    want = plucker.mix_project(z, W, b, offsets, weights=weights, mask=mask, **variant)
    state = plucker.MixState(offsets, 6, W=W, b=b, weights=shared, **variant)
    every = None if weights is None else np.broadcast_to(weights, (3, 70, len(offsets)))
    for t in range(70):
        row = every[:, t] if shared is None and weights is not None else None
        got = state.step(z[:, t], weights=row, mask=None if mask is None else mask[:, t])
        np.testing.assert_array_equal(got, want[:, t])
    assert state.position == 70
    variant.pop("bias", None)
    want = plucker.mix(z, offsets, weights=weights, mask=mask, **variant)
    state = plucker.MixState(offsets, 6, weights=shared, **variant)
    state.prefill(z[:, :40], mask=None if mask is None else mask[:, :40])
    for t in range(40, 70):
        row = every[:, t] if shared is None and weights is not None else None
        got = state.step(z[:, t], weights=row, mask=None if mask is None else mask[:, t])
        np.testing.assert_array_equal(got, want[:, t])


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_neighbours(rng, dtype):
    """Nearly parallel tokens take a longer way; the lanes beside them, which decoding does not have, do not."""
    z = rng.standard_normal((3, 60, 6)).astype(dtype)
    z[:, 1::5] = z[:, ::5] * (1 + 1e-3 * rng.standard_normal((3, 12, 6))).astype(dtype)
    z[1, 30:] = z[1, 29]
    state, want = plucker.MixState(OFFSETS, 6), plucker.mix(z, OFFSETS)
    for t in range(60):
        np.testing.assert_array_equal(state.step(z[:, t]), want[:, t])
        np.testing.assert_array_equal(plucker.mix(z[:, : t + 1], OFFSETS)[:, t], want[:, t])


@pytest.mark.parametrize("batch", [(), (1,), (47,), (48,), (49,), (130,), (2, 3), (0,)])
@pytest.mark.parametrize("d", [None, 5, 70])
def test_decoding_batches(rng, batch, d):
    z = rng.standard_normal((*batch, 20, 8)).astype(np.float32)
    W = None if d is None else rng.standard_normal((d, 28)).astype(np.float32)
    want = plucker.mix(z, [1, 3]) if d is None else plucker.mix_project(z, W, None, [1, 3])
    state = plucker.MixState([1, 3], 8, W=W)
    for t in range(20):
        np.testing.assert_array_equal(state.step(z[..., t, :]), want[..., t, :])
    out = np.empty((*batch, 2 * want.shape[-1]), np.float32)[..., ::2]
    again = plucker.MixState([1, 3], 8, W=W).prefill(z[..., :19, :])
    assert again.step(z[..., 19, :], out=out) is out
    np.testing.assert_array_equal(out, want[..., 19, :])


def test_masked_padding_may_hold_anything(rng):
    """Left padding of NaN: the whole sequence, prefill and steps agree to the bit."""
    z = rng.standard_normal((3, 30, 6))
    mask = np.ones((3, 30), bool)
    mask[0, :12], mask[1, :5] = False, False
    z[~mask] = np.nan
    want = plucker.mix(z, [1, 4], mask=mask)
    state = plucker.MixState([1, 4], 6).prefill(z[:, :10], mask=mask[:, :10])
    for t in range(10, 30):
        np.testing.assert_array_equal(state.step(z[:, t], mask=mask[:, t]), want[:, t])
        state = pickle.loads(pickle.dumps(state))
    with pytest.raises(ValueError, match="z_t holds NaN"):
        state.step(z[:, 0])


def test_long_offsets_cost_nothing_before_they_apply(rng):
    z = rng.standard_normal((50, 6))
    state = plucker.MixState([1, 10**9], 6)
    for t in range(50):
        np.testing.assert_array_equal(state.step(z[t]), plucker.mix(z[: t + 1], [1, 10**9])[t])
    again = pickle.loads(pickle.dumps(state))
    np.testing.assert_array_equal(again.step(z[0]), state.step(z[0]))


def test_an_empty_prompt_fixes_nothing(rng):
    z = rng.standard_normal((2, 5, 6))
    state = plucker.MixState([1], 6).prefill(z[:, :0])
    assert state.step(z[0, 0].astype(np.float32)).shape == (15,)


def test_prefill_in_parts(rng):
    z = rng.standard_normal((3, 60, 6))
    whole = plucker.MixState([2, 7], 6, rope="half").prefill(z)
    parts = plucker.MixState([2, 7], 6, rope="half")
    for a, b in ((0, 3), (3, 4), (4, 40), (40, 60)):
        parts.prefill(z[:, a:b])
    assert parts.position == whole.position == 60
    np.testing.assert_array_equal(parts.step(z[:, 0]), whole.step(z[:, 0]))


def test_a_state_in_many_threads(rng):
    """One call at a time: no token is lost, whatever their order."""
    z = rng.standard_normal(6)
    state = plucker.MixState([1, 2], 6)
    pool = [threading.Thread(target=lambda: [state.step(z) for _ in range(100)]) for _ in range(4)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    assert state.position == 400


def test_states_are_saved(rng, tmp_path):
    z = rng.standard_normal((3, 40, 6))
    W, b = rng.standard_normal((4, 15)), rng.standard_normal(4)
    state = plucker.MixState(
        [2, 7], 6, W=W, b=b, weights=np.array([0.5, 1.0]), weighting="softmax", rope="half", norm=None
    )
    fresh = pickle.loads(pickle.dumps(state))
    assert repr(fresh) == repr(state)
    assert "<no tokens yet>" in repr(state)
    state.prefill(z[:, :3])
    early = pickle.loads(pickle.dumps(state))  # fewer tokens than the ring holds
    np.testing.assert_array_equal(early.step(z[:, 3]), state.step(z[:, 3]))
    for t in range(4, 30):
        state.step(z[:, t])
    state.save(tmp_path / "state.npz")
    others = [plucker.MixState.load(tmp_path / "state.npz"), pickle.loads(pickle.dumps(state)), state.copy()]
    assert "norm=None" in repr(state)
    assert "<30 tokens of float64, batch (3,)>" in repr(others[0])
    for t in range(30, 40):
        want = state.step(z[:, t])
        for other in others:
            np.testing.assert_array_equal(other.step(z[:, t]), want)
    assert state.reset().position == 0
    assert state.step(z[0, 0]).shape == (4,)  # another batch


def test_damaged_states(rng, tmp_path):
    state = plucker.MixState([2], 6).prefill(rng.standard_normal((5, 6)))
    state.save(tmp_path / "a.npz")
    (tmp_path / "b.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:200])
    with pytest.raises(ValueError, match="not a readable MixState file"):
        plucker.MixState.load(tmp_path / "b.npz")
    with np.load(tmp_path / "a.npz") as f:
        parts = dict(f)
    np.savez(tmp_path / "c.npz", **{**parts, "tokens": parts["tokens"][:1]})
    with pytest.raises(ValueError, match="damaged MixState file"):
        plucker.MixState.load(tmp_path / "c.npz")
    np.savez(tmp_path / "d.npz", **{k: v for k, v in parts.items() if k != "offsets"})
    with pytest.raises(ValueError, match="lacks offsets"):
        plucker.MixState.load(tmp_path / "d.npz")
    with pytest.raises(FileNotFoundError):
        plucker.MixState.load(tmp_path / "e.npz")
    for name, value in (
        ("r", np.array(2**62)),
        ("r", np.array(2**40)),
        ("r", np.array([6, 6])),
        ("batch", np.array([2**40])),
        ("batch", np.array([-1])),
        ("position", np.array(2**62)),
        ("position", np.array(-3)),
        ("format", np.array("")),
        ("counts", parts["counts"][:1]),
        ("tokens", parts["tokens"].astype(int)),
        ("offsets", np.array([0])),
    ):
        np.savez(tmp_path / "f.npz", **{**parts, name: value})
        with pytest.raises(ValueError, match="damaged MixState file"):
            plucker.MixState.load(tmp_path / "f.npz")


def test_a_refused_token_changes_nothing(rng):
    z = rng.standard_normal((20, 6)).astype(np.float32)
    state, twin = (plucker.MixState([1, 2], 6, norm=None).prefill(z[:10]) for _ in range(2))
    for bad in (np.nan, np.inf, 1e38):
        token = z[10].copy()
        token[3] = bad
        token[2] = 1e30 if bad == 1e38 else token[2]
        if bad == 1e38:
            twin_state = plucker.MixState([1, 2], 6, norm=None).prefill(np.full((3, 6), 1e30, np.float32) * z[:3])
            position = twin_state.position
            with pytest.raises(ValueError, match="overflows"):
                twin_state.step(token)
            assert twin_state.position == position
            continue
        with pytest.raises(ValueError, match="holds NaN or infinity; the state is as it was"):
            state.step(token)
        with pytest.raises(ValueError, match="holds NaN or infinity"):
            state.prefill(np.stack([z[10], token]))
    with pytest.raises(TypeError, match="z_t must be float32"):
        state.step(z[10].astype(np.float64))
    with pytest.raises(ValueError, match="z_t is a batch of shape"):
        state.step(z[10:12])
    assert state.position == 10
    for t in range(10, 20):
        np.testing.assert_array_equal(state.step(z[t]), twin.step(z[t]))


# -- arguments ---------------------------------------------------------------------------------------------------------


def test_what_is_refused(rng):
    z, W = rng.standard_normal((20, 6)), rng.standard_normal((4, 15))
    with pytest.raises(ValueError, match="a plane needs at least 2"):
        plucker.mix(z[:, :1], 1)
    with pytest.raises(ValueError, match=r"z must have shape \(..., T, r\)"):
        plucker.mix(z[0], 1)
    for offsets, error, text in (
        ([1, 0], ValueError, "offsets holds 0"),
        ([-2], ValueError, "lies ahead; pass causal=False"),
        ([], ValueError, "offsets is empty"),
        ([1.5], TypeError, "whole numbers"),
        ([True], TypeError, "whole numbers"),
        ("12", TypeError, "whole numbers"),
        ([2**50], ValueError, "more than any sequence has"),
        (np.array(0), ValueError, "offsets holds 0"),
        (np.array(1.5), TypeError, "whole numbers"),
    ):
        with pytest.raises(error, match=text):
            plucker.mix(z, offsets)
        with pytest.raises(error, match=text):
            plucker.mix_project(z, W, None, offsets)
    with pytest.raises(ValueError, match="lies ahead; decoding has no tokens ahead"):
        plucker.MixState([-1], 6)
    with pytest.raises(ValueError, match="r must be at most 65536"):
        plucker.MixState([1], 2**40)
    for variant, error, text in (
        ({"norm": "l2"}, ValueError, "norm must be None, 'clamp' or 'soft'"),
        ({"eps": -1.0}, ValueError, "eps must be finite and not negative"),
        ({"eps": np.nan}, ValueError, "eps must be finite"),
        ({"eps": 1e120}, ValueError, "eps must be below"),
        ({"order": "past"}, ValueError, "order must be 'current-first' or 'past-first'"),
        ({"rope": "neox"}, ValueError, "rope must be None, 'interleaved' or 'half'"),
        ({"rope": "half", "rope_base": 0.0}, ValueError, "rope_base must be positive"),
        ({"rope_start": 1.5}, TypeError, "rope_start must be an integer"),
        ({"weighting": "sum"}, ValueError, "weighting must be 'mean', 'given' or 'softmax'"),
        ({"weighting": "softmax"}, ValueError, "needs weights"),
        ({"weighting": "mean", "weights": np.ones(2)}, ValueError, "takes no weights"),
        ({"weights": np.ones(3)}, ValueError, "one entry for each of the 2 offsets"),
        ({"weights": np.ones((7, 2))}, ValueError, "do not broadcast"),
        ({"weights": np.ones(2, np.float32)}, TypeError, "weights must be float64 as z is"),
        ({"weights": np.ones(2, int)}, TypeError, "weights must be float32 or float64"),
        ({"mask": np.ones(20)}, TypeError, "mask must be boolean"),
        ({"mask": np.ones(7, bool)}, ValueError, "mask, shape"),
        ({"out": np.empty((20, 14))}, ValueError, "out must have shape"),
        ({"out": np.empty((20, 15), np.float32)}, TypeError, "out must be float64"),
    ):
        with pytest.raises(error, match=text):
            plucker.mix(z, [1, 2], **variant)
    with pytest.raises(ValueError, match="rope turns pairs of dimensions"):
        plucker.mix(z[:, :5], 1, rope="half")
    with pytest.raises(ValueError, match="bias must be 'weighted' or 'always'"):
        plucker.mix_project(z, W, None, 1, bias="kept")
    with pytest.raises(ValueError, match=r"W must have shape \(d, 15\)"):
        plucker.mix_project(z, W[:, :14], None, 1)
    with pytest.raises(TypeError, match="W must be float64 as z is"):
        plucker.mix_project(z, W.astype(np.float32), None, 1)
    with pytest.raises(ValueError, match=r"b must have shape \(4,\)"):
        plucker.mix_project(z, W, np.ones(3), 1)
    with pytest.raises(ValueError, match=r"grad must have shape \(20, 4\)"):
        plucker.mix_project_backward(np.ones((20, 5)), z, W, None, 1)
    with pytest.raises(TypeError, match="grad must be float64 as z is"):
        plucker.mix_backward(np.ones((20, 15), np.float32), z, 1)
    with pytest.raises(TypeError, match="z must be float32 or float64"):
        plucker.mix(z.astype(int), 1)
    big = rng.standard_normal((20, 15))
    with pytest.raises(ValueError, match="out"):
        plucker.mix(big[:, :6], 1, out=big)
    with pytest.raises(ValueError, match="out"):
        plucker.mix(z, [1, 2], weights=big[5, :2], out=big)
    for shared in ("W", "b", "weights"):
        out = rng.standard_normal((20, 4))
        arguments = {"W": W, "b": np.ones(4), "weights": np.ones(2)}
        arguments[shared] = {"W": np.broadcast_to(out[:4, :1], (4, 15)), "b": out[3], "weights": out[3, :2]}[shared]
        with pytest.raises(ValueError, match="out"):
            plucker.mix_project(z, offsets=[1, 2], out=out, **arguments)
    for arguments, error, text in (
        (([1], 1), ValueError, "r must be at least 2"),
        (([1], 6.0), TypeError, "r must be an integer"),
    ):
        with pytest.raises(error, match=text):
            plucker.MixState(*arguments)
    with pytest.raises(ValueError, match="b is given and W is not"):
        plucker.MixState([1], 6, b=np.ones(4))
    with pytest.raises(ValueError, match=r"z_t must have shape \(..., 6\)"):
        plucker.MixState([1], 6).step(z[0, :5])
    with pytest.raises(ValueError, match=r"z must have shape \(..., T, 6\)"):
        plucker.MixState([1], 6).prefill(z[0])
    with pytest.raises(ValueError, match="needs weights"):
        plucker.MixState([1], 6, weighting="softmax").step(z[0])


def test_one_offset_may_be_a_number(rng):
    z = rng.standard_normal((20, 6))
    np.testing.assert_array_equal(plucker.mix(z, 3), plucker.mix(z, [3]))
    np.testing.assert_array_equal(plucker.mix(z, np.int32(3)), plucker.mix(z, np.array([3])))
    np.testing.assert_array_equal(plucker.mix(z, range(1, 4)), plucker.mix(z, [1, 2, 3]))


def test_pieces_of_layers_that_do_not_collapse(rng):
    """A nonlinearity for every offset: mix() with one offset gives its coordinates."""
    z, W = rng.standard_normal((30, 6)), rng.standard_normal((4, 15))
    got = sum(np.tanh(plucker.mix(z, d) @ W.T) for d in (1, 2))
    i, j = np.triu_indices(6, 1)
    want = np.zeros((30, 4))
    for t, d in itertools.product(range(30), (1, 2)):
        if t >= d:
            p = z[t, i] * z[t - d, j] - z[t, j] * z[t - d, i]
            want[t] += np.tanh(W @ (p / np.linalg.norm(p)))
    np.testing.assert_allclose(got, want, atol=1e-12)


# -- positions of each sequence ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rope", ["interleaved", "half"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_left_padding_changes_nothing(rng, rope, dtype):
    """Sequences of several lengths, padded on the left: bit for bit what each gives alone, gradients included."""
    r, lengths, longest = 6, (9, 5, 1, 7), 9
    offsets, W = [1, 2, 4], rng.standard_normal((5, 15)).astype(dtype)
    parts = [rng.standard_normal((n, r)).astype(dtype) for n in lengths]
    z, mask = np.zeros((4, longest, r), dtype), np.zeros((4, longest), bool)
    for i, x in enumerate(parts):
        z[i, longest - len(x) :] = x
        mask[i, longest - len(x) :] = True
    pads = longest - np.array(lengths)
    starts = 3 - pads
    settings = {"rope": rope, "rope_start": starts, "mask": mask}
    mixed, projected = plucker.mix(z, offsets, **settings), plucker.mix_project(z, W, None, offsets, **settings)
    grad = rng.standard_normal(projected.shape).astype(dtype)
    dz = plucker.mix_project_backward(grad, z, W, None, offsets, **settings)[0]
    dz_mix = plucker.mix_backward(rng.standard_normal(mixed.shape).astype(dtype), z, offsets, **settings)
    assert np.isfinite(dz_mix).all()
    for i, x in enumerate(parts):
        at = slice(longest - len(x), None)
        np.testing.assert_array_equal(mixed[i, at], plucker.mix(x, offsets, rope=rope, rope_start=3))
        np.testing.assert_array_equal(
            projected[i, at], plucker.mix_project(x, W, None, offsets, rope=rope, rope_start=3)
        )
        alone = plucker.mix_project_backward(grad[i, at], x, W, None, offsets, rope=rope, rope_start=3)[0]
        np.testing.assert_allclose(dz[i, at], alone, rtol=1e-4 if dtype == np.float32 else 1e-12, atol=1e-6)
        assert not dz[i, : longest - len(x)].any()
    state = plucker.MixState(offsets, r, W=W, rope=rope, rope_start=starts)
    last = [state.step(z[:, t], mask=mask[:, t]) for t in range(longest)]
    np.testing.assert_array_equal(np.stack(last, 1), projected)
    again = pickle.loads(pickle.dumps(state))
    token = rng.standard_normal((4, r)).astype(dtype)
    np.testing.assert_array_equal(again.step(token), state.step(token))


def test_positions_of_sequences_fit_or_are_refused(rng):
    z = rng.standard_normal((2, 3, 5, 4))
    one = plucker.mix(z, [1], rope="half", rope_start=2)
    np.testing.assert_array_equal(plucker.mix(z, [1], rope="half", rope_start=np.full((2, 3), 2)), one)
    np.testing.assert_array_equal(plucker.mix(z, [1], rope="half", rope_start=[2, 2, 2]), one)
    np.testing.assert_array_equal(plucker.mix(z, [1], rope="half", rope_start=torch.tensor([[2], [2]])), one)
    with pytest.raises(ValueError, match="broadcast"):
        plucker.mix(z, [1], rope="half", rope_start=[1, 2])
    with pytest.raises(TypeError, match="integer"):
        plucker.mix(z, [1], rope="half", rope_start=np.ones(3))
    with pytest.raises(ValueError, match="2\\*\\*40"):
        plucker.mix(z, [1], rope="half", rope_start=[2**41, 0, 0])
