"""The array glue: what goes in without a copy, what is refused, what comes out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
import torch

from subspan import _core, grassmann, orth, plucker
from subspan.svd import FrequentDirections, StreamingSVD, product_svd, truncated_svd

jax.config.update("jax_enable_x64", True)

MAKERS = {
    "numpy": np.array,
    "torch": lambda x: torch.from_numpy(np.array(np.asarray(x))),
    "jax": lambda x: jnp.asarray(np.array(x)),
}
TYPES = {"numpy": np.ndarray, "torch": torch.Tensor, "jax": jax.Array}


@pytest.fixture(params=sorted(MAKERS))
def library(request):
    return request.param


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_zero_copy(library, dtype):
    x = MAKERS[library](np.arange(12, dtype=dtype).reshape(3, 4))
    name, shape, strides, address = _core.inspect_array(x)
    assert (name, shape, strides) == (dtype, (3, 4), (4, 1))
    if library == "numpy":
        assert address == x.ctypes.data
    elif library == "torch":
        assert address == x.data_ptr()
    else:
        assert address == x.unsafe_buffer_pointer()


def test_views_keep_their_strides():
    a = np.zeros((6, 8), dtype=np.float32)
    assert _core.inspect_array(a.T)[2] == (1, 8)
    assert _core.inspect_array(a[::2, ::-1])[2] == (16, -1)
    assert _core.inspect_array(np.broadcast_to(a[0], (5, 8)))[2] == (0, 1)
    t = torch.zeros(6, 8)
    assert _core.inspect_array(t.T)[2] == (1, 8)
    assert _core.inspect_array(t[1:, 2:])[3] == t[1:, 2:].data_ptr()


@pytest.mark.parametrize(
    "view", [lambda a: a, lambda a: a.T, lambda a: a[::2], lambda a: a[:, ::-1], lambda a: a[3:, 5:]]
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_strided_input_gives_the_same_result(rng, view, dtype):
    a = view(rng.standard_normal((150, 150)).astype(dtype))
    for method in ("gram", "robust"):
        one, two = StreamingSVD(5, method=method), StreamingSVD(5, method=method)
        for i in range(0, a.shape[0], 40):
            one.update(a[i : i + 40])
            two.update(np.ascontiguousarray(a[i : i + 40]))
        np.testing.assert_array_equal(one.singular_values, two.singular_values)
        np.testing.assert_array_equal(one.components, two.components)


def test_results_are_of_the_input_library(rng, library):
    x = MAKERS[library](rng.standard_normal((30, 20)).astype(np.float32))
    svd = StreamingSVD(4, center=True).update(x)
    results = [svd.singular_values, svd.components, svd.mean, svd.project(x), svd.residual(x)]
    results += [
        svd.reconstruct(svd.project(x)),
        *truncated_svd(x, 3, rng=0),
        *product_svd(x, MAKERS[library](np.asarray(x).T)),
    ]
    for r in results:
        assert isinstance(r, TYPES[library])
        assert str(r.dtype).endswith("float32")


def test_same_numbers_from_every_library(rng):
    x = rng.standard_normal((300, 150))
    values = [np.asarray(StreamingSVD(6).update(make(x)).components) for make in MAKERS.values()]
    for v in values[1:]:
        np.testing.assert_array_equal(values[0], v)


@pytest.mark.parametrize(
    "bad", [np.arange(6, dtype=np.int64).reshape(2, 3), np.zeros((2, 3), bool), np.zeros((2, 3), complex)]
)
def test_other_dtypes_are_refused(bad):
    with pytest.raises(TypeError, match="float32 or float64"):
        StreamingSVD(1).update(bad)
    with pytest.raises(TypeError, match="float32 or float64"):
        truncated_svd(bad, 1)
    with pytest.raises(TypeError, match="float32 or float64"):
        _core.inspect_array(bad)


def test_half_precision_is_refused_with_advice():
    for x in (np.zeros((2, 3), np.float16), torch.zeros(2, 3, dtype=torch.bfloat16), jnp.zeros((2, 3), jnp.bfloat16)):
        with pytest.raises(TypeError, match="convert"):
            StreamingSVD(1).update(x)
    with pytest.raises(TypeError, match="bfloat16"):
        _core.inspect_array(torch.zeros(2, 3, dtype=torch.bfloat16))


def test_not_an_array():
    with pytest.raises(TypeError, match="rows must be an array"):
        StreamingSVD(1).update("text")
    with pytest.raises(TypeError, match="must be an array"):
        _core.inspect_array(object())


CALLS = {
    "project_out": ("C", lambda x: orth.project_out(x, np.eye(8, 2))),
    "basis": ("U", lambda x: orth.project_out(np.ones((8, 6)), x)),
    "householder_qr": ("A", orth.householder_qr),
    "range_basis": ("A", orth.range_basis),
    "truncated_svd": ("A", lambda x: truncated_svd(x, 2)),
    "update": ("rows", lambda x: StreamingSVD(2).update(x)),
    "weight": ("weight", lambda x: StreamingSVD(2, weight=x)),
    "exp": ("U", lambda x: grassmann.exp(x, np.ones((8, 6)))),
    "tangent": ("H", lambda x: grassmann.exp(np.eye(8, 6), x)),
    "mix": ("z", lambda x: plucker.mix(x, [1])),
    "coordinates": ("A", plucker.coordinates),
    "out": ("out", lambda x: orth.project_out(np.ones((8, 6)), np.eye(8, 2), out=x)),
}
SPARSE_TOO = ("truncated_svd", "update", "weight")


@pytest.mark.parametrize("what", CALLS)
def test_what_is_no_array_is_named(what):
    name, call = CALLS[what]
    bad = [("text", "must be an array"), (object(), "must be an array")]
    bad += [(torch.empty(8, 6, device="meta"), "meta device"), (torch.ones(8, 6).to_sparse(), "to_dense")]
    bad += [] if what in SPARSE_TOO else [(scipy.sparse.csr_array(np.ones((8, 6))), "toarray")]
    for x, why in bad:
        with pytest.raises(TypeError, match=rf"^{name}\b.*{why}"):
            call(x)
    if what != "out":
        with pytest.raises(TypeError, match=rf"^{name}\b.*bfloat16"):
            call(torch.ones(8, 6, dtype=torch.bfloat16))


def test_a_stream_says_which_float_it_wants():
    for first, wanted in ((np.float32, "float32"), (np.float64, "float64")):
        svd = StreamingSVD(1).update(np.ones((2, 3), first))
        for x, how in ((np.ones((2, 3), np.float16), "astype"), (torch.ones(2, 3).bfloat16(), "to")):
            with pytest.raises(TypeError, match=rf"must be {wanted}.*rows\.{how}\(.*{wanted}"):
                svd.update(x)


def test_lists_are_taken():
    svd = StreamingSVD(1).update([[3.0, 0.0], [0.0, 1.0]])
    assert svd.singular_values[0] == pytest.approx(3.0)


def test_a_vector_is_one_row(rng, library):
    x = rng.standard_normal((30, 7))
    one, many = StreamingSVD(3, center=True), StreamingSVD(3, center=True)
    for row in x:
        one.update(MAKERS[library](row))
        many.update(MAKERS[library](row[None]))
    np.testing.assert_array_equal(one.components, many.components)
    row = MAKERS[library](x[0])
    z = one.project(row)
    assert tuple(z.shape) == (3,)
    np.testing.assert_array_equal(z, np.asarray(one.project(row[None]))[0])
    assert tuple(one.residual(row).shape) == ()
    assert float(one.residual(row)) == float(one.residual(row[None])[0])
    np.testing.assert_array_equal(one.reconstruct(z), np.asarray(one.reconstruct(z[None]))[0])
    np.testing.assert_array_equal(
        FrequentDirections(3, 7).update(x[0]).sketch, FrequentDirections(3, 7).update(x[:1]).sketch
    )


def test_big_endian_and_unaligned_are_refused():
    with pytest.raises(TypeError, match="big-endian"):
        _core.inspect_array(np.zeros((2, 2), dtype=">f8"))
    packed = np.zeros(4, dtype=[("a", "i1"), ("b", "<f4", (3,))])["b"]
    with pytest.raises(ValueError, match="aligned"):
        _core.inspect_array(packed)


def test_torch_that_requires_grad_says_so():
    x = torch.zeros(2, 3, requires_grad=True)
    svd = StreamingSVD(1).update(torch.ones(2, 3))
    fd = FrequentDirections(1, 3)
    calls = [svd.update, svd.downdate, svd.project, svd.residual, fd.update, lambda x: truncated_svd(x, 1)]
    calls += [lambda x: product_svd(x, x.T), lambda x: truncated_svd(np.ones((2, 3), np.float32), 1, initial=x)]
    for call in calls:
        with pytest.raises(TypeError, match="autograd does not see"):
            call(x)
    with torch.no_grad():
        svd.project(torch.nn.Parameter(x))
        truncated_svd(torch.nn.Parameter(x), 1)
        fd.update(torch.nn.Parameter(x))


def test_out(rng, library):
    x = MAKERS[library](rng.standard_normal((10, 6)))
    svd = StreamingSVD(2).update(x)
    want = np.asarray(svd.project(x))
    if library == "jax":
        with pytest.raises(TypeError, match="immutable"):
            svd.project(x, out=x)
        return
    out = MAKERS[library](np.zeros((10, 2)))
    assert svd.project(x, out=out) is out
    np.testing.assert_array_equal(np.asarray(out), want)
    with pytest.raises(ValueError, match=r"out must have shape \(10, 2\)"):
        svd.project(x, out=MAKERS[library](np.zeros((10, 3))))
    with pytest.raises(TypeError, match="out must be float64"):
        svd.project(x, out=MAKERS[library](np.zeros((10, 2), dtype=np.float32)))


def test_out_into_a_view_and_read_only(rng):
    x = rng.standard_normal((10, 6))
    svd = StreamingSVD(2).update(x)
    big = np.zeros((20, 2))
    svd.project(x, out=big[::2])
    np.testing.assert_array_equal(big[::2], svd.project(x))
    assert not big[1::2].any()
    big.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        svd.project(x, out=big[:10])


def test_streams_do_not_mix_libraries_or_dtypes(rng):
    x = rng.standard_normal((5, 4))
    svd = StreamingSVD(2).update(x)
    with pytest.raises(TypeError, match="numpy"):
        svd.update(torch.from_numpy(x))
    with pytest.raises(TypeError, match="float64"):
        svd.update(x.astype(np.float32))
    with pytest.raises(TypeError, match="float32"):
        StreamingSVD(2, dtype=np.float32).update(x)
    assert StreamingSVD(2, dtype=torch.float32).dtype == np.float32


class OldExporter:
    """An exporter from before DLPack 1.0: unversioned capsules, no max_version keyword."""

    def __init__(self, x):
        self.x, self.dtype, self.shape = x, x.dtype, x.shape

    def __dlpack__(self):
        return self.x.__dlpack__()

    def __dlpack_device__(self):
        return self.x.__dlpack_device__()


def test_unversioned_dlpack(rng):
    x = rng.standard_normal((4, 3))
    assert _core.inspect_array(OldExporter(x))[3] == x.ctypes.data
    frozen = x.copy()
    frozen.flags.writeable = False
    assert _core.inspect_array(frozen)[3] == frozen.ctypes.data


def test_gpu_arrays_are_refused_without_moving_data():
    class OnGpu(OldExporter):
        def __dlpack_device__(self):
            return (2, 0)

    with pytest.raises(TypeError, match="CUDA"):
        _core.inspect_array(OnGpu(np.zeros((2, 2))))
