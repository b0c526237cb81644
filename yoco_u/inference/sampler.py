"""From logits to tokens: penalties, biases, grammars, temperature, top-k, top-p and min-p, over all rows of a step at once.

The token of a row depends on that row alone, whatever else is in the batch: every tensor operation works row by row, and each
row has a counter-based random generator of its own. One random number a token picks the token by the cumulative probabilities
in the order of the vocabulary.

All tensor operations run on the logits' device. What they need of the requests goes there in one copy, which greedy rows do
without, and what a step finds comes back in one, the only time that the host waits.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from yoco_u.device import read_back
from yoco_u.errors import said_of
from yoco_u.inference.logprobs import Logprob, rank, ranked
from yoco_u.inference.outputs import BROKEN_LOGITS, NO_TOKEN
from yoco_u.inference.packed_upload import Arrays, upload_arrays
from yoco_u.inference.sampler_state import SamplerState
from yoco_u.inference.token_filters import (
    FORBIDDEN,
    allowed,
    bias_arrays,
    biased,
    filter_arrays,
    filtered,
    forbidden_arrays,
    penalized,
    penalty_arrays,
    running,
)

log = logging.getLogger("yoco_u.inference")


@dataclass(frozen=True)
class Sampled:
    """The token of one row; `logprob` and the likeliest tokens `top` (falling, equals by id) if its request asks for them."""

    token: int
    logprob: Logprob | None = None
    top: tuple[Logprob, ...] = ()


@torch.inference_mode()
def sample(logits: Tensor, states: Sequence[SamplerState]) -> list[Sampled | None]:
    """Choose the next token of every row and append it to the row's state.

    Args:
        logits: (rows, vocab), any float type; left as they are.
        states: one a row.

    Returns:
        One a row. None where the row has no token to choose, with the reason in the state's `failure`: the logits hold NaN
        or plus infinity, every token is forbidden, or choosing raised an exception, which concerns that row alone.
    """
    try:
        rows = _choose(logits, states)
    except BaseException as error:
        fault, said = error, said_of(error)
    else:
        return [_taken(state, row) for state, row in zip(states, rows, strict=True)]
    if len(states) > 1:  # nothing has changed yet: find the row by which it fails
        return [sample(logits[row : row + 1], [state])[0] for row, state in enumerate(states)]
    log.warning("a request failed when its token was chosen", exc_info=fault)
    states[0].failure = said
    return [None]


@torch.inference_mode()
def guess(logits: Tensor, states: Sequence[SamplerState], ahead: int) -> list[int]:
    """What `sample` would choose of each row for the token `ahead` places behind the next one, as far as that is known now.

    The random numbers are that token's. Penalties count the tokens so far, grammars and `min_tokens` are left out: a guess that
    is wrong costs time and nothing else. The states stay as they are.

    Args:
        logits: (rows, vocab), any float type.
        states: one a row.
    """
    logits = logits.float()
    try:
        arrays = {**penalty_arrays(states), **bias_arrays(states), **drawn_arrays(states, logits.shape[-1], ahead)}
        given = upload_arrays(arrays, logits.device)
        return list(read_back(_tokens(biased(penalized(logits, given), given), arrays, given)[0]))
    except BaseException as error:
        said_of(error)  # raises what ends the program; from anything else `sample` finds the row by which it fails
        return list(read_back(logits.argmax(dim=-1)))


def _choose(logits: Tensor, states: Sequence[SamplerState]) -> list[list[float]]:
    """A row of numbers a state, which `_result` reads. The states stay as they are."""
    logits = logits.float()
    arrays = step_arrays(states, logits.shape[-1])
    given = upload_arrays(arrays, logits.device)
    scores = allowed(biased(penalized(logits, given), given), given)
    tokens, best = _tokens(scores, arrays, given)
    # A forbidden token's logit does not reach `scores`, but a row with NaN anywhere is a broken one.
    peak = logits.amax(dim=-1) if scores is not logits else best
    found = torch.stack([tokens.double(), best.double(), peak.double()], dim=-1)
    tops = [state.params.logprobs for state in states if state.params.logprobs is not None]
    if tops:
        found = torch.cat([found, _rank(logits, tokens, max(tops), given.get("ranked_rows"))], dim=-1)
    return read_back(found)


def _tokens(scores: Tensor, arrays: Arrays, given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The token of each row, and its row's largest score, (rows,) each. `arrays` are on the host and `given` on the device."""
    best, tokens = scores.max(dim=-1)  # NaN if there is one; the first of equals
    if "uniforms" in given:
        some = given.get("drawn_rows")
        drawn = _draw(filtered(scores if some is None else scores[some], arrays, given), given["uniforms"])
        tokens = drawn if some is None else tokens.index_copy(0, some, drawn)
    return tokens, best


def step_arrays(states: Sequence[SamplerState], vocab: int) -> Arrays:
    """All that a step needs of the requests."""
    arrays = {**penalty_arrays(states), **bias_arrays(states), **forbidden_arrays(states, vocab), **drawn_arrays(states, vocab)}
    asked = [row for row, state in enumerate(states) if state.params.logprobs is not None]
    if 0 < len(asked) < len(states):
        arrays["ranked_rows"] = np.array(asked)
    return arrays


def drawn_arrays(states: Sequence[SamplerState], vocab: int, ahead: int = 0) -> Arrays:
    """What the rows that draw their token need, for the token `ahead` places behind the next one."""
    drawn = [row for row, state in enumerate(states) if not state.greedy]
    if not drawn:
        return {}
    arrays = {**filter_arrays([states[row].params for row in drawn], vocab)}
    arrays["uniforms"] = np.array([states[row].uniform(ahead) for row in drawn])
    if len(drawn) < len(states):
        arrays["drawn_rows"] = np.array(drawn)
    return arrays


def _draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """One token a row, (rows,): where the running sum of the weights (rows, vocab) passes the uniform's share of the total."""
    sums = running(weights)
    total = sums[:, -1:]
    target = total * uniforms[:, None]
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))  # the product may round up to the total
    return torch.searchsorted(sums, target, right=True).flatten().clamp(max=weights.shape[-1] - 1)


def _rank(logits: Tensor, tokens: Tensor, top: int, some: Tensor | None) -> Tensor:
    """`rank` of the chosen tokens in all rows or in some; the other rows are 0."""
    if some is None:
        return rank(logits, tokens, top)
    table = rank(logits[some], tokens[some], top)
    return table.new_zeros(len(logits), table.shape[-1]).index_copy(0, some, table)


def _taken(state: SamplerState, row: list[float]) -> Sampled | None:
    """`_result`, or None if it raises."""
    try:
        return _result(state, row)
    except BaseException as error:
        state.failure = said_of(error)
        log.warning("a request failed when it took its token in", exc_info=error)
        return None


def _result(state: SamplerState, row: list[float]) -> Sampled | None:
    """The token of one row, taken in by its state.

    Args:
        row: the token, its row's largest score and largest logit, then its row of `rank` if any request asks for one.
    """
    token, best, peak = int(row[0]), row[1], row[2]
    if not peak < math.inf:  # or NaN
        state.failure = BROKEN_LOGITS
        return None
    if not best > FORBIDDEN:  # or NaN
        grammar = state.matcher.error if state.matcher is not None else ""
        state.failure = f"{NO_TOKEN}{': ' + grammar if grammar else ''}"
        return None
    state.append(token)
    if state.params.logprobs is None:
        return Sampled(token)
    logprob, likeliest = ranked(row[3:])
    return Sampled(token, logprob, likeliest[: state.params.logprobs])
