"""Mixing over offsets, with its projection and its gradients."""

from __future__ import annotations

from typing import Any

from subspan._lib.arrays import Array
from subspan._lib.call import call_of

__all__ = ["mix", "mix_backward", "mix_project", "mix_project_backward"]


def mix(
    z: Array,
    offsets: Any,
    *,
    weights: Array | None = None,
    weighting: str | None = None,
    mask: Array | None = None,
    norm: str | None = "clamp",
    eps: float = 1e-8,
    order: str = "current-first",
    causal: bool = True,
    rope: str | None = None,
    rope_base: float = 10000.0,
    rope_start: Any = 0,
    out: Array | None = None,
) -> Array:
    """Plücker coordinates of each token with its past, summed over offsets.

    ``Σ_δ α_δ(t) (z_t ∧ z_{t-δ}) / f(‖z_t ∧ z_{t-δ}‖)``, as one wedge: it is ``z_t ∧ u_t`` with
    ``u_t = Σ_δ α_δ w_δ / f(|z_t||w_δ|)`` and ``w_δ`` the part of ``z_{t-δ}`` orthogonal to ``z_t``.

    Parameters
    ----------
    z : array (..., T, r)
        Sequences of ``T`` tokens of ``r >= 2`` dimensions. Any strides.
    offsets : int or sequence of int
        How many tokens to look back, each at least 1. One that is longer than the sequence never applies; one that is
        repeated counts twice.
    weights : array, broadcast to (..., T, m), optional
        One for each of the ``m`` offsets; see ``weighting``.
    weighting : {"mean", "given", "softmax"}, optional
        ``"mean"`` (default without weights): the mean over the offsets that apply at a token, those that stay inside of
        the sequence and whose two tokens are not masked. ``"given"`` (default with weights): the weights as they are,
        zero where an offset does not apply. ``"softmax"``: ``weights`` are logits, and the softmax runs over the
        offsets that apply; a logit of minus infinity leaves one out.
    mask : boolean or integer array, broadcast to (..., T), optional
        False: the token takes no part, neither as ``t`` nor as ``t - δ``, whatever it and its gradient hold. Its mixed
        coordinates are zero. It keeps its place: offsets and rotary positions count it (see ``rope_start``).
    norm : {"clamp", "soft", None}, default "clamp"
        Each wedge is divided by ``max(n, eps)``, ``sqrt(n² + eps)`` or 1, ``n`` its length. ``"clamp"`` with
        ``eps=1e-8`` is the published norm. To train, take ``norm="soft", eps=1e-4``: gradients are of the order of
        ``1/n`` (at most ``1/eps`` with ``"clamp"``, ``1/√eps`` with ``"soft"``), and ``n`` vanishes to rounding where
        neighbouring tokens are equal, as in the first layer of every character model: gradients of 1e11 with the
        published norm, of 1e2 with this one.
    eps : float, default 1e-8
        With ``eps=0`` the normalised wedge of parallel tokens is defined to be zero.
    order : {"current-first", "past-first"}
        ``z_t ∧ z_{t-δ}``, or ``z_{t-δ} ∧ z_t``, which is minus it.
    causal : bool, default True
        A negative offset, which looks ahead, is an error unless this is False.
    rope : {None, "interleaved", "half"}
        Rotate ``z`` by its position first, in the pairs ``(2i, 2i + 1)`` or ``(i, i + r/2)``.
    rope_base : float, default 10000
        Pair ``i`` turns by ``position · base^(-2i/r)``.
    rope_start : int or integer array, broadcast to (...), default 0
        Position of the first token: one for all sequences, or one for each. Positions count along ``T``, masked tokens
        included: a batch that is padded on the left by ``pad`` tokens takes ``rope_start=-pad``.
    out : array (..., T, C(r, 2)), optional
        Must share no memory with the arguments.

    Returns
    -------
    array (..., T, C(r, 2))
        Pairs ``i < j`` in lexicographic order, as ``numpy.triu_indices(r, 1)``. Zero where no offset applies.

    Raises
    ------
    ValueError
        Also where finite input gives what the dtype cannot hold (``norm=None``). NaN and infinity in the input go
        through to the tokens that they reach.

    Notes
    -----
    ``10 m r + 2 r²`` flops a token (``14 m r`` where tokens are nearly parallel), and one write of the result. Lengths
    and rejections are computed in double. The mixing layer: Attention Is Not What You Need, arXiv:2512.19428 (2025),
    section 3; what looks ahead there looks back here, as in the implementations that train.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan import plucker
    >>> z = np.random.default_rng(0).standard_normal((2, 10, 4))  # two sequences of ten tokens
    >>> p = plucker.mix(z, [1, 2, 4])
    >>> p.shape
    (2, 10, 6)
    >>> bool(np.allclose(p[0, 1], plucker.wedge(z[0, 1], z[0, 0]) / np.linalg.norm(plucker.wedge(z[0, 1], z[0, 0]))))
    True
    """
    call = call_of(z=z, weights=weights, mask=mask, out=out)
    choices = (z, offsets, weights, weighting, mask, norm, eps, order, causal, "weighted", rope, rope_base, rope_start)
    return call.give(call.kernels.mix(call.context, *choices, out), out)


