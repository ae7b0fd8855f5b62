"""States on disk: NumPy ``.npz`` archives without pickles."""

from __future__ import annotations

import os
import threading
import zipfile
from typing import Any

import numpy as np


def write_archive(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write aside, then rename: what was there stays whole until the new file is."""
    state = {k: ("" if v is None else v) for k, v in state.items()}
    path = os.fspath(path)
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{path}: there is no folder {folder}")
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path} is a folder")
    aside = f"{path}.{os.getpid()}.{threading.get_ident()}.part"
    try:
        with open(aside, "wb") as f:
            np.savez(f, allow_pickle=False, **state)
        os.replace(aside, path)
    finally:
        if os.path.exists(aside):
            os.remove(aside)


def _read_member(archive: zipfile.ZipFile, name: str) -> Any:
    with archive.open(name) as f:
        return np.lib.format.read_array(f, allow_pickle=False)


def read_archive(path: str | os.PathLike[str], kind: str, needed: set[str]) -> dict[str, Any]:
    """What :func:`write_archive` wrote. ValueError names what is wrong with a file that is damaged or another kind."""
    path = os.fspath(path)
    try:
        with open(path, "rb") as handle, zipfile.ZipFile(handle) as archive:
            raw = {k.removesuffix(".npy"): _read_member(archive, k) for k in archive.namelist()}
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as e:  # a damaged archive can raise almost anything, MemoryError included
        raise ValueError(f"{path}: not a readable {kind} file ({e})") from e
    missing = needed - raw.keys()
    if missing:
        raise ValueError(f"{path}: not a {kind} file, it lacks {', '.join(sorted(missing))}")
    state: dict[str, Any] = {}
    for k, v in raw.items():
        state[k] = v.item() if v.ndim == 0 else v
        if isinstance(state[k], str) and state[k] == "":
            state[k] = None
    return state
