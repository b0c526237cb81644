"""From logits to tokens: penalties, grammars, temperature, top-k, top-p and min-p, over all rows of a step at once.

The token of a row depends on that row alone, whatever else is in the batch: every tensor operation works row by row, and each
row has a counter-based random generator of its own. One random number a token picks the token by the cumulative probabilities
in the order of the vocabulary.
"""

import math
import secrets
from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from yoco_u.inference.constraints import Matcher
from yoco_u.inference.sampling_params import SamplingParams

_GREEDY = 1e-5  # lower temperatures count as 0: dividing logits by them would overflow float32
_CANDIDATES = 1024  # top-p first looks at so many likeliest tokens, and further only where they do not suffice
_FORBIDDEN = -math.inf


@dataclass(frozen=True)
class Logprob:
    """The natural logarithm of a token's probability under the raw logits; rank 1 is the likeliest, equals share a rank."""

    token_id: int
    logprob: float
    rank: int


@dataclass(frozen=True)
class Sampled:
    """The token of one row; `logprob` and the likeliest tokens `top` (falling, equals by id) if its request asks for them."""

    token: int
    logprob: Logprob | None = None
    top: tuple[Logprob, ...] = ()


class SamplerState:
    """What the sampler knows of one output.

    Args:
        params: the request's parameters.
        prompt_ids: the prompt's tokens, on which the repetition penalty falls too.
        index: which of the request's `n` outputs this is; outputs of one seed have different random numbers.
        eos_token_ids: the model's end tokens.
        matcher: at the beginning of the output's grammar, None without one.

    Attributes:
        stop_token_ids: the tokens that end this output.
        penalized: whether a penalty is set.
        failure: why the last `sample` gave None, in one line.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        index: int,
        eos_token_ids: Collection[int],
        matcher: Matcher | None = None,
    ) -> None:
        self.params = params
        self.matcher = matcher
        self.greedy = params.temperature < _GREEDY
        self.stop_token_ids = frozenset([*params.stop_token_ids, *([] if params.ignore_eos else eos_token_ids)])
        self.failure: str | None = None
        self.num_tokens = 0
        repeated = params.repetition_penalty != 1.0
        self.penalized = repeated or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        self._places = {token: place for place, token in enumerate(dict.fromkeys(prompt_ids))} if repeated else {}
        self._tokens = array("q", self._places)
        self._counts = array("q", bytes(self._tokens.itemsize * len(self._tokens)))
        seed = secrets.randbits(64) if params.seed is None else params.seed
        self._random = np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64)))

    def append(self, token: int) -> None:
        """Take in the output's next token. `sample` calls this for the tokens that it chooses."""
        self.num_tokens += 1
        if self.penalized:
            place = self._places.setdefault(token, len(self._tokens))
            if place == len(self._tokens):
                self._tokens.append(token)
                self._counts.append(0)
            self._counts[place] += 1
        if self.matcher is not None:
            self.matcher.append(token)

    def uniform(self) -> float:
        """The next random number in [0, 1)."""
        return float(self._random.random())

    def counts(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The tokens that penalties fall on, and how often the output has each (0: only the prompt has it); (tokens,) int64.

        They are views, to be dropped before the next `append`.
        """
        return np.frombuffer(self._tokens, np.int64), np.frombuffer(self._counts, np.int64)

    @property
    def unfinished(self) -> bool:
        """Whether the output is shorter than `min_tokens`, so that no token may end it."""
        return self.num_tokens < self.params.min_tokens


@torch.inference_mode()
def sample(logits: Tensor, states: Sequence[SamplerState]) -> list[Sampled | None]:
    """Choose the next token of every row and append it to the row's state.

    Args:
        logits: (rows, vocab), any float type; left as they are.
        states: one a row.

    Returns:
        One a row. None where the row has no token to choose, with the reason in the state's `failure`: the logits hold NaN
        or plus infinity, or every token is forbidden.
    """
    logits = logits.float()
    scores = allowed(penalized(logits, states), states)
    best, tokens = scores.max(dim=-1)  # NaN if there is one; the first of equals
    drawn = [row for row, state in enumerate(states) if not state.greedy]
    if drawn:
        rows = torch.tensor(drawn, device=logits.device)
        chosen = [states[row] for row in drawn]
        weights = filtered(scores if len(drawn) == len(states) else scores[rows], [state.params for state in chosen])
        tokens[rows] = _draw(weights, [state.uniform() for state in chosen])
    # A forbidden token's logit does not reach `scores`, but a row with NaN anywhere is a broken one.
    sound = (logits.amax(dim=-1) if scores is not logits else best) < math.inf  # false for NaN
    possible = best > _FORBIDDEN

    results: list[Sampled | None] = []
    for state, token, is_sound, is_possible in zip(states, tokens.tolist(), sound.tolist(), possible.tolist(), strict=True):
        if not is_sound:
            state.failure = "the model's logits hold NaN or infinity"
        elif not is_possible:
            grammar = state.matcher.error if state.matcher is not None else ""
            state.failure = f"no token may come next{': ' + grammar if grammar else ''}"
        else:
            state.append(token)
        results.append(Sampled(token) if is_sound and is_possible else None)
    _report(logits, states, results)
    return results


@torch.inference_mode()
def score(logits: Tensor, targets: Tensor, top: int) -> list[tuple[Logprob, tuple[Logprob, ...]]]:
    """Log probabilities of given tokens, as for a prompt.

    Args:
        logits: (rows, vocab), any float type.
        targets: (rows,) int64, the token whose log probability is asked of each row.
        top: report so many likeliest tokens beside it.
    """
    logits = logits.float()
    ids = torch.cat([targets[:, None], _largest(logits, top)], dim=-1)  # (rows, 1 + top)
    values = logits.gather(-1, ids)
    logprobs = logits.log_softmax(dim=-1).gather(-1, ids).tolist()
    target_ranks = (1 + (logits > values[:, :1]).sum(-1)).tolist()
    top_ranks = (1 + (values[:, None, 1:] > values[:, 1:, None]).sum(-1)).tolist()  # (rows, top)
    results = []
    for row, row_ids in enumerate(ids.tolist()):
        ranks = [target_ranks[row], *top_ranks[row]]
        target, *likeliest = map(Logprob, row_ids, logprobs[row], ranks)
        results.append((target, tuple(likeliest)))
    return results


def penalized(logits: Tensor, states: Sequence[SamplerState]) -> Tensor:
    """Apply repetition, presence and frequency penalties to (rows, vocab) float32; the same tensor if there are none."""
    marked = [(row, state.params, *state.counts()) for row, state in enumerate(states) if state.penalized]
    if not marked:
        return logits
    ids = np.concatenate([ids for _, _, ids, _ in marked])
    counts = np.concatenate([counts for _, _, _, counts in marked])
    settings = [(row, p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for row, p, _, _ in marked]
    rows, repetition, presence, frequency = np.repeat(settings, [len(ids) for _, _, ids, _ in marked], axis=0).T
    where = (torch.from_numpy(rows.astype(np.int64)).to(logits.device), torch.from_numpy(ids).to(logits.device))
    factor = torch.from_numpy(repetition).to(logits)
    subtracted = torch.from_numpy(frequency * counts + presence * (counts > 0)).to(logits)
    values = logits[where]
    values = torch.where(values < 0, values * factor, values / factor) - subtracted
    return logits.index_put(where, values)


def allowed(scores: Tensor, states: Sequence[SamplerState]) -> Tensor:
    """Forbid what grammars and `min_tokens` forbid in (rows, vocab); the same tensor if that is nothing."""
    constrained = [row for row, state in enumerate(states) if state.matcher is not None]
    unfinished = [row for row, state in enumerate(states) if state.unfinished and state.stop_token_ids]
    if not constrained and not unfinished:
        return scores
    scores = scores.clone()
    for row in constrained:
        matcher = states[row].matcher
        assert matcher is not None
        scores[row].masked_fill_(~matcher.allowed().to(scores.device), _FORBIDDEN)
    for row in unfinished:
        scores[row, [token for token in states[row].stop_token_ids if token < scores.shape[-1]]] = _FORBIDDEN
    return scores


def filtered(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Apply temperature, top-k, top-p and min-p to the scores of rows that are sampled.

    Each filter is a least score: tokens of equal scores stay or go together, so a filter may leave more than it says when
    tokens tie at its border.

    Args:
        scores: (rows, vocab) float32.
        params: one a row, with temperatures above 0.

    Returns:
        (rows, vocab) float32, in proportion to the probabilities; 0 for tokens that were left out.
    """
    vocab = scores.shape[-1]
    scores = scores / scores.new_tensor([[p.temperature] for p in params])
    probabilities = scores.softmax(dim=-1)
    least = torch.full_like(scores[:, :1], _FORBIDDEN)  # (rows, 1)
    limits = [p.top_k if p.top_k < vocab else 0 for p in params]
    if any(limits):
        largest = scores.topk(max(limits)).values  # (rows, max(limits)), falling
        limit = torch.tensor(limits, device=scores.device)[:, None]
        least = torch.where(limit > 0, largest.gather(-1, (limit - 1).clamp(min=0)), least)
    if any(p.top_p < 1 for p in params):
        share = scores.new_tensor([[p.top_p if p.top_p < 1 else 0] for p in params], dtype=torch.float64)
        left = probabilities.masked_fill(scores < least, 0)
        widths = [limit + 1 if limit else _CANDIDATES for limit, p in zip(limits, params, strict=True) if p.top_p < 1]
        border = _nucleus(scores, left, share * _running(left)[:, -1:], min(max(widths), vocab))
        least = torch.where(share > 0, torch.maximum(least, border), least)
    if any(p.min_p > 0 for p in params):
        gap = scores.new_tensor([[math.log(p.min_p) if p.min_p > 0 else _FORBIDDEN] for p in params])
        least = torch.maximum(least, scores.amax(dim=-1, keepdim=True) + gap)
    return probabilities.masked_fill(scores < least, 0)


def _nucleus(scores: Tensor, probabilities: Tensor, mass: Tensor, width: int) -> Tensor:
    """The least score, (rows, 1), of the likeliest tokens that together reach the mass (rows, 1).

    Looks at the `width` likeliest, and further in the rows where those are too few.
    """
    ordered, ids = scores.topk(width) if width < scores.shape[-1] else scores.sort(descending=True)
    likeliest = probabilities.gather(-1, ids)
    before = _running(likeliest) - likeliest
    count = (before < mass).sum(dim=-1, keepdim=True)
    border = ordered.gather(-1, (count - 1).clamp(min=0))
    if width < scores.shape[-1]:
        short = (count == width).flatten().nonzero().flatten()
        if len(short):
            border[short] = _nucleus(scores[short], probabilities[short], mass[short], min(8 * width, scores.shape[-1]))
    return border


def _draw(weights: Tensor, uniforms: Sequence[float]) -> Tensor:
    """One token a row, (rows,): where the running sum of the weights (rows, vocab) passes the uniform's share of the total."""
    running = _running(weights)
    total = running[:, -1:]
    target = total * total.new_tensor(uniforms)[:, None]
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))  # the product may round up to the total
    return torch.searchsorted(running, target, right=True).flatten().clamp(max=weights.shape[-1] - 1)


