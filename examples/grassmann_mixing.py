"""The Grassmann mixing layer in NumPy, forward and backward, and a small language model made of it.

A layer without attention. Tokens h (..., T, d) are reduced to r dimensions; each token is mixed with tokens of its past
through the Plücker coordinates of the planes they span; a gate blends the result with the token; layer normalisation
and a feed-forward network follow:

    z = W_red h + b_red
    g = mix_project(z, W_plu, b_plu, offsets, norm="soft", eps=1e-4)
    a = sigmoid(W_gate [h; g] + b_gate),  m = a h + (1 - a) g
    h <- LN(m),           h <- LN(h + FFN(h))       as published ("paper")
    h <- h + LN(m(LN h)), h <- h + FFN(LN h)        as it is trained since ("prenorm"; m and z of LN h)

    python examples/grassmann_mixing.py                a character model of Python's standard library
    python examples/grassmann_mixing.py PATH/TO/TEXT   of a text of your own
    python examples/grassmann_mixing.py --no-mixing    the same network with g = 0

Attention Is Not What You Need: Grassmann Flows as an Attention-Free Alternative for Sequence Modeling, arXiv:2512.19428
(2025). The paper pairs a token with later ones; a language model that is trained so sees what it is to predict, and
this one looks back. It divides each wedge by max(n, 1e-8), n its length; here it is sqrt(n² + 1e-4), whose gradients
stay bounded where neighbouring tokens are equal.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np

from subspan import plucker

Array = np.ndarray[Any, Any]
OFFSETS = [1, 2, 4, 8, 12, 16]
# Equal neighbouring symbols are equal tokens of the first layer: max(n, 1e-8), as published, has gradients of 1e11.
NORM: Any = {"norm": "soft", "eps": 1e-4}


def layer_norm(x: Array, scale: Array, shift: Array) -> tuple[Array, tuple[Array, ...]]:
    """Zero mean and unit variance along the last axis, and what the gradient needs."""
    centred = x - x.mean(-1, keepdims=True)
    inverse = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    unit = centred * inverse
    return unit * scale + shift, (unit, inverse, scale)


def layer_norm_backward(grad: Array, kept: tuple[Array, ...]) -> tuple[Array, Array, Array]:
    """Gradients of the input, the scale and the shift."""
    unit, inverse, scale = kept
    axes = tuple(range(grad.ndim - 1))
    g = grad * scale
    dx = inverse * (g - g.mean(-1, keepdims=True) - unit * (g * unit).mean(-1, keepdims=True))
    return dx, (grad * unit).sum(axes), grad.sum(axes)


def gelu(x: Array) -> tuple[Array, Array]:
    """The tanh form, and its derivative."""
    c = math.sqrt(2 / math.pi)
    t = np.tanh(c * (x + 0.044715 * x**3))
    return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t**2) * c * (1 + 3 * 0.044715 * x**2)


def outer(grad: Array, x: Array) -> Array:
    """The gradient of a weight: the sum over tokens of grad xᵀ."""
    return grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])


class GrassmannLayer:
    """One layer. ``parameters`` and, after :meth:`backward`, ``gradients`` are dictionaries of arrays."""

    def __init__(
        self,
        d: int,
        r: int,
        offsets: list[int],
        *,
        form: str = "prenorm",
        mixing: bool = True,
        rng: np.random.Generator,
        dtype: Any = np.float32,
    ) -> None:
        if form not in ("paper", "prenorm"):
            raise ValueError(f"form must be 'paper' or 'prenorm', got {form!r}")
        self.offsets, self.form, self.mixing = offsets, form, mixing

        def linear(rows: int, columns: int) -> Array:
            return (rng.standard_normal((rows, columns)) / math.sqrt(columns)).astype(dtype)

        zeros, ones = (lambda n: np.zeros(n, dtype)), (lambda n: np.ones(n, dtype))
        self.parameters: dict[str, Array] = {
            "W_red": linear(r, d),
            "b_red": zeros(r),
            "W_plu": linear(d, r * (r - 1) // 2),
            "b_plu": zeros(d),
            "W_gate": linear(d, 2 * d),
            "b_gate": zeros(d),
            "scale_mix": ones(d),
            "shift_mix": zeros(d),
            "W_in": linear(4 * d, d),
            "b_in": zeros(4 * d),
            "W_out": linear(d, 4 * d),
            "b_out": zeros(d),
            "scale_ffn": ones(d),
            "shift_ffn": zeros(d),
        }
        if form == "prenorm":
            self.parameters |= {"scale_first": ones(d), "shift_first": zeros(d)}
        self.gradients: dict[str, Array] = {}

    # -- the two halves ------------------------------------------------------------------------------------------------

    def _blend(self, h: Array) -> tuple[Array, tuple[Array, ...]]:
        p = self.parameters
        z = h @ p["W_red"].T + p["b_red"]
        if self.mixing:
            g = plucker.mix_project(z, p["W_plu"], p["b_plu"], self.offsets, **NORM)
        else:
            g = np.zeros_like(h)
        both = np.concatenate([h, g], -1)
        a = 1 / (1 + np.exp(-(both @ p["W_gate"].T + p["b_gate"])))
        return a * h + (1 - a) * g, (h, z, g, both, a)

    def _blend_backward(self, grad: Array, kept: tuple[Array, ...]) -> Array:
        p, new = self.parameters, self.gradients
        h, z, g, both, a = kept
        da = grad * (h - g) * a * (1 - a)
        new["W_gate"], new["b_gate"] = outer(da, both), da.sum((0, 1))
        dboth = da @ p["W_gate"]
        dh = grad * a + dboth[..., : h.shape[-1]]
        if not self.mixing:
            for name in ("W_red", "b_red", "W_plu", "b_plu"):
                new[name] = np.zeros_like(p[name])
            return dh
        dg = grad * (1 - a) + dboth[..., h.shape[-1] :]
        dz, new["W_plu"], new["b_plu"] = plucker.mix_project_backward(
            dg, z, p["W_plu"], p["b_plu"], self.offsets, **NORM
        )
        new["W_red"], new["b_red"] = outer(dz, h), dz.sum((0, 1))
        return dh + dz @ p["W_red"]

    def _feed_forward(self, h: Array) -> tuple[Array, tuple[Array, ...]]:
        p = self.parameters
        y, slope = gelu(h @ p["W_in"].T + p["b_in"])
        return y @ p["W_out"].T + p["b_out"], (h, y, slope)

    def _feed_forward_backward(self, grad: Array, kept: tuple[Array, ...]) -> Array:
        p, new = self.parameters, self.gradients
        h, y, slope = kept
        new["W_out"], new["b_out"] = outer(grad, y), grad.sum((0, 1))
        inner = (grad @ p["W_out"]) * slope
        new["W_in"], new["b_in"] = outer(inner, h), inner.sum((0, 1))
        return inner @ p["W_in"]

    # -- the layer -----------------------------------------------------------------------------------------------------

    def forward(self, h: Array) -> Array:
        """``(batch, T, d)`` to the same; keeps what :meth:`backward` needs."""
        p = self.parameters
        if self.form == "paper":
            m, blend = self._blend(h)
            first, norm = layer_norm(m, p["scale_mix"], p["shift_mix"])
            f, ffn = self._feed_forward(first)
            out, last = layer_norm(first + f, p["scale_ffn"], p["shift_ffn"])
            self._kept: tuple[Any, ...] = (blend, norm, ffn, last)
            return out
        x, before = layer_norm(h, p["scale_first"], p["shift_first"])
        m, blend = self._blend(x)
        y, norm = layer_norm(m, p["scale_mix"], p["shift_mix"])
        h = h + y
        x, last = layer_norm(h, p["scale_ffn"], p["shift_ffn"])
        f, ffn = self._feed_forward(x)
        self._kept = (before, blend, norm, last, ffn)
        return h + f

    def backward(self, grad: Array) -> Array:
        """The gradient of the input; those of the parameters go to ``gradients``."""
        new = self.gradients
        if self.form == "paper":
            blend, norm, ffn, last = self._kept
            grad, new["scale_ffn"], new["shift_ffn"] = layer_norm_backward(grad, last)
            grad = grad + self._feed_forward_backward(grad, ffn)
            grad, new["scale_mix"], new["shift_mix"] = layer_norm_backward(grad, norm)
            return self._blend_backward(grad, blend)
        before, blend, norm, last, ffn = self._kept
        dx, new["scale_ffn"], new["shift_ffn"] = layer_norm_backward(self._feed_forward_backward(grad, ffn), last)
        grad = grad + dx
        dm, new["scale_mix"], new["shift_mix"] = layer_norm_backward(grad, norm)
        dx, new["scale_first"], new["shift_first"] = layer_norm_backward(self._blend_backward(dm, blend), before)
        return grad + dx


class Model:
    """Embedding and learned positions, layers, a last layer norm, logits."""

    def __init__(
        self, symbols: int, length: int, layers: list[GrassmannLayer], d: int, rng: np.random.Generator
    ) -> None:
        self.layers = layers
        self.own: dict[str, Array] = {
            "embedding": (0.02 * rng.standard_normal((symbols, d))).astype(np.float32),
            "positions": (0.02 * rng.standard_normal((length, d))).astype(np.float32),
            "scale": np.ones(d, np.float32),
            "shift": np.zeros(d, np.float32),
            "head": (0.02 * rng.standard_normal((symbols, d))).astype(np.float32),
        }

    def parameters(self) -> list[Array]:
        """All of them, in the order of the gradients that :meth:`loss` returns."""
        return [*self.own.values(), *(x for layer in self.layers for x in layer.parameters.values())]

    def loss(self, tokens: Array, train: bool = True) -> tuple[float, list[Array]]:
        """Mean cross-entropy of the next symbol for ``(batch, T + 1)`` symbols, and its gradients."""
        own = self.own
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        h = own["embedding"][inputs] + own["positions"][: inputs.shape[1]]
        for layer in self.layers:
            h = layer.forward(h)
        x, kept = layer_norm(h, own["scale"], own["shift"])
        scores = x @ own["head"].T
        scores -= scores.max(-1, keepdims=True)
        probabilities = np.exp(scores)
        total = probabilities.sum(-1, keepdims=True)
        picked = np.take_along_axis(scores, targets[..., None], -1) - np.log(total)
        value = -float(picked.mean())
        if not train:
            return value, []
        grad = probabilities / total
        np.put_along_axis(grad, targets[..., None], np.take_along_axis(grad, targets[..., None], -1) - 1, -1)
        grad /= targets.size
        new = {"head": outer(grad, x)}
        grad, new["scale"], new["shift"] = layer_norm_backward(grad @ own["head"], kept)
        for layer in reversed(self.layers):
            grad = layer.backward(grad)
        new["embedding"] = np.zeros_like(own["embedding"])
        np.add.at(new["embedding"], inputs, grad)
        new["positions"] = np.zeros_like(own["positions"])
        new["positions"][: inputs.shape[1]] = grad.sum(0)
        return value, [
            *(new[name] for name in own),
            *(layer.gradients[name] for layer in self.layers for name in layer.parameters),
        ]


class Adam:
    """Adam with the usual decay rates."""

    def __init__(self, parameters: list[Array]) -> None:
        self.parameters, self.count = parameters, 0
        self.first, self.second = ([np.zeros_like(p) for p in parameters] for _ in range(2))

    def step(self, gradients: list[Array], lr: float) -> None:
        """Moves the parameters in place."""
        self.count += 1
        rate = lr * math.sqrt(1 - 0.999**self.count) / (1 - 0.9**self.count)
        for p, g, m, v in zip(self.parameters, gradients, self.first, self.second, strict=True):
            m += 0.1 * (g - m)
            v += 0.001 * (g * g - v)
            p -= (rate * m / (np.sqrt(v) + 1e-8)).astype(p.dtype)


def standard_library(limit: int) -> str:
    """Source text of Python's standard library, in the order of file names."""
    parts, size = [], 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        parts.append(text)
        size += len(text)
        if size >= limit:
            break
    return "".join(parts)[:limit]


