"""The Grassmann manifold: exact maps, optimiser steps in place, and a classification head, on stacks.

A point of ``Gr(k, n)`` is a ``k``-dimensional subspace of ``Rⁿ``, given by an orthonormal basis ``(..., n, k)``; a
tangent at ``U`` is an ``H`` with ``UᵀH = 0``. Stacks lead, any strides are taken (a weight that is stored as
``(C, k, n)`` goes in as its transposed view, without a copy), and results have the library and dtype of the input:
float32 and float64. docs/cuda.md says what takes CUDA arrays.

``check=True`` (the default) makes sure that points are orthonormal and, where it matters, that tangents are tangent;
``check=False`` omits these tests. Values on a CUDA device are never tested, as the host would have to wait.

Finite input gives a finite result or, where that overflows the dtype, a ValueError (on a CUDA device infinity or NaN
in the result).
"""

from __future__ import annotations

from subspan.grassmann import angles, maps, steps
from subspan.grassmann.angles import *
from subspan.grassmann.maps import *
from subspan.grassmann.steps import *

__all__: list[str] = []
__all__ += angles.__all__
__all__ += maps.__all__
__all__ += steps.__all__

# Pickles, tracebacks and help() name this module, not where the parts are.
for _name in __all__:
    globals()[_name].__module__ = __name__
