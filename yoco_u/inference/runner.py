"""From a step of the scheduler to logits: the one place where the engine calls the model."""

from functools import lru_cache

import torch
from torch import Tensor

from yoco_u.architecture import Architecture, Slot
from yoco_u.inference.kv_cache import CacheShape, KVCache
from yoco_u.inference.paged_backend import PagedBackend, SequenceSlice
from yoco_u.inference.request import Request
from yoco_u.inference.scheduler import Chunk, Step
from yoco_u.model import YocoUForCausalLM


class Runner:
    """The model and its caches.

    Attributes:
        cache: the memory of all sequences.
    """

    def __init__(self, model: YocoUForCausalLM, shape: CacheShape) -> None:
        self.model, self.architecture = model, model.config.architecture
        self.device = model.device
        self.cache = KVCache(self.architecture, shape, self.device)
        self._tables = torch.zeros(shape.max_num_seqs, shape.num_blocks, dtype=torch.int32)
        # By seat: whose blocks the table's row holds, as (request id, admissions), and how many of them.
        self._tabled: list[tuple[tuple[str, int] | None, int]] = [(None, 0)] * shape.max_num_seqs
        self._at_loops = lru_cache(self._with_loops)

    @torch.inference_mode()
    def run(self, step: Step) -> list[tuple[Chunk, Tensor]]:
        """Compute all chunks of a step.

        Returns:
            The chunks that logits are asked of, each with the logits of its last positions, (kept, vocab): one row for each
            prompt token that is scored, and one to sample from.
        """
        for request, state in step.restores:
            assert request.seat is not None
            self.cache.restore(request.seat, request.num_loops, state)  # type: ignore[arg-type]
        for chunk in step.chunks:
            if chunk.start == 0 and self.cache.states:
                assert chunk.request.seat is not None
                self.cache.clear(chunk.request.seat)

        chunks = sorted(step.chunks, key=lambda chunk: (chunk.count > 1, kept_positions(chunk) > 1))
        loops = max(chunk.request.num_loops for chunk in chunks)
        architecture, slots = self._at_loops(loops)
        backend = PagedBackend([self._slice(chunk) for chunk in chunks], self.cache, architecture, slots)
        ids = [token for c in chunks for token in c.request.token_slice(c.start, c.end)]
        x = self.model.model.embed_tokens(torch.tensor([ids], device=self.device))
        hidden, _ = self.model.model.run_stages(x, backend, architecture)
        logits = self.model.lm_head(hidden)[0] if hidden.shape[1] else hidden[0]  # (kept of all chunks, vocab)
        asked = [chunk for chunk in chunks if kept_positions(chunk)]
        return list(zip(asked, logits.split([kept_positions(chunk) for chunk in asked]), strict=True))

    def window_state(self, request: Request) -> tuple[list[Tensor], int]:
        """A copy of a running request's window state, and its bytes."""
        assert request.seat is not None
        state = self.cache.window_state(request.seat, request.num_loops)
        return state, sum(tensor.nbytes for tensor in state)

    def _with_loops(self, loops: int) -> tuple[Architecture, tuple[Slot, ...]]:
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
            block_table=self._block_table(request).to(self.device),
            num_loops=request.num_loops,
        )

    def _block_table(self, request: Request) -> Tensor:
        """A request's block table, of which only the blocks that are new since the last step are copied."""
        assert request.seat is not None
        owner = request.id, request.admissions
        known_owner, known = self._tabled[request.seat]
        known = known if known_owner == owner else 0
        blocks, table = request.blocks, self._tables[request.seat]
        if len(blocks) > known:
            table[known : len(blocks)] = torch.tensor(blocks[known:], dtype=torch.int32)
        self._tabled[request.seat] = owner, len(blocks)
        return table[: len(blocks)]


def kept_positions(chunk: Chunk) -> int:
    """How many positions of a chunk, the last ones, need logits."""
    if chunk.request.scores:
        return max(0, chunk.end - max(chunk.start, chunk.request.unscored - 1))
    return int(chunk.samples)
