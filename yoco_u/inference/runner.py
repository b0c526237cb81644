"""From a step of the scheduler to logits: the one place where the engine calls the model."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from yoco_u.architecture import Architecture
from yoco_u.device import upload
from yoco_u.free_cores import FreeCores
from yoco_u.inference.block_tables import BlockTables
from yoco_u.inference.decode_graphs import Capture, DecodeGraphs, Slots, capture_on
from yoco_u.inference.exits import ExitRule, Exits
from yoco_u.inference.gpu_backend import GpuBackend
from yoco_u.inference.gpu_plan import StepPlan
from yoco_u.inference.kv_cache import CacheShape, KVCache
from yoco_u.inference.paged_backend import PagedBackend
from yoco_u.inference.request import Request
from yoco_u.inference.sequence_slice import SequenceSlice
from yoco_u.inference.step import Chunk, Step
from yoco_u.inference.token_exits import TokenExits
from yoco_u.model import YocoUForCausalLM
from yoco_u.model.backend import AttentionBackend


class Runner:
    """The model and its caches.

    Args:
        on_gpu: whether to run as on a GPU, see `gpu_backend.py`; by default on every device but a CPU.
        capture: how decode steps are recorded there; by default see `capture_on`.
        exits: how tokens leave the loop, of requests that let them; by their angular distances if None.

    Attributes:
        cache: the memory of all sequences.
        loops_run, tokens_run: loops run since the start, over all tokens that ran through the stage that loops, and how many
            these were.
        last_loops: of requests whose tokens may leave the loop, how many loops each of their tokens ran in the last step.
    """

    def __init__(
        self,
        model: YocoUForCausalLM,
        shape: CacheShape,
        on_gpu: bool | None = None,
        capture: Capture | None = None,
        exits: Exits | None = None,
    ) -> None:
        self.model, self.architecture = model, model.config.architecture
        self.device = model.device
        self.cache = KVCache(self.architecture, shape, self.device)
        self.tables = BlockTables(shape.max_num_seqs, shape.num_blocks, self.device)
        self._at_loops = lru_cache(self._with_loops)
        self._exit_rule = ExitRule(exits, self.device)
        self._loops_kept = self.architecture.stages[self.architecture.loopable_stages[0]].attention == "cross"
        self.loops_run = self.tokens_run = 0
        self.last_loops: dict[Request, list[int]] = {}
        self._free_cores = FreeCores() if self.device.type == "cpu" else None
        self.decode_graphs: DecodeGraphs | None = None
        if self.device.type != "cpu" if on_gpu is None else on_gpu:
            capture = capture or capture_on(self.device, self.architecture, model.dtype)
            self.decode_graphs = DecodeGraphs(model, self.cache, self.tables, capture)

    def begin(self, step: Step) -> None:
        """Prepare for a step: what runs in it may be drafted for afterwards."""
        if self._free_cores is not None:
            self._free_cores.follow()
        for request, state in step.restores:
            assert request.seat is not None
            self.cache.restore(request.seat, request.num_loops, state)  # type: ignore[arg-type]

    @torch.inference_mode()
    def draft(self, chunks: Sequence[Chunk], ids: list[int]) -> tuple[Tensor, Tensor]:
        """Run one token of each of some requests through one loop and the cross-decoder.

        What the first loop writes to the caches is right if the token is; the rest is written again when the token is verified.

        Args:
            chunks: where the tokens stand, of one token each.
            ids: the tokens.

        Returns:
            Logits (chunks, vocab), and the states after the first loop, (1, chunks, [streams,] hidden).
        """
        architecture, slots = self._at_loops(1)
        backend = self._backend([replace(self._slice(one), kept=1, num_loops=1) for one in chunks], architecture, slots)
        model = self.model.model
        states = model.run_first_loop(self._embedded(ids), backend, architecture)
        hidden, _ = model.run_stages(states, backend, architecture, first_loop=1)
        return self.model.lm_head(hidden)[0], states

    @torch.inference_mode()
    def run(self, step: Step) -> list[tuple[Chunk, Tensor]]:
        """Compute all chunks of a step, for which `begin` was called.

        Returns:
            The chunks that logits are asked of, each with the logits of its last positions, (kept, vocab): one row for each
            prompt token that is scored, one to sample from, and one behind each draft. The next step may overwrite them.
        """
        for chunk in step.chunks:
            if chunk.start == 0 and self.cache.states:
                assert chunk.request.seat is not None
                self.cache.clear(chunk.request.seat)

        # Decodes come first, and where loop counts differ, those of more loops; on a CPU those with drafts are among them.
        def place(chunk: Chunk) -> tuple[bool, bool, int]:
            is_prefill = chunk.count > 1 or (bool(chunk.drafts) and self.decode_graphs is not None)
            return is_prefill, is_prefill and kept_positions(chunk) > 1, -chunk.request.num_loops

        chunks = sorted(step.chunks, key=place)
        architecture, slots = self._at_loops(max(chunk.request.num_loops for chunk in chunks))
        slices = [self._slice(chunk) for chunk in chunks]
        leaving = [one.num_loops for one in slices if one.exit_threshold is not None]
        exits = TokenExits(self._exit_rule, leaving[0], self.device) if leaving else None
        if step.states:
            states = self._after_first_loop(chunks, slices, step.states)
            backend = self._backend(slices, architecture, slots)
            hidden, _ = self.model.model.run_stages(states, backend, architecture, first_loop=1)
            logits = self._head(hidden)
        else:
            ids = [token for chunk in chunks for token in chunk.tokens]
            logits = self._logits(slices, ids, architecture, slots, exits)
        self._count(chunks, slices, exits)
        asked = [chunk for chunk in chunks if kept_positions(chunk)]
        return list(zip(asked, logits.split([kept_positions(chunk) for chunk in asked]), strict=True))

    def _logits(
        self,
        slices: list[SequenceSlice],
        ids: list[int],
        architecture: Architecture,
        slots: Slots,
        exits: TokenExits | None,
    ) -> Tensor:
        """Logits of the kept tokens of all slices, (kept, vocab)."""
        if self.decode_graphs is not None and exits is None and all(one.count == one.kept == 1 for one in slices):
            self.tables.flush()
            return self.decode_graphs.run(slices, ids, architecture, slots)
        backend = self._backend(slices, architecture, slots, exits)
        return self._head(self.model.model.run_stages(self._embedded(ids), backend, architecture)[0])

    def _after_first_loop(
        self, chunks: Sequence[Chunk], slices: Sequence[SequenceSlice], drafted: Mapping[Request, Tensor]
    ) -> Tensor:
        """The states of all tokens of a step after the first loop, which runs for the tokens for which it has not run yet."""
        # Of drafted chunks that is the last token, a decode here; decodes come first.
        missing = [
            (replace(own, start=own.end - 1, count=1), chunk.tokens[-1:]) if chunk.request in drafted else (own, chunk.tokens)
            for own, chunk in zip(slices, chunks, strict=True)
        ]
        order = sorted(range(len(missing)), key=lambda index: missing[index][0].count > 1 and not missing[index][0].one_by_one)
        run = [missing[index][0] for index in order]
        backend = self._backend(run, *self._at_loops(1))
        x = self._embedded([token for index in order for token in missing[index][1]])
        found = self.model.model.run_first_loop(x, backend, self._at_loops(1)[0]).split([one.count for one in run], dim=1)
        parts = []
        for index, states in sorted(zip(order, found, strict=True), key=lambda one: one[0]):
            if chunks[index].request in drafted:
                parts.append(drafted[chunks[index].request])
            parts.append(states)
        return torch.cat(parts, dim=1)

    def _count(self, chunks: Sequence[Chunk], slices: Sequence[SequenceSlice], exits: TokenExits | None) -> None:
        """Count the loops of a step that has run."""
        left = {} if exits is None else exits.loops()
        self.last_loops = {}
        for chunk, one in zip(chunks, slices, strict=True):
            tokens = one.kept if self._loops_kept else one.count
            loops = left.get(one.seat)
            self.tokens_run += tokens
            self.loops_run += tokens * one.num_loops if loops is None else sum(loops)
            if loops:
                self.last_loops[chunk.request] = loops

    def _backend(
        self, slices: Sequence[SequenceSlice], architecture: Architecture, slots: Slots, exits: TokenExits | None = None
    ) -> AttentionBackend:
        if self.decode_graphs is None:
            return PagedBackend(slices, self.cache, architecture, slots, exits)
        self.tables.flush()
        return GpuBackend(StepPlan(slices, self.tables, self.cache), self.cache, architecture, slots, exits)

    def _embedded(self, ids: list[int]) -> Tensor:
        return self.model.model.embed_tokens(upload([ids], self.device))

    def _head(self, hidden: Tensor) -> Tensor:
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
            count=chunk.count + len(chunk.drafts),
            kept=kept_positions(chunk),
            written=request.written,
            seat=request.seat,
            block_table=self.tables.of(request),
            num_loops=request.num_loops,
            exit_threshold=request.exit_threshold,
            one_by_one=bool(chunk.drafts) and self.decode_graphs is None,
        )


def kept_positions(chunk: Chunk) -> int:
    """How many positions of a chunk, the last ones, need logits."""
    if chunk.request.scores:
        return max(0, chunk.end - max(chunk.start, chunk.request.unscored - 1))
    return int(chunk.samples) + len(chunk.drafts)
