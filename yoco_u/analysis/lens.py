"""Per-loop logit lens: what the model would predict if it stopped after each loop.

Two ways to read a loop's state: `direct`, final norm and LM head on the state itself (nostalgebraist, 2020), and `rest`, all
of the network behind the looped stage run from that state, which is the model at this loop count.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from yoco_u.analysis.trace import (
    at_loops,
    last_states,
    log_probabilities,
    one_looped_stage,
    pieces,
    read_out,
    watch_loops,
)
from yoco_u.data import Batch
from yoco_u.model import YocoUForCausalLM

_CONTEXT = 12  # tokens shown before a sample


@dataclass(frozen=True)
class Reading:
    """A loop's prediction against the final one; means over tokens.

    Attributes:
        kl: nats, of the final prediction from this one, KL(final || this).
        agreement: share of tokens whose likeliest next token is the final prediction's.
        loss: nats per token.
    """

    kl: float
    agreement: float
    loss: float


@dataclass(frozen=True)
class LoopReading:
    """What one loop, from 1, predicts."""

    loop: int
    direct: Reading
    rest: Reading


@dataclass(frozen=True)
class Guess:
    """The likeliest next token, and its probability."""

    token: int
    probability: float


@dataclass(frozen=True)
class Sample:
    """One position: tokens up to it, the token that follows, and what each loop in turn expects to follow."""

    context: list[int]
    target: int
    direct: list[Guess]
    rest: list[Guess]


@dataclass(frozen=True)
class LogitLens:
    """
    Attributes:
        loops: one reading a loop; `rest` of the last one is the final prediction itself.
        samples: positions of the first batch whose prediction changes between the first loop and the last, evenly spaced.
    """

    loops: list[LoopReading]
    samples: list[Sample]


@dataclass
class _Sums:
    """Of one way and loop: KL, agreement and loss; and the guesses of a batch."""

    kl: float = 0.0
    agreement: float = 0.0
    loss: float = 0.0
    tokens: list[Tensor] = field(default_factory=list)
    probabilities: list[Tensor] = field(default_factory=list)

    def add(self, log_p: Tensor, final: Tensor, targets: Tensor) -> None:
        """Log-probabilities of this reading and of the final one, (tokens, vocab)."""
        self.kl += float((final.exp() * (final - log_p)).sum(dtype=torch.float64))
        self.loss -= float(log_p.gather(-1, targets[:, None]).sum(dtype=torch.float64))
        best = log_p.max(dim=-1)
        self.agreement += float((best.indices == final.argmax(dim=-1)).sum())
        self.tokens.append(best.indices)
        self.probabilities.append(best.values.exp())

    def mean(self, tokens: int) -> Reading:
        return Reading(self.kl / tokens, self.agreement / tokens, self.loss / tokens)

    def take_guesses(self) -> tuple[Tensor, Tensor]:
        """Tokens and probabilities of the batch, (tokens,) each, and forget them."""
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
    architecture = at_loops(model, num_loops)
    stage, last = one_looped_stage(architecture), architecture.num_loops
    direct, rest = ([_Sums() for _ in range(last)] for _ in range(2))
    tokens, chosen = 0, []
    for batch in batches:
        targets = batch["shift_labels"].flatten().to(model.device)
        with watch_loops(model, stage) as loop_states:
            final_state = last_states(model, batch, last)
        ends = [last_states(model, batch, loops) for loops in range(1, last)] + [final_state]
        states = [read_out(model, state) for state in loop_states[1:]]
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
    """Guesses are tokens and probabilities, (rows * tokens,) each, by loop."""
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
