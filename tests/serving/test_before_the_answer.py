"""Whatever is done for a request before its answer: it has its place, its time runs, and it ends when its client goes."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import Any

import pytest
from asgi_server import Server, engine_of, running
from transformers import PreTrainedTokenizerFast

from yoco_u import YocoUForCausalLM
from yoco_u.data import DocumentEncoder
from yoco_u.inference import turns
from yoco_u.serving import admission, engine_loop
from yoco_u.serving.answers import Answer
from yoco_u.serving.jobs import NotServing, TimeExceeded

pytestmark = pytest.mark.anyio

LONG = "def " * 3000
TEXT: dict[str, Any] = {"prompt": LONG, "max_tokens": 1}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
SHORT: dict[str, Any] = {"prompt": "def", "max_tokens": 1}


class Client:
    """A client that may leave, and that may take no more than the beginning of its answer."""

    def __init__(self, server: Server, body: dict[str, Any]) -> None:
        self._parts = [{"type": "http.request", "body": json.dumps(body).encode()}]
        self._left, self._sent = asyncio.Event(), list[Any]()
        self.takes = asyncio.Event()
        self.takes.set()
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b"", "http_version": "1.1"}
        self._task = asyncio.create_task(server.app(scope, self._receive, self._send))

    async def _receive(self) -> Any:
        if self._parts:
            return self._parts.pop()
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self._sent.append(message)
        if message["type"] == "http.response.body":
            await self.takes.wait()

    def leave(self) -> None:
        self._left.set()

    async def answer(self) -> tuple[int, bytes]:
        await asyncio.wait_for(self._task, 60)
        return self._sent[0]["status"], self._sent[1]["body"]


class Held:
    """One place where requests are held up until the end of the test."""

    def __init__(self, server: Server, patch: pytest.MonkeyPatch) -> None:
        self.server, self._patch = server, patch
        self.reached, self.go_on = threading.Event(), threading.Event()

    def _wait(self, *_: Any, **__: Any) -> Any:
        self.reached.set()
        self.go_on.wait()
        return b""

    def tokenizing(self) -> dict[str, Any]:
        self._patch.setattr(DocumentEncoder, "encode", self._wait)
        return TEXT

    def waiting_to_be_tokenized(self) -> dict[str, Any]:
        taken = threading.Barrier(admission._LONG_TEXTS + 1)
        for _ in range(admission._LONG_TEXTS):
            self.server.app.state.parts.admission._texts.take(0, lambda: True, lambda: (taken.wait(), self.go_on.wait()))
        taken.wait()
        self.reached.set()
        return TEXT

    def in_the_template(self) -> dict[str, Any]:
        self._patch.setattr(admission, "chat_text", self._wait)
        return CHAT

    def in_its_grammar(self) -> dict[str, Any]:
        def prepare(_: Any) -> Future[None]:
            self.reached.set()
            return Future()

        self._patch.setattr(self.server.engine, "prepare", prepare)
        return SHORT

    def being_written(self) -> dict[str, Any]:
        self._patch.setattr(Answer, "_write", self._wait)
        return SHORT | {"logprobs": 1}


BEFORE_THE_ENGINE = [Held.tokenizing, Held.waiting_to_be_tokenized, Held.in_the_template, Held.in_its_grammar]


@pytest.fixture(scope="module")
async def small(model: YocoUForCausalLM, chatty: PreTrainedTokenizerFast, anyio_backend: str) -> AsyncIterator[Server]:
    """A server with room for one output."""
    engine = engine_of(model, chatty, max_num_seqs=1, max_model_len=2048, cache_tokens=4096)
    async with running(Server(engine, max_waiting=0)) as one:
        yield one


@pytest.fixture
async def held(small: Server, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Held]:
    one = Held(small, monkeypatch)
    yield one
    assert small.loop._outstanding == small.loop._logprobs == 0 and not small.loop._jobs
    one.go_on.set()
    monkeypatch.undo()
    assert (await small.json("completions", **SHORT))["choices"]


async def begun(held: Held, body: dict[str, Any]) -> Client:
    client = Client(held.server, body)
    while not held.reached.is_set() or not (held.server.loop._jobs or held.server.loop._logprobs):
        await asyncio.sleep(0.002)
    return client


@pytest.mark.parametrize("where", [*BEFORE_THE_ENGINE, Held.being_written])
async def test_who_leaves_frees_his_place(held: Held, where: Callable[[Held], dict[str, Any]]) -> None:
    """At once, although what was being done for him goes on."""
    client = await begun(held, where(held))
    client.leave()
    assert (await client.answer())[0] == 499


@pytest.mark.parametrize("where", BEFORE_THE_ENGINE)
@pytest.mark.parametrize(("end", "said"), [(TimeExceeded("late"), b"late"), (NotServing("the end"), b"the end")])
async def test_time_and_shutdown_end_it(
    held: Held, where: Callable[[Held], dict[str, Any]], end: Exception, said: bytes
) -> None:
    """And nobody else gets its place before."""
    client = await begun(held, where(held))
    assert (await held.server.error("completions", **SHORT))[0] == 429
    [job] = held.server.loop._jobs
    job.give_up(end)
    status, body = await client.answer()
    assert status == 503 and said in body


async def test_who_leaves_is_not_parsed(small: Server) -> None:
    """And small bodies do not wait for large ones."""
    async with small.app.state.parsing._large:
        client = Client(small, SHORT | {"user": "x" * 2**16})
        assert (await small.json("completions", **SHORT))["choices"]
        client.leave()
        assert (await client.answer())[0] == 499


async def test_too_many_long_texts_are_refused(small: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 429; short ones are not."""
    monkeypatch.setattr(turns, "_LONGEST_WAIT", -0.5)
    status, error = await small.error("completions", **TEXT)
    assert status == 429 and error["code"] == "queue_full" and "long texts" in error["message"]
    assert (await small.json("completions", **SHORT))["choices"]


async def test_log_probabilities_are_counted(model: YocoUForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Of echoed prompts, once an output, and of outputs; until the answer is over."""
    async with running(Server(engine_of(model, tokenizer))) as server:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine_loop, "MOST_LOGPROBS", 2 * 2 * (8 + 5) * 3)
            body: dict[str, Any] = {"prompt": [[1] * 8] * 2, "n": 2, "max_tokens": 5, "echo": True, "logprobs": 2}
            assert len((await server.json("completions", **body))["choices"]) == 4
            status, error = await server.error("completions", **body | {"max_tokens": 6})
            assert (status, error["param"]) == (400, "logprobs") and "168 log probabilities" in error["message"]
            held = Held(server, patch)
            client = Client(server, body | held.being_written())
            while not held.reached.is_set():
                await asyncio.sleep(0.002)
            assert (await server.error("completions", **body))[0] == 429
            await server.stream("completions", **SHORT)
            held.go_on.set()
            assert (await client.answer())[0] == 200 and server.loop._logprobs == 0


@pytest.mark.parametrize(("stream", "given_up"), [(False, False), (True, False), (True, True)])
async def test_log_probabilities_count_until_the_answer_has_left(small: Server, stream: bool, given_up: bool) -> None:
    client = Client(small, {"prompt": [1] * 8, "max_tokens": 40, "logprobs": 2, "stream": stream})
    client.takes.clear()
    while len(client._sent) < 2:
        await asyncio.sleep(0.002)
    if given_up:  # because time has run out, or the server ends
        small.loop.close_all()
    while small.loop._jobs:
        await asyncio.sleep(0.002)
    assert small.loop._logprobs == 40 * 3
    client.takes.set()
    assert (await client.answer())[0] == 200 and small.loop._logprobs == 0
