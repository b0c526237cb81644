"""Compares runs: the numbers of each, the loss gaps between runs that spent equally much, and a sentence on what came out."""

import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

from yoco_u.budget import kv_bytes, parameters
from yoco_u.errors import UserError
from yoco_u.formatting import duration, scientific, short_bytes, short_count
from yoco_u.training.run_folder import Run

_MOST_SENTENCES = 6  # of a headline, one for each gap: of four runs that spent equally much

KV_CONTEXT = 16_384
"""Context length, in tokens, at which the report compares the bytes that a sequence's keys and values take (bfloat16)."""

EQUAL_WITHIN = 0.01
"""Share by which the tokens or FLOPs of two trainings may differ and still count as equal, as steps are whole."""


@dataclass(frozen=True)
class RunNumbers:
    """The numbers of one run. Losses are those of the last evaluation, in nats per token; None before the first one.

    Attributes:
        architecture: the architecture in words.
        parameters: parameter count.
        steps, planned_steps: steps done, and steps of the config.
        tokens: training tokens so far.
        flops: model FLOPs of training so far, forward and backward.
        evaluated_steps, evaluated_tokens, evaluated_flops: the same at the last evaluation; 0 before the first one.
        flops_per_token: model FLOPs of training for each token, those of a teacher included, over all steps of the config.
        learning_rate: peak of the learning rate.
        tokens_per_second, mfu: medians over the steps; MFU is the share of the machine's measured matrix product rate.
        seconds: time of training so far.
        kv_bytes: bytes of the keys and values of a sequence of KV_CONTEXT tokens.
        validation: what tells the tokens that the losses are of from others; None if unknown, as in runs of earlier versions.
    """

    name: str
    architecture: str
    parameters: int
    steps: int
    planned_steps: int
    tokens: int
    flops: float
    evaluated_steps: int
    evaluated_tokens: int
    evaluated_flops: float
    flops_per_token: float
    loss: float | None
    perplexity: float | None
    bits_per_byte: float | None
    learning_rate: float
    tokens_per_second: float
    mfu: float
    seconds: float
    kv_bytes: int
    validation: str | None


@dataclass(frozen=True)
class Gap:
    """The loss gap between two runs, measured after equal tokens or equal FLOPs.

    Attributes:
        run, other: names of the runs; `run` is the one with more FLOPs per token.
        equal: what the two have in common: `steps`, `tokens`, `FLOPs`, or two of them.
        run_loss, other_loss: the losses.
        gap: loss of `run` minus loss of `other`; negative where `run` is better.
        flops_ratio, tokens_ratio: FLOPs and tokens of `run`, divided by those of `other`.
    """

    run: str
    other: str
    equal: str
    run_loss: float
    other_loss: float
    gap: float
    flops_ratio: float
    tokens_ratio: float


@dataclass(frozen=True)
class Comparison:
    """One run or more, compared.

    Attributes:
        gaps: the gaps of all pairs of runs that can be compared.
        headline: what came out, in sentences.
    """

    runs: list[RunNumbers]
    gaps: list[Gap]
    headline: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> list[tuple[str, list[str]]]:
        """Rows of the comparison table: a label, and one text for each run."""
        rows = (
            ("architecture", lambda r: r.architecture),
            ("parameters", lambda r: short_count(r.parameters)),
            ("steps", lambda r: f"{r.steps:,}" + (f" of {r.planned_steps:,}" if r.steps < r.planned_steps else "")),
            ("tokens", lambda r: short_count(r.tokens)),
            ("training FLOPs", lambda r: scientific(r.flops)),
            ("validation loss", lambda r: _optional(r.loss, ".4f")),
            ("perplexity", lambda r: _optional(r.perplexity, ".2f")),
            ("bits per byte", lambda r: _optional(r.bits_per_byte, ".4f")),
            ("peak learning rate", lambda r: f"{r.learning_rate:g}"),
            ("tokens/s", lambda r: f"{r.tokens_per_second:,.0f}"),
            ("MFU", lambda r: f"{r.mfu:.0%}"),
            ("training time", lambda r: duration(r.seconds)),
            (f"KV at {KV_CONTEXT // 1024}K tokens", lambda r: short_bytes(r.kv_bytes)),
        )
        return [(label, [text(run) for run in self.runs]) for label, text in rows]


def names_of(runs: list[Run]) -> list[str]:
    """What runs are called beside each other: by their configs, or by their folders if two would have the same name."""
    names = [run.config.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]


def compare(runs: list[Run]) -> Comparison:
    """Compare runs; one alone gives its numbers and no gaps.

    Raises:
        UserError: if a run has no training step yet.
    """
    found = [replace(run_numbers(run), name=name) for run, name in zip(runs, names_of(runs), strict=True)]
    gaps = find_gaps(found)
    return Comparison(found, gaps, headline(found, gaps))


