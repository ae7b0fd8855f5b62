"""The demonstration's picture: the spectrum, and the rows in the plane of the subspace that tells them apart."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from typing import Any

import numpy as np

GROUPS = 8
NAMED = 30  # so many points have their names written beside them
MEMBERS = 4  # a group has at least so many


def plane(unit: Any, groups: list[str], shown: list[str]) -> Any:
    """Two directions ``(k, 2)``: where the shown groups are farthest apart against their own spread, else
    where the rows differ most."""
    k = unit.shape[1]
    own = np.asarray(groups)
    if len(shown) < 3 or k < 2:
        centred = unit - unit.mean(0)
        _, _, vh = np.linalg.svd(centred, full_matrices=False)
        return vh[:2].T
    means = np.array([unit[own == g].mean(0) for g in shown])
    within = sum(np.cov(unit[own == g], rowvar=False) for g in shown) / len(shown)
    # A quarter of the mean variance on the diagonal: a few members do not tell k variances.
    steady = within + (0.25 * np.trace(within) / k or 1.0) * np.eye(k)
    whiten = np.linalg.cholesky(np.linalg.inv(steady))
    pairs = np.array([a - b for a, b in combinations(means @ whiten, 2)])
    # Each pair of groups counts alike: by squares one group that is far from all others would take the whole plane.
    pairs /= np.maximum(np.linalg.norm(pairs, axis=1, keepdims=True), np.finfo(float).tiny)
    _, _, vh = np.linalg.svd(pairs, full_matrices=False)
    return whiten @ vh[:2].T


def place_labels(axes: Any, named: list[tuple[str, float, float]]) -> list[str]:
    """Writes names beside their points where they meet no other name; those without room are left out and returned."""
    from matplotlib.text import Text

    renderer = axes.figure.canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    taken: list[Any] = []
    left_out = []
    for name, x, y in named:
        text = axes.annotate(
            name,
            (x, y),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=8,
            ha="center",
            va="center",
            arrowprops={"arrowstyle": "-", "lw": 0.6, "color": "0.3"},
            bbox={"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.75},
        )
        for step in range(96):
            radius, angle = 22 + 14 * (step // 16), 2 * np.pi * (step % 16) / 16
            text.set_position((1.6 * radius * np.cos(angle), radius * np.sin(angle)))
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer).padded(2)  # that of an annotation has its line in it
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
        else:
            text.remove()
            left_out.append(name)
    return left_out


def picture(labels: list[str], places: Any, values: Any, exact: Any, known: tuple[str, ...], path: str) -> str:
    """Writes the picture and returns what there is to see on its right side."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(14, 6.5), layout="constrained", width_ratios=[2, 3])
    index = np.arange(1, values.size + 1)
    if exact is not None:
        left.semilogy(np.arange(1, exact.size + 1), exact, "-", color="0.6", lw=3, label="exact")
    left.semilogy(index, values, ".-", label="streamed")
    left.set(xlabel="component", ylabel="singular value", title="Spectrum")
    left.legend()

    norms = np.linalg.norm(places, axis=1)
    unit = places / np.where(norms == 0, 1.0, norms)[:, None]
    groups = [label.partition(".")[0].partition("/")[0] for label in labels]
    counts = Counter(groups)
    common = [g for g, c in sorted(counts.items(), key=lambda p: (-p[1], p[0])) if c >= MEMBERS][:GROUPS]
    shown = common if len(common) >= 3 else []
    at = unit @ plane(unit, groups, shown)
    x, y = at[:, 0], at[:, 1] if at.shape[1] > 1 else np.zeros(len(labels))
    rest = [i for i, g in enumerate(groups) if g not in shown]
    size, grey = (7, "0.82") if shown else (14, "0.45")
    right.scatter(x[rest], y[rest], s=size, color=grey, label="others" if shown else None, linewidths=0)
    colours = [mpl.colormaps["tab10"](i) for i in range(GROUPS)]
    for colour, g in zip(colours, shown, strict=False):
        mine = [i for i, h in enumerate(groups) if h == g]
        right.scatter(x[mine], y[mine], s=22, color=colour, label=f"{g} ({len(mine)})", linewidths=0)
    if shown:
        title = "Where the largest groups are farthest apart"
        caption = (
            f"Each dot is one of {len(labels)} names, its rows summed and of unit length, in the plane of the\n"
            "subspace in which the coloured groups differ most against their own spread.\n"
            "Nothing was told of groups while streaming: that dots of one colour lie together,\n"
            "and some of the groups apart, is what the subspace has learned."
        )
        right.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    else:
        title = "Where the rows differ most"
        caption = (
            f"Each dot is one of {len(labels)} names, its rows summed and of unit length,\n"
            "in the plane of the subspace in which they differ most."
        )
    right.set(title=title, xlabel=caption, xticks=[], yticks=[])
    right.margins(0.12)
    fig.canvas.draw()
    names = [n for n in known if n in labels] or (labels if len(labels) <= NAMED else [])
    place_labels(right, [(n, float(x[labels.index(n)]), float(y[labels.index(n)])) for n in names])
    fig.savefig(path, dpi=110)
    plt.close(fig)
    return f"{title[0].lower()}{title[1:]}" + (f" ({', '.join(shown)})" if shown else "")
