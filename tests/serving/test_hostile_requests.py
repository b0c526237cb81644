"""Requests that ask for too much, all at once, beside ordinary ones: those get what they get alone."""

import asyncio
import json
from collections.abc import AsyncIterator
from copy import copy
from typing import Any

import pytest
from asgi_server import Server, engine_of, error_of, running
from transformers import PreTrainedTokenizerFast

from yoco_u import YocoUForCausalLM
from yoco_u.inference import constraints, turns
from yoco_u.serving import admission

pytestmark = pytest.mark.anyio


def schema(text: str) -> str:
    """A body with a schema, which may be JSON that Python would not write."""
    form = f'{{"type": "json_schema", "json_schema": {{"schema": {text}}}}}'
    return f'{{"prompt": "def", "max_tokens": 6, "response_format": {form}}}'


def regex(text: str, **others: Any) -> str:
    return json.dumps({"prompt": "def", "max_tokens": 6, "regex": text} | others)


def tools(count: int, parameters: Any, **others: Any) -> str:
    offered = [{"type": "function", "function": {"name": f"f{i}", "parameters": parameters}} for i in range(count)]
    return json.dumps({"messages": [{"role": "user", "content": "x"}], "max_tokens": 6, "tools": offered} | others)


def nested(depth: int, before: str, after: str) -> str:
    return before * depth + '{"type":"null"}' + after * depth


def properties(count: int, **others: Any) -> dict[str, Any]:
    found = {f"name_{i}": {"type": "string", "description": "what it is " * 5} for i in range(count)}
    return {"type": "object", "properties": found} | others


