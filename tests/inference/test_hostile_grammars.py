"""Schemas and expressions that ask for too much: each is refused or followed, in its own process, and no other notices."""

import socket
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yoco_u.data import END_OF_TEXT, train_tokenizer
from yoco_u.errors import UserError
from yoco_u.inference import constraints
from yoco_u.inference.constraints import Grammars, Matcher
from yoco_u.inference.sampling_params import SamplingParams

TOKENIZER = train_tokenizer(['{"name": "alpha", "aaaa": [1, 2.5, null, true]} X p1\n'] * 20, 350)
EOS = TOKENIZER.convert_tokens_to_ids(END_OF_TEXT)


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constraints, "_SECONDS", 0.2)
        found = Grammars(TOKENIZER, len(TOKENIZER), [EOS])
        assert found.matcher(SamplingParams(regex="a")) is not None
    return found


def references(count: int) -> dict[str, Any]:
    chain = {f"d{i}": {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(count)}
    straight = {f"s{i}": {"$ref": f"#/$defs/s{i + 1}"} for i in range(count)}
    return {
        "$defs": chain | straight | {f"d{count}": {}, f"s{count}": {}},
        "anyOf": [{"$ref": "#/$defs/d0"}, {"$ref": "#/$defs/s0"}],
    }


def nested(depth: int, around: str) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        inner: Any = (
            {"a": schema}
            if around in ("properties", "patternProperties", "$defs")
            else [schema]
            if around == "anyOf"
            else schema
        )
        schema = {around: inner}
    return schema


SCHEMAS: dict[str, Any] = {
    "optional properties": {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(499)}},
    "patterns": {"allOf": [{"type": "string", "pattern": f".*X.{{{i}}}$"} for i in range(1, 25)]},
    "pattern properties": {"type": "object", "patternProperties": {f"^p{i}x.*{i}$": {"type": "integer"} for i in range(400)}},
    "a chain of references": references(1000),
    "a longer chain of references": references(2000),
    "a circle of references": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    "a tree of itself": {
        "$defs": {"t": {"properties": {"l": {"$ref": "#/$defs/t"}, "r": {"$ref": "#/$defs/t"}}}},
        "$ref": "#/$defs/t",
    },
    **{
        f"nested {around}": nested(900, around)
        for around in ("properties", "items", "anyOf", "not", "$defs", "patternProperties")
    },
    "a long enumeration": {"enum": [f"value {i}" for i in range(20_000)]},
    "endless items": {"type": "array", "items": {"type": "integer"}, "minItems": 10**9},
    "endless text": {"type": "string", "minLength": 10**9, "pattern": "(a|b)*"},
    "a tiny step": {"type": "number", "multipleOf": 1e-300},
    "a huge step": {"type": "integer", "multipleOf": 2**53 - 1, "minimum": -(10**300)},
    "long alternatives": {
        "anyOf": [{"type": "object", "properties": {f"a{i}": {}}, "required": [f"a{i}"]} for i in range(1000)]
    },
    "a longer text than may be": {"const": "x" * 2**18},
    "no schema": {"$schema": 5, "type": {}, "items": 7},
}
EXPRESSIONS = {
    "a repetition of repetitions": "(a{1000}){1000}",
    "deep repetitions": "(((((a{50}){50}){50}){50}){50}){50}",
    "a long literal": "a" * 10**6,
    "a literal as long as may be": "ab" * 2**17,
    "a window behind anything": "(.*a){30}.{200}",
    "stars of stars": "(.*)*X.{60}",
    "alternatives": "|".join(f"w{i}.*z{i}" for i in range(3000)),
    "letters": r"(\p{L}{1,900}\P{N}{1,900}){1,900}",
    "parentheses": "(" * 5000 + "a" + ")" * 5000,
    "looking ahead": "(?=a)(?!b)(?<=c)a",
    "an atomic group": "(?>a)",
    "a reference back": r"(a)\1",
    "flags": "(?i-u)(?s).*",
    "not closed": "[a-",
    "nothing fits": r"[^\s\S]",
}
HOSTILE = {name: {"json_schema": one} for name, one in SCHEMAS.items()} | {
    name: {"regex": one} for name, one in EXPRESSIONS.items()
}


