"""Calibration of exits: fits the heads that predict when a token may leave the loop, and finds thresholds for wanted means.

Half of a text is for the heads, the other half for thresholds and losses. Heads learn from passes in which every token runs all
loops. A threshold is first taken from the scores of such passes, and then corrected by what the engine measures with it, since
tokens that leave change what later ones see.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from yoco_u.analysis.trace import last_states, log_probabilities, one_looped_stage, pieces, watch_loops
from yoco_u.data import Batch
from yoco_u.data.batches import in_answers
from yoco_u.errors import UserError
from yoco_u.evaluation.finite import check_finite, scored_tokens
from yoco_u.inference import Engine, EngineSettings, SamplingParams
from yoco_u.inference.exits import ExitRule, Exits, Score, head_inputs, loop_problem
from yoco_u.inference.shared_prefixes import run_shared
from yoco_u.model import YocoUForCausalLM

Heads = tuple[tuple[float, ...], ...]

_RIDGE = 1e-3  # a token; the squares of what heads read are 1 on average
_LEAST_KL = 1e-6  # below it lies rounding
_SHARES = (0.25, 0.5, 0.75)  # of the loops after the first, which tokens run on average
_NEAR, _TRIES = 0.02, 3  # how near a measured mean should be to the wanted one, and how often a threshold is corrected
_SEATS = 16


@dataclass(frozen=True)
class ExitResult:
    """What the engine measures on the second half of the text.

    Attributes:
        score: by which tokens leave; None where all run the same number of loops.
        threshold: below which they leave; None likewise.
        mean_loops: how many loops a token runs on average.
        loss: nats per token; of a generated task, per token of its answers.
        change: the loss minus that of T loops for every token.
        accuracy: share of answers that greedy decoding would write; None where the text is no generated task.
        tokens_per_second: of decoding one sequence, see `scaling.py`; None where it was not measured.
        decoded_loops: how many loops a token ran there on average.
    """

    score: Score | None
    threshold: float | None
    mean_loops: float
    loss: float
    change: float
    accuracy: float | None = None
    tokens_per_second: float | None = None
    decoded_loops: float | None = None


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found.

    Attributes:
        exits: of the score with the lowest loss at the wanted mean.
        results: plain loop counts 1 .. T, then by score the wanted means and some others.
        texts: of the second half: the tokens of each document, the last of which is only a target.
    """

    exits: Exits
    results: list[ExitResult]
    texts: list[list[int]]

    @property
    def tokens(self) -> int:
        """Tokens of the second half."""
        return sum(len(text) - 1 for text in self.texts)


def calibrate(
    model: YocoUForCausalLM,
    batches: Sequence[Batch],
    mean_loops: float | None = None,
    num_loops: int | None = None,
    advance: Callable[[], None] = lambda: None,
    answers: tuple[int, int] | None = None,
) -> Calibration:
    """Calibrate the exits of a model.

    Args:
        model: in evaluation mode, in float32 on a CPU.
        batches: rows of the text, without padding, in which every token has a target.
        mean_loops: how many loops a token shall run on average; by default the middle of 1 and T.
        num_loops: T, the most loops; the model's own by default.
        advance: called `steps(T, mean_loops)` times at most, as work gets done.
        answers: of a generated task, the tokens before and behind an answer. Losses are then those of answers alone.

    Raises:
        UserError: if tokens cannot leave the model's loop, it runs more than 256 times, the mean is not between 1 and T, there
            are not two rows of text, a token has no target, there is no answer, or the loss is not finite.
    """
    architecture = model.model.at_loops(num_loops)
    most = architecture.num_loops
    if problem := loop_problem(architecture):
        raise UserError(f"{problem}; give another model, or another num_loops")
    mean_loops = middle(most) if mean_loops is None else mean_loops
    if not 1 < mean_loops < most:
        raise UserError(f"the mean is to be {mean_loops:g} loops, but tokens run 1 to {most}; give a mean between these")
    if any(bool((batch["shift_labels"] < 0).any()) for batch in batches):
        raise UserError("some tokens of the batches have no target; make them by yoco_u.analysis.text, which gives each one")
    first, second = halves(batches)
    heads = fit_heads(model, first, most)
    scores: tuple[Score, ...] = ("angular", "divergence", "gain")
    advance()
    texts = [text for batch in second for text in documents(batch)]
    loss = _Losses(model, texts, Exits(num_loops=most, score="angular", threshold=0), advance, answers)
    plain = [loss.measure(SamplingParams(max_tokens=0, prompt_logprobs=0, num_loops=loops)) for loops in range(1, most + 1)]
    full = plain[-1].loss
    results = [ExitResult(None, None, one.mean_loops, one.loss, one.loss - full, one.accuracy) for one in plain]
    found: dict[Score, ExitResult] = {}
    for score in scores:
        exits = Exits(num_loops=most, score=score, threshold=0, heads=heads.get(score, ()))
        measured = _scores(model, second, exits)
        loss = _Losses(model, texts, exits, advance, answers)
        for wanted in wanted_means(most, mean_loops):
            threshold, one = _threshold_of(wanted, measured, loss)
            results.append(ExitResult(score, threshold, one.mean_loops, one.loss, one.loss - full, one.accuracy))
            if wanted == mean_loops:
                found[score] = results[-1]
    best = min(found, key=lambda score: (found[score].mean_loops > mean_loops + _NEAR, found[score].loss))
    chosen = found[best].threshold
    assert chosen is not None
    exits = Exits(num_loops=most, score=best, threshold=chosen, heads=heads.get(best, ()))
    return Calibration(exits, results, texts)


