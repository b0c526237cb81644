"""The edges of OpenAI's API: what asks for nothing changes nothing, as at OpenAI and in vLLM, and the rest is refused."""

import re
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from asgi_server import Server, engine_of, running
from transformers import PreTrainedTokenizerFast

from yoco_u import YocoUForCausalLM
from yoco_u.serving.requests import ChatRequest, CompletionRequest

pytestmark = pytest.mark.anyio

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.name or '' }}{{ m.tool_call_id or '' }}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}({{ call.id }}:{{ call.function.name }}"
    "{% for key, value in call.function.arguments.items() %} {{ key }}={{ value }}{% endfor %}){% endfor %}{% endfor %}"
    "{% if tools %}TOOLS{% endif %}"
)
SAY: dict[str, Any] = {"model": "tiny", "prompt": "def ", "temperature": 0, "max_tokens": 8}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "def "}], "temperature": 0, "max_tokens": 8}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
async def chat_server(model: YocoUForCausalLM, chatty: PreTrainedTokenizerFast, anyio_backend: str) -> AsyncIterator[Server]:
    """With a template that shows everything that messages can have."""
    template, chatty.chat_template = chatty.chat_template, TEMPLATE
    async with running(Server(engine_of(model, chatty))) as one:
        yield one
    chatty.chat_template = template


async def said(client: openai.AsyncOpenAI, **body: Any) -> str:
    """The text of an answer, through the field names that the client knows; what it does not know goes into the body."""
    if "messages" in body:
        found = await client.post("/chat/completions", body=body, cast_to=object)
        return found["choices"][0]["message"]["content"]  # type: ignore[index, no-any-return]
    found = await client.post("/completions", body=body, cast_to=object)
    return found["choices"][0]["text"]  # type: ignore[index, no-any-return]


@pytest.fixture(scope="module")
async def plain_text(client: openai.AsyncOpenAI) -> str:
    return await said(client, **SAY)


@pytest.fixture(scope="module")
async def plain_answer(client: openai.AsyncOpenAI) -> str:
    return await said(client, **CHAT)


ASKS_FOR_NOTHING: list[dict[str, Any]] = [
    {"stop": []}, {"stop": None}, {"n": 1}, {"seed": -5}, {"seed": 2**63 - 1}, {"seed": -(2**63)}, {"user": "somebody"},
    {"user": ""}, {"metadata": {}}, {"metadata": {"a": "b"}}, {"store": True}, {"store": False}, {"service_tier": "auto"},
    {"top_p": 1}, {"top_p": 0}, {"top_p": 0.0}, {"presence_penalty": 0}, {"frequency_penalty": 0}, {"logit_bias": {}},
    {"response_format": {"type": "text"}}, {"response_format": {"type": "text", "json_schema": None}}, {"stream": False},
    {"stream_options": None}, {"tools": []}, {"tools": None}, {"tool_choice": "none"}, {"tool_choice": "auto"},
    {"tools": TOOLS, "tool_choice": "none"}, {"functions": [{"name": "f"}], "function_call": "none"},
    {"modalities": ["text"]}, {"parallel_tool_calls": True}, {"reasoning_effort": "none"}, {"verbosity": "medium"},
    {"model": None},
]  # fmt: skip
OF_COMPLETIONS: list[dict[str, Any]] = [
    {"best_of": 0}, {"best_of": 1}, {"suffix": ""}, {"echo": False}, {"logprobs": 0}, {"logprobs": None},
]  # fmt: skip
OF_CHATS: list[dict[str, Any]] = [
    {"logprobs": False}, {"logprobs": False, "top_logprobs": 0}, {"top_logprobs": 0}, {"logprobs": True, "top_logprobs": 0},
    {"max_completion_tokens": 8},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "def"}, {"type": "text", "text": " "}]}]},
    {"messages": [{"role": "user", "content": "def ", "refusal": None, "annotations": [], "audio": None}]},
    {"messages": [{"role": "user", "content": "def ", "name": None, "tool_calls": None, "tool_call_id": None}]},
]  # fmt: skip


@pytest.mark.parametrize("extra", ASKS_FOR_NOTHING + OF_COMPLETIONS)
async def test_what_asks_for_nothing_changes_no_completion(
    client: openai.AsyncOpenAI, plain_text: str, extra: dict[str, Any]
) -> None:
    assert await said(client, **SAY | extra) == plain_text


@pytest.mark.parametrize("extra", ASKS_FOR_NOTHING + OF_CHATS)
async def test_what_asks_for_nothing_changes_no_chat(
    client: openai.AsyncOpenAI, plain_answer: str, extra: dict[str, Any]
) -> None:
    assert await said(client, **CHAT | extra) == plain_answer


