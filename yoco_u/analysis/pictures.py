"""The pictures of a study: panels that the PNG files and the page share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, PercentFormatter

from yoco_u.analysis.acceptance import DraftAcceptance
from yoco_u.analysis.lens import Reading
from yoco_u.analysis.study import Study
from yoco_u.analysis.token_loops import ExitLoops
from yoco_u.analysis.trace import UnrolledLayer
from yoco_u.plotting import PALETTE, colour, dashes, open_frame, plain, save_png

_LEVELS = (0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)


FILES = {
    "angular": "angular-distance.png",
    "lens": "logit-lens.png",
    "loss": "loss-against-loops.png",
    "convergence": "loops-to-convergence.png",
    "attention": "attention-span.png",
    "exits": "loops-per-token.png",
    "drafts": "drafts-accepted.png",
}
"""The names of the pictures' files by measure."""


@dataclass(frozen=True)
class Panel:
    """One plot.

    Attributes:
        title: text above the plot.
        draw: draws the plot onto the given axes.
        size: width and height in inches.
    """

    title: str
    draw: Callable[[Axes], None]
    size: tuple[float, float] = (5.2, 3.5)


@dataclass(frozen=True)
class Picture:
    """The panels of one measure, and the name of the PNG file that shows them all."""

    file: str
    panels: list[Panel]


def pictures(studies: Sequence[Study]) -> dict[str, Picture]:
    """The pictures by measure, for what was measured. Studies after the first appear in the panels that compare only."""
    first = studies[0]
    found = {}
    if first.angular:
        found["angular"] = Picture(FILES["angular"], [_angular(studies)])
    if first.lens:
        found["lens"] = Picture(FILES["lens"], _lens(first))
    if first.loss:
        found["loss"] = Picture(FILES["loss"], [_loss(studies)])
    if first.convergence:
        found["convergence"] = Picture(FILES["convergence"], _convergence(first))
    if first.attention:
        found["attention"] = Picture(FILES["attention"], _attention(first))
    if first.exits:
        found["exits"] = Picture(FILES["exits"], _exits(first.exits))
    if first.drafts:
        found["drafts"] = Picture(FILES["drafts"], [_drafts(first.drafts)])
    return found


def side_by_side(models: Sequence[Sequence[UnrolledLayer]]) -> list[UnrolledLayer]:
    """The union of the layers of several models, numbered so that each (stage, loop, layer) has one place on a common axis."""
    kinds: dict[int, dict[str, None]] = {}
    for layer in (layer for model in models for layer in model):
        kinds.setdefault(layer.stage, {})[layer.attention] = None
    places = sorted({_place(layer) for model in models for layer in model})
    return [UnrolledLayer(number, *place, " or ".join(kinds[place[0]])) for number, place in enumerate(places, start=1)]


def _place(layer: UnrolledLayer) -> tuple[int, int, int]:
    return layer.stage, layer.loop, layer.layer


def write_png(picture: Picture, path: Path) -> None:
    """Write a picture as PNG, under a temporary name first."""
    columns = len(picture.panels) if len(picture.panels) <= 3 else 2
    rows = [picture.panels[i : i + columns] for i in range(0, len(picture.panels), columns)]
    width, height = sum(panel.size[0] for panel in rows[0]), sum(max(panel.size[1] for panel in row) + 0.3 for row in rows)
    figure = Figure(figsize=(width, height), layout="constrained", dpi=130)
    grid = figure.subplots(len(rows), columns, squeeze=False, width_ratios=[panel.size[0] for panel in rows[0]])
    for axes, panel in zip(grid.flat, picture.panels, strict=True):
        open_frame(axes, grid=0.15)
        panel.draw(axes)
        axes.set_title(panel.title, fontsize=10.5, loc="left", pad=30 if picture.file in _MARKED else None)
    save_png(figure, path)


_MARKED = ("angular-distance.png", "attention-span.png")  # plots over layers, with stage and loop written above the axes


def _angular(studies: Sequence[Study]) -> Panel:
    def draw(axes: Axes) -> None:
        layers = side_by_side([study.unrolled for study in studies])
        numbers = {_place(layer): layer.number for layer in layers}
        for i, study in enumerate(studies):
            if study.angular:
                distances = dict(zip((numbers[_place(layer)] for layer in study.unrolled), study.angular.layers, strict=True))
                values = [distances.get(layer.number, float("nan")) for layer in layers]
                _line(axes, i, range(1, len(layers) + 1), values, study.name)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("angular distance, half turns")
        _over_layers(axes, layers)
        _legend(axes, len(studies) > 1)

    return Panel("Angular distance of each layer's output from its input", draw, size=(8.4, 3.9))


