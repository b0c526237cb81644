"""Evaluations as PNG: loss over the context, and needles as heat maps of depth and length."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from numpy.typing import NDArray

from yoco_u.evaluation.context import ContextScore
from yoco_u.evaluation.needle_grid import NeedleScore
from yoco_u.files import beside, publish
from yoco_u.formatting import context_label
from yoco_u.plotting import ContextPlot


def write_context_plot(curves: Sequence[tuple[str, Sequence[ContextScore]]], last: int, path: Path) -> None:
    """Two panels, a line for each label: the loss behind each prefix, and how it changes from the shortest prefix on."""
    titles = [f"nats per token, last {last:,} tokens", "change from the shortest prefix"]
    plot = ContextPlot(titles, "prefix, tokens", logarithmic=False)
    for index, (label, scores) in enumerate(curves):
        plot.line(0, index, [(score.prefix, score.loss) for score in scores], label)
        plot.line(1, index, [(score.prefix, score.change) for score in scores])
    plot.write(path, [score.prefix for score in curves[0][1]])


def write_needle_plot(cells: Sequence[NeedleScore], path: Path) -> None:
    """A column for each kind: recall above, the share of the answer's tokens that are the likeliest below."""
    kinds = list(dict.fromkeys(cell.kind for cell in cells))
    lengths, depths = sorted({cell.length for cell in cells}), sorted({cell.depth for cell in cells})
    width, height = max(2.6, 0.62 * len(lengths) + 1.2), max(2.0, 0.42 * len(depths) + 0.9)
    figure = Figure(figsize=(width * len(kinds) + 0.8, 2 * height), layout="constrained", dpi=150)
    rows = figure.subplots(2, len(kinds), squeeze=False)
    for column, kind in enumerate(kinds):
        own = {(cell.depth, cell.length): cell for cell in cells if cell.kind == kind}
        for axes, title, key in zip(
            rows[:, column], (f"{kind}: recall", "likeliest tokens"), ("recall", "token_accuracy"), strict=True
        ):
            shares = np.array([[getattr(own[depth, length], key) for length in lengths] for depth in depths])
            image = heat_map(axes, shares, lengths, depths)
            axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=rows, shrink=0.6, format=lambda share, _: f"{share:.0%}")
    figure.savefig(beside(path), format="png")
    publish(path)


def heat_map(axes: Axes, shares: NDArray[np.float64], lengths: Sequence[int], depths: Sequence[float]) -> QuadMesh:
    """Shares (depths, lengths) from 0 to 1 as colours and as percentages, the beginning of the texts on top."""
    mesh = axes.pcolormesh(shares, cmap="cividis", vmin=0, vmax=1)
    axes.invert_yaxis()
    axes.set_xticks(np.arange(len(lengths)) + 0.5, [context_label(length) for length in lengths])
    axes.set_yticks(np.arange(len(depths)) + 0.5, [f"{depth:.0%}" for depth in depths])
    axes.set_xlabel("length, tokens")
    axes.set_ylabel("depth")
    for row, column in np.ndindex(shares.shape):
        share = shares[row, column]
        colour = "black" if share > 0.55 else "white"
        axes.text(column + 0.5, row + 0.5, f"{share:.0%}", ha="center", va="center", fontsize=7, color=colour)
    return mesh
