"""`LLM` over a saved model and a real tokenizer: text in, text out, as stream, under grammars."""

import gc
import itertools
import json
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import assert_all_free
from in_fork import check_in_fork
from models import architecture, build
from transformers import AutoTokenizer, PreTrainedTokenizerFast, pipeline

from yoco_u import YocoUForCausalLM
from yoco_u.confined.nursery import Confined
from yoco_u.data import train_tokenizer
from yoco_u.errors import UserError
from yoco_u.inference import LLM, RequestOutput, SamplingParams, Update
from yoco_u.inference.block_pool import BlockPool
from yoco_u.inference.runner import Runner
from yoco_u.inference.scheduler import Scheduler
from yoco_u.inference.step import Step

TEXTS = [
    '{"name": "alpha délta 数 🦉", "age": 17, "tags": ["red", "blue"]}\n',
    "def first(x):\n    return x * 3  # täglich\n",
] * 9
SETTINGS: dict[str, Any] = {"dtype": "float32", "cache_tokens": 2048, "block_size": 16}
PROMPTS = ["def ", '{"name": "', "täglich 数", "x"]
GREEDY = SamplingParams(temperature=0, max_tokens=24)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 300)


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> YocoUForCausalLM:
    return build(architecture("yoco_u", vocab_size=len(tokenizer) + 3))


