"""The needles of a grid as maps: the recall of each model at each depth and length."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from yoco_u.experiment.results import Series


@dataclass(frozen=True)
class NeedleMap:
    """Recall of one model on one kind of needle, mean over the seeds.

    Attributes:
        title: the model, and the kind where there are several.
        lengths, depths: tokens of the texts, and where in them the needle lies, from 0 to 1; both ascending.
        recall: share of needles found, (depths, lengths).
    """

    title: str
    lengths: list[int]
    depths: list[float]
    recall: NDArray[np.float64]


def needle_maps(found: Sequence[Series]) -> list[NeedleMap]:
    """One map for each series and kind of needle that was measured."""
    kinds = list(dict.fromkeys(score["kind"] for series in found for score in series.needles))
    maps = []
    for series in found:
        for kind in kinds:
            own = [score for score in series.needles if score["kind"] == kind]
            if own:
                title = series.label if len(kinds) == 1 else f"{series.label}: {kind}"
                lengths, depths = sorted({score["length"] for score in own}), sorted({score["depth"] for score in own})
                recall = [
                    [np.mean([s["recall"] for s in own if (s["length"], s["depth"]) == (length, depth)]) for length in lengths]
                    for depth in depths
                ]
                maps.append(NeedleMap(title, lengths, depths, np.array(recall)))
    return maps
