"""Lines stay apart when there are more of them than colours."""

from pathlib import Path

from yoco_u.plotting import PALETTE, ContextPlot, colour, dashes


def test_where_colours_come_again_line_styles_differ() -> None:
    looks = [(colour(index), dashes(index)) for index in range(4 * len(PALETTE))]
    assert len(set(looks)) == len(looks)


def test_where_colours_come_again_markers_of_a_context_plot_differ(tmp_path: Path) -> None:
    plot = ContextPlot(["loss"])
    for index in range(4 * len(PALETTE)):
        plot.line(0, index, [(1024, 2.0), (2048, None), (4096, 1.0)], f"line {index}")
    plot.line(0, 0, [(1024, 1.0)], marker="")
    *marked, unmarked = [(line.get_color(), line.get_marker()) for line in plot.axes[0].lines]
    assert len(set(marked)) == len(marked) == 4 * len(PALETTE)
    assert unmarked[1] == ""
    plot.write(tmp_path / "plot.png", [1024, 4096])
    assert (tmp_path / "plot.png").stat().st_size > 1000
