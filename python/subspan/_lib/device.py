"""Arrays in CUDA device memory: whose they are, the stream that a call runs on, memory for results and work."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from subspan._lib.arrays import Array, detached, library_of

if TYPE_CHECKING:
    from collections.abc import Callable

Context = tuple[int, int, bool, "DeviceMemory"]
"""Stream, device, whether arrays are likely CuPy's, and the library's memory there."""

_CUDA = 2  # DLPack's number of the device type
_WIDE = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64"}


class CudaError(RuntimeError):
    """A CUDA call failed, or there are no CUDA kernels or devices. The error is cleared before it is raised."""


class NotOnDeviceError(TypeError, AttributeError):
    """A function that has no kernel on a device. Also an AttributeError, as ``hasattr`` of the module expects."""


def device_of(x: Any) -> int | None:
    """Number of the CUDA device that ``x`` is on; None for everything else."""
    if isinstance(x, (np.ndarray, float, int)) or x is None:
        return None
    library = library_of(x)
    if library == "cupy":
        return int(x.device.id)
    if library == "torch":
        return int(x.get_device()) if x.is_cuda else None
    where = getattr(x, "__dlpack_device__", None)
    if where is None:
        return None
    try:
        kind, number = where()
    except Exception:  # an array that is spread over devices, or whose memory is gone: its own use will tell
        return None
    return int(number) if int(kind) == _CUDA else None


def on_device(*arrays: Any) -> bool:
    """Whether one of them is in CUDA device memory."""
    return any(device_of(x) is not None for x in arrays)


_module: Any = None


def kernels() -> Any:
    """The extension module with the CUDA kernels, or a CudaError that says how to get it."""
    global _module
    if _module is None:
        try:
            _module = importlib.import_module("subspan._cuda")
        except ModuleNotFoundError:
            raise CudaError(
                "the array is in CUDA device memory, and this build of subspan has no CUDA kernels: build it with nvcc "
                "13 on the PATH, pip install '.[cuda13]' -Ccmake.define.SUBSPAN_CUDA=ON in a checkout, or take a wheel "
                "that was built so"
            ) from None
        except ImportError as e:
            raise CudaError(f"the CUDA kernels of subspan could not be loaded: {e}") from e
    return _module


_dtype_names: dict[Any, str] = {}


def dtype_name(x: Any) -> str:
    dtype = x.dtype
    name = _dtype_names.get(dtype)
    if name is None:
        name = _dtype_names[dtype] = str(dtype).rpartition(".")[2]
    return name


@functools.cache
def context_of(library: str, device: int) -> Callable[[], Context]:
    """What makes the context that bindings take: the library's current stream on a device, and memory there. Looked up
    once, as each attribute takes its share of a microsecond.
    """
    place = DeviceMemory(library, device)
    if library == "torch":
        tensors = sys.modules["torch"].cuda.current_stream
        return lambda: (tensors(device).cuda_stream, device, False, place)
    if library == "cupy":
        arrays = sys.modules["cupy"].cuda.get_current_stream
        return lambda: (arrays(device).ptr, device, True, place)
    return lambda: (0, device, False, place)  # a library that does not tell: the default stream


def check_dtype(x: Any, name: str) -> str:
    if not hasattr(x, "dtype"):
        raise TypeError(f"{name} must be an array on a CUDA device, got {type(x).__name__}")
    dtype = dtype_name(x)
    if dtype not in _WIDE:
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64, got {dtype}; convert it first, e.g. "
            f"{name}.astype('float32') or {name}.to(torch.float32)"
        )
    return dtype


def memory_of(**arrays: Any) -> DeviceMemory:
    """The place of a call's arrays, which must all be on one device; errors name them."""
    first = next(name for name, x in arrays.items() if device_of(x) is not None)
    # Memory and the stream are those of a library that has both; JAX's own stream is not to be had.
    libraries = [library_of(x) for x in arrays.values() if x is not None and device_of(x) is not None]
    library = next((name for name in libraries if name in ("cupy", "torch")), libraries[0])
    device = device_of(arrays[first])
    assert device is not None
    for name, x in arrays.items():
        if x is None or isinstance(x, (int, float, list, tuple)):
            continue  # what is no array is looked at where it is read
        there = device_of(x)
        if there is None:
            raise TypeError(
                f"{name} is on the CPU and {first} on CUDA device {device}; move it first, e.g. "
                f"cupy.asarray({name}) or {name}.to('cuda')"
            )
        if there != device:
            raise ValueError(f"{name} is on CUDA device {there} and {first} on {device}; all must be on one")
    return DeviceMemory(library, device)


