"""Streaming and one-shot truncated singular value decompositions.

Samples are rows. ``Vh`` and ``components`` are ``(k, n)``, as in NumPy and scikit-learn. Results have the library and
dtype of the input; float32 and float64. :class:`StreamingSVD` and :func:`truncated_svd` also take arrays on a CUDA
device (docs/cuda.md).
"""

from __future__ import annotations

from subspan.svd.frequent_directions import FrequentDirections
from subspan.svd.rank import choose_rank
from subspan.svd.streaming import StreamingSVD
from subspan.svd.truncated import TruncatedSVD, merge_svd, product_svd, truncated_svd

__all__ = [
    "FrequentDirections",
    "StreamingSVD",
    "TruncatedSVD",
    "choose_rank",
    "merge_svd",
    "product_svd",
    "truncated_svd",
]

# Pickles, tracebacks and help() name this module, not where the parts are.
for _name in __all__:
    globals()[_name].__module__ = __name__
