"""Angular distance between the input and the output of each layer, over the unrolled depth (Figure 8 of arXiv 2604.01220)."""

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from yoco_u.analysis.trace import last_states, unroll, watch_layers, watch_loops
from yoco_u.data import Batch
from yoco_u.inference.exits import angular_distance
from yoco_u.model import YocoUForCausalLM


@dataclass(frozen=True)
class LoopDistance:
    """Angular distance between the input and the output of one loop of a stage, loop gate included.

    Attributes:
        stage: index of the stage, from 0.
        loop: which of its loops, from 1.
        distance: mean over all tokens (and streams), in half turns.
    """

    stage: int
    loop: int
    distance: float


@dataclass(frozen=True)
class AngularDistances:
    """Means over all tokens (and streams), in half turns: 0 is the same direction, 0.5 a right angle, 1 the opposite.

    Attributes:
        layers: distance between the input and the output of each unrolled layer. Without loop gates, the input of a layer is
            the output of the layer before it, or the embedding for the first layer.
        loops: distance between the input and the output of each loop of every looped stage.
    """

    layers: list[float]
    loops: list[LoopDistance]


def angular_distances(model: YocoUForCausalLM, batches: Iterable[Batch], num_loops: int | None = None) -> AngularDistances:
    """Measure `arccos(cosine similarity) / pi` (arXiv 2403.17887, equation 4), averaged over all tokens.

    The equation has the last token of each sequence instead.

    Args:
        num_loops: loop count of the passes; the model's own by default.
    """
    architecture = model.model.at_loops(num_loops)
    stages = architecture.looped_stages
    layers = torch.zeros(len(unroll(architecture)), dtype=torch.float64)
    loops = {stage: torch.zeros(architecture.stages[stage].loops, dtype=torch.float64) for stage in stages}
    tokens = 0

    def see(number: int, before: Tensor, after: Tensor) -> None:
        layers[number - 1] += _summed(before, after)

    for batch in batches:
        with ExitStack() as watching:
            watching.enter_context(watch_layers(model, see))
            states = {stage: watching.enter_context(watch_loops(model, stage)) for stage in stages}
            last_states(model, batch, num_loops)
        for stage, seen in states.items():
            loops[stage] += torch.tensor([_summed(*pair) for pair in pairwise(seen)], dtype=torch.float64)
        tokens += batch["input_ids"].numel()
    return AngularDistances(
        (layers / tokens).tolist(),
        [LoopDistance(s, t, total / tokens) for s in stages for t, total in enumerate(loops[s].tolist(), start=1)],
    )


def _summed(x: Tensor, y: Tensor) -> float:
    """The sum of distances over tokens, each the mean over its streams."""
    distances = angular_distance(x, y)  # (rows, tokens) or (rows, tokens, streams)
    return float(distances.flatten(2).mean(-1).sum()) if distances.ndim == 3 else float(distances.sum())
