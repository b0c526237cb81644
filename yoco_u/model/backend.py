"""Attention backends: they attend for the blocks of the model, and remember keys and values between calls.

The blocks know nothing about masks, caches or batches. A block computes queries, keys and values, gives them to an
`AttentionBackend` together with the number of its slot, and gets back the attention's output. The same model runs in several
hosts, each with a backend of its own:

- training and `generate()`: `PaddedBackend`, below;
- the engine: `yoco_u.inference.paged_backend.PagedBackend` on a CPU, `yoco_u.inference.gpu_backend.GpuBackend` on a GPU;
- vLLM: `yoco_u.integrations.vllm.backend.VllmBackend`, for the blocks on vLLM's layers.

A backend for another device is one more class that implements this protocol.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from yoco_u.architecture import Architecture
from yoco_u.model.attention import attend, full_mask, sliding_attention, sliding_mask
from yoco_u.model.cache import YocoUCache
from yoco_u.model.cpu_attention import block_attention
from yoco_u.model.gpu_attention import Sequences, find_sequences, runs_flash
from yoco_u.model.retention import chunked_retention, recurrent_retention
from yoco_u.model.rope import rotary_angles, rotate


class AttentionBackend(Protocol):
    """Everything that a forward pass knows about the sequences of its batch: positions, masks and caches.

    In all methods `slot` is the index of the calling block's slot in `Architecture.slots()`. Queries, keys, values and the
    output of attention are (batch, tokens, heads, head_dim).

    Attributes:
        has_cache: whether slot numbers matter. Without a cache every block is called with slot 0, so that torch.compile makes
            one graph for all layers and loops.
    """

    @property
    @abstractmethod
    def has_cache(self) -> bool: ...

    @abstractmethod
    def in_loop(self, loop: int) -> "tuple[Tensor | None, AttentionBackend]":
        """Select the tokens that still run in this loop of a looped stage: sequences may have different loop counts.

        Returns:
            Indices of these tokens, or None for all tokens; and the backend of a pass over these tokens alone.
        """
        ...

    def hold(self, loop: int, before: Tensor, x: Tensor) -> Tensor:
        """Take in the states before a loop and those in front of its next block, each (batch, tokens, [streams,] hidden).

        Returns:
            What the block reads. A backend whose tokens all run the loops of their sequences keeps this default.
        """
        return x

    def end_loop(
        self, loop: int, before: Tensor, after: Tensor
    ) -> "tuple[Tensor, tuple[Tensor | None, AttentionBackend] | None]":
        """Take in the states of all tokens before and after a loop of a looped stage.

        Returns:
            The states to go on with; and for `remember` what `in_loop` returns, of the tokens that run none of the loops to
            come, in which others will see them, None without any. A backend without such tokens keeps this default.
        """
        return after, None

    def remember(self, slot: int, k: Tensor, v: Tensor) -> None:
        """Remember keys and values in the slots of the loops after that of `slot`, for tokens that do not run them.

        Only backends whose `end_loop` names such tokens are asked for it.
        """
        return

    @abstractmethod
    def kept(self) -> "tuple[Tensor | None, AttentionBackend]":
        """Select the tokens whose logits are asked for; the cross-decoder runs on these alone. Returns what `in_loop` does."""
        ...

    @abstractmethod
    def rotate(self, x: Tensor) -> Tensor:
        """Apply RoPE at the tokens' positions to queries or keys."""
        ...

    def rotate_cross(self, x: Tensor) -> Tensor:
        """`rotate` for the queries and keys of the cross-decoder, whose angles shrink while training fades them out."""
        return self.rotate(x)

    @abstractmethod
    def sliding_attention(self, slot: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Remember the keys and values of the new tokens; attend from each token to the last `window` ones, itself included."""
        ...

    @abstractmethod
    def full_attention(self, slot: int, q: Tensor, k: Tensor, v: Tensor, prefix: tuple[Tensor, Tensor] | None) -> Tensor:
        """Remember the keys and values of the new tokens; attend from each token to all tokens so far, itself included.

        Args:
            prefix: learned keys and values (ParScale) that every token sees, each (prefix, kv_heads, head_dim).
        """
        ...

    @abstractmethod
    def global_kvs(self, new: Sequence[tuple[Tensor, Tensor]]) -> Sequence[tuple[Tensor, Tensor]]:
        """Remember the keys and values of the new tokens, for each global KV. Returns those to call `cross_attention` with."""
        ...

    @abstractmethod
    def cross_attention(self, slot: int, q: Tensor, global_kv: tuple[Tensor, Tensor]) -> Tensor:
        """Attend from each token to the keys and values of all tokens so far, itself included, in the slot's global KV."""
        ...

    @abstractmethod
    def retention(self, slot: int, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        """Run gated retention from the remembered state and remember the new state; see `yoco_u.model.retention`."""
        ...

    def decode_block_arguments(self, slot: int) -> tuple[Any, ...] | None:
        """The arguments of the fused decode kernel after the hidden states; None if the block must run operation by operation.

        A backend without such a kernel keeps this default.
        """
        return None


@dataclass
class PaddedBackend(AttentionBackend):
    """The backend of training and `generate()`: rows of equal length, with or without padding, packed documents and a cache.

    Attributes:
        rotary: cos and sin of the tokens' positions, (batch or 1, tokens, 1, head_dim), float32.
        cross_rotary: the same for the cross-decoder.
        kept_tokens: indices of the tokens that the cross-decoder runs on; None for all.
        window: keys that a token sees in the sliding layers, itself included.
        blockwise: whether to attend block by block, without masks, as CPUs do for more than one new token; see
            `yoco_u.model.cpu_attention`.
        sequences: what flash attention works by, as GPUs do for a pass that begins its rows; None where it does not run.
        segments: segments of the new tokens and of all tokens so far, see `yoco_u.model.attention`; None if each row is one
            document without padding.
        sliding, full, cross: masks of the three kinds of attention, see `yoco_u.model.attention`; None where plain causal
            attention, or attention without a mask, does the same.
        documents: document of each new token, (batch, tokens), never decreasing, for retention; None as for `segments`.
        padding: true where a new token is padding, (batch, tokens); None as for `segments`.
        cache: where keys and values of new tokens go; None without a cache.
    """

    rotary: tuple[Tensor, Tensor]
    cross_rotary: tuple[Tensor, Tensor]
    kept_tokens: Tensor | None
    window: int | None
    blockwise: bool
    sequences: Sequences | None
    segments: tuple[Tensor, Tensor] | None
    sliding: Tensor | None
    full: Tensor | None
    cross: Tensor | None
    documents: Tensor | None
    padding: Tensor | None
    cache: YocoUCache | None

    @property
    def has_cache(self) -> bool:
        return self.cache is not None

    def in_loop(self, loop: int) -> tuple[None, "PaddedBackend"]:
        return None, self

    def kept(self) -> tuple[Tensor | None, "PaddedBackend"]:
        if self.kept_tokens is None:
            return None, self
        rotary, cross = ((cos[:, self.kept_tokens], sin[:, self.kept_tokens]) for cos, sin in (self.rotary, self.cross_rotary))
        return self.kept_tokens, replace(self, rotary=rotary, cross_rotary=cross)

    def rotate(self, x: Tensor) -> Tensor:
        return rotate(x, self.rotary)

    def rotate_cross(self, x: Tensor) -> Tensor:
        return rotate(x, self.cross_rotary)

    def sliding_attention(self, slot: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert self.window is not None
        k, v = self._remember(slot, k, v)
        if self.sequences is not None:
            return self.sequences.attend(q, k, v, self.window)
        if self.cache is not None:
            seen = q.shape[1] + self.window - 1
            k, v = k[:, -seen:], v[:, -seen:]
        if self.blockwise:
            return self._block_attention(q, k, v, self.window)
        return sliding_attention(q, k, v, self.window, self.sliding)

    def full_attention(self, slot: int, q: Tensor, k: Tensor, v: Tensor, prefix: tuple[Tensor, Tensor] | None) -> Tensor:
        k, v = self._remember(slot, k, v)
        if self.sequences is not None:
            if prefix is not None:
                return self.sequences.attend_prefixed(q, k, v, prefix)
            return self.sequences.attend(q, k, v)
        if prefix is not None:
            k, v = (
                torch.cat([p.to(x.dtype).expand(x.shape[0], -1, -1, -1), x], dim=1) for p, x in zip(prefix, (k, v), strict=True)
            )
        elif self.blockwise:
            return self._block_attention(q, k, v, k.shape[1])
        return attend(q, k, v, self.full, causal=self.full is None and q.shape[1] > 1)

    def global_kvs(self, new: Sequence[tuple[Tensor, Tensor]]) -> Sequence[tuple[Tensor, Tensor]]:
        return [self._remember(number - len(new), k, v) for number, (k, v) in enumerate(new)]  # the last layers of the cache

    def cross_attention(self, slot: int, q: Tensor, global_kv: tuple[Tensor, Tensor]) -> Tensor:
        if self.sequences is not None and self.sequences.of_kept is not None:
            return self.sequences.attend_kept(q, *global_kv)
        if self.blockwise and self.kept_tokens is None:
            return self._block_attention(q, *global_kv, global_kv[0].shape[1])
        return attend(q, *global_kv, self.cross, causal=self.cross is None and self.kept_tokens is None and q.shape[1] > 1)

    def _remember(self, slot: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys and values into the cache, if there is one. Returns those that the new tokens may see."""
        if self.cache is None:
            return k, v
        remembered = self.cache.append(slot, k, v)
        return remembered if self.sequences is None else (k, v)  # sequences begin with the new tokens

    def _block_attention(self, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        if self.segments is None:
            return block_attention(q, k, v, window, None, None)
        queries, keys = self.segments
        return block_attention(q, k, v, window, queries, keys[:, -k.shape[1] :])

    def retention(self, slot: int, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        if self.padding is not None:
            k = k.masked_fill(self.padding[..., None, None], 0)
            log_decay = log_decay.masked_fill(self.padding[..., None], 0)
        state = self.cache.retention_state(slot) if self.cache is not None else None
        if state is None:
            state = q.new_zeros(q.shape[0], q.shape[2], k.shape[-1], v.shape[-1])
        if q.shape[1] == 1:
            out, state = recurrent_retention(q, k, v, log_decay, state)
        else:
            out, state = chunked_retention(q, k, v, log_decay, state, self.documents)
        if self.cache is not None:
            self.cache.set_retention_state(slot, state, q.shape[1])
        return out


def prepare_backend(
    architecture: Architecture,
    batch: int,
    position_ids: Tensor,
    segments: Tensor | None,
    kept: Tensor | None,
    last: int | None,
    cache: YocoUCache | None,
    dtype: torch.dtype,
    cu_seqlens: Tensor | None = None,
    cross_rotation: float = 1.0,
) -> PaddedBackend:
    """Make the backend of one forward pass, with the masks and rotary angles that all its blocks share.

    Args:
        batch: number of rows.
        position_ids: positions of the new tokens for RoPE, (batch or 1, tokens).
        segments: segments of all tokens so far, cached ones included, (batch, past + tokens): 0 is padding, documents count
            from 1. None if each row is one document without padding.
        kept: indices of the new tokens that the cross-decoder runs on, (kept,); None for all.
        last: how many these are, if they are known to be the last ones of each row; None otherwise.
        dtype: dtype of queries and keys.
        cu_seqlens: cumulative lengths of the sequences, (sequences + 1,), int32; without them segments are masked, as flash
            attention works by lengths alone.
        cross_rotation: what the rotary angles of the cross-decoder are multiplied by.
    """
    tokens, device = position_ids.shape[1], position_ids.device
    past = cache.get_seq_length() if cache is not None else 0
    kinds = {stage.attention for stage in architecture.stages}
    new = segments[:, past:] if segments is not None else None
    pair = (new, segments) if segments is not None and new is not None else None
    positions = torch.arange(past, past + tokens, device=device)
    sequences = None
    known = segments is None or cu_seqlens is not None
    if past == 0 and tokens > 1 and known and kinds != {"retention"} and runs_flash(device, dtype, architecture.head_dim):
        if cu_seqlens is None:
            cu_seqlens = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=device)
        prefix = architecture.parallel.prefix_tokens if architecture.parallel else 0
        sequences = find_sequences(cu_seqlens, batch, tokens, last, prefix)
    blockwise = sequences is None and runs_blockwise(tokens, device)
    masked = sequences is None and not blockwise

    sliding = full = cross = None
    if "sliding" in kinds and masked:
        assert architecture.window is not None
        seen = min(past, architecture.window - 1)
        visible = (pair[0], pair[1][:, past - seen :]) if pair is not None else None
        sliding = sliding_mask(tokens, seen, architecture.window, visible, dtype, device)
    needs_mask = pair is not None or bool(past and tokens > 1)
    if "full" in kinds and sequences is None and (architecture.parallel or (needs_mask and not blockwise)):
        full = full_mask(positions, past + tokens, pair, dtype)
        if architecture.parallel:
            full = torch.nn.functional.pad(full, (architecture.parallel.prefix_tokens, 0))
    if "cross" in kinds and not (blockwise and kept is None) and (sequences is None or last is None):
        cross = _cross_mask(positions, kept, last, past + tokens, pair, dtype)

    shape = architecture.head_dim, architecture.rope_theta, architecture.rotary_scaling
    rotary = rotary_angles(position_ids, *shape)
    return PaddedBackend(
        rotary=rotary,
        cross_rotary=rotary if cross_rotation == 1 else rotary_angles(position_ids, *shape, cross_rotation),
        kept_tokens=kept,
        window=architecture.window,
        blockwise=blockwise,
        sequences=sequences,
        segments=pair,
        sliding=sliding,
        full=full,
        cross=cross,
        documents=segments.cummax(dim=1).values[:, past:] if segments is not None else None,
        padding=new == 0 if new is not None else None,
        cache=cache,
    )


def runs_blockwise(tokens: int, device: torch.device) -> bool:
    """Whether this many new tokens per row attend through `yoco_u.model.cpu_attention` instead of torch's fused attention."""
    return device.type == "cpu" and tokens > 1


def _cross_mask(
    positions: Tensor,
    kept: Tensor | None,
    last: int | None,
    keys: int,
    segments: tuple[Tensor, Tensor] | None,
    dtype: torch.dtype,
) -> Tensor | None:
    """The mask of the cross-decoder's queries; None if the last token is the only query, or if plain causal does the same."""
    at = positions if kept is None else positions[kept]
    if segments is not None:
        queries = segments[0] if kept is None else segments[0][:, kept]
        return full_mask(at, keys, (queries, segments[1]), dtype)
    all_new = kept is None and positions.numel() == keys
    return None if last == 1 or all_new else full_mask(at, keys, None, dtype)
