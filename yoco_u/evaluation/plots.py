"""Evaluations as PNG: the loss by context length as curves, needles as heat maps over depth and length."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from numpy.typing import NDArray

from yoco_u.evaluation.context import ContextScore
from yoco_u.evaluation.needle_grid import NeedleScore
from yoco_u.formatting import context_label
from yoco_u.plotting import ContextPlot, save_png


def write_context_plot(curves: Sequence[tuple[str, Sequence[ContextScore]]], last: int, path: Path) -> None:
    """Draw two panels with a line for each curve: the loss behind each prefix, and its change from the shortest prefix."""
    titles = [f"nats per token, last {last:,} tokens", "change from the shortest prefix"]
    plot = ContextPlot(titles, "prefix, tokens", logarithmic=False)
    for index, (label, scores) in enumerate(curves):
        plot.line(0, index, [(score.prefix, score.loss) for score in scores], label)
        plot.line(1, index, [(score.prefix, score.change) for score in scores])
    plot.write(path, [score.prefix for score in curves[0][1]])


def write_needle_plot(scores: Sequence[NeedleScore], path: Path) -> None:
    """Draw a column for each kind of needle, with the recall above and the token accuracy below."""
    kinds = list(dict.fromkeys(score.kind for score in scores))
    lengths, depths = sorted({score.length for score in scores}), sorted({score.depth for score in scores})
    width, height = max(2.6, 0.62 * len(lengths) + 1.2), max(2.0, 0.42 * len(depths) + 0.9)
    figure = Figure(figsize=(width * len(kinds) + 0.8, 2 * height), layout="constrained", dpi=150)
    rows = figure.subplots(2, len(kinds), squeeze=False)
    for column, kind in enumerate(kinds):
        own = {(score.depth, score.length): score for score in scores if score.kind == kind}
        for axes, title, key in zip(
            rows[:, column], (f"{kind}: recall", "likeliest tokens"), ("recall", "token_accuracy"), strict=True
        ):
            shares = np.array([[getattr(own[depth, length], key) for length in lengths] for depth in depths])
            image = heat_map(axes, shares, lengths, depths)
            axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=rows, shrink=0.6, format=lambda share, _: f"{share:.0%}")
    save_png(figure, path)


def heat_map(axes: Axes, shares: NDArray[np.float64], lengths: Sequence[int], depths: Sequence[float]) -> QuadMesh:
    """Draw shares (depths, lengths) from 0 to 1 as colours and as percentages, with the beginning of the texts on top."""
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
