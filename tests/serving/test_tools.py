"""Tools: what the model is shown of them, calls that fit their schemas, OpenAI's shape whole and as a stream."""

import copy
import json
import random
from collections.abc import AsyncIterator, Sequence
from typing import Any

import jsonschema_rs
import openai
import pytest
import torch
from asgi_server import Server, engine_of, running
from models import architecture, build
from transformers import PreTrainedTokenizerFast

from yoco_u import YocoUForCausalLM
from yoco_u.data import END_OF_TEXT, train_tokenizer
from yoco_u.inference import engine as engine_module
from yoco_u.inference.sampler import sample
from yoco_u.inference.sampler_state import SamplerState
from yoco_u.inference.tool_calls import call_text
from yoco_u.serving.tools import template_writes_calls

pytestmark = pytest.mark.anyio

PLAIN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"
HERMES = (
    "{% if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for call in m.tool_calls or [] %}"
    '{% if m.content or not loop.first %}\n{% endif %}<tool_call>\n{"name": "{{ call.function.name }}", "arguments": '
    "{{ call.function.arguments | tojson }}}\n</tool_call>{% endfor %}{% endfor %}<|assistant|>"
)
OTHERS = {
    "no tools": PLAIN,
    "tools without calls": PLAIN + "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}",
    "calls without tools": HERMES[HERMES.index("{% for m") :],
    "another form of calls": HERMES.replace('"name"', '"function"'),
    "calls in XML": HERMES.replace('{"name": "{{ call.function.name }}", "arguments": ', "<function={{ call.function.name }}>"),
    "no results": HERMES + "{% if messages[-1].role == 'tool' %}{{ raise_exception('no') }}{% endif %}",
}
WEATHER: dict[str, Any] = {
    "name": "weather", "description": "How the weather is.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 3}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city"], "additionalProperties": False,
    },
}  # fmt: skip
CLOCK: dict[str, Any] = {"name": "clock"}
TOOLS = [{"type": "function", "function": WEATHER}, {"type": "function", "function": CLOCK}]
SCHEMAS = {"weather": WEATHER["parameters"], "clock": {"const": {}}}
NAMED = {"type": "function", "function": {"name": "weather"}}
ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "def "}], "tools": TOOLS, "seed": 5}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Whose tokens make calls short, with a template that shows tools and writes calls."""
    found = train_tokenizer([call_text("weather", '{"city": "x", "days": 3}'), call_text("clock", "{}")] * 9, 360)
    found.chat_template = HERMES
    return found


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> YocoUForCausalLM:
    return build(architecture("yoco_u", vocab_size=len(tokenizer) + 3))


@pytest.fixture(scope="module")
async def chat_server(model: YocoUForCausalLM, tokenizer: PreTrainedTokenizerFast, anyio_backend: str) -> AsyncIterator[Server]:
    async with running(Server(engine_of(model, tokenizer, cache_tokens=8192, max_model_len=2048))) as one:
        yield one


def calls_of(choice: Any) -> list[tuple[str, str]]:
    calls = choice.message.tool_calls or []
    assert len({call.id for call in calls}) == len(calls) and all(call.id.startswith("call_") for call in calls)
    return [(call.function.name, call.function.arguments) for call in calls]


async def streamed(client: openai.AsyncOpenAI, **body: Any) -> list[tuple[str, list[tuple[str, str]], str]]:
    """The outputs of a stream, put together as clients do it: text, calls and finish reason."""
    said: dict[int, str] = {}
    calls: dict[int, list[list[str]]] = {}
    reasons: dict[int, str] = {}
    async for chunk in await client.chat.completions.create(stream=True, **body):
        [choice] = chunk.choices
        said[choice.index] = said.get(choice.index, "") + (choice.delta.content or "")
        found = calls.setdefault(choice.index, [])
        for part in choice.delta.tool_calls or []:
            if part.id:
                assert part.index == len(found) and part.type == "function" and part.function.name
                found.append([part.function.name, ""])
            else:
                assert part.function.name is None
            found[part.index][1] += part.function.arguments
        if choice.finish_reason:
            reasons[choice.index] = choice.finish_reason
    return [(said[index], [(name, text) for name, text in calls[index]], reasons[index]) for index in sorted(said)]


@pytest.mark.parametrize(
    ("choice", "names"), [("required", {"weather", "clock"}), (NAMED, {"weather"})], ids=["required", "named"]
)
async def test_a_call_that_is_asked_for_fits_its_schema(client: openai.AsyncOpenAI, choice: Any, names: set[str]) -> None:
    body = ASK | {"tool_choice": choice, "n": 2, "max_tokens": 90, "logprobs": True}
    found = await client.chat.completions.create(**body)
    for one in found.choices:
        calls = calls_of(one)
        assert one.message.content is None and {name for name, _ in calls} <= names
        assert calls and (len(calls) == 1 or choice == "required")
        for name, arguments in calls[: None if one.finish_reason == "tool_calls" else -1]:
            jsonschema_rs.validate(SCHEMAS[name], json.loads(arguments))
        assert one.finish_reason in ("tool_calls", "length")
    assert any(one.finish_reason == "tool_calls" for one in found.choices)
    assert sum(len(one.logprobs.content) for one in found.choices) == found.usage.completion_tokens
    expected = [(one.message.content or "", calls_of(one), one.finish_reason) for one in found.choices]
    assert await streamed(client, **body) == expected


class Script:
    """Lets the model write a given text, cut into tokens anew for each answer, as far as the grammar allows it."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer, self._random = tokenizer, random.Random(4)
        self._tokens: list[int] = []

    def write(self, text: str, sizes: Sequence[int] = (1, 6, 30)) -> None:
        self._tokens, begin = [], 0
        while begin < len(text):
            end = begin + self._random.choice(sizes)
            self._tokens += self._tokenizer(text[begin:end], add_special_tokens=False).input_ids
            begin = end
        self._tokens.append(self._tokenizer.convert_tokens_to_ids(END_OF_TEXT))

    def __call__(self, logits: torch.Tensor, states: Sequence[SamplerState]) -> Any:
        logits = logits.clone()
        for row, state in enumerate(states):
            logits[row, self._tokens[min(state.num_tokens, len(self._tokens) - 1)]] = 1e4
        return sample(logits, states)


