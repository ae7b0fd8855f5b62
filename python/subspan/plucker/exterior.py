"""Exterior algebra: coordinates, wedges, relations, bases, complements."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from subspan import _core
from subspan._lib.arguments import detached, finish, matrices, numpy
from subspan._lib.arrays import Array, as_array, check_float, library_of, output, to_library, whole_number
from subspan.plucker.common import summed_to


def _vectors(x: Array, name: str, length: int | None = None) -> tuple[Array, np.dtype[Any]]:
    x = as_array(x, name)
    dtype = check_float(x, name)
    if len(x.shape) < 1:
        raise ValueError(f"{name} must have at least 1 dimension")
    if length is not None and x.shape[-1] != length:
        raise ValueError(f"{name} must have {length} entries along its last axis, got shape {tuple(x.shape)}")
    return x, dtype


def _same_dtype(x: Array, name: str, dtype: np.dtype[Any], first: str) -> None:
    if check_float(x, name) != dtype:
        raise TypeError(f"{name} must be {dtype} as {first} is, got {check_float(x, name)}")


_MOST = 2**31  # numbers of an array here, and dimensions of a space


def _comb(n: int, k: int, what: str = "") -> int:
    """C(n, k), found out to be too much before it is computed: it passes 2³¹ after 34 factors."""
    count, few = 1, min(k, n - k)
    for i in range(1, few + 1):
        count = count * (n - few + i) // i
        if count > _MOST:
            raise ValueError(f"{what or f'n={n}, k={k}'}: C({n}, {k}) is more than 2³¹, and no array here is as long")
    return count if few >= 0 else 0


def _grades(n: Any, k: Any, least: int = 1) -> tuple[int, int, int]:
    """n, k and C(n, k)."""
    n, k = whole_number(n, "n", 1, _MOST), whole_number(k, "k", least, _MOST)
    if k > n:
        raise ValueError(f"k must be at most n, got k={k} and n={n}")
    return n, k, _comb(n, k)


def _countable(n: int, k: int, name: str, shape: tuple[int, ...]) -> int:
    return _comb(n, k, f"{name}, shape {shape}")


def _finite(good: bool, what: str) -> None:
    if not good:
        raise ValueError(f"{what} overflows the dtype although the input is finite; scale what goes in")


def coordinates(A: Array, *, out: Array | None = None) -> Array:
    """Plücker coordinates: all ``k x k`` minors of ``n x k`` matrices.

    Parameters
    ----------
    A : array (..., n, k)
        ``k <= n``. Any strides.
    out : array (..., C(n, k)), optional
        Must share no memory with ``A``.

    Returns
    -------
    array (..., C(n, k))
        The minor of rows ``i_1 < ... < i_k``, in the order of ``itertools.combinations(range(n), k)``.

    Raises
    ------
    ValueError
        Where a minor overflows the dtype, or where the wedges on the way, ``Σ_q C(n, q)`` numbers up to ``q = k``, take
        more than 4 GiB (n = 26 with k = 13, say).

    Notes
    -----
    Column by column, ``p_q = p_{q-1} ∧ a_q``: ``2 Σ_q q C(n, q)`` flops in double, 16 matrices at a time. Where that
    passes through more than 4096 numbers and ``k > n/2``, by QR and the minors of the orthogonal complement. Each minor
    is exact to ``4 k eps`` times the product of the lengths of the columns. ``p(A M) = det(M) p(A)``. Harris, Algebraic
    Geometry: A First Course (1992), lecture 6.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan import plucker
    >>> plucker.coordinates(np.array([[1.0, 0.0], [2.0, 1.0], [0.0, 3.0]]))
    array([1., 3., 6.])
    """
    A, dtype = matrices(A, "A")
    n, k = (int(x) for x in A.shape[-2:])
    if not 1 <= k <= n:
        raise ValueError(f"A must have from 1 to {n} columns of {n} entries, got shape {tuple(A.shape)}")
    library = library_of(A)
    result, fresh = output(out, (*A.shape[:-2], _countable(n, k, "A", tuple(A.shape))), dtype, library)
    _finite(_core.plucker_coordinates(detached(A), detached(result)), "a minor")
    return finish(result, fresh, library)


def coordinates_backward(grad: Array, A: Array) -> Array:
    """Gradient of ``sum(grad * coordinates(A))`` with respect to ``A``: cofactors, without a division.

    Parameters
    ----------
    grad : array (..., C(n, k))
    A : array (..., n, k)

    Returns
    -------
    array (..., n, k)

    Notes
    -----
    Three times the flops of :func:`coordinates`. Finite for matrices of any rank.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan import plucker
    >>> plucker.coordinates_backward(np.array([1.0]), np.array([[1.0, 2.0], [3.0, 4.0]]))  # of the determinant
    array([[ 4., -3.],
           [-2.,  1.]])
    """
    A, dtype = matrices(A, "A")
    n, k = (int(x) for x in A.shape[-2:])
    if not 1 <= k <= n:
        raise ValueError(f"A must have from 1 to {n} columns of {n} entries, got shape {tuple(A.shape)}")
    grad = as_array(grad, "grad")
    _same_dtype(grad, "grad", dtype, "A")
    if tuple(grad.shape) != (*A.shape[:-2], _comb(n, k)):
        raise ValueError(f"grad must have shape {(*A.shape[:-2], _comb(n, k))}, got {tuple(grad.shape)}")
    dA = np.empty(tuple(A.shape), dtype)
    _finite(_core.plucker_coordinates_backward(detached(grad), detached(A), dA), "the gradient of A")
    return to_library(dA, library_of(A))


def _wedge_arguments(z: Array, w: Array, n: Any, grades: Any) -> tuple[Any, ...]:
    z, dtype = _vectors(z, "z")
    w, _ = _vectors(w, "w")
    _same_dtype(w, "w", dtype, "z")
    try:
        k, m = grades
    except (TypeError, ValueError):
        raise TypeError(f"grades must be a pair of integers, got {grades!r}") from None
    k, m = whole_number(k, "grades[0]", 0, _MOST), whole_number(m, "grades[1]", 0, _MOST)
    if n is None:
        if 1 not in (k, m):
            raise ValueError(f"n is needed for grades {(k, m)}: neither of them is a vector, whose length is n")
        n = int((z if k == 1 else w).shape[-1])
    n = whole_number(n, "n", 1, _MOST)
    for x, name, grade in ((z, "z", k), (w, "w", m)):
        count = _comb(n, grade, f"n={n}, grades={(k, m)}")
        if x.shape[-1] != count:
            raise ValueError(f"{name} must have C({n}, {grade}) = {count} entries, got shape {tuple(x.shape)}")
    try:
        batch = np.broadcast_shapes(tuple(z.shape[:-1]), tuple(w.shape[:-1]))
    except ValueError:
        raise ValueError(f"leading axes do not broadcast: {tuple(z.shape)} with {tuple(w.shape)}") from None
    return z, w, dtype, n, k, m, batch


def wedge(
    z: Array, w: Array, *, n: int | None = None, grades: tuple[int, int] = (1, 1), out: Array | None = None
) -> Array:
    """The exterior product ``z ∧ w`` of vectors, or of multivectors of one grade each.

    Parameters
    ----------
    z : array (..., C(n, grades[0]))
    w : array (..., C(n, grades[1]))
        Leading axes broadcast.
    n : int, optional
        Dimension of the space; the length of a vector where one of the two is one.
    grades : (int, int), default (1, 1)
        Two vectors; ``(2, 1)`` is a bivector and a vector. 0 is a scalar.
    out : array, optional
        Must share no memory with the arguments.

    Returns
    -------
    array (..., C(n, grades[0] + grades[1]))
        ``z_i w_j - z_j w_i`` for ``i < j`` in lexicographic order, the same for other grades. Empty where the grades
        add up to more than ``n``.

    Notes
    -----
    ``2 C(n, k + l) C(k + l, k)`` flops, in double.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan import plucker
    >>> e = np.eye(4)
    >>> plucker.wedge(e[0], e[2])  # pairs 01 02 03 12 13 23
    array([0., 1., 0., 0., 0., 0.])
    >>> plucker.wedge(plucker.wedge(e[0], e[2]), e[1], grades=(2, 1))  # 012 013 023 123
    array([-1.,  0.,  0.,  0.])
    """
    z, w, dtype, n, k, m, batch = _wedge_arguments(z, w, n, grades)
    library = library_of(z)
    result, fresh = output(out, (*batch, _comb(n, k + m)), dtype, library)
    _finite(_core.wedge(detached(z), detached(w), detached(result), n, k, m), "the wedge")
    return finish(result, fresh, library)


def wedge_backward(
    grad: Array, z: Array, w: Array, *, n: int | None = None, grades: tuple[int, int] = (1, 1)
) -> tuple[Array, Array]:
    """Gradients of ``sum(grad * wedge(z, w))`` with respect to ``z`` and ``w``; broadcast axes are summed.

    Parameters
    ----------
    grad : array (..., C(n, grades[0] + grades[1]))
    z, w, n, grades
        As for :func:`wedge`.

    Returns
    -------
    dz, dw : arrays, shaped as ``z`` and ``w``

    Raises
    ------
    ValueError
        Also where finite input has a gradient that the dtype cannot hold.

    Notes
    -----
    ``4 C(n, k + l) C(k + l, k)`` flops, in double.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan import plucker
    >>> dz, dw = plucker.wedge_backward(np.array([1.0]), np.array([1.0, 2.0]), np.array([3.0, 5.0]))
    >>> dz, dw
    (array([ 5., -3.]), array([-2.,  1.]))
    """
    z, w, dtype, n, k, m, batch = _wedge_arguments(z, w, n, grades)
    grad = as_array(grad, "grad")
    _same_dtype(grad, "grad", dtype, "z")
    if tuple(grad.shape) != (*batch, _comb(n, k + m)):
        raise ValueError(f"grad must have shape {(*batch, _comb(n, k + m))}, got {tuple(grad.shape)}")
    dz, dw = np.zeros((*batch, z.shape[-1]), dtype), np.zeros((*batch, w.shape[-1]), dtype)
    if k + m <= n:
        _finite(_core.wedge_backward(detached(grad), detached(z), detached(w), dz, dw, n, k, m), "a gradient")
    library = library_of(z)
    return to_library(summed_to(dz, tuple(z.shape), dtype), library), to_library(
        summed_to(dw, tuple(w.shape), dtype), library
    )


def relations(p: Array, n: int, k: int, *, out: Array | None = None) -> Array:
    """Residuals of the Plücker relations: all zero if and only if ``p`` is a wedge of ``k`` vectors.

    Parameters
    ----------
    p : array (..., C(n, k))
    n, k : int
    out : array, optional
        Must share no memory with the arguments.

    Returns
    -------
    array (..., C(n, k - 1), C(n, k + 1))
        Entry ``(I, J)``: ``Σ_t (-1)^t p(I, j_t) p(J without j_t)``, where ``p(I, j)`` is zero for ``j`` in ``I`` and
        has the sign of sorting ``j`` in.

    Notes
    -----
    ``2 (k + 1) C(n, k - 1) C(n, k + 1)`` flops. For ``k = 2`` an entry with ``i`` outside of ``J`` is the three-term
    relation ``p_ij p_kl - p_ik p_jl + p_il p_jk``, and the others vanish. Hodge and Pedoe, Methods of Algebraic
    Geometry I (1947), chapter VII, 6.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan import plucker
    >>> p = np.array([1.0, 0, 0, 0, 0, 1.0])  # e0 ∧ e1 + e2 ∧ e3 spans no plane
    >>> float(abs(plucker.relations(p, 4, 2)).max())
    1.0
    """
    n, k, length = _grades(n, k)
    p, dtype = _vectors(p, "p", length)
    library = library_of(p)
    shape = (*p.shape[:-1], _comb(n, k - 1), _comb(n, k + 1))
    result, fresh = output(out, shape, dtype, library)
    if math.prod(shape[-2:]) > 0:
        _finite(_core.plucker_relations(detached(p), detached(result), n, k), "a relation")
    return finish(result, fresh, library)


def relations_backward(grad: Array, p: Array, n: int, k: int) -> Array:
    """Gradient of ``sum(grad * relations(p, n, k))`` with respect to ``p``, for penalties.

    Parameters
    ----------
    grad : array (..., C(n, k - 1), C(n, k + 1))
    p : array (..., C(n, k))
    n, k : int

    Returns
    -------
    array (..., C(n, k))

    Raises
    ------
    ValueError
        Also where finite input has a gradient that the dtype cannot hold.

    Notes
    -----
    ``4 (k + 1) C(n, k - 1) C(n, k + 1)`` flops, in double.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan import plucker
    >>> p = np.array([1.0, 0, 0, 0, 0, 1.0])
    >>> R = plucker.relations(p, 4, 2)
    >>> plucker.relations_backward(R, p, 4, 2)  # of ||R||² / 2
    array([4., 0., 0., 0., 0., 4.])
    """
    n, k, length = _grades(n, k)
    p, dtype = _vectors(p, "p", length)
    grad = as_array(grad, "grad")
    _same_dtype(grad, "grad", dtype, "p")
    shape = (*p.shape[:-1], _comb(n, k - 1), _comb(n, k + 1))
    if tuple(grad.shape) != shape:
        raise ValueError(f"grad must have shape {shape}, got {tuple(grad.shape)}")
    dp = np.zeros(tuple(p.shape), dtype)
    if math.prod(shape[-2:]) > 0:
        _finite(_core.plucker_relations_backward(detached(grad), detached(p), dp, n, k), "the gradient of p")
    return to_library(dp, library_of(p))


def basis(p: Array, n: int, k: int, *, check: bool = True, out: Array | None = None) -> Array:
    """The orthonormal basis whose coordinates are ``p / ‖p‖``.

    Parameters
    ----------
    p : array (..., C(n, k))
        Coordinates of a subspace, not zero.
    n, k : int
    check : bool, default True
        Make sure that ``p`` is a wedge of ``k`` vectors, to ``√eps ‖p‖``. Without it the basis of a ``p`` that is none
        agrees with it in the chart around its largest entry only.
    out : array (..., n, k), optional
        Must share no memory with ``p``.

    Returns
    -------
    array (..., n, k)
        ``coordinates(basis(p)) = p / ‖p‖``, the orientation included.

    Raises
    ------
    ValueError
        Where ``p`` is zero, not finite, or no wedge.

    Notes
    -----
    The rows of the largest ``|p_I|`` become the identity; all other entries are then quotients of coordinates, at most
    1, and two sweeps of Gram-Schmidt make the columns orthonormal. ``C(n, k) + 4 n k²`` flops in double.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan import plucker
    >>> p = plucker.coordinates(np.array([[1.0, 2.0], [0.0, 1.0], [0.0, 1.0]]))
    >>> U = plucker.basis(p, 3, 2)
    >>> bool(np.allclose(plucker.coordinates(U) * np.linalg.norm(p), p))
    True
    """
    n, k, length = _grades(n, k)
    p, dtype = _vectors(p, "p", length)
    library = library_of(p)
    plain = detached(p)
    result, fresh = output(out, (*p.shape[:-1], n, k), dtype, library)
    _named(_core.plucker_basis(plain, detached(result), n, k), tuple(p.shape[:-1]))
    if check:
        values = numpy(plain).astype(np.float64)
        unit = np.empty(tuple(p.shape), np.float64)
        _core.plucker_coordinates(numpy(result).astype(np.float64), unit)
        size = np.abs(values).max(-1, keepdims=True)
        values /= size
        along = (values * unit).sum(-1, keepdims=True)
        rest = np.linalg.norm(values - along * unit, axis=-1) / np.linalg.norm(values, axis=-1)
        tolerance = math.sqrt(float(np.finfo(dtype).eps))
        if rest.size and rest.max() > tolerance:
            where = np.unravel_index(int(rest.argmax()), rest.shape)
            raise ValueError(
                f"p{_index(where)} is no wedge of {k} vectors: {rest.max():.1e} of it lies off the nearest one found, "
                f"more than {tolerance:.1e}; look at relations(p, n, k), or pass check=False"
            )
    return finish(result, fresh, library)


def _index(where: Any) -> str:
    return f"[{', '.join(str(int(i)) for i in where)}]" if len(where) else ""


def _named(item: int, batch: tuple[int, ...]) -> None:
    if item >= 0:
        where = _index(np.unravel_index(item, batch)) if batch else ""
        raise ValueError(f"p{where} is zero or holds NaN or infinity, and spans nothing")


def basis_backward(grad: Array, p: Array, n: int, k: int) -> Array:
    """Gradient with respect to ``p`` of a function of the subspace that :func:`basis` returns a basis of.

    A basis is free to rotate within its span. This takes the part of ``grad`` that is orthogonal to the span, which is
    all of it for functions that do not depend on the choice; the result is orthogonal to ``p``.

    Parameters
    ----------
    grad : array (..., n, k)
        Euclidean gradient with respect to the basis.
    p : array (..., C(n, k))
        A wedge of ``k`` vectors, which is not checked.
    n, k : int

    Returns
    -------
    array (..., C(n, k))

    Raises
    ------
    ValueError
        Where ``p`` is zero or not finite, or the gradient, of the order of ``grad / ‖p‖``, overflows.

    Notes
    -----
    The derivative of the coordinates at the basis, in the direction of that part, over ``‖p‖``: ``6 Σ_q q C(n, q)``
    flops in double.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan import plucker
    >>> p = np.array([2.0, 0.0, 0.0])  # the plane of e0 and e1 in R³
    >>> plucker.basis_backward(np.array([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]]), p, 3, 2)
    array([ 0. ,  0. , -0.5])
    """
    n, k, length = _grades(n, k)
    p, dtype = _vectors(p, "p", length)
    grad = as_array(grad, "grad")
    _same_dtype(grad, "grad", dtype, "p")
    if tuple(grad.shape) != (*p.shape[:-1], n, k):
        raise ValueError(f"grad must have shape {(*p.shape[:-1], n, k)}, got {tuple(grad.shape)}")
    dp = np.empty(tuple(p.shape), dtype)
    item = _core.plucker_basis_backward(detached(grad), detached(p), dp, n, k)
    _finite(item != -2, "the gradient of p")
    _named(item, tuple(p.shape[:-1]))
    return to_library(dp, library_of(p))


def complement_signs(n: int, k: int) -> np.ndarray[Any, Any]:
    """The sign of the permutation ``(I, complement of I)`` for every ``I``: ``e_I ∧ e_{I^c} = sign e_{0...n-1}``.

    Parameters
    ----------
    n, k : int

    Returns
    -------
    numpy.ndarray (C(n, k),) of float64, ones and minus ones

    Examples
    --------
    >>> from subspan import plucker
    >>> plucker.complement_signs(4, 2)
    array([ 1., -1.,  1.,  1., -1.,  1.])
    """
    n, k, length = _grades(n, k, 0)
    out = np.empty(length, np.float64)
    _core.complement_signs(n, k, out)
    return out


def hodge(p: Array, n: int, k: int) -> Array:
    """The Hodge dual ``⋆p``: ``p ∧ ⋆p = ‖p‖² e_{0...n-1}``, coordinates of the orthogonal complement.

    A copy and ``C(n, k)`` sign changes.

    Parameters
    ----------
    p : array (..., C(n, k))
    n, k : int

    Returns
    -------
    array (..., C(n, n - k))
        ``complement_signs(n, k) * p`` in reverse: complements run backwards through the lexicographic order.

    Notes
    -----
    An isometry, so its gradient is its inverse: ``(-1)^{k (n - k)} hodge(grad, n, n - k)``.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan import plucker
    >>> plucker.hodge(plucker.wedge(np.array([1.0, 0, 0]), np.array([0, 1.0, 0])), 3, 2)  # the cross product
    array([0., 0., 1.])
    """
    n, k, length = _grades(n, k, 0)
    p, dtype = _vectors(p, "p", length)
    dual = complement_signs(n, k).astype(dtype) * numpy(detached(p)) + dtype.type(0)  # no negative zeros
    return to_library(np.ascontiguousarray(dual[..., ::-1]), library_of(p))
