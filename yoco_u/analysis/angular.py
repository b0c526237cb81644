"""Angular distance between what consecutive layers leave, over the unrolled depth (Figure 8 of arXiv 2604.01220)."""

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from math import pi

import torch
import torch.nn.functional as F
from torch import Tensor

from yoco_u.analysis.trace import at_loops, last_states, unroll, watch_layers, watch_loops
from yoco_u.data import Batch
from yoco_u.model import YocoUForCausalLM


@dataclass(frozen=True)
class LoopDistance:
    """How far one loop of a stage, from 1, turns the states: between what it read and what it left, gate included."""

    stage: int
    loop: int
    distance: float


@dataclass(frozen=True)
class AngularDistances:
    """Means over all tokens (and streams), in half turns: 0 is the same direction, 0.5 a right angle, 1 the opposite.

    Attributes:
        layers: between what each unrolled layer reads and what it writes. Without loop gates that is the distance between
            the outputs of consecutive layers; the first one's neighbour is the embedding.
        loops: the same for whole loops, of every looped stage.
    """

    layers: list[float]
    loops: list[LoopDistance]


def angular_distances(model: YocoUForCausalLM, batches: Iterable[Batch], num_loops: int | None = None) -> AngularDistances:
    """`arccos(cosine similarity) / pi` (arXiv 2403.17887, equation 4), averaged over tokens instead of the last one's.

    Args:
        num_loops: loop count of the passes; the model's own by default.
    """
    architecture = at_loops(model, num_loops)
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


def angular_distance(x: Tensor, y: Tensor) -> Tensor:
    """Angle between vectors (..., hidden) over pi, exact also where they are nearly parallel, which arccos is not.

    Twice the angle between the difference and the sum of the unit vectors (Kahan, 2006).
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, y = F.normalize(x.to(dtype), dim=-1), F.normalize(y.to(dtype), dim=-1)
    return 2 * torch.atan2((x - y).norm(dim=-1), (x + y).norm(dim=-1)) / pi


def _summed(x: Tensor, y: Tensor) -> float:
    """The sum over tokens; of streams the mean."""
    distances = angular_distance(x, y)  # (rows, tokens) or (rows, tokens, streams)
    return float(distances.flatten(2).mean(-1).sum()) if distances.ndim == 3 else float(distances.sum())
