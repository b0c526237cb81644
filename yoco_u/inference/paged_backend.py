"""The engine's attention backend on a CPU: the tokens of many requests side by side, over paged caches and window rings.

A step is one row of tokens, (1, tokens), without padding. First come the decodes, requests that run a single token, then the
prefills, requests that run a chunk of their prompt. Decodes attend together, whatever their lengths, through
`yoco_u.inference.kernels`. Each prefill attends by itself, to what its request has cached and to its own chunk. A token with
drafts behind it counts as so many decodes of one sequence.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from yoco_u.architecture import Architecture, Slot
from yoco_u.inference.kernels import chunk_attention, decode_attention, rotate
from yoco_u.inference.kv_cache import KVCache, KVStorage
from yoco_u.inference.sequence_slice import SequenceSlice, token_ranges
from yoco_u.inference.step_retention import step_retention
from yoco_u.inference.token_exits import LoopingBackend, TokenExits
from yoco_u.model.rope import rotary_angles


class PagedBackend(LoopingBackend):
    """`AttentionBackend` of one step of the engine.

    Args:
        slices: decodes first.
        architecture: at the largest loop count of the step.
        slots: `architecture.slots()`, which the caller lists once for all steps.
        exits: of tokens that may leave the loop; None where there are none.
    """

    has_cache = True

    def __init__(
        self,
        slices: Sequence[SequenceSlice],
        cache: KVCache,
        architecture: Architecture,
        slots: tuple[Slot, ...],
        exits: TokenExits | None = None,
    ) -> None:
        super().__init__(slices, exits)
        self.cache, self.architecture, self.slots = cache, architecture, slots
        self.tokens = token_ranges(slices)
        singles = [one for one in slices if _is_single(one)]
        self.decodes = [
            one if one.count == 1 else replace(one, start=one.start + turn, count=1)
            for one in singles
            for turn in range(one.count)
        ]
        self._turns = [turn for one in singles for turn in range(one.count)]  # of each: which token of its sequence it is
        self.prefills = [(one, slice(own.start, own.stop)) for one, own in self._with_tokens() if not _is_single(one)]

    def part(self, chosen: Sequence[bool]) -> "tuple[Tensor | None, PagedBackend]":
        if all(chosen):
            return None, self
        tokens = [token for own, its in zip(self.tokens, chosen, strict=True) if its for token in own]
        return self._index(tokens), self._of([one for one, its in zip(self.slices, chosen, strict=True) if its])

    def remember(self, slot: int, k: Tensor, v: Tensor) -> None:
        assert self.exits is not None
        for own in self.exits.later_loops(self.slots[slot]):
            if own.attention == "sliding":
                _store(self.cache.rings[own], k, v, *self._ring_slot_mapping)
            else:
                _store(self.cache.pages[own], k, v, *self._page_slot_mapping)

    def kept(self) -> "tuple[Tensor | None, PagedBackend]":
        if all(one.kept == one.count for one in self.slices):
            return None, self
        kept = [replace(one, start=one.end - one.kept, count=one.kept) for one in self.slices if one.kept]
        if any(_is_single(after) and not _is_single(before) for before, after in pairwise(kept)):
            raise AssertionError("a prefill that keeps one token becomes a decode, so it has to come before the other prefills")
        return self._index([token for one, own in self._with_tokens() for token in own[one.count - one.kept :]]), self._of(kept)

    def decode_block_arguments(self, slot: int) -> tuple[Any, ...] | None:
        """The arguments of `run` in `kernels/cpu/operators.cpp`, for a step of decodes that all write to the caches."""
        if self.prefills:
            return None
        kind = self.slots[slot].attention
        tokens: Tensor | None
        slot_mapping: Tensor | None
        if kind == "sliding":
            if self._ring_turns:
                return None
            storage, (block_table, lengths) = self.cache.rings[self.slots[slot]], self._ring_reads
            tokens, slot_mapping = self._ring_slot_mapping
        else:
            storage = self.cache.read_by(self.slots[slot]) if kind == "cross" else self.cache.pages[self.slots[slot]]
            block_table, lengths = self._block_tables, self._seats_and_lengths[1]
            tokens, slot_mapping = self._page_slot_mapping if kind != "cross" else (None, None)
        if tokens is not None:
            return None
        return *self._rotary, storage.data, storage.scales, block_table, storage.block_size, lengths, slot_mapping

    def rotate(self, x: Tensor) -> Tensor:
        return rotate(x, self._rotary)

    def sliding_attention(self, slot: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ring = self.cache.rings[self.slots[slot]]
        out = torch.empty_like(q)
        for one, tokens in self.prefills:  # before their own keys overwrite what they still see
            past_k, past_v = ring.read(self._ring_past(one), q.dtype)
            keys, values = (torch.cat([p, ring.as_stored(x[:, tokens])], dim=1) for p, x in ((past_k, k), (past_v, v)))
            out[:, tokens] = chunk_attention(q[:, tokens], keys, values, self.architecture.window)
        _store(ring, k, v, *self._ring_slot_mapping)
        if self.decodes and not self._ring_turns:
            self._decode(out, q, ring, *self._ring_reads)
        for turn, (own, rows, block_table, lengths) in enumerate(self._ring_turns):
            if turn:  # what these overwrite, the tokens before them have seen
                ring.store(rows, k[0, own], v[0, own])
            out[0, own] = decode_attention(q[0, own], ring.data, ring.scales, block_table, ring.block_size, lengths)
        return out

    def full_attention(self, slot: int, q: Tensor, k: Tensor, v: Tensor, prefix: tuple[Tensor, Tensor] | None) -> Tensor:
        pages = self.cache.pages[self.slots[slot]]
        _store(pages, k, v, *self._page_slot_mapping)
        return self._attend_pages(pages, q, prefix)

    def global_kvs(self, new: Sequence[tuple[Tensor, Tensor]]) -> Sequence[tuple[Tensor, Tensor]]:
        for storage, (k, v) in zip(self.cache.global_kvs, new, strict=True):
            _store(storage, k, v, *self._page_slot_mapping)
        return new

    def cross_attention(self, slot: int, q: Tensor, global_kv: tuple[Tensor, Tensor]) -> Tensor:
        return self._attend_pages(self.cache.read_by(self.slots[slot]), q, None)

    def retention(self, slot: int, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        states, seats = self.cache.states[self.slots[slot]], self._seats_and_lengths[0] if self.decodes else None
        return step_retention(q, k, v, log_decay, states, seats, [one for one, _ in self.prefills])

    def _attend_pages(self, pages: KVStorage, q: Tensor, prefix: tuple[Tensor, Tensor] | None) -> Tensor:
        out = torch.empty_like(q)
        by_itself = self.prefills
        if prefix is not None:  # the decode kernel knows no prefix
            by_itself = [(one, slice(i, i + 1)) for i, one in enumerate(self.decodes)] + by_itself
        for one, tokens in by_itself:
            k, v = pages.read(_page_rows(one, 0, pages.block_size), q.dtype)
            if prefix is not None:
                k, v = (torch.cat([p.to(x.dtype)[None], x], dim=1) for p, x in zip(prefix, (k, v), strict=True))
            out[:, tokens] = chunk_attention(q[:, tokens], k, v, None)
        if self.decodes and prefix is None:
            self._decode(out, q, pages, self._block_tables, self._seats_and_lengths[1])
        return out

    def _decode(self, out: Tensor, q: Tensor, storage: KVStorage, block_table: Tensor, lengths: Tensor) -> None:
        n = len(self.decodes)
        out[0, :n] = decode_attention(q[0, :n], storage.data, storage.scales, block_table, storage.block_size, lengths)

    # What follows is made once a step and used by every layer.

    @cached_property
    def _rotary(self) -> tuple[Tensor, Tensor]:
        chunks = [torch.arange(one.start, one.end, device=self.cache.device) for one, _ in self.prefills]
        positions = torch.cat([self._index([one.start for one in self.decodes]), *chunks])
        a = self.architecture
        return rotary_angles(positions[None], a.head_dim, a.rope_theta, a.rotary_scaling)

    @cached_property
    def _seats_and_lengths(self) -> tuple[Tensor, Tensor]:
        """Of the decodes: their seats, (decodes,) int32, and how many tokens each sees, (decodes,) int64."""
        seats = torch.tensor([one.seat for one in self.decodes], dtype=torch.int32, device=self.cache.device)
        return seats, self._index([one.end for one in self.decodes])

    @cached_property
    def _ring_reads(self) -> tuple[Tensor, Tensor]:
        """Rings as the decode kernel reads them: block tables with the seat as the only block, and how many rows are seen."""
        seats, lengths = self._seats_and_lengths
        return seats[:, None], lengths.clamp(max=self._ring_rows)

    @cached_property
    def _ring_turns(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """The first token of each sequence, then the second, and so on: indices, rows of the rings, and as in `_ring_reads`.

        In a ring that is full, a token's row is that of a token which those before it in the same sequence still see. So they
        attend before it is written. Empty where all may be written at once.
        """
        window = self._ring_rows
        if not any(self._turns) or all(one.end <= window for one in self.decodes):
            return []
        rows = self._index([one.seat * window + one.start % window for one in self.decodes])
        block_table, lengths = self._ring_reads
        found = []
        for turn in range(max(self._turns) + 1):
            own = self._index([index for index, its in enumerate(self._turns) if its == turn])
            found.append((own, rows[own], block_table[own], lengths[own]))
        return found

    @cached_property
    def _block_tables(self) -> Tensor:
        """Of the decodes, (decodes, blocks) int32, zero behind the end of a shorter one."""
        longest = max(len(one.block_table) for one in self.decodes)
        tables = [torch.nn.functional.pad(one.block_table, (0, longest - len(one.block_table))) for one in self.decodes]
        return torch.stack(tables)

    @cached_property
    def _page_slot_mapping(self) -> tuple[Tensor | None, Tensor]:
        """Which tokens of the step are written to the pages, None for all of them, and to which rows."""
        size = self.cache.shape.block_size
        written: list[int] = []
        mapping = []
        for one, own in self._with_tokens():
            first = min(max(one.start, one.written), one.end)
            written += own[first - one.start :]
            if first < one.end:
                rows = _page_rows(one, first, size)
                if isinstance(rows, slice):
                    rows = torch.arange(rows.start, rows.stop, device=self.cache.device)
                mapping.append(rows)
        return self._all_or(written), torch.cat(mapping) if mapping else self._index([])

    @cached_property
    def _ring_slot_mapping(self) -> tuple[Tensor | None, Tensor]:
        """The same of the rings, of the first turn; only the last `window` tokens of a longer chunk are written."""
        window = self._ring_rows
        written: list[int] = []
        mapping = []
        for one, own in self._with_tokens():
            stays = own[:1] if self._ring_turns and _is_single(one) else own[-window:]
            written += stays
            first = one.start + stays.start - own.start
            positions = torch.arange(first, first + len(stays), device=self.cache.device)
            mapping.append(positions % window + one.seat * window)
        return self._all_or(written), torch.cat(mapping)

    def _ring_past(self, one: SequenceSlice) -> Tensor:
        """The rows of a ring that hold what a chunk sees from before itself, oldest first."""
        window = self._ring_rows
        past = torch.arange(max(0, one.start - window + 1), one.start, device=self.cache.device)
        return past % window + one.seat * window

    @property
    def _ring_rows(self) -> int:
        assert self.cache.shape.window is not None
        return self.cache.shape.window

    def _of(self, slices: Sequence[SequenceSlice]) -> "PagedBackend":
        return PagedBackend(slices, self.cache, self.architecture, self.slots, self.exits)

    def _with_tokens(self) -> Iterator[tuple[SequenceSlice, range]]:
        return zip(self.slices, self.tokens, strict=True)

    def _all_or(self, tokens: list[int]) -> Tensor | None:
        """Indices of some of the step's tokens; None where it is all of them."""
        return None if len(tokens) == self.tokens[-1].stop else self._index(tokens)

    def _index(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.cache.device)


def _is_single(one: SequenceSlice) -> bool:
    """Whether a slice is a decode, or several of one sequence."""
    return one.count == 1 or one.one_by_one


def _store(storage: KVStorage, k: Tensor, v: Tensor, tokens: Tensor | None, slot_mapping: Tensor) -> None:
    """Write the keys and values (1, tokens, kv_heads, head_dim) of some tokens of a step, None for all, to their rows."""
    storage.store(slot_mapping, *((k[0], v[0]) if tokens is None else (k[0, tokens], v[0, tokens])))


def _page_rows(one: SequenceSlice, first: int, block_size: int) -> Tensor | slice:
    """Rows of the pages that hold tokens first .. end - 1 of a sequence; a slice where its blocks follow each other."""
    skipped = first // block_size
    blocks = one.block_table[skipped : -(-one.end // block_size)].long()
    if bool((blocks.diff() == 1).all()):
        start = int(blocks[0]) * block_size + first - skipped * block_size
        return slice(start, start + one.end - first)
    rows = blocks[:, None] * block_size + torch.arange(block_size, device=blocks.device)
    return rows.flatten()[first - skipped * block_size :][: one.end - first]
