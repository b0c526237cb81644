"""The engine loop: runs the synchronous engine in a thread, behind an interface for asyncio.

The thread alone touches the engine. Between two steps it takes commands (add, abort) from an inbox; after each step it hands
all updates to the event loop in one call. What asyncio code sees of the engine is a copy or does not change any more, so no
locks are needed.
"""

import asyncio
import functools
import logging
import math
import queue
import threading
import time
from collections.abc import Awaitable, Callable
from typing import cast

from yoco_u.errors import UserError, class_and_line
from yoco_u.inference import Engine, Update
from yoco_u.inference.outputs import NO_TOKEN
from yoco_u.inference.turns import Crowded
from yoco_u.serving.jobs import Admitted, Busy, Event, FinishReason, Job, NotServing, RequestFailed, TimeExceeded

log = logging.getLogger("yoco_u.serving")

_MOST_FAILED_STEPS = 3  # after this many in a row the engine counts as broken
_STEP_FAILED = "the engine failed while it computed the request"
_LOOK = 1.0  # seconds between two looks at the engine's thread
_FAREWELL = 2.0  # seconds that the thread has to end
MOST_LOGPROBS = 2**22  # that all answers together may have
_NOT_TAKEN: dict[type[BaseException], str] = {
    Crowded: "queue full", Busy: "queue full", NotServing: "not serving", TimeExceeded: "time limit",
    asyncio.CancelledError: "client gone",
}  # fmt: skip


class Stuck(Exception):  # noqa: N818
    """A step of the engine does not end."""


class Observer:
    """Is told on the event loop what happens to jobs. This one does nothing; `metrics.py` has one that counts."""

    def event(self, job: Job, event: Event) -> None: ...

    def ended(self, job: Job) -> None: ...

    def rejected(self, reason: str) -> None: ...

    def step(self, seconds: float) -> None:
        """A step of the engine took this long. Called on the engine's thread."""