@pytest.mark.parametrize(("cls", "body"), [(CompletionRequest, SAY), (ChatRequest, CHAT)])
async def test_null_is_the_default_of_every_field(client: openai.AsyncOpenAI, cls: Any, body: dict[str, Any]) -> None:
    nulls = {name: None for name in cls.model_fields if name not in body}
    nulls |= dict.fromkeys(["user", "metadata", "store", "tools", "tool_choice", "logit_bias", "suffix", "prediction"])
    expected = await said(client, **body)
    assert await said(client, **body, **nulls) == expected
    assert await said(client, **body | {"response_format": {"type": "text", "json_schema": None}}) == expected


async def test_null_stream_options_mean_none(chat_server: Server) -> None:
    options = {"include_usage": None, "continuous_usage_stats": None, "include_obfuscation": None}
    chunks = await chat_server.stream("completions", stream_options=options, **SAY)
    assert all("usage" not in chunk for chunk in chunks)


async def test_no_prompt_begins_a_document(client: openai.AsyncOpenAI) -> None:
    expected = await said(client, **SAY | {"prompt": ""})
    assert await said(client, **SAY | {"prompt": None}) == expected
    assert await said(client, **{key: value for key, value in SAY.items() if key != "prompt"}) == expected
    assert await said(client, **SAY | {"prompt": [""]}) == expected


@pytest.mark.parametrize("extra", [{}, {"temperature": 1.0}, {"temperature": 2.0, "top_k": 7}, {"temperature": 1, "seed": 4}])
async def test_top_p_of_nothing_takes_the_likeliest_token(client: openai.AsyncOpenAI, extra: dict[str, Any]) -> None:
    for body in (SAY, CHAT):
        assert await said(client, **body | extra | {"top_p": 0}) == await said(client, **body)


async def test_scoring_needs_no_output(client: openai.AsyncOpenAI) -> None:
    found = await client.completions.create(**SAY | {"max_tokens": 0, "echo": True, "logprobs": 0})
    assert found.choices[0].text == "def " and found.usage.completion_tokens == 0
    assert len(found.choices[0].logprobs.tokens) == found.usage.prompt_tokens
    assert await said(client, **SAY | {"max_tokens": 0}) == ""


HISTORIES: list[tuple[list[dict[str, Any]], str]] = [
    (
        [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1, "b": "c"}'}},
                {"id": "2", "type": "function", "function": {"name": "g", "arguments": "{}"}},
            ]},
            {"role": "tool", "tool_call_id": "1", "content": "y"},
            {"role": "tool", "tool_call_id": "2", "content": [{"type": "text", "text": "z"}]},
        ],
        "<|user|>x<|assistant|>(1:f a=1 b=c)(2:g)<|tool|>1y<|tool|>2z",
    ),
    (
        [{"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}, "content": ""},
         {"role": "function", "name": "f", "content": "y"}],
        "<|assistant|><|function|>fy",
    ),
    ([{"role": "developer", "content": "x"}, {"role": "user", "name": "n", "content": "y"}], "<|system|>x<|user|>ny"),
    ([{"role": "assistant"}, {"role": "user", "content": []}], "<|assistant|><|user|>"),
]  # fmt: skip


