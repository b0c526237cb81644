"""The engine behind asyncio: order, limits, clients that leave, time that runs out, steps and engines that fail."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any

import pytest
from asgi_server import engine_of
from transformers import PreTrainedTokenizerFast

from yoco_u import YocoUForCausalLM
from yoco_u.errors import UserError
from yoco_u.inference import Engine, SamplingParams
from yoco_u.serving.engine_loop import EngineLoop
from yoco_u.serving.jobs import Admitted, Busy, Job, NotServing, RequestFailed, TimeExceeded

pytestmark = pytest.mark.anyio

LONG = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)


@pytest.fixture
def engine(model: YocoUForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Engine:
    return engine_of(model, tokenizer)


@asynccontextmanager
async def started(engine: Engine, **settings: Any) -> AsyncIterator[EngineLoop]:
    loop = EngineLoop(engine, **{"max_waiting": 8, "time_limit": 60.0, "step_limit": 60.0} | settings)
    loop.start()
    yield loop
    await loop.stop()
    assert loop.failure is not None or not engine.unfinished
    assert loop._outstanding == 0 and not loop._jobs
    assert not loop._running or loop.failure is not None


async def submit(loop: EngineLoop, prompts: list[list[int]], params: SamplingParams) -> Job:
    async def admit() -> Admitted:
        return prompts, params

    return await loop.submit(len(prompts), params.n, admit)


async def tokens(job: Job) -> list[int]:
    return [token for event in [event async for event in job] for token in event.token_ids]


async def until(condition: Callable[[], object]) -> None:
    async def wait() -> None:
        while not condition():
            await asyncio.sleep(0.002)

    await asyncio.wait_for(wait(), 30)


def all_free(engine: Engine) -> bool:
    pool = engine.scheduler.pool
    return not engine.unfinished and pool.num_available == pool.num_blocks


async def test_many_at_once_are_what_each_is_alone(engine: Engine, model: YocoUForCausalLM) -> None:
    prompts = [[1 + seed, 5, 9 + seed] for seed in range(8)]
    expected = []
    for prompt in prompts:
        request = engine.add(prompt, SHORT)
        while engine.unfinished:
            engine.step()
        expected.append(request.outputs[0].token_ids)
    async with started(engine) as loop:
        jobs = [await submit(loop, [prompt], SHORT) for prompt in prompts]
        assert await asyncio.gather(*map(tokens, jobs)) == expected
        both = await submit(loop, prompts[:2], SHORT)
        events = [event async for event in both]
        assert {event.prompt for event in events} == {0, 1}
        assert [request.outputs[0].token_ids for request in both.requests] == expected[:2]
    assert all_free(engine)


async def test_impossible_requests_are_refused_whole(engine: Engine) -> None:
    async with started(engine) as loop:
        with pytest.raises(UserError, match="max_model_len"):
            await submit(loop, [[1, 2], [3] * 600], SHORT)
        assert all_free(engine)
        with pytest.raises(UserError, match="more than the 12 of a full queue"):
            await submit(loop, [[1]] * 13, SHORT)
        assert len(await tokens(await submit(loop, [[1, 2]], SHORT))) == 5


async def test_a_full_queue_refuses(engine: Engine) -> None:
    async with started(engine, max_waiting=1) as loop:
        jobs = [await submit(loop, [[1, 2]], LONG) for _ in range(5)]
        with pytest.raises(Busy) as busy:
            await submit(loop, [[3]], SHORT)
        assert 1 <= busy.value.retry_after <= 60
        for job in jobs:
            job.close()
        await until(lambda: all(job.done for job in jobs))
        assert len(await tokens(await submit(loop, [[3]], SHORT))) == 5


async def test_whoever_leaves_frees_what_he_held(engine: Engine) -> None:
    async with started(engine) as loop:
        job = await submit(loop, [[1, 2], [3, 4]], LONG.model_copy(update={"n": 2}))
        await anext(job)
        job.close()
        await until(lambda: all_free(engine))
        job.close()
        task = asyncio.create_task(submit(loop, [[5]], LONG))
        await asyncio.sleep(0)
        task.cancel()
        await until(lambda: not loop._jobs)
        await until(lambda: all_free(engine))


async def test_time_runs_out(engine: Engine) -> None:
    async with started(engine, time_limit=0.05) as loop:
        with pytest.raises(TimeExceeded, match=r"longer than 0\.05 seconds"):  # where it is slow, before the job is taken
            job = await submit(loop, [[1, 2]], SamplingParams(max_tokens=500, ignore_eos=True, regex=None))
            async for _ in job:
                await asyncio.sleep(0.01)
        await until(lambda: all_free(engine))


@pytest.mark.parametrize(("time_limit", "error"), [(0.05, TimeExceeded), (60.0, NotServing)])
async def test_a_job_that_ends_waits_no_longer_for_its_grammar(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, time_limit: float, error: type[Exception]
) -> None:
    """And its grammar is not compiled any more, if that has not begun."""
    waiting: list[Future[None]] = []

    def prepare(_: SamplingParams) -> Future[None]:
        waiting.append(Future())
        return waiting[-1]

    monkeypatch.setattr(engine, "prepare", prepare)
    async with started(engine, time_limit=time_limit) as loop:
        task = asyncio.create_task(submit(loop, [[1, 2]], SHORT))
        await until(lambda: waiting)
        if error is NotServing:
            loop.close_all()
        with pytest.raises(error):
            await asyncio.wait_for(task, 30)
        assert waiting[0].cancelled()


async def test_draining_lets_what_runs_end(engine: Engine) -> None:
    async with started(engine) as loop:
        job = await submit(loop, [[1, 2]], SHORT)
        loop.drain(30)
        with pytest.raises(NotServing, match="shutting down"):
            await submit(loop, [[1, 2]], SHORT)
        assert len(await tokens(job)) == 5


async def test_draining_does_not_wait_for_ever(engine: Engine) -> None:
    async with started(engine) as loop:
        job = await submit(loop, [[1, 2]], LONG)
        loop.drain(0.01)
        with pytest.raises(NotServing, match="shutting down"):
            await tokens(job)


async def test_stopping_ends_everything(engine: Engine) -> None:
    async with started(engine) as loop:
        job = await submit(loop, [[1, 2]], LONG)
    with pytest.raises(NotServing):
        await tokens(job)


async def test_a_failed_step_fails_its_requests_and_no_others(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    run, broken = engine.runner.run, True

    def breaks(step: Any) -> Any:
        if broken:
            raise RuntimeError("no memory")
        return run(step)

    async with started(engine) as loop:
        for _ in range(4):  # more often than a broken engine may, but not in a row
            broken = True
            monkeypatch.setattr(engine.runner, "run", breaks)
            with pytest.raises(RequestFailed, match="failed while it computed"):
                await tokens(await submit(loop, [[1, 2]], SHORT))
            broken = False
            assert len(await tokens(await submit(loop, [[1, 2]], SHORT))) == 5
        assert loop.failure is None and all_free(engine)


@pytest.mark.parametrize("last", range(1, 7))
@pytest.mark.parametrize("place", ["accept", "settle"])
async def test_a_failed_step_tells_everybody_what_the_engine_says(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, place: str, last: int
) -> None:
    """Outputs that ended in it, by themselves or by the fault, and those that wait for a seat; nobody loses a token."""
    lengths = range(1, 7)
    expected = engine.add([1, 2], LONG.model_copy(update={"max_tokens": max(lengths)})).outputs[0]
    while engine.unfinished:
        engine.step()
    jobs: list[Job] = []
    original = getattr(engine.speculation, place)

    def breaks() -> Any:
        if len(jobs) == len(lengths) and jobs[last - 1].requests[0].finished:
            monkeypatch.setattr(engine.speculation, place, original)
            raise RuntimeError("no memory")
        return original()

    monkeypatch.setattr(engine.speculation, place, breaks)
    async with started(engine) as loop:
        with monkeypatch.context() as patch:
            patch.setattr(engine, "step", list)  # until all are there
            for length in lengths:
                jobs.append(await submit(loop, [[1, 2]], LONG.model_copy(update={"max_tokens": length})))
        for length, job in zip(lengths, jobs, strict=True):
            told = []
            try:
                async for event in job:
                    told += event.token_ids
            except RequestFailed as error:
                assert job.requests[0].outputs[0].finish_reason == "error" and "failed while it computed" in str(error)
            else:
                assert told == expected.token_ids[:length]
    assert jobs[last - 1].requests[0].outputs[0].finish_reason == "length"
    assert all_free(engine)


async def test_an_engine_that_keeps_failing_is_given_up(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks() -> Any:
        raise RuntimeError("broken for good")

    monkeypatch.setattr(engine, "step", breaks)
    died = asyncio.Event()
    async with started(engine, died=died.set) as loop:
        for _ in range(2):
            with pytest.raises(RequestFailed):
                await tokens(await submit(loop, [[1, 2]], SHORT))
        with pytest.raises((RequestFailed, NotServing)):
            await tokens(await submit(loop, [[1, 2]], SHORT))
        await asyncio.wait_for(died.wait(), 30)
        assert "3 steps in a row" in str(loop.failure)
        with pytest.raises(NotServing, match="the engine has failed"):
            await submit(loop, [[1, 2]], SHORT)


@pytest.mark.parametrize("where", ["step", "add"])
async def test_an_engine_that_is_stuck_is_given_up(engine: Engine, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Whoever waits gets an answer, the next one too, and the server can end although the thread cannot."""
    stuck, free, died = threading.Event(), threading.Event(), asyncio.Event()

    def hangs(*_: Any) -> Any:
        stuck.set()
        free.wait()
        return []

    async with started(engine, died=died.set) as loop:
        running = await submit(loop, [[1, 2]], LONG)
        await anext(running)
        monkeypatch.setattr(engine, where, hangs)

        async def ask() -> list[int]:
            return await tokens(await submit(loop, [[3]], SHORT))

        asking = asyncio.create_task(ask())
        await until(stuck.is_set)
        loop.step_limit = 0.05
        for job in (tokens(running), asking):
            with pytest.raises(NotServing, match=r"one step has taken longer than 0\.05 seconds"):
                await job
        assert died.is_set()
        with pytest.raises(NotServing, match="one step"):
            await submit(loop, [[1, 2]], SHORT)
        assert loop.refusal
    assert loop._thread.is_alive()
    free.set()
    await until(lambda: not loop._thread.is_alive())


