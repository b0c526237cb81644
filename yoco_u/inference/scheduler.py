"""Which tokens of which requests run in the next step, and where their state lies.

Requests are served first come, first served, and share every step: each running request gets one token, so that decoding
never waits for another's prompt, and the rest of the token budget is split evenly over the prompts. `running` and `waiting`
are always in the order of arrival, all of `running` before all of `waiting`; whoever arrived last gives way when blocks run
out, so the oldest request always goes on.
"""

import heapq
from collections import deque
from dataclasses import dataclass, field
from operator import itemgetter

from yoco_u.errors import UserError
from yoco_u.inference.block_pool import BlockPool, chain_hash, root_hash
from yoco_u.inference.request import Request, Status
from yoco_u.inference.snapshots import SnapshotKey, SnapshotStore


@dataclass(frozen=True)
class Chunk:
    """What one request computes in one step: its tokens start .. start + count - 1."""

    request: Request
    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def samples(self) -> bool:
        """The last known token is computed, so a new one is to be sampled; true until that one is appended."""
        return self.end == self.request.num_tokens

    @property
    def completes(self) -> bool:
        """The request samples nothing, and all that it needs is computed."""
        return not self.request.params.max_tokens and self.end == self.request.num_needed


@dataclass
class Step:
    """What the engine does in one step.

    Attributes:
        chunks: at most one per request, shortest first. One that starts at 0 begins with an empty window state.
        restores: before the step runs, load the window state into the request's seat.
        snapshots: after it ran, copy the window state of the request's seat and give it to `Scheduler.keep_snapshot`.
        preempted: requests that lost their blocks and seat and wait again.
    """

    chunks: list[Chunk] = field(default_factory=list)
    restores: list[tuple[Request, object]] = field(default_factory=list)
    snapshots: list[tuple[Request, SnapshotKey]] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)


@dataclass(frozen=True)
class Statistics:
    """Blocks now, and counts since the start; `prefix_hit_tokens` did not have to be computed."""

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
        has_window_state: a request has state in its seat besides its blocks, so shared blocks alone do not suffice to go on.

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
                f"request {request.id}: a prompt of one token and max_tokens 0 leave nothing to compute; raise max_tokens"
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
        """End a request and take back its blocks and its seat. Nothing that a failed request ("error") computed is reused."""
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
        wanted = sorted(((self._next_stop(request) - request.computed, request) for request in self.running), key=itemgetter(0))
        budget = self.max_batched_tokens
        for served, (tokens, request) in enumerate(wanted):
            # What a short one leaves of its even share goes to the longer ones.
            count = min(tokens, -(-budget // (len(wanted) - served)))
            budget -= count
            chunk = Chunk(request, request.computed, count)
            step.chunks.append(chunk)
            if self._takes_snapshots:
                self._plan_snapshot(chunk, step)
        return step

    def advance(self, step: Step) -> None:
        """The model has run: count the tokens of the step as computed, and let others share the blocks that became full."""
        for chunk in step.chunks:
            request = chunk.request
            if request.status is not Status.RUNNING:  # aborted meanwhile
                continue
            request.computed = chunk.end
            if request.scores:
                request.unscored = max(request.unscored, chunk.end + 1)
            if self.prefix_caching:
                full = chunk.end // self.block_size
                self._hash_blocks(request, full)
                for index in range(chunk.start // self.block_size, full):
                    self.pool.register(request.blocks[index], request.hashes[index])

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
        """Make sure of the block of a request's newest token, at the cost of the one who came last."""
        if self._num_blocks(request.num_tokens) <= len(request.blocks):
            return
        if not self.pool.num_available:
            latest = self.running[-1]  # nobody else holds its last block, so that one becomes available
            self._preempt(latest)
            step.preempted.append(latest)
            if latest is request:
                return
        request.blocks += self.pool.allocate(1, after=request.blocks[-1])

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
        """Let waiting requests in, in order, while there is a seat and room for all their tokens and the next one.

        One block for each running request is left, or the next blocks that these need would drive the new one out again.
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
            request.admissions += 1
            self.running.append(request)
            self._prefix_hit_tokens += request.computed
            if self._takes_snapshots:
                # Where this request leaves what is known, for the next of the same prefix; and its own prompt, as far as
                # others may go on from it: what is only scored is not theirs.
                prompt = request.unscored if request.scores and not request.params.max_tokens else len(request.prompt)
                request.snapshot_at = (request.written, self._last_boundary(prompt))
            if self.has_window_state and computed:
                step.restores.append((request, self.snapshots.use(request.hashes[computed - 1])))

    def _reusable(self, request: Request) -> tuple[list[int], int]:
        """The blocks that a request can share, and how many of them need not be computed again for the window state."""
        if not self.prefix_caching:
            return [], 0
        needed = request.unscored if request.scores else request.num_needed
        limit = (needed - 1) // self.block_size  # the last token runs in any case, and all that give log probabilities
        self._hash_blocks(request, limit)
        blocks = self.pool.match(request.hashes[:limit])
        if not self.has_window_state:
            return blocks, len(blocks)
        kept = (count for count in range(len(blocks), 0, -1) if request.hashes[count - 1] in self.snapshots)
        return blocks, next(kept, 0)

    def _next_stop(self, request: Request) -> int:
        """Where the request's next chunk ends at the latest."""
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
        """Know the chain hashes of a request's first `count` blocks, all full; each is computed once."""
        for index in range(len(request.hashes), count):
            parent = request.hashes[-1] if index else root_hash(request.num_loops)
            tokens = request.token_slice(index * self.block_size, (index + 1) * self.block_size)
            request.hashes.append(chain_hash(parent, tokens))

    def _num_blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def _last_boundary(self, tokens: int) -> int:
        """The last block boundary before the last of so many tokens, which always runs."""
        return (tokens - 1) // self.block_size * self.block_size
