"""A model without weights that reads and writes through the scheduler's caches, so that every mistake shows as a wrong token.

Pages keep (loops, token) per row. A seat keeps a running hash of all tokens so far, as the window rings do in effect. The next
token is a hash of all rows read through the block table and of the seat.
"""

import random
from collections import Counter
from functools import cache

from yoco_u.inference.request import Request, Status
from yoco_u.inference.sampling_params import SamplingParams
from yoco_u.inference.scheduler import Scheduler
from yoco_u.inference.step import Chunk, Step

END = 0
SNAPSHOT_BYTES = 10


def new_request(
    name: str, prompt, max_tokens: int = 4, num_loops: int = 1, prompt_logprobs: int | None = None, start: int = 0
) -> Request:
    params = SamplingParams(max_tokens=max_tokens, prompt_logprobs=prompt_logprobs, prompt_logprobs_start=start)
    return Request(id=name, prompt=list(prompt), params=params, num_loops=num_loops)


def empty_state(num_loops: int) -> int:
    return hash((-7, num_loops))


def read(rows, state: int) -> int:
    return hash((state, *rows))


def next_token(seen: int) -> int:
    """Mostly 1 or 2, so that prompts and outputs often agree; now and then the end."""
    return END if seen % 12 == 0 else 1 + seen // 12 % 2


@cache
def formula(prompt: tuple[int, ...], num_loops: int, max_tokens: int, window: bool) -> tuple[list[int], list[int]]:
    """The output of a request and what is read at each position of its prompt, straight from the definition."""
    state, rows, reads, output = empty_state(num_loops), [], [], []
    for token in prompt:
        state = hash((state, token))
        rows.append((num_loops, token))
        reads.append(read(rows, state if window else 0))
    last = reads[-1]
    while max_tokens:
        token = next_token(last)
        output.append(token)
        if token == END or len(output) == max_tokens:
            return output, reads
        state = hash((state, token))
        rows.append((num_loops, token))
        last = read(rows, state if window else 0)
    return output, reads


