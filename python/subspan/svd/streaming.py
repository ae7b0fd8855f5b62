"""Streams of rows, and one-shot decompositions."""

from __future__ import annotations

import importlib
import math
import os
import threading
from typing import Any, NamedTuple

import numpy as np

from subspan import _core
from subspan._lib.arguments import finish, numpy, on_the_cpu
from subspan._lib.arrays import (
    Array,
    as_array,
    as_float,
    check_float,
    check_library,
    check_output,
    csr_parts,
    dense_rows,
    detached,
    float_array,
    float_dtype,
    is_sparse,
    library_of,
    real_number,
    to_library,
    truth,
    whole_number,
)
from subspan._lib.device import device_of, memory_of, on_device, same_dtype
from subspan._lib.files import checked_state, read_archive, sealed_state, write_archive
from subspan.svd.device import DeviceState
from subspan.svd.inner_product import InnerProduct, no_overflow, signs_of_rows

__all__ = ["StreamingSVD"]

_FORMAT = "subspan.StreamingSVD/2"
# Results are handed back to the library that rows came from; a saved stream may name no other module.
_NEEDED = {
    "format",
    "rank",
    "forget",
    "center",
    "energy",
    "method",
    "oversample",
    "wanted_dtype",
    "exact_blocks",
    "dtype",
    "library",
}
_MEMBERS = _NEEDED | {
    "checksum",
    "signs",
    "shown_dtype",
    "weight",
    "inner_product",
    "inner_indices",
    "inner_indptr",
    "on_device",
    "features",
    "rows_seen",
    "skip_gram",
    "dropped",
    "components",
    "low",
    "scatter",
    "singular_values",
    "mean",
    *("device_" + name for name in ("components", "values", "mean", "totals", "rank", "rows", "inner")),
}
_FIRST = threading.Lock()  # of the first rows of a stream on a device
_LIBRARIES = ("numpy", "torch", "jax", "cupy")


class Rotation(NamedTuple):
    """How the left singular vectors of a stream change with an update: ``U`` becomes ``vstack([U @ past + shift,
    new])``.

    ``past (k, k')``, ``new (b, k')`` and ``shift (k',)`` (zero without ``center``) in float64. Columns belong to
    singular values; those of values near ``eps`` times the first are rounding.
    """

    past: Any
    new: Any
    shift: Any

    def apply(self, U: Array) -> Array:
        """The left vectors ``(m + b, k')`` after the update, from those before it, ``U (m, k)``, in its library and
        dtype.
        """
        U = as_array(U, "U")
        check_library(U, "U")
        on_the_cpu(U, "U")
        u, dtype = numpy(detached(U)), check_float(U, "U")
        if u.ndim != 2 or u.shape[1] != self.past.shape[0]:
            raise ValueError(f"U must have shape (m, {self.past.shape[0]}), got {u.shape}")
        turned = np.vstack([u @ self.past + self.shift, self.new]).astype(dtype)
        return to_library(turned, library_of(U), U)


