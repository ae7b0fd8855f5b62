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

from subspan.orth.gradients import GradientProjector
from subspan.orth.householder import (
    HouseholderQ,
    householder_apply,
    householder_apply_backward,
    householder_product,
    householder_product_backward,
    householder_qr,
)
from subspan.orth.int4 import Int4Basis, quantize_int4
from subspan.orth.projections import (
    apply_core,
    project,
    project_out,
    rotate,
    swap,
)
from subspan.orth.spaces import (
    complement,
    compose,
    contains,
    hadamard,
    hadamard_matrix,
    null_space,
    orthonormalize,
    random_orthogonal,
    range_basis,
    span_intersection,
    span_sum,
)

__all__ = [
    "GradientProjector",
    "HouseholderQ",
    "Int4Basis",
    "apply_core",
    "complement",
    "compose",
    "contains",
    "hadamard",
    "hadamard_matrix",
    "householder_apply",
    "householder_apply_backward",
    "householder_product",
    "householder_product_backward",
    "householder_qr",
    "null_space",
    "orthonormalize",
    "project",
    "project_out",
    "quantize_int4",
    "random_orthogonal",
    "range_basis",
    "rotate",
    "span_intersection",
    "span_sum",
    "swap",
]

# Pickles, tracebacks and help() name this module, not where the parts are.
for _name in __all__:
    globals()[_name].__module__ = __name__
