"""As much of CuPy as subspan uses, over the memory of the emulated device.

Every allocation ends at a page that may not be touched, so that a kernel that reads or writes past an array stops the
process instead of passing; fresh memory is NaN.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
import types
import weakref

import numpy as np

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
allocated = 0


def _guarded(count: int, dtype: np.dtype) -> np.ndarray:
    global allocated
    bytes_ = -(-max(count * dtype.itemsize, 1) // 16) * 16
    allocated += bytes_
    page = mmap.PAGESIZE
    size = -(-bytes_ // page) * page
    start = _libc.mmap(None, size + page, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if start in (None, ctypes.c_void_p(-1).value):
        raise MemoryError
    if _libc.mprotect(start + size, page, 0) != 0:
        raise OSError(ctypes.get_errno())
    buffer = (ctypes.c_ubyte * (count * dtype.itemsize)).from_address(start + size - bytes_)
    weakref.finalize(buffer, _libc.munmap, start, size + page)
    out = np.frombuffer(buffer, dtype=np.uint8)
    out[...] = 0xFF
    return out.view(dtype)


class _Memory:
    def __init__(self, ptr: int) -> None:
        self.ptr = ptr


class _Device:
    def __init__(self, id: int | None = None) -> None:
        self.id = cuda.current if id is None else id

    def __enter__(self):
        self._before, cuda.current = cuda.current, self.id
        return self

    def __exit__(self, *_):
        cuda.current = self._before


class ndarray:  # noqa: N801
    __module__ = "cupy"

    def __init__(self, host: np.ndarray, device: int = 0) -> None:
        self._host, self._device = host, device

    data = property(lambda self: _Memory(self._host.__array_interface__["data"][0]))
    shape = property(lambda self: self._host.shape)
    strides = property(lambda self: self._host.strides)
    dtype = property(lambda self: self._host.dtype)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    nbytes = property(lambda self: self._host.nbytes)
    device = property(lambda self: _Device(self._device))
    T = property(lambda self: ndarray(self._host.T, self._device))

    def _work(self):
        """CuPy's own operations run on the current device, and refuse arrays of another one."""
        if self._device != cuda.current:
            raise ValueError(f"the array is on device {self._device} and the current one is {cuda.current}")

    def __getitem__(self, key):
        return ndarray(self._host[key], self._device)

    def __setitem__(self, key, value):
        self._work()
        self._host[key] = value._host if isinstance(value, ndarray) else value

    def reshape(self, *shape):
        return ndarray(self._host.reshape(*shape), self._device)

    def astype(self, dtype):
        self._work()
        return asarray(self._host.astype(dtype), self._device)

    def sum(self, axis=None):
        self._work()
        return asarray(self._host.sum(axis=axis), self._device)

    def __ne__(self, other):
        self._work()
        return asarray(self._host != other, self._device)

    __hash__ = None

    def _with(self, other, f):
        self._work()
        return asarray(f(self._host, other._host if isinstance(other, ndarray) else other), self._device)

    def __matmul__(self, other):
        return self._with(other, np.matmul)

    def __sub__(self, other):
        return self._with(other, np.subtract)

    def __add__(self, other):
        return self._with(other, np.add)

    def __mul__(self, other):
        return self._with(other, np.multiply)

    __rmul__ = __mul__

    def __neg__(self):
        self._work()
        return asarray(-self._host, self._device)

    def swapaxes(self, a, b):
        return ndarray(self._host.swapaxes(a, b), self._device)

    def copy(self):
        self._work()
        return asarray(self._host, self._device)

    def __float__(self):
        return float(self._host)

    def get(self) -> np.ndarray:
        return self._host.copy()

    def __dlpack__(self, **_):
        raise BufferError("the fake lends nothing")

    def __dlpack_device__(self):
        return (2, self._device)

    def __array__(self, *_, **__):
        raise TypeError("implicit conversion to a NumPy array is not allowed")


def empty(shape, dtype=np.float64):
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    dtype = np.dtype(dtype)
    return ndarray(_guarded(math.prod(shape), dtype).reshape(shape), cuda.current)


def asarray(x, device: int | None = None) -> ndarray:
    x = np.asarray(x)
    with _Device(device):
        out = empty(x.shape, x.dtype)
    out._host[...] = x
    return out


def broadcast_to(x: ndarray, shape) -> ndarray:
    return ndarray(np.broadcast_to(x._host, shape), x._device)


def ascontiguousarray(x: ndarray) -> ndarray:
    return asarray(x._host, x._device)


def einsum(what, x: ndarray) -> ndarray:
    return ndarray(np.einsum(what, x._host), x._device)


cuda = types.SimpleNamespace(
    current=0,
    stream=0,
    Device=_Device,
    runtime=types.SimpleNamespace(getDevice=lambda: cuda.current),
    get_current_stream=lambda device=None: types.SimpleNamespace(ptr=cuda.stream),
)


def install() -> types.ModuleType:
    sys.modules["cupy"] = sys.modules[__name__]
    return sys.modules[__name__]
