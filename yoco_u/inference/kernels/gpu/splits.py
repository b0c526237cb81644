"""Attention in parts, known as flash decoding: how the keys of a step are divided into work items, and how parts are joined.

A GPU runs several hundred programs at a time, more than a batch has sequences. So the keys of each sequence are divided into
work items, which are computed side by side and joined by the log-sum-exp of their scores.
"""

from bisect import bisect_left
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TILE = 256
"""The least number of keys that are worth a work item of their own, and what the first key of an item is a multiple of."""

_PROGRAMS_PER_MULTIPROCESSOR = 12


@dataclass(frozen=True)
class SplitPlan:
    """The work items of one attention call, on the device. One plan serves all layers that see the same keys.

    Attributes:
        sequence: of each item, (items,) int32. Items of sequences that the call has no query for are skipped.
        first, last: the item covers keys first .. last - 1, (items,) int32; first is a multiple of `TILE`, and an item without
            keys, first == last, costs nothing.
        offsets: items offsets[i] .. offsets[i + 1] - 1 are those of sequence i and have keys, (sequences + 1,) int32.
        single: whether item i is the only one of sequence i, so that nothing has to be joined; offsets are not read then.
    """

    sequence: Tensor
    first: Tensor
    last: Tensor
    offsets: Tensor
    single: bool = False

    @classmethod
    def undivided(cls, lengths: Tensor) -> "SplitPlan":
        """One item for each sequence, whose lengths, (sequences,), stay on the device."""
        sequence = torch.arange(len(lengths), dtype=torch.int32, device=lengths.device)
        return cls(sequence, torch.zeros_like(sequence), lengths.to(torch.int32), sequence, single=True)


def split_capacity(sequences: int, kv_heads: int, device: torch.device) -> int:
    """How many work items a plan should have room for, so that even a batch of one sequence keeps the device busy.

    Each item is one program for each kv head. Twelve programs for each multiprocessor are four rounds of the three that run at
    a time, so that little is lost while the last round ends.
    """
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return sequences + -(-_PROGRAMS_PER_MULTIPROCESSOR * multiprocessors // kv_heads)


def plan_splits(lengths: NDArray[np.integer], capacity: int, tile: int = TILE) -> dict[str, NDArray[np.int32]]:
    """Divide the keys of all sequences into items of equal size: the smallest size of which `capacity` items are enough.

    Args:
        lengths: keys of each sequence, (sequences,); a sequence without keys has no item.
        capacity: how many items the arrays have; those that are left over have no keys.
        tile: the size of an item is a multiple of it.

    Returns:
        `sequence`, `first`, `last` and `offsets` of a `SplitPlan`.

    Raises:
        ValueError: if the capacity is less than the number of sequences with keys.
    """
    size = _item_size(lengths, capacity, tile)
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(-(-lengths // size), out=offsets[1:])
    used = int(offsets[-1])
    sequence, first, last = np.zeros((3, capacity), np.int32)
    sequence[:used] = np.repeat(np.arange(len(lengths)), np.diff(offsets))
    own = sequence[:used]
    first[:used] = (np.arange(used) - offsets[own]) * size
    last[:used] = np.minimum(first[:used] + size, lengths[own])
    return {"sequence": sequence, "first": first, "last": last, "offsets": offsets}


def _item_size(lengths: NDArray[np.integer], capacity: int, tile: int) -> int:
    """The smallest multiple of `tile` such that items of this size are at most `capacity`."""
    total, sequences = int(lengths.sum()), int(np.count_nonzero(lengths))
    if sequences > capacity:
        raise ValueError(f"{sequences} sequences need as many work items, but the plan has room for {capacity}")
    least = -(-total // (capacity * tile)) if total else 1
    # A sequence has less than one item more than its share of the keys, so this size is enough for all.
    enough = total // ((capacity - sequences) * tile) + 1 if capacity > sequences else int(lengths.max(initial=0)) // tile + 1
    fits = partial(_fits, lengths, capacity, tile)
    return tile * (least + bisect_left(range(least, enough), True, key=fits))


def _fits(lengths: NDArray[np.integer], capacity: int, tile: int, multiple: int) -> bool:
    return int((-(-lengths // (multiple * tile))).sum()) <= capacity


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Tensor:
    """Attention over two sets of keys from the attention over each of them.

    Args:
        out_a, out_b: outputs, (..., head_dim).
        lse_a, lse_b: log-sum-exp of the scores, (...), float32; -inf for a set without keys.

    Returns:
        (..., head_dim) in the dtype of `out_a`; zeros where neither set has keys.
    """
    share = torch.sigmoid(lse_a - lse_b).masked_fill(lse_b == -torch.inf, 1.0)[..., None]
    return (share * out_a + (1 - share) * out_b).to(out_a.dtype)
