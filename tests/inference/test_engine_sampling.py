"""Sampling through the engine: seeds, ends of outputs, log-probabilities, whatever else is in the batch."""

from typing import Any

import pytest
import torch
from engine_runs import NEW, assert_all_free, assert_ranked, engine, full_logprobs, generated, greedy, output, prompt, run
from models import build

from yoco_u.inference import Completion, Engine, EngineSettings, SamplingParams

SAMPLED: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 1.3, "top_p": 0.8},
    {"min_p": 0.05, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    {"repetition_penalty": 1.4, "num_loops": 2},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "num_loops": 4},
]


def sampled(i: int, **settings: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 12, "seed": i, "ignore_eos": True} | SAMPLED[i % len(SAMPLED)] | settings)


@pytest.mark.parametrize("variant", ["yoco_u", "yoco_retention", "rins", "experts", "parscale"])
def test_a_seed_gives_the_same_alone_in_a_crowd_and_after_giving_way(variant: str) -> None:
    prompts = [prompt(3 + 2 * i, seed=i) for i in range(7)]
    params = [sampled(i) for i in range(7)]
    alone = [run(engine(variant, max_num_seqs=1), [ids], own)[0] for ids, own in zip(prompts, params, strict=True)]
    crowded = run(engine(variant, max_num_seqs=7, max_batched_tokens=15), prompts, params)
    small = engine(variant, cache_tokens=64, max_num_seqs=7, max_batched_tokens=15)
    pressed = run(small, prompts, params)
    assert small.scheduler.statistics.preemptions > 0
    for one, other, third in zip(alone, crowded, pressed, strict=True):
        assert output(one) == output(other) == output(third)
    assert len({tuple(output(request)) for request in alone}) == 7


def test_seeds_outputs_and_no_seed_draw_different_numbers() -> None:
    ids = prompt(9)
    params = [sampled(0, seed=1, n=3), sampled(0, seed=2, n=3), sampled(0, seed=None, n=3), sampled(0, seed=None, n=3)]
    found = run(engine(), [ids] * 4, params)
    assert len({tuple(one.token_ids) for request in found for one in request.outputs}) == 12
    [again] = run(engine(), [ids], params[0])
    assert [one.token_ids for one in again.outputs] == [one.token_ids for one in found[0].outputs]


def test_samples_follow_the_models_distribution() -> None:
    """First tokens of 1,500 outputs: every frequency within 4.5 standard deviations of the probability."""
    ids, count = prompt(6), 1500
    [request] = run(
        engine(max_num_seqs=64, max_batched_tokens=64), [ids], SamplingParams(n=count, max_tokens=1, seed=5, ignore_eos=True)
    )
    found = torch.bincount(torch.tensor([one.token_ids[0] for one in request.outputs]), minlength=96)
    p = full_logprobs("yoco_u", ids)[-1].exp()
    assert bool(((found - count * p).abs() <= 4.5 * (count * p * (1 - p)).sqrt() + 1).all())


def test_logprobs_of_tokens_and_of_the_likeliest() -> None:
    """Raw ones, whatever the temperature, within 2e-5 of one pass over the whole text; `logprobs` of its own for each."""
    prompts = [prompt(5 + i, seed=i) for i in range(4)]
    params = [sampled(i, logprobs=top) for i, top in enumerate((0, 1, 5, 20))]
    found = run(engine(max_batched_tokens=9), prompts, params)
    for ids, own, request in zip(prompts, params, found, strict=True):
        completion = request.outputs[0]
        assert completion.logprobs is not None and len(completion.logprobs) == own.max_tokens
        truth = full_logprobs("yoco_u", ids + completion.token_ids, own.num_loops)[len(ids) - 1 : -1]
        for row, token, reported in zip(truth, completion.token_ids, completion.logprobs, strict=True):
            assert reported.chosen.token_id == token and len(reported.top) == own.logprobs
            assert_ranked(reported, row)
    assert run(engine(), [prompts[0]], sampled(0))[0].outputs[0].logprobs is None


def ended(completion: Completion) -> tuple[list[int], str | None, str | int | None]:
    return completion.token_ids, completion.finish_reason, completion.stop_reason


@pytest.mark.parametrize("as_list", [True, False])
def test_the_models_end_token(as_list: bool) -> None:
    ids = prompt(9)
    free = generated("yoco_u", ids)
    end = free[4]
    first = free.index(end)
    subject = Engine(
        build(engine().architecture, eos_token_id=[95, end] if as_list else end),
        None,
        EngineSettings(dtype="float32", cache_tokens=256),
    )
    params = [greedy(ignore_eos=False), greedy(), greedy(ignore_eos=False, max_tokens=first + 1)]
    found = [request.outputs[0] for request in run(subject, [ids] * 3, params)]
    assert ended(found[0]) == (free[: first + 1], "stop", end)
    assert ended(found[1]) == (free, "length", None)
    assert ended(found[2]) == (free[: first + 1], "stop", end)


def test_stop_tokens() -> None:
    ids = prompt(9)
    free = generated("yoco_u", ids)
    for place in (0, 3, NEW - 1):
        token = free[place]
        first = free.index(token)
        [request] = run(engine(), [ids], greedy(stop_token_ids=(token, 90)))
        assert ended(request.outputs[0]) == (free[: first + 1], "stop", token)


def test_no_end_before_min_tokens() -> None:
    ids = prompt(9)
    end = generated("yoco_u", ids)[0]
    [request] = run(engine(), [ids], greedy(stop_token_ids=(end,), min_tokens=5, max_tokens=7))
    assert end not in output(request)[:5]
    assert len(output(request)) > 5


@pytest.mark.parametrize("count", [1, 2, NEW])
def test_max_tokens(count: int) -> None:
    [request] = run(engine(), [prompt(9)], greedy(max_tokens=count))
    assert ended(request.outputs[0]) == (generated("yoco_u", prompt(9))[:count], "length", None)


def test_updates_say_what_each_step_added() -> None:
    subject = engine(max_batched_tokens=8)
    requests = [subject.add(prompt(15, seed=i), sampled(i, n=1 + i % 2)) for i in range(3)]
    tokens: dict[tuple[str, int], list[int]] = {}
    reasons: dict[tuple[str, int], list[str]] = {}
    while subject.unfinished:
        for update in subject.step():
            place = (update.request.id, update.output.index)
            tokens.setdefault(place, []).extend(update.token_ids)
            if update.finish_reason is not None:
                reasons.setdefault(place, []).append(update.finish_reason)
    places = [(request, one) for request in requests for one in request.outputs]
    assert tokens == {(request.id, one.index): one.token_ids for request, one in places}
    assert reasons == {(request.id, one.index): ["length"] for request, one in places}
    assert_all_free(subject)
    assert subject.step() == []
