"""Streams of rows, and one-shot decompositions."""

from __future__ import annotations

import inspect
import math
from typing import Any, NamedTuple

import numpy as np

from subspan import _core
from subspan._lib.arrays import (
    Array,
    as_array,
    check_float,
    check_library,
    detached,
    float_array,
    library_of,
    to_library,
)
from subspan._lib.device import DeviceMemory, device_of, memory_of, numpy, on_the_cpu
from subspan._lib.files import Kept, checked_state, known_library, sealed_state
from subspan._lib.numbers import choice, float_dtype, real_number, share, truth, whole_number
from subspan._lib.sparse import csr_parts, dense_rows, is_sparse
from subspan.svd.inner_product import InnerProduct, WeightedState, no_overflow

__all__ = ["StreamingSVD"]

_FORMAT = "subspan.StreamingSVD/2"


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
        dtype, u = check_float(U, "U"), numpy(U, "U")
        if u.ndim != 2 or u.shape[1] != self.past.shape[0]:
            raise ValueError(f"U must have shape (m, {self.past.shape[0]}), got {u.shape}")
        after = np.vstack([u @ self.past + self.shift, self.new]).astype(dtype)
        return to_library(after, library_of(U), U)


class StreamingSVD(Kept):
    """Truncated SVD of a tall matrix whose rows arrive in blocks.

    With all rows seen so far stacked into a matrix ``A`` (minus their mean with ``center``), ``singular_values`` and
    ``components`` are the leading singular values and right singular vectors of ``A``: exactly up to some thousand
    columns, beyond that up to what truncations after earlier updates have discarded (``residual_energy``).

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
        Directions kept internally beyond ``rank``. Later rows cannot restore what a truncation has discarded, so with a
        slowly decaying spectrum a stream captures less energy than the best rank-k approximation; more directions
        reduce the loss. By default nothing is truncated where second moments are kept (Notes); else the total is all
        directions for up to 128 columns, ``2 rank + 64`` below 1024 columns, and ``max(rank, min(64, 2 rank + 32))``
        from there on. A number asks for such a truncated stream at any width.
    exact_blocks : bool, default False
        Decompose the rows of each update as one block, and keep ``rank`` directions: no thin blocks are collected and
        no tall ones split. As scikit-learn's ``IncrementalPCA``, and what ``update(rotation=True)`` needs.
    signs : {"stable", "v"}
        Signs of the components. ``"stable"``: each keeps the sign of the component before the update that it is closest
        to; in the first block the entry of largest magnitude is positive. ``"v"``: that entry is positive after every
        update (always so with ``exact_blocks``).
    weight : array ``(n,)``, array or sparse matrix ``(n, n)``, or operator, optional
        The inner product ``x·W·y`` of rows, a mass matrix for example: its diagonal, or a symmetric positive definite
        matrix, whose Cholesky factor is kept: sparse for a sparse matrix, in an order that keeps the fill small. An
        operator (``shape`` and ``matmat``, a ``scipy.sparse.linalg.LinearOperator`` say) is applied to the unit vectors
        once, 256 at a time, and factored like the matrix that this gives, sparse where that is.
        ``singular_values`` are those in that inner product, and ``components @ W @ components.T`` is the identity.

    Notes
    -----
    Up to 1024 columns (2048 where ``6 k`` is as much), with ``method="auto"`` and no ``oversample``, a stream keeps the
    ``n × n`` second moments in double, about the mean of the first block: an update of ``b`` rows costs ``b n**2``
    flops and truncates nothing, a result ``4/3 n**3`` when it is read after an update. Streams of float64 rows whose
    measured ``s_1 / s_rank`` exceeds 64 leave them, as squares would lose digits. Between updates of single rows few
    rows are scored (:meth:`project`, :meth:`residual`) by components that follow by updates of rank one, in ``O(k n)``;
    reading ``components`` solves. Where results are read after every few rows, ``oversample=rank`` costs less.

    Else, with ``k`` the number of directions kept, an update of ``b`` rows costs ``n ((k + b)**2 + 2 k (k + b))`` flops
    on the Gram route, about 1.6 times as much on the robust one, and ``O((k + b)**3)`` for the small problem. Work
    memory is less than ``3 (k + b) n`` items and some ten matrices of ``(k + b)**2`` doubles; an ``n × n`` matrix is
    formed only where ``k + b > n`` and ``n <= 256`` (4096 with ``exact_blocks``). Blocks of fewer than ``k / 2`` rows
    are buffered, so that a single row costs no more than a row of a block; those of more than ``2 k`` are split.
    Of sparse rows up to ``8 k`` are collected, and share the passes over the ``k × n`` basis.

    Fewer than ``rank`` components exist until that many independent rows have been seen; ``k`` in the shapes of the
    attributes is the current number.

    An update that raises leaves the stream as it was. Objects may be shared between threads; calls take turns. On a
    CUDA device an update does not synchronise with the host: a block with NaN is left out, and the next result that is
    read raises. Blocks are not buffered there, and are split into at most 128 rows (or ``k``, if that is more).

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

    _OPTIONS = ("rank", "forget", "center", "energy", "oversample", "method", "exact_blocks", "signs")
    _NEEDED = frozenset({"format", "wanted_dtype", "dtype", "library", *_OPTIONS} - {"signs"})
    _HOST = ("features", "rows_seen", "skip_gram", "dropped", "components", "low", "scatter", "singular_values", "mean")
    _DEVICE = tuple(f"device_{x}" for x in ("components", "values", "mean", "totals", "rank", "rows", "inner"))
    _MOMENTS = (
        "skip_moments",
        "skip_again",
        "moments",
        "moment_sum",
        "moment_shift",
        "moment_reference",
        "moment_figures",
    )
    _WEIGHT = ("weight", "inner_product", "inner_indices", "inner_indptr", "shown_dtype")
    _MORE = frozenset({"checksum", "signs", "on_device", *_HOST, *_MOMENTS, *_WEIGHT, *_DEVICE})

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
        self.rank = whole_number(rank, "rank", 1)
        self.oversample = None if oversample is None else whole_number(oversample, "oversample", 0)
        self.forget = real_number(forget, "forget")
        if not 0.0 < self.forget <= 1.0:
            raise ValueError(f"forget must be in (0, 1], got {forget}")
        self.center = truth(center, "center")
        self.energy = None if energy is None else share(energy, "energy")
        self.method = choice(method, "method", "auto", "robust", "gram")
        self.signs = choice(signs, "signs", "stable", "v")
        self.exact_blocks = truth(exact_blocks, "exact_blocks")
        self._dtype = None if dtype is None else float_dtype(dtype)
        self._inner = weight if weight is None or isinstance(weight, InnerProduct) else InnerProduct(weight)
        self._turn = _core.Turn()
        self._library = "numpy"
        self._place: DeviceMemory | None = None  # of the rows, where they are on a CUDA device
        self._settled = False  # updates of NumPy's rows go straight to the state, whose own lock is enough
        self._state = self._made(None)

    def _made(self, place: DeviceMemory | None) -> Any:
        """A state without rows, on the host or a device."""
        more = -1 if self.oversample is None else self.oversample
        options = (self.rank, self.forget, self.center, self.energy or 0.0, self.method, more, self.exact_blocks)
        kernels, canonical = _core if place is None else place.module, self.signs == "v"
        name = None if self._dtype is None else self._dtype.name
        if self._inner is None:
            return kernels.SvdState(place, *options, canonical, name)
        if place is not None:
            raise TypeError("weight of a stream is not implemented on CUDA devices")
        # Signs are seen in the rows' coordinates, not in those that it works in.
        state = kernels.SvdState(None, *options, canonical, "float64")
        return WeightedState(self._inner, state, canonical or self.exact_blocks, name)

    # -- updates -------------------------------------------------------------------------------------------------------

    def update(self, rows: Array, *, rotation: bool = False) -> Any:
        """Add rows ``(b, n)``, dense in any library or sparse (CSR is taken as it is, other formats are converted).

        A vector ``(n,)`` is one row. Integers that the stream's dtype holds exactly (of up to 16 bits in float32, of up
        to 32 in float64) are converted; a stream that begins with integers is one of float64 unless ``dtype`` says
        otherwise.

        Returns the stream itself or, with ``rotation=True``, which needs ``exact_blocks``, a :class:`Rotation`: it maps
        the left singular vectors ``U`` before this update to those after it.

        Raises
        ------
        ValueError
            Wrong number of columns, an empty block, NaN or infinity, or ``rank`` above the number of columns.
        TypeError
            Not float32 or float64, another dtype or library than the stream's, or an array on another device.
        """
        if truth(rotation, "rotation"):
            return self._update_with_rotation(rows)
        if self._settled and type(rows) is np.ndarray and rows.dtype.char in "fd":
            self._state.update(rows)
        else:
            with self._turn:
                self._add(rows)
        return self

    def _add(self, rows: Array) -> None:
        state, place = self._state, self._place
        parts, library, there = self._rows(rows, "rows")
        if state.dtype() is None and there is not None:
            place = memory_of(rows=rows)
            state = self._made(place)
        before, self._library = self._library, library
        try:
            (state.update_csr if len(parts) > 1 else state.update)(*parts)
        finally:
            if state.dtype() is None:  # nothing was taken in
                self._library = before
        self._settle(state, place)

    def _settle(self, state: Any, place: DeviceMemory | None) -> None:
        """Rows are there: where they are, and of which library, does not change any more."""
        self._state, self._place = state, place
        self._settled = place is None and self._library == "numpy" and self._inner is None

    def _rows(self, x: Array, name: str) -> tuple[tuple[Any, ...], str, int | None]:
        """Rows as the kernels take them, an array or the parts of a sparse matrix, their library and device (None: the
        CPU); TypeError where these are not the stream's.
        """
        parts: tuple[Any, ...]
        if is_sparse(x):
            parts, library = csr_parts(x, name, self.dtype), "numpy"
        else:
            x = float_array(x, name, self.dtype)
            check_library(x, name)
            library = library_of(x)
            parts = (detached(x, name),)
        there = device_of(x)
        if there is not None and self._place is None and self._state.dtype() is not None:
            raise TypeError(f"{name} must be {self._library} arrays on the CPU as the stream's first rows were")
        if there is None and self._place is not None:
            raise TypeError(f"{name} is on the CPU and the stream on a CUDA device; move it first")
        if name == "rows" and self._library != library and self._state.dtype() is not None:
            raise TypeError(
                f"rows must be {self._library} arrays as the stream's first rows were, got {library}; "
                "results would change their library half-way"
            )
        return parts, library, there

    def _update_with_rotation(self, rows: Array) -> Rotation:
        dense = dense_rows(rows, "rows", self.dtype) if is_sparse(rows) else rows
        with self._turn:
            (block,), library, there = self._rows(dense, "rows")
            if there is not None:
                raise TypeError("rotation=True is not implemented on CUDA devices")
            change = Rotation(*self._state.update_with_rotation(block))
            self._library = library
            self._settle(self._state, None)
        return change

    def downdate(self, rows: Array) -> StreamingSVD:
        """Remove rows ``(b, n)`` that were added with weight one (``forget=1``).

        Raises ``numpy.linalg.LinAlgError`` when they cannot all have been added: the factor would become indefinite, or
        they hold more energy outside of the subspace than the stream has left out.
        """
        downdate = self._state.downdate
        dense = dense_rows(rows, "rows", self.dtype) if is_sparse(rows) else rows
        (block,), _, _ = self._rows(dense, "rows")
        with self._turn:
            downdate(block)
        return self

    def merge(self, other: StreamingSVD) -> StreamingSVD:
        """Add what another stream over the same columns has seen; ``other`` keeps its value.

        Streams may be merged in any order, also in a tree: up to truncation the result is the same.
        """
        if not isinstance(other, StreamingSVD):
            raise TypeError(f"other must be a StreamingSVD, got {type(other).__name__}")
        with self._turn:
            state, fresh = self._state, self._state.dtype() is None
            one, two = self._inner, other._inner
            same = two is None if one is None else two is not None and one.same_as(two)
            if other._state.dtype() is None and same:
                return self
            if fresh and other._place is not None:
                state = self._made(other._place)
            elif (other._place is None) != (self._place is None):
                there, here = (
                    ("on the CPU", "on a CUDA device") if other._place is None else ("on a CUDA device", "on the CPU")
                )
                raise TypeError(f"other is {there} and the stream {here}")
            if not same:
                raise ValueError("other must have the weight that the stream has, in the same form")
            if not fresh and self._library != other._library:
                raise TypeError(f"other must hold {self._library} arrays as the stream does, got {other._library}")
            state.merge(other._state)
            self._library = other._library
            self._settle(state, other._place)
        return self

    # -- results -------------------------------------------------------------------------------------------------------

    def _give(self, x: Any, *empty: int) -> Any:
        """A result in the library of the rows; before the first ones an empty array."""
        if x is None:
            x = np.empty(empty, dtype=self._dtype or np.float64)
        return to_library(x, self._library) if isinstance(x, np.ndarray) else x

    @property
    def singular_values(self) -> Array:
        """``(k,)``, descending; a fresh array."""
        return self._give(self._state.values(), 0)

    @property
    def components(self) -> Array:
        """``(k, n)`` right singular vectors as rows, orthonormal to ``10 eps sqrt(k)``; a fresh array."""
        return self._give(self._state.components(), 0, 0)

    @property
    def mean(self) -> Array:
        """``(n,)`` mean of the rows, or None without ``center``; a fresh array."""
        mean = self._state.mean() if self.center else None
        return None if mean is None else self._give(mean)

    @property
    def explained_variance_ratio(self) -> Array:
        """``(k,)`` share of each component in the energy (with ``center``: the variance) of all rows; float64."""
        values, left, seen, _ = self._state.energies()
        if not values.size or values[0] == 0.0:
            return to_library(np.zeros(values.shape), self._library)
        hidden = values.size < min(self.n_features or 0, seen)
        if not math.isfinite(left) or (hidden and values[0] < 1e-150):
            how = "underflows" if math.isfinite(left) else "overflows"
            raise ValueError(f"explained_variance_ratio: the residual energy {how}; scale the rows")
        shares = (values / values[0]) ** 2  # squares of the values themselves may leave the range of numbers
        return to_library(shares / (shares.sum() + (math.sqrt(left) / values[0]) ** 2), self._library)

    @property
    def explained_variance(self) -> Array:
        """``(k,)`` variance along each component, ``singular_values² / (rows_seen - 1)``; float64.

        With ``forget`` the divisor is the sum of squared weights of the rows, as that of :attr:`column_variances`.
        """
        values, _, seen, weight = self._state.energies()
        if weight is None:
            raise TypeError("explained_variance of a stream with forget is not implemented on CUDA devices")
        if seen < 2:
            raise ValueError(f"a variance needs at least two rows, and the stream has seen {seen}")
        with np.errstate(over="ignore"):
            variance = (values / math.sqrt(seen - 1 if self.forget == 1.0 else weight)) ** 2
        return to_library(no_overflow(variance, values, "explained_variance"), self._library)

    @property
    def column_variances(self) -> Array:
        """``(n,)`` variance of each column, about the mean with ``center`` and about zero without; float64. The divisor
        is the number of rows, or with ``forget`` the sum of their squared weights. Independent of ``rank``.
        """
        variances = self._state.column_variances()
        if variances is None:
            raise ValueError("the stream has seen no rows")
        return self._give(variances)

    @property
    def rows_seen(self) -> int:
        """Number of rows added, less those removed."""
        return int(self._state.rows_seen())

    @property
    def captured_energy(self) -> float:
        """Sum of the squared singular values."""
        return float(self._state.captured_energy())

    @property
    def residual_energy(self) -> float:
        """Squared Frobenius norm of what truncation has left out."""
        return float(self._state.residual_energy())

    @property
    def n_features(self) -> int | None:
        """Number of columns, None before the first rows."""
        return self._state.features() or None

    @property
    def dtype(self) -> np.dtype[Any] | None:
        """dtype of the stream, None before the first rows unless it was given."""
        name = self._state.dtype()
        return self._dtype if name is None else np.dtype(name)

    def project(self, X: Array, *, out: Array | None = None) -> Array:
        """Coordinates ``(m, k)`` of rows ``X (m, n)`` in the subspace: ``(X - mean) @ components.T``.

        Of one row ``(n,)`` they are ``(k,)``. Rows are centred before they are multiplied, so a large mean costs no
        digits. ``out`` must share no memory with ``X``. NaN in ``X`` goes through; coordinates that overflow raise
        ValueError.
        """
        return self._read("project", X, "X", out)

    def reconstruct(self, Z: Array, *, out: Array | None = None) -> Array:
        """Rows ``(m, n)`` from coordinates ``Z (m, k)``: ``Z @ components + mean``; from ``(k,)`` one row ``(n,)``.

        ``out`` must share no memory with ``Z``.
        """
        return self._read("reconstruct", Z, "Z", out)

    def residual(self, X: Array, *, out: Array | None = None) -> Array:
        """Squared distances ``(m,)`` of rows ``X (m, n)`` to the (affine) subspace; of one row ``(n,)`` a scalar.

        By explicit subtraction of the projection, so that tiny residuals keep their digits. ``out`` must share no
        memory with ``X``. NaN in ``X`` goes through; squares that overflow raise ValueError.
        """
        return self._read("residual", X, "X", out)

    def _read(self, what: str, x: Array, name: str, out: Array | None) -> Array:
        if self._state.dtype() is None:
            raise ValueError("the stream has seen no rows")
        x = float_array(x, name, self.dtype) if name == "Z" else x  # no sparse one
        parts, library, _ = self._rows(x, name)
        if len(parts) == 1 and len(parts[0].shape) not in (1, 2):
            raise ValueError(f"{name} must have 1 or 2 dimensions, got shape {tuple(parts[0].shape)}")
        result = getattr(self._state, what if len(parts) == 1 else what + "_csr")(*parts, out)
        if out is not None or not isinstance(result, np.ndarray):
            return result
        return result[()] if result.ndim == 0 and library == "numpy" else to_library(result, library, x)

    # -- saving --------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        options = {name: getattr(self, name) for name in self._OPTIONS}
        more = {"wanted_dtype": None if self._dtype is None else self._dtype.name, "on_device": self._place is not None}
        state = {"inner_product": None, "shown_dtype": None, **self._state.state()}
        return sealed_state({"format": _FORMAT, **options, **more, "library": self._library, **state})

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = checked_state(state, "StreamingSVD", _FORMAT, self._NEEDED)
        try:
            self._restore(state)
        except (TypeError, RuntimeError, AttributeError) as e:  # what a member of another kind makes of the pieces
            raise ValueError(f"not a state of StreamingSVD: {e}") from e

    def _restore(self, state: dict[str, Any]) -> None:
        options = {name: state[name] for name in self._OPTIONS if name != "signs"}
        options.update(exact_blocks=bool(state["exact_blocks"]), signs=state.get("signs") or "stable")
        self.__dict__.clear()
        self.__init__(**options, dtype=state["wanted_dtype"], weight=InnerProduct.restored(state))  # type: ignore[misc]
        library = known_library(state["library"])
        if state.get("on_device", False):  # files of earlier versions have no such entry
            self._place = DeviceMemory.current(library)
            self._state = self._made(self._place)
        self._state.restore(state)
        self._library = library
        if self._state.dtype() is not None:
            self._settle(self._state, self._place)

    def __repr__(self) -> str:
        options = [f"rank={self.rank}"]
        for name in self._OPTIONS[1:]:
            value = getattr(self, name)
            if value != inspect.signature(StreamingSVD).parameters[name].default:
                options.append(f"{name}={value!r}")
        if self._inner is not None:
            options.append(f"weight=<{'x'.join(map(str, self._inner.given.shape))}>")
        what = "no rows yet"
        if self._state.dtype() is not None:
            of = f"{self.n_features} {self.dtype}"
            where = "" if self._place is None else f"{self._library} arrays, "
            what = f"{self.rows_seen} rows of {of}, {where}route {self._state.route()}"
        return f"StreamingSVD({', '.join(options)}) <{what}>"