def train(
    text: str,
    *,
    d: int = 96,
    r: int = 16,
    depth: int = 2,
    length: int = 128,
    batch: int = 16,
    steps: int = 500,
    lr: float = 3e-3,
    form: str = "prenorm",
    mixing: bool = True,
    seed: int = 0,
    report: Any = None,
) -> float:
    """Trains on the first nine tenths of a text and returns the perplexity of a symbol on the last."""
    symbols = np.frombuffer(text.encode("ascii", "replace"), np.uint8).astype(np.int64)
    cut = len(symbols) * 9 // 10
    if len(symbols) - cut <= 2 * length or cut <= length + 1:
        raise ValueError(f"a text of {len(symbols)} characters is too short for sequences of {length}")
    rng = np.random.default_rng(seed)
    layers = [GrassmannLayer(d, r, OFFSETS, form=form, mixing=mixing, rng=rng) for _ in range(depth)]
    model = Model(128, length, layers, d, rng)
    adam = Adam(model.parameters())
    start = time.perf_counter()
    for step in range(steps):
        at = rng.integers(0, cut - length - 1, batch)
        value, gradients = model.loss(symbols[at[:, None] + np.arange(length + 1)])
        warm = min(1.0, (step + 1) / 50)
        adam.step(gradients, lr * warm * 0.5 * (1 + math.cos(math.pi * step / steps)))
        if report is not None and (step + 1) % 50 == 0:
            seconds = (time.perf_counter() - start) / (step + 1)
            report(f"step {step + 1}: perplexity {math.exp(value):.2f}, {seconds:.3f} s a step")
    held = symbols[cut:]
    rows = held[: (len(held) - 1) // length * length].reshape(-1, length)[:256]
    rows = np.concatenate([rows[:-1], rows[1:, :1]], 1)  # with the symbol that follows each row
    return math.exp(
        np.mean([model.loss(part, train=False)[0] for part in np.array_split(rows, len(rows) // batch or 1)])
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", nargs="?", type=Path, help="a text file; without it Python's standard library")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--form", choices=["paper", "prenorm"], default="prenorm")
    parser.add_argument("--no-mixing", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    text = given.text.read_text(encoding="utf-8") if given.text else standard_library(3_000_000)
    perplexity = train(
        text, steps=given.steps, form=given.form, mixing=not given.no_mixing, seed=given.seed, report=print
    )
    print(f"{len(text)} characters, {given.steps} steps: perplexity {perplexity:.2f} on the last tenth")


if __name__ == "__main__":
    main()
