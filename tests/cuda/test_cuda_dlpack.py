"""Arrays that the kernels know only through DLPack: here NumPy's, which say that they are on the emulated device."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from subspan import grassmann, orth


def named(capsule, kind, number):
    """The capsule of a host array, with another device written into it."""
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    versioned = "versioned" in repr(capsule)
    base = pointer(capsule, b"dltensor_versioned" if versioned else b"dltensor") + (32 if versioned else 0)
    (ctypes.c_int32 * 2).from_address(base + 8)[:] = [kind, number]
    return capsule


class Lent:
    def __init__(self, x: np.ndarray) -> None:
        self.x, self.shape, self.dtype, self.streams = x, x.shape, x.dtype, []
        self.inside = (2, 0)

    def __dlpack_device__(self):
        return (2, 0)

    def __dlpack__(self, *, stream=None, max_version=None):
        self.streams.append(stream)
        capsule = self.x.__dlpack__(max_version=max_version)
        return named(capsule, *self.inside)


@pytest.mark.parametrize("strided", [False, True])
def test_lent_arrays_are_read_where_they_are(emulation, rng, strided):
    C = rng.standard_normal((80, 48)).astype(np.float32)
    C = C[::2, ::-1] if strided else C
    U = np.linalg.qr(rng.standard_normal((C.shape[0], 5)))[0].astype(np.float32)
    want = C.astype(np.float64)
    want -= U.astype(np.float64) @ (U.T.astype(np.float64) @ want)
    c, out = Lent(C), emulation.put(np.zeros(C.shape, np.float32))
    assert orth.project_out(c, Lent(U), out=out) is out
    assert np.abs(emulation.get(out) - want).max() < 1e-5
    assert c.streams == [1]  # the standard's number of the default stream
    orth.project_out(c, Lent(U), out=c)
    assert np.abs(c.x - want).max() < 1e-5


def test_read_only_arrays_are_not_written(emulation, rng):
    C = rng.standard_normal((20, 8)).astype(np.float32)
    U = np.linalg.qr(rng.standard_normal((20, 2)))[0].astype(np.float32)
    before = C.copy()
    C.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        orth.project_out(Lent(C), Lent(U), out=Lent(C))
    np.testing.assert_array_equal(C, before)
    with pytest.raises(TypeError, match="C must be float16, bfloat16, float32 or float64, got int64"):
        orth.project_out(Lent(np.ones((20, 8), np.int64)), Lent(U), out=Lent(before))


@pytest.mark.parametrize("inside", [(1, 0), (2, 1), (3, 0)])
def test_capsules_of_another_device_than_said_are_refused(emulation, rng, inside):
    c = Lent(rng.standard_normal((20, 8)).astype(np.float32))
    c.inside = inside
    U = Lent(np.linalg.qr(rng.standard_normal((20, 2)))[0].astype(np.float32))
    with pytest.raises(ValueError, match="capsule names device type"):
        orth.project_out(c, U, out=emulation.put(np.zeros((20, 8), np.float32)))


class Moved(Lent):
    """An address that no item begins at."""

    def __dlpack__(self, *, stream=None, max_version=None):
        capsule = super().__dlpack__(stream=stream, max_version=max_version)
        pointer = ctypes.pythonapi.PyCapsule_GetPointer(capsule, b"dltensor_versioned")
        ctypes.c_uint64.from_address(pointer + 32).value += 2
        return capsule


def test_misaligned_arrays_are_refused(emulation, rng):
    U = Lent(np.linalg.qr(rng.standard_normal((20, 2)))[0].astype(np.float32))
    with pytest.raises(ValueError, match="aligned"):
        orth.project_out(Moved(np.zeros((20, 8), np.float32)), U, out=emulation.put(np.zeros((20, 8), np.float32)))


def test_arrays_of_jax_are_not_written(emulation, rng):
    """Their capsules do not all say that they may not be."""
    kind = type("ArrayImpl", (Lent,), {"__module__": "jaxlib._jax"})
    C, U = rng.standard_normal((8, 4)), np.linalg.qr(rng.standard_normal((8, 2)))[0]
    out = np.zeros_like(C)
    with pytest.raises(TypeError, match="JAX arrays are immutable"):
        orth.project_out(emulation.put(C), emulation.put(U), out=kind(out))
    point = kind(U.copy())
    with pytest.raises(TypeError, match="U: JAX arrays are immutable, and this changes it in place"):
        grassmann.sgd_step(point, emulation.put(U), lr=0.1)
    assert not out.any()
    np.testing.assert_array_equal(point.x, U)
