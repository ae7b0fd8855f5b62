"""A drop-in for ``sklearn.decomposition.IncrementalPCA`` on :class:`subspan.svd.StreamingSVD`.

Needs scikit-learn (``pip install 'subspan[sklearn]'``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import _fit_context
from sklearn.decomposition import IncrementalPCA as _IncrementalPCA
from sklearn.utils import check_array, gen_batches
from sklearn.utils.validation import check_is_fitted, validate_data

from subspan import _core
from subspan._lib.device import on_the_cpu
from subspan._lib.files import checksum
from subspan._lib.sparse import check_sparse, csr_parts, is_sparse
from subspan._lib.threads import stoppable
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
        X = self._looked_at(X, reset=True)
        n_samples, n_features = X.shape
        self.batch_size_ = 5 * n_features if self.batch_size is None else self.batch_size
        for batch in gen_batches(n_samples, self.batch_size_, min_batch_size=self.n_components or 0):
            self.partial_fit(self._converted(X[batch]), check_input=False)
        return self

    def _looked_at(self, X: Any, reset: bool) -> Any:
        """Shape, names and kind. What is not of a float type, a memory map of bytes say, is converted a batch at a
        time."""
        on_the_cpu(X, "X")
        if is_sparse(X):
            check_sparse(X, "X")
        return validate_data(
            self, X, accept_sparse=["csr"], dtype="numeric", ensure_all_finite=False, ensure_min_samples=1, reset=reset
        )

    def _converted(self, X: Any) -> Any:
        kinds = {"accept_sparse": ["csr"], "dtype": [np.float64, np.float32]}
        X = check_array(X, **kinds, input_name="X", estimator=self, ensure_min_samples=0)
        return X if is_sparse(X) else np.require(X, requirements="A")  # a field of packed records, say

    @_fit_context(prefer_skip_nested_validation=True)  # type: ignore[untyped-decorator]
    def partial_fit(self, X: Any, y: Any = None, check_input: bool = True) -> IncrementalPCA:
        """Add one batch ``X (n_samples, n_features)``, dense or sparse."""
        on_the_cpu(X, "X")
        first_pass = not hasattr(self, "components_")
        if check_input:
            X = self._converted(self._looked_at(X, reset=first_pass))
        elif is_sparse(X):
            check_sparse(X, "X")
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
            stream = StreamingSVD(rank, center=True, exact_blocks=True)
        elif stream.dtype is not None and X.dtype != stream.dtype:
            X = X.astype(stream.dtype)

        stream = stream.copy()  # an interrupt leaves all as it was
        before_dropped = stream.residual_energy
        before_rank = 0 if self.components_ is None else self.components_.shape[0]
        stream.update(X)
        seen = int(self.n_samples_seen_)
        total = seen + n_samples
        mean, scatter = _moments(X)
        if seen:
            delta = mean - self.mean_
            scatter += self.var_ * seen + delta * delta * (seen * n_samples / total)
            mean = self.mean_ + delta * (n_samples / total)

        # As many components as rows allow; directions without energy are completed, as an SVD does.
        kept = min(rank, before_rank + n_samples)
        components, values = _completed(stream, kept)
        squares = values.astype(np.float64) ** 2
        with np.errstate(divide="ignore", invalid="ignore"):
            variance = (squares / (total - 1)).astype(values.dtype)
        whole = float(np.sum(scatter))  # of rows that are all the same no component explains anything
        ratio = (squares / whole if whole > 0 else np.zeros_like(squares)).astype(values.dtype)
        if not (np.isfinite(values).all() and np.isfinite(scatter).all()):
            raise ValueError("X: variances overflow the dtype although X is finite; scale it")
        stacked = min(n_samples if not seen else before_rank + n_samples + 1, n_features)
        noise = 0.0
        if not (kept in (n_samples, n_features) or stacked <= kept or total < 2):
            noise = max(0.0, stream.residual_energy - before_dropped) / (total - 1) / (stacked - kept)
        self.__dict__.update(
            _stream=stream,
            mean_=mean,
            var_=scatter / total,
            n_samples_seen_=np.int64(total),
            components_=components,
            singular_values_=values,
            n_components_=kept,
            explained_variance_=variance,
            explained_variance_ratio_=ratio,
            noise_variance_=noise,
        )
        return self

    def transform(self, X: Any) -> Any:
        """Project ``X (n_samples, n_features)``, dense or sparse, on the components.

        Rows are centred before they are multiplied, so that a large mean costs no digits.
        """
        check_is_fitted(self)
        X = self._looked_at(X, reset=False)
        strip = max(64, 2**22 // max(1, X.shape[1]))
        parts = [self._coordinates(self._converted(X[i : i + strip])) for i in range(0, max(X.shape[0], 1), strip)]
        out = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if self.whiten:
            scale = np.sqrt(self.explained_variance_)
            out /= np.maximum(scale, np.finfo(scale.dtype).eps)
        return out

    def _coordinates(self, X: Any) -> Any:
        components = np.ascontiguousarray(self.components_)
        dtype = np.result_type(X.dtype, components.dtype)
        components = components.astype(dtype, copy=False)
        mean = np.ascontiguousarray(self.mean_, dtype=np.float64)
        out = np.empty((X.shape[0], components.shape[0]), dtype)
        if is_sparse(X):
            _core.affine_coordinates_csr(*csr_parts(X.astype(dtype, copy=False), "X"), mean, components, out)
        else:
            _core.affine_coordinates(X.astype(dtype, copy=False), mean, components, out)
        if not np.isfinite(out).all():
            raise ValueError("X: its coordinates overflow the dtype although it is finite; scale it")
        return out

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return {**state, "_checksum": checksum({k: v for k, v in state.items() if k != "_stream"})}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        if state.pop("_checksum", None) != checksum({k: v for k, v in state.items() if k != "_stream"}):
            raise ValueError("the state of IncrementalPCA is damaged: its checksum does not fit")
        super().__setstate__(state)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags


def _moments(X: Any) -> tuple[Any, Any]:
    """Column means and sums of squared deviations, in float64."""
    mean, scatter = np.empty(X.shape[1]), np.empty(X.shape[1])
    if is_sparse(X):
        _core.column_moments_csr(*csr_parts(X, "X"), mean, scatter)
    else:
        _core.column_moments(X, mean, scatter)
    return mean, scatter


def _completed(stream: StreamingSVD, k: int) -> tuple[Any, Any]:
    """Components and singular values with zeros and an orthonormal completion up to k."""
    components, values = stream.components, stream.singular_values
    r = components.shape[0]
    if r < k:
        n = components.shape[1]
        fill = np.random.default_rng(0).standard_normal((n, k - r)).astype(components.dtype)
        q, _ = stoppable(np.linalg.qr, np.hstack([components.T, fill]))
        extra = q[:, r:].T
        # Twice is enough (Giraud et al. 2005): what is left along the components is rounding.
        extra = extra - (extra @ components.T) @ components
        extra /= np.linalg.norm(extra, axis=1, keepdims=True)
        components = np.vstack([components, extra])
        values = np.concatenate([values, np.zeros(k - r, dtype=values.dtype)])
        top = np.argmax(np.abs(components), axis=1)
        components *= np.where(components[np.arange(k), top] < 0, -1, 1).astype(components.dtype)[:, None]
    return components, values
