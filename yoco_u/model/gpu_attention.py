"""Causal and sliding attention on a GPU: torch's variable-length flash attention.

The rows of a batch are laid one after another and cut into sequences, none of which sees another. So documents and padding are
lengths, not masks, and cost no time. Cumulative lengths, `cu_seqlens`, say where each sequence begins.

`varlen_attn` is a custom operator: torch.compile does not look inside, and keeps one graph for each kind of block.
"""

from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

_NAMES_GROUPED_HEADS = "enable_gqa" in signature(varlen_attn).parameters


@dataclass(frozen=True)
class Sequences:
    """The sequences of a batch of rows, with the cumulative lengths of everything that attends or is attended to.

    Attributes:
        tokens: tokens per row, so no sequence is longer.
        of_tokens: of the rows' tokens, (sequences + 1,), int32.
        of_kept: of the tokens that the cross-decoder runs on, (sequences + 1,), int32; None if these are not the last ones of
            each row.
        of_prefixed: of the tokens with a learned prefix before each sequence, (sequences + 1,), int32; None without prefixes.
        prefixed: which rows of prefix and tokens, laid one after another, make up the prefixed sequences, (keys,).
    """

    tokens: int
    of_tokens: Tensor
    of_kept: Tensor | None
    of_prefixed: Tensor | None
    prefixed: Tensor | None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        """Attend from each token to itself and the tokens before it in its sequence.

        Args:
            q: (batch, tokens, heads, head_dim); k, v: (batch, tokens, kv_heads, head_dim).
            window: keys that a token sees, itself included; None for all.

        Returns:
            (batch, tokens, heads, head_dim)
        """
        return flash_attention(q, k, v, self.of_tokens, self.of_tokens, self.tokens, self.tokens, window)

    def attend_kept(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from each kept token, (batch, kept, heads, head_dim), to itself and the tokens before it in its sequence."""
        assert self.of_kept is not None
        return flash_attention(q, k, v, self.of_kept, self.of_tokens, self.tokens, self.tokens)

    def attend_prefixed(self, q: Tensor, k: Tensor, v: Tensor, prefix: tuple[Tensor, Tensor]) -> Tensor:
        """As `attend`; every token also sees the prefix, keys and values of shape (prefix, kv_heads, head_dim)."""
        assert self.of_prefixed is not None and self.prefixed is not None
        k, v = (
            torch.cat([p.to(x.dtype), x.flatten(0, 1)]).index_select(0, self.prefixed)
            for p, x in zip(prefix, (k, v), strict=True)
        )
        return flash_attention(q, k, v, self.of_tokens, self.of_prefixed, self.tokens, self.tokens + len(prefix[0]))


def find_sequences(cu_seqlens: Tensor, rows: int, tokens: int, last: int | None, prefix: int) -> Sequences:
    """Prepare what all layers of a forward pass share. A GPU is not waited for.

    Args:
        cu_seqlens: cumulative lengths of the sequences, see `yoco_u.model.segments`.
        rows, tokens: shape of the batch.
        last: how many of the last tokens of each row the cross-decoder runs on; None if it runs on others.
        prefix: length of the learned prefix; 0 without one.
    """
    of_kept = of_prefixed = prefixed = None
    if last is not None:
        of_kept = cu_seqlens // tokens * last + (cu_seqlens % tokens - (tokens - last)).clamp(min=0)
    if prefix:
        sequences, device = len(cu_seqlens) - 1, cu_seqlens.device
        of_prefixed = cu_seqlens + prefix * torch.arange(sequences + 1, dtype=torch.int32, device=device)
        row = torch.arange(rows * tokens + sequences * prefix, dtype=torch.int32, device=device)
        sequence = torch.searchsorted(of_prefixed, row, right=True) - 1
        within = row - of_prefixed[sequence]
        prefixed = torch.where(within < prefix, within, cu_seqlens[sequence] + within)
    found = Sequences(tokens, cu_seqlens, of_kept, of_prefixed, prefixed)
    if not torch.compiler.is_compiling():
        for tensor in (cu_seqlens, of_kept, of_prefixed, prefixed):
            if tensor is not None:  # one graph of a block serves any number of sequences
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return found


def runs_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether flash attention runs on this device, with queries of this dtype and heads of this size."""
    return has_flash(device) and dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= 256


def has_flash(device: torch.device) -> bool:
    """Whether the device is one for which torch has flash attention: a GPU of compute capability 8.0 or higher."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    of_queries: Tensor,
    of_keys: Tensor,
    longest_queries: int,
    longest_keys: int,
    window: int | None = None,
) -> Tensor:
    """Call torch's operator: causal attention within each of several sequences that are laid one after another.

    Args:
        q: (..., heads, head_dim); k, v: (..., kv_heads, head_dim).
        of_queries, of_keys: cumulative lengths of the sequences, (sequences + 1,), int32.
        longest_queries, longest_keys: no sequence has more.
        window: keys that a token sees, itself included; None for all.

    Returns:
        As q.

    The last query of a sequence is aligned with its last key. Where there are fewer heads of keys than of queries, torch 2.11
    groups them without being asked, and later versions must be asked.
    """
    flat_q, flat_k, flat_v = (x.flatten(0, 1) if x.ndim == 4 else x for x in (q, k, v))
    settings: dict[str, Any] = {"window_size": (-1 if window is None else window - 1, 0)}
    if _NAMES_GROUPED_HEADS:
        settings["enable_gqa"] = True
    out = varlen_attn(flat_q, flat_k, flat_v, of_queries, of_keys, longest_queries, longest_keys, **settings)
    assert isinstance(out, Tensor)
    return out.reshape(q.shape)
