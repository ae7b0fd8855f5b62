"""Inner products that are not Euclid's: rows are carried to coordinates where they are."""

from __future__ import annotations

from typing import Any

import numpy as np

from subspan import _core
from subspan._lib.arrays import as_array, as_float, check_float
from subspan._lib.device import numpy, on_the_cpu
from subspan._lib.numbers import float_dtype, whole_number
from subspan._lib.sparse import csr_parts, is_sparse
from subspan._lib.threads import in_a_thread, stoppable

_AT_ONCE = 256  # unit vectors that an operator is applied to together
_MOST_COLUMNS = 2**18  # of an operator: its matrix is n² entries to look through
_MOST_ENTRIES = 2**28  # of the matrix that an operator turns out to be: 2 GiB


def signs_of_rows(v: Any) -> Any:
    """Of the entry of largest magnitude in each row."""
    return np.where(v[np.arange(v.shape[0]), np.abs(v).argmax(axis=1)] < 0, -1.0, 1.0)


def no_overflow(y: Any, x: Any, what: str) -> Any:
    """``y``, made of ``x``; ValueError where it is not finite and ``x`` is."""
    if not np.isfinite(y).all() and np.isfinite(x).all():
        raise ValueError(f"{what} overflows the dtype although the input is finite; scale it")
    return y


def _matrix_of(operator: Any) -> Any:
    """The matrix of an operator, sparse where it is: a factor needs its entries. One product for 256 columns."""
    from scipy import sparse

    shape = getattr(operator, "shape", None)
    if not isinstance(shape, tuple) or len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(f"weight is an operator, and its shape must be (n, n), got {shape!r}")
    matrix = getattr(operator, "A", None)  # what scipy.sparse.linalg.aslinearoperator has wrapped
    if type(operator).__name__ == "MatrixLinearOperator" and getattr(matrix, "shape", None) == shape:
        return matrix
    n = whole_number(shape[0], "weight.shape[0]", 0)
    if n > _MOST_COLUMNS:
        raise ValueError(
            f"weight is an operator of {n} columns; its matrix must be formed, which is done for at most "
            f"{_MOST_COLUMNS} columns: pass the matrix itself, sparse or diagonal"
        )
    pieces, count = [], 0
    for first in range(0, n, _AT_ONCE):
        width = min(_AT_ONCE, n - first)
        units = np.zeros((n, width))
        units[np.arange(first, first + width), np.arange(width)] = 1
        columns = np.asarray(operator.matmat(units))
        if columns.shape != (n, width):
            raise ValueError(f"weight.matmat of {(n, width)} gave shape {columns.shape}")
        if columns.dtype.kind not in "fiu":
            raise TypeError(f"weight must be real, its matmat gave {columns.dtype}")
        pieces.append(sparse.csc_array(columns.astype(np.float64)))
        count += pieces[-1].nnz
        if count > _MOST_ENTRIES:
            raise ValueError(
                f"weight is an operator with more than {_MOST_ENTRIES} entries, too many to factor; pass a diagonal or "
                "a sparse matrix near it"
            )
    whole = sparse.hstack(pieces, format="csc") if pieces else sparse.csc_array((0, 0))
    return whole.toarray() if whole.nnz > n * n // 4 else whole