def mix_backward(
    grad: Array,
    z: Array,
    offsets: Any,
    *,
    weights: Array | None = None,
    weighting: str | None = None,
    mask: Array | None = None,
    norm: str | None = "clamp",
    eps: float = 1e-8,
    order: str = "current-first",
    causal: bool = True,
    rope: str | None = None,
    rope_base: float = 10000.0,
    rope_start: Any = 0,
) -> Array | tuple[Array, Array]:
    """Gradients of ``sum(grad * mix(z, offsets, ...))``, in closed form.

    Parameters
    ----------
    grad : array (..., T, C(r, 2))
    z, offsets, weights, weighting, mask, norm, eps, order, causal, rope, rope_base, rope_start
        As for :func:`mix`.

    Returns
    -------
    dz : array (..., T, r)
    dweights : array, shaped as ``weights``; only where weights were given
        Of the logits for ``"softmax"``.

    Raises
    ------
    ValueError
        Also where finite input has a gradient that the dtype cannot hold. NaN and infinity in the input go through.

    Notes
    -----
    ``18 m r + 4 r²`` flops a token; nothing is kept from the forward pass, and ``grad`` is ignored at tokens where no
    offset applies. Contributions to the gradient of a token are summed in a fixed order: bit-identical for any number
    of threads. Where the clamp is active the length is treated as a constant. Gradients are finite for equal, parallel
    and zero tokens, of the order of ``1/eps`` there (``1/√eps`` for ``"soft"``).

    Examples
    --------
    >>> import numpy as np
    >>> from subspan import plucker
    >>> z = np.random.default_rng(0).standard_normal((10, 4))
    >>> dz, dweights = plucker.mix_backward(np.ones((10, 6)), z, [1, 2], weights=np.array([0.7, 0.3]))
    >>> dz.shape, dweights.shape
    ((10, 4), (2,))
    """
    call = call_of(z=z, grad=grad, weights=weights, mask=mask)
    choices = (z, offsets, weights, weighting, mask, norm, eps, order, causal, "weighted", rope, rope_base, rope_start)
    dz, dweights = call.give(call.kernels.mix_backward(call.context, grad, *choices))
    return dz if dweights is None else (dz, dweights)


