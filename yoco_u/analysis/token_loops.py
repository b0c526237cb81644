"""Where tokens leave the loop: how many loops each one runs, by kind of token, by loss and by its place in the document."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from yoco_u.analysis.classes import Group, TokenClasses, by_class, by_loss
from yoco_u.analysis.exits import documents, scoring_engine
from yoco_u.data import Batch
from yoco_u.evaluation.finite import scored_tokens
from yoco_u.inference import SamplingParams
from yoco_u.inference.exits import Exits, Score
from yoco_u.model import YocoUForCausalLM

_SHOWN = 400  # tokens whose loops are shown one by one


@dataclass(frozen=True)
class LoopShares:
    """How many loops the tokens of a group run.

    Attributes:
        name: name of the group.
        tokens: number of tokens in it.
        shares: of the tokens that run 1, 2, .. T loops; they sum to 1.
        mean: loops that a token runs on average.
        loss: nats per token.
    """

    name: str
    tokens: int
    shares: list[float]
    mean: float
    loss: float


@dataclass(frozen=True)
class ExitLoops:
    """How many loops all tokens, and groups of them, run.

    Attributes:
        score: by which tokens leave the loop.
        threshold: below which they leave.
        loops: T, the most loops.
        all: all tokens.
        classes: groups by the class of the token to be predicted; empty if no classes were given.
        quarters: groups by the loss of the prediction, the quarter with the lowest first.
        places: groups by the place in the document, or in the part of it that the row holds: the first token, the next two, the
            next four and so on.
        first: the first tokens of the text, and how many loops each of them ran.
    """

    score: Score
    threshold: float
    loops: int
    all: LoopShares
    classes: list[LoopShares]
    quarters: list[LoopShares]
    places: list[LoopShares]
    first: list[tuple[int, int]]


def exit_loops(
    model: YocoUForCausalLM, batches: Iterable[Batch], exits: Exits, classes: TokenClasses | None = None
) -> ExitLoops:
    """Let the engine score the text, each of whose tokens leaves the loop by itself, and look how many loops they run.

    Args:
        model: in float32 on a CPU.
        exits: how tokens leave the loop, with the threshold.
        classes: classes of tokens by which to group.

    Raises:
        UserError: if tokens cannot leave the model's loop by these exits, or the loss is not finite.
    """
    texts = [text for batch in batches for text in documents(batch)]
    engine = scoring_engine(model, texts, exits)
    params = SamplingParams(max_tokens=0, prompt_logprobs=0, num_loops="auto")
    requests = [engine.add(text, params) for text in texts]
    loops: dict[str, list[int]] = {request.id: [] for request in requests}
    while engine.unfinished:
        engine.step()
        for own, ran in engine.runner.last_loops.items():
            loops[own.id] += ran
    scored = [one.logprob for own in scored_tokens(requests, model) for one in own]
    every, losses = torch.tensor([ran for own in loops.values() for ran in own]), -torch.tensor(scored, dtype=torch.float64)

    def shares(name: str, chosen: Tensor) -> LoopShares:
        own = every[chosen]
        counts = torch.bincount(own, minlength=exits.num_loops + 1)[1:] / len(own)
        return LoopShares(name, len(own), counts.tolist(), float(own.double().mean()), float(losses[chosen].mean()))

    targets = torch.tensor([token for text in texts for token in text[1:]])
    places = torch.tensor([place for text in texts for place in range(len(text) - 1)])
    tokens = (token for text in texts for token in text[:-1])
    return ExitLoops(
        score=exits.score,
        threshold=exits.threshold,
        loops=exits.num_loops,
        all=shares("all", torch.ones(len(every), dtype=torch.bool)),
        classes=[] if classes is None else [shares(*group) for group in by_class(targets, classes)],
        quarters=[shares(*group) for group in by_loss(losses)],
        places=[shares(*group) for group in _by_place(places)],
        first=list(zip(tokens, every[:_SHOWN].tolist(), strict=False)),
    )


def _by_place(places: Tensor) -> list[Group]:
    """Groups of tokens by their place in the document, counted from 0: 1, 2-3, 4-7 and so on, as people count."""
    found, first = list[Group](), 1
    while first <= len(places) and bool((chosen := (places + 1 >= first) & (places + 1 < 2 * first)).any()):
        found.append((f"{first}-{2 * first - 1}" if first > 1 else "1", chosen))
        first *= 2
    return found
