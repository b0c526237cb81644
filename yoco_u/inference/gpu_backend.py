"""The engine's attention backends on a GPU: a few kernels for all sequences of a step, and no wait for the device.

Decodes attend through one kernel, over pages or rings. Prefills attend through one call of variable-length attention: their
keys of earlier steps are gathered from the cache, in front of their own. Everything that the kernels need to know of a step is
in its plan (`gpu_plan.py`).
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from yoco_u.architecture import Architecture, Slot
from yoco_u.inference.gpu_plan import DecodePlan, RingKeys, StepPlan
from yoco_u.inference.kernels import decode_attention, rotate
from yoco_u.inference.kernels.gpu.splits import SplitPlan
from yoco_u.inference.kernels.varlen import varlen_attention
from yoco_u.inference.kv_cache import KVCache, KVStorage
from yoco_u.inference.step_retention import step_retention
from yoco_u.inference.token_exits import LoopingBackend, TokenExits
from yoco_u.model.backend import AttentionBackend
from yoco_u.model.rope import rotary_angles


class DecodeBackend(AttentionBackend):
    """The backend of tokens that are decoded, one for each request, all of them in every loop.

    Args:
        architecture: at the largest loop count of the step.
        slots: `architecture.slots()`.
    """

    has_cache = True

    def __init__(
        self, plan: DecodePlan | StepPlan, cache: KVCache, architecture: Architecture, slots: tuple[Slot, ...]
    ) -> None:
        self.plan, self.cache, self.architecture, self.slots = plan, cache, architecture, slots

    def in_loop(self, loop: int) -> "tuple[Tensor | None, AttentionBackend]":
        return None, self

    def kept(self) -> "tuple[Tensor | None, AttentionBackend]":
        return None, self

    @cached_property
    def rotary(self) -> tuple[Tensor, Tensor]:
        """cos and sin of the tokens' positions; see `rotary_angles`."""
        a = self.architecture
        return rotary_angles(self.plan.tokens["positions"][None], a.head_dim, a.rope_theta, a.rotary_scaling)

    def rotate(self, x: Tensor) -> Tensor:
        return rotate(x, self.rotary)

    def sliding_attention(self, slot: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ring = self.cache.rings[self.slots[slot]]
        ring.store(self.plan.tokens["ring_slots"], k[0], v[0])
        decodes = self.plan.decodes
        return self._decode(q, ring, decodes.ring_tables, decodes.ring_lengths, decodes.ring_splits)

    def full_attention(self, slot: int, q: Tensor, k: Tensor, v: Tensor, prefix: tuple[Tensor, Tensor] | None) -> Tensor:
        pages = self.cache.pages[self.slots[slot]]
        pages.store(self.plan.tokens["page_slots"], k[0], v[0])
        return self._attend_pages(pages, q, prefix)

    def global_kvs(self, new: Sequence[tuple[Tensor, Tensor]]) -> Sequence[tuple[Tensor, Tensor]]:
        for storage, (k, v) in zip(self.cache.global_kvs, new, strict=True):
            storage.store(self.plan.tokens["page_slots"], k[0], v[0])
        return new

    def cross_attention(self, slot: int, q: Tensor, global_kv: tuple[Tensor, Tensor]) -> Tensor:
        return self._attend_pages(self.cache.read_by(self.slots[slot]), q, None)

    def retention(self, slot: int, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        return step_retention(q, k, v, log_decay, self.cache.states[self.slots[slot]], self.plan.decodes.seats)

    def _attend_pages(self, pages: KVStorage, q: Tensor, prefix: tuple[Tensor, Tensor] | None) -> Tensor:
        decodes = self.plan.decodes
        return self._decode(q, pages, decodes.block_tables, decodes.lengths, decodes.splits, prefix)

    def _decode(
        self,
        q: Tensor,
        storage: KVStorage,
        block_tables: Tensor,
        lengths: Tensor,
        splits: SplitPlan,
        prefix: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The attention of the decodes among the queries (1, tokens, heads, head_dim)."""
        n, block_size = self.plan.num_decodes, storage.block_size
        return decode_attention(q[0, :n], storage.data, storage.scales, block_tables, block_size, lengths, splits, prefix)[None]


class GpuBackend(LoopingBackend, DecodeBackend):
    """The backend of one step of the engine, in which every request may run another number of tokens and of loops.

    Args:
        exits: of tokens that may leave the loop; None where there are none. Only with these the host waits, once a loop.
    """

    plan: StepPlan

    def __init__(
        self,
        plan: StepPlan,
        cache: KVCache,
        architecture: Architecture,
        slots: tuple[Slot, ...],
        exits: TokenExits | None = None,
    ) -> None:
        DecodeBackend.__init__(self, plan, cache, architecture, slots)
        LoopingBackend.__init__(self, plan.slices, exits)

    def part(self, chosen: Sequence[bool]) -> "tuple[Tensor | None, GpuBackend]":
        return self._last_tokens([one.count if its else 0 for one, its in zip(self.slices, chosen, strict=True)])

    def remember(self, slot: int, k: Tensor, v: Tensor) -> None:
        assert self.exits is not None
        for own in self.exits.later_loops(self.slots[slot]):
            if own.attention == "sliding":
                self.cache.rings[own].store(self.plan.tokens["ring_slots"], k[0], v[0])
            else:
                self.cache.pages[own].store(self.plan.tokens["page_slots"], k[0], v[0])

    def kept(self) -> "tuple[Tensor | None, GpuBackend]":
        return self._last_tokens([one.kept for one in self.plan.slices])

    def sliding_attention(self, slot: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, ring = self.plan.num_decodes, self.cache.rings[self.slots[slot]]
        if not self.plan.prefills:
            return super().sliding_attention(slot, q, k, v)
        keys = self.plan.ring_keys
        # The rings are read before the chunks' own keys overwrite what the chunks still see.
        attended = varlen_attention(q[0, n:], *_behind_ring(ring, keys, k[0, n:], v[0, n:]), keys.lengths, ring.block_size)
        if n:
            return _joined([super().sliding_attention(slot, q, k, v), attended[None]])
        ring.store(self.plan.tokens["ring_slots"], k[0], v[0])
        return attended[None]

    def retention(self, slot: int, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        states, seats = self.cache.states[self.slots[slot]], self.plan.decodes.seats if self.plan.num_decodes else None
        return step_retention(q, k, v, log_decay, states, seats, self.plan.prefills)

    def _attend_pages(self, pages: KVStorage, q: Tensor, prefix: tuple[Tensor, Tensor] | None) -> Tensor:
        n = self.plan.num_decodes
        parts = [super()._attend_pages(pages, q, prefix)] if n else []
        if self.plan.prefills:
            keys = self.plan.page_keys(0 if prefix is None else len(prefix[0]))
            k, v = (x[0] for x in pages.read(keys.rows, q.dtype))
            if prefix is not None:
                repeats = (len(self.plan.prefills), 1, 1)
                k, v = (
                    x.index_copy(0, keys.prefix_places, own.to(x.dtype).repeat(repeats))
                    for x, own in zip((k, v), prefix, strict=True)
                )
            parts.append(varlen_attention(q[0, n:], k, v, keys.lengths, None)[None])
        return _joined(parts)

    def _last_tokens(self, counts: list[int]) -> "tuple[Tensor | None, GpuBackend]":
        """The last tokens of each request, so many as `counts` says: their indices, None for all, and their backend."""
        index, plan = self.plan.last_tokens(counts)
        if index is None:
            return None, self
        return index, GpuBackend(plan, self.cache, self.architecture, self.slots, self.exits)


def _behind_ring(ring: KVStorage, plan: RingKeys, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and values of chunks (queries, kv_heads, head_dim), each sequence's behind what its ring holds of the past."""
    k, v = ring.as_stored(k), ring.as_stored(v)
    if not len(plan.ring_rows):
        return k, v
    past_k, past_v = ring.read(plan.ring_rows, k.dtype)
    return _interleaved(plan, past_k[0], k), _interleaved(plan, past_v[0], v)


def _interleaved(plan: RingKeys, past: Tensor, chunk: Tensor) -> Tensor:
    every = chunk.new_empty(len(past) + len(chunk), *chunk.shape[1:])
    return every.index_copy_(0, plan.ring_places, past).index_copy_(0, plan.chunk_places, chunk)


def _joined(parts: list[Tensor]) -> Tensor:
    """Attention of parts of a step, each (1, tokens, heads, head_dim), as that of the whole step."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