class StreamingSVD:
    """Truncated SVD of a tall matrix whose rows arrive in blocks.

    After every row seen so far has been stacked into ``A`` (minus its mean when ``center``), ``singular_values`` and
    ``components`` are the leading singular values and right singular vectors of ``A``, up to what truncation to
    ``rank`` has left out on the way (``residual_energy``).

    Parameters
    ----------
    rank : int
        Largest number of components kept, at most the number of columns.
    forget : float, default 1.0
        The past is multiplied by this factor in (0, 1] at each call of :meth:`update`.
    center : bool, default False
        Track the mean and decompose the centred rows, as PCA does.
    energy : float, optional
        Report only as many components as hold this share of the energy seen; ``rank`` is then the upper limit.
    method : {"auto", "robust", "gram"}
        ``"gram"`` works on a Gram matrix, which squares the condition number. ``"robust"`` projects, repeats the
        projection and orthonormalises the residual by a Cholesky factor. ``"auto"`` takes the Gram route where the
        measured ratio of the last to the first singular value allows it at the precision of the data, else the robust
        one.
    dtype : optional
        float32 or float64; by default the first rows decide.
    oversample : int, optional
        Directions kept inside beyond ``rank``. What one truncation drops later rows cannot bring back, so a stream with
        a slowly falling spectrum loses energy that the best rank-k approximation has; more directions lose less. By
        default all directions are kept up to 128 columns, ``2 rank + 64`` below 1024, and
        ``max(rank, min(64, 2 rank + 32))`` above.
    exact_blocks : bool, default False
        Decompose the rows of each update as one block, and keep ``rank`` directions: no thin blocks are collected and
        no tall ones split. As scikit-learn's ``IncrementalPCA``, and what ``update(rotation=True)`` needs.
    signs : {"stable", "v"}
        Of components. ``"stable"``: that of the component before it that each is closest to. ``"v"``: after every
        update the entry of largest magnitude is positive, whatever the past was (always so with ``exact_blocks``).
    weight : array ``(n,)``, array or sparse matrix ``(n, n)``, or operator, optional
        The inner product ``x·W·y`` of rows, a mass matrix for example: its diagonal, or a symmetric positive definite
        matrix, whose Cholesky factor is kept: sparse for a sparse matrix, in an order that keeps the fill small. An
        operator (``shape`` and ``matmat``, a ``scipy.sparse.linalg.LinearOperator`` say) is applied to the unit vectors
        once, 256 at a time, and factored like the matrix that this gives, sparse where that is.
        ``singular_values`` are those in that inner product, and ``components @ W @ components.T`` is the identity.

    Notes
    -----
    With ``k`` the number of directions kept, an update of ``b`` rows costs ``n ((k + b)**2 + 2 k (k + b))`` flops on
    the Gram route, about 1.6 times as much on the robust one, and ``O((k + b)**3)`` for the core. Work memory is less
    than ``3 (k + b) n`` items, and some ten matrices of doubles of the core's size ``(k + b)**2``; nothing of size
    ``n × n`` exists but where ``n <= 256``. Blocks thinner than half of ``k`` are collected, so single rows cost what
    blocks cost; taller ones than ``2 k`` are split.

    Fewer than ``rank`` components exist until as many independent rows were seen: all attributes have the current
    number ``k``. The sign of a component follows the component of the update before that it is closest to, so signs
    are stable along a stream.

    An update that raises leaves the stream as it was. Objects may be shared between threads; calls take turns. On a
    CUDA device an update does not wait, and rows with NaN are left out there; the next result says so. Blocks are taken
    as they come there, up to 128 rows (or as many as directions are kept) at a time.

    Sources: Brand, Linear Algebra Appl. 415 (2006); Ross, Lim, Lin and Yang, Int. J. Comput. Vis. 77 (2008) for the
    mean; Fukaya et al., SIAM J. Sci. Comput. 42 (2020) for shifted Cholesky QR.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.svd import StreamingSVD
    >>> rng = np.random.default_rng(0)
    >>> A = rng.standard_normal((1000, 5)) @ rng.standard_normal((5, 64))
    >>> svd = StreamingSVD(rank=5)
    >>> for block in np.array_split(A, 10):
    ...     _ = svd.update(block)
    >>> np.allclose(svd.singular_values, np.linalg.svd(A, compute_uv=False)[:5])
    True
    """

    def __init__(
        self,
        rank: int,
        *,
        forget: float = 1.0,
        center: bool = False,
        energy: float | None = None,
        method: str = "auto",
        dtype: Any = None,
        oversample: int | None = None,
        exact_blocks: bool = False,
        signs: str = "stable",
        weight: Array | None = None,
    ) -> None:
        self._configure(rank, forget, center, energy, method, dtype, oversample, exact_blocks, signs, weight)

    def _configure(
        self,
        rank: int,
        forget: float,
        center: bool,
        energy: float | None,
        method: str,
        dtype: Any,
        oversample: int | None,
        exact_blocks: bool,
        signs: str = "stable",
        weight: Any = None,
    ) -> None:
        self.rank = whole_number(rank, "rank", 1)
        self.oversample = None if oversample is None else whole_number(oversample, "oversample", 0)
        self.forget = real_number(forget, "forget")
        self.center = truth(center, "center")
        self.energy = None if energy is None else real_number(energy, "energy")
        if self.energy is not None and not 0.0 < self.energy < 1.0:
            raise ValueError(f"energy must be in (0, 1), got {energy}")
        if not isinstance(method, str) or method not in ("auto", "robust", "gram"):
            raise ValueError(f"method must be 'auto', 'robust' or 'gram', got {method!r}")
        if not isinstance(signs, str) or signs not in ("stable", "v"):
            raise ValueError(f"signs must be 'stable' or 'v', got {signs!r}")
        self.method, self.signs = str(method), str(signs)
        self._dtype = None if dtype is None else float_dtype(dtype)
        self.exact_blocks = truth(exact_blocks, "exact_blocks")
        self._inner = weight if weight is None or isinstance(weight, InnerProduct) else InnerProduct(weight)
        self._shown: np.dtype[Any] | None = None  # dtype of the rows of a stream with weight, which works in float64
        self._writing = threading.Lock()
        self._library = "numpy"
        self._there: DeviceState | None = None  # the state, once the first rows came from a CUDA device
        more = -1 if self.oversample is None else self.oversample
        self._core = _core.Stream(
            self.rank, self.forget, self.center, self.energy or 0.0, method, more, self.exact_blocks, signs == "v"
        )

    # -- updates -------------------------------------------------------------------------------------------------------

    def update(self, rows: Array, *, rotation: bool = False) -> Any:
        """Add rows ``(b, n)``, dense in any library or sparse (CSR is taken as it is, other formats are converted).

        A vector ``(n,)`` is one row. Integers that the stream's dtype holds exactly (of up to 16 bits in float32, of up
        to 32 in float64) are converted; a stream that begins with integers is one of float64 unless ``dtype`` says
        otherwise.

        With ``rotation=True``, which needs ``exact_blocks``, the result is a :class:`Rotation`, which takes the left
        singular vectors ``U`` of the rows before this update to those after it. Otherwise it is the stream.

        Raises
        ------
        ValueError
            Wrong number of columns, an empty block, NaN or infinity, or ``rank`` above the number of columns.
        TypeError
            Not float32 or float64, another dtype or library than the stream's, or an array on another device.
        """
        if truth(rotation, "rotation"):
            return self._update_with_rotation(rows)
        with self._writing:
            self._add(rows)
        return self

    def _add(self, rows: Array) -> None:
        if self._there is not None or device_of(rows) is not None:
            self._device_update(rows)
        elif type(rows) is np.ndarray and rows.dtype.kind == "f" and self._inner is None:
            if self._dtype is not None and rows.dtype != self._dtype:
                check_float(rows, "rows")
                raise TypeError(f"rows must be {self._dtype} as the stream is, got {rows.dtype}")
            self._take_library("numpy")
            self._core.update(rows)
        elif is_sparse(rows):
            parts = self._csr(rows, "rows")
            self._take_library("numpy")
            if isinstance(parts, tuple):
                self._core.update_csr(*parts)
            else:
                self._core.update(parts)
        else:
            rows, library = self._dense(rows, "rows")
            self._take_library(library)
            before, self._library = self._library, library
            try:
                self._core.update(rows)
            finally:
                if self._core.dtype() is None:  # nothing was taken in
                    self._library = before

    def _wanted(self) -> np.dtype[Any] | None:
        return self.dtype

    def _dense(self, x: Array, name: str) -> tuple[Any, str]:
        """Rows as the kernels take them, and the library that results go to."""
        x = float_array(x, name, self._wanted())
        check_library(x, name)
        library = library_of(x)
        x = detached(x)
        self._check_dtype(x, name)
        if self._inner is not None:
            x = self._inner.forward(x, name)
        return x, library

    def _csr(self, x: Array, name: str) -> Any:
        """Parts of sparse rows, or the dense rows that a dense factor of ``weight`` makes of them."""
        parts = csr_parts(x, name, self._wanted())
        self._check_dtype(parts[0], name)
        return parts if self._inner is None else self._inner.forward_csr(parts, name)

    def _update_with_rotation(self, rows: Array) -> Rotation:
        if not self.exact_blocks:
            raise ValueError(
                "rotation=True needs a stream with exact_blocks=True: others keep directions beyond rank, and "
                "collect thin blocks"
            )
        if self.energy is not None:
            raise ValueError("rotation=True takes no energy: it turns all rank vectors, and energy shows fewer")
        if self.center and self.forget != 1.0:
            raise ValueError(
                "rotation=True with center takes no forget: rows of different weight turn by different amounts"
            )
        if self._there is not None or device_of(rows) is not None:
            raise TypeError("rotation=True is not implemented on CUDA devices")
        dense = dense_rows(rows, "rows", self._wanted()) if is_sparse(rows) else rows
        block, library = self._dense(dense, "rows")
        with self._writing:
            self._take_library(library)
            before, twin = self._core.state(), self._core.copy()
            twin.update(block)
            after = twin.state()
            change = self._rotation(before, after, block)
            self._core, self._library = twin, library  # with the rotation, or not at all
        return change

    def _rotation(self, before: Any, after: Any, block: Any) -> Rotation:
        v, s = after["components"].astype(np.float64), after["singular_values"]
        v = v * self._flips(v)[:, None]
        x = np.atleast_2d(np.asarray(block)).astype(np.float64)
        mean = after["mean"] if self.center else 0.0
        new = (x - mean) @ v.T / s
        k = 0 if before["dtype"] is None else before["singular_values"].size
        past, shift = np.zeros((k, s.size)), np.zeros(s.size)
        if before["dtype"] is not None:
            old = before["components"].astype(np.float64)
            old = old * self._flips(old)[:, None]
            past = self.forget * before["singular_values"][:, None] * (old @ v.T) / s
            if self.center:
                shift = self.forget * (before["mean"] - mean) @ v.T / s
        return Rotation(past, new, shift)

    def _device_update(self, rows: Array) -> None:
        if self._there is None:
            if self._core.dtype() is not None:
                raise TypeError(f"rows must be {self._library} arrays on the CPU as the stream's first rows were")
            dtype = same_dtype({"rows": rows})
            if self._dtype is not None and self._dtype != np.dtype(dtype):
                raise TypeError(f"rows must be {self._dtype} as the stream is, got {dtype}")
            place = memory_of(rows=rows)
            self._require_device_options()
            if len(rows.shape) == 1:
                rows = rows[None]
            if len(rows.shape) != 2:
                raise ValueError(f"rows must have 2 dimensions, got shape {tuple(rows.shape)}")
            options = (self.rank, self.forget, self.center, self.oversample, self.method, dtype)
            with _FIRST:
                if self._there is None:
                    there = DeviceState(place, int(rows.shape[1]), *options)
                    there.update(rows)
                    self._there, self._library = there, place.library
                    return
        if device_of(rows) is None:
            raise TypeError("rows is on the CPU and the stream on a CUDA device; move it first")
        if len(rows.shape) == 1:
            rows = rows[None]
        if library_of(rows) != self._library:
            raise TypeError(
                f"rows must be {self._library} arrays as the stream's first rows were, got {library_of(rows)}"
            )
        self._there.update(rows)

    def _require_device_options(self) -> None:
        for given, what in (
            (self._inner is not None, "weight"),
            (self.exact_blocks, "exact_blocks=True"),
            (self.signs != "stable", f"signs={self.signs!r}"),
        ):
            if given:
                raise TypeError(f"{what} of a stream is not implemented on CUDA devices")

    def _device_merge(self, other: StreamingSVD) -> None:
        if other._there is None:
            if other._core.dtype() is None:
                return
            raise TypeError("other is on the CPU and the stream on a CUDA device")
        if self._there is None:
            if self._core.dtype() is not None:
                raise TypeError("other is on a CUDA device and the stream on the CPU")
            if self._dtype is not None and self._dtype != np.dtype(other._there.dtype):
                raise TypeError(f"other must be {self._dtype} as the stream is, got {other._there.dtype}")
            self._require_device_options()
            there, theirs = other._there, (self.rank, self.forget, self.center, self.oversample, self.method)
            fresh = DeviceState(there.place, there.n, *theirs, there.dtype)
            fresh.merge(there)
            self._there, self._library = fresh, other._library
            return
        if self._library != other._library:
            raise TypeError(f"other must hold {self._library} arrays as the stream does, got {other._library}")
        self._there.merge(other._there)

    def downdate(self, rows: Array) -> StreamingSVD:
        """Remove rows ``(b, n)`` that were added with weight one (``forget=1``).

        Raises ``numpy.linalg.LinAlgError`` when they cannot all have been added: the factor would become indefinite, or
        they hold more energy outside of the subspace than the stream has left out.
        """
        if self._there is not None:
            raise TypeError("downdate is not implemented on CUDA devices; merge and copy are")
        if is_sparse(rows):
            rows = dense_rows(rows, "rows", self._wanted())
        rows, library = self._dense(rows, "rows")
        self._take_library(library)
        with self._writing:
            self._core.downdate(rows)
        return self

    def merge(self, other: StreamingSVD) -> StreamingSVD:
        """Add what another stream over the same columns has seen; ``other`` keeps its value.

        Streams may be merged in any order, also in a tree: up to truncation the result is the same.
        """
        if not isinstance(other, StreamingSVD):
            raise TypeError(f"other must be a StreamingSVD, got {type(other).__name__}")
        if self._there is not None or other._there is not None:
            self._device_merge(other)
            return self
        if (self._inner is None) != (other._inner is None) or (
            self._inner is not None and other._inner is not None and not self._inner.same_as(other._inner)
        ):
            raise ValueError("other must have the weight that the stream has")
        with self._writing:
            self._merge(other)
        return self

    def _merge(self, other: StreamingSVD) -> None:
        fresh = self._core.dtype() is None
        theirs = other.dtype if other._core.dtype() is not None else None
        if theirs is not None:
            if self._inner is not None and not fresh and self.dtype != theirs:
                raise TypeError(f"other must be {self.dtype} as the stream is, got {theirs}")
            if self._dtype is not None and self._dtype != theirs:
                raise TypeError(f"other must be {self._dtype} as the stream is, got {theirs}")
            if not fresh and self._library != other._library:
                raise TypeError(f"other must hold {self._library} arrays as the stream does, got {other._library}")
        self._core.merge(other._core)
        if fresh:
            self._library, self._shown = other._library, other._shown

    def _check_dtype(self, x: Array, name: str) -> None:
        dtype = check_float(x, name)
        if self._dtype is not None and dtype != self._dtype:
            raise TypeError(f"{name} must be {self._dtype} as the stream is, got {dtype}")
        if self._inner is not None:
            if self._core.dtype() is None:
                self._shown = dtype
            elif dtype != self._shown:
                raise TypeError(f"{name} must be {self._shown} as the stream is, got {dtype}")

    def _canonical(self) -> bool:
        return self.signs == "v" or self.exact_blocks

    def _flips(self, v: Any) -> Any:
        """Signs that components ``v`` of the core get where they are shown: with weight in other coordinates."""
        if self._inner is None or not self._canonical():
            return np.ones(len(v))
        return signs_of_rows(self._inner.backward(v))

    def _in_dtype(self, x: Any, what: str) -> Any:
        """What a stream with weight has worked out in float64, in the dtype of its rows."""
        if self._inner is None:
            return x
        with np.errstate(over="ignore"):
            return no_overflow(x.astype(self.dtype, copy=False), x, what)

    def _take_library(self, library: str) -> None:
        if self._library != library and self._core.dtype() is not None:
            raise TypeError(
                f"rows must be {self._library} arrays as the stream's first rows were, got {library}; "
                "results would change their library half-way"
            )

    # -- results -------------------------------------------------------------------------------------------------------

    def _empty(self, *shape: int) -> Any:
        return np.empty(shape, dtype=self._dtype or np.float64)

    @property
    def singular_values(self) -> Array:
        """``(k,)``, descending; a fresh array."""
        if self._there is not None:
            k = self._there.shown(self.rank, self.energy)[0]
            return self._there.place.copied(self._there.place.converted(self._there.values[:k], self._there.dtype))
        values = self._core.values()
        shown = self._empty(0) if values is None else self._in_dtype(values, "singular_values")
        return to_library(shown, self._library)

    @property
    def components(self) -> Array:
        """``(k, n)`` right singular vectors as rows, orthonormal to ``10 eps sqrt(k)``; a fresh array."""
        if self._there is not None:
            return self._there.shown_components(self._there.shown(self.rank, self.energy)[0])
        v = self._core.components()
        if v is not None and self._inner is not None:
            v = self._inner.backward(v)
            v = self._in_dtype(v * signs_of_rows(v)[:, None] if self._canonical() else v, "components")
        return to_library(self._empty(0, 0) if v is None else v, self._library)

    @property
    def mean(self) -> Array:
        """``(n,)`` mean of the rows, or None without ``center``; a fresh array."""
        if self._there is not None and self._there.mean is not None:
            self._there.host()  # rows that were refused are told of
            return self._there.place.copied(self._there.place.converted(self._there.mean, self._there.dtype))
        mean = self._core.mean() if self.center else None
        if mean is None:
            return None
        if self._inner is not None:
            mean = self._inner.backward(mean[None])[0]
        return to_library(mean.astype(self.dtype), self._library)

    @property
    def explained_variance_ratio(self) -> Array:
        """``(k,)`` share of each component in the energy (with ``center``: the variance) of all rows; float64."""
        values, left = self._energies()
        if not values.size or values[0] == 0.0:
            return to_library(np.zeros(values.shape), self._library)
        hidden = values.size < min(self.n_features or 0, self.rows_seen)
        if not math.isfinite(left) or (hidden and values[0] < 1e-150):
            how = "underflows" if math.isfinite(left) else "overflows"
            raise ValueError(f"explained_variance_ratio: the energy that is not shown {how}; scale the rows")
        shares = (values / values[0]) ** 2  # squares of the values themselves may leave the range of numbers
        return to_library(shares / (shares.sum() + (math.sqrt(left) / values[0]) ** 2), self._library)

    @property
    def explained_variance(self) -> Array:
        """``(k,)`` variance along each component, ``singular_values² / (rows_seen - 1)``; float64.

        With ``forget`` the divisor is the sum of squared weights of the rows, as that of :attr:`column_variances`.
        """
        if self._there is not None:
            if self.forget != 1.0:
                raise TypeError("explained_variance of a stream with forget is not implemented on CUDA devices")
            values, seen, weight = self._energies()[0], self.rows_seen, 0.0
        else:
            values, _, seen, weight = self._core.energies()
        if seen < 2:
            raise ValueError(f"a variance needs at least two rows, and the stream has seen {seen}")
        with np.errstate(over="ignore"):
            variance = (values / math.sqrt(seen - 1 if self.forget == 1.0 else weight)) ** 2
        return to_library(no_overflow(variance, values, "explained_variance"), self._library)

    def _energies(self) -> tuple[Any, float]:
        if self._there is not None:
            k, values, left = self._there.shown(self.rank, self.energy)
            return values[:k], float((values[k:] ** 2).sum()) + left
        values, left, _, _ = self._core.energies()
        return values, left

    @property
    def column_variances(self) -> Array:
        """``(n,)`` variance of each column over the rows, divided by their number (by the sum of squared weights with
        ``forget``), about the mean with ``center`` and about zero without; float64. Exact, whatever ``rank`` is.
        """
        if self._there is not None:
            raise TypeError("column_variances is not implemented on CUDA devices")
        if self._inner is not None and self._inner.factor.ndim != 1:
            raise TypeError("column_variances is not implemented for a weight that is a matrix; a diagonal is taken")
        self._require_rows()
        variances = self._core.column_variances()
        if self._inner is not None:
            variances = variances / self._inner.given
        return to_library(variances, self._library)

    @property
    def rows_seen(self) -> int:
        """Number of rows added, less those removed."""
        if self._there is not None:
            return self._there.rows
        return self._core.rows_seen()

    @property
    def captured_energy(self) -> float:
        """Sum of the squared singular values."""
        if self._there is not None:
            k, values, _ = self._there.shown(self.rank, self.energy)
            return float((values[:k] ** 2).sum())
        return self._core.captured_energy()

    @property
    def residual_energy(self) -> float:
        """Squared Frobenius norm of what truncation has left out."""
        if self._there is not None:
            k, values, left = self._there.shown(self.rank, self.energy)
            return float((values[k:] ** 2).sum()) + left
        return self._core.residual_energy()

    @property
    def n_features(self) -> int | None:
        """Number of columns, None before the first rows."""
        if self._there is not None:
            return self._there.n
        return self._core.features() or None

    @property
    def dtype(self) -> np.dtype[Any] | None:
        """dtype of the stream, None before the first rows unless it was given."""
        if self._there is not None:
            return np.dtype(self._there.dtype)
        name = self._core.dtype()
        return self._dtype if name is None else np.dtype(name) if self._inner is None else self._shown

    def project(self, X: Array, *, out: Array | None = None) -> Array:
        """Coordinates ``(m, k)`` of rows ``X (m, n)`` in the subspace: ``(X - mean) @ components.T``.

        Of one row ``(n,)`` they are ``(k,)``. Rows are centred before they are multiplied, so a large mean costs no
        digits. ``out`` must share no memory with ``X``. NaN in ``X`` goes through; coordinates that overflow raise
        ValueError.
        """
        if self._there is not None:
            x = self._centred(X)
            z = self._there.product(x, self._there.place.transposed(self.components))
            return self._device_result(z[0] if len(X.shape) == 1 else z, out)
        return self._read(X, "X", out, "project")

    def _read(self, X: Array, name: str, out: Array | None, what: str) -> Array:
        self._require_rows()
        flips: Any = None
        core = self._core
        if self._inner is not None and self._canonical() and what != "residual":
            core = core.copy()  # signs and coordinates of one moment
            flips = self._flips(core.components())
        if out is not None:
            check_output(out, self.dtype)
        target = None if out is None or self._inner is not None else detached(out)
        dense = getattr(core, what)
        if name == "X" and is_sparse(X):
            parts = self._csr(X, name)
            result = getattr(core, what + "_csr")(*parts, target) if isinstance(parts, tuple) else dense(parts, target)
            library, like = "numpy", None
        else:
            library, like = library_of(X), X
            if name == "Z":
                x = as_array(X, name)
                check_library(x, name)
                x = detached(as_float(x, name, self._wanted()))
                self._check_dtype(x, name)
                if self._inner is not None:
                    x = numpy(x).astype(np.float64)
                    if flips is not None and x.ndim in (1, 2) and x.shape[-1] == len(flips):  # others raise below
                        x = x * flips
            else:
                x, library = self._dense(X, name)
            if len(x.shape) not in (1, 2):
                raise ValueError(f"{name} must have 1 or 2 dimensions, got shape {tuple(x.shape)}")
            result = dense(x, target)
        if self._inner is not None:
            if what == "project" and flips is not None:
                result = np.asarray(result) * flips
            if name == "Z":
                result = self._inner.backward(np.atleast_2d(result)).reshape(result.shape)
            result = self._in_dtype(np.asarray(result), "the result")
            if out is not None:
                self._write(result, out, X, name)
        if out is not None:
            return finish(out, False, "")
        if isinstance(result, np.ndarray) and result.ndim == 0:
            return result[()] if library == "numpy" else to_library(result, library, like)
        return to_library(result, library, like)

    def _write(self, result: Any, out: Array, x: Array, name: str) -> None:
        if tuple(out.shape) != result.shape:
            raise ValueError(f"out must have shape {result.shape}, got {tuple(out.shape)}")
        view = numpy(detached(out))
        parts = [getattr(x, p) for p in ("data", "indices", "indptr", "row", "col", "offsets") if hasattr(x, p)]
        given = parts if is_sparse(x) else [numpy(detached(as_array(x, name)))]
        if any(isinstance(p, np.ndarray) and np.shares_memory(view, p) for p in given):
            raise ValueError(f"out must share no memory with {name}")
        if library_of(out) == "torch":
            import torch

            detached(out).copy_(torch.from_numpy(result))
        else:
            out[...] = result

    def reconstruct(self, Z: Array, *, out: Array | None = None) -> Array:
        """Rows ``(m, n)`` from coordinates ``Z (m, k)``: ``Z @ components + mean``; from ``(k,)`` one row ``(n,)``.

        ``out`` must share no memory with ``Z``.
        """
        if self._there is not None:
            if not on_device(Z):
                raise TypeError("Z is on the CPU and the stream on a CUDA device; move it first")
            v = self.components
            self._there.check_dtype(Z, "Z")
            one = len(Z.shape) == 1
            rows = Z[None] if one else Z
            if len(rows.shape) != 2 or int(rows.shape[1]) != int(v.shape[0]):
                raise ValueError(f"Z must have shape (m, {int(v.shape[0])}), got {tuple(Z.shape)}")
            x = self._there.product(detached(rows), v)
            if self.mean is not None:
                with self._there.place.inside():
                    x += self.mean
            return self._device_result(x[0] if one else x, out)
        return self._read(Z, "Z", out, "reconstruct")

    def residual(self, X: Array, *, out: Array | None = None) -> Array:
        """Squared distances ``(m,)`` of rows ``X (m, n)`` to the (affine) subspace; of one row ``(n,)`` a scalar.

        By explicit subtraction of the projection, so that tiny residuals keep their digits. ``out`` must share no
        memory with ``X``. NaN in ``X`` goes through; squares that overflow raise ValueError.
        """
        if self._there is not None:
            x, v = self._centred(X), self.components
            along = self._there.product(self._there.product(x, self._there.place.transposed(v)), v)
            with self._there.place.inside():
                along -= x
                along *= along
                squares = along.sum(-1)
            return self._device_result(squares[0] if len(X.shape) == 1 else squares, out)
        return self._read(X, "X", out, "residual")

    def _centred(self, X: Array) -> Array:
        assert self._there is not None
        if not on_device(X):
            raise TypeError("X is on the CPU and the stream on a CUDA device; move it first")
        X = self._there.check(X[None] if len(X.shape) == 1 else X, "X")
        mean = self._there.mean
        if mean is None:
            return X
        self._there.host()
        place = self._there.place
        with place.inside():  # what rounding the mean to the dtype leaves out comes off, too
            high = place.converted(mean, self._there.dtype)
            low = place.converted(mean - place.converted(high, "float64"), self._there.dtype)
            return (X - high) - low

    def _device_result(self, x: Array, out: Array | None) -> Array:
        if out is None:
            return x
        assert self._there is not None
        place = self._there.place
        target = place.output(out, tuple(x.shape), self._there.dtype)
        with place.inside():
            target[...] = x
        return out

    def _require_rows(self) -> None:
        if self._core.dtype() is None:
            raise ValueError("the stream has seen no rows")

    # -- saving --------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return sealed_state(self._state())

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any]
        state = self._core.state() if self._there is None else {"dtype": self._there.dtype, **self._there.saved()}
        state.update(
            format=_FORMAT,
            rank=self.rank,
            forget=self.forget,
            center=self.center,
            energy=self.energy,
            method=self.method,
            oversample=self.oversample,
            wanted_dtype=None if self._dtype is None else self._dtype.name,
            exact_blocks=self.exact_blocks,
            signs=self.signs,
            **({"inner_product": None} if self._inner is None else self._inner.members()),
            shown_dtype=None if self._shown is None else self._shown.name,
            library=self._library,
            on_device=self._there is not None,
        )
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = checked_state(state, "StreamingSVD", _FORMAT, _NEEDED)
        try:
            self._restore(state)
        except (TypeError, RuntimeError, AttributeError) as e:  # what a member of another kind makes of the pieces
            raise ValueError(f"not a state of StreamingSVD: {e}") from e

    def _restore(self, state: dict[str, Any]) -> None:
        self._configure(
            state["rank"],
            state["forget"],
            state["center"],
            state["energy"],
            state["method"],
            state["wanted_dtype"],
            state["oversample"],
            bool(state["exact_blocks"]),
            state.get("signs") or "stable",
            InnerProduct.restored(state),
        )
        shown = state.get("shown_dtype")
        self._shown = None if shown is None else float_dtype(shown)
        library = _known_library(state["library"])
        if state.get("on_device", False):  # files of earlier versions have no such entry
            self._there = DeviceState.restored(library, state, self.forget, self.method, self.center)
        else:
            self._core.restore(state)
            if self._inner is not None and self._core.features() not in (0, self._inner.factor.shape[0]):
                raise ValueError(
                    f"weight has {self._inner.factor.shape[0]} columns, the stream {self._core.features()}"
                )
        self._library = library

    def copy(self) -> StreamingSVD:
        """An independent copy."""
        new = StreamingSVD.__new__(StreamingSVD)
        new.__dict__.update(self.__dict__)
        new._writing = threading.Lock()
        if self._there is not None:
            new._there = self._there.copy()
        else:
            new._core = self._core.copy()
        return new

    __copy__ = copy

    def __deepcopy__(self, memo: dict[int, Any]) -> StreamingSVD:
        return self.copy()

    def save(self, path: str | os.PathLike[str] | bytes) -> None:
        """Write the stream to ``path``, a NumPy ``.npz`` archive without pickles. Written aside, then renamed."""
        write_archive(path, self.__getstate__())

    @classmethod
    def load(cls, path: str | os.PathLike[str] | bytes) -> StreamingSVD:
        """Read what :meth:`save` wrote. ValueError names what is wrong with a file that is damaged or another kind."""
        state = read_archive(path, "StreamingSVD", _NEEDED, _MEMBERS)
        self = cls.__new__(cls)
        try:
            self.__setstate__(state)
        except Exception as e:  # whatever a wrong member makes the pieces below raise
            raise ValueError(f"{os.fsdecode(path)}: damaged StreamingSVD file ({e})") from e
        return self

    def __repr__(self) -> str:
        options = [f"rank={self.rank}"]
        if self.forget != 1.0:
            options.append(f"forget={self.forget:g}")
        if self.center:
            options.append("center=True")
        if self.energy is not None:
            options.append(f"energy={self.energy:g}")
        if self.oversample is not None:
            options.append(f"oversample={self.oversample}")
        if self.method != "auto":
            options.append(f"method={self.method!r}")
        if self.exact_blocks:
            options.append("exact_blocks=True")
        if self.signs != "stable":
            options.append(f"signs={self.signs!r}")
        if self._inner is not None:
            options.append(f"weight=<{'x'.join(map(str, self._inner.given.shape))}>")
        if self._there is not None:
            what = f"{self._there.n} {self._there.dtype}, {self._library} on CUDA device {self._there.place.device}"
            return f"StreamingSVD({', '.join(options)}) <{self.rows_seen} rows of {what}>"
        if self._core.dtype() is None:
            return f"StreamingSVD({', '.join(options)}) <no rows yet>"
        return (
            f"StreamingSVD({', '.join(options)}) "
            f"<{self.rows_seen} rows of {self._core.features()} {self.dtype}, "
            f"route {self._core.route()}>"
        )


def _known_library(name: Any) -> str:
    """A saved library, imported: results go to it."""
    if name not in _LIBRARIES:
        raise ValueError(f"library is {name!r}, wanted one of {', '.join(_LIBRARIES)}")
    if name != "numpy":
        importlib.import_module(name)
    return str(name)