class InnerProduct:
    """The inner product ``x·W·y`` as a change of coordinates ``x ↦ x F`` with ``W = F Fᵀ``.

    ``F`` is the root of a diagonal, the Cholesky factor of a dense matrix, or that of a sparse one in an order of rows
    that keeps it sparse (minimum degree).
    """

    def __init__(self, weight: Any) -> None:
        on_the_cpu(weight, "weight")
        self.given: Any
        self.factor: Any
        self._order: Any = None  # of a sparse matrix: the rows' places in the triangle
        self._solver: Any = None
        if hasattr(weight, "matmat") and not hasattr(weight, "__array__") and not is_sparse(weight):
            weight = _matrix_of(weight)
        if is_sparse(weight):
            data, indices, indptr, m, n = csr_parts(weight, "weight", np.float64)
            from scipy import sparse

            check_float(data, "weight")
            self.given = sparse.csr_array((data.astype(np.float64), indices, indptr), shape=(m, n)).tocsc()
        else:
            given = as_float(as_array(weight, "weight"), "weight")
            check_float(given, "weight")
            self.given = np.array(numpy(given, "weight"), np.float64)
        shape = tuple(self.given.shape)
        entries = self.given.data if is_sparse(self.given) else self.given
        if not np.isfinite(entries).all():
            raise ValueError("weight holds NaN or infinity")
        if len(shape) == 1:
            if not (entries > 0).all():
                raise ValueError("weight must be positive")
            self.factor = np.sqrt(entries)
            return
        if len(shape) != 2 or shape[0] != shape[1]:
            raise ValueError(f"weight must have shape (n,) or (n, n), got {shape}")
        skew = abs(self.given - self.given.T)
        skew = skew.data if is_sparse(skew) else skew
        if skew.max(initial=0.0) > 1e-12 * np.abs(entries).max(initial=0.0):
            raise ValueError("weight must be symmetric")
        if is_sparse(self.given):
            self.factor = self._sparse_factor()
            return
        try:
            self.factor = stoppable(np.linalg.cholesky, self.given)
        except np.linalg.LinAlgError:
            raise ValueError("weight must be positive definite") from None

    def _sparse_factor(self) -> Any:
        # W = Pᵀ L D Lᵀ P: an LU factorisation with pivots on the diagonal. F = Pᵀ L √D.
        from scipy import sparse
        from scipy.sparse.linalg import splu

        n = self.given.shape[0]
        if n == 0:
            return sparse.csc_array((0, 0))
        symmetric = {"SymmetricMode": True, "Equil": False}
        try:
            options = {"permc_spec": "MMD_AT_PLUS_A", "diag_pivot_thresh": 0.0, "options": symmetric}
            lu = in_a_thread(splu, (self.given,), options, outlived=False)
        except RuntimeError:  # exactly singular
            raise ValueError("weight must be positive definite") from None
        pivots = lu.U.diagonal()
        if not (pivots > 0).all() or not np.array_equal(lu.perm_r, lu.perm_c):  # a pivot off the diagonal: one of zero
            raise ValueError("weight must be positive definite")
        triangle = (lu.L @ sparse.dia_array((np.sqrt(pivots)[None], [0]), shape=(n, n))).tocsc()
        self._order = lu.perm_r
        # Of a triangle the LU factors are itself and a diagonal: its solves are SuperLU's.
        self._solver = splu(triangle, permc_spec="NATURAL", diag_pivot_thresh=0.0, options={"Equil": False})
        return sparse.csr_array(triangle)[self._order].tocsc()

    def same_as(self, other: InnerProduct) -> bool:
        if self.given.shape != other.given.shape or is_sparse(self.given) != is_sparse(other.given):
            return False
        return not abs(self.given - other.given).max() if self.given.size else True

    def _check(self, n: int, name: str) -> None:
        if n != self.factor.shape[0]:
            raise ValueError(f"{name} must have {self.factor.shape[0]} columns as weight has, got {n}")

    def forward(self, x: Any, name: str) -> Any:
        """``x F`` in NumPy and float64: rounded to float32, rows with a large mean would lose what centring needs."""
        x = np.asarray(x) if isinstance(x, np.ndarray) else np.from_dlpack(x)
        if x.ndim not in (1, 2):
            hint = _core.convolution_hint(tuple(x.shape), name)
            raise ValueError(f"{name} must have 1 or 2 dimensions, got shape {x.shape}{hint}")
        self._check(x.shape[-1], name)
        x = x.astype(np.float64, copy=False)
        with np.errstate(over="ignore", invalid="ignore"):
            y = x * self.factor if self.factor.ndim == 1 else np.ascontiguousarray(x @ self.factor)
        return no_overflow(y, x, f"{name} times the factor of weight")

    def forward_csr(self, parts: tuple[Any, Any, Any, int, int], name: str) -> Any:
        """``x F`` of sparse rows: as such parts where ``F`` is diagonal or sparse, else a dense array."""
        data, indices, indptr, m, n = parts
        self._check(n, name)
        what = f"{name} times the factor of weight"
        with np.errstate(over="ignore", invalid="ignore"):
            if self.factor.ndim == 1:
                scaled = data.astype(np.float64, copy=False) * self.factor[indices]
                return no_overflow(scaled, data, what), indices, indptr, m, n
            from scipy import sparse

            y = sparse.csr_array((data.astype(np.float64, copy=False), indices, indptr), shape=(m, n)) @ self.factor
        if not is_sparse(y):
            return no_overflow(np.ascontiguousarray(y), data, what)
        y = y.tocsr()
        no_overflow(y.data, data, what)
        return csr_parts(y, name)

    def backward(self, v: Any) -> Any:
        """``v F⁻¹``."""
        if self.factor.ndim == 1:
            return v / self.factor
        if is_sparse(self.factor):
            if v.size == 0:
                return np.array(v)
            return np.ascontiguousarray(self._solver.solve(np.ascontiguousarray(v.T), "T").T[:, self._order])
        from scipy.linalg import solve_triangular

        return np.ascontiguousarray(solve_triangular(self.factor, v.T, lower=True, trans="T", check_finite=False).T)

    def behind(self, A: Any) -> Any:
        """The operator ``A F`` of a sparse matrix or an operator ``A``."""
        self._check(int(A.shape[1]), "A")
        return _Behind(A, self)

    def members(self) -> dict[str, Any]:
        """What a saved state holds of it."""
        if not is_sparse(self.given):
            return {"inner_product": self.given}
        x = self.given
        return {"inner_product": x.data, "inner_indices": x.indices, "inner_indptr": x.indptr}

    @classmethod
    def restored(cls, state: dict[str, Any]) -> InnerProduct | None:
        given = state.get("inner_product")
        if given is None:
            return None
        indices, indptr = state.get("inner_indices"), state.get("inner_indptr")
        if indices is None or indptr is None:
            return cls(given)
        from scipy import sparse

        n = len(indptr) - 1
        return cls(sparse.csr_array((given, indices, indptr), shape=(n, n)))  # symmetric: rows are columns


