"""Continuous batching: which tokens of which requests run in the next step, and which blocks and seats the requests hold.

Requests are served in the order of their arrival and share every step. Each running request gets one token, so that decoding
never waits for another request's prompt; the rest of the token budget is split evenly over the prompts. `running` and `waiting`
are always in the order of arrival, all of `running` before all of `waiting`. When blocks run out, the request that arrived last
is preempted, so the oldest request always goes on.
"""

import heapq
import itertools
from collections import deque
from dataclasses import dataclass
from operator import itemgetter

from yoco_u.errors import UserError
from yoco_u.inference.block_pool import BlockPool, chain_hash, root_hash
from yoco_u.inference.request import Request, Status
from yoco_u.inference.snapshots import SnapshotKey, SnapshotStore
from yoco_u.inference.step import Chunk, Step


@dataclass(frozen=True)
class Statistics:
    """Blocks at this moment, and counts since the start.

    Attributes:
        prefix_hit_tokens: tokens that the prefix cache held, so that they were not computed.
        preemptions: how often a running request lost its blocks to an older one.
    """

    free_blocks: int
    cached_blocks: int
    prefix_hit_tokens: int
    preemptions: int


class Scheduler:
    """Continuous batching over a pool of blocks and a row of seats.

    A step is `schedule`, run the model, `keep_snapshot` for each of `step.snapshots`, `advance`, then `append` or `finish` for
    each chunk that samples and `finish` for each that completes its request. `add`, `abort` and `finish` may be called at any
    point in between.

    Args:
        num_blocks, block_size: of the paged caches; a block holds `block_size` tokens.
        max_num_seqs: seats, that is, how many requests run at once.
        max_batched_tokens: tokens of one step.
        max_model_len: tokens of one request, prompt and output together.
        prefix_caching: share the blocks of equal prefixes.
        snapshot_bytes: budget of the window states kept so that equal prefixes need not be computed again.
        has_window_state: whether requests keep rings or states in their seats. Shared blocks alone then do not suffice to go on
            from a cached prefix: a snapshot of that state is needed as well.

    Raises:
        UserError: if a step could not give every running request a token.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_batched_tokens: int,
        max_model_len: int,
        prefix_caching: bool,
        snapshot_bytes: int,
        has_window_state: bool,
    ) -> None:
        if max_batched_tokens < max_num_seqs:
            raise UserError(
                f"max_batched_tokens is {max_batched_tokens}, but up to {max_num_seqs} requests (max_num_seqs) run at once and "
                f"each takes a token a step; raise max_batched_tokens to {max_num_seqs} or lower max_num_seqs"
            )
        self.block_size, self.max_batched_tokens, self.max_model_len = block_size, max_batched_tokens, max_model_len
        self.prefix_caching, self.has_window_state = prefix_caching, has_window_state
        self.pool = BlockPool(num_blocks)
        self.snapshots = SnapshotStore(snapshot_bytes)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._takes_snapshots = prefix_caching and has_window_state and snapshot_bytes > 0
        self._seats = list(range(max_num_seqs))  # the free ones, a heap
        self._requests: dict[str, Request] = {}  # waiting and running
        self._no_room: tuple[Request, int] | None = None  # who found no room, at which state of the pool
        self._allocations = itertools.count()
        self._prefix_hit_tokens = 0
        self._preemptions = 0

    @property
    def statistics(self) -> Statistics:
        return Statistics(self.pool.num_free, self.pool.num_cached, self._prefix_hit_tokens, self._preemptions)

    def add(self, request: Request) -> None:
        """Queue a new request.

        Raises:
            UserError: if it could never be served.
        """
        prompt, output = len(request.prompt), request.params.max_tokens
        blocks = self._num_blocks(prompt + output)
        if request.id in self._requests:
            raise UserError(f"request {request.id}: a request of this id is not finished yet; choose another id")
        if not prompt:
            raise UserError(f"request {request.id}: the prompt is empty; give at least one token")
        if not output and prompt == 1:
            raise UserError(
                f"request {request.id}: a prompt of one token and max_tokens 0 leave nothing to compute; raise max_tokens",
                "max_tokens",
            )
        if request.params.prompt_logprobs_start >= prompt:
            raise UserError(
                f"request {request.id}: prompt_logprobs_start is {request.params.prompt_logprobs_start}, but the prompt has "
                f"{prompt} tokens; lower it"
            )
        if prompt + output > self.max_model_len:
            raise UserError(
                f"request {request.id}: {prompt} prompt tokens and max_tokens {output} make {prompt + output}, more than "
                f"max_model_len {self.max_model_len}; shorten the prompt, lower max_tokens or raise max_model_len"
            )
        if blocks > self.pool.num_blocks:
            raise UserError(
                f"request {request.id}: {prompt} prompt tokens and max_tokens {output} need {blocks} blocks of "
                f"{self.block_size} tokens, but the cache has {self.pool.num_blocks}; shorten the prompt, lower max_tokens or "
                "enlarge the cache"
            )
        self._requests[request.id] = request
        self.waiting.append(request)

    def abort(self, request_id: str) -> Request | None:
        """End a request early; None if no such request is waiting or running."""
        request = self._requests.get(request_id)
        if request is not None:
            self.finish(request, "abort")
        return request

    def finish(self, request: Request, reason: str) -> None:
        """End a request and take back its blocks and its seat. Nothing that a failed request ("error") computed is shared."""
        assert request.status is not Status.FINISHED, f"request {request.id} is finished already"
        if reason == "error":
            self.pool.forget(request.blocks)
            for key in request.hashes:
                self.snapshots.discard(key)
        if request.status is Status.RUNNING:
            self._leave(request)
        else:
            self.waiting.remove(request)
        del self._requests[request.id]
        request.status, request.finish_reason = Status.FINISHED, reason

    def schedule(self) -> Step:
        """Decide the next step; its chunks are empty when there is nothing to do."""
        step = Step()
        for request in list(self.running):
            if request.status is Status.RUNNING:  # not preempted for an older one
                self._grow(request, step)
        if not step.preempted:
            self._admit(step)
        lacking = ((self._next_stop(request) - request.computed, request) for request in self.running)
        wanted = sorted((one for one in lacking if one[0]), key=itemgetter(0))  # some only wait for their next token
        budget = self.max_batched_tokens
        for served, (tokens, request) in enumerate(wanted):
            # The shortest come first, so that what they leave of their even share goes to the longer ones.
            count = min(tokens, -(-budget // (len(wanted) - served)))
            budget -= count
            chunk = Chunk(request, request.computed, count)
            step.chunks.append(chunk)
            if self._takes_snapshots:
                self._plan_snapshot(chunk, step)
        return step

    def add_drafts(self, step: Step, chunk: Chunk, wanted: int) -> int:
        """Make room for tokens that are drafted behind a chunk, as far as the token budget and the free blocks go.

        Nobody is preempted for drafts, and as in `_admit` one block for each running request stays free.

        Returns:
            How many tokens may be drafted.
        """
        request, size = chunk.request, self.block_size
        budget = self.max_batched_tokens - sum(one.count for one in step.chunks) - step.drafts
        spare = max(0, self.pool.num_available - len(self.running))
        room = (len(request.blocks) + spare) * size - chunk.end
        # The last token that is sampled need not be drafted.
        count = min(wanted, budget, room, request.params.max_tokens - len(request.output) - 1)
        if self._takes_snapshots:  # which are of the ends of blocks, so no step may go beyond one
            count = min(count, -chunk.end % size)
        count = max(count, 0)
        if lacking := max(0, self._num_blocks(chunk.end + count) - len(request.blocks)):
            request.blocks += self.pool.allocate(lacking, after=request.blocks[-1])
        step.drafts += count
        return count

    def advance(self, step: Step) -> None:
        """Count the tokens of a step that has run as computed, and let other requests share the blocks that it filled.

        Drafted tokens do not count before they are accepted.
        """
        for chunk in step.chunks:
            if chunk.request.status is Status.RUNNING:  # not aborted meanwhile
                self._count(chunk.request, chunk.end)

    def accept(self, request: Request) -> list[tuple[Request, SnapshotKey]]:
        """Count a request's newest token as computed, because it was drafted and ran in the step that has just ended.

        Returns:
            What `Step.snapshots` is after a step: window states to be kept now.
        """
        self._count(request, request.computed + 1)
        step = Step()
        if self._takes_snapshots:
            self._plan_snapshot(Chunk(request, request.computed - 1, 1), step)
        return step.snapshots

    def append(self, request: Request, token: int) -> None:
        """Add a sampled token to a running request."""
        assert request.status is Status.RUNNING, f"request {request.id} is not running"
        assert len(request.output) < request.params.max_tokens, f"request {request.id} should have been finished"
        request.output.append(token)

    def keep_snapshot(self, key: SnapshotKey, state: object, nbytes: int) -> None:
        """Keep the window state that `step.snapshots` asked for, as far as the byte budget allows."""
        self.snapshots.keep(key, state, nbytes)

    def admit_behind(self, tokens: int) -> list[Request]:
        """Let waiting requests in as `schedule` would, and take the first `tokens` tokens of each for computed.

        For measurements, which fill the caches themselves; see `Engine.fill_cache`.

        Returns:
            The requests that were let in.
        """
        before = len(self.running)
        self._admit(Step())
        admitted = self.running[before:]
        for request in admitted:
            request.computed = tokens
        return admitted

    def _grow(self, request: Request, step: Step) -> None:
        """Give a request the block of its newest token; where none is available, preempt the request that arrived last."""
        if self._num_blocks(request.num_tokens) <= len(request.blocks):
            return
        if not self.pool.num_available:
            self._release_spare()
        if not self.pool.num_available:
            latest = self.running[-1]  # no other request holds its last block, so that block becomes available
            self._preempt(latest)
            step.preempted.append(latest)
            if latest is request:
                return
        request.blocks += self.pool.allocate(1, after=request.blocks[-1])

    def _release_spare(self) -> None:
        """Give back the blocks that were taken for drafts and hold nothing."""
        for request in self.running:
            if spare := request.blocks[self._num_blocks(request.num_tokens + 1) :]:
                self.pool.release(spare)
                request.blocks = request.blocks[: -len(spare)]
                request.allocation = next(self._allocations)

    def _count(self, request: Request, end: int) -> None:
        """Count the tokens before `end` as computed."""
        start, request.computed = request.computed, end
        if request.scores:
            request.unscored = max(request.unscored, end + 1)
        if self.prefix_caching:
            full = end // self.block_size
            self._hash_blocks(request, full)
            for index in range(start // self.block_size, full):
                self.pool.register(request.blocks[index], request.hashes[index])

    def _preempt(self, request: Request) -> None:
        self._leave(request)
        request.status = Status.WAITING
        self.waiting.appendleft(request)
        self._preemptions += 1

    def _leave(self, request: Request) -> None:
        """Give back all that a running request holds."""
        assert request.seat is not None
        self.running.remove(request)
        self.pool.release(request.blocks)
        heapq.heappush(self._seats, request.seat)
        request.blocks, request.seat = [], None
        request.computed = request.written = 0

    def _admit(self, step: Step) -> None:
        """Let waiting requests in, in order, while there is a seat, and room for all their tokens and the next one.

        One block for each running request stays free. Otherwise a new request could be preempted at once, when the running ones
        need their next blocks.
        """
        while self.waiting and self._seats:
            request = self.waiting[0]
            if self._no_room == (request, self.pool.changes):
                return
            shared, computed = self._reusable(request)
            needed = self._num_blocks(request.num_needed + 1)
            taken = needed - sum(self.pool.refcounts[block] > 0 for block in shared)
            if taken + len(self.running) > self.pool.num_available:
                self._no_room = request, self.pool.changes
                return
            self.waiting.popleft()
            self.pool.share(shared)
            request.blocks = shared + self.pool.allocate(needed - len(shared), after=shared[-1] if shared else None)
            request.seat = heapq.heappop(self._seats)
            request.computed = computed * self.block_size
            request.written = len(shared) * self.block_size
            request.status = Status.RUNNING
            request.allocation = next(self._allocations)
            self.running.append(request)
            self._prefix_hit_tokens += request.computed
            if self._takes_snapshots:
                # The window state is kept where this request leaves the cached prefix, because the next request of that prefix
                # may leave it there too; and at the end of its prompt, for requests that go on from it. A prompt that is only
                # scored is continued from its first scored token, so there the state is kept before that token.
                prompt = request.unscored if request.scores and not request.params.max_tokens else len(request.prompt)
                request.snapshot_at = (request.written, self._last_boundary(prompt))
            if self.has_window_state and computed:
                step.restores.append((request, self.snapshots.use(request.hashes[computed - 1])))

    def _reusable(self, request: Request) -> tuple[list[int], int]:
        """The cached blocks that a request can share, and how many of them it need not compute again.

        The second number is smaller where the window state is needed and no snapshot lies at the end of the shared blocks: the
        tokens behind the last snapshot are computed again, without being written again.
        """
        if not self.prefix_caching:
            return [], 0
        needed = request.unscored if request.scores else request.num_needed
        limit = (needed - 1) // self.block_size  # the last token always runs, and so does every token that is scored
        self._hash_blocks(request, limit)
        blocks = self.pool.match(request.hashes[:limit])
        if not self.has_window_state:
            return blocks, len(blocks)
        kept = (count for count in range(len(blocks), 0, -1) if request.hashes[count - 1] in self.snapshots)
        return blocks, next(kept, 0)

    def _next_stop(self, request: Request) -> int:
        """The position where the request's next chunk ends at the latest: at a snapshot, or when all is computed."""
        return min((stop for stop in request.snapshot_at if stop > request.computed), default=request.num_needed)

    def _plan_snapshot(self, chunk: Chunk, step: Step) -> None:
        """Ask for the window state at the end of a chunk if it is worth keeping and not kept already."""
        request, (blocks, within) = chunk.request, divmod(chunk.end, self.block_size)
        planned = chunk.end in request.snapshot_at
        if within or not (planned or chunk.end >= len(request.prompt)):
            return
        self._hash_blocks(request, blocks)
        key = request.hashes[blocks - 1]
        if key in self.snapshots:
            return
        if not planned:
            if request.decode_snapshot is not None:
                self.snapshots.discard(request.decode_snapshot)
            request.decode_snapshot = key
        step.snapshots.append((request, key))

    def _hash_blocks(self, request: Request, count: int) -> None:
        """Make sure that a request has the chain hashes of its first `count` blocks, which must be full."""
        for index in range(len(request.hashes), count):
            parent = request.hashes[-1] if index else root_hash(request.num_loops, request.exit_threshold)
            tokens = request.token_slice(index * self.block_size, (index + 1) * self.block_size)
            request.hashes.append(chain_hash(parent, tokens))

    def _num_blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def _last_boundary(self, tokens: int) -> int:
        """The last block boundary that lies before the last of `tokens` tokens. The last token always runs, boundary or not."""
        return (tokens - 1) // self.block_size * self.block_size