@pytest.mark.parametrize(("messages", "text"), HISTORIES)
async def test_histories_reach_the_template(
    client: openai.AsyncOpenAI, messages: list[dict[str, Any]], text: str, chatty: PreTrainedTokenizerFast
) -> None:
    tokens = chatty.backend_tokenizer.encode(text, add_special_tokens=False).ids
    assert await said(client, **CHAT | {"messages": messages}) == await said(client, **SAY | {"prompt": tokens})


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"n": 0}, "n: "), ({"seed": 2**64}, "seed: "), ({"seed": 1.5}, "seed: "), ({"stream_options": {}}, "for streams"),
    ({"stream_options": {"include_usage": True}, "stream": False}, "for streams"), ({"top_p": -0.1}, "top_p: "),
    ({"top_p": 1.1}, "top_p: "), ({"stop": ""}, "stop"), ({"stop": [None]}, "stop"), ({"unknown": 1}, "unknown key unknown"),
    ({"functions": [{}], "tool_choice": "none"}, "functions is not supported; use tools"),
    ({"function_call": {"name": "f"}}, "function_call is not supported; use tools and tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"logit_bias": {"5": 101}}, "logit_bias: "), ({"response_format": {"type": "json_schema"}}, "together"),
    ({"reasoning_effort": "high"}, "reasoning_effort is not"), ({"temperature": -1}, "temperature: "),
]  # fmt: skip
COMPLETIONS_REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"best_of": 2}, "best_of 2"), ({"best_of": -1}, "best_of: "), ({"prompt": []}, "prompt: "), ({"prompt": [[]]}, "prompt: "),
    ({"prompt": [None]}, "prompt: "), ({"logprobs": -1}, "logprobs: "), ({"max_tokens": -1}, "max_tokens: "),
    ({"prompt": {}}, "prompt: "), ({"tools": TOOLS}, "tools is not supported; use /v1/chat/completions"),
    ({"tools": TOOLS, "tool_choice": "required"}, "not supported"),
]  # fmt: skip
CHATS_REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages: "), ({"messages": None}, "messages: "), ({"messages": [{}]}, "messages.0.role is missing"),
    ({"max_tokens": 0}, "max_tokens: "), ({"max_completion_tokens": 0}, "max_completion_tokens: "),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "only parts"),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "function is missing"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"type": "custom", "function": {"name": "f"}}]}]}, "'function'"),
    ({"top_logprobs": 2}, "needs logprobs"), ({"logprobs": False, "top_logprobs": 2}, "needs logprobs"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("body", "message"),
    [(SAY | body, message) for body, message in REFUSED + COMPLETIONS_REFUSED]
    + [(CHAT | body, message) for body, message in REFUSED + CHATS_REFUSED],
)
async def test_the_rest_is_refused(client: openai.AsyncOpenAI, body: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        await said(client, **body)
    error: Any = raised.value.body
    assert message in error["message"] and error["type"] == "invalid_request_error", error


NEVER = ["suffix", "tools", "tool_choice", "functions", "function_call", "modalities", "audio", "prediction",
         "web_search_options", "reasoning_effort", "verbosity", "moderation", "unheard_of"]  # fmt: skip
WRONG: list[Any] = [{"a": 1}, [{}], [[]], "\udfff", "", 10**25, -(10**25), 2.5, True, -1]


@pytest.mark.parametrize(
    ("cls", "path", "good"), [(CompletionRequest, "completions", SAY), (ChatRequest, "chat/completions", CHAT)]
)
async def test_a_refusal_names_the_parameter(chat_server: Server, cls: Any, path: str, good: dict[str, Any]) -> None:
    """Whatever is wrong with it, wherever it is found out; and limits are printed as they are."""
    for name in [*cls.model_fields, *NEVER]:
        answers = [(value, await chat_server.post(path, **good | {name: value})) for value in WRONG]
        refused = [(value, one.json()["error"]) for value, one in answers if one.status_code in (400, 404)]
        assert len(refused) + sum(one.status_code == 200 for _, one in answers) == len(WRONG)
        assert refused, name
        for value, error in refused:
            assert error["param"] is not None and error["param"].split(".")[0] == name, (name, value, error)
            assert "e+" not in error["message"], error


TOGETHER: list[tuple[dict[str, Any], str | None]] = [
    ({"stream_options": {}}, "stream_options"), ({"stream": True, "stream_options": {"b": 1}}, "stream_options.b"),
    ({"regex": "a("}, "regex"), ({"regex": "a" * 300_000}, "regex"), ({"regex": "a", "min_tokens": 2}, "min_tokens"),
    ({"regex": "a", "ignore_eos": True}, "ignore_eos"), ({"min_tokens": 9}, "min_tokens"),
    ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
    ({"response_format": {"type": "json_object", "a": 1}}, "response_format.a"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format.json_schema.schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"a": "b" * 300_000}}}}, "response_format"),
    ({"x" * 200: 1}, "x" * 100), ({"stop_token_ids": [1, 2**31]}, "stop_token_ids.1"), ({"n": 300}, "n"),
    ({str(n): 1 for n in range(101)}, None),
]  # fmt: skip
OF_A_CHAT: list[tuple[dict[str, Any], str | None]] = [
    ({"max_tokens": 5000}, "max_tokens"), ({"max_tokens": None, "max_completion_tokens": 5000}, "max_completion_tokens"),
    ({"max_completion_tokens": 9}, "max_tokens"),
    ({"messages": [CHAT["messages"][0], {"role": "user", "content": 1}]}, "messages.1.content"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}, "messages.0.tool_calls.0.function.name"),
]  # fmt: skip
OF_A_COMPLETION: list[tuple[dict[str, Any], str | None]] = [
    ({"max_tokens": 5000}, "max_tokens"), ({"max_tokens": 0, "n": 2}, "n"), ({"max_tokens": 0, "prompt": [1]}, "max_tokens"),
    ({"prompt": ["a", "\udfff"]}, "prompt"), ({"prompt": [[10**6]]}, "prompt"), ({"best_of": 3, "n": 2}, "best_of"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [("completions", SAY | body, param) for body, param in TOGETHER + OF_A_COMPLETION]
    + [("chat/completions", CHAT | body, param) for body, param in TOGETHER + OF_A_CHAT],
)
async def test_a_refusal_of_several_together_names_the_one_to_change(
    chat_server: Server, path: str, body: dict[str, Any], param: str | None
) -> None:
    status, error = await chat_server.error(path, **body)
    assert (status, error["param"]) == (400, param), error
    assert not re.match(r"SamplingParams|request \d|json_schema", error["message"]), error