def run_numbers(run: Run) -> RunNumbers:
    """The numbers of one run, from its config and its records.

    Raises:
        UserError: if the run has no training step yet.
    """
    a, training = run.config.architecture, run.config.training
    steps, evaluations = run.kind("train"), run.kind("evaluation")
    if not steps:
        raise UserError(f"{run.folder}: the run has no training step yet; run `yoco-u train` first")
    last, evaluation = run.records[-1], evaluations[-1] if evaluations else {}
    return RunNumbers(
        name=run.config.name,
        architecture=a.in_words,
        parameters=parameters(a).total,
        steps=last["step"],
        planned_steps=training.steps,
        tokens=last["tokens"],
        flops=last["flops"],
        evaluated_steps=evaluation.get("step", 0),
        evaluated_tokens=evaluation.get("tokens", 0),
        evaluated_flops=evaluation.get("flops", 0),
        flops_per_token=run.config.training_flops() / run.config.tokens,
        loss=evaluation.get("loss"),
        perplexity=evaluation.get("perplexity"),
        bits_per_byte=evaluation.get("bits_per_byte"),
        learning_rate=run.config.optimizer.learning_rate,
        tokens_per_second=statistics.median(step["tokens_per_second"] for step in steps),
        mfu=statistics.median(step["mfu"] for step in steps),
        seconds=steps[-1]["seconds"],
        kv_bytes=kv_bytes(a, KV_CONTEXT),
        validation=run.validation,
    )


def equal_cost(value: float, other: float) -> bool:
    """Whether two numbers of tokens, or two of FLOPs, differ by at most `EQUAL_WITHIN`."""
    return abs(value / other - 1) <= EQUAL_WITHIN


def find_gaps(runs: list[RunNumbers]) -> list[Gap]:
    """The gaps of all pairs of runs whose losses were measured on the same text, after equal tokens or equal FLOPs."""
    gaps = []
    for pair in combinations(runs, 2):
        other, run = sorted(pair, key=lambda r: r.flops_per_token)
        if run.loss is None or other.loss is None or _texts([run, other]) > 1:
            continue
        equal = []
        if equal_cost(run.evaluated_tokens, other.evaluated_tokens):
            equal.append("steps" if run.evaluated_steps == other.evaluated_steps else "tokens")
        if equal_cost(run.evaluated_flops, other.evaluated_flops):
            equal.append("FLOPs")
        if equal:
            gap = Gap(
                run=run.name,
                other=other.name,
                equal=" and ".join(equal),
                run_loss=run.loss,
                other_loss=other.loss,
                gap=run.loss - other.loss,
                flops_ratio=run.evaluated_flops / other.evaluated_flops,
                tokens_ratio=run.evaluated_tokens / other.evaluated_tokens,
            )
            gaps.append(gap)
    return gaps


def _texts(runs: Iterable[RunNumbers]) -> int:
    """How many texts runs were evaluated on, as far as it is known."""
    return len({run.validation for run in runs} - {None})


def headline(runs: list[RunNumbers], gaps: list[Gap]) -> str:
    """What came out, in sentences: a sentence for each gap, or the lowest loss where there is none, or where there are many."""
    unfinished = [run.name for run in runs if run.steps < run.planned_steps]
    before = f"Not finished yet: {', '.join(unfinished)}. " if unfinished else ""
    scored = [run for run in runs if run.loss is not None]
    if not scored:
        return before + "No run has been evaluated yet."
    if _texts(scored) > 1:
        before += (
            "The runs were evaluated on different tokens (another tokenizer, validation split or training.evaluation_tokens); "
            "only losses on the same ones are compared. "
        )
    if 0 < len(gaps) <= _MOST_SENTENCES:
        return before + " ".join(_sentence(gap) for gap in gaps)
    pairs = f"{f'{len(gaps)} pairs of' if gaps else 'No two'} runs spent equal tokens or equal FLOPs."
    if _texts(scored) > 1:
        return f"{before}{pairs if gaps else ''}".rstrip()
    best = min(scored, key=lambda run: run.loss or 0)
    loss = f"{best.loss:.4f} nats per token on the validation split after {short_count(best.evaluated_tokens)} tokens"
    if len(runs) == 1:
        return f"{before}{best.name} reaches {loss}."
    return f"{before}The lowest loss is that of {best.name}: {loss}. {pairs}"


def _sentence(gap: Gap) -> str:
    losses = f"{gap.run_loss:.4f} against {gap.other_loss:.4f} nats per token"
    if "FLOPs" in gap.equal:
        cost = "" if "and" in gap.equal else f", with {gap.tokens_ratio:.2f}x its tokens"
    else:
        cost = f", at {gap.flops_ratio:.2f}x its FLOPs"
    if round(gap.gap, 4) == 0:
        return f"At equal {gap.equal}, {gap.run} and {gap.other} have the same validation loss ({losses}){cost}."
    direction = "lower" if gap.gap < 0 else "higher"
    verdict = f"the validation loss of {gap.run} is {abs(gap.gap):.4f} {direction} than that of {gap.other}"
    return f"At equal {gap.equal}, {verdict} ({losses}){cost}."


def _optional(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
