"""Streaming and one-shot truncated singular value decompositions.

Samples are rows. ``Vh`` and ``components`` are ``(k, n)``, as in NumPy and scikit-learn. Results have the library and
dtype of the input; float32 and float64. :class:`StreamingSVD` and :func:`truncated_svd` also take arrays on a CUDA
device (docs/cuda.md).
"""

from __future__ import annotations

from subspan.svd import frequent_directions, rank, streaming, truncated
from subspan.svd.frequent_directions import *
from subspan.svd.rank import *
from subspan.svd.streaming import *
from subspan.svd.truncated import *

__all__: list[str] = []
__all__ += frequent_directions.__all__
__all__ += rank.__all__
__all__ += streaming.__all__
__all__ += truncated.__all__

# Pickles, tracebacks and help() name this module, not where the parts are.
for _name in __all__:
    globals()[_name].__module__ = __name__
