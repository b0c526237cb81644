"""The needle test: needles of several kinds, lengths and depths, answered by the engine.

Answers are scored as RULER scores them, by the values that the output contains, and by the likelihood of the right answer.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Annotated

import numpy as np
from pydantic import Field

from yoco_u.config import Config, Count, EachOnce, Seed, at_most
from yoco_u.data import DocumentEncoder
from yoco_u.errors import UserError
from yoco_u.evaluation.finite import scored_tokens
from yoco_u.evaluation.needles import KINDS, Kind, Needle, NeedleMaker, Values
from yoco_u.inference import LLM, SamplingParams
from yoco_u.inference.logprobs import Logprob
from yoco_u.inference.outputs import check_outputs


class NeedleSettings(Config):
    """Which needles a model is asked for.

    Attributes:
        kinds: kinds of needles, see `NeedleMaker`.
        lengths: lengths in tokens, each of a prompt and the room for its output together.
        depths: number of depths, at even distances from the beginning of the haystack to its end; a single one is the middle.
        samples: number of needles of each kind, length and depth. At every depth they are the same, but for where they lie.
        seed: seed of the needles; another seed gives other needles.
        digits: number of digits of the hidden numbers.
        values: whether numbers or words are hidden. Variables always have numbers.
    """

    kinds: Annotated[tuple[Kind, ...], EachOnce] = Field(default=KINDS, min_length=1)
    lengths: Annotated[tuple[Count, ...], EachOnce] = Field(default=(1024, 4096), min_length=1)
    depths: Annotated[Count, at_most(1000, "a heat map shows no more")] = 5
    samples: Annotated[Count, at_most(10_000, "with which a recall is known to 1%")] = 10
    seed: Seed = 0
    digits: int = Field(default=7, ge=2, le=18)
    values: Values = "numbers"

    def without_effect(self) -> Iterator[tuple[str, str]]:
        if set(self.kinds) == {"variable_tracking"}:
            yield "values", "is for kinds with keys, and kinds is variable_tracking alone"
        elif self.values == "words" and "variable_tracking" not in self.kinds:
            yield "digits", "is for numbers, and values is words"

    @property
    def depth_shares(self) -> tuple[float, ...]:
        """The depths as shares of the haystack, from 0 to 1."""
        return (0.5,) if self.depths == 1 else tuple(i / (self.depths - 1) for i in range(self.depths))

    @property
    def seeds(self) -> range:
        """The seeds of the needles of each kind, length and depth."""
        return range(self.seed * self.samples, (self.seed + 1) * self.samples)

    @property
    def count(self) -> int:
        """Number of needles in all."""
        return len(self.kinds) * len(self.lengths) * self.depths * self.samples


class NeedleScore(Config):
    """The mean scores of all samples of one kind, length and depth.

    Attributes:
        kind: kind of the needles.
        length: tokens of prompt and output together.
        depth: place of the fact, as a share of the haystack.
        samples: number of needles.
        recall: share of the expected values that the greedy output contains (RULER's string match).
        token_accuracy: share of the right answer's tokens that are the model's first choice, each behind the right ones.
        loss: nats per token of the right answer.
    """

    kind: Kind
    length: int
    depth: float
    samples: int
    recall: float
    token_accuracy: float
    loss: float


def needle_grid(
    llm: LLM,
    settings: NeedleSettings,
    haystack: str | None,
    num_loops: int | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> list[NeedleScore]:
    """Ask a model for every needle.

    Args:
        llm: the model, with a tokenizer.
        settings: which needles to ask for.
        haystack: the text to hide needles in; None if all kinds are hidden in noise.
        num_loops: loop count T; the model's own by default.
        advance: called with the number of needles that were answered since the last call.

    Returns:
        A score for each kind, length and depth, in this order.

    Raises:
        UserError: before the model runs, if a length is too short for a kind or too long for the engine; later, if a loss is
            not finite.
    """
    assert llm.engine.tokenizer is not None
    encoder, longest = DocumentEncoder(llm.engine.tokenizer), max(settings.lengths)
    if longest > llm.engine.max_model_len:
        raise UserError(f"a length of {longest} tokens is more than the {llm.engine.max_model_len} that the engine holds")
    check_needles(settings, encoder, haystack)
    maker = _maker(settings, encoder, haystack)
    scores = []
    for kind in settings.kinds:
        for length in settings.lengths:
            answered: list[tuple[float, float, float]] = []
            needles = _needles(maker, kind, length, settings)
            while batch := list(islice(needles, llm.engine.settings.max_num_seqs)):
                answered += _ask(llm, batch, num_loops)
                advance(len(batch))
            means = np.array(answered).reshape(settings.depths, settings.samples, 3).mean(axis=1)
            for depth, (found, accuracy, loss) in zip(settings.depth_shares, means.tolist(), strict=True):
                scores.append(
                    NeedleScore(
                        kind=kind,
                        length=length,
                        depth=depth,
                        samples=settings.samples,
                        recall=found,
                        token_accuracy=accuracy,
                        loss=loss,
                    )
                )
    return scores


def check_needles(settings: NeedleSettings, encoder: DocumentEncoder, haystack: str | None) -> None:
    """Refuse settings for which needles cannot be made.

    Raises:
        UserError: if a length is too short for a needle, or a kind needs a haystack and there is none that will do.
    """
    maker = _maker(settings, encoder, haystack)
    shortest, longest = min(settings.lengths), max(settings.lengths)
    asked = [(shortest, seed) for seed in settings.seeds]
    if longest > shortest:
        asked.append((longest, settings.seeds[0]))  # any will do: all fit, and the haystack has enough of everything or not
    for kind in settings.kinds:
        for length, seed in asked:
            maker.check(kind, length, seed)


def recall(answers: Sequence[str], output: str) -> float:
    """Share of the answers that an output contains, in upper or lower case: RULER's `string_match_all`."""
    return sum(answer.lower() in output.lower() for answer in answers) / len(answers)


def _maker(settings: NeedleSettings, encoder: DocumentEncoder, haystack: str | None) -> NeedleMaker:
    return NeedleMaker(encoder, haystack, settings.digits, settings.values)


def _needles(maker: NeedleMaker, kind: Kind, length: int, settings: NeedleSettings) -> Iterator[Needle]:
    for depth in settings.depth_shares:
        for seed in settings.seeds:
            yield maker.make(kind, length, depth, seed)


def _ask(llm: LLM, needles: Sequence[Needle], num_loops: int | None) -> list[tuple[float, float, float]]:
    """Recall, token accuracy and loss of each needle.

    The right answers are scored at once after the outputs, because the caches still hold the prompts then.
    """
    prompts = [needle.prompt_ids for needle in needles]
    outputs = llm.generate(
        prompts, [SamplingParams(temperature=0, max_tokens=needle.max_tokens, num_loops=num_loops) for needle in needles]
    )
    answered = llm.generate(
        [needle.prompt_ids + needle.answer_ids for needle in needles],
        [
            SamplingParams(max_tokens=0, prompt_logprobs=0, prompt_logprobs_start=len(ids), num_loops=num_loops)
            for ids in prompts
        ],
    )
    answers = scored_tokens(answered, llm.engine.runner.model)
    check_outputs(outputs)
    return [
        (recall(needle.answers, output.outputs[0].text), *_likelihood(scored))
        for needle, output, scored in zip(needles, outputs, answers, strict=True)
    ]


def _likelihood(tokens: list[Logprob]) -> tuple[float, float]:
    """Token accuracy and loss."""
    return float(np.mean([token.rank == 1 for token in tokens])), -float(np.mean([token.logprob for token in tokens]))