class FakeEngine:
    """Runs the scheduler's steps on fake caches and verifies each of them.

    Args:
        draft_length: tokens that are drafted behind each decode where there is room; half of them are right.
    """

    def __init__(self, draft_length: int = 0, **settings) -> None:
        self.scheduler = Scheduler(**settings)
        self.draft_length, self.random, self.accepted = draft_length, random.Random(0), 0
        self.block_size, self.max_num_seqs = settings["block_size"], settings["max_num_seqs"]
        self.pages = [[None] * self.block_size for _ in range(settings["num_blocks"])]
        self.seats: list[int] = [0] * self.max_num_seqs
        self.window = settings["has_window_state"]
        self.arrival: dict[Request, int] = {}
        self.reads: dict[Request, dict[int, int]] = {}
        self.computed_tokens = 0

    def add(self, request: Request) -> Request:
        self.scheduler.add(request)
        self.arrival[request] = len(self.arrival)
        self.reads[request] = {}
        return request

    def step(self, abort_scheduled=None, abort_computed=None, fail=None) -> Step:
        """One step; a request can be aborted before and after the model runs, or fail in it."""
        scheduler = self.scheduler
        step = scheduler.schedule()
        for chunk in step.chunks:
            if chunk.count == 1 and chunk.samples and not chunk.request.scores:
                room = scheduler.add_drafts(step, chunk, self.draft_length)
                chunk.drafts.extend(self.random.choices([1, 2], k=room))
        self.check_step(step)
        sampled = self.run(step)
        if abort_scheduled is not None:
            scheduler.abort(abort_scheduled.id)
        scheduler.advance(step)
        self.check()
        if abort_computed is not None:
            scheduler.abort(abort_computed.id)
        for chunk in step.chunks:
            request = chunk.request
            if request.status is not Status.RUNNING:
                continue
            if request is fail:
                scheduler.finish(request, "error")
            elif chunk.samples:
                self.take(chunk, sampled[request])
            elif chunk.completes:
                scheduler.finish(request, "length")
        self.check()
        return step

    def take(self, chunk: Chunk, sampled: list[tuple[int, int]]) -> None:
        """Append the token behind the chunk, and those behind the drafts that are right; the seat keeps no wrong one."""
        request, scheduler = chunk.request, self.scheduler
        for index, (token, _) in enumerate(sampled):
            scheduler.append(request, token)
            if token == END or len(request.output) == request.params.max_tokens:
                scheduler.finish(request, "stop" if token == END else "length")
                return
            if chunk.drafts[index : index + 1] != [token]:
                return
            self.accepted += 1
            self.seats[request.seat] = sampled[index + 1][1]
            for owner, key in scheduler.accept(request):
                scheduler.keep_snapshot(key, self.seats[owner.seat], SNAPSHOT_BYTES)

    def run(self, step: Step) -> dict[Request, list[tuple[int, int]]]:
        """Of the requests that sample: the token behind the chunk and behind each draft, each with the seat's state there."""
        for request, state in step.restores:
            self.seats[request.seat] = state
        for chunk in step.chunks:
            request, pool = chunk.request, self.scheduler.pool
            for position, token in enumerate(chunk.tokens, chunk.start):
                block, row = request.blocks[position // self.block_size], position % self.block_size
                if position >= request.written:
                    assert pool.refcounts[block] == 1, "a row of a block that others hold too was written"
                    self.pages[block][row] = (request.num_loops, token)
                else:
                    assert self.pages[block][row] == (request.num_loops, token)
        sampled = {}
        for chunk in step.chunks:
            request = chunk.request
            rows = [self.pages[block][row] for block in request.blocks for row in range(self.block_size)]
            state = self.seats[request.seat] if chunk.start else empty_state(request.num_loops)
            for position, token in enumerate(request.token_slice(chunk.start, chunk.end), chunk.start):
                state = hash((state, token))
                if request.unscored - 1 <= position < len(request.prompt) - 1:  # gives a log probability
                    assert position not in self.reads[request], "scored twice"
                    self.reads[request][position] = read(rows[: position + 1], state if self.window else 0)
            self.seats[request.seat] = state
            self.computed_tokens += chunk.count
            if chunk.samples:
                sampled[request] = []
                for position, token in enumerate([None, *chunk.drafts], chunk.end):
                    state = state if token is None else hash((state, token))
                    sampled[request].append((next_token(read(rows[:position], state if self.window else 0)), state))
        for request, key in step.snapshots:
            self.scheduler.keep_snapshot(key, self.seats[request.seat], SNAPSHOT_BYTES)
        return sampled

    def check_step(self, step: Step) -> None:
        scheduler = self.scheduler
        assert sum(chunk.count + len(chunk.drafts) for chunk in step.chunks) <= scheduler.max_batched_tokens
        assert {chunk.request for chunk in step.chunks} == set(scheduler.running), "each running request takes part"
        assert len(step.chunks) == len(scheduler.running)
        assert step.chunks or not scheduler.waiting, "somebody waits, yet nothing runs"
        for chunk in step.chunks:
            assert chunk.count >= 1 and chunk.start == chunk.request.computed and chunk.end <= chunk.request.num_tokens
            assert chunk.end + len(chunk.drafts) <= len(chunk.request.blocks) * self.block_size
        for request, _ in step.snapshots:
            (chunk,) = [chunk for chunk in step.chunks if chunk.request is request]
            assert chunk.end % self.block_size == 0
        for request, _ in step.restores:
            assert request.status is Status.RUNNING and request.computed > 0
        for request in step.preempted:
            assert request.status is Status.WAITING and request.computed == 0
        self.check()

    def check(self) -> None:
        """No block leaked or given twice, no seat lost, everybody in the order of arrival."""
        scheduler = self.scheduler
        scheduler.pool.check()
        held = Counter(block for request in scheduler.running for block in request.blocks)
        assert scheduler.pool.refcounts == [held[block] for block in range(len(self.pages))]
        taken = [request.seat for request in scheduler.running]
        assert sorted(taken + scheduler._seats) == list(range(self.max_num_seqs))
        order = [self.arrival[request] for request in [*scheduler.running, *scheduler.waiting]]
        assert order == sorted(order)
        for request in self.arrival:
            if request.status is not Status.RUNNING:
                assert request.blocks == [] and request.seat is None
        assert scheduler.snapshots.bytes == SNAPSHOT_BYTES * len(scheduler.snapshots) <= scheduler.snapshots.budget

    def drain(self) -> None:
        """Run until everything is finished, and verify that nothing is held any more."""
        for _ in range(10_000):
            if not self.step().chunks:
                break
        assert not self.scheduler.running and not self.scheduler.waiting
        statistics = self.scheduler.statistics
        assert statistics.free_blocks + statistics.cached_blocks == len(self.pages)
        for request in self.arrival:
            self.check_output(request)

    def check_output(self, request: Request) -> None:
        output, reads = formula(tuple(request.prompt), request.num_loops, request.params.max_tokens, self.window)
        assert request.status is Status.FINISHED
        if request.finish_reason in ("abort", "error"):
            assert request.output == output[: len(request.output)]
            return
        assert request.output == output
        assert request.finish_reason == ("stop" if output and output[-1] == END else "length")
        if request.params.prompt_logprobs is not None:
            first = max(1, request.params.prompt_logprobs_start) - 1
            assert self.reads[request] == {position: reads[position] for position in range(first, len(request.prompt) - 1)}