async def test_a_request_that_cannot_be_added_fails_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    add = engine.add

    def breaks(prompt: list[int], params: SamplingParams) -> Any:
        if prompt == [7]:
            raise RuntimeError("a fault")
        return add(prompt, params)

    monkeypatch.setattr(engine, "add", breaks)
    async with started(engine) as loop:
        job = await submit(loop, [[1, 2]], SHORT)
        with pytest.raises(RequestFailed, match="could not take"):
            await submit(loop, [[5], [7]], SHORT)
        assert len(await tokens(job)) == 5
    assert all_free(engine)


async def test_what_is_not_a_number_fails_its_own_job(
    model: YocoUForCausalLM, tokenizer: PreTrainedTokenizerFast, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = engine.runner.run

    def breaks(step: Any) -> Any:
        return [(chunk, logits * (float("nan") if chunk.request.prompt[0] == 7 else 1)) for chunk, logits in run(step)]

    monkeypatch.setattr(engine.runner, "run", breaks)
    async with started(engine) as loop:
        good, bad = await submit(loop, [[1, 2]], SHORT), await submit(loop, [[5], [7]], SHORT)
        with pytest.raises(RequestFailed, match="NaN or infinity"):
            await tokens(bad)
        assert len(await tokens(good)) == 5
    assert all_free(engine)
