"""The published per-offset form of Plücker mixing in PyTorch, with every variant in use, for autograd."""

from __future__ import annotations

import torch


def rotate(z, kind, base, start):
    T, r = z.shape[-2:]
    position = torch.arange(start, start + T, dtype=torch.float64)
    frequency = base ** (-2 * torch.arange(r // 2, dtype=torch.float64) / r)
    angle = (position[:, None] * frequency).to(z.dtype)
    c, s = angle.cos(), angle.sin()
    a, b = (z[..., 0::2], z[..., 1::2]) if kind == "interleaved" else (z[..., : r // 2], z[..., r // 2 :])
    x, y = a * c - b * s, a * s + b * c
    return torch.stack([x, y], -1).flatten(-2) if kind == "interleaved" else torch.cat([x, y], -1)


def mixed(
    z,
    offsets,
    *,
    weights=None,
    weighting=None,
    mask=None,
    norm="clamp",
    eps=1e-8,
    order="current-first",
    causal=True,
    rope=None,
    rope_base=1e4,
    rope_start=0,
):
    """Coordinates (..., T, C(r, 2)) and the sum of weights (..., T)."""
    weighting = weighting or ("mean" if weights is None else "given")
    T, r = z.shape[-2:]
    if rope:
        z = rotate(z, rope, rope_base, rope_start)
    i, j = torch.triu_indices(r, r, 1)
    mask = torch.ones(z.shape[:-1], dtype=torch.bool) if mask is None else mask.expand(z.shape[:-1])
    z = torch.where(mask[..., None], z, torch.zeros((), dtype=z.dtype))
    t = torch.arange(T)
    wedges, valid = [], []
    for d in offsets:
        other = t - d
        inside = (other >= 0) & (other < T)
        other = other.clamp(0, T - 1)
        w = z[..., other, :]
        p = z[..., i] * w[..., j] - z[..., j] * w[..., i]
        if order == "past-first":
            p = -p
        n2 = (p * p).sum(-1)
        n = torch.where(n2 > 0, n2, torch.ones_like(n2)).sqrt() * (n2 > 0)
        if norm == "clamp":
            p = p / n.clamp_min(eps)[..., None]
        elif norm == "soft":
            p = p / (n2 + eps).sqrt()[..., None]
        wedges.append(p)
        valid.append(inside & mask & mask[..., other])
    p, v = torch.stack(wedges, -2), torch.stack(valid, -1)
    if weighting == "mean":
        a = v.to(z.dtype) / v.sum(-1, keepdim=True).clamp_min(1)
    elif weighting == "given":
        a = torch.where(v, weights.expand(v.shape), torch.zeros((), dtype=z.dtype))
    else:
        logits = weights.expand(v.shape).masked_fill(~v, -torch.inf)
        some = v.any(-1, keepdim=True)
        a = torch.softmax(torch.where(some, logits, torch.zeros((), dtype=z.dtype)), -1)
        a = torch.where(v & some, a, torch.zeros((), dtype=z.dtype))
    p = torch.where(v[..., None], p, torch.zeros((), dtype=z.dtype))
    return (a[..., None] * p).sum(-2), a.sum(-1)


def projected(z, W, b, offsets, *, bias="weighted", **variant):
    p, total = mixed(z, offsets, **variant)
    g = p @ W.mT
    if b is None:
        return g
    return g + (b if bias == "always" else total[..., None] * b)
