"""Processes of grammars that stand still: they hold up their own outputs, until those have waited for long enough."""

from typing import Any

import psutil
import pytest
from engine_runs import assert_all_free
from models import architecture, build

from yoco_u.data import train_tokenizer
from yoco_u.inference import Engine, EngineSettings, RequestOutput, SamplingParams

TOKENIZER = train_tokenizer(['one two three, 12 délta {"a": 1}\n'] * 20, 300)
MODEL = build(architecture("yoco_u", vocab_size=len(TOKENIZER) + 3))
ENGINE = Engine(
    MODEL, TOKENIZER, EngineSettings(dtype="float32", cache_tokens=512, block_size=4, max_num_seqs=6, max_batched_tokens=12)
)
LARGE = {"enum": [f"value {number}" for number in range(15_000)]}  # more than a connection takes
OTHERS: list[dict[str, Any]] = [{}, {"regex": "[a-z ]{3,12}"}, {"json_schema": {"type": "object"}, "n": 2}, {"stop": "e"}]
PROMPT = list(range(20, 45))


def add(**settings: Any) -> RequestOutput:
    return ENGINE.add(PROMPT, SamplingParams(**{"seed": 1, "max_tokens": 6} | settings))


def said(request: RequestOutput) -> list[Any]:
    return [(one.token_ids, one.text, one.finish_reason) for one in request.outputs]


def drain() -> None:
    while ENGINE.unfinished:
        ENGINE.step()
    assert_all_free(ENGINE)


def check_that_others_go_on(guilty: RequestOutput, alone: list[RequestOutput], patch: pytest.MonkeyPatch) -> None:
    others = [add(**one) for one in OTHERS]
    while not all(one.finished for one in others):
        ENGINE.step()
    assert [said(one) for one in others] == [said(one) for one in alone]
    assert all(one.finish_reason is None for one in guilty.outputs)
    with patch.context() as impatient:
        impatient.setattr("yoco_u.confined.nursery._PATIENCE", 0.0)
        while not any(one.finish_reason for one in guilty.outputs):
            ENGINE.step()
    drain()
    assert "did not end within" in str([one.error for one in guilty.outputs])
    again = [add(**one) for one in OTHERS]
    drain()
    assert [said(one) for one in again] == [said(one) for one in alone]


@pytest.fixture
def alone() -> list[RequestOutput]:
    found = []
    for one in OTHERS:
        found.append(add(**one))
        drain()
    return found


@pytest.mark.parametrize("grammar", [{"regex": "x[0-9]{30}"}, {"json_schema": LARGE}], ids=["small", "large"])
def test_the_process_of_one_grammar(
    grammar: dict[str, Any], alone: list[RequestOutput], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {one.pid for one in psutil.Process().children(recursive=True)}
    guilty = add(**grammar, n=2)
    [process] = [one for one in psutil.Process().children(recursive=True) if one.pid not in before]
    process.suspend()
    check_that_others_go_on(guilty, alone, monkeypatch)
    guilty = add(**grammar)
    drain()
    assert guilty.outputs[0].finish_reason == "length"
    assert psutil.wait_procs([process], timeout=60)[0] == [process]


def test_the_process_that_others_are_forked_from(alone: list[RequestOutput], monkeypatch: pytest.MonkeyPatch) -> None:
    """So that nobody reads what a grammar's process is sent, which is more than a connection takes."""
    before = {one.pid for one in psutil.Process().children(recursive=True)}
    add(regex="y[0-9]{7}")
    [nursery] = [one.parent() for one in psutil.Process().children(recursive=True) if one.pid not in before]
    drain()
    add(json_schema=LARGE)
    drain()
    list(ENGINE._grammars._followers.values())[-1].end()  # type: ignore[union-attr]
    nursery.suspend()
    check_that_others_go_on(add(json_schema=LARGE, n=2), alone, monkeypatch)
    guilty = add(json_schema=LARGE)
    drain()
    assert guilty.outputs[0].finish_reason == "length"
