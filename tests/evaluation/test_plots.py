"""Pictures of evaluations are written whole, and hold every value as a mark or a number."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from yoco_u.evaluation.context import context_scores
from yoco_u.evaluation.needle_grid import NeedleScore
from yoco_u.evaluation.plots import write_context_plot, write_needle_plot


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that a test saves."""
    saved: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *arguments: Any, **settings: Any) -> None:
        saved.append(figure)
        save(figure, *arguments, **settings)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def assert_is_png(path: Path) -> None:
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("lengths", [(512,), (512, 1000, 4096)])
def test_needles(tmp_path: Path, figures: list[Figure], lengths: tuple[int, ...]) -> None:
    scores = [
        NeedleScore(kind=kind, length=length, depth=depth, samples=3, recall=depth, token_accuracy=1 - depth, loss=1.0)
        for kind in ("single_1", "multi_key")
        for length in lengths
        for depth in (0.0, 0.5, 1.0)
    ]
    write_needle_plot(scores, tmp_path / "needles.png")
    assert_is_png(tmp_path / "needles.png")
    [figure] = figures
    panels = [axes for axes in figure.axes if axes.get_xlabel()]
    assert len(panels) == 4
    for place, axes in enumerate(panels):
        [mesh] = [drawn for drawn in axes.collections if isinstance(drawn, QuadMesh)]
        shown = np.asarray(mesh.get_array())
        rising = np.repeat([[0.0], [0.5], [1.0]], len(lengths), axis=1)
        np.testing.assert_allclose(shown, rising if place < 2 else 1 - rising)
        assert [text.get_text() for text in axes.texts][:: len(lengths)] == [f"{row[0]:.0%}" for row in shown]
    assert [label.get_text() for label in panels[0].get_xticklabels()] == ["512", "1,000", "4K"][: len(lengths)]


def test_contexts(tmp_path: Path, figures: list[Figure]) -> None:
    first, second = np.array([[2.0, 1.5], [2.4, 1.7]]), np.array([[2.2, 1.6]])
    curves = [
        ("a, T=3", context_scores(first, (1024, 2048), range(len(first)))),
        ("b, T=1", context_scores(second, (1024, 2048), range(len(second)))),
    ]
    write_context_plot(curves, 512, tmp_path / "context.png")
    assert_is_png(tmp_path / "context.png")
    [figure] = figures
    losses, changes = figure.axes
    assert [line.get_label() for line in losses.lines] == ["a, T=3", "b, T=1"]
    np.testing.assert_allclose([line.get_ydata() for line in losses.lines], [[2.2, 1.6], [2.2, 1.6]])
    np.testing.assert_allclose([line.get_ydata() for line in changes.lines], [[0, -0.6], [0, -0.6]])
    assert losses.get_yscale() == "linear" and losses.get_xlabel() == "prefix, tokens"