def middle(most: int) -> float:
    """The mean of loops that is wanted unless another one is given."""
    return (1 + most) / 2


def wanted_means(most: int, mean_loops: float) -> list[float]:
    """The means for which thresholds are found: the one that is wanted, and some between 1 and T."""
    return sorted({mean_loops, *(1 + (most - 1) * share for share in _SHARES)})


def steps(most: int, mean_loops: float) -> int:
    """How often `calibrate` advances at most."""
    return 1 + most + 3 * _TRIES * len(wanted_means(most, mean_loops))


def halves(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """The first half of the rows, and the others.

    Raises:
        UserError: if there is one row alone.
    """
    rows = sum(len(batch["input_ids"]) for batch in batches)
    if rows < 2:
        raise UserError("the text fills one row of tokens; give more text, or shorter rows by --sequence-length")
    found: tuple[list[Batch], list[Batch]] = [], []
    begin = 0
    for batch in batches:
        end = begin + len(batch["input_ids"])
        cut = min(max(rows // 2 - begin, 0), end - begin)
        for half, which in zip(found, (slice(0, cut), slice(cut, None)), strict=True):
            if len(batch["input_ids"][which]):
                ids, targets, numbers = (batch[name][which] for name in ("input_ids", "shift_labels", "document_ids"))
                half.append(Batch(input_ids=ids, shift_labels=targets, document_ids=numbers))
        begin = end
    return found


def documents(batch: Batch) -> list[list[int]]:
    """The texts of a batch, each with the target of its last token behind it."""
    found = []
    for ids, targets, numbers in zip(batch["input_ids"], batch["shift_labels"], batch["document_ids"], strict=True):
        ends = torch.cat([(numbers.diff() != 0).nonzero().flatten() + 1, torch.tensor([len(ids)])]).tolist()
        for begin, end in zip([0, *ends], ends, strict=False):
            found.append([*ids[begin:end].tolist(), int(targets[end - 1])])
    return found


@torch.no_grad()
def fit_heads(model: YocoUForCausalLM, batches: Sequence[Batch], num_loops: int) -> dict[Score, Heads]:
    """Fit heads for each loop but the last, by ridge regression on the states after loop l.

    Those for `divergence` predict log KL(p_T || p_l), where p_l is what the model predicts if every token runs l loops, and
    those for `gain` the loss of p_l minus that of p_T. See `Exits.heads` for what heads are.
    """
    stage = one_looped_stage(model.model.at_loops(num_loops))
    width = model.config.hidden_size + 1
    squares = torch.zeros(num_loops - 1, width, width, dtype=torch.float64)
    products = torch.zeros(num_loops - 1, width, 2, dtype=torch.float64)
    tokens = 0
    for batch in batches:
        with watch_loops(model, stage) as states:
            final = last_states(model, batch, num_loops)
        tokens += len(final)
        for loop in range(num_loops - 1):
            earlier = last_states(model, batch, loop + 1)
            labels = batch["shift_labels"].flatten()
            compared = [_compared(model, final[it], earlier[it], labels[it]) for it in pieces(model, len(final))]
            x = torch.nn.functional.pad(head_inputs(states[loop + 1].flatten(0, 1)).double(), (0, 1), value=1.0)
            squares[loop] += x.T @ x
            products[loop] += x.T @ torch.cat(compared).double()
    penalty = torch.full((width,), _RIDGE * tokens, dtype=torch.float64)
    penalty[-1] = _RIDGE**2 * tokens  # hardly any on the constant
    heads = torch.linalg.solve(squares + penalty.diag(), products)
    check_finite(heads.numpy(), model)
    divergence, gain = (tuple(map(tuple, own.tolist())) for own in heads.float().unbind(-1))
    return {"divergence": divergence, "gain": gain}


def _compared(model: YocoUForCausalLM, final: Tensor, earlier: Tensor, labels: Tensor) -> Tensor:
    """Of each token in nats, (tokens, 2): log KL(final || earlier), and the loss of the earlier states minus the final one."""
    log_p, log_q = (log_probabilities(model, states) for states in (final, earlier))
    change = log_p - log_q
    kl = (log_p.exp() * change).sum(-1).clamp_min(_LEAST_KL)
    return torch.stack([kl.log(), change.gather(-1, labels[:, None])[:, 0]], dim=-1)


@torch.no_grad()
def _scores(model: YocoUForCausalLM, batches: Sequence[Batch], exits: Exits) -> Tensor:
    """The scores after each loop but the last where every token runs all loops, (loops - 1, tokens)."""
    rule, stage = ExitRule(exits, model.device), one_looped_stage(model.model.at_loops(exits.num_loops))
    found = []
    for batch in batches:
        with watch_loops(model, stage) as states:
            last_states(model, batch, exits.num_loops)
        flat = [state.flatten(0, 1) for state in states]
        found.append(torch.stack([rule.scores(loop, flat[loop], flat[loop + 1]) for loop in range(exits.num_loops - 1)]))
    return torch.cat(found, dim=1)


def _mean_at(scores: Tensor, threshold: float) -> float:
    """How many loops tokens of these scores run on average, if none changed another one."""
    stays = (scores >= threshold).int().cumprod(0)  # whether a token goes on after each loop
    return 1 + float(stays.sum(0).double().mean())


def _threshold_at(scores: Tensor, mean: float) -> float:
    """The least score that as a threshold gives at most this mean."""
    every = scores.flatten().sort().values
    place = bisect_left(range(len(every) - 1), True, key=lambda place: _mean_at(scores, float(every[place])) <= mean)
    return float(every[place])


def scoring_engine(model: YocoUForCausalLM, texts: Sequence[list[int]], exits: Exits) -> Engine:
    """An engine in float32 with room for texts that are scored."""
    settings = EngineSettings(
        dtype="float32", num_loops=exits.num_loops, prefix_caching=False, max_num_seqs=_SEATS,
        cache_tokens=_SEATS * (max(map(len, texts)) + 64), max_batched_tokens=512,
    )  # fmt: skip
    return Engine(model, None, settings, exits)


class _Measured(NamedTuple):
    mean_loops: float
    loss: float
    accuracy: float | None


class _Losses:
    """Losses of texts in the engine.

    Args:
        texts: tokens of each, the last of which is only a target.
        answers: the tokens before and behind an answer, where answers alone count.

    Raises:
        UserError: if there is no answer.
    """

    def __init__(
        self,
        model: YocoUForCausalLM,
        texts: list[list[int]],
        exits: Exits,
        advance: Callable[[], None],
        answers: tuple[int, int] | None,
    ) -> None:
        self._engine, self._texts, self._advance = scoring_engine(model, texts, exits), texts, advance
        self._answers = None if answers is None else [answer_spans(text, *answers) for text in texts]
        if self._answers is not None and not any(self._answers):
            raise UserError("the text has no answers; give more text, or longer rows by --sequence-length")

    def measure(self, params: SamplingParams) -> _Measured:
        """How many loops a token runs on average, the loss in nats per token, and the share of right answers."""
        runner = self._engine.runner
        loops, tokens = runner.loops_run, runner.tokens_run
        requests = run_shared(self._engine, self._texts, [params] * len(self._texts))
        scored = scored_tokens(requests, runner.model)
        accuracy = None
        if self._answers is not None:  # of each text, `scored` begins with its second token
            scored = [own[a - 1 : b - 1] for own, spans in zip(scored, self._answers, strict=True) for a, b in spans]
            accuracy = sum(all(one.rank == 1 for one in answer) for answer in scored) / len(scored)
        nats = [-one.logprob for own in scored for one in own]
        loss = sum(nats) / len(nats)
        self._advance()
        return _Measured((runner.loops_run - loops) / (runner.tokens_run - tokens), loss, accuracy)


def answer_spans(text: list[int], begin: int, end: int) -> list[tuple[int, int]]:
    """Where the answers of a generated task stand in its tokens: the first one of each, and the one behind its last.

    Args:
        begin, end: the tokens before and behind an answer.
    """
    inside = [False, *in_answers(torch.tensor([text]), begin, end)[0].tolist(), False]
    edges = [place for place, (before, after) in enumerate(pairwise(inside)) if before != after]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _threshold_of(wanted: float, scores: Tensor, losses: _Losses) -> tuple[float, _Measured]:
    """A threshold for a wanted mean, and what the engine measures with it.

    Where scores are equal no threshold may be near, and one of a lower mean is taken rather than one of a higher.
    """
    aim, found = wanted, []
    for _ in range(_TRIES):
        threshold = _threshold_at(scores, aim)
        params = SamplingParams(max_tokens=0, prompt_logprobs=0, num_loops="auto", exit_threshold=threshold)
        measured = losses.measure(params)
        found.append((threshold, measured))
        if abs(measured.mean_loops - wanted) <= _NEAR:
            break
        aim += wanted - measured.mean_loops
    return min(found, key=lambda one: (one[1].mean_loops > wanted + _NEAR, abs(one[1].mean_loops - wanted)))
