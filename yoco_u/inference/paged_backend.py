"""The sequences of one engine step, as the model's blocks see them: tokens of many requests side by side, no padding.

A step is one row of tokens, (1, tokens): first the requests that run a single token, which is decoding, then those that run a
chunk of their prompt. Single tokens attend together, whatever their lengths, through `yoco_u.inference.kernels`; each chunk
attends to its own past and itself through `yoco_u.model.cpu_attention`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from yoco_u.architecture import Architecture
from yoco_u.inference.kernels import decode_attention
from yoco_u.inference.kernels.cpu import compiled
from yoco_u.inference.kv_cache import KVCache, Rows
from yoco_u.model.attention import attend, full_mask, sliding_attention, sliding_mask
from yoco_u.model.backend import runs_blockwise
from yoco_u.model.cpu_attention import block_attention
from yoco_u.model.retention import chunked_retention, recurrent_retention
from yoco_u.model.rope import rotary_angles, rotate


@dataclass(frozen=True)
class Span:
    """What one request runs in a step.

    Attributes:
        start, count: its tokens start .. start + count - 1.
        kept: how many of them, the last ones, have their logits asked for.
        written: keys and values before this position are in the pages already, in blocks that others share.
        seat: row of the rings.
        table: its blocks, (blocks,) int32.
        num_loops: T of the request.
    """

    start: int
    count: int
    kept: int
    written: int
    seat: int
    table: Tensor
    num_loops: int

    @property
    def end(self) -> int:
        return self.start + self.count


class StepSequences:
    """`Sequences` of one step over the engine's caches.

    Args:
        spans: single tokens first.
        slots: names of the model's slots by number, see `KVCache`.
    """

    has_cache = True

    def __init__(self, spans: Sequence[Span], cache: KVCache, slots: Sequence[tuple[int, int, int]], a: Architecture) -> None:
        self.spans, self.cache, self.slots, self.architecture = spans, cache, slots, a
        ends = list(accumulate(span.count for span in spans))
        self.rows = [range(end - span.count, end) for span, end in zip(spans, ends, strict=True)]  # of the step, by span
        self.singles = [span for span in spans if span.count == 1]
        self.chunks = [(span, slice(rows.start, rows.stop)) for span, rows in self._with_rows() if span.count > 1]
        self._in_loop: dict[int, tuple[Tensor | None, StepSequences]] = {}

    def in_loop(self, loop: int) -> "tuple[Tensor | None, StepSequences]":
        remaining = [span for span in self.spans if span.num_loops > loop]
        if len(remaining) not in self._in_loop:
            self._in_loop[len(remaining)] = self._select(remaining, [span.num_loops > loop for span in self.spans])
        return self._in_loop[len(remaining)]

    def kept(self) -> "tuple[Tensor | None, StepSequences]":
        narrowed = [replace(span, start=span.end - span.kept, count=span.kept) for span in self.spans if span.kept]
        if all(span.kept == span.count for span in self.spans):
            return None, self
        rows = [row for span, own in self._with_rows() for row in own[span.count - span.kept :]]
        order = sorted(range(len(narrowed)), key=lambda i: narrowed[i].count > 1)  # a chunk may have become a single token
        if order != list(range(len(narrowed))):
            raise AssertionError("chunks that keep one token come before those that keep more")
        return self._index(rows), StepSequences(narrowed, self.cache, self.slots, self.architecture)

    def of_single_tokens(self, kind: str, slot: int) -> tuple[Any, ...] | None:
        """Arguments of `run` in `kernels/decode_block.cpp` behind the hidden states, for a block of this kind of attention.

        Returns:
            None if the step has more than single tokens, or one whose keys and values are in the pages already.
        """
        if self.chunks:
            return None
        writes: tuple[Tensor | None, Tensor | None]
        if kind == "sliding":
            rows, table, lengths, writes = self.cache.rings[self.slots[slot]], *self._ring_reads, self._ring_writes
        else:
            rows = self.cache.pages[None if kind == "cross" else self.slots[slot]]
            table, lengths = self._tables, self._seats[1]
            writes = (None, None) if kind == "cross" else self._page_writes
        tokens, places = writes
        if tokens is not None:
            return None
        return *self._rotary, rows.data, rows.scales, table, rows.block_size, lengths, places

    def rotate(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.dtype == torch.bfloat16 and compiled():
            return torch.ops.yoco_u.rotate(x, *self._rotary)
        return rotate(x, self._rotary)

    def sliding_attention(self, slot: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ring = self.cache.rings[self.slots[slot]]
        out = torch.empty_like(q)
        for span, rows in self.chunks:
            past_k, past_v = ring.read(self._ring_past(span), q.dtype)
            keys, values = (torch.cat([p, ring.seen(x[:, rows])], dim=1) for p, x in ((past_k, k), (past_v, v)))
            assert self.architecture.window is not None
            out[:, rows] = _chunk_attention(q[:, rows], keys, values, self.architecture.window)
        _store(ring, k, v, *self._ring_writes)
        if self.singles:
            self._decode(out, q, ring, *self._ring_reads)
        return out

    def full_attention(self, slot: int, q: Tensor, k: Tensor, v: Tensor, prefix: tuple[Tensor, Tensor] | None) -> Tensor:
        pages = self.cache.pages[self.slots[slot]]
        _store(pages, k, v, *self._page_writes)
        return self._attend_pages(pages, q, prefix)

    def global_kv(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        _store(self.cache.pages[None], k, v, *self._page_writes)
        return k, v

    def cross_attention(self, q: Tensor, global_kv: tuple[Tensor, Tensor]) -> Tensor:
        return self._attend_pages(self.cache.pages[None], q, None)

    def retention(self, slot: int, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        states = self.cache.states[self.slots[slot]]
        out = torch.empty_like(q)
        if self.singles:
            seats, _ = self._seats
            n = len(self.singles)
            new, states[seats] = recurrent_retention(
                q[0, :n, None], k[0, :n, None], v[0, :n, None], log_decay[0, :n, None], states[seats]
            )
            out[0, :n] = new[:, 0]
        for span, rows in self.chunks:
            out[:, rows], states[span.seat, None] = chunked_retention(
                q[:, rows], k[:, rows], v[:, rows], log_decay[:, rows], states[span.seat, None]
            )
        return out

    def _attend_pages(self, pages: Rows, q: Tensor, prefix: tuple[Tensor, Tensor] | None) -> Tensor:
        out = torch.empty_like(q)
        alone = [] if prefix is None else [(span, slice(i, i + 1)) for i, span in enumerate(self.singles)]
        for span, rows in alone + self.chunks:
            k, v = pages.read(_page_rows(span, 0, pages.block_size), q.dtype)
            if prefix is not None:
                k, v = (torch.cat([p.to(x.dtype)[None], x], dim=1) for p, x in zip(prefix, (k, v), strict=True))
            out[:, rows] = _chunk_attention(q[:, rows], k, v, None)
        if self.singles and prefix is None:
            self._decode(out, q, pages, self._tables, self._seats[1])
        return out

    def _decode(self, out: Tensor, q: Tensor, rows: Rows, table: Tensor, lengths: Tensor) -> None:
        n = len(self.singles)
        out[0, :n] = decode_attention(q[0, :n], rows.data, rows.scales, table, rows.block_size, lengths)

    # What follows is worked out once a step and used by every layer.

    @cached_property
    def _rotary(self) -> tuple[Tensor, Tensor]:
        chunks = [torch.arange(span.start, span.end, device=self.cache.device) for span, _ in self.chunks]
        positions = torch.cat([self._index([span.start for span in self.singles]), *chunks])
        return rotary_angles(positions[None], self.architecture.head_dim, self.architecture.rope_theta)

    @cached_property
    def _seats(self) -> tuple[Tensor, Tensor]:
        """Seats (int32) and lengths of the single tokens' sequences."""
        seats = torch.tensor([span.seat for span in self.singles], dtype=torch.int32, device=self.cache.device)
        return seats, self._index([span.end for span in self.singles])

    @cached_property
    def _ring_reads(self) -> tuple[Tensor, Tensor]:
        """Which block of a ring is whose, as a table of one block each, and how many of its rows are seen."""
        assert self.cache.shape.window is not None
        seats, lengths = self._seats
        return seats[:, None], lengths.clamp(max=self.cache.shape.window)

    @cached_property
    def _tables(self) -> Tensor:
        """Block tables of the single tokens' sequences, (sequences, blocks) int32; unused behind a sequence's end."""
        longest = max(len(span.table) for span in self.singles)
        return torch.stack([torch.nn.functional.pad(span.table, (0, longest - len(span.table))) for span in self.singles])

    @cached_property
    def _page_writes(self) -> tuple[Tensor | None, Tensor]:
        """Which tokens of the step go to which rows of the pages; None for all tokens."""
        size = self.cache.shape.block_size
        tokens: list[int] = []
        places = []
        for span, own in self._with_rows():
            first = min(max(span.start, span.written), span.end)
            tokens += own[first - span.start :]
            if first < span.end:
                rows = _page_rows(span, first, size)
                places.append(
                    rows if isinstance(rows, Tensor) else torch.arange(rows.start, rows.stop, device=self.cache.device)
                )
        found = torch.cat(places) if places else self._index([])
        return self._tokens(tokens), found

    @cached_property
    def _ring_writes(self) -> tuple[Tensor | None, Tensor]:
        """The same for the rings: of a chunk longer than the window only the end stays."""
        window = self.cache.shape.window
        assert window is not None
        tokens: list[int] = []
        places = []
        for span, own in self._with_rows():
            stays = min(span.count, window)
            tokens += own[span.count - stays :]
            places.append(torch.arange(span.end - stays, span.end, device=self.cache.device) % window + span.seat * window)
        return self._tokens(tokens), torch.cat(places)

    def _ring_past(self, span: Span) -> Tensor:
        """Rows of the ring with what a chunk's tokens see before the chunk, in order."""
        window = self.cache.shape.window
        assert window is not None
        past = torch.arange(max(0, span.start - window + 1), span.start, device=self.cache.device)
        return past % window + span.seat * window

    def _select(self, spans: list[Span], chosen: list[bool]) -> "tuple[Tensor | None, StepSequences]":
        if all(chosen):
            return None, self
        rows = [row for own, runs in zip(self.rows, chosen, strict=True) if runs for row in own]
        return self._index(rows), StepSequences(spans, self.cache, self.slots, self.architecture)

    def _with_rows(self) -> Iterator[tuple[Span, range]]:
        return zip(self.spans, self.rows, strict=True)

    def _tokens(self, chosen: list[int]) -> Tensor | None:
        """Some tokens of the step; None for all."""
        return None if len(chosen) == self.rows[-1].stop else self._index(chosen)

    def _index(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.cache.device)


