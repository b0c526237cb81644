"""Completions: what comes out is what the engine gives, in OpenAI's shape, whole and as a stream."""

import json
from itertools import pairwise
from typing import Any

import pytest
from asgi_server import ENGINE, Server, engine_of, running
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from yoco_u import YocoUForCausalLM
from yoco_u.data import DocumentEncoder
from yoco_u.inference import RequestOutput, SamplingParams
from yoco_u.inference.detokenizer import Detokenizer
from yoco_u.serving import completions
from yoco_u.serving.token_texts import TokenTexts

pytestmark = pytest.mark.anyio

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
PROMPTS = ["def ", '{"name": "', "täglich 数", "x"]


@pytest.fixture(scope="module")
def alone(model: YocoUForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Any:
    """A request by itself, in an engine of its own without a cache of prefixes."""

    def run(prompt: str | list[int], **params: Any) -> RequestOutput:
        engine = engine_of(model, tokenizer, prefix_caching=False)
        request = engine.add(prompt, SamplingParams(**params))
        while engine.unfinished:
            engine.step()
        return request

    return run


@pytest.fixture(scope="module")
def encoded(tokenizer: PreTrainedTokenizerFast) -> Any:
    return lambda text: [int(token) for token in DocumentEncoder(tokenizer).encode([text])[0]]


async def test_one_prompt(server: Server, alone: Any) -> None:
    found = await server.json("completions", model="tiny", prompt="def ", **GREEDY)
    expected = alone("def ", **GREEDY)
    [choice] = found["choices"]
    assert choice == {"index": 0, "text": expected.outputs[0].text, "logprobs": None, "finish_reason": "length"}
    assert found["object"] == "text_completion" and found["model"] == "tiny" and found["id"].startswith("cmpl-")
    prompt = len(expected.prompt_token_ids)
    assert found["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 12,
        "total_tokens": prompt + 12,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0, "mean_loops": 3.0},
    }


async def test_prompts_in_all_forms(server: Server, alone: Any, encoded: Any) -> None:
    texts = [alone(prompt, **GREEDY).outputs[0].text for prompt in PROMPTS]
    tokens = [encoded(prompt) for prompt in PROMPTS]
    for prompt in (PROMPTS, tokens):
        found = await server.json("completions", prompt=prompt, **GREEDY)
        assert [choice["text"] for choice in found["choices"]] == texts
        assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
        assert found["usage"]["prompt_tokens"] == sum(map(len, tokens))
    [choice] = (await server.json("completions", prompt=tokens[2], **GREEDY))["choices"]
    assert choice["text"] == texts[2]


