"""Decode steps on a GPU, replayed as CUDA graphs: one graph for each part of the model and each bucket of batch sizes.

A step in which every request runs one token launches hundreds of kernels of a few microseconds; launched one by one they would
leave the GPU waiting for the host. A graph launches them all at once, but with the addresses and shapes of its recording. So
what changes from step to step is written into tensors that stay in place, and the batch is padded up to a bucket.

The model is cut into segments where the number of running requests may change: one for each loop after the first of a looped
stage, and what lies between. Requests stand in falling order of their loop counts, so that a loop's segment runs on the first
rows; rows that need no more loops, and padding, come out of it as they went in and write nothing to the caches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from yoco_u.architecture import Architecture, Slot
from yoco_u.inference.block_tables import BlockTables
from yoco_u.inference.gpu_backend import DecodeBackend
from yoco_u.inference.gpu_plan import DecodePlan, Decodes, decode_arrays, token_arrays
from yoco_u.inference.kernels.gpu.splits import SplitPlan, plan_splits, split_capacity
from yoco_u.inference.kv_cache import KVCache
from yoco_u.inference.packed_upload import StaticArrays
from yoco_u.inference.sequence_slice import SequenceSlice
from yoco_u.model import YocoUForCausalLM
from yoco_u.model.feed_forward import experts_wait
from yoco_u.model.rope import rotary_angles

Slots: TypeAlias = tuple[Slot, ...]

Capture: TypeAlias = Callable[[Callable[[], None]], Callable[[], None]]
"""Records what a function does to tensors, and returns a function that does it again."""


def cuda_graphs(device: torch.device) -> Capture:
    """Recording as CUDA graphs, which share one pool of memory."""
    pool, stream = torch.cuda.graph_pool_handle(), _recording_stream(device)

    def capture(function: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(graph, pool, stream, "thread_local"):
            function()
        return graph.replay

    return capture


@cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream of this device, where torch's own is of the device that recorded first. Products keep memory for each stream."""
    return torch.cuda.Stream(device)


def capture_on(device: torch.device, architecture: Architecture, dtype: torch.dtype) -> Capture | None:
    """How segments are recorded on a device: as CUDA graphs where there is CUDA, unless the model has operations that wait."""
    if device.type != "cuda" or (architecture.experts is not None and experts_wait(device, dtype)):
        return None
    return cuda_graphs(device)


def buckets(largest: int) -> list[int]:
    """The batch sizes that graphs are recorded for: powers of two up to 16, then every 16, then the largest."""
    return [*(size for size in (1, 2, 4, 8, *range(16, largest, 16)) if size < largest), largest]


@dataclass(frozen=True)
class Segment:
    """A part of the model that runs on the same requests throughout.

    Attributes:
        loop: it runs for requests of more loops than this.
        applications: what it applies, in order: stage, and loop of the stage.
        is_first, is_last: whether it begins with the embedding, and ends with the LM head.
    """

    loop: int
    applications: tuple[tuple[int, int], ...]
    is_first: bool
    is_last: bool


def segments(architecture: Architecture, looped_stages: Sequence[int]) -> list[Segment]:
    """The segments of a forward pass, in order. The first and the last one are the same whatever the loop count.

    Args:
        looped_stages: the stages in which requests may differ in their loop counts.
    """
    found: list[tuple[int, list[tuple[int, int]]]] = [(0, [])]
    for index, stage in enumerate(architecture.stages):
        for loop in range(stage.loops):
            if loop > 0:
                found.append((loop, []))
            found[-1][1].append((index, loop))
        if index in looped_stages:
            found.append((0, []))
    last = len(found) - 1
    return [Segment(loop, tuple(parts), number == 0, number == last) for number, (loop, parts) in enumerate(found)]


