"""Where the tokens of one engine step stand, as the GPU backend and its kernels read it: made on the host, once a step.

The tokens of a step are one row: first the decodes, requests that run a single token, then the prefills, requests that run a
chunk of their prompt. Nothing here reads a value back from the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from yoco_u.device import upload
from yoco_u.inference.block_tables import BlockTables
from yoco_u.inference.kernels.gpu.splits import SplitPlan, plan_splits, split_capacity
from yoco_u.inference.kernels.varlen import VarlenLengths
from yoco_u.inference.kv_cache import CacheShape, KVCache
from yoco_u.inference.packed_upload import upload_arrays
from yoco_u.inference.sequence_slice import SequenceSlice

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Decodes:
    """The decodes of a step, as tensors on the device.

    Attributes:
        seats: of each, (decodes,) int64; -1 for one that must change nothing.
        block_tables: (decodes, blocks) int32.
        lengths: tokens that each sees, itself included, (decodes,) int32.
        ring_lengths: the same within the window.
        splits: how attention over pages is cut into work items.
    """

    seats: Tensor
    block_tables: Tensor
    lengths: Tensor
    ring_lengths: Tensor
    splits: SplitPlan

    @cached_property
    def ring_tables(self) -> Tensor:
        """Rings as block tables: the seat is the only block."""
        return self.seats.clamp(min=0).int()[:, None]

    @cached_property
    def ring_splits(self) -> SplitPlan:
        """A window is short enough for one work item."""
        return SplitPlan.undivided(self.ring_lengths)


@dataclass(frozen=True)
class RingKeys:
    """Where the keys of prefills come from in sliding layers: for each sequence those of its ring, then those of its chunk.

    Attributes:
        lengths: of the sequences.
        ring_rows: rows of the rings that hold keys of earlier steps, (cached,) int64.
        ring_places: the places of these among all keys, (cached,) int64.
        chunk_places: the places of the chunks' keys among all keys, (queries,) int64.
    """

    lengths: VarlenLengths
    ring_rows: Tensor
    ring_places: Tensor
    chunk_places: Tensor


@dataclass(frozen=True)
class PageKeys:
    """Where the keys of prefills come from in layers over pages, in which the chunks' own keys lie already.

    Attributes:
        lengths: of the sequences, whose keys begin with a learned prefix.
        rows: the row of the pages that holds each key, (keys,) int64; any row for a key of the prefix.
        prefix_places: the places of the prefixes among all keys, (prefills * prefix,) int64.
    """

    lengths: VarlenLengths
    rows: Tensor
    prefix_places: Tensor


@dataclass(frozen=True)
class DecodePlan:
    """The plan of a step of decodes alone.

    Attributes:
        num_decodes: how many there are.
        tokens, decodes: as in `StepPlan`.
    """

    num_decodes: int
    tokens: dict[str, Tensor]
    decodes: Decodes


class StepPlan:
    """The plan of a step, or of the part of it that some layers run.

    Args:
        slices: decodes first.
        tables: of all seats.
        cache: that the step reads and writes.
    """

    def __init__(self, slices: Sequence[SequenceSlice], tables: BlockTables, cache: KVCache) -> None:
        self.slices, self.tables, self.cache = slices, tables, cache
        self.shape, self.device = cache.shape, cache.device
        self.num_decodes = sum(one.count == 1 for one in slices)
        self.prefills = [one for one in slices if one.count > 1]
        self._page_keys: dict[int, PageKeys] = {}

    def last_tokens(self, counts: Sequence[int]) -> "tuple[Tensor | None, StepPlan]":
        """Indices and plan of each sequence's last tokens, so many as `counts` says; None and this plan if that is all of them.

        A prefill of which one token is left becomes a decode, so it has to come before the other prefills.
        """
        own = np.array([one.count for one in self.slices])
        left = np.array(counts)
        if (own == left).all():
            return None, self
        slices = [replace(one, start=one.end - n, count=n) for one, n in zip(self.slices, counts, strict=True) if n]
        if any(before.count > 1 and after.count == 1 for before, after in pairwise(slices)):
            raise AssertionError("a decode stands behind a prefill")
        index = upload(_ranges(np.cumsum(own) - left, left), self.device)
        return index, StepPlan(slices, self.tables, self.cache)

    @cached_property
    def tokens(self) -> dict[str, Tensor]:
        """Of each token: its position, and the rows of pages and rings that it is written to, -1 for none; (tokens,) int64."""
        parts = [token_arrays(self.slices[: self.num_decodes], self.tables, self.shape)]
        parts += [_chunk_arrays(one, self.shape) for one in self.prefills]
        return upload_arrays({name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, self.device)

    @cached_property
    def decodes(self) -> Decodes:
        arrays = decode_arrays(self.slices[: self.num_decodes], self.shape)
        splits = plan_splits(arrays["lengths"], split_capacity(self.num_decodes, self.cache.kv_heads, self.device))
        found = upload_arrays(arrays | splits, self.device)
        longest = max(len(one.block_table) for one in self.slices[: self.num_decodes])
        return Decodes(
            seats=found["seats"],
            block_tables=self.tables.on_device[:, :longest].index_select(0, found["seats"]),
            lengths=found["lengths"],
            ring_lengths=found["ring_lengths"],
            splits=SplitPlan(found["sequence"], found["first"], found["last"], found["offsets"]),
        )

    @cached_property
    def ring_keys(self) -> RingKeys:
        assert self.shape.window is not None
        cached = [_ring_past(one, self.shape.window) for one in self.prefills]
        counts = np.array([one.count for one in self.prefills])
        seen = np.array([len(rows) for rows in cached])
        begins = np.cumsum(seen + counts) - (seen + counts)
        arrays = {
            "ring_rows": np.concatenate(cached),
            "ring_places": _ranges(begins, seen),
            "chunk_places": _ranges(begins + seen, counts),
        }
        found = upload_arrays(arrays | _cu_seqlens(counts, seen + counts), self.device)
        return RingKeys(_lengths(found, counts, seen + counts), *(found[name] for name in arrays))

    def page_keys(self, prefix: int = 0) -> PageKeys:
        """Args:
        prefix: tokens of the learned prefix (ParScale) that every sequence's keys begin with.
        """
        if prefix not in self._page_keys:
            size = self.shape.block_size
            counts = np.array([one.count for one in self.prefills])
            ends = np.array([prefix + one.end for one in self.prefills])
            rows = [np.pad(_page_rows(one, np.arange(one.end), size), (prefix, 0)) for one in self.prefills]
            arrays = {
                "rows": np.concatenate(rows),
                "prefix_places": _ranges(np.cumsum(ends) - ends, np.full(len(ends), prefix)),
            }
            found = upload_arrays(arrays | _cu_seqlens(counts, ends), self.device)
            self._page_keys[prefix] = PageKeys(_lengths(found, counts, ends), *(found[name] for name in arrays))
        return self._page_keys[prefix]


def decode_arrays(slices: Sequence[SequenceSlice], shape: CacheShape) -> dict[str, NDArray[np.int32] | Rows]:
    """Seats and lengths of decodes, see `Decodes`."""
    lengths = np.array([one.end for one in slices], dtype=np.int32)
    return {
        "seats": np.array([one.seat for one in slices], dtype=np.int64),
        "lengths": lengths,
        "ring_lengths": np.minimum(lengths, shape.window or 0).astype(np.int32),
    }


def token_arrays(decodes: Sequence[SequenceSlice], tables: BlockTables, shape: CacheShape) -> dict[str, Rows]:
    """Of the token of each decode: what `StepPlan.tokens` says, all decodes at once."""
    positions = np.array([one.start for one in decodes], dtype=np.int64)
    seats = np.array([one.seat for one in decodes], dtype=np.int64)
    written = np.array([one.written for one in decodes], dtype=np.int64)
    blocks = tables.host.numpy()[seats, positions // shape.block_size].astype(np.int64)
    rows = blocks * shape.block_size + positions % shape.block_size
    arrays = {"positions": positions, "page_slots": np.where(positions < written, -1, rows)}
    return arrays if shape.window is None else arrays | {"ring_slots": seats * shape.window + positions % shape.window}


def _chunk_arrays(one: SequenceSlice, shape: CacheShape) -> dict[str, Rows]:
    """The same of the tokens of a prefill. Of a chunk longer than the window only the last `window` go to the ring."""
    positions = np.arange(one.start, one.end)
    slots = np.where(positions < one.written, -1, _page_rows(one, positions, shape.block_size))
    arrays = {"positions": positions, "page_slots": slots}
    if shape.window is None:
        return arrays
    rows = one.seat * shape.window + positions % shape.window
    return arrays | {"ring_slots": np.where(positions < one.end - shape.window, -1, rows)}


def _cu_seqlens(queries: Rows, keys: Rows) -> dict[str, NDArray[np.int32]]:
    return {
        "cu_queries": np.concatenate([[0], np.cumsum(queries)]).astype(np.int32),
        "cu_keys": np.concatenate([[0], np.cumsum(keys)]).astype(np.int32),
    }


def _lengths(found: dict[str, Tensor], queries: Rows, keys: Rows) -> VarlenLengths:
    return VarlenLengths(found["cu_queries"], found["cu_keys"], queries.tolist(), keys.tolist())


def _ranges(begins: Rows, counts: Rows) -> Rows:
    """The numbers begins[0] .. begins[0] + counts[0] - 1, then those of the next, and so on."""
    return np.concatenate([np.arange(begin, begin + count) for begin, count in zip(begins, counts, strict=True)])


def _page_rows(one: SequenceSlice, positions: Rows, block_size: int) -> Rows:
    """Rows of the pages that hold these positions of a sequence."""
    blocks = one.block_table.numpy()[positions // block_size].astype(np.int64)
    return blocks * block_size + positions % block_size


def _ring_past(one: SequenceSlice, window: int) -> Rows:
    """The rows of a ring that hold what a chunk sees from before itself, oldest first."""
    positions = np.arange(max(0, one.start - window + 1), one.start)
    return one.seat * window + positions % window
