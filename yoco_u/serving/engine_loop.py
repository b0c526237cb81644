"""The synchronous engine behind an asyncio front.

One thread owns the engine: between two steps it takes commands (add, abort) from an inbox, after each step it hands the
updates over to the event loop, all in one call. Everything that asyncio code sees is a copy, or does not change any more.
"""

import asyncio
import logging
import math
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

from yoco_u.errors import UserError
from yoco_u.inference import Engine, RequestOutput, SamplingParams, TokenLogprobs, Update

log = logging.getLogger("yoco_u.serving")

FinishReason = Literal["stop", "length"]

_MOST_FAILED_STEPS = 3  # in a row, after which the engine counts as broken


class Busy(Exception):  # noqa: N818
    """The queue is full.

    Attributes:
        retry_after: seconds after which another try may succeed.
    """

    def __init__(self, retry_after: int) -> None:
        super().__init__("the server is busy: its queue is full; try again later")
        self.retry_after = retry_after


class NotServing(Exception):  # noqa: N818
    """The server is shutting down, or its engine has failed."""


class TimeExceeded(Exception):  # noqa: N818
    """The request took longer than it may."""


class RequestFailed(Exception):  # noqa: N818
    """The engine could not compute the request."""


@dataclass(frozen=True)
class Event:
    """What one step added to one output of a job.

    Attributes:
        prompt: which of the job's prompts.
        output: which of the prompt's `n` outputs.
        logprobs: of the new tokens, if asked for.
        cached_tokens: of the prompt, counted when the event came; see `RequestOutput`.
        finish_reason: in the output's last event, None in all others.
    """

    prompt: int
    output: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    cached_tokens: int
    finish_reason: FinishReason | None


class Job:
    """What one HTTP request asks of the engine: one or several prompts, the same parameters for all.

    Iterating gives the events of all outputs as they come and ends when all outputs have ended.

    Attributes:
        requests: one a prompt. What concerns the prompt is final with the prompt's first event, the rest when iteration ends.

        cached_tokens: by prompt, those that its first output found computed.

    Raises:
        RequestFailed, TimeExceeded, NotServing: while iterating; all outputs have been ended then.
    """

    def __init__(self, prompts: list[list[int]], params: SamplingParams, loop: "EngineLoop") -> None:
        self.prompts, self.params = prompts, params
        self.requests: list[RequestOutput] = []
        self.cached_tokens: dict[int, int] = {}
        self.begun = time.monotonic()
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.done = False
        self._loop = loop
        self._events: asyncio.Queue[Event | Exception | None] = asyncio.Queue()
        self._timer = asyncio.get_running_loop().call_later(loop.time_limit, self._expire)

    @property
    def num_outputs(self) -> int:
        return len(self.prompts) * self.params.n

    def __aiter__(self) -> "Job":
        return self

    async def __anext__(self) -> Event:
        event = await self._events.get()
        if event is None:
            raise StopAsyncIteration
        if isinstance(event, Exception):
            raise event
        return event

    def close(self, reason: Exception | None = None) -> None:
        """End what is unfinished; its memory is free after the step that runs now. Whoever iterates gets the reason."""
        if not self.done:
            self._loop.abort(self)
            self.put(reason)

    def put(self, event: Event | Exception | None) -> None:
        """For the engine loop: the next event, the failure that ends the job, or None as its regular end."""
        if isinstance(event, Exception) and not self.accepted.done():
            self.accepted.set_exception(event)
        if isinstance(event, Event):
            self.cached_tokens.setdefault(event.prompt, event.cached_tokens)
        self._events.put_nowait(event)

    def accept(self) -> None:
        """For the engine loop: the engine has taken all requests."""
        if not self.accepted.done():
            self.accepted.set_result(None)

    def end(self) -> None:
        """For the engine loop: the engine has nothing of this job any more."""
        self.done = True
        self._timer.cancel()

    def _expire(self) -> None:
        self.close(TimeExceeded(f"the request took longer than {self._loop.time_limit:g} seconds, the limit of this server"))


class Observer:
    """Is told what happens, on the event loop; see `metrics.py`. This one does not listen."""

    def event(self, job: Job, event: Event) -> None: ...

    def ended(self, job: Job) -> None: ...

    def rejected(self, reason: str) -> None: ...

    def step(self, seconds: float) -> None:
        """Called on the engine's thread."""


