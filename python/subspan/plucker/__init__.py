"""Plücker coordinates: mixing of sequences, exactly and by one wedge a token, and the exterior algebra around it.

A plane through two vectors ``z`` and ``w`` of ``Rʳ`` has the ``C(r, 2)`` coordinates ``z_i w_j - z_j w_i``, ``i < j``,
in lexicographic order. Mixing gives each token of a sequence the coordinates of the planes through it and tokens of its
past, averaged over offsets, and projects them. Results have the library and dtype of the input: float32 and float64
on the CPU; docs/cuda.md says what takes CUDA arrays, also of 16 bits.
"""

from __future__ import annotations

from subspan.plucker.exterior import (
    basis,
    basis_backward,
    complement_signs,
    coordinates,
    coordinates_backward,
    hodge,
    relations,
    relations_backward,
    wedge,
    wedge_backward,
)
from subspan.plucker.mixing import mix, mix_backward, mix_project, mix_project_backward
from subspan.plucker.state import MixState

__all__ = [
    "MixState",
    "basis",
    "basis_backward",
    "complement_signs",
    "coordinates",
    "coordinates_backward",
    "hodge",
    "mix",
    "mix_backward",
    "mix_project",
    "mix_project_backward",
    "relations",
    "relations_backward",
    "wedge",
    "wedge_backward",
]

# Pickles, tracebacks and help() name this module, not where the parts are.
for _name in __all__:
    globals()[_name].__module__ = __name__
