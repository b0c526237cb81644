"""Jobs: what HTTP requests ask of the engine, the events that come back, and the ways in which a job can fail."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from yoco_u.inference import RequestOutput, SamplingParams, TokenLogprobs

FinishReason = Literal["stop", "length"]
T = TypeVar("T")
Admitted = tuple[list[list[int]], SamplingParams]
"""Token ids of each prompt of a job, and the sampling parameters of all."""


class Busy(Exception):  # noqa: N818
    """The queue is full, or that of grammars to compile or of texts to tokenize.

    Attributes:
        retry_after: seconds after which another try may succeed.
    """

    def __init__(self, retry_after: int, reason: str = "its queue is full; try again later") -> None:
        super().__init__(f"the server is busy: {reason}")
        self.retry_after = retry_after


class NotServing(Exception):  # noqa: N818
    """The server is shutting down, or its engine has failed."""


class TimeExceeded(Exception):  # noqa: N818
    """The request took longer than the server's time limit."""


class RequestFailed(Exception):  # noqa: N818
    """The engine could not compute the request.

    Attributes:
        is_refusal: whether that is because of what the request asks for, such as a grammar that becomes too complex to follow.
        setting: the sampling parameter that asks for it; None if it is not known.
    """

    def __init__(self, reason: str, *, is_refusal: bool = False, setting: str | None = None) -> None:
        super().__init__(reason)
        self.is_refusal, self.setting = is_refusal, setting


@dataclass(frozen=True)
class Event:
    """What one step added to one output of a job.

    Attributes:
        prompt: index of the job's prompt.
        output: index of the output among the prompt's `n` outputs.
        text: new text, often empty.
        token_ids: new tokens.
        loops: how many loops were run for them, all together.
        logprobs: one entry for each new token; None if they were not asked for.
        cached_tokens: tokens of the prompt that its first output found in the prefix cache.
        drafts: how many tokens that were drafted for the output it has so far, and how many it has not; see `Completion`.
        finish_reason: why the output ended, in its last event; None in all others.
    """

    prompt: int
    output: int
    text: str
    token_ids: list[int]
    loops: int
    logprobs: list[TokenLogprobs] | None
    cached_tokens: int
    drafts: tuple[int, int]
    finish_reason: FinishReason | None


class Job:
    """What one HTTP request asks of the engine: one or several prompts, with the same sampling parameters for all.

    Iterating over a job yields the events of all its outputs as they come, and stops when all outputs have ended.

    A job begins when its request has been read, before its prompts are tokenized. Whoever gets it from the engine loop closes
    it when the answer has left, also if the job was given up before.

    Args:
        num_outputs: outputs of all prompts together.
        time_limit: seconds after which the job is given up.
        on_give_up: tells the engine loop that the job's outputs shall end.
        on_close: tells the engine loop that nobody reads the job any more.

    Attributes:
        prompts, params: what the engine computes, known once the request is admitted.
        kept_logprobs: log probabilities for which the engine loop has kept room.
        queued: whether the engine's thread has been told of the job.
        given_up: whether nobody needs more of the answer.
        requests: the engine's request of each prompt. What it says of the prompt is final with the prompt's first event; what
            it says of the outputs is final when iteration stops.
        cached_tokens: for each prompt by its index, the tokens that its first output found in the prefix cache.
        drafts: for each output by the indices of its prompt and of itself, what its newest event says.
        accepted: done when the engine has taken all requests, failed if it has refused them.
        done: whether the engine has let go of the job.

    Raises:
        RequestFailed, TimeExceeded, NotServing: while iterating; all outputs have been ended then.
    """

    def __init__(
        self, num_outputs: int, time_limit: float, on_give_up: Callable[["Job"], None], on_close: Callable[["Job"], None]
    ) -> None:
        self.num_outputs, self.kept_logprobs = num_outputs, 0
        self.prompts: list[list[int]] = []
        self.params = SamplingParams()
        self.queued = self.given_up = False
        self.requests: list[RequestOutput] = []
        self.cached_tokens: dict[int, int] = {}
        self.drafts: dict[tuple[int, int], tuple[int, int]] = {}
        self.begun = time.monotonic()
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.done = False
        self._on_give_up, self._on_close, self._time_limit = on_give_up, on_close, time_limit
        self._events: asyncio.Queue[Event | Exception | None] = asyncio.Queue()
        self._timer = asyncio.get_running_loop().call_later(time_limit, self._expire)

    @property
    def num_logprobs(self) -> int:
        """Log probabilities that the answer has at most: of each token in it, and of the likeliest ones beside it."""
        echoed, own = self.params.prompt_logprobs, self.params.logprobs
        of_prompts = 0 if echoed is None else self.params.n * sum(map(len, self.prompts)) * (1 + echoed)
        return of_prompts + (0 if own is None else self.num_outputs * self.params.max_tokens * (1 + own))

    async def prepared(self, work: Awaitable[T]) -> T:
        """Wait for what has to be done before the engine takes the job. It is given up if the job ends before.

        Raises:
            TimeExceeded, NotServing: if the job ends.
        """
        task = asyncio.ensure_future(work)
        either: set[asyncio.Future[Any]] = {task, self.accepted}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if self.accepted.done():
                self.accepted.result()
            return task.result()
        finally:
            task.cancel()

    def __aiter__(self) -> "Job":
        return self

    async def __anext__(self) -> Event:
        event = await self._events.get()
        if event is None:
            raise StopAsyncIteration
        if isinstance(event, Exception):
            raise event
        return event

    def give_up(self, reason: Exception | None = None) -> None:
        """End the outputs that are unfinished; their memory is free after the step that runs now. A second time does nothing.

        Args:
            reason: raised in whoever iterates over the job; None ends the iteration.
        """
        if self.given_up:
            return
        self.given_up = True
        if not self.done:
            self.put(reason)
        self._on_give_up(self)

    def close(self) -> None:
        """Give the job up, and what is kept of its answer, which nobody reads any more. Closing twice does nothing."""
        self.give_up()
        self._on_close(self)

    def put(self, event: Event | Exception | None) -> None:
        """For the engine loop: add the next event, the failure that ends the job, or None as its regular end."""
        if isinstance(event, Exception) and not self.accepted.done():
            self.accepted.set_exception(event)
        if isinstance(event, Event):
            self.cached_tokens.setdefault(event.prompt, event.cached_tokens)
            self.drafts[event.prompt, event.output] = event.drafts
        self._events.put_nowait(event)

    def accept(self) -> None:
        """For the engine loop: the engine has taken all requests."""
        if not self.accepted.done():
            self.accepted.set_result(None)

    def end(self) -> None:
        """For the engine loop: the engine has let go of the job."""
        self.done = True
        self._timer.cancel()

    def _expire(self) -> None:
        self.give_up(TimeExceeded(f"the request took longer than {self._time_limit:g} seconds, the limit of this server"))
