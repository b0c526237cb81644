"""Lines stay apart when there are more of them than colours."""

import math
from pathlib import Path

import pytest

from yoco_u.plotting import PALETTE, ContextPlot, colour, css_dashes, dashes


def test_where_colours_come_again_line_styles_differ() -> None:
    for style in (dashes, css_dashes):
        looks = [(colour(index), style(index)) for index in range(100)]
        assert len(set(looks)) == len(looks)


def test_where_colours_come_again_markers_of_a_context_plot_differ(tmp_path: Path) -> None:
    plot = ContextPlot(["loss"])
    for index in range(5 * len(PALETTE)):
        plot.line(0, index, [(1024, 2.0), (2048, None), (4096, 1.0)], f"line {index}")
    plot.line(0, 0, [(1024, 1.0)], marker="")
    *marked, unmarked = [(line.get_color(), line.get_marker()) for line in plot.axes[0].lines]
    assert len(set(marked)) == len(marked) == 5 * len(PALETTE)
    assert unmarked[1] == ""
    plot.write(tmp_path / "plot.png", [1024, 4096])
    assert (tmp_path / "plot.png").stat().st_size > 1000


@pytest.mark.parametrize("label", ["_hidden", "$x_{$", "___", "50$ and 60$"])
def test_any_label_is_shown_as_it_is(tmp_path: Path, label: str) -> None:
    plot = ContextPlot(["loss"])
    plot.line(0, 0, [(1024, 2.0), (4096, 1.0)], label)
    plot.write(tmp_path / "plot.png", [1024, 4096])
    [shown] = plot.axes[0].get_legend_handles_labels()[1]
    assert shown.replace("\\$", "$") == (label.lstrip("_") or "-")


@pytest.mark.filterwarnings("error")
def test_a_panel_is_drawn_whatever_values_it_lacks(tmp_path: Path) -> None:
    """Over a logarithmic axis if it has a value that can stand there."""
    panels: list[list[float | None]] = [[2.0, 1.0], [3.0, None], [None, 0.0], [math.inf, math.nan], [-1.0, None]]
    plot = ContextPlot(["", *map(str, panels)])
    for panel, values in enumerate(panels, start=1):
        plot.line(panel, 0, list(zip((1024, 4096), values, strict=True)))
    plot.write(tmp_path / "plot.png", [1024, 4096])
    assert [axes.get_yscale() for axes in plot.axes] == ["linear", "log", "log", "linear", "linear", "linear"]