def _store(rows: Rows, k: Tensor, v: Tensor, tokens: Tensor | None, places: Tensor) -> None:
    """Write keys and values (1, tokens, kv_heads, head_dim) of some tokens of a step, None for all, to their places."""
    rows.store(places, *((k[0], v[0]) if tokens is None else (k[0, tokens], v[0, tokens])))


def _page_rows(span: Span, first: int, block_size: int) -> Tensor | slice:
    """Rows of the pages that hold a sequence's tokens first .. end - 1; a slice where its blocks follow each other."""
    skipped = first // block_size
    blocks = span.table[skipped : -(-span.end // block_size)].long()
    if bool((blocks.diff() == 1).all()):
        start = int(blocks[0]) * block_size + first - skipped * block_size
        return slice(start, start + span.end - first)
    rows = blocks[:, None] * block_size + torch.arange(block_size, device=blocks.device)
    return rows.flatten()[first - skipped * block_size :][: span.end - first]


def _chunk_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Queries that are the last of the keys' tokens; all (1, tokens, heads, head_dim)."""
    queries, keys = q.shape[1], k.shape[1]
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and compiled():
        return torch.ops.yoco_u.chunk_attention(q, k, v, keys if window is None else window)
    if runs_blockwise(queries, q.device):
        return block_attention(q, k, v, keys if window is None else window, None, None)
    if window is None:
        positions = torch.arange(keys - queries, keys, device=q.device)
        return attend(q, k, v, full_mask(positions, keys, None, q.dtype))
    return sliding_attention(q, k, v, window, sliding_mask(queries, keys - queries, window, None, q.dtype, q.device))
