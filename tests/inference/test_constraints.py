"""Random walks over the allowed tokens: whatever is sampled fits its grammar."""

import json
import re
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from yoco_u.data import END_OF_TEXT, train_tokenizer
from yoco_u.errors import UserError
from yoco_u.inference.constraints import Grammars
from yoco_u.inference.sampler import sample
from yoco_u.inference.sampler_state import SamplerState
from yoco_u.inference.sampling_params import SamplingParams

TEXTS = [
    '{"name": "alpha délta 数 🦉", "age": 17, "tags": ["red", "blue"], "size": null}\n',
    "2024-10-31 true false -1.5e3 ",
] * 20
TOKENIZER = train_tokenizer(TEXTS, 400)
EOS = TOKENIZER.convert_tokens_to_ids(END_OF_TEXT)
VOCAB = len(TOKENIZER) + 13  # a model's vocabulary is often padded
GRAMMARS = Grammars(TOKENIZER, VOCAB, [EOS])

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["red", "blue", "数🦉"]}, "minItems": 1, "maxItems": 3},
        "size": {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def walk(params: SamplingParams, index: int, steps: int = 500) -> list[int] | None:
    """Tokens drawn under the grammar from a model that knows nothing, the end token left out; None if they do not end."""
    matcher = GRAMMARS.matcher(params)
    state = SamplerState(params, [EOS], index, [EOS], matcher)
    tokens: list[int] = []
    for _ in range(steps):
        assert matcher is not None
        [sampled] = sample(torch.zeros(1, VOCAB), [state])
        assert sampled is not None and sampled.token < len(TOKENIZER)
        if sampled.token == EOS:
            return tokens
        tokens.append(sampled.token)
    return None


@pytest.mark.parametrize("as_text", [False, True])
def test_every_walk_fits_the_schema(as_text):
    params = SamplingParams(json_schema=json.dumps(SCHEMA) if as_text else SCHEMA, seed=1)
    names = set()
    for index in range(40):
        tokens = walk(params, index)
        assert tokens is not None
        value = json.loads(TOKENIZER.decode(tokens))
        names.add(value["name"])
        assert {"name", "age", "tags"} <= set(value) <= set(SCHEMA["properties"])
        assert isinstance(value["name"], str) and len(value["name"]) <= 6
        assert type(value["age"]) is int and 0 <= value["age"] <= 130
        assert 1 <= len(value["tags"]) <= 3 and set(value["tags"]) <= {"red", "blue", "数🦉"}
        assert value.get("size") in (None, True, False)
    assert len(names) > 10


def accepts(schema: object, text: str) -> bool:
    matcher = GRAMMARS.matcher(SamplingParams(json_schema=schema))
    assert matcher is not None
    for char in text:
        [token] = TOKENIZER.encode(char, add_special_tokens=False)
        if not matcher.allowed()[token]:
            return False
        matcher.append(token)
    return bool(matcher.allowed()[EOS])


A = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
B = {"properties": {"b": {"type": "boolean"}}, "additionalProperties": True}


@pytest.mark.parametrize(("schema", "around"), [
    (A, "{}"), (A | {"additionalProperties": {}}, "{}"), ({"type": "array", "items": A}, "[{}]"),
    ({"$defs": {"properties": A}, "$ref": "#/$defs/properties"}, "{}"), ({"allOf": [A, B]}, "{}"),
    ({"anyOf": [{"type": "null"}, A]}, "{}"), ({"type": "object", "properties": {"properties": A}}, '{"properties":{}}'),
])  # fmt: skip
def test_a_declared_name_has_one_spelling(schema: dict, around: str) -> None:
    def written(members: str) -> str:
        return around.replace("{}", f"{{{members}}}")

    assert accepts(schema, written('"a":1')) and not accepts(schema, written('"a":"x"'))
    assert accepts(schema, written('"a":1,"c":"x","\\n":[2]'))
    assert not accepts(schema, written('"a":1,"a":"x"'))
    assert not accepts(schema, written(r'"a":1,"\u0061":"x"'))


def test_what_stands_in_data_stays() -> None:
    for value in ({"properties": {"a": 1}}, {"a": {"properties": {"b": {}}}}):
        for schema in ({"const": value}, {"enum": [value, 3]}):
            assert accepts(schema, json.dumps(value, separators=(",", ":")))


@pytest.mark.parametrize(
    "regex",
    [
        r"[0-9]{4}-[0-9]{2}-[0-9]{2}",
        r"(true|false|-?[0-9]+(\.[0-9]{1,3})?)",
        r"^[a-zé数🦉]{0,8}$",
        r'"/\\n[^"\\]{1,3}"',
        "",
        "\n\t x",
    ],
)
def test_every_walk_matches_the_expression(regex):
    finished = 0
    for index in range(25):
        tokens = walk(SamplingParams(regex=regex, seed=2), index)
        if tokens is not None:
            assert re.fullmatch(regex, TOKENIZER.decode(tokens))
            finished += 1
    assert finished > 20


def test_requests_with_and_without_grammar_share_a_batch():
    settings = [{"regex": "[0-9]{3}"}, {}, {"json_schema": {"type": "boolean"}}, {"regex": "[0-9]{3}", "temperature": 0}]
    params = [SamplingParams(seed=3, **one) for one in settings]
    states = [SamplerState(one, [EOS], 0, [EOS], GRAMMARS.matcher(one)) for one in params]
    alone = [SamplerState(one, [EOS], 0, [EOS], GRAMMARS.matcher(one)) for one in params]
    logits = torch.randn(4, VOCAB)
    before = logits.clone()
    together = sample(logits, states)
    assert torch.equal(logits, before)
    assert together == [sample(logits[row : row + 1], [state])[0] for row, state in enumerate(alone)]
    assert TOKENIZER.decode([together[3].token])[0].isdigit() and "true false".find(TOKENIZER.decode([together[2].token])) >= 0


def test_a_model_that_cannot_say_it_fails_alone():
    params = SamplingParams(regex="a", temperature=0)
    states = [SamplerState(params, [EOS], 0, [EOS], GRAMMARS.matcher(params)) for _ in range(2)]
    logits = torch.zeros(2, VOCAB)
    logits[0, TOKENIZER.convert_tokens_to_ids("a")] = -torch.inf
    results = sample(logits, states)
    assert results[0] is None and results[1] is not None
    assert states[0].failure == "no token may come next"


def test_any_end_token_ends():
    tokenizer = train_tokenizer(TEXTS, 400)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    ends = [EOS, tokenizer.convert_tokens_to_ids("<|end|>")]
    letter = tokenizer.convert_tokens_to_ids("a")
    for end in ends:
        matcher = Grammars(tokenizer, VOCAB, ends).matcher(SamplingParams(regex="a"))
        assert matcher is not None
        assert matcher.allowed().nonzero().flatten().tolist() == [letter]
        matcher.append(letter)
        assert matcher.allowed().nonzero().flatten().tolist() == sorted(ends)
        matcher.append(end)


def test_outputs_of_one_grammar_do_not_share_state():
    grammars = Grammars(TOKENIZER, VOCAB, [EOS])
    params = SamplingParams(regex="ab")
    first, second = grammars.matcher(params), grammars.matcher(params)
    assert first is not None and second is not None
    before = second.allowed()
    first.append(TOKENIZER.convert_tokens_to_ids("a"))
    assert torch.equal(second.allowed(), before) and not torch.equal(first.allowed(), before)
    assert grammars.matcher(SamplingParams()) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"regex": "(a"}, r"regex '\(a': unclosed group"),
        ({"regex": "(?=a)b"}, "look-around, including look-ahead and look-behind, is not supported"),
        ({"regex": r"a\b"}, "lookarounds not supported"),
        ({"regex": r"[^\s\S]"}, "no text fits it"),
        ({"json_schema": {"type": 5}}, "type must be a string or array of strings"),
        ({"json_schema": {"type": "string", "not": {}}}, r'Unimplemented keys: \["not"\]'),
        ({"json_schema": {"type": "nul"}}, "json_schema"),
        ({"json_schema": {"description": "x" * 500, "type": 5}}, r"x+\.\.\.': type must be"),
    ],
)
def test_what_the_library_refuses_is_one_line(settings, message):
    with pytest.raises(UserError, match=message) as caught:
        GRAMMARS.matcher(SamplingParams(**settings))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.delitem(sys.modules, "llguidance.hf", raising=False)
    compiler = Grammars(TOKENIZER, VOCAB, [EOS])
    assert compiler.matcher(SamplingParams()) is None
    with pytest.raises(UserError, match=r"need llguidance: pip install 'yoco-u\[structured\]'$"):
        compiler.matcher(SamplingParams(regex="a"))


def test_a_tokenizer_that_does_not_fit():
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "<s>": 1}, "a")), eos_token="<s>")
    gaps = Tokenizer(models.BPE(vocab={"<s>": 0, **{letter: 3 * n + 5 for n, letter in enumerate("abc{}")}}, merges=[]))
    gaps.decoder = decoders.ByteLevel()
    sparse = PreTrainedTokenizerFast(tokenizer_object=gaps, eos_token="<s>")
    for compiler in (Grammars(words, 2, [1]), Grammars(TOKENIZER, 100, [EOS]), Grammars(sparse, 20, [0])):
        with pytest.raises(UserError, match=r"cannot be used with this tokenizer: [^\n]+$"):
            compiler.matcher(SamplingParams(regex="a"))
