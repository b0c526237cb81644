"""Outputs with calls of tools: whatever is sampled fits the schemas, and however its text is cut, the same calls are read."""

import json
from itertools import pairwise
from typing import Any

import jsonschema_rs
import pytest
import torch
from examples import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from yoco_u.data import END_OF_TEXT, train_tokenizer
from yoco_u.errors import UserError
from yoco_u.inference.call_reader import CallPiece, CallReader
from yoco_u.inference.constraints import Grammars
from yoco_u.inference.detokenizer import Detokenizer
from yoco_u.inference.sampler import sample
from yoco_u.inference.sampler_state import SamplerState
from yoco_u.inference.sampling_params import SamplingParams
from yoco_u.inference.tool_calls import CLOSE, OPEN, ToolCalls, call_text

TEXTS = ['{"name": "alpha délta 数 🦉", "arguments": {"a": [17, true]}}\n</tool_call>\n<tool_call>\n{"'] * 20


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """One that writes tags in ordinary tokens, or has tokens for them, special or not, as models have that learnt to call."""
    tokenizer = train_tokenizer(TEXTS, 330)
    if kind != "plain":
        tokenizer.add_tokens([AddedToken(tag, special=kind == "special") for tag in (OPEN, CLOSE)])
        tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("<|role|>", special=True)])
    return tokenizer


TOKENIZERS = {kind: tokenizer_of(kind) for kind in ("plain", "tokens", "special")}
EOS = TOKENIZERS["plain"].convert_tokens_to_ids(END_OF_TEXT)
GRAMMARS = {kind: Grammars(one, len(one) + 3, [EOS]) for kind, one in TOKENIZERS.items()}

values = st.recursive(
    st.sampled_from([
        {"type": "integer", "minimum": -5, "maximum": 300}, {"type": "boolean"}, {"type": "null"}, {"enum": ["数🦉", "b", 3]},
        {"type": "string", "maxLength": 4}, {"const": "</tool_call>"}, {"const": "}\n</tool_call>\n<tool_call>"},
        {"$ref": "#/$defs/d"},
    ]),
    lambda inner: st.one_of(
        st.builds(lambda item, n: {"type": "array", "items": item, "maxItems": n}, inner, st.integers(0, 2)),
        st.builds(lambda a, b: {"anyOf": [a, b]}, inner, inner),
        st.builds(lambda found: objects(found), st.dictionaries(st.sampled_from(["a", "b c", '"', "é\n"]), inner, max_size=2)),
    ),
    max_leaves=4,
)  # fmt: skip


