"""Chats: the template's tokens, OpenAI's shape, whole and as a stream."""

import copy
from typing import Any

import pytest
from asgi_server import Server, engine_of, running
from transformers import PreTrainedTokenizerFast

from yoco_u import YocoUForCausalLM
from yoco_u.inference import RequestOutput, SamplingParams

pytestmark = pytest.mark.anyio

MESSAGES = [{"role": "system", "content": "täglich"}, {"role": "user", "content": "def 数"}]
TEXT = "<|system|>täglich<|user|>def 数<|assistant|>"
GREEDY: dict[str, Any] = {"messages": MESSAGES, "temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def expected(model: YocoUForCausalLM, tokenizer: PreTrainedTokenizerFast) -> RequestOutput:
    engine = engine_of(model, tokenizer)
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    request = engine.add(ids, SamplingParams(temperature=0, max_tokens=12, logprobs=2))
    while engine.unfinished:
        engine.step()
    return request


async def test_an_answer(chat_server: Server, expected: RequestOutput) -> None:
    found = await chat_server.json("chat/completions", model="tiny", **GREEDY)
    message = {"role": "assistant", "content": expected.outputs[0].text}
    assert found["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}]
    assert found["object"] == "chat.completion" and found["id"].startswith("chatcmpl-")
    prompt = len(expected.prompt_token_ids)
    assert found["usage"]["prompt_tokens"] == prompt and found["usage"]["total_tokens"] == prompt + 12


async def test_content_in_parts_and_other_names(chat_server: Server, expected: RequestOutput) -> None:
    parts = [{"type": "text", "text": "def "}, {"type": "text", "text": "数"}]
    messages = [{"role": "developer", "content": "täglich"}, {"role": "user", "content": parts, "name": "somebody"}]
    body = {"messages": messages, "temperature": 0, "max_completion_tokens": 12, "tools": [], "store": False}
    found = await chat_server.json("chat/completions", **body)
    assert found["choices"][0]["message"]["content"] == expected.outputs[0].text


async def test_a_stream_adds_up_to_the_whole(chat_server: Server, expected: RequestOutput) -> None:
    *chunks, last = await chat_server.stream(
        "chat/completions", stream_options={"include_usage": True}, logprobs=True, top_logprobs=2, **GREEDY
    )
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"]["role"] == "assistant" and all("role" not in one["delta"] for one in choices[1:])
    assert "".join(one["delta"].get("content", "") for one in choices) == expected.outputs[0].text
    assert [one["finish_reason"] for one in choices] == [None] * (len(choices) - 1) + ["length"]
    assert sum(len(one["logprobs"]["content"]) for one in choices) == 12
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 12


async def test_log_probabilities(chat_server: Server, expected: RequestOutput) -> None:
    found = await chat_server.json("chat/completions", logprobs=True, top_logprobs=2, **GREEDY)
    content = found["choices"][0]["logprobs"]["content"]
    assert (
        b"".join(bytes(one["bytes"]) for one in content).decode(errors="replace") == found["choices"][0]["message"]["content"]
    )
    assert [one["logprob"] for one in content] == pytest.approx(
        [one.chosen.logprob for one in expected.outputs[0].logprobs], abs=1e-4
    )
    assert all(len(one["top_logprobs"]) == 2 for one in content)
    [none] = (await chat_server.json("chat/completions", logprobs=True, messages=MESSAGES, max_tokens=1))["choices"]
    assert none["logprobs"]["content"][0]["top_logprobs"] == []


async def test_without_a_number_the_context_is_the_limit(chat_server: Server, expected: RequestOutput) -> None:
    found = await chat_server.json("chat/completions", messages=MESSAGES, ignore_eos=True, n=2)
    room = 512 - len(expected.prompt_token_ids)
    assert found["usage"]["completion_tokens"] == 2 * room
    assert [choice["finish_reason"] for choice in found["choices"]] == ["length", "length"]


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "messages", "messages is missing"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role", "'user'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content", "only parts of the form"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "string"),
        ({"messages": [{"role": "user", "content": "\udfff"}]}, "messages.0.content", "a lone surrogate"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages", "a chat begins with a user"),
        ({"messages": MESSAGES, "prompt": "x"}, "prompt", "unknown key prompt"),
        ({"messages": MESSAGES, "tools": [{"type": "function"}]}, "tools.0.function", "function is missing"),
        ({"messages": MESSAGES, "top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        ({"messages": MESSAGES, "logprobs": 3}, "logprobs", "boolean"),
        ({"messages": MESSAGES, "max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "two names of one thing"),
        ({"messages": [{"role": "user", "content": "x" * 3000}]}, "messages", "this model's context is 512 tokens"),
    ],
)  # fmt: skip
async def test_chats_that_are_refused(chat_server: Server, body: dict[str, Any], param: str | None, message: str) -> None:
    status, error = await chat_server.error("chat/completions", **body)
    assert status == 400 and error["param"] == param and message in error["message"], error


async def test_a_base_model_says_so(server: Server) -> None:
    status, error = await server.error("chat/completions", messages=MESSAGES)
    assert status == 400 and error["code"] == "no_chat_template"
    assert error["message"] == "this model has no chat template: it continues texts; use plain completions (/v1/completions)"


async def test_a_broken_template_is_told_at_the_start_and_is_not_the_fault_of_messages(
    model: YocoUForCausalLM, chatty: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    broken = copy.copy(chatty)
    broken.chat_template, broken.name_or_path = "{{ 1 }}\n{% if %}", "somewhere"
    async with running(Server(engine_of(model, broken))) as server:
        [told] = [record.getMessage() for record in caplog.records if record.name == "yoco_u.serving"]
        assert told.startswith("somewhere/tokenizer_config.json: ") and "line 2: Expected an expression" in told
        assert "\n" not in told
        for messages in (MESSAGES, [{"role": "user", "content": "x" * 20_000}]):
            status, error = await server.error("chat/completions", messages=messages)
            assert (status, error["param"], error["code"]) == (400, None, "no_chat_template")
            assert error["message"].startswith("this model's chat template is broken (line 2: ")
            assert "somewhere" not in error["message"]
        await server.json("completions", prompt="def ", max_tokens=1)
        assert (await server.client.get("/model")).json()["chat"] is False
