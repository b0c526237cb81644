"""Needles of a grid as heat maps: what each model finds at each depth and length."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from yoco_u.evaluation.plots import heat_map
from yoco_u.experiment.results import Series
from yoco_u.plotting import svg


@dataclass(frozen=True)
class NeedleMap:
    """Recall of one model and kind of needle, mean over the seeds.

    Attributes:
        title: the model, and the kind where there are several.
        recall: (depths, lengths).
    """

    title: str
    lengths: list[int]
    depths: list[float]
    recall: NDArray[np.float64]

    def draw(self, axes: Axes) -> None:
        axes.grid(False)
        heat_map(axes, self.recall, self.lengths, self.depths)

    def svg(self) -> str:
        return svg(self.draw, (3.6, 2.6))


def needle_maps(found: Sequence[Series]) -> list[NeedleMap]:
    """One for each series and kind that was measured."""
    kinds = list(dict.fromkeys(score["kind"] for series in found for score in series.needles))
    maps = []
    for series in found:
        for kind in kinds:
            own = [score for score in series.needles if score["kind"] == kind]
            if own:
                title = series.label if len(kinds) == 1 else f"{series.label}: {kind}"
                lengths, depths = sorted({score["length"] for score in own}), sorted({score["depth"] for score in own})
                recall = [
                    [np.mean([c["recall"] for c in own if (c["length"], c["depth"]) == (length, depth)]) for length in lengths]
                    for depth in depths
                ]
                maps.append(NeedleMap(title, lengths, depths, np.array(recall)))
    return maps