def walk(matcher: Matcher, steps: int = 12) -> str:
    """The text of the last token that may come, again and again, until the output ends or fails."""
    text = ""
    for _ in range(steps):
        tokens = matcher.allowed().nonzero().flatten().tolist()
        if not tokens or tokens == [EOS]:
            break
        matcher.append(max(tokens))
        text += TOKENIZER.decode([max(tokens)])
    return text


@pytest.mark.parametrize("name", HOSTILE)
def test_what_asks_for_too_much_ends_alone(grammars: Grammars, name: str) -> None:
    innocent = grammars.matcher(SamplingParams(regex="[0-9]{3}"))
    assert innocent is not None
    innocent.ask()
    try:
        guilty = grammars.matcher(SamplingParams(**HOSTILE[name]))
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 600
    else:
        assert guilty is not None
        walk(guilty)
        assert "\n" not in guilty.error
        guilty.close()
    said = walk(innocent)
    assert len(said) == 3 and said.isdigit()
    innocent.close()


def test_nothing_is_fetched(grammars: Grammars) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for reference in (f"http://127.0.0.1:{port}/x", "file:///etc/passwd"):
            with pytest.raises(UserError, match="json_schema"):
                grammars.matcher(SamplingParams(json_schema={"$ref": reference}))
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()


@settings(max_examples=15)
@given(st.data())
def test_outputs_of_a_process_that_ends_go_on_in_another(grammars: Grammars, data: st.DataObject) -> None:
    """Whenever it ends, whoever waits: those that are not to blame get the masks that they would have got."""
    texts = data.draw(st.lists(st.text("ab", max_size=6), min_size=2, max_size=4))
    params = SamplingParams(regex="[ab]{0,6}")
    matchers = [grammars.matcher(params) for _ in texts]
    ends = data.draw(st.integers(0, 6))
    for step in range(7):
        if step == ends and matchers[0] is not None and matchers[0].follower is not None:
            matchers[0].follower.end()
        for text, matcher in zip(texts, matchers, strict=True):
            assert matcher is not None
            allowed = TOKENIZER.convert_ids_to_tokens(matcher.allowed().nonzero().flatten().tolist())
            assert ("a" in allowed) == ("b" in allowed) == (step < 6 or len(text) < step)
            assert END_OF_TEXT in allowed
            if step < len(text):
                matcher.append(TOKENIZER.convert_tokens_to_ids(text[step]))
    for matcher in matchers:
        assert matcher is not None
        matcher.close()


def test_processes_for_outputs_to_come_are_few(grammars: Grammars) -> None:
    matchers = [grammars.matcher(SamplingParams(regex=f"a{{{count}}}")) for count in range(1, 40)]
    assert len(grammars._followers) <= constraints._IDLE + 1
    for count, matcher in enumerate(matchers, 1):
        assert matcher is not None and walk(matcher, 40) == "a" * count
    assert len(grammars._followers) >= 39  # each output that runs has one
    for matcher in matchers:
        assert matcher is not None
        matcher.close()
    assert len(grammars._followers) <= constraints._IDLE + 1
    for count in range(1, 40):  # known by now, so that nothing is compiled
        again = grammars.matcher(SamplingParams(regex=f"a{{{count}}}"))
        assert again is not None and walk(again, 40) == "a" * count
        again.close()
        assert len(grammars._followers) <= constraints._IDLE + 1


def test_prompts_that_come_with_one_schema_read_it_once(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes milliseconds for a large one, in the engine's thread."""
    read, message = [], grammars._message

    def noted(params: SamplingParams) -> bytes:
        read.append(params)
        return message(params)

    monkeypatch.setattr(grammars, "_message", noted)
    several = SamplingParams(regex="a{2}"), SamplingParams(regex="b{3}")
    for params, text in zip(several, ("aa", "bbb"), strict=True):
        for _ in range(5):
            matcher = grammars.matcher(params)
            assert matcher is not None and walk(matcher) == text
            matcher.close()
    assert read == list(several)


def test_a_schema_that_is_nested_too_deeply_for_python() -> None:
    grammars = Grammars(TOKENIZER, len(TOKENIZER), [EOS])
    schema: dict[str, Any] = {}
    for _ in range(5000):
        schema = {"items": schema}
    for given_as in (schema, '{"items":' * 5000 + "{}" + "}" * 5000):
        with pytest.raises(UserError, match=r"nested|recursion"):
            grammars.matcher(SamplingParams(json_schema=given_as))