def objects(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": sorted(properties)[:1], "additionalProperties": False}


def with_definitions(schema: dict[str, Any]) -> dict[str, Any]:
    return schema | {"$defs": {"d": {"type": "integer", "minimum": 0, "maximum": 9}}}


schemas = st.dictionaries(st.sampled_from(["x", "y", "é"]), values, max_size=3).map(objects).map(with_definitions)
tools = st.dictionaries(st.from_regex(r"[a-zA-Z0-9_-]{1,64}", fullmatch=True), schemas, min_size=1, max_size=3)


def walk(kind: str, params: SamplingParams, index: int, begin: str = "", steps: int = 400) -> tuple[str, bool]:
    """The text of an output that begins so and goes on at random within its grammar, and whether it ended."""
    tokenizer, grammars = TOKENIZERS[kind], GRAMMARS[kind]
    state = SamplerState(params, [EOS], index, [EOS], grammars.matcher(params))
    detokenizer, text = Detokenizer(tokenizer, params), ""
    given_tokens = tokenizer(begin, add_special_tokens=False).input_ids
    for number in range(steps):
        logits = torch.zeros(1, grammars.vocab_size)
        if number < len(given_tokens):
            logits[0, given_tokens[number]] = 1000
        [sampled] = sample(logits, [state])
        assert sampled is not None, state.failure
        if number < len(given_tokens):
            assert sampled.token == given_tokens[number], "the beginning is not allowed"
        if sampled.token == EOS:
            return text + detokenizer.flush(), True
        text += detokenizer.append(sampled.token)
    return text + detokenizer.flush(), False


def read(text: str, required: bool, cuts: list[int], is_json: bool = False) -> tuple[str, list[tuple[str, str]], bool]:
    """What a reader finds in a text that comes in pieces: what is said, and names and arguments of the calls."""
    reader, said = CallReader(required, is_json), ""
    calls: list[list[str]] = []
    borders = [0, *sorted(cuts), len(text)]
    for begin, end in pairwise(borders):
        for piece in reader.append(text[begin:end], last=False):
            if isinstance(piece, CallPiece):
                if piece.name is not None:
                    assert piece.index == len(calls)
                    calls.append([piece.name, ""])
                calls[piece.index][1] += piece.arguments
            else:
                assert piece and not calls
                said += piece
    for piece in reader.append("", last=True):
        assert isinstance(piece, str)
        said += piece
    return said, [(name, arguments) for name, arguments in calls], reader.complete


@settings(max_examples=examples(12), deadline=None, suppress_health_check=list(HealthCheck))
@given(tools, st.sampled_from(sorted(TOKENIZERS)), st.sampled_from([1, 3]), st.booleans(), st.integers(0, 99))
def test_every_call_fits_its_schema(
    described: dict[str, dict[str, Any]], kind: str, most: int, required: bool, index: int
) -> None:
    params = SamplingParams(tools=ToolCalls(schemas=described, required=required, most=most), seed=3)
    begin = "" if required else f"hm <tool 数 \n{OPEN}"
    text, ended = walk(kind, params, index, begin)
    said, calls, complete = read(text, required, [])
    assert said == ("" if required else "hm <tool 数") and calls
    assert len(calls) <= most and complete >= ended
    for number, (name, arguments) in enumerate(calls):
        if ended or number < len(calls) - 1:
            jsonschema_rs.validate(described[name], json.loads(arguments))
    if ended:
        written = "\n".join(call_text(name, arguments) for name, arguments in calls)
        assert text == begin.removesuffix(OPEN) + written


FORCED: list[dict[str, Any]] = [
    {"json_schema": {"const": "a <think> <tool_call>"}}, {"regex": "</tool_call>a/b"},
    {"json_schema": objects({"<think>": {"const": 1}})},
    {"tools": ToolCalls(schemas={"f": objects({"<think>": {"const": "<tool_call>"}})}, required=True, most=1)},
]  # fmt: skip


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("grammar", FORCED)
def test_texts_that_must_come_may_look_like_added_tokens(kind: str, grammar: dict[str, Any]) -> None:
    text, ended = walk(kind, SamplingParams(**grammar, seed=1), 0)
    assert ended and ("<think>" in text or text == grammar["regex"])


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_text_without_calls_is_free_but_for_the_tag(kind: str) -> None:
    params = SamplingParams(tools=ToolCalls(schemas={"f": {}}), seed=1)
    think = "hm" if kind == "plain" else "<think>"
    for begin in ("", "<tool_call", f"a{think}{think} <tool_{think}call> 数", "</tool_" + "call>" * (kind == "plain")):
        matcher = GRAMMARS[kind].matcher(params)
        assert matcher is not None
        for token in TOKENIZERS[kind](begin, add_special_tokens=False).input_ids:
            assert matcher.allowed()[token], begin
            matcher.append(token)
        assert matcher.allowed()[EOS], begin
        if kind != "plain":
            assert not matcher.allowed()[TOKENIZERS[kind].convert_tokens_to_ids("<|role|>")]
    text, _ = walk(kind, params, 0, f"a{think}b", steps=60)
    assert text.startswith(f"a{think}b") and text.count(OPEN) == 0


def test_an_answer_without_calls_can_have_a_schema() -> None:
    params = SamplingParams(tools=ToolCalls(schemas={"f": {}}), json_schema={"enum": [1, 22]}, seed=1)
    found = {walk("tokens", params, index)[0] for index in range(8)} | {walk("plain", params, 0, "<")[0][:13]}
    assert {"1", "22"} <= found and any(text.startswith("<tool_call>\n{") for text in found)
    assert all(text in ("1", "22") or text.startswith(OPEN) for text in found)


texts = st.lists(st.sampled_from(["a", " ", "\n", "<", "tool_call", ">", "<tool_call", "é", "🦉", "}", "/"]), max_size=6).map(
    "".join
)
arguments = st.recursive(
    st.one_of(st.integers(), st.sampled_from(["<tool_call>", "}\n</tool_call>", "é🦉", '"', "\\"])),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=2), inner, max_size=2)),
    max_leaves=5,
)
written = st.builds(
    lambda value, indent, plain: json.dumps({"v": value}, indent=indent, ensure_ascii=plain),
    arguments, st.sampled_from([None, 1]), st.booleans(),
)  # fmt: skip
calls_of = st.lists(st.tuples(st.from_regex(r"[a-zA-Z0-9_-]{1,5}", fullmatch=True), written), max_size=3)


