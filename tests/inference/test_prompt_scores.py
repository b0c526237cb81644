"""Log probabilities of a prompt from some position on, against one pass over all of it; and prompts without an output."""

import math
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from engine_runs import (
    assert_all_free,
    assert_greedy,
    assert_ranked,
    engine,
    full_logprobs,
    generated,
    greedy,
    output,
    prompt,
    run,
)
from examples import covering
from hypothesis import given
from hypothesis import strategies as st
from models import PRESETS

from yoco_u.errors import UserError
from yoco_u.inference import Engine, Logprob, RequestOutput, SamplingParams, TokenLogprobs
from yoco_u.inference.outputs import BROKEN_LOGITS
from yoco_u.inference.step import Chunk, Step

BLOCK = 4


def scored(start: int, **settings: Any) -> SamplingParams:
    return greedy(**{"prompt_logprobs": 2, "prompt_logprobs_start": start, "max_tokens": 0} | settings)


def check(request: RequestOutput, variant: str, start: int, loops: int | None = None) -> None:
    """None before `start`, then within 2e-5 of one pass over the whole prompt, with the ranks of that pass."""
    ids, found = request.prompt_token_ids, request.prompt_logprobs
    assert found is not None and len(found) == len(ids)
    truth = full_logprobs(variant, ids, loops)
    for position, one in enumerate(found):
        if position < max(start, 1):
            assert one is None
        else:
            assert one is not None and one.chosen.token_id == ids[position] and len(one.top) == 2
            assert_ranked(one, truth[position - 1])


@contextmanager
def scored_positions(subject: Engine) -> Iterator[list[int]]:
    """How many positions the LM head sees, step by step."""
    seen: list[int] = []
    hook = subject.runner.model.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    yield seen
    hook.remove()


@pytest.mark.parametrize(("variant", "chunk"), covering([*PRESETS, "experts", "window 1", "four kinds"], [1, 5, 64]))
def test_from_every_place(variant: str, chunk: int) -> None:
    subject = engine(variant, max_batched_tokens=chunk, max_num_seqs=1, prefix_caching=False)
    for start in (0, 1, 26) if chunk == 1 else (0, 1, 2, 13, 26):
        new = 2 * ((start + chunk) % 2)  # none or two, each from every place, with two of the chunk sizes
        [request] = run(subject, [prompt(27)], scored(start, max_tokens=new))
        check(request, variant, start)
        assert_greedy(variant, request, new=new)
        assert request.outputs[0].finish_reason == "length"


@pytest.mark.parametrize("variant", ["yoco_u", "yoco", "rins", "yoco_retention", "upper_loop", "four kinds"])
def test_a_shared_context_is_computed_once(variant: str) -> None:
    """As in multiple choice: one context, several continuations, found again up to the block of the first score."""
    subject = engine(variant, max_batched_tokens=10)
    context, cached = prompt(22), []
    for seed, length in enumerate((3, 1, 9, 4)):
        [request] = run(subject, [[*context, *prompt(length, seed=10 + seed)]], scored(22))
        check(request, variant, 22)
        cached.append(request.cached_tokens)
    assert cached == [0, 20, 20, 20]  # the 21st token on have to run: the 22nd gives the first score


@pytest.mark.parametrize("variant", ["yoco_u", "transformer"])
def test_nothing_else_runs_through_the_head(variant: str) -> None:
    subject = engine(variant, max_batched_tokens=7)
    for seed, (params, count) in enumerate([(scored(25), 5), (scored(25, max_tokens=1), 6), (greedy(max_tokens=0), 0)]):
        with scored_positions(subject) as seen:
            run(subject, [prompt(30, seed=seed)], params)
        assert sum(seen) == count


def test_among_others_at_several_loop_counts() -> None:
    starts, loops = [0, 5, 12, 20, 29], [None, 1, 2, 3, 4]
    params = [scored(start, num_loops=n, max_tokens=i % 3) for i, (start, n) in enumerate(zip(starts, loops, strict=True))]
    prompts = [prompt(30, seed=i % 2) for i in range(5)]
    found = run(engine(max_num_seqs=6, max_batched_tokens=11), [*prompts, *prompts], [*params, *[greedy()] * 5])
    for request, start, n in zip(found[:5], starts, loops, strict=True):
        check(request, "yoco_u", start, n)
    assert [output(request) for request in found[5:]] == [generated("yoco_u", ids) for ids in prompts]


@pytest.mark.parametrize(("variant", "prefix_caching"), covering(["yoco_u", "rins", "yoco_retention"], [True, False]))
def test_requests_that_give_way(variant: str, prefix_caching: bool) -> None:
    """Driven out in the middle of the scores, they go on behind what is known; every position is reported once."""
    settings = {"cache_tokens": 64, "max_num_seqs": 6, "max_batched_tokens": 6, "prefix_caching": prefix_caching}
    subject = engine(variant, **settings)
    prompts = [prompt(10 + i, seed=i) for i in range(6)]
    with scored_positions(subject) as seen:
        found = run(subject, prompts, [scored(1 + i, max_tokens=22) for i in range(6)])
    assert subject.scheduler.statistics.preemptions > 1
    for i, request in enumerate(found):
        check(request, variant, 1 + i)
        assert_greedy(variant, request, new=22)
    assert sum(seen) == 6 * (9 + 22)


