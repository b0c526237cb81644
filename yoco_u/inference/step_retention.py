"""Gated retention of one engine step: from the states in the sequences' seats, and back to them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from yoco_u.inference.kernels import retention_step
from yoco_u.inference.sequence_slice import SequenceSlice
from yoco_u.model.retention import chunked_retention


def step_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    states: Tensor,
    seats: Tensor | None,
    prefills: Sequence[SequenceSlice] = (),
) -> Tensor:
    """Run the decodes of a step together, then its prefills one after another.

    Args:
        q, k, v: (1, tokens, heads, head_dim), float32: the decodes' tokens, then those of the prefills.
        log_decay: (1, tokens, heads), float32.
        states: of all seats, (seats, heads, head_dim, head_dim), float32; updated in place.
        seats: of the decodes, (decodes,), -1 for one that must change nothing; None without decodes.
        prefills: the prefills.

    Returns:
        (1, tokens, heads, head_dim)
    """
    begin, parts = 0, []
    if seats is not None:
        begin = len(seats)
        parts.append(retention_step(q[0, :begin], k[0, :begin], v[0, :begin], log_decay[0, :begin], states, seats)[None])
    for one in prefills:
        own = slice(begin, begin + one.count)
        out, states[one.seat, None] = chunked_retention(
            q[:, own], k[:, own], v[:, own], log_decay[:, own], states[one.seat, None]
        )
        parts.append(out)
        begin += one.count
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