CIRCLE = {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/b"}, {"$ref": "#/$defs/a"}]}, "b": {"allOf": [{"$ref": "#/$defs/a"}]}}}
BODIES = {
    "many strings": schema(json.dumps({"enum": [f"{i:x}" for i in range(20_000)]})),
    "more strings than may be": schema(json.dumps({"enum": [str(i) for i in range(60_000)]})),
    "numbers beyond floats": schema('{"type":"number","minimum":-1e400,"maximum":1e400}'),
    "no number": schema('{"type":"number","minimum":NaN,"exclusiveMaximum":Infinity}'),
    "long numbers": schema(f'{{"type":"integer","minimum":{"9" * 4000},"maximum":1{"0" * 4200}}}'),
    "tiny steps": schema('{"type":"number","multipleOf":1e-300,"minimum":0.1,"maximum":0.3}'),
    "steps of nothing": schema('{"type":"number","multipleOf":0}'),
    "steps of many": schema('{"allOf":[' + ",".join(f'{{"type":"integer","multipleOf":{i}}}' for i in range(2, 400)) + "]}"),
    "endless items": schema('{"type":"array","minItems":1000000000,"maxItems":2000000000}'),
    "fewer items than none": schema('{"type":"array","minItems":-5,"maxItems":-1e9}'),
    "endless texts": schema('{"type":"string","minLength":4294967295,"maxLength":18446744073709551616}'),
    "endless places": schema(json.dumps({"type": "array", "prefixItems": [{"type": "integer"}] * 9000})),
    "nested choices": schema(nested(3000, '{"anyOf":[', "]}")),
    "nested choices of two": schema(nested(250, '{"anyOf":[{"type":"string"},', "]}")),
    "nested lists": schema(nested(120, '{"type":"array","minItems":2,"items":', "}")),
    "doubling references": schema(
        json.dumps(
            {"$defs": {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(30)} | {"d30": {"type": "null"}}}
            | {"$ref": "#/$defs/d0"}
        )
    ),
    "doubling intersections": schema(
        json.dumps(
            {"$defs": {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(30)} | {"d30": {"type": "null"}}}
            | {"$ref": "#/$defs/d0"}
        )
    ),
    "products of choices": schema(
        json.dumps({"allOf": [{"anyOf": [{"required": [f"a{i}_{j}"]} for j in range(10)]} for i in range(12)]})
    ),
    "circles": schema(json.dumps(CIRCLE | {"$ref": "#/$defs/b"})),
    "a reference to itself": schema('{"$ref":"#"}'),
    "a reference to nothing": schema('{"$ref":"#/$defs/%25%00/x"}'),
    "patterns of properties": schema(json.dumps({"patternProperties": {f"^(a|b)*{i}.{{50}}$": {} for i in range(200)}})),
    "patterns that fail": schema(json.dumps({"patternProperties": {"(?=a)": {}, "[": {}}})),
    "formats": schema(json.dumps({"anyOf": [{"type": "string", "format": one} for one in ("email", "uri", "date-time")] * 99})),
    "unknown formats": schema('{"type":"string","format":"x"}'),
    "everything needed": schema(json.dumps(properties(400, required=[f"name_{i}" for i in range(400)]))),
    "everything optional": schema(json.dumps(properties(400, additionalProperties=True))),
    "ways of our own": schema('{"x-guidance":{"whitespace_pattern":"(a|b)*.{900}","lenient":true,"item_separator":"("}}'),
    "surrogates": schema('{"const":"\\ud800","enum":["\\udfff"],"pattern":"\\ud800"}'),
    "control characters": schema('{"const":"\\u0000\\n%json {}\\nstart: /.*/ \\u2028"}'),
    "names of nothing": schema(json.dumps(properties(1, required=["", "\0", "name_0"]))),
    "looking around": regex("(?<!a)(?=b)(?!c).*"),
    "classes of letters": regex(r"[\p{L}\p{N}\p{S}&&[^\p{Greek}]]{500}\p{Emoji}*"),
    "unknown classes": regex(r"\p{Klingon}+"),
    "words at an edge": regex(r"(\w+\b\W+){50}"),
    "cases": regex("(?i)" + "straße|" * 3000 + "k"),
    "complements": regex(r"[^\x00-\x{10FFFF}]|a{0}"),
    "huge counts": regex("a{4294967296}"),
    "counts of counts": regex("((a{0,999}){0,999}){0,999}b"),
    "nothing to say": regex(""),
    "a long tail": regex("(a|aa)*" * 2000),
    "many outputs": regex("(.*a){20}.{50}", n=16),
    "more outputs than may be": regex("a", n=128),
    "a rule of Lark": regex('start: /a/\n%json {}\n"'),
    "many tools": tools(128, properties(12)),
    "many large tools": tools(128, properties(60)),
    "tools with references": tools(64, CIRCLE | {"properties": {"x": {"$ref": "#/$defs/a"}}}),
    "tools that must be called": tools(128, properties(9), tool_choice="required"),
    "biases": json.dumps({"prompt": "def", "max_tokens": 6, "logit_bias": {str(i): (-1) ** i * 100 for i in range(300)}}),
    "biases against a grammar": regex("[0-9]{4}", logit_bias={str(i): -100 for i in range(300)}),
    "endless biases": '{"prompt":"def","logit_bias":{"5":1e400,"6":-1e400}}',
    "long stops": json.dumps({"prompt": "def", "max_tokens": 6, "stop": ["a" * 250_000] * 4}),
    "stops of two letters": json.dumps({"prompt": "def", "max_tokens": 6, "stop": [f"{'ab' * 490}{i}" for i in range(4)]}),
}  # fmt: skip
HONEST: list[dict[str, Any]] = [
    {"prompt": "def first", "max_tokens": 40, "seed": 1},
    {"prompt": "def first", "max_tokens": 12, "seed": 2, "regex": "[a-z ]{9}[0-9]{1,9}"},
    {"prompt": "[1, 2", "max_tokens": 12, "seed": 3, "response_format": {"type": "json_object"}},
]


@pytest.fixture(scope="module")
async def busy_server(model: YocoUForCausalLM, tokenizer: PreTrainedTokenizerFast, anyio_backend: str) -> AsyncIterator[Server]:
    """Whose template leaves out the tools, so that their grammars are what counts."""
    chatty = copy(tokenizer)
    chatty.chat_template = "{% for message in messages if message['role'] == 'user' %}{{ message['content'] }}{% endfor %}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constraints, "_SECONDS", 0.2)
        async with running(Server(engine_of(model, chatty, max_num_seqs=24, cache_tokens=8192))) as one:
            yield one


async def text(server: Server, body: dict[str, Any]) -> list[str]:
    return [choice["text"] for event in await server.stream("completions", **body) for choice in event["choices"]]


async def test_ordinary_requests_beside_hostile_ones(busy_server: Server) -> None:
    alone = ["".join(await text(busy_server, body)) for body in HONEST]
    answered: dict[str, Any] = {}

    async def attack(name: str) -> None:
        path = "chat/completions" if '"messages"' in BODIES[name] else "completions"
        headers = {"Content-Type": "application/json"}
        answered[name] = await busy_server.client.post(f"/v1/{path}", content=BODIES[name], headers=headers)

    attacks = asyncio.gather(*(attack(name) for name in BODIES))
    rounds = 0
    while not attacks.done() or not rounds:
        found = ["".join(one) for one in await asyncio.gather(*(text(busy_server, body) for body in HONEST))]
        assert found == alone
        rounds += 1
    await attacks
    for name, response in answered.items():
        if response.status_code == 200:
            assert response.json()["choices"], name
        else:
            status, error = error_of(response)
            assert status in (400, 429), (name, error)
            assert "\n" not in error["message"] and len(error["message"]) < 600, name
    assert {200, 400} <= {response.status_code for response in answered.values()}


async def test_a_grammar_that_would_wait_for_too_long_may_come_again(
    busy_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known ones, and requests without any, are not refused."""
    known, new = ({"prompt": "def", "max_tokens": 3, "regex": one} for one in ("[ab]{3}", "[cd]{3}"))
    await busy_server.json("completions", **known)
    with monkeypatch.context() as patch:
        patch.setattr(turns, "_LONGEST_WAIT", -0.5)
        response = await busy_server.post("completions", **new)
        status, error = error_of(response)
        assert status == 429 and error["code"] == "queue_full" and "Retry-After" in response.headers
        assert "too many new regex, response_format or tools" in error["message"] and "\n" not in error["message"]
        await busy_server.json("completions", **known)
        await busy_server.json("completions", prompt="def", max_tokens=3)
    assert set((await busy_server.json("completions", **new))["choices"][0]["text"]) <= {"c", "d"}


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ('{"prompt":' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('{"n":' + "9" * 5000 + "}", "4300 digits"),
        (b'{"prompt":"\xff"}', "can't decode byte 0xff"),
        ("{", "the body is not JSON"),
    ],
)
async def test_bodies_that_cannot_be_read(busy_server: Server, body: str | bytes, problem: str) -> None:
    headers = {"Content-Type": "application/json"}
    status, error = error_of(await busy_server.client.post("/v1/completions", content=body, headers=headers))
    assert status == 400 and problem in error["message"]


async def test_chats_that_fit_no_context_are_not_tokenized(chat_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    longest = max(map(len, chat_server.engine.tokenizer.get_vocab()))  # type: ignore[union-attr]

    def never(*_: Any) -> Any:
        raise AssertionError("tokenized")

    monkeypatch.setattr(admission, "text_tokens", never)
    for content in ("a" * (512 * longest + 1), "word " * 20_000):
        status, error = await chat_server.error("chat/completions", messages=[{"role": "user", "content": content}])
        assert status == 400 and "no text of" in error["message"] and error["param"] == "messages"