def mix_project(
    z: Array,
    W: Array,
    b: Array | None,
    offsets: Any,
    *,
    weights: Array | None = None,
    weighting: str | None = None,
    mask: Array | None = None,
    norm: str | None = "clamp",
    eps: float = 1e-8,
    order: str = "current-first",
    bias: str = "weighted",
    causal: bool = True,
    rope: str | None = None,
    rope_base: float = 10000.0,
    rope_start: Any = 0,
    out: Array | None = None,
) -> Array:
    """:func:`mix`, projected: ``mix(z, ...) @ W.T`` and a bias, without storing the coordinates.

    Parameters
    ----------
    z : array (..., T, r)
    W : array (d, C(r, 2))
        Any strides.
    b : array (d,) or None
    bias : {"weighted", "always"}
        ``"weighted"``: ``b`` times the sum of the weights that apply, zero where none does, as if every offset were
        projected by itself. ``"always"``: ``b`` once for every token, as if the mean over offsets were projected.
    offsets, weights, weighting, mask, norm, eps, order, causal, rope, rope_base, rope_start
        As for :func:`mix`.
    out : array (..., T, d), optional
        Must share no memory with the arguments.

    Returns
    -------
    array (..., T, d)

    Raises
    ------
    ValueError
        As :func:`mix`, and where ``W`` or ``b`` do not fit.

    Notes
    -----
    ``2 d C(r, 2)`` flops a token, whatever the number of offsets; coordinates exist for 48 tokens at a time, in cache.
    ``W`` is packed once a call. A layer that applies a nonlinearity or a separate projection to each offset is not of
    this form; call :func:`mix` for one offset at a time instead.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan import plucker
    >>> rng = np.random.default_rng(0)
    >>> z, W, b = rng.standard_normal((2, 100, 8)), rng.standard_normal((16, 28)), rng.standard_normal(16)
    >>> g = plucker.mix_project(z, W, b, [1, 2, 4, 8, 12, 16])
    >>> bool(np.allclose(g[:, 1:], plucker.mix(z, [1, 2, 4, 8, 12, 16])[:, 1:] @ W.T + b))
    True
    >>> bool((g[:, 0] == 0).all())  # the first token has no past, and no bias
    True
    """
    call = call_of(z=z, W=W, b=b, weights=weights, mask=mask, out=out)
    choices = (z, offsets, weights, weighting, mask, norm, eps, order, causal, bias, rope, rope_base, rope_start)
    return call.give(call.kernels.mix_project(call.context, W, b, *choices, out), out)


def mix_project_backward(
    grad: Array,
    z: Array,
    W: Array,
    b: Array | None,
    offsets: Any,
    *,
    weights: Array | None = None,
    weighting: str | None = None,
    mask: Array | None = None,
    norm: str | None = "clamp",
    eps: float = 1e-8,
    order: str = "current-first",
    bias: str = "weighted",
    causal: bool = True,
    rope: str | None = None,
    rope_base: float = 10000.0,
    rope_start: Any = 0,
) -> tuple[Array, ...]:
    """Gradients of ``sum(grad * mix_project(z, W, b, offsets, ...))``.

    Parameters
    ----------
    grad : array (..., T, d)
    z, W, b, offsets, ...
        As for :func:`mix_project`.

    Returns
    -------
    dz : array (..., T, r)
    dW : array (d, C(r, 2))
    db : array (d,), or None without ``b``
    dweights : array, shaped as ``weights``; only where weights were given

    Raises
    ------
    ValueError
        As :func:`mix_backward`.

    Notes
    -----
    ``4 d C(r, 2)`` flops a token. Coordinates are computed again, of 384 tokens at a time; work memory does not grow
    with the sequence. Bit-identical for any number of threads.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan import plucker
    >>> rng = np.random.default_rng(0)
    >>> z, W, b = rng.standard_normal((2, 100, 8)), rng.standard_normal((16, 28)), rng.standard_normal(16)
    >>> dz, dW, db = plucker.mix_project_backward(np.ones((2, 100, 16)), z, W, b, [1, 2, 4])
    >>> dz.shape, dW.shape, db.shape
    ((2, 100, 8), (16, 28), (16,))
    """
    call = call_of(z=z, grad=grad, W=W, b=b, weights=weights, mask=mask)
    choices = (z, offsets, weights, weighting, mask, norm, eps, order, causal, bias, rope, rope_base, rope_start)
    results: tuple[Array, ...] = call.give(call.kernels.mix_project_backward(call.context, grad, W, b, *choices))
    return results[:3] if results[3] is None else results
