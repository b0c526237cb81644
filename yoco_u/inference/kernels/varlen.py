"""Causal attention of chunks of several sequences in one call."""

from dataclasses import dataclass

import torch
from torch import Tensor

from yoco_u.inference.kernels.direct import chunk_attention
from yoco_u.model.gpu_attention import flash_attention, runs_flash


@dataclass(frozen=True)
class VarlenLengths:
    """How the queries and keys of several sequences, one behind the other, are divided among them.

    Attributes:
        cu_queries, cu_keys: where each sequence's queries and keys begin, (sequences + 1,) int32, on the device.
        queries, keys: how many each sequence has, on the host.
    """

    cu_queries: Tensor
    cu_keys: Tensor
    queries: list[int]
    keys: list[int]


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, lengths: VarlenLengths, window: int | None) -> Tensor:
    """Causal attention in which a sequence's queries belong to the last of its keys' tokens.

    In bfloat16 on a GPU this is one call of flash attention; elsewhere it goes sequence by sequence.

    Args:
        q: (queries, heads, head_dim), of all sequences.
        k, v: (keys, kv_heads, head_dim), of all sequences.
        window: keys that a token sees, itself included; None for all.
    """
    if runs_flash(q.device, q.dtype, q.shape[-1]):
        return flash_attention(q, k, v, lengths.cu_queries, lengths.cu_keys, max(lengths.queries), max(lengths.keys), window)
    parts = zip(q.split(lengths.queries), k.split(lengths.keys), v.split(lengths.keys), strict=True)
    return torch.cat([chunk_attention(q_own[None], k_own[None], v_own[None], window)[0] for q_own, k_own, v_own in parts])
