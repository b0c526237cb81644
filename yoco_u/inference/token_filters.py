"""Penalties, forbidden tokens, temperature, top-k, top-p and min-p, over all rows of a step at once.

What each needs of the requests is first collected in arrays on the host, which go to the device together; a filter without
arrays has nothing to do. Every operation works row by row, so what becomes of a row does not depend on the others.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from yoco_u.device import host_waits
from yoco_u.inference.packed_upload import Arrays
from yoco_u.inference.sampler_state import SamplerState
from yoco_u.inference.sampling_params import SamplingParams

FORBIDDEN = -math.inf
_LARGEST = torch.finfo(torch.float32).max
_CANDIDATES = 1024  # top-p first looks at so many likeliest tokens, and further only where they do not suffice

Tensors = Mapping[str, Tensor]
"""Arrays on the device, by name."""


def penalty_arrays(states: Sequence[SamplerState]) -> Arrays:
    """For `penalized`: the tokens on which penalties fall, and what falls on each."""
    marked = [(row, state.params, *state.counts()) for row, state in enumerate(states) if state.penalized]
    if not marked:
        return {}
    ids = np.concatenate([ids for _, _, ids, _ in marked])
    counts = np.concatenate([counts for _, _, _, counts in marked])
    settings = [(row, p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for row, p, _, _ in marked]
    rows, repetition, presence, frequency = np.repeat(settings, [len(ids) for _, _, ids, _ in marked], axis=0).T
    return {
        "penalized_rows": rows.astype(np.int64),
        "penalized_ids": ids,
        "penalty_factors": repetition,
        "penalty_terms": np.clip(frequency * counts + presence * (counts > 0), -_LARGEST, _LARGEST),
    }


def penalized(logits: Tensor, given: Tensors) -> Tensor:
    """Apply repetition, presence and frequency penalties to (rows, vocab) float32; the same tensor if there are none."""
    if "penalized_ids" not in given:
        return logits
    where = (given["penalized_rows"], given["penalized_ids"])
    factors, terms = given["penalty_factors"].to(logits.dtype), given["penalty_terms"].to(logits.dtype)
    values = logits[where]
    changed = torch.where(values < 0, values * factors, values / factors) - terms
    return logits.index_put(where, _bounded(changed, values))


def bias_arrays(states: Sequence[SamplerState]) -> Arrays:
    """For `biased`: the tokens whose logits the requests change, and by how much."""
    biases = [(row, state.params.logit_bias) for row, state in enumerate(states) if state.params.logit_bias]
    if not biases:
        return {}
    return {
        "biased_rows": np.repeat([row for row, _ in biases], [len(bias) for _, bias in biases]),
        "biased_ids": np.array([token for _, bias in biases for token in bias]),
        "biases": np.array([value for _, bias in biases for value in bias.values()], dtype=np.float64),
    }


def biased(logits: Tensor, given: Tensors) -> Tensor:
    """Add the requests' biases to (rows, vocab) float32; the same tensor if there are none."""
    if "biased_ids" not in given:
        return logits
    where = (given["biased_rows"], given["biased_ids"])
    values = logits[where]
    return logits.index_put(where, _bounded(values + given["biases"].to(logits.dtype), values))


def _bounded(changed: Tensor, values: Tensor) -> Tensor:
    """Changed logits as finite numbers, however large penalties and biases are; what the model rules out stays ruled out."""
    return torch.where(values == FORBIDDEN, values, changed.clamp(-_LARGEST, _LARGEST))


def forbidden_arrays(states: Sequence[SamplerState], vocab: int) -> Arrays:
    """For `allowed`: the masks of grammars, and the ends that `min_tokens` forbids."""
    arrays = {}
    grammars = [(row, state.matcher.allowed().numpy()) for row, state in enumerate(states) if state.matcher is not None]
    if grammars:
        arrays["grammar_rows"] = np.array([row for row, _ in grammars])
        arrays["grammar_masks"] = np.stack([mask for _, mask in grammars])  # (grammars, vocab)
    ends = [
        row * vocab + token
        for row, state in enumerate(states)
        if state.unfinished
        for token in state.stop_token_ids
        if token < vocab
    ]
    if ends:
        arrays["forbidden_ends"] = np.array(ends)  # in the flattened rows
    return arrays