class WeightedState:
    """The state of a stream in another inner product, around one that is given coordinates where it is Euclid's, in
    float64. What is not here is that one's.
    """

    def __init__(self, inner: InnerProduct, state: Any, canonical: bool, wanted: str | None) -> None:
        self._inner, self._state, self._canonical, self._wanted = inner, state, canonical, wanted
        self._shown: str | None = None  # dtype of the rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)

    def dtype(self) -> str | None:
        return None if self._state.dtype() is None else self._shown

    def _check_dtype(self, x: Any, name: str) -> str:
        dtype, own = check_float(x, name).name, self.dtype() or self._wanted
        if own is not None and dtype != own:
            raise TypeError(f"{name} must be {own} as the stream is, got {dtype}")
        return dtype

    def _forward(self, parts: tuple[Any, ...], name: str) -> tuple[Any, ...]:
        """An array or the parts of a sparse matrix in the coordinates of the state inside, as either."""
        if len(parts) == 1:
            return (self._inner.forward(parts[0], name),)
        made = self._inner.forward_csr(parts, name)
        return made if isinstance(made, tuple) else (made,)

    def _rounded(self, x: Any, what: str) -> Any:
        """What was worked out in float64, in the dtype of the rows."""
        with np.errstate(over="ignore"):
            return no_overflow(x.astype(self._shown, copy=False), x, what)

    def update(self, *parts: Any) -> None:
        dtype = self._check_dtype(parts[0], "rows")
        made = self._forward(parts, "rows")
        (self._state.update if len(made) == 1 else self._state.update_csr)(*made)
        self._shown = dtype

    update_csr = update

    def update_with_rotation(self, rows: Any) -> tuple[Any, Any, Any]:
        dtype = self._check_dtype(rows, "rows")
        (made,) = self._forward((rows,), "rows")
        twin, signs = self._state.copy(), self._signs(self._state)
        past, new, shift = twin.update_with_rotation(made)
        after = self._signs(twin)
        self._state, self._shown = twin, dtype
        return past * after if signs is None else past * signs[:, None] * after, new * after, shift * after

    def _signs(self, state: Any) -> Any:
        """What the components that are shown are of the state's, before rounding; None before the first rows."""
        return None if state.dtype() is None else signs_of_rows(self._inner.backward(state.components()))

    def downdate(self, rows: Any) -> None:
        self._check_dtype(rows, "rows")
        self._state.downdate(*self._forward((rows,), "rows"))

    def merge(self, other: WeightedState) -> None:
        theirs, own = other._shown, self.dtype() or self._wanted
        if own is not None and own != theirs:
            raise TypeError(f"other must be {own} as the stream is, got {theirs}")
        self._state.merge(other._state)
        self._shown = theirs

    def values(self) -> Any:
        values = self._state.values()
        return None if values is None else self._rounded(values, "singular_values")

    def components(self) -> Any:
        v = self._state.components()
        if v is None:
            return None
        v = self._inner.backward(v)
        return self._rounded(v * signs_of_rows(v)[:, None] if self._canonical else v, "components")

    def mean(self) -> Any:
        mean = self._state.mean()
        return None if mean is None else self._inner.backward(mean[None])[0].astype(self._shown)

    def column_variances(self) -> Any:
        if self._inner.factor.ndim != 1:
            raise TypeError("column_variances is not implemented for a weight that is a matrix; a diagonal is taken")
        variances = self._state.column_variances()
        return None if variances is None else variances / self._inner.given

    def _read(self, what: str, parts: tuple[Any, ...], out: Any, name: str) -> Any:
        self._check_dtype(parts[0], name)
        if out is not None:  # before the work
            rows = parts[3:4] if len(parts) > 1 else tuple(parts[0].shape)[:-1]
            kept, columns = self._state.components().shape
            wide = {"project": (kept,), "reconstruct": (columns,), "residual": ()}[what]
            _core.check_output(out, (*rows, *wide), parts[0], name)
        state, signs = self._state, 1.0
        if self._canonical and what != "residual":
            state = state.copy()  # signs and coordinates of one moment
            signs = signs_of_rows(self._inner.backward(state.components()))
        if what == "reconstruct":
            z = numpy(parts[0]).astype(np.float64)
            fits = z.ndim in (1, 2) and z.shape[-1] == state.components().shape[0]  # others raise below
            x = state.reconstruct(z * signs if fits else z, None)
            result = self._inner.backward(np.atleast_2d(x)).reshape(x.shape)
        else:
            made = self._forward(parts, name)
            result = getattr(state, what if len(made) == 1 else what + "_csr")(*made, None)
            result = np.asarray(result) * (signs if what == "project" else 1.0)
        result = self._rounded(np.asarray(result), "the result")
        return result if out is None else _core.write_output(out, result)

    def project(self, x: Any, out: Any) -> Any:
        return self._read("project", (x,), out, "X")

    def project_csr(self, *parts: Any) -> Any:
        return self._read("project", parts[:-1], parts[-1], "X")

    def reconstruct(self, z: Any, out: Any) -> Any:
        return self._read("reconstruct", (z,), out, "Z")

    def residual(self, x: Any, out: Any) -> Any:
        return self._read("residual", (x,), out, "X")

    def residual_csr(self, *parts: Any) -> Any:
        return self._read("residual", parts[:-1], parts[-1], "X")

    def copy(self) -> WeightedState:
        new = WeightedState(self._inner, self._state.copy(), self._canonical, self._wanted)
        new._shown = self._shown
        return new

    def state(self) -> dict[str, Any]:
        return {**self._state.state(), **self._inner.members(), "shown_dtype": self._shown}

    def restore(self, state: dict[str, Any]) -> None:
        shown = state.get("shown_dtype")
        self._state.restore(state)
        self._shown = None if shown is None else float_dtype(shown).name
        if self._state.features() not in (0, self._inner.factor.shape[0]):
            raise ValueError(f"weight has {self._inner.factor.shape[0]} columns, the stream {self._state.features()}")


class _Behind:
    dtype = np.dtype(np.float64)

    def __init__(self, A: Any, inner: InnerProduct) -> None:
        self.shape, self._a, self._inner = A.shape, A, inner
        self._sparse = is_sparse(A)

    def matmat(self, x: Any) -> Any:
        f = self._inner.factor
        y = f[:, None] * x if f.ndim == 1 else f @ x
        return self._a @ y if self._sparse else self._a.matmat(y)

    def rmatmat(self, x: Any) -> Any:
        f = self._inner.factor
        y = self._a.T @ x if self._sparse else self._a.rmatmat(x)
        return f[:, None] * y if f.ndim == 1 else f.T @ y
