"""Householder reflections and orthogonal projections, on stacks.

Nearly every projection is ``alpha C + V M (VᵀC)`` with a tall ``V`` and a small core ``M``: :func:`apply_core` is
this product for any ``M``, and the others are special cases of it. Matrices are the last two axes, stacks lead: ``(...,
m, n)``. A basis is ``(..., n, k)``, with its vectors as columns. Results have the library and dtype of the input;
float32 and float64 are taken on the CPU; docs/cuda.md says what takes CUDA arrays, also of 16 bits.

``check=True`` (the default) tests for NaN and infinity, and that bases which must be orthonormal are, before anything
is written: a call that raises leaves its inputs unchanged (a separate ``out`` may be partly written). ``check=False``
omits both tests. Values on a CUDA device are never tested, as the host would have to wait: NaN propagates.

Finite input gives a finite result or, where that overflows the dtype, a ValueError; ``check=False`` omits this test,
too. Where an overflow is found only in the result, an ``out`` that is not also an input has already been overwritten.
"""

from __future__ import annotations

from subspan.orth import gradients, householder, int4, projections, spaces
from subspan.orth.gradients import *
from subspan.orth.householder import *
from subspan.orth.int4 import *
from subspan.orth.projections import *
from subspan.orth.spaces import *

__all__: list[str] = []
__all__ += gradients.__all__
__all__ += householder.__all__
__all__ += int4.__all__
__all__ += projections.__all__
__all__ += spaces.__all__

# Pickles, tracebacks and help() name this module, not where the parts are.
for _name in __all__:
    globals()[_name].__module__ = __name__
