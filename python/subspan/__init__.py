"""A compiled numerical core for subspaces.

``subspan.svd`` holds streaming and one-shot truncated SVDs, ``subspan.orth`` Householder reflections and orthogonal
projections, ``subspan.grassmann`` the geometry of subspaces and optimiser steps on it, ``subspan.plucker`` mixing of
sequences by Plücker coordinates. Everything takes arrays of NumPy, PyTorch or JAX without a copy and answers in the
same library; much of it takes CuPy arrays and CUDA tensors too. ``subspan.sklearn`` is loaded when it is imported.
"""

from __future__ import annotations

from importlib.metadata import version as _version

from subspan import _core, grassmann, orth, plucker, svd
from subspan._core import num_threads as get_num_threads
from subspan._lib.device import CudaError
from subspan._lib.numbers import whole_number as _whole_number

__version__ = _version("subspan")
__all__ = ["CudaError", "__version__", "get_num_threads", "grassmann", "orth", "plucker", "set_num_threads", "svd"]


def set_num_threads(n: int) -> None:
    """Set the number of threads of the library's own loops, 1 to 4096. Fewer run if the system cannot create them."""
    _core.set_num_threads(_whole_number(n, "n", 1, 4096))
