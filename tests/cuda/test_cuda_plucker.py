"""Mixing on a device against float64 on the CPU."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from references import BF16, eps, wide
from subspan import plucker

DTYPES = [np.dtype(np.float16), BF16, np.dtype(np.float32), np.dtype(np.float64)]
IDS = ["f16", "bf16", "f32", "f64"]
OFFSETS = [1, 2, 4, 8, 12, 16]
VARIANTS = {
    "mean": {},
    "none": {"norm": None},
    "soft": {"norm": "soft", "eps": 1e-3},
    "past-first": {"order": "past-first"},
    "always": {"bias": "always"},
    "ahead": {"offsets": [1, -2, 5], "causal": False},
    "repeated-and-far": {"offsets": [3, 3, 100, 1]},
    "rope-interleaved": {"rope": "interleaved", "rope_start": 7},
    "rope-half": {"rope": "half", "rope_base": 100.0},
    "given": {"weighting": "given"},
    "softmax": {"weighting": "softmax"},
    "masked": {"masked": True},
    "softmax-masked": {"weighting": "softmax", "masked": True},
}


def case(rng, name, dtype, batch=(2,), T=40, r=8, d=24):
    options = dict(VARIANTS[name])
    offsets = options.pop("offsets", OFFSETS)
    z = rng.standard_normal((*batch, T, r)).astype(dtype)
    W = (rng.standard_normal((d, r * (r - 1) // 2)) / r).astype(dtype)
    b = rng.standard_normal(d).astype(dtype)
    if "weighting" in options:
        options["weights"] = rng.standard_normal((T, len(offsets))).astype(dtype)
    if options.pop("masked", False):
        options["mask"] = rng.random((*batch, T)) > 0.25
    return z, W, b, offsets, options


def on_host(options):
    return {k: wide(v) if k == "weights" else v for k, v in options.items()}


def there(gpu, options):
    return {k: gpu.put(v) if k in ("weights", "mask") else v for k, v in options.items()}


def close(got, want, dtype, scale):
    got = wide(got)
    error = np.abs(got - want).max(initial=0.0)
    scale = max(scale, 20) if dtype == np.float64 else scale  # the reference is in float64 itself
    return bool(error <= scale * eps(dtype) * max(1.0, np.abs(want).max(initial=0.0)))


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("name", VARIANTS)
def test_mix_and_its_gradient(gpu, rng, name, dtype):
    z, _, _, offsets, options = case(rng, name, dtype)
    without = {k: v for k, v in options.items() if k != "bias"}
    out = gpu.twice(lambda: plucker.mix(gpu.put(z), offsets, **there(gpu, without)))
    assert close(gpu.get(out), plucker.mix(wide(z), offsets, **on_host(without)), dtype, 4)
    grad = rng.standard_normal(out.shape).astype(dtype)
    got = gpu.twice(lambda: plucker.mix_backward(gpu.put(grad), gpu.put(z), offsets, **there(gpu, without)))
    want = plucker.mix_backward(wide(grad), wide(z), offsets, **on_host(without))
    if "weights" not in options:
        got, want = (got,), (want,)
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        assert close(gpu.get(g), w, dtype, 20)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("name", VARIANTS)
def test_projection_and_its_gradient(gpu, rng, name, dtype):
    z, W, b, offsets, options = case(rng, name, dtype)
    out = gpu.twice(lambda: plucker.mix_project(gpu.put(z), gpu.put(W), gpu.put(b), offsets, **there(gpu, options)))
    assert close(gpu.get(out), plucker.mix_project(wide(z), wide(W), wide(b), offsets, **on_host(options)), dtype, 8)
    grad = rng.standard_normal(out.shape).astype(dtype)
    args = (gpu.put(grad), gpu.put(z), gpu.put(W), gpu.put(b), offsets)
    got = gpu.twice(lambda: plucker.mix_project_backward(*args, **there(gpu, options)))
    want = plucker.mix_project_backward(wide(grad), wide(z), wide(W), wide(b), offsets, **on_host(options))
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        assert close(gpu.get(g), w, dtype, 20)


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float32)], ids=["bf16", "f32"])
@pytest.mark.parametrize(
    ("r", "d", "T"),
    [
        (2, 1, 3),
        (3, 5, 70),
        (17, 40, 33),
        (32, 300, 20),
        (32, 200, 50),
        (9, 256, 90),
        (5, 129, 7),
        (33, 9, 20),
        (64, 70, 9),
    ],
)
def test_sizes(gpu, rng, dtype, r, d, T):
    z, W, b, offsets, _ = case(rng, "mean", dtype, batch=(3,), T=T, r=r, d=d)
    out = gpu.twice(lambda: plucker.mix_project(gpu.put(z), gpu.put(W), gpu.put(b), offsets))
    want = plucker.mix_project(wide(z), wide(W), wide(b), offsets)
    assert close(gpu.get(out), want, dtype, 8)
    assert close(gpu.get(plucker.mix(gpu.put(z), offsets)), plucker.mix(wide(z), offsets), dtype, 4)
    grad = rng.standard_normal(out.shape).astype(dtype)
    got = plucker.mix_project_backward(gpu.put(grad), gpu.put(z), gpu.put(W), gpu.put(b), offsets)
    for g, w in zip(got, plucker.mix_project_backward(wide(grad), wide(z), wide(W), wide(b), offsets), strict=True):
        assert close(gpu.get(g), w, dtype, 20)


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float32)], ids=["bf16", "f32"])
@pytest.mark.parametrize("options", [{}, {"rope": "half"}, {"masked": True}], ids=["plain", "rope", "masked"])
@pytest.mark.parametrize("offsets", [[1, 5, 40, -3], [700, 1, -60], [65, 64, 63]], ids=["both", "far", "edge"])
def test_tokens_beyond_a_block(gpu, rng, dtype, options, offsets):
    """Several blocks, blocks of two sequences, offsets that leave what a block keeps of its neighbours."""
    z, W, b, _, _ = case(rng, "mean", dtype, batch=(3,), T=150, r=6, d=20)
    options = dict(options)
    if options.pop("masked", False):
        options["mask"] = rng.random((3, 150)) > 0.25
    options["causal"] = min(offsets) > 0
    out = gpu.twice(lambda: plucker.mix_project(gpu.put(z), gpu.put(W), gpu.put(b), offsets, **there(gpu, options)))
    assert close(gpu.get(out), plucker.mix_project(wide(z), wide(W), wide(b), offsets, **options), dtype, 8)
    grad = rng.standard_normal(out.shape).astype(dtype)
    args = (gpu.put(grad), gpu.put(z), gpu.put(W), gpu.put(b), offsets)
    got = plucker.mix_project_backward(*args, **there(gpu, options))
    want = plucker.mix_project_backward(wide(grad), wide(z), wide(W), wide(b), offsets, **options)
    for g, w in zip(got, want, strict=True):
        assert close(gpu.get(g), w, dtype, 20)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize(("T", "r"), [(1, 4), (3, 2), (13, 5), (70, 33)])
def test_gradients_of_any_number_of_tokens(gpu, rng, dtype, T, r):
    z = rng.standard_normal((1, T, r)).astype(dtype)
    grad = rng.standard_normal((1, T, r * (r - 1) // 2)).astype(dtype)
    dz = gpu.twice(lambda: plucker.mix_backward(gpu.put(grad), gpu.put(z), [1, 2]))
    assert close(gpu.get(dz), plucker.mix_backward(wide(grad), wide(z), [1, 2]), dtype, 20)


@pytest.mark.parametrize("shared", [101376, 166912, 232448])
def test_tiles_of_every_size(emulation, rng, shared):
    """What a device has of shared memory decides the tiles; a device of few processors gets the large ones."""
    emulation.control.hardware(9, shared)
    z, W, b, offsets, _ = case(rng, "mean", BF16, batch=(1,), T=300, r=32, d=260)
    out = emulation.twice(lambda: plucker.mix_project(emulation.put(z), emulation.put(W), emulation.put(b), offsets))
    assert close(out.get(), plucker.mix_project(wide(z), wide(W), wide(b), offsets), BF16, 8)
    grad = rng.standard_normal(out.shape).astype(BF16)
    got = plucker.mix_project_backward(*(emulation.put(x) for x in (grad, z, W, b)), offsets)
    for g, w in zip(got, plucker.mix_project_backward(wide(grad), wide(z), wide(W), wide(b), offsets), strict=True):
        assert close(g.get(), w, BF16, 20)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("r", [20, 64])
@pytest.mark.parametrize("hardware", [(8, 101376), (8, 166912), (12, 101376)])
def test_other_devices(emulation, rng, dtype, r, hardware):
    """Right, or an error that says what is lacking, before anything is written."""
    emulation.control.hardware(*hardware)
    z, W, b, offsets, _ = case(rng, "mean", dtype, batch=(1,), T=9, r=r, d=70)
    args = [emulation.put(x) for x in (z, W, b)]
    want = plucker.mix_project(wide(z), wide(W), wide(b), offsets)
    grad = rng.standard_normal(want.shape).astype(dtype)
    lacking = "bytes of shared memory for matrices of these sizes"
    for call, reference in (
        (lambda: (plucker.mix_project(*args, offsets),), (want,)),
        (
            lambda: plucker.mix_project_backward(emulation.put(grad), *args, offsets),
            plucker.mix_project_backward(wide(grad), wide(z), wide(W), wide(b), offsets),
        ),
    ):
        try:
            got = call()
        except ValueError as e:
            assert lacking in str(e)  # noqa: PT017
            assert dtype.itemsize >= 4 or r == 64
            continue
        for x, y in zip(got, reference, strict=True):
            assert close(x.get(), y, dtype, 20)


@pytest.mark.parametrize("layout", ["column-major W", "strided z", "strided grad and out"])
def test_strides(gpu, rng, layout):
    z, W, b, offsets, _ = case(rng, "mean", BF16)
    gz, gw, gb = gpu.put(z), gpu.put(W), gpu.put(b)
    if layout == "column-major W":
        gw = gpu.put(np.ascontiguousarray(W.T)).T
    if layout == "strided z":
        gz = gpu.put(np.repeat(np.repeat(z, 2, -1), 3, -2))[:, ::3, ::2]
    want = plucker.mix_project(wide(z), wide(W), wide(b), offsets)
    if layout == "strided grad and out":
        room = gpu.put(np.zeros((*want.shape[:-1], 2 * want.shape[-1]), BF16))
        out = room[..., ::2]
        assert plucker.mix_project(gz, gw, gb, offsets, out=out) is out
        assert close(gpu.get(out), want, BF16, 8)
        g = gpu.put(np.repeat(rng.standard_normal(want.shape), 2, -1).astype(BF16))[..., ::2]
    else:
        assert close(gpu.get(plucker.mix_project(gz, gw, gb, offsets)), want, BF16, 8)
        g = gpu.put(rng.standard_normal(want.shape).astype(BF16))
    got = plucker.mix_project_backward(g, gz, gw, gb, offsets)
    for x, w in zip(
        got, plucker.mix_project_backward(wide(gpu.get(g)), wide(z), wide(W), wide(b), offsets), strict=True
    ):
        assert close(gpu.get(x), w, BF16, 20)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_equal_parallel_and_zero_tokens(gpu, rng, dtype):
    base = rng.standard_normal(8).astype(dtype)
    z = np.stack([base, base, 2 * base, -base, 0 * base, base, rng.standard_normal(8).astype(dtype), 3 * base, base])
    z = z.astype(dtype)
    out = gpu.get(plucker.mix(gpu.put(z), [1, 2, 4]))
    want = plucker.mix(wide(z), [1, 2, 4])
    assert np.isfinite(wide(out)).all()
    assert close(out, want, dtype, 8)
    grad = np.ones(out.shape, dtype)
    for norm in ("clamp", "soft"):
        dz = gpu.get(plucker.mix_backward(gpu.put(grad), gpu.put(z), [1, 2, 4], norm=norm, eps=1e-2))
        assert np.isfinite(wide(dz)).all()
        assert close(dz, plucker.mix_backward(wide(grad), wide(z), [1, 2, 4], norm=norm, eps=1e-2), dtype, 40)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("exponent", [4, 8, 13])
def test_small_angles(gpu, rng, dtype, exponent):
    """Tokens that differ in a component that is tiny but exact: the coordinate is one, at every angle."""
    z = np.zeros((2, 6))
    z[:, 0] = 1.0
    z[1, 3] = 2.0**-exponent
    out = gpu.get(plucker.mix(gpu.put(z.astype(dtype)), [1]))
    assert close(out, plucker.mix(z, [1]), dtype, 4)


@pytest.mark.parametrize(("dtype", "scale"), [(BF16, 1e30), (BF16, 1e-30), (np.dtype(np.float32), 1e30)])
def test_squares_that_leave_the_range(gpu, rng, dtype, scale):
    z = (rng.standard_normal((12, 6)) * scale).astype(dtype)
    out = gpu.get(plucker.mix(gpu.put(z), [1, 3], eps=0.0))
    assert close(out, plucker.mix(wide(z), [1, 3], eps=0.0), dtype, 8)


def test_masked_tokens_may_hold_anything(gpu, rng):
    z, W, b, offsets, _ = case(rng, "mean", np.dtype(np.float32))
    mask = rng.random(z.shape[:-1]) > 0.3
    dirty = np.where(mask[..., None], z, np.nan).astype(np.float32)
    m = gpu.put(mask)
    a = gpu.get(plucker.mix_project(gpu.put(z), gpu.put(W), gpu.put(b), offsets, mask=m))
    c = gpu.get(plucker.mix_project(gpu.put(dirty), gpu.put(W), gpu.put(b), offsets, mask=m))
    np.testing.assert_array_equal(a, c)
    assert (c[~mask] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["mean", "soft", "given"])
def test_what_is_not_finite_goes_on(gpu, rng, name, dtype, bad):
    """To the tokens that see it, as on the CPU."""
    z, W, b, offsets, options = case(rng, name, dtype, batch=(2,), T=40)
    z[0, 0, 3] = z[0, 21, 2] = z[1, 39, 0] = bad
    g = there(gpu, options)
    with np.errstate(all="ignore"):
        want = plucker.mix(wide(z), offsets, **on_host(options))
        want_too = plucker.mix_project(wide(z), wide(W), wide(b), offsets, **on_host(options))
    got = wide(gpu.get(plucker.mix(gpu.put(z), offsets, **g)))
    got_too = wide(gpu.get(plucker.mix_project(gpu.put(z), gpu.put(W), gpu.put(b), offsets, **g)))
    for a, c in ((got, want), (got_too, want_too)):
        np.testing.assert_array_equal(np.isfinite(a).all(-1), np.isfinite(c).all(-1))


def test_short_ways_refuse_what_the_long_ones_refuse(gpu, rng):
    z, W, b, _, _ = case(rng, "mean", np.dtype(np.float32))
    z, W, b = gpu.put(z), gpu.put(W), gpu.put(b)
    for shape in [(40, 1), (1,), ()]:
        with pytest.raises(ValueError, match="weights must have one entry for each of the 3 offsets"):
            plucker.mix_project(z, W, b, [1, 2, 3], weights=gpu.put(np.ones(shape, np.float32)))
    for wrong in (None, [[1.0]]):
        with pytest.raises((TypeError, ValueError), match="W"):
            plucker.mix_project(z, wrong, b, [1, 2, 3])
    assert plucker.mix_project(z, W, b, [1, 2]).shape == (2, 40, 24)  # checked once,
    for offsets in ([1.0, 2], [True, 2]):  # which have the hash of what was checked
        with pytest.raises(TypeError, match="offsets must be whole numbers"):
            plucker.mix_project(z, W, b, offsets)
    for out in (np.zeros((2, 40, 24), np.float32), np.zeros((1, 40, 24), np.float32), np.zeros((2, 40, 24))):
        if out.dtype != np.float32 or out.shape[0] == 1:
            with pytest.raises((TypeError, ValueError), match="out must"):
                plucker.mix_project(z, W, b, [1, 2], out=gpu.put(out))


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("name", ["mean", "given", "softmax", "rope-half", "repeated-and-far"])
@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
def test_decoding(gpu, rng, name, dtype, batch):
    """Token by token as the whole sequence, also after a prompt and from a copy."""
    z, W, b, offsets, options = case(rng, name, dtype, batch=batch, T=14)
    offsets = [o for o in offsets if o <= 16]
    if "weights" in options:
        options["weights"] = options["weights"][0, : len(offsets)]
    gz, whole = gpu.put(z), on_host(options)
    options = there(gpu, options)
    for with_projection in (False, True):
        kind = {"W": gpu.put(W), "b": gpu.put(b)} if with_projection else {}
        state = plucker.MixState(offsets, z.shape[-1], **kind, **options)
        state.prefill(gz[..., :4, :])
        kept = state.copy()
        rows = [gpu.get(state.step(gz[..., t, :])) for t in range(4, 14)]
        assert state.position == 14
        got = np.stack(rows, -2)
        if with_projection:
            want = plucker.mix_project(wide(z), wide(W), wide(b), offsets, **whole)
        else:
            want = plucker.mix(wide(z), offsets, **whole)
        assert close(got, want[..., 4:, :], dtype, 8)
        np.testing.assert_array_equal(wide(gpu.get(kept.step(gz[..., 4, :]))), wide(rows[0]))


def test_decoding_with_masks(gpu, rng):
    z = rng.standard_normal((3, 12, 6)).astype(np.float32)
    mask = rng.random((3, 12)) > 0.3
    want = plucker.mix(wide(z), [1, 2, 5], mask=mask)
    state = plucker.MixState([1, 2, 5], 6).prefill(gpu.put(z[:, :2]), mask=gpu.put(mask[:, :2]))
    got = [gpu.get(state.step(gpu.put(z[:, t]), mask=gpu.put(mask[:, t]))) for t in range(2, 12)]
    assert close(np.stack(got, 1), want[:, 2:], np.dtype(np.float32), 8)


def test_states_that_are_refused(gpu, rng):
    z = rng.standard_normal((3, 6)).astype(np.float32)
    state = plucker.MixState([1], 6)
    state.step(gpu.put(z))
    with pytest.raises(TypeError, match="tokens before were on another device"):
        state.step(z)
    with pytest.raises(TypeError, match="z_t must be float32 as the tokens before were, got float64"):
        state.step(gpu.put(wide(z)))
    with pytest.raises(ValueError, match="batch of shape"):
        state.step(gpu.put(z[:2]))
    with pytest.raises(TypeError, match="is not saved"):
        state.__getstate__()
    # A mask that does not fit is found before any token is put in its place.
    long = rng.standard_normal((3, 2, 6)).astype(np.float32)
    again = state.copy()
    for wrong in (np.ones((4, 2), bool), np.ones((3, 3), bool)):
        with pytest.raises(ValueError, match=r"mask, shape .* does not broadcast"):
            state.prefill(gpu.put(long), mask=gpu.put(wrong))
    np.testing.assert_array_equal(gpu.get(state.copy().step(gpu.put(z))), gpu.get(again.step(gpu.put(z))))
    assert state.position == 1
    W = gpu.put(np.ones((2, 15), np.float32))
    fresh = plucker.MixState([1], 6, W=W).copy()
    assert fresh.step(gpu.put(z)).shape == (3, 2)
    assert fresh.reset().copy().position == 0
    with pytest.raises(TypeError, match="W is on the CPU and z_t on CUDA device 0"):
        plucker.MixState([1], 6, W=np.ones((2, 15), np.float32)).step(gpu.put(z))


def test_empty(gpu):
    z, W = np.zeros((0, 5, 4), np.float32), np.ones((3, 6), np.float32)
    assert plucker.mix_project(gpu.put(z), gpu.put(W), None, [1]).shape == (0, 5, 3)
    dz, dW, db = plucker.mix_project_backward(
        gpu.put(np.zeros((0, 5, 3), np.float32)), gpu.put(z), gpu.put(W), None, [1]
    )
    assert dz.shape == z.shape
    assert (gpu.get(dW) == 0).all()
    assert db is None


def test_what_is_refused(gpu, rng):
    z, W, b, offsets, _ = case(rng, "mean", np.dtype(np.float32))
    gz, gb = gpu.put(z), gpu.put(b)
    with pytest.raises(ValueError, match=r"W must have shape \(d, 28\)"):
        plucker.mix_project(gz, gpu.put(W[:, :-1]), gb, offsets)
    with pytest.raises(TypeError, match="W must be float32 as z is, got float64"):
        plucker.mix_project(gz, gpu.put(wide(W)), gb, offsets)
    with pytest.raises(TypeError, match="W is on the CPU and z on CUDA device 0"):
        plucker.mix_project(gz, W, gb, offsets)
    with pytest.raises(TypeError, match="z is on the CPU and weights on CUDA device 0"):
        plucker.mix(z, [1], weights=gpu.put(np.ones(1, np.float32)))
    with pytest.raises(TypeError, match="weights is a list, and z is on a CUDA device"):
        plucker.mix(gz, [1], weights=[1.0])
    with pytest.raises(ValueError, match="tokens of 65 dimensions; the CUDA kernels take at most 64"):
        plucker.mix(gpu.put(np.zeros((3, 65), np.float32)), [1])
    with pytest.raises(ValueError, match="offsets must hold between 1 and 64 numbers on a CUDA device, got 65"):
        plucker.mix(gz, list(itertools.repeat(1, 65)))
    with pytest.raises(ValueError, match="grad must have shape"):
        plucker.mix_backward(gpu.put(np.zeros((2, 40, 27), np.float32)), gz, offsets)
    square = gpu.put(np.zeros((4, 3), np.float32))
    with pytest.raises(ValueError, match="out overlaps z"):
        plucker.mix(square, [1], out=square)


def test_host_and_device_arrays_mixed(gpu, rng):
    z, W, b, _, _ = case(rng, "mean", np.dtype(np.float32))
    out, grad = gpu.put(np.zeros((2, 40, 28), np.float32)), gpu.put(np.zeros((2, 40, 24), np.float32))
    calls = {
        "W": lambda: plucker.mix_project(z, gpu.put(W), b, [1, 2]),
        "b": lambda: plucker.mix_project(z, W, gpu.put(b), [1, 2]),
        "out": lambda: plucker.mix(z, [1, 2], out=out),
        "grad": lambda: plucker.mix_project_backward(grad, z, W, b, [1, 2]),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=f"z is on the CPU and {name} on CUDA device 0"):
            call()


@pytest.mark.parametrize("norm", ["clamp", "soft", None])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=IDS[:2])
def test_short_and_long_ways_meet(gpu, rng, dtype, norm):
    """Tokens that are nearly parallel to some of their past, far ones, and others: what one sends the other gathers."""
    z = rng.standard_normal((2, 150, 8)).astype(np.float32)
    z[:, 40] = z[:, 38] * 2
    z[:, 71] = z[:, 70] + 0.01 * rng.standard_normal((2, 8))
    z[0, 90] = 0
    z = z.astype(dtype)
    options = {"norm": norm, "eps": 0.1}
    offsets = [1, 2, 5, 110]
    grad = rng.standard_normal((2, 150, 28)).astype(dtype)
    got = gpu.twice(lambda: plucker.mix_backward(gpu.put(grad), gpu.put(z), offsets, **options))
    want = plucker.mix_backward(wide(grad), wide(z), offsets, **options)
    # Nearly parallel tokens have large gradients, compared by themselves.
    close_by = np.zeros(150, bool)
    for t in (38, 40, 70, 71):
        close_by[t] = True
    for rows in (close_by, ~close_by):
        assert close(gpu.get(got)[:, rows], want[:, rows], dtype, 60 if rows is close_by else 8)


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e18])
def test_sizes_of_tokens_that_send(gpu, rng, size):
    z = (size * rng.standard_normal((70, 8))).astype(BF16)
    grad = rng.standard_normal((70, 28)).astype(BF16)
    got = wide(gpu.get(plucker.mix_backward(gpu.put(grad), gpu.put(z), [1, 3], eps=0.0)))
    want = plucker.mix_backward(wide(grad), wide(z), [1, 3], eps=0.0)
    assert np.abs(got - want).max() <= 8 * eps(BF16) * np.abs(want).max()
    z[20] = np.nan
    got = wide(gpu.get(plucker.mix_backward(gpu.put(grad), gpu.put(z), [1, 3], eps=0.0)))
    touched = [17, 19, 20, 21, 23]
    assert np.isnan(got[touched]).any(axis=-1).all()
    rest = np.setdiff1d(np.arange(70), [*range(14, 27)])
    assert np.abs(got[rest] - want[rest]).max() <= 8 * eps(BF16) * np.abs(want).max()


@pytest.mark.parametrize(
    ("r", "dtype", "shared"), [(21, np.float64, 166912), (55, np.float32, 101376), (17, np.float64, 166912)]
)
def test_sizes_that_fit_small_devices(emulation, rng, r, dtype, shared):
    emulation.control.hardware(8, shared)
    z, W = rng.standard_normal((20, r)).astype(dtype), (rng.standard_normal((9, r * (r - 1) // 2)) / r).astype(dtype)
    grad = rng.standard_normal((20, 9)).astype(dtype)
    got = plucker.mix_project_backward(emulation.put(grad), emulation.put(z), emulation.put(W), None, [1, 2])
    want = plucker.mix_project_backward(wide(grad), wide(z), wide(W), None, [1, 2])
    for x, y in zip(got[:2], want[:2], strict=True):
        assert close(emulation.get(x), y, np.dtype(dtype), 60)


def test_one_offset_has_no_gradient_of_its_logit(gpu, rng):
    z, grad = rng.standard_normal((33, 6)).astype(np.float32), rng.standard_normal((33, 15)).astype(np.float32)
    logits = gpu.put(rng.standard_normal((33, 2)).astype(np.float32))
    _, dlogits = plucker.mix_backward(gpu.put(grad), gpu.put(z), [1, 100], weights=logits, weighting="softmax")
    assert not gpu.get(dlogits).any()
