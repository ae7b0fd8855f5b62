"""Householder reflections and orthogonal projections, on stacks.

Nearly every projection is ``alpha C + V M (VᵀC)`` with a tall ``V`` and a small core ``M``: :func:`apply_core` is
that product, and the others are it with an ``M`` of their own. Matrices are the last two axes, stacks lead: ``(...,
m, n)``. A basis is ``(..., n, k)``, with its vectors as columns. Results have the library and dtype of the input;
float32 and float64 are taken on the CPU; docs/cuda.md says what takes CUDA arrays, also of 16 bits.

``check=True`` (the default) looks for NaN and infinity, and at bases that must be orthonormal, before anything is
written: whatever raises leaves its inputs as they were (a separate ``out`` may be partly written). ``check=False``
leaves both out. Values on a CUDA device are never looked at, as that would make the host wait: NaN goes through.

What finite input gives is finite, or a ValueError that says that it overflows the dtype; ``check=False`` leaves that
out, too. Where an overflow is found only in the result, an ``out`` that is no input holds it.
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
