"""Loss against the number of loops that the model runs with, fewer and more than it was trained with."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from yoco_u.analysis.trace import last_states, log_probabilities, pieces
from yoco_u.architecture import Architecture
from yoco_u.config import MOST_LOOPS
from yoco_u.data import Batch
from yoco_u.model import YocoUForCausalLM
from yoco_u.training.metrics import perplexity


@dataclass(frozen=True)
class LoopLoss:
    """Loss of the model when it runs with `loops` loops, in nats per token, and the perplexity, its exponential."""

    loops: int
    loss: float
    perplexity: float


def counts_around(architecture: Architecture) -> list[int]:
    """The loop counts to try for a model with loop count T: 1 .. 2T + 2, or up to the most that a model runs."""
    return list(range(1, min(2 * architecture.num_loops + 2, MOST_LOOPS) + 1))


def loss_against_loops(model: YocoUForCausalLM, batches: Iterable[Batch], counts: Sequence[int]) -> list[LoopLoss]:
    """Measure the mean loss over all targets at each loop count, as `yoco-u evaluate --num-loops` does."""
    totals, tokens = dict.fromkeys(counts, 0.0), 0
    for batch in batches:
        targets = batch["shift_labels"].flatten().to(model.device)
        for loops in totals:
            states = last_states(model, batch, loops)
            for piece in pieces(model, len(targets)):
                totals[loops] += float(_nats(model, states[piece], targets[piece]))
        tokens += len(targets)
    means = {loops: total / tokens for loops, total in totals.items()}
    return [LoopLoss(loops, loss, perplexity(loss)) for loops, loss in means.items()]


def _nats(model: YocoUForCausalLM, states: Tensor, targets: Tensor) -> Tensor:
    """The summed loss of the targets, (tokens,), given hidden states after the final norm, (tokens, hidden)."""
    return -log_probabilities(model, states).gather(-1, targets[:, None]).sum(dtype=torch.float64)
