"""A fault in one request's sampling, grammar, text or scores ends that request alone, whatever else is in its batch."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import FixedLengths, assert_all_free
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from models import architecture, build

from yoco_u.data import train_tokenizer
from yoco_u.inference import LLM, Engine, EngineSettings, RequestOutput, SamplingParams
from yoco_u.inference.constraints import Matcher
from yoco_u.inference.detokenizer import Detokenizer
from yoco_u.inference.running_output import RunningOutput
from yoco_u.inference.sampler_state import SamplerState

TOKENIZER = train_tokenizer(['one two three, 12 délta {"a": 1}\n'] * 20, 300)
MODEL = build(architecture("yoco_u", vocab_size=len(TOKENIZER) + 3))
ENGINE = Engine(
    MODEL, TOKENIZER, EngineSettings(dtype="float32", cache_tokens=512, block_size=4, max_num_seqs=4, max_batched_tokens=12)
)

ENGINE.speculation.lengths = FixedLengths(2)

KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.4},
    {"top_k": 9, "top_p": 0.8, "logprobs": 2},
    {"regex": "[a-z ]{3,12}"},
    {"json_schema": {"type": "object"}, "n": 2},
    {"prompt_logprobs": 3, "logprobs": 0, "min_tokens": 3},
    {"stop": ["e", "12"], "n": 3},
    {"drafts": "loops", "frequency_penalty": 0.4},
    {"drafts": "prompt", "regex": "[a-z ]{3,12}"},
]


class Panic(BaseException):
    """As panics of Rust come: no `Exception`."""


HOOKS: list[tuple[type, str]] = [
    (SamplerState, "append"),
    (SamplerState, "uniform"),
    (SamplerState, "counts"),
    (Matcher, "allowed"),
    (Matcher, "append"),
    (Detokenizer, "append"),
    (Detokenizer, "flush"),
    (RunningOutput, "score"),
    (RunningOutput, "take"),
]


def request(kind: int, number: int) -> tuple[list[int], SamplingParams]:
    prompt = [5 + (7 * number + step) % 200 for step in range(3 + 5 * (number % 4))]
    return prompt, SamplingParams(**{"seed": number, "max_tokens": 6} | KINDS[kind])


def said(request: RequestOutput) -> list[tuple[list[int], str, str | None]]:
    return [(one.token_ids, one.text, one.finish_reason) for one in request.outputs]


def drain() -> None:
    while ENGINE.unfinished:
        ENGINE.step()
    assert_all_free(ENGINE)


ALONE: dict[tuple[int, int], Any] = {}


@pytest.fixture(autouse=True)
def _engine_that_is_free() -> Iterator[None]:
    yield
    clear()


def clear() -> None:
    """After a test that failed, too."""
    for output in list(ENGINE._outputs.values()):
        ENGINE.abort(output.parent)


def alone(kind: int, number: int) -> Any:
    clear()
    if (kind, number) not in ALONE:
        found = ENGINE.add(*request(kind, number))
        drain()
        ALONE[kind, number] = said(found), found.prompt_logprobs
    return ALONE[kind, number]


@settings(max_examples=examples(20))
@given(
    kinds=st.lists(st.integers(0, len(KINDS) - 1), min_size=2, max_size=5),
    guilty=st.integers(0, 6),
    hook=st.sampled_from(HOOKS),
    call=st.integers(1, 6),
    fault=st.sampled_from([OverflowError, AssertionError, Panic, MemoryError]),
)
def test_a_fault_at_any_hook_ends_its_own_output(
    kinds: list[int], guilty: int, hook: tuple[type, str], call: int, fault: type[BaseException]
) -> None:
    expected = [alone(kind, number) for number, kind in enumerate(kinds)]
    guilty %= len(kinds)
    requests = [ENGINE.add(*request(kind, number)) for number, kind in enumerate(kinds)]
    victim = next(one for one in ENGINE._outputs.values() if one.parent is requests[guilty])
    parts = {
        SamplerState: victim.sampler,
        Matcher: victim.sampler.matcher,
        Detokenizer: victim.detokenizer,
        RunningOutput: victim,
    }
    owner, name = hook
    raised = False
    if parts[owner] is not None:
        original, calls = getattr(parts[owner], name), 0

        def raises(*given: Any) -> Any:
            nonlocal calls, raised
            calls += 1
            if calls >= call:
                raised = True
                raise fault("a fault")
            return original(*given)

        setattr(parts[owner], name, raises)
    drain()
    for number, one in enumerate(requests):
        outputs, scores = expected[number]
        for index, (found, wanted) in enumerate(zip(said(one), outputs, strict=True)):
            if one is requests[guilty] and index == 0 and raised:
                assert found[2] == "error" and "a fault" in str(one.outputs[0].error)
            else:
                assert found == wanted
        if scores is not None and not (one is requests[guilty] and raised):
            reported, wanted = ([score.chosen.logprob for score in some[1:]] for some in (one.prompt_logprobs, scores))
            torch.testing.assert_close(torch.tensor(reported), torch.tensor(wanted), rtol=0, atol=2e-5)
    assert said(ENGINE.add(*request(0, 3)))  # and the engine takes what comes next
    drain()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_program_still_does(stop: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    def ends(*_: Any) -> None:
        raise stop

    running = ENGINE.add(*request(0, 1))
    with monkeypatch.context() as patch, pytest.raises(stop):
        patch.setattr(SamplerState, "append", ends)
        drain()
    ENGINE.abort(running)
    assert_all_free(ENGINE)


def test_others_are_told_when_a_step_of_an_llm_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller whose step it was gets the exception, and streams an update that says why they end."""
    build(ENGINE.architecture).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    llm, params = LLM(tmp_path, dtype="float32", cache_tokens=512), SamplingParams(seed=1)
    streams = [llm.stream("one", params) for _ in range(2)]
    first = next(streams[0])

    def fail(*_: Any) -> None:
        raise RuntimeError("broken")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="broken"):
        patch.setattr(llm.engine.runner.model.lm_head, "forward", fail)
        llm.generate("two", params)
    for stream, known in zip(streams, ([first], []), strict=True):
        updates = [*known, *stream]
        assert updates[-1].finish_reason == "error" and updates[-1].output.error == "RuntimeError: broken"
        assert [token for update in updates for token in update.token_ids] == updates[-1].output.token_ids
    assert_all_free(llm.engine)