@pytest.fixture(scope="module")
def folder(model: YocoUForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def shared(folder: Path) -> LLM:
    return LLM(folder, **SETTINGS)


@pytest.fixture
def llm(shared: LLM) -> LLM:
    assert_all_free(shared.engine)
    return shared


def text_of(request: RequestOutput) -> str:
    [completion] = request.outputs
    return completion.text


def test_text_is_what_generate_gives(llm: LLM, model: YocoUForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    found = llm.generate(PROMPTS, GREEDY)
    for prompt, request in zip(PROMPTS, found, strict=True):
        ids = [tokenizer.eos_token_id, *tokenizer(prompt, add_special_tokens=False).input_ids]
        assert request.prompt == prompt and request.prompt_token_ids == ids
        row = torch.tensor([ids])
        out = model.generate(
            row, attention_mask=torch.ones_like(row), max_new_tokens=24, do_sample=False, eos_token_id=tokenizer.eos_token_id
        )
        new = out[0, len(ids) :].tolist()
        assert request.outputs[0].token_ids == new
        assert text_of(request) == tokenizer.decode(new, skip_special_tokens=True)
    assert_all_free(llm.engine)


def test_transformers_reads_the_saved_folder_as_the_engine_does(llm: LLM, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generate = pipeline("text-generation", model=str(folder), dtype="float32", device="cpu")
    for request in llm.generate(PROMPTS, GREEDY):
        assert request.prompt is not None and tokenizer(request.prompt).input_ids == request.prompt_token_ids
        how: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": tokenizer.eos_token_id}
        [found] = generate(request.prompt, return_full_text=False, **how)
        assert found["generated_text"] == text_of(request)


def test_one_prompt_tokens_and_a_params_each(llm: LLM, tokenizer: PreTrainedTokenizerFast) -> None:
    [text] = llm.generate("def ", GREEDY)
    [tokens] = llm.generate(text.prompt_token_ids, GREEDY)
    assert tokens.prompt is None and text_of(tokens) == text_of(text)
    short, long = llm.generate(["def ", text.prompt_token_ids], [SamplingParams(temperature=0, max_tokens=5), GREEDY])
    assert short.outputs[0].token_ids == text.outputs[0].token_ids[:5]
    assert text_of(long) == text_of(text)
    assert llm.generate([], GREEDY) == []
    assert len(llm.generate("x")[0].outputs[0].token_ids) <= 16
    with pytest.raises(UserError, match="2 prompts came with 1 SamplingParams"):
        llm.generate(["a", "b"], [GREEDY])


def test_stop_strings(llm: LLM) -> None:
    """Every piece of a text as its end: the text up to its first occurrence, wherever tokens begin."""
    [free] = llm.generate("def ", GREEDY)
    text = text_of(free).rstrip("\N{REPLACEMENT CHARACTER}")
    pieces = {text[start : start + length] for length in (1, 2, 3, 5) for start in range(0, len(text) - length, 3)}
    assert len(pieces) > 15
    params = [SamplingParams(temperature=0, max_tokens=24, stop=(piece, "never this")) for piece in sorted(pieces)]
    for request, own in zip(llm.generate(["def "] * len(params), params), params, strict=True):
        piece, completion = own.stop[0], request.outputs[0]
        if "\N{REPLACEMENT CHARACTER}" in piece:
            continue
        assert completion.text == text[: text.index(piece)]
        assert (completion.finish_reason, completion.stop_reason) == ("stop", piece)
        assert completion.token_ids == free.outputs[0].token_ids[: len(completion.token_ids)]


def test_end_of_text_ends_and_is_not_shown(llm: LLM, tokenizer: PreTrainedTokenizerFast) -> None:
    params = SamplingParams(n=12, seed=1, temperature=2.0, max_tokens=40, logit_bias={tokenizer.eos_token_id: 6.0})
    [request] = llm.generate("x", params)
    stopped = [one for one in request.outputs if one.finish_reason == "stop"]
    assert 0 < len(stopped) < 12
    for completion in request.outputs:
        assert (tokenizer.eos_token_id in completion.token_ids) == (completion.finish_reason == "stop")
        assert completion.text == tokenizer.decode(completion.token_ids, skip_special_tokens=True)
    for completion in stopped:
        assert completion.token_ids.index(tokenizer.eos_token_id) == len(completion.token_ids) - 1
        assert completion.stop_reason == tokenizer.eos_token_id
    [on] = llm.generate("x", params.model_copy(update={"ignore_eos": True}))
    assert {len(one.token_ids) for one in on.outputs} == {40}


def joined(updates: list[Update], request: RequestOutput, index: int) -> tuple[str, list[int]]:
    own = [update for update in updates if update.request is request and update.output.index == index]
    assert [update.finish_reason for update in own] == [None] * (len(own) - 1) + [request.outputs[index].finish_reason]
    return "".join(update.text for update in own), [token for update in own for token in update.token_ids]


def check_stream(updates: list[Update], outputs: int) -> None:
    """The updates make up the outputs, whose ends are their last."""
    requests = {id(update.request): update.request for update in updates}.values()
    found = 0
    for request in requests:
        assert request.finished
        for completion in request.outputs:
            assert joined(updates, request, completion.index) == (completion.text, completion.token_ids)
            found += 1
    assert found == outputs


def test_a_stream_adds_up_to_the_text(llm: LLM) -> None:
    params = [SamplingParams(n=n, seed=n, max_tokens=20, stop=("a", "\n")) for n in (1, 2, 1, 3)]
    updates = list(llm.stream(PROMPTS, params))
    check_stream(updates, 7)
    texts = [[one.text for one in request.outputs] for request in llm.generate(PROMPTS, params)]
    streamed = {update.request.prompt: [one.text for one in update.request.outputs] for update in updates}
    assert [streamed[prompt] for prompt in PROMPTS] == texts
    assert_all_free(llm.engine)


def test_streams_in_turns(llm: LLM) -> None:
    """Each gets its own updates, whoever runs the engine."""
    streams = [llm.stream(prompt, GREEDY) for prompt in PROMPTS[:3]]
    updates: list[list[Update]] = [[], [], []]
    for found, stream in zip(updates, streams, strict=True):
        found.append(next(stream))
    [between] = llm.generate(PROMPTS[3], GREEDY)
    for found, stream in zip(reversed(updates), reversed(streams), strict=True):
        found += stream
    for found, prompt in zip(updates, PROMPTS[:3], strict=True):
        check_stream(found, 1)
        assert {update.request.prompt for update in found} == {prompt}
        assert text_of(found[0].request) == text_of(llm.generate(prompt, GREEDY)[0])
    assert text_of(between) == text_of(llm.generate(PROMPTS[3], GREEDY)[0])
    assert_all_free(llm.engine)


@pytest.mark.parametrize("read", [0, 1, 5])
def test_an_abandoned_stream_frees_everything(llm: LLM, read: int) -> None:
    stream = llm.stream(PROMPTS, SamplingParams(n=2, max_tokens=30, ignore_eos=True))
    updates = [next(stream) for _ in range(read)]
    assert llm.engine.unfinished == 8
    del stream
    gc.collect()
    assert_all_free(llm.engine)
    if updates:
        assert {one.finish_reason for one in updates[0].request.outputs} == {"abort"}


def test_a_stream_that_is_collected_within_a_step(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Python may do at any moment with one that nobody has any more: the step goes on, and then its requests end."""
    [expected] = llm.generate(PROMPTS[0], GREEDY)
    stream = llm.stream(PROMPTS[1:], SamplingParams(max_tokens=30, ignore_eos=True))
    first = next(stream)
    run = llm.engine.runner.run

    def collecting(step: Step) -> Any:
        stream.close()
        return run(step)

    monkeypatch.setattr(llm.engine.runner, "run", collecting)
    [found] = llm.generate(PROMPTS[0], GREEDY)
    assert text_of(found) == text_of(expected)
    assert first.output.finish_reason == "abort"
    assert_all_free(llm.engine)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize(
    "moment",
    [(Scheduler, "add"), (Scheduler, "finish"), (Scheduler, "advance"), (BlockPool, "allocate"), (Runner, "run"),
     (Confined, "ask"), (Confined, "answer")],
)  # fmt: skip
def test_ctrl_c_comes_between_two_steps(llm: LLM, monkeypatch: pytest.MonkeyPatch, moment: tuple[type, str]) -> None:
    """Wherever a step is: afterwards nothing is left in the engine, and everybody gets what they would have got."""
    params = [GREEDY, SamplingParams(regex="[a-z]{6}[0-9]{6}", seed=1, max_tokens=30)]
    expected = [text_of(one) for one in llm.generate(PROMPTS[:2], params)]
    done = getattr(*moment)
    for call in (1, 3):
        calls = itertools.count(1)

        def interrupted(*arguments: Any, calls: Iterator[int] = calls, call: int = call, **named: Any) -> Any:
            found = done(*arguments, **named)
            if next(calls) == call:
                signal.raise_signal(signal.SIGINT)
            return found

        with monkeypatch.context() as patch:
            patch.setattr(*moment, interrupted)
            with suppress(KeyboardInterrupt):
                llm.generate(PROMPTS[:2], params)
                assert next(calls) <= call, "the signal was lost"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert_all_free(llm.engine)
        assert [text_of(one) for one in llm.generate(PROMPTS[:2], params)] == expected


@pytest.mark.usefixtures("heard")
def test_a_second_ctrl_c_acts_at_once(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    reached = []

    def endless(_: Step) -> None:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
            reached.append(_)

    monkeypatch.setattr(llm.engine.runner, "run", endless)
    with pytest.raises(KeyboardInterrupt):
        llm.generate("x", GREEDY)
    assert len(reached) == 1
    assert_all_free(llm.engine)


def test_several_threads_take_turns(llm: LLM) -> None:
    expected = {prompt: text_of(llm.generate(prompt, GREEDY)[0]) for prompt in PROMPTS}

    def ask(number: int) -> dict[str, str]:
        asked = PROMPTS[number:] + PROMPTS[:number]
        if number % 2:
            return {prompt: text_of(llm.generate(prompt, GREEDY)[0]) for prompt in asked}
        updates = list(llm.stream(asked, GREEDY))
        check_stream(updates, len(asked))
        return {update.request.prompt or "": update.request.outputs[0].text for update in updates}

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(ask, range(4))) == [expected] * 4
    assert_all_free(llm.engine)


def test_nothing_runs_where_one_request_is_not_possible(llm: LLM) -> None:
    for call in (llm.generate, llm.stream):
        with pytest.raises(UserError, match="more than max_model_len 2048"):
            call(["def ", [5] * 3000])
        with pytest.raises(UserError, match="the prompt is empty; give at least one character"):
            call(["def ", ""])
        with pytest.raises(UserError, match="no text fits it"):
            call("x", SamplingParams(regex="a[^\\s\\S]"))
        assert_all_free(llm.engine)


def test_prompts_and_params_may_be_read_once(llm: LLM) -> None:
    params = [SamplingParams(temperature=0, max_tokens=length) for length in (3, 5, 4, 6)]
    expected = [(one.prompt, text_of(one)) for one in llm.generate(PROMPTS, params)]
    assert [(one.prompt, text_of(one)) for one in llm.generate(iter(PROMPTS), (own for own in params))] == expected
    assert {update.request.prompt for update in llm.stream(map(str, PROMPTS), GREEDY)} == set(PROMPTS)
    assert llm.generate(iter(()), GREEDY) == []


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        (None, None, "prompts is of type NoneType"),
        (b"def ", None, "prompts is of type bytes"),
        ({"prompt": "def "}, None, "prompts is of type dict"),
        (torch.tensor([5, 6]), None, "a prompt is of type Tensor; give a text or a list of token ids"),
        (["def ", torch.tensor([5, 6])], None, "a prompt is of type Tensor"),
        (["def ", 5], None, "a prompt is of type int"),
        (["def ", None], None, "a prompt is of type NoneType"),
        ([True, False], None, "token True of the prompt is no whole number"),
        ("a\ud800", None, "no Unicode text: a lone surrogate at character 1"),
        ("def ", 5, "5 is no SamplingParams"),
        (["def ", "x"], [GREEDY, None], "None is no SamplingParams"),
        ("def ", {"max_tokens": 5}, "'max_tokens' is no SamplingParams"),
        ("def ", SamplingParams(logit_bias={303: 1.0}), "token 303 of logit_bias is not in the vocabulary of 303"),
        ([5, 6], SamplingParams(logit_bias={303: 1.0}), "token 303 of logit_bias is not in the vocabulary of 303"),
    ],
)
def test_what_is_no_prompt_or_no_params(llm: LLM, prompts: Any, params: Any, message: str) -> None:
    """One line, and nothing that came before it is left in the engine."""
    for call in (llm.generate, llm.stream):
        with pytest.raises(UserError, match=message):
            call(prompts, params)
        assert_all_free(llm.engine)


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["red", "blue"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def test_output_under_grammars_in_one_batch(llm: LLM) -> None:
    """A schema, an expression, no grammar, several outputs, other loop counts; the free ones are as they are alone."""
    date = r"[0-9]{4}-[0-9]{2}-[0-9]{2}"
    params = [
        SamplingParams(json_schema=SCHEMA, n=5, seed=1, max_tokens=150),
        SamplingParams(regex=date, n=3, seed=2, max_tokens=30, num_loops=2),
        SamplingParams(json_schema=json.dumps(SCHEMA), temperature=0, max_tokens=150),
        GREEDY,
    ]
    found = llm.generate(["def ", "täglich ", "x", "def "], params)
    for one in (*found[0].outputs, *found[2].outputs):
        assert one.finish_reason == "stop", one
        value = json.loads(one.text)
        assert set(value) == set(SCHEMA["properties"]) and 0 <= value["age"] <= 130 and len(value["name"]) <= 8
    for one in found[1].outputs:
        assert one.finish_reason == "stop" and re.fullmatch(date, one.text)
    assert len({one.text for one in found[1].outputs}) == 3
    assert text_of(found[3]) == text_of(llm.generate("def ", GREEDY)[0])


def test_a_forked_process_and_its_parent_go_on_alike(llm: LLM) -> None:
    params = SamplingParams(regex="[a-z]{6}[0-9]{6}", seed=1, max_tokens=30)
    [expected] = llm.generate("def ", params)
    assert expected.outputs[0].finish_reason == "stop"
    stream = llm.stream("def ", params)
    first = next(stream)

    def finish() -> None:
        assert "".join([first.text, *(update.text for update in stream)]) == text_of(expected)
        assert text_of(llm.generate("def ", params)[0]) == text_of(expected)

    check_in_fork(finish)
    finish()


def test_grammars_of_requests_that_give_way(folder: Path) -> None:
    """The grammar stands where it stood when a request comes back."""
    params = [SamplingParams(json_schema=SCHEMA, seed=seed, max_tokens=100) for seed in range(4)]
    roomy = LLM(folder, **SETTINGS)
    small = LLM(folder, **SETTINGS | {"cache_tokens": 112, "block_size": 4, "max_num_seqs": 4, "max_batched_tokens": 8})
    found = small.generate(["x"] * 4, params)
    assert small.engine.scheduler.statistics.preemptions > 0
    assert [text_of(one) for one in found] == [text_of(one) for one in roomy.generate(["x"] * 4, params)]
    assert all(one.outputs[0].finish_reason == "stop" and json.loads(text_of(one)) for one in found)
    assert_all_free(small.engine)


def test_folders_and_settings_that_are_not_possible(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a run folder"):
        LLM(tmp_path)
    with pytest.raises(UserError, match=re.escape("settings of LLM")):
        LLM(folder, cache_token=5)
    with pytest.raises(UserError, match="max_batched_tokens is 3"):
        LLM(folder, max_batched_tokens=3)


def test_both_names_are_the_packages() -> None:
    import yoco_u

    assert (yoco_u.LLM, yoco_u.SamplingParams) == (LLM, SamplingParams)