async def test_an_empty_prompt_begins_a_document(server: Server, alone: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    expected = alone([tokenizer.eos_token_id], **GREEDY).outputs[0].text
    for body in ({}, {"prompt": ""}):
        found = await server.json("completions", **body, **GREEDY)
        assert found["choices"][0]["text"] == expected and found["usage"]["prompt_tokens"] == 1


async def test_defaults_are_openais(server: Server) -> None:
    found = await server.json("completions", prompt="def ", seed=3)
    same = await server.json(
        "completions", prompt="def ", seed=3, max_tokens=16, temperature=1, n=1, top_p=1, stop=None, stream=False,
        logprobs=None, presence_penalty=None, logit_bias={}, user="somebody", best_of=1, suffix=None, metadata={"a": "b"},
    )  # fmt: skip
    assert found["choices"] == same["choices"]
    assert found["usage"]["completion_tokens"] <= 16


@pytest.mark.parametrize(
    "settings",
    [
        {"seed": 5, "temperature": 0.9, "top_p": 0.8, "top_k": 20, "min_p": 0.01},
        {"seed": 2**64 - 1, "presence_penalty": 1.5, "frequency_penalty": -0.5, "repetition_penalty": 1.3},
        {"temperature": 0, "num_loops": 1},
        {"temperature": 0, "num_loops": 5, "ignore_eos": True, "min_tokens": 3},
        {"temperature": 0, "stop": ["e", "zz"], "stop_token_ids": [7]},
        {"seed": 1, "regex": "[a-f]{5,9}"},
    ],
)
async def test_sampling_settings_reach_the_engine(server: Server, alone: Any, settings: dict[str, Any]) -> None:
    expected = alone("def ", max_tokens=16, **settings).outputs[0]
    [choice] = (await server.json("completions", prompt="def ", **settings))["choices"]
    assert (choice["text"], choice["finish_reason"]) == (expected.text, expected.finish_reason)


async def test_a_negative_seed_is_a_seed(server: Server) -> None:
    first, second, other = [
        (await server.json("completions", prompt="def ", seed=seed))["choices"][0]["text"] for seed in (-1, -1, -2)
    ]
    assert first == second != other


async def test_several_outputs(server: Server, alone: Any) -> None:
    found = await server.json("completions", prompt=["def ", "x"], n=3, seed=4, max_tokens=9)
    expected = [output.text for prompt in ("def ", "x") for output in alone(prompt, n=3, seed=4, max_tokens=9).outputs]
    assert [choice["text"] for choice in found["choices"]] == expected
    assert found["usage"]["completion_tokens"] <= 6 * 9


async def test_a_stop_string_ends_the_text(server: Server, alone: Any) -> None:
    whole = alone("def ", **GREEDY).outputs[0].text
    stop = whole[3:5]
    [choice] = (await server.json("completions", prompt="def ", stop=stop, **GREEDY))["choices"]
    assert choice["text"] == whole[: whole.index(stop)] and choice["finish_reason"] == "stop"


async def test_json_that_fits_a_schema(server: Server) -> None:
    schema = {"type": "object", "properties": {"age": {"type": "integer", "maximum": 99}}, "required": ["age"]}
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    [choice] = (await server.json("completions", prompt="x", response_format=form, max_tokens=64, seed=1))["choices"]
    if choice["finish_reason"] == "stop":
        assert json.loads(choice["text"])["age"] <= 99
    assert choice["text"].lstrip().startswith("{")
    [choice] = (await server.json("completions", prompt="x", response_format={"type": "json_object"}, seed=1))["choices"]
    assert choice["text"].lstrip().startswith("{")
    await server.json("completions", prompt="x", response_format={"type": "text"}, seed=1)


@pytest.mark.parametrize(
    "extra", [{}, {"n": 2, "seed": 1, "temperature": 1}, {"echo": True}, {"logprobs": 2}, {"echo": True, "logprobs": 1}]
)
async def test_a_stream_adds_up_to_the_whole(server: Server, extra: dict[str, Any]) -> None:
    body = {"prompt": ["täglich 数🦉", "def "], **GREEDY, **extra}
    whole = await server.json("completions", **body)
    chunks = await server.stream("completions", **body)
    assert len({chunk["id"] for chunk in chunks}) == 1 and all("usage" not in chunk for chunk in chunks)
    for expected in whole["choices"]:
        parts = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == expected["index"]]
        assert "".join(part["text"] for part in parts) == expected["text"]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [expected["finish_reason"]]
        for key in expected["logprobs"] or {}:
            assert [one for part in parts if part["logprobs"] for one in part["logprobs"][key]] == expected["logprobs"][key]