@settings(max_examples=examples(150), deadline=None)
@given(texts.filter(lambda text: OPEN not in text), calls_of, st.data())
def test_however_a_text_is_cut_the_same_is_read(said: str, calls: list[tuple[str, str]], data: st.DataObject) -> None:
    blocks = "\n".join(call_text(*call) for call in calls)
    text = said + blocks
    expected = (said.rstrip() if calls else said, calls, bool(calls))
    cuts = st.lists(st.integers(0, len(text)), max_size=8)
    assert read(text, False, []) == read(text, False, list(range(len(text)))) == read(text, False, data.draw(cuts)) == expected
    if calls:
        assert read(blocks, True, data.draw(st.lists(st.integers(0, len(blocks)), max_size=8))) == ("", calls, True)

    end = data.draw(st.integers(0, len(text)))  # an output that stops before its end
    found = read(text[:end], False, list(range(end)))
    assert found == read(text[:end], False, [])
    some, begun, complete = found
    ends = [len(said) + len("\n".join(call_text(*call) for call in calls[: number + 1])) for number in range(len(calls))]
    whole = sum(one <= end for one in ends)
    assert said.startswith(some) if end < len(said) else some in (said, said.rstrip()) or some.startswith(said)
    assert begun[:whole] == calls[:whole] and whole <= len(begun) <= whole + 1
    assert complete or end not in ends
    assert not complete or len(begun) == whole
    for (name, some_arguments), (full_name, full) in zip(begun, calls, strict=False):
        assert name == full_name and full.startswith(some_arguments)


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"f": {}, "g": {"properties": {"a": {"type": "nothing"}}}}, "tools: the parameters of g: "),
        ({"f": {"properties": {"a": {"pattern": "(?=a)"}}}}, "tools: the parameters of f: look-around"),
        ({"f": {"properties": {"a": False}, "required": ["a"]}}, "tools: the parameters of f: "),
        ({"f": {"$ref": "#/$defs/nowhere"}}, "tools: the parameters of f: "),
        ({"f": {"properties": {"a": {"const": "x" * 2**18}}}}, "tools: it has 2"),
        ({f"f{i}": {"properties": {"a": {"pattern": f".*X.{{{i}}}$"}}} for i in range(60)}, ""),
    ],
)  # fmt: skip
def test_schemas_that_are_refused_are_named(described: dict[str, Any], message: str) -> None:
    try:
        GRAMMARS["plain"].matcher(SamplingParams(tools=ToolCalls(schemas=described)))
    except UserError as error:
        assert str(error).startswith(message) and error.setting == "tools" and "\n" not in str(error)
    else:
        assert not message


def test_a_schema_of_answers_is_told_apart_from_those_of_tools() -> None:
    with pytest.raises(UserError, match="json_schema: Invalid type") as raised:
        GRAMMARS["plain"].matcher(SamplingParams(tools=ToolCalls(schemas={"f": {}}), json_schema={"type": "nothing"}))
    assert raised.value.setting == "json_schema"


@pytest.mark.parametrize(
    ("described", "message"),
    [({}, "at least 1"), ({"a b": {}}, "pattern"), ({"x" * 65: {}}, "pattern"), ({"f": {"type": "string"}}, "must be object")],
)  # fmt: skip
def test_tools_that_no_call_could_name_are_refused(described: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SamplingParams(tools={"schemas": described})


@pytest.mark.parametrize("text", ['{"tag": "<tool_call> opens"}', ' "<tool_call>"', "[1, 2]", "", " ", "7"])
def test_a_tag_in_a_json_answer_is_a_part_of_it(text: str) -> None:
    for cut in range(len(text) + 1):
        assert read(text, False, [cut], is_json=True) == (text, [], False)
    called = f'{OPEN}{{"name": "f", "arguments": {{}}}}\n{CLOSE}'
    assert read(called, False, [3], is_json=True) == read(called, False, [3])