def allowed(scores: Tensor, given: Tensors) -> Tensor:
    """Forbid what grammars and `min_tokens` forbid in (rows, vocab); the same tensor if that is nothing."""
    if "grammar_rows" in given:
        rows = given["grammar_rows"]
        scores = scores.index_copy(0, rows, scores[rows].masked_fill_(~given["grammar_masks"], FORBIDDEN))
    if "forbidden_ends" in given:
        scores = scores.flatten().index_fill(0, given["forbidden_ends"], FORBIDDEN).view_as(scores)
    return scores


def filter_arrays(params: Sequence[SamplingParams], vocab: int) -> Arrays:
    """For `filtered`, one value a row; where a row has no such filter, the value that filters nothing."""
    arrays = {"temperatures": np.array([p.temperature for p in params])}
    limits = [p.top_k if p.top_k < vocab else 0 for p in params]
    if any(limits):
        arrays["top_k"] = np.array(limits)
    if any(p.top_p < 1 for p in params):
        arrays["top_p"] = np.array([p.top_p if p.top_p < 1 else 0.0 for p in params])
    if any(p.min_p > 0 for p in params):
        arrays["min_p_gaps"] = np.array([math.log(p.min_p) if p.min_p > 0 else FORBIDDEN for p in params])
    return arrays


def filtered(scores: Tensor, arrays: Arrays, given: Tensors) -> Tensor:
    """Apply temperature, top-k, top-p and min-p to the scores of rows that are sampled.

    Each filter is a least score: tokens of equal scores stay or go together, so a filter may leave more than it says when
    tokens tie at its border.

    Args:
        scores: (rows, vocab) float32, with temperatures above 0.
        arrays: those of `filter_arrays` on the host, from which sizes are read.
        given: the same on the device.

    Returns:
        (rows, vocab) float32, in proportion to the probabilities; 0 for tokens that were left out.
    """
    temperatures = given["temperatures"].to(scores.dtype)[:, None]
    best = scores.amax(dim=-1, keepdim=True)
    probabilities = ((scores - best) / temperatures).softmax(dim=-1)  # the quotients of large scores alone would be infinite
    least = torch.full_like(best, FORBIDDEN)  # (rows, 1)
    if "top_k" in given:
        largest = scores.topk(int(arrays["top_k"].max())).values  # (rows, largest top_k), falling
        limits = given["top_k"][:, None]
        least = torch.where(limits > 0, largest.gather(-1, (limits - 1).clamp(min=0)), least)
    if "top_p" in given:
        shares = given["top_p"][:, None]
        left = probabilities.masked_fill(scores < least, 0)
        border = _nucleus(scores, left, shares * running(left)[:, -1:], _nucleus_width(arrays, scores))
        least = torch.where(shares > 0, torch.maximum(least, border), least)
    if "min_p_gaps" in given:
        gaps = given["min_p_gaps"].to(scores.dtype)[:, None]
        least = torch.maximum(least, best + gaps * temperatures)
    return probabilities.masked_fill(scores < least, 0)


def running(values: Tensor) -> Tensor:
    """Sums of (rows, vocab) up to each token, float64."""
    return values.cumsum(dim=-1, dtype=torch.float64)


def _nucleus_width(arrays: Arrays, scores: Tensor) -> int:
    """How many likeliest tokens to look at first: all where it would take a wait to see that they are too few."""
    if host_waits(scores.device):
        return scores.shape[-1]
    limits = arrays["top_k"].tolist() if "top_k" in arrays else [0] * len(scores)
    shares = arrays["top_p"].tolist()
    widest = max(limit + 1 if limit else _CANDIDATES for limit, share in zip(limits, shares, strict=True) if share)
    return min(widest, scores.shape[-1])


def _nucleus(scores: Tensor, probabilities: Tensor, mass: Tensor, width: int) -> Tensor:
    """The least score, (rows, 1), of the likeliest tokens that together reach the mass (rows, 1).

    Looks at the `width` likeliest, and further in the rows where those are too few.
    """
    ordered, ids = scores.topk(width) if width < scores.shape[-1] else scores.sort(descending=True)
    likeliest = probabilities.gather(-1, ids)
    before = running(likeliest) - likeliest
    count = (before < mass).sum(dim=-1, keepdim=True)
    border = ordered.gather(-1, (count - 1).clamp(min=0))
    if width < scores.shape[-1]:
        short = (count == width).flatten().nonzero().flatten()
        if len(short):
            border[short] = _nucleus(scores[short], probabilities[short], mass[short], min(8 * width, scores.shape[-1]))
    return border