@pytest.fixture
def script(chat_server: Server, monkeypatch: pytest.MonkeyPatch) -> Script:
    assert chat_server.engine.tokenizer is not None
    found = Script(chat_server.engine.tokenizer)
    monkeypatch.setattr(engine_module, "sample", found)
    return found


PARIS, ROME = ("weather", '{"city": "巴黎🦉", "days": 3}'), ("weather", '{\n "city":"}\\n"}')
CLOCKS = [("clock", "{}"), ("clock", "{ }")]
SAID: list[tuple[str, str, list[tuple[str, str]]]] = [  # text of the model, what is said, and its calls
    ("Hello <tool 🦉 数", "Hello <tool 🦉 数", []),
    ("<tool_cal", "<tool_cal", []),
    ("", "", []),
    (" \n ", " \n ", []),
    (call_text(*PARIS), "", [PARIS]),
    (f"Let me see: é.\n{call_text(*ROME)}", "Let me see: é.", [ROME]),
    ("\n\n" + "\n".join(call_text(*one) for one in (CLOCKS[0], PARIS, CLOCKS[1])), "", [CLOCKS[0], PARIS, CLOCKS[1]]),
    ("a </tool_call> <tool_response> {}", "a </tool_call> <tool_response> {}", []),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said", "calls"), SAID)
async def test_what_the_model_writes_is_read_whole_and_as_a_stream(
    client: openai.AsyncOpenAI, script: Script, text: str, said: str, calls: list[tuple[str, str]]
) -> None:
    reason = "tool_calls" if calls else "stop"
    script.write(text)
    [one] = (await client.chat.completions.create(**ASK)).choices
    assert (one.message.content, calls_of(one), one.finish_reason) == (said or (None if calls else ""), calls, reason)
    script.write(text)
    assert await streamed(client, **ASK, n=2) == [(said, calls, reason)] * 2


async def test_no_more_calls_than_are_asked_for(client: openai.AsyncOpenAI, script: Script) -> None:
    script.write(call_text(*PARIS) + "\n" + call_text(*ROME))
    for extra in ({"parallel_tool_calls": False}, {"tool_choice": NAMED}):
        [one] = (await client.chat.completions.create(**ASK | extra)).choices
        assert calls_of(one) == [PARIS] and one.finish_reason == "tool_calls"
    [one] = (await client.chat.completions.create(**ASK, tool_choice="none")).choices
    assert one.message.tool_calls is None and one.message.content == call_text(*PARIS) + "\n" + call_text(*ROME)


CUT: list[tuple[dict[str, Any], str, list[tuple[str, str]], str]] = [  # how, and what is said, called, and the reason
    ({"max_tokens": 5}, "Hm. <", [], "length"), ({"max_tokens": 15}, "Hm.", [], "length"),
    ({"max_tokens": 25}, "Hm.", [], "length"), ({"max_tokens": 57}, "Hm.", [("weather", '{"city":')], "length"),
    ({"max_tokens": 60}, "Hm.", [("weather", '{"city": "\ufffd')], "length"), ({"stop": "\n"}, "Hm.", [], "stop"),
    ({"stop": ["巴", "Hm. <"]}, "", [], "stop"), ({"stop": "ty"}, "Hm.", [("weather", '{"ci')], "stop"),
]  # fmt: skip


@pytest.mark.parametrize(("cut", "said", "calls", "reason"), CUT)
async def test_an_output_that_is_cut_gives_the_arguments_so_far(
    client: openai.AsyncOpenAI, script: Script, cut: dict[str, Any], said: str, calls: list[tuple[str, str]], reason: str
) -> None:
    script.write("Hm. " + call_text(*PARIS), sizes=[1])
    assert await streamed(client, **ASK | cut) == [(said, calls, reason)]


async def test_an_answer_of_a_format_or_a_call(client: openai.AsyncOpenAI, script: Script) -> None:
    format_ = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": [1, 22]}}}
    for text, content in (("22", "22"), (call_text(*PARIS), None)):
        script.write(text)
        [one] = (await client.chat.completions.create(**ASK, response_format=format_)).choices
        assert one.message.content == content and bool(one.message.tool_calls) == (content is None)


def prompts_of(server: Server, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows with the prompts that the engine gets."""
    prompts: list[str] = []
    add, tokenizer = server.engine.add, server.engine.tokenizer
    assert tokenizer is not None

    def noted(prompt: Any, *rest: Any) -> Any:
        prompts.append(str(tokenizer.decode(prompt)))
        return add(prompt, *rest)

    monkeypatch.setattr(server.engine, "add", noted)
    return prompts


async def test_the_template_shows_tools_and_answers_with_calls_come_back(
    client: openai.AsyncOpenAI, script: Script, chat_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_of(chat_server, monkeypatch)
    script.write(f"Hm.\n{call_text(*PARIS)}\n{call_text('clock', '{}')}")
    [answer] = (await client.chat.completions.create(**ASK)).choices
    calls = answer.message.tool_calls
    results = [{"role": "tool", "tool_call_id": call.id, "content": f"{number} é"} for number, call in enumerate(calls)]
    history = [*ASK["messages"], answer.message.model_dump(), *results]
    script.write("Fine.")
    [last] = (await client.chat.completions.create(**ASK | {"messages": history})).choices
    assert last.message.content == "Fine." and last.finish_reason == "stop"
    first, second = prompts
    shown_tools = [json.loads(line) for line in first.removeprefix("<|system|>").split("<|user|>")[0].splitlines()]
    assert shown_tools == [
        TOOLS[0], {"type": "function", "function": {"name": "clock", "parameters": {
            "type": "object", "properties": {}, "additionalProperties": False}}},
    ]  # fmt: skip
    assert first.endswith("<|user|>def <|assistant|>")
    said = json.loads(PARIS[1])
    [paris, clock] = [json.loads(one.split("\n</tool_call>")[0]) for one in second.split("<tool_call>\n")[1:]]
    assert paris == {"name": "weather", "arguments": said} and clock == {"name": "clock", "arguments": {}}
    assert second.startswith(first + "Hm.") and second.endswith("<|tool|>0 é<|tool|>1 é<|assistant|>")
    await client.chat.completions.create(**ASK | {"tool_choice": "none"})
    assert prompts[-1] == "<|user|>def <|assistant|>"


@pytest.mark.parametrize("name", OTHERS)
async def test_templates_that_do_not_write_such_calls_are_told_apart(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    other = copy.copy(tokenizer)
    other.chat_template = OTHERS[name]
    assert template_writes_calls(tokenizer) and not template_writes_calls(other)


async def test_other_templates_get_everything_as_text(
    model: YocoUForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = copy.copy(tokenizer)
    other.chat_template = PLAIN
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city":  "x"}'}}
    messages = [
        {"role": "system", "content": "Be kind."}, {"role": "user", "content": "?"},
        {"role": "assistant", "content": "Hm.", "tool_calls": [call, call]},
        {"role": "tool", "tool_call_id": "1", "content": "a"}, {"role": "tool", "tool_call_id": "1", "content": "b"},
    ]  # fmt: skip
    async with running(Server(engine_of(model, other, cache_tokens=4096, max_model_len=2048))) as server:
        prompts = prompts_of(server, monkeypatch)
        for extra in ({}, {"tool_choice": "none"}):
            await server.json("chat/completions", **ASK | {"messages": messages, "max_tokens": 1} | extra)
        await server.json("chat/completions", **ASK | {"max_tokens": 1})
    block = '<tool_call>\n{"name": "weather", "arguments": {"city":  "x"}}\n</tool_call>'
    rest = (
        f"<|user|>?<|assistant|>Hm.\n{block}\n{block}<|user|><tool_response>\na\n</tool_response>\n"
        "<tool_response>\nb\n</tool_response>"
    )
    with_tools, without, short = prompts
    assert rest in with_tools and with_tools.startswith("<|system|>Be kind.\n\n")
    assert without.startswith(f"<|system|>Be kind.{rest}")
    for prompt in (with_tools, short):
        described = prompt.split("<tools>\n")[1].split("\n</tools>")[0].splitlines()
        assert [json.loads(line)["function"]["name"] for line in described] == ["weather", "clock"]
        assert json.loads(described[0]) == TOOLS[0]


def function(**changes: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": CLOCK | changes}]


NESTED: Any = {}
for _ in range(300):
    NESTED = {"properties": {"a": NESTED}}
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": TOOLS + TOOLS[:1]}, "tools", "several tools have the name weather"),
    ({"tools": function(name="a b")}, "tools.0.function.name", "pattern"),
    ({"tools": function(name="</tools>")}, "tools.0.function.name", "pattern"),
    ({"tools": function(name="x" * 65)}, "tools.0.function.name", "pattern"),
    ({"tools": function(name="f\n")}, "tools.0.function.name", "pattern"),
    ({"tools": function(description="\udfff")}, "tools.0.function.description", "surrogate"),
    ({"tools": function(parameters={"type": "array"})}, "tools.0.function.parameters", "must be object"),
    ({"tools": function(parameters=[])}, "tools.0.function.parameters", "dictionary"),
    ({"tools": function(parameters={"properties": {"a": {"type": "nothing"}}})}, "tools", "parameters of clock: Invalid type"),
    ({"tools": function(parameters={"properties": {"a": {"pattern": "(?=a)"}}})}, "tools", "parameters of clock: look-around"),
    ({"tools": function(returns={})}, "tools.0.function.returns", "unknown key"),
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools.0.custom", "unknown key"),
    ({"tools": [{"function": CLOCK}]}, "tools.0.type", "missing"),
    ({"tools": TOOLS * 65}, "tools", "at most 128"),
    ({"tools": []} | {"tool_choice": "required"}, "tool_choice", "there are no tools"),
    ({"tools": None} | {"tool_choice": NAMED}, "tool_choice", "there are no tools"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", "no tool has the name 'f'"),
    ({"tool_choice": "any"}, "tool_choice", "expected none, auto, required or"),
    ({"tool_choice": {"type": "allowed_tools", "tools": []}}, "tool_choice", "expected none, auto, required or"),
    ({"tool_choice": NAMED | {"more": 1}}, "tool_choice", "expected none, auto, required or"),
    ({"parallel_tool_calls": 1}, "parallel_tool_calls", "boolean"),
    ({"regex": "a"}, "regex", "tools and regex exclude each other"),
    ({"ignore_eos": True}, "ignore_eos", "the grammar of tools"), ({"min_tokens": 2}, "min_tokens", "the grammar of tools"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "no"}}}}, "response_format", "Invalid"),
    ({"functions": [WEATHER]}, "functions", "use tools"), ({"function_call": {"name": "f"}}, "function_call", "use tools and"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param", "message"), REFUSED)
async def test_refusals_name_the_parameter(chat_server: Server, body: dict[str, Any], param: str, message: str) -> None:
    status, error = await chat_server.error("chat/completions", **ASK | body)
    assert (status, error["param"]) == (400, param) and message in error["message"], error


CIRCLE = {"$ref": "#/$defs/a"}
HOSTILE: dict[str, dict[str, Any]] = {
    "nested": {"tools": function(parameters=NESTED)},
    "endless": {"tools": function(parameters={"properties": {"a": {"type": "array", "minItems": 10**9}}})},
    "separators": {"tools": function(parameters={"x-guidance": {"item_separator": "}\n</tool_call>\n<tool_call>\n"}})},
    "circle": {"tools": function(parameters={"$defs": {"a": CIRCLE}, "properties": {"a": CIRCLE}})},
    "injection": {"tools": function(parameters={"description": '"}\nstart: "x"\n', "const": {"a": '\n"} | "x'}})},
    "many": {"tools": [{"type": "function", "function": WEATHER | {"name": f"f{number}"}} for number in range(128)]},
    "many patterns": {"tools": [
        {"type": "function", "function": {"name": f"f{n}", "parameters": {"properties": {"a": {"pattern": f".*X.{{{n}}}$"}}}}}
        for n in range(60)
    ]},
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
async def test_hostile_tools_harm_nobody_else(chat_server: Server, name: str) -> None:
    for choice in ("auto", "required"):
        response = await chat_server.post("chat/completions", **ASK | HOSTILE[name] | {"tool_choice": choice, "max_tokens": 12})
        assert response.status_code in (200, 400), response.text
        if response.status_code == 400:
            assert response.json()["error"]["param"].split(".")[0] in ("tools", "messages", "max_tokens")
    [one] = (await chat_server.json("chat/completions", **ASK | {"tool_choice": "none", "max_tokens": 3}))["choices"]
    assert one["message"]["content"] is not None
