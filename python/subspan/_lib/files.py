"""States on disk and in pickles: NumPy ``.npz`` archives without pickles, and a checksum over what is inside."""

from __future__ import annotations

import glob
import hashlib
import importlib
import inspect
import os
import re
import socket
import threading
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np

from subspan import _core

if TYPE_CHECKING:
    from collections.abc import Set
    from typing import Self

_STALE = re.compile(r"\.([^./\\]+)\.(\d+)\.\d+\.part$")


def _numbers(values: Any) -> Any:
    if not values or not all(isinstance(x, (bool, int, float, np.number, np.bool_)) for x in values):
        return None
    return np.asarray(values)


def _digest(value: Any, into: Any) -> None:
    """Feeds a value to a hash: what it is of, and its bytes."""
    if isinstance(value, dict):
        into.update(b"{")
        for key in sorted(value):
            into.update(repr(key).encode())
            _digest(value[key], into)
        into.update(b"}")
    elif isinstance(value, (list, tuple)) and (numbers := _numbers(value)) is not None:
        _digest(numbers, into)  # as an archive gives them back
    elif isinstance(value, (list, tuple)):
        into.update(b"[")
        for item in value:
            _digest(item, into)
        into.update(b"]")
    elif value is None or isinstance(value, (bool, int, float, str, bytes)):
        kinds: tuple[Any, ...] = (bool, int, float, str, bytes)  # np.float64 is a float, and its repr another one
        into.update(repr(next((kind(value) for kind in kinds if isinstance(value, kind)), None)).encode())
    elif isinstance(value, np.generic):
        _digest(value.item(), into)
    else:
        if not isinstance(value, np.ndarray):
            from subspan._lib.arrays import detached
            from subspan._lib.device import memory_of, numpy, on_device

            value = memory_of(x=value).host(detached(value)) if on_device(value) else numpy(detached(value))
        x = np.asarray(value)
        if x.dtype.hasobject or x.ndim == 0:  # names, whose values count; numbers, as an archive gives them back
            _digest(x.tolist(), into)
            return
        into.update(f"{x.dtype.str}{x.shape}".encode())
        into.update(np.ascontiguousarray(x).tobytes())


def checksum(state: dict[str, Any]) -> str:
    """Of everything but the checksum itself."""
    into = hashlib.blake2b(digest_size=16)
    _digest({k: v for k, v in state.items() if k != "checksum"}, into)
    return into.hexdigest()


def sealed_state(state: dict[str, Any]) -> dict[str, Any]:
    """The state with its checksum, for a pickle or a file."""
    return {**state, "checksum": checksum(state)}


def checked_state(state: Any, kind: str, form: str, needed: Set[str], *, sealed: bool = True) -> dict[str, Any]:
    """A state that is whole: of this format with its checksum, or of an earlier one, which had none. The first one of a
    class that was not ``sealed`` then had no format either.
    """
    if not isinstance(state, dict):
        raise ValueError(f"not a state of {kind}: it is of type {type(state).__name__}")
    name, _, version = form.rpartition("/")
    if not sealed and not state.keys() & {"format", "checksum"}:
        state = {**state, "format": f"{name}/1"}
    given = str(state.get("format"))
    versions = [f"{name}/{i}" for i in range(1, int(version) + 1)]
    if given not in versions:
        raise ValueError(f"not a state of {kind}: format is {given!r}, wanted {form!r}")
    missing = needed - state.keys()
    if missing:
        raise ValueError(f"not a state of {kind}: it lacks {', '.join(sorted(missing))}")
    if given == form and state.get("checksum") != checksum(state):
        raise ValueError(f"the state of {kind} is damaged: its checksum does not fit")
    return dict(state)


def _alive(pid: int) -> bool:
    if os.name != "posix":
        return True  # os.kill would end it there
    try:
        os.kill(pid, 0)
    except OSError as e:
        return not isinstance(e, ProcessLookupError)  # another user's may not be asked
    return True


def _sweep(path: str, host: str) -> None:
    """Removes what processes of this machine left that were killed while they wrote."""
    for part in glob.glob(glob.escape(path) + ".*.part"):
        found = _STALE.search(part)
        if found and found[1] == host and not _alive(int(found[2])):
            try:
                os.remove(part)
            except OSError:  # another process was faster
                continue