def test_driven_out_before_the_last_score() -> None:
    """An older request takes the blocks of one that has scored half of its prompt."""
    subject = engine(cache_tokens=44, max_num_seqs=2, max_batched_tokens=5)
    first = subject.add(prompt(8), greedy(max_tokens=30))
    while len(output(first)) < 6:
        subject.step()
    second = subject.add(prompt(24, seed=2), scored(3))
    while second.prompt_logprobs == [None] * 3:
        subject.step()
    half = subject.scheduler.running[-1].unscored
    assert 3 < half < 24
    subject.scheduler._preempt(subject.scheduler.running[-1])
    while subject.unfinished:
        subject.step()
    assert_all_free(subject)
    check(second, "yoco_u", 3)
    assert output(first) == generated("yoco_u", prompt(8), 30)


def test_a_prompt_is_only_computed() -> None:
    """`max_tokens` 0 without scores fills the caches for those that begin alike."""
    subject = engine()
    base = prompt(25)
    [request] = run(subject, [base], SamplingParams(max_tokens=0))
    assert request.finished and output(request) == [] and request.outputs[0].text == ""
    found = run(subject, [[*base[:24], *prompt(6, seed=i)] for i in range(3)], greedy())
    assert [request.cached_tokens for request in found] == [24] * 3
    assert [output(request) for request in found] == [generated("yoco_u", one.prompt_token_ids) for one in found]


@pytest.mark.parametrize("chunk", [3, 64])
@pytest.mark.parametrize("new", [0, 1])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_are_no_scores(wrong: float, new: int, chunk: int) -> None:
    """One logit behind one token is enough, whichever it is of, and nothing of that chunk is reported."""
    subject = engine(max_batched_tokens=chunk, max_num_seqs=2)
    bad = 17
    ids, good = [5, 6, 7, 8, 9, bad, 11], [5, 6, 7, 8, 9, 10, 11]
    computed = subject.runner.run

    @torch.inference_mode()
    def broken(step: Step) -> list[tuple[Chunk, torch.Tensor]]:
        found = computed(step)
        for one, logits in found:
            for row, token in enumerate(one.request.prompt[one.end - len(logits) : one.end]):
                if token == bad:
                    logits[row, 30] = wrong
        return found

    subject.runner.run = broken  # type: ignore[method-assign,assignment]
    for _ in range(2):  # the second time among what the first has left in the cache
        failed, right = run(subject, [ids, good], scored(0, max_tokens=new))
        assert (failed.outputs[0].finish_reason, failed.outputs[0].error) == ("error", BROKEN_LOGITS)
        assert len(failed.prompt_logprobs or []) < len(ids) and not any(math.isnan(one.chosen.logprob) for one in failed.scored)
        assert failed.cached_tokens == 0
        check(right, "yoco_u", 0)
        assert right.outputs[0].finish_reason == "length"


def test_what_the_model_rules_out_has_a_score() -> None:
    """Minus infinity, in a logit of a token or of all others, is a probability of 0 or 1."""
    subject = engine()
    computed = subject.runner.run

    @torch.inference_mode()
    def certain(step: Step) -> list[tuple[Chunk, torch.Tensor]]:
        found = computed(step)
        for _, logits in found:
            logits.fill_(-torch.inf)[:, 7] = 0.0
        return found

    subject.runner.run = certain  # type: ignore[method-assign,assignment]
    [request] = run(subject, [[5, 7, 6]], scored(0))
    assert [one.chosen.logprob for one in request.scored] == [0.0, -math.inf]
    assert request.outputs[0].finish_reason == "length"


def test_updates_say_that_it_ended() -> None:
    subject = engine(max_batched_tokens=8)
    request = subject.add(prompt(20), scored(15))
    updates = []
    while subject.unfinished:
        updates += subject.step()
    [update] = updates
    assert update.request is request and update.finish_reason == "length" and update.token_ids == []


@pytest.mark.parametrize(
    ("length", "settings", "message"),
    [
        (1, {"max_tokens": 0}, "a prompt of one token and max_tokens 0 leave nothing to compute"),
        (5, {"prompt_logprobs": 0, "prompt_logprobs_start": 5}, "prompt_logprobs_start is 5, but the prompt has 5 tokens"),
    ],
)
def test_what_cannot_be_scored(length: int, settings: dict[str, Any], message: str) -> None:
    subject = engine()
    with pytest.raises(UserError, match=message):
        subject.add(prompt(length), greedy(**settings))
    assert_all_free(subject)


LOGPROBS = st.builds(Logprob, st.integers(0, 2**31 - 1), st.floats(max_value=-1e-9), st.integers(1, 2**31 - 1))


@given(LOGPROBS, st.lists(LOGPROBS, max_size=20).map(tuple))
def test_many_log_probabilities_take_little_memory(chosen: Logprob, top: tuple[Logprob, ...]) -> None:
    """And are what they were."""
    one = TokenLogprobs(chosen, top)
    assert (one.chosen, one.top) == (chosen, top)
    same = TokenLogprobs(chosen, top)
    assert one == same == pickle.loads(pickle.dumps(one)) and hash(one) == hash(same)
    assert one != TokenLogprobs(chosen, (*top, chosen)) and str(chosen) in repr(one)
    assert sum(sys.getsizeof(getattr(one, name)) for name in one.__slots__) < 64 + 16 * (1 + len(top))
