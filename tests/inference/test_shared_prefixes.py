"""Prompts that begin alike, against each of them alone; and how many tokens are computed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pytest
from engine_runs import assert_all_free, assert_greedy, assert_ranked, engine, full_logprobs, greedy, model, prompt
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from yoco_u.errors import UserError
from yoco_u.inference import Engine, EngineSettings, RequestOutput, SamplingParams
from yoco_u.inference.exits import Exits
from yoco_u.inference.shared_prefixes import run_shared

BLOCK = 4


def scored(start: int, **settings: Any) -> SamplingParams:
    return SamplingParams(max_tokens=0, prompt_logprobs=1, prompt_logprobs_start=start, **settings)


@contextmanager
def computed_tokens(subject: Engine) -> Iterator[list[int]]:
    """How many tokens go through the model, step by step."""
    seen: list[int] = []
    embedding = subject.runner.model.model.embed_tokens
    hook = embedding.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    yield seen
    hook.remove()


def check(request: RequestOutput, start: int, variant: str = "yoco_u", loops: int | None = None) -> None:
    truth = full_logprobs(variant, request.prompt_token_ids, loops)
    found = request.prompt_logprobs
    assert found is not None
    for position in range(start, len(found)):
        one = found[position]
        assert one is not None
        assert_ranked(one, truth[position - 1])


@pytest.mark.parametrize("variant", ["yoco_u", "rins", "transformer", "yoco_retention"])
def test_multiple_choice(variant: str) -> None:
    """Four questions behind the same examples, four continuations each: what they share runs once."""
    subject = engine(variant, max_num_seqs=4, max_batched_tokens=20)
    examples, prompts, starts = prompt(60), [], []
    for question in range(4):
        context = [*examples, *prompt(30, seed=10 + question)]
        for choice in range(4):
            prompts.append([*context, *prompt(3 + choice, seed=100 + 4 * question + choice)])
            starts.append(len(context))
    order = sorted(range(16), key=lambda index: index % 4)  # the continuations of a question are not side by side
    done: list[int] = []
    with computed_tokens(subject) as seen:
        found = run_shared(
            subject,
            [prompts[index] for index in order],
            [scored(starts[index]) for index in order],
            lambda index, request: done.append(index),
        )
    assert_all_free(subject)
    assert sorted(done) == list(range(16))
    for request, index in zip(found, order, strict=True):
        assert request.prompt_token_ids == prompts[index]
        check(request, starts[index], variant)
    tails = sum(len(ids) - 1 - 88 for ids in prompts)  # behind the last whole block of 90 tokens, without the last token
    assert sum(seen) == 60 + 4 * 28 + tails


@settings(max_examples=examples(15))
@given(
    parts=st.lists(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 9)), max_size=4), min_size=1, max_size=8),
    starts=st.lists(st.integers(1, 40), min_size=8, max_size=8),
    caching=st.booleans(),
)
def test_any_tree(parts: list[list[tuple[int, int]]], starts: list[int], caching: bool) -> None:
    """Prompts of parts that often agree, some scored and some continued, at two loop counts."""
    prompts = [[5, *(token for seed, length in own for token in prompt(length, seed=seed)), 7] for own in parts]
    params = []
    for i, ids in enumerate(prompts):
        loops = 2 + i % 2
        start = min(starts[i], len(ids) - 1)
        params.append(greedy(max_tokens=3, num_loops=loops) if i % 3 == 2 else scored(start, num_loops=loops))
    subject = engine(max_num_seqs=3, max_batched_tokens=9, prefix_caching=caching)
    found = run_shared(subject, prompts, params)
    assert_all_free(subject)
    for ids, own, request in zip(prompts, params, found, strict=True):
        assert request.prompt_token_ids == ids
        if own.max_tokens:
            assert_greedy("yoco_u", request, own.num_loops, 3)
        else:
            check(request, own.prompt_logprobs_start, loops=own.num_loops)


@pytest.mark.parametrize("default", ["auto", 3])
def test_prompts_share_with_those_of_the_same_loops_alone(default: Literal["auto"] | int) -> None:
    """However these are named, by the request or by the engine: their caches are the same, or never shared."""
    exits = Exits(num_loops=3, score="angular", threshold=0.2)
    settings = {"dtype": "float32", "cache_tokens": 1024, "block_size": BLOCK, "max_num_seqs": 4, "max_batched_tokens": 64}
    subject = Engine(model("yoco_u"), None, EngineSettings(**settings, num_loops=default), exits)
    auto = {"num_loops": "auto"}
    ways: list[dict[str, Any]] = [{}, {"num_loops": 3}, auto, auto | {"exit_threshold": 0.2}, auto | {"exit_threshold": 0.3}]
    ways = [*ways, {"num_loops": 2}] * 2
    prompts = [[*prompt(68), own] for own in range(len(ways))]
    with computed_tokens(subject) as seen:
        run_shared(subject, prompts, [greedy(max_tokens=1, **own) for own in ways])
    assert_all_free(subject)
    assert sum(seen) == 4 * 68 + len(ways)  # the beginning once for each rule


def test_nothing_to_run() -> None:
    assert run_shared(engine(), [], []) == []


def test_one_that_is_not_possible_ends_all() -> None:
    subject = engine()
    with pytest.raises(UserError, match="token 96 of the prompt"):
        run_shared(subject, [prompt(30), [96], prompt(9)], [greedy()] * 3)
    assert_all_free(subject)
