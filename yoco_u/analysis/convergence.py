"""Loops to convergence, token by token: after how many loops the remaining ones change nothing."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from yoco_u.analysis.classes import TokenClasses, by_class, by_loss
from yoco_u.analysis.trace import last_states, log_probabilities, one_looped_stage, pieces, watch_loops
from yoco_u.data import Batch
from yoco_u.errors import UserError
from yoco_u.model import YocoUForCausalLM

TOLERANCE = 0.1


@dataclass(frozen=True)
class Shares:
    """How a group of tokens converges: for each loop, the share of tokens for which it is the first steady one.

    Each list has T entries and sums to 1.

    Attributes:
        name: name of the group.
        tokens: number of tokens in it.
        prediction: steady from loop t on means that the likeliest next token at loops t .. T is the same one.
        state: steady from loop t on means that no later loop moves the state of the looped stage by more than the tolerance,
            as a share of its length.
    """

    name: str
    tokens: int
    prediction: list[float]
    state: list[float]


@dataclass(frozen=True)
class Convergence:
    """How all tokens, and groups of them, converge.

    Attributes:
        loops: loop count T of the passes. A token that is steady only from T on may never become steady.
        tolerance: the tolerance for states.
        changes: for each loop, the length of its change to the stage's state divided by the length of the result; mean over
            tokens.
        all: all tokens.
        classes: groups by the class of the token to be predicted; empty if no classes were given.
        quarters: groups by loss at T, from the quarter of the tokens with the lowest loss to that with the highest.
    """

    loops: int
    tolerance: float
    changes: list[float]
    all: Shares
    classes: list[Shares]
    quarters: list[Shares]


@torch.no_grad()
def loops_to_convergence(
    model: YocoUForCausalLM,
    batches: Iterable[Batch],
    num_loops: int | None = None,
    tolerance: float = TOLERANCE,
    classes: TokenClasses | None = None,
) -> Convergence:
    """Find the first loop from which each token's prediction is steady, and the first from which its state is.

    The predictions are those of the whole network run with 1 .. T loops.

    Args:
        num_loops: T; the model's own loop count by default.
        tolerance: how much a loop may change a state that counts as steady, as a share of the state's length.
        classes: classes of tokens by which to group.

    Raises:
        UserError: if there is not exactly one looped stage, or the tolerance is not positive.
    """
    architecture = model.model.at_loops(num_loops)
    stage, last = one_looped_stage(architecture), architecture.num_loops
    if tolerance <= 0:
        raise UserError(f"tolerance is {tolerance:g}; expected more than 0, such as {TOLERANCE}")
    gathered: list[tuple[Tensor, ...]] = []
    changes = torch.zeros(last, dtype=torch.float64)
    for batch in batches:
        with watch_loops(model, stage) as states:
            end = last_states(model, batch, last)
        targets = batch["shift_labels"].flatten()
        predictions = [_predictions(model, last_states(model, batch, loops)) for loops in range(1, last)]
        best, losses = _predictions_and_losses(model, end, targets)
        moved = torch.stack([relative_change(*pair) for pair in pairwise(states)])  # (loops, tokens)
        changes += moved.sum(dim=1, dtype=torch.float64).cpu()
        steady = first_steady(torch.stack([a != b for a, b in pairwise([*predictions, best])]))
        gathered.append((steady.cpu(), first_steady(moved[1:] > tolerance).cpu(), losses.cpu(), targets))
    prediction, state, loss, target = (torch.cat(parts) for parts in zip(*gathered, strict=True))

    def shares(name: str, chosen: Tensor) -> Shares:
        count = int(chosen.sum())
        found = [(torch.bincount(steady[chosen], minlength=last + 1)[1:] / count).tolist() for steady in (prediction, state)]
        return Shares(name, count, *found)

    everything = shares("all", torch.ones(len(loss), dtype=torch.bool))
    kinds = [] if classes is None else [shares(*group) for group in by_class(target, classes)]
    quarters = [shares(*group) for group in by_loss(loss)]
    return Convergence(last, tolerance, (changes / len(loss)).tolist(), everything, kinds, quarters)


def first_steady(changed: Tensor) -> Tensor:
    """The first loop, counted from 1, after which nothing changes.

    Args:
        changed: (T - 1, tokens), whether something changed from loop t to loop t + 1.

    Returns:
        (tokens,), 1 .. T
    """
    after = torch.arange(2, len(changed) + 2, device=changed.device)[:, None]
    return (changed * after).amax(dim=0).clamp(min=1)


def relative_change(before: Tensor, after: Tensor) -> Tensor:
    """`|after - before| / |after|` of each token, (rows * tokens,); a token's streams count as one vector."""
    before, after = (x.flatten(2).flatten(0, 1) for x in (before, after))
    dtype = torch.promote_types(after.dtype, torch.float32)
    return (after.to(dtype) - before.to(dtype)).norm(dim=-1) / after.to(dtype).norm(dim=-1)


def _predictions(model: YocoUForCausalLM, states: Tensor) -> Tensor:
    return torch.cat([model.lm_head(states[piece]).argmax(dim=-1) for piece in pieces(model, len(states))])


def _predictions_and_losses(model: YocoUForCausalLM, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    found = []
    for piece in pieces(model, len(states)):
        log_p = log_probabilities(model, states[piece])
        found.append((log_p.argmax(dim=-1), -log_p.gather(-1, targets[piece, None].to(log_p.device))[:, 0]))
    best, losses = (torch.cat(parts) for parts in zip(*found, strict=True))
    return best, losses