class DecodeGraphs:
    """Runs the steps in which every request runs one token and wants its logits.

    Args:
        tables: the block tables of all seats.
        capture: how segments are recorded; None to run them operation by operation.
    """

    def __init__(self, model: YocoUForCausalLM, cache: KVCache, tables: BlockTables, capture: Capture | None) -> None:
        self.model, self.cache, self.tables, self.capture = model, cache, tables, capture
        self.architecture, rows = model.config.architecture, cache.shape.max_num_seqs
        self.rows, self.buckets = rows, buckets(rows)
        self.capacity = split_capacity(rows, cache.kv_heads, cache.device)
        self.static = StaticArrays(self._arrays([], []), cache.device)
        a, device = self.architecture, cache.device
        streams = (a.parallel.streams,) if a.parallel else ()
        self.hidden = torch.zeros(1, rows, *streams, a.hidden_size, dtype=model.dtype, device=device)
        self.logits = torch.zeros(rows, a.vocab_size, dtype=model.dtype, device=device)
        self.rotary = (torch.zeros(1, rows, 1, a.head_dim, device=device), torch.zeros(1, rows, 1, a.head_dim, device=device))
        self.block_tables = torch.zeros_like(tables.on_device)
        self._replays: dict[tuple[Segment, int], Callable[[], None] | None] = {}  # None: has run once, and is not recorded yet

    def run(self, slices: Sequence[SequenceSlice], ids: list[int], architecture: Architecture, slots: Slots) -> Tensor:
        """Run one token of each request; requests come in falling order of their loop counts.

        Args:
            architecture: at the largest loop count.
            slots: `architecture.slots()`.

        Returns:
            Logits (requests, vocab), which the next call overwrites.
        """
        self.static.write(self._arrays(slices, ids))
        for segment in segments(architecture, self.architecture.loopable_stages):
            running = sum(one.num_loops > segment.loop for one in slices)
            bucket = next(size for size in self.buckets if size >= running)
            self._replay((segment, bucket), partial(self._run, segment, bucket, architecture, slots))
        return self.logits[: len(slices)]

    def _replay(self, key: tuple[Segment, int], function: Callable[[], None]) -> None:
        """Run a segment: as it is the first time, which compiles its kernels; recorded the second time, and replayed since."""
        if self.capture is None or key not in self._replays:
            self._replays[key] = None
            function()
            return
        replay = self._replays[key]
        if replay is None:
            replay = self._replays[key] = self.capture(function)
        replay()

    def _run(self, segment: Segment, bucket: int, architecture: Architecture, slots: Slots) -> None:
        model, static = self.model.model, self.static.tensors
        if segment.is_first:
            a = architecture
            angles = rotary_angles(static["positions"][None, :bucket], a.head_dim, a.rope_theta, a.rotary_scaling)
            for place, angle in zip(self.rotary, angles, strict=True):
                place[:, :bucket].copy_(angle)
            self.block_tables[:bucket].copy_(self.tables.on_device.index_select(0, static["seats"][:bucket]))
            before = model.streams(model.embed_tokens(static["ids"][None, :bucket]))
        else:
            before = self.hidden[:, :bucket]
        runs = static["loops"][:bucket] > segment.loop
        backend = DecodeBackend(self._plan(bucket, runs), self.cache, architecture, slots)
        backend.rotary = self.rotary[0][:, :bucket], self.rotary[1][:, :bucket]

        x = before
        for stage, loop in segment.applications:
            global_kvs: Sequence[tuple[Tensor, Tensor]] = ()
            if architecture.stages[stage].attention == "cross":
                if loop == 0 and architecture.stages[stage - 1].attention != "cross":
                    assert model.global_kv is not None
                    backend.global_kvs(model.global_kv(x, backend))
                global_kvs = [(x, x)] * architecture.global_kvs  # the backend reads the pages instead
            stack: Any = model.stages[stage]
            first_slot = next(number for number, slot in enumerate(slots) if slot.stage == stage)
            x, _ = stack.run_loop(x, backend, loop, first_slot, global_kvs)
        if segment.loop:
            x = torch.where(runs.view(1, -1, *[1] * (x.ndim - 2)), x, before)
        if segment.is_last:
            self.logits[:bucket].copy_(self.model.lm_head(model.final_norm(x))[0])
        else:
            self.hidden[:, :bucket].copy_(x)

    def _plan(self, bucket: int, runs: Tensor) -> DecodePlan:
        """The plan of the first `bucket` rows, of which those that do not run change nothing."""
        static = self.static.tensors
        names = ("page_slots", "ring_slots", "seats") if "ring_slots" in static else ("page_slots", "seats")
        rows = {name: torch.where(runs, static[name][:bucket], -1) for name in names}
        splits = SplitPlan(static["sequence"], static["first"], static["last"], static["offsets"][: bucket + 1])
        return DecodePlan(
            num_decodes=bucket,
            tokens=rows,
            decodes=Decodes(
                seats=rows["seats"],
                block_tables=self.block_tables[:bucket],
                lengths=static["lengths"][:bucket],
                ring_lengths=static["ring_lengths"][:bucket],
                splits=splits,
            ),
        )

    def _arrays(self, slices: Sequence[SequenceSlice], ids: list[int]) -> dict[str, NDArray[Any]]:
        """What changes from step to step, padded to all rows; padding has no loops, sees no token and is written nowhere."""
        slots = token_arrays(slices, self.tables, self.cache.shape)
        arrays = decode_arrays(slices, self.cache.shape) | {
            "ids": np.array(ids, dtype=np.int64),
            "positions": slots.pop("positions"),
            "loops": np.array([one.num_loops for one in slices], dtype=np.int32),
        }
        padded = {name: self._padded(array, 0) for name, array in arrays.items()}
        padded |= {name: self._padded(array, -1) for name, array in slots.items()}
        return padded | plan_splits(padded["lengths"], self.capacity)

    def _padded(self, array: NDArray[Any], value: int) -> NDArray[Any]:
        found = np.full(self.rows, value, array.dtype)  # np.pad does the same at ten times the cost
        found[: len(array)] = array
        return found
