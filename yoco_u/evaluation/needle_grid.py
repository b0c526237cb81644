"""The needle test: needles over lengths and depths, answered by the engine, scored as RULER does and by likelihood."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt

from yoco_u.config import Config
from yoco_u.data import DocumentEncoder
from yoco_u.errors import UserError
from yoco_u.evaluation.needles import KINDS, Kind, Needle, Values, generate_needle
from yoco_u.inference import LLM, RequestOutput, SamplingParams
from yoco_u.inference.outputs import failed_output


class NeedleSettings(Config):
    """What is asked.

    Attributes:
        kinds: see `generate_needle`.
        lengths: tokens of prompt and output together.
        depths: how many, at even distances from the beginning of the haystack to its end; one is the middle.
        samples: needles of each kind, length and depth; the same ones (but for where they lie) at every depth.
        seed: another one gives other needles.
        digits: of the numbers that are hidden.
        values: whether numbers or words are hidden; variables have numbers.
    """

    kinds: tuple[Kind, ...] = Field(default=KINDS, min_length=1)
    lengths: tuple[PositiveInt, ...] = Field(default=(1024, 4096), min_length=1)
    depths: PositiveInt = 5
    samples: PositiveInt = 10
    seed: NonNegativeInt = 0
    digits: int = Field(default=7, ge=2, le=18)
    values: Values = "numbers"

    @property
    def depth_shares(self) -> tuple[float, ...]:
        return (0.5,) if self.depths == 1 else tuple(i / (self.depths - 1) for i in range(self.depths))

    @property
    def count(self) -> int:
        """Needles in all."""
        return len(self.kinds) * len(self.lengths) * self.depths * self.samples


class NeedleScore(Config):
    """Means over the samples of one kind, length and depth.

    Attributes:
        recall: share of the expected values that the greedy output contains (RULER's string match).
        token_accuracy: share of the right answer's tokens that are the likeliest, each after the right ones before it.
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
        haystack: the text for the kinds that are hidden in one.
        num_loops: T; the model's own by default.
        advance: told how many more needles are done.

    Returns:
        One cell a kind, length and depth, in this order.

    Raises:
        UserError: before the model runs, if a length is too short for a kind or too long for the engine.
    """
    assert llm.engine.tokenizer is not None
    encoder, longest = DocumentEncoder(llm.engine.tokenizer), max(settings.lengths)
    if longest > llm.engine.max_model_len:
        raise UserError(f"a length of {longest} tokens is more than the {llm.engine.max_model_len} that the engine holds")
    check_needles(settings, encoder, haystack)
    cells = []
    for kind in settings.kinds:
        for length in settings.lengths:
            scores: list[tuple[float, float, float]] = []
            needles = _needles(kind, encoder, length, settings, haystack)
            while batch := list(islice(needles, llm.engine.settings.max_num_seqs)):
                scores += _ask(llm, batch, num_loops)
                advance(len(batch))
            means = np.array(scores).reshape(settings.depths, settings.samples, 3).mean(axis=1)
            for depth, (found, accuracy, loss) in zip(settings.depth_shares, means.tolist(), strict=True):
                cells.append(
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
    return cells


def check_needles(settings: NeedleSettings, encoder: DocumentEncoder, haystack: str | None) -> None:
    """Refuse settings that no needles can be made of.

    Raises:
        UserError: if a length is too short for a kind, or a kind misses its haystack.
    """
    for kind in settings.kinds:
        generate_needle(kind, encoder, min(settings.lengths), 0, 0, haystack, settings.digits, settings.values)


def recall(answers: Sequence[str], output: str) -> float:
    """Share of the answers that an output contains, whatever their case: RULER's `string_match_all`."""
    return sum(answer.lower() in output.lower() for answer in answers) / len(answers)


def _needles(
    kind: Kind, encoder: DocumentEncoder, length: int, settings: NeedleSettings, haystack: str | None
) -> Iterator[Needle]:
    for depth in settings.depth_shares:
        for sample in range(settings.samples):
            seed = settings.seed * settings.samples + sample
            yield generate_needle(kind, encoder, length, depth, seed, haystack, settings.digits, settings.values)


def _ask(llm: LLM, needles: Sequence[Needle], num_loops: int | None) -> list[tuple[float, float, float]]:
    """Recall, share of likeliest tokens and nats per token of each needle.

    The answers are scored right after the outputs, when the caches still hold the prompts.
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
    return [
        (recall(needle.answers, _text(output)), *_likelihood(scored, len(needle.prompt_ids)))
        for needle, output, scored in zip(needles, outputs, answered, strict=True)
    ]


def _text(request: RequestOutput) -> str:
    [output] = request.outputs
    if output.error is not None:
        raise failed_output(output.error)
    return output.text


def _likelihood(request: RequestOutput, start: int) -> tuple[float, float]:
    assert request.prompt_logprobs is not None
    tokens = [one.chosen for one in request.prompt_logprobs[start:] if one is not None]
    return float(np.mean([token.rank == 1 for token in tokens])), -float(np.mean([token.logprob for token in tokens]))
