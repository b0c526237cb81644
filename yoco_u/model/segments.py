"""Which tokens of a batch see each other: segments, and the positions and sequences that follow from them.

Segments are explained in `yoco_u.model.attention`. A sequence is a longest run of tokens of one segment in one row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from yoco_u.device import host_waits, read_back
from yoco_u.errors import UserError


def segments_of(attention_mask: Tensor | None, document_ids: Tensor | None, shape: tuple[int, int], past: int) -> Tensor | None:
    """Segments of all tokens so far, (batch, past + tokens); None if each row is known to be one document without padding.

    A GPU is not asked whether a mask is all ones: there a mask always makes segments.

    Args:
        attention_mask, document_ids: as in `YocoUModel.forward`.
        shape: (batch, tokens) of the new tokens.
        past: number of cached tokens.

    Raises:
        UserError: if a shape does not fit.
    """
    segments = None
    if document_ids is not None:
        if document_ids.shape != shape:
            raise UserError(f"document_ids has shape {tuple(document_ids.shape)}; expected {shape}, one id per token")
        segments = F.pad((document_ids.diff(dim=1) != 0).long().cumsum(dim=1), (1, 0)) + 1
    if attention_mask is not None:
        expected = (shape[0], past + shape[1])
        if attention_mask.shape != expected:
            raise UserError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; expected {expected}, one value per token so far"
            )
        real = attention_mask != 0
        if segments is not None:
            return segments * real
        return real.long() if host_waits(real.device) or not bool(real.all()) else None
    return segments


def positions_of(
    attention_mask: Tensor | None, documents: Tensor | None, tokens: int, past: int, device: torch.device
) -> Tensor:
    """Positions of the new tokens for RoPE, (batch or 1, tokens): from 0 in each document, padding not counted."""
    if documents is not None:
        index = torch.arange(tokens, device=device)
        return index - torch.where(_begins(documents), index, 0).cummax(dim=1).values
    if attention_mask is None:
        return torch.arange(past, past + tokens, device=device)[None]
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, past:]


def cumulative_lengths(segments: Tensor) -> Tensor:
    """Where the sequences of a batch begin, and where the last one ends, when its rows are laid one after another.

    Tensors on a GPU are read once, for the number of sequences. A caller that has the segments on the host too, as training
    has, calls this there and uploads the result.

    Args:
        segments: segments or document ids, (batch, tokens).

    Returns:
        `cu_seqlens` of `YocoUModel.forward`: (sequences + 1,), int32, from 0 to batch * tokens.
    """
    begins = F.pad(_begins(segments).flatten(), (0, 1), value=True)  # (batch * tokens + 1,)
    return torch.nonzero_static(begins, size=read_back(begins.sum())).flatten().int()


def check_cumulative_lengths(cu_seqlens: Tensor | None, segments: Tensor | None) -> None:
    """Refuse what cannot be the cumulative lengths of these segments.

    Raises:
        UserError: if there are no segments, or if dtype or shape are wrong. The values are not looked at.
    """
    if cu_seqlens is None:
        return
    if segments is None:
        raise UserError("cu_seqlens came without document_ids or attention_mask; give what it was computed from as well")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise UserError(
            f"cu_seqlens has dtype {cu_seqlens.dtype} and shape {tuple(cu_seqlens.shape)}; expected int32 of shape "
            "(sequences + 1,), as yoco_u.model.segments.cumulative_lengths returns it"
        )


def _begins(segments: Tensor) -> Tensor:
    """True where a sequence begins, (batch, tokens)."""
    return F.pad(segments.diff(dim=1) != 0, (1, 0), value=True)
