"""Plücker coordinates: mixing of sequences, exactly and by one wedge a token, and the exterior algebra around it.

A plane through two vectors ``z`` and ``w`` of ``Rʳ`` has the ``C(r, 2)`` coordinates ``z_i w_j - z_j w_i``, ``i < j``,
in lexicographic order. Mixing gives each token of a sequence the coordinates of the planes through it and tokens of its
past, averaged over offsets, and projects them. Results have the library and dtype of the input: float32 and float64
on the CPU; docs/cuda.md says what takes CUDA arrays, also of 16 bits.
"""

from __future__ import annotations

from subspan.plucker import exterior, mixing, state
from subspan.plucker.exterior import *
from subspan.plucker.mixing import *
from subspan.plucker.state import *

__all__: list[str] = []
__all__ += exterior.__all__
__all__ += mixing.__all__
__all__ += state.__all__

# Pickles, tracebacks and help() name this module, not where the parts are.
for _name in __all__:
    globals()[_name].__module__ = __name__
