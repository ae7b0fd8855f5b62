"""The product under all projections, and the projections."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from subspan import _core
from subspan._lib.arguments import (
    broadcast,
    check_basis,
    column,
    convolution_hint,
    detached,
    finish,
    is_left,
    is_vector,
    matrices,
    numpy,
    of_vector,
    on_the_cpu,
    same_dtype,
)
from subspan._lib.arrays import Array, as_array, check_float, check_output, library_of, output, real_number, truth
from subspan._lib.device import Place, device_of, on_device
from subspan.orth import device
from subspan.orth.int4 import Int4Basis
from subspan.orth.spaces import padded_span

if TYPE_CHECKING:
    from collections.abc import Callable


def apply_core(
    C: Array,
    V: Array,
    M: Array,
    *,
    alpha: float = 1.0,
    side: str = "left",
    out: Array | None = None,
    check: bool = True,
) -> Array:
    """``alpha C + V M (VᵀC)`` (``side="left"``) or ``alpha C + (C V) M Vᵀ`` (``"right"``), fused.

    Parameters
    ----------
    C : array (..., m, n)
        Any strides. Rows or columns that are contiguous are read in place; where neither are, a strip at a time is
        copied.
    V : array (..., m, k) or (..., n, k), or Int4Basis
        Leading axes broadcast against those of ``C``.
    M : float, array (k,) or array (..., k, k)
        A multiple of the identity, a diagonal, or any core. Not necessarily symmetric.
    alpha : float, default 1.0
        With 0, ``C`` is not read again when the result is written.
    out : array, optional
        Exact shape and dtype; may be ``C`` itself, and must not overlap anything else.
    check : bool, default True
        Look for NaN and infinity before ``C`` is written. In place that costs a second read of ``C``.

    Returns
    -------
    array of the shape of ``C``; ``out`` where it was given.

    Raises
    ------
    ValueError
        Shapes that do not fit, an ``out`` that overlaps, NaN or infinity (``C`` is untouched then).
    TypeError
        Dtypes other than float32 and float64, or that differ.

    Notes
    -----
    ``4 m n k`` flops; two reads and one write of ``C``. Work memory is one panel, ``k n`` (left) or ``k m`` (right)
    items. Results are bit-identical for any number of threads.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.orth import apply_core
    >>> rng = np.random.default_rng(0)
    >>> C, V, M = rng.standard_normal((6, 5)), rng.standard_normal((6, 2)), rng.standard_normal((2, 2))
    >>> np.allclose(apply_core(C, V, M, alpha=0.5), 0.5 * C + V @ M @ (V.T @ C))
    True
    """
    V = V if isinstance(V, Int4Basis) else column(V)
    if is_vector(C):
        return of_vector(lambda c, to: apply_core(c, V, M, alpha=alpha, side=side, out=to, check=check), C, side, out)
    return _apply_core(C, V, M, alpha, side, out, check)


def _apply_core(
    C: Array,
    V: Array,
    M: Array,
    alpha: float,
    side: str,
    out: Array | None,
    check: bool,
    source: Array | None = None,
    name: str = "V",
) -> Array:
    if on_device(C, V, M, out):
        return device.apply_core(C, V, M, alpha, side, out, source, name)
    C, dtype = matrices(C, "C")
    left = is_left(side)
    library = library_of(C)
    check = truth(check, "check")
    alpha = real_number(alpha, "alpha")
    core, scalar = None, 1.0
    if isinstance(M, (int, float, np.integer, np.floating)):
        scalar = real_number(M, "M")
    else:
        core = as_array(M, "M")
        if len(core.shape) == 0:
            scalar, core = real_number(core, "M"), None
        else:
            check_float(core, "M")
    others: list[tuple[Array, int]] = []
    basis: Any
    if isinstance(V, Int4Basis):
        basis = V._parts()
    else:
        basis, other = matrices(V, name)
        same_dtype(dtype, other, name, "C")
        want = C.shape[-2] if left else C.shape[-1]
        if basis.shape[-2] != want:
            hint = convolution_hint(tuple(C.shape), "C")
            raise ValueError(
                f"{name} must have {want} rows to act on C {tuple(C.shape)} from the {side}, "
                f"got {basis.shape[-2]}{hint}"
            )
        others.append((basis, 2))
        basis = detached(basis)
    if core is not None and len(core.shape) > 2:
        others.append((core, 2))
    c, shape = broadcast(detached(C), *others)
    result, fresh = output(out, shape, dtype, library)
    _core.apply_core(
        c,
        basis,
        None if core is None else detached(core),
        scalar,
        alpha,
        left,
        detached(result),
        check,
        None if source is None else detached(source),
    )
    return finish(result, fresh, library, C)


def _projector(U: Array, orthonormal: bool | None, check: bool, name: str) -> tuple[Array, Array]:
    """A basis and the core that make the projector onto its span."""
    if orthonormal not in (None, True, False):
        raise TypeError(f"orthonormal must be True, False or None, got {orthonormal!r}")
    if orthonormal is None:
        orthonormal = not isinstance(U, Int4Basis)
    if orthonormal and isinstance(U, Int4Basis):
        raise ValueError(f"{name} is an Int4Basis, and rounding to 4 bits leaves no basis orthonormal")
    if on_device(U):  # values are not looked at: that would make the host wait
        return (U, 1.0) if orthonormal else device.projector(U, name)
    if orthonormal:
        if check:
            check_basis(U, name, advice="pass orthonormal=False for any basis, ")
        return U, 1.0
    if isinstance(U, Int4Basis):
        core, condition = U._gram_core()
        if condition > 100.0:  # rounding of V M (VᵀC) grows with it; this one is unpacked
            return padded_span(U.to_array())[0], 1.0
        return U, core
    U, dtype = matrices(U, name)
    k = U.shape[-1]
    core = np.empty((*U.shape[:-2], k, k), dtype)
    condition = _core.gram_core(detached(U), core)
    if condition > 100.0:  # rounding of V M (VᵀC) grows with it
        return padded_span(U)[0], 1.0
    return U, core


def project(
    C: Array,
    U: Array,
    *,
    side: str = "left",
    out: Array | None = None,
    orthonormal: bool | None = None,
    check: bool = True,
) -> Array:
    """The part of ``C`` inside the span of ``U``: ``U UᵀC``, or ``C U Uᵀ`` with ``side="right"``.

    Parameters are those of :func:`project_out`.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.orth import project, random_orthogonal
    >>> U = random_orthogonal(8, 3, rng=0)
    >>> C = np.ones((8, 2))
    >>> np.allclose(project(C, U), U @ (U.T @ C))
    True
    """
    U = column(U)
    if is_vector(C):
        return of_vector(
            lambda c, to: project(c, U, side=side, out=to, orthonormal=orthonormal, check=check), C, side, out
        )
    if side == "both":
        return _both(C, U, lambda core: core, 0.0, out, orthonormal, check)
    _check_fit(C, U, side)
    basis, core = _projector(U, orthonormal, check, "U")
    return _apply_core(C, basis, core, 0.0, side, out, check, name="U")


def project_out(
    C: Array,
    U: Array,
    *,
    side: str = "left",
    strength: float = 1.0,
    out: Array | None = None,
    orthonormal: bool | None = None,
    check: bool = True,
) -> Array:
    """Remove the span of ``U``: ``C - strength · U UᵀC``, or ``C - strength · C U Uᵀ`` with ``side="right"``.

    Parameters
    ----------
    C : array (..., m, n), a vector, or a list of matrices of any shapes
        ``out=C`` works in place. A list takes a list of as many ``U`` (and ``out``) and gives a list; on a CUDA device
        it is a launch for each 160 of them.
    U : array (..., m, k) or (..., n, k), Int4Basis, or a pair of them with ``side="both"``
        Leading axes broadcast against those of ``C``. With ``"both"``, ``(left, right)``: both are projected out.
    side : {"left", "right", "both"}
        Which space ``U`` lives in: that of the columns of ``C`` (left), or of its rows.
    strength : float, default 1.0
        1 removes, a part of it ablates partially, 2 reflects.
    orthonormal : bool, optional
        True promises orthonormal columns (the default for arrays), which is checked at the cost of two products with
        vectors. False takes any basis, full rank or not, through its Gram core ``(UᵀU)⁺``; always so for Int4Basis.
    check : bool, default True
        See :mod:`subspan.orth`; False also trusts ``U``.

    Returns
    -------
    array of the shape of ``C``; ``out`` where it was given. For strength 1, ``‖UᵀC'‖ <= 10 eps ‖UᵀC‖`` as long as ``C``
    is not nearly orthogonal to ``U`` already: rounding of the result itself is of the order of ``eps ‖C'‖``.

    Raises
    ------
    ValueError
        As :func:`apply_core`, and for a ``U`` whose columns are not orthonormal though promised.

    Notes
    -----
    ``4 m n k`` flops; two reads and one write of ``C``. Used by OSF, GPM, FOT and CoSO for gradients and by
    abliteration for weights; see docs/orth.md for the table.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.orth import project_out, random_orthogonal
    >>> G, U = np.random.default_rng(0).standard_normal((64, 32)), random_orthogonal(64, 4, rng=0)
    >>> project_out(G, U, out=G) is G
    True
    >>> bool(np.abs(U.T @ G).max() < 1e-14)
    True
    """
    if orthonormal is None and type(strength) is float and math.isfinite(strength) and device_of(C) is not None:
        result = device.quick(C, U, -strength, 1.0, side, out)
        if result is not None:
            return result
    U = column(U)
    strength = real_number(strength, "strength")
    if is_vector(C):
        return of_vector(
            lambda c, to: project_out(c, U, side=side, strength=strength, out=to, orthonormal=orthonormal, check=check),
            C,
            side,
            out,
        )
    if isinstance(C, (list, tuple)) and any(hasattr(c, "shape") for c in C):
        return _project_out_list(C, U, side, float(strength), out, orthonormal, check)
    if side == "both":
        return _both(C, U, lambda core: _scaled(core, -strength), 1.0, out, orthonormal, check)
    _check_fit(C, U, side)
    basis, core = _projector(U, orthonormal, check, "U")
    return _apply_core(C, basis, _scaled(core, -strength), 1.0, side, out, check, name="U")


def _scaled(core: Any, factor: float) -> Any:
    """A core times a number, on its own device."""
    if not on_device(core):
        return factor * core
    with Place(core=core).inside():
        return factor * core


def _project_out_list(
    C: Any, U: Any, side: str, strength: float, out: Any, orthonormal: bool | None, check: bool
) -> list[Array]:
    """Matrices of any shapes, each with its basis: one launch on a device."""
    for x, name in ((U, "U"), (out, "out")):
        if x is None and name == "out":
            continue
        if not isinstance(x, (list, tuple)) or len(x) != len(C):
            raise ValueError(f"C is a list of {len(C)} matrices, so {name} must be one too: lists of one length")
    if not on_device(*C, *U):
        return _project_out_each(list(C), list(U), side, strength, out, orthonormal, check)
    if on_device(*C, *U) and orthonormal is not False and not any(isinstance(u, Int4Basis) for u in U):
        return device.project_out_list(list(C), list(U), strength, side, None if out is None else list(out))
    return [
        project_out(
            c,
            u,
            side=side,
            strength=strength,
            out=None if out is None else out[i],
            orthonormal=orthonormal,
            check=check,
        )
        for i, (c, u) in enumerate(zip(C, U, strict=True))
    ]


def _project_out_each(
    C: list[Any], U: list[Any], side: str, strength: float, out: Any, orthonormal: bool | None, check: bool
) -> list[Array]:
    """One by one, once all of them have been looked at: an entry that is refused leaves the others as they were."""
    if side == "both":
        raise ValueError("a list of matrices takes side='left' or 'right'")
    bases = []
    for i, (c, u) in enumerate(zip(C, U, strict=True)):
        _check_fit(c, u, side)
        bases.append(_projector(u, orthonormal, check, f"U[{i}]"))
        if check and not _core.all_finite(detached(as_array(c, f"C[{i}]"))):
            raise ValueError(f"C[{i}] holds NaN or infinity")
    if out is not None:
        inputs = []
        for i, (c, u) in enumerate(zip(C, U, strict=True)):
            check_output(out[i], matrices(c, f"C[{i}]")[1])
            u_arrays = (u.scale, u.zero) if isinstance(u, Int4Basis) else (u,)
            inputs.append(tuple(detached(as_array(x, "C")) for x in (c, *u_arrays)))
        _core.require_entries_apart([detached(x) for x in out], inputs)
    return [
        _apply_core(
            c, basis, _scaled(core, -strength), 1.0, side, None if out is None else out[i], check, name=f"U[{i}]"
        )
        for i, (c, (basis, core)) in enumerate(zip(C, bases, strict=True))
    ]


def _check_fit(C: Array, U: Array, side: str) -> None:
    """Shapes before anything that looks at values."""
    if isinstance(U, tuple):
        raise ValueError("U is a tuple; a pair of bases goes with side='both'")
    get = device.matrices if on_device(C, U) else matrices
    C, dtype = get(C, "C")
    want = C.shape[-2] if is_left(side) else C.shape[-1]
    basis, other = (U, U.dtype) if isinstance(U, Int4Basis) else get(U, "U")
    if not (isinstance(U, Int4Basis) and on_device(C)):  # 16 bits go with scales of float32 there
        same_dtype(dtype, other, "U", "C")
    rows = basis.shape[0] if isinstance(U, Int4Basis) else basis.shape[-2]
    if rows != want:
        hint = convolution_hint(tuple(C.shape), "C")
        raise ValueError(f"U must have {want} rows to act on C {tuple(C.shape)} from the {side}, got {rows}{hint}")


def _both(
    C: Array,
    U: Array,
    core: Callable[[Any], Any],
    alpha: float,
    out: Array | None,
    orthonormal: bool | None,
    check: bool,
) -> Array:
    """The left and then the right form. Whatever can be wrong with the right basis is found before C is written."""
    if not isinstance(U, (tuple, list)) or len(U) != 2:
        raise ValueError("side='both' takes U as a pair, (left basis, right basis)")
    if on_device(C, *U):
        if out is not None:
            device.require_apart(out, U)
        bases = [_projector(u, orthonormal, check, f"U[{i}]") for i, u in enumerate(U)]
        # Aside, and then into out: whatever the second basis is refused for, C and out are as they were.
        (left, lm), (right, rm) = bases
        aside = _apply_core(C, left, core(lm), alpha, "left", None, check, name="U[0]")
        return _apply_core(aside, right, core(rm), alpha, "right", aside if out is None else out, check, name="U[1]")
    C, dtype = matrices(C, "C")
    for i, u in enumerate(U):
        if not isinstance(u, Int4Basis):
            same_dtype(dtype, matrices(u, f"U[{i}]")[1], f"U[{i}]", "C")
            if u.shape[-2] != C.shape[i - 2]:
                hint = convolution_hint(tuple(C.shape), "C")
                raise ValueError(
                    f"U[{i}] must have {C.shape[i - 2]} rows to act on C {tuple(C.shape)}, got {u.shape[-2]}{hint}"
                )
    bases = [_projector(u, orthonormal, check, f"U[{i}]") for i, u in enumerate(U)]
    others: list[tuple[Array, int]] = []
    for i, (basis, _) in enumerate(bases):
        rows = basis.shape[0] if isinstance(basis, Int4Basis) else basis.shape[-2]
        if rows != C.shape[i - 2]:
            hint = convolution_hint(tuple(C.shape), "C")
            raise ValueError(f"U[{i}] must have {C.shape[i - 2]} rows to act on C {tuple(C.shape)}, got {rows}{hint}")
        if basis.dtype != C.dtype and check_float(basis, f"U[{i}]") != dtype:
            raise TypeError(f"U[{i}] must be {dtype} as C is, got {basis.dtype}")
        if isinstance(basis, Int4Basis):
            continue
        others.append((basis, 2))
        if check and not _core.all_finite(detached(basis)):
            raise ValueError(f"U[{i}] holds NaN or infinity")
        if out is not None:
            check_output(out, dtype)
            _core.require_apart(detached(out), detached(basis), "out", f"U[{i}]", False)
    library = library_of(C)
    c, shape = broadcast(detached(C), *others)
    result, fresh = output(out, shape, dtype, library)
    if not fresh:
        _core.require_apart(detached(result), c, "out", "C", True)
    (lu, lc), (ru, rc) = bases
    # Aside, and then into out: an interrupt between the two leaves C as it was.
    aside = _apply_core(numpy(c), lu, core(lc), alpha, "left", None, check, name="U[0]")
    _apply_core(aside, ru, core(rc), alpha, "right", result, check, name="U[1]")
    return finish(result, fresh, library, C)


def swap(base: Array, source: Array, R: Array, out: Array | None = None, *, check: bool = True) -> Array:
    """``base + ((source - base) R) Rᵀ``: coordinates in the span of ``R`` from ``source``, all else from ``base``.

    Subspace patching (distributed alignment search, LoReFT's intervention, activation patching).

    Parameters
    ----------
    base, source : array (..., m, n)
        Samples are rows. ``out`` may be ``base``.
    R : array (..., n, k)
        Orthonormal columns.

    Notes
    -----
    ``4 m n k`` flops; ``base`` and ``source`` are each read once where a block of rows stays in the cache.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.orth import random_orthogonal, swap
    >>> a, b = np.random.default_rng(0).standard_normal((2, 5, 8))
    >>> R = random_orthogonal(8, 3, rng=0)
    >>> np.allclose(swap(a, b, R) @ R, b @ R)
    True
    """
    R = column(R)
    if is_vector(base) and is_vector(source):
        of_row = lambda c, to: swap(c, as_array(source, "source")[None], R, out=to, check=check)  # noqa: E731
        return of_vector(of_row, base, "right", out)
    there = on_device(base, source, R)
    get = device.matrices if there else matrices
    base, dtype = get(base, "base")
    source, other = get(source, "source")
    same_dtype(dtype, other, "source", "base")
    if isinstance(R, Int4Basis):
        raise TypeError("R is an Int4Basis, which is not orthonormal; pass orthonormalize(R.to_array())")
    if tuple(source.shape) != tuple(base.shape):
        raise ValueError(f"source must have the shape of base, {tuple(base.shape)}, got {tuple(source.shape)}")
    R, other = get(R, "R")
    same_dtype(dtype, other, "R", "base")
    if R.shape[-2] != base.shape[-1]:
        hint = convolution_hint(tuple(base.shape), "base")
        raise ValueError(
            f"R must have {base.shape[-1]} rows, one for each column of base, got shape {tuple(R.shape)}{hint}"
        )
    if truth(check, "check") and not there:
        check_basis(R, "R")
    return _apply_core(base, R, 1.0, 1.0, "right", out, check, source=source, name="R")


def rotate(
    C: Array, source: Array, target: Array, *, side: str = "left", out: Array | None = None, check: bool = True
) -> Array:
    """Rotate the plane of two directions so that ``source`` comes to lie on ``target``; the rest stays as it is.

    The rotation of smallest angle: with ``V = [s, e]``, ``e`` the part of the target outside of ``s``, and the
    angle's cosine ``c`` and sine ``z``, it is ``I + V [[c - 1, -z], [z, c - 1]] Vᵀ``. ``side="right"`` rotates rows:
    ``C ↦ C Rᵀ``.

    Parameters
    ----------
    C : array (..., m, n)
    source, target : array (m,) or (n,) with ``side="right"``
        Not zero; lengths do not matter. Opposite directions have no such plane and raise ValueError.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.orth import rotate
    >>> np.allclose(rotate(np.eye(3), [1.0, 0, 0], [0, 2.0, 0]) @ [1, 0, 0], [0, 1, 0])
    True
    """
    for x, name in ((C, "C"), (source, "source"), (target, "target"), (out, "out")):
        on_the_cpu(x, name)
    if is_vector(C):
        turned = lambda c, to: rotate(c, source, target, side=side, out=to, check=check)  # noqa: E731
        return of_vector(turned, C, side, out)
    C, dtype = matrices(C, "C")
    is_left(side)
    directions = []
    for x, name in ((source, "source"), (target, "target")):
        v = numpy(as_array(x, name))
        if v.dtype.kind not in "fiu":
            raise TypeError(f"{name} must be real numbers, got {v.dtype}")
        v = np.asarray(v, np.float64)
        if v.ndim != 1:
            raise ValueError(f"{name} must have 1 dimension, got shape {v.shape}")
        length = C.shape[-2] if side == "left" else C.shape[-1]
        if v.size != length:
            raise ValueError(
                f"{name} must have {length} entries to act on C {tuple(C.shape)} from the {side}, got {v.size}"
                + convolution_hint(tuple(C.shape), "C")
            )
        top = np.abs(v).max(initial=0.0)
        if not math.isfinite(top):
            raise ValueError(f"{name} holds NaN or infinity")
        if top == 0:
            raise ValueError(f"{name} is zero and gives no direction")
        v = v / top
        directions.append(v / np.linalg.norm(v))
    s, t = directions
    if s.shape != t.shape:
        raise ValueError(f"source and target must have one length, got {s.size} and {t.size}")
    # Of half sums and differences, which lose no digits where the two directions are close.
    plus, minus = np.linalg.norm(s + t), np.linalg.norm(s - t)
    sine, cosine = plus * minus / 2, (plus - minus) * (plus + minus) / 4
    if plus < 1e-12:
        raise ValueError("source and target are opposite: no plane is preferred to rotate in")
    e = t - s - s * (s @ (t - s))
    e -= s * (s @ e)
    length = np.linalg.norm(e)
    e = e / length if length > 0 else e
    less = -(minus**2) / 2  # cosine - 1
    del cosine
    core = np.array([[less, -sine], [sine, less]])
    if side == "right":
        core = core.T
    V = np.stack([s, e], axis=1).astype(dtype)
    return _apply_core(C, V, np.ascontiguousarray(core.astype(dtype)), 1.0, side, out, check)
