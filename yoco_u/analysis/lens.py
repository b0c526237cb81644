"""Per-loop logit lens: what the model would predict if it stopped after each loop.

The state that a loop leaves is read in two ways. `direct` applies the final norm and the LM head to the state itself
(nostalgebraist, 2020). `rest` runs the rest of the network, all stages after the looped one, from that state; this equals
running the model with that loop count.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from yoco_u.analysis.trace import last_states, log_probabilities, one_looped_stage, pieces, watch_loops
from yoco_u.data import Batch
from yoco_u.model import YocoUForCausalLM

_CONTEXT = 12  # tokens of context shown with a sample


@dataclass(frozen=True)
class Reading:
    """One reading's prediction compared with the final prediction, that of the model at its full loop count; means over tokens.

    Attributes:
        kl: KL(final || this), in nats.
        agreement: share of tokens for which this prediction and the final one have the same likeliest next token.
        loss: nats per token.
    """

    kl: float
    agreement: float
    loss: float


@dataclass(frozen=True)
class LoopReading:
    """The two readings of one loop; loops are counted from 1."""

    loop: int
    direct: Reading
    rest: Reading


@dataclass(frozen=True)
class Guess:
    """The likeliest next token and its probability."""

    token: int
    probability: float


@dataclass(frozen=True)
class Sample:
    """One position of the text.

    Attributes:
        context: the last tokens up to this position.
        target: the token that follows.
        direct, rest: for each loop, the guess of what follows.
    """

    context: list[int]
    target: int
    direct: list[Guess]
    rest: list[Guess]


@dataclass(frozen=True)
class LogitLens:
    """What each loop predicts.

    Attributes:
        loops: the readings of each loop; `rest` of the last loop is the final prediction itself.
        samples: evenly spaced ones of those positions in the first batch whose prediction (`rest`) differs between the first
            loop and the last.
    """

    loops: list[LoopReading]
    samples: list[Sample]


@dataclass
class _Sums:
    """Sums over tokens for one reading of one loop, and its guesses for the tokens of the present batch."""

    kl: float = 0.0
    agreement: float = 0.0
    loss: float = 0.0
    tokens: list[Tensor] = field(default_factory=list)
    probabilities: list[Tensor] = field(default_factory=list)

    def add(self, log_p: Tensor, final: Tensor, targets: Tensor) -> None:
        """Add some tokens.

        Args:
            log_p: log-probabilities of this reading, (tokens, vocab).
            final: those of the final prediction, (tokens, vocab).
            targets: the tokens that follow, (tokens,).
        """
        self.kl += float((final.exp() * (final - log_p)).sum(dtype=torch.float64))
        self.loss -= float(log_p.gather(-1, targets[:, None]).sum(dtype=torch.float64))
        best = log_p.max(dim=-1)
        self.agreement += float((best.indices == final.argmax(dim=-1)).sum())
        self.tokens.append(best.indices)
        self.probabilities.append(best.values.exp())

    def mean(self, tokens: int) -> Reading:
        return Reading(self.kl / tokens, self.agreement / tokens, self.loss / tokens)

    def take_guesses(self) -> tuple[Tensor, Tensor]:
        """Return the guesses of the batch as tokens and probabilities, (tokens,) each, and clear them for the next batch."""
        guesses = torch.cat(self.tokens), torch.cat(self.probabilities)
        self.tokens, self.probabilities = [], []
        return guesses


@torch.no_grad()
def logit_lens(model: YocoUForCausalLM, batches: Iterable[Batch], num_loops: int | None = None, samples: int = 12) -> LogitLens:
    """Read every loop of the one looped stage.

    Args:
        num_loops: the loop count whose prediction is the final one; the model's own by default.
        samples: how many positions to show.

    Raises:
        UserError: if there is not exactly one looped stage.
    """
    architecture = model.model.at_loops(num_loops)
    stage, last = one_looped_stage(architecture), architecture.num_loops
    direct, rest = ([_Sums() for _ in range(last)] for _ in range(2))
    tokens, chosen = 0, []
    for batch in batches:
        targets = batch["shift_labels"].flatten().to(model.device)
        with watch_loops(model, stage) as loop_states:
            final_state = last_states(model, batch, last)
        ends = [last_states(model, batch, loops) for loops in range(1, last)] + [final_state]
        states = [model.model.final_norm(state).flatten(0, 1) for state in loop_states[1:]]
        for piece in pieces(model, len(targets)):
            final = log_probabilities(model, final_state[piece])
            for sums, state in zip([*direct, *rest], [*states, *ends], strict=True):
                sums.add(log_probabilities(model, state[piece]), final, targets[piece])
        guesses = [[sums.take_guesses() for sums in way] for way in (direct, rest)]
        if tokens == 0:
            chosen = _samples(batch, guesses[0], guesses[1], samples)
        tokens += len(targets)
    readings = [
        LoopReading(loop, d.mean(tokens), r.mean(tokens)) for loop, (d, r) in enumerate(zip(direct, rest, strict=True), start=1)
    ]
    return LogitLens(readings, chosen)


def _samples(batch: Batch, direct: list[tuple[Tensor, Tensor]], rest: list[tuple[Tensor, Tensor]], count: int) -> list[Sample]:
    """Choose the samples of a batch.

    Args:
        direct, rest: for each loop, its guesses as tokens and probabilities, (rows * tokens,) each.
        count: the most samples to choose.
    """
    changed = (rest[0][0] != rest[-1][0]).nonzero().flatten()
    wanted = torch.linspace(0, max(0, len(changed) - 1), min(count, len(changed))).round().long()
    ids, targets = batch["input_ids"], batch["shift_labels"].flatten()
    found = []
    for position in changed.cpu()[wanted].tolist():
        row, column = divmod(position, ids.shape[1])
        context = ids[row, max(0, column + 1 - _CONTEXT) : column + 1].tolist()
        ways = [[Guess(int(token[position]), float(p[position])) for token, p in way] for way in (direct, rest)]
        found.append(Sample(context, int(targets[position]), *ways))
    return found
