"""Exterior algebra: coordinates, wedges, relations, bases, complements."""

from __future__ import annotations

from typing import Any

import numpy as np

from subspan import _core
from subspan._lib.arrays import Array
from subspan._lib.call import call_of

__all__ = [
    "basis",
    "basis_backward",
    "complement_signs",
    "coordinates",
    "coordinates_backward",
    "hodge",
    "relations",
    "relations_backward",
    "wedge",
    "wedge_backward",
]


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
    Column by column, ``p_q = p_{q-1} ∧ a_q``: ``2 Σ_q q C(n, q)`` flops in double, 16 matrices at a time. Where
    ``k > n/2`` and the ``p_q`` hold more than 4096 numbers in all, by QR and the minors of the orthogonal complement
    instead. The error of a minor is at most ``4 k eps`` times the product of the norms of the columns.
    ``p(A M) = det(M) p(A)``. Harris, Algebraic Geometry: A First Course (1992), lecture 6.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan import plucker
    >>> plucker.coordinates(np.array([[1.0, 0.0], [2.0, 1.0], [0.0, 3.0]]))
    array([1., 3., 6.])
    """
    call = call_of(A=A, out=out)
    return call.give(call.kernels.coordinates(call.context, A, out), out)


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
    call = call_of(A=A, grad=grad)
    return call.give(call.kernels.coordinates_backward(call.context, grad, A))


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
    call = call_of(z=z, w=w, out=out)
    return call.give(call.kernels.wedge(call.context, z, w, n, grades, out), out)


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
    call = call_of(z=z, w=w, grad=grad)
    dz, dw = call.give(call.kernels.wedge_backward(call.context, grad, z, w, n, grades))
    return dz, dw


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
    call = call_of(p=p, out=out)
    return call.give(call.kernels.relations(call.context, p, n, k, out), out)


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
    call = call_of(p=p, grad=grad)
    return call.give(call.kernels.relations_backward(call.context, grad, p, n, k))


def basis(p: Array, n: int, k: int, *, check: bool = True, out: Array | None = None) -> Array:
    """The orthonormal basis whose coordinates are ``p / ‖p‖``.

    Parameters
    ----------
    p : array (..., C(n, k))
        Coordinates of a subspace, not zero.
    n, k : int
    check : bool, default True
        Verify that ``p`` is a wedge of ``k`` vectors, to ``√eps ‖p‖``. Without the check, the basis for any other ``p``
        agrees with it only in the chart around the largest entry of ``p``.
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
    call = call_of(p=p, out=out)
    return call.give(call.kernels.basis(call.context, p, n, k, check, out), out)


def basis_backward(grad: Array, p: Array, n: int, k: int) -> Array:
    """Gradient with respect to ``p`` of a function of the subspace, given its gradient with respect to :func:`basis`.

    A basis may be rotated within its span, so only the part of ``grad`` orthogonal to the span is used: all of it, for
    functions that do not depend on the choice of basis. The result is orthogonal to ``p``.

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
    call = call_of(p=p, grad=grad)
    return call.give(call.kernels.basis_backward(call.context, grad, p, n, k))


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
    signs: np.ndarray[Any, Any] = _core.complement_signs(n, k)
    return signs


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
    call = call_of(p=p)
    return call.give(call.kernels.hodge(call.context, p, n, k))