def _running(values: Tensor) -> Tensor:
    return values.cumsum(dim=-1, dtype=torch.float64)


def _report(logits: Tensor, states: Sequence[SamplerState], results: list[Sampled | None]) -> None:
    """Put log probabilities into the results of rows that ask for them."""
    asked = [
        (row, result.token, state.params.logprobs)
        for row, (state, result) in enumerate(zip(states, results, strict=True))
        if result is not None and state.params.logprobs is not None
    ]
    if not asked:
        return
    rows, tokens, tops = zip(*asked, strict=True)
    scored = score(logits[list(rows)], torch.tensor(tokens, device=logits.device), max(tops))
    for row, token, top, (logprob, likeliest) in zip(rows, tokens, tops, scored, strict=True):
        results[row] = Sampled(token, logprob, likeliest[:top])


def _largest(values: Tensor, count: int) -> Tensor:
    """The ids of the largest of (rows, vocab), falling, the lowest ids first among equals; (rows, count)."""
    count = min(count, values.shape[-1])
    if count == 0:
        return values.new_zeros(len(values), 0, dtype=torch.int64)
    largest, ids = values.topk(count)
    last = largest[:, -1:]
    crowded = (values == last).sum(-1) > (largest == last).sum(-1)
    for row in crowded.nonzero().flatten().tolist():
        above = int((largest[row] > last[row]).sum())
        ids[row, above:] = (values[row] == last[row]).nonzero().flatten()[: count - above]
    ids = ids.sort(dim=-1).values
    order = values.gather(-1, ids).sort(dim=-1, descending=True, stable=True).indices
    return ids.gather(-1, order)
