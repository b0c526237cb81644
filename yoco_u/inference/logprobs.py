"""Log probabilities under the raw logits: of given tokens, and of the likeliest ones beside each."""

from dataclasses import dataclass

import torch
from torch import Tensor

from yoco_u.device import host_waits, read_back

_ELEMENTS = 2**24  # of the logits that are looked at in one piece; what is computed from a piece takes some 20 bytes for each


@dataclass(frozen=True)
class Logprob:
    """The natural logarithm of a token's probability under the raw logits; rank 1 is the likeliest, equals share a rank."""

    token_id: int
    logprob: float
    rank: int


Ranked = tuple[Logprob, tuple[Logprob, ...]]
"""A given token, and the likeliest ones: falling, equals by id."""


@torch.inference_mode()
def score(logits: Tensor, targets: Tensor, top: int) -> list[Ranked]:
    """Log probabilities of given tokens, as for a prompt. The device is waited for once.

    Args:
        logits: (rows, vocab), any float type.
        targets: (rows,) int64, the token whose log probability is asked of each row.
        top: report so many likeliest tokens beside it.
    """
    return [ranked(row) for row in read_back(rank(logits, targets, top))]


def rank(logits: Tensor, targets: Tensor, top: int) -> Tensor:
    """What `score` reports, as numbers on the device.

    Returns:
        (rows, 3 * (1 + top)) float64, which holds them all exactly: a row's token ids, then their log probabilities, then
        their ranks, the given token first.
    """
    rows = max(1, _ELEMENTS // logits.shape[-1])
    return torch.cat([_rank(*piece, top) for piece in zip(logits.split(rows), targets.split(rows), strict=True)])


def ranked(row: list[float]) -> Ranked:
    """The log probabilities of one row of `rank`."""
    count = len(row) // 3
    ids, logprobs, ranks = row[:count], row[count : 2 * count], row[2 * count :]
    given, *likeliest = map(Logprob, map(int, ids), logprobs, map(int, ranks))
    return given, tuple(likeliest)


def _rank(logits: Tensor, targets: Tensor, top: int) -> Tensor:
    logits = logits.float()
    ids = torch.cat([targets[:, None], _largest(logits, top)], dim=-1)  # (rows, 1 + top)
    values = logits.gather(-1, ids)
    logprobs = logits.log_softmax(dim=-1).gather(-1, ids)
    target_ranks = 1 + (logits > values[:, :1]).sum(-1, keepdim=True)
    top_ranks = 1 + (values[:, None, 1:] > values[:, 1:, None]).sum(-1)  # (rows, top)
    return torch.cat([ids.double(), logprobs.double(), target_ranks.double(), top_ranks.double()], dim=-1)


def _largest(values: Tensor, count: int) -> Tensor:
    """The ids of the largest of (rows, vocab) float32, falling, the lowest ids first among equals; (rows, count)."""
    count = min(count, values.shape[-1])
    if count == 0:
        return torch.empty(len(values), 0, dtype=torch.int64, device=values.device)
    if host_waits(values.device):
        return _largest_unseen(values, count)
    largest, ids = values.topk(count)
    last = largest[:, -1:]
    crowded = (values == last).sum(-1) > (largest == last).sum(-1)
    for row in crowded.nonzero().flatten().tolist():
        above = int((largest[row] > last[row]).sum())
        ids[row, above:] = (values[row] == last[row]).nonzero().flatten()[: count - above]
    ids = ids.sort(dim=-1).values
    order = values.gather(-1, ids).sort(dim=-1, descending=True, stable=True).indices
    return ids.gather(-1, order)


def _largest_unseen(values: Tensor, count: int) -> Tensor:
    """The same without looking for equals: no two keys are equal, as each is a value's place in the order and then the id."""
    bits = (values + 0.0).view(torch.int32)  # the sum makes -0.0 the 0.0 that it equals
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # whole numbers in the order of the floats
    keys = (ordered.long() << 32) - torch.arange(values.shape[-1], device=values.device)
    return keys.topk(count).indices