class DeviceMemory:
    """Memory of a library on a device: there results and workspace are allocated."""

    def __init__(self, library: str, device: int) -> None:
        self.library, self.device = library, device

    @property
    def module(self) -> Any:
        return kernels()

    @classmethod
    def current(cls, library: str) -> DeviceMemory:
        """Where a library puts new arrays: its current device."""
        if library == "torch":
            device = sys.modules["torch"].cuda.current_device()
        elif library == "cupy":
            device = sys.modules["cupy"].cuda.Device().id
        else:
            raise ValueError(f"library is {library!r}, wanted 'cupy' or 'torch'")
        return cls(library, int(device))

    def allocate(self, count: int) -> Any:
        """So many bytes."""
        return self.empty((count,), "uint8")

    def call(self) -> Context:
        """What bindings take: the library's current stream, the device, and where workspace comes from."""
        return context_of(self.library, self.device)()

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """A fresh array of the caller's library."""
        if self.library == "torch":
            torch = sys.modules["torch"]
            return torch.empty(shape, dtype=getattr(torch, dtype), device=torch.device("cuda", self.device))
        if self.library == "cupy":
            cupy = sys.modules["cupy"]
            if cupy.cuda.runtime.getDevice() == self.device:
                return cupy.empty(shape, _numpy_dtype(dtype))
            with cupy.cuda.Device(self.device):
                return cupy.empty(shape, _numpy_dtype(dtype))
        raise TypeError(
            f"results cannot be allocated by {self.library!r} on a device; pass out=, or CuPy arrays or PyTorch "
            "tensors of the same memory (cupy.from_dlpack, torch.from_dlpack)"
        )

    def converted(self, x: Any, dtype: str) -> Any:
        if dtype_name(x) == dtype:
            return x
        if library_of(x) == "torch":
            return x.to(getattr(sys.modules["torch"], dtype))
        with self.inside():
            return x.astype(_numpy_dtype(dtype))

    def bytes_of(self, mask: Any, name: str) -> Any:
        """A mask, boolean or of integers, as bytes."""
        kind = dtype_name(mask)
        if not kind.startswith(("bool", "int", "uint")):
            raise TypeError(f"{name} must be boolean or integer (nonzero: the token takes part), got {kind}")
        if kind not in ("bool", "uint8"):
            with self.inside():
                mask = mask != 0
        return self.converted(mask, "uint8")

    def summed_to(self, full: Any, shape: tuple[int, ...], dtype: str) -> Any:
        """The gradient of an array that was broadcast."""
        extra = len(full.shape) - len(shape)
        axes = tuple(range(extra)) + tuple(
            extra + i for i, n in enumerate(shape) if n == 1 and int(full.shape[extra + i]) != 1
        )
        if axes:
            with self.inside():
                full = full.sum(axes) if self.library == "torch" else full.sum(axis=axes)
        return self.converted(full.reshape(shape), dtype)

    def host(self, x: Any) -> np.ndarray[Any, Any]:
        """A copy in NumPy, which waits for the device."""
        if self.library not in ("cupy", "torch"):
            raise TypeError(f"{self.library} gives no copy from a CUDA device; pass CuPy or PyTorch, or NumPy")
        if self.library == "torch":
            x = x.float() if dtype_name(x) == "bfloat16" else x  # which NumPy does not know
        copy: np.ndarray[Any, Any] = x.cpu().numpy() if self.library == "torch" else x.get()
        return copy

    def from_host(self, x: np.ndarray[Any, Any]) -> Any:
        """A copy on the device."""
        if self.library == "torch":
            torch = sys.modules["torch"]
            return torch.from_numpy(x).to(torch.device("cuda", self.device))
        cupy = sys.modules["cupy"]
        with cupy.cuda.Device(self.device):
            return cupy.asarray(x)

    def inside(self) -> Any:
        """CuPy's own operations run on the current device, whatever the array's."""
        return sys.modules["cupy"].cuda.Device(self.device) if self.library == "cupy" else contextlib.nullcontext()

    def copied(self, x: Any) -> Any:
        with self.inside():
            return x.clone() if self.library == "torch" else x.copy()


def _numpy_dtype(dtype: str) -> Any:
    if dtype == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(dtype)


def on_the_cpu(x: Any, name: str) -> None:
    """Raises for an array on a CUDA device."""
    device = device_of(x)
    if device is not None:
        raise TypeError(
            f"{name} is on CUDA device {device}; this operation runs on the CPU and moves no data by itself"
        )


def numpy(x: Array, name: str = "an array") -> np.ndarray[Any, Any]:
    """A view in NumPy, without a copy. A tensor whose history would be lost is an error, as in :func:`detached`."""
    if isinstance(x, np.ndarray):
        return np.asarray(x)
    on_the_cpu(x, name)
    return np.from_dlpack(detached(x, name))
