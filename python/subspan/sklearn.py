"""A drop-in for ``sklearn.decomposition.IncrementalPCA`` on :class:`subspan.svd.StreamingSVD`.

Needs scikit-learn (``pip install 'subspan[sklearn]'``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import _fit_context
from sklearn.decomposition import IncrementalPCA as _IncrementalPCA
from sklearn.utils import gen_batches
from sklearn.utils.validation import check_is_fitted, validate_data

from subspan import _core
from subspan._arrays import is_sparse
from subspan._orth.common import on_the_cpu
from subspan.svd import StreamingSVD

__all__ = ["IncrementalPCA"]


class IncrementalPCA(_IncrementalPCA):  # type: ignore[misc]
    """scikit-learn's ``IncrementalPCA``, faster, and less choosy about its input.

    Constructor, attributes, errors and results are scikit-learn's. In addition

    * the first batch may have fewer rows than ``n_components``: until enough rows were seen ``components_`` has fewer
      rows, and ``n_components_`` says how many;
    * :meth:`partial_fit` takes sparse matrices, and :meth:`fit` does not densify them;
    * the caller's block is never changed, also with ``check_input=False``.

    A batch of ``b`` rows costs about ``8 n k²`` flops at ``b = k`` where scikit-learn's SVD of the stacked matrix costs
    ``24 n k² + 160 k³``.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.sklearn import IncrementalPCA
    >>> X = np.random.default_rng(0).standard_normal((300, 20))
    >>> IncrementalPCA(n_components=3, batch_size=50).fit_transform(X).shape
    (300, 3)
    """

    components_: Any
    n_components_: int
    n_samples_seen_: Any
    mean_: Any
    var_: Any
    singular_values_: Any
    explained_variance_: Any
    explained_variance_ratio_: Any
    noise_variance_: Any
    batch_size_: int
    _stream: StreamingSVD | None

    @_fit_context(prefer_skip_nested_validation=True)  # type: ignore[untyped-decorator]
    def fit(self, X: Any, y: Any = None) -> IncrementalPCA:
        """Fit on ``X (n_samples, n_features)``, dense or sparse, in batches of ``batch_size`` rows."""
        self.components_ = None
        self.n_samples_seen_ = 0
        self.mean_ = 0.0
        self.var_ = 0.0
        self.singular_values_ = None
        self.explained_variance_ = None
        self.explained_variance_ratio_ = None
        self.noise_variance_ = None
        self._stream = None
        X = validate_data(self, X, accept_sparse=["csr"], dtype=[np.float64, np.float32])
        n_samples, n_features = X.shape
        self.batch_size_ = 5 * n_features if self.batch_size is None else self.batch_size
        for batch in gen_batches(n_samples, self.batch_size_, min_batch_size=self.n_components or 0):
            self.partial_fit(X[batch], check_input=False)
        return self

    @_fit_context(prefer_skip_nested_validation=True)  # type: ignore[untyped-decorator]
    def partial_fit(self, X: Any, y: Any = None, check_input: bool = True) -> IncrementalPCA:
        """Add one batch ``X (n_samples, n_features)``, dense or sparse."""
        on_the_cpu(X, "X")
        first_pass = not hasattr(self, "components_")
        if check_input:
            X = validate_data(self, X, accept_sparse=["csr"], dtype=[np.float64, np.float32], reset=first_pass)
        n_samples, n_features = X.shape
        if first_pass:
            self.components_ = None
        if not hasattr(self, "n_samples_seen_"):
            self.n_samples_seen_ = 0
            self.mean_ = 0.0
            self.var_ = 0.0
        if self.n_components is None:
            rank = min(n_samples, n_features) if self.components_ is None else self.components_.shape[0]
        elif not self.n_components <= n_features:
            raise ValueError(
                f"n_components={self.n_components!r} invalid for n_features={n_features}, need more rows than columns "
                "for IncrementalPCA processing"
            )
        else:
            rank = self.n_components
        stream = getattr(self, "_stream", None)
        if stream is not None and stream.rank != rank:
            raise ValueError(
                f"Number of input features has changed from {stream.rank} to {rank} between calls to partial_fit! "
                "Try setting n_components to a fixed value."
            )
        if stream is None:
            stream = StreamingSVD._exact(rank, center=True)
        elif stream.dtype is not None and X.dtype != stream.dtype:
            X = X.astype(stream.dtype)

        before_dropped = stream.residual_energy
        before_rank = 0 if self.components_ is None else self.components_.shape[0]
        stream.update(X)
        self._stream = stream
        seen = int(self.n_samples_seen_)
        total = seen + n_samples
        mean, scatter = _moments(X)
        if seen:
            delta = mean - self.mean_
            scatter += self.var_ * seen + delta * delta * (seen * n_samples / total)
            mean = self.mean_ + delta * (n_samples / total)
        self.mean_ = mean
        self.var_ = scatter / total
        self.n_samples_seen_ = np.int64(total)

        # As many components as rows allow; directions without energy are completed, as an SVD does.
        kept = min(rank, before_rank + n_samples)
        self.components_, self.singular_values_ = _completed(stream, kept)
        self.n_components_ = kept
        squares = self.singular_values_**2
        with np.errstate(divide="ignore", invalid="ignore"):
            self.explained_variance_ = squares / (total - 1)
            self.explained_variance_ratio_ = squares / np.sum(scatter)
        stacked = min(n_samples if not seen else before_rank + n_samples + 1, n_features)
        if kept in (n_samples, n_features) or stacked <= kept or total < 2:
            self.noise_variance_ = 0.0
        else:
            left_out = max(0.0, stream.residual_energy - before_dropped)
            self.noise_variance_ = left_out / (total - 1) / (stacked - kept)
        return self

    def transform(self, X: Any) -> Any:
        """Project ``X (n_samples, n_features)``, dense or sparse, on the components."""
        on_the_cpu(X, "X")
        if not is_sparse(X):
            return super().transform(X)
        check_is_fitted(self)
        X = validate_data(self, X, accept_sparse=["csr"], dtype=[np.float64, np.float32], reset=False)
        out = np.asarray(X @ self.components_.T) - self.mean_ @ self.components_.T
        if self.whiten:
            scale = np.sqrt(self.explained_variance_)
            out /= np.maximum(scale, np.finfo(scale.dtype).eps)
        return out

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags


def _moments(X: Any) -> tuple[Any, Any]:
    """Column means and sums of squared deviations, in float64."""
    if is_sparse(X):
        mean = np.asarray(X.mean(axis=0, dtype=np.float64)).ravel()
        squares = np.asarray(X.multiply(X).sum(axis=0, dtype=np.float64)).ravel()
        return mean, np.maximum(squares - X.shape[0] * mean * mean, 0.0)
    mean = np.empty(X.shape[1])
    scatter = np.empty(X.shape[1])
    _core.column_moments(X, mean, scatter)
    return mean, scatter


def _completed(stream: StreamingSVD, k: int) -> tuple[Any, Any]:
    """Components and singular values with zeros and an orthonormal completion up to k."""
    components, values = stream.components, stream.singular_values
    r = components.shape[0]
    if r < k:
        n = components.shape[1]
        fill = np.random.default_rng(0).standard_normal((n, k - r)).astype(components.dtype)
        q, _ = np.linalg.qr(np.hstack([components.T, fill]))
        extra = q[:, r:].T
        # Twice is enough (Giraud et al. 2005): what is left along the components is rounding.
        extra = extra - (extra @ components.T) @ components
        extra /= np.linalg.norm(extra, axis=1, keepdims=True)
        components = np.vstack([components, extra])
        values = np.concatenate([values, np.zeros(k - r, dtype=values.dtype)])
        top = np.argmax(np.abs(components), axis=1)
        components *= np.where(components[np.arange(k), top] < 0, -1, 1).astype(components.dtype)[:, None]
    return components, values
