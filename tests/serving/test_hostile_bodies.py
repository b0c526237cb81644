"""Bodies as large as the limit: each is refused for what is wrong with it, before anything is computed for its parts."""

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from asgi_server import Server, engine_of, error_of, running
from transformers import PreTrainedTokenizerFast

from yoco_u import YocoUForCausalLM
from yoco_u.data import DocumentEncoder
from yoco_u.serving import admission, limits

pytestmark = pytest.mark.anyio

SIZE = 2**19
MOST_CALLS = 60_000  # of Python functions; work for each part of such a body would need more


def filled(before: str, part: str, after: str, separator: str = ",") -> str:
    """As many parts as fit."""
    count = (SIZE - len(before) - len(after)) // (len(part) + len(separator))
    return before + separator.join([part] * count) + after


def keys(before: str, after: str) -> str:
    return before + ",".join(f'"{number}":1' for number in range(SIZE // 9)) + after


TOOL = '{"type":"function","function":{"name":"f"}}'
BEFORE_SCHEMA = '{"messages":[{"role":"user","content":"x"}],"tools":[{"type":"function","function":{"name":"f","parameters":{'
COMPLETIONS = {
    "texts": filled('{"prompt":[', '"a"', "]}"),
    "empty texts": filled('{"prompt":[', '""', "]}"),
    "lists of one token": filled('{"prompt":[', "[1]", "]}"),
    "empty lists": filled('{"prompt":[', "[]", "]}"),
    "objects": filled('{"prompt":[', "{}", "]}"),
    "tokens": filled('{"prompt":[', "1", "]}"),
    "floats": filled('{"prompt":[', "1.5", "]}"),
    "long whole numbers": filled('{"prompt":[', "1" * 4000, "]}"),
    "longer whole numbers": filled('{"prompt":[', "1" * 5000, "]}"),
    "nested lists": '{"prompt":' + "[" * 100_000 + "]" * 100_000 + "}",
    "one text": filled('{"prompt":"', "a", '"}', ""),
    "a text of escapes": filled('{"prompt":"', "\\u00e9", '"}', ""),
    "stop texts": filled('{"stop":[', '"a"', "]}"),
    "wrong stop texts": filled('{"stop":[', "1", "]}"),
    "a long stop text": filled('{"stop":"', "a", '"}', ""),
    "stop tokens": filled('{"stop_token_ids":[', "1", "]}"),
    "wrong stop tokens": filled('{"stop_token_ids":[', '"a"', "]}"),
    "biases": keys('{"logit_bias":{', "}}"),
    "unknown keys": keys("{", "}"),
    "unknown options": keys('{"stream":true,"stream_options":{', "}}"),
    "unknown formats": keys('{"response_format":{', "}}"),
    "a long key": filled('{"', "a", '":1}', ""),
    "a long model": filled('{"model":"', "a", '"}', ""),
    "a long number": filled('{"n":"', "1", '"}', ""),
    "a list for a number": filled('{"n":[', "1", "]}"),
}
CHATS = {
    "messages": filled('{"messages":[', '{"role":"user","content":"x"}', "]}"),
    "no messages": filled('{"messages":[', "{}", "]}"),
    "texts for messages": filled('{"messages":[', '"a"', "]}"),
    "wrong roles": filled('{"messages":[', '{"role":"k"}', "]}"),
    "parts": filled('{"messages":[{"role":"user","content":[', '{"type":"text","text":"xyz"}', "]}]}"),
    "wrong parts": filled('{"messages":[{"role":"user","content":[', "{}", "]}]}"),
    "calls": filled('{"messages":[{"role":"assistant","tool_calls":[', "{}", "]}]}"),
    "tools": filled('{"messages":[{"role":"user","content":"x"}],"tools":[', "{}", "]}"),
    "tools that go on": filled('{"messages":[{"role":"user","content":"x"}],"tools":[', TOOL, "]}"),
    "a tool of many keys": keys('{"messages":[{"role":"user","content":"x"}],"tools":[{', "}]}"),
    "a long choice": filled('{"messages":[{"role":"user","content":"x"}],"tool_choice":"', "a", '"}', ""),
    "a schema of many keys": keys(BEFORE_SCHEMA, "}}}]}"),
    "a deep schema": BEFORE_SCHEMA + '"a":' + "[" * 50_000 + "]" * 50_000 + "}}}]}",
    "other keys": keys('{"messages":[{"role":"king",', "}]}"),
    "a long role": filled('{"messages":[{"role":"', "a", '"}]}', ""),
    "a long text": filled('{"messages":[{"role":"user","content":"', "a", '"}]}', ""),
}
CASES = {f"completions: {name}": ("completions", body) for name, body in COMPLETIONS.items()}
CASES |= {f"chats: {name}": ("chat/completions", body) for name, body in CHATS.items()}


@pytest.fixture(scope="module")
async def chat_server(model: YocoUForCausalLM, chatty: PreTrainedTokenizerFast, anyio_backend: str) -> AsyncIterator[Server]:
    async with running(Server(engine_of(model, chatty))) as one:
        yield one


async def post(server: Server, path: str, body: str) -> Any:
    return await server.client.post(f"/v1/{path}", content=body, headers={"Content-Type": "application/json"})


@contextmanager
def counting() -> Iterator[dict[str, int]]:
    """Count what the interpreter does in this thread, which has the event loop."""
    found: dict[str, int] = {"call": 0}

    def note(_: Any, event: str, __: Any) -> None:
        found[event] = found.get(event, 0) + 1

    sys.setprofile(note)
    try:
        yield found
    finally:
        sys.setprofile(None)


@pytest.mark.parametrize("name", CASES)
async def test_large_bodies_are_refused_without_work_for_each_part(chat_server: Server, name: str) -> None:
    path, body = CASES[name]
    with counting() as calls:
        response = await post(chat_server, path, body)
    status, error = error_of(response)
    assert status in (400, 404) and len(error["message"]) < 600, error
    assert calls["call"] < MOST_CALLS


async def test_what_cannot_run_is_not_tokenized(chat_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("tokenized")

    monkeypatch.setattr(DocumentEncoder, "encode", never)
    longest = max(map(len, chat_server.engine.tokenizer.get_vocab()))  # type: ignore[union-attr]
    for body, message in (
        ({"prompt": ["a"] * 261}, "more than the 260 of a full queue"),
        ({"prompt": ["a"] * 140, "n": 2}, "more than the 260 of a full queue"),
        ({"prompt": ["a"] * 5000}, "5000 prompts are too many"),
        ({"prompt": "a" * (512 * longest + 1)}, "no text of"),
        ({"prompt": ["a", "a" * (512 * longest + 1)]}, "no text of"),
    ):
        status, error = await chat_server.error("completions", **body)
        assert status == 400 and message in error["message"]
    chat_server.loop.draining = True
    assert (await chat_server.error("completions", prompt="a"))[0] == 503
    chat_server.loop.draining = False


async def test_long_texts_are_tokenized_beside_the_event_loop(chat_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """One long text, and many short ones that are long together."""
    encode, threads = DocumentEncoder.encode, []

    def noted(self: DocumentEncoder, texts: Any) -> Any:
        threads.append(threading.current_thread() is threading.main_thread())
        return encode(self, texts)

    monkeypatch.setattr(DocumentEncoder, "encode", noted)
    monkeypatch.setattr(admission, "_SHORT", 1000)
    for prompt in ("def " * 251, ["def " * 10] * 26):
        await chat_server.post("completions", prompt=prompt, max_tokens=1)
    await chat_server.json("completions", prompt="def ", max_tokens=1)
    assert threads == [False, False, True]


LONG = "def " * 251


@pytest.mark.parametrize(
    ("message", "others"),
    [
        ({"content": LONG}, {}),
        ({"name": LONG}, {}),
        ({"tool_call_id": LONG}, {}),
        ({"tool_calls": [{"function": {"name": "f", "arguments": LONG}}]}, {}),
        ({"tool_calls": [{"function": {"name": LONG}}]}, {}),
        ({}, {"tools": [{"type": "function", "function": {"name": "f", "description": LONG}}]}),
    ],
)
async def test_few_long_chats_are_tokenized_at_once(
    chat_server: Server, monkeypatch: pytest.MonkeyPatch, message: dict[str, Any], others: dict[str, Any]
) -> None:
    """Wherever their text is."""
    aside, seen = admission.Admission._aside, []

    async def noted(self: admission.Admission, *arguments: Any) -> Any:
        seen.append(arguments)
        return await aside(self, *arguments)

    monkeypatch.setattr(admission.Admission, "_aside", noted)
    monkeypatch.setattr(admission, "_SHORT", 1000)
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"} | message]
    await chat_server.post("chat/completions", messages=messages, max_tokens=1, **others)
    assert len(seen) == 1
    await chat_server.post("chat/completions", messages=messages[:1], max_tokens=1)
    assert len(seen) == 1


async def test_bodies_are_parsed_in_turns(chat_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bodies that come together let everybody else have a turn between two of them."""
    turns, seen = 0, []
    parsed = limits._parsed

    def noted(body: bytes) -> Any:
        seen.append(turns)
        return parsed(body)

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    everybody = asyncio.create_task(others())
    monkeypatch.setattr(limits, "_parsed", noted)
    await asyncio.gather(*(post(chat_server, "completions", '{"prompt": []}') for _ in range(8)))
    everybody.cancel()
    assert len(seen) == 8 and len(set(seen)) == 8