class EngineLoop:
    """Runs an engine in a thread of its own, and takes jobs for it from asyncio code.

    Args:
        engine: the engine, which nobody else may touch from now on.
        max_waiting: outputs beyond the engine's seats that may wait.
        time_limit: seconds that one job may take, waiting included.
        step_limit: seconds after which a step counts as stuck; the engine has failed then.
        observer: is told what happens.
        died: called on the event loop if the engine has failed for good.

    Attributes:
        capacity: outputs that may be in the engine at once, running or waiting.
        draining: whether new jobs are refused because the server is shutting down.
        failure: the exception that ended the engine, None while it works.
        busy_since: time at which the thread began what it does now, None while it waits for work.
    """

    def __init__(
        self,
        engine: Engine,
        max_waiting: int,
        time_limit: float,
        step_limit: float,
        observer: Observer | None = None,
        died: Callable[[], None] = lambda: None,
    ) -> None:
        self.engine, self.time_limit, self.step_limit, self.draining = engine, time_limit, step_limit, False
        self.capacity = engine.settings.max_num_seqs + max_waiting
        self.failure: BaseException | None = None
        self.busy_since: float | None = None
        self._observer, self._died = observer or Observer(), died
        self._outstanding = 0  # outputs that are running or waiting, or whose requests are still prepared
        self._logprobs = 0  # that answers keep
        self._jobs: set[Job] = set()
        self._seconds = 1.0  # that a job takes, as a moving average
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()  # None ends the thread
        self._running: dict[str, tuple[Job, int]] = {}  # job and index of the prompt, by request id; of the thread alone
        self._failed_steps = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread. Jobs and observer are served on the event loop that calls this."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        self._watcher = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """End all jobs and the thread, which is left alone if it is stuck."""
        self._watcher.cancel()
        self.close_all()
        self._inbox.put(None)
        patience = time.monotonic() + _FAREWELL
        while self._thread.is_alive() and time.monotonic() < patience:
            await asyncio.sleep(0.01)

    @property
    def refusal(self) -> str | None:
        """Why no requests are taken, in one line; None while they are."""
        if self.failure is not None:
            return f"the engine has failed: {self.failure}" if isinstance(self.failure, Stuck) else "the engine has failed"
        if self.draining:
            return "the server is shutting down"
        return None if self._thread.is_alive() else "the engine does not run"

    def drain(self, seconds: float) -> None:
        """Refuse new jobs, and end those that are not done after this many seconds. Safe in a signal handler."""
        self.draining = True
        self._loop.call_soon_threadsafe(lambda: self._loop.call_later(seconds, self.close_all))

    def close_all(self) -> None:
        """End all jobs with `NotServing`."""
        for job in list(self._jobs):
            job.give_up(NotServing("the server is shutting down"))

    def _check_room(self, num_prompts: int, num_outputs: int) -> None:
        if refusal := self.refusal:
            raise self._not_taken(NotServing(refusal))
        count = num_prompts * num_outputs
        if count > self.capacity:
            raise UserError(
                f"{num_prompts} prompts with {num_outputs} outputs each are more than the {self.capacity} of a full queue"
            )
        if self._outstanding + count > self.capacity:
            raise self._not_taken(self._busy())

    def _busy(self) -> Busy:
        return Busy(min(60, math.ceil(self._seconds)))

    async def submit(self, num_prompts: int, num_outputs: int, admit: Callable[[], Awaitable[Admitted]]) -> Job:
        """Take a job if there is room for it, prepare it, and hand it to the engine.

        It has its place in the queue, and its time runs, from the beginning. Cancelling this call ends it.

        Args:
            num_outputs: of each prompt.
            admit: finds out the prompts and sampling parameters, or raises an exception.

        Returns:
            The job, which the engine has accepted.

        Raises:
            UserError: if one of the requests is not possible; none runs then.
            Busy: if the queue is full, or that of texts to tokenize or of grammars to compile.
            TimeExceeded: if its time ends before.
            NotServing: while shutting down, or after the engine has failed.
            Exception: whatever `admit` raised.
        """
        self._check_room(num_prompts, num_outputs)
        job = Job(num_prompts * num_outputs, self.time_limit, self._given_up, self._closed)
        self._outstanding += job.num_outputs
        self._jobs.add(job)
        try:
            job.prompts, job.params = await job.prepared(admit())
            self._keep_logprobs(job)
            await job.prepared(asyncio.wrap_future(self.engine.prepare(job.params)))
            job.queued = True
            self._inbox.put(lambda: self._add(job))
            await job.accepted
        except BaseException as error:
            if not job.queued:
                self._not_taken(error)
            job.close()
            if isinstance(error, Crowded):
                raise Busy(error.seconds, str(error)) from None
            raise
        return job

    def _not_taken(self, error: BaseException) -> BaseException:
        if reason := _NOT_TAKEN.get(type(error)):
            self._observer.rejected(reason)
        return error

    def _keep_logprobs(self, job: Job) -> None:
        """Refuse a job whose log probabilities would take too much memory, by itself or beside those of others."""
        if (count := job.num_logprobs) > MOST_LOGPROBS:
            raise UserError(
                f"{count} log probabilities may be asked for here, but at most {MOST_LOGPROBS} are served; ask for fewer "
                "tokens, outputs, or likeliest tokens",
                "logprobs",
            )
        if self._logprobs + count > MOST_LOGPROBS:
            raise self._busy()
        job.kept_logprobs = count
        self._logprobs += count

    def _closed(self, job: Job) -> None:
        self._logprobs -= job.kept_logprobs
        job.kept_logprobs = 0

    def _given_up(self, job: Job) -> None:
        if job.queued:
            self._inbox.put(lambda: self._end(job))
        else:
            self._ended(job)

    # The methods from here on run on the engine's thread.

    def _run(self) -> None:
        try:
            while self._take_commands(wait=not self.engine.unfinished):
                if self.engine.unfinished:
                    self.busy_since = time.monotonic()
                    self._step()
        except BaseException as error:
            log.exception("the engine has failed")
            self._tell(functools.partial(self._fail, error))
        finally:
            self.busy_since = None

    def _take_commands(self, wait: bool) -> bool:
        """Run the commands in the inbox, after waiting for one if `wait`.

        Returns:
            False when asked to stop.
        """
        while True:
            if wait:
                self.busy_since = None
            try:
                command = self._inbox.get(block=wait)
            except queue.Empty:
                return True
            if command is None:
                return False
            self.busy_since = time.monotonic()
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
        """Abort the unfinished requests of a job, and tell the event loop; a job that has ended already stays as it is."""
        for request in job.requests:
            self.engine.abort(request)
            self._running.pop(request.id, None)
        self._tell(lambda: self._ended(job, reason))

    def _step(self) -> None:
        begin = time.perf_counter()
        try:
            updates = self.engine.step()
        except Exception as error:
            log.exception("a step of the engine failed")
            self._fail_step(class_and_line(error))
            return
        self._failed_steps = 0
        self._observer.step(time.perf_counter() - begin)
        self._hand_out(updates)

    def _fail_step(self, said: str) -> None:
        """Hand out what the engine says of a failed step; end all jobs if it says nothing.

        Args:
            said: of the exception.
        """
        if self.engine.failed:
            self._hand_out(self.engine.failed, said)
        else:
            for job in {job for job, _ in self._running.values()}:
                self._end(job, RequestFailed(_STEP_FAILED))
        self._failed_steps += 1
        if self._failed_steps == _MOST_FAILED_STEPS:
            raise RuntimeError(f"{_MOST_FAILED_STEPS} steps in a row have failed")

    def _hand_out(self, updates: list[Update], hidden: str | None = None) -> None:
        """Tell the event loop what a step added to which outputs, and end the jobs of outputs that failed.

        Args:
            hidden: an output's error that its client is not told in these words.
        """
        news = [(*self._running[update.request.id], update) for update in updates if update.request.id in self._running]
        failed = {job: update.output.error for job, _, update in news if update.finish_reason == "error"}
        events = [(job, _event(index, update)) for job, index, update in news if job not in failed]
        for _, _, update in news:
            if update.request.finished:
                self._running.pop(update.request.id, None)
        ended = {job for job, _ in events if all(request.finished for request in job.requests)}
        self._tell(lambda: self._deliver(events, ended))
        for job, error in failed.items():
            reason = _STEP_FAILED if error == hidden else error or "the engine could not compute the request"
            self._end(job, RequestFailed(reason, is_refusal=reason.startswith(NO_TOKEN), setting=job.params.grammar))

    def _tell(self, message: Callable[[], object]) -> None:
        """Have the event loop call a function."""
        try:
            self._loop.call_soon_threadsafe(message)
        except RuntimeError:  # the event loop is closed, so nobody listens any more
            log.debug("an update came after the end")

    # The methods from here on run on the event loop.

    async def _watch(self) -> None:
        """Give up the engine if its thread is stuck in a step, or in a command."""
        while self.failure is None:
            await asyncio.sleep(min(_LOOK, self.step_limit))
            begun = self.busy_since
            if begun is not None and time.monotonic() - begun > self.step_limit:
                error = Stuck(f"one step has taken longer than {self.step_limit:g} seconds")
                log.error("the engine has failed: %s", error)
                self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Answer all jobs, and take no more."""
        self.failure = error
        for job in list(self._jobs):
            self._ended(job, NotServing(self.refusal or ""))
        self._died()

    def _deliver(self, events: list[tuple[Job, Event]], ended: set[Job]) -> None:
        for job, event in events:
            if job.done:
                continue  # it was given up
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
        if job.queued:
            self._observer.ended(job)


def _event(prompt: int, update: Update) -> Event:
    new = len(update.token_ids)
    logprobs = update.output.logprobs
    return Event(
        prompt,
        update.output.index,
        update.text,
        update.token_ids,
        sum(update.output.loops[-new:]) if new else 0,
        (logprobs[-new:] if new else []) if logprobs is not None else None,
        update.request.outputs[0].cached_tokens,
        (update.output.accepted_drafts, update.output.rejected_drafts),
        cast(FinishReason | None, update.finish_reason),
    )