class EngineLoop:
    """Runs an engine in a thread of its own for asyncio code.

    Args:
        engine: nobody else may touch it from now on.
        max_waiting: outputs beyond the engine's seats that may wait.
        time_limit: seconds of one job, waiting included.
        observer: is told what happens.
        died: called on the event loop if the engine has failed for good.

    Attributes:
        draining: no new jobs are taken.
        failure: what ended the engine, None while it is sound.
    """

    def __init__(
        self,
        engine: Engine,
        max_waiting: int,
        time_limit: float,
        observer: Observer | None = None,
        died: Callable[[], None] = lambda: None,
    ) -> None:
        self.engine, self.time_limit, self.draining = engine, time_limit, False
        self.capacity = engine.settings.max_num_seqs + max_waiting
        self.failure: BaseException | None = None
        self._observer, self._died = observer or Observer(), died
        self._outstanding = 0  # outputs that wait or run
        self._jobs: set[Job] = set()
        self._seconds = 1.0  # of a job, a moving average
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._running: dict[str, tuple[Job, int]] = {}  # by the engine's request ids; the thread's own
        self._failed_steps = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to serve the event loop that calls this."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End all jobs and the thread."""
        self.close_all()
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    def drain(self, seconds: float) -> None:
        """Take no new jobs, and end those that are not done after so many seconds. Safe in a signal handler."""
        self.draining = True
        self._loop.call_soon_threadsafe(lambda: self._loop.call_later(seconds, self.close_all))

    def close_all(self) -> None:
        """End all jobs with `NotServing`."""
        for job in list(self._jobs):
            job.close(NotServing("the server is shutting down"))

    async def submit(self, prompts: list[list[int]], params: SamplingParams) -> Job:
        """Hand prompts to the engine.

        Returns:
            The job, which the engine has accepted.

        Raises:
            UserError: if one of the requests is not possible; none runs then.
            Busy: if the queue is full.
            NotServing: while shutting down, or after the engine has failed.
        """
        if self.failure is not None or self.draining:
            self._observer.rejected("not serving")
            raise NotServing("the server is shutting down" if self.failure is None else "the engine has failed")
        count = len(prompts) * params.n
        if count > self.capacity:
            raise UserError(
                f"{len(prompts)} prompts with {params.n} outputs each are more than the {self.capacity} of a full queue"
            )
        if self._outstanding + count > self.capacity:
            self._observer.rejected("queue full")
            raise Busy(min(60, math.ceil(self._seconds)))
        job = Job(prompts, params, self)
        self._outstanding += count
        self._jobs.add(job)
        self._inbox.put(lambda: self._add(job))
        try:
            await job.accepted
        except BaseException:
            job.close()
            raise
        return job

    def abort(self, job: Job) -> None:
        """For `Job.close`."""
        self._inbox.put(lambda: self._end(job))

    # On the engine's thread.

    def _run(self) -> None:
        try:
            while self._take_commands(wait=not self.engine.unfinished):
                if self.engine.unfinished:
                    self._step()
        except BaseException as error:
            log.exception("the engine has failed")
            self.failure = error
            self._tell(self._die)

    def _take_commands(self, wait: bool) -> bool:
        """Run what is in the inbox; False when asked to stop."""
        while True:
            try:
                command = self._inbox.get(block=wait)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            wait = False

    def _add(self, job: Job) -> None:
        refused: Exception | None = None
        try:
            for index, prompt in enumerate(job.prompts):
                request = self.engine.add(prompt, job.params)
                job.requests.append(request)
                self._running[request.id] = job, index
        except UserError as error:
            refused = error
        except Exception:
            log.exception("a request could not be added")
            refused = RequestFailed("the engine could not take the request")
        if refused is not None:
            self._end(job, refused)
        else:
            self._tell(job.accept)

    def _end(self, job: Job, reason: Exception | None = None) -> None:
        """Abort what is unfinished of a job, and say so; nothing happens if the job has ended already."""
        for request in job.requests:
            self.engine.abort(request)
            self._running.pop(request.id, None)
        self._tell(lambda: self._ended(job, reason))

    def _step(self) -> None:
        begin = time.perf_counter()
        try:
            updates = self.engine.step()
        except Exception:
            log.exception("a step of the engine failed")
            self._fail_step()
            return
        self._failed_steps = 0
        self._observer.step(time.perf_counter() - begin)
        news = [(*self._running[update.request.id], update) for update in updates if update.request.id in self._running]
        failed = {job: update.output.error for job, _, update in news if update.finish_reason == "error"}
        events = [(job, _event(index, update)) for job, index, update in news if job not in failed]
        for _, _, update in news:
            if update.request.finished:
                self._running.pop(update.request.id, None)
        ended = {job for job, _ in events if all(request.finished for request in job.requests)}
        self._tell(lambda: self._deliver(events, ended))
        for job, error in failed.items():
            self._end(job, RequestFailed(error or "the engine could not compute the request"))

    def _fail_step(self) -> None:
        """End the jobs whose requests the engine has ended with the step, or all if it left them."""
        jobs = {job for job, _ in self._running.values()}
        broken = {
            job for job in jobs if any(one.finish_reason == "error" for request in job.requests for one in request.outputs)
        }
        for job in broken or jobs:
            self._end(job, RequestFailed("the engine failed while it computed the request"))
        self._failed_steps += 1
        if self._failed_steps == _MOST_FAILED_STEPS:
            raise RuntimeError(f"{_MOST_FAILED_STEPS} steps in a row have failed")

    def _tell(self, message: Callable[[], object]) -> None:
        try:
            self._loop.call_soon_threadsafe(message)
        except RuntimeError:  # the event loop is closed: nobody listens any more
            log.debug("an update came after the end")

    # On the event loop.

    def _deliver(self, events: list[tuple[Job, Event]], ended: set[Job]) -> None:
        for job, event in events:
            self._observer.event(job, event)
            job.put(event)
        for job in ended:
            self._seconds += 0.1 * (time.monotonic() - job.begun - self._seconds)
            self._ended(job)

    def _ended(self, job: Job, reason: Exception | None = None) -> None:
        if job.done:
            return
        job.put(reason)
        job.end()
        self._jobs.discard(job)
        self._outstanding -= job.num_outputs
        self._observer.ended(job)

    def _die(self) -> None:
        for job in list(self._jobs):
            self._ended(job, NotServing("the engine has failed"))
        self._died()


def _event(prompt: int, update: Update) -> Event:
    new = len(update.token_ids)
    logprobs = update.output.logprobs
    return Event(
        prompt,
        update.output.index,
        update.text,
        update.token_ids,
        (logprobs[-new:] if new else []) if logprobs is not None else None,
        update.request.cached_tokens,
        cast(FinishReason | None, update.finish_reason),
    )