async def test_large_answers_come_in_pieces(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """However small the pieces in which an answer is written, whole or as a stream, they add up to the same."""
    body = {"prompt": ["täglich 数🦉 ist kein Name", "def "], "echo": True, "logprobs": 2, "n": 2, "seed": 1, "max_tokens": 5}
    whole = (await server.json("completions", **body))["choices"]
    for size in (1, 2, 3):
        monkeypatch.setattr(completions, "PIECE", size)
        assert (await server.json("completions", **body))["choices"] == whole
        parts = [chunk["choices"][0] for chunk in await server.stream("completions", **body)]
        assert all(len(part["logprobs"]["tokens"]) <= size for part in parts if part["logprobs"])
        for expected in whole:
            own = [part for part in parts if part["index"] == expected["index"]]
            assert "".join(part["text"] for part in own) == expected["text"]
            assert [part["finish_reason"] for part in own[:-1]] == [None] * (len(own) - 1)
            assert own[-1]["finish_reason"] == expected["finish_reason"]
            for key, values in expected["logprobs"].items():
                assert [one for part in own if part["logprobs"] for one in part["logprobs"][key]] == values


async def test_a_stream_with_counts(server: Server) -> None:
    body = {"prompt": "täglich ist kein Name für das", **GREEDY}
    whole = await server.json("completions", **body)
    *chunks, last = await server.stream("completions", stream_options={"include_usage": True}, **body)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert {**last["usage"], "prompt_tokens_details": None} == {**whole["usage"], "prompt_tokens_details": None}


async def test_a_stream_with_counts_all_along(server: Server) -> None:
    chunks = await server.stream("completions", stream_options={"continuous_usage_stats": True}, prompt="def ", n=2, **GREEDY)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 24 and chunks[-1]["choices"]


async def test_log_probabilities(server: Server, alone: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    expected = alone("täglich 数", logprobs=3, **GREEDY).outputs[0]
    [choice] = (await server.json("completions", prompt="täglich 数", logprobs=3, **GREEDY))["choices"]
    found = choice["logprobs"]
    assert found["token_logprobs"] == pytest.approx([one.chosen.logprob for one in expected.logprobs], abs=1e-4)
    for top, one, token in zip(found["top_logprobs"], expected.logprobs, found["tokens"], strict=True):
        assert len(top) in (3, 4) and token in top
        assert max(top.values()) == pytest.approx(one.top[0].logprob, abs=1e-4)
    check_tokens(choice["text"], found, expected.token_ids, tokenizer)


def check_tokens(text: str, found: dict[str, Any], ids: list[int], tokenizer: PreTrainedTokenizerFast) -> None:
    """Each token's name is its text, and lies in the text where its offset says."""
    assert len(found["tokens"]) == len(ids)
    assert all(first <= second for first, second in pairwise(found["text_offset"]))
    for name, offset, token in zip(found["tokens"], found["text_offset"], ids, strict=True):
        alone = tokenizer.decode([token])
        if "\ufffd" in alone:
            assert name.startswith("bytes:\\x")
        else:
            assert name == alone
            assert text.startswith(name, offset) or token == tokenizer.eos_token_id


@pytest.mark.parametrize("max_tokens", [0, 1, 6])
async def test_echo_with_log_probabilities(
    server: Server, alone: Any, encoded: Any, tokenizer: PreTrainedTokenizerFast, max_tokens: int
) -> None:
    """What lm-eval's local-completions asks for."""
    ids = encoded("def first(数): return")
    expected = alone(ids, logprobs=1, prompt_logprobs=1, temperature=0, max_tokens=max(1, max_tokens))
    new = expected.outputs[0].token_ids[:max_tokens]
    values = [one.chosen.logprob for one in [*expected.prompt_logprobs[1:], *expected.outputs[0].logprobs[:max_tokens]]]
    for prompt in (ids, "def first(数): return"):
        body = {"prompt": prompt, "echo": True, "logprobs": 1, "temperature": 0, "max_tokens": max_tokens, "seed": 1234}
        found = await server.json("completions", **body)
        [choice] = found["choices"]
        assert choice["text"] == "def first(数): return" + tokenizer.decode(new)
        assert choice["logprobs"]["token_logprobs"][0] is None and choice["logprobs"]["top_logprobs"][0] is None
        assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(values, abs=1e-4)
        assert found["usage"]["completion_tokens"] == max_tokens
        if max_tokens:
            check_tokens(choice["text"], choice["logprobs"], ids + new, tokenizer)


@pytest.mark.parametrize("extra", [{}, {"skip_special_tokens": False}])
@pytest.mark.parametrize("prompt", ["ab", "täglich", "x<|endoftext|>y"])
async def test_offsets_are_of_the_text_that_is_echoed(server: Server, prompt: str, extra: dict[str, Any]) -> None:
    body = {"prompt": prompt, "echo": True, "logprobs": 0, "logit_bias": {"70": 100}} | GREEDY | extra
    [choice] = (await server.json("completions", **body))["choices"]
    text, found = choice["text"], choice["logprobs"]
    shown = [(name, at) for name, at in zip(found["tokens"], found["text_offset"], strict=True) if name != "<|endoftext|>"]
    assert all(text[at : at + len(name)] == name for name, at in shown if not name.startswith("bytes:"))
    assert text.startswith("<|endoftext|>") == bool(extra) and prompt in text


@pytest.mark.parametrize("echo", [True, False])
def test_offsets_behind_a_prompt_that_ends_within_a_character(
    tokenizer: PreTrainedTokenizerFast, encoded: Any, echo: bool
) -> None:
    """What the prompt has of it is echoed as U+FFFD, and the output begins with the whole character."""
    ids = encoded("a🦉bc")[1:]  # without the token that begins documents
    for cut in range(2, len(ids) - 2):
        prompt, new = ids[:cut], ids[cut:]
        echoed, detokenizer = tokenizer.decode(prompt) if echo else "", Detokenizer(tokenizer, SamplingParams(), prompt)
        text = echoed + "".join(map(detokenizer.append, new)) + detokenizer.flush()
        assert text == echoed + "🦉bc" and "\ufffd" in tokenizer.decode(prompt)
        writer = completions._LogprobWriter(TokenTexts(tokenizer), SamplingParams(), prompt, echo)
        written = ids if echo else new
        found = writer.write(written, [None] * len(written))
        assert [text[offset] for offset in found.text_offset[-2:]] == ["b", "c"]


@pytest.mark.parametrize(("stop", "text", "reason"), [("\ufffd", "", "stop"), ("x", "\ufffd", "length")])
async def test_a_stop_string_that_the_end_completes(
    server: Server, tokenizer: PreTrainedTokenizerFast, stop: str, text: str, reason: str
) -> None:
    """A byte is known to make no character when no token follows."""
    byte = tokenizer.convert_tokens_to_ids(bytes_to_unicode()[0xF5])
    body = {"prompt": "ab", "max_tokens": 1, "temperature": 0, "logit_bias": {str(byte): 100}, "stop": [stop]}
    [choice] = (await server.json("completions", **body))["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text, reason)


parts_of_characters = st.sampled_from([b"a", b"\xf5", b"\xf0", b"\xf0\x9f", b"\xa6", b" "])
texts_of_bytes = st.lists(st.one_of(parts_of_characters, st.sampled_from("é数🦉").map(str.encode)), max_size=9)


@given(texts_of_bytes)
def test_offsets_around_bytes_that_make_no_character(tokenizer: PreTrainedTokenizerFast, parts: list[bytes]) -> None:
    """Each token begins behind all that the tokens before it make, but for a character that it goes on with."""
    letters = bytes_to_unicode()
    ids = [tokenizer.convert_tokens_to_ids(letters[byte]) for byte in b"".join(parts)]
    writer = completions._LogprobWriter(TokenTexts(tokenizer), SamplingParams(), [], echo=False)
    found = writer.write(ids, [None] * len(ids)).text_offset
    texts = [tokenizer.decode(ids[:count]) for count in range(len(ids) + 1)]
    expected: list[int] = []
    for before, text in pairwise(texts):
        goes_on = before.endswith("\ufffd") and (text == before or not text.startswith(before))
        expected.append(expected[-1] if goes_on else len(before))
    assert found == expected


async def test_no_longer_answers_than_are_served(model: YocoUForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Where the server's limit is below OpenAI's default; and a longer one is refused before the prompt is looked at."""
    async with running(Server(engine_of(model, tokenizer), max_output_tokens=8)) as server:
        found = await server.json("completions", prompt="x", ignore_eos=True)
        assert found["usage"]["completion_tokens"] == 8
        with pytest.MonkeyPatch.context() as patch:
            patch.delattr(DocumentEncoder, "encode")
            assert (await server.error("completions", prompt="x", max_tokens=9))[1]["param"] == "max_tokens"


async def test_echo_alone(server: Server, alone: Any) -> None:
    [choice] = (await server.json("completions", prompt="def ", echo=True, **GREEDY))["choices"]
    assert choice["text"] == "def " + alone("def ", **GREEDY).outputs[0].text and choice["logprobs"] is None
    [choice] = (await server.json("completions", prompt="def ", echo=True, max_tokens=0))["choices"]
    assert choice["text"] == "def "


async def test_cached_tokens_are_counted(model: YocoUForCausalLM, server: Server) -> None:
    prompt = "def second(x):\n    return x * 3  # heute\n" * 2
    body = {"prompt": [prompt, "x"], "n": 3, "seed": 1, "max_tokens": 3}
    first, second = [(await server.json("completions", **body))["usage"] for _ in range(2)]
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert ENGINE["block_size"] <= second["prompt_tokens_details"]["cached_tokens"] < second["prompt_tokens"] - 2


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        ({"prompt": []}, 400, "prompt", "the list is empty"),
        ({"prompt": ["a", 1]}, 400, "prompt", "expected only strings in the list, got int"),
        ({"prompt": [1, "a"]}, 400, "prompt", "token 'a' is no token id"),
        ({"prompt": [1, 1.5]}, 400, "prompt", "token 1.5 is no token id"),
        ({"prompt": [1, True]}, 400, "prompt", "token True is no token id"),
        ({"prompt": [1, -2]}, 400, "prompt", "token -2 is no token id"),
        ({"prompt": [[1], []]}, 400, "prompt", "a list of token ids is empty"),
        ({"prompt": [[1], ["a"]]}, 400, "prompt", "token 'a' is no token id"),
        ({"prompt": {"a": 1}}, 400, "prompt", "got dict"),
        ({"prompt": [1, 10**30]}, 400, "prompt", "is not in the vocabulary of"),
        ({"prompt": "a\ud800b"}, 400, "prompt", "a lone surrogate at character 1"),
        ({"prompt": "x", "temprature": 1}, 400, "temprature", "did you mean temperature?"),
        ({"prompt": "x", "\ud800": 1}, 400, None, "must be a JSON object"),
        ({"prompt": "x", "temperature": 2.1}, 400, "temperature", "less than or equal to 2"),
        ({"prompt": "x", "temperature": "1"}, 400, "temperature", "expected a number, got '1'"),
        ({"prompt": "x", "max_tokens": -1}, 400, "max_tokens", "greater than or equal to 0"),
        ({"prompt": "x", "max_tokens": True}, 400, "max_tokens", "expected a number"),
        ({"prompt": "x", "max_tokens": 1.5}, 400, "max_tokens", "integer"),
        ({"prompt": "x", "max_tokens": 5000}, 400, "max_tokens", "max_tokens is 5000, but at most 4096"),
        ({"prompt": "x", "max_tokens": 10**300}, 400, "max_tokens", "is too large to compute with"),
        ({"prompt": "x", "max_tokens": 600}, 400, None, "this model's context is 512 tokens"),
        ({"prompt": "x" * 600}, 400, "prompt", "shorten the prompt"),
        ({"prompt": "x", "n": 17}, 400, "n", "at most 16"),
        ({"prompt": "x", "n": 0}, 400, "n", "greater than or equal to 1"),
        ({"prompt": "x", "num_loops": 9}, 400, "num_loops", "at most 8"),
        ({"prompt": "x", "num_loops": 0}, 400, "num_loops", "at least 1, or auto, got 0"),
        ({"prompt": "x", "best_of": 2}, 400, "best_of", "best_of 2 is not supported"),
        ({"prompt": "x", "suffix": "y"}, 400, "suffix", "suffix is not supported"),
        ({"prompt": "x", "logit_bias": {"x": 5}}, 400, "logit_bias", "'x' is no token id"),
        ({"prompt": "x", "logit_bias": {"01": 1, "1": 2}}, 400, "logit_bias", "'01' is no token id"),
        ({"prompt": "x", "logit_bias": {"1": 101}}, 400, "logit_bias", "expected a number from -100 to 100"),
        ({"prompt": "x", "logit_bias": {"99999": 1}}, 400, "logit_bias", "token 99999 of logit_bias is not in the vocabulary"),
        ({"prompt": "x", "logprobs": 21}, 400, "logprobs", "less than or equal to 20"),
        ({"prompt": "x", "stop": ["a", ""]}, 400, "stop.1", "at least 1 character"),
        ({"prompt": "x", "stop": ["a"] * 65}, 400, "stop", "at most 64"),
        ({"prompt": "x", "stop": 5}, 400, "stop", "list"),
        ({"prompt": "x", "stream": "yes"}, 400, "stream", "boolean"),
        ({"prompt": "x", "seed": 2**64}, 400, "seed", "less than"),
        ({"prompt": "x", "regex": "("}, 400, "regex", "regex '('"),
        ({"prompt": "x", "regex": "a", "response_format": {"type": "json_object"}}, 400, "regex", "exclude each other"),
        ({"prompt": "x", "response_format": {"type": "json_schema"}}, 400, "response_format", "belong together"),
        ({"prompt": "x", "response_format": {"type": "xml"}}, 400, "response_format.type", "json_object"),
        ({"prompt": "x", "min_tokens": 20}, 400, "min_tokens", "min_tokens 20 is more than max_tokens 16"),
        ({"prompt": "x", "model": "gpt"}, 404, "model", "no model 'gpt' here; there is 'tiny'"),
        ({"prompt": ["x"] * 300}, 400, None, "300 prompts with 1 outputs each are more"),
        ({"messages": []}, 400, "messages", "unknown key messages"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
async def test_requests_that_are_refused(
    server: Server, body: dict[str, Any], status: int, param: str | None, message: str, stream: bool
) -> None:
    if "stream" not in body:
        body = body | {"stream": stream}
    found, error = await server.error("completions", **body)
    assert found == status and message in error["message"], error
    assert error["param"] == param and error["type"] == "invalid_request_error"
    assert not server.engine.unfinished


async def test_a_schema_that_cannot_be_followed_is_a_mistake_of_the_request(server: Server) -> None:
    """It compiles, and is too complex from the first token on."""
    schema = {"type": "object", "properties": {str(n): {"type": "string"} for n in range(499)}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    status, error = await server.error("completions", prompt="x", response_format=form)
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", "response_format")
    assert error["message"].startswith("no token may come next: ")
