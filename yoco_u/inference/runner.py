"""From a step of the scheduler to logits: the one place where the engine calls the model."""

from functools import lru_cache

import torch
from torch import Tensor

from yoco_u.architecture import Architecture
from yoco_u.device import upload
from yoco_u.free_cores import FreeCores
from yoco_u.inference.block_tables import BlockTables
from yoco_u.inference.decode_graphs import Capture, DecodeGraphs, Slots, cuda_graphs
from yoco_u.inference.gpu_backend import GpuBackend
from yoco_u.inference.gpu_plan import StepPlan
from yoco_u.inference.kv_cache import CacheShape, KVCache
from yoco_u.inference.paged_backend import PagedBackend
from yoco_u.inference.request import Request
from yoco_u.inference.scheduler import Chunk, Step
from yoco_u.inference.sequence_slice import SequenceSlice
from yoco_u.model import YocoUForCausalLM
from yoco_u.model.backend import AttentionBackend


class Runner:
    """The model and its caches.

    Args:
        on_gpu: whether to run as on a GPU, see `gpu_backend.py`; by default on every device but a CPU.
        capture: how decode steps are recorded there; by default as CUDA graphs where there is CUDA, and not at all elsewhere.

    Attributes:
        cache: the memory of all sequences.
    """

    def __init__(
        self,
        model: YocoUForCausalLM,
        shape: CacheShape,
        on_gpu: bool | None = None,
        capture: Capture | None = None,
    ) -> None:
        self.model, self.architecture = model, model.config.architecture
        self.device = model.device
        self.cache = KVCache(self.architecture, shape, self.device)
        self.tables = BlockTables(shape.max_num_seqs, shape.num_blocks, self.device)
        self._at_loops = lru_cache(self._with_loops)
        self._free_cores = FreeCores() if self.device.type == "cpu" else None
        self.decode_graphs: DecodeGraphs | None = None
        if self.device.type != "cpu" if on_gpu is None else on_gpu:
            if capture is None and self.device.type == "cuda":
                capture = cuda_graphs(self.device)
            self.decode_graphs = DecodeGraphs(model, self.cache, self.tables, capture)

    @torch.inference_mode()
    def run(self, step: Step) -> list[tuple[Chunk, Tensor]]:
        """Compute all chunks of a step.

        Returns:
            The chunks that logits are asked of, each with the logits of its last positions, (kept, vocab): one row for each
            prompt token that is scored, and one to sample from. The next step may overwrite them.
        """
        if self._free_cores is not None:
            self._free_cores.follow()
        for request, state in step.restores:
            assert request.seat is not None
            self.cache.restore(request.seat, request.num_loops, state)  # type: ignore[arg-type]
        for chunk in step.chunks:
            if chunk.start == 0 and self.cache.states:
                assert chunk.request.seat is not None
                self.cache.clear(chunk.request.seat)

        # Decodes come first, and where loop counts differ, those of more loops.
        chunks = sorted(step.chunks, key=lambda c: (c.count > 1, kept_positions(c) > 1, -c.request.num_loops))
        architecture, slots = self._at_loops(max(chunk.request.num_loops for chunk in chunks))
        slices = [self._slice(chunk) for chunk in chunks]
        ids = [token for c in chunks for token in c.request.token_slice(c.start, c.end)]
        logits = self._logits(slices, ids, architecture, slots)
        asked = [chunk for chunk in chunks if kept_positions(chunk)]
        return list(zip(asked, logits.split([kept_positions(chunk) for chunk in asked]), strict=True))

    def _logits(self, slices: list[SequenceSlice], ids: list[int], architecture: Architecture, slots: Slots) -> Tensor:
        """Logits of the kept tokens of all slices, (kept, vocab)."""
        backend: AttentionBackend
        if self.decode_graphs is None:
            backend = PagedBackend(slices, self.cache, architecture, slots)
        else:
            self.tables.flush()
            if all(one.count == one.kept == 1 for one in slices):
                return self.decode_graphs.run(slices, ids, architecture, slots)
            backend = GpuBackend(StepPlan(slices, self.tables, self.cache), self.cache, architecture, slots)
        x = self.model.model.embed_tokens(upload([ids], self.device))
        hidden, _ = self.model.model.run_stages(x, backend, architecture)
        return self.model.lm_head(hidden)[0] if hidden.shape[1] else hidden[0]

    def window_state(self, request: Request) -> tuple[list[Tensor], int]:
        """A copy of a running request's window state, and its bytes."""
        assert request.seat is not None
        state = self.cache.window_state(request.seat, request.num_loops)
        return state, sum(tensor.nbytes for tensor in state)

    def _with_loops(self, loops: int) -> tuple[Architecture, Slots]:
        architecture = self.architecture.with_loops(loops)
        return architecture, architecture.slots()

    def _slice(self, chunk: Chunk) -> SequenceSlice:
        request = chunk.request
        assert request.seat is not None
        return SequenceSlice(
            start=chunk.start,
            count=chunk.count,
            kept=kept_positions(chunk),
            written=request.written,
            seat=request.seat,
            block_table=self.tables.of(request),
            num_loops=request.num_loops,
        )


def kept_positions(chunk: Chunk) -> int:
    """How many positions of a chunk, the last ones, need logits."""
    if chunk.request.scores:
        return max(0, chunk.end - max(chunk.start, chunk.request.unscored - 1))
    return int(chunk.samples)