def test_what_a_failed_request_computed_is_shared_unless_the_model_failed() -> None:
    """Else a stranger could make an engine forget a prefix that many use."""
    prompt = list(range(20, 60))
    ENGINE.add(prompt, SamplingParams(max_tokens=1))
    drain()
    failing = ENGINE.add(prompt, SamplingParams(max_tokens=5))
    next(iter(ENGINE._outputs.values())).detokenizer.append = lambda _: 1 / 0  # type: ignore[union-attr,method-assign]
    drain()
    assert failing.outputs[0].finish_reason == "error" and "ZeroDivisionError" in str(failing.outputs[0].error)
    again = ENGINE.add(prompt, SamplingParams(max_tokens=1))
    drain()
    assert failing.cached_tokens == again.cached_tokens >= 32


def never_decided(engine: Engine) -> Callable[[], None]:
    """Keep the masks of the newest output from coming; the function that is returned lets them come."""
    matcher = list(engine._outputs.values())[-1].sampler.matcher
    assert matcher is not None
    held = type("Held", (Matcher,), {"decided": property(lambda _: False), "ask": lambda _: None})
    matcher.__class__ = held
    return lambda: setattr(matcher, "__class__", Matcher)


@settings(max_examples=examples(8))
@given(st.lists(st.integers(0, len(KINDS) - 1), min_size=1, max_size=5), st.integers(0, 20), st.booleans())
def test_outputs_wait_for_a_late_mask_alone(kinds: list[int], late: int, abort: bool) -> None:
    """Others go on meanwhile, also if they have to take the blocks of the one that waits; what it says is the same."""
    expected = [alone(kind, number) for number, kind in enumerate(kinds)]
    wanted = alone(4, 9)
    waiting = ENGINE.add(*request(4, 9))
    let_go = never_decided(ENGINE)
    others = [ENGINE.add(*request(kind, number)) for number, kind in enumerate(kinds)]
    while not all(one.finished for one in others):
        ENGINE.step()
    assert [said(one) for one in others] == [outputs for outputs, _ in expected]
    for _ in range(late % 3):
        assert ENGINE.step() == []
    if abort:
        ENGINE.abort(waiting)
    let_go()
    drain()
    assert abort or said(waiting) == wanted[0]


@pytest.mark.parametrize("place", ["yoco_u.inference.engine.sample", "torch.stack", "wait", "settle"])
def test_a_step_that_raises_loses_no_output_that_waited_for_its_mask(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends with the step that was to choose its token; with its logits, or the token, it goes on."""
    expected = alone(4, 9)[0]
    waiting = ENGINE.add(*request(4, 9))
    matcher = list(ENGINE._outputs.values())[-1].sampler.matcher
    let_go = never_decided(ENGINE)
    while not ENGINE._undecided:
        ENGINE.step()
    let_go()
    assert matcher is not None and ENGINE._grammars is not None
    ENGINE._grammars.wait([matcher], 60)

    def fail(*_: Any) -> None:
        raise RuntimeError("broken")

    owners = {"wait": ENGINE._grammars, "settle": ENGINE.speculation}
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="broken"):
        if place in owners:
            patch.setattr(owners[place], place, fail)
        else:
            patch.setattr(place, fail)
        ENGINE.step()
    told = [token for update in ENGINE.failed for token in update.token_ids]
    assert told == waiting.outputs[0].token_ids
    if place in owners:
        drain()
        assert said(waiting) == expected
    else:
        assert said(waiting) == [([], "", "error")] and waiting.outputs[0].error == "RuntimeError: broken"
        assert_all_free(ENGINE)
    assert ENGINE.step() == ENGINE.failed == []


@settings(max_examples=examples(10))
@given(kinds=st.lists(st.integers(0, len(KINDS) - 1), min_size=1, max_size=5), chance=st.randoms(use_true_random=False))
def test_masks_that_come_late_at_any_token(kinds: list[int], chance: random.Random) -> None:
    """Each output says what it says alone, however many steps it waits for each of its tokens."""
    expected = [alone(kind, number) for number, kind in enumerate(kinds)]
    decided, steps = SamplerState.decided.fget, {}  # type: ignore[attr-defined]

    def late(state: SamplerState) -> bool:
        place = state, state.num_tokens
        steps[place] = steps.get(place, chance.choice([0, 0, 1, 2, 5])) - 1
        return steps[place] < 0 and bool(decided(state))

    requests = [ENGINE.add(*request(kind, number)) for number, kind in enumerate(kinds)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SamplerState, "decided", property(late))
        drain()
    assert [said(one) for one in requests] == [outputs for outputs, _ in expected]