def write_archive(path: str | os.PathLike[str] | bytes, state: dict[str, Any]) -> None:
    """Write aside, flush to the disk, then rename: what was there stays whole until the new file is."""
    state = {k: ("" if v is None else v) for k, v in state.items()}
    path = os.fsdecode(path)
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{path}: there is no folder {folder}")
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path} is a folder")
    host = re.sub(r"[^\w-]", "_", socket.gethostname()) or "host"
    _sweep(path, host)
    aside = f"{path}.{host}.{os.getpid()}.{threading.get_ident()}.part"
    try:
        with open(aside, "wb") as f:
            np.savez(f, allow_pickle=False, **state)
            f.flush()
            os.fsync(f.fileno())
        os.replace(aside, path)
        if os.name == "posix":  # the name, too
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    finally:
        if os.path.exists(aside):
            os.remove(aside)


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, length: int) -> Any:
    # Members are stored as they are, so none is longer than the file: a size that was made up is found before memory is
    # asked for.
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.file_size > length:
        raise ValueError(f"{info.filename} is compressed, or its size does not fit the file")
    with archive.open(info) as f:
        version = np.lib.format.read_magic(f)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{info.filename} is of npy version {version}")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(f)
        if dtype.hasobject:
            raise ValueError(f"{info.filename} holds objects")
        count = 1
        for n in shape:
            count *= int(n)
        size = count * dtype.itemsize
        if min(shape, default=0) < 0 or f.tell() + size != info.file_size:
            raise ValueError(f"{info.filename} declares shape {shape} of {dtype}, which is not what it holds")
        data = f.read()
    if len(data) != size:
        raise ValueError(f"{info.filename} ends early")
    return np.frombuffer(bytearray(data), dtype=dtype, count=count).reshape(shape, order="F" if fortran else "C")


def read_archive(path: str | os.PathLike[str] | bytes, kind: str, needed: Set[str], more: Set[str]) -> dict[str, Any]:
    """What :func:`write_archive` wrote. ValueError names what is wrong with a file that is damaged or another kind.

    Other members than those that are ``needed`` and those that may be there, ``more``, are not read; memory is bounded
    by the length of the file.
    """
    path = os.fsdecode(path)
    try:
        length = os.path.getsize(path)
        with open(path, "rb") as handle, zipfile.ZipFile(handle) as archive:
            infos = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            if len(infos) != len(archive.infolist()):
                raise ValueError("a member is there twice")
            missing = needed - infos.keys()
            read = {} if missing else {k: info for k, info in infos.items() if k in needed or k in more}
            raw = {k: _read_member(archive, info, length) for k, info in read.items()}
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as e:  # a damaged archive can raise almost anything, MemoryError included
        raise ValueError(f"{path}: not a readable {kind} file ({str(e)[:300]})") from e
    if missing:
        raise ValueError(f"{path}: not a {kind} file, it lacks {', '.join(sorted(missing))}")
    state: dict[str, Any] = {}
    for k, v in raw.items():
        state[k] = v.item() if v.ndim == 0 else v
        if isinstance(state[k], str) and state[k] == "":
            state[k] = None
    return state


def known_library(name: Any) -> str:
    """A saved library, imported: results go to it."""
    if name not in ("numpy", "torch", "jax", "cupy"):
        raise ValueError(f"library is {name!r}, wanted one of numpy, torch, jax, cupy")
    importlib.import_module(name)
    return str(name)


class Fixed:
    """An object that stays as it was made: in its options (``_OPTIONS``), and in what its constructor takes under other
    names, of which ``obj.name = value`` would make an attribute that nothing reads. ``_FREE`` may change.
    """

    _OPTIONS: tuple[str, ...] = ()
    _FREE: tuple[str, ...] = ()
    _taken: frozenset[str] = frozenset()

    def __init_subclass__(cls) -> None:
        if "_OPTIONS" not in cls.__dict__:
            return  # a user's class, whose constructor may take what it likes and set it
        cls._taken = frozenset(inspect.signature(cls).parameters).difference(cls._OPTIONS, cls._FREE)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._taken or (name in self._OPTIONS and name in self.__dict__):
            raise AttributeError(f"{name} is fixed when a {type(self).__name__} is made; make a new one")
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        if name in self._taken or name in self._OPTIONS or name in self._FREE:
            raise AttributeError(f"{name} is part of every {type(self).__name__}")
        object.__delattr__(self, name)


class Kept(Fixed):
    """An object around a state of the kernels, which is copied, saved and loaded."""

    _NEEDED: frozenset[str]  # members of every file, and
    _MORE: frozenset[str]  # those that some have
    _state: Any

    def copy(self) -> Self:
        """An independent copy."""
        new = object.__new__(type(self))
        state = None if self._state is None else self._state.copy()
        new.__dict__.update(self.__dict__, _turn=_core.Turn(), _state=state)
        return new

    def __copy__(self) -> Self:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.copy()

    def save(self, path: str | os.PathLike[str] | bytes) -> None:
        """Write all of it to ``path``, a NumPy ``.npz`` archive without pickles. Written aside, then renamed."""
        write_archive(path, self.__getstate__())  # type: ignore[arg-type]  # each class has its own

    @classmethod
    def load(cls, path: str | os.PathLike[str] | bytes) -> Self:
        """Read what :meth:`save` wrote. ValueError names what is wrong with a file that is damaged or another kind."""
        state = read_archive(path, cls.__name__, cls._NEEDED, cls._MORE)
        self = cls.__new__(cls)
        try:
            self.__setstate__(state)  # type: ignore[attr-defined]
        except Exception as e:  # whatever a wrong member makes the pieces below raise
            raise ValueError(f"{os.fsdecode(path)}: damaged {cls.__name__} file ({e})") from e
        return self