def _lens(study: Study) -> list[Panel]:
    assert study.lens is not None
    readings = study.lens.loops

    def panel(title: str, unit: str, value: Callable[[Reading], float]) -> Panel:
        def draw(axes: Axes) -> None:
            loops = [reading.loop for reading in readings]
            _line(axes, 0, loops, [value(reading.rest) for reading in readings], "rest of the network")
            _line(axes, 1, loops, [value(reading.direct) for reading in readings], "directly")
            _over_loops(axes)
            axes.set_ylabel(unit)
            if unit == "share of tokens":
                axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            _legend(axes)

        return Panel(title, draw, size=(4.4, 3.3))

    return [
        panel("KL divergence from the final prediction", "nats", lambda reading: reading.kl),
        panel("Agreement with the final prediction", "share of tokens", lambda reading: reading.agreement),
        panel("Loss", "nats per token", lambda reading: reading.loss),
    ]


def _loss(studies: Sequence[Study]) -> Panel:
    def draw(axes: Axes) -> None:
        for i, study in enumerate(studies):
            if not study.loss:
                continue
            losses = {row.loops: row.loss for row in study.loss}
            _line(axes, i, list(losses), list(losses.values()), study.name)
            if study.trained_loops in losses:
                axes.plot(
                    [study.trained_loops], [losses[study.trained_loops]],
                    marker="o", markersize=10, markerfacecolor="none", color=colour(i), linewidth=0,
                )  # fmt: skip
        _over_loops(axes, "loops run")
        axes.set_ylabel("loss, nats per token")
        _legend(axes, len(studies) > 1)

    return Panel("Loss against loops run; ringed: the loop count trained with", draw, size=(6.4, 3.6))


def _convergence(study: Study) -> list[Panel]:
    found = study.convergence
    assert found is not None

    def histogram(axes: Axes) -> None:
        axes.set_axisbelow(True)
        loops = range(1, found.loops + 1)
        for i, (label, shares) in enumerate((("prediction", found.all.prediction), ("state", found.all.state))):
            axes.bar([loop + 0.4 * (i - 0.5) for loop in loops], shares, width=0.38, color=PALETTE[i][0], label=label)
        _over_loops(axes, "first steady loop")
        axes.set_ylabel("share of tokens")
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        _legend(axes)

    def by_group(axes: Axes) -> None:
        _bars(axes, [(group.name, group.tokens, group.prediction) for group in (found.all, *found.classes, *found.quarters)])

    return [
        Panel("First loop from which nothing changes", histogram, size=(4.6, 3.6)),
        Panel("The same of predictions, by token", by_group, size=(6.6, 4.2)),
    ]


def _attention(study: Study) -> list[Panel]:
    found = study.attention
    assert found is not None
    numbers = [span.layer for span in found.layers]

    def lines(unit: str, *series: tuple[str, list[float | None]]) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            for i, (label, values) in enumerate(series):
                _line(axes, i, numbers, [float("nan") if value is None else value for value in values], label)
            axes.set_ylim(bottom=0)
            axes.set_ylabel(unit)
            _over_layers(axes, study.unrolled)
            _legend(axes, len(series) > 1)

        return draw

    def mass(axes: Axes) -> None:
        shares = [[span.mass[i] for span in found.layers] for i in range(len(found.buckets))]
        edges = [number - 0.5 for number in numbers]
        axes.grid(False)
        for run in _runs(numbers):  # layers without attention weights leave a gap
            begin, end = numbers.index(run[0]), numbers.index(run[-1]) + 1
            mesh = axes.pcolormesh(
                [*edges[begin:end], edges[end - 1] + 1], range(len(found.buckets) + 1), [row[begin:end] for row in shares],
                norm=BoundaryNorm(_LEVELS, 256), cmap="viridis", linewidth=0,
            )  # fmt: skip
        axes.set_yticks(
            [i + 0.5 for i in range(len(found.buckets))], [_bucket(found.buckets, i) for i in range(len(found.buckets))]
        )
        axes.set_ylabel("distance, tokens back")
        _over_layers(axes, study.unrolled)
        axes.figure.colorbar(mesh, ax=axes, label="share of attention", format=FuncFormatter(_percent))

    spans = found.layers
    return [
        Panel("Share of attention by distance", mass, size=(6.4, 4.2)),
        Panel(
            "Mean distance",
            lines(
                "tokens back", ("attention", [s.distance for s in spans]), ("even weights", [s.even_distance for s in spans])
            ),
            size=(6.0, 3.7),
        ),
        Panel(
            "Entropy",
            lines("nats", ("attention", [s.entropy for s in spans]), ("even weights", [s.even_entropy for s in spans])),
            size=(6.0, 3.7),
        ),
        Panel("Attention on the first token", lines("share", ("share", [s.first_token for s in spans])), size=(6.0, 3.7)),
    ]


def _exits(found: ExitLoops) -> list[Panel]:
    def by_group(axes: Axes) -> None:
        _bars(axes, [(group.name, group.tokens, group.shares) for group in (found.all, *found.classes, *found.quarters)])

    def by_place(axes: Axes) -> None:
        _line(axes, 0, range(len(found.places)), [group.mean for group in found.places], "")
        axes.set_xticks(range(len(found.places)), [group.name for group in found.places], rotation=45, ha="right")
        axes.set_ylim(1, found.loops)
        axes.set_xlabel("token of the document")
        axes.set_ylabel("loops, on average")

    return [
        Panel("Loops run, by the token to be predicted", by_group, size=(6.6, 4.2)),
        Panel("Mean loops, by place in the document", by_place, size=(4.6, 3.6)),
    ]


def _drafts(found: DraftAcceptance) -> Panel:
    def draw(axes: Axes) -> None:
        for i, kind in enumerate(found.kinds):
            shares = [accepted / kind.drafts for accepted in kind.accepted]
            _line(axes, i, range(1, len(shares) + 1), shares, f"{kind.by}: {kind.tokens_per_step:.2f} tokens a step")
        _over_loops(axes, "token of the draft")
        axes.set_ylim(0, 1)
        axes.set_ylabel("share of drafts")
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        _legend(axes)

    return Panel("Drafts that are accepted up to a token", draw)


def _bars(axes: Axes, groups: Sequence[tuple[str, int, Sequence[float]]]) -> None:
    """Draw a bar for each group of tokens, given by its name, its size and the shares of its tokens by loop."""
    axes.set_axisbelow(True)
    loops = len(groups[0][2])
    for loop in range(loops):
        left, widths = [sum(shares[:loop]) for _, _, shares in groups], [shares[loop] for _, _, shares in groups]
        hatch, label = None if loop < len(PALETTE) else "//", f"loop {loop + 1}"
        axes.barh(range(len(groups)), widths, left=left, color=colour(loop), hatch=hatch, label=label, height=0.75)
    axes.set_yticks(range(len(groups)), [f"{name} ({tokens:,})" for name, tokens, _ in groups])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("share of tokens")
    _legend(axes, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=min(loops, 5))


def _bucket(buckets: Sequence[int], i: int) -> str:
    end = buckets[i + 1] - 1 if i + 1 < len(buckets) else 2 * buckets[i] - 1
    return f"{buckets[i]}" if end <= buckets[i] else f"{buckets[i]}-{end}"


def _percent(value: float, _: float) -> str:
    return f"{100 * value:g}%"


def _runs(numbers: Sequence[int]) -> list[list[int]]:
    """Group consecutive numbers: 1 2 5 6 -> [1 2] [5 6]"""
    return [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]


def _line(axes: Axes, index: int, x: Sequence[int], y: Sequence[float], label: str) -> None:
    axes.plot(x, y, color=colour(index), linestyle=dashes(index), marker="o", markersize=3.5, linewidth=1.4, label=plain(label))


def _legend(axes: Axes, wanted: bool = True, **place: Any) -> None:
    if wanted:
        axes.legend(frameon=False, fontsize=9, **place)


def _over_loops(axes: Axes, label: str = "loop") -> None:
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _over_layers(axes: Axes, unrolled: Sequence[UnrolledLayer]) -> None:
    """Draw lines where loops (dotted) and stages (solid) begin, and write attention and loop above each part."""
    axes.set_xlabel("unrolled layer")
    axes.set_xlim(0.5, len(unrolled) + 0.5)
    parts = [list(part) for _, part in groupby(unrolled, lambda layer: (layer.stage, layer.loop))]
    loops = {part[0].stage: part[0].loop for part in parts}
    for part in parts:
        first, last = part[0], part[-1]
        if first.number > 1:
            style, width = (":", 1.0) if first.loop > 1 else ("-", 1.6)
            axes.axvline(first.number - 0.5, color=PALETTE[-1][0], linestyle=style, linewidth=width)
        label = first.attention if loops[first.stage] == 1 else f"{first.attention}\nloop {first.loop}"
        axes.text(
            (first.number + last.number) / 2, 1.01, label,
            transform=axes.get_xaxis_transform(), ha="center", va="bottom", fontsize=8, linespacing=1.0,
        )  # fmt: skip
    if len(unrolled) <= 24:
        axes.xaxis.set_major_locator(FixedLocator(range(1, len(unrolled) + 1)))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
